"""`builder clean --keep SIZE`: remove what can be made again, least recently used first, until the home is small enough.

Wheels, records, logs, keys, sets and the index stay. A running build keeps all that it uses: an entry is moved away under
its lock, and moved back if a build that uses it has started meanwhile.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder.planning.settings import Settings
from builder.proof import record
from builder.proof.record import Record
from builder.upkeep import clean
from gracefarm.files import lock, remove_tree

Inode = tuple[int, int]
GROUNDS = ("roots", "environments", "toolchains")
"Folders of the home whose entries are named by the digests in the inputs of a build."
CACHES = ("ccache", "device")
"Folders of the home with an entry for each recipe."


@dataclass(frozen=True, kw_only=True)
class Cleared:
    """An entry of the home that was removed."""

    path: Path
    size: int
    "Bytes that this freed."


@dataclass(frozen=True, kw_only=True)
class Removable:
    """Something that can be removed as a whole."""

    path: Path
    lock: Path | None
    "The lock of those who make it; None: there is no lock."
    used: float
    "Time of the last use."


class DiskSpace:
    """The bytes of files in the home. A file with several names is freed with the last of them."""

    def __init__(self, home: Path) -> None:
        self.bytes: dict[Inode, int] = {}
        self.names: Counter[Inode] = Counter()
        for inode, size in _files(home):
            self.bytes[inode] = size
            self.names[inode] += 1

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.bytes.values())

    def without(self, folder: Path) -> int:
        """Forget the files of a folder that is removed next; return the bytes that this frees."""
        freed = 0
        for inode, _ in _files(folder):
            self.names[inode] -= 1
            if self.names[inode] == 0:
                freed += self.bytes.pop(inode)
        return freed


def _files(folder: Path) -> Iterator[tuple[Inode, int]]:
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            try:
                status = os.lstat(os.path.join(parent, name))  # noqa: PTH118 tens of thousands of files
            except FileNotFoundError:  # removed meanwhile
                continue
            yield (status.st_dev, status.st_ino), status.st_blocks * 512


def at_most(size: int, settings: Settings, on_wait: Callable[[], None]) -> tuple[list[Cleared], int]:
    """Remove entries until the home has at most `size` bytes; return these entries, and the bytes that are left.

    The first is uv's cache, whose files stay in the environments that use them.
    """
    home = settings.home
    removed: list[Cleared] = []
    with ExitStack() as held:
        for place in [home / "locks" / f"set-{folder.name}" for folder in (home / "sets").glob("*")]:
            held.enter_context(lock(place, on_wait))
        held.enter_context(lock(home / "locks" / "run", on_wait))
        space = DiskSpace(home)
        if space.total > size and (home / "uv").is_dir() and not (home / "uv").is_symlink():
            removed.append(Cleared(path=home / "uv", size=space.without(home / "uv")))
            clean.uv_cache(home / "uv")
        for entry in sorted(_entries(settings), key=lambda entry: entry.used):
            if space.total <= size:
                break
            with _moved_away(entry, settings) as moved:
                if moved is not None:
                    removed.append(Cleared(path=entry.path, size=space.without(moved)))
    return removed, space.total


@contextmanager
def _moved_away(entry: Removable, settings: Settings) -> Iterator[Path | None]:
    """The entry under the name of an incomplete one, removed afterwards; None: another process uses it."""
    place = entry.path
    with ExitStack() as held:
        if (entry.lock is not None and not _acquired(entry.lock, held)) or _in_use(place, settings):
            yield None
            return
        hidden = place
        if place.is_dir() and not place.name.startswith(".") and not place.is_relative_to(settings.home / "builds"):
            hidden = place.with_name(f".{place.name}.partial")
            remove_tree(hidden)
            place.rename(hidden)
        if _in_use(place, settings):  # by a build that started meanwhile
            hidden.rename(place)
            yield None
            return
        yield hidden
        remove_tree(hidden)


def _acquired(place: Path, held: ExitStack) -> bool:
    """Whether the lock was free; it is then held."""
    place.parent.mkdir(parents=True, exist_ok=True)
    stream = held.enter_context(place.open("a"))
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(place: Path, settings: Settings) -> bool:
    """Whether a running build uses an entry of the home. What a record does not name may be used by each of them."""
    running = list(_running(settings))
    kind, name = place.relative_to(settings.home).parts[:2]
    if kind in GROUNDS:
        return any(build is None or name in _named(build) for build in running)
    if kind in CACHES:
        return any(build is None or name == build.recipe for build in running)
    return kind != "builds" and bool(running)


def _named(build: Record) -> list[object]:
    """The values in the inputs of a build that may be digests of its ground."""
    facts = build.inputs.get("stack")
    return [*(facts.values() if isinstance(facts, dict) else ()), build.inputs.get("tools")]


def _running(settings: Settings) -> Iterator[Record | None]:
    """Builds and rebuilds that other processes run now; None: its record cannot be read."""
    for folder in (settings.home / "builds").glob("*"):
        with ExitStack() as held:
            places = (clean.lock_of_build(settings, folder), clean.lock_of_rebuild(settings, folder))
            if not all(_acquired(place, held) for place in places):
                yield record.read(settings, folder.name)


def _entries(settings: Settings) -> Iterator[Removable]:
    """All that can be removed, but not what is in a folder that is a link to another home."""
    home = settings.home
    for folder in (home / "builds").glob("*"):
        for name in (*record.SCRATCH, "rebuild"):
            if (folder / name).is_dir():
                guard = clean.lock_of_rebuild if name == "rebuild" else clean.lock_of_build
                yield Removable(path=folder / name, lock=guard(settings, folder), used=_changed(folder / name))
    for path, guard_path in clean.grounds(settings):
        if not path.is_symlink():
            # `lay_ground` sets the time of a ground's lock.
            used = guard_path.stat().st_mtime if guard_path.suffix == ".lock" and guard_path.exists() else _changed(path)
            yield Removable(path=path, lock=guard_path, used=used)
    for name in (*CACHES, "trees"):
        for path in clean.entries(home / name):
            yield Removable(path=path, lock=None, used=_changed(path))


def _changed(path: Path) -> float:
    """Time of the last read or change of a file, or of a change below a folder."""
    if not path.is_dir():
        status = path.stat()
        return max(status.st_atime, status.st_mtime)
    return max(os.lstat(parent).st_mtime for parent, _, _ in os.walk(path))

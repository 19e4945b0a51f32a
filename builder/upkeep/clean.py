"""`builder clean`: remove files that can be made again, each under the lock that protects it.

Lock files are never removed: a holder of a removed file and a process that creates it again would both have the lock.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import uv

from builder.planning.settings import Settings
from builder.proof import record
from gracefarm.files import lock, remove_tree

FETCHED = "fetched"
"Folder of the source trees of `builder fetch`, which removes them unless it is killed."
MADE = ("roots", "interpreters", "environments", "toolchains", "cuda", "wrappers", "git", "host/environments", "host/cuda")
"Folders of the home whose entries are made again. NAME.lock next to an entry is its lock, since homes may share the folders."


def working_folders(settings: Settings, on_wait: Callable[[], None]) -> None:
    """Remove the work files of finished and failed builds."""
    for folder in sorted((settings.home / "builds").glob("*")):
        with lock(lock_of_build(settings, folder), on_wait):
            for name in record.SCRATCH:
                remove_tree(folder / name)
        with lock(lock_of_rebuild(settings, folder), on_wait):
            remove_tree(folder / "rebuild")
    for folder in sorted((settings.home / "sets").glob("*")):
        with lock(settings.home / "locks" / f"set-{folder.name}", on_wait):
            remove_tree(folder / "together")
    for folder in sorted((settings.home / FETCHED).glob("*")):
        with lock(settings.home / "locks" / f"{FETCHED}-{folder.name}", on_wait):
            remove_tree(folder)
    with lock(settings.home / "locks" / "run", on_wait):
        for folder in sorted((settings.home / "sets").glob("*")):
            remove_tree(folder / "run")


def everything(settings: Settings, on_wait: Callable[[], None]) -> None:
    """Remove all builds and their grounds. All locks of builds are held meanwhile, so that no build uses them."""
    with ExitStack() as held:
        for folder in sorted((settings.home / "builds").glob("*")):
            held.enter_context(lock(lock_of_build(settings, folder), on_wait))
            held.enter_context(lock(lock_of_rebuild(settings, folder), on_wait))
            remove_tree(folder)
        for place, made_under in grounds(settings):
            with lock(made_under):
                remove_tree(place)
        remove_tree(settings.home / "trees")
        remove_tree(settings.home / "sets")
        remove_tree(settings.home / "ccache")
        remove_tree(settings.home / "device")
        remove_tree(settings.home / "farm")
        uv_cache(settings.home / "uv")


def lock_of_build(settings: Settings, folder: Path) -> Path:
    """Lock of the processes that build into a folder of builds/."""
    return settings.home / "locks" / f"build-{folder.name}"


def lock_of_rebuild(settings: Settings, folder: Path) -> Path:
    """Lock of the processes that build it again for a comparison."""
    return settings.home / "locks" / f"rebuild-{folder.name}"


def grounds(settings: Settings) -> Iterator[tuple[Path, Path]]:
    """Paths to remove, each with its lock; for a folder that is a link to another home, the link."""
    home = settings.home
    for name in (*MADE, "store"):
        if (home / name).is_symlink():
            yield home / name, home / "locks" / "links"
    for name in MADE:
        for entry in entries(home / name):
            yield entry, entry.with_name(f"{_final(entry).removesuffix('.git')}.lock")
    for folder in entries(home / "store" / "sha256"):
        for entry in entries(folder):
            yield entry, home / "store" / "locks" / entry.name.partition(".")[0]


def entries(folder: Path) -> list[Path]:
    """The entries of a folder of the home without their locks; none if the folder is a link to another home."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.suffix != ".lock")


def _final(place: Path) -> str:
    """The final name of an entry, also of an incomplete one (atomic_directory)."""
    return place.name.removeprefix(".").removesuffix(".partial") if place.name.startswith(".") else place.name


def uv_cache(cache: Path) -> None:
    """Let uv clean its cache, since it knows its locks."""
    if cache.is_symlink():
        cache.unlink()
    elif cache.is_dir():
        environment = {"PATH": os.defpath, "UV_CACHE_DIR": str(cache), "UV_NO_CONFIG": "1"}
        subprocess.run([uv.find_uv_bin(), "cache", "clean", "--quiet"], env=environment, check=False)

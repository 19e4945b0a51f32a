"""Byte code: compiled by the root's native Python, once for each wheel, and linked into every environment with that wheel."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from packaging.utils import canonicalize_name

from builder.box import sandbox
from builder.box.sandbox import BindMount, Sandbox
from builder.planning.pins import LAYOUT, LockedWheel
from builder.planning.settings import Settings
from builder.planning.stack import LoadedStack
from gracefarm.console import Tick
from gracefarm.errors import HostError, RootError
from gracefarm.files import atomic_directory, lock
from gracefarm.process import tail

NATIVE_PYTHON = "/usr/libexec/gracefarm/python-native"
"The host's Python inside every root; the target's Python can load its byte code."
INSIDE = "/env"
"Path of the environment in the sandbox."


@dataclass(frozen=True, kw_only=True)
class NativePython:
    """A Python of the host's architecture that byte-compiles for the target's Python of the same version."""

    folder: Path | None = None
    "Its folder, which is /build in the sandbox; None: it is in the root."
    command: tuple[str, ...] = (NATIVE_PYTHON,)


ROOTS_OWN = NativePython()


def compile_files(
    root: Path, inside: str, folder: Path, names: Iterable[str] | None = None, *, python: NativePython = ROOTS_OWN
) -> None:
    """Byte-compile Python files (`names`, relative; None: all) of `folder`, which is `inside` in the sandbox.

    The host's Python is used: a .pyc does not depend on the architecture, and emulation takes ten times as long.
    Tracebacks have the paths of the sandbox.

    Raises:
        RootError: the byte compiler failed; a file that is not Python is skipped.
        HostError: the sandbox cannot be started.
    """
    wanted = [str(path.relative_to(folder)) for path in folder.rglob("*.py")] if names is None else list(names)
    box = Sandbox(
        root=root,
        mounts=(
            *([BindMount(source=python.folder, target="/build")] if python.folder is not None else []),
            BindMount(source=folder, target=inside, writable=True),
        ),
        environment={"PATH": "/usr/bin", "LC_ALL": "C.UTF-8"},
        workdir="/",
        memory=0,
    )
    script = (files("builder") / "data" / "root" / "bytecode.py").read_text()
    try:
        process = subprocess.run(
            box.command([*python.command, "-I", "-S", "-c", script, inside]),
            input="\0".join(wanted),
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostError("bubblewrap is not installed", remedy="run `builder doctor --fix`, which installs it") from error
    if process.returncode:
        if problem := sandbox.check():
            raise HostError(
                f"the sandbox cannot be started: {problem}", remedy="run `builder doctor --fix`, as root or with sudo"
            )
        if os.strerror(errno.ENOSPC) in process.stderr:
            raise OSError(errno.ENOSPC, process.stderr)
        raise RootError(
            f"the Python files of {inside} cannot be byte-compiled: {tail(process.stderr)}",
            remedy="repeat the command; if it fails again, correct the Python packages in [root] of stack.toml",
        )


def fill_in(
    folder: Path,
    site: Path,
    locked: Sequence[LockedWheel],
    root: Path,
    stack: LoadedStack,
    settings: Settings,
    tick: Tick,
    python: NativePython = ROOTS_OWN,
) -> None:
    """Give every module its .pyc: from the store, if its wheel was compiled before; else compile it and store it."""
    modules = dict(_modules(site))
    home = settings.home / "environments" / "bytecode"
    keys = {wheel: f"{LAYOUT} {stack.python} {wheel.sha256}" for wheel in locked}
    stores = {wheel: home / hashlib.sha256(key.encode()).hexdigest() for wheel, key in keys.items()}
    missing = [wheel for wheel in locked if not stores[wheel].is_dir()]
    tick(0, None, f"byte-compiling {len(missing)} wheels" if missing else "linking byte code")
    prefix = site.relative_to(folder)
    names = [str(prefix / name) for wheel in missing for name in modules.get(wheel.name, ())]
    compile_files(root, INSIDE, folder, names, python=python)
    with lock(home.with_name("bytecode.lock")):
        for wheel in locked:
            if wheel in missing:
                _store(site, modules.get(wheel.name, []), stores[wheel])
            else:
                _link_tree(stores[wheel], site)


def _modules(site: Path) -> Iterator[tuple[str, list[str]]]:
    """Canonical name and Python files (relative to `site`) of each distribution, by its RECORD."""
    for record in site.glob("*.dist-info/RECORD"):
        names = [row[0] for row in csv.reader(io.StringIO(record.read_text())) if row and row[0].endswith(".py")]
        name = canonicalize_name(record.parent.name.split("-")[0])
        yield name, [place for place in names if ".." not in Path(place).parts and (site / place).is_file()]


def _store(site: Path, names: Sequence[str], store: Path) -> None:
    if store.is_dir():
        return
    tag = f"cpython-{site.parent.name.removeprefix('python').replace('.', '').rstrip('t')}"
    with atomic_directory(store) as folder:
        for name in names:
            # The free-threaded build may add a t.
            for suffix in (tag, f"{tag}t"):
                compiled = Path(name).parent / "__pycache__" / f"{Path(name).stem}.{suffix}.pyc"
                if (site / compiled).is_file():
                    (folder / compiled.parent).mkdir(parents=True, exist_ok=True)
                    (folder / compiled).hardlink_to(site / compiled)


def _link_tree(store: Path, site: Path) -> None:
    for parent, _, names in os.walk(store):
        into = site / Path(parent).relative_to(store)
        if names:
            into.mkdir(parents=True, exist_ok=True)
        for name in names:
            (into / name).unlink(missing_ok=True)  # the wheel of numpy 1.26 contains .pyc files
            os.link(os.path.join(parent, name), into / name)  # noqa: PTH118 tens of thousands of files

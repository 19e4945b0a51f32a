"""The Python of a Debian suite, unpacked from pinned packages and started with that suite's loader."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.fetch import store_path
from builder.ground import debian
from builder.ground.interpreters.tables import DebianSource, InterpreterLock
from builder.planning.packages import Deb
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from gracefarm import tables
from gracefarm.console import Tick
from gracefarm.errors import ConfigError, RootError
from gracefarm.files import remove_tree

LAYOUT = 1
"Raised when the layout or the launcher changes for the same packages; enters the digest."
_LOADERS = {Arch.AARCH64: "ld-linux-aarch64.so.1", Arch.X86_64: "ld-linux-x86-64.so.2"}


@dataclass(frozen=True, kw_only=True)
class DebianInterpreter:
    """An interpreter from Debian packages."""

    folder: Path
    python: str
    source: DebianSource

    @property
    def name(self) -> str:
        """See Interpreter."""
        return self.folder.name

    @property
    def lock_file(self) -> Path:
        """The lock, with version and sha256 of every .deb."""
        return self.folder / "packages.lock"

    def _debs(self, arch: Arch) -> tuple[Deb, ...]:
        locked = tables.read(self.lock_file, InterpreterLock)
        if arch not in locked.archs or locked.suite != self.source.suite:
            raise ConfigError(
                f"{self.lock_file} has no packages of {self.source.suite} for {arch}",
                remedy=f"write the lock again with `builder lock {self.name}`",
                repeat=f"builder lock {self.name}",
            )
        return locked.archs[arch].packages

    def digest(self, arch: Arch) -> str:
        """See Interpreter."""
        content = ["debian", LAYOUT, arch.value, self.python, sorted(deb.identity for deb in self._debs(arch))]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def absent(self, arch: Arch, settings: Settings) -> list[str]:
        """See Interpreter."""
        debs = [deb for deb in self._debs(arch) if not store_path(settings, deb.sha256).exists()]
        return [f"pkg:deb/debian/{deb.name}@{deb.version}?arch={deb.arch}" for deb in debs]

    def unpack(self, arch: Arch, folder: Path, settings: Settings, tick: Tick) -> None:
        """See Interpreter."""
        debs = self._debs(arch)
        places = debian.fetch(debs, self.source.suite, self.name, settings, tick)
        with TemporaryDirectory(dir=folder.parent, prefix=".unpacked-") as name:
            whole = Path(name)
            # Debian 13 has everything below usr/, except some links.
            for deb in debs:
                debian.unpack(places[deb.sha256], whole, deb)
            for part in ("bin", "lib", "include"):
                if (whole / "usr" / part).is_dir():
                    (whole / "usr" / part).rename(folder / part)
        _leave_out(folder, f"python{self.python}", arch)
        parts = (f"bin/python{self.python}", f"include/python{self.python}/Python.h")
        if absent := [part for part in parts if not (folder / part).is_file()]:
            raise RootError(
                f"the packages of interpreter {self.name} have no {absent[0]}",
                remedy=f"correct `packages` in {self.folder / 'interpreter.toml'}",
                repeat=f"builder lock {self.name}",
            )
        _one_header(folder / "include", f"python{self.python}", arch)
        for path in (folder / "lib" / f"python{self.python}").rglob("*"):
            # sitecustomize.py is a link to /etc.
            if path.name == "EXTERNALLY-MANAGED" or (path.is_symlink() and not path.exists()):
                path.unlink()

    def command(self, arch: Arch, prefix: str, program: str) -> tuple[str, ...]:
        """See Interpreter."""
        libraries = f"{prefix}/lib/{arch.triplet}"
        return (f"{libraries}/{_LOADERS[arch]}", "--library-path", libraries, "--argv0", '"$0"', f"{prefix}/{program}")

    def lock(self, settings: Settings, tick: Tick) -> str:
        """The text of a new packages.lock: apt's solution in the current suite, for each architecture.

        Raises:
            HostError: apt, the keyring or a mirror is missing.
            FetchError: the package lists cannot be fetched.
            RootError: apt finds no solution.
        """
        text = [
            f"# Every .deb of interpreter {self.name}; written by `builder lock {self.name}`, not by hand.",
            f'suite = "{self.source.suite}"',
        ]
        for number, arch in enumerate(archs := sorted(Arch)):
            tick(number, len(archs), f"packages of {self.source.suite} for {arch}")
            with debian.solver(self.source.suite, arch, [], settings) as apt:
                debs = apt.solve([f"{name}:{arch.debian}" for name in self.source.packages])
            text += debian.table(f"archs.{arch}", debs)
        tick(len(archs), len(archs), "")
        return "\n".join(text) + "\n"


def _leave_out(folder: Path, python: str, arch: Arch) -> None:
    """Keep only files that Python needs to run, and its headers: compilers use the C library's headers from the root."""
    kept = {"include": {python, arch.triplet}, "lib": {python, arch.triplet}}
    for part, names in kept.items():
        for path in (folder / part).iterdir():
            if path.name not in names:
                remove_tree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    libraries = folder / "lib" / arch.triplet
    for path in {*libraries.glob("*.[ao]"), *libraries.glob("libpython*")}:
        path.unlink()
    for path in (libraries / "gconv", *(folder / "lib" / python).glob("config-*")):
        remove_tree(path)


def _one_header(include: Path, python: str, arch: Arch) -> None:
    """Replace pyconfig.h by the file that it includes, since compilers here do not search the folder of that file."""
    own = include / arch.triplet / python / "pyconfig.h"
    if own.is_file():
        (include / python / "pyconfig.h").write_bytes(own.read_bytes())
    remove_tree(include / arch.triplet)

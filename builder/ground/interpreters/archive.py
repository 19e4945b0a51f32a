"""Standalone CPython archives, pinned by sha256."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from builder import elf
from builder.fetch import Download, archive, download, store_path
from builder.ground.interpreters.tables import Archive, ArchiveSource
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from gracefarm.console import Tick
from gracefarm.errors import ConfigError, RootError

LAYOUT = 1
"Raised when the layout or the launcher changes for the same archive; enters the digest."

_COMPILERS = {
    "CC": "gcc",
    "CXX": "g++",
    "LDSHARED": "gcc -shared",
    "LDCXXSHARED": "g++ -shared",
    "BLDSHARED": "gcc -shared",
    "LINKCC": "gcc",
    "MAINCC": "gcc",
    "AR": "ar",
    "RANLIB": "ranlib",
}
"Values in the archive's sysconfig from the machine that compiled it, and their counterparts in a root."
_FLAGS = re.compile(r"CFLAGS|LDFLAGS|OPT|BASECFLAGS")
"sysconfig variables that hold flags."
_FOREIGN = re.compile(
    r"\s*(?:--sysroot=\S+|-I/tools\S*|-L/tools\S*|-fdebug-default-version=\S+|-flto(?:=\S+)?|-Wno-\S+|-fprofile\S*)"
)
"Flags that are valid only with that machine's compiler or file system."


@dataclass(frozen=True, kw_only=True)
class ArchiveInterpreter:
    """An interpreter from a standalone archive."""

    folder: Path
    python: str
    source: ArchiveSource

    @property
    def name(self) -> str:
        """See Interpreter."""
        return self.folder.name

    def _archive(self, arch: Arch) -> Archive:
        pinned = self.source.archives.get(arch)
        if pinned is None:
            raise ConfigError(
                f"interpreter {self.name} has no archive for {arch}",
                remedy=f"add [source.archives.{arch}] to {self.folder / 'interpreter.toml'}",
            )
        return pinned

    def digest(self, arch: Arch) -> str:
        """See Interpreter."""
        content = ["archive", LAYOUT, arch.value, self.python, self._archive(arch).sha256]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def absent(self, arch: Arch, settings: Settings) -> list[str]:
        """See Interpreter."""
        pinned = self._archive(arch)
        return [] if store_path(settings, pinned.sha256).exists() else [pinned.url]

    def unpack(self, arch: Arch, folder: Path, settings: Settings, tick: Tick) -> None:
        """See Interpreter."""
        pinned = self._archive(arch)
        what = f"interpreter {self.name} for {arch}"
        places = download([Download(url=pinned.url, sha256=pinned.sha256, what=what)], settings, tick)
        archive.extract(places[pinned.sha256], folder, what, strip=True)
        program = folder / "bin" / f"python{self.python}"
        remedy = f"pin a different archive in {self.folder / 'interpreter.toml'}"
        if not program.is_file():
            raise RootError(f"the archive of {what} has no bin/python{self.python}", remedy=remedy)
        try:
            machine = elf.read(program).machine.removeprefix("EM_").lower()
        except elf.NotElfError as error:
            raise RootError(
                f"the archive of {what}: bin/python{self.python} is not a program: {error}", remedy=remedy
            ) from error
        if machine != arch.value:
            raise RootError(f"the archive of {what} is for {machine}", remedy=remedy)
        for data in (folder / "lib" / f"python{self.python}").glob("_sysconfigdata_*.py"):
            _name_our_compilers(data)
        for marker in folder.glob("lib/*/EXTERNALLY-MANAGED"):
            marker.unlink()
        # The environment has its own site-packages.
        shutil.rmtree(folder / "lib" / f"python{self.python}" / "site-packages", ignore_errors=True)

    def command(self, arch: Arch, prefix: str, program: str) -> tuple[str, ...]:
        """See Interpreter."""
        del arch  # its libraries are next to it on every architecture
        return (f"{prefix}/{program}",)


def _name_our_compilers(data: Path) -> None:
    """Make the archive's sysconfig name the compilers of the root, without the flags of the machine that compiled it."""
    try:
        statements = ast.parse(data.read_text()).body
        (build,) = (ast.literal_eval(node.value) for node in statements if isinstance(node, ast.Assign))
    except (ValueError, SyntaxError) as error:
        raise RootError(
            f"{data.name} in the interpreter's archive must be a single assignment of literals: {error}",
            remedy="pin a different archive in interpreter.toml",
        ) from error
    for name, value in build.items():
        if name in _COMPILERS:
            build[name] = _COMPILERS[name]
        elif isinstance(value, str) and _FLAGS.search(name):
            build[name] = " ".join(_FOREIGN.sub("", value).split())
    data.write_text(f"# Compilers and flags are those of the root.\nbuild_time_vars = {build!r}\n")

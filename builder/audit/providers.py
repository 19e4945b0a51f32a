"""Find libraries as the loader does: in the wheel, in the stack's environment, in the root, or in the driver."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from builder import elf
from builder.audit.contents import Contents, is_for
from builder.audit.policy import Policy
from builder.planning import driver
from builder.planning.stack import Arch

Origin = Literal["wheel", "environment", "system", "driver", "interpreter"]
ORIGIN = ("$ORIGIN", "${ORIGIN}")
LIBRARY_FOLDERS = ("lib", "lib64")
MAX_LINKS = 40
"The kernel's limit before ELOOP."


@dataclass(frozen=True, kw_only=True)
class Library:
    """A shared object or executable that may define symbols."""

    name: str
    "File name in the wheel, path below the environment or the root, or a soname."
    place: Origin
    binary: elf.Object

    @property
    def label(self) -> str:
        """Its name in a verdict."""
        return f"{posixpath.basename(self.name)} ({self.place})"


def library_files(site_packages: Path) -> dict[str, list[str]]:
    """Shared libraries of an environment by file name, as paths below it, in the order of preference."""
    files: dict[str, list[str]] = defaultdict(list)
    for folder, folders, names in os.walk(site_packages):
        folders[:] = [name for name in folders if name not in ("include", "__pycache__")]
        for name in names:
            if name.startswith("lib") and ".so" in name:
                files[name].append((Path(folder) / name).relative_to(site_packages).as_posix())
    return {name: sorted(paths, key=_preference) for name, paths in files.items()}


def _preference(path: str) -> tuple[int, str]:
    """The rank of a library: torch loads the libraries of its folder and NVIDIA's; copies in other packages come last."""
    parts = path.split("/")
    return ({"torch": 0, "nvidia": 1}.get(parts[0], 2), path)


def environment_sonames(site_packages: Path | None) -> frozenset[str]:
    """File names of the shared libraries of torch and CUDA in the stack's environment."""
    if site_packages is None:
        return frozenset()
    # Only folders that others link against (torch/lib, nvidia/cu13/lib), not private folders of a package.
    files = library_files(site_packages).items()
    return frozenset(name for name, paths in files if any(Path(path).parent.name in LIBRARY_FOLDERS for path in paths))


def inside(root: Path, path: str) -> Path | None:
    """A file of the root, with links resolved inside the root, or None."""
    pending, current, links = path.split("/")[::-1], list[str](), 0
    while pending:
        part = pending.pop()
        place = root.joinpath(*current, part)
        if part == "..":
            current = current[:-1]
        elif place.is_symlink():
            links += 1
            if links > MAX_LINKS:
                return None
            target = place.readlink().as_posix()
            current = [] if target.startswith("/") else current
            pending += target.split("/")[::-1]
        elif part not in ("", "."):
            current.append(part)
    place = root.joinpath(*current)
    return place if place.is_file() else None


def system_folders(target: Arch) -> tuple[str, ...]:
    """Folders of Debian's loader, in its built-in order."""
    triplet = target.triplet
    return (f"lib/{triplet}", f"usr/lib/{triplet}", "lib", "usr/lib", "lib64", "usr/lib64")


class Providers:
    """Libraries by the name in DT_NEEDED. Each file is read once; the tables are kept in this object."""

    def __init__(self, contents: Contents, policy: Policy, root: Path) -> None:
        self._policy = policy
        self._root = root
        self._objects = contents.loadable(policy.target)
        self._by_soname = own_names(self._objects)
        self._files = library_files(policy.site_packages) if policy.site_packages else {}
        self._read: dict[Path, elf.Object | None] = {}
        self._driver = _driver_library(policy)

    def own(self) -> list[Library]:
        """The objects of the wheel."""
        return [self._own(name) for name in self._objects]

    def _own(self, name: str) -> Library:
        return Library(name=name, place="wheel", binary=self._objects[name])

    def find(self, soname: str, requester: Library) -> Library | None:
        """The library that the loader finds for a DT_NEEDED of `requester`.

        It searches the folders in the requester's RPATH, then libraries that are loaded before a wheel's module (the other
        objects of the wheel; the libraries of torch and CUDA), then the system's, then the driver's.
        """
        return (
            self.led_to(soname, requester)
            or (self._own(self._by_soname[soname]) if soname in self._by_soname else None)
            or self._in_environment(soname)
            or self._in_system(soname)
            or (self._driver if soname == driver.SONAME else None)
        )

    def interpreter(self) -> Library | None:
        """The target's Python executable in the root.

        In the sandbox /usr/bin may have a launcher for the host; the Python is the object for the target that exports the
        C API.
        """
        root, known = self._root, self._policy.interpreter
        if known is not None:
            return self._library(known, known.name, "interpreter")
        for folder in ("usr/bin", "usr/local/bin", "usr/libexec", "opt"):
            depth = "" if folder.endswith("bin") else "**/"
            for path in sorted((root / folder).glob(f"{depth}python{self._policy.python}*")):
                library = self._library(inside(root, path.relative_to(root).as_posix()), path.name, "interpreter")
                if library is not None and library.binary.exports.meet("PyModule_Create2", None):
                    return library
        return None

    def led_to(self, soname: str, requester: Library) -> Library | None:
        """The library that the requester's RUNPATH or RPATH finds, without regard to loaded libraries."""
        if requester.place not in ("wheel", "environment"):
            return None
        for entry in requester.binary.search:
            head, _, rest = entry.partition("/")
            if head not in ORIGIN:
                continue
            path = posixpath.normpath(posixpath.join(posixpath.dirname(requester.name), rest, soname))
            if path in self._objects:
                return self._own(path)
            if not path.startswith("..") and (library := self._installed(path)):
                return library
        return None

    def _installed(self, path: str) -> Library | None:
        site = self._policy.site_packages
        return self._library(site / path, path, "environment") if site is not None else None

    def _in_environment(self, soname: str) -> Library | None:
        return next(filter(None, map(self._installed, self._files.get(soname, ()))), None)

    def _in_system(self, soname: str) -> Library | None:
        folders = (*system_folders(self._policy.target), *self._policy.folders)
        paths = [f"{folder}/{soname}" for folder in folders]
        return next(filter(None, (self._library(inside(self._root, path), path, "system") for path in paths)), None)

    def _library(self, path: Path | None, name: str, place: Origin) -> Library | None:
        """The file as a library for the target; None if it is something else (a linker script, for another machine)."""
        if path is None or not path.is_file():
            return None
        if path not in self._read:
            try:
                binary: elf.Object | None = elf.read(path)
            except elf.NotElfError:
                binary = None
            self._read[path] = binary if binary is not None and is_for(binary, self._policy.target) else None
        read = self._read[path]
        return None if read is None else Library(name=name, place=place, binary=read)


def own_names(objects: dict[str, elf.Object]) -> dict[str, str]:
    """A wheel's objects by file name and by soname."""
    names = {posixpath.basename(name): name for name in objects}
    return names | {binary.soname: name for name, binary in objects.items() if binary.soname}


def _driver_library(policy: Policy) -> Library | None:
    if policy.driver_headers is None:
        return None
    symbols = driver.symbols(policy.driver_headers)
    exports = elf.Exports(symbols=dict.fromkeys(symbols, (1,)), versions={}, versioned=False)
    binary = elf.Object(
        path=Path(driver.SONAME), machine="", bits=64, little_endian=True, kind="ET_DYN", interpreter=False, segments=(),
        soname=driver.SONAME, needed=(), rpath=(), runpath=(), fatbin=False, needs=(), references=(), exports=exports,
    )  # fmt: skip
    return Library(name=driver.SONAME, place="driver", binary=binary)

"""Target machines of a set: the wheels that each can install, and the values of its environment markers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from packaging.markers import Marker
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import Tag

from gracefarm.errors import UsageError
from gracefarm.pythons import serves
from index.names import wheel_tags

PYTHONS = tuple(f"3.{minor}" for minor in range(8, 16))
"Defaults."

_PYTHON = re.compile(r"(?:cp)?3\.?(\d{1,2})(t?)\Z")
_INTERPRETER = re.compile(r"(cp|py)3(\d*)\Z")
_ARCHES = "aarch64|x86_64|i686|armv7l|ppc64le|s390x|riscv64|loongarch64"
_PLATFORM = re.compile(rf"(?:(manylinux|musllinux)_(\d+)_(\d+)_|linux_)?({_ARCHES})\Z")
_LEGACY = {"manylinux1": "manylinux_2_5", "manylinux2010": "manylinux_2_12", "manylinux2014": "manylinux_2_17"}


@dataclass(frozen=True, kw_only=True, order=True)
class InstallTarget:
    """A CPython on a Linux machine."""

    python: str
    "For example 3.11, or 3.13t for a free-threaded build."
    arch: str
    "For example aarch64; empty: any."
    libc: str = ""
    "manylinux or musllinux; empty: any glibc."
    libc_version: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return f"Python {self.python} on {self.arch}" if self.arch else f"Python {self.python}"

    def takes(self, filename: str, requires_python: str | None = None) -> bool:
        """Whether it can install this wheel. For an sdist, only the Python counts."""
        if not self._allowed(requires_python):
            return False
        return not filename.endswith(".whl") or any(
            serves(tag, self.python) and self._loads(tag.platform) for tag in wheel_tags(filename)
        )

    def environment(self, extra: str = "") -> dict[str, str]:
        """The values of environment markers (PEP 508), for a late release of the Python minor version."""
        version = self.python.removesuffix("t")
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{version}.99",
            "os_name": "posix",
            "platform_machine": self.arch,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{version}.99",
            "python_version": version,
            "sys_platform": "linux",
            "extra": extra,
        }

    def _allowed(self, requires_python: str | None) -> bool:
        try:
            return not requires_python or SpecifierSet(requires_python).contains(f"{self.python.removesuffix('t')}.99")
        except InvalidSpecifier:
            return True

    def _loads(self, platform: str) -> bool:
        """Platform of a tag (PEP 600, 656)."""
        head, _, rest = platform.partition("_")
        match = _PLATFORM.match(f"{_LEGACY[head]}_{rest}" if head in _LEGACY else platform)
        if platform == "any" or not self.arch:
            return True
        if match is None or match[4] != self.arch or (match[1] or self.libc or "manylinux") != (self.libc or "manylinux"):
            return False
        return not self.libc or not match[1] or (int(match[2]), int(match[3])) <= self.libc_version


def python_of_tag(tag: Tag) -> str | None:
    """The only Python that a tag supports: 3.11 for cp311-cp311; None if it supports several, or not CPython 3."""
    match = _INTERPRETER.match(tag.interpreter)
    if match is None or match[1] == "py" or not tag.abi.startswith(tag.interpreter):
        return None
    return f"3.{match[2]}{'t' if tag.abi.endswith('t') else ''}"


def arch_of_tag(tag: Tag) -> str | None:
    """The architecture in the tag of a Linux wheel."""
    match = re.search(rf"linux.*?_({_ARCHES})\Z", tag.platform)
    return match[1] if match else None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A selection of machines; empty means all machines."""

    machines: tuple[InstallTarget, ...] = ()
    everything: bool = True
    "True if the selection is empty."
    name: str = ""
    "The names as the user gave them."

    def __str__(self) -> str:
        return self.name

    def takes(self, filename: str, requires_python: str | None) -> bool:
        """Whether one of the machines can install this file."""
        return self.everything or any(machine.takes(filename, requires_python) for machine in self.machines)

    def needs(self, marker: Marker | None) -> bool:
        """Whether a marker is true on one of the machines. Architecture is ignored if none was selected."""
        known = [machine for machine in self.machines if machine.arch]
        if marker is None or len(known) < len(self.machines) or self.everything:
            return True
        return any(marker.evaluate(machine.environment()) for machine in known)

    def without(self, filenames: Iterable[str]) -> Selection:
        """The machines that cannot install any of these wheels."""
        wheels = list(filenames)
        left = tuple(machine for machine in self.machines if not any(machine.takes(name) for name in wheels))
        return Selection(machines=left, everything=self.everything, name=self.name)


def select(platforms: Iterable[str], pythons: Iterable[str]) -> Selection:
    """Machines by the names that pip, uv and wheels use: manylinux_2_34_aarch64, aarch64; 3.11, cp311, 3.13t.

    The result combines every platform with every Python. If one of the two is not given, any value matches.

    Raises:
        UsageError: a name has another form.
    """
    wanted, versions = list(platforms), list(pythons)
    several = [python(text) for text in versions] or PYTHONS
    chosen = [
        InstallTarget(python=each, arch=arch, libc=libc, libc_version=version)
        for each, (arch, libc, version) in product(several, [_platform(text) for text in wanted] or [("", "", (0, 0))])
    ]
    return Selection(
        machines=tuple(chosen), everything=not wanted and not versions, name=" ".join([*sorted(wanted), *sorted(versions)])
    )


def python(text: str) -> str:
    """Convert 3.11 or cp311 to 3.11.

    Raises:
        UsageError: it is neither.
    """
    match = _PYTHON.match(text)
    if match is None:
        raise UsageError(f"{text!r} is not a Python version", remedy="write 3.11 or cp311")
    return f"3.{match[1]}{match[2]}"


def _platform(text: str) -> tuple[str, str, tuple[int, int]]:
    match = _PLATFORM.match(text)
    if match is None:
        raise UsageError(f"{text!r} is not a Linux platform", remedy="write aarch64 or manylinux_2_34_aarch64")
    return match[4], match[1] or "", (int(match[2] or 0), int(match[3] or 0))

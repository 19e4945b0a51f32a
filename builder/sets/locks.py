"""A built set's lock, for pip and uv (requirements.lock) and as PEP 751 has it (pylock.toml): every wheel by sha256."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import tomlkit
from packaging.markers import Marker
from packaging.pylock import Package, PackageWheel, Pylock
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from builder.sets.data import LoadedSet
from builder.sets.record import Locked
from gracefarm import tables
from gracefarm.errors import ConfigError
from gracefarm.files import sha256_file
from gracefarm.settings import Settings

if TYPE_CHECKING:
    from builder.ground.environment import LockedWheel


@dataclass(frozen=True, kw_only=True)
class Served:
    """Where a set will be served: an index's address, and the set's name there."""

    base: str
    "Without a slash at the end."
    name: str

    @property
    def simple(self) -> str:
        """The simple API that has this set's wheels and no other."""
        return f"{self.base}/{self.name}/simple/"

    def file(self, one: Locked) -> str:
        """The address of a file, as docs/index.md has it."""
        return f"{self.base}/files/{one.sha256}/{quote(one.filename, safe='')}"


def served(url: str, name: str) -> Served:
    """From any address of that index that people have at hand: its root, its simple API, the set's, the upload address."""
    base = re.sub(rf"(/{re.escape(name)})?/simple/?$|/(stage/[^/]+/)?legacy/?$", "", url.rstrip("/"))
    return Served(base=base.rstrip("/"), name=name)


def collect(of: LoadedSet, own: Sequence[Path], settings: Settings) -> list[Locked]:
    """Every wheel of the set, sorted by name.

    Raises:
        ConfigError: the lock says no file name for one of them.
        FetchError, DigestError: a wheel of an index of its own cannot be had there.
    """
    from builder.ground import environment

    named = dict(
        reversed(pair)
        for pair in re.findall(
            r"^# (\S+\.whl)\n\S+==.*--hash=sha256:([0-9a-f]{64})$",
            tables.read_text(of.runtime.requirements_lock),
            flags=re.MULTILINE,
        )
    )
    found = []
    for one in environment.wheels(of.runtime, of.data.target):
        filename = _own_index(one, settings) if one.index else named.get(one.sha256)
        if filename is None:
            raise ConfigError(
                f"{of.runtime.requirements_lock} does not say the file name of {one.name} {one.version}",
                remedy="make the lock again",
                repeat=of.runtime.lock_command,
            )
        found.append(Locked(name=one.name, version=one.version, filename=filename, sha256=one.sha256, index=one.index))
    for wheel in own:
        name, version, _, _ = parse_wheel_filename(wheel.name)
        found.append(
            Locked(
                name=canonicalize_name(name), version=str(version), filename=wheel.name, sha256=sha256_file(wheel), own=True
            )
        )
    return sorted(found, key=lambda one: one.name)


def _own_index(one: LockedWheel, settings: Settings) -> str:
    from builder.fetch import own_index

    return own_index.fetch_wheel(one.name, one.version, one.sha256, one.tags, one.index, settings)[1]


def requirements(title: str, wheels: Sequence[Locked]) -> str:
    """The text of requirements.lock: pip and uv read it with --require-hashes, `index mirror` takes its files."""
    lines = [f"# {title}"]
    for one in wheels:
        lines += [f"# {one.filename}", f"{one.name}=={one.version} --hash=sha256:{one.sha256}"]
    return "\n".join(lines) + "\n"


def pylock(of: LoadedSet, wheels: Sequence[Locked], at: Served) -> str:
    """The text of pylock.toml: every file by the address that the index will serve it at, and by sha256."""
    python = of.stack.data.python
    document = Pylock(
        lock_version=Version("1.0"),
        created_by="gracefarm",
        requires_python=SpecifierSet(f"=={python}.*"),
        environments=[Marker(f"sys_platform == 'linux' and platform_machine == '{of.data.target.value}'")],
        packages=[
            Package(
                name=canonicalize_name(one.name),
                version=Version(one.version),
                index=at.simple,
                wheels=[PackageWheel(name=one.filename, url=at.file(one), hashes={"sha256": one.sha256})],
            )
            for one in wheels
        ],
    )
    document.validate()
    return f"# Set {of.data.name}, rendered for {at.base}\n" + tomlkit.dumps(document.to_dict())

"""The locks of a built set, with every wheel by sha256: requirements.lock for pip and uv, and pylock.toml (PEP 751)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import tomlkit
from packaging.markers import Marker
from packaging.pylock import Package, PackageWheel, Pylock
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from builder.planning import pins
from builder.planning.settings import Settings
from builder.proof.publish import Login
from builder.sets.definition import LoadedSet
from builder.sets.set_record import Locked
from gracefarm.errors import ConfigError
from gracefarm.files import sha256_file


@dataclass(frozen=True, kw_only=True)
class SetAddress:
    """Where a set will be served: the URL of an index, and the set's name there."""

    base: str
    "URL without a trailing slash."
    name: str
    login: Login | None = field(default=None, repr=False)
    "Login for staging; None: from `publish.credentials`."

    @property
    def simple(self) -> str:
        """The simple API with only the wheels of this set."""
        return f"{self.base}/{self.name}/simple/"

    def file(self, wheel: Locked) -> str:
        """The URL of a file (docs/reference/index.md)."""
        return f"{self.base}/files/{wheel.sha256}/{quote(wheel.filename, safe='')}"


def served(url: str, name: str, login: Login | None = None) -> SetAddress:
    """The address from any URL of the index: its root, its simple API, the set's simple API, or the upload URL."""
    base = re.sub(rf"(/{re.escape(name)})?/simple/?$|/(stage/[^/]+/)?legacy/?$", "", url.rstrip("/"))
    return SetAddress(base=base.rstrip("/"), name=name, login=login)


def collect(of: LoadedSet, own: Sequence[Path], settings: Settings) -> list[Locked]:
    """All wheels of the set, sorted by name.

    Raises:
        ConfigError: the lock does not name the file of a wheel.
        FetchError, DigestError: a wheel of another index cannot be fetched.
    """
    locked = []
    for wheel in pins.wheels(of.runtime, of.data.target):
        filename = wheel.filename
        if wheel.index:
            from builder.fetch import own_index  # clients of HTTP

            filename = own_index.fetch_wheel(wheel, settings)[1]
        if not filename:
            raise ConfigError(
                f"{of.runtime.requirements_lock} has no comment with the file name of {wheel.name} {wheel.version}",
                remedy=f"write the lock again with `{of.runtime.lock_command}`",
                repeat=of.runtime.lock_command,
            )
        locked.append(
            Locked(name=wheel.name, version=wheel.version, filename=filename, sha256=wheel.sha256, index=wheel.index)
        )
    for place in own:
        name, version, _, _ = parse_wheel_filename(place.name)
        locked.append(Locked(name=name, version=str(version), filename=place.name, sha256=sha256_file(place), own=True))
    return sorted(locked, key=lambda wheel: wheel.name)


def requirements(title: str, wheels: Sequence[Locked]) -> str:
    """The text of requirements.lock, which pip and uv read with --require-hashes, and `index mirror` reads too."""
    lines = [f"# {title}"]
    for wheel in wheels:
        lines += [f"# {wheel.filename}", f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}"]
    return "\n".join(lines) + "\n"


def pylock(of: LoadedSet, wheels: Sequence[Locked], at: SetAddress) -> str:
    """The text of pylock.toml: every file by its URL at the index, and by sha256."""
    python = of.stack.python
    document = Pylock(
        lock_version=Version("1.0"),
        created_by="gracefarm",
        requires_python=SpecifierSet(f"=={python}.*"),
        environments=[Marker(f"sys_platform == 'linux' and platform_machine == '{of.data.target.value}'")],
        packages=[
            Package(
                name=canonicalize_name(wheel.name),
                version=Version(wheel.version),
                index=at.simple,
                wheels=[PackageWheel(name=wheel.filename, url=at.file(wheel), hashes={"sha256": wheel.sha256})],
            )
            for wheel in wheels
        ],
    )
    document.validate()
    return f"# Set {of.data.name}, rendered for {at.base}\n" + tomlkit.dumps(document.to_dict())

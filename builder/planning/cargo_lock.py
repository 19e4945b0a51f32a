"""The crates that a Cargo.lock pins by checksum."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import StringConstraints, ValidationError

from gracefarm.errors import SourceError
from gracefarm.tables import Sha256, Table

REGISTRY = "https://static.crates.io/crates"
"The server with the files of crates.io, as `dl` in the configuration of its index."
INDEXES = ("registry+https://github.com/rust-lang/crates.io-index", "sparse+https://index.crates.io/")
"What a Cargo.lock writes for crates.io."
_REMEDY = "write Cargo.lock again with `cargo generate-lockfile`, and add it with a patch in the recipe"


class Crate(Table):
    """A Rust crate.

    Name and version are validated, because the name of a folder is composed of them.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
    "Name on crates.io"
    version: Annotated[str, StringConstraints(pattern=r"^\d[0-9A-Za-z.+-]*$")]
    "Exact version"
    sha256: Sha256
    "sha256 of the .crate file, from Cargo.lock"
    license: str | None = None
    "SPDX expression in Cargo.toml of the crate. null: there is none"

    @property
    def title(self) -> str:
        """Name and version, as cargo writes them."""
        return f"{self.name} {self.version}"

    @property
    def folder(self) -> str:
        """The top folder of its archive."""
        return f"{self.name}-{self.version}"

    @property
    def url(self) -> str:
        """The address of its archive."""
        return f"{REGISTRY}/{self.name}/{quote(self.folder)}.crate"

    @property
    def purl(self) -> str:
        """Its package URL."""
        return f"pkg:cargo/{self.name}@{quote(self.version)}"


def read(lock: Path, where: str) -> list[Crate]:
    """The crates of a Cargo.lock, in its order, without the packages of the source. `where` names the file in messages.

    Raises:
        SourceError: the file is damaged, or takes a package from another place than crates.io.
    """
    try:
        packages = tomllib.loads(lock.read_text()).get("package", [])
        return [_crate(package, where) for package in packages if "source" in package]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{where} cannot be read: {error}", remedy=_REMEDY) from error


def _crate(package: Mapping[str, Any], where: str) -> Crate:
    title, source = f"{package['name']} {package['version']}", str(package["source"])
    if source not in INDEXES:
        kind = "a git repository" if source.startswith("git+") else "a registry other than crates.io"
        raise SourceError(
            f"{where} takes {title} from {kind}, {source}, but only crates of crates.io are supported",
            remedy=f"add a patch to the recipe that changes Cargo.toml and Cargo.lock: {title} must be a release on "
            "crates.io, or the path of a [[repositories]] entry",
        )
    if "checksum" not in package:
        raise SourceError(
            f"{where} has no checksum of {title}",
            remedy=_REMEDY,
        )
    try:
        return Crate(name=package["name"], version=package["version"], sha256=package["checksum"])
    except ValidationError as error:
        problem = error.errors()[0]
        raise SourceError(
            f"{where}: {problem['loc'][0]} of {title} is not valid: {problem['msg']}",
            remedy=_REMEDY,
        ) from error

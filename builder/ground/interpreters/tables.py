"""interpreters/NAME/interpreter.toml and packages.lock, as data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from builder.planning.packages import Packages
from builder.planning.stack import Arch
from gracefarm.tables import Sha256, Table, Url


class Archive(Table):
    """An archive (.tar.gz) that contains CPython in the folder python/."""

    url: Url
    "URL of the archive"
    sha256: Sha256
    "sha256 of the archive"


class ArchiveSource(Table):
    """CPython from the project python-build-standalone. It runs on glibc 2.17 and later."""

    kind: Literal["archive"]
    "Selects this kind of source"
    archives: dict[Arch, Archive]
    "Archives. The key is the architecture that the interpreter runs on"


class DebianSource(Table):
    """The Python of a Debian suite, with the C library of the suite. This C library may be newer than the C library of the
    root."""

    kind: Literal["debian"]
    "Selects this kind of source"
    suite: str
    "Debian suite, for example trixie"
    packages: tuple[str, ...] = Field(min_length=1)
    "Packages to unpack, together with their dependencies. packages.lock pins them"


class InterpreterTable(Table):
    """interpreter.toml."""

    python: Annotated[str, StringConstraints(pattern=r"^3\.\d+t?$")]
    "Major and minor version, for example 3.13. 3.13t is the free-threaded build of 3.13"
    version: str
    "Full version, for example 3.13.15"
    source: Annotated[ArchiveSource | DebianSource, Field(discriminator="kind")]
    "Source of the interpreter"


class InterpreterLock(Table):
    """packages.lock."""

    suite: str
    archs: dict[Arch, Packages]

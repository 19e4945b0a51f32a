"""The sources and files of a recipe; each is pinned by digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from packaging.licenses import canonicalize_license_expression
from packaging.utils import canonicalize_name
from packaging.version import Version
from pydantic import AfterValidator, Field, model_validator

from builder.planning.digests import DigestFields, PinnedDownload
from builder.planning.stack import Arch
from gracefarm.tables import Commit, InsidePath, Table, Url


def _canonical_version(text: str) -> str:
    Version(text)
    return text


VersionText = Annotated[str, AfterValidator(_canonical_version)]
SpdxExpression = Annotated[str, AfterValidator(canonicalize_license_expression)]
"An SPDX licence expression, with LicenseRef-NAME for a licence that SPDX does not list."


class SdistSource(PinnedDownload):
    """A source distribution (sdist) from the Python index."""

    kind: Literal["sdist"]
    "Selects this kind of source"
    name: str = ""
    "Project on the Python index. Default: the recipe's `name`"
    version: VersionText = ""
    "Exact version of the project. Default: the recipe's `version`"

    @property
    def origin(self) -> str:
        """Its package URL."""
        return f"pkg:pypi/{canonicalize_name(self.name)}@{self.version}"


class Submodule(Table):
    """A git submodule of the source, at one commit."""

    url: Url
    "URL of the repository"
    commit: Commit
    "Full commit id"
    tree: Commit | None = None
    "Git's tree id of the commit (`git rev-parse COMMIT^{tree}`). If the key is present, the builder checks this id too"
    license: SpdxExpression | None = None
    "SPDX expression of the licence. Without this key, the gate `licence` refuses the wheel"


class Repository(Table):
    """An additional git repository in the source tree, for example a repository that CMake's FetchContent would download."""

    url: Url
    "URL of the repository"
    commit: Commit
    "Full commit id. Branches and tags are refused"
    tree: Commit | None = None
    "Git's tree id of the commit (`git rev-parse COMMIT^{tree}`). If the key is present, the builder checks this id too"
    path: InsidePath
    "Destination in the source tree"
    license: SpdxExpression | None = None
    "SPDX expression of the licence. Without this key, the gate `licence` refuses the wheel"


class GitSource(Table):
    """A git repository at one commit."""

    kind: Literal["git"]
    "Selects this kind of source"
    url: Url
    "URL of the repository"
    commit: Commit
    "Full commit id. Branches and tags are refused"
    tree: Commit | None = None
    "Git's tree id of the commit (`git rev-parse COMMIT^{tree}`). If the key is present, the builder checks this id too"
    submodules: dict[str, Submodule] = Field(default_factory=dict)
    "Submodules to fetch. The key is the path of the submodule. Other submodules are not fetched"


class FileSource(PinnedDownload):
    """A source archive (.tar.gz, .tar.xz or .zip)."""

    kind: Literal["file"]
    "Selects this kind of source"
    url: Url
    "URL of the archive"

    @property
    def origin(self) -> str:
        """Its address."""
        return self.url


class File(DigestFields):
    """An additional file in the source tree. Give exactly one of `url`, `name`, `deb` and `text`.

    It comes from a URL (`url`), from the Python index (`name`, `version`) or from Debian's archive (`deb`, `suite`).
    """

    url: Url | None = None
    "URL of the file"
    name: str | None = None
    "Project on the Python index. `sha256` selects one file of this project"
    version: VersionText | None = None
    "Exact version of the project. Required with `name`"
    deb: InsidePath | None = None
    "Path of a package in Debian's archive. The path ends in NAME_VERSION_ARCH.deb"
    suite: str | None = None
    "Debian suite of the package. Required with `deb`"
    text: str | None = None
    "Content of the file. Such a file has no `sha256`"
    path: InsidePath
    "Destination in the source tree"
    unpack: bool = False
    "`true`: the file is an archive, which is unpacked into `path`"
    members: dict[str, InsidePath | tuple[InsidePath, ...]] = Field(default_factory=dict)
    (
        "Files and folders of the archive that are unpacked. The key is the path in the archive. The value is one "
        "destination below `path`, or a list of destinations. Default: everything is unpacked"
    )
    license: SpdxExpression | None = None
    "SPDX expression of the licence. Without this key, the gate `licence` refuses the wheel"
    binfmt: bool = False
    (
        "`true`: the build runs programs from this file that are compiled for the target. If the host has a different "
        "architecture, it must emulate them, as for `binfmt` in `[build]`"
    )
    host: Arch | None = None
    "Architecture of the hosts that use the file. Default: all hosts use it"

    @property
    def origin(self) -> str:
        """The URL, or the package URL, by which `[wheel] bundled` names it; empty for a text."""
        return origin_of(self.model_dump())

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if [self.url, self.name, self.deb, self.text].count(None) != 3:
            raise ValueError("give exactly one of url, name, deb and text")
        if (self.name is None) != (self.version is None) or (self.deb is None) != (self.suite is None):
            raise ValueError("give name and version together, and deb and suite together")
        if self.deb is not None and len(Path(self.deb).name.split("_")) != 3:
            raise ValueError("deb must be a path that ends in NAME_VERSION_ARCH.deb")
        if self.url is not None:
            self.require_one()
        elif self.text is None and self.sha256 is None:
            raise ValueError("an entry that has the key 'name' or 'deb' must have the key 'sha256'")
        elif self.text is not None and (self.sha256 or self.sha256_unknown or self.unpack or self.members):
            others = "'sha256', 'sha256_unknown', 'unpack' or 'members'"
            raise ValueError(f"an entry that has the key 'text' cannot have the keys {others}")
        return self


def origin_of(file: Mapping[str, Any]) -> str:
    """`File.origin` of an entry in a build's inputs; inputs of earlier versions have only URLs and texts."""
    if name := file.get("name"):
        return f"pkg:pypi/{canonicalize_name(name)}@{file['version']}"
    if deb := file.get("deb"):
        name, version, arch = Path(deb).stem.split("_")
        return f"pkg:deb/debian/{name}@{version}?arch={arch}"
    return file["url"] or ""

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
    """A source distribution from the Python index. It is fetched with the simple API and not executed."""

    kind: Literal["sdist"]
    "Selects this kind of source"
    name: str
    "Project on the Python index"
    version: VersionText
    "Exact version"

    @property
    def origin(self) -> str:
        """Its package URL."""
        return f"pkg:pypi/{canonicalize_name(self.name)}@{self.version}"


class Submodule(Table):
    """A git submodule, pinned by commit."""

    url: Url
    "URL of the repository"
    commit: Commit
    "Full commit id"
    tree: Commit | None = None
    "Tree id of that commit; optional additional check"
    license: SpdxExpression | None = None
    "SPDX expression of its licence. If absent, the gate `licence` refuses the wheel"


class Repository(Table):
    """An additional git repository in the source tree, instead of CMake's FetchContent."""

    url: Url
    "URL of the repository"
    commit: Commit
    "Full commit id; never a branch or a tag"
    tree: Commit | None = None
    "Tree id of that commit"
    path: InsidePath
    "Destination, relative to the source tree"
    license: SpdxExpression | None = None
    "SPDX expression of its licence. If absent, the gate `licence` refuses the wheel"


class GitSource(Table):
    """A git repository at one commit; names of branches and tags are refused."""

    kind: Literal["git"]
    "Selects this kind of source"
    url: Url
    "URL of the repository"
    commit: Commit
    "Full commit id; never a branch or a tag"
    tree: Commit | None = None
    "Tree id of that commit; optional additional check"
    submodules: dict[str, Submodule] = Field(default_factory=dict)
    "Submodules to check out. The key is the path in the repository. Folders of other submodules stay empty"


class FileSource(PinnedDownload):
    """A source archive (.tar.gz, .tar.xz, .zip) by URL and digest."""

    kind: Literal["file"]
    "Selects this kind of source"
    url: Url
    "URL of the archive"

    @property
    def origin(self) -> str:
        """Its address."""
        return self.url


class File(DigestFields):
    """An additional download, or a text, that the build requires in the source tree.

    It comes from a URL (`url`), from the Python index (`name`, `version`) or from Debian's archive (`deb`, `suite`).
    """

    url: Url | None = None
    "URL of the file"
    name: str | None = None
    "Project on the Python index. The digest selects one of the project's files"
    version: VersionText | None = None
    "Exact version of that project"
    deb: InsidePath | None = None
    "Path of a package in Debian's archive, in the form that toolchain.lock uses"
    suite: str | None = None
    "Debian suite that contains the package"
    text: str | None = None
    "Content of the file, instead of a download"
    path: InsidePath
    "Destination, relative to the source tree"
    unpack: bool = False
    "Unpack the archive into `path` instead of copying it"
    members: dict[str, InsidePath | tuple[InsidePath, ...]] = Field(default_factory=dict)
    (
        "Unpack only these files and folders of the archive. The key is the path in the archive. The value is one destination "
        "or several destinations below `path`"
    )
    license: SpdxExpression | None = None
    "SPDX expression of its licence. If absent, the gate `licence` refuses the wheel"
    binfmt: bool = False
    "The build executes programs from this file that are compiled for the target"
    host: Arch | None = None
    "Architecture of the build machine that needs the file. Default: every architecture"

    @property
    def origin(self) -> str:
        """The URL, or the package URL, by which `[wheel] bundled` names it; empty for a text."""
        return origin_of(self.model_dump())

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if [self.url, self.name, self.deb, self.text].count(None) != 3:
            raise ValueError("give exactly one of url, name, deb and text")
        if (self.name is None) != (self.version is None) or (self.deb is None) != (self.suite is None):
            raise ValueError("name requires version, deb requires suite")
        if self.deb is not None and len(Path(self.deb).name.split("_")) != 3:
            raise ValueError("deb is a path that ends in NAME_VERSION_ARCH.deb")
        if self.url is not None:
            self.require_one()
        elif self.text is None and self.sha256 is None:
            raise ValueError("a file with name or deb requires sha256")
        elif self.text is not None and (self.sha256 or self.sha256_unknown or self.unpack or self.members):
            raise ValueError("a text has no digest and cannot be unpacked")
        return self


def origin_of(file: Mapping[str, Any]) -> str:
    """`File.origin` of an entry in a build's inputs; inputs of earlier versions have only URLs and texts."""
    if name := file.get("name"):
        return f"pkg:pypi/{canonicalize_name(name)}@{file['version']}"
    if deb := file.get("deb"):
        name, version, arch = Path(deb).stem.split("_")
        return f"pkg:deb/debian/{name}@{version}?arch={arch}"
    return file["url"] or ""

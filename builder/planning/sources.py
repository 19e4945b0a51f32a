"""Where a recipe's source comes from, as data: each kind is pinned by digest."""

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
"A licence as SPDX writes it, or LicenseRef-NAME for one that is not on its list."


class SdistSource(PinnedDownload):
    """A source distribution from the Python index. It is fetched through the simple API and not executed."""

    kind: Literal["sdist"]
    "Selects this kind of source."
    name: str = Field(description="Project on the Python index")
    version: VersionText = Field(description="Exact version")

    @property
    def origin(self) -> str:
        """Its package URL."""
        return f"pkg:pypi/{canonicalize_name(self.name)}@{self.version}"


class Submodule(Table):
    """A git submodule, pinned like its parent."""

    url: Url
    "URL of the repository."
    commit: Commit
    "Full commit id."
    tree: Commit | None = Field(default=None, description="Checked where given; the commit's id covers it already")
    license: SpdxExpression | None = Field(default=None, description="The gate `licence` refuses a wheel without it")


class Repository(Table):
    """Another git repository in the source tree, in place of CMake's FetchContent."""

    url: Url
    "URL of the repository."
    commit: Commit = Field(description="Full commit id; never a branch or a tag")
    tree: Commit | None = None
    "Tree id of that commit."
    path: InsidePath = Field(description="Where it is checked out, relative to the source tree")
    license: SpdxExpression | None = Field(default=None, description="The gate `licence` refuses a wheel without it")


class GitSource(Table):
    """A git repository at one commit, checked by its tree; a branch or tag name is refused."""

    kind: Literal["git"]
    "Selects this kind of source."
    url: Url
    "URL of the repository."
    commit: Commit = Field(description="Full commit id; never a branch or a tag")
    tree: Commit | None = Field(
        default=None, description="Tree id of that commit, checked where given; the id covers it already"
    )
    submodules: dict[str, Submodule] = Field(default_factory=dict, description="By path inside the tree; others stay empty")


class FileSource(PinnedDownload):
    """A source archive (.tar.gz, .tar.xz, .zip) by URL and digest."""

    kind: Literal["file"]
    "Selects this kind of source."
    url: Url
    "URL of the archive."

    @property
    def origin(self) -> str:
        """Its address."""
        return self.url


class File(DigestFields):
    """A further download, or a text, that the build expects at a place of the source tree.

    Comes from an address (`url`), from the Python index (`name`, `version`) or from Debian's archive (`deb`, `suite`).
    """

    url: Url | None = None
    "URL of the file."
    name: str | None = Field(default=None, description="Project on the Python index; the digest says which of its files")
    version: VersionText | None = Field(default=None, description="Exact version of that project")
    deb: InsidePath | None = Field(default=None, description="Package in Debian's archive, as a toolchain.lock has its `path`")
    suite: str | None = Field(default=None, description="Suite whose mirror has that package")
    text: str | None = Field(default=None, description="The file's whole content, instead of a download")
    path: InsidePath = Field(description="Where it is put, relative to the source tree")
    unpack: bool = Field(default=False, description="Unpack the archive into `path` instead of copying it")
    members: dict[str, InsidePath | tuple[InsidePath, ...]] = Field(
        default_factory=dict,
        description="Unpack only these files and folders of the archive, each to one or several places below `path`",
    )
    license: SpdxExpression | None = Field(default=None, description="The gate `licence` refuses a wheel without it")
    binfmt: bool = Field(default=False, description="The build executes programs of the target out of it")
    host: Arch | None = Field(
        default=None, description="Architecture of the machine that builds, where the build needs this file; None: any"
    )

    @property
    def origin(self) -> str:
        """The address, or the package URL, by which `[wheel] bundled` names it; empty for a text."""
        return origin_of(self.model_dump())

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if [self.url, self.name, self.deb, self.text].count(None) != 3:
            raise ValueError("give one of url, name, deb and text")
        if (self.name is None) != (self.version is None) or (self.deb is None) != (self.suite is None):
            raise ValueError("name goes with version, deb with suite")
        if self.deb is not None and len(Path(self.deb).name.split("_")) != 3:
            raise ValueError("deb is a path that ends in NAME_VERSION_ARCH.deb")
        if self.url is not None:
            self.require_one()
        elif self.text is None and self.sha256 is None:
            raise ValueError("a file of an index or an archive is pinned by its sha256")
        elif self.text is not None and (self.sha256 or self.sha256_unknown or self.unpack or self.members):
            raise ValueError("a text has no digest and is no archive")
        return self


def origin_of(file: Mapping[str, Any]) -> str:
    """`File.origin` of an entry's table, as a build's inputs have it; earlier versions had addresses and texts alone."""
    if name := file.get("name"):
        return f"pkg:pypi/{canonicalize_name(name)}@{file['version']}"
    if deb := file.get("deb"):
        name, version, arch = Path(deb).stem.split("_")
        return f"pkg:deb/debian/{name}@{version}?arch={arch}"
    return file["url"] or ""

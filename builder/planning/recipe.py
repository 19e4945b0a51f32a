"""What to build, as data: recipes/NAME/recipe.toml, its patches and smoke scripts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from packaging.licenses import canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from pydantic import AfterValidator, Field, model_validator

from builder.planning.digests import DigestFields, PinnedDownload
from builder.planning.stack import TORCH, BuildRequirements, LoadedStack, Ptx, RequirementText, Sm, unknown
from gracefarm import tables
from gracefarm.errors import ConfigError
from gracefarm.tables import Commit, InsidePath, Sha256, Size, Table, Url


def _canonical_version(text: str) -> str:
    Version(text)
    return text


def _specifiers(text: str) -> str:
    SpecifierSet(text)  # whose error is a ValueError, and so names file and line
    return text


PLACEHOLDERS = ("{sm}", "{sm_dotted}", "{sm_gencode}")
"In values of [build]: the cell's architectures, for packages that do not read TORCH_CUDA_ARCH_LIST."
ToolchainKind = Literal["sandbox", "host", "container"]
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
    tree: Commit = Field(description="Tree id of that commit")
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


class Substitution(Table):
    """A change of the source by its text: where a patch would need context that may move, and must not be missed silently."""

    path: InsidePath
    "File to change, relative to the source tree."
    find: str = Field(min_length=1)
    "Text to replace."
    replace: str
    "Replacement."
    count: int = Field(default=1, ge=1, description="How often the text stands there; another number is an error")


class Build(Table):
    """How the wheel is compiled."""

    requires: tuple[RequirementText, ...] = Field(
        default=(), description="Build requirements in addition to the stack's environment; `builder lock NAME` pins them"
    )
    subdirectory: InsidePath = Field(default=".", description="Folder of pyproject.toml or setup.py in the source")
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="Variables for the build; they enter the build id. {sm}, {sm_dotted} and {sm_gencode} stand for the "
        "cell's architectures, as 90;100a, 9.0;10.0a and -gencode=arch=compute_90,code=sm_90, also in config_settings "
        "and cmake",
    )
    config_settings: dict[str, str] = Field(default_factory=dict, description="PEP 517 config settings")
    cmake: dict[str, str] = Field(
        default_factory=dict, description="CMake cache variables, for packages that pass none on; set by our toolchain file"
    )
    cuda: bool = Field(
        default=True,
        description="Needs the CUDA compiler and torch; false for a plain C extension, whose environment has torch only if "
        "`requires` of the build or of the wheel names it",
    )
    memory_per_job: Size = Field(default="4GiB", description="Peak memory of one compile job; bounds the number of jobs")
    unit_memory: dict[str, Size] = Field(
        default_factory=dict,
        description="Peak memory of source files (glob, also of a folder) that need more than memory_per_job, until a build "
        "has measured them",
    )
    unit_seconds: dict[str, int] = Field(
        default_factory=dict,
        description="Seconds of source files (glob) that take far longer than the rest, until a build has measured them",
    )
    binfmt: bool = Field(default=False, description="The build executes programs of the target other than Python")

    @model_validator(mode="after")
    def _known_placeholders(self) -> Self:
        for name, value in {**self.environment, **self.config_settings, **self.cmake}.items():
            for placeholder in re.findall(r"\{sm(?:_\w*)?\}", value):
                if placeholder not in PLACEHOLDERS:
                    raise ValueError(f"{name} has {placeholder}: {tables.nearest(placeholder, PLACEHOLDERS, 'placeholders')}")
                if not self.cuda:
                    raise ValueError(f"{name} has {placeholder}, and cuda = false compiles for no architecture")
        return self


class Bundled(Table):
    """A third-party file that the wheel contains on purpose."""

    path: InsidePath = Field(description="In the wheel; with `origin` a glob")
    sha256: Sha256 | None = None
    "sha256 of the file; use either sha256 or origin."
    origin: str | None = Field(
        default=None, description="URL or package URL (pkg:pypi/NAME@VERSION) of the [[files]] entry that has it, or 'source'"
    )
    license: SpdxExpression
    "SPDX expression of the file's licence."

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.sha256 is None) == (self.origin is None):
            raise ValueError("give sha256 or origin, and not both")
        return self


class Wheel(Table):
    """What the finished wheel must look like."""

    sm_extra: dict[str, tuple[Sm, ...]] = Field(
        default_factory=dict,
        description="Further sm values for source files, or for all in a folder, by glob, as {'hopper/*.cu' = ['90a']}",
    )
    sm_supported: tuple[Sm, ...] = Field(
        default=(), description="sm values that the source supports, and --sm may name; empty: any that CUDA knows"
    )
    allow_sm_fallback: bool = Field(
        default=False,
        description="A source that asks for 90a, or for a family as 100f, may be compiled for 90, or 100, instead",
    )
    ptx: Ptx | None = Field(default=None, description="As of the stack, in its place; 'none': no PTX")
    requires: dict[str, RequirementText] = Field(
        default_factory=dict,
        description="Requires-Dist by distribution, in place of what the package says of it, as {'triton' = 'triton==3.2.0'}",
    )
    source_archive: bool = Field(
        default=False, description="Publish the exact patched source beside the wheel, as licences of the AGPL's kind ask"
    )
    licenses: tuple[InsidePath, ...] = Field(
        default=(),
        description="Licence texts of code that is compiled in, by place in the source tree: put into .dist-info/licenses",
    )
    bundled: tuple[Bundled, ...] = Field(default=(), description="Third-party files inside; any other is refused")
    max_size: Size = Field(default="500MiB", description="Largest wheel accepted")
    may_publish: str | None = Field(
        default=None, description="Why the wheel may be passed on, where the recipe's licence does not allow it"
    )

    @model_validator(mode="after")
    def _requires_by_its_own_name(self) -> Self:
        for name, text in self.requires.items():
            if canonicalize_name(Requirement(text).name) != canonicalize_name(name):
                raise ValueError(f"requires {name!r} is given {text!r}, a requirement of another distribution")
        return self


class Smoke(Table):
    """What must work in a clean environment."""

    imports: tuple[str, ...] = Field(min_length=1, description="Modules imported by name, extensions included")


Specifiers = Annotated[str, AfterValidator(_specifiers)]


class KnownBad(Table):
    """A combination whose wheel computes wrong numbers, or does not run: `plan` refuses it."""

    sm: tuple[Sm, ...] = Field(default=(), description="Architectures of the device code; empty: any")
    cuda: Specifiers = Field(default="", description="Releases of CUDA, as '<13.1'; empty: any")
    torch: Specifiers = Field(default="", description="Releases of torch, as '>=2.9,<2.11'; empty: any")
    reason: str = Field(min_length=1, description="What is wrong with it")
    link: Url = Field(description="Where it was reported or measured")


class Recipe(Table):
    """recipe.toml."""

    name: str = Field(description="Distribution name")
    version: VersionText = Field(description="Version of the wheel; another one is an error")
    summary: str = ""
    "One line for lists."
    license: SpdxExpression = Field(description="SPDX expression")
    stack: str = Field(default="cu130", description="Default stack")
    superseded: str | None = Field(default=None, description="What to use instead of this package")
    known_bad: tuple[KnownBad, ...] = Field(default=(), description="Combinations that `builder plan` refuses")
    refuses: dict[ToolchainKind, str] = Field(
        default_factory=dict, description="Toolchains that cannot build it, each with the reason, as {'container' = 'why'}"
    )
    source: Annotated[SdistSource | GitSource | FileSource, Field(discriminator="kind")]
    "Where the source comes from."
    repositories: tuple[Repository, ...] = ()
    "Further git repositories."
    files: tuple[File, ...] = ()
    "Further files."
    substitutions: tuple[Substitution, ...] = Field(default=(), description="After the patches, in this order")
    build: Build = Build()
    "How to compile."
    wheel: Wheel = Wheel()
    "Required properties of the wheel."
    smoke: Smoke
    "Smoke test of the wheel."

    @model_validator(mode="after")
    def _bundled_origins(self) -> Self:
        known = {"source", *(file.origin for file in self.files if file.origin)}
        for bundled in self.wheel.bundled:
            if bundled.origin is not None and bundled.origin not in known:
                msg = f"wheel.bundled {bundled.path!r} names the origin {bundled.origin!r}, which is no [[files]] entry"
                raise ValueError(msg)
        return self

    @property
    def uses_torch(self) -> bool:
        """It compiles CUDA code, or requires torch to build or to run."""
        texts = (*self.build.requires, *self.wheel.requires.values())
        return self.build.cuda or any(canonicalize_name(Requirement(text).name) == TORCH for text in texts)

    @property
    def parts(self) -> dict[str, str | None]:
        """What is fetched into the source tree beside the source itself, by its name for people, with its declared licence."""
        submodules = self.source.submodules if isinstance(self.source, GitSource) else {}
        return {
            **{f"submodule {path}": module.license for path, module in submodules.items()},
            **{f"repository {repository.path}": repository.license for repository in self.repositories},
            **{f"file {file.origin}": file.license for file in self.files if file.origin},
        }


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A recipe with the files beside it."""

    folder: Path
    data: Recipe
    patches: tuple[Path, ...]
    "In the order of their numbers."
    smoke_script: Path | None
    smoke_gpu_script: Path | None = None
    "Run where torch sees a GPU."

    @property
    def key(self) -> str:
        """The folder's name: what the command line calls the recipe."""
        return self.folder.name

    def on(self, stack: LoadedStack) -> LoadedStack:
        """A stack as this recipe takes it: without torch where it uses none, and with what it needs to build beside it."""
        return replace(stack, build_requirements=self.build_requirements, uses_torch=self.data.uses_torch)

    @property
    def build_requirements(self) -> BuildRequirements | None:
        """What it needs to build beside the stack's environment."""
        texts = self.data.build.requires
        lock = self.folder / "requirements.lock"
        return BuildRequirements(texts=texts, lock=lock, lock_command=f"builder lock {self.key}") if texts else None


def names(recipes: Path) -> list[str]:
    """Recipes in a folder, sorted."""
    return sorted(path.parent.name for path in recipes.glob("*/recipe.toml"))


def load(recipes: Path, name: str) -> LoadedRecipe:
    """The recipe called `name`: by its folder, else by its distribution, in any spelling.

    Raises:
        ConfigError: there is none (names the nearest), or its file does not fit the schema.
    """
    known = names(recipes)
    wanted = canonicalize_name(name)
    match = next((key for key in known if canonicalize_name(key) == wanted), None) or _of_distribution(recipes, wanted)
    if match is None:
        raise unknown("recipe", name, recipes, known)
    folder = recipes / match
    smoke, smoke_gpu = folder / "smoke.py", folder / "smoke_gpu.py"
    return LoadedRecipe(
        folder=folder,
        data=tables.read(folder / "recipe.toml", Recipe),
        patches=tuple(sorted((folder / "patches").glob("[0-9][0-9][0-9][0-9]-*.patch"))),
        smoke_script=smoke if smoke.is_file() else None,
        smoke_gpu_script=smoke_gpu if smoke_gpu.is_file() else None,
    )


def _of_distribution(recipes: Path, wanted: str) -> str | None:
    """The folder of the one recipe whose distribution has that canonical name; None: there is none, or more than one."""
    keys = []
    for key in names(recipes):
        with contextlib.suppress(ConfigError):  # a broken one is told about when it is asked for
            if canonicalize_name(tables.read(recipes / key / "recipe.toml", Recipe).name) == wanted:
                keys.append(key)
    return keys[0] if len(keys) == 1 else None

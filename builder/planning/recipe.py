"""Recipes: recipes/NAME/recipe.toml with its patches and smoke scripts."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from builder.planning.sources import File, FileSource, GitSource, Repository, SdistSource, SpdxExpression, VersionText
from builder.planning.stack import TORCH, Arch, BuildRequirements, LoadedStack, Ptx, RequirementText, Sm, unknown
from gracefarm import tables
from gracefarm.errors import ConfigError, UsageError
from gracefarm.tables import InsidePath, Sha256, Size, Table, Url


def _named(text: str) -> Requirement:
    """A requirement whose version may be {torch}, the version of the stack's torch."""
    return Requirement(text.replace(TORCH_VERSION, "0"))


def _stack_requirement(text: str) -> str:
    _named(text)  # raises ValueError, so that the message names file and line
    return text


def _specifiers(text: str) -> str:
    SpecifierSet(text)  # raises ValueError, so that the message names file and line
    return text


TORCH_VERSION = "{torch}"
StackRequirement = Annotated[str, AfterValidator(_stack_requirement)]
Specifiers = Annotated[str, AfterValidator(_specifiers)]
PLACEHOLDERS = ("{sm}", "{sm_dotted}", "{sm_gencode}")
"The cell's architectures in values of [build], for packages that do not read TORCH_CUDA_ARCH_LIST."
ToolchainKind = Literal["sandbox", "host", "container"]


class Substitution(Table):
    """Replaces a text in the source. Unlike a patch, it requires no context lines; a wrong number of matches is an error."""

    path: InsidePath
    "File to change, relative to the source tree"
    find: str = Field(min_length=1)
    "Text to replace"
    replace: str
    "Replacement"
    count: int = Field(default=1, ge=1)
    "Required number of occurrences; a different number is an error"


class Build(Table):
    """How the wheel is compiled."""

    requires: tuple[RequirementText, ...] = ()
    "Build requirements in addition to the stack's environment; `builder lock NAME` pins them"
    subdirectory: InsidePath = "."
    "Folder of pyproject.toml or setup.py in the source"
    environment: dict[str, str] = Field(default_factory=dict)
    (
        "Variables for the build; they enter the build id. {sm} is replaced with the architectures to compile for in the form "
        "90;100a, {sm_dotted} with 9.0;10.0a, and {sm_gencode} with -gencode=arch=compute_90,code=sm_90. The values of "
        "config_settings and cmake can contain the same placeholders"
    )
    config_settings: dict[str, str] = Field(default_factory=dict)
    "PEP 517 config settings"
    cmake: dict[str, str] = Field(default_factory=dict)
    "CMake cache variables, for packages whose build backend does not forward CMake options. The toolchain file sets them"
    cuda: bool = True
    (
        "The build requires the CUDA compiler and torch. With false, the environment has torch only if `requires` of the "
        "build or of the wheel names it"
    )
    rust: bool = False
    (
        "The build requires Rust: the root has cargo, rustc and the target's standard library, and the crates of the source's "
        "Cargo.lock are fetched by their checksums before the build"
    )
    memory_per_job: Size = "4GiB"
    "Peak memory of one compile job; limits the number of jobs"
    unit_memory: dict[str, Size] = Field(default_factory=dict)
    (
        "Peak memory of source files that need more than memory_per_job. The key is a glob that matches a file or a folder. "
        "The value is used until a build has measured the file"
    )
    unit_seconds: dict[str, int] = Field(default_factory=dict)
    (
        "Seconds for source files that take much longer than others. The key is a glob that matches a file or a folder. "
        "The value is used until a build has measured the file"
    )
    binfmt: bool = False
    "The build executes programs of the target other than Python"

    @model_validator(mode="after")
    def _known_placeholders(self) -> Self:
        for name, value in {**self.environment, **self.config_settings, **self.cmake}.items():
            for placeholder in re.findall(r"\{sm(?:_\w*)?\}", value):
                if placeholder not in PLACEHOLDERS:
                    raise ValueError(f"{name} has {placeholder}: {tables.nearest(placeholder, PLACEHOLDERS, 'placeholders')}")
                if not self.cuda:
                    raise ValueError(f"{name} has {placeholder}, but with cuda = false there are no architectures")
        return self


class Bundled(Table):
    """A third-party file that the wheel may contain."""

    path: InsidePath
    "Path in the wheel. If `origin` is set, this is a glob"
    sha256: Sha256 | None = None
    "sha256 of the file; use either sha256 or origin"
    origin: str | None = None
    (
        "URL or package URL (pkg:pypi/NAME@VERSION) of the [[files]] entry that the file comes from; 'source' if it comes "
        "from the source tree"
    )
    license: SpdxExpression
    "SPDX expression of the file's licence"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.sha256 is None) == (self.origin is None):
            raise ValueError("give either sha256 or origin")
        return self


class Wheel(Table):
    """Required properties of the finished wheel."""

    appends: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$")] | None = None
    (
        "Text that upstream's build appends to the local version, for example 'd20261129'. The builder removes this text. "
        "Text for CUDA and torch is always removed"
    )
    sm_extra: dict[str, tuple[Sm, ...]] = Field(default_factory=dict)
    "Additional sm values for source files or folders. The key is a glob, for example {'hopper/*.cu' = ['90a']}"
    sm_supported: tuple[Sm, ...] = ()
    "sm values that the source supports. `--sm` may name only these. Default: all that CUDA supports"
    allow_sm_fallback: bool = False
    "A source that requests 90a, or a family such as 100f, may be compiled for 90 or 100 instead"
    ptx: Ptx | None = None
    "Replaces `ptx` of the stack. With 'none', the wheel has no PTX"
    requires: dict[str, StackRequirement] = Field(default_factory=dict)
    (
        "Replacements for the package's Requires-Dist lines. The key is the distribution, for example "
        "{'triton' = 'triton==3.2.0'}. {torch} is replaced with the version of the stack's torch"
    )
    source_archive: bool = False
    "Publish the patched source next to the wheel, as licences such as the AGPL require"
    licenses: tuple[InsidePath, ...] = ()
    (
        "Licence texts of code that is compiled into the wheel: paths in the source tree. The builder copies these files to "
        ".dist-info/licenses"
    )
    bundled: tuple[Bundled, ...] = ()
    "Third-party files that the wheel may contain; others are refused"
    max_size: Size = "500MiB"
    "Maximum size of the wheel"
    may_publish: str | None = None
    "Why the wheel may be redistributed although the recipe's licence does not allow it"

    @model_validator(mode="after")
    def _requires_by_its_own_name(self) -> Self:
        for name, text in self.requires.items():
            if canonicalize_name(_named(text).name) != canonicalize_name(name):
                raise ValueError(f"requires {name!r} has {text!r}, which is a requirement on a different distribution")
        return self


class StackDifference(Table):
    """Changes of the recipe that apply only to stacks with certain CUDA releases."""

    cuda: Specifiers
    "CUDA releases of the stack to which these changes apply, for example '>=13'"
    substitutions: tuple[Substitution, ...] = ()
    "Applied after the recipe's own substitutions"
    requires: dict[str, StackRequirement] | None = None
    "Replaces the table `requires` of [wheel]"


class Smoke(Table):
    """The test of the wheel in a clean environment."""

    imports: tuple[str, ...] = Field(min_length=1)
    "Modules to import, including extension modules"


class KnownBad(Table):
    """A combination whose wheel computes wrong results or does not run; `plan` refuses it."""

    sm: tuple[Sm, ...] = ()
    "Architectures of the device code. Default: all"
    cuda: Specifiers = ""
    "Releases of CUDA, for example '<13.1'. Default: all"
    torch: Specifiers = ""
    "Releases of torch, for example '>=2.9,<2.11'. Default: all"
    reason: str = Field(min_length=1)
    "What is wrong with the wheel"
    link: Url
    "URL where the problem was reported or measured"


class TreeProduct(Table):
    """A build that produces a tree of files for other recipes instead of a wheel, for example an LLVM installation."""

    commands: tuple[str, ...] = Field(min_length=1)
    (
        "Lines of a shell script that runs in the source tree and installs into $OUT. CC and CXX compile for the target, "
        "CC_FOR_BUILD and CXX_FOR_BUILD for the build machine"
    )
    holds: tuple[InsidePath, ...] = Field(min_length=1)
    "Paths that must exist in the finished tree"


class TakenTree(Table):
    """A file tree that another recipe builds. It is built before this recipe. Its build id enters this recipe's build id."""

    recipe: str
    "Folder in recipes/ of the recipe that builds the tree"
    path: InsidePath
    "Destination, relative to the source tree. The tree is added before [[files]]"
    replaces: InsidePath | None = None
    (
        "`path` of the [[files]] entry that downloads the same files. The tree replaces this download only if an option "
        "such as `--llvm source` is given"
    )


class Recipe(Table):
    """recipe.toml."""

    name: str
    "Distribution name"
    version: VersionText
    "Version of the wheel; a wheel with a different version is an error"
    summary: str = ""
    "Description in one line"
    license: SpdxExpression
    "SPDX expression"
    stack: str = "cu130"
    "Default stack"
    superseded: str | None = None
    "What to use instead of this package"
    known_bad: tuple[KnownBad, ...] = ()
    "Combinations that `builder plan` refuses"
    refuses: dict[ToolchainKind, str] = Field(default_factory=dict)
    "Toolchains that cannot build the package. The value is the reason, for example {'container' = 'why'}"
    source: Annotated[SdistSource | GitSource | FileSource, Field(discriminator="kind")]
    "Where the source comes from"
    repositories: tuple[Repository, ...] = ()
    "Additional git repositories"
    files: tuple[File, ...] = ()
    "Additional files"
    trees: tuple[TakenTree, ...] = ()
    "File trees, for example an LLVM installation, that other recipes build. They are built before this recipe"
    substitutions: tuple[Substitution, ...] = ()
    "Replacements of text in the source; applied after the patches, in this order"
    build: Build = Build()
    "How to compile"
    wheel: Wheel = Wheel()
    "Required properties of the wheel"
    differences: tuple[StackDifference, ...] = ()
    "Changes that apply only to stacks with certain CUDA releases"
    smoke: Smoke | None = None
    "Smoke test of the wheel"
    tree: TreeProduct | None = None
    "The tree that is built instead of a wheel"

    @model_validator(mode="after")
    def _one_product(self) -> Self:
        if (self.smoke is None) == (self.tree is None):
            raise ValueError("give either [smoke], for a recipe of a wheel, or [tree], for a recipe of a tree")
        if self.tree is not None and (self.trees or self.build.cuda):
            raise ValueError("a recipe with [tree] must have cuda = false in [build], and no [[trees]]")
        places = {file.path for file in self.files}
        for taken in self.trees:
            if taken.replaces is not None and taken.replaces not in places:
                msg = f"trees of {taken.recipe} replaces {taken.replaces!r}, but no [[files]] entry has that path"
                raise ValueError(msg)
        return self

    @property
    def imports(self) -> tuple[str, ...]:
        """Modules that must work in a clean environment; empty for a tree."""
        return self.smoke.imports if self.smoke is not None else ()

    @model_validator(mode="after")
    def _bundled_origins(self) -> Self:
        known = {"source", *(file.origin for file in self.files if file.origin)}
        for bundled in self.wheel.bundled:
            if bundled.origin is not None and bundled.origin not in known:
                msg = f"wheel.bundled {bundled.path!r} names the origin {bundled.origin!r}, but no [[files]] entry has it"
                raise ValueError(msg)
        return self

    @property
    def binfmt(self) -> bool:
        """The build executes programs of the target other than Python."""
        return self.build.binfmt or any(file.binfmt for file in self.files)

    @property
    def uses_torch(self) -> bool:
        """Whether it compiles CUDA code, or requires torch to build or to run."""
        texts = (*self.build.requires, *self.wheel.requires.values())
        return self.build.cuda or any(canonicalize_name(_named(text).name) == TORCH for text in texts)

    @property
    def parts(self) -> dict[str, str | None]:
        """Everything else that is fetched into the source tree: names for messages, with declared licences."""
        submodules = self.source.submodules if isinstance(self.source, GitSource) else {}
        return {
            **{f"submodule {path}": module.license for path, module in submodules.items()},
            **{f"repository {repository.path}": repository.license for repository in self.repositories},
            **{f"file {file.origin}": file.license for file in self.files if file.origin},
        }


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A recipe with the files of its folder."""

    folder: Path
    data: Recipe
    patches: tuple[Path, ...]
    "Patches in the order of their numbers."
    smoke_script: Path | None
    smoke_gpu_script: Path | None = None
    "Runs if torch finds a GPU."
    from_source: tuple[str, ...] = ()
    "Recipes whose trees replace downloads."

    @property
    def key(self) -> str:
        """The folder's name, which is the recipe's name on the command line."""
        return self.folder.name

    def for_host(self, host: Arch) -> LoadedRecipe:
        """The recipe with only the files and trees for a build on that host."""
        trees = tuple(tree for tree in self.data.trees if tree.replaces is None or tree.recipe in self.from_source)
        replaced = {tree.replaces for tree in trees}
        files = tuple(file for file in self.data.files if file.host in (None, host) and file.path not in replaced)
        return replace(self, data=self.data.model_copy(update={"files": files, "trees": trees}))

    def against(self, stack: LoadedStack) -> LoadedRecipe:
        """The recipe with its changes for that stack.

        Raises:
            ConfigError: it requires the version of the stack's torch, but the stack has no torch.
        """
        data = self.data
        applying = [each for each in data.differences if SpecifierSet(each.cuda).contains(stack.data.cuda)]
        substitutions = (*data.substitutions, *(change for each in applying for change in each.substitutions))
        required = next((each.requires for each in reversed(applying) if each.requires is not None), data.wheel.requires)
        torch = stack.data.torch.version if stack.data.torch is not None else None
        if torch is None and any(TORCH_VERSION in text for text in required.values()):
            raise ConfigError(
                f"wheel.requires of {self.key} pins torch to the version in the stack, "
                f"but stack {stack.data.name} has no torch",
                remedy="use a stack with torch",
            )
        requires = {name: text.replace(TORCH_VERSION, torch or "") for name, text in required.items()}
        wheel = data.wheel.model_copy(update={"requires": requires})
        update = {"substitutions": substitutions, "wheel": wheel, "differences": ()}
        return replace(self, data=data.model_copy(update=update))

    def with_trees(self, names: tuple[str, ...]) -> LoadedRecipe:
        """The recipe with trees of these recipes instead of downloads.

        Raises:
            UsageError: it has no tree of one of them that replaces a download.
        """
        known = [tree.recipe for tree in self.data.trees if tree.replaces is not None]
        for name in names:
            if name not in known:
                raise UsageError(
                    f"{self.key} has no tree of {name} that can be built from source",
                    remedy=f"choose {', '.join(known)}" if known else f"remove --{name} source",
                )
        return replace(self, from_source=names)

    def on(self, stack: LoadedStack) -> LoadedStack:
        """The stack for this recipe: with its build requirements, with Rust if it requires Rust, without torch if it does not
        use torch.
        """
        return replace(
            stack,
            build_requirements=self.build_requirements,
            uses_torch=self.against(stack).data.uses_torch,
            uses_rust=self.data.build.rust,
        )

    @property
    def build_requirements(self) -> BuildRequirements | None:
        """Build requirements in addition to the stack's environment."""
        texts = self.data.build.requires
        lock = self.folder / "requirements.lock"
        return BuildRequirements(texts=texts, lock=lock, lock_command=f"builder lock {self.key}") if texts else None


def names(recipes: Path) -> list[str]:
    """Recipes in a folder, sorted."""
    return sorted(path.parent.name for path in recipes.glob("*/recipe.toml"))


def of_wheels(recipes: Path) -> list[str]:
    """Recipes of wheels in a folder, sorted. Recipes of trees are left out: they are built for other recipes."""
    keys = []
    for key in names(recipes):
        try:
            tree = tables.read(recipes / key / "recipe.toml", Recipe).tree
        except ConfigError:  # `load` reports it when it is built
            tree = None
        keys += [key] if tree is None else []
    return keys


def load(recipes: Path, name: str) -> LoadedRecipe:
    """The recipe `name`: the name of its folder, else of its distribution, in any spelling.

    Raises:
        ConfigError: it does not exist (names the nearest), or its file does not fit the schema.
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
    """The folder of the only recipe whose distribution has that canonical name; None: no recipe or several recipes have it."""
    keys = []
    for key in names(recipes):
        with contextlib.suppress(ConfigError):  # `load` reports a broken recipe when it is named
            if canonicalize_name(tables.read(recipes / key / "recipe.toml", Recipe).name) == wanted:
                keys.append(key)
    return keys[0] if len(keys) == 1 else None

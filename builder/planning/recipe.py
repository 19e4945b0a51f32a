"""What to build, as data: recipes/NAME/recipe.toml, its patches and smoke scripts."""

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
    """A requirement whose version may be that of the stack's torch."""
    return Requirement(text.replace(TORCH_VERSION, "0"))


def _stack_requirement(text: str) -> str:
    _named(text)  # whose error is a ValueError, and so names file and line
    return text


def _specifiers(text: str) -> str:
    SpecifierSet(text)  # whose error is a ValueError, and so names file and line
    return text


TORCH_VERSION = "{torch}"
StackRequirement = Annotated[str, AfterValidator(_stack_requirement)]
Specifiers = Annotated[str, AfterValidator(_specifiers)]
PLACEHOLDERS = ("{sm}", "{sm_dotted}", "{sm_gencode}")
"In values of [build]: the cell's architectures, for packages that do not read TORCH_CUDA_ARCH_LIST."
ToolchainKind = Literal["sandbox", "host", "container"]


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

    appends: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$")] | None = Field(
        default=None,
        description="What upstream's build appends to the local version and the wheel does without, as 'd20261129'; what is "
        "about CUDA and torch need not be named",
    )
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
    requires: dict[str, StackRequirement] = Field(
        default_factory=dict,
        description="Requires-Dist by distribution, in place of what the package says of it, as {'triton' = 'triton==3.2.0'}; "
        "{torch} stands for the version of the stack's",
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
            if canonicalize_name(_named(text).name) != canonicalize_name(name):
                raise ValueError(f"requires {name!r} is given {text!r}, a requirement of another distribution")
        return self


class StackDifference(Table):
    """What is different against stacks of some CUDA releases: one recipe serves them all."""

    cuda: Specifiers = Field(description="CUDA releases of the stack for which it is, as '>=13'")
    substitutions: tuple[Substitution, ...] = Field(default=(), description="After the recipe's own")
    requires: dict[str, StackRequirement] | None = Field(default=None, description="In place of `requires` of [wheel]")


class Smoke(Table):
    """What must work in a clean environment."""

    imports: tuple[str, ...] = Field(min_length=1, description="Modules imported by name, extensions included")


class KnownBad(Table):
    """A combination whose wheel computes wrong numbers, or does not run: `plan` refuses it."""

    sm: tuple[Sm, ...] = Field(default=(), description="Architectures of the device code; empty: any")
    cuda: Specifiers = Field(default="", description="Releases of CUDA, as '<13.1'; empty: any")
    torch: Specifiers = Field(default="", description="Releases of torch, as '>=2.9,<2.11'; empty: any")
    reason: str = Field(min_length=1, description="What is wrong with it")
    link: Url = Field(description="Where it was reported or measured")


class TreeProduct(Table):
    """A build that makes a tree of files, which other recipes take, in place of a wheel."""

    commands: tuple[str, ...] = Field(
        min_length=1,
        description="Lines of a shell script that runs in the source tree and installs into $OUT; CC and CXX compile for the "
        "target, CC_FOR_BUILD and CXX_FOR_BUILD for the machine that builds",
    )
    holds: tuple[InsidePath, ...] = Field(min_length=1, description="What the tree must have at its end")


class TakenTree(Table):
    """A tree of another recipe, which is built first; its build id enters this one's."""

    recipe: str = Field(description="The folder's name under recipes/")
    path: InsidePath = Field(description="Where it is put, relative to the source tree, before [[files]]")
    replaces: InsidePath | None = Field(
        default=None,
        description="`path` of the [[files]] entry that has the same as a download: the tree takes its place where the "
        "command line asks for it, as `--llvm source`",
    )


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
    trees: tuple[TakenTree, ...] = ()
    "Trees of other recipes, which are built first."
    substitutions: tuple[Substitution, ...] = Field(default=(), description="After the patches, in this order")
    build: Build = Build()
    "How to compile."
    wheel: Wheel = Wheel()
    "Required properties of the wheel."
    differences: tuple[StackDifference, ...] = ()
    "What is different against stacks of some CUDA releases."
    smoke: Smoke | None = None
    "Smoke test of the wheel."
    tree: TreeProduct | None = None
    "The tree that the build makes in place of a wheel."

    @model_validator(mode="after")
    def _one_product(self) -> Self:
        if (self.smoke is None) == (self.tree is None):
            raise ValueError("give [smoke], as every recipe of a wheel, or [tree], for a recipe that makes none")
        if self.tree is not None and (self.trees or self.build.cuda):
            raise ValueError("a recipe with [tree] takes no other tree, and says cuda = false in [build]")
        places = {file.path for file in self.files}
        for taken in self.trees:
            if taken.replaces is not None and taken.replaces not in places:
                msg = f"trees of {taken.recipe} replaces {taken.replaces!r}, which is the path of no [[files]] entry"
                raise ValueError(msg)
        return self

    @property
    def imports(self) -> tuple[str, ...]:
        """Modules that must work in a clean environment; a tree has none."""
        return self.smoke.imports if self.smoke is not None else ()

    @model_validator(mode="after")
    def _bundled_origins(self) -> Self:
        known = {"source", *(file.origin for file in self.files if file.origin)}
        for bundled in self.wheel.bundled:
            if bundled.origin is not None and bundled.origin not in known:
                msg = f"wheel.bundled {bundled.path!r} names the origin {bundled.origin!r}, which is no [[files]] entry"
                raise ValueError(msg)
        return self

    @property
    def binfmt(self) -> bool:
        """The build executes programs of the target other than Python."""
        return self.build.binfmt or any(file.binfmt for file in self.files)

    @property
    def uses_torch(self) -> bool:
        """It compiles CUDA code, or requires torch to build or to run."""
        texts = (*self.build.requires, *self.wheel.requires.values())
        return self.build.cuda or any(canonicalize_name(_named(text).name) == TORCH for text in texts)

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
    from_source: tuple[str, ...] = ()
    "Recipes whose trees take the place of downloads."

    @property
    def key(self) -> str:
        """The folder's name: what the command line calls the recipe."""
        return self.folder.name

    def for_host(self, host: Arch) -> LoadedRecipe:
        """The recipe with the files and trees that a build on that machine takes."""
        trees = tuple(tree for tree in self.data.trees if tree.replaces is None or tree.recipe in self.from_source)
        replaced = {tree.replaces for tree in trees}
        files = tuple(file for file in self.data.files if file.host in (None, host) and file.path not in replaced)
        return replace(self, data=self.data.model_copy(update={"files": files, "trees": trees}))

    def against(self, stack: LoadedStack) -> LoadedRecipe:
        """The recipe with what is different against that stack.

        Raises:
            ConfigError: it requires the version of the torch of a stack that has none.
        """
        data = self.data
        applying = [each for each in data.differences if SpecifierSet(each.cuda).contains(stack.data.cuda)]
        substitutions = (*data.substitutions, *(change for each in applying for change in each.substitutions))
        required = next((each.requires for each in reversed(applying) if each.requires is not None), data.wheel.requires)
        torch = stack.data.torch.version if stack.data.torch is not None else None
        if torch is None and any(TORCH_VERSION in text for text in required.values()):
            raise ConfigError(
                f"{self.key} requires the torch that it was built against, and stack {stack.data.name} has none",
                remedy="take a stack that has torch",
            )
        requires = {name: text.replace(TORCH_VERSION, torch or "") for name, text in required.items()}
        wheel = data.wheel.model_copy(update={"requires": requires})
        update = {"substitutions": substitutions, "wheel": wheel, "differences": ()}
        return replace(self, data=data.model_copy(update=update))

    def with_trees(self, names: tuple[str, ...]) -> LoadedRecipe:
        """The recipe with the trees of these recipes in place of downloads.

        Raises:
            UsageError: it takes no tree of one of them in place of a download.
        """
        known = [tree.recipe for tree in self.data.trees if tree.replaces is not None]
        for name in names:
            if name not in known:
                raise UsageError(
                    f"{self.key} takes no {name} that could be built from source",
                    remedy=f"it takes {', '.join(known)}" if known else f"leave --{name} source out",
                )
        return replace(self, from_source=names)

    def on(self, stack: LoadedStack) -> LoadedStack:
        """A stack as this recipe takes it: without torch where it uses none, and with what it needs to build beside it."""
        return replace(stack, build_requirements=self.build_requirements, uses_torch=self.against(stack).data.uses_torch)

    @property
    def build_requirements(self) -> BuildRequirements | None:
        """What it needs to build beside the stack's environment."""
        texts = self.data.build.requires
        lock = self.folder / "requirements.lock"
        return BuildRequirements(texts=texts, lock=lock, lock_command=f"builder lock {self.key}") if texts else None


def names(recipes: Path) -> list[str]:
    """Recipes in a folder, sorted."""
    return sorted(path.parent.name for path in recipes.glob("*/recipe.toml"))


def of_wheels(recipes: Path) -> list[str]:
    """Recipes in a folder that do not make a tree, which is built where another recipe takes it; sorted."""
    keys = []
    for key in names(recipes):
        try:
            tree = tables.read(recipes / key / "recipe.toml", Recipe).tree
        except ConfigError:  # it is told about when it is built
            tree = None
        keys += [key] if tree is None else []
    return keys


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

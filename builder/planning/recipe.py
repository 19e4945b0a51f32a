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
    """A text in one file of the source tree, and the text that replaces it."""

    path: InsidePath
    "File in the source tree"
    find: str = Field(min_length=1)
    "Text to replace"
    replace: str
    "New text"
    count: int = Field(default=1, ge=1)
    (
        "Number of times that the file contains `find`. All of these places are replaced. If the file contains `find` more or "
        "less often, the build fails"
    )


class Build(Table):
    """Settings of the compilation of the wheel."""

    requires: tuple[RequirementText, ...] = ()
    "Packages that the build requires, and that the stack's environment does not have. `builder lock NAME` pins them"
    subdirectory: InsidePath = "."
    "Folder of pyproject.toml or setup.py in the source tree"
    environment: dict[str, str] = Field(default_factory=dict)
    (
        "Environment variables for the build. Their values can contain the placeholders `{sm}`, `{sm_dotted}` and "
        "`{sm_gencode}`, which stand for the sm values of the build. For the sm values 90 and 100a, `{sm}` becomes "
        "`90;100a`, and `{sm_dotted}` becomes `9.0;10.0a`. `{sm_gencode}` becomes `-gencode=arch=compute_90,code=sm_90 "
        "-gencode=arch=compute_100a,code=sm_100a`"
    )
    config_settings: dict[str, str] = Field(default_factory=dict)
    "Config settings for the build backend, as PEP 517 defines them. The values can contain the placeholders of `environment`"
    cmake: dict[str, str] = Field(default_factory=dict)
    (
        "CMake cache variables, for a package whose build backend does not pass options to CMake. The values can contain the "
        "placeholders of `environment`"
    )
    cuda: bool = True
    (
        "`true`: the build requires the CUDA compiler and torch. `false`: it does not. The environment then has torch only "
        "if `requires` in `[build]` or `[wheel]` names torch"
    )
    rust: bool = False
    (
        "`true`: the build requires Rust. The root then has cargo and rustc. The builder fetches the crates in Cargo.lock "
        "before the build"
    )
    memory_per_job: Size = "4GiB"
    "Memory that one compile job needs. The builder starts only as many parallel jobs as the memory allows"
    unit_memory: dict[str, Size] = Field(default_factory=dict)
    (
        "Memory for source files that need more than `memory_per_job`. The key is a pattern for files or folders, for "
        "example `*_sm90.cu`. The value is a size, for example `12GiB`. After the first successful build, the builder uses "
        "measured values instead"
    )
    unit_seconds: dict[str, int] = Field(default_factory=dict)
    (
        "Expected compile time, in seconds, of the slowest source files. The key is a pattern for files or folders. The "
        "first build compiles these files first, and starts with the slowest. Later builds use measured times instead"
    )
    binfmt: bool = False
    (
        "`true`: the build runs programs, other than Python, that are compiled for the target. If the host has a different "
        "architecture, it must emulate them (binfmt_misc, set up by `builder doctor --fix`)"
    )

    @model_validator(mode="after")
    def _known_placeholders(self) -> Self:
        for name, value in {**self.environment, **self.config_settings, **self.cmake}.items():
            for placeholder in re.findall(r"\{sm(?:_\w*)?\}", value):
                if placeholder not in PLACEHOLDERS:
                    near = tables.nearest(placeholder, PLACEHOLDERS, "placeholders")
                    raise ValueError(f"the value of {name} has the unknown placeholder {placeholder}: {near}")
                if not self.cuda:
                    raise ValueError(
                        f"the value of {name} has the placeholder {placeholder}, "
                        "but a recipe with cuda = false has no architectures"
                    )
        return self


class Bundled(Table):
    """A third-party file that the wheel may contain. Give either `sha256` or `origin`."""

    path: InsidePath
    "Path in the wheel. With `origin`, the path may be a pattern such as `*/lib*.so`"
    sha256: Sha256 | None = None
    "sha256 of the file"
    origin: str | None = None
    (
        "Origin of the file. `source`: the source tree. Otherwise: an entry of `[[files]]`, named by its URL, or by "
        "`pkg:pypi/NAME@VERSION` or `pkg:deb/debian/NAME@VERSION?arch=ARCH`"
    )
    license: SpdxExpression
    "SPDX expression of the file's licence"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.sha256 is None) == (self.origin is None):
            raise ValueError("give either sha256 or origin")
        return self


class Wheel(Table):
    """Requirements on the finished wheel, and changes of its metadata."""

    appends: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$")] | None = None
    (
        "Text that the package's build appends to the local version (the part of the version after `+`), for example "
        "`d20261129`. The builder removes this text. Do not list text for CUDA and torch, such as `cu12torch2.6`: the builder "
        "always removes it"
    )
    sm_extra: dict[str, tuple[Sm, ...]] = Field(default_factory=dict)
    "Additional sm values for some source files. The key is a pattern for files or folders, for example `*hopper*`"
    sm_supported: tuple[Sm, ...] = ()
    "sm values that the source supports. Other sm values are refused. Default: all that CUDA supports"
    allow_sm_fallback: bool = False
    (
        "`true`: a source file that requests 90a may be compiled for 90, and a source file that requests 100f may be "
        "compiled for 100. `false`: such a build fails"
    )
    ptx: Ptx | None = None
    "sm value of the PTX in the wheel. It replaces the key `ptx` of the stack. `none`: the wheel has no PTX"
    requires: dict[str, StackRequirement] = Field(default_factory=dict)
    (
        "Replacements for requirements in the wheel's metadata (Requires-Dist). The key is the name of the required package, "
        "for example `{ triton = 'triton==3.2.0' }`. `{torch}` is replaced with the version of the stack's torch"
    )
    source_archive: bool = False
    "`true`: publish the patched source next to the wheel. Licences such as the AGPL require this"
    licenses: tuple[InsidePath, ...] = ()
    "Paths of licence texts in the source tree. The builder copies these files to .dist-info/licenses of the wheel"
    bundled: tuple[Bundled, ...] = ()
    "Third-party files that the wheel may contain. Other third-party files are refused"
    max_size: Size = "500MiB"
    "Maximum size of the wheel. A larger wheel is refused"
    may_publish: str | None = None
    "Reason why the wheel may be published although its licence does not allow redistribution"

    @model_validator(mode="after")
    def _requires_by_its_own_name(self) -> Self:
        for name, text in self.requires.items():
            if canonicalize_name(_named(text).name) != canonicalize_name(name):
                raise ValueError(f"the key {name!r} of requires has the value {text!r}, which names a different package")
        return self


class StackDifference(Table):
    """Changes of the recipe for certain CUDA releases."""

    cuda: Specifiers
    "Condition for the CUDA release of the stack, for example `>=13`. If the release meets the condition, the changes apply"
    substitutions: tuple[Substitution, ...] = ()
    "Additional substitutions. They are applied after the substitutions of the recipe"
    requires: dict[str, StackRequirement] | None = None
    "Value that replaces `requires` of `[wheel]`"


class Smoke(Table):
    """The test of the wheel in a clean environment."""

    imports: tuple[str, ...] = Field(min_length=1)
    "Modules to import, including extension modules"


class KnownBad(Table):
    """A combination whose wheel does not work. A build is refused if it matches each of the keys `sm`, `cuda` and `torch`
    that is given."""

    sm: tuple[Sm, ...] = ()
    (
        "sm values. A build matches if it is for at least one of them. Letters are ignored, so `90` also matches 90a. "
        "Default: all"
    )
    cuda: Specifiers = ""
    "CUDA releases, for example `<13.1`. Default: all"
    torch: Specifiers = ""
    "torch releases, for example `>=2.9,<2.11`. Default: all"
    reason: str = Field(min_length=1)
    "Description of what is wrong with the wheel"
    link: Url
    "URL of a report or measurement of the problem"


class TreeProduct(Table):
    """A tree of files that the recipe builds instead of a wheel, for example an LLVM installation."""

    commands: tuple[str, ...] = Field(min_length=1)
    (
        "Lines of a shell script. It runs in the source tree and installs the files into the folder $OUT. CC and CXX are "
        "compilers for the target. CC_FOR_BUILD and CXX_FOR_BUILD are compilers for the host"
    )
    holds: tuple[InsidePath, ...] = Field(min_length=1)
    "Paths that must exist in the finished tree"


class TakenTree(Table):
    """A tree of another recipe that this build uses. The other recipe is built first."""

    recipe: str
    "Name of the other recipe, which is its folder in recipes/. Its build id is an input of this build"
    path: InsidePath
    "Destination in the source tree"
    replaces: InsidePath | None = None
    (
        "`path` of an entry of `[[files]]` that downloads the same files. The build uses the download by default. With the "
        "option `--llvm source`, it uses the tree instead. Without this key, the build always uses the tree"
    )


class Recipe(Table):
    """recipe.toml."""

    name: str
    "Name of the package on a Python index, for example `causal-conv1d`"
    version: VersionText
    "Version of the package. A build that produces another version fails"
    summary: str = ""
    "Description in one line"
    license: SpdxExpression
    "SPDX expression of the package's licence"
    stack: str = "cu130"
    "Stack that a build uses without the option `--stack`"
    superseded: str | None = None
    "Text that says what to use instead of this package. `builder list` and `builder plan` print this text"
    known_bad: tuple[KnownBad, ...] = ()
    "Combinations of sm values, CUDA and torch for which a build is refused"
    refuses: dict[ToolchainKind, str] = Field(default_factory=dict)
    "Toolchains that cannot build the package. The key is `sandbox`, `host` or `container`, and the value is the reason"
    source: Annotated[SdistSource | GitSource | FileSource, Field(discriminator="kind")]
    "Source of the package"
    repositories: tuple[Repository, ...] = ()
    "Additional git repositories"
    files: tuple[File, ...] = ()
    "Additional files"
    trees: tuple[TakenTree, ...] = ()
    "Trees of other recipes that this build uses, for example an LLVM installation"
    substitutions: tuple[Substitution, ...] = ()
    "Replacements of text in the source tree. They are applied after the patches, in the order of the list"
    build: Build = Build()
    "Settings of the compilation"
    wheel: Wheel = Wheel()
    "Requirements on the wheel"
    differences: tuple[StackDifference, ...] = ()
    "Changes of the recipe for certain CUDA releases"
    smoke: Smoke | None = None
    "Test of the wheel. A recipe of a wheel must have this table"
    tree: TreeProduct | None = None
    "Commands that build a tree. A recipe with this table builds a tree instead of a wheel, and has no `[smoke]`"

    @model_validator(mode="before")
    @classmethod
    def _sdist_of_the_recipe(cls, values: object) -> object:
        """Give an sdist the recipe's name and version where the table `[source]` has no others."""
        source = values.get("source") if isinstance(values, dict) else None
        if isinstance(values, dict) and isinstance(source, dict) and source.get("kind") == "sdist":
            own = {key: values[key] for key in ("name", "version") if key in values}
            return {**values, "source": {**own, **source}}
        return values

    @model_validator(mode="after")
    def _one_product(self) -> Self:
        if (self.smoke is None) == (self.tree is None):
            raise ValueError(
                "give either [smoke] or [tree]: a recipe of a wheel has [smoke], and a recipe of a tree has [tree]"
            )
        if self.tree is not None and (self.trees or self.build.cuda):
            raise ValueError("a recipe with [tree] must have cuda = false in [build], and no [[trees]]")
        places = {file.path for file in self.files}
        for taken in self.trees:
            if taken.replaces is not None and taken.replaces not in places:
                msg = (
                    f"the [[trees]] entry of recipe {taken.recipe} replaces {taken.replaces!r}, "
                    "but no [[files]] entry has this path"
                )
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
                msg = (
                    f"wheel.bundled {bundled.path!r} names the origin {bundled.origin!r}, "
                    "but no [[files]] entry has this origin"
                )
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
                remedy="use a stack with torch: --stack NAME",
            )
        requires = {name: text.replace(TORCH_VERSION, torch or "") for name, text in required.items()}
        wheel = data.wheel.model_copy(update={"requires": requires})
        update = {"substitutions": substitutions, "wheel": wheel, "differences": ()}
        return replace(self, data=data.model_copy(update=update))

    @property
    def replaceable(self) -> list[str]:
        """Recipes whose trees can replace downloads."""
        return [tree.recipe for tree in self.data.trees if tree.replaces is not None]

    def with_trees(self, names: tuple[str, ...]) -> LoadedRecipe:
        """The recipe with trees of these recipes instead of downloads.

        Raises:
            UsageError: it has no tree of one of them that replaces a download.
        """
        known = self.replaceable
        for name in names:
            if name not in known:
                raise UsageError(
                    f"{self.key} uses no tree of {name} that can be built from source",
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

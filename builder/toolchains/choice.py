"""Create the plan of a build with the chosen toolchain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from builder.planning import device_code, recipe, stack
from builder.planning.plan import Plan, Toolchain, Wanted
from builder.planning.recipe import LoadedRecipe, TakenTree, ToolchainKind
from builder.planning.stack import Arch, LoadedStack, host_arch
from builder.toolchains.kinds import KINDS
from builder.toolchains.sandbox import SandboxToolchain
from gracefarm.errors import ConfigError, UsageError


def make_plan(recipe: LoadedRecipe, stack: LoadedStack, host: Arch, target: Arch, toolchain: Toolchain | None = None) -> Plan:
    """The plan of a build; without `toolchain`: in the sandbox.

    Raises:
        ConfigError: the recipe refuses the toolchain, or requires Rust and the toolchain has no Rust; the stack does not have
            the target or does not meet the toolchain's requirements; or this host cannot build for the target.
    """
    toolchain = toolchain or SandboxToolchain()
    reason = recipe.data.refuses.get(toolchain.kind)
    if reason is not None:
        raise ConfigError(
            f"{recipe.key} cannot be built with --toolchain {toolchain.kind}: {reason}",
            remedy=f"choose a different --toolchain: {', '.join(kind for kind in KINDS if kind not in recipe.data.refuses)}",
        )
    if recipe.data.build.rust and not toolchain.has_rust:
        raise ConfigError(
            f"{recipe.key} requires Rust, but --toolchain {toolchain.kind} has no Rust", remedy="omit --toolchain"
        )
    stack = recipe.on(toolchain.facts(stack))
    if target not in stack.data.glibc:
        known = ", ".join(arch.value for arch in stack.data.glibc)
        raise ConfigError(f"stack {stack.data.name} has no target {target.value}", remedy=f"give one of its targets: {known}")
    if host is Arch.AARCH64 and target is Arch.X86_64:
        raise ConfigError("an aarch64 machine cannot build for x86_64", remedy="build x86_64 wheels on an x86_64 machine")
    recipe = recipe.for_host(host).against(stack)
    trees = tuple(_tree_plan(tree, recipe, stack, host, target, toolchain) for tree in recipe.data.trees)
    plan = Plan(recipe=recipe, stack=stack, host=host, target=target, toolchain=toolchain, trees=trees)
    if recipe.data.build.cuda:
        device_code.require(recipe, stack, plan.ptx)
    device_code.refuse_known_bad(recipe, stack)
    toolchain.require(plan)
    return plan


def _tree_plan(
    tree: TakenTree, taker: LoadedRecipe, base: LoadedStack, host: Arch, target: Arch, toolchain: Toolchain
) -> Plan:
    """The plan of a tree that a recipe uses: with the tree's recipe and the stack of that recipe.

    Raises:
        ConfigError: there is no such recipe, it does not build a tree, or the toolchain is not the sandbox, whose compilers
            build the tree; or see `make_plan`.
    """
    if not toolchain.pinned:
        raise ConfigError(
            f"{taker.key} uses the tree of the recipe {tree.recipe}. Trees are built with the sandbox's compilers, which "
            f"differ from those of --toolchain {toolchain.kind}",
            remedy="omit --toolchain",
        )
    source = recipe.load(taker.folder.parent, tree.recipe)
    if source.data.tree is None:
        raise ConfigError(
            f"{taker.key} uses the tree (folder of built files) of the recipe {source.key}, but {source.key} builds a wheel",
            remedy=f"correct [[trees]] in the recipe {taker.key}",
        )
    return make_plan(source, stack.load(base.folder.parent, source.data.stack), host, target)


def _refuse_twin(recipe: LoadedRecipe, target: Arch) -> None:
    """Refuse the twin of a wheel without device code, and a twin for aarch64.

    Raises:
        UsageError: one of the two.
    """
    if not recipe.data.build.cuda:
        raise UsageError(f"--twin requires device code, but recipe {recipe.key} has no CUDA", remedy="omit --twin")
    if target is Arch.AARCH64:
        raise UsageError(
            "--twin builds the x86_64 twin of an aarch64 wheel, but the target of this build is aarch64",
            remedy="add --target x86_64 on an x86_64 machine, or omit --twin",
        )


@dataclass(frozen=True, kw_only=True)
class ToolchainChoice:
    """The user's choice of toolchain and cell."""

    kind: ToolchainKind = "sandbox"
    wanted: Wanted = field(default_factory=Wanted)
    interpreter: str | None = None
    "Name of the target's Python; None: that of the root, or of this machine."
    sm: tuple[str, ...] | None = None
    "Architectures of the device code; None: those of the stack."
    ptx: str | None = None
    "Architecture of its PTX, or `none`; None: that of the recipe, else of the stack."
    from_source: tuple[str, ...] = ()
    "Recipes whose trees are built instead of downloads."
    variant: bool = False
    "The wheel gets the label of a variant (PEP 825, a draft)."
    twin: bool = False
    "The x86_64 wheel is built as the twin of the aarch64 wheel, which it certifies."
    hosts: Mapping[Arch, Arch] = field(default_factory=dict)
    "By target: the architecture of the build machine, if it is not this machine."

    @property
    def type(self) -> type[Toolchain]:
        """Its class."""
        return KINDS[self.kind]

    def plan(self, recipe: LoadedRecipe, stack: LoadedStack, target: Arch) -> Plan:
        """The plan of a build with this toolchain on this machine.

        Raises:
            UsageError: a twin of this wheel is not possible.
            HostError: a part of the toolchain is missing on this machine.
            ConfigError: see `make_plan`.
        """
        host, recipe = self.hosts.get(target, host_arch()), recipe.with_trees(self.from_source)
        if self.twin:
            _refuse_twin(recipe, host if self.type.native else target)
        asked = replace(stack, asked_sm=self.sm, asked_ptx=self.ptx, asked_variant=self.variant, asked_twin=self.twin)
        stack = recipe.on(asked)
        toolchain = self.type.find(stack, self.wanted, cuda=recipe.data.build.cuda)
        return make_plan(recipe, stack, host, host if toolchain.native else target, toolchain)

"""Where the plan of a build is made, with the toolchain that was chosen for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from builder.planning import device_code, recipe, stack
from builder.planning.plan import Plan, Toolchain, Wanted
from builder.planning.recipe import LoadedRecipe, TakenTree, ToolchainKind
from builder.planning.stack import Arch, LoadedStack, host_arch
from builder.toolchains import KINDS
from builder.toolchains.sandbox import SandboxToolchain
from gracefarm.errors import ConfigError


def make_plan(recipe: LoadedRecipe, stack: LoadedStack, host: Arch, target: Arch, toolchain: Toolchain | None = None) -> Plan:
    """The plan of a build; None: in the sandbox.

    Raises:
        ConfigError: the recipe refuses the toolchain, the stack has no such target or not what the toolchain needs, or this
            host cannot build for the target.
    """
    toolchain = toolchain or SandboxToolchain()
    reason = recipe.data.refuses.get(toolchain.kind)
    if reason is not None:
        raise ConfigError(
            f"{recipe.key} is not built with --toolchain {toolchain.kind}: {reason}",
            remedy=f"take another: {', '.join(kind for kind in KINDS if kind not in recipe.data.refuses)}",
        )
    stack = recipe.on(toolchain.facts(stack))
    if target not in stack.data.glibc:
        known = ", ".join(arch.value for arch in stack.data.glibc)
        raise ConfigError(f"stack {stack.data.name} has no target {target.value}", remedy=f"targets: {known}")
    if host is Arch.AARCH64 and target is Arch.X86_64:
        raise ConfigError("an aarch64 host builds for aarch64 alone", remedy="build x86_64 wheels on an x86_64 machine")
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
    """The plan of a tree that a recipe takes: by its own recipe beside that one, against its own stack.

    Raises:
        ConfigError: there is no such recipe, it makes no tree, or see `make_plan`; or the toolchain is not the sandbox, whose
            compilers made the tree.
    """
    if toolchain.kind != "sandbox":
        raise ConfigError(
            f"{taker.key} takes the tree of {tree.recipe}, and --toolchain {toolchain.kind} has other compilers than made it",
            remedy="leave --toolchain out",
        )
    source = recipe.load(taker.folder.parent, tree.recipe)
    if source.data.tree is None:
        raise ConfigError(f"{taker.key} takes the tree of {source.key}, which makes a wheel", remedy="correct [[trees]]")
    return make_plan(source, stack.load(base.folder.parent, source.data.stack), host, target)


@dataclass(frozen=True, kw_only=True)
class ToolchainChoice:
    """The toolchain that a user asked for."""

    kind: ToolchainKind = "sandbox"
    wanted: Wanted = field(default_factory=Wanted)
    interpreter: str | None = None
    "Name of the target's Python; None: the root's own, or this machine's."
    sm: tuple[str, ...] | None = None
    "Architectures of the device code; None: the stack's."
    ptx: str | None = None
    "Architecture of its PTX, or `none`; None: the recipe's, else the stack's."
    from_source: tuple[str, ...] = ()
    "Recipes whose trees are built in place of downloads."
    variant: bool = False
    "The wheel gets the label of a variant (PEP 825, a draft)."
    hosts: Mapping[Arch, Arch] = field(default_factory=dict)
    "By target: the architecture of the machine that builds, where that is not this one."

    @property
    def type(self) -> type[Toolchain]:
        """Its class."""
        return KINDS[self.kind]

    def plan(self, recipe: LoadedRecipe, stack: LoadedStack, target: Arch) -> Plan:
        """The plan of a build with it, as this machine has it.

        Raises:
            HostError: the machine lacks a part of it.
            ConfigError: see `make_plan`.
        """
        host, recipe = self.hosts.get(target, host_arch()), recipe.with_trees(self.from_source)
        stack = recipe.on(replace(stack, asked_sm=self.sm, asked_ptx=self.ptx, asked_variant=self.variant))
        toolchain = self.type.find(stack, self.wanted, cuda=recipe.data.build.cuda)
        return make_plan(recipe, stack, host, host if toolchain.native else target, toolchain)

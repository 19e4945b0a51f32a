"""What a wheel is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from builder.planning import device_code, driver
from builder.planning.ground import Ground
from builder.planning.plan import Plan
from builder.planning.recipe import Bundled, Recipe
from builder.planning.stack import Arch, LoadedStack
from gracefarm.tables import parse_size

DEFAULT_MAX_SIZE = 500 << 20


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The demands of stack and recipe, and where the stack's files are."""

    target: Arch
    glibc: str
    "Highest manylinux level accepted, as '2_34'."
    python: str = "3.11"
    name: str | None = None
    "Distribution name that the recipe promises; None for anybody's wheel."
    version: str | None = None
    "The recipe's: the wheel's has a local part for what it depends on."
    appends: str | None = None
    "What upstream's build appends to the version, as the recipe says."
    cuda: str | None = None
    "The stack's, as '13.0'."
    torch: str | None = None
    "The stack's, as '2.11.0'."
    driver_headers: Path | None = None
    "The folder of cuda.h, whose declarations stand for libcuda.so.1; None: the stack has no CUDA."
    sm: tuple[str, ...] | None = None
    "Exactly these cubins, as ('90',); None: the wheel must hold no CUDA code."
    ptx: str | None = None
    "Each object with device code has PTX for exactly this, as '90'; None: no PTX."
    needs_cubins: bool = False
    "The recipe compiles CUDA code: a wheel without any cubin is refused."
    sm_extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    "Further sm values by source glob, as the recipe declares them."
    bundled: tuple[Bundled, ...] = ()
    "Third-party files that the recipe declares."
    parts: Mapping[str, str | None] = field(default_factory=dict)
    "What the recipe fetches into the source tree beside the source, by name, with its declared licence."
    licenses: tuple[str, ...] = ()
    "Texts that .dist-info/licenses must hold, by their place there."
    max_size: int = DEFAULT_MAX_SIZE
    "Bytes."
    build_paths: tuple[str, ...] = ()
    "Prefixes of the build that must not stand in an RPATH, even behind $ORIGIN."
    site_packages: Path | None = None
    "The stack's environment: torch/lib, nvidia/*/lib and whatever else the lock installs."
    root: Path | None = None
    "The Debian root: libc, libstdc++, loader and the target's Python."
    folders: tuple[str, ...] = ()
    "Further folders of the root that its loader searches."
    interpreter: Path | None = None
    "The Python that exports the C API, where it is known; else it is looked for in the root."
    cuobjdump: Path | None = None
    "NVIDIA's cuobjdump for this host."
    objects_only: bool = False
    "The stack has headers alone: only what can be judged without its libraries is asked."


def of_stack(stack: LoadedStack, target: Arch, ground: Ground) -> Policy:
    """What a stack asks of anybody's wheel."""
    data = stack.data
    return Policy(
        target=target,
        python=stack.python,
        glibc=data.glibc[target],
        driver_headers=driver.headers(ground.packages, ground.compiler),
        cuda=data.cuda,
        torch=stack.torch.version if stack.torch is not None else None,
        sm=stack.sm,
        ptx=device_code.first(stack.asked_ptx, stack.data.ptx),
        site_packages=ground.packages,
        root=ground.root,
        folders=ground.folders,
        interpreter=ground.interpreter,
        cuobjdump=ground.cuobjdump,
        objects_only=data.objects_only,
    )


def asked_by(recipe: Recipe, policy: Policy) -> Policy:
    """What a recipe declares of its wheel, on top of what the stack asks of anybody's."""
    return replace(
        policy,
        name=recipe.name,
        version=recipe.version,
        appends=recipe.wheel.appends,
        sm=policy.sm if recipe.build.cuda else None,
        needs_cubins=recipe.build.cuda,
        sm_extra=recipe.wheel.sm_extra,
        ptx=device_code.first(recipe.wheel.ptx, policy.ptx),
        bundled=recipe.wheel.bundled,
        parts=recipe.parts,
        licenses=recipe.wheel.licenses,
        max_size=parse_size(recipe.wheel.max_size),
    )


def of_plan(plan: Plan, ground: Ground, folder: Path) -> Policy:
    """What the gates expect of a plan's wheel, built in `folder`."""
    policy = asked_by(plan.recipe.data, of_stack(plan.stack, plan.target, ground))
    return replace(policy, ptx=plan.ptx, build_paths=plan.toolchain.build_paths(folder))

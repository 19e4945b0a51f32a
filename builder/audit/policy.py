"""The policy: the requirements that gates check a wheel against."""

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
    """The requirements of stack and recipe, and the paths of the stack's files."""

    target: Arch
    glibc: str
    "Highest manylinux level accepted, as '2_34'."
    python: str = "3.11"
    name: str | None = None
    "Distribution name of the recipe; None for a wheel without a recipe."
    version: str | None = None
    "Version of the recipe; the wheel's version adds a local part for CUDA and torch."
    appends: str | None = None
    "Text that upstream's build appends to the version, from the recipe."
    cuda: str | None = None
    "CUDA of the stack, as '13.0'."
    torch: str | None = None
    "torch of the stack, as '2.11.0'."
    driver_headers: Path | None = None
    "The folder of cuda.h, whose declarations are used instead of libcuda.so.1; None: the stack has no CUDA."
    sm: tuple[str, ...] | None = None
    "Exactly these cubins, as ('90',); None: the wheel must not contain CUDA code."
    ptx: str | None = None
    "Each object with device code must have PTX for exactly this, as '90'; None: no PTX."
    needs_cubins: bool = False
    "The recipe compiles CUDA code: a wheel without cubins is refused."
    sm_extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    "Additional sm values by source glob, from the recipe."
    bundled: tuple[Bundled, ...] = ()
    "Third-party files that the recipe declares."
    parts: Mapping[str, str | None] = field(default_factory=dict)
    "Everything else that the recipe fetches into the source tree, by name, with its declared licence."
    licenses: tuple[str, ...] = ()
    "Texts that .dist-info/licenses must contain, by their path in it."
    max_size: int = DEFAULT_MAX_SIZE
    "Bytes."
    build_paths: tuple[str, ...] = ()
    "Prefixes of paths in the build that must not occur in an RPATH, even after $ORIGIN."
    site_packages: Path | None = None
    "The stack's environment: torch/lib, nvidia/*/lib and everything else that the lock installs."
    root: Path | None = None
    "The Debian root: libc, libstdc++, loader and the target's Python."
    folders: tuple[str, ...] = ()
    "Additional folders of the root that its loader searches."
    interpreter: Path | None = None
    "The Python that exports the C API; None: it is searched in the root."
    cuobjdump: Path | None = None
    "NVIDIA's cuobjdump for this host."
    objects_only: bool = False
    "The stack has only headers: only gates that do not depend on libraries are used."


def of_stack(stack: LoadedStack, target: Arch, ground: Ground) -> Policy:
    """The requirements of a stack for every wheel."""
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
    """The requirements of a recipe, added to those of the stack."""
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
    """The requirements for a plan's wheel, built in `folder`."""
    policy = asked_by(plan.recipe.data, of_stack(plan.stack, plan.target, ground))
    return replace(policy, ptx=plan.ptx, build_paths=plan.toolchain.build_paths(folder))

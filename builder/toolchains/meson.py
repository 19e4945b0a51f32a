"""Meson's cross file: the target's machine, and our launcher for the target's programs, so that Meson runs none directly."""

from __future__ import annotations

import hashlib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from builder.planning.plan import Plan
from builder.toolchains import wrappers

FILE = "cross.ini"
"In a build's working folder."
_BACKEND = "meson-python"


def needed(plan: Plan) -> bool:
    """Meson builds the package, and for another machine than this one."""
    names = {canonicalize_name(Requirement(text).name) for text in plan.recipe.data.build.requires}
    return _BACKEND in names and plan.host is not plan.target


def text(plan: Plan) -> str:
    """The cross file (mesonbuild.com, "Cross compilation"). Its `python` is what `find_installation()` asks."""
    prefix = f"{plan.target.triplet}-"
    programs = {
        "c": f"{prefix}gcc",
        "cpp": f"{prefix}g++",
        "ar": f"{prefix}ar",
        "strip": f"{prefix}strip",
        "pkg-config": "pkg-config",
        "cmake": "cmake",
        "python": "/env/bin/python3",
        "exe_wrapper": f"{wrappers.INSIDE}/bin/emulate",
    }
    machine = {"system": "linux", "cpu_family": plan.target.value, "cpu": plan.target.value, "endian": "little"}
    sections = {"binaries": programs, "host_machine": machine}
    lines = [
        line
        for section, values in sections.items()
        for line in (f"[{section}]", *(f"{key} = '{value}'" for key, value in values.items()), "")
    ]
    return "\n".join([*lines, "[properties]", "needs_exe_wrapper = true", ""])


def digest(plan: Plan) -> str:
    """Hex sha256 of the cross file."""
    return hashlib.sha256(text(plan).encode()).hexdigest()


def options(folder: str) -> tuple[str, ...]:
    """How meson-python is told of it; `folder` is the working folder as the build sees it."""
    return (f"-Csetup-args=--cross-file={folder}/{FILE}",)

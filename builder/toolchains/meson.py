"""Meson's cross file: the target's machine, and our launcher for the target's programs, so that Meson does not run them."""

from __future__ import annotations

import hashlib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from builder.planning.plan import Plan
from builder.toolchains import wrappers

FILE = "cross.ini"
"File in a build's work folder."
_BACKEND = "meson-python"


def needed(plan: Plan) -> bool:
    """Whether Meson builds the package for another architecture."""
    names = {canonicalize_name(Requirement(text).name) for text in plan.recipe.data.build.requires}
    return _BACKEND in names and plan.host is not plan.target


def text(plan: Plan) -> str:
    """The cross file (mesonbuild.com, "Cross compilation"). `find_installation()` uses its `python`."""
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
    """The options of meson-python for the cross file; `folder` is the path of the work folder for the build."""
    return (f"-Csetup-args=--cross-file={folder}/{FILE}",)

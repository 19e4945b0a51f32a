"""Rust in a sandbox: cargo's configuration with the fetched crates as its only source, and the variables of a build."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from builder.ground.interpreters import tree
from builder.planning.plan import Plan
from builder.planning.stack import Arch

CRATES = "crates"
"Folder in a build's work folder, with the unpacked crates."
HOME = "cargo"
"Folder in a build's work folder, with cargo's configuration."
_BUILD = "/build"


def needed(plan: Plan) -> bool:
    """Whether the recipe requires Rust."""
    return plan.recipe.data.build.rust


def triple(arch: Arch) -> str:
    """Rust's name of an architecture."""
    return f"{arch.value}-unknown-linux-gnu"


def text(plan: Plan) -> str:
    """Cargo's configuration. The linkers are those of the root, which cargo starts for build scripts and macros too."""
    lines = [
        "[source.crates-io]",
        'replace-with = "fetched"',
        "[source.fetched]",
        f'directory = "{_BUILD}/{CRATES}"',
        "[net]",
        "offline = true",
    ]
    if plan.host is not plan.target:
        lines += ["[build]", f'target = "{triple(plan.target)}"']
    for arch in dict.fromkeys((plan.host, plan.target)):
        lines += [f"[target.{triple(arch)}]", f'linker = "{arch.triplet}-gcc"']
    return "\n".join(lines) + "\n"


def variables(plan: Plan) -> dict[str, str]:
    """The variables of cargo, and those with which pyo3 and maturin find the target's Python in a cross build."""
    values = {"CARGO_HOME": f"{_BUILD}/{HOME}", "CARGO_NET_OFFLINE": "true", "CARGO_TERM_COLOR": "never"}
    if plan.host is plan.target:
        return values
    python = plan.stack.python
    values |= {
        "CARGO_BUILD_TARGET": triple(plan.target),
        "HOST_CC": f"{plan.host.triplet}-gcc",
        "HOST_CXX": f"{plan.host.triplet}-g++",
        "PYO3_CROSS_LIB_DIR": f"{tree.PREFIX if plan.stack.interpreter is not None else '/usr'}/lib/python{python}",
    }
    if plan.stack.interpreter is None:
        # The root has this file of the host's Python too.
        values["_PYTHON_SYSCONFIGDATA_NAME"] = f"_sysconfigdata__{plan.target.triplet}"
    return values


def digest(plan: Plan) -> str:
    """Hex sha256 of configuration and variables."""
    return hashlib.sha256(json.dumps([text(plan), variables(plan)]).encode()).hexdigest()


def lay(plan: Plan, folder: Path) -> None:
    """Write cargo's configuration into a work folder."""
    (folder / HOME).mkdir(exist_ok=True)
    (folder / HOME / "config.toml").write_text(text(plan))

"""The digest of all code that decides whether a finished wheel passes. If the digest changes, wheels are checked again."""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from builder.planning.plan import Plan

_CODE = Path(__file__).parents[1]
RULES = (
    "../gracefarm/tables.py",
    "../gracefarm/variant_json.py",
    "../gracefarm/variants.py",
    "audit/__init__.py",
    "audit/contents.py",
    "audit/cuobjdump.py",
    "audit/device_digest.py",
    "audit/dependence.py",
    "audit/gates/alignment.py",
    "audit/gates/cubins.py",
    "audit/gates/elf_machine.py",
    "audit/gates/grafted.py",
    "audit/gates/licence.py",
    "audit/gates/platform_tag.py",
    "audit/gates/python_abi.py",
    "audit/gates/rpath.py",
    "audit/gates/symbols.py",
    "audit/gates/variant_label.py",
    "audit/gates/wheel.py",
    "audit/policy.py",
    "audit/providers.py",
    "audit/variant.py",
    "audit/verdict.py",
    "box/gpu.py",
    "data/gpu_probe.py",
    "data/smoke_driver.py",
    "elf.py",
    "flow/judge.py",
    "ground/environment.py",
    "ground/wheels.py",
    "planning/driver.py",
    "planning/local_version.py",
    "planning/tags.py",
    "smoke.py",
    "toolchains/host_environment.py",
    "toolchains/host_trial.py",
    "toolchains/sandbox_trial.py",
)
"Modules, relative to builder/, whose code decides whether a wheel passes."


def digest(plan: Plan) -> str:
    """Hex sha256 of everything that judges a plan's wheel: gates, smoke tests, and requirements of recipe and toolchain."""
    recipe = plan.recipe
    content = hashlib.sha256(rules().encode())
    for script in (recipe.smoke_script, recipe.smoke_gpu_script):
        content.update((script.read_bytes() if script else b"") + b"\0")
    wheel = recipe.data.wheel.model_dump(mode="json", include={"bundled", "max_size"})
    build_paths = plan.toolchain.build_paths(Path("/work"))
    content.update(json.dumps([wheel, recipe.data.imports, build_paths], sort_keys=True).encode())
    return content.hexdigest()


@cache
def rules(code: Path = _CODE) -> str:
    """Hex sha256 of RULES in the folder of the program; comments do not change it."""
    parts = [f"{name} {code_digest((code / name).read_text())}" for name in RULES]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def code_digest(text: str) -> str:
    """Hex sha256 of Python code without comments, layout and docstrings, the same with every Python version."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Docstrings, also those of constants and fields.
            code = [line for line in node.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
            node.body = code or [ast.Pass()]
        elif isinstance(node, ast.JoinedStr):
            # Python 3.12 ends `{value:{width}}` with an empty string.
            node.values = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    return hashlib.sha256(_dump(tree).encode()).hexdigest()


def _dump(node: object) -> str:
    """A syntax tree as text without empty fields, since `ast.dump` writes different fields with different Pythons."""
    if isinstance(node, list):
        return f"[{', '.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{name}={_dump(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({', '.join(fields)})"

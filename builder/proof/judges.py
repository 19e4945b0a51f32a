"""What judges a finished wheel and changes no byte of it, as one digest: records have it, so that other rules judge anew."""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from builder.planning.recipe import LoadedRecipe

_CODE = Path(__file__).parents[1]
RULES = (
    *sorted(f"audit/{path.name}" for path in (_CODE / "audit").glob("*.py") if path.name != "repair.py"),
    "data/gpu_probe.py",
    "data/smoke_driver.py",
    "elf.py",
    "planning/driver.py",
    "smoke.py",
    "toolchains/bed.py",
)
"Modules whose code decides whether a wheel passes, below builder/; audit/repair.py makes the wheel that is judged."


def digest(recipe: LoadedRecipe) -> str:
    """Hex sha256 of what judges a wheel of the recipe: gates, smoke tests, and what the recipe itself asks."""
    content = hashlib.sha256(rules().encode())
    for script in (recipe.smoke_script, recipe.smoke_gpu_script):
        content.update((script.read_bytes() if script else b"") + b"\0")
    wheel = recipe.data.wheel.model_dump(mode="json", include={"bundled", "max_size"})
    content.update(json.dumps([wheel, recipe.data.smoke.imports], sort_keys=True).encode())
    return content.hexdigest()


@cache
def rules(code: Path = _CODE) -> str:
    """Hex sha256 of RULES and of the driver's symbols in the folder of the program; comments are not in it."""
    parts = [f"{name} {code_digest((code / name).read_text())}" for name in RULES]
    for listing in sorted((code / "data").glob("driver-symbols-*.txt")):
        parts += [listing.name, *(line for line in listing.read_text().splitlines() if not line.startswith("#"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def code_digest(text: str) -> str:
    """Hex sha256 of what Python code does: comments, layout and docstrings are not in it."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Docstrings, and those of constants and fields.
            code = [line for line in node.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
            node.body = code or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()

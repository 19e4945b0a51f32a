"""A project, a recipe and a stack whose build ids the tests compare."""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from builder.planning import stack
from builder.planning.recipe import LoadedRecipe, Recipe
from builder.planning.stack import Arch, LoadedStack, Stack
from builder.toolchains import choice

REPOSITORY = Path(__file__).parent.parent.parent
NAME = "causal_conv1d"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "recipes" / NAME, tmp_path / "recipes" / NAME)
    shutil.copytree(REPOSITORY / "stacks", tmp_path / "stacks")
    return tmp_path


def replace(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(project: Path) -> None:
        text = (project / path).read_text()
        assert old in text
        (project / path).write_text(text.replace(old, new, 1))

    return change


RECIPE, STACK, LOCK, ROOT = (
    f"recipes/{NAME}/recipe.toml",
    "stacks/cu130/stack.toml",
    "stacks/cu130/requirements.lock",
    "stacks/cu130/root.lock",
)

SHA, COMMIT = "a" * 64, "b" * 40
GIT = {
    "kind": "git",
    "url": "https://example.org/thing.git",
    "commit": COMMIT,
    "tree": COMMIT,
    "submodules": {
        "inner": {"url": "https://example.org/inner.git", "commit": COMMIT, "tree": COMMIT, "license": "BSD-3-Clause"}
    },
}
EVIDENCE: dict[str, Any] = {
    "accepted": {"date": "2026-11-29", "url": "https://example.org/page"},
    "witness": [{"source": "another project's lock", "value": SHA}],
}
SDIST = {"kind": "sdist", "name": "thing", "version": "1.0", "sha256": SHA, **EVIDENCE}
FILE = {"kind": "file", "url": "https://example.org/thing.zip", "sha256": SHA, **EVIDENCE}
WHOLE: dict[str, Any] = {
    "name": "thing",
    "version": "1.0",
    "summary": "text",
    "license": "BSD-3-Clause",
    "stack": "cu124",
    "superseded": "by another",
    "known_bad": [{"sm": ["103"], "cuda": ">=13", "torch": ">=2.9", "reason": "wrong", "link": "https://example.org/1"}],
    "refuses": {"host": "its tools are too new"},
    "repositories": [
        {"url": "https://example.org/more.git", "commit": COMMIT, "tree": COMMIT, "path": "more", "license": "BSD-3-Clause"}
    ],
    "files": [
        {
            "url": "https://example.org/a.zip",
            "sha256": SHA,
            "path": "a",
            "unpack": True,
            "members": {"x": "y", "z": ["one", "two"]},
            "license": "BSD-3-Clause",
            "binfmt": True,
            **EVIDENCE,
        },
        {"url": "https://example.org/b", "sha256_unknown": "out of reach", "path": "b"},
        {"text": "words", "path": "c"},
        {"name": "tools", "version": "1.0", "sha256": SHA, "path": "d"},
        {"deb": "pool/t/tools_1.0_arm64.deb", "suite": "trixie", "sha256": SHA, "path": "e", "host": "x86_64"},
    ],
    "substitutions": [{"path": "setup.py", "find": "old", "replace": "new", "count": 2}],
    "build": {
        "requires": ["cython>=3.1"],
        "subdirectory": "python",
        "environment": {"NAME": "value"},
        "config_settings": {"key": "value"},
        "cmake": {"NAME": "value"},
        "cuda": True,
        "rust": True,
        "memory_per_job": "4GiB",
        "unit_memory": {"large.cu": "9GiB"},
        "unit_seconds": {"long.cu": 100},
        "binfmt": True,
    },
    "wheel": {
        "sm_extra": {"hopper/*.cu": ["89"]},
        "sm_supported": ["89", "90", "90a"],
        "allow_sm_fallback": True,
        "appends": "d20261129",
        "ptx": "80",
        "requires": {"triton": "triton==3.2.0"},
        "source_archive": True,
        "licenses": ["inner/LICENSE.txt"],
        "bundled": [
            {"path": "lib.so", "sha256": SHA, "license": "BSD-3-Clause"},
            {"path": "other.so", "origin": "https://example.org/a.zip", "license": "BSD-3-Clause"},
        ],
        "max_size": "1GiB",
        "may_publish": "its maker said so",
    },
    "smoke": {"imports": ["thing"]},
}
"A recipe in which every field of the schema is set."

TREE: dict[str, Any] = {
    "name": "timber",
    "version": "1.0",
    "license": "BSD-3-Clause",
    "stack": "cxx",
    "source": FILE,
    "build": {"cuda": False},
    "tree": {"commands": ["make install"], "holds": ["lib"]},
}
DIFFERENCES = [
    {
        "cuda": ">=12",
        "substitutions": [{"path": "a.cu", "find": "x", "replace": "y", "count": 3}],
        "requires": {"torch": "torch=={torch}"},
    }
]

OTHERS = MappingProxyType(
    {"aarch64": "x86_64", "x86_64": "aarch64", "BSD-3-Clause": "MIT", EVIDENCE["accepted"]["date"]: "2001-01-01"}
    | {"80": "86", "89": "87", "90": "90a", "90a": "75"}
)
"Replacements for values that must have a special form."


def other(value: object) -> object:
    """A different value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case list():
            return ["more"]
        case str() if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", value):
            return ("c" if value[0] != "c" else "d") + value[1:]
        case str() if value in OTHERS:
            return OTHERS[value]
        case str() if value.endswith("GiB"):
            return "7GiB"
        case str() if re.fullmatch(r"[\d._]+", value):
            return value[:-1] + ("3" if value[-1] != "3" else "4")
        case str() if re.search(r"[=<>]", value):
            return f"{value}9"
        case str():
            return value + (">=0" if value.endswith("]") else "x")
    raise AssertionError(value)


def changed(table: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy of the table with a different value at a path."""
    result = copy.deepcopy(table)
    inner: Any = result
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = other(inner[path[-1]])
    if path[-1] == "sha256" and "witness" in inner:
        inner["witness"] = [witness | {"value": inner["sha256"]} for witness in inner["witness"]]
    return result


@pytest.fixture
def whole(project: Path) -> tuple[LoadedRecipe, LoadedStack]:
    shutil.rmtree(project / "recipes" / NAME)
    (project / "recipes" / "thing").mkdir()
    (project / "recipes" / "thing" / "requirements.lock").write_text(f"cython==3.19.4 --hash=sha256:{SHA}\n")
    loaded = stack.load(project / "stacks", "cu124")
    table = loaded.data.model_dump(mode="json")
    table["torch"]["cuda"] = "12.4"
    table["ptx"] = "80"
    gap = table["environment"]["wheels"][0] | {"name": "gap", "sha256": None, "sha256_unknown": "out of reach"}
    own = gap | {"name": "torch", "sha256": SHA, "sha256_unknown": None, **EVIDENCE}
    table["environment"]["wheels"] = [own, gap]
    table["environment"]["left_out"] = ["nothing"]
    table["no_lock"] = {"3.10": "torch has no wheel for it"}
    image = table["container"]["aarch64"]
    table["container"] = {
        "aarch64": image | {"sha256": SHA, "sha256_unknown": None, **EVIDENCE},
        "x86_64": image | {"sha256": None, "sha256_unknown": "no"},
    }
    table["toolchain"]["path"] = ["cmake/bin"]
    folder = project / "recipes" / "thing"
    return (
        LoadedRecipe(folder=folder, data=Recipe.model_validate({**WHOLE, "source": GIT}), patches=(), smoke_script=None),
        dataclasses.replace(loaded, data=Stack.model_validate(table)),
    )


def id_of(one: LoadedRecipe, base: LoadedStack) -> str:
    return choice.make_plan(one, base, Arch.X86_64, Arch.AARCH64).build_id

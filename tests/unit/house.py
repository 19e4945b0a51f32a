"""Our own Python, parsed: what the tests of the house read."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

import pytest

from tests.conftest import REPOSITORY

PROGRAMS = ("builder", "index", "deploy")
SHARED = "gracefarm"
FOLDERS = (*PROGRAMS, SHARED)
EVERYWHERE = (*FOLDERS, "tests", "bench", "tools", "recipes", "sets")
# Separate programs: they are copied to where they run, and import nothing of ours but files of their data folder.
DATA = ("builder/data/", "deploy/data/")

# What no checker may complain about.
ALLOWED = """
import os
from builder.audit import tag

ROWS = {"a": 1}

class Cell:
    found: str

    def __init__(self):
        self._rows = []

    def same(self, other):
        return self._rows == other._rows

def rows(environment):
    ROWS = {}
    ROWS["b"] = 2
    return {**os.environ, **environment}, [row for row in ROWS], tag.TAG
"""


@dataclass(frozen=True, kw_only=True)
class Module:
    """A parsed file of the repository."""

    path: str
    name: str
    tree: ast.Module
    lines: int

    @property
    def program(self) -> str:
        """The top folder."""
        return self.name.partition(".")[0]

    @property
    def layer(self) -> str:
        """The folder below the program, or the module's own name beside these folders."""
        return self.name.split(".")[1] if "." in self.name else "__init__"


def parse(sources: dict[str, str]) -> dict[str, Module]:
    """Modules by dotted name, of path to source."""
    modules = {}
    for path, source in sources.items():
        parts = list(PurePosixPath(path).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(path=path, name=name, tree=ast.parse(source), lines=len(source.splitlines()))
    return modules


def read(*folders: str) -> dict[str, Module]:
    """The repository's own files below these folders."""
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return parse({path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in paths})


@cache
def everything() -> dict[str, Module]:
    """All of our Python but the wrappers whose bytes count."""
    return read(*EVERYWHERE)


@cache
def outside() -> dict[str, Module]:
    """The programs with their data folders, and what uses them: tests, benchmarks, tools."""
    return {name: module for name, module in everything().items() if module.program not in ("recipes", "sets")}


@cache
def layered() -> dict[str, Module]:
    """The three programs, what they share, and the separate programs in their data folders."""
    return {name: module for name, module in outside().items() if module.program in FOLDERS}


@cache
def programs() -> dict[str, Module]:
    """The three programs and what they share."""
    return {name: module for name, module in layered().items() if not module.path.startswith(DATA)}


def report(violations: Iterable[str]) -> None:
    """Fail with one line a violation."""
    if lines := sorted(set(violations)):
        pytest.fail("\n".join(lines), pytrace=False)


def let_pass(checkers: Iterable[Callable[[dict[str, Module]], Iterable[str]]], beside: dict[str, str] | None = None) -> None:
    """Fail when one of the checkers complains about ALLOWED; `beside`: sources by path that it may import."""
    path = "builder/proof/record.py"
    modules = parse({**(beside or {}), path: ALLOWED})
    for checker in checkers:
        assert [line for line in checker(modules) if path in line] == [], checker

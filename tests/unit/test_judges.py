"""What judges a wheel is in a digest that every changed rule changes, and no comment."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from builder.planning import recipe, stack
from builder.planning.stack import Arch
from builder.proof import judges
from builder.toolchains import choice
from builder.toolchains.container import ContainerToolchain
from builder.toolchains.sandbox import SandboxToolchain
from tests.conftest import REPOSITORY

OURS = ("builder", "gracefarm")
DO_NOT_JUDGE = {
    "../gracefarm/console.py": "how results are printed",
    "../gracefarm/errors.py": "exit codes and sentences",
    "../gracefarm/files.py": "writes files whole, and hashes them",
    "../gracefarm/process.py": "runs what it is told to",
    "audit/repair.py": "makes the wheel that is judged",
    "box/host.py": "runs what it is told to",
    "box/sandbox.py": "runs what it is told to",
    "compiling/pep517.py": "the settings' bound on memory, and which line of an output is shown",
    "fetch/own_index.py": "brings what the lock names by sha256",
    "fetch/simple.py": "reads an index; the lock names the wheels by sha256",
    "fetch/urls.py": "how an address is shown",
    "flow/attempt.py": "holds the verdicts",
    "ground/bytecode.py": "fills in what Python would write itself",
    "ground/interpreters/tree.py": "the interpreter, which enters the build id",
    "ground/toolkit.py": "the compiler",
    "ground/torch_facts.py": "judges the stack's torch, not the wheel",
    "ground/uv.py": "how uv is called",
    "planning/device_code.py": "architectures, which enter the build id",
    "planning/gaps.py": "which digest is unknown: whether the GPU's test can be run at all",
    "planning/ground.py": "values of what was laid",
    "planning/pins.py": "values of the lock, which enter the build id",
    "planning/plan.py": "values, which enter the build id; what a toolchain asks is in the digest itself",
    "planning/recipe.py": "values, which enter the build id or the digest itself",
    "planning/settings.py": "values of this machine",
    "planning/stack.py": "values, which enter the build id",
    "proof/record.py": "keeps what came out",
    "toolchains/host_tools.py": "finds the tools, which enter the build id",
    "toolchains/wrappers.py": "where site-packages is",
}
"What RULES import, and why it is not a rule: its changes leave finished wheels as they were judged."


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the builder's code, beside a copy of what the programs share."""
    shutil.copytree(REPOSITORY / "gracefarm", tmp_path / "gracefarm", ignore=shutil.ignore_patterns("__pycache__"))
    return Path(shutil.copytree(REPOSITORY / "builder", tmp_path / "builder", ignore=shutil.ignore_patterns("__pycache__")))


def edited(code: Path, name: str, old: str, new: str) -> str:
    """The digest of the rules with a text replaced in one file of a copy."""
    place = code / name
    text = place.read_text()
    assert old in text
    place.write_text(text.replace(old, new, 1))
    judges.rules.cache_clear()
    return judges.rules(code)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("audit/verdict.py", 'if verdict.status == "failed"', "if False"),
        ("audit/policy.py", "max_size=parse_size(recipe.wheel.max_size)", "max_size=1"),
        ("audit/gates/alignment.py", "def _wrong(", "def _right("),
        ("audit/__init__.py", " cubins,", ""),
        ("flow/judge.py", "audit.require(attempt.verdicts)", "pass"),
        ("flow/judge.py", "if plan.stack.data.objects_only:", "if True:"),
        ("toolchains/host_trial.py", "overlaid = True", "overlaid = False"),
        ("toolchains/host_environment.py", "    wheels.install_file(", "    str("),
        ("ground/environment.py", "    _check_tags(wheel, python, glibc, Arch(target))", "    pass"),
        ("ground/wheels.py", "def install_file(", "def leave_file("),
        ("box/gpu.py", "if any(", "if all("),
        ("smoke.py", "_require_own(trial.wheel, result)", ""),
        ("toolchains/sandbox_trial.py", '"OMP_NUM_THREADS": "1"', '"OMP_NUM_THREADS": "2"'),
        ("data/smoke_driver.py", "\nimport json\n", "\nimport json\nimport html\n"),
        ("planning/driver.py", "cuWGL", "cuVDPAU"),
        ("elf.py", "_FLAG_BASE = 1", "_FLAG_BASE = 2"),
        ("../gracefarm/tables.py", "return int(float(match[1]) * _UNITS[match[2]])", "return 1"),
        ("../gracefarm/variants.py", "def split_label(", "def join_label("),
    ],
)
def test_a_changed_rule_judges_anew(code: Path, name: str, old: str, new: str) -> None:
    assert edited(code, name, old, new) != judges.rules()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("audit/gates/alignment.py", "GATE =", "# a comment\n\n\nGATE ="),
        ("audit/verdict.py", "Raise if a gate refused the wheel.", "Another sentence."),
        ("audit/policy.py", "Highest manylinux level accepted", "Another sentence"),
        ("smoke.py", "Import the wheel in a clean environment.", "Another sentence."),
        ("flow/judge.py", "a gate refuses the wheel", "Another sentence"),
    ],
)
def test_a_comment_does_not(code: Path, name: str, old: str, new: str) -> None:
    assert edited(code, name, old, new) == judges.rules()


def imported(name: str) -> Iterator[str]:
    """Modules of the builder and of gracefarm that one of them imports, relative to builder/."""
    builder = REPOSITORY / "builder"
    for node in ast.walk(ast.parse((builder / name).read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in OURS for alias in node.names), f"{name}: write `from … import`"
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] in OURS:
            place = REPOSITORY.joinpath(*node.module.split("."))
            for alias in node.names:
                files = (place / f"{alias.name}.py", place / alias.name / "__init__.py", place.with_suffix(".py"))
                yield os.path.relpath(next(filter(Path.is_file, (*files, place / "__init__.py"))), builder)


def test_what_rules_import_is_a_rule_or_said_not_to_judge() -> None:
    assert {module for name in judges.RULES for module in imported(name)} - set(judges.RULES) == DO_NOT_JUDGE.keys()


def test_where_a_toolchain_builds_is_in_the_digest() -> None:
    loaded = recipe.load(REPOSITORY / "recipes", "causal_conv1d")
    plan = choice.make_plan(loaded, stack.load(REPOSITORY / "stacks", "cu130"), stack.host_arch(), Arch.AARCH64)

    class Elsewhere(SandboxToolchain):
        """One that says nothing of where it builds."""

        def build_paths(self, folder: Path) -> tuple[str, ...]:  # noqa: ARG002
            return ()

    container = ContainerToolchain(engine="podman", cibuildwheel="4")
    assert len({judges.digest(replace(plan, toolchain=kind)) for kind in (plan.toolchain, Elsewhere(), container)}) == 3


def test_the_digest_of_code_is_the_same_under_each_python() -> None:
    code = """
class Gate(Base, kind=None):
    def judge(self, wheel, /, *names, policy=None, **others) -> str:
        return f"{wheel!r:>{policy}} {{of}} {', '.join(names)}" "and", [*names], {**others}
"""
    assert judges.code_digest(code) == "d945251d6dadb7cd119f13ed058f4fc3b05716dc28b389c909d148f7c60b2c71"

"""What judges a wheel is in a digest that every changed rule changes, and no comment."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from builder.proof import judges
from tests.conftest import REPOSITORY


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the builder's code."""
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
        ("audit/alignment.py", "def _wrong(", "def _right("),
        ("audit/__init__.py", " cubins,", ""),
        ("smoke.py", "_require_own(trial.wheel, result)", ""),
        ("toolchains/bed.py", '"OMP_NUM_THREADS": "1"', '"OMP_NUM_THREADS": "2"'),
        ("data/smoke_driver.py", "\nimport json\n", "\nimport json\nimport html\n"),
        ("data/driver-symbols-13.0.txt", "cuInit\n", ""),
        ("elf.py", "_FLAG_BASE = 1", "_FLAG_BASE = 2"),
    ],
)
def test_a_changed_rule_judges_anew(code: Path, name: str, old: str, new: str) -> None:
    assert edited(code, name, old, new) != judges.rules()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("audit/alignment.py", "GATE =", "# a comment\n\n\nGATE ="),
        ("audit/verdict.py", "Go on only when no gate refused.", "Another sentence."),
        ("audit/policy.py", "Highest manylinux level accepted", "Another sentence"),
        ("smoke.py", "Import the wheel in a fresh environment.", "Another sentence."),
        ("data/driver-symbols-13.0.txt", "# Source", "# From"),
        ("flow/build.py", "AuditError, SmokeError", "Another word"),
    ],
)
def test_a_comment_does_not(code: Path, name: str, old: str, new: str) -> None:
    assert edited(code, name, old, new) == judges.rules()


def test_every_module_of_the_gates_is_a_rule_but_the_one_that_repairs() -> None:
    modules = {f"audit/{path.name}" for path in (REPOSITORY / "builder" / "audit").glob("*.py")}
    assert {name for name in judges.RULES if name.startswith("audit/")} == modules - {"audit/repair.py"}

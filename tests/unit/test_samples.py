"""Records and sets that the commit 7ac15b8 wrote are read, shown and verified (tests/samples/README.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from builder.cli import cli
from builder.planning import settings
from builder.sets import set_record
from tests.conftest import REPOSITORY

SAMPLES = REPOSITORY / "tests" / "samples" / "7ac15b8"
TINY_C = "d6b759acbf96182aeb34397ea431c0775de2d03d6404bbe705aadb980f358882"
BROKEN = "e7c47943047387d445c008f1aac8088b5a8361d6f65188fa145d1526f1cdb91a"
CAUSAL_CONV1D = "fbdfab109e3fb003e646a947c4de3e7e2d5b5bd524c34da5ae73d336dfac0bd0"
SET = "19b6a12e75a092491a530afcb0bd9c38c28a1b36eae0f996c7aff3fde3ff6d36"
WHEEL = "244e549a56e56d1ba152443828c5c0aa4b713e48d59e15b677c3a813e64e8854"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sample's GRACEFARM_HOME with the wheel of tiny_c, which the sample's index holds, back in its place."""
    home = shutil.copytree(SAMPLES / "farm", tmp_path / "home")
    shutil.copytree(REPOSITORY / "recipes" / "causal_conv1d", home / "project" / "recipes" / "causal_conv1d")
    record = json.loads((home / "builds" / TINY_C / "record.json").read_text())
    dist = home / "builds" / TINY_C / "dist"
    dist.mkdir()
    shutil.copy(SAMPLES / "index" / "files" / WHEEL[:2] / WHEEL, dist / record["wheel"]["filename"])
    monkeypatch.setenv("GRACEFARM_HOME", str(home))
    monkeypatch.setenv("GRACEFARM_PROJECT", str(home / "project"))
    return home


def run(*arguments: str) -> str:
    outcome = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.mark.parametrize(("name", "build_id"), [("tiny_c", TINY_C), ("broken", BROKEN), ("causal_conv1d", CAUSAL_CONV1D)])
def test_a_record_is_shown_as_it_was_written(home: Path, name: str, build_id: str) -> None:
    shown = json.loads(run("show", name, "--json"))
    written = json.loads((home / "builds" / build_id / "record.json").read_text())
    _assert_shown(shown, written)
    _assert_shown(shown["gpu"] or {}, written["gpu"] or {})


def _assert_shown(shown: dict[str, Any], written: dict[str, Any]) -> None:
    """What was written is shown, apart from the table `gpu`; what it did not know is empty."""
    assert {key: value for key, value in shown.items() if key in written and key != "gpu"} == {
        key: value for key, value in written.items() if key != "gpu"
    }
    assert not any(value for key, value in shown.items() if key not in written)


def test_a_record_is_shown_to_people(home: Path) -> None:
    text = " ".join(run("show", "broken").split())
    assert "failed" in text
    assert "the build of broken failed: RuntimeError: on purpose" in text
    text = " ".join(run("show", "causal_conv1d").split())
    assert "cubins for exactly sm_90, and no PTX" in text
    assert "compile 475.8 s" in text


def test_the_last_builds_are_listed(home: Path) -> None:
    lines = {line.split()[0]: line for line in run("list").splitlines() if line.strip()}
    assert {name: "built" in line for name, line in lines.items()} == {"broken": False, "tiny_c": True, "causal_conv1d": True}


def test_a_wheel_is_what_its_record_and_its_signed_provenance_say(home: Path) -> None:
    record, key = home / "builds" / TINY_C / "record.json", home / "farm.pub"
    checks = json.loads(run("verify", "tiny_c", "--provenance", str(record), "--key", str(key), "--json"))
    assert {check["name"]: check["ok"] for check in checks} == dict.fromkeys(
        ("record", "build-id", "sbom", "provenance"), True
    )
    assert "6 packages of the environment" in json.dumps(checks)


def test_a_set_is_read(home: Path) -> None:
    record = set_record.read(settings.load(), SET)
    assert record is not None
    assert record.model_dump(mode="json") == json.loads((home / "sets" / SET / "set.json").read_text())
    assert record.builds == {"tiny_c": TINY_C}
    assert [wheel.sha256 for wheel in record.wheels if wheel.own] == [WHEEL]

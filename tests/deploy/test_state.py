"""The state: whole at any moment, one writer at a time, nothing lost by kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.nodes import state
from deploy.nodes.deployment import Folder
from gracefarm.errors import ConfigError, HostError

HOLD = """
import sys, time
from pathlib import Path
from deploy.nodes import state
from deploy.nodes.deployment import Folder
with state.hold(Folder(path=Path(sys.argv[1])), "deploy up", on_wait=lambda who: print("waits for", who, flush=True)) as kept:
    kept.begin("weights", "d1")
    print("holds", sorted(kept.state.steps), flush=True)
    time.sleep(float(sys.argv[2]))
    kept.end("weights", "done", "191 files", {"commit": "c0"})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(path=tmp_path / ".deploy")
    made.make()
    return made


def holder(folder: Folder, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path), str(seconds)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_a_secret_in_a_cause_is_not_kept(folder: Folder) -> None:
    folder.api_key.write_text("the-engines-own-key\n")
    with state.hold(folder, "deploy serve", on_wait=pytest.fail) as kept:
        kept.begin("engine", "d0")
        kept.end("engine", "failed", "while loading: Namespace(api_keys='the-engines-own-key'); token hf_" + "AbCd" * 8)
    text = folder.state.read_text()
    assert "while loading" in text
    assert "the-engines-own-key" not in text
    assert "AbCdAbCd" not in text


def test_what_a_step_did_is_read_back(folder: Folder) -> None:
    with state.hold(folder, "deploy up", on_wait=pytest.fail) as kept:
        kept.begin("environment", "d0")
        assert state.read(folder).steps["environment"].outcome == "running"
        assert state.read(folder).data("environment") == {}
        kept.end("environment", "done", "built", {"id": "e1"})
    found = state.read(folder)
    assert found.steps["environment"].text == "built"
    assert found.data("environment") == {"id": "e1"}
    with state.hold(folder, "deploy down", on_wait=pytest.fail) as kept:
        kept.forget("environment", "never")
    assert state.read(folder).steps == {}


def test_the_second_is_told_who_holds_it_and_waits(folder: Folder) -> None:
    with holder(folder, 1.5) as first:
        assert first_line(first) == "holds ['weights']"
        told: list[str] = []
        begin = time.monotonic()
        with state.hold(folder, "deploy serve", on_wait=told.append) as kept:
            assert time.monotonic() - begin > 0.5
            assert kept.state.steps["weights"].outcome == "done"  # read after the first had let go
    assert len(told) == 1
    assert "`deploy up` of " in told[0]
    assert f"process {first.pid}" in told[0]


def test_who_does_not_want_to_wait_is_refused(folder: Folder) -> None:
    with holder(folder, 30) as first:
        first_line(first)
        with (
            pytest.raises(HostError, match=r"`deploy up` of .* is running"),
            state.hold(folder, "deploy down", wait=False, on_wait=pytest.fail),
        ):
            pytest.fail("entered")
        first.kill()


def test_kill_leaves_no_lock_and_the_step_as_running(folder: Folder) -> None:
    with holder(folder, 60) as first:
        first_line(first)
        os.kill(first.pid, signal.SIGKILL)
    assert (folder.path / "holder.json").exists()  # stale, which is harmless
    with state.hold(folder, "deploy up", wait=False, on_wait=pytest.fail) as kept:
        assert kept.state.steps["weights"].outcome == "running"
        assert kept.state.data("weights") == {}


def test_killed_at_any_moment_of_many_writes_the_file_is_whole(folder: Folder) -> None:
    code = """
import sys
from pathlib import Path
from deploy.nodes import state
from deploy.nodes.deployment import Folder
with state.hold(Folder(path=Path(sys.argv[1])), "x", on_wait=print) as kept:
    print("go", flush=True)
    for number in range(10**6):
        kept.begin(f"s{number % 9}", "d" * 2000)
"""
    for round_ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        ) as process:
            first_line(process)
            time.sleep(0.05 + 0.03 * round_)
            process.kill()
        assert state.read(folder).steps


def test_a_damaged_state_and_a_newer_one_are_told(folder: Folder) -> None:
    folder.state.write_text("{")
    with pytest.raises(ConfigError, match=r"state\.json"):
        state.read(folder)
    folder.state.write_text(json.dumps({"version": 2, "steps": {}}))
    with pytest.raises(ConfigError, match="version 2"):
        state.read(folder)


def test_before_init_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not initialised"), state.hold(Folder(path=tmp_path), "x", on_wait=pytest.fail):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


def test_a_digest_depends_on_every_input_and_on_no_order_of_keys() -> None:
    assert state.digest("a", {"x": 1, "y": 2}) == state.digest("a", {"y": 2, "x": 1})
    assert len({state.digest("a", "b"), state.digest("ab"), state.digest(["a", "b"]), state.digest("a", "c")}) == 4

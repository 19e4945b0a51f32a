"""A deployment on two nodes of the rehearsal that is killed in every step, wedged, robbed of a node and taken down.

The tests share one rehearsal; each brings it first to where it needs it, which costs little where it is there already.
"""

from __future__ import annotations

import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.nodes import state
from deploy.nodes.deployment import load_deployment
from deploy.rehearsal import walkthrough
from deploy.rehearsal.walkthrough import Rehearsal
from deploy.steps.order import UP
from tests.deploy import faultkit, nodefaults
from tests.deploy.faultkit import begin, deploy, end, kill, steps, until_running, verdict, well

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]
SEEN: list[str] = []


@pytest.fixture(scope="module")
def made() -> Iterator[Rehearsal]:
    with faultkit.ready(2, options="connect_timeout = 3") as ready:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.2):
                SEEN.extend(faultkit.in_arguments(ready))

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        yield ready
        stop.set()
        watching.join()


@pytest.mark.slow
def test_interrupted_in_the_first_build_it_goes_on_until_down_ends_it_and_nothing_half_made_is_left(made: Rehearsal) -> None:
    process = begin(made, "up")
    root = made.room.share / "gracefarm" / "rehearsal"
    faultkit.until(lambda: any((root / "envs").glob(".*/bin")))
    faultkit.interrupt(process)
    done = end(process, 60)
    assert done.code == 130
    assert "repeat the command" in done.output
    assert walkthrough.left(made)
    assert " on k0" in well(made, "down").partition("processes stopped: ")[2]
    assert walkthrough.left(made) == {}
    assert not [path.name for path in (root / "envs").glob(".*")]


def test_killed_in_the_first_build_the_same_command_goes_on(made: Rehearsal) -> None:
    """What the killed command had started on the nodes is not started a second time: the next one waits for it."""
    process = begin(made, "up")
    until_running(made, "environment", process)
    time.sleep(3)
    kill(process)
    assert steps(made)["environment"]["outcome"] == "running"
    well(made, "up")
    assert {steps(made)[step]["outcome"] for step in UP} == {"done", "skipped"}
    assert "up to date" in well(made, "up")
    builds = list((made.room.share / "gracefarm" / "rehearsal" / "envs").iterdir())
    assert len(builds) == 2  # the engine's and the one for downloads; nothing half-made


@pytest.mark.slow
@pytest.mark.parametrize("step", UP)
def test_killed_in_every_step_of_up(made: Rehearsal, step: str) -> None:
    well(made, "up")
    process = begin(made, "up", "--from", step)
    until_running(made, step, process)
    kill(process)
    assert steps(made)[step]["outcome"] == "running"
    well(made, "up")
    assert {steps(made)[step]["outcome"] for step in UP} == {"done", "skipped"}


@pytest.mark.slow
def test_killed_while_ray_starts_and_while_the_engine_loads(made: Rehearsal) -> None:
    well(made, "up")
    faultkit.order(made, "k1", "load=slow:8")
    try:
        process = begin(made, "serve")
        until_running(made, "ray", process)
        time.sleep(2)
        kill(process)
        process = begin(made, "serve")
        until_running(made, "engine", process)
        time.sleep(2)
        loading = faultkit.engine_pid(made)
        kill(process)
        output = well(made, "serve")
        assert "the engine is already loading; waiting for it" in output
        assert "READY" in output
        assert faultkit.engine_pid(made) == loading
    finally:
        faultkit.order(made, "k1", "")
    assert verdict(made).kind == "ready"
    output = well(made, "serve")
    assert output.count("nothing to do") >= len(UP) + 2
    assert faultkit.engine_pid(made) == loading


@pytest.mark.slow
def test_two_commands_at_once_take_turns(made: Rehearsal) -> None:
    first, second = begin(made, "serve"), begin(made, "serve")
    done = [end(first), end(second)]
    assert [command.code for command in done] == [0, 0]
    folder = load_deployment(made.folder / "deploy.toml").folder
    with state.hold(folder, "deploy up", on_wait=pytest.fail):
        other = deploy(made, "down", "--no-wait")
    assert other.code == 4
    assert "`deploy up` of" in other.output


def test_a_wedge_is_told_though_health_says_200(made: Rehearsal) -> None:
    well(made, "serve")
    faultkit.order(made, "k0", "engine=hang")
    try:
        assert faultkit.health(made) == 200
        found = verdict(made)
        assert found.kind == "wedged"
        assert "all nodes are alive" in found.text
    finally:
        faultkit.order(made, "k0", "")
    assert verdict(made, seconds=30).kind == "ready"


@pytest.mark.slow
def test_a_node_that_dies_after_loading_is_told_by_name_and_the_same_command_starts_again(made: Rehearsal) -> None:
    well(made, "serve")
    nodefaults.kill(made.room["k1"], faultkit.raylet(made, "k1"))
    deadline = time.monotonic() + 60
    while (found := verdict(made)).kind not in ("dead-node", "degraded") and time.monotonic() < deadline:
        time.sleep(1)
    assert found.kind in ("dead-node", "degraded"), found
    assert "k1" in found.text
    assert "READY" in well(made, "serve")
    assert verdict(made).kind == "ready"


def test_a_secret_was_in_no_argument_list_at_any_moment_and_is_in_no_file_but_its_own(made: Rehearsal) -> None:
    well(made, "serve")
    assert len(faultkit.secrets(made)) == 3
    assert SEEN == []
    with subprocess.Popen(["sh", "-c", "read _", faultkit.HF_TOKEN], stdin=subprocess.PIPE):
        faultkit.until(lambda: bool(SEEN))  # `watch` has run to its end
    assert faultkit.in_files(made) == []


@pytest.mark.slow
def test_no_secret_is_in_the_bundle_of_collect(made: Rehearsal, tmp_path: Path) -> None:
    """Not even where the engine has said them all in its log."""
    well(made, "serve")
    (log,) = made.room["k0"].tmp.glob("gracefarm-*/*/k0/jobs/engine/log")
    with log.open("ab") as stream:
        stream.writelines(b"Namespace(planted=%s)\n" % secret for secret in faultkit.secrets(made))
    well(made, "collect", "--into", str(tmp_path))
    (bundle,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(bundle) as archive:
        members = [(member.name, archive.extractfile(member)) for member in archive.getmembers() if member.isfile()]
        content = {name: stream.read() for name, stream in members if stream}
    (said,) = (text for name, text in content.items() if name.endswith("k0/jobs/engine/log"))
    assert said.count(b"planted=") == 3
    assert [name for name, text in content.items() for secret in faultkit.secrets(made) if secret in text] == []


def test_down_leaves_nothing_and_says_so(made: Rehearsal) -> None:
    well(made, "serve")
    well(made, "down", "--keep-ray")
    assert verdict(made).kind == "stopped"
    assert faultkit.raylet(made, "k1")
    assert "no process of this deployment is running" in well(made, "down")
    assert walkthrough.left(made) == {}
    assert "none was running before" in well(made, "down")

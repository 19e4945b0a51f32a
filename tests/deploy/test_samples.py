"""A deployment that the commit 7ac15b8 served is planned, shown and found unchanged (tests/samples/README.md)."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.fleet.ssh import open_fleet
from deploy.nodes import state
from deploy.nodes.deployment import load_deployment
from deploy.nodes.facts import load_facts
from deploy.planning import plans
from deploy.planning.plans import ServePlan
from deploy.rehearsal import hub
from deploy.steps import order
from deploy.steps.step import Looks, Work, perform
from gracefarm import settings
from gracefarm.console import Console
from tests.conftest import REPOSITORY

SAMPLES = REPOSITORY / "tests" / "samples" / "7ac15b8"
PLAN = "f06e8476571155a2f4e49b23752cc9e64dfb30d96891082afdc90eb66013b115"
REPO = "rehearsal/Llama-405B-in-small"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The deployment's folder; its nodes are gone, so commands do not wait long for them."""
    folder = shutil.copytree(SAMPLES / "deployment", tmp_path / "deployment")
    with (folder / "deploy.toml").open("a") as stream:  # [options] is its last table
        stream.write("connect_timeout = 1\n")
    return folder


def deploy(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy", "--file", str(folder / "deploy.toml"), *arguments],
        env={**os.environ, "GRACEFARM_HOME": str(folder / "home"), **variables},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_plan_is_the_same(folder: Path) -> None:
    with hub.serving(hub.llama(191), repo=REPO) as served:
        outcome = deploy(folder, "plan", "--json", HF_ENDPOINT=served.url)
    assert outcome.returncode == 0, outcome.stderr
    planned = json.loads(outcome.stdout.splitlines()[-1])
    before = json.loads((SAMPLES / "deployment-plan.json").read_text())
    assert planned["id"] == before["id"] == PLAN
    assert {name: planned["layout"][name] for name in before["layout"]} == before["layout"]
    # What is predicted has become better since, and nodes and plans have fields that were not known then.
    assert [{name: node[name] for name in old} for node, old in zip(planned["nodes"], before["nodes"], strict=True)] == before[
        "nodes"
    ]
    for name in (plans.RUNS & before.keys()) - {"layout", "nodes"} | {"memory"}:
        assert planned[name] == before[name], name


def test_the_facts_are_kept(folder: Path) -> None:
    outcome = deploy(folder, "facts", "--kept", "--json")
    assert outcome.returncode == 0, outcome.stderr
    shown = json.loads(outcome.stdout.splitlines()[-1])["nodes"]
    before = json.loads((folder / ".deploy/facts.json").read_text())["nodes"]
    assert [{name: node[name] for name in old} for node, old in zip(shown, before, strict=True)] == before


def test_every_step_is_remembered(folder: Path) -> None:
    kept = state.read(load_deployment(folder / "deploy.toml").folder)
    assert {name: record.outcome for name, record in kept.steps.items()} == {
        "preflight": "done",
        "cache": "skipped",
        "environment": "done",
        "download": "done",
        "weights": "done",
        "proof": "done",
        "ray": "done",
        "engine": "done",
        "load": "done",
    }
    assert kept.data("engine")["plan"] == PLAN
    assert kept.data("environment")["id"] == "942d503d742581441cc67ce5a02ca633"
    assert kept.model_dump(mode="json") == json.loads((folder / ".deploy/state.json").read_text())


def test_status_knows_what_was_served(folder: Path) -> None:
    outcome = deploy(folder, "status", "--json")
    status = json.loads(outcome.stdout.splitlines()[-1])
    assert (status["deployment"], status["model"], status["plan"], status["layout"]) == ("rehearsal", REPO, PLAN, "tp2 pp1")
    assert status["service"]["word"] == "UNREACHABLE"
    assert [(node["name"], node["address"], bool(node["error"])) for node in status["nodes"]] == [
        ("k0", "10.77.0.11", True),
        ("k1", "10.77.0.12", True),
    ]
    assert status["notes"] == []


def seen_then(kept: state.State) -> Looks:
    """What `up` saw on each node when all was done, as the state of then tells it."""
    kind, source = kept.data("preflight")["shares"]["k0"].split()
    return {
        name: {
            "boot": boot,
            "share": {"kind": kind, "source": source, "fsc": False},
            "environments": {"env": kept.data("environment")["id"], "download": kept.data("download")["id"]},
            "weights": {"manifest": kept.data("weights")["manifest"], "wrong": []},
        }
        for name, boot in kept.data("preflight")["boots"].items()
    }


def test_no_step_is_done_again(folder: Path) -> None:
    """By the digests that the state keeps: of another one, a step would go to the nodes, which are gone."""
    deployment = load_deployment(folder / "deploy.toml")

    async def go() -> list[str]:
        steps = [step for lane in (*order.FIRST, *order.TOGETHER, *order.LAST) for step in lane]
        async with open_fleet(deployment, config=()) as fleet:
            with state.hold(deployment.folder, "test", on_wait=pytest.fail) as keeper:
                work = Work(
                    deployment=deployment,
                    fleet=fleet,
                    facts=load_facts(deployment),
                    keeper=keeper,
                    console=Console(),
                    settings=settings.SharedSettings(),
                    plan=ServePlan.model_validate_json((folder / ".deploy" / "plan.json").read_bytes()),
                )
                looks, records = seen_then(keeper.state), keeper.state.steps
                for step in steps:
                    assert await perform(step, work, looks) is None, step.name
                assert {step.name: step.inputs(work, looks) for step in (order.RAY, order.ENGINE)} == {
                    name: records[name].digest for name in order.SERVE
                }
        return [step.name for step in steps]

    assert asyncio.run(go()) == ["preflight", "cache", "environment", "download", "weights", "proof"]
    assert (folder / ".deploy/state.json").read_text() == (SAMPLES / "deployment/.deploy/state.json").read_text()

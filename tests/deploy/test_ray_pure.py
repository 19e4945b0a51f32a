"""Who starts Ray together, and which line of Ray's own logs is the cause."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from deploy.remote import cluster
from deploy.steps import ray
from tests.deploy.test_engine_step import a_plan

DEATH = "[2026-11-25 01:02:03,456 C 812 812] (raylet) main.cc:701: Timed out waiting for file metrics_agent_port"


@pytest.mark.parametrize(
    ("cores", "wave", "sizes"),
    [
        (1, None, [1] * 10),
        (2, None, [1] * 10),
        (4, None, [1, 2, 2, 2, 2, 1]),
        (64, None, [1, 9]),
        (64, 4, [1, 4, 4, 1]),
        (2, 9, [1, 9]),
    ],
)
def test_the_head_starts_alone_and_then_half_as_many_workers_at_once_as_it_has_cores(
    cores: int, wave: int | None, sizes: list[int]
) -> None:
    plan = a_plan(2242)
    made = ray.waves(plan.nodes, ray.ClusterSpec(plan=plan, python="python", wave=wave), cores)
    assert [len(wave_nodes) for wave_nodes in made] == sizes
    assert made[0] == [plan.head]
    assert [node for each in made for node in each] == list(plan.nodes)
    assert ray.waves(plan.nodes[1:], ray.ClusterSpec(plan=plan, python="python", wave=9), cores) == [list(plan.nodes[1:])]


def logs(folder: Path, **texts: str) -> Path:
    place = folder / "session_1" / "logs"
    place.mkdir(parents=True)
    (folder / "session_latest").symlink_to("session_1")
    for name, text in texts.items():
        (place / name.replace("_out", ".out")).write_text(text)
    return place


def test_the_first_cause_is_the_raylets_and_a_line_of_a_start_before_is_none(tmp_path: Path) -> None:
    place = logs(
        tmp_path, raylet_out=f"I: fine\n{DEATH}\nTraceback, later\n", gcs_server_out="Address already in use " + "x" * 900
    )
    request = {"temp": str(tmp_path), "since": time.time() - 60}
    lines = cluster.cause(request)["lines"]
    assert lines[0] == f"raylet.out: {DEATH}"
    assert lines[1].startswith("gcs_server.out: Address already in use")
    assert len(lines[1]) < 350
    os.utime(place / "raylet.out", (0, 0))
    assert [line[:10] for line in cluster.cause(request)["lines"]] == ["gcs_server"]


def test_logs_without_a_cause_and_no_logs_at_all_are_no_cause(tmp_path: Path) -> None:
    assert cluster.cause({"temp": str(tmp_path), "since": 0})["lines"] == []
    logs(tmp_path, raylet_out="[2026-11-25 01:02:03,456 I 812 812] (raylet) main.cc: all is well\n")
    assert cluster.cause({"temp": str(tmp_path), "since": 0})["lines"] == []

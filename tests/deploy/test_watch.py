"""`deploy status` and `deploy top` over real SSH servers and a pretend engine, as a person calls them."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.engine import metrics
from deploy.engine.canary import Reply
from deploy.fleet.calls import RemoteNode
from deploy.fleet.jobs import JobStatus, stop_job
from deploy.fleet.shells import remote_nodes
from deploy.nodes import state
from deploy.nodes.state import State, StepRecord
from deploy.remote.wire import Json
from deploy.steps import engine, step
from deploy.watch import collect, status
from deploy.watch.verdict import Signs
from gracefarm.console import Console
from gracefarm.errors import EngineError
from tests.deploy.scene_kit import Scene, play
from tests.deploy.test_tunnel import deploy, until

SECRET = "hf_" + "a1B2" * 9


@contextmanager
def hanging(folder: Path) -> Iterator[None]:
    """A file system whose server never answers, as NFS when its server is gone: FUSE, and no process reads its requests."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0".encode()
        assert libc.mount(b"hangs", bytes(folder), b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            libc.umount2(bytes(folder), 3)  # MNT_FORCE | MNT_DETACH
    finally:
        os.close(descriptor)


@pytest.mark.root
@pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="no FUSE")
def test_a_share_whose_server_is_gone_holds_status_up_no_longer_than_it_must_and_is_a_finding(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        await made.serve()
        begun = time.monotonic()
        with hanging(tmp_path / "share"):
            code, said = await made.status()
            assert time.monotonic() - begun < 30
            assert (code, said["service"]["word"]) == (0, "READY")
            node = said["nodes"][0]
            assert (node["stuck"], node["error"]) == ([str(tmp_path / "share")], "")
            assert [disk["path"] for disk in node["disks"]] == [made.deployment.data.local]
            found = await status.look(status.watch_of(made.deployment, made.fleet))
            texts = [finding.text for finding in collect.findings({}, found, State(), made.plan, {})]
            assert f"k0: the file system at {tmp_path / 'share'} does not answer" in texts

    play(tmp_path, work)


def test_a_node_that_does_not_answer_is_part_of_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "SILENCE", 1.0)

    async def never(_node: RemoteNode, _function: str, _request: object) -> Json:
        await asyncio.sleep(600)
        raise AssertionError

    monkeypatch.setattr(step, "call", never)

    async def work(made: Scene) -> None:
        seen = await status.look(status.watch_of(made.deployment, made.fleet))
        assert "k0: no answer to a short call within 1 s" in seen.nodes[0].error

    play(tmp_path, work)


def test_status_by_a_real_completion_and_its_exit_code(tmp_path: Path) -> None:
    hang = tmp_path / "hang"

    async def work(made: Scene) -> None:
        code, said = await made.status()
        assert (code, said["service"]["word"]) == (65, "PLANNED")
        await made.serve()
        code, said = await made.status()
        assert (code, said["service"]["word"]) == (0, "READY")
        assert said["service"]["canary_s"] < 5
        node = said["nodes"][0]
        assert node["jobs"] == ["engine"]
        assert node["memory"]["total"] > node["memory"]["available"] > 0
        assert {disk["path"] for disk in node["disks"]} == {str(tmp_path / "share"), made.deployment.data.local}
        assert node["disks"][0]["total"] == shutil.disk_usage(tmp_path).total
        assert said["usd_per_hour"] == 2.29
        assert said["usd_since_boot"] == pytest.approx(2.29 * node["uptime"] / 3600, abs=0.02)
        hang.touch()  # /health goes on saying 200
        code, said = await made.status("--canary", "1.5")
        hang.unlink()
        assert (code, said["service"]["word"]) == (63, "WEDGED")
        await stop_job(made.fleet, made.deployment.head, "engine")
        code, said = await made.status()
        assert (code, said["service"]["word"]) == (65, "STOPPED")

    play(tmp_path, work, "--wedge", str(hang))


def test_status_of_a_load_and_of_one_that_failed(tmp_path: Path) -> None:
    stay, words = tmp_path / "stay", tmp_path / "words"
    stay.touch()
    words.write_text(f"torch.OutOfMemoryError: CUDA out of memory, {SECRET}\nRuntimeError: the last and least of it\n")

    async def work(made: Scene) -> None:
        made.keep("running")
        kept = state.read(made.deployment.folder)
        steps = {**kept.steps, "load": StepRecord(digest="x", outcome="done", begun=0.0, data={"loading": 600.0})}
        made.deployment.folder.state.write_text(State(steps=steps).model_dump_json())
        starting = asyncio.create_task(engine.start_or_attach(made.fleet, remote_nodes(made.fleet)[0], made.spec(), Console()))
        log = Path(await made.fleet.folder(made.deployment.head)) / "jobs" / "engine" / "log"
        await until(lambda: log.exists() and " 25%" in log.read_text())
        code, said = await made.status()
        assert (code, said["service"]["word"], said["service"]["detail"]) == (65, "LOADING", "loading")
        assert said["service"]["fraction"] == 0.25
        assert 500 < said["service"]["left_s"] <= 600
        stay.unlink()
        with pytest.raises(EngineError):
            await starting
        made.keep("failed", "the engine ended")
        code, said = await made.status()
        assert (code, said["service"]["word"], said["service"]["detail"]) == (63, "FAILED", "loading")
        assert "GPU memory ran out" in said["service"]["text"]
        async with deploy(made.folder, "status") as process:
            out, _ = await process.communicate()
        assert "FAILED(loading)" in out.decode()
        assert SECRET not in out.decode() + json.dumps(said)
        assert "remedy:" in out.decode()

    play(tmp_path, work, "--stay", str(stay), "--die", "1", "--say", str(words))


def test_a_node_that_is_away_is_told_and_the_head_decides(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        await made.made[1].switch_off()
        code, said = await made.status()
        assert code == 65
        assert [bool(node["error"]) for node in said["nodes"]] == [False, True]
        assert "cannot be reached" in said["nodes"][1]["error"]
        made.keep("done")
        await made.made[0].switch_off()
        code, said = await made.status()
        assert (code, said["service"]["word"]) == (60, "UNREACHABLE")

    play(tmp_path, work, nodes=2)


RUNS, GONE = JobStatus(state="running", pid=1), JobStatus(state="exited", returncode=1)


def steps(**outcomes: Any) -> State:
    """One begun after the other."""
    made = {}
    for number, (name, outcome) in enumerate(outcomes.items()):
        data = {"loading": 60.0, "capturing": 40.0} if name == "load" else {}
        made[name] = StepRecord(digest="x", outcome=outcome, text="why", begun=1000.0 + number, data=data)
    return State(steps=made)


@pytest.mark.parametrize(
    ("signs", "kept", "label", "word"),
    [
        (None, steps(), "PLANNED", "nothing was started"),
        (None, steps(weights="failed"), "FAILED(weights)", "why"),
        (None, steps(weights="running"), "LOADING(weights)", "has started"),
        (Signs(job=JobStatus(state="absent")), steps(ray="failed"), "FAILED(ray)", "why"),
        (Signs(job=JobStatus(state="stopped")), steps(engine="failed", ray="running"), "LOADING(ray)", "has started"),
        (Signs(job=JobStatus(state="stopped")), steps(load="done"), "STOPPED", "is not running"),
        (Signs(job=RUNS, answer=Reply(kind="ok", seconds=0.4)), steps(), "READY", "0.40 s"),
        (Signs(job=RUNS, answer=Reply(kind="ok"), nodes={"k1": False}), steps(), "DEGRADED", "Ray lost k1"),
        (
            Signs(job=RUNS, answer=Reply(kind="refused"), phase="loading", fraction=0.4),
            steps(engine="running", load="done"),
            "LOADING(loading 40%)",
            "about 70 s left",
        ),
        (Signs(job=GONE, phase="placing", cause="x"), steps(engine="running"), "FAILED(placing)", "x"),
        (Signs(job=GONE, phase="listening"), steps(engine="done"), "DEAD(engine)", "exited with code 1"),
        (Signs(job=GONE, nodes={"k1": False}, phase="listening"), steps(engine="done"), "DEAD(node)", "Ray lost k1"),
        (Signs(job=GONE, phase="listening"), steps(load="done"), "STOPPED", "is not running"),
        (Signs(job=None, error="k0 is away"), steps(), "UNREACHABLE", "k0 is away"),
    ],
)
def test_one_word_for_what_is_seen(signs: Signs | None, kept: State, label: str, word: str) -> None:
    found = status.judge(signs, kept, planned=True, now=1030.0)
    assert found.label == label
    assert word in found.text
    assert found.remedy or found.word in ("READY", "LOADING")


def test_a_node_without_its_raylet_is_lost_before_ray_knows_it() -> None:
    nodes = {"k0": True, "k1": True, "k2": False, "k3": True}
    vitals = {"k0": {"raylet": True}, "k1": {"raylet": False}, "k2": {"raylet": True}}  # k3 was not reached: Ray's word
    assert status.seen_alive(nodes, vitals) == {"k0": True, "k1": False, "k2": False, "k3": True}


def test_top_has_tokens_per_second_by_the_engines_own_counter(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        await made.serve()
        key = engine.api_key(made.deployment.folder)
        url = f"http://127.0.0.1:{made.deployment.data.ports.engine}"
        asked = 0

        async def load() -> None:
            nonlocal asked
            headers = {"Authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(headers=headers, trust_env=False) as client:
                while True:
                    await client.post(f"{url}/v1/completions", json={"model": "org/model", "prompt": "x"})
                    asked += 1
                    await asyncio.sleep(0.05)

        loading = asyncio.create_task(load())
        async with deploy(tmp_path, "top", "--json", "--every", "1", "--count", "3") as process:
            out, err = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 0, err.decode()
        loading.cancel()
        moments = [json.loads(line) for line in out.decode().splitlines()]
        assert len(moments) == 3
        assert moments[0]["tokens_per_s"] is None
        assert all(moment["service"]["word"] == "READY" for moment in moments)
        for moment in moments[1:]:
            assert 3 < moment["tokens_per_s"] < 25
            assert moment["usd_per_mtok"] == pytest.approx(2.29 / (moment["tokens_per_s"] * 3600) * 1e6, rel=0.01)
        async with deploy(tmp_path, "top", "--every", "0.5") as process:
            assert process.stdout
            async with asyncio.timeout(30):
                while b"tokens/s" not in await process.stdout.readline():
                    pass
                process.send_signal(signal.SIGINT)
                await process.communicate()
            assert process.returncode == 0

    play(tmp_path, work)


def test_metrics_of_both_engines_and_of_neither() -> None:
    aphrodite = (
        "# TYPE aphrodite:generation_tokens_total counter\n"
        'aphrodite:generation_tokens_total{model_name="a"} 70.0\naphrodite:generation_tokens_total{model_name="b"} 30.0\n'
        "# TYPE aphrodite:time_to_first_token_seconds histogram\n"
        'aphrodite:time_to_first_token_seconds_bucket{le="+Inf",model_name="a"} 4.0\n'
        'aphrodite:time_to_first_token_seconds_count{model_name="a"} 4.0\n'
        'aphrodite:time_to_first_token_seconds_sum{model_name="a"} 6.0\n'
        'aphrodite:gpu_cache_usage_perc{model_name="a"} 0.25\nother 3\n'
    )
    one = metrics.parse(aphrodite)
    assert one
    assert (one.generation_tokens_total, one.cache, one.first_sum, one.num_requests_running) == (100.0, 0.25, 6.0, None)
    two = metrics.parse("vllm:generation_tokens_total 160\nvllm:kv_cache_usage_perc 0.5\n")
    assert two
    assert (two.generation_tokens_total, two.cache) == (160.0, 0.5)
    assert metrics.rate(one, two, 3.0) == 20.0
    assert metrics.rate(two, one, 3.0) is None  # a counter that falls: the engine was started in between
    assert metrics.parse("process_cpu_seconds_total 3\n") is None
    assert metrics.parse("<html>it works</html>") is None


def test_gpus_as_nvidia_smi_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretend nvidia-smi: there is no GPU here."""
    from deploy.remote import watch

    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert watch.gpus() == {"gpus": [], "gpu_error": "no nvidia-smi"}
    program.write_text(
        f"#!{sys.executable}\nimport sys\nassert sys.argv[1].startswith('--query-gpu=name,memory.used')\n"
        "print('NVIDIA GH200 480GB, 1234, 97871, 7, 41, 120.50\\nNVIDIA GB10, [N/A], [N/A], 0, 40, [N/A]')\n"
    )
    program.chmod(0o755)
    one, two = watch.gpus()["gpus"]
    assert (one["name"], one["used_mib"], one["total_mib"], one["celsius"]) == ("NVIDIA GH200 480GB", 1234, 97871, 41)
    assert two["total_mib"] is None
    program.write_text(f"#!{sys.executable}\nprint('No devices were found')\nraise SystemExit(6)\n")
    assert watch.gpus() == {"gpus": [], "gpu_error": "No devices were found"}

"""The engine's step over real SSH with a pretend engine: started, attached to, refused, dead, wedged; the key seen nowhere."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from deploy.engine import log
from deploy.engine.canary import Reply
from deploy.engine.metrics import EngineMetrics
from deploy.fleet.calls import RemoteNode
from deploy.fleet.forwarding import ForwardingError
from deploy.fleet.jobs import JobStatus, job_status, stop_job
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import Fleet
from deploy.nodes.config import Config
from deploy.nodes.deployment import Deployment, Folder
from deploy.planning import hardware, plans, suppose
from deploy.planning.plans import ServePlan
from deploy.steps import engine
from deploy.watch.verdict import Signs, diagnose, probe
from gracefarm.console import Console
from gracefarm.errors import EngineError
from tests.deploy import kit
from tests.deploy.test_plan import llama

KEY = "gf-planted-key-0123456789"
Work = Callable[[Fleet, RemoteNode, list[kit.Machine]], Awaitable[None]]


def free_port() -> int:
    """A port that the kernel gives to no outgoing connection: one was in use when the engine began to listen."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as one:
            return int(one.getsockname()[1])


def a_plan(port: int, *more: str) -> ServePlan:
    base = Deployment(path=Path("/nowhere/deploy.toml"), data=Config(), nodes=())
    found = plans.make(*suppose.suppose(hardware.named("gh200-96"), 10, base), llama())
    program = Path(__file__).with_name("pretend_engine.py")
    serve = (sys.executable, str(program), "--port", str(port), *more)
    return plans.identified(found.model_copy(update={"serve": serve, "serve_env": {"MINE": "yes"}, "id": ""}))


async def all_alive() -> Mapping[str, bool]:
    return {"k0": True, "k1": True}


def spec(plan: ServePlan, **more: object) -> engine.EngineSpec:
    values = {"plan": plan, "secrets": {"APHRODITE_API_KEY": KEY}, "nodes": all_alive, "poll": 0.2, "load": 30.0}
    return engine.EngineSpec(**{**values, **more})  # type: ignore[arg-type]


def on_a_node(folder: Path, work: Work) -> None:
    async def go() -> None:
        async with kit.machines(folder, 1) as made, kit.fleet(folder, made) as fleet:
            try:
                await work(fleet, remote_nodes(fleet)[0], made)
            finally:
                await stop_job(fleet, made[0].node, "engine", grace=1)

    asyncio.run(go())


def test_ready_is_a_real_completion_and_nothing_is_started_twice(tmp_path: Path) -> None:
    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = a_plan(free_port())
        first = await engine.start_or_attach(fleet, head, spec(plan), Console())
        assert first.how == "started"
        assert first.model == "org/model"
        assert list(first.phases) == ["starting", "placing", "loading", "profiling", "capturing", "listening"]
        status = await job_status(fleet, made[0].node, "engine")
        environ = Path(f"/proc/{status.pid}/environ").read_bytes()  # noqa: ASYNC240
        assert b"MINE=yes" in environ
        assert f"GRACEFARM_PLAN={plan.id}".encode() in environ
        assert not any(KEY.encode() in words for words in cmdlines())
        assert KEY not in (Path(await fleet.folder(made[0].node)) / "jobs" / "engine" / "log").read_text()
        again = await engine.start_or_attach(fleet, head, spec(plan), Console())
        assert again.how == "running"
        assert (await job_status(fleet, made[0].node, "engine")).pid == status.pid
        signs = await probe(fleet, head, spec(plan))
        assert diagnose(signs).kind == "ready"
        other = spec(plan, secrets={"APHRODITE_API_KEY": "another"})
        with pytest.raises(EngineError, match="refuses this deployment's key"):
            await engine.start_or_attach(fleet, head, other, Console())

    on_a_node(tmp_path, work)


def native_plan(port: int, *part: str) -> ServePlan:
    """The pretend engine on the head, and on k1 a program that plays its part of it."""
    plan = a_plan(port)
    second = next(node for node in plan.nodes if node.name == "k1")
    follower = second.model_copy(update={"ray": (), "engine": part})
    nodes = (plan.nodes[0].model_copy(update={"ray": ()}), follower)
    return plans.identified(plan.model_copy(update={"launcher": "native", "nodes": nodes, "id": ""}))


def on_two_nodes(folder: Path, work: Work) -> None:
    async def go() -> None:
        async with kit.machines(folder, 2) as made, kit.fleet(folder, made) as fleet:
            try:
                await work(fleet, remote_nodes(fleet)[0], made)
            finally:
                await asyncio.gather(*(stop_job(fleet, machine.node, "engine", grace=1) for machine in made))

    asyncio.run(go())


DRIVER = """
#include <stddef.h>
#include <stdio.h>
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA GH200", size); return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &cuInit; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuGetErrorString(int code, const char **text) { *text = "?"; return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    unsigned long mib = 0;
    FILE *file = fopen("FREE", "r");
    if (!file || fscanf(file, "%lu", &mib) != 1) return 1;
    fclose(file);
    *free = mib << 20;
    *total = 96000UL << 20;
    return 0;
}
"""
"A driver whose GPU has as much free memory as a file states, in MiB."


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_engine_does_not_start_while_another_process_uses_gpu_memory(tmp_path: Path) -> None:
    free = tmp_path / "free"
    library = tmp_path / "libcuda.so.1"
    argv = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(argv, input=DRIVER.replace("FREE", str(free)), text=True, check=True)

    async def go() -> None:
        environment = {"k1": {"LD_LIBRARY_PATH": str(tmp_path)}}
        async with kit.machines(tmp_path, 2, environment=environment) as made, kit.fleet(tmp_path, made) as fleet:
            targets = remote_nodes(fleet)
            asked = spec(a_plan(free_port()), targets=targets, release=1.0)
            free.write_text("80000")
            with pytest.raises(EngineError, match=r"k1: GPU 0 has 78.1 of 93.8 GiB free, but the engine requires 84.4 GiB"):
                await engine.start_or_attach(fleet, targets[0], asked, Console())
            assert (await job_status(fleet, made[0].node, "engine")).state == "absent"
            asyncio.get_running_loop().call_later(1, free.write_text, "95000")  # a stopped engine releases it late
            waits = replace(asked, release=30.0)
            assert (await engine.start_or_attach(fleet, targets[0], waits, Console())).how == "started"
            free.write_text("3000")
            assert (await engine.start_or_attach(fleet, targets[0], waits, Console())).how == "running"
            await stop_job(fleet, made[0].node, "engine", grace=1)

    asyncio.run(go())


def test_without_ray_each_node_has_its_part_and_a_lost_one_starts_all_again(tmp_path: Path) -> None:
    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = native_plan(free_port(), "sleep", "600")
        asked = spec(plan, nodes=partial(engine.parts_alive, fleet, plan))
        assert (await engine.start_or_attach(fleet, head, asked, Console())).how == "started"
        part = await job_status(fleet, made[1].node, "engine")
        environ = Path(f"/proc/{part.pid}/environ").read_bytes()  # noqa: ASYNC240
        assert f"VLLM_HOST_IP={plan.nodes[1].private}".encode() in environ or b"HOST_IP=" in environ
        assert KEY.encode() not in environ, "a node that does not listen needs no key"
        assert (await engine.start_or_attach(fleet, head, asked, Console())).how == "running"
        assert diagnose(await probe(fleet, head, asked)).kind == "ready"
        await stop_job(fleet, made[1].node, "engine", grace=1)
        verdict = diagnose(await probe(fleet, head, asked))
        assert (verdict.kind, "the engine on k1 has ended" in verdict.text) == ("degraded", True), verdict
        assert (await engine.start_or_attach(fleet, head, asked, Console())).how == "started"
        assert (await job_status(fleet, made[1].node, "engine")).state == "running"

    on_two_nodes(tmp_path, work)


def test_without_ray_a_part_that_ends_while_it_loads_is_told_with_its_own_cause(tmp_path: Path) -> None:
    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        dies = ("sh", "-c", "sleep 1; echo 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB'; exit 1")
        plan = native_plan(free_port(), *dies)
        plan = plans.identified(plan.model_copy(update={"serve": (*plan.serve, "--load", "20"), "id": ""}))
        asked = spec(plan, nodes=partial(engine.parts_alive, fleet, plan), check=0.5)
        with pytest.raises(EngineError, match=r"the engine on k1 has ended while .*k1: .*memory"):
            await engine.start_or_attach(fleet, head, asked, Console())
        assert (await job_status(fleet, made[0].node, "engine")).state == "stopped"

    on_two_nodes(tmp_path, work)


def cmdlines() -> list[bytes]:
    """Of all processes of this machine; a process that ends meanwhile is skipped."""
    words = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words.append(path.read_bytes())
    return words


def test_another_plan_stops_the_engine_that_runs(tmp_path: Path) -> None:
    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        port = free_port()
        await engine.start_or_attach(fleet, head, spec(a_plan(port)), Console())
        before = (await job_status(fleet, made[0].node, "engine")).pid
        assert (await engine.start_or_attach(fleet, head, spec(a_plan(port, "--load", "0.3")), Console())).how == "started"
        assert (await job_status(fleet, made[0].node, "engine")).pid != before

    on_a_node(tmp_path, work)


def test_the_same_plan_in_another_environment_stops_the_engine_that_runs(tmp_path: Path) -> None:
    """Its arguments are the same: they name the environment by a link that `env rollback` moves."""

    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = a_plan(free_port())
        pids = []
        for environment, how in (("a" * 32, "started"), ("a" * 32, "running"), ("b" * 32, "started")):
            assert (await engine.start_or_attach(fleet, head, spec(plan, environment=environment), Console())).how == how
            pids.append((await job_status(fleet, made[0].node, "engine")).pid)
        assert pids[0] == pids[1] != pids[2]

    on_a_node(tmp_path, work)


def test_a_load_that_was_left_is_attached_to(tmp_path: Path) -> None:
    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = a_plan(free_port(), "--load", "8")
        first = asyncio.ensure_future(engine.start_or_attach(fleet, head, spec(plan), Console()))
        while (pid := (await job_status(fleet, made[0].node, "engine")).pid) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        made[0].cut()
        outcome = await engine.start_or_attach(fleet, head, spec(plan), Console())
        assert outcome.how == "attached"
        assert (await job_status(fleet, made[0].node, "engine")).pid == pid

    on_a_node(tmp_path, work)


def test_a_death_while_loading_is_told_by_its_first_cause(tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("torch.OutOfMemoryError: CUDA out of memory.\nTraceback:\nRuntimeError: the last and least of it\n")

    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = a_plan(free_port(), "--die", "1", "--say", str(words))
        with pytest.raises(EngineError, match="exited with code 1 in phase `loading`: GPU memory ran out") as error:
            await engine.start_or_attach(fleet, head, spec(plan), Console())
        assert "deploy plan" in error.value.remedy
        verdict = diagnose(await probe(fleet, head, spec(plan)))
        assert verdict.kind == "dead-engine"
        assert "GPU memory ran out" in verdict.text

    on_a_node(tmp_path, work)


def test_a_worker_that_died_is_told_with_the_node_that_ray_lost(tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n")

    async def lost() -> Mapping[str, bool]:
        return {"k0": True, "k1": False}

    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = a_plan(free_port(), "--die", "1", "--say", str(words))
        with pytest.raises(EngineError, match="in phase `loading`: Ray lost k1; a worker died"):
            await engine.start_or_attach(fleet, head, spec(plan, nodes=lost), Console())

    on_a_node(tmp_path, work)


def test_a_node_that_ray_loses_while_loading_ends_it(tmp_path: Path) -> None:
    async def lost() -> Mapping[str, bool]:
        return {"k0": True, "k1": False}

    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = a_plan(free_port(), "--load", "60")
        with pytest.raises(EngineError, match="Ray lost k1 while the engine was in phase `loading`"):
            await engine.start_or_attach(fleet, head, spec(plan, nodes=lost, check=0.5), Console())
        assert (await job_status(fleet, made[0].node, "engine")).state == "stopped"

    on_a_node(tmp_path, work)


def test_too_long_a_load_is_stopped(tmp_path: Path) -> None:
    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        with pytest.raises(
            EngineError, match="answered no request within 2 s and was stopped; it had been in phase `loading`"
        ):
            await engine.start_or_attach(fleet, head, spec(a_plan(free_port(), "--load", "60"), load=2.0), Console())
        assert (await job_status(fleet, made[0].node, "engine")).state == "stopped"

    on_a_node(tmp_path, work)


def test_an_engine_that_listens_but_does_not_answer_in_time_is_not_stopped(tmp_path: Path) -> None:
    wedge = tmp_path / "wedge"
    wedge.touch()

    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = a_plan(free_port(), "--wedge", str(wedge))
        with pytest.raises(EngineError, match="answered no request within 3 s, but its log says that it listens") as error:
            await engine.start_or_attach(fleet, head, spec(plan, load=3.0, canary=0.5), Console())
        assert "`deploy status`" in error.value.remedy
        assert (await job_status(fleet, made[0].node, "engine")).state == "running"
        wedge.unlink()
        assert (await engine.start_or_attach(fleet, head, spec(plan), Console())).how == "running"

    on_a_node(tmp_path, work)


def test_nothing_is_started_where_sshd_forwards_no_port(tmp_path: Path) -> None:
    """The engine would be ready, never asked, and stopped for it after hours."""

    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = a_plan(free_port())
        made[0].forwards = False
        with pytest.raises(ForwardingError, match=r"k0: sshd forbids forwarding port \d+ \(AllowTcpForwarding") as error:
            await engine.start_or_attach(fleet, head, spec(plan), Console())
        assert "AllowTcpForwarding local" in error.value.remedy
        assert (await job_status(fleet, made[0].node, "engine")).state == "absent"
        made[0].forwards = True
        await engine.start_or_attach(fleet, head, spec(plan), Console())
        made[0].forwards = False
        verdict = diagnose(await probe(fleet, head, spec(plan)))
        assert verdict.kind == "unreachable"
        assert "the engine is running (listening) but cannot be reached: k0: sshd forbids" in verdict.text

    on_a_node(tmp_path, work)


def test_a_phase_that_hangs_is_told_once_and_the_engine_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "SHORTEST", 0.1)

    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        plan = a_plan(free_port(), "--load", "6")
        last = {"starting": 60.0, "placing": 60.0, "loading": 0.1}
        outcome = await engine.start_or_attach(fleet, head, spec(plan, last=last), Console())
        assert outcome.how == "started"

    on_a_node(tmp_path, work)
    said = capsys.readouterr().err
    assert said.count("the engine has been in phase `loading` for ") == 1
    assert "It may hang: `deploy preflight`" in said
    assert "about 0 s left" not in said.split("`loading` for")[1]


def test_a_port_that_somebody_holds_is_refused_by_name(tmp_path: Path) -> None:
    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            plan = a_plan(int(other.getsockname()[1]))
            with pytest.raises(EngineError, match=r"port \d+ is used by .*process \d+.*does not belong to this deployment"):
                await engine.start_or_attach(fleet, head, spec(plan), Console())
        assert (await job_status(fleet, made[0].node, "engine")).state == "absent"

    on_a_node(tmp_path, work)


@pytest.mark.parametrize("busy", [False, True])
def test_a_wedge_is_told_from_others_work(tmp_path: Path, busy: bool) -> None:
    """Both times /health says 200 and the canary gets no token; with others' tokens being made it only waits its turn."""

    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        hang = tmp_path / "hang"
        plan = a_plan(free_port(), "--wedge", str(hang), *(["--busy"] if busy else []))
        await engine.start_or_attach(fleet, head, spec(plan), Console())
        hang.touch()
        try:
            begun = time.monotonic()
            verdict = diagnose(await probe(fleet, head, spec(plan), seconds=1.5))
            assert time.monotonic() - begun < 6
        finally:
            hang.unlink()
        assert verdict.kind == ("busy" if busy else "wedged")

    on_a_node(tmp_path, work)


@pytest.mark.parametrize("busy", [False, True])
def test_a_wedged_engine_is_started_anew_and_one_that_works_for_others_is_not(tmp_path: Path, busy: bool) -> None:
    async def work(fleet: Fleet, head: RemoteNode, made: list[kit.Machine]) -> None:
        hang = tmp_path / "hang"
        plan = a_plan(free_port(), "--wedge", str(hang), *(["--busy"] if busy else []))
        await engine.start_or_attach(fleet, head, spec(plan), Console())
        pid = (await job_status(fleet, made[0].node, "engine")).pid
        hang.touch()
        asyncio.get_running_loop().call_later(4, hang.unlink)
        outcome = await engine.start_or_attach(fleet, head, spec(plan, canary=1.0), Console())
        assert outcome.how == ("running" if busy else "started")
        assert ((await job_status(fleet, made[0].node, "engine")).pid == pid) is busy

    on_a_node(tmp_path, work)


def test_the_key_is_made_once_and_nobody_else_reads_it(tmp_path: Path) -> None:
    folder = Folder(path=tmp_path)
    folder.make()
    key = engine.api_key(folder)
    assert len(key) > 40
    assert engine.api_key(folder) == key
    assert stat.filemode(folder.api_key.stat().st_mode) == "-rw-------"
    assert key not in repr(spec(a_plan(1)))


RUNNING = JobStatus(state="running", pid=1)
OK = Reply(kind="ok", seconds=0.5)
MUTE = Reply(kind="timeout", text="no token within 30 s")


def tokens(count: float) -> dict[str, float]:
    return {"generation_tokens_total": count}


ALIVE, LOST = {"k0": True, "k1": True}, {"k0": True, "k1": False}


@pytest.mark.parametrize(
    ("signs", "kind", "word"),
    [
        (Signs(job=None, error="k0 cannot be reached"), "unreachable", "k0 cannot be reached"),
        (Signs(job=JobStatus(state="absent")), "stopped", "is not running"),
        (Signs(job=JobStatus(state="stopped")), "stopped", "is not running"),
        (
            Signs(job=JobStatus(state="exited", returncode=1), cause="why", nodes=ALIVE),
            "dead-engine",
            "exited with code 1: why",
        ),
        (Signs(job=JobStatus(state="lost"), nodes=ALIVE), "dead-engine", "was killed"),
        (Signs(job=JobStatus(state="exited", returncode=1), nodes=LOST), "dead-node", "after Ray lost k1"),
        (Signs(job=RUNNING, answer=OK, nodes=ALIVE), "ready", "0.50 s"),
        (Signs(job=RUNNING, answer=OK, nodes=LOST), "degraded", "Ray lost k1"),
        (Signs(job=RUNNING, answer=Reply(kind="refused"), nodes=ALIVE, phase="loading"), "loading", "loading"),
        (Signs(job=RUNNING, answer=MUTE, nodes=LOST), "dead-node", "Ray lost k1"),
        (
            Signs(
                job=RUNNING,
                answer=MUTE,
                nodes=ALIVE,
                before=EngineMetrics(generation_tokens_total=1),
                after=EngineMetrics(generation_tokens_total=9),
            ),
            "busy",
            "generates tokens for other requests",
        ),
        (
            Signs(
                job=RUNNING,
                answer=MUTE,
                nodes=ALIVE,
                before=EngineMetrics(generation_tokens_total=9),
                after=EngineMetrics(generation_tokens_total=9),
            ),
            "wedged",
            "all nodes are alive",
        ),
        (Signs(job=RUNNING, answer=MUTE, nodes=None), "wedged", "Ray does not answer"),
        (
            Signs(job=RUNNING, answer=Reply(kind="error", text="HTTP 500: x"), nodes=ALIVE),
            "dead-engine",
            "HTTP 500: x; all nodes",
        ),
        (Signs(job=RUNNING, answer=Reply(kind="error", text="not the answer"), nodes=ALIVE), "wedged", "not the answer"),
    ],
)
def test_dead_engine_dead_node_and_wedge_are_told_apart(signs: Signs, kind: str, word: str) -> None:
    found = diagnose(signs)
    assert found.kind == kind
    assert word in found.text
    assert found.remedy or kind in ("ready", "loading", "busy")

"""`deploy bench` with a stand-in for `vllm bench serve` on a node of the kit, and an engine that wants its key."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.fleet.jobs import start_job, stop_job
from deploy.fleet.ssh import Fleet
from deploy.measure import vllm_bench
from deploy.nodes import paths
from deploy.nodes.deployment import Deployment
from deploy.planning import plans
from deploy.planning.plans import ServePlan
from deploy.remote import marked
from tests.deploy import kit, openai_server
from tests.deploy.test_engine_step import a_plan, cmdlines
from tests.deploy.test_tunnel import deploy

KEY = "gf-planted-key-of-the-bench-0123456789"
SWEEP = ("bench", "--concurrency", "1,4", "--requests", "8", "--prompt-tokens", "30", "--max-tokens", "20")


@dataclass(kw_only=True)
class Stage:
    """A node with the stand-in, the deployment on this machine, and the engine."""

    folder: Path
    fleet: Fleet
    machine: kit.Machine
    deployment: Deployment
    engine: openai_server.Behaviour
    program: Path

    def order(self, mode: str) -> None:
        """A fault of the stand-in."""
        (self.program.parent / "mode").write_text(mode)

    @property
    def seen(self) -> list[dict[str, Any]]:
        """Arguments and environment of each start of the stand-in."""
        path = self.program.parent / "seen"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    async def bench(self, *more: str, code: int = 0) -> tuple[str, str]:
        """The command's stdout and stderr. The key is in none of them, and the job leaves no files."""
        async with deploy(self.folder, *SWEEP, *more) as process:
            raw = await asyncio.wait_for(process.communicate(), 120)
        out, err = (text.decode() for text in raw)
        assert process.returncode == code, out + err
        assert KEY not in out + err
        assert not await self.left()
        return out, err

    @property
    def report(self) -> dict[str, Any]:
        """The stored one."""
        (path,) = (self.deployment.folder.path / "bench").iterdir()
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    async def left(self) -> list[str]:
        """Files of the job on the node."""
        place = Path(await self.fleet.folder(self.machine.node)) / "jobs" / paths.BENCH_JOB
        return sorted(str(path) for path in place.rglob("*")) + ([str(place)] if place.exists() else [])

    def running(self) -> list[Any]:
        """Processes of the job."""
        return marked.processes(f"{self.fleet.mark}/k0/{paths.BENCH_JOB}")

    async def until_it_runs(self) -> None:
        """The stand-in was started."""
        async with asyncio.timeout(30):
            while not self.seen:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.05)


def install(deployment: Deployment, plan: ServePlan) -> Path:
    """The stand-in in the engine's environment, and the model's folder."""
    weights = Path(paths.weights(paths.root(deployment), plan.model, plan.revision))
    weights.mkdir(parents=True)
    (weights / "tokenizer.json").write_text("{}")
    program = Path(paths.program(deployment, "vllm"))
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("standin_vllm.py").read_text())
    program.chmod(0o755)
    return program


@asynccontextmanager
async def stage(
    folder: Path, *, engine: str = "vllm", environ: dict[str, str] | None = None, **server: Any
) -> AsyncIterator[Stage]:
    share = folder / "share"
    async with kit.machines(folder, 1, environment={"k0": environ or {}}) as made:
        with openai_server.server(key=KEY, **server) as (url, behaviour):
            more = f'engine = "{engine}"\nshare = "{share}"'
            deployment = kit.deployment(folder, made, ports={"engine": int(url.rpartition(":")[2])}, more=more)
            deployment.folder.api_key.write_text(KEY + "\n")
            plan = a_plan(1, "--tokenizer-mode", "hf", "--trust-remote-code")
            prediction = plan.prediction.model_copy(update={"usd_per_hour": 22.9}) if plan.prediction else None
            changed: dict[str, Any] = {"engine": engine, "model": "org/tiny", "prediction": prediction, "id": ""}
            changed["serve_env"] = {"HF_HUB_OFFLINE": "1"}
            plan = plans.identified(plan.model_copy(update=changed))
            (deployment.folder.path / "plan.json").write_text(plan.model_dump_json())
            program = install(deployment, plan)
            async with kit.fleet(folder, made, mark=deployment.folder.id) as fleet:
                try:
                    yield Stage(
                        folder=folder,
                        fleet=fleet,
                        machine=made[0],
                        deployment=deployment,
                        engine=behaviour,
                        program=program,
                    )
                finally:
                    await stop_job(fleet, made[0].node, paths.BENCH_JOB, grace=0)


def on_stage(folder: Path, work: Callable[[Stage], Awaitable[None]], **more: Any) -> None:
    async def go() -> None:
        async with stage(folder, **more) as made:
            await work(made)

    asyncio.run(go())


def test_the_engines_own_client_measures_on_the_head(tmp_path: Path) -> None:
    async def work(made: Stage) -> None:
        out, err = await made.bench()
        assert "measured by `vllm bench serve` on the head" in out
        assert "4 concurrent: " in err
        report = made.report
        assert report["client"] == "vllm"
        one, four = report["levels"]
        assert [each["answered"] for each in (one, four)] == [8, 8]
        assert [each["tokens"] for each in (one, four)] == [160, 160]
        assert one["prompt_tokens"] == 8 * 30
        assert one["tokens_per_s"] == pytest.approx(160 / one["seconds"], rel=0.01)
        assert four["tokens_per_s"] > one["tokens_per_s"]
        assert one["stream_tokens_per_s"] == pytest.approx(1000 / one["token_ms"]["p50"], rel=0.01)
        for times in ("first_ms", "token_ms", "chunk_ms"):
            assert 0 < one[times]["p50"] <= one[times]["p90"] <= one[times]["p99"], times
        assert one["first_ms"]["p50"] > 60
        assert one["chunk_ms"]["p50"] > one["token_ms"]["p50"]
        assert one["usd_per_mtok"] == pytest.approx(22.9 / (one["tokens_per_s"] * 3600) * 1e6, rel=0.01)
        assert 0 < one["predicted_tokens_per_s"] < four["predicted_tokens_per_s"]
        assert made.engine.most_at_once == 4
        prompts = [request["prompt"] for request in made.engine.requests[1:]]
        assert len(set(prompts)) == len(prompts) == 16, "the second level would find its prompts in the prefix cache"
        assert {request["temperature"] for request in made.engine.requests} == {0}
        for start in made.seen:
            assert KEY not in " ".join(start["argv"])
            assert start["environ"] == {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": KEY}
            assert {"--trust-remote-code", "--tokenizer-mode"} <= set(start["argv"])

    # A proxy of the login, where no one listens.
    on_stage(tmp_path, work, environ={"http_proxy": "http://127.0.0.1:9"}, delay=0.004, before=0.06)


def test_the_chat_api_and_json(tmp_path: Path) -> None:
    async def work(made: Stage) -> None:
        out, _err = await made.bench("--api", "chat", "--json", "--client", "vllm")
        report = json.loads(out.splitlines()[-1])
        assert (report["client"], report["levels"][1]["answered"]) == ("vllm", 8)
        assert {request["path"] for request in made.engine.requests} == {"/v1/chat/completions"}

    on_stage(tmp_path, work)


def test_failed_requests_are_counted(tmp_path: Path) -> None:
    async def work(made: Stage) -> None:
        out, err = await made.bench()
        one, four = made.report["levels"]
        assert (one["answered"], one["errors"], one["tokens"]) == (6, {"failed": 2}, 120)
        assert (four["answered"], four["errors"]) == (8, {})
        assert "6/8 2 failed" in out
        assert "2 failed (`vllm bench serve` does not report why" in err

    on_stage(tmp_path, work, faults={2: "error", 3: "500"})


def test_all_requests_fail(tmp_path: Path) -> None:
    async def work(made: Stage) -> None:
        out, _err = await made.bench()
        assert made.report["levels"][0]["first_ms"] is None, "the original writes 0 ms"
        assert out.count("0/8 8 failed") == 2

    on_stage(tmp_path, work, faults=dict.fromkeys(range(1, 17), "500"))


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("traceback", "failed with exit code 1: ValueError: the tokenizer class of this model does not exist"),
        ("no-file", "`vllm bench serve` wrote no result"),
        ("half-file", "`vllm bench serve` wrote an unreadable result"),
    ],
)
def test_a_failure_is_told_with_its_cause_and_a_remedy(tmp_path: Path, mode: str, words: str) -> None:
    async def work(made: Stage) -> None:
        made.order(mode)
        _out, err = await made.bench(code=61)
        assert words in err
        log = made.deployment.folder.logs / "vllm-bench.log"
        assert f"read the output in {log}, or measure with --client own" in " ".join(err.split())
        assert "Namespace(" in log.read_text()
        assert len(made.seen) == 1, "a failure must not be repeated for the next level"
        assert not (made.deployment.folder.path / "bench").exists()

    on_stage(tmp_path, work)


@pytest.mark.parametrize("fault", ["old", "no program"])
def test_an_environment_without_it_is_measured_by_our_client(tmp_path: Path, fault: str) -> None:
    async def work(made: Stage) -> None:
        if fault == "old":
            made.order("old")
        else:
            made.program.unlink()
        out, err = await made.bench()
        assert made.report["client"] == "own"
        assert "measured by the client of `deploy` on this machine" in out
        assert "k0: the environment has no `vllm bench serve` that accepts the options: " in err
        assert "'bench'" in err if fault == "old" else "not found" in err
        _out, err = await made.bench("--client", "vllm", code=61)
        assert "--client own" in err

    on_stage(tmp_path, work)


def test_our_client_measures_if_it_is_asked_for_and_other_engines(tmp_path: Path) -> None:
    async def work(made: Stage) -> None:
        out, _err = await made.bench(*(() if made.deployment.data.engine == "aphrodite" else ("--client", "own")))
        assert made.report["client"] == "own"
        assert "measured by the client of `deploy` on this machine" in out
        assert not made.seen

    async def refused(made: Stage) -> None:
        await work(made)
        for more, words in (
            ((), "the engine is aphrodite"),
            (("--url", "http://127.0.0.1:1"), "so it cannot be used with --url"),
        ):
            _out, err = await made.bench("--client", "vllm", *more, code=2)
            assert words in err
        (made.deployment.folder.path / "plan.json").unlink()
        assert "has not started an engine" in (await made.bench("--client", "vllm", code=2))[1]

    for engine, part in (("vllm", work), ("aphrodite", refused)):
        (tmp_path / engine).mkdir()
        on_stage(tmp_path / engine, part, engine=engine)


def test_ctrl_c_ends_it_on_the_head_and_its_key_is_in_no_arguments(tmp_path: Path) -> None:
    async def work(made: Stage) -> None:
        made.order("hang")
        async with deploy(made.folder, *SWEEP) as process:
            await made.until_it_runs()
            assert made.running()
            assert not any(KEY.encode() in words for words in cmdlines())
            async with deploy(made.folder, *SWEEP) as second:
                _out, err = await asyncio.wait_for(second.communicate(), 120)
            assert second.returncode == 61, err
            assert b"another `vllm bench serve` of this deployment is running" in err
            assert made.running(), "the second command must not end the measurement of the first"
            process.send_signal(signal.SIGINT)
            raw = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 130, raw
        assert made.running() == []
        assert not await made.left()

    on_stage(tmp_path, work)


def test_what_down_ends_is_told(tmp_path: Path) -> None:
    async def work(made: Stage) -> None:
        made.order("hang")
        async with deploy(made.folder, *SWEEP) as process:
            await made.until_it_runs()
            answer = await asyncio.to_thread(marked.stop, {"prefixes": [f"{made.fleet.mark}/k0/engine"], "grace": 1})
            assert answer["left"] == []
            raw = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 61, raw
            assert b"`vllm bench serve` was stopped or killed" in raw[1]
        assert not await made.left()

    on_stage(tmp_path, work)


def test_a_job_whose_command_was_killed_removes_its_result(tmp_path: Path) -> None:
    """The command starts it, and then this machine is switched off."""

    async def work(made: Stage) -> None:
        result = tmp_path / "result"
        result.mkdir()
        (result / "result.json").write_text("{}")
        command = ["sh", "-c", vllm_bench.SCRIPT, str(result), "true"]
        await start_job(made.fleet, made.machine.node, paths.BENCH_JOB, command)
        async with asyncio.timeout(10):
            while result.exists():  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.05)

    on_stage(tmp_path, work)

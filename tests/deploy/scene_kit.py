"""A deployment with nodes in this process and a simulated engine, for tests of commands that observe it and stop it."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.fleet.jobs import stop_job
from deploy.fleet.probe import probe_nodes
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import Fleet, open_fleet
from deploy.nodes.deployment import Deployment
from deploy.nodes.facts import keep_facts, load_facts
from deploy.nodes.state import State, StepRecord
from deploy.planning.plans import ServePlan
from deploy.steps import engine
from deploy.watch import logs
from gracefarm.console import Console
from gracefarm.errors import EngineError
from tests.deploy import kit
from tests.deploy.test_engine_step import a_plan, free_port, spec
from tests.deploy.test_tunnel import deploy


@dataclass
class Scene:
    """A deployment whose nodes are in this process."""

    folder: Path
    made: list[kit.Machine]
    deployment: Deployment
    fleet: Fleet
    plan: ServePlan

    async def serve(self) -> None:
        """Create the results of `deploy serve`: plan, key, state, and a running simulated engine."""
        self.keep("running")
        try:
            await engine.start_or_attach(self.fleet, remote_nodes(self.fleet)[0], self.spec(), Console())
        except EngineError as error:
            self.keep("failed", error.cause)
            raise
        self.keep("done")

    def spec(self) -> engine.EngineSpec:
        key = engine.api_key(self.deployment.folder)
        return spec(self.plan, secrets={"APHRODITE_API_KEY": key}, load=60.0)

    def keep(self, outcome: Any, text: str = "") -> None:
        folder = self.deployment.folder
        (folder.path / "plan.json").write_text(self.plan.model_dump_json())
        steps = {"engine": StepRecord(digest="x", outcome=outcome, text=text, begun=time.time())}
        if outcome == "done":
            steps["load"] = StepRecord(digest="x", outcome="done", begun=time.time(), data={"loading": 4.0, "capturing": 2.0})
        folder.state.write_text(State(steps=steps).model_dump_json())

    async def status(self, *words: str) -> tuple[int, dict[str, Any]]:
        """Run `deploy status --json`. Return its exit code and its document."""
        async with deploy(self.folder, "status", "--json", *words) as process:
            out, err = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode is not None
            assert out, err.decode()
            return process.returncode, json.loads(out)


@asynccontextmanager
async def scene(folder: Path, *more: str, nodes: int = 1) -> AsyncIterator[Scene]:
    (folder / "share").mkdir()
    # Ray's sockets require a short path.
    with tempfile.TemporaryDirectory(prefix="gf", dir="/tmp") as local:
        async with kit.machines(folder, nodes) as made, _scene(folder, local, made, *more) as found:
            yield found


@asynccontextmanager
async def _scene(folder: Path, local: str, made: list[kit.Machine], *more: str) -> AsyncIterator[Scene]:
    port = free_port()
    text = f'share = "{folder}/share"\n[options]\nprice_per_node_hour = 2.29\nconnect_timeout = 3.0\n'
    deployment = kit.deployment(folder, made, ports={"engine": port}, more=text, local=local)
    async with open_fleet(deployment, config=[]) as fleet:
        facts, bad = await probe_nodes(deployment, remote_nodes(fleet))
        assert not bad
        keep_facts(deployment, facts)
        found = Scene(folder=folder, made=made, deployment=deployment, fleet=fleet, plan=a_plan(port, *more))
        try:
            yield found
        finally:
            if made[0].server.sockets:
                await stop_job(fleet, deployment.head, "engine", grace=1)


def play(folder: Path, work: Callable[[Scene], Awaitable[None]], *more: str, nodes: int = 1) -> None:
    async def go() -> None:
        async with scene(folder, *more, nodes=nodes) as made:
            await work(made)

    asyncio.run(go())


def ray_logs(made: Scene, session: str) -> Path:
    folder = Path(logs.patterns(made.deployment, load_facts(made.deployment), "k0")[0]).parent
    real = folder.parent.parent / session / "logs"
    real.mkdir(parents=True)
    link = folder.parent
    link.unlink(missing_ok=True)
    link.symlink_to(real.parent)
    return real

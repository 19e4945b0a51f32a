"""Diagnoses a deployment. A completion, Ray and counters distinguish a dead engine, a dead node and a hanging engine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from deploy.engine import metrics
from deploy.engine.canary import Reply, ask_one_token
from deploy.engine.log import Progress, first_cause
from deploy.engine.metrics import EngineMetrics, moved
from deploy.fleet.calls import RemoteNode
from deploy.fleet.forwarding import forward_local
from deploy.fleet.jobs import JobStatus, job_status
from deploy.fleet.ssh import Fleet
from deploy.nodes import paths
from deploy.nodes.deployment import Node
from deploy.planning.plans import ServePlan
from deploy.steps.engine import EngineSpec, Nodes, port
from gracefarm.errors import GracefarmError

Condition = Literal["ready", "degraded", "busy", "loading", "dead-engine", "dead-node", "wedged", "stopped", "unreachable"]


@dataclass(frozen=True, kw_only=True)
class Signs:
    """Observations of a deployment at one time."""

    job: JobStatus | None
    "The engine's job; None: the head was not reached, see `error`."
    answer: Reply | None = None
    before: EngineMetrics | None = None
    "Metrics before the completion was requested."
    after: EngineMetrics | None = None
    nodes: Nodes | None = None
    "None: Ray did not answer."
    phase: str = ""
    "Phase of loading, from its log; empty: unknown."
    fraction: float | None = None
    "Share of the weights that is loaded."
    cause: str = ""
    "The first cause in its log, if it ended."
    error: str = ""
    "Why the head or its engine cannot be reached."
    remedy: str = ""
    "Remedy for `error`."
    plan: ServePlan | None = None
    "The plan that runs."

    def lost(self, names: Sequence[str]) -> str:
        """A phrase for lost nodes."""
        return self.plan.lost(names) if self.plan else f"Ray lost {', '.join(names)}"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The condition of a deployment, and a remedy."""

    kind: Condition
    text: str
    remedy: str = ""


_AGAIN = "collect the logs with `deploy collect`, then restart everything with `deploy serve`"


def diagnose(signs: Signs) -> Diagnosis:
    """Determine the condition from the observations."""
    if signs.job is None:
        return Diagnosis(
            kind="unreachable",
            text=signs.error or "the head cannot be reached",
            remedy="check the nodes with `deploy preflight`",
        )
    dead = [name for name, alive in (signs.nodes or {}).items() if not alive]
    if signs.job.state in ("absent", "stopped"):
        return Diagnosis(kind="stopped", text="the engine is not running", remedy="start the engine with `deploy serve`")
    if signs.job.state != "running":
        # Without Ray, the engine ends on one node after the other, and only the logs show where it ended first.
        if dead and not (signs.plan and signs.plan.launcher == "native"):
            return Diagnosis(kind="dead-node", text=f"the engine ended after {signs.lost(dead)}", remedy=_AGAIN)
        how = f"exited with code {signs.job.returncode}" if signs.job.state == "exited" else "was killed"
        return Diagnosis(
            kind="dead-engine", text=f"the engine {how}" + (f": {signs.cause}" if signs.cause else ""), remedy=_AGAIN
        )
    return _of_running(signs, dead)


def _of_running(signs: Signs, dead: list[str]) -> Diagnosis:
    answer = signs.answer
    if signs.error:
        text = f"the engine is running{' (' + signs.phase + ')' if signs.phase else ''} but cannot be reached: {signs.error}"
        return Diagnosis(kind="unreachable", text=text, remedy=signs.remedy)
    if answer and answer.kind == "ok":
        if dead:
            return Diagnosis(kind="degraded", text=f"the engine answers, but {signs.lost(dead)}", remedy=_AGAIN)
        return Diagnosis(kind="ready", text=f"a completion took {answer.seconds:.2f} s")
    if dead:
        return Diagnosis(kind="dead-node", text=f"{signs.lost(dead)}; the engine still waits", remedy=_AGAIN)
    if answer is None or answer.kind == "refused":
        return Diagnosis(kind="loading", text=f"the engine does not listen yet{': ' + signs.phase if signs.phase else ''}")
    if moved(signs.before, signs.after):
        return Diagnosis(kind="busy", text=f"the engine generates tokens for other requests ({answer.text})")
    ray = "Ray does not answer" if signs.nodes is None else "all nodes are alive"
    if answer.text.startswith("HTTP 5"):  # a worker has died; the engine's server may continue to run
        text = f"no completion: {answer.text}; {ray}, and the engine's process is still running"
        return Diagnosis(kind="dead-engine", text=text, remedy=_AGAIN)
    text = f"the engine hangs: {answer.text}, it generates no tokens for any other request, and {ray}"
    return Diagnosis(kind="wedged", text=text, remedy=_AGAIN)


async def probe(fleet: Fleet, head: RemoteNode, spec: EngineSpec, *, seconds: float = 30) -> Signs:
    """Collect the observations for `diagnose`, within about `seconds`."""
    (place,) = fleet.pick([head.name])
    try:
        job = await job_status(fleet, place, paths.ENGINE_JOB)
    except GracefarmError as error:
        return Signs(job=None, error=error.cause)
    nodes: Nodes | None = None
    with suppress(GracefarmError):
        nodes = await spec.nodes()
    if job.state == "absent":
        return Signs(job=job, plan=spec.plan, nodes=nodes)
    progress = await _read_log(fleet, place)
    if job.state != "running":
        names = {node.private: node.name for node in spec.plan.nodes}
        cause = first_cause(progress.lines, names, returncode=job.returncode).text
        return Signs(job=job, plan=spec.plan, nodes=nodes, cause=cause, phase=progress.phase)
    try:
        async with forward_local(fleet, place, 0, port(spec.plan)) as local:
            before = await metrics.scrape(local)
            answer = await ask_one_token(local, spec.key, seconds)
            after = await metrics.scrape(local)
    except GracefarmError as error:
        return Signs(job=job, plan=spec.plan, nodes=nodes, phase=progress.phase, error=error.cause, remedy=error.remedy)
    return Signs(
        job=job,
        plan=spec.plan,
        answer=answer,
        before=before,
        after=after,
        nodes=nodes,
        phase=progress.phase,
        fraction=progress.fraction,
    )


async def _read_log(fleet: Fleet, place: Node) -> Progress:
    log = f"{await fleet.folder(place)}/jobs/{paths.ENGINE_JOB}/log"
    command = f"head -c 4000000 {shlex.quote(log)}"
    progress = Progress()
    for line in (await fleet.run(command, nodes=[place], timeout=60))[place.name].stdout.splitlines():
        progress.feed(line)
    return progress

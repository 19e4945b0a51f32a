"""What the signs of a deployment mean: dead engine, dead node and wedge are told apart by a completion, Ray and counters."""

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
    """What was seen of a deployment at one moment."""

    job: JobStatus | None
    "The engine's; None: the head was not reached, see `error`."
    answer: Reply | None = None
    before: EngineMetrics | None = None
    "Metrics before the completion was asked for."
    after: EngineMetrics | None = None
    nodes: Nodes | None = None
    "None: Ray did not answer."
    phase: str = ""
    "Of loading, as far as its log tells; empty: nothing is known."
    fraction: float | None = None
    "Of the weights, while loading."
    cause: str = ""
    "The first one in its log, where it ended."
    error: str = ""
    "Why the head, or the engine on it, cannot be asked."
    remedy: str = ""
    "For `error`."
    plan: ServePlan | None = None
    "Of what runs."

    def lost(self, names: Sequence[str]) -> str:
        """A sentence for nodes that are lost."""
        return self.plan.lost(names) if self.plan else f"Ray lost {', '.join(names)}"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What it is, and what to do."""

    kind: Condition
    text: str
    remedy: str = ""


_AGAIN = "`deploy serve` stops what is left and starts everything again; `deploy collect` first keeps the evidence"


def diagnose(signs: Signs) -> Diagnosis:
    """Tell a dead engine, a dead node and a wedge apart."""
    if signs.job is None:
        return Diagnosis(kind="unreachable", text=signs.error or "the head cannot be reached", remedy="`deploy preflight`")
    dead = [name for name, alive in (signs.nodes or {}).items() if not alive]
    if signs.job.state in ("absent", "stopped"):
        return Diagnosis(kind="stopped", text="the engine does not run", remedy="`deploy serve` starts it")
    if signs.job.state != "running":
        # Without Ray the parts end one after the other, and which was first is for their logs to tell.
        if dead and not (signs.plan and signs.plan.launcher == "native"):
            return Diagnosis(kind="dead-node", text=f"the engine ended after {signs.lost(dead)}", remedy=_AGAIN)
        how = f"ended with {signs.job.returncode}" if signs.job.state == "exited" else "was killed"
        return Diagnosis(
            kind="dead-engine", text=f"the engine {how}" + (f": {signs.cause}" if signs.cause else ""), remedy=_AGAIN
        )
    return _of_running(signs, dead)


def _of_running(signs: Signs, dead: list[str]) -> Diagnosis:
    answer = signs.answer
    if signs.error:
        text = f"the engine runs{' (' + signs.phase + ')' if signs.phase else ''} and cannot be asked: {signs.error}"
        return Diagnosis(kind="unreachable", text=text, remedy=signs.remedy)
    if answer and answer.kind == "ok":
        if dead:
            return Diagnosis(kind="degraded", text=f"it answers, and {signs.lost(dead)}", remedy=_AGAIN)
        return Diagnosis(kind="ready", text=f"a completion came back in {answer.seconds:.2f} s")
    if dead:
        return Diagnosis(kind="dead-node", text=f"{signs.lost(dead)}; the engine waits for it in vain", remedy=_AGAIN)
    if answer is None or answer.kind == "refused":
        return Diagnosis(kind="loading", text=f"it does not listen yet{': ' + signs.phase if signs.phase else ''}")
    if moved(signs.before, signs.after):
        return Diagnosis(kind="busy", text=f"tokens are made for others; the canary waited in vain ({answer.text})")
    ray = "Ray does not answer" if signs.nodes is None else "all nodes are alive"
    if answer.text.startswith("HTTP 5"):  # a worker has died: the next request ends the server, or not even that
        text = f"no completion: {answer.text}; {ray}, and the engine has not ended"
        return Diagnosis(kind="dead-engine", text=text, remedy=_AGAIN)
    return Diagnosis(kind="wedged", text=f"{answer.text}, no token was made meanwhile, and {ray}: it hangs", remedy=_AGAIN)


async def probe(fleet: Fleet, head: RemoteNode, spec: EngineSpec, *, seconds: float = 30) -> Signs:
    """Look at everything that `diagnose` needs, within about `seconds`."""
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

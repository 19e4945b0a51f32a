"""A step of `deploy up` and `deploy serve`: its shape (inputs, check, apply, undo), and what performs it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.jobs import stop_job
from deploy.fleet.results import on_all
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import Fleet
from deploy.nodes import paths
from deploy.nodes.deployment import Deployment, Node
from deploy.nodes.facts import Facts
from deploy.nodes.state import Keeper, StepRecord
from deploy.planning.plans import ServePlan
from deploy.remote.wire import Json
from deploy.steps import processes
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, NodeError
from gracefarm.settings import SharedSettings

Looks = Mapping[str, Json]
"Node to what deploy.remote.look said of it."
LOOKS_BY_ITSELF = ""
"Answer of a step's `check`: `apply` finds out what is missing, and says so."
Undone = tuple[dict[str, int], dict[str, GracefarmError]]
"Node to how many processes were ended there, and node to why not all were."


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every step has."""

    deployment: Deployment
    fleet: Fleet
    facts: Facts
    keeper: Keeper
    console: Console
    settings: SharedSettings
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    "HF_TOKEN and HF_ENDPOINT of whoever calls."
    again: Collection[str] = ()
    "Steps that are done whatever the state says."
    away: Collection[str] = ()
    "Spares that are left out because they cannot be reached."
    plan: ServePlan | None = None
    "What is to be served; None before `serve` has made it."
    environment: str = ""
    "The id of the environment that serves; empty: not known, and not compared."

    @property
    def nodes(self) -> list[RemoteNode]:
        """All nodes but those that are left out, the head first."""
        return remote_nodes(self.fleet, self.facts, [node for node in self.deployment.nodes if node.name not in self.away])

    @property
    def inventory(self) -> list[tuple[str, str, int]]:
        """Name, address and number of GPUs of each node: what most steps depend on."""
        return [(node.name, node.address, node.gpus) for node in self.nodes]

    @property
    def environment_root(self) -> str:
        """The folder of this deployment's environments."""
        return paths.environment_root(self.deployment)

    @property
    def made_plan(self) -> ServePlan:
        """The plan, for the steps that come after it was made."""
        assert self.plan
        return self.plan


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a step did, for people and for the state."""

    text: str
    "How it is now."
    now: str = ""
    "What was done for it just now."
    data: dict[str, Any] = field(default_factory=dict)
    "What the state keeps of it."
    skipped: bool = False
    changed: bool = True
    "False: the step looked by itself and found nothing to do."
    answer: Mapping[str, Any] = field(default_factory=dict)
    "What the command that asked is told beside it."


class Step(Protocol):
    """One step. Whoever performs it does not ask which one it is."""

    name: str
    "As the state and the command line call it."

    def inputs(self, work: Work, looks: Looks) -> str | None:
        """Digest of all that it depends on: another one, and it is done again. None: there is nothing to do it for."""
        ...

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str | None:
        """Whether what was done is still there.

        None: it is, and the step has nothing to do. A reason: it is not, and the step is done again. LOOKS_BY_ITSELF: only
        `apply` can tell.
        """
        ...

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Do what is missing. Raises GracefarmError: the state keeps it as failed."""
        ...

    async def undo(self, work: Work) -> Undone:
        """End what it left at work on the nodes, for `down`. Most steps leave nothing."""
        return {}, {}


class ServingStep(Step):
    """A step of `serve`: nothing supervises what it has started, so that `apply` looks by itself each time."""

    def inputs(self, work: Work, looks: Looks) -> str:
        """The plan."""
        return work.made_plan.id

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str:
        """`apply` looks by itself."""
        return LOOKS_BY_ITSELF


async def perform(step: Step, work: Work, looks: Looks) -> Applied | None:
    """One step: nothing, where it is done and still so; else do it. None: nothing was done."""
    inputs = step.inputs(work, looks)
    if inputs is None:
        return None
    record = work.keeper.state.steps.get(step.name)
    if record and record.outcome in ("done", "skipped") and record.digest == inputs and step.name not in work.again:
        why = step.check(work, record, looks)
        if why is None:
            work.console.step(step.name, f"nothing to do: {record.text}")
            return None
        if why != LOOKS_BY_ITSELF:
            work.console.step(step.name, f"again: {why}")
    work.keeper.begin(step.name, inputs)
    try:
        applied = await step.apply(work, looks)
    except GracefarmError as error:
        work.keeper.end(step.name, "failed", error.cause)
        raise
    work.keeper.end(step.name, "skipped" if applied.skipped else "done", applied.text, applied.data)
    text = applied.text + (f"; {applied.now}" if applied.now else "")
    work.console.step(step.name, text if applied.changed else f"nothing to do: {text}")
    return applied


async def perform_all(steps: Sequence[Step], work: Work, looks: Looks) -> bool:
    """One after the other; whether anything was done."""
    applied = [await perform(step, work, looks) for step in steps]
    return any(applied)


async def side_by_side(console: Console, lanes: Mapping[str, Awaitable[bool]]) -> bool:
    """All of them to their end. A failure is told at once: another lane may go on for hours."""
    going = {asyncio.ensure_future(lane): name for name, lane in lanes.items()}
    left = set(going)
    try:
        while left:
            ended, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                error = task.exception()
                if left and isinstance(error, GracefarmError):
                    rest = " and ".join(going[other] for other in left)
                    console.warn(f"{going[task]} failed: {error.cause}; {error.remedy}. Meanwhile {rest} goes on")
    finally:
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    outcomes = [task.result() for task in going]  # each one raises, whatever the others say
    return any(outcomes)


async def end_jobs(work: Work, job: str, *, grace: float, stopped: Sequence[tuple[Node, str]] = ()) -> Undone:
    """End the processes of all jobs whose names begin like this, on every node.

    Each job of `stopped` counts as stopped then, and no stdin of a start that was cut off is left there.
    """
    ended, failed = await processes.try_stop(work.nodes, work.fleet.mark, jobs=[job], grace=grace)

    async def note(node: Node, name: str) -> None:
        try:
            await stop_job(work.fleet, node, name, grace=1)
        except GracefarmError as error:
            failed.setdefault(node.name, error)

    await asyncio.gather(*(note(node, name) for node, name in stopped if node.name not in failed))
    return ended, failed


async def look_at_nodes(work: Work) -> Looks:
    """One short call to every node at once: all that `up` needs to know whether there is anything to do.

    Raises:
        SshError, NodeError: a node was not reached; all that were not are named.
    """
    folder = work.keeper.state.data("weights").get("folder")

    async def ask(node: RemoteNode) -> Json:
        request = {
            "prefix": f"{work.fleet.mark}/{node.name}/",
            "root": work.environment_root,
            "weights": folder,
            "count": node.name == work.deployment.head.name,
            "share": work.deployment.data.share,
        }
        return await ask_briefly(node, request)

    return await on_all(work.nodes, ask)


async def ask_briefly(node: RemoteNode, request: Json, seconds: float = 60, *, function: str = "look.look") -> Json:
    """A short question to one node. A file system whose server is gone would hold it for ever.

    Raises:
        NodeError: no answer within `seconds`.
    """
    try:
        async with asyncio.timeout(seconds):
            return await call(node, function, request)
    except TimeoutError as error:
        raise NodeError(
            f"{node.name}: no answer to a short question within {seconds:g} s",
            remedy=f"does a file system hang there? `deploy run -k {node.name} --timeout 10 -- df -h`",
        ) from error

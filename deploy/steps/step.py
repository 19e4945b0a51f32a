"""A step of `deploy up` and `deploy serve`: its interface (inputs, check, apply, undo), and the functions that run steps."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Mapping, Sequence
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
"For each node, the answer of deploy.remote.look."
LOOKS_BY_ITSELF = ""
"Answer of a step's `check`: only `apply` can find out what is missing."
Undone = tuple[dict[str, int], dict[str, GracefarmError]]
"Number of stopped processes by node, and errors by node."


@dataclass(frozen=True, kw_only=True)
class Work:
    """The context that every step gets."""

    deployment: Deployment
    fleet: Fleet
    facts: Facts
    keeper: Keeper
    console: Console
    settings: SharedSettings
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    "The caller's environment, for HF_TOKEN and HF_ENDPOINT."
    again: Collection[str] = ()
    "Steps that are repeated even if the state says that they are done."
    away: Collection[str] = ()
    "Spare nodes that are ignored because they cannot be reached."
    plan: ServePlan | None = None
    "The plan; None before `serve` has made it."
    environment: str = ""
    "Id of the active environment; empty: unknown, and not compared."

    @property
    def nodes(self) -> list[RemoteNode]:
        """All nodes except the ignored ones, the head first."""
        return remote_nodes(self.fleet, self.facts, [node for node in self.deployment.nodes if node.name not in self.away])

    @property
    def inventory(self) -> list[tuple[str, str, int]]:
        """Name, address and number of GPUs of each node. Most steps depend on them."""
        return [(node.name, node.address, node.gpus) for node in self.nodes]

    @property
    def environment_root(self) -> str:
        """The folder of this deployment's environments."""
        return paths.environment_root(self.deployment)

    @property
    def made_plan(self) -> ServePlan:
        """The plan, for steps that run after it was made."""
        assert self.plan
        return self.plan


@dataclass(frozen=True, kw_only=True)
class Applied:
    """The result of a step, for the user and for the state."""

    text: str
    "The state of things after the step."
    now: str = ""
    "What was done in this run."
    data: dict[str, Any] = field(default_factory=dict)
    "Data for the state."
    skipped: bool = False
    changed: bool = True
    "False: the step found nothing to do."
    answer: Mapping[str, Any] = field(default_factory=dict)
    "Additional data for the command."


class Step(Protocol):
    """One step. All steps are run in the same way."""

    name: str
    "Name in the state and on the command line."

    def inputs(self, work: Work, looks: Looks) -> str | None:
        """Digest of everything that the step depends on. The step is repeated if it changes. None: the step does not apply."""
        ...

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str | None:
        """Check that the results of the step still exist.

        Returns:
            None if they exist; the reason if the step must be repeated; LOOKS_BY_ITSELF if only `apply` can find out.
        """
        ...

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Do what is missing. If this raises GracefarmError, the state records the step as failed."""
        ...

    async def undo(self, work: Work) -> Undone:
        """Stop the processes that the step left running on the nodes, for `down`. Most steps leave none."""
        return {}, {}


class ServingStep(Step):
    """A step of `serve`. Nothing supervises the processes that it started, so `apply` checks them each time."""

    def inputs(self, work: Work, looks: Looks) -> str:
        """The plan's id."""
        return work.made_plan.id

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str:
        """Leave the check to `apply`."""
        return LOOKS_BY_ITSELF


async def perform(step: Step, work: Work, looks: Looks) -> Applied | None:
    """Run a step, unless it is done and its results still exist. Return None if nothing was done."""
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
            work.console.step(step.name, f"repeated: {why}")
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
    """Run steps in sequence. Return whether anything was done."""
    applied = [await perform(step, work, looks) for step in steps]
    return any(applied)


async def side_by_side(lanes: Sequence[Sequence[Step]], work: Work, looks: Looks) -> bool:
    """Run all lanes in parallel until all have ended. A failure is reported at once, since other lanes may run for hours.

    A lane is a sequence of steps. Reports name the current step of a lane. Return whether anything was done.
    """
    current = [lane[0].name for lane in lanes]

    async def run(number: int, lane: Sequence[Step]) -> bool:
        changed = False
        for step in lane:
            current[number] = step.name
            changed = await perform(step, work, looks) is not None or changed
        return changed

    going = {asyncio.ensure_future(run(number, lane)): number for number, lane in enumerate(lanes)}
    left = set(going)
    try:
        while left:
            ended, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                error = task.exception()
                if left and isinstance(error, GracefarmError):
                    rest = " and ".join(current[number] for other, number in going.items() if other in left)
                    work.console.warn(f"{current[going[task]]} failed: {error.cause}; {error.remedy}. Still running: {rest}")
    finally:
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    outcomes = [task.result() for task in going]  # raises the first error, after all have ended
    return any(outcomes)


async def end_jobs(work: Work, job: str, *, grace: float, stopped: Sequence[tuple[Node, str]] = ()) -> Undone:
    """Stop the processes of all jobs whose names have the prefix `job`, on every node.

    The jobs of `stopped` are marked as stopped, and a stdin file that an interrupted start left is removed.
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
    """Make one short call to every node in parallel. The answers show `up` whether there is anything to do.

    Raises:
        SshError, NodeError: some nodes could not be reached; the message lists all of them.
    """
    folder = work.keeper.state.data("weights").get("folder")
    root = work.environment_root

    async def ask(node: RemoteNode) -> Json:
        request = {
            "prefix": f"{work.fleet.mark}/{node.name}/",
            "root": root,
            "weights": folder,
            "count": node.name == work.deployment.head.name,
            "share": work.deployment.data.share,
        }
        return await ask_briefly(node, request)

    return await on_all(work.nodes, ask)


async def ask_briefly(node: RemoteNode, request: Json, seconds: float = 60, *, function: str = "look.look") -> Json:
    """Make a short call to one node, with a timeout. Without it, a file system whose server is down would block forever.

    Raises:
        NodeError: there is no answer within `seconds`.
    """
    try:
        async with asyncio.timeout(seconds):
            return await call(node, function, request)
    except TimeoutError as error:
        raise NodeError(
            f"{node.name}: no answer to a short call within {seconds:g} s",
            remedy=f"check for a file system that hangs: `deploy run -k {node.name} --timeout 10 -- df -h`",
        ) from error

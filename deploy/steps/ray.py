"""Ray by `ray start`: the plan's commands and environments exactly, head first, workers in waves; verified by asking Ray.

Ray does not supervise what `ray start` has left (ray#2587), so everything here looks at the nodes: processes are told by the
mark and the plan's id in their environment, never by their names.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deploy.fleet.calls import Json, Target, call, joined, on_all, try_all
from deploy.fleet.ssh import Fleet, require
from deploy.nodes import paths
from deploy.planning.plan import NodePlan, Plan, carried
from deploy.steps.preflight_checks import SHUT, open_door, tokenless
from gracefarm.console import Console
from gracefarm.errors import EngineError, GracefarmError, NodeError

PLAN = "GRACEFARM_PLAN"
"In the environment of every process: with which plan and environment it was started (deploy.planning.plan.carried)."
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - the name of a variable
SERVING = (paths.ENGINE_JOB, paths.RAY_JOB)
"Jobs that serve. Others (builds, downloads, checks) may be at work beside them and are in nobody's way."
CORES_PER_START = 2
"Cores that one `ray start` keeps busy; nine at once on two cores: eight died of Ray's own 15 s limit (ray#65983)."


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is to run, and how long to wait."""

    plan: Plan
    python: str
    "Of the active environment: the one that imports ray."
    environment: str = ""
    "The active environment's id; empty: not known, and not compared."
    token: str | None = field(default=None, repr=False)
    "Ray's token, where the plan's environment names a file for it."
    wave: int | None = None
    "Workers started at once; None: by the head's cores."
    seconds: float = 180
    "For `ray start` on a node, and again until all nodes are alive."
    ask: float = 60
    "For one question to Ray."

    @property
    def carries(self) -> str:
        """What everything that is started here carries, and by which it is known again."""
        return carried(self.plan, self.environment)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was done."""

    started: tuple[str, ...]
    "Nodes on which Ray was started now."
    stopped: tuple[str, ...]
    "Nodes on which a Ray of ours ran that did not fit this plan."
    gpus: float


def address(plan: Plan) -> str:
    """Of the head's GCS: host:port."""
    return f"{plan.head.private}:{option(plan.head.ray, '--port') or 6379}"


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`."""
    for index, word in enumerate(argv):
        if word.startswith(name + "="):
            return word.partition("=")[2]
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
    return None


def ports(argv: Sequence[str]) -> list[int]:
    """Every single port that `ray start` is told to listen on."""
    names = [word.partition("=")[0] for word in argv if word.startswith("--") and word.partition("=")[0].endswith("port")]
    values = [option(argv, name) for name in names if name not in ("--min-worker-port", "--max-worker-port")]
    return [int(one) for one in values if one and one.isdigit() and one != "0"]


async def look(targets: Sequence[Target], mark: str, wanted: Mapping[str, Sequence[int]]) -> dict[str, Json]:
    """Our processes on each node, and who holds the ports that are wanted there."""

    async def one(node: Target) -> Json:
        return await call(node, "look.look", {"prefix": f"{mark}/{node.name}/", "ports": list(wanted.get(node.name, ()))})

    return await on_all(targets, one)


def raylet(found: Json, plan: str | None = None) -> bool:
    """A raylet of ours runs there; `plan`: started with this very plan and environment (Spec.carries)."""
    ours = [one for one in found["processes"] if one["name"] == "raylet"]
    return bool(ours) and all(plan in (None, one["plan"]) for one in ours)


def ours(found: Json, job: str) -> list[Json]:
    """Processes of a job there."""
    return [one for one in found["processes"] if one["mark"].rpartition("/")[2] == job]


def serving(found: Json) -> list[Json]:
    """Processes of Ray and of the engine there."""
    return [one for job in SERVING for one in ours(found, job)]


async def up(fleet: Fleet, targets: Sequence[Target], spec: Spec, console: Console) -> Outcome:
    """Bring exactly the plan's cluster up; nothing is touched where it runs already.

    `targets`: all nodes, spares too; a Ray of ours on one of those is stopped.
    Raises:
        EngineError: Ray did not come up, with the cause out of its own logs; a port is held by somebody else's.
    """
    plan, by_name = spec.plan, {one.name: one for one in targets}
    wanted = {one.name: ports(one.ray) for one in plan.nodes}
    looks = await look(targets, fleet.mark, wanted)
    stopped = await _make_room(targets, looks, spec, fleet.mark, console)
    if stopped:
        looks = await look(targets, fleet.mark, wanted)
    _refuse_foreign(looks, spec)
    missing = [one for one in plan.nodes if not raylet(looks[one.name], spec.carries)]
    if missing:
        await _end_engine(targets, looks, fleet.mark, console)
        await on_all([by_name[one.name] for one in missing], lambda node: call(node, "cluster.warm", {}, python=spec.python))
        await _start_all(fleet, by_name, missing, spec, console, cores=looks[plan.head.name]["cores"])
    gpus, version = await verify(by_name, spec)
    if tokenless(version):
        console.warn(f"{open_door(version)}; {SHUT}")
    return Outcome(started=tuple(one.name for one in missing), stopped=stopped, gpus=gpus)


async def _make_room(
    targets: Sequence[Target], looks: Mapping[str, Json], spec: Spec, mark: str, console: Console
) -> tuple[str, ...]:
    """Stop what is ours and does not fit: another plan or environment, a spare, anything without its raylet, all of it without
    a head."""
    plan = spec.plan
    wanted = {one.name for one in plan.nodes}
    headless = not raylet(looks[plan.head.name], spec.carries)
    unfit = [
        one
        for one in targets
        if serving(looks[one.name])
        and (
            headless
            or one.name not in wanted
            or not raylet(looks[one.name], spec.carries)
            or _others(looks[one.name], spec.carries)
        )
    ]
    if unfit:
        console.step(
            "ray", f"stopping what runs with another plan or environment, or half: {', '.join(one.name for one in unfit)}"
        )
        await _end_engine(targets, looks, mark, console)
        await stop(unfit, mark, jobs=SERVING)
    return tuple(one.name for one in unfit)


async def _end_engine(targets: Sequence[Target], looks: Mapping[str, Json], mark: str, console: Console) -> None:
    """An engine that is there already cannot go on without one of its nodes, and does not notice that it came back."""
    if any(ours(looks[one.name], paths.ENGINE_JOB) for one in targets):
        console.step("ray", "stopping the engine, which has lost a node")
        await stop(targets, mark, jobs=[paths.ENGINE_JOB])


def _others(found: Json, plan: str) -> bool:
    return any(one["plan"] not in ("", plan) for one in found["processes"])


def _refuse_foreign(looks: Mapping[str, Json], spec: Spec) -> None:
    for node in spec.plan.nodes:
        found = looks[node.name]
        if raylet(found, spec.carries):
            continue
        for port, who in found["holders"].items():
            raise EngineError(
                f"{node.name}: port {port} is held by {who}, which is not of this deployment",
                remedy="stop it there (a Ray of somebody else: `ray stop`), or choose another port in [ports] of deploy.toml",
            )


def waves(missing: Sequence[NodePlan], spec: Spec, cores: int) -> list[list[NodePlan]]:
    """Who is started together: the head by itself, then workers, by `spec.wave` or the head's cores."""
    head = [one for one in missing if one.name == spec.plan.head.name]
    rest = [one for one in missing if one.name != spec.plan.head.name]
    size = spec.wave or max(1, cores // CORES_PER_START)
    return ([head] if head else []) + [rest[at : at + size] for at in range(0, len(rest), size)]


async def _start_all(
    fleet: Fleet, by_name: Mapping[str, Target], missing: Sequence[NodePlan], spec: Spec, console: Console, *, cores: int
) -> None:
    done = 0
    with console.progress("ray") as tick:
        for wave in waves(missing, spec, cores):
            await asyncio.gather(*(_start(fleet, by_name[one.name], one, spec, console) for one in wave))
            done += len(wave)
            tick(done, len(missing), ", ".join(one.name for one in wave))


async def _start(fleet: Fleet, target: Target, node: NodePlan, spec: Spec, console: Console) -> None:
    """`ray start` on one node as a detached job; once more, where Ray gave up on its own children."""
    path = node.env.get(TOKEN_PATH)
    if path and spec.token:
        require(await fleet.put(spec.token.encode(), path, nodes=[node.name]), "placing Ray's token")
    for attempt in (1, 2):
        begun = time.time()
        try:
            await _start_once(fleet, node, spec)
        except GracefarmError as error:
            why = await explain(target, node, spec, since=begun - 5)
            await stop([target], fleet.mark, jobs=[paths.RAY_JOB])
            if attempt == 2 or not isinstance(error, EngineError):
                raise EngineError(f"{error.cause}{': ' + why if why else ''}", remedy=_remedy(target)) from error
            console.warn(f"{node.name}: Ray did not start{' (' + why + ')' if why else ''}; once more")
        else:
            return


def _remedy(target: Target) -> str:
    return f"`deploy logs {target.name}` shows Ray's logs there; `deploy preflight` what the node lacks"


async def _start_once(fleet: Fleet, node: NodePlan, spec: Spec) -> None:
    (place,) = fleet.pick([node.name])
    env = {**node.env, PLAN: spec.carries}
    await fleet.start_job(place, paths.RAY_JOB, shlex.join(node.ray), env)
    lines: list[str] = []
    try:
        async with asyncio.timeout(spec.seconds):
            status = await fleet.follow_job(place, paths.RAY_JOB, lines.append, patience=30)
    except TimeoutError as error:
        raise EngineError(f"{node.name}: `ray start` has not ended after {spec.seconds:g} s") from error
    if status.returncode != 0:
        said = [one.strip() for one in lines if one.strip()]
        word = f"ended with {status.returncode}" if status.state == "exited" else "was killed"
        raise EngineError(f"{node.name}: `ray start` {word}{': ' + said[-1] if said else ''}")


async def explain(target: Target, node: NodePlan, spec: Spec, *, since: float) -> str:
    """The first cause that Ray's own logs on a node know, or nothing."""
    temp = option(node.ray, "--temp-dir") or option(spec.plan.head.ray, "--temp-dir") or "/tmp/ray"  # noqa: S108 - Ray's own
    try:
        found = await call(target, "cluster.cause", {"temp": temp, "since": since})
    except GracefarmError:
        return ""
    return found["lines"][0] if found["lines"] else ""


async def ask(head: Target, spec: Spec) -> Json:
    """What Ray says of its nodes. Raises EngineError: it does not answer; SshError, NodeError: the head does not."""
    node = spec.plan.head
    env = {name: value for name, value in node.env.items() if name.startswith("RAY_")}
    request = {"address": address(spec.plan), "ip": node.private, "env": env, "seconds": spec.ask}
    return await call(head, "cluster.nodes", request, python=spec.python)


async def verify(by_name: Mapping[str, Target], spec: Spec) -> tuple[float, str]:
    """All of the plan's nodes are alive, no other is, and there are exactly its GPUs; their number, and Ray's version.

    Raises:
        EngineError: not within `spec.seconds`; names the nodes and the cause in their logs.
    """
    plan, deadline = spec.plan, time.monotonic() + spec.seconds
    names = {one.private: one.name for one in plan.nodes}
    while True:
        found = await ask(by_name[plan.head.name], spec)
        alive = {one["address"]: one["gpus"] for one in found["nodes"] if one["alive"]}
        away = [names[one] for one in names if one not in alive]
        foreign = [one for one in alive if one not in names]
        gpus = sum(alive.values())
        if not away and not foreign and gpus == plan.layout.world:
            return float(gpus), str(found["version"])
        if foreign:
            raise EngineError(
                f"Ray has nodes that are not in the plan: {', '.join(foreign)}", remedy="`ray stop` there, then repeat"
            )
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(1)
    if away:
        node = next(one for one in plan.nodes if one.name == away[0])
        why = await explain(by_name[node.name], node, spec, since=0)
        raise EngineError(f"Ray does not see {', '.join(away)}{': ' + why if why else ''}", remedy=_remedy(by_name[node.name]))
    raise EngineError(
        f"Ray has {gpus:g} GPUs, and the plan needs exactly {plan.layout.world}", remedy="`deploy plan` shows each node's"
    )


async def try_stop(
    targets: Sequence[Target], mark: str, *, jobs: Sequence[str] = ("",), grace: float = 10
) -> tuple[dict[str, int], dict[str, GracefarmError]]:
    """End our processes and look that none is left: node to how many were ended; node to why not. `jobs`: as names begin."""

    async def one(node: Target) -> int:
        found = await call(node, "look.stop", {"prefixes": [f"{mark}/{node.name}/{job}" for job in jobs], "grace": grace})
        if found["left"]:
            pids = ", ".join(str(each["pid"]) for each in found["left"])
            raise NodeError(
                f"{node.name}: processes cannot be ended: {pids}", remedy="end them as their owner, then repeat `deploy down`"
            )
        return int(found["ended"])

    return await try_all(targets, one)


async def stop(targets: Sequence[Target], mark: str, *, jobs: Sequence[str] = ("",), grace: float = 10) -> dict[str, int]:
    """End our processes and look that none is left; node to how many were ended. `jobs`: as names begin.

    Raises:
        NodeError: one is left; SshError: a node was not reached. After all others were stopped.
    """
    ended, bad = await try_stop(targets, mark, jobs=jobs, grace=grace)
    if bad:
        raise joined(bad, len(targets))
    return ended

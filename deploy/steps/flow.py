"""What `deploy up`, `serve` and `down` do, in order: look at every node once, do what is missing, remember what was done.

A step that the state calls done is done again only when what it depends on has changed, or when the look denies it.
What runs long on the nodes survives this process and every cut: builds of environments, downloads, Ray and the engine are
detached jobs with the deployment's mark; the same command finds them again, and `down` ends them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import netrc
import os
import re
import secrets
import shlex
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploy.fleet.calls import Json, Target, call, joined, try_all
from deploy.fleet.facts import Facts
from deploy.fleet.ssh import Fleet
from deploy.fleet.targets import targets
from deploy.nodes import paths
from deploy.nodes.inventory import Deployment, Node
from deploy.nodes.state import Keeper, Record, digest
from deploy.planning import engine as engines
from deploy.planning import model as models
from deploy.planning import options
from deploy.planning import plan as planning
from deploy.planning.model import Model
from deploy.planning.plan import Plan
from deploy.steps import cache, engine, environment, preflight, ray, weights
from deploy.steps.dealing import told
from deploy.steps.preflight_checks import Cell
from gracefarm.console import Console
from gracefarm.errors import ConfigError, FetchError, GracefarmError, HostError, NodeError, UsageError
from gracefarm.files import atomic_write
from gracefarm.settings import Settings

UP = ("preflight", "cache", "environment", "weights", "proof")
"Steps of `up`, in their order; environment and weights go side by side."
SERVE = ("ray", "engine")
OF_THE_NODE = ("names", "share", "route", "ports", "clock", "cuda", "memory", "shm", "limits")
"Checks that an environment does not change."


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a person wants done otherwise."""

    start: str | None = None
    "Steps from this one on are done again, whatever the state says."
    skip: Collection[str] = ()

    def check(self, known: Sequence[str] = UP) -> None:
        """Raises UsageError: no such step."""
        for one in (*([self.start] if self.start else []), *self.skip):
            if one not in known:
                raise UsageError(f"no step {one!r}", remedy=f"there are: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every step has."""

    deployment: Deployment
    fleet: Fleet
    facts: Facts
    keeper: Keeper
    console: Console
    settings: Settings
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    "HF_TOKEN and HF_ENDPOINT of whoever calls."
    again: Collection[str] = ()
    "Steps that are done whatever the state says."
    away: Collection[str] = ()
    "Spares that are left out because they cannot be reached."

    @property
    def nodes(self) -> list[Target]:
        """All nodes but those that are left out, the head first."""
        return targets(self.fleet, self.facts, [one for one in self.deployment.nodes if one.name not in self.away])

    @property
    def pairs(self) -> list[tuple[str, str, int]]:
        """What most steps depend on."""
        return [(one.name, one.address, one.gpus) for one in self.nodes]


Looks = Mapping[str, Json]
Check = Callable[[Record], str | None]
"None: what was done is still there; else why it must be done again."


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a step did, for people and for the state."""

    text: str
    "How it is now."
    now: str = ""
    "What was done for it just now."
    data: dict[str, Any] = field(default_factory=dict)
    skipped: bool = False


async def look(work: Work) -> Looks:
    """One short call to every node at once: all that `up` needs to know whether there is anything to do.

    Raises:
        SshError, NodeError: a node was not reached; all that were not are named.
    """
    data, root = work.deployment.data, _root(work)
    folder = work.keeper.state.data("weights").get("folder")

    async def one(node: Target) -> Json:
        request = {
            "prefix": f"{work.fleet.mark}/{node.name}/",
            "root": root,
            "weights": folder,
            "count": node.name == work.deployment.head.name,
            "share": data.share,
        }
        return await glance(node, request)

    found, bad = await try_all(work.nodes, one)
    if bad:
        raise joined(bad, len(work.nodes))
    return found


async def glance(node: Target, request: Json, seconds: float = 60, *, function: str = "look.look") -> Json:
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


async def without_lost_spares(work: Work) -> Work:
    """Without the nodes that no plan needs and that cannot be reached: nothing is to run there, so nothing waits for them.

    What is done meanwhile is done for them too, once they are back: every step depends on which nodes there are.
    """
    found = await work.fleet.connect(sorted(await _spares(work)))
    lost = {name: error for name, error in found.items() if error}
    for error in lost.values():
        work.console.warn(f"{error.cause}; it is a spare: going on without it")
    return replace(work, away=tuple(lost))


async def _spares(work: Work) -> Collection[str]:
    """By the plan that was served last, else by the one that would be made without asking the Hub."""
    brought = work.keeper.state.data("weights")
    try:
        plan: Plan | None = Plan.model_validate_json((work.deployment.folder.path / "plan.json").read_bytes())
    except (OSError, ValueError):
        try:
            model = await _model_brought(work, brought) if brought else _model_at_hand(work)
            plan = planning.make(work.deployment, work.facts, model) if model else None
        except GracefarmError:
            return ()  # whoever needs the plan tells it
    return {one.name for one in work.deployment.nodes} & set(plan.spares) if plan else ()


def _model_at_hand(work: Work) -> Model | None:
    data = work.deployment.data.model
    if data.config:
        return models.from_file(_local(work, data.config), repo=data.repo, revision=data.revision)
    return models.built_in(data.repo, data.revision)


def _root(work: Work) -> str:
    return paths.environment_root(work.deployment)


async def perform(work: Work, name: str, inputs: str, check: Check, apply: Callable[[], Awaitable[Done]]) -> bool:
    """One step: nothing, where it is done and still so; else do it. Returns whether anything was done."""
    record = work.keeper.state.steps.get(name)
    if record and record.outcome in ("done", "skipped") and record.digest == inputs and name not in work.again:
        why = check(record)
        if why is None:
            work.console.step(name, f"nothing to do: {record.text}")
            return False
        work.console.step(name, f"again: {why}")
    work.keeper.begin(name, inputs)
    try:
        done = await apply()
    except GracefarmError as error:
        work.keeper.end(name, "failed", error.cause)
        raise
    work.keeper.end(name, "skipped" if done.skipped else "done", done.text, done.data)
    work.console.step(name, done.text + (f"; {done.now}" if done.now else ""))
    return True


async def up(work: Work, choice: Choice | None = None) -> bool:
    """Everything that serving needs, on every node; returns whether anything was done.

    Raises:
        GracefarmError: the first step that failed; what was done before it stays done.
    """
    chosen = choice or Choice()
    chosen.check()
    if chosen.start:
        work = replace(work, again=UP[UP.index(chosen.start) :])
    looks = await look(work)
    changed = False
    for name, step in (("preflight", _preflight), ("cache", _cache)):
        if name not in chosen.skip:
            changed = await step(work, looks) or changed
    if any(one.get("owner") != work.fleet.mark for one in looks.values()):
        await claim(work)
    together = (("environment", _environment), ("weights", _weights))
    changed = (
        await _side_by_side(work, {name: step(work, looks) for name, step in together if name not in chosen.skip}) or changed
    )
    if "cache" not in chosen.skip:
        changed = await _measure(work) or changed
    if "proof" not in chosen.skip:
        changed = await _proof(work, looks) or changed
    return changed


async def claim(work: Work) -> None:
    """The environments below this deployment's name are its own: another of the same name would switch them under it.

    Raises:
        ConfigError: another deployment on this share has the name.
    """
    root = _root(work)
    found = await call(work.nodes[0], "environment.claim", {"root": root, "owner": work.fleet.mark})
    if found["owner"] != work.fleet.mark:
        share, name = paths.share(work.deployment), work.deployment.name
        raise ConfigError(
            f"another deployment on {share} is called {name}: {root} is of {found['owner']}, this one is {work.fleet.mark}",
            remedy=f'name = "…" in deploy.toml; or, where that one is gone for good: `deploy run -k head -- rm {root}/owner`',
        )


async def _side_by_side(work: Work, steps: Mapping[str, Awaitable[bool]]) -> bool:
    """All of them to their end. A failure is told at once: another step may go on for hours."""
    going = {asyncio.ensure_future(one): name for name, one in steps.items()}
    left = set(going)
    try:
        while left:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                error = one.exception()
                if left and isinstance(error, GracefarmError):
                    rest = " and ".join(going[each] for each in left)
                    work.console.warn(f"{going[one]} failed: {error.cause}; {error.remedy}. Meanwhile {rest} goes on")
    finally:
        for one in left:
            one.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    outcomes = [one.result() for one in going]  # each one raises, whatever the others say
    return any(outcomes)


# preflight, before and after there is an environment


def _boots(looks: Looks) -> dict[str, str]:
    return {node: str(one["boot"]) for node, one in looks.items()}


def _mounted(one: Json) -> str | None:
    """What the share lies on; an empty mount point stays when a mount goes."""
    return f"{one['share']['kind']} {one['share']['source']}" if one["share"] else None


async def _preflight(work: Work, looks: Looks) -> bool:
    data = work.deployment.data
    inputs = digest("preflight", work.pairs, data.share, data.ports.model_dump(), data.options.rehearsal, data.python)

    def check(record: Record) -> str | None:
        for node, one in looks.items():
            if data.share and _mounted(one) != record.data.get("shares", {}).get(node):
                return f"{node} has lost {data.share}, or has another one there"
            if record.data["boots"].get(node) != one["boot"]:
                return f"{node} was started again"
        return None

    async def apply() -> Done:
        cells = await cells_of(work, looks)
        preflight.require(_without_ours(cells, looks))
        return Done(
            text=summary(cells), data={"boots": _boots(looks), "shares": {node: _mounted(one) for node, one in looks.items()}}
        )

    return await perform(work, "preflight", inputs, check, apply)


async def cells_of(work: Work, looks: Looks, told: Collection[str] = ()) -> list[Cell]:
    """Every check on every node and pair; what is not green is printed, but yellow cells of the checks in `told`."""
    cells = await preflight.run(work.nodes, _preflight_spec(work, looks))
    said: dict[str, list[str]] = {}
    for one in cells:
        if one.status == "bad" or (one.status == "warn" and one.check not in told):
            text = f"{one.check}: {one.text}" + (f"; {one.remedy}" if one.remedy else "")
            said.setdefault(text, []).append(one.node)
    for text, nodes in said.items():
        work.console.warn(f"{', '.join(nodes)}: {text}")
    return cells


def _without_ours(cells: Sequence[Cell], looks: Looks) -> list[Cell]:
    """Where our own cluster runs it may hold the GPUs' memory."""
    running = any(ray.raylet(one) for one in looks.values())
    return [one for one in cells if not (running and one.check in ("memory", "nccl"))]


def _preflight_spec(work: Work, looks: Looks) -> preflight.Spec:
    data, ports = work.deployment.data, work.deployment.data.ports
    running = any(ray.raylet(one) for one in looks.values())
    of_ray = (ports.ray, ports.object_manager, ports.node_manager, ports.agent, ports.agent_grpc, ports.metrics)
    # Workers take a thousand ports: what lets the ends and the middle through lets the others through.
    workers = (ports.workers_from, (ports.workers_from + ports.workers_to) // 2, ports.workers_to)
    wanted = tuple(dict.fromkeys((*of_ray, ports.runtime_env, *workers, ports.store, ports.engine_store)))
    return preflight.Spec(
        share=data.share,
        root=_root(work),
        ports=wanted,
        loopback={work.deployment.head.name: (ports.dashboard,)},
        collective_port=ports.store,
        ours=(f"{paths.root(work.deployment)}/", *(("ray::",) if running else ())),
        rehearsal=data.options.rehearsal,
        public=_public(work.deployment),
        ray_ports=(ports.ray, ports.object_manager, ports.node_manager),
        python=data.python,
    )


def _public(deployment: Deployment) -> dict[str, str]:
    """Nodes that ssh reaches directly by an address of the internet, a host name's among them."""
    found = {}
    for one in deployment.nodes:
        with suppress(OSError):
            places = [] if one.jump else socket.getaddrinfo(one.address, one.port, proto=socket.IPPROTO_TCP)
            if any(ipaddress.ip_address(str(each[4][0]).partition("%")[0]).is_global for each in places):
                found[one.name] = one.address
    return found


def summary(cells: Sequence[Cell]) -> str:
    """How many checks, and what became of them."""
    count = {status: sum(one.status == status for one in cells) for status in ("ok", "warn", "bad", "skipped")}
    nodes = len({one.node for one in cells})
    parts = [f"{count['ok']} green", *(f"{count[name]} {word}" for name, word in _WORDS if count[name])]
    return f"{len({one.check for one in cells})} checks on {nodes} nodes: {', '.join(parts)}"


_WORDS = (("warn", "to look at"), ("bad", "red"), ("skipped", "skipped"))


async def _proof(work: Work, looks: Looks) -> bool:
    """Preflight once more in the environment that will serve: pages, libstdc++, all-reduce."""
    identifier = work.keeper.state.data("environment").get("id")
    if not identifier:
        return False
    inputs = digest("proof", work.pairs, identifier, _boots(looks))

    async def apply() -> Done:
        cells = await cells_of(work, looks, told=OF_THE_NODE)
        preflight.require(_without_ours(cells, looks))
        reduced = next((one.text for one in cells if one.check == "gloo" and one.status == "ok"), None)
        return Done(text=f"with the environment: {summary(cells)}" + (f"; all-reduce {reduced}" if reduced else ""))

    return await perform(work, "proof", inputs, lambda _record: None, apply)


# cache


async def _cache(work: Work, looks: Looks) -> bool:
    share = paths.share(work.deployment)

    def check(record: Record) -> str | None:
        for node, one in looks.items():
            if record.data["fsc"].get(node) and not (one["share"] or {}).get("fsc"):
                return f"{node} has mounted {share} without it"
        return None

    async def apply() -> Done:
        rows = await cache.up(work.nodes, share, work.console)
        reasons = dict.fromkeys(one.text for one in rows if one.outcome == "skipped")
        on = [one for one in rows if one.outcome != "skipped"]
        parts = [f"{len(on)} of {len(rows)} nodes: {on[0].text}"] if on else []
        parts += [f"skipped: {reason}" for reason in reasons]
        speeds = {one.node: {"cold": one.cold, "warm": one.warm} for one in on if one.cold is not None}
        data = {"fsc": {one.node: one.outcome != "skipped" for one in rows}, "measured": speeds}
        return Done(text="; ".join(parts), data=data, skipped=not on)

    return await perform(work, "cache", digest("cache", share, work.pairs), check, apply)


async def _measure(work: Work) -> bool:
    """The cache, once there are weights to measure it with: it is switched on while the share is empty."""
    record = work.keeper.state.steps.get("cache")
    if record is None or record.outcome != "done" or not work.keeper.state.data("weights"):
        return False
    known = record.data.get("measured", {})
    left = [one for one in work.nodes if record.data["fsc"].get(one.name) and one.name not in known]
    found = await cache.measure(left, paths.share(work.deployment)) if left else {}
    found = {node: one for node, one in found.items() if one["path"]}
    if not found:
        return False
    work.keeper.begin("cache", record.digest)
    work.keeper.end("cache", "done", record.text, {**record.data, "measured": {**known, **found}})
    for node, one in found.items():
        work.console.step("cache", f"{node}: measured{cache.told(one).replace(';', ':', 1)}")
    return True


# environment


def lock_text(deployment: Deployment, console: Console) -> str:
    """The lock of what serves: deploy.toml's `lock`, else SET.lock beside it, which the index is asked for once and then kept.

    Raises:
        ConfigError: neither is there, and no index is named.
        FetchError: the index has no lock of the set, or cannot be asked from here.
    """
    data = deployment.data
    path = deployment.path.parent / Path(data.lock or f"{data.set}.lock").expanduser()
    try:
        return path.read_text()
    except FileNotFoundError as error:
        if data.lock is None and data.index is not None:
            return _fetch_lock(data.index, data.set, path, console)
        raise ConfigError(
            f"{path}: no lock of the set {data.set}",
            remedy=f"`builder set build {data.set}` writes requirements.lock: name it by lock = in deploy.toml",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the lock cannot be read: {error}", remedy="write it anew") from error


def _fetch_lock(index: str, name: str, path: Path, console: Console) -> str:
    import httpx  # only where it is needed

    # The index of a set, …/SET/simple/, has its lock at …/SET/requirements.lock.
    try:
        whole = httpx.URL(index.rstrip("/") + "/").join("../requirements.lock")
    except httpx.InvalidURL as error:
        raise ConfigError(f"index = in deploy.toml is no address: {error}", remedy="http://HOST:PORT/SET/simple/") from error
    address = str(whole.copy_with(userinfo=b""))  # to be shown: a password stays out of it
    remedy = f"`builder set build {name}` writes one too: copy it to {path}, or name it by lock = in deploy.toml"
    try:
        auth = httpx.NetRCAuth() if (Path.home() / ".netrc").is_file() else None
        answer = httpx.get(whole, timeout=30, follow_redirects=True, auth=auth)
    except (netrc.NetrcParseError, UnicodeDecodeError) as error:
        raise ConfigError(f"~/.netrc cannot be read: {error}", remedy="mend it, for you alone: chmod 600 ~/.netrc") from error
    except httpx.HTTPError as error:
        raise FetchError(f"no lock of the set {name}: {address}: {error or type(error).__name__}", remedy=remedy) from error
    if answer.status_code != 200 or "--hash=sha256:" not in answer.text:
        said = f"answered {answer.status_code}" if answer.status_code != 200 else "is no lock with sha256"
        raise FetchError(f"no lock of the set {name}: {address} {said}", remedy=remedy)
    atomic_write(path, answer.text)
    console.step("environment", f"{address} is kept as {path}: what it names is what is installed from now on")
    return answer.text


def _environment_spec(work: Work) -> environment.Spec:
    data = work.deployment.data
    lock = lock_text(work.deployment, work.console)
    _require_engine(work.deployment, lock)
    return environment.Spec(
        root=_root(work),
        lock=lock,
        index=data.index,
        source=data.python,
        mirror=data.python_mirror,
        engine=work.deployment.matrix,
        set_name=data.set,
    )


def _require_engine(deployment: Deployment, lock: str) -> None:
    """The lock has the engine and Ray; a rehearsal's has a stand-in under another name. Raises ConfigError."""
    data = deployment.data
    if data.options.rehearsal:
        return
    names = {re.sub(r"[-_.]+", "-", one).lower() for one in re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==", lock, re.MULTILINE)}
    wanted = (options.table(engines.engine(data.engine).table).distribution, "ray")
    missing = [one for one in wanted if one not in names]
    if missing:
        raise ConfigError(
            f"the lock of the set {data.set} has no {' and no '.join(missing)}, and the engine is to be {data.engine}",
            remedy='engine and set go together: aphrodite with set = "gh200-cu124", vllm with set = "gh200-cu130"',
        )


def _environment_inputs(work: Work, spec: environment.Spec) -> str:
    return digest("environment", spec.root, spec.lock, spec.index, spec.python, spec.source, spec.engine, work.pairs)


async def rollback(work: Work) -> Json:
    """The environment that was active before; `up` leaves it active until its inputs change or `env up` is said.

    Raises:
        HostError: there is none.
    """
    await claim(work)
    done = await environment.rollback(work.nodes, _root(work))
    work.keeper.begin("environment", _environment_inputs(work, _environment_spec(work)))
    text = f"{done['active'][:12]} is active, rolled back to"
    work.keeper.end("environment", "done", text, {"id": done["active"]})
    return done


async def _environment(work: Work, looks: Looks) -> bool:
    spec = _environment_spec(work)
    inputs = _environment_inputs(work, spec)

    def check(record: Record) -> str | None:
        for node, one in looks.items():
            if one["environments"].get("env") != record.data["id"]:
                return f"{node} does not see it, or another one is active"
        return None

    async def apply() -> Done:
        made = await environment.up(work.nodes, spec, work.settings, work.console)
        count = sum("error" not in row and "skipped" not in row for rows in made.rows.values() for row in rows)
        text = f"{made.id[:12]} is active, {count} imports on {len(made.rows)} nodes"
        return Done(text=text, now="built now" if made.built else "", data={"id": made.id})

    return await perform(work, "environment", inputs, check, apply)


# weights


async def _weights(work: Work, looks: Looks) -> bool:
    await _download(work, looks)
    data = work.deployment.data
    spec = weights.Spec(
        root=paths.root(work.deployment),
        owner=work.fleet.mark,
        repo=data.model.repo,
        revision=data.model.revision,
        endpoint=work.environ.get("HF_ENDPOINT"),
        token=work.environ.get("HF_TOKEN"),
        python=paths.download_python(work.deployment),
    )
    # A branch is resolved once; `--from weights` resolves it again.
    inputs = digest("weights", spec.root, spec.repo, spec.revision)

    def check(record: Record) -> str | None:
        for node, one in looks.items():
            if one["weights"] is None or one["weights"]["manifest"] != record.data["manifest"]:
                return f"{node} does not see them"
            if one["weights"]["wrong"]:
                return f"{', '.join(one['weights']['wrong'][:3])} is not what was brought"
        return None

    async def apply() -> Done:
        made = await weights.up(work.nodes, spec, work.console)
        request = {"prefix": "-", "weights": made.folder, "count": False}
        seen = await call(work.nodes[0], "look.look", request)
        pinned = made.manifest
        text = f"{spec.repo} at {pinned.commit[:12]}: {len(pinned.files)} files, {told(pinned.size)}"
        now = f"{told(made.fetched)} brought now, by {len(work.nodes)} nodes" if made.fetched else ""
        manifest = (seen["weights"] or {}).get("manifest")
        return Done(text=text, now=now, data={"folder": made.folder, "commit": pinned.commit, "manifest": manifest})

    return await perform(work, "weights", inputs, check, apply)


async def _download(work: Work, looks: Looks) -> bool:
    """The environment that speaks with the Hub: huggingface_hub >= 1 and an engine's transformers exclude each other."""
    root = _root(work)
    lock = environment.download_lock()
    inputs = digest("download", root, lock, work.deployment.data.index, work.deployment.data.python, work.pairs)

    def check(record: Record) -> str | None:
        bad = [node for node, one in looks.items() if one["environments"].get("download") != record.data["id"]]
        return f"{bad[0]} does not see it" if bad else None

    async def apply() -> Done:
        spec = environment.Spec(
            root=root,
            lock=lock,
            index=work.deployment.data.index,
            source=work.deployment.data.python,
            mirror=work.deployment.data.python_mirror,
            engine="download",
            link="download",
            set_name="download",
        )
        made = await environment.up(work.nodes, spec, work.settings, work.console)
        return Done(text=f"environment for downloads {made.id[:12]} on {len(made.rows)} nodes", data={"id": made.id})

    return await perform(work, "download", inputs, check, apply)


# serving


@dataclass(frozen=True, kw_only=True)
class Served:
    """What answers, and how it was reached."""

    plan: Plan
    ray: ray.Outcome
    engine: engine.Outcome


async def plan_of(work: Work) -> Plan:
    """The plan of what was brought: the numbers of the model's own config.json on the share, at its commit.

    Raises:
        ConfigError, LayoutError: as deploy.planning.plan.make; HostError: config.json cannot be read on the head.
    """
    brought = work.keeper.state.data("weights")
    if not brought:
        raise ConfigError("the weights are not there yet", remedy="`deploy up` brings them")
    made = planning.make(work.deployment, work.facts, await _model_brought(work, brought))
    atomic_write(work.deployment.folder.path / "plan.json", made.model_dump_json(indent=1) + "\n")
    return made


async def _model_brought(work: Work, brought: Mapping[str, Any]) -> Model:
    data, commit = work.deployment.data.model, str(brought["commit"])
    if data.config:
        return models.from_file(_local(work, data.config), repo=data.repo, revision=commit)
    return await _model(work, f"{brought['folder']}/config.json", commit)


def _local(work: Work, name: str) -> Path:
    return work.deployment.path.parent / Path(name).expanduser()


async def _model(work: Work, path: str, commit: str) -> Model:
    head = work.deployment.head
    done = (await work.fleet.run(f"cat {shlex.quote(path)}", nodes=[head], timeout=60))[head.name]
    if not done.ok:
        raise HostError(f"{head}: {path} cannot be read: {done.stderr.strip()}", remedy="`deploy up --from weights`")
    return models.from_config(
        json.loads(done.stdout), repo=work.deployment.data.model.repo, revision=commit, source=f"{head.name}:{path}"
    )


async def serve(work: Work) -> Served:
    """Ray and the engine by the plan, from the environment that is active now; nothing is started twice.

    Raises:
        EngineError: with the first cause. Ray stays as it is when the engine fails; `down` ends both.
    """
    plan = await plan_of(work)
    seen = await glance(work.nodes[0], {"prefix": "-", "root": _root(work)})
    ray_spec = ray_spec_of(work, plan, seen["environments"].get("env") or "")
    started = await _ray(work, plan, ray_spec)
    answering = await _engine(work, plan, ray_spec)
    return Served(plan=plan, ray=started, engine=answering)


def ray_spec_of(work: Work, plan: Plan, environment_: str = "") -> ray.Spec:
    """How Ray is started and asked."""
    return ray.Spec(
        plan=plan,
        python=paths.program(work.deployment, "python"),
        environment=environment_,
        token=ray_token(work.deployment),
        wave=work.deployment.data.options.ray_wave,
    )


def ray_token(deployment: Deployment) -> str:
    """Ray's token, generated once, 0600."""
    path = deployment.folder.path / "ray-token"
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    token = secrets.token_hex(32)
    atomic_write(path, token + "\n")
    path.chmod(0o600)
    return token


def engine_spec_of(work: Work, plan: Plan, spec: ray.Spec) -> engine.Spec:
    """How the engine is started and asked."""
    key = engine.api_key(work.deployment.folder)
    head = work.nodes[0]

    async def nodes() -> engine.Nodes:
        return engine.by_name(plan, await ray.ask(head, spec))

    return engine.Spec(
        plan=plan,
        secrets=dict.fromkeys(plan.secret_env, key),
        nodes=nodes,
        environment=spec.environment,
        load=work.deployment.data.options.load_timeout,
        last=work.keeper.state.data("load"),
    )


async def _ray(work: Work, plan: Plan, spec: ray.Spec) -> ray.Outcome:
    work.keeper.begin("ray", plan.id)
    try:
        made = await ray.up(work.fleet, work.nodes, spec, work.console)
    except GracefarmError as error:
        work.keeper.end("ray", "failed", error.cause)
        raise
    text = f"{len(plan.nodes)} nodes, {made.gpus:g} GPUs at {ray.address(plan)}"
    work.keeper.end("ray", "done", text, {"plan": plan.id, "nodes": [one.name for one in plan.nodes]})
    work.console.step("ray", text if made.started else f"nothing to do: {text}")
    return made


async def _engine(work: Work, plan: Plan, ray_spec: ray.Spec) -> engine.Outcome:
    last = work.keeper.state.data("engine")
    spec = engine_spec_of(work, plan, ray_spec)
    work.keeper.begin("engine", plan.id)
    try:
        made = await engine.up(work.fleet, work.nodes[0], spec, work.console)
    except GracefarmError as error:
        work.keeper.end("engine", "failed", error.cause)
        raise
    if made.how == "started":  # kept when the engine is stopped: the next start is measured by it
        work.keeper.begin("load", plan.id)
        work.keeper.end("load", "done", "seconds of each phase of the last start", dict(made.phases))
    since = last.get("ready", time.time()) if made.how == "running" else time.time()
    text = f"{made.model} answers after {made.seconds:.0f} s" if made.how != "running" else f"{made.model} answers"
    port = engine.port(plan)
    work.keeper.end("engine", "done", text, {"plan": plan.id, "port": port, "model": made.model, "ready": since})
    work.console.step("engine", text if made.how != "running" else f"nothing to do: {text}")
    return made


async def down(work: Work, *, keep_ray: bool = False) -> dict[str, int]:
    """End the engine, then Ray, and look that nothing of ours is left; node to how many processes were ended.

    Raises:
        NodeError: something is left; SshError: a node was not reached. After everything on all others was stopped.
    """
    ended: dict[str, int] = {}
    bad: dict[str, GracefarmError] = {}
    works = [paths.ENGINE_JOB, *([] if keep_ray else [environment.JOBS, weights.JOB])]  # they clean up behind themselves
    for jobs, grace in ((works, 20.0), *(() if keep_ray else (([""], 5.0),))):
        found, failed = await ray.try_stop(work.nodes, work.fleet.mark, jobs=jobs, grace=grace)
        ended = {node: ended.get(node, 0) + found.get(node, 0) for node in {**ended, **found}}
        bad |= failed

    async def note(node: Node, job: str) -> None:
        """So that it counts as stopped, and that no stdin of a start that was cut off is left there."""
        try:
            await work.fleet.stop_job(node, job, grace=1)
        except GracefarmError as error:
            bad.setdefault(node.name, error)

    kept = [(work.deployment.head, paths.ENGINE_JOB)]
    kept += [] if keep_ray else [(node, job) for node in work.deployment.nodes for job in (paths.RAY_JOB, weights.JOB)]
    await asyncio.gather(*(note(node, job) for node, job in kept if node.name not in bad))
    work.keeper.forget("engine", *(() if keep_ray else ("ray",)))
    if bad:
        raise joined(bad, len(work.nodes))
    return ended


def key_variable(deployment: Deployment) -> str:
    """The engine's name for its key."""
    return engines.engine(deployment.data.engine).key_variable

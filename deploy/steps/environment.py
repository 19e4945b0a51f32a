"""The environment as an artifact: named by its content, built once, proven on every node, switched, rolled back, collected."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.results import on_all, try_all
from deploy.nodes import paths
from deploy.nodes.state import StepRecord, digest
from deploy.remote.wire import Json
from deploy.steps import setlock
from deploy.steps.step import Applied, Looks, Step, Undone, Work, end_jobs
from deploy.steps.uv import ensure_uv, pinned
from gracefarm import pins
from gracefarm.console import Console
from gracefarm.errors import ConfigError, InstallError
from gracefarm.settings import SharedSettings

SCHEMA = 1
"Part of every id: another way of building is another environment."
JOBS = "build-"
"How the names of the detached jobs begin, one for each link."
PythonSource = Literal["system", "managed", "conda"]


class Module(BaseModel):
    """One import of the matrix; `gpu`: skipped, with the reason, where no GPU can be used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    gpu: bool = False
    code: str | None = None
    "Instead of `import MODULE`."


class Matrix(BaseModel):
    """What must work on every node before an engine's environment becomes active."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: tuple[Module, ...]
    commands: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """An environment to be had."""

    root: str
    "Our folder on the shared file system."
    lock: str
    "Text of requirements.lock: every wheel with its sha256."
    index: str | None
    "Simple API that serves them; None: what uv on the node takes by itself."
    python: str = "3.11"
    source: PythonSource = "system"
    mirror: str | None = None
    "Of managed Pythons; None: where uv takes them from by itself."
    engine: str = "aphrodite"
    link: Literal["env", "download"] = "env"
    set_name: str = ""
    seconds: float = 600
    "For each import: the first one over a network file system is slow."


@dataclass(frozen=True, kw_only=True)
class Built:
    """What was done: its id, whether it was built now and whether it became active now."""

    id: str
    built: bool
    switched: bool
    rows: Mapping[str, Sequence[Json]]
    "Node to the rows of its import matrix."


def matrix(engine: str) -> Matrix:
    """The modules and commands of an engine (deploy/data/imports.toml).

    Raises:
        ConfigError: the engine is not known there.
    """
    table = tomllib.loads((resources.files("deploy") / "data" / "imports.toml").read_text())
    if engine not in table:
        raise ConfigError(f"no import matrix for engine {engine!r}", remedy=f"known: {', '.join(sorted(table))}")
    return Matrix.model_validate(table[engine])


def identity(lock: str, *, python: str, source: str, machine: str) -> str:
    """The name of an environment: its pins and digests, its Python and its machine; comments and order do not enter it."""
    lines = sorted(pin.text for pin in pins.parse(lock, "the lock", remedy="every line needs --hash=sha256:…"))
    content = json.dumps([SCHEMA, lines, python, source, machine])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def spec_of(work: Work) -> EnvironmentSpec:
    """The environment that serves. Raises ConfigError, FetchError: there is no lock, or one without the engine."""
    lock = setlock.lock_text(work.deployment, work.console)
    setlock.require_engine(work.deployment, lock)
    return spec_with_lock(work, lock, engine=work.deployment.matrix, link="env", set_name=work.deployment.data.set)


def spec_with_lock(work: Work, lock: str, *, engine: str, link: Literal["env", "download"], set_name: str) -> EnvironmentSpec:
    """An environment of this deployment: its folder, index and Python are those of deploy.toml.

    Raises:
        ConfigError: uv is to bring a Python whose digest is not pinned.
    """
    data = work.deployment.data
    brought = str(pinned()["python"])
    if data.python == "managed" and not brought.startswith(f"{data.python_version}."):
        raise ConfigError(
            f"uv brings Python {brought} alone, and deploy.toml asks for {data.python_version}",
            remedy='set python = "system" where every node has it, or "conda"',
        )
    return EnvironmentSpec(
        root=work.environment_root,
        lock=lock,
        index=data.index,
        python=data.python_version,
        source=data.python,
        mirror=data.python_mirror,
        engine=engine,
        link=link,
        set_name=set_name,
    )


class EnvironmentStep(Step):
    """The environment of the set's lock, active on all nodes."""

    name = "environment"

    def inputs(self, work: Work, looks: Looks) -> str:
        """The lock, its index, its Python and the nodes."""
        spec = spec_of(work)
        return digest("environment", spec.root, spec.lock, spec.index, spec.python, spec.source, spec.engine, work.inventory)

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str | None:
        """Active everywhere."""
        for node, seen in looks.items():
            if seen["environments"].get("env") != record.data["id"]:
                return f"{node} does not see it, or another one is active"
        return None

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Build, prove, switch."""
        built = await build_and_activate(work.nodes, spec_of(work), work.settings, work.console)
        count = sum("error" not in row and "skipped" not in row for rows in built.rows.values() for row in rows)
        text = f"{built.id[:12]} is active, {count} imports on {len(built.rows)} nodes"
        return Applied(text=text, now="built now" if built.built else "", data={"id": built.id})

    async def undo(self, work: Work) -> Undone:
        """End builds, and remove what they had half made; the environment stays."""
        ended, failed = await end_jobs(work, JOBS, grace=20)
        head = work.nodes[0]
        if head.name not in failed and work.deployment.data.share is not None:
            _swept, bad = await try_all([head], lambda node: call(node, "environment.sweep", {"root": work.environment_root}))
            failed |= bad
        return ended, failed


async def claim(work: Work) -> None:
    """The environments below this deployment's name are its own: another of the same name would switch them under it.

    Raises:
        ConfigError: another deployment on this share has the name.
    """
    owner = (await call(work.nodes[0], "environment.claim", {"root": work.environment_root, "owner": work.fleet.mark}))[
        "owner"
    ]
    if owner != work.fleet.mark:
        share, name, root = paths.share(work.deployment), work.deployment.name, work.environment_root
        raise ConfigError(
            f"another deployment on {share} is called {name}: {root} is of {owner}, this one is {work.fleet.mark}",
            remedy=f'name = "…" in deploy.toml; or, where that one is gone for good: `deploy run -k head -- rm {root}/owner`',
        )


async def roll_back(work: Work) -> Json:
    """The environment that was active before; `up` leaves it active until its inputs change or `env up` is said.

    Raises:
        HostError: there is none.
    """
    await claim(work)
    answer = await call(work.nodes[0], "environment.roll_back", {"root": work.environment_root, "link": "env"})
    step = EnvironmentStep()
    work.keeper.begin(step.name, step.inputs(work, {}))
    work.keeper.end(step.name, "done", f"{answer['active'][:12]} is active, rolled back to", {"id": answer["active"]})
    return answer


async def build_and_activate(
    targets: Sequence[RemoteNode], spec: EnvironmentSpec, settings: SharedSettings, console: Console
) -> Built:
    """Build it on the first node unless it is there, import it on all, and only then make it active.

    Raises:
        InstallError: the index lacks a file, or a node cannot import what was built: the active one stays.
        DigestError: the index gave other bytes than the lock names.
        HostError: a node does not see the environment, or has no such Python.
    """
    head = targets[0]
    wanted = str(pinned()["python"]) if spec.source == "managed" else spec.python
    about = await call(head, "environment.about", {"python": wanted, "source": spec.source})
    identifier = identity(spec.lock, python=about["python"], source=spec.source, machine=about["machine"])
    folder = f"{spec.root}/envs/{identifier}"
    listed = await call(head, "environment.listing", {"root": spec.root})
    built = False
    if identifier not in [environment["id"] for environment in listed["environments"]]:
        request = {
            "root": spec.root,
            "id": identifier,
            "lock": spec.lock,
            "packages": [f"{pin.name}=={pin.version}" for pin in pins.parse(spec.lock, "the lock")],
            "index": spec.index,
            "python": {"source": spec.source, "version": wanted, "mirror": spec.mirror},
            "uv": await ensure_uv(head, about, settings),
            "engine": spec.engine,
            "set": spec.set_name,
        }
        job = f"{JOBS}{spec.link}"
        answer = await call(
            head, "environment.build", request, job=job, on_event=lambda event: _tell(console, head.name, event)
        )
        built = bool(answer["built"])
        if built:
            console.step(spec.link, f"{identifier[:12]} built on {head.name} in {answer['build_s']:.0f} s")
    rows = await prove(targets, folder, matrix(spec.engine), spec.seconds)
    switched = await call(head, "environment.switch", {"root": spec.root, "link": spec.link, "id": identifier})
    return Built(id=identifier, built=built, switched=switched["switched"], rows=rows)


async def prove(targets: Sequence[RemoteNode], folder: str, wanted: Matrix, seconds: float) -> dict[str, list[Json]]:
    """Every import and command on every node.

    Raises:
        InstallError: with every node and module that failed.
    """

    request = {
        "environment": folder,
        "modules": [module.model_dump() for module in wanted.modules],
        "commands": [list(command) for command in wanted.commands],
        "seconds": seconds,
    }
    answers = await on_all(targets, lambda node: call(node, "environment.matrix", request))
    rows = {node: answer["rows"] for node, answer in answers.items()}
    bad = [f"{node}: {row['name']}: {row['error']}" for node, tried in rows.items() for row in tried if "error" in row]
    if bad:
        raise InstallError(
            f"the environment does not work everywhere: {'; '.join(bad[:4])}" + ("; …" if len(bad) > 4 else ""),
            remedy="it was not made active; `deploy env matrix` shows every row, and `deploy preflight` what a node lacks",
        )
    return rows


async def listing(targets: Sequence[RemoteNode], root: str) -> Json:
    """Finished environments, newest first; half-built ones."""
    return await call(targets[0], "environment.listing", {"root": root})


async def collect(targets: Sequence[RemoteNode], root: str, *, keep: int = 2, grace: float = 3600) -> Json:
    """Remove old environments that no process on any node runs from. A node that cannot be asked stops it.

    `keep`: generations that stay for a roll-back; `grace`: seconds for which a new one stays though it is not active yet.
    """
    answers = await on_all(targets, lambda node: call(node, "environment.users", {"root": root}))
    used = sorted({identifier for answer in answers.values() for identifier in answer["used"]})
    return await call(targets[0], "environment.collect", {"root": root, "used": used, "keep": keep, "grace": grace})


def _tell(console: Console, node: str, event: Json) -> None:
    if event["event"] == "step":
        console.step("env", f"{node}: {event['text']}")
    elif event["event"] == "wait":
        console.step("wait", f"{node}: it is being built already ({event['owner']}); waiting for it")

"""Environments: named by their content, built once, tested on every node, activated, rolled back, garbage-collected."""

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
"Part of every id. Increase it when environments are built in a different way."
JOBS = "build-"
"Prefix of the names of the detached jobs. There is one job for each link."
PythonSource = Literal["system", "managed", "conda"]


class Module(BaseModel):
    """One import of the matrix. `gpu`: skipped, with the reason, on nodes without a usable GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    gpu: bool = False
    code: str | None = None
    "Code to run instead of `import MODULE`."


class Matrix(BaseModel):
    """Imports and commands that must work on every node before the environment of an engine is activated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: tuple[Module, ...]
    commands: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """A requested environment."""

    root: str
    "Folder of the environments on the shared file system."
    lock: str
    "Text of requirements.lock: every wheel with its sha256."
    index: str | None
    "Simple API that serves the wheels; None: the default index of uv."
    python: str = "3.11"
    source: PythonSource = "system"
    mirror: str | None = None
    "Mirror of managed Pythons; None: the default of uv."
    engine: str = "aphrodite"
    link: Literal["env", "download"] = "env"
    set_name: str = ""
    seconds: float = 600
    "Timeout of each import. The first one over a network file system is slow."


@dataclass(frozen=True, kw_only=True)
class Built:
    """The result: the id, whether the environment was built now, and whether it was activated now."""

    id: str
    built: bool
    switched: bool
    rows: Mapping[str, Sequence[Json]]
    "Rows of the import matrix by node."


def matrix(engine: str) -> Matrix:
    """The modules and commands of an engine (deploy/data/imports.toml).

    Raises:
        ConfigError: the engine has no entry there.
    """
    table = tomllib.loads((resources.files("deploy") / "data" / "imports.toml").read_text())
    if engine not in table:
        raise ConfigError(
            f"gracefarm has no import tests for the engine {engine!r}",
            remedy=f"set engine in deploy.toml to one of: {', '.join(sorted(table))}",
        )
    return Matrix.model_validate(table[engine])


def identity(lock: str, *, python: str, source: str, machine: str) -> str:
    """The id of an environment, from its pins, digests, Python and architecture. Comments and order of pins are ignored."""
    lines = sorted(
        pin.text for pin in pins.parse(lock, "the lock", remedy="add --hash=sha256:DIGEST to every line of the lock")
    )
    content = json.dumps([SCHEMA, lines, python, source, machine])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def spec_of(work: Work) -> EnvironmentSpec:
    """The environment that serves. Raises ConfigError, FetchError if there is no lock, or it does not have the engine."""
    lock = setlock.lock_text(work.deployment, work.console)
    setlock.require_engine(work.deployment, lock)
    return spec_with_lock(work, lock, engine=work.deployment.matrix, link="env", set_name=work.deployment.data.set)


def spec_with_lock(work: Work, lock: str, *, engine: str, link: Literal["env", "download"], set_name: str) -> EnvironmentSpec:
    """An environment with this lock, and with the folder, index and Python of deploy.toml.

    Raises:
        ConfigError: the version of the managed Python is not pinned.
    """
    data = work.deployment.data
    brought = str(pinned()["python"])
    if data.python == "managed" and not brought.startswith(f"{data.python_version}."):
        raise ConfigError(
            f"deploy.toml requires Python {data.python_version}, but uv installs only {brought}",
            remedy='set python = "system" if every node has this version, or python = "conda"',
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
        """Check that the environment is active on all nodes."""
        for node, seen in looks.items():
            if seen["environments"].get("env") != record.data["id"]:
                return f"it is not active on {node}"
        return None

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Build, test and activate the environment."""
        built = await build_and_activate(work.nodes, spec_of(work), work.settings, work.console)
        count = sum("error" not in row and "skipped" not in row for rows in built.rows.values() for row in rows)
        text = f"{built.id[:12]} is active, {count} imports tested on {len(built.rows)} nodes"
        return Applied(text=text, now="built now" if built.built else "", data={"id": built.id})

    async def undo(self, work: Work) -> Undone:
        """Stop builds and remove their partial files. The active environment stays."""
        ended, failed = await end_jobs(work, JOBS, grace=20)
        head = work.nodes[0]
        if head.name not in failed and work.deployment.data.share is not None:
            _swept, bad = await try_all([head], lambda node: call(node, "environment.sweep", {"root": work.environment_root}))
            failed |= bad
        return ended, failed


async def claim(work: Work) -> None:
    """Claim the folder of this deployment's environments, so that another deployment of this name cannot change them.

    Raises:
        ConfigError: another deployment on this shared folder has the same name.
    """
    owner = (await call(work.nodes[0], "environment.claim", {"root": work.environment_root, "owner": work.fleet.mark}))[
        "owner"
    ]
    if owner != work.fleet.mark:
        share, name, root = paths.share(work.deployment), work.deployment.name, work.environment_root
        raise ConfigError(
            f"another deployment on {share} has the name {name}: {root} belongs to {owner}, but this deployment is "
            f"{work.fleet.mark}",
            remedy="set a different name in deploy.toml; if the other deployment no longer exists, run `deploy run -k "
            f"head -- rm {root}/owner`",
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
    work.keeper.end(step.name, "done", f"{answer['active'][:12]} is active after a rollback", {"id": answer["active"]})
    return answer


async def build_and_activate(
    targets: Sequence[RemoteNode], spec: EnvironmentSpec, settings: SharedSettings, console: Console
) -> Built:
    """Build the environment on the first node unless it exists, test it on all nodes, and then activate it.

    Raises:
        InstallError: a file is missing on the index, or an import fails on a node. The active environment is not changed.
        DigestError: a file on the index has another digest than in the lock.
        HostError: a node does not see the environment, or does not have this Python.
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
            head, "environment.build", request, job=job, on_event=lambda event: _tell(console, spec.link, head.name, event)
        )
        built = bool(answer["built"])
        if built:
            console.step(spec.link, f"{identifier[:12]} built on {head.name} in {answer['build_s']:.0f} s")
    rows = await prove(targets, folder, matrix(spec.engine), spec.seconds)
    switched = await call(head, "environment.switch", {"root": spec.root, "link": spec.link, "id": identifier})
    return Built(id=identifier, built=built, switched=switched["switched"], rows=rows)


async def prove(targets: Sequence[RemoteNode], folder: str, wanted: Matrix, seconds: float) -> dict[str, list[Json]]:
    """Run every import and command on every node.

    Raises:
        InstallError: some failed; with the nodes and modules.
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
            f"tests of the environment failed: {'; '.join(bad[:4])}" + ("; …" if len(bad) > 4 else ""),
            remedy="check these nodes with `deploy preflight`, then repeat the command; a new environment becomes active only "
            "if all its tests pass on all nodes",
        )
    return rows


async def listing(targets: Sequence[RemoteNode], root: str) -> Json:
    """List the complete environments, newest first, and the partial ones."""
    return await call(targets[0], "environment.listing", {"root": root})


async def collect(targets: Sequence[RemoteNode], root: str, *, keep: int = 2, grace: float = 3600) -> Json:
    """Remove old environments that no process on any node uses. Fails if a node cannot be reached.

    `keep`: number of generations to keep for a rollback. `grace`: seconds to keep a new environment that is not active yet.
    """
    answers = await on_all(targets, lambda node: call(node, "environment.users", {"root": root}))
    used = sorted({identifier for answer in answers.values() for identifier in answer["used"]})
    return await call(targets[0], "environment.collect", {"root": root, "used": used, "keep": keep, "grace": grace})


def _tell(console: Console, link: str, node: str, event: Json) -> None:
    """Report an event with the name of the environment, since two environments are built in parallel."""
    if event["event"] == "step":
        console.step(link, f"{node}: {event['text']}")
    elif event["event"] == "wait":
        console.step(link, f"{node}: another process builds this environment ({event['owner']}); waiting for it")

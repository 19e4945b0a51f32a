"""Checks every node and the network between all pairs of nodes. The only change on a node is a nonce, which is removed."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.forwarding import ForwardingError, require_forwarding
from deploy.fleet.results import try_all
from deploy.nodes import paths
from deploy.nodes.deployment import Deployment
from deploy.nodes.state import StepRecord, digest
from deploy.remote.wire import Json
from deploy.steps.preflight_checks import CellStatus, Expected, NodeCheck, Pairs, Survey, judge, tokenless
from deploy.steps.processes import of_job, raylet
from deploy.steps.step import Applied, Looks, Step, Work
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, PreflightError

ORDER = (
    *("reach", "tunnel", "names", "disk", "share", "route", "ports", "clock", "python", "token"),
    *("cuda", "memory", "pages", "libstdc++", "shm", "limits", "gloo", "nccl"),
)
KNOCK = 3.0
"Seconds to wait for an answer of a port that should not be reachable."


@dataclass(frozen=True, kw_only=True)
class PreflightSpec:
    """The input of the checks."""

    share: str | None
    root: str | None
    "The folder of the environments; its `env` is the active one."
    ports: Sequence[int]
    "TCP ports that must be free on every node and reachable from every other node."
    collective_port: int
    loopback: Mapping[str, Sequence[int]] = field(default_factory=dict)
    "Ports that must be free on the loopback, by node."
    ours: Sequence[str] = ()
    rehearsal: bool = False
    public: Mapping[str, str] = field(default_factory=dict)
    "Public address for ssh, by node. If Ray has no token, this machine tries to reach Ray's ports there."
    ray_ports: Sequence[int] = ()
    python: str = "system"
    "Python of the environments, from deploy.toml."
    local: str = "/tmp"  # noqa: S108 - only checked, not used
    "The deployment's folder on each node's local disk; {user} and {node} are replaced."
    seconds: float = 15
    "How long the nodes of a pair wait for each other."


def boots(looks: Looks) -> dict[str, str]:
    """The boot id of each node."""
    return {node: str(seen["boot"]) for node, seen in looks.items()}


def _mounted(seen: Json) -> str | None:
    """Kind and source of the shared folder's file system. It changes if the mount is lost and only its mount point is left."""
    return f"{seen['share']['kind']} {seen['share']['source']}" if seen["share"] else None


class PreflightStep(Step):
    """Runs every check, before anything is downloaded."""

    name = "preflight"

    def inputs(self, work: Work, looks: Looks) -> str:
        """The nodes, the shared folder and the ports."""
        data = work.deployment.data
        return digest("preflight", work.inventory, data.share, data.ports.model_dump(), data.options.rehearsal, data.python)

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str | None:
        """Check that no node was rebooted and the shared folder is still mounted."""
        share = work.deployment.data.share
        for node, seen in looks.items():
            if share and _mounted(seen) != record.data.get("shares", {}).get(node):
                return f"{share} is not mounted on {node}, or is mounted from a different source"
            if record.data["boots"].get(node) != seen["boot"]:
                return f"{node} was rebooted"
        return None

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Run the checks."""
        cells = await cells_of(work, looks)
        tell(work.console, cells)
        require(cells)
        shares = {node: _mounted(seen) for node, seen in looks.items()}
        return Applied(text=summary(cells), data={"boots": boots(looks), "shares": shares})


async def cells_of(work: Work, looks: Looks) -> list[NodeCheck]:
    """The results of all checks on every node and pair."""
    cells = await run(work.nodes, spec_of(work.deployment, looks))
    return [*await tunnel(work), *without_ours(cells, looks)]


def tell(console: Console, cells: Sequence[NodeCheck], told: Collection[str] = ()) -> None:
    """Print a warning for each cell that is not green.

    Not printed are the first red cell, which becomes the error, and yellow cells of the checks in `told`.
    """
    error = next((cell for cell in cells if cell.status == "bad"), None)
    nodes_of: dict[str, list[str]] = {}
    for cell in cells:
        if (cell.status == "bad" and cell is not error) or (cell.status == "warn" and cell.check not in told):
            text = f"{cell.check}: {cell.text}" + (f"; {cell.remedy}" if cell.remedy else "")
            nodes_of.setdefault(text, []).append(cell.node)
    for text, nodes in nodes_of.items():
        console.warn(f"{', '.join(nodes)}: {text}")


async def tunnel(work: Work) -> list[NodeCheck]:
    """Check that the head's sshd forwards to the engine's port. The result is empty if the head cannot be reached."""
    head = work.deployment.head
    try:
        await require_forwarding(work.fleet, head, work.deployment.data.ports.engine)
    except ForwardingError as error:
        return [NodeCheck(check="tunnel", node=head.name, status="bad", text=error.cause, remedy=error.remedy)]
    except GracefarmError:
        return []  # the check `reach` has the reason
    return [NodeCheck(check="tunnel", node=head.name, status="ok", text="sshd forwards to the engine's port")]


def without_ours(cells: Sequence[NodeCheck], looks: Looks) -> list[NodeCheck]:
    """The cells. Checks of the GPUs' memory are skipped if our own Ray or engine is running and uses the GPUs."""
    if not any(raylet(seen) or of_job(seen, paths.ENGINE_JOB) for seen in looks.values()):
        return list(cells)
    text = "not checked: this deployment's Ray or engine is running"
    ours = ("memory", "nccl")
    return [replace(cell, status="skipped", text=text, remedy="") if cell.check in ours else cell for cell in cells]


def spec_of(deployment: Deployment, looks: Looks) -> PreflightSpec:
    """The checks of a deployment."""
    data, ports = deployment.data, deployment.data.ports
    running = any(raylet(seen) for seen in looks.values())
    of_ray = (ports.ray, ports.object_manager, ports.node_manager, ports.agent, ports.agent_grpc, ports.metrics)
    # Workers use a thousand ports. Only the first, the middle and the last one are tried.
    workers = (ports.workers_from, (ports.workers_from + ports.workers_to) // 2, ports.workers_to)
    return PreflightSpec(
        share=data.share,
        root=paths.environment_root(deployment),
        ports=tuple(dict.fromkeys((*of_ray, ports.runtime_env, *workers, ports.store, ports.engine_store))),
        loopback={deployment.head.name: (ports.dashboard,)},
        collective_port=ports.store,
        ours=(f"{paths.root(deployment)}/", *(("ray::",) if running else ())),
        rehearsal=data.options.rehearsal,
        public=public(deployment),
        ray_ports=(ports.ray, ports.object_manager, ports.node_manager),
        python=data.python,
        local=data.local,
    )


def public(deployment: Deployment) -> dict[str, str]:
    """Nodes that ssh reaches directly at a public address, by address or host name."""
    addresses = {}
    for node in deployment.nodes:
        with suppress(OSError):
            places = [] if node.jump else socket.getaddrinfo(node.address, node.port, proto=socket.IPPROTO_TCP)
            if any(ipaddress.ip_address(str(place[4][0]).partition("%")[0]).is_global for place in places):
                addresses[node.name] = node.address
    return addresses


def summary(cells: Sequence[NodeCheck]) -> str:
    """Number of checks, and of their results."""
    count = Counter(cell.status for cell in cells)
    nodes = len({cell.node for cell in cells})
    words: dict[CellStatus, str] = {"warn": "yellow", "bad": "red", "skipped": "skipped"}
    parts = [f"{count['ok']} green", *(f"{count[status]} {word}" for status, word in words.items() if count[status])]
    return f"{len({cell.check for cell in cells})} checks on {nodes} nodes: {', '.join(parts)}"


async def run(targets: Sequence[RemoteNode], spec: PreflightSpec) -> list[NodeCheck]:
    """Run every check on every node. The results are sorted by ORDER and by the order of the nodes."""
    name = secrets.token_hex(8)
    nonces = {node.name: secrets.token_hex(16) for node in targets}

    async def survey(node: RemoteNode) -> Survey:
        request = {
            "share": spec.share,
            "run": name,
            "me": node.name,
            "nonce": nonces[node.name],
            "environment": f"{spec.root}/env" if spec.root else None,
            "local": spec.local.replace("{node}", node.name),
        }
        return Survey.model_validate(await call(node, "preflight.survey", request))

    surveys, deaf = await try_all(targets, survey)
    there = [node for node in targets if node.name in surveys]

    async def pairs(node: RemoteNode) -> Pairs:
        request = {
            "me": node.name,
            "address": node.address,
            "ports": list(spec.ports),
            "loopback": list(spec.loopback.get(node.name, ())),
            "peers": [{"name": peer.name, "address": peer.address} for peer in there if peer is not node],
            "share": spec.share,
            "run": name,
            "seconds": spec.seconds,
        }
        return Pairs.model_validate(await call(node, "preflight.pairs", request))

    heard, silent = await try_all(there, pairs)
    cells = [_unreached(name, error) for name, error in {**deaf, **silent}.items()]
    expected = Expected(
        addresses={node.name: node.address for node in targets},
        share=spec.share,
        gpus={node.name: node.gpus for node in targets},
        nonces={node.name: nonces[node.name] for node in there},
        ours=spec.ours,
        rehearsal=spec.rehearsal,
        open=await reached([node for node in there if _tokenless(surveys[node.name])], spec),
        python=spec.python,
    )
    cells += judge(surveys, heard, expected)
    answering = [node for node in there if node.name in heard]
    cells += await collectives(answering, spec, {name: survey for name, survey in surveys.items() if name in heard})
    if spec.share and there:
        await try_all(there[:1], lambda node: call(node, "preflight.clean", {"share": spec.share, "run": name}))
    place = {node.name: index for index, node in enumerate(targets)}
    return sorted(cells, key=lambda cell: (ORDER.index(cell.check), place[cell.node]))


def _tokenless(survey: Survey) -> bool:
    return bool(survey.environment and survey.environment.ray and tokenless(survey.environment.ray))


async def reached(targets: Sequence[RemoteNode], spec: PreflightSpec) -> dict[str, str]:
    """Nodes with a port of Ray that this machine reaches at the public address, and the port. Ports in use are not tried."""

    async def listen(node: RemoteNode) -> str | None:
        nonce = secrets.token_hex(16)
        tries: list[asyncio.Future[int | None]] = []

        def listening(event: Json) -> None:
            free = [port for port in spec.ray_ports if str(port) not in event["taken"]]
            tries.extend(asyncio.ensure_future(knock(spec.public[node.name], port, nonce)) for port in free)

        request = {"ports": list(spec.ray_ports), "nonce": nonce, "seconds": KNOCK + 1}
        await call(node, "preflight.outside", request, on_event=listening)
        open_ports = await asyncio.gather(*tries)
        return next((f"{spec.public[node.name]}:{port}" for port in open_ports if port), None)

    asked = [node for node in targets if node.name in spec.public]
    good, _bad = await try_all(asked, listen)  # a node that does not answer has a red cell for that
    return {node: place for node, place in good.items() if place}


async def knock(address: str, port: int, nonce: str) -> int | None:
    """The port if this node answers with the nonce, else None. An accepted connection is not sufficient."""
    try:
        async with asyncio.timeout(KNOCK):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(b"gracefarm outside\n")
                return port if await reader.readexactly(len(nonce)) == nonce.encode() else None
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return None


def _unreached(node: str, error: GracefarmError) -> NodeCheck:
    return NodeCheck(check="reach", node=node, status="bad", text=error.cause.removeprefix(f"{node}: "), remedy=error.remedy)


async def collectives(targets: Sequence[RemoteNode], spec: PreflightSpec, surveys: dict[str, Survey]) -> list[NodeCheck]:
    """Run an all-reduce over all nodes in the active environment: gloo on the hosts, NCCL on the GPUs."""
    cells = []
    bare = [node.name for node in targets if surveys[node.name].environment is None]
    gpus = [node for node in targets if surveys[node.name].cuda.gpus]
    for backend, ranks in (("gloo", targets), ("nccl", gpus)):
        reason = None
        if bare:
            reason = "no environment is active yet: run `deploy env up`"
        elif len(ranks) < 2:
            reason = "there is only one node" if backend == "gloo" else "fewer than two nodes have a usable GPU"
        left_out = [node for node in targets if reason or node not in ranks]
        cells += [
            NodeCheck(check=backend, node=node.name, status="skipped", text=reason or "no usable GPU on this node")
            for node in left_out
        ]
        if not reason:
            cells += await all_reduce(ranks, spec, backend)
    return cells


async def all_reduce(targets: Sequence[RemoteNode], spec: PreflightSpec, backend: str) -> list[NodeCheck]:
    """Run an all-reduce with `gloo` or `nccl`. Return one cell for each node."""
    names = [target.name for target in targets]

    async def rank(node: RemoteNode) -> Json:
        request = {
            "backend": backend,
            "rank": names.index(node.name),
            "world": len(targets),
            "master": targets[0].address,
            "port": spec.collective_port,
            "address": node.address,
            "device": 0 if backend == "nccl" else None,
            "seconds": 60,
        }
        return await call(node, "preflight.collective", request, python=f"{spec.root}/env/bin/python")

    good, bad = await try_all(targets, rank)
    times = {node: f"{took['all_reduce_s'] * 1e3:.0f} ms for 4 MiB over {took['interface']}" for node, took in good.items()}
    cells = [NodeCheck(check=backend, node=node, status="ok", text=text) for node, text in times.items()]
    for node, error in bad.items():
        cause = error.cause.removeprefix(f"{node}: ")
        if "torch cannot be imported" in cause:
            cells.append(NodeCheck(check=backend, node=node, status="skipped", text=cause))
        else:
            remedy = (
                error.remedy
                or "check the rows `names`, `route` and `ports` of `deploy preflight`, which usually show the cause"
            )
            cells.append(NodeCheck(check=backend, node=node, status="bad", text=cause, remedy=remedy))
    return cells


def require(cells: Sequence[NodeCheck]) -> None:
    """Raise PreflightError with the first red cell, if there is one."""
    bad = [cell for cell in cells if cell.status == "bad"]
    if bad:
        first = bad[0]
        more = f"; {len(bad) - 1} more failed" if len(bad) > 1 else ""
        raise PreflightError(f"{first.node}: {first.check}: {first.text}{more}", remedy=first.remedy)

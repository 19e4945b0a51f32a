"""Ask every node, let every pair talk, judge: nothing is changed on a node but a nonce, which is removed again."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deploy.fleet.calls import Json, Target, call, try_all
from deploy.steps.preflight_checks import Cell, Expected, Pairs, Survey, judge, tokenless
from gracefarm.errors import GracefarmError, PreflightError

ORDER = (
    *("reach", "names", "share", "route", "ports", "clock", "python", "token"),
    *("cuda", "memory", "pages", "libstdc++", "shm", "limits", "gloo", "nccl"),
)
KNOCK = 3.0
"Seconds in which a port that is open to everybody answers."


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is asked."""

    share: str | None
    root: str | None
    "Where our folders are on the shared folder; its `env` is the active environment."
    ports: Sequence[int]
    "TCP ports that every node must have free and every other node must reach."
    collective_port: int
    loopback: Mapping[str, Sequence[int]] = field(default_factory=dict)
    "Node to ports that it must have free on its loopback."
    ours: Sequence[str] = ()
    rehearsal: bool = False
    public: Mapping[str, str] = field(default_factory=dict)
    "Node to the public address that ssh reaches it by: Ray's ports are tried there from here, where Ray asks for no token."
    ray_ports: Sequence[int] = ()
    python: str = "system"
    "What environments are to stand on, as deploy.toml says."
    seconds: float = 15
    "How long pairs wait for each other."


async def run(targets: Sequence[Target], spec: Spec) -> list[Cell]:
    """Every check on every node, in the order of ORDER and the inventory."""
    name = secrets.token_hex(8)
    nonces = {one.name: secrets.token_hex(16) for one in targets}

    async def survey(node: Target) -> Survey:
        request = {
            "share": spec.share,
            "run": name,
            "me": node.name,
            "nonce": nonces[node.name],
            "environment": f"{spec.root}/env" if spec.root else None,
        }
        return Survey.model_validate(await call(node, "preflight.survey", request))

    surveys, deaf = await try_all(targets, survey)
    there = [one for one in targets if one.name in surveys]

    async def pairs(node: Target) -> Pairs:
        request = {
            "me": node.name,
            "address": node.address,
            "ports": list(spec.ports),
            "loopback": list(spec.loopback.get(node.name, ())),
            "peers": [{"name": one.name, "address": one.address} for one in there if one is not node],
            "share": spec.share,
            "run": name,
            "seconds": spec.seconds,
        }
        return Pairs.model_validate(await call(node, "preflight.pairs", request))

    found, silent = await try_all(there, pairs)
    cells = [_unreached(node, error) for node, error in {**deaf, **silent}.items()]
    expected = Expected(
        addresses={one.name: one.address for one in targets},
        share=spec.share,
        gpus={one.name: one.gpus for one in targets},
        nonces={one.name: nonces[one.name] for one in there},
        ours=spec.ours,
        rehearsal=spec.rehearsal,
        open=await reached([one for one in there if _tokenless(surveys[one.name])], spec),
        python=spec.python,
    )
    cells += judge(surveys, found, expected)
    answering = [one for one in there if one.name in found]
    cells += await collectives(answering, spec, {node: one for node, one in surveys.items() if node in found})
    if spec.share and there:
        await try_all(there[:1], lambda node: call(node, "preflight.clean", {"share": spec.share, "run": name}))
    place = {one.name: index for index, one in enumerate(targets)}
    return sorted(cells, key=lambda one: (ORDER.index(one.check), place[one.node]))


def _tokenless(one: Survey) -> bool:
    return bool(one.environment and one.environment.ray and tokenless(one.environment.ray))


async def reached(targets: Sequence[Target], spec: Spec) -> dict[str, str]:
    """Nodes that let this machine in at a port of Ray's over their public address, and where. A port in use is not asked."""

    async def one(node: Target) -> str | None:
        nonce = secrets.token_hex(16)
        tries: list[asyncio.Future[int | None]] = []

        def listening(event: Json) -> None:
            free = [port for port in spec.ray_ports if str(port) not in event["taken"]]
            tries.extend(asyncio.ensure_future(_knock(spec.public[node.name], port, nonce)) for port in free)

        request = {"ports": list(spec.ray_ports), "nonce": nonce, "seconds": KNOCK + 1}
        await call(node, "preflight.outside", request, on_event=listening)
        found = await asyncio.gather(*tries)
        return next((f"{spec.public[node.name]}:{port}" for port in found if port), None)

    asked = [one for one in targets if one.name in spec.public]
    good, _bad = await try_all(asked, one)  # a node that does not answer has its own red cell
    return {node: place for node, place in good.items() if place}


async def _knock(address: str, port: int, nonce: str) -> int | None:
    """The port, where this very node answers; else None: what takes any connection is no proof."""
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


def _unreached(node: str, error: GracefarmError) -> Cell:
    return Cell(check="reach", node=node, status="bad", text=error.cause.removeprefix(f"{node}: "), remedy=error.remedy)


async def collectives(targets: Sequence[Target], spec: Spec, surveys: dict[str, Survey]) -> list[Cell]:
    """An all-reduce over all nodes at once, in the environment that will serve: gloo on the hosts, NCCL on the GPUs."""
    cells = []
    bare = [one.name for one in targets if surveys[one.name].environment is None]
    gpus = [one for one in targets if surveys[one.name].cuda.gpus]
    for backend, ranks in (("gloo", targets), ("nccl", gpus)):
        reason = None
        if bare:
            reason = "no environment is active yet: `deploy env up` brings torch"
        elif len(ranks) < 2:
            reason = "there is one node alone" if backend == "gloo" else "fewer than two nodes have a usable GPU"
        left_out = [one for one in targets if reason or one not in ranks]
        cells += [
            Cell(check=backend, node=one.name, status="skipped", text=reason or "no usable GPU on this node")
            for one in left_out
        ]
        if not reason:
            cells += await _collective(ranks, spec, backend)
    return cells


async def _collective(targets: Sequence[Target], spec: Spec, backend: str) -> list[Cell]:
    async def rank(node: Target) -> Json:
        request = {
            "backend": backend,
            "rank": [one.name for one in targets].index(node.name),
            "world": len(targets),
            "master": targets[0].address,
            "port": spec.collective_port,
            "address": node.address,
            "device": 0 if backend == "nccl" else None,
            "seconds": 60,
        }
        return await call(node, "preflight.collective", request, python=f"{spec.root}/env/bin/python")

    good, bad = await try_all(targets, rank)
    cells = [
        Cell(
            check=backend, node=node, status="ok", text=f"{one['all_reduce_s'] * 1e3:.0f} ms for 4 MiB over {one['interface']}"
        )
        for node, one in good.items()
    ]
    for node, error in bad.items():
        without = "torch does not import" in error.cause
        cells.append(
            Cell(
                check=backend,
                node=node,
                status="skipped" if without else "bad",
                text=error.cause.removeprefix(f"{node}: "),
                remedy="" if without else error.remedy or "the cause is mostly on another row: names, route or ports",
            )
        )
    return cells


def require(cells: Sequence[Cell]) -> None:
    """Raises PreflightError with the first red cell, where there is one."""
    bad = [one for one in cells if one.status == "bad"]
    if bad:
        first = bad[0]
        more = f"; {len(bad) - 1} more cells are red" if len(bad) > 1 else ""
        raise PreflightError(f"{first.node}: {first.check}: {first.text}{more}", remedy=first.remedy)

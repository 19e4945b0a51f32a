"""The network between the nodes, from their facts. The slowest link counts; a faster link that is not used gives a note."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.nodes.facts import NodeFacts
from deploy.planning import speed
from deploy.planning.speed import Link

FASTER = 1.5
"A link gives a note if it is faster than the used link by this factor."


def link(nodes: Sequence[NodeFacts]) -> Link:
    """The link of the engine's collectives: RDMA if every node has it, else the interface of the private addresses."""
    if len(nodes) < 2:
        return Link()
    rdma = [max((device.gbit_s for device in node.rdma), default=0) for node in nodes]
    if min(rdma) > 0:
        return speed.rdma(min(rdma))
    speeds = [_speed(node, node.interface) for node in nodes]
    return speed.tcp(None if None in speeds else min(filter(None, speeds)))


def _speed(node: NodeFacts, interface: str) -> int | None:
    return next((nic.mbit_s for nic in node.nics if nic.name == interface), None)


def notes(nodes: Sequence[NodeFacts]) -> list[str]:
    """One sentence for each link that is faster than the used one."""
    if len(nodes) < 2:
        return []
    by_text: dict[str, list[str]] = {}
    for node in nodes:
        used = _speed(node, node.interface)
        for nic in node.nics:
            if used and nic.mbit_s and nic.addresses and nic.name != node.interface and nic.mbit_s >= used * FASTER:
                text = f"{nic.name} has {nic.mbit_s / 1000:g} Gb/s, but {node.interface} with {used / 1000:g} Gb/s is used"
                by_text.setdefault(text, []).append(node.name)
    return [f"{', '.join(names)}: {text}: set nic = {text.split()[0]!r} in [nodes]" for text, names in by_text.items()]

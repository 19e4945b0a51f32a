"""Ask every node for its facts, and find the address over which it speaks with the others."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Mapping, Sequence

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.results import try_all
from deploy.nodes.deployment import Deployment, Node
from deploy.nodes.facts import Facts, NodeFacts
from deploy.remote.wire import Json
from gracefarm.errors import GracefarmError, NodeError

VIRTUAL = re.compile(r"lo|docker|br-|veth|virbr|cni|flannel|cali|tailscale|wg|tun|tap|podman")
"Interfaces that do not join machines, by the start of their names."


async def probe_nodes(deployment: Deployment, remote_nodes: Sequence[RemoteNode]) -> tuple[Facts, dict[str, GracefarmError]]:
    """Ask all nodes at once: the facts of those that answered, the reasons of the others."""
    nodes = {node.name: node for node in deployment.nodes}

    async def ask(remote_node: RemoteNode) -> NodeFacts:
        ahead = 0.0

        def clock(event: Json) -> None:
            nonlocal ahead
            if event["event"] == "clock":
                ahead = event["time"] - time.time()

        node = nodes[remote_node.name]
        request = {"local": deployment.data.local.replace("{node}", node.name)}
        answer = await call(remote_node, "facts.probe", request, on_event=clock)
        address, interface, network = private_address(node, answer)
        return NodeFacts.model_validate(
            answer
            | {"name": node.name, "address": node.address, "taken": time.time(), "clock_s": round(ahead, 1) + 0.0}
            | {"private": address, "interface": interface, "network": network, "nics": joining(answer)}
        )

    good, bad = await try_all(remote_nodes, ask)
    return Facts(nodes=tuple(good[remote_node.name] for remote_node in remote_nodes if remote_node.name in good)), bad


def joining(answer: Json) -> list[Json]:
    """The interfaces that join machines."""
    return [
        {**interface, "addresses": [address["address"] for address in interface["addresses"]]}
        for interface in answer["interfaces"]
        if not VIRTUAL.match(interface["name"])
    ]


def private_address(node: Node, answer: Mapping[str, object]) -> tuple[str, str, str]:
    """Address, interface and network over which a node speaks with the others.

    deploy.toml's word comes first (`private`, `nic`); then the address that ssh came in by, where it is private; then the
    first private address of an interface that joins machines; then the way out.
    Raises:
        NodeError: deploy.toml names an address or interface that the node does not have, or it has none at all.
    """
    addresses = [
        (str(address["address"]), str(interface["name"]), int(address["prefix"]))
        for interface in answer["interfaces"]  # type: ignore[attr-defined]
        for address in interface["addresses"]
    ]
    known = ", ".join(f"{name} {address}" for address, name, _ in addresses)
    if node.private or node.nic:
        for address, name, prefix in addresses:
            if node.private in (None, address) and node.nic in (None, name):
                return address, name, _network(address, prefix)
        raise NodeError(
            f"{node}: it has no {' on '.join(word for word in (node.private, node.nic) if word)}", remedy=f"it has {known}"
        )
    if _loopback(node.address):  # a node on this very machine
        return node.address, "lo", _network(node.address, 8)
    came_in = [entry for entry in addresses if entry[0] == answer.get("ssh_address") and _private(entry[0])]
    joining = [entry for entry in addresses if _private(entry[0]) and not VIRTUAL.match(entry[1]) and ":" not in entry[0]]
    way_out = [entry for entry in addresses if entry[0] == answer.get("route_address")]
    if chosen := [*came_in, *joining, *way_out]:
        address, name, prefix = chosen[0]
        return address, name, _network(address, prefix)
    raise NodeError(f"{node}: it has no address to speak with the others", remedy=f"set private for it; it has {known}")


def _private(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_private and not parsed.is_loopback


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _network(address: str, prefix: int) -> str:
    return str(ipaddress.ip_network(f"{address}/{prefix}", strict=False))

"""Facts of the nodes, asked once and kept: what the planner and the plan rest on, never on a SKU's name."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Mapping, Sequence

from deploy.fleet.calls import Json, Target, call, try_all
from deploy.nodes.deployment import Deployment, Node
from deploy.nodes.facts import Facts, NodeFacts
from gracefarm.errors import GracefarmError, NodeError

VIRTUAL = re.compile(r"lo|docker|br-|veth|virbr|cni|flannel|cali|tailscale|wg|tun|tap|podman")
"Interfaces that do not join machines, by the start of their names."


async def probe_nodes(deployment: Deployment, targets: Sequence[Target]) -> tuple[Facts, dict[str, GracefarmError]]:
    """Ask all nodes at once: the facts of those that answered, the reasons of the others."""
    nodes = {one.name: one for one in deployment.nodes}

    async def one(target: Target) -> NodeFacts:
        ahead = 0.0

        def clock(event: Json) -> None:
            nonlocal ahead
            if event["event"] == "clock":
                ahead = event["time"] - time.time()

        node = nodes[target.name]
        request = {"local": deployment.data.local.replace("{node}", node.name)}
        said = await call(target, "facts.probe", request, on_event=clock)
        address, interface, network = private_address(node, said)
        return NodeFacts.model_validate(
            said
            | {"name": node.name, "address": node.address, "taken": time.time(), "clock_s": round(ahead, 1) + 0.0}
            | {"private": address, "interface": interface, "network": network}
        )

    good, bad = await try_all(targets, one)
    return Facts(nodes=tuple(good[each.name] for each in targets if each.name in good)), bad


def private_address(node: Node, said: Mapping[str, object]) -> tuple[str, str, str]:
    """Address, interface and network over which a node speaks with the others.

    deploy.toml's word comes first (`private`, `nic`); then the address that ssh came in by, where it is private; then the
    first private address of an interface that joins machines; then the way out.
    Raises:
        NodeError: deploy.toml names an address or interface that the node does not have, or it has none at all.
    """
    found = [
        (str(each["address"]), str(one["name"]), int(each["prefix"]))
        for one in said["interfaces"]  # type: ignore[attr-defined]
        for each in one["addresses"]
    ]
    known = ", ".join(f"{name} {address}" for address, name, _ in found)
    if node.private or node.nic:
        for address, name, prefix in found:
            if node.private in (None, address) and node.nic in (None, name):
                return address, name, _network(address, prefix)
        raise NodeError(
            f"{node}: it has no {' on '.join(one for one in (node.private, node.nic) if one)}", remedy=f"it has {known}"
        )
    if _loopback(node.address):  # a node on this very machine
        return node.address, "lo", _network(node.address, 8)
    came_in = [one for one in found if one[0] == said.get("ssh_address") and _private(one[0])]
    joining = [one for one in found if _private(one[0]) and not VIRTUAL.match(one[1]) and ":" not in one[0]]
    way_out = [one for one in found if one[0] == said.get("route_address")]
    if chosen := [*came_in, *joining, *way_out]:
        address, name, prefix = chosen[0]
        return address, name, _network(address, prefix)
    raise NodeError(f"{node}: it has no address to speak with the others", remedy=f"set private for it; it has {known}")


def _private(address: str) -> bool:
    one = ipaddress.ip_address(address)
    return one.is_private and not one.is_loopback


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _network(address: str, prefix: int) -> str:
    return str(ipaddress.ip_network(f"{address}/{prefix}", strict=False))

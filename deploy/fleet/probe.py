"""Collects the facts of all nodes, and finds their addresses for the other nodes."""

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
"Prefixes of interface names that do not connect machines."


async def probe_nodes(deployment: Deployment, remote_nodes: Sequence[RemoteNode]) -> tuple[Facts, dict[str, GracefarmError]]:
    """Collect facts from all nodes in parallel. Return the facts, and the errors of the nodes that did not answer."""
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
    """The interfaces that connect machines."""
    return [
        {**interface, "addresses": [address["address"] for address in interface["addresses"]]}
        for interface in answer["interfaces"]
        if not VIRTUAL.match(interface["name"])
    ]


def private_address(node: Node, answer: Mapping[str, object]) -> tuple[str, str, str]:
    """Address, interface and network of a node for the other nodes.

    The first of these is chosen: `private` and `nic` of deploy.toml, the address that ssh uses if it is private, a private
    address of an interface that connects machines, the address of the default route.

    Raises:
        NodeError: the node does not have the address or interface of deploy.toml, or has no address.
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
        wanted = (f"address {node.private}" if node.private else "", f"interface {node.nic}" if node.nic else "")
        raise NodeError(
            f"{node}: this node has no {' on '.join(filter(None, wanted))}",
            remedy=f"correct `private` or `nic` of this node in deploy.toml; its interfaces and addresses are: {known}",
        )
    if _loopback(node.address):  # a node on this machine
        return node.address, "lo", _network(node.address, 8)
    came_in = [entry for entry in addresses if entry[0] == answer.get("ssh_address") and _private(entry[0])]
    joining = [entry for entry in addresses if _private(entry[0]) and not VIRTUAL.match(entry[1]) and ":" not in entry[0]]
    way_out = [entry for entry in addresses if entry[0] == answer.get("route_address")]
    if chosen := [*came_in, *joining, *way_out]:
        address, name, prefix = chosen[0]
        return address, name, _network(address, prefix)
    raise NodeError(
        f"{node}: no address was found at which the other nodes can reach this node",
        remedy=f"set `private` of this node in deploy.toml to one of its addresses: {known}",
    )


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

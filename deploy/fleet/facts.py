"""Facts of the nodes, asked once and kept: what the planner and the plan rest on, never on a SKU's name."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deploy.fleet.calls import Json, Target, call, try_all
from deploy.nodes.inventory import Deployment, Node
from gracefarm.errors import ConfigError, GracefarmError, NodeError
from gracefarm.files import atomic_write

VIRTUAL = re.compile(r"lo|docker|br-|veth|virbr|cni|flannel|cali|tailscale|wg|tun|tap|podman")
"Interfaces that do not join machines, by the start of their names."


class Kept(BaseModel):
    """Keys that a newer version adds are no error for an older one."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Gpu(Kept):
    """Bytes as cuMemGetInfo has them."""

    name: str
    total: int
    free: int


class Cuda(Kept):
    """GPUs, or why there are none."""

    absent: bool = False
    error: str | None = None
    version: int | None = None
    gpus: tuple[Gpu, ...] = ()

    @property
    def text(self) -> str:
        """For people."""
        if self.absent:
            return "no NVIDIA driver"
        return self.error or f"{self.version_text}"

    @property
    def version_text(self) -> str:
        """As NVIDIA writes it."""
        return f"{(self.version or 0) // 1000}.{(self.version or 0) % 1000 // 10}"


class Bytes(Kept):
    """Of a file system or of memory."""

    total: int
    free: int = 0
    available: int = 0


class Mount(Kept):
    """A file system that several nodes can see."""

    source: str
    target: str
    kind: str
    total: int
    free: int


class NodeFacts(Kept):
    """One node, as it said of itself at `taken`."""

    name: str
    address: str
    taken: float
    user: str
    hostname: str
    arch: str
    kernel: str
    cores: int
    python: str
    glibc: str
    glibcxx: str | None
    page: int
    memory: Bytes
    cuda: Cuda
    driver: str | None
    private: str
    "Address between the nodes."
    interface: str
    network: str
    "The private address's network, as 10.0.0.0/24."
    mounts: tuple[Mount, ...]
    disk: Bytes | None
    "Of the file system that holds `local`."
    clock_s: float
    "How far its clock is ahead of this machine's, to about a tenth of a second."


class Facts(Kept):
    """Of all nodes that answered."""

    schema_version: Literal[1] = 1
    nodes: tuple[NodeFacts, ...]

    def node(self, name: str) -> NodeFacts:
        """Raises ConfigError: it was never asked."""
        for one in self.nodes:
            if one.name == name:
                return one
        raise ConfigError(f"nothing is known of node {name}", remedy="ask it: `deploy facts`")

    @property
    def shares(self) -> tuple[str, ...]:
        """Folders on file systems that all nodes have mounted from the same source."""
        if not self.nodes:
            return ()
        common = set.intersection(*({(each.source, each.target) for each in one.mounts} for one in self.nodes))
        return tuple(sorted(target for _, target in common))


def load(deployment: Deployment) -> Facts:
    """What is kept. Raises ConfigError: nothing is, or it is not readable."""
    try:
        return Facts.model_validate_json(deployment.folder.facts.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{deployment.path}: the nodes were not asked yet", remedy="`deploy facts` asks them") from error
    except ValidationError as error:
        raise ConfigError(
            f"{deployment.folder.facts}: another version's, or damaged", remedy="ask again: `deploy facts`"
        ) from error


def keep(deployment: Deployment, facts: Facts) -> Facts:
    """Keep what was found, and of nodes that did not answer now what they said before; the whole is returned."""
    try:
        before = {one.name: one for one in load(deployment).nodes}
    except ConfigError:
        before = {}
    found = before | {one.name: one for one in facts.nodes}
    addresses = {one.name: one.address for one in deployment.nodes}
    whole = Facts(nodes=tuple(found[name] for name in addresses if name in found and found[name].address == addresses[name]))
    atomic_write(deployment.folder.facts, whole.model_dump_json(indent=1) + "\n")
    return whole


async def probe(deployment: Deployment, targets: Sequence[Target]) -> tuple[Facts, dict[str, GracefarmError]]:
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

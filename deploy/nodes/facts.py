"""Facts of the nodes, asked once and kept: what the planner and the plan rest on, never on a SKU's name."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deploy.nodes.deployment import Deployment
from gracefarm.errors import ConfigError
from gracefarm.files import atomic_write


class KeptFact(BaseModel):
    """Keys that a newer version adds are no error for an older one."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Gpu(KeptFact):
    """Bytes as cuMemGetInfo has them."""

    name: str
    total: int
    free: int


class Cuda(KeptFact):
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


class Bytes(KeptFact):
    """Of a file system or of memory."""

    total: int
    free: int = 0
    available: int = 0


class NetworkMount(KeptFact):
    """A file system that several nodes can see."""

    source: str
    target: str
    kind: str
    total: int
    free: int


class Nic(KeptFact):
    """A network interface that is up."""

    name: str
    mbit_s: int | None = None
    "As it negotiated; None: it does not say, as virtual ones do not."
    mtu: int | None = None
    addresses: tuple[str, ...] = ()


class Rdma(KeptFact):
    """A port of InfiniBand or RoCE that is active."""

    device: str
    gbit_s: float
    link: str
    "InfiniBand or Ethernet."


class NodeFacts(KeptFact):
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
    nics: tuple[Nic, ...] = ()
    rdma: tuple[Rdma, ...] = ()
    mounts: tuple[NetworkMount, ...]
    disk: Bytes | None
    "Of the file system that holds `local`."
    clock_s: float
    "How far its clock is ahead of this machine's, to about a tenth of a second."


class Facts(KeptFact):
    """Of all nodes that answered."""

    schema_version: Literal[1] = 1
    nodes: tuple[NodeFacts, ...]

    def node(self, name: str) -> NodeFacts:
        """Raises ConfigError: it was never asked."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise ConfigError(f"nothing is known of node {name}", remedy="ask it: `deploy facts`")

    @property
    def shares(self) -> tuple[str, ...]:
        """Folders on file systems that all nodes have mounted from the same source."""
        if not self.nodes:
            return ()
        common = set.intersection(*({(mount.source, mount.target) for mount in node.mounts} for node in self.nodes))
        return tuple(sorted(target for _, target in common))


def load_facts(deployment: Deployment) -> Facts:
    """What is kept. Raises ConfigError: nothing is, or it is not readable."""
    try:
        return Facts.model_validate_json(deployment.folder.facts.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{deployment.path}: the nodes were not asked yet", remedy="`deploy facts` asks them") from error
    except ValidationError as error:
        raise ConfigError(
            f"{deployment.folder.facts}: another version's, or damaged", remedy="ask again: `deploy facts`"
        ) from error


def differences(before: Facts, after: Facts) -> tuple[str, ...]:
    """A sentence for each node whose plan may change, since it says something else than it said before."""
    known = {(node.name, node.address): node for node in before.nodes}
    sentences = []
    for node in after.nodes:
        if old := known.get((node.name, node.address)):
            changed = [
                f"{what} {first or 'none'} before and {second or 'none'} now"
                for what, first, second in (
                    ("GPUs", _gpus(old), _gpus(node)),
                    ("host memory", f"{old.memory.total >> 30} GiB", f"{node.memory.total >> 30} GiB"),
                    ("private address", f"{old.private} on {old.interface}", f"{node.private} on {node.interface}"),
                    ("machine", old.arch, node.arch),
                )
                if first != second
            ]
            sentences += [f"{node.name} says something else than before: {'; '.join(changed)}"] if changed else []
    return tuple(sentences)


def _gpus(node: NodeFacts) -> str:
    """Number, name and memory, as `4 x NVIDIA H200 of 140.4 GiB`."""
    groups = Counter((gpu.name, gpu.total) for gpu in node.cuda.gpus)
    return ", ".join(f"{count} x {name} of {total / (1 << 30):.1f} GiB" for (name, total), count in groups.items())


def keep_facts(deployment: Deployment, facts: Facts) -> Facts:
    """Keep what was found, and of nodes that did not answer now what they said before; the whole is returned."""
    try:
        before = {node.name: node for node in load_facts(deployment).nodes}
    except ConfigError:
        before = {}
    merged = before | {node.name: node for node in facts.nodes}
    addresses = {node.name: node.address for node in deployment.nodes}
    kept = [merged[name] for name in addresses if name in merged and merged[name].address == addresses[name]]
    whole = Facts(nodes=tuple(kept))
    atomic_write(deployment.folder.facts, whole.model_dump_json(indent=1) + "\n")
    return whole

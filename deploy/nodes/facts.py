"""Facts of the nodes, collected once and stored. The planner uses them, not the name of a product."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deploy.nodes.deployment import Deployment
from gracefarm.errors import ConfigError
from gracefarm.files import atomic_write


class KeptFact(BaseModel):
    """A stored fact. Unknown keys are ignored, so that an older version can read the file of a newer one."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Gpu(KeptFact):
    """A GPU, with its memory in bytes from cuMemGetInfo."""

    name: str
    total: int
    free: int


class Cuda(KeptFact):
    """The GPUs of a node, or the reason why CUDA does not work."""

    absent: bool = False
    error: str | None = None
    version: int | None = None
    gpus: tuple[Gpu, ...] = ()

    @property
    def text(self) -> str:
        """The version, or why CUDA does not work."""
        if self.absent:
            return "no NVIDIA driver"
        return self.error or f"{self.version_text}"

    @property
    def version_text(self) -> str:
        """The version of CUDA, such as 13.0."""
        return f"{(self.version or 0) // 1000}.{(self.version or 0) % 1000 // 10}"


class Bytes(KeptFact):
    """Size and free space of a file system or of memory, in bytes."""

    total: int
    free: int = 0
    available: int = 0


class NetworkMount(KeptFact):
    """A mounted network file system."""

    source: str
    target: str
    kind: str
    total: int
    free: int


class Nic(KeptFact):
    """A network interface that is up."""

    name: str
    mbit_s: int | None = None
    "Negotiated speed; None: not reported, as by virtual interfaces."
    mtu: int | None = None
    addresses: tuple[str, ...] = ()


class Rdma(KeptFact):
    """An active port of InfiniBand or RoCE."""

    device: str
    gbit_s: float
    link: str
    "InfiniBand or Ethernet."


class NodeFacts(KeptFact):
    """Facts that a node reported at the time `taken`."""

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
    "Address for the other nodes."
    interface: str
    network: str
    "The network of the private address, such as 10.0.0.0/24."
    nics: tuple[Nic, ...] = ()
    rdma: tuple[Rdma, ...] = ()
    mounts: tuple[NetworkMount, ...]
    disk: Bytes | None
    "The file system of `local`."
    clock_s: float
    "Seconds that its clock is ahead of this machine's; accurate to about 0.1."


class Facts(KeptFact):
    """Facts of all nodes that answered."""

    schema_version: Literal[1] = 1
    nodes: tuple[NodeFacts, ...]

    def node(self, name: str) -> NodeFacts:
        """Facts of one node. Raises ConfigError if they were never collected."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise ConfigError(f"there are no facts of node {name}", remedy="collect the facts with `deploy facts`")

    @property
    def shares(self) -> tuple[str, ...]:
        """Mount points that all nodes have, with the same source."""
        if not self.nodes:
            return ()
        common = set.intersection(*({(mount.source, mount.target) for mount in node.mounts} for node in self.nodes))
        return tuple(sorted(target for _, target in common))


def load_facts(deployment: Deployment) -> Facts:
    """Read the stored facts. Raises ConfigError if there are none or they cannot be read."""
    try:
        return Facts.model_validate_json(deployment.folder.facts.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{deployment.path}: the facts of the nodes were not collected yet",
            remedy="run `deploy init`, which asks whether to trust the nodes, and collects the facts",
        ) from error
    except ValidationError as error:
        raise ConfigError(
            f"{deployment.folder.facts} is damaged or was written by a different version of gracefarm",
            remedy="collect the facts again with `deploy facts`",
        ) from error


def differences(before: Facts, after: Facts) -> tuple[str, ...]:
    """One sentence for each node whose facts changed in a way that may change the plan."""
    known = {(node.name, node.address): node for node in before.nodes}
    sentences = []
    for node in after.nodes:
        if old := known.get((node.name, node.address)):
            changed = [
                f"{what} from {first or 'none'} to {second or 'none'}"
                for what, first, second in (
                    ("GPUs", _gpus(old), _gpus(node)),
                    ("host memory", f"{old.memory.total >> 30} GiB", f"{node.memory.total >> 30} GiB"),
                    ("private address", f"{old.private} on {old.interface}", f"{node.private} on {node.interface}"),
                    ("machine", old.arch, node.arch),
                )
                if first != second
            ]
            sentences += [f"{node.name} changed: {'; '.join(changed)}"] if changed else []
    return tuple(sentences)


def _gpus(node: NodeFacts) -> str:
    """Number, name and memory, such as `4 x NVIDIA H200 of 140.4 GiB`."""
    groups = Counter((gpu.name, gpu.total) for gpu in node.cuda.gpus)
    return ", ".join(f"{count} x {name} of {total / (1 << 30):.1f} GiB" for (name, total), count in groups.items())


def keep_facts(deployment: Deployment, facts: Facts) -> Facts:
    """Store new facts. Nodes that did not answer keep their old facts. Returns all of them."""
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

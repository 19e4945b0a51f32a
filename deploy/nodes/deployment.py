"""A deployment: its nodes, its deploy.toml and its folder on this machine."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deploy.nodes.config import DOCS, FILE, Access, Config, NodeConfig, Port
from deploy.nodes.ips import read_ips
from gracefarm import tables
from gracefarm.errors import ConfigError, UsageError
from gracefarm.files import atomic_write, lock


class Node(BaseModel):
    """A machine that serves, and how ssh reaches it. Rank 0 is the head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    "The name from deploy.toml; default: `k0`, `k1`, … in order."
    rank: int
    address: str
    "IP address or host name for ssh."
    port: Port = 22
    user: str | None = None
    "None: the user of ~/.ssh/config, else the local user."
    key: Path | None = None
    "Private key; None: from ~/.ssh/config, the agent, or the usual files."
    jump: str | None = None
    "[user@]host[:port] of a jump host."
    private: str | None = None
    "Address for the other nodes; None: the address in the node's facts."
    nic: str | None = None
    "Network interface between the nodes; None: the interface with the private address."
    gpus: int | None = None
    "Number of GPUs to use; None: all."
    group: str = "nodes"

    @property
    def head(self) -> bool:
        """True for the node that runs Ray's head and the engine's main process."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"{self.name} {self.address}"


class Folder(BaseModel):
    """The files of a deployment on this machine: `.deploy/` beside deploy.toml, readable only by its owner."""

    model_config = ConfigDict(frozen=True)

    path: Path

    @property
    def state(self) -> Path:
        """The state, in the format of deploy.nodes.state."""
        return self.path / "state.json"

    @property
    def known_hosts(self) -> Path:
        """Host keys, pinned by `deploy init`."""
        return self.path / "known_hosts"

    @property
    def api_key(self) -> Path:
        """The engine's API key, with mode 0600."""
        return self.path / "api-key"

    @property
    def logs(self) -> Path:
        """Folder of the logs that were followed on this machine."""
        return self.path / "logs"

    @property
    def facts(self) -> Path:
        """The facts, in the format of deploy.nodes.facts."""
        return self.path / "facts.json"

    @property
    def id(self) -> str:
        """Identifies the processes and folders of this deployment on the nodes.

        Raises:
            ConfigError: `make` has not been called yet.
        """
        try:
            return (self.path / "id").read_text().strip()
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.path} is not initialised: `deploy init` was not run yet",
                remedy="run `deploy init`, which asks whether to trust the nodes",
            ) from error

    def make(self) -> None:
        """Create the folder with mode 0700 and a permanent id."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        self.path.chmod(0o700)
        self.logs.mkdir(mode=0o700, exist_ok=True)
        with lock(self.path / "lock"):
            if not (self.path / "id").exists():
                atomic_write(self.path / "id", secrets.token_hex(6) + "\n")


class Deployment(BaseModel):
    """deploy.toml, its nodes and its folder."""

    model_config = ConfigDict(frozen=True)

    path: Path
    "Absolute path of deploy.toml."
    data: Config
    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """Name of the deployment in deploy.toml."""
        return self.data.name

    @property
    def matrix(self) -> str:
        """The import matrix (deploy/data/imports.toml) that its environment must pass."""
        return f"{self.data.engine}-rehearsal" if self.data.options.rehearsal else self.data.engine

    @property
    def head(self) -> Node:
        """The node with rank 0."""
        return self.nodes[0]

    @property
    def rest(self) -> tuple[Node, ...]:
        """All nodes except the head."""
        return self.nodes[1:]

    @property
    def folder(self) -> Folder:
        """The folder `.deploy` beside deploy.toml."""
        return Folder(path=self.path.parent / ".deploy")

    def node(self, name: str) -> Node:
        """Find a node by name, rank or address. Raises UsageError."""
        for node in self.nodes:
            if name in (node.name, node.address, str(node.rank)):
                return node
        known = ", ".join(str(node) for node in self.nodes)
        raise UsageError(f"no node {name!r}", remedy=f"give one of these nodes: {known}")

    def select(self, words: Sequence[str]) -> tuple[Node, ...]:
        """Select nodes by name, rank, address, group, `head`, `rest`, `all` or a range of ranks such as 2-5.

        Returns:
            Each node once, in order of rank.

        Raises:
            UsageError: a word names no node.
        """
        chosen: set[str] = set()
        groups: Mapping[str, list[str]] = {
            **{
                group: [node.name for node in self.nodes if node.group == group]
                for group in {node.group for node in self.nodes}
            },
            "head": [self.head.name],
            "rest": [node.name for node in self.rest],
            "all": [node.name for node in self.nodes],
        }
        for word in words:
            span = re.fullmatch(r"(\d+)-(\d+)", word)
            if span:
                chosen.update(node.name for node in self.nodes if int(span[1]) <= node.rank <= int(span[2]))
            elif word in groups:
                chosen.update(groups[word])
            else:
                chosen.add(self.node(word).name)
        nodes = tuple(node for node in self.nodes if node.name in chosen)
        if not nodes:
            raise UsageError(
                f"no node matches {','.join(words) or 'an empty list'}", remedy="give nodes that `deploy facts` lists"
            )
        return nodes


def find_config() -> Path:
    """Find deploy.toml in the working directory or the nearest parent. Raises ConfigError."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / FILE).is_file():
            return folder / FILE
    raise ConfigError(
        f"no {FILE} in this folder or its parents",
        remedy="create this file with `deploy init ips.txt`, or give its path: deploy --file PATH",
    )


def load_deployment(path: Path | None = None) -> Deployment:
    """Read a deploy.toml; None: the nearest one.

    Raises:
        ConfigError: the file is missing, is not TOML, or has an unknown key or a wrong value.
    """
    place = (path or find_config()).absolute()
    data = tables.read(place, Config, docs=DOCS)
    try:
        data.local.format(user="u", node="k0")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"{place}: key 'local': unknown placeholder; only {{user}} and {{node}} are allowed",
            remedy=f"remove the other placeholders; {DOCS} describes `local`",
        ) from error
    return Deployment(path=place, data=data, nodes=_nodes(place, data))


def _nodes(path: Path, config: Config) -> tuple[Node, ...]:
    """The nodes of [nodes], then of each [[group]], then each [[node]], in the order of the file."""
    base = path.parent
    addresses = [*(read_ips(base / config.nodes.file) if config.nodes.file else ()), *config.nodes.hosts]
    entries = [NodeConfig(address=address) for address in addresses]
    for group in config.group:
        access = group.model_dump(exclude={"name", "hosts"}, exclude_none=True)
        entries += [NodeConfig(address=address, group=group.name, **access) for address in group.hosts]
    entries += config.node
    if not entries:
        raise ConfigError(f"{path}: the file lists no nodes", remedy='set hosts = [...] or file = "ips.txt" in [nodes]')
    nodes: list[Node] = []
    for rank, entry in enumerate(entries):
        node = _node(rank, entry, config.nodes, base)
        for other in nodes:
            if other.name == node.name or (other.address, other.port) == (node.address, node.port):
                raise ConfigError(f"{path}: {node} is a duplicate of {other}", remedy="remove one of the two nodes")
        nodes.append(node)
    return tuple(nodes)


def _node(rank: int, entry: NodeConfig, defaults: Access, base: Path) -> Node:
    """The node of an entry. Values that are missing in the entry come from [nodes]."""
    access = {
        name: getattr(entry, name) if getattr(entry, name) is not None else getattr(defaults, name)
        for name in Access.model_fields
    }
    key = access.pop("key")
    port = access.pop("port")
    return Node(
        name=entry.name or f"k{rank}",
        rank=rank,
        address=entry.address,
        private=entry.private,
        key=base / Path(key).expanduser() if key else None,
        port=port or 22,
        group=entry.group,
        **access,
    )

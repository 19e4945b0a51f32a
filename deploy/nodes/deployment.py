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
    """A machine that serves, and how it is entered. Rank 0 is the head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    "`k0`, `k1`, … in order, unless deploy.toml names it."
    rank: int
    address: str
    "As ssh reaches it: an IP address or a host name. The private address is a fact, found by asking the node."
    port: Port = 22
    user: str | None = None
    "None: what ~/.ssh/config says, else this machine's user."
    key: Path | None = None
    "Private key; None: ~/.ssh/config, the agent, the usual files."
    jump: str | None = None
    "[user@]host[:port] of a jump host."
    private: str | None = None
    "Address between the nodes; None: found by asking the node."
    nic: str | None = None
    "Network interface between the nodes; None: the one that holds the private address."
    gpus: int | None = None
    "GPUs to use; None: all that the node has."
    group: str = "nodes"

    @property
    def head(self) -> bool:
        """Runs Ray's head and the engine's driver."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"{self.name} {self.address}"


class Folder(BaseModel):
    """What belongs to a deployment on this machine: `.deploy/` beside deploy.toml, for its owner alone."""

    model_config = ConfigDict(frozen=True)

    path: Path

    @property
    def state(self) -> Path:
        """deploy.nodes.state."""
        return self.path / "state.json"

    @property
    def known_hosts(self) -> Path:
        """Host keys, pinned by `deploy init`."""
        return self.path / "known_hosts"

    @property
    def api_key(self) -> Path:
        """The engine's API key, 0600."""
        return self.path / "api-key"

    @property
    def logs(self) -> Path:
        """Logs that were followed here."""
        return self.path / "logs"

    @property
    def facts(self) -> Path:
        """deploy.fleet.probe."""
        return self.path / "facts.json"

    @property
    def id(self) -> str:
        """Tells this deployment's processes and folders on the nodes from all others'. Raises ConfigError before `make`."""
        try:
            return (self.path / "id").read_text().strip()
        except FileNotFoundError as error:
            raise ConfigError(f"{self.path}: not prepared", remedy="`deploy init` pins the nodes' host keys first") from error

    def make(self) -> None:
        """Create it, 0700, with an id that stays."""
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
    "deploy.toml, absolute."
    data: Config
    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """As deploy.toml says."""
        return self.data.name

    @property
    def matrix(self) -> str:
        """The import matrix (deploy/data/imports.toml) that its environment must pass."""
        return f"{self.data.engine}-rehearsal" if self.data.options.rehearsal else self.data.engine

    @property
    def head(self) -> Node:
        """Rank 0."""
        return self.nodes[0]

    @property
    def rest(self) -> tuple[Node, ...]:
        """All but the head."""
        return self.nodes[1:]

    @property
    def folder(self) -> Folder:
        """Beside deploy.toml."""
        return Folder(path=self.path.parent / ".deploy")

    def node(self, name: str) -> Node:
        """A node by name, rank or address. Raises UsageError."""
        for node in self.nodes:
            if name in (node.name, node.address, str(node.rank)):
                return node
        known = ", ".join(str(node) for node in self.nodes)
        raise UsageError(f"no node {name!r}", remedy=f"there are: {known}")

    def select(self, words: Sequence[str]) -> tuple[Node, ...]:
        """Nodes by name, rank, address, group, `head`, `rest`, `all` or ranks as 2-5; in order, once. Raises UsageError."""
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
            raise UsageError(f"{','.join(words) or 'nothing'} names no node", remedy="`deploy facts` lists them")
        return nodes


def find_config() -> Path:
    """deploy.toml of the working directory or the nearest folder above. Raises ConfigError."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / FILE).is_file():
            return folder / FILE
    raise ConfigError(f"no {FILE} here or above", remedy="`deploy init ips.txt` writes one; or name it: --file PATH")


def load_deployment(path: Path | None = None) -> Deployment:
    """The deployment of a deploy.toml; None: the nearest one.

    Raises:
        ConfigError: absent, not TOML, an unknown key or a wrong value; names file, line and the nearest key.
    """
    place = (path or find_config()).absolute()
    data = tables.read(place, Config, docs=DOCS)
    try:
        data.local.format(user="u", node="k0")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{place}: key 'local': only {{user}} and {{node}} are replaced", remedy=DOCS) from error
    return Deployment(path=place, data=data, nodes=_nodes(place, data))


def _nodes(path: Path, config: Config) -> tuple[Node, ...]:
    """[nodes] first, then each [[group]], then each [[node]], in the order of the file."""
    base = path.parent
    addresses = [*(read_ips(base / config.nodes.file) if config.nodes.file else ()), *config.nodes.hosts]
    entries = [NodeConfig(address=address) for address in addresses]
    for group in config.group:
        access = group.model_dump(exclude={"name", "hosts"}, exclude_none=True)
        entries += [NodeConfig(address=address, group=group.name, **access) for address in group.hosts]
    entries += config.node
    if not entries:
        raise ConfigError(f"{path}: no node", remedy='[nodes] needs hosts = [...] or file = "ips.txt"')
    nodes: list[Node] = []
    for rank, entry in enumerate(entries):
        node = _node(rank, entry, config.nodes, base)
        for other in nodes:
            if other.name == node.name or (other.address, other.port) == (node.address, node.port):
                raise ConfigError(f"{path}: {node} is there twice (also as {other})", remedy="remove one of them")
        nodes.append(node)
    return tuple(nodes)


def _node(rank: int, entry: NodeConfig, defaults: Access, base: Path) -> Node:
    """What an entry leaves out comes from [nodes]."""
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

"""Which nodes there are and what they are to serve: ips.txt as in the tutorial, or deploy.toml."""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, StringConstraints

from gracefarm import tables
from gracefarm.errors import ConfigError, UsageError
from gracefarm.files import atomic_write, lock
from gracefarm.tables import Table

DOCS = "docs/deploy.md"
FILE = "deploy.toml"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


def check_address(text: str) -> str:
    """An IP address or a host name, as given.

    Raises:
        ValueError: neither; a leading dash among them, which ssh would read as an option.
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not _HOST.fullmatch(text):
            msg = f"{text!r} is neither an IP address nor a host name"
            raise ValueError(msg) from None
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/") or "\n" in text:
        msg = "must be an absolute path"
        raise ValueError(msg)
    return text.rstrip("/") or "/"


def split_jump(text: str) -> tuple[str | None, str, int]:
    """User, host and port of [user@]host[:port].

    Raises:
        ValueError: it is something else.
    """
    user, _, place = text.rpartition("@")
    host, colon, port = place.partition(":")
    number = int(port) if port.isascii() and port.isdigit() else 0
    if not re.fullmatch(r"[^\s:-][^\s:]*", host) or (colon and not 1 <= number <= 65535):
        msg = f"{text!r} is no jump host: [user@]host[:port], a port from 1 to 65535"
        raise ValueError(msg)
    return user or None, host, number or 22


def _jump(text: str) -> str:
    split_jump(text)
    return text


def _index(url: str) -> str:
    if urlsplit(url).netloc.rpartition("@")[0]:
        msg = "names a user or a password, and it can be read by many: put them into ~/.netrc, here and on the nodes"
        raise ValueError(msg)
    return url


Address = Annotated[str, AfterValidator(check_address)]
Index = Annotated[str, AfterValidator(_index)]
Jump = Annotated[str, AfterValidator(_jump)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,62})$")]
Port = Annotated[int, Field(ge=1, le=65535)]
RemotePath = Annotated[str, AfterValidator(_absolute)]
"An absolute path on the nodes."


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


class Inventory(Protocol):
    """Where nodes come from. A cloud is another implementation."""

    def nodes(self) -> tuple[Node, ...]:
        """All nodes by rank. Raises ConfigError when they cannot be told."""
        ...


class Access(Table):
    """How nodes are entered; what a group or a node leaves out comes from [nodes]."""

    user: str | None = None
    key: str | None = None
    port: Port | None = None
    jump: Jump | None = None
    nic: str | None = None
    gpus: PositiveInt | None = None


class Nodes(Access):
    """[nodes]: the addresses, and what holds for all nodes."""

    file: str | None = None
    "ips.txt, relative to deploy.toml."
    hosts: tuple[Address, ...] = ()


class Group(Access):
    """[[group]]: nodes that differ from the others in how they are entered."""

    name: Name
    hosts: tuple[Address, ...]


class Single(Access):
    """[[node]]: one node."""

    address: Address
    name: Name | None = None
    private: Address | None = None
    group: Name = "nodes"


class Model(Table):
    """[model]: what is served."""

    repo: str = "meta-llama/Llama-3.1-405B-Instruct"
    revision: Annotated[str, StringConstraints(min_length=1)] = "main"
    "A commit pins it; a branch or tag is resolved once and its commit kept in the state."
    config: str | None = None
    "A local config.json for `deploy plan` without the Hub, relative to deploy.toml."


class Ports(Table):
    """[ports]: TCP ports on every node; each range ends before its second number is passed."""

    engine: Port = 2242
    ray: Port = 6379
    dashboard: Port = 8265
    object_manager: Port = 8076
    node_manager: Port = 8077
    # Ray's own defaults for the next four lie among the ports that the kernel gives to outgoing connections (32768 and up):
    # one of those then holds, by chance, what Ray is to listen on.
    agent: Port = 19365
    metrics: Port = 19366
    runtime_env: Port = 19367
    agent_grpc: Port = 19368
    workers_from: Port = 20000
    workers_to: Port = 20999
    store: Port = 29500
    "torch's store and preflight's collectives."
    engine_store: Port = 29501
    "APHRODITE_PORT, VLLM_PORT."


class Layout(Table):
    """[layout]: what the planner must not choose by itself. Everything is checked; None: it chooses."""

    tensor_parallel: PositiveInt | None = None
    pipeline_parallel: PositiveInt | None = None
    partition: tuple[PositiveInt, ...] | None = None
    cpu_offload_gib: Annotated[float, Field(ge=0)] | None = None
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.90


class Options(Table):
    """[options]: how long to wait, what things cost."""

    price_per_node_hour: Annotated[float, Field(ge=0)] | None = None
    "In dollars; for $/h and $/Mtok."
    connect_timeout: Annotated[float, Field(gt=0)] = 10.0
    "Seconds until a node counts as unreachable."
    load_timeout: Annotated[float, Field(gt=0)] = 7200.0
    "Seconds from the start of the engine to the first real completion."
    ray_wave: PositiveInt | None = None
    "Ray workers started at once; None: by the head's cores."
    rehearsal: bool = False
    "Nodes are namespaces of one machine: GPUs are declared, not found."


class File(Table):
    """deploy.toml."""

    name: Name = "llama-405b"
    engine: Literal["aphrodite", "vllm"] = "aphrodite"
    set: Name = "gh200-cu124"
    "The set of wheels that was tested and published together."
    index: Index | None = None
    "Simple API of the farm's index; None: PyPI. How pip and uv are configured on a node counts for nothing."
    lock: str | None = None
    "A requirements.lock instead of SET.lock, relative to deploy.toml; SET.lock is fetched from the index where it is absent."
    python: Literal["managed", "system", "conda"] = "managed"
    "Whose Python 3.11 environments stand on: one that uv brings onto the shared folder, python3.11 of every node, or conda's."
    python_mirror: Annotated[str, StringConstraints(pattern=r"^(https?|file)://[^@]+$")] | None = None
    "Where uv takes the managed Python from instead of python-build-standalone's releases; it checks the same sha256."
    share: RemotePath | None = None
    "The shared folder on the nodes, the same path on all; environments and weights live there."
    local: str = "/tmp/gracefarm-{user}"  # noqa: S108 - checked for its owner by whoever writes there
    "A folder on each node's own disk, for logs, process ids and Ray's files. {user} and {node} are replaced."
    nodes: Nodes = Nodes()
    group: tuple[Group, ...] = ()
    node: tuple[Single, ...] = ()
    model: Model = Model()
    ports: Ports = Ports()
    layout: Layout = Layout()
    options: Options = Options()
    engine_options: dict[str, str | int | float | bool | list[str]] = Field(default_factory=dict)
    "Further options of the engine by their names without dashes, as max-log-len = 0."
    env: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(default_factory=dict)
    "Environment of Ray and of the engine on every node."


def read_ips(path: Path) -> tuple[str, ...]:
    """The addresses in ips.txt: one a line, `#` starts a comment, empty lines count for nothing.

    Raises:
        ConfigError: absent, empty, an address twice, or a line that is no address; names the line.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file", remedy="one address a line, the head first") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file", remedy="one address a line, the head first") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        address = line.split("#", 1)[0].strip()
        if not address:
            continue
        try:
            check_address(address)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}", remedy="one address a line, the head first") from error
        if address in seen:
            raise ConfigError(
                f"{path}:{number}: {address} stands in line {seen[address]} already", remedy="remove one of them"
            )
        seen[address] = number
    if not seen:
        raise ConfigError(f"{path}: no address", remedy="one address a line, the head first")
    return tuple(seen)


@dataclass(frozen=True, kw_only=True)
class IpsInventory:
    """The tutorial's ips.txt; every node is entered the same way."""

    path: Path
    access: Access = field(default_factory=Access)

    def nodes(self) -> tuple[Node, ...]:
        """In the order of the file."""
        singles = [Single(address=one) for one in read_ips(self.path)]
        return _numbered(singles, self.access, self.path.parent, str(self.path))


@dataclass(frozen=True, kw_only=True)
class TomlInventory:
    """deploy.toml: [nodes] first, then each [[group]], then each [[node]]."""

    path: Path
    data: File

    def nodes(self) -> tuple[Node, ...]:
        """In the order of the file."""
        base = self.path.parent
        addresses = [*(read_ips(base / self.data.nodes.file) if self.data.nodes.file else ()), *self.data.nodes.hosts]
        singles = [Single(address=one) for one in addresses]
        for group in self.data.group:
            own = group.model_dump(exclude={"name", "hosts"}, exclude_none=True)
            singles += [Single(address=one, group=group.name, **own) for one in group.hosts]
        singles += self.data.node
        if not singles:
            raise ConfigError(f"{self.path}: no node", remedy='[nodes] needs hosts = [...] or file = "ips.txt"')
        return _numbered(singles, self.data.nodes, base, str(self.path))


def _numbered(singles: Sequence[Single], defaults: Access, base: Path, where: str) -> tuple[Node, ...]:
    nodes: list[Node] = []
    for rank, one in enumerate(singles):
        access = {
            name: getattr(one, name) if getattr(one, name) is not None else getattr(defaults, name)
            for name in Access.model_fields
        }
        key = access.pop("key")
        port = access.pop("port")
        node = Node(
            name=one.name or f"k{rank}",
            rank=rank,
            address=one.address,
            private=one.private,
            key=base / Path(key).expanduser() if key else None,
            port=port or 22,
            group=one.group,
            **access,
        )
        for other in nodes:
            if other.name == node.name or (other.address, other.port) == (node.address, node.port):
                raise ConfigError(f"{where}: {node} is there twice (also as {other})", remedy="remove one of them")
        nodes.append(node)
    return tuple(nodes)


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
        """deploy.fleet.facts."""
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
    data: File
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
        for one in self.nodes:
            if name in (one.name, one.address, str(one.rank)):
                return one
        known = ", ".join(str(one) for one in self.nodes)
        raise UsageError(f"no node {name!r}", remedy=f"there are: {known}")

    def select(self, words: Sequence[str]) -> tuple[Node, ...]:
        """Nodes by name, rank, address, group, `head`, `rest`, `all` or ranks as 2-5; in order, once. Raises UsageError."""
        chosen: set[str] = set()
        groups: Mapping[str, list[str]] = {
            **{group: [one.name for one in self.nodes if one.group == group] for group in {one.group for one in self.nodes}},
            "head": [self.head.name],
            "rest": [one.name for one in self.rest],
            "all": [one.name for one in self.nodes],
        }
        for word in words:
            span = re.fullmatch(r"(\d+)-(\d+)", word)
            if span:
                chosen.update(one.name for one in self.nodes if int(span[1]) <= one.rank <= int(span[2]))
            elif word in groups:
                chosen.update(groups[word])
            else:
                chosen.add(self.node(word).name)
        found = tuple(one for one in self.nodes if one.name in chosen)
        if not found:
            raise UsageError(f"{','.join(words) or 'nothing'} names no node", remedy="`deploy facts` lists them")
        return found


def find() -> Path:
    """deploy.toml of the working directory or the nearest folder above. Raises ConfigError."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / FILE).is_file():
            return folder / FILE
    raise ConfigError(f"no {FILE} here or above", remedy="`deploy init ips.txt` writes one; or name it: --file PATH")


def load(path: Path | None = None) -> Deployment:
    """The deployment of a deploy.toml; None: the nearest one.

    Raises:
        ConfigError: absent, not TOML, an unknown key or a wrong value; names file, line and the nearest key.
    """
    place = (path or find()).absolute()
    data = tables.read(place, File, docs=DOCS)
    try:
        data.local.format(user="u", node="k0")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{place}: key 'local': only {{user}} and {{node}} are replaced", remedy=DOCS) from error
    return Deployment(path=place, data=data, nodes=TomlInventory(path=place, data=data).nodes())

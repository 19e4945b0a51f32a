"""deploy.toml as data: its tables, their keys and defaults."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveInt, StringConstraints

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


class Access(Table):
    """How nodes are entered; what a group or a node leaves out comes from [nodes]."""

    user: str | None = None
    key: str | None = None
    port: Port | None = None
    jump: Jump | None = None
    nic: str | None = None
    gpus: PositiveInt | None = None


class NodesConfig(Access):
    """[nodes]: the addresses, and what holds for all nodes."""

    file: str | None = None
    "ips.txt, relative to deploy.toml."
    hosts: tuple[Address, ...] = ()


class GroupConfig(Access):
    """[[group]]: nodes that differ from the others in how they are entered."""

    name: Name
    hosts: tuple[Address, ...]


class NodeConfig(Access):
    """[[node]]: one node."""

    address: Address
    name: Name | None = None
    private: Address | None = None
    group: Name = "nodes"


class ModelConfig(Table):
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


Objective = Literal["speed", "throughput", "cost"]


class LayoutConfig(Table):
    """[layout]: what the planner must not choose by itself. Everything is checked; None: it chooses."""

    objective: Objective = "speed"
    "Tokens/s of one stream, of all together, or per dollar; of layouts that are about equal, the one on the fewest nodes."
    trust: bool = False
    "Serve a model that the planner does not know: tensor_parallel and pipeline_parallel are needed, nothing is predicted."
    tensor_parallel: PositiveInt | None = None
    pipeline_parallel: PositiveInt | None = None
    data_parallel: PositiveInt | None = None
    "Replicas, each with all layers (vLLM)."
    expert_parallel: bool | None = None
    "GPUs hold whole experts instead of a part of each; None: where the engine cannot cut these experts."
    partition: tuple[PositiveInt, ...] | None = None
    cpu_offload_gib: Annotated[float, Field(ge=0)] | None = None
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.90


class OptionsConfig(Table):
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


class Config(Table):
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
    nodes: NodesConfig = NodesConfig()
    group: tuple[GroupConfig, ...] = ()
    node: tuple[NodeConfig, ...] = ()
    model: ModelConfig = ModelConfig()
    ports: Ports = Ports()
    layout: LayoutConfig = LayoutConfig()
    options: OptionsConfig = OptionsConfig()
    engine_options: dict[str, str | int | float | bool | list[str]] = Field(default_factory=dict)
    "Further options of the engine by their names without dashes, as max-log-len = 0."
    env: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(default_factory=dict)
    "Environment of Ray and of the engine on every node."

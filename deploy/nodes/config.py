"""The schema of deploy.toml: tables, keys and defaults."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveInt, StringConstraints

from gracefarm.tables import Table

DOCS = "docs/reference/deploy.md"
FILE = "deploy.toml"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


def check_address(text: str) -> str:
    """Check that the text is an IP address or a host name.

    Raises:
        ValueError: it is neither. A leading dash is refused too, since ssh would treat it as an option.
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
        ValueError: the text has another form.
    """
    user, _, place = text.rpartition("@")
    host, colon, port = place.partition(":")
    number = int(port) if port.isascii() and port.isdigit() else 0
    if not re.fullmatch(r"[^\s:-][^\s:]*", host) or (colon and not 1 <= number <= 65535):
        msg = f"{text!r} is not a jump host: write [user@]host[:port], with a port from 1 to 65535"
        raise ValueError(msg)
    return user or None, host, number or 22


def _jump(text: str) -> str:
    split_jump(text)
    return text


def _index(url: str) -> str:
    if urlsplit(url).netloc.rpartition("@")[0]:
        msg = "contains a user or a password, which others can read: put them into ~/.netrc, on this machine and on the nodes"
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
    """Access to nodes. Groups and nodes inherit missing keys from [nodes]."""

    user: str | None = None
    "User name on the nodes; default: from ~/.ssh/config, else the local user."
    key: str | None = None
    "Private key; default: from ~/.ssh/config, the agent, or the usual files."
    port: Port | None = None
    "Port of sshd; default: 22."
    jump: Jump | None = None
    "Jump host, as [user@]host[:port]."
    nic: str | None = None
    "Network interface between the nodes; default: found by `deploy init`."
    gpus: PositiveInt | None = None
    "GPUs to use on each node; default: all."


class NodesConfig(Access):
    """[nodes]: addresses, and settings of all nodes."""

    file: str | None = None
    "File with one address per line, such as ips.txt, relative to deploy.toml."
    hosts: tuple[Address, ...] = ()
    "Addresses of the nodes, the head first; an alternative to file."


class GroupConfig(Access):
    """[[group]]: nodes with different access."""

    name: Name
    "Name of the group, for -k."
    hosts: tuple[Address, ...]
    "Addresses of its nodes."


class NodeConfig(Access):
    """[[node]]: settings of one node."""

    address: Address
    "Address for ssh."
    name: Name | None = None
    "Name of the node; default: k1, k2 and so on."
    private: Address | None = None
    "Address for the other nodes; default: found by `deploy init`."
    group: Name = "nodes"
    "Group whose access the node uses."


class ModelConfig(Table):
    """[model]: the model to serve."""

    repo: str = "meta-llama/Llama-3.1-405B-Instruct"
    "Repository on the Hub."
    revision: Annotated[str, StringConstraints(min_length=1)] = "main"
    "Commit, branch or tag. A branch or tag is resolved once, and its commit is stored in the state."
    config: str | None = None
    "Local config.json for `deploy plan` without the Hub, relative to deploy.toml."


class Ports(Table):
    """[ports]: TCP ports on every node."""

    engine: Port = 2242
    "The engine's HTTP port on the head."
    ray: Port = 6379
    "Ray's head."
    dashboard: Port = 8265
    "Ray's dashboard."
    object_manager: Port = 8076
    "Ray's object manager."
    node_manager: Port = 8077
    "Ray's node manager."
    # Ray's defaults for the next four are in the range that the kernel uses for outgoing connections (32768 and up), so
    # another connection may occupy them.
    agent: Port = 19365
    "Ray's dashboard agent."
    metrics: Port = 19366
    "Ray's metrics."
    runtime_env: Port = 19367
    "Ray's runtime environment agent."
    agent_grpc: Port = 19368
    "gRPC port of Ray's dashboard agent."
    workers_from: Port = 20000
    "First port of Ray's workers."
    workers_to: Port = 20999
    "Last port of Ray's workers."
    store: Port = 29500
    "torch's store, and the collectives of preflight."
    engine_store: Port = 29501
    "APHRODITE_PORT. vLLM looks for free ports itself."


Objective = Literal["speed", "throughput", "cost"]


class LayoutConfig(Table):
    """[layout]: choices for the planner. All values are checked; the planner chooses missing ones."""

    objective: Objective = "speed"
    "Optimise tokens/s of one stream, of all streams, or per dollar. Of similar layouts, the one with the fewest nodes wins."
    trust: bool = False
    "Serve a model that the planner does not know, without predictions. Requires tensor_parallel and pipeline_parallel."
    tensor_parallel: PositiveInt | None = None
    "GPUs that share every layer."
    pipeline_parallel: PositiveInt | None = None
    "Stages of layers."
    data_parallel: PositiveInt | None = None
    "Replicas, each with all layers (vLLM)."
    expert_parallel: bool | None = None
    "Give each GPU whole experts instead of a part of each; default: only if the engine cannot split these experts."
    partition: tuple[PositiveInt, ...] | None = None
    "Layers of each stage."
    cpu_offload_gib: Annotated[float, Field(ge=0)] | None = None
    "Weights in host memory per GPU."
    max_model_len: PositiveInt | None = None
    "Tokens of the longest request, prompt and answer together."
    max_num_seqs: PositiveInt | None = None
    "Concurrent requests of each replica."
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.90
    "Share of a GPU's memory that the engine uses."


class OptionsConfig(Table):
    """[options]: timeouts and prices."""

    price_per_node_hour: Annotated[float, Field(ge=0)] | None = None
    "Price of a node per hour in dollars, for $/h and $/Mtok."
    connect_timeout: Annotated[float, Field(gt=0)] = 10.0
    "Seconds after which a node counts as unreachable."
    load_timeout: Annotated[float, Field(gt=0)] = 7200.0
    "Maximum seconds from the start of the engine to the first completion."
    ray_wave: PositiveInt | None = None
    "Number of Ray workers to start at the same time; default: by the head's cores."
    rehearsal: bool = False
    "Nodes are namespaces of one machine, with declared GPUs."


class Config(Table):
    """deploy.toml."""

    name: Name = "llama-405b"
    "Name of the deployment."
    engine: Literal["aphrodite", "vllm"] = "aphrodite"
    "The engine."
    set: Name = "gh200-cu124"
    "Name of the set of wheels."
    index: Index | None = None
    "Simple API of the farm's index; default: PyPI. The configuration of pip and uv on a node is ignored."
    lock: str | None = None
    "A requirements.lock instead of SET.lock, relative to deploy.toml. A missing SET.lock is fetched from the index."
    python: Literal["managed", "system", "conda"] = "managed"
    "Python of the environments: one that uv installs in the shared folder, the python3 of every node, or conda's."
    python_version: Annotated[str, StringConstraints(pattern=r"^3\.[0-9]+$")] = "3.11"
    "Version of that Python; the lock's wheels must be for it. uv installs 3.11 only."
    python_mirror: Annotated[str, StringConstraints(pattern=r"^(https?|file)://[^@]+$")] | None = None
    "Mirror of python-build-standalone's releases for the managed Python. uv checks the same sha256."
    launcher: Literal["ray", "native"] = "ray"
    "What connects the engine's nodes: Ray, or the engine itself (vLLM's --nnodes)."
    share: RemotePath | None = None
    "Shared folder for environments and weights, at the same path on all nodes."
    local: str = "/tmp/gracefarm-{user}"  # noqa: S108 - its owner is checked before each write
    "Folder on each node's disk for logs, process ids and Ray's files. {user} and {node} are replaced."
    nodes: NodesConfig = NodesConfig()
    "The nodes."
    group: tuple[GroupConfig, ...] = ()
    "Groups of nodes with different access."
    node: tuple[NodeConfig, ...] = ()
    "Single nodes with different settings."
    model: ModelConfig = ModelConfig()
    "The model."
    ports: Ports = Ports()
    "TCP ports on every node."
    layout: LayoutConfig = LayoutConfig()
    "How the model is split; default: the planner decides."
    options: OptionsConfig = OptionsConfig()
    "Timeouts and prices."
    engine_options: dict[str, str | int | float | bool | list[str]] = Field(default_factory=dict)
    "Further options of the engine, without leading dashes, such as max-log-len = 0."
    env: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(default_factory=dict)
    "Environment of Ray and of the engine on every node."

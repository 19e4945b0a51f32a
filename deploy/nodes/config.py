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
        msg = (
            "the URL contains a user or a password, which other users of the nodes can read; put them into ~/.netrc, "
            "on this machine and on the nodes"
        )
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
    """SSH settings and hardware of nodes. Groups and nodes inherit missing keys from [nodes]."""

    user: str | None = None
    "User name on the nodes. Default: the user in ~/.ssh/config, else the local user."
    key: str | None = None
    "Private key. Default: the key in ~/.ssh/config, the keys of the SSH agent, or the usual files in ~/.ssh."
    port: Port | None = None
    "Port of sshd. Default: 22."
    jump: Jump | None = None
    "Jump host, in the form [user@]host[:port]."
    nic: str | None = None
    "Network interface between the nodes. Default: `deploy init` finds it."
    gpus: PositiveInt | None = None
    "Number of GPUs to use on each node. Default: all."


class NodesConfig(Access):
    """[nodes]: the addresses of the nodes, and settings for all nodes."""

    file: str | None = None
    "File with one address per line, such as ips.txt. The path is relative to deploy.toml."
    hosts: tuple[Address, ...] = ()
    "Addresses of the nodes, as an alternative to `file`. The first node is the head."


class GroupConfig(Access):
    """[[group]]: nodes that need different SSH settings (user, key, port, jump host)."""

    name: Name
    "Name of the group. The option `-k` of `deploy` commands, which selects nodes, accepts this name."
    hosts: tuple[Address, ...]
    "Addresses of the group's nodes."


class NodeConfig(Access):
    """[[node]]: settings of one node."""

    address: Address
    "Address that `deploy` connects to with SSH."
    name: Name | None = None
    "Name of the node. Default: k1, k2 and so on."
    private: Address | None = None
    "Address at which the other nodes reach this node. Default: `deploy init` finds it."
    group: Name = "nodes"
    "Group whose SSH settings the node uses."


class ModelConfig(Table):
    """[model]: the model to serve."""

    repo: str = "meta-llama/Llama-3.1-405B-Instruct"
    "Repository on the Hub."
    revision: Annotated[str, StringConstraints(min_length=1)] = "main"
    "Commit, branch or tag. A branch or tag is resolved once, and its commit is stored in the state."
    config: str | None = None
    "Path of a local config.json, relative to deploy.toml. With it, `deploy plan` does not need the Hub."


class Ports(Table):
    """[ports]: TCP ports on every node."""

    engine: Port = 2242
    "HTTP port of the engine on the head."
    ray: Port = 6379
    "Port of Ray's head."
    dashboard: Port = 8265
    "Port of Ray's dashboard."
    object_manager: Port = 8076
    "Port of Ray's object manager."
    node_manager: Port = 8077
    "Port of Ray's node manager."
    # Ray's defaults for the next four are in the range that the kernel uses for outgoing connections (32768 and up), so
    # another connection may occupy them.
    agent: Port = 19365
    "HTTP port of Ray's dashboard agent."
    metrics: Port = 19366
    "Port of Ray's metrics."
    runtime_env: Port = 19367
    "Port of Ray's runtime environment agent."
    agent_grpc: Port = 19368
    "gRPC port of Ray's dashboard agent."
    workers_from: Port = 20000
    "First port of Ray's workers."
    workers_to: Port = 20999
    "Last port of Ray's workers."
    store: Port = 29500
    "Port of torch's rendezvous store. Preflight also uses this port for its test of collectives."
    engine_store: Port = 29501
    "Value of APHRODITE_PORT. vLLM does not use this port: it finds free ports itself."


Objective = Literal["speed", "throughput", "cost"]


class LayoutConfig(Table):
    """[layout]: choices for the planner. The planner checks all values, and chooses the missing ones."""

    objective: Objective = "speed"
    (
        "What the planner optimises: tokens/s of one stream (speed), tokens/s of all streams (throughput), or tokens per "
        "dollar (cost). Among similar layouts, the planner chooses the layout with the fewest nodes."
    )
    trust: bool = False
    "Serve a model that the planner does not know, without predictions. Requires tensor_parallel and pipeline_parallel."
    tensor_parallel: PositiveInt | None = None
    "Number of GPUs that share every layer."
    pipeline_parallel: PositiveInt | None = None
    "Number of stages. Each stage has different layers."
    data_parallel: PositiveInt | None = None
    "Number of replicas, each with all layers (only vLLM). Replicas of a model with experts share the experts."
    expert_parallel: bool | None = None
    "Give each GPU whole experts instead of a part of each expert. Default: only if the engine cannot split these experts."
    partition: tuple[PositiveInt, ...] | None = None
    "Number of layers of each stage."
    cpu_offload_gib: Annotated[float, Field(ge=0)] | None = None
    "GiB of weights in host memory for each GPU."
    max_model_len: PositiveInt | None = None
    "Maximum number of tokens of a request (prompt and answer together)."
    max_num_seqs: PositiveInt | None = None
    "Maximum number of concurrent requests of each replica."
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.90
    "Share of a GPU's memory that the engine uses."


class OptionsConfig(Table):
    """[options]: timeouts and prices."""

    price_per_node_hour: Annotated[float, Field(ge=0)] | None = None
    (
        "Price of a node per hour in dollars. `deploy` computes $/h and $/Mtok from it. Without this key, `deploy plan` uses "
        "its own prices of GPUs."
    )
    connect_timeout: Annotated[float, Field(gt=0)] = 10.0
    "Seconds to wait for a connection. After this time, the node counts as unreachable."
    load_timeout: Annotated[float, Field(gt=0)] = 7200.0
    "Maximum seconds from the start of the engine to the first completion."
    ray_wave: PositiveInt | None = None
    "Number of Ray workers to start at the same time. The default depends on the number of cores of the head."
    rehearsal: bool = False
    "Whether the nodes are namespaces of one machine, with declared GPUs (`deploy rehearse`)."


class Config(Table):
    """deploy.toml."""

    name: Name = "llama-405b"
    "Name of the deployment."
    # The defaults of engine and set are those of the first versions, so that a deploy.toml keeps its meaning.
    engine: Literal["aphrodite", "vllm"] = "aphrodite"
    "The engine. `deploy init` writes vllm."
    set: Name = "gh200-cu124"
    "Name of the set of wheels. `deploy init` writes gh200-cu130."
    index: Index | None = None
    "URL of the set's simple API on your index. Default: PyPI. The configuration of pip and uv on a node is ignored."
    lock: str | None = None
    (
        "Path of a requirements.lock to use instead of SET.lock, relative to deploy.toml. Without this key, a missing "
        "SET.lock is fetched from the index."
    )
    python: Literal["managed", "system", "conda"] = "managed"
    (
        "Python of the environments: a Python that uv installs in the shared folder (managed), the python3 of every node "
        "(system), or a Python from conda (conda)."
    )
    python_version: Annotated[str, StringConstraints(pattern=r"^3\.[0-9]+$")] = "3.11"
    "Version of the Python in `python`. The lock's wheels must be for this version. A managed Python is always 3.11."
    python_mirror: Annotated[str, StringConstraints(pattern=r"^(https?|file)://[^@]+$")] | None = None
    (
        "Mirror of the releases of python-build-standalone, from which uv installs the managed Python. With a mirror, uv "
        "checks the same sha256."
    )
    launcher: Literal["ray", "native"] = "ray"
    "What connects the engine's nodes: Ray, or the engine itself (vLLM's --nnodes)."
    share: RemotePath | None = None
    "Shared folder for environments and weights, at the same path on all nodes."
    local: str = "/tmp/gracefarm-{user}"  # noqa: S108 - its owner is checked before each write
    (
        "Folder on each node's disk for logs, process ids and Ray's files. {user} is replaced with the user name, {node} "
        "with the node's name."
    )
    nodes: NodesConfig = NodesConfig()
    "The nodes."
    group: tuple[GroupConfig, ...] = ()
    "Groups of nodes that need different SSH settings (user, key, port, jump host)."
    node: tuple[NodeConfig, ...] = ()
    "Single nodes with different settings."
    model: ModelConfig = ModelConfig()
    "The model."
    ports: Ports = Ports()
    "TCP ports on every node."
    layout: LayoutConfig = LayoutConfig()
    "How the model is split over the GPUs. The planner chooses missing values."
    options: OptionsConfig = OptionsConfig()
    "Timeouts and prices."
    engine_options: dict[str, str | int | float | bool | list[str]] = Field(default_factory=dict)
    "Further options of the engine, without leading dashes, such as max-log-len = 0."
    env: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(default_factory=dict)
    "Environment variables of Ray and of the engine on every node."

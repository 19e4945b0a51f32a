"""The schema of deploy.toml: tables, keys and defaults."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveInt, StringConstraints

from gracefarm.tables import Table

DOCS = "docs/reference/deploy-toml.md"
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
    "User name for SSH. Default: the user in ~/.ssh/config, else the name of the local user."
    key: str | None = None
    "Path of the private SSH key. Default: the key in ~/.ssh/config, the SSH agent, or the usual files in ~/.ssh."
    port: Port | None = None
    "Port of the SSH server. Default: the port in ~/.ssh/config, else 22."
    jump: Jump | None = None
    "Host through which SSH reaches the nodes, in the form `[user@]host[:port]`."
    nic: str | None = None
    "Network interface for the traffic between the nodes, for example `eth0`. Default: `deploy init` finds it."
    gpus: PositiveInt | None = None
    "Number of GPUs to use on a node. Default: all."


class NodesConfig(Access):
    """Addresses of nodes, and settings for all nodes. The first node of deploy.toml is the head."""

    file: str | None = None
    "File with one address per line, such as ips.txt. The path is relative to deploy.toml."
    hosts: tuple[Address, ...] = ()
    "Addresses of nodes. If `file` is also given, the nodes of the file come first."


class GroupConfig(Access):
    """Nodes with other settings than those of `[nodes]`. If a setting is absent here, the value in `[nodes]` applies."""

    name: Name
    "Name of the group. The option `-k GROUP` selects the nodes of the group."
    hosts: tuple[Address, ...]
    "Addresses of the nodes in the group. In the list of all nodes, they come after the nodes of `[nodes]`."


class NodeConfig(Access):
    """One node with other settings than those of `[nodes]`. If a setting is absent here, the value in `[nodes]` applies."""

    address: Address
    "Address for SSH."
    name: Name | None = None
    "Name of the node. Default: k0 for the first node of deploy.toml, k1 for the second, and so on."
    private: Address | None = None
    "Address at which the other nodes reach this node. Default: `deploy init` finds it."
    group: Name = "nodes"
    (
        "Group of the node. The option `-k GROUP` then also selects this node. The node does not use the settings in the "
        "group's table."
    )


class ModelConfig(Table):
    """The model to serve."""

    repo: str = "meta-llama/Llama-3.1-405B-Instruct"
    "Repository on the Hugging Face Hub."
    revision: Annotated[str, StringConstraints(min_length=1)] = "main"
    "Commit, branch or tag. `deploy up` resolves a branch or tag once and stores the commit."
    config: str | None = None
    (
        "Path of the model's config.json on this machine, relative to deploy.toml. With this key, `deploy plan` does not use "
        "the Hub."
    )


class Ports(Table):
    """TCP ports on every node."""

    engine: Port = 2242
    "HTTP port of the engine on the head."
    ray: Port = 6379
    "Port of Ray's control service on the head."
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
    "Port for the start of torch's process groups. `deploy preflight` also uses it for a test of the network."
    engine_store: Port = 29501
    "Value of the environment variable APHRODITE_PORT. vLLM does not use it."


Objective = Literal["speed", "throughput", "cost"]
Launcher = Literal["ray", "native"]


class LayoutConfig(Table):
    """How the model is split over the GPUs. The planner checks these values and chooses the missing values."""

    objective: Objective = "speed"
    (
        "What the planner maximises. `speed`: tokens/s of one request. `throughput`: tokens/s of all requests together. "
        "`cost`: tokens/s of all requests per dollar."
    )
    trust: bool = False
    (
        "`true`: serve a model that the planner does not know, without predictions. This requires the keys `tensor_parallel` "
        "and `pipeline_parallel`."
    )
    tensor_parallel: PositiveInt | None = None
    "Number of GPUs that share every layer."
    pipeline_parallel: PositiveInt | None = None
    "Number of stages. Each stage has a part of the layers."
    data_parallel: PositiveInt | None = None
    (
        "Number of replicas. A number greater than 1 requires vLLM. If the model has experts, the replicas share the experts "
        "instead of copying them."
    )
    expert_parallel: bool | None = None
    (
        "`true`: each GPU has whole experts. `false`: each GPU has a part of every expert. Default: `true` if the engine "
        "cannot split the experts, else `false`."
    )
    partition: tuple[PositiveInt, ...] | None = None
    "Number of layers of each stage, for example `[63, 63]`."
    cpu_offload_gib: Annotated[float, Field(ge=0)] | None = None
    "GiB of weights that each GPU keeps in host memory (the memory of the CPU)."
    max_model_len: PositiveInt | None = None
    "Maximum number of tokens of a request. Prompt and answer count together."
    max_num_seqs: PositiveInt | None = None
    "Maximum number of concurrent requests of a replica."
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.90
    "Fraction of each GPU's memory that the engine uses. It is greater than 0 and at most 1."


class OptionsConfig(Table):
    """Price of a node, timeouts, the start of Ray, and the rehearsal mode."""

    price_per_node_hour: Annotated[float, Field(ge=0)] | None = None
    "Price of a node in US dollars per hour. Default: the sum of the prices of its GPUs, from a list in gracefarm."
    connect_timeout: Annotated[float, Field(gt=0)] = 10.0
    "Seconds after which a node that does not answer counts as unreachable."
    load_timeout: Annotated[float, Field(gt=0)] = 7200.0
    "Maximum time from the start of the engine to the first answer of the model, in seconds."
    ray_wave: PositiveInt | None = None
    (
        "Number of nodes on which `deploy` starts Ray at the same time. It always starts Ray on the head first. Default: "
        "half the number of the head's CPU cores, but at least 1."
    )
    rehearsal: bool = False
    "`true`: one machine simulates all nodes. `deploy rehearse` sets this key."


class Config(Table):
    """deploy.toml."""

    name: Name = "llama-405b"
    "Name of the deployment."
    # The defaults of engine and set are those of the first versions, so that a deploy.toml keeps its meaning.
    engine: Literal["aphrodite", "vllm"] = "aphrodite"
    "Engine of the deployment. Without this key, the engine is Aphrodite. `deploy init` writes `engine = 'vllm'`."
    set: Name = "gh200-cu124"
    (
        "Name of the set of wheels that is installed on the nodes. `deploy init` writes `gh200-cu130`, or `x86_64-cu130` if "
        "the nodes are x86_64."
    )
    index: Index | None = None
    (
        "URL of the set on your index, in the form `http://HOST:8080/SET/simple/`. Default: PyPI. The nodes ignore the "
        "configuration of pip and uv."
    )
    lock: str | None = None
    (
        "Path of the lock, relative to deploy.toml. The lock lists each wheel of the set with version and sha256. Default: "
        "SET.lock beside deploy.toml, where SET is the value of `set`. If SET.lock is missing, `deploy` creates it. With "
        "`index`, it downloads the lock from the index. Without `index`, it copies the lock of this set from gracefarm."
    )
    python: Literal["managed", "system", "conda"] = "managed"
    (
        "Source of the Python for the environments. `managed`: uv installs a pinned Python in the shared folder. `system`: "
        "all nodes must already have the Python of `python_version`. `conda`: conda installs Python in the shared folder."
    )
    python_version: Annotated[str, StringConstraints(pattern=r"^3\.[0-9]+$")] = "3.11"
    "Version of the Python for the environments. The wheels in the lock must be for this version. `managed` requires 3.11."
    python_mirror: Annotated[str, StringConstraints(pattern=r"^(https?|file)://[^@]+$")] | None = None
    "URL of a mirror of the releases of python-build-standalone. uv downloads the managed Python from there."
    launcher: Launcher = "ray"
    (
        "Program that connects several nodes. `ray`: Ray connects the nodes, and starts the engine's processes on them. "
        "`native`: `deploy` starts vLLM on each node with the option --nnodes, and vLLM connects the nodes itself. On several "
        "nodes, `native` requires the same number of GPUs on each node, and allows only one replica."
    )
    share: RemotePath | None = None
    "Shared folder for environments and weights. It must have the same path on all nodes."
    local: str = "/tmp/gracefarm-{user}"  # noqa: S108 - its owner is checked before each write
    (
        "Folder on the local disk of each node, for logs, process ids and Ray's files. `{user}` is replaced with the user "
        "name, `{node}` with the name of the node."
    )
    nodes: NodesConfig = NodesConfig()
    "Addresses of nodes, and settings for all nodes."
    group: tuple[GroupConfig, ...] = ()
    "Groups of nodes that have other settings than those of `[nodes]`."
    node: tuple[NodeConfig, ...] = ()
    "Single nodes that have other settings than those of `[nodes]`."
    model: ModelConfig = ModelConfig()
    "Model to serve."
    ports: Ports = Ports()
    "TCP ports."
    layout: LayoutConfig = LayoutConfig()
    "Division of the model over the GPUs."
    options: OptionsConfig = OptionsConfig()
    "Options of `deploy`, for example timeouts."
    engine_options: dict[str, str | int | float | bool | list[str]] = Field(default_factory=dict)
    "Further options of the engine. The names have no leading dashes, for example `max-log-len = 0`."
    env: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(default_factory=dict)
    "Further environment variables of Ray and of the engine on every node."

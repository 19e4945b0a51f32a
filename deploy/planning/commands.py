"""The commands and environments of a plan: of Ray on every node, and of the engine on the head.

`option` reads an option of such a command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploy.nodes import paths, redact
from deploy.nodes.config import Launcher
from deploy.nodes.deployment import Deployment, Node
from deploy.nodes.facts import NodeFacts
from deploy.planning import engines
from deploy.planning.engines import Engine
from deploy.planning.layouts import Layout
from gracefarm.errors import ConfigError

OBJECT_STORE = 1 << 30
"Bytes of Ray's object store, which the engine does not use. Ray's default is 30 % of the host memory, which weights may need."
OBJECT_STORE_REHEARSED = 128 << 20
OFFLOAD_TIMEOUT = 600
"Seconds for one step. The engine's default of 60 s is too short if weights are in host memory."


def node_env(deployment: Deployment, engine: Engine, layout: Layout, facts: NodeFacts, node: Node) -> dict[str, str]:
    """Environment of all processes on a node. It must be complete: Ray passes only CUDA_VISIBLE_DEVICES to its workers."""
    env = {
        engine.host_variable: facts.private,
        **({engine.port_variable: str(deployment.data.ports.engine_store)} if engine.port_variable else {}),
        "NCCL_SOCKET_IFNAME": facts.interface,
        "GLOO_SOCKET_IFNAME": facts.interface,
    }
    if deployment.data.launcher == "ray":
        env |= {
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray before 2.52 has no tokens and ignores both.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": paths.ray_token(deployment, node, facts.user),
        }
    own = layout.partition == engines.default_partition(sum(layout.partition), layout.pp)
    if layout.pp > 1 and layout.partition and not (engine.default_partition and own):
        env[engine.partition_variable] = ",".join(map(str, layout.partition))
    if layout.offload_gib:
        env[engine.timeout_variable] = str(OFFLOAD_TIMEOUT)
        env |= engine.offload_env
    for name, value in deployment.data.env.items():
        if redact.called_secret(name) or redact.Redactor().line(value) != value:
            raise ConfigError(
                f"[env] {name} is a secret, which must not be in deploy.toml or in a plan",
                remedy="remove this variable from [env]; `deploy serve` creates the keys itself, and takes the Hub's token "
                "from HF_TOKEN in your shell",
            )
        if name in (engine.host_variable, engine.partition_variable):
            raise ConfigError(
                f"[env] {name} is set by the plan",
                remedy="remove this variable from [env]; to change its value, set "
                + ("`private` of a [[node]]" if name == engine.host_variable else "`partition` in [layout]"),
            )
        if layout.offload_gib and engine.offload_env.get(name, value) != value:
            raise ConfigError(
                f"[env] {name} = {value}: with this setting, {engine.name} {engine.version} ignores the "
                f"{layout.offload_gib:g} GiB of weights in host memory that this layout needs",
                remedy="remove this variable from [env]; or use more nodes, so that no weights are in host memory",
            )
        env[name] = value
    return env


def ray_command(deployment: Deployment, facts: NodeFacts, node: Node, gpus: int, head: NodeFacts) -> tuple[str, ...]:
    """The `ray start` command of a node."""
    ports = deployment.data.ports
    store = OBJECT_STORE_REHEARSED if deployment.data.options.rehearsal else OBJECT_STORE
    mine: tuple[str, ...]
    if node.head:
        mine = ("--head", "--port", str(ports.ray), "--include-dashboard", "true")
        mine += ("--dashboard-host", "127.0.0.1", "--dashboard-port", str(ports.dashboard))
    else:
        mine = ("--address", _ray_address(head.private, deployment))
    return (
        paths.program(deployment, "ray"),
        "start",
        *mine,
        *("--node-ip-address", facts.private),
        *("--num-gpus", str(gpus)),
        *("--object-store-memory", str(store)),
        *("--object-manager-port", str(ports.object_manager)),
        *("--node-manager-port", str(ports.node_manager)),
        *("--dashboard-agent-listen-port", str(ports.agent)),
        *("--dashboard-agent-grpc-port", str(ports.agent_grpc)),
        *("--metrics-export-port", str(ports.metrics)),
        *("--runtime-env-agent-port", str(ports.runtime_env)),
        *("--min-worker-port", str(ports.workers_from)),
        *("--max-worker-port", str(ports.workers_to)),
        # Workers before Ray 2.5x use the head's, with a warning.
        *("--temp-dir", paths.ray_temp(deployment, node, facts.user)),
        "--disable-usage-stats",
    )


def _ray_address(head: str, deployment: Deployment) -> str:
    return f"[{head}]:{deployment.data.ports.ray}" if ":" in head else f"{head}:{deployment.data.ports.ray}"


def serve(deployment: Deployment, engine: Engine, layout: Layout, repo: str, revision: str) -> tuple[str, ...]:
    """The command of the engine. Raises ConfigError if deploy.toml has an option or value that the engine does not have."""
    program, *verb = engine.command
    given = engines.arguments(engine, deployment.data.engine_options)
    planned = [
        *("--host", "127.0.0.1"),
        *("--port", str(deployment.data.ports.engine)),
        *("--served-model-name", repo),
        *("--tensor-parallel-size", str(layout.tp)),
        *("--pipeline-parallel-size", str(layout.pp)),
        *("--distributed-executor-backend", "ray" if deployment.data.launcher == "ray" else "mp"),
        *("--gpu-memory-utilization", f"{layout.gmu:g}"),
    ]
    if layout.max_model_len:
        planned += ["--max-model-len", str(layout.max_model_len)]
    if layout.max_num_seqs:
        planned += ["--max-num-seqs", str(layout.max_num_seqs)]
    if layout.max_model_len is None or layout.max_model_len > layout.max_num_batched_tokens:
        # By default, the engine profiles a step as long as the longest request, whose activations reduce the cache.
        planned += ["--max-num-batched-tokens", str(layout.max_num_batched_tokens)]
        planned += ["--enable-chunked-prefill", *(("true",) if engine.name == "aphrodite" else ())]
    if layout.offload_gib:
        planned += ["--cpu-offload-gb", f"{layout.offload_gib:g}"]
    if layout.expert_parallel:
        planned += ["--enable-expert-parallel"]
    planned += _replicas(layout, deployment.data.launcher)
    engines.validate(engine, [*planned, *given])
    folder = paths.weights(paths.root(deployment), repo, revision)
    return (paths.program(deployment, program), *verb, folder, *planned, *given)


def native(serve: tuple[str, ...], port: int, rank: int, nodes: int, head: str) -> tuple[str, ...]:
    """The command of the engine on one node, for an engine that connects its nodes itself. Only the head has a server."""
    if nodes == 1:
        return serve
    place = ("--nnodes", str(nodes), "--node-rank", str(rank), "--master-addr", head, "--master-port", str(port))
    return (*serve, *place, *(("--headless",) if rank else ()))


def _replicas(layout: Layout, launcher: Launcher) -> list[str]:
    """Arguments for data parallelism. `local`: number of replicas on the head (vLLM 0.26.0, v1/engine/utils.py).

    Without Ray, all replicas are on one node (`placement.check_native`), which is the engine's default.
    """
    if layout.dp == 1:
        return []
    words = ["--data-parallel-size", str(layout.dp)]
    if launcher == "native":
        return words
    words += ["--data-parallel-backend", "ray"]
    return words if layout.spans else [*words, "--data-parallel-size-local", str(layout.local_replicas)]


def _packing(layout: Layout) -> dict[str, str]:
    """How vLLM packs replicas, if they are not equally many on every node.

    By default (`strict`), it skips a node with fewer GPUs than the replicas of the head require. Ray has only the GPUs of the
    plan, so the last node may have fewer.
    """
    if layout.dp == 1:
        return {}
    strategy = "span" if layout.spans else "fill" if layout.dp % layout.local_replicas else None
    return {"VLLM_RAY_DP_PACK_STRATEGY": strategy} if strategy else {}


def serve_env(deployment: Deployment, engine: Engine, layout: Layout, private: str, env: Mapping[str, str]) -> dict[str, str]:
    """Environment of the engine on the head. `private` and `env`: address and environment of the head."""
    return {
        **env,
        **engine.env,
        **_packing(layout),
        **({"RAY_ADDRESS": _ray_address(private, deployment)} if deployment.data.launcher == "ray" else {}),
        # The weights are on the share, so the engine must not use the network while it starts.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`."""
    for index, word in enumerate(argv):
        if word.startswith(name + "="):
            return word.partition("=")[2]
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
    return None

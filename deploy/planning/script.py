"""A plan as a bash script with the same commands and environments, for machines without this program."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from deploy.nodes.deployment import Node
from deploy.planning.plans import NodePlan, ServePlan
from gracefarm.errors import ConfigError

TOKEN_FILE = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - the name of a variable


def render(plan: ServePlan, nodes: Sequence[Node] = ()) -> str:
    """Write the script. `nodes` give user, port, key and jump host of each node; default: from ~/.ssh/config.

    Secrets are read from local files and sent on ssh's stdin, so that they do not appear in arguments.

    Raises:
        ConfigError: the launcher is not Ray.
    """
    if plan.launcher == "native":
        raise ConfigError(
            '--shell requires launcher = "ray"', remedy="use `deploy plan --commands`, which shows the commands of each node"
        )
    access = {node.name: node for node in nodes}
    head, *rest = plan.nodes
    blocks = [
        _preamble(plan),
        _functions([(node, access.get(node.name)) for node in plan.nodes]),
        "# Secrets: created once, stored here with mode 0600, and sent on stdin to files that only the nodes' user can read.",
        _secrets(plan),
        f"# Ray must have exactly {plan.layout.world} GPUs. With more, Ray may give the engine no GPU on the head.",
        _ray(head),
        *(_ray(node) for node in rest),
        "# The engine. It continues without this connection. Its log and process id are in the head's folder.",
        _engine(plan),
        "# The port opens when the model is loaded, which takes long. The engine is ready when it answers a real request.",
        _wait(plan),
    ]
    return "\n\n".join(blocks) + "\n"


def _preamble(plan: ServePlan) -> str:
    spares = f"\n# Spare nodes, not started: {' '.join(plan.spares)}" if plan.spares else ""
    return f"""#!/usr/bin/env bash
# {plan.deployment}: {plan.model} at {plan.revision}, {plan.engine}, {plan.layout.name}
# Plan {plan.id}, printed by `deploy plan --shell`.
# Environment and weights must exist: {plan.serve[0]}, {_model_folder(plan)}{spares}
set -euo pipefail
umask 077

# Host keys that `deploy init` pinned. A node with another key is refused.
known_hosts=${{KNOWN_HOSTS:-.deploy/known_hosts}}
secrets=${{SECRETS:-.deploy/script}}"""


def _model_folder(plan: ServePlan) -> str:
    return next(word for word in plan.serve[1:] if word.startswith("/"))


def _functions(nodes: Iterable[tuple[NodePlan, Node | None]]) -> str:
    cases = "\n".join(f"        {node_plan.name}) set -- {shlex.join(_ssh(node_plan, node))} ;;" for node_plan, node in nodes)
    return f"""# on NODE COMMAND: run a command on a node, with the stdin of this function.
on() {{
    local node=$1 command=$2
    case $node in
{cases}
    esac
    ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o "UserKnownHostsFile=$known_hosts" "$@" "$command"
}}

# secret FILE: create the file if it does not exist.
secret() {{
    mkdir -p "$secrets"
    [ -s "$secrets/$1" ] || od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >"$secrets/$1"
}}"""


def _ssh(plan: NodePlan, node: Node | None) -> list[str]:
    words: list[str] = []
    if node and node.port != 22:
        words += ["-p", str(node.port)]
    if node and node.key:
        words += ["-i", str(node.key)]
    if node and node.jump:
        words += ["-J", node.jump]
    return [*words, f"{node.user}@{plan.address}" if node and node.user else plan.address]


def _secrets(plan: ServePlan) -> str:
    lines = ["secret ray-token", "secret api-key"]
    lines += [_place(node.name, "ray-token", node.env[TOKEN_FILE]) for node in plan.nodes]
    lines.append(_place(plan.head.name, "api-key", _beside_token(plan.head, "api-key")))
    return "\n".join(lines)


def _place(node: str, name: str, target: str) -> str:
    folder = shlex.quote(str(PurePosixPath(target).parent))
    command = f"umask 077 && mkdir -p {folder} && cat >{shlex.quote(target)}"
    return f'on {node} {shlex.quote(command)} <"$secrets/{name}"'


def _beside_token(node: NodePlan, name: str) -> str:
    return str(PurePosixPath(node.env[TOKEN_FILE]).parent / name)


def _script(node: str, lines: Sequence[str]) -> str:
    return "\n".join([f"on {node} 'bash -s' <<'NODE'", "set -eu", *lines, "NODE"])


def _exports(env: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in env.items()]


def _ray(node: NodePlan) -> str:
    return _script(node.name, [*_exports(node.env), _folded(node.ray)])


def _engine(plan: ServePlan) -> str:
    key, log, pid = (shlex.quote(_beside_token(plan.head, name)) for name in ("api-key", "engine.log", "engine.pid"))
    return _script(
        plan.head.name,
        [
            *_exports(plan.serve_env),
            *(f"{name}=$(cat {key})\nexport {name}" for name in plan.secret_env),
            f"setsid nohup {_folded(plan.serve)} \\\n    </dev/null >{log} 2>&1 &",
            f"echo $! >{pid}",
        ],
    )


def _wait(plan: ServePlan) -> str:
    port = plan.serve[plan.serve.index("--port") + 1]
    request = f'{{"model": "{plan.model}", "prompt": "1 2 3", "max_tokens": 1}}'
    key, log, pid = (shlex.quote(_beside_token(plan.head, name)) for name in ("api-key", "engine.log", "engine.pid"))
    loop = [
        f"pid=$(cat {pid})",
        f'until {{ printf \'header = "Authorization: Bearer %s"\\n\' "$(cat {key})"; }} |',
        "    curl -fsS --config - -H 'Content-Type: application/json' \\",
        f"        -d {shlex.quote(request)} http://127.0.0.1:{port}/v1/completions 2>/dev/null",
        "do",
        f'    kill -0 "$pid" || {{ tail -n 50 {log} >&2; exit 1; }}',
        "    sleep 10",
        "done",
    ]
    return _script(plan.head.name, loop)


def _folded(words: Sequence[str]) -> str:
    """The command with one option per line."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n    ".join(" ".join(line) for line in lines)

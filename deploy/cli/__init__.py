"""`deploy`: the command line. Parses, calls, prints; nothing else. A command's module is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import click

from deploy.cli.common import DeployContext
from gracefarm import console
from gracefarm.cli import SETTINGS, LazyGroup, json_option
from gracefarm.console import Console

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        # name: (module:function, what --help says of it), in the order in which they are used
        "init": ("deploy.cli.init:init", "Write deploy.toml, pin host keys, ask every node what it is."),
        "facts": ("deploy.cli.init:facts", "What the nodes are; asked now, or as kept."),
        "plan": ("deploy.cli.plan:plan", "Layout, memory, speed, cost, and the exact commands."),
        "preflight": ("deploy.cli.serve:preflight_command", "Every check on every node and pair."),
        "up": ("deploy.cli.serve:up", "Preflight, NFS cache, environment, weights, proof: what is missing."),
        "serve": ("deploy.cli.serve:serve", "`up`, then Ray and the engine, until a real completion comes back."),
        "run": ("deploy.cli.nodes:run", "A command on all nodes at once, or on some."),
        "ssh": ("deploy.cli.nodes:ssh", "Into one node."),
        "env": ("deploy.cli.env:env", "Environments: build, list, roll back, collect."),
        "weights": ("deploy.cli.weights:weights_group", "The model's files: verify."),
        "status": ("deploy.cli.watch:status", "Every node, and the service by a real completion; the exit code tells."),
        "top": ("deploy.cli.watch:top", "The same, live, with tokens/s and cost."),
        "logs": ("deploy.cli.watch:logs", "The engine's log, and Ray's of every node; -f follows."),
        "tunnel": ("deploy.cli.tunnel:tunnel", "The engine and Ray's dashboard on this machine's loopback."),
        "ask": ("deploy.cli.ask:ask", "A question to the model, and how fast the answer came."),
        "bench": ("deploy.cli.bench:bench", "A sweep over requests at once, beside the prediction."),
        "collect": ("deploy.cli.watch:collect", "One redacted bundle, with the first cause on top."),
        "down": ("deploy.cli.serve:down", "End the engine and Ray, and look that nothing is left."),
        "purge": ("deploy.cli.serve:purge", "`down`, then remove what the farm put on the nodes."),
        "rehearse": ("deploy.cli.rehearse:rehearse", "The whole way on this machine: real sshd, real Ray, no GPU."),
        "schema": ("deploy.cli.plan:schema_command", "JSON schemas of deploy.toml and of the plan."),
    }
)


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=SETTINGS)
@click.version_option(package_name="gracefarm")
@click.option(
    "--file", type=click.Path(path_type=Path), metavar="PATH", help="deploy.toml; default: here, or the nearest above."
)
@json_option
@click.pass_context
def cli(context: click.Context, file: Path | None) -> None:
    """From a list of nodes to a served model.

    \b
    deploy init ips.txt
    deploy serve
    deploy ask "Why is the sky blue?"
    """
    context.obj = DeployContext(file=file, console=Console(as_json="--json" in sys.argv))


def main() -> None:
    """The console script."""
    console.run(lambda: cli.main(standalone_mode=False), as_json="--json" in sys.argv, extra="deploy")

"""`deploy`: the command line. It only parses, calls and prints. The module of a command is imported when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import click

from deploy.cli.common import DeployContext
from gracefarm import console
from gracefarm.cli import SETTINGS, LazyGroup, json_requested
from gracefarm.console import Console

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        # name: (module:function, summary for --help), in the order of a typical workflow
        "init": ("deploy.cli.init:init", "Write deploy.toml, pin host keys, collect facts of all nodes."),
        "facts": ("deploy.cli.init:facts", "Collect and show the facts of all nodes."),
        "plan": ("deploy.cli.plan:plan", "Show layout, memory, speed, cost and exact commands."),
        "preflight": ("deploy.cli.serve:preflight_command", "Run all checks on all nodes and pairs of nodes."),
        "up": ("deploy.cli.serve:up", "Prepare the nodes: cache, environment, weights."),
        "serve": ("deploy.cli.serve:serve", "Start Ray and the engine, and wait for a completion."),
        "run": ("deploy.cli.nodes:run", "Run a command on all or some nodes in parallel."),
        "ssh": ("deploy.cli.nodes:ssh", "Open an ssh session on a node."),
        "env": ("deploy.cli.env:env", "Build, list, roll back and remove environments."),
        "weights": ("deploy.cli.weights:weights_group", "Verify the model's files."),
        "status": ("deploy.cli.watch:status", "Show the state of the nodes and of the service."),
        "top": ("deploy.cli.watch:top", "Show the state live, with tokens/s and cost."),
        "logs": ("deploy.cli.watch:logs", "Show the logs of the engine and of Ray."),
        "tunnel": ("deploy.cli.tunnel:tunnel", "Forward the engine and Ray's dashboard to this machine."),
        "ask": ("deploy.cli.ask:ask", "Send a prompt to the model and show its speed."),
        "bench": ("deploy.cli.bench:bench", "Measure the speed with several concurrent requests."),
        "collect": ("deploy.cli.watch:collect", "Collect all logs in one redacted archive."),
        "down": ("deploy.cli.serve:down", "Stop the engine and Ray on all nodes."),
        "purge": ("deploy.cli.serve:purge", "Stop everything and remove all files from the nodes."),
        "rehearse": ("deploy.cli.rehearse:rehearse", "Rehearse a deployment on this machine without a GPU."),
        "schema": ("deploy.cli.plan:schema_command", "Print the JSON schemas of deploy.toml and of the plan."),
    }
)


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=SETTINGS)
@click.version_option(package_name="gracefarm")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Path of deploy.toml. Default: the deploy.toml in this folder or in the nearest parent folder.",
)
@click.pass_context
def cli(context: click.Context, file: Path | None) -> None:
    """Serve a model on a list of nodes.

    \b
    deploy init ips.txt
    deploy serve
    deploy ask "Why is the sky blue?"
    """
    context.obj = DeployContext(file=file, console=Console(as_json=json_requested()))


def main() -> None:
    """Entry point of the console script."""
    console.run(lambda: cli.main(standalone_mode=False, prog_name="deploy"), as_json=json_requested(), extra="deploy")

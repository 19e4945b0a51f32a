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
        "init": ("deploy.cli.init:init", "Write deploy.toml, trust the nodes' ssh host keys, collect facts."),
        "facts": ("deploy.cli.init:facts", "Collect facts of all nodes (GPUs, memory, network), and show them."),
        "plan": ("deploy.cli.plan:plan", "Show how the GPUs share the model, and the predicted speed and cost."),
        "preflight": ("deploy.cli.serve:preflight_command", "Check all nodes and the network between them."),
        "up": ("deploy.cli.serve:up", "Prepare the nodes: install the software, download the model."),
        "serve": ("deploy.cli.serve:serve", "Start the engine, and wait until it answers."),
        "run": ("deploy.cli.nodes:run", "Run a command on all or some nodes in parallel."),
        "ssh": ("deploy.cli.nodes:ssh", "Open an ssh session on a node."),
        "env": ("deploy.cli.env:env", "Build, list, switch and remove the engine's Python environments."),
        "weights": ("deploy.cli.weights:weights_group", "Check the model's files."),
        "status": ("deploy.cli.watch:status", "Show the state of the nodes and of the engine."),
        "top": ("deploy.cli.watch:top", "Show the state live, with tokens/s and cost."),
        "logs": ("deploy.cli.watch:logs", "Show the logs of the engine and of Ray."),
        "tunnel": ("deploy.cli.tunnel:tunnel", "Make the engine available on this machine, through ssh."),
        "ask": ("deploy.cli.ask:ask", "Send a prompt to the model, and show the answer and its speed."),
        "bench": ("deploy.cli.bench:bench", "Measure the engine's speed with several requests at the same time."),
        "collect": ("deploy.cli.watch:collect", "Collect all logs in one archive, without secrets."),
        "down": ("deploy.cli.serve:down", "Stop the engine and Ray on all nodes."),
        "purge": ("deploy.cli.serve:purge", "Stop everything, and remove files from the nodes."),
        "rehearse": ("deploy.cli.rehearse:rehearse", "Try all steps on this machine with simulated nodes."),
        "schema": ("deploy.cli.plan:schema_command", "Print the JSON schemas of deploy.toml and of the plan."),
    }
)


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=SETTINGS)
@click.version_option(package_name="gracefarm")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Path of deploy.toml. Default: deploy.toml in the working directory, else in the nearest parent folder that has one.",
)
@click.pass_context
def cli(context: click.Context, file: Path | None) -> None:
    """Serve a model on a list of machines (nodes).

    The nodes must have NVIDIA GPUs and a shared folder, and this machine must reach them with ssh. `deploy init` writes
    deploy.toml, which describes the nodes and the model. The engine is the program that serves the model, such as vLLM. Ray
    is the program that connects the nodes. The head is the first node, on which the engine accepts requests.

    \b
    # Write deploy.toml for the addresses in ips.txt.
    deploy init ips.txt
    # Prepare the nodes, and start the engine.
    deploy serve
    # Send a prompt to the model.
    deploy ask "Why is the sky blue?"
    """
    context.obj = DeployContext(file=file, console=Console(as_json=json_requested()))


def main() -> None:
    """Entry point of the console script."""
    console.run(lambda: cli.main(standalone_mode=False, prog_name="deploy"), as_json=json_requested(), extra="deploy")

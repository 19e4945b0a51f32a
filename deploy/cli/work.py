"""Code for commands that work on the nodes: the lock of the state, and the connections."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import click

from deploy.cli.common import DeployContext
from deploy.fleet.ssh import open_fleet
from deploy.nodes import redact, state
from deploy.nodes.facts import load_facts
from deploy.nodes.state import Keeper
from deploy.steps.step import Work
from gracefarm import settings
from gracefarm.console import Console
from gracefarm.errors import ExitCode, GracefarmError

T = TypeVar("T")
_GOES_ON = "interrupted; jobs on the nodes continue. To wait for them, repeat the command. To stop them, run `deploy down`"


@contextmanager
def held(context: DeployContext, *, no_wait: bool = False) -> Iterator[Keeper]:
    """Lock the state for this command."""
    command = shlex.join(["deploy", *sys.argv[1:]])

    def waiting(who: str) -> None:
        context.console.step("wait", f"{who} is running for this deployment; waiting for it")

    with state.hold(context.deployment.folder, command, wait=not no_wait, on_wait=waiting) as keeper:
        yield keeper


def at_work(context: DeployContext, keeper: Keeper, do: Callable[[Work], Awaitable[T]]) -> T:
    """Run `do` with connections to the nodes. Ctrl-C prints that detached jobs continue."""
    deployment = context.deployment
    facts = load_facts(deployment)
    for node in deployment.nodes:
        facts.node(node.name)
    clean = redact.of(deployment.folder).line  # causes may contain lines of other programs' logs

    async def go() -> T:
        async with open_fleet(deployment) as fleet:
            return await do(
                Work(
                    deployment=deployment,
                    fleet=fleet,
                    facts=facts,
                    keeper=keeper,
                    console=Console(as_json=context.console.as_json, clean=clean),
                    settings=settings.load(),
                )
            )

    try:
        return asyncio.run(go())
    except GracefarmError as error:
        raise type(error)(clean(error.cause), remedy=clean(error.remedy), repeat=error.repeat) from error
    except KeyboardInterrupt:
        context.console.event("error", _GOES_ON)
        sys.exit(ExitCode.INTERRUPTED)


no_wait_option = click.option(
    "--no-wait",
    is_flag=True,
    help="If another deploy command is working on these nodes, fail at once. Without this option, wait until the other "
    "command ends.",
)

"""`deploy rehearse`: a whole deployment on this machine, with real sshd, real Ray and a simulated engine."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from deploy.cli.common import DeployContext, reporting
from deploy.rehearsal import walkthrough
from deploy.rehearsal.walkthrough import Rehearsal
from gracefarm import extras, settings

LOOKS = (
    ("ask", "What is a wheel?", "--max-tokens", "16"),
    ("bench", "--concurrency", "1,4", "--requests", "8", "--max-tokens", "32"),
    ("status",),
)
"Commands to run when the engine is READY."


@click.command()
@click.option(
    "--nodes",
    "count",
    default=3,
    show_default=True,
    type=click.IntRange(1, 89),
    help="Number of nodes. Each node simulates one GPU.",
)
@click.option("--keep", is_flag=True, help="Do not stop the nodes at the end. They run until Ctrl-C.")
@reporting
def rehearse(context: DeployContext, count: int, keep: bool) -> None:
    """Try all steps on this machine with simulated nodes, from `deploy init` to an answer of the model.

    Each node is a group of Linux namespaces with its own ssh server. Ray (the program that connects the nodes) is real. The
    engine (the program that serves the model) is simulated: it accepts the options of the engine Aphrodite, but loads no
    model. The command requires root, but no GPU. It shows the duration of each step. At the end, it stops all processes that
    it has started.

    \b
    # Try all steps with 3 nodes.
    deploy rehearse
    # Try all steps with 10 nodes.
    deploy rehearse --nodes 10
    """
    extras.require("index")
    console, here = context.console, settings.load()
    begin = time.monotonic()
    with _interrupted_by_signals(), walkthrough.rehearsal(count, here.home, here, console) as rehearsal:
        walkthrough.start(rehearsal)
        rehearsal.command("up")
        rehearsal.command("serve")
        ready = time.monotonic() - begin
        answer = _ask(rehearsal)
        for name, *more in LOOKS:
            rehearsal.command(name, *more)
        if keep:
            _wait(rehearsal)
        rehearsal.command("down")
        if not keep:  # a user's deployment may still run on the nodes, and ends with them
            walkthrough.nothing_left(rehearsal)
    rows = [{"step": step.name, "argv": step.argv, "seconds": round(step.seconds, 2)} for step in rehearsal.steps]
    document = {"nodes": count, "ready_s": round(ready, 2), "steps": rows, **answer}
    lines = [f"{step.name:>9}  {step.seconds:6.1f} s" for step in rehearsal.steps]
    lines.append(f"READY after {ready:.0f} s on {count} nodes; {answer['tokens']} tokens streamed; nothing is left running")
    console.result(document, "\n".join(lines))


def _ask(rehearsal: Rehearsal) -> dict[str, object]:
    """Send a prompt through the tunnel."""
    text: list[str] = []
    key = (rehearsal.folder / ".deploy" / "api-key").read_text().strip()
    with rehearsal.beside("tunnel", "--json") as tunnel:
        url = walkthrough.tunnelled(tunnel)
        begin = time.monotonic()
        tokens = walkthrough.ask(rehearsal, url, key, on_text=text.append)
        seconds = time.monotonic() - begin
    answer = "".join(text)
    rehearsal.console.step("answer", f"{answer}  ({tokens} tokens in {seconds:.2f} s through {url})")
    return {"tokens": tokens, "text": answer, "answer_s": round(seconds, 2)}


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt within the block, so that it cleans up.

    A shell without job control starts a command with `&` in such a way that it ignores SIGINT.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _wait(rehearsal: Rehearsal) -> None:
    for sentence in kept(rehearsal):
        rehearsal.console.step("keep", sentence)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        rehearsal.console.step("keep", "stopping the rehearsal")


def kept(rehearsal: Rehearsal) -> list[str]:
    """What a user can do with the nodes of a kept rehearsal."""
    variables = [f"{name}={value}" for name, value in rehearsal.environ.items()]
    shell = shlex.join(rehearsal.room.command(["env", *variables, "bash"]))
    return [
        f"READY; deploy.toml is in {rehearsal.folder}",
        f"open a shell in the nodes' network with: {shell}",
        "to use the nodes for another deployment, first run `deploy down` in the folder of deploy.toml",
        "end the rehearsal with Ctrl-C",
    ]

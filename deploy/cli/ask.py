"""`deploy ask`: send a prompt, stream the answer, show its speed."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click

from deploy.cli.common import DeployContext, reporting
from deploy.cli.server import opened_server
from deploy.engine.completion import Answer, Api, CompletionServer, Prompt
from deploy.measure.bench import find_model, query


@click.command()
@click.argument("question", nargs=-1, required=True)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Maximum number of tokens of the answer.",
)
@click.option(
    "--api",
    type=click.Choice(["chat", "completions"]),
    default="chat",
    show_default=True,
    help="API to use. chat: the model answers the prompt. completions: the model continues the text.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    help="Stop with an error if no text arrives for this many seconds.",
)
@click.option(
    "--url",
    metavar="URL",
    help="Use this OpenAI-compatible server instead of the engine. The environment variable OPENAI_API_KEY contains the key "
    "of this server.",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --url: file with the key of the server.",
)
@click.option("--model", help="Model to use, if the server has several models. Default: the first model.")
@reporting
def ask(
    context: DeployContext,
    question: tuple[str, ...],
    max_tokens: int,
    api: Api,
    patience: float,
    url: str | None,
    key_file: Path | None,
    model: str | None,
) -> None:
    """Send a prompt to the model, and show the answer and its speed.

    QUESTION is the prompt. The command reaches the engine (the program that serves the model) through ssh. It prints the
    answer while the model generates the answer. At the end, it prints the number of tokens per second.

    \b
    # Ask the model a question.
    deploy ask "Why is the sky blue?"
    # Let the model continue a text.
    deploy ask --api completions "Once upon a time"
    """
    key = key_file.read_text().strip() if key_file else os.environ.get("OPENAI_API_KEY")

    async def go() -> None:
        async with opened_server(context, url, key) as server:
            asked = Prompt(model=model or "", text=" ".join(question), max_tokens=max_tokens, api=api)
            await _query(context, server, asked, patience)

    asyncio.run(go())


async def _query(context: DeployContext, server: CompletionServer, asked: Prompt, patience: float) -> None:
    """Send the prompt. If it has no model, use the first one that is served."""
    async with server.client() as client:
        name = await find_model(client, asked.model or None)

    def show(text: str) -> None:
        if not context.console.as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    answer = await query(server, replace(asked, model=name), patience=patience, on_text=show)
    if context.console.as_json:
        context.console.result({"model": name, **asdict(answer), "chunks": answer.chunks, "tokens_per_s": _rate(answer)})
        return
    show("\n")
    first = f", the first after {answer.first:.2f} s" if answer.first is not None else ""
    if answer.tokens:
        later = f"; after the first {1 / answer.per_token:.1f} tokens/s" if answer.per_token else ""
        text = f"{answer.tokens} tokens in {answer.seconds:.2f} s{first}: {_rate(answer):.1f} tokens/s{later}"
        context.console.step("ask", f"{text} ({answer.chunks} chunks)")
    else:
        context.console.warn(f"{answer.chunks} chunks in {answer.seconds:.2f} s{first}; {answer.cause}")


def _rate(answer: Answer) -> float | None:
    return round(answer.tokens / answer.seconds, 3) if answer.tokens else None

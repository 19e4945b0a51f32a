"""`deploy bench`: the engine's speed, asked for from this machine."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import click
import httpx
from rich.markup import escape
from rich.table import Column, Table

from deploy.cli.common import DeployContext, output, reporting
from deploy.engine.completion import Answer, Api, CompletionServer, Prompt
from deploy.fleet import tunnels
from deploy.fleet.ssh import open_fleet
from deploy.fleet.tunnels import WantedPort
from deploy.measure.bench import Level, Spread, Sweep, SweepReport, find_model, query, run_sweep
from deploy.nodes.deployment import Folder
from deploy.planning.plans import ServePlan
from deploy.watch.status import plan_of
from gracefarm.errors import UsageError
from gracefarm.files import atomic_write

QUESTION = "Explain in one paragraph why the sky is blue."


def _key(folder: Folder) -> str | None:
    """The engine's key, if one was made."""
    with suppress(FileNotFoundError):
        return folder.api_key.read_text().strip()
    return None


class _Numbers(click.ParamType[tuple[int, ...]]):
    """1,2,4,8"""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        words = str(value).split(",")
        if not all(word.strip().isdigit() and int(word) > 0 for word in words):
            self.fail(f"{value!r}: numbers with commas between, as 1,2,4,8", param, ctx)
        return tuple(int(word) for word in words)


@click.command()
@click.option("--concurrency", type=_Numbers(), metavar="N,N,…", help="Sweep: requests at once, as 1,2,4,8,16.")
@click.option("--requests", type=click.IntRange(1), help="Sweep: of each level; default: 4 x concurrency, at least 8.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Sweep: about so many.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of each answer.")
@click.option("--prompt", default=QUESTION, help="Without a sweep: what is asked.")
@click.option("--api", type=click.Choice(["completions", "chat"]), default="completions", show_default=True)
@click.option("--patience", type=click.FloatRange(min=1), default=120.0, show_default=True, help="Seconds without any text.")
@click.option("--url", metavar="URL", help="Any OpenAI-compatible server, without a deployment; its key in OPENAI_API_KEY.")
@click.option("--key-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Of --url: its key.")
@click.option("--model", help="Of several that are served; default: the first.")
@reporting
def bench(
    context: DeployContext,
    concurrency: tuple[int, ...] | None,
    requests: int | None,
    prompt_tokens: int,
    max_tokens: int,
    prompt: str,
    api: Api,
    patience: float,
    url: str | None,
    key_file: Path | None,
    model: str | None,
) -> None:
    """One streamed query with its tokens/s; with --concurrency a sweep, beside what the plan predicted.

    \b
    deploy bench
    deploy bench --concurrency 1,2,4,8,16,32
    deploy bench --url http://127.0.0.1:8000/v1 --concurrency 1,4

    Tokens are counted by the server (usage), for a chunk of the stream may hold several. A sweep is kept in
    .deploy/bench; $/Mtok needs price_per_node_hour in deploy.toml.
    """
    plan = None if url else plan_of(context.deployment.folder)
    key = key_file.read_text().strip() if key_file else os.environ.get("OPENAI_API_KEY")

    async def go() -> None:
        async with _server(context, url, key) as server:
            if concurrency is None:
                asked = Prompt(model=model or "", text=prompt, max_tokens=max_tokens, api=api)
                await _query(context, server, asked, patience)
                return
            sweep = Sweep(
                concurrency=concurrency,
                requests=requests,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                api=api,
                patience=patience,
                seed=int(time.time()),
            )
            report = await _sweep(context, server, sweep, plan, model)
            _keep(context, report, stay=url is None)

    asyncio.run(go())


@asynccontextmanager
async def _server(context: DeployContext, url: str | None, key: str | None) -> AsyncIterator[CompletionServer]:
    """Of --url, else the deployment's through SSH."""
    if url:
        _check(url)
        local = any(f"//{host}" in url for host in ("127.", "localhost", "[::1]"))
        yield CompletionServer(url=url, key=key, direct=local)
        return
    deployment = context.deployment
    wanted = [WantedPort(name="engine", remote=deployment.data.ports.engine, local=0)]
    async with open_fleet(deployment) as nodes, tunnels.opened(nodes, deployment.head, wanted) as (forward,):
        yield CompletionServer(url=f"http://127.0.0.1:{forward.local}", key=_key(deployment.folder))


def _check(url: str) -> None:
    """Raises UsageError: no address of a server."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"--url {url}: {error}", remedy="http://HOST:PORT/v1") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"--url {url} is no address of a server", remedy="http://HOST:PORT/v1")


async def _query(context: DeployContext, server: CompletionServer, asked: Prompt, patience: float) -> None:
    """`asked` without a model is for the first that is served."""
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
        context.console.step("bench", f"{text} ({answer.chunks} chunks)")
    else:
        context.console.warn(f"{answer.chunks} chunks in {answer.seconds:.2f} s{first}; {answer.cause}")


def _rate(answer: Answer) -> float | None:
    return round(answer.tokens / answer.seconds, 3) if answer.tokens else None


async def _sweep(
    context: DeployContext, server: CompletionServer, sweep: Sweep, plan: ServePlan | None, model: str | None
) -> SweepReport:
    with context.console.progress("bench") as tick:

        def answered(concurrency: int, answers: int, count: int) -> None:
            tick(answers, count, f"{concurrency} at once")

        def summed(level: Level) -> None:
            wrong = f", {sum(level.errors.values())} failed ({level.first_error})" if level.errors else ""
            context.console.step("bench", f"{level.concurrency} at once: {level.tokens_per_s:.1f} tokens/s{wrong}")

        return await run_sweep(server, sweep, model=model, plan=plan, on_answer=answered, on_level=summed)


def _keep(context: DeployContext, report: SweepReport, *, stay: bool) -> None:
    """Print it; `stay`: keep it in the deployment's folder too."""
    kept = None
    if stay:
        folder = context.deployment.folder.path / "bench"
        folder.mkdir(mode=0o700, exist_ok=True)
        kept = folder / time.strftime("%Y-%m-%dT%H-%M-%S.json", time.localtime(report.taken))
        atomic_write(kept, report.model_dump_json(indent=1) + "\n")
    if context.console.as_json:
        context.console.result(report.model_dump() | {"kept": str(kept) if kept else None})
        return
    _table(report)
    if kept:
        context.console.step("bench", f"kept: {kept}")


def _table(report: SweepReport) -> None:
    out = output()
    ended = "" if report.to_the_end else "at most "
    out.print(
        f"[bold]{escape(report.model)}[/]{', ' + report.layout if report.layout else ''}; about {report.prompt_tokens} tokens"
        f" in, {ended}{report.max_tokens} out"
    )
    heads = (
        "at once",
        "answered",
        "tokens/s",
        "predicted",
        "a stream",
        "first ms p50/p90/p99",
        "token ms p50/p90/p99",
        "$/Mtok",
    )
    table = Table(*(Column(head, justify="right") for head in heads), box=None, pad_edge=False)
    for level in report.levels:
        wrong = " ".join(f"[red]{count} {escape(kind)}[/]" for kind, count in level.errors.items())
        table.add_row(
            str(level.concurrency),
            f"{level.answered}/{level.requests}{' ' + wrong if wrong else ''}",
            f"{level.tokens_per_s:.1f}",
            _number(level.predicted_tokens_per_s, ".1f"),
            _number(level.stream_tokens_per_s, ".1f"),
            _spread(level.first_ms),
            _spread(level.token_ms),
            _number(level.usd_per_mtok, ",.2f"),
        )
    out.print(table)
    measured = report.levels[0]
    if measured.concurrency == 1 and measured.predicted_tokens_per_s and measured.tokens_per_s:
        off = 100 * (measured.predicted_tokens_per_s / measured.tokens_per_s - 1)
        words = f"{abs(off):.0f} % {'more' if off > 0 else 'less'} than measured"
        out.print(f"[dim]one stream: predicted {measured.predicted_tokens_per_s:.1f}, {words}[/]")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _spread(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.p50:.0f}/{spread.p90:.0f}/{spread.p99:.0f}"

"""`deploy bench`: measure the engine's speed with several concurrent requests, from the head or from this machine."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Literal

import click
from rich.markup import escape
from rich.table import Column, Table

from deploy.cli.common import DeployContext, output, reporting
from deploy.cli.server import opened_server
from deploy.engine.completion import Api, CompletionServer
from deploy.fleet.ssh import open_fleet
from deploy.measure.bench import Client, Level, MeasureLevel, Spread, Sweep, SweepReport, run_sweep
from deploy.measure.vllm_bench import NoVllmBenchError, VllmBench
from deploy.planning.plans import ServePlan
from deploy.watch.status import plan_of
from gracefarm.errors import UsageError
from gracefarm.files import atomic_write

CLIENTS: dict[Client, str] = {"own": "the client of `deploy` on this machine", "vllm": "`vllm bench serve` on the head"}


class _Numbers(click.ParamType[tuple[int, ...]]):
    """Numbers separated by commas, such as 1,2,4,8."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        words = str(value).split(",")
        if not all(word.strip().isdigit() and int(word) > 0 for word in words):
            self.fail(f"{value!r} is not a list of numbers such as 1,2,4,8", param, ctx)
        return tuple(int(word) for word in words)


@click.command()
@click.option(
    "--concurrency",
    type=_Numbers(),
    metavar="N,N,…",
    default="1,4,16",
    show_default=True,
    help="Numbers of concurrent requests. The command makes one measurement for each number.",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    help="Number of requests in each measurement. Default: 4 times the number of concurrent requests, but at least 8.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Approximate number of tokens of each prompt.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Maximum number of tokens of each answer."
)
@click.option(
    "--api",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="API of the engine to use.",
)
@click.option(
    "--client",
    type=click.Choice(["auto", "vllm", "own"]),
    default="auto",
    show_default=True,
    help="Program that sends the requests. vllm: the program `vllm bench serve` on the head. own: `deploy bench` itself, on "
    "this machine, through ssh. auto: vllm if the engine is vLLM and has `vllm bench serve`, else own.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    help="With --client own: a request fails if no text arrives for this many seconds.",
)
@click.option(
    "--url",
    metavar="URL",
    help="Measure this OpenAI-compatible server instead of the engine. The environment variable OPENAI_API_KEY contains the "
    "key of this server.",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --url: file with the key of the server.",
)
@click.option("--model", help="Model to measure, if the server has several models. Default: the first model.")
@reporting
def bench(
    context: DeployContext,
    concurrency: tuple[int, ...],
    requests: int | None,
    prompt_tokens: int,
    max_tokens: int,
    api: Api,
    client: Literal["auto", "vllm", "own"],
    patience: float,
    url: str | None,
    key_file: Path | None,
    model: str | None,
) -> None:
    """Measure the speed with several requests at the same time.

    The command sends requests to the engine (the program that serves the model). For each number of concurrent requests, it
    shows tokens/s, latencies, the prediction of `deploy plan`, and the cost in dollars per million tokens ($/Mtok). The cost
    is computed from price_per_node_hour in deploy.toml, or from the prices of the GPUs in `deploy plan`. The results are
    stored in the folder .deploy/bench beside deploy.toml, except with --url.

    \b
    # Measure with 1, 4 and 16 concurrent requests.
    deploy bench
    # Measure with up to 32 concurrent requests.
    deploy bench --concurrency 1,2,4,8,16,32
    # Send the requests from this machine.
    deploy bench --client own
    # Measure a different server.
    deploy bench --url http://127.0.0.1:8000/v1 --concurrency 1,4
    """
    plan = None if url else plan_of(context.deployment.folder)
    key = key_file.read_text().strip() if key_file else os.environ.get("OPENAI_API_KEY")
    on_head = client != "own" and _on_head(url, plan, required=client == "vllm")

    async def go() -> None:
        async with opened_server(context, url, key) as server:
            sweep = Sweep(
                concurrency=concurrency,
                requests=requests,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                api=api,
                patience=patience,
                seed=int(time.time()),
            )
            report = None
            if plan and on_head:
                async with open_fleet(context.deployment) as fleet:
                    vllm = VllmBench(fleet=fleet, deployment=context.deployment, plan=plan, sweep=sweep, key=server.key)
                    try:
                        report = await _sweep(context, server, sweep, plan, model, vllm.level)
                    except NoVllmBenchError as missing:
                        if client == "vllm":
                            raise
                        context.console.step("bench", f"{missing.cause}; measuring with {CLIENTS['own']} instead")
            report = report or await _sweep(context, server, sweep, plan, model)
            _keep(context, report, stay=url is None)

    asyncio.run(go())


def _on_head(url: str | None, plan: ServePlan | None, *, required: bool) -> bool:
    """Whether the engine may have `vllm bench serve`. Raises UsageError if it does not and this is `required`."""
    if url:
        reason = "`vllm bench serve` runs only on the head, so it cannot be used with --url"
    elif plan is None:
        reason = "`deploy serve` has not started an engine yet"
    else:
        reason = "" if plan.engine == "vllm" else f"the engine is {plan.engine}"
    if reason and required:
        raise UsageError(f"--client vllm: {reason}", remedy="use --client own, or omit the option")
    return not reason


async def _sweep(
    context: DeployContext,
    server: CompletionServer,
    sweep: Sweep,
    plan: ServePlan | None,
    model: str | None,
    vllm_level: MeasureLevel | None = None,
) -> SweepReport:
    with context.console.progress("bench") as tick:

        def answered(concurrency: int, answers: int, count: int) -> None:
            tick(answers, count, f"{concurrency} concurrent")

        def summed(level: Level) -> None:
            wrong = f", {sum(level.errors.values())} failed ({level.first_error})" if level.errors else ""
            context.console.step("bench", f"{level.concurrency} concurrent: {level.tokens_per_s:.1f} tokens/s{wrong}")

        return await run_sweep(
            server, sweep, model=model, plan=plan, vllm_level=vllm_level, on_answer=answered, on_level=summed
        )


def _keep(context: DeployContext, report: SweepReport, *, stay: bool) -> None:
    """Print the report; with `stay`, also store it in the deployment's folder."""
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
        context.console.step("bench", f"stored as {kept}")


def _table(report: SweepReport) -> None:
    out = output()
    ended = "" if report.to_the_end else "at most "
    out.print(
        f"[bold]{escape(report.model)}[/]{', ' + report.layout if report.layout else ''}; about {report.prompt_tokens} tokens"
        f" in, {ended}{report.max_tokens} out; measured by {CLIENTS[report.client]}"
    )
    heads = (
        "concurrent",
        "answered",
        "tokens/s",
        "predicted",
        "per stream",
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

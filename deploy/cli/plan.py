"""`deploy plan`: what would run, what it would hold, how fast it would be, and why not otherwise."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import click
from pydantic import BaseModel
from rich import box
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deploy.cli.common import DeployContext, reporting
from deploy.nodes import state
from deploy.nodes.config import FILE, Config, ModelConfig
from deploy.nodes.deployment import Deployment, find_config
from deploy.nodes.facts import Facts, load_facts
from deploy.planning import engines, layouts, models, plans, script, speed, suppose
from deploy.planning.plans import ServePlan
from gracefarm.errors import ConfigError, UsageError
from gracefarm.files import atomic_write


@click.command()
@click.option("--shell", is_flag=True, help="As a bash script, on stdout.")
@click.option(
    "--nodes", "count", type=click.IntRange(1), metavar="N", help="Suppose N nodes; none is asked, none needs to exist."
)
@click.option("--gpu", "kind", metavar="KIND", help="What the supposed nodes are; default: gh200-96.")
@click.option("--engine", "engine_name", type=click.Choice(["aphrodite", "vllm"]), help="With --nodes: this engine.")
@click.option("--model", "repo", metavar="REPO", help="With --nodes: this model.")
@click.option("--tp", type=click.IntRange(1), help="With --nodes: this many GPUs share every layer.")
@click.option("--pp", type=click.IntRange(1), help="With --nodes: this many stages.")
@reporting
def plan(
    context: DeployContext,
    shell: bool,
    count: int | None,
    kind: str | None,
    engine_name: str | None,
    repo: str | None,
    tp: int | None,
    pp: int | None,
) -> None:
    """Layout, memory, predicted speed and cost, rejected layouts, and the exact commands; nothing is started or asked.

    \b
    deploy plan
    deploy plan --shell > serve.sh
    deploy plan --nodes 10 --gpu gh200-96
    deploy plan --nodes 10 --tp 5 --pp 2
    """
    if count is None and any((kind, engine_name, repo, tp, pp)):
        raise UsageError(
            "--gpu, --engine, --model, --tp and --pp suppose nodes",
            remedy="say --nodes N, or set it in deploy.toml ([layout])",
        )
    if count is None:
        deployment: Deployment = context.deployment
        facts = load_facts(deployment)
    else:
        base = _changed(_base(context), engine_name, repo, tp, pp)
        deployment, facts = suppose.suppose(suppose.kind(kind or plans.REHEARSED), count, base)
    planned, note = make(deployment, facts, offline=count is not None)
    for caution in (*([note] if note else ()), *plans.cautions(facts)):
        context.console.warn(caution)
    if shell:
        sys.stdout.write(script.render(planned, () if count else deployment.nodes))
        return
    context.console.result(document(planned), text(planned))


@click.command("schema")
@click.option("--write", type=click.Path(file_okay=False, path_type=Path), help="Write both into this folder (docs/schema).")
def schema_command(write: Path | None) -> None:
    """JSON schemas of deploy.toml and of the plan, for editors and programs."""
    for name, schema in schemas().items():
        if write is not None:
            atomic_write(write / f"{name}.json", schema)
        else:
            sys.stdout.write(schema)


def schemas() -> dict[str, str]:
    """Name to JSON schema, as committed under docs/schema (a test compares them)."""
    models: dict[str, type[BaseModel]] = {"deploy": Config, "deploy-plan": ServePlan}
    return {name: json.dumps(model.model_json_schema(), indent=2) + "\n" for name, model in models.items()}


def make(deployment: Deployment, facts: Facts, *, offline: bool) -> tuple[ServePlan, str]:
    """The plan, and what a person should know about where the model's numbers are from."""
    wanted = deployment.data.model
    if not offline and (commit := state.read(deployment.folder).data("weights").get("commit")):
        wanted = wanted.model_copy(update={"revision": commit})  # what was brought is what will be served
    model, note = models.find(wanted, deployment.path.parent, offline=offline)
    return plans.make(deployment, facts, model), note


def _base(context: DeployContext) -> Deployment | None:
    """deploy.toml, where there is one: it says the model, the engine and the paths."""
    if context.file is None:
        try:
            find_config()
        except ConfigError:
            return None
    return context.deployment


def _changed(base: Deployment | None, engine: str | None, repo: str | None, tp: int | None, pp: int | None) -> Deployment:
    deployment = base or Deployment(path=Path.cwd() / FILE, data=Config(), nodes=())
    data = deployment.data
    forced = data.layout.model_copy(
        update={name: value for name, value in (("tensor_parallel", tp), ("pipeline_parallel", pp)) if value}
    )
    model = ModelConfig(repo=repo) if repo else data.model
    return deployment.model_copy(
        update={"data": data.model_copy(update={"engine": engine or data.engine, "model": model, "layout": forced})}
    )


def document(plan: ServePlan) -> object:
    """For --json: the plan, and the speed model's error on the figure that it was not fitted to."""
    return plan.model_dump(mode="json") | {"speed_model": _second(plan)}


def _second(plan: ServePlan) -> dict[str, float]:
    model = models.built_in("meta-llama/Llama-3.1-405B-Instruct", "main")
    assert model
    predicted = layouts.second_figure(engines.engine(plan.engine), model).tokens_per_s
    return {
        "fitted_to": speed.MEASURED,
        "second_measured": speed.SECOND,
        "second_predicted": predicted,
        "error_percent": round((predicted / speed.SECOND - 1) * 100),
    }


def text(plan: ServePlan) -> str:
    """For people."""
    out = io.StringIO()
    width = max(100, shutil.get_terminal_size((120, 24)).columns)
    rich = RichConsole(file=out, width=width, force_terminal=sys.stdout.isatty(), highlight=False, soft_wrap=True)
    for block in (_head(plan), _memory(plan), _speed(plan), *_others(plan), *_commands(plan)):
        rich.print(block)
        rich.print()
    return out.getvalue().rstrip() + "\n"


def _table(*columns: str, title: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False, show_edge=False)
    for column in columns:
        numeric = column.endswith(("GiB", "tokens/s", "tokens", "$/Mtok", "layers"))
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table


def _head(plan: ServePlan) -> str:
    split = plan.layout
    full = plan.memory.full_length
    requests = f"up to {split.max_model_len} tokens each; {split.max_num_seqs} at once, {full} at full length"
    lines = [
        f"[bold]{escape(plan.deployment)}[/]  {escape(plan.model)} at {escape(plan.revision[:12])}, {plan.engine}",
        f"[bold]layout[/]   {split.name} on {len(plan.nodes)} nodes, layers {layouts.short(split.partition)}"
        + (f", {split.offload_gib:g} GiB per GPU in host memory" if split.offload_gib else ""),
        f"[bold]requests[/] {requests}",
        f"[bold]plan[/]     {plan.id[:16]}",
    ]
    if plan.spares:
        lines.append(f"[bold]spares[/]   {', '.join(plan.spares)}")
    lines += [f"[yellow]{escape(note)}[/]" for note in plan.notes]
    return "\n".join(lines)


def _memory(plan: ServePlan) -> Table:
    memory = plan.memory
    table = _table("stage", "layers", "nodes", "weights GiB", "offloaded GiB", "beside GiB", "cache GiB", "of GiB")
    ranks = plans.ranks(plan)
    for stage, weights in enumerate(memory.by_stage_gib):
        names = ", ".join(dict.fromkeys(ranks[stage]))
        fullest = max(weights)
        offloaded = plan.layout.offload_gib
        left = memory.budget_gib - fullest + offloaded - memory.reserve_gib
        shown = f"{fullest:.1f}" if min(weights) > fullest - 0.05 else f"{min(weights):.1f} to {fullest:.1f}"
        row = (str(stage), str(plan.layout.partition[stage]), names, shown, f"{offloaded:g}", f"{memory.reserve_gib:g}")
        table.add_row(*row, f"{left:.1f}", f"{memory.budget_gib:.1f}")
    table.caption = f"KV cache: {memory.cache_tokens:,} tokens in all, {memory.request_tokens:,} for one request" + (
        f"; {memory.host_gib:g} GiB of host memory pinned" if plan.layout.offload_gib else ""
    )
    table.caption_justify = "left"
    return table


def _speed(plan: ServePlan) -> str:
    prediction = plan.prediction
    error = _second(plan)
    parts = f"weights {prediction.weights_ms:g} ms, host memory {prediction.offload_ms:g} ms"
    parts += f", all-reduces {prediction.collectives_ms:g} ms"
    lines = [f"[bold]speed[/]    {prediction.tokens_per_s:.1f} tokens/s for one stream ({parts} a token)"]
    if prediction.usd_per_hour is not None and prediction.usd_per_mtok is not None:
        streams = [count for count in (1, 4, 16, 64) if count <= plan.layout.max_num_seqs]
        costs = ", ".join(f"{count}: ${prediction.usd_per_mtok / count:,.0f}" for count in streams)
        lines.append(f"[bold]cost[/]     ${prediction.usd_per_hour:.2f}/h; $/Mtok by streams at once, at best: {costs}")
    predicted, measured, percent = error["second_predicted"], error["second_measured"], error["error_percent"]
    lines += [
        f"[dim]A model, no measurement: fitted to {error['fitted_to']} tokens/s (ten GH200, tp5 pp2) alone.",
        f"Of 2x8 H100 it says {predicted:.1f}, where about {measured:g} was measured: {percent:+g} %.[/]",
    ]
    return "\n".join(lines)


def _others(plan: ServePlan) -> Iterable[Table]:
    if plan.alternatives:
        table = _table("also fits", "split", "weights GiB", "offloaded GiB", "request tokens", "tokens/s", "$/Mtok")
        for alternative in plan.alternatives:
            cost = f"{alternative.usd_per_mtok:,.0f}" if alternative.usd_per_mtok is not None else "-"
            row = (
                alternative.layout,
                layouts.short(alternative.partition),
                f"{alternative.weights_gib:.1f}",
                f"{alternative.offload_gib:g}",
            )
            table.add_row(*row, f"{alternative.request_tokens:,}", f"{alternative.tokens_per_s:.1f}", cost)
        yield table
    if plan.rejected:
        table = _table("rejected", "because")
        for reason, names in _by_reason(plan).items():
            table.add_row(escape(", ".join(names)), escape(reason))
        yield table


def _by_reason(plan: ServePlan) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for rejected in plan.rejected:
        reasons.setdefault(rejected.reason, []).append(rejected.layout)
    return reasons


def _commands(plan: ServePlan) -> Iterable[Text]:
    for node in plan.nodes:
        yield Text(f"{node.name}  {node.private}  {node.gpus} GPU\n{_env(node.env)}\n{shlex.join(node.ray)}")
    secret = " ".join(f"{name}=…" for name in plan.secret_env)
    yield Text(f"{plan.head.name}  the engine; {secret} comes through stdin\n{_env(plan.serve_env)}\n{shlex.join(plan.serve)}")


def _env(env: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())

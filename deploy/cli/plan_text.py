"""The output of `deploy plan`: tables and sentences."""

from __future__ import annotations

import io
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence

import rich.console
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deploy.planning import choosing, plans, speed
from deploy.planning.accuracy import AccuracyRow
from deploy.planning.plans import ServePlan


def text(plan: ServePlan, *, commands: bool) -> str:
    """The text of a plan."""
    return _rendered([_head(plan), *_memory(plan), _speed(plan), *_others(plan), *(_commands(plan) if commands else ())])


def _rendered(blocks: Iterable[RenderableType]) -> str:
    out = io.StringIO()
    width = max(100, shutil.get_terminal_size((120, 24)).columns)
    console = rich.console.Console(file=out, width=width, force_terminal=sys.stdout.isatty(), highlight=False, soft_wrap=True)
    for block in blocks:
        console.print(block)
        console.print()
    return out.getvalue().rstrip() + "\n"


def _table(*columns: str, title: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False, show_edge=False)
    for column in columns:
        numeric = column.endswith(("GiB", "tokens/s", "tokens", "$/Mtok", "layers"))
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table


def _head(plan: ServePlan) -> str:
    split = plan.layout
    requests = "number and length are chosen by the engine"
    if plan.memory and split.max_model_len:
        full = plan.memory.full_length
        seqs = split.max_num_seqs or 0
        most = f"{seqs}" if split.dp == 1 else f"{seqs * split.dp} ({seqs} per replica)"
        requests = f"up to {split.max_model_len} tokens each; at most {most} at the same time, or {full} of full length"
    lines = [
        f"[bold]{escape(plan.deployment)}[/]  {escape(plan.model)} at {escape(plan.revision[:12])}, {plan.engine}",
        f"[bold]layout[/]   {split.name} on {len(plan.nodes)} {'node' if len(plan.nodes) == 1 else 'nodes'}"
        + (f", layers {choosing.short(split.partition)}" if split.partition else "")
        + (f", {split.offload_gib:g} GiB per GPU in host memory" if split.offload_gib else ""),
        f"[bold]requests[/] {requests}",
        f"[bold]plan[/]     {plan.id[:16]}",
    ]
    if plan.spares:
        many = f"{plan.spares[0]} to {plan.spares[-1]}: {len(plan.spares)} nodes"
        lines.append(f"[bold]spares[/]   {', '.join(plan.spares) if len(plan.spares) < 6 else many}")
    lines += [f"[yellow]{escape(note)}[/]" for note in plan.notes]
    return "\n".join(lines)


def _memory(plan: ServePlan) -> Iterable[Table]:
    memory = plan.memory
    if memory is None:
        return
    table = _table("stage", "layers", "nodes", "weights GiB", "offloaded GiB", "reserve GiB", "cache GiB", "total GiB")
    ranks = plans.ranks(plan)
    for stage, weights in enumerate(memory.by_stage_gib):
        names = ", ".join(dict.fromkeys(ranks[stage]))
        fullest = max(weights)
        offloaded = plan.layout.offload_gib
        left = memory.budget_gib - fullest + offloaded - memory.reserve_gib
        shown = f"{fullest:.1f}" if min(weights) > fullest - 0.05 else f"{min(weights):.1f} to {fullest:.1f}"
        row = (str(stage), str(plan.layout.partition[stage]), names, shown, f"{offloaded:g}", f"{memory.reserve_gib:g}")
        table.add_row(*row, f"{left:.1f}", f"{memory.budget_gib:.1f}")
    replicas = f"Nodes of the first of {plan.layout.dp} replicas. " if plan.layout.dp > 1 else ""
    cache = f"KV cache: {memory.cache_tokens:,} tokens in total, {memory.request_tokens:,} for one request"
    table.caption = f"{replicas}{cache}" + (
        f"; {memory.host_gib:g} GiB of host memory pinned" if plan.layout.offload_gib else ""
    )
    table.caption_justify = "left"
    yield table


def _speed(plan: ServePlan) -> str:
    prediction = plan.prediction
    if prediction is None:
        return "[bold]speed[/]    not predicted"
    reducing = round(prediction.collectives_ms - prediction.exchange_ms, 1)
    parts = f"weights {prediction.weights_ms:g} ms, all-reduces {reducing:g} ms"
    parts += f", exchange of tokens between replicas {prediction.exchange_ms:g} ms" if prediction.exchange_ms else ""
    parts += f", hops {prediction.hops_ms:g} ms" if prediction.hops_ms else ""
    parts += f", host memory {prediction.offload_ms:g} ms" if prediction.offload_ms else ""
    levels = ", ".join(f"{level.streams}: {level.tokens_per_s:,.0f}" for level in prediction.levels if level.streams > 1)
    first = f"first token of a {speed.PROMPT}-token prompt after {prediction.first_token_ms / 1e3:.2g} s"
    lines = [f"[bold]speed[/]    {prediction.tokens_per_s:.1f} tokens/s for one stream ({parts} per token; {first})"]
    lines += [f"         tokens/s by concurrent streams: {levels}"] if levels else []
    if prediction.usd_per_hour is not None and prediction.usd_per_mtok is not None:
        costs = ", ".join(f"{level.streams}: ${level.usd_per_mtok:,.2f}" for level in prediction.levels)
        lines.append(f"[bold]cost[/]     ${prediction.usd_per_hour:.2f}/h; $/Mtok by concurrent streams: {costs}")
    lines.append("[dim]Predicted, not measured. `deploy plan --accuracy` compares predictions with measurements.[/]")
    return "\n".join(lines)


def _others(plan: ServePlan) -> Iterable[Table]:
    if plan.alternatives:
        table = _table("also fits", "split", "weights GiB", "offloaded GiB", "request tokens", "tokens/s", "$/Mtok")
        for alternative in plan.alternatives:
            cost = f"{alternative.usd_per_mtok:,.0f}" if alternative.usd_per_mtok is not None else "-"
            row = (
                alternative.layout,
                choosing.short(alternative.partition),
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
    for node in plan.nodes if plan.launcher == "ray" else plan.followers:
        yield Text(f"{node.name}  {node.private}  {node.gpus} GPU\n{_env(node.env)}\n{shlex.join(node.ray or node.engine)}")
    secret = " ".join(f"{name}=…" for name in plan.secret_env)
    yield Text(f"{plan.head.name}  the engine; {secret} is passed on stdin\n{_env(plan.serve_env)}\n{shlex.join(plan.serve)}")


def _env(env: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())


def _measured(tokens_per_s: float | None, error: float | None) -> str:
    return "" if tokens_per_s is None or error is None else f"{tokens_per_s:,.2f} {error:+5.0%}"


def accuracy(rows: Sequence[AccuracyRow]) -> str:
    """The table of predictions and measurements."""
    table = _table("run", "streams", "predicted tokens/s", "measured tokens/s", "again tokens/s", "bound")
    before = ""
    for row in rows:
        bound = "" if row.bound is None else f"{row.bound:.0%}" + ("" if row.holds else " EXCEEDED")
        measured, again = _measured(row.measured, row.error), _measured(row.again, row.error_again)
        source = row.source + ("; used to fit the constants" if row.fitted else "")
        if row.name != before:
            table.add_row(f"[bold]{escape(row.name)}[/]  [dim]{escape(source)}[/]")
        before = row.name
        table.add_row("", str(row.streams), f"{row.predicted:,.1f}", measured or "-", again, bound)
    missed = "\n".join(f"{row.name}, {row.streams}: {row.why}" for row in rows if row.why)
    return _rendered([table, *([Text(missed)] if missed else [])])

"""`deploy plan`: what would run, what it would hold, how fast it would be, and why not otherwise."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click
from pydantic import BaseModel

from deploy.cli import plan_text
from deploy.cli.common import DeployContext, reporting
from deploy.nodes import state
from deploy.nodes.config import FILE, Config, ModelConfig, Objective
from deploy.nodes.deployment import Deployment, find_config
from deploy.nodes.facts import Facts, load_facts
from deploy.planning import accuracy, hardware, models, plans, script, suppose
from deploy.planning.models import UnknownModelError
from deploy.planning.plans import ServePlan
from gracefarm.errors import ConfigError, UsageError
from gracefarm.files import atomic_write


@click.command()
@click.option("--commands", is_flag=True, help="With every node's environment and commands.")
@click.option("--shell", is_flag=True, help="As a bash script, on stdout.")
@click.option("--accuracy", "accurate", is_flag=True, help="What the planner predicts beside what was measured.")
@click.option(
    "--objective",
    type=click.Choice(["speed", "throughput", "cost"]),
    help="Tokens/s of one stream, of all together, or per dollar; default: deploy.toml's, else speed.",
)
@click.option("--price", type=click.FloatRange(0), metavar="USD", help="Of a node and hour.")
@click.option(
    "--nodes", "count", type=click.IntRange(1), metavar="N", help="Suppose N nodes; none is asked, none needs to exist."
)
@click.option("--gpu", "kind", metavar="KIND", help="What the supposed nodes are; default: gh200-96.")
@click.option(
    "--engine",
    "engine_name",
    type=click.Choice(["aphrodite", "vllm"]),
    help="With --nodes: this engine; default: deploy.toml's, without one vllm for a --model.",
)
@click.option("--model", "repo", metavar="REPO", help="With --nodes: this model, or a folder that has its config.json.")
@click.option("--tp", type=click.IntRange(1), help="With --nodes: this many GPUs share every layer.")
@click.option("--pp", type=click.IntRange(1), help="With --nodes: this many stages.")
@click.option("--dp", type=click.IntRange(1), help="With --nodes: this many replicas.")
@reporting
def plan(
    context: DeployContext,
    commands: bool,
    shell: bool,
    accurate: bool,
    objective: Objective | None,
    price: float | None,
    count: int | None,
    kind: str | None,
    engine_name: str | None,
    repo: str | None,
    tp: int | None,
    pp: int | None,
    dp: int | None,
) -> None:
    """Layout, memory, predicted speed and cost, and rejected layouts; nothing is started or asked.

    \b
    deploy plan
    deploy plan --commands
    deploy plan --shell > serve.sh
    deploy plan --nodes 10 --gpu gh200-96
    deploy plan --nodes 2 --gpu h200 --model deepseek-ai/DeepSeek-V3 --objective cost
    deploy plan --accuracy
    """
    if accurate:
        rows = accuracy.rows()
        context.console.result([row.model_dump(mode="json") for row in rows], plan_text.accuracy(rows))
        return
    if count is None and any((kind, engine_name, repo, tp, pp, dp)):
        raise UsageError(
            "--gpu, --engine, --model, --tp, --pp and --dp suppose nodes",
            remedy="say --nodes N, or set it in deploy.toml ([layout])",
        )
    split = {"tensor_parallel": tp, "pipeline_parallel": pp, "data_parallel": dp, "objective": objective}
    if count is None:
        deployment: Deployment = _layout(context.deployment, split, price)
        facts = load_facts(deployment)
    else:
        base = _layout(_changed(_base(context), engine_name, repo), split, price)
        deployment, facts = suppose.suppose(hardware.named(kind or plans.REHEARSED), count, base)
    planned, note = make(deployment, facts, offline=count is not None)
    for caution in (*([note] if note else ()), *plans.cautions(facts)):
        context.console.warn(caution)
    if shell:
        sys.stdout.write(script.render(planned, () if count else deployment.nodes))
        return
    context.console.result(planned.model_dump(mode="json"), plan_text.text(planned, commands=commands))


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
    try:
        model, note = models.find(wanted, deployment.path.parent, offline=offline)
    except UnknownModelError:
        if not deployment.data.layout.trust:
            raise
        return plans.trusted(deployment, facts, wanted.repo, wanted.revision), ""
    return plans.make(deployment, facts, model), note


def _base(context: DeployContext) -> Deployment | None:
    """deploy.toml, where there is one: it says the model, the engine and the paths."""
    if context.file is None:
        try:
            find_config()
        except ConfigError:
            return None
    return context.deployment


def _changed(base: Deployment | None, engine: str | None, repo: str | None) -> Deployment:
    """With what the command line says of engine and model."""
    deployment = base or Deployment(path=Path.cwd() / FILE, data=Config(), nodes=())
    data = deployment.data
    model = data.model
    if repo:
        place = Path(repo)
        model = (
            ModelConfig(repo=place.resolve().name, config=str(place.resolve())) if place.exists() else ModelConfig(repo=repo)
        )
    chosen = engine or ("vllm" if repo and base is None else data.engine)
    return deployment.model_copy(update={"data": data.model_copy(update={"engine": chosen, "model": model})})


def _layout(deployment: Deployment, split: Mapping[str, object], price: float | None) -> Deployment:
    """With what the command line says of the layout and the price."""
    data = deployment.data
    layout = data.layout.model_copy(update={name: value for name, value in split.items() if value is not None})
    options = data.options if price is None else data.options.model_copy(update={"price_per_node_hour": price})
    return deployment.model_copy(update={"data": data.model_copy(update={"layout": layout, "options": options})})

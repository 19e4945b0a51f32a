"""`deploy plan`: layout, memory, predicted speed and cost, and the reasons against other layouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click
from pydantic import BaseModel

from deploy.cli import plan_text
from deploy.cli.common import DeployContext, reporting
from deploy.nodes import state, template
from deploy.nodes.config import FILE, Config, ModelConfig, Objective
from deploy.nodes.deployment import Deployment, find_config
from deploy.nodes.facts import Facts, load_facts
from deploy.planning import accuracy, hardware, models, plans, script, suppose
from deploy.planning.models import UnknownModelError
from deploy.planning.plans import ServePlan
from deploy.planning.shapes import LOCAL
from gracefarm.cli import json_option, show_schemas
from gracefarm.console import Console
from gracefarm.errors import ConfigError, UsageError


@click.command()
@click.option("--commands", is_flag=True, help="Also show the commands and the environment variables of every node.")
@click.option("--shell", is_flag=True, help="Print a bash script that starts the engine as the plan describes.")
@click.option(
    "--accuracy",
    "accurate",
    is_flag=True,
    help="Do not make a plan. Show predicted and measured speeds of earlier runs, to see how exact predictions are.",
)
@click.option(
    "--objective",
    type=click.Choice(["speed", "throughput", "cost"]),
    help="Goal of the layout. speed: tokens/s of one request. throughput: tokens/s of all requests together. cost: tokens "
    "per dollar. Default: the value in deploy.toml, else speed.",
)
@click.option(
    "--price",
    type=click.FloatRange(0),
    metavar="USD",
    help="Price of a node per hour, in US dollars. Default: price_per_node_hour in deploy.toml, else the sum of the prices of "
    "its GPUs.",
)
@click.option(
    "--nodes",
    "count",
    type=click.IntRange(1),
    metavar="N",
    help="Make a plan for N assumed nodes instead of the nodes in deploy.toml.",
)
@click.option("--gpu", "kind", metavar="KIND", help="With --nodes: kind of the GPUs, such as h200. Default: gh200-96.")
@click.option(
    "--engine",
    "engine_name",
    type=click.Choice(["aphrodite", "vllm"]),
    help="With --nodes: engine (the program that serves the model). Default: the engine in deploy.toml, else vllm.",
)
@click.option(
    "--model",
    "repo",
    metavar="REPO",
    help="With --nodes: model on the Hugging Face Hub (ORG/NAME), or a folder with the model's config.json.",
)
@click.option(
    "--tp",
    type=click.IntRange(1),
    help="With --nodes: number of GPUs that compute each layer together (tensor parallel).",
)
@click.option(
    "--pp",
    type=click.IntRange(1),
    help="With --nodes: number of groups that the layers are divided into (pipeline parallel).",
)
@click.option("--dp", type=click.IntRange(1), help="With --nodes: number of copies of the model (data parallel).")
@click.option(
    "--ep/--no-ep",
    "ep",
    default=None,
    help="With --nodes, for models with experts: --ep gives each GPU whole experts (expert parallel). --no-ep gives each GPU "
    "a part of every expert. Default: --no-ep if the engine can split the experts, else --ep.",
)
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
    ep: bool | None,
) -> None:
    """Show the layout, memory, predicted speed and cost, and the rejected layouts.

    The layout says how the model is divided among the GPUs of the machines (nodes) in deploy.toml. The command starts
    nothing, and does not connect to the nodes. It uses the facts that `deploy init` or `deploy facts` has stored. With
    --nodes, it plans for nodes that you do not have yet.

    \b
    # Show the plan for the nodes in deploy.toml.
    deploy plan
    # Also show the commands that `deploy serve` would run on each node.
    deploy plan --commands
    # Write a bash script that starts the engine without `deploy serve`.
    deploy plan --shell > serve.sh
    # Show the plan for 10 nodes with a GH200 each.
    deploy plan --nodes 10 --gpu gh200-96
    # Show the plan for another model on 2 nodes with H200 GPUs.
    deploy plan --nodes 2 --gpu h200 --model deepseek-ai/DeepSeek-V3
    # Compare earlier predictions with measured speeds.
    deploy plan --accuracy
    """
    if accurate:
        _show_accuracy(context.console)
        return
    if count is None:
        _require_none(kind, engine_name, repo, tp, pp, dp, ep)
    split = {
        "tensor_parallel": tp,
        "pipeline_parallel": pp,
        "data_parallel": dp,
        "expert_parallel": ep,
        "objective": objective,
    }
    base = _layout(context.deployment if count is None else _changed(_base(context), engine_name, repo), split, price)
    if count is None:
        deployment, facts = base, load_facts(base)
    else:
        deployment, facts = suppose.suppose(hardware.named(kind or plans.REHEARSED), count, base)
    planned, note = make(deployment, facts, offline=count is not None)
    for caution in (*filter(None, (note, _without_engine(deployment))), *plans.cautions(facts)):
        context.console.warn(caution)
    if shell:
        sys.stdout.write(script.render(planned, () if count else deployment.nodes))
        return
    context.console.result(planned.model_dump(mode="json"), plan_text.text(planned, commands=commands))


def _show_accuracy(console: Console) -> None:
    """Show the predictions beside the measurements."""
    rows = accuracy.rows()
    console.result([row.model_dump(mode="json") for row in rows], plan_text.accuracy(rows))


def _require_none(*given: object) -> None:
    """Raise an error if a value was given that only --nodes uses."""
    if any(value is not None for value in given):
        raise UsageError(
            "--gpu, --engine, --model, --tp, --pp, --dp and --ep require --nodes",
            remedy="add --nodes N; or set these values in deploy.toml: engine, repo in [model], and the keys of [layout]",
        )


@click.command("schema")
@click.option(
    "--write",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write each schema into a file in this folder. Without this option, print the schemas.",
)
@json_option
def schema_command(write: Path | None) -> None:
    """Print the JSON schemas of deploy.toml and of the plan.

    The schemas are for editors, and for programs that read the output of `deploy plan --json`.

    \b
    # Write both schemas into docs/schema.
    deploy schema --write docs/schema
    """
    show_schemas(schemas(), write)


def schemas() -> dict[str, str]:
    """The JSON schemas by name. docs/schema has copies, which a test compares."""
    models: dict[str, type[BaseModel]] = {"deploy": Config, "deploy-plan": ServePlan}
    return {name: json.dumps(model.model_json_schema(), indent=2) + "\n" for name, model in models.items()}


def make(deployment: Deployment, facts: Facts, *, offline: bool) -> tuple[ServePlan, str]:
    """Make the plan. Return it with a note about the source of the model's numbers, which may be empty."""
    wanted = deployment.data.model
    if not offline and (commit := state.read(deployment.folder).data("weights").get("commit")):
        wanted = wanted.model_copy(update={"revision": commit})  # the downloaded commit is served
    try:
        model, note = models.find(wanted, deployment.path.parent, offline=offline)
    except UnknownModelError:
        if not deployment.data.layout.trust:
            raise
        return plans.trusted(deployment, facts, wanted.repo, wanted.revision), ""
    return plans.make(deployment, facts, model), note


def _base(context: DeployContext) -> Deployment | None:
    """deploy.toml with model, engine and paths, or None if there is none."""
    if context.file is None:
        try:
            find_config()
        except ConfigError:
            return None
    return context.deployment


def _changed(base: Deployment | None, engine: str | None, repo: str | None) -> Deployment:
    """The deployment, or what `deploy init` proposes, with engine and model of the command line."""
    proposed = Config(engine=template.ENGINE, set=template.SET)
    deployment = base or Deployment(path=Path.cwd() / FILE, data=proposed, nodes=())
    data = deployment.data
    model = data.model
    if repo:
        model = _model(repo)
    changes: dict[str, object] = {"model": model, "name": data.name if base else template.name_of(model.repo)}
    if engine:
        changes["engine"] = engine
    return deployment.model_copy(update={"data": data.model_copy(update=changes)})


def _model(named: str) -> ModelConfig:
    """The model of --model: a path, or a repository on the Hub. Raises UsageError if the path does not exist."""
    place = Path(named).expanduser()
    if place.exists():
        return ModelConfig(repo=place.resolve().name, config=str(place.resolve()), revision=LOCAL)
    if named.startswith((".", "/", "~")) or named.endswith("/") or named.count("/") > 1:
        raise UsageError(
            f"--model {named}: no such file or folder",
            remedy="correct the path, or give the name of a model on the Hugging Face Hub as ORG/NAME",
        )
    return ModelConfig(repo=named)


def _without_engine(deployment: Deployment) -> str:
    """A note if deploy.toml names no engine. Then it has the meaning of earlier versions."""
    if "engine" in deployment.data.model_fields_set:
        return ""
    return (
        f"{deployment.path} has no `engine`, so the plan is for {deployment.data.engine}, the default of earlier versions; "
        f'for {template.ENGINE}, add `engine = "{template.ENGINE}"` and `set = "{template.SET}"`'
    )


def _layout(deployment: Deployment, split: Mapping[str, object], price: float | None) -> Deployment:
    """The deployment with layout and price of the command line."""
    data = deployment.data
    layout = data.layout.model_copy(update={name: value for name, value in split.items() if value is not None})
    options = data.options if price is None else data.options.model_copy(update={"price_per_node_hour": price})
    return deployment.model_copy(update={"data": data.model_copy(update={"layout": layout, "options": options})})

"""Makes the plan that `deploy serve` executes, for the model on the share."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.fleet.calls import call
from deploy.fleet.shells import remote_nodes
from deploy.planning import models, plans
from deploy.planning.models import UnknownModelError
from deploy.planning.plans import ServePlan
from deploy.planning.shapes import Model
from deploy.steps.step import Work
from gracefarm.errors import ConfigError, GracefarmError, HostError
from gracefarm.files import atomic_write


async def plan_of(work: Work) -> ServePlan:
    """Make the plan from config.json and the headers of the weights on the share, and store it.

    Raises:
        ConfigError, LayoutError: as in deploy.planning.plans.make.
        HostError: the head cannot read config.json.
    """
    weights = work.keeper.state.data("weights")
    if not weights:
        raise ConfigError("the weights are not downloaded yet", remedy="download the weights with `deploy up`")
    plan = await _plan(work, weights)
    assert plan is not None  # the weights exist, so there is a model
    atomic_write(work.deployment.folder.path / "plan.json", plan.model_dump_json(indent=1) + "\n")
    return plan


async def likely_plan(work: Work) -> ServePlan | None:
    """The plan that was served last, else a plan that is made without the Hub; None if neither is possible."""
    weights = work.keeper.state.data("weights")
    try:
        return ServePlan.model_validate_json((work.deployment.folder.path / "plan.json").read_bytes())
    except (OSError, ValueError):
        try:
            return await _plan(work, weights)
        except GracefarmError:
            return None  # commands that need the plan report the error


async def _plan(work: Work, weights: Mapping[str, Any]) -> ServePlan | None:
    """The plan for the downloaded model, else for the local or built-in one; None if there is none.

    A model that the planner does not know requires [layout] trust.
    """
    data = work.deployment.data
    try:
        model = await _model_brought(work, weights) if weights else _model_at_hand(work)
        return plans.make(work.deployment, work.facts, model) if model else None
    except UnknownModelError:
        if not data.layout.trust:
            raise
        revision = str(weights.get("commit", data.model.revision))
        return plans.trusted(work.deployment, work.facts, data.model.repo, revision)


def _model_at_hand(work: Work) -> Model | None:
    data = work.deployment.data.model
    if data.config:
        return models.from_file(_local(work, data.config), repo=data.repo, revision=data.revision)
    return models.built_in(data.repo, data.revision)


async def _model_brought(work: Work, weights: Mapping[str, Any]) -> Model:
    data, head, commit = work.deployment.data.model, work.deployment.head, str(weights["commit"])
    if data.config:
        return models.from_file(_local(work, data.config), repo=data.repo, revision=commit)
    path = f"{weights['folder']}/config.json"
    result = (await work.fleet.run(f"cat {shlex.quote(path)}", nodes=[head], timeout=60))[head.name]
    if not result.ok:
        raise HostError(
            f"{head}: {path} cannot be read: {result.stderr.strip()}",
            remedy="download the file again with `deploy up --from weights`",
        )
    config = models.parsed(result.stdout, path, remedy="download the file again with `deploy up --from weights`")
    model = models.from_config(config, repo=data.repo, revision=commit, source=f"{head.name}:{path}")
    if work.deployment.data.options.rehearsal:  # its weights are placeholders
        return model
    (node,) = remote_nodes(work.fleet, nodes=[head])
    return models.with_tensors(model, await call(node, "checkpoint.read", {"folder": str(weights["folder"])}))


def _local(work: Work, name: str) -> Path:
    return work.deployment.path.parent / Path(name).expanduser()

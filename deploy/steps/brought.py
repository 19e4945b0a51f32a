"""The model and the plan of what was brought onto the share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.planning import models, plans
from deploy.planning.models import Model
from deploy.planning.plans import ServePlan
from deploy.steps.step import Work
from gracefarm.errors import ConfigError, GracefarmError, HostError
from gracefarm.files import atomic_write


async def plan_of(work: Work) -> ServePlan:
    """The plan of what was brought: the numbers of the model's own config.json on the share, at its commit.

    Raises:
        ConfigError, LayoutError: as deploy.planning.plans.make; HostError: config.json cannot be read on the head.
    """
    weights = work.keeper.state.data("weights")
    if not weights:
        raise ConfigError("the weights are not there yet", remedy="`deploy up` brings them")
    plan = plans.make(work.deployment, work.facts, await _model_brought(work, weights))
    atomic_write(work.deployment.folder.path / "plan.json", plan.model_dump_json(indent=1) + "\n")
    return plan


async def without_lost_spares(work: Work) -> Work:
    """Without the nodes that no plan needs and that cannot be reached: nothing is to run there, so nothing waits for them.

    What is done meanwhile is done for them too, once they are back: every step depends on which nodes there are.
    """
    tried = await work.fleet.connect(sorted(await _spares(work)))
    lost = {name: error for name, error in tried.items() if error}
    for error in lost.values():
        work.console.warn(f"{error.cause}; it is a spare: going on without it")
    return replace(work, away=tuple(lost))


async def _spares(work: Work) -> Collection[str]:
    """By the plan that was served last, else by the one that would be made without asking the Hub."""
    weights = work.keeper.state.data("weights")
    try:
        plan: ServePlan | None = ServePlan.model_validate_json((work.deployment.folder.path / "plan.json").read_bytes())
    except (OSError, ValueError):
        try:
            model = await _model_brought(work, weights) if weights else _model_at_hand(work)
            plan = plans.make(work.deployment, work.facts, model) if model else None
        except GracefarmError:
            return ()  # whoever needs the plan tells it
    return {node.name for node in work.deployment.nodes} & set(plan.spares) if plan else ()


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
        raise HostError(f"{head}: {path} cannot be read: {result.stderr.strip()}", remedy="`deploy up --from weights`")
    return models.from_config(json.loads(result.stdout), repo=data.repo, revision=commit, source=f"{head.name}:{path}")


def _local(work: Work, name: str) -> Path:
    return work.deployment.path.parent / Path(name).expanduser()

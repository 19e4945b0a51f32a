"""Removes files from the nodes when nothing runs: `down` removes the secrets, `purge` everything else."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.results import try_all
from deploy.nodes import paths
from deploy.remote.wire import Json
from deploy.steps.step import Work
from gracefarm.errors import GracefarmError

SECRETS = ("ray-token", "api-key")
"Files in a deployment's folder on a node (deploy.nodes.paths)."


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What `purge` removed."""

    bytes: int
    places: tuple[str, ...]
    "`NODE: PATH`; for the cache of the shared folder also `NODE: DESCRIPTION`."
    failed: dict[str, GracefarmError]


async def remove_secrets(work: Work, targets: Sequence[RemoteNode]) -> dict[str, GracefarmError]:
    """Remove Ray's token and the API key from the nodes; this machine keeps them for the next start. Return errors by node."""

    async def remove(node: RemoteNode) -> Json:
        folder = await work.fleet.folder(work.deployment.node(node.name))
        return await call(node, "remains.remove", {"paths": [posixpath.join(folder, name) for name in SECRETS], "empty": []})

    _good, bad = await try_all(targets, remove)
    return bad


async def purge(work: Work, *, share: bool, weights: bool, cache: bool) -> Removed:
    """Remove this deployment's files from every node: jobs, logs, secrets, Ray's folder, uv. Nothing of it may be running.

    `share`: remove its environments on the shared folder too. `weights`: remove the model's files, which other deployments
    may use. `cache`: undo what the step `cache` changed on the nodes, which other deployments may use too.
    """
    deployment = work.deployment

    async def remove(node: RemoteNode) -> Json:
        place = deployment.node(node.name)
        base = await work.fleet.base(place)
        own = [posixpath.join(base, work.fleet.mark), posixpath.join(base, work.fleet.mark[:8])]
        request = {"paths": own, "empty": [base], "cache": True}
        if node.name == deployment.head.name and deployment.data.share is not None:
            request["paths"] = [*own, *_shared(work, share=share, weights=weights)]
            request["owned"] = {paths.environment_root(deployment): work.fleet.mark} if share else {}
            request["patterns"] = [_partial(work)] if weights else []
            request["empty"] = [*_parents(work), base]
        return await call(node, "remains.remove", request)

    good, bad = await try_all(work.nodes, remove)
    places = [f"{node}: {path}" for node, answer in good.items() for path in answer["removed"]]
    if cache:
        undone, failed = await try_all(work.nodes, lambda node: call(node, "cache.undo", {}))
        places += [f"{node}: {what}" for node, answer in undone.items() for what in answer["undone"]]
        bad = failed | bad
    return Removed(bytes=sum(int(answer["bytes"]) for answer in good.values()), places=tuple(places), failed=bad)


def _shared(work: Work, *, share: bool, weights: bool) -> list[str]:
    """Paths on the shared folder. The model's files are those of the step `weights`."""
    folder = work.keeper.state.data("weights").get("folder")
    model = [folder, f"{folder}.manifest.json"] if weights and folder else []
    return [*([paths.environment_root(work.deployment)] if share else []), *model]


def _parents(work: Work) -> list[str]:
    """Folders on the shared folder that all deployments have in common, the innermost first."""
    root = paths.root(work.deployment)
    model = posixpath.dirname(paths.weights(root, work.deployment.data.model.repo, "*"))
    return [model, posixpath.dirname(model), root]


def _partial(work: Work) -> str:
    """A pattern for this deployment's incomplete downloads of the model. The state does not have their commits."""
    anywhere = paths.weights(paths.root(work.deployment), work.deployment.data.model.repo, "*")
    return f"{anywhere}.{work.fleet.mark}.staging"

"""What stands between a new deployment and `deploy serve`: all of it at once, from what is known without changing anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import httpx

from deploy.nodes.deployment import Deployment
from deploy.nodes.facts import Facts
from deploy.steps import setlock

HUB = "https://huggingface.co"
SECONDS = 10.0
"For the one question to the Hub."
_MACHINES = re.compile(r"#\s*\S+_(aarch64|x86_64)\.whl")


def missing(deployment: Deployment, facts: Facts, environ: Mapping[str, str]) -> list[str]:
    """A sentence for each thing, with what to do; empty: `deploy serve` can begin."""
    found = [*_share(deployment, facts), *_gpus(facts), *_lock(deployment, facts)]
    return [*found, *_model(deployment.data.model.repo, environ)]


def _share(deployment: Deployment, facts: Facts) -> Sequence[str]:
    if deployment.data.share is not None:
        return ()
    where = f"set share in {deployment.path.name}"
    if facts.shares:
        return (f"a shared folder: the nodes have {', '.join(facts.shares)} in common; {where}",)
    return (f"a shared folder: the nodes have no network file system in common; mount one on all, and {where}",)


def _gpus(facts: Facts) -> Sequence[str]:
    without: dict[str, list[str]] = {}
    for node in facts.nodes:
        if not node.cuda.gpus:
            without.setdefault(node.cuda.text, []).append(node.name)
    return [f"a usable GPU on {', '.join(nodes)}: {text}" for text, nodes in without.items()]


def _lock(deployment: Deployment, facts: Facts) -> Sequence[str]:
    name = deployment.data.set
    text = setlock.lock_at_hand(deployment)
    if text is None:
        if deployment.data.index is not None:
            return ()  # it is fetched from there
        return (
            f"a lock of the set {name}: set index in {deployment.path.name} to the farm's, http://HOST:8080/{name}/simple/",
        )
    machines = set(_MACHINES.findall(text))
    strange = {node.arch: node.name for node in facts.nodes if machines and node.arch not in machines}
    return [
        f"wheels for {arch}: the set {name} has them for {' and '.join(sorted(machines))}, and {node} is {arch}"
        for arch, node in strange.items()
    ]


def _model(repo: str, environ: Mapping[str, str]) -> Sequence[str]:
    """Whether the Hub shows the model to this account. A Hub that is not reached from here says nothing: nodes do that."""
    token, endpoint = environ.get("HF_TOKEN"), environ.get("HF_ENDPOINT", HUB).rstrip("/")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.get(f"{endpoint}/api/models/{repo}", headers=headers, timeout=SECONDS, follow_redirects=True)
        gated = answer.status_code == 200 and bool(answer.json().get("gated"))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return ()
    if answer.status_code in (401, 403, 404):
        who = "this HF_TOKEN" if token else "without a token"
        return (f"the model: the Hub shows no {repo} {'to ' if token else ''}{who}; check [model] repo and HF_TOKEN",)
    if gated and not token:
        return (f"access to {repo}: accept its licence at {endpoint}/{repo}, and set HF_TOKEN to a token of that account",)
    return ()

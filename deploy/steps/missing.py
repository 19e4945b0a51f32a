"""Lists everything that a new deployment lacks for `deploy serve`, without changing anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import httpx

from deploy.nodes import setlock, template
from deploy.nodes.deployment import Deployment
from deploy.nodes.facts import Facts

HUB = "https://huggingface.co"
SECONDS = 10.0
"Timeout of the request to the Hub."
_MACHINES = re.compile(r"#\s*\S+_(aarch64|x86_64)\.whl")


def missing(deployment: Deployment, facts: Facts, environ: Mapping[str, str]) -> list[str]:
    """One entry for each missing thing, with what to do; empty: `deploy serve` can start."""
    entries = [*_share(deployment, facts), *_gpus(deployment, facts), *_lock(deployment, facts)]
    return [*entries, *_model(deployment.data.model.repo, environ)]


def _share(deployment: Deployment, facts: Facts) -> Sequence[str]:
    if deployment.data.share is not None:
        return ()
    where = f"set share in {deployment.path.name}"
    if facts.shares:
        return (f"a shared folder: all nodes have {', '.join(facts.shares)}; {where} to one of them",)
    if not facts.nodes:
        return (f"a shared folder: {where} to a folder on a file system that all nodes share",)
    return (f"a shared folder: the nodes have no network file system in common; mount one on all nodes and {where}",)


def _gpus(deployment: Deployment, facts: Facts) -> Sequence[str]:
    if deployment.data.options.rehearsal:  # its GPUs are declared
        return ()
    without: dict[str, list[str]] = {}
    for node in facts.nodes:
        if not node.cuda.gpus:
            without.setdefault(node.cuda.text, []).append(node.name)
    return [f"a usable GPU on {', '.join(nodes)}: {text}" for text, nodes in without.items()]


def _lock(deployment: Deployment, facts: Facts) -> Sequence[str]:
    name = deployment.data.set
    text = setlock.at_hand(deployment)
    if text is None:
        if deployment.data.index is not None:
            return ()  # it is fetched from there
        return (
            f"a lock of the set {name}: set index in {deployment.path.name} to the address of the set on your index, http://HOST:8080/{name}/simple/",
        )
    machines = set(_MACHINES.findall(text))
    strange: dict[str, list[str]] = {}
    for node in facts.nodes:
        if machines and node.arch not in machines:
            strange.setdefault(node.arch, []).append(node.name)
    return [
        f"wheels for {arch} on {', '.join(nodes)}: the set {name} has only wheels for {' and '.join(sorted(machines))}; "
        f"{_other_wheels(deployment, facts, arch)}"
        for arch, nodes in strange.items()
    ]


def _other_wheels(deployment: Deployment, facts: Facts, arch: str) -> str:
    """How to get wheels for this architecture."""
    if len({node.arch for node in facts.nodes}) > 1:
        return f"use a separate deployment for the {arch} nodes"
    if deployment.data.engine == template.ENGINE and arch in template.SETS:
        return f'change `set` in {deployment.path.name} to "{template.SETS[arch]}"'
    return f"set `lock` in {deployment.path.name} to the lock of a set that you built for {arch}, or use other nodes"


def _model(repo: str, environ: Mapping[str, str]) -> Sequence[str]:
    """Check that this account can access the model. The result is empty if this machine cannot reach the Hub."""
    token, endpoint = environ.get("HF_TOKEN"), environ.get("HF_ENDPOINT", HUB).rstrip("/")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.get(f"{endpoint}/api/models/{repo}", headers=headers, timeout=SECONDS, follow_redirects=True)
        gated = answer.status_code == 200 and bool(answer.json().get("gated"))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return ()
    if answer.status_code in (401, 403, 404):
        how = "with this HF_TOKEN" if token else "without a token"
        return (f"the model: {repo} is not accessible on the Hub {how}; check repo of [model] and HF_TOKEN",)
    if gated and not token:
        return (f"access to {repo}: accept its licence at {endpoint}/{repo} and set HF_TOKEN to a token of that account",)
    return ()

"""Writes the first deploy.toml, for an ips.txt."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from deploy.nodes import setlock
from deploy.nodes.config import Access, ModelConfig
from deploy.nodes.deployment import Deployment, load_deployment
from deploy.nodes.ips import read_ips
from gracefarm.errors import ConfigError
from gracefarm.files import atomic_write

ENGINE: Final = "vllm"
"The engine that can be served today."
SETS: Mapping[str, str] = MappingProxyType({"aarch64": "gh200-cu130", "x86_64": "x86_64-cu130"})
"Its set of wheels for each architecture of nodes. This version of the engine was run on GPUs."
SET: Final = SETS["aarch64"]
"The set that is written before the architecture of the nodes is known."
NO_SHARE = '# share = "/path"        # shared folder, at the same path on all nodes'


def write_config(ips: Path, path: Path, *, access: Access, share: str | None = None, repo: str = ModelConfig().repo) -> bool:
    """Write a deploy.toml for the nodes of an ips.txt. Return False if one for the same file exists; it is not changed.

    Raises:
        ConfigError: ips.txt is wrong, or `path` exists and is for other nodes.
    """
    read_ips(ips)
    relative = os.path.relpath(ips.absolute(), path.absolute().parent)
    if path.exists():
        before = load_deployment(path).data.nodes.file
        if before == relative:
            return False
        raise ConfigError(
            f"{path} already exists and takes its nodes from {before or 'the lists in deploy.toml itself'}",
            remedy=f"to use the nodes of this file, run `deploy init {path}`; to deploy to other nodes, run `deploy "
            "init` in a different folder, or `deploy --file PATH init`",
        )
    atomic_write(path, render(relative, access=access, share=share, repo=repo))
    return True


def render(ips: str, *, access: Access, share: str | None, repo: str) -> str:
    """The text of deploy.toml. Keys with a good default are left out."""
    quoted = json.dumps
    lines = [
        f"name = {quoted(name_of(repo))}    # `deploy schema` prints every key; docs/reference/deploy-toml.md lists them",
        f"engine = {quoted(ENGINE)}",
        set_lines(SET),
        f"share = {quoted(share)}" if share else NO_SHARE,
        "[nodes]",
        f"file = {quoted(ips)}",
        *(f"{name} = {quoted(value)}" for name, value in access.model_dump(exclude_none=True).items()),
        "[model]",
        f"repo = {quoted(repo)}",
        'revision = "main"    # a commit pins the model',
    ]
    return "\n".join(lines) + "\n"


def set_lines(name: str) -> str:
    """The lines with the set and with the example of its index."""
    example = f'# index = "http://HOST:8080/{name}/simple/"    # your index (`index serve`); default: PyPI'
    return f"set = {json.dumps(name)}\n{example}"


def name_of(repo: str) -> str:
    """The name of a deployment for a model, such as llama-3.1-8b-instruct."""
    words = re.sub(r"[^a-z0-9._-]+", "-", repo.rpartition("/")[2].lower()).strip("-._")
    return words[:40].strip("-._") or "model"


def propose_share(deployment: Deployment, share: str) -> bool:
    """Fill in the shared folder that all nodes have. Return False if deploy.toml has been edited there."""
    text = deployment.path.read_text()
    if NO_SHARE not in text:
        return False
    atomic_write(deployment.path, text.replace(NO_SHARE, f"share = {json.dumps(share)}"))
    return True


def propose_set(deployment: Deployment, architectures: Collection[str]) -> str | None:
    """Fill in the set with wheels for the architecture of all nodes, and return its name.

    None: nothing is changed, since the set fits, no set does, or a person has chosen set, index or lock.
    """
    proposed = SETS.get(next(iter(architectures)), SET) if len(architectures) == 1 else SET
    text = deployment.path.read_text()
    chosen = set_lines(SET) not in text or deployment.data.lock is not None or setlock.place(deployment).exists()
    if proposed == SET or chosen:
        return None
    atomic_write(deployment.path, text.replace(set_lines(SET), set_lines(proposed)))
    return proposed

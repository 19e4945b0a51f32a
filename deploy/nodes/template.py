"""The first deploy.toml: written for an ips.txt, in ten lines."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from deploy.nodes.config import Access, ModelConfig
from deploy.nodes.deployment import Deployment, load_deployment
from deploy.nodes.ips import read_ips
from gracefarm.errors import ConfigError
from gracefarm.files import atomic_write

ENGINE, SET = "vllm", "gh200-cu130"
"What can be served today, and the newest set for it."
NO_SHARE = '# share = "/path"        # the shared folder, the same on all nodes'


def write_config(ips: Path, path: Path, *, access: Access, share: str | None = None, repo: str = ModelConfig().repo) -> bool:
    """deploy.toml for the nodes of an ips.txt; False: one for the same file is there already, and stays as it is.

    Raises:
        ConfigError: ips.txt is wrong, or `path` is there and is about other nodes.
    """
    read_ips(ips)
    relative = os.path.relpath(ips.absolute(), path.absolute().parent)
    if path.exists():
        before = load_deployment(path).data.nodes.file
        if before == relative:
            return False
        raise ConfigError(
            f"{path} is there already, and its nodes are in {before or 'it'}",
            remedy=f"`deploy init {path}` for those nodes; for others another folder, or --file",
        )
    atomic_write(path, render(relative, access=access, share=share, repo=repo))
    return True


def render(ips: str, *, access: Access, share: str | None, repo: str) -> str:
    """Its text: what can be served today, and nothing that has a good default."""
    quoted = json.dumps
    lines = [
        f"name = {quoted(name_of(repo))}    # every key: docs/reference/deploy.md",
        f"engine = {quoted(ENGINE)}",
        f"set = {quoted(SET)}",
        f'# index = "http://HOST:8080/{SET}/simple/"    # the farm\'s; without it the wheels come from the Python index',
        f"share = {quoted(share)}" if share else NO_SHARE,
        "[nodes]",
        f"file = {quoted(ips)}",
        *(f"{name} = {quoted(value)}" for name, value in access.model_dump(exclude_none=True).items()),
        "[model]",
        f"repo = {quoted(repo)}",
        'revision = "main"    # a commit pins it',
    ]
    return "\n".join(lines) + "\n"


def name_of(repo: str) -> str:
    """A deployment's name for a model, as llama-3.1-8b-instruct."""
    words = re.sub(r"[^a-z0-9._-]+", "-", repo.rpartition("/")[2].lower()).strip("-._")
    return words[:40].strip("-._") or "model"


def propose_share(deployment: Deployment, share: str) -> bool:
    """Fill in the shared folder that all nodes have, where we left its place open; False: deploy.toml is the user's own."""
    text = deployment.path.read_text()
    if NO_SHARE not in text:
        return False
    atomic_write(deployment.path, text.replace(NO_SHARE, f"share = {json.dumps(share)}"))
    return True

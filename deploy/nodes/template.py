"""The first deploy.toml: written for an ips.txt, with what a person may want to set beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from deploy.nodes.config import Access, ModelConfig
from deploy.nodes.deployment import Deployment, load_deployment
from deploy.nodes.ips import read_ips
from gracefarm.errors import ConfigError
from gracefarm.files import atomic_write

NO_SHARE = '# share = "/path"        # the shared folder, the same on all nodes'


def write_config(ips: Path, path: Path, *, access: Access, share: str | None = None) -> bool:
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
    atomic_write(path, render(relative, access=access, share=share))
    return True


def render(ips: str, *, access: Access, share: str | None) -> str:
    """Its text."""
    quoted = json.dumps
    entered = [f"{name} = {quoted(value)}" for name, value in access.model_dump(exclude_none=True).items()]
    lines = [
        "# What is served, and where. Every key: docs/deploy.md",
        'name = "llama-405b"',
        'engine = "aphrodite"     # or vllm, with set = "gh200-cu130"',
        'set = "gh200-cu124"      # the wheels: tested and published together',
        '# index = "http://HOST:8080/simple/"',
        '# python = "system"      # python3.11 of the nodes, instead of one that uv brings onto the share',
        f"share = {quoted(share)}" if share else NO_SHARE,
        "",
        "[nodes]",
        f"file = {quoted(ips)}",
        *entered,
        "",
        "[model]",
        f"repo = {quoted(ModelConfig().repo)}",
        'revision = "main"        # a commit pins it',
        "",
        "[options]",
        "# price_per_node_hour = 2.29",
    ]
    return "\n".join(lines) + "\n"


def propose_share(deployment: Deployment, share: str) -> bool:
    """Fill in the shared folder that all nodes have, where we left its place open; False: deploy.toml is the user's own."""
    text = deployment.path.read_text()
    if NO_SHARE not in text:
        return False
    atomic_write(deployment.path, text.replace(NO_SHARE, f"share = {json.dumps(share)}"))
    return True

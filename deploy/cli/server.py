"""The server for `ask` and `bench`: the engine of the deployment through SSH, or any server by its URL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx

from deploy.cli.common import DeployContext
from deploy.engine.completion import CompletionServer
from deploy.fleet import tunnels
from deploy.fleet.ssh import open_fleet
from deploy.fleet.tunnels import WantedPort
from deploy.nodes.deployment import Folder
from gracefarm.errors import UsageError


@asynccontextmanager
async def opened_server(context: DeployContext, url: str | None, key: str | None) -> AsyncIterator[CompletionServer]:
    """The server of --url, else the engine of the deployment through SSH."""
    if url:
        _check(url)
        local = any(f"//{host}" in url for host in ("127.", "localhost", "[::1]"))
        yield CompletionServer(url=url, key=key, direct=local)
        return
    deployment = context.deployment
    wanted = [WantedPort(name="engine", remote=deployment.data.ports.engine, local=0)]
    async with open_fleet(deployment) as nodes, tunnels.opened(nodes, deployment.head, wanted) as (forward,):
        yield CompletionServer(url=f"http://127.0.0.1:{forward.local}", key=_key(deployment.folder))


def _check(url: str) -> None:
    """Check the URL. Raises UsageError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"--url {url}: {error}", remedy="use the form http://HOST:PORT/v1") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"--url {url} is not the URL of a server", remedy="use the form http://HOST:PORT/v1")


def _key(folder: Folder) -> str | None:
    """The engine's key, if there is one."""
    with suppress(FileNotFoundError):
        return folder.api_key.read_text().strip()
    return None

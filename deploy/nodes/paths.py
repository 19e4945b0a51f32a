"""Paths on the nodes. Each path is defined only here."""

from __future__ import annotations

import posixpath

from deploy.nodes.deployment import Deployment, Node
from gracefarm.errors import ConfigError

RAY_TEMP_BYTES = 40
"""Longest path of Ray's temporary folder. In it, Ray creates `session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store.N` (67
bytes), and the path of a Unix socket has at most 107 bytes (sun_path in unix(7))."""

ENGINE_JOB = "engine"
BENCH_JOB = "engine-bench"
"`vllm bench serve`. Commands that stop all jobs of the engine stop this one too, since its name starts with ENGINE_JOB."
RAY_JOB = "ray"


def share(deployment: Deployment) -> str:
    """The shared folder. Raises ConfigError if deploy.toml does not set it."""
    if deployment.data.share is None:
        raise ConfigError(
            f"{deployment.path}: the key `share` is missing",
            remedy='add share = "/path" to this file; the path must be the same shared folder on all nodes',
        )
    return deployment.data.share


def root(deployment: Deployment) -> str:
    """The folder that all deployments on a shared folder have in common. It contains the weights."""
    return posixpath.join(share(deployment), "gracefarm")


def environment_root(deployment: Deployment) -> str:
    """The folder of this deployment's environments."""
    return posixpath.join(root(deployment), deployment.name)


def environment(deployment: Deployment) -> str:
    """The active environment: a symbolic link, switched by deploy.steps.environment."""
    return posixpath.join(environment_root(deployment), "env")


def program(deployment: Deployment, name: str) -> str:
    """An executable of the active environment."""
    return posixpath.join(environment(deployment), "bin", name)


def download_python(deployment: Deployment) -> str:
    """The Python with huggingface_hub."""
    return posixpath.join(environment_root(deployment), "download", "bin", "python")


def weights(shared: str, repo: str, commit: str) -> str:
    """The folder of a model's files at a commit. The engine gets this path."""
    return posixpath.join(shared, "weights", repo.replace("/", "--"), commit)


def base(deployment: Deployment, node: Node, user: str) -> str:
    """`local` of deploy.toml on a node; the same path as in Fleet."""
    return deployment.data.local.format(user=user, node=node.name)


def node_folder(deployment: Deployment, node: Node, user: str) -> str:
    """A deployment's folder on a node's local disk, for jobs and secrets; the same path as Fleet.folder."""
    return posixpath.join(base(deployment, node, user), deployment.folder.id, node.name)


def ray_token(deployment: Deployment, node: Node, user: str) -> str:
    """File of Ray's token, with mode 0600."""
    return posixpath.join(node_folder(deployment, node, user), "ray-token")


def api_key(deployment: Deployment, node: Node, user: str) -> str:
    """File of the engine's API key on the head, with mode 0600. For scripts: `deploy serve` passes the key on stdin."""
    return posixpath.join(node_folder(deployment, node, user), "api-key")


def ray_temp(deployment: Deployment, node: Node, user: str) -> str:
    """Ray's temporary folder on the node's local disk. Workers before Ray 2.5x use the head's path on their own disk.

    Raises:
        ConfigError: the path is too long for Ray's sockets.
    """
    folder = posixpath.join(base(deployment, node, user), deployment.folder.id[:8])
    if len(folder.encode()) > RAY_TEMP_BYTES:
        raise ConfigError(
            f"the path {folder} has {len(folder.encode())} bytes, but Ray's sockets allow at most {RAY_TEMP_BYTES}",
            remedy='set a shorter `local` in deploy.toml, such as local = "/tmp/gf-{user}"',
        )
    return folder

"""Where things are on the nodes: one rule each, for all who place, start, read or remove them."""

from __future__ import annotations

import posixpath

from deploy.nodes.deployment import Deployment, Node
from gracefarm.errors import ConfigError

RAY_TEMP_BYTES = 40
"""Ray puts `session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store.N` under its temporary folder: 67 bytes, and the path of a
Unix socket ends at 107 (sun_path of unix(7))."""

ENGINE_JOB = "engine"
RAY_JOB = "ray"


def share(deployment: Deployment) -> str:
    """The shared folder. Raises ConfigError when deploy.toml names none."""
    if deployment.data.share is None:
        raise ConfigError(
            f"{deployment.path}: no shared folder",
            remedy='set share = "/path", the same on all nodes; `deploy init` proposes it',
        )
    return deployment.data.share


def root(deployment: Deployment) -> str:
    """What all deployments on a shared folder have in common: weights."""
    return posixpath.join(share(deployment), "gracefarm")


def environment_root(deployment: Deployment) -> str:
    """`root` of deploy.steps.environment: a deployment's own, for it holds what is active."""
    return posixpath.join(root(deployment), deployment.name)


def environment(deployment: Deployment) -> str:
    """The active environment: a symbolic link that deploy.steps.environment switches."""
    return posixpath.join(environment_root(deployment), "env")


def program(deployment: Deployment, name: str) -> str:
    """An executable of the active environment."""
    return posixpath.join(environment(deployment), "bin", name)


def download_python(deployment: Deployment) -> str:
    """The Python that has huggingface_hub."""
    return posixpath.join(environment_root(deployment), "download", "bin", "python")


def weights(shared: str, repo: str, commit: str) -> str:
    """The folder of a model's files at a commit, below `root`: what the engine is given."""
    return posixpath.join(shared, "weights", repo.replace("/", "--"), commit)


def base(deployment: Deployment, node: Node, user: str) -> str:
    """`local` of deploy.toml on a node, as Fleet has it."""
    return deployment.data.local.format(user=user, node=node.name)


def node_folder(deployment: Deployment, node: Node, user: str) -> str:
    """A deployment's folder on a node's own disk, as Fleet.folder has it: jobs, secrets."""
    return posixpath.join(base(deployment, node, user), deployment.folder.id, node.name)


def ray_token(deployment: Deployment, node: Node, user: str) -> str:
    """Ray's token, 0600."""
    return posixpath.join(node_folder(deployment, node, user), "ray-token")


def api_key(deployment: Deployment, node: Node, user: str) -> str:
    """The engine's API key on the head, 0600; for scripts, since `deploy serve` hands it over on stdin."""
    return posixpath.join(node_folder(deployment, node, user), "api-key")


def ray_temp(deployment: Deployment, node: Node, user: str) -> str:
    """Ray's temporary folder, on the node's own disk and short. Workers before Ray 2.5x use the head's path on their own disk.

    Raises:
        ConfigError: `local` is too long for Ray's sockets.
    """
    folder = posixpath.join(base(deployment, node, user), deployment.folder.id[:8])
    if len(folder.encode()) > RAY_TEMP_BYTES:
        raise ConfigError(
            f"{folder} is {len(folder.encode())} bytes long, and Ray's sockets fit under {RAY_TEMP_BYTES} at most",
            remedy='set a shorter `local` in deploy.toml, as local = "/tmp/gf-{user}"',
        )
    return folder

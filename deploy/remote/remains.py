"""Removes the files of a deployment from a node. Symbolic links are not followed, and files of other users are not removed."""

from __future__ import annotations

import glob
import os
from contextlib import suppress
from pathlib import Path

from deploy.remote import environment
from deploy.remote.removal import remove_all, size_of
from deploy.remote.wire import Json, WorkerError


def remove(request: Json) -> Json:
    """Remove `paths`, and what matches `patterns`; then the folders in `empty` if they are empty.

    `cache`: remove uv in this user's cache too, and the cache's folder if it is empty then. `owned`: the deployment that must
    own each folder (deploy.remote.environment).

    Returns:
        The removed paths, and their size in bytes.
    """
    matching = [path for pattern in request.get("patterns", []) for path in sorted(glob.glob(pattern))]  # noqa: PTH207 - absolute
    wanted = [Path(path) for path in (*request["paths"], *matching)]
    for folder, mark in request.get("owned", {}).items():
        if (owner := environment.owner(Path(folder))) not in (None, mark):
            remedy = "on your machine, run the command in the folder that has the deploy.toml of that deployment"
            raise WorkerError("node", f"{folder} belongs to another deployment ({owner})", remedy)
    if request.get("cache"):
        wanted += sorted((Path.home() / ".cache" / "gracefarm").glob("uv-*"))
    removed, size = [], 0
    for path in wanted:
        if not os.path.lexists(path):
            continue
        if path.lstat().st_uid != os.getuid():
            raise WorkerError("node", f"{path} belongs to another user", "remove it as root or as that user")
        size += size_of(path)
        remove_all(path)
        removed.append(str(path))
    own = [Path.home() / ".cache" / "gracefarm"] if request.get("cache") else []
    for folder in (*request["empty"], *own):
        with suppress(OSError):
            Path(folder).rmdir()
    return {"removed": removed, "bytes": size}

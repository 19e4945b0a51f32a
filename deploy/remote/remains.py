"""What a deployment has put on a node, removed: files by their paths, each of this user, never through a symbolic link."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from deploy.remote import environment
from deploy.remote.removal import remove_all, size_of
from deploy.remote.wire import Json, WorkerError


def remove(request: Json) -> Json:
    """Remove `paths`, then folders of `empty` that hold nothing any more; the paths that were there, and their bytes.

    `cache`: uv in this user's cache too; `owned`: folder to the deployment that must own it (deploy.remote.environment).
    """
    wanted = [Path(path) for path in request["paths"]]
    for folder, mark in request.get("owned", {}).items():
        if (owner := environment.owner(Path(folder))) not in (None, mark):
            raise WorkerError("node", f"{folder} is of another deployment ({owner})", "nothing was removed there")
    if request.get("cache"):
        wanted += sorted((Path.home() / ".cache" / "gracefarm").glob("uv-*"))
    removed, size = [], 0
    for path in wanted:
        if not os.path.lexists(path):
            continue
        if path.lstat().st_uid != os.getuid():
            raise WorkerError("node", f"{path} belongs to another user", "remove it as its owner")
        size += size_of(path)
        remove_all(path)
        removed.append(str(path))
    for folder in request["empty"]:
        with suppress(OSError):
            Path(folder).rmdir()
    return {"removed": removed, "bytes": size}

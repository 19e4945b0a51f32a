"""Reports the state of a node in one call, to check whether the results of earlier steps still exist."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from deploy.remote import cache, mounts
from deploy.remote.environment import DESCRIPTION, active, owner
from deploy.remote.marked import processes
from deploy.remote.network import holder, listening
from deploy.remote.wire import Json


def look(request: Json) -> Json:
    """Report the requested parts. A part is None if it is not requested or does not exist.

    `prefix`: prefix of the marks of our processes on this node. `root`: folder of environments. `weights`: a model's folder.
    `count`: compare the size of every file with the manifest. `share`: the shared folder. `ports`: TCP ports.
    """
    weights = Path(request["weights"]) if request.get("weights") else None
    root = Path(request["root"]) if request.get("root") else None
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "cores": len(os.sched_getaffinity(0)),
        "processes": processes(request["prefix"]),
        "environments": {link: _finished(root, link) for link in ("env", "download")} if root else {},
        "owner": owner(root) if root else None,
        "weights": _weights(weights, count=bool(request.get("count"))) if weights else None,
        "share": _share(request["share"]) if request.get("share") else None,
        "holders": {str(port): holder(port) for port in request.get("ports", []) if listening(port)},
    }


def _finished(root: Path, link: str) -> str | None:
    """The id of the active environment; None if this node cannot read it."""
    try:
        identifier = active(root, link)
        return identifier if identifier and (root / "envs" / identifier / DESCRIPTION).is_file() else None
    except OSError:
        return None


def _weights(folder: Path, *, count: bool) -> Json:
    """The digest of the manifest on this node, and the files that are missing or have another size."""
    try:
        content = folder.with_name(folder.name + ".manifest.json").read_bytes()
    except OSError:
        return {"manifest": None, "wrong": []}
    files = json.loads(content)["files"] if count else []
    wrong = [file["path"] for file in files if mounts.size(folder / file["path"]) != file["size"]]
    return {"manifest": hashlib.sha256(content).hexdigest(), "wrong": wrong}


def _share(share: str) -> Json | None:
    if not Path(share).is_dir():
        return None
    mount = mounts.mount_of(share)
    return {"kind": mount.kind, "source": mount.source, "fsc": cache.fsc(mount.target)} if mount else None

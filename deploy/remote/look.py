"""One look at a node, for whoever asks whether what was done is still there; and the end of what is ours on it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from deploy.remote import cache, mounts
from deploy.remote.environment import active, owner
from deploy.remote.preflight import holder

Json = dict[str, Any]
MARK = b"GRACEFARM_MARK="
PLAN = b"GRACEFARM_PLAN="


def look(request: Json) -> Json:
    """What `request` asks for, each part None where it is not asked or not there.

    `prefix`: of the marks of our processes on this node; `root`: folder of environments; `weights`: a model's folder, `count`:
    whether this node compares every file's length with the manifest; `share`; `ports`.
    """
    weights = Path(request["weights"]) if request.get("weights") else None
    root = Path(request["root"]) if request.get("root") else None
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "time": time.time(),
        "cores": len(os.sched_getaffinity(0)),
        "processes": processes(request["prefix"]),
        "environments": {link: _finished(root, link) for link in ("env", "download")} if root else {},
        "owner": owner(root) if root else None,
        "weights": _weights(weights, count=bool(request.get("count"))) if weights else None,
        "share": _share(request["share"]) if request.get("share") else None,
        "holders": {str(port): who for port in request.get("ports", []) if (who := _holder(port))},
    }


def processes(prefix: str | tuple[str, ...], sessions: Collection[int] = ()) -> list[Json]:
    """Ours: processes whose mark starts with `prefix`, and all others of their sessions; pid, mark, plan, name, session.

    A program that sets its title writes over its environment as the kernel shows it, so that Ray's agents lose their marks;
    a session, though, is made by us (jobs.sh) and has nobody else in it. `sessions`: from an earlier look. Zombies do not
    count; arguments are never told.
    """
    table = _table()
    marked = {pid: one for pid, one in table.items() if str(one["mark"]).startswith(prefix)}
    of = {int(one["session"]): one for one in marked.values()}
    found = dict(marked)
    for pid, one in table.items():
        number = int(one["session"])
        if pid not in found and not one["mark"] and (number in of or number in sessions):
            known = of.get(number, {})
            found[pid] = {**one, "mark": known.get("mark", ""), "plan": known.get("plan", "")}
    return [found[pid] for pid in sorted(found)]


def _table() -> dict[int, Json]:
    found: dict[int, Json] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "environ").read_bytes().split(b"\0")
            name = (folder / "comm").read_text().strip()
        except OSError:
            continue
        if fields[0] != "Z":
            value = {key: _value(words, word) for key, word in (("mark", MARK), ("plan", PLAN))}
            found[int(folder.name)] = {"pid": int(folder.name), "name": name, "session": int(fields[3]), **value}
    return found


def _value(words: list[bytes], name: bytes) -> str:
    return next((one[len(name) :] for one in words if one.startswith(name)), b"").decode(errors="replace")


def stop(request: Json) -> Json:
    """TERM to every process whose mark starts with one of `prefixes`, KILL after `grace` seconds, and a look what is left."""
    prefixes = tuple(request["prefixes"])
    first = processes(prefixes)
    sessions = {int(one["session"]) for one in first}

    def left() -> list[Json]:
        found = processes(prefixes, sessions)
        sessions.update(int(one["session"]) for one in found)
        return found

    _signal(first, signal.SIGTERM)
    deadline = time.monotonic() + float(request["grace"])
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + 5
    while (still := left()) and time.monotonic() < deadline:
        _signal(still, signal.SIGKILL)
        time.sleep(0.1)
    return {"ended": len(first), "left": left()}


def _signal(found: list[Json], number: int) -> None:
    for one in found:
        try:
            os.kill(one["pid"], number)
        except OSError:
            continue


def _finished(root: Path, link: str) -> str | None:
    """The active environment, if it can be read from here."""
    try:
        found = active(root, link)
        return found if found and (root / "envs" / found / "environment.json").is_file() else None
    except OSError:
        return None


def _weights(folder: Path, *, count: bool) -> Json:
    """The digest of the manifest as this node reads it, and which files are not there in their whole length."""
    try:
        content = folder.with_name(folder.name + ".manifest.json").read_bytes()
    except OSError:
        return {"manifest": None, "wrong": []}
    files = json.loads(content)["files"] if count else []
    wrong = [one["path"] for one in files if _size(folder / one["path"]) != one["size"]]
    return {"manifest": hashlib.sha256(content).hexdigest(), "wrong": wrong}


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _share(share: str) -> Json | None:
    if not Path(share).is_dir():
        return None
    mount = mounts.mount_of(os.path.realpath(share), mounts.parse_mounts(Path("/proc/mounts").read_text()))
    return {"kind": mount.kind, "source": mount.source, "fsc": cache.fsc(mount.target)} if mount else None


def _holder(port: int) -> str | None:
    """Who listens on a port, None when nobody does."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        lines = Path(table).read_text().splitlines()[1:] if Path(table).exists() else []
        for line in lines:
            row = line.split()
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                return holder(port)
    return None

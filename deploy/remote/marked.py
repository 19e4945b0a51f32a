"""Finds and stops the processes of a deployment on a node, by their marks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from deploy.remote.wire import Json

MARK = b"GRACEFARM_MARK="
PLAN = b"GRACEFARM_PLAN="


def processes(prefix: str | tuple[str, ...], sessions: Collection[int] = ()) -> list[Json]:
    """Find processes whose mark starts with `prefix`, and all others of their sessions: pid, mark, plan, name, session.

    A program that sets its title overwrites the environment that the kernel shows, so Ray's agents lose their marks. But
    jobs.sh creates the sessions, so they contain only our processes. `sessions`: sessions that were found earlier. Zombies are
    ignored, and arguments are never reported.
    """
    table = _table()
    ours = {pid: process for pid, process in table.items() if str(process["mark"]).startswith(prefix)}
    marked = {int(process["session"]): process for process in ours.values()}
    for pid, process in table.items():
        number = int(process["session"])
        if pid not in ours and not process["mark"] and (number in marked or number in sessions):
            known = marked.get(number, {})
            ours[pid] = {**process, "mark": known.get("mark", ""), "plan": known.get("plan", "")}
    return [ours[pid] for pid in sorted(ours)]


def deployment_of(pid: int) -> str:
    """The id of the deployment to which a process or its session belongs; empty if there is none."""
    table = _table()
    process = table.get(pid)
    if process is None:
        return ""
    same = (str(other["mark"]) for other in table.values() if other["session"] == process["session"])
    return (str(process["mark"]) or next(filter(None, same), "")).partition("/")[0]


def _table() -> dict[int, Json]:
    table: dict[int, Json] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "environ").read_bytes().split(b"\0")
            name = (folder / "comm").read_text().strip()
            if fields[0] != "Z":
                marks = {"mark": _value(words, MARK), "plan": _value(words, PLAN)}
                table[int(folder.name)] = {"pid": int(folder.name), "name": name, "session": int(fields[3]), **marks}
    return table


def _value(words: list[bytes], name: bytes) -> str:
    return next((word[len(name) :] for word in words if word.startswith(name)), b"").decode(errors="replace")


def stop(request: Json) -> Json:
    """Send TERM to every process whose mark starts with one of `prefixes`, and KILL after `grace` seconds.

    Returns:
        The number of processes, and those that are still running.
    """
    prefixes = tuple(request["prefixes"])
    first = processes(prefixes)
    sessions = {int(process["session"]) for process in first}

    def left() -> list[Json]:
        alive = processes(prefixes, sessions)
        sessions.update(int(process["session"]) for process in alive)
        return alive

    _signal(first, signal.SIGTERM)
    deadline = time.monotonic() + float(request["grace"])
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + 5
    while (still := left()) and time.monotonic() < deadline:
        _signal(still, signal.SIGKILL)
        time.sleep(0.1)
    return {"ended": len(first), "left": left()}


def _signal(targets: list[Json], number: int) -> None:
    for process in targets:
        with suppress(OSError):
            os.kill(process["pid"], number)

"""Switches on a cache for the shared folder on each node's local disk (cachefilesd, `fsc`), if possible, and measures it.

The cache makes the second start faster. It is optional, so a node without it has a reason, not an error.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.results import try_all
from deploy.nodes import paths
from deploy.nodes.state import StepRecord, digest
from deploy.remote import mounts
from deploy.remote.wire import Json
from deploy.steps.step import Applied, Looks, Step, Work
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, NodeError, SshError

SAMPLE = 1 << 30
"Bytes to read for a measurement."


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of one node. `on`: the cache was already on; `done`: it is on now; `skipped`: `text` has the reason."""

    node: str
    outcome: Literal["on", "done", "skipped"]
    text: str
    cold: float | None = None
    "Bytes per second of the first read."
    warm: float | None = None
    "Bytes per second of the second read, from the cache on disk, after dropping the page cache."


class CacheStep(Step):
    """Switches the cache on where it is possible."""

    name = "cache"

    def inputs(self, work: Work, looks: Looks) -> str:
        """The shared folder and the nodes."""
        return digest("cache", paths.share(work.deployment), work.inventory)

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str | None:
        """Check that the shared folder is still mounted with the cache."""
        for node, seen in looks.items():
            if record.data["fsc"].get(node) and not (seen["share"] or {}).get("fsc"):
                return f"{paths.share(work.deployment)} is mounted without the cache on {node}"
        return None

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Switch the cache on."""
        rows = await switch_on(work.nodes, paths.share(work.deployment), work.console)
        reasons = dict.fromkeys(row.text for row in rows if row.outcome == "skipped")
        on = [row for row in rows if row.outcome != "skipped"]
        parts = [f"{len(on)} of {len(rows)} nodes: {on[0].text}"] if on else []
        parts += [f"skipped: {reason}" for reason in reasons]
        speeds = {row.node: {"cold": row.cold, "warm": row.warm} for row in on if row.cold is not None}
        data = {"fsc": {row.node: row.outcome != "skipped" for row in rows}, "measured": speeds}
        return Applied(text="; ".join(parts), data=data, skipped=not on)


async def measure_new(work: Work) -> bool:
    """Measure the cache when there are weights to read. It is switched on before there are any."""
    record = work.keeper.state.steps.get("cache")
    if record is None or record.outcome != "done" or not work.keeper.state.data("weights"):
        return False
    known = record.data.get("measured", {})
    left = [node for node in work.nodes if record.data["fsc"].get(node.name) and node.name not in known]
    speeds = await measure(left, paths.share(work.deployment)) if left else {}
    if not speeds:
        return False
    work.keeper.begin("cache", record.digest)
    work.keeper.end("cache", "done", record.text, {**record.data, "measured": {**known, **speeds}})
    for node, speed in speeds.items():
        work.console.step("cache", f"{node}: measured{told(speed).replace(';', ':', 1)}")
    return True


async def switch_on(targets: Sequence[RemoteNode], share: str, console: Console) -> list[Row]:
    """Switch the cache on where it is possible. The rows have the order of the nodes.

    Raises:
        SshError, NodeError: a node was not reached.
    """
    good, bad = await try_all(targets, lambda node: _node(node, share, console))
    for error in bad.values():
        if isinstance(error, (SshError, NodeError)):
            raise error
    return [good[node.name] if node.name in good else _failed(node.name, bad[node.name]) for node in targets]


def _failed(node: str, error: GracefarmError) -> Row:
    return Row(node=node, outcome="skipped", text=error.cause.removeprefix(f"{node}: "))


async def _node(node: RemoteNode, share: str, console: Console) -> Row:
    seen = await call(node, "cache.inspect", {"share": share})
    reason = why_not(seen)
    if reason:
        return Row(node=node.name, outcome="skipped", text=reason)
    if seen["fsc"]:
        return Row(node=node.name, outcome="on", text=f"{seen['source']} is cached")
    new = mounts.with_cache(seen["fstab"], seen["target"])
    diff = difference(seen["fstab"], new)
    await call(node, "cache.install", {})
    if diff:
        console.step("cache", f"{node.name}: /etc/fstab changes:\n{diff}")
        before = hashlib.sha256(seen["fstab"].encode(errors="surrogateescape")).hexdigest()
        await call(node, "cache.write_fstab", {"text": new, "before": before})
    after = await call(node, "cache.remount", {"target": seen["target"]})
    if not after["fsc"]:
        why = (
            after["busy"]
            or "the kernel accepted the option but does not cache (FSC has the value no in /proc/fs/nfsfs/volumes)"
        )
        text = f"{why}; the cache is on after the next mount" if after["busy"] else str(why)
        return Row(node=node.name, outcome="skipped", text=text)
    speed = await call(node, "cache.measure", {"share": share, "bytes": SAMPLE})
    return Row(
        node=node.name,
        outcome="done",
        text=f"{seen['source']} is cached now{told(speed)}",
        cold=speed.get("cold"),
        warm=speed.get("warm"),
    )


async def measure(targets: Sequence[RemoteNode], share: str) -> dict[str, Json]:
    """Read the largest file cold and warm, on every node in parallel.

    The result has no entry for a node that fails or has nothing to read.
    """
    good, _bad = await try_all(targets, lambda node: call(node, "cache.measure", {"share": share, "bytes": SAMPLE}))
    return {node: {key: speed[key] for key in ("path", "cold", "warm")} for node, speed in good.items() if speed["path"]}


def why_not(seen: Json) -> str | None:
    """Why a node cannot have the cache, from `cache.inspect`; None if it can."""
    kind = seen["kind"]
    if kind == "virtiofs":
        return "virtiofs: the host has its own cache, and `fsc` is an option of NFS only"
    if kind not in mounts.NFS:
        return f"{kind}: `fsc` is an option of NFS only"
    if seen["fsc"]:
        return None
    if not seen["root"]:
        return "it requires root, but sudo asks for a password on this node"
    if not any(mounts.nfs_entry(line, seen["target"]) for line in seen["fstab"].splitlines()):
        return f"{seen['target']} is not in /etc/fstab: mount it with the option `fsc`"
    return None


def difference(old: str, new: str) -> str:
    """The difference in the format of `diff -u` without context; empty if there is none."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "/etc/fstab", "/etc/fstab", lineterm="", n=0)
    return "\n".join(lines)


def told(speed: Json) -> str:
    """The measurement as text."""
    if not speed.get("path"):
        return "; its speed is measured when the weights are downloaded"
    if speed.get("cold") is None or speed.get("warm") is None:
        return "; its speed is not measured: dropping the page cache requires root"
    return f"; {speed['cold'] / 1e6:.0f} MB/s cold, {speed['warm'] / 1e6:.0f} MB/s from the cache on disk"

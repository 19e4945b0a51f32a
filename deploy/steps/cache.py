"""A cache on each node's own disk for the shared folder (cachefilesd, `fsc`): where it can be had, and measured there.

It makes the second start quick and is needed by nothing, so whatever prevents it is told as the reason, never as an error.
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
"Bytes that are read to measure."


@dataclass(frozen=True, kw_only=True)
class Row:
    """One node. `on`: it was there already; `done`: it is there now; `skipped`: not, and `text` says why."""

    node: str
    outcome: Literal["on", "done", "skipped"]
    text: str
    cold: float | None = None
    "Bytes per second of the first read."
    warm: float | None = None
    "Of the second, from the cache on disk, with the page cache dropped."


class CacheStep(Step):
    """The cache where it can be had."""

    name = "cache"

    def inputs(self, work: Work, looks: Looks) -> str:
        """The share and the nodes."""
        return digest("cache", paths.share(work.deployment), work.inventory)

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str | None:
        """Mounted with the cache where it was."""
        for node, seen in looks.items():
            if record.data["fsc"].get(node) and not (seen["share"] or {}).get("fsc"):
                return f"{node} has mounted {paths.share(work.deployment)} without it"
        return None

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Switch it on."""
        rows = await switch_on(work.nodes, paths.share(work.deployment), work.console)
        reasons = dict.fromkeys(row.text for row in rows if row.outcome == "skipped")
        on = [row for row in rows if row.outcome != "skipped"]
        parts = [f"{len(on)} of {len(rows)} nodes: {on[0].text}"] if on else []
        parts += [f"skipped: {reason}" for reason in reasons]
        speeds = {row.node: {"cold": row.cold, "warm": row.warm} for row in on if row.cold is not None}
        data = {"fsc": {row.node: row.outcome != "skipped" for row in rows}, "measured": speeds}
        return Applied(text="; ".join(parts), data=data, skipped=not on)


async def measure_new(work: Work) -> bool:
    """Measure it, once there are weights to measure it with: it is switched on while the share is empty."""
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
    """The cache on every node that can have it, in the inventory's order.

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
        why = after["busy"] or "the kernel took the option and does not cache (FSC no in /proc/fs/nfsfs/volumes)"
        text = f"{why}; the next mount has it" if after["busy"] else str(why)
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
    """One cold and one warm read on every node at once, of the largest file that is there.

    A node that fails, or has nothing to read, is left out.
    """
    good, _bad = await try_all(targets, lambda node: call(node, "cache.measure", {"share": share, "bytes": SAMPLE}))
    return {node: {key: speed[key] for key in ("path", "cold", "warm")} for node, speed in good.items() if speed["path"]}


def why_not(seen: Json) -> str | None:
    """Why a node cannot have the cache, from `cache.inspect`; None: it can, or has it."""
    kind = seen["kind"]
    if kind == "virtiofs":
        return "virtiofs: the host caches it, and `fsc` is an option of NFS alone"
    if kind not in mounts.NFS:
        return f"{kind}: `fsc` is an option of NFS alone"
    if seen["fsc"]:
        return None
    if not seen["root"]:
        return "it needs root, and sudo asks for a password on this node"
    if not any(mounts.nfs_entry(line, seen["target"]) for line in seen["fstab"].splitlines()):
        return f"{seen['target']} is not in /etc/fstab: whoever mounts it must say `fsc`"
    return None


def difference(old: str, new: str) -> str:
    """As `diff -u` writes it, without context; empty where nothing changes."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "/etc/fstab", "/etc/fstab", lineterm="", n=0)
    return "\n".join(lines)


def told(speed: Json) -> str:
    """The measurement for people."""
    if not speed.get("path"):
        return "; it is measured when the weights are there"
    if speed.get("cold") is None or speed.get("warm") is None:
        return "; not measured: dropping the page cache needs root"
    return f"; {speed['cold'] / 1e6:.0f} MB/s cold, {speed['warm'] / 1e6:.0f} MB/s from the cache on disk"

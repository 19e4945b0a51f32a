"""A cache on each node's own disk for the shared folder (cachefilesd, `fsc`): where it can be had, and measured there.

It makes the second start quick and is needed by nothing, so whatever prevents it is told as the reason, never as an error.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deploy.fleet.calls import Json, Target, call, try_all
from deploy.remote import mounts
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
    diff: str = ""
    "Of /etc/fstab."
    backup: str | None = None
    cold: float | None = None
    "Bytes per second of the first read."
    warm: float | None = None
    "Of the second, from the cache on disk, with the page cache dropped."


async def up(targets: Sequence[Target], share: str, console: Console, *, sample: int = SAMPLE) -> list[Row]:
    """The cache on every node that can have it, in the inventory's order.

    Raises:
        SshError, NodeError: a node was not reached.
    """

    async def one(node: Target) -> Row:
        return await _node(node, share, console, sample)

    good, bad = await try_all(targets, one)
    for error in bad.values():
        if isinstance(error, (SshError, NodeError)):
            raise error
    return [good[node.name] if node.name in good else _failed(node.name, bad[node.name]) for node in targets]


def _failed(node: str, error: GracefarmError) -> Row:
    return Row(node=node, outcome="skipped", text=error.cause.removeprefix(f"{node}: "))


async def _node(node: Target, share: str, console: Console, sample: int) -> Row:
    found = await call(node, "cache.inspect", {"share": share})
    reason = why_not(found)
    if reason:
        return Row(node=node.name, outcome="skipped", text=reason)
    if found["fsc"]:
        return Row(node=node.name, outcome="on", text=f"{found['source']} is cached")
    new = mounts.with_cache(found["fstab"], found["target"])
    backup, diff = None, difference(found["fstab"], new)
    await call(node, "cache.install", {})
    if diff:
        console.step("cache", f"{node.name}: /etc/fstab changes:\n{diff}")
        before = hashlib.sha256(found["fstab"].encode(errors="surrogateescape")).hexdigest()
        backup = str((await call(node, "cache.write_fstab", {"text": new, "before": before}))["backup"])
    after = await call(node, "cache.remount", {"target": found["target"]})
    if not after["fsc"]:
        why = after["busy"] or "the kernel took the option and does not cache (FSC no in /proc/fs/nfsfs/volumes)"
        text = f"{why}; the next mount has it" if after["busy"] else str(why)
        return Row(node=node.name, outcome="skipped", text=text, diff=diff, backup=backup)
    speed = await call(node, "cache.measure", {"share": share, "bytes": sample})
    return Row(
        node=node.name,
        outcome="done",
        text=f"{found['source']} is cached now{told(speed)}",
        diff=diff,
        backup=backup,
        cold=speed.get("cold"),
        warm=speed.get("warm"),
    )


async def measure(targets: Sequence[Target], share: str, *, sample: int = SAMPLE) -> dict[str, Json]:
    """One cold and one warm read on every node at once, of the largest file that is there; a node that fails is left out."""
    good, _bad = await try_all(targets, lambda node: call(node, "cache.measure", {"share": share, "bytes": sample}))
    return {node: {key: one.get(key) for key in ("path", "cold", "warm")} for node, one in good.items()}


def why_not(found: Json) -> str | None:
    """Why a node cannot have the cache, from `cache.inspect`; None: it can, or has it."""
    kind = found["kind"]
    if kind == "virtiofs":
        return "virtiofs: the host caches it, and `fsc` is an option of NFS alone"
    if kind not in mounts.NFS:
        return f"{kind}: `fsc` is an option of NFS alone"
    if found["fsc"]:
        return None
    if not found["root"]:
        return "it needs root, and sudo asks for a password on this node"
    entry = [one for one in mounts.parse_fstab(found["fstab"]) if one.target.rstrip("/") == found["target"].rstrip("/")]
    if not any(one.kind in mounts.NFS for one in entry):
        return f"{found['target']} is not in /etc/fstab: whoever mounts it must say `fsc`"
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

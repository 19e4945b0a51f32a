"""Measures deploy: a command on 1 and on 50 nodes, a repeated `up` on 10 nodes, and a download of 191 files by 4 nodes.

In `fan-out` and `download`, the nodes are SSH servers of this process on loopback addresses. So one core does both sides of
every handshake. `up` requires root, since its nodes are those of the rehearsal. `download` limits the rate of each node.
`python -m bench.deploy fan-out` runs one row.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from deploy.fleet.results import require
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import Fleet
from deploy.rehearsal import hub, walkthrough
from deploy.steps import assignment, weights
from gracefarm import settings
from gracefarm.console import Console
from tests.deploy import kit

FAN = 50
COMMAND = "sleep 1; uname -r"
UP_NODES, UP_BOUND = 10, 5.0
FILES, NODES = 191, 4
SIZE, RATE = 400_000, 400_000
"Bytes of each file; bytes per second that each node can download."


def main() -> None:
    """Run every row, or those that the arguments name."""
    rows: dict[str, Callable[[Path], str]] = {"fan-out": fan_out, "up": nothing_to_do, "download": download}
    chosen = [name for name in sys.argv[1:] if name in rows] or list(rows)
    for name in chosen:
        folder = Path(tempfile.mkdtemp(prefix="gracefarm-bench-"))
        try:
            print(f"{name:9} {rows[name](folder)}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# The same command on many nodes.


def fan_out(folder: Path) -> str:
    """Run a command on 1 and on FAN nodes. Cold: the run includes the connection to each node. Warm: the connections exist."""

    async def go(count: int) -> tuple[list[float], list[float]]:
        cold, warm = [], []
        place = folder / str(count)
        place.mkdir()
        async with kit.machines(place, count) as machines:
            for _ in range(3):
                async with kit.fleet(place, machines) as fleet:
                    cold.append(await timed(fleet))
                    warm.append(await timed(fleet))
        return cold, warm

    async def timed(fleet: Fleet) -> float:
        begun = time.monotonic()
        require(await fleet.run(COMMAND), COMMAND)
        return time.monotonic() - begun

    (one_cold, one_warm), (all_cold, all_warm) = asyncio.run(go(1)), asyncio.run(go(FAN))
    parts = []
    for name, alone, many in (("cold", one_cold, all_cold), ("warm", one_warm, all_warm)):
        single, fanned = statistics.median(alone), statistics.median(many)
        bound = 1.5 * single + 0.5
        kept = verdict(fanned <= bound)
        parts.append(f"{name}: 1 node {single:.2f} s, {FAN} nodes {fanned:.2f} s (bound {bound:.2f} s: {kept})")
    return f"`{COMMAND}`, median of 3; " + "; ".join(parts)


def verdict(good: bool) -> str:
    """The word for the table."""
    return "kept" if good else "MISSED"


# `deploy up` when all steps are done.


def nothing_to_do(_folder: Path) -> str:
    """Measure the complete command on nodes of the rehearsal, which are namespaces of this machine with a real sshd."""
    here, seconds = settings.load(), []
    with walkthrough.rehearsal(UP_NODES, here.home, here, Console()) as rehearsal:
        walkthrough.start(rehearsal)
        first = rehearsal.command("up").seconds
        for _ in range(3):
            step = rehearsal.command("up")
            if "up to date" not in step.output:
                raise RuntimeError(f"`deploy up` repeated a step: {step.output}")
            seconds.append(step.seconds)
    again, load = statistics.median(seconds), os.getloadavg()[0]
    kept = verdict(again <= UP_BOUND)
    what = f"`deploy up` on {UP_NODES} nodes: first {first:.1f} s, with nothing to do"
    return f"{what} {again:.2f} s, median of 3 (bound {UP_BOUND:g} s: {kept}; load average {load:.1f})"


# The download of weights.


def download(folder: Path) -> str:
    """Measure a download by 1 and by NODES nodes. Each node gets RATE bytes per second, for any number of connections."""
    python = hub_python(folder)
    files = kit.shards(FILES, SIZE, seed=405)
    first, _ = bring(folder / "one", files, 1, python)
    four, outcome = bring(folder / "four", files, NODES, python)
    speedup, deal = first / four, busiest(outcome)
    return (
        f"{FILES} files, {sum(map(len, files.values())) / 1e6:.0f} MB at {RATE / 1e6:g} MB/s a node: 1 node {first:.1f} s, "
        f"{NODES} nodes {four:.1f} s, {speedup:.2f} times (bound 3.6: {verdict(speedup >= 3.6)}); "
        f"the busiest node has {deal:.3f} of the best possible split (bound 1.05: {verdict(deal <= 1.05)})"
    )


def busiest(outcome: weights.Brought) -> float:
    """The most bytes that one node downloads, divided by a lower bound for every assignment of files to nodes.

    The bound is the largest of three numbers: the mean per node, the size of the largest file, and the sum of the
    ceil(files/nodes) smallest files. The third one holds because some node downloads at least this number of files.
    """
    files = outcome.manifest.files
    shares = assignment.deal(files, [f"k{rank}" for rank in range(NODES)])
    sizes = sorted(file.size for file in files)
    least = max(sum(sizes) / NODES, sizes[-1], sum(sizes[: -(-len(sizes) // NODES)]))
    return max(sum(file.size for file in share) for share in shares.values()) / least


def bring(folder: Path, files: dict[str, bytes], count: int, python: str) -> tuple[float, weights.Brought]:
    """Seconds from the command to the finished folder, including the check of each file by another node."""
    folder.mkdir()

    async def go(url: str) -> tuple[float, weights.Brought]:
        async with kit.machines(folder, count) as machines, kit.fleet(folder, machines) as fleet:
            spec = weights.WeightsSpec(root=str(folder / "share"), repo="org/model", endpoint=url, python=python)
            begun = time.monotonic()
            outcome = await weights.bring(remote_nodes(fleet), spec, Console())
            return time.monotonic() - begun, outcome

    with hub.serving(files, rate=RATE) as served:
        return asyncio.run(go(served.url))


def hub_python(folder: Path) -> str:
    """Create the environment for downloads with wheels of the configured index. Return its Python."""
    uv, place = Path(sys.executable).with_name("uv"), folder / "env"
    subprocess.run([uv, "venv", "-q", "--no-project", "--python", sys.executable, place], check=True)
    lock = Path(weights.__file__).parent.parent / "data" / "download.lock"
    options = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", lock]
    subprocess.run([uv, "pip", "install", "-q", "--python", place / "bin" / "python", *options], check=True)
    return str(place / "bin" / "python")


if __name__ == "__main__":
    main()

"""Download and verification of weights, and what a user reads when the disk, the Hub or the shared folder fails."""

from __future__ import annotations

import asyncio
import email.utils
import os
import shlex
import shutil
import stat
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.fleet.shells import FleetShell
from deploy.rehearsal import hub
from deploy.remote.hub import patiently
from deploy.steps import weights
from gracefarm.console import Console
from gracefarm.errors import DigestError, DiskFullError, FetchError, HostError
from tests.deploy import kit
from tests.deploy.weights_kit import TOKEN, bring, bring_again, content, homes, hub_python, spec, wanted

__all__ = ["homes", "hub_python"]


def test_every_file_comes_once_and_is_verified_by_another_node(homes: Path, hub_python: str) -> None:
    with hub.serving(kit.shards(12, 30_000)) as served:
        outcome = bring(homes, served, hub_python)
        assert content(outcome) == wanted(served.files)
        assert sorted(path for paths in served.served.values() for path in paths) == sorted(wanted(served.files))
        assert set(served.served) == {"k0", "k1", "k2"}
        before = sum(map(len, served.served.values()))
        again = bring_again(homes, served, hub_python)
        assert again.fetched == 0
        assert again.rounds == 0
        assert sum(map(len, served.served.values())) == before
    assert not Path(outcome.folder + ".staging").exists()


def test_a_corrupted_shard_is_caught_by_the_other_node_and_fetched_again(homes: Path, hub_python: str) -> None:
    bad = "model-00002-of-00006.safetensors"
    with hub.serving(kit.shards(6, 20_000), corrupt={bad: 1}) as served:
        outcome = bring(homes, served, hub_python)
        assert content(outcome) == wanted(served.files)
        assert sum(paths.count(bad) for paths in served.served.values()) == 2
        assert outcome.rounds == 2


def test_a_shard_that_is_always_wrong_never_gets_into_the_folder(homes: Path, hub_python: str) -> None:
    bad = "model-00001-of-00003.safetensors"
    with hub.serving(kit.shards(3, 5_000), corrupt={bad: 99}) as served:
        with pytest.raises(DigestError, match=bad):
            bring(homes, served, hub_python, count=2)
        assert not list((homes / "share").rglob(f"{hub.COMMIT}/{bad}"))


def test_a_node_without_the_shared_folder_is_named(homes: Path, hub_python: str) -> None:
    """k1's own view of the path is another folder: what a mount namespace or a missing mount looks like."""

    @dataclass(frozen=True)
    class Elsewhere(FleetShell):
        async def start(self, job: str, command: str, *, stdin: bytes) -> bool:
            box = f"mkdir -p $HOME/own {homes}/share; mount --bind $HOME/own {homes}/share; exec {command}"
            return await super().start(job, shlex.join(["unshare", "--mount", "sh", "-c", box]), stdin=stdin)

    async def go(served: hub.Hub) -> None:
        async with kit.nodes(homes, 2) as (first, second):
            assert isinstance(second.shell, FleetShell)
            blind = replace(second, shell=Elsewhere(second.shell.fleet, second.shell.node))
            await weights.bring([first, blind], spec(homes, served, hub_python, patience=2.0), Console())

    with hub.serving(kit.shards(4, 5_000)) as served, pytest.raises(HostError, match="k1: this node does not see the shared"):
        asyncio.run(go(served))


def test_a_full_disk_is_told_and_what_was_verified_stays(homes: Path, hub_python: str) -> None:
    share = homes / "share"
    share.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", share], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with hub.serving(kit.shards(8, 80_000)) as served:
            with pytest.raises(DiskFullError, match="downloaded, but the shared folder has only"):
                bring(homes, served, hub_python, count=2)
            room = weights.ROOM
            weights.ROOM = -(1 << 60)  # without the check before, so that the disk fills up while downloading
            try:
                for home in homes.glob("home-*"):
                    shutil.rmtree(home)
                with pytest.raises(DiskFullError, match="no space left"):
                    bring(homes, served, hub_python, count=2)
            finally:
                weights.ROOM = room
            subprocess.run(["mount", "-o", "remount,size=8m", share], check=True)
            before = {path for paths in served.served.values() for path in paths}
            assert before
            assert content(bring_again(homes, served, hub_python, count=2)) == wanted(served.files)
    finally:
        subprocess.run(["umount", share], check=True)


@pytest.mark.parametrize(
    "retry_after", ["1", pytest.param("date", marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)]
)
def test_a_hub_that_is_busy_is_asked_again_when_it_says(homes: Path, hub_python: str, retry_after: str | None) -> None:
    """Every kind of question meets it: for the repository, for access, for a file's head and for its content."""
    with hub.serving(kit.shards(4, 20_000), busy=429, busy_answers=4) as served:
        served.retry_after = email.utils.formatdate(time.time() + 1, usegmt=True) if retry_after == "date" else retry_after
        outcome = bring(homes, served, hub_python, count=2)
        assert content(outcome) == wanted(served.files)
        assert served.busy_answers == 0


@pytest.mark.parametrize(("retry_after", "waits"), [("7", [7.0, 7.0]), (None, [1.0, 2.0]), ("0", [0.2, 0.2]), ("100", [])])
def test_the_wait_for_a_busy_hub_is_the_one_that_it_asks_for(
    monkeypatch: pytest.MonkeyPatch, retry_after: str | None, waits: list[float]
) -> None:
    """No question is asked before that, and none at all if it is too long to wait."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)

    def ask() -> str:
        if len(waited) < 2:
            error = OSError("429")
            error.response = SimpleNamespace(status_code=429, headers={"retry-after": retry_after})  # type: ignore[attr-defined]
            raise error
        return "the answer"

    if waits:
        assert patiently({"busy": 20.0}, ask) == "the answer"
    else:
        with pytest.raises(OSError, match="429"):
            patiently({"busy": 20.0}, ask)
    assert waited == waits


@pytest.mark.parametrize(
    ("status", "after", "words"),
    [
        (429, 0, r"HTTP 429 \(Too Many Requests\) from the Hub for org/model; it asks to wait 300 s"),
        (503, 2, r"HTTP 503 \(Service Unavailable\) from the Hub for org/model; it asks to wait 300 s"),
    ],
)
def test_a_hub_that_stays_busy_is_told_by_its_status(
    homes: Path, hub_python: str, status: int, after: int, words: str
) -> None:
    """At once, and in the middle of a download, where huggingface_hub says to check the connection."""
    with hub.serving(kit.shards(4, 20_000), busy=status, retry_after="300") as served:
        served.quiet_answers, served.busy_answers = after, 1 << 30
        with pytest.raises(FetchError, match=words) as error:
            bring(homes, served, hub_python, count=2, busy=2.0)
        assert "wait, then repeat" in error.value.remedy
        assert "connection" not in error.value.cause


def test_gated_repositories_are_explained(homes: Path, hub_python: str) -> None:
    with hub.serving(kit.shards(2, 1_000), gated=True) as served:
        with pytest.raises(FetchError, match="gated: it requires an account that accepted the licence") as without:
            bring(homes, served, hub_python, count=1)
        assert f"{served.url}/org/model" in without.value.remedy
        shutil.rmtree(homes / "home-k0")
        with pytest.raises(FetchError, match="account of this token has no access"):
            bring(homes, served, hub_python, count=1, token=TOKEN)


def test_the_token_is_in_no_argument_no_environment_and_no_file_but_the_jobs_stdin_for_a_moment(
    homes: Path, hub_python: str
) -> None:
    seen: dict[str, set[str]] = {"processes": set(), "files": set()}

    def look() -> None:
        for name in ("cmdline", "environ"):
            seen["processes"] |= {str(path) for path in Path("/proc").glob(f"[0-9]*/{name}") if TOKEN in text(path)}
        for folder in (homes, *LOCAL):
            for place, _, names in os.walk(folder):  # rglob would raise for what vanishes meanwhile
                for path in (Path(place) / name for name in names):
                    if path.is_file() and TOKEN in text(path):
                        seen["files"].add(f"{mode(path)} {path.name}")

    async def go(served: hub.Hub) -> None:
        async with kit.nodes(homes, 2) as nodes:
            running = asyncio.ensure_future(weights.bring(nodes, spec(homes, served, hub_python, token=TOKEN), Console()))
            while not running.done():
                await asyncio.to_thread(look)
                await asyncio.sleep(0.02)
            await running

    with hub.serving(kit.shards(4, 100_000), token=TOKEN, rate=200_000) as served:
        asyncio.run(go(served))
        assert served.tokens == {TOKEN}
    assert not seen["processes"]
    assert seen["files"] <= {"-rw------- input", "? input"}
    seen["files"].clear()
    look()
    assert not seen["files"]


LOCAL = (Path("/dev/shm"), Path("/run/user"))
"Where a node may keep what only lives as long as it runs."


def mode(path: Path) -> str:
    """As `ls -l` has it."""
    try:
        return stat.filemode(path.stat().st_mode)
    except OSError:
        return "?"


def text(path: Path) -> str:
    """Of a file, empty where it is gone or not to be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_verify_finds_a_file_that_rotted(homes: Path, hub_python: str) -> None:
    async def check(served: hub.Hub) -> list[str]:
        async with kit.nodes(homes, 2) as nodes:
            return await weights.verify(nodes, spec(homes, served, hub_python), hub.COMMIT)

    with hub.serving(kit.shards(3, 5_000)) as served:
        outcome = bring(homes, served, hub_python, count=1)
        rotten = Path(outcome.folder) / "model-00002-of-00003.safetensors"
        data = bytearray(rotten.read_bytes())
        data[7] ^= 1
        rotten.write_bytes(data)
        shutil.rmtree(homes / "home-k0")
        assert asyncio.run(check(served)) == ["model-00002-of-00003.safetensors"]

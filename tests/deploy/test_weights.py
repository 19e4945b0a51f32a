"""Weights: real huggingface_hub in its own environment, a Hub on loopback, nodes over SSH; and the faults."""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import itertools
import os
import random
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.fleet.shells import FleetShell, remote_nodes
from deploy.nodes import paths
from deploy.rehearsal import hub
from deploy.remote import marked
from deploy.remote.hub import patiently
from deploy.steps import assignment, processes, weights
from deploy.steps.assignment import WeightsFile
from gracefarm.console import Console
from gracefarm.errors import DigestError, DiskFullError, FetchError, GracefarmError, HostError
from tests.deploy import kit

TOKEN = "hf_" + secrets.token_hex(16)
"Another run on this machine plants another one: every process is looked at."


@pytest.fixture(scope="session")
def hub_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the locked huggingface_hub, as the download environment has it."""
    folder = tmp_path_factory.mktemp("download") / "env"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "-q", "--no-project", "--python", sys.executable, folder], check=True)
    lock = Path(weights.__file__).parent.parent / "data" / "download.lock"
    arguments = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", lock]
    subprocess.run([uv, "pip", "install", "-q", "--python", folder / "bin" / "python", *arguments], check=True)
    return str(folder / "bin" / "python")


def bring(folder: Path, served: hub.Hub, python: str, *, count: int = 3, **more: object) -> weights.Brought:
    """One `deploy weights`, with a share that all nodes have."""
    return asyncio.run(bringing(folder, served, python, count=count, **more))


async def bringing(folder: Path, served: hub.Hub, python: str, *, count: int = 3, **more: object) -> weights.Brought:
    async with kit.nodes(folder, count) as nodes:
        return await weights.bring(nodes, spec(folder, served, python, **more), Console(as_json=False))


def lower_bound(files: Sequence[WeightsFile], nodes: int) -> float:
    """Bytes that the busiest node has in any split at least.

    The mean; the largest file; and since some node has ceil(files/nodes) files, the smallest so many.
    """
    sizes = sorted(file.size for file in files)
    return max(sum(sizes) / nodes, sizes[-1] if sizes else 0, sum(sizes[: -(-len(sizes) // nodes)]))


def spec(folder: Path, served: hub.Hub, python: str, **more: object) -> weights.WeightsSpec:
    values = {"root": str(folder / "share"), "repo": "org/model", "endpoint": served.url, "python": python, "workers": 4}
    return weights.WeightsSpec(**{**values, **more})  # type: ignore[arg-type]


def content(outcome: weights.Brought) -> dict[str, bytes]:
    base = Path(outcome.folder)
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if not assignment.skipped(path, assignment.SKIP)}


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


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


def bring_again(folder: Path, served: hub.Hub, python: str, **more: object) -> weights.Brought:
    """The same command once more: new connections, the same share."""
    for home in folder.glob("home-*"):
        shutil.rmtree(home)
    return bring(folder, served, python, **more)


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
            with pytest.raises(DiskFullError, match="missing, but the shared folder has only"):
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


def test_killed_in_the_middle_the_same_command_fetches_only_the_rest(homes: Path, hub_python: str) -> None:
    """All workers die by SIGKILL once some files are through; nothing half-written is taken for a file afterwards."""

    async def cut(served: hub.Hub) -> None:
        async with kit.nodes(homes, 2) as nodes:
            running = asyncio.ensure_future(weights.bring(nodes, spec(homes, served, hub_python, workers=1), Console()))
            while sum(map(len, served.served.values())) < 4:  # noqa: ASYNC110 - another thread serves
                await asyncio.sleep(0.05)
            for pid in workers_below(homes):
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(GracefarmError):
                await running

    with hub.serving(kit.shards(10, 200_000), rate=400_000) as served:
        asyncio.run(cut(served))
        served.rate = None
        first = {path for paths in served.served.values() for path in paths}
        outcome = bring_again(homes, served, hub_python, count=2)
        assert content(outcome) == wanted(served.files)
        total = sum(map(len, served.served.values()))
        assert total < len(wanted(served.files)) + len(first)


def workers_below(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder) and b"runpy" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


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


# cut off, killed, ended


async def served_count(served: hub.Hub, count: int, seconds: float = 60) -> None:
    """Until so many files were downloaded whole."""
    deadline = time.monotonic() + seconds
    while sum(map(len, served.served.values())) < count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def each_once(served: hub.Hub) -> bool:
    """Every wanted file was downloaded whole exactly once, by whichever node."""
    return sorted(path for paths in served.served.values() for path in paths) == sorted(wanted(served.files))


def test_a_cut_of_every_connection_stops_no_download(homes: Path, hub_python: str) -> None:
    async def go(served: hub.Hub) -> weights.Brought:
        async with kit.machines(homes, 2) as made, kit.fleet(homes, made) as fleet:
            running = asyncio.ensure_future(
                weights.bring(remote_nodes(fleet), spec(homes, served, hub_python, token=TOKEN), Console())
            )
            await served_count(served, 3)
            before = [machine.entered for machine in made]
            for machine in made:
                machine.cut()
            outcome = await running
            assert all(machine.entered > count for machine, count in zip(made, before, strict=True))
            return outcome

    with hub.serving(kit.shards(10, 200_000), rate=400_000, token=TOKEN) as served:
        outcome = asyncio.run(go(served))
        assert content(outcome) == wanted(served.files)
        assert each_once(served)
    assert outcome.rounds == 1


def test_an_interrupted_commands_download_goes_on_and_the_next_one_waits_for_it(homes: Path, hub_python: str) -> None:
    """The Hub is slow until the next command has found on each node what is still at work there."""
    said: set[str] = set()
    wait = "{}: an earlier download is still running (of an earlier command); waiting for it"
    with hub.serving(kit.shards(10, 200_000), rate=100_000, token=TOKEN) as served:

        class Hears(Console):
            def step(self, _name: str, text: str) -> None:
                said.add(text)
                if {wait.format("k0"), wait.format("k1")} <= said:
                    served.rate = None

        async def interrupted() -> None:
            wish = spec(homes, served, hub_python, token=TOKEN, workers=1)
            async with kit.machines(homes, 2) as made:
                async with kit.fleet(homes, made) as fleet:
                    running = asyncio.ensure_future(weights.bring(remote_nodes(fleet), wish, Console()))
                    await served_count(served, 3)
                    served.rate = 10_000
                    running.cancel()
                    await asyncio.wait({running})
                async with kit.fleet(homes, made) as fleet:
                    outcome = await weights.bring(remote_nodes(fleet), wish, Hears())
                assert outcome.rounds == 0
                assert content(outcome) == wanted(served.files)

        asyncio.run(interrupted())
        assert each_once(served)
        assert served.rate is None


@pytest.mark.slow
def test_two_deployments_on_one_share_bring_the_same_files_once_and_apart(tmp_path: Path, hub_python: str) -> None:
    """Their nodes have the same names. What one left that died is swept a day later."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()

    async def bring(name: str, served: hub.Hub) -> weights.Brought:
        async with kit.nodes(tmp_path / name, 2) as nodes:
            return await weights.bring(nodes, spec(tmp_path, served, hub_python, owner=name), Console())

    async def go(served: hub.Hub) -> list[weights.Brought]:
        first = asyncio.ensure_future(bring("first", served))
        await served_count(served, 1)
        old, (commit,) = time.time() - 90_000, (tmp_path / "share" / "weights" / "org--model").glob("*[!g]")
        for dead in ("dead", "dying"):
            pulse = commit.with_name(f"{commit.name}.{dead}.staging") / "k0" / "pulse"
            pulse.parent.mkdir(parents=True)
            pulse.write_text("7")
            if dead == "dead":
                os.utime(pulse, (old, old))
                os.utime(pulse.parent.parent, (old, old))
        return await asyncio.gather(first, bring("second", served))

    with hub.serving(kit.shards(10, 200_000), rate=100_000) as served:
        first, second = asyncio.run(go(served))
        assert each_once(served)
        assert content(first) == content(second) == wanted(served.files)
    assert (first.rounds, second.rounds, second.fetched) == (1, 0, 0)
    left = [path.name for path in Path(first.folder).parent.iterdir() if path.name.endswith(".staging")]
    assert left == [f"{Path(first.folder).name}.dying.staging"]


def test_while_another_deployment_gives_signs_of_life_this_one_waits_and_says_so(
    homes: Path, hub_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SIGN", 1.0)
    said: list[tuple[str, int]] = []
    with hub.serving(kit.shards(3, 2_000)) as served:

        class Hears(Console):
            def step(self, name: str, text: str) -> None:
                if name == "wait":
                    said.append((text, sum(map(len, served.served.values()))))

        async def go() -> weights.Brought:
            wish = spec(homes, served, hub_python, owner="mine")
            pulse = Path(paths.weights(wish.root, wish.repo, hub.COMMIT) + ".other.staging") / "k0" / "pulse"
            pulse.parent.mkdir(parents=True)
            async with kit.nodes(homes, 1) as nodes:
                running = asyncio.ensure_future(weights.bring(nodes, wish, Hears()))
                count = 0
                while not said:
                    count += 1
                    pulse.write_text(str(count))
                    await asyncio.sleep(0.1)
                return await running  # no sign any more: that one died

        outcome = asyncio.run(go())
        assert content(outcome) == wanted(served.files)
        ((text, downloads),) = said
    name = Path(outcome.folder).name
    assert text == f"another deployment on this share downloads these files ({name}.other.staging); waiting for it"
    assert downloads == 0


def test_down_ends_downloads_at_once_and_none_that_waits_begins(homes: Path, hub_python: str) -> None:
    async def go(served: hub.Hub) -> None:
        async with kit.nodes(homes, 2) as nodes:
            running = asyncio.ensure_future(weights.bring(nodes, spec(homes, served, hub_python), Console()))
            await served_count(served, 3)
            since, count = time.monotonic(), sum(map(len, served.served.values()))
            ended = await processes.stop(nodes, kit.mark(homes), grace=30)
            assert time.monotonic() - since < 20  # told to end, not killed
            assert min(ended.values()) > 0
            with pytest.raises(HostError, match="ended without an answer"):
                await running
            await asyncio.sleep(1)
            assert sum(map(len, served.served.values())) <= count + 2 * 4  # what was on its way
            assert workers_below(homes) == []

    with hub.serving(kit.shards(60, 100_000), rate=60_000) as served:
        asyncio.run(go(served))
        served.rate = None
        outcome = bring_again(homes, served, hub_python, count=2)
        assert content(outcome) == wanted(served.files)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [True, False])
def test_a_node_that_is_lost_leaves_its_files_to_the_others(
    homes: Path, hub_python: str, dies: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dead, or cut off from the caller: then it continues by itself, and its work is not repeated."""

    async def go(served: hub.Hub) -> weights.Brought:
        async with kit.machines(homes, 3) as made, kit.fleet(homes, made, connect_timeout=0.1) as fleet:
            wish = spec(homes, served, hub_python, patience=2.0)
            running = asyncio.ensure_future(weights.bring(remote_nodes(fleet), wish, Console()))
            await served_count(served, 4)
            if dies:
                marked.stop({"prefixes": [f"{fleet.mark}/k2/"], "grace": 0})
            await made[2].switch_off()
            return await running

    with hub.serving(kit.shards(12, 200_000), rate=100_000) as served:
        outcome = asyncio.run(go(served))
        assert content(outcome) == wanted(served.files)
        assert dies or each_once(served)
    assert "k2" in (said := capsys.readouterr().err)
    assert "the other nodes download its files" in said
    assert outcome.rounds == (2 if dies else 1)


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


def test_the_deal_of_the_real_shape_is_within_five_percent_of_the_best() -> None:
    """191 files of 4.2 to 4.9 GB over 2 to 16 nodes, as Llama 3.1 405B's are."""
    source = random.Random(405)
    files = [
        WeightsFile(path=f"{n}", size=source.randrange(4_200_000_000, 4_900_000_000), sha256="0" * 64) for n in range(191)
    ]
    for count in range(2, 17):
        shares = assignment.deal(files, [f"k{n}" for n in range(count)])
        assert max(sum(file.size for file in share) for share in shares.values()) <= 1.05 * lower_bound(files, count)


@given(sizes=st.lists(st.integers(0, 100), max_size=7), count=st.integers(1, 3))
def test_no_split_at_all_is_better_than_the_bound(sizes: list[int], count: int) -> None:
    files = [WeightsFile(path=str(n), size=size, sha256="0" * 64) for n, size in enumerate(sizes)]
    splits = itertools.product(range(count), repeat=len(sizes))
    best = min(
        max(sum(size for size, node in zip(sizes, split, strict=True) if node == n) for n in range(count)) for split in splits
    )
    assert lower_bound(files, count) <= best


@given(
    sizes=st.lists(st.integers(0, 10**12), max_size=40),
    count=st.integers(1, 8),
    final=st.sets(st.integers(0, 39)),
    ready=st.dictionaries(st.integers(0, 39), st.integers(0, 9)),
)
def test_every_missing_file_is_fetched_or_verified_exactly_once_and_not_by_its_stager(
    sizes: list[int], count: int, final: set[int], ready: dict[int, int]
) -> None:
    files = [
        WeightsFile(path=f"f{n}", size=size, sha256=hashlib.sha256(b"%d" % n).hexdigest()) for n, size in enumerate(sizes)
    ]
    pinned = assignment.Manifest(repo="org/model", commit=hub.COMMIT, files=tuple(files))
    nodes = [f"k{n}" for n in range(count)]
    there = {f"f{n}": sizes[n] for n in final if n < len(sizes)}
    staged: dict[str, dict[str, int]] = {}
    for n, node in ready.items():
        if n < len(sizes):
            staged.setdefault(f"k{node}", {})[f"f{n}"] = sizes[n]
    shares = assignment.rounds(pinned, there, staged, nodes)
    verified = sorted(file.path for share in shares.values() for _, file in share.verify)
    assert verified == sorted(file.path for file in files if file.path not in there)
    fetched = [file.path for share in shares.values() for file in share.fetch]
    assert len(fetched) == len(set(fetched))
    assert not set(fetched) & {path for paths in staged.values() for path in paths}
    if count > 1:
        assert all(stager != node for node, share in shares.items() for stager, _ in share.verify)


def test_a_path_that_leaves_its_folder_is_refused() -> None:
    with pytest.raises(DigestError, match="leaves its folder"):
        assignment.manifest("org/model", hub.COMMIT, [{"path": "a/../../x", "size": 1, "sha256": "0" * 64}])
    with pytest.raises(DigestError, match="no digest"):
        assignment.manifest("org/model", hub.COMMIT, [{"path": "x", "size": 1}])

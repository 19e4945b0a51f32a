"""Weights: real huggingface_hub in an environment of its own, a Hub on loopback, nodes over SSH; and the faults."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy import weights
from deploy.rehearsal import hub
from deploy.steps import weights as step
from deploy.weights import File
from deploy.worker import Target
from gracefarm.console import Console
from gracefarm.errors import DigestError, DiskFullError, FetchError, GracefarmError, HostError
from tests.deploy import kit

TOKEN = "hf_" + "planted" * 5


@pytest.fixture(scope="session")
def hub_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the locked huggingface_hub, as the download environment has it."""
    folder = tmp_path_factory.mktemp("download") / "env"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "-q", "--no-project", "--python", sys.executable, folder], check=True)
    lock = Path(step.__file__).parent.parent / "data" / "download.lock"
    arguments = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", lock]
    subprocess.run([uv, "pip", "install", "-q", "--python", folder / "bin" / "python", *arguments], check=True)
    return str(folder / "bin" / "python")


def bring(folder: Path, served: hub.Hub, python: str, *, count: int = 3, **more: object) -> step.Outcome:
    """One `deploy weights`, with a share that all nodes have."""
    return asyncio.run(bringing(folder, served, python, count=count, **more))


async def bringing(folder: Path, served: hub.Hub, python: str, *, count: int = 3, **more: object) -> step.Outcome:
    async with kit.nodes(folder, count) as targets:
        return await step.up(targets, spec(folder, served, python, **more), Console(as_json=False))


def spec(folder: Path, served: hub.Hub, python: str, **more: object) -> step.Spec:
    values = {"root": str(folder / "share"), "repo": "org/model", "endpoint": served.url, "python": python, "workers": 4}
    return step.Spec(**{**values, **more})  # type: ignore[arg-type]


def content(outcome: step.Outcome) -> dict[str, bytes]:
    base = Path(outcome.folder)
    return {str(one.relative_to(base)): one.read_bytes() for one in base.rglob("*") if one.is_file()}


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if not weights.skipped(path, weights.SKIP)}


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_every_file_comes_once_and_is_verified_by_another_node(homes: Path, hub_python: str) -> None:
    with hub.serving(hub.shards(12, 30_000)) as served:
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


def bring_again(folder: Path, served: hub.Hub, python: str, **more: object) -> step.Outcome:
    """The same command once more: new connections, the same share."""
    for home in folder.glob("home-*"):
        shutil.rmtree(home)
    return bring(folder, served, python, **more)


def test_a_corrupted_shard_is_caught_by_the_other_node_and_fetched_again(homes: Path, hub_python: str) -> None:
    bad = "model-00002-of-00006.safetensors"
    with hub.serving(hub.shards(6, 20_000), corrupt={bad: 1}) as served:
        outcome = bring(homes, served, hub_python)
        assert content(outcome) == wanted(served.files)
        assert sum(paths.count(bad) for paths in served.served.values()) == 2
        assert outcome.rounds == 2


def test_a_shard_that_is_always_wrong_never_gets_into_the_folder(homes: Path, hub_python: str) -> None:
    bad = "model-00001-of-00003.safetensors"
    with hub.serving(hub.shards(3, 5_000), corrupt={bad: 99}) as served:
        with pytest.raises(DigestError, match=bad):
            bring(homes, served, hub_python, count=2)
        assert not list((homes / "share").rglob(f"{hub.COMMIT}/{bad}"))


def test_a_node_without_the_shared_folder_is_named(homes: Path, hub_python: str) -> None:
    """k1's own view of the path is another folder: what a mount namespace or a missing mount looks like."""

    class Elsewhere:
        def __init__(self, inner: kit.Connection) -> None:
            self.inner = inner

        async def stream(self, command: str, **more: object) -> object:
            box = f"mkdir -p $HOME/own {homes}/share; mount --bind $HOME/own {homes}/share; exec {command}"
            return await self.inner.stream(
                f"unshare --mount sh -c '{box.replace(chr(39), chr(39) + chr(92) + chr(39) * 2)}'", **more
            )  # type: ignore[arg-type]

    async def go(served: hub.Hub) -> None:
        async with kit.nodes(homes, 2) as (first, second):
            blind = Target(name="k1", address=second.address, gpus=1, shell=Elsewhere(second.shell))  # type: ignore[arg-type]
            await step.up([first, blind], spec(homes, served, hub_python), Console())

    with hub.serving(hub.shards(4, 5_000)) as served, pytest.raises(HostError, match="k1: this node does not see the shared"):
        asyncio.run(go(served))


def test_a_full_disk_is_told_and_what_was_verified_stays(homes: Path, hub_python: str) -> None:
    share = homes / "share"
    share.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", share], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with hub.serving(hub.shards(8, 80_000)) as served:
            with pytest.raises(DiskFullError, match="missing, and the shared folder has"):
                bring(homes, served, hub_python, count=2)
            room = step.ROOM
            step.ROOM = -(1 << 60)  # without the check before, so that the disk fills up while downloading
            try:
                for home in homes.glob("home-*"):
                    shutil.rmtree(home)
                with pytest.raises(DiskFullError, match="no space left"):
                    bring(homes, served, hub_python, count=2)
            finally:
                step.ROOM = room
            subprocess.run(["mount", "-o", "remount,size=8m", share], check=True)
            before = {path for paths in served.served.values() for path in paths}
            assert before
            assert content(bring_again(homes, served, hub_python, count=2)) == wanted(served.files)
    finally:
        subprocess.run(["umount", share], check=True)


def test_killed_in_the_middle_the_same_command_fetches_only_the_rest(homes: Path, hub_python: str) -> None:
    """All workers die by SIGKILL once some files are through; nothing half-written is taken for a file afterwards."""

    async def cut(served: hub.Hub) -> None:
        async with kit.nodes(homes, 2) as targets:
            running = asyncio.ensure_future(step.up(targets, spec(homes, served, hub_python, workers=1), Console()))
            while sum(map(len, served.served.values())) < 4:  # noqa: ASYNC110 - another thread serves
                await asyncio.sleep(0.05)
            for pid in workers_below(homes):
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(GracefarmError):
                await running

    with hub.serving(hub.shards(10, 200_000), rate=400_000) as served:
        asyncio.run(cut(served))
        served.rate = None
        first = {path for paths in served.served.values() for path in paths}
        outcome = bring_again(homes, served, hub_python, count=2)
        assert content(outcome) == wanted(served.files)
        total = sum(map(len, served.served.values()))
        assert total < len(wanted(served.files)) + len(first)


def workers_below(folder: Path) -> list[int]:
    found = []
    for one in Path("/proc").glob("[0-9]*"):
        try:
            if (one / "cwd").readlink().is_relative_to(folder) and b"runpy" in (one / "cmdline").read_bytes():
                found.append(int(one.name))
        except OSError:
            continue
    return found


def test_gated_repositories_are_explained(homes: Path, hub_python: str) -> None:
    with hub.serving(hub.shards(2, 1_000), gated=True) as served:
        with pytest.raises(FetchError, match="gated: its owner wants") as without:
            bring(homes, served, hub_python, count=1)
        assert f"{served.url}/org/model" in without.value.remedy
        shutil.rmtree(homes / "home-k0")
        with pytest.raises(FetchError, match="account of this token has no access"):
            bring(homes, served, hub_python, count=1, token=TOKEN)


def test_the_token_is_in_no_argument_and_no_file_but_one_of_0600(  # noqa: C901
    homes: Path, hub_python: str
) -> None:
    seen: dict[str, list[str]] = {"arguments": [], "files": []}

    async def go(served: hub.Hub) -> None:
        async with kit.nodes(homes, 2) as targets:
            running = asyncio.ensure_future(step.up(targets, spec(homes, served, hub_python, token=TOKEN), Console()))
            while not running.done():
                for one in Path("/proc").glob("[0-9]*/cmdline"):  # noqa: ASYNC240
                    try:
                        if TOKEN.encode() in one.read_bytes():
                            seen["arguments"].append(str(one))
                    except OSError:
                        continue
                for path in Path("/dev/shm").glob(f"gracefarm-{os.getuid()}-hf-k*"):  # noqa: ASYNC240
                    try:
                        if path.read_text() == TOKEN:
                            seen["files"].append(stat.filemode(path.stat().st_mode))
                    except OSError:
                        continue
                await asyncio.sleep(0.02)
            await running
            assert not any(TOKEN in command for one in targets for command in one.shell.commands)  # type: ignore[attr-defined]

    with hub.serving(hub.shards(4, 100_000), token=TOKEN, rate=400_000) as served:
        asyncio.run(go(served))
        assert served.tokens == {TOKEN}
    assert not seen["arguments"]
    if os.environ.get("XDG_RUNTIME_DIR") is None and not os.access(f"/run/user/{os.getuid()}", os.W_OK):
        assert set(seen["files"]) == {"-rw-------"}
        assert not list(Path("/dev/shm").glob(f"gracefarm-{os.getuid()}-hf-k*"))
    for path in homes.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_verify_finds_a_file_that_rotted(homes: Path, hub_python: str) -> None:
    async def check(served: hub.Hub) -> list[str]:
        async with kit.nodes(homes, 2) as targets:
            return await step.verify(targets, spec(homes, served, hub_python), hub.COMMIT)

    with hub.serving(hub.shards(3, 5_000)) as served:
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
    files = [File(path=f"{n}", size=source.randrange(4_200_000_000, 4_900_000_000), sha256="0" * 64) for n in range(191)]
    for count in range(2, 17):
        shares = weights.deal(files, [f"k{n}" for n in range(count)])
        assert max(sum(one.size for one in share) for share in shares.values()) <= 1.05 * _best(files, count)


def _best(files: list[File], count: int) -> float:
    """No split is better than the mean, nor than the smallest files that some node must have ceil(191/count) of."""
    least = sorted(one.size for one in files)[: -(-len(files) // count)]
    return max(weights.lower_bound(files, count), sum(least))


@given(
    sizes=st.lists(st.integers(0, 10**12), max_size=40),
    count=st.integers(1, 8),
    final=st.sets(st.integers(0, 39)),
    ready=st.dictionaries(st.integers(0, 39), st.integers(0, 9)),
)
def test_every_missing_file_is_fetched_or_verified_exactly_once_and_not_by_its_stager(
    sizes: list[int], count: int, final: set[int], ready: dict[int, int]
) -> None:
    files = [File(path=f"f{n}", size=size, sha256=hashlib.sha256(b"%d" % n).hexdigest()) for n, size in enumerate(sizes)]
    pinned = weights.Manifest(repo="org/model", commit=hub.COMMIT, files=tuple(files))
    nodes = [f"k{n}" for n in range(count)]
    there = {f"f{n}": sizes[n] for n in final if n < len(sizes)}
    staged: dict[str, dict[str, int]] = {}
    for n, node in ready.items():
        if n < len(sizes):
            staged.setdefault(f"k{node}", {})[f"f{n}"] = sizes[n]
    shares = weights.rounds(pinned, there, staged, nodes)
    verified = sorted(file.path for one in shares.values() for _, file in one.verify)
    assert verified == sorted(file.path for file in files if file.path not in there)
    fetched = [file.path for one in shares.values() for file in one.fetch]
    assert len(fetched) == len(set(fetched))
    assert not set(fetched) & {path for found in staged.values() for path in found}
    if count > 1:
        assert all(stager != node for node, one in shares.items() for stager, _ in one.verify)


def test_a_path_that_leaves_its_folder_is_refused() -> None:
    with pytest.raises(DigestError, match="leaves its folder"):
        weights.manifest("org/model", hub.COMMIT, [{"path": "a/../../x", "size": 1, "sha256": "0" * 64}])
    with pytest.raises(DigestError, match="no digest"):
        weights.manifest("org/model", hub.COMMIT, [{"path": "x", "size": 1}])

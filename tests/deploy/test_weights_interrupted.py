"""Downloads of weights that are cut off, killed, ended or shared with another deployment."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from deploy.fleet.shells import remote_nodes
from deploy.nodes import paths
from deploy.rehearsal import hub
from deploy.remote import marked
from deploy.steps import processes, weights
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, HostError
from tests.deploy import kit
from tests.deploy.weights_kit import (
    TOKEN,
    bring_again,
    content,
    each_once,
    homes,
    hub_python,
    served_count,
    spec,
    wanted,
    workers_below,
)

__all__ = ["homes", "hub_python"]


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
    assert "the other nodes download the files of this node" in said
    assert outcome.rounds == (2 if dies else 1)

"""Preflight's rules: each red cell has one test that makes it red, with its remedy; and the step over real nodes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy.fleet.calls import RemoteNode
from deploy.nodes.deployment import Deployment, load_deployment
from deploy.nodes.facts import NodeFacts
from deploy.planning import commands, hardware, suppose
from deploy.remote import exchange
from deploy.remote.preflight import clean
from deploy.steps import preflight
from deploy.steps.preflight_checks import GIB, Expected, NodeCheck, Pairs, Survey, judge, open_door
from gracefarm.errors import PreflightError
from tests.deploy import kit

Json = dict[str, Any]
PYTHON = {"version": "3.11.9", "implementation": "cpython", "platform": "linux-aarch64"}
GPU = {"name": "NVIDIA GH200 480GB", "free": 95 * GIB, "total": 96 * GIB}
ENVIRONMENT = {
    "id": "e1",
    "interpreter": "/usr/bin/python3.11",
    "alignment": 65536,
    "glibcxx": "3.4.29",
    "python": PYTHON,
    "ray": "2.60.0",
}
NODES = ("k0", "k1", "k2")


def limits(**changes: list[int]) -> Json:
    return {"nofile": [1024, 1048576], "memlock": [-1, -1], "nproc": [-1, -1], **changes}


def survey(**changes: object) -> Json:
    good: Json = {
        "hostname": "node",
        "resolves": ["10.0.0.1"],
        "share": {"kind": "nfs4", "source": "10.1.1.1:/v", "network": True, "free": 900 * GIB},
        "disk": {"path": "/tmp", "total": 900 * GIB, "free": 90 * GIB},
        "python": PYTHON,
        "environment": ENVIRONMENT,
        "page": 65536,
        "glibcxx": "3.4.30",
        "shm": {"total": 200 * GIB, "free": 190 * GIB},
        "limits": limits(),
        "cuda": {"version": 12040, "gpus": [GPU]},
    }
    return {**good, **changes}


def pairs(me: str, **changes: object) -> Json:
    port = {"rtt": 0.0002, "offset": 0.001}
    reached = {node: {"ports": {"6379": {"rtt": 0.0002}}, **port} for node in NODES if node != me}
    return {"taken": {}, "reached": reached, "nonces": {node: f"nonce-{node}" for node in NODES}, **changes}


def judged(
    surveys: Mapping[str, Json] | None = None, found: Mapping[str, Json] | None = None, **expected: object
) -> dict[tuple[str, str], NodeCheck]:
    values: Json = {
        "addresses": {node: f"10.0.0.{index}" for index, node in enumerate(NODES)},
        "share": "/share",
        "gpus": dict.fromkeys(NODES, 1),
        "nonces": {node: f"nonce-{node}" for node in NODES},
    }
    cells = judge(
        {node: Survey.model_validate((surveys or {}).get(node, survey())) for node in NODES},
        {node: Pairs.model_validate((found or {}).get(node, pairs(node))) for node in NODES},
        Expected(**{**values, **expected}),
    )
    return {(cell.check, cell.node): cell for cell in cells}


def test_good_nodes_have_no_red_cell_and_no_yellow_one() -> None:
    cells = judged()
    assert {cell.status for cell in cells.values()} == {"ok"}
    assert {check for check, _ in cells} == set(preflight.ORDER) - {"reach", "tunnel", "gloo", "nccl"}


@pytest.mark.parametrize(
    ("check", "change", "status", "word"),
    [
        ("names", {"resolves": ["127.0.1.1"]}, "bad", "resolves to 127.0.1.1"),
        ("names", {"resolves": ["::1", "10.0.0.1"]}, "bad", "resolves to ::1"),
        ("names", {"resolves": []}, "warn", "does not resolve"),
        ("share", {"share": {"error": "/share is not a folder on this node"}}, "bad", "not a folder"),
        ("share", {"share": {"error": "/share cannot be written: read-only file system"}}, "bad", "read-only"),
        ("disk", {"disk": {"path": "/tmp", "error": "No space left on device"}}, "bad", "no space left on /tmp"),
        ("disk", {"disk": {"path": "/tmp", "error": "Read-only file system"}}, "bad", "/tmp: Read-only file system"),
        ("disk", {"disk": {"path": "/tmp", "total": 9 * GIB, "free": GIB}}, "warn", "1.0 GiB free on /tmp"),
        ("python", {"environment": {**ENVIRONMENT, "python": {**PYTHON, "version": "3.11.2"}}}, "bad", "3.11.2"),
        ("cuda", {"cuda": {"absent": True}}, "bad", "libcuda"),
        ("cuda", {"cuda": {"error": "cuInit: system not yet initialized (802)"}}, "bad", "802"),
        ("cuda", {"cuda": {"version": 12040, "gpus": []}}, "bad", "0 GPUs instead of 1"),
        ("memory", {"cuda": {"version": 12040, "gpus": [{**GPU, "free": 60 * GIB}]}}, "bad", "60.0 of 96.0 GiB"),
        ("pages", {"environment": {**ENVIRONMENT, "alignment": 4096}}, "bad", "aligned to 4 KiB"),
        ("libstdc++", {"glibcxx": "3.4.28"}, "bad", "requires GLIBCXX_3.4.29"),
        ("libstdc++", {"glibcxx": None}, "bad", "libstdc++.so.6 is missing"),
        ("shm", {"shm": None}, "bad", "no /dev/shm"),
        ("shm", {"shm": {"total": 64 << 20, "free": 64 << 20}}, "bad", "0.1 GiB free"),
        ("shm", {"shm": {"total": 8 * GIB, "free": 1 * GIB}}, "bad", "1.0 GiB free"),
        ("shm", {"shm": {"total": 2 * GIB, "free": 2 * GIB}}, "warn", "2.0 GiB free"),
        ("limits", {"limits": limits(nofile=[1024, 4096])}, "warn", "nofile 4096"),
        ("limits", {"limits": limits(nofile=[512, 1024])}, "bad", "nofile 1024"),
        ("limits", {"limits": limits(nproc=[500, 500])}, "bad", "nproc 500"),
        ("limits", {"limits": limits(nproc=[4096, 4096])}, "warn", "nproc 4096"),
        ("limits", {"limits": limits(memlock=[65536, 65536])}, "warn", "memlock 65536"),
        ("limits", {"limits": limits(memlock=[65536, 65536], nproc=[500, 500])}, "bad", "nproc 500"),
        ("token", {"environment": {**ENVIRONMENT, "ray": "2.41.0"}}, "warn", "Ray 2.41.0 has no token"),
    ],
)
def test_a_node_that_differs_is_the_one_that_is_told(check: str, change: Json, status: str, word: str) -> None:
    cells = judged({"k1": survey(**change)})
    cell = cells[check, "k1"]
    assert cell.status == status
    assert word in cell.text
    assert cell.remedy
    assert cells[check, "k0"].status == "ok"


@pytest.mark.parametrize(
    ("cuda", "word"),
    [
        ({"absent": True}, "no NVIDIA driver"),
        ({"error": "cuInit: system not yet initialized (802)"}, "802"),
        ({"version": 12040, "gpus": [GPU]}, "but the stored facts have no GPU of this node"),
    ],
)
def test_a_node_that_had_no_gpu_when_facts_were_asked_is_told_and_stops_nobody(cuda: Json, word: str) -> None:
    cell = judged({"k1": survey(cuda=cuda)}, gpus={**dict.fromkeys(NODES, 1), "k1": 0})["cuda", "k1"]
    assert cell.status == "warn"
    assert word in cell.text
    assert "the plan does not use this node" in cell.text
    assert "`deploy facts`" in cell.remedy


@pytest.mark.parametrize("environment", [None, ENVIRONMENT])
def test_the_nodes_own_pythons_do_not_matter_where_the_environment_brings_one(environment: Json | None) -> None:
    other = {**PYTHON, "version": "3.12.3"}
    there = environment and {**environment, "python": {"error": "no such file"}}
    nodes = {node: survey(environment=environment) for node in NODES} | {"k1": survey(environment=there, python=other)}
    assert judged(nodes)["python", "k1"].status == "bad"
    cell = judged(nodes, python="managed")["python", "k1"]
    assert cell.status == "ok"
    assert "the environment will have its own Python (managed)" in cell.text


def test_a_managed_python_that_a_node_does_not_see_is_told() -> None:
    own = {**ENVIRONMENT, "interpreter": "/share/gracefarm/python/managed-3.11.18-aarch64/cpython-3.11/bin/python3.11"}
    lost = {**own, "python": {"error": "no such file"}}
    nodes = {node: survey(environment=own) for node in NODES} | {"k1": survey(environment=lost)}
    cells = judged(nodes, python="managed")
    assert (cells["python", "k0"].status, cells["python", "k1"].status) == ("ok", "bad")
    assert "the shared folder, which contains /share/gracefarm/" in cells["python", "k1"].remedy


@pytest.mark.parametrize(
    ("check", "change", "word"),
    [
        ("ports", {"taken": {"6379": "redis-server *:6379 (process 7)"}}, "port 6379 is used by redis-server"),
        (
            "ports",
            {"reached": {"k0": {"ports": {"6379": {"rtt": 0.1}, "8076": {"error": "timed out"}}, "rtt": 0.1, "offset": 0.0}}},
            "cannot connect to k0:8076",
        ),
        (
            "route",
            {"reached": {"k0": {"ports": {"6379": {"error": "no route to host"}}, "rtt": None, "offset": None}}},
            "cannot reach k0 (10.0.0.0): no route to host",
        ),
        (
            "route",
            {
                "mtu": 9000,
                "reached": {
                    "k0": {"ports": {"6379": {"rtt": 0.1}}, "rtt": 0.1, "offset": 0.0, "bulk": {"stalled": "to"}},
                    "k2": {"ports": {"6379": {"rtt": 0.1}}, "rtt": 0.1, "offset": 0.0, "bulk": {}},
                },
            },
            "64 KiB to k0 (10.0.0.0) do not arrive, but small packets arrive; the interface of this node has mtu 9000",
        ),
        ("share", {"nonces": {"k1": "nonce-k1"}}, "is not shared on this node"),
        ("share", {"nonces": {"k0": "nonce-k0", "k1": "nonce-k1"}}, "files of k2 are missing"),
    ],
)
def test_a_pair_that_does_not_meet_is_told_with_both_its_ends(check: str, change: Json, word: str) -> None:
    cell = judged(found={"k1": pairs("k1", **change)})[check, "k1"]
    assert cell.status == "bad"
    assert word in cell.text
    assert cell.remedy


def test_a_share_that_one_node_cannot_write_is_no_fault_of_the_others() -> None:
    """Its nonce is missing everywhere: the first node of the list was blamed."""
    broken = survey(share={"error": "/share cannot be written: read-only file system"})
    without = {node: pairs(node, nonces={other: f"nonce-{other}" for other in NODES if other != "k1"}) for node in NODES}
    cells = judged({"k1": broken}, without)
    assert [cell.node for cell in cells.values() if cell.status == "bad"] == ["k1"]
    with pytest.raises(PreflightError, match=r"^k1: share: /share cannot be written: read-only file system$"):
        preflight.require(list(cells.values()))


def test_the_clock_that_is_wrong_is_told_and_not_those_who_notice() -> None:
    def seen(me: str) -> Json:
        base = pairs(me)
        for peer, answer in base["reached"].items():
            answer["offset"] = 30.0 if peer == "k2" else -30.0 if me == "k2" else 0.0
        return base

    cells = judged(found={node: seen(node) for node in NODES})
    assert cells["clock", "k2"].status == "bad"
    assert "30.0 s" in cells["clock", "k2"].text
    assert cells["clock", "k0"].status == cells["clock", "k1"].status == "ok"


def test_a_port_that_a_cluster_of_ours_holds_is_no_foreign_one() -> None:
    taken = {"6379": "/share/gracefarm/t/envs/e1/lib/gcs_server (process 7)"}
    assert judged(found={"k1": pairs("k1", taken=taken)}, ours=("/share/gracefarm/",))["ports", "k1"].status == "ok"
    assert judged(found={"k1": pairs("k1", taken=taken)})["ports", "k1"].status == "bad"


def test_a_rehearsal_declares_its_gpus() -> None:
    cells = judged({"k1": survey(cuda={"absent": True})}, rehearsal=True)
    assert cells["cuda", "k1"].status == "skipped"


def test_locked_memory_counts_only_where_nccl_is() -> None:
    bare = survey(limits=limits(memlock=[65536, 65536]), cuda={"absent": True})
    assert judged({"k1": bare}, rehearsal=True)["limits", "k1"].status == "ok"


def test_every_port_of_rays_is_asked_and_the_ends_and_the_middle_of_its_workers(tmp_path: Path) -> None:
    (tmp_path / "deploy.toml").write_text('share = "/s"\n[[node]]\naddress = "10.0.0.1"\n')
    deployment = load_deployment(tmp_path / "deploy.toml")
    spec = preflight.spec_of(deployment, {})
    ports = deployment.data.ports.model_dump()
    (argv,) = (commands.ray_command(deployment, node, deployment.head, 1, node) for node in [suppose_node(deployment)])
    told = {int(argv[index + 1]) for index, word in enumerate(argv) if word.endswith("-port") or word == "--port"}
    assert told - {ports["dashboard"]} <= set(spec.ports)
    assert 20499 in spec.ports
    assert spec.loopback == {"k0": (ports["dashboard"],)}
    assert {ports["store"], ports["engine_store"]} <= set(spec.ports)


@pytest.mark.parametrize(
    "process",
    [
        {"name": "raylet", "mark": "gracefarm/t/k1/ray", "plan": "p"},
        {"name": "vllm", "mark": "gracefarm/t/k1/engine", "plan": "p"},
    ],
)
def test_the_memory_that_our_own_engine_uses_is_not_judged(process: dict[str, str]) -> None:
    cells = [
        NodeCheck(check=check, node="k0", status="bad", text="used", remedy="stop it") for check in ("memory", "nccl", "shm")
    ]
    idle = {"k0": {"processes": []}, "k1": {"processes": [{"name": "sh", "mark": "gracefarm/t/k1/download", "plan": ""}]}}
    assert preflight.without_ours(cells, idle) == cells
    running = preflight.without_ours(cells, {**idle, "k1": {"processes": [process]}})
    assert [(cell.check, cell.status, cell.remedy) for cell in running] == [
        ("memory", "skipped", ""),
        ("nccl", "skipped", ""),
        ("shm", "bad", "stop it"),
    ]


def suppose_node(deployment: Deployment) -> NodeFacts:
    deployment.folder.make()
    return suppose.suppose(hardware.named("gh200-96"), 1, deployment)[1].node("k0")


def test_nonces_of_a_run_that_was_killed_are_swept_a_day_later_and_those_of_one_at_work_are_not(tmp_path: Path) -> None:
    folder = tmp_path / ".gracefarm" / "preflight"
    for name in ("mine", "killed", "at-work"):
        (folder / name).mkdir(parents=True)
        (folder / name / "k0").write_text("nonce")
    (folder / "killed" / "k1").write_text("nonce")
    before = time.time() - 90_000
    os.utime(folder / "killed", (before, before))
    clean({"share": str(tmp_path), "run": "mine"})
    assert [path.name for path in folder.iterdir()] == ["at-work"]
    assert (folder / "at-work" / "k0").read_text() == "nonce"


def test_a_port_of_the_loopback_is_seen_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dashboard:
        port = int(dashboard.getsockname()[1])

        async def go() -> list[NodeCheck]:
            async with kit.nodes(tmp_path, 1) as targets:
                spec = preflight.PreflightSpec(
                    share=None, root=None, ports=[], collective_port=1, rehearsal=True, loopback={"k0": [port]}, seconds=1
                )
                return await preflight.run(targets, spec)

        cells = {cell.check: cell for cell in asyncio.run(go())}
    assert cells["ports"].status == "bad"
    assert f"port {port} is used by" in cells["ports"].text


def test_the_first_red_cell_is_the_error_and_the_others_are_counted() -> None:
    cells = [
        NodeCheck(check="names", node="k0", status="ok", text="fine"),
        NodeCheck(check="share", node="k1", status="bad", text="not there", remedy="mount it"),
        NodeCheck(check="cuda", node="k2", status="bad", text="broken", remedy="reboot"),
    ]
    with pytest.raises(PreflightError, match="k1: share: not there; 1 more failed") as error:
        preflight.require(cells)
    assert error.value.remedy == "mount it"
    preflight.require(cells[:1])


def test_real_nodes_are_asked_and_pairs_meet(tmp_path: Path) -> None:
    """Three nodes of this machine: they share a folder and reach each other; the error names a port that is in use."""
    share = tmp_path / "share"
    share.mkdir()
    with socket.create_server(("127.0.0.12", 0)) as other, socket.create_server(("127.0.0.11", 0)) as probe:
        taken, port = int(other.getsockname()[1]), int(probe.getsockname()[1])
        probe.close()

        async def go() -> list[NodeCheck]:
            async with kit.nodes(tmp_path, 3) as targets:
                spec = preflight.PreflightSpec(
                    share=str(share), root=None, ports=[port, taken], collective_port=port + 1, rehearsal=True, seconds=6
                )
                return await preflight.run(targets, spec)

        cells = {(cell.check, cell.node): cell for cell in asyncio.run(go())}
    assert cells["share", "k2"].status == "ok"
    assert cells["route", "k0"].status == "ok"
    assert cells["ports", "k1"].status == "bad"
    assert f"port {taken} is used by" in cells["ports", "k1"].text
    assert cells["ports", "k0"].status == "ok"
    assert not list((share / ".gracefarm" / "preflight").iterdir())


@pytest.mark.parametrize("lost", ["to", "from"])
def test_a_peer_whose_full_packets_do_not_arrive_is_told_by_its_direction(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """A network that drops full packets: the receiver never gets them."""
    monkeypatch.setattr(exchange, "SECONDS", 0.3)

    def peer() -> None:
        connection, _ = server.accept()
        with connection:
            assert connection.recv(100) == b"gracefarm k0 bulk\n"
            connection.sendall(b"go\n")
            if lost == "from":
                left = exchange.SIZE
                while left:
                    left -= len(connection.recv(left))
                connection.sendall(b"ok\n and a first small packet")
            over.wait(5)

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=peer)
        thread.start()
        try:
            assert exchange.ask("k0", "127.0.0.1", server.getsockname()[1]) == {"stalled": lost}
        finally:
            over.set()
            thread.join()


def test_a_node_that_does_not_answer_is_one_red_cell_and_the_others_are_judged(tmp_path: Path) -> None:
    class Dead:
        async def stream(self, *_words: object, **_more: object) -> object:
            raise PreflightError("k1: cannot be reached", remedy="is it up?")

    async def go() -> list[NodeCheck]:
        async with kit.nodes(tmp_path, 1) as targets:
            dead = RemoteNode(name="k1", address="127.0.0.12", gpus=1, shell=Dead())  # type: ignore[arg-type]
            with socket.create_server(("127.0.0.11", 0)) as probe:
                port = int(probe.getsockname()[1])
            spec = preflight.PreflightSpec(
                share=None, root=None, ports=[port], collective_port=port + 1, rehearsal=True, seconds=2
            )
            return await preflight.run([*targets, dead], spec)

    cells = asyncio.run(go())
    assert [(cell.node, cell.text, cell.remedy) for cell in cells if cell.check == "reach"] == [
        ("k1", "cannot be reached", "is it up?")
    ]
    assert any(cell.node == "k0" and cell.check == "shm" for cell in cells)


@pytest.mark.parametrize(("version", "without"), [("2.41.0", True), ("2.51.2", True), ("2.52.0", False), ("3.0.0rc1", False)])
def test_rays_before_2_52_know_no_token(version: str, without: bool) -> None:
    cell = judged({"k1": survey(environment={**ENVIRONMENT, "ray": version})}, open={"k1": "192.0.2.7:6379"})["token", "k1"]
    assert (cell.status == "warn") is without
    assert ("this machine reached 192.0.2.7:6379" in cell.text) is without


def test_a_port_of_rays_that_is_open_to_this_machine_is_told_and_one_that_is_in_use_is_not_asked(tmp_path: Path) -> None:
    made = tmp_path / "root" / "env" / "lib" / "python3.11" / "site-packages" / "ray-2.41.0.dist-info"
    made.mkdir(parents=True)
    described = {key: value for key, value in ENVIRONMENT.items() if key not in ("python", "ray")}
    (tmp_path / "root" / "env" / "environment.json").write_text(json.dumps(described))
    with socket.create_server(("127.0.0.11", 0)) as used, socket.create_server(("127.0.0.11", 0)) as probe:
        held, port = (int(bound.getsockname()[1]) for bound in (used, probe))
        probe.close()

        async def go() -> list[NodeCheck]:
            async with kit.nodes(tmp_path, 1) as (node,):
                return [
                    next(cell for cell in await preflight.run([node], spec) if cell.check == "token")
                    for spec in (
                        preflight.PreflightSpec(
                            share=None,
                            root=str(tmp_path / "root"),
                            ports=[],
                            collective_port=port,
                            rehearsal=True,
                            public=public,
                            ray_ports=ports,
                        )
                        for public, ports in (
                            ({"k0": "127.0.0.11"}, [held, port]),
                            ({"k0": "127.0.0.11"}, [held]),
                            ({}, [port]),
                        )
                    )
                ]

        reached, in_use, private = asyncio.run(go())
    assert {cell.status for cell in (reached, in_use, private)} == {"warn"}
    assert reached.text == f"{open_door('2.41.0')}; this machine reached 127.0.0.11:{port} over a public address"
    assert in_use.text == private.text == open_door("2.41.0")
    assert "only ssh" in reached.remedy


def test_whatever_takes_a_connection_and_is_not_the_node_proves_nothing() -> None:
    async def go() -> int | None:
        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b"HTTP/1.1 400 Bad Request, says a proxy\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(other, "127.0.0.11", 0) as server:
            return await preflight.knock("127.0.0.11", server.sockets[0].getsockname()[1], "ab" * 16)

    assert asyncio.run(go()) is None


def test_only_an_address_of_the_internet_that_ssh_reaches_directly_is_public(tmp_path: Path) -> None:
    rows = [("8.8.8.8", ""), ("10.0.0.1", ""), ("8.8.4.4", 'jump = "gate"'), ("2001:4860:4860::8888", ""), ("localhost", "")]
    text = "".join(f'[[node]]\naddress = "{address}"\n{more}\n' for address, more in rows)
    (tmp_path / "deploy.toml").write_text(text)
    assert preflight.public(load_deployment(tmp_path / "deploy.toml")) == {"k0": "8.8.8.8", "k3": "2001:4860:4860::8888"}


def test_nccl_is_tried_among_the_nodes_that_have_gpus_whoever_else_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: dict[str, list[str]] = {}

    async def collective(targets: list[RemoteNode], _spec: preflight.PreflightSpec, backend: str) -> list[NodeCheck]:
        tried[backend] = [target.name for target in targets]
        return [NodeCheck(check=backend, node=target.name, status="ok", text="", remedy="") for target in targets]

    monkeypatch.setattr(preflight, "all_reduce", collective)
    nodes = [RemoteNode(name=name, address="", gpus=1, shell=None) for name in NODES]  # type: ignore[arg-type]
    spec = preflight.PreflightSpec(share=None, root=None, ports=[], collective_port=1)

    def cells(without: set[str]) -> dict[tuple[str, str], NodeCheck]:
        surveys = {
            name: Survey.model_validate(survey(**({"cuda": {"absent": True}} if name in without else {}))) for name in NODES
        }
        return {(cell.check, cell.node): cell for cell in asyncio.run(preflight.collectives(nodes, spec, surveys))}

    made = cells({"k1"})
    assert tried == {"gloo": list(NODES), "nccl": [name for name in NODES if name != "k1"]}
    assert made["nccl", "k1"].text == "no usable GPU on this node"
    tried.clear()
    made = cells(set(NODES[1:]))
    assert list(tried) == ["gloo"]
    assert {made["nccl", name].text for name in NODES} == {"fewer than two nodes have a usable GPU"}

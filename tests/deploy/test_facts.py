"""Facts of nodes: asked over SSH, the private address chosen by rule, kept whole."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from deploy.fleet.probe import private_address, probe_nodes
from deploy.nodes.deployment import Deployment, Node, load_deployment
from deploy.nodes.facts import Facts, Gpu, NodeFacts, differences, keep_facts, load_facts
from deploy.remote import driver, facts
from gracefarm.errors import ConfigError, NodeError
from tests.deploy import kit

INTERFACES = [
    {"name": "lo", "addresses": [{"address": "127.0.0.1", "prefix": 8}, {"address": "::1", "prefix": 128}]},
    {"name": "docker0", "addresses": [{"address": "172.17.0.1", "prefix": 16}]},
    {"name": "eth0", "addresses": [{"address": "203.0.114.9", "prefix": 24}, {"address": "fd00::9", "prefix": 64}]},
    {"name": "eth1", "addresses": [{"address": "192.168.7.9", "prefix": 24}]},
    {"name": "ib0", "addresses": [{"address": "10.9.0.9", "prefix": 16}]},
]


def said(**more: object) -> dict[str, object]:
    return {"interfaces": INTERFACES, "ssh_address": "", "route_address": "203.0.114.9", **more}


def node(address: str = "203.0.114.9", **more: object) -> Node:
    return Node.model_validate({"name": "k0", "rank": 0, "address": address, **more})


@pytest.mark.parametrize(
    ("asked", "answer", "expected"),
    [
        (node(), said(), ("192.168.7.9", "eth1", "192.168.7.0/24")),
        (node(), said(ssh_address="10.9.0.9"), ("10.9.0.9", "ib0", "10.9.0.0/16")),
        (node(), said(ssh_address="203.0.114.9"), ("192.168.7.9", "eth1", "192.168.7.0/24")),
        (node(nic="ib0"), said(ssh_address="192.168.7.9"), ("10.9.0.9", "ib0", "10.9.0.0/16")),
        (node(private="203.0.114.9"), said(), ("203.0.114.9", "eth0", "203.0.114.0/24")),
        (node("127.0.0.11"), said(), ("127.0.0.11", "lo", "127.0.0.0/8")),
        (node(), said(interfaces=INTERFACES[:3]), ("203.0.114.9", "eth0", "203.0.114.0/24")),
    ],
)
def test_the_private_address_is_chosen_by_rule(asked: Node, answer: dict[str, object], expected: tuple[str, str, str]) -> None:
    assert private_address(asked, answer) == expected


@pytest.mark.parametrize("more", [{"nic": "eth7"}, {"private": "10.9.0.8"}, {"nic": "eth1", "private": "10.9.0.9"}])
def test_what_deploy_toml_says_and_the_node_has_not_is_named(more: dict[str, str]) -> None:
    with pytest.raises(NodeError, match="this node has no") as caught:
        private_address(node(**more), said())
    assert "eth1 192.168.7.9" in caught.value.remedy


def test_a_docker_bridge_joins_no_machines() -> None:
    with pytest.raises(NodeError, match="no address was found at which the other nodes"):
        private_address(node(), said(interfaces=INTERFACES[:2], route_address=None))


def test_memory_and_driver_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    assert facts.memory("MemTotal:  451234567 kB\nMemFree: 1 kB\nMemAvailable:   440000000 kB\n") == {
        "total": 451234567 << 10,
        "available": 440000000 << 10,
    }
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  550.127.05  Release Build  (root@linux)  Tue Oct  8\n"
    (tmp_path / "version").write_text(text)
    assert driver.version(tmp_path / "version") == "550.127.05"
    assert driver.version(tmp_path / "absent") is None


def deployment(folder: Path, count: int) -> Deployment:
    hosts = ", ".join(f'"127.0.0.{11 + index}"' for index in range(count))
    (folder / "deploy.toml").write_text(f'local = "{folder}/local-{{user}}-{{node}}"\n[nodes]\nhosts = [{hosts}]\n')
    found = load_deployment(folder / "deploy.toml")
    found.folder.make()
    return found


def test_nodes_are_asked_over_ssh_and_what_fails_is_told_beside_the_others(tmp_path: Path) -> None:
    async def ask() -> None:
        broken = {"k1": {"PATH": "/nonexistent"}}
        async with kit.nodes(tmp_path, 3, environment=broken) as nodes:
            of = deployment(tmp_path, 3)
            found, bad = await probe_nodes(of, nodes)
            assert [node.name for node in found.nodes] == ["k0", "k2"]
            assert list(bad) == ["k1"]
            one = found.node("k2")
            assert (one.private, one.interface, one.address) == ("127.0.0.13", "lo", "127.0.0.13")
            assert one.cores == len(os.sched_getaffinity(0))
            assert one.disk
            assert one.disk.free > 0
            assert one.glibcxx is None or one.glibcxx.startswith("3.4.")
            keep_facts(of, found)
            with pytest.raises(ConfigError, match="no facts of node k1"):
                load_facts(of).node("k1")

    asyncio.run(ask())


def test_what_is_kept_outlives_a_node_that_is_down_but_not_another_address(tmp_path: Path) -> None:
    async def ask() -> Facts:
        async with kit.nodes(tmp_path, 2) as nodes:
            return (await probe_nodes(deployment(tmp_path, 2), nodes))[0]

    of = deployment(tmp_path, 2)
    both = asyncio.run(ask())
    keep_facts(of, both)
    assert [node.name for node in keep_facts(of, Facts(nodes=both.nodes[:1])).nodes] == ["k0", "k1"]
    moved = of.model_copy(update={"nodes": (of.nodes[0], of.nodes[1].model_copy(update={"address": "127.0.0.99"}))})
    assert [node.name for node in keep_facts(moved, Facts(nodes=both.nodes[:1])).nodes] == ["k0"]


def test_a_damaged_file_is_a_sentence(tmp_path: Path) -> None:
    of = deployment(tmp_path, 1)
    with pytest.raises(ConfigError, match="were not collected yet"):
        load_facts(of)
    of.folder.facts.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        load_facts(of)


def test_only_a_share_that_all_have_from_one_source_is_proposed(tmp_path: Path) -> None:
    def one(name: str, *mounts: tuple[str, str]) -> NodeFacts:
        values = [{"source": source, "target": target, "kind": "nfs4", "total": 1, "free": 1} for source, target in mounts]
        return NodeFacts.model_validate(FACTS | {"name": name, "mounts": values})

    shared, other = ("10.0.0.1:/v", "/home/u/fs"), ("10.0.0.2:/w", "/data")
    assert Facts(nodes=(one("k0", shared, other), one("k1", shared))).shares == ("/home/u/fs",)
    assert Facts(nodes=(one("k0", shared), one("k1", ("10.0.0.9:/v", "/home/u/fs")))).shares == ()
    assert Facts(nodes=()).shares == ()


FACTS: dict[str, object] = {
    "address": "a",
    "taken": 0,
    "user": "u",
    "hostname": "h",
    "arch": "aarch64",
    "kernel": "6",
    "cores": 1,
    "python": "3",
    "glibc": "2.35",
    "glibcxx": None,
    "page": 65536,
    "memory": {"total": 1},
    "cuda": {},
    "driver": None,
    "private": "p",
    "interface": "i",
    "network": "n",
    "disk": None,
    "clock_s": 0,
}


def test_a_second_answer_that_differs_from_the_first_is_named(tmp_path: Path) -> None:
    async def ask() -> Facts:
        async with kit.nodes(tmp_path, 2) as nodes:
            return (await probe_nodes(deployment(tmp_path, 2), nodes))[0]

    before = asyncio.run(ask())
    first, second = before.nodes
    gpu = Gpu(name="NVIDIA GH200 480GB", total=97871 << 20, free=0)
    had = first.model_copy(update={"cuda": first.cuda.model_copy(update={"gpus": (gpu, gpu)})})
    lost = had.model_copy(update={"cuda": had.cuda.model_copy(update={"gpus": (gpu.model_copy(update={"free": 5}),)})})
    same = second.model_copy(update={"taken": second.taken + 60, "clock_s": 1.0})
    (sentence,) = differences(Facts(nodes=(had, second)), Facts(nodes=(lost, same)))
    name = "NVIDIA GH200 480GB of 95.6 GiB"
    assert sentence == f"k0 changed: GPUs from 2 x {name} to 1 x {name}"
    moved = same.model_copy(update={"private": "10.0.0.9", "interface": "eth1"})
    (sentence,) = differences(Facts(nodes=(had, second)), Facts(nodes=(had, moved)))
    assert "private address from 127.0.0.12 on lo to 10.0.0.9 on eth1" in sentence
    assert differences(before, Facts(nodes=(first.model_copy(update={"address": "127.0.0.99", "arch": "x"}),))) == ()

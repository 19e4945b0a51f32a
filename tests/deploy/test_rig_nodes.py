"""The rehearsal's nodes: real OpenSSH, apart from each other and from this machine, broken to order, gone at the end."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.fleet.results import CommandResult
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from deploy.rehearsal import interpreter
from deploy.rehearsal.rig import MOUNT, USER, Rig, RigNode, check_machine, open_rig
from gracefarm.errors import HostError, SshError
from tests.deploy import nodefaults
from tests.deploy.test_environment import standalone, stock

pytestmark = pytest.mark.root


def inventory(room: Rig) -> list[Node]:
    return [Node(name=node.name, rank=node.rank, address=node.address, user=USER, key=room.key) for node in room.nodes]


def run(room: Rig, command: str, *, names: list[str] | None = None, timeout: float = 20) -> dict[str, CommandResult]:
    """A command on nodes by the product's own SSH."""

    async def go() -> dict[str, CommandResult]:
        async with Fleet(inventory(room), known_hosts=room.known_hosts, config=[], connect_timeout=3) as made:
            return await made.run(command, nodes=names, timeout=timeout)

    with room.inside():
        return asyncio.run(go())


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    specs = {"k1": nodefaults.SHARELESS_LOOPBACK, "k2": nodefaults.WRONG_PYTHON}
    with open_rig(tmp_path_factory.mktemp("rig"), count=3, specs=specs) as made:
        yield made


def said(results: dict[str, CommandResult]) -> dict[str, str]:
    assert all(result.ok for result in results.values()), results
    return {name: result.stdout.strip() for name, result in results.items()}


def test_each_node_is_a_machine_of_its_own(room: Rig) -> None:
    assert said(run(room, "id -un; hostname; pwd")) == {
        f"k{rank}": f"ubuntu\nnode-10-77-0-{11 + rank}\n/home/ubuntu" for rank in range(3)
    }
    names = said(run(room, "echo $$ > /tmp/mine; echo x > ~/mine; ls /tmp ~ /dev/shm"))
    assert set(names.values()) == {"/dev/shm:\n\n/home/ubuntu:\nmine\n\n/tmp:\nmine"}
    everywhere = [process["argv"] for node in room.nodes for process in node.processes()]
    assert all(argv[0].startswith("sshd: ") for argv in everywhere)  # and nothing of the machine around it
    assert room["k1"].home.joinpath("mine").read_text() == "x\n"
    assert said(run(room, "for k in 11 12 13; do getent hosts node-10-77-0-$k | cut -d' ' -f1; done", names=["k0"])) == {
        "k0": "10.77.0.11\n10.77.0.12\n10.77.0.13"
    }
    way = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.connect(('8.8.8.8', 9)); print(s.getsockname()[0])"
    assert said(run(room, f'python3 -c "{way}"', names=["k1"])) == {"k1": "10.77.0.12"}


def test_a_node_writes_nothing_but_its_own_and_the_share(room: Rig, tmp_path: Path) -> None:
    done = room["k0"].execute(["sh", "-c", "for f in /usr /etc /var /opt /srv; do touch $f/rig-was-here 2>&1; done"])
    assert done.stdout.count("Read-only file system") == 5
    assert not list(Path("/usr").glob("rig-was-here"))
    assert said(run(room, f"echo seen > {MOUNT}/nonce", names=["k0"])) == {"k0": ""}
    assert (room.share / "nonce").read_text() == "seen\n"
    assert said(run(room, f"cat {MOUNT}/nonce", names=["k2"])) == {"k2": "seen"}
    room["k0"].execute(["touch", "/tmp/of-k0"])
    assert (room["k0"].tmp / "of-k0").exists()
    assert not Path("/tmp/of-k0").exists()


def test_specs_make_nodes_that_differ(room: Rig) -> None:
    assert run(room, f"test -d {MOUNT}", names=["k1"])["k1"].returncode == 1
    assert said(run(room, "getent ahostsv4 $(hostname) | head -1 | cut -d' ' -f1", names=["k0", "k1"])) == {
        "k0": "10.77.0.11",
        "k1": "127.0.1.1",
    }
    version = said(run(room, "python3 -c 'import platform; print(platform.python_version())'; echo $NICE"))
    assert version["k2"] == f"{nodefaults.OTHER_PYTHON}\nimage"
    assert version["k0"] != version["k2"]


def test_a_command_of_this_machine_reaches_the_nodes(room: Rig) -> None:
    line = [
        "ssh",
        "-F",
        "none",
        "-i",
        str(room.key),
        "-o",
        f"UserKnownHostsFile={room.known_hosts}",
        f"{USER}@10.77.0.13",
        "hostname",
    ]
    done = subprocess.run(room.command(line), capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "node-10-77-0-13\n"
    there = subprocess.run(room.command(["ip", "-brief", "link"]), capture_output=True, text=True, timeout=20, check=True)
    here = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True)
    assert "port-k2" in there.stdout
    assert "port-k2" not in here.stdout  # this machine's own network has nothing of it


def test_faults_come_and_go(tmp_path: Path) -> None:
    with open_rig(tmp_path / "r", count=2) as room:
        k1 = room["k1"]
        nodefaults.unplug(k1)
        found = run(room, "true")
        assert found["k0"].ok
        assert isinstance(found["k1"].error, SshError)
        assert "10.77.0.12" in str(found["k1"].error)
        nodefaults.plug(k1)
        assert run(room, "true")["k1"].ok

        pid = nodefaults.take_port(k1, 2242)
        assert run(room, "python3 -c 'import socket; socket.create_server((\"127.0.0.1\", 2242))'")["k1"].stderr.count(
            "Address already in use"
        )
        nodefaults.kill(k1, pid)
        assert run(room, "python3 -c 'import socket; socket.create_server((\"127.0.0.1\", 2242))'", names=["k1"])["k1"].ok

        nodefaults.lose_share(k1)
        assert said(run(room, f"ls -A {MOUNT} | wc -l; test -w {MOUNT} || echo no", names=["k1"])) == {"k1": "0\nno"}

        nodefaults.new_host_key(k1)
        found = run(room, "true")
        assert found["k0"].ok
        assert "host key" in str(found["k1"].error).lower()
        room.write_lists()
        assert run(room, "true")["k1"].ok

        k1.off()
        assert not found["k1"].ok
        with pytest.raises(HostError, match="k1"):
            k1.execute(["true"])
        k1.boot(nodefaults.LOOPBACK)
        assert said(run(room, f"getent ahostsv4 $(hostname) | head -1 | cut -d' ' -f1; test -w {MOUNT}", names=["k1"])) == {
            "k1": "127.0.1.1"
        }


def test_a_small_share_is_full_for_all(tmp_path: Path) -> None:
    with open_rig(tmp_path / "r", count=2, share_size="1m") as room:
        done = run(room, f"head -c 2000000 /dev/zero > {MOUNT}/big", names=["k0"])["k0"]
        assert "No space left on device" in done.stderr
        assert said(run(room, f"stat -c %s {MOUNT}/big", names=["k1"]))["k1"] == str(1 << 20)
        assert (room.share / "big").stat().st_size == 1 << 20
    assert not list((tmp_path / "r" / "share").iterdir())


def sleepers(node: RigNode) -> list[str]:
    """How long the processes `sleep` of a node sleep; a child that has not become one yet is waited for."""
    deadline = time.monotonic() + 5
    while any(process["argv"][0] == "setsid" for process in node.processes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return sorted(process["argv"][1] for process in node.processes() if process["argv"][0] == "sleep")


def test_power_off_ends_every_process_of_the_node_alone(tmp_path: Path) -> None:
    with open_rig(tmp_path / "r", count=2) as room:
        assert said(run(room, "for n in 600 601; do setsid sleep $n >/dev/null 2>&1 & done; sleep 0.2"))
        assert sleepers(room["k0"]) == sleepers(room["k1"]) == ["600", "601"]
        assert nodefaults.kill_matching(room["k0"], "601")
        assert (sleepers(room["k0"]), sleepers(room["k1"])) == (["600"], ["600", "601"])
        room["k0"].off()
        assert sleepers(room["k1"]) == ["600", "601"]
        with pytest.raises(HostError, match="off"):
            room["k0"].processes()


OWNER = """
import sys, time
from pathlib import Path
from deploy.rehearsal.rig import open_rig
with open_rig(Path(sys.argv[1]), count=2) as room:
    for one in room.nodes:
        one.execute(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &"])
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "r"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert owner.stdout
    assert owner.stdout.readline() == "up\n"
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) >= 8  # the room and its holder; of each node the holder, sshd, and sleep, which has no terminal
    owner.send_signal(how)
    owner.wait(timeout=20)
    owner.stdout.close()
    _gone, left = psutil.wait_procs(family, timeout=5)
    assert left == []
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    shutil.rmtree(folder)


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match="requires root"), open_rig(tmp_path, count=1):
        pass


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name == "ip" else name)
    with pytest.raises(HostError, match="requires ip") as caught:
        check_machine()
    assert "iproute2" in caught.value.remedy


@stock
def test_a_machine_without_python_3_11_has_uv_bring_one_for_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ubuntu 24.04: `deploy` runs on 3.12 there. Once, or it is said at once."""
    monkeypatch.setenv("UV_PYTHON_INSTALL_MIRROR", standalone(tmp_path / "mirror", monkeypatch))
    monkeypatch.setattr(interpreter, "NODE_PATH", str(tmp_path))
    found = interpreter.find(tmp_path / "home")
    assert found is not None
    (tmp_path / "mirror").rename(tmp_path / "away")
    assert interpreter.find(tmp_path / "home") == found
    with pytest.raises(HostError, match=r"requires Python 3\.11, .* and uv cannot install it: .*No such") as no:
        interpreter.find(tmp_path / "other")
    assert "UV_PYTHON_INSTALL_MIRROR" in no.value.remedy
    monkeypatch.setattr(interpreter, "find", lambda _home, _version: found)
    with open_rig(tmp_path / "rig", count=2, specs={"k1": nodefaults.WRONG_PYTHON}) as room:
        where = said(run(room, "python3.11 -c 'import ssl, sys; print(sys.prefix, sys.version.split()[0])'"))
        assert where["k0"].startswith("/run/rig-python 3.11.")
        assert where["k1"] == f"/run/rig-python {nodefaults.OTHER_PYTHON}"

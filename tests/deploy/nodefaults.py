"""What can go wrong with a node of the rehearsal, and nodes that differ from the others."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import replace

from deploy.rehearsal.interpreter import NODE_PATH
from deploy.rehearsal.rig import MOUNT, NodeSpec, RigNode
from gracefarm.errors import HostError

OTHER_PYTHON = "3.11.99"
BROUGHT = f"/run/rig-python/bin:{NODE_PATH}"
"PATH of a node; the first folder is empty where Python 3.11 is the machine's own."
SHIM = """#!/bin/sh
PYTHONPATH=/run/rig/python exec "$(PATH={path} command -v {name})" "$@"
"""
SITE = f"""import sys
sys.version = "{OTHER_PYTHON} " + sys.version.split(" ", 1)[1]
sys.version_info = type("version_info", (tuple,), {{"major": 3, "minor": 11, "micro": 99}})((3, 11, 99, "final", 0))
"""


# faults


def _link(node: RigNode, state: str) -> None:
    subprocess.run(node.room.command(["ip", "link", "set", f"port-{node.name}", state]), check=True, timeout=20)


def unplug(node: RigNode) -> None:
    """Unreachable from now on; connections that are open hang, as they do."""
    _link(node, "down")


def plug(node: RigNode) -> None:
    """Reachable again: it answers."""
    _link(node, "up")
    subprocess.run(node.room.command(["ip", "neigh", "flush", "dev", "room"]), check=True, timeout=20)
    deadline = time.monotonic() + 10
    with node.room.inside():
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection((node.address, 22), timeout=1):
                return
            time.sleep(0.05)
    raise AssertionError(f"{node.address} does not answer")


def lose_share(node: RigNode) -> None:
    """The shared folder is unmounted while it is in use."""
    _must(node, ["umount", "--lazy", MOUNT])


def read_only_share(node: RigNode) -> None:
    """Make the shared folder read-only on this node only."""
    _must(node, ["mount", "-o", "remount,bind,ro", MOUNT])


def jumbo(node: RigNode) -> None:
    """Its interface sends frames of 9000 bytes; the switch carries 1500 and drops the others without a word."""
    # One segment at a time: what the kernel cuts late (GSO) passes between namespaces whatever its size.
    _must(node, ["ip", "link", "set", "dev", "eth0", "mtu", "9000", "gso_max_segs", "1"])


def forbid_forwarding(node: RigNode) -> None:
    """sshd forwards no port from the next connection on."""
    with (node.folder / "etc" / "sshd_config").open("a") as stream:
        stream.write("AllowTcpForwarding no\n")
    (node.folder / "sshd.log").write_text("")
    _must(node, ["kill", "-HUP", "1"])
    node.room.wait_ready([node])


def fill_disk(node: RigNode) -> None:
    """No byte is free on its own disk."""
    _must(node, ["mount", "-t", "tmpfs", "-o", "mode=1777,size=1m", "full", "/tmp"])
    _must(node, ["sh", "-c", "head -c 2000000 /dev/zero >/tmp/filled || true"])


def new_host_key(node: RigNode) -> None:
    """Another host key from the next connection on, as of a machine that was replaced."""
    node.room.make_host_key(node)
    _must(node, ["kill", "-HUP", "1"])
    node.room.wait_ready([node])


def take_port(node: RigNode, port: int, address: str = "0.0.0.0") -> int:
    """Another process listens there; the pid on the node, for `kill`."""
    code = (
        "import os, socket, time\n"
        f"s = socket.create_server(({address!r}, {port}))\n"
        "child = os.fork()\n"
        "print(child, flush=True) if child else (os.close(1), os.close(2), time.sleep(86400))\n"
    )
    return int(_must(node, ["python3", "-c", code]).strip())


def kill(node: RigNode, pid: int, signal: str = "KILL") -> None:
    """A signal to a process, by the number that it has on the node."""
    _must(node, ["kill", f"-{signal}", str(pid)])


def kill_matching(node: RigNode, word: str) -> list[int]:
    """KILL to every process of the node with `word` in its argument list; their numbers. They are gone then."""
    hit = [
        process["pid"] for process in node.processes() if any(word in part for part in process["argv"]) and process["pid"] != 1
    ]
    for pid in hit:
        node.execute(["kill", "-KILL", str(pid)])
    deadline = time.monotonic() + 5
    while {process["pid"] for process in node.processes()} & set(hit) and time.monotonic() < deadline:
        time.sleep(0.02)
    return hit


def _must(node: RigNode, argv: list[str]) -> str:
    process = node.execute(argv)
    if process.returncode:
        raise HostError(f"{node.name}: {' '.join(argv)}: {process.stderr.strip()}")
    return process.stdout


# nodes that differ


def _loopback(node: RigNode) -> None:
    hosts = node.folder / "etc" / "hosts"
    hosts.write_text(f"127.0.1.1 {node.room.hostname(node)}\n{hosts.read_text()}")


def _other_python(node: RigNode) -> None:
    folder = node.folder / "python"
    folder.mkdir(exist_ok=True)
    for program in ("python3", "python3.11"):
        (folder / program).write_text(SHIM.format(name=program, path=BROUGHT))
        (folder / program).chmod(0o755)
    (folder / "sitecustomize.py").write_text(SITE)


LOOPBACK = NodeSpec(change=_loopback)
"Its own name is 127.0.1.1, as Debian's installer writes it."
SHARELESS = NodeSpec(variables={"RIG_SHARE": ""})
"It has no shared folder."
SHARELESS_LOOPBACK = replace(LOOPBACK, variables=SHARELESS.variables)
WRONG_PYTHON = NodeSpec(change=_other_python, env={"PATH": f"/run/rig/python:{BROUGHT}", "NICE": "image"})
"Its Python says that it is another patch release (`OTHER_PYTHON`); every login has a variable of the machine's image."

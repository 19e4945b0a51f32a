"""Faults of a node of the rehearsal, and nodes that differ from the others."""

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
"PATH of a node. The first folder is empty if this machine has Python 3.11."
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
    """Make the node unreachable. Open connections hang, as in reality."""
    _link(node, "down")


def plug(node: RigNode) -> None:
    """Make the node reachable again, and wait until it answers."""
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
    """Unmount the shared folder while it is in use."""
    _must(node, ["umount", "--lazy", MOUNT])


def read_only_share(node: RigNode) -> None:
    """Make the shared folder read-only, but only on this node."""
    _must(node, ["mount", "-o", "remount,bind,ro", MOUNT])


def jumbo(node: RigNode) -> None:
    """Let the node's interface send frames of 9000 bytes. The switch silently drops frames of more than 1500 bytes."""
    # Without segmentation offload (GSO): between namespaces, such packets pass with any size.
    _must(node, ["ip", "link", "set", "dev", "eth0", "mtu", "9000", "gso_max_segs", "1"])


def forbid_forwarding(node: RigNode) -> None:
    """Let sshd refuse to forward ports, from the next connection on."""
    with (node.folder / "etc" / "sshd_config").open("a") as stream:
        stream.write("AllowTcpForwarding no\n")
    (node.folder / "sshd.log").write_text("")
    _must(node, ["kill", "-HUP", "1"])
    node.room.wait_ready([node])


def fill_disk(node: RigNode) -> None:
    """Fill the node's disk completely."""
    _must(node, ["mount", "-t", "tmpfs", "-o", "mode=1777,size=1m", "full", "/tmp"])
    _must(node, ["sh", "-c", "head -c 2000000 /dev/zero >/tmp/filled || true"])


def new_host_key(node: RigNode) -> None:
    """Change the host key from the next connection on, as if the machine was replaced."""
    node.room.make_host_key(node)
    _must(node, ["kill", "-HUP", "1"])
    node.room.wait_ready([node])


def take_port(node: RigNode, port: int, address: str = "0.0.0.0") -> int:
    """Let another process listen on a port. Return its pid on the node, for `kill`."""
    code = (
        "import os, socket, time\n"
        f"s = socket.create_server(({address!r}, {port}))\n"
        "child = os.fork()\n"
        "print(child, flush=True) if child else (os.close(1), os.close(2), time.sleep(86400))\n"
    )
    return int(_must(node, ["python3", "-c", code]).strip())


def kill(node: RigNode, pid: int, signal: str = "KILL") -> None:
    """Send a signal to a process, by its pid on the node."""
    _must(node, ["kill", f"-{signal}", str(pid)])


def kill_matching(node: RigNode, word: str) -> list[int]:
    """Kill every process of the node with `word` in its argument list, and wait until they have ended. Return their pids."""
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
"A node whose name resolves to 127.0.1.1, as Debian's installer configures it."
SHARELESS = NodeSpec(variables={"RIG_SHARE": ""})
"A node without a shared folder."
SHARELESS_LOOPBACK = replace(LOOPBACK, variables=SHARELESS.variables)
WRONG_PYTHON = NodeSpec(change=_other_python, env={"PATH": f"/run/rig/python:{BROUGHT}", "NICE": "image"})
"A node whose Python reports another patch release (`OTHER_PYTHON`). Every login has a variable of the machine's image."

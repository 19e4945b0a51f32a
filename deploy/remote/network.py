"""Addresses and listeners of a node."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path

from deploy.remote.marked import deployment_of
from deploy.remote.wire import Json, WorkerError


def listening(port: int) -> set[str]:
    """The sockets that listen on a TCP port, as inodes."""
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            row = line.split()
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{row[9]}]")
    return inodes


def holder(port: int) -> str:
    """The process that listens on a TCP port: its command line and its deployment, if this user may read them."""
    inodes = listening(port)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(str(descriptor.readlink()) in inodes for descriptor in (process / "fd").iterdir()):
                command = b" ".join((process / "cmdline").read_bytes().split(b"\0")[:2]).decode(errors="replace")
                deployment = deployment_of(int(process.name))
                whose = f" of deployment {deployment}" if deployment else ""
                return f"{command.strip()} (process {process.name}{whose})"
    return "a process of another user"


def interface_of(address: str) -> str | None:
    """The network interface with an IPv4 or IPv6 address."""
    names = (link["ifname"] for link in _links() if any(held.get("local") == address for held in link.get("addr_info", [])))
    return next(names, None)


def interfaces() -> list[Json]:
    """Interfaces that are up, with their addresses."""
    return [
        {
            "name": link["ifname"],
            "mbit_s": speed(link["ifname"]),
            "mtu": link.get("mtu"),
            "addresses": [
                {"address": held["local"], "prefix": held["prefixlen"]}
                for held in link.get("addr_info", [])
                if held.get("local") and held.get("scope") != "link"
            ],
        }
        for link in _links()
        if "UP" in link.get("flags", [])
    ]


def speed(interface: str, folder: Path = Path("/sys/class/net")) -> int | None:
    """Negotiated speed of an interface in Mbit/s; None: not reported, as by virtual interfaces."""
    try:
        mbit_s = int((folder / interface / "speed").read_text())
    except (OSError, ValueError):
        return None
    return mbit_s if mbit_s > 0 else None


def rdma(folder: Path = Path("/sys/class/infiniband")) -> list[Json]:
    """Active ports of InfiniBand and RoCE (Linux, Documentation/ABI/stable/sysfs-class-infiniband)."""
    ports = []
    for port in sorted(folder.glob("*/ports/*")):
        try:
            state, rate, link = ((port / name).read_text() for name in ("state", "rate", "link_layer"))
        except OSError:
            continue
        words = rate.split()
        if "ACTIVE" in state and words:
            ports.append({"device": port.parent.parent.name, "gbit_s": float(words[0]), "link": link.strip()})
    return ports


def _links() -> list[Json]:
    """The interfaces and addresses that `ip` lists."""
    try:
        process = subprocess.run(["ip", "-json", "address"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise WorkerError("node", "the command `ip` is missing", "install the package iproute2 on this node") from error
    links: list[Json] = json.loads(process.stdout or "[]")
    return links

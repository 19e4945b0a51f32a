"""Reports the facts of a node: machine, memory, GPUs, addresses, file systems. The caller judges them."""

from __future__ import annotations

import getpass
import os
import re
import resource
import socket
import sys
import time
from pathlib import Path

from deploy.remote import driver, libraries, mounts, network
from deploy.remote.wire import Json, event


def probe(request: Json) -> Json:
    """Collect the facts. `local`: the deployment's folder on the node's local disk, with the placeholder {user}."""
    system = os.uname()
    user = getpass.getuser()
    facts = {
        "user": user,
        "hostname": system.nodename,
        "arch": system.machine,
        "kernel": system.release,
        "cores": len(os.sched_getaffinity(0)),
        "python": sys.version.split()[0],
        "glibc": os.confstr("CS_GNU_LIBC_VERSION").rpartition(" ")[2],  # type: ignore[union-attr]
        "glibcxx": libraries.glibcxx(),
        "page": resource.getpagesize(),
        "memory": memory(Path("/proc/meminfo").read_text()),
        "cuda": driver.cuda(),
        "driver": driver.version(),
        "interfaces": network.interfaces(),
        "rdma": network.rdma(),
        "ssh_address": [*os.environ.get("SSH_CONNECTION", "").split(), "", "", ""][2],
        "route_address": _route(),
        "mounts": _mounts(),
        "disk": mounts.space(mounts.existing(request["local"].replace("{user}", user))),
    }
    event("clock", time=time.time())  # last, so that the caller can compare the clocks
    return facts


def memory(meminfo: str) -> Json:
    """Total and available bytes of host memory, from /proc/meminfo."""
    rows = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE))
    return {"total": int(rows["MemTotal"]) << 10, "available": int(rows["MemAvailable"]) << 10}


def _route() -> str | None:
    """The source address of the default route. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        try:
            channel.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(channel.getsockname()[0])


def _mounts() -> list[Json]:
    """The mounted network file systems."""
    return [
        {"source": mount.source, "target": mount.target, "kind": mount.kind, **space}
        for mount in mounts.current()
        if mount.network and (space := mounts.space(mount.target))
    ]

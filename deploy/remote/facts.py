"""What a node is: machine, memory, GPU, addresses, file systems. Facts only; the asker judges and chooses."""

from __future__ import annotations

import getpass
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deploy.remote import mounts, preflight
from deploy.remote.wire import WorkerError, event

Json = dict[str, Any]
DRIVER = Path("/proc/driver/nvidia/version")


def probe(request: Json) -> Json:
    """`local`: the deployment's folder on the node's own disk, with {user} in it."""
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
        "glibcxx": preflight.glibcxx(),
        "page": resource.getpagesize(),
        "memory": memory(Path("/proc/meminfo").read_text()),
        "cuda": preflight.cuda(),
        "driver": driver(),
        "interfaces": interfaces(),
        "ssh_address": [*os.environ.get("SSH_CONNECTION", "").split(), "", "", ""][2],
        "route_address": _route(),
        "mounts": _mounts(),
        "disk": preflight.space(_existing(request["local"].replace("{user}", user))),
    }
    event("clock", time=time.time())  # last, so that the asker can tell how far it is off
    return facts


def memory(meminfo: str) -> Json:
    """Bytes of host memory, all and available, of /proc/meminfo."""
    rows = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE))
    return {"total": int(rows["MemTotal"]) << 10, "available": int(rows["MemAvailable"]) << 10}


def driver() -> str | None:
    """The version of NVIDIA's kernel module."""
    try:
        text = DRIVER.read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)*)\b", text)
    return found.group(1) if found else None


def interfaces() -> list[Json]:
    """Interfaces that are up, with their addresses."""
    try:
        done = subprocess.run(["ip", "-json", "address"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise WorkerError("node", "there is no `ip`", "install iproute2") from error
    return [
        {
            "name": one["ifname"],
            "addresses": [
                {"address": each["local"], "prefix": each["prefixlen"]}
                for each in one.get("addr_info", [])
                if each.get("local") and each.get("scope") != "link"
            ],
        }
        for one in json.loads(done.stdout or "[]")
        if "UP" in one.get("flags", [])
    ]


def _route() -> str | None:
    """The address that the kernel takes for the way out; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(one.getsockname()[0])


def _mounts() -> list[Json]:
    """File systems that several nodes can see."""
    return [
        {"source": one.source, "target": one.target, "kind": one.kind, **space}
        for one in mounts.parse_mounts(Path("/proc/mounts").read_text())
        if one.network and (space := preflight.space(one.target))
    ]


def _existing(path: str) -> str:
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    return str(place)

"""The room: the first process of the rehearsal's namespaces. It has the virtual switch and starts nodes.

deploy.rehearsal.rig runs it as `unshare … python -m deploy.rehearsal.room FOLDER`. Requests are JSON lines on stdin, answers
are JSON lines on stdout. When the owner ends in any way, stdin ends, and this process ends. With the first process of a
namespace, the kernel kills all its other processes, on every node. Network and mounts are removed with the last process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.remote.wire import Json

BRIDGE = "room"
NODE = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc")


class Room:
    """The nodes, by name."""

    def __init__(self) -> None:
        self.holders: dict[str, subprocess.Popen[str]] = {}

    def open(self, request: Json) -> Json:
        """Create the switch. `gateway`: address with prefix length. `share`, `size`: for a shared folder of a fixed size."""
        ip("link", "set", "lo", "up")
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", request["gateway"], "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        if request.get("size"):
            options = f"size={request['size']},mode=1777"
            run(["mount", "-t", "tmpfs", "-o", options, "rig-share", request["share"]])
        return {}

    def start(self, request: Json) -> Json:
        """Start nodes in parallel. `nodes`: environment of node.sh by name."""
        script = request["script"]
        for name, environment in request["nodes"].items():
            if self.alive(name):
                raise ValueError(f"{name} is already running")
            # qemu is registered in a user namespace, which the node is in, with unchanged user ids.
            own = ["--user"] if environment["RIG_ROOT"] else []
            self.holders[name] = subprocess.Popen(
                [*NODE, *own, "sh", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        for name, environment in request["nodes"].items():
            self._plug_in(name, mapped=bool(environment["RIG_ROOT"]))
        return {}

    def _plug_in(self, name: str, *, mapped: bool) -> None:
        holder = self.holders[name]
        assert holder.stdin
        assert holder.stdout
        if holder.stdout.readline().strip() != "unshared":
            assert holder.stderr
            raise ValueError(f"{name}: {holder.stderr.read().strip() or 'unshare failed'}")
        for kind in ("uid_map", "gid_map") if mapped else ():
            Path(f"/proc/{holder.pid}/{kind}").write_text("0 0 65536")
        port = f"port-{name}"
        with suppress(subprocess.CalledProcessError):
            ip("link", "del", port)
        card = "02:4d:" + ":".join(f"{ord(letter):02x}" for letter in name.rjust(4, "-")[-4:])  # stays the same after a reboot
        ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "address", card, "netns", str(holder.pid))
        ip("link", "set", port, "master", BRIDGE)
        ip("link", "set", port, "up")
        holder.stdin.write("go\n")
        holder.stdin.flush()

    def alive(self, name: str) -> bool:
        """Whether the first process of the node is running."""
        return name in self.holders and self.holders[name].poll() is None

    def stop(self, request: Json) -> Json:
        """Power off: kill all processes of the node at once."""
        first = self.first(request["node"])
        holder = self.holders.pop(request["node"])
        holder.kill()
        holder.wait()
        deadline = time.monotonic() + 10
        while first and Path(f"/proc/{first}").exists() and time.monotonic() < deadline:
            reap()
            time.sleep(0.02)
        with suppress(subprocess.CalledProcessError):  # the kernel may have removed it with its other end
            ip("link", "del", f"port-{request['node']}")
        return {}

    def execute(self, request: Json) -> Json:
        """Run `argv` on a node as root, without its sshd."""
        first = self.first(request["node"])
        process = subprocess.run(
            ["nsenter", "-t", str(first), "-m", "-u", "-i", "-n", "-p", *request["argv"]],
            input=request.get("input", ""),
            capture_output=True,
            text=True,
            check=False,
            timeout=request.get("timeout", 60),
        )
        return {"code": process.returncode, "out": process.stdout, "err": process.stderr}

    def processes(self, request: Json) -> Json:
        """All processes of a node: process id on the node, arguments, environment."""
        first = self.first(request["node"])
        space = os.readlink(f"/proc/{first}/ns/pid")  # noqa: PTH115 - no path
        processes = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(folder / "ns/pid") == space:  # noqa: PTH115
                    processes.append(_process(folder))
        # Zombies have no arguments.
        return {"processes": sorted((process for process in processes if process["argv"]), key=lambda entry: entry["pid"])}

    def first(self, name: str) -> int:
        """Process id of the node's first process in this room."""
        first = only_child(self.holders[name].pid) if name in self.holders else None
        if first is None:
            raise ValueError(f"{name} is off")
        return first


def only_child(holder: int) -> int | None:
    """The first process of the namespaces that an `unshare` created; None if it has ended."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == holder:
                return int(stat.parent.name)
    return None


def _process(folder: Path) -> Json:
    status = (folder / "status").read_text()
    inner = next(line.split()[-1] for line in status.splitlines() if line.startswith("NSpid"))
    environ = (folder / "environ").read_bytes().decode(errors="replace")
    return {
        "pid": int(inner),
        "argv": [part.decode(errors="replace") for part in (folder / "cmdline").read_bytes().split(b"\0") if part],
        "environ": dict(word.split("=", 1) for word in environ.split("\0") if "=" in word),
        "rss": int(next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")), "0")) << 10,
    }


def ip(*words: str) -> None:
    """Run `ip` of iproute2."""
    run(["ip", *words])


def run(argv: list[str]) -> None:
    """Run a command that must succeed. The error contains its stderr."""
    subprocess.run(argv, check=True, capture_output=True, text=True)


def reap() -> None:
    """Collect processes of nodes that were switched off: this first process inherits them. Holders are not collected."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def answer(room: Room, request: Json) -> Json:
    """Answer one request. A failure is returned as `error`."""
    try:
        operation: Mapping[str, Any] = {
            "open": room.open,
            "start": room.start,
            "stop": room.stop,
            "execute": room.execute,
            "processes": room.processes,
        }
        return {"ok": operation[request["do"]](request)}
    except subprocess.CalledProcessError as error:
        return {"error": f"{' '.join(error.cmd)}: {error.stderr.strip()}"}
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        return {"error": str(error) or type(error).__name__}


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    room = Room()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(room, json.loads(line))) + "\n")
        sys.stdout.flush()
        reap()


if __name__ == "__main__":
    main()

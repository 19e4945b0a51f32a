"""Machines for the tests of `--farm`: namespaces of one kernel. Each has a network card, a /tmp, a GRACEFARM_HOME, and Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from gracefarm.files import remove_tree
from gracefarm.process import die_with_us
from tests import projects
from tests.conftest import SHARED, Farm

UNSHARE = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc")
BOOT = """set -eu
echo unshared
read -r _go
hostname "$1"
ip link set lo up
ip link set eth0 up
ip addr add "$2/24" dev eth0
mount -t tmpfs -o mode=1777,size=2g machine /tmp
mount -t tmpfs -o mode=1777,size=2g machine /dev/shm
[ -z "$4" ] || mount -t tmpfs -o "mode=755,size=$4" machine "$3"
echo ready
# The kernel reaps what ends without a parent if the first process ignores its end.
exec env --ignore-signal=CHLD sleep infinity
"""
RAY_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "c0ffee" * 8,
}
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(kw_only=True)
class Machine:
    """A machine of the room. `run` and `start` run commands on it."""

    name: str
    address: str
    home: Path
    holder: subprocess.Popen[str]
    variables: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The pid of its first process in the pid namespace of the tests."""
        return int(Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()[0])

    def command(self, argv: Sequence[str]) -> list[str | Path]:
        """The command line that runs `argv` on this machine."""
        return die_with_us(["nsenter", "-t", str(self.first), "-m", "-u", "-i", "-n", "-p", *argv])

    def start(self, argv: Sequence[str], **variables: str) -> subprocess.Popen[str]:
        """Start `argv` in the background. Its output goes to a file beside the home. `output` reads this file."""
        with (self.home.parent / f"{self.name}-{len(self.started)}.log").open("w") as log:
            process = subprocess.Popen(
                self.command(argv),
                env={**projects.environment(self.variables), **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(self, *argv: str, timeout: float = 300, **variables: str) -> projects.Done:
        """Run `argv` to its end."""
        environment = {**projects.environment(self.variables), **variables}
        ended = subprocess.run(
            self.command(argv), env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        return projects.Done(code=ended.returncode, out=ended.stdout, err=ended.stderr)

    def builder(self, *arguments: str, timeout: float = 300, **variables: str) -> projects.Done:
        """Run `builder ARGUMENTS` on this machine."""
        return self.run(sys.executable, "-m", "builder", *arguments, timeout=timeout, **variables)

    def output(self, number: int) -> str:
        """The output so far of the process with this number, in the order of starts."""
        return (self.home.parent / f"{self.name}-{number}.log").read_text()

    def power_off(self) -> None:
        """Kill all processes of the machine together."""
        end(self.holder)
        for process in self.started:
            process.wait(20)

    def slow_down(self, rate: str) -> None:
        """Limit the send rate of its network card."""
        done = self.run(
            "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "16kbit", "latency", "800ms"
        )
        assert done.code == 0, done.said


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process, and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


class Room:
    """A switch, and the machines that are connected to it."""

    def __init__(self, farm: Farm) -> None:
        self.farm = farm
        self.machines: list[Machine] = []
        boot = "ip link add room type bridge && ip link set room up && echo up && exec sleep infinity"
        command = die_with_us(["unshare", "--net", "--fork", "--kill-child=KILL", "sh", "-c", boot])
        self.switch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.switch.stdout is not None
        assert self.switch.stdout.readline() == "up\n"

    def machine(self, name: str, *, size: str = "", variables: Mapping[str, str] | None = None) -> Machine:
        """Start a machine. `size` limits the file system of its home."""
        home = self.farm.settings.home.parent / name / "home"
        home.mkdir(parents=True)
        address = f"10.77.0.{len(self.machines) + 1}"
        holder = subprocess.Popen(
            die_with_us([*UNSHARE, "sh", "-c", BOOT, "boot", name, address, str(home), size]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "unshared\n"
        port = f"port{len(self.machines)}"
        for words in (
            ("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid)),
            ("ip", "link", "set", port, "master", "room"),
            ("ip", "link", "set", port, "up"),
        ):
            subprocess.run(["nsenter", "-t", str(self.switch.pid), "-n", *words], check=True, capture_output=True)
        holder.stdin.write("go\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "ready\n"
        own = {**self.farm.environment, "GRACEFARM_HOME": str(home), **RAY_VARIABLES, **(variables or {})}
        machine = Machine(name=name, address=address, home=home, holder=holder, variables=own)
        for folder in SHARED:
            target = (self.farm.settings.home / folder).resolve()
            assert machine.run("ln", "-s", str(target), str(home / folder)).code == 0
        self.machines.append(machine)
        return machine

    def head(self, name: str = "head") -> Machine:
        """Start a machine with the cluster's head, which does not build."""
        machine = self.machine(name)
        self.start_head(machine)
        return machine

    def start_head(self, machine: Machine) -> None:
        """Start Ray's head on a machine."""
        options = ("--head", "--port", "6379", "--num-cpus", "0", "--include-dashboard", "false")
        machine.start([RAY, "start", "--block", "--node-ip-address", machine.address, *options])
        wait_for(machine, 6379)
        wait_for(machine, 10001)

    def worker(
        self, head: Machine, name: str, *, cpus: int = 1, core: int = 0, arch: str | None = None, **options: str
    ) -> Machine:
        """Start a machine that builds, and bind it to one core."""
        machine = self.machine(name, size=options.pop("size", ""), variables=options)
        self.join(machine, head, cpus=cpus, core=core, arch=arch)
        return machine

    def join(self, machine: Machine, head: Machine, *, cpus: int = 1, core: int = 0, arch: str | None = None) -> None:
        """Start Ray on a machine, and join a cluster."""
        resources = f'{{"{arch or os.uname().machine}": 1}}'
        memory = ("--memory", str(4 << 30), "--object-store-memory", str(100 << 20))
        command = [RAY, "start", "--block", "--address", f"{head.address}:6379", "--node-ip-address", machine.address]
        command += ["--num-cpus", str(cpus), "--resources", resources, *memory]
        machine.start(["taskset", "-c", str(core % (os.cpu_count() or 1)), *command])

    def close(self) -> None:
        """Switch everything off."""
        for machine in self.machines:
            if machine.holder.poll() is None:
                machine.power_off()
        end(self.switch)


@contextmanager
def open_room(farm: Farm) -> Iterator[Room]:
    """Open a room. At the end of the block, all its machines are switched off."""
    room = Room(farm)
    try:
        yield room
    finally:
        room.close()
        for machine in room.machines:
            remove_tree(machine.home.parent)


def wait_for(machine: Machine, port: int) -> None:
    """Wait until a machine listens on a port."""
    probe = f"import socket; socket.create_connection(('{machine.address}', {port}), 1).close()"
    deadline = time.monotonic() + 240
    while machine.run(sys.executable, "-I", "-c", probe).code != 0:
        assert time.monotonic() < deadline, machine.output(0)
        time.sleep(0.5)

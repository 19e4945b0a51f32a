"""Nodes on one machine: namespaces that a virtual switch connects, each with a real sshd.

    with open_rig(folder, count=3) as room:
        room.ips                      # ips.txt
        room.command(["deploy", …])   # the arguments to run a command in the nodes' network
        with room.inside(): …         # sockets and child processes of this thread are in the nodes' network
        room["k1"].off()

The nodes end when their owner ends; see deploy.rehearsal.room.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from deploy.rehearsal import interpreter, sshd
from deploy.rehearsal.interpreter import NODE_PATH
from deploy.rehearsal.room import only_child
from deploy.remote.wire import Json
from gracefarm import settings
from gracefarm.errors import HostError
from gracefarm.process import last_line

GATEWAY = "10.77.0.1"
"Address on which servers of this machine (index, Hub) listen for the nodes."
USER, UID = "ubuntu", 1000
MOUNT = "/mnt/share"
"The shared folder, on every node."
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """Differences of a node from the others, for the whole rehearsal or since `boot`."""

    env: Mapping[str, str] = field(default_factory=dict)
    "Environment of every login, as an image might set it."
    variables: Mapping[str, str] = field(default_factory=dict)
    "Variables of node.sh, which replace the usual ones."
    change: Callable[[RigNode], None] = lambda _node: None
    "Changes the files of the node before it starts."


class RigNode:
    """One node."""

    def __init__(self, room: Rig, rank: int, spec: NodeSpec) -> None:
        self.room = room
        self.rank = rank
        self.name = f"k{rank}"
        self.address = f"10.77.0.{11 + rank}"
        self.folder = room.folder / "nodes" / self.name
        self.spec = spec

    @property
    def home(self) -> Path:
        """The home of its user, on this machine."""
        return self.folder / "home"

    @property
    def tmp(self) -> Path:
        """Its /tmp, on this machine."""
        return self.folder / "tmp"

    def execute(self, argv: Sequence[str], *, input: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:  # noqa: A002
        """Run a command on the node as root, without SSH. Tests use it to inspect a node."""
        answer = self.room.ask({"do": "execute", "node": self.name, "argv": list(argv), "input": input, "timeout": timeout})
        return subprocess.CompletedProcess(list(argv), answer["code"], answer["out"], answer["err"])

    def processes(self) -> list[Json]:
        """All processes on the node: pid, argv, environ, rss."""
        processes: list[Json] = self.room.ask({"do": "processes", "node": self.name})["processes"]
        return processes

    def off(self) -> None:
        """Power off: kill all processes at once, without any message."""
        self.room.ask({"do": "stop", "node": self.name})

    def boot(self, spec: NodeSpec | None = None) -> None:
        """Power on again, optionally with another specification."""
        self.spec = spec or self.spec
        self.room.boot([self])


class Rig:
    """The nodes and their network. Created by `open_rig()`."""

    def __init__(self, folder: Path, room: subprocess.Popen[str], daemon: sshd.Sshd, python: Path | None) -> None:
        self.folder = folder
        self._process = room
        self._daemon = daemon
        self._python = python
        self._lock = threading.Lock()
        self.nodes: list[RigNode] = []

    @property
    def share(self) -> Path:
        """The shared folder, on this machine."""
        return Path(f"/proc/{self._process.pid}/root{self.folder / 'share'}")

    @property
    def key(self) -> Path:
        """The private key for the nodes' user."""
        return self.folder / "key"

    @property
    def ips(self) -> Path:
        """ips.txt, the head first."""
        return self.folder / "ips.txt"

    @property
    def known_hosts(self) -> Path:
        """The original host keys of the nodes, for programs other than `deploy init`."""
        return self.folder / "known_hosts"

    def __getitem__(self, name: str) -> RigNode:
        return next(node for node in self.nodes if name in (node.name, node.address))

    def ask(self, request: Json) -> Json:
        """Send one request to the room. Raises HostError."""
        with self._lock:
            assert self._process.stdin
            assert self._process.stdout
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                assert self._process.stderr
                reason = last_line(self._process.stderr.read(), "it ended")
                raise HostError(f"cannot create the rehearsal's namespaces: {reason}", remedy=_REMEDY)
        answer: Json = json.loads(line)
        if "error" in answer:
            raise HostError(f"cannot create the rehearsal's namespaces: {answer['error']}", remedy=_REMEDY)
        result: Json = answer["ok"]
        return result

    def command(self, argv: Sequence[str]) -> list[str]:
        """Arguments that run `argv` in the nodes' network. The command ends with the room, and with its parent."""
        inner = ["setpriv", "--pdeathsig", "TERM", "--", "env", "--chdir", str(Path.cwd()), *argv]
        first = only_child(self._process.pid)
        if first is None:
            raise HostError("the rehearsal's namespaces have ended", remedy="repeat the command")
        return ["nsenter", "-t", str(first), "--net", "--pid", "--mount", *inner]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Create sockets and processes of this thread in the nodes' network within the block."""
        libc = ctypes.CDLL(None, use_errno=True)
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/proc/{self._process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(there, CLONE_NEWNET):
                raise HostError(f"cannot enter the rehearsal's network: {os.strerror(ctypes.get_errno())}", remedy=_REMEDY)
            try:
                yield
            finally:
                libc.setns(own, CLONE_NEWNET)
        finally:
            os.close(own)
            os.close(there)

    # creating nodes

    def boot(self, nodes: Sequence[RigNode]) -> None:
        """Start nodes in parallel, and wait for their sshd."""
        for node in nodes:
            self._prepare(node)
        script = str(resources.files("deploy") / "data" / "rehearsal" / "node.sh")
        self.ask({"do": "start", "script": script, "nodes": {node.name: self._environment(node) for node in nodes}})
        self.wait_ready(nodes)

    def _environment(self, node: RigNode) -> dict[str, str]:
        return {
            "RIG_NAME": self.hostname(node),
            "RIG_FOLDER": str(node.folder),
            "RIG_SHARE": str(self.folder / "share"),
            "RIG_MOUNT": MOUNT,
            "RIG_USER": USER,
            "RIG_ADDRESS": node.address,
            "RIG_GATEWAY": GATEWAY,
            "RIG_ROOT": "",
            "RIG_QEMU": "",
            "RIG_BINFMT": "",
            "RIG_SSHD": self._daemon.program,
            "RIG_LIBRARIES": str(self._daemon.libraries or ""),
            "RIG_PYTHON": str(self._python or ""),
            "RIG_GPUS": "",
            **node.spec.variables,
        }

    def hostname(self, node: RigNode) -> str:
        """A host name like that of a cloud provider."""
        return f"node-{node.address.replace('.', '-')}"

    def wait_ready(self, nodes: Sequence[RigNode], seconds: float = 30) -> None:
        """Wait until the sshd of each node listens. Raises HostError with the end of its log."""
        deadline = time.monotonic() + seconds
        for node in nodes:
            log, boot = node.folder / "sshd.log", node.folder / "boot.log"
            while "Server listening" not in log.read_text():
                words = boot.read_text()  # errors of the commands in node.sh
                if words.strip() or time.monotonic() > deadline:
                    last = last_line(words or log.read_text(), "its log is empty")
                    raise HostError(f"{node.name} did not start: {last}", remedy=_REMEDY)
                time.sleep(0.02)

    def _prepare(self, node: RigNode) -> None:
        """The files of a node: its /etc, its home, its keys."""
        for name, mode in (("etc", 0o755), ("home", 0o750), ("tmp", 0o1777)):
            folder = node.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(mode)
        os.chown(node.home, UID, UID)
        name = self.hostname(node)
        addresses = "".join(f"{other.address} {self.hostname(other)}\n" for other in self.nodes)
        etc = {
            "passwd": f"root:x:0:0:root:/root:/bin/bash\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
            f"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n{USER}:x:{UID}:{UID}::/home/{USER}:/bin/bash\n",
            "group": f"root:x:0:\ntty:x:5:\nutmp:x:43:\nnogroup:x:65534:\n{USER}:x:{UID}:\n",
            "shadow": f"root:*:19000::::::\nsshd:*:19000::::::\n{USER}:*:19000::::::\n",
            "hosts": f"127.0.0.1 localhost\n{addresses}",
            "hostname": f"{name}\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
            "sshd_config": self._sshd_config(node),
            "authorized_keys": (self.folder / "key.pub").read_text(),
        }
        for file, text in etc.items():
            (node.folder / "etc" / file).write_text(text)
        for log in ("sshd.log", "boot.log"):
            (node.folder / log).write_text("")
        if not (node.folder / "etc" / "host_key").exists():
            self.make_host_key(node)
        node.spec.change(node)

    def _sshd_config(self, node: RigNode) -> str:
        env = {**({"PATH": f"/run/rig-python/bin:{NODE_PATH}"} if self._python else {}), **node.spec.env}
        lines = [
            f"ListenAddress {node.address}",
            "HostKey /run/rig/etc/host_key",
            "AuthorizedKeysFile /run/rig/etc/authorized_keys",
            "PidFile none",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PrintMotd no",
            "Subsystem sftp internal-sftp",
            *([f"SshdSessionPath {self._daemon.session}"] if self._daemon.session else []),
            *(["SetEnv " + " ".join(f'"{key}={value}"' for key, value in env.items())] if env else []),
        ]
        return "\n".join(lines) + "\n"

    def make_host_key(self, node: RigNode) -> None:
        """Create a new host key in the node's folder."""
        key = node.folder / "etc" / "host_key"
        for path in (key, key.with_suffix(".pub")):
            path.unlink(missing_ok=True)
        (node.folder / "sshd.log").write_text("")
        _keygen(key)

    def write_lists(self) -> None:
        """Write ips.txt and known_hosts."""
        self.ips.write_text("".join(f"{node.address}\n" for node in self.nodes))
        keys = [(node, (node.folder / "etc" / "host_key.pub").read_text().split()[:2]) for node in self.nodes]
        self.known_hosts.write_text("".join(f"{node.address} {' '.join(key)}\n" for node, key in keys))

    def close(self) -> None:
        """End everything, by closing the room's stdin."""
        with self._process as room:
            assert room.stdin
            with suppress(BrokenPipeError):
                room.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                room.wait(timeout=20)
            room.kill()  # its child dies with it


_REMEDY = "run the rehearsal as root, on a machine or in a container in which root may create namespaces"


def check_machine(python: str = interpreter.VERSION) -> None:
    """Check that this machine can run nodes with the version `python`. Raises HostError if something is missing."""
    if sys.platform != "linux":
        raise HostError("the rehearsal requires Linux namespaces", remedy="run it on Linux, for example in a virtual machine")
    for program, package in (
        ("ip", "iproute2"),
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
        ("ssh-keygen", "openssh-client"),
    ):
        if shutil.which(program) is None:
            raise HostError(f"the rehearsal requires {program}", remedy=f"as root, run `apt-get install {package}`")
    if os.geteuid() != 0:
        raise HostError("the rehearsal creates network namespaces, which requires root", remedy="use sudo, or a root shell")
    interpreter.find(settings.load().home, python)


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "rehearsal", "-f", str(path)], check=True)


@contextmanager
def open_rig(
    folder: Path,
    *,
    count: int,
    specs: Mapping[str, NodeSpec] | None = None,
    share_size: str | None = None,
    python: str = interpreter.VERSION,
) -> Iterator[Rig]:
    """Run `count` nodes k0, k1, … with the shared folder `MOUNT`. They end with the block, or with its process.

    `folder` is created and keeps the files of the nodes; the caller removes it. `share_size`: make the share a tmpfs of this
    size (as in mount's `size=`), which can become full. `python`: version of Python on the nodes.

    Raises:
        HostError: the user is not root, a program is missing, or the kernel refuses.
    """
    check_machine(python)
    home = settings.load().home
    daemon, brought = sshd.find(home), interpreter.find(home, python)
    folder = folder.resolve()
    (folder / "share").mkdir(parents=True, exist_ok=True)
    os.chown(folder / "share", UID, UID)
    if not (folder / "key").exists():
        _keygen(folder / "key")
    process = subprocess.Popen(
        [
            "unshare",
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
            sys.executable,
            "-m",
            "deploy.rehearsal.room",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rig = Rig(folder, process, daemon, brought)
    try:
        rig.ask({"do": "open", "gateway": f"{GATEWAY}/24", "share": str(folder / "share"), "size": share_size})
        rig.nodes = [RigNode(rig, rank, (specs or {}).get(f"k{rank}", NodeSpec())) for rank in range(count)]
        rig.boot(rig.nodes)
        rig.write_lists()
        yield rig
    finally:
        rig.close()

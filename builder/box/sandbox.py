"""The sandbox for untrusted code: bubblewrap with a read-only root, without network, with a memory limit.

Every build sees the same: the files of the root, host name `build`, user `build` (1000), an empty /tmp and home, and the given
variables, but nothing of the host's environment. Only files in writable mounts remain afterwards.
docs/explanation/sandbox.md describes each guarantee.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from builder.box import meter
from builder.box.meter import KINDS, MemoryBy, Meter
from builder.box.place import Place
from gracefarm.errors import HostError
from gracefarm.files import full_disk

HOSTNAME = "build"
HOME = "/home/build"
TMP = str(Path("/", "tmp"))
UID = GID = 1000
"User and group inside; outside they are the builder's."

NetworkBy = Literal["recorder", "log", "host"]

KILLED = 137
"Return code of a command that the sandbox killed; a shell uses the same for SIGKILL."

DATA = Path(__file__).parent.parent / "data" / "sandbox"
"Files that replace those of the root in /etc, if they exist there."

_NOT_FROM_ROOT = frozenset({"proc", "sys", "dev", "tmp", "run", "home", "root", "boot", "media", "mnt", "srv", "lost+found"})
_QEMU = {
    # Until qemu 8.0, a forked child can hang: qemu allocates with GLib's slices, and another thread may hold their lock at
    # the fork (https://gitlab.com/qemu-project/qemu/-/issues/285).
    "qemu-*-static": {"G_SLICE": "always-malloc"},
    # Debian 13's programs sign return addresses. qemu computes the signatures so slowly that its Python takes 3.5 times as
    # long. Without this feature of the CPU, the instructions do nothing.
    "qemu-aarch64-static": {"QEMU_CPU": "max,pauth=off"},
}
"Variables for the emulators in a root, by their file name."
_FIRST_TICK, _TICK = 0.02, 0.2
"Seconds between two measurements; short at first, for short commands."
_PATIENCE = 30.0
"Maximum seconds for the kernel to end all processes."
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class BindMount:
    """A folder or file of the host that the sandbox sees."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """The environment of a command inside."""

    root: Path
    "Read-only root file system: a Debian tree, merged /usr."
    mounts: tuple[BindMount, ...]
    environment: Mapping[str, str]
    "Complete: nothing is inherited from the host."
    workdir: str
    memory: int
    "Maximum bytes of memory of the whole process tree."
    network: bool = False
    "Share the host's network. Used only to install from an index."
    devices: tuple[str, ...] = ()
    "Device files of the host, for a smoke test on a GPU."

    hostname = HOSTNAME
    hears_every_name = True

    @property
    def reads(self) -> tuple[Path, ...]:
        """The root, and the sources of the mounts that are not writable."""
        return (self.root, *(mount.source for mount in self.mounts if not mount.writable))

    def command(self, argv: Sequence[str], *, terminal: bool = False) -> list[str]:
        """The complete bubblewrap command line that runs `argv`. It can be run manually, then without the memory limit."""
        # --new-session would remove the terminal and with it job control.
        return ["bwrap", *(() if terminal else ("--new-session",)), *_options(self), "--", *argv]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a command. The return code is that of the command, or 128 + N after signal N."""

    returncode: int
    wall_s: float
    cpu_s: float
    "CPU seconds of the whole tree, including daemons."
    peak_memory: int
    "Peak bytes of anonymous and shared memory of the tree, sampled; the limit if it was exceeded."
    memory_bound: int
    memory_by: str
    "One of meter.KINDS, or podman or docker if these enforce the limit of their container."
    killed_by_memory: bool
    reached: tuple[str, ...]
    "Network attempts of the command: host names, `address:port`; each once, in order."
    network_by: NetworkBy = "recorder"
    "Source of these attempts: the recorder, or `log` for the output; `host`: not observed, since the network was shared."


def run(
    place: Place,
    argv: Sequence[str],
    *,
    log: Path,
    on_line: Callable[[str], None] | None = None,
    memory_by: Sequence[MemoryBy] = KINDS,
    record: bool = True,
) -> Outcome:
    """Run `argv` inside; append its output to `log` and pass each line to `on_line`.

    No process of the sandbox outlives this function, regardless of how it ends (the command's end, the limit, an exception,
    Ctrl-C, SIGKILL). `memory_by` restricts the kinds of memory limits, `record` switches the recorder of network attempts;
    both are for tests and unusual machines.

    Raises:
        HostError: the sandbox cannot be started on this machine.
        DiskFullError: the log cannot be written.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with full_disk(log.parent), log.open("ab") as stream, contextlib.closing(_Lines(on_line)) as lines:

        def write(chunk: bytes) -> None:
            stream.write(chunk)
            stream.flush()
            lines.feed(chunk)

        with _tree(place, place.command(argv), write=write, memory_by=memory_by, record=record) as tree:
            tree.follow()
    return tree.outcome(lines)


def shell(place: Place, argv: Sequence[str] = ("/bin/bash",)) -> int:
    """Run `argv` inside on this terminal, and return its exit code.

    Raises:
        HostError: the sandbox cannot be started on this machine (bubblewrap's message is on the terminal), or was killed.
    """
    with _tree(place, place.command(argv, terminal=True), write=None) as tree:
        while True:
            try:
                tree.follow()
                break
            except KeyboardInterrupt:  # for the program inside
                continue
    if tree.exit is None:
        raise HostError(
            "the sandbox of the shell could not be started, or it was killed",
            remedy="see the message of bwrap above; if there is none, repeat the command. `builder doctor` tests whether "
            "sandboxes start on this machine",
        )
    return tree.exit


def check() -> str | None:
    """Why this machine cannot start a sandbox, from a real attempt; None if it can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap (the program bwrap) is not installed"
    probe = Sandbox(root=Path("/"), mounts=(), environment={}, workdir="/", memory=meter.available_memory())
    tried = subprocess.run(probe.command(["/bin/true"]), capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else _explain(tried.stderr)


# --- the command line --------------------------------------------------------------------------------------------------------


def _options(sandbox: Sandbox) -> list[str]:
    environment = _for_emulators(sandbox.root) | dict(sandbox.environment)
    return [
        *("--unshare-all", "--unshare-user", "--die-with-parent", "--hostname", HOSTNAME),
        *(("--share-net",) if sandbox.network else ()),
        # Root would keep capabilities, which could remount the root writable.
        *("--uid", str(UID), "--gid", str(GID), "--cap-drop", "ALL"),
        *_file_system(sandbox),
        "--clearenv",
        *(word for key in sorted(environment) for word in ("--setenv", key, environment[key])),
        *("--chdir", sandbox.workdir),
    ]


def _for_emulators(root: Path) -> dict[str, str]:
    emulators = [pattern for pattern in _QEMU if any((root / "usr/bin").glob(pattern))]
    return {name: value for pattern in emulators for name, value in _QEMU[pattern].items()}


def _file_system(sandbox: Sandbox) -> Iterator[str]:
    """A tmpfs as /, so that the root needs no mount points, with its folders bound into it; then all is made read-only."""
    covered = _NOT_FROM_ROOT | {Path(mount.target).parts[1] for mount in sandbox.mounts if len(Path(mount.target).parts) == 2}
    for entry in sorted(sandbox.root.iterdir()):
        if entry.name in covered:
            continue
        if entry.is_symlink():
            yield from ("--symlink", str(entry.readlink()), f"/{entry.name}")
        elif entry.is_dir():
            yield from ("--ro-bind", str(entry), f"/{entry.name}")
    yield from ("--proc", "/proc", "--dev", "/dev")
    for device in sandbox.devices:
        yield from ("--dev-bind", device, device)
    yield from ("--perms", "1777", "--tmpfs", TMP, "--tmpfs", HOME, "--dir", "/run")
    yield from _etc(sandbox)
    for mount in sandbox.mounts:
        yield from ("--bind" if mount.writable else "--ro-bind", str(mount.source), mount.target)
    # If root builds, the build can write root's files in /proc/sys, and could escape by kernel.core_pattern.
    yield from _kernel_files() if sandbox.devices else ("--remount-ro", "/proc")
    yield from ("--remount-ro", "/")


def _kernel_files() -> Iterator[str]:
    """Make only those files in /proc read-only that belong to no process.

    With a read-only /proc, cuInit of NVIDIA's driver 580 fails with CUDA_ERROR_OPERATING_SYSTEM (304).
    """
    for entry in sorted(Path("/proc").iterdir()):
        if entry.name.isdecimal() or entry.is_symlink():
            continue
        if entry.is_dir() or entry.stat().st_mode & 0o222:
            yield from ("--ro-bind", str(entry), str(entry))


def _etc(sandbox: Sandbox) -> Iterator[str]:
    """Mount our hosts, resolv.conf, passwd, group and nsswitch.conf over those of the root. Missing files cannot be mounted.

    Without them, the C library's defaults have the same effect: DNS at 127.0.0.1, which is the recorder.
    """
    for source in sorted(DATA.iterdir()):
        target = sandbox.root / "etc" / source.name
        if source.name == "resolv.conf" and sandbox.network:
            source = Path("/etc/resolv.conf").resolve()
        if target.is_file() and not target.is_symlink() and source.is_file():
            yield from ("--ro-bind", str(source), f"/etc/{target.name}")


# --- the tree of processes ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Tree:
    """A running sandbox."""

    supervisor: subprocess.Popen[bytes]
    report: int
    control: int
    meter: Meter
    place: Place
    write: Callable[[bytes], None] | None
    started: float = field(default_factory=time.monotonic)
    peak: int = 0
    cpu_s: float = 0.0
    over: bool = False
    exit: int | None = None
    unwatched: str | None = None
    reached: dict[str, None] = field(default_factory=dict)
    _partial: bytes = b""

    def follow(self) -> None:
        """Forward output and reports, and enforce the limits, until all pipes are closed and thus all processes have ended."""
        tick = _FIRST_TICK
        with selectors.DefaultSelector() as selector:
            selector.register(self.report, selectors.EVENT_READ, self._on_report)
            if self.supervisor.stdout is not None:
                selector.register(self.supervisor.stdout.fileno(), selectors.EVENT_READ, self.write)
            due = time.monotonic() + tick
            while selector.get_map():
                for key, _ in selector.select(max(0.0, due - time.monotonic())):
                    if chunk := os.read(key.fd, _CHUNK):
                        key.data(chunk)
                    else:
                        selector.unregister(key.fd)
                if time.monotonic() >= due:
                    self._measure()
                    if self.over:
                        self._end()
                    tick = min(2 * tick, _TICK)
                    due = time.monotonic() + tick

    def stop(self) -> None:
        """End the tree if it still runs, and wait for it."""
        self._end()
        os.close(self.report)
        if self.supervisor.stdout is not None:
            self.supervisor.stdout.close()
        try:
            self.supervisor.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()
        self._measure()

    def outcome(self, lines: _Lines) -> Outcome:
        """The figures, after `stop`.

        Raises:
            HostError: the command never ran.
        """
        if self.exit is None and lines.complaint:
            raise HostError(
                f"the sandbox could not be started: {_explain(lines.complaint)}",
                remedy="run `builder doctor --fix`, as root or with sudo; it allows sandboxes on this machine, or says what "
                "prevents them",
            )
        by_log = self.unwatched is not None or (not self.place.hears_every_name and not self.reached)
        return Outcome(
            returncode=KILLED if self.exit is None else self.exit,
            wall_s=time.monotonic() - self.started,
            cpu_s=self.cpu_s,
            peak_memory=max(self.peak, self.place.memory) if self.over else self.peak,
            memory_bound=self.place.memory,
            memory_by=self.meter.by,
            killed_by_memory=self.over,
            reached=() if self.place.network else tuple(lines.reached if by_log else self.reached),
            network_by="host" if self.place.network else "log" if by_log else "recorder",
        )

    def _end(self) -> None:
        """Tell the supervisor to kill the tree."""
        if self.control >= 0:
            os.close(self.control)
            self.control = -1

    def _measure(self) -> None:
        reading = self.meter.read()
        self.peak = max(self.peak, reading.memory)
        self.cpu_s = max(self.cpu_s, reading.cpu_s)
        self.over = self.over or reading.over

    def _on_report(self, chunk: bytes) -> None:
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for message in map(json.loads, lines):
            if "init" in message:
                self.unwatched = message["unwatched"]
                if message["init"] is not None and self.control >= 0:
                    with contextlib.suppress(ProcessLookupError):  # bubblewrap has failed; its report comes next
                        self.meter.attach(message["init"])
                    with contextlib.suppress(BrokenPipeError):  # the same, and the supervisor has already ended
                        os.write(self.control, b"g")
            elif "reached" in message:
                self.reached[message["reached"]] = None
            else:
                self.exit = message["exit"]
                self.cpu_s = max(self.cpu_s, message["cpu_s"])


@contextlib.contextmanager
def _tree(
    place: Place,
    line: Sequence[str],
    *,
    write: Callable[[bytes], None] | None,
    memory_by: Sequence[MemoryBy] = KINDS,
    record: bool = True,
) -> Iterator[_Tree]:
    """Start a sandbox. After the block, nothing of it is left.

    Raises:
        HostError: bubblewrap is missing.
    """
    program = shutil.which(line[0])
    if program is None:
        raise HostError(
            "bubblewrap (the program bwrap) is not installed", remedy="run `builder doctor --fix`, which installs it"
        )
    bound = meter.open_meter(place.memory, memory_by)
    with contextlib.closing(bound):
        control_read, control_write = os.pipe()
        report_read, report_write = os.pipe()
        try:
            supervisor = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-c", _START, str(Path(__file__).parents[2])),
                    *(str(control_read), str(report_write), "record" if record and not place.network else "plain"),
                    *(place.hostname, program, *line[1:]),
                ],
                stdin=None if write is None else subprocess.DEVNULL,
                stdout=None if write is None else subprocess.PIPE,
                stderr=None if write is None else subprocess.STDOUT,
                pass_fds=(control_read, report_write),
                # Ctrl-C on the terminal is for the builder, which ends the tree itself.
                start_new_session=write is not None,
                env={},
            )
        finally:
            os.close(control_read)
            os.close(report_write)
        tree = _Tree(
            supervisor=supervisor,
            report=report_read,
            control=control_write,
            meter=bound,
            place=place,
            write=write,
        )
        try:
            yield tree
        finally:
            tree.stop()


_START = "import sys; sys.path.append(sys.argv.pop(1)); from builder.box.supervisor import main; main()"


# --- the output --------------------------------------------------------------------------------------------------------------


class _Lines:
    """Splits output into lines and keeps the relevant ones."""

    def __init__(self, on_line: Callable[[str], None] | None) -> None:
        self._on_line = on_line
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._partial = ""
        self.complaint = ""
        "Bubblewrap's last message."
        self.reached: dict[str, None] = {}

    def feed(self, chunk: bytes) -> None:
        """Add received bytes."""
        *lines, self._partial = (self._partial + self._decoder.decode(chunk)).split("\n")
        for line in lines:
            self._line(line)

    def close(self) -> None:
        """Add a last line without a newline."""
        if self._partial:
            self._line(self._partial)

    def _line(self, line: str) -> None:
        line = line.removesuffix("\r")
        if line.startswith(("bwrap: ", "launcher: ")):
            self.complaint = line
        if wanted := reached_in(line):
            self.reached[wanted] = None
        if self._on_line is not None:
            self._on_line(line)


_UNREACHABLE = re.compile(r"Temporary failure in name resolution|Network is unreachable|Could not resolve host")
_HOST = re.compile(r"host='([\w.-]+)'|resolve host: ([\w.-]+)|host address .([\w.-]+)")


def reached_in(line: str) -> str | None:
    """The host that a line of a build's output reports as unreachable, else the line; None if it reports no such failure.

    For machines on which the recorder does not work.
    """
    if not _UNREACHABLE.search(line):
        return None
    host = _HOST.search(line)
    return host[host.lastindex or 0] if host else line.strip()[:200]


_FORBIDDEN = (
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor forbids unprivileged programs to create them"),
    ("kernel/unprivileged_userns_clone", "0", "the kernel allows only root to create them"),
    ("user/max_user_namespaces", "0", "their number is limited to zero"),
)


def _explain(complaint: str) -> str:
    """Bubblewrap's message and its cause: forbidden user namespaces, or a folder that root may not enter in a namespace."""
    text = complaint.strip().removeprefix("bwrap: ").removeprefix("launcher: ") or "it ended without a message"
    if "source path" in text and text.endswith("Permission denied") and os.getuid() == 0:
        return (
            f"{text}; in a sandbox, root cannot enter a private folder of another user: build as the owner of the folder, or "
            "set GRACEFARM_HOME to a different folder"
        )
    if not re.search(r"namespace|uid map|RTM_NEWADDR|unshare|clone", text):
        return text
    for name, value, reason in _FORBIDDEN:
        with contextlib.suppress(OSError):
            if (Path("/proc/sys") / name).read_text().strip() == value:
                return f"user namespaces cannot be created: {reason} ({name.replace('/', '.')} = {value}; bwrap: {text})"
    return text

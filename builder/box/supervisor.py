"""The process between the builder and bubblewrap. It starts the sandbox, records its network attempts, and ends it.

The builder may be killed at any moment, and bubblewrap's --die-with-parent has a gap: the sandbox's first process requests it
only when it starts the command. Therefore this process, a child of the builder in a new session, is the parent ("subreaper")
of all processes of the sandbox. When its control pipe closes, the builder has ended, and it kills processes until none
is left. If it is killed itself, --die-with-parent has the same effect.

    supervisor CONTROL REPORT record|plain HOSTNAME BWRAP ARGUMENT...

CONTROL is a pipe: a byte starts the command, closing it stops everything. REPORT receives JSON lines: first `init` (the id of
the sandbox's first process, or null if bubblewrap failed) and `unwatched` (why attempts are not recorded, or null); `reached`
for each attempt; finally `exit` (status of the command, or null if it never ran or was killed by us) and `cpu_s`.
This file imports only the standard library, for a start in hundredths of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from builder.box import netwatch

PR_SET_CHILD_SUBREAPER = 36
OPTIONS = "@options"
"Position of the descriptors of status and gate in the arguments of a launcher; bubblewrap takes them first."

Send = Callable[[dict[str, object]], None]


def main() -> None:
    """Run as described above."""
    control, report, record, hostname, *bwrap = sys.argv[1:]
    for descriptor in (control, report):
        os.set_inheritable(int(descriptor), False)  # the sandbox must not inherit them
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # In a shell these come from the terminal and are for the command. Use a handler: the command would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda _number, _frame: None)

    def send(message: dict[str, object]) -> None:
        os.write(int(report), json.dumps(message).encode() + b"\n")

    try:
        supervise(bwrap, int(control), send, hostname if record == "record" else None)
    except BrokenPipeError:  # the builder has ended, so the pipe has no reader
        end_tree()


def supervise(bwrap: list[str], control: int, send: Send, hostname: str | None) -> None:
    """Start bubblewrap, wait for its end, and leave no process. Attempts are recorded if there is a `hostname`."""
    monitor, status, gate = start(bwrap)
    with os.fdopen(status, encoding="ascii") as lines, selectors.DefaultSelector() as selector:
        first = lines.readline()
        init = int(json.loads(first)["child-pid"]) if first else None
        unwatched = "not requested" if hostname is None else None
        if init is not None and hostname is not None:
            try:
                netwatch.start(init, selector, hostname, lambda text: send({"reached": text}))
            except OSError as error:
                unwatched = str(error)
        send({"init": init, "unwatched": unwatched})
        follow(selector, monitor, control, gate)
        cpu_s = end_tree()
        os.close(gate)  # only now, since bubblewrap starts the command when this pipe is closed
        while ready := selector.select(0):  # remaining data of the sockets
            call(ready)
        status_code = next((json.loads(line)["exit-code"] for line in lines if "exit-code" in line), None)
        send({"exit": status_code, "cpu_s": cpu_s})


def start(bwrap: list[str]) -> tuple[int, int, int]:
    """Start bubblewrap, which waits before the command. Return its process, the status pipe and the gate."""
    status_read, status_write = os.pipe()
    gate_read, gate_write = os.pipe()
    os.set_inheritable(status_write, True)
    os.set_inheritable(gate_read, True)
    options = ["--json-status-fd", str(status_write), "--block-fd", str(gate_read)]
    at = bwrap.index(OPTIONS) if OPTIONS in bwrap else None
    monitor = os.posix_spawn(
        bwrap[0],
        ["bwrap", *options, *bwrap[1:]] if at is None else [*bwrap[:at], *options, *bwrap[at + 1 :]],
        {},  # bubblewrap's environment is readable inside, in /proc/1/environ
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them, and children inherit this
    )
    os.close(status_write)
    os.close(gate_read)
    return monitor, status_read, gate_write


def follow(selector: selectors.BaseSelector, monitor: int, control: int, gate: int) -> None:
    """Serve until bubblewrap ends or the builder stops it."""
    ended = False

    def end() -> None:
        nonlocal ended
        ended = True

    def obey() -> None:
        if os.read(control, 1):
            with contextlib.suppress(BrokenPipeError):  # bubblewrap has failed; its end comes next
                os.write(gate, b"g")
        else:
            end()

    descriptor = os.pidfd_open(monitor)
    selector.register(descriptor, selectors.EVENT_READ, end)
    selector.register(control, selectors.EVENT_READ, obey)
    while not ended:
        call(selector.select())
    selector.unregister(descriptor)
    selector.unregister(control)
    os.close(descriptor)


def call(ready: list[tuple[selectors.SelectorKey, int]]) -> None:
    """Call the callbacks of ready descriptors."""
    for key, _ in ready:
        key.data()


def end_tree() -> float:
    """Kill the remaining processes of the sandbox and reap them. Returns the CPU seconds of all reaped processes."""
    cpu_s = 0.0
    while True:
        # Orphans become our children, so we reap all processes.
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        try:
            _, _, usage = os.wait4(-1, 0)
        except ChildProcessError:
            return cpu_s
        cpu_s += usage.ru_utime + usage.ru_stime


def children() -> list[int]:
    """Our children, from /proc (proc(5): the fourth field of stat is the parent)."""
    pids: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            pids.append(int(stat.parent.name))
    return pids


if __name__ == "__main__":
    main()

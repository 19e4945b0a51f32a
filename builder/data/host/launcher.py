"""Starts a command on this machine without network, with the same interface and guarantees as bubblewrap.

    launcher.py --json-status-fd N --block-fd N SPEC -- ARGUMENT...

SPEC is JSON: environment (complete), workdir, network (true: this machine's network). The first status line is `child-pid`,
the last is `exit-code`. The command starts after one byte on the block descriptor, or when it is closed. If the parent dies,
the command is killed. It uses only the standard library, as builder.box.supervisor, which starts it.
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys

CLONE_NEWUSER, CLONE_NEWNET, PR_SET_PDEATHSIG = 0x10000000, 0x40000000, 1
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
LIBC = ctypes.CDLL(None, use_errno=True)


def leave_network() -> None:
    """Enter a new network namespace with only `lo`; users other than root also need a new user namespace."""
    uid, gid = os.getuid(), os.getgid()
    if LIBC.unshare(CLONE_NEWNET | (0 if uid == 0 else CLONE_NEWUSER)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as stream:  # noqa: PTH123 one write each, as the kernel requires
                stream.write(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        (flags,) = struct.unpack_from("=H", fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("=16s16x", b"lo")), 16)
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("=16sH14x", b"lo", flags | IFF_UP))


def main() -> None:
    """Start the command and report its exit code."""
    status, gate, spec, command = int(sys.argv[2]), int(sys.argv[4]), json.loads(sys.argv[5]), sys.argv[7:]
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        if not spec["network"]:
            leave_network()
    except OSError as error:
        sys.exit(f"launcher: a network namespace cannot be created: {error}")
    child = os.fork()
    if child == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.read(gate, 1)
        os.close(gate)
        os.close(status)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            os.chdir(spec["workdir"])
            os.execvpe(command[0], command, spec["environment"])  # noqa: S606 the command itself
        except OSError as error:
            sys.stderr.write(f"launcher: {command[0]}: {error.strerror}\n")
            os._exit(127)
    os.close(gate)
    os.write(status, json.dumps({"child-pid": child}).encode() + b"\n")
    _, result = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(result)
    os.write(status, json.dumps({"exit-code": 128 - code if code < 0 else code}).encode() + b"\n")


main()

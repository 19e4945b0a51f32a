"""The promises of the sandbox hold for the target's programs too, which run under qemu where the host is another machine."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.box import sandbox
from builder.box.sandbox import BindMount, Outcome, Sandbox
from builder.ground import root
from builder.planning import stack
from builder.planning.stack import Arch, host_arch
from tests.conftest import Farm

MIB = 1 << 20

Run = Callable[..., Outcome]


@pytest.fixture
def program(farm: Farm, tmp_path: Path) -> Run:
    """Runs a command in the project's own root for aarch64; the log is tmp_path/log."""
    tree = root.ensure(stack.load(farm.settings.project / "stacks", "cu130"), host_arch(), Arch.AARCH64, farm.settings)
    (tmp_path / "build").mkdir()

    def run(command: list[str], memory: int = 1024 * MIB) -> Outcome:
        box = Sandbox(
            root=tree,
            mounts=(BindMount(source=tmp_path / "build", target="/build", writable=True),),
            environment={"PATH": "/opt/gracefarm/bin:/usr/bin:/bin", "HOME": sandbox.HOME, "LANG": "C.UTF-8"},
            workdir="/build",
            memory=memory,
        )
        return sandbox.run(box, command, log=tmp_path / "log")

    return run


@pytest.fixture
def python(program: Run) -> Run:
    """Runs a script with the target's own Python."""

    def run(script: str, memory: int = 1024 * MIB) -> Outcome:
        return program(["/usr/bin/python3", "-c", textwrap.dedent(script)], memory)

    return run


@pytest.mark.skipif(host_arch() is Arch.AARCH64, reason="nothing is emulated")
def test_no_program_signs_return_addresses(python: Run, tmp_path: Path) -> None:
    """qemu computes the signatures slowly. PACA is bit 30 of AT_HWCAP (16)."""
    python("import ctypes; print(ctypes.CDLL(None).getauxval(16) >> 30 & 1)")
    assert (tmp_path / "log").read_text() == "0\n"


FORKS = """
#include <cstdio>
#include <cstdlib>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

static void threads(unsigned depth) {
    if (depth == 0) return;
    std::thread one(threads, depth - 1), other(threads, depth - 1);
    const pid_t pid = fork();
    if (pid == 0) exit(0);
    waitpid(pid, nullptr, 0);
    one.join();
    other.join();
}

int main() { threads(9); puts("ended"); }
"""


def test_no_forked_child_of_a_program_with_threads_hangs(program: Run, tmp_path: Path) -> None:
    (tmp_path / "build/forks.cpp").write_text(FORKS)
    emulator = "" if host_arch() is Arch.AARCH64 else "/usr/bin/qemu-aarch64-static"
    outcome = program(["sh", "-ec", f"cd /build; g++ -static -pthread forks.cpp -o forks; timeout 120 {emulator} ./forks"])
    assert (tmp_path / "log").read_text() == "ended\n"
    assert outcome.returncode == 0


def test_it_is_the_targets_python_with_our_user_and_host_name(python: Run, tmp_path: Path) -> None:
    outcome = python("""
        import os, platform, pwd, socket
        print(platform.machine(), os.getuid(), pwd.getpwuid(1000).pw_name, socket.gethostname(), socket.gethostbyname("build"))
        open("/build/made", "w").close()
        try: open("/usr/made", "w")
        except OSError as error: print(error.strerror)
    """)
    assert outcome.returncode == 0
    assert (tmp_path / "log").read_text() == "aarch64 1000 build build 127.0.0.1\nRead-only file system\n"
    assert outcome.reached == ()


def test_what_it_reaches_for_is_recorded(python: Run) -> None:
    outcome = python("""
        import socket, urllib.request
        for attempt in (
            lambda: urllib.request.urlopen("http://example.org"),
            lambda: socket.create_connection(("93.184.216.34", 443)),
        ):
            try: attempt()
            except OSError as error: print(error)
    """)
    assert outcome.reached == ("example.org", "93.184.216.34:443")


def test_its_memory_is_bounded(python: Run, tmp_path: Path) -> None:
    outcome = python("block = b'x' * (600 << 20); import time; time.sleep(2); print('survived')", memory=300 * MIB)
    assert outcome.killed_by_memory
    assert "survived" not in (tmp_path / "log").read_text()

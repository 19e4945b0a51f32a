"""What the sandbox measures and bounds: memory and CPU time of the whole tree, by each way that this machine has."""

from __future__ import annotations

import subprocess
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from builder.box.meter import KINDS, MemoryBy, Watchdog, open_meter
from gracefarm.errors import HostError
from tests.integration.sandbox.kit import MIB, USERS, User, acting_as, driver_environment, processes, wait_for


def kinds() -> list[MemoryBy]:
    """The ways to bound memory that this machine has."""
    found: list[MemoryBy] = []
    for kind in KINDS:
        try:
            open_meter(64 * MIB, (kind,)).close()
        except HostError:
            continue
        found.append(kind)
    return found


@dataclass(frozen=True, kw_only=True)
class Metered:
    """A user with one way to bound memory."""

    user: User
    kind: MemoryBy


@pytest.fixture(params=[("self", kind) for kind in kinds()] + [(name, "watchdog") for name in USERS[1:]], ids="-".join)
def metered(request: pytest.FixtureRequest) -> Iterator[Metered]:
    """Each way that this machine has; the ordinary user has only the watchdog, because cgroups belong to root here."""
    name, kind = request.param
    with acting_as(name) as someone:
        yield Metered(user=someone, kind=kind)


ALLOCATE = """
    import time
    print("begun", flush=True)
    block = b"x" * ({mib} << 20)
    time.sleep(2)
    print("survived", flush=True)
"""


def test_more_memory_than_the_bound_is_killed(metered: Metered) -> None:
    outcome = metered.user.python_run(
        ALLOCATE.format(mib=600), box=metered.user.box(memory=200 * MIB), memory_by=[metered.kind]
    )
    assert outcome.killed_by_memory
    assert outcome.memory_by == metered.kind
    assert outcome.returncode == 137
    assert outcome.peak_memory >= outcome.memory_bound == 200 * MIB
    assert metered.user.text.startswith("begun\n")
    assert "survived" not in metered.user.text


def test_less_memory_than_the_bound_is_left_alone_and_measured(metered: Metered) -> None:
    outcome = metered.user.python_run(
        ALLOCATE.format(mib=120), box=metered.user.box(memory=200 * MIB), memory_by=[metered.kind]
    )
    assert not outcome.killed_by_memory
    assert outcome.returncode == 0
    assert 120 * MIB <= outcome.peak_memory < 160 * MIB


def test_the_bound_is_the_trees_not_the_process(metered: Metered) -> None:
    outcome = metered.user.python_run(
        """
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                block = b"x" * (80 << 20)
                time.sleep(5)
                os._exit(0)
        for _ in range(4):
            print(os.wait()[1])
        time.sleep(5)
        """,
        box=metered.user.box(memory=200 * MIB),
        memory_by=[metered.kind],
    )
    assert outcome.killed_by_memory
    assert outcome.returncode == 137


def test_a_kill_deep_inside_is_not_mistaken_for_a_compile_error(metered: Metered) -> None:
    """As ninja and make have it: the parent lives on and returns its own code."""
    script = textwrap.dedent(ALLOCATE.format(mib=600))
    outcome = metered.user.python_run(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}]); sys.exit(1)",
        box=metered.user.box(memory=200 * MIB),
        memory_by=[metered.kind],
    )
    assert outcome.killed_by_memory
    assert outcome.returncode in (1, 137)


def test_memory_that_forks_share_counts_once(metered: Metered) -> None:
    outcome = metered.user.python_run(
        """
        import os, time
        block = b"x" * (100 << 20)
        for _ in range(5):
            if os.fork() == 0:
                time.sleep(1)
                os._exit(0)
        print([os.wait()[1] for _ in range(5)])
        """,
        box=metered.user.box(memory=250 * MIB),
        memory_by=[metered.kind],
    )
    assert not outcome.killed_by_memory
    assert outcome.peak_memory < 200 * MIB


def test_files_in_the_private_temporary_folder_count(metered: Metered) -> None:
    fill = "head -c {size}M /dev/zero >/tmp/big; sleep 2"
    box, kinds = metered.user.box(memory=200 * MIB), [metered.kind]
    assert metered.user.run("/bin/sh", "-c", fill.format(size=400), box=box, memory_by=kinds).killed_by_memory
    outcome = metered.user.run("/bin/sh", "-c", fill.format(size=100), box=box, memory_by=kinds)
    assert not outcome.killed_by_memory
    assert 100 * MIB <= outcome.peak_memory < 150 * MIB


def test_page_cache_does_not_count(metered: Metered) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", metered.user.build], capture_output=True, text=True, check=True).stdout
    if kind.strip() == "tmpfs":
        pytest.skip("the build folder lies in memory here, so that its files do count")
    outcome = metered.user.run(
        *("/bin/sh", "-c", "head -c 300M /dev/zero >big; cat big >/dev/null; rm big; sleep 0.5"),
        box=metered.user.box(memory=200 * MIB),
        memory_by=[metered.kind],
    )
    assert outcome.returncode == 0
    assert outcome.peak_memory < 100 * MIB


BURN = """
    import os, sys, time
    def burn():
        while time.process_time() < 1:
            pass
        open("/build/burning", "w").write(str(time.process_time()))
        os.rename("/build/burning", "/build/burnt")
    {how}
"""


CHILD = """
    if os.fork() == 0:
        burn()
        os._exit(0)
    os.wait()
"""
# Its parent ends at once, so that only the sandbox's first process waits for it.
DAEMON_CHILD = """
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            burn()
            os._exit(0)
        os._exit(0)
    os.wait()
    while not os.path.exists("/build/burnt"):
        time.sleep(0.05)
    time.sleep(0.2)
"""
# No process waits for this one: it is killed when the command ends.
DAEMON_LEFT = DAEMON_CHILD.replace("burn()", "burn(); time.sleep(1000)").replace("0.2", "1")


@pytest.mark.parametrize(
    "how",
    [
        "burn()",
        CHILD,
        DAEMON_CHILD,
        DAEMON_LEFT,
    ],
    ids=["command", "child", "daemon", "daemon-left"],
)
def test_cpu_time_is_the_trees(metered: Metered, how: str) -> None:
    outcome = metered.user.python_run(BURN.format(how=how), memory_by=[metered.kind])
    assert outcome.returncode == 0, metered.user.text
    burnt = float((metered.user.build / "burnt").read_text())
    assert 0.95 * burnt <= outcome.cpu_s < burnt + 1


def cgroups() -> set[Path]:
    return {path for path in Path("/sys/fs/cgroup").glob("**/gracefarm-*") if path.is_dir()}


@pytest.mark.skipif(kinds() == ["watchdog"], reason="no cgroups here")
def test_cgroups_are_removed_also_those_of_a_killed_builder(me: User, marker: str) -> None:
    before = cgroups()
    me.run("/bin/true")
    assert cgroups() <= before
    line = me.driver(me.box(), ["/bin/sh", "-c", f"echo begun; sleep 1000; echo {marker}"])
    with subprocess.Popen(line, env=driver_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as builder:
        wait_for(lambda: "begun" in me.text, "the build")
        builder.kill()
        builder.communicate(timeout=60)
    left = cgroups() - before
    assert left, "the killed builder cannot have removed them"
    wait_for(lambda: not processes(marker), "the end of all processes")

    def swept() -> bool:
        me.run("/bin/true")
        return not left & cgroups()

    wait_for(swept, "the next start sweeps")


@pytest.mark.parametrize(("bound", "exact"), [(1 << 40, 1), (1 * MIB, 5)], ids=["far below the limit", "maybe above it"])
def test_exact_sizes_are_read_rarely_unless_they_decide(monkeypatch: pytest.MonkeyPatch, bound: int, exact: int) -> None:
    """The kernel walks all pages of a process for its exact size: at every tick that cost a third of a core."""
    read: list[int] = []

    def slow(process: psutil.Process) -> int:
        read.append(process.pid)
        start = time.thread_time()
        while time.thread_time() < start + 0.05:
            pass
        return 2 * MIB

    monkeypatch.setattr("builder.box.meter.proportional_size", slow)
    watchdog = Watchdog(bound)
    with subprocess.Popen(["sleep", "60"]) as process:
        watchdog.attach(process.pid)
        readings = [watchdog.read() for _ in range(5)]
        process.kill()
    assert read == [process.pid] * exact
    assert {reading.over for reading in readings} == {bound < 2 * MIB}
    assert all(reading.memory >= 2 * MIB for reading in readings)

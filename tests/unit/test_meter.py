from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from builder.box import cgroup, meter
from gracefarm.errors import HostError

# As Debian 12 with systemd shows them, and Docker without a cgroup namespace on a machine with version 1.
SYSTEMD = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope\n"
SYSTEMD_MOUNTS = """\
22 27 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
28 22 0:25 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
"""
DOCKER = "9:memory:/docker/0123\n8:cpu,cpuacct:/docker/0123\n1:name=systemd:/docker/0123\n0::/\n"
DOCKER_MOUNTS = """\
610 605 0:29 /docker/0123 /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct
611 605 0:30 /docker/0123 /sys/fs/cgroup/memory ro,nosuid,nodev,noexec,relatime master:15 - cgroup cgroup rw,memory
"""


def test_own_cgroup_is_found_in_each_layout() -> None:
    assert cgroup.own_path(SYSTEMD) == "/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope"
    assert cgroup.own_path(DOCKER) == "/"


def test_cgroup_mount_is_found_in_each_layout() -> None:
    assert cgroup.mount_of(SYSTEMD_MOUNTS) == ("/", Path("/sys/fs/cgroup"))
    assert cgroup.mount_of(DOCKER_MOUNTS) is None


def fake_cgroup2(folder: Path, *, limit: str, used: int = 0, cache: int = 0) -> Path:
    """A folder with the files of a version 2 memory cgroup."""
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cache}\ninactive_file {cache}\nactive_file 0\nshmem 0\n")
    return folder


def test_room_of_a_cgroup_counts_page_cache_as_free(tmp_path: Path) -> None:
    assert cgroup.room(fake_cgroup2(tmp_path / "a", limit="1000", used=700, cache=600)) == 900
    assert cgroup.room(fake_cgroup2(tmp_path / "b", limit="1000", used=1700)) == 0
    assert cgroup.room(fake_cgroup2(tmp_path / "c", limit="max", used=700)) is None
    assert cgroup.room(tmp_path) is None, "no memory controller there"


def test_version_2_looks_for_a_place_upwards_and_never_leaves_a_limit_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = fake_cgroup2(tmp_path / "top", limit="max")
    middle = fake_cgroup2(top / "middle", limit="5000")
    own = fake_cgroup2(middle / "own", limit="max")
    monkeypatch.setattr(cgroup, "own_cgroup", lambda: (own, top))
    assert list(cgroup.parents()) == [own, middle]


def test_available_memory_is_the_least_of_all_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < meter.available_memory() <= psutil.virtual_memory().total
    own = fake_cgroup2(fake_cgroup2(tmp_path / "top", limit="9000", used=2000) / "own", limit="8000", used=500)
    monkeypatch.setattr(cgroup, "own_cgroup", lambda: (own, own.parent))
    assert meter.available_memory() == 7000


def test_cgroups_of_dead_builders_are_swept_and_no_others(tmp_path: Path) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        start = cgroup.start_time(process.pid)
    dead = tmp_path / f"gracefarm-{process.pid}-{start}-abc"
    reused_id = tmp_path / f"gracefarm-{os.getpid()}-1-abc"
    alive = tmp_path / f"gracefarm-{os.getpid()}-{cgroup.start_time(os.getpid())}-abc"
    foreign = tmp_path / "gracefarm-notes"
    for folder in (dead, reused_id, alive, foreign):
        folder.mkdir()
    cgroup.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, foreign])


def test_no_way_to_bound_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "own_cgroup", lambda: None)
    with pytest.raises(HostError, match="this machine cannot limit memory by cgroup2"):
        meter.open_meter(1 << 30, ("cgroup2",))
    assert meter.open_meter(1 << 30).by == "watchdog"


def test_the_least_cpu_quota_on_the_way_up_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "top" / "middle" / "own"
    own.mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("1000 100000\n")  # above the mount: not ours to see
    (tmp_path / "top" / "cpu.max").write_text("400000 100000\n")
    (own.parent / "cpu.max").write_text("150000 100000\n")
    (own / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(cgroup, "own_cgroup", lambda: (own, tmp_path / "top"))
    assert meter.cpu_quota() == 1.5
    (own.parent / "cpu.max").unlink()
    assert meter.cpu_quota() == 4.0
    (tmp_path / "top" / "cpu.max").write_text("max 100000\n")
    assert meter.cpu_quota() is None


@pytest.fixture
def half_a_processor() -> Iterator[Path]:
    """A real cgroup with a CPU quota of one half."""
    own = cgroup.own_cgroup()
    folder = cgroup.new(own[0]) if own else None
    if folder is None or not (folder / "cpu.max").is_file():
        pytest.skip("no CPU cgroup of version 2 can be made here")
    (folder / "cpu.max").write_text("50000 100000")
    yield folder
    cgroup.remove(folder)


@pytest.mark.root
def test_a_real_cpu_quota_is_seen(half_a_processor: Path) -> None:
    code = "import sys; sys.stdin.readline(); from builder.box import meter; from builder.compiling import jobs; "
    code += "print(meter.cpu_quota(), jobs.cores())"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        (half_a_processor / "cgroup.procs").write_text(str(process.pid))
        said, _ = process.communicate("go\n", timeout=60)
    assert said.split() == ["0.5", "1"]


def test_what_runs_in_this_process_and_below_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = meter.proportional_size

    def slow_for_us(process: psutil.Process) -> int:
        """As if this process had several GiB: it is read once in two seconds."""
        start = time.thread_time()
        while process.pid == os.getpid() and time.thread_time() < start + 0.05:
            pass
        return exact(process)

    monkeypatch.setattr(meter, "proportional_size", slow_for_us)
    eater = (
        "held = bytearray(150_000_000)\nimport time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    )
    with meter.watch() as usage:
        subprocess.run([sys.executable, "-c", eater], check=True)
    assert usage.cpu_s > 0.4
    assert usage.peak_memory > 150_000_000
    with meter.watch() as idle:
        time.sleep(0.3)
    assert idle.cpu_s < 0.2
    assert 0 < idle.peak_memory < usage.peak_memory - 100_000_000

"""`builder clean`: what can be made again goes, and nothing goes under the hands of those who use it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gracefarm.files import lock
from tests import projects
from tests.conftest import REPOSITORY, Farm


def make(home: Path, *names: str) -> None:
    for name in names:
        (home / name).mkdir(parents=True)
        (home / name / "file").write_text("bytes")


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    variables = {"GRACEFARM_HOME": str(home), "GRACEFARM_PROJECT": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-m", "builder", "clean", *arguments],
        env=projects.environment(variables),
        stdout=subprocess.PIPE,
        text=True,
    )


def waits_for_a_lock(pid: int) -> bool:
    """By the kernel's own list, where who waits is marked with an arrow."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and str(pid) in line.split() for line in lines)


LOCKS = {
    "builds/1": "locks/build-1",
    "roots/a": "roots/a.lock",
    "environments/bytecode": "environments/bytecode.lock",
    "toolchains/.c.partial": "toolchains/c.lock",
    "interpreters/g": "interpreters/g.lock",
    "cuda/d": "cuda/d.lock",
    "wrappers/h": "wrappers/h.lock",
    "git/e.git": "git/e.lock",
    "store/sha256/aa": "store/locks/file",
}
"By what lies in the home: the lock of those who make or use it."


@pytest.mark.parametrize("name", LOCKS)
def test_all_waits_for_whom_it_would_take_the_ground_from_and_leaves_the_locks(tmp_path: Path, name: str) -> None:
    make(tmp_path, *LOCKS, "uv/f", "builds/2/dist")
    place = tmp_path / LOCKS[name]
    with lock(place):
        number = place.stat().st_ino
        running = start(tmp_path, "--all")
        while not waits_for_a_lock(running.pid):
            assert running.poll() is None, "it did not wait"
            time.sleep(0.05)
        assert (tmp_path / name / "file").exists()
    running.communicate(timeout=60)
    assert running.returncode == 0
    assert not [name for name in (*LOCKS, "uv/f", "builds/2") if (tmp_path / name / "file").exists()]
    assert place.stat().st_ino == number, "the lock is still the one that others may wait for"


def test_all_takes_a_link_away_and_not_what_it_points_to(tmp_path: Path) -> None:
    make(tmp_path, "other/roots/a", "home/builds")
    (tmp_path / "home" / "roots").symlink_to(tmp_path / "other" / "roots")
    running = start(tmp_path / "home", "--all")
    running.communicate(timeout=60)
    assert running.returncode == 0
    assert not (tmp_path / "home" / "roots").is_symlink()
    assert (tmp_path / "other" / "roots" / "a" / "file").is_file()


def test_working_folders_go_and_products_stay(farm: Farm) -> None:
    build = farm.settings.home / "builds" / "1"
    make(build, "work", "raw", "raw-source", "install", "dist")
    make(farm.settings.home / "fetched", "tiny")
    (build / "log.txt").write_text("words")
    assert farm.run("clean").code == 0
    assert sorted(path.name for path in build.iterdir()) == ["dist", "log.txt"]
    assert list((farm.settings.home / "fetched").iterdir()) == [], "which a killed `builder fetch` leaves"

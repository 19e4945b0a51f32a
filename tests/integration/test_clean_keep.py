"""`builder clean --keep SIZE`: what was not used for the longest time goes first, and only as much as necessary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from builder.planning.stack import host_arch
from builder.proof import record
from gracefarm.errors import ExitCode
from gracefarm.files import disk_used, lock
from tests import projects
from tests.conftest import Farm

NATIVE = host_arch().value
LARGE = """
import os
with open("large", "wb") as file:
    file.write(os.urandom(16 << 20))
return wheel(wheel_directory)
"""
WAITS = """
import time
while not os.path.exists("/build/continue"):
    time.sleep(0.1)
return wheel(wheel_directory)
"""
MIB = 1 << 20


def megabytes(place: Path, count: int, *, used: float | None = None) -> None:
    """A folder of the home with a file of this size, and its lock with the time of the last use."""
    place.mkdir(parents=True)
    (place / "file").write_bytes(os.urandom(count * MIB))
    if used is not None:
        guard = place.with_name(f"{place.name}.lock")
        guard.touch()
        os.utime(guard, (used, used))


def test_working_folders_go_oldest_first_and_results_stay(farm: Farm) -> None:
    for name in ("old", "new"):
        farm.recipe(name, projects.backend(LARGE.replace("wheel_directory", f"wheel_directory, {name!r}")))
        assert farm.run("build", name, "--target", NATIVE, "--keep").code == 0
    home = farm.settings.home
    old, new = (record.latest(farm.settings, name) for name in ("old", "new"))
    done = farm.run("clean", "--keep", f"{disk_used(home) // MIB - 8}MiB", "--json")
    assert done.code == 0, done.said
    result = json.loads(done.out)
    folder = home / "builds" / old.build_id
    assert str(folder / "work") in [entry["path"] for entry in result["removed"]]
    assert result["freed"] >= 16 * MIB
    assert not (folder / "work").exists()
    assert (home / "builds" / new.build_id / "work").is_dir()
    assert all(record.wheel_path(farm.settings, build) for build in (old, new))
    assert (folder / "log.txt").is_file()
    assert "already built" in farm.run("build", "old", "--target", NATIVE).said


def test_a_running_build_keeps_its_ground_and_a_later_one_makes_it_again(farm: Farm) -> None:
    environments = farm.settings.home / "environments"
    environments.unlink()
    farm.recipe("tiny", projects.backend(WAITS))
    command = [sys.executable, "-m", "builder", "build", "tiny", "--target", NATIVE]
    variables = projects.environment(farm.environment)
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            while not (logs := list(farm.settings.home.glob("builds/*/log.txt"))) or "bwrap" not in logs[0].read_text():
                assert running.poll() is None, running.communicate()
                time.sleep(0.1)
            build = record.latest(farm.settings, "tiny")
            facts = build.inputs["stack"]
            assert isinstance(facts, dict)
            done = farm.run("clean", "--keep", "1MiB")
            assert done.code == 0, done.said
            assert "files of a running build" in done.said
            assert (environments / facts["environment"]).is_dir()
        finally:
            (logs[0].parent / "work" / "continue").touch()
            _, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert farm.run("clean", "--keep", "1MiB").code == 0
    assert [entry.name for entry in environments.iterdir() if entry.suffix != ".lock"] == []
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    done = farm.run("build", "tiny", "--target", NATIVE)
    assert done.code == 0, done.said
    assert (environments / facts["environment"]).is_dir()


def test_the_least_recently_used_ground_goes_first_and_shared_files_count_once(farm: Farm) -> None:
    environments = farm.settings.home / "environments"
    environments.unlink()
    for number, name in enumerate("abc"):
        megabytes(environments / name, 4, used=1_700_000_000 + number)
    (environments / "b" / "shared").hardlink_to(environments / "c" / "file")
    done = farm.run("clean", "--keep", "5MiB", "--json")
    assert done.code == 0, done.said
    result = json.loads(done.out)
    assert [Path(entry["path"]).name for entry in result["removed"]] == ["a", "b"]
    assert all(4 * MIB <= entry["size"] < 5 * MIB for entry in result["removed"])
    assert sorted(entry.name for entry in environments.iterdir()) == ["a.lock", "b.lock", "c", "c.lock"]


def test_a_build_marks_its_ground_as_used(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    assert farm.run("build", "tiny", "--target", NATIVE).code == 0
    facts = record.latest(farm.settings, "tiny").inputs["stack"]
    assert isinstance(facts, dict)
    guard = farm.settings.home / "environments" / f"{facts['environment']}.lock"
    os.utime(guard, (1, 1))
    farm.recipe("tiny", projects.backend("# changed\nreturn wheel(wheel_directory)"))
    assert farm.run("build", "tiny", "--target", NATIVE).code == 0
    assert guard.stat().st_mtime > 1


def test_what_another_process_makes_now_stays(farm: Farm) -> None:
    environments = farm.settings.home / "environments"
    environments.unlink()
    megabytes(environments / ".a.partial", 4)
    with lock(environments / "a.lock"):
        assert farm.run("clean", "--keep", "1MiB").code == 0
        assert (environments / ".a.partial" / "file").is_file()
    assert farm.run("clean", "--keep", "1MiB").code == 0
    assert not (environments / ".a.partial").exists()


def test_keys_and_published_files_stay(farm: Farm) -> None:
    for name in ("index", "keys", "sets/one"):
        megabytes(farm.settings.home / name, 1)
    done = farm.run("clean", "--keep", "1MiB")
    assert (done.code, "larger than 1MiB" in done.said) == (0, True), done.said
    assert all((farm.settings.home / name / "file").is_file() for name in ("index", "keys", "sets/one"))


def test_a_size_that_is_none(farm: Farm) -> None:
    done = farm.run("clean", "--keep", "20")
    assert (done.code, "'20' is not a size such as 3.5GiB" in done.said) == (ExitCode.USAGE, True), done.said
    assert farm.run("clean", "--keep", "20GiB", "--all").code == ExitCode.USAGE

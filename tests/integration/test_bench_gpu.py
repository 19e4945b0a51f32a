"""`bench/gpu.sh`, as far as a machine without a GPU runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def test_setup_takes_repositories_along_as_it_takes_files(tmp_path: Path) -> None:
    # A recipe whose source is a git repository has nothing in the store.
    for part in ("store/sha256/00/file", "git/config"):
        place = tmp_path / "carried/home" / part
        place.parent.mkdir(parents=True)
        place.write_text(part)
    variables = {"CARRIED": str(tmp_path / "carried"), "WORK": str(tmp_path / "work"), "PYTHON": "false"}
    ended = subprocess.run([REPOSITORY / "bench/gpu.sh", "setup"], env=os.environ | variables, check=False)
    assert ended.returncode != 0, "`false` is not a Python: it ends after the copy"
    assert (tmp_path / "work/home/store/sha256/00/file").read_text() == "store/sha256/00/file"
    assert (tmp_path / "work/home/git/config").read_text() == "git/config"


BUILDER = """#!/bin/sh
shift 2
case $1 in
show) echo '{"build_id": "twin", "wheel": {"filename": "thing-1.0-py3-none-any.whl"}}' ;;
*) echo "$@" ;;
esac
"""
"A Python whose module `builder` prints its arguments. Its last build of each recipe has the build id `twin`."


def gpu_script(work: Path, *arguments: str, **variables: str) -> str:
    """What bench/gpu.sh prints."""
    python = work / "builder/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(BUILDER)
    python.chmod(0o755)
    given = {"WORK": str(work), "PYTHON": sys.executable, **variables}
    command = [REPOSITORY / "bench/gpu.sh", *arguments]
    return subprocess.run(command, env=os.environ | given, check=True, capture_output=True, text=True).stdout


def test_builds_are_twins_unless_the_options_are_others(tmp_path: Path) -> None:
    build = f"build thing --stack cu130 --toolchain host --environment {tmp_path}/own/bin/python"
    assert gpu_script(tmp_path, "one", "thing").splitlines()[1:] == [f"{build} --twin"]
    assert gpu_script(tmp_path, "one", "thing", OPTIONS="").splitlines()[1:] == [build]
    assert gpu_script(tmp_path, "one", "thing", OPTIONS="--sm 90 --jobs 2").splitlines()[1:] == [f"{build} --sm 90 --jobs 2"]


@pytest.mark.parametrize("verb", ["smoke", "certify"])
def test_the_wheel_of_the_last_build_is_tested_beside_another_of_the_same_name(tmp_path: Path, verb: str) -> None:
    for build in ("other", "twin"):
        place = tmp_path / "home/builds" / build / "dist/thing-1.0-py3-none-any.whl"
        place.parent.mkdir(parents=True)
        place.touch()
    assert gpu_script(tmp_path, verb, "thing").startswith(f"{verb} {place} --stack cu130 --recipe thing ")

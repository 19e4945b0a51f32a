"""A build that needs more disk space than is free is refused before it starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builder.planning.stack import host_arch
from builder.proof import record
from gracefarm.errors import ExitCode
from tests import projects
from tests.conftest import Farm

NATIVE = host_arch().value
UNSHARE = ("unshare", "--map-root-user", "--mount")
"A private mount without root, where sandboxes can be started at all."
LARGE = """
import os
with open("large", "wb") as file:
    file.write(os.urandom(24 << 20))
return wheel(wheel_directory)
"""


def build_on(farm: Farm, folder: Path, size: str, *arguments: str, before: str = "true") -> projects.Done:
    """`builder build ARGUMENTS` with a small file system on a folder of the home."""
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && {before} && exec "$@"'
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", script, folder, sys.executable, "-m", "builder", "build", *arguments, "--target", NATIVE],
        env=projects.environment(farm.environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return projects.Done(code=done.returncode, out=done.stdout, err=done.stderr)


def refused(done: projects.Done, folder: Path, needed: str) -> None:
    assert done.code == ExitCode.DISK, done.said
    assert f"error: the build needs at least {needed}" in done.said
    assert f"MiB on the file system that holds {folder}, but only 16 MiB are free remedy: free space" in done.said
    assert "`builder clean` removes" in done.said
    assert "`builder clean --keep SIZE` also" in done.said
    assert "root " not in done.out.split("error:")[0], "the ground was not laid"


def own_folder(farm: Farm, name: str) -> Path:
    """An empty folder of the home, instead of the one that tests share."""
    place = farm.settings.home / name
    if place.is_symlink():
        place.unlink()
    place.mkdir()
    return place


@pytest.mark.parametrize("selection", [("tiny",), ("tiny", "other")])
def test_a_root_that_does_not_fit_is_not_assembled(farm: Farm, selection: tuple[str, ...]) -> None:
    for name in selection:
        farm.recipe(name, projects.backend("return wheel(wheel_directory)"))
    roots = own_folder(farm, "roots")
    refused(build_on(farm, roots, "16m", *selection), roots, "3")


def test_a_working_folder_like_that_of_the_last_build_must_fit(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend(LARGE))
    assert farm.run("build", "tiny", "--target", NATIVE).code == 0
    (build,) = record.all_of(farm.settings, "tiny")
    assert build.work_bytes is not None
    assert build.work_bytes >= 24 << 20
    farm.recipe("tiny", projects.backend("# changed\n" + LARGE))
    builds, kept = farm.settings.home / "builds", farm.settings.home / "kept"
    shutil.copytree(builds, kept)
    done = build_on(farm, builds, "16m", "tiny", before=f"cp -r {kept}/. {builds}")
    refused(done, builds, "24")
    assert len(list(builds.iterdir())) == 1


def test_what_is_built_needs_no_space(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend(LARGE))
    assert farm.run("build", "tiny", "--target", NATIVE).code == 0
    builds, kept = farm.settings.home / "builds", farm.settings.home / "kept"
    shutil.copytree(builds, kept)
    done = build_on(farm, builds, "2m", "tiny", before=f"cp -r {kept}/. {builds}")
    assert done.code == 0, done.said
    assert "already built" in done.said

"""`builder matrix`, and builds of cells: their states, their costs, and how a selection of cells ends."""

from __future__ import annotations

import json
import subprocess
import sys

from builder.planning.stack import host_arch
from tests import projects
from tests.conftest import Farm

NATIVE = host_arch().value
QUICK = "return wheel(wheel_directory)"


def without_source(farm: Farm, name: str = "tiny") -> None:
    """A recipe whose source cannot be fetched. It is unlike that of all tests, which share the store of fetched files."""
    (farm.recipe(name, projects.backend(f"# {farm.settings.home}\n{QUICK}")) / "source.tar.gz").unlink()


def table(done: projects.Done) -> list[str]:
    """States of the cells in the table at the end of a build."""
    return [line.split()[1] for line in done.err.splitlines() if line.startswith("   matrix")][:-1]


def test_one_remaining_cell_that_fails_ends_like_several(farm: Farm) -> None:
    """One cell is skipped, for a digest is unknown; the other one fails. So one plan remains."""
    without_source(farm)
    unknown = {"kind": "file", "url": "https://example.org/gap.tar.gz", "sha256_unknown": "out of reach"}
    farm.recipe("gap", projects.backend(QUICK), source=unknown)
    done = farm.run("build", "--changed", "--matrix", f"target={NATIVE}")
    assert "skipped: gap on stack bare" in done.said
    assert (done.code, table(done)) == (50, ["blocked", "blocked"]), done.said
    assert "1 of 2 cells failed" in done.said


def test_a_selection_of_one_cell_ends_with_the_table_too(farm: Farm) -> None:
    without_source(farm)
    done = farm.run("build", "tiny", "--matrix", f"target={NATIVE}")
    assert (done.code, table(done)) == (50, ["blocked"]), done.said
    assert farm.run("build", "tiny", "--target", NATIVE).code == 10


def test_a_build_is_running_until_its_process_ends(farm: Farm) -> None:
    """The process is killed, so nothing writes the end of the build."""
    farm.recipe("tiny", projects.backend(f"import time\ntime.sleep(600)\n{QUICK}"))
    environment = projects.environment(farm.environment)
    command = [sys.executable, "-m", "builder", "build", "tiny", "--target", NATIVE]
    assert state(farm) == "not tried"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as build:
        assert build.stderr is not None
        for line in build.stderr:
            if "compile" in line:
                break
        assert state(farm) == "running"
        build.kill()
    assert state(farm) == "failed"


def state(farm: Farm) -> str:
    done = farm.run("matrix", "tiny", "--matrix", f"target={NATIVE}", "--json")
    return str(json.loads(done.out)["cells"][0]["state"])

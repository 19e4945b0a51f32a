"""`builder run`: recipe to build to the project's own index to pip in a clean environment to import."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import projects
from tests.conftest import Farm


def test_a_wheel_goes_through_the_index_into_a_clean_environment(farm: Farm) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c", "tiny_c._core"]})
    done = farm.run("run", "tiny_c", "--json")
    assert done.code == 0, done.said
    lines = [json.loads(line) for line in done.out.splitlines()]
    result = lines[-1]
    assert Path(result["wheel"]).name.endswith("_aarch64.whl")
    record = json.loads(Path(result["record"]).read_text())
    assert record["published"][0]["url"].startswith("http://127.0.0.1:")
    installed = (Path(result["record"]).parent / "install.txt").read_text()
    assert "Successfully installed tiny-c-1.0" in installed
    assert '"tiny_c._core": "/env/lib/python3.11/site-packages/tiny_c/_core.cpython-311-aarch64-linux-gnu.so"' in installed
    password = [one for one in installed.split() if "pypi-" in one or "token" in one.lower()]
    assert not password


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_main_job(farm: Farm) -> None:
    """causal-conv1d, whole: about ten minutes on two cores."""
    repository = Path(__file__).parent.parent.parent
    (farm.settings.project / "recipes" / "causal_conv1d").symlink_to(repository / "recipes" / "causal_conv1d")
    done = projects.run_builder(["run", "causal_conv1d", "--json"], farm.environment, timeout=3000)
    assert done.code == 0, done.said
    result = json.loads(done.out.splitlines()[-1])
    record = json.loads(Path(result["record"]).read_text())
    assert {one["gate"]: one["status"] for one in record["verdicts"]} == dict.fromkeys(
        [one["gate"] for one in record["verdicts"]], "passed"
    )
    level = Path(result["wheel"]).name.split("manylinux_2_")[1].split("_")[0]
    assert int(level) <= 34

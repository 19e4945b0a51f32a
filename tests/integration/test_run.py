"""`builder run`: recipe to build to the project's own index to pip in a clean environment to import."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from builder.planning.stack import host_arch
from tests import projects
from tests.conftest import REPOSITORY, Farm


def test_a_wheel_goes_through_the_index_into_a_clean_environment(farm: Farm) -> None:
    folder = farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c", "tiny_c._core"]})
    (folder / "smoke.py").write_text("import tiny_c\nprint('asked by smoke.py in', tiny_c.__file__)\n")
    done = farm.run("run", "tiny_c", "--json")
    assert done.code == 0, done.said
    assert "the imports work, smoke.py passes" in done.said
    lines = [json.loads(line) for line in done.out.splitlines()]
    result = lines[-1]
    assert Path(result["wheel"]).name.endswith("_aarch64.whl")
    record = json.loads(Path(result["record"]).read_text())
    assert record["published"] == [], "the index ends with the run, and so does its address"
    installed = (Path(result["record"]).parent / "install.txt").read_text()
    assert "Successfully installed tiny-c-1.0" in installed
    assert '"tiny_c._core": "/env/lib/python3.11/site-packages/tiny_c/_core.cpython-311-aarch64-linux-gnu.so"' in installed
    # A recipe may leave all of its proof to its script, as aphrodite's does.
    assert "asked by smoke.py in /env/lib/python3.11/site-packages/tiny_c/__init__.py" in installed
    password = [word for word in installed.split() if "pypi-" in word or "token" in word.lower()]
    assert not password


def test_another_build_of_the_same_version_is_installed_and_the_way_back_is_told(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), smoke={"imports": ["tiny"]})
    assert farm.run("run", "tiny", "--target", host_arch()).code == 0
    other = 'return wheel(wheel_directory, files={"tiny/more.py": b"1"})'
    farm.recipe("tiny", projects.backend(other), smoke={"imports": ["tiny"]})
    done = farm.run("run", "tiny", "--target", host_arch())
    assert done.code == 0, done.said
    assert "tiny-1.0-1-py3-none-any.whl to" in done.said
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), smoke={"imports": ["tiny"]})
    done = farm.run("run", "tiny", "--target", host_arch())
    assert done.code == 41, done.said
    assert "has a higher build tag" in done.said, done.said
    index = farm.settings.home / "index"
    assert f"mv {index} {index}.old" in done.said.replace("\n", " ")
    index.rename(f"{index}.old")
    assert farm.run("run", "tiny", "--target", host_arch()).code == 0


RUN_KILL_AT = {
    "while publishing": ("index", "serving"),
    "before the index has the record": ("publish", ".whl to"),
    "while installing": ("publish", "record and log to"),
}
"Moments of a run after its build, each named by the line that it has just printed."


@pytest.mark.parametrize(
    ("moment", "number"), [*((moment, signal.SIGKILL) for moment in RUN_KILL_AT), ("while publishing", signal.SIGTERM)]
)
def test_a_run_killed_after_its_build_does_not_stand_in_the_way_of_the_next(
    farm: Farm, moment: str, number: signal.Signals
) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    command = ["run", "tiny", "--target", host_arch().value, "--json"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "builder", *command],
        env=projects.environment(farm.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert killed.stdout is not None
    step, text = RUN_KILL_AT[moment]
    events = map(json.loads, killed.stdout)
    assert any(event.get("step") == step and text in event["text"] for event in events)
    killed.send_signal(number)
    killed.communicate(timeout=30)
    assert killed.returncode == -number
    again = farm.run(*command)
    assert again.code == 0, again.said
    assert "the imports work" in again.said


NOT_HERE = {"licence", "variant"}
"Gates for packages with code of others, and for variants of a wheel."


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "inapplicable"),
    [("causal_conv1d", NOT_HERE), ("torch_scatter", {*NOT_HERE, "python-abi"})],  # its libraries are loaded by torch.ops
)
def test_a_real_cuda_wheel_for_aarch64(farm: Farm, name: str, inapplicable: set[str]) -> None:
    """The main job, and a second recipe of another upstream: minutes each on two cores."""
    (farm.settings.project / "recipes" / name).symlink_to(REPOSITORY / "recipes" / name)
    done = projects.run_builder(["run", name, "--json"], farm.environment, timeout=3000)
    assert done.code == 0, done.said
    result = json.loads(done.out.splitlines()[-1])
    record = json.loads(Path(result["record"]).read_text())
    assert {verdict["gate"]: verdict["status"] for verdict in record["verdicts"]} == {
        verdict["gate"]: "not applicable" if verdict["gate"] in inapplicable else "passed" for verdict in record["verdicts"]
    }
    assert record["smoke"]["script"]
    level = Path(result["wheel"]).name.split("manylinux_2_")[1].split("_")[0]
    assert int(level) <= 34

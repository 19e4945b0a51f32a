"""Ray 2.41 of set gh200-cu124, with what its lock has beside it: started by the plan's own arguments on the rig's nodes."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.planning import pins, stack
from builder.planning.stack import Arch
from deploy.nodes import paths
from deploy.rehearsal.rig import Rig, open_rig
from deploy.steps import environment
from deploy.steps.environment import Matrix
from gracefarm import settings
from gracefarm.errors import EngineError, InstallError
from tests.conftest import REPOSITORY
from tests.deploy import ray_kit
from tests.deploy.test_ray import anything_of_ray, down, up, with_nodes

pytestmark = [pytest.mark.root, pytest.mark.slow]
DASHBOARD = Matrix(modules=tuple(row for row in environment.matrix("aphrodite").modules if row.module.startswith("ray")))
"Only Ray's rows: the others need a GPU's libraries."


def of_the_set(*without: str) -> Path:
    """An environment for this machine: of all that `ray[default]` reaches, what the set's lock has, at its versions."""
    locked = {wheel.name: wheel.version for wheel in pins.wheels(stack.load(REPOSITORY / "stacks", "cu124"), Arch.AARCH64)}
    assert locked["ray"] == "2.41.0"
    text = "".join(f"{name}=={version}\n" for name, version in locked.items() if "+" not in version)
    uv, index = Path(sys.executable).with_name("uv"), settings.load().index_url
    command = [uv, "pip", "compile", "-q", "--python-version", "3.11", "--no-header", "--no-annotate"]
    constraints = Path(settings.load().home) / "tests" / f"ray-of-the-set-{hashlib.sha256(text.encode()).hexdigest()[:12]}.txt"
    constraints.write_text(text)
    command += ["--constraint", constraints, *(["--default-index", index] if index else []), "-"]
    reached = subprocess.run(command, input="ray[default]", capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^([a-z0-9-]+)==", reached, flags=re.MULTILINE)
    wanted = [f"{name}=={locked[name]}" for name in names if name in locked and name not in without]
    digest = hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:12]
    return ray_kit.ray_environment(["--no-deps", *wanted], f"ray-of-the-set-{digest}")


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(tmp_path / "rig", count=2) as made:
        yield made


def test_the_ray_of_the_set_comes_up_by_the_plans_arguments(room: Rig, tmp_path: Path) -> None:
    ray_kit.bring_ray(room, of_the_set())
    made = ray_kit.deployment(room, tmp_path / "deployment")
    plan = ray_kit.planned(room, made)
    assert plan.head.ray[plan.head.ray.index("--include-dashboard") + 1] == "true"
    folder = paths.environment(made)
    rows = with_nodes(room, made, lambda _fleet, nodes: environment.prove(nodes, folder, DASHBOARD, 120))
    assert [row["name"] for row in rows["k0"]] == ["ray", "ray.dashboard.optional_deps"]
    done = up(room, made, plan)
    assert (done.started, done.gpus) == (("k0", "k1"), 2)
    code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8265/api/version', timeout=20).read().decode())"
    answer = room["k0"].execute(["/usr/bin/python3", "-c", code])
    assert '"ray_version": "2.41.0"' in answer.stdout, answer.stderr
    down(room, made)
    assert anything_of_ray(room) == []


def test_without_the_dashboards_needs_the_matrix_says_so_and_ray_does_not_start(room: Rig, tmp_path: Path) -> None:
    """Why the row is there: `import ray` and `ray --version` are content."""
    ray_kit.bring_ray(room, of_the_set("aiohttp-cors", "colorful", "opencensus", "py-spy", "virtualenv"))
    made = ray_kit.deployment(room, tmp_path / "deployment")
    plan = ray_kit.planned(room, made)
    folder = paths.environment(made)
    with pytest.raises(
        InstallError, match=r"ray\.dashboard\.optional_deps: ModuleNotFoundError: No module named 'aiohttp_cors'"
    ):
        with_nodes(room, made, lambda _fleet, nodes: environment.prove(nodes, folder, DASHBOARD, 120))
    with pytest.raises(EngineError, match="k0: `ray start` failed with exit code 1"):
        up(room, made, plan)
    down(room, made)
    assert anything_of_ray(room) == []

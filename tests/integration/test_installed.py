"""The wheel as a user installs it, with each extra by itself: each program works anywhere, or names what it lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uv

from builder.planning import recipe, stack
from builder.planning.settings import PARTS
from builder.planning.stack import Arch
from builder.toolchains import choice
from gracefarm import settings
from gracefarm.errors import ExitCode
from tests import projects
from tests.conftest import REPOSITORY, Farm

EXTRAS = ("", "builder", "container", "farm", "index", "deploy")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NEEDS = {
    # what is said instead where the extra of the program is missing
    "builder list": "builder",
    "builder plan causal_conv1d": "builder",
    "index serve --port 0": "index",
    "index token create --name farm": "index",
    "deploy init ips.txt": "deploy",
}


def uv_environment() -> dict[str, str]:
    """This process's, with the Python index that the settings name."""
    index = settings.load().index_url
    return {**os.environ, **({"UV_DEFAULT_INDEX": index} if index else {})}


def causal_conv1d() -> str:
    """The build id that the checkout gives it: an installed wheel gives the same."""
    loaded, base = recipe.load(REPOSITORY / "recipes", "causal_conv1d"), stack.load(REPOSITORY / "stacks", "cu130")
    return choice.make_plan(loaded, base, stack.host_arch(), Arch.AARCH64).build_id


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A clean virtual environment with gracefarm's wheel, used from a folder that is not a checkout."""

    environment: Path
    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        """What its programs see: nothing of this checkout, nor of an environment that the tests run in."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("GRACEFARM_", "PYTHON", "VIRTUAL_ENV"))
        }
        path = f"{self.environment / 'bin'}:{SYSTEM_PATH}"
        return {
            **kept,
            "PATH": path,
            "GRACEFARM_HOME": str(self.folder / "home"),
            "GRACEFARM_SETTINGS": "/no-such-file",
            "COLUMNS": "200",
        }

    def argv(self, command: str) -> list[str]:
        """Of a command line as a user types it."""
        program, *arguments = command.split()
        return [str(self.environment / "bin" / program), *arguments]

    def run(
        self, command: str, *, folder: Path | None = None, timeout: float = 60, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        process = subprocess.run(
            self.argv(command),
            cwd=folder or self.folder,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert "Traceback" not in process.stderr, process.stderr
        return process


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as for a release; of a copy, for a build leaves folders in the tree that it builds."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in set(listing.stdout.decode().split("\0")) - {""}:
        if (REPOSITORY / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, tree / name)
    subprocess.run(
        "git init --quiet && git add --all", shell=True, cwd=tree, check=True
    )  # setuptools_scm asks git for the files
    variables = {**uv_environment(), "SETUPTOOLS_SCM_PRETEND_VERSION": "1.0"}
    subprocess.run([uv.find_uv_bin(), "build", "--quiet", "--out-dir", out, tree], env=variables, check=True)
    return out / "gracefarm-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Installed]:
    """One environment for each extra, and one with none."""
    environments = {}
    for extra in EXTRAS:
        folder = tmp_path_factory.mktemp(extra or "none")
        environment = folder / "venv"
        subprocess.run([uv.find_uv_bin(), "venv", "--quiet", "--python", sys.executable, environment], check=True)
        requirement = f"gracefarm{f'[{extra}]' if extra else ''} @ {wheel.as_uri()}"
        command = [uv.find_uv_bin(), "pip", "install", "--quiet", "--python", environment / "bin" / "python", requirement]
        subprocess.run(command, env=uv_environment(), check=True)
        environments[extra] = Installed(environment=environment, folder=folder)
    return environments


@contextmanager
def serving(command: list[str], variables: Mapping[str, str], folder: Path) -> Iterator[str]:
    """The address of `index serve --json`, until the block ends."""
    with subprocess.Popen(command, env=variables, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield next(json.loads(line)["url"] for line in server.stdout if '"listening"' in line)
        finally:
            server.terminate()


def test_the_wheel_carries_its_licence_and_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"{program}/py.typed" for program in ("gracefarm", "builder", "index", "deploy")} <= names
    assert "gracefarm-1.0.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "bench/"))]


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_program_lists_its_commands_with_any_extra(installed: Mapping[str, Installed], extra: str) -> None:
    for program in ("builder", "index", "deploy"):
        process = installed[extra].run(f"{program} --help")
        assert process.returncode == 0, process.stderr
        assert "Commands:" in process.stdout


@pytest.mark.parametrize(
    ("extra", "command", "needed"),
    [
        (extra, command, needed)
        for extra in EXTRAS
        for command, needed in NEEDS.items()
        if needed != extra and (needed, extra) not in (("builder", "container"), ("builder", "farm"))
    ],
)
def test_a_missing_extra_is_named(installed: Mapping[str, Installed], extra: str, command: str, needed: str) -> None:
    process = installed[extra].run(command)
    assert process.returncode == ExitCode.HOST
    cause, remedy = process.stderr.splitlines()
    assert cause.startswith(f"error: {needed} requires ")
    assert cause.endswith(", which is not installed")
    assert remedy == f"remedy: run `pip install 'gracefarm[{needed}]'`"


def test_the_builder_alone_lists_and_plans_what_the_wheel_carries(installed: Mapping[str, Installed]) -> None:
    here = installed["builder"]
    assert "causal_conv1d" in here.run("builder list").stdout
    assert "gh200-cu130" in here.run("builder set list").stdout
    process = here.run("builder plan causal_conv1d")
    assert process.returncode == 0, process.stderr
    assert f"build id  {causal_conv1d()}" in process.stdout


def test_the_container_extra_plans_a_build_in_a_container(installed: Mapping[str, Installed]) -> None:
    process = installed["container"].run("builder plan causal_conv1d --toolchain container")
    if process.returncode == 0:  # an engine answers, and the stack names an image
        assert "build id" in process.stdout
    else:
        cause, remedy = process.stderr.splitlines()[:2]
        assert (
            "neither podman nor docker is running" in cause
            or "in its container image" in cause
            or "names no container image" in cause
        )
        assert remedy.startswith("remedy: ")


def test_a_build_that_ends_in_an_index_says_first_that_there_is_none(installed: Mapping[str, Installed]) -> None:
    process = installed["builder"].run("builder run causal_conv1d")
    assert process.returncode == ExitCode.HOST
    assert "pip install 'gracefarm[index]'" in process.stderr
    assert "pip install 'gracefarm[index]'" in installed["deploy"].run("deploy rehearse").stderr


def test_init_makes_a_project_that_comes_before_what_the_wheel_carries(installed: Mapping[str, Installed]) -> None:
    here = installed["builder"]
    project = here.folder / "wheels"
    process = here.run(f"builder init {project}")
    assert process.returncode == 0, process.stderr
    assert f"cd {project} && builder list" in process.stdout
    for part in PARTS:
        names = {path.relative_to(REPOSITORY) for path in (REPOSITORY / part).rglob("*") if "__pycache__" not in path.parts}
        assert names == {path.relative_to(project) for path in (project / part).rglob("*")}
    assert f"build id  {causal_conv1d()}" in here.run("builder plan causal_conv1d", folder=project).stdout
    (project / "recipes" / "causal_conv1d").rename(project / "recipes" / "of_my_own")
    for process in (
        here.run("builder list", folder=project / "recipes"),
        here.run("builder list", GRACEFARM_PROJECT=str(project)),
    ):
        assert "of_my_own" in process.stdout
    assert "of_my_own" not in here.run("builder list").stdout
    elsewhere = here.run("builder list", GRACEFARM_PROJECT=str(project.parent))
    assert elsewhere.returncode == ExitCode.CONFIG
    assert f"{project.parent} has no folder recipes/" in elsewhere.stderr
    assert "builder init DIR" in elsewhere.stderr
    again = here.run(f"builder init {project}")
    assert again.returncode == ExitCode.USAGE
    assert "is not empty" in again.stderr


def test_a_lock_is_not_written_into_the_installed_package(installed: Mapping[str, Installed]) -> None:
    for command in ("builder lock cu124", "builder lock cu130", "builder lock gh200-cu130"):
        process = installed["builder"].run(command)
        assert process.returncode == ExitCode.USAGE
        assert "builder init" in process.stderr


def test_the_index_alone_serves(installed: Mapping[str, Installed]) -> None:
    here = installed["index"]
    root = here.folder / "root"
    with serving(here.argv(f"index --root {root} --json serve --port 0"), here.variables, here.folder) as url:
        answer = httpx.get(f"{url.rstrip('/')}/simple/")
        assert answer.status_code == 200
        assert "<title>" in answer.text
        assert httpx.get(f"{url.rstrip('/')}/").status_code == 200, "the pages for people need their templates"
    process = here.run(f"index --root {root} --json token create --name farm")
    assert process.returncode == 0, process.stderr


def test_deploy_alone_plans(installed: Mapping[str, Installed]) -> None:
    process = installed["deploy"].run("deploy plan --nodes 3 --gpu gh200-96")
    assert process.returncode == 0, process.stderr
    assert "layout   tp1 pp3 on 3 nodes" in process.stdout
    process = installed["deploy"].run("deploy init ips.txt")
    assert "ips.txt" in process.stderr
    assert "is not installed" not in process.stderr


@pytest.mark.slow
def test_an_installed_builder_builds_a_c_extension_outside_any_checkout(
    installed: Mapping[str, Installed], farm: Farm, tmp_path: Path
) -> None:
    here, project = installed["builder"], tmp_path / "project"
    here.run(f"builder init {project}")
    shutil.copytree(farm.settings.project / "stacks" / "bare", project / "stacks" / "bare")
    tables = {"name": "tiny-c", "smoke": {"imports": ["tiny_c", "tiny_c._core"]}}
    projects.write_recipe(project, "tiny_c", projects.tree("tiny_c"), tables)
    process = here.run(
        "builder build tiny_c --json", folder=project, timeout=300, GRACEFARM_HOME=str(farm.settings.home), CI="true"
    )
    assert process.returncode == 0, process.stdout
    process = here.run("builder show tiny_c --json", folder=project, GRACEFARM_HOME=str(farm.settings.home))
    assert json.loads(process.stdout)["wheel"]["filename"].startswith("tiny_c-1.0-cp311-cp311-")

"""Fixtures of the builder's tests. They give a test a separate project folder with the machine's shared caches."""

from __future__ import annotations

import shutil
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from builder.planning.settings import Settings, load
from gracefarm.files import remove_tree
from tests import projects

SHARED = ("roots", "interpreters", "environments", "toolchains", "cuda", "wrappers", "store", "uv")
REPOSITORY = Path(__file__).parent.parent


def pytest_configure() -> None:
    """Restore SIGINT. A shell's background processes ignore it, and so would the programs that the tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class FileScheduling(LoadScopeScheduling):
    """With several processes, one process runs all tests of a file, since these tests share servers and builds.

    One process runs all tests of deploy, since these tests start Ray and sshd on the same ports.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "deploy" if nodeid.startswith("tests/deploy/") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileScheduling:
    """Use FileScheduling, since xdist's option --dist loadgroup has no effect with pytest 9.2."""
    return FileScheduling(config, log)


@dataclass(frozen=True, kw_only=True)
class Farm:
    """A project with the recipes and stacks of one test. `run` runs the builder on it."""

    settings: Settings
    environment: dict[str, str] = field(default_factory=dict)

    def recipe(self, name: str, files: dict[str, str | bytes], /, **tables: object) -> Path:
        """Write a source archive, and recipes/NAME for it. `tables` replace defaults of the recipe."""
        return projects.write_recipe(self.settings.project, name, files, tables)

    def run(self, *arguments: str, **variables: str) -> projects.Done:
        """Run `python -m builder ARGUMENTS` with the settings of this farm."""
        return projects.run_builder(arguments, {**self.environment, **variables})


@pytest.fixture(scope="session")
def shared_home() -> Path:
    """The machine's GRACEFARM_HOME. Its roots and environments are assembled once, and all tests use them."""
    return make_shared(load().home)


def make_shared(home: Path) -> Path:
    """Create the folders that the farms of tests and benchmarks share."""
    for name in SHARED:
        (home / name).mkdir(parents=True, exist_ok=True)
    return home


@contextmanager
def new_farm(shared_home: Path) -> Iterator[Farm]:
    """A farm without builds and recipes, with the stacks `bare` (without torch) and `cu130`."""
    folder = shared_home / "tests" / uuid.uuid4().hex[:12]
    home, project = folder / "home", folder / "project"
    home.mkdir(parents=True)
    for name in SHARED:
        (home / name).symlink_to(make_shared(shared_home) / name)
    projects.write_stacks(REPOSITORY / "stacks", project / "stacks")
    for own in (REPOSITORY / "tests" / "stacks").iterdir():
        shutil.copytree(own, project / "stacks" / own.name)
    shutil.copytree(REPOSITORY / "interpreters", project / "interpreters")
    (project / "recipes").mkdir()
    settings = load().model_copy(update={"home": home, "project": project})
    yield Farm(settings=settings, environment={"GRACEFARM_HOME": str(home), "GRACEFARM_PROJECT": str(project)})
    remove_tree(folder)


@pytest.fixture
def farm(shared_home: Path) -> Iterator[Farm]:
    """A farm for one test."""
    with new_farm(shared_home) as made:
        yield made

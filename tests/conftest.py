"""Fixtures of the builder's tests: a separate project folder with the machine's shared caches."""

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
    """A suite that was started in a shell's background ignores Ctrl-C, and so would the programs whose Ctrl-C it tests."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class FileScheduling(LoadScopeScheduling):
    """Where the suite runs in several processes, a file's tests share one process, for they share servers and builds.

    The tests of deploy share one process whole: each starts Ray and sshd on the ports that a node has.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "deploy" if nodeid.startswith("tests/deploy/") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileScheduling:
    """xdist's own --dist loadgroup has no effect under pytest 9.2."""
    return FileScheduling(config, log)


@dataclass(frozen=True, kw_only=True)
class Farm:
    """A project with recipes and stacks of a test's own, and how to run the builder on it."""

    settings: Settings
    environment: dict[str, str] = field(default_factory=dict)

    def recipe(self, name: str, files: dict[str, str | bytes], /, **tables: object) -> Path:
        """Write a source archive and recipes/NAME for it; `tables` are merged over the recipe's defaults."""
        return projects.write_recipe(self.settings.project, name, files, tables)

    def run(self, *arguments: str, **variables: str) -> projects.Done:
        """`python -m builder ARGUMENTS` with this farm's settings."""
        return projects.run_builder(arguments, {**self.environment, **variables})


@pytest.fixture(scope="session")
def shared_home() -> Path:
    """The machine's own GRACEFARM_HOME: roots and environments are made once and used by all tests."""
    return make_shared(load().home)


def make_shared(home: Path) -> Path:
    """Make the folders that the farms of tests and benchmarks share."""
    for name in SHARED:
        (home / name).mkdir(parents=True, exist_ok=True)
    return home


@contextmanager
def new_farm(shared_home: Path) -> Iterator[Farm]:
    """An empty farm: no builds yet, stacks `bare` (no torch) and `cu130`, no recipes."""
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
    """A farm of the test's own."""
    with new_farm(shared_home) as made:
        yield made

"""pyproject.toml's extras: each program imports only its own extra, and one sentence says what is missing."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gracefarm import console, extras
from gracefarm.errors import ExitCode, HostError
from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRA_OF = {"builder/farm/": "farm"}
"Folders of a program whose packages an extra beside the program's own brings."
ON_NODES = {"ray", "torch", "huggingface_hub"}
"Imported only by deploy.remote, on nodes, whose environment has them."
COMES_WITH = {"pydantic_core": "pydantic"}
"Packages of one project that are two distributions."


def distributions(texts: list[str]) -> set[str]:
    """Of requirements."""
    return {canonicalize_name(Requirement(text).name) for text in texts}


def imports(program: str) -> Iterator[tuple[str, str]]:
    """File and package of each import of another project."""
    for path in (REPOSITORY / program).rglob("*.py"):
        if "data" in path.relative_to(REPOSITORY).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for package in {name.partition(".")[0] for name in names}:
                if package not in sys.stdlib_module_names and package not in extras.PACKAGES:
                    yield str(path.relative_to(REPOSITORY)), package


@pytest.mark.parametrize("program", ["gracefarm", "builder", "index", "deploy"])
def test_what_a_program_imports_is_in_its_extra(program: str) -> None:
    declared = distributions(PROJECT["dependencies"] + PROJECT["optional-dependencies"].get(program, []))
    having = metadata.packages_distributions()
    optional = PROJECT["optional-dependencies"]
    more = {folder: distributions(optional[extra]) for folder, extra in EXTRA_OF.items()}
    strange = {
        f"{path} imports {package}"
        for path, package in imports(program)
        if not (path.startswith("deploy/remote/") and package in ON_NODES)
        and declared.union(*(brought for folder, brought in more.items() if path.startswith(folder))).isdisjoint(
            canonicalize_name(name) for name in having.get(COMES_WITH.get(package, package), [])
        )
    }
    assert strange == set()


def test_what_the_tests_alone_need_is_in_dev_alone() -> None:
    for extra in ("builder", "container", "farm", "index", "deploy"):
        assert "pypiserver" not in distributions(PROJECT["optional-dependencies"][extra])
    assert "pypiserver" in distributions(PROJECT["optional-dependencies"]["dev"])


def test_a_package_that_is_missing_is_told_with_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> None:
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil._common")

    with pytest.raises(SystemExit) as caught:
        console.run(program, as_json=False, extra="builder")
    assert caught.value.code == ExitCode.HOST
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause == "error: builder requires psutil, which is not installed"
    assert remedy == "remedy: run `pip install 'gracefarm[builder]'`"


@pytest.mark.parametrize("name", ["builder.planning.gone", None])
def test_a_module_of_ours_that_is_missing_is_a_defect(name: str | None) -> None:
    def program() -> None:
        raise ModuleNotFoundError("No module named ...", name=name)

    with pytest.raises(ModuleNotFoundError):
        console.run(program, as_json=False, extra="builder")


def test_an_extra_is_asked_for_before_the_work_that_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require("index")
    installed = metadata.distribution

    def without(name: str) -> metadata.Distribution:
        if name == "granian":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "distribution", without)
    extras.require("deploy")
    with pytest.raises(HostError, match="index requires granian, which is not installed") as caught:
        extras.require("index")
    assert caught.value.remedy == "run `pip install 'gracefarm[index]'`"

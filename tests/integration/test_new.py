"""`builder new`: a recipe read from an sdist on an index, or from a commit; or an immediate reason why there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.planning import recipe
from builder.planning.sources import GitSource
from tests.conftest import Farm
from tests.integration import fetch_kit
from tests.integration.fetch_kit import Repository, Served, Server, sha256
from tests.projects import Done

SETUP = """
import os
import urllib.request
from setuptools import Extension, setup
if os.environ.get("THING_FORCE_BUILD", "0") != "1":
    urllib.request.urlopen("https://example.org/thing.whl")
setup(name="thing", version="1.2", packages=["thing"], ext_modules=[Extension("thing.core", ["core.c", "more.c"])])
"""
CORE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "core"};
PyMODINIT_FUNC PyInit_core(void) { return PyModule_Create(&module); }
"""
FILES = {
    "PKG-INFO": "Metadata-Version: 2.4\nName: thing\nVersion: 1.2\nSummary: A thing\nLicense-Expression: MIT\n\nText\n",
    "setup.py": SETUP,
    "core.c": CORE,
    "more.c": "int more;\n",
    "thing/__init__.py": "",
}


@pytest.fixture
def server() -> Iterator[Server]:
    with fetch_kit.running() as running:
        yield running


def offer(server: Server, files: dict[str, str], *others: str) -> bytes:
    """The project `thing` on an index, with an sdist of these files, if there are any, and other files by name."""
    sdist = fetch_kit.tarball({f"thing-1.2/{name}": text for name, text in files.items()})
    names = [*(["thing-1.2.tar.gz"] if files else []), *others]
    links = "".join(
        f'<a href="../../files/{name}#sha256={sha256(sdist) if name.endswith("1.2.tar.gz") else "0" * 64}">{name}</a>'
        for name in names
    )
    server.served["/files/thing-1.2.tar.gz"] = Served(sdist)
    server.served["/simple/thing/"] = Served(f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html")
    return sdist


def new(farm: Farm, server: Server, *options: str) -> Done:
    return farm.run("new", *options, "--stack", "bare", GRACEFARM_PYTHON_INDEX=f"{server.url}/simple/")


def written(farm: Farm) -> list[str]:
    return sorted(place.name for place in (farm.settings.project / "recipes").iterdir())


def test_the_recipe_of_an_sdist_says_where_each_value_comes_from_and_builds(farm: Farm, server: Server) -> None:
    sdist = offer(server, FILES, "thing-1.3rc1.tar.gz")
    done = new(farm, server, "Thing", "--json")
    assert done.code == 0, done.said
    values = {row["key"]: row for row in json.loads(done.out.splitlines()[-1])["values"]}
    assert values["license"] == {"key": "license", "value": "MIT", "read": True, "origin": "PKG-INFO:5"}
    assert values["build.environment"]["value"] == "THING_FORCE_BUILD=1"
    assert values["build.environment"]["origin"].startswith("setup.py:6")
    assert not values["build.memory_per_job"]["read"]
    made = recipe.load(farm.settings.project / "recipes", "thing").data
    assert (made.name, made.version, made.summary, made.source.sha256) == ("Thing", "1.2", "A thing", sha256(sdist))  # type: ignore[union-attr]
    assert made.smoke.imports == ("thing", "thing.core")
    assert written(farm) == ["thing"]

    # Nothing is edited before it is built.
    built = farm.run("build", "thing", "--jobs", "2")
    assert built.code == 0, built.said
    assert "[2/2] " in farm.run("log", "thing").out

    notes = farm.settings.project / "recipes/thing/NOTES.md"
    notes.write_text("a person's words")
    again = new(farm, server, "thing")
    assert (again.code, "does not overwrite recipes" in again.said) == (2, True), again.said
    assert notes.read_text() == "a person's words"


def test_a_build_that_downloads_is_told_the_variable_of_its_setup_py_that_avoids_it(farm: Farm, server: Server) -> None:
    offer(server, FILES)
    assert new(farm, server, "thing").code == 0
    place = farm.settings.project / "recipes/thing/recipe.toml"
    lines = [line for line in place.read_text().splitlines() if not line.startswith("environment")]
    place.write_text("\n".join(lines) + "\n")
    done = farm.run("build", "thing")
    assert done.code == 20, done.said
    assert 'set THING_FORCE_BUILD = "1" in [build.environment], which avoids the download at setup.py:6' in done.said


@pytest.mark.parametrize(
    ("files", "others", "options", "code", "said"),
    [
        ({}, ("thing-1.2-py3-none-any.whl",), (), 10, "it has no sdist, only thing-1.2-py3-none-any.whl"),
        (FILES, ("thing-1.3-py3-none-any.whl",), (), 10, "give the newest version that has an sdist: --version 1.2"),
        (FILES, (), ("--version", "7"), 10, "give one of these versions: 1.2"),
        ({"setup.py": SETUP, "PKG-INFO": FILES["PKG-INFO"]}, (), (), 13, "it lacks core.c, which setup.py:7 compiles"),
        (
            {**FILES, "pyproject.toml": '[build-system]\nrequires = ["no-such-thing"]\n'},
            (),
            (),
            10,
            "no-such-thing",
        ),
    ],
    ids=["no sdist", "older sdist", "no version", "no sources", "no requirement"],
)
def test_what_cannot_work_is_said_at_once_and_nothing_is_written(
    farm: Farm, server: Server, files: dict[str, str], others: tuple[str, ...], options: tuple[str, ...], code: int, said: str
) -> None:
    offer(server, files, *others)
    done = new(farm, server, "thing", *options)
    assert (done.code, said in done.said) == (code, True), done.said
    assert written(farm) == []
    missing = new(farm, server, "nothing")
    assert (missing.code, "has no such project" in missing.said) == (10, True), missing.said


def test_a_commit_brings_its_submodules_with_their_licences(farm: Farm, server: Server, tmp_path: Path) -> None:
    inner = Repository(tmp_path / "inner")
    pinned = inner.commit(
        {"LICENSE": "Permission is hereby granted, free of charge, to any person obtaining a copy", "a.c": ""}
    )
    outer = Repository(tmp_path / "outer")
    outer.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", "../inner", "third_party/inner")
    commit = outer.commit({**FILES, "pyproject.toml": '[project]\nname = "thing"\nversion = "3.1"\n'})
    done = new(farm, server, "thing", "--git", outer.url, "--commit", commit)
    assert done.code == 0, done.said
    source = recipe.load(farm.settings.project / "recipes", "thing").data.source
    assert isinstance(source, GitSource)
    assert (source.commit, source.tree) == (commit, outer.tree(commit))
    module = source.submodules["third_party/inner"]
    assert (module.commit, module.license) == (pinned, "MIT")
    assert farm.run("fetch", "thing").code == 0
    alone = new(farm, server, "other", "--git", outer.url)
    assert (alone.code, "--git and --commit require each other" in alone.said) == (2, True), alone.said

"""`builder updates`: what an index, a git repository and uv's own list offer beyond the pins of a project."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

from tests.conftest import REPOSITORY, Farm
from tests.integration import fetch_kit
from tests.integration.fetch_kit import Served, Server

NOW = datetime.now(UTC)


def page(server: Server, project: str, **ages: int | None) -> None:
    """A project's page: releases (with '_' for '.') and the days since their upload; None: the index does not say."""
    files = []
    for name, days in ages.items():
        version = name.strip("v").replace("_", ".")
        file = {"filename": f"{project}-{version}.tar.gz", "url": f"{server.url}/{project}-{version}.tar.gz", "hashes": {}}
        if days is not None:
            file["upload-time"] = (NOW - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
        files.append(file)
    content = {"meta": {"api-version": "1.1"}, "name": project, "files": files}
    server.served[f"/simple/{project}/"] = Served(json.dumps(content).encode(), "application/vnd.pypi.simple.v1+json")


def of_recipe(farm: Farm, key: str, *changes: tuple[str, str]) -> None:
    folder = farm.settings.project / "recipes" / key
    shutil.copytree(REPOSITORY / "recipes" / key, folder)
    text = (folder / "recipe.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.toml").write_text(text)


@pytest.fixture
def project(farm: Farm) -> Farm:
    """Three recipes, torch and one old Python."""
    of_recipe(farm, "causal_conv1d")
    of_recipe(farm, "torch_scatter")
    repository = farm.settings.project / "upstream"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (
        ["init", "-q"],
        ["commit", "-q", "--allow-empty", "-m", "a"],
        ["tag", "v3.2.0"],
        ["tag", "v3.4.1"],
        ["tag", "next"],
    ):
        subprocess.run([*git, *words], check=True)
    of_recipe(farm, "triton", ("https://github.com/triton-lang/triton", f"file://{repository}"))
    for name in ("3.10", "3.11", "3.12", "3.13", "3.13t", "3.14"):
        shutil.rmtree(farm.settings.project / "interpreters" / name)
    place = farm.settings.project / "interpreters/3.14t/interpreter.toml"
    place.write_text(place.read_text().replace("3.14.7", "3.14.0"))
    return farm


def test_newer_releases_are_changes_to_review(project: Farm) -> None:
    with fetch_kit.running() as server:
        page(server, "causal-conv1d", v1_6_0=300, v1_7_0=200, v1_8_0=30, v1_9_0=2, v2_0rc1=20)
        page(server, "torch-scatter", v2_1_2=500, v2_1_3=None)
        page(server, "torch", v2_15_0=30, v2_16_0=3)
        index = f"{server.url}/simple/"
        done = project.run("updates", "--json", GRACEFARM_PYTHON_INDEX=index)
        assert done.code == 0, done.said
        printed = json.loads(done.out.splitlines()[-1])
        rows = {row["name"]: row for row in printed}
        found = {name: (row["current"], row["newest"], row["waiting"]) for name, row in rows.items()}
        assert found["causal_conv1d"] == ("1.7.0", "1.8.0", "1.9.0")
        assert found["torch_scatter"] == ("2.1.2", "2.1.3", None)
        assert found["torch"] == ("2.15.0", None, "2.16.0")
        assert found["triton"] == ("3.2.0+git755d4164", "3.4.1", None)
        assert (rows["causal_conv1d"]["age_days"], rows["torch_scatter"]["age_days"]) == (30, None)
        assert rows["causal_conv1d"]["change"].startswith("in recipes/causal_conv1d/recipe.toml, set version to 1.8.0")
        current, newest, _ = found["3.14t"]
        assert (current, newest.split(".")[:2]) == ("3.14.0", ["3", "14"])
        assert rows["3.14t"]["age_days"] >= 7

        eager = project.run("updates", "--min-age", "2d", GRACEFARM_PYTHON_INDEX=index)
        assert "causal_conv1d 1.7.0 > 1.9.0 (2 days old)" in eager.said
        assert "builder stack new NAME --torch 2.16.0" in eager.said
        del server.served["/simple/torch/"]
        (project.settings.project / "upstream").rename(project.settings.project / "gone")
        cut = project.run("updates", GRACEFARM_PYTHON_INDEX=index)
        assert cut.code == 0
        assert "has no such project" in cut.said
        assert "the tags of file:///" in cut.said
        assert "1.7.0 > 1.8.0" in cut.said, "one upstream that does not answer hides no other"


def test_an_age_is_days_or_hours(farm: Farm) -> None:
    done = farm.run("updates", "--min-age", "a week")
    assert done.code == 2
    assert "'a week' is not an age" in done.said

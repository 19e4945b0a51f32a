from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from index_kit import Server, serving, wheel


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Isolate tests from the settings and the home of the user."""
    monkeypatch.setenv("GRACEFARM_HOME", str(tmp_path / "home"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """An empty index that accepts new projects."""
    with serving(tmp_path / "root", "--allow-new") as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of a module; each test uses different project names."""
    with serving(tmp_path_factory.mktemp("index") / "root", "--allow-new") as running:
        yield running


@pytest.fixture(scope="module")
def hosted(shared: Server) -> Server:
    """A project with four wheels, one of them with a local version."""
    for version in ("1.0", "1.1", "2.0"):
        assert shared.upload(*wheel("http_pkg", version)).status_code == 200
    assert shared.upload(*wheel("http_pkg", "2.0+cu130", "cp311-cp311-manylinux_2_34_aarch64")).status_code == 200
    return shared

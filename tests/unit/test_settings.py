"""settings.toml: one file for three programs, and a slip in it is told by each of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from builder.planning.settings import Settings, load
from gracefarm import settings
from gracefarm.errors import ConfigError, ExitCode
from gracefarm.settings import BUILDER_KEYS, SharedSettings


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """settings.toml, with its own home."""
    path = tmp_path / "settings.toml"
    monkeypatch.setenv("GRACEFARM_SETTINGS", str(path))
    monkeypatch.delenv("GRACEFARM_HOME", raising=False)
    path.write_text(f'home = "{tmp_path}/home"\n')
    return path


def test_the_builders_keys_are_those_of_its_settings() -> None:
    assert set(BUILDER_KEYS) == set(Settings.model_fields) - set(SharedSettings.model_fields)


def test_what_only_the_builder_is_told_troubles_no_other_program(file: Path) -> None:
    file.write_text(file.read_text() + 'jobs = 3\nmemory = "20GiB"\n[mirrors]\n"https://a.example" = "file:///a"\n')
    assert load().jobs == 3
    assert settings.load().home == file.parent / "home"


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("hom", "did you mean 'home'?"),
        ("job", "did you mean 'jobs'?"),
        ("zzz", "known settings: home, python_index, project, "),
    ],
)
def test_a_key_that_no_program_knows_is_refused_by_all(file: Path, key: str, remedy: str) -> None:
    file.write_text(file.read_text() + f'{key} = "1"\n')
    for reader in (load, settings.load):
        with pytest.raises(ConfigError, match=f"unknown setting '{key}'") as caught:
            reader()
        assert caught.value.cause.startswith(f"{file}: ")
        assert caught.value.remedy.startswith(remedy)


@pytest.mark.parametrize("command", [["builder", "list"], ["index", "token", "list"]])
def test_a_command_says_so_too(file: Path, command: list[str]) -> None:
    file.write_text(file.read_text() + 'job = "1"\n')
    process = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert process.returncode == ExitCode.CONFIG, process.stderr
    assert process.stderr.splitlines()[:2] == [f"error: {file}: unknown setting 'job'", "remedy: did you mean 'jobs'?"]

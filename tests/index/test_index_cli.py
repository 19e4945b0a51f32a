"""The table of commands, which is read without importing their modules."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from index_kit import run_index

from index.cli import COMMANDS, cli


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_of_a_command_what_its_help_begins_with(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert (command.help or "").startswith(COMMANDS[name][1].removesuffix("."))


@pytest.mark.parametrize("command", ["stats", "serve", "import"])
def test_a_root_that_cannot_be_a_folder_is_said(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    more = {"stats": (), "serve": ("--port", "0"), "import": (str(tmp_path),)}[command]
    for root in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/index"), tmp_path / ("a" * 300)):
        process = run_index(root, command, *more, check=False)
        assert process.returncode in (2, 4), process.stdout + process.stderr
        assert str(root) in process.stderr.replace("\n", "")
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize("option", ["--access-log", "--port-file", "--tls-cert"])
def test_a_path_that_serve_cannot_use_is_said(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" if option == "--tls-cert" else tmp_path / "file" / "below")
    more = ["--tls-key", path] if option == "--tls-cert" else []
    process = run_index(tmp_path / "root", "serve", "--port", "0", option, path, *more, check=False)
    assert process.returncode in (3, 4), process.stderr
    assert str(tmp_path / "file") in process.stderr.replace("\n", "")


def test_a_new_token_comes_alone_on_stdout_with_how_to_upload_beside_it(tmp_path: Path) -> None:
    process = run_index(tmp_path / "root", "token", "create", "--name", "ci")
    assert process.stdout.startswith("gf_")
    assert len(process.stdout.split()) == 1, "TOKEN=$(index token create …) receives only the token"
    assert "twine upload --verbose" in process.stderr


def test_a_root_after_the_command_beats_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACEFARM_INDEX_ROOT", str(tmp_path / "environment"))
    run_index(tmp_path / "after", "host", "some-pkg")
    assert run_index(tmp_path / "after", "host").stdout.split() == ["some-pkg"]
    assert not (tmp_path / "environment").exists()

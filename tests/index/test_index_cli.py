"""The table of commands, which is read before their modules are."""

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


def test_a_root_after_the_command_beats_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACEFARM_INDEX_ROOT", str(tmp_path / "environment"))
    run_index(tmp_path / "after", "host", "some-pkg")
    assert run_index(tmp_path / "after", "host").stdout.split() == ["some-pkg"]
    assert not (tmp_path / "environment").exists()

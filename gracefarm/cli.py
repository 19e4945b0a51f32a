"""A command line whose commands are imported when they are called: `--help` and short commands start quickly."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
"What the groups of all programs are made with, as context_settings."


class LazyGroup(click.Group):
    """Lists its commands from a table, without importing them.

    `table`: name to `module:function` and what --help says of it, in the order in which --help lists them.
    """

    def __init__(self, *arguments: Any, table: Mapping[str, tuple[str, str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.table = table

    def list_commands(self, _context: click.Context) -> list[str]:
        """In the table's order."""
        return list(self.table)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """Import it."""
        if name not in self.table:
            return None
        module, _, function = self.table[name][0].partition(":")
        command: click.Command = getattr(import_module(module), function)
        return command

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])


def json_option(command: click.decorators.FC) -> click.decorators.FC:
    """`--json` is taken before and after the command's name (`main` looks for it)."""
    return click.option("--json", "_json", is_flag=True, expose_value=False, help="JSON lines on stdout.")(command)

"""What the command lines share: commands that are imported late, complete help texts, `--json` before or after the name."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from gracefarm.errors import UsageError
from gracefarm.files import atomic_write

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
"context_settings of the top group of each program."

_JSON = "gracefarm.json"
"Key of the context's meta, which all nested contexts share."
_JSON_HELP = "Print results and messages as JSON, one JSON value per line."


class CommandGroup(click.Group):
    """A group that accepts --json, and whose --help shows the whole first sentence of each command."""

    def __init__(self, *arguments: Any, renamed: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.renamed = renamed or {}
        "Former name of a command to the command line that replaces it."
        json_option(self)

    def resolve_command(self, context: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the new spelling for a former one.

        Raises:
            UsageError: the command was renamed.
        """
        if args and args[0] in self.renamed:
            refuse_old(f"{context.command_path} {args[0]}", self.renamed[args[0]])
        return super().resolve_command(context, args)

    def summaries(self, context: click.Context) -> Sequence[tuple[str, str]]:
        """Name and summary of each command."""
        commands = [(name, self.get_command(context, name)) for name in self.list_commands(context)]
        return [(name, (command.help or "").partition("\n\n")[0].replace("\n", " ")) for name, command in commands if command]

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without truncating their summaries."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.summaries(context)))


class LazyGroup(CommandGroup):
    """Lists its commands from a table, without importing them.

    `table`: name to `module:function` and the summary for --help, in the order of --help.
    """

    def __init__(self, *arguments: Any, table: Mapping[str, tuple[str, str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.table = table

    def list_commands(self, _context: click.Context) -> list[str]:
        """The commands in the order of the table."""
        return list(self.table)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """Import the command."""
        if name not in self.table:
            return None
        module, _, function = self.table[name][0].partition(":")
        command: click.Command = getattr(import_module(module), function)
        return command

    def summaries(self, _context: click.Context) -> Sequence[tuple[str, str]]:
        """Name and summary of each command, from the table."""
        return [(name, text) for name, (_, text) in self.table.items()]

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands from the table, without importing them, and options."""
        commands = [CompletionItem(name, help=text) for name, text in self.summaries(context) if name.startswith(incomplete)]
        return commands + click.Command.shell_complete(self, context, incomplete)


def json_option(command: click.decorators.FC) -> click.decorators.FC:
    """Accept `--json`; `json_requested` tells whether it was given."""
    return click.option("--json", "_json", is_flag=True, expose_value=False, callback=_note_json, help=_JSON_HELP)(command)


def _note_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_JSON] = True


def json_requested() -> bool:
    """Whether --json was given, before or after the command's name.

    The top group creates its console before the command's options are parsed, so the arguments of the process count too. Those
    after `--` belong to another program.
    """
    context = click.get_current_context(silent=True)
    arguments = [*sys.argv[1:], "--"]
    return bool(context and context.meta.get(_JSON)) or "--json" in arguments[: arguments.index("--")]


def show_schemas(schemas: Mapping[str, str], folder: Path | None) -> None:
    """Write JSON schemas (name to text) as files into a folder; without one, print them, with --json on one line each."""
    for name, text in schemas.items():
        if folder is not None:
            atomic_write(folder / f"{name}.json", text)
        else:
            sys.stdout.write(json.dumps(json.loads(text)) + "\n" if json_requested() else text)


def refuse_old(old: str, new: str) -> NoReturn:
    """Refuse a former spelling of a command.

    Raises:
        UsageError: always; names the new spelling.
    """
    raise UsageError(f"`{old}` is now `{new}`")

"""`deploy`: the command line."""

from __future__ import annotations

import sys

import click

from gracefarm import console
from gracefarm.errors import UsageError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Nodes to a served model. Not built yet."""
    raise UsageError("deploy is not built yet", remedy="`builder` and `index` are")


def main() -> None:
    """The console script."""
    console.run(lambda: cli.main(standalone_mode=False), as_json="--json" in sys.argv)

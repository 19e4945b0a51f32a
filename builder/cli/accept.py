"""`--accept-new`: accept unknown digests at first use after a confirmation, as ssh does with host keys."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import click

from builder.cli.options import Aim, plan_of
from builder.planning.gaps import Gap
from builder.planning.settings import PACKAGED, Settings
from gracefarm.console import Console
from gracefarm.errors import SeveralError, UsageError


def accept_new(names: Sequence[str], aim: Aim, settings: Settings, console: Console, *, yes: bool) -> None:
    """Read each unknown digest of these recipes' builds, and write it with today's date into its file.

    Raises:
        UsageError: no recipe is named, the user cannot be asked or refuses, or the files belong to the installed package.
        FetchError, DigestError: the only file cannot be fetched, or its index has another digest.
        SeveralError: several files failed; each error was printed.
    """
    from builder.fetch import fill

    if not names:
        raise UsageError("--accept-new requires names of recipes", remedy="name the recipes, and omit --changed and --matrix")
    for name in names:
        plan = plan_of(name, aim.stack, aim.target, settings, aim.on)
        missing = plan.gaps
        if not missing:
            continue
        _ask(missing, settings, console, yes=yes)
        with console.progress("accept") as tick:
            filled = fill.fill(missing, plan.stack, settings, tick, accepted=datetime.now(tz=UTC).date())
        for gap, sha256 in filled.digests:
            console.warn(f"accepted at first use, not confirmed: {gap.what}: sha256 {sha256} of {gap.url}")
        if len(filled.failed) == 1:
            raise filled.failed[0]
        for error in filled.failed:
            console.error(error)
        if filled.failed:
            raise SeveralError(f"{len(filled.failed)} of {len(missing)} digests could not be fetched; see the errors above")


def _ask(missing: Sequence[Gap], settings: Settings, console: Console, *, yes: bool) -> None:
    if settings.project == PACKAGED:
        raise UsageError(
            "--accept-new changes recipe.toml and stack.toml, but files of the installed gracefarm cannot be changed",
            remedy="create a project with `builder init DIR` and run the command there",
        )
    for gap in missing:
        console.step("accept", f"{gap.what}: {gap.url}")
    if yes:
        return
    if console.as_json or not sys.stdin.isatty():
        raise UsageError(
            f"--accept-new asks for confirmation of {len(missing)} digests, which requires a terminal",
            remedy="add --yes to accept them without confirmation",
        )
    if not click.confirm("Accept these files as they are now, and store their digests?", err=True):
        raise UsageError("nothing was accepted", remedy="read the digests with `builder lock` and compare them")

"""`--accept-new`: digests that are not known are read at first use, with a person's word, as ssh does with host keys."""

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
    """Read each digest that the builds of these recipes lack, and write it into its file with the day.

    Raises:
        UsageError: no recipe is named, nobody is there to ask or the person says no, the files are the installed package's.
        FetchError, DigestError: the only one cannot be had, or its index says another digest.
        SeveralError: several cannot be had; each was printed.
    """
    from builder.fetch import fill

    if not names:
        raise UsageError("--accept-new is about recipes that are named", remedy="name them, without --changed and --matrix")
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
            raise SeveralError(f"{len(filled.failed)} of {len(missing)} digests cannot be had; each is described above")


def _ask(missing: Sequence[Gap], settings: Settings, console: Console, *, yes: bool) -> None:
    if settings.project == PACKAGED:
        raise UsageError(
            "--accept-new writes into recipe.toml and stack.toml, and those of the installed gracefarm are not changed",
            remedy="`builder init DIR` makes a project of your own: run the command there",
        )
    for gap in missing:
        console.step("accept", f"{gap.what}: {gap.url}")
    if yes:
        return
    if console.as_json or not sys.stdin.isatty():
        raise UsageError(
            f"--accept-new asks a person, and there is no terminal: {len(missing)} digests would be accepted unseen",
            remedy="add --yes, if that is what you want",
        )
    if not click.confirm("Take these files as they are now, and write their digests down?", err=True):
        raise UsageError("nothing was accepted", remedy="`builder lock` reads digests for you to compare")

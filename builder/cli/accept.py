"""`--accept-new`: store unknown digests at first use, after a confirmation, as ssh does with host keys."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import click

from builder.planning.gaps import Gap
from builder.planning.settings import PACKAGED, Settings
from builder.planning.stack import LoadedStack
from gracefarm.console import Console, counted
from gracefarm.errors import GracefarmError, SeveralError, UsageError

accept_option = click.option(
    "--accept-new",
    "accepts",
    is_flag=True,
    help="Download the files whose digest is unknown, and store their digests. These digests are not compared with another "
    "source. The command asks for confirmation first.",
)
yes_option = click.option("--yes", is_flag=True, help="With --accept-new: do not ask for confirmation.")


def accept_new(
    lacking: Iterable[tuple[LoadedStack, Sequence[Gap]]], settings: Settings, console: Console, *, yes: bool
) -> None:
    """Read each unknown digest of some builds, given with their stacks, and write it with today's date into its file.

    Raises:
        UsageError: the user cannot be asked or refuses, or the files belong to the installed package.
        FetchError, DigestError: the only file cannot be fetched, or its index has another digest.
        SeveralError: several files failed; each error was printed.
    """
    from builder.fetch import fill

    missing = _each_once(lacking)
    if not missing:
        return
    _ask([gap for _, gap in missing], settings, console, yes=yes)
    failed: list[GracefarmError] = []
    for stack, gap in missing:
        with console.progress("accept") as tick:
            filled = fill.fill([gap], stack, settings, tick, accepted=datetime.now(tz=UTC).date())
        failed += filled.failed
        for _, sha256 in filled.digests:
            console.warn(f"accepted, but no second source confirms it: {gap.what}, sha256 {sha256} of {gap.url}")
    if len(failed) == 1:
        raise failed[0]
    for error in failed:
        console.error(error)
    if failed:
        raise SeveralError(
            f"{len(failed)} of {len(missing)} digests could not be fetched; see the errors above",
            remedy="fix these errors, then repeat the command",
        )


def _each_once(lacking: Iterable[tuple[LoadedStack, Sequence[Gap]]]) -> list[tuple[LoadedStack, Gap]]:
    """Builds of one stack lack the same digests of it."""
    missing: list[tuple[LoadedStack, Gap]] = []
    for stack, gaps in lacking:
        missing += [(stack, gap) for gap in gaps if gap not in [known for _, known in missing]]
    return missing


def _ask(missing: Sequence[Gap], settings: Settings, console: Console, *, yes: bool) -> None:
    if settings.project == PACKAGED:
        raise UsageError(
            "--accept-new writes to recipe.toml and stack.toml, but the files of the installed gracefarm cannot be changed",
            remedy="create a project with `builder init DIR` and run the command there",
        )
    for gap in missing:
        console.step("accept", f"{gap.what}: {gap.url}")
    if yes:
        return
    if console.as_json or not sys.stdin.isatty():
        raise UsageError(
            f"--accept-new asks for confirmation of {counted(len(missing), 'digest')}, but "
            + ("the command cannot ask with --json" if console.as_json else "there is no terminal"),
            remedy="add --yes to accept the digests without a question",
        )
    if not click.confirm("Accept these files as they are now, and store their digests?", err=True):
        raise UsageError(
            "you did not accept the digests, so no digest was stored and nothing was built",
            remedy="write the digests with `builder lock NAME`, and compare them with another source before you build",
        )

"""Output: rich on a terminal, plain lines in a log, JSON lines with --json."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import rich.console
from rich.markup import escape

from gracefarm import extras
from gracefarm.errors import DiskFullError, ExitCode, GracefarmError, HostError

Tick = Callable[[int, int | None, str], None]
"Reports progress: done, total (None: unknown), and a short text such as the file or the remaining time."

Say = Callable[[str], None]
"Reports a finished action in one line of text."

PLAIN_INTERVAL = 15.0


def no_tick(_done: int, _total: int | None, _text: str) -> None:
    """A Tick that shows nothing."""


def silent(_text: str) -> None:
    """A Say that shows nothing."""


def counted(number: int, noun: str) -> str:
    """A number and its noun, as 1 file or 2 files."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Console:
    """The output of a command line. Messages go to stderr and results to stdout, so that a pipe receives only results."""

    def __init__(self, *, as_json: bool = False, clean: Callable[[str], str] = str) -> None:
        self.as_json = as_json
        self.clean = clean
        "Filter for every text, to redact secrets in the output of other programs."
        self._rich = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)

    @property
    def interactive(self) -> bool:
        """Whether the output is a terminal with a user."""
        return self._rich.is_terminal and not self.as_json and "CI" not in os.environ

    def event(self, kind: str, text: str, **fields: object) -> None:
        """Report an event: a line of text, or with --json an object (`event`, `text`, fields)."""
        text = self.clean(text)
        if self.as_json:
            sys.stdout.write(json.dumps({"event": kind, "text": text, **fields}, default=str) + "\n")
            sys.stdout.flush()
        else:
            self._rich.print(escape(text))

    def step(self, name: str, text: str) -> None:
        """Report the start or the outcome of a step."""
        if self.as_json:
            self.event("step", text, step=name)
        else:
            self._rich.print(f"[bold cyan]{escape(name):>9}[/]  {escape(self.clean(text))}")

    def warn(self, text: str) -> None:
        """Report something that the user should know but that requires no action now."""
        if self.as_json:
            self.event("warning", text)
        else:
            self._rich.print(f"[yellow]{escape(self.clean(text))}[/]")

    def result(self, value: object, text: str = "") -> None:
        """Print the result on stdout: `value` as JSON with --json, else `text`."""
        sys.stdout.write((json.dumps(value, default=str) if self.as_json else text) + "\n")
        sys.stdout.flush()

    def error(self, error: GracefarmError) -> None:
        """Print cause, remedy and the command to repeat."""
        if self.as_json:
            self.event(
                "error",
                error.cause,
                remedy=error.remedy,
                repeat=error.repeat,
                exit_code=int(error.exit_code),
                failure=error.exit_code.name.lower(),
            )
            return
        self._rich.print(f"[bold red]error:[/] {escape(error.cause)}")
        if error.remedy:
            self._rich.print(f"[bold]remedy:[/] {escape(error.remedy)}")
        if error.repeat:
            self._rich.print(f"[bold]repeat:[/] {escape(error.repeat)}")

    @contextmanager
    def progress(self, name: str) -> Iterator[Tick]:
        """A Tick that draws a bar on a terminal, else prints a line every 15 s, or an event with --json."""
        if not self.interactive:
            yield self._plain_tick(name)
            return
        # Imported here, so that servers and commands with redirected output start more quickly.
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("[bold cyan]{task.fields[name]:>9}[/] "),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task("", total=None, name=name, visible=False)
            yield lambda finished, total, text: bar.update(
                task,
                completed=finished,
                total=total if total is not None else max(finished, 1),
                description=escape(text),
                visible=True,
            )

    def _plain_tick(self, name: str) -> Tick:
        last = time.monotonic()

        def tick(finished: int, total: int | None, text: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < PLAIN_INTERVAL and finished != total:
                return
            last = now
            if self.as_json:
                self.event("progress", text, step=name, done=finished, total=total)
            else:
                self.step(name, f"{finished}/{'?' if total is None else total}  {text}".rstrip())

        return tick


def _machine_error(error: OSError) -> GracefarmError | None:
    """The error for failures that can occur anywhere: a full disk, missing permissions; None for other errors."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"no space left on the device: {error.filename}", remedy="free space, then repeat the command")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return HostError(
            f"{error.filename}: {os.strerror(error.errno).lower()}",
            remedy="run the command as the owner of the file, or set GRACEFARM_HOME to a different folder",
        )
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP) and error.filename:
        return HostError(f"{error.filename}: {os.strerror(error.errno).lower()}", remedy="choose a different path")
    return None


def _missing_package(error: ModuleNotFoundError, extra: str) -> GracefarmError | None:
    """The error for a package of the extra that is not installed; None for our own modules."""
    package = (error.name or "").partition(".")[0]
    return None if package in {"", *extras.PACKAGES} else extras.missing(package, extra)


def run(program: Callable[[], None], *, as_json: bool, extra: str) -> None:
    """Run a click program and exit with its code. Errors of users are printed as one sentence, without a traceback.

    `extra` installs the program's packages. Other exceptions are our defects: they keep their traceback and exit with 1.
    """
    console = Console(as_json=as_json)
    try:
        program()
    except GracefarmError as error:
        console.error(error)
        sys.exit(error.exit_code)
    except (OSError, ModuleNotFoundError) as error:
        known = _machine_error(error) if isinstance(error, OSError) else _missing_package(error, extra)
        if known is None:
            raise
        console.error(known)
        sys.exit(known.exit_code)
    except click.ClickException as error:
        if as_json:
            console.event("error", error.format_message(), exit_code=int(ExitCode.USAGE), failure="usage")
        else:
            error.show()
        sys.exit(ExitCode.USAGE)
    except (KeyboardInterrupt, click.Abort):
        console.event("error", "the command was interrupted. No process is still running. To continue, repeat the command")
        sys.exit(ExitCode.INTERRUPTED)

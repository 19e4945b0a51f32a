"""Results of work on each node, and the failures of several nodes as one error."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from deploy.nodes.deployment import Node
from gracefarm.errors import DiskFullError, GracefarmError, NodeError
from gracefarm.process import last_line

T = TypeVar("T")


class Named(Protocol):
    """A node, as Node or RemoteNode."""

    @property
    def name(self) -> str:
        """Its name in the deployment."""
        ...


N = TypeVar("N", bound=Named)


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """The result of a command on one node."""

    node: Node
    returncode: int | None
    "128 + N after signal N, as in a shell; None: unknown, see `error`."
    raw: bytes = b""
    "The bytes of stdout."
    stderr: str = ""
    error: GracefarmError | None = None
    "Why there is no return code: node not reached, connection lost, timed out."
    seconds: float = 0.0

    @property
    def stdout(self) -> str:
        """The text of stdout."""
        return self.raw.decode(errors="replace")

    @property
    def ok(self) -> bool:
        """True if the return code is 0."""
        return self.returncode == 0


_FULL = re.compile(r"No space left on device|Disk quota exceeded|Errno 28\b|Errno 122\b")
_PLACE = re.compile("(?<![\\w/])/[^\\s:'\"\u2018\u2019]+")


def full(words: str) -> bool:
    """Whether an error message reports a full disk."""
    return bool(_FULL.search(words))


def refusal_of(node: str, what: str, words: str) -> GracefarmError:
    """An error from a program's stderr: which file system is full, or its last line."""
    if full(words):
        line = next(line for line in words.splitlines() if full(line))
        place = _PLACE.search(line) or _PLACE.search(words) or _PLACE.search(what)
        where = place[0] if place else "its local disk"
        look = f"`deploy run -k {node} -- df -h{' ' + where if place else ''}` shows how much is free"
        return DiskFullError(f"{node}: no space left on {where}", remedy=f"free space there ({look}), then repeat the command")
    return NodeError(
        f"{node}: {what}: {last_line(words)}", remedy=f"open a shell on the node with `deploy ssh {node}`, and fix this error"
    )


def require(results: Mapping[str, CommandResult], what: str) -> None:
    """Check that the command succeeded on all nodes.

    Raises:
        GracefarmError: the error of the first node that failed, with the names of the others.
    """
    failed = [result for result in results.values() if not result.ok]
    if not failed:
        return
    first = failed[0]
    names = ", ".join(result.node.name for result in failed[1:])
    more = f" (and on {len(failed) - 1} more: {names})" if names else ""
    if first.error:
        raise type(first.error)(f"{what}: {first.error.cause}{more}", remedy=first.error.remedy)
    words = first.stderr.strip() or first.stdout
    if full(words):
        raise refusal_of(first.node.name, what, words)
    reason = last_line(words, "")
    raise NodeError(
        f"{what}: exit code {first.returncode} on {first.node}{': ' + reason if reason else ''}{more}",
        remedy=f"open a shell on the node with `deploy ssh {first.node.name}`, and fix this error",
    )


async def on_all(nodes: Sequence[N], work: Callable[[N], Awaitable[T]]) -> dict[str, T]:
    """Run `work` on every node in parallel.

    Raises:
        GracefarmError: after all have ended; its message has every node that failed and the cause.
    """
    good, bad = await try_all(nodes, work)
    if bad:
        raise combined_error(bad, len(nodes))
    return good


async def try_all(nodes: Sequence[N], work: Callable[[N], Awaitable[T]]) -> tuple[dict[str, T], dict[str, GracefarmError]]:
    """Like `on_all`, but return the failures too. Exceptions other than GracefarmError are raised."""
    outcomes = await asyncio.gather(*(work(node) for node in nodes), return_exceptions=True)
    good: dict[str, T] = {}
    bad: dict[str, GracefarmError] = {}
    for node, outcome in zip(nodes, outcomes, strict=True):
        if isinstance(outcome, GracefarmError):
            bad[node.name] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            good[node.name] = outcome
    return good, bad


def combined_error(bad: Mapping[str, GracefarmError], of: int) -> GracefarmError:
    """The failures of several nodes as one error, with the class of the first one. Each cause is told once, with its nodes.

    If all nodes have the same cause, as after a mistake in a local file, it is the whole message.
    """
    first = next(iter(bad.values()))
    same: dict[str, list[str]] = {}
    for name, error in bad.items():
        who = _who(name, error.cause)
        same.setdefault(error.cause.removeprefix(who), []).append(who)
    if len(bad) == 1 or (len(bad) == of and list(same) == [first.cause]):
        return first
    causes = (", ".join(filter(None, whos)) + rest for rest, whos in same.items())
    return type(first)(f"{len(bad)} of {of} nodes failed: {'; '.join(causes)}", remedy=first.remedy)


def _who(name: str, cause: str) -> str:
    """The node at the start of a cause: its name, and its address with or without the port. Empty if there is none."""
    match = re.match(rf"{re.escape(name)}(?: \S*[.:]\S*?[\w\]])?(?=:? )", cause)
    return match[0] if match else ""

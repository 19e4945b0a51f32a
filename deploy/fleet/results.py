"""What became of work on each node: results, and several nodes' failures as one error."""

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
    """A node, in whichever form it is at hand."""

    @property
    def name(self) -> str:
        """Its name in the deployment."""
        ...


N = TypeVar("N", bound=Named)


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """What became of a command on one node."""

    node: Node
    returncode: int | None
    "128 + N after signal N, as a shell says; None: unknown, see `error`."
    raw: bytes = b""
    "stdout as it came."
    stderr: str = ""
    error: GracefarmError | None = None
    "Why there is no return code: not reached, cut, timed out."
    seconds: float = 0.0

    @property
    def stdout(self) -> str:
        """stdout as text."""
        return self.raw.decode(errors="replace")

    @property
    def ok(self) -> bool:
        """Ended with 0."""
        return self.returncode == 0


_FULL = re.compile(r"No space left on device|Disk quota exceeded|Errno 28\b|Errno 122\b")
_PLACE = re.compile("(?<![\\w/])/[^\\s:'\"\u2018\u2019]+")


def full(words: str) -> bool:
    """A program complains of a disk without room."""
    return bool(_FULL.search(words))


def refusal_of(node: str, what: str, words: str) -> GracefarmError:
    """A program's words on stderr as an error: which file system is full, or its last line."""
    if full(words):
        line = next(line for line in words.splitlines() if full(line))
        place = _PLACE.search(line) or _PLACE.search(words) or _PLACE.search(what)
        where = place[0] if place else "its own disk"
        look = f"`deploy run -k {node} -- df -h{' ' + where if place else ''}` shows it"
        return DiskFullError(f"{node}: no space left on {where}", remedy=f"free space there ({look}), then repeat the command")
    return NodeError(f"{node}: {what}: {last_line(words)}", remedy=f"look there: `deploy ssh {node}`")


def require(results: Mapping[str, CommandResult], what: str) -> None:
    """Nothing, when all ended with 0.

    Raises:
        GracefarmError: the first node's, which names how many others failed too.
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
        f"{what}: {first.node} ended with {first.returncode}{': ' + reason if reason else ''}{more}",
        remedy=f"look there: `deploy ssh {first.node.name}`",
    )


async def on_all(nodes: Sequence[N], work: Callable[[N], Awaitable[T]]) -> dict[str, T]:
    """`work` on every node at once.

    Raises:
        GracefarmError: after all have ended; one sentence that names every node that failed and why.
    """
    good, bad = await try_all(nodes, work)
    if bad:
        raise combined_error(bad, len(nodes))
    return good


async def try_all(nodes: Sequence[N], work: Callable[[N], Awaitable[T]]) -> tuple[dict[str, T], dict[str, GracefarmError]]:
    """Like `on_all`, with the failures beside the results. A defect of ours is raised."""
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
    """Several nodes' failures as one error, of the first one's class."""
    first = next(iter(bad.values()))
    if len(bad) == 1:
        return first
    return type(first)(
        f"{len(bad)} of {of} nodes failed: " + "; ".join(error.cause for error in bad.values()), remedy=first.remedy
    )

"""What became of a command on each node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deploy.nodes.deployment import Node
from gracefarm.errors import GracefarmError, NodeError
from gracefarm.process import last_line


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
    reason = last_line(first.stderr.strip() or first.stdout, "")
    raise NodeError(
        f"{what}: {first.node} ended with {first.returncode}{': ' + reason if reason else ''}{more}",
        remedy=f"look there: `deploy ssh {first.node.name}`",
    )

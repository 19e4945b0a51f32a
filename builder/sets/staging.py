"""Stage a built set at an index: open it with its matrix, upload our wheels, publish it when nothing is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
from packaging.utils import parse_wheel_filename

from builder.planning.stack import Arch
from builder.sets.locks import SetAddress
from builder.sets.set_record import Locked
from gracefarm.errors import PublishError
from gracefarm.process import first_line

_TIMEOUT = 120


def matrix(wheels: Sequence[Locked]) -> list[str]:
    """The wheels that the index waits for, one line each: own wheels with Python and architecture, others with version."""
    return [" ".join((f"{wheel.name}=={wheel.version}", *(_tags(wheel.filename) if wheel.own else ()))) for wheel in wheels]


def _tags(filename: str) -> tuple[str, ...]:
    """Interpreter and architecture of a wheel for a matrix; empty if they do not matter or the ABI is stable."""
    tag = min(parse_wheel_filename(filename)[3], key=str)
    if tag.abi in ("none", "abi3") or tag.platform == "any":
        return ()
    return (tag.interpreter, next((arch.value for arch in Arch if tag.platform.endswith(f"_{arch.value}")), ""))


def ask(at: SetAddress, method: str, action: str = "", **more: Any) -> dict[str, Any]:
    """The set's state at the index: GET reads it, PUT opens the set with its matrix, POST /publish publishes it.

    Raises:
        PublishError: the index cannot be reached, refuses the request (for example another matrix, or a set with missing
            wheels), or does not support staged sets.
    """
    url = f"{at.base}/stage/{at.name}{action}"
    try:
        with httpx.Client(auth=at.login, timeout=_TIMEOUT) as client:
            answer = client.request(method, url, **more)
        value = answer.json() if answer.is_success else {}
    except (httpx.HTTPError, ValueError) as error:
        raise PublishError(
            f"{url} gives no valid answer: {error or type(error).__name__}",
            remedy="check that the index is running at this URL, then repeat the command",
        ) from error
    if not answer.is_success or not isinstance(value, dict) or "missing" not in value:
        words = first_line(answer.text, answer.reason_phrase)[:500]
        raise PublishError(
            f"{url} returned HTTP status {answer.status_code}: {words}",
            remedy="give the URL of a gracefarm index, and a token for the set: TWINE_USERNAME=__token__,"
            " TWINE_PASSWORD=TOKEN",
        )
    return value

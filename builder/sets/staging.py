"""Stage a built set at the farm's index: open it with its matrix, upload our wheels, show it when nothing is missing."""

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
    """What the index waits for, a line each: our wheels by Python and architecture too, those of others by version."""
    return [" ".join((f"{wheel.name}=={wheel.version}", *(_tags(wheel.filename) if wheel.own else ()))) for wheel in wheels]


def _tags(filename: str) -> tuple[str, ...]:
    """Interpreter and architecture of a wheel, as a matrix says them; nothing where any will do or where the ABI is stable."""
    tag = min(parse_wheel_filename(filename)[3], key=str)
    if tag.abi in ("none", "abi3") or tag.platform == "any":
        return ()
    return (tag.interpreter, next((arch.value for arch in Arch if tag.platform.endswith(f"_{arch.value}")), ""))


def ask(at: SetAddress, method: str, action: str = "", **more: Any) -> dict[str, Any]:
    """The set's state, as the index answers: GET asks, PUT opens it with the matrix that it waits for, POST /publish shows it.

    Raises:
        PublishError: it does not answer, refuses (as a matrix where there was another, a set that lacks anything), or is an
            index that knows no staged sets.
    """
    url = f"{at.base}/stage/{at.name}{action}"
    try:
        with httpx.Client(auth=at.login, timeout=_TIMEOUT) as client:
            answer = client.request(method, url, **more)
        value = answer.json() if answer.is_success else {}
    except (httpx.HTTPError, ValueError) as error:
        raise PublishError(f"{url}: {error or type(error).__name__}", remedy="check the address") from error
    if not answer.is_success or not isinstance(value, dict) or "missing" not in value:
        words = first_line(answer.text, answer.reason_phrase)[:500]
        raise PublishError(
            f"{url} answers {answer.status_code}: {words}",
            remedy="stage at an index of this project, with a token that reaches the set: TWINE_USERNAME=__token__, "
            "TWINE_PASSWORD",
        )
    return value

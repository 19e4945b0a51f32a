"""Stage a built set at the farm's index: open it with its matrix, upload our wheels, show it when nothing is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from packaging.utils import parse_wheel_filename

from builder.planning.stack import Arch
from builder.proof import publish
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


def _ask(at: SetAddress, method: str, action: str = "", **more: Any) -> dict[str, Any]:
    """The set's state, as the index answers.

    Raises:
        PublishError: it does not answer, refuses, or is an index that knows no staged sets.
    """
    url = f"{at.base}/stage/{at.name}{action}"
    try:
        with httpx.Client(auth=at.login or publish.credentials(f"{at.base}/legacy/"), timeout=_TIMEOUT) as client:
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


def open_(at: SetAddress, expect: Sequence[str]) -> dict[str, Any]:
    """Open the set, or find it open with this matrix.

    Raises:
        PublishError: see `_ask`; also where there was a set of the name with another matrix.
    """
    return _ask(at, "PUT", json={"expect": list(expect)})


def state(at: SetAddress) -> dict[str, Any]:
    """What the set holds and lacks.

    Raises:
        PublishError: see `_ask`.
    """
    return _ask(at, "GET")


def show(at: SetAddress) -> dict[str, Any]:
    """Publish the set, all of it at once.

    Raises:
        PublishError: see `_ask`; the index refuses a set that lacks anything.
    """
    return _ask(at, "POST", "/publish")


def upload(at: SetAddress, files: Sequence[Path]) -> None:
    """Upload wheels (and sources that belong beside them) into the stage.

    Raises:
        PublishError: the index refused one.
    """
    for file in files:
        publish.upload(file, f"{at.base}/stage/{at.name}/legacy/", at.login)

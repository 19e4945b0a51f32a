"""Errors of the Hub: when to repeat a request, and what a refusal means.

Run by the Python of the download environment.
"""

from __future__ import annotations

import email.utils
import errno
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple, TypeVar

from deploy.remote.wire import Json, WorkerError, event
from gracefarm.process import first_line

T = TypeVar("T")
BUSY = (408, 429, 500, 502, 503, 504)
"HTTP statuses of temporary errors."
LONGEST = 60.0
"Seconds between requests if the Hub does not send Retry-After."


class Busy(NamedTuple):
    """The Hub is temporarily not available."""

    status: int
    wait: float | None
    "Seconds to wait, from Retry-After; None: not given."


def busy(error: BaseException) -> Busy | None:
    """The temporary error of the Hub in an exception or its causes, which huggingface_hub reports as a connection problem."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None:
            return Busy(status, _wait(response.headers)) if status in BUSY else None  # type: ignore[union-attr]
        seen = seen.__cause__ or seen.__context__
    return None


def _wait(headers: Json) -> float | None:
    """The seconds of Retry-After, which is a number or a date (RFC 9110, 10.2.3)."""
    text = str(headers.get("retry-after") or "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def patiently(request: Json, ask: Callable[[], T]) -> T:
    """Call `ask`, and repeat it while the Hub is busy, for at most `request["busy"]` seconds.

    Raises:
        Exception: the exception of huggingface_hub, if the Hub stays busy or refuses.
    """
    left, pause = float(request["busy"]), 1.0
    while True:
        try:
            return ask()
        except Exception as error:
            refusal = busy(error)
            wait = pause if refusal is None or refusal.wait is None else max(refusal.wait, 0.2)
            if refusal is None or wait > left:
                raise
            event("busy", status=refusal.status, wait=wait)
            time.sleep(wait)
            left -= wait
            pause = min(pause * 2, LONGEST)


def explain(error: Exception, request: Json) -> WorkerError:
    """The error for a refusal of the Hub: which licence to accept, which token is missing, or how long the Hub is busy."""
    from huggingface_hub import errors

    repo = request["repo"]
    place = f"{(request['endpoint'] or 'https://huggingface.co').rstrip('/')}/{repo}"
    has_token = bool(request.get("token"))
    kind, cause, remedy = "gated", "", ""
    if isinstance(error, errors.GatedRepoError) and has_token:
        cause = f"{repo} is gated, and the account of this token has no access yet"
        remedy = (
            f"sign in as that account and accept the licence at {place}; a fine-grained token also requires the permission "
            '"read access to contents of all public gated repos you can access"'
        )
    elif isinstance(error, errors.GatedRepoError):
        cause = f"{repo} is gated: it requires an account that accepted the licence, but HF_TOKEN is not set"
        remedy = f"accept the licence at {place}, set HF_TOKEN to a read token of that account, then repeat the command"
    elif isinstance(error, errors.RepositoryNotFoundError):
        cause = f"the repository {repo} is not accessible on the Hub" + ("" if has_token else " without a token")
        remedy = "check the name of the repository" + (
            "; the token may be wrong or expired" if has_token else "; if the repository is private, set HF_TOKEN"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        kind, remedy = "fetch", "correct revision in [model] of deploy.toml"
        cause = f"{repo} has no revision {request.get('revision') or request.get('commit')}"
    elif getattr(getattr(error, "response", None), "status_code", None) == 401:
        cause = f"the Hub refuses the token for {repo} (401)"
        remedy = "set HF_TOKEN to a new read token; the token in use may be expired"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        kind, cause = "disk", "no space left on the shared folder while downloading"
        remedy = "free space on the shared folder, then repeat the command"
    elif refusal := busy(error):
        kind, cause, remedy = _busy_words(refusal, repo, has_token=has_token)
    else:
        kind, cause = "fetch", f"{repo}: {short(error)}"
        remedy = "check that the node reaches the Hub (or the server in HF_ENDPOINT), then repeat the command"
    return WorkerError(kind, cause, remedy)


def _busy_words(refusal: Busy, repo: str, *, has_token: bool) -> tuple[str, str, str]:
    """Kind, cause and remedy of the error for a busy Hub."""
    retry = f"; it asks to wait {refusal.wait:.0f} s" if refusal.wait else ""
    cause = f"HTTP {refusal.status} ({HTTPStatus(refusal.status).phrase}) from the Hub for {repo}{retry}"
    remedy = "wait, then repeat the command; downloaded files are kept"
    if refusal.status == 429 and not has_token:
        remedy += "; set HF_TOKEN, since requests without a token have the lowest limit"
    return "fetch", cause, remedy


def short(error: Exception) -> str:
    """The first line of an error message."""
    return first_line(str(error), type(error).__name__)[:300]

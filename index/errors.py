"""Requests that the index refuses. Each refusal carries its HTTP status; the cli shows the same sentences."""

from __future__ import annotations

import re

from gracefarm.errors import ExitCode, GracefarmError

_ADDRESS = re.compile(r"(?<!\S)/")
"Start of an address of this index in a remedy."


def sentence(error: GracefarmError, prefix: str = "") -> str:
    """Cause and remedy in one line. `prefix` is the path below which a proxy serves the index; addresses start with it."""
    remedy = _ADDRESS.sub(f"{prefix}/", error.remedy)
    return error.cause + (f" ({remedy})" if remedy else "")


class RefusalError(GracefarmError):
    """The index refuses a request."""

    exit_code = ExitCode.USAGE
    status = 400


class RefusedError(RefusalError):
    """The input is invalid, for example a name, a digest or an archive."""


class UnauthenticatedError(RefusalError):
    """The token is missing, unknown, expired or revoked."""

    status = 401


class ForbiddenError(RefusalError):
    """The token is valid but does not cover this request, or the index does not host the project."""

    status = 403


class NotFoundError(RefusalError):
    """Nothing exists at this address or with this name."""

    status = 404


class NotAcceptableError(RefusalError):
    """The client accepts none of the available media types."""

    status = 406


class GoneError(RefusalError):
    """The file existed and was deleted on purpose."""

    status = 410


class TooLargeError(RefusalError):
    """The request exceeds a limit on size."""

    status = 413


class TooManyError(RefusalError):
    """The client exceeds a limit on rate or on open uploads."""

    status = 429


class StalledError(RefusalError):
    """The client stopped sending."""

    status = 408


class StoreFullError(RefusalError):
    """The disk under the store is full."""

    exit_code = ExitCode.DISK
    status = 507


class DamagedError(RefusalError):
    """A stored file differs from its entry in the catalogue."""

    exit_code = ExitCode.DIGEST
    status = 500


class UnreachableError(RefusalError):
    """A service that a check requires is unreachable.

    The status is not 503, since on 503 twine sends the whole file five times in a row.
    """

    exit_code = ExitCode.FETCH
    status = 424

"""What the index says no to. Each refusal carries its HTTP status; the cli shows the same sentences."""

from __future__ import annotations

from gracefarm.errors import ExitCode, GracefarmError


class RefusalError(GracefarmError):
    """A request that the index does not carry out."""

    exit_code = ExitCode.USAGE
    status = 400


class RefusedError(RefusalError):
    """Input that is wrong in itself: a name, a digest, an archive."""


class UnauthenticatedError(RefusalError):
    """No token, or none that is known, unexpired and unrevoked."""

    status = 401


class ForbiddenError(RefusalError):
    """A good token that does not reach so far, or a name that this index does not host."""

    status = 403


class NotFoundError(RefusalError):
    """There is nothing at this address or by this name."""

    status = 404


class NotAcceptableError(RefusalError):
    """The client takes no form in which this exists."""

    status = 406


class GoneError(RefusalError):
    """It was here and was deleted on purpose."""

    status = 410


class TooLargeError(RefusalError):
    """Over a limit on size."""

    status = 413


class TooManyError(RefusalError):
    """Over a limit on rate or on open uploads."""

    status = 429


class StalledError(RefusalError):
    """The client stopped sending."""

    status = 408


class StoreFullError(RefusalError):
    """The disk under the store is full."""

    exit_code = ExitCode.DISK
    status = 507


class DamagedError(RefusalError):
    """A file of the store is not what the catalogue says."""

    exit_code = ExitCode.DIGEST
    status = 500


class UnreachableError(RefusalError):
    """A service that a check needs cannot be reached. Not 503: twine would send the whole file five times at once."""

    exit_code = ExitCode.FETCH
    status = 424

"""Failure classes: exit code (docs/errors.md), one sentence of cause, one of remedy, and the command that repeats it."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the programs return to the shell; documented in docs/errors.md and never renumbered."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG = 3
    HOST = 4
    FETCH = 10
    DIGEST = 11
    ROOT = 12
    SOURCE = 13
    NETWORK = 20
    COMPILE = 21
    MEMORY = 22
    DISK = 23
    WHEEL = 24
    AUDIT = 30
    SMOKE = 31
    VERIFY = 32
    PUBLISH = 40
    INSTALL = 41
    SEVERAL = 50
    SSH = 60
    NODE = 61
    PREFLIGHT = 62
    ENGINE = 63
    LAYOUT = 64
    NOT_SERVING = 65
    INTERRUPTED = 130


class GracefarmError(Exception):
    """A failure that a user can act on. Raised where it is known, printed once, in a `cli` module."""

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, cause: str, *, remedy: str = "", repeat: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        self.repeat = repeat

    def __str__(self) -> str:
        return self.cause


class UsageError(GracefarmError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = ExitCode.USAGE


class ConfigError(GracefarmError):
    """A recipe, stack, lock or settings file is wrong or missing."""

    exit_code = ExitCode.CONFIG


class HostError(GracefarmError):
    """This machine lacks something the work needs; `builder doctor` says how to mend it."""

    exit_code = ExitCode.HOST


class FetchError(GracefarmError):
    """A source could not be had: absent, yanked, unreachable."""

    exit_code = ExitCode.FETCH


class DigestError(GracefarmError):
    """What came is not what was pinned."""

    exit_code = ExitCode.DIGEST


class RootError(GracefarmError):
    """The root file system or an environment could not be assembled."""

    exit_code = ExitCode.ROOT


class SourceError(GracefarmError):
    """The source tree could not be prepared: a patch does not apply, a path leaves the tree."""

    exit_code = ExitCode.SOURCE


class NetworkError(GracefarmError):
    """A build tried to reach the network; names what it wanted."""

    exit_code = ExitCode.NETWORK


class CompileError(GracefarmError):
    """The package's build failed; carries the log's first real error."""

    exit_code = ExitCode.COMPILE


class MemoryBoundError(GracefarmError):
    """The build was killed at its memory bound."""

    exit_code = ExitCode.MEMORY


class DiskFullError(GracefarmError):
    """No space left on the device."""

    exit_code = ExitCode.DISK


class WheelError(GracefarmError):
    """The build did not leave exactly the one wheel that the recipe promises."""

    exit_code = ExitCode.WHEEL


class AuditError(GracefarmError):
    """A gate refused the wheel."""

    exit_code = ExitCode.AUDIT


class SmokeError(GracefarmError):
    """The wheel does not import or its smoke test fails in a clean environment."""

    exit_code = ExitCode.SMOKE


class VerifyError(GracefarmError):
    """A wheel is not what its record, SBOM or provenance says, or was not signed by the key that it is held against."""

    exit_code = ExitCode.VERIFY


class PublishError(GracefarmError):
    """The index refused the wheel or could not be reached."""

    exit_code = ExitCode.PUBLISH


class InstallError(GracefarmError):
    """The published wheel could not be installed back from the index."""

    exit_code = ExitCode.INSTALL


class SeveralError(GracefarmError):
    """Of several recipes that were asked for, one or more failed; each was reported on its own."""

    exit_code = ExitCode.SEVERAL


class SshError(GracefarmError):
    """A node cannot be entered: unreachable, a host key that is not the pinned one, a refused key."""

    exit_code = ExitCode.SSH


class NodeError(GracefarmError):
    """A command on a node failed, did not end in time, or its outcome is unknown."""

    exit_code = ExitCode.NODE


class PreflightError(GracefarmError):
    """The nodes, or a pair of them, are not fit for what is asked."""

    exit_code = ExitCode.PREFLIGHT


class EngineError(GracefarmError):
    """Ray or the engine did not start, died, or does not answer."""

    exit_code = ExitCode.ENGINE


class LayoutError(GracefarmError):
    """The model does not fit these nodes in the layout that is asked for."""

    exit_code = ExitCode.LAYOUT

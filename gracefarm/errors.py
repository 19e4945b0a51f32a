"""Failure classes: exit code (docs/reference/errors.md), cause, remedy, and the command to repeat."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the programs; documented in docs/reference/errors.md and never renumbered."""

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
    FARM = 51
    SSH = 60
    NODE = 61
    PREFLIGHT = 62
    ENGINE = 63
    LAYOUT = 64
    NOT_SERVING = 65
    INTERRUPTED = 130


class GracefarmError(Exception):
    """A failure that the user can fix. It is raised where the cause is known, and printed once, in a `cli` module."""

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, cause: str, *, remedy: str = "", repeat: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        self.repeat = repeat

    def __str__(self) -> str:
        return self.cause


class UsageError(GracefarmError):
    """The command line names something that does not exist, or combines options that cannot be used together."""

    exit_code = ExitCode.USAGE


class ConfigError(GracefarmError):
    """A recipe, stack, lock or settings file is wrong or missing."""

    exit_code = ExitCode.CONFIG


class HostError(GracefarmError):
    """This machine lacks something that the command requires; `builder doctor` tells how to fix it."""

    exit_code = ExitCode.HOST


class FetchError(GracefarmError):
    """A source could not be fetched, because it is missing, yanked or unreachable."""

    exit_code = ExitCode.FETCH


class DigestError(GracefarmError):
    """Fetched bytes differ from the pinned digest."""

    exit_code = ExitCode.DIGEST


class RootError(GracefarmError):
    """The root file system or an environment could not be assembled."""

    exit_code = ExitCode.ROOT


class SourceError(GracefarmError):
    """The source tree could not be prepared, for example because a patch does not apply, or because a path leaves the tree."""

    exit_code = ExitCode.SOURCE


class NetworkError(GracefarmError):
    """A build tried to access the network; the message names the address."""

    exit_code = ExitCode.NETWORK


class CompileError(GracefarmError):
    """The package's build failed; the message has the first error of the log."""

    exit_code = ExitCode.COMPILE


class MemoryBoundError(GracefarmError):
    """The build exceeded its memory limit and was killed."""

    exit_code = ExitCode.MEMORY


class DiskFullError(GracefarmError):
    """The device has no space left."""

    exit_code = ExitCode.DISK


class WheelError(GracefarmError):
    """The build did not produce exactly the wheel that the recipe declares."""

    exit_code = ExitCode.WHEEL


class AuditError(GracefarmError):
    """A gate refused the wheel."""

    exit_code = ExitCode.AUDIT


class SmokeError(GracefarmError):
    """In a clean environment, the wheel cannot be imported, or its smoke test fails."""

    exit_code = ExitCode.SMOKE


class VerifyError(GracefarmError):
    """A wheel differs from its record, SBOM or provenance, or was not signed with the expected key."""

    exit_code = ExitCode.VERIFY


class PublishError(GracefarmError):
    """The index refused the wheel or is unreachable."""

    exit_code = ExitCode.PUBLISH


class InstallError(GracefarmError):
    """The published wheel could not be installed from the index."""

    exit_code = ExitCode.INSTALL


class SeveralError(GracefarmError):
    """At least one of several recipes failed. Each failure was reported separately."""

    exit_code = ExitCode.SEVERAL


class FarmError(GracefarmError):
    """The Ray cluster for builds does not answer, has ended, or has no worker for a cell."""

    exit_code = ExitCode.FARM


class SshError(GracefarmError):
    """The ssh connection failed: the node is unreachable, has another host key than the pinned one, or refused the key."""

    exit_code = ExitCode.SSH


class NodeError(GracefarmError):
    """A command on a node failed or timed out, or its outcome is unknown."""

    exit_code = ExitCode.NODE


class PreflightError(GracefarmError):
    """A node, or a pair of nodes, does not meet the requirements."""

    exit_code = ExitCode.PREFLIGHT


class EngineError(GracefarmError):
    """Ray or the engine did not start, terminated, or does not respond."""

    exit_code = ExitCode.ENGINE


class LayoutError(GracefarmError):
    """The model does not fit on these nodes in the requested layout."""

    exit_code = ExitCode.LAYOUT

"""Find builds for releases of torch that are older than the releases to keep."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

from builder.planning import matrix, stack
from builder.planning.settings import Settings
from builder.proof import record, why
from builder.proof.record import Record
from builder.toolchains.kinds import KINDS


@dataclass(frozen=True, kw_only=True)
class OldBuild:
    """A build for a release of torch that is not kept."""

    recipe: str
    stack: str
    torch: str
    python: str
    "Name of the interpreter, or `root`."
    target: str
    build_id: str


def old(settings: Settings) -> list[OldBuild]:
    """Successful builds for old releases of torch, newest first. Builds without torch are not old.

    The newest `keep_torch` releases among those of the stacks and builds are kept.
    """
    names = stack.names(settings.project / "stacks")
    stacks = [stack.load(settings.project / "stacks", name).data for name in names]
    builds = [build for build in record.all_of(settings) if build.outcome == "built" and KINDS[build.toolchain].pinned]
    versions = {_torch(build) for build in builds} | {entry.torch.version for entry in stacks if entry.torch is not None}
    releases = sorted({Version(version) for version in versions if version}, reverse=True)
    kept = releases[: matrix.read(settings.project).keep_torch]
    return [_shown(build) for build in builds if _torch(build) and Version(_torch(build)) not in kept]


def _torch(build: Record) -> str:
    """The torch of a build; empty if its recipe does not use torch."""
    return str(why.value_at(build.inputs, "stack.torch") or "")


def _shown(build: Record) -> OldBuild:
    return OldBuild(
        recipe=build.recipe,
        stack=build.stack,
        torch=_torch(build),
        python=build.interpreter or matrix.ROOT,
        target=str(build.inputs.get("target")),
        build_id=build.build_id,
    )

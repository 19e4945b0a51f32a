"""CPU time and disk space of a cell: measured, or estimated from another build of its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from builder.planning.settings import Settings
from builder.proof import record
from builder.proof.record import Likeness, Record
from gracefarm.files import disk_used


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a build took, or will take."""

    cpu_seconds: float | None = None
    disk_bytes: int | None = None
    estimate: str = ""
    "The build that the estimate comes from; empty for measured values."


def measured(build: Record, settings: Settings) -> Costs:
    """CPU seconds of a build, and the disk space of its folder."""
    return Costs(cpu_seconds=round(_cpu(build), 1), disk_bytes=disk_used(record.folder(settings, build.build_id)))


def estimated(like: Likeness, past: Sequence[Record], settings: Settings) -> Costs:
    """Costs of a build without caches, with its working folder. They are those of the most similar build in `past`.

    `past`: successful builds of the recipe, newest first. `like`: see `builder.proof.record.likeness`.
    """
    if not past:
        return Costs()
    build = min(past, key=lambda build: (len(_differences(build.like, like)), _saved(build) > 0))
    disk = disk_used(record.folder(settings, build.build_id)) + (build.work_bytes or 0)
    differences = ", ".join(_differences(build.like, like))
    estimate = f"estimated from a build for {differences}" if differences else "estimated from a similar build"
    return Costs(cpu_seconds=round(_cpu(build) + _saved(build), 1), disk_bytes=disk, estimate=estimate)


def _differences(built: Likeness, wanted: Likeness) -> list[str]:
    """The properties of the build that differ from the wanted ones."""
    titles = ("stack", "target", "sm", "PTX")
    pairs = zip(titles, built, wanted, strict=True)
    return [f"{title} {_text(before)}" for title, before, after in pairs if before != after]


def _text(value: object) -> str:
    return "+".join(value) if isinstance(value, tuple) and value else str(value or "none")


def _cpu(build: Record) -> float:
    return sum(stage.cpu_s or 0 for stage in build.stages)


def _saved(build: Record) -> float:
    """CPU seconds that caches saved."""
    compiler = build.compiler_cache.saved_cpu_s if build.compiler_cache is not None else 0
    return compiler + (build.device_code.saved_cpu_s if build.device_code is not None else 0)

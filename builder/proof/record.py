"""The one JSON document about a build: inputs, outputs, commands, timings, peak memory, verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from builder.audit.verdict import Verdict
from builder.box.sandbox import Outcome
from builder.compiling.jobs import Jobs
from builder.compiling.units import CacheStatistics, DeviceStatistics, Unit
from builder.planning.plan import Plan
from builder.planning.recipe import ToolchainKind
from builder.planning.settings import Settings
from builder.proof import judges
from builder.proof.shared_cache import SharedCacheUse
from builder.smoke import GpuResult, SmokeResult
from gracefarm.errors import ConfigError, GracefarmError
from gracefarm.files import atomic_write, sha256_file
from gracefarm.tables import Table

Likeness = tuple[object, ...]
"See `likeness`."


class Stage(Table):
    """One step of the flow."""

    name: str = Field(description="Name of the step")
    command: tuple[str, ...] = Field(default=(), description="Command run in the sandbox, if any")
    wall_s: float = Field(description="Duration in seconds")
    cpu_s: float | None = Field(default=None, description="CPU seconds of the whole process tree")
    peak_memory: int | None = Field(default=None, description="Bytes, peak of the whole process tree")
    memory_bound: int | None = Field(default=None, description="Bytes")
    memory_by: str | None = Field(
        default=None, description="What holds the bound: cgroup2, watchdog, podman or docker; cgroup1 in older records"
    )
    note: str = Field(default="", description="Remark about the step")


class BuiltFile(Table):
    """The product."""

    filename: str = Field(description="File name")
    sha256: str = Field(description="sha256 of the file")
    size: int = Field(description="Size in bytes")


class Failure(Table):
    """Why there is no wheel."""

    kind: str = Field(description="Failure class, as in docs/reference/errors.md")
    exit_code: int = Field(description="Exit code of the command")
    cause: str = Field(description="Cause, in one sentence")
    remedy: str = Field(default="", description="Remedy, in one sentence")


def _empty(text: str) -> bool:
    return not text


class Publication(Table):
    """Where the wheel was published."""

    url: str = Field(description="Upload address")
    at: str = Field(description="Time of the upload (UTC, ISO 8601)")
    filename: str = Field(default="", exclude_if=_empty, description="Name at the index, if it has a build tag")
    reason: str = Field(default="", exclude_if=_empty, description="Why it has that build tag")


class Record(Table):
    """record.json; docs/schema/record.json is its schema."""

    format: Literal[1] = Field(default=1, description="Version of the format")
    build_id: str = Field(description="Digest of all inputs")
    recipe: str = Field(description="Name of the recipe")
    name: str = Field(description="Name of the distribution")
    version: str = Field(description="Version of the wheel, with its local part; of a failed build, that of the recipe")
    stack: str = Field(description="Name of the stack")
    interpreter: str | None = Field(default=None, description="The interpreter's name; None: the Python of the stack's root")
    asked_sm: tuple[str, ...] | None = Field(default=None, description="As --sm named them; None: the stack's")
    asked_ptx: str | None = Field(default=None, description="As --ptx named it; None: the recipe's or the stack's")
    from_source: tuple[str, ...] = Field(
        default=(), description="Recipes whose trees were built in place of downloads, as --llvm source names one"
    )
    asked_variant: bool = Field(default=False, description="Built with --variant")
    inputs: dict[str, object] = Field(description="Deterministic; also in the wheel's .dist-info/gracefarm.json")
    toolchain: ToolchainKind = Field(default="sandbox", description="Where compilers and Python came from")
    unconfirmed: tuple[str, ...] = Field(
        default=(), description="Digests that were read at first use and not confirmed, a sentence each"
    )
    outcome: Literal["built", "failed"] = Field(description="Whether the build produced a wheel")
    failure: Failure | None = Field(default=None, description="Why the build failed")
    wheel: BuiltFile | None = Field(default=None, description="The wheel")
    tree: str | None = Field(
        default=None,
        description="Of a recipe with [tree]: sha256 of its files' paths, modes and digests",
    )
    source: BuiltFile | None = Field(
        default=None, description="The patched source, where the recipe publishes it beside the wheel"
    )
    torch_cxx11_abi: bool | None = Field(default=None, description="C++ ABI of the torch that was compiled against")
    jobs: Jobs | None = Field(default=None, description="Number of parallel compilations")
    stages: tuple[Stage, ...] = Field(default=(), description="Steps of the build, in order")
    units: dict[str, Unit] = Field(default_factory=dict, description="By source file, relative to the source tree")
    compiler_cache: CacheStatistics | None = Field(default=None, description="None: it was off, or nothing was compiled")
    device_code: DeviceStatistics | None = Field(default=None, description="None: no device code was compiled or looked up")
    shared_cache: SharedCacheUse | None = Field(default=None, description="None: it was off, or nothing was compiled")
    verdicts: tuple[Verdict, ...] = Field(default=(), description="Verdicts of the gates")
    judged_by: str = Field(
        default="", description="Digest of the gates and smoke tests that passed the wheel; docs/explanation/building.md"
    )
    smoke: SmokeResult | None = Field(default=None, description="Result of the smoke test")
    device_digests: dict[str, str] = Field(
        default_factory=dict,
        description="Digest of the wheel's device code by sm; certificates are found by it (docs/howto/gpu.md)",
    )
    gpu: GpuResult | None = Field(default=None, description="None: the recipe has no smoke_gpu.py")
    published: tuple[Publication, ...] = Field(default=(), description="Indexes that have the wheel")
    provenance: dict[str, Any] | None = Field(
        default=None,
        description="DSSE envelope of the in-toto statement, as it lies beside the wheel",
    )
    finished: str = Field(description="UTC, ISO 8601")

    @property
    def like(self) -> Likeness:
        """Builds of the recipe with the same take about as much."""
        return likeness(self.stack, self.inputs)


def now() -> str:
    """UTC now, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def stage(name: str, outcome: Outcome, command: tuple[str, ...], note: str = "") -> Stage:
    """The stage that a sandboxed command was."""
    return Stage(
        name=name,
        command=command,
        wall_s=round(outcome.wall_s, 2),
        cpu_s=round(outcome.cpu_s, 2),
        peak_memory=outcome.peak_memory,
        memory_bound=outcome.memory_bound,
        memory_by=outcome.memory_by,
        note=note,
    )


def failure(error: GracefarmError) -> Failure:
    """The failure that an error was."""
    return Failure(kind=error.exit_code.name.lower(), exit_code=int(error.exit_code), cause=error.cause, remedy=error.remedy)


def product(file: Path) -> BuiltFile:
    """What the record says of a finished wheel or source archive."""
    return BuiltFile(filename=file.name, sha256=sha256_file(file), size=file.stat().st_size)


LICENSES = "licenses"
"Folder of a build: licence texts of its source, for the wheel."
SCRATCH = ("work", "smoke", "raw", "raw-source", LICENSES, "embedded", "repaired", "labelled", "install", "compiled.json")
"In a build's folder: what a finished build needs no more."


def folder(settings: Settings, build_id: str) -> Path:
    """Everything about one build: record.json, log.txt, dist/, work/."""
    return settings.home / "builds" / build_id


def path(settings: Settings, build_id: str) -> Path:
    """Where the record of a build is."""
    return folder(settings, build_id) / "record.json"


def write(record: Record, settings: Settings) -> Path:
    """Write the record, whole or not at all."""
    place = path(settings, record.build_id)
    atomic_write(place, record.model_dump_json(indent=2) + "\n")
    return place


def read(settings: Settings, build_id: str) -> Record | None:
    """The record of a build, or None; one of another format counts as none."""
    try:
        return Record.model_validate_json(path(settings, build_id).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def wheel_path(settings: Settings, record: Record) -> Path | None:
    """The finished wheel, if it is still there with the recorded digest."""
    if record.wheel is None:
        return None
    place = folder(settings, record.build_id) / "dist" / record.wheel.filename
    return place if place.is_file() and sha256_file(place) == record.wheel.sha256 else None


def tree_path(settings: Settings, build_id: str) -> Path:
    """Where the tree of a finished build is kept, whole."""
    return settings.home / "trees" / build_id


def product_path(settings: Settings, record: Record) -> Path | None:
    """The finished wheel, or the tree of a recipe that makes one."""
    if record.tree is None:
        return wheel_path(settings, record)
    place = tree_path(settings, record.build_id)
    return place if place.is_dir() else None


def likeness(stack: str, inputs: Mapping[str, object]) -> Likeness:
    """What decides how much a build of a recipe takes, beside the machine: stack, target, and architectures of device code."""
    facts = inputs.get("stack")
    facts = facts if isinstance(facts, dict) else {}
    return stack, inputs.get("target"), tuple(facts.get("sm") or ()), facts.get("ptx")


def all_of(settings: Settings, recipe: str | None = None) -> list[Record]:
    """Records on this machine, newest first."""
    records = [read(settings, place.parent.name) for place in (settings.home / "builds").glob("*/record.json")]
    chosen = [build for build in records if build is not None and recipe in (None, build.recipe)]
    return sorted(chosen, key=lambda build: build.finished, reverse=True)


def latest(settings: Settings, recipe: str) -> Record:
    """The newest record of a recipe.

    Raises:
        ConfigError: it was never built here.
    """
    builds = all_of(settings, recipe)
    if not builds:
        raise ConfigError(f"{recipe} was never built on this machine", remedy=f"run `builder build {recipe}`")
    return builds[0]


def settled(plan: Plan, settings: Settings) -> Record | None:
    """The record of a build of exactly this plan, its wheel judged by the gates and smoke tests of today."""
    build = existing(plan, settings)
    judged = build is not None and (build.tree is not None or build.judged_by == judges.digest(plan))
    return build if judged else None


def existing(plan: Plan, settings: Settings) -> Record | None:
    """The record of a build of exactly this plan that succeeded, its wheel or tree present."""
    build = read(settings, plan.build_id)
    if build is None or build.outcome != "built" or product_path(settings, build) is None:
        return None
    return build

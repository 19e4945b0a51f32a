"""The record: the JSON document about a build, with inputs, outputs, commands, times, peak memory and verdicts."""

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
from builder.planning.cargo_lock import Crate
from builder.planning.plan import Plan
from builder.planning.recipe import ToolchainKind
from builder.planning.settings import Settings
from builder.proof import judges
from builder.proof.shared_cache import SharedCacheUse
from builder.smoke import GpuResult, SmokeResult
from gracefarm.errors import ConfigError, ExitCode, GracefarmError
from gracefarm.files import atomic_write, sha256_file
from gracefarm.tables import Table

Likeness = tuple[object, ...]
"See `likeness`."


class Stage(Table):
    """One step of the build."""

    name: str
    "Name of the step"
    command: tuple[str, ...] = ()
    "Command of the step. Empty: the step is part of the builder and ran no command"
    wall_s: float
    "Duration in seconds"
    cpu_s: float | None = None
    "CPU seconds of the command and all its child processes. null: not measured"
    peak_memory: int | None = None
    "Peak memory of the command and all its child processes, in bytes. null: not measured"
    memory_bound: int | None = None
    "Memory limit of the command, in bytes. null: the step ran no command"
    memory_by: str | None = None
    (
        "Program or kernel feature that enforced the limit: `cgroup2`, `watchdog` (a process of the builder), `podman` or "
        "`docker`. null: the step ran no command. Older records can also have `cgroup1`"
    )
    note: str = ""
    "Remark about the step"


class BuiltFile(Table):
    """A file that the build produced."""

    filename: str
    "File name"
    sha256: str
    "sha256 of the file"
    size: int
    "Size in bytes"


class Failure(Table):
    """The reason why the build failed."""

    kind: str
    "Class of the failure, for example `compile`. docs/reference/errors.md lists the classes"
    exit_code: int
    "Exit code of `builder build`"
    cause: str
    "Cause, in one sentence"
    remedy: str = ""
    "Remedy, in one sentence"


def _empty(text: str) -> bool:
    return not text


def _none(values: tuple[object, ...]) -> bool:
    return not values


def _unknown(value: int | None) -> bool:
    return value is None


class Publication(Table):
    """One upload of the wheel to an index."""

    url: str
    "Upload address of the index"
    at: str
    "Time of the upload (UTC, ISO 8601)"
    filename: str = Field(default="", exclude_if=_empty)
    "File name on the index, if the builder added a build tag to it. Empty: the file name in `wheel`"
    reason: str = Field(default="", exclude_if=_empty)
    "Reason why the builder added the build tag. Empty: it added no build tag"


class Record(Table):
    """record.json; docs/schema/record.json is its schema."""

    format: Literal[1] = 1
    "Version of the format of this document"
    build_id: str
    "Build id: the digest of all inputs of the build"
    recipe: str
    "Name of the recipe"
    name: str
    "Name of the package that the recipe builds, for example `causal-conv1d`"
    version: str
    "Version of the wheel, for example `1.7.0+cu130.torch2.11`. If the build produced no wheel: the version in the recipe"
    stack: str
    "Name of the stack"
    interpreter: str | None = None
    (
        "Name of the interpreter that the build used: a folder in interpreters/, for example `3.13`. null: the Python of the "
        "stack, or of the machine if `toolchain` is `host`"
    )
    asked_sm: tuple[str, ...] | None = None
    (
        'sm values that the user requested, for example `["90", "100f"]`. The request is the option `--sm`, or `sm=` in '
        "a selector. null: no request, so the build used the sm values of the stack"
    )
    asked_ptx: str | None = None
    (
        "sm value of the PTX that the option `--ptx` requested, for example `90`. `none`: the option requested a wheel "
        "without PTX. null: the option was not given, so the recipe or the stack determined the PTX"
    )
    from_source: tuple[str, ...] = ()
    (
        "Recipes that were built to produce files that this build otherwise downloads. With the option `--llvm source`, the "
        'value is `["llvm"]`. Empty: there are no such recipes'
    )
    asked_variant: bool = False
    "`true`: the option `--variant` was given. The wheel's file name then has a variant label"
    asked_twin: bool = False
    (
        "`true`: the option `--twin` was given. The x86_64 wheel then has the same device code as the aarch64 wheel. A GPU "
        "test of the x86_64 wheel certifies this device code. The x86_64 wheel is not published"
    )
    inputs: dict[str, object]
    (
        "All inputs of the build id, for example sources, options and compilers. The wheel contains the same object in "
        ".dist-info/gracefarm.json"
    )
    toolchain: ToolchainKind = "sandbox"
    (
        "Compilers of the build. `sandbox`: those of the stack. `host`: those of the machine. `container`: those of a "
        "container image"
    )
    unconfirmed: tuple[str, ...] = ()
    (
        "Digests that no second source confirms. With `--accept-new`, the builder computed them from the downloaded files. "
        "Each entry is a text with the name of the file, its digest, and the date and URL of the download"
    )
    outcome: Literal["built", "failed"]
    "Result of the build. While the build runs, the value is `failed`, and `kind` in `failure` is `interrupted`"
    failure: Failure | None = None
    "Reason why the build failed. null: the build succeeded"
    wheel: BuiltFile | None = None
    "The wheel. null: the build produced no wheel"
    tree: str | None = None
    "sha256 of the tree (folder of files) that the recipe builds instead of a wheel. null: the build produced no tree"
    source: BuiltFile | None = None
    "Archive (.tar.gz) of the patched source, for recipes that publish it. null: there is no archive"
    torch_cxx11_abi: bool | None = None
    (
        "`true`: the torch of the build environment uses the C++11 ABI. null: the environment has no torch, or the build "
        "failed before the compilation"
    )
    crates: tuple[Crate, ...] = Field(default=(), exclude_if=_none)
    "Rust crates in the Cargo.lock of the source. Empty: the recipe does not use Rust"
    jobs: Jobs | None = None
    "Number of parallel compile jobs. null: the build did not compile"
    stages: tuple[Stage, ...] = ()
    "Steps of the build, in order"
    work_bytes: int | None = Field(default=None, exclude_if=_unknown)
    (
        "Disk space of the working folder at the end of the build, in bytes. null: the build failed, or an older version "
        "wrote the record"
    )
    units: dict[str, Unit] = Field(default_factory=dict)
    (
        "Cost of each compiled source file. The key is the path of the file in the source tree. If a result came from a "
        "cache, the value is the cost of the earlier compilation"
    )
    compiler_cache: CacheStatistics | None = None
    "Use of the compiler cache (ccache). null: the cache was off, or nothing was compiled"
    device_code: DeviceStatistics | None = None
    (
        "Use of the device store, a cache for the device code that nvcc produces. null: no use was recorded, for example "
        "because the build compiled no device code"
    )
    shared_cache: SharedCacheUse | None = None
    "Use of the shared cache on an index, which several machines share. null: this cache was off, or nothing was compiled"
    verdicts: tuple[Verdict, ...] = ()
    "Results of the gates. Empty: the build produced no wheel to check"
    judged_by: str = ""
    (
        "Digest of the checks: the code of all gates and smoke tests, and the recipe's requirements on the wheel. If the "
        "digest of the current checks differs, `builder build` checks the finished wheel again"
    )
    smoke: SmokeResult | None = None
    "Result of the smoke test. null: the test did not run, or it failed"
    device_digests: dict[str, str] = Field(default_factory=dict)
    (
        "Digest of the wheel's device code for each sm value. The key is the sm value. A certificate names one of these "
        "digests, and is valid for each wheel with this digest. If the wheel has code for several sm values that one GPU "
        "can run, such as 90 and 90a, a test on this GPU does not show which of this code ran"
    )
    gpu: GpuResult | None = None
    "Result of the recipe's GPU test, the script smoke_gpu.py. null: the recipe has no such script, or the build failed"
    published: tuple[Publication, ...] = ()
    "Uploads of the wheel"
    provenance: dict[str, Any] | None = None
    (
        "Signed statement about the build: a DSSE envelope with an in-toto statement. null: the build failed, or this "
        "machine has no key to sign with"
    )
    finished: str
    "Time at which the build ended (UTC, ISO 8601)"

    @property
    def like(self) -> Likeness:
        """Builds of the recipe with the same value have similar costs."""
        return likeness(self.stack, self.inputs)

    @property
    def unfinished(self) -> bool:
        """Whether the build is running or was interrupted."""
        return self.failure is not None and self.failure.kind == ExitCode.INTERRUPTED.name.lower()

    @property
    def state(self) -> str:
        """The outcome, or `unfinished`."""
        return "unfinished" if self.unfinished else self.outcome


def now() -> str:
    """The current time, UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def stage(name: str, outcome: Outcome, command: tuple[str, ...], note: str = "") -> Stage:
    """The stage of a sandboxed command."""
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
    """The failure of an error."""
    return Failure(kind=error.exit_code.name.lower(), exit_code=int(error.exit_code), cause=error.cause, remedy=error.remedy)


def product(file: Path) -> BuiltFile:
    """The record's entry for a finished wheel or source archive."""
    return BuiltFile(filename=file.name, sha256=sha256_file(file), size=file.stat().st_size)


LICENSES = "licenses"
"Folder in a build's folder, with licence texts of its source for the wheel."
SCRATCH = ("work", "smoke", "raw", "raw-source", LICENSES, "embedded", "repaired", "labelled", "install", "compiled.json")
"Files in a build's folder that a finished build does not need."


def folder(settings: Settings, build_id: str) -> Path:
    """Folder of one build: record.json, log.txt, dist/, work/."""
    return settings.home / "builds" / build_id


def lock_path(settings: Settings, build_id: str) -> Path:
    """Path of the lock that the process of a running build holds."""
    return settings.home / "locks" / f"build-{build_id}"


def path(settings: Settings, build_id: str) -> Path:
    """Path of the record of a build."""
    return folder(settings, build_id) / "record.json"


def write(record: Record, settings: Settings) -> Path:
    """Write the record atomically."""
    place = path(settings, record.build_id)
    atomic_write(place, record.model_dump_json(indent=2) + "\n")
    return place


def read(settings: Settings, build_id: str) -> Record | None:
    """The record of a build, or None; records of other formats are ignored."""
    try:
        return Record.model_validate_json(path(settings, build_id).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def wheel_path(settings: Settings, record: Record) -> Path | None:
    """The finished wheel, if it exists with the recorded digest."""
    if record.wheel is None:
        return None
    place = folder(settings, record.build_id) / "dist" / record.wheel.filename
    return place if place.is_file() and sha256_file(place) == record.wheel.sha256 else None


def tree_path(settings: Settings, build_id: str) -> Path:
    """Path of the tree of a finished build."""
    return settings.home / "trees" / build_id


def product_path(settings: Settings, record: Record) -> Path | None:
    """The finished wheel, or the finished tree."""
    if record.tree is None:
        return wheel_path(settings, record)
    place = tree_path(settings, record.build_id)
    return place if place.is_dir() else None


def likeness(stack: str, inputs: Mapping[str, object]) -> Likeness:
    """The properties that determine a build's costs on a machine: stack, target, and architectures of device code."""
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
        ConfigError: it was never built on this machine.
    """
    builds = all_of(settings, recipe)
    if not builds:
        raise ConfigError(f"{recipe} was never built on this machine", remedy=f"run `builder build {recipe}`")
    return builds[0]


def settled(plan: Plan, settings: Settings) -> Record | None:
    """The record of a successful build of exactly this plan, if the current gates and smoke tests have judged its wheel."""
    build = existing(plan, settings)
    judged = build is not None and (build.tree is not None or build.judged_by == judges.digest(plan))
    return build if judged else None


def existing(plan: Plan, settings: Settings) -> Record | None:
    """The record of a successful build of exactly this plan, if its wheel or tree exists."""
    build = read(settings, plan.build_id)
    if build is None or build.outcome != "built" or product_path(settings, build) is None:
        return None
    return build

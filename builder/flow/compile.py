"""Prepare the source tree of a build and compile it. Compile again after a kill for lack of memory."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from builder import audit
from builder.compiling import cxx_runtime, jobs, pep517, units
from builder.compiling.jobs import Jobs
from builder.compiling.units import CacheStatistics, DeviceStatistics, Note, Unit
from builder.fetch import Fetched, crates, source
from builder.flow import history
from builder.flow.attempt import Attempt
from builder.flow.sharing import shared
from builder.planning.cargo_lock import Crate
from builder.planning.ground import Ground
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.proof import record
from builder.proof.record import Stage
from builder.proof.shared_cache import SharedCacheUse
from builder.toolchains import device_store, rust
from builder.toolchains.wrappers import SCHEDULE
from gracefarm.errors import GracefarmError
from gracefarm.files import atomic_write, remove_tree, sha256_file
from gracefarm.tables import parse_size


def checkpoint(attempt: Attempt) -> Path:
    """The file that marks the end of the compile."""
    return attempt.folder / "compiled.json"


def prepare(attempt: Attempt, fetched: Fetched, epoch: int) -> bool:
    """Create the source tree, before root, environment and compilers are downloaded; False: an earlier run has compiled it.

    Raises:
        SourceError: an archive, a patch, a substitution or a licence text does not fit, or the crates are not pinned.
        FetchError, DigestError: a crate cannot be fetched, or differs from its checksum in Cargo.lock.
        CompileError: the stack does not meet a build requirement of the package.
    """
    if _finished(attempt) is not None:
        return False
    records = history.measured(attempt.plan, attempt.settings)
    attempt.known = history.learned_units(records, history.like(attempt.plan))
    # An interrupted build has no record, and its units now come from the cache.
    attempt.known |= units.costs(units.read(attempt.work), attempt.known)
    tree = _source_tree(attempt, fetched, epoch)
    if attempt.plan.recipe.data.tree is None:
        pep517.check_requirements(attempt.plan, tree)
        if (sentence := cxx_runtime.warning(attempt.plan, tree)) is not None:
            attempt.console.warn(sentence)
    return True


def compiled(attempt: Attempt, fetched: Fetched, ground: Ground, epoch: int) -> Path:
    """The raw wheel, from an earlier run or compiled now from the tree of `prepare`; or the folder of the recipe's tree.

    Raises:
        MemoryBoundError, NetworkError, DiskFullError, CompileError: see `pep517.judge`.
    """
    return _saved(attempt) or _with_retry(attempt, fetched, ground, epoch)


def _finished(attempt: Attempt) -> tuple[Path, dict[str, Any]] | None:
    """The raw wheel of a run that was interrupted after its compile, and the notes of that run."""
    place = checkpoint(attempt)
    if not place.is_file():
        return None
    noted = json.loads(place.read_text())
    raw = attempt.folder / "raw" / str(noted["wheel"])
    return (raw, noted) if raw.is_file() and sha256_file(raw) == noted["sha256"] else None


def _saved(attempt: Attempt) -> Path | None:
    """The raw wheel of such a run; its costs are added to the record."""
    finished = _finished(attempt)
    if finished is None:
        return None
    raw, noted = finished
    attempt.jobs = Jobs.model_validate(noted["jobs"])
    attempt.crates = tuple(Crate.model_validate(crate) for crate in noted.get("crates", ()))
    attempt.units = {name: Unit.model_validate(unit) for name, unit in noted["units"].items()}
    attempt.compiler_cache = noted["compiler_cache"] and CacheStatistics.model_validate(noted["compiler_cache"])
    attempt.device_code = noted["device_code"] and DeviceStatistics.model_validate(noted["device_code"])
    attempt.shared_cache = noted.get("shared_cache") and SharedCacheUse.model_validate(noted["shared_cache"])
    attempt.stages.append(Stage.model_validate(noted["stage"]))
    attempt.console.step("compile", "an interrupted run had finished its compile; continuing after it")
    return raw


def _with_retry(attempt: Attempt, fetched: Fetched, ground: Ground, epoch: int) -> Path:
    """Compile the raw wheel, with one retry after a kill for memory."""
    memory = pep517.bound(attempt.settings)
    count = count_jobs(attempt.plan, attempt.settings, memory, attempt.options.jobs)
    try:
        return _once(attempt, ground, epoch, count, memory)
    except GracefarmError as error:
        fewer = pep517.fewer_jobs(error, count.count)
        if fewer is None:
            raise
        attempt.console.warn(f"{error.cause}; trying again with {fewer} jobs")
        retry = Jobs(
            count=fewer,
            reason=f"the compile with {count.count} jobs was killed for lack of memory; reason for {count.count} jobs: "
            f"{count.reason}",
        )
        attempt.known |= units.costs(units.read(attempt.work), attempt.known)
        _source_tree(attempt, fetched, epoch)
        return _once(attempt, ground, epoch, retry, memory)


def count_jobs(plan: Plan, settings: Settings, memory: int, wanted: int | None = None) -> Jobs:
    """The number of parallel compilations, from cores, memory and earlier builds."""
    build, like = plan.recipe.data.build, history.like(plan)
    records = history.measured(plan, settings)
    whole = history.learned_units([past for past in records if past.outcome == "built"], like)
    return jobs.plan(
        memory=memory,
        memory_per_job=build.memory_per_job,
        wanted=wanted or settings.jobs,
        past=history.learned_jobs(records, like),
        declared=[parse_size(size) for size in build.unit_memory.values()],
        peaks=[unit.peak_memory for unit in whole.values()],
    )


def _once(attempt: Attempt, ground: Ground, epoch: int, count: Jobs, memory: int) -> Path:
    attempt.jobs = count
    plan, work, settings = attempt.plan, attempt.work, attempt.settings
    schedule = units.schedule(
        attempt.known, plan.recipe.data.build, work / "source", memory=memory - jobs.OTHERS, jobs=count.count
    )
    (work / SCHEDULE).write_text(schedule)
    caches = attempt.options.caches
    command = plan.toolchain.command(plan, settings, work)
    with shared(attempt), plan.toolchain.swept(plan), attempt.console.progress("compile") as tick:
        place = plan.toolchain.place(plan, ground, settings, work, jobs=count.count, epoch=epoch, memory=memory, caches=caches)
        with attempt.log.open("a") as stream:
            stream.write(f"# jobs {count.count}: {count.reason}\n# {' '.join(command)}\n")
            stream.write(f"# {shlex.join(place.command(command))}\n")
        attempt.console.step("compile", f"{count.count} jobs ({count.reason}); log {attempt.log}")
        log_start = attempt.log.stat().st_size
        outcome = pep517.run(place, command, attempt.log, history.time_left(plan, settings, tick))
    outcome = plan.toolchain.understood(outcome, attempt.log, log_start)
    attempt.stages.append(record.stage("compile", outcome, command, plan.toolchain.note))
    device_store.trim(settings, plan.recipe.key)
    try:
        pep517.judge(outcome, plan, attempt.log, log_start, work / "source")
    finally:  # afterwards, since progress shows the last line of the log
        _count_units(attempt, units.read(work))
    whole = plan.recipe.data.tree is not None
    raw = work / "out" if whole else _keep(attempt, audit.only_wheel(work / "out"), count)
    peak = outcome.peak_memory / 2**30
    product = "the tree" if whole else raw.name
    attempt.console.step("compile", f"{product} in {outcome.wall_s:.0f} s, {outcome.cpu_s:.0f} CPU s, peak {peak:.1f} GiB")
    return raw


def _source_tree(attempt: Attempt, fetched: Fetched, epoch: int) -> Path:
    """The source, newly unpacked; or the tree of an interrupted build, if the toolchain can continue in it."""
    work, tree, recipe = attempt.work, attempt.work / "source", attempt.plan.recipe
    if attempt.plan.toolchain.resumes(tree, epoch):
        attempt.console.step("compile", f"continuing in {tree}, where an earlier run of this build id ended")
        remove_tree(work / "out")
    else:
        remove_tree(work)
        work.mkdir(parents=True)
        source.unpack(recipe, fetched, tree, epoch)
        attempt.crates = crates.vendor(recipe, tree, work / rust.CRATES, attempt.settings)
        source.keep_licenses(recipe.data, tree, attempt.folder / record.LICENSES)
        if recipe.data.wheel.source_archive:
            source.pack(tree, attempt.folder / "raw-source", epoch)
    remove_tree(work / "tmp")
    for name in ("out", "tmp"):
        (work / name).mkdir()
    return tree


def _count_units(attempt: Attempt, notes: list[Note]) -> None:
    """Write costs of the units and results of the cache to record, log and console."""
    attempt.units = attempt.units | units.costs(notes, attempt.known)
    attempt.compiler_cache = units.statistics(notes, attempt.known)
    attempt.device_code = units.device_statistics(notes)
    cache, device = attempt.compiler_cache, attempt.device_code
    with attempt.log.open("a") as stream:
        stream.write(f"# {units.title(cache) if cache else 'compiler cache: off, or nothing to compile'}\n")
        stream.write(f"# {units.device_title(device)}\n" if device else "")
    if cache:
        attempt.console.step("compile", units.title(cache))
    if device:
        attempt.console.step("compile", units.device_title(device))


def _keep(attempt: Attempt, wheel: Path, count: Jobs) -> Path:
    """Keep the raw wheel, so that a later, interrupted run does not compile again."""
    raw = attempt.folder / "raw" / wheel.name
    remove_tree(raw.parent)
    raw.parent.mkdir()
    shutil.copy(wheel, raw)
    saved = {
        "wheel": raw.name,
        "sha256": sha256_file(raw),
        "jobs": count.model_dump(),
        "stage": attempt.stages[-1].model_dump(mode="json"),
        "crates": [crate.model_dump() for crate in attempt.crates],
        "units": {name: unit.model_dump() for name, unit in attempt.units.items()},
        "compiler_cache": attempt.compiler_cache and attempt.compiler_cache.model_dump(),
        "device_code": attempt.device_code and attempt.device_code.model_dump(),
        "shared_cache": attempt.shared_cache and attempt.shared_cache.model_dump(),
    }
    atomic_write(checkpoint(attempt), json.dumps(saved))
    return raw

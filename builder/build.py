"""The flow: fetch, root, compile, audit, smoke, record. Killed anywhere, the next run goes on to the same record."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from builder import audit, compile, embed, environment, fetch, jobs, meter, publish, record, root, smoke, source, toolchain
from builder.audit import Policy
from builder.plan import Plan
from builder.record import Jobs, Publication, Record, SmokeResult, Stage
from builder.sandbox import Mount, Outcome, Sandbox
from builder.tables import parse_size
from builder.verdict import Verdict
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, HostError
from gracefarm.files import atomic_write, full_disk, lock, remove_tree, sha256_file
from gracefarm.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user asks for beside the plan; none of it enters the build id."""

    jobs: int | None = None
    publish: str | None = None
    keep: bool = False


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a build stands on."""

    root: Path
    environment: Path
    compiler: Path | None


@dataclass(kw_only=True)
class Progress:
    """The record as far as it has come."""

    stages: list[Stage] = field(default_factory=list)
    jobs: Jobs | None = None
    verdicts: tuple[Verdict, ...] = ()
    smoke: SmokeResult | None = None


def build(plan: Plan, options: Options, settings: Settings, console: Console) -> Record:
    """The record of the plan's wheel, built if it is not there yet.

    Raises:
        GracefarmError: the class of the first failure; the record of a failed build is written before.
    """
    data = plan.recipe.data
    console.step("plan", f"{plan.title}: build id {plan.build_id[:16]}")
    folder = record.folder(settings, plan.build_id)
    waiting = lambda: console.step("wait", f"another process builds {plan.build_id[:16]}; waiting for it")  # noqa: E731
    with lock(settings.home / "locks" / f"build-{plan.build_id}", waiting):
        found = record.existing(plan, settings)
        if found is not None:
            console.step("done", f"{data.name} {data.version} exists already with this id; nothing to build")
        else:
            found = _attempt(plan, options, settings, console, folder)
        if options.publish:
            found = publish_record(found, options.publish, settings, console)
    return found


def publish_record(found: Record, url: str, settings: Settings, console: Console) -> Record:
    """Upload the record's wheel unless the record says that it was; a wheel that failed a gate has no path to here."""
    if any(one.url == url for one in found.published):
        console.step("publish", f"{url} has it already")
        return found
    wheel = record.wheel_path(settings, found)
    assert wheel is not None
    publication: Publication = publish.upload(wheel, url)
    console.step("publish", f"{wheel.name} to {url}")
    updated = found.model_copy(update={"published": (*found.published, publication)})
    record.write(updated, settings)
    return updated


def _attempt(plan: Plan, options: Options, settings: Settings, console: Console, folder: Path) -> Record:
    progress = Progress()
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        try:
            wheel = _stages(plan, options, settings, console, folder, progress)
        except GracefarmError as error:
            record.write(_record(plan, progress, None, error), settings)
            raise
        done = _record(plan, progress, wheel, None)
        record.write(done, settings)
    if not options.keep:
        for name in ("work", "smoke", "raw", "embedded", "repaired", "compiled.json"):
            remove_tree(folder / name)
    console.step(
        "record",
        f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB; record {record.path(settings, plan.build_id)}; log {log}",
    )
    return done


def _record(plan: Plan, progress: Progress, wheel: Path | None, error: GracefarmError | None) -> Record:
    data = plan.recipe.data
    return Record(
        build_id=plan.build_id,
        recipe=plan.recipe.key,
        name=data.name,
        version=data.version,
        stack=plan.stack.data.name,
        inputs=plan.inputs,
        outcome="built" if wheel else "failed",
        failure=record.failure(error) if error else None,
        wheel=record.WheelFile(filename=wheel.name, sha256=sha256_file(wheel), size=wheel.stat().st_size) if wheel else None,
        jobs=progress.jobs,
        stages=tuple(progress.stages),
        verdicts=progress.verdicts,
        smoke=progress.smoke,
        finished=record.now(),
    )


@contextmanager
def _timed(progress: Progress, name: str) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        progress.stages.append(Stage(name=name, wall_s=round(time.monotonic() - start, 2)))


def _stages(plan: Plan, options: Options, settings: Settings, console: Console, folder: Path, progress: Progress) -> Path:
    data = plan.recipe.data
    _check_binfmt(plan)
    with _timed(progress, "fetch"), console.progress("fetch") as tick:
        fetched = fetch.fetch(data, settings, tick)
    console.step("fetch", f"sources of {data.name} {data.version} are in the store")
    with _timed(progress, "root"):
        ground = lay_ground(plan, settings, console)
    raw = _compiled(plan, options, settings, console, folder, progress, fetched, ground)
    with _timed(progress, "audit"):
        wheel = _audited(plan, raw, source.source_date_epoch(data, fetched), folder, ground, progress, console)
    result, outcome, command = smoke.run(
        wheel,
        imports=data.smoke.imports,
        script=plan.recipe.smoke_script,
        environment=ground.environment,
        root=ground.root,
        folder=folder / "smoke",
        memory=compile.bound(settings, meter.available_memory()),
        log=folder / "log.txt",
    )
    progress.smoke = result
    progress.stages.append(record.stage("smoke", outcome, command))
    console.step("smoke", f"imported {', '.join(result.modules)} in a clean environment in {outcome.wall_s:.0f} s")
    final = folder / "dist" / wheel.name
    remove_tree(final.parent)
    final.parent.mkdir()
    shutil.move(wheel, final)
    return final


def _check_binfmt(plan: Plan) -> None:
    """A recipe that executes programs of the target other than Python needs a kernel that starts them."""
    if not plan.recipe.data.build.binfmt or plan.host is plan.target:
        return
    from builder import doctor  # which loads an HTTP client

    problem = doctor.registration(plan.target)
    if problem is not None:
        raise HostError(
            f"{plan.recipe.key} executes programs of {plan.target.value}, which this kernel does not start: {problem}",
            remedy="run `builder doctor --fix` as root",
            repeat=f"builder build {plan.recipe.key}",
        )


def lay_ground(plan: Plan, settings: Settings, console: Console) -> Ground:
    """Root, environment and compilers of a plan, assembled where they are not there yet."""
    start = time.monotonic()
    with console.progress("root") as tick:
        base = root.ensure(plan.stack, plan.host, plan.target, settings, tick)
    with console.progress("root") as tick:
        site = environment.ensure(plan.stack, plan.target, base, settings, tick)
    compiler = None
    if plan.recipe.data.build.cuda:
        with console.progress("root") as tick:
            compiler = environment.ensure_toolchain(plan.stack, plan.host, settings, tick)
    console.step("root", f"root, environment and compilers ready in {time.monotonic() - start:.1f} s")
    return Ground(root=base, environment=site, compiler=compiler)


def build_sandbox(
    plan: Plan, ground: Ground, settings: Settings, folder: Path, *, count: int, epoch: int, memory: int
) -> Sandbox:
    """The sandbox of a compile; `builder shell` opens the same."""
    return Sandbox(
        root=ground.root,
        mounts=(
            *toolchain.mounts(plan, ground.environment, ground.compiler, settings),
            Mount(source=folder, target="/build", writable=True),
        ),
        environment=toolchain.variables(plan, jobs=count, epoch=epoch),
        workdir="/build",
        memory=memory,
    )


def _compiled(
    plan: Plan,
    options: Options,
    settings: Settings,
    console: Console,
    folder: Path,
    progress: Progress,
    fetched: fetch.Fetched,
    ground: Ground,
) -> Path:
    """The raw wheel: of a run that was killed after its compile, or compiled now, with one retry after a kill by memory."""
    checkpoint = folder / "compiled.json"
    if checkpoint.is_file():
        saved = json.loads(checkpoint.read_text())
        raw = folder / "raw" / str(saved["wheel"])
        if raw.is_file() and sha256_file(raw) == saved["sha256"]:
            progress.jobs = Jobs.model_validate(saved["jobs"])
            progress.stages.append(Stage.model_validate(saved["stage"]))
            console.step("compile", "compiled before this run was cut off; going on from there")
            return raw
    memory = compile.bound(settings, meter.available_memory())
    wanted = options.jobs or settings.jobs
    count = jobs.plan(memory=memory, memory_per_job=plan.recipe.data.build.memory_per_job, wanted=wanted)
    try:
        return _compile_once(plan, settings, console, folder, progress, fetched, ground, count, memory)
    except GracefarmError as error:
        fewer = compile.fewer_jobs(error, count.count)
        if fewer is None:
            raise
        console.warn(f"{error.cause}; trying once more with {fewer} jobs")
        retry = Jobs(count=fewer, reason=f"after a kill by memory with {count.count} jobs ({count.reason})")
        return _compile_once(plan, settings, console, folder, progress, fetched, ground, retry, memory)


def _compile_once(
    plan: Plan,
    settings: Settings,
    console: Console,
    folder: Path,
    progress: Progress,
    fetched: fetch.Fetched,
    ground: Ground,
    count: Jobs,
    memory: int,
) -> Path:
    progress.jobs = count
    work = folder / "work"
    remove_tree(work)
    for name in ("out", "tmp"):
        (work / name).mkdir(parents=True)
    epoch = source.source_date_epoch(plan.recipe.data, fetched)
    tree = source.unpack(plan.recipe, fetched, work / "source", epoch)
    compile.check_requirements(plan, tree)
    box = build_sandbox(plan, ground, settings, work, count=count.count, epoch=epoch, memory=memory)
    command = compile.command(plan)
    log = folder / "log.txt"
    log.write_text(
        f"# {plan.title}\n# build id {plan.build_id}\n# jobs {count.count}: {count.reason}\n# {' '.join(command)}\n"
    )
    console.step("compile", f"{count.count} jobs ({count.reason}); log {log}")
    with console.progress("compile") as tick:
        outcome = compile.run(compile.Job(sandbox=box, command=command, log=log), _time_left(plan, settings, tick))
    progress.stages.append(record.stage("compile", outcome, command))
    compile.judge(outcome, log, plan)
    return _checkpoint(audit.only_wheel(work / "out"), folder, progress, console, outcome)


def _checkpoint(wheel: Path, folder: Path, progress: Progress, console: Console, outcome: Outcome) -> Path:
    """Keep the raw wheel, so that a run cut off later need not compile again."""
    raw = folder / "raw" / wheel.name
    remove_tree(raw.parent)
    raw.parent.mkdir()
    shutil.copy(wheel, raw)
    assert progress.jobs is not None
    saved = {
        "wheel": raw.name,
        "sha256": sha256_file(raw),
        "jobs": progress.jobs.model_dump(),
        "stage": progress.stages[-1].model_dump(mode="json"),
    }
    atomic_write(folder / "compiled.json", json.dumps(saved))
    console.step(
        "compile",
        f"{raw.name} in {outcome.wall_s:.0f} s, {outcome.cpu_s:.0f} CPU s, peak {outcome.peak_memory / 2**30:.1f} GiB",
    )
    return raw


def _time_left(plan: Plan, settings: Settings, tick: Callable[[int, int | None, str], None]) -> Callable[[int, int], None]:
    """Progress with the time left, from this recipe's last success or else from the pace so far."""
    past = next((one for one in record.all_of(settings, plan.recipe.key) if one.outcome == "built"), None)
    before = next((stage.wall_s for stage in past.stages if stage.name == "compile"), None) if past else None
    start = time.monotonic()

    def progress(done: int, total: int) -> None:
        elapsed = time.monotonic() - start
        expected = before or (elapsed / done * total if done else None)
        left = "" if expected is None else f"about {max(0.0, expected - elapsed) / 60:.0f} min left"
        tick(done, total, f"translation units, {left} ({'last time' if before else 'by the pace so far'})")

    return progress


def policy(plan: Plan, ground: Ground) -> Policy:
    """The gates' expectations of a plan's wheel."""
    data, stack = plan.recipe.data, plan.stack.data
    found = ground.compiler and next(iter(sorted(ground.compiler.glob("nvidia/*/bin/cuobjdump"))), None)
    return Policy(
        target=plan.target,
        python=stack.python,
        name=data.name,
        version=data.version,
        glibc=stack.glibc[plan.target],
        cuda=stack.cuda,
        sm=stack.sm if data.build.cuda else None,
        needs_cubins=data.build.cuda,
        sm_extra=data.wheel.sm_extra,
        bundled=data.wheel.bundled,
        max_size=parse_size(data.wheel.max_size),
        build_paths=("/build", "/tmp"),  # noqa: S108 prefixes to look for, not a place to write
        site_packages=toolchain.site_packages(ground.environment, stack.python),
        root=ground.root,
        cuobjdump=found,
    )


def _audited(plan: Plan, raw: Path, epoch: int, folder: Path, ground: Ground, progress: Progress, console: Console) -> Path:
    rules = policy(plan, ground)
    embedded = embed.embed(raw, plan, epoch, folder / "embedded")
    remove_tree(folder / "repaired")
    (folder / "repaired").mkdir()
    os.environ["SOURCE_DATE_EPOCH"] = str(epoch)  # which auditwheel writes into the archive
    wheel = audit.repair(embedded, rules, folder / "repaired")
    progress.verdicts = audit.audit(wheel, rules)
    for verdict in progress.verdicts:
        console.step("audit", f"{verdict.status:14} {verdict.gate}: {verdict.summary}")
    audit.require(progress.verdicts)
    return wheel

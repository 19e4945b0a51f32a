"""The flow: fetch, root, compile, audit, smoke, record. Killed anywhere, the next run goes on to the same record."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from builder import audit, fetch, smoke
from builder.audit import Policy
from builder.audit.verdict import Verdict
from builder.box import meter, sandbox
from builder.box.plain import Plain
from builder.box.sandbox import Mount, Sandbox
from builder.compiling import jobs, pep517, units
from builder.fetch import source
from builder.ground import environment, root
from builder.planning import gaps
from builder.planning.plan import Plan
from builder.planning.stack import Stack
from builder.proof import embed, provenance, publish, record
from builder.proof.record import CompilerCache, Failure, GpuResult, Jobs, Publication, Record, SmokeResult, Stage, Unit
from builder.toolchains import ccache, container, hosted, locked
from builder.toolchains.machine import library_folders
from gracefarm.console import Console
from gracefarm.errors import DiskFullError, ExitCode, GracefarmError, HostError, PublishError
from gracefarm.files import atomic_write, full_disk, lock, remove_tree, sha256_file
from gracefarm.settings import Settings
from gracefarm.tables import parse_size


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user asks for beside the plan; none of it enters the build id."""

    jobs: int | None = None
    publish: str | None = None
    keep: bool = False
    compiler_cache: bool = True
    "Where the settings allow it."


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a build stands on."""

    root: Path
    environment: Path
    compiler: Path | None

    def packages(self, plan: Plan) -> Path:
        """The folder that has torch."""
        if plan.machine is not None and not plan.machine.locked:
            return plan.machine.site_packages
        return locked.site_packages(self.environment, plan.stack.data.python)


@dataclass(kw_only=True)
class Run:
    """One build under way: what it was asked for, and the record as far as it has come."""

    plan: Plan
    options: Options
    settings: Settings
    console: Console
    folder: Path
    stages: list[Stage] = field(default_factory=list)
    jobs: Jobs | None = None
    known: dict[str, Unit] = field(default_factory=dict)
    "What translation units cost before this run."
    units: dict[str, Unit] = field(default_factory=dict)
    compiler_cache: CompilerCache | None = None
    torch_cxx11_abi: bool | None = None
    verdicts: tuple[Verdict, ...] = ()
    smoke: SmokeResult | None = None
    gpu: GpuResult | None = None

    @property
    def log(self) -> Path:
        """The whole output of compile and smoke test."""
        return self.folder / "log.txt"

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A stage that runs in this process."""
        start, usage = time.monotonic(), meter.Usage()
        try:
            with meter.watch() as usage:
                yield
        finally:
            wall, cpu = round(time.monotonic() - start, 2), round(usage.cpu_s, 2)
            self.stages.append(Stage(name=name, wall_s=wall, cpu_s=cpu, peak_memory=usage.peak_memory))

    def record(self, wheel: Path | None, error: GracefarmError | None) -> Record:
        """The record of the finished build."""
        data = self.plan.recipe.data
        return Record(
            build_id=self.plan.build_id,
            recipe=self.plan.recipe.key,
            name=data.name,
            version=data.version,
            stack=self.plan.stack.data.name,
            inputs=self.plan.inputs,
            toolchain="host" if self.plan.machine else "container" if self.plan.contained else "sandbox",
            outcome="built" if wheel else "failed",
            failure=record.failure(error) if error else None,
            wheel=record.WheelFile(filename=wheel.name, sha256=sha256_file(wheel), size=wheel.stat().st_size)
            if wheel
            else None,
            source=next(map(record.product, sorted(wheel.parent.glob("*.tar.gz"))), None) if wheel else None,
            torch_cxx11_abi=self.torch_cxx11_abi,
            jobs=self.jobs,
            stages=tuple(self.stages),
            units=self.units,
            compiler_cache=self.compiler_cache,
            verdicts=self.verdicts,
            judged_by=self.plan.judged_by,
            smoke=self.smoke,
            gpu=self.gpu,
            finished=record.now(),
        )


def build(plan: Plan, options: Options, settings: Settings, console: Console) -> Record:
    """The record of the plan's wheel, built if it is not there yet.

    Raises:
        GracefarmError: the class of the first failure; the record of a failed build is written before.
    """
    data = plan.recipe.data
    console.step("plan", f"{plan.title}: build id {plan.build_id[:16]}")
    gaps.require_none(plan)
    if options.publish:
        refuse_objects(plan.stack.data)
    folder = record.folder(settings, plan.build_id)

    def waiting() -> None:
        console.step("wait", f"another process builds {plan.build_id[:16]}; waiting for it")

    with lock(settings.home / "locks" / f"build-{plan.build_id}", waiting):
        found = record.existing(plan, settings)
        run = Run(plan=plan, options=options, settings=settings, console=console, folder=folder)
        if found is not None:
            console.step("done", f"{data.name} {data.version} exists already with this id; nothing to build")
            found = found if found.judged_by == plan.judged_by else _judged_again(run, found)
        else:
            try:
                found = _attempt(run)
            except GracefarmError:
                if options.publish and record.path(settings, plan.build_id).is_file():
                    tell_index(plan.build_id, options.publish, settings, console)
                raise
        if options.publish:
            found = publish_record(found, options.publish, settings, console)
            tell_index(found.build_id, options.publish, settings, console)
    return found


def refuse_objects(stack: Stack) -> None:
    """A stack of headers makes objects to look at, not wheels to give away.

    Raises:
        PublishError: the stack is such a one.
    """
    if stack.objects_only:
        raise PublishError(
            f"stack {stack.name} has headers alone: what it builds cannot be loaded and is not published",
            remedy="build against a stack that has the libraries",
        )


def publish_record(found: Record, url: str, settings: Settings, console: Console) -> Record:
    """Upload the record's wheel unless the record says that it was; a wheel that failed a gate has no path to here."""
    if any(one.url == url for one in found.published):
        console.step("publish", f"{url} has it already")
        return found
    wheel = record.wheel_path(settings, found)
    assert wheel is not None
    for archive in sorted(wheel.parent.glob("*.tar.gz")):
        # The source goes first: no moment in which the wheel is offered without it.
        publish.upload(archive, url)
        console.step("publish", f"{archive.name} to {url}")
    publication: Publication = publish.upload(wheel, url)
    console.step("publish", f"{wheel.name} to {url}")
    updated = found.model_copy(update={"published": (*found.published, publication)})
    record.write(updated, settings)
    return updated


def tell_index(build_id: str, url: str, settings: Settings, console: Console) -> None:
    """Record and log to an index that keeps them: the only way in which it learns of a build that left no wheel."""
    folder = record.folder(settings, build_id)
    refused = publish.send_record(record.path(settings, build_id), folder / "log.txt", build_id, url)
    console.step("publish", f"record and log to {url}" if refused is None else f"the index keeps no record: {refused}")


CUT_OFF = Failure(
    kind=ExitCode.INTERRUPTED.name.lower(),
    exit_code=ExitCode.INTERRUPTED,
    cause="this build has not come to its end: it is running, or it was cut off",
    remedy="the same command goes on from there",
)


def _attempt(run: Run) -> Record:
    with full_disk(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        # First, so that the last build is this one, whatever ends it: `log`, `show` and `shell` are about that.
        record.write(run.record(None, None).model_copy(update={"failure": CUT_OFF}), run.settings)
        if not _checkpoint_place(run).is_file():
            run.log.write_text(f"# {run.plan.title}\n# build id {run.plan.build_id}\n")
        try:
            wheel = _stages(run)
        except GracefarmError as error:
            with suppress(DiskFullError):  # which may be the very error that is to be told
                record.write(run.record(None, error), run.settings)
            raise
        done = provenance.signed(run.record(wheel, None), run.settings)
        place = record.write(done, run.settings)
    if not run.options.keep:
        for name in record.SCRATCH:
            remove_tree(run.folder / name)
    signature = f"signed by key {done.provenance['signatures'][0]['keyid'][:16]}" if done.provenance else "not signed"
    run.console.step("provenance", signature if done.provenance else f"{signature}: `builder key create` makes the farm's key")
    run.console.step("record", f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB; record {place}; log {run.log}")
    return done


def _judged_again(run: Run, found: Record) -> Record:
    """A finished wheel before the gates and smoke tests of today, since they are not those that it passed.

    Raises:
        AuditError, SmokeError: it does not pass; the record stays as it was, and nothing is published.
    """
    wheel = record.wheel_path(run.settings, found)
    assert wheel is not None
    run.console.step("audit", "the gates or the smoke test changed since this wheel passed them: it is judged again")
    ground = lay_ground(run.plan, run.settings, run.console)
    _pass_gates(run, wheel, policy(run.plan, ground, run.folder / "work"))
    _smoked(run, wheel, ground)
    remove_tree(run.folder / "smoke")
    judgement = {"verdicts": run.verdicts, "smoke": run.smoke, "gpu": run.gpu, "judged_by": run.plan.judged_by}
    updated = found.model_copy(update=judgement)
    record.write(updated, run.settings)
    return updated


def _stages(run: Run) -> Path:
    """All stages up to the record; the finished wheel."""
    data = run.plan.recipe.data
    _check_sandbox(run.plan)
    _check_binfmt(run.plan)
    for difference in run.plan.machine.differences if run.plan.machine else ():
        run.console.step("host", difference)
    with run.timed("fetch"), run.console.progress("fetch") as tick:
        fetched = fetch.fetch(data, run.settings, tick)
        if run.plan.contained is not None:
            container.pull(run.plan, run.plan.contained.engine)
    run.console.step("fetch", f"sources of {data.name} {data.version} are in the store")
    epoch = source.source_date_epoch(data, fetched)
    with run.timed("root"):
        ground = lay_ground(run.plan, run.settings, run.console)
    run.torch_cxx11_abi = environment.torch_abi(ground.packages(run.plan))
    raw = _saved(run) or _compiled(run, fetched, ground, epoch)
    with run.timed("audit"):
        wheel = _audited(run, raw, ground, epoch)
    _smoked(run, wheel, ground)
    final = run.folder / "dist" / wheel.name
    remove_tree(final.parent)
    final.parent.mkdir()
    shutil.move(wheel, final)
    if run.plan.recipe.data.wheel.source_archive:
        source.finish(run.folder / "raw-source", final, run.folder / "dist", epoch)
    return final


def _smoked(run: Run, wheel: Path, ground: Ground) -> None:
    if run.plan.stack.data.objects_only:
        run.console.step("smoke", f"not run: stack {run.plan.stack.data.name} has headers alone, nothing can be loaded")
        return
    recipe = run.plan.recipe
    bed = smoke.Bed(
        environment=ground.environment,
        root=ground.root,
        machine=run.plan.machine,
        emulated=run.plan.host is not run.plan.target,
    )
    trial = smoke.Trial(
        wheel=wheel,
        imports=recipe.data.smoke.imports,
        script=recipe.smoke_script,
        bed=bed,
        folder=run.folder / "smoke",
        memory=pep517.bound(run.settings, meter.available_memory()),
        log=run.log,
    )
    result, outcome, command = smoke.run(trial)
    run.smoke = result
    run.stages.append(record.stage("smoke", outcome, command))
    run.console.step("smoke", f"imported {', '.join(result.modules)} in a clean environment in {outcome.wall_s:.0f} s")
    if recipe.smoke_gpu_script is not None:
        with run.timed("smoke-gpu"):
            run.gpu = smoke.run_gpu(replace(trial, script=recipe.smoke_gpu_script), run.plan.stack.data.sm)
        run.console.step("smoke-gpu", smoke.sentence(run.gpu))


def _check_sandbox(plan: Plan) -> None:
    """Before anything is downloaded for it."""
    problem = sandbox.check() if plan.machine is None else None
    if problem is not None:
        raise HostError(f"the sandbox cannot be started: {problem}", remedy="run `builder doctor --fix`, as root or with sudo")


def _check_binfmt(plan: Plan) -> None:
    """A recipe that executes programs of the target other than Python needs a kernel that starts them."""
    if not plan.recipe.data.build.binfmt or plan.host is plan.target:
        return
    from builder.upkeep import doctor  # which loads an HTTP client

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
    if plan.machine is not None:
        with console.progress("root") as tick:
            site = hosted.ensure(plan.machine, settings, tick)
        console.step("root", f"no root: this machine's files, with a clean environment in {site}")
        return Ground(root=Path("/"), environment=site, compiler=plan.machine.cuda_home)
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
    plan: Plan,
    ground: Ground,
    settings: Settings,
    folder: Path,
    *,
    count: int,
    epoch: int,
    memory: int,
    cached: bool = False,
) -> Sandbox | Plain:
    """Where a compile runs; `builder shell` opens the same, without the compiler cache."""
    if plan.machine is not None:
        return hosted.place(plan, ground.environment, settings, folder, jobs=count, epoch=epoch, memory=memory)
    if plan.contained is not None:
        return container.place(plan, ground.environment, ground.compiler, folder, jobs=count, epoch=epoch, memory=memory)
    return Sandbox(
        root=ground.root,
        mounts=(
            *locked.mounts(plan, ground.environment, ground.compiler, ground.root, settings),
            Mount(source=folder, target="/build", writable=True),
            *(ccache.mounts(plan, settings) if cached else ()),
        ),
        environment=locked.variables(plan, jobs=count, epoch=epoch) | (ccache.variables(plan, settings) if cached else {}),
        workdir="/build",
        memory=memory,
    )


def reopen(plan: Plan, folder: Path, settings: Settings, console: Console) -> Sandbox | Plain:
    """The sandbox of a compile once more, its source unpacked where a success has removed it.

    Raises:
        GracefarmError: the source or the ground cannot be had.
    """
    fetched = fetch.fetch(plan.recipe.data, settings)
    epoch = source.source_date_epoch(plan.recipe.data, fetched)
    if not (folder / "source").is_dir():
        for name in ("out", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        source.unpack(plan.recipe, fetched, folder / "source", epoch)
    memory = pep517.bound(settings, meter.available_memory())
    return build_sandbox(plan, lay_ground(plan, settings, console), settings, folder, count=1, epoch=epoch, memory=memory)


def build_command(plan: Plan, settings: Settings, folder: Path) -> tuple[str, ...]:
    """What runs there; `builder plan` prints it."""
    if plan.machine is not None:
        return pep517.command(plan, str(hosted.environment_place(plan.machine, settings)), str(folder))
    if plan.contained is not None:
        return container.command(plan, folder)
    return pep517.command(plan)


def _checkpoint_place(run: Run) -> Path:
    return run.folder / "compiled.json"


def _saved(run: Run) -> Path | None:
    """The raw wheel of a run that was cut off after its compile."""
    checkpoint = _checkpoint_place(run)
    if not checkpoint.is_file():
        return None
    saved = json.loads(checkpoint.read_text())
    raw = run.folder / "raw" / str(saved["wheel"])
    if not raw.is_file() or sha256_file(raw) != saved["sha256"]:
        return None
    run.jobs = Jobs.model_validate(saved["jobs"])
    run.units = {name: Unit.model_validate(one) for name, one in saved["units"].items()}
    run.compiler_cache = saved["compiler_cache"] and CompilerCache.model_validate(saved["compiler_cache"])
    run.stages.append(Stage.model_validate(saved["stage"]))
    run.console.step("compile", "compiled before this run was cut off; going on from there")
    return raw


def _compiled(run: Run, fetched: fetch.Fetched, ground: Ground, epoch: int) -> Path:
    """The raw wheel, compiled now, with one retry after a kill by memory."""
    memory = pep517.bound(run.settings, meter.available_memory())
    per_job = run.plan.recipe.data.build.memory_per_job
    # What a container build took is not known: its record has cibuildwheel's own figures, and teaches nothing.
    records = [] if run.plan.contained else record.all_of(run.settings, run.plan.recipe.key)
    records = [one for one in records if one.toolchain != "container"]
    like = {"stack": run.plan.stack.data.name, "target": run.plan.target.value}
    past = jobs.learned(records, **like)
    run.known = units.learned(records, **like)
    wanted = run.options.jobs or run.settings.jobs
    whole = units.learned([one for one in records if one.outcome == "built"], **like)
    count = jobs.plan(
        memory=memory,
        memory_per_job=per_job,
        wanted=wanted,
        past=past,
        declared=[parse_size(size) for size in run.plan.recipe.data.build.unit_memory.values()],
        peaks=[one.peak_memory for one in whole.values()],
    )
    try:
        return _compile_once(run, fetched, ground, epoch, count, memory)
    except GracefarmError as error:
        fewer = pep517.fewer_jobs(error, count.count)
        if fewer is None:
            raise
        run.console.warn(f"{error.cause}; trying once more with {fewer} jobs")
        retry = Jobs(count=fewer, reason=f"after a kill by memory with {count.count} jobs ({count.reason})")
        return _compile_once(run, fetched, ground, epoch, retry, memory)


def _compile_once(run: Run, fetched: fetch.Fetched, ground: Ground, epoch: int, count: Jobs, memory: int) -> Path:
    run.jobs = count
    work = run.folder / "work"
    # Of a build that was cut off there is no record, and its units come from the cache now.
    run.known |= units.costs(units.read(work), run.known)
    tree = _source_tree(run, fetched, work, epoch)
    pep517.check_requirements(run.plan, tree)
    plan = units.schedule(run.known, run.plan.recipe.data.build, tree, memory=memory - jobs.OTHERS, jobs=count.count)
    (work / units.SCHEDULE).write_text(plan)
    sandboxed = run.plan.machine is None and run.plan.contained is None
    cached = run.options.compiler_cache and sandboxed and ccache.enabled(run.settings)
    box = build_sandbox(run.plan, ground, run.settings, work, count=count.count, epoch=epoch, memory=memory, cached=cached)
    command = build_command(run.plan, run.settings, work)
    with run.log.open("a") as stream:
        stream.write(f"# jobs {count.count}: {count.reason}\n# {' '.join(command)}\n")
        stream.write(f"# {shlex.join(sandbox.command(box, command))}\n")
    run.console.step("compile", f"{count.count} jobs ({count.reason}); log {run.log}")
    with run.console.progress("compile") as tick:
        job = pep517.Job(sandbox=box, command=command, log=run.log, log_start=run.log.stat().st_size)
        with container.removed(run.plan) if run.plan.contained else nullcontext():
            outcome = pep517.run(job, _time_left(run.plan, run.settings, tick))
    if run.plan.contained is not None:
        outcome = container.heard(outcome, run.plan, run.log, job.log_start)
    run.stages.append(record.stage("compile", outcome, command, _note(run.plan)))
    _count_units(run, units.read(work))
    pep517.judge(outcome, job, run.plan)
    raw = _checkpoint(run, audit.only_wheel(work / "out"), count)
    peak = outcome.peak_memory / 2**30
    run.console.step("compile", f"{raw.name} in {outcome.wall_s:.0f} s, {outcome.cpu_s:.0f} CPU s, peak {peak:.1f} GiB")
    return raw


def _source_tree(run: Run, fetched: fetch.Fetched, work: Path, epoch: int) -> Path:
    """The source, unpacked fresh; in a host build that was cut off, as far as that one came: ninja goes on from there."""
    tree = work / "source"
    if run.plan.machine is not None and tree.is_dir():
        hosted.clear_products(tree, epoch)
        run.console.step("compile", f"going on from {tree}, where an earlier run of this build id ended")
        remove_tree(work / "out")
    else:
        remove_tree(work)
        work.mkdir(parents=True)
        source.unpack(run.plan.recipe, fetched, tree, epoch)
        if run.plan.recipe.data.wheel.source_archive:
            source.pack(tree, run.plan.recipe.data, run.folder / "raw-source", epoch)
    remove_tree(work / "tmp")
    for name in ("out", "tmp"):
        (work / name).mkdir()
    return tree


def _note(plan: Plan) -> str:
    """What the record says about the network of a compile, and of a container's memory."""
    if plan.contained is not None:
        return container.note(plan)
    if plan.machine is None or plan.machine.uncut is None:
        return "without network"
    return f"the network was not cut off: {plan.machine.uncut}"


def _count_units(run: Run, notes: list[units.Note]) -> None:
    """Into the record, the log and onto the console: what the units cost, and what the cache did."""
    run.units = run.units | units.costs(notes, run.known)
    run.compiler_cache = units.statistics(notes, run.known)
    title = units.title(run.compiler_cache) if run.compiler_cache else "compiler cache: off, or nothing to compile"
    with run.log.open("a") as stream:
        stream.write(f"# {title}\n")
    if run.compiler_cache:
        run.console.step("compile", title)


def _checkpoint(run: Run, wheel: Path, count: Jobs) -> Path:
    """Keep the raw wheel, so that a run cut off later need not compile again."""
    raw = run.folder / "raw" / wheel.name
    remove_tree(raw.parent)
    raw.parent.mkdir()
    shutil.copy(wheel, raw)
    saved = {
        "wheel": raw.name,
        "sha256": sha256_file(raw),
        "jobs": count.model_dump(),
        "stage": run.stages[-1].model_dump(mode="json"),
        "units": {name: one.model_dump() for name, one in run.units.items()},
        "compiler_cache": run.compiler_cache and run.compiler_cache.model_dump(),
    }
    atomic_write(_checkpoint_place(run), json.dumps(saved))
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


def policy(plan: Plan, ground: Ground, folder: Path) -> Policy:
    """The gates' expectations of a plan's wheel, built in `folder`."""
    data, stack, machine = plan.recipe.data, plan.stack.data, plan.machine
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
        build_paths=("/build", "/tmp", *([str(folder)] if machine else []), *([container.PROJECT] if plan.contained else [])),  # noqa: S108 prefixes to look for, not to write
        site_packages=ground.packages(plan),
        root=ground.root,
        folders=library_folders(machine) if machine else (),
        interpreter=machine.interpreter.real if machine else None,
        cuobjdump=hosted.cuobjdump(machine, ground.packages(plan)) if machine else found,
    )


def _audited(run: Run, raw: Path, ground: Ground, epoch: int) -> Path:
    """The wheel with the build's inputs inside, repaired to its measured tag, with every gate passed."""
    rules = policy(run.plan, ground, run.folder / "work")
    embedded = embed.embed(raw, run.plan, epoch, run.folder / "embedded")
    remove_tree(run.folder / "repaired")
    os.environ["SOURCE_DATE_EPOCH"] = str(epoch)  # which auditwheel writes into the archive
    wheel = embedded if run.plan.stack.data.objects_only else audit.repair(embedded, rules, run.folder / "repaired")
    _pass_gates(run, wheel, rules)
    return wheel


def _pass_gates(run: Run, wheel: Path, rules: Policy) -> None:
    run.verdicts = audit.audit(wheel, rules)
    if run.plan.stack.data.objects_only:
        run.verdicts = tuple(one for one in run.verdicts if one.gate in audit.OBJECT_GATES)
    for verdict in run.verdicts:
        run.console.step("audit", f"{verdict.status:14} {verdict.gate}: {verdict.summary}")
    audit.require(run.verdicts)

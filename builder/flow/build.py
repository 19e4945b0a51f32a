"""The flow: fetch, root, compile, audit, smoke, record, publish.

After a kill, the next run continues and ends with the same record.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from builder import audit, fetch
from builder.audit import policy
from builder.box import binfmt
from builder.compiling import pep517
from builder.fetch import Fetched, source, store_path
from builder.flow import judge, tree
from builder.flow.attempt import Attempt, BuildOptions
from builder.flow.compile import checkpoint, compiled, prepare
from builder.flow.publishing import publish_build, refuse_licence, refuse_objects, refuse_tree, send_failure
from builder.flow.root_stage import lay_ground
from builder.ground import torch_facts
from builder.planning.ground import Ground
from builder.planning.plan import NO_CACHES, Plan
from builder.planning.settings import Settings
from builder.proof import embed, judges, provenance, record, shared_cache
from builder.proof.record import Failure, Record
from gracefarm.console import Console
from gracefarm.errors import DiskFullError, ExitCode, GracefarmError, HostError
from gracefarm.files import disk_used, full_disk, lock, remove_tree


def build(plan: Plan, options: BuildOptions, settings: Settings, console: Console) -> Record:
    """The record of the plan's wheel, which is built if it does not exist.

    Raises:
        GracefarmError: the first failure, after the record of the failed build was written.
    """
    data = plan.recipe.data
    console.step("plan", f"{plan.title}: build id {plan.build_id[:16]}")
    plan.require_digests()
    shared_cache.check(settings, options.shared_cache)
    if options.publish:
        refuse_objects(plan.stack.data)
        refuse_licence(plan.recipe)
        refuse_tree(plan.recipe)

    with _alone(plan, settings, console):
        built = record.existing(plan, settings)
        folder = record.folder(settings, plan.build_id)
        attempt = Attempt(plan=plan, options=options, settings=settings, console=console, folder=folder)
        if built is not None:
            console.step("done", f"{data.name} {data.version} is already built with this build id")
            judged = built.tree is not None or built.judged_by == judges.digest(plan)
            built = built if judged else _judged_again(attempt, built)
        else:
            try:
                built = _recorded(attempt)
            except GracefarmError:
                if options.publish and record.path(settings, plan.build_id).is_file():
                    send_failure(plan.build_id, options.publish, settings, console)
                raise
        if options.publish:
            built = publish_build(built, options.publish, settings, console)
    return built


def ready(plan: Plan, options: BuildOptions, settings: Settings, console: Console) -> tuple[Path, ...]:
    """Do everything that precedes the compile. Return the folders and files of GRACEFARM_HOME that the build reads up to the
    end of its compile: with these, another machine compiles without network.

    Raises:
        GracefarmError: a step failed.
    """
    console.step("plan", f"{plan.title}: build id {plan.build_id[:16]}")
    plan.require_digests()
    folder = record.folder(settings, plan.build_id) / "ready"
    attempt = Attempt(plan=plan, options=options, settings=settings, console=console, folder=folder)
    with _alone(plan, settings, console), full_disk(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            laid = _laid(attempt)
            memory = pep517.bound(settings)
            place = plan.toolchain.place(
                plan, laid.ground, settings, attempt.work, jobs=1, epoch=laid.epoch, memory=memory, caches=NO_CACHES
            )
        finally:
            remove_tree(folder)
    fetched = laid.fetched
    further = (fetched.files, fetched.repositories, fetched.trees)
    crates = [store_path(settings, crate.sha256) for crate in attempt.crates]
    paths = [*place.reads, fetched.source, *(path for part in further for path in part.values()), *crates]
    return tuple(dict.fromkeys(path for path in paths if path.is_relative_to(settings.home)))


@contextmanager
def _alone(plan: Plan, settings: Settings, console: Console) -> Iterator[None]:
    """Hold the lock of a build id."""
    wait = f"waiting for another process, which is building {plan.build_id[:16]}"
    with lock(record.lock_path(settings, plan.build_id), lambda: console.step("wait", wait)):
        yield


CUT_OFF = Failure(
    kind=ExitCode.INTERRUPTED.name.lower(),
    exit_code=ExitCode.INTERRUPTED,
    cause="this build is not complete: it is still running, or it was interrupted",
    remedy="wait for the running build; if none is running, repeat the build command, which continues this build",
)


COMPILED = CUT_OFF.model_copy(
    update={
        "cause": "this build ended after its compile, as --until requires",
        "remedy": "repeat the build command without --until, which continues this build",
    }
)


def _recorded(attempt: Attempt) -> Record:
    """Run all stages, and write the record of their results."""
    plan, console = attempt.plan, attempt.console
    with full_disk(attempt.folder):
        attempt.folder.mkdir(parents=True, exist_ok=True)
        # Written first, so that this is the last build for `log`, `show` and `shell`, even if it is killed.
        record.write(attempt.record(None, None).model_copy(update={"failure": CUT_OFF}), attempt.settings)
        if not checkpoint(attempt).is_file():
            attempt.log.write_text(f"# {plan.title}\n# build id {plan.build_id}\n")
        try:
            product = _stages(attempt)
        except GracefarmError as error:
            with suppress(DiskFullError):  # may be the error that is being recorded
                record.write(attempt.record(None, error), attempt.settings)
            raise
        if product is None:
            paused = attempt.record(None, None).model_copy(update={"failure": COMPILED})
            record.write(paused, attempt.settings)
            return paused
        wheel = product if attempt.tree is None else None
        attempt.work_bytes = disk_used(attempt.work)
        built = provenance.signed(attempt.record(wheel, None), attempt.settings)
        place = record.write(built, attempt.settings)
    if not attempt.options.keep:
        for name in record.SCRATCH:
            remove_tree(attempt.folder / name)
    if wheel is None:
        console.step("record", f"tree {product}; record {place}; log {attempt.log}")
        return built
    signature = f"signed by key {built.provenance['signatures'][0]['keyid'][:16]}" if built.provenance else "not signed"
    console.step("provenance", signature if built.provenance else f"{signature}: run `builder key create` to sign records")
    console.step("record", f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB; record {place}; log {attempt.log}")
    return built


def _judged_again(attempt: Attempt, built: Record) -> Record:
    """Judge a finished wheel again, because gates or smoke tests have changed since it passed them.

    Raises:
        AuditError, SmokeError: it does not pass; the record is unchanged, and nothing is published.
    """
    wheel = record.wheel_path(attempt.settings, built)
    assert wheel is not None
    attempt.console.step(
        "audit", "the gates or the smoke test have changed since this wheel passed them; checking the wheel again"
    )
    ground = lay_ground(attempt.plan, attempt.settings, attempt.console)
    judge.pass_gates(attempt, wheel, policy.of_plan(attempt.plan, ground, attempt.work))
    judge.pass_smoke(attempt, wheel, ground)
    remove_tree(attempt.folder / "smoke")
    judgement: dict[str, object] = {"verdicts": attempt.verdicts, "smoke": attempt.smoke, "gpu": attempt.gpu}
    judgement |= {"device_digests": attempt.device_digests, "judged_by": judges.digest(attempt.plan)}
    updated = built.model_copy(update=judgement)
    record.write(updated, attempt.settings)
    return updated


@dataclass(frozen=True, kw_only=True)
class _Laid:
    """What a compile requires."""

    fetched: Fetched
    ground: Ground
    epoch: int


def _laid(attempt: Attempt) -> _Laid:
    """Run the stages before the compile."""
    plan, console = attempt.plan, attempt.console
    data = plan.recipe.data
    plan.toolchain.require_machine()
    _build_trees(attempt)
    _check_binfmt(plan)
    for difference in plan.toolchain.differences:
        console.step(plan.toolchain.kind, difference)
    with attempt.timed("fetch"), console.progress("fetch") as tick:
        fetched = tree.with_trees(fetch.fetch(data, attempt.settings, tick), plan, attempt.settings)
        epoch = source.source_date_epoch(data, fetched)
        unpacked = prepare(attempt, fetched, epoch)
        plan.toolchain.fetch(plan)
    fit = "; unpacked and patched" if unpacked else ""
    console.step("fetch", f"sources of {data.name} {data.version} are in the store{fit}")
    with attempt.timed("root"):
        ground = lay_ground(plan, attempt.settings, console)
    attempt.torch_cxx11_abi = torch_facts.cxx11_abi(ground.packages)
    return _Laid(fetched=fetched, ground=ground, epoch=epoch)


def _stages(attempt: Attempt) -> Path | None:
    """Run all stages before the record; return the finished wheel. None: the build ends after its compile."""
    plan = attempt.plan
    data = plan.recipe.data
    laid = _laid(attempt)
    fetched, ground, epoch = laid.fetched, laid.ground, laid.epoch
    raw = compiled(attempt, fetched, ground, epoch)
    if data.tree is not None:
        attempt.tree = tree.keep(raw, plan, attempt.settings, epoch)
        return record.tree_path(attempt.settings, plan.build_id)
    if attempt.options.until == "compile":
        return None
    with attempt.timed("audit"):
        wheel = _audited(attempt, raw, ground, epoch)
    judge.pass_smoke(attempt, wheel, ground)
    final = attempt.folder / "dist" / wheel.name
    remove_tree(final.parent)
    final.parent.mkdir()
    shutil.move(wheel, final)
    if data.wheel.source_archive:
        source.finish(attempt.folder / "raw-source", final, attempt.folder / "dist", epoch)
    return final


def _build_trees(attempt: Attempt) -> None:
    """Build the trees that the recipe uses, unless they are built already. Each is a separate build."""
    for plan in attempt.plan.trees:
        if record.tree_path(attempt.settings, plan.build_id).is_dir():
            attempt.console.step("tree", f"{plan.title}: already built, build id {plan.build_id[:16]}")
            continue
        build(plan, replace(attempt.options, publish=None, until=None), attempt.settings, attempt.console)


def _check_binfmt(plan: Plan) -> None:
    """Require a kernel that starts programs of the target, if the recipe executes such programs other than Python."""
    if not plan.recipe.data.binfmt or plan.host is plan.target:
        return
    problem = binfmt.registration(plan.target.value)
    if problem is not None:
        raise HostError(
            f"the build of {plan.recipe.key} executes programs for {plan.target.value}, but this kernel cannot run them: "
            f"{problem}",
            remedy="run `builder doctor --fix` as root, which registers an emulator (qemu) for such programs",
            repeat=plan.repeat,
        )


def _audited(attempt: Attempt, raw: Path, ground: Ground, epoch: int) -> Path:
    """The wheel after all gates, with its measured version, tag and label, and with the build's inputs in it."""
    expected = policy.of_plan(attempt.plan, ground, attempt.work)
    wheel = embed.embed(
        raw, attempt.plan, epoch, attempt.folder / record.LICENSES, attempt.folder / "embedded", attempt.crates
    )
    remove_tree(attempt.folder / "repaired")
    if not expected.objects_only:
        stack = attempt.plan.stack.data.name
        wheel = audit.repair(wheel, expected, attempt.folder / "repaired", epoch, stack=stack)
    if attempt.plan.stack.asked_variant:
        wheel = embed.label(wheel, expected, epoch, attempt.folder / "labelled")
    judge.pass_gates(attempt, wheel, expected)
    return wheel

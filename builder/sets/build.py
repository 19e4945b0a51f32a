"""Build a set, write its locks and stage it at an index; finished steps are not repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builder.compiling import pep517
from builder.flow import build, publishing
from builder.flow.attempt import BuildOptions
from builder.ground import environment, root
from builder.planning import stack
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.proof import build_tag, publish, record
from builder.proof.record import Record
from builder.sets import locks, set_record, staging, together
from builder.sets.locks import SetAddress
from builder.sets.plan import SetPlan
from builder.sets.set_record import Locked, SetRecord
from gracefarm.console import Console, counted
from gracefarm.errors import GracefarmError, PublishError, SeveralError
from gracefarm.files import atomic_write, lock, remove_tree, sha256_file


@dataclass(frozen=True, kw_only=True)
class BuiltSet:
    """A set that was built and tested, with the paths of its files."""

    plan: SetPlan
    record: SetRecord
    folder: Path
    wheels: tuple[Path, ...]
    "Ours."

    @property
    def lock(self) -> Path:
        """The lock with every wheel by sha256, for pip, uv and `index mirror`."""
        return self.folder / "requirements.lock"

    @property
    def own_locks(self) -> dict[str, Path]:
        """Locks of wheels on other indexes, such as torch's, since `index mirror` reads one index at a time."""
        indexes = sorted({wheel.index for wheel in self.record.wheels if wheel.index})
        return {index: self.folder / f"own-index-{number}.lock" for number, index in enumerate(indexes, 1)}


def build_set(plan: SetPlan, jobs: int | None, settings: Settings, console: Console) -> BuiltSet:
    """Build missing wheels, test all wheels together, write the lock.

    Raises:
        SeveralError: some wheels could not be built; each failure was reported, and all were tried.
        SmokeError, InstallError: the wheels do not work together; or a requirement of another wheel is missing in the set.
        ConfigError, FetchError, ...: see `locks.collect` and `environment.ensure`.
    """
    name, place = plan.set.data.name, set_record.folder(settings, plan.set_id)
    console.step(
        "set",
        f"{name}: set id {plan.set_id[:16]}, {counted(len(plan.builds), 'own wheel')}, "
        f"{counted(len(plan.wheels), 'other wheel')}",
    )
    if set_record.read(settings, plan.set_id) is None:
        # Checked before hours of compiling.
        together.require_others(plan, _ground(plan, settings, console)[1])
    records = _build_all(plan, jobs, settings, console)
    with lock(
        settings.home / "locks" / f"set-{plan.set_id}", lambda: console.step("wait", f"another process is testing {name}")
    ):
        wheels = tuple(path for built in records if (path := record.wheel_path(settings, built)) is not None)
        tested = set_record.read(settings, plan.set_id)
        ours = {built.wheel.sha256 for built in records if built.wheel}
        if tested is None or {wheel.sha256 for wheel in tested.wheels if wheel.own} != ours:
            tested = _tested(plan, records, wheels, place, settings, console)
        else:
            console.step("together", f"already tested at {tested.finished}")
    title = f"Set {name}, id {plan.set_id}: own wheels, and the wheels that they were tested with."
    atomic_write(place / "requirements.lock", locks.requirements(title, tested.wheels))
    built = BuiltSet(plan=plan, record=tested, folder=place, wheels=wheels)
    for index, own in built.own_locks.items():
        of_it = [wheel for wheel in tested.wheels if wheel.index == index]
        atomic_write(own, locks.requirements(f"Wheels of set {name} on {index}", of_it))
    return built


def _build_all(plan: SetPlan, jobs: int | None, settings: Settings, console: Console) -> list[Record]:
    """The records of our wheels; a failure is reported, and the next wheel is tried."""
    records: list[Record] = []
    failed = 0
    for wanted in plan.builds:
        try:
            records.append(_build(wanted, jobs, settings, console))
        except GracefarmError as error:
            console.error(error)
            failed += 1
    if failed:
        raise SeveralError(
            f"{failed} of {len(plan.builds)} wheels of set {plan.set.data.name} could not be built; "
            "each failure is described above",
            remedy="fix these errors, then repeat the command; finished builds are kept",
            repeat=f"builder set build {plan.set.words}",
        )
    return records


def _build(plan: Plan, jobs: int | None, settings: Settings, console: Console) -> Record:
    existing = record.settled(plan, settings)
    if existing is not None:
        console.step("done", f"{plan.title}: already built, build id {plan.build_id[:16]}")
        return existing
    return build.build(plan, BuildOptions(jobs=jobs), settings, console)


def _ground(plan: SetPlan, settings: Settings, console: Console) -> tuple[Path, Path]:
    """The root, and the environment in which our wheels run."""
    of, target = plan.set, plan.set.data.target
    with console.progress("root") as tick:
        base = root.ensure(of.stack, stack.host_arch(), target, settings, tick)
        return base, environment.ensure(of.runtime, target, base, settings, tick)


def _tested(
    plan: SetPlan, records: Sequence[Record], wheels: Sequence[Path], place: Path, settings: Settings, console: Console
) -> SetRecord:
    of, target = plan.set, plan.set.data.target
    base, site = _ground(plan, settings, console)
    place.mkdir(parents=True, exist_ok=True)
    scratch = place / "together"
    scratch.mkdir(exist_ok=True)
    console.step(
        "together", f"importing {', '.join(of.data.together.imports)} in one environment; the log is {scratch / 'log.txt'}"
    )
    tested = together.test(plan, wheels, site, base, scratch, pep517.bound(settings))
    console.step("together", f"imported {', '.join(tested.smoke.modules)} in {tested.wall_s:.0f} s")
    for command in tested.commands:
        console.step("together", f"`{' '.join(command.command)}` succeeded in {command.wall_s:.0f} s")
    remove_tree(scratch / "files")
    document = SetRecord(
        set_id=plan.set_id,
        name=of.data.name,
        stack=of.data.stack,
        target=target.value,
        builds={built.recipe: built.build_id for built in records},
        wheels=tuple(locks.collect(of, wheels, settings)),
        tested=tested,
        finished=record.now(),
    )
    atomic_write(place / "set.json", document.model_dump_json(indent=2) + "\n")
    return document


def render(built: BuiltSet, at: SetAddress, wheels: Sequence[Locked] = ()) -> Path:
    """pylock.toml for the index that will serve the set."""
    place = built.folder / "pylock.toml"
    atomic_write(place, locks.pylock(built.plan.set, wheels or built.record.wheels, at))
    return place


def stage(built: BuiltSet, at: SetAddress, settings: Settings, console: Console) -> tuple[Locked, ...]:
    """Stage the set, and publish it when the index has all of its wheels; return its wheels by their names there.

    Raises:
        PublishError: the index refuses the set.
        IncompleteError: third-party wheels are missing at the index, and must be mirrored on its machine.
    """
    name = built.plan.set.data.name
    address = f"{at.base}/stage/{at.name}/legacy/"
    at = replace(at, login=at.login or publish.credentials(f"{at.base}/legacy/"))
    without = sorted(built.plan.set.runtime.data.environment.left_out)
    state = staging.ask(at, "PUT", json={"expect": staging.matrix(built.record.wheels), "without": without})
    if state["state"] != "published":
        _upload(built, set(state["files"].values()), address, at, settings, console)
        for build_id in built.record.builds.values():
            publishing.send_record(build_id, address, settings, console, at.login)
        state = staging.ask(at, "GET")
        _require_same(built, at, state["files"])
        if state["missing"]:
            raise _incomplete(built, at, state["missing"])
        staging.ask(at, "PUT", "/pylock.toml", content=locks.pylock(built.plan.set, _as_named(built, state["files"]), at))
        state = staging.ask(at, "POST", "/publish")
    _require_same(built, at, state["files"])
    console.step("publish", f"{name}: {len(state['files'])} files are visible at {at.simple}")
    return _as_named(built, state["files"])


def _upload(built: BuiltSet, have: set[str], address: str, at: SetAddress, settings: Settings, console: Console) -> None:
    """Upload our wheels to the staged set, except those with digests that it has."""
    builds = [record.read(settings, build_id) for build_id in built.record.builds.values()]
    records = {build.wheel.sha256: build for build in builds if build is not None and build.wheel is not None}
    for wheel in built.wheels:
        # The source goes first, so that the wheel is never there without it.
        for archive in sorted(wheel.parent.glob("*.tar.gz")):
            if sha256_file(archive) not in have:
                publish.upload(archive, address, at.login)
                console.step("stage", f"{archive.name} to {address}")
        if (sha256 := sha256_file(wheel)) not in have:
            publication = publishing.upload_wheel(records[sha256], wheel, address, settings, at.login)
            console.step("stage", f"{publication.filename or wheel.name} to {address}")


def _as_named(built: BuiltSet, files: Mapping[str, str]) -> tuple[Locked, ...]:
    """The set's wheels with their names at the index, which have a build tag if other bytes have the same name."""
    names = {sha256: name for name, sha256 in files.items()}
    return tuple(
        wheel.model_copy(update={"filename": names.get(wheel.sha256, wheel.filename)}) for wheel in built.record.wheels
    )


def _require_same(built: BuiltSet, at: SetAddress, files: Mapping[str, str]) -> None:
    """Require the tested bytes at the index, since a matrix lists only versions.

    Raises:
        PublishError: the set at the index has a file of the lock with other bytes, or a file that is not in the lock.
    """
    wanted = {(wheel.filename, wheel.sha256) for wheel in built.record.wheels}
    beside = {archive.name for wheel in built.wheels for archive in wheel.parent.glob("*.tar.gz")}
    wrong = sorted(
        name for name, sha256 in files.items() if name not in beside and (build_tag.split(name)[0], sha256) not in wanted
    )
    if wrong:
        raise PublishError(
            f"the set {at.name} at {at.base} has files that were not tested: "
            f"{', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}",
            remedy="stage the set under a different name (--as), because a published set cannot be changed",
            repeat=f"builder set build {built.plan.set.words} --stage {at.base} --as NAME",
        )


class IncompleteError(PublishError):
    """Third-party wheels are missing at the index."""


def _incomplete(built: BuiltSet, at: SetAddress, missing: Sequence[str]) -> IncompleteError:
    commands = [f"GRACEFARM_PYTHON_INDEX={index} index mirror {own} --set {at.name}" for index, own in built.own_locks.items()]
    commands.append(f"index mirror {built.lock} --set {at.name}")
    name = built.plan.set.data.name
    shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
    return IncompleteError(
        f"the set {at.name} is staged at {at.base}, but not published: it lacks {counted(len(missing), 'wheel')} ({shown})",
        remedy=f"run these commands on the machine of the index: {'; '.join(commands)}; then repeat the command to publish "
        "the set",
        repeat=f"builder set build {built.plan.set.words} --stage {at.base}" + (f" --as {at.name}" if at.name != name else ""),
    )

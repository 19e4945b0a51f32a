"""Test the wheels of a set together in one clean environment: requirements, imports, commands."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from builder import smoke
from builder.box import sandbox
from builder.box.sandbox import BindMount, Sandbox
from builder.compiling.pep517 import first_error
from builder.ground import environment
from builder.planning.stack import Arch
from builder.sets.definition import LoadedSet
from builder.sets.plan import SetPlan
from builder.sets.set_record import Command, Tested
from builder.smoke import SmokeResult
from builder.toolchains.sandbox_trial import WORKDIR, variables
from gracefarm.errors import SmokeError
from gracefarm.files import remove_tree

MAX_OUTPUT = 1 << 20
"Number of bytes of a command's output that are kept."


def test(plan: SetPlan, wheels: Sequence[Path], site: Path, root: Path, folder: Path, memory: int) -> Tested:
    """Install `wheels` into a copy of the environment `site` and test it; `folder` is for temporary files on its file system.

    Raises:
        SmokeError: a requirement of a wheel is not met in the set, or an import or a command fails (has its message).
        InstallError: a wheel does not fit the environment.
    """
    require(plan, wheels)
    clean = folder / "env"
    remove_tree(clean)
    environment.fresh(site, clean)
    for wheel in wheels:
        environment.add(clean, wheel, plan.set.stack.data.glibc[plan.set.data.target])
    try:
        return tried(plan.set, clean, root, folder, memory)
    finally:
        remove_tree(clean)


def tried(of: LoadedSet, clean: Path, root: Path, folder: Path, memory: int) -> Tested:
    """Run the imports and commands of the set in an environment with all of its wheels; the output is in `folder`/log.txt.

    Raises:
        SmokeError: see `test`.
    """
    log, name = folder / "log.txt", of.data.name
    log.unlink(missing_ok=True)
    imports = of.data.together.imports
    smoke.prepare(folder / "files", imports, of.smoke_script)
    mounts = (BindMount(source=clean, target="/env"), BindMount(source=folder / "files", target=WORKDIR))
    box = Sandbox(root=root, mounts=mounts, environment=variables(), workdir=WORKDIR, memory=memory)
    answers: list[str] = []
    outcome = sandbox.run(
        box,
        smoke.driver(imports, of.smoke_script),
        log=log,
        on_line=lambda line: answers.append(line) if line.startswith(smoke.MARK) else None,
    )
    if outcome.returncode != 0 or not answers:
        raise SmokeError(
            f"the wheels of set {name} do not work together: {first_error(log)}",
            remedy=f"see the complete output in {log}",
            repeat=f"builder set build {of.words}",
        )
    result = SmokeResult.model_validate_json(answers[-1].removeprefix(smoke.MARK).strip())
    commands = tuple(_run(box, command, log, of) for command in of.data.together.commands)
    return Tested(smoke=result, wall_s=round(outcome.wall_s, 1), commands=commands)


def _run(box: Sandbox, command: tuple[str, ...], log: Path, of: LoadedSet) -> Command:
    start = log.stat().st_size
    # Scripts are started with the environment's Python, so that the kernel does not have to run programs of the target.
    outcome = sandbox.run(box, ("/env/bin/python3", f"/env/bin/{command[0]}", *command[1:]), log=log)
    if outcome.returncode != 0:
        raise SmokeError(
            f"`{' '.join(command)}` failed with exit code {outcome.returncode} in the environment of set {of.data.name}: "
            + first_error(log, start),
            remedy=f"see the complete output in {log}",
            repeat=f"builder set build {of.words}",
        )
    with log.open("rb") as stream:
        stream.seek(start)
        output = stream.read(MAX_OUTPUT).decode(errors="replace")
    return Command(command=command, wall_s=round(outcome.wall_s, 1), output=output)


def require(plan: SetPlan, wheels: Iterable[Path]) -> None:
    """Check that the set meets the requirements of our wheels, since an installation by hash does not resolve requirements.

    Raises:
        SmokeError: requirements are not met; names all of them.
    """
    parsed = {wheel: parse_wheel_filename(wheel.name) for wheel in wheels}
    own = {str(name): str(version) for name, version, _, _ in parsed.values()}
    required = {str(name): _metadata_of_wheel(wheel) for wheel, (name, _, _, _) in parsed.items()}
    _require_met(plan, own, required, remedy="add these requirements to `requirements` in set.toml")


def require_others(plan: SetPlan, site: Path) -> None:
    """Check the requirements of the other wheels, such as triton for torch, with our versions, before these are built.

    `site`: the environment in which our wheels run.

    Raises:
        SmokeError: see `require`.
    """
    own = {str(canonicalize_name(build.recipe.data.name)): build.recipe.data.version for build in plan.builds}
    places = site.glob("lib/python*/site-packages/*.dist-info/METADATA")
    required = {place.parent.name.partition("-")[0]: place.read_bytes() for place in sorted(places)}
    _require_met(plan, own, required, remedy="choose compatible versions in set.toml, or a different recipe")


def _require_met(plan: SetPlan, own: Mapping[str, str], required: Mapping[str, bytes], *, remedy: str) -> None:
    """`own`: the versions of our wheels by canonical name; `required`: METADATA of the wheels to check.

    Raises:
        SmokeError: a requirement is not met.
    """
    has = {wheel.name: wheel.version for wheel in plan.wheels} | dict(own)
    left_out = {canonicalize_name(name) for name in plan.set.runtime.data.environment.left_out}
    complaints = [
        f"{name} requires {wanted}"
        + (f", but the set has {has[key]}" if (key := canonicalize_name(wanted.name)) in has else "")
        for name, metadata in required.items()
        for wanted in requirements(metadata, plan.set.stack.python, plan.set.data.target)
        if canonicalize_name(wanted.name) not in left_out and not _met(wanted, has)
    ]
    if complaints:
        raise SmokeError(
            f"the set {plan.set.data.name} does not meet requirements of its wheels: {'; '.join(complaints)}",
            remedy=remedy,
            repeat=plan.set.runtime.lock_command,
        )


def _metadata_of_wheel(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))


def _met(wanted: Requirement, has: Mapping[str, str]) -> bool:
    version = has.get(canonicalize_name(wanted.name))
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def requirements(metadata: bytes, python: str, target: Arch) -> list[Requirement]:
    """The requirements of a wheel with that METADATA for that target, without extras."""
    required = Metadata.from_email(metadata, validate=False).requires_dist or []
    # Other markers are the same as on the host: CPython on Linux.
    there = {"platform_machine": target.value, "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    return [requirement for requirement in required if requirement.marker is None or requirement.marker.evaluate(there)]

"""Build one cell on a worker: `python -m builder.farm.worker`, started by the cell's Ray task.

Standard input: a line of JSON (`Job`), then the archive of the project. Standard output: the console's JSON lines; the last
has `"event": "answer"` and an `CellAnswer`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from builder.farm import code
from builder.farm.job import CellAnswer, Job
from builder.flow import build, room
from builder.flow.attempt import BuildOptions
from builder.ground.interpreters import catalogue
from builder.planning import recipe, stack
from builder.planning.plan import Caches, Plan
from builder.planning.settings import Settings
from builder.proof import record
from builder.toolchains.choice import ToolchainChoice
from gracefarm.console import Console
from gracefarm.errors import ConfigError, ExitCode, GracefarmError, HostError
from gracefarm.files import full_disk
from gracefarm.settings import read
from gracefarm.tables import parse_size


def main() -> None:
    """Build the cell from standard input."""
    os.umask(0o022)
    os.environ["LC_ALL"] = "C"
    job = Job.model_validate_json(sys.stdin.buffer.readline())
    archive = sys.stdin.buffer.read()
    console = Console(as_json=True)
    try:
        answer = answer_to(job, archive, console)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    console.event("answer", "", **answer.model_dump(mode="json"))


def answer_to(job: Job, archive: bytes, console: Console) -> CellAnswer:
    """Build the cell of a job; return the files, or the failure."""
    if code.digest() != job.code:
        failure = HostError(
            f"this worker has gracefarm {code.title()}, but the client has gracefarm {job.gracefarm}",
            remedy="install the same version of gracefarm on the worker and the client",
        )
        return CellAnswer(failure=record.failure(failure), unfit=True)
    settings = read(Settings)
    folder = record.folder(settings, job.build_id)
    try:
        with full_disk(settings.home):
            here = _share(settings, job, code.unpack(archive, settings.home))
            plan = _plan(job, here)
            jobs = min(job.cpus, here.jobs or job.cpus)
            caches = Caches(compiler=job.compiler_cache, device=job.device_store)
            options = BuildOptions(jobs=jobs, keep=job.keep, caches=caches, shared_cache=job.shared_cache)
            room.require([plan], here, keep=job.keep)
            build.build(plan, options, here, console)
    except GracefarmError as error:
        return CellAnswer(failure=record.failure(error), repeat=error.repeat, files=_files(folder, failed=True))
    return CellAnswer(files=_files(folder, failed=False))


def _share(settings: Settings, job: Job, project: Path) -> Settings:
    """The machine's settings, with the cell's project and its share of the memory."""
    memory = min(job.memory, parse_size(settings.memory)) if settings.memory else job.memory
    return Settings.model_validate(settings.model_dump() | {"project": project, "memory": f"{memory >> 20}MiB"})


def _plan(job: Job, settings: Settings) -> Plan:
    """The plan of the cell on this machine.

    Raises:
        ConfigError: it is not the one that was asked for.
    """
    base = stack.load(settings.project / "stacks", job.stack)
    choice = ToolchainChoice(interpreter=job.interpreter, sm=job.sm, ptx=job.ptx, variant=job.variant, twin=job.twin)
    on = catalogue.into(base, settings.project / "interpreters", job.interpreter)
    plan = choice.plan(recipe.load(settings.project / "recipes", job.recipe), on, job.target)
    if plan.build_id != job.build_id:
        raise ConfigError(
            f"{job.title} has the build id {plan.build_id[:16]} on this worker, but {job.build_id[:16]} on the client",
            remedy="install the same versions of gracefarm's packages on the worker and the client: pip install "
            "--upgrade 'gracefarm[farm]'",
        )
    return plan


def _files(folder: Path, *, failed: bool) -> dict[str, str]:
    """The result for the requesting machine: record, log, and the wheel with the files next to it."""
    places = [folder / "record.json", folder / "log.txt"]
    places += [] if failed else sorted((folder / "dist").iterdir())
    return {str(place.relative_to(folder)): str(place) for place in places if place.is_file()}


if __name__ == "__main__":
    main()

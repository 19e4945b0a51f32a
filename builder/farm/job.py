"""The request to a worker for one cell, and its answer."""

from __future__ import annotations

from pydantic import Field

from builder.farm.cluster import Share
from builder.flow.attempt import BuildOptions
from builder.planning.plan import Plan
from builder.planning.stack import Arch
from builder.proof.record import Failure
from builder.proof.shared_cache import Mode
from gracefarm.errors import ExitCode, GracefarmError
from gracefarm.tables import Table


class Job(Table):
    """One cell, as JSON on the standard input of `builder.farm.worker`."""

    code: str
    "Digest of the gracefarm that planned it"
    gracefarm: str
    "The same for people"
    build_id: str
    title: str
    "Name of the cell in the output"
    recipe: str
    stack: str
    interpreter: str | None
    target: Arch
    host: Arch
    sm: tuple[str, ...] | None
    ptx: str | None
    variant: bool = False
    twin: bool = False
    cpus: int
    memory: int
    "Bytes"
    keep: bool = False
    compiler_cache: bool = True
    device_store: bool = True
    shared_cache: Mode = "read"


class CellAnswer(Table):
    """The last line of a worker's program."""

    failure: Failure | None = None
    repeat: str = ""
    unfit: bool = False
    "Another gracefarm: the machine builds no cell of this one"
    files: dict[str, str] = Field(default_factory=dict)
    "Name in the build's folder to path on the machine"


def title(plan: Plan) -> str:
    """Name of a cell in one word."""
    interpreter, sm = plan.stack.interpreter, plan.stack.asked_sm
    parts = [plan.recipe.key, plan.stack.folder.name, interpreter.name if interpreter is not None else "", plan.target.value]
    return ":".join([part for part in parts if part] + (["+".join(sm)] if sm else []))


def of_plan(plan: Plan, options: BuildOptions, share: Share, *, code: str, gracefarm: str) -> Job:
    """The job of a plan."""
    interpreter = plan.stack.interpreter
    return Job(
        code=code,
        gracefarm=gracefarm,
        build_id=plan.build_id,
        title=title(plan),
        recipe=plan.recipe.key,
        stack=plan.stack.folder.name,
        interpreter=interpreter.name if interpreter is not None else None,
        target=plan.target,
        host=plan.host,
        sm=plan.stack.asked_sm,
        ptx=plan.stack.asked_ptx,
        variant=plan.stack.asked_variant,
        twin=plan.stack.asked_twin,
        cpus=share.cpus,
        memory=share.memory,
        keep=options.keep,
        compiler_cache=options.caches.compiler,
        device_store=options.caches.device,
        shared_cache=options.shared_cache,
    )


def error(failure: Failure, repeat: str) -> GracefarmError:
    """The error that ended a build on another machine."""
    raised = GracefarmError(failure.cause, remedy=failure.remedy, repeat=repeat)
    raised.exit_code = ExitCode(failure.exit_code)
    return raised

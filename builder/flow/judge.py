"""Gates and smoke tests for a finished wheel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builder import audit, smoke
from builder.audit import device_digest
from builder.audit.contents import plainly_named
from builder.audit.policy import Policy
from builder.box import gpu
from builder.compiling import pep517
from builder.flow.attempt import Attempt
from builder.planning import gaps
from builder.planning.ground import Ground
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.proof import record
from builder.smoke import GpuResult, Trial


def pass_gates(attempt: Attempt, wheel: Path, expected: Policy) -> None:
    """Add the verdicts of all gates to record and console.

    Raises:
        AuditError: a gate refuses the wheel.
    """
    attempt.verdicts = audit.audit(wheel, expected)
    for verdict in attempt.verdicts:
        attempt.console.step("audit", f"{verdict.status:14} {verdict.gate}: {verdict.summary}")
    audit.require(attempt.verdicts)
    if expected.cuobjdump is not None and expected.sm is not None:
        attempt.device_digests = device_digest.of_wheel(wheel, expected.cuobjdump)


def pass_smoke(attempt: Attempt, wheel: Path, ground: Ground) -> None:
    """Run the imports, smoke.py and, with a GPU, smoke_gpu.py.

    Raises:
        SmokeError: the wheel cannot be imported, or a script fails.
    """
    plan, console = attempt.plan, attempt.console
    if plan.stack.data.objects_only:
        console.step("smoke", f"not run: stack {plan.stack.data.name} has only headers, so the wheel cannot be loaded")
        return
    with plainly_named(wheel) as (plain, _):  # installers accept a label only from an index that describes it
        _try(attempt, plain, ground)


def _try(attempt: Attempt, wheel: Path, ground: Ground) -> None:
    plan, console = attempt.plan, attempt.console
    trial = Trial(
        wheel=wheel,
        imports=plan.recipe.data.imports,
        script=plan.recipe.smoke_script,
        environment=plan.toolchain.trial_environment(ground, emulated=plan.host is not plan.target),
        folder=attempt.folder / "smoke",
        memory=pep517.bound(attempt.settings),
        log=attempt.log,
        repeat=plan.repeat,
    )
    attempt.smoke, outcome, command = smoke.run(trial)
    attempt.stages.append(record.stage("smoke", outcome, command))
    modules = ", ".join(attempt.smoke.modules)
    console.step("smoke", f"imported {modules} in a clean environment in {outcome.wall_s:.0f} s")
    if plan.recipe.smoke_gpu_script is not None:
        with attempt.timed("smoke-gpu"):
            attempt.gpu = run_gpu(plan, replace(trial, script=plan.recipe.smoke_gpu_script), attempt.settings)
        console.step("smoke-gpu", smoke.sentence(attempt.gpu))


def run_gpu(plan: Plan, trial: Trial, settings: Settings) -> GpuResult:
    """`smoke.run_gpu` in an environment with the stack's torch, even if the recipe builds without it.

    Raises:
        SmokeError: the script failed.
        GracefarmError: the environment cannot be fetched or assembled.
    """
    if not plan.stack.uses_torch and gpu.devices() and not trial.environment.emulated:
        toolchain, whole = plan.toolchain.with_torch(), replace(plan.stack, uses_torch=True)
        missing = gaps.of_stack(whole) if toolchain.locked(whole) is not None else []
        if missing:
            return GpuResult(status="not run", reason=f"the test requires {missing[0].what}, but its digest is unknown")
        ground = toolchain.lay(whole, plan.host, plan.target, settings, cuda=False)
        trial = replace(trial, environment=toolchain.trial_environment(ground, emulated=False))
    return smoke.run_gpu(trial, plan.stack.sm, plan.ptx)

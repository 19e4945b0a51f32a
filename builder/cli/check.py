"""`builder audit` and `builder smoke`: the gates and the smoke test, for any wheel."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import click

from builder import audit, smoke
from builder.audit import Policy, policy
from builder.audit.contents import plainly_named
from builder.cli.options import FILE, device_coded, stack_of, start, tried
from builder.compiling import pep517
from builder.planning import device_code, recipe, stack
from builder.planning.settings import Settings
from builder.toolchains.choice import ToolchainChoice
from builder.toolchains.sandbox import SandboxToolchain
from gracefarm.cli import json_option
from gracefarm.console import Console
from gracefarm.errors import UsageError
from gracefarm.files import remove_tree
from gracefarm.tables import parse_size


@click.command("audit")
@click.argument("wheel", type=FILE)
@click.option(
    "--stack",
    "stack_name",
    required=True,
    metavar="NAME",
    help="Check the wheel against the torch, CUDA and C library of this stack.",
)
@click.option(
    "--recipe",
    "recipe_name",
    metavar="NAME",
    help="Also check the name, version, files and GPU architectures of the wheel against this recipe (a folder in recipes/).",
)
@functools.partial(device_coded, audits=True)
@json_option
def audit_command(
    wheel: Path,
    stack_name: str,
    recipe_name: str | None,
    sm: tuple[str, ...] | None,
    ptx: str | None,
) -> None:
    """Check the files in a wheel against a stack, without running the wheel.

    WHEEL is the path of a .whl file. The wheel can be from any build program. A stack (a folder in stacks/) pins torch, CUDA,
    Python and compilers. Each check is called a gate. Each line of the output shows one gate and its result: passed, failed
    or not applicable. The exit code is 30 if a gate failed.

    \b
    # Check a wheel against the stack cu130.
    builder audit dist/causal_conv1d-1.7.0-*.whl --stack cu130
    # Also check whether the wheel matches the recipe triton.
    builder audit dist/triton-3.2.0-*.whl --stack cu124 --recipe triton
    """
    settings, console = start()
    asked = recipe.load(settings.project / "recipes", recipe_name).data if recipe_name else None
    expected = _foreign_policy(wheel, stack_name, sm, settings, console)
    expected = policy.asked_by(asked, expected) if asked else expected
    verdicts = audit.audit(wheel, expected if ptx is None else replace(expected, ptx=device_code.first(ptx)))
    lines = []
    for verdict in verdicts:
        lines.append(f"{verdict.status:14} {verdict.gate}: {verdict.summary}")
        lines += [f"                 {detail}" for detail in verdict.details[:20]]
    console.result([verdict.model_dump(mode="json") for verdict in verdicts], "\n".join(lines))
    audit.require(verdicts)


def _foreign_policy(wheel: Path, stack_name: str, sm: tuple[str, ...] | None, settings: Settings, console: Console) -> Policy:
    loaded, target = replace(stack.load(settings.project / "stacks", stack_name), asked_sm=sm), audit.target_of(wheel)
    toolchain = loaded.data.toolchain
    compiles = bool(toolchain.requirements) or toolchain.debian is not None
    # Its cuobjdump reads device code, so it is not required for wheels without device code.
    cuda = compiles and audit.holds_device_code(wheel)
    ground = SandboxToolchain().lay(loaded, stack.host_arch(), target, settings, cuda=cuda)
    console.step("audit", f"{wheel.name} against stack {stack_name} for {target.value}")
    expected = policy.of_stack(loaded, target, ground)
    # Libraries of the wheel are checked regardless of the stack.
    return replace(expected, sm=expected.sm if compiles else None, max_size=parse_size("4GiB"), objects_only=False)


@click.command("smoke")
@click.argument("wheel", type=FILE)
@click.option(
    "--stack",
    "stack_name",
    required=True,
    metavar="NAME",
    help="Install the wheel beside the packages that this stack (a folder in stacks/) pins.",
)
@click.option("--import", "imports", multiple=True, metavar="MODULE", help="Module to import. The option can be repeated.")
@click.option("--script", type=FILE, help="Python script to run after the imports.")
@click.option(
    "--recipe",
    "recipe_name",
    metavar="NAME",
    help="Import the modules of this recipe (a folder in recipes/), and run its smoke.py. With --gpu, run its smoke_gpu.py.",
)
@click.option(
    "--gpu",
    is_flag=True,
    help="Run the script on a GPU. The script is the file of --script, or smoke_gpu.py of the recipe.",
)
@tried
@json_option
def smoke_command(
    wheel: Path,
    stack_name: str,
    imports: tuple[str, ...],
    script: Path | None,
    recipe_name: str | None,
    gpu: bool,
    on: ToolchainChoice,
) -> None:
    """Install a wheel in a new environment, and import it.

    WHEEL is the path of a .whl file. The option --import or --recipe names the modules to import. The command prints the
    path of each imported module. With --gpu, a script also tests the wheel on a GPU.

    \b
    # Install a wheel beside the packages of the stack cu130. Import thing.
    builder smoke thing.whl --stack cu130 --import thing
    # Import the modules of the recipe thing, and run its smoke_gpu.py on a GPU.
    builder smoke thing.whl --stack cu130 --recipe thing --gpu
    """
    settings, console = start()
    if recipe_name is not None:
        loaded = recipe.load(settings.project / "recipes", recipe_name)
        imports = imports or loaded.data.imports
        script = script or (loaded.smoke_gpu_script if gpu else loaded.smoke_script)
    if not imports:
        raise UsageError(
            "no module to import was given", remedy="add --import MODULE, or --recipe NAME to import the modules of the recipe"
        )
    if gpu and script is None:
        raise UsageError(
            "--gpu requires a test script", remedy="add --script FILE, or --recipe NAME with a recipe that has a smoke_gpu.py"
        )
    scratch = settings.home / "smoke" / str(os.getpid())
    scratch.mkdir(parents=True)
    try:
        with plainly_named(wheel.absolute()) as (plain, _):
            trial, sm, _ = trial_of(plain, imports, script, stack_name, on, scratch, settings)
            if gpu:
                answer = smoke.run_gpu(trial, sm)
                console.result(answer.model_dump(), smoke.sentence(answer))
                return
            result, outcome, _ = smoke.run(trial)
    finally:
        remove_tree(scratch)
    lines = [f"{module:30} {place}" for module, place in result.modules.items()]
    lines += [result.script.strip()] if result.script else []
    console.result(result.model_dump() | {"wall_s": outcome.wall_s}, "\n".join(lines))


def trial_of(
    wheel: Path,
    imports: tuple[str, ...],
    script: Path | None,
    stack_name: str,
    on: ToolchainChoice,
    scratch: Path,
    settings: Settings,
    *,
    cuda: bool = False,
) -> tuple[smoke.Trial, tuple[str, ...], Path | None]:
    """The trial of a wheel, the architectures that the wheel must have and, with `cuda`, the stack's cuobjdump."""
    loaded, target = stack_of(stack_name, on.interpreter, settings), audit.target_of(wheel)
    host = stack.host_arch()
    toolchain = on.type.find(loaded, on.wanted, cuda=cuda)
    ground = toolchain.lay(toolchain.facts(loaded), host, target, settings, cuda=cuda)
    trial = smoke.Trial(
        wheel=wheel.absolute(),
        imports=imports,
        script=script,
        environment=toolchain.trial_environment(ground, emulated=host is not target),
        folder=scratch,
        memory=pep517.bound(settings),
        log=settings.home / "smoke" / "log.txt",
        repeat=shlex.join(("builder", *sys.argv[1:])),
    )
    return trial, loaded.data.sm, ground.cuobjdump

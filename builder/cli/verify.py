"""`builder verify`: check a wheel against its record, or by building it again."""

from __future__ import annotations

import itertools
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import click

from builder.cli.options import FILE, jobs_option, last_wheel, stack_of, start
from builder.ground.interpreters import catalogue
from builder.planning import recipe, stack
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from builder.proof import signing, verify
from builder.proof.verify import Inside, WheelCheck
from builder.toolchains import kinds
from builder.toolchains.choice import ToolchainChoice
from gracefarm.cli import json_option
from gracefarm.console import Console
from gracefarm.errors import ConfigError, UsageError, VerifyError


@click.command("verify")
@click.argument("what", metavar="NAME|FILE.whl")
@click.option(
    "--key",
    "key_file",
    metavar="PUB",
    type=FILE,
    help="File with the public key of the machine that built the wheel. Default: the key of this machine.",
)
@click.option(
    "--provenance",
    "envelope",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the signed statement. It can also be the file record.json of the build, which contains the statement. "
    "Default: FILE.whl.intoto.jsonl beside the wheel.",
)
@click.option(
    "--rebuild",
    "again",
    is_flag=True,
    help="Do not run the four checks. Build the wheel again in a different folder, and compare both wheels.",
)
@jobs_option
@json_option
def verify_command(what: str, key_file: Path | None, envelope: Path | None, again: bool, jobs: int | None) -> None:
    """Check that a wheel is unchanged, or build it again and compare both wheels.

    The argument is the path of a wheel that the builder built, or a recipe (a folder in recipes/). If the argument is a
    recipe, the command checks the wheel of the recipe's last build on this machine. Each line of the output shows one check:

    \b
    record      the file RECORD in the wheel has the correct digest of each file
    build-id    the wheel lists the inputs of its build (such as sources, options
                and compilers), and the wheel's build id is the hash of this list
    sbom        the wheel's list of components (SBOM) matches the inputs
    provenance  the signed statement about the wheel's origin is for this wheel,
                and the signature is from the machine that built the wheel

    With --rebuild, the result is `identical`, `device code only` (only the GPU code differs), or `differs`. If the result is
    `differs`, the command also lists the files that differ. The exit code is 32 if a check fails or is not possible, or if
    the result is `differs`.

    \b
    # Check the last wheel of the recipe causal_conv1d.
    builder verify causal_conv1d
    # Check a wheel with the public key of the machine that built it.
    builder verify dist/causal_conv1d-1.7.0+cu130.torch2.11.whl --key builder.pub
    # Build the wheel again, and compare both wheels.
    builder verify causal_conv1d --rebuild
    """
    settings, console = start()
    wheel = _wheel(what, settings)
    if again:
        _rebuild(wheel, jobs, settings, console)
        return
    key = signing.public(key_file) if key_file else own.public_key() if (own := signing.private()) else None
    checks = verify.verify(wheel, envelope, key)
    width = max(6, *(len(_status(check)) for check in checks))
    lines = [f"{_status(check):{width}} {check.name:10} {check.summary}" for check in checks]
    console.result([check.model_dump() for check in checks], "\n".join(lines))
    verify.require(wheel, checks, repeat=shlex.join(("builder", *sys.argv[1:])))


def _status(check: WheelCheck) -> str:
    return "ok" if check.ok else "not checked" if check.unchecked else "WRONG"


def _wheel(what: str, settings: Settings) -> Path:
    """The file, or the wheel of a recipe's last build."""
    if what.endswith(".whl"):
        if not Path(what).is_file():
            raise UsageError(f"{what}: no such file", remedy="give the path of a wheel, or the name of a recipe")
        return Path(what)
    return last_wheel(what, settings)[1]


def _rebuild(wheel: Path, jobs: int | None, settings: Settings, console: Console) -> None:
    from builder.flow import rebuild

    plan_again = _plan_of(verify.read(wheel), wheel, settings)
    console.step("verify", f"{wheel.name}: building it again")
    with rebuild.again(plan_again, settings, console, jobs) as second:
        comparison = rebuild.compare(wheel, second)
    console.result(comparison.model_dump(mode="json"), comparison.sentence)
    if comparison.verdict == "differs":
        raise VerifyError(
            f"a second build of {wheel.name} differs: {comparison.sentence.partition(': ')[2]}",
            remedy="change the build so that it does not use the time, the path of its folder or random numbers; "
            "docs/explanation/provenance.md explains the result",
            repeat=f"builder verify {wheel} --rebuild",
        )


def _plan_of(inside: Inside, wheel: Path, settings: Settings) -> Plan:
    """The plan of a wheel. The project must still contain its recipe and stack unchanged.

    Raises:
        UsageError: it was built outside of the sandbox, where every build has the folder /build. In other toolchains the
            objects contain the path of the folder, so a wheel from another folder always differs.
        ConfigError: no recipe and stack of the project have this build id.
    """
    kind = kinds.of_inputs(inside.inputs)
    if kind.unsealed is not None:
        raise UsageError(
            f"{wheel.name} was built {kind.unsealed}",
            remedy="omit --rebuild; only wheels that were built with --toolchain sandbox can be built again and compared",
        )
    loaded = recipe.load(settings.project / "recipes", inside.inputs["recipe"]["name"])
    target, python = Arch(inside.inputs["target"]), inside.inputs["stack"]["python"]
    sm, ptx = tuple(inside.inputs["stack"]["sm"]), inside.inputs["stack"].get("ptx")
    variant, twin = bool(inside.inputs.get("variant")), bool(inside.inputs.get("twin"))
    on = ToolchainChoice(kind=kind.kind, sm=sm or None, ptx=ptx or "none", variant=variant, twin=twin)
    known = [None, *catalogue.names(settings.project / "interpreters")]
    for name, interpreter in itertools.product(stack.names(settings.project / "stacks"), known):
        base = stack_of(name, interpreter, settings)
        # The stack cannot build for a Python without a lock.
        if target in base.data.glibc and base.python == python and base.requirements_lock.is_file():
            with suppress(ConfigError):  # the stack's CUDA does not support these architectures
                candidate = on.plan(loaded, base, target)
                if candidate.build_id == inside.build_id:
                    return candidate
    raise ConfigError(
        f"{wheel.name} has the build id {inside.build_id[:16]}, which this project does not produce on this machine",
        remedy="check out the commit of the project that the wheel was built from, on a machine with the same "
        "architecture; if this machine built the wheel, `builder why` names the changed input",
        repeat=f"builder why {loaded.key}",
    )

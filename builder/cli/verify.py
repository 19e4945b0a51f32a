"""`builder verify`: is a wheel what it says, and does it build the same again?"""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path

import click

from builder import toolchains
from builder.cli.options import FILE, jobs_option, json_option, last_wheel, stack_of, start
from builder.ground import interpreters
from builder.planning import recipe, stack
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from builder.proof import signing, verify
from builder.proof.verify import Inside
from builder.toolchains.choice import ToolchainChoice
from gracefarm.console import Console
from gracefarm.errors import ConfigError, UsageError, VerifyError


@click.command("verify")
@click.argument("what", metavar="NAME|FILE.whl")
@click.option("--key", "key_file", metavar="PUB", type=FILE,
              help="Public key that must have signed it; default: this farm's own.")  # fmt: skip
@click.option("--provenance", "envelope", type=click.Path(dir_okay=False, path_type=Path),
              help="Its DSSE envelope, or its record with that in it; default: FILE.whl.intoto.jsonl beside it.")  # fmt: skip
@click.option("--rebuild", "again", is_flag=True, help="Build it once more in another folder and compare instead.")
@jobs_option
@json_option
def verify_command(
    what: str, key_file: Path | None, envelope: Path | None, again: bool, jobs: int | None, as_json: bool
) -> None:
    """Hold a wheel, or the last build of NAME, against its RECORD, its build id, its SBOM and its signed provenance.

    With --rebuild: build it again and say `identical`, `device code only`, or which file and section differ.
    Exit code 32 when it is not what it says.

    \b
    builder verify causal_conv1d
    builder verify dist/causal_conv1d-1.7.0-cp311-cp311-manylinux_2_34_aarch64.whl --key farm.pub
    builder verify causal_conv1d --rebuild
    """
    settings, console = start(as_json=as_json)
    wheel = _wheel(what, settings)
    if again:
        _rebuild(wheel, jobs, settings, console)
        return
    key = signing.public(key_file) if key_file else own.public_key() if (own := signing.private()) else None
    checks = verify.verify(wheel, envelope, key)
    lines = [f"{'ok' if check.ok else 'WRONG':6} {check.name:10} {check.summary}" for check in checks]
    console.result([check.model_dump() for check in checks], "\n".join(lines))
    verify.require(wheel, checks)


def _wheel(what: str, settings: Settings) -> Path:
    """A file, or the wheel of a recipe's last build."""
    if what.endswith(".whl"):
        if not Path(what).is_file():
            raise UsageError(f"{what}: no such file")
        return Path(what)
    return last_wheel(what, settings)[1]


def _rebuild(wheel: Path, jobs: int | None, settings: Settings, console: Console) -> None:
    from builder.flow import rebuild

    plan_again = _plan_of(verify.read(wheel), wheel, settings)
    console.step("verify", f"{wheel.name}: building it once more")
    with rebuild.again(plan_again, settings, console, jobs) as second:
        comparison = rebuild.compare(wheel, second)
    console.result(comparison.model_dump(mode="json"), comparison.sentence)
    if comparison.verdict == "differs":
        raise VerifyError(
            f"{wheel.name} builds differently again: {comparison.sentence.partition(': ')[2]}",
            remedy="find what the build takes from the clock, its folder or chance (docs/provenance.md)",
            repeat=f"builder verify {wheel} --rebuild",
        )


def _plan_of(inside: Inside, wheel: Path, settings: Settings) -> Plan:
    """The plan of a wheel, which this project must still have as it was.

    Raises:
        UsageError: it was built outside of the sandbox, where every build has the folder /build: elsewhere the path of the
            folder stands in the objects, and another folder's wheel would differ without anything to find out.
        ConfigError: the project makes no such build.
    """
    kind = toolchains.of_inputs(inside.inputs)
    if kind.unsealed is not None:
        raise UsageError(
            f"{wheel.name} was built {kind.unsealed}, so that a build in another folder shows nothing",
            remedy="build it in the sandbox, whose wheels `--rebuild` compares; the other checks hold for this one too",
        )
    loaded = recipe.load(settings.project / "recipes", inside.inputs["recipe"]["name"])
    target, python = Arch(inside.inputs["target"]), inside.inputs["stack"]["python"]
    sm, ptx = tuple(inside.inputs["stack"]["sm"]), inside.inputs["stack"].get("ptx")
    on = ToolchainChoice(kind=kind.kind, sm=sm or None, ptx=ptx or "none")
    known = [None, *interpreters.names(settings.project / "interpreters")]
    for name, interpreter in itertools.product(stack.names(settings.project / "stacks"), known):
        base = stack_of(name, interpreter, settings)
        # A Python for which the stack has no lock makes no wheel.
        if target in base.data.glibc and base.python == python and base.requirements_lock.is_file():
            with suppress(ConfigError):  # a stack whose CUDA does not know these architectures
                candidate = on.plan(loaded, base, target)
                if candidate.build_id == inside.build_id:
                    return candidate
    raise ConfigError(
        f"{wheel.name} is of build {inside.build_id[:16]}, which this project's recipe and stacks do not make here",
        remedy="go to the commit and the kind of machine that it was built with; `builder why` names the input that changed",
        repeat=f"builder why {loaded.key}",
    )

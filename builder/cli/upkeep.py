"""`builder doctor`, `clean`, `shell` and `schema`: the machine, the builder's folders, and schemas for editors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click
from pydantic import BaseModel

from builder.cli.options import last_build, plan_of, start
from builder.planning.settings import Settings
from builder.proof import record
from builder.toolchains import kinds
from builder.toolchains.choice import ToolchainChoice
from gracefarm.cli import json_option, show_schemas
from gracefarm.console import Console
from gracefarm.errors import ConfigError, ExitCode, UsageError
from gracefarm.files import lock
from gracefarm.tables import parse_size


@click.command("doctor")
@click.option(
    "--fix",
    is_flag=True,
    help="Fix the problems that the command can fix, such as missing system packages. Requires root or sudo.",
)
@json_option
def doctor_command(fix: bool) -> None:
    """Check whether this machine can build wheels.

    Each line of the output shows one check: the result (ok or NO), the name of the check, and what the command found. After
    a NO, the next line says how to fix the problem. The exit code is 4 if a check failed.

    \b
    # Check this machine.
    builder doctor
    # Fix the problems, then check again.
    builder doctor --fix
    """
    from builder.upkeep import doctor

    settings, console = start()
    checks = doctor.checks(settings)
    if fix:
        doctor.fix(checks, settings)
        checks = doctor.checks(settings)
    rows = [{"name": check.name, "ok": check.ok, "found": check.found, "remedy": check.remedy} for check in checks]
    lines = []
    for check in checks:
        lines.append(f"{'ok ' if check.ok else 'NO '} {check.name:22} {check.found}")
        lines += [] if check.ok else [f"      {check.remedy}"]
    console.result(rows, "\n".join(lines))
    if not all(check.ok for check in checks):
        sys.exit(ExitCode.HOST)


@click.command("clean")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also remove all builds (with wheels, records and logs), all downloaded files, environments and caches.",
)
@click.option(
    "--keep",
    metavar="SIZE",
    help="Remove temporary files, downloaded files, environments and caches until the folder GRACEFARM_HOME has at most "
    "this size, such as 20GiB. The least recently used files are removed first. Wheels, records and logs stay.",
)
@json_option
def clean_command(everything: bool, keep: str | None) -> None:
    """Remove temporary files of builds on this machine.

    These are the working folders of builds, such as /build in `builder shell`. Wheels, records and logs stay, unless
    --all is given. Caches stay, unless --all or --keep is given. If a build is running, the command waits until the build
    ends. With --keep, the command does not wait, and does not remove files that a running build uses. Later builds download
    or create the removed files again.

    \b
    # Remove the temporary files.
    builder clean
    # Remove the least recently used files, until at most 20 GiB are in use.
    builder clean --keep 20GiB
    """
    from builder.upkeep import clean

    settings, console = start()
    if keep is not None:
        if everything:
            raise UsageError("--keep and --all cannot be used together", remedy="omit --keep or --all")
        _keep(keep, settings, console)
        return
    before = shutil.disk_usage(settings.home).free if settings.home.is_dir() else 0
    clear = clean.everything if everything else clean.working_folders
    clear(settings, lambda: console.step("wait", "waiting for a running build"))
    freed = (shutil.disk_usage(settings.home).free - before) if settings.home.is_dir() else 0
    console.result({"freed": max(freed, 0)}, f"freed {max(freed, 0) / 1e6:.0f} MB")


def _keep(text: str, settings: Settings, console: Console) -> None:
    """Shrink the home, and print what was removed.

    Raises:
        UsageError: the text is not a size.
    """
    from builder.upkeep import keep

    try:
        size = parse_size(text)
    except ValueError as error:
        raise UsageError(f"--keep: {error}", remedy="give a number and KiB, MiB, GiB or TiB") from error
    removed, left = keep.at_most(size, settings, lambda: console.step("wait", "waiting for a running command"))
    rows = [{"path": str(entry.path), "size": entry.size} for entry in removed]
    lines = [f"removed {entry.path}, {entry.size / 1e6:.0f} MB" for entry in removed]
    freed = sum(entry.size for entry in removed)
    lines.append(f"freed {freed / 1e6:.0f} MB; {settings.home} now contains {left / 1e6:.0f} MB")
    if left > size:
        console.warn(
            f"{settings.home} is still larger than {text}: it contains only wheels, records, logs and files of a running build"
        )
    console.result({"removed": rows, "freed": freed, "size": left}, "\n".join(lines))


@click.command("shell")
@click.argument("name")
@json_option
def shell_command(name: str) -> None:
    """Open a shell in the sandbox of the last build of a recipe, even if this build failed.

    NAME is a recipe (a folder in recipes/). A recipe describes how to build one package. The files of the build are in
    /build. Leave the shell with exit. The last build must have used --toolchain sandbox, which is the default of `builder
    build`.

    \b
    # Open a shell in the sandbox of the last build of causal_conv1d.
    builder shell causal_conv1d
    """
    from builder.box import sandbox
    from builder.flow.root_stage import reopen

    settings, console = start()
    last = last_build(name, settings)
    folder = record.folder(settings, last.build_id) / "work"
    kind = kinds.of_inputs(last.inputs).kind
    on = ToolchainChoice(
        kind=kind,
        interpreter=last.interpreter,
        sm=last.asked_sm,
        ptx=last.asked_ptx,
        from_source=last.from_source,
        variant=last.asked_variant,
        twin=last.asked_twin,
    )
    if where := on.type.closed:
        raise ConfigError(
            f"`builder shell` cannot open the last build of {name}: it {where}", remedy=f"examine the files in {folder}"
        )
    plan = plan_of(name, last.stack, str(last.inputs["target"]), settings, on)
    if plan.build_id != last.build_id:
        console.warn(
            f"inputs have changed since that build (see `builder why {name}`): the shell has the files of that build, but the "
            "current tools and variables"
        )
    with lock(
        settings.home / "locks" / f"build-{last.build_id}", lambda: console.step("wait", "waiting for this build to finish")
    ):
        box = reopen(plan, folder, settings, console)
        console.step("shell", f"command of the build: {' '.join(plan.toolchain.command(plan, settings, folder))}")
        code = sandbox.shell(box)
    sys.exit(code)


def schemas() -> dict[str, str]:
    """Name to JSON schema. docs/schema has copies of them, which a test compares."""
    from builder.ground.interpreters.tables import InterpreterTable
    from builder.planning.matrix import MatrixTable
    from builder.planning.recipe import Recipe
    from builder.planning.stack import Stack
    from builder.sets.definition import WheelSet
    from builder.sets.set_record import SetRecord

    models: dict[str, type[BaseModel]] = {
        "recipe": Recipe,
        "stack": Stack,
        "set": WheelSet,
        "record": record.Record,
        "set-record": SetRecord,
        "interpreter": InterpreterTable,
        "selectors": MatrixTable,
    }
    return {name: json.dumps(model.model_json_schema(), indent=2) + "\n" for name, model in models.items()}


@click.command("schema")
@click.option(
    "--write",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write each schema into a file in this folder. Without this option, print the schemas.",
)
@json_option
def schema_command(write: Path | None) -> None:
    """Print the JSON schemas of the builder's files, for editors and programs.

    The files are recipe.toml, stack.toml, interpreter.toml, set.toml, matrix.toml, and the records of builds and sets.

    \b
    # Write the schemas into docs/schema.
    builder schema --write docs/schema
    """
    show_schemas(schemas(), write)

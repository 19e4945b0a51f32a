"""`builder list`, `plan`, `log` and `show`: recipes, their plans, and their last builds."""

from __future__ import annotations

import json
import shutil
import signal
import sys

import click

from builder import fetch
from builder.cli.options import Aim, aimed, last_build, plan_of, start
from builder.flow import STAGES
from builder.planning import recipe
from builder.proof import record
from gracefarm.cli import json_option
from gracefarm.errors import ConfigError


@click.command("list")
@json_option
def list_command() -> None:
    """List the recipes, and the result of each recipe's last build.

    A recipe (a folder in recipes/) describes how to build one package. Each line shows the recipe, the version of the
    package, the stack, the result of the last build on this machine, and the summary in recipe.toml. A stack pins the
    versions of torch, CUDA, Python and the compilers. The sign - means that this machine has no build of the recipe.

    \b
    builder list
    """
    settings, console = start()
    rows, lines = [], []
    for key in recipe.names(settings.project / "recipes"):
        try:
            data = recipe.load(settings.project / "recipes", key).data
        except ConfigError as error:
            rows.append({"recipe": key, "error": error.cause})
            lines.append(f"{key:20} {error.cause}")
            continue
        last = next(iter(record.all_of(settings, key)), None)
        outcome = last.state if last else None
        shown = {"name", "version", "stack", "summary", "superseded"}
        rows.append(data.model_dump(include=shown) | {"recipe": key, "last": outcome})
        superseded = f" (superseded: {data.superseded})" if data.superseded else ""
        lines.append(f"{key:20} {data.version:12} {data.stack:8} {outcome or '-':10} {data.summary}{superseded}")
    console.result(rows, "\n".join(lines) or "no recipes")


@click.command("plan")
@click.argument("name")
@aimed
@json_option
def plan_command(name: str, aim: Aim) -> None:
    """Show what a build would do, without starting it.

    NAME is a recipe (a folder in recipes/). A recipe describes how to build one package. The output shows the inputs of the
    build (such as sources, options and compilers), the build id (the hash of the inputs), the steps, and the command that
    compiles. It also shows which files are not downloaded yet, which files have an unknown digest (sha256), and whether the
    wheel exists already.

    \b
    # Print the plan as JSON.
    builder plan causal_conv1d --json
    # Show the plan of a build with gcc and CUDA of this machine.
    builder plan causal_conv1d --toolchain host
    """
    settings, console = start()
    plan = plan_of(name, aim.stack, aim.target, settings, aim.on)
    existing = record.existing(plan, settings)
    missing = plan.gaps
    command = plan.toolchain.command(plan, settings, record.folder(settings, plan.build_id) / "work")
    value = {
        "build_id": plan.build_id,
        "title": plan.title,
        "inputs": plan.inputs,
        "steps": STAGES,
        "command": command,
        "gaps": [{"what": gap.what, "url": gap.url, "reason": gap.reason} for gap in missing],
        "evidence": [
            {"what": known.what, "sha256": known.sha256, "confirmed": known.confirmed, "says": known.sentence}
            for known in plan.evidence
        ],
        "exists": existing is not None,
        "wheel": str(record.product_path(settings, existing)) if existing else None,
    }
    to_fetch = [address for part in (plan, *plan.trees) for address in fetch.absent(part.recipe.data, settings)]
    value["to_fetch"] = to_fetch
    value["trees"] = [{"recipe": tree.recipe.key, "build_id": tree.build_id} for tree in plan.trees]
    text = f"{plan.title}\nbuild id  {plan.build_id}\n\n{json.dumps(plan.inputs, indent=2)}\n\n"
    text += f"superseded: {plan.recipe.data.superseded}\n" if plan.recipe.data.superseded else ""
    text += f"steps     {' > '.join(STAGES)}\ncommand   {' '.join(command)}\n"
    text += "".join(f"digest    {known.what} {known.sha256[:16]}: {known.sentence}\n" for known in plan.evidence)
    for tree in plan.trees:
        state = "built" if record.tree_path(settings, tree.build_id).is_dir() else "not built; it is built first"
        text += f"tree      {tree.title}, build id {tree.build_id}: {state}\n"
    text += "".join(f"to fetch  {address}\n" for address in to_fetch)
    text += "".join(f"no digest {gap.what}  {gap.url}: {gap.reason}\n" for gap in missing)
    console.result(
        value, text + (f"exists    {value['wheel']}" if existing else "exists    no; build it with `builder build`")
    )


@click.command("log")
@click.argument("name")
@json_option
def log_command(name: str) -> None:
    """Print the log of the last build of a recipe.

    NAME is a recipe (a folder in recipes/). A recipe describes how to build one package. The last build is the most recently
    started build of the recipe on this machine. It can be for any stack and any architecture.

    \b
    # Print the log of the last build of causal_conv1d.
    builder log causal_conv1d
    """
    settings, console = start()
    path = record.folder(settings, last_build(name, settings).build_id) / "log.txt"
    if not path.is_file():
        raise ConfigError(
            f"the last build of {name} failed before it wrote a log",
            remedy=f"run `builder show {name}`, which prints the error of this build",
        )
    if console.as_json:
        console.result({"log": path.read_text(errors="replace")})
        return
    # `builder log NAME | head`: the reader may stop before the end.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with path.open("rb") as stream:
        shutil.copyfileobj(stream, sys.stdout.buffer)


@click.command("show")
@click.argument("name")
@json_option
def show_command(name: str) -> None:
    """Show the record of the last build of a recipe.

    NAME is a recipe (a folder in recipes/). A recipe describes how to build one package. The last build is the most recently
    started build of the recipe on this machine. It can be for any stack and any architecture. The record shows the result,
    the duration of each step, the result of each check (gate) of the wheel, and the paths of the wheel and of the record. If
    the build failed, the record shows the cause and a remedy.

    \b
    # Show the record of the last build of causal_conv1d.
    builder show causal_conv1d
    """
    from builder import smoke
    from builder.compiling import units
    from builder.proof import certificates

    settings, console = start()
    last = last_build(name, settings)
    product = record.product_path(settings, last)
    lines = [f"{last.name} {last.version}, stack {last.stack}: {last.state}, {last.finished}", f"build id  {last.build_id}"]
    if last.failure:
        lines += [f"cause     {last.failure.cause}", f"remedy    {last.failure.remedy}"]
    if last.jobs:
        lines.append(f"jobs      {last.jobs.count}: {last.jobs.reason}")
    if last.compiler_cache:
        lines.append(units.title(last.compiler_cache))
    if last.device_code:
        lines.append(units.device_title(last.device_code))
    for stage in last.stages:
        peak = f", peak {stage.peak_memory / 2**30:.2f} GiB" if stage.peak_memory is not None else ""
        cpu = f", {stage.cpu_s:.1f} CPU s" if stage.cpu_s is not None else ""
        lines.append(f"{stage.name:9} {stage.wall_s:.1f} s{cpu}{peak}")
    lines += [f"gate      {verdict.status:14} {verdict.gate}: {verdict.summary}" for verdict in last.verdicts]
    lines += [f"digest    {known}" for known in last.unconfirmed]
    lines += [f"gpu       {smoke.sentence(last.gpu)}"] if last.gpu else []
    lines += [f"gpu       {certificates.sentence(known, last)}" for known in certificates.of_record(last, settings)]
    lines += [f"{'wheel' if last.tree is None else 'tree'}     {product}"] if product else []
    lines += [f"record    {record.path(settings, last.build_id)}"]
    console.result(last.model_dump(mode="json"), "\n".join(lines))

"""`builder`: the command line. Parses, calls, prints; nothing else. A command's module is imported when it is called."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

import click

from gracefarm import console
from gracefarm.cli import SETTINGS, LazyGroup, json_requested

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        # name: (module:function, summary for --help), in the order of a typical workflow
        "init": ("builder.cli.init:init_command", "Create a project folder with recipes, stacks and sets."),
        "new": ("builder.cli.new:new_command", "Write a recipe for a package, read from its source."),
        "list": ("builder.cli.look:list_command", "List recipes with the last build of each on this machine."),
        "plan": ("builder.cli.look:plan_command", "Show inputs, build id, steps and commands of a build."),
        "fetch": ("builder.cli.fetch:fetch_command", "Fetch and verify sources, and apply patches."),
        "build": ("builder.cli.build:build_command", "Build wheels: fetch, compile, audit, smoke-test, publish."),
        "matrix": ("builder.cli.matrix:matrix_command", "List the cells of recipes with the state of each."),
        "run": ("builder.cli.build:run_command", "Build, publish to a local index, install from it, import."),
        "show": ("builder.cli.look:show_command", "Show the record of a recipe's last build."),
        "log": ("builder.cli.look:log_command", "Print the log of a recipe's last build."),
        "why": ("builder.cli.why:why_command", "Show which input changed, and what must be built again."),
        "shell": ("builder.cli.upkeep:shell_command", "Open a shell in the sandbox of a recipe's last build."),
        "audit": ("builder.cli.check:audit_command", "Run the audit on any wheel."),
        "smoke": ("builder.cli.check:smoke_command", "Import a wheel in a fresh environment, or run it on a GPU."),
        "certify": ("builder.cli.certify:certify_command", "Test a wheel on a GPU, and write a signed certificate."),
        "verify": ("builder.cli.verify:verify_command", "Check a wheel against its record, or by building it again."),
        "set": ("builder.cli.sets:set_command", "Build, test and publish wheels together."),
        "lock": ("builder.cli.lock:lock_command", "Write the locks of a recipe, stack or set."),
        "stack": ("builder.cli.stack:stack_command", "Create stacks."),
        "key": ("builder.cli.key:key_command", "Create and show this machine's signing key."),
        "sign": ("builder.cli.key:sign_command", "Sign the provenance of the last builds again."),
        "updates": ("builder.cli.updates:updates_command", "List newer upstream releases, as changes to review."),
        "doctor": ("builder.cli.upkeep:doctor_command", "Check what this machine lacks for building, and fix it."),
        "clean": ("builder.cli.upkeep:clean_command", "Remove working folders of builds."),
        "schema": ("builder.cli.upkeep:schema_command", "Print the JSON schemas of recipe.toml and other files."),
    }
)


@click.group(cls=LazyGroup, table=COMMANDS, renamed={"lock-stack": "builder lock STACK"}, context_settings=SETTINGS)
@click.version_option(package_name="gracefarm")
def cli() -> None:
    """Build tested aarch64 CUDA wheels from pinned recipes.

    \b
    builder list
    builder plan causal_conv1d
    builder build causal_conv1d --publish http://127.0.0.1:8080/legacy/
    builder audit some.whl --stack cu130
    """


def main() -> None:
    """Entry point of the console script."""
    # File modes go into wheels, and the output of other programs is searched: neither may depend on the user.
    os.umask(0o022)
    os.environ["LC_ALL"] = "C"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # the cluster of --farm local would report to Ray's makers
    console.run(lambda: cli.main(standalone_mode=False, prog_name="builder"), as_json=json_requested(), extra="builder")

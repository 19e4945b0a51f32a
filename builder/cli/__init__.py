"""`builder`: the command line. Parses, calls, prints; nothing else. A command's module is imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import MappingProxyType

import click

from gracefarm import console
from gracefarm.cli import SETTINGS, LazyGroup

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        # name: (module:function, what --help says of it), in the order in which they are used
        "init": ("builder.cli.init:init_command", "A project folder with recipes, stacks and sets to change."),
        "list": ("builder.cli.look:list_command", "Recipes, and the last build of each on this machine."),
        "plan": ("builder.cli.look:plan_command", "Inputs, build id, steps and commands of a build."),
        "fetch": ("builder.cli.fetch:fetch_command", "Fetch and verify sources, apply patches: what a build begins with."),
        "build": ("builder.cli.build:build_command", "Build wheels: fetch, compile, audit, smoke-test, record, publish."),
        "matrix": ("builder.cli.matrix:matrix_command", "The cells of recipes: built, failed, blocked or not tried."),
        "run": ("builder.cli.build:run_command", "The main job: build, publish to an index here, install back, import."),
        "show": ("builder.cli.look:show_command", "The record of a recipe's last build: outcome, stages, verdicts."),
        "log": ("builder.cli.look:log_command", "The whole log of a recipe's last build."),
        "why": ("builder.cli.why:why_command", "Which input changed, and what else it rebuilds."),
        "shell": ("builder.cli.upkeep:shell_command", "A shell inside the sandbox of a last build."),
        "audit": ("builder.cli.check:audit_command", "The gates, on anybody's wheel."),
        "smoke": ("builder.cli.check:smoke_command", "Import a wheel in a fresh environment, or try it on a GPU."),
        "certify": ("builder.cli.certify:certify_command", "Test a wheel on a GPU, or sign what such a test reports."),
        "verify": ("builder.cli.verify:verify_command", "Is a wheel what it says, and does it build the same again?"),
        "set": ("builder.cli.sets:set_command", "Wheels that are built, tested and published together."),
        "lock": ("builder.cli.lock:lock_command", "Fill in digests that were not known."),
        "stack": ("builder.cli.stack:stack_command", "A new stack for a release of torch."),
        "lock-stack": ("builder.cli.lock:lock_stack_command", "Resolve a stack anew and write its locks."),
        "key": ("builder.cli.key:key_command", "The farm's ed25519 key, which signs provenance."),
        "sign": ("builder.cli.key:sign_command", "Sign the provenance of last builds anew."),
        "doctor": ("builder.cli.upkeep:doctor_command", "What this machine lacks for building, and how to mend it."),
        "clean": ("builder.cli.upkeep:clean_command", "Remove working folders of builds; --all: roots and builds as well."),
        "schema": ("builder.cli.upkeep:schema_command", "JSON schemas of recipe.toml, stack.toml and record.json."),
    }
)


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=SETTINGS)
@click.version_option(package_name="gracefarm")
def cli() -> None:
    """Turn a pinned recipe into a proven aarch64 CUDA wheel.

    \b
    builder list
    builder plan causal_conv1d
    builder build causal_conv1d --publish http://127.0.0.1:8080/legacy/
    builder audit some.whl --stack cu130
    """


def main() -> None:
    """The console script."""
    # Modes go into wheels, and what other programs say is searched: neither may differ with the person who builds.
    os.umask(0o022)
    os.environ["LC_ALL"] = "C"
    console.run(lambda: cli.main(standalone_mode=False, prog_name="builder"), as_json="--json" in sys.argv, extra="builder")

"""`builder`: the command line. It only parses, calls and prints. The module of a command is imported when it is called."""

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
        "init": ("builder.cli.init:init_command", "Create a project folder with gracefarm's recipes and stacks."),
        "new": ("builder.cli.new:new_command", "Write a recipe for a package, from the package's source."),
        "list": ("builder.cli.look:list_command", "List the recipes, and the result of each recipe's last build."),
        "plan": ("builder.cli.look:plan_command", "Show what a build would do, without starting it."),
        "fetch": ("builder.cli.fetch:fetch_command", "Download and check the sources of recipes."),
        "build": ("builder.cli.build:build_command", "Build wheels from recipes, test them, and publish them."),
        "matrix": ("builder.cli.matrix:matrix_command", "List the wheels that could be built, and the state of each."),
        "run": ("builder.cli.build:run_command", "Build one wheel, publish it locally, install it and import it."),
        "show": ("builder.cli.look:show_command", "Show the record of a recipe's last build."),
        "log": ("builder.cli.look:log_command", "Print the log of a recipe's last build."),
        "why": ("builder.cli.why:why_command", "Show which inputs of a build have changed."),
        "shell": ("builder.cli.upkeep:shell_command", "Open a shell in the sandbox of a recipe's last build."),
        "audit": ("builder.cli.check:audit_command", "Check the files in a wheel against a stack."),
        "smoke": ("builder.cli.check:smoke_command", "Install a wheel in a new environment, and import it."),
        "certify": ("builder.cli.certify:certify_command", "Test a wheel on a GPU, and sign a certificate of the results."),
        "verify": (
            "builder.cli.verify:verify_command",
            "Check that a wheel is unchanged, or build it again and compare both wheels.",
        ),
        "set": ("builder.cli.sets:set_command", "Build, test and publish sets: wheels that belong together."),
        "lock": ("builder.cli.lock:lock_command", "Write lock files, and fill in unknown sha256 digests."),
        "stack": ("builder.cli.stack:stack_command", "Create a stack for a version of torch."),
        "key": ("builder.cli.key:key_command", "Create or show the key that signs statements about wheels' origin."),
        "sign": ("builder.cli.key:sign_command", "Sign the statements about the origin of built wheels."),
        "updates": ("builder.cli.updates:updates_command", "List newer releases of torch, Python and the recipes' packages."),
        "doctor": ("builder.cli.upkeep:doctor_command", "Check whether this machine can build wheels."),
        "clean": ("builder.cli.upkeep:clean_command", "Remove temporary files of builds."),
        "schema": ("builder.cli.upkeep:schema_command", "Print the JSON schemas of recipe.toml and other files."),
    }
)


@click.group(cls=LazyGroup, table=COMMANDS, renamed={"lock-stack": "builder lock STACK"}, context_settings=SETTINGS)
@click.version_option(package_name="gracefarm")
def cli() -> None:
    """Build and test wheels with CUDA code, for aarch64 and x86_64.

    A recipe (a folder in recipes/) describes how to build one package. A stack (a folder in stacks/) pins the versions of
    torch, CUDA, Python and the compilers for the build. The builder looks for recipes/ and stacks/ in the working directory,
    then in its parent folders. If these folders do not exist, the builder uses the recipes and stacks that belong to
    gracefarm.

    \b
    # List the recipes.
    builder list
    # Show what the build of the recipe causal_conv1d would do.
    builder plan causal_conv1d
    # Build the wheel, and upload it to a package index on this machine.
    builder build causal_conv1d --publish http://127.0.0.1:8080/legacy/
    # Check a wheel against the stack cu130.
    builder audit some.whl --stack cu130
    """


def main() -> None:
    """Entry point of the console script."""
    # File modes go into wheels, and the output of other programs is searched: neither may depend on the user.
    os.umask(0o022)
    os.environ["LC_ALL"] = "C"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # the cluster of --farm local would report to Ray's makers
    console.run(lambda: cli.main(standalone_mode=False, prog_name="builder"), as_json=json_requested(), extra="builder")

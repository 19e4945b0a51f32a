"""`builder certify`: test a wheel's device code on a GPU, and sign a certificate of the results."""

from __future__ import annotations

import os
from pathlib import Path

import click

from builder import smoke
from builder.audit.contents import plainly_named
from builder.cli.check import trial_of
from builder.cli.options import FILE, cuda_option, publish_option, start, tried
from builder.flow import publishing
from builder.planning import recipe
from builder.planning.recipe import LoadedRecipe
from builder.planning.settings import Settings
from builder.proof import certificates, provenance, publish, record, signing
from builder.toolchains.choice import ToolchainChoice
from gracefarm.cli import json_option
from gracefarm.console import Console
from gracefarm.errors import ConfigError, HostError, UsageError
from gracefarm.files import atomic_write, remove_tree

_CUOBJDUMP = "install the CUDA toolkit and give its folder with --cuda PATH, or add cuobjdump to PATH"


@click.command("certify")
@click.argument("wheel", type=FILE, required=False)
@click.option(
    "--recipe",
    "recipe_name",
    metavar="NAME",
    help="Test the wheel with smoke_gpu.py of this recipe (a folder in recipes/).",
)
@click.option(
    "--stack",
    "stack_name",
    metavar="NAME",
    help="Test the wheel with the packages that this stack (a folder in stacks/) pins. Default: the stack that the recipe "
    "names.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Report file to write. Default: WHEEL.gpu.json in the working directory.",
)
@click.option(
    "--accept",
    "accepted",
    type=FILE,
    metavar="REPORT",
    help="Check this report file, and sign a certificate. Use the option on the machine that built the wheel.",
)
@publish_option(
    help="With --accept: also send the certificate to the index with this upload address, such as http://HOST:8080/legacy/.",
)
@cuda_option
@tried
@json_option
def certify_command(
    wheel: Path | None,
    recipe_name: str | None,
    stack_name: str | None,
    report: Path | None,
    accepted: Path | None,
    url: str | None,
    on: ToolchainChoice,
) -> None:
    """Test a wheel on a GPU, and sign a certificate of the results.

    1. On the machine with the GPU, run the command with WHEEL, the path of a .whl file. The script smoke_gpu.py of the
    recipe compares the results of the wheel with correct results, for example those of torch. The command writes a report
    file. The report contains the digest (hash) of the wheel's GPU code.

    2. Copy the report to the machine that built the wheel, and run the command there with --accept. The command looks on
    that machine for a wheel whose GPU code has the same digest. Then the command signs a certificate with the key of that
    machine (see `builder key`).

    The certificate applies to each wheel with the same GPU code, even if the wheel is for a different processor architecture
    or Python. The exit code is 31 if results are wrong. The exit code is 32 if the machine of step 2 has built no wheel with
    the GPU code of the report.

    \b
    # Test a wheel on the GPU of this machine, and write thing-1.0.whl.gpu.json.
    builder certify dist/thing-1.0.whl --recipe thing --toolchain host
    # Check the report, and sign a certificate.
    builder certify --accept thing-1.0.whl.gpu.json
    """
    settings, console = start()
    if accepted is not None:
        if wheel is not None or report is not None:
            raise UsageError(
                "--accept cannot be used with WHEEL or --report",
                remedy="omit WHEEL and --report; --accept compares the report with the wheels that this machine built",
            )
        _accept(accepted, url, settings, console)
        return
    if wheel is None or recipe_name is None or url is not None:
        raise _unclear(wheel, url)
    place = report or Path(f"{wheel.name}.gpu.json")
    loaded = recipe.load(settings.project / "recipes", recipe_name)
    if loaded.smoke_gpu_script is None:
        remedy = f"write {loaded.folder / 'smoke_gpu.py'}, as docs/howto/gpu.md describes"
        raise ConfigError(f"recipe {recipe_name} has no smoke_gpu.py", remedy=remedy)
    console.step("certify", f"running smoke_gpu.py of recipe {recipe_name} with {wheel.name}")
    written = _tested(wheel, loaded, loaded.smoke_gpu_script, stack_name or loaded.data.stack, on, settings)
    atomic_write(place, written.model_dump_json(indent=2) + "\n")
    codes = ", ".join(f"sm_{name} {digest[:16]}" for name, digest in written.device_digests.items())
    lines = [
        f"{len(written.comparisons)} comparisons passed on {written.gpu}; negative control: {written.negative_control}",
        f"device code {codes}",
        f"report  {place}; then run on the machine that built the wheel: builder certify --accept {place.name}",
    ]
    console.result(written.model_dump(mode="json"), "\n".join(lines))


def _tested(
    wheel: Path, loaded: LoadedRecipe, script: Path, stack: str, on: ToolchainChoice, settings: Settings
) -> certificates.GpuReport:
    """Run smoke_gpu.py with the wheel, and return the report."""
    scratch = settings.home / "smoke" / str(os.getpid())
    scratch.mkdir(parents=True)
    try:
        with plainly_named(wheel.absolute()) as (plain, _):
            trial, sm, reader = trial_of(plain, loaded.data.imports, script, stack, on, scratch, settings, cuda=True)
            if reader is None:
                raise HostError("NVIDIA's cuobjdump, which reads device code, was not found", remedy=_CUOBJDUMP)
            return certificates.report(wheel, smoke.run_gpu(trial, sm), reader)
    finally:
        remove_tree(scratch)


def _unclear(wheel: Path | None, url: str | None) -> UsageError:
    """The error for arguments that neither test a wheel nor accept a report."""
    if url is not None:
        return UsageError(
            "--publish requires --accept REPORT",
            remedy="omit --publish to test a wheel; or upload certificates with --accept REPORT --publish URL",
        )
    return UsageError(
        f"{'WHEEL' if wheel is None else '--recipe NAME'} is missing",
        remedy="give WHEEL and --recipe NAME to test a wheel; or --accept REPORT to sign a certificate",
    )


def _accept(accepted: Path, url: str | None, settings: Settings, console: Console) -> None:
    """Sign a report, sign the provenance of the covered wheels again, and upload the certificates."""
    given = certificates.read_report(accepted)
    if url is not None:
        publish.refuse_credentials(url)
    key = signing.private()
    if key is None:
        raise ConfigError(
            "this machine has no signing key", remedy="create a key with `builder key create`", repeat="builder key create"
        )
    builds = [build for build in record.all_of(settings) if build.wheel is not None and build.device_digests]
    wheels = {build.wheel.sha256: build.device_digests for build in builds if build.wheel is not None}
    signed = certificates.accept(given, wheels, key, settings)
    digests = {certificate.device_digest for certificate in signed}
    covered = [build for build in builds if digests & set(build.device_digests.values())]
    lines = []
    for build in covered:
        record.write(provenance.signed(build, settings), settings)
        lines += [
            f"{build.wheel.filename if build.wheel else build.build_id}: {certificates.sentence(certificate, build)}"
            for certificate in certificates.of_record(build, settings)
        ]
    if url is not None:
        publishing.publish_certificates(covered, url, settings, console)
    console.result([certificate.model_dump(mode="json") for certificate in signed], "\n".join(lines))

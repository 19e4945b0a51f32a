"""`builder key` and `builder sign`: the farm's key."""

from __future__ import annotations

import click

from builder.planning import recipe
from builder.proof import record
from gracefarm import settings as settings_module
from gracefarm.console import Console
from gracefarm.errors import ConfigError

_as_json = click.option("--json", "as_json", is_flag=True, help="JSON lines for machines.")


@click.group("key")
def key() -> None:
    """The farm's ed25519 key, which signs how each wheel came to be (docs/provenance.md).

    \b
    builder key create
    builder key show > farm.pub
    """


@key.command("create")
@_as_json
def create(as_json: bool) -> None:
    """Make the key, in a file that only its owner can read; prints the public half."""
    from builder.proof import signing

    console = Console(as_json=as_json)
    made = signing.create()
    console.step("key", f"{signing.place()}, key id {signing.key_id(made)}")
    console.result({"key_id": signing.key_id(made), "public": signing.pem(made)}, signing.pem(made).strip())


@key.command("show")
@_as_json
def show(as_json: bool) -> None:
    """The public half, as `builder verify --key` reads it."""
    from builder.proof import signing

    found = signing.private()
    if found is None:
        raise ConfigError("this farm has no key", remedy="make one", repeat="builder key create")
    public = found.public_key()
    value = {"key_id": signing.key_id(public), "public": signing.pem(public)}
    Console(as_json=as_json).result(value, signing.pem(public).strip())


@click.command("sign")
@click.argument("names", nargs=-1, required=True)
@_as_json
def sign(names: tuple[str, ...], as_json: bool) -> None:
    """Sign the provenance of the last build of each NAME anew: for wheels that were built before there was a key.

    \b
    builder sign causal_conv1d
    """
    from builder.proof import provenance, signing

    settings, console = settings_module.load(), Console(as_json=as_json)
    if signing.private() is None:
        raise ConfigError("this farm has no key", remedy="make one", repeat="builder key create")
    for name in names:
        last = record.latest(settings, recipe.load(settings.project / "recipes", name).key)
        wheel = record.wheel_path(settings, last)
        if wheel is None:
            raise ConfigError(f"the last build of {name} left no wheel", remedy=f"run `builder build {name}`")
        record.write(provenance.signed(last, settings), settings)
        console.result({"provenance": str(provenance.path(wheel))}, str(provenance.path(wheel)))

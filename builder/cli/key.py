"""`builder key` and `builder sign`: the farm's key."""

from __future__ import annotations

import click
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from builder.cli.options import json_option, last_wheel, start
from builder.proof import provenance, record, signing
from gracefarm.errors import ConfigError


@click.group("key")
def key_command() -> None:
    """The farm's ed25519 key, which signs how each wheel came to be (docs/provenance.md).

    \b
    builder key create
    builder key show > farm.pub
    """


def _private() -> Ed25519PrivateKey:
    """The key, which must be there."""
    key = signing.private()
    if key is None:
        raise ConfigError("this farm has no key", remedy="make one", repeat="builder key create")
    return key


@key_command.command("create")
@json_option
def create_command(as_json: bool) -> None:
    """Make the key, in a file that only its owner can read; prints the public half."""
    _, console = start(as_json=as_json)
    public = signing.create()
    console.step("key", f"{signing.place()}, key id {signing.key_id(public)}")
    console.result({"key_id": signing.key_id(public), "public": signing.pem(public)}, signing.pem(public).strip())


@key_command.command("show")
@json_option
def show_command(as_json: bool) -> None:
    """The public half, as `builder verify --key` reads it."""
    _, console = start(as_json=as_json)
    public = _private().public_key()
    console.result({"key_id": signing.key_id(public), "public": signing.pem(public)}, signing.pem(public).strip())


@click.command("sign")
@click.argument("names", nargs=-1, required=True)
@json_option
def sign_command(names: tuple[str, ...], as_json: bool) -> None:
    """Sign the provenance of the last build of each NAME anew: for wheels that were built before there was a key.

    \b
    builder sign causal_conv1d
    """
    settings, console = start(as_json=as_json)
    _private()
    for name in names:
        last, wheel = last_wheel(name, settings)
        record.write(provenance.signed(last, settings), settings)
        console.result({"provenance": str(provenance.path(wheel))}, str(provenance.path(wheel)))

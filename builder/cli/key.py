"""`builder key` and `builder sign`: the signing key of the machine that builds wheels."""

from __future__ import annotations

import click
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from builder.cli.options import last_wheel, start
from builder.proof import provenance, record, signing
from gracefarm.cli import CommandGroup, json_option
from gracefarm.errors import ConfigError


@click.group("key", cls=CommandGroup)
def key_command() -> None:
    """Create and show this machine's ed25519 key, which signs provenance (docs/explanation/provenance.md).

    \b
    builder key create
    builder key show > builder.pub
    """


def _private() -> Ed25519PrivateKey:
    """The private key.

    Raises:
        ConfigError: this machine has no key.
    """
    key = signing.private()
    if key is None:
        raise ConfigError("this machine has no signing key", remedy="create a key", repeat="builder key create")
    return key


@key_command.command("create")
@json_option
def create_command() -> None:
    """Create the key that signs provenance, in a file that only its owner can read. Print the public key.

    \b
    builder key create
    """
    _, console = start()
    public = signing.create()
    console.step("key", f"{signing.place()}, key id {signing.key_id(public)}")
    console.result({"key_id": signing.key_id(public), "public": signing.pem(public)}, signing.pem(public).strip())


@key_command.command("show")
@json_option
def show_command() -> None:
    """Print the public key, for `builder verify --key`.

    \b
    builder key show > builder.pub
    """
    _, console = start()
    public = _private().public_key()
    console.result({"key_id": signing.key_id(public), "public": signing.pem(public)}, signing.pem(public).strip())


@click.command("sign")
@click.argument("names", nargs=-1, required=True)
@json_option
def sign_command(names: tuple[str, ...]) -> None:
    """Sign the provenance of each NAME's last build. Use it for wheels that were built before the key existed.

    \b
    builder sign causal_conv1d
    """
    settings, console = start()
    _private()
    for name in names:
        last, wheel = last_wheel(name, settings)
        record.write(provenance.signed(last, settings), settings)
        console.result({"provenance": str(provenance.path(wheel))}, str(provenance.path(wheel)))

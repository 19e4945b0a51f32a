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
    """Create or show the key that signs statements about the origin of wheels.

    For each wheel, the builder writes a statement about its origin (provenance): the sources, the options and the compilers.
    If this machine has a key, the builder signs the statement with this key. The key is an ed25519 key.

    \b
    # Create the key.
    builder key create
    # Write the public key into a file.
    builder key show > builder.pub
    """


def _private() -> Ed25519PrivateKey:
    """The private key.

    Raises:
        ConfigError: this machine has no key.
    """
    key = signing.private()
    if key is None:
        raise ConfigError(
            "this machine has no signing key", remedy="create a key with `builder key create`", repeat="builder key create"
        )
    return key


@key_command.command("create")
@json_option
def create_command() -> None:
    """Create the key that signs statements about the origin of wheels.

    A statement lists the sources, the options and the compilers of a wheel. Later builds on this machine sign their
    statements with the key. The private key is in a file that only its owner can read. The command prints the path of this
    file, and the public key.

    \b
    # Create the key, and print its public key.
    builder key create
    """
    _, console = start()
    public = signing.create()
    console.step("key", f"{signing.place()}, key id {signing.key_id(public)}")
    console.result({"key_id": signing.key_id(public), "public": signing.pem(public)}, signing.pem(public).strip())


@key_command.command("show")
@json_option
def show_command() -> None:
    """Print the public key of this machine.

    With its private key, this machine signs a statement about the origin of each wheel that it builds. Users of the wheels
    check the signature with the public key.

    \b
    # Write the public key into a file.
    builder key show > builder.pub
    # Check a wheel with this file.
    builder verify FILE.whl --key builder.pub
    """
    _, console = start()
    public = _private().public_key()
    console.result({"key_id": signing.key_id(public), "public": signing.pem(public)}, signing.pem(public).strip())


@click.command("sign")
@click.argument("names", nargs=-1, required=True)
@json_option
def sign_command(names: tuple[str, ...]) -> None:
    """Sign the statements about the origin of wheels that are already built.

    NAMES are recipes (folders in recipes/). A recipe describes how to build one package. A statement about the origin
    (provenance) lists the sources, the options and the compilers of a wheel. The command signs the statement of each
    recipe's last build with the key of this machine. Use the command if you created the key after the build. The command
    prints the path of each signed statement.

    \b
    # Sign the statement of the last build of causal_conv1d.
    builder sign causal_conv1d
    """
    settings, console = start()
    _private()
    for name in names:
        last, wheel = last_wheel(name, settings)
        record.write(provenance.signed(last, settings), settings)
        console.result({"provenance": str(provenance.path(wheel))}, str(provenance.path(wheel)))

"""The ed25519 key of the machine that builds wheels, and DSSE envelopes signed with it.

The key is in a file that only its owner can read, or in a variable.

https://github.com/secure-systems-lab/dsse
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from gracefarm.errors import ConfigError, UsageError, VerifyError
from gracefarm.settings import config_path

VARIABLE = "GRACEFARM_SIGNING_KEY"
"Variable with the private key (PEM), for machines that get secrets as variables; else a file next to settings.toml."
OF_A_WHEEL = "run `builder key show > builder.pub` on the machine that built the wheel, and give this file with --key"
"How to get the public key that verifies a wheel."


def place() -> Path:
    """Path of the key's file."""
    return config_path().with_name("signing-key.pem")


def create() -> Ed25519PublicKey:
    """Create this machine's key.

    Raises:
        UsageError: a key exists; replacing it would make its signatures unverifiable.
    """
    path = place()
    path.parent.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UsageError(
            f"this machine already has a signing key in {path}",
            remedy="keep this key; or save its public key with `builder key show`, move the file away, and repeat the command",
        ) from error
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    return key.public_key()


def private() -> Ed25519PrivateKey | None:
    """This machine's key; None: it has no key.

    Raises:
        ConfigError: others can read its file, or it is not an ed25519 key.
    """
    if text := os.environ.get(VARIABLE):
        return _parse(text.encode(), VARIABLE)
    path = place()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} can be read by other users", remedy=f"run `chmod 600 {path}`")
    return _parse(path.read_bytes(), str(path))


def _parse(text: bytes, where: str) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        # Without the library's message and without a cause, which could contain a part of the key.
        fault = f"{where} does not contain an ed25519 key in PEM format"
        if where == VARIABLE:
            raise ConfigError(fault, remedy="set the variable to the content of a key file, or unset it") from None
        raise ConfigError(
            fault, remedy="move the file away, then create a key with `builder key create`", repeat="builder key create"
        ) from None
    return key


def public(path: Path, remedy: str = OF_A_WHEEL) -> Ed25519PublicKey:
    """A public key from a PEM file; `remedy` says how to get this file.

    Raises:
        ConfigError: the file cannot be read, or is not an ed25519 public key.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the public key {path} cannot be read: {error.strerror}", remedy=remedy) from error
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is not a public key in PEM format: {error}", remedy=remedy) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is not an ed25519 key", remedy=remedy)
    return key


def pem(key: Ed25519PublicKey) -> str:
    """A public key as PEM text."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def key_id(key: Ed25519PublicKey) -> str:
    """Hex sha256 of the public key's DER."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def encoding(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the signed bytes, which include the type."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(body), body)


def envelope(kind: str, body: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """`body` in a signed DSSE envelope."""
    signature = {"keyid": key_id(key.public_key()), "sig": base64.b64encode(key.sign(encoding(kind, body))).decode()}
    return {"payload": base64.b64encode(body).decode(), "payloadType": kind, "signatures": [signature]}


def opened(dsse: Mapping[str, Any], kind: str, key: Ed25519PublicKey) -> Any:
    """The JSON inside an envelope that this key signed.

    Raises:
        VerifyError: it is not an envelope, has another type, or no valid signature of this key.
    """
    try:
        body = base64.b64decode(dsse["payload"], validate=True)
        signatures = [
            (str(signature["keyid"]), base64.b64decode(signature["sig"], validate=True)) for signature in dsse["signatures"]
        ]
        payload_type = str(dsse["payloadType"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise VerifyError(f"the provenance is not a DSSE envelope: {error!r}") from error
    if payload_type != kind:
        raise VerifyError(f"the provenance has the type {payload_type}, not {kind}")
    for _, signature in signatures:
        try:
            key.verify(signature, encoding(kind, body))
        except InvalidSignature:
            continue
        return json.loads(body)
    by = ", ".join(identifier[:16] for identifier, _ in signatures) or "no key"
    raise VerifyError(
        f"the provenance has no valid signature of key {key_id(key)[:16]}: another key signed it, or it was changed "
        f"after signing. Its signatures name {by}"
    )

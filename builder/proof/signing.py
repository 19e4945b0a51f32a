"""The farm's ed25519 key, and DSSE envelopes signed with it. The key is in a file for its owner alone, or in the environment.

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
"The private key itself (PEM), where a machine gets its secrets by the environment; else a file beside settings.toml."


def place() -> Path:
    """The key's file."""
    return config_path().with_name("signing-key.pem")


def create() -> Ed25519PublicKey:
    """Make the farm's key.

    Raises:
        UsageError: there is one; what it has signed could not be told from what another one signs.
    """
    path = place()
    path.parent.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UsageError(
            f"{path} is there already", remedy="move it away first; keep its public half, to verify old wheels"
        ) from error
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    return key.public_key()


def private() -> Ed25519PrivateKey | None:
    """The farm's key; None where there is none.

    Raises:
        ConfigError: others can read its file, or it is no ed25519 key.
    """
    if text := os.environ.get(VARIABLE):
        return _parse(text.encode(), VARIABLE)
    path = place()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} can be read by others than its owner", remedy=f"chmod 600 {path}")
    return _parse(path.read_bytes(), str(path))


def _parse(text: bytes, where: str) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        # Without the library's words and without a cause: neither may carry a part of the key into a log.
        raise ConfigError(f"{where} holds no ed25519 key in PEM", remedy="make one: builder key create") from None
    return key


def public(path: Path) -> Ed25519PublicKey:
    """A public key from a PEM file.

    Raises:
        ConfigError: it is none.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no public key in PEM: {error}", remedy="`builder key show` prints the farm's") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is no ed25519 key", remedy="`builder key show` prints the farm's")
    return key


def pem(key: Ed25519PublicKey) -> str:
    """A public key as people pass it on."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def key_id(key: Ed25519PublicKey) -> str:
    """Hex sha256 of the public key's DER."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def encoding(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed, so that a signature cannot be moved to another type."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(body), body)


def envelope(kind: str, body: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """`body` in a signed DSSE envelope."""
    signature = {"keyid": key_id(key.public_key()), "sig": base64.b64encode(key.sign(encoding(kind, body))).decode()}
    return {"payload": base64.b64encode(body).decode(), "payloadType": kind, "signatures": [signature]}


def opened(dsse: Mapping[str, Any], kind: str, key: Ed25519PublicKey) -> Any:
    """The JSON inside an envelope that this key signed.

    Raises:
        VerifyError: it is no envelope, is of another type, or no signature in it is this key's over these bytes.
    """
    try:
        body = base64.b64decode(dsse["payload"], validate=True)
        signatures = [
            (str(signature["keyid"]), base64.b64decode(signature["sig"], validate=True)) for signature in dsse["signatures"]
        ]
        payload_type = str(dsse["payloadType"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise VerifyError(f"the provenance is no DSSE envelope: {error!r}") from error
    if payload_type != kind:
        raise VerifyError(f"the provenance is of type {payload_type}, not {kind}")
    for _, signature in signatures:
        try:
            key.verify(signature, encoding(kind, body))
        except InvalidSignature:
            continue
        return json.loads(body)
    by = ", ".join(identifier[:16] for identifier, _ in signatures) or "nobody"
    raise VerifyError(f"the provenance is not signed by key {key_id(key)[:16]}, or was changed since; it names {by}")

"""The signed provenance of a wheel: an in-toto statement with SLSA provenance, rendered from the build's record.

https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from builder.planning.cargo_lock import Crate
from builder.planning.settings import Settings
from builder.proof import certificates, materials, record, signing
from builder.proof.certificates import Certificate
from builder.proof.record import Record
from gracefarm.files import atomic_write

PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:gracefarm:build:1"
"docs/explanation/provenance.md describes its parameters."


def statement(of: Record, builder_id: str, certified: Sequence[Certificate] = ()) -> dict[str, Any]:
    """The statement about a successful build, with the certificates that are valid for its device code."""
    assert of.wheel is not None
    products = [of.wheel, *([of.source] if of.source else [])]
    inputs: Any = of.inputs
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {"recipe": of.recipe, "stack": of.stack, "target": inputs["target"]},
        "internalParameters": {"buildId": of.build_id, "inputs": inputs, "toolchain": of.toolchain},
        "resolvedDependencies": _dependencies(inputs, of.crates),
    }
    run = {
        "builder": {"id": builder_id, "version": {"gracefarm": version("gracefarm")}},
        "byproducts": [_device_code(sm, digest, of, certified) for sm, digest in of.device_digests.items()],
        "metadata": {"invocationId": of.build_id, "finishedOn": of.finished.replace("+00:00", "Z")},
    }
    return {
        "_type": STATEMENT,
        "subject": [{"name": product.filename, "digest": {"sha256": product.sha256}} for product in products],
        "predicateType": PREDICATE,
        "predicate": {"buildDefinition": definition, "runDetails": run},
    }


def _dependencies(inputs: Any, crates: Sequence[Crate]) -> list[dict[str, Any]]:
    """Sources, crates, environment and compilers, by digest."""
    fetched = [
        {"name": material.what, "uri": material.uri, "digest": {material.algorithm: material.digest}}
        for material in (*materials.of(inputs), *map(materials.crate, crates))
        if material.digest
    ]
    ground = {name: inputs["stack"][name] for name in ("environment", "toolchain", "root")}
    return [*fetched, *({"name": name, "digest": {"sha256": digest}} for name, digest in ground.items() if digest)]


def _device_code(sm: str, digest: str, of: Record, certified: Sequence[Certificate]) -> dict[str, Any]:
    """The device code of one sm, and whether it was tested on a GPU."""
    known = [certificates.sentence(certificate, of) for certificate in certified if certificate.device_digest == digest]
    ran = known[0] if known else "the machine that signed this has no certificate for this device code"
    return {"name": f"device code for sm_{sm}", "digest": {"sha256": digest}, "annotations": {"certificate": ran}}


def path(wheel: Path) -> Path:
    """Path of a wheel's provenance, next to the wheel."""
    return wheel.with_name(f"{wheel.name}.intoto.jsonl")


def signed(of: Record, settings: Settings) -> Record:
    """The record with its signed provenance, which is also written next to the wheel; unchanged without a key.

    Raises:
        ConfigError: this machine's key cannot be used.
    """
    key = signing.private()
    if key is None or of.wheel is None:
        return of
    builder_id = f"urn:gracefarm:builder:ed25519:{signing.key_id(key.public_key())}"
    body = json.dumps(
        statement(of, builder_id, list(certificates.of_record(of, settings))), sort_keys=True, separators=(",", ":")
    ).encode()
    envelope = signing.envelope(PAYLOAD, body, key)
    wheel = record.folder(settings, of.build_id) / "dist" / of.wheel.filename
    atomic_write(path(wheel), json.dumps(envelope) + "\n")
    return of.model_copy(update={"provenance": envelope})

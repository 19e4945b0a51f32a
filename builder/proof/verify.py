"""Verify a wheel: compare RECORD, build id, SBOM and signed provenance with its bytes, each separately."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from packaging.utils import canonicalize_name, parse_wheel_filename

from builder.audit.contents import UNREADABLE, plainly_named
from builder.audit.gates.wheel import complaints
from builder.planning import local_version, pins
from builder.planning.pins import LockedWheel
from builder.planning.plan import id_of
from builder.planning.stack import Arch
from builder.proof import build_tag, provenance, sbom, signing
from gracefarm.errors import VerifyError
from gracefarm.files import sha256_file
from gracefarm.tables import Table
from gracefarm.variants import split_label


class WheelCheck(Table):
    """The result of one check of the wheel."""

    name: str
    ok: bool
    unchecked: bool = False
    "What the check needs is missing, so the wheel may be right."
    summary: str
    remedy: str = ""
    "What to do if the check was not possible."


class UncheckedError(VerifyError):
    """A check was not possible, because a file or a key is missing. The remedy says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Inside:
    """The documents in a wheel."""

    inputs: Mapping[str, Any]
    build_id: str
    sbom: str | None


def verify(wheel: Path, envelope: Path | None, key: Ed25519PublicKey | None) -> list[WheelCheck]:
    """Run all checks, even if one fails; `envelope` is the provenance (None: the file next to the wheel).

    Raises:
        VerifyError: the file is not a wheel, or gracefarm did not build it: it has no gracefarm.json.
    """
    inside = read(wheel)
    place = envelope or provenance.path(wheel)
    return [
        _check("record", lambda: _record(wheel)),
        _check("build-id", lambda: _build_id(wheel, inside)),
        _check("sbom", lambda: _sbom(inside)),
        _check("provenance", lambda: _provenance(wheel, inside, place, key)),
    ]


def require(wheel: Path, checks: list[WheelCheck], *, repeat: str) -> None:
    """Raise if a check failed.

    Raises:
        VerifyError: a check failed; names all failed checks.
    """
    failed = [f"{check.name}: {check.summary}" for check in checks if not check.ok and not check.unchecked]
    unchecked = [check for check in checks if check.unchecked]
    if failed:
        raise VerifyError(
            f"{wheel.name} failed its verification. {'; '.join(failed)}",
            remedy="do not install this wheel; download it again from its index, and verify the new file",
            repeat=repeat,
        )
    if unchecked:
        raise VerifyError(
            f"the {unchecked[0].name} of {wheel.name} was not checked: {unchecked[0].summary}",
            remedy=unchecked[0].remedy,
        )


def _check(name: str, judge: Callable[[], str]) -> WheelCheck:
    try:
        return WheelCheck(name=name, ok=True, summary=judge())
    except VerifyError as error:
        unchecked = isinstance(error, UncheckedError)
        return WheelCheck(name=name, ok=False, unchecked=unchecked, summary=error.cause, remedy=error.remedy or "")
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # JSON from elsewhere
        return WheelCheck(name=name, ok=False, summary=f"a document has an unexpected format: {error!r}")


def read(wheel: Path) -> Inside:
    """The deterministic part of the record and the SBOM inside a wheel.

    Raises:
        VerifyError: the wheel does not have them.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            place = next((name for name in names if name.endswith(".dist-info/gracefarm.json")), None)
            if place is None:
                raise VerifyError(f"{wheel.name} was not built by gracefarm: the wheel contains no gracefarm.json")
            content = json.loads(archive.read(place))
            document = f"{place.rpartition('/')[0]}/sboms/{sbom.FILENAME}"
            text = archive.read(document).decode() if document in names else None
            return Inside(inputs=content["inputs"], build_id=str(content["build_id"]), sbom=text)
    except (*UNREADABLE, OSError, ValueError, KeyError, TypeError) as error:
        raise VerifyError(f"{wheel.name} cannot be read: {error}") from error


def _record(wheel: Path) -> str:
    with plainly_named(wheel) as (plain, _):
        wrong = complaints(plain)
    if wrong:
        raise VerifyError("; ".join(wrong[:5]))
    return "every file matches RECORD"


def _build_id(wheel: Path, inside: Inside) -> str:
    """Check that the id is the hash of the inputs, and that the inputs are those of this wheel."""
    if id_of(inside.inputs) != inside.build_id:
        raise VerifyError(
            f"the digest of the inputs in the wheel is {id_of(inside.inputs)[:16]}, but its build id is {inside.build_id[:16]}"
        )
    name, version, _, _ = parse_wheel_filename(split_label(wheel.name)[0])
    recipe, stack = inside.inputs["recipe"], inside.inputs["stack"]
    known = local_version.could_be(version, recipe["version"], stack["cuda"], stack["torch"])
    if canonicalize_name(recipe["name"]) != name or not known:
        raise VerifyError(
            f"the file name of the wheel does not match its inputs, which are those of {recipe['name']} {recipe['version']}"
        )
    return inside.build_id


def _sbom(inside: Inside) -> str:
    """Check that the SBOM follows from the inputs, and that its list of the environment has the digest in the inputs."""
    if inside.sbom is None:
        raise VerifyError(f"the wheel has no SBOM (.dist-info/sboms/{sbom.FILENAME})")
    try:
        build_id, besides = sbom.read(inside.sbom)
    except ValueError as error:
        raise VerifyError(str(error)) from error
    if build_id != inside.build_id:
        raise VerifyError(f"the SBOM belongs to build {build_id[:16]}, but the wheel belongs to build {inside.build_id[:16]}")
    if sbom.render(inside.inputs, besides) != inside.sbom:
        raise VerifyError("the SBOM does not list the sources in the wheel's inputs, or it was changed after the build")
    wanted = inside.inputs["stack"]["environment"]
    installed = [
        LockedWheel(name=material.what, version=material.version or "", sha256=material.digest or "")
        for material in besides.installed
    ]
    if wanted is not None:
        digest = pins.digest_of("environment", inside.inputs["stack"]["python"], Arch(inside.inputs["target"]), installed)
        if digest != wanted:
            raise VerifyError(
                "the packages that the SBOM lists have a different digest than the environment in the wheel's inputs"
            )
    return f"lists the sources in the inputs, and {len(besides.installed)} packages of the environment"


def _provenance(wheel: Path, inside: Inside, place: Path, key: Ed25519PublicKey | None) -> str:
    if key is None:
        raise UncheckedError("no public key was given, and this machine has no signing key", remedy=signing.OF_A_WHEEL)
    try:
        envelope = json.loads(place.read_text())
    except FileNotFoundError as error:
        raise UncheckedError(
            f"there is no provenance at {place}",
            remedy="sign the build with `builder sign NAME` on the machine that built the wheel, or give the provenance with"
            " --provenance FILE",
        ) from error
    except OSError as error:
        raise UncheckedError(
            f"the provenance {place} cannot be read: {error.strerror}", remedy="give a readable file with --provenance FILE"
        ) from error
    except ValueError as error:
        raise VerifyError(f"{place} is not JSON: {error}") from error
    if isinstance(envelope, dict) and isinstance(envelope.get("provenance"), dict):
        envelope = envelope["provenance"]  # a complete record from an index
    signed = signing.opened(envelope, provenance.PAYLOAD, key)
    sha256 = sha256_file(wheel)
    subjects = {subject["name"]: subject["digest"].get("sha256") for subject in signed["subject"]}
    name = build_tag.split(wheel.name)[0]  # an index may have added a build tag
    if subjects.get(name) != sha256:
        raise VerifyError(
            f"the sha256 of the wheel is {sha256[:16]}, but the signed sha256 is {str(subjects.get(name))[:16]}"
            if name in subjects
            else f"the provenance is not about {wheel.name}, but about {', '.join(subjects)}"
        )
    inner = signed["predicate"]["buildDefinition"]["internalParameters"]
    if inner["buildId"] != inside.build_id or inner["inputs"] != json.loads(json.dumps(inside.inputs)):
        raise VerifyError(
            f"the provenance is about build {str(inner['buildId'])[:16]}, but the wheel is from build {inside.build_id[:16]}"
            if inner["buildId"] != inside.build_id
            else "the inputs in the provenance differ from the inputs in the wheel"
        )
    return f"signed by key {signing.key_id(key)[:16]}, sha256 {sha256[:16]}"

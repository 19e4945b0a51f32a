"""Certificates: signed statements that device code computed correct results on a GPU.

A machine with a GPU writes an unsigned report. The machine that built the wheels compares the report with these wheels, and
signs a certificate for each device digest. A wheel with the same digest has the same device code, so the certificate is valid
for it too, even if it is for another host architecture or Python. Host code is not covered.

A wheel can have code of several sm that one GPU can run, as 90 and 90a. Nothing reports which of them ran, so each certificate
names the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError

from builder.audit import device_digest
from builder.planning.settings import Settings
from builder.proof import record, signing
from builder.proof.record import Record
from builder.smoke import ComparedResult, GpuResult
from gracefarm.console import counted
from gracefarm.errors import ConfigError, VerifyError
from gracefarm.files import atomic_write, sha256_file
from gracefarm.tables import Sha256, Table

_REPORTED = {"gpu", "driver", "wheel", "comparisons", "negative_control"}
PAYLOAD = "application/vnd.gracefarm.certificate+json"


class TestedWheel(Table):
    """The wheel that ran on the GPU."""

    filename: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]{0,250}\.whl$")
    sha256: Sha256


class GpuReport(Table):
    """The unsigned report that `builder certify` writes on the machine with the GPU."""

    format: Literal[1] = 1
    wheel: TestedWheel
    device_digests: dict[str, Sha256] = Field(min_length=1)
    "Digests of the wheel's device code, by sm"
    gpu: str = Field(min_length=1, max_length=200)
    sm: str = Field(pattern=r"^[0-9]{2,3}$")
    "The GPU's architecture, as 90"
    driver: str = Field(default="", max_length=200)
    comparisons: tuple[ComparedResult, ...] = Field(min_length=1, max_length=1000)
    negative_control: str = Field(min_length=1, max_length=500)
    "A wrong result that the comparison refused"
    finished: str
    "UTC, ISO 8601"


class Certificate(Table):
    """The signed document, which the index keeps by device digest (docs/reference/index-records.md)."""

    device_digest: Sha256
    sm: str
    other_sm: tuple[str, ...] = ()
    "Other sm values of device code in the tested wheel that the GPU can run: the comparisons need not have run code for `sm`"
    gpu: str
    driver: str
    certified: str
    "Time of the test on the GPU (UTC, ISO 8601)"
    wheel: TestedWheel
    comparisons: tuple[ComparedResult, ...]
    negative_control: str


def report(wheel: Path, result: GpuResult, reader: Path) -> GpuReport:
    """The report about a wheel that smoke_gpu.py tested; `reader` is NVIDIA's cuobjdump.

    Raises:
        VerifyError: the test was not run or makes no comparisons, or the wheel has no device code for that GPU.
    """
    if result.status != "passed" or result.sm is None:
        raise VerifyError(
            f"{wheel.name} is not certified: {result.reason}",
            remedy="run the command on a machine with a GPU for which the wheel has code; its torch must find this GPU",
        )
    if not result.comparisons or not result.negative_control:
        raise VerifyError(
            f"{wheel.name} is not certified: its smoke_gpu.py has no comparisons or no negative control",
            remedy="set COMPARISONS and NEGATIVE_CONTROL in the script, as docs/howto/gpu.md describes",
        )
    digests = device_digest.of_wheel(wheel, reader)
    if not _loaded(digests, result.sm):
        raise VerifyError(
            f"{wheel.name} is not certified: it has PTX but no device code for sm_{result.sm}",
            remedy=f"build the wheel with device code for this GPU (--sm {result.sm}), then repeat the command",
        )
    return GpuReport(
        wheel=TestedWheel(filename=wheel.name, sha256=sha256_file(wheel)),
        device_digests=digests,
        gpu=result.device or "",
        sm=result.sm,
        driver=result.driver,
        comparisons=result.comparisons,
        negative_control=result.negative_control,
        finished=record.now(),
    )


def read_report(path: Path) -> GpuReport:
    """Read a report from a file.

    Raises:
        ConfigError: the file is not a report.
    """
    try:
        return GpuReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise ConfigError(
            f"{path} is not a report of `builder certify`: {reason}", remedy="use the file that `builder certify` wrote"
        ) from error


def accept(
    given: GpuReport, wheels: Mapping[str, Mapping[str, str]], key: Ed25519PrivateKey, settings: Settings
) -> list[Certificate]:
    """Sign and keep a certificate for each device digest of the report that a wheel of this machine has.

    `wheels`: for each wheel that this machine built, by sha256, its measured device digests by sm.

    Raises:
        VerifyError: no wheel of this machine has the device code of the report; names both digests.
    """
    loaded = _loaded(given.device_digests, given.sm)
    certificates = [
        Certificate(
            device_digest=digest,
            sm=sm,
            other_sm=tuple(sorted(loaded.keys() - {sm})),
            certified=given.finished,
            **given.model_dump(include=_REPORTED),
        )
        for sm, digest in _confirmed(given, wheels).items()
    ]
    for certificate in certificates:
        document = certificate.model_dump(mode="json")
        body = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        whole = document | {"envelope": signing.envelope(PAYLOAD, body, key)}
        atomic_write(path(settings, certificate.device_digest), json.dumps(whole, indent=2) + "\n")
    return certificates


def _confirmed(given: GpuReport, wheels: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The report's digests, by sm, that the GPU can run and that a wheel of this machine has."""
    own = wheels.get(given.wheel.sha256)
    loaded = _loaded(given.device_digests, given.sm)
    if own is not None and any(own.get(sm) != digest for sm, digest in loaded.items()):
        raise VerifyError(
            f"the device digests in the report about {given.wheel.filename} differ from those of the wheel",
            remedy="do not use this report: test the wheel again with `builder certify` on the machine with the GPU",
        )
    measured = {digest for digests in wheels.values() for digest in digests.values()}
    confirmed = {sm: digest for sm, digest in loaded.items() if digest in measured}
    if not confirmed:
        theirs = ", ".join(f"sm_{sm} {digest[:16]}" for sm, digest in loaded.items()) or f"none for sm_{given.sm}"
        here = sorted({f"sm_{sm} {digest[:16]}" for digests in wheels.values() for sm, digest in digests.items()})
        raise VerifyError(
            f"no wheel of this machine has the device code that the report about {given.wheel.filename} names. The report "
            f"names these digests: {theirs}. The wheels of this machine have these digests: {', '.join(here) or 'none'}",
            remedy="on this machine, build the wheel from the same recipe and stack and with the same --sm as the tested "
            "wheel; if you tested an x86_64 wheel to certify an aarch64 wheel, build the x86_64 wheel with --twin",
        )
    return confirmed


def _loaded(digests: Mapping[str, str], sm: str) -> dict[str, str]:
    """The digests of the code that such a GPU can run: that of its sm (90 and 90a), else the newest of its generation.

    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility
    """
    own = {name: digest for name, digest in digests.items() if re.sub(r"\D", "", name) == sm}
    older = [name for name in digests if name.isdigit() and name[:-1] == sm[:-1] and int(name) < int(sm)]
    return own or {name: digests[name] for name in sorted(older, key=int)[-1:]}


def path(settings: Settings, digest: str) -> Path:
    """Path of the certificate of a device digest."""
    return settings.home / "certificates" / f"{digest}.json"


def of_record(build: Record, settings: Settings) -> Iterator[Certificate]:
    """The certificates that are valid for a build's wheel."""
    for digest in build.device_digests.values():
        document = _read(path(settings, digest))
        if document is not None:
            yield document


def _read(place: Path) -> Certificate | None:
    """A certificate that this machine signed, or None. None also without the key, which the check of the signature needs."""
    key = signing.private()
    try:
        document: Any = json.loads(place.read_bytes())
        envelope = document.pop("envelope")
        certificate = Certificate.model_validate(document)
        if key is None or signing.opened(envelope, PAYLOAD, key.public_key()) != document:
            return None
    except (OSError, ValueError, KeyError, AttributeError, VerifyError):
        return None
    return certificate


def sentence(certificate: Certificate, build: Record) -> str:
    """The certificate in words, for `builder show` and the provenance."""
    own = build.wheel is not None and certificate.wheel.sha256 == build.wheel.sha256
    by = "this wheel" if own else f"its twin {certificate.wheel.filename}, which has the same device code"
    others = " and ".join(f"sm_{sm}" for sm in certificate.other_sm)
    doubt = (
        f"; this GPU can also run the code for {others} in the tested wheel, so it is not known whether the comparisons ran "
        f"code for sm_{certificate.sm}"
    )
    return (
        f"device code for sm_{certificate.sm} certified on {certificate.gpu} by {by}: "
        f"{counted(len(certificate.comparisons), 'comparison')}; host code is not covered" + (doubt if others else "")
    )

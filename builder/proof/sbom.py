"""The SBOM: contents of a wheel and of its build environment, as SPDX 2.3; deterministic, in .dist-info/sboms/ (PEP 770).

https://spdx.github.io/spdx-spec/v2.3/
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from packaging.utils import canonicalize_name

from builder.planning import pins
from builder.planning.cargo_lock import Crate
from builder.planning.plan import Plan, id_of
from builder.proof import materials
from builder.proof.materials import Material

FILENAME = "gracefarm.spdx.json"

_WHEEL = "SPDXRef-wheel"
_FIRST_USE = "digest read at first use on "
_REFERENCE = re.compile(r"LicenseRef-[A-Za-z0-9.-]+")
_GIT_OR_WEB = re.compile(r"^(git\+)?https?://")


@dataclass(frozen=True, kw_only=True)
class BundledFile:
    """A declared third-party file of the wheel."""

    path: str
    license: str
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class ReadAtFirstUse:
    """A digest that was accepted at first use and was not confirmed when the wheel was built."""

    sha256: str
    date: str
    "As 2026-11-29."


@dataclass(frozen=True, kw_only=True)
class Besides:
    """The contents of the document that are not in the build's inputs."""

    license: str
    "SPDX expression."
    version: str
    "Version of the wheel: the recipe's version with the measured local part."
    created: str
    "Time of the source (ISO 8601 with Z), so that the same inputs give the same document."
    bundled: tuple[BundledFile, ...] = ()
    crates: tuple[Material, ...] = ()
    "Crates of the source's Cargo.lock."
    installed: tuple[Material, ...] = ()
    "Distributions of the build environment."
    unconfirmed: tuple[ReadAtFirstUse, ...] = ()
    "Sorted by digest."


def of(plan: Plan, epoch: int, version: str, crates: Sequence[Crate] = ()) -> str:
    """The document of a plan's wheel with that version and crates; `epoch` is its SOURCE_DATE_EPOCH."""
    data = plan.recipe.data
    besides = Besides(
        license=data.license,
        version=version,
        created=datetime.fromtimestamp(epoch, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        bundled=tuple(BundledFile(path=file.path, license=file.license, sha256=file.sha256) for file in data.wheel.bundled),
        crates=tuple(map(materials.crate, crates)),
        installed=tuple(_installed(plan)),
        unconfirmed=unconfirmed(plan),
    )
    return render(json.loads(json.dumps(plan.inputs)), besides)


def unconfirmed(plan: Plan) -> tuple[ReadAtFirstUse, ...]:
    """The digests of a plan's sources and environment that were read at first use and have no witness."""
    rows = plan.inputs["first_use"]
    assert isinstance(rows, list)
    return tuple(ReadAtFirstUse(sha256=sha256, date=date) for sha256, date in rows)


def _installed(plan: Plan) -> list[Material]:
    stack = plan.toolchain.locked(plan.stack)
    if stack is None:
        return [materials.wheel(name, version, None) for name, version in sorted(plan.toolchain.installed(plan).items())]
    return [materials.wheel(wheel.name, wheel.version, wheel.sha256) for wheel in pins.wheels(stack, plan.target)]


def render(inputs: Mapping[str, Any], besides: Besides) -> str:
    """Render the document. It depends only on these two arguments, so that a reader can render it again and compare."""
    recipe, build_id = inputs["recipe"], id_of(inputs)
    name, version = canonicalize_name(recipe["name"]), besides.version
    own = _package(_WHEEL, name, version, license=besides.license, purl=f"pkg:pypi/{name}@{version}")
    sources = materials.of(inputs)
    if "licenses" in recipe:  # documents of earlier versions do not have it
        sources[0] = replace(sources[0], license=besides.license)
    bundled = [
        _package(f"SPDXRef-bundled-{number}", file.path, None, license=file.license, sha256=file.sha256)
        for number, file in enumerate(besides.bundled, 1)
    ]
    groups: list[tuple[list[dict[str, Any]], str, bool]] = [
        (_numbered("source", sources, besides.unconfirmed), "GENERATED_FROM", True),
        (_numbered("crate", besides.crates, ()), "GENERATED_FROM", True),
        (bundled, "CONTAINS", True),
        (_numbered("environment", besides.installed, besides.unconfirmed), "BUILD_DEPENDENCY_OF", False),
    ]
    relations = [_relation("SPDXRef-DOCUMENT", "DESCRIBES", _WHEEL)]
    for packages, kind, from_wheel in groups:
        for package in packages:
            pair = (_WHEEL, package["SPDXID"]) if from_wheel else (package["SPDXID"], _WHEEL)
            relations.append(_relation(pair[0], kind, pair[1]))
    document: dict[str, Any] = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{name}-{version}",
        "documentNamespace": f"urn:gracefarm:build:{build_id}",
        "creationInfo": {"created": besides.created, "creators": ["Tool: gracefarm"]},
        "packages": [own, *(package for packages, _, _ in groups for package in packages)],
        "relationships": relations,
    }
    declared = [
        besides.license,
        *(file.license for file in besides.bundled),
        *(source.license or "" for source in (*sources, *besides.crates)),
    ]
    if references := sorted(set(_REFERENCE.findall(" ".join(declared)))):
        document["hasExtractedLicensingInfos"] = [
            {"licenseId": reference, "extractedText": "No licence of SPDX's list; its text comes with the files that have it."}
            for reference in references
        ]
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def read(text: str) -> tuple[str, Besides]:
    """The build id in a document, and its contents that are not in the inputs.

    Raises:
        ValueError: this program did not write the document.
    """
    try:
        document = json.loads(text)
        packages = document["packages"]
        own = next(package for package in packages if package["SPDXID"] == _WHEEL)
        besides = Besides(
            license=own["licenseDeclared"],
            version=own["versionInfo"],
            created=document["creationInfo"]["created"],
            bundled=tuple(
                BundledFile(path=package["name"], license=package["licenseDeclared"], sha256=_checksum(package))
                for package in packages
                if package["SPDXID"].startswith("SPDXRef-bundled-")
            ),
            crates=tuple(
                materials.crate(_crate(package)) for package in packages if package["SPDXID"].startswith("SPDXRef-crate-")
            ),
            installed=tuple(
                materials.wheel(package["name"], package["versionInfo"], _checksum(package))
                for package in packages
                if package["SPDXID"].startswith("SPDXRef-environment-")
            ),
            unconfirmed=tuple(
                ReadAtFirstUse(sha256=sha256, date=date)
                for sha256, date in sorted(
                    {
                        str(_checksum(package)): str(package["comment"]).removeprefix(_FIRST_USE).partition(",")[0]
                        for package in packages
                        if package.get("comment", "").startswith(_FIRST_USE)
                    }.items()
                )
            ),
        )
        return str(document["documentNamespace"]).rpartition(":")[2], besides
    except (KeyError, TypeError, StopIteration, AttributeError) as error:
        raise ValueError(f"gracefarm did not write the SBOM: {error!r}") from error


def _crate(package: Mapping[str, Any]) -> Crate:
    declared = package["licenseDeclared"]
    return Crate(
        name=package["name"],
        version=package["versionInfo"],
        sha256=_checksum(package) or "",
        license=None if declared == "NOASSERTION" else declared,
    )


def _checksum(package: Mapping[str, Any]) -> str | None:
    return next(
        (checksum["checksumValue"] for checksum in package.get("checksums", []) if checksum["algorithm"] == "SHA256"), None
    )


def _numbered(kind: str, fetched: Sequence[Material], unconfirmed: Sequence[ReadAtFirstUse]) -> list[dict[str, Any]]:
    dates = {digest.sha256: digest.date for digest in unconfirmed}
    return [
        _package(
            f"SPDXRef-{kind}-{number}",
            material.what,
            material.version,
            license=material.license or "NOASSERTION",
            location=material.uri if _GIT_OR_WEB.match(material.uri) else None,
            purl=material.uri if material.uri.startswith("pkg:") else None,
            sha256=material.digest if material.algorithm == "sha256" else None,
            comment=f"{_FIRST_USE}{date}, not confirmed" if (date := dates.get(material.digest or "")) else None,
        )
        for number, material in enumerate(fetched, 1)
    ]


def _package(
    identifier: str,
    name: str,
    version: str | None,
    *,
    license: str = "NOASSERTION",  # noqa: A002 SPDX's word
    location: str | None = None,
    purl: str | None = None,
    sha256: str | None = None,
    comment: str | None = None,
) -> dict[str, Any]:
    package: dict[str, Any] = {
        "SPDXID": identifier,
        "name": name,
        "downloadLocation": location or "NOASSERTION",
        "filesAnalyzed": False,
        "licenseDeclared": license,
        "licenseConcluded": "NOASSERTION",
        "copyrightText": "NOASSERTION",
    }
    if version:
        package["versionInfo"] = version
    if sha256:
        package["checksums"] = [{"algorithm": "SHA256", "checksumValue": sha256}]
    if comment:
        package["comment"] = comment
    if purl:
        reference = {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl}
        package["externalRefs"] = [reference]
    return package


def _relation(element: str, kind: str, other: str) -> dict[str, str]:
    return {"spdxElementId": element, "relationshipType": kind, "relatedSpdxElement": other}

"""What is in a wheel and what it was built with, as SPDX 2.3: deterministic, at .dist-info/sboms/ (PEP 770).

https://spdx.github.io/spdx-spec/v2.3/
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from packaging.utils import canonicalize_name

from builder.planning import pins
from builder.planning.plan import Plan, id_of
from builder.proof import materials
from builder.proof.materials import Material

FILENAME = "gracefarm.spdx.json"

_WHEEL = "SPDXRef-wheel"
_REFERENCE = re.compile(r"LicenseRef-[A-Za-z0-9.-]+")
_GIT_OR_WEB = re.compile(r"^(git\+)?https?://")


@dataclass(frozen=True, kw_only=True)
class Bundled:
    """A third-party file that the wheel carries on purpose."""

    path: str
    license: str
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Besides:
    """What the document says beyond the build's inputs, which are all else of it."""

    license: str
    "SPDX expression."
    created: str
    "ISO 8601 with Z; of the source, so that the same inputs give the same document."
    bundled: tuple[Bundled, ...] = ()
    installed: tuple[Material, ...] = ()
    "Distributions of the environment that it was built in."


def of(plan: Plan, epoch: int) -> str:
    """The document of a plan's wheel; `epoch` is its SOURCE_DATE_EPOCH."""
    data = plan.recipe.data
    besides = Besides(
        license=data.license,
        created=datetime.fromtimestamp(epoch, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        bundled=tuple(Bundled(path=one.path, license=one.license, sha256=one.sha256) for one in data.wheel.bundled),
        installed=tuple(_installed(plan)),
    )
    return render(json.loads(json.dumps(plan.inputs)), besides)


def _installed(plan: Plan) -> list[Material]:
    if plan.machine is not None and not plan.machine.locked:
        return [materials.wheel(name, version, None) for name, version in sorted(plan.installed.items())]
    stack = plan.machine.base if plan.machine else plan.stack
    return [materials.wheel(one.name, one.version, one.sha256) for one in pins.wheels(stack, plan.target)]


def render(inputs: Mapping[str, Any], besides: Besides) -> str:
    """The document: a function of these two and of nothing else, so that a reader can make it again and compare."""
    recipe, build_id = inputs["recipe"], id_of(inputs)
    name, version = canonicalize_name(recipe["name"]), recipe["version"]
    own = _package(_WHEEL, name, version, license=besides.license, purl=f"pkg:pypi/{name}@{version}")
    groups: list[tuple[list[dict[str, Any]], str, bool]] = [
        (_numbered("source", materials.of(inputs)), "GENERATED_FROM", True),
        ([_bundled(number, one) for number, one in enumerate(besides.bundled, 1)], "CONTAINS", True),
        (_numbered("environment", besides.installed), "BUILD_DEPENDENCY_OF", False),
    ]
    relations = [_relation("SPDXRef-DOCUMENT", "DESCRIBES", _WHEEL)]
    for packages, kind, from_wheel in groups:
        for one in packages:
            pair = (_WHEEL, one["SPDXID"]) if from_wheel else (one["SPDXID"], _WHEEL)
            relations.append(_relation(pair[0], kind, pair[1]))
    document: dict[str, Any] = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{name}-{version}",
        "documentNamespace": f"urn:gracefarm:build:{build_id}",
        "creationInfo": {"created": besides.created, "creators": ["Tool: gracefarm"]},
        "packages": [own, *(one for packages, _, _ in groups for one in packages)],
        "relationships": relations,
    }
    if references := sorted(set(_REFERENCE.findall(" ".join([besides.license, *(one.license for one in besides.bundled)])))):
        document["hasExtractedLicensingInfos"] = [
            {"licenseId": one, "extractedText": "No licence of SPDX's list; its text comes with the files that have it."}
            for one in references
        ]
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def read(text: str) -> tuple[str, Besides]:
    """The build id that a document names, and what it says besides the inputs.

    Raises:
        ValueError: it is not a document of ours.
    """
    try:
        document = json.loads(text)
        packages = document["packages"]
        own = next(one for one in packages if one["SPDXID"] == _WHEEL)
        besides = Besides(
            license=own["licenseDeclared"],
            created=document["creationInfo"]["created"],
            bundled=tuple(
                Bundled(path=one["name"], license=one["licenseDeclared"], sha256=_checksum(one))
                for one in packages
                if one["SPDXID"].startswith("SPDXRef-bundled-")
            ),
            installed=tuple(
                materials.wheel(one["name"], one["versionInfo"], _checksum(one))
                for one in packages
                if one["SPDXID"].startswith("SPDXRef-environment-")
            ),
        )
        return str(document["documentNamespace"]).rpartition(":")[2], besides
    except (KeyError, TypeError, StopIteration, AttributeError) as error:
        raise ValueError(f"it is not an SBOM that this program wrote: {error!r}") from error


def _checksum(package: Mapping[str, Any]) -> str | None:
    return next((one["checksumValue"] for one in package.get("checksums", []) if one["algorithm"] == "SHA256"), None)


def _numbered(kind: str, found: Sequence[Material]) -> list[dict[str, Any]]:
    return [_material(f"SPDXRef-{kind}-{number}", one) for number, one in enumerate(found, 1)]


def _material(identifier: str, one: Material) -> dict[str, Any]:
    web = _GIT_OR_WEB.match(one.uri) is not None
    return _package(
        identifier,
        one.what,
        one.version,
        location=one.uri if web else None,
        purl=one.uri if one.uri.startswith("pkg:") else None,
        sha256=one.digest if one.algorithm == "sha256" else None,
    )


def _bundled(number: int, one: Bundled) -> dict[str, Any]:
    return _package(f"SPDXRef-bundled-{number}", one.path, None, license=one.license, sha256=one.sha256)


def _package(
    identifier: str,
    name: str,
    version: str | None,
    *,
    license: str = "NOASSERTION",  # noqa: A002 SPDX's word
    location: str | None = None,
    purl: str | None = None,
    sha256: str | None = None,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "SPDXID": identifier,
        "name": name,
        "downloadLocation": location or "NOASSERTION",
        "filesAnalyzed": False,
        "licenseDeclared": license,
        "licenseConcluded": "NOASSERTION",
        "copyrightText": "NOASSERTION",
    }
    if version:
        found["versionInfo"] = version
    if sha256:
        found["checksums"] = [{"algorithm": "SHA256", "checksumValue": sha256}]
    if purl:
        reference = {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl}
        found["externalRefs"] = [reference]
    return found


def _relation(one: str, kind: str, other: str) -> dict[str, str]:
    return {"spdxElementId": one, "relationshipType": kind, "relatedSpdxElement": other}

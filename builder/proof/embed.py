"""Finish the wheel's metadata: version, variant label, licences, SBOM, RECORD."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from auditwheel.tools import dir2zip, zip2dir
from auditwheel.wheeltools import rewrite_record
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from builder.audit import dependence, variant
from builder.audit.contents import UNREADABLE, opened
from builder.audit.policy import Policy
from builder.planning import local_version
from builder.planning.cargo_lock import Crate
from builder.planning.plan import Plan
from builder.proof import sbom
from gracefarm import variants
from gracefarm.errors import WheelError
from gracefarm.files import remove_tree

LICENSE_FILES_SINCE = Version("2.4")
"Version of core metadata (PEP 639)."
REMEDY = "see the log of the package's build, and add a patch to the recipe that fixes the package's metadata"


def embed(wheel: Path, plan: Plan, epoch: int, licenses: Path, into: Path, crates: Sequence[Crate] = ()) -> Path:
    """The wheel with its measured version, with the deterministic part of the record in .dist-info/gracefarm.json, and with an
    updated RECORD. All times are `epoch`.

    `licenses` is the folder of the texts that the recipe names, with their paths in the source tree. They are copied to
    .dist-info/licenses with the same paths (PEP 639). The SBOM lists the `crates`.

    Raises:
        WheelError: the file is not a wheel.
    """
    remove_tree(into)
    tree = into / "tree"
    tree.mkdir(parents=True)
    try:
        version = measured_version(wheel, plan)
        zip2dir(wheel, tree)
    except UNREADABLE as error:
        raise WheelError(f"the built wheel {wheel.name} cannot be unpacked: {error}", remedy=REMEDY) from error
    information = next(tree.glob("*.dist-info"), tree)
    if not (information / "METADATA").is_file():
        raise WheelError(f"the built wheel {wheel.name} has no METADATA in .dist-info", remedy=REMEDY)
    filename = wheel.name
    if version is not None:
        filename, information = _rename(tree, information, filename, version)
    _write(information, plan, licenses, sbom.of(plan, epoch, _version_of(filename), crates))
    return _pack(tree, into / filename, epoch)


def measured_version(wheel: Path, plan: Plan) -> str | None:
    """The recipe's version, with the local part for the dependence of the built wheel's objects.

    None: the wheel has another version, which the gate `wheel` refuses.

    Raises:
        one of UNREADABLE: the file is not a wheel.
    """
    data, stack = plan.recipe.data, plan.stack
    if not local_version.is_of(_version_of(wheel.name), data.version, data.wheel.appends):
        return None
    with opened(wheel) as contents:
        needed = dependence.measure(contents, plan.target)
    torch = stack.torch.version if stack.torch is not None and needed.torch else None
    return local_version.named(data.version, stack.data.cuda if needed.cuda else None, torch)


def label(wheel: Path, policy: Policy, epoch: int, into: Path) -> Path:
    """The wheel as a variant wheel with its measured properties: with variant.json in it and the label in its name.

    Raises:
        WheelError: the measured properties cannot be expressed as a variant.
    """
    remove_tree(into)
    tree = into / "tree"
    tree.mkdir(parents=True)
    with opened(wheel) as contents:
        try:
            measured = variant.measure(contents, policy)
        except variant.UnlabelledError as error:
            raise WheelError(f"{wheel.name} cannot be labelled: {error}", remedy="omit --variant") from error
    zip2dir(wheel, tree)
    (next(tree.glob("*.dist-info")) / variants.MEMBER).write_bytes(variant.document(measured))
    return _pack(tree, into / f"{wheel.stem}-{measured.label}.whl", epoch)


def _version_of(filename: str) -> str:
    return [*filename.split("-"), ""][1]


def _rename(tree: Path, information: Path, filename: str, version: str) -> tuple[str, Path]:
    """Change the version in METADATA and in the name of .dist-info; return the new file name and .dist-info."""
    stem = information.name.removesuffix(".dist-info")
    new = f"{stem.rpartition('-')[0]}-{version}"
    for kind in ("data", "dist-info"):
        if (tree / f"{stem}.{kind}").is_dir():
            (tree / f"{stem}.{kind}").rename(tree / f"{new}.{kind}")
    information = tree / f"{new}.dist-info"
    metadata = information / "METADATA"
    text = metadata.read_text("utf-8", "surrogateescape")
    name, old, rest = filename.split("-", 2)
    match = re.search(r"(?mi)^Version:[ \t]*(\S+)", text)
    if match is not None and local_version.same(match[1], old):  # else METADATA is wrong, and the gate `wheel` refuses it
        metadata.write_text(f"{text[: match.start(1)]}{version}{text[match.end(1) :]}", "utf-8", "surrogateescape")
    return f"{name}-{version}-{rest}", information


def _write(information: Path, plan: Plan, licenses: Path, document: str) -> None:
    """Write our files into .dist-info."""
    text = json.dumps({"build_id": plan.build_id, "inputs": plan.inputs}, indent=2, sort_keys=True) + "\n"
    (information / "gracefarm.json").write_text(text)
    (information / "sboms").mkdir(exist_ok=True)
    (information / "sboms" / sbom.FILENAME).write_text(document)
    texts = plan.recipe.data.wheel.licenses
    for name in texts:
        place = information / "licenses" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(licenses / name, place)
    metadata = information / "METADATA"
    text = require(metadata.read_text("utf-8", "surrogateescape"), plan.recipe.data.wheel.requires)
    metadata.write_text(name_licenses(text, texts), "utf-8", "surrogateescape")


def _pack(tree: Path, final: Path, epoch: int) -> Path:
    """Pack an unpacked wheel with an updated RECORD."""
    rewrite_record(tree)
    dir2zip(tree, final, zlib.Z_DEFAULT_COMPRESSION, datetime.fromtimestamp(epoch, tz=UTC))
    remove_tree(tree)
    return final


def require(metadata: str, requires: Mapping[str, str]) -> str:
    """METADATA with the recipe's Requires-Dist instead of the package's for these distributions; extras are not changed.

    Packages often require a distribution only on x86_64, or any newer version. This makes them require the set's version.
    """
    if not requires:
        return metadata
    headers, separator, body = metadata.partition("\n\n")
    wanted = {canonicalize_name(name) for name in requires}
    kept = [line for line in headers.splitlines() if _required(line) not in wanted]
    last = max((number for number, line in enumerate(kept) if line.startswith("Requires-Dist:")), default=len(kept) - 1)
    kept[last + 1 : last + 1] = [f"Requires-Dist: {text}" for _, text in sorted(requires.items())]
    return "\n".join(kept) + separator + body


def name_licenses(metadata: str, texts: Sequence[str]) -> str:
    """METADATA with a License-File for each text; unchanged before version 2.4, which has no such field."""
    headers, separator, body = metadata.partition("\n\n")
    fields = headers.splitlines()
    version = next((line.partition(":")[2].strip() for line in fields if line.startswith("Metadata-Version:")), "")
    try:
        if Version(version) < LICENSE_FILES_SINCE:
            return metadata
    except InvalidVersion:
        return metadata  # the gate `wheel` refuses it
    missing = [line for line in (f"License-File: {text}" for text in sorted(texts)) if line not in fields]
    return "\n".join([*fields, *missing]) + separator + body if missing else metadata


def _required(line: str) -> str | None:
    """The distribution that a header requires; None for other headers, for extras, and for invalid requirements."""
    if not line.startswith("Requires-Dist:"):
        return None
    try:
        requirement = Requirement(line.partition(":")[2].strip())
    except InvalidRequirement:
        return None
    return None if requirement.marker and "extra" in str(requirement.marker) else canonicalize_name(requirement.name)

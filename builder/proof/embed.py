"""The deterministic part of the record, inside the wheel."""

from __future__ import annotations

import json
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

from builder.audit.contents import UNREADABLE
from builder.planning.plan import Plan
from builder.proof import sbom
from gracefarm.errors import WheelError
from gracefarm.files import remove_tree

LICENSE_FILES_SINCE = Version("2.4")
"Of core metadata (PEP 639)."
REMEDY = "the package's own build made it: see its log, and patch it in the recipe"


def embed(wheel: Path, plan: Plan, epoch: int, licenses: Path, into: Path) -> Path:
    """The wheel with the deterministic part of the record as .dist-info/gracefarm.json; RECORD renewed, times are `epoch`.

    `licenses` is the folder of the texts that the recipe names, each at its place in the source tree: they go into
    .dist-info/licenses at the same place (PEP 639).

    Raises:
        WheelError: what the build calls a wheel is none.
    """
    text = json.dumps({"build_id": plan.build_id, "inputs": plan.inputs}, indent=2, sort_keys=True) + "\n"
    remove_tree(into)
    tree = into / "tree"
    tree.mkdir(parents=True)
    try:
        zip2dir(wheel, tree)
    except UNREADABLE as error:
        raise WheelError(f"{wheel.name} of the build cannot be unpacked: {error}", remedy=REMEDY) from error
    information = next(tree.glob("*.dist-info"), tree)
    if not (information / "METADATA").is_file():
        raise WheelError(f"{wheel.name} of the build has no .dist-info with METADATA", remedy=REMEDY)
    (information / "gracefarm.json").write_text(text)
    (information / "sboms").mkdir(exist_ok=True)
    (information / "sboms" / sbom.FILENAME).write_text(sbom.of(plan, epoch))
    texts = plan.recipe.data.wheel.licenses
    for name in texts:
        place = information / "licenses" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(licenses / name, place)
    metadata = information / "METADATA"
    text = require(metadata.read_text("utf-8", "surrogateescape"), plan.recipe.data.wheel.requires)
    metadata.write_text(name_licenses(text, texts), "utf-8", "surrogateescape")
    rewrite_record(tree)
    final = into / wheel.name
    dir2zip(tree, final, zlib.Z_DEFAULT_COMPRESSION, datetime.fromtimestamp(epoch, tz=UTC))
    remove_tree(tree)
    return final


def require(metadata: str, requires: Mapping[str, str]) -> str:
    """METADATA with the recipe's own Requires-Dist in place of what the package says of these distributions, extras apart.

    A package that requires something on x86_64 alone, or any newer version, is thereby made to require what the set has.
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
    """METADATA with a License-File for each text that it lacks; unchanged before version 2.4, which has no such field."""
    headers, separator, body = metadata.partition("\n\n")
    fields = headers.splitlines()
    version = next((line.partition(":")[2].strip() for line in fields if line.startswith("Metadata-Version:")), "")
    try:
        if Version(version) < LICENSE_FILES_SINCE:
            return metadata
    except InvalidVersion:
        return metadata  # which the gate `wheel` has a word about
    missing = [line for line in (f"License-File: {text}" for text in sorted(texts)) if line not in fields]
    return "\n".join([*fields, *missing]) + separator + body if missing else metadata


def _required(line: str) -> str | None:
    """The distribution that a header requires; None for every other header for extras, and for what is no requirement."""
    if not line.startswith("Requires-Dist:"):
        return None
    try:
        requirement = Requirement(line.partition(":")[2].strip())
    except InvalidRequirement:
        return None
    return None if requirement.marker and "extra" in str(requirement.marker) else canonicalize_name(requirement.name)

"""Core metadata of a distribution: the bytes that PEP 658 serves, and the few fields the index reads."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.metadata import parse_email
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from index.errors import RefusedError
from index.names import Distribution, same_version

MAX_METADATA = 8 << 20
"Bytes. The description may be long; eight MiB is no description."


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What the pages show of METADATA or PKG-INFO."""

    raw: bytes
    "Byte-identical to the file in the archive: pip compares (pip#13983)."
    summary: str
    requires_python: str | None
    requires: tuple[str, ...]


def read(raw: bytes, distribution: Distribution) -> Metadata:
    """Parse and check against the file name.

    Raises:
        RefusedError: not core metadata, or of another project or version.
    """
    fields, _unparsed = parse_email(raw)
    name, version = fields.get("name"), fields.get("version")
    if not name or not version or not fields.get("metadata_version"):
        raise RefusedError(
            f"{distribution.filename}: its metadata lacks Metadata-Version, Name or Version",
            remedy="build it with a PEP 517 backend",
        )
    if canonicalize_name(name) != distribution.project:
        raise RefusedError(
            f"{distribution.filename}: its metadata is of project {name!r}",
            remedy="the file was renamed or built wrongly; build it again",
        )
    if not same_version(version, distribution.version):
        raise RefusedError(
            f"{distribution.filename}: its metadata is of version {version!r}",
            remedy="the file was renamed or built wrongly; build it again",
        )
    return Metadata(
        raw=raw,
        summary=(fields.get("summary") or "").split("\n")[0][:512],
        requires_python=_specifier(fields.get("requires_python"), distribution),
        requires=tuple(fields.get("requires_dist", ())),
    )


def _specifier(text: str | None, distribution: Distribution) -> str | None:
    if not text:
        return None
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        raise RefusedError(
            f"{distribution.filename}: Requires-Python {text!r} is not a version specifier",
            remedy="see PEP 440; installers would ignore it",
        ) from None
    return text

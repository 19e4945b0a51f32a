"""The build tag of a wheel on an index (PEP 427): if other bytes have its name, the name gets the next number.

The tag is only in the name. The bytes are those of the record, so digest, provenance and locks stay valid, and equal inputs
give equal bytes on every index. Installers choose the file with the highest tag among files with otherwise equal names.
"""

from __future__ import annotations

from collections.abc import Mapping


def split(filename: str) -> tuple[str, int]:
    """A wheel's file name without its build tag, and the number of the tag; 0: it has no tag. The label of a variant stays."""
    parts = filename.split("-")
    if len(parts) < 6 or not parts[2][:1].isdigit():
        return filename, 0
    digits = len(parts[2]) - len(parts[2].lstrip("0123456789"))
    return "-".join([*parts[:2], *parts[3:]]), int(parts[2][:digits])


def tagged(filename: str, number: int) -> str:
    """The file name with that build tag; 0: without a tag."""
    plain = split(filename)[0]
    name, version, rest = plain.split("-", 2)
    return f"{name}-{version}-{number}-{rest}" if number else plain


def choose(filename: str, sha256: str, offered: Mapping[str, str | None]) -> tuple[str, str | None]:
    """The name for a wheel on an index with these files (sha256 by name), and the newest file with its name and other bytes.

    The name is its own, or the name that its bytes have there already, or has the next build tag.
    """
    alike = {split(name)[1]: name for name in offered if split(name)[0] == filename}
    for name in alike.values():
        if offered[name] == sha256:
            return name, None
    if not alike:
        return filename, None
    newest = max(alike)
    return tagged(filename, newest + 1), alike[newest]

"""WHEEL and the .data folders of a wheel (PEP 427). pip and uv select a release before they read these.

So if they fail on them, `pip install NAME` fails, although an older release is valid. No such file is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from email.parser import HeaderParser

from packaging.tags import parse_tag

from index.intake.defects import Defects

SCHEMES = ("purelib", "platlib", "headers", "scripts", "data")
"Folders that a .data folder may contain."

_VERSION = re.compile(r"([0-9]{1,9})\.[0-9]{1,9}(\.[0-9]{1,9})*\Z")
"pip reads 1 as a version too, but uv does not."

_BACKEND = "build the wheel again with a current PEP 517 backend"


def check(raw: bytes, defects: Defects) -> None:
    """Check the version and the tags in WHEEL. Root-Is-Purelib is not checked: without it, installers use platlib.

    Raises:
        RefusedError: installers cannot read it. A new upload is also refused if it lists other tags than the file name.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        defects.refuse(f"its WHEEL file is not UTF-8: byte {raw[error.start]:#04x}", remedy=_BACKEND)
    # The parsers of pip and uv disagree on names in lower case and on lines before the first field.
    versions = [value.strip() for name, value in HeaderParser().parsestr(text).items() if name == "Wheel-Version"]
    if not versions:
        defects.refuse("its WHEEL file lacks Wheel-Version", remedy=_BACKEND)
    for version in versions:
        match = _VERSION.match(version)
        if match is None:
            defects.refuse(f"its WHEEL file has the invalid Wheel-Version {version[:40]!r}", remedy=_BACKEND)
        if int(match[1]) > 1:
            defects.refuse(
                f"its WHEEL file has Wheel-Version {version[:40]}, but installers read only 1.x",
                remedy="build the wheel again with a backend that writes Wheel-Version 1.0",
            )
    _check_tags(text, defects)


def _check_tags(text: str, defects: Defects) -> None:
    """The tags must be those of the file name. Installers read the name, other tools read WHEEL."""
    remedy = "retag the wheel with `python -m wheel tags`, which changes the file name and the WHEEL file"
    values = [value.strip() for value in HeaderParser().parsestr(text).get_all("Tag", ())]
    if not values:
        defects.note("its WHEEL file lists no tags", remedy=_BACKEND)
        return
    if malformed := [value for value in values if value.count("-") != 2]:
        defects.note(f"its WHEEL file has the invalid tag {malformed[0][:80]!r}", remedy=_BACKEND)
        return
    tags = {tag for value in values for tag in parse_tag(value)}
    if tags != defects.distribution.tags:
        defects.note(
            f"its WHEEL file has other tags than the file name: {', '.join(sorted(map(str, tags)))[:300]}", remedy=remedy
        )


def check_data(names: Iterable[str], defects: Defects) -> None:
    """Check that each .data folder contains only folders of known schemes.

    Raises:
        RefusedError: it contains something else. pip then fails on each folder with this ending, uv on the wheel's folder.
    """
    for name in names:
        top, *path = name.split("/", 2)
        if not top.endswith(".data") or path == [""]:
            continue
        if len(path) < 2 or path[0] not in SCHEMES:
            defects.refuse(
                f"it contains {name[:200]!r}, which belongs to no install scheme",
                remedy=f"build the wheel with only the folders {', '.join(SCHEMES)} in a .data folder (PEP 427)",
            )
        if path[0] == "scripts" and "/" in path[1]:  # uv fails on it
            defects.refuse(
                f"it contains {name[:200]!r}, a folder among the scripts", remedy="put each script directly into scripts/"
            )

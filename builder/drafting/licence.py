"""The licence of a source tree, as SPDX writes it, and the texts of code that is compiled in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from builder.drafting.findings import Findings
from builder.drafting.metadata import SourceMetadata

UNKNOWN = "LicenseRef-unknown"
MOST_TEXTS = 12
_FILE = re.compile(r"(?:LICEN[CS]E|COPYING|NOTICE)(?:[.-].*)?", re.IGNORECASE)
_NO_TEXT = re.compile(r".*\.(?:py|c|h|cpp|cu|cmake)", re.IGNORECASE)
_VENDORED = re.compile(
    r"third[-_]?party|3rd[-_]?party|vendor(?:ed)?|extern(?:al)?|deps|submodules?|csrc|bundled", re.IGNORECASE
)
_CLASSIFIER = "License :: OSI Approved :: "
_CLASSIFIERS: Mapping[str, str] = MappingProxyType(
    {
        "Apache Software License": "Apache-2.0",
        "MIT License": "MIT",
        "ISC License (ISCL)": "ISC",
        "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
        "GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
        "GNU General Public License v3 or later (GPLv3+)": "GPL-3.0-or-later",
        "GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
        "GNU Affero General Public License v3": "AGPL-3.0-only",
        "GNU Affero General Public License v3 or later (AGPLv3+)": "AGPL-3.0-or-later",
        "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
        "Boost Software License 1.0 (BSL-1.0)": "BSL-1.0",
        "The Unlicense (Unlicense)": "Unlicense",
        "zlib/libpng License": "Zlib",
    }
)
"Classifiers that mean one licence; `BSD License` means several."
_TEXTS = (
    ("Apache-2.0", r"Apache License,? *\n? *Version 2\.0"),
    ("AGPL-3.0-only", r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3"),
    ("LGPL-3.0-only", r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3"),
    ("LGPL-2.1-only", r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 2\.1"),
    ("GPL-3.0-only", r"GNU GENERAL PUBLIC LICENSE\s+Version 3"),
    ("GPL-2.0-only", r"GNU GENERAL PUBLIC LICENSE\s+Version 2"),
    ("MPL-2.0", r"Mozilla Public License,? Version 2\.0|Mozilla Public License Version 2\.0"),
    ("BSL-1.0", r"Boost Software License - Version 1\.0"),
    (
        "BSD-3-Clause",
        r"(?s)Redistribution and use in source and binary forms.*(?:Neither the names? of|may not be used to endorse)",
    ),
    ("BSD-2-Clause", r"Redistribution and use in source and binary forms"),
    ("MIT", r"Permission is hereby granted, free of charge, to any person obtaining a\s+copy"),
    ("ISC", r"Permission to use, copy, modify, and(?:/or)? distribute this software"),
    ("Unlicense", r"This is free and unencumbered software released into the public domain"),
    ("CC0-1.0", r"CC0 1\.0 Universal"),
)
"Words that identify a licence. A longer licence comes before the one that it contains."


def find(tree: Path, metadata: SourceMetadata, findings: Findings) -> str:
    """The SPDX expression of the package."""
    for name, origin in _said(metadata):
        try:
            expression = canonicalize_license_expression(name)
        except InvalidLicenseExpression:
            continue
        findings.read("license", expression, origin)
        return str(expression)
    for place in _files(tree):
        if (spdx := of_text(place)) is not None:
            findings.read("license", spdx, f"the text of {place.name}")
            return spdx
    findings.guess("license", UNKNOWN, "no file names a licence that SPDX lists, so the wheel is not published by default")
    return UNKNOWN


def _said(metadata: SourceMetadata) -> Iterator[tuple[str, str]]:
    """What PKG-INFO and pyproject.toml call the licence, the clearest first."""
    if line := metadata.first("License-Expression"):
        yield line.value, line.place
    declared = metadata.table("project").get("license")
    if isinstance(declared, str):
        yield declared, metadata.line("license")
    for line in metadata.headers.get("classifier", ()):
        if spdx := _CLASSIFIERS.get(line.value.removeprefix(_CLASSIFIER)):
            yield spdx, line.place
    if line := metadata.first("License"):
        yield line.value, line.place


def _files(folder: Path) -> list[Path]:
    return sorted(
        place
        for place in folder.iterdir()
        if _FILE.fullmatch(place.name) and not _NO_TEXT.fullmatch(place.name) and place.is_file()
    )


def of_text(place: Path) -> str | None:
    """The licence whose words a file has; None: none that is known here."""
    text = place.read_text(encoding="utf-8", errors="replace")
    return next((spdx for spdx, words in _TEXTS if re.search(words, text, re.IGNORECASE)), None)


def of_folder(folder: Path) -> str | None:
    """The licence of a folder, by its texts."""
    return next((spdx for place in _files(folder) if (spdx := of_text(place)) is not None), None)


def vendored(tree: Path) -> list[str]:
    """Licence texts of code of others that the tree carries, by place; at most MOST_TEXTS of them."""
    texts: list[str] = []
    for top in sorted(tree.iterdir()):
        if not top.is_dir() or top.is_symlink() or not _VENDORED.fullmatch(top.name):
            continue
        for folder in [top, *sorted(inner for inner in top.iterdir() if inner.is_dir() and not inner.is_symlink())]:
            texts += [str(place.relative_to(tree)) for place in _files(folder) if place.stat().st_size]
    return texts[:MOST_TEXTS]

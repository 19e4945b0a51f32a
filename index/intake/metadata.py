"""Core metadata of a distribution: the bytes that PEP 658 serves, and the few fields the index reads.

`packaging.metadata` validates it, as it does for PyPI. PyPI also checks fields that no installer reads; this index does not
check them: classifiers (the list grows each month), the form of email addresses, and whether a description can be rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import packaging.metadata
from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.metadata import InvalidMetadata, RawMetadata, parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from index.errors import RefusedError
from index.intake.defects import Defects
from index.names import Distribution, same_version

MAX_METADATA = 8 << 20
"Maximum bytes. A description may be long, but not eight MiB."

MAX_FIELDS = 5000
"Maximum fields before the description. The longest known list of dependencies has a thousand. Parsing time is quadratic."

MAX_SUMMARY = 512
"Maximum characters, as on PyPI."

MAX_SPECIFIER = 4000
"Maximum characters of a dependency, Requires-Python or a content type. Python does not convert more than 4,300 digits."

_TOO_LONG = f"is longer than {MAX_SPECIFIER} characters"

_MAX_DEPTH = 50
"Maximum nested parentheses in a marker. pip recurses and fails with a traceback at about 300."

_BACKEND = (
    "correct the metadata in pyproject.toml and build again; see https://packaging.python.org/specifications/core-metadata"
)


class HasFile(Protocol):
    """Whether the archive has a licence file of that name in the folder that PEP 639 names."""

    def __call__(self, name: str, /) -> bool:
        """`name` is a value of License-File."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The fields of METADATA or PKG-INFO that the pages show."""

    raw: bytes
    "Byte-identical to the file in the archive: pip compares (pip#13983)."
    summary: str
    requires_python: str | None
    requires: tuple[str, ...]


def read(raw: bytes, defects: Defects, has_file: HasFile) -> Metadata:
    """Parse the metadata, and check it against the file name and the standards.

    Raises:
        RefusedError: it names another project or version, or installers would fail on the whole project. A new upload is
            also refused for anything that `packaging.metadata` or PyPI refuses; for other files `defects` lists it.
    """
    distribution = defects.distribution
    _check_length(raw, distribution)
    _check_encoding(raw, defects)
    fields, unparsed = parse_email(raw)
    _check_identity(fields, distribution)
    for line in fields.get("requires_dist", ()):
        _check_dependency("Requires-Dist", line, _fatal_in(line), distribution)
    if len(python := fields.get("requires_python", "")) > MAX_SPECIFIER:
        _check_dependency("Requires-Python", python, _TOO_LONG, distribution)
    if problems := [*_problems(fields, unparsed), *_missing_licences(fields, has_file)]:
        defects.note("; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if problems[3:] else ""), remedy=_BACKEND)
    return Metadata(
        raw=raw,
        summary=(fields.get("summary") or "").split("\n")[0][:MAX_SUMMARY],
        requires_python=_specifier(fields.get("requires_python")),
        requires=tuple(fields.get("requires_dist", ())),
    )


def _check_length(raw: bytes, distribution: Distribution) -> None:
    head = re.split(rb"\r?\n\r?\n|\r\r", raw, maxsplit=1)[0]
    count = sum(not line[:1].isspace() for line in head.splitlines())
    if count > MAX_FIELDS:
        raise RefusedError(
            f"{distribution.filename}: its metadata has {count} fields, more than {MAX_FIELDS}",
            remedy="remove fields from the metadata and build again",
        )


def _check_encoding(raw: bytes, defects: Defects) -> None:
    """If one wheel's METADATA is not UTF-8, pip fails with a traceback on every release of the project (pypa/pip#9866)."""
    try:
        raw.decode()
        return
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        where = f"byte {raw[error.start]:#04x} in line {line}"
    if defects.distribution.kind == "sdist":  # installers read the metadata of the wheel that they build from it
        defects.note(f"its PKG-INFO is not UTF-8: {where}", remedy="write PKG-INFO as UTF-8, and build again")
        return
    raise RefusedError(
        f"{defects.distribution.filename}: its METADATA is not UTF-8: {where}",
        remedy="write METADATA as UTF-8 and build again; if the index accepted this file, pip would fail for every release of "
        "the project",
    )


def _check_dependency(field: str, line: str, reason: str, distribution: Distribution) -> None:
    if reason:
        raise RefusedError(
            f"{distribution.filename}: {field} {line[:200]!r} {reason}",
            remedy="correct the field and build again; with this file, installers fail on every release of the project",
        )


def _fatal_in(line: str) -> str:
    """Why installers would fail on this dependency, with a traceback or permanently; empty if they would not."""
    if len(line) > MAX_SPECIFIER:
        return _TOO_LONG
    if _depth(line) > _MAX_DEPTH:
        return f"nests more than {_MAX_DEPTH} parentheses"
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return ""  # installers skip only this release
    if requirement.url is not None:
        return "contains a URL, which uv refuses to follow"
    try:
        if requirement.marker is not None:
            requirement.marker.evaluate({"extra": ""})
    except (UndefinedComparison, UndefinedEnvironmentName) as error:
        return f"has a marker that pip cannot evaluate: {str(error).strip()}"
    return ""


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        deepest = max(deepest, depth)
    return deepest


def _check_identity(fields: RawMetadata, distribution: Distribution) -> None:
    name, version = fields.get("name"), fields.get("version")
    if not name or not version or not fields.get("metadata_version"):
        raise RefusedError(
            f"{distribution.filename}: its metadata lacks Metadata-Version, Name or Version, or repeats one of them",
            remedy="build the file with a PEP 517 backend",
        )
    if canonicalize_name(name) != distribution.project:
        raise RefusedError(
            f"{distribution.filename}: Name in its metadata is {name!r}, which differs from the file name",
            remedy="build the file again, since it was renamed or built incorrectly",
        )
    if not same_version(version, distribution.version):
        raise RefusedError(
            f"{distribution.filename}: Version in its metadata is {version!r}, which differs from the file name",
            remedy="build the file again, since it was renamed or built incorrectly",
        )


def _problems(fields: RawMetadata, unparsed: dict[str, list[str]]) -> Iterator[str]:
    """Problems of the fields, by the name of the field."""
    for key in sorted(unparsed):
        yield f"{key} is given twice or cannot be read" if key in _KNOWN else f"{key[:60]} is not a field of core metadata"
    wanted = fields.copy()
    if len(wanted.get("description_content_type", "")) > MAX_SPECIFIER:  # parsing time is quadratic in its length
        yield f"description-content-type is longer than {MAX_SPECIFIER} characters"
        del wanted["description_content_type"]
    if _before_licences(wanted):
        wanted.pop(
            "license_files", None
        )  # setuptools wrote it long before PEP 639 defined it; PyPI and twine ignore it as well
    try:
        packaging.metadata.Metadata.from_raw(wanted)
    except ExceptionGroup as group:
        invalid = [error for error in group.exceptions if isinstance(error, InvalidMetadata)]
        for error in sorted(invalid, key=str):
            yield _sentence(error)
    if len(fields.get("summary", "")) > MAX_SUMMARY:
        yield f"summary is longer than {MAX_SUMMARY} characters"
    for label, url in _addresses(fields):
        if not is_web(url):
            yield f"{label}: {url[:200]!r} is not an http(s) address"
    if fields.get("license") and fields.get("license_expression"):
        yield "license and license-expression are mutually exclusive (PEP 639)"


_KNOWN = frozenset(key.replace("_", "-") for key in RawMetadata.__annotations__) | {
    *("classifier", "platform", "supported-platform", "project-url", "license-file", "import-name", "import-namespace"),
}
"Names of list fields as METADATA spells them, in the singular."


def _sentence(error: InvalidMetadata) -> str:
    """One line that names the field: the parser's message has a drawing below its first line."""
    reason = str(error.__cause__).split("\n")[0] if error.__cause__ is not None else ""
    text = str(error)[:300]
    text = text if error.field in text else f"{error.field}: {text}"
    return f"{text}: {reason[:200]}" if reason and reason not in text else text


def _before_licences(fields: RawMetadata) -> bool:
    return fields.get("metadata_version") in ("1.0", "1.1", "1.2", "2.0", "2.1", "2.2", "2.3")


def _missing_licences(fields: RawMetadata, has_file: HasFile) -> Iterator[str]:
    if not _before_licences(fields):
        for name in fields.get("license_files", ()):
            if not has_file(name):
                yield f"license-file {name[:200]!r} is not in the archive"


def _addresses(fields: RawMetadata) -> Iterator[tuple[str, str]]:
    for key in ("home_page", "download_url"):
        url = str(fields.get(key, ""))
        if url and url != "UNKNOWN":  # setuptools wrote this for a missing value
            yield key.replace("_", "-"), url
    for label, url in fields.get("project_urls", {}).items():
        yield f"project-url {label[:40]!r}", url


def is_web(url: str) -> bool:
    """Whether it is an http(s) address."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _specifier(text: str | None) -> str | None:
    """The value of requires-python for pages; empty if installers cannot parse it."""
    try:
        return text if text and SpecifierSet(text) is not None else None
    except InvalidSpecifier:
        return None

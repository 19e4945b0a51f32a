"""The parts of a distribution's METADATA that web pages show: description, dependencies, links, licence."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from packaging.metadata import RawMetadata, parse_email
from packaging.requirements import InvalidRequirement, Requirement

from index.intake import metadata
from index.store.files import Store
from index.web import rendering

MAX_DESCRIPTION = 256 << 10
"Maximum characters of a description to render. A longer one is shown as truncated text."

LONGEST = 60.0
"Maximum seconds for rendering on a busy machine. `rendering` also limits its processor time."


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """Requirements with the same condition."""

    extra: str
    "The extra that adds them; empty: always required."
    requirements: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class About:
    """The parts of a project's page besides its files. A part is empty if METADATA lacks it."""

    summary: str = ""
    description: str = ""
    "HTML, or empty."
    license: str = ""
    author: str = ""
    requires_python: str = ""
    dependencies: tuple[Dependencies, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    "Label and address."


def read(store: Store, metadata_sha256: str | None) -> About:
    """Read the stored METADATA with that digest; the result is empty if it is missing."""
    with suppress(OSError):
        if metadata_sha256 is not None:
            return about(store.path(metadata_sha256).read_bytes())
    return About()


def about(raw: bytes) -> About:
    """Read METADATA. Unreadable fields are omitted."""
    fields, unparsed = parse_email(raw)
    description = fields.get("description") or _text(unparsed.get("description", []))
    return About(
        summary=" ".join((fields.get("summary") or "").split()),
        description=render(description, fields.get("description_content_type") or ""),
        license=_license(fields),
        author=fields.get("author") or fields.get("author_email") or fields.get("maintainer") or "",
        requires_python=fields.get("requires_python") or "",
        dependencies=_dependencies(fields.get("requires_dist", [])),
        links=tuple(_links(fields)),
    )


def _text(values: Sequence[str | bytes]) -> str:
    """A field with an invalid value, such as a description in latin-1."""
    return "\n".join(value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values)


def _license(fields: RawMetadata) -> str:
    """The licence expression, or a short text. A full licence text is not a name and is omitted."""
    text = fields.get("license_expression") or fields.get("license") or ""
    if text and "\n" not in text and len(text) <= 200:
        return text
    named = [line.rpartition(" :: ")[2] for line in fields.get("classifiers", []) if line.startswith("License :: ")]
    return ", ".join(named)


def _dependencies(lines: list[str]) -> tuple[Dependencies, ...]:
    """Requirements by the extra that adds them, in the order of METADATA."""
    groups: dict[str, list[str]] = {"": []}
    for line in lines:
        extra, text = _requirement(line)
        groups.setdefault(extra, []).append(text)
    return tuple(Dependencies(extra=extra, requirements=tuple(texts)) for extra, texts in groups.items() if texts)


def _requirement(line: str) -> tuple[str, str]:
    """The extra that adds the requirement, and the requirement without that condition."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return "", line
    marker = str(requirement.marker or "")
    match = re.search(r'(?:^| and )extra == "([^"]*)"\Z', marker)
    if match is None:
        return "", str(requirement)
    plain = str(Requirement(line.partition(";")[0])) if ";" in line else str(requirement)
    condition = marker[: match.start()].removeprefix("(").removesuffix(")") if match.start() else ""
    return match[1], f"{plain}; {condition}" if condition else plain


def _links(fields: RawMetadata) -> list[tuple[str, str]]:
    """Project-URL and Home-page, if they are http(s) addresses."""
    links: Mapping[str, str] = fields.get("project_urls", {})
    home = fields.get("home_page")
    named = [*([("Homepage", home)] if home else []), *links.items()]
    known: dict[str, str] = {}
    for label, address in named:
        if metadata.is_web(address):
            known.setdefault(address, label or address)
    return [(label, address) for address, label in known.items()]


def render(text: str, content_type: str) -> str:
    """A description as HTML with only text, tables and external links; if rendering fails, its plain text."""
    kind = content_type.partition(";")[0].strip().lower() or rendering.RST
    if not text.strip() or text.strip() == "UNKNOWN":
        return ""
    rendered = _in_child(text, kind) if kind in rendering.KINDS and len(text) <= MAX_DESCRIPTION else None
    return f'<pre tabindex="0">{html.escape(text[:MAX_DESCRIPTION])}</pre>' if rendered is None else rendered


def _in_child(text: str, kind: str) -> str | None:
    """Run `rendering` in a separate process with limits; None if it fails."""
    command = [sys.executable, "-P", rendering.__file__, kind]
    try:
        child = subprocess.run(
            command, input=text.encode("utf-8", "replace"), capture_output=True, timeout=LONGEST, check=True
        )
    except subprocess.SubprocessError:
        return None
    return child.stdout.decode()

"""Metadata of a source tree from PKG-INFO and pyproject.toml, with their lines."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

_HEADER = re.compile(r"([A-Za-z-]+): ?(.*)")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A value and its place, as `PKG-INFO:6`."""

    value: str
    place: str


@dataclass(frozen=True, kw_only=True)
class SourceMetadata:
    """The two files, as far as they are there."""

    headers: Mapping[str, tuple[Line, ...]] = field(default_factory=dict)
    "Of PKG-INFO, by lower-case name."
    pyproject: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    "Of pyproject.toml."

    def first(self, name: str) -> Line | None:
        """The first header of that name with a value."""
        lines = (line for line in self.headers.get(name.lower(), ()) if line.value not in ("", "UNKNOWN"))
        return next(lines, None)

    def line(self, text: str) -> str:
        """The place of a text in pyproject.toml."""
        number = self.text[: self.text.find(text)].count("\n") + 1 if text in self.text else 1
        return f"pyproject.toml:{number}"

    def table(self, *names: str) -> Mapping[str, Any]:
        """A table of pyproject.toml; empty if it is not there."""
        value: Any = self.pyproject
        for name in names:
            value = value.get(name, {}) if isinstance(value, Mapping) else {}
        return value if isinstance(value, Mapping) else {}

    @property
    def backend(self) -> Line:
        """build-backend."""
        backend = self.table("build-system").get("build-backend")
        if isinstance(backend, str):
            return Line(value=backend, place=self.line("build-backend"))
        return Line(value="setuptools.build_meta", place="PEP 517's default, because pyproject.toml names no backend")

    @property
    def build_requires(self) -> Iterator[tuple[Requirement, str, str]]:
        """Each requirement of build-system.requires, its text and its place."""
        wanted = self.table("build-system").get("requires", [])
        for text in wanted if isinstance(wanted, list) else ():
            try:
                yield Requirement(text), text, self.line(text)
            except (InvalidRequirement, TypeError):
                continue

    @property
    def run_requires(self) -> Iterator[tuple[Requirement, str]]:
        """Each requirement of the finished wheel, without extras, and its place."""
        lines = [(line.value, line.place) for line in self.headers.get("requires-dist", ())]
        if not self.headers:
            wanted = self.table("project").get("dependencies", [])
            lines = [(text, self.line(text)) for text in wanted if isinstance(text, str)]
        for text, place in lines:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            if "extra" not in str(requirement.marker or ""):
                yield requirement, place


def read(tree: Path) -> SourceMetadata:
    """Both files of a source tree."""
    text = _text(tree / "pyproject.toml")
    try:
        pyproject = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        pyproject = {}
    return SourceMetadata(headers=_headers(_text(tree / "PKG-INFO")), pyproject=pyproject, text=text)


def _text(place: Path) -> str:
    try:
        return place.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _headers(text: str) -> dict[str, tuple[Line, ...]]:
    """The headers before the description; a header may go on in lines that begin with a blank."""
    headers: dict[str, tuple[Line, ...]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line:
            break
        if match := _HEADER.fullmatch(line):
            name = match[1].lower()
            headers[name] = (*headers.get(name, ()), Line(value=match[2].strip(), place=f"PKG-INFO:{number}"))
    return headers

"""requirements.lock: wheels pinned to a version and the sha256 of each file, for pip and uv with --require-hashes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from gracefarm.errors import ConfigError

REMEDY = "create the lock with hashes: `uv pip compile --generate-hashes`"
_HASH = re.compile(r"--hash[= ]sha256:([0-9a-f]{64})(?=\s|$)")
_END_OF_REQUIREMENT = re.compile(r"\s--hash|\s#")
_ONE_VERSION = re.compile(r"==([^=<>!~*,]+)")
_WHEEL_COMMENT = re.compile(r"#\s*(\S+\.whl)")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A requirement of the lock."""

    name: str
    "Normalised."
    version: str
    sha256: frozenset[str]
    "sha256 of each file that may be installed; at least one."
    marker: Marker | None
    filename: str
    "URL of the wheel in the comment before the line; empty if there is none."
    number: int
    "Number of its first line, from 1."
    text: str
    "The whole requirement on one line, with single spaces."

    def applies(self, environment: Mapping[str, str]) -> bool:
        """Whether its marker is true. Values missing from `environment` are those of the running Python."""
        return self.marker is None or self.marker.evaluate(dict(environment))


def read(path: Path, *, remedy: str = REMEDY, repeat: str = "", options: bool = False) -> list[Pin]:
    """Read every pin of the lock at `path`; see `parse`.

    Raises:
        ConfigError: the file is missing or unreadable, or a line is not a pin.
    """
    from gracefarm import (
        tables,
    )  # imported here: it imports pydantic, and an index that serves locks starts more quickly without it

    try:
        return parse(tables.read_text(path), str(path), remedy=remedy, options=options)
    except ConfigError as error:
        raise ConfigError(error.cause, remedy=remedy, repeat=repeat) from error


def parse(text: str, place: str, *, remedy: str = REMEDY, options: bool = False) -> list[Pin]:
    """Parse every pin of a lock. `place` names the lock in errors; with `options`, lines with pip options are skipped.

    Raises:
        ConfigError: a line is not NAME==VERSION with at least one sha256; the error names `place` and line, with `remedy`.
    """
    pins: list[Pin] = []
    filename = ""
    for number, line in _logical_lines(text):
        if not line or (options and line.startswith("-")):
            continue
        if line.startswith("#"):
            comment = _WHEEL_COMMENT.fullmatch(line)
            filename = comment[1] if comment else ""
            continue
        try:
            pins.append(_pin(line, number, filename))
        except InvalidRequirement as error:
            raise ConfigError(f"{place}:{number}: the line does not pin a wheel: {error}", remedy=remedy) from error
        filename = ""
    return pins


def render(name: str, version: str, digests: Iterable[str]) -> str:
    """The lines of one pin in the format of `parse`; `digests` are hex sha256."""
    return " \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{digest}" for digest in sorted(digests))]) + "\n"


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line, with single spaces. Lines joined by a backslash count as one, with the first number."""
    start, parts = 1, ""
    for number, line in enumerate(text.splitlines(), 1):
        start = start if parts else number
        parts += line.removesuffix("\\") + " "
        if not line.endswith("\\"):
            yield start, " ".join(parts.split())
            parts = ""
    yield start, " ".join(parts.split())


def _pin(line: str, number: int, filename: str) -> Pin:
    """Parse the pin of a line.

    Raises:
        InvalidRequirement: the line is not a pin; the message gives the reason.
    """
    digests = frozenset(_HASH.findall(line))
    if not digests:
        raise InvalidRequirement("--hash=sha256:… is missing")
    requirement = Requirement(_END_OF_REQUIREMENT.split(line, maxsplit=1)[0])
    version = _ONE_VERSION.fullmatch(str(requirement.specifier))
    if version is None:
        raise InvalidRequirement("the version is not pinned with ==")
    return Pin(
        name=str(canonicalize_name(requirement.name)),
        version=version[1],
        sha256=digests,
        marker=requirement.marker,
        filename=filename,
        number=number,
        text=line,
    )

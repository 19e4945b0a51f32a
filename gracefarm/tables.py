"""TOML tables checked against a schema. Errors name the file and line and, for an unknown key, the most similar one."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from gracefarm.errors import ConfigError


class Table(BaseModel):
    """A frozen table of a TOML file, or object of a JSON document; unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in Path(path).parts:
        msg = "must be a relative path without '..'"
        raise ValueError(msg)
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]
"A relative path that does not leave its tree."


def _url(text: str) -> str:
    urlsplit(text).port  # noqa: B018 whose errors are ValueErrors, and so name file and line
    if not text.isprintable() or " " in text:
        msg = "an address must not contain white space"
        raise ValueError(msg)
    return text


Url = Annotated[str, AfterValidator(_url)]
"A valid URL. It is checked here, since it is fetched long after the table is read."


_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_size(text: str) -> int:
    """Convert a size such as '3.5GiB' to bytes.

    Raises:
        ValueError: the text is not a number followed by KiB, MiB, GiB or TiB.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB)", text)
    if match is None:
        msg = f"{text!r} is not a size such as 3.5GiB"
        raise ValueError(msg)
    return int(float(match[1]) * _UNITS[match[2]])


def _size(text: str) -> str:
    parse_size(text)
    return text


Size = Annotated[str, AfterValidator(_size)]

T = TypeVar("T", bound=Table)


def read_text(path: Path) -> str:
    """Read the text of a file of the project.

    Raises:
        ConfigError: it is missing, not a file, not readable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", remedy="check that the path is a file and that you have read permission"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}",
            remedy="save the file as UTF-8, which TOML and pip require",
        ) from error


def read(path: Path, schema: type[T], *, docs: str = "docs/reference/files.md") -> T:
    """Read the table in `path`; `docs` is the page that describes its keys.

    Raises:
        ConfigError: the file is not readable, not TOML, or does not match the schema. In the last case the message starts with
            `file:line:`.
    """
    text = read_text(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}", remedy="fix the TOML at that place") from error
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        # A misspelt key causes two errors, an unknown key and a missing one. Only the unknown one has a line.
        details = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
        location = tuple(part for part in details["loc"] if not _is_union_tag(part, values, details["loc"]))
        line = _find_line(text, location)
        raise ConfigError(
            f"{path}:{line}: {_sentence(details, location)}", remedy=_remedy(schema, details, location, docs)
        ) from error


def _is_union_tag(part: int | str, values: dict[str, object], loc: tuple[int | str, ...]) -> bool:
    """Whether the part is a discriminator's value (`sdist`, `git`), which pydantic adds to the location of an error."""
    return part in ("sdist", "git", "file") and loc[0] == "source" and part not in values and loc.index(part) == 1


def _sentence(details: ErrorDetails, location: tuple[int | str, ...]) -> str:
    key = ".".join(str(part) for part in location)
    if details["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    if details["type"] == "missing":
        return f"key {key!r} is missing"
    return f"key {key!r}: {message(details)}"


def message(details: ErrorDetails) -> str:
    """The sentence of a validator, without pydantic's prefix for a ValueError."""
    return details["msg"].removeprefix("Value error, ")


def _remedy(schema: type[Table], details: ErrorDetails, location: tuple[int | str, ...], docs: str) -> str:
    if details["type"] != "extra_forbidden":
        return f"{docs} describes every key"
    return nearest(str(location[-1]), _known_keys(schema, location[:-1]), "known keys of this table")


def nearest(name: str, known: Sequence[str], title: str) -> str:
    """The remedy for an unknown name: the most similar known name, else the title and all known names."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"{title}: {', '.join(known) or 'none'}"


def _known_keys(schema: type[Table], parents: tuple[int | str, ...]) -> list[str]:
    """Names of the fields at a place of the schema. It searches the JSON schema, which resolves unions and lists."""
    document = schema.model_json_schema()

    def resolve(node: dict[str, object]) -> list[dict[str, object]]:
        if isinstance(reference := node.get("$ref"), str):
            return resolve(document["$defs"][reference.rsplit("/", 1)[-1]])
        for word in ("anyOf", "oneOf"):
            if isinstance(options := node.get(word), list):
                return [nested for option in options for nested in resolve(option)]
        return [node]

    nodes = resolve(document)
    for part in parents:
        following: list[dict[str, object]] = []
        for node in nodes:
            properties = node.get("properties")
            child = (
                node.get("items") if isinstance(part, int) else properties.get(part) if isinstance(properties, dict) else None
            )
            if child is None:
                child = node.get("additionalProperties")
            if isinstance(child, dict):
                following += resolve(child)
        nodes = following
    return sorted({key for node in nodes if isinstance(known := node.get("properties"), dict) for key in known})


def _find_line(text: str, location: tuple[int | str, ...]) -> int:
    """The line (from 1) of a key, or of the table that should contain it; tomllib provides no positions."""
    names = [part for part in location if isinstance(part, str)]
    index = next((part for part in location if isinstance(part, int)), 0)
    best, table, count = 1, "", -1
    header = re.compile(r"^\s*\[\[?\s*([^\]]+?)\s*\]\]?")
    for number, line in enumerate(text.splitlines(), 1):
        if match := header.match(line):
            table = match[1].replace('"', "").replace(" ", "")
            wanted = ".".join(names).startswith(table) and table != ""
            count += 1 if wanted and line.lstrip().startswith("[[") else 0
            if wanted and (not line.lstrip().startswith("[[") or count == index):
                best = number
            continue
        key = line.split("=", 1)[0].strip().replace('"', "")
        full = f"{table}.{key}" if table else key
        if (
            key
            and ".".join(names).startswith(full)
            and (full == ".".join(names) or "." in ".".join(names)[len(full) :][:1])
            and count in (-1, index)
        ):
            return number
    return best

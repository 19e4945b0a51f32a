"""The generated reference pages are those of the code, and every field of every schema has a description."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tools import reference

SCHEMAS = sorted((REPOSITORY / "docs" / "schema").glob("*.json"))


def test_the_generated_pages_are_those_of_the_code() -> None:
    for name, text in reference.pages().items():
        assert (reference.FOLDER / name).read_text() == text, f"{name}: run python -m tools.reference"


def fields(part: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and schema of each field of an object and of its definitions."""
    for key, field in part.get("properties", {}).items():
        yield f"{name}.{key}", field
    for title, definition in part.get("$defs", {}).items():
        yield from fields(definition, title)


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_each_field_of_a_schema_has_a_description(path: Path) -> None:
    described = dict(fields(json.loads(path.read_text()), path.stem))
    assert described
    assert [name for name, field in described.items() if not field.get("description")] == []


def test_each_schema_is_in_the_reference() -> None:
    assert {*reference.FILES, *reference.DEPLOY_FILE, *reference.DOCUMENTS} == {path.stem for path in SCHEMAS}

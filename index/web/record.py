"""Parse the parts of a build record that pages show."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from index.store import records
from index.store.files import Store
from index.store.records import Summary

MAX_DIGESTS = 64
"Maximum device digests of a record to look up."

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class VerdictRow:
    """The verdict of one gate."""

    gate: str
    status: str
    summary: str
    details: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """A stage of the build."""

    name: str
    seconds: float | None
    peak_memory: int | None
    note: str


@dataclass(frozen=True, kw_only=True)
class RecordDocument:
    """The parts of a record that pages show."""

    verdicts: tuple[VerdictRow, ...]
    stages: tuple[StageRow, ...]
    source: Mapping[str, Any]
    remedy: str
    device_digests: frozenset[str]
    "Digests of the wheel's device code, one per sm; certificates are found by them."

    @staticmethod
    def of(document: Mapping[str, Any]) -> RecordDocument:
        """Read the known parts; parts with another structure are omitted."""
        inputs = _mapping(document.get("inputs"))
        recipe = _mapping(inputs.get("recipe"))
        return RecordDocument(
            verdicts=tuple(_verdict(item) for item in _mappings(document.get("verdicts"), "gate")),
            stages=tuple(_step(item) for item in _mappings(document.get("stages"), "name")),
            source=_mapping(recipe.get("source")),
            remedy=_text(_mapping(document.get("failure")), "remedy"),
            device_digests=frozenset(_digests(_mapping(document.get("device_digests")))),
        )


def _digests(item: Mapping[str, Any]) -> list[str]:
    values = [value for value in item.values() if isinstance(value, str) and _DIGEST.fullmatch(value)]
    return values[:MAX_DIGESTS]


def _verdict(item: Mapping[str, Any]) -> VerdictRow:
    details = item.get("details")
    return VerdictRow(
        gate=_text(item, "gate"),
        status=_text(item, "status"),
        summary=_text(item, "summary"),
        details=tuple(line for line in details if isinstance(line, str)) if isinstance(details, list) else (),
    )


def _step(item: Mapping[str, Any]) -> StageRow:
    peak = records.number(item.get("peak_memory"))
    return StageRow(
        name=_text(item, "name"),
        seconds=records.number(item.get("wall_s")),
        peak_memory=int(peak) if peak else None,
        note=_text(item, "note"),
    )


def _text(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    return value if isinstance(value, str) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: object, key: str) -> tuple[Mapping[str, Any], ...]:
    items = value if isinstance(value, list) else []
    return tuple(item for item in items if isinstance(item, Mapping) and isinstance(item.get(key), str))


def document_of(store: Store, record: Summary | None) -> RecordDocument:
    """Read a record's document; the result is empty if it is missing."""
    document = {}
    if record is not None and record.document is not None:
        with suppress(OSError, ValueError):
            document = json.loads(store.path(record.document).read_bytes())
    return RecordDocument.of(document)

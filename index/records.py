"""Build records: verdicts, logs, failed builds, which no wheel can carry (docs/index-records.md)."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from index import facts
from index.catalogue import Catalogue, Change
from index.errors import RefusedError
from index.facts import Facts
from index.store import Store

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")

MAX_RECORD = 32 << 20
"Bytes of one record's JSON."


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the board shows of a record."""

    id: str
    recipe: str
    version: str
    stack: str
    target: str
    outcome: str
    seconds: float | None
    cause: str
    finished: str
    document: str | None
    log: str | None


def check_id(identifier: str) -> str:
    """`identifier`, when it can name a record.

    Raises:
        RefusedError: it cannot.
    """
    if not _ID.match(identifier):
        raise RefusedError(f"{identifier!r} cannot name a record", remedy="use up to 128 letters, digits, '.', '_' and '-'")
    return identifier


def parse(raw: bytes) -> dict[str, object]:
    """The JSON object of a record.

    Raises:
        RefusedError: it is not one.
    """
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the record is not JSON: {error}", remedy="send the record as the builder wrote it") from None
    if not isinstance(found, dict):
        raise RefusedError("the record is not a JSON object", remedy="send the record as the builder wrote it")
    return found


def identity(record: Mapping[str, object]) -> str | None:
    """The build id that a record gives itself."""
    for key in ("build_id", "id"):
        value = record.get(key)
        if isinstance(value, str) and _ID.match(value):
            return value
    return None


def put(store: Store, catalogue: Catalogue, actor: str, identifier: str, raw: bytes) -> None:
    """Keep a record under its id; a later one replaces an earlier one, the audit log keeps both digests.

    Raises:
        RefusedError: it is not JSON, or is the record of another build.
    """
    document = parse(raw)
    own = identity(document)
    if own is not None and own != identifier:
        raise RefusedError(f"the record is of build {own!r}", remedy=f"put it to /records/{own}")
    with catalogue.change(actor) as change:
        keep(store, change, identifier, raw, inside_wheel=False)
        link(change, identifier, document)


def put_log(store: Store, catalogue: Catalogue, actor: str, identifier: str, raw: bytes) -> None:
    """Keep the build's log."""
    digest = hashlib.sha256(raw).hexdigest()
    with catalogue.change(actor) as change:
        store.add_bytes(raw, digest)
        change.execute(
            "INSERT INTO record (id, log_sha256, log_size, updated) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
            " SET log_sha256 = excluded.log_sha256, log_size = excluded.log_size, updated = excluded.updated",
            (identifier, digest, len(raw), change.time),
        )
        change.note("record.log", identifier, sha256=digest, size=len(raw))


def keep(store: Store, change: Change, identifier: str, raw: bytes, *, inside_wheel: bool) -> None:
    """Store the document; the part inside a wheel never replaces the full record that was put."""
    if (
        inside_wheel
        and change.execute("SELECT 1 FROM record WHERE id = ? AND document_sha256 NOT NULL", (identifier,)).fetchone()
    ):
        return
    digest = hashlib.sha256(raw).hexdigest()
    store.add_bytes(raw, digest)
    row = summarise(parse(raw))
    change.execute(
        "INSERT INTO record (id, recipe, version, stack, target, outcome, seconds, cause, finished, document_sha256,"
        " document_size, updated) VALUES (?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET recipe = excluded.recipe,"
        " version = excluded.version, stack = excluded.stack, target = excluded.target, outcome = excluded.outcome,"
        " seconds = excluded.seconds, cause = excluded.cause, finished = excluded.finished,"
        " document_sha256 = excluded.document_sha256, document_size = excluded.document_size, updated = excluded.updated",
        (identifier, *row, digest, len(raw), change.time),
    )
    change.note("record.put", identifier, sha256=digest, inside_wheel=inside_wheel)


def link(change: Change, identifier: str, document: Mapping[str, object]) -> None:
    """Give the wheels of this build what the record knows: those that carry its id, and those that it names by sha256."""
    known = facts.from_record(document)
    for digest in _wheel_digests(document):
        change.execute("UPDATE file SET build = ? WHERE sha256 = ? AND build IS NULL", (identifier, digest))
    rows = change.execute("SELECT id, filename, project, facts FROM file WHERE build = ?", (identifier,)).fetchall()
    for row in rows:
        merged = known.over(facts.from_json(row["facts"]))
        change.execute("UPDATE file SET cuda = ?, facts = ? WHERE id = ?", (merged.cuda, merged.as_json(), row["id"]))
    if rows:
        change.note("record.link", identifier, *{row["project"] for row in rows}, files=[row["filename"] for row in rows])


def _wheel_digests(document: Mapping[str, object]) -> set[str]:
    """Every `sha256` of a wheel among the outputs."""
    found: set[str] = set()
    places = [document, document.get("outputs"), document.get("wheel")]
    outputs = document.get("outputs")
    if isinstance(outputs, Mapping):
        places.append(outputs.get("wheel"))
    for place in places:
        if isinstance(place, Mapping):
            found.update(value for key in ("sha256", "wheel_sha256") if isinstance(value := place.get(key), str))
    return found


def facts_of(change: Change, identifier: str) -> Facts:
    """What wheels of this build are already known to be, from a record that came before the wheel."""
    row = change.execute("SELECT facts FROM file WHERE build = ? LIMIT 1", (identifier,)).fetchone()
    return facts.from_json(row["facts"]) if row else Facts()


def summarise(document: Mapping[str, object]) -> tuple[str, str, str, str, str, float | None, str, str]:
    """recipe, version, stack, target, outcome, seconds, cause, finished: as far as the record says."""
    return (
        _name(document, "recipe"),
        _name(document, "version"),
        _name(document, "stack"),
        _name(document, "target"),
        _name(document, "outcome") or _name(document, "verdict") or _name(document, "status"),
        _seconds(document),
        _name(document, "failure") or _name(document, "cause"),
        _name(document, "finished") or _name(document, "time"),
    )


def _name(document: Mapping[str, object], key: str) -> str:
    """A text field, at the top or among the inputs; of an object, its name, cause or text."""
    inputs = document.get("inputs")
    for place in (document, inputs if isinstance(inputs, Mapping) else {}):
        value = place.get(key)
        if isinstance(value, str):
            return value[:2000]
        if isinstance(value, Mapping):
            for part in ("name", "cause"):
                if isinstance(found := value.get(part), str):
                    return found[:2000]
    return ""


def _seconds(document: Mapping[str, object]) -> float | None:
    """How long the build took: as it says, or its steps together."""
    stages, timings = document.get("stages"), document.get("timings")
    whole = [document.get(key) for key in ("seconds", "duration", "wall_seconds")]
    steps = [stage.get("wall_s") for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []
    named = list(timings.values()) if isinstance(timings, Mapping) else []
    for numbers in (_numbers(whole)[:1], _numbers(steps), _numbers(named)):
        if numbers:
            return sum(numbers)
    return None


def _numbers(values: Iterable[object]) -> list[float]:
    return [float(value) for value in values if isinstance(value, int | float)]


def all_records(catalogue: Catalogue) -> list[Summary]:
    """Every record, the newest first."""
    rows = catalogue.rows("SELECT * FROM record ORDER BY CASE finished WHEN '' THEN updated ELSE finished END DESC")
    return [summary(row) for row in rows]


def summary(row: sqlite3.Row) -> Summary:
    """A row of the table `record`."""
    same = ("id", "recipe", "version", "stack", "target", "outcome", "seconds", "cause")
    return Summary(
        **{key: row[key] for key in same},
        finished=row["finished"] or row["updated"],
        document=row["document_sha256"],
        log=row["log_sha256"],
    )

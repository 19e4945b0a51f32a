"""Build records: verdicts, logs and failed builds, which a wheel cannot contain (docs/reference/index-records.md)."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from packaging.utils import canonicalize_name

from index.errors import ForbiddenError, RefusedError
from index.store import facts
from index.store.auth import Token, allow
from index.store.catalogue import Catalogue, Transaction
from index.store.facts import CudaFacts
from index.store.files import Store

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")

_SHA256 = re.compile(r"[0-9a-f]{64}")

_IN_SCOPE = """CASE WHEN :scope IS NULL THEN 1 WHEN :scope = 'nightly' THEN channel = 'nightly'
    ELSE id IN (SELECT file_id FROM member WHERE set_name = :scope) END"""
"SQL: files that a token for one view covers."

_REACHED = f"SELECT sha256, build FROM file WHERE {_IN_SCOPE}"  # noqa: S608 - constants, these three
_CLAIM = f"UPDATE file SET build = :build WHERE sha256 = :sha256 AND build IS NULL AND project = :project AND {_IN_SCOPE}"  # noqa: S608
_LINKED = f"SELECT id, filename, project, facts FROM file WHERE build = :build AND project = :project AND {_IN_SCOPE}"  # noqa: S608

MAX_RECORD = 32 << 20
"Maximum bytes of a record's JSON."


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The fields of a record that the board shows."""

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
    """Return `identifier` if it is a valid name for a record.

    Raises:
        RefusedError: it is not.
    """
    if not _ID.match(identifier):
        raise RefusedError(
            f"{identifier!r} is not a valid name for a record", remedy="use at most 128 letters, digits, '.', '_' and '-'"
        )
    return identifier


def parse(raw: bytes) -> dict[str, object]:
    """Parse the JSON object of a record.

    Raises:
        RefusedError: it is not a JSON object.
    """
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the record is not JSON: {error}", remedy="send the record that the builder wrote") from None
    if not isinstance(document, dict):
        raise RefusedError("the record is not a JSON object", remedy="send the record that the builder wrote")
    if b"\\ud" in raw.lower():
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RefusedError(
                "the record contains only one half of a surrogate pair (an escape from \\ud800 to \\udfff)",
                remedy="remove this escape from the record, or send the record that the builder wrote",
            ) from None
    return document


def identity(record: Mapping[str, object]) -> str | None:
    """The build id in a record."""
    for key in ("build_id", "id"):
        value = record.get(key)
        if isinstance(value, str) and _ID.match(value):
            return value
    return None


def project_of(document: Mapping[str, object]) -> str:
    """The normalised project of a record: its `name`, else the name in its recipe."""
    return str(canonicalize_name(_name(document, "name") or _name(document, "recipe")))


def put(store: Store, catalogue: Catalogue, token: Token, identifier: str, raw: bytes, document: Mapping[str, object]) -> None:
    """Store a record under its id. A later record replaces an earlier one; the audit log keeps both digests.

    Raises:
        RefusedError: the record belongs to another build.
        ForbiddenError: the token does not cover the record.
    """
    own = identity(document)
    if own is not None and own != identifier:
        raise RefusedError(f"the record belongs to the build {own!r}", remedy=f"send the record to /records/{own}")
    project, digests = project_of(document), _wheel_digests(document)
    with catalogue.change(token.actor) as change:
        _check_reach(change, token, identifier, project, digests)
        keep(store, change, identifier, raw, document)
        link(change, identifier, document, token)


def put_log(store: Store, catalogue: Catalogue, token: Token, identifier: str, raw: bytes) -> None:
    """Store the build's log.

    Raises:
        ForbiddenError: the token does not cover the build.
    """
    digest = hashlib.sha256(raw).hexdigest()
    with catalogue.change(token.actor) as change:
        _check_reach(change, token, identifier, None, set())
        store.add_bytes(raw, digest)
        change.execute(
            "INSERT INTO record (id, log_sha256, log_size, updated) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
            " SET log_sha256 = excluded.log_sha256, log_size = excluded.log_size, updated = excluded.updated",
            (identifier, digest, len(raw), change.time),
        )
        projects = {row["project"] for row in change.execute("SELECT project FROM file WHERE build = ?", (identifier,))}
        change.note("record.log", identifier, *projects, sha256=digest, size=len(raw))


def _check_reach(change: Transaction, token: Token, identifier: str, project: str | None, digests: set[str]) -> None:
    """Check that the token covers the build. An existing record keeps its project, so a build cannot be taken over.

    Raises:
        ForbiddenError: the build belongs to another project, or none of its wheels is in the token's set.
    """
    row = change.execute("SELECT project FROM record WHERE id = ?", (identifier,)).fetchone()
    known = str(row["project"]) if row is not None else ""
    if project is None:  # a log
        project = known
    allow(token, project=project if known in ("", project) else "", set_name=token.set_name)
    if token.set_name is None:
        return
    rows = change.execute(_REACHED, {"scope": token.set_name}).fetchall()
    if not any(row["build"] == identifier or row["sha256"] in digests for row in rows):
        raise ForbiddenError(
            f"this build has no wheel in {token.set_name}", remedy="upload the wheel first, or use a different token"
        )


def keep_inside(store: Store, change: Transaction, identifier: str, raw: bytes, project: str, sha256: str) -> bool:
    """Store the partial record that a wheel contains. It never replaces a full record.

    Returns whether the wheel belongs to this build; it does not if the record names another project or another wheel.
    """
    row = change.execute("SELECT project, wheels, document_sha256 FROM record WHERE id = ?", (identifier,)).fetchone()
    if row is not None and ((row["project"] or project) != project or (row["wheels"] and sha256 not in row["wheels"].split())):
        return False
    if row is None or row["document_sha256"] is None:
        keep(store, change, identifier, raw, parse(raw), inside=project)
    return True


def keep(
    store: Store,
    change: Transaction,
    identifier: str,
    raw: bytes,
    document: Mapping[str, object],
    *,
    inside: str | None = None,
) -> None:
    """Store the document. `inside` is the project of the wheel that contained it, which becomes the record's project."""
    digest = hashlib.sha256(raw).hexdigest()
    store.add_bytes(raw, digest)
    project = project_of(document) if inside is None else inside
    wheels = "" if inside is not None else " ".join(sorted(_wheel_digests(document)))
    change.execute(
        "INSERT INTO record (id, project, wheels, recipe, version, stack, target, outcome, seconds, cause, finished,"
        " document_sha256, document_size, updated) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET"
        " project = excluded.project, wheels = excluded.wheels, recipe = excluded.recipe,"
        " version = excluded.version, stack = excluded.stack, target = excluded.target, outcome = excluded.outcome,"
        " seconds = excluded.seconds, cause = excluded.cause, finished = excluded.finished,"
        " document_sha256 = excluded.document_sha256, document_size = excluded.document_size, updated = excluded.updated",
        (identifier, project, wheels, *summarise(document), digest, len(raw), change.time),
    )
    change.note("record.put", identifier, sha256=digest, inside_wheel=inside is not None)


def link(change: Transaction, identifier: str, document: Mapping[str, object], token: Token) -> None:
    """Copy the record's facts to the wheels of this build: those that contain its id, and those that it names by sha256.

    This covers only wheels of the record's project that the token covers.
    """
    known, digests = facts.from_record(document), _wheel_digests(document)
    values = {"project": project_of(document), "scope": token.set_name, "build": identifier}
    for digest in digests:
        change.execute(_CLAIM, {**values, "sha256": digest})
    if digests:  # a wheel with the id of a build that produced another wheel does not belong to that build
        marks = ", ".join("?" * len(digests))
        strangers = change.execute(
            f"UPDATE file SET build = NULL WHERE build = ? AND sha256 NOT IN ({marks}) RETURNING project",  # noqa: S608 - question marks
            (identifier, *digests),
        ).fetchall()
        if strangers:
            change.note("record.unlink", identifier, *{row["project"] for row in strangers})
    rows = change.execute(_LINKED, values).fetchall()
    for row in rows:
        merged = known.over(facts.from_json(row["facts"]))
        change.execute("UPDATE file SET cuda = ?, facts = ? WHERE id = ?", (merged.cuda, merged.as_json(), row["id"]))
    if rows:
        change.note("record.link", identifier, *{row["project"] for row in rows}, files=[row["filename"] for row in rows])


def _wheel_digests(document: Mapping[str, object]) -> set[str]:
    """Every `sha256` of a wheel among the outputs."""
    digests: set[str] = set()
    places = [document, document.get("outputs"), document.get("wheel")]
    outputs = document.get("outputs")
    if isinstance(outputs, Mapping):
        places.append(outputs.get("wheel"))
    for place in places:
        if isinstance(place, Mapping):
            values = [place.get(key) for key in ("sha256", "wheel_sha256")]
            digests.update(value for value in values if isinstance(value, str) and _SHA256.fullmatch(value))
    return digests


def facts_of(change: Transaction, identifier: str) -> CudaFacts:
    """Facts about wheels of this build, from a record that arrived before the wheel."""
    row = change.execute("SELECT facts FROM file WHERE build = ? LIMIT 1", (identifier,)).fetchone()
    return facts.from_json(row["facts"]) if row else CudaFacts()


def summarise(document: Mapping[str, object]) -> tuple[str, str, str, str, str, float | None, str, str]:
    """recipe, version, stack, target, outcome, seconds, cause, finished; missing ones are empty."""
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
    """A text field, at the top level or among the inputs; for an object, its name, cause or text."""
    inputs = document.get("inputs")
    for place in (document, inputs if isinstance(inputs, Mapping) else {}):
        value = place.get(key)
        if isinstance(value, str):
            return value[:2000]
        if isinstance(value, Mapping):
            for part in ("name", "cause"):
                if isinstance(text := value.get(part), str):
                    return text[:2000]
    return ""


def _seconds(document: Mapping[str, object]) -> float | None:
    """Duration of the build: its own value, or the sum of its steps."""
    stages, timings = document.get("stages"), document.get("timings")
    whole = [document.get(key) for key in ("seconds", "duration", "wall_seconds")]
    steps = [stage.get("wall_s") for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []
    named = list(timings.values()) if isinstance(timings, Mapping) else []
    for numbers in (_numbers(whole)[:1], _numbers(steps), _numbers(named)):
        if numbers:
            return sum(numbers)
    return None


def _numbers(values: Iterable[object]) -> list[float]:
    return [float(finite) for value in values if (finite := number(value)) is not None]


def number(value: object) -> float | int | None:
    """A number that pages can show: finite and below 1e15. JSON also has infinity, booleans and numbers of any length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value < 1e15 and math.isfinite(value) else None


def all_records(catalogue: Catalogue) -> list[Summary]:
    """Every public record, newest first."""
    rows = catalogue.rows("SELECT * FROM public_record ORDER BY CASE finished WHEN '' THEN updated ELSE finished END DESC")
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

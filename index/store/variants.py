"""NAME-VERSION-variants.json of each release with variant wheels (PEP 825, a draft), generated from the stored wheels.

`Catalogue.change` calls `keep` for the changed projects in the same transaction, so the JSON is updated whenever a wheel is
added, removed or yanked. Every version that was ever linked stays readable at its digest, since clients cache pages.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from gracefarm import variants
from gracefarm.variants import Variant

_WHEELS = """
SELECT filename, version, variant, uploaded, yanked FROM live_file
    WHERE project = :project AND variant IS NOT NULL AND lost = 0
    AND (hidden = 0 OR id IN (SELECT file_id FROM member WHERE set_name = :set_name))
    ORDER BY filename
"""

_STAGED = """
SELECT DISTINCT set_name FROM member JOIN live_file ON id = file_id JOIN release_set ON name = set_name
    WHERE project = ? AND variant IS NOT NULL AND hidden = 1 AND state = 'staged'
"""


@dataclass(frozen=True, kw_only=True)
class VariantsJson:
    """The JSON of one release."""

    filename: str
    project: str
    version: str
    content: bytes
    uploaded: str
    "Upload time of the first wheel, so that a client that excludes newer files keeps the JSON with any wheel."
    yanked: str | None
    "Reason if all wheels are yanked; None if one of them is not."

    @cached_property
    def sha256(self) -> str:
        """Digest of the content."""
        return hashlib.sha256(self.content).hexdigest()


class _Wheel(NamedTuple):
    """What the JSON depends on."""

    filename: str
    variant: str
    uploaded: str
    yanked: str | None


def documents(database: sqlite3.Connection, project: str, staged_set: str | None = None) -> list[VariantsJson]:
    """The JSON of each release of the project, from its public wheels and, with `staged_set`, the wheels of that set."""
    releases: dict[str, list[_Wheel]] = {}
    for row in database.execute(_WHEELS, {"project": project, "set_name": staged_set}):
        wheel = _Wheel(row["filename"], row["variant"], row["uploaded"], row["yanked"])
        releases.setdefault(row["version"], []).append(wheel)
    rendered = (_document(project, version, tuple(wheels)) for version, wheels in releases.items())
    return [document for document in rendered if document is not None]


def variant_of(row: sqlite3.Row) -> Variant | None:
    """The variant of a row of `file` with `filename` and `variant`; None if it has another version of the format."""
    return _parsed(row["filename"], row["variant"])


def _parsed(filename: str, variant: str) -> Variant | None:
    """PEP 825: a wheel with another version of the format is not supported, but the other wheels of its release are."""
    try:
        return variants.parse(variant, variants.split_label(filename)[1])
    except ValueError:
        return None


@lru_cache(maxsize=128)
def _document(project: str, version: str, wheels: tuple[_Wheel, ...]) -> VariantsJson | None:
    """None if no wheel is supported. The cache lets all views and formats use one rendering."""
    pairs = [(wheel, variant) for wheel in wheels if (variant := _parsed(wheel.filename, wheel.variant)) is not None]
    if not pairs:
        return None
    yanked = [wheel.yanked for wheel, _ in pairs]
    return VariantsJson(
        filename=variants.index_filename("-".join(pairs[0][0].filename.split("-")[:2])),
        project=project,
        version=version,
        content=variants.combine(variant for _, variant in pairs),
        uploaded=min(wheel.uploaded for wheel, _ in pairs),
        yanked=None if None in yanked else yanked[0],
    )


def keep(database: sqlite3.Connection, projects: Iterable[str]) -> None:
    """Store the current JSON of these projects' releases, for the public and for the preview of each staged set."""
    for project in projects:
        sets = [None, *(row["set_name"] for row in database.execute(_STAGED, (project,)))]
        for document in {document for set_name in sets for document in documents(database, project, set_name)}:
            database.execute(
                "INSERT OR IGNORE INTO variants_json (filename, sha256, project, version, content) VALUES (?, ?, ?, ?, ?)",
                (document.filename, document.sha256, project, document.version, document.content),
            )


def projects(database: sqlite3.Connection) -> list[str]:
    """Projects with variant wheels."""
    return [row["project"] for row in database.execute("SELECT DISTINCT project FROM live_file WHERE variant IS NOT NULL")]

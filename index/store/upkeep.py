"""Keeping a store in order: check every byte, free what nothing names, let old nightlies go, list what is there."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass

from packaging.version import Version

from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError
from gracefarm.variants import split_label
from index.names import wheel_tags
from index.store.catalogue import Catalogue
from index.store.files import Store

GC_MOMENT = 0.2
"Seconds that `gc` keeps uploads waiting at most, but for the time that one file takes."


_REFERENCES = """
SELECT sha256 AS digest, filename AS name, size FROM live_file
UNION SELECT metadata_sha256, filename || '.metadata', NULL FROM live_file WHERE metadata_sha256 IS NOT NULL
UNION SELECT provenance_sha256, filename || '.provenance', NULL FROM live_file WHERE provenance_sha256 IS NOT NULL
UNION SELECT sha256, filename, size FROM live_mirrored WHERE url IS NULL
UNION SELECT metadata_sha256, filename || '.metadata', NULL FROM live_mirrored
    WHERE url IS NULL AND metadata_sha256 IS NOT NULL
UNION SELECT document_sha256, 'record ' || id, document_size FROM record WHERE document_sha256 IS NOT NULL
UNION SELECT log_sha256, 'log ' || id, log_size FROM record WHERE log_sha256 IS NOT NULL
UNION SELECT document_sha256, 'matrix ' || name, document_size FROM matrix
UNION SELECT document_sha256, 'certificate ' || digest, document_size FROM certificate
"""

_KEPT = f"""{_REFERENCES}
UNION SELECT metadata_sha256, filename || '.metadata', NULL FROM live_mirrored
    WHERE url IS NOT NULL AND metadata_sha256 IS NOT NULL
"""  # noqa: S608 - constants
"And what need not be here: METADATA of linked wheels, by which a set is found to be closed."


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What fsck found."""

    files: int
    bytes: int
    damaged: tuple[str, ...]
    "Names whose bytes are absent or have another digest."
    unnamed: int
    "Stored files that nothing names; `index gc` removes them."


def fsck(store: Store, catalogue: Catalogue, tick: Tick = no_tick, *, set_aside: str | None = None) -> Inspection:
    """Rehash every stored file and check the catalogue itself.

    With `set_aside`, the actor's name, damaged files leave the store and the lists; the same bytes can then be uploaded again.
    """
    damaged = [f"catalogue: {row[0]}" for row in catalogue.rows("PRAGMA integrity_check") if row[0] != "ok"]
    damaged += [f"catalogue: a row of {row[0]} points nowhere" for row in catalogue.rows("PRAGMA foreign_key_check")]
    names: dict[str, list[str]] = {}
    for row in catalogue.rows(_REFERENCES):
        names.setdefault(row["digest"], []).append(row["name"])
    total = 0
    for number, (digest, users) in enumerate(sorted(names.items())):
        tick(number, len(names), users[0])
        if store.whole(digest):
            total += store.path(digest).stat().st_size
            continue
        damaged += users
        if set_aside is not None:
            store.set_aside(digest)
    tick(len(names), len(names), "")
    if damaged and set_aside is not None:
        heal(store, catalogue, set_aside)
    kept = {row["digest"] for row in catalogue.rows(_KEPT)}
    unnamed = sum(path.name not in kept for path in store.stored())
    return Inspection(files=len(names), bytes=total, damaged=tuple(sorted(damaged)), unnamed=unnamed)


def gc(store: Store, catalogue: Catalogue, actor: str) -> tuple[int, int]:
    """Remove stored files that nothing names. Returns how many, and their bytes.

    Holds the catalogue's write lock, since an upload gives a file its name and its row under the same lock; but only for
    moments, since uploads wait for it meanwhile.
    """
    count = size = 0
    named = {row["digest"] for row in catalogue.rows(_KEPT)}
    todo = [path for path in store.stored() if path.name not in named]
    while todo:
        with catalogue.change(actor) as change:
            named = {row["digest"] for row in change.execute(_KEPT)}  # again: uploads went on
            end = time.monotonic() + GC_MOMENT
            while todo and time.monotonic() < end:
                path = todo.pop()
                if path.name not in named:
                    size += path.stat().st_size
                    path.unlink()
                    count += 1
        time.sleep(GC_MOMENT / 2)  # whoever waits for the lock polls for it
    with catalogue.change(actor) as change:
        change.note("store.gc", "files", count=count, bytes=size)
    return count, size


def prune(catalogue: Catalogue, actor: str, keep: int, *, dry_run: bool = False) -> list[str]:
    """Delete all but the `keep` newest nightlies of each project and variant (CUDA, Python, platform). Returns the names.

    Files of a published set stay: a set is whole or gone.
    """
    variants: dict[tuple[object, ...], list[tuple[Version, str]]] = {}
    rows = catalogue.rows(
        "SELECT id, filename, project, version, cuda, kind FROM live_file"
        " WHERE channel = 'nightly' AND hidden = 0"
        " AND id NOT IN (SELECT file_id FROM member JOIN release_set ON name = set_name WHERE state <> 'dropped')"
    )
    for row in rows:
        tags = wheel_tags(row["filename"]) if row["kind"] == "bdist_wheel" else frozenset()
        variants.setdefault((row["project"], row["cuda"], row["kind"], tags, split_label(row["filename"])[1]), []).append(
            (Version(row["version"]), row["filename"])
        )
    old = [name for releases in variants.values() for _, name in sorted(releases, reverse=True)[keep:]]
    if old and not dry_run:
        with catalogue.change(actor) as change:
            for name in old:
                change.execute("UPDATE file SET deleted = ? WHERE filename = ?", (change.time, name))
                project = str(change.execute("SELECT project FROM file WHERE filename = ?", (name,)).fetchone()[0])
                change.note("file.prune", name, project, keep=keep)
    return sorted(old)


def heal(store: Store, catalogue: Catalogue, actor: str) -> list[str]:
    """Unlist files whose bytes are absent or cut, as after restoring a copy made in the wrong order; list those that are back.

    Looks at sizes only, so that a start stays quick; `fsck` reads the bytes. Returns the names that are lost now.

    Raises:
        ConfigError: nothing at all is there: a disk that is not mounted, not a loss.
    """
    sizes = store.sizes()

    def lost(row: sqlite3.Row) -> bool:
        return sizes.get(row["sha256"]) != row["size"] or (row["metadata_sha256"] or row["sha256"]) not in sizes

    rows = catalogue.rows("SELECT id, filename, project, sha256, size, metadata_sha256, lost FROM live_file")
    copies = catalogue.rows("SELECT * FROM live_mirrored WHERE url IS NULL")
    if (rows or copies) and not sizes:
        raise ConfigError(
            f"{store.files} is empty, the catalogue is not", remedy="mount or restore the files, then start again"
        )
    changed = [row for row in rows if lost(row) != bool(row["lost"])]
    changed_copies = [row for row in copies if lost(row) != bool(row["lost"])]
    if changed or changed_copies:
        with catalogue.change(actor) as change:
            for row in changed:
                change.execute("UPDATE file SET lost = ? WHERE id = ?", (lost(row), row["id"]))
                change.note("file.lost" if lost(row) else "file.found", row["filename"], row["project"])
            for row in changed_copies:
                where = (lost(row), row["set_name"], row["filename"])
                change.execute("UPDATE mirrored SET lost = ? WHERE set_name = ? AND filename = ?", where)
                change.note("set.lost" if lost(row) else "set.found", f"{row['set_name']} {row['filename']}")
    return sorted({row["filename"] for row in (*rows, *copies) if lost(row)})

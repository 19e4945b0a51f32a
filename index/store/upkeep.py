"""Maintenance of a store: check every byte, delete unreferenced files, delete old nightlies, unlist lost files."""

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
"Maximum seconds that `gc` delays uploads, plus the time to delete one file."


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
"Also METADATA of linked wheels, which may be missing. The check that a set is closed reads it."


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Result of fsck."""

    files: int
    bytes: int
    damaged: tuple[str, ...]
    "Names of files whose bytes are missing or have another digest."
    unnamed: int
    "Unreferenced stored files; `index gc` deletes them."


def fsck(store: Store, catalogue: Catalogue, tick: Tick = no_tick, *, set_aside: str | None = None) -> Inspection:
    """Hash every stored file and check the catalogue.

    With `set_aside` (the actor's name), damaged files are removed from the store and the lists, so that the same bytes can be
    uploaded again.
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
    """Delete unreferenced stored files. Returns their number and bytes.

    Holds the catalogue's write lock, since an upload adds a file and its row under the same lock. Holds it only for short
    times, since uploads wait for it.
    """
    count = size = 0
    named = {row["digest"] for row in catalogue.rows(_KEPT)}
    todo = [path for path in store.stored() if path.name not in named]
    while todo:
        with catalogue.change(actor) as change:
            named = {row["digest"] for row in change.execute(_KEPT)}  # query again, since uploads have continued
            end = time.monotonic() + GC_MOMENT
            while todo and time.monotonic() < end:
                path = todo.pop()
                if path.name not in named:
                    size += path.stat().st_size
                    path.unlink()
                    count += 1
        time.sleep(GC_MOMENT / 2)  # waiting processes poll for the lock
    with catalogue.change(actor) as change:
        change.note("store.gc", "files", count=count, bytes=size)
    return count, size


def prune(catalogue: Catalogue, actor: str, keep: int, *, dry_run: bool = False) -> list[str]:
    """Delete all but the `keep` newest nightlies of each project and variant (CUDA, Python, platform). Returns the names.

    Files of a published set stay: a set is never partial.
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
    """Unlist files with missing or truncated bytes, for example after restoring an inconsistent backup; relist the others.

    Checks only sizes, so that the start stays quick; `fsck` reads the bytes. Returns the names of the lost files.

    Raises:
        ConfigError: every file is missing, which means that the disk is not mounted.
    """
    sizes = store.sizes()

    def lost(row: sqlite3.Row) -> bool:
        return sizes.get(row["sha256"]) != row["size"] or (row["metadata_sha256"] or row["sha256"]) not in sizes

    rows = catalogue.rows("SELECT id, filename, project, sha256, size, metadata_sha256, lost FROM live_file")
    copies = catalogue.rows("SELECT * FROM live_mirrored WHERE url IS NULL")
    if (rows or copies) and not sizes:
        raise ConfigError(
            f"{store.files} is empty, but the catalogue lists files",
            remedy="mount the disk with the files, or restore them from a backup, then repeat the command",
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

"""Operations on projects and releases: host, yank, status, delete."""

from __future__ import annotations

from packaging.utils import canonicalize_version

from gracefarm.errors import UsageError
from index.store.catalogue import Catalogue, Transaction


def host(catalogue: Catalogue, actor: str, names: list[str], *, hosted: bool = True) -> None:
    """Accept, or stop accepting, uploads for these normalised names."""
    with catalogue.change(actor) as change:
        for name in names:
            change.execute(
                "INSERT INTO project (name, hosted) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET hosted = excluded.hosted",
                (name, hosted),
            )
            change.note("project.host" if hosted else "project.unhost", name)


def hosted(catalogue: Catalogue) -> list[str]:
    """Names of the hosted projects."""
    return [row["name"] for row in catalogue.rows("SELECT name FROM project WHERE hosted = 1 ORDER BY name")]


def yank(catalogue: Catalogue, actor: str, project: str, version: str, reason: str | None) -> int:
    """Yank every file of a release with `reason` ("" for no reason); None removes the yank. Returns the number of files.

    Raises:
        UsageError: the release does not exist.
    """
    with catalogue.change(actor) as change:
        names = _update_release(change, "yanked", reason, project, version)
        for name in names:  # one entry per file, since mirrors track files
            change.note("file.unyank" if reason is None else "file.yank", name, project, reason=reason)
    return len(names)


def set_status(catalogue: Catalogue, actor: str, project: str, status: str, reason: str) -> None:
    """Set the status of a project (PEP 792).

    Raises:
        UsageError: the project does not exist.
    """
    with catalogue.change(actor) as change:
        row = change.execute("UPDATE project SET status = ?, reason = ? WHERE name = ?", (status, reason, project))
        if not row.rowcount:
            raise UsageError(
                f"this index has no project {project!r}", remedy="give the name of a project that `index host` lists"
            )
        change.note("project.status", project, project, status=status, reason=reason)


def delete(catalogue: Catalogue, actor: str, project: str, version: str) -> int:
    """Delete a release from every view; `index gc` frees the space. Returns the number of files.

    Raises:
        UsageError: the release does not exist.
    """
    with catalogue.change(actor) as change:
        names = _update_release(change, "deleted", change.time, project, version)
        for name in names:
            change.note("file.delete", name, project)
    return len(names)


def _update_release(change: Transaction, column: str, value: str | None, project: str, version: str) -> list[str]:
    rows = change.execute(
        f"UPDATE file SET {column} = ?"  # noqa: S608 - a constant
        " WHERE id IN (SELECT id FROM live_file WHERE project = ? AND release = ?) RETURNING filename",
        (value, project, canonicalize_version(version)),
    ).fetchall()
    if not rows:
        raise _unknown_release(change, project, version)
    return [row["filename"] for row in rows]


def _unknown_release(change: Transaction, project: str, version: str) -> UsageError:
    rows = change.execute("SELECT DISTINCT release FROM live_file WHERE project = ? ORDER BY release", (project,)).fetchall()
    known = ", ".join(row["release"] for row in rows)
    if known:
        return UsageError(
            f"this index has no release {project} {version}",
            remedy=f"repeat the command with one of the releases of {project}: {known}",
        )
    return UsageError(f"this index has no files of {project}", remedy="give the name of a project that `index stats` lists")

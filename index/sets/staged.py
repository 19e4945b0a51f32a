"""Sets of wheels that become visible together: a set is created hidden (staged), and published only when it is complete."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from gracefarm.errors import UsageError
from index.errors import RefusedError
from index.names import check_set_name, normalise, wheel_tags
from index.sets import closure, machines, pylock
from index.store.catalogue import Catalogue, Transaction
from index.store.files import Store

MAX_UNMET = 40
"Maximum requirements that an error lists."


@dataclass(frozen=True, kw_only=True)
class ExpectedWheel:
    """A wheel that the set's matrix declares."""

    requirement: str
    "For example causal-conv1d==1.7.0. A local version matches its public version."
    python: str = ""
    "For example cp311; empty: any."
    arch: str = ""
    "For example aarch64; empty: any."

    def __str__(self) -> str:
        return " ".join(part for part in (self.requirement, self.python, self.arch) if part)

    def matches(self, project: str, version: str, filename: str) -> bool:
        """Whether this file is the expected wheel."""
        wanted = Requirement(self.requirement)
        if canonicalize_name(wanted.name) != project or not wanted.specifier.contains(version, prereleases=True):
            return False
        if not filename.endswith(".whl"):
            return not self.python and not self.arch
        tags = wheel_tags(filename)
        return any(
            (not self.python or tag.interpreter in (self.python, f"py{self.python[2]}"))
            and (not self.arch or tag.platform == "any" or tag.platform.endswith("_" + self.arch))
            for tag in tags
        )


@dataclass(frozen=True, kw_only=True)
class ReleaseSet:
    """A set as shown by `stage list`."""

    name: str
    state: str
    preview: str
    channel: str
    created: str
    published: str | None
    matrix: tuple[ExpectedWheel, ...]
    files: tuple[str, ...]
    digests: tuple[str, ...]
    "sha256 of each file."
    missing: tuple[str, ...]
    wanted: int
    "Number of entries of the matrix and the lock."
    pylock: bool
    "Whether it has a pylock.toml."
    without: tuple[str, ...]
    "Projects that the set may lack even if its wheels require them."


def parse_matrix(lines: list[str]) -> list[ExpectedWheel]:
    """Parse lines of REQUIREMENT [PYTHON[,PYTHON…]] [ARCH[,ARCH…]]. Lists are combined; `#` starts a comment.

    Raises:
        UsageError: a line has another form.
    """
    return [expected for line in lines if (text := line.partition("#")[0].strip()) for expected in _matrix_line(text)]


def _matrix_line(text: str) -> Iterator[ExpectedWheel]:
    requirement, *rest = text.split()
    try:
        parsed = Requirement(requirement)
    except InvalidRequirement:
        parsed = None
    if parsed is None or len(rest) > 2 or parsed.url:
        raise UsageError(
            f"the matrix line {text!r} is not valid", remedy="write a line such as: causal-conv1d==1.7.0 cp311,cp312 aarch64"
        )
    pythons = rest[0].split(",") if rest else [""]
    arches = rest[1].split(",") if len(rest) > 1 else [""]
    for python, arch in product(pythons, arches):
        yield ExpectedWheel(requirement=requirement, python=python, arch=arch)


def create(
    catalogue: Catalogue,
    actor: str,
    name: str,
    matrix: list[ExpectedWheel],
    channel: str = "release",
    without: Iterable[str] = (),
) -> ReleaseSet:
    """Create a staged set. It may lack the projects in `without`, even if its wheels require them.

    Raises:
        UsageError: the name is in use, or was used by a dropped set: a name must never refer to another set later.
    """
    check_set_name(name)
    left_out = sorted({normalise(project) for project in without})
    with catalogue.change(actor) as change:
        if change.execute("SELECT 1 FROM release_set WHERE name = ?", (name,)).fetchone():
            raise UsageError(f"a set with the name {name!r} exists or existed", remedy="choose a different name")
        change.execute(
            "INSERT INTO release_set (name, state, preview, channel, matrix, created, without)"
            " VALUES (?, 'staged', ?, ?, ?, ?, ?)",
            (
                *(name, secrets.token_urlsafe(32), channel, json.dumps([vars(item) for item in matrix])),
                *(change.time, json.dumps(left_out)),
            ),
        )
        change.note("set.create", name, channel=channel, matrix=[str(item) for item in matrix], without=left_out)
    return find(catalogue, name)


def find(catalogue: Catalogue, name: str) -> ReleaseSet:
    """The set with this name.

    Raises:
        UsageError: no set has this name.
    """
    row = catalogue.row("SELECT * FROM release_set WHERE name = ?", (name,))
    if row is None:
        raise UsageError(f"no set is named {name!r}", remedy="give the name of a set that `index stage list` shows")
    members = catalogue.rows(
        "SELECT project, version, filename, sha256 FROM live_file JOIN member ON file_id = id WHERE set_name = ?"
        " UNION SELECT project, version, filename, sha256 FROM live_mirrored WHERE set_name = ? ORDER BY filename",
        (name, name),
    )
    matrix = tuple(ExpectedWheel(**item) for item in json.loads(row["matrix"]))
    missing = [
        wheel
        for wheel in matrix
        if not any(wheel.matches(member["project"], member["version"], member["filename"]) for member in members)
    ]
    pinned = catalogue.rows("SELECT DISTINCT project, version FROM pin WHERE set_name = ?", (name,))
    same = ("name", "state", "preview", "channel", "created", "published")
    return ReleaseSet(
        **{key: row[key] for key in same},
        matrix=matrix,
        files=tuple(member["filename"] for member in members),
        digests=tuple(member["sha256"] for member in members),
        wanted=len(matrix) + len(pinned),
        pylock=catalogue.row("SELECT 1 FROM set_pylock WHERE set_name = ?", (name,)) is not None,
        without=tuple(json.loads(row["without"])),
        missing=(*(str(wheel) for wheel in missing), *_unfulfilled(catalogue, name)),
    )


def _unfulfilled(catalogue: Catalogue, name: str) -> list[str]:
    """Pins of the set's lock that are not completely mirrored, or whose files are no longer stored."""
    live = {
        row["sha256"]
        for row in catalogue.rows(
            "SELECT sha256 FROM live_file JOIN member ON file_id = id WHERE set_name = ? AND lost = 0"
            " UNION SELECT sha256 FROM live_mirrored WHERE set_name = ? AND lost = 0",
            (name, name),
        )
    }
    pins = catalogue.rows("SELECT * FROM pin WHERE set_name = ? ORDER BY project, version", (name,))
    lacking = [
        f"{row['project']}=={row['version']} of its lock"
        for row in pins
        if not row["done"] or live.isdisjoint(row["sha256"].split())
    ]
    return list(dict.fromkeys(lacking))  # several locks may name the same pin


def all_sets(catalogue: Catalogue) -> list[ReleaseSet]:
    """Every set, newest first."""
    return [find(catalogue, row["name"]) for row in catalogue.rows("SELECT name FROM release_set ORDER BY created DESC")]


def add(catalogue: Catalogue, actor: str, name: str, filenames: list[str]) -> None:
    """Add stored files to a staged set.

    Raises:
        UsageError: a file does not exist, or the set is not staged.
    """
    with catalogue.change(actor) as change:
        check_staged(change, name)
        for filename in filenames:
            row = change.execute("SELECT id, project FROM live_file WHERE filename = ?", (filename,)).fetchone()
            if row is None:
                raise UsageError(f"this index has no file {filename!r}", remedy="give the full file name")
            change.execute("INSERT OR IGNORE INTO member (set_name, file_id) VALUES (?, ?)", (name, row["id"]))
            change.note("set.add", f"{name} {filename}", row["project"])


def publish(store: Store, catalogue: Catalogue, actor: str, name: str) -> ReleaseSet:
    """Make every file of the set visible, in one transaction.

    Raises:
        RefusedError: the set is empty, or lacks a wheel of its matrix, a requirement of a wheel, or a package of its
            pylock.toml. The message lists what is missing.
        UsageError: the set is not staged.
    """
    with catalogue.change(actor) as change:
        check_staged(change, name)
        complete = find(catalogue, name)
        if complete.missing:
            raise RefusedError(
                f"the set {name} lacks {len(complete.missing)} of {complete.wanted} wheels: {'; '.join(complete.missing)}",
                remedy=f"upload these wheels to /stage/{name}/legacy/ or mirror the lock again, then publish again",
            )
        if not complete.files:
            raise RefusedError(
                f"the set {name} is empty", remedy=f"upload its wheels to /stage/{name}/legacy/, then publish again"
            )
        if unmet := _unmet(store, catalogue, complete):
            shown = "; ".join(unmet[:MAX_UNMET]) + (f"; and {len(unmet) - MAX_UNMET} more" if len(unmet) > MAX_UNMET else "")
            raise RefusedError(
                f"the set {name} lacks projects that its wheels require: {shown}",
                remedy=f"upload their wheels to /stage/{name}/legacy/ or mirror a lock that lists them, then publish "
                "again; to "
                "publish a set without a project, create a new set: index stage create NAME --without PROJECT",
            )
        _check_pylock(catalogue, complete)
        rows = change.execute(
            "SELECT project, filename, hidden FROM file JOIN member ON member.file_id = file.id WHERE set_name = ?", (name,)
        ).fetchall()
        change.execute("UPDATE file SET hidden = 0 WHERE id IN (SELECT file_id FROM member WHERE set_name = ?)", (name,))
        change.execute("UPDATE release_set SET state = 'published', published = ? WHERE name = ?", (change.time, name))
        change.note("set.publish", name, *{row["project"] for row in rows}, files=list(complete.files))
        for row in rows:
            if row["hidden"]:  # for mirrors, which did not see the upload of the hidden file
                change.note("file.show", row["filename"], row["project"], set=name)
    return find(catalogue, name)


def put_pylock(catalogue: Catalogue, actor: str, name: str, raw: bytes) -> None:
    """Store the pylock.toml of a staged set; it replaces an earlier one.

    Raises:
        RefusedError, TooLargeError: see `pylock.parse`.
        UsageError: the set is not staged.
    """
    lock = pylock.parse(raw)
    with catalogue.change(actor) as change:
        check_staged(change, name)
        change.execute("INSERT OR REPLACE INTO set_pylock (set_name, content) VALUES (?, ?)", (name, raw))
        change.note("set.pylock", name, packages=len(lock.packages))


def pylock_of(catalogue: Catalogue, name: str) -> bytes | None:
    """The bytes of a set's pylock.toml, or None."""
    row = catalogue.row("SELECT content FROM set_pylock WHERE set_name = ?", (name,))
    return bytes(row["content"]) if row is not None else None


def _check_pylock(catalogue: Catalogue, complete: ReleaseSet) -> None:
    raw = pylock_of(catalogue, complete.name)
    if raw is not None and (lacking := pylock.lacking(pylock.parse(raw), complete.digests)):
        raise RefusedError(
            f"the set {complete.name} lacks packages of its {pylock.FILENAME}: {'; '.join(lacking[:MAX_UNMET])}",
            remedy=f"upload or mirror the missing files, or store the correct {pylock.FILENAME} with `index stage "
            "pylock`, then publish again",
        )


def _unmet(store: Store, catalogue: Catalogue, complete: ReleaseSet) -> list[str]:
    own = catalogue.rows("SELECT * FROM live_file JOIN member ON file_id = id WHERE set_name = ?", (complete.name,))
    mirrored = catalogue.rows("SELECT * FROM live_mirrored WHERE set_name = ?", (complete.name,))
    files = [*(closure.read(store, row, own=True) for row in own), *(closure.read(store, row, own=False) for row in mirrored)]
    pythons = {machines.python(wheel.python) for wheel in complete.matrix if wheel.python.startswith("cp3")}
    arches = {wheel.arch for wheel in complete.matrix if wheel.arch}
    return closure.unmet(files, sorted(pythons), sorted(arches), without=complete.without)


def drop(catalogue: Catalogue, actor: str, name: str) -> None:
    """Drop a staged set. Its hidden files that no other set contains are deleted, and their names become available again.

    Raises:
        UsageError: the set is not staged; a published set cannot be dropped.
    """
    with catalogue.change(actor) as change:
        check_staged(change, name)
        rows = change.execute(
            # live_file, not file: the name of a deleted file cannot be reused
            "SELECT id, filename FROM live_file JOIN member ON file_id = id WHERE set_name = ? AND hidden = 1"
            " AND NOT EXISTS (SELECT 1 FROM member AS other WHERE other.file_id = id AND other.set_name <> ?)",
            (name, name),
        ).fetchall()
        change.execute("DELETE FROM member WHERE set_name = ?", (name,))
        change.execute("DELETE FROM mirrored WHERE set_name = ?", (name,))
        change.execute("DELETE FROM pin WHERE set_name = ?", (name,))
        change.execute("DELETE FROM set_pylock WHERE set_name = ?", (name,))
        for row in rows:
            change.execute("DELETE FROM file WHERE id = ?", (row["id"],))
        change.execute("UPDATE release_set SET state = 'dropped' WHERE name = ?", (name,))
        change.note("set.drop", name, files=[row["filename"] for row in rows])


def check_staged(change: Transaction, name: str) -> None:
    """Check that a set may be changed.

    Raises:
        UsageError: no set has this name, or the set is published or dropped.
    """
    row = change.execute("SELECT state FROM release_set WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise UsageError(f"no set is named {name!r}", remedy=f"create the set with `index stage create {name}`")
    if row["state"] != "staged":
        raise UsageError(
            f"the set {name} is {row['state']}, so it cannot be changed",
            remedy="create a new set: index stage create NAME",
        )

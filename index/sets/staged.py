"""Sets of wheels that become visible at once: created staged and hidden, published whole, refused while incomplete."""

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
"Requirements that a refusal names."


@dataclass(frozen=True, kw_only=True)
class ExpectedWheel:
    """One wheel that a set's matrix declares."""

    requirement: str
    "As causal-conv1d==1.7.0: a local version fits its public one."
    python: str = ""
    "As cp311; empty: any."
    arch: str = ""
    "As aarch64; empty: any."

    def __str__(self) -> str:
        return " ".join(part for part in (self.requirement, self.python, self.arch) if part)

    def matches(self, project: str, version: str, filename: str) -> bool:
        """Is this file the expected wheel?"""
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
    """A set as `stage list` shows it."""

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
    "How many the matrix and the lock name."
    pylock: bool
    "It has a pylock.toml."
    without: tuple[str, ...]
    "Projects that its wheels require and that it does without."


def parse_matrix(lines: list[str]) -> list[ExpectedWheel]:
    """Lines of REQUIREMENT [PYTHON[,PYTHON…]] [ARCH[,ARCH…]]; commas multiply; `#` starts a comment.

    Raises:
        UsageError: a line that is not of that form.
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
            f"the matrix line {text!r} cannot be read", remedy="write it as: causal-conv1d==1.7.0 cp311,cp312 aarch64"
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
    """A new staged set, which may do `without` these projects, whatever its wheels require.

    Raises:
        UsageError: the name is taken, by a dropped set too: a preview address must never come to mean something else.
    """
    check_set_name(name)
    left_out = sorted({normalise(project) for project in without})
    with catalogue.change(actor) as change:
        if change.execute("SELECT 1 FROM release_set WHERE name = ?", (name,)).fetchone():
            raise UsageError(f"there was a set {name!r} already", remedy="choose another name")
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
    """One set.

    Raises:
        UsageError: there is none of that name.
    """
    row = catalogue.row("SELECT * FROM release_set WHERE name = ?", (name,))
    if row is None:
        raise UsageError(f"there is no set {name!r}", remedy="`index stage list` shows them")
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
    """Pins of the set's lock of which not every file was brought in, or none is here any more."""
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
    return list(dict.fromkeys(lacking))  # several locks may name it


def all_sets(catalogue: Catalogue) -> list[ReleaseSet]:
    """Every set, the newest first."""
    return [find(catalogue, row["name"]) for row in catalogue.rows("SELECT name FROM release_set ORDER BY created DESC")]


def add(catalogue: Catalogue, actor: str, name: str, filenames: list[str]) -> None:
    """Put files that the index has into a staged set.

    Raises:
        UsageError: there is no such file, or the set is not staged.
    """
    with catalogue.change(actor) as change:
        check_staged(change, name)
        for filename in filenames:
            row = change.execute("SELECT id, project FROM live_file WHERE filename = ?", (filename,)).fetchone()
            if row is None:
                raise UsageError(f"there is no file {filename!r}", remedy="give the file's full name")
            change.execute("INSERT OR IGNORE INTO member (set_name, file_id) VALUES (?, ?)", (name, row["id"]))
            change.note("set.add", f"{name} {filename}", row["project"])


def publish(store: Store, catalogue: Catalogue, actor: str, name: str) -> ReleaseSet:
    """Make every file of the set visible, in one transaction.

    Raises:
        RefusedError: the declared matrix is incomplete, a wheel requires or its pylock.toml names what the set lacks, or the
            set is empty; names what is missing.
        UsageError: the set is not staged.
    """
    with catalogue.change(actor) as change:
        check_staged(change, name)
        complete = find(catalogue, name)
        if complete.missing:
            raise RefusedError(
                f"the set {name} lacks {len(complete.missing)} of {complete.wanted}: {'; '.join(complete.missing)}",
                remedy=f"upload them to /stage/{name}/legacy/ (or mirror the lock again), then publish again",
            )
        if not complete.files:
            raise RefusedError(f"the set {name} is empty", remedy=f"upload its wheels to /stage/{name}/legacy/ first")
        if unmet := _unmet(store, catalogue, complete):
            shown = "; ".join(unmet[:MAX_UNMET]) + (f"; and {len(unmet) - MAX_UNMET} more" if len(unmet) > MAX_UNMET else "")
            raise RefusedError(
                f"the set {name} lacks {len(unmet)} of what its wheels require: {shown}",
                remedy=f"upload them to /stage/{name}/legacy/, or mirror a lock that has them, then publish again; what a set"
                " does without is named when it is created (--without)",
            )
        _check_pylock(catalogue, complete)
        rows = change.execute(
            "SELECT project, filename, hidden FROM file JOIN member ON member.file_id = file.id WHERE set_name = ?", (name,)
        ).fetchall()
        change.execute("UPDATE file SET hidden = 0 WHERE id IN (SELECT file_id FROM member WHERE set_name = ?)", (name,))
        change.execute("UPDATE release_set SET state = 'published', published = ? WHERE name = ?", (change.time, name))
        change.note("set.publish", name, *{row["project"] for row in rows}, files=list(complete.files))
        for row in rows:
            if row["hidden"]:  # for mirrors, which could not see it when it was uploaded
                change.note("file.show", row["filename"], row["project"], set=name)
    return find(catalogue, name)


def put_pylock(catalogue: Catalogue, actor: str, name: str, raw: bytes) -> None:
    """Give a staged set its pylock.toml, in place of the one that it had.

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
    """The bytes of a set's pylock.toml, if it has one."""
    row = catalogue.row("SELECT content FROM set_pylock WHERE set_name = ?", (name,))
    return bytes(row["content"]) if row is not None else None


def _check_pylock(catalogue: Catalogue, complete: ReleaseSet) -> None:
    raw = pylock_of(catalogue, complete.name)
    if raw is not None and (lacking := pylock.lacking(pylock.parse(raw), complete.digests)):
        raise RefusedError(
            f"the set {complete.name} lacks what its {pylock.FILENAME} names: {'; '.join(lacking[:MAX_UNMET])}",
            remedy=f"upload or mirror the files, or put the right {pylock.FILENAME}, then publish again",
        )


def _unmet(store: Store, catalogue: Catalogue, complete: ReleaseSet) -> list[str]:
    own = catalogue.rows("SELECT * FROM live_file JOIN member ON file_id = id WHERE set_name = ?", (complete.name,))
    mirrored = catalogue.rows("SELECT * FROM live_mirrored WHERE set_name = ?", (complete.name,))
    files = [*(closure.read(store, row, own=True) for row in own), *(closure.read(store, row, own=False) for row in mirrored)]
    pythons = {machines.python(wheel.python) for wheel in complete.matrix if wheel.python.startswith("cp3")}
    arches = {wheel.arch for wheel in complete.matrix if wheel.arch}
    return closure.unmet(files, sorted(pythons), sorted(arches), without=complete.without)


def drop(catalogue: Catalogue, actor: str, name: str) -> None:
    """Give a staged set up: files that nobody else has seen or holds vanish, and their names are free again.

    Raises:
        UsageError: the set is not staged; what was published never disappears silently.
    """
    with catalogue.change(actor) as change:
        check_staged(change, name)
        rows = change.execute(
            # not those of `file`: a deleted name is never free again
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
    """Nothing changes a set that is published.

    Raises:
        UsageError: there is none of that name, or it is published or dropped.
    """
    row = change.execute("SELECT state FROM release_set WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise UsageError(f"there is no set {name!r}", remedy="`index stage create` makes one")
    if row["state"] != "staged":
        raise UsageError(f"the set {name} is {row['state']}", remedy="a set changes only while it is staged; create a new one")

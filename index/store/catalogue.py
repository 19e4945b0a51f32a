"""The catalogue: an SQLite file in WAL mode that stores which files exist, who may write, and what happened.

Every change is one transaction that also appends to the audit log. The log's serial orders all changes.
Only `open_catalogue` and `Catalogue.close` checkpoint. Between them the main file does not change and the WAL only grows, so
that a plain copy of the folder is a consistent catalogue of one moment (docs/howto/index-operation.md).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from gracefarm.errors import ConfigError
from index.errors import StoreFullError
from index.store import variants

SCHEMA_VERSION = 6
"The version of schema.sql. upgrade-N.sql upgrades a catalogue from the version before N to N."

_VIEWS = (
    "CREATE TEMP VIEW live_file AS SELECT * FROM file WHERE deleted IS NULL",
    "CREATE TEMP VIEW public_file AS SELECT * FROM live_file WHERE hidden = 0 AND lost = 0",
    "CREATE TEMP VIEW live_mirrored AS SELECT * FROM mirrored WHERE withdrawn IS NULL",
)
"""Views that queries use instead of the tables: files that are not deleted, public files, and mirrored files that are not
withdrawn. They are temporary views of the connection, so the catalogue's file keeps the schema that older indexes know."""

Parameters = tuple[object, ...] | Mapping[str, object]

WAL_BOUND = 1 << 30
"WAL size in bytes at which a running server checkpoints anyway: a full disk is worse than one spoilt copy."


def timestamp(moment: datetime | None = None) -> str:
    """A time, or now, in the format of PEP 700: yyyy-mm-ddThh:mm:ss.ffffffZ, in UTC."""
    return (moment.astimezone(UTC) if moment else datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(kw_only=True)
class Transaction:
    """One transaction: all its changes become visible together, with an entry in the audit log."""

    database: sqlite3.Connection
    actor: str
    time: str
    touched: set[str] = field(default_factory=set)
    "Projects that `note` marked as changed."

    def note(self, action: str, subject: str, *projects: str, **detail: object) -> int:
        """Append to the audit log and mark `projects` as changed; "" is ignored. Returns the serial."""
        row = self.database.execute(
            "INSERT INTO audit (time, actor, action, subject, detail) VALUES (?, ?, ?, ?, ?) RETURNING serial",
            (self.time, self.actor, action, subject, json.dumps(detail, default=str, sort_keys=True)),
        ).fetchone()
        serial = int(row[0])
        self.touched.update(projects)
        self.database.executemany("UPDATE project SET serial = ? WHERE name = ?", [(serial, name) for name in projects])
        return serial

    def execute(self, sql: str, parameters: Parameters = ()) -> sqlite3.Cursor:
        """Execute a statement inside the transaction."""
        return self.database.execute(sql, parameters)


class Catalogue:
    """Connections to one catalogue, one per thread. Writers wait for each other; readers never wait."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []

    @property
    def database(self) -> sqlite3.Connection:
        """This thread's connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = _connect(self.path)
            self._local.connection = connection
            self._all.append(connection)
        return connection

    def rows(self, sql: str, parameters: Parameters = ()) -> list[sqlite3.Row]:
        """All rows of a query."""
        return self.database.execute(sql, parameters).fetchall()

    def row(self, sql: str, parameters: Parameters = ()) -> sqlite3.Row | None:
        """The first row of a query, if any."""
        row: sqlite3.Row | None = self.database.execute(sql, parameters).fetchone()
        return row

    @contextmanager
    def change(self, actor: str) -> Iterator[Transaction]:
        """A transaction: durable if the block succeeds, rolled back if it raises.

        Raises:
            StoreFullError: the disk has no space for the WAL; nothing was changed.
        """
        database = self.database
        try:
            with _transaction(database):
                transaction = Transaction(database=database, actor=actor, time=timestamp())
                yield transaction
                variants.keep(database, transaction.touched)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname not in ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"):
                raise
            raise StoreFullError(
                f"no space left on the file system that holds {self.path.parent}",
                remedy="free space there, then repeat the command; nothing was changed",
            ) from error

    @contextmanager
    def moment(self) -> Iterator[None]:
        """All reads of this thread in the block see the same state, regardless of commits in the meantime."""
        if self.database.in_transaction:  # an enclosing block already fixed the state
            yield
            return
        self.database.execute("BEGIN")
        try:
            yield
        finally:
            self.database.execute("ROLLBACK")

    def version(self) -> int:
        """A number that changes when another connection, of any process, commits."""
        return int(self.database.execute("PRAGMA data_version").fetchone()[0])

    def serial(self) -> int:
        """Serial of the last change; 0 before the first."""
        return int(self.database.execute("SELECT coalesce(max(serial), 0) FROM audit").fetchone()[0])

    def tidy(self) -> None:
        """Checkpoint the WAL if it exceeds its limit. Writers call this after a commit."""
        wal = self.path.with_name(self.path.name + "-wal")
        if wal.exists() and wal.stat().st_size > WAL_BOUND:
            self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close this process's connections."""
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._local = threading.local()


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    database.row_factory = sqlite3.Row
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("PRAGMA foreign_keys=ON")
    database.execute("PRAGMA wal_autocheckpoint=0")
    for view in _VIEWS:
        database.execute(view)
    # The last connection checkpoints when it closes, which is as safe as the checkpoint at the start.
    return database


def open_catalogue(path: Path) -> Catalogue:
    """Open or create the catalogue at `path`.

    Raises:
        ConfigError: the file is not a catalogue, or a newer index wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    catalogue = Catalogue(path)
    try:
        _ensure_schema(catalogue)
    except sqlite3.DatabaseError as error:
        catalogue.close()
        raise ConfigError(
            f"{path}, the database of the index, cannot be read: {error}",
            remedy="restore the file from a backup; or move it away, then import the wheels again with `index import FOLDER`",
        ) from error
    return catalogue


def _ensure_schema(catalogue: Catalogue) -> None:
    database = catalogue.database
    version = _schema(database)
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{catalogue.path} was written by a newer index (its schema is {version}, this index supports {SCHEMA_VERSION})",
            remedy="upgrade gracefarm on this machine",
        )
    if version < SCHEMA_VERSION:
        with _transaction(database):
            version = _schema(database)  # check again: another process may have upgraded it in the meantime
            upgrades = [f"upgrade-{number}.sql" for number in range(version + 1, SCHEMA_VERSION + 1)]
            for script in upgrades if version else ["schema.sql"]:
                for statement in _statements(resources.files("index.store").joinpath(script).read_text()):
                    database.execute(statement)
            database.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),))


def _schema(database: sqlite3.Connection) -> int:
    """The version of the schema; 0 for an empty file."""
    if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
        return 0
    return int(database.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0])


def _statements(script: str) -> Iterator[str]:
    """Execute a script statement by statement inside our transaction (executescript would commit it)."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""

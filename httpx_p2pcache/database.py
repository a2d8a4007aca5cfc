"""The runner's file: hishel's tables in SQLite, and one of ours beside them."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from hishel import SqliteStorage

from httpx_p2pcache import tombstones
from httpx_p2pcache.files import private_directory, private_file
from httpx_p2pcache.memory import State

logger = logging.getLogger("httpx_p2pcache")

BUSY_MS = 1000  # what a write waits for another process; it is given up then, and the entry is not kept
CHECKED_PAGES = 8192  # a file of up to 32 MiB is checked when it is opened, which takes milliseconds
FILE = "p2pcache-v1.db"

Row = tuple[bytes, bytes, int, float]  # id, data, number of chunks, when it was used


class Connection(sqlite3.Connection):
    """A connection on which hishel, which commits after every statement, can be made to do so after many."""

    _together = False

    def version(self) -> int:
        """SQLite's ``data_version``: another one once another process, or connection, has written."""
        (version,) = self.execute("PRAGMA data_version").fetchone()
        return int(version)

    def rows(self, key: bytes) -> list[Row]:
        """A key's rows as they are now."""
        sql = "SELECT id, data, chunk_count, last_accessed_at FROM entries WHERE cache_key = ? AND expires_at IS NULL"
        return self.execute(sql, (key.hex().encode(),)).fetchall()

    def body(self, row: Row) -> bytes | None:
        """The body that belongs to a row; None if it was evicted meanwhile."""
        sql = "SELECT chunk_data FROM streams WHERE entry_id = ? ORDER BY chunk_number"
        chunks = [chunk for (chunk,) in self.execute(sql, (row[0],))]
        return b"".join(chunks) if len(chunks) == row[2] else None

    def touch(self, id_: bytes, now: float) -> None:
        """Note that an entry was used, unless another process is writing: who reads waits for nobody."""
        with contextlib.suppress(sqlite3.Error), self.impatient():
            self.execute("UPDATE entries SET last_accessed_at = ? WHERE id = ?", (now, id_))

    def clear(self) -> None:
        """Remove every entry, and give the room back. Raises ``sqlite3.Error``."""
        self.executescript("BEGIN IMMEDIATE; DELETE FROM streams; DELETE FROM entries; COMMIT; VACUUM;")

    def commit(self) -> None:
        """Not while many are written :meth:`together`."""
        if not self._together:
            super().commit()

    @contextlib.contextmanager
    def together(self, *, patient: bool) -> Iterator[bool]:
        """One transaction, unless another process has the file for longer than is waited; yields whether it was begun.

        Not ``patient``: nothing is waited for. Without it each statement finds that anew. Raises ``sqlite3.Error``
        where all of it could not be written.
        """
        self._together = True
        try:
            with contextlib.nullcontext() if patient else self.impatient():
                self.execute("BEGIN IMMEDIATE")
        except BaseException as exc:  # it may have begun all the same, if we were interrupted
            self._together = False
            if self.in_transaction:
                self.rollback()
            if not isinstance(exc, sqlite3.Error):
                raise
        try:
            yield self._together
        finally:
            if self._together:
                self._together = False
                try:
                    self.commit()
                except sqlite3.Error:
                    with contextlib.suppress(sqlite3.Error):
                        self.rollback()
                    raise

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        """Who writes does not wait for another process."""
        self.execute("PRAGMA busy_timeout=0")
        try:
            yield
        finally:
            self.execute(f"PRAGMA busy_timeout={BUSY_MS}")


def state_of(rows: list[Row]) -> State:
    return [(id_, hash(data)) for id_, data, _, _ in rows]


def connect(path: str | Path) -> Connection:
    """A connection to the database in a file, or in ":memory:"."""
    return sqlite3.connect(
        path, check_same_thread=False, isolation_level=None, timeout=BUSY_MS / 1000, factory=Connection
    )


def connect_in(directory: Path) -> Connection:
    """A connection to the store's file in a directory that nobody else can read. Raises OSError, ``sqlite3.Error``."""
    private_directory(directory)
    return connect(private_file(directory / FILE))  # SQLite gives -wal and -shm the mode of the database itself


def storage_on(connection: Connection, max_size: int) -> SqliteStorage:
    """hishel's storage on a connection, with its tables and ours; ``max_size`` in bytes, 0 for no limit.

    Raises ``sqlite3.Error`` or RuntimeError for a file that is damaged or somebody else's; it is closed then.
    """
    storage = SqliteStorage(max_size=max_size or None)
    storage.connection = connection  # given at once it would be tried out by a thread, of which there may be none
    try:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()  # a damaged file shows itself here, or below
        if pages <= CHECKED_PAGES and connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("database disk image is malformed")
        with storage._lock:  # the schema is made now: hishel would make it in the middle of a look-up
            storage._ensure_connection()
        connection.execute(tombstones.TABLE)
        connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    except BaseException:
        connection.close()
        raise
    return storage


def move_aside(directory: Path) -> bool:
    """Whether a damaged file could be given another name, which is said."""
    path = directory / FILE
    aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
    try:
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.rename(aside)
    except OSError:
        return False
    logger.warning("the store %s could not be read: it was moved to %s, and begins anew", path, aside.name)
    return True

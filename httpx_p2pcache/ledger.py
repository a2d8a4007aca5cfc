"""What all processes of a runner have counted, step after step: one small SQLite file beside the store.

A row is a minute, an endpoint, a counter, and how much was added; so any period can be summed, and drawn. Each process
adds what it has counted since it last did, once a second while there is something, and when it closes: one that is
killed takes at most its last second with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from httpx_p2pcache.files import private_file
from httpx_p2pcache.stats import Counts, Stats

logger = logging.getLogger("httpx_p2pcache")

FLUSH_SECONDS = 1.0
BUSY_SECONDS = 2.0  # what a write waits for another process
KEPT_MINUTES = 30 * 24 * 60
_FILE = "stats-v1.db"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS counts (
    minute INTEGER NOT NULL, endpoint TEXT NOT NULL, name TEXT NOT NULL, amount INTEGER NOT NULL,
    PRIMARY KEY (minute, endpoint, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runner (id TEXT NOT NULL);
"""


class Ledger:
    """The ledger of the runner whose store is in ``directory``.

    A ledger that cannot be written or read loses counts, and says so at debug; it never fails a request.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / _FILE
        self._lock = threading.Lock()
        self._written: Counts = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, stats: Stats) -> None:
        """Write down what ``stats`` counts, in a thread of its own, until :meth:`close`."""
        self._thread = threading.Thread(target=self._run, args=(stats,), name="p2pcache-ledger", daemon=True)
        self._thread.start()

    def _run(self, stats: Stats) -> None:
        while not self._wake.wait(FLUSH_SECONDS):
            self.flush(stats)

    def close(self, stats: Stats) -> None:
        """Write what is left, and stop."""
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * BUSY_SECONDS)
        self.flush(stats)

    def flush(self, stats: Stats) -> None:
        """Write down what has been counted since the last time."""
        with self._lock:
            now, minute = stats.by_endpoint(), int(time.time() // 60)
            rows = [
                (minute, endpoint, name, amount - self._written.get(endpoint, {}).get(name, 0))
                for endpoint, counts in now.items()
                for name, amount in counts.items()
            ]
            rows = [row for row in rows if row[3]]
            if not rows:
                return
            try:
                with self._opened() as connection, connection:
                    connection.execute("BEGIN IMMEDIATE")
                    if not self._written:
                        connection.execute("DELETE FROM counts WHERE minute < ?", (minute - KEPT_MINUTES,))
                    connection.executemany(
                        "INSERT INTO counts VALUES (?, ?, ?, ?)"
                        " ON CONFLICT (minute, endpoint, name) DO UPDATE SET amount = amount + excluded.amount",
                        rows,
                    )
            except (OSError, sqlite3.Error) as exc:
                logger.debug("counts could not be written down: %r", exc)
            else:
                self._written = now

    def read(self, since: float = 0.0) -> Counts:
        """What was counted since the Unix time ``since``, to the minute, by endpoint and counter."""
        rows = self._select(
            "SELECT endpoint, name, sum(amount) FROM counts WHERE minute >= ? GROUP BY endpoint, name",
            (int(since // 60),),
        )
        found: Counts = {}
        for endpoint, name, amount in rows:
            found.setdefault(endpoint, {})[name] = amount
        return found

    def by_minute(self, since: float) -> list[tuple[int, dict[str, int]]]:
        """The same of each minute (its Unix time), over all endpoints, the oldest first."""
        rows = self._select(
            "SELECT minute, name, sum(amount) FROM counts WHERE minute >= ? GROUP BY minute, name ORDER BY minute",
            (int(since // 60),),
        )
        found: dict[int, dict[str, int]] = {}
        for minute, name, amount in rows:
            found.setdefault(minute * 60, {})[name] = amount
        return list(found.items())

    def runner(self) -> str:
        """The name of this runner among others; made up with the file."""
        rows = self._select("SELECT id FROM runner", ())
        return str(rows[0][0]) if rows else ""

    def clear(self) -> None:
        """Begin to count anew. Raises OSError if that is not possible."""
        try:
            with self._opened() as connection:
                connection.execute("DELETE FROM counts")
        except sqlite3.Error as exc:
            raise OSError(f"{self._path.name}: {exc}") from exc

    def _select(self, sql: str, parameters: tuple[object, ...]) -> list[tuple[Any, ...]]:
        try:
            with self._opened() as connection:
                return connection.execute(sql, parameters).fetchall()
        except (OSError, sqlite3.Error) as exc:
            logger.debug("counts could not be read: %r", exc)
            return []

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        # Opened for each use: it is written once a second at the most, and nothing is open across a fork.
        with _in_use:
            new = not self._path.exists()
            connection = sqlite3.connect(private_file(self._path), isolation_level=None, timeout=BUSY_SECONDS)
            try:
                if new or connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    connection.executescript(f"PRAGMA journal_mode=WAL; BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
                    connection.execute(
                        "INSERT INTO runner SELECT ? WHERE NOT EXISTS (SELECT 1 FROM runner)", (uuid.uuid4().hex,)
                    )
                connection.execute("PRAGMA synchronous=OFF")
                yield connection
            finally:
                connection.close()


# A child that is forked while another thread is inside SQLite inherits a mutex that nobody will release.
_in_use = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_in_use.acquire, after_in_parent=_in_use.release, after_in_child=_in_use.release)

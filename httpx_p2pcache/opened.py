"""The store's file while it is open: by us, and by hishel's storage on the same connection."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from hishel import SqliteStorage

from httpx_p2pcache.database import Connection, connect, connect_in, move_aside, storage_on

logger = logging.getLogger("httpx_p2pcache")


class Opened:
    """The file in a directory, opened when it is needed; each of its users holds the store's lock.

    One that cannot be used is replaced by one in memory, which is said once; a damaged one is moved aside first.
    """

    def __init__(self, directory: Path, max_size: int) -> None:
        self._directory = directory
        self._max_size = max_size
        self._storage: SqliteStorage | None = None
        self.connection: Connection | None = None  # while it is open
        self.version = -1  # its ``data_version``, when it was looked at last
        self._complained = False

    @property
    def connected(self) -> Connection:
        self.storage()
        assert self.connection is not None
        return self.connection

    def storage(self) -> SqliteStorage:
        if self._storage is None:
            self._open()
            assert self._storage is not None
        return self._storage

    def _open(self) -> None:
        try:
            self._use(connect_in(self._directory))
        except (sqlite3.DatabaseError, RuntimeError) as exc:
            if isinstance(exc, sqlite3.OperationalError) or not move_aside(self._directory):
                self._use_memory(exc)
            else:
                self._use(connect_in(self._directory))
        except OSError as exc:
            self._use_memory(exc)

    def _use(self, connection: Connection) -> None:
        self._storage, self.connection = storage_on(connection, self._max_size), connection
        self.version = connection.version()

    def _use_memory(self, exc: Exception) -> None:
        logger.warning(
            "CACHE_DIR %s cannot be used (%s): entries are kept in memory for this process only. "
            "Set CACHE_DIR to a directory you can write.",
            self._directory,
            exc,
        )
        self._use(connect(":memory:"))

    def shut(self) -> None:
        try:
            if self._storage is not None:
                self._storage.close()
        finally:
            self._storage = self.connection = None
            self.version = -1

    @contextlib.contextmanager
    def writing(self, *, patient: bool = True) -> Iterator[SqliteStorage]:
        """hishel's storage, to write to; ``patient``: another process that has the file is waited for."""
        storage, _at_work.opened = self.storage(), self
        try:
            with contextlib.nullcontext() if patient else self.connected.impatient():
                yield storage
        finally:
            _at_work.opened = None

    def complain(self) -> None:
        """Say, once, that it cannot be written."""
        if not self._complained:
            self._complained = True
            logger.warning("the store in %s cannot be written: what it cannot keep is not cached", self._directory)


class _SaidOnce(logging.Filter):
    """hishel says of every entry that it cannot write, with a traceback: of ours, once is enough."""

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002 - the contract's signature
        opened: Opened | None = getattr(_at_work, "opened", None)
        if opened is not None:
            opened.complain()
        return opened is None


_at_work = threading.local()
logging.getLogger("hishel._core._storages._sync_sqlite").addFilter(_SaidOnce())

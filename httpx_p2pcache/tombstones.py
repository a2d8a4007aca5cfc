"""What was written to, or refused, and when: what is older and still arrives is not stored.

In memory for what arrives in this process, and in a table beside hishel's for what another process of the runner has
received already and not yet written.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections import OrderedDict

logger = logging.getLogger("httpx_p2pcache")

TOMBSTONE_SECONDS = 3600.0  # how long an invalidation outlives a publication that was on its way
MAX_TOMBSTONES = 100_000
FEW = 32  # that are all read at once, so that none of them has to be looked for
EVERYBODY = "*"
TABLE = (
    "CREATE TABLE IF NOT EXISTS tombstones"
    " (cache_key BLOB, identity TEXT, since REAL NOT NULL, PRIMARY KEY (cache_key, identity)) WITHOUT ROWID"
)


class Tombstones:
    """Of each cache key and identity, or :data:`EVERYBODY`, the Unix time before which what was asked for is void."""

    def __init__(self) -> None:
        self._since: OrderedDict[tuple[bytes, str], float] = OrderedDict()
        self._unchecked = 0  # rows written since it was looked whether there are too many

    def void(self, key: bytes, identity: str, since: float) -> bool:
        """Whether a key was written to, or an identity refused, after ``since``."""
        return any(self._since.get((key, who), -math.inf) > since for who in (EVERYBODY, identity))

    def learn(self, connection: sqlite3.Connection) -> bool:
        """Read what processes have noted. True if that was all; if there is more, :func:`noted` has to be asked.

        Raises ``sqlite3.Error``.
        """
        rows = connection.execute("SELECT cache_key, identity, since FROM tombstones LIMIT ?", (FEW + 1,)).fetchall()
        for key, identity, since in rows[:FEW]:
            self._note(key, identity, since)
        self._forget(time.time())
        return len(rows) <= FEW

    def bury(self, connection: sqlite3.Connection, keys: list[bytes], identity: str, now: float) -> None:
        """What of these keys was asked for before ``now`` is void, here and in other processes that still write it."""
        for key in keys:
            self._note(key, identity, now)
        self._forget(now)
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("DELETE FROM tombstones WHERE since < ?", (now - TOMBSTONE_SECONDS,))
                rows = [(key, identity, now) for key in keys]
                connection.executemany(
                    "INSERT INTO tombstones VALUES (?, ?, ?)"
                    " ON CONFLICT DO UPDATE SET since = max(since, excluded.since)",
                    rows,
                )
                self._unchecked += len(rows)
                if self._unchecked > MAX_TOMBSTONES // 10:  # to look for what is too much takes a tenth of a second
                    self._unchecked = 0
                    connection.execute(
                        "DELETE FROM tombstones WHERE since <"
                        " (SELECT since FROM tombstones ORDER BY since DESC LIMIT 1 OFFSET ?)",
                        (MAX_TOMBSTONES,),
                    )
        except sqlite3.Error:
            logger.debug("a removal could not be noted for other processes", exc_info=True)

    def _note(self, key: bytes, identity: str, since: float) -> None:
        self._since[key, identity] = max(since, self._since.get((key, identity), since))
        self._since.move_to_end((key, identity))

    def _forget(self, now: float) -> None:
        old = now - TOMBSTONE_SECONDS
        while self._since and (next(iter(self._since.values())) < old or len(self._since) > MAX_TOMBSTONES):
            self._since.popitem(last=False)


def noted(connection: sqlite3.Connection, key: bytes, identity: str, since: float) -> bool:
    """The same as :meth:`Tombstones.void`, as any process of the runner has noted it. Raises ``sqlite3.Error``."""
    sql = "SELECT 1 FROM tombstones WHERE cache_key = ? AND identity IN (?, ?) AND since > ?"
    return connection.execute(sql, (key, EVERYBODY, identity, since)).fetchone() is not None

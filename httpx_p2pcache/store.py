"""The runner's store: a memory layer over hishel's SQLite file, shared by every process of the runner.

The memory layer holds what was read or written last, decoded and with its decisions prepared. It is valid while
SQLite's ``data_version`` is unchanged, which says in 4 µs whether another process has written. If one has, a key is
valid where its rows are still those that were loaded, which is asked once for each key and takes a tenth of loading it.

What adds is in memory at once. In a process with a node, which tells all others by itself (``behind``), a thread writes
it a moment later, so that no caller waits for the disk; what takes away is written at once, after all that was to be
written before it. There work that ends in a save may be put off as well, until somebody looks for its key or a few
milliseconds have passed: its caller goes first. What a process removes while another has not yet written it is not
written any more: a table of its own, ``tombstones``, says so. A process that is killed loses the last moment's entries.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hishel import SqliteStorage

from httpx_p2pcache.behind import STOP_SECONDS, Behind
from httpx_p2pcache.database import Row, move_aside, state_of
from httpx_p2pcache.entries import Entry, Keyring, cache_key
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.memory import Memory, Remembered, State
from httpx_p2pcache.opened import Opened
from httpx_p2pcache.rows import fields_at_rest, from_row, to_hishel
from httpx_p2pcache.stored import Stored, same_place
from httpx_p2pcache.tombstones import EVERYBODY, Tombstones, noted

logger = logging.getLogger("httpx_p2pcache")

PEEK_SECONDS = 0.002  # what a look into memory may wait for a thread that writes
BEHIND_SECONDS = 0.01  # by which writing stays behind: at once it would meet the caller's next look-up at the lock
TOGETHER = 4  # entries that are written in one transaction, while which nobody else has the lock
PUT_OFF_SECONDS = 0.005  # for which work is put off: by then its caller waits for an answer, or does something else
PUT_OFF_BYTES = 64 * 1024  # that an entry may have whose work is put off: the lock is held while it is done
TOUCH_SECONDS = 60.0  # between two notes of when an entry was used: what is used longest ago is evicted first
SAME_AGE = 1.0  # seconds by which the age of one entry may differ between two processes of the runner

_Job = Callable[[SqliteStorage], None]
_Work = Callable[[], None]


class Store:
    """Entries by cache key. Every method is thread-safe and may touch the disk; :meth:`peek` only reads
    a key's rows, and that once after another process has written.

    With ``behind``, :meth:`save` and :meth:`refresh` do not touch it where memory knows the key.

    ``any_coding`` says of a URL that clients which differ in ``Accept-Encoding`` share its entries where they can. With
    ``sealing`` bodies are sealed in the file; what was stored without it, or under another secret, is removed when met.

    A store that cannot be used (a directory that cannot be written, a foreign file) is replaced by one in memory, and
    that is said once; a damaged file is moved aside first.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_size: int,
        default_ttl: float,
        any_coding: Callable[[str], bool] = lambda _: False,
        sealing: Keyring | None = None,
        behind: bool = False,
    ) -> None:
        self.behind = behind
        self._sealing = sealing
        self._any_coding = any_coding
        self.directory = directory
        self._default_ttl = default_ttl
        self._new_lock()
        self._file = Opened(directory, max_size)
        self._memory = Memory()
        self._tombstones = Tombstones()
        self._learned: int | None = None  # the file's version whose tombstones are known here
        _stores.add(self)

    def peek(self, key: bytes) -> list[Stored] | None:
        """What memory holds for a key, if it is still what SQLite holds; None if it has to be loaded.

        None also while another thread writes, which may wait for another process: no event loop waits with it.
        """
        with self._locked() as locked:
            return self._remembered(key) if locked else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Whether the lock could be had at once, or nearly."""
        held: list[bool] = []
        try:
            # In one call, between whose parts no signal's handler can raise: a lock that is taken is known to be taken.
            held.extend(map(self._lock.acquire, (True,), (PEEK_SECONDS,)))
            yield held[0]
        finally:
            if held and held[0]:
                self._lock.release()

    def _remembered(self, key: bytes) -> list[Stored] | None:
        connection = self._file.connection
        if connection is None or key in self._put_off:
            return None
        try:
            self._file.version = connection.version()
            remembered = self._memory.get(key)
            if remembered is None or not self._is_valid(key, remembered):
                return None
        except sqlite3.Error:
            return None
        self._memory.used(key)
        return remembered.found

    def _is_valid(self, key: bytes, remembered: Remembered) -> bool:
        """Whether what memory holds for a key is what the file holds. Raises ``sqlite3.Error``."""
        if remembered.version != self._file.version:
            if key in self._later or remembered.state is None:
                return False
            if remembered.state != state_of(self._file.connected.rows(key)):
                return False
            remembered.version = self._file.version
        return True

    def _entries(self, storage: SqliteStorage, rows: list[Row]) -> Iterator[tuple[uuid.UUID, Entry]]:
        """What rows hold, by their ids. What is not ours is removed, what is evicted meanwhile left out."""
        now = time.time()
        for row in rows:
            row_id, data, _, used = row
            if now - used >= TOUCH_SECONDS:
                self._file.connected.touch(row_id, now)
            id_, body = uuid.UUID(bytes=row_id), self._file.connected.body(row)
            if body is None:
                continue
            try:
                yield id_, from_row(data, body, self._sealing)
            except Rejected:
                storage.remove_entry(id_)

    @contextlib.contextmanager
    def soon(self, key: bytes, size: int = 0) -> Iterator[bool]:
        """Whether a key can be loaded, and ``size`` bytes of it saved, without waiting. For a loop that must not wait.

        That is so where no other thread is at work on the store, nor will be meanwhile, and nothing has to be written.
        """
        with self._locked() as locked:
            yield locked and not self._is_undone(key) and self._later.has_room(size)

    def at_hand(self, key: bytes) -> list[Stored] | None:
        """The entries of a key, if they can be loaded without waiting: as for :meth:`soon`."""
        with self._locked() as locked:
            if not locked:
                return None
            return self._remembered(key) if self._is_undone(key) else self.load(key)

    def load(self, key: bytes) -> list[Stored]:
        """All entries of a cache key, of every identity; from memory where that is valid."""
        # Under the lock from the first row to the last: what is remembered is what no other thread has removed since.
        with self._lock:
            if key in self._put_off:
                self.catch_up()
            held = self._remembered(key)
            if held is not None:
                return held
            if self._is_undone(key):
                self.flush()
            storage, found = self._file.storage(), []
            try:
                rows = self._file.connected.rows(key)
                for id_, entry in self._entries(storage, rows):
                    if self._tombstones.void(key, entry.identity, entry.received):
                        storage.remove_entry(id_)
                    else:
                        found.append(self._prepared(entry, id_, id_))
            except sqlite3.Error:
                logger.debug("the store could not be read", exc_info=True)
                return []
            self._remember(key, found, state_of(rows))
            return found

    def save(self, entry: Entry, *, since: float | None = None) -> Stored | None:
        """Store an entry in the place of its predecessor; None if that is newer, or was invalidated after ``since``.

        ``since`` is when the origin was asked, if that is known, else when the response was received.
        """
        key = cache_key(entry.url)
        with self._lock:
            return self._save(key, self.load(key), entry, entry.received if since is None else since)

    def receive(self, entry: Entry, *, since: float, travelled: float = 0.0) -> Stored | None:
        """The same for what a peer has; where the same has come by another way, or a newer one, that is returned.

        It was on its way to us for ``travelled`` seconds at the most, which its age does not count: what was written to
        meanwhile may have been so after the origin was asked.
        """
        key, now = cache_key(entry.url), time.time()
        with self._lock:
            held = self.load(key)
            for stored in held:
                newer = stored.entry.age(now) - entry.age(now)
                known = stored.entry.digest == entry.digest and newer <= SAME_AGE
                if (known or newer < 0) and same_place(stored.entry, entry):
                    return stored
            if self._is_void(key, entry.identity, now - travelled):
                since -= travelled
            return self._save(key, held, entry, since)

    def _save(self, key: bytes, held: list[Stored], entry: Entry, asked: float) -> Stored | None:
        if self._is_void(key, entry.identity, asked):
            return None
        replaced = [s for s in held if same_place(s.entry, entry)]
        # A reader may be slow: what was asked for after it is newer, whoever has come to its end first.
        made = entry.received - entry.initial_age
        if any(made + 0.001 < s.entry.received - s.entry.initial_age <= entry.received for s in replaced):
            return None
        stored = self._prepared(entry, uuid.uuid4())
        self._remember(key, [*(s for s in held if s not in replaced), stored])
        self._write(key, len(entry.body), partial(self._insert, stored, replaced, asked, self._file.version))
        return stored

    def refresh(self, stored: Stored, entry: Entry, *, since: float) -> Stored | None:
        """Give a stored entry the fields and times of ``entry``, whose body is the same (RFC 9111 §3.2).

        None if it was replaced meanwhile, or invalidated after ``since``, when the origin was asked.
        """
        key = cache_key(entry.url)
        with self._lock:
            held = self.load(key)
            if self._is_void(key, entry.identity, since):
                return None
            if not any(s.is_same(stored) for s in held):  # evicted: it is as good as new
                return None if any(same_place(s.entry, entry) for s in held) else self.save(entry, since=since)
            fresh = self._prepared(entry, stored.id, stored.row)
            self._remember(key, [*(s for s in held if not s.is_same(stored)), fresh])
            self._write(key, 0, partial(self._update, stored, fresh))
        return fresh

    def passing(self, entry: Entry, id_: uuid.UUID | None = None) -> Stored:
        """``entry`` as if it were stored, in the place of another perhaps: for one answer."""
        return self._prepared(entry, id_ or uuid.uuid4())

    def refused(self, key: bytes, identity: str, since: float) -> bool:
        """Whether the origin has refused an identity after ``since``, as far as this process knows; touches no disk."""
        return self._tombstones.void(key, identity, since)

    def written(self, key: bytes, since: float) -> bool:
        """Whether a key was written to after ``since``, as any process of the runner knows."""
        with self._lock:
            self.load(key)
            return self._is_void(key, EVERYBODY, since)

    def refuse(self, key: bytes, identity: str, *, since: float) -> None:
        """The origin refuses an identity: what it was given before ``since`` is removed, and not taken from peers."""
        with self._lock:
            self._tombstones.bury(self._file.connected, [key], identity, since)
            self.remove(key, [stored for stored in self.load(key) if stored.entry.identity == identity])

    def remove(self, key: bytes, removed: Collection[Stored]) -> None:
        """Remove single entries of a key."""
        with self._writing() as storage:
            for stored in removed:
                self._delete(storage, stored)
            self._memory.forget(key)

    def invalidate(self, keys: list[bytes]) -> None:
        """Remove every entry of these keys, whoever's (RFC 9111 §4.4), and refuse older ones that still arrive."""
        if not keys:
            return
        with self._writing() as storage:
            # Noted first: who writes meanwhile, and looks whether it may only then, either sees that or is seen below.
            self._tombstones.bury(self._file.connected, keys, EVERYBODY, time.time())
            for key in keys:
                for stored in self.load(key):
                    self._delete(storage, stored)
                self._remember(key, [])

    def put_off(self, key: bytes, size: int, work: _Work) -> bool:
        """Whether ``work``, which saves something of ``size`` bytes under a key, could be put off; waits for nobody.

        It is done by a thread then, soon; or by who looks for the key, or by :meth:`catch_up` or :meth:`flush`.
        """
        if not self.behind or size > PUT_OFF_BYTES:
            return False
        with self._locked() as locked:
            if not locked or not self._put_off.has_room(size):
                return False
            self._put_off.add(key, size, work)
            self._put_off.begin()
            return True

    def catch_up(self) -> None:
        """Do what was put off."""
        with self._lock:
            self._put_off.flush()

    def flush(self) -> None:
        """Write what is still to be written; waits for another process no longer than a single write does."""
        with self._lock:
            self.catch_up()
            self._later.flush()

    def _is_undone(self, key: bytes) -> bool:
        return key in self._put_off or key in self._later

    def _write(self, key: bytes, size: int, job: _Job) -> None:
        """Have ``size`` bytes written: at once, or behind."""
        self._later.add(key, size, job)
        if self.behind and self._later.has_room():
            self._later.begin()
        else:
            self.flush()

    def _write_together(self, jobs: Sequence[_Job], patient: bool) -> bool:
        free = False
        try:
            together = self._file.connected.together(patient=patient)
            with together as free, self._writing(flushed=False, patient=free) as storage:
                for job in jobs:
                    try:
                        job(storage)
                    except Exception:  # it stays in memory
                        logger.debug("an entry could not be written", exc_info=True)
        except Exception:
            logger.debug("entries could not be written", exc_info=True)
            self._file.complain()
        return free

    def _insert(
        self, stored: Stored, replaced: list[Stored], since: float, version: int, storage: SqliteStorage
    ) -> None:
        key, identity = stored.key, stored.entry.identity
        if self._others_have_written(version) and self._is_outdone(storage, key, stored, replaced):
            for old in replaced:
                self._delete(storage, old)
            return
        request, response = to_hishel(stored.entry, self._sealing)
        created = storage.create_entry(request, response, key.hex())
        stream = created.response.stream
        assert isinstance(stream, Iterator)
        for _ in stream:  # reading it to its end is what saves it
            pass
        stored.row = created.id
        for old in replaced:
            self._delete(storage, old)
        if noted(self._file.connected, key, identity, since):  # not before: it may be written to while we write
            self._delete(storage, stored)

    def _is_outdone(self, storage: SqliteStorage, key: bytes, stored: Stored, replaced: list[Stored]) -> bool:
        """Whether another process of the runner has stored the same, or newer, meanwhile; what is older is removed."""
        now, ours = time.time(), {old.row.bytes for old in replaced if old.row is not None}
        others = [row for row in self._file.connected.rows(key) if row[0] not in ours]
        for id_, theirs in self._entries(storage, others):
            if not same_place(theirs, stored.entry):
                continue
            newer = stored.entry.age(now) - theirs.age(now)
            if theirs.digest == stored.entry.digest and abs(newer) <= SAME_AGE:
                stored.row = id_
                if theirs.headers != stored.entry.headers:
                    storage.update_headers(id_, fields_at_rest(stored.entry, self._sealing))
                return True
            if newer > 0:
                return True
            storage.remove_entry(id_)
        return False

    def _update(self, stored: Stored, fresh: Stored, storage: SqliteStorage) -> None:
        fresh.row = stored.row
        if fresh.row is not None:
            storage.update_headers(fresh.row, fields_at_rest(fresh.entry, self._sealing))

    @staticmethod
    def _delete(storage: SqliteStorage, stored: Stored) -> None:
        if stored.row is not None:
            storage.remove_entry(stored.row)

    def clear(self) -> int:
        """Remove every entry; returns how many there were. Raises OSError if that is not possible."""
        with self._lock:
            entries, _ = self.size()
            try:
                if self._file.connected.execute("PRAGMA database_list").fetchone()[2] == "":
                    raise OSError("its file cannot be used")
                self._file.connected.clear()
            except sqlite3.Error as exc:
                raise OSError(str(exc)) from exc
            self._memory.clear()
            return entries

    def keys(self, limit: int) -> list[bytes]:
        """The cache keys of up to ``limit`` entries, the latest used first."""
        with self._lock:
            self.flush()
            rows = self._select(
                "SELECT cache_key FROM entries WHERE chunk_count IS NOT NULL AND expires_at IS NULL"
                " GROUP BY cache_key ORDER BY max(last_accessed_at) DESC LIMIT ?",
                (limit,),
            )
        return [bytes.fromhex(bytes(row[0]).decode()) for row in rows]

    def size(self) -> tuple[int, int]:
        """Number of entries, and bytes of the database."""
        with self._lock:
            self.flush()
            entries = self._select("SELECT count(*) FROM entries WHERE chunk_count IS NOT NULL AND expires_at IS NULL")
            used = self._select(
                "SELECT (page_count - freelist_count) * page_size"
                " FROM pragma_page_count(), pragma_freelist_count(), pragma_page_size()"
            )
        return (int(entries[0][0]), int(used[0][0])) if entries and used else (0, 0)

    def close(self) -> None:
        """Write what is still to be written, and close the file. A later call opens it again."""
        with self._lock:
            self.catch_up()
            workers = [self._put_off.end(), self._later.end()]
            self._shut()
        for worker in workers:
            if worker is not None and worker is not threading.current_thread():
                worker.join(STOP_SECONDS)

    def _shut(self) -> None:
        try:
            self.flush()
            self._file.shut()
        finally:
            self._learned = None
            self._memory.clear()

    def _select(self, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        """Rows of our own query; none if the file turns out to be damaged, which is then moved aside."""
        try:
            return self._file.connected.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as exc:
            if not isinstance(exc, sqlite3.OperationalError):
                self._shut()
                move_aside(self.directory)
            return []

    def _is_void(self, key: bytes, identity: str, since: float) -> bool:
        """Whether a key, which was loaded just now, was written to, or an identity refused, after ``since``, as any
        process of the runner knows."""
        try:
            if self._learned != self._file.version:
                if not self._tombstones.learn(self._file.connected):
                    return self._tombstones.void(key, identity, since) or noted(
                        self._file.connected, key, identity, since
                    )
                self._learned = self._file.version
        except sqlite3.Error:
            pass
        return self._tombstones.void(key, identity, since)

    def _others_have_written(self, version: int) -> bool:
        """Whether another process has written since the file was of this ``data_version``."""
        return self._file.connected.version() != version

    @contextlib.contextmanager
    def _writing(self, *, flushed: bool = True, patient: bool = True) -> Iterator[SqliteStorage]:
        with self._lock:
            if flushed:
                self.flush()
            with self._file.writing(patient=patient) as storage:
                yield storage

    def _prepared(self, entry: Entry, id_: uuid.UUID, row: uuid.UUID | None = None) -> Stored:
        return Stored(id_, entry, self._default_ttl, self._any_coding(entry.url), row)

    def _remember(self, key: bytes, found: list[Stored], state: State | None = None) -> None:
        """Keep what a key has now; ``state``: that of the rows it was loaded from."""
        self._memory.put(key, found, self._file.version, state)

    # SQLite must not be open across a fork: a child that inherits its lock table takes no locks, and one that is forked
    # while another thread is inside it inherits a mutex that nobody will release. So both sides begin closed.

    def _new_lock(self) -> None:
        self._lock = threading.RLock()
        self._put_off: Behind[_Work] = Behind(self._lock, _do, seconds=PUT_OFF_SECONDS, at_once=1)
        self._later: Behind[_Job] = Behind(self._lock, self._write_together, seconds=BEHIND_SECONDS, at_once=TOGETHER)

    def _before_fork(self) -> None:
        self._lock.acquire()
        with contextlib.suppress(sqlite3.Error):  # then it is left to the child as it is, which does not use it
            self._shut()

    def _after_fork(self, *, child: bool) -> None:
        if child:
            self._new_lock()  # what could not be written is the parent's
        else:
            self._lock.release()


def _do(works: Sequence[_Work], patient: bool) -> bool:
    for work in works:
        work()
    return patient


_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_forking: list[Store] = []
_fork_lock = threading.Lock()


def _before_fork() -> None:
    _fork_lock.acquire()  # one thread at a time: those of another would be let go of by this one
    for store in list(_stores):
        _forking.append(store)
        store._before_fork()


def _after_fork(*, child: bool) -> None:
    global _fork_lock
    while _forking:
        _forking.pop()._after_fork(child=child)
    if child:
        _fork_lock = threading.Lock()
    else:
        _fork_lock.release()


def _flush_all() -> None:
    for store in list(_stores):
        try:
            store.flush()
        except Exception:
            logger.debug("what was saved last could not be written", exc_info=True)


atexit.register(_flush_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=partial(_after_fork, child=False),
        after_in_child=partial(_after_fork, child=True),
    )

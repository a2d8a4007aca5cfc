"""The runner's store: a memory layer over hishel's SQLite file, shared by every process of the runner.

The memory layer holds what was read or written last, decoded and with its decisions prepared. It is valid while
SQLite's ``data_version`` is unchanged, which says in 4 µs whether another process has written. If one has, a key is
valid where its rows are still those that were loaded, which is asked once for each key and takes a tenth of loading it.

What adds is in memory at once. In a process with a node, which tells all others by itself (``behind``), a thread writes
it a moment later, so that no caller waits for the disk; what takes away is written at once, after all that was to be
written before it. What a process removes while another has not yet written it is not written any more: a table of its
own, ``tombstones``, says so. A process that is killed loses the last moment's entries.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hishel import SqliteStorage

from httpx_p2pcache import tombstones
from httpx_p2pcache.entries import Entry, Keyring, cache_key
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.files import private_directory, private_file
from httpx_p2pcache.rows import fields_at_rest, from_row, to_hishel
from httpx_p2pcache.stored import Stored, same_place
from httpx_p2pcache.tombstones import EVERYBODY, Tombstones, noted

logger = logging.getLogger("httpx_p2pcache")

MEMORY_BYTES = 64 * 1024**2  # bodies kept decoded in memory, for all URLs of one store
BUSY_MS = 1000  # what a write waits for another process; it is given up then, and the entry is not kept
CHECKED_PAGES = 8192  # a file of up to 32 MiB is checked when it is opened, which takes milliseconds
PEEK_SECONDS = 0.002  # what a look into memory may wait for a thread that writes
BEHIND_SECONDS = 0.01  # by which writing stays behind: at once it would meet the caller's next look-up at the lock
MAX_UNWRITTEN = 32 * 1024**2  # bytes that may be unwritten: who brings more waits for the disk
UNWRITTEN_BYTES = 2048  # that one takes beside its body, more or less
AT_ONCE = 4  # that are written in one transaction, for which nobody else has the lock
BETWEEN_SECONDS = 0.0002  # between two of these
STOP_SECONDS = 0.5  # that close() waits for it to end, who has nothing left to do
IDLE_SECONDS = 5.0  # after which a thread that has nothing to write ends
TOUCH_SECONDS = 60.0  # between two notes of when an entry was used: what is used longest ago is evicted first
_FILE = "p2pcache-v1.db"
SAME_AGE = 1.0  # seconds by which the age of one entry may differ between two processes of the runner


_Row = tuple[bytes, bytes, int, float]  # id, data, number of chunks, when it was used


@dataclass
class _Remembered:
    """What memory holds for a key: valid in this version of the file, and later as long as these are its rows."""

    __slots__ = ("found", "rows", "version")
    found: list[Stored]
    version: int
    rows: list[tuple[bytes, int]] | None


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
        self._unwritten: deque[tuple[bytes, int, Callable[[SqliteStorage], None]]] = deque()
        self._unwritten_bytes = 0
        self._waiting: Counter[bytes] = Counter()  # how much of each key is unwritten
        self._writer: threading.Thread | None = None
        self._no_more = threading.Event()  # for the writer of this moment
        self._sealing = sealing
        self._any_coding = any_coding
        self.directory = directory
        self._max_size = max_size
        self._default_ttl = default_ttl
        self._new_lock()
        self._storage: SqliteStorage | None = None
        self._connection: Connection | None = None
        self._version = -1  # of the file, when it was looked at last
        self._memory: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._memory_bytes = 0
        self._tombstones = Tombstones()
        self._learned: int | None = None  # the file's version whose tombstones are known here
        self.complained = False
        _stores.add(self)

    def peek(self, key: bytes) -> list[Stored] | None:
        """What memory holds for a key, if it is still what SQLite holds; None if it has to be loaded."""
        if not self._lock.acquire(timeout=PEEK_SECONDS):
            return None  # another thread writes, and may wait for another process: no event loop waits with it
        try:
            connection = self._connection
            if connection is None:
                return None
            try:
                (self._version,) = connection.execute("PRAGMA data_version").fetchone()
                remembered = self._memory.get(key)
                if remembered is None or not self._is_valid(key, remembered):
                    return None
            except sqlite3.Error:
                return None
            self._memory.move_to_end(key)
            return remembered.found
        finally:
            self._lock.release()

    def _is_valid(self, key: bytes, remembered: _Remembered) -> bool:
        """Whether what memory holds for a key is what the file holds. Raises ``sqlite3.Error``."""
        if remembered.version != self._version:
            if key in self._waiting or remembered.rows is None or remembered.rows != _states(self._rows(key)):
                return False
            remembered.version = self._version
        return True

    def _rows(self, key: bytes) -> list[_Row]:
        """A key's rows as they are now."""
        sql = "SELECT id, data, chunk_count, last_accessed_at FROM entries WHERE cache_key = ? AND expires_at IS NULL"
        return self._connected.execute(sql, (key.hex().encode(),)).fetchall()

    def _entries(self, storage: SqliteStorage, rows: list[_Row]) -> Iterator[tuple[uuid.UUID, Entry]]:
        """What rows hold, by their ids. What is not ours is removed, what is evicted meanwhile left out."""
        now = time.time()
        for row, data, count, used in rows:
            id_ = uuid.UUID(bytes=row)
            if now - used >= TOUCH_SECONDS:
                self._touch(row, now)
            sql = "SELECT chunk_data FROM streams WHERE entry_id = ? ORDER BY chunk_number"
            chunks = [chunk for (chunk,) in self._connected.execute(sql, (row,))]
            if len(chunks) != count:
                continue
            try:
                yield id_, from_row(data, b"".join(chunks), self._sealing)
            except Rejected:
                storage.remove_entry(id_)

    @contextlib.contextmanager
    def soon(self, key: bytes, size: int = 0) -> Iterator[bool]:
        """Whether a key can be loaded, and ``size`` bytes of it saved, without waiting. For a loop that must not wait.

        That is so where no other thread is at work on the store, nor will be meanwhile, and nothing has to be written.
        """
        locked = self._lock.acquire(timeout=PEEK_SECONDS)
        try:
            yield locked and key not in self._waiting and self._unwritten_bytes + size < MAX_UNWRITTEN
        finally:
            if locked:
                self._lock.release()

    def load(self, key: bytes) -> list[Stored]:
        """All entries of a cache key, of every identity; from memory where that is valid."""
        found = self.peek(key)
        if found is not None:
            return found
        # Under the lock from the first row to the last: what is remembered is what no other thread has removed since.
        with self._lock:
            if key in self._waiting:
                self.flush()
            storage, found = self._open(), []
            try:
                rows = self._rows(key)
                for id_, entry in self._entries(storage, rows):
                    if self._tombstones.void(key, entry.identity, entry.received):
                        storage.remove_entry(id_)
                    else:
                        found.append(self._prepared(entry, id_, id_))
            except sqlite3.Error:
                logger.debug("the store could not be read", exc_info=True)
                return []
            self._remember(key, found, _states(rows))
            return found

    def _touch(self, row: bytes, now: float) -> None:
        """Note that an entry was used, unless another process is writing: who reads waits for nobody."""
        with contextlib.suppress(sqlite3.Error), self._connected.impatient():
            self._connected.execute("UPDATE entries SET last_accessed_at = ? WHERE id = ?", (now, row))

    def save(self, entry: Entry, *, since: float | None = None) -> Stored | None:
        """Store an entry in the place of its predecessor; None if its URL was invalidated after ``since``.

        ``since`` is when the origin was asked, if that is known, else when the response was received.
        """
        key = cache_key(entry.url)
        asked = entry.received if since is None else since
        with self._lock:
            held = self.load(key)
            if self._is_void(key, entry.identity, asked):
                return None
            replaced = [s for s in held if same_place(s.entry, entry)]
            stored = self._prepared(entry, uuid.uuid4())
            self._remember(key, [*(s for s in held if s not in replaced), stored])
            self._write(key, len(entry.body), partial(self._insert, stored, replaced, asked, self._version))
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

    def passing(self, stored: Stored, entry: Entry) -> Stored:
        """``entry`` as if it were stored in the place of ``stored``: for one answer."""
        return self._prepared(entry, stored.id)

    def refuse(self, key: bytes, identity: str, *, since: float) -> None:
        """The origin refuses an identity: what it was given before ``since`` is removed, and not taken from peers."""
        with self._lock:
            self._tombstones.bury(self._connected, [key], identity, since)
            self.remove(key, [stored for stored in self.load(key) if stored.entry.identity == identity])

    def remove(self, key: bytes, removed: Collection[Stored]) -> None:
        """Remove single entries of a key."""
        with self._writing() as storage:
            for stored in removed:
                self._delete(storage, stored)
            self._forget(key)

    def invalidate(self, keys: list[bytes]) -> None:
        """Remove every entry of these keys, whoever's (RFC 9111 §4.4), and refuse older ones that still arrive."""
        if not keys:
            return
        with self._writing() as storage:
            # Noted first: who writes meanwhile, and looks whether it may only then, either sees that or is seen below.
            self._tombstones.bury(self._connected, keys, EVERYBODY, time.time())
            for key in keys:
                for stored in self.load(key):
                    self._delete(storage, stored)
                self._remember(key, [])

    def flush(self) -> None:
        """Write what is still to be written; waits for another process no longer than a single write does."""
        with self._lock:
            patient = True
            while self._unwritten:
                patient = self._write_some(patient=patient)

    def _write(self, key: bytes, size: int, job: Callable[[SqliteStorage], None]) -> None:
        """Have ``size`` bytes written: at once, or behind."""
        size += UNWRITTEN_BYTES
        self._unwritten.append((key, size, job))
        self._unwritten_bytes += size
        self._waiting[key] += 1
        if not self.behind or self._unwritten_bytes > MAX_UNWRITTEN:
            self.flush()
        elif self._writer is not None and self._writer.is_alive():
            self._something.notify()
        else:
            # A daemon, as the node's thread is: what it has not written when the interpreter ends, atexit writes.
            self._no_more = threading.Event()
            self._writer = threading.Thread(
                target=self._write_behind, args=(self._no_more,), name="p2pcache-store", daemon=True
            )
            try:
                self._writer.start()
            except RuntimeError:  # there are no more threads to be had
                self._writer = None
                self.flush()

    def _write_behind(self, no_more: threading.Event) -> None:
        """A writer's life: a few jobs at a time, between which others may have the lock."""
        while True:
            with self._lock:
                while not self._unwritten:
                    if no_more.is_set() or not (self._something.wait(IDLE_SECONDS) or self._unwritten):
                        if self._no_more is no_more:
                            self._writer = None
                        return
            no_more.wait(BEHIND_SECONDS)
            patient = True
            while self._unwritten:
                patient = self._write_some(patient=patient)
                time.sleep(BETWEEN_SECONDS)  # who waits for the lock would else not have it

    def _write_some(self, *, patient: bool) -> bool:
        """Write a few; ``patient``: wait for another process that holds the file. Returns whether none did so long."""
        with self._lock:
            jobs = list(itertools.islice(self._unwritten, AT_ONCE))
            if not jobs:  # another thread has been quicker
                return patient
            connection = self._connected
            with connection.together(patient=patient) as free, self._writing(flushed=False, patient=free) as storage:
                for _, _, job in jobs:
                    try:
                        job(storage)
                    except Exception:  # it stays in memory
                        logger.debug("an entry could not be written", exc_info=True)
            for key, size, _ in jobs:
                self._unwritten.popleft()
                self._unwritten_bytes -= size
                self._waiting[key] -= 1
                if not self._waiting[key]:
                    del self._waiting[key]
            return patient and free

    def _insert(
        self, stored: Stored, replaced: list[Stored], since: float, version: int, storage: SqliteStorage
    ) -> None:
        key, identity = cache_key(stored.entry.url), stored.entry.identity
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
        if noted(self._connected, key, identity, since):  # not before: it may be written to while we write
            self._delete(storage, stored)

    def _is_outdone(self, storage: SqliteStorage, key: bytes, stored: Stored, replaced: list[Stored]) -> bool:
        """Whether another process of the runner has stored the same, or newer, meanwhile; what is older is removed."""
        now, ours = time.time(), {old.row.bytes for old in replaced if old.row is not None}
        others = [row for row in self._rows(key) if row[0] not in ours]
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
                if self._connected.execute("PRAGMA database_list").fetchone()[2] == "":
                    raise OSError("its file cannot be used")
                self._connected.executescript(
                    "BEGIN IMMEDIATE; DELETE FROM streams; DELETE FROM entries; COMMIT; VACUUM;"
                )
            except sqlite3.Error as exc:
                raise OSError(str(exc)) from exc
            self._forget_all()
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
            self._no_more.set()
            self._something.notify_all()
            writer = self._writer
            self._shut()
        if writer is not None and writer is not threading.current_thread():
            writer.join(STOP_SECONDS)

    def _shut(self) -> None:
        self.flush()
        if self._storage is not None:
            self._storage.close()
        self._storage = self._connection = None
        self._version, self._learned = -1, None
        self._forget_all()

    def _select(self, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        """Rows of our own query; none if the file turns out to be damaged, which is then moved aside."""
        try:
            return self._connected.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as exc:
            if not isinstance(exc, sqlite3.OperationalError):
                self.close()
                self._move_aside()
            return []

    def _is_void(self, key: bytes, identity: str, since: float) -> bool:
        """Whether a key, which was loaded just now, was written to, or an identity refused, after ``since``, as any
        process of the runner knows."""
        try:
            if self._learned != self._version:
                if not self._tombstones.learn(self._connected):
                    return self._tombstones.void(key, identity, since) or noted(self._connected, key, identity, since)
                self._learned = self._version
        except sqlite3.Error:
            pass
        return self._tombstones.void(key, identity, since)

    def _others_have_written(self, version: int) -> bool:
        """Whether another process has written since the file was of this ``data_version``."""
        return bool(self._connected.execute("PRAGMA data_version").fetchone()[0] != version)

    @property
    def _connected(self) -> Connection:
        self._open()
        assert self._connection is not None
        return self._connection

    @contextlib.contextmanager
    def _writing(self, *, flushed: bool = True, patient: bool = True) -> Iterator[SqliteStorage]:
        with self._lock:
            if flushed:
                self.flush()
            storage, _at_work.store = self._open(), self
            try:
                with contextlib.nullcontext() if patient else self._connected.impatient():
                    yield storage
            finally:
                _at_work.store = None

    def _forget(self, key: bytes) -> None:
        if key in self._memory:
            self._memory_bytes -= _size(self._memory.pop(key).found)

    def _forget_all(self) -> None:
        self._memory.clear()
        self._memory_bytes = 0

    def _prepared(self, entry: Entry, id_: uuid.UUID, row: uuid.UUID | None = None) -> Stored:
        return Stored(id_, entry, self._default_ttl, self._any_coding(entry.url), row)

    def _remember(self, key: bytes, found: list[Stored], rows: list[tuple[bytes, int]] | None = None) -> None:
        """Keep what a key has now; ``rows``: as it was loaded from them. Without them the next load finds them out."""
        self._forget(key)
        self._memory[key] = _Remembered(found, self._version, rows)
        self._memory_bytes += _size(found)
        while self._memory_bytes > MEMORY_BYTES and len(self._memory) > 1:
            self._forget(next(iter(self._memory)))

    def _open(self) -> SqliteStorage:
        with self._lock:
            if self._storage is not None:
                return self._storage
            try:
                self._use(_connect_in(self.directory))
            except (sqlite3.DatabaseError, RuntimeError) as exc:
                if isinstance(exc, sqlite3.OperationalError) or not self._move_aside():
                    self._use_memory(exc)
                else:
                    self._use(_connect_in(self.directory))
            except OSError as exc:
                self._use_memory(exc)
            assert self._storage is not None
            return self._storage

    def _use(self, connection: Connection) -> None:
        storage = SqliteStorage(max_size=self._max_size or None)  # 0: no limit
        storage.connection = connection  # given at once it would be tried out by a thread, of which there may be none
        try:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()  # a damaged file shows itself here, or below
            if pages <= CHECKED_PAGES and connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("database disk image is malformed")
            with storage._lock:  # the schema is made now: hishel would make it in the middle of a look-up
                storage._ensure_connection()
            connection.execute(tombstones.TABLE)
            connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
            (self._version,) = connection.execute("PRAGMA data_version").fetchone()
        except BaseException:
            connection.close()
            raise
        self._storage, self._connection = storage, connection

    def _use_memory(self, exc: Exception) -> None:
        logger.warning(
            "CACHE_DIR %s cannot be used (%s): entries are kept in memory for this process only. "
            "Set CACHE_DIR to a directory you can write.",
            self.directory,
            exc,
        )
        self._use(connect(":memory:"))

    def _move_aside(self) -> bool:
        path = self.directory / _FILE
        aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
        try:
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            path.rename(aside)
        except OSError:
            return False
        logger.warning("the store %s could not be read: it was moved to %s, and begins anew", path, aside.name)
        return True

    # SQLite must not be open across a fork: a child that inherits its lock table takes no locks, and one that is forked
    # while another thread is inside it inherits a mutex that nobody will release. So both sides begin closed.

    def _new_lock(self) -> None:
        self._lock = threading.RLock()
        self._something = threading.Condition(self._lock)  # to be written

    def _before_fork(self) -> None:
        self._lock.acquire()
        try:
            self._shut()
        except sqlite3.Error:  # then it is left to the child as it is, which does not use it
            self._storage = self._connection = None

    def _after_fork(self, *, child: bool) -> None:
        if child:
            self._new_lock()
            self._no_more = threading.Event()
            self._unwritten_bytes = 0
            self._unwritten.clear()  # it is the parent's, if it could not be written
            self._waiting.clear()
            self._writer = None
        else:
            self._lock.release()


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


class Connection(sqlite3.Connection):
    """A connection on which hishel, which commits after every statement, can be made to do so after many."""

    _together = False

    def commit(self) -> None:
        """Not while that is so."""
        if not self._together:
            super().commit()

    @contextlib.contextmanager
    def together(self, *, patient: bool) -> Iterator[bool]:
        """One transaction, unless another process has the file for longer than the ``patient`` wait: if there is one.

        Without it each statement finds that anew.
        """
        try:
            with contextlib.nullcontext() if patient else self.impatient():
                self.execute("BEGIN IMMEDIATE")
            self._together = True
        except sqlite3.Error:
            pass
        try:
            yield self._together
        finally:
            if self._together:
                self._together = False
                try:
                    self.commit()
                except sqlite3.Error:
                    logger.debug("entries could not be written", exc_info=True)
                    with contextlib.suppress(sqlite3.Error):
                        self.rollback()

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        """Who writes does not wait for another process."""
        self.execute("PRAGMA busy_timeout=0")
        try:
            yield
        finally:
            self.execute(f"PRAGMA busy_timeout={BUSY_MS}")


def connect(path: str | Path) -> Connection:
    """A connection to the database in a file, or in ":memory:"."""
    return sqlite3.connect(
        path, check_same_thread=False, isolation_level=None, timeout=BUSY_MS / 1000, factory=Connection
    )


def _connect_in(directory: Path) -> Connection:
    private_directory(directory)
    return connect(private_file(directory / _FILE))  # SQLite gives -wal and -shm the mode of the database itself


class _SaidOnce(logging.Filter):
    """hishel says of every entry that it cannot write, with a traceback: of ours, once is enough."""

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002 - the contract's signature
        store = getattr(_at_work, "store", None)
        if store is not None and not store.complained:
            store.complained = True
            logger.warning("the store in %s cannot be written: what it cannot keep is not cached", store.directory)
        return store is None


_at_work = threading.local()
logging.getLogger("hishel._core._storages._sync_sqlite").addFilter(_SaidOnce())


def _states(rows: list[_Row]) -> list[tuple[bytes, int]]:
    """What says whether rows are the same as before: their ids, and hashes of what is in them that may change."""
    return [(id_, hash(data)) for id_, data, _, _ in rows]


def _size(found: list[Stored]) -> int:
    """Bytes in memory, more or less: a key of which nothing is held is remembered as well."""
    return 512 + sum(2048 + len(stored.entry.body) for stored in found)

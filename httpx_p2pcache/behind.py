"""Writing behind: what nobody waits for is written a moment later, in its order, by a thread."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

BEHIND_SECONDS = 0.01  # by which writing stays behind: at once it would meet the caller's next look-up at the lock
MAX_UNWRITTEN = 32 * 1024**2  # bytes that may be unwritten: who brings more waits for the disk
UNWRITTEN_BYTES = 2048  # that one takes beside its body, more or less
AT_ONCE = 4  # jobs that are done together, for which nobody else has the lock
BETWEEN_SECONDS = 0.0002  # between two of these
STOP_SECONDS = 0.5  # that who ends it waits for the thread, which has nothing left to do
IDLE_SECONDS = 5.0  # after which a thread that has nothing to write ends

Work = TypeVar("Work")


class _Job(NamedTuple, Generic[Work]):
    key: bytes
    size: int
    work: Work


class Behind(Generic[Work]):
    """Jobs for the disk, each about a key.

    ``lock`` is held by who calls any method but :meth:`join`, and by the thread while it works. ``do`` does a few of
    them together; told whether to wait for another process that has the file, it says whether none had it for long.
    """

    def __init__(self, lock: threading.RLock, do: Callable[[Sequence[Work], bool], bool]) -> None:
        self._lock = lock
        self._something = threading.Condition(lock)  # to be done
        self._do = do
        self._jobs: deque[_Job[Work]] = deque()
        self._bytes = 0
        self._keys: Counter[bytes] = Counter()
        self._thread: threading.Thread | None = None
        self._no_more = threading.Event()  # for the thread of this moment

    def __contains__(self, key: bytes) -> bool:
        """Whether something of a key is unwritten."""
        return key in self._keys

    def has_room(self, size: int = 0) -> bool:
        return self._bytes + size <= MAX_UNWRITTEN

    def add(self, key: bytes, size: int, work: Work) -> None:
        """A job with a body of ``size`` bytes; to be done by :meth:`begin` or :meth:`flush`."""
        size += UNWRITTEN_BYTES
        self._jobs.append(_Job(key, size, work))
        self._bytes += size
        self._keys[key] += 1

    def begin(self) -> None:
        """Let the thread do what there is."""
        if self._thread is not None and self._thread.is_alive():
            self._something.notify()
            return
        # A daemon, as the node's thread is: what it has not written when the interpreter ends, atexit writes.
        self._no_more = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._no_more,), name="p2pcache-store", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # there are no more threads to be had
            self._thread = None
            self.flush()

    def flush(self) -> None:
        """Do all of it now; waits for another process no longer than a single job does."""
        patient = True
        while self._jobs:
            patient = self._do_some(patient)

    def end(self) -> threading.Thread | None:
        """Let the thread end, once there is nothing to do; returns it."""
        self._no_more.set()
        self._something.notify_all()
        return self._thread

    def _run(self, no_more: threading.Event) -> None:
        """The thread's life: a few jobs at a time, between which others may have the lock."""
        while True:
            with self._lock:
                while not self._jobs:
                    if no_more.is_set() or not (self._something.wait(IDLE_SECONDS) or self._jobs):
                        if self._no_more is no_more:
                            self._thread = None
                        return
            no_more.wait(BEHIND_SECONDS)
            patient = True
            while self._jobs:
                with self._lock:
                    patient = self._do_some(patient)
                time.sleep(BETWEEN_SECONDS)  # who waits for the lock would else not have it

    def _do_some(self, patient: bool) -> bool:
        jobs = list(itertools.islice(self._jobs, AT_ONCE))
        if not jobs:  # another thread has been quicker
            return patient
        try:
            free = self._do([job.work for job in jobs], patient)
        finally:  # also if it was interrupted: what has been done must not be done again
            for job in jobs:
                self._jobs.popleft()
                self._bytes -= job.size
                self._keys[job.key] -= 1
                if not self._keys[job.key]:
                    del self._keys[job.key]
        return patient and free

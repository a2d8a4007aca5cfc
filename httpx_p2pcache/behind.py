"""Work behind: what nobody waits for is done a moment later, in its order, by a thread."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_UNDONE = 32 * 1024**2  # bytes that may wait for the thread: who brings more waits for it himself
UNDONE_BYTES = 2048  # that a job takes beside its body, more or less
BETWEEN_SECONDS = 0.0002  # between two turns of the thread, in which others may have the lock
STOP_SECONDS = 0.5  # that close() waits for the thread, which has nothing left to do
IDLE_SECONDS = 5.0  # after which a thread that has nothing to do ends

Work = TypeVar("Work")


@dataclass(frozen=True)  # Python 3.10 knows no generic NamedTuple
class _Job(Generic[Work]):
    key: bytes
    size: int
    work: Work


class Behind(Generic[Work]):
    """Jobs, each about a key, which are begun ``seconds`` after they came, or by who cannot wait for that.

    ``lock`` is held by who calls any method, and by the thread while it works. ``do`` does up to ``at_once`` of them
    together; told whether to wait for another process that has the file, it says whether none had it for long. What it
    is given is done, to whatever end: no job is given to it a second time, also if it adds some itself.
    """

    def __init__(
        self, lock: threading.RLock, do: Callable[[Sequence[Work], bool], bool], *, seconds: float, at_once: int
    ) -> None:
        self._lock = lock
        self._something = threading.Condition(lock)  # to be done
        self._do = do
        self._seconds = seconds
        self._at_once = at_once
        self._jobs: deque[_Job[Work]] = deque()
        self._bytes = 0
        self._keys: Counter[bytes] = Counter()
        self._at_work = False  # who does some of it is not to begin with the rest before it is done
        self._thread: threading.Thread | None = None
        self._no_more = threading.Event()  # for the thread of this moment

    def __contains__(self, key: bytes) -> bool:
        """Whether something about a key is undone."""
        return key in self._keys

    def has_room(self, size: int = 0) -> bool:
        return self._bytes + size <= MAX_UNDONE

    def add(self, key: bytes, size: int, work: Work) -> None:
        """A job with a body of ``size`` bytes; to be done by :meth:`begin` or :meth:`flush`."""
        size += UNDONE_BYTES
        self._jobs.append(_Job(key, size, work))
        self._bytes += size
        self._keys[key] += 1

    def begin(self) -> None:
        """Let the thread do what there is."""
        if self._thread is not None and self._thread.is_alive():
            self._something.notify()
            return
        # A daemon, as the node's thread is: what it has not done when the interpreter ends, atexit does.
        self._no_more = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._no_more,), name="p2pcache-store", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # there are no more threads to be had
            self._thread = None
            self.flush()

    def flush(self) -> None:
        """Do all of it now, unless a job calls this; waits for another process no longer than a single job does."""
        patient = True
        while self._jobs and not self._at_work:
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
            no_more.wait(self._seconds)
            patient = True
            while self._jobs:
                with self._lock:
                    patient = self._do_some(patient)
                time.sleep(BETWEEN_SECONDS)  # who waits for the lock would else not have it

    def _do_some(self, patient: bool) -> bool:
        work: list[Work] = []
        while self._jobs and len(work) < self._at_once:
            job = self._jobs.popleft()
            work.append(job.work)
            self._bytes -= job.size
            self._keys[job.key] -= 1
            if not self._keys[job.key]:
                del self._keys[job.key]
        if not work:  # another thread has been quicker
            return patient
        self._at_work = True
        try:
            return self._do(work, patient) and patient
        finally:
            self._at_work = False

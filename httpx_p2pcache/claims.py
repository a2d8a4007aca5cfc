"""Claims: who may fetch a key from the origin while the others wait.

The same table serves twice: in a process, among its threads and tasks (:class:`Flights`), and at a key's home, among
the nodes of the fleet. It holds no clock and does no I/O: every event takes ``now`` and returns whom to tell what.

A key is in one of three states, and this is all that can happen to it::

    free ──ask──> claimed by the asker, until ``ends``
    claimed ──ask──> unchanged; the asker waits
    claimed ──release(PUBLISHED)──> free; all who wait look again, and find it
    claimed ──release(UNSTORABLE)──> open for a short while; all who wait, and all who ask, fetch for themselves
    claimed ──release(FAILED)──> claimed by the first who waits; the second time in a row: free, and all who wait go
    claimed ──release(ABANDONED), holder lost, ``ends`` passed──> claimed by the first who waits; nobody waits: free
    open ──its time passes──> free

A claim that a former home has granted is *adopted*: its claimant tells the key's new home of it.

Why nobody waits for ever: a claim has an end, whoever expires it passes it on, and each wait has a deadline of its own
besides. Why no two tables can wait for each other: a flight waits for its leader, a leader waits for a home, and a home
never waits for anybody (groupcache forks met a distributed deadlock where owners forwarded to each other).
Why a fault costs one fetch: only the loss of a holder hands the claim on, and it is handed to one.
"""

from __future__ import annotations

import enum
import secrets
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

OPEN_FOR = 10.0  # seconds that a key is remembered as not storable: long enough for those who ask together
# The shares of CACHE_CLAIM_TIMEOUT that a claim of the fleet lives, and that a process waits for one: who waits within
# the process waits longest. So a lost fetch is learned of while those behind still wait, and one of them is let go.
CLAIM_LIFE, FLEET_PATIENCE = 0.8, 0.9
MAX_FAILURES = 2  # fetches that may fail in a row before everybody is let go


class Verdict(enum.IntEnum):
    """How a claim ended."""

    PUBLISHED = 1
    UNSTORABLE = 2
    FAILED = 3
    ABANDONED = 4


class Granted(NamedTuple):
    """Fetch it, for all; the claim ``id`` is yours until it is released or ``ends``."""

    id: int
    ends: float


class Pending(NamedTuple):
    """Somebody fetches it until ``ends``; you will be told."""

    ends: float


class Look(NamedTuple):
    """It has been published: look again."""


class Go(NamedTuple):
    """Fetch it for yourself; nobody will wait for you."""


Tidings = Granted | Look | Go
Asker = TypeVar("Asker", bound=Hashable)
Told = list[tuple[bytes, Asker, Tidings]]  # about which key, whom, what


@dataclass
class _Claim(Generic[Asker]):
    id: int
    holder: Asker
    ends: float
    failures: int = 0
    waiters: list[Asker] = field(default_factory=list)


class ClaimTable(Generic[Asker]):
    """The claims of one home or one process. Not thread-safe; ``timeout`` is a claim's life in seconds.

    At most ``limit`` keys are claimed at a time, and waited for by as many askers; beyond that everybody is let go.
    """

    def __init__(self, timeout: float, limit: int = 5_000) -> None:
        self._timeout = timeout
        self._limit = limit
        self._claims: dict[bytes, _Claim[Asker]] = {}
        self._open: dict[bytes, float] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._claims)

    def ask(self, key: bytes, asker: Asker, now: float) -> Granted | Pending | Go:
        """``asker`` wants ``key``. What is due is expired first, by :meth:`expire`, which the caller has called."""
        if self._open.get(key, 0) > now:
            return Go()
        claim = self._claims.get(key)
        if claim is not None:
            if self._waiting >= self._limit:
                return Go()
            self._waiting += 1
            claim.waiters.append(asker)
            return Pending(claim.ends)
        if len(self._claims) >= self._limit:
            return Go()
        return self.adopt(key, asker, now + self._timeout)

    def adopt(self, key: bytes, holder: Asker, ends: float, id_: int | None = None) -> Granted:
        """Note that ``holder`` fetches ``key``: it was granted here, or with ``id_`` by the key's former home."""
        claim = _Claim(secrets.randbits(63) if id_ is None else id_, holder, ends)
        known = self._claims.get(key)
        if known is not None and known.id == claim.id:  # told again, by another way
            known.holder = holder
        elif known is None and len(self._claims) < self._limit:
            self._claims[key] = claim
        return Granted(claim.id, claim.ends)

    def release(self, key: bytes, id_: int | None, verdict: Verdict, now: float) -> Told[Asker]:
        """The claim ``id_`` of ``key`` ended; None: whichever there is, as somebody has published it.

        A claim that was passed on meanwhile is not touched by its former holder.
        """
        claim = self._claims.get(key)
        if claim is None or (id_ is not None and claim.id != id_):
            return []
        if verdict is Verdict.PUBLISHED:
            return self._end(key, Look())
        if verdict is Verdict.UNSTORABLE:
            self._open[key] = now + OPEN_FOR
            return self._end(key, Go())
        if verdict is Verdict.FAILED:
            claim.failures += 1
            if claim.failures >= MAX_FAILURES:
                return self._end(key, Go())
        return self._pass_on(key, claim, now)

    def forget(self, gone: Callable[[Asker], bool], now: float) -> Told[Asker]:
        """Those for whom ``gone`` is true no longer wait, and their claims pass on."""
        told: Told[Asker] = []
        for key, claim in list(self._claims.items()):
            left = [waiter for waiter in claim.waiters if not gone(waiter)]
            self._waiting -= len(claim.waiters) - len(left)
            claim.waiters = left
            if gone(claim.holder):
                told += self._pass_on(key, claim, now)
        return told

    def expire(self, now: float) -> Told[Asker]:
        """Pass on every claim whose end has come, and forget what was open."""
        for key in [key for key, until in self._open.items() if until <= now]:
            del self._open[key]
        due = [(key, claim) for key, claim in self._claims.items() if claim.ends <= now]
        return [told for key, claim in due for told in self._pass_on(key, claim, now)]

    def holder(self, key: bytes) -> Asker | None:
        """Who fetches ``key``."""
        claim = self._claims.get(key)
        return None if claim is None else claim.holder

    def is_waited_for(self, key: bytes) -> bool:
        """Whether anybody waits for ``key``."""
        claim = self._claims.get(key)
        return claim is not None and bool(claim.waiters)

    def holders(self, before: float) -> set[Asker]:
        """Those whose claims end before ``before``: whoever has fetched for long should be seen to be alive."""
        return {claim.holder for claim in self._claims.values() if claim.ends < before}

    def parties(self) -> set[Asker]:
        """Those who have a claim or wait for one."""
        return {asker for claim in self._claims.values() for asker in (claim.holder, *claim.waiters)}

    def _pass_on(self, key: bytes, claim: _Claim[Asker], now: float) -> Told[Asker]:
        if not claim.waiters:
            del self._claims[key]
            return []
        self._waiting -= 1
        claim.id, claim.holder, claim.ends = secrets.randbits(63), claim.waiters.pop(0), now + self._timeout
        return [(key, claim.holder, Granted(claim.id, claim.ends))]

    def _end(self, key: bytes, tidings: Tidings) -> Told[Asker]:
        waiters = self._claims.pop(key).waiters
        self._waiting -= len(waiters)
        return [(key, waiter, tidings) for waiter in waiters]


class Seated(NamedTuple):
    """A task of an event loop, as one who asks."""

    thread: int
    task: int


class Seat(NamedTuple):
    """One who asks within a process: the thread or task, and the future by which it is told."""

    caller: Hashable
    future: Future[Tidings]


class Flights:
    """The claims among the threads and tasks of one process; thread-safe, and never blocks.

    Each who waits holds a future; whoever cancels it has stopped waiting.
    """

    def __init__(self, timeout: float, clock: Callable[[], float]) -> None:
        self._table: ClaimTable[Seat] = ClaimTable(timeout)
        self._clock = clock
        self._lock = threading.Lock()
        self.landed = 0  # flights so far: who has looked for what they bring need not look again while none has landed

    def ask(self, key: bytes, caller: Hashable) -> Granted | Future[Tidings] | Go:
        """The claim itself, leave to go without, or a future that will hold one of these or :class:`Look`.

        ``caller`` is the thread or task that asks: one that holds the claim already would wait for itself.
        """
        seat = Seat(caller, Future())
        with self._lock:
            now = self._clock()
            told = self._table.expire(now)
            holder = self._table.holder(key)
            waits_for_itself = holder is not None and _blocks(caller, holder.caller)
            answer = Go() if waits_for_itself else self._table.ask(key, seat, now)
        self._tell(told)
        return seat.future if isinstance(answer, Pending) else answer

    def is_waited_for(self, key: bytes) -> bool:
        """Whether anybody waits for what is fetched."""
        with self._lock:
            return self._table.is_waited_for(key)

    def release(self, key: bytes, id_: int, verdict: Verdict) -> None:
        """End the claim ``id_``; a claim that has passed to another is left alone."""
        with self._lock:
            self.landed += 1
            told = self._table.release(key, id_, verdict, self._clock())
        self._tell(told)

    def _tell(self, told: Told[Seat]) -> None:
        while told:
            key, seat, tidings = told.pop()
            try:
                seat.future.set_result(tidings)
            except InvalidStateError:  # it has stopped waiting: what it was granted goes to the next
                if isinstance(tidings, Granted):
                    with self._lock:
                        told += self._table.release(key, tidings.id, Verdict.ABANDONED, self._clock())


def _blocks(caller: Hashable, holder: Hashable) -> bool:
    """Whether the holder of a claim cannot go on while ``caller`` waits: it is the same, or a task of the loop that a
    sync call in its thread holds up."""
    return caller == holder or (isinstance(holder, Seated) and caller == holder.thread)

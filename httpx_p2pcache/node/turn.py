"""Whose turn it is: what the node's loop owns may be used by another thread, for a moment, while the loop sleeps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import trio

LOST_SECONDS = 1.0  # after which a turn is not given back any more


class Turn(trio.abc.Instrument):
    """A lock that a loop holds at all times, but while it waits for the kernel to wake it.

    To wake a thread takes longer than many a thing that it is woken for. Who has the turn must not wait, nor do what
    only the loop can: begin tasks, wake them, or change their deadlines.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._lost = False

    @contextlib.contextmanager
    def taken(self) -> Iterator[bool]:
        """Whether it is the caller's now: the loop is asleep. It goes on once this is left."""
        held: list[bool] = []
        try:
            # In one call, between whose parts no signal's handler can raise: a lock that is taken is known to be taken.
            held.extend(map(self._lock.acquire, (False,)))
            yield held[0] and not self._lost
        finally:
            if held and held[0]:
                self._lock.release()

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        if not self._lost:
            self._lock.release()

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        if not self._lost:  # else nobody else has it any more, whatever becomes of the lock
            self._lost = not self._lock.acquire(timeout=LOST_SECONDS)

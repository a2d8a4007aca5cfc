"""Whose turn it is: what the node's loop owns may be used by another thread, for a moment, while the loop sleeps."""

from __future__ import annotations

import threading
from collections.abc import Callable

import trio

LOST_SECONDS = 1.0  # after which a turn that is not given back is not waited for


class Turn(trio.abc.Instrument):
    """A lock that a loop holds at all times, but while it waits for the kernel to wake it.

    To wake a thread takes longer than many a thing that it is woken for. Who is lent the turn must not wait, nor do
    what only the loop can: begin tasks, wake them, or change their deadlines.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = self._lock.acquire()  # by the loop
        self._asleep = False

    def lent(self, func: Callable[[], bool]) -> bool:
        """What ``func`` returns, called while the loop is asleep, and stays so; False if it is not, or goes without."""
        taken: list[bool] = []
        try:
            # In one call, between whose parts no signal's handler can raise: a lock that is taken is known to be taken.
            taken.extend(map(self._lock.acquire, (False,)))
            return taken[0] and self._asleep and func()
        finally:
            if taken and taken[0]:
                self._lock.release()

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        self._held = self._held or self._lock.acquire(blocking=False)  # what was not given back in time may be by now
        if self._held:
            self._asleep = True
            self._lock.release()

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        self._asleep = False  # first: nobody else is lent it while it is waited for
        self._held = self._lock.acquire(timeout=LOST_SECONDS)

"""What is owed to those who wait: whoever holds a claim gives exactly one verdict, on every path."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from httpx_p2pcache.answers import Effect, Wait
from httpx_p2pcache.claims import Granted, Verdict
from httpx_p2pcache.entries import Entry
from httpx_p2pcache.network import FleetClaim

if TYPE_CHECKING:
    from httpx_p2pcache.exchange import Exchange


@dataclass
class Lease:
    """What is owed to those who wait for this request, here and in the fleet: one verdict, once."""

    exchange: Exchange
    key: bytes
    claim: bytes
    flight: int | None = None
    fleet: FleetClaim | None = None
    waiting: Future[Any] | None = None  # what is being waited for, and may be granted while we give up
    late: bool = False  # the home has not answered in time
    settled: bool = False

    def wait(self, future: Future[Any], seconds: float, *, keep: bool = False) -> Generator[Effect, Any, Any]:
        """Wait for a future that may hold a claim: one that comes while we are cancelled is not lost.

        ``keep``: it is not cancelled when it does not come in time.
        """
        self.waiting = future
        found = yield Wait(future, seconds, keep)
        self.waiting = None
        return found

    def adopt_late(self, future: Future[Any]) -> None:
        """A home was too slow to be waited for, and answers after all: a claim that it grants is ours still."""
        answer = None if future.cancelled() else future.result()
        if isinstance(answer, FleetClaim):
            if self.settled:
                self.exchange.network.release(self.claim, self.key, answer, Verdict.ABANDONED)
            else:
                self.fleet = answer

    def give_up(self, verdict: Verdict) -> None:
        """Settle on the way out, with what may just have been granted."""
        future = self.waiting
        if future is not None and not future.cancel() and not future.cancelled() and future.exception() is None:
            granted = future.result()
            if isinstance(granted, Granted):
                self.flight = granted.id
            elif isinstance(granted, FleetClaim):
                self.fleet = granted
        self.settle(verdict)

    def settle(self, verdict: Verdict, *, fleet: Verdict | None = None) -> None:
        if self.settled:
            return
        self.settled = True
        if self.flight is not None:
            self.exchange.flights.release(self.claim, self.flight, verdict)
        if self.fleet is not None:
            self.exchange.network.release(self.claim, self.key, self.fleet, fleet or verdict)

    def publish(self, entry: Entry, *, refreshed: bool = False) -> None:
        """Those in this process look again; the fleet gets the entry, and its claim ends by that."""
        if self.settled:
            return
        self.settled = True
        if self.flight is not None:
            self.exchange.flights.release(self.claim, self.flight, Verdict.PUBLISHED)
        if self.exchange.network.active:
            self.exchange.stats.add("published")
            self.exchange.network.publish(entry, self.claim, widely=not self.late, refreshed=refreshed)

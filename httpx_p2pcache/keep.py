"""Saving a response while its caller reads it."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from httpx_p2pcache import parts
from httpx_p2pcache.answers import Reply
from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.lease import Lease

if TYPE_CHECKING:
    from httpx_p2pcache.lookup import Lookup

logger = logging.getLogger("httpx_p2pcache")


class Keep:
    """Saves a reply while its caller reads it; told by the stream how that went. Exactly one of the ends counts."""

    def __init__(self, lookup: Lookup, reply: Reply, sent: float, lease: Lease) -> None:
        self._lookup = lookup
        self._reply = reply
        self._sent = sent
        self._lease = lease
        self._chunks: list[bytes] = []
        self._left = lookup.exchange.settings.max_body_size
        self._put_off = False

    def feed(self, chunk: bytes) -> None:
        """A piece of the body has been read. A body that grows too large is let go."""
        self._left -= len(chunk)
        if self._left >= 0:
            self._chunks.append(chunk)
        else:
            self._chunks = []
            self._lease.settle(Verdict.UNSTORABLE)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While the body is read: an error gives back at once what is owed to others."""
        try:
            yield
        except Exception:
            self.abandon()
            raise

    def put_off(self) -> bool:
        """The body has been read to its end; whether :meth:`finish` will be called in a moment, by another thread.

        Its caller goes first, unless somebody waits for it: in this process, or perhaps in the fleet. Waits for nobody.
        """
        exchange, lease = self._lookup.exchange, self._lease
        wanted = exchange.network.in_demand or exchange.flights.is_waited_for(lease.claim)
        size = exchange.settings.max_body_size - self._left
        self._put_off = self._left >= 0 and not wanted and exchange.store.put_off(lease.key, size, self._finish_later)
        return self._put_off

    def _finish_later(self) -> None:
        try:
            self.finish()
        except BaseException:  # nobody closes the response after this
            self._lease.settle(Verdict.ABANDONED)
            raise

    def finish(self) -> None:
        """The body has been read to its end: saved here, then published. May touch the disk."""
        if self._left < 0:
            return
        exchange, body = self._lookup.exchange, b"".join(self._chunks)
        try:
            said = self._length()
            if said is not None and said != len(body):
                self._lease.settle(Verdict.FAILED if len(body) < said else Verdict.UNSTORABLE)
                return
            entry = self._lookup.entry(self._reply, body, self._sent)
            if entry.status == 206:
                part = parts.combined(entry, [stored.entry for stored in self._lookup.parts])
                part = part and self._lookup.asker.vouch(part)
                if part is None or part.method == parts.PART:
                    if part is not None:
                        exchange.store.save(part, since=self._sent)
                    self._lease.settle(Verdict.UNSTORABLE)
                    return
                entry = part
            saved = exchange.store.save(entry, since=self._sent)
            exchange.stats.add("stored")
            if exchange.github.follows(entry.url):
                exchange.github.learn(self._lookup.request.headers, entry)
            if self._lookup.pooled and entry.status != 200:
                self._lease.settle(Verdict.FAILED)  # true for this identity: the next one has to see for itself
            elif saved is not None and self._lookup.shareable(entry):
                self._lease.publish(entry)
            else:
                self._lease.settle(Verdict.PUBLISHED, fleet=Verdict.UNSTORABLE)
        except Exception:  # the caller has its response: a store that fails must not take it away
            logger.debug("an entry could not be kept", exc_info=True)
            self._lease.settle(Verdict.UNSTORABLE)

    def _length(self) -> int | None:
        """How long the body is by the origin's word, if there is one; transports may not notice another (§3.3)."""
        headers = self._reply.headers
        lengths = headers.get_list("content-length") or []
        if self._lookup.request.method != "GET" or len(lengths) != 1 or "transfer-encoding" in headers:
            return None
        return int(lengths[0][:20]) if lengths[0].isdecimal() else None

    def abandon(self) -> None:
        """The body will not be read to its end. After :meth:`finish`, or once it is put off, this does nothing."""
        if not self._put_off:
            self._lease.settle(Verdict.ABANDONED)

    def forget(self) -> None:
        """The same from a finaliser, in the middle of whatever its thread does, which may hold a lock that this needs:
        done when this process has its next request."""
        if not self._put_off and not self._lease.settled:
            _forgotten.put(self)


_forgotten: queue.SimpleQueue[Keep] = queue.SimpleQueue()  # whose put() may be called from a finaliser


def let_go_of_forgotten() -> None:
    """Give back what responses that nobody closed were fetching for others."""
    while not _forgotten.empty():
        try:
            _forgotten.get_nowait().abandon()
        except queue.Empty:  # another thread was quicker
            return

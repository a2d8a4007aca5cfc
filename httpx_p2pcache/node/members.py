"""Members: the peers that have been admitted, and the one long-lived stream to each."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.node.protocol import (
    ANSWERS,
    FRAME_OVERHEAD,
    Acquainted,
    Answering,
    Ask,
    Done,
    Found,
    Granted,
    Introduce,
    Message,
    Nothing,
    Ping,
    Publish,
    Published,
    Push,
    TellCounts,
    pack,
    read_frame,
    unpack,
)
from httpx_p2pcache.node.shortcuts import Lock

logger = logging.getLogger("httpx_p2pcache")

WRITE_SECONDS = 5.0  # a peer that does not read for so long is gone
USES = (Ask, Publish, Push, Found, Granted, Nothing, Published)
FRAMES_AT_ONCE = 32  # of one peer's, after which all else has a turn
CALLS_AT_ONCE = 128  # of one peer's that we work on at a time; more wait in its stream


class Link:
    """One admitted stream: frames both ways, many calls in flight. Everything runs in the node's loop.

    ``send`` and ``call`` raise OSError when the peer is gone or does not answer in time.
    """

    def __init__(self, stream: Any, peer_id: ID, keyring: Keyring, limit: int) -> None:
        self._stream = stream
        self.keyring = keyring  # of the secret that both hold
        self._limit = limit
        self._writing = Lock()
        self._room: Callable[[], int] = getattr(stream, "room", lambda: 0)
        self._calls = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self.peer_id = peer_id
        self.closed = trio.Event()
        self._reading = trio.CancelScope()
        self.introduced = trio.Event()
        self.heard = trio.current_time()
        self.last = time.monotonic()  # the same for other threads, where there is no loop's time
        self.knows: set[ID] = set()  # its members, as it has told us here ...
        self.told: set[ID] = set()  # ... and ours, as we have told it
        self.told_unreached = 0
        self.turn = 0  # in which we have told it
        self.dialled = False  # by us
        self.used = trio.current_time()  # for a question or an entry, the last time
        self.received = 0  # bytes of frames
        self.sent = 0

    async def send(self, frame: Any) -> None:
        """Write one frame; whole or, when it takes too long, not at all and the link is closed."""
        if self.closed.is_set():
            raise OSError("the link is closed")
        data = pack(frame)
        try:
            if not self._writing.acquire_at_once():
                with trio.fail_after(WRITE_SECONDS):
                    await self._writing.acquire()
            try:
                # A frame cut short by a cancellation would garble all that follow.
                with trio.CancelScope(shield=True, deadline=trio.current_time() + WRITE_SECONDS) as scope:
                    await self._stream.write(data)
            finally:
                self._writing.release()
            if scope.cancelled_caught:
                raise trio.TooSlowError
            self.sent += len(data)
        except Exception as exc:
            await self.close()
            raise OSError("the peer is gone") from exc

    def open_call(self) -> Pending:
        """A call to be sent with the number it has, and whose answers it receives."""
        pending = Pending(self, next(self._calls))
        self._pending[pending.number] = pending
        return pending

    async def call(self, build: Callable[[int], Any], timeout: float) -> Answering:
        """Send what ``build`` makes of the call's number, and receive its answer."""
        with self.open_call() as pending:
            with trio.move_on_after(timeout):
                await self.send(build(pending.number))
                return await pending.receive()
            raise OSError("no answer in time")

    async def ping(self, timeout: float) -> float:
        """The round trip in seconds."""
        started = trio.current_time()
        await self.call(Ping, timeout)
        return trio.current_time() - started

    async def serve(
        self,
        handle: Callable[[Link, Message], Awaitable[None]],
        at_once: Callable[[Message], bool] = lambda _: False,
    ) -> None:
        """Read frames until the peer is gone or says something impossible; answers reach their calls.

        What waits for nothing is handled ``at_once``, without a task of its own.
        """
        # py-libp2p does not wake our own read when we reset the stream: close() ends it here.
        with self._reading:
            await self._serve(handle, at_once)

    async def _serve(
        self, handle: Callable[[Link, Message], Awaitable[None]], at_once: Callable[[Message], bool]
    ) -> None:
        at_work = trio.Semaphore(CALLS_AT_ONCE)

        async def work(message: Message) -> None:
            try:
                if isinstance(message, Ping):
                    await self.send(Done(message.call))
                else:
                    await handle(self, message)
            except Exception as exc:  # most often it left before it could be answered
                logger.debug("a member's %s was not served: %r", type(message).__name__, exc)
            finally:
                at_work.release()

        async with trio.open_nursery() as nursery:
            try:
                for number in itertools.count(1):
                    if number % FRAMES_AT_ONCE == 0:  # others have work to do as well
                        await trio.lowlevel.checkpoint()
                    body = await read_frame(self._stream, self._limit)
                    self.received += len(body)
                    self.last = time.monotonic()
                    message = unpack(body)
                    self.heard = trio.current_time()
                    if isinstance(message, USES):
                        self.used = self.heard
                    if isinstance(message, ANSWERS) and self._answered(message):
                        continue
                    # Only a reader gives the peer's windows back: two that waited here to write would wait for ever.
                    roomy = self._writing.free() and self._room() >= FRAME_OVERHEAD
                    if isinstance(message, Ping) and roomy:  # answered whatever else is under way
                        await self.send(Done(message.call))
                        continue
                    if isinstance(message, (Introduce, Acquainted)):  # what is said after it depends on it
                        await handle(self, message)
                        continue
                    await at_work.acquire()
                    if roomy and at_once(message):
                        await work(message)
                    else:
                        nursery.start_soon(work, message)
            except Exception as exc:  # the end of the stream, or something that is no frame of ours
                logger.debug("a member is gone: %r", exc)
            finally:
                nursery.cancel_scope.cancel()
                await self.close()

    def _answered(self, answer: Answering) -> bool:
        """Whether somebody took the answer; what was granted to one who has given up is given back by the handler."""
        pending = self._pending.get(answer.call)
        if pending is None:
            return not isinstance(answer, Granted)
        pending.answered(answer)
        return True

    @property
    def busy(self) -> bool:
        """Whether a call of ours is under way."""
        return bool(self._pending)

    def forget(self, number: int) -> None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            pending.end()

    async def close(self) -> None:
        """Everybody who waits for this peer is told that it is gone."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.introduced.set()
        for number in list(self._pending):
            self.forget(number)
        self._reading.cancel()
        with trio.CancelScope(shield=True), trio.move_on_after(0.5):
            try:
                await self._stream.reset()
            except Exception:  # noqa: S110 - it is being thrown away
                pass


class Pending:
    """A call that has been numbered: receives one answer, or Wait and one more."""

    def __init__(self, link: Link, number: int) -> None:
        self._link = link
        self._answers: list[Answering] = []
        self._something = trio.Event()
        self._ended = False
        self.number = number

    async def receive(self) -> Answering:
        """The next answer. Raises OSError when the peer is gone."""
        while not self._answers:
            if self._ended:
                raise OSError("the peer is gone")
            self._something = trio.Event()
            await self._something.wait()
        return self._answers.pop(0)

    def answered(self, answer: Answering) -> None:
        if len(self._answers) == 2:
            raise Rejected("more answers than a call can have")
        self._answers.append(answer)
        self._something.set()

    def end(self) -> None:
        """There will be no more answers."""
        self._ended = True
        self._something.set()

    def close(self) -> None:
        self._link.forget(self.number)

    def __enter__(self) -> Pending:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Member:
    """A peer that has been admitted and is connected."""

    peer_id: ID
    how: str  # found by: "bootstrap", "registry", "peers", or "inbound"
    addresses: list[str]
    links: list[Link] = field(default_factory=list)
    since: float = field(default_factory=time.time)
    met: float = field(default_factory=trio.current_time)
    rtt: float | None = None
    ready: bool = False  # it knows the others, and is home to its keys
    takes: int = 0  # bytes of the largest body that it stores
    counts: dict[str, TellCounts] = field(default_factory=dict)  # what its runner, and those behind it, have counted
    told_counts: dict[str, TellCounts] = field(default_factory=dict)  # what we have told it
    knows: set[ID] = field(default_factory=set)  # its members
    unreached: int = 0  # how many members of its members it cannot reach
    turn: int = 0  # in which it has said so
    asked: float = 0.0  # when we have asked whether it is there, in the loop's time
    suspect: bool = False  # it has not answered in time: not asked again until it is heard of

    @property
    def link(self) -> Link:
        """The link to use: the oldest that is open, so that frames stay in order. Raises OSError when it is gone."""
        for link in self.links:
            if not link.closed.is_set():
                return link
        raise OSError("the peer is gone")

    async def send(self, frame: Any) -> None:
        """Write one frame. Raises OSError when the peer is gone."""
        await self.link.send(frame)

    @property
    def keyring(self) -> Keyring:
        return self.link.keyring

    def usable(self) -> bool:
        """Whether it is home to its keys, and can be asked."""
        return self.ready and not self.suspect and any(not link.closed.is_set() for link in self.links)

    def heard(self) -> float:
        """When it was last heard of, in the loop's time."""
        return max((link.heard for link in self.links), default=0.0)

    def used(self) -> float:
        """When it was last asked, or asked us, in the loop's time."""
        return max((link.used for link in self.links), default=0.0)

    def busy(self) -> bool:
        """Whether a call of ours is under way."""
        return any(link.busy for link in self.links)

    def dialled(self) -> bool:
        """Whether we have dialled it."""
        return any(link.dialled for link in self.links)

    def describe(self) -> dict[str, object]:
        """As ``status`` shows it: plain values, the round trip in milliseconds."""
        return {
            "peer_id": str(self.peer_id),
            "addresses": self.addresses,
            "how": self.how,
            "unreached": self.unreached,
            "rtt_ms": None if self.rtt is None else round(self.rtt * 1000, 2),
            "connected_for": round(time.time() - self.since, 1),
            "heard_ago": round(time.monotonic() - max((link.last for link in self.links), default=0.0), 1),
            "bytes_in": sum(link.received for link in self.links),
            "bytes_out": sum(link.sent for link in self.links),
        }

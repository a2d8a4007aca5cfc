"""Links: an admitted stream each, with frames both ways and many calls in flight."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.node.protocol import (
    ANSWERS,
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
    pack,
    read_frame,
    unpack,
)
from httpx_p2pcache.node.shortcuts import Lock

logger = logging.getLogger("httpx_p2pcache")

WRITE_SECONDS = 5.0  # a peer that does not read for so long is gone
USES = (Ask, Publish, Push, Found, Granted, Nothing, Published)
FRAMES_AT_ONCE = 32  # of one peer's, after which all else has a turn
ROOM = 128 * 1024  # bytes that a peer is ready to read, where we answer it at once
FRAME_SECONDS = 60.0  # for a frame that has begun to come to its end
CALLS_AT_ONCE = 128  # of one peer's that we work on at a time; more wait in its stream


class Party(Protocol):
    """Who has made a call. Both are called in the turn of who has brought it, and wait for nobody."""

    def answered(self, answer: Answering) -> None:
        """Take what the peer says. Raises :class:`Rejected` for what is no answer to that call."""
        ...

    def end(self) -> None:
        """There will be no answer: the peer is gone."""
        ...


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
        self._write_at_once: Callable[[bytes], bool] = getattr(stream, "write_at_once", lambda _: False)
        self._between = False  # two frames: waiting for the next
        self._begun = math.inf  # when the frame that is being read began, in the loop's time
        self._frames = itertools.count(1)
        self._calls = itertools.count(1)
        self._parties: dict[int, Party] = {}  # to calls that are under way
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
            if self._sent_at_once(data):
                return
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

    def send_at_once(self, frame: Any) -> bool:
        """Whether a frame could be written without waiting for anybody."""
        return not self.closed.is_set() and self._sent_at_once(pack(frame))

    def _sent_at_once(self, data: bytes) -> bool:
        if not self._writing.free() or not self._write_at_once(data):
            return False
        self.sent += len(data)
        return True

    def expect(self, party: Party) -> int:
        """The number of a call that is about to be sent, whose answers ``party`` is given until it is forgotten."""
        number = next(self._calls)
        self._parties[number] = party
        return number

    def forget(self, number: int) -> None:
        """Drop the call: answers to it are ignored."""
        self._parties.pop(number, None)

    async def call(self, build: Callable[[int], Any], timeout: float) -> Answering:
        """Send what ``build`` makes of the call's number, and receive its one answer."""
        call = _Call()
        number = self.expect(call)
        try:
            with trio.move_on_after(timeout):
                await self.send(build(number))
                await call.over.wait()
                if call.answer is None:
                    raise OSError("the peer is gone")
                return call.answer
            raise OSError("no answer in time")
        finally:
            self.forget(number)

    async def ping(self, timeout: float) -> float:
        """The round trip in seconds."""
        started = trio.current_time()
        await self.call(Ping, timeout)
        return trio.current_time() - started

    async def serve(
        self,
        handle: Callable[[Link, Message], Awaitable[None]],
        at_once: Callable[[Link, Message], bool] = lambda *_: False,
    ) -> None:
        """Read frames until the peer is gone or says something impossible; answers reach their calls.

        ``at_once`` sees first what there is room to answer, and says whether it has done that: it waits for nobody.
        """

        def listen(data: bytes) -> bool:
            """A whole frame that comes while we wait for one is dealt with in the turn of who has brought it."""
            if not self._between or int.from_bytes(data[:4], "big") != len(data) - 4 or self._is_others_turn():
                return False
            try:
                left = self._left_of(data[4:], at_once)
            except Exception:  # who reads it meets the same, and does what has to be done
                return False
            self.received += 0 if left else len(data)
            return left is None

        getattr(self._stream, "listen", lambda _: None)(listen)
        # py-libp2p does not wake our own read when we reset the stream: close() ends it here.
        with self._reading:
            await self._serve(handle, at_once)

    def _is_others_turn(self) -> bool:
        return next(self._frames) % FRAMES_AT_ONCE == 0

    async def read(self, n: int | None = None) -> bytes:
        """At most ``n`` bytes of a frame."""
        data: bytes = await self._stream.read(n)
        if self._between:
            self._between, self._begun = False, trio.current_time()
        self.received += len(data)
        return data

    def _left_of(self, body: bytes, at_once: Callable[[Link, Message], bool]) -> Message | None:
        """The message in a frame, unless that could be dealt with in this moment. Raises :class:`Rejected`."""
        message = unpack(body)
        self.last = time.monotonic()
        self.heard = trio.current_time()
        if isinstance(message, USES):
            self.used = self.heard
        if isinstance(message, ANSWERS) and self._answered(message):
            return None
        # Who does not read what we say is not answered here, where nothing bounds how much would wait to be written.
        if self._writing.free() and self._room() >= ROOM:
            if isinstance(message, Ping) and self.send_at_once(Done(message.call)):  # whatever else is under way
                return None
            if at_once(self, message):
                return None
        return message

    async def _serve(
        self, handle: Callable[[Link, Message], Awaitable[None]], at_once: Callable[[Link, Message], bool]
    ) -> None:
        at_work = trio.Semaphore(CALLS_AT_ONCE)

        async def work(message: Message) -> None:
            try:
                if isinstance(message, Ping):
                    await self.send(Done(message.call))
                else:
                    await handle(self, message)
            except Exception as exc:  # most often it left before it could be answered
                logger.debug("a member's %s was not served: %r", type(message).__name__, exc, exc_info=True)
            finally:
                at_work.release()

        async with trio.open_nursery() as nursery:
            try:
                while True:
                    if self._is_others_turn():
                        await trio.lowlevel.checkpoint()
                    self._between = True
                    body = await read_frame(self, self._limit)
                    self._begun = math.inf
                    message = self._left_of(body, at_once)
                    if isinstance(message, (Introduce, Acquainted)):  # what is said after it depends on it
                        await handle(self, message)
                    elif message is not None:
                        if at_work.value:  # else a turn of the scheduler
                            at_work.acquire_nowait()
                        else:
                            await at_work.acquire()
                        nursery.start_soon(work, message)
            except Exception as exc:  # the end of the stream, or something that is no frame of ours
                logger.debug("a member is gone: %r", exc)
            finally:
                self._between = False
                nursery.cancel_scope.cancel()
                await self.close()

    def _answered(self, answer: Answering) -> bool:
        """Whether somebody took the answer; what was granted to one who has given up is given back by the handler."""
        party = self._parties.get(answer.call)
        if party is None:
            return not isinstance(answer, Granted)
        party.answered(answer)
        return True

    def is_stuck(self) -> bool:
        """Whether it is in the middle of a frame for too long."""
        return trio.current_time() - self._begun > FRAME_SECONDS

    @property
    def busy(self) -> bool:
        """Whether a call of ours is under way."""
        return bool(self._parties)

    async def close(self) -> None:
        """Everybody who waits for this peer is told that it is gone."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.introduced.set()
        while self._parties:
            self._parties.popitem()[1].end()
        self._reading.cancel()
        with trio.CancelScope(shield=True), trio.move_on_after(0.5):
            try:
                await self._stream.reset()
            except Exception:  # noqa: S110 - it is being thrown away
                pass


class _Call:
    """One who waits for the one answer to a call."""

    def __init__(self) -> None:
        self.answer: Answering | None = None
        self.over = trio.Event()

    def answered(self, answer: Answering) -> None:
        if self.answer is not None:
            raise Rejected("more answers than a call can have")
        self.answer = answer
        self.over.set()

    def end(self) -> None:
        self.over.set()

"""The daemon's end: any :class:`~httpx_p2pcache.network.PeerNetwork`, offered to the processes of this runner.

Everything runs in the daemon's trio loop; the network's futures are resolved in other threads, and wake it.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec
import trio

from httpx_p2pcache import network
from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.network import Asked, FleetClaim, PeerNetwork
from httpx_p2pcache.node.daemon.protocol import (
    FRAME_OVERHEAD,
    VERSION,
    Answered,
    Ask,
    Attach,
    Done,
    Forget,
    FromProcess,
    Invalidate,
    Publish,
    Refused,
    Release,
    State,
    TellQuota,
    from_process,
)
from httpx_p2pcache.node.protocol import pack, read_frame
from httpx_p2pcache.quota import Quota, QuotaBoard
from httpx_p2pcache.sockets import ours
from httpx_p2pcache.store import Store

logger = logging.getLogger("httpx_p2pcache")

ATTACH_SECONDS = 2.0  # for a process that has connected to say who it is
STATE_SECONDS = 0.25  # between two looks at how the node does
MAX_UNREAD = 10_000  # frames that a process may leave unread before it is dropped


class Server:
    """Serves one network to any number of processes; ``attached`` says how many there are now."""

    def __init__(self, network: PeerNetwork, store: Store, quotas: QuotaBoard, label: str, largest: int) -> None:
        self._network, self._store, self._quotas, self._label = network, store, quotas, label
        self._largest = largest
        self._attached: set[_Process] = set()

    @property
    def attached(self) -> int:
        return len(self._attached)

    async def serve(self, listener: socket.socket) -> None:
        """Take processes in from a listening socket until cancelled."""
        token = trio.lowlevel.current_trio_token()

        def spread(quota: Quota) -> None:  # in whichever thread has learned of it
            try:
                token.run_sync_soon(self._tell_all, TellQuota(quota))
            except trio.RunFinishedError:
                pass

        self._quotas.on_change(spread)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_state)
            await trio.serve_listeners(
                self._take_in, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))], handler_nursery=nursery
            )

    def _tell_all(self, frame: msgspec.Struct) -> None:
        for process in self._attached:
            process.tell(frame)

    async def _tell_state(self) -> None:
        told = None
        while True:
            state = self._state()
            if told != (state.active, _lasting(state)):
                told = state.active, _lasting(state)
                self._tell_all(state)
            await trio.sleep(STATE_SECONDS)

    def _state(self) -> State:
        return State(active=self._network.active, status=self._network.status())

    async def _take_in(self, stream: trio.SocketStream) -> None:
        process = _Process(self._network, self._store, self._quotas, stream)
        try:
            async with trio.open_nursery() as nursery:
                admitted = False
                with trio.move_on_after(ATTACH_SECONDS):
                    admitted = await self._admit(process, stream)
                if not admitted:
                    return
                nursery.start_soon(process.write)
                await process.read(self._largest + FRAME_OVERHEAD)
                nursery.cancel_scope.cancel()
        except Exception as exc:  # it has gone, in whatever way
            logger.debug("a process has left: %r", exc, exc_info=True)
        finally:
            self._attached.discard(process)
            process.leave()
            await trio.aclose_forcefully(stream)

    async def _admit(self, process: _Process, stream: trio.SocketStream) -> bool:
        if not ours(stream.socket._sock):  # type: ignore[attr-defined] # trio shows no other way to the peer's uid
            return False
        attach = from_process(await read_frame(_Reading(stream), FRAME_OVERHEAD))
        why = None
        if not isinstance(attach, Attach) or attach.version != VERSION:
            why = "it is of another version of httpx-p2pcache"
        elif attach.label != self._label:
            why = "CACHE_SHARED_SECRET or CACHE_FLEET differ"
        if why is not None:
            await stream.send_all(pack(Refused(why)))
            return False
        process.tell(self._state())
        for quota in self._quotas.known():
            process.tell(TellQuota(quota))
        self._attached.add(process)
        return True


class _Process:
    """One process that is attached: its calls, and the claims that it has."""

    def __init__(self, network: PeerNetwork, store: Store, quotas: QuotaBoard, stream: trio.SocketStream) -> None:
        self._network, self._store, self._quotas, self._stream = network, store, quotas, stream
        self._token = trio.lowlevel.current_trio_token()
        self._unread: deque[bytes] = deque()
        self._something = trio.Event()
        self._gone = trio.CancelScope()
        self._asked: dict[int, Future[Any]] = {}
        self._held: dict[int, tuple[bytes, bytes, FleetClaim]] = {}  # by call: claim, key, what was granted

    def tell(self, frame: msgspec.Struct) -> None:
        """Have a frame written, in order; a process that does not read is dropped."""
        self._unread.append(pack(frame))
        self._something.set()
        if len(self._unread) > MAX_UNREAD:
            self._gone.cancel()

    async def write(self) -> None:
        while True:
            await self._something.wait()
            self._something = trio.Event()
            while self._unread:
                await self._stream.send_all(self._unread.popleft())

    async def read(self, limit: int) -> None:
        with self._gone:
            stream = _Reading(self._stream)
            while True:
                await self._do(from_process(await read_frame(stream, limit)))

    def leave(self) -> None:
        """It is gone: what it was waiting for nobody waits for, what it was fetching somebody else may fetch."""
        asked, self._asked = self._asked, {}
        for future in asked.values():
            future.cancel()
        held, self._held = self._held, {}
        for claim, key, granted in held.values():
            self._network.release(claim, key, granted, Verdict.ABANDONED)

    async def _do(self, frame: FromProcess) -> None:
        if isinstance(frame, Ask):
            self._ask(frame)
        elif isinstance(frame, Publish):
            self._settled(frame.claim)
            self._network.publish(frame.entry, frame.claim, widely=frame.widely, refreshed=frame.refreshed)
        elif isinstance(frame, Release):
            self._settled(frame.claim)
            self._network.release(frame.claim, frame.key, FleetClaim(frame.id), frame.verdict)
        elif isinstance(frame, Forget):
            self._forget(frame.call)
        elif isinstance(frame, Invalidate):
            # What this process of ours holds in memory is void as well, and what the fleet is sending us.
            await trio.to_thread.run_sync(partial(self._store.invalidate, frame.keys))
            told = self._network.invalidate(frame.keys)
            self._when_done(told, lambda _: self.tell(Done(frame.call)))
        elif isinstance(frame, TellQuota):
            self._quotas.merge(frame.quota, time.time())  # which tells the other processes
            self._network.tell_quota(frame.quota)
        else:
            raise Rejected("a process attaches once")

    def _ask(self, frame: Ask) -> None:
        """Put a process's question, and tell it what comes of that."""
        call, question = frame.call, frame.question

        def tell(answer: object) -> None:
            if self._asked.pop(call, None) is None:  # it has left, or given up: given back by its cancellation
                if isinstance(answer, FleetClaim):
                    self._network.release(question.claim, question.key, answer, Verdict.ABANDONED)
            elif isinstance(answer, FleetClaim):
                self._held[call] = question.claim, question.key, answer
                self.tell(Answered(call, "claim", answer.id))
            else:
                self.tell(Answered(call, "found" if isinstance(answer, network.Found) else "unclaimed"))

        def when_awaited(_: Asked) -> None:
            self._soon(self.tell, Answered(call, "awaited"))

        self._asked[call] = asked = self._network.ask(question, when_awaited)
        self._when_done(asked, tell)

    def _when_done(self, future: Future[Any], func: Callable[[Any], None]) -> None:
        """Call ``func`` with the result in this loop, unless it is cancelled."""

        def done(future: Future[Any]) -> None:
            if not future.cancelled():
                self._soon(func, future.result())

        future.add_done_callback(done)

    def _soon(self, func: Callable[[Any], None], value: object) -> None:
        """Call ``func`` in this loop, from any thread."""
        try:
            self._token.run_sync_soon(func, value)
        except trio.RunFinishedError:
            pass

    def _forget(self, call: int) -> None:
        future = self._asked.pop(call, None)
        if future is not None:
            future.cancel()  # or it is answered in this moment: then what was granted is given back below
        held = self._held.pop(call, None)
        if held is not None:
            self._network.release(*held, Verdict.ABANDONED)

    def _settled(self, claim: bytes) -> None:
        self._held = {call: held for call, held in self._held.items() if held[0] != claim}


class _Reading:
    """A trio stream as frames are read from it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)


def _lasting(state: State) -> object:
    """What of a state is worth telling when it changes: round trips and times change all the while."""
    peers: Any = state.status.get("peers") or ()
    lasting = sorted(str(peer["peer_id"]) for peer in peers)
    return state.status.get("peer_id"), state.status.get("addresses"), lasting, state.status.get("runners")

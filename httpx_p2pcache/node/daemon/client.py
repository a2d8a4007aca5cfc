"""A process's end of its runner's daemon: the :class:`~httpx_p2pcache.network.PeerNetwork` without libp2p."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from httpx_p2pcache import network
from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.entries import Entry
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.network import Asked, FleetClaim, NoPeers, PeerNetwork, Question, Unclaimed, settle
from httpx_p2pcache.node.daemon.protocol import (
    FRAME_OVERHEAD,
    VERSION,
    Answered,
    Ask,
    Attach,
    Done,
    Forget,
    FromDaemon,
    Invalidate,
    Publish,
    Refused,
    Release,
    State,
    TellQuota,
    from_daemon,
)
from httpx_p2pcache.node.protocol import pack
from httpx_p2pcache.quota import Quota, QuotaBoard
from httpx_p2pcache.sockets import connect

logger = logging.getLogger("httpx_p2pcache")

ATTACH_SECONDS = 0.1  # what constructing a transport waits for a daemon that is there but busy
GREETING_SECONDS = 1.0  # for the whole of a greeting that has begun
RETRY_SECONDS = 0.5  # between two looks for a daemon that has gone
FLUSH_SECONDS = 1.5  # for what was published last, when we close
MAX_BACKLOG = 64 * 1024**2  # bytes that a daemon may leave unread before it is given up
REMEDY = "p2pcache stop, then p2pcache init, starts one that is."
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)


_NOT_THERE = State(active=False, status={})


class WrongFleet(Exception):
    """The daemon in this directory belongs to another fleet."""


class DaemonNode:
    """The node of a process whose runner has a daemon; see :class:`~httpx_p2pcache.network.PeerNetwork`.

    While the daemon is gone there is nobody to ask, and twice a second a look for it. One that is there but says
    nothing for two look-up budgets counts as gone until it is heard of.
    """

    by_file = True
    in_demand = False  # nothing is put off where it is by the file

    def __init__(self, path: Path, label: str, quotas: QuotaBoard, *, lookup_timeout: float, largest: int) -> None:
        """``label`` names the fleet, ``largest`` is the size in bytes of the largest body. Nothing happens yet."""
        self._path, self._label, self._quotas = path, label, quotas
        self._lookup_timeout, self._largest = lookup_timeout, largest
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._backlog: list[bytes] = []
        self._draining = False
        self._calls = itertools.count(1)
        self._open: dict[int, Future[Any]] = {}
        self._joined: list[Future[None]] = []
        self._state = _NOT_THERE
        self._unheard_since: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="p2pcache-daemon", daemon=True)

    def attach(self) -> None:
        """Connect to the daemon, and hear how its node does if it says so in a tenth of a second.

        Raises :class:`WrongFleet` for a daemon that serves others, and OSError where there is none.
        """
        connection = connect(self._path, ATTACH_SECONDS)
        try:
            connection.sendall(pack(Attach(VERSION, self._label)))  # before any other thread can say something
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._connection, self._unheard_since = connection, None
            self._backlog, self._draining = [], False
        try:
            try:
                connection.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                connection.settimeout(None)  # it is there, and busy: whoever listens will hear of it
                return
            connection.settimeout(GREETING_SECONDS)  # whoever has begun to speak goes on
            self._heard(_read(connection, self._largest + FRAME_OVERHEAD))
            connection.settimeout(None)
        except EOFError as exc:
            self._lose(connection)
            raise ConnectionResetError("the daemon has closed the connection") from exc
        except BaseException:
            self._lose(connection)
            raise

    def start(self) -> None:
        """Listen to the daemon from now on, and look for it while it is gone."""
        self._thread.start()

    @property
    def active(self) -> bool:
        since = self._unheard_since
        if self._connection is None or not self._state.active:
            return False
        return since is None or time.monotonic() - since < 2 * self._lookup_timeout

    def joined(self) -> Future[None]:
        future: Future[None] = Future()
        with self._lock:
            if self._connection is not None and not self._state.active and not self._closing.is_set():
                self._joined.append(future)
                return future
        future.set_result(None)
        return future

    def ask(self, question: Question, when_awaited: Callable[[Asked], None] | None = None) -> Asked:
        asked = Asked(when_awaited)
        self._call(lambda number: Ask(number, question), asked, Unclaimed())
        return asked

    def publish(self, entry: Entry, claim: bytes, *, widely: bool, refreshed: bool = False) -> None:
        self._send(Publish(entry, claim, widely, refreshed))

    def release(self, claim: bytes, key: bytes, held: FleetClaim, verdict: Verdict) -> None:
        self._send(Release(claim, key, held.id, verdict))

    def invalidate(self, keys: list[bytes]) -> Future[None]:
        future: Future[None] = Future()
        self._call(lambda number: Invalidate(number, keys), future, None)
        return future

    def tell_quota(self, quota: Quota) -> None:
        self._send(TellQuota(quota))

    def status(self) -> dict[str, object]:
        return {**NoPeers().status(), "p2p_enabled": True, **(self._state.status if self._connection else {})}

    def close(self, *, at_exit: bool = False) -> None:  # noqa: ARG002 - the contract's signature
        until = time.monotonic() + FLUSH_SECONDS
        while self._draining and time.monotonic() < until:
            self._closing.wait(0.01)
        self._closing.set()
        self._lose(self._connection)
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(RETRY_SECONDS)

    def after_fork(self) -> PeerNetwork:
        """A connection of the child's own; the parent's is let go of, and stays what it was to the parent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()  # our descriptor only
        node = DaemonNode(
            self._path, self._label, self._quotas, lookup_timeout=self._lookup_timeout, largest=self._largest
        )
        try:
            node.attach()
        except (OSError, WrongFleet, Rejected):
            pass
        node.start()
        return node

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                connection = self._connection
                try:
                    if connection is None:
                        self.attach()
                    else:
                        self._heard(_read(connection, self._largest + FRAME_OVERHEAD))
                    continue
                except (OSError, EOFError, Rejected) as exc:
                    logger.debug("the daemon is not there: %r", exc)
                self._lose(connection)
                self._closing.wait(RETRY_SECONDS)
        except WrongFleet as exc:
            logger.warning("%s", exc)
        finally:
            self._lose(self._connection)  # also one that was made while we were closed

    def _heard(self, body: bytes) -> None:
        self._unheard_since = None
        frame: FromDaemon = from_daemon(body)
        if isinstance(frame, Answered):
            self._answered(frame)
        elif isinstance(frame, Done):
            settle(self._open.pop(frame.call, None), None)
        elif isinstance(frame, State):
            self._state = frame
            if frame.active:
                self._let_go()
        elif isinstance(frame, TellQuota):
            self._quotas.merge(frame.quota, time.time())
        elif isinstance(frame, Refused):
            raise WrongFleet(f"the daemon at {self._path} is not for this process: {frame.why}. {REMEDY}")

    def _answered(self, frame: Answered) -> None:
        if frame.kind == "awaited":
            asked = self._open.get(frame.call)
            if isinstance(asked, Asked):
                asked.await_fetch()
            return
        future = self._open.pop(frame.call, None)
        if frame.kind == "claim":
            if not settle(future, FleetClaim(frame.id)):  # nobody waits for it any more
                self._send(Forget(frame.call))
        else:
            settle(future, network.Found() if frame.kind == "found" else Unclaimed())

    def _call(self, build: Callable[[int], msgspec.Struct], future: Future[Any], otherwise: object) -> None:
        """Send what ``build`` makes of a number under which ``future`` is answered; at once if nobody is there."""
        number = next(self._calls)
        self._track(number, future)
        if self._unheard_since is None:
            self._unheard_since = time.monotonic()
        if not self._send(build(number)):
            with self._lock:
                self._open.pop(number, None)
            settle(future, otherwise)

    def _track(self, number: int, future: Future[Any]) -> None:
        with self._lock:  # whoever loses the connection takes all that is open
            self._open[number] = future

        def ended(future: Future[Any]) -> None:
            if future.cancelled():
                with self._lock:
                    self._open.pop(number, None)
                self._send(Forget(number))

        future.add_done_callback(ended)

    def _send(self, frame: msgspec.Struct) -> bool:
        """Hand a frame to the daemon without waiting for it; false if it is not there."""
        data = pack(frame)
        with self._lock:
            connection = self._connection
            if connection is None:
                return False
            if not self._draining:
                try:
                    sent = connection.send(data, DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    sent = len(data)  # it is gone: whoever reads finds out
                if sent == len(data):
                    return True
                data = data[sent:]
                self._draining = True
                threading.Thread(target=self._drain, args=(connection,), name="p2pcache-drain", daemon=True).start()
            self._backlog.append(data)
            full = sum(map(len, self._backlog)) > MAX_BACKLOG
        if full:
            self._lose(connection)
        return not full

    def _drain(self, connection: socket.socket) -> None:
        """Send what did not fit into the socket at once, in order."""
        while True:
            with self._lock:
                if connection is not self._connection or not self._backlog:
                    if connection is self._connection:
                        self._draining = False
                    return
                data = self._backlog.pop(0)
            try:
                connection.sendall(data)
            except OSError:
                self._lose(connection)

    def _lose(self, connection: socket.socket | None) -> None:
        """The daemon is gone: nobody waits for it any longer."""
        if connection is None:
            return
        with self._lock:
            waiting: list[Future[Any]] = []
            if connection is self._connection:
                self._connection, self._backlog, self._draining, self._state = None, [], False, _NOT_THERE
                waiting, self._open = list(self._open.values()), {}
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        connection.close()
        for future in waiting:
            settle(future, Unclaimed())
        self._let_go()

    def _let_go(self) -> None:
        """Those who waited for the node to join do not wait any longer."""
        with self._lock:
            joined, self._joined = self._joined, []
        for future in joined:
            settle(future, None)


def _read(connection: socket.socket, limit: int) -> bytes:
    """The next frame. Raises EOFError when the daemon is gone, :class:`Rejected` for a frame that is too long."""
    length = int.from_bytes(_read_exactly(connection, 4), "big")
    if not 0 < length <= limit:
        raise Rejected(f"a frame of {length} bytes, where 1 to {limit} are allowed")
    return _read_exactly(connection, length)


def _read_exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 65536))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)

"""A node inside this process: its own trio loop in its own thread, reached without ever blocking a caller."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.entries import Entry, Keyring
from httpx_p2pcache.imports import IMPORT_SECONDS, import_trio, importing
from httpx_p2pcache.network import Asked, FleetClaim, NoPeers, PeerNetwork, Question, Unclaimed, done, nobody, settle
from httpx_p2pcache.quota import Quota, QuotaBoard
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats
from httpx_p2pcache.store import Store

if TYPE_CHECKING:
    import trio

    from httpx_p2pcache.node.fleet import Fleet
    from httpx_p2pcache.node.turn import Turn

logger = logging.getLogger("httpx_p2pcache")

CLOSE_SECONDS = 1.9  # what close() may take


class EmbeddedNode:
    """The :class:`PeerNetwork` of a process that takes part itself.

    ``import libp2p`` takes about two seconds, so it happens in the node's thread; until the node has joined, there is
    nobody to ask. A node that cannot start says so once and leaves a working local cache.
    """

    by_file = False

    def __init__(
        self,
        settings: Settings,
        store: Store,
        keyring: Keyring,
        stats: Stats,
        quotas: QuotaBoard,
    ) -> None:
        self._settings = settings
        self._store = store
        self._keyring = keyring
        self._stats = stats
        self._quotas = quotas
        self._failed: NoPeers | None = None
        self._fleet: Fleet | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._turn: Turn | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._joined: Future[None] = Future()
        self._is_joined = False  # for who asks often: a Future has a lock
        # A daemon, lest an interpreter that nobody closes us in should wait for it; atexit stops it in order.
        self._thread = threading.Thread(target=self._run, name="p2pcache-node", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        # Also while we are alone: who joins in the next moment is told what we are fetching.
        return self._is_joined and self._token is not None

    @property
    def in_demand(self) -> bool:
        fleet = self._fleet
        return fleet is not None and fleet.in_demand()

    def joined(self) -> Future[None]:
        waiting: Future[None] = Future()

        def pass_on(_: Future[None]) -> None:
            if waiting.set_running_or_notify_cancel():
                waiting.set_result(None)

        self._joined.add_done_callback(pass_on)
        return waiting

    def ask(self, question: Question, when_awaited: Callable[[Asked], None] | None = None) -> Asked:
        asked = Asked(when_awaited)
        self._track(asked)

        def begin(fleet: Fleet) -> None:
            fleet.questions.ask(question, asked)

        try:
            if not self._asked_here(question, asked) and not self._soon(begin):
                settle(asked, Unclaimed())
        except BaseException:  # a signal's handler has raised: what is granted to this goes back
            asked.cancel()
            raise
        return asked

    def _asked_here(self, question: Question, asked: Asked) -> bool:
        """Whether it could be asked in this thread, which the node's loop, asleep, is not woken for."""
        fleet, turn = self._fleet, self._turn
        if fleet is None or turn is None or self._closing:
            return False
        return turn.lent(partial(fleet.questions.asked_in_turn, question, asked))

    def publish(self, entry: Entry, claim: bytes, *, widely: bool, refreshed: bool = False) -> None:
        async def publish(fleet: Fleet) -> None:
            await fleet.fetches.publish(entry, claim, widely=widely, refreshed=refreshed)

        self._soon(lambda fleet: fleet.spawn(publish, fleet))

    def release(self, claim: bytes, key: bytes, held: FleetClaim, verdict: Verdict) -> None:
        self._soon(lambda fleet: fleet.spawn(fleet.fetches.release, claim, key, held.id, verdict))

    def invalidate(self, keys: list[bytes]) -> Future[None]:
        future: Future[None] = Future()
        self._track(future)
        if not self._soon(lambda fleet: fleet.spawn(fleet.home.invalidate, keys, future)):
            return done()
        return future

    def tell_quota(self, quota: Quota) -> None:
        self._soon(lambda fleet: fleet.spawn(fleet.home.tell_quota, quota))

    def status(self) -> dict[str, object]:
        fleet = self._fleet
        if fleet is None:
            return {**NoPeers().status(), "p2p_enabled": True} if self._failed is None else self._failed.status()
        peers = [member.describe() for member in list(fleet.members.values())]
        return {
            "p2p_enabled": True,
            "off_because": "",
            "peer_id": str(fleet.host.id),
            "addresses": list(fleet.addresses),
            "connected_peers": len(peers),
            "unreached": fleet.reach.unreached,
            "peers": peers,
            "runners": fleet.runners(),
        }

    def close(self, *, at_exit: bool = False) -> None:
        with self._lock:
            self._closing = True
            token, fleet = self._token, self._fleet
        if token is not None and fleet is not None:
            try:
                token.run_sync_soon(fleet.stopping.set)
            except RuntimeError:  # it has ended by itself
                pass
        # A node that still imports libp2p sees after it that it is closing, and ends. An interpreter must not end in
        # the middle of that import: C extensions would be torn down while they are set up, and crash it.
        if self._thread is not threading.current_thread():
            self._thread.join(IMPORT_SECONDS if at_exit and token is None else CLOSE_SECONDS)
        self._give_up()

    def after_fork(self) -> PeerNetwork:
        # The thread did not come along, but its sockets did: a port that the child holds would stay taken.
        self._token, self._turn, self._closing = None, None, True
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            for descriptor in fleet.host.sockets():
                try:
                    os.close(descriptor)
                except OSError:
                    pass
        return NoPeers()

    def _soon(self, func: Callable[[Fleet], None]) -> bool:
        """Have ``func`` called in the node's loop; false if there is none."""
        token = self._token
        if token is None or self._closing:
            return False

        def call() -> None:
            if self._fleet is not None:
                func(self._fleet)

        try:
            token.run_sync_soon(call)
        except RuntimeError:  # the loop has ended
            return False
        return True

    def _track(self, future: Future[Any]) -> None:
        self._open.add(future)
        future.add_done_callback(self._open.discard)

    def _give_up(self) -> None:
        """Nobody waits for a node that is gone."""
        settle(self._joined, None)
        for future in list(self._open):
            settle(future, Unclaimed())

    def _run(self) -> None:
        try:
            with importing():
                import cryptography.hazmat.primitives.ciphers.aead  # noqa: F401 - not in the middle of a first answer

                import_trio()  # here begins what takes a second
                import trio

                from httpx_p2pcache.node.fleet import Fleet
                from httpx_p2pcache.node.turn import Turn

            self._turn = Turn()
            if not self._closing:
                trio.run(self._main, Fleet, instruments=[self._turn])
        except BaseException as exc:
            logger.debug("the node has failed", exc_info=True)
            refused = _os_error(exc) if self._fleet is None else None  # it never came to listen
            if self._closing:
                pass
            elif refused is not None:
                where = f"{self._settings.listen_host}, port {self._settings.listen_port}"
                self._fail(f"the node cannot listen on {where} ({refused}); set CACHE_LISTEN_HOST or CACHE_LISTEN_PORT")
            else:
                self._fail(f"the node has failed: {exc!r}")
        finally:
            self._token = None
            self._fleet = None
            self._give_up()

    def _fail(self, why: str) -> None:
        self._failed = nobody(why)

    async def _main(self, fleet_type: type[Fleet]) -> None:
        import trio

        fleet = fleet_type(self._settings, self._store, self._keyring, self._stats, self._quotas)

        def started() -> None:
            with self._lock:
                self._fleet, self._token = fleet, trio.lowlevel.current_trio_token()
                if self._closing:
                    fleet.stopping.set()

        async def say_joined() -> None:
            await fleet.joined.wait()
            self._is_joined = True
            settle(self._joined, None)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(say_joined)
            await fleet.run(started)
            nursery.cancel_scope.cancel()


def _os_error(exc: BaseException) -> OSError | None:
    """The error of the operating system that this is, or that a group of errors holds."""
    if isinstance(exc, OSError):
        return exc
    found = (_os_error(one) for one in getattr(exc, "exceptions", ()))
    return next((one for one in found if one is not None), None)

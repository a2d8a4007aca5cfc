"""What all transports of a process with the same settings share: one store, one node, one set of flights.

Two clients in one process are one runner. The last of them to close ends the node; interpreter exit ends it as well.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exchange import Exchange
from httpx_p2pcache.files import local_secret
from httpx_p2pcache.github import GitHub
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.network import NoPeers, PeerNetwork, nobody
from httpx_p2pcache.pump import wait_for
from httpx_p2pcache.quota import QuotaBoard
from httpx_p2pcache.settings import ADVICE, SECRETS, Settings, can_be_guessed, variable
from httpx_p2pcache.stats import Stats, aggregate, summary
from httpx_p2pcache.store import Store

logger = logging.getLogger("httpx_p2pcache")

CLOSE_SECONDS = 1.0  # what a revalidation in the background may hold up close()

_lock = threading.Lock()
_running: dict[Settings, tuple[Exchange, int]] = {}
_finished = Stats()  # what closed runners of this process have counted


class Usage:
    """One client's part in its runner: given back once, with the work that outlives an answer."""

    def __init__(self, settings: Settings) -> None:
        self.exchange = acquire(settings)
        self._lock = threading.Lock()
        self._released = False
        self._background: set[threading.Thread] = set()

    def wait_until_joined(self, timeout: float) -> bool:
        """Whether the node has reached the peers it knows, within ``timeout`` seconds."""
        wait_for(self.exchange.network.joined(), timeout)
        return self.exchange.network.active

    def in_background(self, func: Callable[[], None], done: Callable[[], object]) -> None:
        """Call ``func`` in a thread, then ``done``; nobody hears of a failure, and ``close`` waits for it a moment."""

        def run() -> None:
            try:
                func()
            except Exception as exc:
                logger.debug("a revalidation in the background has failed: %s", type(exc).__name__)
            finally:
                done()
                self._background.discard(threading.current_thread())

        worker = threading.Thread(target=run, name="p2pcache-revalidate", daemon=True)
        self._background.add(worker)
        try:
            worker.start()
        except RuntimeError:  # there are no more threads to be had
            done()
            self._background.discard(worker)

    def close(self) -> None:
        """Give it back; idempotent. Returns within two seconds."""
        until = time.monotonic() + CLOSE_SECONDS
        for worker in list(self._background):
            worker.join(max(0.0, until - time.monotonic()))
        with self._lock:
            released, self._released = self._released, True
        release(self.exchange, again=released)


def acquire(settings: Settings) -> Exchange:
    """The runner for ``settings``, started if this is its first user; to be given back with :func:`release`."""
    _end_with_multiprocessing()
    with _lock:
        exchange, users = _running.get(settings) or (_start(settings), 0)
        _running[settings] = exchange, users + 1
        return exchange


def release(exchange: Exchange, *, again: bool = False) -> None:
    """One user less; the last one closes the node and the store. Returns within two seconds.

    ``again``: it has been given back before, and used since: only a store that was opened anew is closed.
    """
    with _lock:
        found = _running.get(exchange.settings)
        if found is None or found[0] is not exchange:
            exchange.store.close()
            return
        if again:
            return
        if found[1] > 1:
            _running[exchange.settings] = exchange, found[1] - 1
            return
        del _running[exchange.settings]
    _finish(exchange)


def get_stats() -> dict[str, object]:
    """What this process has counted, over all its transports: the counters of ``docs/statistics``, and the fleet.

    Keys: those of ``stats.COUNTERS`` (whole numbers), ``hits``, ``misses``, ``total_requests``, ``api_calls_saved``,
    ``api_calls_made``, ``hit_rate`` (0 to 1), ``connected_peers``, ``peer_id``, ``p2p_enabled``, ``cache_size``
    (entries), ``total_size_bytes``, ``cache_dir``, and ``aggregate``: the same counters and figures of the whole fleet,
    with ``runners``, ``total_api_calls``, ``total_cache_hits`` and ``total_peers``.
    """
    with _lock:
        described = [exchange.describe() for exchange, _ in _running.values()]
    counts = _finished.snapshot()
    whole: dict[str, object] = {"p2p_enabled": False, "peer_id": None, "connected_peers": 0, "cache_dir": None}
    whole |= {"aggregate": None}
    for one in described:
        for name in counts:
            counts[name] += one[name]  # type: ignore[operator] # counters are whole numbers
        if one["p2p_enabled"] or not whole["p2p_enabled"]:
            whole |= {name: one[name] for name in whole}
    for name in ("cache_size", "total_size_bytes"):
        whole[name] = sum(one[name] for one in described)  # type: ignore[misc] # so are sizes
    if not whole["p2p_enabled"]:
        whole["aggregate"] = aggregate({"": counts}, 0)
    return {**summary(counts), **whole}


def _start(settings: Settings) -> Exchange:
    secret = settings.shared_secret.encode() or local_secret(settings.dir)
    keyring = Keyring.of(settings, secret)
    stats = Stats()
    github = GitHub(settings, stats)
    quotas = QuotaBoard()
    store = Store(
        settings.dir,
        max_size=settings.max_size,
        default_ttl=settings.default_ttl,
        any_coding=github.follows,
        sealing=keyring if settings.encrypt_at_rest else None,
    )
    network = _network(settings, store, keyring, stats, quotas)
    store.behind = not network.by_file
    ledger = Ledger(settings.dir)
    ledger.follow(stats)
    return Exchange(settings, store, keyring, stats, network, github, quotas, ledger)


def _network(settings: Settings, store: Store, keyring: Keyring, stats: Stats, quotas: QuotaBoard) -> PeerNetwork:
    if not settings.enable_p2p or settings.node == "none":
        return NoPeers("set CACHE_ENABLE_P2P=true (and not CACHE_NODE=none) to share")  # as was asked for
    if not settings.shared_secret:
        return nobody("there is no secret; set CACHE_SHARED_SECRET (or GITHUB_TOKEN)")
    for name in SECRETS:
        if getattr(settings, name) and can_be_guessed(getattr(settings, name)):
            return nobody(f"{variable(name)} can be guessed. {ADVICE}")
    from httpx_p2pcache.node import start  # neither libp2p nor trio is imported by this

    return start(settings, store, keyring, stats, quotas)


def _finish(exchange: Exchange, *, at_exit: bool = False) -> None:
    exchange.store.catch_up()
    exchange.network.close(at_exit=at_exit)
    for name, count in exchange.stats.snapshot().items():
        _finished.add(name, count)
    exchange.ledger.close(exchange.stats)
    exchange.store.close()


def _finish_all() -> None:
    with _lock:
        exchanges = [exchange for exchange, _ in _running.values()]
        _running.clear()
    for exchange in exchanges:
        _finish(exchange, at_exit=True)


def _after_fork() -> None:
    """The parent's node lives on in the parent alone; the child goes on with its local cache."""
    global _lock
    _lock = threading.Lock()
    for exchange, _ in _running.values():
        exchange.after_fork()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:  # which forgets, once it begins in its child, what was to be done at the parent's end
        util.register_after_fork(_finished, _end_with_multiprocessing)


def _end_with_multiprocessing(*_: object) -> None:
    """A child that multiprocessing has forked ends without ``atexit``, but not without finalizers of its own."""
    global _ends_in
    util, process = (sys.modules.get(f"multiprocessing.{name}") for name in ("util", "process"))
    if util is not None and process is not None and process.parent_process() is not None and _ends_in != os.getpid():
        _ends_in = os.getpid()
        util.Finalize(None, _finish_all, exitpriority=0)


_ends_in = 0  # the process for whose end that has been done
atexit.register(_finish_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

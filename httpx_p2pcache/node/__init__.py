"""The node: this runner's part in the fleet. The only folder that imports libp2p and trio, and only where it runs."""

from __future__ import annotations

import importlib.util
import logging

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.network import NoPeers, PeerNetwork, nobody, say_once
from httpx_p2pcache.quota import QuotaBoard
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats
from httpx_p2pcache.store import Store

logger = logging.getLogger("httpx_p2pcache")


def start(
    settings: Settings,
    store: Store,
    keyring: Keyring,
    stats: Stats,
    quotas: QuotaBoard,
) -> PeerNetwork:
    """The runner's daemon if it is there, else a node that begins to join the fleet in the background.

    Without libp2p there are no peers, which is said once.
    """
    if settings.node in ("auto", "daemon"):
        network = _daemon(settings, keyring, quotas)
        if network is not None:
            return network
    if importlib.util.find_spec("libp2p") is None:
        return nobody("libp2p is not installed; pip install 'httpx-p2pcache[p2p]'")
    from httpx_p2pcache.node.embedded import EmbeddedNode

    return EmbeddedNode(settings, store, keyring, stats, quotas)


def _daemon(settings: Settings, keyring: Keyring, quotas: QuotaBoard) -> PeerNetwork | None:
    """A connection to the runner's daemon; None if there is none and another node may take its place."""
    from httpx_p2pcache.node.daemon.client import DaemonNode, WrongFleet
    from httpx_p2pcache.sockets import node_socket

    path = node_socket(settings.dir)
    if settings.node == "auto" and not path.exists():
        return None
    node = DaemonNode(
        path, keyring.label, quotas, lookup_timeout=settings.lookup_timeout, largest=settings.max_body_size
    )
    try:
        node.attach()
    except WrongFleet as exc:
        say_once("%s", exc)
        return NoPeers(str(exc)) if settings.node == "daemon" else None
    except (OSError, Rejected) as exc:
        if settings.node == "auto":
            logger.debug("there is no daemon at %s: %r", path, exc)
            return None
        say_once("there is no daemon in CACHE_DIR yet (p2pcache init starts one): sharing begins once it is there")
    node.start()
    return node

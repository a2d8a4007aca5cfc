"""The node: this runner's part in the fleet. The only folder that imports libp2p and trio, and only in its thread."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.network import NoPeers, PeerNetwork
from httpx_p2pcache.quota import QuotaBoard
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats
from httpx_p2pcache.store import Store


def start(
    settings: Settings, store: Store, keyring: Keyring, stats: Stats, quotas: QuotaBoard, say_once: Callable[..., None]
) -> PeerNetwork:
    """A node that begins to join the fleet in the background; without libp2p nobody, and ``say_once`` says why."""
    if importlib.util.find_spec("libp2p") is None:
        say_once("sharing with other runners is off, as libp2p is not installed: pip install 'httpx-p2pcache[p2p]'")
        return NoPeers()
    from httpx_p2pcache.node.embedded import EmbeddedNode

    return EmbeddedNode(settings, store, keyring, stats, quotas, say_once)

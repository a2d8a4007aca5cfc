"""All the ways of finding peers, as the settings have them."""

from __future__ import annotations

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.node.discovery import Discovery
from httpx_p2pcache.node.discovery.registry import Registry
from httpx_p2pcache.node.discovery.static import StaticPeers
from httpx_p2pcache.settings import Settings


def discoveries(settings: Settings, keyring: Keyring) -> list[Discovery]:
    """Side by side; each may fail alone."""
    directory = settings.peer_registry or settings.dir / "peers"
    return [
        StaticPeers(settings.bootstrap_peers),
        *(Registry(directory, ring, settings.peer_ttl, announces=ring is keyring) for ring in keyring.every),
    ]

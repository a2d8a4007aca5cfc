"""All the ways of finding peers, as the settings have them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from httpx_p2pcache.node.discovery import Discovery, InThread
from httpx_p2pcache.node.discovery.artifacts import Artifacts
from httpx_p2pcache.node.discovery.dht import Dht
from httpx_p2pcache.node.discovery.mdns import LocalNetwork
from httpx_p2pcache.node.discovery.registry import Registry
from httpx_p2pcache.node.discovery.static import StaticPeers

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet


def discoveries(fleet: Fleet) -> list[Discovery]:
    """Side by side; each may fail alone."""
    settings, keyring = fleet.settings, fleet.keyring
    directory = settings.registry
    artifacts = Artifacts.of(settings, keyring, os.environ)
    return [
        *([InThread(StaticPeers(settings.bootstrap_peers), fleet.in_thread)] if settings.bootstrap_peers else []),
        *(
            InThread(Registry(directory, ring, settings.peer_ttl, announces=ring is keyring), fleet.in_thread)
            for ring in keyring.every
        ),
        *([InThread(artifacts, fleet.in_thread)] if artifacts is not None else []),
        InThread(LocalNetwork(keyring, settings.listen_host), fleet.in_thread, late=True),
        Dht(fleet.host, keyring, settings, lonely=lambda: not fleet.members, in_thread=fleet.in_thread),
    ]

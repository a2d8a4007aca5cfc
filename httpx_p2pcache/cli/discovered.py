"""The peers that may be there, without joining: what the registry and the settings say, and whom the daemon knows."""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

import base58

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.files import private_directory
from httpx_p2pcache.multiaddrs import multiaddr, parse_peer, peer_id_of
from httpx_p2pcache.node.discovery import Sighting
from httpx_p2pcache.node.discovery.registry import Registry
from httpx_p2pcache.settings import ADVICE, Settings, can_be_guessed


def discovered(settings: Settings, status: dict[str, Any] | None) -> list[dict[str, str]]:
    """Each as ``multiaddr``, ``peer_id`` and ``how``; never the daemon itself."""
    found: dict[str, dict[str, str]] = {}

    def add(peer_id: str, addresses: list[str], how: str) -> None:
        for address in addresses:
            named = f"{address}/p2p/{peer_id}"
            if is_peer(named):
                found.setdefault(named, {"multiaddr": named, "peer_id": peer_id, "how": how})

    for peer in status["peers"] if status else ():
        add(peer["peer_id"], peer["addresses"], peer["how"])
    if settings.shared_secret:
        keyring = Keyring.of(settings, settings.shared_secret.encode())
        registry = Registry(settings.registry, keyring, settings.peer_ttl)
        for sighting in _found(registry):
            add(base58.b58encode(sighting.peer_id).decode(), list(sighting.addresses), "registry")
    for text in settings.bootstrap_peers:
        address, _, peer_id = text.rpartition("/p2p/")
        add(peer_id, [address], "bootstrap")
    own = status and status["peer_id"]
    return [peer for peer in found.values() if peer["peer_id"] != own]


def register(settings: Settings, peer_id: str, port: int, ip: str) -> str:
    """Write a record for a node; returns its multiaddr. Raises ValueError for what is no address, OSError."""
    if not settings.shared_secret:
        raise ValueError("there is no secret: set CACHE_SHARED_SECRET (or GITHUB_TOKEN)")
    named = peer_id_of(peer_id)
    if can_be_guessed(settings.shared_secret):
        raise ValueError(f"CACHE_SHARED_SECRET can be guessed. {ADVICE}")
    found = ipaddress.ip_address(ip)
    if found.is_unspecified or "%" in ip:
        raise ValueError(f"{ip!r} is not an address at which others reach a node")
    address = multiaddr(ip, port)
    keyring = Keyring.of(settings, settings.shared_secret.encode())
    registry = Registry(settings.registry, keyring, settings.peer_ttl)
    private_directory(settings.dir)  # where the registry is by default
    registry.announce(named, [address])
    return f"{address}/p2p/{peer_id}"


def is_peer(text: str) -> bool:
    """Whether ``text`` is the address of a peer, as a node takes it."""
    try:
        parse_peer(text)
    except ValueError:
        return False
    return True


def _found(registry: Registry) -> list[Sighting]:
    try:
        return registry.find()
    except OSError as exc:
        print(f"p2pcache: the registry cannot be read: {exc}", file=sys.stderr)
        return []

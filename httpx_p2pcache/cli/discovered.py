"""The peers that may be there, without joining: what the registry and the settings say, and whom the daemon knows."""

from __future__ import annotations

import ipaddress
import re
import sys
from typing import Any

import base58

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.files import private_directory
from httpx_p2pcache.node.discovery import Sighting
from httpx_p2pcache.node.discovery.registry import Registry
from httpx_p2pcache.settings import ADVICE, Settings, can_be_guessed


def discovered(settings: Settings, status: dict[str, Any] | None) -> list[dict[str, str]]:
    """Each as ``multiaddr``, ``peer_id`` and ``how``; never the daemon itself."""
    found: dict[str, dict[str, str]] = {}

    def add(peer_id: str, addresses: list[str], how: str) -> None:
        for address in addresses:
            if not _ADDRESS.fullmatch(address) or not _is_peer_id(peer_id):
                continue
            multiaddr = f"{address}/p2p/{peer_id}"
            found.setdefault(multiaddr, {"multiaddr": multiaddr, "peer_id": peer_id, "how": how})

    for peer in status["peers"] if status else ():
        add(peer["peer_id"], peer["addresses"], peer["how"])
    if settings.shared_secret:
        keyring = Keyring.of(settings, settings.shared_secret.encode())
        registry = Registry(settings.peer_registry or settings.dir / "peers", keyring, settings.peer_ttl)
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
    if not _is_peer_id(peer_id):
        raise ValueError(f"{peer_id!r} is not a peer ID, as 12D3KooW… or Qm…")
    if can_be_guessed(settings.shared_secret):
        raise ValueError(f"CACHE_SHARED_SECRET can be guessed. {ADVICE}")
    found = ipaddress.ip_address(ip)
    if found.is_unspecified or "%" in ip:
        raise ValueError(f"{ip!r} is not an address at which others reach a node")
    address = f"/ip{found.version}/{ip}/tcp/{port}"
    keyring = Keyring.of(settings, settings.shared_secret.encode())
    registry = Registry(settings.peer_registry or settings.dir / "peers", keyring, settings.peer_ttl)
    private_directory(settings.dir)  # where the registry is by default
    registry.announce(base58.b58decode(peer_id), [address])
    return f"{address}/p2p/{peer_id}"


_ADDRESS = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6|dnsaddr)/[A-Za-z0-9.:_%-]+(?:/tcp/\d{1,5})?")


def is_peer(text: str) -> bool:
    """Whether ``text`` is a multiaddr of a peer, with or without its peer ID."""
    address, named, peer_id = text.rpartition("/p2p/")
    return bool(_ADDRESS.fullmatch(address if named else text)) and (not named or _is_peer_id(peer_id))


def _is_peer_id(text: str) -> bool:
    """Whether ``text`` is a peer ID: the base58 of a multihash."""
    try:
        return len(base58.b58decode(text)) in (34, 38, 39)
    except ValueError:
        return False


def _found(registry: Registry) -> list[Sighting]:
    try:
        return registry.find()
    except OSError as exc:
        print(f"p2pcache: the registry cannot be read: {exc}", file=sys.stderr)
        return []

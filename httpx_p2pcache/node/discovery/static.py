"""Peers named by ``CACHE_BOOTSTRAP_PEERS``."""

from __future__ import annotations

import logging

from libp2p.peer.id import ID
from multiaddr import Multiaddr

from httpx_p2pcache.node.discovery import Sighting

logger = logging.getLogger("httpx_p2pcache")


class StaticPeers:
    """The multiaddrs of a setting; a malformed one is named in a warning, the others are used."""

    slow = False
    pause = 0.0

    def __init__(self, multiaddrs: tuple[str, ...]) -> None:
        self._found = [sighting for text in multiaddrs if (sighting := _parse(text)) is not None]

    def announce(self, peer_id: bytes, addresses: list[str]) -> None: ...

    def find(self) -> list[Sighting]:
        return self._found

    def withdraw(self) -> None: ...


def _parse(text: str) -> Sighting | None:
    try:
        address, _, peer_id = str(Multiaddr(text)).partition("/p2p/")
        if "/tcp/" not in address:
            raise ValueError(text)
        known = ID.from_base58(peer_id).to_bytes() if peer_id else b""
        return Sighting(peer_id=known, addresses=(address,), how="bootstrap")
    except Exception:  # multiaddr raises a dozen kinds of errors for text that is no multiaddr
        logger.warning(
            "CACHE_BOOTSTRAP_PEERS: %r is not the address of a peer, as /ip4/10.0.0.1/tcp/9100/p2p/Qm… or the same "
            "without its peer ID: left out",
            text,
        )
        return None

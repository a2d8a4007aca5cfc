"""Peers named by ``CACHE_BOOTSTRAP_PEERS``, and what the names in them stand for."""

from __future__ import annotations

import logging
import socket
import time

from libp2p.peer.id import ID

from httpx_p2pcache.multiaddrs import MAX_ADDRESSES, multiaddr, parse_peer
from httpx_p2pcache.node.discovery import Sighting

logger = logging.getLogger("httpx_p2pcache")

DNS_SECONDS = 3.0  # for one name
RESOLVED_SECONDS = 60.0  # for which what a name stands for is believed to be the same
MAX_NAMES = 16  # that one address may lead to


class StaticPeers:
    """The multiaddrs of a setting; a malformed one is named in a warning, the others are used."""

    pause = 5.0

    def __init__(self, multiaddrs: tuple[str, ...], *, quietly: bool = False) -> None:
        self._quietly = quietly
        self._named = [named for text in multiaddrs if (named := _parse(text, quietly)) is not None]
        self._found: list[Sighting] = []
        self._until = 0.0
        self._unknown: set[str] = set()

    def announce(self, peer_id: bytes, addresses: list[str]) -> None: ...

    def find(self) -> list[Sighting]:
        if time.monotonic() < self._until:
            return self._found
        found = []
        for address, peer_id in self._named:
            known = resolve(address, str(ID(peer_id)) if peer_id else "")
            if known:
                found.append(Sighting(peer_id=peer_id, addresses=tuple(known[:MAX_ADDRESSES]), how="bootstrap"))
                self._unknown.discard(address)
            elif address not in self._unknown:
                self._unknown.add(address)
                if self._quietly:
                    continue
                logger.warning("CACHE_BOOTSTRAP_PEERS: nothing is known of %s; it is asked for again", address)
        self._found, self._until = found, time.monotonic() + (5.0 if self._unknown else RESOLVED_SECONDS)
        return found

    def withdraw(self) -> None: ...


def resolve(address: str, peer_id: str) -> list[str]:
    """The TCP addresses by number that a multiaddr stands for; none if its name is not known. Takes seconds at most.

    ``/dns4``, ``/dns6`` and ``/dns`` are names of hosts; ``/dnsaddr`` is one whose TXT records hold multiaddrs, of
    which those that end in ``peer_id`` count (libp2p's addressing specification).
    """
    found: list[str] = []
    asked = [address]
    for one in asked:
        kind, name, rest = [*one[1:].split("/", 2), "", ""][:3]
        if kind in ("ip4", "ip6"):
            found.append(one)
        elif kind in ("dns", "dns4", "dns6") and rest.startswith("tcp/"):
            found += [multiaddr(ip, rest.removeprefix("tcp/")) for ip in _host(name, kind)]
        elif kind == "dnsaddr":
            for told in _dnsaddr(name):
                at, _, whose = told.partition("/p2p/")
                usable = at.startswith("/dnsaddr/") or ("/tcp/" in at and at.count("/") == 4)
                if usable and (not peer_id or whose == peer_id) and len(asked) < MAX_NAMES:
                    asked.append(at)
    return list(dict.fromkeys(found))


def _host(name: str, kind: str) -> list[str]:
    family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(kind, socket.AF_UNSPEC)
    try:
        return [str(known[4][0]) for known in socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []


def _dnsaddr(name: str) -> list[str]:
    import dns.exception
    import dns.resolver

    try:
        answer = dns.resolver.resolve(f"_dnsaddr.{name}", "TXT", lifetime=DNS_SECONDS)
    except (dns.exception.DNSException, OSError):
        return []
    texts = [b"".join(record.strings).decode("utf-8", "replace") for record in answer]
    return [text.removeprefix("dnsaddr=") for text in texts if text.startswith("dnsaddr=/")][:64]


def _parse(text: str, quietly: bool) -> tuple[str, bytes] | None:
    try:
        return parse_peer(text)
    except ValueError:
        logger.log(
            logging.DEBUG if quietly else logging.WARNING,
            "CACHE_BOOTSTRAP_PEERS: %r is not the address of a peer, as /ip4/10.0.0.1/tcp/9100/p2p/Qm…, the same "
            "without its peer ID, or /dnsaddr/example.com/p2p/Qm…: left out",
            text,
        )
        return None

"""Multiaddrs: where TCP reaches a node, and who it is there (libp2p's addressing specification)."""

from __future__ import annotations

import ipaddress
import re

MAX_ADDRESSES = 16  # of one peer that are told, or kept
_TCP = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([A-Za-z0-9.:_%-]+)/tcp/([0-9]{1,5})(?:/(?!p2p/)[A-Za-z0-9.:_%-]+)*")
_DNSADDR = re.compile(r"/dnsaddr/[A-Za-z0-9._-]+")


def multiaddr(ip: str, port: int | str) -> str:
    """That of a TCP port."""
    return f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}"


def is_tcp(text: str) -> bool:
    """Whether ``text`` is a multiaddr at which TCP reaches a node, without its peer ID."""
    match = _TCP.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:
        return False
    try:
        return match[1].startswith("dns") or ipaddress.ip_address(match[2]).version == int(match[1][2])
    except ValueError:
        return False


def is_loopback(address: str) -> bool:
    """Whether a multiaddr leads to the machine that dials it."""
    return address.startswith(("/ip4/127.", "/ip6/::1/"))


def peer_id_of(text: str) -> bytes:
    """The bytes of a peer ID, the base58 of a multihash. Raises ValueError for what is none."""
    import base58  # there where libp2p is

    peer_id: bytes = base58.b58decode(text)
    if len(peer_id) not in (34, 38, 39):
        raise ValueError(f"{text!r} is not a peer ID, as 12D3KooW… or Qm…")
    return peer_id


def parse_peer(text: str) -> tuple[str, bytes]:
    """The address of a peer, and its peer ID, b"" if it is not named; of a ``/dnsaddr`` it has to be.

    Raises ValueError for what is no address of a peer.
    """
    address, named, peer_id = text.partition("/p2p/")
    if not is_tcp(address) and not (named and _DNSADDR.fullmatch(address)):
        raise ValueError(f"{text!r} is not the address of a peer")
    return address, peer_id_of(peer_id) if named else b""

"""Hosts that are another one on each machine, and what tells this machine from others."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import uuid
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

# Beside these any name without a dot: it has its meaning where it is used.
_NAMES = (".localhost", ".local", ".localdomain", "host.docker.internal", "metadata.google.internal")
_METADATA = ("100.100.100.200", "fd00:ec2::254")  # of clouds whose address for it is not link-local


def place(url: str) -> bytes:
    """Where the host of a URL is the same one: b"" for everywhere, else the name of this machine."""
    return _place(url.partition("://")[2].partition("/")[0])


def is_local(url: str) -> bool:
    """Whether the host of a URL is another one on each machine: loopback, link-local, a name without a dot."""
    return bool(place(url))


def proof_of_place(who: bytes, to: bytes) -> str:
    """What shows peer ``to`` that peer ``who`` is on its machine; it is of no use to who copies it."""
    return hmac.digest(_machine(), who + b" " + to, "sha256").hex()


def proves_place(proof: str, who: bytes, to: bytes) -> bool:
    """Whether it shows that peer ``who`` is on the machine of peer ``to``, which is this one."""
    return hmac.compare_digest(proof.encode("utf-8", "replace"), proof_of_place(who, to).encode())


@lru_cache(maxsize=1024)
def _place(authority: str) -> bytes:
    try:
        host = (urlsplit(f"//{authority}").hostname or "").partition("%")[0].rstrip(".")
        address = ipaddress.ip_address(host if ":" in host else socket.inet_aton(host))  # also 127.1
        address = getattr(address, "ipv4_mapped", None) or address
        local = address.is_loopback or address.is_link_local or address.is_unspecified or str(address) in _METADATA
    except OSError:  # it is a name
        local = "." not in host or host.endswith(_NAMES)
    except ValueError:
        return b""
    return _machine() if local else b""


@lru_cache
def _machine() -> bytes:
    """On Linux its boot, and the network that the process is in: a container's is its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')} ".encode()
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()} ".encode()

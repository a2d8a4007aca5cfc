"""A directory in which each node leaves its addresses: on one host, or on a file system that hosts share.

One file per peer, ``<fleet's label>-<digest of the peer ID>.peer`` (mode 0600), written whole and renamed into place::

    nonce | AES-256-GCM( msgpack(Record) ) | tag

Only the fleet can read it. It is written anew as a heartbeat, counts for ``CACHE_PEER_TTL`` seconds, and is removed at
a clean end; who finds one of the own fleet that is older removes it. What others leave there is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import time
from pathlib import Path

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.multiaddrs import MAX_ADDRESSES
from httpx_p2pcache.node.discovery import Record, Sighting

MAX_RECORD = 8192  # bytes; a larger file is not one of ours
MAX_PEERS = 1000
PLACE = b"registry"
MAX_DIFFERENCE = 7200.0  # seconds between the clocks of two hosts


class Registry:
    """The registry directory of one fleet. Not ``announces``: it is looked at, and nothing is left there."""

    pause = 0.0

    def __init__(self, directory: Path, keyring: Keyring, ttl: float, *, announces: bool = True) -> None:
        self._announces = announces
        self._directory = directory
        self._keyring = keyring
        self._ttl = ttl
        self._ours: Path | None = None
        self._announced: tuple[bytes, list[str]] | None = None
        self._written = 0.0
        self._ahead = 0.0  # the file system's clock, before ours
        self._known: dict[str, tuple[float, Record | None]] = {}

    def announce(self, peer_id: bytes, addresses: list[str]) -> None:
        if self._announces:
            self._announced = peer_id, addresses
            self._write(time.time())

    def find(self) -> list[Sighting]:
        now = time.time()
        if self._announced and now - self._written > min(self._ttl / 4, 60.0):
            self._write(now)
        host, found = socket.gethostname(), []
        try:
            entries = [e for e in os.scandir(self._directory) if e.name.startswith(f"{self._keyring.label}-")]
        except FileNotFoundError:
            return []
        for entry in entries[:MAX_PEERS]:
            record = self._read(entry)
            if record is None:
                continue
            if self._is_old(entry, now):
                if self._ours is not None:  # else we do not know the file system's clock
                    with contextlib.suppress(OSError):  # it may be another user's
                        Path(entry.path).unlink()
                continue
            if not abs(now - record.written) <= self._ttl + MAX_DIFFERENCE:  # or our own clock is wrong
                continue
            found.append(record.sighting(host, "registry"))
        return found

    def _is_old(self, entry: os.DirEntry[str], now: float) -> bool:
        """By the file system's clock, which those who share it have in common, and who has written there knows."""
        try:
            age = now + self._ahead - entry.stat(follow_symlinks=False).st_mtime
        except OSError:
            return False
        return age > self._ttl

    def withdraw(self) -> None:
        if self._ours is not None:
            self._ours.unlink(missing_ok=True)
            self._announced = None

    def _write(self, now: float) -> None:
        assert self._announced is not None
        peer_id, addresses = self._announced
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        record = Record(peer_id, addresses[:MAX_ADDRESSES], socket.gethostname(), now)
        name = f"{self._keyring.label}-{hashlib.sha256(peer_id).hexdigest()[:16]}.peer"
        temporary = self._directory / f".{name}.{secrets.token_hex(8)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(record.seal(self._keyring, PLACE))
        self._ours = self._directory / name
        temporary.replace(self._ours)
        self._written = now
        self._ahead = self._ours.stat().st_mtime - time.time()

    def _read(self, entry: os.DirEntry[str]) -> Record | None:
        """The record of a file, read again only when it has changed; None for a half, foreign or false one.

        Any other process may remove the file at any moment.
        """
        try:
            status = entry.stat(follow_symlinks=False)
            known = self._known.get(entry.name)
            if known is not None and known[0] == status.st_mtime:
                return known[1]
            record = None
            if entry.is_file(follow_symlinks=False) and status.st_size <= MAX_RECORD:
                with contextlib.suppress(Rejected):
                    record = Record.open(Path(entry.path).read_bytes(), self._keyring, PLACE)
        except OSError:
            return None
        self._known[entry.name] = status.st_mtime, record
        return record

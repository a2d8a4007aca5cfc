"""A port that nobody else listens on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import AsyncIterator

import trio

PORTS_TRIED = 100  # after the one asked for; then any


def free_port(address: str, port: int) -> int:
    """``port`` if nobody listens on it, else the next free one.

    py-libp2p listens with SO_REUSEPORT, so that two hosts of one user share a port without any error: we look first.
    """
    if port == 0:
        return 0
    for candidate in range(port, min(port + PORTS_TRIED, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT is not in the way
            try:
                probe.bind((address, candidate))
                probe.listen(1)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
            else:
                return candidate
    return 0


@contextlib.asynccontextmanager
async def port_lock() -> AsyncIterator[None]:
    """One process of this user at a time looks for a port and takes it: only those could share one by mistake.

    Who cannot have the lock within a second goes on without: then two that start at once may meet, and nothing else.
    """
    try:
        import fcntl

        path = os.path.join(tempfile.gettempdir(), f"p2pcache-port-{os.getuid()}.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except (ImportError, OSError):
        yield
        return
    try:
        for _ in range(100):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                await trio.sleep(0.01)
        yield
    finally:
        os.close(descriptor)

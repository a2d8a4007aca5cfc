"""What a node's key is made of, which outlives the node."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import uuid
from pathlib import Path


def kept_seed(directory: Path | None) -> tuple[int | None, bytes]:
    """The 32 bytes that a node's key is made of, and the descriptor of the lock on them while they are in use.

    They stay the same for one directory on one machine, so that a hub keeps its address. Of two nodes at a time the
    second is another; and so is one on another machine, to which the directory was copied.
    """
    if directory is None:
        return None, secrets.token_bytes(32)
    descriptor = None
    try:
        import fcntl

        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(directory / "node.key", flags, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kept = os.read(descriptor, 33)
        if len(kept) != 32:
            kept = secrets.token_bytes(32)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, kept, 0)
        machine = f"{socket.gethostname()} {uuid.getnode()}"
        return descriptor, hmac.digest(kept, machine.encode(), "sha256")
    except (ImportError, OSError):
        if descriptor is not None:
            os.close(descriptor)
        return None, secrets.token_bytes(32)

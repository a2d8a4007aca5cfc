"""Where a runner's daemon is found: two Unix sockets in ``CACHE_DIR`` that only its owner can open."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import struct
import tempfile
from pathlib import Path

LONGEST = 100  # bytes of a socket's path: the system's limit is 108, on macOS 104


def node_socket(directory: Path) -> Path:
    """The socket on which processes of this package reach the daemon's node."""
    return _socket_path(directory, "node.sock")


def door_socket(directory: Path) -> Path:
    """The socket on which any HTTP client reaches the cache."""
    return _socket_path(directory, "p2pcache.sock")


def _socket_path(directory: Path, name: str) -> Path:
    """``name`` in ``directory``, or where that is too long for a socket in a directory of this user's own."""
    path = directory.absolute() / name
    if len(os.fsencode(path)) <= LONGEST:
        return path
    digest = hashlib.sha256(os.fsencode(directory.absolute())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"p2pcache-{os.getuid()}" / f"{digest}-{name}"


def ours(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user (where the system says so: Linux)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid == os.getuid()


def open_to_us_alone(directory: Path) -> None:
    """Make a directory for sockets if there is none. Raises OSError for one in which others could put theirs."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} is not a directory that only this user can write: set CACHE_DIR")


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path`` with mode 0600, in the place of one that a dead process has left.

    The caller holds the daemon's lock, so nobody else listens there. Raises OSError.
    """
    open_to_us_alone(path.parent)
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(f"{path} exists, and is no socket")
        path.unlink()
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    listener.listen(256)
    return listener


def connect(path: Path, timeout: float) -> socket.socket:
    """A connection to the socket at ``path`` of a process of this user. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(os.fspath(path))
        if not ours(connection):
            raise PermissionError(f"{path} belongs to another user")
    except BaseException:
        connection.close()
        raise
    return connection

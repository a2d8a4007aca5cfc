"""Files in ``CACHE_DIR``: this user's alone, and never somebody else's by way of a link."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from pathlib import Path

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
SECRET_BYTES = 32


def private_directory(directory: Path) -> None:
    """Make ``directory`` if there is none; an empty one of ours becomes its owner's alone. Raises OSError.

    One that holds something already may be meant for others to read, as our files in it are private; but whoever can
    write there could put others in their place. One that all share (with the sticky bit, as /tmp) is left as it is.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.getuid() or mode & stat.S_ISVTX or not mode & stat.S_IWUSR:
        return
    with contextlib.suppress(OSError):  # not every file system has modes
        wanted = mode & ~0o022 if any(directory.iterdir()) else 0o700
        if mode & 0o077 and mode != wanted:
            directory.chmod(wanted)


def private_file(path: Path) -> Path:
    """Make an empty file with mode 0600 if there is none; returns ``path``. Raises OSError for one that is no file.

    A file that is there is not opened: SQLite's locks on it end when this process closes any descriptor of it.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "it is no file", os.fspath(path))
    except FileNotFoundError:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | NOFOLLOW, 0o600))
    return path


def local_secret(directory: Path) -> bytes:
    """32 random bytes that this runner keeps for itself, for identities where there is no fleet's secret."""
    path = directory / "local.key"
    temporary = directory / f".local.key.{os.getpid()}.{threading.get_ident()}"
    made = secrets.token_bytes(SECRET_BYTES)
    try:
        private_directory(directory)
        found = _read(path)
        if found is not None and len(found) == SECRET_BYTES:
            return found
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(made)
            if found is None:
                os.link(temporary, path)  # of several that begin at once, the first
            else:
                temporary.replace(path)  # it was cut short, as a full disk leaves it
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
        found = _read(path)
        if found is not None and len(found) == SECRET_BYTES:
            return found
    except OSError:
        pass
    return made  # a store in memory needs no more than a process's own


def _read(path: Path) -> bytes | None:
    """What is in a file; None if there is none. Raises OSError for what is no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no file", os.fspath(path))
        return file.read(SECRET_BYTES + 1)

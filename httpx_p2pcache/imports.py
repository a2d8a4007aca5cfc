"""Importing in a thread of our own: while the caller may be about to import the same, or to fork."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from importlib import import_module

IMPORT_SECONDS = (
    15.0  # what who forks, or a process that ends at once, may have to wait for; two, if the machine is not busy
)


def import_trio() -> None:
    """Import trio, in the order in which no other thread's import of it breaks off. Raises ImportError.

    Who imports ``trio.from_thread`` first, as anyio's backend does, has the lock of that before trio's own; who imports
    ``trio`` has trio's first, and wants the other in its middle. Of two that meet so Python lets one fail, and the
    other with it (``KeyError: 'trio'``). So: like anyio, unless somebody has begun, for whom we wait.
    """
    import_module("trio" if "trio" in sys.modules else "trio.from_thread")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A thread imports: who forks waits for that, as in the child nobody would let go of the modules' locks."""
    ours = threading.Lock()
    with _beginning:
        ours.acquire()
        _under_way.append(ours)
    try:
        yield
    finally:
        ours.release()
        with contextlib.suppress(ValueError):  # this is the child
            _under_way.remove(ours)


_beginning = threading.Lock()
_under_way: list[threading.Lock] = []


def _before_fork() -> None:
    _beginning.acquire()
    for one in list(_under_way):
        if one.acquire(timeout=IMPORT_SECONDS):
            one.release()


def _in_child() -> None:
    _under_way.clear()
    _beginning.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_beginning.release, after_in_child=_in_child)

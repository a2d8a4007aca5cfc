"""Importing trio in a thread of our own, while the caller may be about to do so as well."""

from __future__ import annotations

import sys
from importlib import import_module


def import_trio() -> None:
    """Import trio, in the order in which no other thread's import of it breaks off. Raises ImportError.

    Who imports ``trio.from_thread`` first, as anyio's backend does, has the lock of that before trio's own; who imports
    ``trio`` has trio's first, and wants the other in its middle. Of two that meet so Python lets one fail, and the
    other with it (``KeyError: 'trio'``). So: like anyio, unless somebody has begun, for whom we wait.
    """
    import_module("trio" if "trio" in sys.modules else "trio.from_thread")

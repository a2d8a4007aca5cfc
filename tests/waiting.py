"""Waiting for what other threads and processes do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def eventually(predicate: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether ``predicate`` becomes true within ``seconds``."""
    ends = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > ends:
            return False
        threading.Event().wait(0.01)
    return True

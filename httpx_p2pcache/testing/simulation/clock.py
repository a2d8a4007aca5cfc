"""Virtual time: trio's, of which each node has its own opinion."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any
from unittest import mock

import trio

EPOCH = 1_800_000_000.0  # Unix time at which every simulation begins
skew: ContextVar[float] = ContextVar("skew", default=0.0)  # seconds that the clock of a task's node is ahead
_monotonic = time.monotonic


def _elapsed() -> float:
    """The virtual clock; to a thread of somebody else's, which is not simulated, the real one."""
    try:
        return trio.current_time()
    except RuntimeError:
        return _monotonic()


def _now() -> float:
    """Unix time, as the node whose task this is believes it to be."""
    return EPOCH + trio.current_time() + skew.get()


@contextlib.contextmanager
def virtual(seed: int) -> Iterator[None]:
    """Time is trio's, and the order of tasks that could all run is the seed's, as pytest-trio has it for hypothesis."""
    scheduler: Any = importlib.import_module("trio._core._run")
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    try:
        with mock.patch.multiple(time, time=_now, monotonic=_elapsed, perf_counter=_elapsed):
            yield
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = before

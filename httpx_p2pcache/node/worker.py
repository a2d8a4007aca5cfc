"""One thread for what touches the disk, so that the node's loop never waits for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")

STOP_SECONDS = 0.5  # of the two in which a transport closes


class Worker:
    """Runs functions one after another in a daemon thread.

    Not a ThreadPoolExecutor: those are shut down before ``atexit`` is called, when the node still has to take leave.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, func: Callable[[], Result]) -> Future[Result]:
        """A future of ``func()``; cancelled if the worker is stopped before its turn."""
        future: Future[Result] = Future()
        self._jobs.put((func, future))
        return future

    def stop(self) -> None:
        """Finish what is being done, and cancel the rest; waits for that, but not for a disk that hangs."""
        left = []
        try:
            while True:
                left.append(self._jobs.get_nowait())
        except queue.Empty:
            pass
        for job in left:
            if job is not None:
                job[1].cancel()
        self._jobs.put(None)
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            func, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(func())
            except BaseException as exc:
                future.set_exception(exc)

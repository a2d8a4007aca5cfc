"""Shorter ways through py-libp2p, for the streams that live long and carry many small frames.

A turn of trio's scheduler is a system call, and gives the interpreter to whichever other thread wants it: in a process
whose own threads are at work, for up to 5 ms. A frame takes about twenty such turns through py-libp2p 0.8. Most are for
locks that nobody holds, some for reading a length, and then what it is the length of.
"""

from __future__ import annotations

from typing import Any

import trio
from libp2p.stream_muxer.yamux.yamux import Yamux

CHUNK = 16 * 1024  # bytes read at once: what is small comes many at a time
ACKNOWLEDGED_AT_ONCE = 64 * 1024  # bytes: a quarter of a stream's first window


class Lock:
    """A lock whose taking is no turn of the scheduler while nobody holds it. In the place of a lock or a semaphore."""

    def __init__(self) -> None:
        self._free = trio.Semaphore(1)

    async def acquire(self) -> None:
        try:
            self._free.acquire_nowait()
        except trio.WouldBlock:
            await self._free.acquire()

    def release(self) -> None:
        self._free.release()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._free.release()


class Buffered:
    """A stream that is read in chunks, however little is asked for; everything else is as the stream does it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._ahead = memoryview(b"")

    async def read(self, n: int | None = None) -> bytes:
        """At most ``n`` bytes, as soon as there are any; no bytes at the end."""
        if not self._ahead:
            if n is None or n >= CHUNK:
                whole: bytes = await self._inner.read(n)
                return whole
            self._ahead = memoryview(await self._inner.read(CHUNK))
        taken = bytes(self._ahead[:n])
        self._ahead = self._ahead[len(taken) :]
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Muxer(Yamux):  # type: ignore[misc] # py-libp2p is not typed for mypy
    """Yamux with these locks."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._write_lock: Any = Lock()
        self.streams_lock: Any = Lock()


def shorten_connection(raw: Any) -> None:
    """A new connection that nothing has been read from yet."""
    for name in ("read_lock", "write_lock"):
        setattr(raw.stream, name, Lock())
    raw.stream = Buffered(raw.stream)


def shorten_stream(stream: Any) -> Buffered:
    """A new stream of ours. No task is inside its locks: none waits for anything while it holds one."""
    muxed = stream.muxed_stream
    stream._state_lock = Lock()
    muxed.window_lock = Lock()
    muxed.rw_lock._writer_lock = Lock()
    _acknowledge_seldom(muxed)
    return Buffered(stream)


def _acknowledge_seldom(muxed: Any) -> None:
    """Every read writes a frame of its own that gives the window back, before it returns: here one for many reads."""
    acknowledge, read = muxed._auto_tune_and_send_window_update, 0

    async def seldom(*, bytes_read: int = 0) -> None:
        nonlocal read
        read += bytes_read
        if read >= ACKNOWLEDGED_AT_ONCE:
            due, read = read, 0
            await acknowledge(bytes_read=due)

    muxed._auto_tune_and_send_window_update = seldom

"""Shorter ways through py-libp2p, for the streams that live long and carry many small frames.

A turn of trio's scheduler is a system call, and gives the interpreter to whichever other thread wants it: in a process
whose own threads are at work, for up to 5 ms. A frame takes about twenty such turns through py-libp2p 0.8: for locks
that nobody holds, for reading a length and then what it is the length of, and after each write. A writer that has used
up its window looks every 10 ms whether there is more. Here data and window updates, the two frames that are not rare,
go straight from and to the connection; all other frames, a stream's states and its end are py-libp2p's. What can be
written, or taken as it comes, without waiting for anybody takes no turn at all (:meth:`Stream.write_at_once`,
:meth:`Stream.listen`).

What goes over the wire is the same: Noise, and Yamux (https://github.com/hashicorp/yamux/blob/master/spec.md).
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    FLAG_SYN,
    HEADER_SIZE,
    TYPE_DATA,
    TYPE_GO_AWAY,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
    Yamux,
)

logger = logging.getLogger("httpx_p2pcache")

CHUNK = 64 * 1024  # bytes read at once: what is small comes many at a time
ACKNOWLEDGED_AT_ONCE = 64 * 1024  # bytes: a quarter of a stream's first window
MAX_PAYLOAD = 65535 - 16 - HEADER_SIZE  # bytes of a frame that fills one message of Noise
LOOK_SECONDS = 0.05  # between two looks whether a window has been widened in a way that wakes nobody, or a stream ended
MAX_OPENED = 64  # streams that a peer may open on a connection, and one more each second
LAST_WORDS_SECONDS = 0.5  # in which all streams are read to their end when the peer ends the connection
_HEADER = struct.Struct(YAMUX_HEADER_FORMAT)


class Lock:
    """A lock whose taking is no turn of the scheduler while nobody holds it. In the place of a lock or a semaphore."""

    def __init__(self) -> None:
        self._free = trio.Semaphore(1)

    def free(self) -> bool:
        return self._free.value > 0

    def acquire_at_once(self) -> bool:
        try:
            self._free.acquire_nowait()
        except trio.WouldBlock:
            return False
        return True

    async def acquire(self) -> None:
        if not self.acquire_at_once():
            await self._free.acquire()

    def release(self) -> None:
        self._free.release()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._free.release()


class Direct:
    """A TCP stream that is read in chunks, however little is asked for, and written without waiting where it can be."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._token = trio.lowlevel.current_trio_token()
        self._ahead = memoryview(b"")
        self._writing = Lock()

    async def read(self, n: int | None = None) -> bytes:
        """At most ``n`` bytes, as soon as there are any; no bytes at the end."""
        if not self._ahead:
            if n is None or n >= CHUNK:
                whole: bytes = await self._inner.read(n)
                return whole
            self._ahead = memoryview(await self._chunk())
        return self._taken_ahead(n)

    async def _chunk(self) -> bytes:
        try:
            while (descriptor := self._descriptor()) >= 0:
                # trio looks first whether there is anything: seldom, as all that there was has just been read.
                await trio.lowlevel.wait_readable(descriptor)
                if self._descriptor() != descriptor:  # closed in the same turn: by now it may be another file's
                    break
                with contextlib.suppress(BlockingIOError):
                    return os.read(descriptor, CHUNK)
        except OSError as exc:
            raise ConnectionClosedError(f"the connection has broken: {exc.strerror}") from exc
        except trio.ClosedResourceError:
            pass
        chunk: bytes = await self._inner.read(CHUNK)
        return chunk

    async def message(self) -> bytes:
        """The next message that has its length, of 16 bits, in front of it; none where the stream ends or breaks."""
        length = int.from_bytes(await self._exactly(2), "big")
        return await self._exactly(length) if length else b""

    async def _exactly(self, n: int) -> bytes:
        if len(self._ahead) >= n:
            return self._taken_ahead(n)
        taken = part = await self.read(n)
        while part and len(taken) < n:
            part = await self.read(n - len(taken))
            taken += part
        return taken if part else b""

    def _taken_ahead(self, n: int | None) -> bytes:
        taken = bytes(self._ahead[:n])
        self._ahead = self._ahead[len(taken) :]
        return taken

    async def write(self, data: bytes) -> None:
        """All of ``data``; no turn of the scheduler if the kernel takes it at once."""
        async with self._writing:
            sent = self._taken(data)
            if sent < len(data):
                await self._inner.write(data[sent:])

    def free(self) -> bool:
        """Whether nobody is writing."""
        return self._writing.free()

    def write_at_once(self, data: bytes) -> None:
        """The same, while it is :meth:`free`, for one who does not wait: what the kernel does not take is written on.

        If that fails, who reads hears of it.
        """
        self._writing.acquire_at_once()
        sent = self._taken(data)
        if sent < len(data):
            self.soon(self._write_on, data[sent:])
        else:
            self._writing.release()

    def soon(self, func: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Have the loop do it, from whichever thread."""

        def begin() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is about to end
                trio.lowlevel.spawn_system_task(func, *arguments)

        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(begin)

    async def _write_on(self, rest: bytes) -> None:
        try:
            await self._inner.write(rest)
        except Exception as exc:
            logger.debug("a connection has broken: %r", exc)
        finally:
            self._writing.release()

    def _taken(self, data: bytes) -> int:
        """How many bytes of ``data`` the kernel has taken."""
        if (descriptor := self._descriptor()) >= 0:
            with contextlib.suppress(OSError):  # it is full, or broken
                return os.write(descriptor, data)
        return 0

    def _descriptor(self) -> int:
        """-1 where it is closed, or is no file."""
        return int(self._inner.stream.socket.fileno()) if os.name == "posix" else -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Muxer(Yamux):  # type: ignore[misc] # py-libp2p is not typed for mypy
    """In the place of a Yamux that has not begun: it sees only the frames that the streams have not got already."""

    def __init__(self, made: Yamux) -> None:
        secured = made.secured_conn
        super().__init__(secured, made.peer_id, is_initiator=made.is_initiator, on_close=made.on_close)
        for name in ("negotiated_muxer_protocol", "negotiated_security_protocol"):
            setattr(self, name, getattr(made, name, None))
        self.secured_conn: Any = Sieve(secured, self)
        self._write_lock: Any = Lock()
        self.streams_lock: Any = Lock()
        self.widened = trio.Event()  # set, and made anew, whenever a peer has widened a stream's window

    async def abandon(self) -> None:
        """End without a word: who waits for the end of the connection is let go, and its socket is closed."""
        self.event_closed.set()
        with trio.CancelScope(shield=True), trio.move_on_after(LAST_WORDS_SECONDS):
            await self.secured_conn.raw.close()

    async def _write_frame(self, data: bytes) -> None:
        if not self.write_at_once(data):
            async with self._write_lock:
                await self.secured_conn.write(data)

    def write_at_once(self, data: bytes) -> bool:
        """Whether a frame that fills no more than one message of Noise could be written without waiting."""
        if len(data) > HEADER_SIZE + MAX_PAYLOAD or not self._write_lock.free():
            return False
        written: bool = self.secured_conn.write_at_once(data)
        return written


class Sieve:
    """A secured connection as Yamux reads it: plain data and window updates of known streams are taken out."""

    def __init__(self, secured: Any, muxer: Muxer) -> None:
        self._secured = secured
        self._muxer = muxer
        self._plain = bytearray()
        self._stream = 0  # whose data is being read ...
        self._left = 0  # ... and how much more of it there is
        self._passed = 0  # bytes of a frame's body that Yamux has still to read
        self.raw: Direct = secured.conn.read_writer.read_write_closer.stream
        self._begun = False
        self._opened, self._since = 0, trio.current_time()  # streams, by the peer

    async def read(self, n: int) -> bytes:
        """At most ``n`` bytes of the next frame that is none of the two: first its header, then what it announces."""
        if self._passed:
            whole = bytearray()  # Yamux gives up on what comes in more than a hundred pieces
            while self._passed and len(whole) < n:
                taken = await self._take(min(n - len(whole), self._passed))
                self._passed -= len(taken)
                whole += taken
            return bytes(whole)
        while True:
            while self._left:
                data = await self._take(self._left)
                self._left -= len(data)
                self._received(data)
            while len(self._plain) < HEADER_SIZE:
                await self._more()
            _, kind, flags, number, length = _HEADER.unpack_from(self._plain)
            stream = self._muxer.streams.get(number)
            window = stream.recv_window if stream is not None else DEFAULT_WINDOW_SIZE if flags & FLAG_SYN else length
            if kind == TYPE_DATA and length > window:
                raise ConnectionClosedError("the peer has sent more than it may")
            if flags & FLAG_SYN and number:
                self._opened += 1
                if self._opened > MAX_OPENED + trio.current_time() - self._since:
                    raise ConnectionClosedError("the peer opens streams without end")
            if stream is None or flags or kind not in (TYPE_DATA, TYPE_WINDOW_UPDATE):
                if kind == TYPE_GO_AWAY:
                    await self._all_read()
                await trio.lowlevel.checkpoint()  # what has to be answered is answered in turn with all else
                self._passed = length if kind == TYPE_DATA else 0
                return await self._take(HEADER_SIZE)
            del self._plain[:HEADER_SIZE]
            if kind == TYPE_WINDOW_UPDATE:
                stream.send_window += length
                self._muxer.widened.set()
                self._muxer.widened = trio.Event()
            else:
                self._stream, self._left = number, length

    async def _all_read(self) -> None:
        """What was said before the end of a connection is heard before Yamux throws it away."""
        streams, buffers = self._muxer.streams, self._muxer.stream_buffers
        with trio.move_on_after(LAST_WORDS_SECONDS):
            while any(not one.closed and buffers.get(number) for number, one in streams.items()):  # noqa: ASYNC110 - py-libp2p's streams tell nobody
                await trio.sleep(0.001)

    async def _take(self, n: int) -> bytes:
        """At most ``n`` bytes, as soon as there are any."""
        if not self._plain:
            await self._more()
        taken = bytes(memoryview(self._plain)[:n])
        del self._plain[:n]
        return taken

    async def _more(self) -> None:
        """One more message of Noise; the first time what py-libp2p has left of one."""
        message = await self.raw.message() if self._begun else b""
        self._begun = True
        self._plain += self._secured.conn.decrypt(message) if message else await self._secured.read(None)

    def _received(self, data: bytes) -> None:
        muxer, number = self._muxer, self._stream
        if number in muxer.streams:  # else it has been reset meanwhile
            stream, buffer = muxer.streams[number], muxer.stream_buffers[number]
            stream.recv_window -= len(data)
            listener = getattr(stream, "listener", None)
            if buffer or listener is None or not listener(data):
                buffer += data
                muxer.stream_events[number].set()

    def write_at_once(self, data: bytes) -> bool:
        """Whether that could be done without waiting."""
        if not self.raw.free():
            return False
        try:
            sealed = self._secured.conn.encrypt(data)
            self.raw.write_at_once(len(sealed).to_bytes(2, "big") + sealed)
        except BaseException:  # a signal's handler has raised: nobody knows what was written, and as which message
            self.raw.soon(self._muxer.abandon)
            raise
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._secured, name)


class Stream:
    """A stream of ours over a :class:`Muxer`; everything but reading and writing is as py-libp2p's stream does it."""

    def __init__(self, stream: Any) -> None:
        # No task is inside its locks: none waits for anything while it holds one.
        stream._state_lock = Lock()
        self._inner = stream
        self._muxed = stream.muxed_stream
        self._muxed.window_lock = Lock()
        self._muxed.rw_lock._writer_lock = Lock()
        self._muxer: Muxer = self._muxed.conn
        self._number: int = self._muxed.stream_id
        self._read = 0  # bytes for which the window has not been given back

    async def read(self, n: int) -> bytes:
        """At most ``n`` bytes, as soon as there are any. How a stream ends, py-libp2p says."""
        muxer, muxed, number = self._muxer, self._muxed, self._number
        while not muxer.stream_buffers.get(number):
            if muxed.recv_closed or muxed.closed or number not in muxer.streams or muxer.event_shutting_down.is_set():
                rest: bytes = await self._inner.read(n)
                return rest
            await muxer.stream_events[number].wait()
            if number in muxer.stream_events:
                muxer.stream_events[number] = trio.Event()
        buffer = muxer.stream_buffers[number]
        taken = bytes(memoryview(buffer)[:n])
        del buffer[:n]
        # py-libp2p gives the window back with every read, in a frame of its own: here with one for many reads.
        self._read += len(taken)
        if self._read >= ACKNOWLEDGED_AT_ONCE:
            due, self._read = self._read, 0
            await muxed._auto_tune_and_send_window_update(bytes_read=due)
        return taken

    def listen(self, listener: Callable[[bytes], bool]) -> None:
        """Show data to ``listener`` as it comes, where none waits to be read. It is to be read unless that says true.

        It is called in the turn of the connection's reader, must not wait, and raises nothing.
        """

        def taken(data: bytes) -> bool:
            # The window is given back by who reads.
            if self._read + len(data) >= ACKNOWLEDGED_AT_ONCE or not listener(data):
                return False
            self._read += len(data)
            return True

        self._muxed.listener = taken

    def room(self) -> int:
        """How many bytes can be written without waiting for the peer to read."""
        return 0 if self._muxed.closed else int(self._muxed.send_window)

    def write_at_once(self, data: bytes) -> bool:
        """Whether ``data`` could be written without waiting for anybody: it is little, and nobody else is writing."""
        muxed = self._muxed
        if len(data) > min(muxed.send_window, MAX_PAYLOAD) or muxed.send_closed or muxed.closed:
            return False
        muxed.send_window -= len(data)
        if self._muxer.write_at_once(_HEADER.pack(0, TYPE_DATA, 0, self._number, len(data)) + data):
            return True
        muxed.send_window += len(data)
        return False

    async def write(self, data: bytes) -> None:
        """All of ``data``; waits only for the peer's window, and for the kernel. One task at a time writes."""
        muxer, muxed, at = self._muxer, self._muxed, 0
        while at < len(data):
            if muxed.send_closed or muxed.closed:
                raise MuxedStreamError("the stream is closed for sending")
            size = min(muxed.send_window, MAX_PAYLOAD, len(data) - at)
            if size <= 0:
                with trio.move_on_after(LOOK_SECONDS):
                    await muxer.widened.wait()
                continue
            muxed.send_window -= size
            header = _HEADER.pack(0, TYPE_DATA, 0, self._number, size)
            await muxer._write_frame(header + memoryview(data)[at : at + size])
            at += size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def shorten_connection(raw: Any) -> None:
    """A new connection that nothing has been read from yet."""
    for name in ("read_lock", "write_lock"):
        setattr(raw.stream, name, Lock())
    raw.stream = Direct(raw.stream)

"""Streams over the shorter ways through py-libp2p: two hosts on 127.0.0.1, of which one may be py-libp2p's own."""

from __future__ import annotations

import contextlib
import gc
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("libp2p")

import trio
import trio.lowlevel
import trio.testing
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.yamux.yamux import (
    FLAG_ACK,
    FLAG_FIN,
    FLAG_SYN,
    MAX_WINDOW_SIZE,
    TYPE_DATA,
    TYPE_PING,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
    Yamux,
)
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from multiaddr import Multiaddr

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.network import Question
from httpx_p2pcache.node.host import Host
from httpx_p2pcache.node.link import Link
from httpx_p2pcache.node.protocol import PROTOCOL_ID, Ask, Found, pack
from httpx_p2pcache.node.shortcuts import MAX_OPENED, Direct, Muxer, Sieve, Stream

pytestmark = pytest.mark.p2p

SECONDS = 20.0
WINDOW = 256 * 1024  # bytes, of a stream that has just begun
Serve = Callable[[Any], Awaitable[None]]


async def read(stream: Any, size: int) -> bytes:
    taken = bytearray()
    while len(taken) < size:
        part = await stream.read(min(size - len(taken), 100_000))
        assert part, f"the stream has ended after {len(taken)} of {size} bytes"
        taken += part
    return bytes(taken)


async def echo(stream: Any) -> None:
    """Sends back each piece that it is told the size of."""
    with contextlib.suppress(Exception):
        while head := await stream.read(4):
            head += await read(stream, 4 - len(head)) if len(head) < 4 else b""
            await stream.write(await read(stream, int.from_bytes(head, "big")))


@contextlib.asynccontextmanager
async def plain_host(serve: Serve) -> AsyncIterator[tuple[Any, str]]:
    """py-libp2p as it is."""
    key_pair = create_new_key_pair()
    noise = Transport(key_pair, noise_privkey=create_noise_key_pair().private_key)
    host: Any = new_host(key_pair=key_pair, sec_opt={NOISE: noise}, muxer_opt={TProtocol(YAMUX): Yamux})
    host.set_stream_handler(TProtocol(PROTOCOL_ID), serve)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        try:
            yield host, str(host.get_addrs()[0])
        finally:  # left to itself it leaves its sockets open
            with trio.CancelScope(shield=True):
                for peer_id in list(host.get_network().connections):
                    await host.disconnect(peer_id)


@contextlib.asynccontextmanager
async def pair(serve: Serve, *, ours: str = "both") -> AsyncIterator[tuple[Any, Callable[[], Awaitable[Any]]]]:
    """The host that dials, and how it opens a stream to the one that serves; ``ours``: who takes the shorter ways."""

    async def served(stream: Any, _: ID) -> None:
        await serve(stream)

    async with contextlib.AsyncExitStack() as stack:
        if ours == "dialler":
            there, address = await stack.enter_async_context(plain_host(serve))
            peer_id = there.get_id()
        else:
            listener = Host(served, lambda _: True)
            port = await stack.enter_async_context(listener.listening("127.0.0.1", 0))
            address, peer_id = f"/ip4/127.0.0.1/tcp/{port}", listener.id
        if ours == "listener":
            here, _ = await stack.enter_async_context(plain_host(serve))
            await here.get_network().dial_addr(Multiaddr(address.partition("/p2p/")[0]), peer_id)
            yield here, lambda: here.new_stream(peer_id, [TProtocol(PROTOCOL_ID)])
        else:
            dialler = Host(served, lambda _: True)
            await stack.enter_async_context(dialler.listening("127.0.0.1", 0))
            yield dialler, lambda: dialler.connect([address.partition("/p2p/")[0]], peer_id, SECONDS)
        await (here.disconnect(peer_id) if ours == "listener" else dialler.disconnect(peer_id))


@contextlib.asynccontextmanager
async def linked(
    handle: Callable[[Link, Any], Awaitable[None]], at_once: Callable[[Link, Any], bool]
) -> AsyncIterator[tuple[Link, Link]]:
    """Both ends of a stream as links that are served."""
    there: list[Any] = []
    come = trio.Event()

    async def serve(stream: Any) -> None:
        there.append(stream)
        come.set()
        await trio.sleep_forever()

    async with pair(serve) as (host, connect), trio.open_nursery() as nursery:
        here = await connect()
        await come.wait()
        keyring = Keyring(b"secret", "fleet")
        links = Link(here, host.id, keyring, 700_000), Link(there[0], host.id, keyring, 700_000)
        for link in links:
            nursery.start_soon(link.serve, handle, at_once)
        yield links
        nursery.cancel_scope.cancel()


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def in_time() -> None:
        with trio.fail_after(SECONDS):
            await scene()

    trio.run(in_time)
    gc.collect()  # a socket that was left open is this test's, not the next one's


def test_both_ends_of_a_connection_multiplex_by_the_shorter_ways() -> None:
    async def scene() -> None:
        seen: list[Any] = []

        async def note(stream: Any) -> None:
            seen.append(stream)
            await echo(stream)

        async with pair(note) as (_, connect):
            stream = await connect()
            await stream.write((1).to_bytes(4, "big") + b"x")
            assert await read(stream, 1) == b"x"
            for one in (stream, *seen):
                assert isinstance(one, Stream)
                assert isinstance(one.muxed_conn, Muxer)
                assert isinstance(one.muxed_conn.secured_conn, Sieve)

    play(scene)


@pytest.mark.parametrize("ours", ["both", "dialler", "listener"])
def test_what_is_written_is_read_whatever_its_size(ours: str) -> None:
    """Beside a window, a message of Noise and a frame of Yamux, on three streams at a time."""
    chance = random.Random(ours)
    sizes = [1, 15, 16, 65_490, 65_507, 65_508, 65_519, 65_524, 65_535, 65_536, WINDOW - 4, WINDOW, WINDOW + 1, 900_000]

    async def scene() -> None:
        async with pair(echo, ours=ours) as (_, connect), trio.open_nursery() as nursery:

            async def ask() -> None:
                stream = await connect()
                for size in chance.sample(sizes, len(sizes)):
                    sent = chance.randbytes(size)
                    async with trio.open_nursery() as both:
                        both.start_soon(stream.write, size.to_bytes(4, "big") + sent)
                        assert await read(stream, size) == sent
                await stream.reset()

            for _ in range(3):
                nursery.start_soon(ask)

    play(scene)


def test_two_that_write_much_to_each_other_at_once_both_come_to_an_end() -> None:
    size = 5_000_000

    async def scene() -> None:
        async def write_and_read(stream: Any) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.write, bytes(size))
                assert await read(stream, size) == bytes(size)

        ended = trio.Event()

        async def serve(stream: Any) -> None:
            await write_and_read(stream)
            ended.set()

        async with pair(serve) as (_, connect):
            await write_and_read(await connect())
            await ended.wait()

    play(scene)


@pytest.mark.parametrize("ours", ["both", "dialler", "listener"])
def test_who_does_not_read_is_sent_no_more_than_its_window(ours: str) -> None:
    async def scene() -> None:
        async def sleep(_: Any) -> None:
            await trio.sleep_forever()

        async with pair(sleep, ours=ours) as (_, connect):
            stream = await connect()
            with trio.move_on_after(0.5) as waited:
                await stream.write(bytes(2 * MAX_WINDOW_SIZE))
            assert waited.cancelled_caught
            assert stream.muxed_stream.send_window == 0

    play(scene)


@pytest.mark.parametrize("how", ["reset", "disconnect"])
def test_who_reads_or_waits_for_the_window_hears_of_the_end(how: str) -> None:
    async def scene() -> None:
        there, go = trio.Event(), trio.Event()

        async def serve(stream: Any) -> None:
            there.set()
            await go.wait()
            if how == "reset":
                await stream.reset()
            else:
                await stream.muxed_conn.close()

        async with pair(serve) as (_, connect):
            stream = await connect()
            ended: list[str] = []

            async def expect(name: str, func: Callable[..., Awaitable[Any]], argument: object) -> None:
                with pytest.raises(Exception):  # noqa: B017 - py-libp2p's, of which there are many
                    assert await func(argument)
                ended.append(name)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect, "read", stream.read, 1)
                nursery.start_soon(expect, "write", stream.write, bytes(2 * MAX_WINDOW_SIZE))
                await there.wait()
                go.set()
            assert sorted(ended) == ["read", "write"]

    play(scene)


def test_what_was_sent_before_the_end_of_a_stream_is_read() -> None:
    async def scene() -> None:
        async def serve(stream: Any) -> None:
            await stream.write(b"last words")
            await stream.close()

        async with pair(serve) as (_, connect):
            stream = await connect()
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert await read(stream, 10) == b"last words"
            with pytest.raises(Exception):  # noqa: B017
                assert await stream.read(1)

    play(scene)


def test_last_words_before_the_end_of_a_connection_are_heard() -> None:
    async def scene() -> None:
        async def serve(stream: Any) -> None:
            await stream.read(1)
            await stream.write(b"last words")
            await stream.muxed_conn.close()

        for _ in range(5):
            async with pair(serve) as (_, connect):
                stream = await connect()
                await stream.write(b"x")
                assert await read(stream, 10) == b"last words"

    play(scene)


@pytest.mark.parametrize("flags", [FLAG_ACK, FLAG_FIN, FLAG_SYN])
def test_no_flag_lets_a_peer_send_more_than_the_window(flags: int) -> None:
    async def scene() -> None:
        async def sleep(_: Any) -> None:
            await trio.sleep_forever()

        async with pair(sleep, ours="listener") as (bad, connect):
            muxed = (await connect()).muxed_stream
            (connection,) = bad.get_network().get_connections()
            with contextlib.suppress(Exception):
                for number in range(2 * MAX_WINDOW_SIZE // WINDOW):
                    # As a new stream it may be no longer than the first window.
                    id_, size = (1001 + 2 * number, WINDOW + 1) if flags & FLAG_SYN else (muxed.stream_id, WINDOW)
                    header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, flags, id_, size)
                    await muxed.conn._write_frame(header + bytes(size))
            await connection.muxed_conn.event_closed.wait()

    play(scene)


def test_who_has_to_be_answered_again_and_again_holds_up_nobody_else() -> None:
    """A message of Noise holds five thousand such frames: all else has its turns between them."""

    async def scene() -> None:
        flooded, over = trio.Event(), trio.Event()

        async def serve(stream: Any) -> None:
            flooded.set()
            await stream.read(1)
            over.set()

        async with pair(serve, ours="listener") as (_, connect):
            stream = await connect()
            await flooded.wait()
            flood = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_SYN, 0, 0) * 5000
            turns = 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.muxed_conn._write_frame, flood)
                nursery.start_soon(stream.write, b"x")
                while not over.is_set():
                    await trio.lowlevel.checkpoint()
                    turns += 1
            assert turns > 4000

    play(scene)


def test_who_opens_streams_without_end_is_parted_with() -> None:
    opened = 0

    async def scene() -> None:
        async def serve(stream: Any) -> None:
            nonlocal opened
            opened += 1
            await stream.read(1)

        async with pair(serve, ours="listener") as (_, connect):
            muxed = (await connect()).muxed_conn
            with contextlib.suppress(Exception):
                for id_ in range(1001, 3001, 2):
                    opening = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_WINDOW_UPDATE, FLAG_SYN, id_, 0)
                    await muxed._write_frame(opening)
            await muxed.event_closed.wait()

    play(scene)
    assert opened <= MAX_OPENED + SECONDS


def test_two_members_that_ask_each_other_for_more_than_a_window_are_both_answered() -> None:
    """What is handled at once, in the reader's turn, must not wait for the other's reader."""
    question = Question(key=bytes(32), claim=bytes(16), method="GET", identity="", selecting={})
    count, size = 120, 60_000

    async def scene() -> None:
        async def handle(link: Link, message: Any) -> None:
            await link.send(Found(message.call, bytes(size), 0.0))

        def at_once(link: Link, message: Any) -> bool:
            return isinstance(message, Ask) and link.send_at_once(Found(message.call, bytes(size), 0.0))

        async with linked(handle, at_once) as links:
            answered = []

            async def ask(link: Link) -> None:
                answered.append(await link.call(lambda number: Ask(number, question), SECONDS))

            async with trio.open_nursery() as asking:
                for _ in range(count):
                    for link in links:
                        asking.start_soon(ask, link)
            assert len(answered) == 2 * count
            assert not any(link.closed.is_set() for link in links)

    play(scene)


def test_what_is_written_at_once_arrives_in_order_though_the_kernel_takes_only_some_of_it() -> None:
    pieces = [random.Random(number).randbytes(50_000) for number in range(5)]  # the window holds no more

    async def scene() -> None:
        arrived: list[bytes] = []
        over = trio.Event()

        async def serve(stream: Any) -> None:
            arrived.append(await read(stream, 5 * 50_000 + 3))
            over.set()

        async with pair(serve) as (_, connect):
            stream = await connect()
            raw = stream.muxed_conn.secured_conn.raw
            raw._inner.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
            taken = [stream.write_at_once(piece) for piece in pieces[:2]]
            assert taken == [True, False]  # the rest of the first is being written
            assert not raw.free()
            for piece in pieces[1:]:
                await stream.write(piece)
            while not stream.write_at_once(b"end"):
                await trio.lowlevel.checkpoint()
            await over.wait()
        assert arrived == [b"".join(pieces) + b"end"]

    play(scene)


def test_answers_that_come_by_themselves_give_the_window_back() -> None:
    """They are dealt with where they are read from the connection, and not by who reads the stream."""
    question = Question(key=bytes(32), claim=bytes(16), method="GET", identity="", selecting={})
    count, size = 60, 65_000  # twice what the window is after such a beginning, in frames of one message of Noise

    async def scene() -> None:
        async def handle(link: Link, message: Any) -> None:
            raise AssertionError("it was to be answered at once")

        def at_once(link: Link, message: Any) -> bool:
            return link.send_at_once(Found(message.call, bytes(size), 0.0))

        async with linked(handle, at_once) as (asks, answers):
            for _ in range(count):
                answer = await asks.call(lambda number: Ask(number, question), SECONDS)
                assert isinstance(answer, Found)
                assert answer.sealed == bytes(size)
            assert asks.received == answers.sent == count * len(pack(Found(count, bytes(size), 0.0)))

    play(scene)


def test_who_sends_more_than_the_window_is_cut_off_and_nobody_else_is() -> None:
    async def scene() -> None:
        async def served(stream: Any) -> None:
            if await stream.read(1) == b"h":
                await trio.sleep_forever()
            await stream.write(b"well")

        async with pair(served, ours="listener") as (bad, connect), plain_host(served) as (good, _):
            stream = await connect()
            await stream.write(b"h")
            muxed = stream.muxed_stream
            muxed.send_window = 2 * MAX_WINDOW_SIZE  # by nobody's leave
            (peer_id,) = bad.get_network().connections
            address = bad.get_peerstore().addrs(peer_id)[0]
            with contextlib.suppress(Exception):
                await stream.write(bytes(2 * MAX_WINDOW_SIZE))
            await muxed.conn.event_closed.wait()
            await good.get_network().dial_addr(address, peer_id)
            other = await good.new_stream(peer_id, [TProtocol(PROTOCOL_ID)])
            await other.write(b"x")
            assert await read(other, 4) == b"well"

    play(scene)


def test_a_write_that_is_cancelled_before_it_has_begun_sends_nothing() -> None:
    async def scene() -> None:
        async with pair(echo) as (_, connect):
            stream = await connect()
            with trio.CancelScope() as scope:
                scope.cancel()
                await stream.write((3).to_bytes(4, "big") + b"one")  # nothing in it waits: it is sent
            assert await read(stream, 3) == b"one"

    play(scene)


@contextlib.asynccontextmanager
async def read_directly() -> AsyncIterator[tuple[Direct, socket.socket]]:
    """A TCP connection's end as our connections read it, and its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.setblocking(False)
    direct = Direct(TrioTCPStream(trio.SocketStream(trio.socket.from_stdlib_socket(near))))
    with far:
        yield direct, far
        await direct.close()


def test_who_reads_from_what_is_closed_in_the_same_moment_takes_nothing_from_who_has_its_descriptor_then() -> None:
    async def scene() -> None:
        found, left = [], []

        async def reads(direct: Direct) -> None:
            found.append(await direct.read(2))

        async def closes(direct: Direct, told: socket.socket) -> None:
            await trio.lowlevel.wait_readable(told)
            number = direct._inner.stream.socket.fileno()
            direct._inner.stream.socket.close()
            one, other = socket.socketpair()  # as any thread may begin in this moment
            with one, other, told:
                assert number in (one.fileno(), other.fileno())
                theirs, ours = (one, other) if one.fileno() == number else (other, one)
                ours.send(b"for somebody else")
                await trio.testing.wait_all_tasks_blocked()
                theirs.setblocking(False)
                left.append(theirs.recv(100))

        for _ in range(10):  # who of the two has the first turn is chance
            async with read_directly() as (direct, far), trio.open_nursery() as nursery:
                teller, told = socket.socketpair()
                told.setblocking(False)
                nursery.start_soon(reads, direct)
                nursery.start_soon(closes, direct, told)
                await trio.testing.wait_all_tasks_blocked()
                far.send(b"ab")
                teller.send(b"now")
                teller.close()
        assert set(found) <= {b"", b"ab"}
        assert set(left) == {b"for somebody else"}

    play(scene)


def test_a_connection_that_is_reset_is_told_from_one_that_ends() -> None:
    async def scene() -> None:
        async with read_directly() as (direct, far):
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()
            with pytest.raises(ConnectionClosedError):
                await direct.read(2)
        async with read_directly() as (direct, far):
            far.close()
            assert await direct.read(2) == b""

    play(scene)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_whose_writer_is_interrupted_is_given_up(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        taken = Direct._taken

        def interrupted(self: Direct, data: bytes) -> int:
            if when == "after":
                taken(self, data)
            monkeypatch.undo()
            raise KeyboardInterrupt

        async with pair(echo) as (_, connect):
            stream = await connect()
            monkeypatch.setattr(Direct, "_taken", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stream.write_at_once(b"\0\0\0\1a")
            while not stream._muxer.event_closed.is_set():
                await trio.lowlevel.checkpoint()
            assert not stream.write_at_once(b"\0\0\0\1b")

    play(scene)

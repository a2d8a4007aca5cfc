from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import msgspec
import pytest
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from hypothesis import given
from hypothesis import strategies as st
from made import few, many

pytest.importorskip("trio")

from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.network import Question
from httpx_p2pcache.node import protocol
from httpx_p2pcache.node.protocol import (
    ADMISSION_FRAME,
    ANSWERS,
    VERSION,
    Ask,
    Done,
    Found,
    Granted,
    Hello,
    Introduce,
    Invalidate,
    Inventory,
    Message,
    Nothing,
    Ping,
    Proof,
    Publish,
    Published,
    Push,
    Ready,
    Release,
    Wait,
    admit,
    pack,
    read_frame,
    unpack,
)

KEY, CLAIM, PEER = bytes(range(32)), bytes(16), b"\x12\x20" + bytes(32)
DIALLER, LISTENER, STRANGER = b"the dialler's ID", b"the listener's ID", b"somebody else's ID"
SECRET = bytes(32)

calls = st.integers(0, 2**53)
keys = st.binary(min_size=32, max_size=32)
claims = st.binary(min_size=16, max_size=16)
peers = st.binary(min_size=2, max_size=64)
sealed = st.binary(max_size=200)
seconds = st.floats(0, 31_536_000)
words = st.text(max_size=40)
questions = st.builds(
    Question,
    key=keys,
    claim=claims,
    method=st.sampled_from(["GET", "HEAD"]),
    identity=st.sampled_from(["", "a" * 32]),
    selecting=st.dictionaries(words, words, max_size=4),
    holds=st.binary(max_size=16),
    any_identity=st.booleans(),
)
messages: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        Introduce,
        addresses=st.lists(words, max_size=16),
        place=words,
        members=st.lists(st.tuples(peers, st.lists(words, max_size=2)), max_size=4),
        takes=st.integers(0, 2**50),
    ),
    st.builds(Ready, calls),
    st.builds(Inventory, calls, st.lists(keys, max_size=4), st.lists(st.tuples(claims, calls, seconds), max_size=4)),
    st.builds(Ask, calls, questions, st.booleans()),
    st.builds(Found, calls, sealed, seconds),
    st.builds(Granted, calls, claims, st.integers(0, 2**63 - 1), sealed, seconds),
    st.builds(Wait, calls),
    st.builds(Nothing, calls),
    st.builds(Publish, calls, keys, claims, sealed, seconds),
    st.builds(Published, calls, st.lists(peers, max_size=4), st.booleans()),
    st.builds(Push, keys, claims, sealed, seconds),
    st.builds(Release, claims, st.integers(0, 2**63 - 1), st.sampled_from(Verdict)),
    st.builds(Invalidate, calls, st.lists(keys, max_size=4)),
    st.builds(Done, calls),
    st.builds(Ping, calls),
)


class Bytes:
    """A stream that holds ``left`` to read, ``step`` bytes at a time, and then ends."""

    def __init__(self, left: bytes, step: int = 2**20) -> None:
        self.left = left
        self.step = step

    async def read(self, n: int | None = None) -> bytes:
        size = min(self.step, len(self.left) if n is None else n)
        part, self.left = self.left[:size], self.left[size:]
        return part

    async def write(self, data: bytes) -> None:
        raise AssertionError("nothing is written here")


def result_of(coroutine: Coroutine[Any, Any, bytes]) -> bytes:
    """What a coroutine returns that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return] # a coroutine's return value is not typed here
    raise AssertionError("it waits")


# Frames


@given(messages)
@many
def test_a_message_is_unpacked_as_it_was_packed(message: Message) -> None:
    framed = pack(message)
    assert int.from_bytes(framed[:4], "big") == len(framed) - 4
    assert unpack(framed[4:]) == message


@given(st.lists(messages, max_size=4), st.integers(1, 40))
@few
def test_frames_are_read_one_by_one_however_the_stream_cuts_them(sent: list[Message], step: int) -> None:
    stream = Bytes(b"".join(map(pack, sent)), step)
    assert [unpack(result_of(read_frame(stream, 2**20))) for _ in sent] == sent
    with pytest.raises(EOFError):
        result_of(read_frame(stream, 2**20))


@given(messages, st.data())
@few
def test_a_frame_that_is_cut_off_is_the_end_of_the_stream(message: Message, data: st.DataObject) -> None:
    framed = pack(message)
    stream = Bytes(framed[: data.draw(st.integers(0, len(framed) - 1))])
    with pytest.raises(EOFError):
        result_of(read_frame(stream, 2**20))


@pytest.mark.parametrize(("length", "allowed"), [(0, False), (1, True), (100, True), (101, False), (2**32 - 1, False)])
def test_a_frame_may_be_as_long_as_its_limit_and_is_not_read_when_longer(length: int, allowed: bool) -> None:
    body = bytes(min(length, 200))
    stream = Bytes(length.to_bytes(4, "big") + body)
    if allowed:
        assert result_of(read_frame(stream, 100)) == body
        return
    with pytest.raises(Rejected):
        result_of(read_frame(stream, 100))
    assert stream.left == body


def test_a_frame_that_comes_in_many_pieces_is_read_whole() -> None:
    found = Found(1, bytes(8 * 2**20), 0.0)
    assert unpack(result_of(read_frame(Bytes(pack(found), 4096), 9 * 2**20))) == found


@given(st.binary(max_size=60))
@many
def test_noise_is_rejected_or_a_message_and_nothing_else(noise: bytes) -> None:
    try:
        assert isinstance(unpack(noise), msgspec.Struct)
    except Rejected:
        pass


@given(messages, st.data())
@many
def test_a_damaged_message_is_rejected_or_another_message(message: Message, data: st.DataObject) -> None:
    body = bytearray(pack(message)[4:])
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(unpack(bytes(body)), msgspec.Struct)
    except Rejected:
        pass


@pytest.mark.parametrize("frame", [Hello(VERSION, bytes(32)), Proof(bytes(32))])
def test_admission_is_over_once_messages_are_exchanged(frame: Any) -> None:
    with pytest.raises(Rejected):
        unpack(pack(frame)[4:])


QUESTION = Question(key=KEY, claim=CLAIM, method="GET", identity="", selecting={})


@pytest.mark.parametrize(
    "frame",
    [
        Ready(-1),
        Ready(2**53 + 1),
        Ready("1"),  # type: ignore[arg-type] # wrong on purpose, as in what follows
        Introduce(["x"] * 17, "", [], 1, False),
        Introduce(["x" * 257], "", [], 1, False),
        Introduce([], "x" * 257, [], 1, False),
        Introduce([], "", [(b"x", [])], 1, False),
        Introduce([], "", [(PEER, [])] * 1001, 1, False),
        Introduce([], "", [], -1, False),
        Inventory(1, [KEY] * 1001, []),
        Inventory(1, [KEY[:-1]], []),
        Inventory(1, [], [(CLAIM, 1, -1.0)]),
        Inventory(1, [], [(CLAIM + b"x", 1, 1.0)]),
        Found(1, b"", -0.1),
        Found(1, b"", math.nan),
        Found(1, b"", math.inf),
        Found(1, b"", 31_536_001.0),
        Publish(1, KEY[:-1], CLAIM, b"", 0.0),
        Published(1, [PEER] * 1001, True),
        Push(KEY + b"x", CLAIM, b"", 0.0),
        Release(CLAIM, 1, 5),  # type: ignore[arg-type]
        Invalidate(1, [KEY] * 101),
        Ask(1, msgspec.structs.replace(QUESTION, method="x" * 17)),
        Ask(1, msgspec.structs.replace(QUESTION, identity="x" * 65)),
        Ask(1, msgspec.structs.replace(QUESTION, holds=bytes(17))),
        Ask(1, msgspec.structs.replace(QUESTION, claim=b"")),
    ],
    ids=lambda frame: repr(frame)[:50],
)
def test_a_message_with_an_impossible_part_is_rejected(frame: Any) -> None:
    with pytest.raises(Rejected):
        unpack(pack(frame)[4:])


@pytest.mark.parametrize(
    "body",
    [b"", b"\x90", b"\xc1", b"[]", b"\x91\xa7unknown", pack(Ping(1))[4:] + b"\x00", b"\x91" * 100_000 + b"\x90"],
    ids=["empty", "no-kind", "reserved", "json", "unknown", "longer", "nested"],
)
def test_what_is_no_message_is_rejected(body: bytes) -> None:
    with pytest.raises(Rejected):
        unpack(body)


def test_every_answer_bears_the_number_of_its_call() -> None:
    assert all("call" in answer.__struct_fields__ for answer in ANSWERS)


# Admission


class End:
    """One end of a stream in memory; ``sent`` is all that was written into it."""

    def __init__(self, inbox: MemoryObjectReceiveStream[bytes], outbox: MemoryObjectSendStream[bytes]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._left = b""
        self.sent = b""

    async def read(self, n: int | None = None) -> bytes:
        if not self._left:
            try:
                self._left = await self._inbox.receive()
            except anyio.EndOfStream:
                return b""
        size = len(self._left) if n is None else n
        part, self._left = self._left[:size], self._left[size:]
        return part

    async def write(self, data: bytes) -> None:
        self.sent += data
        with contextlib.suppress(anyio.BrokenResourceError):  # the other has hung up: it will be noticed in reading
            await self._outbox.send(data)

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()


def pipe() -> tuple[End, End]:
    there_out, there_in = anyio.create_memory_object_stream[bytes](100)
    back_out, back_in = anyio.create_memory_object_stream[bytes](100)
    return End(back_in, there_out), End(there_in, back_out)


Attempt = Callable[[End], Coroutine[Any, Any, None]]


def dials(key: bytes = SECRET, dialler: bytes = DIALLER, listener: bytes = LISTENER, nonce: bytes = b"") -> Attempt:
    nonce = nonce or secrets.token_bytes(32)
    return lambda end: admit(end, (key,), dialler=dialler, listener=listener, dialled=True, nonce=nonce)


def listens(key: bytes = SECRET, dialler: bytes = DIALLER, listener: bytes = LISTENER, nonce: bytes = b"") -> Attempt:
    nonce = nonce or secrets.token_bytes(32)
    return lambda end: admit(end, (key,), dialler=dialler, listener=listener, dialled=False, nonce=nonce)


def says(*frames: bytes) -> Attempt:
    """A stranger that says what it was told to, and waits for the other to hang up."""

    async def speak(end: End) -> None:
        for frame in frames:
            await end.write(frame)
        while await end.read(1000):
            pass

    return speak


async def meet(one: Attempt, other: Attempt) -> tuple[list[object], list[End]]:
    """How it went for each: None, or the type of the error; who has done hangs up."""
    ends = pipe()
    went: list[object] = [None, None]

    async def attempt(number: int, side: Attempt) -> None:
        try:
            await side(ends[number])
        except (Rejected, EOFError) as exc:
            went[number] = type(exc)
        finally:
            ends[number].close()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(attempt, 0, one)
            tasks.start_soon(attempt, 1, other)
    return went, list(ends)


@pytest.mark.anyio
async def test_two_who_hold_the_secret_admit_each_other() -> None:
    went, ends = await meet(dials(), listens())
    assert went == [None, None]
    assert all(len(end.sent) <= 2 * (4 + ADMISSION_FRAME) for end in ends)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dials(key=b"x" * 32), listens()),
        (dials(), listens(key=b"x" * 32)),
        (dials(dialler=STRANGER), listens()),
        (dials(), listens(dialler=STRANGER)),
        (dials(listener=STRANGER), listens()),
        (dials(dialler=DIALLER + b"x", listener=LISTENER), listens(dialler=DIALLER, listener=b"x" + LISTENER)),
        (dials(dialler=b"ab", listener=b"cd"), listens(dialler=b"abc", listener=b"d")),
        (dials(dialler=LISTENER, listener=DIALLER), listens()),
    ],
    ids=["their-key", "our-key", "their-id", "our-id", "listener", "shifted", "moved", "swapped"],
)
async def test_without_the_secret_or_between_other_peers_nobody_is_admitted(one: Attempt, other: Attempt) -> None:
    went, ends = await meet(one, other)
    assert went[1] is Rejected
    assert went[0] in (Rejected, EOFError)
    assert len(ends[1].sent) == len(pack(Hello(VERSION, bytes(32)))), "a stranger learns nothing but a nonce"


@pytest.mark.anyio
async def test_two_who_dial_each_other_at_once_on_one_stream_are_not_admitted() -> None:
    went, _ = await meet(dials(), dials(dialler=LISTENER, listener=DIALLER))
    assert None not in went
    went, _ = await meet(dials(), dials())
    assert None not in went


def echo() -> Attempt:
    async def repeat(end: End) -> None:
        while heard := await end.read(1000):
            await end.write(heard)

    return repeat


@pytest.mark.anyio
async def test_a_mirror_is_not_admitted() -> None:
    went, _ = await meet(dials(), echo())
    assert went[0] is Rejected


@pytest.mark.anyio
async def test_a_proof_that_was_overheard_is_of_no_use_later() -> None:
    went, ends = await meet(dials(nonce=b"a" * 32), listens(nonce=b"b" * 32))
    assert went == [None, None]
    overheard = ends[0].sent
    went, _ = await meet(says(overheard), listens(nonce=b"c" * 32))
    assert went[1] is Rejected
    went, _ = await meet(says(overheard), listens(nonce=b"b" * 32))
    assert went[1] is None  # what makes a proof fresh is the nonce alone


HELLO = pack(Hello(VERSION, bytes(32)))


@pytest.mark.anyio
@pytest.mark.parametrize(
    "said",
    [
        (pack(Hello(VERSION + 1, bytes(32))),),
        (pack(Hello(VERSION, bytes(31))),),
        (pack(Ping(1)),),
        (pack(Proof(bytes(32))),),
        (HELLO, HELLO),
        (HELLO, pack(Proof(bytes(32)))),
        (HELLO, pack(Proof(b""))),
        (HELLO, pack(Ask(1, QUESTION))),
        ((ADMISSION_FRAME + 1).to_bytes(4, "big"),),
        (HELLO, b"\xff\xff\xff\xff"),
        (bytes(4),),
        (b"GET / HTTP/1.1\r\n\r\n",),
    ],
    ids=[
        *("version", "nonce", "message", "proof-first", "hello-twice", "wrong-proof", "empty-proof", "question"),
        *("too-long", "far-too-long", "empty", "http"),
    ],
)
@pytest.mark.parametrize("side", [listens, dials])
async def test_a_stranger_who_says_anything_else_is_rejected(said: tuple[bytes, ...], side: Any) -> None:
    went, _ = await meet(says(*said), side())
    assert went[1] is Rejected


@pytest.mark.anyio
@pytest.mark.parametrize("said", [b"", HELLO[:-1], HELLO, HELLO + pack(Proof(bytes(32)))[:10]])
async def test_a_stranger_who_hangs_up_is_the_end_of_the_stream(said: bytes) -> None:
    async def leave(end: End) -> None:
        if said:
            await end.write(said)
        raise EOFError

    went, _ = await meet(leave, listens())
    assert went[1] is EOFError


def test_the_protocol_is_named_with_its_version() -> None:
    assert protocol.PROTOCOL_ID.endswith(f"/{VERSION}")

"""What two nodes say to each other: frames, drawn once.

Every frame is a 4-byte big-endian length and that many bytes of msgpack, an array whose first item names its kind::

    length u32 | ["ask", call, question, forwarded]

One stream of protocol :data:`PROTOCOL_ID` joins two members for as long as they are connected; it carries frames both
ways, with many calls in flight. It begins with admission, in which nothing longer than 256 bytes is read::

    dialler                                     listener
    Hello(version, nonce a)            ──────>
                                       <──────  Hello(version, nonce b)
    Proof(mac of "dialler")            ──────>  checked in constant time, else the stream is reset
                                       <──────  Proof(mac of "listener"), checked likewise

    mac(role) = HMAC-SHA256(admission key, role | dialler's peer ID | listener's peer ID | nonce a | nonce b)

Both peer IDs are those that Noise has authenticated: a proof cannot be passed on by somebody in between. While a secret
is being rotated the dialler's proof has a second mac, under the previous secret; the listener answers under the one
that both hold, and what the two send each other is sealed under that one.

After it each side says :class:`Introduce`, and then calls the other; :class:`Ready` is its first call.
``call`` is the caller's number for a call, and an answer bears the number of its call. ``resident`` is for how many
seconds the sender has held what it sends.
"""

from __future__ import annotations

import hmac
from typing import Annotated, Protocol, TypeVar

import msgspec
from msgspec import Meta

from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.exceptions import UNDECODABLE, Rejected
from httpx_p2pcache.multiaddrs import MAX_ADDRESSES
from httpx_p2pcache.network import ClaimKey, Key, Question
from httpx_p2pcache.quota import Quota

PROTOCOL_ID = "/httpx-p2pcache/1"
VERSION = 1
ADMISSION_FRAME = 256  # bytes: all that is read from somebody who is not admitted
FRAME_OVERHEAD = 256 * 1024  # what a frame may be longer than the largest body

Call = Annotated[int, Meta(ge=0, le=2**53)]
Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
Seconds = Annotated[float, Meta(ge=0, le=31_536_000)]
Address = Annotated[str, Meta(max_length=256)]
Addresses = Annotated[list[Address], Meta(max_length=MAX_ADDRESSES)]  # of one peer
PeerBytes = Annotated[bytes, Meta(min_length=2, max_length=64)]


class Frame(msgspec.Struct, array_like=True, tag=str.lower):
    pass


class Hello(Frame):
    version: int
    nonce: Nonce


class Proof(Frame):
    mac: Nonce
    other: Annotated[bytes, Meta(max_length=32)] = b""  # under the previous secret


class Introduce(Frame):
    """Who I am, whom I know, what I take, and whether I can be asked."""

    addresses: Addresses
    place: Annotated[str, Meta(max_length=256)]  # proof of the machine that I am on
    members: Annotated[list[tuple[PeerBytes, Addresses]], Meta(max_length=1000)]
    takes: Annotated[int, Meta(ge=0)]  # bytes of the largest body that I store
    ready: bool  # I am a home already
    unreached: Annotated[int, Meta(ge=0)] = 0  # how many members of my members I cannot reach
    turn: Annotated[int, Meta(ge=0)] = 0  # of two that say whom I know and reach, on two links, the higher is the later


class Acquainted(Frame):
    """Since my introduction: members who have come (peer ID, addresses) and gone, and whom I cannot reach."""

    come: Annotated[list[tuple[PeerBytes, Addresses]], Meta(max_length=1000)]
    gone: Annotated[list[PeerBytes], Meta(max_length=1000)]
    unreached: Annotated[int, Meta(ge=0)]
    turn: Annotated[int, Meta(ge=0)] = 0  # as in the introduction


class Ready(Frame):
    """I know everybody whom I could find: from now on I am a home. Answered with Inventory."""

    call: Call


class Inventory(Frame):
    """To me you are a home now. I hold these cache keys, and fetch these claims (claim, id, seconds left)."""

    call: Call
    holds: Annotated[list[Key], Meta(max_length=1000)]
    fetching: Annotated[list[tuple[ClaimKey, int, Seconds]], Meta(max_length=1000)]


class Fetching(Frame):
    """The home that granted me these is gone, and you are in its place: claim, id, seconds left."""

    fetching: Annotated[list[tuple[ClaimKey, int, Seconds]], Meta(max_length=1000)]


class Ask(Frame):
    """Answered with Found, Granted, Nothing, or with Wait and later one of the others. ``forwarded``: never Wait."""

    call: Call
    question: Question
    forwarded: bool = False


class Found(Frame):
    call: Call
    sealed: bytes
    resident: Seconds


class Granted(Frame):
    """The claim ``id`` is yours; ``sealed`` a stale entry worth validating, b"" for none."""

    call: Call
    claim: ClaimKey
    id: int
    sealed: bytes
    resident: Seconds


class Wait(Frame):
    call: Call


class Nothing(Frame):
    call: Call


class Publish(Frame):
    """To the home: an entry that ends a claim. Answered with Published: who has been served, and whether
    nothing more need be sent (a body that was left out may be missing)."""

    call: Call
    key: Key
    claim: ClaimKey
    sealed: bytes
    resident: Seconds


class Published(Frame):
    call: Call
    served: Annotated[list[PeerBytes], Meta(max_length=1000)]
    enough: bool
    known: bool = False  # somebody else has published the same, and pushed it


class Push(Frame):
    """To everybody else: an entry that they may want."""

    key: Key
    claim: ClaimKey
    sealed: bytes
    resident: Seconds


class Release(Frame):
    claim: ClaimKey
    id: int
    verdict: Verdict


class Invalidate(Frame):
    """These keys were written to. Answered with Done once nothing older is served any more, here and by the members
    whom the sender does not know: to those it is passed on. ``id`` names the write, however it comes."""

    call: Call
    keys: Annotated[list[Key], Meta(max_length=100)]
    id: Annotated[int, Meta(ge=0)] = 0


class TellQuota(Frame):
    """What the origin has said of an identity's rate limit."""

    quota: Quota


class TellCounts(Frame):
    """What the processes of my runner have counted since my node started; the runner by its name."""

    runner: Annotated[str, Meta(max_length=64)]
    counts: Annotated[dict[Annotated[str, Meta(max_length=40)], Annotated[int, Meta(ge=0)]], Meta(max_length=100)]


class Done(Frame):
    call: Call


class Ping(Frame):
    call: Call


Message = (
    Introduce
    | Acquainted
    | Fetching
    | Ready
    | Inventory
    | Ask
    | Found
    | Granted
    | Wait
    | Nothing
    | Publish
    | Published
    | Push
    | Release
    | Invalidate
    | TellQuota
    | TellCounts
    | Done
    | Ping
)
Answering = Inventory | Found | Granted | Wait | Nothing | Published | Done
ANSWERS = (Inventory, Found, Granted, Wait, Nothing, Published, Done)

_MESSAGES = msgspec.msgpack.Decoder(Message)
_HELLO = msgspec.msgpack.Decoder(Hello)
_PROOF = msgspec.msgpack.Decoder(Proof)
_ENCODER = msgspec.msgpack.Encoder()
_Decoded = TypeVar("_Decoded")


class Readable(Protocol):
    """What frames are read from."""

    async def read(self, n: int | None = None) -> bytes: ...


class ByteStream(Readable, Protocol):
    """What frames are written to as well: libp2p's stream, or one in memory."""

    async def write(self, data: bytes) -> None: ...


def pack(frame: msgspec.Struct) -> bytes:
    """A frame's bytes with their length in front."""
    body = _ENCODER.encode(frame)
    return len(body).to_bytes(4, "big") + body


def unpack(body: bytes) -> Message:
    """A member's frame. Raises :class:`Rejected`."""
    message: Message = _decoded(_MESSAGES, body)
    return message


async def read_frame(stream: Readable, limit: int) -> bytes:
    """The next frame's bytes. Raises EOFError at the end of the stream, :class:`Rejected` beyond ``limit`` bytes."""
    length = int.from_bytes(await _read_exactly(stream, 4), "big")
    if not 0 < length <= limit:
        raise Rejected(f"a frame of {length} bytes, where 1 to {limit} are allowed")
    return await _read_exactly(stream, length)


async def admit(
    stream: ByteStream, keys: tuple[bytes, ...], *, dialler: bytes, listener: bytes, dialled: bool, nonce: bytes
) -> int:
    """Prove to each other that both hold the fleet's secret; ``dialled`` says which of the two we are.

    ``keys``: one for each secret that we hold, one or two; returns the index of the one that both hold.
    Raises :class:`Rejected` or EOFError; the caller sets the deadline and resets the stream.
    """
    await stream.write(pack(Hello(VERSION, nonce)))
    hello = _decoded(_HELLO, await read_frame(stream, ADMISSION_FRAME))
    if hello.version != VERSION:
        raise Rejected(f"the peer speaks version {hello.version}, we speak {VERSION}")
    nonces = nonce + hello.nonce if dialled else hello.nonce + nonce
    bound = len(dialler).to_bytes(2, "big") + dialler + listener + nonces

    def macs(role: bytes) -> list[bytes]:
        return [hmac.digest(key, role + b"|" + bound, "sha256") for key in keys]

    if dialled:  # the dialler proves first: a stranger who connects learns nothing to guess a secret from
        await stream.write(pack(Proof(*macs(b"dialler"))))
    proof = _decoded(_PROOF, await read_frame(stream, ADMISSION_FRAME))
    told = (proof.mac,) if dialled else (proof.mac, proof.other)
    expected = macs(b"listener" if dialled else b"dialler")
    # Every pair is compared, so that the time says nothing of which agrees.
    agreeing = [any([hmac.compare_digest(mine, theirs) for theirs in told]) for mine in expected]  # noqa: C419
    if not any(agreeing):
        raise Rejected("the peer does not hold the fleet's secret")
    held = agreeing.index(True)
    if not dialled:
        await stream.write(pack(Proof(macs(b"listener")[held])))
    return held


def _decoded(decoder: msgspec.msgpack.Decoder[_Decoded], body: bytes) -> _Decoded:
    try:
        return decoder.decode(body)
    except UNDECODABLE as exc:
        raise Rejected("a frame that is none of this protocol's") from exc


async def _read_exactly(stream: Readable, length: int) -> bytes:
    # Our own loop: py-libp2p's read_exactly gives up after about a hundred reads (7 MB).
    parts = bytearray()
    while len(parts) < length:
        part = await stream.read(length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)

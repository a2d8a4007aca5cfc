"""What a process and its runner's daemon say to each other: frames, drawn once.

Frames have the form of those between nodes (a 4-byte big-endian length, then a msgpack array whose first item names its
kind), over a Unix socket that only its owner can open. Every call of :class:`~httpx_p2pcache.network.PeerNetwork` is a
frame; what it returns comes back under the same number::

    process                                  daemon
    Attach(version, fleet's label)  ──────>
                                    <──────  State, or Refused and the end
    Ask(call, question)             ──────>
                                    <──────  Answered(call, "awaited", 0)
                                    <──────  Answered(call, "claim", id)
    Publish(entry, claim, …)        ──────>
    Release(claim, …)               ──────>
    Forget(call)                    ──────>  the process has stopped waiting

A connection that ends gives back whatever its process was still fetching for the fleet.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.entries import Entry
from httpx_p2pcache.exceptions import UNDECODABLE, Rejected
from httpx_p2pcache.network import ClaimKey, Key, Question
from httpx_p2pcache.node.protocol import Frame
from httpx_p2pcache.quota import Quota

VERSION = 1
FRAME_OVERHEAD = 256 * 1024  # what a frame may be longer than the largest body

Call = Annotated[int, Meta(ge=0, le=2**53)]


class Attach(Frame):
    version: int
    label: Annotated[str, Meta(max_length=64)]


class Ask(Frame):
    call: Call
    question: Question


class Forget(Frame):
    call: Call


class Publish(Frame):
    entry: Entry
    claim: ClaimKey
    widely: bool
    refreshed: bool


class Release(Frame):
    claim: ClaimKey
    key: Key
    id: int
    verdict: Verdict


class Invalidate(Frame):
    call: Call
    keys: Annotated[list[Key], Meta(max_length=100)]


class TellQuota(Frame):
    """Either way: what the origin has said of an identity's limit."""

    quota: Quota


class State(Frame):
    """How the daemon's node does: when a process attaches, and whenever it has changed."""

    active: bool
    status: dict[str, Any]


class Refused(Frame):
    why: str


class Answered(Frame):
    """``id`` is the claim's where there is one. After ``awaited`` another one follows."""

    call: Call
    kind: Literal["found", "claim", "awaited", "unclaimed"]
    id: int = 0


class Done(Frame):
    call: Call


FromProcess = Attach | Ask | Forget | Publish | Release | Invalidate | TellQuota
FromDaemon = State | Refused | Answered | Done | TellQuota

_FROM_PROCESS = msgspec.msgpack.Decoder(FromProcess)
_FROM_DAEMON = msgspec.msgpack.Decoder(FromDaemon)


def from_process(body: bytes) -> FromProcess:
    """A frame that the daemon has read. Raises :class:`Rejected`."""
    try:
        frame: FromProcess = _FROM_PROCESS.decode(body)
    except UNDECODABLE as exc:
        raise Rejected("a frame that no process of ours sends") from exc
    return frame


def from_daemon(body: bytes) -> FromDaemon:
    """A frame that a process has read. Raises :class:`Rejected`."""
    try:
        frame: FromDaemon = _FROM_DAEMON.decode(body)
    except UNDECODABLE as exc:
        raise Rejected("a frame that no daemon of ours sends") from exc
    return frame

"""The contract between a request's way and whatever connects this runner to its fleet.

:class:`PeerNetwork` is all that the exchange knows of peers. :class:`NoPeers` is the fleet of one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.entries import Digest, Entry
from httpx_p2pcache.quota import Quota

if TYPE_CHECKING:
    from httpx_p2pcache.stored import Stored

logger = logging.getLogger("httpx_p2pcache")

Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
MAX_SELECTING = 8 * 1024  # characters of a request's fields that are sent in a question: many times what is usual
ClaimKey = Annotated[bytes, Meta(min_length=16, max_length=16)]


def may_select(fields: dict[str, str]) -> bool:
    """Whether a question may have so many and so large fields. It is kept for as long as its asker waits."""
    return len(fields) <= 100 and sum(len(name) + len(value) for name, value in fields.items()) <= MAX_SELECTING


class Question(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """*Give me this, or let me fetch it.*

    ``selecting`` holds the request's fields as they may be sent (credentials as digests); ``holds`` the digest of a
    body that the asker has already and need not be sent again, b"" for none, and ``age`` the age in seconds of the
    entry that has it: only a younger one helps; ``any_identity``: an entry of another identity helps as well;
    ``local``: it is about a host that is another one on each machine.
    """

    key: Key
    claim: ClaimKey
    method: Annotated[str, Meta(max_length=16)]
    identity: Digest
    selecting: Annotated[dict[str, str], Meta(max_length=100)]
    holds: Annotated[bytes, Meta(max_length=16)] = b""
    age: Annotated[float, Meta(ge=0)] = 0.0
    any_identity: bool = False
    local: bool = False

    def __post_init__(self) -> None:
        if not may_select(self.selecting):
            raise ValueError("a question with too many or too large fields")


@dataclass(frozen=True)
class Found:
    """An entry, checked and stored here; which one, if it has come just now into this process."""

    stored: Stored | None = None


@dataclass(frozen=True)
class FleetClaim:
    """The fleet's claim ``id`` is ours: we fetch for all. ``brought``: a stale entry may have come with it."""

    id: int
    brought: bool = True


@dataclass(frozen=True)
class Unclaimed:
    """Nobody can say anything: fetch it without a claim."""


Answer = Found | FleetClaim | Unclaimed


class Asked(Future[Answer]):
    """The answer to a question, once there is one.

    ``awaited``: it comes once somebody in the fleet has fetched what was asked for. Nobody is woken to be told that,
    unless there is ``when_awaited``, which is called with this future by whichever thread has heard of it.
    """

    def __init__(self, when_awaited: Callable[[Asked], None] | None = None) -> None:
        super().__init__()
        self.awaited = False
        self._when_awaited = when_awaited

    def await_fetch(self) -> None:
        """Somebody fetches it."""
        if not self.awaited:
            self.awaited = True
            if self._when_awaited is not None:
                self._when_awaited(self)


class PeerNetwork(Protocol):
    """What every network of peers guarantees.

    - No method blocks, and none raises because of a peer.
    - Every future returned is resolved in the end, at the latest when the network is closed.
    - Whoever cancels a future has stopped waiting: a claim granted to it is given back.
    - After ``close`` every question is answered with :class:`Unclaimed`.
    - ``close`` returns within two seconds with nothing left running.
    """

    by_file: bool  # whether it is by the file of their store that the runner's processes have each other's entries

    @property
    def active(self) -> bool:
        """Whether a question can be asked: the node has joined, though it may be the only one so far."""
        ...

    @property
    def in_demand(self) -> bool:
        """Whether others have lately asked for what we have, or we for what others have: then somebody waits."""
        ...

    def joined(self) -> Future[None]:
        """Resolved once every peer known at the start has been reached or given up, or the network cannot start."""
        ...

    def ask(self, question: Question, when_awaited: Callable[[Asked], None] | None = None) -> Asked:
        """One question to the key's home."""
        ...

    def publish(self, entry: Entry, claim: bytes, *, widely: bool, refreshed: bool = False) -> None:
        """Hand an entry to the fleet, which ends the claim by that.

        ``widely``: to every member, not to the home alone; ``refreshed``: only its fields are new.
        """
        ...

    def release(self, claim: bytes, key: bytes, held: FleetClaim, verdict: Verdict) -> None:
        """Give a claim back without an entry."""
        ...

    def invalidate(self, keys: list[bytes]) -> Future[None]:
        """Tell every peer that the entries of these cache keys are no longer valid; resolved when all have answered."""
        ...

    def tell_quota(self, quota: Quota) -> None:
        """Let the fleet know what the origin has said of an identity's limits."""
        ...

    def status(self) -> dict[str, object]:
        """Plain values: ``p2p_enabled``, ``peer_id``, ``addresses``, ``connected_peers``, ``peers`` and ``runners``.

        ``off_because``: why nothing is shared and what to do about it; "" where it is, or where nobody knows.

        ``unreached``: how many members of our members we cannot reach.
        ``runners``: what each runner of the fleet has counted since its node started, by the runner's name.
        """
        ...

    def close(self, *, at_exit: bool = False) -> None:
        """Leave the fleet. Idempotent, from any thread; ``at_exit``: the interpreter ends after it."""
        ...

    def after_fork(self) -> PeerNetwork:
        """In a forked child: let go of what was inherited (sockets); returns the network the child goes on with."""
        ...


def settle(future: Future[Any] | None, result: object) -> bool:
    """Set a result unless there is one, or nobody waits any more; whether it was set."""
    try:
        if future is not None:
            future.set_result(result)
            return True
    except InvalidStateError:
        pass
    return False


def done() -> Future[None]:
    """A future that has nothing to wait for."""
    future: Future[None] = Future()
    future.set_result(None)
    return future


class NoPeers:
    """The fleet of one: nobody to ask, nobody to tell."""

    active = False
    in_demand = False
    by_file = True

    def __init__(self, why: str = "") -> None:
        """``why`` there are none, and what to do about it."""
        self._why = why

    def joined(self) -> Future[None]:
        return done()

    def ask(self, question: Question, when_awaited: Callable[[Asked], None] | None = None) -> Asked:  # noqa: ARG002 - the contract's signature
        asked = Asked()
        asked.set_result(Unclaimed())
        return asked

    def publish(self, entry: Entry, claim: bytes, *, widely: bool, refreshed: bool = False) -> None: ...

    def release(self, claim: bytes, key: bytes, held: FleetClaim, verdict: Verdict) -> None: ...

    def invalidate(self, keys: list[bytes]) -> Future[None]:  # noqa: ARG002 - the contract's signature
        return done()

    def tell_quota(self, quota: Quota) -> None: ...

    def status(self) -> dict[str, object]:
        return {
            "p2p_enabled": False,
            "off_because": self._why,
            "peer_id": None,
            "addresses": [],
            "connected_peers": 0,
            "unreached": 0,
            "peers": [],
            "runners": {},
        }

    def close(self, *, at_exit: bool = False) -> None: ...

    def after_fork(self) -> PeerNetwork:
        return self


_said: set[str] = set()


def say_once(message: str, *values: object) -> None:
    """A warning that a process gives once, however many transports it has."""
    said = message % values
    if said not in _said:
        _said.add(said)
        logger.warning("%s", said)


def nobody(why: str) -> NoPeers:
    """The network of a runner that does not share, which is said once."""
    say_once("sharing with other runners is off: %s", why)
    return NoPeers(why)

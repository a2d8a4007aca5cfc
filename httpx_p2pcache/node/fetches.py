"""What this node fetches for the fleet: the claims that it has been granted, and what comes of them.

A claim ends when its entry is published, at the key's home first, or when it is released without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.claims import CLAIM_LIFE, Verdict
from httpx_p2pcache.entries import Entry, cache_key
from httpx_p2pcache.machine import is_local
from httpx_p2pcache.network import Question
from httpx_p2pcache.node.members import Member
from httpx_p2pcache.node.protocol import Fetching, Publish, Published, Push, Release
from httpx_p2pcache.node.shelf import Parcel, resident

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet


class _Fetch(NamedTuple):
    """A claim that this node has: for which key, until when (the loop's time), and from whom."""

    key: bytes
    id: int
    ends: float
    granter: ID
    local: bool  # it is at a host of this machine


class Fetches:
    """This node as one who fetches and publishes. Everything runs in its loop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._life = CLAIM_LIFE * fleet.settings.claim_timeout
        self._fetching: dict[bytes, _Fetch] = {}
        self._publishing = 0
        self._all_published = trio.Event()

    def granted(self, question: Question, id_: int, granter: ID) -> None:
        """The claim of a question is ours."""
        self._fetching[question.claim] = _Fetch(
            question.key, id_, self._fleet.now() + self._life, granter, question.local
        )

    async def release(self, claim: bytes, key: bytes, id_: int, verdict: Verdict) -> None:
        """This node's claim has ended without an entry: told to who granted it, and to who is the home by now."""
        held = self._fetching.pop(claim, None)
        self._fleet.home.ended(claim, id_, verdict)
        granter = None if held is None else self._fleet.members.get(held.granter)
        try:
            home = await self._fleet.homes.of(key, local=held is not None and held.local)
        except OSError:
            home = None
        for member in {m.peer_id: m for m in (home, granter) if m is not None}.values():
            try:
                await member.send(Release(claim, id_, verdict))
            except OSError:
                self._fleet.stats.add("peer_failures")

    async def publish(self, entry: Entry, claim: bytes, *, refreshed: bool, widely: bool) -> None:
        """This node has fetched or refreshed ``entry``: the home first, which serves those who wait, then the rest.

        Not ``widely``: to the home alone. Where a home is too busy to answer in time every member may be fetching the
        same, and the last thing it needs is a copy from each.
        """
        held = self._fetching.pop(claim, None)
        self._fleet.home.ended(claim, None, Verdict.PUBLISHED)
        if not self._fleet.members:
            return
        key, local = cache_key(entry.url), is_local(entry.url)
        parcel = Parcel(entry, refreshed=refreshed)
        self._publishing += 1
        try:
            served, known = await self._publish_at_home(key, claim, parcel, local)
            # In a large fleet it is pulled from the home; only who has granted the claim as well is not left waiting.
            everybody = widely and not known and not self._fleet.reach.large
            async with trio.open_nursery() as nursery:
                for member in list(self._fleet.members.values()):
                    concerned = everybody or (held is not None and member.peer_id == held.granter)
                    can_use_it = (member.here or not local) and len(entry.body) <= member.takes
                    if concerned and can_use_it and member.peer_id.to_bytes() not in served:
                        nursery.start_soon(self._push, member, key, claim, parcel)
        finally:
            self._publishing -= 1
            if not self._publishing:
                self._all_published.set()
                self._all_published = trio.Event()

    async def _publish_at_home(self, key: bytes, claim: bytes, parcel: Parcel, local: bool) -> tuple[set[bytes], bool]:
        try:
            home = await self._fleet.homes.of(key, local=local)
        except OSError:
            return set(), False
        if home is None or len(parcel.entry.body) > home.takes:
            return set(), False
        return await self._publish_at(home, key, claim, parcel)

    async def _publish_at(self, home: Member, key: bytes, claim: bytes, parcel: Parcel) -> tuple[set[bytes], bool]:
        """Give the home the first form of the entry that it can use.

        Returns who has the entry by that, and whether the home had it already.
        """
        for whole in (False, True):
            try:
                sealed = parcel.sealed(home.keyring, whole=whole)

                def build(number: int, sealed: bytes = sealed) -> Publish:
                    return Publish(number, key, claim, sealed, resident(parcel.entry.received))

                answer = await home.link.call(build, self._fleet.settings.claim_timeout)
            except OSError:
                self._fleet.stats.add("peer_failures")
                break
            if isinstance(answer, Published) and answer.enough:
                return {home.peer_id.to_bytes(), *answer.served}, answer.known
        return {home.peer_id.to_bytes()}, False

    async def published(self) -> None:
        """Wait until nothing is being published any more."""
        while self._publishing:
            await self._all_published.wait()

    async def _push(self, member: Member, key: bytes, claim: bytes, parcel: Parcel) -> None:
        try:
            if member.links:
                sealed = parcel.sealed(member.keyring, whole=False)
                await member.send(Push(key, claim, sealed, resident(parcel.entry.received)))
        except OSError:
            self._fleet.stats.add("peer_failures")

    # What others should know of it

    def granter_lost(self, peer_id: ID) -> None:
        """What a member had granted to us, which is gone now, is told to those who are the homes now."""
        now = trio.current_time()
        for claim, held in self._fetching.items():
            if held.granter != peer_id or held.ends <= now:
                continue
            if self._fleet.homes.now(held.key, local=held.local) == self._fleet.host.id:
                self._fleet.home.adopt(self._fleet.host.id, [(claim, held.id, held.ends - now)])
            else:
                self._fleet.spawn(self._tell_new_home, claim, held)

    async def _tell_new_home(self, claim: bytes, held: _Fetch) -> None:
        home = await self._fleet.homes.of(held.key, local=held.local)
        left = held.ends - trio.current_time()
        if home is not None and left > 0:
            await home.send(Fetching([(claim, held.id, left)]))

    def expire(self) -> None:
        """Claims of ours whose end has come are forgotten."""
        now = trio.current_time()
        self._fetching = {claim: held for claim, held in self._fetching.items() if held.ends > now}

    def fetching(self) -> list[tuple[bytes, int, float]]:
        """The fleet's claims that this node has: claim key, id, seconds left."""
        now = trio.current_time()
        return [(claim, held.id, held.ends - now) for claim, held in self._fetching.items() if held.ends > now][:1000]

    def granters(self) -> set[ID]:
        """Those whose claims we have."""
        return {held.granter for held in self._fetching.values()}

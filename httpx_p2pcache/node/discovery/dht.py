"""Peers by a Kademlia DHT: nodes of one fleet provide, and look for, a key that nobody else can compute.

Two of the DHT's calls are spoken, as a client that keeps nothing: GET_PROVIDERS, asked of the servers nearest to the
key until nobody nearer turns up, and ADD_PROVIDER (libp2p's specification of Kad-DHT). The key is derived from the
secret and the hour: all that leaves is that key, and our own addresses. Whoever answers is a stranger; whom it names is
dialled as anybody is, and shows by admission whether it is one of us.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import trio
import varint
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.multiaddrs import MAX_ADDRESSES, is_loopback
from httpx_p2pcache.node.discovery import Sighting
from httpx_p2pcache.node.discovery.static import StaticPeers
from httpx_p2pcache.node.host import Host
from httpx_p2pcache.settings import Settings

logger = logging.getLogger("httpx_p2pcache")

KAD = "/ipfs/kad/1.0.0"
PUBLIC = tuple(
    f"/dnsaddr/bootstrap.libp2p.io/p2p/{peer_id}"
    for peer_id in (
        "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN",
        "QmQCU2EcMqAqQPR2i9bChDtGNJchTbq5TbXJJ16u19uLTa",
        "QmbLHAnMoJPWSCR5Zhtx6BHJX9KiKNN6tpvbUcqanj75Nb",
        "QmcZf59bWwK5XFi76CZX8cbJ4BhTzzA3gU1ZjYZcYW3dwt",
    )
)
CALL_SECONDS = 3.0  # for one server to be reached and to answer
WALK_SECONDS = 12.0  # for one search
LONELY_SECONDS = 5.0  # after which the public servers are asked, if nobody was found by then
LONELY_PAUSES = (1.0, 1.0, 2.0, 3.0, 5.0, 10.0)  # between two searches while we are alone ...
PAUSE = 120.0  # ... and while we are not
PROVIDED_SECONDS = 600.0  # after which we are provided anew; servers forget after a day or two
MAX_ANSWER = 64 * 1024  # bytes
MAX_QUERIED = 24  # servers in one search
AT_ONCE = 4
NEAREST = 8  # servers that are told of us
MAX_FOUND = 50


def key_of(keyring: Keyring, hour: int) -> bytes:
    """The multihash under which the fleet meets in that hour since 1970."""
    return b"\x12\x20" + keyring.rendezvous(b"dht %d" % hour)


class Dht:
    """One fleet's meeting place in the DHT that the bootstrap nodes belong to; ``lonely`` says whether we are alone."""

    name, pause, late = "Dht", 1.0, False

    def __init__(
        self,
        host: Host,
        keyring: Keyring,
        settings: Settings,
        *,
        lonely: Callable[[], bool],
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._host, self._keyring, self._settings = host, keyring, settings
        self._lonely, self._in_thread = lonely, in_thread
        self._named = StaticPeers(settings.bootstrap_peers, quietly=True)  # another has said what is wrong with them
        self._public: StaticPeers | None = None
        self._addresses: list[str] = []
        self._began = trio.current_time()
        self._next = 0.0
        self._searches = 0
        self._provided: dict[bytes, float] = {}
        self._found: list[Sighting] = []

    async def announce(self, peer_id: bytes, addresses: list[str]) -> None:  # noqa: ARG002 - the contract's signature
        outward = [address for address in addresses if not is_loopback(address)]
        self._addresses = outward or addresses

    async def find(self) -> list[Sighting]:
        now = trio.current_time()
        if now < self._next:
            return self._found
        servers = await self._servers(now)
        if not servers:
            return []
        with trio.move_on_after(WALK_SECONDS):
            await self._meet(servers)
        pause = LONELY_PAUSES[min(self._searches, len(LONELY_PAUSES) - 1)] if self._lonely() else PAUSE
        self._searches += 1
        self._next = trio.current_time() + pause
        return self._found

    async def withdraw(self) -> None: ...

    async def _servers(self, now: float) -> dict[ID, list[str]]:
        servers = self._named if self._settings.bootstrap_peers else self._public
        if servers is None:
            if not (self._settings.public_bootstrap and self._lonely() and now - self._began > LONELY_SECONDS):
                return {}
            logger.info("Using standard libp2p bootstrap node(s)")
            servers = self._public = StaticPeers(PUBLIC, quietly=True)
        sightings = await self._in_thread(servers.find)
        return {ID(one.peer_id): list(one.addresses) for one in sightings if one.peer_id}

    async def _meet(self, servers: dict[ID, list[str]]) -> None:
        """Provide ourselves under this hour's key, and look for the others there, and where they were an hour ago."""
        hour, found = int(time.time() // 3600), dict[ID, list[str]]()
        for keyring in self._keyring.every:
            for key in (key_of(keyring, hour), key_of(keyring, hour - 1)):
                providers, near = await self._walk(servers, key)
                found.update(providers)
                due = self._provided.get(key, -PROVIDED_SECONDS) + PROVIDED_SECONDS <= trio.current_time()
                if due and keyring is self._keyring and key == key_of(keyring, hour) and await self._provide(near, key):
                    self._provided = {key: trio.current_time()}
        self._found = [
            Sighting(peer_id=peer_id.to_bytes(), addresses=tuple(addresses[:MAX_ADDRESSES]), how="dht")
            for peer_id, addresses in list(found.items())[:MAX_FOUND]
            if addresses
        ]

    async def _walk(self, servers: dict[ID, list[str]], key: bytes) -> tuple[dict[ID, list[str]], dict[ID, list[str]]]:
        """The providers of ``key``, and the servers nearest to it that have answered."""
        known, asked = dict(servers), set[ID]()
        answered, providers = dict[ID, list[str]](), dict[ID, list[str]]()
        target = int.from_bytes(hashlib.sha256(key).digest(), "big")

        def distance(peer_id: ID) -> int:
            return target ^ int.from_bytes(hashlib.sha256(peer_id.to_bytes()).digest(), "big")

        async def ask(peer_id: ID) -> None:
            try:
                answer = await self._call(peer_id, known[peer_id], Message(type=Message.GET_PROVIDERS, key=key))
            except Exception as exc:
                logger.debug("a DHT server has not answered: %r", exc)
                return
            answered[peer_id] = known[peer_id]
            providers.update((p, addresses) for p, addresses in _peers(answer.providerPeers) if p != self._host.id)
            for other, addresses in _peers(answer.closerPeers):
                if addresses and other != self._host.id:
                    known.setdefault(other, addresses)

        while len(asked) < MAX_QUERIED:
            batch = [p for p in sorted(known, key=distance)[:NEAREST] if p not in asked][:AT_ONCE]
            if not batch:
                break
            asked.update(batch)
            async with trio.open_nursery() as nursery:
                for peer_id in batch:
                    nursery.start_soon(ask, peer_id)
        return providers, {p: answered[p] for p in sorted(answered, key=distance)[:NEAREST]}

    async def _provide(self, servers: dict[ID, list[str]], key: bytes) -> bool:
        """Have ``key`` lead to us; whether any server has confirmed that it does."""
        add, get = Message(type=Message.ADD_PROVIDER, key=key), Message(type=Message.GET_PROVIDERS, key=key)
        add.providerPeers.add(id=self._host.id.to_bytes(), addrs=[Multiaddr(a).to_bytes() for a in self._addresses])
        confirmed = []

        async def tell(peer_id: ID, addresses: list[str]) -> None:
            try:  # nobody answers an ADD_PROVIDER: the question that follows on the same stream shows that it was kept
                answer = await self._call(peer_id, addresses, add, get)
            except Exception as exc:
                logger.debug("a DHT server has not answered: %r", exc)
                return
            confirmed.append(self._host.id.to_bytes() in [peer.id for peer in answer.providerPeers])

        async with trio.open_nursery() as nursery:
            for peer_id, addresses in servers.items():
                nursery.start_soon(tell, peer_id, addresses)
        return any(confirmed)

    async def _call(self, peer_id: ID, addresses: list[str], *messages: Any) -> Any:
        """The answer to the last of these messages. Raises whatever goes wrong."""
        async with self._host.visit(addresses, peer_id, KAD, CALL_SECONDS) as stream:
            for message in messages:
                data = message.SerializeToString()
                await stream.write(varint.encode(len(data)) + data)
            while True:
                answer = Message()
                answer.ParseFromString(await read_varint_prefixed_bytes_limited(stream, MAX_ANSWER))
                if answer.type == messages[-1].type:  # py-libp2p echoes an ADD_PROVIDER, others do not
                    return answer


def _peers(named: Iterable[Any]) -> Iterable[tuple[ID, list[str]]]:
    for one in list(named)[:100]:
        addresses = []
        for raw in list(one.addrs)[:32]:
            try:
                text = str(Multiaddr(raw)).partition("/p2p/")[0]
            except Exception:  # noqa: S112 - multiaddr raises a dozen kinds of errors for what is none
                continue
            if text.startswith(("/ip4/", "/ip6/")) and text.count("/") == 4 and "/tcp/" in text:
                addresses.append(text)
        yield ID(one.id), list(dict.fromkeys(addresses))

"""A runner of a simulated fleet: the real code, less what would reach outside the simulation."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec
import trio
from libp2p.peer.id import ID

from httpx_p2pcache.database import connect
from httpx_p2pcache.exchange import Exchange
from httpx_p2pcache.github import GitHub
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.multiaddrs import multiaddr
from httpx_p2pcache.node.discovery import Discovery, Sighting
from httpx_p2pcache.node.embedded import EmbeddedNode
from httpx_p2pcache.node.fleet import Fleet
from httpx_p2pcache.opened import Opened
from httpx_p2pcache.quota import QuotaBoard
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats
from httpx_p2pcache.store import Store
from httpx_p2pcache.testing.simulation.clock import skew
from httpx_p2pcache.testing.simulation.network import SimulatedHost

if TYPE_CHECKING:
    from httpx_p2pcache.testing.simulation import Simulation


class _Everybody:
    """Finds who has ever listened, the dead included; or the first ``known`` of them."""

    name, late = "everybody", False

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self.pause = 0.0 if node.simulation.known is None else 2.0

    async def announce(self, peer_id: bytes, addresses: list[str]) -> None: ...

    async def find(self) -> list[Sighting]:
        known = self._node.network.nodes
        return [
            Sighting(peer_id=node.fleet.host.id.to_bytes(), addresses=(address,), how="registry")
            for address, node in itertools.islice(known.items(), self._node.simulation.known)
        ]

    async def withdraw(self) -> None: ...


class _Fleet(Fleet):
    node: SimulatedNode

    def __post_init__(self) -> None:
        super().__post_init__()
        self._worker.stop()

    def _make_host(self) -> Any:
        return SimulatedHost(self.node, self._accept)

    def _discoveries(self) -> list[Discovery]:
        return [_Everybody(self.node)]

    async def in_worker(self, func: Callable[[], Any]) -> Any:
        await trio.lowlevel.checkpoint()
        return func()

    async def _tell_counts(self) -> None: ...


class _Network(EmbeddedNode):
    """The node's own bridge, less the thread."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._open: set[Future[Any]] = set()

    @property
    def active(self) -> bool:
        return self._node.alive and self._node.fleet.joined.is_set()

    def _asked_here(self, *_: object) -> bool:
        return False  # who asks is in the loop

    def _soon(self, func: Callable[[Fleet], None]) -> bool:
        if self._node.alive:
            func(self._node.fleet)
        return self._node.alive


class _InMemory(Opened):
    def _open(self) -> None:
        self._use(connect(":memory:"))


class _MemoryStore(Store):
    def __init__(self, settings: Settings, any_coding: Callable[[str], bool]) -> None:
        super().__init__(settings.dir, max_size=0, default_ttl=0, any_coding=any_coding)
        self._file = _InMemory(settings.dir, max_size=0)


class _NoLedger(Ledger):
    def __init__(self) -> None: ...


class SimulatedNode:
    """A runner: its clock is ``skew`` seconds ahead."""

    def __init__(self, simulation: Simulation, number: int, skew: float) -> None:
        self.simulation, self.number, self.skew = simulation, number, skew
        self.network = simulation.network
        self.address = multiaddr(str(ipaddress.IPv4Address("10.0.0.0") + number), 1)
        self.alive = False
        self.ids: list[ID] = []  # that it is to have when it begins
        self._frozen: trio.Event | None = None
        self.life = trio.CancelScope()
        self.requests: set[trio.CancelScope] = set()

    def begin(self) -> None:
        """Start, or start again after a crash, with an empty store."""
        settings = msgspec.structs.replace(self.simulation.settings, announce_addrs=(self.address,))
        stats, quotas = Stats(), QuotaBoard()
        github, keyring = GitHub(settings, stats), self.simulation.keyring
        self.store = _MemoryStore(settings, github.follows)
        _Fleet.node = self
        self.fleet = _Fleet(settings, self.store, keyring, stats, quotas)
        self.fleet.node = self
        self.exchange = Exchange(settings, self.store, keyring, stats, _Network(self), github, quotas, _NoLedger())
        self.alive, self.life = True, trio.CancelScope()
        self.simulation.network.nursery.start_soon(self._run)

    async def _run(self) -> None:
        skew.set(self.skew)
        try:
            with self.life:
                await self.fleet.run(lambda: None)
        finally:
            self.alive = False
            with trio.CancelScope(shield=True):
                await self.fleet.host.close()
            self.store.close()

    def crash(self) -> None:
        """Gone from one step to the next; the others are told by their links, as TCP tells them of a killed process."""
        self.alive = False
        for scope in [self.life, *self.requests]:
            scope.cancel()

    def freeze(self) -> None:
        if self._frozen is None:
            self._frozen = trio.Event()

    def unfreeze(self) -> None:
        frozen, self._frozen = self._frozen, None
        if frozen is not None:
            frozen.set()

    async def thaw(self) -> None:
        """Return once this node is not frozen."""
        while self._frozen is not None:
            await self._frozen.wait()

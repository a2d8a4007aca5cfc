"""A fleet in one thread, on a network, an origin and clocks of its own: every run is that of its seed, step by step.

What runs is the real code: exchange, store (in memory), fleet, homes, claims, frames, sealing. Replaced are libp2p, by
links that lose, repeat, delay and reorder frames as they are told; time, by trio's virtual clock, of which each node
has its own opinion; and the origin. A step is a function that is called with the :class:`Simulation` when it is due::

    simulation = Simulation(nodes=5, seed=7)
    for node in simulation.nodes:
        simulation.at(1.0, partial(simulation.get, node, "/a"))
    simulation.run(10.0)
    assert len(simulation.origin.fetched("/a")) == 1
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import hishel
import msgspec
import trio
import trio.testing
from hishel import Headers
from libp2p.peer.id import ID

from httpx_p2pcache.answers import Answer, Discard, Effect, Miss, Read, Reply, Run, Wait, driven
from httpx_p2pcache.database import connect
from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exchange import Exchange
from httpx_p2pcache.github import GitHub
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.node import homes
from httpx_p2pcache.node.discovery import Discovery, Sighting
from httpx_p2pcache.node.embedded import EmbeddedNode
from httpx_p2pcache.node.fleet import Fleet
from httpx_p2pcache.node.host import CONNECT_SECONDS
from httpx_p2pcache.quota import QuotaBoard
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats
from httpx_p2pcache.store import Store
from httpx_p2pcache.testing.origin import github_etag

EPOCH = 1_800_000_000.0  # Unix time at which every simulation begins
HOST = "api.github.com"
SECRET = "of a fleet that is simulated"  # noqa: S105 - of nobody
TOKEN = "Bearer one"  # noqa: S105 - of nobody
_skew: ContextVar[float] = ContextVar("skew", default=0.0)
Step = Callable[[], Awaitable[None]]


_monotonic = time.monotonic


def _elapsed() -> float:
    """The virtual clock; to a thread of somebody else's, which is not simulated, the real one."""
    try:
        return trio.current_time()
    except RuntimeError:
        return _monotonic()


def _now() -> float:
    """Unix time, as the node whose task this is believes it to be."""
    return EPOCH + trio.current_time() + _skew.get()


@dataclass
class Fetch:
    """A request that reached the origin."""

    at: float  # simulated seconds since the beginning
    method: str
    path: str
    token: str
    status: int
    node: int
    version: int


@dataclass
class Asked:
    """A request of a node, and what became of it; times in simulated seconds."""

    node: int
    path: str
    token: str
    began: float
    ended: float | None = None
    status: int | None = None
    version: int | None = None
    source: str = ""


@dataclass
class Resource:
    """What the origin has at a path: the body of version n is ``<path> <n>``."""

    max_age: int = 30
    storable: bool = True
    versions: list[float] = field(default_factory=lambda: [0.0])  # since when each is current
    hidden_from: set[str] = field(default_factory=set)  # tokens that get a 404


class SimulatedOrigin:
    """Answers as GitHub does: tags bound to the token, ``private``, a free 304."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.resources: dict[str, Resource] = {}
        self.log: list[Fetch] = []
        self.failing_for: set[int] = set()

    def resource(self, path: str) -> Resource:
        return self.resources.setdefault(path, Resource())

    def fetched(self, path: str) -> list[Fetch]:
        """The GETs of a path that have reached the origin."""
        return [one for one in self.log if one.path == path and one.method == "GET"]

    def version(self, path: str) -> int:
        return len(self.resource(path).versions) - 1

    async def answer(self, node: SimulatedNode, request: hishel.Request, added: dict[str, str]) -> Reply:
        path = request.url.partition(HOST)[2]
        resource, token = self.resource(path), request.headers.get("authorization", "")
        await trio.sleep(self.latency / 2)
        await node.thaw()
        status, body, version = 200, b"", self.version(path)
        if node.number in self.failing_for:
            status = 503
        elif token in resource.hidden_from:
            status = 404
        elif request.method != "GET":
            resource.versions.append(trio.current_time())
        else:
            body = f"{path} {version}".encode()
        fields = {"date": formatdate(EPOCH + trio.current_time(), usegmt=True), "cache-control": "no-store"}
        if request.method == "GET" and status == 200:
            tag = github_etag(body, {"accept": "*/*", "authorization": token})
            fields["vary"] = "Accept, Authorization"
            fields["etag"] = f'"{tag}"'
            if resource.storable:
                fields["cache-control"] = f"private, max-age={resource.max_age}"
            if fields["etag"] in added.get("if-none-match", ""):
                status, body = 304, b""
        self.log.append(Fetch(trio.current_time(), request.method, path, token, status, node.number, version))
        await trio.sleep(self.latency / 2)
        await node.thaw()
        return Reply(status, Headers(fields), body)


class Pipe:
    """One direction of a link; each write is a frame, and arrives when the network lets it."""

    def __init__(self, network: SimulatedNetwork, sender: SimulatedNode, receiver: SimulatedNode) -> None:
        self.network, self.sender, self.receiver = network, sender, receiver
        self.send, self.receive = trio.open_memory_channel[bytes](10_000)
        self.after = 0.0  # when the frame before it arrives
        self.sent = 0
        self.left = b""


class SimulatedStream:
    """As much of a libp2p stream as the node uses."""

    def __init__(self, inward: Pipe, outward: Pipe, closed: trio.Event) -> None:
        self._inward, self._outward, self.closed = inward, outward, closed

    async def read(self, n: int | None = None) -> bytes:
        pipe = self._inward
        if not pipe.left:
            try:
                pipe.left = await pipe.receive.receive()
            except (trio.EndOfChannel, trio.ClosedResourceError):
                return b""
        found, pipe.left = pipe.left[:n], pipe.left[n:] if n is not None else b""
        return found

    async def write(self, data: bytes) -> None:
        if self.closed.is_set():
            raise OSError("the link is closed")
        self._outward.network.carry(self._outward, data)

    async def reset(self) -> None:
        self.closed.set()
        for pipe in (self._inward, self._outward):
            pipe.send.close()


@dataclass
class Weather:
    """What happens to frames. ``loss``, ``repeat`` and ``late`` are probabilities of each frame."""

    delay: tuple[float, float] = (0.0005, 0.003)
    loss: float = 0.0
    repeat: float = 0.0
    late: float = 0.0  # it arrives up to LATE seconds later, and others before it
    LATE = 1.0


CLEAR = Weather()


class SimulatedNetwork:
    """Who reaches whom, and what becomes of what they send."""

    def __init__(self, chance: random.Random, weather: Weather) -> None:
        self.chance, self.weather = chance, weather
        self.nodes: dict[str, SimulatedNode] = {}
        self.parted: Callable[[int, int], bool] = lambda _a, _b: False
        self.frames = self.bytes = self.faults = self.dials = 0
        self.by_node: Counter[int] = Counter()
        self.by_kind: Counter[str] = Counter()  # of frames; and the bytes of each
        self.bytes_by_kind: Counter[str] = Counter()
        self.nursery: trio.Nursery

    def reaches(self, a: SimulatedNode, b: SimulatedNode) -> bool:
        return b.alive and a.alive and not self.parted(a.number, b.number)

    def carry(self, pipe: Pipe, frame: bytes) -> None:
        self.frames += 1
        self.bytes += len(frame)
        self.by_node[pipe.sender.number] += 1
        kind = frame[6 : 6 + (frame[5] & 0x1F)].decode("ascii", "replace")  # msgpack: an array, and a short string
        self.by_kind[kind] += 1
        self.bytes_by_kind[kind] += len(frame)
        now, chance, weather = trio.current_time(), self.chance, self.weather
        if not self.reaches(pipe.sender, pipe.receiver):
            return
        copies, pipe.sent = 1, pipe.sent + 1
        if pipe.sent <= 2:  # admission: what a network may do to it leads to no link at all
            weather = CLEAR
        if chance.random() < weather.loss:
            copies, self.faults = 0, self.faults + 1
        elif chance.random() < weather.repeat:
            copies, self.faults = 2, self.faults + 1
        for _ in range(copies):
            due = now + chance.uniform(*weather.delay)
            if chance.random() < weather.late:
                self.faults += 1
                due += chance.uniform(0, weather.LATE)
            else:
                due = pipe.after = max(due, pipe.after + 1e-6)
            self.nursery.start_soon(self._deliver, pipe, frame, due)

    async def _deliver(self, pipe: Pipe, frame: bytes, due: float) -> None:
        await trio.sleep_until(due)
        await pipe.sender.thaw()
        await pipe.receiver.thaw()
        if self.reaches(pipe.sender, pipe.receiver):
            with contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError, trio.WouldBlock):
                pipe.send.send_nowait(frame)


def _some_id(chance: random.Random) -> ID:
    return ID(b"\x00\x24" + hashlib.sha512(f"{chance.random()}".encode()).digest()[:36])


class SimulatedHost:
    """In the place of ``node.host.Host``."""

    def __init__(self, node: SimulatedNode, on_stream: Callable[[Any, ID], Any]) -> None:
        self._node, self._on_stream = node, on_stream
        self._streams: dict[ID, list[SimulatedStream]] = {}
        self.visiting: dict[ID, int] = {}
        self.id = node.ids.pop() if node.ids else _some_id(node.network.chance)

    @contextlib.asynccontextmanager
    async def listening(self, address: str, port: int) -> AsyncIterator[int]:  # noqa: ARG002 - Host's signature
        self._node.network.nodes[self._node.address] = self._node
        yield 1

    async def connect(self, addresses: list[str], peer_id: ID, timeout: float) -> SimulatedStream:
        network, us = self._node.network, self._node
        network.dials += 1
        them = network.nodes.get(addresses[0])
        await trio.sleep(network.chance.uniform(*network.weather.delay) * 4)
        if them is None or not them.alive or them.fleet.host.id != peer_id:
            raise OSError("nobody answers")
        if not network.reaches(us, them):
            await trio.sleep(min(timeout, CONNECT_SECONDS))
            raise OSError("nobody answers in time")
        there, back, closed = Pipe(network, us, them), Pipe(network, them, us), trio.Event()
        ours, theirs = SimulatedStream(back, there, closed), SimulatedStream(there, back, closed)
        self._streams.setdefault(peer_id, []).append(ours)
        them.fleet.host.take(theirs, self.id)
        return ours

    def take(self, stream: SimulatedStream, peer_id: ID) -> None:
        self._streams.setdefault(peer_id, []).append(stream)
        self._node.fleet.spawn(self._on_stream, stream, peer_id)

    async def disconnect(self, peer_id: ID) -> None:
        for stream in self._streams.pop(peer_id, []):
            await stream.reset()

    async def close(self) -> None:
        for peer_id in list(self._streams):
            await self.disconnect(peer_id)

    async def refuse(self, peer_id: ID) -> None:
        await self.disconnect(peer_id)

    def forget(self, peer_id: ID) -> None: ...

    def connected(self) -> list[ID]:
        return [p for p, streams in self._streams.items() if any(not s.closed.is_set() for s in streams)]

    def seen_at(self, peer_id: ID, announced: list[str]) -> list[str]:  # noqa: ARG002 - Host's signature
        return []

    def sockets(self) -> list[int]:
        return []


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


class _MemoryStore(Store):
    def _open(self) -> Any:
        if self._storage is None:
            self._use(connect(":memory:"))
        return self._storage


class _NoLedger(Ledger):
    def __init__(self) -> None: ...


class SimulatedNode:
    """A runner: its clock is ``skew`` seconds ahead."""

    def __init__(self, simulation: Simulation, number: int, skew: float) -> None:
        self.simulation, self.number, self.skew = simulation, number, skew
        self.network = simulation.network
        self.address = f"/ip4/10.0.0.{number}/tcp/1"
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
        self.store = _MemoryStore(settings.dir, max_size=0, default_ttl=0, any_coding=github.follows)
        _Fleet.node = self
        self.fleet = _Fleet(settings, self.store, keyring, stats, quotas)
        self.fleet.node = self
        self.exchange = Exchange(settings, self.store, keyring, stats, _Network(self), github, quotas, _NoLedger())
        self.alive, self.life = True, trio.CancelScope()
        self.simulation.network.nursery.start_soon(self._run)

    async def _run(self) -> None:
        _skew.set(self.skew)
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


class Simulation:
    """``nodes`` runners of one fleet; see the module's head. ``seed`` decides everything that chance decides.

    Each node finds all others by itself, or the first ``known``, and is told of the rest by these. ``"core"``: the
    first are the core (:mod:`httpx_p2pcache.node.homes`), as if the fleet had been there for long. They begin ``apart``
    seconds one after another.
    """

    def __init__(
        self,
        *,
        nodes: int = 3,
        seed: int = 0,
        weather: Weather | None = None,
        latency: float = 0.08,
        skew: float = 0.0,
        known: int | Literal["core"] | None = None,
        apart: float = 0.0,
        **settings: Any,
    ) -> None:
        self.seed, self.apart = seed, apart
        self.known = homes.MESH if known == "core" else known
        self.chance = random.Random(seed)  # noqa: S311 - it is meant to be repeatable
        self.settings = Settings(dir=Path("/nonexistent"), shared_secret=SECRET, github_hosts=(HOST,), **settings)
        self.keyring = Keyring(SECRET.encode(), "simulation")
        self.network = SimulatedNetwork(self.chance, weather or Weather())
        self.origin = SimulatedOrigin(latency)
        self.nodes = [SimulatedNode(self, n, self.chance.uniform(-skew, skew)) for n in range(nodes)]
        if known == "core":
            ids = sorted((_some_id(self.chance) for _ in self.nodes), key=homes.rank)
            for node, peer_id in zip(self.nodes, ids, strict=True):
                node.ids = [peer_id]
        self.asked: list[Asked] = []
        self._steps: list[tuple[float, Step]] = []

    def at(self, when: float, step: Callable[[], Any]) -> None:
        """Have ``step`` called after ``when`` simulated seconds; awaited, if there is something to await."""

        async def run() -> None:
            result = step()
            if result is not None:
                await result

        self._steps.append((when, run))

    async def get(self, node: SimulatedNode, path: str, token: str = TOKEN) -> None:
        """A GET by a node that is alive, noted in ``asked``."""
        await self._ask(node, "GET", path, token)

    async def write(self, node: SimulatedNode, path: str, token: str = TOKEN) -> None:
        """A PATCH: the origin has a new version."""
        await self._ask(node, "PATCH", path, token)

    async def _ask(self, node: SimulatedNode, method: str, path: str, token: str) -> None:
        if not node.alive:
            return
        _skew.set(node.skew)
        asked = Asked(node.number, path, token, trio.current_time())
        request = hishel.Request(method, f"https://{HOST}{path}", Headers({"accept": "*/*", "authorization": token}))
        if method == "GET":
            self.asked.append(asked)
        with trio.CancelScope() as scope:
            node.requests.add(scope)
            answer = node.exchange.hit(request)
            if isinstance(answer, Miss):
                way = node.exchange.way(request, object(), None, miss=answer)
                answer = await self._drive(node, request, way)
            await node.thaw()
        node.requests.discard(scope)
        if scope.cancelled_caught:
            return
        asked.ended = trio.current_time()
        stored, reply = answer.stored, answer.reply
        asked.source = answer.caching["source"]
        asked.status = stored.entry.status if stored else reply.status if reply else 504
        body = stored.entry.body if stored else reply.native if reply else b""
        asked.version = int(body.split()[-1]) if body else None

    async def _drive(self, node: SimulatedNode, request: hishel.Request, way: Any) -> Answer:
        reply: Reply | None = None

        async def perform(effect: Effect) -> Any:
            nonlocal reply
            if isinstance(effect, Run):
                await trio.lowlevel.checkpoint()
                return effect.func()
            if isinstance(effect, Wait):
                return await _wait(effect)
            if isinstance(effect, (Read, Discard)):
                return reply.native if reply is not None else None
            reply = await self.origin.answer(node, request, effect.added)
            return reply

        answer: Answer = await driven(way, perform)
        if answer.keep is not None and answer.reply is not None and node.alive:
            answer.keep.feed(answer.reply.native)
            answer.keep.finish()
        return answer

    def run(self, seconds: float) -> None:
        """Simulate so many seconds."""

        async def wait() -> None:
            await trio.sleep(seconds)

        self.play(wait)

    def play(self, script: Step) -> None:
        """Simulate until ``script`` has returned; it runs beside the steps, and may call every method of the nodes."""
        clock = trio.testing.MockClock(autojump_threshold=0)
        with _virtual(self.seed):
            trio.run(self._main, script, clock=clock)

    async def _main(self, script: Step) -> None:
        async with trio.open_nursery() as nursery, trio.open_nursery() as self.network.nursery:
            for node in self.nodes:
                node.begin()
                if self.apart:
                    await trio.sleep(self.apart)
            for when, step in sorted(self._steps, key=lambda one: one[0]):
                nursery.start_soon(self._later, when, step)
            try:
                await script()
            finally:
                self.network.nursery.cancel_scope.cancel()
                nursery.cancel_scope.cancel()

    async def formed(self, timeout: float = 30.0) -> bool:
        """Wait until every node that is alive is connected to all it should be (:mod:`httpx_p2pcache.node.homes`), and
        ready; false if that takes too long."""
        with trio.move_on_after(timeout):
            while not self._is_formed():  # noqa: ASYNC110 - of all nodes at once there is no event
                await trio.sleep(0.05)
            return True
        return False

    def describe(self) -> str:
        """How each node that is alive sees the others."""
        names = {node.fleet.host.id: node.number for node in self.nodes}
        return "; ".join(
            f"{node.number} (joined: {node.fleet.joined.is_set()}, unreached: {node.fleet.reach.unreached}) sees "
            + ", ".join(
                f"{names.get(member.peer_id, '?')} (usable: {member.usable()}, unreached: {member.unreached})"
                for member in node.fleet.members.values()
            )
            for node in self.nodes
            if node.alive
        )

    def _is_formed(self) -> bool:
        alive = [node for node in self.nodes if node.alive]
        everybody = {node.fleet.host.id for node in alive}
        return all(
            (node.fleet.reach.wanted or everybody) - {node.fleet.host.id} <= node.fleet.members.keys()
            and node.fleet.reach.core == alive[0].fleet.reach.core <= everybody
            and node.fleet.joined.is_set()
            and not node.fleet.reach.unreached
            and all(m.usable() and not m.unreached for p, m in node.fleet.members.items() if p in node.fleet.reach.core)
            for node in alive
        )

    @staticmethod
    async def _later(when: float, step: Step) -> None:
        await trio.sleep(when)
        await step()


async def _wait(effect: Wait) -> Any:
    woken = trio.Event()
    effect.future.add_done_callback(lambda _: woken.set())
    try:
        with trio.move_on_after(effect.seconds):
            await woken.wait()
    except BaseException:
        effect.future.cancel()
        raise
    if not effect.future.done() and (effect.keep or effect.future.cancel()):
        return None
    return None if effect.future.cancelled() else effect.future.result()


@contextlib.contextmanager
def _virtual(seed: int) -> Iterator[None]:
    """Time is trio's, and the order of tasks that could all run is the seed's, as pytest-trio has it for hypothesis."""
    scheduler: Any = importlib.import_module("trio._core._run")
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    try:
        with mock.patch.multiple(time, time=_now, monotonic=_elapsed, perf_counter=_elapsed):
            yield
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = before

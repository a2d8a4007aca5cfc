"""The network of a simulated fleet, and libp2p's part in each of its nodes."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.node.host import CONNECT_SECONDS

if TYPE_CHECKING:
    from httpx_p2pcache.testing.simulation.node import SimulatedNode


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


def some_id(chance: random.Random) -> ID:
    return ID(b"\x00\x24" + hashlib.sha512(f"{chance.random()}".encode()).digest()[:36])


class SimulatedHost:
    """In the place of ``node.host.Host``."""

    def __init__(self, node: SimulatedNode, on_stream: Callable[[Any, ID], Any]) -> None:
        self._node, self._on_stream = node, on_stream
        self._streams: dict[ID, list[SimulatedStream]] = {}
        self.visiting: dict[ID, int] = {}
        self.id = node.ids.pop() if node.ids else some_id(node.network.chance)

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

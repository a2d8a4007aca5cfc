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

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hishel
import trio
import trio.testing
from hishel import Headers

from httpx_p2pcache.answers import Answer, Discard, Effect, Miss, Read, Reply, Run, Wait, driven
from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.node import homes
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.testing.simulation.clock import skew, virtual
from httpx_p2pcache.testing.simulation.network import SimulatedNetwork, Weather, some_id
from httpx_p2pcache.testing.simulation.node import SimulatedNode
from httpx_p2pcache.testing.simulation.origin import HOST, Fetch, Resource, SimulatedOrigin

__all__ = ["Asked", "Fetch", "Resource", "SimulatedNode", "Simulation", "Weather"]

SECRET = "of a fleet that is simulated"  # noqa: S105 - of nobody
TOKEN = "Bearer one"  # noqa: S105 - of nobody
Step = Callable[[], Awaitable[None]]


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
            ids = sorted((some_id(self.chance) for _ in self.nodes), key=homes.rank)
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
        skew.set(node.skew)
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
        with virtual(self.seed):
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

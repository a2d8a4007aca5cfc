"""The claim protocol under everything that can happen to it: hypothesis chooses, the simulation plays.

An episode is a schedule of its own on a fleet that has been through the ones before it: some nodes ask for something
nobody has, close together, while something goes wrong; then the weather clears, and the fleet comes together again.
``Episode`` prints as what replays it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import pytest

pytest.importorskip("libp2p")

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from httpx_p2pcache.testing.simulation import Asked, SimulatedNode, Simulation, Weather

NODES = 3
LATENCY = 0.08
LOOKUP, CLAIM = 0.25, 2.0  # seconds, as the settings have them
MAX_AGE = 1000  # nothing goes stale by itself within an episode
# A flight in the process, the question, the wait for another's fetch, and one's own fetch, with its way there and back.
BOUND = CLAIM + LOOKUP + CLAIM + 2 * LATENCY + 0.2
Fault = Literal["crash", "freeze", "part", "fail"]
SCHEDULES = int(os.environ.get("SCHEDULES", "500"))
EPISODES = 20


@dataclass(frozen=True)
class Episode:
    """``asks``: which node asks, after how many milliseconds; ``faults``: what befalls which node, when, how long."""

    asks: tuple[tuple[int, int], ...]
    faults: tuple[tuple[Fault, int, int, int], ...] = ()
    loss: float = 0.0
    repeat: float = 0.0
    late: float = 0.0
    write: int | None = None  # the node that writes to it once all have it, and after which all ask again
    unstorable: bool = False


class Player:
    """Plays episodes one after another, and says what was not as it must be."""

    def __init__(self, seed: int, episodes: list[Episode], skew: float = 0.0) -> None:
        self.simulation = Simulation(
            nodes=NODES, seed=seed, latency=LATENCY, skew=skew, lookup_timeout=LOOKUP, claim_timeout=CLAIM
        )
        self.episodes = episodes
        self.affected: set[int] = set()

    def play(self) -> None:
        self.simulation.play(self._play)

    async def _play(self) -> None:
        assert await self.simulation.formed()
        for number, episode in enumerate(self.episodes):
            try:
                await self._episode(f"/{number}", episode)
            except AssertionError as exc:
                raise AssertionError(
                    f"{exc}\n\nreplay: Player({self.simulation.seed}, {self.episodes[: number + 1]})"
                ) from exc

    async def _episode(self, path: str, episode: Episode) -> None:
        simulation = self.simulation
        network, origin = simulation.network, simulation.origin
        network.weather = Weather(loss=episode.loss, repeat=episode.repeat, late=episode.late)
        resource = origin.resource(path)
        resource.max_age, resource.storable = MAX_AGE, not episode.unstorable
        before, self.affected = network.faults, set()
        first = len(simulation.asked)
        with trio.CancelScope() as nothing_more:
            async with trio.open_nursery() as nursery:
                for node, after in episode.asks:
                    nursery.start_soon(self._ask, simulation.nodes[node], path, after / 1000)
                for fault, node, after, lasting in episode.faults:
                    nursery.start_soon(self._fault, fault, simulation.nodes[node], after / 1000, lasting / 1000)
                nursery.start_soon(self._end, nothing_more)
                while len(nursery.child_tasks) > 1:  # noqa: ASYNC110 - of all of them there is no event
                    await trio.sleep(0.05)
                nothing_more.cancel()
        self._heal()
        faults = network.faults - before + sum(self._weight(episode, *fault) for fault in episode.faults)
        self._check(path, episode, simulation.asked[first:], faults)
        if faults:
            await trio.sleep(2.5)  # whom somebody has asked whether it is still there has answered by then
        assert await simulation.formed(), f"the fleet does not come together again: {simulation.describe()}"
        if episode.write is not None and not episode.unstorable:
            await self._write(path, simulation.nodes[episode.write])

    async def _ask(self, node: SimulatedNode, path: str, after: float) -> None:
        await trio.sleep(after)
        await self.simulation.get(node, path)

    async def _fault(self, fault: Fault, node: SimulatedNode, after: float, lasting: float) -> None:
        await trio.sleep(after)
        self.affected.add(node.number)
        network, origin = self.simulation.network, self.simulation.origin
        if fault == "crash":
            node.crash()
            await trio.sleep(lasting)
            if not node.alive:
                node.begin()
        elif fault == "freeze":
            node.freeze()
            await trio.sleep(lasting)
            node.unfreeze()
        elif fault == "part":
            network.parted = lambda a, b: (a <= node.number) != (b <= node.number)
            await trio.sleep(lasting)
            network.parted = lambda _a, _b: False
        else:
            origin.failing_for.add(node.number)
            await trio.sleep(lasting)
            origin.failing_for.discard(node.number)

    async def _end(self, scope: trio.CancelScope) -> None:
        await trio.sleep(60)
        scope.cancel()

    @staticmethod
    def _weight(episode: Episode, fault: Fault, node: int, _after: int, _lasting: int) -> int:
        """How many fetches it may cost. A crash: one, and each of its own requests, until it has joined again. A home
        that is silent, each of the others one, as nobody may be delayed beyond the look-up; a frozen process, and one
        whose calls fail, each of its own requests."""
        own = sum(asker == node for asker, _ in episode.asks)
        return {"crash": 1 + own, "fail": 1 + own, "freeze": NODES - 1 + own, "part": NODES - 1}[fault]

    def _heal(self) -> None:
        simulation = self.simulation
        simulation.network.weather = Weather()
        simulation.network.parted = lambda _a, _b: False
        simulation.origin.failing_for.clear()
        for node in simulation.nodes:
            node.unfreeze()
            if not node.alive:
                node.begin()

    def _check(self, path: str, episode: Episode, asked: list[Asked], faults: int) -> None:
        frozen = {f[1] for f in episode.faults if f[0] == "freeze"}
        failing = {f[1] for f in episode.faults if f[0] == "fail"}
        crashed = {f[1] for f in episode.faults if f[0] == "crash"}
        for one in asked:
            if one.node in crashed:
                continue
            assert one.ended is not None, f"{one} is never answered"
            if one.node not in frozen:
                assert one.ended - one.began <= BOUND, f"{one} has waited too long"
            assert one.status == 200 or one.node in failing, f"{one} has failed"
            if one.status == 200:
                assert one.version == 0, f"{one} is not what the origin has"
        calls = self.simulation.origin.fetched(path)
        if not episode.unstorable:
            assert len(calls) <= 1 + faults, f"{len(calls)} fetches with {faults} faults: {calls}"

    async def _write(self, path: str, writer: SimulatedNode) -> None:
        simulation = self.simulation
        await simulation.write(writer, path)
        first, before = len(simulation.asked), len(simulation.origin.fetched(path))
        async with trio.open_nursery() as nursery:
            for node in simulation.nodes:
                nursery.start_soon(simulation.get, node, path)
        for one in simulation.asked[first:]:
            assert one.version == 1, f"{one} is what was before the write"
        assert len(simulation.origin.fetched(path)) - before == 1, "more than one fetch after a write"


@pytest.mark.parametrize("seed", [84, 262, 375, 435, 583, 746])
def test_where_a_publication_is_lost_one_of_those_who_wait_fetches_for_all(seed: int) -> None:
    # A claim that ends is passed on while they still wait: else all of them would fetch.
    asks = (2, 1), (0, 0), (0, 0), (1, 0), (0, 0), (0, 0)
    Player(seed, [Episode(asks, loss=0.1)]).play()


nodes = st.integers(0, NODES - 1)
asks = st.lists(st.tuples(nodes, st.sampled_from([0, 0, 0, 1, 5, 40, 90, 200, 500])), min_size=1, max_size=8).map(tuple)
faults = st.lists(
    st.tuples(
        st.sampled_from(["crash", "freeze", "part", "fail"]),
        nodes,
        st.sampled_from([0, 1, 5, 30, 60, 85, 100, 300]),
        st.sampled_from([10, 100, 500, 1500, 3000]),
    ),
    max_size=3,
).map(tuple)
little = st.sampled_from([0.0, 0.02, 0.1, 0.3])


class Fleet(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.episodes: list[Episode] = []

    @rule(asks=asks, write=st.none() | nodes)
    def nothing_goes_wrong(self, asks: tuple[tuple[int, int], ...], write: int | None) -> None:
        self.episodes.append(Episode(asks, write=write))

    @rule(asks=asks, faults=faults, write=st.none() | nodes)
    def something_befalls_nodes(self, asks: object, faults: object, write: int | None) -> None:
        self.episodes.append(Episode(asks, faults, write=write))  # type: ignore[arg-type]

    @rule(asks=asks, loss=little, repeat=little, late=little)
    def frames_are_lost_repeated_and_late(self, asks: object, loss: float, repeat: float, late: float) -> None:
        self.episodes.append(Episode(asks, (), loss, repeat, late))  # type: ignore[arg-type]

    @rule(asks=asks, faults=faults)
    def what_is_asked_for_may_not_be_stored(self, asks: object, faults: object) -> None:
        self.episodes.append(Episode(asks, faults, unstorable=True))  # type: ignore[arg-type]

    def teardown(self) -> None:
        if self.episodes:
            Player(len(self.episodes), self.episodes).play()


def test_every_schedule() -> None:
    run_state_machine_as_test(
        Fleet,
        settings=settings(
            max_examples=max(1, SCHEDULES // EPISODES),
            stateful_step_count=EPISODES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )

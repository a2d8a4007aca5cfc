"""Fleets of more nodes than one mesh has: the simulation with meshes of six, so that twenty are a large fleet."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import pytest

pytest.importorskip("libp2p")

import trio

from httpx_p2pcache.multiaddrs import is_tcp
from httpx_p2pcache.node import homes
from httpx_p2pcache.node.presence import IDLE_SECONDS
from httpx_p2pcache.testing.simulation import SimulatedNode, Simulation

NODES = 20
SEEDS = 5 if "SCHEDULES" in os.environ else 1  # all of them in `make simulate`
Play = Callable[[Simulation], Awaitable[None]]


@pytest.fixture(autouse=True)
def _small_meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "MESH", 6)


def play(script: Play, seed: int = 1, nodes: int = NODES, known: int | None = 3) -> Simulation:
    simulation = Simulation(nodes=nodes, seed=seed, known=known, apart=0.02, claim_timeout=2.0)

    async def formed() -> None:
        assert await simulation.formed(), simulation.describe()
        await script(simulation)

    simulation.play(formed)
    return simulation


async def ask(simulation: Simulation, nodes: list[SimulatedNode], *paths: str) -> None:
    """All of them for all of it, at once; every answer is right."""
    first = len(simulation.asked)
    async with trio.open_nursery() as nursery:
        for path in paths:
            for node in nodes:
                nursery.start_soon(simulation.get, node, path)
    for one in simulation.asked[first:]:
        assert (one.status, one.version) == (200, simulation.origin.version(one.path)), one


def outside(simulation: Simulation) -> list[SimulatedNode]:
    """The nodes outside the core."""
    core = simulation.nodes[0].fleet.reach.core
    return [node for node in simulation.nodes if node.fleet.host.id not in core]


def links(node: SimulatedNode) -> int:
    return len(node.fleet.members)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("known", [3, None], ids=["told-of-by-three", "found-by-all"])
def test_all_are_served_by_one_fetch_of_each(seed: int, known: int | None) -> None:
    async def script(simulation: Simulation) -> None:
        paths = [f"/{number}" for number in range(12)]
        assert len(simulation.nodes[0].fleet.reach.core) == 6
        await ask(simulation, simulation.nodes, *paths)
        assert [len(simulation.origin.fetched(path)) for path in paths] == [1] * 12

    play(script, seed, known=known)


def test_who_is_no_home_keeps_two_connections_and_makes_others_as_it_needs_them() -> None:
    async def script(simulation: Simulation) -> None:
        await trio.sleep(IDLE_SECONDS + 5)
        assert {links(node) for node in outside(simulation)} == {homes.ANCHORS}
        one = outside(simulation)[0]
        await ask(simulation, [one], *[f"/{number}" for number in range(30)])
        assert homes.ANCHORS < links(one) <= 6
        await trio.sleep(IDLE_SECONDS + 5)
        assert links(one) == homes.ANCHORS

    play(script)


def test_more_than_a_node_can_keep_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 12  # what the anchored need, and some

    async def peak(simulation: Simulation) -> int:
        await ask(simulation, simulation.nodes, *[f"/{number}" for number in range(12)])
        before = max(links(node) for node in simulation.nodes)
        await trio.sleep(3)
        return before

    async def script(simulation: Simulation) -> None:
        assert await peak(simulation) > most
        assert max(links(node) for node in simulation.nodes) <= most + 1  # one may just have come

    monkeypatch.setattr("httpx_p2pcache.node.presence.MAX_LINKS", most)
    play(script)


def test_a_write_reaches_everybody() -> None:
    async def script(simulation: Simulation) -> None:
        await ask(simulation, simulation.nodes, "/a")
        await simulation.write(outside(simulation)[0], "/a")
        await ask(simulation, simulation.nodes, "/a")
        assert len(simulation.origin.fetched("/a")) == 2

    play(script)


def test_what_is_published_goes_to_its_home_and_not_to_everybody() -> None:
    async def script(simulation: Simulation) -> None:
        await trio.sleep(2)
        one = outside(simulation)[0]
        await simulation.get(one, "/warm")
        before = simulation.network.frames
        await simulation.get(one, "/warm-2")
        assert simulation.network.frames - before < NODES
        stats = [node.fleet.stats.snapshot()["received"] for node in simulation.nodes]
        assert sum(stats) <= 2

    play(script)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_when_a_home_dies_another_takes_its_place_in_the_eyes_of_all(seed: int) -> None:
    async def script(simulation: Simulation) -> None:
        core = simulation.nodes[0].fleet.reach.core
        victim = next(node for node in simulation.nodes if node.fleet.host.id in core)
        victim.crash()
        alive = [node for node in simulation.nodes if node is not victim]
        await ask(simulation, alive, "/at-once")
        # In that very moment any of the core may be the home in somebody's eyes.
        assert len(simulation.origin.fetched("/at-once")) <= homes.MESH
        await trio.sleep(10)
        await ask(simulation, alive, *[f"/{number}" for number in range(12)])
        assert sum(len(simulation.origin.fetched(f"/{number}")) for number in range(12)) == 12

    play(script, seed)


def test_behind_nat_the_node_that_all_reach_is_the_only_home() -> None:
    async def script(simulation: Simulation) -> None:
        await trio.sleep(5)
        hub = simulation.nodes[0].fleet
        for node in simulation.nodes[1:]:
            assert list(node.fleet.members) == [hub.host.id]
        paths = [f"/{number}" for number in range(12)]
        await ask(simulation, simulation.nodes, *paths)
        assert sum(len(simulation.origin.fetched(path)) for path in paths) == 12

    simulation = Simulation(nodes=NODES, seed=1, known=1, apart=0.02, claim_timeout=2.0)
    simulation.network.parted = lambda a, b: 0 not in (a, b)

    async def run() -> None:
        await trio.sleep(20)
        await script(simulation)

    simulation.play(run)


def test_each_of_ten_thousand_nodes_has_an_address() -> None:
    addresses = {node.address for node in Simulation(nodes=10_000).nodes}
    assert len(addresses) == 10_000
    assert all(map(is_tcp, addresses))

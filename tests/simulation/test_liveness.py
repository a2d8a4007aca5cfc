"""Who is still there, and what a node survives."""

from __future__ import annotations

import pytest

pytest.importorskip("libp2p")

import trio

from httpx_p2pcache.node.presence import SILENCE_SECONDS
from httpx_p2pcache.testing.simulation import Simulation


def test_a_link_that_has_just_closed_ends_no_node() -> None:
    """Between a link's end and its member's leave there is a moment in which everything else goes on."""
    simulation = Simulation(nodes=3, seed=1)

    async def script() -> None:
        assert await simulation.formed(), simulation.describe()
        for member in simulation.nodes[0].fleet.members.values():
            for link in member.links:
                link.closed.set()
        await trio.sleep(SILENCE_SECONDS + 2.0)
        assert [node.alive for node in simulation.nodes] == [True] * 3

    simulation.play(script)


def test_what_was_said_last_on_whichever_link_is_what_is_known() -> None:
    """Who is not reached by all is no home: what is known of that differs for no longer than it takes to say it."""
    simulation = Simulation(nodes=2, seed=1)
    one, other = simulation.nodes

    async def script() -> None:
        assert await simulation.formed(), simulation.describe()
        await trio.sleep(0.5)
        (theirs,), (ours,) = one.fleet.members.values(), other.fleet.members.values()
        first, second = theirs.links  # both have dialled
        for link in (second, first):
            one.fleet.reach.unreached = 1  # for a moment, in which it introduces itself on one of them
            await one.fleet.reach.introduce(link)
            await trio.sleep(0.1)
            assert ours.unreached == 1
            one.fleet.reach.changed()
            await trio.sleep(0.2)
            assert (one.fleet.reach.unreached, ours.unreached) == (0, 0)

    simulation.play(script)


def test_a_fleet_in_which_nothing_happens_says_nothing_new() -> None:
    """All that is sent is one introduction a second by each, and a ping to who has been silent, and its answer."""
    simulation, nodes, seconds = Simulation(nodes=6, seed=1), 6, 60

    async def script() -> None:
        assert await simulation.formed(), simulation.describe()
        await trio.sleep(5.0)  # what came last is told
        simulation.network.by_kind.clear()
        await trio.sleep(seconds)

    simulation.play(script)
    said = simulation.network.by_kind
    assert said.keys() <= {"introduce", "ping", "done"}, said
    assert said["introduce"] <= nodes * (seconds + 1)
    assert said["ping"] <= 2 * said["introduce"], said

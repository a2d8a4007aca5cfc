"""A fleet of more nodes than one mesh has, over real libp2p: meshes of three, and eight nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.testing import Origin

pytest.importorskip("libp2p")

from httpx_p2pcache.node import homes

pytestmark = pytest.mark.p2p

NODES = 8
TARGETS = [f"/repos/octo-org/repo-{number}" for number in range(10)]


@pytest.fixture
def runners(
    settings_for: Callable[..., Settings], origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[P2PCacheTransport]]:
    monkeypatch.setattr(homes, "MESH", 3)
    transports = [
        P2PCacheTransport(settings=settings_for(f"runner-{number}", lookup_timeout=5.0)) for number in range(NODES)
    ]
    try:
        for transport in transports:
            assert transport.wait_until_joined(30)
        yield transports
    finally:
        for transport in transports:
            transport.close()


def of(transport: P2PCacheTransport, origin: Origin) -> httpx.Client:
    return httpx.Client(transport=transport, base_url=origin.url, headers={"Authorization": "Bearer one"}, timeout=30.0)


def test_all_pay_once_and_a_write_reaches_everybody(runners: list[P2PCacheTransport], origin: Origin) -> None:
    clients = [of(runner, origin) for runner in runners]
    assert eventually(lambda: agreed(runners), 30)

    def ask(client: httpx.Client) -> list[str]:
        return [client.get(target).raise_for_status().text for target in TARGETS]

    with ThreadPoolExecutor(NODES) as pool:
        answers = list(pool.map(ask, clients))
    assert answers == [[origin.resources[target].body.decode() for target in TARGETS]] * NODES
    assert len(origin.calls) <= len(TARGETS) + 1
    clients[0].put(TARGETS[0], content=b'{"new": true}').raise_for_status()
    before = len(origin.calls)
    with ThreadPoolExecutor(NODES) as pool:
        assert set(pool.map(lambda client: client.get(TARGETS[0]).text, clients)) == {'{"new": true}'}
    assert len(origin.calls) - before <= 2


def test_when_a_home_leaves_the_others_go_on(runners: list[P2PCacheTransport], origin: Origin) -> None:
    core = sorted(runners, key=lambda runner: runner.stats()["connected_peers"])  # type: ignore[arg-type, return-value]
    core[-1].close()
    left = core[:-1]
    clients = [of(runner, origin) for runner in left]

    def ask(*targets: str) -> int:
        """All of them for all of these, and every answer is right: how many calls that cost."""
        before = len(origin.calls)
        for client in clients:
            for target in targets:
                assert client.get(target).raise_for_status().text == origin.resources[target].body.decode()
        return len(origin.calls) - before

    # In that very moment any of the core may be the home in somebody's eyes.
    assert ask(TARGETS[0]) <= homes.MESH
    assert eventually(lambda: agreed(left), 30)
    ask(*TARGETS[1:])
    assert len(origin.calls) <= len(TARGETS) + 2


def agreed(runners: list[P2PCacheTransport]) -> bool:
    """Whether they see the same nodes as homes, all of which are there, and reach whom they want to, as all know."""
    there = {runner.stats()["peer_id"] for runner in runners}
    fleets: list[Any] = [runner._exchange.network._fleet for runner in runners]  # type: ignore[attr-defined]
    seen = {fleet.reach.core for fleet in fleets}
    reached = [fleet.reach.unreached for fleet in fleets]
    reached += [member.unreached for fleet in fleets for member in list(fleet.members.values())]
    return len(seen) == 1 and {str(peer_id) for peer_id in next(iter(seen))} <= there and not any(reached)

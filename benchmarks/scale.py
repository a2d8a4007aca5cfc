"""What a miss costs as the fleet grows, from 10 to 10,000 nodes: the real code on the simulated network.

The fleet has been there for long: the core is known, and who asks is connected to its anchors. One central cache that
coalesces would call the origin once for each URL, which is the line that Squirrel (Iyer, Rowstron and Druschel, PODC
2002) came close to.
"""

from __future__ import annotations

import random
import time
from typing import Any

import trio

from httpx_p2pcache.testing.simulation import Simulation

SIZES = (10, 50, 100, 1000, 10_000)
URLS = 400
REQUESTS = 2000
SECONDS = 4.0
OF_A_MISS = ("ask", "found", "granted", "nothing", "wait", "publish", "published", "release")


def run(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """By the number of nodes: what 2,000 requests of them for 400 URLs, some asked for more often, have cost."""
    return {f"{size:,} nodes": measure(size) for size in sizes}


def measure(size: int) -> dict[str, object]:
    began = time.process_time()
    simulation = Simulation(nodes=size, seed=1, known="core", apart=0.001)
    network, chance = simulation.network, random.Random(1)
    paths = chance.choices([f"/{n}" for n in range(URLS)], [1 / (n + 1) for n in range(URLS)], k=REQUESTS)
    said: dict[str, object] = {}

    async def ask(path: str) -> None:
        await trio.sleep(chance.uniform(0, SECONDS))
        await simulation.get(chance.choice(simulation.nodes), path)

    async def script() -> None:
        await trio.sleep(1)
        assert all(node.fleet.joined.is_set() for node in simulation.nodes)
        frames = network.frames
        await trio.sleep(2)
        idle = (network.frames - frames) / 2
        frames, dials = network.frames, network.dials
        for counter in (network.by_node, network.by_kind, network.bytes_by_kind):
            counter.clear()
        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(ask, path)
            await trio.sleep(SECONDS + 1)
        misses = sum(one.source != "local" for one in simulation.asked)
        right = sum((one.status, one.version) == (200, 0) for one in simulation.asked)
        loads = sorted(network.by_node[node.number] for node in simulation.nodes)
        fetches, distinct = len(simulation.origin.log), len(set(paths))
        of_misses = sum(network.by_kind[kind] for kind in OF_A_MISS)
        others = network.frames - frames - of_misses - network.by_kind["push"] - idle * (SECONDS + 1)
        said.update(
            {
                "right": f"{right} of {REQUESTS}",
                "calls": fetches,
                "with one central cache": distinct,
                "of what that saves": f"{(REQUESTS - fetches) / (REQUESTS - distinct):.1%}",
                "messages a miss": round(of_misses / misses, 1),
                "pushed besides": round(network.by_kind["push"] / misses, 1),
                "bytes": round(sum(network.bytes_by_kind[kind] for kind in OF_A_MISS) / misses),
                "new connections": f"{(network.dials - dials) / misses:.2f}",
                "messages for these": round(max(others, 0) / misses, 1),
                "sent by the median / busiest node": f"{loads[len(loads) // 2]} / {loads[-1]}",
                "most connections": max(len(node.fleet.members) for node in simulation.nodes),
                "messages a second at rest": round(idle / size, 1),
            }
        )

    simulation.play(script)
    return {**said, "CPU, s": round(time.process_time() - began)}

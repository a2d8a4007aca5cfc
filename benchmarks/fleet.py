"""The main job: a cold fleet that asks for the same URLs in the same second."""

from __future__ import annotations

from typing import Any

from httpx_p2pcache.cli.demo import Plan, demonstrate
from httpx_p2pcache.testing import made_up


def run() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for client in ("sync", "asyncio", "trio"):
        outcome = demonstrate(
            Plan(
                runners=5,
                resources=made_up(100),
                targets=list(made_up(100)),
                latency=0.08,
                own_tokens=False,
                stagger=0,
                concurrency=4,
                client=client,  # type: ignore[arg-type] # one of its three words
            ),
            lambda *_: None,
        )
        shared = outcome.with_sharing
        found[f"5 runners x 100 URLs, {client}: calls without / with sharing"] = (
            f"{outcome.without.origin_calls} / {shared.origin_calls}"
        )
        found[f"5 runners x 100 URLs, {client}: right answers"] = f"{shared.right} of {shared.asked}"
    return found

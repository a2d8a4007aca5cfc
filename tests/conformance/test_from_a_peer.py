"""The same answers when entries come from a peer: each step of a scenario is asked by another runner of the fleet."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conformance.test_rfc9111 import CONTEXT, SCENARIOS, Clock, Run
from scripted import Scripted
from secret import secret_of

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.entries import cache_key
from httpx_p2pcache.store import Store
from httpx_p2pcache.testing import Origin, Resource

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p

ONE_RUNNER_ONLY = {
    # What the first runner was given may not leave it, or is asked of its own store alone.
    "Set-Cookie",
    "only-if-cached",
    "stale-while-revalidate",
    "private is",
    "private with",
    # Parts are not sent to peers.
    "a part ",
    "parts ",
    "beginning",
}
PLAYED = [name for name in SCENARIOS if not any(word in name for word in ONE_RUNNER_ONLY)]


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[httpx.Client]]:
    scratch = tmp_path_factory.mktemp("peers")
    transports = [
        P2PCacheTransport(
            httpx.HTTPTransport(verify=CONTEXT),
            settings=Settings(
                dir=scratch / name,
                peer_registry=scratch / "registry",
                shared_secret=secret_of(scratch),
                public_bootstrap=False,
                listen_host="127.0.0.1",
                listen_port=0,
                lookup_timeout=5.0,
            ),
        )
        for name in ("a", "b")
    ]
    clients = [httpx.Client(transport=one, headers={"Accept-Encoding": "identity"}) for one in transports]
    until = time.monotonic() + 30
    while any(transport.stats()["connected_peers"] != 1 for transport in transports):
        assert time.monotonic() < until
        threading.Event().wait(0.01)
    assert all(transport.wait_until_joined(30) for transport in transports)
    yield clients
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def ports() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as held:
        yield held


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "time", found)
    return found


@pytest.mark.parametrize("name", PLAYED)
def test_it_does_not_matter_which_runner_asks(
    name: str, runners: list[httpx.Client], clock: Clock, ports: contextlib.ExitStack
) -> None:
    with Scripted() as server:  # an origin of its own: nothing is left of the scenario before
        run = Run(server, clock, SCENARIOS[name])
        for number, (request, step) in enumerate(run.requests(runners[0].build_request), 1):
            run.check(step, runners[number % 2].send(request), number)
            arrived(runners, [server.url + other.path for other in run.steps])
    # The URLs of this scenario are not to be those of a later one.
    ports.enter_context(socket.create_server(("127.0.0.1", int(server.netloc.rpartition(":")[2]))))


def arrived(runners: list[httpx.Client], urls: list[str]) -> None:
    """Wait until both hold the same, before the clock goes on; what one may not share, the other does not wait for."""
    stores = [client._transport._exchange.store for client in runners]  # type: ignore[attr-defined] # from inside

    def held(store: Store) -> set[tuple[object, ...]]:
        found = [stored.entry for url in urls for stored in store.load(cache_key(url))]
        return {(e.url, e.method, e.status, e.digest, e.received - e.initial_age) for e in found}

    until = time.monotonic() + 0.15
    while held(stores[0]) != held(stores[1]) and time.monotonic() < until:
        threading.Event().wait(0.002)


SKEWED = """
import sys, time
skew, real = float(sys.argv[1]), time.time
time.time = lambda: real() + skew
import httpx
from httpx_p2pcache import P2PCacheTransport
transport = P2PCacheTransport()
client = httpx.Client(transport=transport)
assert transport.wait_until_joined(30)
while transport.stats()["connected_peers"] != 1:
    pass
for path in sys.argv[3:]:
    answer = client.get(sys.argv[2] + path)
    print(answer.extensions["caching"]["source"], answer.headers["age"] if "age" in answer.headers else "none")
client.close()
"""


@pytest.mark.parametrize("skew", [-3600.0, 3600.0], ids=["an hour behind", "an hour ahead"])
def test_clocks_that_are_an_hour_apart_do_not_change_an_age(
    skew: float, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    resources = {
        "/fresh": Resource(b"fresh", max_age=600),
        "/old": Resource(b"old", fields={"Age": "500"}, max_age=600),
        "/stale": Resource(b"stale", fields={"Age": "700"}, max_age=600),
    }
    environment = {
        "CACHE_DIR": str(tmp_path / "skewed"),
        "CACHE_PEER_REGISTRY": str(tmp_path / "registry"),
        "CACHE_PEER_TTL": "7200",
        "CACHE_LISTEN_HOST": "127.0.0.1",
        "CACHE_LISTEN_PORT": "0",
        "CACHE_LOOKUP_TIMEOUT": "5",
    }
    settings = settings_for("here", lookup_timeout=5.0, peer_ttl=7200.0)
    transport = P2PCacheTransport(httpx.HTTPTransport(verify=CONTEXT), settings=settings)
    with Origin(resources) as origin, httpx.Client(transport=transport) as client:
        assert transport.wait_until_joined(30)
        for path in resources:
            client.get(origin.url + path)
        ran = subprocess.run(
            [sys.executable, "-c", SKEWED, str(skew), origin.url, *resources],
            env={**environment, "CACHE_SHARED_SECRET": settings.shared_secret},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    (fresh, old, stale) = [line.split() for line in ran.stdout.splitlines()]
    assert (fresh[0], old[0], stale[0]) == ("peer", "peer", "origin")
    assert 0 <= int(fresh[1]) < 30
    assert 500 <= int(old[1]) < 530

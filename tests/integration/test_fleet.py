"""What a fleet of nodes does, over real libp2p on 127.0.0.1; the nodes share one process, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import msgspec
import pytest
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache import network as network_module
from httpx_p2pcache import store as store_module
from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.machine import proof_of_place
from httpx_p2pcache.testing import Origin, Resource, made_up

pytest.importorskip("libp2p")

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from httpx_p2pcache.entries import Entry, Keyring, body_digest, cache_key
from httpx_p2pcache.network import FleetClaim, Question, Unclaimed
from httpx_p2pcache.node.discovery.registry import Record
from httpx_p2pcache.node.embedded import EmbeddedNode
from httpx_p2pcache.node.fleet import Fleet
from httpx_p2pcache.node.host import Host
from httpx_p2pcache.node.protocol import (
    Ask,
    Done,
    Found,
    Granted,
    Introduce,
    Invalidate,
    Inventory,
    Nothing,
    Ping,
    Publish,
    Published,
    Push,
    Ready,
    admit,
    pack,
    read_frame,
    unpack,
)
from httpx_p2pcache.node.questions import Questions

pytestmark = pytest.mark.p2p

TOKEN = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"
PATIENT = 5.0  # lookup_timeout where not the budget but the outcome is looked at, on a loaded machine
PROMPT = 2.0  # lookup_timeout of 0.25 s, the origin's latency, and a generous margin
TARGETS = [f"/repos/octo-org/repo-{number}" for number in range(10)]


@dataclass
class Runner:
    """One node of a fleet and the client that uses it."""

    transport: P2PCacheTransport
    client: httpx.Client

    def get(self, target: str, **options: Any) -> httpx.Response:
        return self.client.get(target, **options)

    def stat(self, name: str) -> Any:
        return self.transport.stats()[name]

    @property
    def addresses(self) -> list[str]:
        """Where others can dial it, peer ID included."""
        return [f"{address}/p2p/{self.stat('peer_id')}" for address in self.stat("addresses")]

    @property
    def port(self) -> int:
        return int(self.stat("addresses")[0].rsplit("/", 1)[1])


Start = Callable[..., Runner]


@pytest.fixture
def start(settings_for: Callable[..., Settings], origin: Origin) -> Iterator[Start]:
    """``start("a")``: a runner that has begun to join; all are closed at the end."""
    runners: list[Runner] = []

    def begin(
        name: str, *, token: str | None = TOKEN, next_transport: httpx.BaseTransport | None = None, **changes: object
    ) -> Runner:
        settings = settings_for(name, **({"lookup_timeout": PATIENT} | changes))
        transport = P2PCacheTransport(next_transport, settings=settings)
        headers = {"Accept": "application/vnd.github+json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        client = httpx.Client(transport=transport, base_url=origin.url, headers=headers, timeout=30.0)
        runners.append(Runner(transport, client))
        return runners[-1]

    try:
        yield begin
    finally:
        if runners:
            with ThreadPoolExecutor(len(runners)) as pool:
                list(pool.map(lambda runner: runner.client.close(), runners))


@pytest.fixture
def fleet(start: Start) -> Callable[..., list[Runner]]:
    """``fleet(3)``: runners that have all met."""

    def begin(count: int, **changes: object) -> list[Runner]:
        runners = [start(f"runner-{number}", **changes) for number in range(count)]
        met(*runners)
        return runners

    return begin


def node_of(runner: Runner) -> tuple[EmbeddedNode, Fleet]:
    """What a runner asks its peers by, and the fleet as its node sees it."""
    network = runner.transport._exchange.network
    assert isinstance(network, EmbeddedNode)
    assert network._fleet is not None
    return network, network._fleet


def question_of(fleet: Fleet, number: int = 0, *, ours: bool) -> Question:
    """A question about one of the keys whose home is that node (``ours``), or another one."""
    keys = [bytes([n]) * 32 for n in range(256)]
    key = [key for key in keys if (fleet.homes.now(key) == fleet.host.id) is ours][number]
    return Question(key=key, claim=key[:16], method="GET", identity="", selecting={})


def met(*runners: Runner) -> None:
    for runner in runners:
        assert runner.transport.wait_until_joined(30)
        assert eventually(lambda runner=runner: runner.stat("connected_peers") == len(runners) - 1)


def at_once(*calls: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """What the calls return, begun in the same moment in a thread each."""
    gate = threading.Barrier(len(calls))

    def run(call: Callable[[], httpx.Response]) -> httpx.Response:
        gate.wait(10)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def timed(call: Callable[[], httpx.Response]) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    response = call()
    return response, time.monotonic() - began


def begun(call: Callable[[], httpx.Response]) -> Future[httpx.Response]:
    """What ``call`` will return; it runs in a thread of its own."""
    future: Future[httpx.Response] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as exc:
            future.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return future


def still_waiting(futures: list[Future[httpx.Response]]) -> bool:
    """Whether none of them is answered within half a second."""
    return not wait(futures, 0.5, FIRST_COMPLETED).done


def source(response: httpx.Response) -> str:
    return str(response.extensions["caching"]["source"])


# How nodes find each other


def test_three_runners_meet_through_the_registry_directory(fleet: Callable[..., list[Runner]]) -> None:
    runners = fleet(3)
    for runner in runners:
        others = {other.stat("peer_id") for other in runners if other is not runner}
        assert others == {peer["peer_id"] for peer in runner.stat("peers")}


def test_one_bootstrap_address_makes_a_mesh_as_peers_tell_of_peers(start: Start, tmp_path: Path) -> None:
    first = start("a", peer_registry=tmp_path / "of-a")
    assert first.transport.wait_until_joined(30)
    second = start("b", peer_registry=tmp_path / "of-b", bootstrap_peers=tuple(first.addresses))
    met(first, second)
    third = start("c", peer_registry=tmp_path / "of-c", bootstrap_peers=tuple(first.addresses))
    met(first, second, third)
    ways = {peer["peer_id"]: peer["how"] for peer in third.stat("peers")}
    assert {first.stat("peer_id"): "bootstrap", second.stat("peer_id"): "peers"} == ways


def test_runners_that_come_to_one_bootstrap_address_in_the_same_moment_all_meet(start: Start, tmp_path: Path) -> None:
    first = start("first", peer_registry=tmp_path / "of-first")
    assert first.transport.wait_until_joined(30)
    there = tuple(first.addresses)
    rest = [start(name, peer_registry=tmp_path / f"of-{name}", bootstrap_peers=there) for name in "abcde"]
    met(first, *rest)


def test_an_address_that_is_none_is_named_and_the_others_are_used(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = start("a", peer_registry=tmp_path / "of-a")
    assert first.transport.wait_until_joined(30)
    second = start("b", peer_registry=tmp_path / "of-b", bootstrap_peers=("/ip4/nowhere", *first.addresses))
    met(first, second)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "CACHE_BOOTSTRAP_PEERS: '/ip4/nowhere' is not the address of a peer" in said[0]


def test_a_taken_port_gives_way_to_the_next_free_one_which_is_announced(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first = start("a", listen_port=port)
        assert first.transport.wait_until_joined(30)
        assert port < first.port <= port + 100
        second = start("b")
        met(first, second)
        assert [f"/ip4/127.0.0.1/tcp/{first.port}"] == second.stat("peers")[0]["addresses"]


def test_nodes_that_want_the_same_port_at_the_same_moment_never_share_it(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    runners = [start(f"runner-{number}", listen_port=port) for number in range(4)]
    met(*runners)
    assert len({runner.port for runner in runners}) == 4


def test_what_libp2p_logs_about_its_connections_does_not_reach_the_users_log(
    fleet: Callable[..., list[Runner]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    leaving, staying = fleet(2)
    leaving.client.close()
    assert eventually(lambda: staying.stat("connected_peers") == 0)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("libp2p")] == []


# What they share


def test_what_one_has_paid_for_the_other_gets_byte_for_byte(fleet: Callable[..., list[Runner]], origin: Origin) -> None:
    payer, other = fleet(2)
    for target in TARGETS:
        paid, got = payer.get(target), other.get(target)
        assert (paid.status_code, source(paid)) == (200, "origin")
        assert got.status_code == 200
        assert origin.resources[target].body == got.content == paid.content
        ours = {"cache-status", "age", "connection"}
        assert {n: v for n, v in paid.headers.items() if n not in ours} == {
            n: v for n, v in got.headers.items() if n not in ours
        }
    assert len(TARGETS) == len(origin.calls)


def test_an_answer_from_a_peer_says_so_in_cache_status(start: Start, origin: Origin) -> None:
    payer = start("a")
    assert payer.transport.wait_until_joined(30)
    assert payer.get(TARGETS[0]).headers["cache-status"] == "p2pcache; fwd=miss; stored"
    late = start("b")
    met(payer, late)
    first, second = late.get(TARGETS[0]), late.get(TARGETS[0])
    assert first.headers["cache-status"].startswith("p2pcache; hit; ttl=")
    assert first.headers["cache-status"].endswith("; detail=peer")
    assert first.extensions["caching"] == {"from_cache": True, "revalidated": False, "stored": False, "source": "peer"}
    assert source(second) == "local"
    assert "detail" not in second.headers["cache-status"]
    assert len(origin.calls) == 1


def test_an_answer_from_a_peer_is_as_old_as_it_is_there(start: Start, origin: Origin) -> None:
    origin.resources["/old"] = Resource(b"{}", fields={"Age": "1000"}, max_age=3000)
    payer = start("a")
    payer.get("/old")
    assert eventually(lambda: int(payer.get("/old").headers["age"]) >= 1001)
    late = start("b")
    met(payer, late)
    got = late.get("/old")
    assert source(got) == "peer"
    assert abs(int(payer.get("/old").headers["age"]) - int(got.headers["age"])) <= 1
    assert int(got.headers["age"]) >= 1001
    assert abs(3000 - int(got.headers["age"]) - int(got.headers["cache-status"].split("ttl=")[1].split(";")[0])) <= 1


def test_a_late_joiner_pulls_what_the_others_hold(start: Start, origin: Origin) -> None:
    first, second = start("a"), start("b")
    met(first, second)
    for number, target in enumerate(TARGETS):
        (first, second)[number % 2].get(target)
    late = start("c")
    met(first, second, late)
    answers = [late.get(target) for target in TARGETS]
    assert [origin.resources[target].body for target in TARGETS] == [answer.content for answer in answers]
    assert {"peer"} == {source(answer) for answer in answers}
    assert len(TARGETS) == len(origin.calls)


def test_a_node_is_not_woken_to_ask_for_those_who_ask_one_thing_after_another(
    start: Start, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    askers: list[str] = []
    put = Questions._put_at_once

    def noted(self: Questions, question: Any, look: Any, *, lent: bool = False) -> bool:
        done = put(self, question, look, lent=lent)
        if done:
            askers.append(threading.current_thread().name)
        return done

    monkeypatch.setattr(Questions, "_put_at_once", noted)
    first = start("first")
    for target in TARGETS:
        first.get(target)
    late = start("late")
    met(first, late)
    askers.clear()
    assert [source(late.get(target)) for target in TARGETS] == ["peer"] * len(TARGETS)
    assert threading.current_thread().name in askers  # the first has the node's thread, which sets its alarm
    assert len(origin.calls) == len(TARGETS)


def test_who_asks_after_a_while_has_an_answer_also_if_the_home_says_nothing(
    fleet: Callable[..., list[Runner]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asker, silent = fleet(2, lookup_timeout=0.25)
    network, here = node_of(asker)
    for link in here.members[node_of(silent)[1].host.id].links:
        monkeypatch.setattr(link, "_write_at_once", lambda _: True)  # as if it had been written
    assert eventually(lambda: here.questions._alarm.deadline == math.inf)
    assert network.ask(question_of(here, ours=False)).result(PROMPT) == Unclaimed()


def test_claims_that_end_before_the_home_is_given_up_leave_each_question_its_end(
    fleet: Callable[..., list[Runner]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asker, other = fleet(2, lookup_timeout=2.0, claim_timeout=0.2)
    network, here = node_of(asker)
    question = question_of(here, ours=True)
    here.store.load(question.key)
    assert isinstance(
        network.ask(question_of(here, ours=False)).result(PROMPT), FleetClaim
    )  # it looks by itself from now on
    assert isinstance(network.ask(question).result(PROMPT), FleetClaim)
    assert network.ask(question).result(PROMPT) is not None  # once the first claim's life is over
    for link in here.members[node_of(other)[1].host.id].links:
        monkeypatch.setattr(link, "_write_at_once", lambda _: True)  # as if it had been written
    assert network.ask(question_of(here, 1, ours=False)).result(2.0 + PROMPT) == Unclaimed()


def test_who_asks_touches_no_disk_in_a_thread_that_may_be_a_loops(
    fleet: Callable[..., list[Runner]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, here = node_of(fleet(2)[0])
    loads, load = list[str](), here.store.load

    def noted(key: bytes) -> Any:
        loads.append(threading.current_thread().name)
        return load(key)

    monkeypatch.setattr(here.store, "load", noted)
    for question in [question_of(here, ours=False), *(question_of(here, n, ours=True) for n in range(20))]:
        assert isinstance(network.ask(question).result(PROMPT), FleetClaim)
    assert set(loads) == {"p2pcache-node"}


def test_what_is_granted_to_who_was_interrupted_while_asking_goes_back(
    fleet: Callable[..., list[Runner]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, here = node_of(fleet(2)[0])
    questions, sent = [question_of(here, n, ours=False) for n in range(2)], Questions._sent_at_once
    assert isinstance(network.ask(questions[0]).result(PROMPT), FleetClaim)  # it looks by itself from now on

    def interrupted(self: Questions, *arguments: Any, **options: Any) -> bool:
        sent(self, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Questions, "_sent_at_once", interrupted)
    assert eventually(lambda: _is_raised(network, questions[1]))
    monkeypatch.undo()
    assert isinstance(network.ask(questions[1]).result(PROMPT), FleetClaim)


def _is_raised(network: EmbeddedNode, question: Question) -> bool:
    """Whether it was asked in this thread, and that interrupted; else the node's thread has met the same."""
    with contextlib.suppress(KeyboardInterrupt):
        fleet, turn = network._fleet, network._turn
        assert fleet is not None
        assert turn is not None
        if turn.lent(lambda: fleet.questions._alarm.deadline <= fleet.now() + fleet.questions._look_every):
            network.ask(question)
        return False
    return True


def test_what_is_published_while_the_home_looks_for_it_is_given_and_not_granted(
    fleet: Callable[..., list[Runner]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (asker, _), (_, there) = map(node_of, fleet(2))
    home, store, find = there.home, there.store, there.home.find
    entries = (_entry(f"http://127.0.0.1:1/{n}", b"published") for n in range(100))
    entry, key = next((e, k) for e, k in entries if there.homes.now(k, local=True) == there.host.id)

    async def slowly(question: Question) -> Any:
        found = await find(question)
        if found is None:
            store.save(entry)
            home.ended(question.claim, None, Verdict.PUBLISHED)
        return found

    monkeypatch.setattr(there.shelf, "at_hand", lambda _: None)  # as if another thread had the store
    monkeypatch.setattr(home, "find", slowly)
    question = Question(key=key, claim=bytes(16), method="GET", identity=entry.identity, selecting={}, local=True)
    assert isinstance(asker.ask(question).result(PROMPT), network_module.Found)


def test_three_runners_that_ask_for_one_cold_url_at_once_cost_one_call(
    fleet: Callable[..., list[Runner]], origin: Origin
) -> None:
    runners = fleet(3)
    origin.latency = 0.2
    for target in TARGETS:
        answers = at_once(*(lambda runner=runner, target=target: runner.get(target) for runner in runners))
        assert [origin.resources[target].body] * 3 == [answer.content for answer in answers]
        assert sorted(source(answer) for answer in answers) == ["origin", "peer", "peer"]
    assert [call.target for call in origin.calls] == TARGETS


def test_a_stale_entry_is_revalidated_once_for_the_fleet_and_is_fresh_everywhere_then(
    fleet: Callable[..., list[Runner]], origin: Origin
) -> None:
    # Its first answer is stale from the start, by its Age; the 304 that follows bears none.
    origin.resources["/aged"] = Resource(b'{"aged": true}', fields={"Age": "60"}, max_age=60)
    runners = fleet(3)
    runners[0].get("/aged")
    assert eventually(lambda: [runner.stat("cache_size") for runner in runners] == [1, 1, 1])
    origin.latency = 0.2
    answers = at_once(*(lambda runner=runner: runner.get("/aged") for runner in runners))
    assert [answer.content for answer in answers] == [b'{"aged": true}'] * 3
    assert [call.status for call in origin.calls] == [200, 304]
    assert eventually(lambda: all(runner.transport.stats()["received"] for runner in runners[1:]))
    for runner in runners:
        again = runner.get("/aged")
        assert (source(again), again.content) == ("local", b'{"aged": true}')
        assert int(again.headers["age"]) < 30
    assert [call.status for call in origin.calls] == [200, 304]


def test_a_post_through_one_runner_invalidates_at_all_others(
    fleet: Callable[..., list[Runner]], origin: Origin
) -> None:
    runners = fleet(3)
    for runner in runners:
        runner.get(TARGETS[0])
        runner.get(TARGETS[1])
    assert len(origin.calls) == 2
    assert runners[0].client.post(TARGETS[0], content=b'{"new": 1}').status_code == 200
    for runner in runners:
        assert runner.get(TARGETS[0]).content == b'{"new": 1}'
        assert origin.resources[TARGETS[1]].body == runner.get(TARGETS[1]).content
    methods = [(call.method, call.target) for call in origin.calls]
    assert [("POST", TARGETS[0]), ("GET", TARGETS[0])] == methods[2:]


def test_a_private_answer_is_never_served_to_another_token(start: Start, origin: Origin) -> None:
    one, other = start("a"), start("b", token="ghp_another")
    met(one, other)
    origin.forbid("Bearer ghp_another", TARGETS[0])
    assert one.get(TARGETS[0]).status_code == 200
    assert ((refused := other.get(TARGETS[0])).status_code, source(refused)) == (404, "origin")
    assert ((again := one.get(TARGETS[0])).status_code, source(again)) == (200, "local")


def test_a_public_answer_serves_everybody(start: Start, origin: Origin) -> None:
    anonymous, somebody = start("a", token=None), start("b", token=None)
    met(anonymous, somebody)
    assert source(anonymous.get(TARGETS[0])) == "origin"
    assert origin.resources[TARGETS[0]].body == somebody.get(TARGETS[0]).content
    assert len(origin.calls) == 1


# What does not go as planned


def test_a_response_that_may_not_be_stored_lets_those_who_wait_go_on_at_once(
    fleet: Callable[..., list[Runner]], origin: Origin
) -> None:
    origin.resources["/secret"] = Resource(b"{}", fields={"Cache-Control": "no-store"}, max_age=None)
    runners = fleet(3, claim_timeout=30.0)
    origin.latency = 0.3
    answers, seconds = zip(
        *at_once(*(lambda runner=runner: timed(lambda: runner.get("/secret")) for runner in runners)), strict=True
    )
    assert [(answer.content, source(answer)) for answer in answers] == [(b"{}", "origin")] * 3
    assert max(seconds) < 4.0
    assert len(origin.calls) == 3


class Gated(httpx.BaseTransport):
    """Reaches the origin only when ``gate`` is set; then it fails, or goes on with httpx's own transport."""

    def __init__(self, *, fails: bool) -> None:
        self.reached = threading.Event()
        self.gate = threading.Event()
        self._fails = fails
        self._inner = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.reached.set()
        assert self.gate.wait(20)
        if self._fails:
            raise httpx.ConnectError("the network is down", request=request)
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


def test_when_the_origin_call_of_one_fails_the_others_are_answered_by_one_more_call(
    start: Start, origin: Origin
) -> None:
    broken = Gated(fails=True)
    claimant = start("a", next_transport=broken, claim_timeout=30.0)
    others = [start("b", claim_timeout=30.0), start("c", claim_timeout=30.0)]
    met(claimant, *others)
    failed = begun(lambda: claimant.get(TARGETS[0]))
    assert broken.reached.wait(10)
    waiting = [begun(lambda runner=runner: runner.get(TARGETS[0])) for runner in others]
    assert still_waiting(waiting)
    broken.gate.set()
    assert [origin.resources[TARGETS[0]].body] * 2 == [answer.result(5).content for answer in waiting]
    with pytest.raises(httpx.ConnectError, match="the network is down"):
        failed.result(5)
    assert len(origin.calls) == 1


def test_when_one_closes_its_response_unread_the_others_are_answered_by_one_more_call(
    fleet: Callable[..., list[Runner]], origin: Origin
) -> None:
    claimant, *others = fleet(3, claim_timeout=30.0)
    with claimant.client.stream("GET", TARGETS[0]) as response:
        assert response.status_code == 200
        waiting = [begun(lambda runner=runner: runner.get(TARGETS[0])) for runner in others]
        assert still_waiting(waiting)
    assert [origin.resources[TARGETS[0]].body] * 2 == [answer.result(5).content for answer in waiting]
    assert len(origin.calls) == 2


def test_when_a_claimant_leaves_the_others_are_answered(start: Start, origin: Origin) -> None:
    slow = Gated(fails=False)
    claimant = start("a", next_transport=slow, claim_timeout=30.0)
    others = [start("b", claim_timeout=30.0), start("c", claim_timeout=30.0)]
    met(claimant, *others)
    late = begun(lambda: claimant.get(TARGETS[0]))
    assert slow.reached.wait(10)
    waiting = [begun(lambda runner=runner: runner.get(TARGETS[0])) for runner in others]
    assert still_waiting(waiting)
    claimant.transport.close()
    assert [origin.resources[TARGETS[0]].body] * 2 == [answer.result(5).content for answer in waiting]
    assert len(origin.calls) == 1
    slow.gate.set()
    assert origin.resources[TARGETS[0]].body == late.result(5).content


def test_another_secret_and_another_fleet_share_nothing_and_lose_nothing(start: Start, origin: Origin) -> None:
    one = start("a")
    assert one.transport.wait_until_joined(30)
    there = {"bootstrap_peers": tuple(one.addresses)}
    strangers = [
        start("other-secret", shared_secret="fedcba9876543210" * 4, **there),
        start("other-fleet", fleet="octo-org/elsewhere", **there),
    ]
    mate = start("b")
    assert eventually(lambda: one.stat("rejected") >= 2)
    met(one, mate)
    for runner in strangers:
        assert runner.transport.wait_until_joined(30)
        assert runner.stat("connected_peers") == 0
    runners = [one, *strangers, mate]
    for target in TARGETS[:4]:
        answers = at_once(*(lambda runner=runner, target=target: runner.get(target) for runner in runners))
        assert [origin.resources[target].body] * 4 == [answer.content for answer in answers]
        assert sum(call.target == target for call in origin.calls) == 3
        assert [source(answer) for answer in answers[1:3]] == ["origin", "origin"]


# Peers that are ill


@contextlib.contextmanager
def listening(said: bytes) -> Iterator[str]:
    """A TCP listener that accepts, says ``said`` and never anything else: its multiaddr, with a made-up peer ID."""
    server = socket.create_server(("127.0.0.1", 0))
    accepted: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            accepted.append(connection)
            with contextlib.suppress(OSError):
                connection.sendall(said)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        made_up_id = ID.from_pubkey(create_new_key_pair().public_key)
        yield f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}/p2p/{made_up_id}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)
        for connection in accepted:
            connection.close()


def all_right(runners: list[Runner], origin: Origin, targets: list[str], within: float = PROMPT) -> None:
    """Every answer that each of the runners gets is the origin's, and comes in time."""
    for target in targets:
        for runner in runners:
            response, seconds = timed(lambda runner=runner, target=target: runner.get(target))
            assert (200, origin.resources[target].body) == (response.status_code, response.content)
            assert seconds < within


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"", id="deaf"),
        pytest.param(random.Random(1).randbytes(100_000), id="garbage"),
        pytest.param(b"\x13/multistream/1.0.0\n" + b"\xff" * 1000, id="half-a-handshake"),
    ],
)
def test_a_peer_that_is_none_delays_no_request_and_keeps_nobody_from_meeting(
    start: Start, origin: Origin, said: bytes
) -> None:
    with listening(said) as address:
        changes = {"bootstrap_peers": (address,), "join_timeout": 0.0, "lookup_timeout": 0.25}
        runners = [start("a", **changes), start("b", **changes)]
        all_right(runners, origin, TARGETS[:4])
        met(*runners)
        all_right(runners, origin, TARGETS)


def test_garbage_sent_to_a_node_does_not_disturb_it(fleet: Callable[..., list[Runner]], origin: Origin) -> None:
    runners = fleet(2)
    with contextlib.ExitStack() as open_connections:
        for number in range(30):
            connection = socket.create_connection(("127.0.0.1", runners[number % 2].port), timeout=5)
            open_connections.enter_context(connection)
            with contextlib.suppress(OSError):
                connection.sendall((b"GET / HTTP/1.1\r\n\r\n", b"", random.Random(number).randbytes(5000))[number % 3])
        all_right(runners, origin, TARGETS)
    assert len(TARGETS) == len(origin.calls)
    assert [runner.stat("connected_peers") for runner in runners] == [1, 1]


class ScriptedMember:
    """A member of the fleet, in its own trio thread, that holds the secret and says what it is told to say."""

    def __init__(self, keyring: Keyring, answer: Callable[[Keyring, Ask], bytes]) -> None:
        self._keyring = keyring
        self._answer = answer
        self._started = threading.Event()
        self._stop: Callable[[], None]
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)
        self.asked = 0
        self.address = ""
        self.heard: list[Any] = []

    def __enter__(self) -> ScriptedMember:
        self._thread.start()
        assert self._started.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self._host = Host(self._serve)
        self._token, stopping = trio.lowlevel.current_trio_token(), trio.Event()
        self._to_say, self._said = trio.open_memory_channel[bytes](100)
        self._stop = lambda: self._token.run_sync_soon(stopping.set)
        async with self._host.listening("127.0.0.1", 0) as port:
            address = f"/ip4/127.0.0.1/tcp/{port}"
            self.address = f"{address}/p2p/{self._host.id}"
            self._started.set()
            await stopping.wait()

    async def _serve(self, stream: Any, peer_id: ID) -> None:
        ours, theirs = self._host.id.to_bytes(), peer_id.to_bytes()
        with contextlib.suppress(Exception):
            await admit(
                stream, self._keyring.admission, dialler=theirs, listener=ours, dialled=False, nonce=os.urandom(32)
            )
            await stream.write(pack(Introduce([], proof_of_place(ours, theirs), [], 2**23, False)) + pack(Ready(1)))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, stream)
                while True:
                    message = unpack(await read_frame(stream, 10_000_000))
                    self._to_say.send_nowait(self._reply(message))
                    self.heard.append(message)

    async def _pass_on(self, stream: Any) -> None:
        async for frame in self._said:
            await stream.write(frame)

    def say(self, frame: Any) -> None:
        """Send a frame over the link to the one node that has dialled us."""
        self._token.run_sync_soon(self._to_say.send_nowait, pack(frame))

    def _reply(self, message: Any) -> bytes:
        if isinstance(message, Ask):
            self.asked += 1
            return self._answer(self._keyring, message)
        if isinstance(message, Ready):
            return pack(Inventory(message.call, [], []))
        if isinstance(message, (Ping, Invalidate)):
            return pack(Done(message.call))
        if isinstance(message, Publish):
            return pack(Published(message.call, [], False))
        return b""


def _another_entry(keyring: Keyring, ask: Ask) -> bytes:
    sealed = keyring.seal(b"\x90", b"entry " + ask.question.key)
    return pack(Found(ask.call, sealed, 0.0))


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda keyring, ask: b"", id="says-nothing"),
        pytest.param(lambda keyring, ask: b"\x00\x00\x00\x05hello", id="says-what-is-no-frame"),
        pytest.param(lambda keyring, ask: b"\xff" * 64, id="names-an-impossible-length"),
        pytest.param(lambda keyring, ask: pack(Found(ask.call, os.urandom(500), 0.0)), id="finds-what-does-not-open"),
        pytest.param(_another_entry, id="finds-what-is-no-entry"),
        pytest.param(lambda keyring, ask: pack(Granted(ask.call, 1, b"junk", 1.0)), id="grants-with-junk"),
        pytest.param(lambda keyring, ask: pack(Granted(ask.call, 1, b"", 0.0)) * 5, id="answers-too-often"),
        pytest.param(lambda keyring, ask: pack(Found(ask.call + 7, b"", 0.0)), id="answers-another-call"),
    ],
)
def test_a_member_that_misbehaves_fails_no_request_and_delays_none(
    start: Start, origin: Origin, settings_for: Callable[..., Settings], answer: Callable[[Keyring, Ask], bytes]
) -> None:
    keyring = Keyring(settings_for().shared_secret.encode(), "default")
    with ScriptedMember(keyring, answer) as ill:
        runner = start("a", bootstrap_peers=(ill.address,), lookup_timeout=0.25)
        assert runner.transport.wait_until_joined(30)
        origin.resources.update(made_up(25))  # enough for it to be the home of some
        all_right([runner], origin, list(origin.resources))
        assert ill.asked >= 1
        all_right([runner], origin, list(origin.resources))
        assert len(origin.calls) == 25


def test_what_was_fetched_before_a_write_is_not_taken_from_a_peer_after_it(
    start: Start, origin: Origin, settings_for: Callable[..., Settings]
) -> None:
    keyring = Keyring(settings_for().shared_secret.encode(), "default")
    with ScriptedMember(keyring, lambda keyring, ask: pack(Nothing(ask.call))) as member:
        runner = start("a", token=None, bootstrap_peers=(member.address,))
        assert runner.transport.wait_until_joined(30)
        entry, key = _entry(f"{origin.url}{TARGETS[0]}", b'{"written": "before"}')
        member.say(Push(key, bytes(16), keyring.seal_entry(entry), 0.0))
        assert eventually(lambda: runner.stat("cache_size") == 1)
        assert runner.get(TARGETS[0]).content == b'{"written": "before"}'
        member.say(Invalidate(7, [key]))
        assert eventually(lambda: Done(7) in member.heard)
        assert runner.stat("cache_size") == 0
        # The same answer once more, sealed 30 seconds ago: it has been on its way while the write overtook it.
        member.say(Push(key, bytes(16), keyring.seal_entry(entry), 30.0))
        member.say(Ping(8))
        assert eventually(lambda: Done(8) in member.heard)
        eventually(lambda: runner.stat("cache_size"), 0.5)
        assert origin.resources[TARGETS[0]].body == runner.get(TARGETS[0]).content


def _entry(url: str, body: bytes) -> tuple[Entry, bytes]:
    entry = Entry(
        method="GET",
        url=url,
        identity="",
        selecting={},
        status=200,
        headers={"cache-control": ["public, max-age=600"], "content-type": ["application/json"]},
        body=body,
        digest=body_digest(body),
        initial_age=0.0,
        received=time.time(),
    )
    return entry, cache_key(url)


# How they leave


# The caller goes first, unless somebody waits


@pytest.fixture
def puts_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put off is done by who needs it, or never."""
    monkeypatch.setattr(store_module, "PUT_OFF_SECONDS", 600.0)


@pytest.mark.usefixtures("puts_off")
def test_what_a_client_has_read_is_a_hit_at_once_and_is_counted(start: Start, origin: Origin) -> None:
    runner = start("one")
    assert runner.transport.wait_until_joined(10)
    cold, warm = (timed(lambda: runner.get(TARGETS[0])) for _ in range(2))
    assert (source(cold[0]), source(warm[0])) == ("origin", "local")
    assert warm[1] < PROMPT
    runner.get(TARGETS[1])
    assert runner.stat("stored") == runner.stat("cache_size") == 2
    assert len(origin.calls) == 2


@pytest.mark.usefixtures("puts_off")
@pytest.mark.anyio
async def test_what_an_async_client_has_read_is_a_hit_at_once(
    settings_for: Callable[..., Settings], origin: Origin
) -> None:
    transport = P2PCacheTransport(settings=settings_for())
    assert await anyio.to_thread.run_sync(transport.wait_until_joined)
    async with httpx.AsyncClient(transport=transport, base_url=origin.url) as client:
        with anyio.fail_after(PROMPT):
            sources = [source(await client.get(TARGETS[0])) for _ in range(2)]
    assert sources == ["origin", "local"]


@pytest.mark.usefixtures("puts_off")
def test_threads_that_wait_for_what_one_fetches_have_it_at_once(start: Start, origin: Origin) -> None:
    runner = start("one")
    assert runner.transport.wait_until_joined(10)
    began = time.monotonic()
    responses = at_once(*[lambda: runner.get(TARGETS[0])] * 4)
    assert time.monotonic() - began < PROMPT
    assert {response.status_code for response in responses} == {200}
    assert len(origin.calls) == 1


@pytest.mark.usefixtures("puts_off")
def test_a_runner_that_closes_has_published_what_it_has_read(start: Start) -> None:
    staying, leaving = start("staying"), start("leaving")
    met(staying, leaving)
    leaving.get(TARGETS[0])
    assert staying.stat("received") == 0
    leaving.client.close()
    assert eventually(lambda: staying.stat("received") == 1)


@pytest.mark.usefixtures("puts_off")
def test_nothing_is_put_off_in_a_fleet_whose_members_ask_for_the_same(start: Start) -> None:
    holder = start("holder")
    assert holder.transport.wait_until_joined(10)
    holder.get(TARGETS[0])
    joiner = start("joiner")
    met(holder, joiner)
    assert source(joiner.get(TARGETS[0])) == "peer"  # by which both know
    for one, other, target in ((holder, joiner, TARGETS[1]), (joiner, holder, TARGETS[2])):
        before = other.stat("received")
        one.get(target)
        assert eventually(lambda: other.stat("received") == before + 1)  # noqa: B023 - called at once


def test_close_returns_soon_and_leaves_no_thread_no_port_and_no_registry_file(
    fleet: Callable[..., list[Runner]], tmp_path: Path
) -> None:
    leaving, staying = fleet(2)
    port, before = leaving.port, set((tmp_path / "registry").iterdir())
    threads = [thread for thread in threading.enumerate() if thread.name == "p2pcache-node"]
    assert (len(before), len(threads)) == (2, 2)
    began = time.monotonic()
    leaving.client.close()
    assert time.monotonic() - began < 2.0
    assert sum(thread.is_alive() for thread in threads) == 1
    assert len(list((tmp_path / "registry").iterdir())) == 1
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        probe.listen()
    assert eventually(lambda: staying.stat("connected_peers") == 0, 2.0)


# The registry


def test_the_registry_tells_a_stranger_nothing(fleet: Callable[..., list[Runner]], tmp_path: Path) -> None:
    runners = fleet(2)
    files = list((tmp_path / "registry").iterdir())
    assert len(files) == 2
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        shown = file.name.encode() + file.read_bytes()
        for runner in runners:
            port, peer_id = runner.port, runner.stat("peer_id")
            hidden = [b"127.0.0.1", str(port).encode(), peer_id.encode()]
            # A short name alone may be in any random bytes.
            hidden += [msgspec.msgpack.encode(socket.gethostname()), msgspec.json.encode(socket.gethostname())]
            hidden += [ID.from_base58(peer_id).to_bytes(), runner.transport.settings.shared_secret.encode()]
            assert [one for one in hidden if one in shown] == []
    assert stat.S_IMODE((tmp_path / "registry").stat().st_mode) == 0o700


def test_what_does_not_belong_into_the_registry_is_ignored_and_what_is_old_is_removed(
    start: Start, origin: Origin, tmp_path: Path, settings_for: Callable[..., Settings]
) -> None:
    first = start("a")
    assert first.transport.wait_until_joined(30)
    registry = tmp_path / "registry"
    (good,) = registry.iterdir()
    keyring = Keyring(settings_for().shared_secret.encode(), "default")
    name = good.name.partition("-")[0] + "-{}.peer"

    def sealed(written: float) -> bytes:
        peer_id = ID.from_pubkey(create_new_key_pair().public_key).to_bytes()
        record = Record(peer_id, ["/ip4/127.0.0.1/tcp/1"], socket.gethostname(), written)
        return keyring.seal(msgspec.msgpack.encode(record), b"registry")

    foreign = {
        "README": b"not a peer",
        name.format("half"): good.read_bytes()[:40],
        name.format("empty"): b"",
        name.format("garbage"): os.urandom(300),
        name.format("large"): os.urandom(100_000),
        name.format("no-record"): keyring.seal(b"\x93\x01\x02\x03", b"registry"),
        "0123456789abcdef-other-fleet.peer": os.urandom(200),
    }
    for file, content in foreign.items():
        (registry / file).write_bytes(content)
    (registry / name.format("directory")).mkdir()
    os.mkfifo(registry / name.format("fifo"))
    (registry / name.format("link")).symlink_to(good)
    expired = registry / name.format("expired")
    expired.write_bytes(sealed(time.time() - 2000))
    os.utime(expired, 2 * (time.time() - 2000,))
    second = start("b")
    met(first, second)
    assert origin.resources[TARGETS[0]].body == first.get(TARGETS[0]).content == second.get(TARGETS[0]).content
    assert eventually(lambda: not expired.exists())
    assert foreign == {file: (registry / file).read_bytes() for file in foreign}


def test_a_registry_that_cannot_be_used_is_said_once_and_the_other_ways_are_used(
    start: Start, origin: Origin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no directory")
    first = start("a")
    assert first.transport.wait_until_joined(30)
    lost = start("b", peer_registry=tmp_path / "file", bootstrap_peers=tuple(first.addresses))
    met(first, lost)
    first.get(TARGETS[0])
    assert source(lost.get(TARGETS[0])) == "peer" or len(origin.calls) == 1
    first.client.close()  # several looks at the registry later ...
    assert eventually(lambda: lost.stat("connected_peers") == 0)
    said = [record.getMessage() for record in caplog.records if "cannot be used to find peers" in record.getMessage()]
    assert len(said) == 1


# What can be seen from outside


class RecordingProxy:
    """Forwards TCP connections to ``port``, and keeps every byte of both directions."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.port = self._server.getsockname()[1]
        self.recorded: list[tuple[int, bytes]] = []  # which connection and direction, what

    def __enter__(self) -> RecordingProxy:
        self._begin(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for one in [self._server, *self._sockets]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(5)
        for one in [self._server, *self._sockets]:
            one.close()

    def _begin(self, func: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=func, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                here = self._server.accept()[0]
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [here, there]
            self._begin(self._forward, here, there)
            self._begin(self._forward, there, here)

    def _forward(self, one: socket.socket, other: socket.socket) -> None:
        number = one.fileno()
        with contextlib.suppress(OSError):
            while chunk := one.recv(65536):
                self.recorded.append((number, chunk))
                other.sendall(chunk)
            other.shutdown(socket.SHUT_WR)

    def directions(self) -> list[bytes]:
        """All that was said, one item for each direction of each connection."""
        numbers = {number for number, _ in self.recorded}
        return [b"".join(chunk for which, chunk in self.recorded if which == number) for number in numbers]


def test_neither_token_nor_secret_nor_answer_can_be_read_on_the_wire_or_on_the_disk(
    start: Start, origin: Origin, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    target = TARGETS[6]
    with RecordingProxy(port) as proxy:
        way = f"/ip4/127.0.0.1/tcp/{proxy.port}"
        behind = start("a", listen_port=port, announce_addrs=(way,), peer_registry=tmp_path / "of-a")
        assert behind.transport.wait_until_joined(30)
        assert (port, [way]) == (port, behind.stat("addresses"))
        front = start("b", peer_registry=tmp_path / "of-b", bootstrap_peers=tuple(behind.addresses))
        met(behind, front)
        paid, got = front.get(target), behind.get(target)
        assert (paid.content, 1) == (got.content, len(origin.calls))
        told, asked = behind.get(TARGETS[7]), front.get(TARGETS[7])
        assert (told.content, 2) == (asked.content, len(origin.calls))
        assert eventually(lambda: sum(len(chunk) for _, chunk in proxy.recorded) > len(paid.content) / 4)
        for client in (behind.client, front.client):
            client.close()
        seen = proxy.directions()
    assert len(seen) >= 2
    secret = behind.transport.settings.shared_secret
    hidden = [TOKEN, secret, target, "octo-org", "max-age"]
    assert [word for word in hidden for said in seen if word.encode() in said] == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(target.encode() in path.read_bytes() for path in files), "nothing was stored: nothing was looked at"
    assert [(word, path) for word in (TOKEN, secret) for path in files if word.encode() in path.read_bytes()] == []

"""Members that hold the secret and are hostile, and strangers that do not: over real libp2p on 127.0.0.1.

The law that is tested: peers may save a call or be ignored. They never fail a request, never delay one beyond the
look-up budget (and the wait for a claim where it was told to wait), never falsify one. Memory stays bounded.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hishel
import httpx
import msgspec
import pytest
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.machine import proof_of_place
from httpx_p2pcache.node.questions import VAIN_WAITS
from httpx_p2pcache.testing import Origin, Resource, made_up

pytest.importorskip("libp2p")

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.entries import Entry, Keyring, body_digest, cache_key, claim_key
from httpx_p2pcache.network import Question
from httpx_p2pcache.node.host import Host
from httpx_p2pcache.node.link import Link
from httpx_p2pcache.node.presence import PING_SECONDS
from httpx_p2pcache.node.protocol import (
    Acquainted,
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
    Release,
    TellCounts,
    TellQuota,
    Wait,
    admit,
    pack,
    read_frame,
    unpack,
)
from httpx_p2pcache.quota import Quota

pytestmark = pytest.mark.p2p

TOKEN = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"
ACCEPT = "application/vnd.github+json"
BUDGET = 0.25  # CACHE_LOOKUP_TIMEOUT
PROMPT = BUDGET + 1.0  # with a margin for the origin and a busy machine
TARGETS = [f"/repos/octo-org/repo-{number}" for number in range(25)]
PUBLIC = {"cache-control": ["public, max-age=600"], "content-type": ["application/json"]}
MIB = 1024**2


# A hostile member


Reply = Callable[["Hostile", Any], bytes]


def honest(member: Hostile, message: Any) -> bytes:
    """What a member says that has nothing and wants nothing."""
    if isinstance(message, Ask):
        return pack(Nothing(message.call))
    if isinstance(message, Ready):
        return pack(Inventory(message.call, [], []))
    if isinstance(message, (Ping, Invalidate)):
        return pack(Done(message.call))
    if isinstance(message, Publish):
        return pack(Published(message.call, [], True))
    return b""


def asked(answer: Callable[[Hostile, Ask], bytes]) -> Reply:
    """Honest but for what it says to a question."""

    def reply(member: Hostile, message: Any) -> bytes:
        return answer(member, message) if isinstance(message, Ask) else honest(member, message)

    return reply


class Hostile:
    """A host in its own trio thread; with the secret it is a member. Whoever dials it is answered by ``reply``."""

    def __init__(self, secret: str, reply: Reply = honest) -> None:
        self.keyring = Keyring(secret.encode(), "default")
        self._reply = reply
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)
        self._streams: list[Any] = []
        self._writing = trio.Lock()
        self.heard: list[Any] = []
        self.address = self.here = ""
        self.elsewhere = False  # as it says

    def __enter__(self) -> Hostile:
        self._thread.start()
        assert self._started.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.token.run_sync_soon(self._stopping.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self.host = Host(self.serve)
        self.token, self._stopping = trio.lowlevel.current_trio_token(), trio.Event()
        async with self.host.listening("127.0.0.1", 0) as port, trio.open_nursery() as self._nursery:
            self.listens = f"/ip4/127.0.0.1/tcp/{port}"
            self.address = f"{self.listens}/p2p/{self.host.id}"
            self._started.set()
            await self._stopping.wait()
            self._nursery.cancel_scope.cancel()

    async def serve(self, stream: Any, peer_id: ID, *, dialled: bool = False) -> None:
        ours, theirs = self.host.id.to_bytes(), peer_id.to_bytes()
        dialler, listener = (ours, theirs) if dialled else (theirs, ours)
        with contextlib.suppress(Exception):
            await admit(
                stream,
                self.keyring.admission,
                dialler=dialler,
                listener=listener,
                dialled=dialled,
                nonce=os.urandom(32),
            )
            self.here = "" if self.elsewhere else proof_of_place(ours, theirs)  # to who has come last
            await stream.write(pack(Introduce([self.listens], self.here, [], 2**23, False)) + pack(Ready(1)))
            self._streams.append(stream)
            while True:
                message = unpack(await read_frame(stream, 10_000_000))
                self.heard.append(message)
                said = self._reply(self, message)
                if said:
                    async with self._writing:
                        await stream.write(said)

    def say(self, *said: Any) -> None:
        """Frames, or bytes as they are, to everybody who has admitted us."""
        data = b"".join(one if isinstance(one, bytes) else pack(one) for one in said)

        async def write(stream: Any) -> None:
            with contextlib.suppress(Exception):
                async with self._writing:  # a long frame is written piece by piece
                    await stream.write(data)

        assert eventually(lambda: self._streams)
        for stream in list(self._streams):
            self.token.run_sync_soon(self._nursery.start_soon, write, stream)

    def questions(self) -> int:
        return sum(isinstance(message, Ask) for message in self.heard)


async def until(predicate: Callable[[], object]) -> None:
    """The caller sets the deadline."""
    for _ in itertools.count():
        if predicate():
            return
        await trio.sleep(0.01)


def an_entry(url: str, body: bytes = b'{"forged": true}', **changes: Any) -> Entry:
    plain: dict[str, Any] = {
        "method": "GET",
        "url": url,
        "identity": "",
        "selecting": {},
        "status": 200,
        "headers": PUBLIC,
        "body": body,
        "digest": body_digest(body),
        "initial_age": 0.0,
        "received": time.time(),
    }
    return Entry(**(plain | changes))


# Those who are attacked


@dataclass
class Runner:
    transport: P2PCacheTransport
    client: httpx.Client

    def get(self, target: str, **options: Any) -> httpx.Response:
        return self.client.get(target, **options)

    def stat(self, name: str) -> Any:
        return self.transport.stats()[name]

    @property
    def port(self) -> int:
        return int(self.stat("addresses")[0].rsplit("/", 1)[1])

    @property
    def address(self) -> str:
        return f"{self.stat('addresses')[0]}/p2p/{self.stat('peer_id')}"


Start = Callable[..., Runner]


def runners_of(settings_for: Callable[..., Settings], origin: Origin, **plain: object) -> Iterator[Start]:
    """What a fixture ``start`` yields: ``start("a")`` is a runner that has joined; all are closed at the end."""
    origin.resources.update(made_up(len(TARGETS)))
    runners: list[Runner] = []

    def begin(name: str, *, token: str | None = TOKEN, **changes: object) -> Runner:
        transport = P2PCacheTransport(settings=settings_for(name, **(plain | changes)))
        headers = {"Accept": ACCEPT} | ({"Authorization": f"Bearer {token}"} if token else {})
        client = httpx.Client(transport=transport, base_url=origin.url, headers=headers, timeout=30.0)
        runners.append(Runner(transport, client))
        assert transport.wait_until_joined(30)
        return runners[-1]

    try:
        yield begin
    finally:
        for runner in runners:
            runner.client.close()


@pytest.fixture
def start(settings_for: Callable[..., Settings], origin: Origin) -> Iterator[Start]:
    yield from runners_of(settings_for, origin, lookup_timeout=BUDGET, claim_timeout=1.0)


def all_right(runner: Runner, origin: Origin, targets: list[str] = TARGETS, within: float = PROMPT) -> None:
    """Every answer is the origin's, and comes in time."""
    for target in targets:
        began = time.monotonic()
        response = runner.get(target)
        assert (200, origin.resources[target].body) == (response.status_code, response.content)
        assert time.monotonic() - began < within


def url_of(member: Hostile, ask: Ask, origin_url: str) -> str:
    """The URL that is asked for: a member that has seen a fleet's URLs knows their keys."""
    return next((f"{origin_url}{t}" for t in TARGETS if cache_key(f"{origin_url}{t}") == ask.question.key), origin_url)


# Wrong answers to a look-up


FORGERIES: dict[str, dict[str, Any]] = {
    "another-identity": {"identity": "0" * 32, "headers": {"cache-control": ["private, max-age=600"]}},
    "an-etag-of-its-own": {"identity": "0" * 32, "headers": {"cache-control": ["max-age=600"], "etag": ['"forged"']}},
    "date-in-the-future": {"headers": PUBLIC | {"date": ["Fri, 31 Dec 2100 23:59:59 GMT"]}},
    "set-cookie": {"headers": PUBLIC | {"set-cookie": ["session=forged"]}},
    "link-to-another-origin": {"headers": PUBLIC | {"link": ['<https://evil.test/2>; rel="next"']}},
    "control-bytes-in-a-name": {"headers": PUBLIC | {"x\r\nset-cookie": ["a=b"]}},
    "control-bytes-in-a-value": {"headers": PUBLIC | {"x": ["a\r\nset-cookie: a=b"]}},
    "many-fields": {"headers": PUBLIC | {f"x-{number}": ["y"] for number in range(50_000)}},
    "a-field-of-a-megabyte": {"headers": PUBLIC | {"x": ["y" * MIB]}},
    "a-status-that-is-none": {"status": 999},
    "a-body-beyond-the-limit": {"body": bytes(8 * MIB + 1), "digest": body_digest(bytes(8 * MIB + 1))},
    "a-digest-of-another-body": {"digest": bytes(16)},
    "an-impossible-age": {"initial_age": 1e300},
    "a-negative-age": {"initial_age": -1e9},
    "not-storable": {"headers": {"cache-control": ["no-store"]}},
    "a-length-that-is-not-its-own": {"headers": PUBLIC | {"content-length": ["5"]}},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_entry_is_never_an_answer(start: Start, origin: Origin, secret: str, name: str) -> None:
    def forge(member: Hostile, ask: Ask) -> bytes:
        entry = an_entry(url_of(member, ask, origin.url), **FORGERIES[name])
        return pack(Found(ask.call, member.keyring.seal_entry(entry), 0.0))

    with Hostile(secret, asked(forge)) as member:
        runner = start("a", token=None, bootstrap_peers=(member.address,))
        all_right(runner, origin)
        assert member.questions() >= 1


def _other_key(member: Hostile, ask: Ask) -> bytes:
    entry = an_entry("https://api.github.com/another")
    return pack(Found(ask.call, member.keyring.seal_entry(entry), 0.0))


def _other_url_under_this_key(member: Hostile, ask: Ask) -> bytes:
    plain = msgspec.msgpack.encode(an_entry("https://api.github.com/another"))
    return pack(Found(ask.call, member.keyring.seal(plain, b"entry " + ask.question.key), 0.0))


ANSWERS: dict[str, Callable[[Hostile, Ask], bytes]] = {
    "another-key": _other_key,
    "another-url": _other_url_under_this_key,
    "on-its-way-for-a-year": lambda member, ask: pack(Found(ask.call, b"x" * 28, 31_536_000.0)),
    "on-its-way-for-ever": lambda member, ask: pack(Found(ask.call, b"x" * 28, float("inf"))),
    "two-grants": lambda member, ask: b"".join(
        pack(Granted(ask.call, ask.question.claim, n, b"", 0.0)) for n in (1, 2)
    ),
    "a-grant-for-another-claim": lambda member, ask: pack(Granted(ask.call, bytes(16), 1, b"", 0.0)),
    "grants-of-calls-not-made": lambda member, ask: b"".join(
        pack(Granted(ask.call + n, ask.question.claim, n, b"", 0.0)) for n in range(1, 50)
    ),
    "a-grant-and-nothing": lambda member, ask: (
        pack(Granted(ask.call, ask.question.claim, 1, b"", 0.0)) + pack(Nothing(ask.call))
    ),
    "nothing-twice": lambda member, ask: pack(Nothing(ask.call)) * 2,
    "three-hundred-answers": lambda member, ask: pack(Nothing(ask.call)) * 300,
    "the-answer-of-another-kind": lambda member, ask: pack(Inventory(ask.call, [], [])) + pack(Done(ask.call)),
    "no-msgpack": lambda member, ask: (5).to_bytes(4, "big") + b"\xc1" * 5,
    "nested-arrays": lambda member, ask: (100_000).to_bytes(4, "big") + b"\x91" * 100_000,
    "a-huge-array": lambda member, ask: (5).to_bytes(4, "big") + b"\xdd\xff\xff\xff\xff",
    "a-huge-length": lambda member, ask: b"\xff\xff\xff\xff",
    "no-length": lambda member, ask: bytes(4),
    "half-a-frame": lambda member, ask: pack(Nothing(ask.call))[:-1],
    "a-question-back": lambda member, ask: pack(Ask(ask.call, ask.question)) + pack(Nothing(ask.call)),
    "admission-once-more": lambda member, ask: pack(Introduce([], "elsewhere", [], 0, False)) * 3,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_false_answer_fails_no_request_and_delays_none(start: Start, origin: Origin, secret: str, name: str) -> None:
    with Hostile(secret, asked(ANSWERS[name])) as member:
        runner = start("a", bootstrap_peers=(member.address,))
        all_right(runner, origin)
        assert member.questions() >= 1
        all_right(runner, origin)
        assert len(TARGETS) == len(origin.calls)


@pytest.mark.parametrize("times", [1, 2, 3, 50])
def test_who_is_told_to_wait_for_nothing_waits_no_longer_than_for_a_claim(
    start: Start, origin: Origin, secret: str, times: int
) -> None:
    with Hostile(secret, asked(lambda member, ask: pack(Wait(ask.call)) * times)) as member:
        runner = start("a", bootstrap_peers=(member.address,), claim_timeout=0.5)
        all_right(runner, origin, TARGETS[:12], within=PROMPT + 0.5)
        assert member.questions() >= 1


def test_a_home_that_has_had_us_wait_for_nothing_is_not_waited_for_again(
    start: Start, origin: Origin, secret: str
) -> None:
    waited = []
    with Hostile(secret, asked(lambda member, ask: pack(Wait(ask.call)))) as member:
        runner = start("a", bootstrap_peers=(member.address,), claim_timeout=1.0)
        assert runner.transport.wait_until_joined(10)
        for target in TARGETS:
            began = time.monotonic()
            assert runner.get(target).status_code == 200
            waited.append(time.monotonic() - began > 0.8)
        assert member.questions() >= VAIN_WAITS + 3
    assert sum(waited) <= VAIN_WAITS + 1, "one more may have been asked before that was waited for in vain"


def test_a_home_that_frees_claims_which_are_not_its_own_changes_nothing(
    start: Start, origin: Origin, secret: str
) -> None:
    runner = start("a")
    with Hostile(secret) as member:
        other = start("b", bootstrap_peers=(member.address,))
        assert eventually(lambda: other.stat("connected_peers") == 2)
        for verdict in Verdict:
            member.say(*(Release(os.urandom(16), n, verdict) for n in range(100)))
        for one in (runner, other):
            all_right(one, origin)
        assert len(origin.calls) <= 2 * len(TARGETS)


def test_what_a_member_fetches_and_never_gives_back_is_waited_for_no_longer_than_a_claim_lives(
    start: Start, origin: Origin, secret: str
) -> None:
    with Hostile(secret) as member:
        runner = start("a", token=None, bootstrap_peers=(member.address,), claim_timeout=0.5)
        for number, target in enumerate(TARGETS[:12]):
            url = f"{origin.url}{target}"
            claim = claim_key(hishel.Request("GET", url, hishel.Headers({"accept": ACCEPT})), "")
            question = Question(key=cache_key(url), claim=claim, method="GET", identity="", selecting={})
            member.say(*(Ask(1000 * (number + 1) + n, question) for n in range(20)))  # and would take it 20 times
        assert eventually(lambda: any(isinstance(message, Granted) for message in member.heard))
        all_right(runner, origin, TARGETS[:12], within=PROMPT + 0.5)


def test_a_member_cannot_pass_an_entry_off_as_one_that_another_token_has_fetched(
    start: Start, origin: Origin, secret: str
) -> None:
    """README: "With tokens of their own, GitHub's 304 proves every body"."""

    def forge(member: Hostile, ask: Ask) -> bytes:
        url = url_of(member, ask, origin.url)
        fields = {"cache-control": ["private, max-age=600"]}
        entry = an_entry(url, identity=ask.question.identity, headers=fields)  # it is told who asks
        return pack(Found(ask.call, member.keyring.seal_entry(entry), 0.0))

    with Hostile(secret, asked(forge)) as member:
        runner = start(
            "a", bootstrap_peers=(member.address,), github_hosts=(origin.netloc,), token="ghs_of_this_job_alone"
        )
        all_right(runner, origin)
        assert member.questions() >= 1


NESTED = b"[" * 100_000


@pytest.mark.parametrize("body", [NESTED, b'["M\xfcller"]'], ids=["nested-deeply", "latin-1"])
def test_another_identitys_body_that_only_begins_like_json_fails_nobodys_request(
    start: Start, origin: Origin, secret: str, body: bytes
) -> None:
    with Hostile(secret) as member:
        runner = start("a", bootstrap_peers=(member.address,), github_hosts=(origin.netloc,))
        entry = an_entry(
            f"{origin.url}{TARGETS[0]}", body, identity="0" * 32, headers={"cache-control": ["max-age=60"]}
        )
        member.say(Push(cache_key(entry.url), bytes(16), member.keyring.seal_entry(entry), 0.0))
        assert eventually(lambda: runner.stat("cache_size") == 1)
        all_right(runner, origin, TARGETS[:2])


def test_a_bomb_of_another_identity_is_not_unpacked(start: Start, origin: Origin, secret: str) -> None:
    import zlib

    pack_ = zlib.compressobj(9, wbits=31)
    body = b"".join([*(pack_.compress(bytes(MIB)) for _ in range(1024)), pack_.flush()])
    assert len(body) < 2 * MIB
    headers = {"cache-control": ["max-age=60"], "content-encoding": ["gzip"]}
    with Hostile(secret) as member:
        runner = start("a", bootstrap_peers=(member.address,), github_hosts=(origin.netloc,))
        entry = an_entry(f"{origin.url}{TARGETS[0]}", body, identity="0" * 32, headers=headers)
        before = resident_bytes()
        member.say(Push(cache_key(entry.url), bytes(16), member.keyring.seal_entry(entry), 0.0))
        assert eventually(lambda: runner.stat("rejected") >= 1), runner.transport.stats()
        all_right(runner, origin, TARGETS[:2])
        assert (runner.stat("cache_size"), resident_bytes() - before < 100 * MIB) == (2, True)


def test_what_takes_long_to_check_holds_up_nobody(start: Start, origin: Origin, secret: str) -> None:
    """One small frame: while a regular expression is at it, no thread of this process does anything."""
    with Hostile(secret) as member:
        runner = start("a", bootstrap_peers=(member.address,))
        all_right(runner, origin, TARGETS[:1])
        entry = an_entry("http://a.test/" + "?" * 8000)
        member.say(Push(cache_key(entry.url), bytes(16), member.keyring.seal_entry(entry), 0.0), Ping(77))
        until = time.monotonic() + 10
        while not any(isinstance(m, Done) and m.call == 77 for m in member.heard) and time.monotonic() < until:
            all_right(runner, origin, TARGETS[:1])


def test_a_peer_that_says_where_others_are_does_not_move_them(start: Start, origin: Origin, secret: str) -> None:
    first, second = start("a"), start("b")
    assert eventually(lambda: first.stat("connected_peers") == 1)
    with Hostile(secret) as member:
        third = start("c", bootstrap_peers=(member.address,))
        assert eventually(lambda: third.stat("connected_peers") == 3)
        theirs = [(ID.from_base58(one.stat("peer_id")).to_bytes(), ["/ip4/127.0.0.1/tcp/1"]) for one in (first, second)]
        member.say(Introduce([member.listens], "", theirs, 2**23, True), Ping(5))
        assert eventually(lambda: any(isinstance(m, Done) and m.call == 5 for m in member.heard))
        for one in (first, second, third):
            all_right(one, origin)
        assert eventually(lambda: third.stat("connected_peers") == 3)


def test_what_a_member_has_said_later_on_another_link_is_not_taken_back(
    start: Start, origin: Origin, secret: str
) -> None:
    """Else it would not be asked as the home that all others ask, and they and we would pay twice."""
    with Hostile(secret) as member:
        runner = start("a", bootstrap_peers=(member.address,))
        all_right(runner, origin, TARGETS[:1])
        for call, (turn, unreached) in enumerate([(5, 0), (4, 3), (6, 2), (3, 1)], 500):
            member.say(Acquainted([], [], unreached, turn), Ping(call))
            assert eventually(lambda call=call: any(isinstance(m, Done) and m.call == call for m in member.heard))
            (peer,) = runner.transport.stats()["peers"]
            assert peer["unreached"] == (0 if turn in (5, 4) else 2)


def test_a_node_says_nothing_before_it_has_introduced_itself(
    start: Start, origin: Origin, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hears first that it is ready, of somebody who is no member yet, would not ask it as a home."""
    send = Link.send

    async def slowly(link: Link, frame: Any) -> None:
        if isinstance(frame, Introduce):
            await trio.sleep(0.3)
        await send(link, frame)

    monkeypatch.setattr(Link, "send", slowly)
    with Hostile(secret) as member:
        runner = start("a", bootstrap_peers=(member.address,))
        all_right(runner, origin, TARGETS[:2])
        assert eventually(lambda: any(isinstance(message, Ready) for message in member.heard))
        assert isinstance(member.heard[0], Introduce)


@pytest.mark.usefixtures("no_multicast")
@pytest.mark.parametrize("talks", [True, False], ids=["talks", "is-silent"])
def test_a_member_that_answers_no_ping_is_dropped_unless_it_is_heard_of(
    start: Start, origin: Origin, secret: str, talks: bool
) -> None:
    """Whoever is too busy to answer in time is not gone: to connect anew would be more work for both."""
    pinged: list[float] = []

    def busy(member: Hostile, message: Any) -> bytes:
        if not isinstance(message, Ping):
            return honest(member, message)
        pinged.append(time.monotonic())
        return b""

    with Hostile(secret, busy) as member:
        runner = start("a", bootstrap_peers=(member.address,))
        assert eventually(lambda: pinged)

        def parted() -> bool:
            if talks:
                member.say(TellCounts("busy", {"requests": len(pinged)}))
            return bool(runner.stat("connected_peers") == 0)

        until = pinged[0] + 2 * PING_SECONDS
        assert eventually(lambda: parted() or time.monotonic() > until, 15.0)
        assert (time.monotonic() > until) == talks
        all_right(runner, origin, TARGETS[:1])


# Floods, from a process of its own: what it does costs the one that is attacked nothing but what it sends


FLOOD_SECONDS = float(os.environ.get("FLOOD_SECONDS", "0.5"))
KINDS = ["push-large", "publish", "introduce", "invalidate", "ask"]
if "FLOOD_SECONDS" in os.environ:  # as in `make fuzz`
    KINDS += ["push", "quota", "counts", "ready", "ping", "grant"]


@pytest.mark.timeout(60 + 10 * FLOOD_SECONDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_flood_delays_no_request_and_fills_no_memory(start: Start, origin: Origin, secret: str, kind: str) -> None:
    runner = start("a", max_size=64 * MIB)
    all_right(runner, origin, TARGETS[:5])
    before = resident_bytes()
    with flooding(secret, runner.address, kind, FLOOD_SECONDS) as process:
        slowest, asked_for = 0.0, 0
        while process.poll() is None:
            target = TARGETS[asked_for % len(TARGETS)]
            began = time.monotonic()
            response = runner.get(target, headers={"Cache-Control": "max-age=0"} if asked_for % 3 == 0 else {})
            slowest = max(slowest, time.monotonic() - began)
            assert origin.resources[target].body == response.content
            asked_for += 1
        said = process.communicate(timeout=10)[0]
    assert int(said) > 0, "there was no flood"
    grown = resident_bytes() - before
    print(f"{kind}: {slowest:.2f} s, {grown // MIB} MiB, {said.strip()} frames, {asked_for} requests")
    assert (slowest < PROMPT, grown < 600 * MIB) == (True, True), f"{slowest:.2f} s, {grown // MIB} MiB, {said} frames"


@pytest.mark.timeout(60 + 10 * FLOOD_SECONDS)
@pytest.mark.parametrize("kind", ["keep-questions", "keep-waiting", "keep-addresses"])
def test_what_a_member_can_have_us_keep_is_bounded(start: Start, origin: Origin, secret: str, kind: str) -> None:
    runner = start("a", claim_timeout=10.0)
    before, most = resident_bytes(), 0
    with flooding(secret, runner.address, kind, 3 * FLOOD_SECONDS) as process:
        while process.poll() is None:
            most = max(most, resident_bytes() - before)
            runner.stat("connected_peers")
            threading.Event().wait(0.02)
        said = process.communicate(timeout=60)[0]
    assert int(said) >= MIB, "it did not say enough"  # it may have been shown out, which is as well
    assert most < 200 * MIB, f"{most // MIB} MiB are kept of {int(said) // MIB} MiB that were said"
    all_right(runner, origin, TARGETS[:5])


@contextlib.contextmanager
def flooding(secret: str, address: str, kind: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, secret, address, kind, str(seconds)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flood(secret: str, address: str, kind: str, seconds: float) -> None:
    """The process that floods: prints how many frames it has sent, or bytes where it is about what is kept."""
    member = Hostile(secret)
    where, _, peer_id = address.rpartition("/p2p/")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(member._main)
            await trio.to_thread.run_sync(member._started.wait)
            stream = await member.host.connect([where], ID.from_base58(peer_id), 10.0)
            nursery.start_soon(partial(member.serve, stream, ID.from_base58(peer_id), dialled=True))
            with trio.fail_after(10):
                await until(lambda: member._streams)
            said = 0
            keeps = kind.startswith("keep")
            # Whoever is shown out has said what it has said.
            with contextlib.suppress(Exception), trio.move_on_after(seconds):
                for data in frames_of(kind, member):
                    await stream.write(data)
                    said += len(data) if keeps else 1
                    member.heard.clear()
                    if said > 320 * MIB:
                        break
                if keeps:  # until all of it has been read
                    await stream.write(pack(Ping(2**40)))
                    await until(lambda: any(isinstance(m, Done) and m.call == 2**40 for m in member.heard))
            print(said, flush=True)
            member._stopping.set()
            nursery.cancel_scope.cancel()

    trio.run(main)


def frames_of(kind: str, member: Hostile) -> Iterator[bytes]:
    chance, number = random.Random(kind), 0
    large = bytes(4 * MIB)
    fat = {"accept": "x" * 8_000}
    while True:
        number += 1
        call, key = number % 2**40, chance.randbytes(32)
        if kind in ("push", "publish", "push-large"):
            entry = an_entry(f"http://a.test/{number}", large if kind == "push-large" else b"[]" * 1000)
            sealed, key = member.keyring.seal_entry(entry), cache_key(entry.url)
            yield pack(
                Publish(call, key, bytes(16), sealed, 0.0) if kind == "publish" else Push(key, key[:16], sealed, 0.0)
            )
        elif kind == "introduce":
            there = [f"/ip4/127.0.0.1/tcp/{chance.randrange(1, 1000)}"]
            members = [(_some_peer(chance), there) for _ in range(1000)]
            yield pack(Introduce(there, member.here, members, 2**23, True))
        elif kind == "quota":
            quota = Quota(
                identity=f"{number:032x}"[-32:],
                resource="core",
                limit=1,
                remaining=0,
                reset=2.0**40,
                refused_until=2.0**40,
                seen=time.time(),
            )
            yield pack(TellQuota(quota))
        elif kind == "counts":
            yield pack(TellCounts(str(number), {str(n): 2**62 for n in range(100)}))
        elif kind == "ready":
            yield pack(Ready(call))
        elif kind == "ping":
            yield pack(Ping(call)) * 100
        elif kind == "invalidate":
            yield pack(Invalidate(call, [chance.randbytes(32) for _ in range(100)]))
        elif kind == "grant":
            yield pack(Granted(call, key[:16], number, b"", 0.0)) * 20
        elif kind == "ask":
            yield pack(Ask(call, Question(key=key, claim=key[:16], method="GET", identity="", selecting={}))) * 20
        elif kind == "keep-questions":  # each is granted, and never given back
            question = Question(key=key, claim=key[:16], method="GET", identity="", selecting=fat)
            yield pack(Ask(call, question))
        elif kind == "keep-waiting":  # all wait for one claim
            question = Question(key=bytes(32), claim=bytes(16), method="GET", identity="", selecting=fat)
            yield pack(Ask(call, question))
        else:
            address = "/ip4/10.0.0.1/tcp/1" + " " * 200
            yield pack(
                Introduce([], "elsewhere", [(_some_peer(chance), [address] * 16) for _ in range(1000)], 0, False)
            )


def _some_peer(chance: random.Random) -> bytes:
    return b"\x00\x24\x08\x01\x12\x20" + chance.randbytes(32)  # the form of an Ed25519 peer ID


# Strangers


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def ended(connection: socket.socket) -> bool:
    """Whether the other end has closed; what it says is thrown away."""
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


# What is left open is one test's business: the others are not to be red for it.
unclosed = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
SAID = {
    "mute": lambda number: b"",
    "rubbish": lambda number: random.Random(number).randbytes(3000),
    "half-a-greeting": lambda number: b"\x13/multistream/1.0.0\n",
    "half-a-handshake": lambda number: b"\x13/multistream/1.0.0\n\x07/noise\n",
}


@pytest.mark.usefixtures("no_multicast")  # which opens sockets of its own, sooner or later
@pytest.mark.parametrize("kind", SAID)
def test_two_hundred_strangers_are_shown_out_and_the_fleet_goes_on(start: Start, origin: Origin, kind: str) -> None:
    first, second = start("a"), start("b")
    assert eventually(lambda: first.stat("connected_peers") == 1)
    all_right(first, origin, TARGETS[:2])
    before = descriptors()
    with contextlib.ExitStack() as stack:
        strangers = []
        for number in range(200):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", first.port), timeout=5))
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.send(SAID[kind](number))
            strangers.append(connection)
        for runner in (first, second):
            all_right(runner, origin)
        assert len(TARGETS) == len(origin.calls)
        until = time.monotonic() + 5.0
        while strangers and time.monotonic() < until:
            strangers = [connection for connection in strangers if not ended(connection)]
            all_right(second, origin, TARGETS[:1])
            threading.Event().wait(0.05)
        left = len(strangers)
    assert eventually(lambda: descriptors() <= before + 5, 15.0), "file descriptors do not come back"
    assert [runner.stat("connected_peers") for runner in (first, second)] == [1, 1]
    assert left == 0, f"{left} of 200 are still connected after five seconds"


def test_while_two_hundred_strangers_are_there_a_new_member_can_join(start: Start, origin: Origin) -> None:
    first = start("a")
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", first.port), timeout=5))
        second = start("b")
        assert eventually(lambda: second.stat("connected_peers") == 1)
        for runner in (first, second):
            all_right(runner, origin)
        assert len(TARGETS) == len(origin.calls)


class Stranger(Hostile):
    """A host without the secret that dials, and opens ``streams`` on which it says ``says``."""

    def call(self, runner: Runner, streams: int, says: bytes) -> threading.Event:
        """The event is set when it has been disconnected."""
        gone = threading.Event()
        where, _, peer_id = runner.address.rpartition("/p2p/")

        async def dial() -> None:
            there = ID.from_base58(peer_id)
            with contextlib.suppress(Exception):
                await self.host._dial([where], there)
                for _ in range(streams):
                    stream = await self.host.connect([where], there, 5.0)
                    await stream.write(says)
            await until(lambda: not self.host._swarm.get_connections(there))
            gone.set()

        self.token.run_sync_soon(self._nursery.start_soon, dial)
        return gone


@pytest.mark.parametrize("streams", [0, 1, 100])
@pytest.mark.parametrize(
    "says", [b"", b"\x00\x00\x00\x10rubbish", b"\x7f\xff\xff\xff"], ids=["mute", "rubbish", "long"]
)
def test_a_stranger_that_is_connected_but_proves_nothing_is_disconnected(
    start: Start, origin: Origin, streams: int, says: bytes
) -> None:
    runner = start("a")
    with Stranger("another secret") as stranger:
        gone = stranger.call(runner, streams, says)
        all_right(runner, origin)
        assert gone.wait(6.0)  # ADMISSION_SECONDS, and a look each second
        assert runner.stat("connected_peers") == 0


@pytest.mark.usefixtures("no_multicast")
def test_a_stranger_that_passes_on_a_proof_is_admitted_by_neither(start: Start, origin: Origin, tmp_path: Path) -> None:
    """The man in the middle: he is dialled by one, dials the other, and passes on every byte of both."""
    second = start("b", peer_registry=tmp_path / "of-b")
    where, _, peer_id = second.address.rpartition("/p2p/")
    passed: list[int] = []

    class Middle(Hostile):
        async def serve(self, stream: Any, peer_id_: ID, *, dialled: bool = False) -> None:
            async def pass_on(one: Any, other: Any) -> None:
                with contextlib.suppress(Exception):
                    while data := await one.read(65536):
                        passed.append(len(data))
                        await other.write(data)
                await one.reset()
                await other.reset()

            there = await self.host.connect([where], ID.from_base58(peer_id), 5.0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pass_on, stream, there)
                nursery.start_soon(pass_on, there, stream)

    with Middle("he does not have it") as middle:
        first = start("a", peer_registry=tmp_path / "of-a", bootstrap_peers=(middle.address,))
        for runner in (first, second):
            all_right(runner, origin)
        assert eventually(lambda: second.stat("rejected") >= 1)
        assert sum(passed) > 100
        assert [runner.stat("connected_peers") for runner in (first, second)] == [0, 0]
        assert len(origin.calls) == 2 * len(TARGETS)


@pytest.mark.usefixtures("no_multicast")
@unclosed
def test_who_answers_under_another_peer_id_than_the_one_that_was_dialled_is_no_member(
    start: Start, origin: Origin, tmp_path: Path
) -> None:
    second = start("b", peer_registry=tmp_path / "of-b")
    made_up_id = ID.from_pubkey(create_new_key_pair().public_key)
    false = f"{second.stat('addresses')[0]}/p2p/{made_up_id}"
    first = start("a", peer_registry=tmp_path / "of-a", bootstrap_peers=(false,))
    for runner in (first, second):
        all_right(runner, origin)
        assert str(made_up_id) not in [peer["peer_id"] for peer in runner.stat("peers")]
        assert runner.stat("connected_peers") == 0


def established(port: int) -> int:
    """How many ends of connections to this port of ours are open."""
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(f":{port:04X}" in f"{line[1]} {line[2]}" and line[3] in ("01", "08") for line in lines)


@pytest.mark.usefixtures("no_multicast")
@unclosed
def test_a_dial_that_meets_another_peer_id_leaves_no_connection_open(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them is tried again and again, for as long as a bootstrap address or a record is wrong."""
    caplog.set_level(logging.DEBUG, "httpx_p2pcache")
    second = start("b", peer_registry=tmp_path / "of-b")
    made_up_id = ID.from_pubkey(create_new_key_pair().public_key)
    gc.collect()
    gc.disable()  # which would close them, some time
    try:
        false = f"{second.stat('addresses')[0]}/p2p/{made_up_id}"
        first = start("a", peer_registry=tmp_path / "of-a", bootstrap_peers=(false,))
        port = int(second.stat("addresses")[0].split("/")[4])

        def dialled() -> int:
            return sum("was not reached" in record.getMessage() for record in caplog.records)

        assert eventually(lambda: dialled() >= 4, 20.0)
        assert eventually(lambda: established(port) == 0)
    finally:
        gc.enable()
        gc.collect()
    assert first.stat("connected_peers") == 0


def test_what_nobody_has_asked_for_is_not_in_the_answer(start: Start, origin: Origin, secret: str) -> None:
    """The key of one resource with the entry of another, pushed, published and found: each stays what it is."""
    origin.resources["/a"], origin.resources["/b"] = Resource(b'{"a": 1}'), Resource(b'{"b": 1}')
    with Hostile(secret) as member:
        runner = start("a", token=None, bootstrap_peers=(member.address,))
        sealed = member.keyring.seal_entry(an_entry(f"{origin.url}/b"))
        for key in (cache_key(f"{origin.url}/a"), bytes(32)):
            member.say(Push(key, bytes(16), sealed, 0.0), Publish(9, key, bytes(16), sealed, 0.0))
        member.say(Ping(10))
        assert eventually(lambda: any(isinstance(m, Done) and m.call == 10 for m in member.heard))
        assert eventually(lambda: runner.stat("rejected") >= 4)
        all_right(runner, origin, ["/a", "/b"])


if __name__ == "__main__":
    flood(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))

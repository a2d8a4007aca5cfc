"""What had once cost a node its places, its links or its memory, and a process its daemon: it does not again."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Answer, Scripted
from waiting import eventually

from httpx_p2pcache import Settings
from httpx_p2pcache.testing import Origin

pytest.importorskip("libp2p")

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr
from test_attacks import MIB, PROMPT, TARGETS, Hostile, Runner, all_right, an_entry, runners_of, unclosed, until

from httpx_p2pcache import tombstones
from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.network import FleetClaim, Question
from httpx_p2pcache.node import fleet, gate, link
from httpx_p2pcache.node.daemon import client
from httpx_p2pcache.node.daemon.protocol import Attach, State, from_process
from httpx_p2pcache.node.protocol import (
    Ask,
    Done,
    Found,
    Granted,
    Invalidate,
    Inventory,
    Nothing,
    Ping,
    Publish,
    Push,
    Ready,
    TellCounts,
    Wait,
    pack,
)
from httpx_p2pcache.quota import QuotaBoard

pytestmark = pytest.mark.p2p

Start = Callable[..., Runner]
Reply = Callable[[Hostile, Any], bytes]


@pytest.fixture
def start(settings_for: Callable[..., Settings], origin: Origin) -> Iterator[Start]:
    yield from runners_of(settings_for, origin)


class Dialling(Hostile):
    """A member that opens links itself, as many as it is told to."""

    def __enter__(self) -> Dialling:
        super().__enter__()
        return self

    def open(self, runner: Runner, count: int) -> None:
        """Returns once each has been admitted, or refused."""
        where, _, peer_id = runner.address.rpartition("/p2p/")
        there, tried = ID.from_base58(peer_id), threading.Event()

        async def dial() -> None:
            for _ in range(count):
                with contextlib.suppress(Exception):
                    await self._open(where, there)
            tried.set()

        self.token.run_sync_soon(self._nursery.start_soon, dial)
        assert tried.wait(30)

    async def _open(self, where: str, there: ID) -> None:
        before, over = len(self._streams), trio.Event()
        stream = await self.host.connect([where], there, 5.0)

        async def serve() -> None:
            await self.serve(stream, there, dialled=True)
            over.set()

        self._nursery.start_soon(serve)
        with trio.move_on_after(2):
            await until(lambda: over.is_set() or len(self._streams) > before)

    def say_on(self, link: int, *said: bytes, reset: bool = False) -> None:
        """Bytes as they are on one link only, which is ``reset`` after them; waits for nobody."""
        stream = self._streams[link]

        async def write() -> None:
            with contextlib.suppress(Exception):
                await stream.write(b"".join(said))
                if reset:
                    await stream.reset()

        self.token.run_sync_soon(self._nursery.start_soon, write)


def links(runner: Runner) -> int:
    """How many links the runner's node keeps, of all its members together: nothing else tells."""
    node: Any = runner.transport._exchange.network._fleet  # type: ignore[attr-defined] # from inside
    return sum(not link.closed.is_set() for member in list(node.members.values()) for link in list(member.links))


def connected_since(runner: Runner, met: float) -> bool:
    """Whether its one peer has been there since then, in monotonic time."""
    seconds = [peer["connected_for"] for peer in runner.stat("peers")]
    return len(seconds) == 1 and seconds[0] > time.monotonic() - met - 0.2


def said_done(member: Hostile, call: int) -> bool:
    return any(isinstance(message, Done) and message.call == call for message in list(member.heard))


def answers(member: Hostile, call: int) -> list[Any]:
    """What has been said to a question, the request to wait included."""
    kinds = (Found, Granted, Nothing, Wait)
    return [message for message in list(member.heard) if isinstance(message, kinds) and message.call == call]


def a_question(key: bytes) -> Question:
    return Question(key=key, claim=key[:16], method="GET", identity="", selecting={})


# Strangers, in a process of their own


STRANGERS = 4


def open_at(port: int) -> int:
    """How many connections to this port this process holds a file descriptor of."""
    held = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            held.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    accepted = [line for line in lines if line[1].endswith(f":{port:04X}") and line[3] != "0A"]
    return sum(f"socket:[{line[9]}]" in held for line in accepted)


@pytest.mark.usefixtures("no_multicast")
@unclosed
@pytest.mark.parametrize("kind", ["pings", "streams"])
def test_strangers_that_flood_and_never_read_are_gone_soon_after_their_time(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setattr(gate, "MAX_STRANGERS", STRANGERS)
    runner = start("a")
    port = runner.port
    with flooded(runner.address, kind):
        assert open_at(port) == STRANGERS or kind == "streams"  # of whom the first may have been parted with
        assert eventually(lambda: open_at(port) == 0, 10.0), f"{open_at(port)} are still there"
        member = start("b", peer_registry=tmp_path / "of-b", bootstrap_peers=(runner.address,))
        assert eventually(lambda: member.stat("connected_peers") == 1), "their places are not free again"


@contextlib.contextmanager
def flooded(address: str, kind: str) -> Iterator[None]:
    """Once as many strangers as there are places are connected, and flood, until the end of the block."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, __file__, address, kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        yield
    finally:
        process.kill()
        process.communicate()


def flood(address: str, kind: str) -> None:
    """The process of the strangers, of py-libp2p as it is; it ends when it is killed."""
    where, _, text = address.rpartition("/p2p/")
    there = ID.from_base58(text)
    numbers = range(1001, 2**31, 2)
    frames = {  # Yamux: a ping that asks for an answer; the first window of a stream that is opened
        "pings": [struct.pack("!BBHII", 0, 2, 1, 0, number) for number in range(10_000)],
        "streams": [struct.pack("!BBHII", 0, 1, 1, number, 0) for number in numbers[:10_000]],
    }[kind]

    async def never(n: int | None = None) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack, trio.open_nursery() as nursery:
            for _ in range(STRANGERS):
                key = create_new_key_pair()
                noise = NoiseTransport(key, noise_privkey=create_noise_key_pair().private_key)
                host = new_host(key_pair=key, sec_opt={NOISE: noise}, muxer_opt={YAMUX: Yamux})
                await stack.enter_async_context(host.run([]))
                await host.get_network().dial_addr(Multiaddr(where), there)
                (connection,) = host.get_network().get_connections(there)
                secured = connection.muxed_conn.secured_conn
                raw = secured.conn.read_writer.read_write_closer
                raw.stream.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                raw.read = never
                nursery.start_soon(repeat, secured)
            print("connected", flush=True)

    async def repeat(secured: Any) -> None:
        with contextlib.suppress(Exception):
            for first in [*range(0, len(frames), 2500)] * 2:
                await secured.write(b"".join(frames[first : first + 2500]))
        await trio.sleep_forever()

    trio.run(main)


# What is published


def test_what_was_published_last_is_not_lost_when_the_client_closes_at_once(start: Start, origin: Origin) -> None:
    staying = start("staying")

    def met() -> bool:
        return bool(leaving.stat("connected_peers") == 1 == staying.stat("connected_peers"))

    def received() -> bool:
        return bool(staying.stat("cache_size") == number)

    for number, target in enumerate(TARGETS[:8], 1):
        leaving = start(f"leaving-{number}")
        assert eventually(met)
        before = sys.getswitchinterval()
        sys.setswitchinterval(0.2)  # as on a busy machine, the node's thread has its turn when this one waits
        try:
            assert leaving.get(target).status_code == 200
            leaving.client.close()
        finally:
            sys.setswitchinterval(before)
        assert eventually(received, 3.0), f"number {number} is lost"
        assert eventually(lambda: staying.stat("connected_peers") == 0)
    all_right(staying, origin, TARGETS[:8])
    assert len(origin.calls) == 8


def test_an_entry_of_last_year_costs_no_link_and_holds_up_nobody(start: Start, origin: Origin) -> None:
    holder = start("holder")
    store = holder.transport._exchange.store  # from inside: nobody waits for a year
    fields = {"cache-control": ["public, max-age=60"], "etag": ['"x"']}
    for target in TARGETS[:10]:
        store.save(an_entry(f"{origin.url}{target}", headers=fields, received=time.time() - 400 * 86400))
    runner = start("asker")
    assert eventually(lambda: holder.stat("connected_peers") == 1 == runner.stat("connected_peers"))
    met = time.monotonic()
    all_right(runner, origin, TARGETS[:10])
    assert connected_since(runner, met), "the link had to be made anew"


def test_an_impossible_limit_of_an_origin_costs_no_member_its_link(
    start: Start, settings_for: Callable[..., Settings]
) -> None:
    limits = {
        "Cache-Control": "max-age=600",
        "X-RateLimit-Limit": "99999999999",
        "X-RateLimit-Remaining": "99999999998",
        "X-RateLimit-Reset": str(int(time.time()) + 3600),
    }
    with Scripted(lambda asked: Answer(b"{}", fields=limits)) as server:
        first, second = (start(name, github_hosts=(server.netloc,)) for name in "ab")
        assert eventually(lambda: first.stat("connected_peers") == 1 == second.stat("connected_peers"))
        met = time.monotonic()
        assert first.get(f"{server.url}/x").status_code == 200

        def told() -> bool:
            return bool(second.stat("quotas") or second.stat("connected_peers") == 0)

        assert eventually(told)
        assert connected_since(second, met), "the link had to be made anew"
        assert [quota["limit"] <= 2**31 for quota in second.stat("quotas")] == [True]


# Members that do as they like


MAX_LINKS_EACH = getattr(fleet, "MAX_LINKS_EACH", 4)
HALF = MIB.to_bytes(4, "big") + bytes(MIB - 1)  # a frame that lacks its last byte


def test_a_member_that_opens_many_links_is_held_to_a_few(start: Start, origin: Origin, secret: str) -> None:
    runner = start("a")
    all_right(runner, origin, TARGETS[:1])
    with Dialling(secret) as member:
        member.open(runner, 3 * MAX_LINKS_EACH)
        assert eventually(lambda: links(runner) <= MAX_LINKS_EACH, 2.0), f"{links(runner)} links are kept"
        all_right(runner, origin, TARGETS[:5])


def test_a_frame_that_is_begun_and_not_ended_costs_its_link(
    start: Start, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "FRAME_SECONDS", 1.0)
    runner = start("a")
    with Dialling(secret) as member:
        member.open(runner, 3)
        assert eventually(lambda: links(runner) == 3)
        member.say_on(1, HALF)
        member.say_on(2, (8 * MIB).to_bytes(4, "big"))

        def only_one_is_left() -> bool:
            member.say_on(0, pack(TellCounts("talks", {})))  # the member as such is there
            return links(runner) <= 1

        assert eventually(only_one_is_left, 6.0), f"{links(runner)} links are kept"


def test_who_asks_again_on_another_link_is_not_told_to_wait_for_itself(start: Start, secret: str) -> None:
    runner = start("a")
    with Dialling(secret) as member:
        member.open(runner, 2)
        assert eventually(lambda: links(runner) == 2)
        member.say_on(0, pack(Ping(1)))
        member.say_on(1, pack(Ping(2)))
        assert eventually(lambda: said_done(member, 1) and said_done(member, 2))
        key = os.urandom(32)
        member.say_on(0, pack(Ask(7, a_question(key))), reset=True)
        assert eventually(lambda: links(runner) == 1)
        member.say_on(1, pack(Ask(8, a_question(key))))
        assert eventually(lambda: answers(member, 8), PROMPT)
        assert [type(answer) for answer in answers(member, 8)] == [Granted]


def test_a_holder_that_says_something_impossible_in_one_breath_with_its_answer_leaves_nobody_without_one(
    start: Start, secret: str
) -> None:
    key = os.urandom(32)

    def hold(member: Hostile, message: Any) -> bytes:
        if isinstance(message, Ready):
            return pack(Inventory(message.call, [key], [])) + pack(Ping(1))
        if isinstance(message, Ask):
            return pack(Found(message.call, b"x" * 28, 0.0)) + bytes(4)  # a frame without a length
        return b""

    with Hostile(secret, hold) as holder, Hostile(secret) as asker:
        runner = start("a", bootstrap_peers=(holder.address, asker.address))
        assert eventually(lambda: runner.stat("connected_peers") == 2)
        assert eventually(lambda: said_done(holder, 1))  # so what it holds has been heard
        asker.say(Ask(100, a_question(key)))
        assert eventually(lambda: holder.questions() == 1)
        assert eventually(lambda: [a for a in answers(asker, 100) if not isinstance(a, Wait)], 2 * PROMPT)


def test_what_a_member_invalidates_at_random_does_not_fill_the_disk(
    start: Start, secret: str, monkeypatch: pytest.MonkeyPatch, settings_for: Callable[..., Settings]
) -> None:
    monkeypatch.setattr(tombstones, "MAX_TOMBSTONES", 250)
    with Hostile(secret) as member:
        runner = start("a", bootstrap_peers=(member.address,))
        assert eventually(lambda: runner.stat("connected_peers") == 1)
        calls = range(1000, 1010)
        member.say(*(Invalidate(call, [os.urandom(32) for _ in range(100)], call) for call in calls))
        assert eventually(lambda: all(said_done(member, call) for call in calls))
    with contextlib.closing(sqlite3.connect(settings_for("a").dir / "p2pcache-v1.db")) as database:
        ((rows,),) = database.execute("SELECT count(*) FROM tombstones").fetchall()
    assert 0 < rows <= 250 + 100


# A process and its daemon


def test_no_frame_overtakes_the_one_that_a_process_attaches_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that has come and gone often, while threads of the process give claims back."""
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.002)
    first: list[str] = []
    stays = threading.Event()
    ended = threading.Event()

    def serve(listener: socket.socket) -> None:
        while not ended.is_set():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError, EOFError):
                first.append(type(from_process(client._read(connection, MIB))).__name__)
                connection.sendall(pack(State(True, {})))
                if stays.is_set():
                    ended.wait(10)

    def give_back(node: client.DaemonNode) -> None:
        while not stays.is_set():
            node.release(bytes(16), bytes(32), FleetClaim(1), Verdict.FAILED)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "daemon"))
        listener.listen(50)
        daemon = threading.Thread(target=serve, args=(listener,), daemon=True)
        daemon.start()
        node = client.DaemonNode(tmp_path / "daemon", "label", QuotaBoard(), lookup_timeout=0.25, largest=MIB)
        node.attach()
        node.start()
        threads = [threading.Thread(target=give_back, args=(node,)) for _ in range(2)]
        try:
            for thread in threads:
                thread.start()
            assert eventually(lambda: len(first) >= 200 or set(first) - {Attach.__name__}, 15.0), len(first)
        finally:
            stays.set()
            for thread in threads:
                thread.join()
        try:
            assert set(first) == {Attach.__name__}
            assert eventually(lambda: node.active)
        finally:
            ended.set()
            node.close()
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as last:  # one more, lest it should wait
                last.connect(str(tmp_path / "daemon"))
            daemon.join(10)


if __name__ == "__main__":
    flood(sys.argv[1], sys.argv[2])


@pytest.mark.parametrize("here", [True, False])
def test_what_is_at_a_host_of_this_machine_is_neither_asked_for_nor_told_elsewhere(
    start: Start, secret: str, origin: Origin, here: bool
) -> None:
    """``localhost`` is another one there: who is there could only reject it, and see what is not for it."""
    member = Hostile(secret)
    member.elsewhere = not here
    with member:
        runner = start("a", bootstrap_peers=(member.address,))
        assert eventually(lambda: runner.stat("connected_peers") == 1)
        member.say(Ping(1))
        assert eventually(lambda: said_done(member, 1))  # so it is known where it is
        all_right(runner, origin, TARGETS)
        assert origin.calls
        runner.client.close()  # what is to be told has been told
        told = [message for message in member.heard if isinstance(message, (Ask, Publish, Push))]
        assert bool(told) == here


def test_runners_of_one_machine_share_what_is_there_though_a_member_is_elsewhere(
    start: Start, secret: str, origin: Origin
) -> None:
    member = Hostile(secret)
    member.elsewhere = True
    with member:
        first, second = (start(name, bootstrap_peers=(member.address,)) for name in "ab")
        assert eventually(lambda: first.stat("connected_peers") == 2 == second.stat("connected_peers"))
        member.say(Ping(1))
        assert eventually(lambda: said_done(member, 1))
        all_right(first, origin, TARGETS)
        paid = len(origin.calls)
        all_right(second, origin, TARGETS)
        assert (paid, len(origin.calls)) == (len(TARGETS), len(TARGETS))

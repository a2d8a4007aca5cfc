"""What a peer's answer costs by its size, a miss beside a bare client's, and a node that does nothing."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.finding import Node, _all_have
from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.testing import Origin, Resource

# Bytes, and how many of them are asked for: the smaller, the less one of them says.
SIZES = {"2 KB": (2_000, 200), "24 KB": (24_000, 100), "170 KB": (170_000, 50), "5 MB": (5_000_000, 50)}
# A runner, in a process of its own as all are. Told "ours URL ..." or "bare URL ...", it asks for one after another,
# with sharing or without, and says how many milliseconds each took, and where it came from; "none URL" is answered
# where a transport begins, so that it shows what httpx's client takes itself. Told "stats", it says what its transport
# has counted.
_RUNNER = """
import json, sys, time, httpx
from httpx_p2pcache import P2PCacheTransport
transport = P2PCacheTransport()
transport.wait_until_joined(60)
nothing = httpx.MockTransport(lambda request: httpx.Response(200, content=bytes(2000)))
transports = {"ours": transport, "bare": None, "none": nothing}
clients = {name: httpx.Client(transport=one, timeout=60) for name, one in transports.items()}
print("ready", flush=True)
for line in sys.stdin:
    who, *urls = line.split()
    if who == "stats":
        print(json.dumps(transport.stats()), flush=True)
        continue
    found = []
    for url in urls:
        began = time.perf_counter()
        response = clients[who].get(url)
        took = (time.perf_counter() - began) * 1000
        found.append([took, response.extensions.get("caching", {}).get("source")])
    print(json.dumps(found), flush=True)
"""


# A bare py-libp2p stream: told a number, it sends so many bytes. Noise and Yamux, as ours, and nothing of ours.
_BARE = """
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX, Yamux
from multiaddr import Multiaddr
key_pair = create_new_key_pair()
noise = Transport(key_pair, noise_privkey=create_noise_key_pair().private_key)
host = new_host(key_pair=key_pair, sec_opt={PROTOCOL_ID: noise}, muxer_opt={YAMUX: Yamux})
"""
_SERVES = """
async def serve(stream):
    while head := await stream.read(8):
        await stream.write(bytes(int.from_bytes(head, "big")))
async def main():
    host.set_stream_handler("/bare/1", serve)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        print(host.get_addrs()[0], flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
_ASKS = """
import sys, time
async def main():
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        peer = info_from_p2p_addr(Multiaddr(sys.argv[1]))
        await host.connect(peer)
        stream = await host.new_stream(peer.peer_id, ["/bare/1"])
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            began, left = time.perf_counter(), int(line)
            await stream.write(left.to_bytes(8, "big"))
            while left > 0:
                left -= len(await stream.read(left))
            print((time.perf_counter() - began) * 1000, flush=True)
        host.get_network().nursery.cancel_scope.cancel()
trio.run(main)
"""


@contextmanager
def _bare_stream() -> Iterator[Callable[[int], float]]:
    """The milliseconds of a bare round trip on one long-lived stream to another process, by the bytes of its answer."""
    with contextlib.ExitStack() as stack:

        def start(code: str, *arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", _BARE + code, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        serves = start(_SERVES)
        assert serves.stdout is not None
        asks = start(_ASKS, serves.stdout.readline().strip())

        def trip(size: int) -> float:
            assert asks.stdin is not None
            assert asks.stdout is not None
            asks.stdin.write(f"{size}\n")
            asks.stdin.flush()
            return float(asks.stdout.readline())

        yield trip


class _Runner:
    """A runner in a process of its own, which asks for one URL after another."""

    def __init__(self, environment: dict[str, str]) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CACHE_")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUNNER],
            env=inherited | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _say(self, line: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._line())

    def ask(self, url: str, who: str = "ours") -> tuple[float, str | None]:
        """How many milliseconds it took, and where it came from; ``who``: "ours", "bare" or "none"."""
        ((took, source),) = self._say(f"{who} {url}")
        return took, source

    def ask_all(self, urls: Sequence[str], who: str) -> list[float]:
        """The milliseconds of one request after another, as a script makes them."""
        return [took for took, _ in self._say(f"{who} {' '.join(urls)}")]

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self._say("stats")
        return stats

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def _runners() -> Iterator[Callable[[], _Runner]]:
    """How to begin one more runner of a fleet; each begins once the one before has joined."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        names = iter(range(1000))
        common = {
            "CACHE_PEER_REGISTRY": f"{scratch}/registry",
            "CACHE_SHARED_SECRET": secrets.token_hex(16),
            "CACHE_LISTEN_HOST": "127.0.0.1",
            "CACHE_LISTEN_PORT": "0",
            "CACHE_PUBLIC_BOOTSTRAP": "false",
            "CACHE_NODE": "embedded",
            "CACHE_LOOKUP_TIMEOUT": "5",
        }

        def begin() -> _Runner:
            runner = _Runner(common | {"CACHE_DIR": f"{scratch}/{next(names)}"})
            stack.callback(runner.end)
            return runner

        yield begin


def hits() -> dict[str, Any]:
    """What a peer holds, by size; beside it a bare round trip on one long-lived stream."""
    found: dict[str, Any] = {}
    chance = random.Random(1)
    resources = {
        f"/{size}/{number}": Resource(chance.randbytes(size), max_age=600)
        for size, count in SIZES.values()
        for number in range(count)
    }
    bare: dict[str, list[float]] = {name: [] for name in SIZES}
    took: dict[str, list[float]] = {name: [] for name in SIZES}
    nothing: list[float] = []  # what a client takes that asks nobody
    with Origin(resources) as origin, _runners() as begin, _bare_stream() as trip:
        holder = begin()
        for path in reversed(resources):  # so that its memory, which does not hold all of the largest, holds the small
            holder.ask(origin.url + path)
        # What is published is pushed to all who are there, and they keep it: who asks comes later.
        asker = begin()
        for name, (size, count) in SIZES.items():
            for number in range(count):
                bare[name].append(trip(size))
                nothing.append(asker.ask(origin.url, "none")[0])
                ms, source = asker.ask(f"{origin.url}/{size}/{number}")
                if source == "peer":
                    took[name].append(ms)
        ping = asker.stats()["peers"][0]["rtt_ms"]
    for name, times in took.items():
        middle = statistics.median(times) if times else float("nan")
        beside = statistics.median(bare[name])
        found[f"peer hit, {name} / bare stream, ms (of {len(times)})"] = f"{middle:.2f} / {beside:.2f}"
        found[f"peer hit, {name}: times a bare stream"] = round(middle / beside, 2)
        if name == "5 MB" and times:
            found["peer hit, 5 MB: MB/s"] = round(5_000 / middle)
    found["of these what httpx's client takes itself, ms"] = round(statistics.median(nothing), 2)
    found["a ping between them, ms"] = ping
    return found


def publishing(counts: tuple[int, ...] = (1, 4, 9), urls: int = 50) -> dict[str, Any]:
    """From the first request of one runner until all others hold all it has fetched, in one process."""
    found: dict[str, Any] = {}
    for count in counts:
        resources = {
            f"/{number}": Resource(random.Random(number).randbytes(2000), max_age=600) for number in range(urls)
        }
        with tempfile.TemporaryDirectory() as scratch, Origin(resources) as origin, contextlib.ExitStack() as stack:
            plain = Settings(
                shared_secret=secrets.token_hex(16),
                peer_registry=Path(scratch) / "registry",
                listen_host="127.0.0.1",
                listen_port=0,
                public_bootstrap=False,
                node="embedded",
            )
            fleet = []
            for number in range(count + 1):
                settings = msgspec.structs.replace(plain, dir=Path(scratch) / str(number))
                fleet.append(P2PCacheTransport(settings=settings))
                stack.callback(fleet[-1].close)
            while any(one.stats()["connected_peers"] != count for one in fleet):
                time.sleep(0.02)
            client = stack.enter_context(httpx.Client(transport=fleet[0]))
            began = time.perf_counter()
            for path in resources:
                client.get(origin.url + path)
            asked = time.perf_counter() - began
            while any(one.stats()["received"] < urls for one in fleet[1:]):  # type: ignore[operator]
                time.sleep(0.002)
            held = time.perf_counter() - began
        found[f"{urls} responses of 2 KB fetched / held by {count} others as well, s"] = f"{asked:.2f} / {held:.2f}"
    return found


def misses(rounds: int = 20, at_a_time: int = 10) -> dict[str, Any]:
    """A miss at 20 ms, with a peer that has nothing either; a few after another, as a script makes them, in turns with
    a bare client of the same process."""
    resources = {f"/{number}": Resource(b"x" * 2000, max_age=600) for number in range(rounds * at_a_time)}
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    with Origin(resources, latency=0.02) as origin, _runners() as begin:
        begin()
        runner = begin()
        for who in times:
            runner.ask(origin.url + "/none", who)
        urls = [origin.url + path for path in resources]
        for begin_at in range(0, len(urls), at_a_time):
            for who, taken in times.items():
                taken += runner.ask_all(urls[begin_at : begin_at + at_a_time], who)
        assert runner.stats()["connected_peers"] == 1
    bare, ours = (statistics.median(taken) for taken in times.values())
    return {
        "a miss at 20 ms, bare client, ms": round(bare, 2),
        "a miss at 20 ms, with a peer asked, ms": round(ours, 2),
        "a miss costs more by": f"{(ours / bare - 1) * 100:.1f} %",
    }


def idle(counts: tuple[int, ...] = (2, 5, 20), seconds: float = 10.0) -> dict[str, Any]:
    """Nodes that do nothing: how much of a core, and how much memory, each."""
    found: dict[str, Any] = {}
    plain = _resident_of(
        [sys.executable, "-c", "import httpx, hishel, sys; print(0, flush=True); sys.stdin.readline()"]
    )
    libp2p = _resident_of(
        [sys.executable, "-c", "import httpx, hishel, libp2p, trio, sys; print(0, flush=True); sys.stdin.readline()"]
    )
    found["memory of httpx and hishel, MiB"] = plain
    found["memory with libp2p imported, MiB"] = libp2p
    for count in counts:
        secret = secrets.token_hex(16)
        with tempfile.TemporaryDirectory() as scratch:
            nodes = [Node(Path(scratch), f"node-{n}", "registry", secret) for n in range(count)]
            try:
                for node in nodes:
                    node.imported()
                for node in nodes:
                    node.begin(LOOK_EVERY="2")
                for node in nodes:
                    node.started()
                _all_have(nodes, count - 1, 0.0, timeout=60)
                time.sleep(12.0)  # the time in which a fleet forms: it looks more often then
                before = [_cpu(node.process.pid) for node in nodes]
                time.sleep(seconds)
                used = [(_cpu(node.process.pid) - b) / seconds for node, b in zip(nodes, before, strict=True)]
                found[f"{count} nodes that do nothing: % of a core each"] = round(statistics.median(used) * 100, 2)
                found[f"{count} nodes that do nothing: MiB each"] = round(
                    statistics.median(_resident(node.process.pid) for node in nodes)
                )
            finally:
                for node in nodes:
                    node.process.kill()
                    node.process.communicate()
    return found


def _resident(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2


def _resident_of(command: list[str]) -> float:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    size = round(_resident(process.pid))
    process.communicate("\n")
    return size


def _cpu(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run() -> dict[str, Any]:
    return {**hits(), **misses(), **publishing(), **idle()}

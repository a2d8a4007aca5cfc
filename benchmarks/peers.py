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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.finding import Node, _all_have
from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.testing import Origin, Resource

SIZES = {"2 KB": 2_000, "24 KB": 24_000, "170 KB": 170_000, "5 MB": 5_000_000}
# The other runner: it asks for each URL once, says so, and stays.
_HOLDER = """
import sys, httpx
from httpx_p2pcache import P2PCacheTransport
transport = P2PCacheTransport()
transport.wait_until_joined(60)
with httpx.Client(transport=transport, timeout=60) as client:
    print("ready", flush=True)
    for line in sys.stdin:
        print(len(client.get(line.strip()).content), flush=True)
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


@contextmanager
def _pair(**changes: Any) -> Iterator[tuple[httpx.Client, P2PCacheTransport, Callable[[str], None]]]:
    """A client here, its transport, and how to have a runner in another process ask for a URL."""
    with tempfile.TemporaryDirectory() as scratch:
        common = {
            "peer_registry": f"{scratch}/registry",
            "shared_secret": secrets.token_hex(16),
            "listen_host": "127.0.0.1",
            "listen_port": "0",
            "public_bootstrap": "false",
            "node": "embedded",
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CACHE_")}
        environment |= {f"CACHE_{name.upper()}": value for name, value in common.items()}
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLDER],
            env=environment | {"CACHE_DIR": f"{scratch}/holder"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"

        def hold(url: str) -> None:
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.write(url + "\n")
            holder.stdin.flush()
            assert int(holder.stdout.readline()) > 0

        settings = Settings.from_env(
            {f"CACHE_{name.upper()}": value for name, value in common.items()},
            dir=Path(scratch) / "asker",
            lookup_timeout=5.0,
            **changes,
        )
        transport = P2PCacheTransport(settings=settings)
        try:
            with httpx.Client(transport=transport, timeout=60) as client:
                while transport.stats()["connected_peers"] != 1:
                    time.sleep(0.02)
                yield client, transport, hold
        finally:
            holder.kill()
            holder.communicate()


def _milliseconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def hits(rounds: int = 30) -> dict[str, Any]:
    """What a peer holds, by size; beside it a bare round trip on the same stream."""
    found: dict[str, Any] = {}
    chance = random.Random(1)
    resources = {
        f"/{size}/{number}": Resource(chance.randbytes(size), max_age=600)
        for size in SIZES.values()
        for number in range(rounds)
    }
    # What is published is pushed to all who are there, and take it: who asks comes later.
    bare: dict[str, list[float]] = {name: [] for name in SIZES}
    with Origin(resources) as origin, _pair(max_body_size=0) as (_, transport, hold), _bare_stream() as trip:
        for path in resources:
            hold(origin.url + path)
        took: dict[str, list[float]] = {name: [] for name in SIZES}
        asking = _second(transport)
        with httpx.Client(transport=asking, timeout=60) as client:
            while asking.stats()["connected_peers"] < 1:
                time.sleep(0.02)
            for number in range(rounds):
                for name, size in SIZES.items():
                    url = f"{origin.url}/{size}/{number}"
                    bare[name].append(trip(size))
                    answers: list[httpx.Response] = []
                    ms = _milliseconds(lambda url=url, answers=answers: answers.append(client.get(url)))  # type: ignore[misc]
                    if answers[0].extensions["caching"]["source"] == "peer":
                        took[name].append(ms)
            trips: Any = asking.stats()["peers"]
    for name, times in took.items():
        middle = statistics.median(times) if times else float("nan")
        beside = statistics.median(bare[name])
        found[f"peer hit, {name} / bare stream, ms (of {len(times)})"] = f"{middle:.2f} / {beside:.2f}"
        found[f"peer hit, {name}: times a bare stream"] = round(middle / beside, 2)
        if name == "5 MB" and times:
            found["peer hit, 5 MB: MB/s"] = round(5_000 / middle)
    found["a ping on the same stream, ms"] = [one["rtt_ms"] for one in trips]
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


def _second(transport: P2PCacheTransport) -> P2PCacheTransport:
    """A runner that begins now, and so has been sent nothing."""
    settings = msgspec.structs.replace(
        transport.settings, dir=transport.settings.dir.parent / "late", max_body_size=8 * 1024**2
    )
    late = P2PCacheTransport(settings=settings)
    late.wait_until_joined(60)
    return late


def misses(rounds: int = 60) -> dict[str, Any]:
    """A miss at 20 ms, with a peer that has nothing either; in turns with a bare client."""
    resources = {f"/{number}": Resource(b"x" * 2000, max_age=600) for number in range(rounds)}
    with Origin(resources, latency=0.02) as origin, _pair() as (client, _, _hold), httpx.Client() as bare:
        bare.get(origin.url + "/0")
        client.get(origin.url + "/none")
        ours, theirs = [], []
        for path in resources:
            theirs.append(_milliseconds(lambda path=path: bare.get(origin.url + path)))  # type: ignore[misc]
            ours.append(_milliseconds(lambda path=path: client.get(origin.url + path)))  # type: ignore[misc]
    a, b = statistics.median(theirs), statistics.median(ours)
    return {
        "a miss at 20 ms, bare client, ms": round(a, 2),
        "a miss at 20 ms, with a peer asked, ms": round(b, 2),
        "a miss costs more by": f"{(b / a - 1) * 100:.1f} %",
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

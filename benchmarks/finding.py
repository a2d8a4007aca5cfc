"""How long a fleet takes to form and to notice who has gone, and what strangers cost it."""

from __future__ import annotations

import os
import resource
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from httpx_p2pcache.testing import Origin, made_up

FLEET = 8
# A runner that has imported everything, begins at a line, says where it is, and then how many peers it has, and when.
_NODE = """
import json, os, sys, time
import libp2p, trio, zeroconf  # importing them is the machine's work, not the fleet's
from httpx_p2pcache import P2PCacheTransport
import httpx_p2pcache.node.embedded
print(0, flush=True)
for name, value in json.loads(sys.stdin.readline()).items():
    os.environ[name] = value
transport = P2PCacheTransport()
began = time.time()
while not transport.stats()["addresses"]:
    time.sleep(0.005)
stats = transport.stats()
print(json.dumps([began, f"{stats['addresses'][0]}/p2p/{stats['peer_id']}"]), flush=True)
known = None
while True:
    peers = transport.stats()["connected_peers"]
    if peers != known:
        known = peers
        print(json.dumps([time.time(), peers]), flush=True)
    time.sleep(float(os.environ.get("LOOK_EVERY", "0.01")))
"""


class Node:
    """A node in a process of its own; ``seen`` holds when it has had how many peers."""

    def __init__(self, scratch: Path, name: str, registry: str, secret: str) -> None:
        self._plain = {
            "CACHE_DIR": str(scratch / name),
            "CACHE_PEER_REGISTRY": str(scratch / registry),
            "CACHE_SHARED_SECRET": secret,
            "CACHE_LISTEN_HOST": "127.0.0.1",
            "CACHE_LISTEN_PORT": "0",
            "CACHE_PUBLIC_BOOTSTRAP": "false",
        }
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CACHE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _NODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.seen: list[list[float]] = []
        self.began, self.address = 0.0, ""

    def imported(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "0\n"

    def begin(self, **more: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(self._plain | more).decode() + "\n")
        self.process.stdin.flush()

    def started(self) -> None:
        assert self.process.stdout is not None
        self.began, self.address = msgspec.json.decode(self.process.stdout.readline())
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(msgspec.json.decode(line))

    def had(self, peers: int, since: float) -> float | None:
        """When it came to have so many peers, after ``since`` or before it."""
        if not self.seen or self.seen[-1][1] != peers:
            return None
        return max(self.seen[-1][0], since)


@contextmanager
def _nodes(count: int, *, bootstrap: bool) -> Iterator[list[Node]]:
    """So many nodes; each finds the others by a registry, or by the first one's address alone."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as scratch:
        nodes = [
            Node(Path(scratch), f"node-{n}", f"registry-{n}" if bootstrap else "registry", secret) for n in range(count)
        ]
        try:
            for node in nodes:
                node.imported()
            first = ""
            if bootstrap:
                nodes[0].begin()
                nodes[0].started()
                first = nodes[0].address
            for node in nodes[bool(first) :]:
                node.begin(CACHE_BOOTSTRAP_PEERS=first)
            for node in nodes[bool(first) :]:
                node.started()
            yield nodes
        finally:
            for node in nodes:
                node.process.kill()
                node.process.communicate()


def _all_have(nodes: list[Node], peers: int, since: float, timeout: float = 30.0) -> float:
    """Seconds from ``since`` until each of these has so many peers; infinite if that did not come in time."""
    until = time.time() + timeout
    while time.time() < until:
        times = [node.had(peers, since) for node in nodes]
        if None not in times:
            return max(t for t in times if t is not None) - since
        time.sleep(0.05)
    return float("inf")


def forming() -> dict[str, Any]:
    """Eight nodes that begin together; then one is killed, and comes back."""
    found: dict[str, Any] = {}
    for how in ("registry", "one bootstrap address"):
        took = []
        for _ in range(3):
            with _nodes(FLEET, bootstrap=how != "registry") as nodes:
                took.append(_all_have(nodes, FLEET - 1, max(node.began for node in nodes)))
        found[f"{FLEET} nodes, {how}: all connected after the last began, s (median, worst)"] = (
            f"{statistics.median(took):.1f}, {max(took):.1f}"
        )
    with _nodes(FLEET, bootstrap=False) as nodes:
        _all_have(nodes, FLEET - 1, 0.0)
        nodes[3].process.send_signal(signal.SIGKILL)
        others = [node for number, node in enumerate(nodes) if number != 3]
        found["one of them killed: gone from every view after, s"] = round(_all_have(others, FLEET - 2, time.time()), 2)
        back = Node(Path(nodes[0]._plain["CACHE_DIR"]).parent, "node-3", "registry", "")
        back._plain["CACHE_SHARED_SECRET"] = nodes[0]._plain["CACHE_SHARED_SECRET"]
        nodes[3] = back
        back.imported()
        back.begin()
        back.started()
        took_back = _all_have(nodes, FLEET - 1, back.began)
        found["it comes back: in every view after, s"] = round(took_back, 2)
    return found


def strangers(count: int = 200, seconds: float = 15.0) -> dict[str, Any]:
    """``count`` outsiders that connect again and again to a node, half of them mute, half talking rubbish."""
    from httpx import Client

    from httpx_p2pcache import P2PCacheTransport, Settings

    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as scratch, Origin(made_up(3400)) as origin:
        settings = [
            Settings(
                dir=Path(scratch) / name,
                peer_registry=Path(scratch) / "registry",
                shared_secret=secret,
                listen_host="127.0.0.1",
                listen_port=0,
                join_timeout=30,
                public_bootstrap=False,
                lookup_timeout=2.0,
            )
            for name in ("a", "b")
        ]
        ours, theirs = (P2PCacheTransport(settings=one) for one in settings)
        urls = [origin.url + target for target in origin.resources]
        with Client(transport=ours) as asking, Client(transport=theirs):
            while theirs.stats()["connected_peers"] != 1 or ours.stats()["connected_peers"] != 1:
                time.sleep(0.05)

            def lookups(urls: list[str], pause: float) -> list[float]:
                took = []
                for url in urls:
                    began = time.perf_counter()
                    asking.get(url)
                    took.append((time.perf_counter() - began) * 1000)
                    time.sleep(pause)
                return sorted(took)

            lookups(urls[:400], 0.0)
            before = _resident()
            quiet = lookups(
                urls[400:1900], seconds / 2000
            )  # what they themselves leave in memory is not the strangers'
            usual = _resident() - before
            memory, descriptors = _resident(), len(os.listdir("/proc/self/fd"))
            where = str(ours.stats()["addresses"][0]).split("/")[4]
            code = [sys.executable, "-c", _STRANGERS, where, str(count), str(seconds)]
            crowd = subprocess.Popen(code, stdout=subprocess.PIPE, text=True)
            time.sleep(1.0)
            loud = lookups(urls[1900:], seconds / 2000)
            tries = int(crowd.communicate()[0])
            time.sleep(3.0)
            grown, left = _resident() - memory - usual, len(os.listdir("/proc/self/fd")) - descriptors
    return {
        f"{count} strangers for {seconds:.0f} s: connections tried": tries,
        "a look-up, p99 without / with them, ms": f"{_p99(quiet):.1f} / {_p99(loud):.1f}",
        "a look-up, median without / with them, ms": f"{statistics.median(quiet):.1f} / {statistics.median(loud):.1f}",
        "memory grown by the strangers, MiB": round(grown / 1024**2, 1),
        "descriptors left open": left,
    }


_STRANGERS = """
import asyncio, os, sys
port, count, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
tries = 0
async def stranger(number):
    global tries
    while True:
        tries += 1
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if number % 2:
                writer.write(os.urandom(512))
            await asyncio.wait_for(reader.read(), 5)
            writer.close()
        except (OSError, asyncio.TimeoutError):
            pass
        await asyncio.sleep(0.5)
async def main():
    tasks = [asyncio.create_task(stranger(number)) for number in range(count)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
asyncio.run(main())
print(tries)
"""


def _p99(times: list[float]) -> float:
    return times[int(len(times) * 0.99)]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run() -> dict[str, Any]:
    return {**forming(), **strangers()}

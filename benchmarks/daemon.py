"""What a daemon gives a job of many short processes, and what it costs; ``soak`` has it work for ten minutes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from httpx_p2pcache.testing import Origin, made_up

# A job's step: asks for all URLs once, and says where the answers came from and how long the first took.
_STEP = """
import json, sys, time
began = float(sys.argv[1])
import httpx
from httpx_p2pcache import P2PCacheTransport
with httpx.Client(transport=P2PCacheTransport(), headers={"Authorization": "Bearer one"}, timeout=30) as client:
    sources = []
    for url in sys.argv[2:]:
        sources.append(client.get(url).extensions["caching"]["source"])
        if len(sources) == 1:
            first = time.time() - began
print(json.dumps({"first": first, "sources": sources}))
"""
# One that goes on: asks for all URLs with four threads until it is told to stop, and counts failures.
_LOAD = """
import json, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import httpx
from httpx_p2pcache import P2PCacheTransport
pause, urls = float(sys.argv[1]), sys.argv[2:]
client = httpx.Client(transport=P2PCacheTransport(), headers={"Authorization": "Bearer one"}, timeout=30)
stop, waits, failed = threading.Event(), [], []
def work(number):
    while not stop.is_set():
        for url in urls[number:] + urls[:number]:
            asked = time.time()
            try:
                client.get(url).raise_for_status()
            except Exception as exc:
                failed.append(repr(exc))
            waits.append(time.time() - asked)
            if stop.wait(pause):
                break
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
print("ready", flush=True)
sys.stdin.readline()
stop.set()
for thread in threads: thread.join()
peers = client._transport.stats()["p2p_enabled"] and client._transport._exchange.network.active
print(json.dumps({"requests": len(waits), "failed": failed[:3], "slowest": max(waits), "back": peers}))
client.close()
"""
# The same with writes, each answer looked at: it is of its URL, and no older than what this process wrote there last.
_SOAK = """
import json, sys, threading, time
import httpx
from httpx_p2pcache import P2PCacheTransport
pause, place, urls = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
client = httpx.Client(transport=P2PCacheTransport(), headers={"Authorization": "Bearer one"}, timeout=30)
stop, waits, failed, wrong, written, writes = threading.Event(), [], [], [], {}, 0
def work(number):
    global writes
    turn = 0
    while not stop.is_set():
        for at, url in enumerate(urls[number::4]):
            turn += 1
            asked = time.time()
            try:
                if at % 5 == place and turn % 7 == 0:  # nobody else writes there, so that "last" has a meaning
                    version = time.time_ns()
                    client.put(url, content=json.dumps({"url": url, "version": version}).encode()).raise_for_status()
                    written[url] = version
                    writes += 1
                else:
                    answer = client.get(url).raise_for_status().json()
                    name = url.rpartition("/repos/")[2]
                    right = answer.get("url", url) == url and answer.get("full_name", name) == name
                    if not right or answer.get("version", 0) < written.get(url, 0):
                        wrong.append(url)
            except Exception as exc:
                failed.append(repr(exc))
            waits.append(time.time() - asked)
            if stop.wait(pause):
                break
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
print("ready", flush=True)
sys.stdin.readline()
stop.set()
for thread in threads: thread.join()
print(json.dumps({"requests": len(waits), "failed": failed, "wrong": len(wrong), "writes": writes,
                  "slowest": max(waits)}))
client.close()
"""
# Requests through the door for what the daemon holds, by four threads for three seconds.
_DOOR = """
import json, sys, threading, time
import httpx
door, urls, count = sys.argv[1], sys.argv[2:], []
def work(number):
    with httpx.Client(transport=httpx.HTTPTransport(uds=door)) as client:
        begun = time.time()
        while time.time() < begun + 3:
            for url in urls:
                client.get(url).raise_for_status()
                count.append(1)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(len(count) / 3))
"""
# How long a question takes whose answer is "nobody fetches it: you may", asked one after another.
_ASK = """
import json, sys, time, statistics, hashlib
import httpx
from httpx_p2pcache import P2PCacheTransport
from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.network import Question
transport = P2PCacheTransport()
transport.wait_until_joined(30)
network, took = transport._exchange.network, []
for number in range(300):
    key = hashlib.sha256(b"%d" % number).digest()
    question = Question(key=key, claim=key[:16], method="GET", identity="", selecting={})
    began = time.perf_counter()
    held = network.ask(question).result(5)
    took.append(time.perf_counter() - began)
    network.release(key[:16], key, held, Verdict.ABANDONED)
print(json.dumps(statistics.median(took[50:]) * 1000))
transport.close()
"""


class Runner:
    """The environment of a runner, and its daemon."""

    def __init__(self, scratch: Path, name: str, origin: Origin) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("CACHE_", "GITHUB_", "GH_"))}
        self.environment = kept | {
            "CACHE_DIR": str(scratch / name),
            "CACHE_PEER_REGISTRY": str(scratch / "registry"),
            "CACHE_SHARED_SECRET": hashlib.sha256(str(scratch).encode()).hexdigest(),
            "CACHE_PUBLIC_BOOTSTRAP": "false",
            "CACHE_LISTEN_HOST": "127.0.0.1",
            "CACHE_LISTEN_PORT": "0",
            "CACHE_GITHUB_HOSTS": origin.netloc,
        }

    def p2pcache(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "httpx_p2pcache.cli", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout

    def start(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, code: str, *arguments: str) -> Any:
        return json.loads(self.start(code, *arguments).communicate()[0])

    def daemon(self) -> int:
        process: int = json.loads(self.p2pcache("status", "--json"))["pid"]
        return process


@contextmanager
def _runners(count: int, origin: Origin) -> Iterator[list[Runner]]:
    with tempfile.TemporaryDirectory(prefix="p2pcache-") as scratch:
        runners = [Runner(Path(scratch), f"runner-{number}", origin) for number in range(count)]
        try:
            for runner in runners:
                runner.p2pcache("init")
            yield runners
        finally:
            for runner in runners:
                runner.p2pcache("stop")


def short_processes() -> dict[str, Any]:
    """Ten short processes of two runners, one after another and all at once."""
    found: dict[str, Any] = {}
    with Origin(made_up(40), latency=0.05) as origin, _runners(2, origin) as runners:
        urls = [origin.url + target for target in origin.resources]
        for number in range(10):
            runners[number % 2].run(_STEP, str(time.time()), *urls[:20])
        found["10 processes one after another x 20 URLs: calls"] = len(origin.calls)
        origin.reset()
        steps = [runners[number % 2].start(_STEP, str(time.time()), *urls[20:]) for number in range(10)]
        for step in steps:
            step.communicate()
        found["10 processes at once x 20 URLs: calls"] = len(origin.calls)
    return found


def first_shared_call() -> dict[str, Any]:
    """A new process whose first answer is another runner's: from its start to the answer, with all imports."""
    took, bare = [], []
    with Origin(made_up(20)) as origin, _runners(2, origin) as (ours, theirs):
        for target in origin.resources:
            url = origin.url + target
            theirs.run(_STEP, str(time.time()), url)
            began = time.time()
            said = ours.run(_STEP, str(began), url)
            took.append(said["first"])
            began = time.time()
            subprocess.run([sys.executable, "-c", "import httpx"], check=True)
            bare.append(time.time() - began)
    return {
        "new process to its first shared answer, ms": round(statistics.median(took) * 1000),
        "of that the interpreter and httpx, ms": round(statistics.median(bare) * 1000),
    }


def question() -> dict[str, Any]:
    """A question through the daemon, beside one to a node in the same process."""
    with Origin(made_up(1)) as origin, _runners(1, origin) as (runner,):
        through = [runner.run(_ASK) for _ in range(3)]
        runner.environment["CACHE_NODE"] = "embedded"
        own = [runner.run(_ASK) for _ in range(3)]
        del runner.environment["CACHE_NODE"]
    medians = f"{statistics.median(own):.2f} / {statistics.median(through):.2f}"
    return {"a question: own node / through the daemon, ms": medians}


def throughput() -> dict[str, Any]:
    """Hits through the door, by one process and by two."""
    found: dict[str, Any] = {}
    with Origin(made_up(20)) as origin, _runners(1, origin) as (runner,):
        door = json.loads(runner.p2pcache("status", "--json"))["door"]
        urls = [origin.url + target for target in origin.resources]
        for count in (1, 2):
            load = [runner.start(_DOOR, door, *urls) for _ in range(count)]
            rates = [json.loads(process.communicate()[0]) for process in load]
            found[f"hits through one daemon's door, {count} process{'es' if count > 1 else ''}: a second"] = round(
                sum(rates)
            )
    return found


def killed() -> dict[str, Any]:
    """The daemon is SIGKILLed under load from five processes, and started anew."""
    with Origin(made_up(50), latency=0.02) as origin:
        for resource in origin.resources.values():
            resource.max_age = 1
        with _runners(1, origin) as (runner,):
            urls = [origin.url + target for target in origin.resources]
            load = [runner.start(_LOAD, "0.02", *urls) for _ in range(5)]
            for process in load:
                assert process.stdout is not None
                process.stdout.readline()
            time.sleep(2)
            os.kill(runner.daemon(), signal.SIGKILL)
            time.sleep(2)
            runner.p2pcache("init")
            time.sleep(2)
            said = [json.loads(process.communicate("stop\n")[0]) for process in load]
    return {
        "daemon killed under load: requests / failed": f"{sum(s['requests'] for s in said)} / "
        f"{sum(len(s['failed']) for s in said)}",
        "daemon killed under load: slowest answer, s": round(max(s["slowest"] for s in said), 2),
        "daemon started anew: processes that came back": f"{sum(bool(s['back']) for s in said)} of 5",
    }


def soak(seconds: int = 1200) -> dict[str, Any]:
    """100 requests a second by five processes of two runners, reads and writes, while one's daemon and processes are
    killed in turns: is every answer right, and does the other daemon stay as it is?"""
    with Origin(made_up(200), latency=0.02, limit=10**6) as origin:
        for resource in origin.resources.values():
            resource.max_age = 5
        with _runners(2, origin) as runners:
            steady, shaken = runners
            urls = [origin.url + target for target in origin.resources]

            def begin(number: int) -> subprocess.Popen[str]:
                process = runners[number % 2].start(_SOAK, "0.2", str(number), *urls)
                assert process.stdout is not None
                process.stdout.readline()
                return process

            load = [begin(number) for number in range(5)]
            series, killed = [], 0
            for tick in range(seconds // 10):
                time.sleep(10)
                memory, descriptors = _size(steady.daemon())
                series.append([(tick + 1) * 10, round(memory, 1), descriptors, len(origin.calls)])
                if tick % 6 == 2:
                    os.kill(shaken.daemon(), signal.SIGKILL)
                    shaken.p2pcache("init")
                    killed += 1
                elif tick % 6 == 5:
                    load[1].kill()
                    load[1].communicate()
                    load[1] = begin(1)
                    killed += 1
            said = [json.loads(process.communicate("stop\n")[0]) for process in load]
    minute = min(6, len(series) - 1)
    return {
        f"{seconds} s of load: requests of who lived / failed": f"{sum(s['requests'] for s in said)} / "
        f"{sum(len(s['failed']) for s in said)}",
        "why they failed": ", ".join(sorted({why for s in said for why in s["failed"]})[:5]) or "none did",
        "wrong answers": sum(s["wrong"] for s in said),
        "writes": sum(s["writes"] for s in said),
        "daemons and processes killed": killed,
        "slowest answer, s": round(max(s["slowest"] for s in said), 2),
        "memory of the steady daemon after a minute / at the end, MiB": f"{series[minute][1]} / {series[-1][1]}",
        "its descriptors after a minute / at the end": f"{series[minute][2]} / {series[-1][2]}",
        "series: A daemon under load: seconds, MiB, descriptors": [row[:3] for row in series],
    }


def _size(process: int) -> tuple[float, int]:
    """Resident MiB and open descriptors of a process (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return resident / 1024, len(os.listdir(f"/proc/{process}/fd"))


def run() -> dict[str, Any]:
    return {**short_processes(), **first_shared_call(), **question(), **throughput(), **killed()}

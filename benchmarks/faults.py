"""What a fault costs, and what a freshness period costs: a claimant or a runner killed, runners that poll."""

from __future__ import annotations

import hashlib
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

import msgspec

from httpx_p2pcache.testing import Origin, Resource, made_up

# A runner that joins, says so, waits for a line, and then asks for all URLs with so many threads, so often.
_RUNNER = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import httpx
from httpx_p2pcache import P2PCacheTransport
urls, threads, rounds, period = json.loads(sys.stdin.readline())
transport = P2PCacheTransport()
client = httpx.Client(transport=transport, headers={"Authorization": "Bearer one"}, timeout=30)
transport.wait_until_joined(60)
print("ready", flush=True)
begin = float(sys.stdin.readline())
answers = []
def fetch(url):
    asked = time.time()
    try:
        answer = client.get(url)
        answers.append((asked, time.time(), answer.status_code, len(answer.content)))
    except httpx.HTTPError as exc:
        answers.append((asked, time.time(), 0, 0))
with ThreadPoolExecutor(threads) as pool:
    for turn in range(rounds):
        time.sleep(max(0, begin + turn * period - time.time()))
        list(pool.map(fetch, urls))
print(json.dumps(answers), flush=True)
sys.stdin.readline()
client.close()
"""


class Runner:
    """One runner process."""

    def __init__(self, scratch: Path, name: str, work: list[Any]) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CACHE_")}
        environment |= {
            "CACHE_DIR": str(scratch / name),
            "CACHE_PEER_REGISTRY": str(scratch / "registry"),
            "CACHE_SHARED_SECRET": hashlib.sha256(str(scratch).encode()).hexdigest(),
            "CACHE_PUBLIC_BOOTSTRAP": "false",
            "CACHE_LISTEN_HOST": "127.0.0.1",
            "CACHE_LISTEN_PORT": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.tell(msgspec.json.encode(work).decode())

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def answers(self) -> list[list[float]]:
        found: list[list[float]] = msgspec.json.decode(self.hear())
        return found


@contextmanager
def _fleet(count: int, work: list[Any]) -> Iterator[list[Runner]]:
    with tempfile.TemporaryDirectory() as scratch:
        runners = [Runner(Path(scratch), f"runner-{number}", work) for number in range(count)]
        try:
            for runner in runners:
                assert runner.hear() == "ready\n"
            yield runners
        finally:
            for runner in runners:
                runner.process.kill()
                runner.process.communicate()


def _begin(runners: list[Runner], delay: float = 0.2) -> float:
    at = time.time() + delay
    for runner in runners:
        runner.tell(str(at))
    return at


def one_cold_url() -> dict[str, Any]:
    """5 processes x 50 concurrent requests for one cold URL."""
    with Origin(made_up(1), latency=0.08) as origin:
        urls = [origin.url + target for target in origin.resources] * 50
        with _fleet(5, [urls, 50, 1, 0]) as runners:
            _begin(runners)
            answers = [answer for runner in runners for answer in runner.answers()]
        right = sum(answer[2] == 200 for answer in answers)
        return {"5 processes x 50 requests for one cold URL: calls": len(origin.calls), "right": f"{right} of 250"}


def claimant_killed() -> dict[str, Any]:
    """The claimant is SIGKILLed in the middle of its fetch: how long the others wait after that."""
    late, calls = [], []
    for _ in range(3):
        with Origin(made_up(1), latency=1.0) as origin:
            urls = [origin.url + target for target in origin.resources]
            with _fleet(5, [urls, 1, 1, 0]) as runners:
                first = runners[0]
                first.tell(str(time.time()))
                time.sleep(0.3)
                _begin(runners[1:], 0.0)
                time.sleep(0.3)
                first.process.send_signal(signal.SIGKILL)
                killed = time.time()
                answers = [answer for runner in runners[1:] for answer in runner.answers()]
            assert all(answer[2] == 200 for answer in answers)
            late.append(max(answer[1] for answer in answers) - killed - origin.latency)
            calls.append(len(origin.calls))
    return {
        "claimant killed mid-fetch: last answer after death, beyond the origin's latency, s": round(max(late), 2),
        "claimant killed mid-fetch: calls in all (1 is the dead one's)": max(calls),
    }


def runner_killed() -> dict[str, Any]:
    """One of five is SIGKILLed in the middle of the main job."""
    with Origin(made_up(100), latency=0.08) as origin:
        urls = [origin.url + target for target in origin.resources]
        with _fleet(5, [urls, 4, 1, 0]) as runners:
            begin = _begin(runners)
            time.sleep(max(0.0, begin + 1.2 - time.time()))
            runners[2].process.send_signal(signal.SIGKILL)
            answers = [answer for number in (0, 1, 3, 4) for answer in runners[number].answers()]
        slowest = max(answer[1] - answer[0] for answer in answers)
        steps = [round(0.1 * n, 1) for n in range(int((max(a[1] for a in answers) - begin) * 10) + 2)]
        return {
            "series: One of five killed after 1.2 s: seconds, answers to the other four, calls": [
                [
                    at,
                    sum(answer[1] <= begin + at for answer in answers),
                    sum(call.at <= begin + at for call in origin.calls),
                ]
                for at in steps
            ],
            "one of five killed mid-job: right answers": f"{sum(a[2] == 200 for a in answers)} of 400",
            "one of five killed mid-job: slowest answer, s": round(slowest, 2),
            "one of five killed mid-job: calls": len(origin.calls),
        }


def polling(seconds: int = 40) -> dict[str, Any]:
    """5 runners poll 20 URLs each second; fresh for 10 seconds."""
    resources = {f"/polled/{number}": Resource(b'{"n": %d}' % number, max_age=10) for number in range(20)}
    with Origin(resources, latency=0.02) as origin:
        urls = [origin.url + target for target in resources]
        with _fleet(5, [urls, 4, seconds, 1]) as runners:
            _begin(runners)
            answers = [answer for runner in runners for answer in runner.answers()]
        conditional = sum(call.status == 304 for call in origin.calls)
        full = len(origin.calls) - conditional
    waits = sorted(answer[1] - answer[0] for answer in answers)
    return {
        f"polling for {seconds} s: conditional calls per URL and period (5 without sharing)": round(
            conditional / (20 * (seconds / 10 - 1)), 2
        ),
        f"polling for {seconds} s: full calls (20 are needed)": full,
        f"polling for {seconds} s: right answers": f"{sum(a[2] == 200 for a in answers)} of {5 * 20 * seconds}",
        f"polling for {seconds} s: median answer, ms": round(statistics.median(waits) * 1000, 1),
    }


def run() -> dict[str, Any]:
    return {**one_cold_url(), **claimant_killed(), **runner_killed(), **polling()}

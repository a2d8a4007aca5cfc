"""The main job, done by everybody: a cold fleet asks for the same URLs in the same second. In turns, medians.

The rivals are in ``rivals``; ours is there embedded, with a daemon for each runner, and through its door. What is not
installed is skipped, and named.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.contestant import Job, Seen
from benchmarks.rivals import RIVALS, Rival, Skipped
from httpx_p2pcache.daemon import life
from httpx_p2pcache.testing import Origin, made_up

OURS = ("ours", "ours, daemon", "ours, door")
LATENCY = 0.08
CONCURRENCY = 4


class Outcome(msgspec.Struct):
    """One run. ``calls`` reached the origin, ``counted`` of them count against a limit; times in ms."""

    calls: int
    counted: int
    right: int
    asked: int
    seconds: float
    p50: float
    p90: float
    p99: float


@contextmanager
def _ours(kind: str, count: int, origin: Origin) -> Iterator[list[tuple[Rival, dict[str, str]]]]:
    """For each runner what it asks with, and its environment."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as scratch:
        environments = [
            {
                "CACHE_DIR": f"{scratch}/{number}",
                "CACHE_PEER_REGISTRY": f"{scratch}/registry",
                "CACHE_SHARED_SECRET": secret,
                "CACHE_LISTEN_HOST": "127.0.0.1",
                "CACHE_LISTEN_PORT": "0",
                "CACHE_PUBLIC_BOOTSTRAP": "false",
                "CACHE_GITHUB_HOSTS": origin.netloc,
                "CACHE_NODE": "embedded" if kind == "ours" else "daemon",
            }
            for number in range(count)
        ]
        command = [sys.executable, "-m", "httpx_p2pcache.cli"]
        try:
            if kind != "ours":
                starting = [
                    subprocess.Popen([*command, "init", "--wait", "30"], env=_environ(one), stdout=subprocess.DEVNULL)
                    for one in environments
                ]
                assert [process.wait(90) for process in starting] == [0] * count
            found = []
            for one in environments:
                where = life.Remote(Path(one["CACHE_DIR"])).get("/status") if kind == "ours, door" else None
                word: Any = "ours" if where is None else "door"
                found.append((Rival(kind, "", origin.url, word, str(where["door"]) if where else ""), one))
            yield found
        finally:
            if kind != "ours":
                for one in environments:
                    subprocess.run([*command, "stop"], env=_environ(one), capture_output=True)


def _environ(more: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CACHE_")} | more


@contextmanager
def _contenders(name: str, count: int, origin: Origin) -> Iterator[list[tuple[Rival, dict[str, str]]] | Skipped]:
    if name in OURS:
        with _ours(name, count, origin) as found:
            yield found
    else:
        with RIVALS[name](origin.url) as rival:
            yield rival if isinstance(rival, Skipped) else [(rival, {})] * count


def contest(name: str, count: int, urls: int, *, own_tokens: bool, at_a_time: int = CONCURRENCY) -> Outcome | Skipped:
    """One run of one of them: ``count`` runners, each asking for the same ``urls`` URLs in the same order."""
    resources = made_up(urls)
    right = {path: hashlib.sha256(one.body).hexdigest() for path, one in resources.items()}
    with Origin(resources, latency=LATENCY, limit=10**6) as origin, _contenders(name, count, origin) as contenders:
        if isinstance(contenders, Skipped):
            return contenders
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.contestant"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=_environ(environment),
            )
            for _, environment in contenders
        ]
        try:
            for number, (process, (rival, _)) in enumerate(zip(processes, contenders, strict=True)):
                token = f"token-of-{number}" if own_tokens else "token-of-all"
                job = Job(rival.kind, rival.where, rival.url, number, list(resources), token, at_a_time, count - 1)
                _tell(process, msgspec.json.encode(job).decode())
            assert [_hear(process) for process in processes] == ["ready\n"] * count
            origin.reset()
            begin = time.time() + 0.3
            for process in processes:
                _tell(process, str(begin))
            said = [msgspec.json.decode(_hear(process)) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        seen = [msgspec.convert(one, Seen) for runner in said for one in runner["seen"]]
        times = sorted(one.ms for one in seen)
        return Outcome(
            calls=len(origin.calls),
            counted=origin.counted(),
            right=sum(one.status == 200 and right[one.path] == one.sha256 for one in seen),
            asked=count * urls,
            seconds=max(runner["seconds"] for runner in said),
            p50=times[len(times) // 2],
            p90=times[int(len(times) * 0.9)],
            p99=times[int(len(times) * 0.99)],
        )


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def compare(
    names: Sequence[str],
    count: int,
    urls: int,
    *,
    own_tokens: bool,
    at_a_time: int = CONCURRENCY,
    twice: Sequence[str] = (),
) -> dict[str, Any]:
    """Everybody in turn, then who is named ``twice`` the other way round; medians, and the worst number of calls."""
    runs: dict[str, list[Outcome]] = {name: [] for name in names}
    skipped: dict[str, str] = {}
    for name in [*names, *twice[::-1]]:
        if name in skipped:
            continue
        print(f"  {count} runners, {at_a_time} at a time: {name}", file=sys.stderr, flush=True)
        outcome = contest(name, count, urls, own_tokens=own_tokens, at_a_time=at_a_time)
        if isinstance(outcome, Skipped):
            skipped[name] = outcome.reason
        else:
            runs[name].append(outcome)
    rows: dict[str, Any] = {name: {"skipped": reason} for name, reason in skipped.items()}
    for name, outcomes in runs.items():
        if outcomes:
            middle = {
                field: round(statistics.median(getattr(one, field) for one in outcomes), 2)
                for field in ("calls", "counted", "seconds", "p50", "p90", "p99")
            }
            right = f"{min(one.right for one in outcomes)} of {outcomes[0].asked}"
            rows[name] = {
                **middle,
                "most_calls": max(one.calls for one in outcomes),
                "right": right,
                "runs": len(outcomes),
            }
    return rows


def run(*, quick: bool = False) -> dict[str, Any]:
    everybody = [*RIVALS, *OURS]
    shared = ["no cache", "nginx", "Varnish", *OURS]  # a cache for each shares no tokens
    twice = [] if quick else ["Varnish", *OURS]  # whose times are near to each other
    found = {
        "5 runners, 100 URLs, one token": compare(everybody, 5, 100, own_tokens=False, twice=twice),
        "5 runners, 100 URLs, a token each": compare(shared, 5, 100, own_tokens=True),
    }
    if not quick:
        many, title = ["nginx", "Varnish", "ours", "ours, daemon"], "20 runners, 50 URLs, one token"
        found[f"{title}, one request at a time"] = compare(many, 20, 50, own_tokens=False, at_a_time=1)
        found[f"{title}, four at a time"] = compare(many[1:], 20, 50, own_tokens=False)
    return found

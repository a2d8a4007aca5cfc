"""``p2pcache demo``: real runner processes, a stand-in origin, and what sharing saves."""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from httpx_p2pcache.cli.runner_process import Job, Seen
from httpx_p2pcache.testing import Origin, Resource

START_SECONDS = 60.0  # for all runners to have started
RUN_SECONDS = 300.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo does. ``latency`` and ``stagger`` in seconds; ``targets`` in the order asked, repeats included."""

    runners: int
    resources: dict[str, Resource]
    targets: list[str]
    latency: float
    own_tokens: bool
    stagger: float
    concurrency: int
    client: Literal["sync", "asyncio", "trio"]


class Sources(msgspec.Struct, frozen=True):
    """Answers by where they came from, with the latencies of each in milliseconds."""

    count: int
    median_ms: float
    p99_ms: float


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One run of all runners, with or without sharing."""

    sharing: bool
    asked: int
    right: int
    origin_calls: int
    counted_calls: int
    seconds: float
    errors: list[str]
    sources: dict[str, Sources]
    runners: list[dict[str, int | float]]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Both rounds. ``saved`` is the share of counted calls that sharing has saved, 0 to 1."""

    runners: int
    urls: int
    without: Round
    with_sharing: Round
    saved: float
    right: bool


Progress = Callable[[str, int, int], None]


def demonstrate(plan: Plan, progress: Progress) -> Outcome:
    """Run all runners without sharing and with it; ``progress(round, runner, answers so far)`` as they go on."""
    with tempfile.TemporaryDirectory(prefix="p2pcache-demo-") as scratch:
        without = _round(plan, Path(scratch) / "alone", False, progress)
        shared = _round(plan, Path(scratch) / "shared", True, progress)
    saved = 1 - shared.counted_calls / without.counted_calls if without.counted_calls else 0.0
    return Outcome(
        runners=plan.runners,
        urls=len(plan.targets),
        without=without,
        with_sharing=shared,
        saved=saved,
        right=all(round_.right == round_.asked and not round_.errors for round_ in (without, shared)),
    )


def _round(plan: Plan, directory: Path, sharing: bool, progress: Progress) -> Round:
    name = "with sharing" if sharing else "without"
    with Origin(plan.resources, latency=plan.latency, limit=1_000_000) as origin:
        expected = {origin.url + target: hashlib.sha256(r.body).hexdigest() for target, r in plan.resources.items()}
        with _processes(plan, origin, directory, sharing) as processes:
            urls = [origin.url + target for target in plan.targets]
            results = _run(plan, processes, urls, lambda runner, n: progress(name, runner, n))
        calls, counted = len(origin.calls), origin.counted()
    seen = [msgspec.convert(answer, Seen) for result in results for answer in result["answers"]]
    return Round(
        sharing=sharing,
        asked=plan.runners * len(plan.targets),
        right=sum(answer.status == 200 and expected[answer.url] == answer.sha256 for answer in seen),
        origin_calls=calls,
        counted_calls=counted,
        seconds=max((result["seconds"] for result in results), default=0.0),
        errors=[error for result in results for error in result["errors"]],
        sources=_by_source(seen),
        runners=[_per_runner(result) for result in results],
    )


def _by_source(seen: list[Seen]) -> dict[str, Sources]:
    found = {}
    for source in ("local", "peer", "origin"):
        times = sorted(answer.ms for answer in seen if answer.source == source)
        if times:
            found[source] = Sources(len(times), statistics.median(times), times[int(len(times) * 0.99)])
    return found


def _per_runner(result: dict[str, Any]) -> dict[str, int | float]:
    sources = [answer["source"] for answer in result["answers"]]
    counts: dict[str, int | float] = {source: sources.count(source) for source in ("local", "peer", "origin")}
    return {**counts, "joined": round(result["joined"], 2), "seconds": round(result["seconds"], 2)}


@contextmanager
def _processes(plan: Plan, origin: Origin, directory: Path, sharing: bool) -> Iterator[list[subprocess.Popen[str]]]:
    processes = []
    try:
        for number in range(plan.runners):
            environment = {name: value for name, value in os.environ.items() if not name.startswith("CACHE_")}
            environment |= {
                "CACHE_ENABLE_P2P": str(sharing).lower(),
                "CACHE_DIR": str(directory / f"runner-{number}"),
                "CACHE_PEER_REGISTRY": str(directory / "peers"),
                "CACHE_SHARED_SECRET": hashlib.sha256(os.urandom(16)).hexdigest() if not sharing else _SECRET,
                "CACHE_FLEET": "demo",
                "CACHE_LISTEN_HOST": "127.0.0.1",
                "CACHE_LISTEN_PORT": "0",
                "CACHE_GITHUB_HOSTS": origin.netloc,
                "NO_PROXY": "127.0.0.1",
            }
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "httpx_p2pcache.cli.runner_process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


_SECRET = hashlib.sha256(os.urandom(16)).hexdigest()


def _run(
    plan: Plan, processes: list[subprocess.Popen[str]], urls: list[str], progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Start all runners at one instant, and gather what each says. Raises RuntimeError if one does not start."""
    results: dict[int, dict[str, Any]] = {}
    joined: dict[int, float] = {}
    ready = threading.Barrier(len(processes) + 1)

    def follow(number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said = msgspec.json.decode(line)
            if "ready" in said:
                joined[number] = said["ready"]
                ready.wait(START_SECONDS)
            elif "done" in said:
                progress(number, said["done"])
            else:
                results[number] = {**said, "joined": joined[number]}

    readers = []
    for number, process in enumerate(processes):
        token = f"token-of-runner-{number}" if plan.own_tokens else "token-of-all"
        job = Job(urls, token, plan.client, plan.concurrency, number * plan.stagger)
        _tell(process, msgspec.json.encode(job).decode())
        readers.append(threading.Thread(target=follow, args=(number, process), daemon=True))
        readers[-1].start()
    try:
        ready.wait(START_SECONDS)
    except threading.BrokenBarrierError:
        raise RuntimeError("a runner did not start") from None
    begin = time.time() + 0.1
    for process in processes:
        _tell(process, str(begin))
    for reader in readers:
        reader.join(RUN_SECONDS)
    empty = {"answers": [], "errors": ["the runner ended without a result"], "joined": 0.0, "seconds": 0.0}
    return [results.get(number, empty) for number in range(len(processes))]


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()

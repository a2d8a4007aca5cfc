"""One runner of ``p2pcache demo``: a process that asks for the same URLs as the others, and says how that went.

Reads one JSON object from standard input (see :class:`Job`), says ``{"ready": seconds}`` once it has joined, reads one
line with the Unix time to begin at, then says ``{"done": n}`` as it goes on and at last ``{"answers": …}``. Its
environment holds its settings.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import anyio
import httpx
import msgspec

from httpx_p2pcache import P2PCacheTransport

JOIN_SECONDS = 30.0  # the demo is about a fleet: its runners wait for theirs


class Job(msgspec.Struct):
    """What a runner does. ``delay`` is in seconds after the common start."""

    urls: list[str]
    token: str
    client: Literal["sync", "asyncio", "trio"]
    concurrency: int
    delay: float


class Seen(msgspec.Struct):
    """One answer as the runner saw it. ``ms`` from the request to the last byte of the body."""

    url: str
    status: int
    sha256: str
    source: str
    ms: float


def main() -> None:
    job = msgspec.json.decode(sys.stdin.readline(), type=Job)
    transport = P2PCacheTransport()
    started = time.monotonic()
    transport.wait_until_joined(JOIN_SECONDS)
    _say({"ready": time.monotonic() - started})
    begin = float(sys.stdin.readline()) + job.delay
    time.sleep(max(0.0, begin - time.time()))
    run = _sync if job.client == "sync" else _async
    answers, errors = run(job, transport)
    _say({"answers": msgspec.to_builtins(answers), "errors": errors, "seconds": time.time() - begin})
    transport.close()


_lock = threading.Lock()


def _say(value: dict[str, Any]) -> None:
    with _lock:
        print(msgspec.json.encode(value).decode(), flush=True)


def _seen(response: httpx.Response, url: str, started: float) -> Seen:
    ms = (time.perf_counter() - started) * 1000
    source = response.extensions["caching"]["source"]
    return Seen(url, response.status_code, hashlib.sha256(response.content).hexdigest(), source, ms)


def _options(job: Job) -> dict[str, Any]:
    headers = {"Accept": "application/vnd.github+json", "Authorization": f"Bearer {job.token}"}
    return {"headers": headers, "timeout": 30.0}


def _sync(job: Job, transport: P2PCacheTransport) -> tuple[list[Seen], list[str]]:
    answers: list[Seen] = []
    errors: list[str] = []

    def fetch(url: str) -> None:
        started = time.perf_counter()
        try:
            answers.append(_seen(client.get(url), url, started))
        except httpx.HTTPError as exc:
            errors.append(repr(exc))
        _say({"done": len(answers)})

    with httpx.Client(transport=transport, **_options(job)) as client, ThreadPoolExecutor(job.concurrency) as pool:
        list(pool.map(fetch, job.urls))
    return answers, errors


def _async(job: Job, transport: P2PCacheTransport) -> tuple[list[Seen], list[str]]:
    answers: list[Seen] = []
    errors: list[str] = []

    async def fetch_all() -> None:
        send, receive = anyio.create_memory_object_stream[str](len(job.urls))
        for url in job.urls:
            send.send_nowait(url)
        send.close()

        async def worker(urls: Any) -> None:
            async with urls:
                async for url in urls:
                    started = time.perf_counter()
                    try:
                        answers.append(_seen(await client.get(url), url, started))
                    except httpx.HTTPError as exc:
                        errors.append(repr(exc))
                    _say({"done": len(answers)})

        async with (
            httpx.AsyncClient(transport=transport, **_options(job)) as client,
            anyio.create_task_group() as group,
        ):
            for _ in range(job.concurrency):
                group.start_soon(worker, receive.clone())
            receive.close()

    anyio.run(fetch_all, backend=job.client)
    return answers, errors


if __name__ == "__main__":
    main()

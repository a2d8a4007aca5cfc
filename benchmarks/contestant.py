"""One runner of ``contest``: reads its job (JSON), says ``ready``, reads when to begin, says what it saw."""

from __future__ import annotations

import hashlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from benchmarks import rivals


class Job(msgspec.Struct):
    """``kind`` is a rival's, ``ours`` or ``door``; ``where`` a directory, a redis:// URL or the door's socket.

    ``peers``: how many others ours has to have met before it is ready.
    """

    kind: str
    where: str
    url: str
    number: int
    paths: list[str]
    token: str
    concurrency: int
    peers: int


class Seen(msgspec.Struct):
    path: str
    status: int
    sha256: str
    ms: float


def client_of(job: Job) -> Any:
    headers = {"Accept": "application/vnd.github+json", "Authorization": f"Bearer {job.token}"}
    if job.kind not in ("ours", "door"):
        return rivals.client(job.kind, job.where, job.number, headers)  # type: ignore[arg-type] # one of its words
    import httpx

    if job.kind == "door":
        return httpx.Client(transport=httpx.HTTPTransport(uds=job.where), headers=headers, timeout=30.0)
    from httpx_p2pcache import P2PCacheTransport

    transport = P2PCacheTransport()
    until = time.monotonic() + 60
    while transport.stats()["connected_peers"] < job.peers and time.monotonic() < until:  # type: ignore[operator]
        time.sleep(0.05)
    return httpx.Client(transport=transport, headers=headers, timeout=30.0)


def main() -> None:
    job = msgspec.json.decode(sys.stdin.readline(), type=Job)
    client = client_of(job)
    seen: list[Seen] = []

    def fetch(path: str) -> None:
        began = time.perf_counter()
        try:
            answer = client.get(job.url + path)
            body = hashlib.sha256(answer.content).hexdigest()
            seen.append(Seen(path, answer.status_code, body, (time.perf_counter() - began) * 1000))
        except Exception:  # a rival's client may raise anything; an answer that is missing is not right
            seen.append(Seen(path, 0, "", (time.perf_counter() - began) * 1000))

    with ThreadPoolExecutor(job.concurrency) as pool:
        # What a process does once, as connecting, comes before the clock starts, for everybody.
        list(pool.map(lambda n: client.get(f"{job.url}/before/{job.number}/{n}"), range(job.concurrency)))
        print("ready", flush=True)
        begin = float(sys.stdin.readline())
        time.sleep(max(0.0, begin - time.time()))
        list(pool.map(fetch, job.paths))
    print(msgspec.json.encode({"seconds": time.time() - begin, "seen": seen}).decode(), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()

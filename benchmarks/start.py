"""What it costs to begin and to end: import, construction, close, and how long a node takes to join."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

TURNS = 7

_CLOCK = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
_OURS = "from httpx_p2pcache import P2PCacheTransport"
_NODE = """
import json, sys, threading, time
from pathlib import Path
from httpx_p2pcache import P2PCacheTransport, Settings
here = {"listen_host": "127.0.0.1", "listen_port": 0, "public_bootstrap": False}
settings = Settings(dir=Path(sys.argv[1]), shared_secret="a secret for a benchmark", **here)
began = time.perf_counter()
transport = P2PCacheTransport(settings=settings)
constructed = time.perf_counter()
transport.wait_until_joined(60)
joined = time.perf_counter()
transport.close()
closed = time.perf_counter()
left = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
print(json.dumps([constructed - began, joined - began, closed - joined, len(left)]))
"""


def run() -> dict[str, Any]:
    theirs, ours = [], []
    for _ in range(TURNS):
        theirs.append(float(_python(_CLOCK.format("import httpx, hishel.httpx"))))
        ours.append(
            float(_python(_CLOCK.format("import httpx, hishel.httpx; from httpx_p2pcache import P2PCacheTransport")))
        )
    nodes = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as scratch:
            nodes.append(json.loads(_python(_NODE, scratch)))
    constructed, joined, closed, left = (statistics.median(column) for column in zip(*nodes, strict=True))
    return {
        "import httpx, hishel.httpx, ms": round(statistics.median(theirs) * 1e3),
        "import httpx_p2pcache after them, ms": round((statistics.median(ours) - statistics.median(theirs)) * 1e3),
        "construction with P2P on, ms": round(constructed * 1e3, 1),
        "an embedded node has joined after, s": round(joined, 2),
        "close(), s": round(closed, 2),
        "threads left after close()": left,
    }


def _python(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout

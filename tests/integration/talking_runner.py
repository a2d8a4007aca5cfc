"""A runner in a process of its own that does what it is told, line by line, for the tests of real processes.

Reads JSON objects from standard input and answers each with one on standard output::

    {"do": "join"}                    -> {"joined": true}
    {"do": "get", "url": …}           -> {"status": …, "sha256": …, "source": …, "seconds": …} or {"error": …}
    {"do": "begin", "url": …}         -> {"begun": true}; the answer is kept for "end"
    {"do": "end"}                     -> as "get"
    {"do": "stats"}                   -> what the transport's stats() says
    {"do": "fork"}                    -> {"child": pid}: from now on a child answers until it is told to exit
    {"do": "exit", "close": false}    -> the process ends, with or without closing its transport
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from typing import Any

import httpx

from httpx_p2pcache import P2PCacheTransport


def main() -> None:
    transport = P2PCacheTransport()
    headers = {"Authorization": f"Bearer {os.environ['TEST_TOKEN']}"}
    client = httpx.Client(transport=transport, headers=headers, timeout=30.0)

    def get(url: str) -> dict[str, Any]:
        began = time.monotonic()
        try:
            response = client.get(url)
        except Exception as exc:
            return {"error": repr(exc)}
        return {
            "status": response.status_code,
            "sha256": hashlib.sha256(response.content).hexdigest(),
            "source": response.extensions["caching"]["source"],
            "seconds": time.monotonic() - began,
        }

    under_way: threading.Thread | None = None
    kept: list[dict[str, Any]] = []
    parent = True
    # Unbuffered: a forked child and its parent read from the same pipe, one after the other.
    commands = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - open to the end
    while line := commands.readline():
        told = json.loads(line)
        answer: dict[str, Any] = {}
        if told["do"] == "join":
            answer = {"joined": transport.wait_until_joined(30)}
        elif told["do"] == "get":
            answer = get(told["url"])
        elif told["do"] == "begin":
            under_way = threading.Thread(target=lambda url=told["url"]: kept.append(get(url)), daemon=True)
            under_way.start()
            answer = {"begun": True}
        elif told["do"] == "end" and under_way is not None:
            under_way.join(30)
            answer = kept.pop()
        elif told["do"] == "stats":
            answer = transport.stats()
        elif told["do"] == "fork":
            child = os.fork()
            if child:
                os.waitpid(child, 0)
                answer = {"back": True}
            else:
                parent = False
                answer = {"child": os.getpid()}
        elif told["do"] == "exit":
            if told.get("close", True):
                client.close()
            if not parent:
                os._exit(0)
            return
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
    sys.exit()

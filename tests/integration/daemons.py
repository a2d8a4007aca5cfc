"""A runner with its environment, for tests that use the command and the daemon as their users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from secret import secret_of

from httpx_p2pcache.daemon import life
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.stats import Stats

TOKEN = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"
# A step of a job: asks for each URL once, and says where the answers came from.
STEP = """
import hashlib, json, sys
import httpx
from httpx_p2pcache import P2PCacheTransport, get_stats
headers = {"Authorization": "Bearer TOKEN"}
with httpx.Client(transport=P2PCacheTransport(), headers=headers, timeout=30) as client:
    answers = [client.get(url) for url in sys.argv[1:]]
    bodies = [hashlib.sha256(answer.content).hexdigest() for answer in answers]
    sources = [answer.extensions["caching"]["source"] for answer in answers]
    stats = get_stats()
imported = [name for name in ("libp2p", "cryptography") if name in sys.modules]
print(json.dumps({"sources": sources, "sha256": bodies, "imported": imported, "stats": stats}))
""".replace("TOKEN", TOKEN)


class Runner:
    """A runner whose store is in ``directory``; ``stop`` ends its daemon, whatever happened to it."""

    def __init__(self, directory: Path, registry: Path, **changes: str) -> None:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("CACHE_", "GITHUB_", "GH_", "RUNNER_"))}
        ours = {
            "CACHE_DIR": str(directory),
            "CACHE_PEER_REGISTRY": str(registry),
            "CACHE_SHARED_SECRET": secret_of(registry),
            "CACHE_PUBLIC_BOOTSTRAP": "false",
            "CACHE_LISTEN_HOST": "127.0.0.1",
            "CACHE_LISTEN_PORT": "0",
            "NO_PROXY": "127.0.0.1",
        }
        self.directory = directory
        self.environment = kept | ours | changes

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``p2pcache`` with these arguments, to its end."""
        command = [sys.executable, "-m", "httpx_p2pcache.cli", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=90)

    def p2pcache(self, *arguments: str) -> str:
        """The same, where it is to succeed: what it printed."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        """What its daemon says of itself; empty without one."""
        return life.Remote(self.directory).get("/status") or {}

    def start(self, code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A process of this runner that runs ``code``."""
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )

    def step(self, *urls: str) -> dict[str, Any]:
        return heard(self.start(STEP, *urls))

    def stop(self) -> None:
        self.run("stop")


def heard(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process says at its end."""
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(said)
    return found


def having_asked(root: Path, endpoint: str) -> Runner:
    """A runner without a daemon that has made one request."""
    (root / "store").mkdir()
    stats = Stats()
    stats.add("requests", 1, endpoint)
    Ledger(root / "store").flush(stats)
    return Runner(root / "store", root / "registry")

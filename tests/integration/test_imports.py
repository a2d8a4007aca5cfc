"""Trio is imported by a thread of ours: whoever imports it in that moment as well must not be disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from httpx_p2pcache.testing import Origin

pytest.importorskip("trio")

pytestmark = pytest.mark.p2p

# The thread that imports trio is held up in the middle of that, so that the program surely begins to import it as well.
SCRIPT = """
import sys, threading, time, httpx
from httpx_p2pcache import P2PCacheTransport
half_way = threading.Event()
class HoldUp:
    def find_spec(self, name, path=None, target=None):
        if name == "trio._core" and threading.current_thread() is not threading.main_thread():
            half_way.set()
            time.sleep(0.5)
sys.meta_path.insert(0, HoldUp())
transport = P2PCacheTransport()
async def main():
    async with httpx.AsyncClient(transport=transport) as client:
        (await client.get(sys.argv[1])).raise_for_status()
assert half_way.wait(30)
"""


@pytest.mark.parametrize("shared", ["true", "false"])
@pytest.mark.parametrize("begins", ["import anyio; anyio.run(main, backend='trio')", "import trio; trio.run(main)"])
def test_a_program_may_import_trio_right_after_it_has_made_a_transport(
    origin: Origin, tmp_path: Path, begins: str, shared: str
) -> None:
    settings = {
        "CACHE_ENABLE_P2P": shared,
        "CACHE_NODE": "embedded",
        "CACHE_SHARED_SECRET": "a secret of sixteen characters or more",
        "CACHE_PEER_REGISTRY": str(tmp_path / "registry"),
        "CACHE_LISTEN_HOST": "127.0.0.1",
        "CACHE_LISTEN_PORT": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + begins, f"{origin.url}/repos/octo-org/repo-1"],
        env=os.environ | settings | {"CACHE_DIR": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "has failed" not in done.stderr

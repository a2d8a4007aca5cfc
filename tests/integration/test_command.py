"""The command as its user meets it: what it prints, and what its exit status says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from httpx_p2pcache import __version__

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from httpx_p2pcache.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_it_says_its_version() -> None:
    ran = run("--version")
    assert (ran.returncode, ran.stdout) == (0, f"{__version__}\n")


def test_the_demo_s_figures_can_be_read_by_a_script() -> None:
    ran = run("demo", "--runners", "2", "--urls", "6", "--latency", "20", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    assert (found["runners"], found["urls"], found["right"]) == (2, 6, True)
    assert found["without"]["origin_calls"] == 12
    assert found["with_sharing"]["right"] == 12
    assert found["with_sharing"]["origin_calls"] < 12


def test_in_a_pipe_the_demo_is_plain_text(tmp_path: Path) -> None:
    text = json.dumps({"some": "answer"})
    exchange = {
        "request": {"method": "GET", "url": "https://api.github.com/recorded?page=1"},
        "response": {"status": 200, "content": {"text": text, "mimeType": "application/json"}},
    }
    recorded = tmp_path / "recorded.har"
    recorded.write_text(json.dumps({"log": {"entries": [exchange]}}))
    ran = run("demo", "--runners", "2", "--har", str(recorded), "--own-tokens", "--client", "asyncio", "--latency", "0")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "2 runners x 1 URLs, begun in the same second" in ran.stdout
    assert "\x1b[" not in ran.stdout


@pytest.mark.parametrize(
    ("content", "complaint"), [("{}", "is not an HTTP Archive"), ("no json", "is not an HTTP Archive")]
)
def test_a_recording_that_is_none_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "broken.har"
    path.write_text(content)
    ran = run("demo", "--har", str(path))
    assert ran.returncode == 2
    assert complaint in " ".join(ran.stderr.replace("│", " ").split())


def test_help_teaches() -> None:
    ran = run("demo", "--help")
    assert ran.returncode == 0
    for word in ("--runners", "--own-tokens", "--stagger", "--json", "Exit status 0"):
        assert word in ran.stdout

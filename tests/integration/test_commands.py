"""The commands that need no daemon, and what all of them have in common."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Runner

from httpx_p2pcache.cli.app import app
from httpx_p2pcache.testing import Origin, made_up

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner without a daemon, of which six requests for three URLs are known."""
    root = tmp_path_factory.mktemp("commands")
    runner = Runner(root / "store", root / "registry", CACHE_ENABLE_P2P="false")
    with Origin(made_up(3)) as origin:
        for _ in range(2):
            runner.step(*(f"{origin.url}{target}" for target in origin.resources))
    runner.environment["CACHE_ENABLE_P2P"] = "true"
    return runner


def test_statistics_of_steps_add_up(runner: Runner) -> None:
    found = json.loads(runner.p2pcache("stats", "--json"))
    total = found["total"]
    assert (total["requests"], total["local_hits"], total["origin_calls"]) == (6, 3, 3)
    assert sum(one["requests"] for one in found["endpoints"]) == sum(one["requests"] for one in found["minutes"]) == 6
    assert "calls saved:   3 (0 of them 304s, which are free)" in runner.p2pcache("stats")
    assert "**3 API calls saved** of 6" in runner.p2pcache("stats", "--markdown", "--since", "60")
    assert json.loads(runner.p2pcache("summary", "--json"))["total"] == total


def test_watching_in_a_pipe_is_a_line_of_json_a_second_until_interrupted(runner: Runner) -> None:
    command = [sys.executable, "-m", "httpx_p2pcache.cli", "stats", "--watch"]
    watching = subprocess.Popen(command, env=runner.environment, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    lines = [json.loads(watching.stdout.readline()) for _ in range(2)]
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=30)
    assert [line["requests"] for line in lines] == [6, 6]
    assert watching.returncode == 0


def test_what_needs_the_daemon_says_so(runner: Runner) -> None:
    for arguments in (["stats", "--fleet"], ["status"], ["peers"]):
        done = runner.run(*arguments)
        assert done.returncode == 1
        assert "p2pcache init starts one" in done.stderr
    assert json.loads(runner.run("status", "--json").stdout) == {"running": False}
    assert runner.run("discover").returncode == 1


def test_verify_says_yes_where_all_is_well_and_what_to_do_where_not(runner: Runner) -> None:
    done = runner.run("verify")
    assert (done.returncode, done.stdout.count("✗")) == (0, 0)
    assert "✓ round trip: what one node fetched, a second got from it" in done.stdout
    del runner.environment["CACHE_SHARED_SECRET"]
    bad = Runner(runner.directory, runner.directory / "p2pcache-v1.db" / "no-directory", CACHE_SHARED_SECRET="short")
    checks = {check["about"]: check for check in json.loads(bad.run("verify", "--json").stdout)}
    assert (checks["registry"]["right"], checks["secret"]["right"]) == (False, False)
    assert "set CACHE_PEER_REGISTRY" in checks["registry"]["said"]
    assert "can be guessed" in checks["secret"]["said"]
    runner.environment["CACHE_SHARED_SECRET"] = "5e" * 32


def test_replay_shows_what_sharing_would_save_on_recorded_traffic(runner: Runner, tmp_path: Path) -> None:
    def exchange(number: int, status: int = 200) -> dict[str, object]:
        request = {"method": "GET", "url": f"https://api.github.com/things/{number}"}
        content = {"mimeType": "application/json", "text": json.dumps({"n": number})}
        return {"request": request, "response": {"status": status, "content": content}}

    recorded = [exchange(1), exchange(2), exchange(1), exchange(3, 404)]
    (tmp_path / "recorded.har").write_text(json.dumps({"log": {"entries": recorded}}))
    found = json.loads(runner.p2pcache("replay", str(tmp_path / "recorded.har"), "--runners", "2", "--json"))
    assert found == {"calls_without_cache": 6, "calls_with_own_caches": 4, "calls_with_sharing": 2}
    (tmp_path / "no.har").write_text("{}")
    assert runner.run("replay", str(tmp_path / "no.har")).returncode == 2


def test_clear_empties_the_store_and_on_request_the_statistics(runner: Runner, tmp_path: Path) -> None:
    other = Runner(tmp_path / "store", tmp_path / "registry", CACHE_ENABLE_P2P="false")
    with Origin(made_up(2)) as origin:
        other.step(*(f"{origin.url}{target}" for target in origin.resources))
    assert json.loads(other.p2pcache("clear", "--stats", "--json")) == {"removed": 2}
    assert json.loads(other.p2pcache("stats", "--json"))["total"]["requests"] == 0
    assert other.p2pcache("clear").startswith("0 entries removed")


def test_in_a_pipe_nothing_is_decorated_and_on_a_terminal_it_is(runner: Runner) -> None:
    plain = runner.p2pcache("stats")
    assert "\x1b" not in plain
    assert not set(plain) & set("│┃━─┏┓")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "httpx_p2pcache.cli", "stats"]
    subprocess.run(command, env=runner.environment, stdout=theirs, check=True, timeout=60)
    shown = os.read(ours, 100_000).decode()
    for descriptor in (ours, theirs):
        os.close(descriptor)
    assert set(shown) & set("│┃━─┏┓")


def test_help_of_every_command_says_how_it_may_end() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert "exit status" in (command.callback.__doc__ or "").lower(), command.callback.__name__

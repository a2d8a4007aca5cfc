"""One node per runner: how a daemon begins and ends, and what it is to the processes of a job."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemons import STEP, TOKEN, Runner, heard
from waiting import eventually

from httpx_p2pcache.testing import Origin, made_up

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p

# One that goes on asking with three threads, and says how that went.
LOAD = """
import json, sys, threading, time
import httpx
from httpx_p2pcache import P2PCacheTransport
transport = P2PCacheTransport()
client = httpx.Client(transport=transport, headers={"Authorization": "Bearer TOKEN"}, timeout=30)
stop, waits, failed = threading.Event(), [], []
def work():
    while not stop.is_set():
        for url in sys.argv[1:]:
            began = time.monotonic()
            try:
                client.get(url).raise_for_status()
            except Exception as exc:
                failed.append(repr(exc))
            waits.append(time.monotonic() - began)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for line in sys.stdin:
    print(json.dumps({"active": transport._exchange.network.active, "requests": len(waits)}), flush=True)
stop.set()
for thread in threads:
    thread.join()
print(json.dumps({"failed": failed[:3], "slowest": max(waits)}))
client.close()
""".replace("TOKEN", TOKEN)
Runners = Callable[..., Runner]


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin(made_up(20)) as server:
        yield server


@pytest.fixture
def runner_of(tmp_path: Path, origin: Origin) -> Iterator[Runners]:
    """``runner_of("a")``: a runner; those of one test share registry and secret. Their daemons are ended."""
    made: dict[str, Runner] = {}

    def build(name: str = "a", **changes: str) -> Runner:
        if name not in made:
            changes.setdefault("CACHE_GITHUB_HOSTS", origin.netloc)
            made[name] = Runner(tmp_path / name, tmp_path / "registry", **changes)
        return made[name]

    yield build
    for runner in made.values():
        runner.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runner, Runner]]:
    """Two runners of one fleet whose daemons have met; for tests that leave them as they were."""
    root = tmp_path_factory.mktemp("pair")
    runners = Runner(root / "a", root / "registry"), Runner(root / "b", root / "registry")
    try:
        for runner in runners:
            runner.environment["CACHE_LOOKUP_TIMEOUT"] = "2"  # many interpreters start on one machine at once
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda runner: runner.p2pcache("init"), runners))
        assert eventually(lambda: [runner.status()["connected_peers"] for runner in runners] == [1, 1])
        yield runners
    finally:
        for runner in runners:
            runner.stop()


def urls_of(origin: Origin) -> list[str]:
    return [origin.url + target for target in origin.resources]


def asked(process: subprocess.Popen[str]) -> dict[str, object]:
    """How a process of LOAD does."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("how?\n")
    process.stdin.flush()
    said: dict[str, object] = json.loads(process.stdout.readline())
    return said


# Its life


def test_init_returns_when_the_daemon_can_be_used_and_stop_leaves_nothing(runner_of: Runners) -> None:
    runner = runner_of()
    begun = json.loads(runner.p2pcache("init", "--json"))
    assert (begun["started"], begun["joined"], begun["connected_peers"]) == (True, True, 0)
    for name in ("node.sock", "p2pcache.sock", "daemon.lock", "daemon.log"):
        assert stat.S_IMODE((runner.directory / name).lstat().st_mode) == 0o600
    again = json.loads(runner.p2pcache("init", "--json"))
    assert (again["started"], again["pid"]) == (False, begun["pid"])
    assert runner.p2pcache("stop") == "the daemon has ended\n"
    assert [path.name for path in runner.directory.glob("*.sock")] == []
    assert list((runner.directory.parent / "registry").glob("*.peer")) == []
    assert runner.p2pcache("stop") == "no daemon was running\n"
    assert runner.run("status").returncode == 1


def test_of_two_that_are_started_at_once_one_runs(runner_of: Runners) -> None:
    runner, said = runner_of(), []
    starts = [threading.Thread(target=lambda: said.append(json.loads(runner.p2pcache("init", "--json")))) for _ in "ab"]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len({status["pid"] for status in said}) == 1


def test_a_daemon_that_was_killed_is_replaced_by_the_next(runner_of: Runners) -> None:
    runner = runner_of()
    first = json.loads(runner.p2pcache("init", "--json"))["pid"]
    os.kill(first, signal.SIGKILL)
    second = json.loads(runner.p2pcache("init", "--json"))
    assert second["started"]
    assert second["pid"] != first


def test_a_directory_whose_name_is_too_long_for_a_socket_will_do(tmp_path: Path, origin: Origin) -> None:
    runner = Runner(tmp_path / ("d" * 120), tmp_path / "registry", CACHE_GITHUB_HOSTS=origin.netloc)
    try:
        door = Path(json.loads(runner.p2pcache("init", "--json"))["door"])
        assert stat.S_IMODE(door.parent.stat().st_mode) == 0o700
        assert runner.step(*urls_of(origin)[:1])["imported"] == []
    finally:
        runner.stop()


def test_a_bad_setting_is_named(runner_of: Runners) -> None:
    done = runner_of("a", CACHE_LISTEN_PORT="abc").run("init")
    assert done.returncode == 2
    assert "CACHE_LISTEN_PORT must be a port number from 0 to 65535, not 'abc'" in done.stderr


def test_it_ends_by_itself_when_nobody_uses_it(runner_of: Runners, origin: Origin) -> None:
    runner = runner_of()
    pid = json.loads(runner.p2pcache("init", "--idle", "5", "--json"))["pid"]
    load = runner.start(LOAD, *urls_of(origin)[:1])
    try:
        assert eventually(lambda: asked(load)["active"])
        threading.Event().wait(5.5)  # longer than that, while it is used
        assert runner.status()["pid"] == pid
    finally:
        load.communicate(timeout=60)
    assert eventually(lambda: not runner.status())


# A job's processes


def test_a_process_shares_from_its_first_request_on_without_libp2p(pair: tuple[Runner, Runner], origin: Origin) -> None:
    ours, theirs = pair
    urls = urls_of(origin)
    theirs.step(*urls)
    said = ours.step(*urls)
    assert said["imported"] == []
    assert len(origin.calls) == len(urls)
    assert said["sha256"] == [hashlib.sha256(r.body).hexdigest() for r in origin.resources.values()]
    assert said["stats"]["connected_peers"] == 1


def test_ten_processes_of_two_runners_at_once_pay_once(pair: tuple[Runner, Runner], origin: Origin) -> None:
    steps = [pair[number % 2].start(STEP, *urls_of(origin)) for number in range(10)]
    right = [hashlib.sha256(resource.body).hexdigest() for resource in origin.resources.values()]
    assert [heard(step)["sha256"] == right for step in steps] == [True] * 10
    assert len(origin.calls) == len(origin.resources)


def test_a_daemon_killed_under_load_fails_no_request_and_is_found_again(runner_of: Runners, origin: Origin) -> None:
    runner = runner_of()
    for resource in origin.resources.values():
        resource.max_age = 1
    pid = json.loads(runner.p2pcache("init", "--json"))["pid"]
    load = [runner.start(LOAD, *urls_of(origin)) for _ in range(3)]
    try:
        for process in load:
            assert eventually(lambda process=process: asked(process)["active"])
        os.kill(pid, signal.SIGKILL)
        for process in load:
            assert eventually(lambda process=process: not asked(process)["active"])
        runner.p2pcache("init")
        for process in load:
            assert eventually(lambda process=process: asked(process)["active"])
    finally:
        said = [heard(process) for process in load]
    assert [one["failed"] for one in said] == [[], [], []]


def test_a_daemon_that_is_frozen_is_passed_by_until_it_goes_on(runner_of: Runners, origin: Origin) -> None:
    runner = runner_of()
    for resource in origin.resources.values():
        resource.max_age = 0
    pid = json.loads(runner.p2pcache("init", "--json"))["pid"]
    load = runner.start(LOAD, *urls_of(origin))
    try:
        assert eventually(lambda: asked(load)["active"])
        os.kill(pid, signal.SIGSTOP)
        assert eventually(lambda: not asked(load)["active"])
        before = asked(load)["requests"]
        assert isinstance(before, int)
        assert eventually(lambda: int(str(asked(load)["requests"])) > before + 50)
        os.kill(pid, signal.SIGCONT)
        assert eventually(lambda: asked(load)["active"])
    finally:
        os.kill(pid, signal.SIGCONT)
        said = heard(load)
    assert said["failed"] == []


def test_what_a_killed_process_was_fetching_another_one_fetches(runner_of: Runners, origin: Origin) -> None:
    runner = runner_of()
    runner.p2pcache("init")
    origin.latency = 1.5
    url = urls_of(origin)[0]
    first = runner.start(STEP, url)
    assert eventually(lambda: runner.status()["processes"] == 1)
    second = runner.start(STEP, url)
    assert eventually(lambda: runner.status()["processes"] == 2)
    first.kill()
    first.communicate()
    assert heard(second)["sha256"] == [hashlib.sha256(next(iter(origin.resources.values())).body).hexdigest()]
    assert len(origin.calls) <= 2


def test_a_daemon_of_another_fleet_is_not_used(pair: tuple[Runner, Runner], origin: Origin) -> None:
    changes = {"CACHE_SHARED_SECRET": "fedcba9876543210" * 4, "CACHE_NODE": "daemon"}
    stranger = Runner(pair[0].directory, pair[0].directory, **changes)
    step = stranger.start(STEP, urls_of(origin)[0], stderr=subprocess.PIPE)
    _, errors = step.communicate(timeout=60)
    assert "CACHE_SHARED_SECRET or CACHE_FLEET differ" in errors
    assert pair[0].status()["processes"] == 0


def test_a_write_in_one_process_is_seen_by_those_of_all_runners(pair: tuple[Runner, Runner], origin: Origin) -> None:
    ours, theirs = pair
    url = urls_of(origin)[0]
    ours.step(url)
    theirs.step(url)
    write = f"""
import httpx
from httpx_p2pcache import P2PCacheTransport
with httpx.Client(transport=P2PCacheTransport(), headers={{"Authorization": "Bearer {TOKEN}"}}) as client:
    client.post({url!r}, content=b'{{"new": true}}').raise_for_status()
print("{{}}")
"""
    heard(ours.start(write))
    new = [hashlib.sha256(b'{"new": true}').hexdigest()]
    assert (ours.step(url)["sha256"], theirs.step(url)["sha256"]) == (new, new)


@pytest.mark.parametrize(
    "rubbish", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", b"\x00\x00\x00\x03abc", bytes(4)]
)
def test_whoever_talks_rubbish_to_it_is_shown_out_alone(
    rubbish: bytes, pair: tuple[Runner, Runner], origin: Origin
) -> None:
    runner = pair[0]
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(30)
        stranger.connect(str(runner.directory / "node.sock"))
        stranger.sendall(rubbish)
        try:
            assert stranger.recv(1000) == b""
        except ConnectionResetError:
            pass
    assert runner.step(urls_of(origin)[0])["imported"] == []


def test_what_a_runners_processes_have_counted_adds_up(runner_of: Runners, origin: Origin) -> None:
    ours, theirs = runner_of("a"), runner_of("b")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda runner: runner.p2pcache("init"), (ours, theirs)))
    assert eventually(lambda: ours.status()["connected_peers"] == 1)
    urls = urls_of(origin)
    for runner in (ours, theirs, ours, theirs):
        runner.step(*urls)
    totals = [json.loads(runner.p2pcache("stats", "--json"))["total"] for runner in (ours, theirs)]
    assert [total["requests"] for total in totals] == [2 * len(urls)] * 2
    for total in totals:
        assert total["requests"] == total["local_hits"] + total["peer_hits"] + total["misses"]
    assert sum(total["origin_calls"] for total in totals) == len(origin.calls) == len(urls)
    assert eventually(lambda: ours.status()["aggregate"]["requests"] == 4 * len(urls))
    fleet = json.loads(ours.p2pcache("stats", "--fleet", "--json"))["total"]
    assert (fleet["runners"], fleet["origin_calls"], fleet["total_peers"]) == (2, len(urls), 1)

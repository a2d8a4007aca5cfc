"""The daemon when things go wrong around it: killed, frozen, full of strangers; and what its processes still get."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from daemons import STEP, TOKEN, Runner, heard
from waiting import eventually

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.node.daemon.protocol import VERSION, Attach
from httpx_p2pcache.node.protocol import pack
from httpx_p2pcache.testing import Origin, Resource, made_up

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p

PROMPT = 10.0  # seconds: CACHE_LOOKUP_TIMEOUT, the origin's answer, and a generous margin
SHARED = ("local", "peer")  # what a peer has paid for may have been handed to us before we ask
ANOTHER = "fedcba9876543210" * 4

# A step that uses both kinds of client, and says at the very end what it has imported. It reaches the origin without
# httpcore, which imports trio itself where that is installed.
IMPORTING = f"""
import asyncio, json, sys, urllib.request
import httpx
from httpx_p2pcache import P2PCacheTransport

def fetched(request):
    asked = urllib.request.Request(str(request.url), headers={{"Authorization": request.headers["authorization"]}})
    with urllib.request.urlopen(asked) as response:
        return httpx.Response(response.status, headers=response.getheaders(), content=response.read())

async def more():
    async with httpx.AsyncClient(transport=P2PCacheTransport(httpx.MockTransport(fetched)), headers=headers) as client:
        for url in sys.argv[3:]:
            sources.append((await client.get(url)).extensions["caching"]["source"])

headers = {{"Authorization": "Bearer {TOKEN}"}}
client = httpx.Client(transport=P2PCacheTransport(httpx.MockTransport(fetched)), headers=headers)
sources = [client.get(url).extensions["caching"]["source"] for url in sys.argv[1:3]]
asyncio.run(more())
client.close()
imported = [name for name in ("libp2p", "trio", "multiaddr") if name in sys.modules]
print(json.dumps({{"sources": sources, "imported": imported}}))
"""

WRITE = f"""
import sys
import httpx
from httpx_p2pcache import P2PCacheTransport
headers = {{"Authorization": "Bearer {TOKEN}"}}
with httpx.Client(transport=P2PCacheTransport(), headers=headers, timeout=30) as client:
    client.post(sys.argv[1], content=sys.argv[2].encode()).raise_for_status()
"""

# Two transports of different settings, so that there are two runners in one process.
TWO = f"""
import os, sys
import httpx
from httpx_p2pcache import P2PCacheTransport, Settings
for port in (0, 1):
    settings = Settings.from_env(os.environ | {{"CACHE_DEFAULT_TTL": str(300 + port)}})
    headers = {{"Authorization": "Bearer {TOKEN}"}}
    with httpx.Client(transport=P2PCacheTransport(settings=settings), headers=headers, timeout=30) as client:
        print(client.get(sys.argv[1]).text)
"""


class Client:
    """A process of ``talking_runner`` that belongs to a runner."""

    def __init__(self, runner: Runner, origin: Origin, log: Path, **changes: str) -> None:
        self._origin = origin
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("talking_runner.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=runner.environment | {"TEST_TOKEN": TOKEN} | changes,
            )

    def tell(self, what: str, **more: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **more}).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        said: dict[str, Any] = json.loads(line)
        return said

    def do(self, what: str, **more: object) -> dict[str, Any]:
        self.tell(what, **more)
        return self.hear()

    def exit(self) -> float:
        """Have it end in order; the seconds that took."""
        began = time.monotonic()
        self.tell("exit")
        assert self.process.wait(60) == 0, self.log.read_text()
        return time.monotonic() - began

    def stat(self, name: str) -> Any:
        return self.do("stats")[name]

    def ask(self, target: str, what: str = "get") -> None:
        self.tell(what, url=self._origin.url + target)

    def get(self, target: str) -> dict[str, Any]:
        """The answer to a GET, which has to be the origin's."""
        self.ask(target)
        return self.right(target, self.hear())

    def right(self, target: str, answer: dict[str, Any]) -> dict[str, Any]:
        assert (answer.get("error"), answer.get("status")) == (None, 200)
        assert answer["sha256"] == hashlib.sha256(self._origin.resources[target].body).hexdigest()
        return answer

    def begin(self, target: str) -> None:
        """Ask in the background; returns once the call has arrived at the origin."""
        arrived = self._origin.arrived
        self.ask(target, "begin")
        assert self.hear() == {"begun": True}
        assert eventually(lambda: self._origin.arrived == arrived + 1)

    def sees_the_daemon(self) -> bool:
        return self.stat("peer_id") is not None

    def shares_again(self, peers: int = 1) -> bool:
        """Whether it comes to be served by a daemon that knows its peers."""
        return eventually(lambda: self.do("join")["joined"] and self.stat("connected_peers") == peers, 30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


Clients = Callable[..., Client]
Pair = tuple[Runner, Runner]


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin(made_up(60)) as server:
        yield server


@pytest.fixture
def targets(origin: Origin) -> list[str]:
    return list(origin.resources)


@pytest.fixture
def client_of(origin: Origin, tmp_path: Path) -> Iterator[Clients]:
    """``client_of(runner)``: a process of that runner; whatever has become of it, it is ended with the test."""
    clients: list[Client] = []

    def begin(runner: Runner, **changes: str) -> Client:
        clients.append(Client(runner, origin, tmp_path / f"client-{len(clients)}.log", **changes))
        return clients[-1]

    try:
        yield begin
    finally:
        for client in clients:
            client.end()


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Runner]:
    """A runner without a daemon so far."""
    runner = runner_at(tmp_path / "lone")
    try:
        yield runner
    finally:
        ended(runner)


@pytest.fixture(scope="module")
def two_runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("two")
    runners = runner_at(root / "a"), runner_at(root / "b")
    try:
        yield runners
    finally:
        for runner in runners:
            ended(runner)


@pytest.fixture
def pair(two_runners: Pair) -> Pair:
    """Two runners of one fleet whose daemons have met, whatever the test before has done to them."""
    without = [runner for runner in two_runners if not runner.status()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda runner: runner.p2pcache("init"), without))
    ours, theirs = two_runners
    assert eventually(lambda: [len(runner.status()["peers"]) for runner in two_runners] == [1, 1], 30)
    assert eventually(lambda: ours.status()["processes"] == theirs.status()["processes"] == 0)
    return two_runners


@pytest.fixture(scope="module")
def far_away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner whose directory has too long a name for a socket, and whose umask forbids nobody anything."""
    root = tmp_path_factory.mktemp("far")
    runner = runner_at(root / ("d" * 120))
    before = os.umask(0)
    try:
        runner.p2pcache("init")
        yield runner
    finally:
        os.umask(before)
        ended(runner)


def runner_at(directory: Path, **changes: str) -> Runner:
    """A runner that is patient, as the machine may be busy; what would wait for a claim to end takes a minute."""
    patient = {"CACHE_LOOKUP_TIMEOUT": "2", "CACHE_CLAIM_TIMEOUT": "60"}
    return Runner(directory, directory.parent / "registry", **patient, **changes)


def ended(runner: Runner) -> None:
    """No daemon of this runner is left, even where it is frozen."""
    pid = runner.status().get("pid")
    runner.stop()
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def write(runner: Runner, url: str, state: str) -> None:
    """A process of the runner that writes, and ends."""
    subprocess.run([sys.executable, "-c", WRITE, url, state], env=runner.environment, check=True, timeout=60)


def pid_of(runner: Runner) -> int:
    pid: int = runner.status()["pid"]
    return pid


@contextlib.contextmanager
def frozen(runner: Runner) -> Iterator[None]:
    """The runner's daemon says and hears nothing."""
    pid = pid_of(runner)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def stranger_to(runner: Runner) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(runner.directory / "node.sock"))
    return connection


def shown_out(connection: socket.socket) -> bool:
    """Whether the other end has closed, after whatever it had to say."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


# How it begins and ends


def test_after_a_daemon_was_killed_commands_say_so_and_of_two_starts_at_once_one_runs(
    lone: Runner, origin: Origin, targets: list[str]
) -> None:
    first = json.loads(lone.p2pcache("init", "--json"))
    os.kill(first["pid"], signal.SIGKILL)
    assert eventually(lambda: not lone.status())
    left = sorted(path.name for path in lone.directory.glob("*.sock"))
    assert left == ["node.sock", "p2pcache.sock"]
    assert lone.run("status").returncode == lone.run("peers").returncode == 1
    assert lone.p2pcache("stop") == "no daemon was running\n"
    with ThreadPoolExecutor(2) as pool:
        said = [json.loads(text) for text in pool.map(lambda _: lone.p2pcache("init", "--json"), range(2))]
    assert {status["pid"] for status in said} == {pid_of(lone)}
    assert sorted(status["started"] for status in said) == [False, True]
    assert (lone.directory / "daemon.lock").read_text() == str(pid_of(lone))
    step = lone.step(origin.url + targets[0])
    assert (step["sources"], step["imported"]) == (["origin"], [])


def test_a_setting_that_cannot_be_used_ends_every_command_with_its_name(tmp_path: Path) -> None:
    runner = runner_at(tmp_path / "a", CACHE_LISTEN_PORT="99999")
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(runner.run, ("init", "node", "stop", "status", "peers", "discover")):
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.endswith("CACHE_LISTEN_PORT must be a port number from 0 to 65535, not '99999'\n")
            assert done.stderr.count("\n") == 1
    assert not runner.directory.exists()


def test_where_no_daemon_can_listen_init_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)  # as /tmp is
    causes = {"file": "file", "open": "only this user can write"}
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda name: runner_at(tmp_path / name).run("init"), causes))
    for done, why in zip(ends, causes.values(), strict=True):
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert why in done.stderr


def test_where_a_sockets_path_does_not_fit_commands_and_processes_find_the_daemon(
    far_away: Runner, origin: Origin, targets: list[str]
) -> None:
    assert json.loads(far_away.p2pcache("status", "--json"))["pid"] == pid_of(far_away)
    step = far_away.step(origin.url + targets[0])
    assert (step["imported"], step["stats"]["peer_id"]) == ([], far_away.status()["peer_id"])


def test_what_is_in_the_directory_is_for_its_owner_alone_whatever_the_umask(
    far_away: Runner, origin: Origin, targets: list[str]
) -> None:
    far_away.step(origin.url + targets[0])
    door = Path(far_away.status()["door"])
    found = [far_away.directory, *far_away.directory.rglob("*"), door.parent, door]
    assert {"daemon.lock", "daemon.log", "p2pcache-v1.db"} < {path.name for path in found}
    modes = {str(path): stat.S_IMODE(path.lstat().st_mode) for path in found}
    expected = {str(path): 0o700 if path.is_dir() else 0o600 for path in found}
    assert modes == expected


def test_a_process_that_waits_for_the_daemon_shares_once_it_is_there_and_keeps_it_alive_without_a_word(
    lone: Runner, client_of: Clients, targets: list[str]
) -> None:
    early = client_of(lone, CACHE_NODE="daemon")
    early.get(targets[0])
    assert not early.sees_the_daemon()
    pid = json.loads(lone.p2pcache("init", "--idle", "2", "--json"))["pid"]
    assert eventually(early.sees_the_daemon)
    assert early.log.read_text().count("there is no daemon in CACHE_DIR yet") == 1
    assert eventually(lambda: (status := lone.status())["now"] - status["since"] > 3.5, 30)
    assert (pid_of(lone), lone.status()["processes"]) == (pid, 1)
    early.do("stats")
    early.kill()
    assert eventually(lambda: not lone.status(), 30)
    assert eventually(lambda: list(lone.directory.glob("*.sock")) == [])


# What it is to processes


def test_the_first_request_of_a_process_is_answered_by_a_peer_and_libp2p_is_never_imported(
    two_runners: Pair, origin: Origin, targets: list[str]
) -> None:
    late, theirs = two_runners
    urls = [origin.url + target for target in targets[:4]]
    late.p2pcache("stop")
    theirs.p2pcache("init")
    theirs.step(urls[0], urls[2])
    late.p2pcache("init")
    said = heard(late.start(IMPORTING, *urls))
    assert said == {"sources": ["peer", "origin", "peer", "origin"], "imported": []}
    assert set(theirs.step(*urls)["sources"]) <= set(SHARED)
    assert len(origin.calls) == 4


def test_ten_processes_at_once_with_tokens_of_their_own_pay_once_for_each_url(
    pair: Pair, origin: Origin, targets: list[str]
) -> None:
    urls = [origin.url + target for target in targets[:20]]
    steps = []
    for number in range(10):
        runner = pair[number % 2]
        mine = runner.environment | {"CACHE_GITHUB_HOSTS": origin.netloc}
        code = STEP.replace(TOKEN, f"ghs_{number:036}")
        command = [sys.executable, "-c", code, *urls]
        steps.append(subprocess.Popen(command, env=mine, stdout=subprocess.PIPE, text=True))
    right = [hashlib.sha256(origin.resources[target].body).hexdigest() for target in targets[:20]]
    assert [heard(step)["sha256"] == right for step in steps] == [True] * 10
    assert origin.counted() == 20


def test_a_forked_child_shares_through_a_connection_of_its_own_and_its_parent_goes_on(
    pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    ours, theirs = pair
    forking, other = client_of(ours), client_of(theirs)
    for target in targets[:3]:
        other.get(target)
    forking.get(targets[0])
    child = forking.do("fork")["child"]
    assert child != forking.process.pid
    assert forking.get(targets[1])["source"] in SHARED
    assert eventually(lambda: ours.status()["processes"] == 2)
    assert forking.get(targets[3])["source"] == "origin"
    assert other.get(targets[3])["source"] in SHARED
    forking.tell("exit")
    assert forking.hear() == {"back": True}
    assert eventually(lambda: ours.status()["processes"] == 1)
    assert forking.get(targets[2])["source"] in SHARED
    assert forking.get(targets[4])["source"] == "origin"
    assert other.get(targets[4])["source"] in SHARED
    assert [call.target for call in origin.calls] == targets[:5]


def test_a_child_that_ends_does_not_give_back_what_its_parent_is_fetching(
    pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    forking, other = client_of(pair[0]), client_of(pair[1])
    other.get(targets[1])
    origin.latency = 2.0
    forking.begin(targets[0])
    forking.do("fork")
    other.ask(targets[0])
    forking.tell("exit")
    assert forking.hear() == {"back": True}
    assert other.right(targets[0], other.hear())["source"] in SHARED
    forking.right(targets[0], forking.do("end"))
    assert [call.target for call in origin.calls] == [targets[1], targets[0]]


def test_a_write_is_seen_at_once_by_processes_that_have_the_old_state_in_memory(
    pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    ours, theirs = pair
    readers = [client_of(ours), client_of(ours), client_of(theirs)]
    for reader in readers:
        reader.get(targets[0])
        assert reader.get(targets[0])["source"] == "local"
    assert len(origin.calls) == 1
    for state in ('{"state": "closed"}', '{"state": "open again"}'):
        write(ours, origin.url + targets[0], state)
        assert origin.resources[targets[0]].body == state.encode()
        for reader in readers:
            reader.get(targets[0])
    assert [call.method for call in origin.calls] == ["GET", "POST", "GET", "POST", "GET"]


# Each with a limit and a token of its own, as the daemons remember what the test before has told them.
@pytest.mark.parametrize(("limit", "where"), [(11, 0), (12, 1)], ids=["of-the-same-runner", "of-another-runner"])
def test_a_refusal_that_one_process_has_met_spares_the_call_of_another_that_is_running(
    limit: int, where: int, pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    origin.resources[targets[0]].max_age = 0
    mine = {"CACHE_GITHUB_HOSTS": origin.netloc, "TEST_TOKEN": f"ghp_{limit:036}"}
    refused, other = client_of(pair[0], **mine), client_of(pair[where], **mine)
    other.get(targets[0])
    use_up(refused, origin, limit)
    assert eventually(lambda: knows(other.stat("quotas"), limit))
    calls = len(origin.calls)
    assert other.get(targets[0])["source"] == "local"
    assert len(origin.calls) == calls


@pytest.mark.parametrize(("limit", "where"), [(13, 0), (14, 1)], ids=["of-the-same-runner", "of-another-runner"])
def test_a_refusal_that_one_process_has_met_spares_the_call_of_one_that_begins_later(
    limit: int, where: int, pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    origin.resources[targets[0]].max_age = 0
    mine = {"CACHE_GITHUB_HOSTS": origin.netloc, "TEST_TOKEN": f"ghp_{limit:036}"}
    client_of(pair[where], **mine).get(targets[0])
    use_up(client_of(pair[0], **mine), origin, limit)
    assert eventually(lambda: knows(pair[where].status()["quotas"], limit))
    late = client_of(pair[where], **mine)
    assert eventually(lambda: knows(late.stat("quotas"), limit))
    calls = len(origin.calls)
    assert late.get(targets[0])["source"] == "local"
    assert len(origin.calls) == calls


def use_up(client: Client, origin: Origin, limit: int) -> None:
    """Make calls until the origin refuses."""
    targets = iter(list(origin.resources)[1:])
    while origin.counted() < limit:
        client.get(next(targets))
    origin.limit = limit
    client.ask(next(targets))
    assert client.hear()["status"] == 403


def knows(quotas: list[dict[str, Any]], limit: int) -> bool:
    return [quota["refused_until"] > time.time() for quota in quotas if quota["limit"] == limit] == [True]


# When it is killed, frozen, or told to stop


def test_a_daemon_killed_while_processes_ask_fails_and_delays_no_request_and_the_next_one_serves_them_all(
    pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    ours, theirs = pair
    clients, other = [client_of(ours) for _ in range(3)], client_of(theirs)
    assert all(client.sees_the_daemon() for client in clients)
    origin.latency = 0.02
    asked = [targets[:50], targets[25:50] + targets[:25], targets[49::-1]]
    for client, order in zip(clients, asked, strict=True):
        for target in order:
            client.ask(target)
    assert eventually(lambda: len(origin.calls) >= 15)
    os.kill(pid_of(ours), signal.SIGKILL)
    for client, order in zip(clients, asked, strict=True):
        answers = [client.right(target, client.hear()) for target in order]
        assert max(answer["seconds"] for answer in answers) < PROMPT
    assert not any(client.sees_the_daemon() for client in clients)
    first = clients[0].get(targets[50])
    assert first["source"] == "origin"
    ours.p2pcache("init")
    assert [client.shares_again() for client in (*clients, other)] == [True] * 4
    calls = len(origin.calls)
    other.get(targets[51])
    assert [client.get(targets[51])["source"] in SHARED for client in clients] == [True] * 3
    clients[0].get(targets[52])
    assert other.get(targets[52])["source"] in SHARED
    assert len(origin.calls) == calls + 2


def test_those_who_wait_for_anothers_call_when_the_daemon_is_killed_go_on_at_once(
    pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    patient = {"CACHE_LOOKUP_TIMEOUT": "5"}
    fetching, *waiting = [client_of(pair[number], **patient) for number in (1, 0, 0)]
    origin.latency = 30.0
    fetching.begin(targets[0])
    origin.latency = 0.0
    for client in waiting:
        client.ask(targets[0], "begin")
        assert client.hear() == {"begun": True}
    assert [client.stat("origin_calls") for client in waiting] == [0, 0]
    os.kill(pid_of(pair[0]), signal.SIGKILL)
    answers = [client.right(targets[0], client.do("end")) for client in waiting]
    assert max(answer["seconds"] for answer in answers) < PROMPT
    # One of them may find in the runner's store what the other has just paid for.
    assert {answer["source"] for answer in answers} in ({"origin"}, {"origin", "local"})


def test_a_daemon_that_is_stopped_hands_over_what_was_published_and_its_processes_come_back_to_the_next(
    pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    ours, theirs = pair
    staying, other = client_of(ours), client_of(theirs)
    for target in targets[:20]:
        staying.get(target)
    assert ours.p2pcache("stop") == "the daemon has ended\n"
    assert not staying.sees_the_daemon()
    assert {other.get(target)["source"] for target in targets[:20]} <= set(SHARED)
    staying.get(targets[20])
    ours.p2pcache("init")
    assert staying.shares_again()
    assert other.shares_again()
    staying.get(targets[21])
    assert other.get(targets[21])["source"] in SHARED
    assert len(origin.calls) == 22


def test_a_frozen_daemon_delays_no_request_no_start_and_no_end_for_long_and_is_used_again(
    pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    ours, theirs = pair
    brisk = {"CACHE_LOOKUP_TIMEOUT": "0.5"}
    staying, ending, other = client_of(ours, **brisk), client_of(ours, **brisk), client_of(theirs)
    for target in targets[:3]:
        origin.resources[target] = Resource(os.urandom(4_000_000))  # more than a socket takes
    assert staying.sees_the_daemon()
    assert ending.sees_the_daemon()
    with frozen(ours):
        answers = [staying.get(target) for target in targets[:15]]
        assert max(answer["seconds"] for answer in answers) < PROMPT
        assert [answer["source"] for answer in answers] == ["origin"] * 15
        late = client_of(ours)
        assert late.get(targets[15])["seconds"] < PROMPT
        began = time.monotonic()
        write(ours, origin.url + targets[4], "{}")
        assert time.monotonic() - began < PROMPT
        for target in targets[16:20]:
            origin.resources[target] = origin.resources[targets[0]]
            ending.get(target)
        assert max(ending.exit(), late.exit()) < PROMPT
    assert staying.shares_again()
    assert other.shares_again()
    new = iter(targets[20:])
    assert eventually(lambda: other.get(target := next(new)) and staying.get(target)["source"] in SHARED)
    assert eventually(lambda: staying.get(target := next(new)) and other.get(target)["source"] in SHARED)


def test_when_the_process_that_fetches_is_killed_one_of_those_who_wait_fetches_for_all(
    pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    ours, theirs = pair
    fetching, *waiting = [client_of(runner) for runner in (ours, ours, ours, theirs)]
    fetching.get(targets[1])  # so that it has a connection to the origin
    origin.latency = 1.5
    fetching.begin(targets[0])
    for client in waiting:
        client.ask(targets[0], "begin")
        assert client.hear() == {"begun": True}
    assert [client.stat("origin_calls") for client in waiting] == [0, 0, 0]
    fetching.kill()
    answers = [client.right(targets[0], client.do("end")) for client in waiting]
    assert max(answer["seconds"] for answer in answers) < 25
    assert sum(client.stat("origin_calls") for client in waiting) == 1
    assert eventually(lambda: [call.target for call in origin.calls] == [targets[1], targets[0], targets[0]])


# Those who do not belong to it


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"CACHE_SHARED_SECRET": ANOTHER, "CACHE_NODE": "daemon"}, id="another-secret"),
        pytest.param({"CACHE_FLEET": "another", "CACHE_NODE": "auto"}, id="another-fleet"),
    ],
)
def test_a_process_of_another_fleet_does_not_use_it_and_says_so_once(
    changes: dict[str, str], pair: Pair, origin: Origin, targets: list[str]
) -> None:
    ours = pair[0]
    registry = {"CACHE_PEER_REGISTRY": str(ours.directory.parent / "another-registry")}
    done = subprocess.run(
        [sys.executable, "-c", TWO, origin.url + targets[0]],
        env=ours.environment | registry | changes,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout == f"{origin.resources[targets[0]].body.decode()}\n" * 2
    assert done.stderr.count("is not for this process: CACHE_SHARED_SECRET or CACHE_FLEET differ") == 1
    assert done.stderr.count("\n") == 1
    assert ours.status()["processes"] == 0


def test_a_daemon_of_another_fleet_that_says_so_late_is_waited_for_no_longer(
    pair: Pair, client_of: Clients, targets: list[str]
) -> None:
    with frozen(pair[0]):
        stranger = client_of(pair[0], CACHE_SHARED_SECRET=ANOTHER)
        assert stranger.stat("requests") == 0
    began = time.monotonic()
    assert eventually(lambda: "CACHE_SHARED_SECRET or CACHE_FLEET differ" in stranger.log.read_text())
    assert stranger.do("join") == {"joined": False}
    assert time.monotonic() - began < 20  # and not the half minute that it is willing to wait
    stranger.get(targets[0])
    assert stranger.log.read_text().count("\n") == 1


def greeting_of(runner: Runner) -> bytes:
    """What a process of this runner says first to its daemon."""
    return pack(Attach(VERSION, Keyring(runner.environment["CACHE_SHARED_SECRET"].encode(), "default").label))


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"\xff\xff\xff\xff", id="a-huge-length"),
        pytest.param(b"\x00\x00\x00\x05" + b"abcde", id="rubbish"),
        pytest.param(b"\x00\x00\x00\x00", id="an-empty-frame"),
        pytest.param(b"\x00\x00\x10\x00" + b"\x91" * 4096, id="arrays-in-arrays"),
        pytest.param(None, id="a-second-greeting"),
    ],
)
def test_a_process_that_is_attached_and_talks_rubbish_is_shown_out_alone(
    said: bytes | None, pair: Pair, client_of: Clients, origin: Origin, targets: list[str]
) -> None:
    ours = pair[0]
    pid, staying = pid_of(ours), client_of(ours)
    assert staying.sees_the_daemon()
    with stranger_to(ours) as stranger:
        stranger.sendall(greeting_of(ours))
        assert stranger.recv(4) != b""
        stranger.sendall(greeting_of(ours) if said is None else said)
        assert shown_out(stranger)
    assert eventually(lambda: ours.status()["processes"] == 1)
    assert (pid_of(ours), staying.sees_the_daemon()) == (pid, True)
    staying.get(targets[0])


def test_hundreds_who_say_nothing_or_half_a_word_are_shown_out_and_keep_nobody_from_being_served(
    pair: Pair, origin: Origin, targets: list[str]
) -> None:
    ours, theirs = pair
    pid = pid_of(ours)
    theirs.step(origin.url + targets[0])
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(stranger_to(ours)) for _ in range(200)]
        for number, stranger in enumerate(silent):
            stranger.sendall(greeting_of(ours)[: number % 8])
        assert ours.step(origin.url + targets[0])["sources"][0] in SHARED
        assert all(shown_out(stranger) for stranger in silent)
    assert (pid_of(ours), ours.status()["processes"]) == (pid, 0)

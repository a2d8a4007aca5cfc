"""What a fleet of real processes does: runners that are killed, stopped, forked, or end without a word."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from secret import secret_of
from waiting import eventually

from httpx_p2pcache.cli import demo
from httpx_p2pcache.cli.runner_process import Seen
from httpx_p2pcache.testing import Origin, made_up

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p

TOKEN = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"
PROMPT = 2.0  # lookup_timeout of 0.25 s, the origin's latency, and a generous margin
TARGETS = [f"/repos/octo-org/repo-{number}" for number in range(30)]
Environment = Callable[..., dict[str, str]]


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin(made_up(30)) as server:
        yield server


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """``environment("a")``: a runner of its own; runners of one test share registry and secret."""

    def build(name: str, **changes: str) -> dict[str, str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("CACHE_", "GITHUB_", "GH_", "RUNNER_"))}
        ours = {
            "CACHE_DIR": str(tmp_path / name),
            "CACHE_PEER_REGISTRY": str(tmp_path / "registry"),
            "CACHE_SHARED_SECRET": secret_of(tmp_path),
            "CACHE_PUBLIC_BOOTSTRAP": "false",
            "CACHE_LISTEN_HOST": "127.0.0.1",
            "CACHE_LISTEN_PORT": "0",
            "NO_PROXY": "127.0.0.1",
            "TEST_TOKEN": TOKEN,
        }
        return kept | ours | changes

    return build


class Runner:
    """A process of ``talking_runner``."""

    def __init__(self, environment: dict[str, str], log: Path, origin: Origin) -> None:
        self._origin = origin
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("talking_runner.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
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

    def get(self, target: str) -> dict[str, Any]:
        """The answer to a GET, which has to be the origin's."""
        return self.right(target, self.do("get", url=self._origin.url + target))

    def right(self, target: str, answer: dict[str, Any]) -> dict[str, Any]:
        expected = hashlib.sha256(self._origin.resources[target].body).hexdigest()
        assert (answer.get("error"), answer.get("status"), answer.get("sha256")) == (None, 200, expected)
        return answer

    def stat(self, name: str) -> Any:
        return self.do("stats")[name]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.process.wait(10)

    def end(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


@pytest.fixture
def start(environment: Environment, tmp_path: Path, origin: Origin) -> Iterator[Callable[..., Runner]]:
    """``start("a")``: a runner in a process; whatever has become of it, it is ended with the test."""
    runners: list[Runner] = []

    def begin(name: str, **changes: str) -> Runner:
        runners.append(Runner(environment(name, **changes), tmp_path / f"{name}.log", origin))
        return runners[-1]

    try:
        yield begin
    finally:
        for runner in runners:
            runner.end()


def met(*runners: Runner) -> None:
    for runner in runners:
        runner.tell("join")
    for runner in runners:
        assert runner.hear() == {"joined": True}
    for runner in runners:
        assert eventually(lambda runner=runner: runner.stat("connected_peers") == len(runners) - 1)


# Many at once


def test_five_processes_that_ask_for_the_same_urls_in_the_same_order_pay_about_once(tmp_path: Path) -> None:
    plan = demo.Plan(
        runners=5,
        resources=made_up(40),
        targets=list(made_up(40)),
        latency=0.08,
        own_tokens=False,
        stagger=0.0,
        concurrency=4,
        client="sync",
    )
    seen = demo._round(plan, tmp_path, True, lambda name, runner, done: None)
    assert seen.errors == []
    assert (seen.asked, seen.right) == (200, 200)
    assert 40 <= seen.origin_calls <= 44


def test_when_one_of_four_is_killed_in_the_middle_the_others_get_every_answer_right(tmp_path: Path) -> None:
    plan = demo.Plan(
        runners=4,
        resources=made_up(40),
        targets=list(made_up(40)),
        latency=0.08,
        own_tokens=False,
        stagger=0.0,
        concurrency=4,
        client="sync",
    )
    killed = threading.Event()
    with Origin(plan.resources, latency=plan.latency) as origin:
        expected = {origin.url + target: hashlib.sha256(r.body).hexdigest() for target, r in plan.resources.items()}
        with demo._processes(plan, origin, tmp_path, True) as processes:

            def progress(runner: int, done: int) -> None:
                if runner == 1 and done >= 10 and not killed.is_set():
                    processes[1].kill()
                    killed.set()

            results = demo._run(plan, processes, list(expected), progress)
    assert killed.is_set()
    assert results[1]["errors"] == ["the runner ended without a result"]
    for number in (0, 2, 3):
        seen = [msgspec.convert(answer, Seen) for answer in results[number]["answers"]]
        assert results[number]["errors"] == []
        assert {answer.url: (answer.status, answer.sha256) for answer in seen} == {
            url: (200, digest) for url, digest in expected.items()
        }
        assert max(answer.ms for answer in seen) < 9000  # long before CACHE_CLAIM_TIMEOUT has to help


def test_processes_that_want_the_same_port_in_the_same_moment_never_share_it(start: Callable[..., Runner]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    runners = [start(name, CACHE_LISTEN_PORT=str(port)) for name in "abc"]
    met(*runners)
    addresses = [tuple(runner.stat("addresses")) for runner in runners]
    assert len(set(addresses)) == 3


# One that is gone, or frozen


def test_a_killed_process_and_what_it_left_in_the_registry_delay_nobody(
    start: Callable[..., Runner], origin: Origin, tmp_path: Path
) -> None:
    staying, killed = start("a"), start("b")
    met(staying, killed)
    for target in TARGETS[:5]:
        killed.get(target)
        staying.get(target)
    killed.signal(signal.SIGKILL)
    assert max(staying.get(target)["seconds"] for target in TARGETS[:15]) < PROMPT
    assert len(list((tmp_path / "registry").iterdir())) == 2
    late = start("c")
    met(staying, late)
    answers = [late.get(target) for target in TARGETS]
    assert max(answer["seconds"] for answer in answers) < PROMPT
    assert [answer["source"] for answer in answers[:15]] == ["peer"] * 15
    assert len(origin.calls) == len(TARGETS)


def test_a_frozen_process_fails_no_request_and_delays_none_is_let_go_and_comes_back_once_it_goes_on(
    start: Callable[..., Runner], origin: Origin
) -> None:
    awake, frozen = start("a"), start("b")
    met(awake, frozen)
    frozen.signal(signal.SIGSTOP)
    answers = [awake.get(target) for target in TARGETS[:25]]
    assert max(answer["seconds"] for answer in answers) < PROMPT
    assert len(origin.calls) == 25
    assert awake.stat("peer_timeouts") <= 2, "it was asked again though it had not answered"
    assert eventually(lambda: awake.stat("connected_peers") == 0)
    frozen.signal(signal.SIGCONT)
    met(awake, frozen)
    for target in TARGETS[25:]:
        awake.get(target)
        frozen.get(target)
    assert [call.target for call in origin.calls] == TARGETS


def test_when_a_process_freezes_while_it_fetches_those_who_wait_do_not_wait_for_its_claim_to_end(
    start: Callable[..., Runner], origin: Origin
) -> None:
    claimants = {"CACHE_CLAIM_TIMEOUT": "30"}
    others, frozen = [start("a", **claimants), start("b", **claimants)], start("c", **claimants)
    met(*others, frozen)
    origin.latency = 1.0
    for count, target in enumerate(TARGETS[:3], 1):
        frozen.do("begin", url=origin.url + target)
        assert eventually(lambda count=count: origin.arrived == count)
    frozen.signal(signal.SIGSTOP)
    origin.latency = 0.0
    for target in TARGETS[:3]:
        for runner in others:
            runner.tell("get", url=origin.url + target)
        for runner in others:
            assert runner.right(target, runner.hear())["seconds"] < 8.0


# One that forks


def test_a_forked_child_answers_alone_and_the_parents_node_lives_on(
    start: Callable[..., Runner], origin: Origin
) -> None:
    forking, other = start("a"), start("b")
    met(forking, other)
    forking.get(TARGETS[0])
    peer_id, address = forking.stat("peer_id"), forking.stat("addresses")[0]
    child = forking.do("fork")["child"]
    assert child != forking.process.pid
    assert forking.get(TARGETS[0])["source"] == "local"
    assert forking.get(TARGETS[1])["source"] == "origin"
    assert (forking.stat("p2p_enabled"), forking.stat("peer_id")) == (False, None)
    # While the child talks to us the parent's node still serves the fleet.
    assert other.get(TARGETS[0])["source"] in ("peer", "local")
    assert [peer["peer_id"] for peer in other.stat("peers")] == [peer_id]
    forking.tell("exit")
    assert forking.hear() == {"back": True}
    assert (forking.stat("peer_id"), forking.stat("addresses")) == (peer_id, [address])
    other.get(TARGETS[2])
    assert forking.get(TARGETS[2])["source"] in ("peer", "local")
    assert [call.target for call in origin.calls] == TARGETS[:3]


FORKS = """
import multiprocessing, sys
import httpx
from httpx_p2pcache import P2PCacheTransport
def work(url):
    inherited = client if client is not None else httpx.Client(transport=P2PCacheTransport())
    inherited.get(url).raise_for_status()  # and is not closed
client = httpx.Client(transport=P2PCacheTransport()) if sys.argv[1] == "inherited" else None
for url in sys.argv[2:]:
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(target=work, args=(url,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
"""


@pytest.mark.parametrize("transport", ["own", "inherited"])
def test_what_a_child_of_multiprocessing_has_paid_for_and_counted_is_there_once_it_has_ended(
    transport: str, environment: Environment, origin: Origin
) -> None:
    alone = environment("parent", CACHE_NODE="embedded")
    urls = [origin.url + target for target in TARGETS[:3]]
    subprocess.run([sys.executable, "-c", FORKS, transport, *urls], env=alone, check=True, timeout=120)
    assert len(origin.calls) == 3
    said = subprocess.run(
        [sys.executable, "-m", "httpx_p2pcache", "stats", "--json"], env=alone, capture_output=True, check=True
    )
    assert json.loads(said.stdout)["total"]["requests"] == 6


def test_a_forked_child_does_not_keep_its_killed_parent_alive_in_the_fleet(start: Callable[..., Runner]) -> None:
    forking, other = start("a"), start("b")
    met(forking, other)
    port = int(forking.stat("addresses")[0].rsplit("/", 1)[1])
    child = forking.do("fork")["child"]
    try:
        forking.process.kill()
        forking.process.wait(10)
        assert eventually(lambda: other.stat("connected_peers") == 0, 3.0)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            probe.listen()
    finally:
        os.kill(child, signal.SIGKILL)


# How an interpreter ends

SETTINGS = "from httpx_p2pcache import P2PCacheTransport, get_stats; import httpx, os, sys, time"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("transport = P2PCacheTransport()", id="while-libp2p-is-imported"),
        pytest.param(
            "transport = P2PCacheTransport(); assert transport.wait_until_joined(30)", id="when-it-has-joined"
        ),
        pytest.param(
            "client = httpx.Client(transport=P2PCacheTransport())\n"
            "client._transport.wait_until_joined(30)\n"
            "client.get(sys.argv[1]).raise_for_status()",
            id="when-it-has-shared",
        ),
        pytest.param(
            "client = httpx.Client(transport=P2PCacheTransport())\n"
            "response = client.send(client.build_request('GET', sys.argv[1]), stream=True)",
            id="in-the-middle-of-a-response",
        ),
    ],
)
def test_an_interpreter_that_ends_without_closing_ends_soon_and_quietly(
    environment: Environment, origin: Origin, tmp_path: Path, script: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", f"{SETTINGS}\n{script}\nprint(time.time())", origin.url + TARGETS[0]],
        env=environment("a"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    registry = tmp_path / "registry"
    left = list(registry.iterdir()) if registry.exists() else []
    assert (ended.returncode, ended.stderr, left) == (0, "", [])
    assert time.time() - float(ended.stdout) < 10.0


# Without libp2p

WITHOUT_LIBP2P = """
import sys
from importlib.machinery import PathFinder

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] == "libp2p" else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""

ASK_TWICE = """
with httpx.Client(transport=P2PCacheTransport(), headers={"Authorization": "Bearer " + os.environ["TEST_TOKEN"]}) as c:
    with httpx.Client(transport=P2PCacheTransport()) as another:
        c._transport.wait_until_joined(30)
        answers = [c.get(sys.argv[1]) for _ in range(2)]
print(*(answer.extensions["caching"]["source"] for answer in answers), answers[1].text)
"""


def test_without_libp2p_there_is_a_local_cache_and_one_warning_that_names_the_extra(
    environment: Environment, origin: Origin
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_LIBP2P}{SETTINGS}{ASK_TWICE}", origin.url + TARGETS[0]],
        env=environment("a"),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert ended.stdout == f"origin local {origin.resources[TARGETS[0]].body.decode()}\n"
    assert ended.stderr.count("\n") == 1
    assert "pip install 'httpx-p2pcache[p2p]'" in ended.stderr
    assert len(origin.calls) == 1


def test_a_libp2p_that_cannot_be_imported_leaves_a_local_cache_and_one_warning(
    environment: Environment, origin: Origin, tmp_path: Path
) -> None:
    (tmp_path / "broken" / "libp2p").mkdir(parents=True)
    (tmp_path / "broken" / "libp2p" / "__init__.py").write_text("raise ImportError('libgmp.so.10: cannot open')")
    ended = subprocess.run(
        [sys.executable, "-c", f"{SETTINGS}{ASK_TWICE}", origin.url + TARGETS[0]],
        env=environment("a", PYTHONPATH=str(tmp_path / "broken")),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert ended.stdout == f"origin local {origin.resources[TARGETS[0]].body.decode()}\n"
    assert ended.stderr.count("\n") == 1
    assert "sharing with other runners is off" in ended.stderr
    assert "libgmp.so.10: cannot open" in ended.stderr


def test_importing_the_package_imports_neither_libp2p_nor_trio(environment: Environment) -> None:
    script = "import sys, httpx_p2pcache; print({'libp2p', 'trio', 'multiaddr'} & set(sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=environment("a"),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert ended.stdout == "set()\n"

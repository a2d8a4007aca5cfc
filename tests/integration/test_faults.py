"""What can go wrong on a machine: disks, files, descriptors, clocks, threads, loops and signals; real processes.

The law: the request is answered as it would be without a cache, nothing hangs, what is off is said once, and what
belongs to others is neither followed nor overwritten.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemons import Runner
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.sockets import node_socket
from httpx_p2pcache.testing import Origin, Resource

TARGETS = [f"/repos/octo-org/repo-{number}" for number in range(10)]
DATABASE, LEDGER = "p2pcache-v1.db", "stats-v1.db"
PATIENT = 20.0  # seconds for a process to start, ask and end on a busy machine
root = pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root, to mount or to become nobody")

# Asks for each URL given, twice, and says what came of it. What is in PRELUDE goes before the client is made.
SCRIPT = """
import hashlib, json, os, resource, sys, time
import httpx
import httpx_p2pcache
from httpx_p2pcache import P2PCacheTransport
PRELUDE
answers, seconds = [], []
with httpx.Client(transport=P2PCacheTransport(), timeout=30) as client:
    for url in sys.argv[1:] * 2:
        BEFORE
        began = time.monotonic()
        try:
            response = client.get(url)
            answers.append([response.status_code, hashlib.sha256(response.content).hexdigest()])
        except Exception as exc:
            answers.append(repr(exc))
        seconds.append(time.monotonic() - began)
    began = time.monotonic()
print(json.dumps({"answers": answers, "slowest": max(seconds), "closing": time.monotonic() - began}))
"""


ANOTHER = "fedcba9876543210" * 4
PEERS = {
    "CACHE_ENABLE_P2P": "true",
    "CACHE_SHARED_SECRET": ANOTHER,
    "CACHE_PUBLIC_BOOTSTRAP": "false",
    "CACHE_LISTEN_HOST": "127.0.0.1",
}


class Process:
    """A process of a runner without peers that runs SCRIPT, or another one."""

    def __init__(self, directory: Path, **changes: str) -> None:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("CACHE_", "GITHUB_", "GH_", "RUNNER_"))}
        ours = {"CACHE_DIR": str(directory), "CACHE_ENABLE_P2P": "false", "NO_PROXY": "127.0.0.1"}
        self.environment = kept | ours | changes

    def start(self, code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def ask(self, *urls: str, prelude: str = "", before: str = "", **options: Any) -> tuple[dict[str, Any], str]:
        """What SCRIPT says of these URLs, and its standard error."""
        code = SCRIPT.replace("PRELUDE", prelude).replace("BEFORE", before.strip() or "pass")
        return heard(self.start(code, *urls, **options))


def heard(process: subprocess.Popen[str], seconds: float = PATIENT) -> tuple[dict[str, Any], str]:
    try:
        said, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail(f"it has not ended after {seconds} s")
    assert process.returncode == 0, complaints
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found, complaints


def right(origin: Origin, targets: list[str]) -> list[list[Any]]:
    import hashlib

    return [[200, hashlib.sha256(origin.resources[target].body).hexdigest()] for target in targets] * 2


def urls(origin: Origin, targets: list[str]) -> list[str]:
    return [f"{origin.url}{target}" for target in targets]


# Disks


LIMITED = "resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, BYTES))"


@pytest.mark.parametrize("size", [0, 30_000, 200_000])
def test_where_files_cannot_grow_requests_are_answered(tmp_path: Path, origin: Origin, size: int) -> None:
    process = Process(tmp_path / "store")
    said, _ = process.ask(*urls(origin, TARGETS), prelude=LIMITED.replace("BYTES", str(size)))
    assert right(origin, TARGETS) == said["answers"]
    assert said["slowest"] < 3.0
    # Once there is room again all is as if nothing had been.
    origin.reset()
    for _ in range(2):
        assert right(origin, TARGETS) == process.ask(*urls(origin, TARGETS))[0]["answers"]
    assert len(origin.calls) <= len(TARGETS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    directory = tmp_path / "small"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", directory], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@root
def test_on_a_full_disk_requests_are_answered_and_it_is_said_once(small_disk: Path, origin: Origin) -> None:
    (small_disk / "of-somebody-else").write_bytes(bytes(300 * 1024))
    for number in range(40):
        origin.resources[f"/large/{number}"] = Resource(os.urandom(30_000))
    targets = [f"/large/{number}" for number in range(40)]
    said, complaints = Process(small_disk / "store").ask(*urls(origin, targets))
    assert right(origin, targets) == said["answers"]
    assert said["slowest"] < 3.0
    assert len(complaints.splitlines()) <= 3, complaints[:2000]
    assert complaints.count("cannot be written") == 1


@root
def test_a_disk_that_was_full_at_first_is_used_once_it_is_not(small_disk: Path, origin: Origin) -> None:
    filler = small_disk / "of-somebody-else"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    (small_disk / "store").mkdir()
    process = Process(small_disk / "store")
    assert right(origin, TARGETS[:3]) == process.ask(*urls(origin, TARGETS[:3]))[0]["answers"]
    filler.unlink()
    origin.reset()
    for _ in range(2):
        assert right(origin, TARGETS[:3]) == process.ask(*urls(origin, TARGETS[:3]))[0]["answers"]
    assert len(origin.calls) == 3


@root
def test_a_directory_that_cannot_be_written_is_said_once(small_disk: Path, origin: Origin) -> None:
    process = Process(small_disk)
    process.ask(*urls(origin, TARGETS[:1]))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said, complaints = process.ask(*urls(origin, TARGETS))
    assert right(origin, TARGETS) == said["answers"]
    assert said["slowest"] < 3.0
    assert "Traceback" not in complaints
    assert len(complaints.splitlines()) <= 2, complaints[:2000]


def test_a_directory_that_vanishes_fails_nothing(tmp_path: Path, origin: Origin) -> None:
    before = "import shutil; shutil.rmtree(os.environ['CACHE_DIR'], ignore_errors=True)"
    said, complaints = Process(tmp_path / "store").ask(*urls(origin, TARGETS), before=before)
    assert right(origin, TARGETS) == said["answers"]
    assert "Traceback" not in complaints


def test_a_directory_in_the_place_of_each_file_fails_nothing(tmp_path: Path, origin: Origin) -> None:
    for name in (DATABASE, LEDGER, "local.key", "peers"):
        (tmp_path / name / "of-somebody-else").mkdir(parents=True)
    said, complaints = Process(tmp_path).ask(*urls(origin, TARGETS[:3]))
    assert right(origin, TARGETS[:3]) == said["answers"]
    assert "Traceback" not in complaints
    assert all((tmp_path / name / "of-somebody-else").is_dir() for name in (LEDGER, "local.key", "peers"))


# SQLite


@contextlib.contextmanager
def held(path: Path, *statements: str) -> Iterator[None]:
    """Another connection holds a lock on a database."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in statements:
            connection.execute(statement)
        yield
    finally:
        connection.close()


@pytest.mark.parametrize("name", [DATABASE, LEDGER])
@pytest.mark.parametrize("how", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_database_that_somebody_holds_for_long_delays_a_request_by_no_more_than_a_write_may_wait(
    tmp_path: Path, origin: Origin, name: str, how: str
) -> None:
    """database.BUSY_MS says a second for a write; it is given up then, and that is said once."""
    process = Process(tmp_path)
    process.ask(*urls(origin, TARGETS[:1]))
    with held(tmp_path / name, how):
        said, complaints = process.ask(*urls(origin, TARGETS[1:4]))
    assert right(origin, TARGETS[1:4]) == said["answers"]
    assert said["slowest"] < 2.0
    assert len(complaints.splitlines()) <= 3, complaints[:2000]


def test_a_database_that_nobody_else_can_even_read_is_not_waited_for_long(tmp_path: Path, origin: Origin) -> None:
    """As a backup holds one that is not in WAL mode."""
    process = Process(tmp_path)
    process.ask(*urls(origin, TARGETS[:1]))
    with held(tmp_path / DATABASE, "PRAGMA journal_mode=DELETE", "BEGIN EXCLUSIVE"):
        said, _ = process.ask(*urls(origin, TARGETS[1:4]))
    assert right(origin, TARGETS[1:4]) == said["answers"]
    assert said["slowest"] < 3.0


@pytest.mark.parametrize(
    ("name", "when"),
    [
        (DATABASE, "at-first"),
        (DATABASE, "under-way"),
        (f"{DATABASE}-wal", "under-way"),
        (f"{DATABASE}-shm", "at-first"),
        (LEDGER, "at-first"),
        (LEDGER, "under-way"),
    ],
)
def test_a_file_of_garbage_is_survived_and_the_cache_works_again(
    tmp_path: Path, origin: Origin, name: str, when: str
) -> None:
    process, garbage = Process(tmp_path), b"\xde\xad\xbe\xef" * 5000
    process.ask(*urls(origin, TARGETS[:2]))
    before = ""
    if when == "at-first":
        (tmp_path / name).write_bytes(garbage)
    else:
        cut = "'r+b'" if name.endswith("-shm") else "'r+b' if len(answers) % 3 else 'wb'"  # it is mapped into memory
        path = f"os.environ['CACHE_DIR'] + '/{name}'"
        before = f"os.path.exists({path}) and open({path}, {cut}).write({garbage!r})"
    said, complaints = process.ask(*urls(origin, TARGETS), before=before)
    assert right(origin, TARGETS) == said["answers"]
    assert "Traceback" not in complaints
    process.ask(*urls(origin, TARGETS))
    origin.reset()
    assert right(origin, TARGETS) == process.ask(*urls(origin, TARGETS))[0]["answers"]
    assert origin.calls == []


def test_a_local_secret_that_was_cut_short_does_not_make_the_cache_useless_for_ever(
    tmp_path: Path, origin: Origin
) -> None:
    """As a full disk leaves it: identities are made of it, so without one no process knows the entries of another."""
    (tmp_path / "local.key").write_bytes(b"")
    code = SCRIPT.replace("PRELUDE", "").replace("BEFORE", "pass").replace("timeout=30", "timeout=30, auth=('a', 'b')")
    for _ in range(3):
        assert (
            right(origin, TARGETS[:2]) == heard(Process(tmp_path).start(code, *urls(origin, TARGETS[:2])))[0]["answers"]
        )
    assert len(origin.calls) == 2


# Foreign files


def test_links_in_the_place_of_its_files_are_not_followed(tmp_path: Path, origin: Origin) -> None:
    directory, foreign = tmp_path / "store", tmp_path / "foreign"
    directory.mkdir()
    foreign.mkdir()
    for name in (DATABASE, "local.key", "daemon.log", "daemon.lock"):
        (foreign / name).write_bytes(b"")
        (directory / name).symlink_to(foreign / name)
    said, complaints = Process(directory).ask(*urls(origin, TARGETS[:3]))
    assert right(origin, TARGETS[:3]) == said["answers"]
    assert "Traceback" not in complaints
    assert {path.name: path.read_bytes() for path in foreign.iterdir() if path.stat().st_size} == {}


def test_a_link_in_the_place_of_the_ledger_is_not_followed(tmp_path: Path, origin: Origin) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / LEDGER).symlink_to(foreign)
    assert right(origin, TARGETS[:1]) == Process(tmp_path / "store").ask(*urls(origin, TARGETS[:1]))[0]["answers"]
    assert foreign.read_bytes() == b""


@pytest.mark.parametrize("name", [DATABASE, LEDGER, "local.key", "node.sock", "p2pcache.sock"])
def test_a_pipe_in_the_place_of_a_file_hangs_nothing(tmp_path: Path, origin: Origin, name: str) -> None:
    os.mkfifo(tmp_path / name)
    said, _ = Process(tmp_path).ask(*urls(origin, TARGETS[:1]))
    assert right(origin, TARGETS[:1]) == said["answers"]
    assert said["slowest"] < 5.0


def test_foreign_files_in_the_directory_are_left_alone(tmp_path: Path, origin: Origin) -> None:
    foreign = {f"{DATABASE}.bak": b"1", "notes.txt": b"2", f"{DATABASE}-journal.old": b"3", "hishel_cache_v2.db": b"4"}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
    assert right(origin, TARGETS[:3]) == Process(tmp_path).ask(*urls(origin, TARGETS[:3]))[0]["answers"]
    assert foreign == {name: (tmp_path / name).read_bytes() for name in foreign}


@contextlib.contextmanager
def foreign_socket(path: Path, said: bytes) -> Iterator[None]:
    """Somebody else's socket: it accepts, says this, and never anything more."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(16)
        taken: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(server.accept()[0])
                    taken[-1].sendall(said)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for connection in taken:
                connection.close()


@pytest.mark.p2p
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0",
        b"\0\0\0\x10half",
        b"\xff\xff\xff\xff",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0\0\0\x05\x91\x01\x01\x01\x01",
    ],
    ids=["mute", "one-byte", "half-a-frame", "a-huge-length", "http", "no-frame"],
)
def test_somebody_elses_socket_in_the_place_of_the_daemons_holds_up_nothing(
    tmp_path: Path, origin: Origin, said: bytes
) -> None:
    """ "takes a tenth of a second at the most to reach the runner's daemon" (P2PCacheTransport)."""
    with foreign_socket(node_socket(tmp_path), said):
        process = Process(tmp_path, CACHE_ENABLE_P2P="true", CACHE_SHARED_SECRET=ANOTHER, CACHE_NODE="daemon")
        answers, complaints = process.ask(*urls(origin, TARGETS[:3]))
        assert right(origin, TARGETS[:3]) == answers["answers"]
        assert answers["slowest"] < 2.0
        assert "Traceback" not in complaints


@pytest.mark.p2p
def test_a_file_in_the_place_of_the_daemons_socket_is_not_removed(tmp_path: Path, origin: Origin) -> None:
    runner = Runner(tmp_path / "store", tmp_path / "registry")
    (tmp_path / "store").mkdir(mode=0o700)
    (tmp_path / "store" / "node.sock").write_text("of somebody else")
    process = Process(tmp_path / "store")
    assert right(origin, TARGETS[:1]) == process.ask(*urls(origin, TARGETS[:1]))[0]["answers"]
    done = runner.run("init")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "store" / "node.sock").read_text() == "of somebody else"


AS_NOBODY = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[2])
from pathlib import Path
from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.node.discovery.registry import Registry
os.setgid(65534); os.setuid(65534)
registry = Registry(Path(sys.argv[1]), Keyring(b"secret", "default"), 1800.0)
try:
    print(json.dumps([len(registry.find()), None]))
except Exception as exc:
    print(json.dumps([0, repr(exc)]))
"""


@root
@pytest.mark.p2p
def test_an_expired_record_that_cannot_be_removed_hides_nobody(tmp_path: Path) -> None:
    """A directory that users share, as /tmp is: who may not remove what another has left still finds the others."""
    msgspec, entries = pytest.importorskip("msgspec"), pytest.importorskip("httpx_p2pcache.entries")
    ring, directory = entries.Keyring(b"secret", "default"), tmp_path / "shared"
    for parent in [tmp_path, *list(tmp_path.parents)[:-2]]:
        parent.chmod(0o755)
    directory.mkdir()
    directory.chmod(0o1777)
    for name, written in (("a-old", time.time() - 5000), ("b-new", time.time())):
        record = (b"peer-id", ["/ip4/10.0.0.1/tcp/1"], "host", written)
        path = directory / f"{ring.label}-{name}.peer"
        path.write_bytes(ring.seal(msgspec.msgpack.encode(record), b"registry"))
        path.chmod(0o644)
        os.utime(path, (written, written))
    command = [sys.executable, "-c", AS_NOBODY, str(directory), json.dumps(sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"nobody cannot run it here: {done.stderr[-200:]}")
    assert json.loads(done.stdout) == [1, None]


# Descriptors


FEW = "held = []; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
TAKE_ALL = """
        if len(answers) == AT:
            try:
                while True: held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError: pass
        elif len(answers) == AT + 3:
            for one in held[-20:]: os.close(one)
"""


@pytest.mark.parametrize("peers", [{}, pytest.param(PEERS, marks=pytest.mark.p2p)])
def test_without_descriptors_requests_fail_as_without_a_cache_and_succeed_when_there_are_some(
    tmp_path: Path, origin: Origin, peers: dict[str, str]
) -> None:
    """They go after two requests, and come back after three more."""
    before = TAKE_ALL.replace("AT", "2").strip()
    said, complaints = Process(tmp_path, **peers).ask(*urls(origin, TARGETS[:5]), prelude=FEW, before=before)
    expected, got = right(origin, TARGETS[:5]), said["answers"]
    assert expected[:2] == got[:2]
    assert expected[5:] == got[5:]
    assert [a for a in got[2:5] if isinstance(a, str) and "ConnectError" not in a] == []
    assert said["slowest"] < 5.0
    assert complaints.count("Traceback") == 0, complaints[:3000]


def test_descriptors_that_are_missing_at_the_start_do_not_fail_requests_when_they_are_there_again(
    tmp_path: Path, origin: Origin
) -> None:
    prelude = FEW + "; import httpcore, ssl"
    before = TAKE_ALL.replace("AT", "0").strip()
    said, _ = Process(tmp_path).ask(*urls(origin, TARGETS[:3]), prelude=prelude, before=before)
    assert right(origin, TARGETS[:3])[3:] == said["answers"][3:]


# Clocks


CLOCK = "real, shift = time.time, [0.0]; time.time = lambda: real() + shift[0]"


@pytest.mark.parametrize("shift", [-86400.0 * 365, -3600.0, 3600.0, 86400.0 * 365 * 20])
def test_a_clock_that_is_set_fails_nothing(tmp_path: Path, origin: Origin, shift: float) -> None:
    before = f"shift[0] = {shift} if len(answers) % 4 > 1 else 0.0"
    said, complaints = Process(tmp_path).ask(*urls(origin, TARGETS), prelude=CLOCK, before=before)
    assert right(origin, TARGETS) == said["answers"]
    assert "Traceback" not in complaints


def test_what_was_stored_while_the_clock_was_ahead_is_not_fresh_until_then(tmp_path: Path, origin: Origin) -> None:
    """A machine that starts with a wrong clock, and is set right: ``max-age=60`` is a minute all the same."""
    origin.resources["/now"] = Resource(b'"old"', max_age=60)
    ahead = CLOCK.replace("[0.0]", "[86400.0 * 365]")
    Process(tmp_path).ask(f"{origin.url}/now", prelude=ahead)
    origin.resources["/now"] = Resource(b'"new"', max_age=60)
    an_hour_later = CLOCK.replace("[0.0]", "[3600.0]")
    said, _ = Process(tmp_path).ask(f"{origin.url}/now", prelude=an_hour_later)
    assert right(origin, ["/now"]) == said["answers"]


# Threads, loops and ends


def test_threads_that_outlive_their_client_are_answered(origin: Origin, local: Settings) -> None:
    transport = P2PCacheTransport(settings=local)
    origin.latency = 0.1
    answers: list[Any] = []

    def ask() -> None:
        for target in TARGETS:
            try:
                request = httpx.Request("GET", f"{origin.url}{target}")
                response = transport.handle_request(request)
                answers.append((target, response.read()))
                response.close()
            except Exception as exc:
                answers.append((target, exc))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: len(answers) > 4)
    transport.close()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    transport.close()
    assert [(t, a) for t, a in answers if a != origin.resources[t].body] == []


ENDS = """
import os, signal, sys, threading, time
import httpx
from httpx_p2pcache import P2PCacheTransport
transport = P2PCacheTransport()
client = httpx.Client(transport=transport, timeout=30)
if os.environ.get("CACHE_ENABLE_P2P") == "true":
    transport.wait_until_joined(30)
"""


def timed_end(process: subprocess.Popen[str], seconds: float = PATIENT) -> tuple[int, str, str]:
    try:
        said, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail(f"it has not ended after {seconds} s")
    return process.returncode, said, complaints


with_and_without_a_node = pytest.mark.parametrize("peers", [{}, pytest.param(PEERS, marks=pytest.mark.p2p)])


@with_and_without_a_node
def test_an_interpreter_that_ends_in_the_middle_of_a_request_ends_soon(
    tmp_path: Path, origin: Origin, peers: dict[str, str]
) -> None:
    origin.latency = 30.0
    code = ENDS + (
        f"threading.Thread(target=client.get, args=({origin.url + TARGETS[0]!r},), daemon=True).start()\n"
        "time.sleep(0.3)\nprint('ends', flush=True)\n"
    )
    process = Process(tmp_path, **peers).start(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ends\n"
    status, _, complaints = timed_end(process, 8.0)
    origin.latency = 0.0
    assert (status, complaints) == (0, "")


@with_and_without_a_node
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_an_interrupt_in_the_middle_of_a_request_is_raised_and_the_next_request_is_answered(
    tmp_path: Path, origin: Origin, peers: dict[str, str], asynchronous: bool
) -> None:
    url = origin.url + TARGETS[0]
    if asynchronous:
        begin = f"""
import asyncio
async def main():
    async with httpx.AsyncClient(transport=P2PCacheTransport(), timeout=30) as other:
        print('begins', flush=True)
        await other.get({url!r})
run = lambda: asyncio.run(main())
"""
    else:
        begin = f"""
def run():
    print('begins', flush=True)
    client.get({url!r})
"""
    code = (
        ENDS
        + begin
        + f"""
try:
    run()
except KeyboardInterrupt:
    print('interrupted', flush=True)
sys.stdin.readline()
print(client.get({url!r}).status_code, flush=True)
client.close()
"""
    )
    origin.latency = 10.0
    process = Process(tmp_path, **peers).start(code)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "begins\n"
    assert eventually(lambda: origin.arrived, 10)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    origin.latency = 0.0
    began = time.monotonic()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "200\n"
    assert time.monotonic() - began < 3.0
    status, _, complaints = timed_end(process)
    assert (status, complaints) == (0, "")


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_client_that_is_used_in_two_loops_one_after_another_is_answered_in_both(
    origin: Origin, local: Settings
) -> None:
    origin.resources["/aged"] = Resource(b"{}", fields={"Age": "61"}, max_age=60)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Cache-Control": "max-age=60, stale-while-revalidate=600", "Age": "61"})

    transport = P2PCacheTransport(httpx.MockTransport(answer), settings=local)
    client = httpx.AsyncClient(transport=transport, base_url=origin.url)

    async def ask() -> list[int]:
        return [(await client.get(target)).status_code for target in TARGETS[:3] * 2]

    for _ in range(3):
        assert asyncio.run(ask()) == [200] * 6
    asyncio.run(client.aclose())


def test_a_loop_that_is_closed_under_a_client_leaves_no_claim_behind(origin: Origin, local: Settings) -> None:
    began = threading.Event()

    class Slow(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            began.set()
            await asyncio.sleep(60)
            raise AssertionError

    client = httpx.AsyncClient(transport=P2PCacheTransport(Slow(), settings=local), base_url=origin.url)
    loop = asyncio.new_event_loop()
    task = loop.create_task(client.get(TARGETS[0]))
    while not began.is_set():
        loop.run_until_complete(asyncio.sleep(0.01))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    with httpx.Client(transport=P2PCacheTransport(settings=local), base_url=origin.url) as other:
        at = time.monotonic()
        assert other.get(TARGETS[0]).content == origin.resources[TARGETS[0]].body
        assert time.monotonic() - at < 2.0
    asyncio.run(client.aclose())


def test_a_hundred_transports_in_one_process_answer_and_leave_nothing(
    origin: Origin, settings_for: Callable[..., Settings]
) -> None:
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    transports = [
        P2PCacheTransport(settings=settings_for(f"r{number % 10}", enable_p2p=False)) for number in range(100)
    ]
    for number, transport in enumerate(transports):
        request = httpx.Request("GET", f"{origin.url}{TARGETS[number % 10]}")
        response = transport.handle_request(request)
        assert response.read() == origin.resources[TARGETS[number % 10]].body
        response.close()
    for transport in transports:
        transport.close()
    assert len(origin.calls) == 10
    origin.close()
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 2)
    assert eventually(lambda: threading.active_count() <= threads)


FORKS = """
with client.stream("GET", sys.argv[1]) as response:
    child = os.fork()
    if not child:
        chunks = client.get(sys.argv[2]).content
        os.write(1, b"child %d\\n" % len(chunks))
        sys.exit(0)  # with all that an interpreter does at its end
    assert os.waitpid(child, 0)[1] == 0
    print("parent", len(response.read()), flush=True)
print("again", len(client.get(sys.argv[2]).content), flush=True)
"""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@with_and_without_a_node
def test_a_fork_in_the_middle_of_a_response_leaves_both_whole(
    tmp_path: Path, origin: Origin, peers: dict[str, str]
) -> None:
    status, said, complaints = timed_end(
        Process(tmp_path, PYTHONWARNINGS="ignore", **peers).start(ENDS + FORKS, *urls(origin, TARGETS[:2]))
    )
    sizes = [len(origin.resources[target].body) for target in TARGETS[:2]]
    assert sorted(said.split("\n")) == sorted(["", f"child {sizes[1]}", f"parent {sizes[0]}", f"again {sizes[1]}"])
    assert (status, complaints) == (0, "")


# A process and its daemon


@pytest.mark.p2p
@pytest.mark.parametrize(
    ("target", "fields"),
    [
        pytest.param("/long?" + "x" * 20_000, {}, id="a-long-url"),
        pytest.param("/old", {"Last-Modified": "Mon, 01 Jan 1700 00:00:00 GMT", "Age": "9" * 12}, id="a-great-age"),
        pytest.param("/old-date", None, id="a-date-of-long-ago"),
    ],
)
def test_what_an_origin_says_does_not_cost_a_process_its_daemon(
    tmp_path: Path, target: str, fields: dict[str, str] | None
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        said = {"Cache-Control": "max-age=600"} | (fields or {})
        if fields is None:
            said["Date"] = "Mon, 01 Jan 1700 00:00:00 GMT"
        return httpx.Response(200, headers=said, content=b"{}")

    runner = Runner(tmp_path / "store", tmp_path / "registry", CACHE_FLEET="default")
    runner.p2pcache("init")
    try:
        environment = {n: v for n, v in runner.environment.items() if n.startswith("CACHE_")}
        transport = P2PCacheTransport(
            httpx.MockTransport(answer), settings=Settings.from_env(environment, node="daemon")
        )
        with httpx.Client(transport=transport) as client:
            assert transport.wait_until_joined(10)
            assert eventually(lambda: "p2p=True" in repr(transport))
            assert client.get(f"http://origin.test{target}").content == b"{}"
            lost = eventually(lambda: "p2p=False" in repr(transport), 1.0)
        assert not lost, "the daemon has shown this process out"
    finally:
        runner.stop()

"""What the processes of a runner write down together, and what is read of it."""

from __future__ import annotations

import os
import resource
import sqlite3
import stat
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import few, many
from waiting import eventually

from httpx_p2pcache import ledger as ledgers
from httpx_p2pcache.github import endpoint
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.report import report
from httpx_p2pcache.stats import COUNTERS, Stats, summary, total
from httpx_p2pcache.testing import Origin, made_up

REPOS, PULLS = "GET api.github.com/repos", "GET api.github.com/repos/pulls"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "BUSY_SECONDS", 0.2)


def counted(*added: tuple[str, int], endpoint: str = REPOS) -> Stats:
    stats = Stats()
    for name, amount in added:
        stats.add(name, amount, endpoint)
    return stats


def file_of(directory: Path) -> Path:
    """The ledger's file in the runner's directory."""
    (found,) = directory.glob("stats-*.db")
    return found


def move(directory: Path, minutes: int) -> None:
    """Make everything that was written down so far so many minutes older."""
    with closing(sqlite3.connect(file_of(directory))) as connection, connection:
        connection.execute("UPDATE counts SET minute = minute - ?", (minutes,))


@contextmanager
def temporary() -> Iterator[Path]:
    """A directory for one of hypothesis's examples."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


# What is written down


def test_what_was_counted_is_written_down_once(tmp_path: Path) -> None:
    ledger, stats = Ledger(tmp_path), counted(("requests", 3))
    for _ in range(3):
        ledger.flush(stats)
    assert ledger.read() == {REPOS: {"requests": 3}}
    stats.add("requests", 2, REPOS)
    stats.add("local_hits", 1, PULLS)
    ledger.flush(stats)
    ledger.close(stats)
    assert ledger.read() == {REPOS: {"requests": 5}, PULLS: {"local_hits": 1}}


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([REPOS, PULLS, ""]), st.sampled_from(COUNTERS), st.integers(1, 9))
        | st.integers(0, 2),
        max_size=30,
    )
)
@few
def test_processes_add_up_whenever_they_write(steps: list[tuple[int, str, str, int] | int]) -> None:
    """A step is something that one of three processes counts, or its turn to write."""
    with temporary() as directory:
        processes = [(Ledger(directory), Stats()) for _ in range(3)]
        expected: dict[str, dict[str, int]] = {}
        for step in steps:
            if isinstance(step, int):
                processes[step][0].flush(processes[step][1])
                continue
            number, place, name, amount = step
            processes[number][1].add(name, amount, place)
            expected.setdefault(place, {}).setdefault(name, 0)
            expected[place][name] += amount
        for ledger, stats in processes:
            ledger.close(stats)
        assert Ledger(directory).read() == expected


def test_processes_that_begin_and_write_at_once_lose_nothing(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.stats import Stats
ledger, stats = Ledger(Path(sys.argv[1])), Stats()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    stats.add("requests", endpoint="GET a.test/x")
    ledger.flush(stats)
print(ledger.runner())
"""
    processes = []
    try:
        for _ in range(3):
            command = [sys.executable, "-c", code, str(tmp_path)]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(3) as pool:
            names = {said for said, _ in pool.map(lambda process: process.communicate("go\n", timeout=60), processes)}
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(names) == 1
    assert Ledger(tmp_path).read() == {"GET a.test/x": {"requests": 60}}


def test_what_is_followed_is_written_down_without_being_told(tmp_path: Path) -> None:
    ledger, stats = Ledger(tmp_path), counted(("requests", 1))
    ledger.follow(stats)
    try:
        assert eventually(lambda: Ledger(tmp_path).read() == {REPOS: {"requests": 1}}, 30)
        stats.add("requests", 4, REPOS)
    finally:
        ledger.close(stats)
    assert Ledger(tmp_path).read() == {REPOS: {"requests": 5}}


def test_a_runner_has_one_name_and_another_runner_another(tmp_path: Path) -> None:
    names = []
    for place in ("a", "a", "b"):
        (tmp_path / place).mkdir(exist_ok=True)
        names.append(Ledger(tmp_path / place).runner())
    assert names[0] == names[1] != names[2]
    assert all(names)


def test_only_its_owner_can_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Ledger(tmp_path).flush(counted(("requests", 1)))
        with closing(sqlite3.connect(file_of(tmp_path))) as connection:
            connection.execute("INSERT INTO runner VALUES ('x')")
            connection.commit()
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert set(modes.values()) == {0o600}, modes


def test_a_link_to_a_file_of_somebody_else_is_not_followed_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "runner").mkdir()
    (tmp_path / "runner" / "stats-v1.db").symlink_to(tmp_path / "elsewhere")
    Ledger(tmp_path / "runner").flush(counted(("requests", 1)))
    assert not (tmp_path / "elsewhere").exists()


# What is read of it


def test_since_counts_from_its_minute_on(tmp_path: Path) -> None:
    ledger, stats = Ledger(tmp_path), counted(("requests", 1))
    ledger.flush(stats)
    move(tmp_path, 10)
    stats.add("requests", 2, REPOS)
    now = time.time()
    ledger.flush(stats)
    assert ledger.read() == {REPOS: {"requests": 3}}
    assert ledger.read(now - 11 * 60) == {REPOS: {"requests": 3}}
    assert ledger.read(now - 5 * 60) == {REPOS: {"requests": 2}}
    assert ledger.read(now + 120) == {}
    assert [counts for _, counts in ledger.by_minute(0)] == [{"requests": 1}, {"requests": 2}]
    assert [at % 60 for at, _ in ledger.by_minute(0)] == [0, 0]
    assert abs(ledger.by_minute(0)[1][0] - now) <= 120


def test_what_is_a_month_old_is_forgotten_when_a_process_begins_to_write(tmp_path: Path) -> None:
    Ledger(tmp_path).flush(counted(("requests", 7)))
    move(tmp_path, ledgers.KEPT_MINUTES + 2)
    Ledger(tmp_path).flush(counted(("requests", 1)))
    assert Ledger(tmp_path).read() == {REPOS: {"requests": 1}}


def test_after_clear_only_what_is_new_counts_also_for_those_who_have_written_before(tmp_path: Path) -> None:
    ledger, stats = Ledger(tmp_path), counted(("requests", 5))
    ledger.flush(stats)
    name = ledger.runner()
    Ledger(tmp_path).clear()
    assert ledger.read() == {}
    stats.add("requests", 1, REPOS)
    ledger.flush(stats)
    assert (ledger.read(), ledger.runner()) == ({REPOS: {"requests": 1}}, name)


@given(
    st.dictionaries(
        st.sampled_from([REPOS, PULLS, "GET a.test/x", "POST a.test/x"]),
        st.dictionaries(st.sampled_from(COUNTERS), st.integers(1, 10**9), min_size=1),
    ),
    st.integers(1, 5),
)
@few
def test_the_sums_of_a_report_agree_with_the_ledger(counts: dict[str, dict[str, int]], minutes: int) -> None:
    for of in counts.values():
        of.setdefault("requests", 1)  # as an endpoint has by which anything was counted
    with temporary() as directory:
        ledger = Ledger(directory)
        for place, of in counts.items():
            Ledger(directory).flush(counted(*of.items(), endpoint=place))
            move(directory, minutes)
        found = report(ledger, 0.0)
        assert found["runner"] == ledger.runner()
        assert found["total"] == summary(total(ledger.read()))
        assert {name: found["total"][name] for name in COUNTERS} == total(counts)
        for name in ("requests", "local_hits", "peer_hits", "revalidated", "api_calls_made", "api_calls_saved"):
            assert sum(one[name] for one in found["endpoints"]) == found["total"][name]
            assert sum(one[name] for one in found["minutes"]) == found["total"][name]
        saved = [one["api_calls_saved"] for one in found["endpoints"]]
        assert saved == sorted(saved, reverse=True)
        assert [one["at"] for one in found["minutes"]] == sorted(one["at"] for one in found["minutes"])


def test_where_nothing_was_counted_a_report_says_nought(tmp_path: Path) -> None:
    found = report(Ledger(tmp_path), 0.0)
    assert (found["total"]["requests"], found["endpoints"], found["minutes"]) == (0, [], [])


# What goes wrong costs counts alone


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def _read_only(path: Path) -> Iterator[None]:
    """To SQLite a database of a later write version can only be read, whoever the user is."""
    was = path.read_bytes()[18:19]
    _write_at(path, 18, b"\3")
    try:
        yield
    finally:
        _write_at(path, 18, was)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@contextmanager
def _moved_away(path: Path, instead: Callable[[Path], object]) -> Iterator[None]:
    path.rename(path.with_suffix(".away"))
    instead(path)
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.with_suffix(".away").replace(path)


@contextmanager
def _no_room(path: Path) -> Iterator[None]:
    """Files of this process cannot grow: what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


TROUBLES = {
    "locked": _locked,
    "read-only": _read_only,
    "a directory in its place": lambda path: _moved_away(path, Path.mkdir),
    "damaged": lambda path: _moved_away(path, lambda place: place.write_bytes(b"no database " * 1000)),
    "of another form": lambda path: _moved_away(path, _other_form),
    "no room": _no_room,
}


def _other_form(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE counts (something TEXT)")


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_cannot_be_written_down_raises_nothing_and_is_written_later(trouble: str, tmp_path: Path) -> None:
    ledger, stats = Ledger(tmp_path), counted(("requests", 1))
    ledger.flush(stats)
    stats.add("requests", 2, REPOS)
    with TROUBLES[trouble](file_of(tmp_path)):
        ledger.flush(stats)
    assert ledger.read() == {REPOS: {"requests": 1}}
    ledger.close(stats)
    assert ledger.read() == {REPOS: {"requests": 3}}


@pytest.mark.parametrize("trouble", ["a directory in its place", "damaged", "of another form"])
def test_what_cannot_be_read_is_nothing_and_raises_nothing(trouble: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.flush(counted(("requests", 1)))
    with TROUBLES[trouble](file_of(tmp_path)):
        assert (ledger.read(), ledger.by_minute(0), ledger.runner()) == ({}, [], "")
        assert report(ledger, 0.0)["total"]["requests"] == 0


def test_without_a_directory_nothing_is_counted_and_nothing_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "none", tmp_path / "file"):
        ledger, stats = Ledger(directory), counted(("requests", 1))
        ledger.follow(stats)
        ledger.close(stats)
        assert (ledger.read(), ledger.runner()) == ({}, "")


def test_a_ledger_that_is_locked_does_not_hold_up_the_end_for_long(tmp_path: Path) -> None:
    ledger, stats = Ledger(tmp_path), counted(("requests", 1))
    ledger.flush(stats)
    ledger.follow(stats)
    stats.add("requests", 1, REPOS)
    with _locked(file_of(tmp_path)):
        began = time.monotonic()
        ledger.close(stats)
        assert time.monotonic() - began < 5  # the lock is held for ever; two waits of 0.2 s are allowed


# Forks


def test_what_parent_and_child_of_a_fork_count_is_counted_once(tmp_path: Path) -> None:
    code = """
import os, sys
import httpx
from httpx_p2pcache import P2PCacheTransport, Settings
settings = Settings(dir=sys.argv[1], enable_p2p=False, github_hosts=(sys.argv[2].partition("//")[2],))
client = httpx.Client(transport=P2PCacheTransport(settings=settings), base_url=sys.argv[2], trust_env=False)
for number in range(3):
    client.get(f"/repos/octo-org/repo-{number}")
child = os.fork()
for number in range(2, 6) if child else range(3, 8):
    client.get(f"/repos/octo-org/repo-{number}")
client.close()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    with Origin(made_up(10)) as origin:
        command = [sys.executable, "-c", code, str(tmp_path), origin.url]
        subprocess.run(command, check=True, timeout=60, stderr=subprocess.DEVNULL)
        found = total(Ledger(tmp_path).read())
        assert found["requests"] == 3 + 4 + 5
        assert found["origin_calls"] == len(origin.calls)
        assert found["local_hits"] == found["requests"] - found["origin_calls"]
        assert found["stored"] == found["origin_calls"]
        assert found["validators_held"] == found["origin_calls"]


# What an endpoint says


WORDS = st.text(string.ascii_letters + string.digits + "-_.%~ü", min_size=1, max_size=20)
HOSTS = ("https://api.github.com", "https://ghe.test/api/v3", "http://127.0.0.1:8080")
OWNED = (  # by GitHub's OpenAPI description
    "/repos/{owner}/{name}",
    "/repos/{owner}/{name}/pulls/7/files",
    "/repos/{owner}/{name}/contents/{file}",
    "/repos/{owner}/{name}/contents/{file}/{file}",
    "/repos/{owner}/{name}/readme/{file}",
    "/repos/{owner}/{name}/git/trees/{file}",
    "/repos/{owner}/{name}/git/ref/heads/{file}",
    "/repos/{owner}/{name}/actions/workflows/{file}/runs",
    "/repos/{owner}/{name}/branches/{file}/protection",
    "/repos/{owner}/{name}/compare/{file}...{file}",
    "/repos/{owner}/{name}/tarball/{file}",
    "/repos/{owner}/{name}/releases/tags/{file}",
    "/repos/{owner}/{name}/assignees/{owner}",
    "/repos/{owner}/{name}/collaborators/{owner}/permission",
    "/repositories/5/contents/{file}",
    "/orgs/{owner}/repos",
    "/orgs/{owner}/members/{owner}",
    "/orgs/{owner}/teams/{name}/repos/{owner}/{name}",
    "/teams/5/repos/{owner}/{name}",
    "/users/{owner}/repos",
    "/users/{owner}/following/{owner}",
    "/user/starred/{owner}/{name}",
    "/user/following/{owner}",
    "/networks/{owner}/{name}/events",
)


@pytest.mark.parametrize("route", OWNED)
@given(host=st.sampled_from(HOSTS), owner=WORDS, name=WORDS, file=WORDS, query=WORDS)
@few
def test_an_endpoint_names_no_owner_repository_or_file(
    route: str, host: str, owner: str, name: str, file: str, query: str
) -> None:
    path = route.format(owner=f"OWNER{owner}", name=f"NAME{name}", file=f"FILE{file}")
    shown = endpoint("GET", f"{host}{path}?q=QUERY{query}#FRAGMENT{query}")
    assert [mark for mark in ("OWNER", "NAME", "FILE", "QUERY", "FRAGMENT") if mark in shown] == [], shown
    assert shown.startswith(f"GET {host.split('/')[2]}/")


@given(path=st.lists(WORDS, max_size=6), query=WORDS, user=st.sampled_from(["", "USER@", "USER:WORD@"]), fragment=WORDS)
@many
def test_an_endpoint_is_at_most_three_parts_of_a_path_and_never_a_query_or_a_user(
    path: list[str], query: str, user: str, fragment: str
) -> None:
    shown = endpoint("GET", f"https://{user}a.test/{'/'.join(path)}?QUERY={query}#FRAGMENT{fragment}")
    method, _, place = shown.partition(" ")
    host, *parts = place.split("/")
    assert (method, host) == ("GET", "a.test")
    assert len(parts) <= 3
    assert not any(mark in shown for mark in ("?", "#", "QUERY", "FRAGMENT", "USER", "WORD"))


def test_requests_for_one_kind_of_resource_have_one_endpoint() -> None:
    one, same = "https://api.github.com/repos/a/b/issues/1?page=2", "https://api.github.com/repos/c/d/issues/2"
    assert endpoint("GET", one) == endpoint("GET", same) == "GET api.github.com/repos/issues/*"
    assert endpoint("GET", one) != endpoint("POST", one)
    assert endpoint("GET", "https://ghe.test/api/v3/repos/a/b") == "GET ghe.test/repos"

"""The commands: what they print, what their exit status says, and that their figures agree."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from daemons import TOKEN, Runner, having_asked
from secret import secret_of
from typer.testing import CliRunner, Result
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.cli.app import app
from httpx_p2pcache.stats import COUNTERS
from httpx_p2pcache.testing import Origin, Resource, github_etag, made_up

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p


def on_a_terminal(runner: Runner, *arguments: str) -> tuple[int, str]:
    """The exit status of a command on a terminal, and what is to be seen there."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "httpx_p2pcache.cli", *arguments]
    environment = runner.environment | {"COLUMNS": "200", "TERM": "xterm"}
    process = subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while said := os.read(ours, 65536):
            shown += said
    except OSError:  # so ends what is read of a terminal
        pass
    os.close(ours)
    return process.wait(60), shown.decode()


def invoke(runner: Runner, *arguments: str) -> Result:
    """``p2pcache`` in this process, which is quicker; whatever it raises but an exit fails the test."""
    without = {name: None for name in os.environ if name.startswith(("CACHE_", "GITHUB_", "GH_", "RUNNER_"))}
    done = CliRunner().invoke(app, arguments, env={**without, **runner.environment})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
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
    assert json.loads(runner.run("peers", "--json").stdout) == []
    assert json.loads(runner.run("stats", "--fleet", "--json").stdout) == {"running": False}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["stats"], ["status", "--json"], ["--help"]])
def test_a_result_that_cannot_be_written_is_said_in_one_line(runner: Runner, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "httpx_p2pcache", *arguments]
        done = subprocess.run(command, env=runner.environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["p2pcache: the result could not be written: No space left on device"]
    assert runner.run("discover").returncode == 1


def test_verify_says_yes_where_all_is_well_and_what_to_do_where_not(runner: Runner) -> None:
    secret = runner.environment["CACHE_SHARED_SECRET"]
    done = runner.run("verify")
    assert (done.returncode, done.stdout.count("✗")) == (0, 0), done.stdout
    assert "✓ round trip: what one node fetched, a second got from it" in done.stdout
    del runner.environment["CACHE_SHARED_SECRET"]
    bad = Runner(runner.directory, runner.directory / "p2pcache-v1.db" / "no-directory", CACHE_SHARED_SECRET="short")
    checks = {check["about"]: check for check in json.loads(bad.run("verify", "--json").stdout)}
    assert (checks["registry"]["right"], checks["secret"]["right"]) == (False, False)
    assert "set CACHE_PEER_REGISTRY" in checks["registry"]["said"]
    assert "can be guessed" in checks["secret"]["said"]
    runner.environment["CACHE_SHARED_SECRET"] = secret


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
    status, shown = on_a_terminal(runner, "stats")
    assert status == 0
    assert set(shown) & set("│┃━─┏┓")


def test_help_of_every_command_says_how_it_may_end() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert "exit status" in (command.callback.__doc__ or "").lower(), command.callback.__name__


ANOTHER = "fedcba9876543210" * 4
ARGUMENTS = {"get": ["/x"], "register": ["12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN", "9000", "127.0.0.1"]}


def test_a_value_that_cannot_be_used_ends_every_command(tmp_path: Path) -> None:
    bad = Runner(tmp_path / "store", tmp_path / "peers", CACHE_LISTEN_PORT="sesame")
    names = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    for name in names - {"demo", "replay"}:  # which have settings of their own
        done = invoke(bad, name, *(ARGUMENTS.get(name, [])))
        assert done.exit_code == (1 if name == "verify" else 2), name
        assert "CACHE_LISTEN_PORT must be a port number from 0 to 65535, not 'sesame'" in done.output
    assert list(tmp_path.iterdir()) == []


# A fleet of two


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin(made_up(12)) as server:
        server.resources |= {
            "/items": listed([1, 2], f"<{server.url}/items?page=2>"),
            "/items?page=2": listed([3, 4], "</items?page=3>"),
            "/items?page=3": listed([5]),
            "/words": Resource(b"one"),
            "/found": Resource(b'{"total": 2}', fields={"Link": '</found?page=2>; rel="next"'}),
            "/found?page=2": Resource(b'{"total": 2, "last": true}'),
            "/half": listed([1], "</not-there>"),
        }
        yield server


def listed(items: list[int], following: str = "") -> Resource:
    link = {"Link": f'{following}; rel="next"'} if following else {}
    return Resource(json.dumps(items).encode(), fields={"Content-Type": "application/json", **link})


@pytest.fixture(scope="module")
def fleet(origin: Origin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runner, Runner]]:
    """Two runners whose daemons have met."""
    root = tmp_path_factory.mktemp("fleet")
    changes = {"CACHE_GITHUB_HOSTS": origin.netloc, "GH_TOKEN": TOKEN, "CACHE_LOOKUP_TIMEOUT": "2"}
    runners = Runner(root / "a", root / "registry", **changes), Runner(root / "b", root / "registry", **changes)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda runner: runner.p2pcache("init"), runners))
        assert eventually(lambda: [runner.status().get("connected_peers") for runner in runners] == [1, 1], 30)
        yield runners
    finally:
        for runner in runners:
            runner.stop()


def test_figures_agree_over_processes_endpoints_and_runners(fleet: tuple[Runner, Runner], origin: Origin) -> None:
    ours, theirs = fleet
    before = len(origin.calls)
    urls = [origin.url + target for target in made_up(6)]
    ours.step(*urls)
    theirs.step(*urls, *urls[:2])
    for runner in (theirs, ours):
        runner.p2pcache("get", "/repos/octo-org/repo-6")
    ours.p2pcache("get", "/repos/octo-org/repo-6", "--fresh")
    ours.run("get", "/not-there?q=sesame")
    found = [json.loads(runner.p2pcache("stats", "--json")) for runner in fleet]
    totals = [one["total"] for one in found]
    assert [total["requests"] for total in totals] == [6 + 3, 8 + 1]
    assert sum(total["origin_calls"] for total in totals) == len(origin.calls) - before == 6 + 1 + 1 + 1
    assert sum(total["revalidated"] for total in totals) == 1
    for one in found:
        total = one["total"]
        assert total["requests"] == total["local_hits"] + total["peer_hits"] + total["misses"]
        assert total["misses"] == total["origin_calls"]
        assert total["api_calls_made"] + total["api_calls_saved"] == total["requests"]
        for name in ("requests", "local_hits", "peer_hits", "revalidated", "api_calls_made", "api_calls_saved"):
            assert sum(endpoint[name] for endpoint in one["endpoints"]) == total[name]
            assert sum(minute[name] for minute in one["minutes"]) == total[name]

    def agree() -> bool:  # what the daemons count themselves is written down within a second
        totals = [json.loads(invoke(runner, "stats", "--json").stdout)["total"] for runner in fleet]
        sums = {name: sum(total[name] for total in totals) for name in COUNTERS}
        told = [json.loads(invoke(runner, "stats", "--fleet", "--json").stdout)["total"] for runner in fleet]
        return all({name: total[name] for name in COUNTERS} == sums for total in told)

    assert eventually(agree, 30)


def test_what_prints_json_prints_json_alone(fleet: tuple[Runner, Runner]) -> None:
    ours, _ = fleet
    commands = [["status"], ["peers"], ["discover"], ["stats"], ["stats", "--fleet"], ["summary"], ["init"], ["clear"]]
    for command in commands:
        done = invoke(ours, *command, "--json")
        assert (done.exit_code, done.stderr) == (0, ""), command
        assert json.loads(done.stdout), command


def test_peers_are_listed_as_the_daemon_knows_them(fleet: tuple[Runner, Runner]) -> None:
    ours, theirs = fleet
    (peer,) = json.loads(ours.p2pcache("peers", "--json"))
    assert peer["peer_id"] == theirs.status()["peer_id"]
    heading, line = ours.p2pcache("peers").splitlines()
    assert heading.split()[:2] == ["peer", "address"]
    assert line.split()[:2] == [f"…{peer['peer_id'][-8:]}", ", ".join(peer["addresses"])]
    status, shown = on_a_terminal(ours, "peers")
    assert status == 0
    assert set(shown) & set("│┃━─┏┓")


def test_discovered_peers_can_be_bootstrapped_from(fleet: tuple[Runner, Runner]) -> None:
    ours, theirs = fleet
    (address,) = theirs.status()["addresses"]
    multiaddr = f"{address}/p2p/{theirs.status()['peer_id']}"
    assert ours.p2pcache("discover") == f"{multiaddr}\n"
    third = Runner(ours.directory / "third", Path(ours.environment["CACHE_PEER_REGISTRY"]))
    found = json.loads(invoke(third, "discover", "--json").stdout)
    assert {(peer["peer_id"], peer["how"]) for peer in found} == {
        (runner.status()["peer_id"], "registry") for runner in fleet
    }
    assert len(invoke(third, "discover", "1").stdout.splitlines()) == 1
    stranger = Runner(third.directory, Path(ours.environment["CACHE_PEER_REGISTRY"]), CACHE_SHARED_SECRET=ANOTHER)
    assert invoke(stranger, "discover").exit_code == 1
    stranger.environment["CACHE_BOOTSTRAP_PEERS"] = multiaddr
    assert json.loads(invoke(stranger, "discover", "--json").stdout) == [
        {"multiaddr": multiaddr, "peer_id": theirs.status()["peer_id"], "how": "bootstrap"}
    ]


def test_no_token_secret_or_query_is_printed(fleet: tuple[Runner, Runner], origin: Origin) -> None:
    ours, _ = fleet
    said = [ours.run("get", "/not-there?q=sesame").stderr, invoke(ours, "get", "http://127.0.0.1:1/?q=sesame").stderr]
    commands = [["status"], ["peers"], ["discover"], ["stats"], ["stats", "--json"], ["summary"], ["stats", "--fleet"]]
    for command in commands:
        said.append(invoke(ours, *command).output)
    said.append((ours.directory / "daemon.log").read_text())
    secrets = TOKEN, ours.environment["CACHE_SHARED_SECRET"], "sesame", "octo-org"
    assert [text for text in said if any(secret in text for secret in secrets)] == []


def test_what_a_peer_says_of_itself_does_not_command_the_terminal(
    tmp_path: Path, settings_for: Callable[..., Settings]
) -> None:
    ours = Runner(tmp_path / "a", tmp_path / "registry", CACHE_SHARED_SECRET=secret_of(tmp_path))
    said_of_itself = ("/ip4/127.0.0.1/tcp/1/\x1b[2J", "/ip4/127.0.0.1/tcp/1/x\nfalse", "/dns4/[/tcp/1/]")
    theirs = settings_for("b")
    msgspec.structs.force_setattr(theirs, "announce_addrs", said_of_itself)  # which no setting can be
    member = P2PCacheTransport(settings=theirs)
    try:
        ours.p2pcache("init")
        assert eventually(lambda: ours.status().get("connected_peers") == 1, 30)
        for command in ("peers", "discover"):
            said = invoke(ours, command).stdout
            assert "\x1b" not in said
            assert not any(line.startswith("false") for line in said.splitlines())
        assert on_a_terminal(ours, "peers")[0] == 0
    finally:
        ours.stop()
        member.close()


# discover, without a daemon


def test_a_registry_that_is_none_holds_no_peers(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert invoke(Runner(tmp_path / "store", tmp_path / "file"), "discover").exit_code == 1


@pytest.mark.parametrize("text", ["nonsense", "/ip4/127.0.0.1/tcp/9100", "/ip4/127.0.0.1/tcp/9100/p2p/nobody"])
def test_what_is_no_address_of_a_peer_is_not_listed(text: str, tmp_path: Path) -> None:
    done = invoke(Runner(tmp_path / "store", tmp_path / "peers", CACHE_BOOTSTRAP_PEERS=text), "discover")
    assert (done.exit_code, done.stdout) == (1, "")


# get


@pytest.fixture(scope="module")
def alone(origin: Origin, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A runner without a daemon, with a token."""
    root = tmp_path_factory.mktemp("alone")
    return Runner(root / "store", root / "registry", CACHE_GITHUB_HOSTS=origin.netloc, GH_TOKEN=TOKEN)


@pytest.fixture
def elsewhere() -> Iterator[Origin]:
    """An origin that is none of GitHub's hosts."""
    with Origin({"/items?page=2": listed([9]), "/x": Resource(b"x")}) as server:
        yield server


def calls_for(origin: Origin, target: str) -> list[Any]:
    return [(call.token, call.status) for call in origin.calls if call.target == target]


def test_get_prints_the_body_and_nothing_else(alone: Runner, origin: Origin) -> None:
    done = alone.run("get", "/repos/octo-org/repo-7")
    assert done.returncode == 0
    assert done.stdout.encode() == origin.resources["/repos/octo-org/repo-7"].body
    assert done.stderr == ""


def test_get_prints_the_fields_on_request_and_sends_those_that_are_given(alone: Runner, origin: Origin) -> None:
    target = "/repos/octo-org/repo-8"
    given = {"Accept": "text/x", "Authorization": "token another"}
    options = [part for name, value in given.items() for part in ("-H", f"{name}:{value} ")]
    said = alone.p2pcache("get", origin.url + target, "-i", *options)
    head, _, body = said.partition("\n\n")
    assert head.splitlines()[0] == "HTTP/1.1 200 OK"
    assert f'etag: w/"{github_etag(origin.resources[target].body, given)}"' in head.lower()
    assert "p2pcache; fwd=miss; stored" in head
    assert body.encode() == origin.resources[target].body
    assert calls_for(origin, target) == [("token another", 200)]
    assert "p2pcache; hit" in alone.p2pcache("get", target, "-i", *options)
    assert len(calls_for(origin, target)) == 1


def test_get_has_it_validated_on_request(alone: Runner, origin: Origin) -> None:
    target = "/repos/octo-org/repo-9"
    bodies = {invoke(alone, "get", target, *options).stdout for options in ([], [], ["--fresh"])}
    assert bodies == {origin.resources[target].body.decode()}
    assert calls_for(origin, target) == [(f"Bearer {TOKEN}", 200), (f"Bearer {TOKEN}", 304)]


def test_pages_that_are_lists_become_one_list_and_others_follow_each_other(alone: Runner) -> None:
    assert json.loads(alone.p2pcache("get", "/items", "--paginate")) == [1, 2, 3, 4, 5]
    assert json.loads(invoke(alone, "get", "/items").stdout) == [1, 2]
    assert invoke(alone, "get", "/words", "--paginate").stdout == "one"
    found = [json.loads(line) for line in invoke(alone, "get", "/found", "--paginate").stdout.splitlines()]
    assert found == [{"total": 2}, {"total": 2, "last": True}]
    assert invoke(alone, "get", "/half", "--paginate").exit_code == 1


def test_the_token_is_for_github_alone(alone: Runner, origin: Origin, elsewhere: Origin) -> None:
    invoke(alone, "get", f"{elsewhere.url}/x")
    origin.resources["/away"] = Resource(b"", status=302, fields={"Location": f"{elsewhere.url}/x?moved"})
    elsewhere.resources["/x?moved"] = Resource(b"moved")
    assert invoke(alone, "get", "/away").stdout == "moved"
    assert calls_for(origin, "/away") == [(f"Bearer {TOKEN}", 302)]
    assert [call.token for call in elsewhere.calls] == ["", ""]


def test_the_token_does_not_follow_to_pages_that_are_elsewhere(
    alone: Runner, origin: Origin, elsewhere: Origin
) -> None:
    origin.resources["/spread"] = listed([8], f"<{elsewhere.url}/items?page=2>")
    invoke(alone, "get", "/spread", "--paginate")
    assert [call.token for call in elsewhere.calls if call.token] == []


def test_an_answer_that_is_an_error_is_printed_and_the_status_is_1(alone: Runner, origin: Origin) -> None:
    done = alone.run("get", "/not-there")
    assert (done.returncode, json.loads(done.stdout)) == (1, {"message": "Not Found"})
    origin.forbid(f"Bearer {TOKEN}", "/repos/octo-org/repo-10")
    assert invoke(alone, "get", "/repos/octo-org/repo-10").exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["http://[sesame"],
        ["http://a.test:sesame/"],
        ["http://"],
        ["sesame"],
        ["ftp://a.test/"],
        ["/cold", "-H", "sesame"],
        ["/cold", "-H", ": sesame"],
        ["/cold", "-H", "X-Na me: sesame"],
        ["/cold", "-H", "X-Name: ses\name"],
        ["/cold", "-H", "X-Name: s\N{LATIN SMALL LETTER E WITH ACUTE}same"],
        ["/words", "--timeout", "0"],
    ],
)
def test_what_cannot_be_asked_for_is_said_and_the_status_is_2(
    arguments: list[str], origin: Origin, tmp_path: Path
) -> None:
    done = invoke(Runner(tmp_path, tmp_path, CACHE_GITHUB_HOSTS=origin.netloc), "get", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr


def test_an_origin_that_is_not_there_is_named_without_passwords(alone: Runner) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a port on which nobody listens
        port = closed.getsockname()[1]
        done = alone.run("get", f"http://somebody:sesame@127.0.0.1:{port}/there?q=sesame#sesame")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"127.0.0.1:{port}/there: ConnectError" in done.stderr
    assert "sesame" not in done.stderr


# What has odd names, and what is broken


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A runner that has asked a host whose name is markup to others."""
    return having_asked(tmp_path_factory.mktemp("odd"), "GET [fd00::1]:8080/repos")


def test_names_are_shown_as_they_are_in_a_pipe_and_on_a_terminal(odd: Runner) -> None:
    assert "GET [fd00::1]:8080/repos" in odd.p2pcache("stats")
    assert "GET [fd00::1]:8080/repos" in on_a_terminal(odd, "stats")[1]


def test_whoever_stops_reading_what_is_watched_ends_it_quietly(odd: Runner) -> None:
    command = [sys.executable, "-m", "httpx_p2pcache.cli", "stats", "--watch"]
    watching = subprocess.Popen(command, env=odd.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    assert watching.stderr is not None
    try:
        assert json.loads(watching.stdout.readline())["requests"] == 1
        watching.stdout.close()
        assert watching.wait(60) == 0
        assert watching.stderr.read() == ""
    finally:
        watching.kill()
        watching.wait()
        watching.stderr.close()


def test_a_store_that_cannot_be_cleared_is_said_and_the_status_is_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert invoke(Runner(tmp_path / "file", tmp_path / "peers"), "clear").exit_code == 2


def test_statistics_that_cannot_be_cleared_are_said_and_the_status_is_2(tmp_path: Path) -> None:
    runner = Runner(tmp_path, tmp_path / "peers")
    (tmp_path / "stats-v1.db").write_bytes(b"no database " * 1000)
    assert json.loads(invoke(runner, "stats", "--json").stdout)["total"]["requests"] == 0
    assert invoke(runner, "clear", "--stats").exit_code == 2


def test_processes_go_on_while_the_store_is_cleared(tmp_path: Path, origin: Origin) -> None:
    code = """
import sys, httpx
from httpx_p2pcache import P2PCacheTransport
with httpx.Client(transport=P2PCacheTransport()) as client:
    for line in sys.stdin:
        print(client.get(line.strip()).extensions["caching"]["source"], flush=True)
"""
    runner = Runner(tmp_path / "store", tmp_path / "peers", CACHE_ENABLE_P2P="false")
    process = runner.start(code, stderr=subprocess.DEVNULL)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        sources = []
        for number in range(4):
            if number == 2:
                assert json.loads(runner.p2pcache("clear", "--json")) == {"removed": 1}
            process.stdin.write(f"{origin.url}/repos/octo-org/repo-11\n")
            process.stdin.flush()
            sources.append(process.stdout.readline().strip())
        assert sources == ["origin", "local", "origin", "local"]
    finally:
        process.kill()
        process.communicate()


def test_verify_names_the_variables_that_are_to_be_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    runner = Runner(tmp_path / "file", tmp_path / "registry")
    del runner.environment["CACHE_SHARED_SECRET"]
    done = runner.run("verify")
    failed = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in failed] == ["✗ secret", "✗ store"]
    assert "set CACHE_SHARED_SECRET" in failed[0]
    assert "set CACHE_DIR" in failed[1]
    assert "✓ registry" in done.stdout


def test_verify_says_that_sharing_is_off_whatever_turned_it_off(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "store", tmp_path / "registry", CACHE_NODE="none", CACHE_PREVIOUS_SECRET="short")
    done = runner.run("verify")
    assert done.returncode == 1
    assert "✗ sharing: is off" in done.stdout
    assert "✗ previous secret: can be guessed" in done.stdout


def test_a_port_that_is_taken_is_named_and_no_daemon_stays(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "store", tmp_path / "registry")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = runner.run("node", "--port", port)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert "the daemon cannot run" in done.stderr
        assert runner.run("init").returncode == 0
        try:
            done = runner.run("init", "--port", port)
            assert done.returncode == 2
            assert "the port cannot be opened" in done.stderr
        finally:
            runner.run("stop")


def test_verify_says_what_is_wrong_where_only_ascii_can_be_printed(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "store", tmp_path / "registry", CACHE_LISTEN_PORT="x", PYTHONIOENCODING="ascii")
    done = runner.run("verify")
    assert done.returncode == 1
    assert "CACHE_LISTEN_PORT must be a port number" in done.stdout
    assert "Traceback" not in done.stderr


def test_replay_of_what_is_no_recording_names_it(tmp_path: Path, runner: Runner) -> None:
    (tmp_path / "false.har").write_bytes(b"\xff\x00")
    for name in ("false.har", "none.har"):
        done = invoke(runner, "replay", str(tmp_path / name))
        assert (done.exit_code, done.stdout) == (2, "")
        assert name in "".join(done.stderr.replace("│", "").split())

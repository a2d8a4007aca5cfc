"""What somebody meets who has just installed this: commands that say what is wrong, settings, files, and a storage."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hishel.httpx
import httpx
import pytest
from daemons import TOKEN, Runner, having_asked
from scripted import Answer, Scripted
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings, SettingsError
from httpx_p2pcache.exceptions import ConfigurationError
from httpx_p2pcache.storage import AsyncP2PStorage, P2PStorage
from httpx_p2pcache.testing import Origin

p2p = pytest.mark.p2p
TARGET = "/repos/octo-org/repo-1"
ANOTHER = "fedcba9876543210" * 4
PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
FRAMED = set("│┃━─┏┓╭╮╰╯")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def holding_something(directory: Path, permissions: int) -> Path:
    """A directory that somebody else uses as well."""
    directory.mkdir(parents=True)
    (directory / "theirs").write_text("theirs")
    directory.chmod(permissions)
    return directory


def verified(runner: Runner, about: str) -> str:
    """The line of ``p2pcache verify`` about one thing; what would come after it is not waited for. "" for none."""
    command = [sys.executable, "-m", "httpx_p2pcache.cli", "verify"]
    verifying = subprocess.Popen(command, env=runner.environment, stdout=subprocess.PIPE, text=True)
    assert verifying.stdout is not None
    try:
        for line in verifying.stdout:
            name = line[2:].partition(":")[0]
            if name == about:
                return line
            if name == "peers":  # and then the round trip, which takes long
                break
    finally:
        verifying.kill()
        verifying.communicate()
    return ""


# The storage for hishel


@pytest.fixture
def server() -> Iterator[Scripted]:
    """An origin whose answers are for everybody, by the token that is sent."""
    fields = {"Cache-Control": "public, max-age=60", "Vary": "Authorization"}
    with Scripted(lambda asked: Answer(b"to whoever asks", fields=fields)) as running:
        yield running


def storing(storage: P2PStorage) -> httpx.Client:
    following = httpx.HTTPTransport()
    return httpx.Client(transport=hishel.httpx.CacheTransport(next_transport=following, storage=storage, rfc=True))


ASKERS: list[dict[str, str]] = [
    {"Authorization": f"Bearer {TOKEN}"},
    {"Authorization": f"Bearer {TOKEN}"},
    {"Authorization": f"Bearer {TOKEN[::-1]}"},
    {},
]
CALLS = [1, 1, 2, 3]  # so many have reached the origin after each


def with_a_token(directory: Path) -> list[str]:
    """The files that a token of ASKERS can be read from."""
    tokens = TOKEN.encode(), TOKEN[::-1].encode()
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    return [path.name for path in files if any(token in path.read_bytes() for token in tokens)]


def test_a_token_is_in_no_file_of_the_storage_and_tells_its_own_answers_from_others(
    server: Scripted, local: Settings
) -> None:
    calls = []
    with storing(P2PStorage(settings=local)) as client:
        for fields in ASKERS:
            assert client.get(f"{server.url}/x", headers=fields).content == b"to whoever asks"
            calls.append(len(server.asked))
        found = with_a_token(local.dir)  # what is still in the log of the database as well
    assert calls == CALLS
    assert found + with_a_token(local.dir) == []


@pytest.mark.anyio
async def test_a_token_is_in_no_file_of_the_storage_where_it_is_used_by_a_loop(
    server: Scripted, local: Settings
) -> None:
    calls = []
    following, storage = httpx.AsyncHTTPTransport(), AsyncP2PStorage(settings=local)
    transport = hishel.httpx.AsyncCacheTransport(next_transport=following, storage=storage, rfc=True)
    async with httpx.AsyncClient(transport=transport) as client:
        for fields in ASKERS:
            assert (await client.get(f"{server.url}/x", headers=fields)).content == b"to whoever asks"
            calls.append(len(server.asked))
        found = with_a_token(local.dir)
    assert calls == CALLS
    assert found + with_a_token(local.dir) == []


def test_the_files_of_the_storage_are_private_in_a_directory_that_is_not(server: Scripted, local: Settings) -> None:
    holding_something(local.dir, 0o755)
    with storing(P2PStorage(settings=local)) as client:
        client.get(f"{server.url}/x")
        files = list(local.dir.glob("hishel*"))
        assert len(files) > 1  # its log as well
        assert {path.name: mode(path) for path in files} == {path.name: 0o600 for path in files}


def test_clear_removes_what_the_storage_holds(server: Scripted, tmp_path: Path) -> None:
    runner = Runner(tmp_path / "store", tmp_path / "registry", CACHE_ENABLE_P2P="false")
    for number in (1, 2):
        with storing(P2PStorage(settings=Settings.from_env(runner.environment))) as client:
            client.get(f"{server.url}/x")
        assert len(server.asked) == number
        assert json.loads(runner.p2pcache("clear", "--json")) == {"removed": 1}


def test_a_storage_that_would_not_seal_what_is_to_be_sealed_is_refused(
    settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(enable_p2p=False)
    monkeypatch.setenv("CACHE_DIR", str(settings.dir))
    monkeypatch.setenv("CACHE_SHARED_SECRET", settings.shared_secret)
    monkeypatch.setenv("CACHE_ENABLE_P2P", "false")
    monkeypatch.setenv("CACHE_ENCRYPT_AT_REST", "true")
    with pytest.raises(ConfigurationError, match="CACHE_ENCRYPT_AT_REST"):
        P2PStorage().close()
    with pytest.raises(ConfigurationError, match="CACHE_ENCRYPT_AT_REST"):
        AsyncP2PStorage()


# Files


def test_a_directory_that_others_use_keeps_its_mode_and_an_empty_one_becomes_private(
    tmp_path: Path, origin: Origin, settings_for: Callable[..., Settings]
) -> None:
    directories = {
        permissions: holding_something(tmp_path / f"{permissions:o}", permissions) for permissions in (0o755, 0o1777)
    }
    directories[0o700] = tmp_path / "empty"
    directories[0o700].mkdir()
    directories[0o700].chmod(0o755)
    for directory in directories.values():
        settings = settings_for(dir=directory, enable_p2p=False)
        with httpx.Client(transport=P2PCacheTransport(settings=settings)) as client:
            assert client.get(f"{origin.url}{TARGET}").status_code == 200
        assert (directory / "p2pcache-v1.db").exists()
    assert {mode(directory): directory for directory in directories.values()} == directories


# The daemon, and what is said of it


@p2p
def test_a_daemon_that_runs_for_another_secret_is_said_to_by_init_and_verify(tmp_path: Path) -> None:
    pytest.importorskip("libp2p")
    ours = Runner(tmp_path / "store", tmp_path / "registry")
    theirs = Runner(tmp_path / "store", tmp_path / "registry", CACHE_SHARED_SECRET=ANOTHER)
    ours.p2pcache("init", "--wait", "0")
    try:
        for other in (theirs, Runner(tmp_path / "store", tmp_path / "registry", CACHE_FLEET="another")):
            done = other.run("init")
            assert (done.returncode, done.stdout) == (2, "")
            assert "another secret or fleet" in done.stderr
            said = verified(other, "daemon")
            assert said.startswith("✗")
            assert "another secret or fleet" in said
        assert ours.run("init", "--wait", "0").returncode == 0
    finally:
        ours.stop()


@p2p
@pytest.mark.parametrize(
    ("secret", "why"), [(None, "CACHE_SHARED_SECRET"), ("sesame" * 4, "can be guessed")], ids=["none", "guessable"]
)
def test_init_says_why_nothing_is_shared(tmp_path: Path, secret: str | None, why: str) -> None:
    pytest.importorskip("libp2p")
    runner = Runner(tmp_path / "store", tmp_path / "registry")
    del runner.environment["CACHE_SHARED_SECRET"]
    if secret is not None:
        runner.environment["CACHE_SHARED_SECRET"] = secret
    try:
        shown = re.search(r"^sharing: +off: (.+)$", runner.p2pcache("init"), re.MULTILINE)
        assert shown is not None
        assert why in shown[1]
        assert why in json.loads(runner.p2pcache("status", "--json"))["off_because"]
    finally:
        runner.stop()


@p2p
def test_a_directory_with_letters_that_are_not_ascii_is_used_where_only_ascii_can_be_printed(tmp_path: Path) -> None:
    pytest.importorskip("libp2p")
    runner = Runner(tmp_path / "Größe-店", tmp_path / "registry", PYTHONIOENCODING="ascii")
    try:
        for command in (["init", "--wait", "0"], ["status"], ["clear"]):
            done = runner.run(*command)
            assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    finally:
        runner.stop()


# An address that is none of this machine's


@p2p
def test_verify_tells_an_address_that_is_not_here_from_a_port_that_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("libp2p")
    away = Runner(tmp_path / "store", tmp_path / "registry", CACHE_LISTEN_HOST="8.8.8.8")
    said = verified(away, "port")
    assert said.startswith("✗")
    assert "CACHE_LISTEN_HOST" in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        here = Runner(tmp_path / "store", tmp_path / "registry", CACHE_LISTEN_PORT=port)
        assert verified(here, "port").startswith(f"- port: {port} is taken")


@p2p
def test_a_node_that_cannot_listen_says_so_and_does_not_pass_for_one_that_shares(
    settings_for: Callable[..., Settings], origin: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("libp2p")
    transport = P2PCacheTransport(settings=settings_for(listen_host="8.8.8.8"))
    with httpx.Client(transport=transport) as client:
        assert client.get(f"{origin.url}{TARGET}").status_code == 200
        assert eventually(lambda: not transport.stats()["p2p_enabled"])
        assert "CACHE_LISTEN_HOST" in str(transport.stats().get("off_because", "CACHE_LISTEN_HOST"))
    assert [record for record in caplog.records if "CACHE_LISTEN_HOST" in record.getMessage()]


@pytest.mark.parametrize(
    ("secret", "address"),
    [("sesame" * 4, "127.0.0.1"), (ANOTHER, "0.0.0.0"), (ANOTHER, "fe80::1%eth0")],
    ids=["guessable", "everywhere", "scoped"],
)
def test_what_leads_nobody_to_a_node_is_not_registered(tmp_path: Path, secret: str, address: str) -> None:
    runner = Runner(tmp_path / "store", tmp_path / "registry", CACHE_SHARED_SECRET=secret)
    done = runner.run("register", PEER, "9100", address)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("p2pcache: ")
    assert not list((tmp_path / "registry").rglob("*.*"))


# Settings


def accepted(field: str, text: str) -> bool:
    """Whether a variable may have a value, which otherwise is said of it."""
    name = f"CACHE_{field.upper()}"
    try:
        Settings.from_env({name: text})
    except SettingsError as exc:
        said = str(exc)
        assert said.startswith(f"{name} must be ")
        assert repr(text) in said
        return False
    return True


def test_a_host_is_a_host_and_nothing_beside() -> None:
    false = ["https://ghe.example/api/v3", "a b", "x:99999", "user@ghe.example", "http://"]
    assert [text for text in false if accepted("github_hosts", text)] == []
    right = ["ghe.example", "http://ghe.example:8080", "https://ghe.example/", "[::1]:8080"]
    assert [text for text in right if accepted("github_hosts", text)] == right


def test_the_port_that_a_scheme_has_anyway_is_not_part_of_a_host() -> None:
    assert Settings(github_hosts=("ghe.example:443",)).origins() == {"ghe.example": "https"}
    assert Settings(github_hosts=("http://ghe.example:80",)).origins() == {"ghe.example": "http"}


def test_text_in_code_is_read_as_the_environment_is() -> None:
    settings = Settings.from_env({}, max_size="1GiB", github_hosts="a.example,b.example")
    assert (settings.max_size, settings.github_hosts) == (1024**3, ("a.example", "b.example"))


def test_an_address_to_be_announced_is_a_multiaddr() -> None:
    assert not accepted("announce_addrs", "foo")
    assert accepted("announce_addrs", "/ip4/192.0.2.1/tcp/9100,/dns4/hub.example/tcp/9100")


# What commands print


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A runner without a daemon that has asked once."""
    return having_asked(tmp_path_factory.mktemp("alone"), "GET api.github.com/repos")


@pytest.mark.parametrize("arguments", [["stats", "--since", "1e400"], ["summary", "--since", "1e300"]])
def test_minutes_without_end_are_all_there_are(alone: Runner, arguments: list[str]) -> None:
    done = alone.run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1" in done.stdout


def test_in_a_pipe_help_and_complaints_are_plain_text(tmp_path: Path) -> None:
    for changes in ({}, {"GITHUB_ACTIONS": "true"}):  # where colours are forced upon commands
        runner = Runner(tmp_path / "store", tmp_path / "registry", **changes)
        for arguments, status in ((["--help"], 0), (["get", "--help"], 0), (["get", "--sesame"], 2)):
            done = runner.run(*arguments)
            assert done.returncode == status
            assert "\x1b" not in done.stdout + done.stderr
            assert not set(done.stdout + done.stderr) & FRAMED


def test_fields_are_printed_as_they_are_of_the_body_that_is_printed(alone: Runner, origin: Origin) -> None:
    head, _, body = alone.p2pcache("get", "-i", f"{origin.url}{TARGET}").partition("\n\n")
    assert body.encode() == origin.resources[TARGET].body
    names = [line.partition(":")[0].lower() for line in head.splitlines()[1:]]
    assert "content-type" in names
    assert not {"content-encoding", "content-length", "transfer-encoding"} & set(names)


def test_a_store_that_cannot_be_used_is_said_where_a_url_is_got(tmp_path: Path, origin: Origin) -> None:
    (tmp_path / "file").touch()
    for directory in (Path("/proc/x"), tmp_path / "file" / "store"):
        done = Runner(directory, tmp_path / "registry").run("get", f"{origin.url}{TARGET}")
        assert (done.returncode, done.stdout.encode()) == (0, origin.resources[TARGET].body)
        assert f"CACHE_DIR {directory} cannot be used" in done.stderr


# What is counted


def test_a_call_that_reaches_nobody_is_not_counted(local: Settings) -> None:
    transport = P2PCacheTransport(settings=local)
    with httpx.Client(transport=transport) as client, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a port on which nobody listens
        with pytest.raises(httpx.ConnectError):
            client.get(f"http://127.0.0.1:{closed.getsockname()[1]}/x")
        assert transport.stats()["origin_calls"] == 0


def test_a_command_runs_without_standard_output(tmp_path: Path) -> None:
    command = f"{sys.executable} -m httpx_p2pcache.cli stop >&-"
    environment = os.environ | {"CACHE_DIR": str(tmp_path)}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

"""The ways of finding each other, each alone: artifacts, multicast DNS, the DHT of a js-libp2p node, names, script."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Answer, Asked, Scripted
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings

pytest.importorskip("libp2p")

import base58
import dns.message
import dns.resolver
import dns.rrset

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.node.discovery import dht, static
from httpx_p2pcache.node.discovery.artifacts import Artifacts, artifact_name
from httpx_p2pcache.node.discovery.mdns import LocalNetwork

pytestmark = pytest.mark.p2p

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / ".github" / "scripts" / "p2p_peer_bootstrap.sh"
REPOSITORY = {"GITHUB_REPOSITORY": "octo-org/repo", "GITHUB_RUN_ID": "42", "GITHUB_TOKEN": "ghs_of_the_job"}
Start = Callable[..., P2PCacheTransport]


@pytest.fixture
def start(settings_for: Callable[..., Settings], tmp_path: Path) -> Iterator[Start]:
    """Nodes that have no registry in common."""
    with contextlib.ExitStack() as stack:

        def begin(name: str, **changes: Any) -> P2PCacheTransport:
            settings = settings_for(name, peer_registry=tmp_path / f"registry-of-{name}", **changes)
            transport = P2PCacheTransport(settings=settings)
            stack.callback(transport.close)
            return transport

        yield begin


def met(*transports: P2PCacheTransport, how: str, seconds: float = 15.0) -> None:
    assert eventually(lambda: all(one.stats()["connected_peers"] for one in transports), seconds)
    assert how in {peer["how"] for one in transports for peer in one.stats()["peers"]}  # type: ignore[attr-defined]


# GitHub's artifacts


def listing(names: list[str], etag: str = '"one"') -> Callable[[Asked], Answer]:
    body = {"total_count": len(names), "artifacts": [{"id": n, "name": name} for n, name in enumerate(names)]}

    def answer(asked: Asked) -> Answer:
        if asked.fields.get("if-none-match") == etag:
            return Answer(b"", 304)
        return Answer(json.dumps(body).encode(), fields={"ETag": etag})

    return answer


@pytest.mark.parametrize(
    ("scope", "path"),
    [
        ("run", "/repos/octo-org/repo/actions/runs/42/artifacts?per_page=100"),
        ("repository", "/repos/octo-org/repo/actions/artifacts?per_page=100"),
    ],
)
@pytest.mark.usefixtures("no_multicast")
def test_runners_of_a_run_or_a_repository_find_each_other_by_the_names_of_artifacts(
    start: Start, monkeypatch: pytest.MonkeyPatch, settings_for: Callable[..., Settings], scope: str, path: str
) -> None:
    first = start("a", artifacts="none")
    assert first.wait_until_joined(30)
    status = first.stats()
    keyring = Keyring.of(settings_for(), settings_for().shared_secret.encode())
    name = artifact_name(keyring, base58.b58decode(str(status["peer_id"])), status["addresses"])  # type: ignore[arg-type]
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert len(name) < 250
    assert str(status["peer_id"]) not in name
    with Scripted(listing(["logs", "p2pcache-0123456789abcdef-other", f"{name[:30]}AAAA", name])) as api:
        for variable, value in {**REPOSITORY, "GITHUB_API_URL": api.url}.items():
            monkeypatch.setenv(variable, value)
        second = start("b", artifacts=scope)
        met(first, second, how="artifact")
    assert api.asked[0].target == path
    assert api.asked[0].fields["authorization"] == "Bearer ghs_of_the_job"


def test_the_list_of_artifacts_is_asked_for_under_its_tag_and_old_ones_do_not_count(
    settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for()
    keyring = Keyring.of(settings, settings.shared_secret.encode())
    fresh = artifact_name(keyring, hashlib.sha256(b"fresh").digest(), ["/ip4/10.0.0.1/tcp/9100"])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - settings.peer_ttl - 10)
    old = artifact_name(keyring, hashlib.sha256(b"old").digest(), ["/ip4/10.0.0.2/tcp/9100"])
    monkeypatch.setattr(time, "time", lambda: now)
    with Scripted(listing([fresh, old])) as api:
        found = Artifacts.of(settings, keyring, {**REPOSITORY, "GITHUB_API_URL": api.url})
        assert found is not None
        for _ in range(3):
            assert [one.addresses for one in found.find()] == [("/ip4/10.0.0.1/tcp/9100",)]
        assert [asked.fields.get("if-none-match") for asked in api.asked] == [None, '"one"', '"one"']


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_list_that_is_refused_is_said_with_the_permission_and_left_alone_for_a_while(
    settings_for: Callable[..., Settings], status: int
) -> None:
    settings = settings_for()
    keyring = Keyring.of(settings, settings.shared_secret.encode())
    with Scripted(lambda _: Answer(b'{"message": "no"}', status)) as api:
        found = Artifacts.of(settings, keyring, {**REPOSITORY, "GITHUB_API_URL": api.url})
        assert found is not None
        with pytest.raises(OSError, match=str(status)) as failure:
            found.find()
        assert ("actions: read" in str(failure.value)) == (status != 401)
        assert "ghs_of_the_job" not in str(failure.value)
        assert found.find() == []
        assert len(api.asked) == 1


@pytest.mark.parametrize("missing", ["GITHUB_REPOSITORY", "GITHUB_RUN_ID", "GITHUB_TOKEN"])
def test_without_a_run_of_a_workflow_nobody_is_asked(settings_for: Callable[..., Settings], missing: str) -> None:
    settings = settings_for()
    keyring = Keyring.of(settings, settings.shared_secret.encode())
    environ = {name: value for name, value in REPOSITORY.items() if name != missing}
    assert Artifacts.of(settings, keyring, environ) is None


# The local network


@pytest.fixture
def multicast() -> None:
    import zeroconf

    try:
        zeroconf.Zeroconf(interfaces=["127.0.0.1"]).close()
    except OSError as exc:
        pytest.skip(f"no multicast on this machine: {exc}")


@pytest.mark.usefixtures("multicast")
def test_nodes_in_one_local_network_find_each_other(start: Start) -> None:
    met(start("a"), start("b"), how="mdns")


@pytest.mark.usefixtures("multicast")
def test_an_announcement_that_is_withdrawn_while_it_is_made_leaves_nothing() -> None:
    """A node that ends at once does not wait for it: the thread comes to its end after the node."""
    before = set(threading.enumerate())
    network = LocalNetwork(Keyring(b"a secret of sixteen bytes", "default"), "127.0.0.1")
    network.withdraw()
    network.announce(b"peer", ["/ip4/127.0.0.1/tcp/9000"])
    assert eventually(lambda: not set(threading.enumerate()) - before)


# The DHT


@pytest.fixture(scope="module")
def js(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """A js-libp2p node; called with ``do`` and ``addr`` it does that, without it gives its address."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("Node.js is not installed")
    directory = tmp_path_factory.mktemp("interop")
    for name in ("package.json", "bootstrap.mjs"):
        shutil.copy(HERE.parent / "interop" / name, directory)
    done = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--loglevel=error"], cwd=directory, capture_output=True, timeout=100
    )
    if done.returncode != 0:
        pytest.skip(f"npm could not install js-libp2p: {done.stderr.decode()[-300:]}")
    process = subprocess.Popen(
        [node, "bootstrap.mjs"], cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    address = json.loads(process.stdout.readline())

    def ask(**asked: str) -> dict[str, Any]:
        if not asked:
            return dict(address)
        process.stdin.write(json.dumps(asked) + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return dict(json.loads(process.stdout.readline()))  # type: ignore[union-attr]

    yield ask
    process.kill()
    process.stdin.close()
    process.stdout.close()
    process.wait(10)


@pytest.mark.usefixtures("no_multicast")
def test_nodes_that_know_one_dht_server_find_each_other_and_nobody_else_does(
    start: Start, js: Callable[..., dict[str, Any]]
) -> None:
    server = js()["addr"]
    began = time.monotonic()
    nodes = [start(name, bootstrap_peers=(server,)) for name in "ab"]
    stranger = start("c", bootstrap_peers=(server,), shared_secret="another fleet's secret, of thirty-two bytes")
    met(*nodes, how="dht")
    assert time.monotonic() - began < 15
    assert stranger.stats()["connected_peers"] == 0


@pytest.mark.usefixtures("no_multicast")
def test_a_js_node_pings_and_identifies_ours(start: Start, js: Callable[..., dict[str, Any]]) -> None:
    ours = start("a")
    assert ours.wait_until_joined(30)
    status = ours.stats()
    address = f"{status['addresses'][0]}/p2p/{status['peer_id']}"  # type: ignore[index]
    assert js(do="ping", addr=address)["rtt"] >= 0
    told = js(do="identify", addr=address)
    assert "/httpx-p2pcache/1" in told["protocols"]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.usefixtures("no_multicast")
def test_who_is_alone_asks_the_standard_bootstrap_nodes_unless_that_is_forbidden(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, allowed: bool
) -> None:
    asked: list[str] = []

    def resolve(address: str, peer_id: str) -> list[str]:
        asked.append(f"{address}/p2p/{peer_id}")
        return []

    monkeypatch.setattr(static, "resolve", resolve)  # nobody outside is asked by a test
    monkeypatch.setattr(dht, "LONELY_SECONDS", 0.1)
    caplog.set_level(logging.INFO, "httpx_p2pcache")
    alone = start("a", public_bootstrap=allowed)
    assert alone.wait_until_joined(30)
    said = lambda: [r for r in caplog.records if r.getMessage() == "Using standard libp2p bootstrap node(s)"]  # noqa: E731
    if allowed:
        assert eventually(lambda: len(asked) >= 4)
        assert asked[0] == "/dnsaddr/bootstrap.libp2p.io/p2p/QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN"
        assert len(said()) == 1
    else:
        assert not eventually(lambda: asked or said(), 2.0)


# Names


class Dns:
    """Answers TXT questions from ``records``; None: never."""

    def __init__(self, records: dict[str, list[str]] | None) -> None:
        self._records = records
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="dns", daemon=True)

    def __enter__(self) -> Dns:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.sendto(b"end", ("127.0.0.1", self.port))
        self._thread.join(5)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            data, client = self._socket.recvfrom(4096)
            if data == b"end":
                return
            if self._records is None:
                continue
            query = dns.message.from_wire(data)
            answer = dns.message.make_response(query)
            name = query.question[0].name
            texts = self._records.get(str(name).rstrip("."), [])
            if texts:
                answer.answer.append(dns.rrset.from_text(name, 60, "IN", "TXT", *(f'"{text}"' for text in texts)))
            self._socket.sendto(answer.to_wire(), client)


@pytest.fixture
def ask_dns(monkeypatch: pytest.MonkeyPatch) -> Callable[[Dns], None]:
    def use(server: Dns) -> None:
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers, resolver.port = ["127.0.0.1"], server.port
        monkeypatch.setattr(dns.resolver, "default_resolver", resolver)

    return use


A, B = (f"12D3KooW{letter * 44}" for letter in "AB")


def test_dnsaddr_leads_to_the_tcp_addresses_of_that_peer(ask_dns: Callable[[Dns], None]) -> None:
    records = {
        "_dnsaddr.fleet.test": [
            f"dnsaddr=/ip4/10.0.0.1/tcp/9100/p2p/{A}",
            f"dnsaddr=/ip4/10.0.0.1/udp/9100/quic-v1/p2p/{A}",
            f"dnsaddr=/ip4/10.0.0.1/tcp/443/ws/p2p/{A}",
            f"dnsaddr=/ip4/10.0.0.2/tcp/9100/p2p/{B}",
            f"dnsaddr=/dnsaddr/deeper.test/p2p/{A}",
            "v=spf1 -all",
        ],
        "_dnsaddr.deeper.test": [
            f"dnsaddr=/ip6/fd00::1/tcp/9100/p2p/{A}",
            f"dnsaddr=/dnsaddr/fleet.test/p2p/{A}",  # in a circle
        ],
    }
    with Dns(records) as server:
        ask_dns(server)
        assert static.resolve("/dnsaddr/fleet.test", A) == ["/ip4/10.0.0.1/tcp/9100", "/ip6/fd00::1/tcp/9100"]
        assert static.resolve("/dnsaddr/nobody.test", A) == []


def test_a_name_server_that_says_nothing_is_not_waited_for_for_long(ask_dns: Callable[[Dns], None]) -> None:
    with Dns(None) as server:
        ask_dns(server)
        began = time.monotonic()
        assert static.resolve("/dnsaddr/fleet.test", A) == []
        assert time.monotonic() - began < static.DNS_SECONDS + 2


@pytest.mark.usefixtures("no_multicast")
def test_a_bootstrap_address_may_be_a_name(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    first = start("a")
    assert first.wait_until_joined(30)
    port = str(first.stats()["addresses"][0]).rpartition("/")[2]  # type: ignore[index]
    second = start("b", bootstrap_peers=("/dns4/does.not.exist.invalid/tcp/9100", f"/dns4/localhost/tcp/{port}"))
    met(first, second, how="bootstrap")
    said = [record.getMessage() for record in caplog.records if "nothing is known of" in record.getMessage()]
    assert said == [
        "CACHE_BOOTSTRAP_PEERS: nothing is known of /dns4/does.not.exist.invalid/tcp/9100; it is asked for again"
    ]


# The script of before


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHON": sys.executable, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    found = {
        "CACHE_DIR": str(tmp_path / "cache"),
        "CACHE_PEER_REGISTRY": str(tmp_path / "peers"),
        "CACHE_SHARED_SECRET": hashlib.sha256(b"of the script's fleet").hexdigest(),
        "CACHE_PUBLIC_BOOTSTRAP": "false",
        "CACHE_LISTEN_HOST": "127.0.0.1",
        "CACHE_LISTEN_PORT": "0",
    }
    yield found
    subprocess.run(
        [sys.executable, "-m", "httpx_p2pcache.cli", "stop"],
        env={**os.environ, **found},
        capture_output=True,
        timeout=30,
    )


def test_the_script_starts_a_node_and_tells_later_steps_of_it(tmp_path: Path, environ: dict[str, str]) -> None:
    other = run("register", B, "9005", "10.1.2.3", **environ)
    assert (other.returncode, other.stdout) == (0, f"/ip4/10.1.2.3/tcp/9005/p2p/{B}\n")
    env, output = tmp_path / "env", tmp_path / "output"
    env.write_text("BEFORE=1\n")
    done = run("init", **environ, GITHUB_ENV=str(env), GITHUB_OUTPUT=str(output))
    assert done.returncode == 0, done.stderr
    told = dict(line.split("=", 1) for line in output.read_text().splitlines())
    exported = dict(line.split("=", 1) for line in env.read_text().splitlines())
    assert told["peer_multiaddr"] == f"/ip4/127.0.0.1/tcp/{exported['CACHE_LISTEN_PORT']}/p2p/{told['peer_id']}"
    assert told["bootstrap_peers"] == exported["CACHE_BOOTSTRAP_PEERS"] == f"/ip4/10.1.2.3/tcp/9005/p2p/{B}"
    assert (exported["CACHE_ENABLE_P2P"], exported["BEFORE"]) == ("true", "1")
    assert environ["CACHE_SHARED_SECRET"] not in env.read_text() + output.read_text() + done.stdout + done.stderr
    listed = run("discover", "1", **environ)
    assert listed.returncode == 0
    assert listed.stdout.splitlines() == [f"/ip4/10.1.2.3/tcp/9005/p2p/{B}"]


def test_the_script_prints_what_it_would_export_outside_of_actions(environ: dict[str, str]) -> None:
    done = run("init", **environ)
    assert done.returncode == 0, done.stderr
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert told.keys() == {"CACHE_ENABLE_P2P", "CACHE_LISTEN_PORT", "peer_id", "peer_multiaddr", "bootstrap_peers"}
    assert told["bootstrap_peers"] == ""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("help",), 0),
        (("--help",), 0),
        ((), 2),
        (("bogus",), 2),
        (("discover", "none"), 2),
        (("discover", "0"), 2),
        (("discover",), 0),  # nobody is there yet
        (("register", "x"), 2),
        (("register", "no-peer-id", "9000", "10.0.0.1"), 2),
        (("register", A, "9000", "no-address"), 2),
        (("register", A, "0", "10.0.0.1"), 2),
    ],
)
def test_the_scripts_exit_status_says_how_it_went(
    environ: dict[str, str], arguments: tuple[str, ...], status: int
) -> None:
    done = run(*arguments, **environ)
    assert done.returncode == status, done.stderr
    assert ("Usage:" in done.stdout + done.stderr) == (arguments in ((), ("help",), ("--help",), ("bogus",))) or status


def test_the_script_says_what_is_missing(environ: dict[str, str]) -> None:
    done = run("init", **{**environ, "PYTHON": "/usr/bin/false"})
    assert done.returncode == 1
    assert "pip install 'httpx-p2pcache[p2p,cli]'" in done.stderr


# A machine that is busy


class _Held:
    """A way to a port on which nothing comes through before ``go`` is set."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.go = threading.Event()
        self.began: list[float] = []
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self.began.append(time.monotonic())
                self._open += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        self.go.wait(30)
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.mark.usefixtures("no_multicast")
def test_a_handshake_of_two_seconds_makes_a_member(start: Start) -> None:
    """Where a whole fleet starts on one machine, or every runner on a slow one, that is what it takes."""
    first = start("a")
    assert first.wait_until_joined(30)
    status: Any = first.stats()
    with _Held(int(status["addresses"][0].rpartition("/")[2])) as way:
        second = start("b", bootstrap_peers=(f"/ip4/127.0.0.1/tcp/{way.port}/p2p/{status['peer_id']}",))
        assert eventually(lambda: way.began)
        assert eventually(lambda: time.monotonic() > way.began[0] + 2.0)
        assert second.stats()["connected_peers"] == 0
        way.go.set()
        met(first, second, how="bootstrap")
        assert len(way.began) == 1
        second.close()

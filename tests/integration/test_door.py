"""The caching door: what curl, gh, and clients that take a base URL meet there."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
from daemons import TOKEN, Runner
from waiting import eventually

from httpx_p2pcache.testing import Origin, Resource, made_up

pytest.importorskip("libp2p")
prometheus = pytest.importorskip("prometheus_client.parser")

pytestmark = pytest.mark.p2p
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
needs_gh = pytest.mark.skipif(shutil.which("gh") is None, reason="gh is not installed")
LARGE = bytes(range(256)) * 4 * 1024 * 20  # 20 MiB: more than is stored
AS_ME = {"Authorization": f"Bearer {TOKEN}"}
FIVE_MB = bytes(range(250)) * 20_000


@dataclass
class Asked:
    """A request as it came to the origin; ``body`` grows while it is sent."""

    method: bytes
    target: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytearray = field(default_factory=bytearray)
    whole: bool = False
    cut: bool = False  # the connection ended before it was whole


class Wire:
    """An origin that answers byte for byte what a test says, one request per connection.

    ``answers`` holds by path what is sent, or a function that is handed the connection.
    """

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.answers: dict[bytes, bytes | Callable[[socket.socket], object]] = {}
        self.ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.netloc = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="wire", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.ended.set()
        for listening in (self._listener, *list(self._open)):
            try:
                listening.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._thread.join(5)
        self._listener.close()

    def of(self, path: bytes) -> list[Asked]:
        return [asked for asked in self.asked if asked.target.partition(b"?")[0] == path]

    def _accept(self) -> None:
        while not self.ended.is_set():
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self._open.add(connection)
        try:
            with connection:
                connection.settimeout(20)
                asked = self._read(connection)
                answer = self.answers.get(asked.target.partition(b"?")[0], said(b"ok", "Cache-Control: no-store"))
                if isinstance(answer, bytes):
                    connection.sendall(answer)
                else:
                    answer(connection)
        except (OSError, h11.RemoteProtocolError):
            pass  # who asked has gone
        finally:
            self._open.discard(connection)

    def _read(self, connection: socket.socket) -> Asked:
        parser = h11.Connection(h11.SERVER)
        asked = Asked(b"", b"", [])
        try:
            while not asked.whole:
                event = parser.next_event()
                if event is h11.NEED_DATA:
                    parser.receive_data(connection.recv(65536))
                elif isinstance(event, h11.Request):
                    asked = Asked(event.method, event.target, list(event.headers))
                    self.asked.append(asked)
                elif isinstance(event, h11.Data):
                    asked.body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    asked.whole = True
                else:
                    raise ConnectionError
        finally:
            asked.cut = not asked.whole
        return asked


def said(body: bytes = b"", *lines: str, status: str = "200 OK") -> bytes:
    """A whole response."""
    head = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head).encode() + body


def sent_raw(door: Path, data: bytes) -> bytes:
    """All that the door says to these bytes until it closes the connection."""
    heard = bytearray()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(door))
        connection.sendall(data)
        try:
            while part := connection.recv(65536):
                heard += part
        except ConnectionError:  # it had not read all of ours
            pass
    return bytes(heard)


def status_of(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    assert found is not None, f"no answer: {answer[:80]!r}"
    return int(found[1])


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    resources = made_up(30)
    with Origin(resources) as server:
        following = f'<{server.url}/listed?page=2>; rel="next", <https://elsewhere.test/x>; rel="related"'
        resources = {
            "/listed": Resource(b"[1]", fields={"Content-Type": "application/json", "Link": following}),
            "/listed?page=2": Resource(b"[2]"),
            "/moved": Resource(b"", status=302, fields={"Location": f"{server.url}/listed"}),
            "/large": Resource(LARGE, fields={"Content-Type": "application/octet-stream"}),
            "/a%2Fb/%C3%BC?q=%20x&r": Resource(b"exactly as sent"),
            "/api/v3/repos/octo-org/repo-0": Resource(resources["/repos/octo-org/repo-0"].body),
            "/named": Resource(b"{}", fields={"Connection": "X-Private", "X-Private": "1", "X-Public": "1"}),
        }
        server.resources.update(resources)
        yield server


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    server = Wire()
    yield server
    server.close()


@pytest.fixture(scope="module")
def runner(origin: Origin, wire: Wire, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    root = tmp_path_factory.mktemp("door")
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # a port on which nobody listens
    hosts = [origin.netloc, origin.netloc.replace("127.0.0.1", "localhost"), wire.netloc]
    hosts.append(f"127.0.0.1:{closed.getsockname()[1]}")
    runner = Runner(root / "store", root / "registry", CACHE_GITHUB_HOSTS=",".join(hosts))
    runner.environment["NO_PROXY"] += ",localhost"
    pid = 0
    try:
        pid = json.loads(runner.p2pcache("init", "--port", "0", "--json"))["pid"]
        yield runner
    finally:
        if runner.run("stop").returncode != 0 and pid:
            os.kill(pid, signal.SIGKILL)
        closed.close()


@pytest.fixture(scope="module")
def door(runner: Runner) -> Path:
    return Path(runner.status()["door"])


@pytest.fixture
def client(door: Path, origin: Origin) -> Iterator[httpx.Client]:
    """A client of the socket that asks for the origin's URLs."""
    transport = httpx.HTTPTransport(uds=str(door))
    with httpx.Client(transport=transport, base_url=origin.url, headers=AS_ME, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def base_url(runner: Runner) -> str:
    url: str = runner.status()["urls"][0]
    return url


def calls_for(origin: Origin, target: str) -> list[str]:
    return [call.method for call in origin.calls if call.target == target]


@needs_curl
def test_curl_gets_what_the_origin_says_and_the_second_time_from_the_cache(door: Path, origin: Origin) -> None:
    target = "/repos/octo-org/repo-1"
    curl = ["curl", "--silent", "--include", "--unix-socket", str(door), origin.url + target]
    first, second = (subprocess.run(curl, capture_output=True, check=True, timeout=30).stdout for _ in range(2))
    assert b"cache-status: p2pcache; fwd=miss; stored" in first.lower()
    assert b"cache-status: p2pcache; hit" in second.lower()
    assert first.endswith(origin.resources[target].body)
    assert second.endswith(origin.resources[target].body)
    assert calls_for(origin, target) == ["GET"]


@needs_curl
def test_curl_uploads_in_chunks_after_asking_whether_it_may(door: Path, wire: Wire) -> None:
    options = ["--silent", "--show-error", "--fail", "--unix-socket", str(door)]
    upload = ["--upload-file", "-", "--header", "Expect: 100-continue", f"http://{wire.netloc}/from-curl"]
    done = subprocess.run(["curl", *options, *upload], input=FIVE_MB, capture_output=True, check=True, timeout=30)
    (asked,) = wire.of(b"/from-curl")
    assert done.stdout == b"ok"
    assert (asked.method, asked.whole) == (b"PUT", True)
    assert asked.body == FIVE_MB


@needs_curl
def test_curl_keeps_its_connection_to_the_door(door: Path, origin: Origin) -> None:
    urls = [origin.url + "/repos/octo-org/repo-7"] * 3
    options = ["--silent", "--unix-socket", str(door), "--write-out", "%{num_connects} "]
    discard = ["--output", "/dev/null"] * len(urls)
    assert subprocess.run(["curl", *options, *discard, *urls], capture_output=True, timeout=30).stdout == b"1 0 0 "


@needs_curl
def test_curl_may_speak_http_2_to_the_door(door: Path, origin: Origin) -> None:
    if "HTTP2" not in subprocess.run(["curl", "--version"], capture_output=True, text=True, timeout=30).stdout.split():
        pytest.skip("this curl does not speak HTTP/2")
    target = "/repos/octo-org/repo-8"
    options = ["--silent", "--http2-prior-knowledge", "--unix-socket", str(door), "--write-out", " %{http_version}"]
    done = subprocess.run(["curl", *options, origin.url + target], capture_output=True, timeout=30)
    assert done.stdout == origin.resources[target].body + b" 2"


@needs_gh
def test_gh_twice_and_then_python_is_one_call_that_counts(
    runner: Runner, door: Path, origin: Origin, tmp_path: Path
) -> None:
    host, target = origin.netloc.replace("127.0.0.1", "localhost"), "/api/v3/repos/octo-org/repo-0"
    environment = runner.environment | {"GH_CONFIG_DIR": str(tmp_path), "GH_HOST": host, "GH_ENTERPRISE_TOKEN": TOKEN}

    def gh(*arguments: str) -> bytes:
        return subprocess.run(["gh", *arguments], env=environment, check=True, capture_output=True, timeout=30).stdout

    gh("config", "set", "http_unix_socket", str(door))
    bodies = [gh("api", "repos/octo-org/repo-0") for _ in range(2)]
    said = runner.step(f"http://{host}{target}")
    assert bodies == [origin.resources[target].body] * 2
    assert said["sha256"] == [hashlib.sha256(bodies[0]).hexdigest()]
    assert calls_for(origin, target) == ["GET"]


@needs_gh
def test_gh_reads_all_pages_and_what_it_has_written_itself(
    runner: Runner, door: Path, origin: Origin, tmp_path: Path
) -> None:
    host = origin.netloc.replace("127.0.0.1", "localhost")
    environment = runner.environment | {"GH_CONFIG_DIR": str(tmp_path), "GH_HOST": host, "GH_ENTERPRISE_TOKEN": TOKEN}
    link = f'<http://{host}/api/v3/paged?page=2>; rel="next"'
    origin.resources["/api/v3/paged?per_page=100"] = Resource(
        b"[1]", fields={"Content-Type": "application/json", "Link": link}
    )
    origin.resources["/api/v3/paged?page=2"] = Resource(b"[2]")
    origin.resources["/api/v3/patched"] = Resource(b'{"name":"old"}')

    def gh(*arguments: str) -> bytes:
        return subprocess.run(["gh", *arguments], env=environment, check=True, capture_output=True, timeout=30).stdout

    gh("config", "set", "http_unix_socket", str(door))
    assert gh("api", "--paginate", "paged") == b"[1][2]"
    assert gh("api", "patched") == b'{"name":"old"}'
    assert gh("api", "--method", "PATCH", "patched", "--raw-field", "name=new") == b'{"name":"new"}'
    assert gh("api", "patched") == b'{"name":"new"}'


def test_all_methods_reach_the_origin_with_their_bodies(client: httpx.Client, origin: Origin) -> None:
    target = "/written"
    assert client.post(target, content=b"one").status_code == 201
    assert client.get(target).content == b"one"
    assert client.put(target, content=b"two").content == b"two"
    assert client.get(target).content == b"two"
    large = b"x" * 5_000_000
    assert client.patch(target, content=large).content == large
    assert client.delete(target).status_code == 204
    assert client.get(target).status_code == 404
    assert client.head("/listed").content == b""


def test_paths_and_queries_arrive_as_they_were_sent(client: httpx.Client) -> None:
    url = httpx.URL(str(client.base_url)).copy_with(raw_path=b"/a%2Fb/%C3%BC?q=%20x&r")
    assert client.get(url).content == b"exactly as sent"


@pytest.mark.parametrize(
    "target",
    [
        "/%c3%bc%2f%2E",
        "//double//x/",
        "/a/../b/./c",
        "/q??a=b?c",
        "/s;p=1,2:@!$&'()*+=~-._",
        "/p%zz?%",
        "/[x]?a[]=1&a[]=2",
        "/{id}?q={'a':\"b\"}|<c>^`",
    ],
)
def test_a_target_is_not_rewritten(target: str, door: Path, wire: Wire) -> None:
    """RFC 9110 §7.7: "A proxy MUST NOT modify the "absolute-path" and "query" parts of the received target URI"."""
    before = len(wire.asked)
    answer = sent_raw(door, f"GET {target} HTTP/1.1\r\nHost: {wire.netloc}\r\nConnection: close\r\n\r\n".encode())
    assert [asked.target.decode() for asked in wire.asked[before:]] == [target]
    assert status_of(answer) == 200


def test_request_fields_arrive_but_for_those_of_the_connection(door: Path, wire: Wire) -> None:
    lines = [b"Host: " + wire.netloc.encode(), b"Connection: close, X-Hop", b"X-Hop: 1", b"Keep-Alive: timeout=5"]
    lines += [b"TE: trailers", b"Proxy-Authorization: Basic eA==", b"X-Twice: a", b"X-Twice: b", b"X-Byte: \xfc"]
    sent_raw(door, b"GET /fields HTTP/1.1\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n")
    (asked,) = wire.of(b"/fields")
    assert asked.fields == [
        (b"host", wire.netloc.encode()),
        (b"x-twice", b"a"),
        (b"x-twice", b"b"),
        (b"x-byte", b"\xfc"),
    ]


def test_repeated_response_fields_stay_apart_from_the_origin_and_from_the_store(
    client: httpx.Client, wire: Wire
) -> None:
    lines = ["X-Twice: a", "X-Twice: b", "Link: <https://one.test/>", "Link: <https://two.test/>"]
    wire.answers[b"/twice"] = said(b"{}", *lines, "Cache-Control: max-age=60")
    answers = [client.get(f"http://{wire.netloc}/twice") for _ in range(2)]
    for answer in answers:
        assert answer.headers.get_list("x-twice") == ["a", "b"]
        assert answer.headers.get_list("link") == ["<https://one.test/>", "<https://two.test/>"]
        assert len(answer.headers.get_list("cache-status")) == 1
    assert [answer.headers["cache-status"].partition(";")[2].split(";")[0] for answer in answers] == [
        " fwd=miss",
        " hit",
    ]


@pytest.mark.parametrize("status", ["302 Found", "403 Forbidden", "404 Not Found", "422 Unprocessable", "503 No"])
def test_what_the_origin_says_of_itself_passes_through(status: str, client: httpx.Client, wire: Wire) -> None:
    path, location = f"/status/{status[:3]}", "http://elsewhere.test/there?a=%20"
    wire.answers[path.encode()] = said(b'{"message":"its own"}', f"Location: {location}", status=status)
    answer = client.get(f"http://{wire.netloc}{path}")
    assert answer.status_code == int(status[:3])
    assert (answer.content, answer.headers["location"]) == (b'{"message":"its own"}', location)
    assert answer.headers["cache-status"].startswith("p2pcache; ")


def test_a_head_has_the_fields_of_the_get_whether_stored_or_not(client: httpx.Client, origin: Origin) -> None:
    target, plain = "/repos/octo-org/repo-9", {"Accept-Encoding": "identity"}
    size = str(len(origin.resources[target].body))
    heads = [client.head(target, headers=plain)]
    client.get(target, headers=plain)
    heads.append(client.head(target, headers=plain))
    assert [(head.status_code, head.headers["content-length"], head.content) for head in heads] == [
        (200, size, b"")
    ] * 2
    assert "; hit" in heads[1].headers["cache-status"]


def test_a_coding_is_passed_on_as_it_came_and_only_to_those_who_accept_it(client: httpx.Client, origin: Origin) -> None:
    target = "/repos/octo-org/repo-10"
    body = origin.resources[target].body
    found = []
    for accepted in ("gzip", "identity", "gzip", "identity"):
        with client.stream("GET", target, headers={"Accept-Encoding": accepted}) as answer:
            raw = b"".join(answer.iter_raw())
        coding = answer.headers.get("content-encoding", "identity")
        assert (gzip.decompress(raw) if coding == "gzip" else raw) == body
        found.append(coding)
    assert (found[0], found[1], found[3]) == ("gzip", "identity", "identity")  # who accepts gzip may have either
    assert len(calls_for(origin, target)) == 2


def test_an_upload_in_chunks_arrives_as_it_is_sent(client: httpx.Client, wire: Wire) -> None:
    begun = threading.Event()

    def parts() -> Iterator[bytes]:
        yield b"first"
        begun.set()
        assert eventually(lambda: [bytes(asked.body) for asked in wire.of(b"/chunks")] == [b"first"])
        for start in range(0, len(FIVE_MB), 100_000):
            yield FIVE_MB[start : start + 100_000]

    assert client.post(f"http://{wire.netloc}/chunks", content=parts()).content == b"ok"
    (asked,) = wire.of(b"/chunks")
    assert begun.is_set()
    assert asked.whole
    assert asked.body == b"first" + FIVE_MB


def test_a_download_arrives_as_it_is_sent(client: httpx.Client, wire: Wire) -> None:
    more = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(
            said(b"first", "Cache-Control: no-store").replace(b"Content-Length: 5", b"Content-Length: 9")
        )
        if more.wait(20):
            connection.sendall(b"last")

    wire.answers[b"/parts"] = answer
    with client.stream("GET", f"http://{wire.netloc}/parts") as response:
        parts = response.iter_raw()
        assert next(parts) == b"first"
        more.set()
        assert b"".join(parts) == b"last"


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_the_origin_cuts_short_looks_cut_short_and_is_not_stored(
    framing: str, client: httpx.Client, wire: Wire
) -> None:
    head = f"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\n{framing}\r\n\r\n"
    path = f"/cut/{framing[:7]}"
    wire.answers[path.encode()] = head.encode() + b"4\r\nhalf\r\n"
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError):
            client.get(f"http://{wire.netloc}{path}")
    assert len(wire.of(path.encode())) == 2


def test_a_body_too_large_to_store_streams_through(client: httpx.Client) -> None:
    assert hashlib.sha256(client.get("/large").content).digest() == hashlib.sha256(LARGE).digest()


def test_the_callers_own_conditions_are_answered(client: httpx.Client) -> None:
    tag = client.get("/repos/octo-org/repo-2").headers["etag"]
    answer = client.get("/repos/octo-org/repo-2", headers={"If-None-Match": tag})
    assert (answer.status_code, answer.content) == (304, b"")


def test_fields_of_one_connection_do_not_pass(client: httpx.Client) -> None:
    answer = client.get("/named")
    assert "x-private" not in answer.headers
    assert answer.headers["x-public"] == "1"


def test_fifty_at_once_for_a_cold_url_are_one_call(client: httpx.Client, origin: Origin) -> None:
    origin.latency = 0.3
    try:
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda _: client.get("/repos/octo-org/repo-3").content, range(50)))
    finally:
        origin.latency = 0.0
    assert set(answers) == {origin.resources["/repos/octo-org/repo-3"].body}
    assert calls_for(origin, "/repos/octo-org/repo-3") == ["GET"]


def test_it_is_no_open_proxy(client: httpx.Client) -> None:
    answer = client.get("http://elsewhere.test/")
    assert answer.status_code == 403
    assert "CACHE_GITHUB_HOSTS" in answer.json()["message"]


@pytest.mark.parametrize("host", ["", "elsewhere.test@{}", "{}@elsewhere.test", "{}.elsewhere.test"])
def test_a_host_that_is_only_like_one_of_its_own_is_refused(host: str, door: Path, wire: Wire) -> None:
    before = len(wire.asked)
    line = f"Host: {host.format(wire.netloc)}\r\n"
    answer = sent_raw(door, f"GET /x HTTP/1.1\r\n{line}Connection: close\r\n\r\n".encode())
    assert status_of(answer) == 403
    assert b"CACHE_GITHUB_HOSTS" in answer
    assert len(wire.asked) == before


def test_the_case_of_a_host_does_not_matter(client: httpx.Client, origin: Origin) -> None:
    host = origin.netloc.replace("127.0.0.1", "LocalHost")
    assert client.get("/listed", headers={"Host": host}).content == b"[1]"


def test_a_target_in_absolute_form_names_the_host(door: Path, wire: Wire) -> None:
    """RFC 9112 §3.2.2: a server must accept it, and ignore the Host field."""
    tail = f" HTTP/1.1\r\nHost: {wire.netloc}\r\nConnection: close\r\n\r\n"
    assert status_of(sent_raw(door, f"GET http://elsewhere.test/absolute{tail}".encode())) == 403
    assert status_of(sent_raw(door, f"GET http://{wire.netloc}/absolute{tail}".encode())) == 200
    assert [asked.target for asked in wire.of(b"/absolute")] == [b"/absolute"]


@pytest.mark.parametrize(
    "answer", [b"", b"this is no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "], ids=["none", "junk", "cut"]
)
def test_an_origin_that_does_not_speak_http_is_a_502(answer: bytes, client: httpx.Client, wire: Wire) -> None:
    wire.answers[b"/no-http"] = answer
    refused = client.get(f"http://{wire.netloc}/no-http")
    assert refused.status_code == 502
    assert wire.netloc in refused.json()["message"]


def test_an_origin_that_is_down_is_a_502(client: httpx.Client, runner: Runner) -> None:
    down = runner.environment["CACHE_GITHUB_HOSTS"].split(",")[-1]
    answer = client.get(f"http://{down}/")
    assert answer.status_code == 502
    assert down in answer.json()["message"]


def test_a_client_that_vanishes_harms_nobody(door: Path, client: httpx.Client, origin: Origin) -> None:
    head = f"POST /vanished HTTP/1.1\r\nHost: {origin.netloc}\r\nContent-Length: 1000\r\n\r\nhalf"
    for sent in (head, "GET /large HTTP/1.1\r\nHost: " + origin.netloc + "\r\n\r\n", "rubbish\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(door))
            connection.sendall(sent.encode())
    assert client.get("/listed").content == b"[1]"


@pytest.mark.parametrize(
    "sent",
    [
        b"rubbish\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /bad HTTP/1.1\r\n\r\n",
        b"GET /bad HTTP/1.1\r\nHost: HOST\r\nHost: HOST\r\n\r\n",
        b"GET /bad\xc3\xbc HTTP/1.1\r\nHost: HOST\r\n\r\n",
        b"GET bad HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
        b"GET /bad#fragment HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
        b"GET /bad HTTP/1.1\r\nHost: HOST\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /bad HTTP/1.1\r\nHost: HOST\r\nContent-Length: x\r\n\r\n",
        b"POST /bad HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["rubbish", "tls", "no-host", "two-hosts", "bytes", "no-slash", "fragment", "long", "length", "chunk"],
)
def test_what_is_no_http_is_the_clients_mistake_and_reaches_nobody(
    sent: bytes, door: Path, client: httpx.Client, wire: Wire
) -> None:
    answer = sent_raw(door, sent.replace(b"HOST", wire.netloc.encode()))
    assert 400 <= status_of(answer) < 500
    assert [asked for asked in wire.of(b"/bad") if asked.whole] == []
    assert client.get("/listed").status_code == 200


def test_of_two_lengths_the_chunks_count_or_the_request_is_refused(door: Path, wire: Wire) -> None:
    """RFC 9112 §6.3: such a message may be an attempt to smuggle a request."""
    hidden = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    body = b"abc" + hidden
    head = f"POST /lengths HTTP/1.1\r\nHost: {wire.netloc}\r\nConnection: close\r\n"
    framing = f"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n"
    status = status_of(sent_raw(door, (head + framing).encode() + body + b"\r\n0\r\n\r\n"))
    assert wire.of(b"/smuggled") == []
    arrived = [bytes(asked.body) for asked in wire.of(b"/lengths") if asked.whole]
    assert (status, arrived) in [(200, [body]), (400, [])]


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_an_upload_whose_client_vanishes_never_looks_whole_to_the_origin(
    framing: str, door: Path, client: httpx.Client, wire: Wire
) -> None:
    path = f"/left/{framing[:7]}"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(door))
        head = f"POST {path} HTTP/1.1\r\nHost: {wire.netloc}\r\n{framing}\r\n\r\n"
        connection.sendall(head.encode() + b"4\r\nhalf\r\n")
        assert eventually(lambda: any(asked.body for asked in wire.of(path.encode())))
    assert client.get("/listed").status_code == 200
    (asked,) = wire.of(path.encode())
    assert eventually(lambda: asked.cut)
    assert not asked.whole


@pytest.mark.parametrize("sent", ["nothing", "a-part", "more-and-more"])
def test_what_a_client_does_not_wait_for_any_longer_is_let_go_at_the_origin(sent: str, door: Path, wire: Wire) -> None:
    """DESIGN, a request's way, step 6: given up by the caller, the claim is released at once."""
    begun, let_go, path = threading.Event(), threading.Event(), f"/given-up/{sent}"

    def answer(connection: socket.socket) -> None:
        if sent != "nothing":
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nCache-Control: no-store\r\n\r\npart")
        begun.set()
        try:
            if sent == "more-and-more":
                for _ in range(3000):  # 200 MB
                    connection.sendall(bytes(65536))
            elif connection.recv(1) == b"":
                let_go.set()
        except ConnectionError:
            let_go.set()

    wire.answers[path.encode()] = answer
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(door))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {wire.netloc}\r\n\r\n".encode())
        assert begun.wait(20)
        if sent != "nothing":
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert let_go.wait(5)


def test_a_download_that_one_client_has_left_is_whole_for_those_who_wait_and_for_the_next(
    door: Path, client: httpx.Client, wire: Wire
) -> None:
    half, more = b"h" * 100_000, threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(said(half + half, "Cache-Control: max-age=60")[: -len(half)])
        if more.wait(20):
            connection.sendall(half)

    def asked() -> bytes:
        return client.get(f"http://{wire.netloc}/halves").content

    wire.answers[b"/halves"] = answer
    with ThreadPoolExecutor(3) as pool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(door))
            connection.sendall(f"GET /halves HTTP/1.1\r\nHost: {wire.netloc}\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            waiting = [pool.submit(asked) for _ in range(3)]
        more.set()
        assert {future.result(30) for future in waiting} == {half + half}
    assert asked() == half + half


def test_one_connection_serves_many_requests_even_sent_at_once(door: Path, origin: Origin) -> None:
    ask = "GET {} HTTP/1.1\r\nHost: " + origin.netloc + "\r\nConnection: {}\r\n\r\n"
    sent = ask.format("/listed", "keep-alive") + ask.format("/not-there", "keep-alive") + ask.format("/listed", "close")
    heard = sent_raw(door, sent.encode())
    assert re.findall(rb"HTTP/1\.1 (\d{3})", heard) == [b"200", b"404", b"200"]
    assert heard.endswith(b"[1]")


# On a loopback port


def test_without_its_token_the_port_says_nothing(base_url: str) -> None:
    bare = base_url.rpartition("/")[0]
    for url in (f"{bare}/repos/octo-org/repo-1", f"{bare}/p2pcache/status", f"{bare}/wrong/p2pcache/status", bare):
        assert httpx.get(url, trust_env=False).status_code == 404


def test_a_base_url_with_the_token_leads_to_the_first_host_or_a_named_one(base_url: str, origin: Origin) -> None:
    body = origin.resources["/repos/octo-org/repo-4"].body
    for prefix in ("", f"/{origin.netloc}", "/" + origin.netloc.replace("127.0.0.1", "localhost")):
        answer = httpx.get(f"{base_url}{prefix}/repos/octo-org/repo-4", headers=AS_ME, trust_env=False)
        assert answer.content == body


def test_pages_and_redirects_lead_back_through_the_door(base_url: str) -> None:
    with httpx.Client(base_url=base_url, headers=AS_ME, trust_env=False) as client:
        first = client.get("/listed")
        assert first.links["next"]["url"] == f"{base_url}/listed?page=2"
        assert first.links["related"]["url"] == "https://elsewhere.test/x"
        assert client.get(first.links["next"]["url"]).content == b"[2]"
        assert client.get("/moved").headers["location"] == f"{base_url}/listed"


def test_the_links_of_a_named_host_lead_back_to_it(base_url: str, wire: Wire) -> None:
    wire.answers[b"/named-links"] = said(
        b"[1]", f'Link: <http://{wire.netloc}/n?page=2>; rel="next"', f"Location: http://{wire.netloc.upper()}/l"
    )
    answer = httpx.get(f"{base_url}/{wire.netloc}/named-links", trust_env=False)
    assert answer.links["next"]["url"] == f"{base_url}/{wire.netloc}/n?page=2"
    assert answer.headers["location"] == f"{base_url}/{wire.netloc}/l"


def test_relative_links_lead_back_as_well(base_url: str, wire: Wire) -> None:
    """RFC 9110 §10.2.2 and RFC 8288 §3: a field's URL may be a reference relative to the request's."""
    wire.answers[b"/relative"] = said(b"", "Location: /there?a=1", 'Link: </page?n=2>; rel="next"', status="302 Found")
    wire.answers[b"/there"] = wire.answers[b"/page"] = said(b"there", "Cache-Control: no-store")
    with httpx.Client(trust_env=False) as client:
        url = httpx.URL(f"{base_url}/{wire.netloc}/relative")
        answer = client.get(url)
        assert client.get(url.join(answer.headers["location"])).content == b"there"
        assert client.get(url.join(answer.links["next"]["url"])).content == b"there"


def test_urllib_reads_page_after_page_and_follows_redirects(base_url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url, pages = f"{base_url}/moved", []
    while url:
        with opener.open(urllib.request.Request(url, headers=AS_ME), timeout=20) as answer:
            pages.append(json.load(answer))
            following = re.search(r'<([^>]*)>; rel="next"', answer.headers.get("Link", ""))
        url = following[1] if following else ""
    assert pages == [[1], [2]]


def test_requests_writes_and_reads_by_the_port(base_url: str, origin: Origin) -> None:
    requests = pytest.importorskip("requests")
    with requests.Session() as session:
        session.trust_env = False
        session.headers.update(AS_ME)
        assert session.put(f"{base_url}/by-the-port", data=FIVE_MB, timeout=30).status_code == 201
        assert session.get(f"{base_url}/by-the-port", timeout=30).content == FIVE_MB
        assert session.delete(f"{base_url}/by-the-port", timeout=30).status_code == 204
        assert session.get(f"{base_url}/by-the-port", timeout=30).status_code == 404
    assert calls_for(origin, "/by-the-port") == ["PUT", "GET", "DELETE", "GET"]


def test_the_origin_is_not_told_the_doors_token(base_url: str, wire: Wire) -> None:
    token = base_url.rpartition("/")[2].encode()
    httpx.get(f"{base_url}/{wire.netloc}/untold?q=1", headers=AS_ME, trust_env=False)
    (asked,) = wire.of(b"/untold")
    assert asked.target == b"/untold?q=1"
    assert [value for _, value in asked.fields if token in value] == []
    assert dict(asked.fields)[b"host"] == wire.netloc.encode()


def test_a_host_that_is_not_named_is_a_path_of_the_first(base_url: str, origin: Origin) -> None:
    assert httpx.get(f"{base_url}/elsewhere.test/x", trust_env=False).status_code == 404
    assert calls_for(origin, "/elsewhere.test/x") == ["GET"]


# What it says of itself


def control(door: Path, path: str, method: str = "GET", **params: Any) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(door)), base_url="http://p2pcache") as client:
        return client.request(method, path, params=params)


def test_metrics_are_prometheus_and_agree_with_the_statistics(door: Path, client: httpx.Client, runner: Runner) -> None:
    client.get("/repos/octo-org/repo-5")
    runner.step()  # its end comes after a second in which everything was written down
    total = control(door, "/stats").json()["total"]
    families = {f.name: f for f in prometheus.text_string_to_metric_families(control(door, "/metrics").text)}
    assert sum(sample.value for sample in families["p2pcache_requests"].samples) >= total["requests"] > 0
    assert families["p2pcache_peers"].samples[0].value == 0


@pytest.mark.parametrize(
    ("path", "method", "params"), [("/stats", "GET", {"since": "soon"}), ("/open", "POST", {"port": "x"})]
)
def test_bad_questions_are_named(door: Path, path: str, method: str, params: dict[str, str]) -> None:
    answer = control(door, path, method, **params)
    assert answer.status_code == 400
    assert next(iter(params)) in answer.json()["message"]


@pytest.mark.parametrize("since", ["nan", "inf", "-inf", "1e300"])
def test_a_time_that_is_none_is_named(since: str, door: Path) -> None:
    answer = control(door, "/stats", since=since)
    assert answer.status_code == 400
    assert "since" in answer.json()["message"]


def test_a_port_in_digits_that_are_no_number_is_named(door: Path) -> None:
    answer = control(door, "/open", "POST", port="\N{SUPERSCRIPT TWO}")
    assert answer.status_code == 400
    assert "port" in answer.json()["message"]


def test_since_leaves_out_what_came_before(door: Path, client: httpx.Client) -> None:
    def counted(since: float) -> int:
        total: int = control(door, "/stats", since=since).json()["total"]["requests"]
        return total

    before = counted(0)
    client.get("/listed")
    assert eventually(lambda: counted(0) > before)
    assert counted(4_000_000_000) == 0


def test_the_port_is_opened_once_and_a_taken_one_is_refused(door: Path, base_url: str, wire: Wire) -> None:
    assert control(door, "/open", "POST").json() == {"url": base_url}
    refused = control(door, "/open", "POST", port=wire.netloc.rpartition(":")[2])
    assert refused.status_code == 409
    assert "cannot be opened" in refused.json()["message"]


def test_orders_are_posts_and_other_paths_are_not_there(door: Path) -> None:
    asked = {path: control(door, path).status_code for path in ("/open", "/stop", "/nothing")}
    assert asked == {"/open": 405, "/stop": 405, "/nothing": 404}
    assert control(door, "/status", "DELETE").status_code == 405


def test_an_answer_that_breaks_off_breaks_off_at_the_door_and_fills_no_log(
    door: Path, client: httpx.Client, runner: Runner, wire: Wire
) -> None:
    wire.answers[b"/breaks-off"] = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n5\r\nde"
    )
    with pytest.raises(httpx.RemoteProtocolError):
        client.get(f"http://{wire.netloc}/breaks-off")
    old = sent_raw(door, f"GET /breaks-off HTTP/1.0\r\nHost: {wire.netloc}\r\n\r\n".encode())
    assert old.split(b"\r\n")[0].split()[1] == b"502"  # there the end of the connection would be the body's
    wire.answers[b"/whole"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    old = sent_raw(door, f"GET /whole HTTP/1.0\r\nHost: {wire.netloc}\r\n\r\n".encode())
    assert b"\r\ncontent-length: 3\r\n" in old
    assert old.endswith(b"\r\n\r\nabc")
    assert "Traceback" not in (runner.directory / "daemon.log").read_text()


def test_no_body_query_or_token_is_told_however_a_request_ends(
    door: Path, client: httpx.Client, runner: Runner, wire: Wire, base_url: str
) -> None:
    def counted() -> int:
        total: int = control(door, "/stats").json()["total"]["requests"]
        return total

    before, down = counted(), runner.environment["CACHE_GITHUB_HOSTS"].split(",")[-1]
    wire.answers[b"/repos/hushed-owner/hushed-repo"] = said(b"hushed-answer", "X-Answer: hushed-field")
    wire.answers[b"/broken"] = b"hushed-junk\r\n\r\n"
    for url in (f"http://{wire.netloc}/repos/hushed-owner/hushed-repo", f"http://{wire.netloc}/broken"):
        client.post(f"{url}?q=hushed-query", content=b"hushed-body")
        client.get(f"{url}?q=hushed-query")
    client.get(f"http://{down}/?q=hushed-query")
    client.get("http://elsewhere.test/?q=hushed-query")
    sent_raw(door, b"hushed-request\r\n\r\n")
    httpx.get(f"{base_url.rpartition('/')[0]}/hushed-token/?q=hushed-query", headers=AS_ME, trust_env=False)
    assert eventually(lambda: counted() >= before + 5)
    shown = [control(door, path).text for path in ("/status", "/stats", "/metrics")]
    shown.append((runner.directory / "daemon.log").read_text())
    assert [text for text in shown if "hushed" in text or TOKEN in text] == []


def test_nothing_of_a_token_or_a_query_is_shown_or_kept_in_clear(
    door: Path, client: httpx.Client, runner: Runner
) -> None:
    client.get("/listed", params={"q": "a-private-query"})
    shown = [control(door, path).text for path in ("/status", "/stats", "/metrics", "/")]
    shown.append((runner.directory / "daemon.log").read_text())
    kept = [path.read_bytes() for path in runner.directory.iterdir() if path.is_file()]
    assert [text for text in shown if TOKEN in text or "a-private-query" in text] == []
    assert [data for data in kept if TOKEN.encode() in data] == []


def test_the_page_needs_nothing_from_elsewhere(door: Path) -> None:
    page = control(door, "/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "://" not in page.text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_what_was_counted(scheme: str, base_url: str, door: Path, tmp_path: Path) -> None:
    total = control(door, "/stats").json()["total"]
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    options += ["--virtual-time-budget=5000", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    shown = subprocess.run(
        ["chromium", *options, "--dump-dom", f"{base_url}/p2pcache/"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert 'data-shown="yes"' in shown
    totals = total, control(door, "/stats").json()["total"]  # what is counted is written down within a second
    assert any(f'<b id="made">{total["api_calls_made"]}</b>' in shown for total in totals)
    assert "no member of the fleet is connected" in shown


def test_get_and_its_exit_status(runner: Runner, origin: Origin) -> None:
    done = runner.run("get", "/repos/octo-org/repo-6", "-i")
    head, _, body = done.stdout.partition("\n\n")
    assert done.returncode == 0
    assert "HTTP/1.1 200" in head
    assert json.loads(body) == json.loads(origin.resources["/repos/octo-org/repo-6"].body)
    assert json.loads(runner.p2pcache("get", "/listed", "--paginate")) == [1, 2]
    assert runner.run("get", "/not-there").returncode == 1
    assert runner.run("get", "ftp://x").returncode == 2
    assert runner.run("get", "/listed", "-H", "no colon").returncode == 2
    fresh = runner.run("get", f"{origin.url}/repos/octo-org/repo-6", "-i", "--fresh").stdout
    assert "fwd=request" in fresh or "fwd-status=304" in fresh

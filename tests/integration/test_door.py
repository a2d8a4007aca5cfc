"""The caching door: what curl, gh, and clients that take a base URL meet there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemons import TOKEN, Runner

from httpx_p2pcache.testing import Origin, Resource, made_up

pytest.importorskip("libp2p")
prometheus = pytest.importorskip("prometheus_client.parser")

pytestmark = pytest.mark.p2p
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
needs_gh = pytest.mark.skipif(shutil.which("gh") is None, reason="gh is not installed")
LARGE = bytes(range(256)) * 4 * 1024 * 20  # 20 MiB: more than is stored
AS_ME = {"Authorization": f"Bearer {TOKEN}"}


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
def runner(origin: Origin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    root = tmp_path_factory.mktemp("door")
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # a port on which nobody listens
    hosts = [origin.netloc, origin.netloc.replace("127.0.0.1", "localhost"), f"127.0.0.1:{closed.getsockname()[1]}"]
    runner = Runner(root / "store", root / "registry", CACHE_GITHUB_HOSTS=",".join(hosts))
    runner.environment["NO_PROXY"] += ",localhost"
    try:
        runner.p2pcache("init", "--port", "0")
        yield runner
    finally:
        runner.stop()
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

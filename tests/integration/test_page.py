"""The page that the daemon shows, in a browser: what it says, and what it does not let in."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from daemons import TOKEN, Runner
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.stats import Stats
from httpx_p2pcache.testing import Origin, made_up

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")

MARKUP = "<img src=x onerror=document.body.dataset.taken=1>"
LIGHT, DARK = "--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0"


class Page:
    """The page of a runner of whose fleet there is one more."""

    def __init__(self, runner: Runner, url: str) -> None:
        self.runner = runner
        self.url = url

    def get(self, path: str = "") -> httpx.Response:
        return httpx.get(self.url + path, trust_env=False, timeout=30)

    def json(self, path: str) -> Any:
        return self.get(path).json()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page on which all there is to see is to be seen: peers, quotas, endpoints, minutes. Nothing on it changes."""
    root = tmp_path_factory.mktemp("page")
    with Origin(made_up(5)) as origin:
        ours = Runner(root / "ours", root / "registry", CACHE_GITHUB_HOSTS=origin.netloc)
        hostile = Settings(
            dir=root / "theirs",
            peer_registry=root / "registry",
            shared_secret=ours.environment["CACHE_SHARED_SECRET"],
            listen_host="127.0.0.1",
            listen_port=0,
            public_bootstrap=False,
            github_hosts=(origin.netloc,),
        )
        # Which no setting can be; and nobody can connect to these: it connects to the other one, which began before.
        addresses = f"/ip4/127.0.0.1/tcp/1/{MARKUP}", "/ip4/127.0.0.1/tcp/1"
        msgspec.structs.force_setattr(hostile, "announce_addrs", addresses)
        theirs = None
        try:
            ours.p2pcache("init", "--port", "0")
            theirs = P2PCacheTransport(settings=hostile)
            assert eventually(lambda: ours.status().get("connected_peers") == 1, 30)
            for _ in range(2):
                ours.step(*(origin.url + target for target in origin.resources))
            # What no client of ours can ask for: an endpoint that has markup.
            Ledger(ours.directory).flush(_counted(f"GET a.test/{MARKUP}"))
            yield Page(ours, f"{ours.status()['urls'][0]}/p2pcache/")
        finally:
            ours.stop()
            if theirs is not None:
                theirs.close()


def _counted(endpoint: str) -> Stats:
    stats = Stats()
    stats.add("requests", 1, endpoint)
    stats.add("origin_calls", 1, endpoint)
    return stats


def browse(url: str, profile: Path, *options: str) -> str:
    """What chromium prints of a page once its scripts have run."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=4000", "--window-size=1000,900", "--hide-scrollbars", *options, url]
    environment = {**os.environ, "HOME": str(profile)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100).stdout


def shown_by_id(dom: str) -> dict[str, str]:
    """The text of every element that has an id and nothing in it but text."""
    return {match[1]: html.unescape(match[2]) for match in re.finditer(r'id="(\w+)"[^>]*>([^<]*)</', dom)}


def rows(dom: str, name: str) -> list[list[str]]:
    """The rows of a table's body, as the text of their cells."""
    body = dom.partition(f'<tbody id="{name}">')[2].partition("</tbody>")[0]
    cells = (re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", body, re.S))
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in cells]


@pytest.fixture(scope="module")
def dom(page: Page, tmp_path_factory: pytest.TempPathFactory) -> str:
    return browse(page.url, tmp_path_factory.mktemp("profile"), "--dump-dom")


@needs_chromium
def test_the_figures_shown_are_those_of_the_statistics(page: Page, dom: str) -> None:
    assert re.search(r'<body[^>]* data-shown="yes"', dom)
    total, status, shown = page.json("stats")["total"], page.json("status"), shown_by_id(dom)
    assert total["requests"] == 11
    assert {name: shown[name] for name in ("saved", "rate", "made", "seconds", "peers")} == {
        "saved": str(total["api_calls_saved"]),
        "rate": f"{100 * total['hit_rate']:.0f} %",
        "made": str(total["api_calls_made"]),
        "seconds": f"{total['seconds_saved']:.0f}",
        "peers": "1",
    }
    assert f"fleet {status['fleet']} · sharing · {status['cache_size']} entries" in shown["node"]


@needs_chromium
def test_the_tables_shown_are_those_of_the_daemon(page: Page, dom: str) -> None:
    names = ("endpoint", "requests", "local_hits", "peer_hits", "revalidated", "api_calls_made", "api_calls_saved")
    endpoints = [[str(one[name]) for name in names] for one in page.json("stats")["endpoints"]]
    assert rows(dom, "endpoints") == endpoints
    assert len(endpoints) == 2
    status = page.json("status")
    (peer,) = status["peers"]
    ((name, addresses, how, *_),) = rows(dom, "members")
    assert (name[1:], addresses, how) == (peer["peer_id"][-8:], ", ".join(peer["addresses"]), peer["how"])


@needs_chromium
def test_what_is_left_of_the_limit_is_shown(page: Page, dom: str) -> None:
    """A process of this runner has learned it from the origin."""
    (quota,) = page.json("status")["quotas"]
    ((identity, kind, _, left, _),) = rows(dom, "quotas")
    assert (identity, kind, left) == (quota["identity"], "core", f"{quota['remaining']} of 5000")


@needs_chromium
def test_the_chart_has_a_bar_for_what_was_counted_in_the_last_hour(page: Page, dom: str) -> None:
    chart = dom.partition('<svg id="chart"')[2].partition("</svg>")[0]
    heights: dict[str, float] = {}
    for bar in re.findall(r"<rect [^>]*>", chart):
        fields = dict(re.findall(r'(\w+)="([^"]*)"', bar))
        heights[fields["fill"]] = heights.get(fields["fill"], 0.0) + float(fields["height"])
    total = page.json("stats")["total"]
    tall = heights["var(--local)"] + heights["var(--call)"]
    assert heights["var(--local)"] / tall == pytest.approx(
        total["local_hits"] / (total["local_hits"] + total["api_calls_made"])
    )


@needs_chromium
def test_markup_in_what_peers_and_endpoints_are_called_is_shown_as_text(page: Page, dom: str) -> None:
    assert any(MARKUP in address for peer in page.json("status")["peers"] for address in peer["addresses"])
    assert any(MARKUP in one["endpoint"] for one in page.json("stats")["endpoints"])
    assert dom.count(html.escape(MARKUP, quote=False)) == 2
    assert "<img" not in dom
    assert "data-taken" not in dom.replace(html.escape(MARKUP, quote=False), "")


@needs_chromium
def test_it_looks_otherwise_in_the_dark_and_is_never_blank(page: Page, tmp_path: Path) -> None:
    def pictured(url: str, scheme: str) -> bytes:
        browse(url, tmp_path / "profile", scheme, f"--screenshot={tmp_path / 'shot.png'}")
        return (tmp_path / "shot.png").read_bytes()

    blank, light, dark = pictured("about:blank", LIGHT), pictured(page.url, LIGHT), pictured(page.url, DARK)
    assert min(len(light), len(dark)) > 4 * len(blank)
    assert light != dark
    assert brightness(page, tmp_path, LIGHT) > 200
    assert brightness(page, tmp_path, DARK) < 60


def brightness(page: Page, directory: Path, scheme: str) -> float:
    """Of the page's ground, as the browser says: from 0 to 255."""
    script = "<script>document.title = getComputedStyle(document.body).backgroundColor</script>"
    (directory / "page.html").write_text(page.get().text + script)
    dom = browse((directory / "page.html").as_uri(), directory / "profile", scheme, "--dump-dom")
    title = dom.partition("<title>")[2].partition("</title>")[0]
    return sum(map(int, re.findall(r"\d+", title))) / 3


@needs_chromium
def test_a_daemon_that_has_gone_is_said_to_have_gone(page: Page, tmp_path: Path) -> None:
    """The page is saved, and looks for its daemon where there is none."""
    (tmp_path / "page.html").write_text(page.get().text)
    dom = browse((tmp_path / "page.html").as_uri(), tmp_path / "profile", "--dump-dom")
    assert shown_by_id(dom)["node"] == "the daemon does not answer"
    assert "data-shown" not in re.sub(r"<script>.*</script>", "", dom, flags=re.S)


def test_nothing_on_the_page_comes_from_elsewhere(page: Page) -> None:
    answer = page.get()
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["cache-control"] == "no-store"
    directives = dict(part.split(None, 1) for part in answer.headers["content-security-policy"].split(";"))
    assert directives.pop("default-src") == "'none'"
    assert directives.pop("connect-src") == "'self'"
    assert set(directives.values()) == {"'unsafe-inline'"}
    assert re.findall(r"https?://[^\"']+", answer.text) == ["http://www.w3.org/2000/svg"]  # the name of a vocabulary
    assert re.findall(r"<link\b|\bsrc=|@import|\burl\(", answer.text) == []


def test_the_page_is_there_for_those_who_have_its_token_alone(page: Page) -> None:
    stranger = re.sub(r"^(http://[^/]+)/[^/]+", r"\1/guessed", page.url)
    for path in ("", "status", "stats", "metrics"):
        assert page.get(path).status_code == 200
        answer = httpx.get(stranger + path, trust_env=False)
        assert (answer.status_code, "p2pcache" in answer.text and "<html" in answer.text) == (404, False)


def test_status_prints_where_the_page_is(page: Page) -> None:
    assert page.runner.p2pcache("status", "--web") == f"{page.url}\n"


def test_the_page_is_told_no_token_query_or_secret(page: Page) -> None:
    told = [page.get(path).text for path in ("", "status", "stats", "metrics")]
    secret = page.runner.environment["CACHE_SHARED_SECRET"]
    assert [text for text in told if TOKEN in text or secret in text or "octo-org" in text] == []

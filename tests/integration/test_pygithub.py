"""PyGithub with the cache is PyGithub as its users know it, against a stand-in for GitHub; and it is cached.

What is compared is a table, as in test_requests.py: each scene is played without the cache, with it, and with it once
more. The rest is about what only PyGithub has: its pauses, its retries, its connection classes, install and uninstall.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from scripted import Answer, Asked, Scripted
from waiting import eventually

from httpx_p2pcache import Settings, SettingsError, get_stats
from httpx_p2pcache.testing import Origin, Resource

pytest.importorskip("github")

import github
import github.Consts
import github.Requester
import requests
from github import Auth, Github, GithubException, GithubRetry

from httpx_p2pcache.integrations import pygithub
from httpx_p2pcache.integrations.pygithub import install, pygithub_cache, uninstall

PROMPT = 5.0  # seconds: half of what a claim lives, so that whoever waits for its end is noticed
FRESH = {"Cache-Control": "private, max-age=60"}
JSON = {"Content-Type": "application/json; charset=utf-8"}
STALE = {**JSON, "Cache-Control": "private, max-age=60", "Age": "100", "ETag": '"v1"'}
REPO = "/repos/octo-org/repo"
PAGES = 3


def json_of(value: object, **options: Any) -> Resource:
    return Resource(json.dumps(value).encode(), **options)


def refusal(status: int, message: str) -> Resource:
    return json_of({"message": message, "documentation_url": "https://docs.github.com"}, status=status)


def issue(base: str, number: int) -> dict[str, Any]:
    return {"number": number, "title": f"issue {number}", "url": f"{base}{REPO}/issues/{number}"}


def repository(base: str, name: str = "repo") -> dict[str, Any]:
    return {"id": 7, "name": name, "full_name": f"octo-org/{name}", "url": f"{base}/repos/octo-org/{name}"}


def furnish(origin: Origin) -> None:
    """Some of GitHub: a repository with issues on three pages, files, releases, and what is refused."""
    base = origin.url
    resources = {
        REPO: json_of(repository(base)),
        "/user": json_of({"login": "octocat", "id": 1, "url": f"{base}/user"}),
        "/search/repositories?q=octo+in%3Aname": json_of({"total_count": 1, "items": [repository(base)]}),
        f"{REPO}/issues/1": json_of(issue(base, 1)),
        f"{REPO}/topics": json_of({"names": ["one"]}),
        f"{REPO}/contents/link": Resource(b"", 302, {"Location": f"{base}{REPO}/contents/file"}, max_age=None),
        f"{REPO}/contents/file": json_of(
            {"type": "file", "name": "file", "path": "file", "encoding": "base64", "content": "aGVsbG8="}
        ),
        "/repos/octo-org/renamed": Resource(b"", 301, {"Location": f"{base}{REPO}"}),
        "/repos/octo-org/secret": refusal(403, "Resource not accessible"),
        "/repos/octo-org/gone": refusal(410, "Gone"),
        "/repos/octo-org/blocked": refusal(451, "Repository access blocked"),
        "/repos/octo-org/unsigned": refusal(401, "Bad credentials"),
        "/repos/octo-org/unseen": refusal(404, "Not Found"),
        "/rate_limit": json_of(
            {"resources": {"core": {"limit": 5000, "remaining": 4321, "reset": 2_000_000_000, "used": 679}}},
            fields={**JSON, "Cache-Control": "no-cache"},
            max_age=None,
        ),
    }
    for page in range(1, PAGES + 1):
        issues = [issue(base, number) for number in range(page * 30 - 29, page * 30 + 1)][: 30 if page < PAGES else 5]
        links = [f'<{base}{REPO}/issues?page={PAGES}>; rel="last"']
        if page < PAGES:
            links.append(f'<{base}{REPO}/issues?page={page + 1}>; rel="next"')
        target = f"{REPO}/issues" + (f"?page={page}" if page > 1 else "")
        resources[target] = json_of(issues, fields={**JSON, "Link": ", ".join(links)})
    resources[f"{REPO}/issues?per_page=1"] = resources[f"{REPO}/issues"]
    origin.resources.clear()
    origin.resources.update(resources)


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as server:
        furnish(server)
        yield server


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with Scripted() as server:
        server.script = lambda asked: Answer(json.dumps(repository(server.url)).encode(), fields={**JSON, **FRESH})
        yield server


Hub = Callable[..., Any]


@pytest.fixture
def hub(origin: Origin) -> Iterator[Hub]:
    """``hub(token="one")``: a Github for the stand-in, without pauses and retries; it is closed at the end."""
    with contextlib.ExitStack() as opened:

        def build(base_url: str = "", token: str = "one", **options: Any) -> Any:
            plain: dict[str, Any] = {"seconds_between_requests": 0, "seconds_between_writes": 0, "retry": None}
            one = Github(base_url=base_url or origin.url, auth=Auth.Token(token), **(plain | options))
            opened.callback(one.close)
            return one

        yield build


@pytest.fixture
def settings(origin: Origin, scripted: Scripted, settings_for: Callable[..., Settings]) -> Settings:
    return settings_for(enable_p2p=False, github_hosts=(origin.netloc, scripted.netloc))


@pytest.fixture
def cached(settings: Settings) -> Iterator[Settings]:
    """PyGithub with the cache, for the whole test."""
    with pygithub_cache(settings):
        yield settings


@pytest.fixture(autouse=True)
def _pygithub_is_left_as_it_was() -> Iterator[None]:
    yield
    left = pygithub._depth
    while pygithub._depth:
        uninstall()
    github.Requester.Requester.resetConnectionClasses()
    assert left == 0


_APART = re.compile(r"age|cache-status|date|x-ratelimit-.*|connection|transfer-encoding")
Act = Callable[[Any], Any]
SCENES: list[Any] = []


def scene(*, again: int = 0, saved: int = 0) -> Callable[[Act], Act]:
    """Adds a scene. Once all is stored it calls the origin ``again`` times; ``saved``: calls saved the first time."""

    def add(act: Act) -> Act:
        SCENES.append(pytest.param(act, again, saved, id=act.__name__))
        return act

    return add


def seen(thing: Any) -> Any:
    fields = {name: value for name, value in thing.raw_headers.items() if not _APART.fullmatch(name)}
    return type(thing), thing.raw_data, fields, thing.etag, thing.last_modified


def met(call: Callable[[], Any]) -> Any:
    """The error of ``call``, as its user sees it."""
    try:
        call()
    except GithubException as exc:
        return type(exc), exc.status, exc.data, exc.message, str(exc)
    except Exception as exc:
        return type(exc)
    raise AssertionError("nothing was raised")


@scene()
def a_repository_has_all_its_attributes(hub: Any) -> Any:
    return seen(hub.get_repo("octo-org/repo"))


@scene(saved=1)
def the_user_of_the_token(hub: Any) -> Any:
    return seen(hub.get_user()), hub.get_user().login


@scene()
def a_lazy_object_is_completed_when_it_is_looked_at(hub: Any) -> Any:
    with hub.withLazy(True) as lazy:
        return lazy.get_repo("octo-org/repo").full_name


@scene()
def a_list_is_followed_to_its_last_page(hub: Any) -> Any:
    return [found.number for found in hub.get_repo("octo-org/repo").get_issues()]


@scene()
def a_list_can_be_counted_sliced_and_paged(hub: Any) -> Any:
    issues = hub.get_repo("octo-org/repo").get_issues()
    return issues.totalCount, issues[40].number, [one.number for one in issues[28:33]]


@scene()
def a_search_has_its_total(hub: Any) -> Any:
    found = hub.search_repositories("octo in:name")
    return [one.full_name for one in found], found.totalCount


@scene(saved=1)
def an_update_says_that_nothing_has_changed(hub: Any) -> Any:
    repo = hub.get_repo("octo-org/repo")
    return repo.update(), repo.full_name


@scene(again=None)
def contents_that_are_a_link_are_followed(hub: Any) -> Any:
    with hub.withLazy(True) as lazy:
        return lazy.get_repo("octo-org/repo").get_contents("link").decoded_content


@scene()
def a_repository_that_was_renamed_is_found(hub: Any) -> Any:
    return seen(hub.get_repo("octo-org/renamed"))


@scene(again=1)
def the_rate_limit_is_never_answered_from_the_cache(hub: Any) -> Any:
    core = hub.get_rate_limit().resources.core
    return core.limit, core.remaining, core.used


@scene(again=1)
def the_limit_is_known_from_what_was_asked(hub: Any) -> Any:
    hub.get_rate_limit()
    hub.get_repo("octo-org/repo")
    return hub.rate_limiting[1], hub.rate_limiting_resettime > time.time()


@scene(again=None)
def refusals(hub: Any) -> Any:
    names = ("secret", "gone", "blocked", "unsigned", "unseen", "nothing")
    return [met(lambda name=name: hub.get_repo(f"octo-org/{name}")) for name in names]


@scene(again=None)
def what_is_created_edited_and_deleted_is_seen(hub: Any) -> Any:
    repo = hub.get_repo("octo-org/repo")
    one = repo.get_issue(1)
    one.edit(title="another")
    edited = repo.get_issue(1).raw_data
    topics = repo.get_topics()
    repo.replace_topics(["two"])
    replaced = repo.get_topics()
    created = repo.create_issue("a new one").raw_data
    listed = repo._requester.requestJsonAndCheck("GET", f"{repo.url}/issues")[1]
    label = hub.requester.requestJsonAndCheck("POST", f"{repo.url}/issues/1/labels", input=["bug"])[1]
    repo.delete()
    return edited, topics, replaced, created, listed, label, met(lambda: hub.get_repo("octo-org/repo"))


def play(act: Act, origin: Origin, hub: Hub) -> tuple[Any, list[tuple[str, str, str, int]]]:
    """What ``act`` returns, and what the origin was asked meanwhile."""
    furnish(origin)
    origin.reset()
    return act(hub()), [(call.method, call.target, call.token, call.status) for call in origin.calls]


@pytest.mark.parametrize(("act", "again", "saved"), SCENES)
def test_with_the_cache_it_shows_what_it_shows_without(
    act: Act, again: int | None, saved: int, origin: Origin, hub: Hub, settings: Settings
) -> None:
    plain, asked = play(act, origin, hub)
    with pygithub_cache(settings):
        cold, asked_cold = play(act, origin, hub)
        assert plain == cold
        assert (len(asked) - saved) == len(asked_cold)
        assert asked[: len(asked_cold)] == asked_cold
        if again is not None:
            warm, asked_again = play(act, origin, hub)
            assert plain == warm
            assert again == len(asked_again)


def test_the_whole_of_a_job_is_answered_from_the_cache_the_second_time(
    origin: Origin, hub: Hub, cached: Settings
) -> None:
    for _ in range(2):
        api = hub()
        assert len(list(api.get_repo("octo-org/repo").get_issues())) == 65
    assert len(origin.calls) == 1 + PAGES
    hits = get_stats()["local_hits"]
    assert isinstance(hits, int)
    assert hits >= 1 + PAGES


def test_what_is_stale_is_validated_and_costs_no_quota(origin: Origin, hub: Hub, cached: Settings) -> None:
    origin.resources[REPO].max_age = 0
    api = hub()
    names = [api.get_repo("octo-org/repo").full_name for _ in range(3)]
    assert names == ["octo-org/repo"] * 3
    assert [call.status for call in origin.calls] == [200, 304, 304]
    assert origin.counted() == 1


def test_an_update_of_what_has_changed_brings_the_change(origin: Origin, hub: Hub, cached: Settings) -> None:
    origin.resources[REPO].max_age = 0
    repo = hub().get_repo("octo-org/repo")
    assert repo.update() is False
    origin.resources[REPO] = json_of({**repository(origin.url), "description": "changed"}, max_age=0)
    assert repo.update() is True
    assert repo.description == "changed"
    assert repo.update() is False


def test_a_write_through_the_cache_is_seen_by_another_object(origin: Origin, hub: Hub, cached: Settings) -> None:
    one, two = hub(), hub()
    assert [api.get_repo("octo-org/repo").name for api in (one, two)] == ["repo"] * 2
    one.get_repo("octo-org/repo").edit(description="written")
    assert two.get_repo("octo-org/repo").description == "written"


def test_two_tokens_do_not_see_each_other_s_answers(origin: Origin, hub: Hub, cached: Settings) -> None:
    one, two = hub(token="one"), hub(token="two")
    assert one.get_repo("octo-org/repo").name == "repo"
    origin.forbid("token two", REPO)
    with pytest.raises(github.UnknownObjectException):
        two.get_repo("octo-org/repo")
    assert one.get_repo("octo-org/repo").name == "repo"
    assert [api.get_user().login for api in (two, one)] == ["octocat"] * 2  # the one's proves the other's right
    assert [(call.token, call.target, call.status) for call in origin.calls] == [
        ("token one", REPO, 200),
        ("token two", REPO, 404),
        ("token two", "/user", 200),
        ("token one", "/user", 304),
    ]


def test_what_is_not_there_yet_is_asked_for_until_it_is(
    scripted: Scripted, hub: Hub, cached: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(github.Consts, "PROCESSING_202_WAIT_TIME", 0)
    answers = iter([202, 202, 200])

    def script(asked: Asked) -> Answer:
        status = next(answers)
        return Answer(json.dumps([{"total": 5}] if status == 200 else {}).encode(), status, {**JSON, **FRESH})

    scripted.script = script
    repo = hub(scripted.url, lazy=True).get_repo("octo-org/repo")
    for _ in range(2):
        assert [one.total for one in repo.get_stats_contributors()] == [5]
    assert len(scripted.asked) == 3


def test_what_is_not_there_yet_of_an_enterprise_that_is_not_named_is_asked_for_as_well(
    scripted: Scripted, hub: Hub, settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyGithub asks again and again: from the cache it would have the same 202 until that is stale."""
    monkeypatch.setattr(github.Consts, "PROCESSING_202_WAIT_TIME", 0)
    answers = iter([202, 200])
    scripted.script = lambda asked: Answer(b"[]", next(answers), {**JSON, **FRESH})
    with pygithub_cache(settings_for(enable_p2p=False)):
        repo = hub(scripted.url, lazy=True).get_repo("octo-org/repo")
        assert repo.get_stats_contributors() is None
    assert len(scripted.asked) == 2


def test_a_hit_does_not_bring_back_an_older_count_of_what_is_left(origin: Origin, hub: Hub, cached: Settings) -> None:
    api = hub()
    for name in ("repo", "renamed", "repo"):
        api.get_repo(f"octo-org/{name}")
    api.get_user().login  # noqa: B018 - looked at, it is fetched
    api.get_repo("octo-org/repo")
    assert api.rate_limiting == (origin.limit - len(origin.calls), origin.limit)


def test_one_that_has_used_up_its_limit_goes_on_with_what_is_stale(
    scripted: Scripted, hub: Hub, cached: Settings
) -> None:
    limits = {"X-RateLimit-Limit": "60", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(time.time()) + 900)}
    refused = Answer(b'{"message": "API rate limit exceeded for user"}', 403, {**JSON, **limits})
    held = Answer(json.dumps(repository(scripted.url)).encode(), fields=STALE)
    scripted.script = lambda asked: refused if scripted.asked[:-1] or asked.target != REPO else held
    api = hub(scripted.url)
    assert [api.get_repo("octo-org/repo").full_name for _ in range(3)] == ["octo-org/repo"] * 3
    with pytest.raises(github.RateLimitExceededException):
        api.get_repo("octo-org/another")


RETRIES: dict[str, tuple[list[Answer], int]] = {
    "a 403 that says when": ([Answer(b'{"message": "no"}', 403, {**JSON, "Retry-After": "1"})], 2),
    "a secondary limit": (
        [Answer(b'{"message": "You have exceeded a secondary rate limit"}', 403, JSON)],
        2,
    ),
    "two 500s": ([Answer(b"{}", 500, JSON), Answer(b"{}", 502, JSON)], 3),
    "a 403 that means it": ([Answer(b'{"message": "Resource not accessible"}', 403, JSON)], 1),
    "500s without end": ([Answer(b"{}", 500, JSON)] * 10, 3),
}


@pytest.mark.parametrize("name", RETRIES)
def test_its_retries_are_its_own(name: str, scripted: Scripted, hub: Hub, settings: Settings) -> None:
    faults, calls = RETRIES[name]
    good = Answer(json.dumps(repository(scripted.url)).encode(), fields={**JSON, **FRESH})

    def ask() -> Any:
        answers = iter(faults)
        scripted.reset(lambda asked: next(answers, good))
        began = time.monotonic()
        api = hub(scripted.url, retry=GithubRetry(total=2, secondary_rate_wait=1))
        try:
            result = api.get_repo("octo-org/repo").full_name
        except Exception as exc:
            result = type(exc), getattr(exc, "status", None), getattr(exc, "data", None)
        paused = time.monotonic() - began >= 1
        return result, [asked.target for asked in scripted.asked], paused

    plain = ask()
    with pygithub_cache(settings):
        assert plain == ask()
    assert len(plain[1]) == calls


def test_a_download_that_follows_a_redirect_has_the_bytes(
    scripted: Scripted, hub: Hub, settings: Settings, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 40

    def script(asked: Asked) -> Answer:
        if asked.target.startswith("/files"):
            return Answer(content, fields={**FRESH, "Content-Type": "application/octet-stream"})
        if asked.fields["accept"] == "application/octet-stream":
            return Answer(b"", 302, {"Location": f"{scripted.url}/files/1"})
        asset = {"id": 1, "url": f"{scripted.url}{REPO}/releases/assets/1", "name": "a.bin"}
        return Answer(json.dumps(asset).encode(), fields={**JSON, **FRESH, "Vary": "Accept"})

    scripted.script = script

    def download() -> tuple[Any, ...]:
        asset = hub(scripted.url, lazy=True).get_repo("octo-org/repo").get_release_asset(1)
        path = tmp_path / "a.bin"
        asset.download_asset(str(path), chunk_size=100)
        status, _, chunks = asset.download_asset(chunk_size=1000)
        return asset.name, path.read_bytes(), status, b"".join(chunks)

    plain = download()
    assert plain == ("a.bin", content, 200, content)
    scripted.reset(script)
    with pygithub_cache(settings):
        assert [plain] * 2 == [download() for _ in range(2)]
    assert [asked.target for asked in scripted.asked].count("/files/1") == 1


def test_uploads_arrive_whole_from_files_and_from_memory(
    scripted: Scripted, hub: Hub, settings: Settings, tmp_path: Path
) -> None:
    """And are begun anew by a retry."""
    content = bytes(range(256)) * 40
    (tmp_path / "a.bin").write_bytes(content)

    def upload() -> list[tuple[Any, ...]]:
        failed = iter([True])

        def script(asked: Asked) -> Answer:
            if asked.method == "POST":
                status = 500 if asked.target.endswith("again") and next(failed, False) else 201
                return Answer(json.dumps({"id": 5, "name": "a.bin"}).encode(), status, JSON)
            release = {"id": 1, "upload_url": f"{scripted.url}/uploads{{?name,label}}"}
            return Answer(json.dumps(release).encode(), fields={**JSON, **FRESH})

        scripted.reset(script)
        release = hub(scripted.url, retry=GithubRetry(total=2), lazy=True).get_repo("octo-org/repo").get_release(1)
        assert release.upload_asset(str(tmp_path / "a.bin")).id == 5
        assert release.upload_asset_from_memory(io.BytesIO(content), len(content), "memory").id == 5
        assert release.upload_asset(str(tmp_path / "a.bin"), label="retried", name="again").id == 5
        return [
            (asked.method, asked.target, asked.body == content, asked.fields["content-type"])
            for asked in scripted.asked
            if asked.method == "POST"
        ]

    plain = upload()
    with pygithub_cache(settings):
        assert plain == upload()
    assert [whole for _, _, whole, _ in plain] == [True] * 4


PAUSE = 0.4  # seconds_between_requests


def distances(origin: Origin) -> list[float]:
    """From the end of each call to the end of the next, in seconds."""
    times = [call.at for call in origin.calls]
    return [later - sooner for sooner, later in pairwise(times)]


def kept(origin: Origin) -> bool:
    """Whether there is a pause between every two calls; a clock may be a little off."""
    assert len(origin.calls) > 1
    return min(distances(origin)) > PAUSE * 0.9


def test_hits_do_not_wait(origin: Origin, hub: Hub, cached: Settings) -> None:
    api = hub(seconds_between_requests=10)
    api.get_repo("octo-org/repo")
    began = time.monotonic()
    for _ in range(20):
        api.get_repo("octo-org/repo")
    assert time.monotonic() - began < 5
    assert len(origin.calls) == 1


def test_calls_keep_their_distance_whatever_hits_are_between_them(origin: Origin, hub: Hub, cached: Settings) -> None:
    api = hub(seconds_between_requests=PAUSE)
    for target in ("repo", "repo", "secret", "repo", "nothing", "repo"):
        with contextlib.suppress(GithubException):
            api.get_repo(f"octo-org/{target}")
    assert [call.status for call in origin.calls] == [200, 403, 404]
    assert kept(origin)


@pytest.mark.parametrize(
    "follow",
    [lambda repo: repo.get_contents("link"), lambda repo: repo.requester.requestJson("GET", "/repos/octo-org/renamed")],
    ids=["302", "301"],
)
def test_a_call_whose_redirect_leads_to_a_hit_keeps_its_distance_to_the_next(
    follow: Callable[[Any], Any], origin: Origin, hub: Hub, cached: Settings
) -> None:
    repo = hub().get_repo("octo-org/repo")
    repo.get_contents("file")
    origin.reset()
    api = hub(seconds_between_requests=PAUSE)
    follow(api.get_repo("octo-org/repo"))
    api.get_user().login  # noqa: B018 - looked at, it is fetched
    assert [call.status for call in origin.calls] in ([301, 200], [302, 200])
    assert kept(origin)


def test_validations_are_calls_and_keep_their_distance(origin: Origin, hub: Hub, cached: Settings) -> None:
    origin.resources[REPO].max_age = 0
    api = hub(seconds_between_requests=PAUSE)
    for _ in range(3):
        api.get_repo("octo-org/repo")
    assert len(origin.calls) == 3
    assert kept(origin)


def test_writes_keep_their_distance_to_writes(origin: Origin, hub: Hub, cached: Settings) -> None:
    repo = hub(seconds_between_writes=PAUSE).get_repo("octo-org/repo")
    origin.reset()
    for number in range(3):
        repo.edit(description=str(number))
    assert [call.method for call in origin.calls] == ["PATCH"] * 3
    assert kept(origin)


def test_what_another_has_fetched_meanwhile_does_not_wait(scripted: Scripted, hub: Hub, cached: Settings) -> None:
    """One waits for the other's call, and then neither for a pause nor for the origin."""
    gate = threading.Event()
    body = json.dumps(repository(scripted.url)).encode()
    scripted.script = lambda asked: Answer(
        body, fields={**JSON, **FRESH}, before=gate if asked.target == REPO else None
    )
    one, two = hub(scripted.url), hub(scripted.url, seconds_between_requests=10)
    two.get_repo("octo-org/another")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(one.get_repo, "octo-org/repo")
        scripted.wait_for(2)
        second = pool.submit(two.get_repo, "octo-org/repo")
        gate.set()
        assert [future.result(PROMPT).full_name for future in (first, second)] == ["octo-org/repo"] * 2
    assert len(scripted.asked) == 2


def test_connections_that_are_not_ours_keep_their_pauses(origin: Origin, hub: Hub, settings: Settings) -> None:
    """Those that were open before the cache was installed."""
    api = hub(seconds_between_requests=PAUSE)
    api.get_repo("octo-org/repo")
    with pygithub_cache(settings):
        for _ in range(2):
            api.get_repo("octo-org/repo")
    api.get_repo("octo-org/repo")
    assert len(origin.calls) == 4
    assert kept(origin)


class Recorded:
    """A connection class of a user's own, that knows nothing of requests."""

    opened = 0
    times: list[float]

    def __init__(self, host: str, *_: Any, **__: Any) -> None:
        type(self).opened += 1
        self.host = host

    def request(self, verb: str, url: str, input: Any, headers: Any, stream: bool = False) -> None:  # noqa: A002
        self.times.append(time.time())

    def getresponse(self) -> Any:
        response = requests.Response()
        response.status_code = 200
        response._content = json.dumps(repository("http://127.0.0.1")).encode()
        return github.Requester.RequestsResponse(response)

    def close(self) -> None:
        pass


def test_a_connection_class_of_a_user_s_own_works_and_keeps_its_pauses(hub: Hub, cached: Settings) -> None:
    Recorded.opened, Recorded.times = 0, []
    github.Requester.Requester.injectConnectionClasses(Recorded, Recorded)  # type: ignore[arg-type] # like a user's
    api = hub(seconds_between_requests=PAUSE)
    assert [api.get_repo("octo-org/repo").full_name for _ in range(3)] == ["octo-org/repo"] * 3
    assert Recorded.opened == 3
    gaps = [later - sooner for sooner, later in pairwise(Recorded.times)]
    assert min(gaps) > PAUSE * 0.9


class Counted(github.Requester.HTTPRequestsConnectionClass):
    """One that is PyGithub's, with something added."""

    answers = 0

    def getresponse(self) -> Any:
        type(self).answers += 1
        return super().getresponse()


def test_a_connection_class_made_of_pygithub_s_is_cached(origin: Origin, hub: Hub, cached: Settings) -> None:
    Counted.answers = 0
    github.Requester.Requester.injectConnectionClasses(Counted, github.Requester.HTTPSRequestsConnectionClass)
    api = hub()
    for _ in range(3):
        assert api.get_repo("octo-org/repo").full_name == "octo-org/repo"
    assert (Counted.answers, len(origin.calls)) == (3, 1)


def test_many_threads_may_use_one_object(origin: Origin, hub: Hub, cached: Settings) -> None:
    for number in range(20):
        origin.resources[f"/repos/octo-org/many-{number}"] = json_of(repository(origin.url, f"many-{number}"))
    api = hub()

    def ask(number: int) -> str:
        name: str = api.get_repo(f"octo-org/many-{number % 20}").name
        return name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(ask, range(160)))
    assert names == [f"many-{number % 20}" for number in range(160)]
    assert len(origin.calls) == 20


def test_twenty_threads_that_ask_for_one_thing_make_one_call(scripted: Scripted, hub: Hub, cached: Settings) -> None:
    gate = threading.Event()
    body = json.dumps(repository(scripted.url)).encode()
    scripted.script = lambda asked: Answer(body, fields={**JSON, **FRESH}, before=gate)
    api, entered, lock = hub(scripted.url), [], threading.Lock()

    def ask() -> str:
        with lock:
            entered.append(1)
        name: str = api.get_repo("octo-org/repo").name
        return name

    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(ask) for _ in range(20)]
        assert eventually(lambda: len(entered) == 20)
        scripted.wait_for(1)
        gate.set()
        assert [one.result(PROMPT) for one in asked] == ["repo"] * 20
    assert len(scripted.asked) == 1


def test_one_connection_serves_all_calls_of_an_object(scripted: Scripted, hub: Hub, cached: Settings) -> None:
    def script(asked: Asked) -> Answer:
        if "if-none-match" in asked.fields:
            return Answer(status=304, fields=STALE)
        status = 404 if "nothing" in asked.target else 200
        stale = asked.target == REPO
        return Answer(json.dumps(repository(scripted.url)).encode(), status, STALE if stale else {**JSON, **FRESH})

    scripted.script = script
    api = hub(scripted.url)
    for name in ("repo", "other", "repo", "nothing", "other", "repo", "third"):
        with contextlib.suppress(GithubException):
            api.get_repo(f"octo-org/{name}")
    api.get_repo("octo-org/repo").edit(description="x")
    assert len({asked.connection for asked in scripted.asked}) == 1


def test_objects_can_be_pickled_and_go_on_cached(origin: Origin, hub: Hub, cached: Settings) -> None:
    api = hub()
    repo = api.get_repo("octo-org/repo")
    copy = pickle.loads(pickle.dumps(repo))
    try:
        assert copy.full_name == "octo-org/repo"
        for _ in range(2):
            assert copy.get_issue(1).number == 1
    finally:
        copy.requester.close()
    dumped = io.BytesIO()
    api.dump(repo, dumped)
    dumped.seek(0)
    assert api.load(dumped).get_issue(1).number == 1
    assert [call.target for call in origin.calls] == [REPO, f"{REPO}/issues/1"]


def attributes() -> dict[tuple[str, str], object]:
    """What PyGithub's three classes are made of."""
    classes = (
        github.Requester.Requester,
        github.Requester.HTTPRequestsConnectionClass,
        github.Requester.HTTPSRequestsConnectionClass,
    )
    return {(owner.__name__, name): value for owner in classes for name, value in vars(owner).items()}


def as_it_was(before: dict[tuple[str, str], object]) -> bool:
    now = attributes()
    return now.keys() == before.keys() and all(now[place] is before[place] for place in before)


def test_uninstall_leaves_the_very_objects_that_were_there(settings: Settings) -> None:
    before = attributes()
    install(settings)
    assert not as_it_was(before)
    uninstall()
    assert as_it_was(before)


def test_installs_may_be_nested_and_the_first_one_s_settings_count(
    origin: Origin, hub: Hub, settings: Settings, settings_for: Callable[..., Settings]
) -> None:
    before, other = attributes(), settings_for("other", enable_p2p=False)
    install(settings)
    with pygithub_cache(other):
        hub().get_repo("octo-org/repo")
    hub().get_repo("octo-org/repo")
    assert len(origin.calls) == 1
    assert not other.dir.exists()
    uninstall()
    assert as_it_was(before)
    uninstall()
    assert as_it_was(before)
    install(other)
    hub().get_repo("octo-org/repo")
    uninstall()
    assert len(origin.calls) == 2
    assert as_it_was(before)


def test_an_error_in_the_block_takes_the_cache_out_as_well(settings: Settings) -> None:
    before = attributes()
    with pytest.raises(KeyError), pygithub_cache(settings):
        raise KeyError
    assert as_it_was(before)


def test_settings_that_cannot_be_used_leave_pygithub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = attributes()
    monkeypatch.setenv("CACHE_LISTEN_PORT", "abc")
    with pytest.raises(SettingsError, match="CACHE_LISTEN_PORT"):
        install()
    assert as_it_was(before)


def test_its_settings_are_those_of_the_environment(
    origin: Origin, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("CACHE_ENABLE_P2P", "false")
    with pygithub_cache():
        hub().get_repo("octo-org/repo")
    assert list((tmp_path / "named").glob("*.db"))


def test_what_was_opened_before_is_not_cached_and_what_was_opened_meanwhile_stays_so(
    origin: Origin, hub: Hub, settings: Settings
) -> None:
    before, unopened = hub(), hub()
    before.get_user().login  # noqa: B018 - looked at, it is fetched
    with pygithub_cache(settings):
        meanwhile = hub()
        for api in (before, before, meanwhile, unopened):
            api.get_repo("octo-org/repo")
    calls = len(origin.calls)
    assert calls == 1 + 2 + 1
    for api in (meanwhile, unopened):
        api.get_repo("octo-org/repo")
    assert len(origin.calls) == calls
    hub().get_repo("octo-org/repo")
    assert len(origin.calls) == calls + 1


def test_verify_timeout_and_pool_size_reach_the_connection(origin: Origin, hub: Hub, cached: Settings) -> None:
    retry = GithubRetry(total=4)
    api = hub(verify=False, timeout=7, pool_size=3, retry=retry)
    api.get_repo("octo-org/repo")
    connection = api.requester._Requester__connection
    assert (connection.verify, connection.timeout) == (False, 7)
    assert (connection.adapter._pool_maxsize, connection.adapter.max_retries) == (3, retry)
    assert connection.session.get_adapter(origin.url) is connection.adapter


@pytest.mark.p2p
def test_what_one_runner_has_paid_for_serves_the_other(
    origin: Origin, hub: Hub, settings_for: Callable[..., Settings]
) -> None:
    pytest.importorskip("libp2p")
    apis, adapters = [], []
    for name in ("a", "b"):
        with pygithub_cache(settings_for(name, lookup_timeout=PROMPT, github_hosts=(origin.netloc,))):
            apis.append(hub())
            apis[-1].get_user().login  # noqa: B018 - looked at, it is fetched: a connection is open
            adapters.append(apis[-1].requester._Requester__connection.adapter)
    for adapter in adapters:
        assert adapter.wait_until_joined(30)
        assert eventually(lambda adapter=adapter: adapter.stats()["connected_peers"] == 1)
    origin.reset()
    one, two = apis
    assert len(list(one.get_repo("octo-org/repo").get_issues())) == 65
    assert len(list(two.get_repo("octo-org/repo").get_issues())) == 65
    assert len(origin.calls) == 1 + PAGES
    one.get_repo("octo-org/repo").edit(description="written")
    assert eventually(lambda: two.get_repo("octo-org/repo").description == "written")

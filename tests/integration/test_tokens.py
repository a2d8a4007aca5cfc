"""Every runner its own token: what they share all the same, what none may see, and the quota that the fleet knows."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.testing import Origin, made_up

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p

URLS = 12
TARGETS = [f"/repos/octo-org/repo-{number}" for number in range(URLS)]


class Fleet:
    """Runners with tokens of their own, met, in one process."""

    def __init__(self, origin: Origin, settings_for: Callable[..., Settings], **changes: object) -> None:
        self.origin = origin
        self.clients: list[httpx.Client] = []
        self.transports: list[P2PCacheTransport] = []
        for number in range(3):
            settings = settings_for(
                f"runner-{number}", **({"github_hosts": (origin.netloc,), "lookup_timeout": 5.0} | changes)
            )
            transport = P2PCacheTransport(settings=settings)
            self.transports.append(transport)
            headers = {"Accept": "application/vnd.github+json", "Authorization": self.token(number)}
            self.clients.append(httpx.Client(transport=transport, base_url=origin.url, headers=headers))
        until = time.monotonic() + 30
        while any(transport.stats()["connected_peers"] != 2 for transport in self.transports):
            assert time.monotonic() < until
            threading.Event().wait(0.01)
        for transport in self.transports:
            assert transport.wait_until_joined(30)

    @staticmethod
    def token(number: int) -> str:
        return f"Bearer token-of-{number}"

    def get(self, number: int, target: str, **options: Any) -> httpx.Response:
        return self.clients[number].get(target, **options)

    def stat(self, number: int, name: str) -> Any:
        return self.transports[number].stats()[name]


@pytest.fixture
def github() -> Iterator[Origin]:
    with Origin(made_up(URLS)) as server:
        yield server


@pytest.fixture
def fleet_of(github: Origin, settings_for: Callable[..., Settings]) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def begin(**changes: object) -> Fleet:
        made.append(Fleet(github, settings_for, **changes))
        return made[-1]

    yield begin
    for fleet in made:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda client: client.close(), fleet.clients))


def test_what_one_token_has_paid_for_is_free_for_the_others(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    fleet = fleet_of()

    def work(number: int) -> list[bytes]:
        return [fleet.get(number, target).content for target in TARGETS]

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(work, range(3)))
    assert answers == [[github.resources[target].body for target in TARGETS]] * 3
    assert github.counted() <= URLS + 1
    assert len(github.calls) == 3 * URLS
    assert sum(fleet.stat(number, "revalidated") for number in range(3)) >= 2 * URLS - 1
    assert fleet.stat(0, "validators_failed") == 0


def test_what_was_proven_for_a_token_is_then_its_own(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    fleet = fleet_of()
    fleet.get(0, TARGETS[0])
    proven, again = fleet.get(1, TARGETS[0]), fleet.get(1, TARGETS[0])
    assert "fwd-status=304" in proven.headers["cache-status"]
    assert again.headers["cache-status"].startswith("p2pcache; hit; ttl=")
    assert [call.status for call in github.calls] == [200, 304]


def test_no_field_of_another_token_is_shown(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    github.resources[TARGETS[0]].fields["X-OAuth-Scopes"] = "repo, admin:org"
    fleet = fleet_of()
    first = fleet.get(0, TARGETS[0])
    github.resources[TARGETS[0]].fields.pop("X-OAuth-Scopes")
    second = fleet.get(1, TARGETS[0])
    assert first.headers["x-oauth-scopes"] == "repo, admin:org"
    assert "x-oauth-scopes" not in second.headers
    assert second.content == first.content
    assert first.headers["x-ratelimit-remaining"] != "5000"
    assert second.headers["x-ratelimit-remaining"] == "5000"


@pytest.mark.parametrize("early", [True, False], ids=["before anybody has asked", "after all others have asked"])
def test_a_token_that_the_origin_refuses_sees_nothing(
    fleet_of: Callable[..., Fleet], github: Origin, early: bool
) -> None:
    fleet = fleet_of()
    for target in TARGETS:
        github.forbid(fleet.token(2), target)
    if early:
        refused = [fleet.get(2, target).status_code for target in TARGETS]
    others = [fleet.get(number, target).status_code for target in TARGETS for number in (0, 1)]
    if not early:
        refused = [fleet.get(2, target).status_code for target in TARGETS]
    assert refused == [404] * URLS
    assert others == [200] * (2 * URLS)


def test_a_token_whose_access_ends_sees_no_copy_of_its_peers(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    fleet = fleet_of()
    for target in TARGETS[1:]:
        fleet.get(0, target)
    assert fleet.get(2, TARGETS[1]).status_code == 200
    for target in TARGETS:
        github.forbid(fleet.token(2), target)
    assert [fleet.get(2, target).status_code for target in TARGETS[2:]] == [404] * (URLS - 2)
    assert [fleet.get(0, target).status_code for target in TARGETS] == [200] * URLS


def test_who_waits_for_a_refused_token_gets_its_own_answer(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    fleet = fleet_of()
    github.forbid(fleet.token(0), TARGETS[0])
    github.latency = 0.2
    with ThreadPoolExecutor(3) as pool:
        statuses = list(pool.map(lambda number: fleet.get(number, TARGETS[0]).status_code, range(3)))
    assert statuses == [404, 200, 200]


def test_a_body_that_differs_by_token_is_fetched_by_each(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    fleet = fleet_of()
    mine = fleet.get(0, TARGETS[0]).content
    github.resources[TARGETS[0]].body = b'{"permissions": "other"}'
    assert fleet.get(1, TARGETS[0]).content == b'{"permissions": "other"}'
    assert fleet.get(0, TARGETS[0]).content == mine
    assert [call.status for call in github.calls] == [200, 200]


def test_without_computed_validators_each_token_pays(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    fleet = fleet_of(computed_validators=False)
    for number in range(3):
        assert fleet.get(number, TARGETS[0]).status_code == 200
    assert github.counted() == 3


def test_a_fleet_that_is_one_user_by_declaration_needs_no_proof(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    fleet = fleet_of(shared_identity=True)
    bodies = [fleet.get(number, TARGETS[0]).content for number in range(3)]
    assert bodies == [github.resources[TARGETS[0]].body] * 3
    assert len(github.calls) == 1


def test_clients_that_differ_in_accept_encoding_share_an_entry_where_they_can(
    fleet_of: Callable[..., Fleet], github: Origin
) -> None:
    fleet = fleet_of()
    plain = fleet.get(0, TARGETS[0], headers={"Accept-Encoding": "identity"})
    both = fleet.get(0, TARGETS[0], headers={"Accept-Encoding": "gzip, deflate, br"})
    zipped = fleet.get(0, TARGETS[1], headers={"Accept-Encoding": "gzip"})
    unable = fleet.get(0, TARGETS[1], headers={"Accept-Encoding": "identity"})
    assert plain.content == both.content == github.resources[TARGETS[0]].body
    assert zipped.content == unable.content == github.resources[TARGETS[1]].body
    assert "content-encoding" not in unable.headers
    assert [call.target for call in github.calls] == [TARGETS[0], TARGETS[1], TARGETS[1]]


def test_at_the_limit_what_may_be_served_stale_is_and_no_storm_of_refusals_follows(
    fleet_of: Callable[..., Fleet], github: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    for resource in github.resources.values():
        resource.max_age = 0
    fleet = fleet_of()
    for target in TARGETS:
        fleet.get(0, target)
    github.limit = URLS
    before = len(github.calls)
    with caplog.at_level(logging.WARNING, logger="httpx_p2pcache"):
        answers = [fleet.get(0, target) for _ in range(3) for target in TARGETS]
    assert [answer.status_code for answer in answers] == [200] * (3 * URLS)
    assert all("detail=stale-if-error" in answer.headers["cache-status"] for answer in answers)
    assert [call.status for call in github.calls[before:]] == [403]
    assert "served stale" in caplog.text
    assert fleet.get(0, "/repos/octo-org/never-seen").status_code == 403


def test_the_whole_fleet_knows_the_quota_of_a_token(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    fleet = fleet_of()
    fleet.get(0, TARGETS[0])
    until = time.monotonic() + 10
    while not fleet.stat(1, "quotas"):
        assert time.monotonic() < until
        threading.Event().wait(0.01)
    (known,) = fleet.stat(1, "quotas")
    assert (known["resource"], known["limit"], known["remaining"]) == ("core", 5000, 4999)
    assert known["identity"] == fleet.stat(0, "quotas")[0]["identity"]


def test_one_runner_s_refusal_spares_the_others_theirs(fleet_of: Callable[..., Fleet], github: Origin) -> None:
    """Where runners have one token."""
    for resource in github.resources.values():
        resource.max_age = 0
    fleet = fleet_of()
    same = {"Authorization": fleet.token(0)}
    for number in range(3):
        fleet.get(number, TARGETS[0], headers=same)
    github.limit = 1
    assert fleet.get(0, TARGETS[0], headers=same).status_code == 200
    until = time.monotonic() + 10
    while not any(quota["refused_until"] > time.time() for quota in fleet.stat(1, "quotas")):
        assert time.monotonic() < until
        threading.Event().wait(0.01)
    before = len(github.calls)
    assert fleet.get(1, TARGETS[0], headers=same).status_code == 200
    assert len(github.calls) == before


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_that_is_about_the_token_is_never_hidden_by_a_stale_entry(
    fleet_of: Callable[..., Fleet], github: Origin, status: int
) -> None:
    for resource in github.resources.values():
        resource.max_age = 0
    fleet = fleet_of()
    fleet.get(0, TARGETS[0])
    github.fail(status)
    assert fleet.get(0, TARGETS[0]).status_code == status
    github.fail(503)
    assert fleet.get(0, TARGETS[0]).status_code in (status, 503)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_an_origin_that_fails_gives_way_to_a_stale_entry(
    fleet_of: Callable[..., Fleet], github: Origin, status: int
) -> None:
    for resource in github.resources.values():
        resource.max_age = 0
    fleet = fleet_of()
    fresh = fleet.get(0, TARGETS[0])
    github.fail(status)
    stale = fleet.get(0, TARGETS[0])
    assert (stale.status_code, stale.content) == (200, fresh.content)
    assert f"fwd=stale; fwd-status={status}; ttl=" in stale.headers["cache-status"]


def test_a_token_in_either_spelling_is_one_user_and_revalidates_free(github: Origin, local: Settings) -> None:
    target, now = TARGETS[0], {"Authorization": "Bearer one"}
    github.resources[target].max_age = 0
    settings = Settings(dir=local.dir, enable_p2p=False, github_hosts=(github.netloc,))
    with httpx.Client(transport=P2PCacheTransport(settings=settings), base_url=github.url) as client:
        client.get(target, headers={"Authorization": "token one"})
        answer = client.get(target, headers=now)
        again = client.get(target, headers=now)
    assert [call.status for call in github.calls] == [200, 304, 304]
    assert answer.content == again.content == github.resources[target].body

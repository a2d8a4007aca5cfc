"""A secret is replaced while the fleet works: nodes that hold the old one, both, and the new one alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import httpx
import pytest
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.testing import Origin

pytest.importorskip("libp2p")
pytestmark = pytest.mark.p2p

OLD, NEW = "the-old-secret-0123456789", "the-new-secret-9876543210"
Start = Callable[..., P2PCacheTransport]


@pytest.fixture
def start(settings_for: Callable[..., Settings], origin: Origin) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def begin(name: str, **changes: object) -> P2PCacheTransport:
            hosts = {"github_hosts": (origin.netloc,), "lookup_timeout": 5.0}
            transport = P2PCacheTransport(settings=settings_for(name, **(hosts | changes)))
            stack.callback(transport.close)
            return transport

        yield begin


def peers_of(transport: P2PCacheTransport) -> set[str]:
    return {peer["peer_id"] for peer in transport.stats()["peers"]}  # type: ignore[attr-defined]


def name_of(transport: P2PCacheTransport) -> str:
    assert eventually(lambda: transport.stats()["peer_id"] is not None, 30)  # its thread imports libp2p first
    return str(transport.stats()["peer_id"])


def ask(transport: P2PCacheTransport, url: str, token: str | None = None) -> httpx.Response:
    request = httpx.Request("GET", url, headers={"Authorization": f"Bearer {token}"} if token else {})
    response = transport.handle_request(request)
    response.read()
    return response


def test_old_and_new_meet_only_through_who_holds_both_and_share_there(start: Start, origin: Origin) -> None:
    both = start("both", shared_secret=NEW, previous_secret=OLD)
    old, new = start("old", shared_secret=OLD), start("new", shared_secret=NEW)
    meet = {name_of(both): {name_of(old), name_of(new)}, name_of(old): {name_of(both)}, name_of(new): {name_of(both)}}
    assert eventually(lambda: {name_of(one): peers_of(one) for one in (both, old, new)} == meet, 30)
    # Who holds both reaches most, and so is home to everything, once all have seen that.
    assert eventually(lambda: [one.stats()["unreached"] for one in (both, old, new)] == [0, 1, 1], 10)
    seen = [{peer["peer_id"]: peer["unreached"] for peer in one.stats()["peers"]} for one in (old, new)]  # type: ignore[attr-defined]
    assert seen == [{name_of(both): 0}] * 2
    for resource in origin.resources.values():  # what is for everybody is shared by all who hold either
        resource.fields["Cache-Control"] = "public, max-age=60"
    for number, first in enumerate((old, new, both)):
        url = f"{origin.url}/repos/octo-org/repo-{number}"
        assert ask(first, url).extensions["caching"]["source"] == "origin"
        ask(both, url)
        for other in (old, new):
            assert ask(other, url).content == origin.resources[f"/repos/octo-org/repo-{number}"].body
        assert len([call for call in origin.calls if call.target == httpx.URL(url).path]) == 1


def test_a_token_gets_its_own_answer_whatever_secret_the_others_hold(start: Start, origin: Origin) -> None:
    both = start("both", shared_secret=NEW, previous_secret=OLD)
    old = start("old", shared_secret=OLD)
    assert eventually(lambda: peers_of(both) == {name_of(old)}, 30)
    url, target = f"{origin.url}/repos/octo-org/repo-1", "/repos/octo-org/repo-1"
    for transport in (old, both, old, both):
        assert ask(transport, url, "ghp_of_somebody").content == origin.resources[target].body
    assert origin.counted() == 1  # under another secret it is another identity, whom a free 304 serves


def test_once_the_old_secret_is_dropped_nobody_of_the_old_fleet_is_let_in(start: Start) -> None:
    old = start("old", shared_secret=OLD)
    assert old.wait_until_joined(30)
    new, second = start("new", shared_secret=NEW), start("second", shared_secret=NEW)
    assert eventually(lambda: peers_of(new) == {name_of(second)}, 30)
    assert peers_of(old) == set()

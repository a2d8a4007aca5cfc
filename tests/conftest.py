from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from secret import secret_of

from httpx_p2pcache import Settings, network
from httpx_p2pcache.testing import Origin, made_up


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every async test runs on both."""
    return str(request.param)


@pytest.fixture
def origin() -> Iterator[Origin]:
    """A stand-in GitHub with ten resources, /repos/octo-org/repo-0 to -9."""
    with Origin(made_up(10)) as server:
        yield server


@pytest.fixture
def settings_for(tmp_path: Path) -> Callable[..., Settings]:
    """``settings_for("a")``: a runner of its own; those of one test share registry and secret. P2P is on."""

    def build(name: str = "runner", **changes: object) -> Settings:
        plain = {
            "dir": tmp_path / name,
            "peer_registry": tmp_path / "registry",
            "shared_secret": secret_of(tmp_path),
            "listen_host": "127.0.0.1",
            "listen_port": 0,
            "join_timeout": 10.0,
            "public_bootstrap": False,
        }
        return Settings(**(plain | changes))  # type: ignore[arg-type] # heterogeneous on purpose

    return build


@pytest.fixture
def secret(settings_for: Callable[..., Settings]) -> str:
    """What the runners of one test share."""
    return settings_for().shared_secret


@pytest.fixture
def local(settings_for: Callable[..., Settings]) -> Settings:
    """A local cache without peers."""
    return settings_for(enable_p2p=False)


@pytest.fixture
def no_multicast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that have no registry in common do not find each other all the same."""
    mdns = pytest.importorskip("httpx_p2pcache.node.discovery.mdns")

    def fail(*_: object) -> None:
        raise OSError("no multicast here")

    monkeypatch.setattr(mdns.LocalNetwork, "announce", fail)


@pytest.fixture(autouse=True)
def _said_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once per process is said once per test here."""
    monkeypatch.setattr(network, "_said", set())


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "GITHUB_TOKEN",
        "GH_TOKEN",
        "GITHUB_REPOSITORY",
        "RUNNER_TEMP",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CACHE_PUBLIC_BOOTSTRAP", "false")  # no test has anybody outside to talk to


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """A transport that was closed leaves no thread; one that a test forgot to close is that test's failure."""
    before = set(threading.enumerate())
    yield
    left = {t.name for t in set(threading.enumerate()) - before if t.name.startswith("p2pcache")}
    for thread in set(threading.enumerate()) - before:
        if thread.name == "p2pcache-ssl":  # ends by itself
            thread.join(5)
            left.discard(thread.name)
    left.discard("p2pcache-store")  # lives within the life of a transport, which several tests may share
    assert not left, f"threads left behind: {left}"
    logging.getLogger("httpx_p2pcache").setLevel(logging.NOTSET)

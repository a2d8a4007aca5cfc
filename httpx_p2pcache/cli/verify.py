"""``p2pcache verify``: is everything there that sharing needs? Each line says yes, or what to do."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import typer

from httpx_p2pcache.cli.discovered import is_peer
from httpx_p2pcache.cli.show import Json, print_json
from httpx_p2pcache.daemon import life
from httpx_p2pcache.exceptions import SettingsError
from httpx_p2pcache.files import private_directory
from httpx_p2pcache.settings import ADVICE, Settings, can_be_guessed
from httpx_p2pcache.sockets import door_socket, open_to_us_alone

app = typer.Typer()

JOIN_SECONDS = 30.0


class Check(msgspec.Struct):
    """One line. ``right`` is None for what need not be."""

    about: str
    right: bool | None
    said: str


@app.command()
def verify(as_json: Json = False) -> None:
    """Check settings, secret, port, store, registry, peers, and a round trip through a second node started for it.

    Exit status 0: sharing works here; 1: a line is marked ✗, and says what to do.
    """
    checks = []
    for check in _checks():
        checks.append(check)
        if not as_json:
            print(f"{_mark(check.right)} {check.about}: {check.said}", flush=True)
    if as_json:
        print_json(checks)
    raise typer.Exit(0 if all(check.right is not False for check in checks) else 1)


def _mark(right: bool | None) -> str:
    mark = {True: "✓", False: "✗", None: "-"}[right]
    try:
        mark.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return {True: "yes", False: "NO", None: "-"}[right]
    return mark


def _checks() -> Iterator[Check]:
    try:
        settings = Settings.from_env()
    except SettingsError as exc:
        yield Check("settings", False, str(exc))
        return
    yield Check("settings", True, f"read; the fleet is {settings.fleet!r}")
    yield _secret(settings)
    if settings.previous_secret and can_be_guessed(settings.previous_secret):
        yield Check("previous secret", False, f"can be guessed, so nothing is shared. {ADVICE}")
    if not settings.enable_p2p or settings.node == "none":
        yield Check("sharing", False, "is off: set CACHE_ENABLE_P2P=true, and not CACHE_NODE=none")
    yield _libp2p()
    store = _directory("store", settings.dir, "CACHE_DIR")
    yield store
    try:
        if store.right:
            open_to_us_alone(door_socket(settings.dir).parent)
    except OSError as exc:
        yield Check("sockets", False, f"no daemon can listen: {exc}")
    for text in settings.bootstrap_peers:
        if not is_peer(text):
            yield Check("bootstrap", False, f"{text!r} in CACHE_BOOTSTRAP_PEERS is not a peer's multiaddr")
    yield _directory("registry", settings.registry, "CACHE_PEER_REGISTRY")
    status = life.Remote(settings.dir).get("/status")
    if status is not None:
        yield _daemon(settings, status)
    yield _port(settings, status)
    yield _peers(status)
    try:
        yield _round_trip()
    except Exception as exc:  # whatever it is, it is what the user wants to know
        yield Check("round trip", False, f"through a second node failed: {type(exc).__name__}: {exc}")


def _secret(settings: Settings) -> Check:
    if not settings.shared_secret:
        return Check(
            "secret", False, "there is none: set CACHE_SHARED_SECRET (or GITHUB_TOKEN) to the same for all runners"
        )
    if "CACHE_SHARED_SECRET" not in os.environ and os.environ.get("GITHUB_ACTIONS") == "true":
        return Check("secret", False, "is GITHUB_TOKEN, which differs from job to job: set CACHE_SHARED_SECRET")
    if can_be_guessed(settings.shared_secret):
        return Check("secret", False, f"can be guessed, so nothing is shared. {ADVICE}")
    return Check("secret", True, f"{len(settings.shared_secret)} characters")


def _libp2p() -> Check:
    try:
        return Check("libp2p", True, importlib.metadata.version("libp2p"))
    except importlib.metadata.PackageNotFoundError:
        return Check("libp2p", False, "is not installed: pip install 'httpx-p2pcache[p2p]'")


def _directory(about: str, path: Path, variable: str) -> Check:
    try:
        private_directory(path)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as exc:
        return Check(about, False, f"{path} cannot be written ({exc.strerror}): set {variable}")
    return Check(about, True, f"{path} can be written")


def _daemon(settings: Settings, status: dict[str, Any]) -> Check:
    if not life.is_for(settings, status):
        return Check("daemon", False, f"the one that runs is for {life.FOREIGN}")
    if not status["p2p_enabled"]:
        why = status.get("off_because") or "see its log"
        return Check("daemon", False, f"does not share: {why}; then p2pcache stop, and p2pcache init")
    return Check("daemon", True, f"runs (process {status['pid']})")


def _port(settings: Settings, status: dict[str, Any] | None) -> Check:
    if status is not None:
        addresses = status["addresses"]
        return Check("port", True if addresses else None, f"the daemon listens on {', '.join(addresses) or 'none'}")
    family = socket.AF_INET6 if ":" in settings.listen_host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((settings.listen_host, settings.listen_port))
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return Check("port", None, f"{settings.listen_port} is taken: the next free one will be announced")
        where = f"{settings.listen_host}, port {settings.listen_port}"
        said = f"a node cannot listen on {where} ({exc.strerror}): set CACHE_LISTEN_HOST or CACHE_LISTEN_PORT"
        return Check("port", False, said)
    return Check("port", True, f"{settings.listen_port} is free")


def _peers(status: dict[str, Any] | None) -> Check:
    if status is None:
        return Check("peers", None, "no daemon runs, so none are connected: p2pcache init starts one")
    count = status["connected_peers"]
    if count:
        return Check("peers", True, f"{count} connected")
    return Check("peers", None, 'none are connected yet: docs/troubleshooting.md, "No peers"')


def _round_trip() -> Check:
    """Two nodes of a fleet of their own: what one has fetched, the other gets from it."""
    import httpx

    from httpx_p2pcache.testing import Origin, made_up
    from httpx_p2pcache.transport import P2PCacheTransport

    secret, name = secrets.token_hex(16), f"verify-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="p2pcache-verify-") as scratch, Origin(made_up(1)) as origin:

        def node(number: int) -> P2PCacheTransport:
            return P2PCacheTransport(
                settings=Settings(
                    dir=Path(scratch) / str(number),
                    peer_registry=Path(scratch) / "peers",
                    shared_secret=secret,
                    fleet=name,
                    listen_host="127.0.0.1",
                    listen_port=0,
                    lookup_timeout=5.0,  # whether it works is the question, not how fast this machine is now
                    node="embedded",
                )
            )

        url = origin.url + next(iter(origin.resources))
        first, second = node(1), node(2)
        with httpx.Client(transport=first, trust_env=False) as one, httpx.Client(transport=second) as two:
            if not all(transport.wait_until_joined(JOIN_SECONDS) for transport in (first, second)):
                return Check("round trip", False, "the nodes did not start: see the warnings above")
            _until(lambda: first.stats()["connected_peers"] == 1 == second.stats()["connected_peers"])
            body = one.get(url).content
            answer = two.get(url)
        calls = len(origin.calls)
    if calls != 1 or answer.content != body:
        return Check("round trip", False, "the second node had to ask the origin: is this machine very busy?")
    return Check("round trip", True, "what one node fetched, a second got from it, sealed, over libp2p")


def _until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + JOIN_SECONDS
    while not true() and time.monotonic() < until:
        time.sleep(0.05)

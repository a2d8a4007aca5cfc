"""The cache for PyGithub: ``with pygithub_cache(): …``, or :func:`install` for the whole process.

What PyGithub opens from then on is a connection as before, with its pool, retries and session, whose adapter is
:class:`~httpx_p2pcache.integrations.requests.P2PCacheAdapter`. ``seconds_between_requests`` counts from one call at the
origin to the next: an answer from the cache waits for nothing, and holds up nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import github.Requester
import requests

from httpx_p2pcache.answers import Answer
from httpx_p2pcache.integrations.requests import P2PCacheAdapter
from httpx_p2pcache.runner import Usage
from httpx_p2pcache.settings import Settings

# PyGithub's own, by the names that its class body gives them; where a release has others, hits wait as they did.
_DEFER, _RECORD = "_Requester__deferRequest", "_Requester__recordRequestTime"
_CONNECTION, _CLASS = "_Requester__connection", "_Requester__connectionClass"


class _Turn(threading.local):
    """What the request that this thread is making would have waited for, and whether the origin was asked.

    ``depth``: a redirect is followed within the request that met it.
    """

    defer: Callable[[], None] | None = None
    asked = True
    depth = 0


_turn = _Turn()


class _Adapter(P2PCacheAdapter):
    def before_origin(self) -> None:
        defer, _turn.defer = _turn.defer, None
        _turn.asked = True
        if defer is not None:
            defer()

    def _response(self, answer: Answer, request: requests.PreparedRequest) -> requests.Response:
        response = super()._response(answer, request)
        if answer.caching["from_cache"] and not answer.caching["revalidated"]:
            # What was left of the limit then is not what is left now: PyGithub remembers the last it was told.
            for name in [name for name in response.headers if name.lower().startswith("x-ratelimit-")]:
                del response.headers[name]
        return response


class _Installed:
    """PyGithub as it was before, and the runner that is kept while no connection is open."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._usage = Usage(settings)
        self._before: list[tuple[type, str, Any]] = []
        for connection, scheme in (
            (github.Requester.HTTPSRequestsConnectionClass, "https://"),
            (github.Requester.HTTPRequestsConnectionClass, "http://"),
        ):
            self._replace(connection, "__init__", self._opening(connection.__init__, scheme))
        if hasattr(github.Requester.Requester, _DEFER) and hasattr(github.Requester.Requester, _RECORD):
            self._replace(github.Requester.Requester, _DEFER, _deferring(getattr(github.Requester.Requester, _DEFER)))
            self._replace(github.Requester.Requester, _RECORD, _recording(getattr(github.Requester.Requester, _RECORD)))

    def _replace(self, owner: type, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _opening(self, original: Any, scheme: str) -> Any:
        settings = self._settings

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it takes the place of one
            original(self, *args, **kwargs)
            self.adapter = _Adapter(
                max_retries=self.retry, pool_connections=self.pool_size, pool_maxsize=self.pool_size, settings=settings
            )
            self.session.mount(scheme, self.adapter)

        return __init__

    def undo(self) -> None:
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)
        self._usage.close()


def _deferring(original: Any) -> Any:
    def defer(self: Any, verb: str) -> None:
        _turn.depth += 1
        if _turn.depth == 1:
            _turn.asked = False
        if _is_ours(self):
            _turn.defer = lambda: original(self, verb)
        else:
            _turn.asked = True
            original(self, verb)

    return defer


def _is_ours(requester: Any) -> bool:
    """Whether the connection that a requester will use goes through the cache."""
    connection = getattr(requester, _CONNECTION, None)
    if connection is not None:
        return isinstance(getattr(connection, "adapter", None), _Adapter)
    kind = getattr(requester, _CLASS, None)
    ours = (github.Requester.HTTPRequestsConnectionClass, github.Requester.HTTPSRequestsConnectionClass)
    return isinstance(kind, type) and issubclass(kind, ours)


def _recording(original: Any) -> Any:
    def record(self: Any, verb: str) -> None:
        _turn.defer = None
        _turn.depth = max(0, _turn.depth - 1)
        if _turn.asked:
            original(self, verb)

    return record


_lock = threading.Lock()
_installed: _Installed | None = None
_depth = 0


def install(settings: Settings | None = None) -> None:
    """Have every connection that PyGithub opens from now on go through the cache, until :func:`uninstall`.

    ``settings`` default to the environment's. Each call is to be matched by one of ``uninstall``; while it is
    installed, another call's settings do not count. Raises :class:`~httpx_p2pcache.SettingsError`.
    """
    global _installed, _depth
    with _lock:
        if _installed is None:
            _installed = _Installed(Settings.from_env() if settings is None else settings)
        _depth += 1


def uninstall() -> None:
    """Undo one :func:`install`. With the last, PyGithub is as it was; connections that are open stay as they are."""
    global _installed, _depth
    with _lock:
        _depth = max(0, _depth - 1)
        if _depth == 0 and _installed is not None:
            _installed.undo()
            _installed = None


@contextmanager
def pygithub_cache(settings: Settings | None = None) -> Iterator[None]:
    """PyGithub with the cache, for the length of a ``with`` block; see :func:`install`."""
    install(settings)
    try:
        yield
    finally:
        uninstall()

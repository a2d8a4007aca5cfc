"""The cache for requests: ``session.mount("https://", P2PCacheAdapter())``.

The origin is reached through requests' own ``HTTPAdapter``, which this class is: its pools, proxies, certificates and
retries stay in force, and so do a session's cookies, hooks and redirects.
"""

from __future__ import annotations

import io
import threading
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import hishel
import requests
from hishel import Headers
from requests.adapters import HTTPAdapter
from urllib3 import HTTPHeaderDict, HTTPResponse

from httpx_p2pcache.answers import Answer, Reply, Way
from httpx_p2pcache.keep import Keep
from httpx_p2pcache.pump import Fields, drive
from httpx_p2pcache.runner import Usage
from httpx_p2pcache.settings import Settings

_REASONS = {status.value: status.phrase for status in HTTPStatus}


class P2PCacheAdapter(HTTPAdapter):
    """An RFC 9111 cache that shares with the fleet, for any ``requests.Session``.

    Takes what ``HTTPAdapter`` takes (``pool_connections``, ``max_retries``, …), and ``settings``, which default to the
    environment's. Every response has ``Cache-Status`` (RFC 9211) among its headers, and the attributes ``from_cache``
    and ``caching``: the mapping that httpx's responses have in ``extensions["caching"]``. ``elapsed`` is the time that
    the session waited; ``close`` gives back the runner, and returns within two seconds.
    """

    __attrs__ = [*HTTPAdapter.__attrs__, "settings"]  # noqa: RUF012 - what is pickled, as HTTPAdapter says it

    def __init__(self, *args: Any, settings: Settings | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = Settings.from_env() if settings is None else settings
        self._usage = Usage(self.settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc] # typeshed does not know it
        self._usage = Usage(self.settings)

    def stats(self) -> dict[str, object]:
        """The counters of this adapter's runner, and the state of its node; see :func:`httpx_p2pcache.get_stats`."""
        return self._usage.exchange.describe()

    def wait_until_joined(self, timeout: float = 10.0) -> bool:
        """Wait until the node has reached the peers it knows; false if it has not in ``timeout`` seconds, or cannot."""
        return self._usage.wait_until_joined(timeout)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,  # noqa: ARG002 - HTTPAdapter's signature; the session reads what is no stream
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        def send_on(added: Fields) -> Reply:
            self.before_origin()
            sent = request
            if added:
                sent = request.copy()
                sent.headers.update(added)
            # Always as a stream: the body is kept as it is read, below requests.
            native = HTTPAdapter.send(self, sent, True, timeout, verify, cert, proxies)
            return Reply(native.status_code, _fields(native.raw.headers), native)

        exchange, asked = self._usage.exchange, _asked(request)
        answer = exchange.hit(asked)
        if answer is None:
            way = exchange.way(asked, threading.get_ident(), _patience(timeout), background=True)
            answer = drive(way, send_on, _discard)
            afterwards = answer.afterwards
            if afterwards is not None:

                def revalidate(way: Way = afterwards) -> None:
                    response = self._response(drive(way, send_on, _discard), request)
                    response.content  # noqa: B018 - read to its end, it is kept
                    response.close()

                self._usage.in_background(revalidate)
        return self._response(answer, request)

    def before_origin(self) -> None:
        """Called each time before the origin is asked; for subclasses that have to wait there."""

    def _response(self, answer: Answer, request: requests.PreparedRequest) -> requests.Response:
        if answer.reply is not None:
            response: requests.Response = answer.reply.native
            if answer.keep is not None:
                response.raw = _kept(response.raw, answer.keep, request.method or "GET")
        else:
            response = self.build_response(request, _raw(answer, request.method or "GET"))
        response.request = request
        response.headers["Cache-Status"] = f"p2pcache; {answer.cache_status}"
        response.caching = answer.caching  # type: ignore[attr-defined] # requests has no place for it
        response.from_cache = answer.caching["from_cache"]  # type: ignore[attr-defined] # as other caches call it
        return response

    def close(self) -> None:
        super().close()
        self._usage.close()


def _asked(request: requests.PreparedRequest) -> hishel.Request:
    """The request as the exchange sees it: no fragment, no port that is the scheme's own, values as text."""
    fields: dict[str, list[str]] = {}
    for name, value in request.headers.items():
        fields[_text(name).lower()] = [_text(value)]
    if request.body is not None and "content-length" not in fields:
        fields["transfer-encoding"] = ["chunked"]  # as requests will send it
    parts = urlsplit((request.url or "").partition("#")[0])
    host = parts.netloc.rpartition("@")[2].lower()
    if parts.port is not None and parts.port == {"http": 80, "https": 443}.get(parts.scheme):
        host = host.rpartition(":")[0]  # PyGithub writes it, others do not
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    url = f"{parts.scheme}://{host}{target}"
    return hishel.Request(request.method or "GET", url, Headers(fields))


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _fields(headers: HTTPHeaderDict) -> Headers:
    fields: dict[str, list[str]] = {}
    for name, value in headers.iteritems():
        fields.setdefault(name.lower(), []).append(value)
    return Headers(fields)


def _patience(timeout: Any) -> float | None:
    """For how many seconds the caller would wait for an answer of the origin; None: for ever."""
    if isinstance(timeout, tuple):
        timeout = timeout[1]
    read = getattr(timeout, "read_timeout", timeout)
    return float(read) if isinstance(read, (int, float)) else None


def _discard(reply: Reply) -> None:
    """Be done with a response that nobody gets, so that its connection is free."""
    response: requests.Response = reply.native
    try:
        if response.status_code == 304:
            response.content  # noqa: B018 - it has none, but its end must be read
        response.close()
    except Exception:  # noqa: S110 - how it fails does not matter to anybody
        pass


def _raw(answer: Answer, method: str) -> HTTPResponse:
    """A stored entry as urllib3 would have received it; without one, the 504 of RFC 9111 §5.2.1.7."""
    stored, view = answer.stored, answer.view
    status, body, fields = 504, b"", HTTPHeaderDict()
    if stored is not None:
        status, body = stored.entry.status, stored.entry.body
        dropped: frozenset[str] | tuple[str, ...] = ()
        if view is not None:
            status, body, dropped = view.status, view.body, tuple(view.dropped)
        for name, value in stored.raw_headers:
            if name.decode("latin-1") not in dropped:
                fields.add(name.decode("latin-1"), value.decode("latin-1"))
        for name_, value_ in view.added if view is not None else ():
            fields.add(name_, value_)
        fields.add("age", str(int(answer.age)))
    return HTTPResponse(
        body=io.BytesIO(b"" if method == "HEAD" else body),
        headers=fields,
        status=status,
        version=11,
        reason=_REASONS.get(status, ""),
        preload_content=False,
        request_method=method,
        enforce_content_length=False,
    )


def _kept(raw: Any, keep: Keep, method: str) -> HTTPResponse:
    """The origin's response, whose body is kept as it is read from it."""
    return HTTPResponse(
        body=_KeptBody(raw, keep),
        headers=raw.headers,
        status=raw.status,
        version=raw.version,
        reason=raw.reason,
        preload_content=False,
        original_response=raw._original_response,
        request_method=method,
        request_url=raw.geturl(),
        enforce_content_length=False,  # the response below does
    )


class _KeptBody(io.RawIOBase):
    """The body as it came, not decoded, for the response above; what passes is kept."""

    def __init__(self, raw: Any, keep: Keep) -> None:
        self._raw = raw
        self._keep = keep
        self._finished = False

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size == 0:
            return b""
        part: bytes = self._raw.read(None if size is None or size < 0 else size, decode_content=False)
        if part:
            self._keep.feed(part)
        # urllib3 gives fewer bytes than asked for at the end alone; a caller that knows the length never asks again.
        if not self._finished and (not part or size is None or size < 0 or self._raw.closed):
            self._finished = True
            self._keep.finish()
        return part

    def readinto(self, buffer: Any) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        if not self.closed:
            self._keep.abandon()
            self._raw.close()
            self._raw.release_conn()
        super().close()

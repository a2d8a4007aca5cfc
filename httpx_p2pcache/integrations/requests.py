"""The cache for requests: ``session.mount("https://", P2PCacheAdapter())``.

The origin is reached through requests' own ``HTTPAdapter``, which this class is: its pools, proxies, certificates and
retries stay in force, and so do a session's cookies, hooks and redirects.
"""

from __future__ import annotations

import http.client
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import hishel
import requests
from hishel import Headers
from requests.adapters import HTTPAdapter
from urllib3 import HTTPHeaderDict, HTTPResponse, Timeout

from httpx_p2pcache.answers import Answer, Miss, Reply, Way
from httpx_p2pcache.entries import authority
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
        if not verify and asked.url.startswith("https:"):
            # Whose answer this is nobody has made sure of: it is not for those who do.
            return self._response(drive(exchange.pass_by(asked, "bypass"), send_on, _discard, _read), request)
        answer = exchange.hit(asked, in_memory=False)
        if isinstance(answer, Miss):
            way = exchange.way(asked, threading.get_ident(), _patience(timeout), background=True, miss=answer)
            answer = drive(way, send_on, _discard, _read)
            afterwards = answer.afterwards
            if afterwards is not None:

                def revalidate(way: Way = afterwards.way) -> None:
                    response = self._response(drive(way, send_on, _discard, _read), request)
                    response.content  # noqa: B018 - read to its end, it is kept
                    response.close()

                self._usage.in_background(revalidate, afterwards.done)
        return self._response(answer, request)

    def before_origin(self) -> None:
        """Called each time before the origin is asked; for subclasses that have to wait there."""

    def _response(self, answer: Answer, request: requests.PreparedRequest) -> requests.Response:
        if answer.reply is not None:
            response: requests.Response = answer.reply.native
            if answer.keep is not None:
                raw: Any = response.raw
                raw._p2pcache_keep = answer.keep
                raw.__class__ = _Kept
        else:
            response = self.build_response(request, _raw(answer, request))
        response.request = request
        before = response.headers.get("Cache-Status")  # of a cache that is nearer to the origin: RFC 9211 §2
        ours = f"p2pcache; {answer.cache_status}"
        response.headers["Cache-Status"] = ours if before is None else f"{before}, {ours}"
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
    if fields.get("host") == [urlsplit(request.url or "").netloc.rpartition("@")[2]]:  # it says no more than the URL
        del fields["host"]
    if request.body is not None and "content-length" not in fields:
        fields["transfer-encoding"] = ["chunked"]  # as requests will send it
    parts = urlsplit((request.url or "").partition("#")[0])
    host = authority(parts).rpartition("@")[2]  # PyGithub writes the port, others do not
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
        timeout = timeout[1] if len(timeout) == 2 else None  # else it is requests that complains
    if isinstance(timeout, Timeout):
        limits = [limit for limit in (timeout.total, timeout._read) if isinstance(limit, (int, float))]
        return min(limits, default=None)
    return float(timeout) if isinstance(timeout, (int, float)) else None


def _read(reply: Reply) -> bytes:
    return b"".join(reply.native.raw.stream(decode_content=False))


def _discard(reply: Reply) -> None:
    """Be done with a response that nobody gets, so that its connection is free."""
    response: requests.Response = reply.native
    try:
        if response.status_code == 304:
            response.content  # noqa: B018 - it has none, but its end must be read
        response.close()
    except Exception:  # noqa: S110 - how it fails does not matter to anybody
        pass


def _raw(answer: Answer, request: requests.PreparedRequest) -> HTTPResponse:
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
        body=io.BytesIO(b"" if request.method == "HEAD" else body),
        headers=fields,
        status=status,
        version=11,
        version_string="HTTP/1.1",
        reason=_REASONS.get(status, ""),
        preload_content=False,
        decode_content=False,  # as requests has it: it asks for that itself
        original_response=_Original(fields),  # type: ignore[arg-type] # as much of one as is needed
        request_method=request.method,
        request_url=request.path_url,
        enforce_content_length=False,
    )


class _Original:
    """As much of an ``http.client`` response as a stored one needs: requests takes cookies from its fields."""

    def __init__(self, fields: HTTPHeaderDict) -> None:
        self.msg = http.client.HTTPMessage()
        for name, value in fields.iteritems():
            self.msg[name] = value

    def isclosed(self) -> bool:
        return True

    def close(self) -> None: ...


class _Kept(HTTPResponse):
    """The origin's response itself, whose body is kept as it is read; put in the place of its class.

    Another response around it would lose what comes in chunks as it comes, and more that users see. So these are the
    three places, not public, at which urllib3 2 reads: it is pinned.
    """

    _p2pcache_keep: Keep | None  # until its end, whichever that is

    def _raw_read(self, amt: int | None = None, *, read1: bool = False) -> bytes:
        with self._failing():
            part = super()._raw_read(amt, read1=read1)
        if part:
            self._feed(part)
        closed = self._fp is None or bool(getattr(self._fp, "isclosed", lambda: False)())
        if closed or (not part and amt != 0) or (amt is None and not read1):
            self._finish()
        return part

    def _handle_chunk(self, amt: int | None) -> bytes:
        with self._failing():
            part = super()._handle_chunk(amt)
        self._feed(part)
        return part

    def _update_chunk_length(self) -> None:
        with self._failing():
            super()._update_chunk_length()
        if self.chunk_left == 0:
            self._finish()

    def close(self) -> None:
        self._abandon()
        super().close()

    def __del__(self) -> None:
        if self._p2pcache_keep is not None:
            self._p2pcache_keep.forget()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._abandon()  # at once: whoever holds the exception may hold this response for long
            raise

    def _feed(self, part: bytes) -> None:
        if self._p2pcache_keep is not None:
            self._p2pcache_keep.feed(part)

    def _finish(self) -> None:
        keep, self._p2pcache_keep = self._p2pcache_keep, None
        if keep is not None and not keep.put_off():
            keep.finish()

    def _abandon(self) -> None:
        keep, self._p2pcache_keep = self._p2pcache_keep, None
        if keep is not None:
            keep.abandon()

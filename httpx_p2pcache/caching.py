"""The transport for httpx, and for httpx2, its continuation: one implementation, as they differ in name alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
import hishel
from hishel import Headers

from httpx_p2pcache.answers import Answer, Miss, Reply, Way
from httpx_p2pcache.claims import Seated
from httpx_p2pcache.exceptions import ConfigurationError
from httpx_p2pcache.keep import Keep
from httpx_p2pcache.origins import Origins
from httpx_p2pcache.pump import Fields, async_drive, asyncio_loop, drive, in_thread
from httpx_p2pcache.runner import CLOSE_SECONDS, Usage
from httpx_p2pcache.settings import Settings

if TYPE_CHECKING:
    from asyncio import Task

logger = logging.getLogger("httpx_p2pcache")


class CachingTransport:
    """What the transports of both libraries are made of; ``_library`` is httpx or httpx2."""

    _library: ClassVar[Any]

    def __init__(self, next_transport: Any = None, *, settings: Settings | None = None) -> None:
        if isinstance(next_transport, Settings):
            raise ConfigurationError("the settings are given by name: P2PCacheTransport(settings=...)")
        if not isinstance(settings, (Settings, NoneType)):
            raise ConfigurationError(f"settings has to be a Settings, not {type(settings).__name__}")
        self.settings = Settings.from_env() if settings is None else settings
        self.next_transport = next_transport
        self._usage = Usage(self.settings)
        self._exchange = self._usage.exchange
        self._origins = None
        if next_transport is None:
            self._origins = Origins(self._library, at_once=not self._exchange.network.active)
        self._tasks: set[Task[None]] = set()

    def __repr__(self) -> str:
        return f"<P2PCacheTransport dir={str(self.settings.dir)!r} p2p={self._exchange.network.active}>"

    def stats(self) -> dict[str, object]:
        """The counters of this transport's runner, and the state of its node; see :func:`httpx_p2pcache.get_stats`."""
        return self._exchange.describe()

    def wait_until_joined(self, timeout: float = 10.0) -> bool:
        """Wait until the node has reached the peers it knows; false if it has not in ``timeout`` seconds, or cannot.

        Nobody needs to call this. It is for scripts that want to share from their first request on.
        """
        return self._usage.wait_until_joined(timeout)

    def _handle(self, request: Any) -> Any:
        asked = _asked(request)
        answer = self._exchange.hit(asked, in_memory=False)
        if isinstance(answer, Miss):
            way = self._exchange.way(asked, threading.get_ident(), _patience(request), background=True, miss=answer)
            answer = self._drive(way, request)
            afterwards = answer.afterwards
            if afterwards is not None:
                self._usage.in_background(lambda: self._revalidate(afterwards.way, request), afterwards.done)
        return self._response(answer, request)

    def _revalidate(self, way: Way, request: Any) -> None:
        """What goes on after a stale answer was given; the caller has it, and hears of no failure."""
        response = self._response(self._drive(way, request), request)
        try:
            response.read()
        finally:
            response.close()

    async def _handle_async(self, request: Any) -> Any:
        asked = _asked(request)
        answer = self._exchange.hit(asked)
        if isinstance(answer, Miss):
            # trio has no place for a task that outlives its caller: there the caller waits for the revalidation.
            loop = asyncio_loop()
            caller = Seated(threading.get_ident(), anyio.get_current_task().id)
            way = self._exchange.way(asked, caller, _patience(request), background=loop is not None, miss=answer)
            answer = await self._async_drive(way, request)
            if answer.afterwards is not None and loop is not None:
                afterwards = answer.afterwards
                task = loop.create_task(self._async_revalidate(afterwards.way, request))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(lambda _: afterwards.done())  # also if it never began
        return self._response(answer, request, sync=False)

    async def _async_revalidate(self, way: Way, request: Any) -> None:
        try:
            response = self._response(await self._async_drive(way, request), request, sync=False)
            try:
                await response.aread()
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS):
                    await response.aclose()
        except Exception as exc:
            logger.debug("a revalidation in the background has failed: %s", type(exc).__name__)

    def _response(self, answer: Answer, request: Any, *, sync: bool = True) -> Any:
        return _response(self._library, answer, request, _kept_streams(self._library)[0 if sync else 1])

    def _drive(self, way: Way, request: Any) -> Answer:
        def send(added: Fields) -> Reply:
            origin = self._sync_origin(request.url)
            response = origin.handle_request(_with(self._library, request, added))
            return _reply(self._library, response, request.method)

        return drive(way, send, _discard, _read)

    async def _async_drive(self, way: Way, request: Any) -> Answer:
        async def send(added: Fields) -> Reply:
            origin = self._async_origin(request.url)
            response = await origin.handle_async_request(_with(self._library, request, added))
            return _reply(self._library, response, request.method)

        return await async_drive(way, send, _async_discard, _async_read)

    def _sync_origin(self, url: Any) -> Any:
        origin = self._origins.sync_for(url) if self._origins is not None else self.next_transport
        if not hasattr(origin, "handle_request"):
            raise ConfigurationError(
                f"{self._library.__name__}.Client needs a sync next_transport (one with handle_request), "
                f"not {type(origin).__name__}"
            )
        return origin

    def _async_origin(self, url: Any) -> Any:
        origin = self._origins.async_for(url) if self._origins is not None else self.next_transport
        if not hasattr(origin, "handle_async_request"):
            raise ConfigurationError(
                f"{self._library.__name__}.AsyncClient needs an async next_transport (one with handle_async_request), "
                f"not {type(origin).__name__}"
            )
        return origin

    def close(self) -> None:
        self._usage.close()
        inner: Any = self._origins or self.next_transport
        if hasattr(inner, "close"):
            inner.close()

    async def aclose(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await in_thread(self._usage.close)
        inner: Any = self._origins or self.next_transport
        if hasattr(inner, "aclose"):
            await inner.aclose()


def _read(reply: Reply) -> bytes:
    return b"".join(reply.native.iter_raw())


async def _async_read(reply: Reply) -> bytes:
    return b"".join([part async for part in reply.native.aiter_raw()])


def _discard(reply: Reply) -> None:
    """Be done with a response that nobody gets. A 304 has no content, but its end must be read."""
    response = reply.native
    try:
        if response.status_code == 304:
            response.read()
        response.close()
    except Exception:  # noqa: S110 - how it fails does not matter to anybody
        pass


async def _async_discard(reply: Reply) -> None:
    response = reply.native
    with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS):
        try:
            if response.status_code == 304:
                await response.aread()
            await response.aclose()
        except Exception:  # noqa: S110 - how it fails does not matter to anybody
            pass


def _patience(request: Any) -> float | None:
    """For how many seconds the caller would wait for an answer of the origin; None: for ever."""
    timeout = request.extensions.get("timeout") or {}
    patience: float | None = timeout.get("read")
    return patience


def _asked(request: Any) -> hishel.Request:
    """The request as the exchange sees it: no user information, no fragment, no Host but one that is not the URL's,
    lines of one field kept apart."""
    url = request.url
    fields: dict[str, list[str]] = {}
    for name, value in request.headers.raw:
        fields.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    authority = url.netloc.decode("ascii")
    if fields.get("host") == [authority]:  # it says no more than the URL
        del fields["host"]
    # httpcore sends the extension "target" in the place of the path, if there is one: then that is asked for.
    target: bytes = request.extensions.get("target") or url.raw_path
    asked = f"{url.scheme}://{authority}{target.decode('latin-1')}"
    return hishel.Request(request.method, asked, Headers(fields))


def _with(library: Any, request: Any, added: Fields) -> Any:
    """The caller's request with ``added`` fields in the place of its own of those names."""
    if not added:
        return request
    kept = [(name, value) for name, value in request.headers.raw if name.decode("latin-1").lower() not in added]
    return library.Request(
        request.method,
        request.url,
        headers=[*kept, *((name.encode(), value.encode("latin-1")) for name, value in added.items())],
        stream=request.stream,
        extensions=request.extensions,
    )


def _reply(library: Any, response: Any, method: str) -> Reply:
    if getattr(response, "is_stream_consumed", False) and not isinstance(response.stream, library.ByteStream):
        response = _unread(library, response, method)
    fields: dict[str, list[str]] = {}
    for name, value in response.headers.raw:
        fields.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return Reply(response.status_code, Headers(fields), response)


def _unread(library: Any, response: Any, method: str) -> Any:
    """A response that a transport below has read already, as one that can be read: by then it is decoded."""
    try:
        body: bytes = response.content
    except library.ResponseNotRead:  # it was not kept: nobody can have it
        return response
    headers = response.headers.raw
    if method != "HEAD" and response.status_code not in (204, 304):  # else there is no content, and its fields stand
        coded = (b"content-encoding", b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in headers if name.lower() not in coded]
        headers += [(b"content-length", b"%d" % len(body))]
    stream, extensions = library.ByteStream(body), response.extensions
    return library.Response(response.status_code, headers=headers, stream=stream, extensions=extensions)


def _response(library: Any, answer: Answer, request: Any, kept: type[Any]) -> Any:
    cache_status = (b"cache-status", b"p2pcache; " + answer.cache_status.encode())
    extensions: dict[str, Any] = {"caching": answer.caching}
    if answer.stored is not None:
        stored, view = answer.stored, answer.view
        status, body, fields = stored.entry.status, stored.entry.body, stored.raw_headers
        if view is not None:
            status, body = view.status, view.body
            fields = [(name, value) for name, value in fields if name.decode("latin-1") not in view.dropped]
            fields += [(name.encode(), value.encode()) for name, value in view.added]
        return library.Response(
            status,
            headers=[*fields, (b"age", b"%d" % answer.age), cache_status],
            stream=library.ByteStream(body if request.method != "HEAD" else b""),
            extensions={"http_version": b"HTTP/1.1", **extensions},
        )
    if answer.reply is None:  # RFC 9111 §5.2.1.7
        headers = [(b"content-length", b"0"), cache_status]
        return library.Response(504, headers=headers, stream=library.ByteStream(b""), extensions=extensions)
    native = answer.reply.native
    stream = native.stream
    return library.Response(
        native.status_code,
        headers=[*native.headers.raw, cache_status],
        stream=stream if answer.keep is None else kept(stream, answer.keep),
        extensions={**native.extensions, **extensions},
    )


@lru_cache
def _kept_streams(library: Any) -> tuple[type[Any], type[Any]]:
    """The streams below as the library's own, sync and async: its clients ask for that."""
    sync = type("KeptStream", (_KeptStream, library.SyncByteStream), {})
    return sync, type("AsyncKeptStream", (_AsyncKeptStream, library.AsyncByteStream), {})


class _Kept:
    """The origin's body, saved as it is read."""

    def __init__(self, stream: Any, keep: Keep) -> None:
        self._stream = stream
        self._keep = keep

    def __del__(self) -> None:
        self._keep.forget()


class _KeptStream(_Kept):
    """For a sync client."""

    def __iter__(self) -> Iterator[bytes]:
        with self._keep.reading():
            for chunk in self._stream:
                self._keep.feed(chunk)
                yield chunk
        if not self._keep.put_off():
            self._keep.finish()

    def close(self) -> None:
        self._keep.abandon()
        if hasattr(self._stream, "close"):
            self._stream.close()


class _AsyncKeptStream(_Kept):
    """For an async client: what touches the disk runs in a worker thread."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._keep.reading():
            async for chunk in self._stream:
                self._keep.feed(chunk)
                yield chunk
        if not self._keep.put_off():
            await in_thread(self._keep.finish)

    async def aclose(self) -> None:
        self._keep.abandon()
        if hasattr(self._stream, "aclose"):
            await self._stream.aclose()

"""The door: ``httpx.Client(transport=P2PCacheTransport())``, and the two pumps that drive a request's way."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one only from 3.11 on
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import hishel
import httpx
from hishel import Headers

# Not public, and pinned by the dependency on httpx < 0.29: nothing else knows what NO_PROXY means to httpx.
from httpx_p2pcache import runner
from httpx_p2pcache.answers import Answer, Effect, Reply, Run, Send, Wait, Way
from httpx_p2pcache.exceptions import ConfigurationError
from httpx_p2pcache.keep import Keep
from httpx_p2pcache.origins import Origins
from httpx_p2pcache.settings import Settings

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task

logger = logging.getLogger("httpx_p2pcache")

CLOSE_SECONDS = 1.0  # what a revalidation in the background may hold up close()


class P2PCacheTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """An RFC 9111 cache that shares with the fleet; for ``httpx.Client`` and ``httpx.AsyncClient`` alike.

    ``next_transport`` reaches the origin (default: httpx's own, with the proxies of the environment); it must be of the
    client's kind, sync or async, else :class:`ConfigurationError` (a ``TypeError``) is raised at the first request.
    ``settings`` default to the environment's; :class:`SettingsError` is raised for a value that cannot be used.

    Every response carries ``Cache-Status`` (RFC 9211), and in ``extensions["caching"]`` what hishel puts there
    (``from_cache``, ``revalidated``, ``stored``) with ``source``: "local", "peer" or "origin".

    Constructing it starts the node in the background and waits for nothing. ``close`` and ``aclose`` are idempotent,
    close ``next_transport`` as well, and return within two seconds.
    """

    def __init__(
        self,
        next_transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        self.settings = Settings.from_env() if settings is None else settings
        self.next_transport = next_transport
        self._exchange = runner.acquire(self.settings)
        self._origins = Origins(at_once=not self._exchange.network.active) if next_transport is None else None
        self._lock = threading.Lock()
        self._released = False
        self._background: set[threading.Thread] = set()
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
        _wait_for(self._exchange.network.joined(), timeout)
        return self._exchange.network.active

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        asked = _asked(request)
        answer = self._exchange.hit(asked)
        if answer is None:
            way = self._exchange.way(asked, threading.get_ident(), _patience(request), background=True)
            answer = self._pump(way, request)
            if answer.afterwards is not None:
                worker = threading.Thread(
                    target=self._revalidate, args=(answer.afterwards, request), name="p2pcache-revalidate", daemon=True
                )
                self._background.add(worker)
                worker.start()
        return _response(answer, request, _KeptStream)

    def _revalidate(self, way: Way, request: httpx.Request) -> None:
        """What goes on after a stale answer was given; the caller has it, and hears of no failure."""
        try:
            response = _response(self._pump(way, request), request, _KeptStream)
            response.read()
            response.close()
        except Exception as exc:
            logger.debug("a revalidation in the background has failed: %s", type(exc).__name__)
        finally:
            self._background.discard(threading.current_thread())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        asked = _asked(request)
        answer = self._exchange.hit(asked)
        if answer is None:
            # trio has no place for a task that outlives its caller: there the caller waits for the revalidation.
            loop = _asyncio_loop()
            caller = anyio.get_current_task().id
            way = self._exchange.way(asked, caller, _patience(request), background=loop is not None)
            answer = await self._async_pump(way, request)
            if answer.afterwards is not None and loop is not None:
                task = loop.create_task(self._async_revalidate(answer.afterwards, request))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        return _response(answer, request, _AsyncKeptStream)

    async def _async_revalidate(self, way: Way, request: httpx.Request) -> None:
        try:
            response = _response(await self._async_pump(way, request), request, _AsyncKeptStream)
            await response.aread()
            await response.aclose()
        except Exception as exc:
            logger.debug("a revalidation in the background has failed: %s", type(exc).__name__)

    def _pump(self, way: Way, request: httpx.Request) -> Answer:
        reply: httpx.Response | None = None

        def perform(effect: Effect) -> Any:
            nonlocal reply
            if isinstance(effect, Run):
                return effect.func()
            if isinstance(effect, Wait):
                found = _wait_for(effect.future, effect.seconds, effect.keep)
                return None if found is _NOT_IN_TIME else found
            if isinstance(effect, Send):
                reply = self._sync_origin(request.url).handle_request(_with(request, effect.added))
                return _reply(reply)
            discarded, reply = reply, None
            if discarded is not None:
                _discard(discarded)
            return None

        try:
            effect = next(way)
            while True:
                try:
                    result = perform(effect)
                except BaseException as exc:
                    effect = way.throw(exc)
                else:
                    effect = way.send(result)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return] # a generator's return value is not typed here
        except BaseException:
            if reply is not None:
                _discard(reply)
            raise

    async def _async_pump(self, way: Way, request: httpx.Request) -> Answer:
        reply: httpx.Response | None = None

        async def perform(effect: Effect) -> Any:
            nonlocal reply
            if isinstance(effect, Run):
                with anyio.CancelScope(shield=True):  # what is begun in the store is finished
                    return await anyio.to_thread.run_sync(effect.func)
            if isinstance(effect, Wait):
                return await _async_wait_for(effect.future, effect.seconds, effect.keep)
            if isinstance(effect, Send):
                origin = self._async_origin(request.url)
                reply = await origin.handle_async_request(_with(request, effect.added))
                return _reply(reply)
            discarded, reply = reply, None
            if discarded is not None:
                await _async_discard(discarded)
            return None

        try:
            effect = next(way)
            while True:
                try:
                    result = await perform(effect)
                except BaseException as exc:
                    effect = way.throw(exc)
                else:
                    effect = way.send(result)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return] # a generator's return value is not typed here
        except BaseException:
            if reply is not None:
                await _async_discard(reply)
            raise

    def _sync_origin(self, url: httpx.URL) -> httpx.BaseTransport:
        origin = self._origins.sync_for(url) if self._origins is not None else self.next_transport
        if not hasattr(origin, "handle_request"):
            raise ConfigurationError(
                f"httpx.Client needs a sync next_transport (one with handle_request), not {type(origin).__name__}"
            )
        return origin  # type: ignore[return-value] # the line above has made sure

    def _async_origin(self, url: httpx.URL) -> httpx.AsyncBaseTransport:
        origin = self._origins.async_for(url) if self._origins is not None else self.next_transport
        if not hasattr(origin, "handle_async_request"):
            raise ConfigurationError(
                "httpx.AsyncClient needs an async next_transport (one with handle_async_request), "
                f"not {type(origin).__name__}"
            )
        return origin  # type: ignore[return-value] # the line above has made sure

    def close(self) -> None:
        for worker in list(self._background):
            worker.join(CLOSE_SECONDS)
        self._release()
        inner: Any = self._origins or self.next_transport
        if hasattr(inner, "close"):
            inner.close()

    def _release(self) -> None:
        with self._lock:
            released, self._released = self._released, True
        runner.release(self._exchange, again=released)

    async def aclose(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await anyio.to_thread.run_sync(self._release)
        inner: Any = self._origins or self.next_transport
        if hasattr(inner, "aclose"):
            await inner.aclose()


def _discard(response: httpx.Response) -> None:
    """Be done with a response that nobody gets. A 304 has no content, but its end must be read."""
    try:
        if response.status_code == 304:
            response.read()
        response.close()
    except Exception:  # noqa: S110 - how it fails does not matter to anybody
        pass


async def _async_discard(response: httpx.Response) -> None:
    with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS):
        try:
            if response.status_code == 304:
                await response.aread()
            await response.aclose()
        except Exception:  # noqa: S110 - how it fails does not matter to anybody
            pass


def _patience(request: httpx.Request) -> float | None:
    """For how many seconds the caller would wait for an answer of the origin; None: for ever."""
    timeout = request.extensions.get("timeout") or {}
    patience: float | None = timeout.get("read")
    return patience


def _asked(request: httpx.Request) -> hishel.Request:
    """The request as the exchange sees it: no user information, no fragment, lines of one field kept apart."""
    url = request.url
    fields: dict[str, list[str]] = {}
    for name, value in request.headers.raw:
        fields.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    target = f"{url.scheme}://{url.netloc.decode('ascii')}{url.raw_path.decode('ascii')}"
    return hishel.Request(request.method, target, Headers(fields))


def _with(request: httpx.Request, added: dict[str, str]) -> httpx.Request:
    """The caller's request with ``added`` fields in the place of its own of those names."""
    if not added:
        return request
    kept = [(name, value) for name, value in request.headers.raw if name.decode("latin-1").lower() not in added]
    return httpx.Request(
        request.method,
        request.url,
        headers=[*kept, *((name.encode(), value.encode("latin-1")) for name, value in added.items())],
        stream=request.stream,
        extensions=request.extensions,
    )


def _reply(response: httpx.Response) -> Reply:
    fields: dict[str, list[str]] = {}
    for name, value in response.headers.raw:
        fields.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return Reply(response.status_code, Headers(fields), response)


def _response(answer: Answer, request: httpx.Request, kept: type[_KeptStream | _AsyncKeptStream]) -> httpx.Response:
    cache_status = (b"cache-status", b"p2pcache; " + answer.cache_status.encode())
    extensions: dict[str, Any] = {"caching": answer.caching}
    if answer.stored is not None:
        stored, view = answer.stored, answer.view
        status, body, fields = stored.entry.status, stored.entry.body, stored.raw_headers
        if view is not None:
            status, body = view.status, view.body
            fields = [(name, value) for name, value in fields if name.decode("latin-1") not in view.dropped]
            fields += [(name.encode(), value.encode()) for name, value in view.added]
        return httpx.Response(
            status,
            headers=[*fields, (b"age", b"%d" % answer.age), cache_status],
            stream=httpx.ByteStream(body if request.method != "HEAD" else b""),
            extensions={"http_version": b"HTTP/1.1", **extensions},
        )
    if answer.reply is None:  # RFC 9111 §5.2.1.7
        return httpx.Response(504, headers=[(b"content-length", b"0"), cache_status], extensions=extensions)
    native: httpx.Response = answer.reply.native
    stream = native.stream
    return httpx.Response(
        native.status_code,
        headers=[*native.headers.raw, cache_status],
        stream=stream if answer.keep is None else kept(stream, answer.keep),
        extensions={**native.extensions, **extensions},
    )


class _KeptStream(httpx.SyncByteStream):
    """The origin's body, saved as it is read."""

    def __init__(self, stream: Any, keep: Keep) -> None:
        self._stream = stream
        self._keep = keep

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._keep.feed(chunk)
            yield chunk
        self._keep.finish()

    def close(self) -> None:
        self._keep.abandon()
        if hasattr(self._stream, "close"):
            self._stream.close()


class _AsyncKeptStream(httpx.AsyncByteStream):
    """The same for an async client; what touches the disk runs in a worker thread."""

    def __init__(self, stream: Any, keep: Keep) -> None:
        self._stream = stream
        self._keep = keep

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._keep.feed(chunk)
            yield chunk
        await anyio.to_thread.run_sync(self._keep.finish)

    async def aclose(self) -> None:
        self._keep.abandon()
        if hasattr(self._stream, "aclose"):
            await self._stream.aclose()


def _asyncio_loop() -> AbstractEventLoop | None:
    """The running asyncio loop; None under trio."""
    asyncio = sys.modules.get("asyncio")  # not imported for our sake: it takes 30 ms
    if asyncio is None:
        return None
    try:
        loop: AbstractEventLoop = asyncio.get_running_loop()
        return loop
    except RuntimeError:
        return None


_NOT_IN_TIME = object()


def _wait_for(future: Future[Any], timeout: float, keep: bool = False) -> Any:
    """The result, or ``_NOT_IN_TIME``; whoever stops waiting cancels the future, so that nothing is granted in vain."""
    try:
        return future.result(timeout)
    except (FutureTimeout, CancelledError):
        if not future.done() and (keep or future.cancel()):
            return _NOT_IN_TIME
        if future.cancelled():
            return _NOT_IN_TIME
        return future.result()  # it came while we gave up
    except BaseException:
        future.cancel()
        raise


async def _async_wait_for(future: Future[Any], timeout: float, keep: bool = False) -> Any:
    """The same from asyncio or trio: the caller's loop is never blocked, and is woken without blocking the node's."""
    woken = anyio.Event()
    native: Any = anyio.lowlevel.current_token().native_token
    call_soon = getattr(native, "run_sync_soon", None) or native.call_soon_threadsafe

    def wake(_: Future[Any]) -> None:
        try:
            call_soon(woken.set)
        except RuntimeError:  # the caller's loop has ended meanwhile
            pass

    future.add_done_callback(wake)
    try:
        with anyio.move_on_after(timeout):
            await woken.wait()
    except BaseException:
        future.cancel()
        raise
    if not future.done() and (keep or future.cancel()):
        return None
    return None if future.cancelled() else future.result()

"""A caching door for any HTTP client: plain HTTP in, by the ``Host`` field to the true origin over TLS.

On the daemon's Unix socket, which only its owner can open, the request's ``Host`` names the origin. On a loopback port
anybody on this machine can connect, so there the path begins with the door's token, and may go on with the host::

    http://127.0.0.1:PORT/TOKEN/repos/o/r                   the first host of CACHE_GITHUB_HOSTS
    http://127.0.0.1:PORT/TOKEN/ghe.example.org/api/v3/…    another one of them

There ``Link`` and ``Location`` are rewritten to lead back through the door. Only hosts in ``CACHE_GITHUB_HOSTS`` are
reached: this is no open proxy. Credentials are the caller's own, and go to the origin alone.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

import anyio
import httpx

from httpx_p2pcache.daemon.life import CONTROL
from httpx_p2pcache.transport import P2PCacheTransport

logger = logging.getLogger("httpx_p2pcache")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# RFC 9110 §7.6.1: what is about one connection alone; and what the HTTP server answers itself
_OF_THE_CONNECTION = frozenset(
    {
        b"connection",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_TIMEOUT = httpx.Timeout(connect=10.0, read=120.0, write=120.0, pool=60.0)
_TARGETS = re.compile(rb"<([^>]*)>")


class Door:
    """The ASGI application: ``control`` answers for the daemon itself, everything else is an origin's.

    ``token`` is None on the Unix socket.
    """

    def __init__(
        self, transport: P2PCacheTransport, control: App, *, token: str | None, used: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._control = control
        self._token = token
        self._used = used
        self._schemes = transport.settings.origins()
        self._default = next(iter(self._schemes), "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _live(receive, send)
        if scope["type"] != "http":  # a WebSocket: refused
            return await send({"type": "websocket.close"})
        path: bytes = scope.get("raw_path") or scope["path"].encode()
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        if path.lower().startswith((b"http://", b"https://")):  # RFC 9112 §3.2.2: then Host does not count
            netloc, slash, rest_of = path.partition(b"://")[2].partition(b"/")
            host, path = netloc.decode("latin-1").lower(), slash + rest_of or b"/"
        if not path.startswith(b"/") or b"#" in path + scope["query_string"]:
            return await _say(send, 400, "a request target is a path, or a whole URL without a fragment")
        prefix = b""
        if self._token is not None:
            _, given, *rest = path.split(b"/", 2)
            if not hmac.compare_digest(given, self._token.encode()):
                return await _say(send, 404, "not found: the path begins with this door's token (p2pcache status)")
            prefix = b"http://" + host.encode("latin-1") + b"/" + given
            path = b"/" + (rest[0] if rest else b"")
            first = path[1:].partition(b"/")[0].decode("latin-1").lower()
            named = first == CONTROL or first in self._schemes
            host = first if named else self._default
            if named:
                path = path[1 + len(first) :] or b"/"
        if host == CONTROL:
            return await self._control({**scope, "path": path.decode("latin-1"), "raw_path": path}, receive, send)
        self._used()
        if host not in self._schemes:
            why = f"this door leads to {', '.join(self._schemes)} only, not to {host[:200]!r}: see CACHE_GITHUB_HOSTS"
            return await _say(send, 403, why)
        way_back = None if self._token is None else _WayBack(prefix, host, self._schemes, self._default)
        body = _Body(scope["headers"], receive)
        async with anyio.create_task_group() as tasks:
            watch = anyio.CancelScope()
            tasks.start_soon(self._let_go, body, watch, tasks.cancel_scope)
            request = _request(scope, body, f"{self._schemes[host]}://{host}", path)
            await self._pass(request, way_back, send, watch.cancel, whole=scope.get("http_version") == "1.0")
        return None

    async def _pass(
        self, request: httpx.Request, way_back: _WayBack | None, send: Send, done: Callable[[], None], *, whole: bool
    ) -> None:
        """``done`` is called when all but the end of the answer has been sent."""
        host = request.url.netloc.decode("ascii")
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.TimeoutException as exc:
            done()
            return await _say(send, 504, f"{host} does not answer ({type(exc).__name__})")
        except httpx.HTTPError as exc:
            done()
            return await _say(send, 502, f"{host} cannot be reached ({type(exc).__name__}: {exc})")
        return await _pass_on(response, request.method, way_back, send, done, whole=whole)

    @staticmethod
    async def _let_go(body: _Body, watch: anyio.CancelScope, all_of_it: anyio.CancelScope) -> None:
        """Whoever has gone waits for nothing: the origin need not go on either.

        Not while the server ends the connection itself, after the answer: it would be cancelled in the middle of that.
        """
        with watch:
            await body.read.wait()
            while (await body.receive())["type"] != "http.disconnect":
                pass
            all_of_it.cancel()


class _Body:
    """A request's body as it comes; ``read`` is set when there is no more of it."""

    def __init__(self, fields: list[tuple[bytes, bytes]], receive: Receive) -> None:
        names = {name for name, _ in fields}
        self.chunked = b"transfer-encoding" in names
        self.receive = receive
        self.read = anyio.Event()
        self.empty = not self.chunked and b"content-length" not in names
        if self.empty:
            self.read.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise httpx.ReadError("the client has gone")
            more = message.get("more_body", False)
            if message.get("body"):
                yield message["body"]
        self.read.set()


def _request(scope: Scope, body: _Body, origin: str, path: bytes) -> httpx.Request:
    dropped = _dropped(scope["headers"])
    if body.chunked:  # RFC 9112 §6.3: the chunks count, and a length beside them is not passed on
        dropped.add(b"content-length")
    fields = [(name, value) for name, value in scope["headers"] if name not in dropped]
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    return httpx.Request(
        scope["method"],
        httpx.URL(origin).copy_with(raw_path=path + query),
        headers=fields,
        content=None if body.empty else aiter(body),
        extensions={"timeout": _TIMEOUT.as_dict(), "target": path + query},  # as it was sent: RFC 9110 §7.7
    )


def _dropped(fields: list[tuple[bytes, bytes]]) -> set[bytes]:
    """Names of the fields that are about one connection alone, those that ``Connection`` names included."""
    named = {
        part.strip().lower() for name, value in fields if name.lower() == b"connection" for part in value.split(b",")
    }
    return named | _OF_THE_CONNECTION


async def _pass_on(
    response: httpx.Response,
    method: str,
    way_back: _WayBack | None,
    send: Send,
    done: Callable[[], None],
    *,
    whole: bool,
) -> None:
    """``whole``: to a client of HTTP/1.0, which cannot tell a body that breaks off from one that ends."""
    fields = [(name.lower(), value) for name, value in response.headers.raw]
    dropped = _dropped(fields)
    fields = [(name, value) for name, value in fields if name not in dropped]
    if way_back is not None:
        fields = [
            (name, way_back.field(name, value) if name in (b"link", b"location") else value) for name, value in fields
        ]
    stream: Any = response.stream
    started = False
    try:
        has_body = method != "HEAD" and response.status_code not in (204, 304)
        if has_body and whole and not any(name == b"content-length" for name, _ in fields):
            body = b"".join([chunk async for chunk in stream])
            stream = httpx.ByteStream(body)
            fields.append((b"content-length", b"%d" % len(body)))
        started = True
        await send({"type": "http.response.start", "status": response.status_code, "headers": fields})
        if has_body:
            async for chunk in stream:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        done()
        await send({"type": "http.response.body", "body": b""})
    except httpx.HTTPError as exc:  # without its last part the server ends the connection, by which the client knows
        logger.debug("an answer broke off: %s", type(exc).__name__)
        if not started:
            done()
            await _say(send, 502, f"the answer broke off ({type(exc).__name__})")
    finally:
        done()
        with anyio.CancelScope(shield=True), anyio.move_on_after(1):
            await response.aclose()


class _WayBack(NamedTuple):
    """How URLs of the origins become URLs of the door: ``prefix`` is its own, ``host`` the one that was asked."""

    prefix: bytes
    host: str
    schemes: dict[str, str]
    default: str

    def field(self, name: bytes, value: bytes) -> bytes:
        """A ``Link`` or ``Location`` that leads back through the door."""
        if name == b"location":
            return self._url(value)
        return _TARGETS.sub(lambda match: b"<" + self._url(match[1]) + b">", value)

    def _url(self, url: bytes) -> bytes:
        if url.startswith(b"/") and not url.startswith(b"//"):
            return self._place(self.host) + url
        for host, scheme in self.schemes.items():
            origin = f"{scheme}://{host}".encode("latin-1")
            if url.lower().startswith(origin + b"/"):
                return self._place(host) + url[len(origin) :]
        return url

    def _place(self, host: str) -> bytes:
        return self.prefix + (b"" if host == self.default else b"/" + host.encode("latin-1"))


async def _say(send: Send, status: int, text: str) -> None:
    """An answer of the door's own, in the form of GitHub's errors."""
    body = json.dumps({"message": text}).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

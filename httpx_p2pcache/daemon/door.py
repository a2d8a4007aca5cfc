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
from typing import Any

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
        if scope["type"] != "http":
            return None
        path: bytes = scope.get("raw_path") or scope["path"].encode()
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        prefix = b""
        if self._token is not None:
            _, given, *rest = path.split(b"/", 2) if path.startswith(b"/") else (b"", b"")
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
        origin = f"{self._schemes[host]}://{host}"
        request = _request(scope, receive, origin, path)
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.TimeoutException as exc:
            return await _say(send, 504, f"{host} does not answer ({type(exc).__name__})")
        except httpx.HTTPError as exc:
            return await _say(send, 502, f"{host} cannot be reached ({type(exc).__name__}: {exc})")
        way_back = None if self._token is None else (self._schemes, prefix, self._default)
        return await _pass_on(response, request.method, way_back, send)


def _request(scope: Scope, receive: Receive, origin: str, path: bytes) -> httpx.Request:
    fields = [(name, value) for name, value in scope["headers"] if name not in _dropped(scope["headers"])]
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    names = {name for name, _ in scope["headers"]}
    content = _body(receive) if names & {b"content-length", b"transfer-encoding"} else None
    return httpx.Request(
        scope["method"],
        httpx.URL(origin).copy_with(raw_path=path + query),
        headers=fields,
        content=content,
        extensions={"timeout": _TIMEOUT.as_dict()},
    )


def _dropped(fields: list[tuple[bytes, bytes]]) -> set[bytes]:
    """Names of the fields that are about one connection alone, those that ``Connection`` names included."""
    named = {
        part.strip().lower() for name, value in fields if name.lower() == b"connection" for part in value.split(b",")
    }
    return named | _OF_THE_CONNECTION


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise httpx.ReadError("the client has gone")
        more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]


async def _pass_on(
    response: httpx.Response, method: str, way_back: tuple[dict[str, str], bytes, str] | None, send: Send
) -> None:
    fields = [(name.lower(), value) for name, value in response.headers.raw]
    dropped = _dropped(fields)
    fields = [(name, value) for name, value in fields if name not in dropped]
    if way_back is not None:
        fields = [
            (name, _led_back(name, value, *way_back) if name in (b"link", b"location") else value)
            for name, value in fields
        ]
    stream: Any = response.stream
    try:
        await send({"type": "http.response.start", "status": response.status_code, "headers": fields})
        if method != "HEAD" and response.status_code not in (204, 304):
            async for chunk in stream:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(1):
            await response.aclose()


def _led_back(name: bytes, value: bytes, schemes: dict[str, str], prefix: bytes, default: str) -> bytes:
    """A field's URLs of the hosts behind the door, as URLs of the door."""

    def back(url: bytes) -> bytes:
        for host, scheme in schemes.items():
            origin = f"{scheme}://{host}".encode("latin-1")
            if url.lower().startswith(origin + b"/"):
                segment = b"" if host == default else b"/" + host.encode("latin-1")
                return prefix + segment + url[len(origin) :]
        return url

    if name == b"location":
        return back(value)
    return _TARGETS.sub(lambda match: b"<" + back(match[1]) + b">", value)


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

"""A storage for any hishel 2 integration, with peers: one argument changes, ``storage=P2PStorage()``.

hishel's own storage keeps what is stored. A key of which it has nothing is asked for among the peers, and what may be
shared is handed to them when its body has been read to its end. What a storage cannot know is who will fetch what, so
there are no claims: runners that ask at the very same moment each fetch. The transports of this package have them.

A storage is given no request for a look-up, only hishel's key; so an entry travels as the body of a *carrier*, an entry
under a URL made of that key, which only says until when it is fresh. What is inside is checked like every other entry.

Shared is what a shared cache may store (RFC 9111 §3), chosen by fields that tell nothing of the user: 200s to a GET
without ``private``, ``no-store``, ``no-cache`` or ``Set-Cookie``, and if the request had credentials only what is
``public`` or names ``s-maxage`` or ``must-revalidate``.

hishel stores a request as it was sent. Credentials in it are sealed on their way to the storage, and opened on their
way back, so that they are in no file; bodies are stored as they are.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hishel
import msgspec
from hishel import AsyncBaseStorage, AsyncSqliteStorage, BaseStorage, Headers, SqliteStorage

from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.database import connect
from httpx_p2pcache.entries import (
    ANONYMOUS,
    CLEAR_FIELDS,
    Entry,
    body_digest,
    cache_key,
    carries_credentials,
    is_credential,
)
from httpx_p2pcache.exceptions import UNDECODABLE, ConfigurationError, Rejected
from httpx_p2pcache.files import private_directory, private_file
from httpx_p2pcache.freshness import directives, initial_age, lifetime, storable_fields, vary_names
from httpx_p2pcache.network import Asked, FleetClaim, Found, Question, Unclaimed, settle
from httpx_p2pcache.node.checks import believed
from httpx_p2pcache.pump import async_wait_for, in_thread, wait_for
from httpx_p2pcache.runner import Usage
from httpx_p2pcache.settings import Settings

FILE = "hishel-v2.db"
_ABOUT = b"credentials"
_DECODER = msgspec.msgpack.Decoder(Entry)


def clear(directory: Path) -> int:
    """Remove every entry of the default storage in ``directory``; returns how many there were. Raises OSError."""
    if not (directory / FILE).exists():
        return 0
    try:
        with contextlib.closing(connect(directory / FILE)) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'").fetchone():
                return 0  # nothing has been asked of it yet
            ((count,),) = connection.execute("SELECT count(*) FROM entries").fetchall()
            connection.clear()
    except sqlite3.Error as exc:
        raise OSError(str(exc)) from exc
    return int(count)


class P2PStorage(BaseStorage):
    """A ``hishel.BaseStorage`` whose misses are asked for among the peers.

    ``storage`` is where entries are kept (default: hishel's SQLite, in ``CACHE_DIR``); ``settings`` default to the
    environment's. A look-up among peers takes ``CACHE_LOOKUP_TIMEOUT`` seconds at the most. ``close`` closes both.
    """

    def __init__(self, storage: BaseStorage | None = None, *, settings: Settings | None = None) -> None:
        super().__init__()
        self._sharing = _Sharing(settings, sealed=storage is not None)
        self.storage = SqliteStorage(database_path=self._sharing.path()) if storage is None else storage

    def create_entry(
        self,
        request: hishel.Request,
        response: hishel.Response,
        key: str,
        *,
        ttl: float | None = None,
        tti: float | None = None,
    ) -> hishel.Entry:
        created = self.storage.create_entry(self._sharing.hidden(request), response, key, ttl=ttl, tti=tti)
        created.request = request
        parcel = self._sharing.parcel(request, response, key)
        stream: Any = created.response.stream
        if parcel is not None and stream is not None:
            created.response.stream = _handed_over(stream, parcel)
        return created

    def get_entries(self, key: str) -> list[hishel.Entry]:
        found = [self._sharing.shown(entry) for entry in self.storage.get_entries(key)]
        if found or not self._sharing.active:
            return found
        answer = wait_for(self._sharing.ask(key), self._sharing.patience)
        entry = self._sharing.received(key, answer)
        if entry is None:
            return found
        created = self.storage.create_entry(*_as_hishel(entry, iter([entry.body])), key)
        stream: Any = created.response.stream
        for _ in stream:  # reading it to its end is what saves it
            pass
        return [self._sharing.shown(entry) for entry in self.storage.get_entries(key)]

    def update_headers(self, id: uuid.UUID, headers: Headers) -> None:  # noqa: A002 - hishel's name
        self.storage.update_headers(id, headers)

    def remove_entry(self, id: uuid.UUID) -> None:  # noqa: A002 - hishel's name
        self.storage.remove_entry(id)

    def close(self) -> None:
        self.storage.close()
        self._sharing.close()


class AsyncP2PStorage(AsyncBaseStorage):
    """The same for hishel's async integrations, on asyncio or trio."""

    def __init__(self, storage: AsyncBaseStorage | None = None, *, settings: Settings | None = None) -> None:
        super().__init__()
        self._sharing = _Sharing(settings, sealed=storage is not None)
        self.storage = AsyncSqliteStorage(database_path=self._sharing.path()) if storage is None else storage

    async def create_entry(
        self,
        request: hishel.Request,
        response: hishel.Response,
        key: str,
        *,
        ttl: float | None = None,
        tti: float | None = None,
    ) -> hishel.Entry:
        created = await self.storage.create_entry(self._sharing.hidden(request), response, key, ttl=ttl, tti=tti)
        created.request = request
        parcel = self._sharing.parcel(request, response, key)
        stream: Any = created.response.stream
        if parcel is not None and stream is not None:
            created.response.stream = _async_handed_over(stream, parcel)
        return created

    async def get_entries(self, key: str) -> list[hishel.Entry]:
        found = [self._sharing.shown(entry) for entry in await self.storage.get_entries(key)]
        if found or not self._sharing.active:
            return found
        answer = await async_wait_for(self._sharing.ask(key), self._sharing.patience)
        entry = await in_thread(self._sharing.received, key, answer)
        if entry is None:
            return found
        created = await self.storage.create_entry(*_as_hishel(entry, _async_iter([entry.body])), key)
        stream: Any = created.response.stream
        async for _ in stream:  # reading it to its end is what saves it
            pass
        return [self._sharing.shown(entry) for entry in await self.storage.get_entries(key)]

    async def update_headers(self, id: uuid.UUID, headers: Headers) -> None:  # noqa: A002 - hishel's name
        await self.storage.update_headers(id, headers)

    async def remove_entry(self, id: uuid.UUID) -> None:  # noqa: A002 - hishel's name
        await self.storage.remove_entry(id)

    async def close(self) -> None:
        await self.storage.close()
        await in_thread(self._sharing.close)


class _Sharing:
    """What both storages have in common: carriers, made, asked for and opened."""

    def __init__(self, settings: Settings | None, *, sealed: bool) -> None:
        """``sealed``: whoever gave the storage sees to it that what is at rest is sealed, if it has to be."""
        self._settings = Settings.from_env() if settings is None else settings
        if self._settings.encrypt_at_rest and not sealed:
            raise ConfigurationError(
                "CACHE_ENCRYPT_AT_REST is not kept by hishel's own storage: give P2PStorage a storage that seals, "
                "or use P2PCacheTransport"
            )
        self._usage = Usage(self._settings)
        self._exchange = self._usage.exchange
        self.patience = self._settings.lookup_timeout
        self.close = self._usage.close

    def path(self) -> Any:
        private_directory(self._settings.dir)
        return private_file(self._settings.dir / FILE)

    def hidden(self, request: hishel.Request) -> hishel.Request:
        """The request as it is stored: with its credentials sealed."""
        hidden = self._with_credentials(request, self._seal)
        if carries_credentials(request.url) or "@" in urlsplit(request.url).netloc:
            hidden = dataclasses.replace(hidden, url=self._seal(request.url))
        return hidden

    def shown(self, entry: hishel.Entry) -> hishel.Entry:
        """A stored entry with its request as it was sent."""
        shown = self._with_credentials(entry.request, self._opened)
        entry.request = dataclasses.replace(shown, url=self._opened(shown.url))
        return entry

    @staticmethod
    def _with_credentials(request: hishel.Request, written: Callable[[str], str]) -> hishel.Request:
        fields = {name: request.headers.get_list(name) or [] for name in request.headers}
        for name in filter(is_credential, fields):
            fields[name] = [written(line) for line in fields[name]]
        return dataclasses.replace(request, headers=Headers(fields))

    def _seal(self, line: str) -> str:
        return base64.b64encode(self._exchange.keyring.seal(line.encode(), _ABOUT)).decode()

    def _opened(self, line: str) -> str:
        try:
            return self._exchange.keyring.open(base64.b64decode(line, validate=True), _ABOUT).decode()
        except (ValueError, Rejected):  # under another secret: then it is nobody's
            return line

    @property
    def active(self) -> bool:
        return self._exchange.network.active

    def ask(self, key: str) -> Asked:
        question = Question(
            key=cache_key(_carrier(key)), claim=_claim(key), method="GET", identity=ANONYMOUS, selecting={}
        )
        return self._exchange.network.ask(question, _without_waiting)

    def received(self, key: str, answer: object) -> Entry | None:
        """What a peer had under a key, if it is to be believed; may touch the disk."""
        if isinstance(answer, FleetClaim):  # a storage does not fetch
            self._exchange.network.release(_claim(key), cache_key(_carrier(key)), answer, Verdict.ABANDONED)
        elif answer is None:
            self._exchange.stats.add("peer_timeouts")
            self._exchange.stats.add("peer_failures")
        if not isinstance(answer, Found):
            return None
        now = time.time()
        held = [stored for stored in self._exchange.store.load(cache_key(_carrier(key))) if stored.fresh(now)]
        if not held:
            return None
        try:
            entry = _DECODER.decode(max(held, key=lambda stored: stored.entry.received).entry.body)
            return believed(entry, 0.0, now, self._settings.max_body_size)
        except (Rejected, *UNDECODABLE):
            self._exchange.stats.add("rejected")
            return None

    def parcel(self, request: hishel.Request, response: hishel.Response, key: str) -> _Parcel | None:
        """What is to be handed over once the body is known; None if it may not be."""
        control = directives(response.headers)
        if request.method != "GET" or response.status_code != 200 or carries_credentials(request.url):
            return None
        if {"private", "no-store", "no-cache"} & control.keys() or "set-cookie" in response.headers:
            return None
        varies = vary_names(storable_fields(response.headers))
        selecting = {name: request.headers[name] for name in varies if name in request.headers}
        if "*" in varies or not selecting.keys() <= CLEAR_FIELDS:
            return None
        credentials = any(is_credential(name) for name in request.headers)
        if credentials and not {"public", "s-maxage", "must-revalidate"} & control.keys():  # RFC 9111 §3.5
            return None
        return _Parcel(self, request.url, selecting, storable_fields(response.headers), key)

    def hand_over(self, entry: Entry, key: str) -> None:
        """Publish an entry in its carrier; may touch the disk."""
        left = (lifetime(entry, self._settings.default_ttl) or 0.0) - entry.initial_age
        if left < 1 or not self.active:
            return
        body = msgspec.msgpack.encode(entry)
        carrier = Entry(
            method="GET",
            url=_carrier(key),
            identity=ANONYMOUS,
            selecting={},
            status=200,
            headers={"cache-control": [f"public, max-age={int(left)}"], "date": entry.headers["date"]},
            body=body,
            digest=body_digest(body),
            initial_age=0.0,
            received=entry.received,
        )
        if self._exchange.store.save(carrier) is not None:
            self._exchange.network.publish(carrier, _claim(key), widely=True)
            self._exchange.stats.add("published")


class _Parcel:
    """A response on its way to being shared: fed with its body, handed over at its end."""

    def __init__(
        self, sharing: _Sharing, url: str, selecting: dict[str, str], fields: dict[str, list[str]], key: str
    ) -> None:
        self._sharing, self._url, self._selecting, self._fields, self._key = sharing, url, selecting, fields, key
        self._received = time.time()
        self._body: bytearray | None = bytearray()

    def feed(self, chunk: bytes) -> None:
        if self._body is not None:
            self._body += chunk
            if len(self._body) > self._sharing._settings.max_body_size // 2:  # a carrier has to fit as well
                self._body = None

    def finish(self) -> None:
        if self._body is None or "date" not in self._fields:
            return
        body = bytes(self._body)
        entry = Entry(
            method="GET",
            url=self._url,
            identity=ANONYMOUS,
            selecting=self._selecting,
            status=200,
            headers=self._fields,
            body=body,
            digest=body_digest(body),
            initial_age=initial_age(self._fields, self._received, self._received),
            received=self._received,
        )
        self._sharing.hand_over(entry, self._key)


def _handed_over(stream: Iterator[bytes], parcel: _Parcel) -> Iterator[bytes]:
    for chunk in stream:
        parcel.feed(chunk)
        yield chunk
    parcel.finish()


async def _async_handed_over(stream: AsyncIterator[bytes], parcel: _Parcel) -> AsyncIterator[bytes]:
    async for chunk in stream:
        parcel.feed(chunk)
        yield chunk
    await in_thread(parcel.finish)


async def _async_iter(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def _without_waiting(asked: Asked) -> None:
    """A storage does not wait for what somebody else fetches."""
    settle(asked, Unclaimed())


def _carrier(key: str) -> str:
    """The URL under which a storage key's entry travels; ``.invalid`` names no host (RFC 6761)."""
    return f"https://hishel.invalid/{hashlib.sha256(key.encode()).hexdigest()}"


def _claim(key: str) -> bytes:
    return hashlib.sha256(b"hishel " + key.encode()).digest()[:16]


def _as_hishel(entry: Entry, body: Any) -> tuple[hishel.Request, hishel.Response]:
    request = hishel.Request(entry.method, entry.url, Headers(dict(entry.selecting)))
    return request, hishel.Response(entry.status, Headers(entry.headers), body)

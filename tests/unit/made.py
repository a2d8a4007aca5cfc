"""What the unit tests make their cases of."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import hishel
from hishel import Headers
from hypothesis import settings

from httpx_p2pcache.entries import Entry, Keyring, body_digest

URL = "https://api.github.com/repos/octo-org/repo-0"
KEYRING = Keyring(b"the secret of a fleet", "octo-org/repo-0")

few = settings(max_examples=50, deadline=None)
many = settings(max_examples=200, deadline=None)


def an_entry(**changes: object) -> Entry:
    """An entry that may be stored, fresh for a minute; its digest is that of its body."""
    body = changes.setdefault("body", b'{"id": 1}')
    assert isinstance(body, bytes)
    plain: dict[str, object] = {
        "method": "GET",
        "url": URL,
        "identity": "",
        "selecting": {},
        "status": 200,
        "headers": {"cache-control": ["private, max-age=60"], "content-type": ["application/json"]},
        "digest": body_digest(body),
        "initial_age": 0.0,
        "received": time.time(),
    }
    return Entry(**(plain | changes))  # type: ignore[arg-type] # heterogeneous on purpose


def a_request(method: str = "GET", url: str = URL, **fields: str | list[str]) -> hishel.Request:
    """A request; ``if_none_match="x"`` is its field If-None-Match."""
    return hishel.Request(method, url, Headers({name.replace("_", "-"): value for name, value in fields.items()}))


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What the package has logged meanwhile, at warning and above."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logger = logging.getLogger("httpx_p2pcache")
    logger.addHandler(listener)
    try:
        yield lines
    finally:
        logger.removeHandler(listener)

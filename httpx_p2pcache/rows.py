"""An entry as hishel stores it in SQLite.

The request's selecting fields are in the place of its header, and beside the response's exact fields there is one whose
name no field can have, ``:p2pcache``, with the body's form, identity, initial age, time of receipt, voucher.
"""

from __future__ import annotations

from collections.abc import Iterator

import hishel
from hishel import Headers

from httpx_p2pcache.entries import Entry, Keyring, body_digest, cache_key
from httpx_p2pcache.exceptions import Rejected

_META = ":p2pcache"
_AT_REST = b"at rest "


def to_hishel(entry: Entry, sealing: Keyring | None) -> tuple[hishel.Request, hishel.Response]:
    """What hishel is given to store; with ``sealing`` the body is sealed."""
    body = entry.body if sealing is None else sealing.seal(entry.body, _AT_REST + cache_key(entry.url))
    request = hishel.Request(entry.method, entry.url, Headers(dict(entry.selecting)))
    return request, hishel.Response(entry.status, fields_at_rest(entry, sealing), iter([body]))


def fields_at_rest(entry: Entry, sealing: Keyring | None) -> Headers:
    """All of an entry but its body and its selecting fields."""
    form = "plain" if sealing is None else "sealed"
    meta = [form, entry.identity, repr(entry.initial_age), repr(entry.received), entry.voucher.hex()]
    return Headers({**entry.headers, _META: meta})


def from_hishel(row: hishel.Entry, sealing: Keyring | None) -> Entry:
    """The entry of a row. Raises KeyError, ValueError or :class:`Rejected` for one that is not ours.

    What hishel raises for one that is evicted meanwhile, RuntimeError or ``sqlite3.Error``, is passed on.
    """
    headers = {name: row.response.headers.get_list(name) or [] for name in row.response.headers}
    form, identity, initial_age, received, voucher = headers.pop(_META)
    if form != ("plain" if sealing is None else "sealed"):
        raise Rejected("it was stored with another CACHE_ENCRYPT_AT_REST")
    stream = row.response.stream
    assert isinstance(stream, Iterator)
    body = b"".join(stream)
    if sealing is not None:
        body = sealing.open(body, _AT_REST + cache_key(row.request.url))
    return Entry(
        method=row.request.method,
        url=row.request.url,
        identity=identity,
        selecting=dict(row.request.headers),
        status=row.response.status_code,
        headers=headers,
        body=body,
        digest=body_digest(body),
        initial_age=float(initial_age),
        received=float(received),
        voucher=bytes.fromhex(voucher),
    )

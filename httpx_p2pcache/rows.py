"""An entry as hishel stores it in SQLite.

The request's selecting fields are in the place of its header, and beside the response's exact fields there is one whose
name no field can have, ``:p2pcache``, with the body's form, identity, initial age, time of receipt, voucher.
"""

from __future__ import annotations

import hishel
import msgspec
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


class _Request(msgspec.Struct):
    method: str
    url: str
    headers: dict[str, list[str]]


class _Response(msgspec.Struct):
    status_code: int
    headers: dict[str, list[str]]


class _Packed(msgspec.Struct):
    """As hishel 2 packs what is in a row's ``data``."""

    request: _Request
    response: _Response


_unpack = msgspec.msgpack.Decoder(_Packed).decode


def from_row(data: bytes, body: bytes, sealing: Keyring | None) -> Entry:
    """The entry of a row and its stream. Raises :class:`Rejected` for one that is not ours.

    hishel's own way to it, through its models, takes four times as long.
    """
    try:
        packed = _unpack(data)
        request, response = packed.request, packed.response
        form, identity, initial_age, received, voucher = response.headers.pop(_META)
        if form != ("plain" if sealing is None else "sealed"):
            raise Rejected("it was stored with another CACHE_ENCRYPT_AT_REST")
        if sealing is not None:
            body = sealing.open(body, _AT_REST + cache_key(request.url))
        return Entry(
            method=request.method,
            url=request.url,
            identity=identity,
            selecting={name: ", ".join(lines) for name, lines in request.headers.items()},
            status=response.status_code,
            headers=response.headers,
            body=body,
            digest=body_digest(body),
            initial_age=float(initial_age),
            received=float(received),
            voucher=bytes.fromhex(voucher),
        )
    except (KeyError, ValueError, msgspec.DecodeError) as exc:
        raise Rejected("a row is not one of ours") from exc

"""What is stored and what is sent: entries, and the keys that name, redact and seal them.

An :class:`Entry` is one response with as much of its request as a cache needs: method, URL, the fields that ``Vary``
nominates, and *who* asked, as a keyed digest. Credentials are replaced before anything is built from a request, so
neither the store nor a peer ever holds one.

Sealed form (associated data: protocol label and cache key)::

    nonce (12 bytes) | AES-256-GCM( msgpack(Entry) ) | tag (16 bytes)
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated, NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit, urlunsplit

import msgspec
from hishel import Headers, Request
from msgspec import Meta

from httpx_p2pcache.exceptions import UNDECODABLE, Rejected
from httpx_p2pcache.machine import place
from httpx_p2pcache.settings import DEFAULT_PORTS, Settings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PROTOCOL = b"httpx-p2pcache/1"
ANONYMOUS = ""
MAX_URL = 16_384  # characters; what is longer is not cached
EVERYONE = "f1ee7" + 27 * "0"  # the one identity of a fleet that is one user by declaration

_NAMES_OF_SECRETS = r"auth(?!ors?\b)|token|secret|passw|signature|api_?key|credential|session|jwt|assertion|bearer"
_CREDENTIAL_NAME = re.compile(rf"{_NAMES_OF_SECRETS}|cookie|key|otp|dpop", re.IGNORECASE)
# A parameter whose name ends in such a word, unless its value says yes or no, as GitHub's hide_secret=true.
_CREDENTIAL_PARAMETERS = re.compile(
    r"[?&](?:[^=&?]*(?:token|secret|passw(?:or)?d|signature|api_?key|auth|credentials?|session_?id|session|jwt|assertion"
    r"|bearer)|key|sig|code)=(?!(?:true|false|[01]?)(?:&|$))",
    re.IGNORECASE,
)
_CURSOR = re.compile(r"(?:next|(?:next_?)?page|continuation)[_-]?token")  # which names a place in a list
# No alternative may give back what another could take: a hostile field would cost the square of its length.
_LINK = re.compile(
    r"""\s*<([^<>]*)>((?:\s*;\s*[^\s=;,"<>]+(?:\s*=\s*(?:"[^"\\]*(?:\\.[^"\\]*)*"|[^\s;,"<>]+))?)*)\s*(?:,|$)"""
)
# Values of these fields may be stored and sent in clear; any other that Vary nominates becomes a keyed digest.
CLEAR_FIELDS = frozenset(
    {
        "accept",
        "accept-charset",
        "accept-encoding",
        "accept-language",
        "origin",
        "user-agent",
        "x-github-api-version",
        "x-requested-with",
    }
)
# RFC 9110 §12.5: what is preferred is said by weights, and neither by order nor by case.
_UNORDERED_FIELDS = frozenset({"accept", "accept-charset", "accept-encoding", "accept-language"})
# Two requests that differ in these ask for different representations, so each has a claim of its own.
_CLAIM_FIELDS = ("accept", "accept-language", "x-github-api-version")

Digest = Annotated[str, Meta(max_length=64)]


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One stored response with the request that caused it.

    Header values are the received bytes decoded as latin-1, so nothing is lost. ``initial_age`` is
    ``corrected_initial_age`` (RFC 9111 §4.2.3) in seconds when it was ``received`` (this machine's Unix time).
    ``identity`` is the digest of the credentials it was made with; "" for a request without any. ``digest`` names the
    body, which is left out where the receiver holds it already. ``voucher`` shows that who made it holds the
    credentials that ``identity`` names: see :class:`Asker`.
    """

    method: Annotated[str, Meta(min_length=1, max_length=16)]
    url: Annotated[str, Meta(min_length=8, max_length=MAX_URL)]
    identity: Digest
    selecting: dict[str, str]
    status: Annotated[int, Meta(ge=200, le=599)]
    headers: dict[str, list[str]]
    body: bytes
    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]
    initial_age: Annotated[float, Meta(ge=0, le=2**32)]
    received: float
    voucher: Annotated[bytes, Meta(max_length=16)] = b""

    def __repr__(self) -> str:
        return f"<Entry {self.method} {cache_key(self.url).hex()[:12]} {self.status} {len(self.body)} bytes>"

    def age(self, now: float) -> float:
        """``current_age`` in seconds (RFC 9111 §4.2.3); a clock that was set back does not make it younger."""
        return self.initial_age + max(0.0, now - self.received)

    def first(self, name: str) -> str | None:
        """A response field's lines combined into one value (RFC 9110 §5.3), or None."""
        values = self.headers.get(name)
        return None if values is None else ", ".join(values)


def cache_key(url: str) -> bytes:
    """The 32 bytes that name all entries of a URL (without user information and fragment).

    A host that is another one on each machine, as ``localhost`` is, has other keys on each: what is there is shared
    among the runners of a machine, and never with another's.
    """
    return hashlib.sha256(PROTOCOL + b" " + place(url) + url.encode()).digest()


def body_digest(body: bytes) -> bytes:
    """The 16 bytes that name a body."""
    return hashlib.sha256(body).digest()[:16]


def carries_credentials(url: str) -> bool:
    """Whether a URL's query holds a secret: such a request is neither stored nor shared."""
    # GitHub's list of an Actions cache takes the beginning of a key, which is none in this sense.
    caches = url.partition("?")[0].endswith("/actions/caches")
    named = (match[0][1:-1].lower() for match in _CREDENTIAL_PARAMETERS.finditer(url))
    return not all(_CURSOR.fullmatch(name) or (caches and name == "key") for name in named)


@lru_cache(maxsize=1024)
def is_credential(field: str) -> bool:
    """Whether a request field says *who* asks. Wider than RFC 9110's: X-Api-Key and its like count as well."""
    return _CREDENTIAL_NAME.search(field) is not None


def authority(parts: SplitResult) -> str:
    """A URL's authority as clients write it: in lower case, no port that is the scheme's own. Raises ValueError."""
    written = parts.netloc.lower()
    if parts.port is not None and parts.port == DEFAULT_PORTS.get(parts.scheme):
        return written.rpartition(":")[0]
    return written


def same_origin(a: str, b: str) -> bool:
    """RFC 9110 §4.3.1: scheme, host and port agree."""
    try:
        x, y = urlsplit(a), urlsplit(b)
        return (x.scheme, x.hostname, x.port or DEFAULT_PORTS.get(x.scheme)) == (
            y.scheme,
            y.hostname,
            y.port or DEFAULT_PORTS.get(y.scheme),
        )
    except ValueError:  # no URL, or a port that is none
        return False


def links(entry: Entry) -> list[tuple[str, str]]:
    """Each link of the ``Link`` field (RFC 8288 §3): its target's URL, and its parameters as they were sent.

    A field that is not of that form leads nowhere, to "": another reader may find whatever it likes in it.
    """
    text, found, at = entry.first("link") or "", [], 0
    while at < len(text):
        match = _LINK.match(text, at)
        if match is None:
            return [("", text)]
        found.append((resolved_url(entry.url, match[1]), match[2]))
        at = match.end()
    return found


def resolved_url(base: str, reference: str) -> str:
    """``reference`` as seen from ``base``, without fragment, as clients write it; "" for one that is no URL reference.

    Scheme and host in lower case, no port that is the scheme's own, no empty path (RFC 9110 §4.2.3).
    """
    try:
        parts = urlsplit(urljoin(base, reference.strip()))
        return urlunsplit((parts.scheme, authority(parts), parts.path or "/", parts.query, ""))
    except ValueError:
        return ""


REMEMBERED = 64  # fields of requests whose normal form is kept, and credentials whose identity is


class Asker(NamedTuple):
    """Who a request is made as: ``identity`` as peers are told it, and a ``key`` that only who can ask so can have.

    Both are halves of one keyed digest of the credentials. A member may claim that an entry is of an identity that it
    has been told of; it cannot vouch for it. There is no key, and nothing to vouch for, where anybody can ask.
    """

    identity: str
    key: bytes

    def vouch(self, entry: Entry) -> Entry:
        """``entry``, made by this asker, as others who ask so will believe it. Not its age, which is another for each.

        Without a key it is left as it is.
        """
        return msgspec.structs.replace(entry, voucher=self._voucher(entry)) if self.key else entry

    def made(self, entry: Entry) -> bool:
        """Whether the entry was made by one who asks as this one does."""
        return entry.identity == self.identity and hmac.compare_digest(self._voucher(entry), entry.voucher)

    def _voucher(self, entry: Entry) -> bytes:
        if not self.key:
            return entry.voucher
        said = entry.method, entry.url, entry.status, sorted(entry.selecting.items()), sorted(entry.headers.items())
        return hmac.digest(self.key, repr((*said, entry.digest)).encode(), "sha256")[:16]


class Keyring:
    """Every key of a fleet, derived from one secret (HKDF-SHA256, RFC 5869) with the fleet's name mixed in.

    ``secret`` is never kept; the ``repr`` shows nothing. With ``one_user`` every identity is the same, by declaration.
    ``previous`` is the keyring of the secret that this one replaces, while some still hold that alone.
    """

    def __init__(self, secret: bytes, fleet: str, *, one_user: bool = False, previous: Keyring | None = None) -> None:
        # RFC 5869 §2.2 and §2.3 for one block. Not cryptography's HKDF, the same by test: a process that leaves sealing
        # to its daemon need not import that, which costs 20 ms.
        extracted = hmac.digest(fleet.encode() or bytes(32), secret, "sha256")

        def derive(purpose: bytes) -> bytes:
            return hmac.digest(extracted, PROTOCOL + b" " + purpose + b"\x01", "sha256")

        self._one_user = one_user
        self._identity = derive(b"identity")
        self._seal = derive(b"seal")
        self._rendezvous = derive(b"rendezvous")
        self.label = derive(b"label").hex()[:16]
        # A client says the same in each request: what it comes to is worked out once.
        self._asker = lru_cache(REMEMBERED)(self._asker_of)
        self._normalised = lru_cache(REMEMBERED)(self._normalise)
        self.every: tuple[Keyring, ...] = (self,) if previous is None else (self, previous)  # the newest first
        self.admission: tuple[bytes, ...] = (derive(b"admission"), *(previous.admission if previous else ()))

    @classmethod
    def of(cls, settings: Settings, secret: bytes) -> Keyring:
        """The keys of the fleet that holds ``secret``, and of ``CACHE_PREVIOUS_SECRET``, which it replaces."""
        fleet, one_user = settings.fleet, settings.shared_identity
        old = settings.previous_secret.encode()
        return cls(secret, fleet, one_user=one_user, previous=cls(old, fleet, one_user=one_user) if old else None)

    def __repr__(self) -> str:
        return "<Keyring>"

    def asker(self, request: Request) -> Asker:
        """Who a request is made as; the identity has 32 hex digits, or none for a request without credentials."""
        return Asker(EVERYONE, b"") if self._one_user else self._bearer(request)

    def payer(self, request: Request) -> str:
        """The identity whose limits a request counts against: of its own credentials, also where all count as one."""
        return self._bearer(request).identity

    def _bearer(self, request: Request) -> Asker:
        """Who has the credentials of a request."""
        held = [(name, request.headers[name]) for name in request.headers if is_credential(name)]
        return self._asker(*sorted(held)) if held else Asker(ANONYMOUS, b"")

    def _asker_of(self, *held: tuple[str, str]) -> Asker:
        digest = hmac.digest(self._identity, repr([*held]).encode(), "sha256")
        return Asker(digest[:16].hex(), digest[16:])

    def selecting(self, headers: Headers, names: Iterable[str]) -> dict[str, str]:
        """The request fields ``names`` as they may be stored and sent; a field that is absent is left out."""
        return {name: value for name in names if (value := self.selecting_value(headers, name)) is not None}

    def selecting_value(self, headers: Headers, name: str) -> str | None:
        """One request field for comparison under Vary: "normalizing both values" (RFC 9111 §4.1).

        Lines are combined and white space is taken out; of fields whose members have no order, and no case, the order
        and the case as well.
        """
        if self._one_user and is_credential(name):
            return None
        lines = headers.get_list(name)
        return None if lines is None else self._normalised(name, *lines)

    def _normalise(self, name: str, *lines: str) -> str:
        if name not in _UNORDERED_FIELDS:  # it need not be a list: a comma may be part of what it says
            value = ", ".join(line.strip() for line in lines)
        else:
            members = [part.strip() for line in lines for part in _outside_quotes(",", line)]
            members = sorted({_caseless(member) for member in members} - {""})
            if name == "accept" and not members:
                members = ["*/*"]  # gh sends the field without a value, and means what others say by this
            value = ", ".join(members)
        if name in CLEAR_FIELDS:
            return value
        return hmac.digest(self._identity, f"{name}:{value}".encode(), "sha256").hex()[:32]

    def rendezvous(self, about: bytes) -> bytes:
        """32 bytes that nobody else can compute, by which the fleet finds itself in public."""
        return hmac.digest(self._rendezvous, about, "sha256")

    @cached_property
    def _sealer(self) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # which takes 20 ms, see above

        return AESGCM(self._seal)

    def seal(self, plain: bytes, about: bytes) -> bytes:
        """``plain`` for the eyes of the fleet; it opens only under the same ``about``, which is not hidden."""
        nonce = os.urandom(12)
        return nonce + self._sealer.encrypt(nonce, plain, PROTOCOL + b" " + about)

    def open(self, sealed: bytes, about: bytes) -> bytes:
        """What was sealed under ``about`` by a holder of the secret. Raises :class:`Rejected`."""
        from cryptography.exceptions import InvalidTag

        if len(sealed) < 28:
            raise Rejected("what is sealed is at least 28 bytes long")
        try:
            return self._sealer.decrypt(sealed[:12], sealed[12:], PROTOCOL + b" " + about)
        except InvalidTag as exc:
            raise Rejected("what is sealed does not open under this key") from exc

    def seal_entry(self, entry: Entry) -> bytes:
        """An entry's bytes for the wire; only a holder of the secret can open or have made them."""
        return self.seal(msgspec.msgpack.encode(entry), b"entry " + cache_key(entry.url))

    def open_entry(self, sealed: bytes, key: bytes) -> Entry:
        """The entry in ``sealed``, which must have been sealed for the cache key ``key``. Raises :class:`Rejected`."""
        try:
            entry = _DECODER.decode(self.open(sealed, b"entry " + key))
        except msgspec.ValidationError as exc:
            raise Rejected("a sealed entry does not have the form of one") from exc
        except UNDECODABLE as exc:
            raise Rejected("a sealed entry is not msgpack") from exc
        if cache_key(entry.url) != key:
            raise Rejected("an entry's URL and its cache key do not agree")
        if entry.body and body_digest(entry.body) != entry.digest:
            raise Rejected("an entry's body and its digest do not agree")
        return entry


def _outside_quotes(mark: str, text: str) -> list[str]:
    """``text`` split at every ``mark`` that stands in no quoted string (RFC 9110 §5.6.4)."""
    parts, quoted, escaped, begin = [], False, False, 0
    for at, character in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character == mark and not quoted:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]]


def _caseless(member: str) -> str:
    """One member of such a list without needless space; what has no case in lower case, which a parameter's value may
    have (RFC 9110 §5.6.6)."""
    value, *parameters = [part.strip() for part in _outside_quotes(";", member)]
    pairs = [part.partition("=") for part in parameters if part]
    return ";".join([value.lower(), *(f"{name.strip().lower()}{sign}{said.strip()}" for name, sign, said in pairs)])


_DECODER = msgspec.msgpack.Decoder(Entry)


def claim_key(request: Request, partition: str) -> bytes:
    """The 16 bytes that name what one fetch is for: URL, method, representation, and ``partition``, an identity.

    Where every identity can use the answer the partition is "", so that the whole fleet waits for one fetch.
    """
    asked = (request.headers.get(name) or ("*/*" if name == "accept" else "") for name in _CLAIM_FIELDS)
    parts = [place(request.url), request.method, request.url, partition, *asked]
    return hashlib.sha256(PROTOCOL + b" claim " + repr(parts).encode()).digest()[:16]

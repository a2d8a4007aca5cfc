"""What only GitHub does: entity tags that can be computed, and pages that a 304 does not tell all about.

GitHub's entity tags are bound to the token, so another token's entry cannot be validated with its own. But they follow
a rule (found by the project bored-engineer/github-conditional-http-transport)::

    sha256( value + ":"  for each of Accept, Authorization, Cookie that the request carries ; the decoded body )

So the tag that *our* token would have been given for a peer's body can be computed. Sent as ``If-None-Match`` it earns
a 304, which costs no quota, and proves two things: this token may see the resource, and the body is the true one.

The rule is undocumented, hence *learned, not trusted*: every 200 of our own shows whether it holds. Being wrong costs
the call that would have been made anyway, never a wrong answer.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import zlib
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast
from urllib.parse import parse_qs, parse_qsl, urlsplit

import hishel
import msgspec
from hishel import Headers

from httpx_p2pcache.conditions import opaque
from httpx_p2pcache.entries import Entry, links, same_origin
from httpx_p2pcache.exceptions import UNDECODABLE
from httpx_p2pcache.freshness import vary_names
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats

logger = logging.getLogger("httpx_p2pcache")

BOUND_FIELDS = ("accept", "authorization", "cookie")  # in the order in which the rule hashes them
MAX_DECODED = 16 * 1024**2  # bytes: what a body may unpack to before it is called a bomb
HOST_GIVEN_UP_AFTER = 10  # failures of the rule, if they are the majority

# GitHub pretty-prints JSON for these, so that their bodies are others.
_PRETTY_PRINTED = re.compile(r"\b(?:curl|wget|firefox|safari|chrome|mozilla)\b", re.IGNORECASE)
# What describes the representation, and so is the same whoever asks: all that is taken from another identity's entry.
_REPRESENTATION_FIELDS = frozenset(
    {
        "cache-control",
        "content-encoding",
        "content-language",
        "content-length",
        "content-type",
        "last-modified",
        "link",
        "vary",
        "x-github-media-type",
    }
)
_VARIABLE = re.compile(r"\d+|[0-9a-f]{7,40}")
# GitHub's Link fields name by number what the request has named by name.
_NUMBERED = {"repositories": ("repos", 1), "organizations": ("orgs", 1), "user": ("users", 1)}
_NAMED = {"repos": 2, "orgs": 1, "users": 1}
DEFAULT_PER_PAGE, MAX_PER_PAGE = 30, 100
# Words of GitHub's own paths, told apart in counts; whatever else stands in one may be a name of somebody's.
_WORDS = frozenset(
    (  # noqa: SIM905 - as a list it is ninety lines
        "actions advisories alerts app artifacts assets assignees branches caches check-runs check-suites "
        "code code-scanning collaborators comments commits community compare contents contributors copilot "
        "dependabot deployments dispatches emojis enterprises environments events feeds followers following "
        "forks gists git graphql hooks installation installations invitations issues jobs keys labels "
        "languages latest license licenses logs members merge merges meta milestones networks notifications "
        "orgs packages pages projects properties protection pulls rate_limit reactions readme received_events "
        "refs releases repos repositories requested_reviewers reviews rulesets runners runs search "
        "secret-scanning secrets stargazers starred stats status statuses subscribers subscription subscriptions "
        "tags tarball teams timeline topics traffic trees user users variables workflows zen zipball "
    ).split()
)


class GitHub:
    """GitHub's rules for the hosts that follow them, and what has been learned of those rules. Thread-safe."""

    def __init__(self, settings: Settings, stats: Stats) -> None:
        self._hosts = frozenset(settings.origins())
        self._computed = settings.computed_validators and not settings.shared_identity
        self._stats = stats
        self._held: Counter[tuple[str, str]] = Counter()
        self._failed: Counter[tuple[str, str]] = Counter()
        self._given_up: set[str] = set()
        self._lock = threading.Lock()

    def after_fork(self, stats: Stats) -> None:
        """In a forked child: a lock that another thread may have held is not waited for; ``stats`` are its own."""
        self._lock = threading.Lock()
        self._stats = stats

    def follows(self, url: str) -> bool:
        """Whether the URL's host is one of ``CACHE_GITHUB_HOSTS``."""
        return urlsplit(url).netloc in self._hosts

    def seen(self, request: hishel.Request) -> hishel.Request:
        """The request as it tells who asks: GitHub takes ``token T`` for ``Bearer T``, and each client has its own."""
        credentials = request.headers.get("authorization")
        if credentials is None or credentials[:6].lower() != "token " or not self.follows(request.url):
            return request
        fields = {name: request.headers.get_list(name) or [] for name in request.headers}
        fields["authorization"] = [f"Bearer {credentials[6:].strip()}"]
        return hishel.Request(request.method, request.url, Headers(fields))

    def pools(self, method: str, url: str) -> bool:
        """Whether one fetch of a URL can help every identity, so that they wait for each other."""
        if not self._computed or method != "GET" or not self.follows(url):
            return False
        place = urlsplit(url).netloc, family(url)
        return place[0] not in self._given_up and self._failed[place] <= self._held[place]

    def shares(self, method: str, url: str, headers: Headers) -> bool:
        """Whether another identity's entry can help this request: its entity tag can be computed for ours."""
        return self.pools(method, url) and not _PRETTY_PRINTED.search(headers.get("user-agent", ""))

    def validator(self, headers: Headers, entry: Entry, memo: dict[object, object]) -> str | None:
        """The entity tag that GitHub would give ``entry``'s body for a request with these fields; None: not known.

        ``memo`` is the entry's own: what has been computed of its body is not computed again.
        """
        if entry.status != 200:
            return None
        bound = tuple(headers.get(name) for name in BOUND_FIELDS)
        if bound not in memo:
            body = decoded(entry)
            usable = body is not None and not may_have_grown(entry) and links_stay(entry) and _is_plain(entry)
            memo[bound] = f'W/"{computed_etag(headers, body)}"' if usable and body is not None else None
        return cast("str | None", memo[bound])

    def learn(self, headers: Headers, entry: Entry) -> None:
        """A 200 of our own shows whether the rule holds."""
        etag = entry.first("etag")
        if not self._computed or entry.status != 200 or entry.method != "GET" or etag is None:
            return
        body = decoded(entry)
        carried = [name for name in BOUND_FIELDS if name in headers]
        if body is None or not set(carried) <= set(vary_names(entry.headers)):
            return
        host, path = urlsplit(entry.url).netloc, family(entry.url)
        holds = opaque(etag) == computed_etag(headers, body)
        self._stats.add("validators_held" if holds else "validators_failed")
        with self._lock:
            (self._held if holds else self._failed)[host, path] += 1
            if holds or host in self._given_up:
                return
            failed = sum(count for (at, _), count in self._failed.items() if at == host)
            held = sum(count for (at, _), count in self._held.items() if at == host)
            if failed < HOST_GIVEN_UP_AFTER or failed <= held:
                return
            self._given_up.add(host)
        logger.warning("%s does not compute entity tags as GitHub did: nothing is shared across tokens there", host)


def computed_etag(headers: Headers | Mapping[str, str], body: bytes) -> str:
    """The opaque part of the entity tag, by the rule at the module's head, for the *decoded* body."""
    preimage = "".join(f"{headers[name]}:" for name in BOUND_FIELDS if name in headers)
    return hashlib.sha256(preimage.encode("latin-1") + body).hexdigest()


def adopted(entry: Entry, etag: str) -> dict[str, list[str]]:
    """The fields of another identity's entry that hold for ours as well, with the tag that it has for us."""
    return {**{n: lines for n, lines in entry.headers.items() if n in _REPRESENTATION_FIELDS}, "etag": [etag]}


def decoded(entry: Entry) -> bytes | None:
    """The body without its content coding; None for a coding that is not known, or one that unpacks to too much."""
    coding = (entry.first("content-encoding") or "identity").strip().lower()
    if coding == "identity":
        return entry.body
    if coding != "gzip":
        return None
    unpack = zlib.decompressobj(wbits=31)
    try:
        body = unpack.decompress(entry.body, MAX_DECODED)
    except zlib.error:
        return None
    return body if unpack.eof and not unpack.unused_data else None  # some clients read on after its end


def may_have_grown(entry: Entry) -> bool:
    """Whether this is the last page of a list, and full: a next page may exist that a 304 does not tell of."""
    relations = entry.first("link") or ""
    asked = parse_qs(urlsplit(entry.url).query).get("per_page", [""])[0]
    size = min(int(asked[:6]), MAX_PER_PAGE) if asked.isdecimal() else DEFAULT_PER_PAGE
    if 'rel="next"' in relations:
        return size == 1 and 'rel="last"' in relations  # asked for the number of the last page: how many there are
    body = decoded(entry)
    if body is None or body[:1] not in (b"[", b"{"):
        return False
    try:
        value: Any = msgspec.json.decode(body)
    except UNDECODABLE:
        return False
    lists = [value] if isinstance(value, list) else [v for v in value.values() if isinstance(v, list)]
    paged = isinstance(value, list) or "total_count" in value
    return paged and any(len(items) >= size for items in lists)


def _is_plain(entry: Entry) -> bool:
    """Whether the body's characters are what every client takes them for: no 304 speaks of them either."""
    charset = _CHARSET.search(entry.first("content-type") or "")
    return charset is None or charset[1].lower() in ("utf-8", "us-ascii")


_CHARSET = re.compile(r"charset\s*=\s*\"?([^\s;\"]*)", re.IGNORECASE)


def links_stay(entry: Entry) -> bool:
    """Whether all targets of ``Link`` have the entry's own origin and path family, and its pages are those around it.

    No 304 speaks of that field: what another identity's entry says in it is believed as far as it can be nothing else.
    """
    ours, page = family(entry.url), _page(entry.url)
    return all(
        same_origin(url, entry.url) and family(url) == ours and _may_lead(entry.url, page, url, parameters)
        for url, parameters in links(entry)
    )


def _may_lead(here: str, page: int, url: str, parameters: str) -> bool:
    named = _RELATION.findall(parameters)
    if len(named) != 1 or parameters.lower().count("rel") != 1:  # of two, or of a list, each reader takes another
        return False
    relation, there = str(named[0]).lower(), _page(url)
    fits: dict[str, bool] = {
        "next": there == page + 1,
        "prev": there == page - 1,
        "first": there == 1,
        "last": there >= page,
    }
    if relation in fits:
        return fits[relation] and _but_for_the_page(here) == _but_for_the_page(url)
    return relation != "previous"


def _page(url: str) -> int:
    asked = parse_qs(urlsplit(url).query).get("page", ["1"])
    return int(asked[0][:9]) if len(asked) == 1 and asked[0].isdecimal() else 0


def _but_for_the_page(url: str) -> list[tuple[str, str]]:
    return sorted(pair for pair in parse_qsl(urlsplit(url).query, keep_blank_values=True) if pair[0] != "page")


_RELATION = re.compile(r";\s*rel=\"?([A-Za-z]+)\"?\s*(?:;|$)", re.IGNORECASE)


def family(url: str) -> str:
    """The path with what varies taken out: ``/repos/o/r/pulls/7`` and ``/repositories/5/pulls/9`` are one family."""
    parts = [part for part in urlsplit(url).path.split("/") if part]
    if parts[:2] == ["api", "v3"]:  # GitHub Enterprise Server
        parts = parts[2:]
    if parts and parts[0] in _NUMBERED and len(parts) > 1 and parts[1].isdecimal():
        name, skip = _NUMBERED[parts[0]]
    elif parts and parts[0] in _NAMED:
        name, skip = parts[0], _NAMED[parts[0]]
    else:
        name, skip = "", 0
    rest = parts[1 + skip :] if name else parts
    return "/".join([name, *("*" if _VARIABLE.fullmatch(part) else part for part in rest)])


@lru_cache(maxsize=4096)
def endpoint(method: str, url: str) -> str:
    """The kind of resource that a request is about, for counts: ``GET api.github.com/repos/pulls/*``.

    At most three parts, of GitHub's own words; names of owners, repositories, branches and files never, nor a query.
    """
    parts = ["*" if part not in _WORDS else part for part in family(url).split("/") if part]
    return f"{method} {urlsplit(url).netloc.rpartition('@')[2]}/{'/'.join(parts[:3])}"

from __future__ import annotations

import socket
import string
from collections.abc import Iterator

import msgspec
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hishel import Headers
from hypothesis import given
from hypothesis import strategies as st
from made import KEYRING, URL, a_request, an_entry, few, many

from httpx_p2pcache import machine
from httpx_p2pcache.entries import (
    ANONYMOUS,
    Entry,
    Keyring,
    body_digest,
    cache_key,
    carries_credentials,
    claim_key,
    is_credential,
    same_origin,
)
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.machine import proof_of_place, proves_place

CREDENTIALS = ("authorization", "cookie", "proxy-authorization", "x-github-otp", "x-api-key", "private-token")
KEY = cache_key(URL)
ABOUT = b"entry " + KEY

tokens = st.text(string.ascii_letters + string.digits + "_-.", min_size=8, max_size=80)
latin = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=20)
names = st.text(string.ascii_lowercase + "-", min_size=1, max_size=12)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    return an_entry(
        method=draw(st.sampled_from(["GET", "HEAD"])),
        url="https://example.com/" + draw(st.text(string.ascii_letters + "/?&=", max_size=20)),
        identity=draw(st.sampled_from(["", "a" * 32])),
        selecting=draw(st.dictionaries(names, latin, max_size=3)),
        status=draw(st.integers(200, 599)),
        headers=draw(st.dictionaries(names, st.lists(latin, min_size=1, max_size=3), max_size=5)),
        body=draw(st.binary(max_size=200)),
        initial_age=draw(st.floats(0, 2**32)),
        received=draw(st.floats(0, 2**33)),
    )


# Keys


@given(st.text(max_size=50), st.text(max_size=50))
@few
def test_a_cache_key_is_32_bytes_and_names_one_url(a: str, b: str) -> None:
    assert len(cache_key(a)) == 32
    assert (cache_key(a) == cache_key(b)) == (a == b)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if this were another machine."""
    with monkeypatch.context() as context:
        context.setattr(machine, "_machine", lambda: b"another machine ")
        machine._place.cache_clear()
        yield
    machine._place.cache_clear()


THIS_MACHINES = [
    "http://localhost/x",
    "http://LOCALHOST:8000/x",
    "http://127.0.0.1:8000/x?y",
    "http://127.1/x",
    "http://[::1]:80/x",
    "http://0.0.0.0/x",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1%25eth0]/x",
    "http://[::ffff:127.0.0.1]/x",
    "http://[fd00:ec2::254]/x",
    "http://metadata.google.internal/x",
    "http://redis:6379/x",
    "http://printer.local./x",
    "http://app.localhost/x",
]
EVERYBODYS = [
    "https://api.github.com/x",
    "http://10.0.0.1/x",
    "https://ghe.example.com:8443/x",
    "http://198.51.100.1/x",
]
HERE = {url: (cache_key(url), claim_key(a_request(url=url), "")) for url in THIS_MACHINES + EVERYBODYS}


@pytest.mark.parametrize("url", THIS_MACHINES + EVERYBODYS)
@pytest.mark.usefixtures("elsewhere")
def test_a_host_that_is_another_one_on_each_machine_has_other_keys_on_each(url: str) -> None:
    there = cache_key(url), claim_key(a_request(url=url), "")
    assert [here == other for here, other in zip(HERE[url], there, strict=True)] == 2 * [url in EVERYBODYS]


@pytest.mark.usefixtures("elsewhere")
def test_what_another_machine_has_found_at_its_own_localhost_is_rejected() -> None:
    url = "http://localhost:3000/x"
    key, sealed = cache_key(url), KEYRING.seal_entry(an_entry(url=url))
    assert KEYRING.open_entry(sealed, key).url == url
    machine._place.cache_clear()
    with pytest.MonkeyPatch.context() as here:
        here.setattr(machine, "_machine", lambda: b"this machine ")
        with pytest.raises(Rejected, match="cache key do not agree"):
            KEYRING.open_entry(sealed, key)


@given(st.binary(max_size=50), st.binary(max_size=50))
@few
def test_a_body_digest_is_16_bytes_and_names_one_body(a: bytes, b: bytes) -> None:
    assert len(body_digest(a)) == 16
    assert (body_digest(a) == body_digest(b)) == (a == b)


@pytest.mark.parametrize(
    "other",
    [
        claim_key(a_request("HEAD", accept="text/plain"), "me"),
        claim_key(a_request(url=URL + "?page=2", accept="text/plain"), "me"),
        claim_key(a_request(accept="application/json"), "me"),
        claim_key(a_request(accept="text/plain", accept_language="de"), "me"),
        claim_key(a_request(accept="text/plain", x_github_api_version="2022-11-28"), "me"),
        claim_key(a_request(accept="text/plain"), "you"),
        claim_key(a_request(accept="text/plain"), ANONYMOUS),
        claim_key(a_request(), "me"),
    ],
)
def test_requests_for_different_things_have_different_claims(other: bytes) -> None:
    assert claim_key(a_request(accept="text/plain"), "me") != other


def test_requests_for_the_same_thing_share_a_claim_of_16_bytes() -> None:
    ours = claim_key(a_request(accept="text/plain", user_agent="a", authorization="Bearer x"), ANONYMOUS)
    theirs = claim_key(a_request(authorization="Bearer y", Accept="text/plain"), ANONYMOUS)
    assert ours == theirs
    assert len(ours) == 16


# Identities


@given(st.sampled_from(CREDENTIALS), tokens, tokens)
@many
def test_two_requests_have_one_identity_exactly_when_their_credentials_agree(field: str, a: str, b: str) -> None:
    ours, theirs = (KEYRING.asker(a_request(**{field: token})).identity for token in (a, b))
    assert (ours == theirs) == (a == b)
    assert len(ours) == 32
    assert set(ours) <= set(string.hexdigits)


@given(st.text(string.digits + "_-.", min_size=12, max_size=80), st.sampled_from(CREDENTIALS))
@few
def test_nothing_of_a_token_appears_in_what_is_made_of_it(token: str, field: str) -> None:
    request = a_request(**{field: f"Bearer {token}", "accept": "text/plain"})
    entry = an_entry(identity=KEYRING.asker(request), selecting=KEYRING.selecting(request.headers, [field, "accept"]))
    stored = msgspec.msgpack.encode(entry)
    for made in (stored, KEYRING.seal_entry(entry), repr(entry).encode(), repr(KEYRING).encode()):
        for at in range(len(token) - 11):
            assert token[at : at + 12].encode() not in made


def test_a_request_without_credentials_is_anonymous() -> None:
    assert KEYRING.asker(a_request(accept="*/*", user_agent="x", x_requested_with="y")).identity == ANONYMOUS == ""


@pytest.mark.parametrize("field", CREDENTIALS)
def test_every_credential_counts(field: str) -> None:
    assert KEYRING.asker(a_request(**{field: "x"})).identity != ANONYMOUS


def test_an_identity_does_not_depend_on_order_or_case_of_the_names() -> None:
    ours = KEYRING.asker(a_request(authorization="a", cookie="b", accept="c")).identity
    assert KEYRING.asker(a_request(Cookie="b", AUTHORIZATION="a")).identity == ours


def test_one_credential_is_not_taken_for_another() -> None:
    identities = {
        KEYRING.asker(a_request(authorization="a")).identity,
        KEYRING.asker(a_request(cookie="a")).identity,
        KEYRING.asker(a_request(authorization="a", cookie="a")).identity,
        KEYRING.asker(a_request(authorization=["a", "a"])).identity,
        KEYRING.asker(a_request(authorization="token a")).identity,
        KEYRING.asker(a_request(authorization="Bearer a")).identity,
    }
    assert len(identities) == 6


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"body": b"forged", "digest": body_digest(b"forged")}, id="body"),
        pytest.param({"headers": {"cache-control": ["private, max-age=99"]}}, id="fields"),
        pytest.param({"status": 404}, id="status"),
        pytest.param({"selecting": {"accept": "text/html"}}, id="selecting"),
        pytest.param({"url": "https://api.github.com/user"}, id="url"),
        pytest.param({"method": "HEAD"}, id="method"),
        pytest.param({"voucher": b""}, id="no-voucher"),
        pytest.param({"voucher": bytes(16)}, id="another-voucher"),
    ],
)
def test_only_who_holds_the_credentials_can_vouch_for_an_entry(changes: dict[str, object]) -> None:
    ours, theirs = (KEYRING.asker(a_request(authorization=token)) for token in ("Bearer a", "Bearer b"))
    entry = ours.vouch(an_entry(identity=ours.identity))
    assert ours.made(entry)
    assert not ours.made(msgspec.structs.replace(entry, **changes))
    assert not ours.made(theirs.vouch(entry))
    assert ours.key not in msgspec.msgpack.encode(entry)


def test_members_of_one_fleet_agree_on_an_identity_and_of_another_do_not() -> None:
    request = a_request(authorization="Bearer x")
    ours = Keyring(b"secret", "repo").asker(request).identity
    assert Keyring(b"secret", "repo").asker(request).identity == ours
    assert Keyring(b"secret", "other").asker(request).identity != ours
    assert Keyring(b"Secret", "repo").asker(request).identity != ours


@given(st.binary(min_size=1, max_size=100), st.text(min_size=1, max_size=50))
@few
def test_keys_are_those_of_hkdf_sha256(secret: bytes, fleet: str) -> None:
    made = HKDF(SHA256(), 32, salt=fleet.encode(), info=b"httpx-p2pcache/1 admission").derive(secret)
    assert Keyring(secret, fleet).admission == (made,)


def test_each_key_of_a_fleet_is_another() -> None:
    rings = [Keyring(b"secret", "repo"), Keyring(b"secret", "other"), Keyring(b"Secret", "repo")]
    assert len({ring.admission for ring in rings}) == len({ring.label for ring in rings}) == 3
    assert all([len(key) for key in ring.admission] == [32] and len(ring.label) == 16 for ring in rings)


# What is selected by Vary


def test_a_field_that_is_no_credential_is_kept_in_clear_with_its_white_space_normalised() -> None:
    headers = Headers({"x-requested-with": [" one ,two", "three"], "accept-language": "de", "cookie": "x"})
    assert KEYRING.selecting(headers, ["x-requested-with", "accept-language", "origin"]) == {
        "x-requested-with": "one ,two, three",
        "accept-language": "de",
    }


def test_white_space_at_a_comma_means_nothing_in_a_list_and_may_mean_something_elsewhere() -> None:
    """RFC 9111 §4.1: where the field's own syntax allows it."""

    def value(name: str, text: str) -> str | None:
        return KEYRING.selecting_value(Headers({name: [text]}), name)

    assert value("accept-language", "de,en") == value("accept-language", "de , en")
    assert value("x-query", "a,b") != value("x-query", "a, b")


@pytest.mark.parametrize("name", ["accept", "accept-charset", "accept-encoding", "accept-language"])
def test_a_preference_is_the_same_in_whatever_order_and_case_it_is_said(name: str) -> None:
    ours = KEYRING.selecting_value(Headers({name: "text/html;q=0.5, B/c"}), name)
    assert KEYRING.selecting_value(Headers({name: ["b/C", "text/html; q=0.5"]}), name) == ours
    assert KEYRING.selecting_value(Headers({name: "text/html;q=0.6, b/c"}), name) != ours


@given(st.lists(st.text(string.ascii_letters, min_size=1), min_size=1, max_size=4), st.sampled_from(["accept", "x-y"]))
@few
def test_a_field_on_several_lines_is_the_same_as_on_one(parts: list[str], name: str) -> None:
    one = KEYRING.selecting_value(Headers({name: ", ".join(parts)}), name)
    assert KEYRING.selecting_value(Headers({name: list(parts)}), name) == one


def test_a_field_not_known_to_be_harmless_is_kept_as_a_digest_bound_to_its_name() -> None:
    headers = Headers({"x-tenant": "acme", "x-team": "acme"})
    kept = KEYRING.selecting(headers, ["x-tenant", "x-team"])
    assert kept["x-tenant"] != kept["x-team"]
    assert all(len(value) == 32 and "acme" not in value for value in kept.values())


def test_an_absent_field_differs_from_an_empty_one() -> None:
    assert KEYRING.selecting_value(Headers({}), "accept-language") is None
    assert KEYRING.selecting_value(Headers({"accept-language": ""}), "accept-language") == ""


def test_an_accept_without_a_value_takes_anything() -> None:
    assert KEYRING.selecting_value(Headers({"accept": ""}), "accept") == "*/*"
    assert KEYRING.selecting_value(Headers({}), "accept") is None  # RFC 9111 §4.1: absent matches absent alone


@pytest.mark.parametrize(
    ("field", "credential"),
    [
        ("authorization", True),
        ("Cookie", True),
        ("x-github-otp", True),
        ("x-api-key", True),
        ("x-amz-security-token", True),
        ("x-session-id", True),
        ("accept", False),
        ("user-agent", False),
        ("x-github-api-version", False),
        ("if-none-match", False),
        ("x-requested-with", False),
        ("proxy-authorization", True),
        ("Authorization", True),
    ],
)
def test_which_fields_say_who_asks(field: str, credential: bool) -> None:
    assert is_credential(field) == credential


@pytest.mark.parametrize(
    ("query", "secret"),
    [
        ("?secret_type=adafruit_io_key&hide_secret=true", False),
        ("?access_token=x", True),
        ("?page=1&API_KEY=x", True),
        ("?apikey=x", True),
        ("?X-Amz-Signature=x", True),
        ("?sig=x&page=2", True),
        ("?page=1", False),
        ("?q=password", False),
        ("?author=octocat", False),
        ("?page_count=1", False),
        ("/access_token=x", False),
        ("", False),
    ],
)
def test_which_urls_hold_a_secret(query: str, secret: bool) -> None:
    assert carries_credentials(URL + query) == secret


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("https://a.test/x", "https://a.test/y?z", True),
        ("https://a.test/", "https://A.TEST/", True),
        ("https://a.test/", "https://a.test:443/", True),
        ("http://a.test:80/", "http://a.test/", True),
        ("https://a.test/", "http://a.test/", False),
        ("https://a.test/", "https://b.test/", False),
        ("https://a.test:8443/", "https://a.test/", False),
        ("https://a.test:80/", "https://a.test/", False),
        ("https://a.test:x/", "https://a.test/", False),
        ("https://a.test:99999/", "https://a.test/", False),
        ("https://[a.test/", "https://a.test/", False),
        ("https://a.test/", "https://[::1", False),
    ],
)
def test_an_origin_is_scheme_host_and_port(a: str, b: str, same: bool) -> None:
    assert same_origin(a, b) == same


# Seal and open


@given(st.binary(max_size=300), st.binary(max_size=40))
@few
def test_what_is_sealed_opens_under_the_same_words(plain: bytes, about: bytes) -> None:
    sealed = KEYRING.seal(plain, about)
    assert KEYRING.open(sealed, about) == plain
    assert len(sealed) == len(plain) + 28


def test_the_same_thing_sealed_twice_looks_different() -> None:
    assert KEYRING.seal(b"same", b"") != KEYRING.seal(b"same", b"")


@given(entries())
@many
def test_an_entry_comes_out_as_it_was_sealed(entry: Entry) -> None:
    assert KEYRING.open_entry(KEYRING.seal_entry(entry), cache_key(entry.url)) == entry


@given(st.data())
@many
def test_one_changed_bit_is_rejected(data: st.DataObject) -> None:
    sealed = bytearray(KEYRING.seal_entry(an_entry()))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Rejected, match="does not open"):
        KEYRING.open_entry(bytes(sealed), KEY)


@given(st.data())
@few
def test_a_part_of_it_is_rejected(data: st.DataObject) -> None:
    sealed = KEYRING.seal_entry(an_entry())
    with pytest.raises(Rejected):
        KEYRING.open_entry(sealed[: data.draw(st.integers(0, len(sealed) - 1))], KEY)


@given(st.binary(max_size=200))
@few
def test_whatever_is_not_sealed_is_rejected(noise: bytes) -> None:
    with pytest.raises(Rejected):
        KEYRING.open_entry(noise, KEY)


@pytest.mark.parametrize(
    "ring", [Keyring(b"another secret", "octo-org/repo-0"), Keyring(b"the secret of a fleet", "x")]
)
def test_another_fleet_cannot_open_it(ring: Keyring) -> None:
    with pytest.raises(Rejected, match="does not open"):
        ring.open_entry(KEYRING.seal_entry(an_entry()), KEY)


def test_an_entry_does_not_open_for_another_key() -> None:
    with pytest.raises(Rejected, match="does not open"):
        KEYRING.open_entry(KEYRING.seal_entry(an_entry()), cache_key(URL + "?other"))


def test_an_entry_sealed_for_a_key_that_is_not_its_urls_is_rejected() -> None:
    sealed = KEYRING.seal(msgspec.msgpack.encode(an_entry(url=URL + "?other")), ABOUT)
    with pytest.raises(Rejected, match="cache key do not agree"):
        KEYRING.open_entry(sealed, KEY)


def test_a_body_that_is_not_its_digests_is_rejected() -> None:
    with pytest.raises(Rejected, match="digest do not agree"):
        KEYRING.open_entry(KEYRING.seal_entry(an_entry(digest=body_digest(b"another"))), KEY)


def test_a_body_may_be_left_out() -> None:
    entry = an_entry(body=b"", digest=body_digest(b"held by the receiver"))
    assert KEYRING.open_entry(KEYRING.seal_entry(entry), KEY) == entry


@pytest.mark.parametrize(
    "changes",
    [
        {"method": ""},
        {"method": "A" * 17},
        {"url": "http://"},
        {"url": "https://a.test/" + "x" * 16384},
        {"identity": "x" * 65},
        {"selecting": {"accept": None}},
        {"status": 199},
        {"status": 600},
        {"status": "200"},
        {"headers": {"etag": "not a list"}},
        {"headers": [["etag", "x"]]},
        {"digest": b"short"},
        {"initial_age": -1.0},
        {"initial_age": 2.0**33},
        {"initial_age": float("nan")},
        {"initial_age": float("inf")},
        {"received": "now"},
    ],
    ids=str,
)
def test_an_entry_with_an_impossible_part_is_rejected(changes: dict[str, object]) -> None:
    entry = an_entry(**changes)
    sealed = KEYRING.seal(msgspec.msgpack.encode(entry), b"entry " + cache_key(entry.url))
    with pytest.raises(Rejected, match="form"):
        KEYRING.open_entry(sealed, cache_key(entry.url))


NESTED = b"\x91" * 100_000 + b"\x90"


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"\xc1",
        b"{}",
        b"\x90",
        msgspec.msgpack.encode({"method": "GET"}),
        msgspec.msgpack.encode(an_entry())[:-1],
        msgspec.msgpack.encode(an_entry()) + b"\x00",
        msgspec.msgpack.encode(an_entry()).replace(URL.encode(), b"\xff" * len(URL)),
        NESTED,
        b"\x9b" + msgspec.msgpack.encode(an_entry())[1:] + NESTED,
    ],
    ids=["empty", "reserved", "json", "no-parts", "map", "cut", "longer", "not-utf-8", "nested", "nested-behind"],
)
def test_what_a_member_sealed_that_is_no_entry_is_rejected(plain: bytes) -> None:
    with pytest.raises(Rejected):
        KEYRING.open_entry(KEYRING.seal(plain, ABOUT), KEY)


# Entries


@given(st.floats(0, 1e6), st.floats(0, 2e9), st.floats(0, 2e9))
@few
def test_an_entry_ages_with_the_clock_and_never_gets_younger_than_it_came(age: float, then: float, now: float) -> None:
    entry = an_entry(initial_age=age, received=then)
    assert entry.age(now) == (age + (now - then) if now > then else age)


def test_the_lines_of_a_field_combine_into_one_value() -> None:
    entry = an_entry(headers={"vary": ["Accept", "Cookie"]})
    assert entry.first("vary") == "Accept, Cookie"
    assert entry.first("etag") is None


def test_the_repr_of_an_entry_shows_neither_its_query_nor_its_identity_nor_its_body() -> None:
    entry = an_entry(url=URL + "?q=private", identity="f" * 32, body=b"confidential", selecting={"cookie": "d" * 32})
    for hidden in ("private", "f" * 32, "confidential", "d" * 32, "octo-org"):
        assert hidden not in repr(entry)


def test_who_is_on_this_machine_proves_it_to_one_peer_and_for_itself_alone() -> None:
    proof = proof_of_place(b"me", b"you")
    assert proves_place(proof, b"me", b"you")
    assert not proves_place(proof, b"somebody who has copied it", b"you")
    assert not proves_place(proof, b"me", b"somebody else")
    for said in ("", socket.gethostname(), "x" * 64, "\u20ac"):
        assert not proves_place(said, b"me", b"you")

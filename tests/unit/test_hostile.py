"""What a hostile member, origin or environment may say, at the functions that have to stand it."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from made import KEYRING, URL, an_entry

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exceptions import Rejected, SettingsError
from httpx_p2pcache.network import Question
from httpx_p2pcache.node.checks import believed
from httpx_p2pcache.node.protocol import Ask, Introduce, Push, pack, unpack
from httpx_p2pcache.quota import PROBE_SECONDS, Quota, QuotaBoard

PUBLIC = {"cache-control": ["public, max-age=60"]}
LOOKUP_BUDGET = 0.25  # seconds by which a peer may delay a request at the most
LONG = 16_000  # bytes of a hostile field; 64 KiB are let in, where what is quadratic takes sixteen times as long


# What an entry may hold


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"headers": PUBLIC | {"link": ["<" * LONG]}}, id="link-of-brackets"),
        pytest.param({"headers": PUBLIC | {"link": ['<a>;x="' + "rel=" * (LONG // 4) + '"']}}, id="link-of-rels"),
        pytest.param(
            {"headers": {"cache-control": ["max-age=60, a=" + " " * LONG + '"']}}, id="cache-control-of-spaces"
        ),
        pytest.param({"url": "http://a.test/" + "?" * (LONG // 2)}, id="url-of-question-marks"),
    ],
)
def test_checking_an_entry_never_takes_longer_than_a_peer_may_delay_a_request(changes: dict[str, object]) -> None:
    """A regular expression holds the interpreter's lock: meanwhile no thread of the process answers anything."""
    entry = an_entry(**changes)
    began = time.process_time()
    try:
        believed(entry, 0.0, time.time(), 2**23)
    except Rejected:
        pass
    assert time.process_time() - began < LOOKUP_BUDGET


@pytest.mark.parametrize(
    "selecting",
    [
        pytest.param({"accept": "x" * 1_000_000}, id="a-value-of-a-megabyte"),
        pytest.param({str(number): "" for number in range(100_000)}, id="a-hundred-thousand-names"),
        pytest.param({"accept\r\nx": "a\0b"}, id="control-bytes"),
    ],
)
def test_the_selecting_fields_of_an_entry_are_checked_as_its_own_are(selecting: dict[str, str]) -> None:
    with pytest.raises(Rejected):
        believed(an_entry(selecting=selecting), 0.0, time.time(), 2**23)


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", b'{"id": 1}'),
        ("deflate", b"no deflate"),
        ("gzip", b"\x1f\x8b\x08"),
        pytest.param("gzip, gzip", gzip.compress(gzip.compress(bytes(200 * 2**20), 1)), id="a-bomb-in-a-bomb"),
        ("br", b"what is not checked"),
        ("zstd", b"what is not checked"),
    ],
)
def test_a_body_that_is_not_what_its_coding_says_is_not_believed(coding: str, body: bytes) -> None:
    """It would fail the request of whoever reads it, though the origin is well."""
    with pytest.raises(Rejected):
        believed(an_entry(headers=PUBLIC | {"content-encoding": [coding]}, body=body), 0.0, time.time(), 2**23)


# What a frame may hold


def test_the_addresses_of_a_member_that_is_told_of_are_as_few_as_those_of_the_one_who_tells() -> None:
    many = [(b"peer-id", ["/ip4/127.0.0.1/tcp/1"] * 17)]
    with pytest.raises(Rejected):
        unpack(pack(Introduce([], "host", many, 0, True))[4:])


@pytest.mark.parametrize(
    "selecting",
    [
        pytest.param({"accept": "x" * 1_000_000}, id="a-value-of-a-megabyte"),
        pytest.param({str(number): "" for number in range(101)}, id="too-many"),
    ],
)
def test_a_question_is_not_larger_than_the_fields_of_a_request_can_be(selecting: dict[str, str]) -> None:
    """It is kept as long as its asker waits: what a member may say here, it may have us keep."""
    question = Question(key=bytes(32), claim=bytes(16), method="GET", identity="", selecting={"accept": "*/*"})
    frame = msgspec.msgpack.decode(msgspec.msgpack.encode(Ask(1, question)))
    assert unpack(msgspec.msgpack.encode(frame)) == Ask(1, question)
    frame[2][4] = selecting
    with pytest.raises(Rejected):
        unpack(msgspec.msgpack.encode(frame))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_time_on_the_way_that_is_none_is_rejected(value: float) -> None:
    with pytest.raises(Rejected):
        unpack(pack(Push(bytes(32), bytes(16), b"", value))[4:])


# Quotas that a member tells of


def test_a_refusal_that_a_member_has_seen_in_the_future_is_probed_once_a_minute_like_any_other() -> None:
    board, now = QuotaBoard(), 1_000_000.0
    told = Quota(
        identity="", resource="core", limit=60, remaining=0, reset=now + 3600, refused_until=now + 3600, seen=now + 3500
    )
    board.merge(told, now)
    assert board.refused("", URL, now + 1)
    assert not board.refused("", URL, now + PROBE_SECONDS + 1)


def test_a_refusal_that_a_member_tells_of_again_and_again_is_probed_as_often_as_any_other() -> None:
    board, now, probed = QuotaBoard(), 1_000_000.0, 0
    for second in range(0, 600, 5):
        at = now + second
        board.merge(
            Quota(identity="", resource="core", limit=60, remaining=0, reset=at, refused_until=at + 3600, seen=at), at
        )
        probed += not board.refused("", URL, at)
    assert probed == 600 // PROBE_SECONDS - 1


# What an origin may say


Client = Callable[..., httpx.Client]


@pytest.fixture
def client(local: Settings, request: pytest.FixtureRequest) -> Client:
    """``client(answer)``: one whose origin, a GitHub, answers like that."""

    def build(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
        built = httpx.Client(transport=P2PCacheTransport(httpx.MockTransport(answer), settings=local))
        request.addfinalizer(built.close)
        return built

    return build


STALE = {"Cache-Control": "max-age=60", "Age": "61", "ETag": '"1"'}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 100_000, id="nested-deeply"),
        pytest.param(b'{"name": "M\xfcller"}', id="latin-1-object"),
        pytest.param(b'["M\xfcller"]', id="latin-1-list"),
    ],
)
def test_a_stale_body_that_only_begins_like_json_is_answered_as_without_a_cache(client: Client, body: bytes) -> None:
    asking = client(lambda request: httpx.Response(200, headers=STALE, content=body))
    for _ in range(2):
        assert asking.get(URL).content == body


def test_a_page_size_in_digits_that_are_no_number_is_answered_as_without_a_cache(client: Client) -> None:
    asking = client(lambda request: httpx.Response(200, headers=STALE, content=b"[]"))
    for _ in range(2):
        assert asking.get(f"{URL}/issues", params={"per_page": "\xb2"}).content == b"[]"


@pytest.mark.parametrize("name", ["X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "Retry-After"])
def test_a_limit_in_digits_that_are_no_number_is_answered_as_without_a_cache(client: Client, name: str) -> None:
    limits = {f"X-RateLimit-{part}": "5" for part in ("Limit", "Remaining", "Reset")}
    fields = [(n.encode(), v.encode("latin-1")) for n, v in (limits | {name: "\xb2"}).items()]
    asking = client(lambda request: httpx.Response(429 if name == "Retry-After" else 200, headers=fields, content=b"x"))
    assert asking.get(URL).content == b"x"


def test_a_length_in_digits_that_are_no_number_is_answered_as_without_a_cache(client: Client) -> None:
    fields = [(b"Content-Length", b"\xb3")]
    asking = client(lambda request: httpx.Response(200, headers=fields, stream=httpx.ByteStream(b"x")))
    assert asking.get(URL).content == b"x"


@pytest.mark.parametrize("date", ["Mon, 01 Jan 0001 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT"])
@pytest.mark.parametrize("age", ["0", "2147483648", "99999999999999999999"])
def test_a_date_at_the_end_of_time_is_answered_as_without_a_cache(client: Client, date: str, age: str) -> None:
    fields = {"Cache-Control": "max-age=60", "Date": date, "Age": age, "ETag": '"1"'}
    asking = client(lambda request: httpx.Response(200, headers=fields, content=b"x"))
    for _ in range(2):
        assert asking.get(URL).content == b"x"


@pytest.mark.parametrize("name", ["Cache-Control", "Link", "Vary", "Connection"])
def test_a_long_field_of_an_origin_holds_up_nothing(client: Client, name: str) -> None:
    """As much as h11 lets in: what is quadratic in it stops every thread of the process."""
    value = {"Cache-Control": "a=" + " " * LONG + '"', "Link": "<" * LONG}.get(name, "," * LONG)
    fields = STALE | {name: value}
    asking = client(lambda request: httpx.Response(200, headers=fields, content=b"[]"))
    began = time.process_time()
    for _ in range(2):
        assert asking.get(URL).content == b"[]"
    assert time.process_time() - began < 4 * LOOKUP_BUDGET


# What an environment may hold


@pytest.mark.parametrize("name", ["CACHE_DIR", "CACHE_PEER_REGISTRY"])
def test_a_home_that_nobody_has_is_a_settings_error(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings.from_env({name: "~nobody-of-this-name/cache"})


@pytest.mark.parametrize("name", ["CACHE_SHARED_SECRET", "CACHE_FLEET", "GITHUB_TOKEN", "GITHUB_REPOSITORY"])
def test_bytes_that_are_no_text_are_used_as_they_are_or_are_a_settings_error(name: str) -> None:
    """As ``os.environ`` holds a secret in Latin-1 under a UTF-8 locale."""
    try:
        settings = Settings.from_env({name: os.fsdecode(b"p\xe4ss")})
    except SettingsError:
        return
    transport = P2PCacheTransport(settings=msgspec.structs.replace(settings, enable_p2p=False))
    transport.close()


# What lies in the registry


def test_a_record_of_the_far_future_does_not_count_for_ever(tmp_path: Path) -> None:
    registry = pytest.importorskip("httpx_p2pcache.node.discovery.registry")
    for name, written in (("late", time.time() + 10 * 365 * 86400), ("never", float("nan"))):
        record = registry.Record(b"peer-id", ["/ip4/127.0.0.1/tcp/1"], "host", written)
        path = tmp_path / f"{KEYRING.label}-{name}.peer"
        path.write_bytes(KEYRING.seal(msgspec.msgpack.encode(record), b"registry"))
    assert registry.Registry(tmp_path, KEYRING, 1800.0).find() == []


def test_a_file_that_its_owner_removes_while_we_look_is_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = pytest.importorskip("httpx_p2pcache.node.discovery.registry")
    leaving = registry.Registry(tmp_path, KEYRING, 1800.0)
    leaving.announce(b"peer-id", ["/ip4/127.0.0.1/tcp/1"])
    seen = list(os.scandir(tmp_path))
    leaving.withdraw()
    monkeypatch.setattr(registry.os, "scandir", lambda _: iter(seen))
    assert registry.Registry(tmp_path, KEYRING, 1800.0).find() == []


# The fuzz targets themselves: their seeds, and what they have found, in every run of the tests


def _targets() -> dict[str, Any]:
    from importlib.util import module_from_spec, spec_from_file_location

    path = Path(__file__).parents[1] / "fuzz" / "targets.py"
    spec = spec_from_file_location("fuzz_targets", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


@pytest.mark.parametrize("name", ["frames", "admission", "entries", "registry", "fields", "door"])
def test_the_seeds_of_a_fuzz_target_find_nothing(name: str) -> None:
    pytest.importorskip("h11")
    if name == "registry":
        pytest.importorskip("libp2p")
    module = _targets()
    try:
        for seed in module["TARGETS"][name].seeds:
            module["TARGETS"][name].run(seed)
    finally:
        module["close"]()


# Statistics that a member tells of


def test_what_a_member_says_it_has_counted_can_always_be_shown() -> None:
    from httpx_p2pcache.stats import aggregate

    told = {"a": {"requests": 2**64 - 1, "no such counter": 5}, "\0" * 64: {}}
    shown = aggregate(told, 1)
    json.dumps(shown)
    assert shown["runners"] == 2


def test_a_keyring_says_nothing_of_a_hostile_key() -> None:
    ring = Keyring(b"", "")
    with pytest.raises(Rejected):
        ring.open_entry(KEYRING.seal_entry(an_entry()), bytes(32))


def test_an_entry_whose_url_no_parser_takes_is_not_believed() -> None:
    with pytest.raises(Rejected):
        believed(an_entry(url="https://a.test]/"), 0.0, time.time(), 2**23)


@pytest.mark.parametrize("host", ["://ghe.test", "http://"])
def test_a_host_without_a_scheme_or_a_name_is_a_settings_error(host: str) -> None:
    try:
        settings = Settings.from_env({"CACHE_GITHUB_HOSTS": host})
    except SettingsError:
        return
    assert all(name and scheme in ("http", "https") for name, scheme in settings.origins().items())


@pytest.mark.parametrize("target", ["/a?b#c", "/a?%", "/a?b=[", "/\\", "/a?b={}|^`", "/" + "%" * 100])
def test_a_target_that_an_http_parser_lets_through_is_answered_by_the_door(target: str) -> None:
    pytest.importorskip("h11")
    module = _targets()
    try:
        module["door"](f"GET {target} HTTP/1.1\r\nHost: api.github.com\r\n\r\n".encode())
    finally:
        module["close"]()

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from made import URL, an_entry, said
from waiting import eventually

from httpx_p2pcache import behind as behind_module
from httpx_p2pcache import database as database_module
from httpx_p2pcache import memory as memory_module
from httpx_p2pcache import store as store_module
from httpx_p2pcache.entries import Entry, Keyring, cache_key
from httpx_p2pcache.files import local_secret
from httpx_p2pcache.store import Store

KEY = cache_key(URL)
OTHER_URL = "https://b.test/other"
OTHER_KEY = cache_key(OTHER_URL)
ME, YOU = "a" * 32, "b" * 32
DATABASE = "p2pcache-v1.db"

latin = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=20)
names = st.text(string.ascii_lowercase + "-", min_size=1, max_size=12)


def open_store(directory: Path, max_size: int = 2**30, *, behind: bool = False) -> Store:
    return Store(directory, max_size=max_size, default_ttl=300.0, behind=behind)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """Two stores that share a directory, as two processes of a runner do."""
    a, b = open_store(tmp_path / "store"), open_store(tmp_path / "store")
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def store(two: tuple[Store, Store]) -> Store:
    return two[0]


def saved(store: Store, **changes: object) -> store_module.Stored:
    stored = store.save(an_entry(**changes))
    assert stored is not None
    return stored


def held(store: Store, key: bytes = KEY) -> list[Entry]:
    return sorted((stored.entry for stored in store.load(key)), key=msgspec.msgpack.encode)


def in_another_process(directory: Path, script: str) -> object:
    """What ``script`` prints as JSON; in it there are ``store``, ``an_entry``, ``URL``, ``KEY``."""
    done = subprocess.run(
        [sys.executable, "-c", head(directory) + script], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def head(directory: Path) -> str:
    return "\n".join(
        [
            "import json, os, sys, threading, time",
            "from pathlib import Path",
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
            "from made import URL, an_entry",
            "from httpx_p2pcache.entries import cache_key",
            "from httpx_p2pcache.store import Store",
            "KEY = cache_key(URL)",
            f"store = Store(Path({str(directory)!r}), max_size=2**30, default_ttl=300.0)",
            "",
        ]
    )


# What is saved is what is loaded


@given(
    st.dictionaries(names, st.lists(latin, min_size=1, max_size=3), max_size=5),
    st.dictionaries(names, latin, max_size=3),
    st.binary(max_size=500) | st.integers(100_000, 400_000).map(bytes),
    st.sampled_from(["", ME]),
    st.floats(0, 2**32),
    st.floats(1, 2**33),
)
@settings(max_examples=25, deadline=None)
def test_an_entry_is_loaded_exactly_as_it_was_saved(
    headers: dict[str, list[str]], selecting: dict[str, str], body: bytes, identity: str, age: float, received: float
) -> None:
    entry = an_entry(
        headers=headers, selecting=selecting, body=body, identity=identity, initial_age=age, received=received
    )
    with tempfile.TemporaryDirectory() as directory:
        a, b = open_store(Path(directory)), open_store(Path(directory))
        a.save(entry)
        assert held(a) == held(b) == [entry]
        a.close()
        b.close()


def test_an_entry_outlives_the_store_that_saved_it(store: Store, tmp_path: Path) -> None:
    entry = saved(store).entry
    store.close()
    reopened = open_store(tmp_path / "store")
    assert held(reopened) == [entry]
    reopened.close()


def test_a_closed_store_opens_again_when_it_is_used(store: Store) -> None:
    entry = saved(store).entry
    store.close()
    store.close()
    assert store.peek(KEY) is None
    assert held(store) == [entry]
    assert store.peek(KEY) is not None


def test_of_a_url_nobody_has_asked_for_there_is_nothing(store: Store) -> None:
    assert store.load(KEY) == []
    assert store.peek(KEY) == []


# Memory


def test_memory_answers_for_what_was_saved_or_loaded(two: tuple[Store, Store]) -> None:
    a, b = two
    entry = saved(a).entry
    assert [stored.entry for stored in a.peek(KEY) or ()] == [entry]
    assert b.peek(KEY) is None
    b.load(KEY)
    assert [stored.entry for stored in b.peek(KEY) or ()] == [entry]


def test_memory_is_kept_when_another_store_has_written_something_else(two: tuple[Store, Store]) -> None:
    a, b = two
    saved(a)
    before = [a.load(KEY), a.load(OTHER_KEY)]
    saved(b, url="https://b.test/")
    assert a.peek(KEY) is None  # as it was saved, but never loaded
    before[0] = a.load(KEY)
    for number in range(3):
        saved(b, url=f"https://b.test/{number}")
        assert a.peek(KEY) is before[0]
        assert a.peek(OTHER_KEY) is before[1]
    saved(b, url=OTHER_URL)
    assert a.peek(OTHER_KEY) is None
    assert [stored.entry.url for stored in a.load(OTHER_KEY)] == [OTHER_URL]


def test_memory_is_given_up_when_another_store_has_renewed_an_entry(two: tuple[Store, Store]) -> None:
    a, b = two
    entry = saved(a).entry
    saved(b, url="https://b.test/")
    a.load(KEY)
    renewed = msgspec.structs.replace(entry, received=entry.received + 1.0)
    (theirs,) = b.load(KEY)
    assert b.refresh(theirs, renewed, since=renewed.received) is not None
    assert held(a) == [renewed]


def test_memory_is_given_up_when_another_store_has_removed_an_entry(two: tuple[Store, Store]) -> None:
    a, b = two
    saved(a)
    saved(b, url="https://b.test/")
    a.load(KEY)
    b.remove(KEY, b.load(KEY))
    assert held(a) == []


def test_memory_is_given_up_when_another_store_has_written(two: tuple[Store, Store]) -> None:
    a, b = two
    first = saved(a).entry
    second = saved(b, identity=YOU).entry
    assert a.peek(KEY) is None
    assert held(a) == sorted([first, second], key=msgspec.msgpack.encode)


def test_memory_is_given_up_when_another_process_has_written(store: Store, tmp_path: Path) -> None:
    saved(store)
    assert store.peek(KEY) is not None
    seen = in_another_process(
        tmp_path / "store",
        "seen = [s.entry.body.decode() for s in store.load(KEY)]\n"
        "store.save(an_entry(body=b'theirs'))\n"
        "store.close(); print(json.dumps(seen))",
    )
    assert seen == ['{"id": 1}']
    assert store.peek(KEY) is None
    assert [entry.body for entry in held(store)] == [b"theirs"]


def test_an_invalidation_by_another_process_is_seen_at_once(store: Store, tmp_path: Path) -> None:
    saved(store)
    in_another_process(tmp_path / "store", "store.invalidate([KEY]); store.close(); print('null')")
    assert store.load(KEY) == []


def test_reading_notes_when_an_entry_was_used_and_waits_for_nobody_who_writes(
    two: tuple[Store, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two
    entry = saved(a).entry
    monkeypatch.setattr(store_module, "TOUCH_SECONDS", -1.0)
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / "p2pcache-v1.db", isolation_level=None)) as other:

        def used() -> float:
            return float(other.execute("SELECT last_accessed_at FROM entries").fetchone()[0])

        before = used()
        assert held(b) == [entry]
        after = used()
        assert after > before
        b.close()
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert held(b) == [entry]
        assert time.monotonic() - began < database_module.BUSY_MS / 2000
        assert used() == after
        other.execute("ROLLBACK")


def test_what_was_used_longest_ago_leaves_memory_first_and_stays_on_disk(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "MEMORY_BYTES", 250_000)
    urls = [f"https://a.test/{number}" for number in range(3)]
    keys = [cache_key(url) for url in urls]
    for url in urls[:2]:
        saved(store, url=url, body=bytes(100_000))
    store.peek(keys[0])
    saved(store, url=urls[2], body=bytes(100_000))
    assert [store.peek(key) is not None for key in keys] == [True, False, True]
    assert [len(store.load(key)) for key in keys] == [1, 1, 1]


def test_a_body_larger_than_memory_is_held_until_the_next(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "MEMORY_BYTES", 100)
    saved(store, body=bytes(1000))
    assert store.peek(KEY) is not None
    saved(store, url=URL + "?2", body=b"")
    assert store.peek(KEY) is None


# One place, one entry


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"body": b"new"}, 1),
        ({"body": b"new", "selecting": {"accept": "a"}}, 1),
        ({"identity": YOU}, 2),
        ({"method": "HEAD"}, 2),
        ({"selecting": {"accept": "b"}, "headers": {"vary": ["accept"]}}, 2),
        ({"selecting": {}, "headers": {"vary": ["accept"]}}, 2),
        ({"selecting": {"accept": "a"}, "headers": {"vary": ["accept"]}}, 1),
    ],
    ids=str,
)
def test_an_entry_replaces_the_one_that_answered_the_same_request(
    two: tuple[Store, Store], changes: dict[str, object], kept: int
) -> None:
    a, b = two
    saved(a, identity=ME, selecting={"accept": "a"}, headers={"vary": ["accept"]} if "vary" in str(changes) else {})
    latest = saved(a, **{"identity": ME, "headers": {}, **changes}).entry
    assert len(a.load(KEY)) == len(b.load(KEY)) == kept
    assert latest in held(a)
    assert latest in held(b)


def test_a_refreshed_entry_keeps_its_body_and_its_place(two: tuple[Store, Store]) -> None:
    a, b = two
    stored = saved(a)
    b.load(KEY)
    entry = msgspec.structs.replace(stored.entry, headers={"etag": ['"2"']}, received=stored.entry.received + 5)
    fresh = a.refresh(stored, entry, since=time.time())
    assert fresh is not None
    assert fresh.id == stored.id
    assert held(a) == held(b) == [entry]


def test_refreshing_one_entry_of_a_url_leaves_the_others_in_sight(two: tuple[Store, Store]) -> None:
    """Though another process has written, and memory has been given up, between look-up and refresh."""
    a, b = two
    stored, other = saved(a, identity=ME), saved(a, identity=YOU)
    saved(b, url=URL + "?other")
    assert a.peek(KEY) is None
    a.refresh(stored, stored.entry, since=time.time())
    assert held(a) == [stored.entry, other.entry]


def test_single_entries_are_removed_from_memory_and_disk(two: tuple[Store, Store]) -> None:
    a, b = two
    gone, stays = saved(a, identity=ME), saved(a, identity=YOU)
    a.remove(KEY, [gone])
    assert held(a) == held(b) == [stays.entry]


# Invalidation


def test_an_invalidated_url_has_no_entries_whoever_asked_for_them(two: tuple[Store, Store]) -> None:
    a, b = two
    for identity in ("", ME, YOU):
        saved(a, identity=identity)
    other = saved(a, url=URL + "?other").entry
    a.invalidate([KEY])
    assert held(a) == held(b) == []
    assert held(a, cache_key(other.url)) == [other]
    a.close()
    assert held(a) == []


def test_what_was_on_its_way_when_its_url_was_invalidated_is_refused(store: Store) -> None:
    entry = an_entry()
    store.invalidate([KEY])
    assert store.save(entry) is None
    assert store.save(an_entry(received=time.time() + 60), since=entry.received) is None
    assert held(store) == []


def test_what_was_asked_for_after_the_invalidation_is_stored(store: Store) -> None:
    store.invalidate([KEY])
    assert store.save(an_entry(received=time.time() + 1)) is not None
    assert store.save(an_entry(received=time.time() + 2), since=time.time() + 1) is not None


def test_a_refusal_is_for_the_invalidated_url_alone(store: Store) -> None:
    entry = an_entry(url=URL + "?other")
    store.invalidate([KEY])
    assert store.save(entry) is not None


def test_an_invalidation_outlives_the_closing_of_the_store(store: Store) -> None:
    entry = an_entry()
    store.invalidate([KEY])
    store.close()
    assert store.save(entry) is None


def test_a_304_that_was_on_its_way_does_not_bring_an_invalidated_entry_back(store: Store) -> None:
    stored = saved(store)
    asked = time.time()
    store.invalidate([KEY])
    assert store.refresh(stored, stored.entry, since=asked) is None
    assert held(store) == []


def test_an_invalidation_reaches_entries_that_memory_has_lost_sight_of(two: tuple[Store, Store]) -> None:
    a, b = two
    stored, _ = saved(a, identity=ME), saved(a, identity=YOU)
    saved(b, url=URL + "?other")
    assert a.peek(KEY) is None
    a.refresh(stored, stored.entry, since=time.time())
    a.invalidate([KEY])
    assert held(b) == []


# Many keys


def test_the_keys_of_what_is_held_come_latest_first_and_each_once(store: Store) -> None:
    for number, identity in ((1, ME), (2, ME), (3, ME), (1, YOU)):
        saved(store, url=f"https://a.test/{number}", identity=identity)
    keys = [cache_key(f"https://a.test/{number}") for number in (1, 3, 2)]
    assert store.keys(10) == keys
    assert store.keys(2) == keys[:2]


def test_invalidated_urls_have_no_keys(store: Store) -> None:
    saved(store)
    store.invalidate([KEY])
    assert store.keys(10) == []


def test_the_size_counts_entries_and_bytes(store: Store) -> None:
    assert store.size()[0] == 0
    saved(store, body=bytes(100_000))
    saved(store, identity=ME)
    entries, used = store.size()
    assert entries == 2
    assert used >= 100_000


def test_the_file_does_not_grow_beyond_its_limit(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_size=300_000)
    for number in range(50):
        saved(store, url=f"https://a.test/{number}", body=bytes(20_000))
    assert 0 < store.size()[1] <= 330_000
    store.close()


def test_threads_share_a_store(store: Store) -> None:
    ready = threading.Barrier(6)
    failures: list[BaseException] = []

    def use(number: int) -> None:
        try:
            ready.wait(10)
            for round_ in range(10):
                entry = saved(store, url=f"https://a.test/{number}", body=b"%d" % round_).entry
                assert held(store, cache_key(entry.url)) == [entry]
                saved(store, identity=f"{number}" * 32)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert len(store.load(KEY)) == 6


# The file


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_can_read_the_store(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        directory = tmp_path / "store"
        store = open_store(directory)
        saved(store)
        local_secret(directory)
        assert mode(directory) == 0o700
        files = {path.name: mode(path) for path in directory.iterdir()}
        assert files.keys() >= {DATABASE, "local.key"}
        assert set(files.values()) == {0o600}
        store.close()
    finally:
        os.umask(before)


def test_a_directory_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o755)
    store = open_store(tmp_path / "store")
    saved(store)
    assert mode(tmp_path / "store") == 0o700
    store.close()


def nonsense(path: Path) -> None:
    path.write_bytes(b"this is no database" * 500)


def somebody_elses(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE entries (id INTEGER, what TEXT)")
    connection.execute("INSERT INTO entries VALUES (1, 'precious')")
    connection.commit()
    connection.close()


def torn(path: Path) -> None:
    """A database whose header is whole, and whose first page is not."""
    store = open_store(path.parent)
    saved(store)
    store.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\xff" * 3996 + whole[4096:])


@pytest.mark.parametrize("spoil", [nonsense, somebody_elses, torn])
def test_a_file_that_cannot_be_used_is_moved_aside_whole(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / DATABASE
    spoil(path)
    was = path.read_bytes()
    store = open_store(tmp_path)
    with said() as lines:
        entry = saved(store).entry
        assert held(store) == [entry]
    store.close()
    (aside,) = tmp_path.glob(f"{DATABASE}.damaged-*")
    assert aside.read_bytes() == was
    assert len(lines) == 1
    assert aside.name in lines[0]
    again = open_store(tmp_path)
    with said() as lines:
        assert held(again) == [entry]
    assert lines == []
    again.close()


def test_a_file_that_is_damaged_further_in_costs_its_entries_but_raises_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number in range(30):
        saved(store, url=f"https://a.test/{number}", body=bytes(3000))
    store.close()
    path = tmp_path / DATABASE
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    for number in range(30):
        assert store.load(cache_key(f"https://a.test/{number}")) == []
    entry = saved(store).entry
    assert held(store) == [entry]
    assert isinstance(store.keys(10), list)
    assert store.size()[1] >= 0
    store.close()


def test_a_symbolic_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target = tmp_path / "elsewhere"
    target.write_bytes(b"")
    (tmp_path / "store" / DATABASE).symlink_to(target)
    store = open_store(tmp_path / "store")
    entry = saved(store).entry
    assert held(store) == [entry]
    assert target.read_bytes() == b""
    store.close()


def test_a_directory_that_cannot_be_used_is_said_once_and_replaced_by_memory(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file in its place")
    store = open_store(tmp_path / "store")
    with said() as lines:
        entry = saved(store).entry
        other = saved(store, identity=ME).entry
        assert held(store) == [entry, other]
        store.invalidate([cache_key(URL + "?other")])
        assert store.keys(10) == [KEY]
        assert store.size()[0] == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"CACHE_DIR {tmp_path / 'store'} cannot be used (")
    assert (tmp_path / "store").read_text() == "a file in its place"
    store.close()
    assert store.load(KEY) == []
    store.close()


def test_a_file_where_a_parent_directory_should_be_is_survived_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(tmp_path / "file" / "deeper" / "store")
    with said() as lines:
        entry = saved(store).entry
    assert held(store) == [entry]
    assert len(lines) == 1
    store.close()


# Fork


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@forks
def test_a_forked_child_and_its_parent_see_what_the_other_writes(tmp_path: Path) -> None:
    """Whichever of them closes the store first; each step begins when the one before has ended."""
    seen = in_another_process(
        tmp_path,
        """
def held(query):
    return len(store.load(cache_key(URL + query)))
store.save(an_entry())
to_parent, to_child = os.pipe(), os.pipe()
child = os.fork()
if not child:
    seen = held("")
    store.save(an_entry(url=URL + "?child"))
    os.write(to_parent[1], b"%d" % seen)
    os.read(to_child[0], 1)
    seen = held("?parent")
    store.save(an_entry(url=URL + "?later"))
    os.write(to_parent[1], b"%d" % seen)
    os._exit(0)
seen = [int(os.read(to_parent[0], 1)), held("?child")]
store.save(an_entry(url=URL + "?parent"))
store.close()
os.write(to_child[1], b"x")
seen += [int(os.read(to_parent[0], 1)), held("?later")]
os.waitpid(child, 0)
store.close()
print(json.dumps([*seen, held("?later")]))
""",
    )
    assert seen == [1, 1, 1, 1, 1]


@forks
def test_a_child_forked_while_a_thread_is_at_work_in_the_store_does_not_hang(tmp_path: Path) -> None:
    codes = in_another_process(
        tmp_path,
        """
import signal
store.save(an_entry())
stop = threading.Event()
begun = threading.Event()
def work():
    while not stop.is_set():
        store.load(KEY), store.peek(KEY), store.save(an_entry(url=URL + "?busy"))
        begun.set()
busy = threading.Thread(target=work)
busy.start()
begun.wait(10)
codes = []
for number in range(8):
    child = os.fork()
    if not child:
        signal.alarm(2)
        os._exit(0 if [s.entry.body for s in store.load(KEY)] == [b'{"id": 1}'] else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
busy.join()
store.close()
print(json.dumps(codes))
""",
    )
    assert codes == [0] * 8


# Fresh or not


@pytest.mark.parametrize(
    ("control", "age", "fresh"),
    [
        ("max-age=60", 0.0, True),
        ("max-age=60", 59.0, True),
        ("max-age=60", 59.9, True),
        ("max-age=60", 60.0, False),
        ("max-age=0", 0.0, False),
        ("max-age=60, no-cache", 0.0, False),
        ('max-age=60, no-cache="x"', 0.0, True),
        ("", 299.0, True),
        ("", 300.0, False),
    ],
)
def test_an_entry_is_fresh_for_its_lifetime_counted_in_whole_seconds(
    store: Store, control: str, age: float, fresh: bool
) -> None:
    now = 1_800_000_000.0
    stored = saved(store, headers={"cache-control": [control]}, initial_age=age, received=now)
    assert stored.fresh(now) == fresh


def test_an_entry_for_one_request_only_is_never_fresh(store: Store) -> None:
    stored = saved(store, headers={"cache-control": ["max-age=60"], "vary": ["accept, *"]})
    assert not stored.fresh(stored.entry.received)


# What is written behind


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Store]]:
    """One that writes nothing before it has to, and another that sees the file."""
    monkeypatch.setattr(store_module, "BEHIND_SECONDS", 60.0)
    behind, other = open_store(tmp_path / "store", behind=True), open_store(tmp_path / "store")
    yield behind, other
    behind.close()
    other.close()


def test_what_is_saved_behind_is_in_memory_at_once_and_in_the_file_later(apart: tuple[Store, Store]) -> None:
    behind, other = apart
    entry = saved(behind).entry
    assert [stored.entry for stored in behind.peek(KEY) or ()] == [entry]
    assert held(other) == []
    behind.flush()
    assert held(other) == held(behind) == [entry]


def test_nobody_has_to_say_that_it_is_to_be_written(tmp_path: Path) -> None:
    behind, other = open_store(tmp_path / "store", behind=True), open_store(tmp_path / "store")
    entry = saved(behind).entry
    assert eventually(lambda: held(other) == [entry])
    behind.close()
    other.close()


@pytest.mark.parametrize("how", ["close", "keys", "size"])
def test_who_looks_at_the_file_finds_all_of_it(apart: tuple[Store, Store], how: str) -> None:
    behind, other = apart
    entry = saved(behind).entry
    getattr(behind, how)(*([10] if how == "keys" else []))
    assert held(other) == [entry]


def test_what_is_unwritten_outlives_the_memory_that_another_process_makes_void(apart: tuple[Store, Store]) -> None:
    behind, other = apart
    entry = saved(behind).entry
    saved(other, url=URL + "?other")
    assert behind.peek(KEY) is None
    assert held(behind) == [entry]


def test_an_unwritten_entry_is_refreshed_and_replaced(apart: tuple[Store, Store]) -> None:
    behind, other = apart
    stored = saved(behind)
    newer = msgspec.structs.replace(stored.entry, headers={"etag": ['"2"']}, received=stored.entry.received + 1)
    assert behind.refresh(stored, newer, since=time.time()) is not None
    assert held(behind) == [newer]
    behind.flush()
    assert held(other) == [newer]
    newest = msgspec.structs.replace(newer, received=newer.received + 1)
    saved(behind, **msgspec.structs.asdict(newest))
    saved(behind, **msgspec.structs.asdict(newest))
    behind.flush()
    assert held(other) == [newest]
    assert other.size()[0] == 1


@pytest.mark.parametrize("how", ["remove", "refuse", "invalidate", "clear"])
def test_what_is_taken_away_is_not_written_later(apart: tuple[Store, Store], how: str) -> None:
    behind, other = apart
    stored = saved(behind)
    ways: dict[str, Callable[[], object]] = {
        "remove": lambda: behind.remove(KEY, [stored]),
        "refuse": lambda: behind.refuse(KEY, stored.entry.identity, since=time.time()),
        "invalidate": lambda: behind.invalidate([KEY]),
        "clear": behind.clear,
    }
    ways[how]()
    behind.flush()
    assert held(behind) == held(other) == []
    assert other.size()[0] == 0


@pytest.mark.parametrize("look", [None, KEY, cache_key(URL + "?other")])
def test_a_write_of_another_process_makes_void_what_is_unwritten_here(
    apart: tuple[Store, Store], look: bytes | None
) -> None:
    behind, other = apart
    saved(behind, received=time.time())
    kept = saved(behind, url=URL + "?other", received=time.time()).entry
    other.invalidate([KEY])
    if look is not None:
        behind.load(look)
    behind.flush()
    assert held(behind) == held(other) == []
    assert held(behind, cache_key(kept.url)) == held(other, cache_key(kept.url)) == [kept]


def test_a_refusal_that_another_process_has_heard_is_for_one_identity(apart: tuple[Store, Store]) -> None:
    behind, other = apart
    mine, yours = (saved(behind, identity=who, received=time.time()).entry for who in (ME, YOU))
    other.refuse(KEY, mine.identity, since=time.time())
    behind.flush()
    assert held(behind) == held(other) == [yours]


def test_what_two_processes_have_of_the_same_is_stored_once(apart: tuple[Store, Store]) -> None:
    behind, other = apart
    entry = an_entry(received=time.time())
    behind.save(entry)
    other.save(msgspec.structs.replace(entry, received=entry.received + 0.1))
    behind.flush()
    assert len(held(behind)) == len(held(other)) == 1
    assert other.size()[0] == 1


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("ours", [-60, 60])
def test_of_what_two_processes_have_of_one_place_the_newer_is_stored(
    apart: tuple[Store, Store], ours: int, look: bool
) -> None:
    behind, other = apart
    now = time.time() - 1000
    saved(behind, received=now + ours, body=b"%d" % ours)
    saved(other, received=now, body=b"0")
    if look:
        behind.load(cache_key(URL + "?other"))
    behind.flush()
    assert [entry.body for entry in held(behind)] == [b"%d" % max(ours, 0)]
    assert other.size()[0] == 1


def test_of_what_another_process_has_as_well_the_fields_are_those_that_came_last(apart: tuple[Store, Store]) -> None:
    behind, other = apart
    entry = an_entry(received=time.time(), headers={"cache-control": ["max-age=3600"]})
    other.save(entry)
    newer = msgspec.structs.replace(entry, received=entry.received + 0.3, headers={"cache-control": ["max-age=1"]})
    behind.save(newer)
    saved(other, url=URL + "?other")
    behind.flush()
    assert [one.headers for one in held(other)] == [newer.headers]
    assert other.size()[0] == 2


@pytest.mark.parametrize("behind", [False, True])
def test_what_was_on_its_way_while_another_process_wrote_is_not_stored(tmp_path: Path, behind: bool) -> None:
    a, b = open_store(tmp_path / "store", behind=behind), open_store(tmp_path / "store")
    asked = time.time()
    b.invalidate([KEY])
    assert a.save(an_entry(received=time.time()), since=asked) is None
    assert held(a) == held(b) == []
    stored = saved(a, received=time.time())
    a.flush()
    asked = time.time()
    b.invalidate([KEY])
    assert a.refresh(stored, stored.entry, since=asked) is None
    assert held(a) == held(b) == []
    a.close()
    b.close()


def test_a_304_for_what_was_replaced_meanwhile_is_for_one_answer(store: Store) -> None:
    old = saved(store, body=b"old")
    new = saved(store, body=b"new").entry
    assert store.refresh(old, old.entry, since=time.time()) is None
    assert held(store) == [new]


def test_a_304_for_what_was_evicted_meanwhile_stores_it_anew(store: Store) -> None:
    stored = saved(store)
    store.remove(KEY, [stored])
    assert store.refresh(stored, stored.entry, since=time.time()) is not None
    assert held(store) == [stored.entry]


def test_a_later_write_is_not_forgotten_for_an_earlier_one(two: tuple[Store, Store]) -> None:
    a, b = two
    now = time.time()
    for since in (now + 200, now + 100):
        a.refuse(KEY, ME, since=since)
    for store in two:
        assert store.save(an_entry(identity=ME, received=now + 150)) is None
    assert b.save(an_entry(identity=ME, received=now + 250)) is not None


def test_a_file_that_somebody_holds_is_waited_for_once_however_much_is_unwritten(tmp_path: Path) -> None:
    behind = open_store(tmp_path / "store", behind=True)
    behind.load(KEY)
    holder = sqlite3.connect(tmp_path / "store" / DATABASE, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    for number in range(20):
        saved(behind, url=f"{URL}?{number}")
    began = time.monotonic()
    behind.close()
    assert time.monotonic() - began < 5.0  # each of them alone may wait for a second
    holder.close()


def test_flush_waits_for_what_another_thread_is_writing(apart: tuple[Store, Store]) -> None:
    behind, other = apart
    begun, go = threading.Event(), threading.Event()
    insert = behind._insert

    def slowly(*arguments: object) -> None:
        begun.set()
        assert go.wait(10)
        insert(*arguments)  # type: ignore[arg-type] # whatever it is given

    behind._insert = slowly  # type: ignore[method-assign] # a disk that takes its time
    entry = saved(behind).entry
    writing = threading.Thread(target=behind.flush)
    writing.start()
    assert begun.wait(10)
    threading.Timer(0.2, go.set).start()
    behind.flush()
    assert held(other) == [entry]
    writing.join()


def test_without_another_thread_it_is_written_at_once(
    apart: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    behind, other = apart
    monkeypatch.setattr(threading.Thread, "start", fail)
    entry = saved(behind).entry
    assert held(other) == [entry]
    fresh = open_store(behind.directory)
    assert held(fresh) == [entry]
    assert [path.name for path in behind.directory.iterdir() if "damaged" in path.name] == []
    fresh.close()


def test_nothing_is_invalidated_by_no_keys(store: Store) -> None:
    entry = saved(store).entry
    store.invalidate([])
    assert held(store) == [entry]


def test_who_brings_more_than_may_be_unwritten_waits_for_the_disk(
    apart: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind_module, "MAX_UNDONE", 4000)
    behind, other = apart
    saved(behind, body=bytes(900))
    assert held(other) == []
    saved(behind, url=URL + "?2", body=bytes(900))
    assert len(held(other)) == 1


# What is put off


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """One that does nothing of what it puts off before it has to."""
    monkeypatch.setattr(store_module, "PUT_OFF_SECONDS", 60.0)
    store = open_store(tmp_path / "store", behind=True)
    yield store
    store.close()


def put_off(store: Store, entry: Entry, size: int = 0) -> bool:
    return store.put_off(cache_key(entry.url), size, lambda: store.save(entry) and None)


LOOKS: dict[str, Callable[[Store], object]] = {
    "load": lambda store: store.load(KEY),
    "another is saved": lambda store: store.save(an_entry(url=URL, identity=YOU)),
    "keys": lambda store: store.keys(10),
    "size": lambda store: store.size(),
    "flush": lambda store: store.flush(),
    "catch_up": lambda store: store.catch_up(),
    "close": lambda store: store.close(),
    "another is invalidated": lambda store: store.invalidate([cache_key(URL + "?other")]),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_put_off_is_done_before_anybody_looks_for_it(idle: Store, look: str) -> None:
    entry, done = an_entry(received=time.time()), []

    def work() -> None:
        done.append(look)
        idle.save(entry)

    assert idle.put_off(KEY, 0, work)
    assert idle.peek(KEY) is None
    assert idle.at_hand(KEY) is None
    with idle.soon(KEY) as free:
        assert not free
    assert done == []
    LOOKS[look](idle)
    assert done == [look]
    assert entry in held(idle)


def test_what_is_put_off_is_done_soon_if_nobody_looks_for_it(tmp_path: Path) -> None:
    store, done = open_store(tmp_path / "store", behind=True), threading.Event()
    assert store.put_off(KEY, 0, done.set)
    assert done.wait(10)
    store.close()


@pytest.mark.parametrize("how", ["invalidate", "refuse"])
def test_what_is_put_off_while_its_url_is_written_to_is_not_stored(idle: Store, how: str) -> None:
    entry = an_entry(received=time.time(), identity=ME)
    assert put_off(idle, entry)
    if how == "invalidate":
        idle.invalidate([KEY])
    else:
        idle.refuse(KEY, ME, since=time.time())
    assert held(idle) == []


def test_a_store_that_writes_at_once_puts_nothing_off(store: Store) -> None:
    assert not put_off(store, an_entry())


def test_what_is_large_is_not_put_off(idle: Store) -> None:
    assert put_off(idle, an_entry(), store_module.PUT_OFF_BYTES)
    assert not put_off(idle, an_entry(), store_module.PUT_OFF_BYTES + 1)


def test_no_more_is_put_off_than_there_is_room_for(idle: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind_module, "MAX_UNDONE", 4000)
    assert put_off(idle, an_entry(), 1900)
    assert not put_off(idle, an_entry(), 1900)


def test_who_would_wait_for_another_thread_puts_nothing_off(idle: Store) -> None:
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        with idle._lock:
            begun.set()
            assert go.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert begun.wait(10)
    assert not put_off(idle, an_entry())
    go.set()
    holder.join()


def test_an_interrupt_costs_one_of_those_that_are_put_off(idle: Store) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    entry = an_entry()
    assert idle.put_off(KEY, 0, interrupt)
    assert put_off(idle, entry)
    with pytest.raises(KeyboardInterrupt):
        idle.load(KEY)
    assert held(idle) == [entry]


def test_what_is_put_off_when_the_process_ends_is_in_the_file(tmp_path: Path) -> None:
    script = """
store.behind = True
store._put_off._seconds = 60.0
assert store.put_off(KEY, 0, lambda: store.save(an_entry()))
print("null")
"""
    in_another_process(tmp_path / "store", script)
    left = open_store(tmp_path / "store")
    assert left.size()[0] == 1
    left.close()


@forks
def test_what_is_put_off_at_a_fork_is_done_once_and_by_the_parent(tmp_path: Path) -> None:
    seen = in_another_process(
        tmp_path,
        """
store.behind = True
store._put_off._seconds = 60.0
done = []
assert store.put_off(KEY, 0, lambda: done.append(os.getpid()))
child = os.fork()
if not child:
    store.close()
    os._exit(len([pid for pid in done if pid == os.getpid()]))
seen = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
store.close()
print(json.dumps([seen, done == [os.getpid()]]))
""",
    )
    assert seen == [0, True]


def test_the_thread_that_writes_ends_when_there_is_nothing_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "p2pcache-store"]

    monkeypatch.setattr(behind_module, "IDLE_SECONDS", 0.05)
    behind = open_store(tmp_path / "store", behind=True)
    for query in ("?1", "?2"):  # the second begins another
        saved(behind, url=URL + query)
        assert writers()
        assert eventually(lambda: not writers())
    monkeypatch.undo()
    saved(behind, url=URL + "?3")
    behind.close()
    assert not writers()
    reopened = open_store(tmp_path / "store")
    assert reopened.size()[0] == 3
    reopened.close()


@pytest.mark.parametrize("how", ["", "os.kill(os.getpid(), 15)", "raise KeyboardInterrupt", "store.close()"])
def test_a_process_that_ends_has_written_all_unless_it_is_killed(tmp_path: Path, how: str) -> None:
    script = f"""
store._later._seconds = 60.0
store.behind = True
store.save(an_entry())
print("null", flush=True)
{how}
"""
    directory, killed = tmp_path / "store", "kill" in how
    subprocess.run([sys.executable, "-c", head(directory) + script], capture_output=True, timeout=30, check=False)
    left = open_store(directory)
    assert left.size()[0] == (0 if killed else 1)
    left.close()


@forks
def test_what_is_unwritten_at_a_fork_is_written_once(tmp_path: Path) -> None:
    seen = in_another_process(
        tmp_path,
        """
store._later._seconds = 60.0
store.behind = True
store.save(an_entry())
child = os.fork()
if not child:
    store.save(an_entry(url=URL + "?child"))
    store.close()
    os._exit(store.size()[0])
seen = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
store.save(an_entry(url=URL + "?parent"))
print(json.dumps([seen, store.size()[0]]))
""",
    )
    assert seen == [2, 3]


@forks
def test_threads_that_fork_at_the_same_time_do_not_wait_for_each_other(tmp_path: Path) -> None:
    codes = in_another_process(
        tmp_path,
        """
codes = []
def fork():
    for _ in range(15):
        child = os.fork()
        if not child:
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
store.save(an_entry())
threads = [threading.Thread(target=fork, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(10)
print(json.dumps([len(codes), sum(codes)]))
""",
    )
    assert codes == [45, 0]


# The runner's own secret


def test_a_runner_keeps_its_secret_and_each_has_another(tmp_path: Path) -> None:
    ours = local_secret(tmp_path / "a")
    assert len(ours) == 32
    assert local_secret(tmp_path / "a") == ours
    assert local_secret(tmp_path / "b") != ours


def test_without_a_directory_a_runner_has_a_secret_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(local_secret(tmp_path / "file")) == 32
    assert (tmp_path / "file").read_text() == ""


def test_a_secret_that_was_cut_short_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "local.key").write_bytes(b"short")
    assert len(local_secret(tmp_path)) == 32


# Two stores against a dictionary


class Shared(RuleBasedStateMachine):
    """Whatever two stores on one file do in turns, both hold what a dictionary would."""

    urls = st.sampled_from([URL, URL, URL, URL + "?2"])
    identities = st.sampled_from([ME, YOU])
    which = st.sampled_from([0, 1])

    @initialize(behind=st.booleans())
    def begin(self, behind: bool) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.stores = [open_store(Path(self.directory.name), behind=behind and not which) for which in range(2)]
        self.held: dict[tuple[str, str], Entry] = {}
        self.now = time.time() + 1000  # later than any invalidation

    def a_new_entry(self, url: str, identity: str) -> Entry:
        self.now += 1
        return an_entry(url=url, identity=identity, received=self.now, body=b"%d" % self.now)

    def written(self, which: int) -> Store:
        """One of the two, once it can see what the other has done."""
        self.stores[1 - which].flush()
        return self.stores[which]

    @rule(which=which, url=urls, identity=identities)
    def save(self, which: int, url: str, identity: str) -> None:
        entry = self.a_new_entry(url, identity)
        assert self.written(which).save(entry) is not None
        self.held[url, identity] = entry

    @rule(which=which, url=urls, identity=identities, between=st.booleans())
    def refresh(self, which: int, url: str, identity: str, between: bool) -> None:
        """With ``between`` another store writes, and memory is looked at, after the look-up."""
        store = self.written(which)
        for stored in [s for s in store.load(cache_key(url)) if s.entry.identity == identity]:
            if between:
                self.save(1 - which, URL + "?3", ME)
                self.written(which).peek(cache_key(url))
            self.now += 1
            entry = msgspec.structs.replace(stored.entry, headers={"etag": [f"{self.now}"]}, received=self.now)
            assert store.refresh(stored, entry, since=self.now) is not None
            self.held[url, identity] = entry
            self.load(which, url)

    @rule(which=which, url=urls, identity=identities)
    def remove(self, which: int, url: str, identity: str) -> None:
        found = self.written(which).load(cache_key(url))
        self.stores[which].remove(cache_key(url), [s for s in found if s.entry.identity == identity])
        self.held.pop((url, identity), None)

    @rule(which=which, url=urls)
    def invalidate(self, which: int, url: str) -> None:
        self.written(which).invalidate([cache_key(url)])
        self.held = {place: entry for place, entry in self.held.items() if place[0] != url}

    @rule(which=which)
    def close(self, which: int) -> None:
        self.stores[which].close()

    @rule(which=which, url=urls)
    def peek(self, which: int, url: str) -> None:
        found = self.written(which).peek(cache_key(url))
        assert found is None or self.of(url) == sorted((s.entry for s in found), key=msgspec.msgpack.encode)

    @rule(which=which, url=urls)
    def load(self, which: int, url: str) -> None:
        assert held(self.written(which), cache_key(url)) == self.of(url)

    @invariant()
    def nothing_else_is_on_the_disk(self) -> None:
        if hasattr(self, "stores") and not self.stores[0].behind:  # size() would have all written each time
            assert self.stores[0].size()[0] == len(self.held)

    def of(self, url: str) -> list[Entry]:
        return sorted((entry for place, entry in self.held.items() if place[0] == url), key=msgspec.msgpack.encode)

    def teardown(self) -> None:
        if hasattr(self, "stores"):
            left = self.stores[0].size()[0]
            for store in self.stores:
                store.close()
            assert left == len(self.held)
            self.directory.cleanup()


TestShared = Shared.TestCase
TestShared.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


# Bodies at rest


SECRET_BODY = b'{"private": "of somebody"}' * 50


def test_bodies_at_rest_are_sealed_and_under_another_key_the_store_is_cold(tmp_path: Path) -> None:
    def opened(sealing: Keyring | None) -> Store:
        return Store(tmp_path, max_size=0, default_ttl=300.0, sealing=sealing)

    key = cache_key(URL)
    for keyring in (Keyring(b"one secret", "fleet"), Keyring(b"another secret", "fleet"), None):
        store = opened(keyring)
        assert store.load(key) == []  # what another form has left is gone
        stored = store.save(an_entry(body=SECRET_BODY))
        assert stored is not None
        store.refresh(stored, an_entry(body=SECRET_BODY, headers={"cache-control": ["max-age=9"]}), since=time.time())
        store.close()
        again = opened(keyring)
        (found,) = again.load(key)
        assert (found.entry.body, found.entry.headers["cache-control"]) == (SECRET_BODY, ["max-age=9"])
        again.close()
        on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert (SECRET_BODY[:26] in on_disk) is (keyring is None)
    assert opened(Keyring(b"one secret", "fleet")).load(key) == []

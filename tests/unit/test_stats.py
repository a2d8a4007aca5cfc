from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st
from made import few

from httpx_p2pcache.stats import COUNTERS, Stats, summary


def test_every_counter_begins_at_nought() -> None:
    assert Stats().snapshot() == dict.fromkeys(COUNTERS, 0)


@given(st.lists(st.tuples(st.sampled_from(COUNTERS), st.integers(0, 10**9))))
@few
def test_a_counter_is_the_sum_of_what_was_added_to_it(added: list[tuple[str, int]]) -> None:
    stats = Stats()
    for name, amount in added:
        stats.add(name, amount)
    assert stats.snapshot() == {name: sum(n for other, n in added if other == name) for name in COUNTERS}


def test_a_snapshot_does_not_change_afterwards() -> None:
    stats = Stats()
    before = stats.snapshot()
    stats.add("requests")
    assert before["requests"] == 0


def test_no_count_is_lost_among_threads() -> None:
    stats = Stats()
    ready = threading.Barrier(8)

    def count() -> None:
        ready.wait(10)
        for _ in range(2000):
            stats.add("requests")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert stats.snapshot()["requests"] == 16_000


def test_the_summary_says_what_was_saved_and_what_it_cost() -> None:
    counts = Stats().snapshot() | {
        "requests": 10,
        "local_hits": 4,
        "peer_hits": 2,
        "coalesced": 1,
        "revalidated": 1,
        "not_modified": 3,
        "origin_calls": 6,
        "origin_ms": 600,
    }
    figures = summary(counts)
    assert {name: figures[name] for name in counts} == counts
    assert {name: figures[name] for name in figures if name not in counts} == {
        "total_requests": 10,
        "hits": 6,
        "misses": 4,
        "hit_rate": 0.6,
        "api_calls_saved": 7,
        "api_calls_made": 3,
        "seconds_saved": 0.6,
    }


def test_without_requests_the_hit_rate_is_nought() -> None:
    assert summary(Stats().snapshot())["hit_rate"] == 0.0


@given(st.lists(st.sampled_from(["local_hits", "peer_hits", "origin_calls", "revalidated"])))
@few
def test_every_request_is_either_a_hit_or_a_miss_and_saved_or_made(ways: list[str]) -> None:
    stats = Stats()
    for way in ways:
        stats.add("requests")
        stats.add(way)
        if way == "revalidated":
            stats.add("origin_calls")
            stats.add("not_modified")
    figures = summary(stats.snapshot())
    assert figures["hits"] + figures["misses"] == len(ways)
    assert figures["api_calls_saved"] + figures["api_calls_made"] == len(ways)
    assert 0 <= figures["hit_rate"] <= 1

"""What the node decides about peers without a clock or a network: who may come in, whom to dial, who is home."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import few

pytest.importorskip("libp2p")

from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from httpx_p2pcache.node.discovery import Sighting
from httpx_p2pcache.node.gate import MAX_FAILURES, MAX_STRANGERS, NOISY_SECONDS, Gate
from httpx_p2pcache.node.homes import home_among
from httpx_p2pcache.node.search import (
    BACK_OFF_SECONDS,
    BACK_OFF_SHORT,
    DIALS_AT_ONCE,
    FORGET_SECONDS,
    GRACE_SECONDS,
    MAX_CANDIDATES,
    REFUSED_SECONDS,
    Candidates,
)
from httpx_p2pcache.node.seed import kept_seed


def peer(number: int) -> ID:
    return ID.from_pubkey(create_new_key_pair(number.to_bytes(32, "big")).public_key)


OURS, *THEIRS = [peer(number) for number in range(1, 7)]


def sighting(peer_id: ID | None, *addresses: str, how: str = "registry") -> Sighting:
    return Sighting(peer_id=peer_id.to_bytes() if peer_id else b"", addresses=addresses or ("/ip4/10.0.0.1",), how=how)


# The gate


def test_the_gate_lets_in_so_many_strangers_at_a_time_and_the_next_when_one_has_left() -> None:
    gate = Gate()
    assert [gate.admits(f"10.0.0.{n}", 0.0) for n in range(MAX_STRANGERS + 1)] == [True] * MAX_STRANGERS + [False]
    gate.passed("10.0.0.0", 0.0, welcome=False)
    assert gate.admits("10.0.0.99", 0.0)
    assert not gate.admits("10.0.0.98", 0.0)


def test_who_comes_in_a_crowd_has_less_time_to_show_who_it_is() -> None:
    gate = Gate()
    for number in range(MAX_STRANGERS // 2):
        assert gate.admits(f"10.0.0.{number}", 0.0)
    patient = gate.patience()
    assert gate.admits("10.0.1.1", 0.0)
    assert gate.patience() < patient
    gate.passed("10.0.1.1", 0.0, welcome=True)
    assert gate.patience() == patient


def test_an_address_of_which_many_have_failed_is_kept_out_for_a_while_and_no_other_is() -> None:
    gate = Gate()
    for _ in range(MAX_FAILURES):
        assert gate.admits("10.0.0.1", 1.0)
        gate.passed("10.0.0.1", 1.0, welcome=False)
    assert not gate.admits("10.0.0.1", 1.0 + NOISY_SECONDS)
    assert gate.admits("10.0.0.2", 1.0 + NOISY_SECONDS)
    assert gate.admits("10.0.0.1", 1.1 + NOISY_SECONDS)


def test_a_member_behind_the_same_address_makes_good_for_those_who_failed() -> None:
    gate = Gate()
    for number in range(3 * MAX_FAILURES):
        assert gate.admits("10.0.0.1", 1.0), number
        gate.passed("10.0.0.1", 1.0, welcome=number % (MAX_FAILURES - 1) == 0)


def test_who_does_not_hold_the_secret_is_kept_away_for_a_while_and_not_for_ever() -> None:
    gate = Gate()
    gate.refuse(THEIRS[0], 5.0)
    assert gate.refuses(THEIRS[0], 5.0 + NOISY_SECONDS - 0.1)
    assert not gate.refuses(THEIRS[1], 5.0)
    assert not gate.refuses(THEIRS[0], 5.0 + NOISY_SECONDS)


# Candidates


def test_no_more_than_so_many_are_dialled_at_once() -> None:
    candidates = Candidates(OURS)
    for number in range(2 * DIALS_AT_ONCE):
        candidates.sighted(sighting(None, f"/ip4/10.0.0.1/tcp/{number}"), 0.0)
    first = candidates.due([], 0.0)
    assert len(first) == DIALS_AT_ONCE
    for one in first:
        one.dialling = True
    assert candidates.due([], 0.0) == []
    first[0].dialling = False
    assert len(candidates.due([], 0.0)) == 1


def test_a_candidate_is_due_at_once_and_then_later_and_later() -> None:
    candidates, now = Candidates(OURS), 100.0
    assert candidates.sighted(sighting(THEIRS[0]), now)
    assert not candidates.sighted(sighting(THEIRS[0]), now), "it is no news"
    for wait in (*BACK_OFF_SECONDS, BACK_OFF_SECONDS[-1]):
        (one,) = candidates.due([], now)
        one.failed(now, refused=False)
        assert candidates.due([], now + wait - 0.01) == []
        now += wait
    assert candidates.due([THEIRS[0]], now) == [], "it is a member"


def test_who_was_named_by_a_setting_is_tried_often_and_never_forgotten_and_others_are() -> None:
    candidates, now = Candidates(OURS), 100.0
    candidates.sighted(sighting(THEIRS[0], how="bootstrap"), now)
    candidates.sighted(sighting(THEIRS[1]), now)
    for one in candidates.due([], now):
        for _ in range(len(BACK_OFF_SECONDS) + 1):
            one.failed(now, refused=False)
    assert [one.peer_id for one in candidates.due([], now + BACK_OFF_SHORT)] == [THEIRS[0]]
    assert candidates.forget_lost([], now + FORGET_SECONDS) == []
    assert candidates.forget_lost([], now + FORGET_SECONDS + 0.1) == [THEIRS[1]]


def test_who_was_refused_is_left_alone_for_long() -> None:
    candidates = Candidates(OURS)
    candidates.sighted(sighting(THEIRS[0]), 0.0)
    candidates.due([], 0.0)[0].failed(0.0, refused=True)
    assert candidates.due([], REFUSED_SECONDS - 0.1) == []
    assert len(candidates.due([], REFUSED_SECONDS)) == 1


def test_neither_ourselves_nor_rubbish_nor_who_is_nowhere_is_a_candidate() -> None:
    candidates = Candidates(OURS)
    nowhere = Sighting(peer_id=THEIRS[0].to_bytes(), addresses=(), how="peers")
    assert [candidates.sighted(one, 0.0) for one in (sighting(OURS), nowhere)] == [False, False]
    assert candidates.due([], 0.0) == []


def test_there_are_no_more_candidates_than_so_many() -> None:
    candidates = Candidates(OURS)
    news = [candidates.sighted(sighting(None, f"/ip4/10.0.0.1/tcp/{n}"), 0.0) for n in range(MAX_CANDIDATES + 5)]
    assert sum(news) == MAX_CANDIDATES


def test_an_address_without_a_peer_id_is_whoever_is_there() -> None:
    candidates = Candidates(OURS)
    candidates.sighted(sighting(None, "/ip4/10.0.0.1/tcp/1"), 0.0)
    (one,) = candidates.due([], 0.0)
    candidates.found_out(one, THEIRS[0], 1.0)
    assert [c.peer_id for c in candidates.due([], 1.0)] == [THEIRS[0]]
    assert candidates.due([THEIRS[0]], 1.0 + BACK_OFF_SHORT) == []
    candidates.found_out(one, OURS, 2.0)
    assert {c.peer_id for c in candidates.due([], 2.0)} == {THEIRS[0]}


def test_a_member_of_a_member_counts_as_one_whom_we_cannot_reach_once_it_was_tried_or_took_too_long() -> None:
    candidates = Candidates(OURS)
    candidates.sighted(sighting(THEIRS[0]), 0.0)
    assert candidates.unreached(THEIRS[:1], 0.0) == 0
    assert candidates.unreached(THEIRS[:1], GRACE_SECONDS) == 1
    assert candidates.unreached([], GRACE_SECONDS) == 0
    assert candidates.unreached(THEIRS[:1], 9.0) == 0, "it was away: it is given time again"
    candidates.due([], 9.0)[0].failed(9.0, refused=False)
    assert candidates.unreached(THEIRS[:1], 9.0) == 1


# The home of a key


@given(
    st.binary(min_size=32, max_size=32), st.permutations(THEIRS), st.lists(st.integers(0, 3), min_size=5, max_size=5)
)
@few
def test_all_who_see_the_same_agree_on_a_home_and_only_who_reaches_most_is_one(
    key: bytes, order: list[ID], counts: list[int]
) -> None:
    unreached = dict(zip(THEIRS, counts, strict=True))
    home = home_among(unreached, key)
    assert home_among({one: unreached[one] for one in order}, key) == home
    assert unreached[home] == min(counts)


def test_who_leaves_moves_the_keys_it_was_home_to_and_no_others() -> None:
    keys = [n.to_bytes(32, "big") for n in range(2000)]
    before = {key: home_among(dict.fromkeys(THEIRS, 0), key) for key in keys}
    after = {key: home_among(dict.fromkeys(THEIRS[1:], 0), key) for key in keys}
    assert [key for key in keys if before[key] != after[key] and before[key] != THEIRS[0]] == []
    assert max(Counter(before.values()).values()) < 2 * len(keys) / len(THEIRS)


def test_behind_nat_the_hub_is_home_to_everything() -> None:
    hub, *spokes = THEIRS
    unreached = {hub: 0} | dict.fromkeys(spokes, len(spokes) - 1)
    assert {home_among(unreached, n.to_bytes(32, "big")) for n in range(50)} == {hub}


# The key of a node


def test_a_node_keeps_its_key_a_second_one_at_a_time_has_another(tmp_path: Path) -> None:
    lock, first = kept_seed(tmp_path)
    assert lock is not None
    nobody, second = kept_seed(tmp_path)
    assert (nobody, second == first) == (None, False)
    os.close(lock)
    lock, again = kept_seed(tmp_path)
    assert lock is not None
    os.close(lock)
    assert again == first
    assert (tmp_path / "node.key").stat().st_mode & 0o077 == 0
    assert first not in (tmp_path / "node.key").read_bytes()


def test_a_key_that_was_copied_to_another_machine_is_another_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, here = kept_seed(tmp_path)
    assert lock is not None
    os.close(lock)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    lock, there = kept_seed(tmp_path)
    assert lock is not None
    os.close(lock)
    assert here != there


def test_who_is_reached_by_a_member_counts_as_unreached_once_the_grace_is_over() -> None:
    candidates = Candidates(OURS)
    candidates.sighted(sighting(THEIRS[0], how="peers"), 100.0)
    candidates.awaits({THEIRS[0]}, 100.0)
    # However late it is first judged: the grace has begun when it was told.
    assert candidates.unreached([THEIRS[0]], 100.0 + GRACE_SECONDS - 0.01) == 0
    assert candidates.unreached([THEIRS[0]], 100.0 + GRACE_SECONDS) == 1


def test_whom_a_stranger_names_does_not_count_until_a_member_does_or_we_have_met() -> None:
    candidates = Candidates(OURS)
    for peer_id in THEIRS:
        candidates.sighted(sighting(peer_id, how="dht"), 0.0)
    assert candidates.promising() == set()
    candidates.sighted(sighting(THEIRS[0], how="peers"), 1.0)
    assert candidates.promising() == {THEIRS[0]}
    assert candidates.everybody() == set(THEIRS)

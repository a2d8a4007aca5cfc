from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from httpx_p2pcache.claims import OPEN_FOR, ClaimTable, Flights, Go, Granted, Look, Pending, Told, Verdict

TIMEOUT = 10.0
KEYS = [b"a", b"b", b"c"]
LIMIT = 3


@dataclass
class Fetch:
    """What is known of a key that somebody fetches; ``waiting`` in the order in which they asked."""

    id: int
    holder: int
    ends: float
    failures: int = 0
    waiting: list[int] = field(default_factory=list)


class Claims(RuleBasedStateMachine):
    """The table against a plain model of its head: who is told what, exactly once, and that nobody waits for ever."""

    grants = Bundle("grants")

    @initialize(limit=st.sampled_from([LIMIT, 2]))
    def begin(self, limit: int) -> None:
        self.limit = limit
        self.table: ClaimTable[int] = ClaimTable(TIMEOUT, limit)
        self.now = 1000.0
        self.askers = 0
        self.fetches: dict[bytes, Fetch] = {}
        self.open: dict[bytes, float] = {}

    def hear(self, told: Told[int]) -> list[tuple[bytes, int]]:
        """Check each tiding against the model, in which a grant is noted; returns the grants."""
        grants = []
        for key, asker, tidings in told:
            fetch = self.fetches[key]
            assert asker == fetch.waiting.pop(0), "told twice, unasked, or out of turn"
            if isinstance(tidings, Granted):
                assert tidings.ends == self.now + TIMEOUT
                fetch.id, fetch.holder, fetch.ends = tidings.id, asker, tidings.ends
                grants.append((key, tidings.id))
        return grants

    def let_go(self, key: bytes, told: Told[int], tidings: Look | Go) -> None:
        fetch = self.fetches.pop(key)
        assert told == [(key, waiter, tidings) for waiter in fetch.waiting]

    def pass_on(self, key: bytes, told: Told[int]) -> list[tuple[bytes, int]]:
        """``told`` must hand the claim to the first who waits; without one the key is free."""
        if not self.fetches[key].waiting:
            assert told == []
            del self.fetches[key]
            return []
        assert [(k, type(tidings)) for k, _, tidings in told] == [(key, Granted)]
        return self.hear(told)

    def expire(self) -> list[tuple[bytes, int]]:
        grants = self.hear(self.table.expire(self.now))
        for key, fetch in list(self.fetches.items()):
            if fetch.ends <= self.now:
                assert not fetch.waiting, "somebody waits for a claim that has ended"
                del self.fetches[key]
        return grants

    @rule(target=grants, key=st.sampled_from(KEYS))
    def ask(self, key: bytes) -> object:
        grants = self.expire()
        self.askers += 1
        held = len(self.table)
        answer = self.table.ask(key, self.askers, self.now)
        if self.open.get(key, 0.0) > self.now:
            assert answer == Go()
        elif isinstance(answer, Pending):
            fetch = self.fetches[key]
            fetch.waiting.append(self.askers)
            assert answer.ends == fetch.ends
        elif isinstance(answer, Granted):
            assert key not in self.fetches, "two hold one key"
            assert answer.ends == self.now + TIMEOUT
            self.fetches[key] = Fetch(answer.id, self.askers, answer.ends)
            grants.append((key, answer.id))
        else:
            waiting = sum(len(fetch.waiting) for fetch in self.fetches.values())
            assert (waiting if key in self.fetches else held) == self.limit
        return multiple(*grants)

    @rule(target=grants, key=st.sampled_from(KEYS), id_=st.integers(0, 2**62))
    def adopt(self, key: bytes, id_: int) -> object:
        """A claim that was granted elsewhere, and may be one of those known here."""
        grants = self.expire()
        self.askers += 1
        self.table.adopt(key, self.askers, self.now + TIMEOUT, id_)
        fetch = self.fetches.get(key)
        if fetch is not None and fetch.id == id_:
            fetch.holder = self.askers
        elif len(self.fetches) < self.limit:
            self.fetches.setdefault(key, Fetch(id_, self.askers, self.now + TIMEOUT))
        return multiple(*grants, (key, id_))

    @rule(target=grants, grant=consumes(grants), verdict=st.sampled_from(Verdict))
    def release(self, grant: tuple[bytes, int], verdict: Verdict) -> object:
        """Of a grant that may have passed to another meanwhile."""
        key, id_ = grant
        told = self.table.release(key, id_, verdict, self.now)
        fetch = self.fetches.get(key)
        if fetch is None or fetch.id != id_:
            assert told == []
            return multiple()
        if verdict is Verdict.PUBLISHED:
            self.let_go(key, told, Look())
        elif verdict is Verdict.UNSTORABLE:
            self.open[key] = self.now + OPEN_FOR
            self.let_go(key, told, Go())
        elif verdict is Verdict.FAILED and fetch.failures == 1:
            self.let_go(key, told, Go())
        else:
            fetch.failures += verdict is Verdict.FAILED
            return multiple(*self.pass_on(key, told))
        return multiple()

    @rule(key=st.sampled_from(KEYS))
    def publish(self, key: bytes) -> None:
        """By somebody who holds no claim."""
        told = self.table.release(key, None, Verdict.PUBLISHED, self.now)
        if key in self.fetches:
            self.let_go(key, told, Look())
        else:
            assert told == []

    @rule(target=grants, data=st.data())
    def forget(self, data: st.DataObject) -> object:
        """Some of those who hold or wait are gone."""
        known = sorted(
            {f.holder for f in self.fetches.values()} | {w for f in self.fetches.values() for w in f.waiting}
        )
        gone = set(data.draw(st.lists(st.sampled_from(known), unique=True))) if known else set()
        told = self.table.forget(lambda asker: asker in gone, self.now)
        grants = []
        for key, fetch in list(self.fetches.items()):
            fetch.waiting = [waiter for waiter in fetch.waiting if waiter not in gone]
            if fetch.holder in gone:
                grants += self.pass_on(key, [one for one in told if one[0] == key])
        assert len(told) == len(grants)
        return multiple(*grants)

    @rule(target=grants, seconds=st.sampled_from([0.1, 4.0, TIMEOUT, 25.0]))
    def time_passes(self, seconds: float) -> object:
        self.now += seconds
        return multiple(*self.expire())

    @invariant()
    def each_key_in_flight_has_one_claim(self) -> None:
        assert len(self.table) == len(self.fetches)

    @invariant()
    def who_has_fetched_for_long_is_known(self) -> None:
        soon = self.now + 5.0
        assert self.table.holders(soon) == {fetch.holder for fetch in self.fetches.values() if fetch.ends < soon}

    def teardown(self) -> None:
        """Though no holder ever answers again, everybody is told within one life of a claim for each before him."""
        if not hasattr(self, "table"):
            return
        for _ in range(max((len(f.waiting) for f in self.fetches.values()), default=0) + 2):
            self.now += TIMEOUT
            self.expire()
        assert not any(fetch.waiting for fetch in self.fetches.values())
        assert len(self.table) == 0


TestClaims = Claims.TestCase
TestClaims.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def table_with_waiters(*waiters: str) -> tuple[ClaimTable[str], Granted]:
    table: ClaimTable[str] = ClaimTable(TIMEOUT)
    granted = table.ask(b"k", "leader", 0.0)
    assert isinstance(granted, Granted)
    for waiter in waiters:
        assert table.ask(b"k", waiter, 1.0) == Pending(TIMEOUT)
    return table, granted


def test_the_first_who_asks_fetches_and_the_others_wait_until_its_claim_ends() -> None:
    _, granted = table_with_waiters("a", "b")
    assert granted.ends == TIMEOUT


def test_what_cannot_be_stored_is_fetched_by_everybody_for_a_short_while() -> None:
    table, granted = table_with_waiters("a", "b")
    told = table.release(b"k", granted.id, Verdict.UNSTORABLE, 2.0)
    assert told == [(b"k", "a", Go()), (b"k", "b", Go())]
    assert table.ask(b"k", "c", 2.0 + OPEN_FOR - 0.01) == Go()
    assert isinstance(table.ask(b"k", "c", 2.0 + OPEN_FOR), Granted)


def test_a_second_failure_in_a_row_lets_everybody_go() -> None:
    table, granted = table_with_waiters("a", "b", "c")
    ((_, first, passed),) = table.release(b"k", granted.id, Verdict.FAILED, 2.0)
    assert first == "a"
    assert isinstance(passed, Granted)
    assert table.release(b"k", passed.id, Verdict.FAILED, 3.0) == [(b"k", "b", Go()), (b"k", "c", Go())]
    assert isinstance(table.ask(b"k", "d", 3.0), Granted)


@pytest.mark.parametrize("verdict", Verdict)
def test_a_late_release_by_a_former_holder_changes_nothing(verdict: Verdict) -> None:
    table, granted = table_with_waiters("a", "b")
    ((_, _, passed),) = table.expire(TIMEOUT)
    assert isinstance(passed, Granted)
    assert table.release(b"k", granted.id, verdict, TIMEOUT + 1) == []
    assert table.ask(b"k", "c", TIMEOUT + 1) == Pending(passed.ends)
    assert [asker for _, asker, _ in table.release(b"k", passed.id, Verdict.PUBLISHED, TIMEOUT + 2)] == ["b", "c"]


def test_an_adopted_claim_does_not_displace_the_one_that_is_there() -> None:
    table, granted = table_with_waiters("a")
    table.adopt(b"k", "another", 5.0, 77)
    assert table.release(b"k", 77, Verdict.PUBLISHED, 2.0) == []
    assert table.release(b"k", granted.id, Verdict.PUBLISHED, 2.0) == [(b"k", "a", Look())]


def test_a_claim_that_is_told_again_on_another_way_moves_there_and_lives_no_longer() -> None:
    table, granted = table_with_waiters("a")
    table.adopt(b"k", "the same on another link", 50.0, granted.id)
    assert table.holder(b"k") == "the same on another link"
    assert table.forget(lambda asker: asker == "x", 2.0) == []
    assert [asker for _, asker, _ in table.expire(TIMEOUT)] == ["a"]


def test_an_adopted_claim_that_ends_before_older_ones_passes_on_when_it_ends() -> None:
    table: ClaimTable[str] = ClaimTable(TIMEOUT)
    assert isinstance(table.ask(b"other", "x", 0.0), Granted)
    table.adopt(b"k", "elsewhere", 3.0, 77)
    assert table.ask(b"k", "a", 1.0) == Pending(3.0)
    assert table.expire(2.9) == []
    assert [(key, asker) for key, asker, _ in table.expire(3.0)] == [(b"k", "a")]


def test_beyond_the_limit_everybody_is_let_go_but_those_in_flight_go_on() -> None:
    table: ClaimTable[int] = ClaimTable(TIMEOUT, 2)
    assert isinstance(table.ask(b"1", 1, 0.0), Granted)
    assert isinstance(table.ask(b"2", 2, 0.0), Granted)
    assert table.ask(b"3", 3, 0.0) == Go()
    assert isinstance(table.ask(b"2", 4, 0.0), Pending)
    assert isinstance(table.ask(b"2", 5, 0.0), Pending)
    assert table.ask(b"1", 6, 0.0) == Go()  # as many wait as may
    table.release(b"2", None, Verdict.PUBLISHED, 0.0)
    assert isinstance(table.ask(b"1", 6, 0.0), Pending)
    table.adopt(b"4", 7, 1.0, 99)
    table.adopt(b"5", 7, 1.0, 99)
    assert len(table) == 2


def test_a_claim_without_any_life_still_ends() -> None:
    table: ClaimTable[int] = ClaimTable(0.0)
    assert isinstance(table.ask(b"k", 1, 5.0), Granted)
    assert isinstance(table.ask(b"k", 2, 5.0), Pending)
    assert [asker for _, asker, _ in table.expire(5.0) + table.expire(5.0)] == [2]
    assert len(table) == 0


# Flights: the same among threads


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def in_flight(waiters: int) -> tuple[Flights, Clock, Granted, list[Future[object]]]:
    clock = Clock()
    flights = Flights(TIMEOUT, clock)
    granted = flights.ask(b"k", "leader")
    assert isinstance(granted, Granted)
    waiting = [flights.ask(b"k", number) for number in range(waiters)]
    assert all(isinstance(future, Future) for future in waiting)
    return flights, clock, granted, waiting  # type: ignore[return-value] # the line above has made sure


@pytest.mark.parametrize(("verdict", "tidings"), [(Verdict.PUBLISHED, Look()), (Verdict.UNSTORABLE, Go())])
def test_those_who_wait_in_a_process_are_told_at_once(verdict: Verdict, tidings: object) -> None:
    flights, _, granted, waiting = in_flight(3)
    flights.release(b"k", granted.id, verdict)
    assert [future.result(0) for future in waiting] == [tidings] * 3


@pytest.mark.parametrize("verdict", [Verdict.FAILED, Verdict.ABANDONED])
def test_a_flight_that_is_lost_is_flown_by_the_first_who_still_waits(verdict: Verdict) -> None:
    flights, _, granted, waiting = in_flight(4)
    waiting[0].cancel()
    waiting[1].cancel()
    flights.release(b"k", granted.id, verdict)
    assert isinstance(waiting[2].result(0), Granted)
    assert not waiting[3].done()


def test_a_flight_passes_over_any_number_who_have_stopped_waiting() -> None:
    flights, _, granted, waiting = in_flight(2000)
    for future in waiting[:-1]:
        future.cancel()
    flights.release(b"k", granted.id, Verdict.ABANDONED)
    assert isinstance(waiting[-1].result(0), Granted)


def test_a_flight_for_which_nobody_waits_any_longer_is_free() -> None:
    flights, _, granted, waiting = in_flight(3)
    for future in waiting:
        future.cancel()
    flights.release(b"k", granted.id, Verdict.ABANDONED)
    assert isinstance(flights.ask(b"k", "somebody"), Granted)


def test_a_flight_whose_time_is_over_passes_on_when_anybody_asks_for_anything() -> None:
    flights, clock, _, waiting = in_flight(2)
    clock.now = TIMEOUT
    assert isinstance(flights.ask(b"other", "somebody"), Granted)
    assert isinstance(waiting[0].result(0), Granted)
    assert not waiting[1].done()


def test_the_leader_of_a_flight_that_has_passed_on_ends_nothing() -> None:
    flights, clock, granted, waiting = in_flight(2)
    clock.now = TIMEOUT
    flights.ask(b"other", "somebody")
    flights.release(b"k", granted.id, Verdict.PUBLISHED)
    assert not waiting[1].done()


def test_who_flies_already_does_not_wait_for_itself() -> None:
    flights, _, granted, waiting = in_flight(1)
    assert flights.ask(b"k", "leader") == Go()
    assert isinstance(flights.ask(b"other", "leader"), Granted)
    assert not waiting[0].done()
    flights.release(b"k", granted.id, Verdict.PUBLISHED)
    assert isinstance(flights.ask(b"k", "leader"), Granted)


def test_who_was_handed_the_flight_does_not_wait_for_itself_either() -> None:
    flights, _, granted, waiting = in_flight(1)
    flights.release(b"k", granted.id, Verdict.ABANDONED)
    assert isinstance(waiting[0].result(0), Granted)
    assert flights.ask(b"k", 0) == Go()


def test_a_late_release_does_not_make_the_next_leader_wait_for_itself() -> None:
    flights, clock, granted, _ = in_flight(0)
    clock.now = TIMEOUT
    assert isinstance(flights.ask(b"k", "next"), Granted)
    flights.release(b"k", granted.id, Verdict.PUBLISHED)
    assert flights.ask(b"k", "next") == Go()


@pytest.mark.parametrize("verdict", [Verdict.PUBLISHED, Verdict.UNSTORABLE, Verdict.ABANDONED])
def test_among_threads_one_flies_at_a_time_and_everybody_arrives(verdict: Verdict) -> None:
    flights = Flights(60.0, lambda: 0.0)
    ready = threading.Barrier(16)
    lock = threading.Lock()
    flying = most = 0
    arrived: list[object] = []

    def fly() -> None:
        nonlocal flying, most
        ready.wait(10)
        answer = flights.ask(b"k", threading.get_ident())
        if isinstance(answer, Future):
            answer = answer.result(10)
        if isinstance(answer, Granted):
            with lock:
                flying += 1
                most = max(most, flying)
            with lock:
                flying -= 1
            flights.release(b"k", answer.id, verdict)
        with lock:
            arrived.append(answer)

    run_together(16, fly)
    assert len(arrived) == 16
    assert most == 1


def run_together(count: int, target: Callable[[], None]) -> None:
    threads = [threading.Thread(target=target) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)

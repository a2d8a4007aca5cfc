"""Whose turn it is: a loop's or another thread's, and never both's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
from waiting import eventually

pytest.importorskip("libp2p")

import trio

from httpx_p2pcache.node import turn as turn_module
from httpx_p2pcache.node.turn import Turn

Steps = Callable[[], object]


class Loop:
    """A trio loop in a thread of its own, whose ``tasks`` call ``step`` again and again, and sleep in between."""

    def __init__(self, step: Steps = lambda: None, tasks: int = 0) -> None:
        self.turn = Turn()
        self.steps = 0
        self._step, self._tasks = step, tasks
        self._token: trio.lowlevel.TrioToken | None = None
        self._over = trio.Event()
        self._thread = threading.Thread(target=partial(trio.run, self._main, instruments=[self.turn]))

    def __enter__(self) -> Loop:
        self._thread.start()
        assert eventually(lambda: self._token is not None)
        return self

    def __exit__(self, *_: object) -> None:
        self.soon(self._over.set)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the loop does not go on"

    def soon(self, func: Callable[[], object]) -> None:
        assert self._token is not None
        self._token.run_sync_soon(func)

    def is_asleep(self) -> bool:
        return self.turn.lent(lambda: True)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            for _ in range(self._tasks):
                nursery.start_soon(self._work)
            await self._over.wait()
            nursery.cancel_scope.cancel()

    async def _work(self) -> None:
        while True:
            self._step()
            self.steps += 1
            await trio.sleep(0.001)


def test_a_loop_and_other_threads_are_never_inside_at_the_same_time() -> None:
    inside: list[str] = []
    met: list[list[str]] = []
    taken, ends = 0, time.monotonic() + 60

    def enter(who: str) -> bool:
        inside.append(who)
        threading.Event().wait(0.00002)  # gives the others the interpreter
        if inside != [who]:
            met.append(list(inside))
        inside.remove(who)
        return True

    def other(name: str) -> None:
        nonlocal taken
        while (loop.steps < 300 or taken < 100) and time.monotonic() < ends:
            taken += loop.turn.lent(partial(enter, name))
            threading.Event().wait(0.0001)

    with Loop(partial(enter, "loop"), tasks=2) as loop:
        threads = [threading.Thread(target=other, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert loop.steps >= 300
    assert taken >= 100
    assert met == []


def test_it_is_nobody_elses_while_the_loop_is_at_work_nor_once_it_has_ended() -> None:
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        over.wait(10)

    with Loop() as loop:
        assert eventually(loop.is_asleep)
        loop.soon(work)
        assert begun.wait(10)
        assert not loop.is_asleep()
        over.set()
        assert eventually(loop.is_asleep)
    assert not loop.is_asleep()


def test_it_is_given_back_by_who_fails() -> None:
    def fail() -> bool:
        raise KeyboardInterrupt

    with Loop() as loop:
        assert eventually(loop.is_asleep)
        with pytest.raises(KeyboardInterrupt):
            loop.turn.lent(fail)
        assert eventually(loop.is_asleep)


def test_a_loop_goes_on_without_the_turn_that_is_not_given_back_and_lends_it_again_once_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turn_module, "LOST_SECONDS", 0.05)
    taken, over, done = threading.Event(), threading.Event(), threading.Event()

    def keep() -> bool:
        taken.set()
        return over.wait(10)

    with Loop() as loop:
        assert eventually(loop.is_asleep)
        keeper = threading.Thread(target=loop.turn.lent, args=(keep,))
        keeper.start()
        assert taken.wait(10)
        loop.soon(done.set)
        assert done.wait(10)
        assert not loop.is_asleep()  # to anybody
        over.set()
        keeper.join(10)
        assert not loop.is_asleep()
        loop.soon(lambda: None)
        assert eventually(loop.is_asleep)

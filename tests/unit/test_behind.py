"""Writing behind, and in one transaction, where somebody interrupts it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import pytest

from httpx_p2pcache.behind import Behind
from httpx_p2pcache.database import connect


def test_what_was_done_before_an_interrupt_is_not_done_again() -> None:
    done: list[str] = []

    def do(works: Sequence[str], patient: bool) -> bool:
        for work in works:
            if work == "interrupt":
                raise KeyboardInterrupt
            done.append(work)
        return patient

    lock = threading.RLock()
    later: Behind[str] = Behind(lock, do, seconds=60.0, at_once=4)
    with lock:
        for work in ("one", "interrupt", "two"):
            later.add(work.encode(), 1, work)
        with pytest.raises(KeyboardInterrupt):
            later.flush()
        assert b"one" not in later
        later.add(b"three", 1, "three")
        later.flush()
    assert done == ["one", "three"]


def test_an_interrupt_while_another_process_is_waited_for_leaves_no_transaction_open() -> None:
    connection = connect(":memory:")

    @contextlib.contextmanager
    def interrupted() -> Iterator[None]:
        yield
        assert connection.in_transaction
        raise KeyboardInterrupt

    connection.impatient = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), connection.together(patient=False):
        pass
    assert not connection.in_transaction
    connection.execute("CREATE TABLE numbers (number)")
    with connection.together(patient=True) as free:
        connection.execute("INSERT INTO numbers VALUES (1)")
        connection.commit()
        assert free
        assert connection.in_transaction
    assert not connection.in_transaction
    connection.close()


def test_what_a_job_asks_for_itself_is_not_begun_before_the_job_is_done() -> None:
    done: list[str] = []
    lock = threading.RLock()

    def do(works: Sequence[str], patient: bool) -> bool:
        later.flush()  # as a job does that looks for its key
        done.extend(works)
        return patient

    later: Behind[str] = Behind(lock, do, seconds=60.0, at_once=1)
    with lock:
        for number in range(2000):  # deeper than any stack
            later.add(b"key", 1, str(number))
        later.flush()
    assert done == [str(number) for number in range(2000)]

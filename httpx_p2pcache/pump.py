"""The two pumps that drive a request's way, whatever client it came from.

A client hands over how it sends to the origin and how it is done with a reply that nobody gets; the rest is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one only from 3.11 on
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.lowlevel import RunVar

from httpx_p2pcache.answers import Answer, Effect, Read, Reply, Run, Send, Wait, Way, driven

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

THREADS = 8  # of each event loop that are at work on the store at a time: one has it, the others wait
Result = TypeVar("Result")
Fields = dict[str, str]  # to be added to the caller's request, in the place of its own of those names


def drive(
    way: Way,
    send: Callable[[Fields], Reply],
    discard: Callable[[Reply], None],
    read: Callable[[Reply], bytes],
) -> Answer:
    """Walk ``way`` to its end in this thread. Raises what ``send`` raises, as far as the way lets it."""
    reply: Reply | None = None

    def perform(effect: Effect) -> Any:
        nonlocal reply
        if isinstance(effect, Run):
            return effect.func()
        if isinstance(effect, Wait):
            return wait_for(effect.future, effect.seconds, effect.keep)
        if isinstance(effect, Send):
            reply = send(effect.added)
            return reply
        if isinstance(effect, Read):
            assert reply is not None
            return read(reply)
        discarded, reply = reply, None
        if discarded is not None:
            discard(discarded)
        return None

    try:
        effect = next(way)
        while True:
            try:
                result = perform(effect)
            except BaseException as exc:
                effect = way.throw(exc)
            else:
                effect = way.send(result)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return] # a generator's return value is not typed here
    except BaseException:
        if reply is not None:
            discard(reply)
        raise


async def async_drive(
    way: Way,
    send: Callable[[Fields], Awaitable[Reply]],
    discard: Callable[[Reply], Awaitable[None]],
    read: Callable[[Reply], Awaitable[bytes]],
) -> Answer:
    """The same on asyncio or trio; what touches the disk runs in a worker thread."""
    reply: Reply | None = None

    async def perform(effect: Effect) -> Any:
        nonlocal reply
        if isinstance(effect, Run):
            with anyio.CancelScope(shield=True):  # what is begun in the store is finished
                return await in_thread(effect.func)
        if isinstance(effect, Wait):
            return await async_wait_for(effect.future, effect.seconds, effect.keep)
        if isinstance(effect, Send):
            reply = await send(effect.added)
            return reply
        if isinstance(effect, Read):
            assert reply is not None
            return await read(reply)
        discarded, reply = reply, None
        if discarded is not None:
            await discard(discarded)
        return None

    try:
        return await driven(way, perform)
    except BaseException:
        if reply is not None:
            await discard(reply)
        raise


_limiter: RunVar[anyio.CapacityLimiter] = RunVar("httpx_p2pcache")


async def in_thread(func: Callable[..., Result], *arguments: Any) -> Result:
    """``func`` in a worker thread; never one of those that the program's own work may be waiting for."""
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(THREADS)
        _limiter.set(limiter)
    return await anyio.to_thread.run_sync(func, *arguments, limiter=limiter)


def asyncio_loop() -> AbstractEventLoop | None:
    """The running asyncio loop; None under trio."""
    asyncio = sys.modules.get("asyncio")  # not imported for our sake: it takes 30 ms
    if asyncio is None:
        return None
    try:
        loop: AbstractEventLoop = asyncio.get_running_loop()
        return loop
    except RuntimeError:
        return None


def wait_for(future: Future[Any], timeout: float, keep: bool = False) -> Any:
    """The result, or None if there is none in time: who stops waiting cancels the future, so that nothing is granted in
    vain."""
    try:
        return future.result(timeout)
    except (FutureTimeout, CancelledError):
        if not future.done() and (keep or future.cancel()):
            return None
        return None if future.cancelled() else future.result()  # it came while we gave up
    except BaseException:
        future.cancel()
        raise


async def async_wait_for(future: Future[Any], timeout: float, keep: bool = False) -> Any:
    """The same from asyncio or trio: the caller's loop is never blocked, and is woken without blocking the node's."""
    woken = anyio.Event()
    native: Any = anyio.lowlevel.current_token().native_token
    call_soon = getattr(native, "run_sync_soon", None) or native.call_soon_threadsafe

    def wake(_: Future[Any]) -> None:
        try:
            call_soon(woken.set)
        except RuntimeError:  # the caller's loop has ended meanwhile
            pass

    future.add_done_callback(wake)
    try:
        with anyio.move_on_after(timeout):
            await woken.wait()
    except BaseException:
        future.cancel()
        raise
    if not future.done() and (keep or future.cancel()):
        return None
    return None if future.cancelled() else future.result()

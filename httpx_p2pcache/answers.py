"""What a request's way asks for, and what comes of it: the effects, the origin's reply, the caller's answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hishel import Headers

from httpx_p2pcache.conditions import View
from httpx_p2pcache.stored import Stored

if TYPE_CHECKING:
    from httpx_p2pcache.keep import Keep


class Run(NamedTuple):
    func: Callable[[], Any]


class Wait(NamedTuple):
    future: Future[Any]
    seconds: float
    keep: bool = False  # else it is cancelled when it does not come in time: nobody wants it any more


class Send(NamedTuple):
    added: dict[str, str]


class Read(NamedTuple):
    """The body of the reply that came last, as it was sent."""


class Discard(NamedTuple):
    """Be done with the reply that came last."""


class Miss(NamedTuple):
    """What a look came to that found no answer: what there is, if it is known, and how many flights had ``landed``."""

    found: list[Stored] | None = None
    landed: int = -1


NOT_LOOKED = Miss()


Effect = Run | Wait | Send | Read | Discard
Way = Generator[Effect, Any, "Answer"]


@dataclass(frozen=True)
class Reply:
    """A response from the origin: its head, and the client's own object with the body still to be read."""

    status: int
    headers: Headers
    native: Any


@dataclass
class Answer:
    """What the caller gets: a ``stored`` entry, or the origin's ``reply`` (``keep`` saves it as it is read), or a 504.

    ``cache_status`` is the RFC 9211 member that describes it; ``caching`` the mapping for ``extensions``.
    """

    stored: Stored | None
    reply: Reply | None
    cache_status: str
    caching: dict[str, Any]
    keep: Keep | None = None
    age: float = 0.0
    view: View | None = None  # of ``stored``, where the caller has conditions of its own
    afterwards: Afterwards | None = None  # RFC 5861 §3


class Afterwards(NamedTuple):
    """A way to be driven in the background once the answer is given; ``done`` is to be called when it is, or cannot."""

    way: Way
    done: Callable[[], object]


Step = TypeVar("Step")
Result = TypeVar("Result")


async def driven(
    steps: Generator[Step, Any, Result], perform: Callable[[Step], Awaitable[Any]], first: Step | None = None
) -> Result:
    """What ``steps`` come to, each of which ``perform`` does; ``first``: the one that was taken out of them already."""
    try:
        step = next(steps) if first is None else first
        while True:
            try:
                result = await perform(step)
            except BaseException as exc:
                step = steps.throw(exc)
            else:
                step = steps.send(result)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return] # a generator's return value is not typed here


def caching(
    source: str, *, from_cache: bool = False, revalidated: bool = False, stored: bool = False
) -> dict[str, Any]:
    return {"from_cache": from_cache, "revalidated": revalidated, "stored": stored, "source": source}

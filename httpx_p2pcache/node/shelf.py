"""Entries on their way between the store and the members: chosen, sealed, opened, checked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from httpx_p2pcache.answers import driven
from httpx_p2pcache.entries import Entry, Keyring, body_digest
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.network import Question
from httpx_p2pcache.node.checks import MAX_RESIDENT, believed
from httpx_p2pcache.stored import Stored

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet


logger = logging.getLogger("httpx_p2pcache")

SAME_AGE = 0.5  # seconds by which the age of one entry may differ between two members
_NOTHING = body_digest(b"")
LARGE = 64 * 1024  # bytes of a body that is unpacked in the worker, and of one that is sent by a task of its own
MAX_KEPT_SEALED = 64 * 1024  # bytes of a sealed entry that is kept beside it, for the next who asks


class BodyMissing(Exception):
    """An entry came without its body, as we should hold it: but we do not."""


Steps = Generator[Callable[[], Any], Any, Stored | None]  # yields what the worker has to do; is sent what came of it


class MustWait(Exception):
    """It cannot be done without waiting: these steps are left, of which ``func`` is the next."""

    def __init__(self, steps: Steps, func: Callable[[], Any] | None = None) -> None:
        self.steps = steps
        self.func = func


class Shelf:
    """The store as the members see it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def select(self, question: Question) -> Stored | None:
        return chosen(await self.load(question.key), question)

    async def load(self, key: bytes) -> list[Stored]:
        held = self.at_hand(key)
        return held if held is not None else await self._fleet.in_worker(partial(self._fleet.store.load, key))

    def at_hand(self, key: bytes) -> list[Stored] | None:
        """What is held of a key, if that can be found out without waiting."""
        return self._fleet.store.at_hand(key)

    def sealed(self, stored: Stored, question: Question, keyring: Keyring) -> bytes:
        return self.seal(stored, keyring, light=stored.entry.digest == question.holds)

    def seal(self, stored: Stored, keyring: Keyring, *, light: bool) -> bytes:
        """An entry sealed, once however many members ask for it; ``light``: without its body."""
        known = stored.memo.get(("sealed", keyring.label, light))
        if isinstance(known, bytes):
            return known
        entry = msgspec.structs.replace(stored.entry, body=b"") if light else stored.entry
        sealed = keyring.seal_entry(entry)
        if len(sealed) <= MAX_KEPT_SEALED:
            stored.memo["sealed", keyring.label, light] = sealed
        return sealed

    async def received(
        self, key: bytes, sealed: bytes, resident: float, keyring: Keyring, *, missing_ok: bool = True
    ) -> Stored | None:
        """An entry from a peer, checked and stored; None if it is not believed, not whole, or no longer valid.

        Raises :class:`BodyMissing` for one that is not whole unless ``missing_ok``.
        """
        steps = self._receiving(key, sealed, resident, 0.0, keyring, missing_ok)
        return await driven(steps, self._fleet.in_worker)

    async def finish(self, begun: MustWait) -> Stored | None:
        """What was begun at once, and has to wait after all."""
        return await driven(begun.steps, self._fleet.in_worker, begun.func)

    def received_at_once(
        self, key: bytes, sealed: bytes, resident: float, travelled: float, keyring: Keyring
    ) -> Stored | None:
        """The same for one who does not wait, and knows how many seconds it has ``travelled`` at the most.

        Raises :class:`MustWait`, which is to be finished.
        """
        steps = self._receiving(key, sealed, resident, travelled, keyring, missing_ok=True)
        if len(sealed) > LARGE:
            raise MustWait(steps)
        try:
            func = next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        raise MustWait(steps, func)

    def _receiving(
        self, key: bytes, sealed: bytes, resident: float, travelled: float, keyring: Keyring, missing_ok: bool
    ) -> Steps:
        fleet = self._fleet
        try:
            entry = keyring.open_entry(sealed, key)
            if not entry.body and entry.digest != _NOTHING:
                held = self.at_hand(key)
                if held is None:
                    held = yield partial(fleet.store.load, key)
                body = next((s.entry.body for s in held if s.entry.digest == entry.digest), None)
                if body is None and not missing_ok:
                    raise BodyMissing
                if body is None:
                    return None
                entry = msgspec.structs.replace(entry, body=body)
            now = time.time()
            check = partial(believed, entry, resident, now, fleet.settings.max_body_size)
            takes_long = len(entry.body) > LARGE and "content-encoding" in entry.headers
            entry = (yield check) if takes_long else check()
        except Rejected as exc:
            logger.debug("an entry from a peer was not believed: %s", exc)
            fleet.stats.add("rejected")
            return None
        # Its age is counted from when the origin was asked: what was written since then makes it void.
        receive = partial(fleet.store.receive, entry, since=now - entry.initial_age, travelled=travelled)
        with fleet.store.soon(key, len(entry.body)) as free:
            at_once = free and fleet.store.behind
            stored: Stored | None = receive() if at_once else None
        if not at_once:
            stored = yield receive
        if stored is None or stored.entry is entry:
            fleet.stats.add("received")
        return stored


class Parcel:
    """An entry on its way to many members: sealed once for each secret in use, however many there are.

    Not ``whole``, where it may be left out: a ``refreshed`` one goes without its body to who should hold that.
    """

    def __init__(self, entry: Entry, *, refreshed: bool) -> None:
        self.entry = entry
        self._refreshed = refreshed
        self._sealed: dict[tuple[str, bool], bytes] = {}

    def sealed(self, keyring: Keyring, *, whole: bool) -> bytes:
        light = self._refreshed and not whole
        form = keyring.label, light
        if form not in self._sealed:
            entry = msgspec.structs.replace(self.entry, body=b"") if light else self.entry
            self._sealed[form] = keyring.seal_entry(entry)
        return self._sealed[form]


def chosen(held: list[Stored], question: Question) -> Stored | None:
    """Of all that is held of a key, the entry that helps an asker most."""
    now = time.time()
    fit = [
        stored
        for stored in held
        if (question.any_identity or stored.entry.identity == question.identity or "public" in stored.control)
        and stored.matches(question.method, question.selecting.get, any_identity=question.any_identity)
        and (stored.entry.status == 200 or stored.entry.identity == question.identity)
    ]
    return max(
        fit, key=lambda s: (s.fresh(now), s.entry.identity == question.identity, -s.entry.age(now)), default=None
    )


def helps(stored: Stored | None, question: Question) -> bool:
    """Whether an entry is fresh, and another than the one which the asker has found to be stale."""
    now = time.time()
    if stored is None or not stored.fresh(now):
        return False
    return stored.entry.digest != question.holds or stored.entry.age(now) < question.age - SAME_AGE


def resident(received: float) -> float:
    """For how many seconds we have held what was ``received`` then."""
    return min(max(0.0, time.time() - received), MAX_RESIDENT)

"""What this node's own requests ask: each question is put to its key's home. What they fetch is in ``fetches``.

No task waits for an answer. A question is a party to its call: an answer is taken in the turn of who has brought it,
the loss of the peer likewise, and one task sees for all of them when their time is up.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio
from libp2p.peer.id import ID

from httpx_p2pcache import network
from httpx_p2pcache.claims import Granted as ClaimGranted
from httpx_p2pcache.claims import Look, Pending, Tidings, Verdict
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.network import Answer, Asked, FleetClaim, Unclaimed, settle
from httpx_p2pcache.node.homes import MAX_HOMES
from httpx_p2pcache.node.link import Link
from httpx_p2pcache.node.members import Member
from httpx_p2pcache.node.protocol import Answering, Ask, Found, Granted, Wait
from httpx_p2pcache.node.shelf import MustWait, chosen, helps
from httpx_p2pcache.stored import Stored

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet

logger = logging.getLogger("httpx_p2pcache")

VAIN_WAITS, VAIN_SECONDS = 3, 60.0  # a home that has had us wait for nothing so often is not waited for so long


class _Question:
    """One question, where it has been put, and the future that the answer is for. A party to a call."""

    def __init__(self, questions: Questions, asked: network.Question, future: Asked) -> None:
        self._questions = questions
        self.asked = asked
        self.future = future
        self.homes = 0  # that it has been put to
        self.link: Link | None = None  # where it is; None while it is nowhere, or here
        self.call = 0
        self.forwarded = False  # we are its home, and have asked another member
        self.awaited = False  # somebody fetches it, and we are told
        self.put = 0.0  # when, in the loop's time
        self.deadline = math.inf  # when the answer that comes next is not waited for any more

    def answered(self, answer: Answering) -> None:
        """Raises :class:`Rejected` for one that is impossible."""
        self._questions.answered(self, answer)

    def end(self) -> None:
        """The link is gone."""
        self._questions.lost(self)


class Questions:
    """This node as one who asks. Everything runs in its loop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._open: set[_Question] = set()  # those that have been put somewhere, and have a deadline
        self._alarm = trio.CancelScope()  # goes off at the first deadline, or before it
        self._over = False
        self._lately = False  # something has been put since the loop looked last
        self._look_every = (
            fleet.settings.lookup_timeout / 2
        )  # while something is, in seconds: nobody who is asked has less
        self._own_calls = 0

    def ask(self, asked: network.Question, future: Asked) -> None:
        """Answer ``future`` as :class:`network.PeerNetwork` promises."""
        question = _Question(self, asked, future)
        try:
            put = self._put_at_once(question, self._fleet.shelf.at_hand)
        except Exception:  # the task meets the same, and says so
            self._drop(question)
            put = False
        if not put:
            self._spawn(self._put, question)

    def asked_in_turn(self, asked: network.Question, future: Asked) -> bool:
        """Whether :meth:`ask` could be done by a thread that is lent the loop's :class:`~.turn.Turn`.

        It wakes nobody: that is so while the loop will look by itself before time is up. It touches no disk: who asks
        may be a loop himself. And it claims nothing: what a signal's handler raises passes through at any moment.
        """
        in_time = self._alarm.deadline <= self._fleet.now() + self._look_every
        return in_time and self._put_at_once(_Question(self, asked, future), self._fleet.store.peek, lent=True)

    # A question is put

    def _put_at_once(
        self, question: _Question, look: Callable[[bytes], list[Stored] | None], *, lent: bool = False
    ) -> bool:
        """Whether a question could be put where it belongs, or answered, without waiting for anybody.

        ``look`` says what is held of a key, or None where it cannot; ``lent``: it may only be sent to another member.
        """
        fleet, asked = self._fleet, question.asked
        if not fleet.is_settled():
            return False
        home = fleet.homes.now(asked.key, local=asked.local)
        if home != fleet.host.id:
            member = fleet.members.get(home)
            return member is not None and member.usable() and self._sent_at_once(question, member)
        held = look(asked.key)
        if held is None:
            return False
        stored = chosen(held, asked)
        holder = None if helps(stored, asked) else fleet.home.holder_of(asked.key)
        if holder is not None:
            return holder.usable() and self._sent_at_once(question, holder, forwarded=True)
        if not lent:
            self._ask_here(question, stored, brought=False)
        return not lent

    def _sent_at_once(self, question: _Question, member: Member, *, forwarded: bool = False) -> bool:
        link = self._expect(question, member, forwarded=forwarded)
        if link.send_at_once(Ask(question.call, question.asked, forwarded)):
            if forwarded:
                self._fleet.home.hints.pop(question.asked.key, None)
            return True
        self._drop(question)
        question.homes = 0
        return False

    async def _put(self, question: _Question) -> None:
        """The same for one who waits."""
        fleet = self._fleet
        if question.future.done():  # nobody wants to know any more
            return
        try:
            if not fleet.is_settled():
                await fleet.settled(fleet.settings.lookup_timeout / 4)
            if question.homes >= MAX_HOMES:
                raise OSError("one home after another was lost")
            home = await fleet.homes.of(question.asked.key, local=question.asked.local)
            if home is None:
                self._ask_here(question, await fleet.home.find(question.asked))
                return
            link = self._expect(question, home)
            with contextlib.suppress(OSError):  # then it is closed, and the question has heard of that
                await link.send(Ask(question.call, question.asked))
        except OSError:
            fleet.stats.add("peer_failures")
            self._resolve(question, Unclaimed())
        except BaseException:
            self._drop(question)
            self._resolve(question, Unclaimed())
            raise

    def _expect(self, question: _Question, member: Member, *, forwarded: bool = False) -> Link:
        """The link of a call to a member, which the question is a party to from now on."""
        link, timeout = member.link, self._fleet.settings.lookup_timeout
        question.link, question.forwarded, question.awaited = link, forwarded, False
        question.call = link.expect(question)
        question.homes += not forwarded
        self._wait(question, timeout / 2 if forwarded else timeout)
        return link

    def _wait(self, question: _Question, seconds: float) -> None:
        if self._over:
            self._resolve(question, Unclaimed())
            return
        question.put = self._fleet.now()
        question.deadline = question.put + seconds
        self._open.add(question)
        self._lately = True
        due = question.put + min(seconds, self._look_every)
        if due < self._alarm.deadline:
            self._alarm.deadline = due

    def _drop(self, question: _Question) -> None:
        """It is nowhere any more."""
        self._open.discard(question)
        if question.link is not None:
            question.link.forget(question.call)
            question.link = None

    # What comes of it

    def answered(self, question: _Question, answer: Answering) -> None:
        """What a member says to a question. Raises :class:`Rejected` for what is no answer to it."""
        link, asked = question.link, question.asked
        assert link is not None
        member = self._fleet.members.get(link.peer_id)
        if isinstance(answer, Wait):
            if question.awaited or question.forwarded:
                raise Rejected("more answers than a call can have")
            if member is not None and member.vain_until > self._fleet.now():
                self._drop(question)
                self._resolve(question, Unclaimed())
            else:
                self._await(question)
            return
        self._drop(question)
        stored = None
        if question.awaited and member is not None:
            member.vain = 0
        if isinstance(answer, Found):
            self._fleet.demanded()
        if isinstance(answer, Found) or (isinstance(answer, Granted) and answer.sealed):
            try:
                shelf, travelled = self._fleet.shelf, self._fleet.now() - question.put
                if question.awaited:  # most of that time it was not there yet
                    travelled = min(travelled, self._fleet.rtt(link))
                stored = shelf.received_at_once(asked.key, answer.sealed, answer.resident, travelled, link.keyring)
            except MustWait as begun:
                self._spawn(self._receive, question, answer, link, begun)
                return
            except Exception:  # ours, and no fault of the member's
                logger.debug("an entry could not be received", exc_info=True)
        self._conclude(question, answer, stored, link)

    async def _receive(self, question: _Question, answer: Answering, link: Link, begun: MustWait) -> None:
        stored = None
        try:
            stored = await self._fleet.shelf.finish(begun)
        finally:
            self._conclude(question, answer, stored, link)

    def _conclude(self, question: _Question, answer: Answering, stored: Stored | None, link: Link) -> None:
        if question.forwarded and not helps(stored, question.asked):
            held = None
            with contextlib.suppress(Exception):  # the task meets the same, and says so
                held = self._fleet.shelf.at_hand(question.asked.key)
            if held is None:
                self._spawn(self._look_here, question)
            else:
                self._ask_here(question, chosen(held, question.asked))
        elif isinstance(answer, Granted):
            self._granted(question, answer.id, link.peer_id, brought=bool(answer.sealed))
        else:
            self._resolve(question, Unclaimed() if stored is None else network.Found(stored))

    def _await(self, question: _Question) -> None:
        """Somebody fetches it, and we are told."""
        question.awaited = True
        self._fleet.demanded()
        self._wait(question, self._fleet.settings.claim_timeout)
        question.future.await_fetch()

    def lost(self, question: _Question) -> None:
        """The member that was asked is gone: the next home knows, or decides anew."""
        if question in self._open:
            self._drop(question)
            if question.future.done():  # nobody wants to know any more
                return
            self._spawn(self._look_here if question.forwarded else self._put, question)

    def _spawn(self, func: Callable[..., Awaitable[None]], question: _Question, *args: object) -> None:
        if self._over:
            self._resolve(question, Unclaimed())
        else:
            self._fleet.spawn(func, question, *args)

    async def keep_time(self) -> None:
        """See to it that every question has an end."""
        try:
            while True:
                first = min((question.deadline for question in self._open), default=math.inf)
                if self._lately:
                    first = min(first, self._fleet.now() + self._look_every)
                    self._lately = False
                with trio.CancelScope(deadline=first) as self._alarm:
                    await trio.sleep_forever()
                now = self._fleet.now()
                for question in [question for question in self._open if question.deadline <= now]:
                    self._overdue(question)
        finally:
            self._over = True
            for question in list(self._open):
                self._drop(question)
                self._resolve(question, Unclaimed())

    def _overdue(self, question: _Question) -> None:
        link, fleet = question.link, self._fleet
        member = None if link is None else fleet.members.get(link.peer_id)
        if link is None:  # here, where claims have an end of their own
            self._drop(question)
            self._resolve(question, Unclaimed())
        elif question.forwarded or question.awaited:
            if question.awaited and member is not None:
                # Claims end before those who wait give up: a home that keeps its word is heard of by then.
                member.vain += 1
                if member.vain >= VAIN_WAITS:
                    member.vain_until = self._fleet.now() + VAIN_SECONDS
            self.lost(question)
        else:
            self._drop(question)
            # A busy home is heard of, though late; one that says nothing at all is not asked for the time being.
            if member is not None and member.heard() < question.put:
                fleet.presence.suspect(link.peer_id)
            fleet.stats.add("peer_failures")
            self._resolve(question, Unclaimed())

    # Where we are the home ourselves

    async def _look_here(self, question: _Question) -> None:
        stored = None
        try:
            stored = await self._fleet.shelf.select(question.asked)
        finally:
            self._ask_here(question, stored)

    def _ask_here(self, question: _Question, stored: Stored | None, *, brought: bool = True) -> None:
        """The same question to this node, which holds ``stored``; ``brought``: perhaps since it was asked."""
        asked, ours = question.asked, self._fleet.host.id
        if helps(stored, asked):
            self._resolve(question, network.Found(stored))
            return
        self._own_calls += 1

        def tell(tidings: Tidings) -> None:
            self._drop(question)
            if isinstance(tidings, ClaimGranted):
                self._granted(question, tidings.id, ours, brought=True)
            else:
                self._resolve(question, network.Found() if isinstance(tidings, Look) else Unclaimed())

        answer = self._fleet.home.claim_here(asked.claim, self._own_calls, tell)
        if isinstance(answer, ClaimGranted):
            self._granted(question, answer.id, ours, brought=brought)
        elif isinstance(answer, Pending):
            self._await(question)
        else:
            self._resolve(question, Unclaimed())

    def _granted(self, question: _Question, id_: int, granter: ID, *, brought: bool) -> None:
        self._fleet.fetches.granted(question.asked, id_, granter)
        self._resolve(question, FleetClaim(id_, brought))

    def _resolve(self, question: _Question, answer: Answer) -> None:
        """Set an answer that is not set yet; a claim that nobody waits for any more is given back."""
        if not settle(question.future, answer) and isinstance(answer, FleetClaim):
            asked = question.asked
            self._fleet.spawn(self._fleet.fetches.release, asked.claim, asked.key, answer.id, Verdict.ABANDONED)

    def waits_at(self) -> set[ID]:
        """The homes that owe us word of what somebody fetches."""
        return {one.link.peer_id for one in self._open if one.awaited and one.link is not None}

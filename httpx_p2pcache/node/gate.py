"""The gate: what strangers may cost us."""

from __future__ import annotations

from collections import OrderedDict

from libp2p.peer.id import ID

UPGRADE_SECONDS = 3.0  # for who connects to us to secure and multiplex the connection ...
UPGRADE_CROWDED_SECONDS = 1.0  # ... while more than half of the places for strangers are taken
MAX_STRANGERS = 64
MAX_FAILURES = 20  # of one address ...
NOISY_SECONDS = 20.0  # ... in so many seconds, and for so long it is kept away
MAX_REMEMBERED = 1000


class Gate:
    """Who may come in before it has proved anything. Knows no clock: every event takes ``now``, in seconds.

    At most MAX_STRANGERS at a time; an address from which many have failed, and a peer that does not hold the secret,
    are kept away for a while. Members are inside already, and those whom we dial ourselves do not pass here.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # by address: how many, since when
        self._refused: OrderedDict[ID, float] = OrderedDict()

    def admits(self, ip: str, now: float) -> bool:
        """Whether a connection from this address may try; if so, :meth:`passed` is to be called for it."""
        count, since = self._failures.get(ip, (0, now))
        if now - since > NOISY_SECONDS:
            self._failures.pop(ip, None)
            count = 0
        if count >= MAX_FAILURES or self._inside >= MAX_STRANGERS:
            return False
        self._inside += 1
        return True

    def patience(self) -> float:
        """How many seconds whoever is inside has to show who it is."""
        return UPGRADE_SECONDS if self._inside <= MAX_STRANGERS // 2 else UPGRADE_CROWDED_SECONDS

    def passed(self, ip: str, now: float, *, welcome: bool) -> None:
        """It has been admitted (``welcome``), or it has left, or was shown out."""
        self._inside -= 1
        if welcome:
            self._failures.pop(ip, None)
            return
        count, since = self._failures.get(ip, (0, now))
        self._failures[ip] = count + 1, since
        while len(self._failures) > MAX_REMEMBERED:
            self._failures.popitem(last=False)

    def refuse(self, peer_id: ID, now: float) -> None:
        self._refused[peer_id] = now + NOISY_SECONDS
        while len(self._refused) > MAX_REMEMBERED:
            self._refused.popitem(last=False)

    def refuses(self, peer_id: ID, now: float) -> bool:
        return self._refused.get(peer_id, 0.0) > now

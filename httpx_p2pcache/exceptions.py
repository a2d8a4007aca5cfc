"""Every error this package raises itself.

* P2PCacheError
  x SettingsError      a setting has a value that cannot be used (also a ValueError)
  x ConfigurationError the parts do not fit together (also a TypeError)
  x Rejected           what a peer sent was not believed; never reaches a caller

The origin's own errors pass through untouched: they are httpx's.
"""

from __future__ import annotations

import msgspec

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what msgspec raises for bytes of others


class P2PCacheError(Exception):
    """The base of every error raised by httpx-p2pcache."""


class SettingsError(P2PCacheError, ValueError):
    """A setting cannot be used; the message names it, its value and what was expected."""


class ConfigurationError(P2PCacheError, TypeError):
    """The parts given do not fit together, as a sync-only ``next_transport`` under an ``AsyncClient``."""


class Rejected(P2PCacheError):
    """Bytes from a peer were not what they had to be. Counted and dropped at one edge, never raised to a caller."""

"""HTTP caching that a fleet of machines shares without a server: ``httpx.Client(transport=P2PCacheTransport())``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from httpx_p2pcache.exceptions import ConfigurationError, P2PCacheError, SettingsError
from httpx_p2pcache.settings import Settings

if TYPE_CHECKING:
    from httpx_p2pcache.runner import get_stats
    from httpx_p2pcache.transport import P2PCacheTransport

__all__ = [
    "ConfigurationError",
    "P2PCacheError",
    "P2PCacheTransport",
    "Settings",
    "SettingsError",
    "get_stats",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """What needs httpx or hishel is imported when it is asked for: other clients, and commands, need not pay for it."""
    if name == "P2PCacheTransport":
        from httpx_p2pcache.transport import P2PCacheTransport

        return P2PCacheTransport
    if name == "get_stats":
        from httpx_p2pcache.runner import get_stats

        return get_stats
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

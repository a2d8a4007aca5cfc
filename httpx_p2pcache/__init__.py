"""HTTP caching that a fleet of machines shares without a server: ``httpx.Client(transport=P2PCacheTransport())``."""

from httpx_p2pcache.exceptions import ConfigurationError, P2PCacheError, SettingsError
from httpx_p2pcache.runner import get_stats
from httpx_p2pcache.settings import Settings
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

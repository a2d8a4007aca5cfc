"""Never run: mypy --strict checks here that the public API is typed as it is documented."""

from __future__ import annotations

from pathlib import Path

import httpx

from httpx_p2pcache import ConfigurationError, P2PCacheError, P2PCacheTransport, Settings, SettingsError, get_stats
from httpx_p2pcache.testing import Origin, Resource, from_har, github_etag, made_up

client = httpx.Client(transport=P2PCacheTransport())
async_client = httpx.AsyncClient(transport=P2PCacheTransport(httpx.AsyncHTTPTransport()))
mounted = httpx.Client(mounts={"https://api.github.com": P2PCacheTransport(httpx.HTTPTransport(http2=True))})

settings: Settings = Settings(dir=Path("cache"), enable_p2p=False)
also: Settings = Settings.from_env({"CACHE_LISTEN_PORT": "9000"}, dir=Path("cache"))
transport = P2PCacheTransport(settings=settings)
stats: dict[str, object] = transport.stats()
everything: dict[str, object] = get_stats()
joined: bool = transport.wait_until_joined(timeout=5.0)

errors: tuple[type[P2PCacheError], ...] = (SettingsError, ConfigurationError)
resources: dict[str, Resource] = {**made_up(3), **from_har(Path("recorded.har"), 10)}
etag: str = github_etag(b"{}", {"Accept": "*/*"})
with Origin(resources, latency=0.08) as origin:
    url: str = origin.url

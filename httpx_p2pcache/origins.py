"""The transports that reach the origin where the caller has given none."""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
from concurrent.futures import Future
from importlib import import_module
from types import ModuleType
from typing import Any

from httpx_p2pcache.imports import import_trio, importing


class Origins:
    """The library's own transports, made when first needed: direct, and one per proxy of the environment.

    A client of httpx, or httpx2, that is given a transport does not look at ``HTTP_PROXY`` and its kin; so we do.
    Loading the SSL context takes 130 ms in which no other thread of the process runs, the node's included: with
    ``at_once`` it begins now, else with the first request that needs it, which where peers are there may never come.
    """

    def __init__(self, library: ModuleType, *, at_once: bool) -> None:
        self._library: Any = library
        # Not public, and pinned with the library: nothing else knows what NO_PROXY means to it.
        self._utils: Any = import_module(f"{library.__name__}._utils")
        self._begin(at_once=at_once)

    def _begin_anew_after_fork(self) -> None:
        # The thread that loads does not come along, a lock may be held by one that did not, connections are not ours.
        if self._pid != os.getpid():
            self._begin()

    def _begin(self, *, at_once: bool = True) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._sync: dict[str | None, Any] = {}
        self._async: dict[str | None, Any] = {}
        # Looked up once, as the library's clients do: to ask each time takes longer than all else here.
        proxies = self._utils.get_environment_proxies()
        self._proxies: list[tuple[Any, str | None]] = sorted(
            (self._utils.URLPattern(key), proxy) for key, proxy in proxies.items()
        )
        self._prepare_to_load()
        if at_once:
            self._loader.start()

    def _prepare_to_load(self) -> None:
        self._context: Future[ssl.SSLContext] = Future()
        self._loader = threading.Thread(target=self._load, name="p2pcache-ssl", daemon=True)

    def _loaded(self) -> ssl.SSLContext:
        if self._loader.ident is None:
            self._loader.start()
        try:
            return self._context.result()
        except Exception:
            self._prepare_to_load()  # the next request tries again
            raise

    def _load(self) -> None:
        try:
            # It would be imported with the first transport, in the middle of a first request; and trio with it.
            with importing():
                with contextlib.suppress(ImportError):
                    import_trio()
                import_module(self._library.__name__.replace("httpx", "httpcore"))

            self._context.set_result(self._library.create_ssl_context())
        except Exception as exc:  # a bad SSL_CERT_FILE: raised at the first request, as httpx would
            self._context.set_exception(exc)

    def sync_for(self, url: Any) -> Any:
        proxy = self._proxy_for(url)
        self._begin_anew_after_fork()
        with self._lock:
            if proxy not in self._sync:
                self._sync[proxy] = self._library.HTTPTransport(verify=self._loaded(), proxy=proxy)
            return self._sync[proxy]

    def async_for(self, url: Any) -> Any:
        proxy = self._proxy_for(url)
        self._begin_anew_after_fork()
        with self._lock:
            if proxy not in self._async:
                self._async[proxy] = self._library.AsyncHTTPTransport(verify=self._loaded(), proxy=proxy)
            return self._async[proxy]

    def close(self) -> None:
        for transport in self._sync.values():
            transport.close()

    async def aclose(self) -> None:
        for transport in self._async.values():
            await transport.aclose()

    def _proxy_for(self, url: Any) -> str | None:
        """The proxy that the library would take from the environment; None: none."""
        return next((proxy for pattern, proxy in self._proxies if pattern.matches(url)), None)

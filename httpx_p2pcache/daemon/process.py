"""The daemon's own process: its node, the socket for processes, the door, and when it ends."""

from __future__ import annotations

import logging
import secrets
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import anyio
import anyio.to_thread
import hypercorn.trio
import msgspec
from hypercorn.config import Config

from httpx_p2pcache import runner
from httpx_p2pcache.daemon.control import Control
from httpx_p2pcache.daemon.door import App, Door
from httpx_p2pcache.daemon.life import Lock
from httpx_p2pcache.node.daemon.server import Server
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.sockets import door_socket, listen, node_socket
from httpx_p2pcache.transport import P2PCacheTransport

logger = logging.getLogger("httpx_p2pcache")


def run(settings: Settings, *, idle: float, port: int | None, ready: Callable[[str], None]) -> None:
    """Be the daemon of ``settings.dir`` until told to stop, or unused for ``idle`` seconds (0: however long).

    ``port`` opens the door on loopback as well (0: any port). ``ready`` is called with the door's socket once it
    listens. Raises :class:`~httpx_p2pcache.daemon.life.AlreadyRunning`, and OSError where it cannot listen.
    """
    with Lock(settings.dir):
        anyio.run(_Daemon(settings, idle, port, ready).run, backend="trio")


class _Daemon:
    def __init__(self, settings: Settings, idle: float, port: int | None, ready: Callable[[str], None]) -> None:
        self._settings = msgspec.structs.replace(settings, node="none" if settings.node == "none" else "embedded")
        self._idle, self._port, self._ready = idle, port, ready
        self._token = secrets.token_urlsafe(18)
        self._urls: dict[int, str] = {}
        self._since = self._used_at = time.time()
        self._stopping: anyio.Event

    async def run(self) -> None:
        self._stopping = anyio.Event()
        loopback = None if self._port is None else socket.create_server(("127.0.0.1", self._port))
        door_path, node_path = door_socket(self._settings.dir), node_socket(self._settings.dir)
        exchange = runner.acquire(self._settings)
        exchange.store.behind = False  # what it has found, its processes read from the file
        transport = P2PCacheTransport(settings=self._settings)
        label, largest = exchange.keyring.label, self._settings.max_body_size
        self._server = Server(exchange.network, exchange.store, exchange.quotas, label, largest)
        self._control = Control(exchange, self._describe, self._open_port, self._stop)
        self._door = partial(Door, transport, self._control.app, used=self._note_use)
        listening = [listen(node_path), listen(door_path)]
        try:
            async with anyio.create_task_group() as self._tasks:
                self._tasks.start_soon(self._stop_by_signal)
                self._tasks.start_soon(self._stop_when_idle)
                self._tasks.start_soon(self._server.serve, listening[0])
                await self._serve(self._door(token=None), listening[1])
                if loopback is not None:
                    await self._open_door(loopback)
                self._ready(str(door_path))
                await self._stopping.wait()
                self._tasks.cancel_scope.cancel()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending: what it has published is handed over first
            for path, listener in zip((node_path, door_path), listening, strict=True):
                path.unlink(missing_ok=True)
                listener.close()
            with anyio.CancelScope(shield=True):
                await transport.aclose()
                await anyio.to_thread.run_sync(runner.release, exchange)

    async def _serve(self, app: App, listener: socket.socket) -> None:
        config = Config()
        config.bind = [f"fd://{listener.detach()}"]  # it is hypercorn's from here on
        config.include_server_header = config.include_date_header = False
        config.accesslog, config.errorlog = None, logging.getLogger("httpx_p2pcache.door")
        config.keep_alive_timeout = 60.0
        config.graceful_timeout = 0.5
        serve = partial(
            hypercorn.trio.serve, cast("Any", app), config, shutdown_trigger=self._stopping.wait, mode="asgi"
        )
        await self._tasks.start(serve)

    async def _open_port(self, port: int) -> str:
        """The door on loopback, behind a token in the path; opened once."""
        if not self._urls or (port and port not in self._urls):
            await self._open_door(socket.create_server(("127.0.0.1", port)))
        return self._urls[port] if port else next(iter(self._urls.values()))

    async def _open_door(self, listener: socket.socket) -> None:
        bound = listener.getsockname()[1]
        await self._serve(self._door(token=self._token), listener)
        self._urls[bound] = f"http://127.0.0.1:{bound}/{self._token}"

    def _describe(self) -> dict[str, Any]:
        return {
            "since": self._since,
            "door": str(door_socket(self._settings.dir)),
            "urls": list(self._urls.values()),
            "processes": self._server.attached,
            "idle_seconds": round(time.time() - self._used_at, 1),
            "ends_after_idle_seconds": self._idle,
        }

    async def _stop(self) -> None:
        self._stopping.set()

    def _note_use(self) -> None:
        self._used_at = time.time()

    async def _stop_when_idle(self) -> None:
        while self._idle:
            if self._server.attached:
                self._note_use()
            left = self._idle - (time.time() - self._used_at)
            if left <= 0:
                logger.info("unused for %.0f s: the daemon ends", self._idle)
                self._stopping.set()
                return
            await anyio.sleep(min(left, 1.0))

    async def _stop_by_signal(self) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for _ in received:
                self._stopping.set()
                return

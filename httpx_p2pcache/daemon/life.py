"""Starting, finding and stopping a runner's daemon: one per ``CACHE_DIR``, by a lock that it holds as long as it lives.

Whoever holds the lock may replace the sockets that a dead one has left. The lock file names the process.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.files import local_secret, private_directory
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.sockets import door_socket, ours

CONTROL = "p2pcache"  # the host, on the door's socket, that is the daemon itself
IDLE_SECONDS = 1800.0  # after which a daemon that nobody uses ends
START_SECONDS = 30.0  # for a daemon to listen: it imports what it needs first
STOP_SECONDS = 5.0
LOCK_SECONDS = 0.2
REMOTE_SECONDS = 5.0  # for a daemon to answer a command
LOG = "daemon.log"
FOREIGN = "another secret or fleet: p2pcache stop, then p2pcache init"
_LOCK = "daemon.lock"


class AlreadyRunning(Exception):
    """Another daemon has this ``CACHE_DIR``."""


class Lock:
    """The daemon's lock, held until the process ends. Raises :class:`AlreadyRunning`."""

    def __init__(self, directory: Path) -> None:
        private_directory(directory)
        self._file = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as exc:
                if time.monotonic() > until:
                    os.close(self._file)
                    raise AlreadyRunning from exc
                time.sleep(0.01)  # somebody may only be looking who holds it
        os.ftruncate(self._file, 0)
        os.write(self._file, str(os.getpid()).encode())

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


class Remote:
    """The running daemon of a directory, as commands see it: its control over the socket.

    By the standard library alone: a command that only asks for a status should not have to import an HTTP client.
    """

    def __init__(self, directory: Path) -> None:
        self._path = os.fspath(door_socket(directory))

    def get(self, path: str) -> Any:
        """A control's answer; None if no daemon answers."""
        status, body = self._request("GET", path)
        return msgspec.json.decode(body) if status == 200 else None

    def post(self, path: str) -> tuple[int, Any]:
        """The status and the answer to an order; 0 and None if no daemon answers."""
        status, body = self._request("POST", path)
        return status, msgspec.json.decode(body) if body else None

    def _request(self, method: str, path: str) -> tuple[int, bytes]:
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, path, headers={"Host": CONTROL})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__(CONTROL, timeout=REMOTE_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
        if not ours(self.sock):
            self.sock.close()
            raise OSError("somebody else listens at the daemon's socket")


def launch(
    settings: Settings, *, idle: float, port: int | None, wait: float, replace: bool = False
) -> tuple[dict[str, Any], bool]:
    """Have a daemon running, and joined within ``wait`` seconds: its status, and whether it was started by this.

    ``replace``: one that is there for another fleet is ended first.

    Raises RuntimeError, with what it said last, if it does not come up, is there for another fleet, or cannot open
    ``port``.
    """
    remote = Remote(settings.dir)
    status = remote.get("/status")
    if status is not None and replace and not is_for(settings, status):
        stop(settings.dir)
        status = None
    process = None if status is not None else _spawn(settings, idle, port)
    until = time.monotonic() + START_SECONDS
    while status is None:
        # One that finds the lock taken ends; then another is coming up, and will do.
        ended = process is not None and process.poll() is not None and _holder(settings.dir) is None
        if ended or time.monotonic() > until:
            raise RuntimeError(f"the daemon did not start: {_last_words(settings.dir)}")
        time.sleep(0.02)
        status = remote.get("/status")
    if not is_for(settings, status):
        fleets = f"the fleet {status.get('fleet')!r}, and this is {settings.fleet!r}"
        raise RuntimeError(f"the daemon that runs in {settings.dir} is for {fleets}: {FOREIGN}")
    until = time.monotonic() + wait
    while not status["joined"] and status["p2p_enabled"] and time.monotonic() < until:
        time.sleep(0.05)
        status = remote.get("/status") or status
    if port is not None:
        opened, said = remote.post(f"/open?port={port}")
        if opened == 409:
            raise RuntimeError(said["message"])
        status = remote.get("/status") or status
    if process is not None:
        process.returncode = 0  # it outlives us: nobody is to wait for it
    return status, process is not None and status["pid"] == process.pid


def is_for(settings: Settings, status: dict[str, Any]) -> bool:
    """Whether the daemon of that status is a member of the fleet that ``settings`` name."""
    secret = settings.shared_secret.encode() or local_secret(settings.dir)
    return bool(status.get("label") == Keyring.of(settings, secret).label)


def stop(directory: Path) -> bool:
    """End the daemon of a directory; false if there was none. Raises TimeoutError if it does not end."""
    held = _holder(directory)
    if held is None:
        return False
    told = Remote(directory).post("/stop")[0] == 200
    began = time.monotonic()
    while _holder(directory) is not None:
        if not told and time.monotonic() > began + STOP_SECONDS / 5:
            _signal(held, signal.SIGTERM)
            told = True
        if time.monotonic() > began + STOP_SECONDS:
            raise TimeoutError(f"the daemon (process {held}) does not end")
        time.sleep(0.02)
    return True


def _spawn(settings: Settings, idle: float, port: int | None) -> subprocess.Popen[bytes]:
    private_directory(settings.dir)
    command = [sys.executable, "-m", "httpx_p2pcache.cli", "node", "--idle", str(idle)]
    command += [] if port is None else ["--port", str(port)]
    descriptor = os.open(settings.dir / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as log:
        # In a session of its own it outlives the step. RUNNER_TRACKING_ID stays: it is not to outlive the job.
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _last_words(directory: Path) -> str:
    try:
        lines = (directory / LOG).read_text("utf-8", "replace").strip().splitlines()
    except OSError as exc:
        return str(exc)
    return lines[-1] if lines else f"it said nothing in {directory / LOG}"


def _holder(directory: Path) -> int | None:
    """The process that holds the daemon's lock; None if nobody does."""
    try:
        descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.read(descriptor, 20)
        return int(text) if text.isdigit() else 0
    finally:
        os.close(descriptor)
    return None


def _signal(process: int, number: int) -> None:
    try:
        if process:
            os.kill(process, number)
    except OSError:
        pass

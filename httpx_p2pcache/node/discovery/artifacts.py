"""Runners of one workflow run, or of one repository, by the names of GitHub's artifacts.

A step of the workflow uploads an artifact, whatever is in it, whose name carries a node's sealed addresses; nodes only
read the list, which is a free 304 while nothing has changed.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
import socket
import time
from collections.abc import Mapping

import msgspec

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exceptions import UNDECODABLE, Rejected
from httpx_p2pcache.multiaddrs import is_loopback
from httpx_p2pcache.node.discovery import Record, Sighting
from httpx_p2pcache.settings import Settings

logger = logging.getLogger("httpx_p2pcache")

PLACE = b"artifact"
ASK_SECONDS = 5.0
NAMED = 4  # addresses: a name has an end
REFUSED_SECONDS = 300.0  # for which nobody is asked who has refused


class _Artifact(msgspec.Struct):
    name: str
    expired: bool = False


class _Listed(msgspec.Struct):
    artifacts: list[_Artifact]


_LISTED = msgspec.json.Decoder(_Listed)


def artifact_name(keyring: Keyring, peer_id: bytes, addresses: list[str]) -> str:
    """The name that leads others to a node: letters, digits, ``-`` and ``_``."""
    outward = [a for a in addresses if not is_loopback(a)] or addresses
    record = Record(peer_id, outward[:NAMED], socket.gethostname(), time.time())
    sealed = base64.urlsafe_b64encode(record.seal(keyring, PLACE)).decode().rstrip("=")
    return f"p2pcache-{keyring.label}-{sealed}"


class Artifacts:
    """Reads the list of a run, or of a repository: of what ``path`` leads to at ``api``."""

    pause = 10.0

    def __init__(self, keyring: Keyring, api: str, path: str, token: str, ttl: float) -> None:
        self._keyring, self._url, self._token, self._ttl = keyring, f"{api.rstrip('/')}{path}", token, ttl
        self._etag = ""
        self._found: list[Sighting] = []
        self._until = 0.0

    @classmethod
    def of(cls, settings: Settings, keyring: Keyring, environ: Mapping[str, str]) -> Artifacts | None:
        """As the job's environment says; None where there is no run of a workflow, or it is not wanted."""
        repository, run = environ.get("GITHUB_REPOSITORY", ""), environ.get("GITHUB_RUN_ID", "")
        token = environ.get("GITHUB_TOKEN") or environ.get("GH_TOKEN") or ""
        api = environ.get("GITHUB_API_URL") or "https://api.github.com"
        if settings.artifacts == "none" or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or not token:
            return None
        if settings.artifacts == "run" and not run.isdecimal():
            return None
        within = f"/actions/runs/{run}" if settings.artifacts == "run" else "/actions"
        return cls(keyring, api, f"/repos/{repository}{within}/artifacts", token, settings.peer_ttl)

    def announce(self, peer_id: bytes, addresses: list[str]) -> None: ...

    def find(self) -> list[Sighting]:
        if time.monotonic() < self._until:
            return self._found
        fields = {
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {self._token}",
            "X-GitHub-Api-Version": "2022-11-28",
        }
        if self._etag:
            fields["If-None-Match"] = self._etag
        import httpx  # not where nobody is asked

        try:
            response = httpx.get(self._url, params={"per_page": 100}, headers=fields, timeout=ASK_SECONDS)
        except httpx.HTTPError as exc:
            raise OSError(f"GitHub's list of artifacts: {type(exc).__name__}") from None
        if response.status_code == 304:
            return self._found
        if response.status_code != 200:
            self._until = time.monotonic() + REFUSED_SECONDS
            hint = ": does the job have the permission `actions: read`?" if response.status_code in (403, 404) else ""
            raise OSError(f"GitHub's list of artifacts answers {response.status_code}{hint}")
        self._etag = response.headers.get("etag", "")
        try:
            names = [one.name for one in _LISTED.decode(response.content).artifacts if not one.expired]
        except UNDECODABLE:
            raise OSError("GitHub's list of artifacts is not one") from None
        self._found = [found for name in names if (found := self._read(name)) is not None]
        return self._found

    def _read(self, name: str) -> Sighting | None:
        for keyring in self._keyring.every:
            prefix = f"p2pcache-{keyring.label}-"
            if not name.startswith(prefix):
                continue
            try:
                coded = name.removeprefix(prefix)
                record = Record.open(base64.urlsafe_b64decode(coded + "=" * (-len(coded) % 4)), keyring, PLACE)
            except (Rejected, binascii.Error, ValueError):
                return None
            if abs(time.time() - record.written) <= self._ttl:
                return record.sighting(socket.gethostname(), "artifact")
        return None

    def withdraw(self) -> None: ...

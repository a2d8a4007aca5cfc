"""The origin of a simulated fleet."""

from __future__ import annotations

from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING

import hishel
import trio
from hishel import Headers

from httpx_p2pcache.answers import Reply
from httpx_p2pcache.testing.origin import github_etag
from httpx_p2pcache.testing.simulation.clock import EPOCH

if TYPE_CHECKING:
    from httpx_p2pcache.testing.simulation.node import SimulatedNode

HOST = "api.github.com"


@dataclass
class Fetch:
    """A request that reached the origin."""

    at: float  # simulated seconds since the beginning
    method: str
    path: str
    token: str
    status: int
    node: int
    version: int


@dataclass
class Resource:
    """What the origin has at a path: the body of version n is ``<path> <n>``."""

    max_age: int = 30
    storable: bool = True
    versions: list[float] = field(default_factory=lambda: [0.0])  # since when each is current
    hidden_from: set[str] = field(default_factory=set)  # tokens that get a 404


class SimulatedOrigin:
    """Answers as GitHub does: tags bound to the token, ``private``, a free 304."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.resources: dict[str, Resource] = {}
        self.log: list[Fetch] = []
        self.failing_for: set[int] = set()

    def resource(self, path: str) -> Resource:
        return self.resources.setdefault(path, Resource())

    def fetched(self, path: str) -> list[Fetch]:
        """The GETs of a path that have reached the origin."""
        return [one for one in self.log if one.path == path and one.method == "GET"]

    def version(self, path: str) -> int:
        return len(self.resource(path).versions) - 1

    async def answer(self, node: SimulatedNode, request: hishel.Request, added: dict[str, str]) -> Reply:
        path = request.url.partition(HOST)[2]
        resource, token = self.resource(path), request.headers.get("authorization", "")
        await trio.sleep(self.latency / 2)
        await node.thaw()
        status, body, version = 200, b"", self.version(path)
        if node.number in self.failing_for:
            status = 503
        elif token in resource.hidden_from:
            status = 404
        elif request.method != "GET":
            resource.versions.append(trio.current_time())
        else:
            body = f"{path} {version}".encode()
        fields = {"date": formatdate(EPOCH + trio.current_time(), usegmt=True), "cache-control": "no-store"}
        if request.method == "GET" and status == 200:
            tag = github_etag(body, {"accept": "*/*", "authorization": token})
            fields["vary"] = "Accept, Authorization"
            fields["etag"] = f'"{tag}"'
            if resource.storable:
                fields["cache-control"] = f"private, max-age={resource.max_age}"
            if fields["etag"] in added.get("if-none-match", ""):
                status, body = 304, b""
        self.log.append(Fetch(trio.current_time(), request.method, path, token, status, node.number, version))
        await trio.sleep(self.latency / 2)
        await node.thaw()
        return Reply(status, Headers(fields), body)

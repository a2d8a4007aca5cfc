"""``p2pcache get``: a GET through the cache, for scripts."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any, List, Optional  # noqa: UP035 - Typer reads them on Python 3.10 as well
from urllib.parse import urlsplit

import msgspec
import typer

from httpx_p2pcache.cli.show import fail, settings_or_exit
from httpx_p2pcache.entries import is_credential, same_origin
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.sockets import node_socket

if TYPE_CHECKING:
    import httpx

app = typer.Typer()

MAX_PAGES = 1000
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.1
_OF_THE_CODING = ("content-encoding", "content-length", "transfer-encoding")  # the body is printed without it
_VALUE = re.compile(r"[\t\x20-\x7e]*")


@app.command()
def get(
    url: Annotated[str, typer.Argument(help="A URL, or a path at the first host of CACHE_GITHUB_HOSTS.")],
    header: Annotated[
        Optional[List[str]],  # noqa: UP006, UP045 - Typer reads it on Python 3.10 as well
        typer.Option("--header", "-H", metavar="'NAME: VALUE'", help="A field to send; may be repeated."),
    ] = None,
    include: Annotated[bool, typer.Option("--include", "-i", help="Print the status and the fields first.")] = False,
    paginate: Annotated[bool, typer.Option("--paginate", help="Follow rel=next; lists become one list.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Have it validated at the origin.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds to wait for the origin.")] = 60,
) -> None:
    """Print what a URL answers, from the cache where that is fresh: a cached `gh api`, or `curl`.

    GH_TOKEN or GITHUB_TOKEN is sent to the hosts in CACHE_GITHUB_HOSTS. Uses this runner's daemon if it runs, else its
    store alone. Exit status 0; 1: the origin answered with an error (400 and above); 2: it could not be asked.
    """
    import httpx  # this and the next take longer than all that other commands do

    from httpx_p2pcache.transport import P2PCacheTransport

    settings = settings_or_exit()
    origins = settings.origins()
    if url.startswith("/") and origins:
        host, scheme = next(iter(origins.items()))
        url = f"{scheme}://{host}{url}"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https")
    except ValueError:
        known = False
    if not known:
        fail("a URL begins with http:// or https://, and a path with /", 2)
    fields = _fields(url, header or [], settings, fresh)
    if not node_socket(settings.dir).exists():  # a node of our own would start for longer than the call takes
        settings = msgspec.structs.replace(settings, enable_p2p=False)
    try:
        transport = P2PCacheTransport(settings=settings)
        with httpx.Client(transport=transport, headers=fields, timeout=timeout, follow_redirects=True) as client:
            failed = _print(client, url, include, paginate)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        fail(f"{parts.netloc.rpartition('@')[2]}{parts.path}: {type(exc).__name__}: {exc}", 2)
    except BrokenPipeError:
        raise
    except OSError as exc:
        fail(f"the answer could not be written: {exc}", 2)
    raise typer.Exit(1 if failed else 0)


def _fields(url: str, header: list[str], settings: Settings, fresh: bool) -> list[tuple[str, str]]:
    fields = []
    for line in header:
        name, colon, value = line.partition(":")
        if not colon or not _NAME.fullmatch(name.strip()) or not _VALUE.fullmatch(value.strip()):
            fail("a header is written as 'Name: value', in ASCII", 2)
        fields.append((name.strip(), value.strip()))
    given = {name.lower() for name, _ in fields}
    parts = urlsplit(url)
    if settings.origins().get(parts.netloc.lower()) == parts.scheme:
        token = os.environ.get("GH_TOKEN") or os.environ.get("GITHUB_TOKEN")
        if token and "authorization" not in given:
            fields.append(("Authorization", f"Bearer {token}"))
        if "accept" not in given:
            fields.append(("Accept", "application/vnd.github+json"))
    if fresh:
        fields.append(("Cache-Control", "no-cache"))
    return fields


def _print(client: httpx.Client, url: str, include: bool, paginate: bool) -> bool:
    """Print the answer, or all pages; whether one was an error."""
    bodies: list[bytes] = []
    failed, first = False, url
    for _ in range(MAX_PAGES):
        if not same_origin(url, first):  # a token is for the host that was asked
            for name in [name for name in client.headers if is_credential(name)]:
                del client.headers[name]
        response = client.get(url)
        failed = failed or response.status_code >= 400
        if include:
            print(f"{response.http_version} {response.status_code} {response.reason_phrase}")
            for name, value in response.headers.multi_items():
                if name.lower() not in _OF_THE_CODING:
                    print(f"{name}: {value}")
            print(flush=True)
        bodies.append(response.content)
        following = response.links.get("next", {}).get("url")
        if not paginate or not following or failed:
            break
        url = str(response.url.join(following))
    sys.stdout.flush()
    sys.stdout.buffer.write(_joined(bodies))
    sys.stdout.buffer.flush()
    return failed


def _joined(bodies: list[bytes]) -> bytes:
    """One body; of pages that are all lists, one list."""
    if len(bodies) == 1:
        return bodies[0]
    try:
        pages: list[Any] = [msgspec.json.decode(body) for body in bodies]
    except msgspec.DecodeError:
        return b"".join(bodies)
    if all(isinstance(page, list) for page in pages):
        return msgspec.json.encode([item for page in pages for item in page])
    return b"\n".join(bodies)

"""The alternatives, each ready to be measured: context managers that start one in front of an origin.

``with nginx(origin.url) as rival:`` gives a :class:`Rival`, or a :class:`Skipped` with the reason. A rival is a URL to
ask in place of the origin's (itself for those that live in the client) and the kind of client to ask with; its server,
if it has one, listens on a free loopback port, keeps all in a temporary directory, and is gone after the block.
Only the standard library is imported here: a runner that calls :func:`client` imports what its kind needs.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

START_SECONDS = 15.0
STOP_SECONDS = 5.0
Kind = Literal["httpx", "hishel-sqlite", "hishel-redis", "requests-cache-sqlite", "cachecontrol-file"]


@dataclass(frozen=True)
class Rival:
    """``url`` replaces the origin's; ``kind`` and ``where`` say how a runner makes its client."""

    name: str
    version: str
    url: str
    kind: Kind = "httpx"
    where: str = ""  # a directory, with one per runner below it; or a redis:// URL


@dataclass(frozen=True)
class Skipped:
    name: str
    reason: str


Found = Rival | Skipped


# Servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find(*names: str) -> str | None:
    """The binary, also where Debian keeps daemons and a user's PATH does not look."""
    return next(
        (p for n in names if (p := shutil.which(n, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"))), None
    )


def version_of(*command: str) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return (said.stdout + said.stderr).strip().splitlines()[0]


@contextmanager
def directory(owner: str | None = None) -> Iterator[Path]:
    """A temporary one. When we are root, ``owner`` (a daemon's user, if there is one) gets it."""
    with tempfile.TemporaryDirectory(prefix="rival-", dir="/tmp") as name:
        os.chmod(name, 0o700)
        if owner and os.geteuid() == 0:
            entry = pwd.getpwnam(owner)
            os.chown(name, entry.pw_uid, entry.pw_gid)
        yield Path(name)


@contextmanager
def serving(command: list[str], port: int, log: Path, ready: Callable[[], bool] = lambda: True) -> Iterator[int]:
    """Run ``command`` until the block ends; it has to be ``ready`` first. Raises RuntimeError."""
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=log.parent, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{command[0]} did not start (exit {process.returncode}): {tail}")
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                if ready():
                    break
            except OSError:
                pass
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        try:  # its own session: this reaches only what it started
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except http.client.HTTPException as exc:
        raise OSError(str(exc)) from exc
    finally:
        connection.close()


def _netloc(url: str) -> str:
    return urlsplit(url).netloc


NGINX = """
daemon off;
worker_processes auto;
{user}
pid {dir}/nginx.pid;
error_log stderr warn;
worker_rlimit_nofile 4096;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    keepalive_requests 100000;
    tcp_nodelay on;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host {origin};
    proxy_cache_path {dir}/cache levels=1:2 keys_zone=answers:16m max_size=512m inactive=1h use_temp_path=off;
    # what must not be stored even though Cache-Control is not obeyed
    map $upstream_http_cache_control $forbidden {{ default 0; "~*no-store" 1; "~*no-cache" 1; }}
    upstream origin {{ server {origin}; keepalive 64; }}
    server {{
        listen 127.0.0.1:{port} backlog=512;
        location / {{
            proxy_pass http://origin;
            proxy_cache answers;
            # The token is a part of the key: no answer is shared among tokens, whatever the origin's Vary says.
            proxy_cache_key "$request_method $request_uri $http_authorization";
            proxy_cache_methods GET HEAD;
            proxy_cache_lock on;
            proxy_cache_lock_timeout 30s;
            proxy_cache_lock_age 30s;
            proxy_cache_revalidate on;
            proxy_cache_use_stale updating error timeout;
            # "private" would keep nginx from storing. Vary is left to nginx (secondary key), Set-Cookie still forbids.
            proxy_ignore_headers Cache-Control Expires X-Accel-Expires;
            proxy_cache_valid 200 60s;
            proxy_no_cache $forbidden;
            add_header X-Cache $upstream_cache_status always;
        }}
    }}
}}
"""


@contextmanager
def nginx(origin: str) -> Iterator[Found]:
    """A caching reverse proxy with ``proxy_cache_lock``.

    It stores what is private only if Cache-Control is not obeyed: every 200 lives for 60 s, as GitHub's do.
    """
    binary = find("nginx")
    if binary is None:
        yield Skipped("nginx", "no nginx (Debian: nginx-light)")
        return
    with directory() as scratch:
        port = free_port()
        user = "user root;" if os.geteuid() == 0 else ""
        (scratch / "nginx.conf").write_text(NGINX.format(dir=scratch, port=port, origin=_netloc(origin), user=user))
        command = [binary, "-p", str(scratch), "-c", str(scratch / "nginx.conf"), "-e", "stderr"]
        with serving(command, port, scratch / "log"):
            yield Rival("nginx", version_of(binary, "-v").split("/")[-1], f"http://127.0.0.1:{port}")


SQUID = """
http_port 127.0.0.1:{port} accel defaultsite={origin} no-vhost name=front
{hop}
acl probe urlpath_regex ^/rival-probe$
http_access deny probe back
http_access allow all
never_direct allow all
collapsed_forwarding on
cache_mem 256 MB
maximum_object_size_in_memory 16 MB
memory_cache_shared off
refresh_pattern . 0 20% 4320
forwarded_for delete
via off
visible_hostname rival
{user}
pid_filename none
netdb_filename none
pinger_enable off
access_log none
cache_log {dir}/cache.log
cache_store_log none
coredump_dir {dir}
shutdown_lifetime 0 seconds
"""
# login=PASSTHRU: without it a reverse proxy keeps Authorization to itself.
PEER = (
    "cache_peer 127.0.0.1 parent {origin_port} 0 no-query no-digest originserver"
    " name=origin login=PASSTHRU forceddomain={netloc}"
)
# Two things in the way (Squid 5.7):
# - What is "private" is revalidated at every hit, ignore-private or not. So Squid asks itself, at a second port that
#   stores nothing, where the field is replaced on the way out: private, whatever its max-age, becomes 60 s for all.
# - With collapsed_forwarding the variants of a URL evict each other. So Vary is taken away there, too, and a helper
#   puts the token and what else an answer varies by into the key of the store.
HOP = """
http_port 127.0.0.1:{second} accel defaultsite=hop.invalid no-vhost name=back
cache_peer 127.0.0.1 parent {second} 0 no-query no-digest originserver name=self login=PASSTHRU forceddomain=hop.invalid
acl back myportname back
acl private rep_header Cache-Control -i private
acl never rep_header Cache-Control -i no-store no-cache
cache_peer_access origin allow back
cache_peer_access origin deny all
cache_peer_access self deny back
cache_peer_access self allow all
cache deny back
reply_header_access Cache-Control allow never
reply_header_access Cache-Control deny back private
reply_header_replace Cache-Control public, max-age=60, s-maxage=60
reply_header_access Vary deny back
store_id_program {perl} {dir}/key.pl
store_id_children 1 startup=1 concurrency=512
store_id_extras "%#{{Authorization}}>h|%#{{Accept}}>h|%#{{Accept-Encoding}}>h|%#{{Cookie}}>h"
store_id_access deny back
store_id_access allow all
"""
KEY = r"""$| = 1;
while (<STDIN>) {
    chomp;
    my ($channel, $url, $fields) = split / /, $_, 3;
    $fields =~ s/([^A-Za-z0-9|])/sprintf("%%%02x", ord $1)/ge;
    print "$channel OK store-id=$url#$fields\n";
}
"""


@contextmanager
def squid(origin: str) -> Iterator[Found]:
    """A reverse proxy ("accelerator") in memory, with ``collapsed_forwarding``.

    What is private is said to be public for 60 s before it is stored, under a key that has the token in it.
    """
    binary, perl = find("squid"), find("perl")
    if binary is None or perl is None:
        yield Skipped("Squid", "no squid (Debian: squid), or no perl for the helper that makes its keys")
        return
    with directory("proxy") as scratch:
        port, second = free_port(), free_port()
        peer = PEER.format(origin_port=urlsplit(origin).port, netloc=_netloc(origin))
        (scratch / "squid.conf").write_text(
            SQUID.format(
                dir=scratch,
                port=port,
                origin=_netloc(origin),
                hop=peer + HOP.format(second=second, dir=scratch, perl=perl),
                user="cache_effective_user proxy" if os.geteuid() == 0 else "",
            )
        )
        (scratch / "key.pl").write_text(KEY)
        for file in scratch.iterdir():
            file.chmod(0o644)

        def ready() -> bool:
            """For 0.3 s after it listens it knows of no peer that is up, and says 502."""
            return _status(port, "/rival-probe") == 403  # by its own second port

        with serving([binary, "-N", "-f", str(scratch / "squid.conf")], port, scratch / "log", ready):
            yield Rival("Squid", version_of(binary, "-v").split()[-1], f"http://127.0.0.1:{port}")


VCL = """
vcl 4.1;
backend origin {{ .host = "127.0.0.1"; .port = "{origin_port}"; .host_header = "{origin}"; }}
sub vcl_recv {{
    set req.http.Host = "{origin}";
    # the built-in VCL passes what has Authorization or Cookie
    if (req.method != "GET" && req.method != "HEAD") {{ return (pass); }}
    if (req.http.Cookie) {{ return (pass); }}
    return (hash);
}}
sub vcl_hash {{
    # No answer is shared among tokens. The built-in one adds URL and Host after this.
    hash_data(req.http.Authorization);
}}
sub vcl_backend_response {{
    # the built-in VCL makes "private" uncacheable; beresp.ttl is s-maxage or max-age already
    if (beresp.http.Cache-Control ~ "(?i)no-store|no-cache" || beresp.http.Set-Cookie || beresp.http.Vary == "*"
        || beresp.status != 200 || beresp.ttl <= 0s) {{
        set beresp.uncacheable = true;
        set beresp.ttl = 0s;
        return (deliver);
    }}
    set beresp.grace = 0s;
    set beresp.keep = 1h;  # for If-None-Match
    return (deliver);
}}
sub vcl_deliver {{
    set resp.http.X-Cache = obj.hits;
}}
"""


@contextmanager
def varnish(origin: str) -> Iterator[Found]:
    """In memory, coalescing as it does by nature."""
    binary = find("varnishd")
    if binary is None:
        yield Skipped("Varnish", "no varnishd (Debian: varnish)")
        return
    if not find("gcc", "cc", "c99"):
        yield Skipped("Varnish", "no C compiler, which varnishd compiles its VCL with")
        return
    with directory() as scratch:
        port = free_port()
        (scratch / "rival.vcl").write_text(VCL.format(origin=_netloc(origin), origin_port=urlsplit(origin).port))
        command = [binary, "-F", "-j", "none", "-n", str(scratch / "work"), "-f", str(scratch / "rival.vcl")]
        command += ["-a", f"127.0.0.1:{port}", "-T", "none", "-s", "malloc,256m", "-p", "vsl_space=4M"]
        with serving(command, port, scratch / "log"):
            version = version_of(binary, "-V").split("varnish-")[-1].split()[0]
            yield Rival("Varnish", version, f"http://127.0.0.1:{port}")


# Those that live in the client


def _installed(*packages: str) -> str | None:
    """The first one's version, if all are there."""
    try:
        version, *_ = map(importlib.metadata.version, packages)
        return version
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _in_client(name: str, kind: Kind, origin: str, *packages: str) -> Iterator[Found]:
    version = _installed(*packages)
    if version is None:
        yield Skipped(name, f"not all of {', '.join(packages)} are installed")
        return
    with directory() as scratch:
        yield Rival(name, version, origin, kind, str(scratch))


@contextmanager
def hishel_redis(origin: str) -> Iterator[Found]:
    """hishel's own RedisStorage, one Redis for all runners."""
    name, binary, version = "hishel, one Redis", find("redis-server", "valkey-server"), _installed("hishel", "redis")
    if binary is None or version is None:
        yield Skipped(name, "no redis-server (Debian: redis-server), or hishel[redis] is not installed")
        return
    with directory() as scratch:
        port = free_port()
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(scratch), "--save", ""]
        command += ["--appendonly", "no", "--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru"]
        with serving(command, port, scratch / "log"):
            yield Rival(name, version, origin, "hishel-redis", f"redis://127.0.0.1:{port}")


RIVALS: dict[str, Callable[[str], AbstractContextManager[Found]]] = {
    "no cache": lambda origin: _in_client("no cache", "httpx", origin, "httpx"),
    "hishel": lambda origin: _in_client("hishel, SQLite each", "hishel-sqlite", origin, "hishel"),
    "hishel-redis": hishel_redis,
    "requests-cache": lambda origin: _in_client("requests-cache", "requests-cache-sqlite", origin, "requests-cache"),
    "CacheControl": lambda origin: _in_client("CacheControl", "cachecontrol-file", origin, "CacheControl"),
    "nginx": nginx,
    "Squid": squid,
    "Varnish": varnish,
}

# In a runner

CONNECTIONS = 32


def client(kind: Kind, where: str, number: int, headers: dict[str, str]) -> Any:
    """The client of runner ``number``: its ``get(url)`` gives an object with ``status_code`` and ``content``."""
    store = Path(where) / str(number)
    if where and "://" not in where:
        store.mkdir(parents=True, exist_ok=True)
    return _httpx_client(kind, where, store, headers) if kind in HTTPX else _session(kind, store, headers)


HTTPX = ("httpx", "hishel-sqlite", "hishel-redis")


def _httpx_client(kind: str, where: str, store: Path, headers: dict[str, str]) -> Any:
    import httpx

    transport: Any = httpx.HTTPTransport(limits=httpx.Limits(max_connections=CONNECTIONS))
    if kind != "httpx":
        import hishel
        import hishel.httpx

        storage: Any
        if kind == "hishel-redis":
            import redis

            storage = hishel.RedisStorage(redis.Redis.from_url(where))
        else:
            storage = hishel.SqliteStorage(database_path=store / "hishel.db")
        # shared=True stores nothing private. Tokens are kept apart by the origin's Vary.
        transport = hishel.httpx.CacheTransport(transport, storage, rfc=hishel.CacheOptions(shared=False))
    return httpx.Client(transport=transport, headers=headers, timeout=30.0, trust_env=False)


def _session(kind: str, store: Path, headers: dict[str, str]) -> Any:
    import requests

    session: Any
    if kind == "requests-cache-sqlite":
        import requests_cache
        from requests_cache.policy.settings import AUTH_PARAMS

        # By default Authorization is among ignored_parameters, and what varies by an ignored field never hits.
        session = requests_cache.CachedSession(
            backend=requests_cache.SQLiteCache(str(store / "requests.sqlite"), wal=True),
            cache_control=True,
            ignored_parameters=list(AUTH_PARAMS),
            match_headers=["Accept", "Authorization"],
        )
    else:
        from cachecontrol import CacheControlAdapter
        from cachecontrol.caches import SeparateBodyFileCache

        session = requests.Session()
        session.mount("http://", CacheControlAdapter(SeparateBodyFileCache(str(store)), pool_maxsize=CONNECTIONS))
    session.trust_env = False
    session.headers.update(headers)
    return session

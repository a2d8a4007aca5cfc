"""A py-libp2p host that avoids what py-libp2p 0.8 does wrong; each trap is named where it is avoided."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
import tempfile
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import ifaddr
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from httpx_p2pcache.node.protocol import PROTOCOL_ID

logger = logging.getLogger("httpx_p2pcache")

PORTS_TRIED = 100  # after the one asked for; then any
CLOSE_SECONDS = 1.0

# What py-libp2p logs about connections that end is its everyday life, not its user's.
logging.getLogger("libp2p").setLevel(logging.CRITICAL)
logging.getLogger("libp2p.network.auto_connector").setLevel(logging.CRITICAL)  # it has a level of its own
logging.getLogger("multiaddr").setLevel(logging.CRITICAL)


class Host:
    """One libp2p host: listens, dials, opens streams of our protocol. Lives in one trio loop."""

    def __init__(self, on_stream: Callable[[Any, ID], Any]) -> None:
        key_pair = create_new_key_pair(secrets.token_bytes(32))
        self._host: Any = new_host(
            key_pair=key_pair,
            # Without this plaintext is accepted as well, and a peer ID can be forged.
            sec_opt={NOISE: NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)},
            muxer_opt={TProtocol(YAMUX): Yamux},
            connection_config=ConnectionConfig(min_connections=0, low_watermark=0, enable_health_monitoring=False),
        )
        self._swarm: Any = self._host.get_network()
        self._swarm.retry_config = RetryConfig(max_retries=0)
        self._swarm.auto_connector.maybe_connect = _nothing  # it dials whom it has heard of, beside our own dials
        self._swarm.set_resource_manager(None)  # it leaks a slot per cancelled dial: the limits are ours
        self._locks: dict[ID, trio.Lock] = {}
        self._raw: weakref.WeakSet[Any] = weakref.WeakSet()
        self._wrap_inbound_upgrade()
        self.id: ID = self._host.get_id()

        async def accept(stream: Any) -> None:
            await on_stream(stream, stream.muxed_conn.peer_id)

        self._host.set_stream_handler(TProtocol(PROTOCOL_ID), accept)
        self._guard_streams()

    def _guard_streams(self) -> None:
        # What a stranger writes before a protocol is agreed on can raise anything, through the swarm and our own loop.
        handle = self._swarm.common_stream_handler

        async def guarded(stream: Any) -> None:
            try:
                await handle(stream)
            except Exception as exc:
                logger.debug("a stream has failed: %s", type(exc).__name__)
                await reset(stream)

        self._swarm.set_stream_handler(guarded)

    def _wrap_inbound_upgrade(self) -> None:
        # An inbound connection never gives its slot back (deaf after 250 in all): its handler must outlive it.
        inbound, outbound = self._swarm.upgrade_inbound_raw_conn, self._swarm.upgrade_outbound_raw_conn

        async def upgrade_and_stay(raw: Any, address: Any) -> Any:
            self._raw.add(raw)
            connection = await inbound(raw, address)
            await connection.event_closed.wait()
            raise SwarmException("closed")

        async def upgrade(raw: Any, *arguments: Any) -> Any:
            self._raw.add(raw)
            return await outbound(raw, *arguments)

        self._swarm.upgrade_inbound_raw_conn = upgrade_and_stay
        self._swarm.upgrade_outbound_raw_conn = upgrade

    @contextlib.asynccontextmanager
    async def listening(self, address: str, port: int) -> AsyncIterator[int]:
        """Listen on ``port`` of ``address``, or on the next free one; yields the port. Leaves nothing open."""
        ip = "ip6" if ":" in address else "ip4"
        async with contextlib.AsyncExitStack() as stack:
            async with _port_lock():
                chosen = _free_port(address, port)
                await stack.enter_async_context(self._host.run([Multiaddr(f"/{ip}/{address}/tcp/{chosen}")]))
            try:
                bound = [int(a.value_for_protocol("tcp")) for a in self._host.get_addrs()]
                if not bound:
                    raise OSError(errno.EADDRNOTAVAIL, f"cannot listen on {address} port {chosen}")
                yield bound[0]
            finally:
                await self._close()

    async def _close(self) -> None:
        # Leaving host.run() keeps sockets open, and closing peers one after another takes 0.2 s each.
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
            async with trio.open_nursery() as nursery:
                for peer_id in list(self._swarm.connections):
                    nursery.start_soon(self.disconnect, peer_id)
            await self._host.close()

    async def connect(self, addresses: list[str], peer_id: ID, timeout: float) -> Any:
        """A stream to ``peer_id``, over the connection there is or a new one to the first address that answers.

        Raises OSError if there is none within ``timeout`` seconds.
        """
        lock = self._locks.setdefault(peer_id, trio.Lock())
        try:
            with trio.fail_after(timeout):
                async with lock:  # two dials at once to one peer confuse the swarm
                    if not self._swarm.get_connections(peer_id):
                        await self._dial(addresses, peer_id)
                return await self._host.new_stream(peer_id, [TProtocol(PROTOCOL_ID)])
        except trio.TooSlowError as exc:
            raise OSError(errno.ETIMEDOUT, "the peer did not answer in time") from exc
        except OSError:
            raise
        except Exception as exc:  # py-libp2p raises whatever went wrong at whichever layer
            raise OSError(errno.ECONNABORTED, "the peer could not be reached") from exc

    async def _dial(self, addresses: list[str], peer_id: ID) -> None:
        failure: Exception = OSError("no address")
        for address in addresses:
            try:
                # connect() takes 250 ms, and remembers a failure for 60 s: dial_addr() does neither.
                await self._swarm.dial_addr(Multiaddr(address), peer_id)
            except Exception as exc:
                failure = exc
            else:
                return
        raise OSError("no address answers") from failure

    async def disconnect(self, peer_id: ID) -> None:
        """Close every connection to a peer."""
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
            try:
                await self._swarm.close_peer(peer_id)
            except Exception:  # noqa: S110 - it is being closed: how it fails to be does not matter
                pass

    def forget(self, peer_id: ID) -> None:
        """It is not dialled any more."""
        self._locks.pop(peer_id, None)

    def connected(self) -> list[ID]:
        """Everybody with a connection to us, members or not."""
        return list(self._swarm.connections)

    def sockets(self) -> list[int]:
        """The file descriptors of all our sockets: a forked child has to close them, or peers never see them end."""
        found = [one for many in self._swarm.listeners.values() for one in getattr(many, "listeners", ())]
        found += [getattr(getattr(raw, "stream", None), "stream", None) for raw in self._raw]
        return [one.socket.fileno() for one in found if hasattr(one, "socket") and one.socket.fileno() >= 0]


async def _nothing(*_: object, **__: object) -> None:
    """In the place of what a library does unasked."""


async def reset(stream: Any) -> None:
    """Throw a stream away."""
    with trio.CancelScope(shield=True), trio.move_on_after(0.5):
        try:
            await stream.reset()
        except Exception:  # noqa: S110 - how it fails to be reset does not matter
            pass


def announced(address: str, port: int) -> list[str]:
    """The multiaddrs under which others may reach what listens on ``address``; loopback last."""
    if address not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return [f"/{'ip6' if ':' in address else 'ip4'}/{address}/tcp/{port}"]
    found = [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]
    outward = [ip for ip in found if not ip.startswith(("127.", "169.254."))]
    return [f"/ip4/{ip}/tcp/{port}" for ip in [*outward[:8], "127.0.0.1"]]


def is_loopback(address: str) -> bool:
    """Whether a multiaddr leads to the machine that dials it."""
    return address.startswith(("/ip4/127.", "/ip6/::1/"))


def _free_port(address: str, port: int) -> int:
    """``port`` if nobody listens on it, else the next free one.

    py-libp2p listens with SO_REUSEPORT, so that two hosts of one user share a port without any error: we look first.
    """
    if port == 0:
        return 0
    for candidate in range(port, min(port + PORTS_TRIED, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT is not in the way
            try:
                probe.bind((address, candidate))
                probe.listen(1)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
            else:
                return candidate
    return 0


@contextlib.asynccontextmanager
async def _port_lock() -> AsyncIterator[None]:
    """One process of this user at a time looks for a port and takes it: only those could share one by mistake.

    Who cannot have the lock within a second goes on without: then two that start at once may meet, and nothing else.
    """
    try:
        import fcntl

        path = os.path.join(tempfile.gettempdir(), f"p2pcache-port-{os.getuid()}.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except (ImportError, OSError):
        yield
        return
    try:
        for _ in range(100):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                await trio.sleep(0.01)
        yield
    finally:
        os.close(descriptor)

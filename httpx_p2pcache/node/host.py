"""A py-libp2p host that avoids what py-libp2p 0.8 does wrong; each trap is named where it is avoided."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from pathlib import Path
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

from httpx_p2pcache.multiaddrs import is_loopback, multiaddr
from httpx_p2pcache.node.gate import Gate
from httpx_p2pcache.node.ports import free_port, port_lock
from httpx_p2pcache.node.protocol import PROTOCOL_ID
from httpx_p2pcache.node.seed import kept_seed
from httpx_p2pcache.node.shortcuts import Muxer, Stream, shorten_connection

logger = logging.getLogger("httpx_p2pcache")

CLOSE_SECONDS = 1.0
CONNECT_SECONDS = 1.5  # for one address to accept a connection: a kernel does that, however busy its machine is ...
DIAL_SECONDS = 5.0  # ... and for that, to secure and multiplex it, and to be admitted
STRANGER_LOOK_SECONDS = 0.1  # between two looks whether a stranger has become a member

# What py-libp2p logs about connections that end is its everyday life, not its user's.
logging.getLogger("libp2p").setLevel(logging.CRITICAL)
logging.getLogger("libp2p.network.auto_connector").setLevel(logging.CRITICAL)  # it has a level of its own
logging.getLogger("multiaddr").setLevel(logging.CRITICAL)


class Host:
    """One libp2p host: listens, dials, opens streams of our protocol. Lives in one trio loop.

    ``on_stream`` is given each stream and whose it is; ``is_member`` says who has been admitted, ``is_expected`` who is
    being dialled to become one. With ``directory`` the peer ID is that of the last node that was there, unless that
    still runs.
    """

    def __init__(
        self,
        on_stream: Callable[[Any, ID], Any],
        is_member: Callable[[ID], bool] = lambda _: False,
        directory: Path | None = None,
        *,
        is_expected: Callable[[ID], bool] = lambda _: False,
    ) -> None:
        self._key_lock, seed = kept_seed(directory)
        key_pair = create_new_key_pair(seed)
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
        self._host._schedule_identify = _not_now  # half of what a connection costs, and nobody reads what it tells
        self._swarm.set_resource_manager(None)  # it leaks a slot per cancelled dial: the limits are ours
        self._locks: dict[ID, trio.Lock] = {}
        self._is_member, self._is_expected = is_member, is_expected
        self.visiting: Counter[ID] = Counter()  # strangers that we talk to ourselves
        self._gate = Gate()
        self._raw: weakref.WeakSet[Any] = weakref.WeakSet()
        self._wrap_inbound_upgrade()
        self._wrap_multiplexing()
        self.id: ID = self._host.get_id()

        async def accept(stream: Any) -> None:
            await on_stream(Stream(stream), stream.muxed_conn.peer_id)

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
            ip = str((raw.get_remote_address() or ("",))[0])
            if not self._gate.admits(ip, trio.current_time()):
                await raw.close()
                raise SwarmException("too many strangers")
            self._raw.add(raw)
            shorten_connection(raw)
            connection = None
            try:
                with trio.fail_after(self._gate.patience()):
                    connection = await inbound(raw, address)
                peer_id = connection.peer_id
                if self._gate.refuses(peer_id, trio.current_time()):
                    await self.disconnect(peer_id)
                else:
                    # The gate keeps its place until it has been admitted, or shown out.
                    while not self._is_member(peer_id) and not connection.event_closed.is_set():
                        with trio.move_on_after(STRANGER_LOOK_SECONDS):
                            await connection.event_closed.wait()
            except BaseException:
                with trio.CancelScope(shield=True), trio.move_on_after(0.1):
                    await raw.close()
                raise
            finally:
                welcome = connection is not None and self._is_member(connection.peer_id)
                self._gate.passed(ip, trio.current_time(), welcome=welcome)
            await connection.event_closed.wait()
            raise SwarmException("closed")

        async def upgrade(raw: Any, *arguments: Any) -> Any:
            if (connecting := _connecting.get(None)) is not None:
                connecting.deadline = math.inf
            self._raw.add(raw)
            shorten_connection(raw)
            try:
                return await outbound(raw, *arguments)
            except BaseException:  # of a peer that is another than was dialled the swarm leaves the socket open
                with trio.CancelScope(shield=True), trio.move_on_after(0.1):
                    await raw.close()
                raise

        self._swarm.upgrade_inbound_raw_conn = upgrade_and_stay
        self._swarm.upgrade_outbound_raw_conn = upgrade

    def _wrap_multiplexing(self) -> None:
        # Whichever class it is told to multiplex with by Yamux, it makes its own.
        upgrader = self._swarm.upgrader
        multiplex = upgrader.upgrade_connection

        async def upgrade_connection(secured: Any, peer_id: ID) -> Muxer:
            return Muxer(await multiplex(secured, peer_id))

        upgrader.upgrade_connection = upgrade_connection

    async def refuse(self, peer_id: ID) -> None:
        """It does not hold the secret: it is cut off, and kept away for a while."""
        self._gate.refuse(peer_id, trio.current_time())
        await self.disconnect(peer_id)

    async def who_is_at(self, addresses: list[str], timeout: float) -> ID:
        """The peer ID that whoever is at one of these addresses can prove to have. Raises OSError."""
        try:
            with trio.fail_after(timeout):
                for address in addresses:
                    multiaddr = Multiaddr(address)
                    transport = self._swarm.transport_manager.transport_for_dialing(multiaddr)
                    with trio.fail_after(CONNECT_SECONDS):
                        raw = await transport.dial(multiaddr)
                    try:
                        secured = await self._swarm.upgrader.security_multistream.secure_outbound(raw, None)
                        peer_id: ID = secured.get_remote_peer()
                        return peer_id
                    finally:
                        with trio.CancelScope(shield=True), trio.move_on_after(0.1):
                            await raw.close()
        except trio.TooSlowError as exc:
            raise OSError(errno.ETIMEDOUT, "nobody has answered in time") from exc
        except Exception as exc:  # py-libp2p raises whatever went wrong at whichever layer
            raise OSError(errno.ECONNABORTED, "nobody could be reached") from exc
        raise OSError("no address")

    def seen_at(self, peer_id: ID, announced: list[str]) -> list[str]:
        """Where a peer that has dialled us may be dialled: the address we see it at, with the port it announces."""
        found = []
        for connection in self._swarm.get_connections(peer_id):
            remote = connection.muxed_conn.secured_conn.get_remote_address()
            ports = {port for a in announced if (port := a.partition("/tcp/")[2].partition("/")[0])}
            if remote is not None and not getattr(connection.muxed_conn, "is_initiator", True):
                ip = str(remote[0])
                found += [multiaddr(ip, port) for port in sorted(ports)[:2]]
        return [address for address in found if not is_loopback(address)]

    @contextlib.asynccontextmanager
    async def listening(self, address: str, port: int) -> AsyncIterator[int]:
        """Listen on ``port`` of ``address``, or on the next free one; yields the port. Leaves nothing open."""
        ip = "ip6" if ":" in address else "ip4"
        async with contextlib.AsyncExitStack() as stack:
            async with port_lock():
                chosen = free_port(address, port)
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
        if self._key_lock is not None:
            os.close(self._key_lock)
            self._key_lock = None

    async def connect(self, addresses: list[str], peer_id: ID, timeout: float, protocol: str = PROTOCOL_ID) -> Any:
        """A stream to ``peer_id``, over the connection there is or a new one to the first address that answers.

        Raises OSError if there is none within ``timeout`` seconds.
        """
        lock = self._locks.setdefault(peer_id, trio.Lock())
        try:
            with trio.fail_after(timeout):
                async with lock:  # two dials at once to one peer confuse the swarm
                    if not self._swarm.get_connections(peer_id):
                        await self._dial(addresses, peer_id)
                stream = await self._host.new_stream(peer_id, [TProtocol(protocol)])
                return Stream(stream) if protocol == PROTOCOL_ID else stream
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
                with trio.fail_after(CONNECT_SECONDS) as scope:
                    _connecting.set(scope)
                    await self._swarm.dial_addr(Multiaddr(address), peer_id)
            except Exception as exc:
                failure = exc
            else:
                return
        raise OSError("no address answers") from failure

    @contextlib.asynccontextmanager
    async def visit(self, addresses: list[str], peer_id: ID, protocol: str, timeout: float) -> AsyncIterator[Any]:
        """A stream of another protocol to a stranger, for at most ``timeout`` seconds; then it is left again.

        Raises OSError if it cannot be reached.
        """
        ours = not self._swarm.get_connections(peer_id)
        try:
            self.visiting[peer_id] += 1
            with trio.fail_after(timeout):
                stream = await self.connect(addresses, peer_id, timeout, protocol)
                try:
                    yield stream
                finally:
                    await reset(stream)
        except trio.TooSlowError as exc:
            raise OSError(errno.ETIMEDOUT, "it has not answered in time") from exc
        finally:
            self.visiting[peer_id] -= 1
            if not self.visiting[peer_id]:
                del self.visiting[peer_id]
                # Who is about to become a member, here or there, may be so over the very same connection.
                alone = ours and len(self._swarm.get_connections(peer_id)) == 1
                if alone and not self._is_member(peer_id) and not self._is_expected(peer_id):
                    await self.disconnect(peer_id)

    async def disconnect(self, peer_id: ID) -> None:
        """Close every connection to a peer."""
        muxers = [one.muxed_conn for one in self._swarm.get_connections(peer_id)]
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS) as scope:
            try:
                await self._swarm.close_peer(peer_id)
            except Exception:  # noqa: S110 - it is being closed: how it fails to be does not matter
                pass
        if scope.cancelled_caught:  # it does not read, so cannot be told
            for muxer in muxers:
                await muxer.abandon()

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
        numbers = [one.socket.fileno() for one in found if hasattr(one, "socket") and one.socket.fileno() >= 0]
        return numbers if self._key_lock is None else [*numbers, self._key_lock]


_connecting: ContextVar[trio.CancelScope] = ContextVar("_connecting")  # of the dial that this task makes


async def _nothing(*_: object, **__: object) -> None:
    """In the place of what a library does unasked."""


def _not_now(*_: object, **__: object) -> None:
    """The same, where it is a function."""


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
        return [multiaddr(address, port)]
    found = [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]
    outward = [ip for ip in found if not ip.startswith(("127.", "169.254."))]
    return [multiaddr(ip, port) for ip in [*outward[:8], "127.0.0.1"]]

"""One grammar of addresses: what `verify` accepts is what a node dials."""

from __future__ import annotations

import pytest

from httpx_p2pcache.cli.discovered import is_peer
from httpx_p2pcache.multiaddrs import is_loopback, is_tcp, multiaddr, parse_peer

PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.mark.parametrize(
    "address",
    ["/ip4/10.0.0.1/tcp/9100", "/ip6/::1/tcp/1", "/dns/hub.example/tcp/65535", "/dns4/a/tcp/1", "/dns6/a.b/tcp/1"],
)
def test_an_address_of_a_peer_is_one_with_and_without_its_peer_id(address: str) -> None:
    assert is_tcp(address)
    assert parse_peer(address) == (address, b"")
    named, peer_id = parse_peer(f"{address}/p2p/{PEER}")
    assert (named, len(peer_id)) == (address, 34)


def test_a_dnsaddr_is_one_with_its_peer_id_alone() -> None:
    assert parse_peer(f"/dnsaddr/example.com/p2p/{PEER}")[0] == "/dnsaddr/example.com"
    assert not is_peer("/dnsaddr/example.com")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0.1:9100",
        "/ip4/10.0.0.1",
        "/ip4/999.0.0.1/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip6/::1/tcp/70000",
        "/ip4/10.0.0.1/tcp/0",
        "/ip4/10.0.0.1/udp/9100",
        "/ip4/10.0.0.1/tcp/9100/p2p/",
        "/ip4/10.0.0.1/tcp/9100/p2p/0OIl",
        f"/ip4/10.0.0.1/tcp/9100/p2p/{PEER[:-1]}",
        f"/ip4/10.0.0.1/tcp/9100/p2p/{PEER}/p2p/{PEER}",
        f"/p2p/{PEER}",
        "/dns4/[/tcp/1",
        "/dns4/a/tcp/1/\x1b[2J",
        f"/dnsaddr/\x1b[2J/p2p/{PEER}",
    ],
)
def test_what_is_no_address_of_a_peer_is_none_to_anybody(text: str) -> None:
    assert not is_peer(text)
    with pytest.raises(ValueError, match=r"is not|Invalid"):
        parse_peer(text)


@pytest.mark.parametrize(
    ("ip", "loopback"), [("127.0.0.1", True), ("::1", True), ("10.0.0.1", False), ("fd::1", False)]
)
def test_an_address_is_written_as_it_is_read(ip: str, loopback: bool) -> None:
    assert is_tcp(multiaddr(ip, 9100))
    assert is_loopback(multiaddr(ip, 9100)) == loopback

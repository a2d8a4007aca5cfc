"""Peers in the local network, by multicast DNS (RFC 6762, RFC 6763).

What is announced is a service of a random name whose TXT record carries a sealed :class:`Record`: who does not hold the
secret learns that a cache is there, and nothing else.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from typing import Any

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.node.discovery import Record, Sighting

TYPE = "_httpxp2pcache._tcp.local."
PLACE = b"mdns"
PART = 200  # bytes: a TXT record is made of strings of at most 255, key and all
MAX_HEARD = 1000
TOLD = 6  # addresses: a record should fit into one packet
INFO_MS = 1000  # to be told a service's TXT record


class LocalNetwork:
    """Announces a node's addresses, and hears those of others. Raises OSError where there is no multicast."""

    pause = 2.0

    def __init__(self, keyring: Keyring, listen_host: str) -> None:
        self._keyring = keyring
        self._interfaces = None if listen_host in ("0.0.0.0", "::") else [listen_host]  # noqa: S104 - compared
        self._heard: dict[str, Sighting] = {}
        self._browser: Any = None  # and the instance of zeroconf that it belongs to
        self._withdrawn = False
        self._changing = threading.Lock()
        self._name = f"{secrets.token_hex(8)}.{TYPE}"

    def announce(self, peer_id: bytes, addresses: list[str]) -> None:
        from zeroconf import DNSQuestionType, InterfaceChoice, IPVersion, ServiceBrowser, ServiceInfo, Zeroconf

        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        record = Record(peer_id, addresses[:TOLD], socket.gethostname(), time.time())
        sealed = record.seal(self._keyring, PLACE)
        parts = {f"{at:03}".encode(): sealed[at : at + PART] for at in range(0, len(sealed), PART)}
        zeroconf = Zeroconf(interfaces=self._interfaces or InterfaceChoice.All, ip_version=IPVersion.V4Only)
        try:
            # An address is what a service must have; the real ones are in the record.
            info = ServiceInfo(TYPE, self._name, 9, properties=parts, server=self._name, addresses=[b"\x7f\0\0\1"])
            zeroconf.register_service(info, cooperating_responders=True)  # its name is random: nobody else has it
            # Asked by multicast: of two nodes that share the port only one would get an answer to itself.
            browser = ServiceBrowser(zeroconf, TYPE, handlers=[self._changed], question_type=DNSQuestionType.QM)
        except BaseException:
            zeroconf.close()
            raise
        with self._changing:
            late = self._withdrawn  # meanwhile: nobody waits for a thread that announces
            if not late:
                self._browser = browser
        if late:
            _end(browser)

    def _changed(self, zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        if name == self._name or len(self._heard) >= MAX_HEARD:
            return
        if state_change.name == "Removed":
            self._heard.pop(name, None)
            return
        info = zeroconf.get_service_info(service_type, name, timeout=INFO_MS)
        sealed = b"" if info is None else b"".join(info.properties[key] or b"" for key in sorted(info.properties))
        for keyring in self._keyring.every:
            try:
                record = Record.open(sealed, keyring, PLACE)
            except Rejected:
                continue
            self._heard[name] = record.sighting(socket.gethostname(), "mdns")

    def find(self) -> list[Sighting]:
        return list(self._heard.values())

    def withdraw(self) -> None:
        with self._changing:
            self._withdrawn = True
            browser, self._browser = self._browser, None
        if browser is not None:
            _end(browser)


def _end(browser: Any) -> None:
    browser.cancel()  # which ``close`` does not do: its thread would stay
    browser.zc.close()

"""Machines that cannot all reach one another: Linux network namespaces, joined and kept apart as networks are.

A *machine* is a network namespace; what runs in it has a hostname of its own. A *segment* is a bridge to which machines
are attached; it leads nowhere else, and a packet for elsewhere vanishes in it without a word. A *private* machine has
its own router with NAT (nftables: masquerade, and nothing comes in that was not asked for); two may well have the same
address, as those of a cloud do::

    private 10.1.0.4 ── 10.1.0.1 router 198.51.100.11 ──┐
    private 10.1.0.4 ── 10.1.0.1 router 198.51.100.12 ──┼── segment ── hub 198.51.100.1
                                                        └───────────── origin 198.51.100.2

Nothing is made in the namespace of the tests, and every packet stays inside. What was made is removed when the network
is closed; what a killed test run has left is removed by the next.

Run as a program it is a runner that does what it is told, line by line::

    {"do": "join"}                           -> {"joined": true, "seconds": …}
    {"do": "get", "urls": […], "at_once": 4} -> {"answers": [{"url", "status", "sha256", "source", "seconds"} …]}
    {"do": "patch", "url": …, "body": …}     -> {"status": …, "seconds": …}
    {"do": "stats"}                          -> what the transport's stats() says
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import os
import queue
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.daemon import life
from httpx_p2pcache.testing import Origin, Resource
from httpx_p2pcache.testing.origin import _Server

PREFIX = "p2pcache"
NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
COMMAND_SECONDS = 10.0
START_SECONDS = 30.0  # for a process to import what it needs, on a busy machine
HEAR_SECONDS = 60.0  # for a runner to do what it was told

Result = TypeVar("Result")

# A router's rules. What its policy drops, vanishes: as with most NATs there is not even a refusal.
NAT = """
table ip nat {
  chain leaving {
    type nat hook postrouting priority 100; policy accept;
    oifname "wan" masquerade
  }
}
table ip keep {
  chain through {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "lan" accept
  }
  chain to_itself {
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iifname != "wan" accept
  }
}
"""
DEAF = "table ip split {{ chain heard {{ type filter hook input priority -10; ip saddr {{ {} }} drop; }}; }}"


@functools.cache
def missing(*, firewall: bool) -> str:
    """What is not there that machines need, ``firewall``: that private ones and splits need; "" if nothing is."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    tools = ["ip", "unshare", *(["nft"] if firewall else [])]
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if absent:
        return f"no {', '.join(absent)} here (Debian: apt-get install iproute2 util-linux nftables)"
    try:
        with Network() as network:
            network.segment("try")
            machine = network.machine("try")
            network.attach(machine, "try", "198.51.100.9")
            machine.run("true")
            if firewall:
                machine.filter(NAT)
                machine.filter(DEAF.format("198.51.100.8"))
    except (subprocess.SubprocessError, OSError) as exc:
        said = getattr(exc, "stderr", None) or exc
        return f"namespaces cannot be used here: {str(said).strip().splitlines()[-1]}"
    return ""


class Network:
    """Machines and segments, for as long as the ``with`` lasts."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self._label = f"{PREFIX}-{os.getpid()}-{next(self._numbers)}"
        self._namespaces: list[str] = []
        self._segments: dict[str, str] = {}
        self._ports = itertools.count(1)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Network:
        _sweep()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stack.close()  # processes end before the ground they stand on
        finally:
            for namespace in reversed(self._namespaces):
                _run("ip", "netns", "del", namespace, check=False)

    def _namespace(self, name: str) -> str:
        namespace = f"{self._label}-{name}"
        self._namespaces.append(namespace)  # before it is made: half made it is removed as well
        _run("ip", "netns", "add", namespace)
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        return namespace

    def segment(self, name: str, swallows: str = "198.51.100.254") -> None:
        """A bridge. Its own address ``swallows`` is the gateway to everywhere else, from where nothing comes back."""
        namespace = self._segments[name] = self._namespace(f"segment-{name}")
        _run("ip", "-n", namespace, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", namespace, "address", "add", f"{swallows}/24", "dev", "bridge")
        _run("ip", "-n", namespace, "link", "set", "bridge", "up")

    def machine(self, name: str) -> Machine:
        """One that is attached to nothing yet."""
        return Machine(name, self._namespace(name), self)

    def attach(self, machine: Machine, segment: str, address: str, gateway: str | None = None) -> None:
        """Give ``machine`` an interface with ``address`` on a segment, and a way to everywhere else."""
        device, port = f"eth{len(machine.addresses)}", f"port{next(self._ports)}"
        _join(machine.namespace, device, self._segments[segment], port)
        _run("ip", "-n", self._segments[segment], "link", "set", port, "master", "bridge", "up")
        _address(machine.namespace, device, address)
        if not machine.addresses:
            via = gateway or address.rpartition(".")[0] + ".254"
            _run("ip", "-n", machine.namespace, "route", "add", "default", "via", via)
        machine.addresses.append(address)

    def private(self, name: str, segment: str, public: str, address: str = "10.1.0.4") -> Machine:
        """One that nobody can dial, behind a router of its own that has the address ``public`` on a segment."""
        gateway = address.rpartition(".")[0] + ".1"
        router, machine = self._namespace(f"router-{name}"), self.machine(name)
        port = f"port{next(self._ports)}"
        _join(router, "wan", self._segments[segment], port)
        _run("ip", "-n", self._segments[segment], "link", "set", port, "master", "bridge", "up")
        _address(router, "wan", public)
        _run("ip", "-n", router, "route", "add", "default", "via", public.rpartition(".")[0] + ".254")
        _join(router, "lan", machine.namespace, "eth0")
        _address(router, "lan", gateway)
        _address(machine.namespace, "eth0", address)
        _run("ip", "-n", machine.namespace, "route", "add", "default", "via", gateway)
        _run("ip", "netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        _run("ip", "netns", "exec", router, "nft", "-f", "-", input=NAT)
        machine.addresses.append(address)
        return machine

    def split(self, one: list[Machine], other: list[Machine]) -> None:
        """Machines of one list are silence to those of the other, until :meth:`heal`; who is in neither hears all."""
        for half, gone in ((one, other), (other, one)):
            addresses = ", ".join(address for machine in gone for address in machine.addresses)
            for machine in half:
                machine.filter(DEAF.format(addresses))

    def heal(self, *machines: Machine) -> None:
        for machine in machines:
            machine.filter("delete table ip split")

    def origin(self, machine: Machine, address: str, resources: dict[str, Resource], latency: float = 0.0) -> Origin:
        """A stand-in origin that listens at ``address`` of a machine; its threads are those of the tests."""
        origin = machine.inside(lambda: _OriginElsewhere(address, resources, latency))
        return self._stack.enter_context(origin)

    def closing(self, process: _Process) -> None:
        self._stack.callback(process.end)


@dataclass
class Machine:
    """One namespace. What runs here has this machine's name for its hostname."""

    name: str
    namespace: str
    network: Network
    addresses: list[str] = field(default_factory=list)

    def command(self, *command: str) -> list[str]:
        """``command`` as it runs here. Each program replaces the one before: there is one process, and one ID."""
        named = ["sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"', self.name]
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *named, *command]

    def run(self, *command: str) -> str:
        """What a command prints that has to succeed."""
        return _run(*self.command(*command))

    def filter(self, rules: str) -> None:
        _run("ip", "netns", "exec", self.namespace, "nft", "-f", "-", input=rules)

    def inside(self, func: Callable[[], Result]) -> Result:
        """``func()`` in a thread that is in this machine; sockets that it opens stay there."""

        def enter() -> Result:
            descriptor = os.open(NAMESPACES / self.namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "cannot enter the namespace")
            finally:
                os.close(descriptor)
            return func()

        with ThreadPoolExecutor(1) as pool:  # the thread ends with it: nobody else gets into the machine
            return pool.submit(enter).result(COMMAND_SECONDS)

    def reaches(self, address: str, port: int, seconds: float = 0.5) -> bool:
        """Whether a TCP connection from here is accepted."""

        def dial() -> bool:
            try:
                socket.create_connection((address, port), seconds).close()
            except OSError:
                return False
            return True

        return self.inside(dial)

    def cut(self, device: str = "eth0") -> None:
        """Pull the cable."""
        _run("ip", "-n", self.namespace, "link", "set", device, "down")

    def runner(self, directory: Path, **settings: str) -> Runner:
        """A process that asks through the cache; ``settings`` are variables without ``CACHE_``, in lower case."""
        program = self.command(sys.executable, str(Path(__file__).resolve()))
        runner = Runner(program, environment(directory, **settings), directory.with_suffix(".log"))
        self.network.closing(runner)
        return runner

    def node(self, directory: Path, **settings: str) -> Node:
        """``p2pcache node``, once it listens and has joined."""
        program = self.command(sys.executable, "-m", "httpx_p2pcache.cli", "node", "--idle", "300")
        node = Node(program, environment(directory, **settings), directory.with_suffix(".log"))
        self.network.closing(node)
        node.wait_until_joined(directory)
        return node


def environment(directory: Path, **settings: str) -> dict[str, str]:
    """A runner's: nothing of ours that would reach it, a private registry unless one is named."""
    ours = ("CACHE_", "GITHUB_", "GH_", "RUNNER_")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(ours) and not n.lower().endswith("_proxy")}
    named = {f"CACHE_{name.upper()}": value for name, value in settings.items()}
    return kept | {"CACHE_DIR": str(directory), "CACHE_PEER_REGISTRY": str(directory / "peers")} | named


class _Process:
    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, bufsize=0
            )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="hearing", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def kill(self) -> None:
        """End it as a machine that loses its power ends a process, but for the kernel's goodbyes."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(COMMAND_SECONDS)

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._reader.join(COMMAND_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Node(_Process):
    """A ``p2pcache node``."""

    def wait_until_joined(self, directory: Path) -> None:
        self._remote = life.Remote(directory)
        ends = time.monotonic() + START_SECONDS
        while not (self._remote.get("/status") or {}).get("joined"):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < ends, f"it has not joined: {self.log.read_text()}"
            threading.Event().wait(0.02)

    def status(self) -> dict[str, Any]:
        """What it says of itself; empty when it does not answer."""
        return self._remote.get("/status") or {}

    def peers(self) -> int:
        return int(self.status().get("connected_peers", -1))


class Runner(_Process):
    """A process of the program below."""

    def tell(self, what: str, **more: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **more}).encode() + b"\n")

    def hear(self, seconds: float = HEAR_SECONDS) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"nothing heard in {seconds} s; its log: {self.log.read_text()}") from None
        assert line, f"it has ended: {self.log.read_text()}"
        said: dict[str, Any] = json.loads(line)
        return said

    def do(self, what: str, **more: object) -> dict[str, Any]:
        self.tell(what, **more)
        return self.hear()

    def stat(self, name: str) -> Any:
        return self.do("stats")[name]

    def peers(self) -> int:
        return int(self.stat("connected_peers"))


class _ListeningServer(_Server):
    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks DNS for its own name
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


class _OriginElsewhere(Origin):
    """The stand-in origin at another address than loopback."""

    def __init__(self, address: str, resources: dict[str, Resource], latency: float) -> None:
        super().__init__(resources, latency=latency)
        self._server.server_close()
        self._server = _ListeningServer((address, 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="origin", daemon=True)

    @property
    def url(self) -> str:
        return f"http://{self.netloc}"

    @property
    def netloc(self) -> str:
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"


def _run(*command: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002 - subprocess's name
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if check and done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr or f"{command} failed")
    return done.stdout


def _join(one: str, device: str, other: str, another: str) -> None:
    """A cable between two namespaces, plugged in at both ends."""
    _run("ip", "link", "add", device, "netns", one, "type", "veth", "peer", "name", another, "netns", other)
    _run("ip", "-n", one, "link", "set", device, "up")
    _run("ip", "-n", other, "link", "set", another, "up")


def _address(namespace: str, device: str, address: str) -> None:
    _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", device)


def _sweep() -> None:
    """Remove what test runs have left that were killed: namespaces bear the ID of the process that made them."""
    for path in _listed():
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            for process in _run("ip", "netns", "pids", path.name, check=False).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            _run("ip", "netns", "del", path.name, check=False)


def _listed() -> Iterator[Path]:
    if NAMESPACES.is_dir():
        yield from NAMESPACES.glob(f"{PREFIX}-*-*")


def left_behind() -> list[str]:
    """The namespaces of this process that are still there."""
    return [path.name for path in _listed() if path.name.split("-")[1] == str(os.getpid())]


def main() -> None:
    """The runner: what the head of this module says."""
    transport = P2PCacheTransport(settings=Settings.from_env())
    headers = {"Accept": "application/vnd.github+json", "Authorization": f"Bearer {os.environ['TEST_TOKEN']}"}
    client = httpx.Client(transport=transport, headers=headers, timeout=30.0)

    def get(url: str) -> dict[str, Any]:
        began = time.monotonic()
        try:
            response = client.get(url)
        except Exception as exc:
            return {"url": url, "error": repr(exc), "seconds": time.monotonic() - began}
        return {
            "url": url,
            "status": response.status_code,
            "sha256": hashlib.sha256(response.content).hexdigest(),
            "source": response.extensions["caching"]["source"],
            "seconds": time.monotonic() - began,
        }

    for line in sys.stdin:
        told, began = json.loads(line), time.monotonic()
        answer: dict[str, Any] = {}
        if told["do"] == "join":
            answer = {"joined": transport.wait_until_joined(30), "seconds": time.monotonic() - began}
        elif told["do"] == "get":
            with ThreadPoolExecutor(told.get("at_once", 1)) as pool:
                answer = {"answers": list(pool.map(get, told["urls"]))}
        elif told["do"] == "patch":
            response = client.patch(told["url"], content=told["body"])
            answer = {"status": response.status_code, "seconds": time.monotonic() - began}
        elif told["do"] == "stats":
            answer = transport.stats()
        print(json.dumps(answer), flush=True)
    client.close()


if __name__ == "__main__":
    main()

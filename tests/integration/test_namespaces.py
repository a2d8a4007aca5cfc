"""What a fleet does on networks where not all reach all: NAT, hubs, chains, splits; ``namespaces`` makes them."""

from __future__ import annotations

import hashlib
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import Machine, Network, Node, Runner, left_behind, missing
from waiting import eventually

from httpx_p2pcache.testing import Origin, Resource, made_up

pytest.importorskip("libp2p")

pytestmark = pytest.mark.p2p

SECRET = hashlib.sha256(b"the secret of these machines").hexdigest()
ANOTHER = hashlib.sha256(b"another fleet's secret").hexdigest()
TOKEN = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"
HUB, ORIGIN = "198.51.100.1", "198.51.100.2"
BUDGET = 1.0  # lookup_timeout: four times the default, as these machines are many on one
PROMPT = BUDGET + 1.75  # the origin's latency, and a generous margin
JOIN_SECONDS = 15.0  # for a process to start and to know its peers, on a busy machine
LATENCY = 0.05
# Where not the look-up's budget but the outcome is looked at, on a loaded machine.
PATIENT = {"lookup_timeout": "2"}
SHARED = ("local", "peer")  # what a peer has paid for may have been handed to us before we ask


@pytest.fixture
def network() -> Iterator[Network]:
    if why := missing(firewall=False):
        pytest.skip(why)
    with Network() as made:
        yield made
    assert left_behind() == []


@pytest.fixture
def guarded(network: Network) -> Network:
    """A network whose machines can be private, and split."""
    if why := missing(firewall=True):
        pytest.skip(why)
    return network


class Lan:
    """One segment with an origin, on which all reach all, but for the private ones."""

    def __init__(self, network: Network, scratch: Path, resources: int = 120) -> None:
        self.network, self.scratch = network, scratch
        network.segment("lan")
        self.origin = at_home(network, "lan", made_up(resources))
        self.targets = list(made_up(resources))
        self.environment = {
            "shared_secret": SECRET,
            "github_hosts": self.origin.url,
            "join_timeout": "15",
            "lookup_timeout": str(BUDGET),
            "listen_port": "9100",
        }
        self._private = 0

    def machine(self, name: str, address: str) -> Machine:
        machine = self.network.machine(name)
        self.network.attach(machine, "lan", address)
        return machine

    def private(self, name: str) -> Machine:
        """The first two have one address, at which each finds itself; those of the others lead nowhere."""
        self._private += 1
        own = "10.1.0.4" if self._private < 3 else f"10.1.{self._private}.4"
        return self.network.private(name, "lan", f"198.51.100.{10 + self._private}", own)

    def runner(self, machine: Machine, **settings: str) -> Runner:
        return machine.runner(self.scratch / machine.name, **(self.environment | settings))

    def node(self, machine: Machine, **settings: str) -> Node:
        return machine.node(self.scratch / machine.name, **(self.environment | settings))

    def urls(self, *slice_: int) -> list[str]:
        return [self.origin.url + target for target in self.targets[slice(*slice_)]]

    def calls(self) -> int:
        return len(self.origin.calls)


def at_home(network: Network, segment: str, resources: dict[str, Resource]) -> Origin:
    machine = network.machine("origin")
    network.attach(machine, segment, ORIGIN)
    return network.origin(machine, ORIGIN, resources, LATENCY)


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN", TOKEN)


def joined(*runners: Runner) -> None:
    """All at once; each has joined in time."""
    for runner in runners:
        runner.tell("join")
    for runner in runners:
        said = runner.hear()
        assert said["joined"]
        assert said["seconds"] < JOIN_SECONDS


def met(*runners: Runner) -> None:
    joined(*runners)
    for runner in runners:
        assert eventually(lambda runner=runner: acquainted(runner, len(runners) - 1), JOIN_SECONDS), runner.stat(
            "peers"
        )


def acquainted(runner: Runner, count: int) -> bool:
    """Whether it has so many peers, and each has become a home in its eyes: it has been asked how far it is."""
    peers = runner.stat("peers")
    return len(peers) == count and all(peer["rtt_ms"] is not None for peer in peers)


def ask(origin: Origin, runners: list[Runner], urls: list[str], at_once: int = 4) -> list[list[dict[str, Any]]]:
    """The answers of each runner to all URLs, asked by all in the same moment; every one is right."""
    for runner in runners:
        runner.tell("get", urls=urls, at_once=at_once)
    found = [runner.hear()["answers"] for runner in runners]
    expected = {
        url: (None, 200, hashlib.sha256(origin.resources[url.removeprefix(origin.url)].body).hexdigest())
        for url in urls
    }
    for answers in found:
        seen = {a["url"]: (a.get("error"), a.get("status"), a.get("sha256")) for a in answers}
        assert expected == seen
    return found


def slowest(found: list[list[dict[str, Any]]]) -> float:
    return max(answer["seconds"] for answers in found for answer in answers)


def sources(answers: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(answer["source"] for answer in answers))


def said_by(*processes: Node | Runner) -> str:
    """For a failure's message: whom each is connected to, and what it has logged."""
    states = [process.status() if isinstance(process, Node) else process.do("stats") for process in processes]
    return "\n".join(
        f"{state.get('addresses')}, rejected: {state.get('rejected')}, connected to {state.get('peers')}\n"
        f"{process.log.read_text()}"
        for process, state in zip(processes, states, strict=True)
    )


def hub_of(node: Node, *, named: bool) -> str:
    """The hub's address for ``CACHE_BOOTSTRAP_PEERS``, with or without its peer ID."""
    return f"/ip4/{HUB}/tcp/9100" + (f"/p2p/{node.status()['peer_id']}" if named else "")


def spokes(lan: Lan, hub: Node, count: int, *, named: bool, **settings: str) -> list[Runner]:
    """Runners that nobody can dial, each in a network of its own, which know one address: the hub's."""
    there = hub_of(hub, named=named)
    found = [lan.runner(lan.private(name), bootstrap_peers=there, **settings) for name in "abcdef"[:count]]
    joined(*found)
    assert eventually(lambda: hub.peers() == count, JOIN_SECONDS), said_by(hub, *found)
    for runner in found:
        assert eventually(lambda runner=runner: acquainted(runner, 1), JOIN_SECONDS), said_by(hub, *found)
    return found


def test_machines_reach_each_other_as_these_tests_say(guarded: Network, tmp_path: Path) -> None:
    lan = Lan(guarded, tmp_path)
    public, one, other = lan.machine("public", HUB), lan.private("one"), lan.private("other")
    port = int(lan.origin.netloc.rpartition(":")[2])

    def listening(machine: Machine) -> socket.socket:
        return machine.inside(lambda: socket.create_server(("0.0.0.0", 9100)))

    with listening(public), listening(one), listening(other):
        assert all(machine.reaches(ORIGIN, port) for machine in (public, one, other))
        assert all(machine.reaches(HUB, 9100) for machine in (one, other))
        for machine, address in ((public, "198.51.100.11"), (public, "10.1.0.4"), (one, "198.51.100.12")):
            assert not machine.reaches(address, 9100, 0.2)
        assert one.run("hostname") == "one\n"
        further = lan.machine("further", "198.51.100.3")
        assert further.reaches(HUB, 9100)
        guarded.split([public], [further])
        assert not further.reaches(HUB, 9100, 0.2)
        assert further.reaches(ORIGIN, port)
        guarded.heal(public, further)
        assert further.reaches(HUB, 9100)


# A hub and its spokes


def test_spokes_that_reach_only_the_hub_pay_once_for_what_all_ask_in_the_same_second(
    guarded: Network, tmp_path: Path
) -> None:
    lan = Lan(guarded, tmp_path)
    hub = lan.node(lan.machine("hub", HUB))
    runners = spokes(lan, hub, 3, named=True)
    found = ask(lan.origin, runners, lan.urls(100))
    assert len(found) == 3
    assert lan.calls() <= 110, [sources(answers) for answers in found]


def test_a_write_by_one_spoke_and_the_quota_that_it_hears_of_reach_the_others_through_the_hub(
    guarded: Network, tmp_path: Path
) -> None:
    lan = Lan(guarded, tmp_path)
    hub = lan.node(lan.machine("hub", HUB))
    writer, reader, silent = spokes(lan, hub, 3, named=False, **PATIENT)
    target, url = lan.targets[0], lan.urls(1)[0]
    for runner in (writer, reader):
        ask(lan.origin, [runner], [url])
    assert lan.calls() == 1
    for number in range(5):
        body = f'{{"written": {number}}}'
        assert writer.do("patch", url=url, body=body)["status"] == 200
        # The answer to the write is there: from now on nobody is told what was before.
        for runner in (reader, silent, writer):
            ask(lan.origin, [runner], [url])
        assert lan.origin.resources[target].body == body.encode()
    assert Counter(call.method for call in lan.origin.calls) == {"PATCH": 5, "GET": 6}
    # Who has made no call at all knows what is left of the quota; and when it is used up, that it is.
    idle = lan.runner(lan.private("idle"), bootstrap_peers=hub_of(hub, named=False), **PATIENT)
    joined(idle)
    assert eventually(lambda: idle.stat("quotas"))
    assert eventually(lambda: silent.stat("quotas"))
    # What was paid for before it came serves it as well.
    assert ask(lan.origin, [idle], [url])[0][0]["source"] in SHARED
    lan.origin.limit = 5
    assert writer.do("get", urls=lan.urls(1, 2))["answers"][0]["status"] == 403
    for runner in (reader, silent, idle):
        assert eventually(lambda runner=runner: any(q["refused_until"] > time.time() for q in runner.stat("quotas")))


@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_spokes_go_on_at_once_without_their_hub_and_share_again_when_it_is_back(
    guarded: Network, tmp_path: Path, how: str
) -> None:
    lan = Lan(guarded, tmp_path)
    machine = lan.machine("hub", HUB)
    hub = lan.node(machine)
    runners = spokes(lan, hub, 2, named=False)
    ask(lan.origin, runners, lan.urls(20))
    assert lan.calls() <= 22
    if how == "unplugged":  # nobody is told that the connections have ended
        machine.cut()
    hub.kill()
    alone = [ask(lan.origin, [runner], lan.urls(20, 40), at_once=2)[0] for runner in runners]
    assert slowest(alone) < PROMPT
    assert {source for answers in alone for source in sources(answers)} == {"origin"}
    if how == "unplugged":
        machine.run("ip", "link", "set", "eth0", "up")
        machine.run("ip", "route", "replace", "default", "via", "198.51.100.254")
    back = lan.node(machine)
    assert back.status()["addresses"][0] == f"/ip4/{HUB}/tcp/9100"
    for runner in runners:
        assert eventually(lambda runner=runner: acquainted(runner, 1), 10.0), said_by(back, *runners)
    before = lan.calls()
    ask(lan.origin, runners, lan.urls(40, 70))
    assert lan.calls() - before <= 33


# Some reach some


def test_two_who_cannot_reach_one_another_share_through_the_one_whom_both_reach(
    network: Network, tmp_path: Path
) -> None:
    network.segment("left", "192.0.2.254")
    network.segment("right", "203.0.113.254")
    a, b, c = (network.machine(name) for name in "abc")
    network.attach(a, "left", "192.0.2.1")
    network.attach(b, "left", "192.0.2.2")
    network.attach(b, "right", "203.0.113.2")
    network.attach(c, "right", "203.0.113.1")
    # The origin has one address, reached over either segment.
    place = network.machine("origin")
    network.attach(place, "left", "192.0.2.3")
    network.attach(place, "right", "203.0.113.3")
    place.run("ip", "address", "add", f"{ORIGIN}/32", "dev", "lo")
    for machine, via in ((a, "192.0.2.3"), (b, "192.0.2.3"), (c, "203.0.113.3")):
        machine.run("ip", "route", "add", f"{ORIGIN}/32", "via", via)
    origin = network.origin(place, ORIGIN, made_up(70), LATENCY)
    urls = [origin.url + target for target in origin.resources]
    settings = {"shared_secret": SECRET, "github_hosts": origin.url, "join_timeout": "15"}
    middle = b.runner(tmp_path / "b", **settings, **PATIENT)
    joined(middle)
    identity = middle.stat("peer_id")
    ends = [
        machine.runner(
            tmp_path / machine.name, bootstrap_peers=f"/ip4/{address}/tcp/9100/p2p/{identity}", **settings, **PATIENT
        )
        for machine, address in ((a, "192.0.2.2"), (c, "203.0.113.2"))
    ]
    joined(*ends)
    assert eventually(lambda: middle.peers() == 2)
    with a.inside(lambda: socket.create_server(("0.0.0.0", 1))):
        assert not c.reaches("192.0.2.1", 1, 0.2)
    # One after the other: what one end has paid for serves the other.
    for paying, other, url in ((*ends, urls[60]), (*reversed(ends), urls[61])):
        assert sources(ask(origin, [paying], [url])[0]) == {"origin": 1}
        assert ask(origin, [other], [url])[0][0]["source"] in SHARED
    assert len(origin.calls) == 2
    found = ask(origin, [*ends, middle], urls[:60])
    assert len(origin.calls) - 2 <= 66, [sources(answers) for answers in found]


def test_a_network_that_is_split_answers_all_and_shares_again_when_it_is_whole(
    guarded: Network, tmp_path: Path
) -> None:
    lan = Lan(guarded, tmp_path)
    machines = [lan.machine(name, f"198.51.100.{number}") for number, name in enumerate("abcd", 3)]
    runners = [lan.runner(machine, peer_registry=str(tmp_path / "registry")) for machine in machines]
    met(*runners)
    ask(lan.origin, runners, lan.urls(15), at_once=1)
    assert lan.calls() <= 17
    guarded.split(machines[:2], machines[2:])
    before = lan.calls()
    assert slowest(ask(lan.origin, runners, lan.urls(15, 35), at_once=1)) < PROMPT
    assert lan.calls() - before <= 4 * 20
    # Each half notices that it is one, and shares as such.
    for runner in runners:
        assert eventually(lambda runner=runner: acquainted(runner, 1), 20.0)
    before = lan.calls()
    assert slowest(ask(lan.origin, runners, lan.urls(35, 50), at_once=1)) < PROMPT
    assert lan.calls() - before <= 2 * 15 + 3
    guarded.heal(*machines)
    for runner in runners:
        assert eventually(lambda runner=runner: acquainted(runner, 3), 15.0), runner.stat("peers")
    before = lan.calls()
    found = ask(lan.origin, runners, lan.urls(50, 80), at_once=1)
    assert lan.calls() - before <= 33, [[a["source"] for a in answers] for answers in found]


def test_two_fleets_on_one_registry_and_one_hub_address_keep_apart_and_delay_each_other_in_nothing(
    network: Network, tmp_path: Path
) -> None:
    lan = Lan(network, tmp_path)
    hub = lan.node(lan.machine("hub", HUB), peer_registry=str(tmp_path / "registry"))
    shared = {"peer_registry": str(tmp_path / "registry"), "bootstrap_peers": hub_of(hub, named=True)}
    ours = [lan.runner(lan.machine("a", "198.51.100.3"), **shared)]
    theirs = [
        lan.runner(lan.machine(name, f"198.51.100.{number}"), **shared, shared_secret=ANOTHER)
        for number, name in enumerate("xy", 4)
    ]
    joined(*ours, *theirs)
    assert eventually(lambda: ours[0].peers() == 1)
    for runner in theirs:
        assert eventually(lambda runner=runner: runner.peers() == 1)
    both = {runner.stat("peer_id") for runner in theirs}
    assert both == {peer["peer_id"] for runner in theirs for peer in runner.stat("peers")}
    assert [peer["peer_id"] for peer in hub.status()["peers"]] == [ours[0].stat("peer_id")]
    assert len(list((tmp_path / "registry").iterdir())) == 4
    found = ask(lan.origin, [*ours, *theirs], lan.urls(40), at_once=2)
    assert slowest(found) < PROMPT
    # Fleets share nothing: each pays once.
    assert 80 <= lan.calls() <= 84, [sources(answers) for answers in found]
    assert [peer["peer_id"] for peer in hub.status()["peers"]] == [ours[0].stat("peer_id")]


# All reach all


def test_machines_on_one_segment_with_a_registry_in_common_pay_once(network: Network, tmp_path: Path) -> None:
    lan = Lan(network, tmp_path)
    registry = str(tmp_path / "registry")
    machines = [lan.machine(name, f"198.51.100.{number}") for number, name in enumerate("abc", 3)]
    runners = [lan.runner(machine, peer_registry=registry) for machine in machines]
    met(*runners)
    found = ask(lan.origin, runners, lan.urls(60))
    assert lan.calls() <= 63, [sources(answers) for answers in found]


@pytest.mark.parametrize("hostnames", [("one", "other"), ("same", "same")], ids=["two-hostnames", "one-hostname"])
def test_what_a_node_announces_can_be_dialled_by_the_others(
    network: Network, tmp_path: Path, hostnames: tuple[str, str]
) -> None:
    """Two containers of one image may well have one hostname: that does not make them one machine."""
    lan = Lan(network, tmp_path)
    nodes, machines, expected = [], [], {}
    for number, name in enumerate(("one", "other"), 3):
        address = f"198.51.100.{number}"
        machine = lan.machine(name, address)
        machine.name = hostnames[number - 3]
        nodes.append(machine.node(tmp_path / name, **lan.environment, peer_registry=str(tmp_path / "registry")))
        machines.append(machine)
        said = nodes[-1].status()
        assert said["addresses"][0] == f"/ip4/{address}/tcp/9100"
        expected[said["peer_id"]] = said["addresses"][0]
    reached: Callable[[Node], bool] = lambda node: node.peers() == 1  # noqa: E731 - two lines would say no more
    for node, machine in zip(nodes, machines, strict=True):
        assert eventually(lambda node=node: reached(node))
        (peer,) = node.status()["peers"]
        assert peer["addresses"][0] == expected[peer["peer_id"]]
        host, port = peer["addresses"][0].split("/")[2::2]
        assert machine.reaches(host, int(port))
        if hostnames[0] != hostnames[1]:
            assert peer["addresses"] == [expected[peer["peer_id"]]]

"""``p2pcache init``, ``node``, ``stop``, ``status``, ``peers``, ``discover``: the runner's daemon and its fleet."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any, Optional

import typer

from httpx_p2pcache.cli.show import Json, ago, amount, facts, fail, print_json, running, settings_or_exit, short, table
from httpx_p2pcache.daemon import life

app = typer.Typer()

Idle = Annotated[
    float, typer.Option(min=0, max=31_536_000, help="Seconds without use after which it ends by itself; 0: never.")
]
Port = Annotated[
    Optional[int],  # noqa: UP045 - Typer reads it on Python 3.10 as well
    typer.Option(min=0, max=65535, help="Open the door on this loopback port as well; 0: any free one."),
]


@app.command()
def init(
    idle: Idle = life.IDLE_SECONDS,
    port: Port = None,
    wait: Annotated[float, typer.Option(min=0, max=300, help="Seconds to wait until it knows its peers.")] = 10,
    replace: Annotated[
        bool, typer.Option("--replace", help="End one that runs for another secret or fleet first.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start this runner's daemon in the background, or find the one that runs.

    When it returns the daemon can be used: every Python process with the same CACHE_DIR, secret and fleet shares
    through it, and other clients through its door. It outlives the step, not the job. Exit status 0: it runs; 2: it
    could not be started.
    """
    settings = settings_or_exit()
    try:
        status, started = life.launch(settings, idle=idle, port=port, wait=wait, replace=replace)
    except (RuntimeError, TimeoutError) as exc:
        fail(str(exc), 2)
    except OSError as exc:
        fail(f"CACHE_DIR {settings.dir} cannot be used: {exc}", 2)
    if not started and idle not in (life.IDLE_SECONDS, status["ends_after_idle_seconds"] or 0):
        print(f"p2pcache: it was running already: --idle {idle:g} has no effect", file=sys.stderr)
    if as_json:
        print_json({**status, "started": started})
        return
    print("the daemon runs" if started else "the daemon was running already")
    _show_status(status)
    if not started and not status["p2p_enabled"]:
        print("once that is mended: p2pcache stop, then p2pcache init")


@app.command()
def node(idle: Idle = 0, port: Port = None) -> None:
    """Be this runner's daemon, in the foreground, until interrupted.

    Exit status 0: it was stopped; 2: it cannot run, or another one runs already.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "hypercorn", "async_service"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    settings = settings_or_exit()
    from httpx_p2pcache.daemon import process  # takes a second to import

    try:
        process.run(settings, idle=idle, port=port, ready=lambda door: print(f"the door is open: {door}", flush=True))
    except life.AlreadyRunning:
        fail(f"another daemon has {settings.dir} already (p2pcache status)", 2)
    except OSError as exc:
        fail(f"the daemon cannot run: {exc}", 2)


@app.command()
def stop(as_json: Json = False) -> None:
    """End this runner's daemon. Exit status 0: it has ended, or there was none; 1: it does not end."""
    directory = settings_or_exit().dir
    try:
        stopped = life.stop(directory)
    except TimeoutError as exc:
        fail(str(exc))
    if as_json:
        print_json({"stopped": stopped})
    else:
        print("the daemon has ended" if stopped else "no daemon was running")


@app.command()
def status(
    web: Annotated[bool, typer.Option("--web", help="Open a page to look at, and print where it is.")] = False,
    as_json: Json = False,
) -> None:
    """Show this runner's daemon. Exit status 0: it runs; 1: none does."""
    found = running(settings_or_exit(), as_json)
    if web:
        told, opened = life.Remote(settings_or_exit().dir).post("/open")
        if told != 200:
            fail("the page cannot be opened")
        url = f"{opened['url']}/p2pcache/"
        print_json({"page": url}) if as_json else print(url)
        return
    if as_json:
        print_json({"running": True, **found})
    else:
        _show_status(found)


@app.command()
def peers(as_json: Json = False) -> None:
    """List the members of the fleet that are connected. Exit status 0: there are some; 1: none, or no daemon."""
    found = running(settings_or_exit(), as_json, nothing=[])["peers"]
    if as_json:
        print_json(found)
    elif found:
        columns = ("peer", "address", "found by", "round trip", "in", "out", "connected for", "last heard")
        table(columns, map(_peer, found), numbers=False)
    else:
        print("no member of the fleet is connected", file=sys.stderr)
    raise typer.Exit(0 if found else 1)


def _peer(peer: dict[str, Any]) -> list[str]:
    return [
        short(peer["peer_id"]),
        ", ".join(peer["addresses"]),
        peer["how"],
        "" if peer["rtt_ms"] is None else f"{peer['rtt_ms']} ms",
        amount(peer["bytes_in"]),
        amount(peer["bytes_out"]),
        ago(peer["connected_for"]),
        f"{peer['heard_ago']:.0f} s ago",
    ]


def _show_status(status: dict[str, Any]) -> None:
    sharing = "on" if status["joined"] else "on, joining"
    if not status["p2p_enabled"]:
        why = status.get("off_because")
        sharing = f"off: {why}" if why else "off"
    rows = [
        ("sharing", sharing),
        ("fleet", status["fleet"]),
        ("peer ID", status["peer_id"] or "none"),
        *(("address", address) for address in status["addresses"]),
        ("peers", str(status["connected_peers"])),
        *(("door", door) for door in [status["door"], *status["urls"]]),
        ("store", f"{status['cache_dir']}, {status['cache_size']} entries, {amount(status['total_size_bytes'])}"),
        ("processes", f"{status['processes']} attached"),
        ("running for", f"{ago(status['now'] - status['since'])} (process {status['pid']})"),
    ]
    for quota in status["quotas"]:
        who = quota["identity"] or "anonymous"
        rows.append((f"quota {quota['resource']}", f"{quota['remaining']} of {quota['limit']} left for {who}"))
    facts(rows)


@app.command()
def register(
    peer_id: Annotated[str, typer.Argument(help="The node's libp2p peer ID.")],
    port: Annotated[int, typer.Argument(min=1, max=65535, help="The TCP port it listens on.")],
    ip: Annotated[str, typer.Argument(help="The IP address at which others reach it.")],
) -> None:
    """Leave the address of a node in the registry, as the node itself does; it counts for CACHE_PEER_TTL seconds.

    Exit status 0: it is there; 2: the values or the registry cannot be used.
    """
    from httpx_p2pcache.cli.discovered import register as registered

    settings = settings_or_exit()
    try:
        print(registered(settings, peer_id, port, ip))
    except (ValueError, OSError) as exc:
        fail(str(exc), 2)


@app.command()
def discover(
    most: Annotated[Optional[int], typer.Argument(min=1, metavar="[MAX]", help="At most so many.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """List the peers that may be there, as multiaddrs: from the registry, the settings, and the daemon's members.

    Exit status 0: there are some; 1: none.
    """
    from httpx_p2pcache.cli.discovered import discovered

    settings = settings_or_exit()
    status = life.Remote(settings.dir).get("/status")
    found = discovered(settings, status)[:most]
    if as_json:
        print_json(found)
    else:
        for peer in found:
            print(peer["multiaddr"])
    if not found and not as_json:
        print('no peers are known: see docs/troubleshooting.md, "No peers"', file=sys.stderr)
    raise typer.Exit(0 if found else 1)

"""``p2pcache stats``, ``summary`` and ``clear``: what has been counted, and the store."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any, Optional

import msgspec
import typer

from httpx_p2pcache.cli.show import Json, amount, facts, fail, print_json, running, settings_or_exit, table
from httpx_p2pcache.daemon import life
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.report import report

app = typer.Typer()

Since = Annotated[
    Optional[float],  # noqa: UP045 - Typer reads it on Python 3.10 as well
    typer.Option(min=0, metavar="MINUTES", help="Only the last so many minutes; default: all that was counted."),
]
WATCH_SECONDS = 1.0
MOST_ENDPOINTS = 50  # rows of a table for people: a job's summary has an end


@app.command()
def stats(
    since: Since = None,
    fleet: Annotated[bool, typer.Option("--fleet", help="Of all members together; needs the daemon.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Once a second, until interrupted.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show what this runner's processes have counted, step after step, and what that has saved.

    Each figure is defined in docs/statistics.md. Exit status 0; 1: --fleet without a daemon.
    """
    if fleet and since is not None:
        raise typer.BadParameter("members tell what they have counted since their nodes began", param_hint="--since")
    settings = settings_or_exit()
    ledger = Ledger(settings.dir)

    def look() -> dict[str, Any]:
        if not fleet:
            return report(ledger, 0.0 if since is None else _began(since))
        status = running(settings, as_json, ", and only it knows the fleet")
        return {"total": status["aggregate"], "endpoints": [], "minutes": []}

    if watch:
        _watch(look, as_json)
    elif as_json:
        print_json(look())
    elif markdown:
        print(as_markdown(look()))
    else:
        _show(look())


@app.command()
def summary(
    since: Annotated[
        Optional[float],  # noqa: UP045 - Typer reads it on Python 3.10 as well
        typer.Option(min=0, metavar="MINUTES", help="Only the last so many minutes; default: since the daemon began."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a job's summary as Markdown: p2pcache summary >> "$GITHUB_STEP_SUMMARY".

    Of what was counted since the daemon started; without one, of all. Exit status 0.
    """
    settings = settings_or_exit()
    status = life.Remote(settings.dir).get("/status")
    began = status["since"] if status else 0.0
    found = report(Ledger(settings.dir), began if since is None else _began(since))
    if as_json:
        print_json(found)
        return
    print(as_markdown(found, peers=status["connected_peers"] if status else None))


@app.command()
def clear(
    statistics: Annotated[bool, typer.Option("--stats", help="What was counted as well.")] = False,
    as_json: Json = False,
) -> None:
    """Remove every entry from this runner's store; processes that use it go on. Exit status 0; 2: it cannot be."""
    from httpx_p2pcache import storage  # imports hishel, which the other commands here do without
    from httpx_p2pcache.store import Store

    settings = settings_or_exit()
    store = Store(settings.dir, max_size=settings.max_size, default_ttl=settings.default_ttl)
    try:
        removed = store.clear() + storage.clear(settings.dir)
        if statistics:
            Ledger(settings.dir).clear()
    except OSError as exc:
        fail(f"{settings.dir} cannot be cleared: {exc}", 2)
    finally:
        store.close()
    if as_json:
        print_json({"removed": removed})
    else:
        print(f"{removed} entries removed from {settings.dir}")


def _began(since: float) -> float:
    """The time so many minutes ago, as far back as there is one."""
    return max(0.0, time.time() - since * 60)


def _facts(total: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("requests", f"{total['requests']}"),
        ("hit rate", f"{total['hit_rate']:.1%} ({total['local_hits']} local, {total['peer_hits']} from peers)"),
        ("calls saved", f"{total['api_calls_saved']} ({total['revalidated']} of them 304s, which are free)"),
        ("calls made", f"{total['api_calls_made']} that counted, {total['origin_calls']} in all"),
        ("time saved", f"{total['seconds_saved']:.1f} s"),
        ("bytes saved", amount(total["bytes_from_cache"])),
        ("coalesced", f"{total['coalesced']} waited for another's fetch"),
        ("stale served", f"{total['stale_served']}"),
        ("peer failures", f"{total['peer_failures']} ({total['peer_timeouts']} not in time)"),
    ]
    if "runners" in total:
        rows.insert(0, ("runners", f"{total['runners']}"))
    return rows


def _rows(endpoints: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    names = ("endpoint", "requests", "local_hits", "peer_hits", "revalidated", "api_calls_made", "api_calls_saved")
    return [tuple(one[name] for name in names) for one in endpoints[:MOST_ENDPOINTS]]


_COLUMNS = ("endpoint", "requests", "local", "peer", "304", "calls made", "calls saved")


def _show(found: dict[str, Any]) -> None:
    facts(_facts(found["total"]))
    if found["endpoints"]:
        print()
        table(_COLUMNS, _rows(found["endpoints"]))


def _watch(look: Any, as_json: bool) -> None:
    try:
        if as_json or not sys.stdout.isatty():
            while True:
                print(msgspec.json.encode({"at": time.time(), **look()["total"]}).decode(), flush=True)
                time.sleep(WATCH_SECONDS)
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table

        with Live(console=Console(), refresh_per_second=4) as live:
            while True:
                shown = Table(show_header=False, title="what this runner has counted (Ctrl-C ends)")
                for row in _facts(look()["total"]):
                    shown.add_row(*row)
                live.update(shown)
                time.sleep(WATCH_SECONDS)
    except (KeyboardInterrupt, BrokenPipeError):
        pass


def as_markdown(found: dict[str, Any], peers: int | None = None) -> str:
    """A report as GitHub shows it: a sentence, a picture (Mermaid), a table by endpoint."""
    total = found["total"]
    lines = ["## Shared HTTP cache", ""]
    if not total["requests"]:
        return "\n".join([*lines, "No requests were made through it."])
    lines += [
        f"**{total['api_calls_saved']} API calls saved** of {total['requests']}: "
        f"{total['hit_rate']:.0%} hits, {total['api_calls_made']} calls that counted"
        + (f", {peers} peers connected." if peers is not None else "."),
        "",
        "```mermaid",
        "pie showData",
        f'  "this runner had it" : {total["local_hits"]}',
        f'  "a peer had it" : {total["peer_hits"]}',
        f'  "304, free" : {total["revalidated"]}',
        f'  "calls that counted" : {total["api_calls_made"]}',
        "```",
    ]
    if found["endpoints"]:
        lines += ["", "| " + " | ".join(_COLUMNS) + " |", "|---" + "|--:" * (len(_COLUMNS) - 1) + "|"]
        lines += [f"| `{row[0]}` | " + " | ".join(map(str, row[1:])) + " |" for row in _rows(found["endpoints"])]
        if len(found["endpoints"]) > MOST_ENDPOINTS:
            lines.append(f"\nand {len(found['endpoints']) - MOST_ENDPOINTS} more")
    return "\n".join(lines)

"""The commands, their options, and how their results are shown."""

from __future__ import annotations

import importlib.util
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from httpx_p2pcache import __version__
from httpx_p2pcache.cli import fetch, figures, nodes, verify
from httpx_p2pcache.cli.show import Json, fail, print_json, table

if TYPE_CHECKING:
    from httpx_p2pcache.cli.demo import Outcome, Plan

app = typer.Typer(
    help="An HTTP cache that a fleet of machines shares without a server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # A pipe gets plain text; and there need be neither.
    rich_markup_mode="rich" if all(one and one.isatty() for one in (sys.stdout, sys.stderr)) else None,
)


for commands in (nodes.app, figures.app, fetch.app, verify.app):
    app.registered_commands += commands.registered_commands


class Client(str, Enum):
    """The client a runner uses."""

    sync = "sync"
    asyncio = "asyncio"
    trio = "trio"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None: ...


@app.command()
def demo(
    runners: Annotated[int, typer.Option(min=1, max=50, help="How many runner processes.")] = 5,
    urls: Annotated[int, typer.Option(min=1, max=5000, help="How many URLs each asks for.")] = 100,
    har: Annotated[
        Optional[Path],  # noqa: UP045 - Typer reads it on Python 3.10 as well
        typer.Option(
            help="Recorded exchanges to serve (HAR 1.2) instead of made-up ones.", exists=True, dir_okay=False
        ),
    ] = None,
    latency: Annotated[float, typer.Option(min=0, max=10_000, help="Milliseconds that the origin takes.")] = 80,
    own_tokens: Annotated[bool, typer.Option("--own-tokens", help="Each runner has a token of its own.")] = False,
    stagger: Annotated[float, typer.Option(min=0, max=60, help="Seconds between the starts of two runners.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Requests that a runner has under way.")] = 4,
    client: Annotated[Client, typer.Option(help="The httpx client the runners use.")] = Client.sync,
    as_json: Json = False,
) -> None:
    """Show what sharing saves: runners that ask for the same URLs in the same second, alone and as a fleet.

    Starts a stand-in for GitHub's API on this machine and real runner processes, first without sharing and then with
    it. Exit status 0: every answer was byte for byte the origin's; 1: one was not; 2: it could not be run.
    """
    from httpx_p2pcache.cli.demo import Plan
    from httpx_p2pcache.testing import from_har, made_up

    try:
        resources = made_up(urls) if har is None else from_har(har, urls)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--har") from exc
    plan = Plan(
        runners=runners,
        resources=resources,
        targets=list(resources),
        latency=latency / 1000,
        own_tokens=own_tokens,
        stagger=stagger,
        concurrency=concurrency,
        client=client.value,
    )
    outcome = _demonstrated(plan, "demo")
    if as_json:
        print_json(outcome)
    else:
        _show(outcome)
    raise typer.Exit(0 if outcome.right else 1)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="Your recorded traffic (HAR 1.2).", exists=True, dir_okay=False)],
    runners: Annotated[int, typer.Option(min=1, max=50, help="How many runners do the same.")] = 5,
    latency: Annotated[float, typer.Option(min=0, max=10_000, help="Milliseconds that the origin takes.")] = 80,
    own_tokens: Annotated[bool, typer.Option("--own-tokens", help="Each runner has a token of its own.")] = False,
    as_json: Json = False,
) -> None:
    """Show what sharing would save on your own recorded traffic.

    Each runner makes the file's GETs that were answered with 200, in the recorded order with all repeats, as fast as
    it can, against a stand-in that serves what was recorded; nothing goes to the true origin. Exit status as of demo.
    """
    from httpx_p2pcache.cli.demo import Plan
    from httpx_p2pcache.testing import from_har, targets_of

    try:
        resources, targets = from_har(file), targets_of(file)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="FILE") from exc
    plan = Plan(
        runners=runners,
        resources=resources,
        targets=targets,
        latency=latency / 1000,
        own_tokens=own_tokens,
        stagger=0,
        concurrency=1,
        client="sync",
    )
    outcome = _demonstrated(plan, "replay")
    asked, alone, shared = outcome.without.asked, outcome.without.counted_calls, outcome.with_sharing.counted_calls
    if as_json:
        print_json({"calls_without_cache": asked, "calls_with_own_caches": alone, "calls_with_sharing": shared})
    else:
        rows = [
            ("no cache", asked, ""),
            ("a cache for each runner", alone, f"{1 - alone / asked:.0%}" if asked else ""),
            ("one that they share", f"[bold]{shared}[/]", f"[bold green]{1 - shared / asked:.0%}[/]" if asked else ""),
        ]
        title = f"{runners} runners x {len(targets)} recorded requests for {len(resources)} URLs"
        table(("", "calls that count", "saved"), rows, title)
    raise typer.Exit(0 if outcome.right else 1)


def _demonstrated(plan: Plan, command: str) -> Outcome:
    from httpx_p2pcache.cli.demo import demonstrate

    if importlib.util.find_spec("libp2p") is None:
        fail(f"{command}: libp2p is not installed: pip install 'httpx-p2pcache[p2p]'", 2)
    try:
        with _Bars(len(plan.targets)) as bars:
            return demonstrate(plan, bars.advance)
    except RuntimeError as exc:
        fail(f"{command}: {exc}", 2)


class _Bars:
    """Live progress on a terminal's standard error; nothing in a pipe."""

    def __init__(self, urls: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress: Any = Progress(*columns, console=Console(stderr=True), transient=True)
        self._urls = urls
        self._tasks: dict[tuple[str, int], int] = {}

    def __enter__(self) -> _Bars:
        if sys.stderr.isatty():
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def advance(self, name: str, runner: int, done: int) -> None:
        task = self._tasks.get((name, runner))
        if task is None:
            task = self._progress.add_task(f"{name}, runner {runner + 1}", total=self._urls)
            self._tasks[name, runner] = task
        self._progress.update(task, completed=done)


def _show(outcome: Outcome) -> None:
    without, shared = outcome.without, outcome.with_sharing
    table(
        ("", "without sharing", "with sharing"),
        [
            ("requests", without.asked, shared.asked),
            ("answers that were right", without.right, shared.right),
            ("calls that reached the origin", without.origin_calls, f"[bold]{shared.origin_calls}[/]"),
            ("calls that counted (304s are free)", without.counted_calls, f"[bold]{shared.counted_calls}[/]"),
            ("share of counted calls saved", "", f"[bold green]{outcome.saved:.0%}[/]"),
            ("seconds from start to last answer", f"{without.seconds:.1f}", f"{shared.seconds:.1f}"),
        ],
        f"{outcome.runners} runners x {outcome.urls} URLs, begun in the same second",
    )
    if shared.sources:
        table(
            ("source", "answers", "median ms", "p99 ms"),
            [(name, f.count, f"{f.median_ms:.1f}", f"{f.p99_ms:.1f}") for name, f in shared.sources.items()],
            "With sharing: where answers came from",
        )
    table(
        ("runner", "local", "peer", "origin", "joined after s", "done after s"),
        [
            (number, *(counts[name] for name in ("local", "peer", "origin", "joined", "seconds")))
            for number, counts in enumerate(shared.runners, 1)
        ],
        "With sharing: each runner",
    )
    if not outcome.right:
        errors = [*without.errors, *shared.errors]
        print(f"Not every answer was right. {errors[0] if errors else ''}")

"""The commands, their options, and how their results are shown."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from httpx_p2pcache import __version__
from httpx_p2pcache.cli import nodes
from httpx_p2pcache.cli.demo import Outcome, Plan, demonstrate
from httpx_p2pcache.testing import from_har, made_up

app = typer.Typer(
    help="An HTTP cache that a fleet of machines shares without a server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


for commands in (nodes.app,):
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what sharing saves: runners that ask for the same URLs in the same second, alone and as a fleet.

    Starts a stand-in for GitHub's API on this machine and real runner processes, first without sharing and then with
    it. Exit status 0: every answer was byte for byte the origin's; 1: one was not; 2: it could not be run.
    """
    try:
        resources = made_up(urls) if har is None else from_har(har, urls)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--har") from exc
    plan = Plan(
        runners=runners,
        resources=resources,
        latency=latency / 1000,
        own_tokens=own_tokens,
        stagger=stagger,
        concurrency=concurrency,
        client=client.value,
    )
    try:
        with _Bars(runners, len(resources)) as bars:
            outcome = demonstrate(plan, bars.advance)
    except RuntimeError as exc:
        print(f"p2pcache demo: {exc}", file=sys.stderr)
        raise typer.Exit(2) from exc
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(outcome)).decode())
    else:
        _show(outcome)
    raise typer.Exit(0 if outcome.right else 1)


class _Bars:
    """Live progress on a terminal's standard error; nothing in a pipe."""

    def __init__(self, runners: int, urls: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._runners, self._urls = runners, urls
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
        self._progress.update(task, completed=done)  # type: ignore[arg-type] # TaskID is an int


def _show(outcome: Outcome) -> None:
    console = Console()
    without, shared = outcome.without, outcome.with_sharing
    calls = Table(title=f"{outcome.runners} runners x {outcome.urls} URLs, begun in the same second")
    calls.add_column("")
    calls.add_column("without sharing", justify="right")
    calls.add_column("with sharing", justify="right")
    calls.add_row("requests", str(without.asked), str(shared.asked))
    calls.add_row("answers that were right", str(without.right), str(shared.right))
    calls.add_row("calls that reached the origin", str(without.origin_calls), f"[bold]{shared.origin_calls}[/]")
    calls.add_row("calls that counted (304s are free)", str(without.counted_calls), f"[bold]{shared.counted_calls}[/]")
    calls.add_row("share of counted calls saved", "", f"[bold green]{outcome.saved:.0%}[/]")
    calls.add_row("seconds from start to last answer", f"{without.seconds:.1f}", f"{shared.seconds:.1f}")
    console.print(calls)
    if shared.sources:
        latency = Table(title="With sharing: where answers came from")
        for heading in ("source", "answers", "median ms", "p99 ms"):
            latency.add_column(heading, justify="left" if heading == "source" else "right")
        for source, figures in shared.sources.items():
            latency.add_row(source, str(figures.count), f"{figures.median_ms:.1f}", f"{figures.p99_ms:.1f}")
        console.print(latency)
    each = Table(title="With sharing: each runner")
    for heading in ("runner", "local", "peer", "origin", "joined after s", "done after s"):
        each.add_column(heading, justify="right")
    for number, counts in enumerate(shared.runners, 1):
        each.add_row(str(number), *(str(counts[name]) for name in ("local", "peer", "origin", "joined", "seconds")))
    console.print(each)
    if not outcome.right:
        errors = [*without.errors, *shared.errors]
        console.print(f"[red]Not every answer was right.[/] {errors[0] if errors else ''}")

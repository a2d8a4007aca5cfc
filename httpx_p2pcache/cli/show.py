"""How results are shown: tables on a terminal, aligned columns in a pipe, JSON for scripts; and how commands fail."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Annotated, Any, NoReturn

import msgspec
import typer

from httpx_p2pcache.daemon import life
from httpx_p2pcache.exceptions import SettingsError
from httpx_p2pcache.settings import Settings

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_BOLD = re.compile(r"(\[bold[a-z ]*\])([^\[\]]*)\[/\]")  # the one markup that our own cells have


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "", *, numbers: bool = True) -> None:
    """Rows under named columns; ``numbers``: all columns but the first are aligned to the right.

    A cell may be bold, as rich writes it, which a pipe does not get; anything else is shown as it is.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        shown = Table(title=title or None)
        for number, column in enumerate(columns):
            shown.add_column(column, justify="right" if numbers and number else "left", overflow="fold")
        for row in cells:
            shown.add_row(*(cell if _BOLD.fullmatch(cell) else escape(cell) for cell in row))
        console = Console()
        if console.measure(shown).maximum <= console.width or len(columns) < 3:
            console.print(shown)
        else:  # a line for each cell can be read, where each column would have three letters
            for row in cells:
                facts((column, _BOLD.sub(r"\2", cell)) for column, cell in zip(columns, row, strict=True))
                print()
        return
    plain = [[_BOLD.sub(r"\2", cell) for cell in row] for row in [list(columns), *cells]]
    widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
    if title:
        print(title)
    for row in plain:
        padded = [
            cell.rjust(width) if numbers and number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Names and what is so, a line each."""
    for name, text in rows:
        print(f"{name + ':':14} {printable(text)}")


def printable(text: str) -> str:
    """``text`` without what commands a terminal: peers and origins choose their own names."""
    return "".join(character if character.isprintable() else "?" for character in text)


def print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def fail(text: str, status: int = 1) -> NoReturn:
    """Say what is wrong on standard error, and exit."""
    print(f"p2pcache: {text}", file=sys.stderr)
    raise typer.Exit(status)


def running(settings: Settings, as_json: bool, why: str = "", *, nothing: object = None) -> dict[str, Any]:
    """The daemon's status; without one the command ends with status 1: ``why`` it is needed is said, or as JSON
    ``nothing``, which is that none runs unless it is given."""
    status: dict[str, Any] | None = life.Remote(settings.dir).get("/status")
    if status is None:
        if as_json:
            print_json({"running": False} if nothing is None else nothing)
            raise typer.Exit(1)
        fail(f"no daemon runs in {settings.dir}{why}: p2pcache init starts one")
    return status


def settings_or_exit() -> Settings:
    """The environment's settings; a bad one ends the command with status 2."""
    try:
        return Settings.from_env()
    except SettingsError as exc:
        fail(str(exc), 2)


def short(peer_id: str) -> str:
    """A peer ID as far as people compare it: its end."""
    return f"…{peer_id[-8:]}"


def amount(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def ago(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

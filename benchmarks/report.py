"""``docs/benchmarks.md`` and its pictures, made of ``benchmarks/results``: ``python -m benchmarks.report``."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

TITLES = {
    "hit": "A local hit",
    "start": "To begin with",
    "peers": "Peers",
    "fleet": "The main job, by client",
    "faults": "When something goes wrong, and polling",
    "finding": "Finding each other, and strangers",
    "daemon": "The daemon",
    "adapters": "Other clients",
    "scale": "From 10 to 10,000 nodes, simulated",
    "soak": "Twenty minutes of load",
}
HEAD = """# Benchmarks

`make bench` measures all of this anew, and writes this page. Everybody who is compared does the same work in the same
run, in turns; figures are medians. `python -m benchmarks NAME` does one part, `--quick` a short one, `--json` prints it.

"""
CONTEST = """## The main job, done by everybody

A cold fleet of runner processes asks for the same URLs, in the same order, beginning in the same second, four requests at
a time where nothing else is said, against a stand-in for GitHub that takes 80 ms. Each library is used as its own documentation says, made to store
what is `private`, or it would store nothing; the proxies are told to keep tokens apart, and nginx and Squid to take
60 seconds for the lifetime of everything, since they do not obey the lifetime of what is private. A proxy is a server
that somebody runs; it sees every token and every body. What a process does once (its imports, its connection to the proxy,
ours to the other runners) is done by everybody before the clock starts.

Beside the figures: nginx's low median comes with its lock, which looks every half second whether the answer is there. A
client's own write drops nothing from nginx, Squid or Varnish. hishel keeps tokens apart where the origin says
`Vary: Authorization`, and requests-cache stores tokens in clear once it is told to. All processes share two cores here.
Twenty runners that ask for one thing after another, as a script does, are what they can carry; with four requests each, 80 at
once, ours is measured at its limit: a peer has a quarter of a second (`CACHE_LOOKUP_TIMEOUT`), and who is not answered by then
goes to the origin. A daemon for each makes that forty processes. hishel with
Redis takes part where `redis` is installed beside it, which this project does not do.

"""
WHAT = """What the columns mean: *calls* reached the origin, *count* of these count against a rate limit (a 304 is free), *whole* is the
time until the last runner had its last answer, then the time of one answer: median and 99th percentile.

"""

SCALE = """The node's real code on a simulated network (`httpx_p2pcache.testing.simulation`): 2,000 requests by random nodes for 400
URLs, the n-th of them 1/n as often as the first, in four seconds; the fleet has been there for long. *A miss* is a request
that its own runner cannot answer: one question, one answer, and for who fetches the publication and its acknowledgement.
Up to fifty nodes what one has fetched is pushed to all besides; beyond, it lies at its home, one of fifty. Then a node that
has not asked that home for half a minute connects to it first, which is most of what a miss costs where each node asks
but once. Squirrel (Iyer, Rowstron and Druschel, PODC 2002), whose home nodes are all nodes, came close to the hit ratio of
one central cache with some hops through an overlay for each miss; here it is all of it, with one. The price is the load:
fifty nodes bear it, the busiest as shown.

"""


def write() -> None:
    """Make the page of what results there are."""
    page = HEAD
    contest = _read("contest")
    if contest:
        page += CONTEST + WHAT
        for number, (title, rows) in enumerate(contest["figures"].items()):
            page += f"### {title}\n\n"
            if number < 2:
                (DOCS / f"contest-{number}.svg").write_text(picture(title, rows))
                page += f'<img src="contest-{number}.svg" width="760" alt="{title}: calls that count, for each.">\n\n'
            page += table(rows) + "\n"
        page += _taken(contest)
    for name, title in TITLES.items():
        result = _read(name)
        if result:
            figures = dict(result["figures"])
            series = {key: figures.pop(key) for key in list(figures) if key.startswith("series: ")}
            page += f"## {title}\n\n"
            for key, rows in series.items():
                _, about, columns = key.split(": ")
                (DOCS / f"{name}.svg").write_text(curves(about, columns.split(", ")[1:], rows))
                page += f'<img src="{name}.svg" width="760" alt="{about}: {columns}.">\n\n'
            if name == "scale":
                page += SCALE + sizes(figures) + "\n" + _taken(result, name)
                continue
            page += "| what | measured |\n|---|---|\n"
            page += "".join(f"| {what} | {_shown(figure)} |\n" for what, figure in figures.items())
            page += "\n" + _taken(result, name)
    (DOCS / "benchmarks.md").write_text(page.rstrip() + "\n")


def _read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _taken(result: Any, name: str = "contest") -> str:
    return f"<small>`python -m benchmarks {name}`, {result['date']}: {result['machine']}; {result['versions']}.</small>\n\n"


def _shown(figure: Any) -> str:
    return ", ".join(map(str, figure)) if isinstance(figure, list) else str(figure)


def table(rows: dict[str, Any]) -> str:
    lines = "| | calls | count | right | whole, s | median, ms | p99, ms |\n|---|--:|--:|--:|--:|--:|--:|\n"
    for name, row in rows.items():
        if "skipped" in row:
            lines += f"| {name} | not measured: {row['skipped']} |||||\n"
            continue
        shown = f"**{name}**" if name.startswith("ours") else name
        numbers = f"{row['calls']:.0f} | {row['counted']:.0f} | {row['right']} | {row['seconds']:.2f}"
        lines += f"| {shown} | {numbers} | {row['p50']:.0f} | {row['p99']:.0f} |\n"
    return lines


def sizes(figures: dict[str, dict[str, Any]]) -> str:
    """A column for each size."""
    names = list(next(iter(figures.values())))
    lines = f"| | {' | '.join(figures)} |\n|---|{'--:|' * len(figures)}\n"
    return lines + "".join(f"| {name} | {' | '.join(str(row[name]) for row in figures.values())} |\n" for name in names)


def picture(title: str, rows: dict[str, Any]) -> str:
    """Bars: for each the calls that count, and beside it the time of the whole."""
    shown = {name: row for name, row in rows.items() if "skipped" not in row}
    most = max((row["counted"] for row in shown.values()), default=1) or 1
    height, parts = 46 + 26 * len(shown), []
    for number, (name, row) in enumerate(shown.items()):
        y, width = 40 + 26 * number, 400 * row["counted"] / most
        kind = "own" if name.startswith("ours") else "bar"
        parts.append(f'<text class="ink" x="150" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="{kind}" x="160" y="{y}" width="{width:.0f}" height="18" rx="3"/>')
        words = f"{row['counted']:.0f} calls · {row['seconds']:.1f} s · p99 {row['p99']:.0f} ms"
        parts.append(f'<text class="soft" x="{168 + width:.0f}" y="{y + 13}">{words}</text>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img" font-family="system-ui, sans-serif" font-size="13">
<title>{escape(title)}: calls that count</title>
<style>
  .ink {{ fill: #1f2328 }} .soft {{ fill: #59636e }} .bar {{ fill: #afb8c1 }} .own {{ fill: #0969da }}
  @media (prefers-color-scheme: dark) {{ .ink {{ fill: #f0f6fc }} .soft {{ fill: #9198a1 }} .bar {{ fill: #656c76 }} .own {{ fill: #4493f8 }} }}
</style>
<text class="ink" x="10" y="22" font-weight="600">{escape(title)}: calls that count</text>
{chr(10).join(parts)}
</svg>
"""


def curves(about: str, names: list[str], rows: list[list[float]]) -> str:
    """Two figures over the time in seconds: rows of time, one, other."""
    last, most = rows[-1][0], 1.2 * max(max(row[1:]) for row in rows)

    def path(column: int) -> str:
        return " ".join(f"{60 + 660 * row[0] / last:.1f},{210 - 180 * row[column] / most:.1f}" for row in rows)

    ends = [(210 - 180 * rows[-1][column] / most, f"{rows[-1][column]:g} {names[column - 1]}") for column in (1, 2)]
    labels = "".join(f'<text class="ink" x="716" y="{y - 8:.0f}" text-anchor="end">{escape(t)}</text>' for y, t in ends)
    until = f"{last / 60:.0f} min" if last > 120 else f"{last:g} s"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 250" role="img" font-family="system-ui, sans-serif" font-size="13">
<title>{escape(about)}</title>
<style>
  .ink {{ fill: #1f2328 }} .soft {{ fill: #59636e }} .axis {{ stroke: #afb8c1; fill: none }} .one {{ stroke: #0969da; fill: none; stroke-width: 2 }} .two {{ stroke: #bc4c00; fill: none; stroke-width: 2 }}
  @media (prefers-color-scheme: dark) {{ .ink {{ fill: #f0f6fc }} .soft {{ fill: #9198a1 }} .axis {{ stroke: #656c76 }} .one {{ stroke: #4493f8 }} .two {{ stroke: #f0883e }} }}
</style>
<text class="ink" x="10" y="16" font-weight="600">{escape(about)}</text>
<path class="axis" d="M60 24V210H720"/>
<polyline class="one" points="{path(1)}"/><polyline class="two" points="{path(2)}"/>
{labels}
<text class="soft" x="60" y="232">0</text><text class="soft" x="720" y="232" text-anchor="end">{until}</text>
</svg>
"""


if __name__ == "__main__":
    write()

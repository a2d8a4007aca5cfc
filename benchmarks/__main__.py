"""``python -m benchmarks [NAME ...] [--quick] [--json]``: medians of runs taken in turns, and their ratios.

Results go to ``benchmarks/results/NAME.json`` as well, and of these ``docs/benchmarks.md`` is made; ``--quick`` and
``--json`` leave both as they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import adapters, contest, daemon, faults, finding, fleet, hit, peers, report, scale, start

BENCHMARKS = {
    "hit": hit.run,
    "start": start.run,
    "contest": contest.run,
    "fleet": fleet.run,
    "peers": peers.run,
    "faults": faults.run,
    "finding": finding.run,
    "daemon": daemon.run,
    "adapters": adapters.run,
}
QUICK = {"hit": hit.run, "start": start.run, "contest": lambda: contest.run(quick=True)}
LONG = {"scale": scale.run, "soak": daemon.soak}  # only by name
RESULTS = Path(__file__).with_name("results")


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    packages = ("httpx-p2pcache", "httpx", "hishel", "libp2p")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, "
        f"Python {platform.python_version()}",
        "versions": versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"which: {', '.join(BENCHMARKS)} (default: all of these), {', '.join(LONG)} (twenty minutes each)",
    )
    parser.add_argument("--quick", action="store_true", help="hit, start and one turn of contest: two minutes")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - {*BENCHMARKS, *LONG}
    if unknown:
        parser.error(
            f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join([*BENCHMARKS, *LONG])}"
        )
    known = {**BENCHMARKS, **LONG, **(QUICK if chosen.quick else {})}
    results: dict[str, Any] = {}
    names = chosen.names or list(QUICK if chosen.quick else BENCHMARKS)
    for number, name in enumerate(names, 1):
        print(f"{name} ({number} of {len(names)}) ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        results[name] = {**machine(), "figures": known[name]()}
        print(f"  took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if not chosen.quick and not chosen.json:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(results[name], indent=2) + "\n")
    if chosen.json:
        print(json.dumps(results, indent=2))
        return
    for name, result in results.items():
        print(name)
        for what, figure in result["figures"].items():
            print(f"  {what:70} {figure}")
    if not chosen.quick:
        report.write()


main()

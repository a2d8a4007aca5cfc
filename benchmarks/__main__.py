"""``python -m benchmarks [NAME ...] [--json]``: medians of runs taken in turns, and their ratios."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from typing import Any

from benchmarks import adapters, daemon, faults, finding, fleet, hit, start

BENCHMARKS = {
    "hit": hit.run,
    "start": start.run,
    "fleet": fleet.run,
    "faults": faults.run,
    "finding": finding.run,
    "daemon": daemon.run,
    "adapters": adapters.run,
}
LONG = {"soak": daemon.soak}  # only by name


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"which: {', '.join(BENCHMARKS)} (default: all of these), soak (ten minutes)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - {*BENCHMARKS, *LONG}
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    for name in chosen.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = {**BENCHMARKS, **LONG}[name]()
    if chosen.json:
        print(json.dumps(results, indent=2))
        return
    for name, figures in results.items():
        print(f"{name}: {figures}" if isinstance(figures, str) else name)
        if isinstance(figures, dict):
            for what, figure in figures.items():
                print(f"  {what:58} {figure}")


main()

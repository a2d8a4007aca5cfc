"""The command ``p2pcache``."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path


def main() -> None:
    """What the console script calls."""
    if sys.stdout is None:  # it is closed
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or a name may have letters that it cannot write
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from httpx_p2pcache.cli.app import app
    except ImportError as exc:
        if exc.name not in ("typer", "rich"):
            raise
        print("p2pcache: the command needs the extra cli: pip install 'httpx-p2pcache[cli]'", file=sys.stderr)
        sys.exit(2)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as exc:  # there is no room left where it is written to
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the end
        print(f"p2pcache: the result could not be written: {exc.strerror}", file=sys.stderr)
        sys.exit(2)

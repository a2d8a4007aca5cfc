"""A second of each fuzz target, by chance alone; ``make fuzz`` runs them for minutes, guided by coverage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.p2p
@pytest.mark.parametrize("name", ["frames", "admission", "entries", "registry", "settings", "fields", "door"])
def test_what_reads_the_bytes_of_others_survives_them(name: str) -> None:
    pytest.importorskip("libp2p")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, "--plain", "--seconds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout
    last = done.stdout.strip().splitlines()[-1].split()
    assert last[0] == f"{name}:"
    assert int(last[1]) > 100, "it has hardly run"

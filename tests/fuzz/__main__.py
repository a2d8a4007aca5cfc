"""``python -m tests.fuzz NAME [--seconds N | --runs N] [--plain] [--seed N] [FILE ...]``; without NAME: what there is.

With atheris it is guided by coverage, without (or with ``--plain``) inputs are random mutations of seeds. Each finding
is printed once, by the place where it was raised, with the input that shows it. ``FILE``: run only these inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    atheris = None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("name", nargs="?")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    told = parser.parse_args()
    seconds = told.seconds or (float("inf") if told.runs else 60.0)
    guided = atheris is not None and not told.plain and not told.files
    with atheris.instrument_imports(include=["httpx_p2pcache", "hishel"]) if guided else contextlib.nullcontext():
        from tests.fuzz import targets
    if told.name not in targets.TARGETS:
        print("\n".join(targets.TARGETS))
        return 2
    target = targets.TARGETS[told.name]
    warnings.simplefilter("error")
    logging.disable(logging.CRITICAL)
    found: dict[str, bytes] = {}
    runs = 0

    def one(data: bytes) -> None:
        nonlocal runs
        runs += 1
        try:
            target.run(data)
        except Exception as group:
            exc: Any = group
            while hasattr(exc, "exceptions"):  # a task group's
                exc = exc.exceptions[0]
            frames = traceback.extract_tb(exc.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "httpx_p2pcache" in f.filename]
            place = f"{type(exc).__name__} at {ours[-1] if ours else f'{frames[-1].filename}:{frames[-1].lineno}'}"
            if place not in found:
                found[place] = data
                print(f"FOUND {place}: {str(exc)[:200]!r}\n  {data[:400]!r}", flush=True)

    began = time.monotonic()

    def summary() -> int:
        print(f"{told.name}: {runs} runs in {time.monotonic() - began:.0f} s, {len(found)} findings", flush=True)
        return 1 if found else 0

    if guided:
        corpus = Path(f"/tmp/p2pcache-fuzz-{told.name}")
        corpus.mkdir(exist_ok=True)
        for number, seed in enumerate(target.seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        words = corpus.with_suffix(".dict")
        words.write_text("".join('"' + "".join(f"\\x{b:02x}" for b in w[:60]) + '"\n' for w in targets.WORDS))
        limit = [f"-runs={told.runs}"] if told.runs else [f"-max_total_time={int(seconds)}"]
        options = ["-max_len=8192", f"-dict={words}", "-verbosity=0", "-timeout=60", "-rss_limit_mb=4096", *limit]

        def guided_one(data: bytes) -> None:
            one(data)
            if (told.runs and runs >= told.runs) or time.monotonic() - began > seconds:
                status = summary()
                targets.close()
                sys.stdout.flush()
                os._exit(status)  # libFuzzer has no other way to end in order

        atheris.Setup([sys.argv[0], *options, str(corpus)], guided_one)
        atheris.Fuzz()
        return 0
    if told.files:
        for file in told.files:
            one(file.read_bytes())
    else:
        chance = random.Random(told.seed)
        for seed in target.seeds:
            one(seed)
        while runs < told.runs if told.runs else time.monotonic() - began < seconds:
            one(mutated(chance, target.seeds, targets.WORDS))
    targets.close()
    return summary()


def mutated(chance: random.Random, seeds: list[bytes], words: list[bytes]) -> bytes:
    """One of ``seeds``, changed in one to six places."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 6)):
        at, kind = chance.randrange(len(data) + 1), chance.randrange(7)
        if kind == 0:
            data[at:at] = chance.choice(words)
        elif kind == 1:
            data[at : at + chance.randint(1, 8)] = b""
        elif kind == 2 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            data[at : at + 4] = chance.randbytes(chance.randint(1, 6))
        elif kind == 4:
            other = chance.choice(seeds)
            data[at:] = other[chance.randrange(len(other) + 1) :]
        elif kind == 5:
            data[at:at] = data[at : at + chance.randint(1, 40)] * chance.randint(1, 8)
        else:
            data[at : at + chance.randint(1, 30)] = chance.choice(words)
    return bytes(data[:65536])


if __name__ == "__main__":
    sys.exit(main())

"""How long a query takes beside another program that keeps one processor busy.

    python scripts/bench/busy.py [MODEL] [--queries 800] [--markdown FILE]

A query is divided among threads at some sixty places, and each waits for the slowest thread. Prints
the median and the 99th percentile, in milliseconds, with as many threads as processors and with
one, alone and beside a program that does nothing but count. Linux only: that program is kept to
the last processor.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import results  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.pretrained import hub  # noqa: E402

QUERY = "how do I change the oil of my car"
COUNT = "import os, sys\nos.sched_setaffinity(0, [int(sys.argv[1])])\nwhile True: pass"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=hub.DEFAULT_MODEL)
    parser.add_argument("--queries", type=int, default=800)
    results.add_option(parser)
    options = parser.parse_args()
    title = "A query beside a busy program"
    with results.recorded(options.markdown, title, fenced=False):
        measure(options.model, options.queries)


def measure(model: str, queries: int) -> None:
    """Print what so many queries took, each way."""
    encoder = SentenceEncoder.from_pretrained(model, device="cpu")
    processors = sorted(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    print(f"{queries} queries of {encoder.token_counts([QUERY])[0]} tokens each way:\n")
    print("| | threads | median ms | p99 ms | p99 over median |\n|---|---:|---:|---:|---:|")
    try:
        for name, busy in (("alone", []), ("beside a busy program", processors[-1:])):
            with _counting(busy):
                for threads in sorted({len(processors), 1}, reverse=True):
                    torch.set_num_threads(threads)
                    took = sorted(_milliseconds(encoder, queries))
                    middle, most = median(took), took[int(0.99 * len(took))]
                    cells = f"{middle:.2f} | {most:.2f} | {most / middle:.1f}"
                    print(f"| {name} | {threads} | {cells} |")
    finally:
        torch.set_num_threads(before)


def _milliseconds(encoder: SentenceEncoder, queries: int) -> Iterator[float]:
    for number in range(-20, queries):
        start = time.perf_counter()
        encoder.encode([QUERY])
        if number >= 0:
            yield 1000 * (time.perf_counter() - start)


@contextmanager
def _counting(processors: list[int]) -> Iterator[None]:
    """Keep processors busy inside a `with`."""
    command = [sys.executable, "-c", COUNT]
    others = [subprocess.Popen([*command, str(number)]) for number in processors]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()

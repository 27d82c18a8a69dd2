"""Plan what it takes to embed a billion sentences: time, machines, money and bytes.

    python scripts/bench/plan.py [--sample my_texts.jsonl] [--sentences 2e8] [--price-per-hour 0.40]

A sample is embedded on this machine, its cores divided between processes in different ways that
take turns; each rate is the median of the rounds. By default the sample is 2,000 stretches of
English of 8 to 25 tokens (W1 of `bench.py`). Texts of your own give a better plan: time goes with
tokens. The rest is arithmetic: nothing is taken off for machines that wait, fail or differ, and the
texts themselves are not counted as bytes. GB are 10^9 bytes.
"""

import argparse
import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import torch  # noqa: E402

import results  # noqa: E402
from bench import make_texts  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.errors import InputError, MinilmError  # noqa: E402
from minilm.files.tables import read_table  # noqa: E402
from minilm.pretrained.hub import DEFAULT_MODEL  # noqa: E402

Way = tuple[str, int, int]  # dtype, processes, threads of each


def ways(cores: int) -> list[tuple[int, int]]:
    """Return how cores can be divided: one thread alone, then all of them in processes of a few."""
    some = {(cores // threads, threads) for threads in (1, 2, 4, 8, 16, cores) if threads <= cores}
    return sorted({(1, 1), *some}, key=lambda way: (way[0] * way[1] > 1, *way))


def sizes(width: int, links: int = 32) -> dict[str, tuple[int, int]]:
    """Return how many bytes a vector takes in memory and on a disk, by form or index.

    A graph takes 4 d + 8 M bytes ("Guidelines to choose an index" in the wiki of faiss).
    """
    float32, int8, bits = 4 * width, width, math.ceil(width / 8)
    return {
        "flat, float32": (float32, 0),
        "flat, float16": (2 * width, 0),
        "flat, int8, the best rescored in float32": (int8, float32),
        "flat, binary, the best rescored in int8": (bits, int8),
        f"HNSW graph, float32, M={links}": (float32 + 8 * links, 0),
    }


def measure(model: str, texts: list[str], tokens: int, options: Any) -> dict[Way, list[float]]:
    """Return tokens a second in each round, by way; `tokens` are read of the texts together."""
    found: dict[Way, list[float]] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        runs: dict[Way, Callable[[list[str]], object]] = {}
        for dtype in ("float32", "bfloat16"):
            encoder = SentenceEncoder.from_pretrained(model, device="cpu", dtype=dtype)
            if str(encoder.dtype) != f"torch.{dtype}":
                continue  # not on this processor, as a warning says
            for divided in ways(options.cores):
                runs[dtype, *divided] = encode_in(encoder, *divided, stack)
        for run in runs.values():
            run(texts[: len(texts) // 10 + 1])  # copies of the weights are made, processes start
        for _, (way, run) in itertools.product(range(options.rounds), runs.items()):
            passes, start, spent = 0, time.perf_counter(), 0.0
            while spent < options.seconds:
                run(texts)
                passes, spent = passes + 1, time.perf_counter() - start
            found.setdefault(way, []).append(passes * tokens / spent)
    return found


def encode_in(
    encoder: SentenceEncoder, processes: int, threads: int, stack: contextlib.ExitStack
) -> Callable[[list[str]], object]:
    """Return `encode` in so many processes of so many threads; the stack ends them."""
    torch.set_num_threads(processes * threads)  # a pool divides them
    pool = None
    if processes > 1:
        pool = stack.enter_context(encoder.start_multi_process_pool(["cpu"] * processes))

    def run(texts: list[str]) -> object:
        torch.set_num_threads(threads)
        part = math.ceil(len(texts) / processes / 4) if pool else None  # enough for full passes
        return encoder.encode(texts, pool=pool, chunk_size=part, truncation="silent")

    return run


def read_sample(path: str, column: str | None) -> list[str]:
    """Return at most 2,000 texts, from all over a file."""
    texts = read_table([path], column).texts
    if not texts:
        raise InputError(f"{path}: has no texts", path)
    step = max(1, len(texts) / 2000)
    return [texts[int(number * step)] for number in range(min(len(texts), 2000))]


def scan_rate(width: int) -> float:
    """Return bytes a second of the dot products of one query with 400 MB of vectors."""
    vectors, query = torch.ones(10**8 // width, width), torch.ones(width)  # zeros would be one page
    times = [time.perf_counter() for _ in range(8) if vectors.mv(query) is not None]
    return 4 * vectors.numel() / min(b - a for a, b in itertools.pairwise(times))


def as_markdown(
    rates: dict[Way, list[float]], tokens: float, width: int, scan: float, options: Any
) -> str:
    """Return the plan for texts of so many tokens, with the fastest way of each dtype."""
    lines = ["| dtype | processes × threads | tokens/s (range) | tokens/s a core |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    best: dict[str, tuple[float, int]] = {}
    for (dtype, processes, threads), found in rates.items():
        rate, cores = statistics.median(found), processes * threads
        best[dtype] = max(best.get(dtype, (0.0, 0)), (rate, cores))
        spread = f"{rate:,.0f} ({min(found):,.0f}-{max(found):,.0f})"
        lines += [f"| {dtype} | {processes} × {threads} | {spread} | {rate / cores:,.0f} |"]

    def row(name: str, values: list[float]) -> None:
        cells = [f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    count = options.sentences
    lines += ["", f"{count:,.0f} texts of {tokens:.1f} tokens, the fastest way of each dtype:", ""]
    lines += [f"| | {' | '.join(best)} |", "| --- |" + " ---: |" * len(best)]
    hours = {dtype: count * tokens / rate / 3600 for dtype, (rate, _) in best.items()}
    row("texts/s of one such machine", [rate / tokens for rate, _ in best.values()])
    row("core-hours", [hours[dtype] * cores for dtype, (_, cores) in best.items()])
    for machines in (1, 10, 100):
        row(f"days on {machines} of them", [each / 24 / machines for each in hours.values()])
    if price := options.price_per_hour:
        row(f"cost at {price:g} a machine-hour", [each * price for each in hours.values()])
    lines += ["", "| vectors and index | GB in memory | GB on a disk |", "| --- | ---: | ---: |"]
    for name, each in sizes(width).items():
        row(name, [count * size / 1e9 for size in each])
    seconds = f"{count * 4 * width / scan:,.1f} s a query in float32"
    lines += ["", f"An exact search goes through all: {seconds}, at {scan / 1e9:.1f} GB/s here."]
    return "\n".join(lines)


def positive(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError(text)
    return number


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--sample", metavar="FILE", help=".txt, .jsonl or .csv of texts like yours")
    add("--column", help="where they are in it")
    add("--sentences", type=positive, default=1e9, help="how many to embed (1e9)")
    add("--price-per-hour", type=positive, help="of a machine like this one")
    add("--cores", type=int, choices=range(1, 1025), default=torch.get_num_threads(), metavar="N")
    add("--model", default=DEFAULT_MODEL)
    add("--rounds", type=int, default=3)
    add("--seconds", type=positive, default=1.5, help="of each way in a round (1.5)")
    results.add_option(parser)
    options = parser.parse_args(arguments)
    try:
        encoder = SentenceEncoder.from_pretrained(options.model, device="cpu")
        if options.sample:
            texts = read_sample(options.sample, options.column)
        else:
            texts = make_texts(encoder.token_counts, 1.0)["W1"]
        tokens = sum(min(n, encoder.max_seq_length) for n in encoder.token_counts(texts))
        rates = measure(options.model, texts, tokens, options)
    except (MinilmError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1
    width = encoder.get_sentence_embedding_dimension()
    with results.recorded(options.markdown, "A billion sentences", fenced=False):
        print(as_markdown(rates, tokens / len(texts), width, scan_rate(width), options))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python3
"""What it takes to embed a billion sentences: time, machines and bytes, from a rate measured now.

    python scripts/plan.py
    python scripts/plan.py --sample my_texts.jsonl --sentences 2e8 --price-per-hour 0.40

A sample is embedded on this machine, with its cores divided between processes in different ways,
all of them busy at once; all ways take turns, and each rate is the median of the rounds. It takes
about a minute. By default the sample is 2,000 stretches of English of 8 to 25 tokens (W1 of
scripts/bench.py). Texts of your own, by `--sample`, give a better plan: time goes with tokens.

The rest is arithmetic: nothing is taken off for machines that wait, fail or differ, and the texts
themselves are not counted as bytes. GB are 10^9 bytes.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout is enough

import torch  # noqa: E402

from bench import make_texts  # noqa: E402
from minilm import SentenceEncoder, __version__  # noqa: E402
from minilm.errors import InputError, MinilmError  # noqa: E402
from minilm.files.tables import read_table  # noqa: E402
from minilm.inputs import check_positive_int  # noqa: E402
from minilm.pretrained.hub import DEFAULT_MODEL  # noqa: E402

DTYPES = ("float32", "bfloat16")
LINKS = 32  # of each vector of a graph, M in hnswlib and faiss
GB = 1e9


# --- the arithmetic -------------------------------------------------------------------------------


def bytes_per_vector(width: int) -> dict[str, int]:
    """What a vector of `width` numbers takes, by precision."""
    return {
        "float32": 4 * width,
        "float16": 2 * width,
        "int8": width,
        "binary": math.ceil(width / 8),
    }


@dataclass(frozen=True)
class Index:
    """What an index takes, in bytes a vector.

    Attributes:
        name: What it is.
        memory: What a search reads all of, or anywhere in: it has to be in memory.
        disk: What is read of the best few only: it may stay on a disk.
    """

    name: str
    memory: int
    disk: int


def indexes(width: int, links: int = LINKS) -> list[Index]:
    """What indexes of vectors of `width` numbers take.

    That of the graph is the formula of faiss, 4 d + 8 M bytes a vector ("Guidelines to choose an
    index" in its wiki); hnswlib says the same, 8 to 10 M bytes beside the vectors (ALGO_PARAMS.md).
    """
    size = bytes_per_vector(width)
    return [
        Index("flat, float32", size["float32"], 0),
        Index("flat, int8, the best rescored in float32", size["int8"], size["float32"]),
        Index("flat, binary, the best rescored in int8", size["binary"], size["int8"]),
        Index(f"HNSW graph, float32, M={links}", size["float32"] + 8 * links, 0),
    ]


def core_hours(tokens: float, tokens_per_second: float, cores: int) -> float:
    """How long one core would work on tokens that `cores` of them do at that rate."""
    return tokens / tokens_per_second * cores / 3600


def days(tokens: float, tokens_per_second: float, machines: int) -> float:
    """How long so many machines work, each at that rate."""
    return tokens / tokens_per_second / machines / 86400


def cost(tokens: float, tokens_per_second: float, price_per_hour: float) -> float:
    """What a machine of that rate, at that price, costs for so many tokens, however many share."""
    return tokens / tokens_per_second / 3600 * price_per_hour


def gigabytes(count: float, bytes_each: int) -> float:
    """How many GB so many things are."""
    return count * bytes_each / GB


def ways(cores: int) -> list[tuple[int, int]]:
    """How cores can be divided: pairs of processes and threads of each. All but the first, one
    thread alone, use them all, but for a remainder.
    """
    divided = {
        (cores // threads, threads) for threads in (1, 2, 4, 8, 16, cores) if threads <= cores
    }
    return sorted({(1, 1), *divided}, key=lambda way: (way[0] * way[1] > 1, *way))


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """How fast a dtype was, with the cores divided in one way.

    Attributes:
        tokens_per_second: Of all processes together: the median of the rounds.
        slowest, fastest: Of the rounds.
    """

    dtype: str
    processes: int
    threads: int
    tokens_per_second: float
    slowest: float
    fastest: float

    @property
    def cores(self) -> int:
        return self.processes * self.threads


def measure(
    model: str, texts: list[str], dtypes: tuple[str, ...], rounds: int, seconds: float, cores: int
) -> list[Rate]:
    """Embed the sample, in each way in turn.

    Args:
        model: A name or a folder.
        texts: The sample.
        dtypes: What to compute in.
        rounds: How often.
        seconds: About how long each time.
        cores: How many there are to use.
    """
    runs: list[tuple[tuple[str, int, int], Callable[[list[str]], object]]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        for dtype in dtypes:
            encoder = SentenceEncoder.from_pretrained(model, device="cpu", dtype=dtype)
            for processes, threads in ways(cores):
                run = encode_in(encoder, processes, threads, stack)
                runs.append(((dtype, processes, threads), run))
        counts = encoder.token_counts(texts)
        kept = [min(count, encoder.max_seq_length) for count in counts]
        samples: list[tuple[list[str], int]] = []
        found: list[list[float]] = []
        for _, run in runs:
            few, tokens = so_many(texts, kept, sum(kept) / 10)
            run(few)  # the copies of the weights are made, the processes are there
            rate = tokens / timed(lambda: run(few))  # noqa: B023
            samples.append(so_many(texts, kept, seconds * rate))
            found.append([])
        for _ in range(rounds):
            for (_, run), (sample, tokens), rates in zip(runs, samples, found, strict=True):
                rates.append(tokens / timed(lambda: run(sample)))  # noqa: B023
    return [
        Rate(*way, statistics.median(rates), min(rates), max(rates))
        for (way, _), rates in zip(runs, found, strict=True)
    ]


def encode_in(
    encoder: SentenceEncoder, processes: int, threads: int, stack: contextlib.ExitStack
) -> Callable[[list[str]], object]:
    """`encode`, in so many processes of so many threads."""
    torch.set_num_threads(processes * threads)  # which a pool divides
    options: dict[str, Any] = {"truncation": "silent", "show_progress_bar": False}
    if processes > 1:
        pool = stack.enter_context(encoder.start_multi_process_pool(["cpu"] * processes))

        def run_pool(texts: list[str]) -> object:
            part = math.ceil(len(texts) / processes / 4)  # large enough for full passes
            return encoder.encode(texts, pool=pool, chunk_size=part, **options)

        return run_pool

    def run(texts: list[str]) -> object:
        torch.set_num_threads(threads)
        return encoder.encode(texts, **options)

    return run


def so_many(texts: list[str], counts: list[int], wanted: float) -> tuple[list[str], int]:
    """The first of the texts, or all of them again and again, that have so many tokens together.

    Returns:
        They, at least one, and how many tokens they have.
    """
    chosen, tokens = [], 0
    for text, count in itertools.cycle(zip(texts, counts, strict=True)):
        chosen.append(text)
        tokens += count
        if tokens >= wanted:
            return chosen, tokens
    raise AssertionError("a cycle has no end")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def scan_rate(width: int, cores: int, megabytes: int = 400) -> float:
    """Bytes a second of the dot products of one query with many vectors, so many cores together."""
    vectors = torch.ones(megabytes * 10**6 // (4 * width), width)  # not zeros: all would be a page
    query = torch.ones(width)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(cores)
        return 4 * vectors.numel() / min(timed(lambda: vectors @ query) for _ in range(7))


def read_sample(path: str | None, column: str | None, encoder: SentenceEncoder) -> list[str]:
    """At most 2,000 texts, from all over the file.

    Raises:
        InputError: The file has none, or is broken.
    """
    if path is None:
        tokenizer = encoder.tokenizer
        assert tokenizer is not None
        return make_texts(lambda words: tokenizer(words).token_counts, 1.0)["W1"]
    texts = read_table([path], column).texts
    if not texts:
        raise InputError(f"{path}: has no texts", path)
    step = max(1, len(texts) / 2000)
    return [texts[int(number * step)] for number in range(min(len(texts), 2000))]


# --- the plan -------------------------------------------------------------------------------------


def make_plan(
    rates: list[Rate],
    counts: list[int],
    limit: int,
    width: int,
    sentences: float,
    machines: list[int],
    price_per_hour: float | None,
    bytes_per_second: float,
) -> dict[str, Any]:
    """All numbers that are printed.

    Args:
        rates: What was measured. For each dtype the fastest way counts.
        counts: Tokens of each text of the sample, before any cut.
        limit: How many of a text are read.
        width: Of a vector.
        sentences: How many there are to embed.
        machines: For how many to tell the days.
        price_per_hour: Of a machine.
        bytes_per_second: That a search gets through.
    """
    kept = [min(count, limit) for count in counts]
    tokens = sentences * sum(kept) / len(kept)
    work = {}
    for dtype in dict.fromkeys(rate.dtype for rate in rates):
        best = max(
            (rate for rate in rates if rate.dtype == dtype), key=lambda rate: rate.tokens_per_second
        )
        rate = best.tokens_per_second
        work[dtype] = {
            "tokens_per_second": rate,
            "sentences_per_second": rate * sentences / tokens,
            "cores": best.cores,
            "core_hours": core_hours(tokens, rate, best.cores),
            "days": {str(number): days(tokens, rate, number) for number in machines},
            "cost": None if price_per_hour is None else cost(tokens, rate, price_per_hour),
        }
    return {
        "sentences": sentences,
        "sample": {
            "texts": len(kept),
            "tokens_mean": sum(kept) / len(kept),
            "tokens_min": min(kept),
            "tokens_max": max(kept),
            "cut": sum(count > limit for count in counts),
        },
        "tokens": tokens,
        "rates": [dataclasses.asdict(rate) for rate in rates],
        "work": work,
        "price_per_hour": price_per_hour,
        "vectors_gb": {
            name: gigabytes(sentences, size) for name, size in bytes_per_vector(width).items()
        },
        "indexes_gb": {
            index.name: {
                "memory": gigabytes(sentences, index.memory),
                "disk": gigabytes(sentences, index.disk),
            }
            for index in indexes(width)
        },
        "scan": {
            "bytes_per_second": bytes_per_second,
            "seconds_per_query": sentences * 4 * width / bytes_per_second,
        },
    }


def as_markdown(plan: dict[str, Any]) -> str:
    """The plan as three tables."""
    sample, work = plan["sample"], plan["work"]
    cut = f"; {sample['cut']:,} are longer than the limit and were cut" if sample["cut"] else ""
    lengths = f"{sample['tokens_min']} to {sample['tokens_max']} tokens"
    lengths += f", {sample['tokens_mean']:.1f} in the mean"
    lines = [
        f"Measured on {plan['machine']}, {sample['texts']:,} texts of {lengths}{cut}:",
        "",
        "| dtype | processes × threads | tokens/s (range) | tokens/s a core |",
        "| --- | ---: | ---: | ---: |",
    ]
    for rate in plan["rates"]:
        cores, speed = rate["processes"] * rate["threads"], rate["tokens_per_second"]
        lines.append(
            f"| {rate['dtype']} | {rate['processes']} × {rate['threads']} | {speed:,.0f} "
            f"({rate['slowest']:,.0f}-{rate['fastest']:,.0f}) | {speed / cores:,.0f} |"
        )
    tokens = f"{plan['sentences']:,.0f} texts like these are {plan['tokens'] / 1e9:,.1f} billion"
    lines += [
        "",
        f"{tokens} tokens; with the fastest way of each dtype:",
        "",
        f"| | {' | '.join(work)} |",
        f"| --- |{' ---: |' * len(work)}",
    ]
    each = list(work.values())
    rows: dict[str, list[str]] = {
        "texts/s of one such machine": [f"{one['sentences_per_second']:,.0f}" for one in each],
        "core-hours": [f"{one['core_hours']:,.0f}" for one in each],
    }
    for number in each[0]["days"]:
        name = f"days on {int(number):,} such {'machine' if number == '1' else 'machines'}"
        some = [one["days"][number] for one in each]
        rows[name] = [f"{count:,.1f}" if count >= 1 else f"{count:.2f}" for count in some]
    if plan["price_per_hour"] is not None:
        name = f"cost at {plan['price_per_hour']:g} a machine-hour"
        rows[name] = [f"{one['cost']:,.0f}" for one in each]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += ["", "| vectors alone | GB |", "| --- | ---: |"]
    lines += [f"| {name} | {size:,.1f} |" for name, size in plan["vectors_gb"].items()]
    lines += ["", "| index | GB in memory | GB on a disk |", "| --- | ---: | ---: |"]
    for name, size in plan["indexes_gb"].items():
        disk = f"{size['disk']:,.1f}" if size["disk"] else ""
        lines.append(f"| {name} | {size['memory']:,.1f} | {disk} |")
    speed = plan["scan"]["bytes_per_second"] / GB
    lines.append(
        f"\nAn exact search goes through all vectors: at the {speed:.1f} GB/s measured here, "
        f"{plan['scan']['seconds_per_query']:,.1f} s a query in float32 on one such machine that "
        "holds them, or that divided by as many machines as share them."
    )
    return "\n".join(lines)


def describe_machine(cores: int) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    name = found[1] if found else "a processor"
    return f"{cores} cores of {name} (torch {torch.__version__}, minilm {__version__})"


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    options = parse(arguments)
    try:
        cores = check_positive_int(options.cores, "--cores")
        if not 1 <= options.sentences < math.inf:
            raise InputError(f"--sentences is {options.sentences}; pass 1 or more", "--sentences")
        for number in options.machines:
            check_positive_int(number, "--machines")
        for name in ("rounds", "seconds"):
            if getattr(options, name) <= 0:
                raise InputError(f"--{name} is not above 0", f"--{name}")
        encoder = SentenceEncoder.from_pretrained(options.model, device="cpu")
        texts = read_sample(options.sample, options.column, encoder)
        rates = measure(
            options.model, texts, tuple(options.dtype), options.rounds, options.seconds, cores
        )
    except (MinilmError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1
    width = encoder.get_sentence_embedding_dimension()
    plan = make_plan(
        rates,
        encoder.token_counts(texts),
        encoder.max_seq_length,
        width,
        options.sentences,
        options.machines,
        options.price_per_hour,
        scan_rate(width, cores),
    )
    plan = {"machine": describe_machine(cores), **plan}
    print(json.dumps(plan, indent=1) if options.json else as_markdown(plan))
    load = os.getloadavg()[0] - cores if hasattr(os, "getloadavg") else 0.0
    if load > 1:
        print(
            f"plan: about {load:.0f} more processes than these wanted the {cores} cores; the rates "
            "are too low",
            file=sys.stderr,
        )
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", metavar="FILE", help=".txt, .jsonl or .csv of texts like yours")
    parser.add_argument("--column", help="where they are in it")
    parser.add_argument("--sentences", type=float, default=1e9, help="how many to embed (1e9)")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--price-per-hour", type=float, help="of a machine like this one")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cores", type=int, default=torch.get_num_threads(), help="to use")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each way in a round (1.5)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())

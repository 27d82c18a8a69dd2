"""Measure how fast exact search is, beside faiss; and what search by smaller codes loses.

    python scripts/bench/bench_search.py [--vectors N] [--threads N] [--rounds N]
                                         [--queries 1,16,256] [--folder FOLDER] [--markdown FILE]
    python scripts/bench/bench_search.py --recall [--model FOLDER] [--data FOLDER] [--markdown FILE]

The first needs `pip install "minilm[bench]"` (faiss-cpu) and, for the million vectors of the
default, 4 GB of memory and 2 GB of disk. The vectors are random, of length 1 and width 384, from a
fixed seed; each query is one of them with noise. Exact search takes as long for any others, while
candidates found by bits are bad here: for what codes find see --recall. All systems run in this
process with the same number of threads, in turn: A B C, A B C, ... What is compared is the ratio
within a round to the better of two ways that faiss has; the table gives medians and ranges of the
rounds. The index is memory-mapped from a file (in the system's cache after the first round), faiss
holds a copy in memory. Whether both find the same ids in the same order is counted too.

The second encodes SciFact and prints, for int8 and binary codes and several multipliers, how many
of the ten nearest are found, nDCG@10, and the bytes of a vector.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import results  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.index import Index  # noqa: E402
from minilm.pretrained import hub  # noqa: E402
from minilm.quantize import model_ranges, quantize_embeddings  # noqa: E402
from minilm.tasks import quantized_search, semantic_search  # noqa: E402
from retrieval import DATA, FILES, SCIFACT, ndcg, read_retrieval  # noqa: E402

Array = np.ndarray[Any, Any]
Ids = list[list[int]]
Search = Callable[[Array], Ids]

WIDTH, TOP_K, BLOCK = 384, 10, 50_000
# From how many queries on faiss takes a matrix product is a setting of its own, and its default is
# another in each version. So both ways are measured, and the better one is what we compare with.
MOST_ONE_BY_ONE = 32  # queries; for more it takes ten times as long as the other
PEERS = ("faiss IndexFlatIP, one by one", "faiss IndexFlatIP, matrix product")
NOISE = 0.7  # of a query's length: its nearest is clear, the others are not


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = parser.add_argument
    add("--vectors", type=int, default=1_000_000, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=usable, metavar="N", help="default: %(default)s")
    add("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    add("--queries", default="1,16,256", metavar="N,...", help="batches (default: %(default)s)")
    add("--folder", type=Path, help="make the index in here (default: a temporary folder)")
    add("--recall", action="store_true", help="measure what is lost, not how fast it is")
    add("--model", default=hub.DEFAULT_MODEL, metavar="FOLDER")
    add("--data", type=Path, default=DATA)
    results.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    title = "What search by smaller codes loses" if options.recall else "Speed of exact search"
    with results.recorded(options.markdown, title, fenced=False):
        if options.recall:
            return recall(options)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            return speed(options, Path(folder))


# --- how fast


def speed(options: argparse.Namespace, folder: Path) -> int:
    try:
        import faiss
    except ImportError:
        print('bench_search: needs faiss: pip install "minilm[bench]"', file=sys.stderr)
        return 2
    faiss.omp_set_num_threads(options.threads)
    blocks = ((part, [f"vector {i}" for i in range(len(part))]) for part in made(options.vectors))
    started = time.perf_counter()
    index = Index.create(folder / "index", None, blocks, codes=["binary"])
    seconds = time.perf_counter() - started
    [vectors] = index.vectors
    int8 = np.concatenate(
        [
            quantize_embeddings(vectors[start : start + BLOCK], "int8", model_ranges())
            for start in range(0, len(vectors), BLOCK)
        ]
    )
    flat = faiss.IndexFlatIP(WIDTH)
    for start in range(0, len(vectors), BLOCK):
        flat.add(vectors[start : start + BLOCK])

    def of_index(precision: str) -> Search:
        return lambda queries: [
            [hit["corpus_id"] for hit in hits]
            for hits in index.search(queries, TOP_K, fingerprint=None, precision=precision)
        ]

    def ids(results: list[list[dict[str, Any]]]) -> Ids:
        return [[hit["corpus_id"] for hit in hits] for hits in results]

    def of_faiss(threshold: int) -> Search:
        def search(queries: Array) -> Ids:
            faiss.cvar.distance_compute_blas_threshold = threshold
            found: Ids = flat.search(queries, TOP_K)[1].tolist()
            return found

        return search

    systems: dict[str, Search] = {
        PEERS[0]: of_faiss(1 << 30),
        PEERS[1]: of_faiss(0),
        "Index.search": of_index("float32"),
        "semantic_search": lambda queries: ids(
            semantic_search(queries, vectors, query_chunk_size=256, top_k=TOP_K)
        ),
        "Index.search, binary x 4": of_index("binary"),
        "int8 x 4, rescored": lambda queries: ids(
            quantized_search(queries, int8, "int8", TOP_K, rescore_embeddings=vectors)
        ),
    }
    print(
        f"{len(vectors):,} vectors of width {WIDTH}, top {TOP_K}, {options.threads} threads, "
        f"{options.rounds} rounds; faiss {faiss.__version__}, torch {torch.__version__}; "
        f"the index was written in {seconds:.0f} s\n"
    )
    print("| queries | system | ms | queries/s | times the better faiss | memory, MB | same ids |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for count in map(int, options.queries.split(",")):
        slow = PEERS[0] if count > MOST_ONE_BY_ONE else None
        measured = {name: search for name, search in systems.items() if name != slow}
        measure(measured, queries_near(vectors, count), options.rounds)
    return 0


def measure(systems: dict[str, Search], queries: Array, rounds: int) -> None:
    """Print a row of the table for each system."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    memory: dict[str, float] = {}
    found: dict[str, Ids] = {}
    for name, search in systems.items():  # to warm up
        with Memory() as watched:
            found[name] = search(queries)
        memory[name] = watched.grown
    for _ in range(rounds):
        for name, search in systems.items():
            time.sleep(0.05)  # threads that wait for more work by turning in a circle stop
            started = time.perf_counter()
            search(queries)
            seconds[name].append(time.perf_counter() - started)
    peers = [name for name in PEERS if name in systems]
    base = min(peers, key=lambda name: statistics.median(seconds[name]))
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[base], times, strict=True)]
        median = statistics.median(times)
        same = np.mean([a == b for a, b in zip(found[name], found[base], strict=True)])
        print(
            f"| {len(queries)} | {name} | {1e3 * median:.1f} | {len(queries) / median:.0f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{memory[name]:.0f} | {same:.1%} |",
            flush=True,
        )


class Memory:
    """The largest memory of its own that this process has inside a `with` statement, in MB (Linux).

    What is mapped from a file doesn't count: the system takes it back when it needs it.
    """

    grown = float("nan")

    def __enter__(self) -> "Memory":
        self.done, self.before = threading.Event(), own_memory()
        self.highest = self.before
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.highest = max(self.highest, own_memory())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.grown = self.highest - self.before


def own_memory() -> float:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return float("nan")
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


def made(count: int) -> Iterator[Array]:
    """Yield random vectors of length 1, block by block."""
    generator = np.random.default_rng(0)
    for start in range(0, count, BLOCK):
        yield unit(generator.standard_normal((min(BLOCK, count - start), WIDTH), np.float32))


def queries_near(vectors: Array, count: int) -> Array:
    generator = np.random.default_rng(1)
    chosen = vectors[np.sort(generator.choice(len(vectors), count, replace=False))]
    noise = unit(generator.standard_normal((count, WIDTH), np.float32))
    return unit(chosen + np.float32(NOISE) * noise)


def unit(vectors: Array) -> Array:
    found: Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found.astype(np.float32)


# --- what is lost


def recall(options: argparse.Namespace) -> int:
    folder = options.data / SCIFACT
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        print(f"error: {folder} lacks {missing[0]}; see --data", file=sys.stderr)
        return 2
    encoder = SentenceEncoder.from_pretrained(options.model)
    data = read_retrieval(folder)
    queries, vectors = (
        encoder.encode(texts, truncation="silent") for texts in (data.queries, data.documents)
    )
    int8 = quantize_embeddings(vectors, "int8", model_ranges())
    bits = quantize_embeddings(vectors, "binary")
    exact = semantic_search(queries, vectors, top_k=TOP_K)
    print(
        f"SciFact: {len(queries)} queries, {len(vectors)} documents; read: bytes of a vector that "
        "a search reads; kept: those, and what candidates are rescored with\n"
    )
    print("| codes | rescored with | multiplier | recall@10 | nDCG@10 | read | kept |")
    print("|---|---|---:|---:|---:|---:|---:|")

    def row(name: str, by: str, multiplier: str, results: Any, read: int, kept: int) -> None:
        pairs = zip(rows_of(results), rows_of(exact), strict=True)
        found = np.mean([len(set(a) & set(b)) / TOP_K for a, b in pairs])
        print(
            f"| {name} | {by} | {multiplier} | {found:.3f} | "
            f"{ndcg(rows_of(results), data.grades):.4f} | {read} | {kept} |"
        )

    full, small = 4 * WIDTH, WIDTH // 8
    row("float32", "", "", exact, full, full)
    row("int8", "", "", quantized_search(queries, int8, "int8", TOP_K), WIDTH, WIDTH)
    for name, codes, read, rescored in (
        ("int8", int8, WIDTH, (("float32", vectors, full),)),
        ("binary", bits, small, (("the bits", None, 0), ("int8", int8, WIDTH),
                                 ("float32", vectors, full))),
    ):  # fmt: skip
        for by, better, more in rescored:
            for multiplier in (1, 2, 4, 8, 16):
                results = quantized_search(
                    queries,
                    codes,
                    name,
                    TOP_K,
                    rescore_embeddings=better,
                    rescore_multiplier=multiplier,
                )
                row(name, by, str(multiplier), results, read, read + more)
    return 0


def rows_of(results: list[list[dict[str, Any]]]) -> Ids:
    return [[hit["corpus_id"] for hit in hits] for hits in results]


if __name__ == "__main__":
    sys.exit(main())

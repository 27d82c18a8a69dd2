"""How should a column of vectors be written, so that Polars, DuckDB and PyArrow scan it fast?

    python scripts/bench/parquet.py [--vectors 1000000] [--rounds 3] [--markdown FILE]

Writes parts of 4,096 rows (a text, and 384 seeded float32 numbers of length 1) in several ways, the
present one (`minilm.files.shards.parquet_settings`) among them, and lets each tool that is
installed read the vectors of all parts. Prints bytes and, for each tool, the seconds of the clock
and of the processor in the fastest round, since the former also depend on what else a machine does.
The last row is no way to write vectors, but the floor for any: the same numbers as a plain column,
without lists. Then one bit of a page of vectors is flipped, and it says which tools notice.
"""

import argparse
import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import results  # noqa: E402
from minilm.files.arrow import embedding_array  # noqa: E402
from minilm.files.shards import parquet_settings  # noqa: E402

ROWS = 4096
VECTORS = "embedding.list.element"


def tables(count: int) -> Iterator[pa.Table]:
    """Yield the tables of the parts."""
    generator = np.random.default_rng(0)
    for start in range(0, count, ROWS):
        rows = min(ROWS, count - start)
        vectors = generator.standard_normal((rows, 384), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        texts = [f"sentence {start + row} of {row * 7919 % 1000} others" for row in range(rows)]
        column = embedding_array(vectors)
        field = pa.field("embedding", column.type, nullable=False)
        yield pa.table({"text": texts}).append_column(field, column)


def ways(now: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings to compare."""
    whole = {"row_group_size": ROWS}
    zstd = now | {"compression": now["compression"] | {VECTORS: "zstd"}}
    snappy = now["compression"] | {"text": "snappy"}
    return {
        "now": now,
        "4,096 rows a group": now | whole,
        "256 rows a group": now | {"row_group_size": 256},
        "texts in snappy": now | {"compression": snappy},
        "snappy, 4,096 rows a group (0.1.0)": now | whole | {"compression": "snappy"},
        "zstd": zstd,
        "zstd, BYTE_STREAM_SPLIT": zstd | {"column_encoding": {VECTORS: "BYTE_STREAM_SPLIT"}},
    }


def readers() -> dict[str, Callable[[Path], Any]]:
    """What reads all vectors of a folder, by the name of the tool."""
    found: dict[str, Callable[[Path], Any]] = {
        "pyarrow": lambda folder: pq.read_table(folder, columns=["embedding"])
    }
    if importlib.util.find_spec("polars"):
        polars = importlib.import_module("polars")
        found["polars"] = lambda folder: polars.read_parquet(f"{folder}/", columns=["embedding"])
    if importlib.util.find_spec("duckdb"):
        duckdb = importlib.import_module("duckdb")
        found["duckdb"] = lambda folder: duckdb.sql(
            f"select embedding from '{folder}/*.parquet'"
        ).to_arrow_table()
    return found


def measure(count: int, rounds: int) -> None:
    """Print the table."""
    tools = readers()
    versions = ", ".join(f"{tool} {sys.modules[tool].__version__}" for tool in tools)
    print(f"{count:,} vectors in parts of {ROWS:,} rows; {versions}.\n")
    print("| settings | MB | " + " | ".join(f"{tool}, s (processor)" for tool in tools) + " |")
    print("|---|---:|" + "---:|" * len(tools))
    now = parquet_settings(next(tables(1)))
    plain = now | {"compression": "none", "use_dictionary": False, "row_group_size": 1024 * 384}
    for name, settings in (*ways(now).items(), ("no lists", plain)):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for number, table in enumerate(tables(count)):
                if settings is plain:
                    table = pa.table({"embedding": table["embedding"].combine_chunks().flatten()})
                pq.write_table(table, folder / f"part-{number:05}.parquet", **settings)
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            cells = [fastest(read, folder, rounds) for read in tools.values()]
            print(f"| {name} | {size:,.1f} | {' | '.join(cells)} |", flush=True)
            if settings == now:
                damage = noticed(folder, tools)
    print("\nWhat snappy saves of the vectors, zstd saves of the texts. Without compression a")
    print("reader is spared a copy. Where the last row is far below all others, most of the time")
    print("goes into putting lists together, which no setting changes.")
    print(f"\nA bit of the vectors flipped, with checksums of pages: {damage}.")


def fastest(read: Callable[[Path], Any], folder: Path, rounds: int) -> str:
    """The least time of the clock, and of the processor."""
    times = []
    for _ in range(rounds):
        clock, processor = time.perf_counter(), time.process_time()
        read(folder)
        times.append((time.perf_counter() - clock, time.process_time() - processor))
    return "{:.2f} ({:.2f})".format(*map(min, zip(*times, strict=True)))


def noticed(folder: Path, tools: dict[str, Callable[[Path], Any]]) -> str:
    """Damage a part, and say which tools raise an error."""
    path = folder / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(0).column(1)
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    said = []
    for tool, read in tools.items():
        try:
            read(folder)
        except Exception as error:
            said.append(f"{tool} raises {type(error).__name__}")
        else:
            said.append(f"{tool} reads it")
    return ", ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    results.add_option(parser)
    options = parser.parse_args()
    title = "Vectors in Parquet: settings and scans"
    with results.recorded(options.markdown, title, fenced=False):
        measure(options.vectors, options.rounds)


if __name__ == "__main__":
    main()

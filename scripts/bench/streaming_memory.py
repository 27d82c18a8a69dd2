"""Does the memory of `minilm encode FILE -o FOLDER` grow with the file? 200,000 lines, embedded.

    python scripts/bench/streaming_memory.py [--rows 8000] [--dtype bfloat16] [--form jsonl]
                                              [--markdown FILE]

Makes a file of seeded sentences, embeds it into a folder of Parquet files, and meanwhile looks at
the memory of this process, which is all that works. Prints for each tenth of the rows the largest
memory seen, then how much more the later tenths needed than the first.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import results  # noqa: E402
from minilm import SentenceEncoder, TruncationWarning  # noqa: E402
from minilm.files.shards import part_paths  # noqa: E402
from minilm.files.streaming import encode_files  # noqa: E402
from minilm.inference.kernels import keep_few_kernels  # noqa: E402
from minilm.pretrained.hub import WEIGHTS_FOLDER  # noqa: E402

FLAT = 0.05  # of the first tenth's memory: what later ones may need more, to be called flat
POLL = 0.02  # seconds

NOUNS = ("dog", "river", "teacher", "engine", "garden", "market", "window", "letter", "mountain")
VERBS = ("sees", "follows", "builds", "reads", "crosses", "remembers", "paints", "hears", "sells")
PLACES = ("by the sea", "in the old town", "at night", "before the rain", "on Monday", "far away")


def sentence(generator: random.Random) -> str:
    """Return a sentence of 4 to some 100 words."""
    clauses = []
    for _ in range(generator.choice([1, 1, 1, 2, 2, 3, 5, 12])):
        subject, object_ = generator.choice(NOUNS), generator.choice(NOUNS)
        number = generator.randrange(1000)
        clauses.append(f"the {subject} {generator.choice(VERBS)} {object_} {number}")
        clauses.append(generator.choice(PLACES))
    return ", ".join(clauses) + "."


def write_rows(file: IO[str], form: str, rows: int) -> None:
    """Write rows with a number and a text each."""
    generator = random.Random(0)
    writer = csv.writer(file)
    if form == "csv":
        writer.writerow(["id", "text"])
    for row in range(rows):
        text = sentence(generator)
        if form == "csv":
            writer.writerow([row, text])
        else:
            file.write(json.dumps({"id": row, "text": text}) + "\n")


def resident() -> int:
    """Return the bytes of memory that this process has now (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system doesn't tell the memory of a process in /proc")


def watch(folder: Path, parts: int, peaks: list[int], stop: threading.Event) -> None:
    """Note the largest memory of each tenth of the parts."""
    while not stop.wait(POLL):
        tenth = min(9, 10 * len(part_paths(folder)) // parts)
        peaks[tenth] = max(peaks[tenth], resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--shard-rows", type=int, help="(default: 4096, or a 40th of the rows)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--form", choices=("jsonl", "csv"), default="jsonl")
    parser.add_argument("--model", default=str(WEIGHTS_FOLDER))
    results.add_option(parser)
    options = parser.parse_args()
    shard_rows = options.shard_rows or max(1, min(4096, options.rows // 40))
    parts = -(-options.rows // shard_rows)
    if parts < 10:
        parser.error("argument --shard-rows: leaves less than 10 parts, too few for tenths")
    with results.recorded(options.markdown, "Memory while files of any size are embedded"):
        measure(options, shard_rows, parts)


def measure(options: argparse.Namespace, shard_rows: int, parts: int) -> None:
    """Embed a file and print what memory it took."""
    keep_few_kernels()  # as the command does
    encoder = SentenceEncoder.from_pretrained(options.model, dtype=options.dtype, device="cpu")
    with tempfile.TemporaryDirectory() as place:
        source, output = Path(place, f"rows.{options.form}"), Path(place, "vectors")
        with source.open("w", encoding="utf-8", newline="") as file:
            write_rows(file, options.form, options.rows)
        output.mkdir()
        size = source.stat().st_size
        print(
            f"{options.rows:,} rows, {size / 1e6:.1f} MB of {options.form}; "
            f"{str(encoder.dtype).removeprefix('torch.')}, "
            f"{torch.get_num_threads()} threads; {parts} parts of {shard_rows:,} rows"
        )
        print(f"before: {resident() / 1e6:,.0f} MB")
        peaks, stop = [0] * 10, threading.Event()
        watcher = threading.Thread(target=watch, args=(output, parts, peaks, stop))
        watcher.start()
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TruncationWarning)
                report = encode_files(encoder, source, output, shard_rows=shard_rows)
        finally:
            stop.set()
            watcher.join()
        seconds = time.perf_counter() - start
        written = sum(path.stat().st_size for path in part_paths(output))
    print("\ntenth  largest memory")
    for number, peak in enumerate(peaks, 1):
        print(f"{number:5}  {peak / 1e6:11,.0f} MB")
    growth = max(peaks[1:]) - peaks[0]
    verdict = "flat" if growth <= FLAT * peaks[0] else "NOT flat"
    print(
        f"\n{report.rows:,} rows, {report.tokens:,} tokens in {seconds:,.0f} s: "
        f"{report.tokens / seconds:,.0f} tokens/s; {written / 1e6:,.0f} MB written\n"
        f"memory after the first tenth: {growth / 1e6:+,.0f} MB "
        f"({100 * growth / peaks[0]:+.1f} %): {verdict}\n"
        f"memory after the first half: {(max(peaks[5:]) - max(peaks[:5])) / 1e6:+,.0f} MB"
    )


if __name__ == "__main__":
    main()

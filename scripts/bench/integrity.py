"""What it costs to hash a model's files each time that they are loaded.

    python scripts/bench/integrity.py [MODEL] [--rounds 15] [--markdown FILE]

Times the loading of a model as it is, and with the hashing left out, in turn; and the steps alone.
Prints medians of the seconds that pass, and of those in which the processor works.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import results  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.pretrained import hub  # noqa: E402
from minilm.source import ModelFiles  # noqa: E402


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=hub.DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=15)
    results.add_option(parser)
    options = parser.parse_args()
    with results.recorded(options.markdown, "What hashing a model's files costs", fenced=False):
        measure(options.model, options.rounds)


def measure(model: str, rounds: int) -> None:
    """Print the medians of so many rounds."""
    files = hub.locate(model)
    weights = files.path("model.safetensors")
    data = weights.read_bytes()

    def load() -> Any:
        return SentenceEncoder.from_pretrained(model, device="cpu")

    def load_unhashed() -> Any:
        with mock.patch.object(ModelFiles, "verify", return_value=None):
            return load()

    steps: dict[str, Callable[[], Any]] = {
        "reading model.safetensors, from the system's cache": weights.read_bytes,
        "SHA-256 of it": lambda: hashlib.sha256(data).digest(),
        "loading the model": load,
        "loading it without hashing": load_unhashed,
        "`minilm verify`, all files": lambda: hub.verify(model),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    load()
    for _ in range(rounds):  # in turn, so that a slow moment is everybody's
        for name, step in steps.items():
            start, worked = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - start, time.process_time() - worked))
    print(f"{files.name}, model.safetensors of {len(data) / 1e6:.1f} MB, median of {rounds}:\n")
    print("| step | seconds | of the processor |\n|---|---:|---:|")
    medians = {name: [median(each) for each in zip(*of, strict=True)] for name, of in times.items()}
    for name, (seconds, worked) in medians.items():
        print(f"| {name} | {seconds:.3f} | {worked:.3f} |")
    hashed, plain = (medians[name][0] for name in list(steps)[2:4])
    print(f"\nHashing while tensors are converted makes loading {hashed - plain:+.3f} s longer.")


if __name__ == "__main__":
    main()

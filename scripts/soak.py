"""Use one model in every way at once for some time, and compare every vector with the first.

    python scripts/soak.py MINUTES [--kill-every 60] [--interrupt-every 120] [--markdown FILE]

What each call should give is computed first, in one thread. Then there are at once: eight threads
that embed, the main thread, a pool of processes, one forked child after another, a thread that
writes an index, and two that search it. Texts are of all lengths; calls differ in dtype, prompt,
truncation, width and batch. Now and then a process of the pool is killed, and Ctrl-C comes.

oneDNN keeps few of its kernels here, as in `minilm encode` and in the processes of a pool. By
default it keeps 1,024 of them, one for each size of a matrix: they add up for as long as new sizes
come, which takes minutes or hours, and would hide what does not end.

Prints how often each gave what it should, the largest memory of this process in every tenth of the
time, and what is left at the end: a thread, a process or a temporary file would be one too many.
Exit code 1 if anything differs, or if after the first minute the second half of the time takes 3 %
more memory than the first.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "scripts"),
    str(ROOT / "scripts" / "bench"),
]  # a bare checkout is enough

import results  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.errors import WorkerError  # noqa: E402
from minilm.index import Index  # noqa: E402
from minilm.inference.kernels import keep_few_kernels  # noqa: E402
from minilm.pretrained.hub import WEIGHTS_FOLDER  # noqa: E402
from streaming_memory import resident  # noqa: E402

THREADS, SEARCHERS, WORKERS = 8, 2, 2
FLAT = 0.03  # of the memory of the first half: what the second may need more
WORDS = "the dog a cat man bites sees sun is out walk walks running cafe . , ! ? Paris 北京 naïve"
QUERIES = ["the cat sees the sun", "a man walks", "?"]
LARGEST_INDEX = 600  # rows; then another is begun
TOP_K = 5


@dataclass(frozen=True)
class Call:
    """A call of `encode`, and the vectors that it should give."""

    dtype: str
    texts: list[str]
    options: dict[str, Any]
    expected: Any


class Soak:
    """All that goes on at once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.random = random.Random(0)
        self.seconds = 60 * options.minutes
        self.kill_every, self.interrupt_every = options.kill_every, options.interrupt_every
        self.encoders = {
            dtype: SentenceEncoder.from_pretrained(options.model, device="cpu", dtype=dtype)
            for dtype in ("float32", "bfloat16")
        }
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.peaks: list[tuple[float, int]] = []
        self.pool: Any = None
        self.place = Path(tempfile.mkdtemp())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self.calls = [self._call() for _ in range(options.calls)]
            self._prepare_index()
        finally:
            torch.set_num_threads(threads)

    # --- what should come out

    def _call(self) -> Call:
        draw = self.random
        dtype = draw.choice(list(self.encoders))
        words = WORDS.split()
        texts = [
            " ".join(draw.choices(words, k=draw.choice([0, 1, 3, 5, 8, 12, 20, 60, 200, 400])))
            for _ in range(draw.choice([1, 1, 2, 5, 16, 40]))
        ]
        options: dict[str, Any] = {
            "truncation": draw.choice(["silent", "silent", "silent", "chunk"]),
            "batch_size": draw.choice([1, 7, 32, 64]),
            "prompt": draw.choice([None, None, "query: "]),
            "truncate_dim": draw.choice([None, None, 16]),
            "normalize_embeddings": draw.choice([False, True]),
            "precision": draw.choice(["float32", "float32", "binary"]),
        }
        return Call(dtype, texts, options, self.encoders[dtype].encode(texts, **options))

    def _prepare_index(self) -> None:
        encoder, words = self.encoders["float32"], WORDS.split()
        self.corpus = [" ".join(self.random.choices(words, k=1 + i % 30)) for i in range(97)]
        self.vectors, self.record = encoder.encode(self.corpus), encoder.fingerprint()
        self.queries = encoder.encode(QUERIES)
        index = Index.create(self.place / "all", self.record, [(self.vectors, self.corpus)])
        hits = index.search(self.queries, len(self.corpus), fingerprint=self.record)
        self.scores = [{hit["corpus_id"]: hit["score"] for hit in found} for found in hits]

    # --- what is done

    def _ran(self, what: str, is_right: bool, detail: str) -> None:
        with self.lock:
            self.counts[what] += 1
            if not is_right:
                self.wrong.append(f"{what}: {detail}")

    def _run(self, what: str, calls: Sequence[Call] | None = None, **more: Any) -> None:
        """Make one of the calls, and compare."""
        call = random.choice(calls or self.calls)
        found = self.encoders[call.dtype].encode(call.texts, **call.options, **more)
        self._ran(what, np.array_equal(found, call.expected), repr(call)[:300])

    def embed(self) -> None:
        """Embed, again and again."""
        while not self.stop.is_set():
            self._run("calls in threads")

    def embed_in_pool(self) -> None:
        """Embed in processes; start others when one was killed."""
        calls = [call for call in self.calls if call.dtype == "float32"]
        while not self.stop.is_set():
            self.pool = self.encoders["float32"].start_multi_process_pool(["cpu"] * WORKERS)
            try:
                while not self.stop.is_set():
                    self._run("calls in a pool", calls, pool=self.pool)
            except WorkerError:
                self.counts["pools started again"] += 1
            finally:
                self.pool.stop()

    def fork(self) -> None:
        """Embed in a forked child, which has none of the threads."""
        while not self.stop.wait(0.5):
            child = os.fork()
            if not child:
                code = 3
                try:
                    wrong = len(self.wrong)
                    self._run("in a child")
                    code = int(len(self.wrong) > wrong)
                finally:
                    os._exit(code)
            for _ in range(6000):  # two minutes, but for those in which all of this is stopped
                if (ended := os.waitpid(child, os.WNOHANG))[0]:
                    break
                time.sleep(0.02)
            if ended[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            self._ran("calls in forked children", ended == (child, 0), f"status {ended}")

    def write(self) -> None:
        """Add rows to an index; begin another when it is large."""
        number = 0
        while not self.stop.is_set():
            folder = self.place / f"index-{number}"
            index = Index.create(folder, self.record)
            self.folder = folder
            while len(index) < LARGEST_INDEX and not self.stop.is_set():
                count = random.choice([1, 1, 3, 20])
                ids = [i % len(self.corpus) for i in range(len(index), len(index) + count)]
                rows = [self.corpus[i] for i in ids]
                index.add(self.vectors[ids], rows, fingerprint=self.record)
                self._ran("writes to an index", True, "")
                time.sleep(0.05)
            index.verify()
            old = self.place / f"index-{number - 1}"
            shutil.rmtree(old, ignore_errors=True)  # nobody has opened that for long
            number += 1

    def search(self) -> None:
        """Search the index that is being written."""
        while not self.stop.is_set():
            index = Index.open(self.folder)
            found = index.search(self.queries, TOP_K, fingerprint=self.record)
            count, size = len(index), len(self.corpus)
            for hits, scores in zip(found, self.scores, strict=True):
                order = sorted(range(count), key=lambda i: (-scores[i % size], i))[:TOP_K]
                expected = [(i, scores[i % size], self.corpus[i % size]) for i in order]
                got = [(hit["corpus_id"], hit["score"], hit["row"]["text"]) for hit in hits]
                self._ran("searches", got == expected, f"{got} of {count} rows, not {expected}")
            time.sleep(0.02)

    def disturb(self) -> None:
        """Kill a process of the pool, and press Ctrl-C, now and then; look at the memory."""
        start = time.monotonic()
        kill, interrupt = start + self.kill_every, start + self.interrupt_every
        while not self.stop.wait(0.5):
            now = time.monotonic()
            self.peaks.append((now - start, resident()))
            processes = [each for each in self.pool["processes"] if each] if self.pool else []
            if now > kill and processes:
                random.choice(processes).kill()
                self.counts["processes killed"] += 1
                kill = now + self.kill_every
            if now > interrupt:
                for each in processes:  # as a terminal does
                    os.kill(each.pid, signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                interrupt = now + self.interrupt_every

    def _guarded(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:
            self._ran(function.__name__, False, f"{type(error).__name__}: {error}")
            self.stop.set()

    def run(self) -> None:
        """Do all of it, and return when the time is over and every thread has ended."""
        jobs = [*[self.embed] * THREADS, self.embed_in_pool, self.fork, self.write,
                *[self.search] * SEARCHERS, self.disturb]  # fmt: skip
        self.folder = self.place / "all"
        threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]
        end = time.monotonic() + self.seconds
        try:
            for thread in threads:
                thread.start()
            while time.monotonic() < end and not self.stop.is_set():
                try:
                    self._run("calls in the main thread")
                except KeyboardInterrupt:
                    self.counts["interrupted by Ctrl-C"] += 1
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(180)
            shutil.rmtree(self.place, ignore_errors=True)


def children() -> set[str]:
    """Return the processes that this one has started (Linux), but for Python's own helper."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text(encoding="utf-8").rpartition(")")[2].split()[1]
            line = path.with_name("cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if parent == str(os.getpid()) and b"resource_tracker" not in line:
            found.add(path.parent.name)
    return found


def growth(peaks: Sequence[tuple[float, int]]) -> float | None:
    """Return how much more memory the second half of the time took, as a part of the first half.

    The first minute, in which caches fill, does not count. Halves, since the largest of many
    minutes is larger than that of one, whether anything grows or not. None if there was no more.
    """
    later = [(when, size) for when, size in peaks if when >= 60]
    middle = (60 + later[-1][0]) / 2 if later else 0
    halves = [[size for when, size in later if (when > middle) == half] for half in (False, True)]
    return max(halves[1]) / max(halves[0]) - 1 if all(halves) else None


def report(soak: Soak, left: list[str]) -> bool:
    """Print what happened; return whether all of it was right."""
    lines = [f"{count:9,} {what}" for what, count in sorted(soak.counts.items())]
    print("\n".join([*lines, f"{len(soak.wrong):9,} differ from what one thread gave", ""]))
    tenths = [0] * 10
    for when, size in soak.peaks:
        tenth = min(9, int(10 * when / soak.seconds))
        tenths[tenth] = max(tenths[tenth], size)
    kernels = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1,024")
    print(f"kernels that oneDNN keeps at most: {kernels}")
    print("largest memory in each tenth of the time, in MB:",
          ", ".join(f"{size / 1e6:.0f}" for size in tenths))  # fmt: skip
    grown = growth(soak.peaks)
    is_flat = grown is None or grown <= FLAT
    verdict = "too short to tell" if grown is None else (
        f"{100 * grown:+.1f} % ({'flat' if is_flat else 'NOT flat'})"
    )  # fmt: skip
    print(f"after the first minute, the second half more than the first: {verdict}")
    print(f"left over: {', '.join(left) or 'no thread, no process, no file'}")
    print("\n".join(soak.wrong[:5]), end="\n" if soak.wrong else "")
    return is_flat and not soak.wrong and not left


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("minutes", type=float)
    parser.add_argument("--model", default=str(WEIGHTS_FOLDER))
    parser.add_argument("--calls", type=int, default=60, help="different ones (default: 60)")
    parser.add_argument("--kill-every", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--interrupt-every", type=float, default=120, metavar="SECONDS")
    results.add_option(parser)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have switched it off
    threads, processes = set(threading.enumerate()), children()
    title = f"{options.minutes:g} minutes of everything at once"
    with (
        results.recorded(options.markdown, title),
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(prefix="soak-") as place,
    ):
        warnings.simplefilter("ignore")
        tempfile.tempdir = place  # so that what is left there is ours
        try:
            soak = Soak(options)
            soak.run()
        finally:
            tempfile.tempdir = None
        soak.pool = None
        left = [f"thread {each.name}" for each in set(threading.enumerate()) - threads]
        left += [f"process {each}" for each in children() - processes]
        left += [f"file {each.name}" for each in Path(place).iterdir()]
        is_right = report(soak, left)
    return int(not is_right)


if __name__ == "__main__":
    keep_few_kernels()
    sys.exit(main())

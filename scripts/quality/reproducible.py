"""Count the numbers that differ between processors, threads, batches and versions of torch.

    python scripts/quality/reproducible.py [--texts FILE] [--python PYTHON] [--markdown FILE]

The texts are embedded in child processes, each as another machine would: by the instructions of
lesser processors (the environment keeps ATen, oneDNN and MKL from those that this one has), in
more threads, in other batches, on the GPU if there is one, and by another Python, whose torch may
be of another version. Each result is compared with that of this processor in one thread, number by
number: of a `reproducible` model, and of one in float32. --texts is a file of texts as `minilm
encode` reads it, by default a third of tests/data/parity_texts.jsonl and the golden texts; --python
is repeatable. Exit status: 0 if at most one number in a million of a reproducible model differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import numpy as np  # noqa: E402
import torch  # noqa: E402

import results  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.parity.foreign import read_texts  # noqa: E402
from minilm.parity.golden import TEXTS  # noqa: E402
from minilm.report import aligned  # noqa: E402

AVX2, SSE = (results.LESSER[name] for name in ("avx2", "sse4"))
MOST = 1e-6  # of the numbers; expected is a tenth of that


@dataclass(frozen=True)
class Machine:
    """One way to compute, in a process of its own."""

    name: str
    limits: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    batch_size: int | None = None
    device: str = "cpu"
    python: str = sys.executable


def machines(pythons: list[str]) -> Iterator[Machine]:
    """List what is compared; the first is what the others are compared with."""
    yield Machine("this processor, 1 thread")
    yield Machine("2 threads", threads=2)
    yield Machine("batches of 5", batch_size=5)
    yield Machine("with AVX2 at most", AVX2)
    yield Machine("with AVX2 at most, 2 threads, batches of 5", AVX2, 2, 5)
    yield Machine("with SSE4 at most", SSE)
    if torch.cuda.is_available():
        yield Machine(torch.cuda.get_device_name(), device="cuda")
    for python in pythons:
        about = "import torch, numpy; print('torch', torch.__version__, 'NumPy', numpy.__version__)"
        name = subprocess.check_output([python, "-c", about], text=True).strip()
        yield Machine(name, python=python)
        yield Machine(f"{name}, AVX2 at most", AVX2, python=python)


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, metavar="FILE", help="what to embed")
    parser.add_argument(
        "--python", action="append", default=[], help="of another environment; repeatable"
    )
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    results.add_option(parser)
    options = parser.parse_args()
    if options.texts is None:
        texts = read_texts(ROOT / "tests" / "data" / "parity_texts.jsonl")[::3]
        texts += [each.text for each in TEXTS]
    else:
        texts = read_texts(options.texts)
    if options.child:
        embed(texts, *options.child)
        return 0
    with (
        tempfile.TemporaryDirectory() as folder,
        results.recorded(options.markdown, "The same vectors on every machine"),
    ):
        return compare(texts, options.texts, options.python, Path(folder))


def compare(texts: list[str], file: Path | None, pythons: list[str], folder: Path) -> int:
    """Embed on each machine, and count."""
    print(f"{len(texts):,} texts, {len(texts) * 384:,} numbers; those that differ from the first\n")
    rows: list[tuple[str, ...]] = [("computed by", "reproducible", "float32")]
    first: dict[str, np.ndarray] = {}
    compared = differed = 0
    for machine in machines(pythons):
        found: list[str] = []
        for kind in ("reproducible", "float32"):
            output = folder / f"{kind}.npy"
            child = [kind, str(output), str(machine.threads), str(machine.batch_size or 0)]
            command = [machine.python, __file__, "--child", *child, machine.device]
            command += [] if file is None else ["--texts", str(file)]
            print(f"{kind}: {machine.name}", file=sys.stderr)
            subprocess.run(command, check=True, env=os.environ | machine.limits)
            vectors = np.load(output)
            if kind not in first:
                first[kind] = vectors
                found.append("-")
                continue
            count = int((vectors != first[kind]).sum())
            found.append(f"{count:,}")
            if kind == "reproducible":
                compared, differed = compared + vectors.size, differed + count
        rows.append((machine.name, *found))
    print("\n".join(aligned(rows, right=(1, 2))))
    print(f"\nreproducible: {differed:,} of {compared:,} numbers differ")
    return 0 if differed <= MOST * compared else 1


def embed(texts: list[str], kind: str, output: str, threads: str, batch: str, device: str) -> None:
    """Embed the texts in this process."""
    torch.set_num_threads(int(threads))
    warnings.simplefilter("ignore")
    encoder = SentenceEncoder.from_pretrained(
        reproducible=kind == "reproducible", device=device, local_files_only=True
    )
    np.save(output, encoder.encode(texts, batch_size=int(batch) or None))


if __name__ == "__main__":
    sys.exit(main())

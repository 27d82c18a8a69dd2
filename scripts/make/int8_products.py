"""Measure what `dtype="int8"` needs: ranges of activations, and the mean error of 8 bits.

    python scripts/make/int8_products.py [--model FOLDER] [--write] [--markdown FILE]

Calibrated is with texts of ours, the same in every run
of one commit: the docstrings of this package, whole and by sentences, stretches of 250 words of
them, words of the vocabulary alone, in random order and repeated, and test texts in other languages
and of odd kinds. Measured is on W1 to W3 of `scripts/bench/bench.py` and on the kind "everyday",
with which nothing was calibrated, and on the other kinds of test texts, with 200 of which it was.
`scripts/quality/evaluate.py --dtype int8` measures similarity and retrieval. --write puts the
numbers into minilm/inference/int8_products.npz.
"""

import argparse
import ast
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]

import results  # noqa: E402
from bench import TEXTS, make_texts  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.inference import int8  # noqa: E402
from minilm.inference.packed import PackedBatch, plan_batches  # noqa: E402
from minilm.pretrained import hub  # noqa: E402
from retrieval import read_jsonl  # noqa: E402

TARGET = ROOT / "minilm" / "inference" / int8.PUBLISHED
MEASURED = ("declaration en", "everyday")  # kinds of test texts that the workloads are made of


def main() -> int:
    """Calibrate, write if asked to, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=hub.DEFAULT_MODEL, metavar="FOLDER")
    parser.add_argument("--write", action="store_true", help=f"into {TARGET.relative_to(ROOT)}")
    results.add_option(parser)
    options = parser.parse_args()
    if not int8.exact_products():
        print("error: this processor has no exact sums of 8-bit products", file=sys.stderr)
        return 2
    with results.recorded(options.markdown, "Products in 8 bits"):
        encoder = SentenceEncoder.from_pretrained(options.model, device="cpu")
        if options.write:
            write(encoder)
        measure(options.model)
    return 0


def write(encoder: SentenceEncoder) -> None:
    """Calibrate, and store what was found as float16, by layer."""
    texts = calibration_texts(encoder)
    ids = encoder.get_tokenizer().tokenize(texts, encoder.max_seq_length).input_ids
    batches = [
        PackedBatch([ids[row] for row in rows]) for rows in plan_batches(list(map(len, ids)), 2048)
    ]
    with torch.no_grad():
        states = [
            encoder.bert.embeddings(batch.input_ids, None, batch.position_ids) for batch in batches
        ]
    calibrations = int8.calibrate(encoder.bert, states, [batch.attend for batch in batches])
    arrays = {
        f"{int8.digest(layer)}/{name}": tensor.numpy().astype(np.float16)
        for layer, calibration in zip(encoder.bert.layers, calibrations, strict=True)
        for name, tensor in calibration.items()
    }
    np.savez_compressed(TARGET, **arrays)  # type: ignore[arg-type]
    print(f"wrote {TARGET.relative_to(ROOT)}, from {len(texts)} texts, {sum(map(len, ids))} tokens")


def calibration_texts(encoder: SentenceEncoder) -> list[str]:
    """Some hundred texts of every kind that the measurements don't have."""
    chance = random.Random(0)
    prose = [
        re.sub(r"\s+", " ", paragraph)
        for path in sorted((ROOT / "minilm").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or "")
        if paragraph
    ]
    sentences = [part for paragraph in prose for part in re.split(r"(?<=[.;:]) ", paragraph)]
    running = " ".join(prose).split()
    starts = [chance.randrange(len(running) - 250) for _ in range(12)]
    words = sorted(filter(str.isalpha, encoder.get_tokenizer().backend.get_vocab()))
    odd = [row["text"] for row in read_jsonl(TEXTS) if row["kind"] not in MEASURED]
    return [
        *chance.sample(prose, 150),
        *chance.sample(sentences, 150),
        *(" ".join(running[start : start + 250]) for start in starts),
        *chance.sample(words, 150),
        *(" ".join(chance.choices(words, k=chance.randint(2, 60))) for _ in range(40)),
        *(" ".join([chance.choice(words)] * chance.choice((2, 5, 20, 100))) for _ in range(20)),
        *chance.sample(odd, 200),
    ]


def measure(model: str) -> None:
    """Print cosines to float64, by workload and by kind of test text."""
    exact = SentenceEncoder.from_pretrained(model, device="cpu", dtype="float64")
    coded = SentenceEncoder.from_pretrained(model, device="cpu", dtype="int8")
    count = exact.get_tokenizer()
    kinds = make_texts(lambda words: count(words).token_counts, 1)
    del kinds["W4"]
    rows = read_jsonl(TEXTS)
    kinds |= {
        name: [row["text"] for row in rows if row["kind"].startswith(name)]
        for name in ("everyday", "declaration", "article 1", "naughty", "special", "code", "emoji")
    }
    print("cosine to float64     texts   lowest     mean")
    for name, texts in kinds.items():
        a, b = (
            torch.from_numpy(encoder.encode(texts, truncation="silent")).double()
            for encoder in (exact, coded)
        )
        cosines = cosine_similarity(a, b)
        print(f"{name:<20}  {len(texts):5}  {cosines.min():.5f}  {cosines.mean():.5f}")


if __name__ == "__main__":
    sys.exit(main())

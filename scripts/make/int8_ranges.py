"""Choose the fixed ranges of int8 vectors, and measure what smaller vectors cost.

    python scripts/make/int8_ranges.py [--model FOLDER] [--data FOLDER] [--write] [--markdown FILE]

The published model's vectors have length 1, so one step for all numbers may do: an int8 code is
round(x / step). The candidates are several steps, and the ranges per dimension that one would take
from vectors at hand: smallest to largest, quantiles, mean ± k standard deviations.

Calibration and measurement never share a text. Calibrated is with STS17 (everyday sentences), each
of its words alone, the Universal Declaration (531 languages) and naughty strings; measured is with
SciFact (abstracts and claims): texts of another kind. The step chosen is the one whose similarities
have the least root mean square error on the worst of the four: one too fine cuts off dimension 99,
which is 0.2 to 0.4 in single words and in text without any, and never so large in sentences.
--write puts it into minilm/int8_ranges.json.
"""

import argparse
import csv
import datetime
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import results  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.pretrained import hub  # noqa: E402
from minilm.quantize import dequantize, model_ranges, quantize_embeddings  # noqa: E402
from retrieval import DATA, FILES, SCIFACT, ndcg, read_jsonl, read_retrieval  # noqa: E402

Array = np.ndarray[Any, Any]
TARGET = ROOT / "minilm" / "int8_ranges.json"
STEPS = {"normalized": (512, 448, 384, 320, 256), "pooled": (80, 64, 56, 48, 40, 32)}
CALIBRATION = ["sts/STS17.en-en.tsv", "text/udhr_article1.jsonl", "text/naughty_strings.jsonl"]
MEASUREMENT = [(SCIFACT / name).as_posix() for name in FILES]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=hub.DEFAULT_MODEL, metavar="FOLDER")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--write", action="store_true", help="into minilm/int8_ranges.json")
    results.add_option(parser)
    options = parser.parse_args()
    needed = CALIBRATION + MEASUREMENT
    if missing := [name for name in needed if not (options.data / name).is_file()]:
        print(f"error: {options.data} lacks {missing[0]}; see --data", file=sys.stderr)
        return 2
    with results.recorded(options.markdown, "Ranges of int8, and what smaller vectors cost"):
        measure(options)
    return 0


def measure(options: argparse.Namespace) -> None:
    """Choose the steps and print what vectors in few bits lose."""
    encoder = SentenceEncoder.from_pretrained(options.model)
    pooling = SentenceEncoder(
        modules=list(encoder)[:2],
        tokenizer=encoder.tokenizer,
        max_seq_length=encoder.max_seq_length,
    )
    kinds = calibration_texts(options.data)
    pooled = {name: pooling.encode(texts) for name, texts in kinds.items()}
    lengthened = {name: unit(vectors) for name, vectors in pooled.items()}
    seen = np.concatenate(list(lengthened.values()))
    data = read_retrieval(options.data / SCIFACT)
    whole = pooling.encode(data.queries), pooling.encode(data.documents)
    queries, documents = map(unit, whole)

    print("root mean square error of the similarities by step, on the texts to calibrate with")
    steps = {
        "normalized": best_step(STEPS["normalized"], lengthened),
        "pooled": best_step(STEPS["pooled"], pooled),
    }
    if options.write:
        weights = hub.locate(options.model).path("model.safetensors")
        TARGET.write_text(json.dumps(report(steps, len(seen), weights), indent=2) + "\n")
        print(f"wrote {TARGET}")

    print(
        "\nranges, measured on SciFact      saturated  rms error   overlap@10: decoded  raw codes"
    )
    held_out = np.concatenate([documents, queries])
    truth = queries @ documents.T
    for name, ranges in candidates(seen).items():
        codes = [quantize_embeddings(part, "int8", ranges) for part in (queries, documents)]
        decoded = [dequantize(part, "int8", ranges) for part in codes]
        error = np.sqrt(np.mean((np.concatenate(decoded[::-1]) - held_out) ** 2))
        raw = overlap(similarities(*codes), truth)
        print(f"{name:<32} {saturated(held_out, ranges):9.3%}  {error:.6f}  "
              f"{overlap(similarities(*decoded), truth):19.3f}  {raw:9.3f}")  # fmt: skip

    print("\nSciFact-small                             nDCG@10  overlap@10  saturated")
    for name, scores, share in forms(whole):
        found = ndcg(best_ten(scores), data.grades)
        print(f"{name:<40}  {found:.4f}  {overlap(scores, truth):10.3f}  {share}")


def calibration_texts(data: Path) -> dict[str, list[str]]:
    with (data / CALIBRATION[0]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    sentences = [row[name] for row in rows for name in ("sentence1", "sentence2")]
    declaration, naughty = (
        [row["text"] for row in read_jsonl(data / name)] for name in CALIBRATION[1:]
    )
    words = sorted({word for text in sentences for word in text.split()})
    return {"STS17": sentences, "words": words, "UDHR": declaration, "naughty": naughty}


def best_step(candidates: tuple[int, ...], kinds: dict[str, Array]) -> float:
    worst = {}
    for number in candidates:
        errors = {}
        for name, vectors in kinds.items():
            codes = quantize_embeddings(vectors, "int8", one_step(1 / number))
            errors[name] = np.std(similarities(codes, codes) - similarities(vectors, vectors))
        worst[number] = max(errors.values())
        print(f"1/{number:<4}", *(f"{name} {error:.5f}  " for name, error in errors.items()))
    chosen = min(worst, key=lambda number: worst[number])
    print(f"chosen: 1/{chosen}")
    return 1 / chosen


def candidates(seen: Array) -> dict[str, Array]:
    mean, std, ends = seen.mean(axis=0), seen.std(axis=0), [seen.min(axis=0), seen.max(axis=0)]
    found = {f"one step, 1/{n}": one_step(1 / n) for n in STEPS["normalized"]}
    found["smallest to largest"] = np.stack(ends)
    found |= {
        f"quantiles {q:g}, {1 - q:g}": np.quantile(seen, [q, 1 - q], axis=0) for q in (1e-3, 1e-2)
    }
    return found | {
        f"mean ± {k} std": np.stack([mean - k * std, mean + k * std]) for k in (3, 4, 5)
    }


def one_step(step: float) -> Array:
    return np.repeat(np.array([[-128.5 * step], [126.5 * step]], np.float32), 384, axis=1)


def forms(whole: tuple[Array, Array]) -> list[tuple[str, Array, str]]:
    """Return ways to keep the vectors: name, similarities, share of saturated numbers."""
    queries, documents = map(unit, whole)
    found: list[tuple[str, Array, str]] = []

    def int8(name: str, a: Array, b: Array, ranges: Array, others: Array | None = None) -> None:
        codes = [quantize_embeddings(a, "int8", ranges if others is None else others),
                 quantize_embeddings(b, "int8", ranges)]  # fmt: skip
        share = f"{saturated(np.concatenate([a, b]), ranges):9.3%}" if others is None else ""
        found.append((name, similarities(*codes), share))

    own = [np.stack([part.min(axis=0), part.max(axis=0)]) for part in (documents, queries)]
    bits = [dequantize(quantize_embeddings(x, "binary"), "binary") for x in (queries, documents)]
    found.append(("float32", similarities(queries, documents), ""))
    int8("int8, fixed ranges", queries, documents, model_ranges())
    int8("int8, ranges of each batch", queries, documents, *own)
    int8("int8, ranges of the documents", queries, documents, own[0])
    found.append(("binary", similarities(*bits), ""))
    int8("int8, fixed, before normalizing", *whole, model_ranges(normalized=False))
    for width in (64, 128, 256):
        kept = queries[:, :width], documents[:, :width]
        cut, ranges = (
            (unit(kept[0]), unit(kept[1])),
            model_ranges(width, unit_after_truncation=True),
        )
        found.append((f"float32, truncate_dim={width}", similarities(*kept), ""))
        int8(f"int8, truncate_dim={width}", *kept, model_ranges(width))
        int8(f"int8, truncate_dim={width}, length 1 again", *cut, ranges)
    return found


def saturated(vectors: Array, ranges: Array) -> float:
    """Return the share of numbers further than half a bucket outside of the range."""
    half = (ranges[1] - ranges[0]) / 510
    return float(np.mean((vectors < ranges[0] - half) | (vectors > ranges[1] + 3 * half)))


def unit(vectors: Array) -> Array:
    unit_vectors: Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit_vectors


def similarities(queries: Array, documents: Array) -> Array:
    found: Array = unit(queries.astype(np.float64)) @ unit(documents.astype(np.float64)).T
    return found


def best_ten(scores: Array) -> Array:
    return np.argsort(-scores, axis=1, kind="stable")[:, :10]


def overlap(scores: Array, truth: Array) -> float:
    pairs = zip(best_ten(scores), best_ten(truth), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in pairs]))


def report(steps: dict[str, float], texts: int, weights: Path) -> dict[str, Any]:
    return {
        "about": "int8 ranges of all-MiniLM-L6-v2 for minilm.quantize.model_ranges: a code is "
        "round(x / step), so ranges are -128.5 to 126.5 steps in every dimension",
        "script": "scripts/make/int8_ranges.py --write",
        "corpus": f"{texts} texts: STS17 en-en, its words alone, article 1 of the Universal "
        "Declaration of Human Rights in 531 languages, the big list of naughty strings",
        "rule": "the least root mean square error of similarities on the worst of these four kinds",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "model_safetensors_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "width": 384,
        **{kind: {"step": step} for kind, step in steps.items()},
    }


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""How good are the vectors? Similarity, retrieval, classification and clustering, in one table.

    python scripts/quality/evaluate.py              # all four tasks, on ../shared/data
    python scripts/quality/evaluate.py --reference  # and what the reference reaches
    python scripts/quality/evaluate.py --dtype int8   # what products in 8 bits cost
    python scripts/quality/evaluate.py --task sts --data STS17.en-en.tsv
    python scripts/quality/evaluate.py --task classification --data texts.jsonl --json

Each task reads one plain form, and measures as MTEB does (Muennighoff et al. 2023, section 3.2):

- sts: a .tsv file with the columns score, sentence1 and sentence2. Spearman's and Pearson's
  correlation of the scores with the cosines.
- retrieval: a folder as `scripts/retrieval.py` describes. nDCG@10 of the ten nearest by cosine.
- classification: a .jsonl file with text and label. The mean accuracy of ten logistic regressions
  (100 steps), each trained on 8 texts of every label and tested on all others; or, if the rows have
  a field split, on 8 of every label in "train" and tested on those of "test".
- clustering: the same form. The mean v-measure of ten mini-batch k-means, as many means as labels.

All figures are x100. Beside them stand those that `scores.json`, in a folder above the data, says
were published, if the weights are the published ones; and with --reference those of
sentence-transformers on the same texts. Two agree if all six decimals are the same.

Only STS17 has a published figure here. The labelled texts are the sentences of the abstracts of
SciFact that have 16 or more, the abstract being the label: real ones, but a choice of ours, whose
figures say whether two implementations are equally good, and nothing about other data.
"""

import argparse
import csv
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import results  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.errors import InputError, MinilmError, MissingPackageError  # noqa: E402
from minilm.pretrained import hub  # noqa: E402
from minilm.tasks import semantic_search  # noqa: E402
from retrieval import DATA, FILES, SCIFACT, TOP, ndcg, read_jsonl, read_retrieval  # noqa: E402

Array = np.ndarray[Any, Any]
Encode = Callable[[list[str]], Array]
STS = Path("sts") / "STS17.en-en.tsv"
EXPERIMENTS, PER_LABEL, SENTENCES = 10, 8, 16


@dataclass
class Figure:
    """One number of the table.

    Attributes:
        task, data, measure: What it is.
        minilm: Ours, x100.
        published: As `scores.json` has it, or None.
        reference: That of sentence-transformers, or None.
    """

    task: str
    data: str
    measure: str
    minilm: float
    published: float | None = None
    reference: float | None = None


# --- the tasks: an encoder and the data -> {measure: x100}


def sts(encode: Encode, path: Path) -> dict[str, float]:
    """Return Spearman's and Pearson's correlation of human scores with cosines."""
    from scipy.stats import pearsonr, spearmanr

    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    human = [float(row["score"]) for row in rows]
    a, b = (encode([row[name] for row in rows]) for name in ("sentence1", "sentence2"))
    cosines = (unit(a) * unit(b)).sum(axis=1)
    found = {"spearman": spearmanr(human, cosines), "pearson": pearsonr(human, cosines)}
    figures = {name: 100 * float(result.statistic) for name, result in found.items()}
    if not np.isfinite(list(figures.values())).all():
        raise InputError(f"{path}: too few pairs, or all of the same score", "--data")
    return figures


def retrieval(encode: Encode, path: Path) -> dict[str, float]:
    """Return nDCG@10 of exact search."""
    data = read_retrieval(path)
    hits = semantic_search(encode(data.queries), encode(data.documents), top_k=TOP)
    places = [[int(hit["corpus_id"]) for hit in found] for found in hits]
    return {f"ndcg_at_{TOP}": 100 * ndcg(places, data.grades)}


def classification(encode: Encode, path: Path) -> dict[str, float]:
    """Return the mean accuracy of logistic regressions on few texts of each label."""
    from sklearn.linear_model import LogisticRegression

    rows = read_labelled(path)
    vectors, labels = encode([row["text"] for row in rows]), np.array([r["label"] for r in rows])
    splits = np.array([row.get("split", "") for row in rows])
    accuracies = []
    for seed in range(EXPERIMENTS):
        order = np.random.default_rng(seed).permutation(len(rows))
        train = few_of_each(labels, order[splits[order] != "test"])
        test = np.setdiff1d(order[splits[order] != "train"], train)
        if not len(test):
            raise InputError(
                f"{path}: no text is left to test on; give more than {PER_LABEL} of each label",
                "--data",
            )
        model = LogisticRegression(max_iter=100, random_state=seed)
        model.fit(vectors[train], labels[train])
        accuracies.append(model.score(vectors[test], labels[test]))
    return {"accuracy": 100 * float(np.mean(accuracies))}


def clustering(encode: Encode, path: Path) -> dict[str, float]:
    """Return the mean v-measure (Rosenberg and Hirschberg 2007) of k-means."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    rows = read_labelled(path)
    vectors, labels = encode([row["text"] for row in rows]), [row["label"] for row in rows]
    scores = []
    for seed in range(EXPERIMENTS):
        means = MiniBatchKMeans(len(set(labels)), batch_size=500, n_init=1, random_state=seed)
        scores.append(v_measure_score(labels, means.fit_predict(vectors)))
    return {"v_measure": 100 * float(np.mean(scores))}


TASKS: dict[str, Callable[[Encode, Path], dict[str, float]]] = {
    "sts": sts,
    "retrieval": retrieval,
    "classification": classification,
    "clustering": clustering,
}


def unit(vectors: Array) -> Array:
    """Return the vectors in float64, with length 1."""
    wide = vectors.astype(np.float64)
    of_length_one: Array = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return of_length_one


def few_of_each(labels: Array, order: Array) -> Array:
    """Return the first few rows of each label, in the given order."""
    seen: Counter[str] = Counter()
    chosen = []
    for row in order:
        if seen[labels[row]] < PER_LABEL:
            seen[labels[row]] += 1
            chosen.append(row)
    return np.array(chosen, dtype=np.int64)


# --- data


def read_labelled(path: Path) -> list[dict[str, str]]:
    """Read rows with text and label; of a folder of SciFact, the sentences of its long abstracts.

    Raises:
        InputError: A row lacks one of the two, or all have the same label.
    """
    if path.is_dir():
        rows = [
            {"text": sentence, "label": document["id"]}
            for document in read_jsonl(path / FILES[0])
            if len(sentences := re.split(r"(?<=[.!?])\s+(?=[A-Z])", document["text"])) >= SENTENCES
            for sentence in sentences
        ]
    else:
        rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str) or "label" not in row:
            raise InputError(f"{path}: row {number} has no text or no label", "--data")
        row["label"] = str(row["label"])
    if len({row["label"] for row in rows}) < 2:
        raise InputError(f"{path}: fewer than two labels", "--data")
    return rows


def default_data(task: str) -> Path:
    return DATA / (STS if task == "sts" else SCIFACT)


def published_scores(task: str, path: Path) -> tuple[str, dict[str, float]]:
    """Return the name of the data and its published figures, from a `scores.json` above it."""
    for folder in path.resolve().parents:
        if (folder / "scores.json").is_file():
            tasks = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["tasks"]
            for name, entry in tasks.items():
                home = folder / entry.get("file", entry.get("dir", ""))
                if home.resolve() == path.resolve() and entry["kind"] == task:
                    return name, entry.get("published", {})
            break
    return (f"{path.name}, sentences" if path.is_dir() else path.name), {}


# --- the table


def evaluate(
    tasks: dict[str, Path], encode: Encode, reference: Encode | None, is_published: bool
) -> list[Figure]:
    """Measure each task.

    Args:
        tasks: The path of the data, by the name of the task.
        encode: Ours.
        reference: Another's, or None.
        is_published: Whether published figures are of this model.

    Returns:
        One figure for each task and measure.
    """
    figures = []
    for task, path in tasks.items():
        ours = TASKS[task](encode, path)
        theirs = TASKS[task](reference, path) if reference else {}
        name, known = published_scores(task, path)
        known = known if is_published else {}
        figures += [
            Figure(task, name, measure, value, known.get(measure), theirs.get(measure))
            for measure, value in ours.items()
        ]
    return figures


def verdict(ours: float, other: float | None) -> str:
    """Return `87.587791, agrees`, or how far off it is."""
    if other is None:
        return ""
    same = f"{ours:.6f}" == f"{other:.6f}"
    return f"{other:.6f}, {'agrees' if same else f'differs by {abs(ours - other):.1e}'}"


def table(figures: Sequence[Figure]) -> str:
    """Return a Markdown table without the columns that are empty."""
    columns: dict[str, list[str]] = defaultdict(list)
    for each in figures:
        for name in ("task", "data", "measure"):
            columns[name].append(getattr(each, name))
        columns["minilm"].append(f"{each.minilm:.6f}")
        columns["published"].append(verdict(each.minilm, each.published))
        columns["reference"].append(verdict(each.minilm, each.reference))
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [
        list(kept),
        ["---" if name in ("task", "data", "measure") else "---:" for name in kept],
    ]
    lines += [list(cells) for cells in zip(*kept.values(), strict=True)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), help="one of them (default: all)")
    parser.add_argument("--data", type=Path, help="a file or folder of the task's form")
    parser.add_argument("--model", default=hub.DEFAULT_MODEL, metavar="NAME_OR_FOLDER")
    parser.add_argument("--dtype", help="of our vectors: float32 (default), int8, ...")
    parser.add_argument("--reference", action="store_true", help="also of sentence-transformers")
    parser.add_argument("--json", action="store_true")
    results.add_option(parser)
    options = parser.parse_args(arguments)
    if options.data is not None and options.task is None:
        parser.error("argument --data: goes with --task")
    names = list(TASKS) if options.task is None else [options.task]
    tasks = {name: options.data or default_data(name) for name in names}
    if missing := [path for path in tasks.values() if not path.exists()]:
        print(f"error: {missing[0]}: no such file or folder; see --data", file=sys.stderr)
        return 2
    try:
        figures = run(tasks, options.model, options.dtype, options.reference)
    except (MinilmError, OSError, ValueError, KeyError, AttributeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(each) for each in figures], indent=2))
        return 0
    with results.recorded(options.markdown, "How good the vectors are", fenced=False):
        print(table(figures))
    return 0


def run(
    tasks: dict[str, Path], model: str, dtype: str | None, with_reference: bool
) -> list[Figure]:
    """Load what is needed, and measure.

    Raises:
        MissingPackageError: scikit-learn is not installed, or the reference is asked for and not.
    """
    try:
        import sklearn  # noqa: F401  # and scipy, which it needs
    except ImportError as error:
        script = "scripts/quality/evaluate.py"
        raise MissingPackageError(script, "scikit-learn", "sklearn") from error
    encoder = SentenceEncoder.from_pretrained(model, dtype=dtype)
    files = encoder.source
    is_published = files is not None and hub.SHA256["model.safetensors"] in files.sha256.values()

    ours = once_each(partial(encoder.encode, truncation="silent"))
    if not with_reference:
        return evaluate(tasks, ours, None, is_published)
    import torch

    from reference import is_installed, load_reference

    if not is_installed():
        raise MissingPackageError("--reference", "sentence-transformers", "reference")
    assert files is not None
    folder = files.path("model.safetensors").parent
    theirs = once_each(load_reference(folder, torch.float32).model.encode)
    return evaluate(tasks, ours, theirs, is_published)


def once_each(encode: Encode) -> Encode:
    """Return `encode` with a memory of its results: two tasks have the same texts."""
    remembered = cache(lambda texts: encode(list(texts)))
    return lambda texts: remembered(tuple(texts))


if __name__ == "__main__":
    raise SystemExit(main())

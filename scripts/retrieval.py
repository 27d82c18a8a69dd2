"""Retrieval data in plain files, and nDCG: what scripts that measure retrieval share.

A folder holds `corpus.jsonl` (id, title, text), `queries.jsonl` (id, text) and `qrels.tsv` (heading
`query doc grade`), as `SciFact-small` does.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DATA", "FILES", "SCIFACT", "TOP", "Retrieval", "ndcg", "read_jsonl", "read_retrieval"]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside this checkout
SCIFACT = Path("retrieval") / "scifact-small"  # in a folder of data
FILES = ("corpus.jsonl", "queries.jsonl", "qrels.tsv")
TOP = 10


@dataclass(frozen=True)
class Retrieval:
    """Queries, documents, and which belong together.

    Attributes:
        queries: n texts.
        documents: m texts: title, space, text.
        grades: For each query the places of the documents that were graded, with their grades.
    """

    queries: list[str]
    documents: list[str]
    grades: list[dict[int, float]]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a .jsonl file."""
    with path.open(encoding="utf-8") as file:  # splitlines() would split within some texts
        return [json.loads(line) for line in file if line.strip()]


def read_retrieval(folder: Path) -> Retrieval:
    """Read a folder of retrieval data. A query for which nothing was graded is left out.

    Raises:
        OSError: A file is missing.
        KeyError: A line has no such field, or `qrels.tsv` names a query or a document that the
            other two files don't have.
    """
    corpus, queries = (read_jsonl(folder / name) for name in FILES[:2])
    place_of = {row["id"]: place for place, row in enumerate(corpus)}
    grades: dict[str, dict[int, float]] = {row["id"]: {} for row in queries}
    with (folder / FILES[2]).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            grades[row["query"]][place_of[row["doc"]]] = float(row["grade"])
    queries = [row for row in queries if grades[row["id"]]]
    return Retrieval(
        [row["text"] for row in queries],
        [f"{row['title']} {row['text']}" for row in corpus],
        [grades[row["id"]] for row in queries],
    )


def ndcg(
    found: Sequence[Sequence[int]] | np.ndarray[Any, Any], grades: Sequence[dict[int, float]]
) -> float:
    """Return nDCG@10: the mean of DCG / the best possible DCG of the first ten documents.

    A document in place p, from 1, adds its grade / log2(p + 1), as in trec_eval (Järvelin and
    Kekäläinen 2002, ACM TOIS 20(4), with the grade itself as the gain).

    Args:
        found: For each query the places of documents, the best first.
        grades: For each query the grades of those that have one; the others have 0.
    """
    discounts = 1 / np.log2(np.arange(2, TOP + 2))
    scores: list[float] = []
    for places, graded in zip(found, grades, strict=True):
        gains = np.array([graded.get(int(place), 0.0) for place in places[:TOP]])
        ideal = np.array(sorted(graded.values(), reverse=True)[:TOP])
        best = ideal @ discounts[: len(ideal)]
        scores.append(float(gains @ discounts[: len(gains)] / best) if best > 0 else 0.0)
    return float(np.mean(scores))

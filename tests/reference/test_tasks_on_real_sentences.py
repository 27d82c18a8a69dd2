"""Mining, communities and near-duplicates of more than 10,000 real sentences.

The first two beside the reference's functions on the same vectors. Its scores are those of one
float32 product, ours are exact: they are compared to `CLOSE`, and what may differ is only what lies
that near to a limit. The reference has no function for near-duplicates; theirs are found by hand
among all pairs, in float64.
"""

import importlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import SHARED
from minilm import SentenceEncoder
from minilm.tasks import (
    Duplicate,
    community_detection,
    deduplicate,
    near_duplicates,
    paraphrase_mining_embeddings,
)

pytestmark = [pytest.mark.reference, pytest.mark.slow, pytest.mark.full]

# A float32 product is off by this: 384 roundings, half of them the other way. Seen: 1.0e-6.
CLOSE = 2e-6


@pytest.fixture(scope="module")
def util() -> Any:
    package = pytest.importorskip(
        "sentence_transformers", reason="needs the reference: pip install 'minilm[reference]'"
    )
    if int(package.__version__.split(".")[0]) < 6:
        pytest.skip("the functions of version 6 are those that ours follow")
    return importlib.import_module("sentence_transformers.util")


def real_sentences() -> Iterator[str]:
    """STS17, the titles and the sentences of abstracts, and claims."""
    folder = SHARED / "retrieval" / "scifact-small"
    paths = [SHARED / "sts" / "STS17.en-en.tsv", folder / "corpus.jsonl", folder / "queries.jsonl"]
    for path in paths:
        if not path.is_file():
            pytest.skip(f"{path} is absent")
    for line in paths[0].read_text(encoding="utf-8").splitlines()[1:]:
        yield from line.split("\t")[1:3]
    for path in paths[1:]:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "title" in row:
                yield row["title"]
            yield from re.split(r"(?<=[.!?])\s+", row["text"])


@pytest.fixture(scope="module")
def vectors(encoder: SentenceEncoder) -> Tensor:
    texts = list(dict.fromkeys(text for text in real_sentences() if len(text.split()) > 2))
    assert len(texts) > 10_000
    return torch.from_numpy(encoder.encode(texts))


@pytest.fixture(scope="module")
def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.double(), dim=1)


def cosines(unit: Tensor, rows: Any) -> Any:
    """Of some rows with all, in float64."""
    return (unit[rows] @ unit.T).numpy()


@pytest.fixture(scope="module")
def pairs(unit: Tensor) -> tuple[Any, Any, Any]:
    """All pairs with a cosine above 0.59: the earlier row, the later one, float64."""
    found = []
    for start in range(0, len(unit), 1000):
        scores = cosines(unit, slice(start, start + 1000))
        rows, earlier = np.nonzero(scores > 0.59)
        rows, earlier, scores = rows + start, earlier, scores[rows, earlier]
        once = earlier < rows
        found.append((earlier[once], rows[once], scores[once]))
    earlier, rows, scores = (np.concatenate(part) for part in zip(*found, strict=True))
    return earlier, rows, scores


def assert_nothing_is_near(pairs: tuple[Any, Any, Any], threshold: float) -> None:
    """No pair is so near to the threshold that rounding would decide."""
    distance = np.abs(pairs[2] - threshold).min()
    assert distance > CLOSE, f"choose another threshold: {distance}"


@pytest.fixture(scope="module")
def both(util: Any, vectors: Tensor) -> list[list[list[float | int]]]:
    """All pairs that mining finds with its defaults: ours, the reference's."""
    return [paraphrase_mining_embeddings(vectors), util.paraphrase_mining_embeddings(vectors)]


def test_mining_finds_the_same_pairs(both: list[list[list[float | int]]], unit: Tensor) -> None:
    ours, theirs = ({(int(i), int(j)): score for score, i, j in pairs} for pairs in both)
    assert len(both[0]) == len(ours) == len(theirs) == 500_000
    assert [-score for score, _, _ in both[0]] == sorted(-score for score in ours.values())
    assert max(abs(ours[pair] - theirs[pair]) for pair in ours.keys() & theirs.keys()) < CLOSE
    last = min(ours.values())
    for i, j in ours.keys() ^ theirs.keys():
        rows = cosines(unit, [i, j])
        score = rows[0, j]
        # Left out: the worst of all, or as far as the 100th neighbour of either.
        best = np.sort(rows, axis=1)[:, -101]  # the first is the row itself
        assert abs(score - last) < CLOSE or np.abs(score - best).min() < CLOSE, (i, j)
    assert len(ours.keys() ^ theirs.keys()) < 100  # seen: 8


@pytest.mark.parametrize(("threshold", "smallest"), [(0.75, 2), (0.6, 5), (0.75, 10), (0.9, 1)])
def test_communities_are_the_same(
    util: Any,
    vectors: Tensor,
    unit: Tensor,
    pairs: tuple[Any, Any, Any],
    threshold: float,
    smallest: int,
) -> None:
    assert_nothing_is_near(pairs, threshold)
    if smallest == 1:  # for which the reference takes minutes: each text is a community
        vectors = vectors[:1500]
    ours = community_detection(vectors, threshold, smallest)
    theirs = util.community_detection(vectors, threshold, smallest)
    assert len(ours) > 5
    assert [each[0] for each in ours] == [each[0] for each in theirs]
    assert [set(each) for each in ours] == [set(each) for each in theirs]
    for a, b in zip(ours, theirs, strict=True):  # in the same order, but for ties
        if a == b:
            continue
        scores = cosines(unit, [a[0]])[0]
        assert np.abs(scores[a] - scores[b]).max() < CLOSE


@pytest.mark.parametrize(("threshold", "found"), [(0.95, 20), (0.8, 500), (0.6, 2000)])
def test_near_duplicates_are_those_of_all_pairs(
    vectors: Tensor, pairs: tuple[Any, Any, Any], threshold: float, found: int
) -> None:
    assert_nothing_is_near(pairs, threshold)
    expected: dict[int, Duplicate] = {}
    for earlier, row, score in zip(*(part.tolist() for part in pairs), strict=True):  # by row
        if score >= threshold and earlier not in expected and row not in expected:
            expected[row] = Duplicate(row, earlier, score)
    actual = near_duplicates(vectors, threshold)
    assert len(actual) > found
    assert [each[:2] for each in actual] == [each[:2] for each in expected.values()]
    assert (
        max(abs(a.score - b.score) for a, b in zip(actual, expected.values(), strict=True)) < CLOSE
    )
    assert deduplicate(vectors, threshold) == [
        row for row in range(len(vectors)) if row not in expected
    ]

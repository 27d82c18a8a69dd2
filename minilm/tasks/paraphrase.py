"""The most similar pairs within one set of vectors.

In: embeddings. Out: `[score, i, j]`, the most similar first. Each vector's nearest others come from
`search.py`; here they become pairs, each once.
"""

from typing import Any

import numpy as np

from minilm.inputs import check_positive_int, with_progress
from minilm.similarity import Embeddings, cos_sim
from minilm.tasks.search import ScoreFunction, Scores
from minilm.vectors import as_matrix

__all__ = ["paraphrase_mining_embeddings"]

_Pairs = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # keys and scores

_PENDING = 2**18  # pairs collected before the best are picked


def paraphrase_mining_embeddings(
    embeddings: Embeddings,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100000,
    max_pairs: int = 500000,
    top_k: int = 100,
    score_function: ScoreFunction = cos_sim,
    show_progress_bar: bool = False,
) -> list[list[float | int]]:
    """Find the pairs of vectors that are most similar. Exact.

    A pair is considered if one is among the `top_k` nearest of the other, of equally near ones
    those of smaller row. With `top_k` of at least n - 1 that is every pair.

    Args:
        embeddings: `[n, d]`.
        query_chunk_size: Vectors compared at a time, at most. No result depends on it.
        corpus_chunk_size: Vectors that they are compared with at a time, at most. Nor on this.
        max_pairs: The most pairs to return.
        top_k: The most neighbours of one vector to consider.
        score_function: As in `semantic_search`. Of the scores of (i, j) and (j, i) the larger
            counts.
        show_progress_bar: Show one.

    Returns:
        `[score, i, j]` with i < j, the most similar first; pairs of equal score ordered by (i, j).

    Raises:
        InputError, InputTypeError: As in `semantic_search`; or `max_pairs` is negative.

    Example:
        >>> paraphrase_mining_embeddings([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], max_pairs=1)
        [[1.0, 0, 2]]
    """
    if type(max_pairs) is not int or max_pairs != 0:
        check_positive_int(max_pairs, "max_pairs")
    top_k = check_positive_int(top_k, "top_k")
    vectors = as_matrix(embeddings, "embeddings")
    if not vectors.numel():
        return []
    scores = Scores(vectors, vectors, score_function, ("embeddings", "embeddings"))
    count = len(vectors)
    keys, values = np.empty(0, np.int64), np.empty(0, np.float32)  # i * n + j: orders by (i, j)
    pending: list[_Pairs] = []
    chunks = with_progress(scores.chunks(query_chunk_size), show_progress_bar)
    nearest = scores.nearest(top_k, query_chunk_size, corpus_chunk_size, others_only=True)
    for _, (rows, ids, found) in zip(chunks, nearest, strict=True):
        pending.append((np.minimum(rows, ids) * count + np.maximum(rows, ids), found))
        if sum(len(part) for part, _ in pending) >= max(_PENDING, max_pairs):
            keys, values = _best([(keys, values), *pending], max_pairs)
            pending.clear()
    keys, values = _best([(keys, values), *pending], max_pairs)
    columns = values.tolist(), (keys // count).tolist(), (keys % count).tolist()
    return list(map(list, zip(*columns, strict=True)))


def _best(parts: list[_Pairs], max_pairs: int) -> _Pairs:
    """Pick the best of the pairs, each pair once."""
    keys, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    if len(first):  # of the scores of one pair, the better
        keys, values = keys[first], np.maximum.reduceat(values, first)
    order = np.argsort(-values, kind="stable")[:max_pairs]  # equal ones stay in order of the keys
    return keys[order], values[order]

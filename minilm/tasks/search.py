"""The nearest vectors of a corpus for each query.

In: embeddings as tensors, NumPy arrays or lists. Out: row numbers and scores, the best first.

A matrix product gives a score that depends in its last bits on the block it was computed in. So the
product only finds the candidates, all whose score may be among the best given its rounding error;
`Scores.exact` then computes theirs one pair at a time in float64. Next: `paraphrase.py` and
`communities.py`, which use the same two steps.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm.errors import InputError, InputTypeError
from minilm.inputs import check_positive_int
from minilm.similarity import (
    Embeddings,
    _matrices,
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
    pairwise_dot_score,
    pairwise_euclidean_sim,
    pairwise_manhattan_sim,
)

__all__ = ["Found", "ScoreFunction", "Scores", "semantic_search"]

ScoreFunction = Callable[[Any, Any], Tensor]
Found = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]

_PAIRWISE: dict[ScoreFunction, ScoreFunction] = {
    cos_sim: pairwise_dot_score,  # of vectors of length 1
    dot_score: pairwise_dot_score,
    euclidean_sim: pairwise_euclidean_sim,
    manhattan_sim: pairwise_manhattan_sim,
}
_TILE = 2**22  # scores looked at together: 16 MB in float32, about what a cache holds
_QUERIES = 256  # of which so many queries: enough for the matrix product to be at its best
_PAIRS = 4096  # vectors copied for exact scores at a time: 12 MB of float64 at 384 wide
# What float32 products lose where the user allows TF32 or bfloat16 in them.
_ALLOWED_LOSS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


def semantic_search(
    query_embeddings: Embeddings,
    corpus_embeddings: Embeddings,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500000,
    top_k: int = 10,
    score_function: ScoreFunction = cos_sim,
) -> list[list[dict[str, int | float]]]:
    """Find the `top_k` vectors of the corpus that are most similar to each query. Exact.

    Args:
        query_embeddings: `[n, d]`, or one vector `[d]`.
        corpus_embeddings: `[m, d]`. Searched on its device.
        query_chunk_size: Queries compared at a time, at most. No result depends on it.
        corpus_chunk_size: Vectors of the corpus compared at a time, at most; likewise.
        top_k: Results for each query, fewer if the corpus has fewer.
        score_function: One of `minilm.similarity`, or any function of `[n, d]` and `[m, d]` that
            gives `[n, m]`, larger where more similar. Another function than those four is called
            with chunks of just these sizes, and its scores are taken as they are, except that
            -inf is no result.

    Returns:
        For each query a list of `{"corpus_id": int, "score": float}`, the best first; of equal
        scores, the smaller `corpus_id` first.

    Raises:
        InputError: The widths differ, a vector has a number that is not finite, or a size is not
            positive.
        InputTypeError: The embeddings are no numbers, or a size is no integer.

    Example:
        >>> semantic_search([1.0, 0.0], [[0.0, 1.0], [2.0, 0.0]], top_k=1)
        [[{'corpus_id': 1, 'score': 1.0}]]
    """
    top_k = check_positive_int(top_k, "top_k")
    corpus, queries = _matrices(
        corpus_embeddings, query_embeddings, names=("corpus_embeddings", "query_embeddings")
    )
    scores = Scores(queries, corpus, score_function, ("query_embeddings", "corpus_embeddings"))
    results: list[list[dict[str, int | float]]] = [[] for _ in range(len(queries))]
    for found in scores.nearest(top_k, query_chunk_size, corpus_chunk_size):
        for row, i, value in zip(*(part.tolist() for part in found), strict=True):
            results[row].append({"corpus_id": i, "score": value})
    return results


class Scores:
    """The scores of queries against a corpus: all of a block quickly, or single ones exactly.

    Attributes:
        exact_is_known: Whether the function is one of `minilm.similarity`. If not, there is no
            exact score, and that of the block is taken.
    """

    def __init__(
        self,
        queries: Tensor,
        corpus: Tensor,
        score_function: ScoreFunction,
        names: tuple[str, str],
    ) -> None:
        """Check the vectors and take their lengths.

        Args:
            queries: `[n, d]`, floating point.
            corpus: `[m, d]` on the same device, or the same tensor.
            score_function: As in `semantic_search`.
            names: What to call the two in errors.

        Raises:
            InputError: A vector has a number that is not finite.
            InputTypeError: `score_function` can't be called.
        """
        if not callable(score_function):
            raise InputTypeError(
                f"score_function is {score_function!r}; pass a function such as "
                "minilm.similarity.cos_sim",
                "score_function",
            )
        self.score_function = score_function
        self.exact_is_known = score_function in _PAIRWISE
        wide = torch.promote_types(queries.dtype, torch.float32)  # half precision makes false ties
        self.queries = _finite(queries.detach().to(wide), names[0])
        self.corpus = (
            self.queries if corpus is queries else _finite(corpus.detach().to(wide), names[1])
        )
        # mps has no float64.
        self.exact_device = torch.device("cpu") if corpus.device.type == "mps" else corpus.device
        if self.exact_is_known:
            self._query_lengths = self._lengths(self.queries)
            self._corpus_lengths = (
                self._query_lengths if corpus is queries else self._lengths(self.corpus)
            )
            self._query_scale = self._on_device(1 / self._query_lengths)
            self._corpus_scale = self._on_device(1 / self._corpus_lengths)
            self._longest = float(self._corpus_lengths.max()) if len(self.corpus) else 0.0

    def _on_device(self, exact: Tensor) -> Tensor:
        return exact.to(self.queries.dtype).to(self.queries.device)  # in this order, for mps

    def _lengths(self, vectors: Tensor) -> Tensor:
        parts = [
            torch.linalg.vector_norm(part.to(self.exact_device, torch.float64), dim=-1)
            for part in torch.split(vectors, _PAIRS)
        ]
        # A zero vector is as similar as 0 to everything, not 0 / 0.
        return torch.cat(parts).clamp(min=1e-30) if parts else torch.ones(0, dtype=torch.float64)

    def block(self, rows: Tensor | slice, start: int, stop: int) -> Tensor:
        """Queries against corpus[start:stop], `[rows, stop - start]`, with a rounding error of up
        to `error`.
        """
        queries, corpus = self.queries[rows], self.corpus[start:stop]
        if self.score_function is cos_sim:
            unit = queries * self._query_scale[rows].unsqueeze(1)
            return (unit @ corpus.T).mul_(self._corpus_scale[start:stop])
        scores = torch.as_tensor(self.score_function(queries, corpus)).detach()
        if scores.shape != (len(queries), len(corpus)):
            raise InputError(
                f"score_function gave shape {list(scores.shape)} for {len(queries)} queries and "
                f"{len(corpus)} vectors of the corpus",
                "score_function",
            )
        if scores.isnan().any():
            raise InputError("score_function gave NaN, which is in no order", "score_function")
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def error(self, rows: Tensor | slice, near: Tensor) -> Tensor:
        """How far the scores of `block` near `near`, `[rows]`, may be from the exact ones."""
        if not self.exact_is_known:
            return torch.zeros_like(near)
        dtype, width = self.queries.dtype, self.queries.shape[1]
        # Each of `width` additions rounds once (Higham 2002, section 3.1); 8 for the lengths.
        relative = (width + 8) * torch.finfo(dtype).eps / 2
        if dtype == torch.float32:
            relative += _ALLOWED_LOSS[torch.get_float32_matmul_precision()]
        if self.score_function is cos_sim:
            return torch.full_like(near, relative)
        if self.score_function is dot_score:
            return self._longest * relative / self._query_scale[rows]
        return near.abs() * relative  # a sum of positive numbers: relative to itself

    def exact(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The scores of single pairs in float64, rounded to the embeddings' dtype.

        They don't depend on what other pairs are asked for.

        Args:
            rows: Which queries, int64 `[pairs]`.
            ids: Which vectors of the corpus, int64 `[pairs]`.
        """
        if not len(rows):
            return self.queries.new_empty(0)
        pairwise, values = _PAIRWISE[self.score_function], []
        for i, j in zip(torch.split(rows, _PAIRS), torch.split(ids, _PAIRS), strict=True):
            a = self.queries[i].to(self.exact_device, torch.float64)
            b = self.corpus[j].to(self.exact_device, torch.float64)
            value = pairwise(a, b)
            if self.score_function is cos_sim:
                value = value / (
                    self._query_lengths[i.to(self.exact_device)]
                    * self._corpus_lengths[j.to(self.exact_device)]
                )
            values.append(value)
        return self._on_device(torch.cat(values))

    def nearest(
        self, k: int, query_chunk_size: int, corpus_chunk_size: int, others_only: bool = False
    ) -> Iterator[Found]:
        """The k best of the corpus for each query, chunk of queries by chunk.

        Args:
            k: How many; fewer if the corpus has fewer.
            query_chunk_size: As in `semantic_search`.
            corpus_chunk_size: As in `semantic_search`.
            others_only: The queries are the corpus, and a vector is none of its own neighbours.

        Yields:
            Rows of queries, rows of the corpus and scores, each `[found]`: by query, then by
            descending score, then by row of the corpus.

        Raises:
            InputError, InputTypeError: A size is no positive integer.
        """
        query_step = check_positive_int(query_chunk_size, "query_chunk_size")
        step = check_positive_int(corpus_chunk_size, "corpus_chunk_size")
        if self.exact_is_known:
            query_step = min(query_step, _QUERIES)
            step = min(step, max(1, _TILE // query_step))
        for first in range(0, len(self.queries), query_step):
            rows = slice(first, min(first + query_step, len(self.queries)))
            best = _Best(rows.stop - first, k)
            for start in range(0, len(self.corpus), step):
                scores = self.block(rows, start, min(start + step, len(self.corpus)))
                if others_only:
                    scores = _without_diagonal(scores, first - start)
                tiles = torch.split(scores, max(1, _TILE // len(scores)), dim=1)
                for tile in tiles:
                    self._merge(best, tile, first, start, rows)
                    start += tile.shape[1]
            yield best.rows + first, best.ids, best.values

    def _merge(self, best: "_Best", tile: Tensor, first: int, start: int, rows: slice) -> None:
        """Add to the best those of corpus[start : start + width] that belong there."""
        lowest = torch.as_tensor(best.lowest).to(tile)
        if tile.shape[1] >= best.k:
            lowest = torch.maximum(lowest, tile.topk(best.k, dim=1).values[:, -1])
        # `lowest` and the score may both be off, in opposite directions.
        lowest = lowest - 2 * self.error(rows, lowest)
        # Its own score, masked, is -inf. So may be a real one of another function: not found.
        found = (tile >= lowest.unsqueeze(1)) & (tile > -torch.inf)
        i, j = found.nonzero(as_tuple=True)
        values = self.exact(i + first, j + start) if self.exact_is_known else tile[i, j]
        best.add(i.cpu().numpy(), j.cpu().numpy() + start, values.cpu().numpy())


class _Best:
    """The k best seen so far for each query."""

    def __init__(self, queries: int, k: int) -> None:
        self.queries, self.k = queries, k
        self.rows = self.ids = np.empty(0, np.int64)
        self.values = np.empty(0, np.float32)

    @property
    def lowest(self) -> np.ndarray[Any, Any]:
        """The k-th best score of each query, -inf where there are fewer, `[queries]`."""
        lowest = np.full(self.queries, -np.inf, self.values.dtype)
        ends = np.cumsum(np.bincount(self.rows, minlength=self.queries))
        full = np.diff(ends, prepend=0) == self.k
        lowest[full] = self.values[ends[full] - 1]
        return lowest

    def add(
        self,
        rows: np.ndarray[Any, Any],
        ids: np.ndarray[Any, Any],
        values: np.ndarray[Any, Any],
    ) -> None:
        rows, ids = np.concatenate([self.rows, rows]), np.concatenate([self.ids, ids])
        values = np.concatenate([self.values, values])
        order = np.lexsort((ids, -values, rows))
        rows = rows[order]
        counts = np.bincount(rows, minlength=self.queries)
        rank = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        kept = rank < self.k
        self.rows, self.ids, self.values = rows[kept], ids[order][kept], values[order][kept]


def _without_diagonal(scores: Tensor, offset: int) -> Tensor:
    """-inf in column i + offset of row i; a copy, since another function's result isn't ours."""
    if not -len(scores) < offset < scores.shape[1]:
        return scores
    rows, columns = torch.arange(len(scores)), torch.arange(len(scores)) + offset
    inside = (columns >= 0) & (columns < scores.shape[1])
    scores = scores.clone()
    scores[rows[inside].to(scores.device), columns[inside].to(scores.device)] = -torch.inf
    return scores


def _finite(vectors: Tensor, argument: str) -> Tensor:
    if not vectors.numel():
        return vectors
    low, high = torch.aminmax(vectors)  # one pass and no copy; NaN and infinity come through
    if not (low.isfinite() and high.isfinite()):
        row = int((~vectors.isfinite()).any(dim=1).nonzero()[0])
        raise InputError(
            f"{argument}[{row}] has a number that is not finite; leave that vector out",
            f"{argument}[{row}]",
        )
    return vectors

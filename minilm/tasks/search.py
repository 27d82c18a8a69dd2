"""The nearest vectors of a corpus for each query.

In: embeddings as tensors, NumPy arrays or lists. Out: row numbers and scores, the best first.

A matrix product gives a score that depends in its last bits on the block it was computed in. So the
product only finds the candidates, all whose score may be among the best given its rounding error;
`Scores.exact` then computes theirs one pair at a time in float64. Next: `paraphrase.py` and
`communities.py`, which use the same two steps, and `index.py`, which keeps a corpus in files.

A corpus that is a memory-mapped array stays where it is: it is read block by block, in one pass for
each 256 queries, so it may be larger than the memory.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm import onednn
from minilm.errors import InputError, InputTypeError
from minilm.inputs import check_positive_int
from minilm.similarity import (
    Embeddings,
    as_matrices,
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
)
from minilm.vectors import as_matrix

__all__ = [
    "LONGEST",
    "Best",
    "Found",
    "ScoreFunction",
    "Scores",
    "full_precision",
    "not_finite",
    "semantic_search",
    "too_long_error",
]

ScoreFunction = Callable[[Any, Any], Tensor]
_Array = np.ndarray[Any, Any]
Found = tuple[_Array, _Array, _Array]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.mul(a, b, out=a).sum(dim=-1)


def _negated_distance(a: Tensor, b: Tensor, order: int) -> Tensor:
    distances: Tensor = torch.linalg.vector_norm(torch.sub(a, b, out=a), ord=order, dim=-1)
    return -distances


# The score of each row of `a` with that of `b`, `[n, d] x [n, d] -> [n]`; `a` is overwritten.
_PAIRWISE: dict[ScoreFunction, ScoreFunction] = {
    cos_sim: _dot,  # to be divided by both lengths
    dot_score: _dot,
    euclidean_sim: functools.partial(_negated_distance, order=2),
    manhattan_sim: functools.partial(_negated_distance, order=1),
}
_TILE = 2**22  # scores looked at together: 16 MB in float32, about what a cache holds
_QUERIES = 256  # of which so many queries: enough for the matrix product to be at its best
_ROWS = 2**14  # and so many vectors of the corpus: 25 MB in float32 at 384 wide
_GROUP = 64  # scores whose largest is looked at first: most groups have none of the best
_PAIRS = 4096  # vectors whose lengths are computed at a time: 12 MB of float64 at 384 wide
# Numbers of each side of the exact scores computed at a time: 1 MB of float64, which stays in a
# cache, and in memory that is there already. In larger parts that are new each time it takes seven
# times as long, mostly for pages of memory.
_EXACT = 2**17
_UNIT = 1e-6  # lengths that are nearer to 1 are 1, where a score is only a first guess
# The longest vectors that are searched. The reciprocal of a longer one is too small for its dtype,
# and in float64 its products with others are too large.
LONGEST = {torch.float32: 2.0**126, torch.float64: 1e150}
_SHORTEST = 1e-30  # a zero vector is as similar as 0 to everything, not 0 / 0
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
        corpus_embeddings: `[m, d]`. Searched on its device. A memory-mapped array, such as
            `np.load(path, mmap_mode="r")`, is not copied to memory.
        query_chunk_size: Queries compared at a time, at most. No result depends on it.
        corpus_chunk_size: Vectors of the corpus compared at a time, at most. Nor on this.
        top_k: Results for each query, fewer if the corpus has fewer.
        score_function: One of `minilm.similarity`, or any function of `[n, d]` and `[m, d]` that
            gives `[n, m]`, larger where more similar. Another function than those four is called
            with chunks of exactly these sizes, and its scores are taken as they are; one of -inf
            means that the vector is not a result.

    Returns:
        For each query a list of `{"corpus_id": int, "score": float}`, the best first; of equal
        scores, the smaller `corpus_id` first.

    Raises:
        InputError: The widths differ, a vector has a number that is not finite or is too long, or a
            score is beyond what its dtype holds, or a size is not positive.
        InputTypeError: The embeddings are not numbers, or a size is not an integer.

    Example:
        >>> semantic_search([1.0, 0.0], [[0.0, 1.0], [2.0, 0.0]], top_k=1)
        [[{'corpus_id': 1, 'score': 1.0}]]
    """
    top_k = check_positive_int(top_k, "top_k")
    corpus = as_matrix(corpus_embeddings, "corpus_embeddings", keep=True)
    head, queries = as_matrices(
        corpus[:1], query_embeddings, names=("corpus_embeddings", "query_embeddings")
    )
    if not corpus.numel():
        corpus = head  # of the queries' width
    scores = Scores(queries, corpus, score_function, ("query_embeddings", "corpus_embeddings"))
    results: list[list[dict[str, int | float]]] = [[] for _ in range(len(queries))]
    for found in scores.nearest(top_k, query_chunk_size, corpus_chunk_size):
        for row, i, value in zip(*(part.tolist() for part in found), strict=True):
            results[row].append({"corpus_id": i, "score": value})
    return results


class Scores:
    """The scores of queries against a corpus: all of a block quickly, or single ones exactly.

    Attributes:
        exact_is_known: Whether the function is one of `minilm.similarity`. If not, the score of
            the block is taken for the exact one.
    """

    def __init__(
        self,
        queries: Tensor,
        corpus: Tensor,
        score_function: ScoreFunction,
        names: tuple[str, str],
        corpus_lengths: Tensor | None = None,
    ) -> None:
        """Check the queries. The corpus is checked when a block of it is first used.

        Args:
            queries: `[n, d]`, floating point.
            corpus: `[m, d]` on the same device, or the same tensor. Its blocks are brought to the
                dtype of the queries, or float32, one at a time.
            score_function: As in `semantic_search`.
            names: What to call the two in errors.
            corpus_lengths: The length of each vector of the corpus, `[m]`, float32, if they are
                known. The corpus is then known to be finite.

        Raises:
            InputError: A query, or any vector if the two are the same tensor, has a number that is
                not finite. A vector of the corpus that has one is an error of `block`.
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
        self._names = names
        wide = torch.promote_types(queries.dtype, torch.float32)  # half precision makes false ties
        self.queries = _finite(queries.detach().to(wide), names[0])
        self.corpus = self.queries if corpus is queries else corpus.detach()
        # mps has no float64.
        self.exact_device = torch.device("cpu") if corpus.device.type == "mps" else corpus.device
        self._query_lengths = self._lengths(self.queries)
        self._check_lengths(self._query_lengths, names[0])
        self._query_scale = self._on_device(1 / self._query_lengths)
        known = self._query_lengths if corpus is queries else corpus_lengths
        self._lengths_are_known = known is not None
        # Of the vectors of the corpus that were used so far.
        self._longest = 0.0 if known is None or not len(known) else float(known.max())
        # 1 / length of each, NaN before it is first used.
        if corpus is queries:
            self._corpus_scale = self._query_scale
        elif corpus_lengths is not None:
            self._check_lengths(corpus_lengths, names[1])
            self._corpus_scale = 1 / corpus_lengths.to(self.queries).clamp(min=_SHORTEST)
        else:
            self._corpus_scale = self.queries.new_full((len(self.corpus),), torch.nan)

    def _on_device(self, exact: Tensor) -> Tensor:
        return exact.to(self.queries.dtype).to(self.queries.device)  # in this order, for mps

    def _lengths(self, vectors: Tensor) -> Tensor:
        """The lengths of vectors in float64, `[vectors]`."""
        parts = [
            torch.linalg.vector_norm(part.to(self.exact_device, torch.float64), dim=-1)
            for part in torch.split(vectors, _PAIRS)
        ]
        if not parts:
            return torch.ones(0, dtype=torch.float64, device=self.exact_device)
        return torch.cat(parts).clamp(min=_SHORTEST)

    def _check_lengths(self, exact: Tensor, name: str, rows: Tensor | None = None) -> None:
        """Refuse vectors that are so long that no score of theirs can be computed.

        Args:
            exact: Their lengths.
            name: What they are called.
            rows: Their numbers; by default those from 0 on.
        """
        too_long = exact > LONGEST[self.queries.dtype]
        if too_long.any():
            first = int(too_long.nonzero()[0])
            row = first if rows is None else int(rows[first])
            raise too_long_error(name, row, float(exact[first]))

    def vectors(self, rows: Tensor | slice) -> Tensor:
        """Vectors of the corpus, in the dtype of the queries."""
        return self.corpus[rows].to(self.queries.dtype)

    def _part(self, start: int, stop: int) -> Tensor:
        """corpus[start:stop] in the dtype of the queries, checked, with its lengths known."""
        part = self.vectors(slice(start, stop))
        if self._lengths_are_known or not self._corpus_scale[start:stop].isnan().any():
            return part
        lengths = torch.linalg.vector_norm(part, dim=-1)
        # Beyond these the squares are too large or too small for the dtype. NaN is in no range.
        least = torch.finfo(part.dtype).tiny ** 0.375
        odd = ~((lengths > least) & (lengths < 1 / least))
        scale = 1 / lengths
        if odd.any():
            rows = odd.nonzero()[:, 0]
            finite = part[rows].isfinite().all(dim=1)
            if not finite.all():
                raise not_finite(self._names[1], start + int(rows[~finite][0]))
            exact = self._lengths(part[rows])
            self._check_lengths(exact, self._names[1], start + rows)
            scale[rows], lengths[rows] = self._on_device(1 / exact), self._on_device(exact)
        self._corpus_scale[start:stop] = scale
        self._longest = max(self._longest, float(lengths.max()))
        return part

    def block(self, rows: Tensor | slice, start: int, stop: int) -> Tensor:
        """Queries against corpus[start:stop], `[rows, stop - start]`, with a rounding error of up
        to `error`.

        Raises:
            InputError: A vector or a score is not finite, or the scores have another shape.
        """
        queries, corpus = self.queries[rows], self._part(start, stop)
        with full_precision(queries.device) if self.exact_is_known else nullcontext():
            return self._scores(queries, corpus, rows, start, stop)

    def _scores(
        self, queries: Tensor, corpus: Tensor, rows: Tensor | slice, start: int, stop: int
    ) -> Tensor:
        if self.score_function is cos_sim:
            unit = queries * self._query_scale[rows].unsqueeze(1)
            scores = onednn.scores(unit, corpus)
            scale = self._corpus_scale[start:stop]
            return scores if ((scale - 1).abs() < _UNIT).all() else scores.mul_(scale)
        if not self.exact_is_known:
            # A user's function might write to them, and the memory may be read-only.
            queries, corpus = queries.clone(), corpus.clone()
        function = onednn.scores if self.score_function is dot_score else self.score_function
        scores = torch.as_tensor(function(queries, corpus), device=queries.device).detach()
        if scores.shape != (len(queries), len(corpus)):
            raise InputError(
                f"score_function gave shape {list(scores.shape)} for {len(queries)} queries and "
                f"{len(corpus)} vectors of the corpus",
                "score_function",
            )
        if self.exact_is_known and not _all_finite(scores):
            i, j = (int(each) for each in (~scores.isfinite()).nonzero()[0])
            i = i + rows.start if isinstance(rows, slice) else int(rows[i])
            kind = str(self.queries.dtype).removeprefix("torch.")
            raise InputError(
                f"the score of {self._names[0]}[{i}] and {self._names[1]}[{start + j}] is beyond "
                f"what {kind} holds; scale the vectors down",
                self._names[0],
            )
        if scores.isnan().any():
            raise InputError("score_function gave NaN, which is in no order", "score_function")
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def error(self, rows: Tensor | slice, near: Tensor) -> Tensor:
        """How far scores near `near`, `[rows]`, of the blocks so far may be from the exact ones."""
        if not self.exact_is_known:
            return torch.zeros_like(near)
        dtype, width = self.queries.dtype, self.queries.shape[1]
        # Each of `width` additions rounds once (Higham 2002, section 3.1); 8 for the rest.
        relative = (width + 8) * torch.finfo(dtype).eps / 2
        if self.score_function is cos_sim:  # the root of a sum is off by half as much
            relative *= 1.5
        if dtype == torch.float32:
            relative += _allowed_loss()
        if self.score_function is cos_sim:
            return torch.full_like(near, relative + _UNIT)
        if self.score_function is dot_score:
            return self._longest * relative / self._query_scale[rows]
        return near.abs() * relative  # a sum of positive numbers: relative to itself

    def exact(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The scores of pairs `[pairs]` of a query and a vector of the corpus, by their numbers.

        They are computed in float64 and rounded to the embeddings' dtype. The score of a pair
        doesn't depend on the other pairs.
        """
        if not len(rows):
            return self.queries.new_empty(0)
        pairwise, values = _PAIRWISE[self.score_function], []
        width = self.queries.shape[1]
        step = max(1, _EXACT // max(width, 1))
        shape, device = (min(step, len(rows)), width), self.exact_device
        room = self.queries.new_empty(shape)
        room_a = torch.empty(shape, dtype=torch.float64, device=device)
        room_b = torch.empty_like(room_a)
        for i, j in zip(torch.split(rows, step), torch.split(ids, step), strict=True):
            count = len(i)
            a = room_a[:count].copy_(torch.index_select(self.queries, 0, i, out=room[:count]))
            if self.corpus is self.queries:
                b = room_b[:count].copy_(torch.index_select(self.queries, 0, j, out=room[:count]))
            else:
                b = room_b[:count].copy_(self.vectors(j))
            value = pairwise(a, b)
            if self.score_function is cos_sim:
                i, j = i.to(device), j.to(device)
                of_b = self._query_lengths[j] if self.corpus is self.queries else self._lengths(b)
                value = value / (self._query_lengths[i] * of_b)
            values.append(value)
        return self._on_device(torch.cat(values))

    def nearest(
        self, k: int, query_chunk_size: int, corpus_chunk_size: int, others_only: bool = False
    ) -> Iterator[Found]:
        """The k best of the corpus for each query, chunk of queries by chunk.

        Args:
            k: How many; fewer if the corpus has fewer.
            query_chunk_size, corpus_chunk_size: As in `semantic_search`.
            others_only: The queries are the corpus, and a vector isn't its own neighbour.

        Yields:
            Rows of queries, rows of the corpus and scores, each `[found]`: by query, then by
            descending score, then by row of the corpus.

        Raises:
            InputError, InputTypeError: A size is not a positive integer.
        """
        step = check_positive_int(corpus_chunk_size, "corpus_chunk_size")
        for rows in self.chunks(query_chunk_size):
            best = Best(rows.stop - rows.start, k)
            self.improve(best, rows, step, others_only=others_only)
            yield best.rows + rows.start, best.ids, best.values

    def chunks(self, query_chunk_size: int = _QUERIES) -> list[slice]:
        """The queries in groups that are compared at a time."""
        step = check_positive_int(query_chunk_size, "query_chunk_size")
        if self.exact_is_known:
            step = min(step, _QUERIES)
        count = len(self.queries)
        return [slice(first, min(first + step, count)) for first in range(0, count, step)]

    def improve(
        self,
        best: "Best",
        rows: slice,
        corpus_chunk_size: int,
        first_id: int = 0,
        others_only: bool = False,
    ) -> None:
        """Compare some queries with the corpus, and keep the best of both.

        Args:
            best: The best so far, of the queries `rows`; it is changed.
            rows: One of `chunks`.
            corpus_chunk_size: As in `semantic_search`.
            first_id: The number that the first vector of the corpus has among the best.
            others_only: As in `nearest`.
        """
        count, step = rows.stop - rows.start, corpus_chunk_size
        if self.exact_is_known:
            step = min(step, max(1, _TILE // count))
            if self.corpus.dtype != self.queries.dtype or not self._lengths_are_known:
                step = min(step, _ROWS)  # more than the product is done with each
        for start in range(0, len(self.corpus), step):
            scores = self.block(rows, start, min(start + step, len(self.corpus)))
            if others_only:
                own = scores if self.exact_is_known else scores.clone()
                scores = _without_diagonal(own, rows.start - start)
            tiles = torch.split(scores, max(1, _TILE // count), dim=1)
            for tile in tiles:
                self._merge(best, tile, start, rows, first_id)
                start += tile.shape[1]

    def _merge(self, best: "Best", tile: Tensor, start: int, rows: slice, first_id: int) -> None:
        """Add to the best those of corpus[start : start + width] that are better."""
        count, width = tile.shape
        size = _GROUP if width % _GROUP == 0 and width >= best.k * _GROUP else 1
        groups = tile.view(count, width // size, size)
        tops = groups.amax(dim=2) if size > 1 else tile
        lowest = torch.as_tensor(best.lowest, device="cpu").to(tile)
        if tops.shape[1] >= best.k:  # the k-th best of the tile is no worse
            lowest = torch.maximum(lowest, tops.topk(best.k, dim=1).values[:, -1])
        # `lowest` and the score may both be off, in opposite directions.
        lowest = lowest - 2 * self.error(rows, lowest)
        # The score of a vector with itself, masked, is -inf, and so no result.
        i, group = ((tops >= lowest.unsqueeze(1)) & (tops > -torch.inf)).nonzero(as_tuple=True)
        members = groups[i, group]
        found = (members >= lowest[i].unsqueeze(1)) & (members > -torch.inf)
        pick, place = found.nonzero(as_tuple=True)
        i, j = i[pick], group[pick] * size + place + start
        values = self.exact(i + rows.start, j) if self.exact_is_known else members[pick, place]
        best.add(i.cpu().numpy(), j.cpu().numpy() + first_id, values.cpu().numpy())


class Best:
    """The k best seen so far for each query."""

    def __init__(self, queries: int, k: int) -> None:
        self.queries, self.k = queries, k
        self.rows = self.ids = np.empty(0, np.int64)
        self.values = np.empty(0, np.float32)

    def results(self) -> list[list[tuple[int, float]]]:
        """The row and the score of each, for each query."""
        found: list[list[tuple[int, float]]] = [[] for _ in range(self.queries)]
        for row, i, value in zip(
            self.rows.tolist(), self.ids.tolist(), self.values.tolist(), strict=True
        ):
            found[row].append((i, value))
        return found

    @property
    def lowest(self) -> _Array:
        """The k-th best score of each query, -inf where there are fewer, `[queries]`."""
        lowest = np.full(self.queries, -np.inf, self.values.dtype)
        ends = np.cumsum(np.bincount(self.rows, minlength=self.queries))
        full = np.diff(ends, prepend=0) == self.k
        lowest[full] = self.values[ends[full] - 1]
        return lowest

    def add(self, rows: _Array, ids: _Array, values: _Array) -> None:
        rows, ids = np.concatenate([self.rows, rows]), np.concatenate([self.ids, ids])
        values = np.concatenate([self.values, values])
        order = np.lexsort((ids, -values, rows))
        rows = rows[order]
        counts = np.bincount(rows, minlength=self.queries)
        rank = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        kept = rank < self.k
        self.rows, self.ids, self.values = rows[kept], ids[order][kept], values[order][kept]


def _without_diagonal(scores: Tensor, offset: int) -> Tensor:
    """Put -inf into column i + offset of each row i, in place."""
    if not -len(scores) < offset < scores.shape[1]:
        return scores
    rows = torch.arange(len(scores), device=scores.device)
    columns = rows + offset
    inside = (columns >= 0) & (columns < scores.shape[1])
    scores[rows[inside], columns[inside]] = -torch.inf
    return scores


def _finite(vectors: Tensor, argument: str) -> Tensor:
    if not _all_finite(vectors):
        raise not_finite(argument, int((~vectors.isfinite()).any(dim=1).nonzero()[0]))
    return vectors


def _all_finite(numbers: Tensor) -> bool:
    if not numbers.numel():
        return True
    low, high = torch.aminmax(numbers)  # one pass and no copy; NaN and infinity come through
    return bool(low.isfinite() and high.isfinite())


def _allowed_loss() -> float:
    """The precision that float32 products may lose, by the user's setting."""
    try:
        return _ALLOWED_LOSS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # it was set for each backend, by names that came with torch 2.9
        return _ALLOWED_LOSS["medium"]


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Inside a `with`, no autocast: `Scores.error` doesn't know its rounding."""
    if device.type == "mps":  # older versions of torch have none there
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def not_finite(argument: str, row: int) -> InputError:
    return InputError(
        f"{argument}[{row}] has a number that is not finite; leave that vector out",
        f"{argument}[{row}]",
    )


def too_long_error(argument: str, row: int, length: float) -> InputError:
    return InputError(
        f"{argument}[{row}] has the length {length:.3g}, too long for its products; scale it down",
        f"{argument}[{row}]",
    )

"""Groups of vectors around a centre: everything near enough to it.

In: embeddings and a threshold. Out: lists of row numbers, each with its centre first, the largest
first. The scores are those of `search.py`.

Two passes over the similarities, block by block: the first counts each vector's neighbours, the
second, from the most neighbours to the fewest, collects those of a centre that are still free.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm.errors import InputError, InputTypeError
from minilm.inputs import check_positive_int, with_progress
from minilm.similarity import Embeddings, _matrix, cos_sim
from minilm.tasks.search import Scores

__all__ = ["community_detection"]

_Array = np.ndarray[Any, Any]

_BLOCK = 2**24  # similarities held at a time: 64 MB in float32


def community_detection(
    embeddings: Embeddings,
    threshold: float = 0.75,
    min_community_size: int = 10,
    batch_size: int = 1024,
    show_progress_bar: bool = False,
) -> list[list[int]]:
    """Find groups in which every vector has a cosine of at least `threshold` with the centre.

    The vector with the most such neighbours is a centre and takes them all, itself included; then
    the one with the next most, unless it is taken, takes what is left of its own; and so on.

    Args:
        embeddings: `[n, d]`.
        threshold: The smallest cosine, in float32; one that is equal counts.
        min_community_size: The smallest group to return.
        batch_size: Vectors compared with all at a time, at most. No result depends on it.
        show_progress_bar: Show one, of the first of two passes.

    Returns:
        Groups of rows of `embeddings`, the largest first. The centre comes first in its group,
        then the nearest; of equals, the smaller row, or the group found first.

    Raises:
        InputError: A size is not positive, `threshold` is not finite, or a vector has a number
            that is not.
        InputTypeError: The embeddings are no numbers, or an argument is none.

    Example:
        >>> community_detection([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], min_community_size=2)
        [[0, 1]]
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number):
        raise InputTypeError(f"threshold is {threshold!r}; pass a number", "threshold")
    if not math.isfinite(threshold):
        raise InputError(f"threshold is {threshold}; pass one from -1 to 1", "threshold")
    smallest = check_positive_int(min_community_size, "min_community_size")
    batch_size = check_positive_int(batch_size, "batch_size")
    vectors = _matrix(embeddings, "embeddings")
    if not vectors.numel() or len(vectors) < smallest:
        return []

    groups = _equal_rows(vectors)
    distinct = vectors[torch.tensor([rows[0] for rows in groups], device=vectors.device)]
    neighbours = _Neighbours(Scores(distinct, distinct, cos_sim, ("embeddings",) * 2), threshold)
    weights = np.array([len(rows) for rows in groups])
    step = min(batch_size, max(1, _BLOCK // len(groups)))

    starts = range(0, len(groups), step)
    sizes = np.concatenate(
        [
            neighbours.count(torch.arange(len(groups))[start : start + step], weights)
            for start in with_progress(starts, show_progress_bar)
        ]
    )
    centres = np.lexsort((np.arange(len(groups)), -sizes))
    centres = centres[sizes[centres] >= smallest]

    taken = np.zeros(len(groups), bool)
    communities: list[list[int]] = []
    while len(centres := centres[~taken[centres]]):
        batch, centres = centres[:step], centres[step:]
        for centre, near in zip(batch.tolist(), neighbours.of(torch.as_tensor(batch)), strict=True):
            free = near & ~taken
            if taken[centre] or weights[free].sum() < smallest:
                continue
            taken |= free
            communities.append(_community(centre, np.flatnonzero(free), groups, neighbours.scores))
    return sorted(communities, key=len, reverse=True)


class _Neighbours:
    """Which vectors are near enough to others."""

    def __init__(self, scores: Scores, threshold: float) -> None:
        self.scores, self.threshold = scores, np.float32(threshold).item()

    def count(self, rows: Tensor, weights: _Array) -> _Array:
        """How many each has, itself included, `[rows]`."""
        near = self._mask(rows)
        weight = torch.as_tensor(weights, device=near.device)
        counts: _Array = torch.where(near, weight, 0).sum(dim=1).cpu().numpy()
        return counts

    def of(self, rows: Tensor) -> _Array:
        """`[rows, n]`, true where near."""
        mask: _Array = self._mask(rows).cpu().numpy()
        return mask

    def _mask(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.scores.queries.device)
        block = self.scores.block(rows, 0, len(self.scores.corpus))
        near = block >= self.threshold
        # Where rounding could decide, the exact score does, in float32 like the threshold.
        error = self.scores.error(rows, block[:, 0]) + torch.finfo(torch.float32).eps
        i, j = ((block - self.threshold).abs_() <= error.unsqueeze(1)).nonzero(as_tuple=True)
        near[i, j] = self.scores.exact(rows[i], j).to(torch.float32) >= self.threshold
        return near


def _community(centre: int, members: _Array, groups: list[list[int]], scores: Scores) -> list[int]:
    """The rows of one community: the centre, then by descending similarity, then by row."""
    ids = torch.as_tensor(members, device=scores.queries.device)
    exact = scores.exact(torch.full_like(ids, centre), ids).tolist()
    first = groups[centre][0]
    others = [
        (-score, row)
        for member, score in zip(members.tolist(), exact, strict=True)
        for row in groups[member]
        if row != first
    ]
    return [first, *(row for _, row in sorted(others))]


def _equal_rows(vectors: Tensor) -> list[list[int]]:
    """Rows that are the same, together, in order of the first. The same sentence many times over
    would otherwise be compared with itself as often, and exactly where the threshold is 1.
    """
    groups: dict[bytes, list[int]] = {}
    wide = torch.promote_types(vectors.dtype, torch.float32)
    for start in range(0, len(vectors), 1024):
        part = vectors[start : start + 1024].detach().to(wide).cpu().numpy()
        for row, vector in enumerate(part, start):
            groups.setdefault(vector.tobytes(), []).append(row)
    return list(groups.values())

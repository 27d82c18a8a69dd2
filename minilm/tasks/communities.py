"""Groups of vectors around a centre: everything near enough to it.

In: embeddings and a threshold. Out: lists of row numbers, each with its centre first, the largest
first. The scores are those of `search.py`.

Two passes over the similarities, block by block: the first counts each vector's neighbours, the
second, from the most neighbours to the fewest, collects those of a centre that are still free.
Next: `duplicates.py`, which asks the same question, who is near enough to whom.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm.errors import InputError, InputTypeError
from minilm.inputs import check_positive_int, with_progress
from minilm.similarity import Embeddings, cos_sim
from minilm.tasks.search import Scores
from minilm.vectors import as_matrix

__all__ = ["Neighbours", "check_threshold", "community_detection"]

_Array = np.ndarray[Any, Any]

_BLOCK = 2**22  # similarities held at a time, and neighbours: 16 MB in float32, 64 MB of pairs


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
        threshold: The smallest cosine that counts, in float32.
        min_community_size: The smallest group to return.
        batch_size: Vectors compared with all at a time, at most. No result depends on it.
        show_progress_bar: Show one, of the first of two passes.

    Returns:
        Groups of rows of `embeddings`, the largest first. The centre comes first in its group,
        then the nearest; of equals, the smaller row, or the group found first.

    Raises:
        InputError: A size is not positive, `threshold` is not finite, or a vector has a number
            that is not.
        InputTypeError: The embeddings or an argument are not numbers.

    Example:
        >>> community_detection([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], min_community_size=2)
        [[0, 1]]
    """
    threshold = check_threshold(threshold)
    smallest = check_positive_int(min_community_size, "min_community_size")
    batch_size = check_positive_int(batch_size, "batch_size")
    vectors = as_matrix(embeddings, "embeddings")
    if not vectors.numel() or len(vectors) < smallest:
        return []

    neighbours = Neighbours(vectors, threshold)
    groups = neighbours.groups
    weights = np.array([len(rows) for rows in groups])
    sizes, pairs = _sizes(neighbours, weights, min(batch_size, _BLOCK), show_progress_bar)
    centres = np.lexsort((np.arange(len(groups)), -sizes))
    centres = centres[sizes[centres] >= smallest]

    taken = np.zeros(len(groups), bool)
    found: list[tuple[int, _Array]] = []
    while len(centres := centres[~taken[centres]]):
        # So many that their neighbours can be held: the first pass has counted them.
        step = int(np.searchsorted(np.cumsum(sizes[centres[:batch_size]]), _BLOCK))
        batch, centres = centres[: max(1, step)], centres[max(1, step) :]
        near_each = neighbours.of(batch) if pairs is None else [pairs[row] for row in batch]
        for centre, near in zip(batch.tolist(), near_each, strict=True):
            if taken[centre]:
                continue
            free = near[~taken[near]]
            if weights[free].sum() >= smallest:
                taken[free] = True
                found.append((centre, free))
    return sorted(_communities(found, groups, neighbours.scores), key=len, reverse=True)


def check_threshold(threshold: Any) -> float:
    """Round a threshold for a cosine to float32, in which it is compared.

    One that is not a number is an `InputTypeError`, one that is not finite an `InputError`.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number):
        raise InputTypeError(f"threshold is {threshold!r}; pass a number", "threshold")
    if not math.isfinite(threshold):
        raise InputError(f"threshold is {threshold}; pass one from -1 to 1", "threshold")
    return np.float32(threshold).item()


class Neighbours:
    """Which vectors of a set are near enough to others; of equal ones the first stands for all.

    Attributes:
        groups: The numbers of equal rows, in order of the first of each group.
        scores: The cosines of those first ones.
        threshold: The smallest cosine that is near enough, as `check_threshold` returns it.
    """

    def __init__(self, vectors: Tensor, threshold: float) -> None:
        """Take vectors `[n, d]`, floating point; one that is not finite is an `InputError`."""
        self.groups = _equal_rows(vectors)
        if len(self.groups) < len(vectors):
            vectors = vectors[[rows[0] for rows in self.groups]]
        self.scores = Scores(vectors, vectors, cos_sim, ("embeddings", "embeddings"))
        self.threshold = threshold

    def pairs(self, rows: _Array, start: int, stop: int) -> tuple[_Array, _Array]:
        """Find the pairs of a row of `rows` and one of vectors[start:stop] that are near enough.

        The similarities of all of these pairs are held in memory.

        Returns:
            Places in `rows`, and row numbers from `start` to `stop`, both `[found]`: by the first,
            then by the second.
        """
        ids = torch.as_tensor(rows, device=self.scores.queries.device)
        block = self.scores.block(ids, start, stop)
        # Where rounding could decide, the exact score does, in float32 like the threshold.
        error = self.scores.error(ids, block[:, 0]) + torch.finfo(torch.float32).eps
        i, j = (block >= (self.threshold - error).unsqueeze(1)).nonzero(as_tuple=True)
        near = block[i, j] > self.threshold + error[i]
        open_ = (~near).nonzero().squeeze(1)
        exact = self.scores.exact(ids[i[open_]], j[open_] + start)
        near[open_] = exact.to(torch.float32) >= self.threshold
        return i[near].cpu().numpy(), j[near].cpu().numpy() + start

    def of(self, rows: _Array) -> list[_Array]:
        """The row numbers of the neighbours of each of the rows, itself included, in order."""
        step = max(1, _BLOCK // len(rows))
        count = len(self.scores.corpus)
        found = [self.pairs(rows, k, min(k + step, count)) for k in range(0, count, step)]
        return _by_first(found, len(rows))


def _by_first(pairs: list[tuple[_Array, _Array]], count: int) -> list[_Array]:
    """For each number below `count` the second ones of the pairs that begin with it, in order."""
    firsts, seconds = (np.concatenate(part) for part in zip(*pairs, strict=True))
    order = np.lexsort((seconds, firsts))
    ends = np.cumsum(np.bincount(firsts, minlength=count))[:-1]
    return np.split(seconds[order], ends)


def _sizes(
    neighbours: Neighbours, weights: _Array, step: int, show_progress_bar: bool
) -> tuple[_Array, list[_Array] | None]:
    """Add up the weights of each vector's neighbours, itself included.

    Half of the square of similarities is computed, since nearness is mutual.

    Returns:
        The sums `[n]`; and the neighbours of each in order, if they are few enough to be held.
    """
    count = len(weights)
    sizes = np.zeros(count, np.int64)
    kept: list[tuple[_Array, _Array]] | None = []
    held = 0
    width = max(1, _BLOCK // step)
    for start in with_progress(range(0, count, step), show_progress_bar):
        stop = min(start + step, count)
        rows = np.arange(start, stop)
        for first in range(start, count, width):
            i, j = neighbours.pairs(rows, first, min(first + width, count))
            i += start
            later = j >= stop
            for one, other in ((i, j), (j[later], i[later])):
                np.add.at(sizes, one, weights[other])
                held += len(one)
                kept = None if kept is None or held > _BLOCK else [*kept, (one, other)]
    return sizes, None if kept is None else _by_first(kept, count)


def _communities(
    found: list[tuple[int, _Array]], groups: list[list[int]], scores: Scores
) -> Iterator[list[int]]:
    """The rows of each community: the centre, then by descending similarity, then by row."""
    if not found:
        return
    members = np.concatenate([free for _, free in found])
    counts = [len(free) for _, free in found]
    centres = np.repeat([centre for centre, _ in found], counts)
    device = scores.queries.device
    exact = scores.exact(
        torch.as_tensor(centres, device=device), torch.as_tensor(members, device=device)
    )
    of_each = np.split(exact.cpu().numpy(), np.cumsum(counts)[:-1])
    for (centre, free), values in zip(found, of_each, strict=True):
        first = groups[centre][0]
        others = [
            (-score, row)
            for member, score in zip(free.tolist(), values.tolist(), strict=True)
            for row in groups[member]
            if row != first
        ]
        yield [first, *(row for _, row in sorted(others))]


def _equal_rows(vectors: Tensor) -> list[list[int]]:
    """Group the numbers of equal rows, in order of the first of each group. A sentence that occurs
    many times would otherwise be compared with itself as often, and exactly if the threshold is 1.
    """
    wide = torch.promote_types(vectors.dtype, torch.float32)
    kind = np.uint64 if wide == torch.float64 else np.uint32
    random = np.random.default_rng(0)
    factors = random.integers(1, 2**64, vectors.shape[1], np.uint64, endpoint=False) | np.uint64(1)
    # A sum of its bits tells nearly every row from all others; of the rest the bytes are compared.
    sums = np.empty(len(vectors), np.uint64)
    for start in range(0, len(vectors), 1024):
        part = vectors[start : start + 1024].detach().to(wide).cpu().contiguous().numpy()
        sums[start : start + 1024] = (part.view(kind).astype(np.uint64) * factors).sum(axis=1)
    _, first, inverse, counts = np.unique(
        sums, return_index=True, return_inverse=True, return_counts=True
    )
    groups: dict[Any, list[int]] = {row: [row] for row in first[counts == 1].tolist()}
    for row in np.flatnonzero(counts[inverse] > 1).tolist():
        vector = vectors[row].detach().to(wide).cpu().contiguous().numpy().tobytes()
        # 128 bits tell vectors apart as their own bytes do, and a million take 16 MB.
        groups.setdefault(hashlib.blake2b(vector, digest_size=16).digest(), []).append(row)
    return sorted(groups.values())

"""Near-duplicates: rows so similar to an earlier one that only the earlier one need stay.

In: embeddings and a threshold. Out: the rows that may go and because of which, or the rows that
stay. The scores are those of `search.py`, and neighbours are found as in `communities.py`.

Each row in turn stays, unless it is near enough to an earlier one that stays: the leader algorithm
(Hartigan 1975, Clustering Algorithms, chapter 3). So nothing is lost, since for every row that goes
one stays that is near enough; and no two that stay are. Other rules are in use: to keep one of all
rows that a chain of near ones connects, or to remove a row if any earlier one is near, even one
that goes itself (SemDeDup, Abbas et al. 2023, arXiv:2303.09540). Both also take the far end of a
chain, which may be like nothing that stays.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from minilm.inputs import check_positive_int, with_progress
from minilm.similarity import Embeddings
from minilm.tasks.communities import Neighbours, check_threshold
from minilm.vectors import as_matrix

__all__ = ["Duplicate", "deduplicate", "near_duplicates"]

_Array = np.ndarray[Any, Any]

_BLOCK = 2**22  # similarities held at a time: 16 MB in float32


class Duplicate(NamedTuple):
    """A row that may go.

    Attributes:
        row: Its number.
        of: The number of the first of the rows that stay to which it is near enough.
        score: The cosine of the two.
    """

    row: int
    of: int
    score: float


def near_duplicates(
    embeddings: Embeddings,
    threshold: float = 0.95,
    batch_size: int = 1024,
    show_progress_bar: bool = False,
) -> list[Duplicate]:
    """Find the rows that have a cosine of at least `threshold` with an earlier row that stays.

    Args:
        embeddings: `[n, d]`, the rows to be preferred first.
        threshold: The smallest cosine that counts, in float32.
        batch_size: Rows compared with all later ones at a time, at most. No result depends on it.
        show_progress_bar: Show one.

    Returns:
        The rows that may go, in order. The time is that of comparing those that stay with all.

    Raises:
        InputError: `batch_size` is not positive, `threshold` is not finite, or a vector has a
            number that is not.
        InputTypeError: The embeddings or an argument are not numbers.

    Example:
        >>> near_duplicates([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        [Duplicate(row=2, of=0, score=1.0)]
    """
    threshold = check_threshold(threshold)
    batch_size = check_positive_int(batch_size, "batch_size")
    vectors = as_matrix(embeddings, "embeddings")
    if not vectors.numel():
        return []
    neighbours = Neighbours(vectors, threshold)
    groups = neighbours.groups
    leaders = _leaders(neighbours, len(groups), min(batch_size, _BLOCK), show_progress_bar)

    # Equal rows are near to each other, unless they are zero or the threshold is above 1.
    ids = torch.arange(len(groups), device=vectors.device)
    scores = neighbours.scores.exact(ids, torch.as_tensor(leaders, device=ids.device))
    near = (scores.to(torch.float32) >= threshold).tolist()
    return sorted(
        Duplicate(row, groups[leader][0], score)
        for rows, leader, score, is_near in zip(
            groups, leaders.tolist(), scores.tolist(), near, strict=True
        )
        for row in rows
        if row != groups[leader][0] and is_near
    )


def deduplicate(
    embeddings: Embeddings,
    threshold: float = 0.95,
    batch_size: int = 1024,
    show_progress_bar: bool = False,
) -> list[int]:
    """Find the rows that stay, in order: all but those of `near_duplicates`.

    Arguments and errors are those of `near_duplicates`.

    Example:
        >>> deduplicate([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        [0, 1]
    """
    vectors = as_matrix(embeddings, "embeddings")
    found = near_duplicates(vectors, threshold, batch_size, show_progress_bar)
    gone = {duplicate.row for duplicate in found}
    return [row for row in range(len(vectors) if vectors.numel() else 0) if row not in gone]


def _leaders(neighbours: Neighbours, count: int, step: int, show_progress_bar: bool) -> _Array:
    """For each of n different vectors the first that stays and is near enough, or itself, `[n]`.

    Rows are settled block by block; those that stay take their neighbours among all later ones.
    """
    leader = np.arange(count)
    for start in with_progress(range(0, count, step), show_progress_bar):
        stop = min(start + step, count)
        open_ = start + np.flatnonzero(leader[start:stop] == np.arange(start, stop))
        if not len(open_):
            continue
        width = max(1, _BLOCK // len(open_))
        for first in range(start, count, width):
            places, near = neighbours.pairs(open_, first, min(first + width, count))
            rows = open_[places]
            later = (near > rows) & (leader[near] == near)
            rows, near = rows[later], near[later]
            # In order of the rows, so that each is settled before it takes others.
            for row in np.unique(rows).tolist():
                if leader[row] == row:
                    others = near[slice(*np.searchsorted(rows, [row, row + 1]))]
                    leader[others[leader[others] == others]] = row
    return leader

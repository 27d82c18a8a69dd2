"""How alike are two vectors? Cosine, dot product, and two distances with a minus in front.

In: embeddings as tensors, NumPy arrays or lists. Out: a tensor, larger where more alike.
Each function comes in two forms: all pairs `[n, d] x [m, d] -> [n, m]`, and `pairwise_...`, row by
row, `[n, d] x [n, d] -> [n]`. One vector `[d]` counts as one row.

The squares of numbers beyond 1e19 are beyond float32, those of numbers beyond 256 beyond float16.
Where a sum of products might be, it is computed in float64; a score is infinite only if it is
beyond what its own dtype holds.
"""

import functools
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from minilm import onednn
from minilm.errors import InputError
from minilm.pooling import Normalize
from minilm.vectors import as_matrix, as_numbers

__all__ = [
    "SIMILARITY_FUNCTIONS",
    "Embeddings",
    "Similarity",
    "SimilarityFunction",
    "as_matrices",
    "cos_sim",
    "dot_score",
    "euclidean_sim",
    "manhattan_sim",
    "pairwise_cos_sim",
    "pairwise_dot_score",
    "pairwise_euclidean_sim",
    "pairwise_manhattan_sim",
    "unit_vectors",
]

Embeddings = Tensor | np.ndarray[Any, Any] | Sequence[Any]

_Pairwise = TypeVar("_Pairwise", bound=Callable[..., Tensor])


def cos_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """cos(a_i, b_j) = a_i·b_j / (‖a_i‖ ‖b_j‖), `[n, d] x [m, d] -> [n, m]`; 0 for a zero vector.

    Args:
        a, b: Embeddings. Floating dtypes are kept (float64 stays float64) and the wider of two
            different ones is taken; integers become float32.

    Raises:
        InputError: The two have different widths, or more than two dimensions.
        InputTypeError: One is not a tensor, an array or a list of numbers.
    """
    a, b = as_matrices(a, b)
    return onednn.scores(unit_vectors(a), unit_vectors(b))


def dot_score(a: Embeddings, b: Embeddings) -> Tensor:
    """a_i·b_j, `[n, d] x [m, d] -> [n, m]`. Arguments and errors as in `cos_sim`."""
    return _in_range(onednn.scores, *as_matrices(a, b))


def euclidean_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """-‖a_i - b_j‖₂, `[n, d] x [m, d] -> [n, m]`. Arguments and errors as in `cos_sim`."""
    return _in_range(functools.partial(_distances, p=2.0), *as_matrices(a, b))


def manhattan_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """-‖a_i - b_j‖₁, `[n, d] x [m, d] -> [n, m]`. Arguments and errors as in `cos_sim`."""
    return _in_range(functools.partial(_distances, p=1.0), *as_matrices(a, b))


def _scalar_for_two_vectors(pairwise: _Pairwise) -> _Pairwise:
    """Give a tensor without dimensions for two single vectors `[d]`, as the reference does."""

    @functools.wraps(pairwise)
    def wrapped(a: Embeddings, b: Embeddings) -> Tensor:
        first, second = as_numbers(a, "a"), as_numbers(b, "b")
        scores = pairwise(first, second)
        return scores[0] if len(scores) == 1 and first.ndim == second.ndim == 1 else scores

    return cast("_Pairwise", wrapped)


@_scalar_for_two_vectors
def pairwise_cos_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """cos(a_i, b_i), `[n, d] x [n, d] -> [n]`. Errors as in `cos_sim`, or if n differs."""
    a, b = _rows(a, b)
    return (unit_vectors(a) * unit_vectors(b)).sum(dim=-1)


@_scalar_for_two_vectors
def pairwise_dot_score(a: Embeddings, b: Embeddings) -> Tensor:
    """a_i·b_i, `[n, d] x [n, d] -> [n]`. Errors as in `cos_sim`, or if n differs."""
    return _in_range(lambda a, b: (a * b).sum(dim=-1), *_rows(a, b))


@_scalar_for_two_vectors
def pairwise_euclidean_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """-‖a_i - b_i‖₂, `[n, d] x [n, d] -> [n]`. Errors as in `cos_sim`, or if n differs."""
    return _in_range(functools.partial(_pairwise_distances, p=2.0), *_rows(a, b))


@_scalar_for_two_vectors
def pairwise_manhattan_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """-‖a_i - b_i‖₁, `[n, d] x [n, d] -> [n]`. Errors as in `cos_sim`, or if n differs."""
    return _in_range(functools.partial(_pairwise_distances, p=1.0), *_rows(a, b))


Similarity = Callable[[Embeddings, Embeddings], Tensor]

# By the names that `similarity_fn_name` in config_sentence_transformers.json uses.
SIMILARITY_FUNCTIONS: dict[str, tuple[Similarity, Similarity]] = {
    "cosine": (cos_sim, pairwise_cos_sim),
    "dot": (dot_score, pairwise_dot_score),
    "euclidean": (euclidean_sim, pairwise_euclidean_sim),
    "manhattan": (manhattan_sim, pairwise_manhattan_sim),
}


class SimilarityFunction(Enum):
    """The names of `SIMILARITY_FUNCTIONS`, as an enumeration of the reference has them."""

    COSINE = "cosine"
    DOT_PRODUCT = "dot"
    DOT = "dot"  # noqa: PIE796  # another name for DOT_PRODUCT
    EUCLIDEAN = "euclidean"
    MANHATTAN = "manhattan"

    @classmethod
    def _missing_(cls, value: object) -> "SimilarityFunction":
        known = ", ".join(cls.possible_values())
        raise InputError(
            f"similarity_function is {value!r}; pass one of {known}", "similarity_function"
        )

    @staticmethod
    def possible_values() -> list[str]:
        """The names, as in `similarity_fn_name` of config_sentence_transformers.json."""
        return [member.value for member in SimilarityFunction]

    @staticmethod
    def to_similarity_fn(similarity_function: "str | SimilarityFunction") -> Similarity:
        """The function of that name for all pairs; an unknown name is an `InputError`."""
        return SIMILARITY_FUNCTIONS[SimilarityFunction(similarity_function).value][0]

    @staticmethod
    def to_similarity_pairwise_fn(similarity_function: "str | SimilarityFunction") -> Similarity:
        """The function of that name row by row; an unknown name is an `InputError`."""
        return SIMILARITY_FUNCTIONS[SimilarityFunction(similarity_function).value][1]


def unit_vectors(vectors: Tensor) -> Tensor:
    """Scale vectors to length 1 as `Normalize` does, `[..., d] -> [..., d]`, whatever their length.

    Where the squares are beyond the dtype, the largest number of the vector is made 1 before.
    """
    if vectors.numel():
        lengths = torch.linalg.vector_norm(vectors.detach(), dim=-1, keepdim=True)
        if not lengths.isfinite().all():
            largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
            vectors = torch.where(lengths.isfinite(), vectors, vectors / largest)
    unit: Tensor = Normalize()(vectors)
    return unit


def _in_range(score: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The scores of vectors, computed in float64 if a sum of products might be beyond the dtype."""
    if a.dtype == torch.float64 or "mps" in (a.device.type, b.device.type):  # mps has no float64
        return score(a, b)
    longest = [
        torch.linalg.vector_norm(each.detach(), dim=-1, dtype=torch.float32).max()
        for each in (a, b)
        if each.numel()
    ]
    # No sum is larger than (‖a‖ + ‖b‖)² (Cauchy and Schwarz); half of the range is for rounding.
    if float(sum(longest)) ** 2 < torch.finfo(a.dtype).max / 2:
        return score(a, b)
    return score(a.double(), b.double()).to(a.dtype)


def _pairwise_distances(a: Tensor, b: Tensor, p: float) -> Tensor:
    distances: Tensor = torch.linalg.vector_norm(a - b, ord=p, dim=-1)
    return -distances


def _distances(a: Tensor, b: Tensor, p: float) -> Tensor:
    # cdist knows no half precision. Its matrix product would make equal vectors differ by 1e-3.
    wide = torch.promote_types(a.dtype, torch.float32)
    mode = "donot_use_mm_for_euclid_dist"
    return -torch.cdist(a.to(wide), b.to(wide), p=p, compute_mode=mode).to(a.dtype)


def as_matrices(
    a: Embeddings, b: Embeddings, names: tuple[str, str] = ("a", "b")
) -> tuple[Tensor, Tensor]:
    """Both as `[rows, d]` tensors of one floating dtype on the first one's device.

    Errors are those of `cos_sim`, with the arguments called by `names`.
    """
    first, second = as_matrix(a, names[0]), as_matrix(b, names[1])
    if not first.numel():  # no rows have no width either
        first = first.new_zeros(0, second.shape[1])
    if not second.numel():
        second = second.new_zeros(0, first.shape[1])
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"{names[1]} has vectors of width {second.shape[1]}, {names[0]} of width "
            f"{first.shape[1]}; pass embeddings of one model",
            names[1],
        )
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(first.device, dtype)


def _rows(a: Embeddings, b: Embeddings) -> tuple[Tensor, Tensor]:
    first, second = as_matrices(a, b)
    if len(first) != len(second):
        raise InputError(f"b has {len(second)} rows, a has {len(first)}; pass as many", "b")
    return first, second

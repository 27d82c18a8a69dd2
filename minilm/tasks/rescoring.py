"""The nearest vectors by their codes of a byte or a bit, and then by better numbers.

In: queries as floating-point vectors, a corpus as codes of `minilm.quantize`. Out: row numbers and
scores, as from `search.py`. The codes are read instead of the vectors: a quarter of the bytes, or
a thirty-second. They rank nearly as the vectors do, so more than `top_k` candidates are taken, and
these are scored again, by vectors that may lie on a disk.

`scripts/bench/bench_search.py --recall` measures what is lost. Next: `index.py`, which keeps
vectors and codes in files.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm import onednn
from minilm.errors import InputError, InputTypeError
from minilm.inputs import check_choice, check_positive_int
from minilm.quantize import dequantize, model_ranges, quantize_embeddings
from minilm.similarity import Embeddings, cos_sim
from minilm.tasks.search import Best, Scores, full_precision, not_finite
from minilm.vectors import as_matrix, as_numbers

__all__ = ["CODES", "ROWS", "by_codes", "quantized_search", "rescore"]

_Array = np.ndarray[Any, Any]

CODES = ("int8", "uint8", "binary", "ubinary")
ROWS = 2**14  # codes looked at at a time: 25 MB once they are float32
_FEW = 24  # queries, up to which counting bits is faster than a matrix product


def quantized_search(
    query_embeddings: Embeddings,
    codes: Embeddings,
    precision: str,
    top_k: int = 10,
    *,
    rescore_embeddings: Embeddings | None = None,
    rescore_multiplier: int = 4,
    ranges: Embeddings | None = None,
) -> list[list[dict[str, int | float]]]:
    """Find the vectors of a corpus that are most similar to each query, by the corpus's codes.

    The candidates are those whose codes are best: bytes by the cosine of the query with the numbers
    that they stand for, bits by how many equal those of the query. Of `top_k * rescore_multiplier`
    of them the cosine is computed with `rescore_embeddings`, in float64. Deterministic; of equals
    the smaller row is better, at both steps.

    Args:
        query_embeddings: `[n, d]`, or one vector `[d]`, floating point: not codes.
        codes: `[m, d]` or, for bits, `[m, ⌈d / 8⌉]`, from `quantize_embeddings`. A memory-mapped
            array is not copied to memory.
        precision: The precision of the codes: "int8", "uint8", "binary" or "ubinary".
        top_k: Results for each query, fewer if the corpus has fewer.
        rescore_embeddings: `[m, d]`, the vectors, or int8 or uint8 codes of them, memory-mapped
            for example. By default the numbers that the codes stand for; then the best `top_k`
            by codes of a byte are the result already.
        rescore_multiplier: Candidates for each result.
        ranges: The ranges of bytes, by default `model_ranges()`.

    Returns:
        As `semantic_search`; the scores are cosines with the rescored vectors.

    Raises:
        InputError: The widths or the numbers of rows don't go together, a vector has a number that
            is not finite, `precision` is unknown, or a size is not positive.
        InputTypeError: The embeddings are not numbers, the codes are of another dtype than that
            precision has, or a size is not an integer.

    Example:
        >>> vectors = np.array([[0.9, 0.1], [0.6, 0.8], [-1.0, 0.0]])
        >>> codes = quantize_embeddings(vectors, "ubinary")
        >>> quantized_search([0.8, 0.6], codes, "ubinary", 1, rescore_embeddings=vectors)
        [[{'corpus_id': 1, 'score': 0.96}]]
    """
    top_k = check_positive_int(top_k, "top_k")
    multiplier = check_positive_int(rescore_multiplier, "rescore_multiplier")
    queries = as_matrix(query_embeddings, "query_embeddings")
    scores = by_codes(queries, codes, precision, ranges)
    better: Scores | None = None
    if rescore_embeddings is not None:
        better = _rescorer(scores.queries, rescore_embeddings, ranges)
        if len(better.corpus) != len(scores.corpus):
            raise InputError(
                f"rescore_embeddings has {len(better.corpus)} rows, codes has "
                f"{len(scores.corpus)}; pass the vectors that the codes were made of",
                "rescore_embeddings",
            )
    elif precision.endswith("binary"):
        better = _Decoded(scores.queries, scores.corpus, precision, ranges)
    results: list[list[dict[str, int | float]]] = []
    for rows in scores.chunks():
        best = Best(rows.stop - rows.start, top_k if better is None else top_k * multiplier)
        scores.improve(best, rows, ROWS)
        if better is not None:
            chosen = Best(best.queries, top_k)
            rescore(better, best, chosen, rows)
            best = chosen
        results += [
            [{"corpus_id": i, "score": score} for i, score in found] for found in best.results()
        ]
    return results


def by_codes(
    queries: Tensor, codes: Embeddings, precision: str, ranges: Embeddings | None = None
) -> Scores:
    """The scores of queries `[n, d]`, floating point, against codes, by which candidates are found.

    The other arguments, and errors, are those of `quantized_search`.
    """
    check_choice(precision, CODES, "precision")
    tensor = as_numbers(codes, "codes").detach().cpu()
    dtype = torch.uint8 if precision.startswith("u") else torch.int8
    if tensor.dtype != dtype:
        found, wanted = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
        raise InputTypeError(f"codes is of {found}; {precision} codes are of {wanted}", "codes")
    width = queries.shape[1]
    expected = (width + 7) // 8 if precision.endswith("binary") else width
    if tensor.ndim != 2 or tensor.shape[1] != expected:
        raise InputError(
            f"codes has shape {list(tensor.shape)}; {precision} codes for queries of width {width} "
            f"have shape [rows, {expected}]",
            "codes",
        )
    if precision.endswith("binary"):
        return _Bits(queries.cpu(), tensor, precision)
    return _Decoded(queries.cpu(), tensor, precision, ranges)


def rescore(
    scores: Scores,
    candidates: Best,
    chosen: Best,
    rows: slice,
    first_id: int = 0,
    argument: str = "rescore_embeddings",
) -> None:
    """Put candidates among the best by their exact scores.

    Args:
        scores: The scores by the better numbers.
        candidates: Some for each of the queries `rows`. Only those from `first_id` on that the
            corpus of `scores` holds are considered.
        chosen: The best so far of the same queries; it is changed.
        rows: The place of these queries in `scores`.
        first_id: The number that the first vector of the corpus has among the candidates.
        argument: What to call the corpus in an error.

    Raises:
        InputError: A candidate has a number that is not finite.
    """
    here = (candidates.ids >= first_id) & (candidates.ids < first_id + len(scores.corpus))
    i, ids = candidates.rows[here], candidates.ids[here]
    values = scores.exact(torch.from_numpy(i + rows.start), torch.from_numpy(ids - first_id))
    finite = values.isfinite()
    if not finite.all():
        raise not_finite(argument, int(ids[int((~finite).nonzero()[0])]))
    chosen.add(i, ids, values.numpy())


class _Decoded(Scores):
    """The cosines of queries with the numbers that codes stand for."""

    def __init__(
        self, queries: Tensor, codes: Tensor, precision: str, ranges: Embeddings | None
    ) -> None:
        self.precision, self.ranges = precision, ranges
        if precision.endswith("int8"):
            self.ranges = model_ranges(queries.shape[1]) if ranges is None else ranges
            zero = np.zeros((1, queries.shape[1]), np.int8)
            middle = dequantize(zero, "int8", self.ranges)
            step = dequantize(zero + np.int8(1), "int8", self.ranges) - middle
            # No cosine depends on a constant factor, which is all that decoding then is.
            self.is_plain = bool(
                precision == "int8"
                and (np.abs(step - step[0, 0]) < 1e-4 * step[0, 0]).all()
                and (np.abs(middle) < 1e-3 * step[0, 0]).all()
            )
        super().__init__(queries, codes, cos_sim, ("query_embeddings", "codes"))

    def vectors(self, rows: Tensor | slice) -> Tensor:
        codes = self.corpus[rows]
        if self.precision == "int8" and self.is_plain:
            return codes.to(self.queries.dtype)
        decoded = dequantize(
            codes.numpy(), self.precision, self.ranges, width=self.queries.shape[1]
        )
        return torch.from_numpy(decoded).to(self.queries.dtype)


class _Bits(Scores):
    """How many bits of a code equal those of a query: whole numbers, so that no rounding decides.

    Bits are counted, or for many queries a matrix product gives the same numbers.
    """

    def __init__(self, queries: Tensor, codes: Tensor, precision: str) -> None:
        super().__init__(queries, codes, cos_sim, ("query_embeddings", "codes"))
        self.exact_is_known = False  # the numbers of `block` are taken as they are
        self.precision = precision
        self.width = queries.shape[1]
        self.bits = quantize_embeddings(self.queries, "ubinary")  # [n, ⌈d / 8⌉]
        self.signs = torch.where(self.queries > 0, 1.0, -1.0).to(torch.float32)
        self.ones = (self.queries > 0).sum(dim=1)

    def block(self, rows: Tensor | slice, start: int, stop: int) -> Tensor:
        codes = self.corpus[start:stop].numpy()
        if self.precision == "binary":
            codes = codes.view(np.uint8) ^ np.uint8(128)  # 128 more
        bits = self.bits[rows]
        if len(bits) > _FEW:
            unpacked = np.unpackbits(codes, axis=1, count=self.width).astype(np.float32)
            # Equal bits: 1 in both, less 1 in the code alone, plus 0 in the query.
            zeros = (self.width - self.ones[rows]).to(torch.float32)
            with full_precision(self.signs.device):
                same = onednn.scores(self.signs[rows], torch.from_numpy(unpacked))
            return same.add_(zeros.unsqueeze(1))
        return torch.from_numpy(_matches(bits, codes, self.width))


def _matches(bits: _Array, codes: _Array, width: int) -> _Array:
    """How many of `width` bits are equal: `[n, bytes] x [m, bytes] -> [n, m]`, float32."""
    words = -(-codes.shape[1] // 8)
    # A column for each 8 bytes, so that the sum over them adds long rows.
    columns = np.zeros((len(codes), 8 * words), np.uint8)
    columns[:, : codes.shape[1]] = codes
    by_word = np.ascontiguousarray(columns.view(np.uint64).T)  # [words, m]
    of_query = np.zeros((len(bits), 8 * words), np.uint8)
    of_query[:, : bits.shape[1]] = bits
    found = np.empty((len(bits), len(codes)), np.float32)
    for row, query in enumerate(of_query.view(np.uint64)):
        different = np.zeros(len(codes), np.uint32)
        for word, column in zip(query, by_word, strict=True):
            different += np.bitwise_count(column ^ word)
        np.subtract(width, different, out=found[row], casting="unsafe")
    return found


def _rescorer(queries: Tensor, embeddings: Embeddings, ranges: Embeddings | None) -> Scores:
    rows = as_matrix(embeddings, "rescore_embeddings", keep=True).cpu()
    if rows.shape[1] != queries.shape[1]:
        raise InputError(
            f"rescore_embeddings has vectors of width {rows.shape[1]}, query_embeddings of width "
            f"{queries.shape[1]}; pass the vectors, or int8 codes of them",
            "rescore_embeddings",
        )
    if rows.dtype in (torch.int8, torch.uint8):
        return _Decoded(queries, rows, str(rows.dtype).removeprefix("torch."), ranges)
    return Scores(queries, rows, cos_sim, ("query_embeddings", "rescore_embeddings"))

"""Smaller vectors: a byte or a bit for each number instead of four bytes.

In: embeddings. Out: NumPy arrays of codes, and back.

A code of one byte says in which of 256 buckets between a smallest and a largest value a number
lies. Those ranges are the trouble: taken from the vectors at hand, as the reference does by
default, a code means something else in every call, and two codes of one text differ. For the
published model they need not be: its vectors have length 1, so the numbers are of one size,
1/√384 on average, in every dimension and for every text. `model_ranges` therefore is fixed, the
same in all dimensions and symmetric::

    ranges = model_ranges()
    quantize_embeddings(encoder.encode(texts), "int8", ranges)  # round(384 x), from -128 to 127

The dot product of two such vectors of int8 is 384² times that of the embeddings, rounding apart, so
any index for int8 ranks by it directly. `scripts/make/int8_ranges.py` measures what that costs.

Numbers 127, 223 and 319 of the published model are as good as 0 in every text, see
`minilm.parity.check.dead_numbers`: their codes of one byte are all 0, their bits say nothing, and
differ if they are made from float16, where two of the numbers are 0. `encode` makes bits from
float32.
"""

import json
import logging
import re
from functools import cache
from importlib import resources
from math import sqrt
from typing import Any, Literal, overload

import numpy as np
from torch import Tensor

from minilm.errors import InputError, InputTypeError
from minilm.inputs import check_in_range
from minilm.similarity import Embeddings
from minilm.vectors import as_floats, as_numbers

__all__ = [
    "PRECISIONS",
    "Precision",
    "as_stored",
    "check_precision",
    "dequantize",
    "has_model_ranges",
    "model_ranges",
    "precision_of_bits",
    "quantize_embeddings",
    "stored_bytes",
    "stored_width",
]

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]

_Array = np.ndarray[Any, Any]
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "binary": np.dtype(np.int8),
    "ubinary": np.dtype(np.uint8),
}
PRECISIONS = tuple(_DTYPES)
_ENOUGH = 100  # embeddings for ranges of their own, by the reference's judgement

logger = logging.getLogger(__name__)


@overload
def quantize_embeddings(
    embeddings: Tensor | _Array,
    precision: str,
    ranges: Embeddings | None = None,
    calibration_embeddings: Embeddings | None = None,
) -> _Array: ...


@overload
def quantize_embeddings(
    embeddings: Embeddings,
    precision: str,
    ranges: Embeddings | None = None,
    calibration_embeddings: Embeddings | None = None,
) -> _Array | list[_Array]: ...


def quantize_embeddings(
    embeddings: Embeddings,
    precision: str,
    ranges: Embeddings | None = None,
    calibration_embeddings: Embeddings | None = None,
) -> _Array | list[_Array]:
    """Code each number by a byte or a bit.

    With ranges lo and hi: floor((x - lo) / ((hi - lo) / 255)), kept within 0 and 255, as uint8;
    128 less as int8. Binary: whether x > 0, eight numbers a byte, the first in the highest bit, as
    uint8 ("ubinary") or 128 less as int8 ("binary").

    Args:
        embeddings: `[n, d]` or `[d]`, floating point, or a list of matrices `[tokens, d]`.
        precision: "float32", "int8", "uint8", "binary" or "ubinary".
        ranges: `[2, d]`, the smallest and the largest value of each dimension; for int8 and uint8
            only. Best `model_ranges()`.
        calibration_embeddings: `[m, d]`, vectors to take the ranges from. Without either they are
            taken from the embeddings themselves, and the codes can't be compared with others.

    Returns:
        `[n, d]` or, for bits, `[n, ⌈d / 8⌉]`, each row filled up with zeros. A list of matrices
        gives a list; an empty list, an empty list.

    Raises:
        InputError: The precision is unknown, widths differ, a number is NaN, a range is not finite
            or ends before it begins, or ranges would have to be taken from one embedding.
        InputTypeError: The embeddings are not numbers, or are codes already.
    """
    check_precision(precision)
    if isinstance(embeddings, list | tuple):
        if not embeddings:
            return []
        if np.ndim(embeddings[0]) == 2 and not isinstance(embeddings[0], list | tuple):
            matrices = [
                as_floats(matrix, f"embeddings[{i}]") for i, matrix in enumerate(embeddings)
            ]
            if precision.endswith("int8") and ranges is None:  # the same ones for all
                try:
                    rows = np.concatenate(matrices)
                except ValueError as error:
                    problem = "embeddings has vectors of different widths"
                    raise InputError(problem, "embeddings") from error
                ranges = _ranges_of(rows, precision, calibration_embeddings)
            return [_codes(matrix, precision, ranges, None) for matrix in matrices]
    return _codes(as_floats(embeddings, "embeddings"), precision, ranges, calibration_embeddings)


def dequantize(
    codes: Embeddings,
    precision: str,
    ranges: Embeddings | None = None,
    *,
    width: int | None = None,
) -> _Array:
    """Turn codes back into numbers, as near as the codes tell.

    Args:
        codes: What `quantize_embeddings` gave.
        precision: The precision given there.
        ranges: The ranges used there, for int8 and uint8.
        width: For bits, how many numbers a vector had; by default eight for each byte.

    Returns:
        float32, of the shape that the embeddings had. For a byte, the middle of its bucket, which
        with `model_ranges` is the int8 code times a constant. For a bit, ±1/√width, which makes
        vectors of length 1.

    Raises:
        InputError: The precision is unknown, ranges are missing or of another width, or `width`
            doesn't fit.
        InputTypeError: The codes have another dtype than that precision has.
    """
    dtype = _DTYPES[check_precision(precision)]
    array: _Array = as_numbers(codes, "codes").detach().cpu().numpy()
    if array.dtype != dtype:
        raise InputTypeError(
            f"codes is of {array.dtype}; {precision} codes are of {dtype}", "codes"
        )
    if precision == "float32":
        return array.copy()
    if precision.endswith("int8"):
        if ranges is None:
            raise InputError(
                "ranges is None; pass those that the codes were made with, such as model_ranges()",
                "ranges",
            )
        starts, steps = _starts_and_steps(ranges, array.shape[-1])
        number = array.astype(np.float32) + (128 if precision == "int8" else 0)
        # A dimension that had one value only has that one for its bucket 0.
        constant = np.diff(_range_rows(ranges), axis=0)[0] == 0
        half = np.where(constant, np.float32(0), np.float32(0.5))
        found: _Array = (starts + (number + half) * steps).astype(np.float32)
        return found
    packed = array.shape[-1]
    if width is None:
        width = 8 * packed
    check_in_range(width, max(1, 8 * packed - 7), 8 * packed, "width")
    unsigned = array if precision == "ubinary" else (array.astype(np.int16) + 128).astype(np.uint8)
    bits = np.unpackbits(unsigned, axis=-1, count=width).astype(np.float32)
    signs: _Array = (2 * bits - 1) / np.float32(sqrt(width))
    return signs


def model_ranges(
    width: int = 384, normalized: bool = True, *, unit_after_truncation: bool = False
) -> _Array:
    """Fixed ranges for the published model: the same in every call, process and machine.

    With them an int8 code is round(384 x), kept within -128 and 127. That holds numbers up to a
    third. In sentences none is larger. In one dimension, those of single words and of text without
    words reach 0.41, and lose what is beyond a third.

    Args:
        width: Numbers in a vector, at most 384; fewer after `truncate_dim`.
        normalized: The vectors come from the whole model, which makes their length 1. If not, from
            its mean pooling: those are of lengths from 1 to 9, and the short ones lose more.
        unit_after_truncation: The vectors were truncated to `width` numbers and then made of length
            1 again. That makes their numbers √(384 / width) times as large, by which the ranges
            are multiplied: within 1.5% the mean factor measured, for any width from 8 on.

    Returns:
        float32 `[2, width]`: the smallest and the largest value of each number.

    Raises:
        InputError, InputTypeError: `width` is not an integer from 1 to 384.
    """
    data = _shipped()
    full = data["width"]
    width = check_in_range(width, 1, full, "width")
    step = data["normalized" if normalized or unit_after_truncation else "pooled"]["step"]
    if unit_after_truncation:
        step *= sqrt(full / width)
    # Half a bucket lower than from -128 to 127: `quantize_embeddings` rounds down, and so to the
    # nearest.
    limits = np.array([[-128.5 * step], [126.5 * step]], np.float32)
    return np.repeat(limits, width, axis=1)


def has_model_ranges(weights_sha256: str) -> bool:
    """Whether `model_ranges` were measured with the model whose model.safetensors has this SHA-256,
    as in `encoder.source.sha256["model.safetensors"]`.
    """
    return bool(_shipped()["model_safetensors_sha256"] == weights_sha256)


@cache
def _shipped() -> dict[str, Any]:
    text = resources.files("minilm").joinpath("int8_ranges.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def _codes(
    array: _Array,
    precision: str,
    ranges: Embeddings | None,
    calibration_embeddings: Embeddings | None,
) -> _Array:
    if precision == "float32":
        with np.errstate(over="ignore"):  # looked for below
            narrow = array.astype(np.float32)
        if not np.isfinite(narrow[np.isfinite(array)]).all():
            raise InputError(
                "embeddings has numbers beyond what float32 holds; scale the vectors down",
                "embeddings",
            )
        return narrow
    if np.isnan(array).any():
        row = int(np.isnan(np.atleast_2d(array)).any(axis=1).argmax())
        raise InputError(f"embeddings[{row}] has a NaN, which has no code", "embeddings")
    if not array.size:
        shape = (*array.shape[:-1], stored_width(array.shape[-1], precision))
        return np.zeros(shape, _DTYPES[precision])
    if precision.endswith("binary"):
        bits = np.packbits(array > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if ranges is None:
        ranges = _ranges_of(array, precision, calibration_embeddings)
    starts, steps = _starts_and_steps(ranges, array.shape[-1])
    numbers = np.clip(np.floor((array - starts) / steps), 0, 255)
    return (numbers - (128 if precision == "int8" else 0)).astype(_DTYPES[precision])


def _ranges_of(
    array: _Array, precision: str, calibration_embeddings: Embeddings | None
) -> _Array | None:
    """The smallest and the largest value in each dimension."""
    argument = "embeddings" if calibration_embeddings is None else "calibration_embeddings"
    if calibration_embeddings is not None:
        array = as_floats(calibration_embeddings, argument)
    elif not array.size:
        return None  # nothing to code either
    if array.ndim == 1 or len(array) == 1:
        raise InputError(
            f"Cannot compute {precision} quantization ranges from {argument} with a single "
            "embedding: pass ranges, for the published model those of model_ranges(), or many "
            "calibration_embeddings",
            argument,
        )
    if calibration_embeddings is None and len(array) < _ENOUGH:
        logger.warning(
            "Computing %s quantization buckets based on %d embeddings. The codes can't be compared "
            "with those of another call; pass `ranges`, for the published model those of "
            "model_ranges(), or many `calibration_embeddings`.",
            precision,
            len(array),
        )
    found: _Array = np.stack([array.min(axis=0), array.max(axis=0)])
    if not np.isfinite(found).all():
        raise InputError(f"{argument} has a number that is not finite", argument)
    return found


def _starts_and_steps(ranges: Embeddings | None, width: int) -> tuple[_Array, _Array]:
    rows = _range_rows(ranges)
    if rows.shape[1] != width:
        raise InputError(
            f"ranges is for {rows.shape[1]} numbers, the vectors have {width}; "
            "pass ranges of that width",
            "ranges",
        )
    with np.errstate(over="ignore"):  # looked for below
        steps = (rows[1] - rows[0]) / np.float32(255)
    if not np.isfinite(steps).all():
        raise InputError("ranges is wider than float32 holds; scale the vectors down", "ranges")
    return rows[0], np.where(steps == 0, np.float32(1), steps)


def _range_rows(ranges: Embeddings | None) -> _Array:
    rows = as_floats(ranges, "ranges").astype(np.float32)
    if rows.ndim != 2 or len(rows) != 2:
        raise InputError(
            f"ranges has shape {list(rows.shape)}; pass [2, d], the smallest and the largest value "
            "of each dimension",
            "ranges",
        )
    if not np.isfinite(rows).all() or (rows[0] > rows[1]).any():
        raise InputError("ranges is not finite, or ends before it begins", "ranges")
    return rows


def stored_width(width: int, precision: str) -> int:
    """How many numbers a vector of `width` numbers has where it is stored: eight bits make one."""
    return -(-width // 8) if precision.endswith("binary") else width


def precision_of_bits(vectors: Any, dimension: int) -> str | None:
    """Whether vectors are bits of so many numbers each: "binary" or "ubinary"; None if not.

    Their bytes tell, since a file of decimals gives them back in another dtype: those of "binary",
    128 less, are negative as often as not.

    Args:
        vectors: A tensor or an array.
        dimension: How many numbers, and so bits, a vector has.
    """
    if vectors.ndim != 2 or vectors.shape[1] != stored_width(dimension, "ubinary"):
        return None
    if not len(vectors) or not re.match(r"(torch\.)?(b?float|u?int)", str(vectors.dtype)):
        return None
    low, high = float(vectors.min()), float(vectors.max())
    limit = 255 if low >= 0 else 127
    if not (-128 <= low <= high <= limit and bool((vectors % 1 == 0).all())):
        return None
    return "binary" if low < 0 else "ubinary"


def stored_bytes(width: int, precision: str) -> int:
    """How many bytes a vector of `width` numbers takes where it is stored."""
    size = {"float32": 4, "float16": 2}.get(precision, 1)
    return stored_width(width, precision) * size


def as_stored(vectors: _Array, precision: str, place: str = "") -> _Array:
    """Vectors as a file holds them: floating-point ones as "float32" or "float16", codes as given.

    A number beyond what float16 holds is an `InputError`; `place` is what to call the vectors.
    """
    if precision not in ("float32", "float16"):
        return vectors
    with np.errstate(over="ignore"):  # looked for below
        vectors = vectors.astype(precision, copy=False)
    if not np.isfinite(vectors).all():
        raise InputError(
            f"{place}numbers are beyond what float16 holds; write float32", "precision"
        )
    return vectors


def check_precision(precision: str) -> str:
    """Return `precision` if it is one of `PRECISIONS`; another is an `InputError`."""
    if precision not in PRECISIONS:
        raise InputError(
            f"Precision {precision!r} is not supported, must be one of "
            f"{{{', '.join(map(repr, PRECISIONS))}}}",
            "precision",
        )
    return precision

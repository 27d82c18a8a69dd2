"""Can these stored vectors be searched with this encoder? Some of the texts are embedded again.

In: an encoder, texts, their stored vectors, and their fingerprint if there is one. Out: a
`CheckResult`: the same, the same but for rounding, of another length limit, or of another model.
"""

import copy
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm import inputs
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError, InputTypeError
from minilm.inference.encode import required_ranges
from minilm.parity.causes import decimals, diagnose, short_form
from minilm.pretrained.fingerprint import Comparison, Fingerprint, Verdict, compare, fingerprint
from minilm.quantize import dequantize, precision_of_bits, quantize_embeddings, stored_width
from minilm.report import aligned, jsonable
from minilm.similarity import Embeddings

__all__ = ["LONGEST", "CheckResult", "check_vectors", "dead_numbers"]

# How far apart two right results can be, vectors having length 1. In float32, see causes.py. The
# others are 2.5 times the largest difference from float32 over the texts of golden.py: 1.6e-3 with
# bfloat16 products, 3.1e-3 with all in bfloat16, and 4.5e-4 in float16.
# int8 is within 5e-3 of int8 on another processor, and up to 1.5e-2 from other dtypes, as another
# model could be.
_TOLERANCES = {
    "float64": 2e-6,
    "float32": 2e-6,
    "float16": 1.2e-3,
    "bfloat16": 8e-3,
    "int8": 8e-3,
}
_DEAD = 1e-6  # a number that is never larger is dead; those of the published model are below 2e-7
_LIMITS = (128, 256, 512)  # what the three files of the published model say
LONGEST = 16  # texts that are checked in any case
_WORST = 8  # of the texts that differ, on which a limit is tried first
_SHOWN = 5
_DIAGNOSED = 24  # texts on which mistakes are tried: each takes time for each of them


@dataclass(frozen=True)
class CheckResult:
    """What `check_vectors` found.

    Attributes:
        verdict: "same", all bits but for those lost in storing; "rounding", what dtypes explain;
            "limit", another `max_seq_length` explains it; "model", anything else.
        rows: How many vectors there are.
        checked: How many of them were compared.
        max_abs: The largest difference of two numbers; infinite if one is not finite.
        reason: The reason of the verdict, for a reader.
        own: The fingerprint of the encoder.
        recorded: The fingerprint that came with the vectors, if any.
        agreement: How the two fingerprints differ; None without `recorded`.
        limit: The `max_seq_length` that explains the difference, if one does.
        worst: Rows with their differences, the worst first.
        diagnosis: A `minilm.parity.causes.Diagnosis`, where one was made.
    """

    verdict: Verdict
    rows: int
    checked: int
    max_abs: float
    reason: str
    own: Fingerprint
    recorded: Fingerprint | None = None
    agreement: Comparison | None = None
    limit: int | None = None
    worst: tuple[tuple[int, float], ...] = ()
    diagnosis: Any = None

    @property
    def is_compatible(self) -> bool:
        """Whether the vectors can be searched with this encoder."""
        return self.verdict in ("same", "rounding")

    @property
    def fingerprints_agree(self) -> bool | None:
        """Whether vectors of the recorded model should be ours, but for rounding."""
        return None if self.agreement is None else self.agreement.is_compatible

    @property
    def summary(self) -> str:
        """The finding in one line."""
        line = f"{self.verdict}: {self.reason} ({self.checked:,} of {self.rows:,} rows checked)"
        if self.agreement is not None and self.fingerprints_agree != self.is_compatible:
            line += f"; but the fingerprints say: {self.agreement.verdict}"
        return line

    def table(self) -> str:
        """The finding as text."""
        lines = [
            self.summary,
            f"max abs:  {self.max_abs:.1e}",
            f"recorded: {self.recorded or 'no fingerprint'}",
            f"encoder:  {self.own}",
        ]
        if self.agreement is not None:
            lines.append(f"between the two: {self.agreement}")
        if self.max_abs > 0 and self.worst:
            rows = [("row", "max abs"), *((f"{row}", f"{value:.1e}") for row, value in self.worst)]
            lines += ["", *aligned(rows, right=(0, 1))]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The finding as an object for JSON."""
        names = ("verdict", "summary", "reason", "rows", "checked", "max_abs", "limit",
                 "fingerprints_agree", "own", "recorded")  # fmt: skip
        return {
            **{name: jsonable(getattr(self, name)) for name in names},
            "differing": list(self.agreement.differing) if self.agreement else None,
            "worst": [{"row": row, "max_abs": jsonable(value)} for row, value in self.worst],
        }


def check_vectors(
    encoder: SentenceEncoder,
    texts: Sequence[str],
    vectors: Embeddings,
    recorded: Fingerprint | None = None,
    *,
    sample: int = 256,
) -> CheckResult:
    """Can these stored vectors be searched with this encoder? Embed some of the texts again.

    Args:
        encoder: The model, with its `max_seq_length` and default prompt; it is left as it is.
        texts: n texts, in the order of the vectors.
        vectors: Floating point `[n, 384]`; codes of the precision of `recorded`; or bits, bytes
            `[n, 48]`, which need no record: an array (of a memory-mapped one only some rows are
            read), a tensor, or lists.
        recorded: The fingerprint that came with them. Its dtype says how much rounding to expect,
            and its limit is tried first; the verdict is that of the numbers.
        sample: How many rows to check, evenly spread; the longest texts, which alone show another
            limit, are checked too.

    Returns:
        See `CheckResult`. What rounding explains is a bound, not a proof: below it another model
        could hide in bfloat16, though none that was trained otherwise.

    Raises:
        InputTypeError: A text or a vector is something else.
        InputError: There are none; the numbers of texts and vectors differ; or the vectors are
            neither floating-point numbers nor bits, and no fingerprint tells their precision.
    """
    texts, _ = inputs.as_texts(texts, "texts")
    inputs.check_positive_int(sample, "sample")
    vectors = _as_array(vectors)
    own = fingerprint(encoder)
    bits = None if recorded is not None else precision_of_bits(vectors, own.dimension)
    is_coded = bits is not None or (recorded is not None and recorded.precision != "float32")
    count, width = _shape(vectors, is_coded)
    if not texts:
        raise InputError("texts is empty; pass at least one", "texts")
    if count != len(texts):
        raise InputError(f"vectors has {count} rows, texts {len(texts)}; pass as many", "vectors")
    if recorded is not None:  # ours are made in the same way
        own = replace(
            own,
            prompt=recorded.prompt,
            truncation=recorded.truncation,
            precision=recorded.precision,
            dimension=min(recorded.dimension, encoder.bert.config.hidden_size),
            normalize=recorded.normalize,
        )
    elif bits is not None:
        own = own.for_call(precision=bits)
    elif own.dimension < width <= encoder.bert.config.hidden_size:
        own = own.for_call(truncate_dim=width)
    made = _Recorded(encoder, own)
    result = CheckResult(
        verdict="model",
        rows=count,
        checked=0,
        max_abs=math.inf,
        reason=f"vectors are {width} numbers wide, this encoder's {own.dimension}",
        own=own,
        recorded=recorded,
        agreement=None if recorded is None else compare(recorded, own),
    )
    if width != made.width:
        return result
    rows = _choose(texts, sample)
    stored = _rows(vectors, rows)
    chosen = [texts[row] for row in rows]
    ours = made.embed(encoder, chosen)
    difference = made.differences(ours, stored)  # [rows]
    order = difference.argsort(descending=True, stable=True)[:_SHOWN].tolist()
    result = replace(
        result,
        checked=len(rows),
        max_abs=float(difference.max()),
        worst=tuple((rows[i], float(difference[i])) for i in order),
    )
    short = made.stored_in(ours, stored)
    if short is not None:
        return replace(result, verdict="same", reason=f"equal, bit by bit{short}")
    bound = _bound(own, recorded, ours, stored)
    if result.max_abs <= bound:
        reason = f"within {bound:.1e}, which rounding explains"
        return replace(result, verdict="rounding", reason=reason)
    if bits is not None:
        for how, read in _other_readings(stored, bits):
            if float(made.differences(ours, read).max()) <= bound:
                return replace(result, reason=f"the bits are ours, but {how}")
    limit = _explaining_limit(encoder, made, chosen, stored, difference, bound, recorded)
    if limit is not None:
        reason = f"the texts were cut at {limit} tokens, this encoder's limit is "
        reason += f"{own.max_seq_length}"
        return replace(result, verdict="limit", limit=limit, reason=reason)
    return _diagnosed(encoder, chosen, stored, result)


def dead_numbers(encoder: SentenceEncoder) -> list[int]:
    """The places of the numbers that are as good as 0 in every vector, whatever the text.

    The last LayerNorm makes weight · x + bias, where |x| is at most √(width - 1). In the published
    model weight and bias are both some 1e-32 at 127 and 223, and 1e-9 and 9e-8 at 319: training
    has switched these three off. Their signs say nothing, and the bits of float16 vectors, where
    two of them are 0, differ there from those of float32 vectors.
    """
    norm: Any = encoder.bert.layers[-1].feed_forward_layer_norm
    weight, bias = norm.weight.detach().double().abs(), norm.bias.detach().double().abs()
    largest = bias + weight * math.sqrt(len(bias) - 1)
    return [place for place, most in enumerate(largest.tolist()) if most < _DEAD]


def _other_readings(stored: Tensor, precision: str) -> Iterator[tuple[str, Tensor]]:
    """What other programs do otherwise when they make bits, and the codes that we would make."""
    less = 128 if precision == "binary" else 0
    codes = (stored.to(torch.int16).numpy() + less).astype(np.uint8)
    lowest = "the first number of each eight is in the lowest bit, not in the highest"
    ways = {lowest: _turned(codes)}
    if less:
        signed = "the bytes are those of ubinary as they are, not 128 less"
        ways |= {signed: codes ^ 128, f"{signed}, and {lowest}": _turned(codes ^ 128)}
    for how, read in ways.items():
        yield how, torch.from_numpy(read.astype(np.int16) - less)


def _turned(codes: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    return np.packbits(np.unpackbits(codes, axis=1), axis=1, bitorder="little")


def _as_array(vectors: Any) -> Any:
    """Vectors as a tensor or an array, of which nothing is copied if it is one already."""
    if isinstance(vectors, Tensor | np.ndarray):
        return vectors
    if not isinstance(vectors, Sequence) or isinstance(vectors, str | bytes):
        kind = type(vectors).__name__
        raise InputTypeError(f"vectors is of type {kind}; pass an array", "vectors")
    parts = [part.detach().cpu() if isinstance(part, Tensor) else part for part in vectors]
    if all(isinstance(part, Tensor) and part.ndim == 1 for part in parts) and (
        len({(part.shape, part.dtype) for part in parts}) == 1
    ):
        return torch.stack(parts)
    try:
        array = np.array([np.asarray(part) for part in parts])
    except (ValueError, TypeError) as error:
        raise InputTypeError(f"vectors can't be read as rows: {error}", "vectors") from error
    if parts and (array.ndim != 2 or array.dtype.kind not in "fiub"):
        raise InputTypeError("vectors can't be read as rows of numbers", "vectors")
    return array if parts else array.reshape(0, 0)


def _shape(vectors: Any, is_coded: bool) -> tuple[int, int]:
    """The number of vectors and their width; vectors must be floating point, unless coded."""
    if vectors.ndim != 2:
        raise InputError(f"vectors has shape {list(vectors.shape)}; pass [n, 384]", "vectors")
    dtype, (count, width) = vectors.dtype, vectors.shape
    is_float = dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype.kind == "f"
    if not is_float and not is_coded:
        raise InputError(
            f"vectors has dtype {dtype}; pass floating-point vectors, or with codes the "
            "fingerprint that tells their precision",
            "vectors",
        )
    return count, width


def _rows(vectors: Any, rows: Sequence[int]) -> Tensor:
    """Some rows, `[rows, d]`, in their own dtype, on the CPU."""
    if isinstance(vectors, Tensor):
        index = torch.tensor(rows, dtype=torch.int64, device=vectors.device)
        return vectors.detach().index_select(0, index).cpu()
    picked = np.ascontiguousarray(vectors[list(rows)])
    if picked.dtype.kind == "f" and picked.dtype.itemsize > 8:
        picked = picked.astype(np.float64)
    return torch.from_numpy(picked.astype(picked.dtype.newbyteorder("="), copy=False))


def _choose(texts: Sequence[str], sample: int) -> list[int]:
    """Choose rows to check: evenly spread, and the longest texts."""
    count = len(texts)
    if count <= sample:
        return list(range(count))
    rows = {number * count // sample for number in range(sample)}
    # In bytes: a letter of Chinese is three of them, and a word piece of its own.
    lengths = [len(text.encode("utf-8", "replace")) for text in texts]
    return sorted(rows.union(heapq.nlargest(LONGEST, range(count), key=lengths.__getitem__)))


class _Recorded:
    """How vectors were made by their record, to make ours in the same way and compare the two."""

    def __init__(self, encoder: SentenceEncoder, record: Fingerprint) -> None:
        full = encoder.bert.config.hidden_size
        self.precision, self.dimension = record.precision, record.dimension
        self.options: dict[str, Any] = {
            "prompt": record.prompt,
            "truncation": "chunk" if record.truncation == "chunk" else "silent",
            "truncate_dim": record.dimension,
            "normalize_embeddings": record.normalize
            and (record.dimension < full or isinstance(encoder.normalize, nn.Identity)),
        }
        self.dead = [each for each in dead_numbers(encoder) if each < record.dimension]
        self.ranges: np.ndarray[Any, Any] | None = required_ranges(
            encoder, self.precision, record.dimension, self.options["normalize_embeddings"],
            f"vectors are {self.precision} with ranges of their own, which are not known; check "
            "the float32 vectors",
            "vectors",
        )  # fmt: skip

    @property
    def width(self) -> int:
        """How many numbers a stored vector has."""
        return stored_width(self.dimension, self.precision)

    def embed(self, encoder: SentenceEncoder, texts: list[str]) -> Tensor:
        """Texts -> `[n, dimension]`, not rounded."""
        vectors: Tensor = encoder.encode(texts, convert_to_tensor=True, **self.options)
        return vectors.detach().cpu()

    def differences(self, ours: Tensor, stored: Tensor) -> Tensor:
        """The largest difference of a number in each row, `[rows]`; infinite if one is not finite.

        A number that a code stands for differs by its distance from the code's range.
        """
        if self.precision == "float32":
            difference = (ours.double() - stored.double()).abs()
        elif self.ranges is not None:
            difference = self._beyond_the_bucket(ours, stored)
        else:
            signs = dequantize(self._codes(stored), self.precision, width=self.dimension)
            difference = ours.double().abs() * (torch.from_numpy(signs) * ours < 0)
        return difference.amax(dim=1).nan_to_num(nan=math.inf, posinf=math.inf)

    def stored_in(self, ours: Tensor, stored: Tensor) -> str | None:
        """Whether the stored vectors are ours, see `_stored_in`, or codes of ours."""
        if self.precision == "float32":
            return _stored_in(ours, stored)
        codes = quantize_embeddings(ours.float().numpy(), self.precision, ranges=self.ranges)
        if np.array_equal(codes, stored):
            return f" after rounding to {self.precision}"
        if self.ranges is not None or not self.dead:
            return None
        differing = np.unpackbits((codes ^ self._codes(stored)).view(np.uint8), axis=1)
        if differing[:, : self.dimension].sum() > differing[:, self.dead].sum():
            return None
        places = ", ".join(map(str, self.dead))
        return (
            f" after rounding to {self.precision}, where {places}, which are always 0, don't count"
        )

    def _codes(self, stored: Tensor) -> "np.ndarray[Any, Any]":
        kind = np.uint8 if self.precision in ("uint8", "ubinary") else np.int8
        return stored.numpy().astype(kind)

    def _beyond_the_bucket(self, ours: Tensor, stored: Tensor) -> Tensor:
        assert self.ranges is not None
        low, high = torch.from_numpy(self.ranges.astype(np.float64))
        step = (high - low) / 255
        code = stored.double() + (128 if self.precision == "int8" else 0)
        floor, ceiling = low + code * step, low + (code + 1) * step
        floor[code <= 0], ceiling[code >= 255] = -torch.inf, torch.inf  # saturated
        values = ours.double()
        beyond: Tensor = (floor - values).clamp_min(0) + (values - ceiling).clamp_min(0)
        return beyond


def _stored_in(ours: Tensor, stored: Tensor) -> str | None:
    """Whether the stored vectors are ours, or ours as rounded by what they were stored in.

    Returns:
        "", or words on that rounding; None if they are others.
    """
    if torch.equal(ours.double(), stored.double()):
        return ""
    if stored.dtype == torch.float64 and torch.equal(ours, stored.to(ours.dtype)):
        return f" in {str(ours.dtype).removeprefix('torch.')}"  # decimals, read with more bits
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if torch.finfo(dtype).eps > torch.finfo(ours.dtype).eps and torch.equal(
            ours.to(dtype).double(), stored.double()
        ):
            return f" after rounding to {str(dtype).removeprefix('torch.')}"
    digits = decimals(stored.double())
    if digits is not None:
        half = 0.5 * 10.0**-digits
        slack = 1e-7 * stored.double().abs() + 1e-12
        if bool(((ours.double() - stored.double()).abs() <= half + slack).all()):
            return f" after rounding to {digits} decimals"
    return None


def _bound(own: Fingerprint, recorded: Fingerprint | None, ours: Tensor, stored: Tensor) -> float:
    """How far rounding may have moved a number: in computing, and in storing."""
    dtypes = [own.dtype] + ([recorded.dtype] if recorded else [])
    computing = max(_TOLERANCES.get(dtype, 2e-6) for dtype in dtypes)
    longest = float(ours.double().norm(dim=1).nan_to_num().max()) if len(ours) else 1.0
    if own.precision != "float32":  # differences count from the edge of what a code stands for
        return computing * max(1.0, longest)
    values = stored.double().nan_to_num(posinf=0.0, neginf=0.0)
    form, storing = short_form(values), 0.0
    if isinstance(form, int):
        storing = 0.5 * 10.0**-form
    elif form is not None:
        storing = float(values.abs().max()) * torch.finfo(form).eps / 2
    return computing * max(1.0, longest) + storing


def _explaining_limit(
    encoder: SentenceEncoder,
    made: "_Recorded",
    texts: list[str],
    stored: Tensor,
    difference: Tensor,
    bound: float,
    recorded: Fingerprint | None,
) -> int | None:
    """The `max_seq_length` with which our vectors are the stored ones, but for rounding."""
    wrong = [row for row in range(len(texts)) if float(difference[row]) > bound]
    # A text that the limit doesn't reach has not changed: those that agreed still do.
    rest = [row for row in range(len(texts)) if not float(difference[row]) > bound]
    worst = sorted(wrong, key=lambda row: -float(difference[row]))[:_WORST]
    longest = encoder.bert.config.max_position_embeddings
    limits = dict.fromkeys([recorded.max_seq_length, *_LIMITS] if recorded else _LIMITS)
    for limit in limits:
        if limit == encoder.max_seq_length or not 3 <= limit <= longest:
            continue
        other: Any = copy.copy(encoder)  # shares all but the limit, which other threads use
        other.max_seq_length = limit
        for rows in filter(None, (worst, wrong, rest)):
            again = made.embed(other, [texts[row] for row in rows])
            if float(made.differences(again, stored[rows]).max()) > bound:
                break
        else:
            return limit
    return None


def _diagnosed(
    encoder: SentenceEncoder, texts: list[str], stored: Tensor, result: CheckResult
) -> CheckResult:
    """The result with a diagnosis, where neither rounding nor a limit explains the difference."""
    advice = None
    if result.own.precision != "float32" or result.own.truncation == "chunk" or result.own.prompt:
        advice = "check plain float32 vectors to learn why"
    elif encoder.dtype not in (torch.float32, torch.float64):
        advice = "load the encoder in float32 to learn why"
    elif stored.shape[1] != encoder.bert.config.hidden_size:
        advice = "only whole vectors can show why"
    if advice is not None:
        return replace(result, reason=f"differs by {result.max_abs:.1e}; {advice}")
    diagnosis = diagnose(encoder, texts, stored, max_texts=_DIAGNOSED)
    result = replace(result, diagnosis=diagnosis, reason=diagnosis.summary)
    names = [cause.name for cause in (*diagnosis.causes, *diagnosis.alternatives)]
    fewer_bits = names and all(name.startswith(("float16", "bfloat16")) for name in names)
    # Equal as to directions: then the lengths are what differs, or a bound is.
    if diagnosis.is_equal or (diagnosis.verdict in ("cause", "tie") and fewer_bits):
        return replace(result, verdict="rounding")
    return result

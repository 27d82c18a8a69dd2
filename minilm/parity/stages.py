"""Is this the same model? Two implementations compared, stage by stage, in numbers.

In: our encoder, and another implementation's stages (`scripts/parity.py` brings the reference's;
this file imports none). Out: a `Report` of rows, each with its bar, PASS or FAIL. A stage has the
name that `interpret/trace.py` gives to the same tensor.

Rounding decides how such a comparison must be made. In float32 two right implementations differ by
3e-7, since sums are taken in another order, and a small mistake can hide in that. In float64 they
agree to 1e-15, and every wrong detail stands out by eight orders or more (LayerNorm's eps 1e-6
for 1e-12: 1.8e-5; tanh GELU for erf: 3.9e-4). So the float64 rows are the proof, and the float32
rows say how near to the exact result we are, with the reference's own distance beside ours.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.bert import Attend
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError
from minilm.inference.kernels import fast_products
from minilm.report import aligned, jsonable, shortened
from minilm.tokenizer import WordPieceTokenizer

__all__ = [
    "Bars",
    "Golden",
    "Report",
    "Row",
    "bars",
    "batches",
    "compare_gradients",
    "compare_ids",
    "compare_invariance",
    "compare_stages",
    "compare_with_golden",
    "record_stages",
    "stage_names",
]

Stages = dict[str, Tensor]
Features = dict[str, Tensor]


@dataclass(frozen=True)
class Bars:
    """The largest differences that pass, on every processor; None for a stage without a bar.

    All dtypes are compared with the reference's float64.
    """

    stage: float | None  # embeddings, layers, pooled: max abs
    attention: float | None  # probabilities: max abs
    sentence_embedding: float  # max abs
    sentence_embedding_rms: float | None
    row_sum: float  # of attention probabilities, minus 1
    between: float | None = None  # ours - reference's in this dtype: max abs
    invariance: float | None = None  # one text in different batches: max abs


_BARS = {
    torch.float64: Bars(5e-14, 5e-14, 2e-15, None, 1e-14),
    torch.float32: Bars(2e-5, 3e-6, 3e-7, 5e-8, 5e-7, between=4e-7, invariance=4e-7),
    # 11 and 8 bits of precision: a few times 2^-11 and 2^-8 of an element of about 0.2.
    torch.float16: Bars(None, None, 1e-3, 2e-4, 5e-3),
    torch.bfloat16: Bars(None, None, 6e-3, 1e-3, 4e-2),
}
_GRADIENT = 1e-13
_ZERO_GRADIENT = 1e-8

# Long texts of many unknown words have attention scores of up to 94, where float32 numbers are
# 8e-6 apart. Rounding exact queries and keys to float32 alone then moves a probability by 3.1e-6,
# so that no float32 computation stays below 3e-6 on all texts: neither does the reference. And the
# largest of 268,000 rounding errors of the embeddings depends on the processor: the reference's is
# 2.0e-7 on one with AVX-512, 3.0e-7 on another. Where its own error on the same texts comes near
# the bar, ours may be as large, within this factor, but never more than four times the bar. The
# report shows both numbers: stated > relaxed.
#
# A largest error is that of one number among millions. The root mean square tells the products
# apart that round more: in float32 it is at most 1.5 times the reference's own, in every row.
_OWN_ERROR = 1.5
_MOST_RELAXED = 4.0


def bars(dtype: torch.dtype) -> Bars:
    """The bars for a model in `dtype`.

    Raises:
        InputError: There are none: in int8 only whole vectors are compared.
    """
    if dtype not in _BARS:
        raise InputError(f"dtype is {dtype}, for which stages have no bars", "dtype")
    return _BARS[dtype]


@dataclass(frozen=True)
class Row:
    """One compared quantity.

    Attributes:
        stage: What was compared.
        measures: The differences, by how they are measured: "max abs", "rms", ...
        bars: The largest value that passes, for the measures that have a bar.
        reference: The reference's own error, by the same measures, where there is one.
        worst_text: Which text differs most; None where that has no meaning.
        stated: The bars before they were relaxed, where they were.
    """

    stage: str
    measures: dict[str, float]
    bars: dict[str, float] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)
    worst_text: int | None = None
    stated: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every measure is within its bar; a NaN is not."""
        return all(self.measures[name] <= bar for name, bar in self.bars.items())

    def to_dict(self) -> dict[str, Any]:
        """The row as an object for JSON."""
        return {**jsonable(vars(self)), "passed": self.passed}


@dataclass
class Report:
    """Rows under headings, in the order of the computation.

    Attributes:
        texts: The texts compared.
        sections: (heading, rows), one for each comparison.
    """

    texts: Sequence[str]
    sections: list[tuple[str, list[Row]]] = field(default_factory=list)

    def add(self, heading: str, rows: list[Row]) -> None:
        """Append a section."""
        self.sections.append((heading, rows))

    @property
    def rows(self) -> list[Row]:
        """The rows of all sections."""
        return [row for _, rows in self.sections for row in rows]

    @property
    def passed(self) -> bool:
        """Whether every row passed, and there was one with a bar."""
        return any(row.bars for row in self.rows) and all(row.passed for row in self.rows)

    @property
    def first_divergence(self) -> tuple[str, Row] | None:
        """The first failed row, in the order of the computation, with its heading."""
        return next(((h, row) for h, rows in self.sections for row in rows if not row.passed), None)

    def to_text(self) -> str:
        """The report as a table."""
        lines = []
        for heading, rows in self.sections:
            lines += [heading, "-" * len(heading), *_table(rows), ""]
        barred = [row for row in self.rows if row.bars]
        passed = sum(row.passed for row in barred)
        verdict = "PASS" if self.passed else "FAIL"
        lines.append(f"{verdict}: {passed} of {len(barred)} rows within their bars")
        if self.first_divergence is not None:
            heading, row = self.first_divergence
            lines.append(f"first stage that diverges: {row.stage} ({heading})")
            if row.worst_text is not None:
                shown = repr(shortened(self.texts[row.worst_text], 200))
                lines.append(f"text that diverges most there: [{row.worst_text}] {shown}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as an object for JSON."""
        first = self.first_divergence
        worst = None if first is None else first[1].worst_text
        return {
            "passed": self.passed,
            "texts": len(self.texts),
            "first_divergence": None if first is None else first[1].stage,
            "worst_text": None if worst is None else self.texts[worst],
            "sections": [{"heading": h, "rows": jsonable(rows)} for h, rows in self.sections],
        }


def _table(rows: Sequence[Row]) -> list[str]:
    """Show each row in a line: our difference, the reference's if known, the bar, the verdict."""
    names = list(dict.fromkeys(name for row in rows for name in row.measures))
    theirs = [name for name in names if any(name in row.reference for row in rows)]
    cells = [["", *names, *(f"ref. {name}" for name in theirs), "bar", ""]]
    for row in rows:
        ours = [_number(row.measures.get(name)) for name in names]
        its = [_number(row.reference.get(name)) for name in theirs]
        allowed = ", ".join(_bar(row, name) for name in row.bars)
        verdict = "" if not row.bars else "PASS" if row.passed else "FAIL"
        cells.append([row.stage, *ours, *its, allowed, verdict])
    return aligned(cells, right=range(1, len(cells[0]) - 1))


def _bar(row: Row, measure: str) -> str:
    bar, stated = row.bars[measure], row.stated.get(measure)
    return _number(bar) if stated in (None, bar) else f"{_number(stated)} > {_number(bar)}"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


_LAST_STAGES = ("pooled", "embedding")


def stage_names(num_layers: int) -> list[str]:
    """The names of the compared stages, in the order in which they are computed: as in a trace."""
    layers = [
        f"layers.{number}.{stage}"
        for number in range(num_layers)
        for stage in ("attention.probabilities", "feed_forward_layer_norm.output")
    ]
    return ["embeddings.layer_norm.output", *layers, *_LAST_STAGES]


@torch.no_grad()
def record_stages(encoder: SentenceEncoder, features: Features) -> Stages:
    """Run the model and keep what every stage gives, seen from outside through hooks.

    Args:
        encoder: The model; it is left as it was.
        features: As `SentenceEncoder.forward` takes them.

    Returns:
        For every name of `stage_names` a tensor: `[batch, tokens, 384]` for embeddings and
        layers, `[batch, heads, tokens, tokens]` for attention probabilities, `[batch, 384]`.
    """
    stages: Stages = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: stages.__setitem__(name, output)

    def keep_probabilities(name: str) -> Callable[..., Any]:
        return lambda module, args: (args[0], _recording(args[1], stages, name))

    embeddings, *of_layers, pooled, embedding = stage_names(len(encoder.bert.layers))
    with ExitStack() as hooks:
        hooks.enter_context(encoder.bert.embeddings.register_forward_hook(keep(embeddings)))
        for number, layer in enumerate(encoder.bert.layers):
            probabilities, output = of_layers[2 * number : 2 * number + 2]
            hook = layer.register_forward_pre_hook(keep_probabilities(probabilities))
            hooks.enter_context(hook)
            hooks.enter_context(layer.register_forward_hook(keep(output)))
        hooks.enter_context(encoder.pooling.register_forward_hook(keep(pooled)))
        # With the products that `encode` uses, of copies of which every number is compared first.
        with fast_products(list(encoder.modules()), tokens=4096):
            stages[embedding] = encoder(features)["sentence_embedding"]
    return stages


def _recording(attend: Attend, stages: Stages, name: str) -> Attend:
    """Make a function that attends alike, and keeps its probabilities, its result for V = I."""

    def recording(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, tokens, heads, _ = query.shape
        identity = torch.eye(tokens, dtype=value.dtype, device=value.device)
        identity = identity[None, :, None, :].expand(batch, tokens, heads, tokens)
        # [batch, tokens, heads, tokens] -> [batch, heads, tokens, tokens]
        stages[name] = attend(query, key, identity).transpose(1, 2)
        return attend(query, key, value)

    return recording


def compare_ids(
    tokenizer: WordPieceTokenizer,
    max_length: int,
    texts: Sequence[str],
    expected: Sequence[Sequence[int]],
) -> list[Row]:
    """Count the texts whose token ids differ, which must be 0."""
    ours = tokenizer(texts, max_length).input_ids
    different = [i for i, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != list(b)]
    worst = different[0] if different else None
    measures = {"texts that differ": float(len(different))}
    return [Row("token ids", measures, {"texts that differ": 0.0}, worst_text=worst)]


class _Difference:
    """Running maximum, root mean square and, of vectors, largest 1 - cosine of a difference."""

    def __init__(self, of_vectors: bool = True) -> None:
        self.of_vectors = of_vectors
        self.max_abs, self.one_minus_cos, self.worst_text = 0.0, 0.0, 0
        self.squares, self.count = 0.0, 0

    def add(self, ours: Tensor, theirs: Tensor, rows: Tensor, text_of: Tensor) -> None:
        """Take in a batch: `rows` selects, on leading dimensions, what to compare."""
        ours, theirs = ours.double()[rows], theirs.double()[rows]  # [n, ..., d]
        difference = (ours - theirs).abs().nan_to_num(nan=float("inf")).flatten(1)
        largest, where = difference.max(dim=1).values.max(dim=0)
        if largest > self.max_abs or not self.count:
            self.max_abs, self.worst_text = float(largest), int(text_of[where])
        if self.of_vectors:
            # Half the squared distance of the unit vectors keeps the digits that 1 - cos loses.
            unit = F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)
            self.one_minus_cos = max(self.one_minus_cos, float(unit.square().sum(-1).max() / 2))
        self.squares += float(difference.square().sum())
        self.count += difference.numel()

    def measures(self) -> dict[str, float]:
        rms = (self.squares / max(self.count, 1)) ** 0.5
        cosine = {"max 1-cos": self.one_minus_cos} if self.of_vectors else {}
        return {"max abs": self.max_abs, "rms": rms} | cosine


def compare_stages(
    encoder: SentenceEncoder,
    reference: Callable[[Features], Stages],
    texts: Sequence[str],
    *,
    truth: Callable[[Features], Stages] | None = None,
    tokens_per_batch: int = 2048,
) -> list[Row]:
    """Compare every stage, at real tokens only: numbers at padding positions mean nothing.

    Args:
        encoder: Our model.
        reference: The other implementation in the same dtype: features -> stages.
        texts: The texts; they are sorted by length and run in padded batches.
        truth: The other implementation in float64. If given, ours and the reference's are both
            compared with it, else ours with the reference's.
        tokens_per_batch: Largest size of a batch, padding included.

    Returns:
        Rows in the order of the computation.
    """
    tokenizer, names = encoder.get_tokenizer(), stage_names(len(encoder.bert.layers))
    ids = tokenizer(texts, encoder.max_seq_length).input_ids
    errors = {
        name: (_Difference(_is_vectors(name)), _Difference(_is_vectors(name))) for name in names
    }
    between, off_one, on_padding = _Difference(), (0.0, 0.0), 0.0
    for batch in batches([len(row) for row in ids], tokens_per_batch):
        features = tokenizer.pad([ids[row] for row in batch], encoder.device)
        real = features["attention_mask"].bool()  # [batch, tokens]
        ours, theirs = record_stages(encoder, features), reference(features)
        exact = theirs if truth is None else truth(features)
        text_of_sentence = torch.tensor(batch, dtype=torch.int64, device="cpu")
        every = torch.ones_like(text_of_sentence, dtype=torch.bool)
        text_of_token = text_of_sentence[:, None].expand(real.shape)[real.cpu()]
        for name in names:
            mine, its, true = ours[name], theirs[name], exact[name]
            rows, text_of = real, text_of_token
            if name in _LAST_STAGES:
                rows, text_of = every, text_of_sentence
            elif not _is_vectors(name):
                padding = ~real[:, None, None, :]
                on_padding = max(on_padding, float((mine * padding).abs().max()))
                # [batch, heads, query, key] -> [batch, query, heads, key]: real queries are rows
                mine, its, true = (stage.transpose(1, 2) for stage in (mine, its, true))
                now = _off_one(mine[real]), _off_one(its[real])
                off_one = max(off_one[0], now[0]), max(off_one[1], now[1])
            errors[name][0].add(mine, true, rows, text_of)
            if truth is not None:
                errors[name][1].add(its, true, rows, text_of)
        between.add(ours["embedding"], theirs["embedding"], every, text_of_sentence)

    limits, report_rows = bars(encoder.dtype), []
    for name, (our_error, its_error) in errors.items():
        own = {} if truth is None else its_error.measures()
        stated = allowed = _stage_bars(limits, name)
        if not _is_vectors(name) or name == "embedding":
            allowed = within_own_error(allowed, own)
        if encoder.dtype == torch.float32 and own:
            allowed = allowed | {"rms": _OWN_ERROR * own["rms"]}
        worst = our_error.worst_text
        report_rows.append(Row(name, our_error.measures(), allowed, own, worst, stated))
    if truth is not None and limits.between is not None:
        allowed = {"max abs": limits.between}
        name = "the same, ours - reference"
        report_rows.append(Row(name, between.measures(), allowed, worst_text=between.worst_text))
    sums, own = {"max abs": off_one[0]}, {} if truth is None else {"max abs": off_one[1]}
    stated = {"max abs": limits.row_sum}
    allowed = within_own_error(stated, own)
    report_rows.append(Row("attention row sums - 1", sums, allowed, own, stated=stated))
    report_rows.append(Row("attention to padding", {"max abs": on_padding}, {"max abs": 0.0}))
    return report_rows


def _is_vectors(stage: str) -> bool:
    return not stage.endswith("probabilities")


def _off_one(probabilities: Tensor) -> float:
    """The most by which the sum of a row of probabilities differs from 1."""
    off = (probabilities.double().sum(-1) - 1).abs().max()
    return float(off.nan_to_num(nan=float("inf")))


def batches(lengths: Sequence[int], tokens: int, exact: bool = False) -> Iterator[list[int]]:
    """Rows in order of their length, as many at a time as fit, padded, into so many tokens.

    Args:
        lengths: The length of each row; one that doesn't fit comes alone.
        tokens: The largest size of a batch.
        exact: All rows of a batch have one length. Rows without a token are never with others.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        is_other = batch and lengths[row] != lengths[batch[0]]
        is_apart = is_other and (exact or not lengths[batch[0]])
        if batch and (is_apart or (len(batch) + 1) * lengths[row] > tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _stage_bars(limits: Bars, stage: str) -> dict[str, float]:
    if stage == "embedding":
        max_abs, rms = limits.sentence_embedding, limits.sentence_embedding_rms
        return {"max abs": max_abs} | ({} if rms is None else {"rms": rms})
    bar = limits.stage if _is_vectors(stage) else limits.attention
    return {} if bar is None else {"max abs": bar}


def within_own_error(allowed: dict[str, float], own: dict[str, float]) -> dict[str, float]:
    return {
        name: max(bar, min(_OWN_ERROR * own.get(name, 0.0), _MOST_RELAXED * bar))
        for name, bar in allowed.items()
    }


def compare_invariance(encoder: SentenceEncoder, texts: Sequence[str]) -> list[Row]:
    """Compare texts alone, in batches, in another order, and beside a text of full length.

    Not one bit may differ where `encoder.deterministic` says so.
    """
    alone = torch.stack([encoder.encode(text, convert_to_tensor=True) for text in texts])
    backwards = encoder.encode(list(reversed(texts)), batch_size=7, convert_to_tensor=True).flip(0)
    neighbour = " ".join(["word"] * (encoder.max_seq_length - 2))
    beside = torch.stack(
        [encoder.encode([text, neighbour], convert_to_tensor=True)[0] for text in texts]
    )
    together = encoder.encode(texts, convert_to_tensor=True)
    limit = bars(encoder.dtype).invariance
    allowed = {} if limit is None else {"max abs": 0.0 if encoder.deterministic else limit}
    rows = []
    for name, other in (
        ("in a batch", together),
        ("in batches of 7, in reverse", backwards),
        (f"beside {encoder.max_seq_length} tokens", beside),
    ):
        difference = (alone - other).double().abs().amax(dim=1)
        worst = int(difference.argmax())
        measures = {"max abs": float(difference[worst])}
        rows.append(Row(name, measures, allowed, worst_text=worst))
    return rows


def compare_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[Row]:
    """Compare gradients of one loss by the same parameters, in float64, under the same names.

    The key's bias adds the same amount to all scores of a query, which softmax ignores: its
    gradient is 0, so that it can't be compared relatively.
    """
    if ours.keys() != theirs.keys() or not theirs:
        different = sorted(ours.keys() ^ theirs.keys()) or ["no gradient at all"]
        raise ValueError(f"gradients don't match: {', '.join(different)}")
    worst, zero = ("", 0.0), 0.0
    for name, expected in theirs.items():
        if name.endswith("key.bias"):
            zero = max(zero, float(ours[name].abs().max()))
            continue
        relative = float((ours[name] - expected).norm() / expected.norm())
        if not relative <= worst[1]:  # a NaN is the worst
            worst = name, relative
    return [
        Row("largest of all tensors", {"relative L2": worst[1]}, {"relative L2": _GRADIENT}),
        Row("key.bias, exactly 0", {"max abs": zero}, {"max abs": _ZERO_GRADIENT}),
    ]


@dataclass(frozen=True)
class Golden:
    """Ids and embeddings that the reference gave for some texts, kept in a file.

    Attributes:
        texts: n texts.
        input_ids: Their token ids.
        embeddings: Their float64 embeddings, `[n, 384]`.
    """

    texts: list[str]
    input_ids: list[list[int]]
    embeddings: Tensor

    @classmethod
    def load(cls, path: str | Path) -> "Golden":
        """Read the JSON file that `scripts/make/make_test_data.py` writes."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))["texts"]
        embeddings = [value["embedding"] for value in values]
        return cls(
            [value["text"] for value in values],
            [value["input_ids"] for value in values],
            torch.tensor(embeddings, dtype=torch.float64, device="cpu"),
        )


def compare_with_golden(encoder: SentenceEncoder, golden: Golden) -> list[Row]:
    """Compare ids and embeddings with the kept values, for which no reference is needed."""
    tokenizer = encoder.get_tokenizer()
    rows = compare_ids(tokenizer, encoder.max_seq_length, golden.texts, golden.input_ids)
    ids = tokenizer(golden.texts, encoder.max_seq_length).input_ids
    difference = _Difference()
    for rows_of_batch in batches([len(row) for row in ids], 1024):
        batch = torch.tensor(rows_of_batch, dtype=torch.int64, device="cpu")
        features = tokenizer.pad([ids[row] for row in rows_of_batch], encoder.device)
        with torch.no_grad():
            ours = encoder(features)["sentence_embedding"].cpu()
        every = torch.ones_like(batch, dtype=torch.bool)
        difference.add(ours, golden.embeddings[batch], every, batch)
    allowed = _stage_bars(bars(encoder.dtype), "embedding")
    worst = difference.worst_text
    return [*rows, Row("embedding", difference.measures(), allowed, worst_text=worst)]

"""One call of `encode`, computed: rows of text in, vectors in the same order out.

In: a pipeline, texts or pairs of texts, and a `Plan`. Out: what was `Computed`. Next: `encode.py`
gives the vectors the form that was asked for. It may run in another process (`process_pool.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minilm.errors import InputError, NotFiniteError
from minilm.forks import mark_in_use
from minilm.inference.eval_mode import eval_mode
from minilm.inference.kernels import fast_products
from minilm.inference.packed import default_budget, make_batch, plan_batches, rows_of
from minilm.inference.truncation import Span, kept_span, raise_if_cut, split, warn_if_cut
from minilm.inputs import Row, with_progress
from minilm.pipeline import Pipeline
from minilm.tokenizer import Tokens

__all__ = ["Computed", "Plan", "extras_of", "read", "run", "windows_of", "with_prompt"]

_PADDED_BATCH = 32  # rows of `output_value=None`, which are as wide as the longest of their batch

# To say which rows are to blame for NaN, each is computed alone, unless there are more than this.
_LOOKED_AT_ALONE = 256


@dataclass(frozen=True)
class Plan:
    """What one call does: its arguments, and the encoder's settings as they were when it began.

    It can be sent to another process. A call keeps to it even if other threads change the settings.
    """

    prompt: str
    output_value: Literal["sentence_embedding", "token_embeddings"] | None
    truncation: str
    max_seq_length: int
    width: int  # numbers of each sentence vector to keep
    normalize: bool  # whether those are scaled to length 1 in the end, also if the model does it
    precision: str  # what they are rounded to
    batch_size: int | None
    token_budget: int | None  # tokens of a pass; None for what suits the device
    spans: bool  # whether the characters that were read are asked for
    on_device: bool  # where sentence vectors go: to the model's device, or to the CPU
    show_progress_bar: bool | None
    argument: str  # what the user called the texts
    first_row: int  # the number of the first one in what the user passed


@dataclass(frozen=True)
class Computed:
    """The result of one call, row by row.

    Attributes:
        values: Sentence vectors `[n, width]`; or a list of tensors, or of dicts.
        token_counts, kept: How many tokens each text has, and how many were read.
        spans: The characters that were read of each text; None unless asked for.
        windows: In how many windows each text was read.
    """

    values: Any
    token_counts: list[int]
    kept: list[int]
    spans: list[Span | tuple[Span, Span]] | None
    windows: list[int]


def read(
    pipeline: Pipeline,
    rows: list[Row],
    limit: int,
    truncation: str,
    argument: str,
    first_row: int = 0,
    spans: bool = False,
) -> Tokens:
    """Tokenize rows up to a limit; warn of what was cut, or raise, as `truncation` says."""
    tokens = pipeline.get_tokenizer().tokenize(rows, limit, return_offsets=spans, argument=argument)
    if tokens.token_type_ids is not None and pipeline.bert.config.type_vocab_size < 2:
        raise InputError(f"{argument} has pairs of texts, which this model can't tell", argument)
    kept = list(map(len, tokens.input_ids))
    if truncation == "warn":
        warn_if_cut(tokens.token_counts, kept, first_row)
    elif truncation == "error":
        raise_if_cut(tokens.token_counts, kept, first_row)
    return tokens


def run(pipeline: Pipeline, rows: list[Row], plan: Plan) -> Computed:
    """Compute what a plan asks for, in this process."""
    prefixed = with_prompt(rows, plan.prompt)
    mark_in_use()
    tokens = read(
        pipeline,
        prefixed,
        plan.max_seq_length,
        plan.truncation,
        plan.argument,
        plan.first_row,
        plan.spans,
    )
    kept = list(map(len, tokens.input_ids))
    spans = None
    if tokens.offsets is not None:
        types = tokens.token_type_ids or [[]] * len(rows)
        spans = [
            kept_span(row, offsets, kinds, len(plan.prompt), count > length)
            for row, offsets, kinds, count, length in zip(
                prefixed, tokens.offsets, types, tokens.token_counts, kept, strict=True
            )
        ]
    windows = [1] * len(rows)
    values: Any
    if plan.output_value == "token_embeddings":
        values = _token_vectors(pipeline, tokens, plan)
    elif plan.output_value is None:
        values = _everything(pipeline, prefixed, tokens, plan)
    elif plan.truncation == "chunk" and kept != tokens.token_counts:
        values, windows, read_whole = _chunked(pipeline, rows, tokens, plan)
        for row in read_whole:
            kept[row] = tokens.token_counts[row]
            if spans is not None:
                spans[row] = (0, len(rows[row]))
    else:
        values = _sentence_vectors(
            pipeline, tokens.input_ids, tokens.token_type_ids, plan, plan.width
        )
    if plan.output_value == "sentence_embedding":
        _check_finite(pipeline, values, windows, tokens, plan)
    return Computed(values, tokens.token_counts, kept, spans, windows)


def _sentence_vectors(
    pipeline: Pipeline,
    ids: list[list[int]],
    types: list[list[int]] | None,
    plan: Plan,
    width: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Compute sentence vectors `[n, width]`, on `device` or else where the plan wants them."""
    lengths = list(map(len, ids))
    here, batches = _batches(pipeline, lengths, plan)
    with torch.inference_mode(False), torch.no_grad():  # ordinary, usable in training
        dtype = pipeline.bert.embeddings.word_embeddings.weight.dtype
        if device is None:
            device = here if plan.on_device else "cpu"
        vectors = torch.empty((len(ids), width), dtype=dtype, device=device)
    with (
        torch.inference_mode(),
        eval_mode(pipeline) as parts,
        fast_products(parts, sum(lengths)) as multiple,
    ):
        for rows in with_progress(batches, plan.show_progress_bar):
            batch = make_batch(*rows_of(rows, ids, types), here, pipeline.tokenizer, multiple)
            vectors[rows] = pipeline(batch)["sentence_embedding"][:, :width].to(vectors)
    return vectors


def _batches(
    pipeline: Pipeline, lengths: list[int], plan: Plan
) -> tuple[torch.device, list[list[int]]]:
    """The model's device, and the rows of each batch that is computed there."""
    device = pipeline.device
    budget = plan.token_budget or default_budget(device, pipeline.dtype)
    return device, plan_batches(lengths, budget, plan.batch_size)


def _token_vectors(pipeline: Pipeline, tokens: Tokens, plan: Plan) -> list[Tensor]:
    """Compute the token vectors of each text, `[tokens, 384]`."""
    lengths = list(map(len, tokens.input_ids))
    device, batches = _batches(pipeline, lengths, plan)
    found: dict[int, Tensor] = {}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        eval_mode(pipeline) as parts,
        fast_products(parts, sum(lengths)) as multiple,
    ):
        for rows in with_progress(batches, plan.show_progress_bar):
            ids, types = rows_of(rows, tokens.input_ids, tokens.token_type_ids)
            batch = make_batch(ids, types, device, pipeline.tokenizer, multiple)
            vectors: Tensor = pipeline.rounded(pipeline(batch)["token_embeddings"])
            ends = [lengths[row] for row in rows]
            if vectors.dim() == 3:  # padded
                each = [vectors[i, :end] for i, end in enumerate(ends)]
            else:
                each = list(torch.split(vectors[: sum(ends)], ends))
            found |= zip(rows, (vector.clone() for vector in each), strict=True)
    return [found[row] for row in range(len(lengths))]


def _everything(
    pipeline: Pipeline, rows: list[Row], tokens: Tokens, plan: Plan
) -> list[dict[str, Any]]:
    """Compute all that `forward` gives for each text, padded as in the reference's batches.

    Nothing is computed for the padding, whose token vectors are 0: so the others, and the sentence
    vector, have the bits that `encode` gives.
    """
    extras = extras_of(pipeline, plan.prompt)
    size = plan.batch_size or _PADDED_BATCH
    order = sorted(range(len(rows)), key=lambda row: -sum(map(len, _parts(rows[row]))))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    hidden = _token_vectors(pipeline, tokens, plan)
    vectors = _sentence_vectors(
        pipeline, tokens.input_ids, tokens.token_type_ids, plan, plan.width, pipeline.device
    )
    vectors = pipeline.rounded(vectors)
    found: dict[int, dict[str, Any]] = {}
    for batch in batches:
        ids, types = rows_of(batch, tokens.input_ids, tokens.token_type_ids)
        features = pipeline.get_tokenizer().pad(ids, pipeline.device, types)
        token_embeddings = pad_sequence([hidden[row] for row in batch], batch_first=True)
        for place, row in enumerate(batch):
            found[row] = (
                {name: tensor[place] for name, tensor in features.items()}
                | extras
                | {"token_embeddings": token_embeddings[place], "sentence_embedding": vectors[row]}
            )
    return [found[row] for row in range(len(rows))]


def _chunked(
    pipeline: Pipeline, rows: list[Row], tokens: Tokens, plan: Plan
) -> tuple[Tensor, list[int], list[int]]:
    """Compute sentence vectors; of a text that is too long, the mean of those of its windows.

    Returns:
        Vectors `[n, width]`, the number of windows of each text, and which of those with several
        were read whole.
    """
    windows, read_whole = [1] * len(rows), []
    ids = list(tokens.input_ids)
    types = None if tokens.token_type_ids is None else list(tokens.token_type_ids)
    # The first window of a text stands in its place, the others behind all texts.
    places: dict[int, list[int]] = {}
    for row, count in enumerate(tokens.token_counts):
        if count <= len(ids[row]):
            continue
        text, place = rows[row], f"{plan.argument}[{plan.first_row + row}]"
        if not isinstance(text, str):
            raise InputError(f"{place} is a pair, which can't be read in windows", place)
        spans = windows_of(pipeline, text, plan.prompt, plan.max_seq_length, place)
        parts = [plan.prompt + text[start:end] for start, end in spans]
        of_windows = pipeline.get_tokenizer().tokenize(parts, plan.max_seq_length)
        first, *others = of_windows.input_ids
        ids[row] = first
        places[row] = [row, *range(len(ids), len(ids) + len(others))]
        ids += others
        if types is not None:
            types[row] = [0] * len(first)
            types += [[0] * len(other) for other in others]
        windows[row] = len(spans)
        if of_windows.token_counts == list(map(len, of_windows.input_ids)):
            read_whole.append(row)
    vectors = _sentence_vectors(pipeline, ids, types, plan, pipeline.bert.config.hidden_size)
    specials = pipeline.get_tokenizer().tokenize([plan.prompt]).token_counts[0]
    for row, where in places.items():
        counts = [len(ids[place]) - specials for place in where]
        weights = torch.tensor(counts, dtype=torch.float64, device="cpu")
        weights = (weights / weights.sum()).to(vectors)
        vectors[row] = pipeline.normalize((weights[:, None] * vectors[where]).sum(0))
    return vectors[: len(rows), : plan.width].contiguous(), windows, read_whole


def windows_of(pipeline: Pipeline, text: str, prompt: str, limit: int, place: str) -> list[Span]:
    """Find the windows of a text, of at most `limit` tokens; `place` is its name in an error."""
    specials = pipeline.get_tokenizer().tokenize([prompt]).token_counts[0]
    if specials >= limit:
        raise InputError(
            f"prompt has {specials} tokens, of {limit} that the model reads: there is no room for "
            f"{place}",
            "prompt",
        )
    return split(pipeline.get_tokenizer(), text, prompt, limit)


def _check_finite(
    pipeline: Pipeline, vectors: Tensor, windows: list[int], tokens: Tokens, plan: Plan
) -> None:
    if not plan.normalize:
        vectors = pipeline.rounded(vectors)  # which may be beyond float32
    if math.isfinite(float(vectors.sum())):  # one number: cheap
        return
    bad = (~vectors.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if not bad:
        return
    if len(bad) <= _LOOKED_AT_ALONE:
        # A NaN spreads within its batch: a weight of 0 times NaN is NaN.
        quiet = replace(plan, show_progress_bar=False)
        bad = [
            row
            for row in bad
            if windows[row] > 1 or not _is_finite_alone(pipeline, tokens, quiet, row)
        ] or bad
    if all(bool(weight.isfinite().all()) for weight in pipeline.parameters()):
        dtype = torch.float32 if pipeline.reproducible else pipeline.dtype
        more = "float64" if dtype == torch.float32 else "float32"
        reason = f"numbers are beyond what {dtype} holds; load it in {more}"
    else:
        reason = "the weights have NaN or infinity in them; load the model again"
    raise NotFiniteError([plan.first_row + row for row in bad], reason)


def _is_finite_alone(pipeline: Pipeline, tokens: Tokens, plan: Plan, row: int) -> bool:
    types = None if tokens.token_type_ids is None else [tokens.token_type_ids[row]]
    alone = _sentence_vectors(pipeline, [tokens.input_ids[row]], types, plan, plan.width)
    return bool((alone if plan.normalize else pipeline.rounded(alone)).isfinite().all())


def extras_of(pipeline: Pipeline, prompt: str) -> dict[str, Any]:
    """Return what sentence-transformers 6 has in a batch beside tensors."""
    extras: dict[str, Any] = {"modality": "text"}
    if prompt:
        extras["prompt_length"] = pipeline.get_tokenizer().tokenize([prompt]).token_counts[0] - 1
    return extras


def _parts(row: Row) -> Sequence[str]:
    return (row,) if isinstance(row, str) else row


def with_prompt(rows: list[Row], prompt: str) -> list[Row]:
    """Put the prompt in front of every text; in a pair, in front of the first."""
    if not prompt:
        return rows
    return [prompt + row if isinstance(row, str) else (prompt + row[0], row[1]) for row in rows]

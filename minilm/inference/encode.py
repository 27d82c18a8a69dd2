"""`encode`, and what a caller expects around it: the methods of `SentenceEncoder` that take text.

In: any iterable of texts, and how they are wanted. Out: NumPy, tensors, small integers, token
vectors. `pipeline.py` is the model itself; here texts are read, cut, put into batches and back into
order.

One call is read here into a `Plan`, computed by `compute.py`, in this process or in others, and its
vectors get the form that was asked for (`_finish`). The docstring of the wing has the whole way.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from minilm.errors import InputError, InputTypeError
from minilm.inference.compute import Computed, Plan, extras_of, read, run, windows_of, with_prompt
from minilm.inference.process_pool import ProcessPool, run_in
from minilm.inference.truncation import (
    TRUNCATION,
    EncodeReport,
    TextWindow,
)
from minilm.inputs import (
    EncodeOptions,
    Row,
    as_device,
    as_rows,
    check_choice,
    check_positive_int,
    check_text,
    check_unicode,
    windows,
)
from minilm.pipeline import Pipeline
from minilm.pooling import Normalize
from minilm.quantize import (
    check_precision,
    has_model_ranges,
    model_ranges,
    quantize_embeddings,
)

__all__ = [
    "MISSING",
    "PLACES",
    "encode",
    "encode_stream",
    "encode_windows",
    "model_ranges_of",
    "plan_of",
    "positional",
    "preprocess",
    "prompt_for",
    "prompt_of",
    "required_ranges",
    "run_plan",
    "start_multi_process_pool",
    "token_counts",
    "tokenize",
]

# What the prompts for the two sides of a search may be called, and which goes before which.
_PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
# The options of a call that say where to compute.
PLACES = ("device", "pool", "chunk_size")
MISSING = object()

logger = logging.getLogger(__name__)


@overload
def encode(
    pipeline: Pipeline,
    /,
    sentences: str | Iterable[Row] = ...,
    *,
    convert_to_numpy: Literal[True] = ...,
    convert_to_tensor: Literal[False] = ...,
    **options: Unpack[EncodeOptions],
) -> np.ndarray[Any, Any]: ...


@overload
def encode(
    pipeline: Pipeline,
    /,
    sentences: str | Iterable[Row] = ...,
    *,
    convert_to_numpy: bool = ...,
    convert_to_tensor: Literal[True],
    **options: Unpack[EncodeOptions],
) -> Tensor: ...


@overload
def encode(pipeline: Pipeline, /, sentences: Any = ..., *args: Any, **options: Any) -> Any: ...


def encode(
    pipeline: Pipeline,
    /,
    sentences: Any = MISSING,
    prompt_name: str | None = None,
    prompt: str | None = None,
    batch_size: int | None = None,
    show_progress_bar: bool | None = None,
    output_value: Literal["sentence_embedding", "token_embeddings"] | None = "sentence_embedding",
    precision: str | None = "float32",
    convert_to_numpy: bool = True,
    convert_to_tensor: bool = False,
    device: str | torch.device | Sequence[str | torch.device] | None = None,
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    pool: ProcessPool | dict[str, Any] | None = None,
    chunk_size: int | None = None,
    *,
    inputs: Any = MISSING,
    truncation: str = "warn",
    return_report: bool = False,
    token_budget: int | None = None,
    task: str | None = None,
    **unknown: Any,
) -> Any:
    """Embed texts.

    Args:
        sentences: A str, or any iterable of str: list, generator, NumPy array, pandas or
            polars Series, Arrow array. A row may also be a pair of texts, which are read
            together, as [CLS] A [SEP] B [SEP]. A vertical tab or form feed glues the words
            beside it, as in the reference: see `WordPieceTokenizer`.
        prompt_name: A key of `prompts`, whose text is put in front of every sentence; by
            default `default_prompt_name`.
        prompt: That text itself.
        batch_size: Sentences computed at a time, at most; None sets no limit.
        show_progress_bar: By default only if this package's logger is at INFO or below.
        output_value: "sentence_embedding"; or "token_embeddings", for each text the vectors of
            its tokens `[tokens, 384]`, before pooling, not normalized; or None, for each text
            a dict of all that the model gives, padded to the longest of its batch.
        precision: "float32"; or "int8", "uint8", with fixed ranges for the published model, or
            "binary", "ubinary", which pack the signs: see `minilm.quantize`.
        convert_to_numpy: Give NumPy arrays, else tensors on the model's device.
        convert_to_tensor: Give one tensor, whatever `convert_to_numpy` says.
        device: Move the model there first, and leave it there. Several: a process for each.
        normalize_embeddings: Scale the vectors to length 1 (again, behind `truncate_dim`).
        truncate_dim: Keep so many numbers of each vector; by default as many as the encoder's
            `truncate_dim`. What is left isn't normalized unless `normalize_embeddings` is set.
        pool: Processes that `start_multi_process_pool` started, to compute in.
        chunk_size: Texts that one of them is given at a time.
        inputs: Another name for `sentences`.
        truncation: What to do about text beyond `max_seq_length` tokens. "warn" cuts it and
            issues one `TruncationWarning` that adds up how much; "silent" only cuts it;
            "error" computes nothing; "chunk" reads all of it, in overlapping windows, and gives
            the mean of their vectors, weighted by their tokens, normalized.
        return_report: Give `(embeddings, EncodeReport)`: how much of each text was read.
        token_budget: Tokens computed at a time, at most, if no sentence is longer; by default
            as many as were fastest for this device and dtype. Neither limit changes a vector.
        task: Has no effect; other models of the reference choose a part of themselves by it.

    Returns:
        One vector `[384]` for a str, else `[n, 384]` in the order given, with n = 0 too. Its
        dtype is float32, or that which the whole model was converted to (unless it is
        `reproducible`); NumPy has no bfloat16 and gets float32. With `convert_to_numpy` and
        `convert_to_tensor` both false, a list of n tensors `[384]`. For other values of
        `output_value`, a list.

    Raises:
        InputTypeError: A row is not a text, the message names it; or an argument is unknown or
            of a wrong type.
        InputError: A text has a lone surrogate, or an argument's value can't be used.
        TruncationError: With `truncation="error"`, a text is too long.
        NotFiniteError: Vectors have NaN or infinity in them.
        WorkerError: A process of the pool died.
    """
    given, argument = _one_of(sentences, inputs)
    plan = plan_of(
        pipeline,
        argument,
        prompt_name=prompt_name,
        prompt=prompt,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        output_value=output_value,
        precision=precision,
        normalize_embeddings=normalize_embeddings,
        truncate_dim=truncate_dim,
        truncation=truncation,
        return_report=return_report,
        token_budget=token_budget,
        **unknown,
    )
    as_numpy = convert_to_numpy and not convert_to_tensor
    plan = replace(plan, on_device=not as_numpy)
    rows, is_single = as_rows(given, argument)
    values, report = run_plan(pipeline, rows, plan, device, pool, chunk_size)
    if output_value == "sentence_embedding" and not convert_to_numpy and not convert_to_tensor:
        values = list(values)
    result = values[0] if is_single else values
    return (result, report) if return_report else result


def encode_stream(
    pipeline: Pipeline,
    /,
    sentences: Iterable[Row],
    *,
    window: int = 4096,
    **options: Unpack[EncodeOptions],
) -> Iterator[np.ndarray[Any, Any]]:
    """Embed texts one after the other, however many come: `encode` in bounded memory.

    An error of a text is raised when its turn comes.

    Args:
        sentences: An iterable of str.
        window: Texts read and held at a time.
        options: As in `encode`. They are looked at before the first text is read. With several
            devices the processes are started once, and stopped at the end.

    Yields:
        For each text, in order, what `encode` gives for it in a list: a vector `[384]`, unless
        the options ask for something else.

    Raises:
        InputTypeError, InputError: As in `encode`. There is no `return_report`: a report is of
            all texts.
    """
    check_positive_int(window, "window")
    given: dict[str, Any] = dict(options)
    places = {name: given.pop(name, None) for name in PLACES}
    as_numpy = given.pop("convert_to_numpy", True) and not given.pop("convert_to_tensor", False)
    plan = replace(plan_of(pipeline, "sentences", **given), on_device=not as_numpy)
    if plan.spans:
        raise InputError("return_report: a stream has no report; call encode", "return_report")
    required_ranges(
        pipeline, plan.precision, plan.width, plan.normalize,
        "precision: this model has no fixed ranges, and those of one window would not be those of "
        "the next; stream float32 and use minilm.util.quantize_embeddings",
    )  # fmt: skip
    return _stream(pipeline, windows(sentences, window), plan, places)


def _stream(
    pipeline: Pipeline, /, windows: Iterable[list[Row]], plan: Plan, places: dict[str, Any]
) -> Iterator[np.ndarray[Any, Any]]:
    with ExitStack() as stack:
        if places["pool"] is None and isinstance(places["device"], list | tuple):
            pool = start_multi_process_pool(pipeline, places["device"])
            places = places | {"device": None, "pool": stack.enter_context(pool)}
        # What can't be used is refused before a text is read.
        run_plan(pipeline, [], replace(plan, show_progress_bar=False), **places)
        for rows in windows:
            yield from run_plan(pipeline, rows, plan, **places)[0]
            plan = replace(plan, first_row=plan.first_row + len(rows))


def encode_windows(
    pipeline: Pipeline, /, text: str, *, prompt_name: str | None = None, prompt: str | None = None
) -> list[TextWindow]:
    """Embed a long text in overlapping windows, each of which the model reads in full.

    They end where sentences do, as far as possible. `encode(truncation="chunk")` gives the mean
    of these vectors, weighted by their tokens, normalized.

    Args:
        text: The text, of any length.
        prompt_name, prompt: As in `encode`; the prompt is put in front of every window.

    Returns:
        The windows in order, at least one. Together they hold all of the text.

    Raises:
        InputTypeError, InputError: As in `encode`; also if the prompt leaves no room.
    """
    check_unicode([check_text(text, "text")], "text")
    plan = plan_of(
        pipeline,
        "text",
        prompt=prompt,
        prompt_name=prompt_name,
        truncate_dim=pipeline.bert.config.hidden_size,
    )
    spans = windows_of(pipeline, text, plan.prompt, plan.max_seq_length, "text")
    parts = [text[start:end] for start, end in spans]
    vectors, report = run_plan(pipeline, [*parts], plan)
    counts = report.token_counts
    return [
        TextWindow(start, end, part, count, vector)
        for (start, end), part, count, vector in zip(spans, parts, counts, vectors, strict=True)
    ]


def token_counts(
    pipeline: Pipeline,
    /,
    sentences: str | Iterable[Row],
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
) -> Any:
    """How many tokens texts have, [CLS], [SEP] and the prompt included, before any cut.

    A text with more than `max_seq_length` would be cut.

    Args:
        sentences: As in `encode`.
        prompt_name, prompt: As in `encode`.

    Returns:
        One number for a str, else a list of n.
    """
    rows, is_single = as_rows(sentences)
    rows = with_prompt(rows, _prompt_text(pipeline, prompt, prompt_name))
    counts = pipeline.get_tokenizer().tokenize(rows).token_counts
    return counts[0] if is_single else counts


# --- texts -> tensors, for `forward`


def tokenize(pipeline: Pipeline, /, sentences: str | Iterable[Row]) -> dict[str, Tensor]:
    """Tokenize texts into one padded batch on the model's device, as `forward` takes it.

    Returns:
        `input_ids`, `token_type_ids`, `attention_mask`, int64 `[n, tokens]`, cut at
        `max_seq_length`.

    Raises:
        InputTypeError, InputError: As in `encode`; also for no text at all.
    """
    rows, _ = as_rows(sentences)
    if not rows:
        raise InputError("sentences is empty; pass at least one", "sentences")
    return _features(pipeline, rows)


def preprocess(
    pipeline: Pipeline, /, inputs: str | Iterable[Row], prompt: str | None = None
) -> dict[str, Any]:
    """Tokenize texts as `tokenize` does, with a prompt; sentence-transformers 6 calls it so.

    Returns:
        As `tokenize`, and `modality`, which is "text"; with a prompt `prompt_length`, its
        number of tokens with [CLS]. No text at all gives an empty dict.
    """
    rows, _ = as_rows(inputs, "inputs")
    if not rows:
        return {}
    prefix = _prompt_text(pipeline, prompt, None)
    features = _features(pipeline, with_prompt(rows, prefix), "inputs")
    return features | extras_of(pipeline, prefix)


def _features(
    pipeline: Pipeline, /, rows: list[Row], argument: str = "sentences"
) -> dict[str, Tensor]:
    tokens = read(pipeline, rows, pipeline.max_seq_length, "warn", argument)
    return pipeline.get_tokenizer().pad(tokens.input_ids, pipeline.device, tokens.token_type_ids)


# --- several processes


def start_multi_process_pool(
    pipeline: Pipeline, /, target_devices: Sequence[str | torch.device] | None = None
) -> ProcessPool:
    """Start a process for each device, each with this model, for `encode(pool=...)`.

    Args:
        target_devices: Such as `["cuda:0", "cuda:1"]` or `["cpu"] * 2`; by default every GPU,
            else up to four processes on the processor, which share its cores.

    Returns:
        The pool. It is to be stopped, by `stop_multi_process_pool` or as a context manager.
    """
    return ProcessPool(pipeline, target_devices)


# --- the parts of a call


def plan_of(
    pipeline: Pipeline,
    /,
    argument: str,
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
    batch_size: int | None = None,
    show_progress_bar: bool | None = None,
    output_value: Any = "sentence_embedding",
    precision: str | None = "float32",
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    truncation: str = "warn",
    return_report: bool = False,
    token_budget: int | None = None,
    task: str | None = None,
    **unknown: Any,
) -> Plan:
    """Read the arguments of a call and the settings of the model into a `Plan`.

    Args:
        argument: What the user called the texts.
        prompt_name: As in `encode`; so are the others.

    Raises:
        InputTypeError, InputError: As in `encode`.
    """
    if unknown:
        names = ", ".join(unknown)
        raise InputTypeError(f"encode has no argument {names}", next(iter(unknown)))
    prompt = _prompt_text(pipeline, prompt, prompt_name)
    batch_size = _positive(batch_size, "batch_size")
    token_budget = _positive(token_budget, "token_budget")
    precision = "float32" if precision is None else precision
    if precision != "float32":
        check_precision(precision)
    if precision != "float32" and output_value != "sentence_embedding":
        raise InputError(
            f"precision is {precision!r}, which is for output_value='sentence_embedding'",
            "precision",
        )
    if truncate_dim is None:
        truncate_dim = pipeline.truncate_dim
    else:
        check_positive_int(truncate_dim, "truncate_dim")
    full, max_seq_length = pipeline.bert.config.hidden_size, pipeline.max_seq_length
    if output_value is not None:
        check_choice(output_value, ("sentence_embedding", "token_embeddings"), "output_value")
    check_choice(truncation, TRUNCATION, "truncation")
    if truncation == "chunk" and output_value != "sentence_embedding":
        raise InputError(
            "truncation is 'chunk', which is for output_value='sentence_embedding'",
            "truncation",
        )
    return Plan(
        prompt=prompt,
        output_value=output_value,
        truncation=truncation,
        max_seq_length=max_seq_length,
        width=full if truncate_dim is None else min(truncate_dim, full),
        normalize=bool(normalize_embeddings),
        precision=precision,
        batch_size=batch_size,
        token_budget=token_budget,
        spans=return_report,
        on_device=False,
        show_progress_bar=show_progress_bar,
        argument=argument,
        first_row=0,
    )


def _prompt_text(pipeline: Pipeline, /, prompt: str | None, name: str | None) -> str:
    """Return what to put in front of every text: the prompt, or the one of that name, or ""."""
    if prompt is not None:
        if name is not None:
            logger.warning(
                "Provide either a `prompt`, a `prompt_name`, or neither, but not both. "
                "Ignoring the `prompt_name` in favor of `prompt`."
            )
        return check_text(prompt, "prompt")
    if name is None:
        name = pipeline.default_prompt_name
    return "" if name is None else prompt_of(pipeline.prompts, name, "prompt_name")


def run_plan(
    pipeline: Pipeline,
    /,
    rows: list[Row],
    plan: Plan,
    device: str | torch.device | Sequence[str | torch.device] | None = None,
    pool: Any = None,
    chunk_size: int | None = None,
) -> tuple[Any, EncodeReport]:
    """Compute a plan and finish its vectors: returns the values and what was read of each row."""
    outcome = _compute(pipeline, rows, plan, device, pool, chunk_size)
    values = outcome.values
    if plan.output_value == "sentence_embedding":
        values = _finish(pipeline, values, plan)
    kept, spans = tuple(outcome.kept), tuple(outcome.spans or ())
    counts, windows = tuple(outcome.token_counts), tuple(outcome.windows)
    return values, EncodeReport(counts, kept, spans, windows)


def _compute(
    pipeline: Pipeline,
    /,
    rows: list[Row],
    plan: Plan,
    device: str | torch.device | Sequence[str | torch.device] | None,
    pool: Any,
    chunk_size: int | None,
) -> Computed:
    """Run a plan here, or in other processes."""
    if chunk_size is not None:
        check_positive_int(chunk_size, "chunk_size")
    several = list(device) if isinstance(device, list | tuple) else None
    if pool is None and several is None:
        if device is not None:
            pipeline.to(as_device(device))  # type: ignore[arg-type]  # one, as just asked
        return run(pipeline, rows, plan)
    if pool is not None:
        return run_in(pool, pipeline, rows, plan, chunk_size)
    with ProcessPool(pipeline, several) as started:
        return run_in(started, pipeline, rows, plan, chunk_size)


def model_ranges_of(
    pipeline: Pipeline, /, truncate_dim: int | None, normalized: bool = False
) -> Any:
    """Return the fixed ranges of int8 for the published weights; None for others."""
    source = pipeline.source
    if source is None or not has_model_ranges(source.sha256.get("model.safetensors", "")):
        return None
    full = pipeline.bert.config.hidden_size
    width = full if truncate_dim is None else min(truncate_dim, full)
    return model_ranges(width, unit_after_truncation=normalized)


def required_ranges(
    pipeline: Pipeline,
    /,
    precision: str,
    truncate_dim: int | None,
    normalized: bool,
    problem: str,
    argument: str = "precision",
) -> Any:
    """`model_ranges_of` for int8 and uint8; None for a precision that needs no ranges.

    Raises:
        InputError: The model has none; the message is `problem`.
    """
    if precision not in ("int8", "uint8"):
        return None
    ranges = model_ranges_of(pipeline, truncate_dim, normalized)
    if ranges is None:
        raise InputError(problem, argument)
    return ranges


def _finish(pipeline: Pipeline, /, vectors: Tensor, plan: Plan) -> Any:
    """Normalize, quantize and convert vectors, as far as the plan asks for it."""
    if plan.normalize:
        vectors = Normalize()(vectors)
    vectors = pipeline.rounded(vectors)
    if plan.precision != "float32":
        ranges = None
        if plan.precision in ("int8", "uint8"):
            ranges = model_ranges_of(pipeline, plan.width, plan.normalize)
        floats = vectors.float().cpu().numpy()
        codes = quantize_embeddings(floats, plan.precision, ranges=ranges)
        return torch.from_numpy(codes).to(pipeline.device) if plan.on_device else codes
    if plan.on_device:
        return vectors
    return (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()


# The arguments of `encode` behind `prompt`, in order: what may be passed by position.
_POSITIONAL = (
    "batch_size", "show_progress_bar", "output_value", "precision", "convert_to_numpy",
    "convert_to_tensor", "device", "normalize_embeddings", "truncate_dim", "pool", "chunk_size",
)  # fmt: skip


def positional(task: str, values: tuple[Any, ...]) -> dict[str, Any]:
    """Name the arguments that `encode_query` or `encode_document` was given by position.

    Raises:
        InputTypeError: There are too many.
    """
    if len(values) > len(_POSITIONAL):
        raise InputTypeError(f"encode_{task} was given too many arguments", "chunk_size")
    return dict(zip(_POSITIONAL, values, strict=False))


def _positive(value: int | None, argument: str) -> int | None:
    return None if value is None else check_positive_int(value, argument)


def _one_of(sentences: Any, inputs: Any) -> tuple[Any, str]:
    """Return the texts, and which of the two arguments they were passed as."""
    if (sentences is MISSING) == (inputs is MISSING):
        how = "pass texts" if sentences is MISSING else "both name the texts; pass one of them"
        raise InputTypeError(f"sentences or inputs: {how}", "sentences")
    return (inputs, "inputs") if sentences is MISSING else (sentences, "sentences")


def prompt_for(task: str, prompts: Collection[str]) -> str | None:
    """Return the name of the prompt for one side of a search, "query" or "document", or None."""
    return next((name for name in _PROMPT_NAMES[task] if name in prompts), None)


def prompt_of(prompts: dict[str, str], name: Any, argument: str) -> str:
    """Return the prompt of that name.

    Raises:
        InputError: There is no such prompt.
    """
    if name not in prompts:
        subject = "Default prompt name" if argument == "default_prompt_name" else "Prompt name"
        raise InputError(
            f"{subject} {name!r} not found in the configured prompts dictionary with keys "
            f"{list(prompts)}.",
            argument,
        )
    return prompts[name]

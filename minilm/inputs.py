"""What a person may pass: texts, a device, a dtype, a count; or an error that names the argument.

In: a str, or any iterable of str (list, generator, NumPy, pandas, polars or Arrow column).
Out: `list[str]` in positional order. Next: `tokenizer.py`.

No framework is imported here: columns are told apart by what they can do.
"""

import logging
import sys
from collections.abc import Collection, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from itertools import islice
from pathlib import PurePath
from typing import Any, TypeAlias, TypedDict, TypeVar

import numpy as np
import torch

from minilm.errors import InputError, InputTypeError
from minilm.report import shortened
from minilm.streams import is_open

__all__ = [
    "EncodeOptions",
    "Row",
    "as_device",
    "as_dtype",
    "as_many",
    "as_rows",
    "as_texts",
    "check_choice",
    "check_in_range",
    "check_positive_int",
    "check_text",
    "check_unicode",
    "is_singular_input",
    "progress_bar",
    "windows",
    "with_progress",
]

_Batch = TypeVar("_Batch")

# A text, or a pair of texts that are read together: [CLS] A [SEP] B [SEP].
Row: TypeAlias = str | tuple[str, str]

_HINT = "pass a string or an iterable of strings"


def with_progress(batches: Sequence[_Batch], show: bool | None) -> Iterable[_Batch]:
    """The batches, with a progress bar if `show`; by default if this package logs at INFO."""
    if _is_shown(show):
        from tqdm.auto import tqdm  # comes with huggingface_hub

        bar: Iterable[_Batch] = tqdm(batches, desc="Batches")
        return bar
    return batches


def progress_bar(show: bool | None, **options: Any) -> Any:
    """A bar of tqdm for what is not a loop, shown if `with_progress` would show one."""
    from tqdm.auto import tqdm

    return tqdm(disable=not _is_shown(show), **options)


def _is_shown(show: bool | None) -> bool:
    if not is_open(sys.stderr):  # there is nowhere to show it
        return False
    return show if show is not None else logging.getLogger("minilm").isEnabledFor(logging.INFO)


def windows(sentences: Any, size: int, argument: str = "sentences") -> Iterator[list[Row]]:
    """Read texts from an iterable, at most `size` at a time.

    Raises:
        InputTypeError: As in `as_texts`, and for a single str. Rows are counted from the start.
        InputError: As in `check_unicode`.
    """
    if isinstance(sentences, str):
        raise InputTypeError(f"{argument} is a single text; pass an iterable of texts", argument)
    _check_column(sentences, argument)
    rows = iter(_plain_rows(sentences))
    start = 0
    while texts := _check_pairs(list(islice(rows, size)), argument, start):
        check_unicode(texts, argument, start)
        yield texts
        start += len(texts)


class EncodeOptions(TypedDict, total=False):
    """The arguments of `SentenceEncoder.encode` that don't change the type of its result."""

    prompt_name: str | None
    prompt: str | None
    batch_size: int | None
    show_progress_bar: bool | None
    precision: str | None
    device: "str | torch.device | Sequence[str | torch.device] | None"
    normalize_embeddings: bool
    truncate_dim: int | None
    pool: Any
    chunk_size: int | None
    truncation: str
    token_budget: int | None
    task: str | None


def is_singular_input(inputs: Any) -> bool:
    """Whether `encode` takes this for one text, and not for many: a str is one."""
    return isinstance(inputs, str) or (
        isinstance(inputs, np.ndarray) and inputs.ndim == 0 and isinstance(inputs.item(), str)
    )


def as_rows(sentences: Any, argument: str = "sentences") -> tuple[list[Row], bool]:
    """Read texts as `as_texts` does, where a row may also be a pair: a tuple or a list of two.

    Returns:
        The rows in positional order, pairs as tuples, and whether a single text was passed.

    Raises:
        InputTypeError: As in `as_texts`.
        InputError: As in `as_texts`; or a row has more or fewer than two texts.
    """
    if isinstance(sentences, np.ndarray) and sentences.ndim == 2:
        sentences = sentences.tolist()
    rows, is_single = _rows(sentences, argument)
    return _check_pairs(rows, argument), is_single


def _check_pairs(rows: list[Any], argument: str, start: int = 0) -> list[Row]:
    for row, text in enumerate(rows):
        if isinstance(text, str):
            continue
        place = f"{argument}[{start + row}]"
        # An array without a dimension has no length: such is a masked text.
        if not isinstance(text, tuple | list | np.ndarray) or (
            isinstance(text, np.ndarray) and not text.ndim
        ):
            check_text(text, place)
        if len(text) != 2:
            raise InputError(f"{place} has {len(text)} parts; pass a string, or two of them", place)
        rows[row] = tuple(check_text(part, f"{place}[{i}]") for i, part in enumerate(text))
    return rows


def as_texts(sentences: Any, argument: str = "sentences") -> tuple[list[str], bool]:
    """Read texts from anything that holds them.

    Args:
        sentences: One str (a zero-dimensional NumPy array of str is one too), or an iterable of
            str in a defined order.
        argument: The name to use in errors.

    Returns:
        The texts in positional order, and whether a single one was passed.

    Raises:
        InputTypeError: It is not text, or a row of it isn't. The message names the row.
        InputError: It is an array with more than one dimension.
    """
    rows, is_single = _rows(sentences, argument)
    for row, text in enumerate(rows):
        if not isinstance(text, str):
            check_text(text, f"{argument}[{row}]")
    return rows, is_single


def check_positive_int(value: Any, argument: str) -> int:
    """Return `value` if it is a whole number above 0.

    Raises:
        InputTypeError: It is not an integer; a bool is not one.
        InputError: It is 0 or negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputTypeError(f"{argument} is {value!r}; pass a positive integer", argument)
    if value < 1:
        raise InputError(f"{argument} is {value}; pass a positive integer", argument)
    return int(value)


def check_in_range(value: Any, smallest: int, largest: int, argument: str) -> int:
    """Return `value` if it is a whole number in a range; errors are as in `check_positive_int`."""
    if not smallest <= check_positive_int(value, argument) <= largest:
        raise InputError(
            f"{argument} is {value}; pass an integer from {smallest} to {largest}", argument
        )
    return int(value)


def _rows(sentences: Any, argument: str) -> tuple[list[Any], bool]:
    """Everything in a column, and whether it is a single text."""
    if isinstance(sentences, np.ndarray) and sentences.ndim == 0:
        sentences = sentences.item()
    if isinstance(sentences, str):
        return [sentences], True
    _check_column(sentences, argument)
    return list(_plain_rows(sentences)), False


def _plain_rows(sentences: Any) -> Iterable[Any]:
    """The rows in positional order. Arrow, xarray and arrays of dask iterate over scalars of their
    own; these become str.
    """
    rows: Iterable[Any] = sentences
    if hasattr(type(sentences), "to_pylist"):
        rows = sentences.to_pylist()
    elif hasattr(type(sentences), "dims") or hasattr(type(sentences), "rechunk"):
        rows = np.asarray(sentences).tolist()
    return rows


def _is_frame(data: Any) -> bool:
    """Whether it is a table. A column of dask has the attribute "columns" too, but one dimension.

    The class is asked, here and elsewhere: an object such as a pandas Series answers to its labels.
    """
    kind = type(data)
    has_columns = hasattr(kind, "columns") or hasattr(kind, "column_names")
    return has_columns and not (hasattr(kind, "ndim") and data.ndim == 1)


def computed(data: Any) -> Any:
    """The data that a dask collection stands for; anything else as it is."""
    return data.compute() if hasattr(type(data), "__dask_graph__") else data


def _check_column(sentences: Any, argument: str) -> None:
    kind = type(sentences).__name__
    if isinstance(sentences, Set) and not isinstance(sentences, KeysView):
        raise InputTypeError(f"{argument} is a {kind}, which has no order; pass a list", argument)
    if _is_frame(sentences):
        raise InputTypeError(f"{argument} is a {kind}; pass one column of it", argument)
    if (
        sentences is None
        or isinstance(sentences, bytes | bytearray | memoryview | Mapping | PurePath)
        or not isinstance(sentences, Iterable)
    ):
        seen = "None" if sentences is None else f"of type {kind}"
        raise InputTypeError(f"{argument} is {seen}; {_HINT}", argument)

    shape = getattr(sentences, "shape", None) if hasattr(type(sentences), "shape") else None
    if isinstance(shape, tuple) and len(shape) != 1:  # NumPy and tensors alike
        raise InputError(f"{argument} has shape {list(shape)}; {_HINT}", argument)


def check_text(text: Any, argument: str) -> str:
    """Return `text` if it is a str; anything else is an `InputTypeError`."""
    if not isinstance(text, str):
        short, kind = shortened(repr(text), 40), type(text).__name__
        seen = "None" if text is None else f"{short}, of type {kind}"
        raise InputTypeError(f"{argument} is {seen}; pass a string", argument)
    return text


def check_unicode(texts: Sequence[Row], argument: str = "sentences", start: int = 0) -> None:
    """Check that texts have no lone surrogates, which a str can hold and UTF-8 can't.

    The `InputError` names the row of the text that has one, counted from `start`.
    """
    for row, text in enumerate(texts, start):
        try:
            for part in (text,) if isinstance(text, str) else text:
                part.encode("utf-8")
        except UnicodeEncodeError as error:
            place, bad = f"{argument}[{row}]", error.object[error.start]
            raise InputError(
                f"{place} has a lone surrogate, {bad!r}, at character {error.start}: it is not "
                "Unicode text; decode its source with errors='replace'",
                place,
            ) from error


def check_choice(value: str, choices: Collection[str], argument: str) -> str:
    """Return `value` if it is one of `choices`; else the `InputError` lists them."""
    if value not in choices:
        raise InputError(f"{argument} is {value!r}; pass one of {', '.join(choices)}", argument)
    return value


def as_device(
    device: str | int | torch.device | None, dtype: torch.dtype | None = None
) -> torch.device:
    """A device that can be used here: `device`, or by default cuda, else mps, else cpu.

    Args:
        device: The device or its name; a number is that of a cuda device.
        dtype: What it should compute in. Not every device has every one: mps has no float64.

    Raises:
        InputError: The name is unknown, or this build of torch or this machine lacks the device.
        InputTypeError: It is not a name.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and torch.backends.mps.is_available() and dtype != torch.float64:
            device = "mps"
        return torch.device(device)
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"  # as torch reads it
    if not isinstance(device, str | torch.device):
        raise InputTypeError(
            f"device is {shortened(repr(device), 40)}, of type {type(device).__name__}; "
            "pass a name such as 'cpu' or 'cuda:0'",
            "device",
        )
    try:
        found = torch.device(device)
        # A name may be known and the device absent.
        torch.empty(1, device=found, dtype=dtype).fill_(0)
    except Warning:  # python -W error
        raise
    except Exception as error:  # torch raises AssertionError, RuntimeError and others here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"device is {str(device)!r}, which torch {torch.__version__} can't use here"
            f"{f' with {dtype}' if dtype else ''}: {reason}; "
            "pass 'cpu', or None for the best one there is",
            "device",
        ) from error
    if found.type == "meta":
        raise InputError("device is 'meta', which computes nothing; pass 'cpu'", "device")
    return found


_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")
}


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Read a dtype that the model can compute in, float32 by default.

    Others than float64, float32, float16 and bfloat16 are an `InputError`.
    """
    if dtype is None:
        return torch.float32
    return _DTYPES[check_choice(str(dtype).removeprefix("torch."), _DTYPES, "dtype")]


def as_many(texts: Any, argument: str) -> list[str]:
    """Read several texts, under the name that the caller has for them.

    Raises:
        InputTypeError: It is a single text, or something in it is not a text.
        InputError: A text has a lone surrogate.
    """
    rows, is_single = as_texts(texts, argument)
    if is_single:
        raise InputTypeError(f"{argument} is a single text; pass a list of texts", argument)
    check_unicode(rows, argument)
    return rows

"""What a person may pass: texts, a device, a dtype, a count; or an error that names the argument.

In: a str, or any iterable of str (list, generator, NumPy, pandas, polars or Arrow column).
Out: `list[str]` in positional order. Next: `tokenizer.py`.

No framework is imported here: columns are told apart by what they can do.
"""

from collections.abc import Collection, Iterable, KeysView, Mapping, Set
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from minilm.errors import InputError, InputTypeError

__all__ = ["as_device", "as_dtype", "as_texts", "check_choice", "check_positive_int"]

_HINT = "pass a string or an iterable of strings"


def as_texts(sentences: Any, argument: str = "sentences") -> tuple[list[str], bool]:
    """Read texts from anything that holds them.

    Args:
        sentences: One str (a zero-dimensional NumPy array of str is one too), or an iterable of
            str in a defined order.
        argument: The name to use in errors.

    Returns:
        The texts in positional order, and whether a single one was passed.

    Raises:
        InputTypeError: Something in it, or the whole, is not text. The message names the row.
        InputError: An array with more than one dimension.
    """
    if isinstance(sentences, np.ndarray) and sentences.ndim == 0:
        sentences = sentences.item()
    if isinstance(sentences, str):
        return [sentences], True
    return _column(sentences, argument), False


def check_positive_int(value: Any, argument: str) -> int:
    """Return `value` if it is a whole number above 0.

    Raises:
        InputTypeError: It is no integer (a bool is none either).
        InputError: It is 0 or negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputTypeError(f"{argument} is {value!r}; pass a positive integer", argument)
    if value < 1:
        raise InputError(f"{argument} is {value}; pass a positive integer", argument)
    return int(value)


def _column(sentences: Any, argument: str) -> list[str]:
    kind = type(sentences).__name__
    if isinstance(sentences, Set) and not isinstance(sentences, KeysView):
        raise InputTypeError(f"{argument} is a {kind}, which has no order; pass a list", argument)
    if hasattr(type(sentences), "columns") or hasattr(type(sentences), "column_names"):  # a frame
        raise InputTypeError(f"{argument} is a {kind}; pass one column of it", argument)
    if (
        sentences is None
        or isinstance(sentences, bytes | bytearray | memoryview | Mapping | PurePath)
        or not isinstance(sentences, Iterable)
    ):
        seen = "None" if sentences is None else f"of type {kind}"
        raise InputTypeError(f"{argument} is {seen}; {_HINT}", argument)

    shape = getattr(sentences, "shape", None)
    if isinstance(shape, tuple) and len(shape) != 1:  # NumPy and tensors alike
        raise InputError(f"{argument} has shape {list(shape)}; {_HINT}", argument)
    # Arrow iterates over its own scalars; everything else gives str, in positional order.
    to_pylist = getattr(type(sentences), "to_pylist", None)
    texts = list(sentences if to_pylist is None else to_pylist(sentences))
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            place = f"{argument}[{row}]"
            seen = "None" if text is None else f"{_short(text)}, of type {type(text).__name__}"
            raise InputTypeError(f"{place} is {seen}; pass a string", place)
    return texts


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def check_choice(value: str, choices: Collection[str], argument: str) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        InputError: It is none of them; they are listed.
    """
    if value not in choices:
        raise InputError(f"{argument} is {value!r}; pass one of {', '.join(choices)}", argument)
    return value


def as_device(device: str | torch.device | None) -> torch.device:
    """A device that can be used here: `device`, or by default cuda, else mps, else cpu.

    Raises:
        InputError: The name is unknown, or this build of torch or this machine lacks the device.
        InputTypeError: It is no name.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise InputTypeError(
            f"device is {_short(device)}, of type {type(device).__name__}; "
            "pass a name such as 'cpu' or 'cuda:0'",
            "device",
        )
    try:
        found = torch.device(device)
        torch.empty(1, device=found).fill_(0)  # a name may be known and the device absent
    except Exception as error:  # torch raises AssertionError, RuntimeError and others here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"device is {str(device)!r}, which torch {torch.__version__} can't use here: "
            f"{reason}; pass 'cpu', or None for the best one there is",
            "device",
        ) from error
    if found.type == "meta":
        raise InputError("device is 'meta', which computes nothing; pass 'cpu'", "device")
    return found


_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A floating-point dtype that the model can compute in, float32 by default.

    Raises:
        InputError: It is none of float64, float32, float16 and bfloat16.
    """
    if dtype is None:
        return torch.float32
    return _DTYPES[check_choice(str(dtype).removeprefix("torch."), _DTYPES, "dtype")]

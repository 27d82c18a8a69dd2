"""Vectors in any form that people have them in -> a tensor: the one reader of all of them.

In: tensors, arrays (memory-mapped ones are not copied), lists, columns and frames of pandas,
polars, Arrow or dask. Out: a tensor of their numbers, or an error that names the argument. Next:
`similarity.py`, `quantize.py` and `tasks/`.

A framework is imported only for its own objects. They are told apart by what their class can do,
and not by attributes of the object, since a pandas Series answers to its labels.
"""

from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm.errors import InputError, InputTypeError, MissingPackageError
from minilm.inputs import computed

__all__ = ["as_floats", "as_matrix", "as_numbers", "from_arrow"]

_Array = np.ndarray[Any, Any]

_WHAT = "pass a tensor, an array or a list of vectors of one width"
_CODES = (torch.int8, torch.uint8)
_SMALL = (*_CODES, torch.int16)  # exact in float32


def as_matrix(embeddings: Any, argument: str, *, codes: bool = True, keep: bool = False) -> Tensor:
    """Vectors as `[rows, d]`; one vector `[d]` is one row.

    Args:
        embeddings: See `as_numbers`.
        argument: What to call them in an error.
        codes: Whether int8 and uint8 are numbers like others; if not, they are refused.
        keep: Keep integers of one or two bytes; otherwise all integers become float32.

    Returns:
        The numbers, where possible in the memory that was given: not to be written to.

    Raises:
        InputError: They have other dimensions.
        InputTypeError: They are not numbers, codes where none are wanted, or of several widths.
    """
    tensor = as_numbers(embeddings, argument)
    if tensor.dtype in _CODES and not codes:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputTypeError(
            f"{argument} is of {kind}: codes; pass floating-point vectors", argument
        )
    if not tensor.is_floating_point() and not (keep and tensor.dtype in _SMALL):
        tensor = tensor.to(torch.float32)
    if tensor.ndim not in (1, 2):
        raise InputError(
            f"{argument} has shape {list(tensor.shape)}; pass one vector [d] or rows [n, d]",
            argument,
        )
    return tensor if tensor.ndim == 2 else tensor.unsqueeze(0)  # [d] -> [1, d]


def as_floats(embeddings: Any, argument: str) -> _Array:
    """Vectors `[d]` or `[n, d]` as an array of their own floating dtype; float32 for bfloat16 and
    integers. Errors as in `as_matrix`, and codes are refused.
    """
    tensor = as_numbers(embeddings, argument).detach()
    rows = as_matrix(tensor, argument, codes=False).cpu()
    array: _Array = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
    return array[0] if tensor.ndim == 1 else array


def as_numbers(embeddings: Any, argument: str) -> Tensor:
    """Numbers of any shape and dtype as a tensor.

    Args:
        embeddings: A tensor; an array; a list or a tuple of numbers, of lists, of arrays or of
            tensors; a column of numbers or of vectors, or a frame of numbers.
        argument: What to call them in an error.

    Returns:
        The numbers in their own dtype, or the nearest that torch has; Python's become float32.

    Raises:
        InputTypeError: They are something else, or vectors of several widths; or a number is
            missing: null, or masked.
    """
    given = type(embeddings).__name__
    try:
        data = computed(embeddings)
        if _is_from(data, "polars"):
            data = _of_polars(data)
        if _is_from(data, "pyarrow"):
            data = from_arrow(data, argument)
        return _as_tensor(data)
    except (InputError, MissingPackageError):
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        why = f"; it is {error}" if isinstance(error, _UnfitError) else ""
        if isinstance(error, _MissingError):
            why = f"; {argument}{error}"
        raise InputTypeError(f"{argument} is {given}; {_WHAT}{why}", argument) from error


class _UnfitError(TypeError):
    """An object can't be read as numbers; the message is the reason."""


class _MissingError(ValueError):
    """A number is missing; the message goes behind the argument's name."""


def _as_tensor(data: Any) -> Tensor:
    if isinstance(data, Tensor):
        return _checked(data)
    if isinstance(data, np.ndarray):
        return _of_array(data)
    if isinstance(data, str | bytes | bytearray | Mapping | Set):
        raise TypeError("no numbers")
    if isinstance(data, list | tuple):
        return _of_rows(list(data))
    if hasattr(type(data), "__array__"):  # pandas, xarray, jax and others
        return _of_array(np.asarray(data))
    if not hasattr(type(data), "__len__") or not isinstance(data, Iterable):
        raise TypeError("no numbers")
    with suppress(TypeError):  # an object that shows its memory, as array.array
        return _of_array(np.asarray(memoryview(data)))  # type: ignore[arg-type]
    return _of_rows(list(data))


def _is_from(data: Any, package: str) -> bool:
    return type(data).__module__.partition(".")[0] == package


def _checked(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise _UnfitError("sparse")
    if tensor.is_complex() or tensor.is_quantized:
        raise _UnfitError(f"of {tensor.dtype}")
    if tensor.device.type == "meta":
        raise _UnfitError("on the device meta, which holds no numbers")
    return tensor


def _of_rows(rows: list[Any]) -> Tensor:
    """A list of numbers, or of vectors of one kind."""
    if any(isinstance(row, Tensor) for row in rows):
        if not all(isinstance(row, Tensor) for row in rows):
            raise TypeError("tensors, and others")
        return torch.stack([_checked(row) for row in rows])
    if rows and any(isinstance(row, np.ma.MaskedArray) for row in rows):
        parts = [_unmasked(row, f"[{i}]") for i, row in enumerate(rows)]
        return _of_array(np.stack(parts))
    if rows and hasattr(type(rows[0]), "as_py"):  # what an Arrow column gives row by row
        rows = [row.as_py() for row in rows]
    if rows and _has_to_be_read(rows[0]):
        return torch.stack([_as_tensor(row) for row in rows])
    array = np.asarray(rows)
    if array.dtype == np.float64 and _has_python_numbers(rows):
        array = array.astype(np.float32)  # as torch.tensor reads them
    return _of_array(array)


def _has_to_be_read(row: Any) -> bool:
    """Whether NumPy would make an object of such a row, or a wrong number."""
    return not isinstance(row, list | tuple | np.ndarray | np.generic | int | float | str) and (
        hasattr(type(row), "__len__") or hasattr(type(row), "__array__")
    )


def _of_array(array: _Array) -> Tensor:
    array = _unmasked(array)
    if array.dtype == object:  # an array or a column of vectors, or of Python's numbers
        return _of_objects(array)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"of {array.dtype}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:  # torch has no longer one
        array = array.astype(np.float64)
    # torch takes no negative strides and no foreign byte order.
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    plain = np.require(native, requirements=["C", "A"])
    return torch.from_numpy(np.asarray(_Writable(plain)) if plain.size else plain.copy())


def _of_objects(array: _Array) -> Tensor:
    """Read an array of objects, each a number or a vector."""
    flat = array.ravel().tolist() if array.ndim != 1 else list(array)
    for row, each in enumerate(flat):
        if _is_missing(each):
            place = f"[{row // (array.size // len(array)) if array.size else 0}]"
            raise _MissingError(f"{place} is missing; leave that row out")
    if array.ndim != 1:
        if not all(isinstance(each, int | float | np.number | np.bool_) for each in flat):
            raise TypeError("no numbers")
        return _of_array(np.array(flat, dtype=np.float64).reshape(array.shape))
    return _of_rows(flat)


def _is_missing(value: Any) -> bool:
    """Whether a value is None, or pandas' own for a missing one; a NaN is a number."""
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _unmasked(array: Any, place: str = "") -> _Array:
    """The numbers of a masked array that has all of them; any other array as it is."""
    if isinstance(array, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(array)
        if mask.any():
            where = place or (f"[{int(mask.nonzero()[0][0])}]" if array.ndim else "")
            raise _MissingError(f"{where} has a masked number; fill it, or leave that row out")
        array = np.ma.getdata(array)
    plain: _Array = np.asarray(array)
    return plain


def _of_polars(data: Any) -> Any:
    """A column of polars as one of Arrow; a frame of numbers as an array."""
    if hasattr(type(data), "collect"):
        raise _UnfitError("not computed yet; collect() it")
    if not hasattr(type(data), "columns"):
        try:
            return data.to_arrow()
        except ImportError as error:
            raise MissingPackageError("a column of polars", "pyarrow", "parquet") from error
    if any(data.null_count().row(0)):
        raise _MissingError(" has nulls; leave those rows out")
    return data.to_numpy()


def from_arrow(column: Any, argument: str) -> _Array:
    """The numbers `[n]`, or the vectors `[n, d]`, of an Arrow column.

    Raises:
        InputTypeError: A number or a vector is null, or the vectors differ in length; or the column
            holds something else, or is a table.
    """
    import pyarrow

    name = "the column" if argument == "column" else argument
    if hasattr(type(column), "column_names"):
        kind = type(column).__name__
        raise InputTypeError(f"{name} is a {kind}; pass one column of it", argument)
    if isinstance(column, pyarrow.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pyarrow.ChunkedArray):  # older ones give one of one chunk
        column = pyarrow.concat_arrays(column.chunks)
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    types = pyarrow.types
    is_fixed = types.is_fixed_size_list(column.type)
    is_list = is_fixed or types.is_list(column.type) or types.is_large_list(column.type)
    values = column.flatten() if is_list else column
    kind = values.type
    if not (types.is_floating(kind) or types.is_integer(kind)):
        raise InputTypeError(f"{name} holds {column.type}, not lists of numbers", argument)
    if column.null_count or values.null_count:
        raise InputTypeError(f"{name} has nulls among its vectors; leave those rows out", argument)
    numbers: _Array = values.to_numpy(zero_copy_only=False)
    if not is_list:
        return numbers
    if is_fixed:
        width = column.type.list_size
    else:
        lengths = set(column.value_lengths().to_pylist()) or {0}
        if len(lengths) > 1:
            raise InputTypeError(
                f"{name} has vectors of {min(lengths)} and of {max(lengths)} numbers", argument
            )
        (width,) = lengths
    return numbers.reshape(len(column), width)


def _has_python_numbers(embeddings: Any) -> bool:
    while isinstance(embeddings, list | tuple) and len(embeddings):
        embeddings = embeddings[0]
    return type(embeddings) in (int, float)


class _Writable:
    """An array's memory, shown as writable, as torch wants it, if it is not. Never written to."""

    def __init__(self, array: _Array) -> None:
        self.array = array  # kept alive by what is made of this
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = array.__array_interface__ | {"data": (address, False)}

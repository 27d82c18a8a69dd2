"""Vectors as an Arrow column, with the fingerprint of the model that made them.

In: NumPy embeddings. Out: a fixed-size list column, as Parquet files hold it and every tool that
reads them understands; and from such a column, the embeddings. Next: `streaming.py`, and the
adapters that pass on Arrow data.

pyarrow is imported only when it is used: it comes with `pip install "minilm[parquet]"`.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from minilm.errors import InputError, InputTypeError, MissingPackageError
from minilm.files.rows import column_of
from minilm.files.tables import METADATA_KEY, VECTOR_FIELDS
from minilm.vectors import from_arrow

__all__ = [
    "embedding_array", "embedding_type", "embeddings_of", "fingerprint_in", "import_pyarrow",
    "text_column", "texts_of", "vector_column", "vectors_of", "with_fingerprint", "with_vectors",
]  # fmt: skip

# The dtypes of vectors; codes of int8, uint8 and bits have the last two.
_DTYPES = ("float64", "float32", "float16", "int8", "uint8")

_Holder = TypeVar("_Holder")


def import_pyarrow(what: str) -> Any:
    """Import the package pyarrow.

    Args:
        what: What needs it, for the error: "writing Parquet files".

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise MissingPackageError(what, "pyarrow", "parquet") from error
    return pyarrow


def embedding_type(dtype: "str | np.dtype[Any] | type[Any]", width: int) -> Any:
    """The Arrow type of a column of vectors: lists of `width` numbers each, none of them null.

    Raises:
        MissingPackageError: pyarrow is not installed.
        InputTypeError: The dtype is none of float64, float32, float16, int8 and uint8.
    """
    pyarrow = import_pyarrow("a column of vectors")
    name = np.dtype(dtype).name
    if name not in _DTYPES:
        raise InputTypeError(
            f"embeddings is of {name}; pass one of {', '.join(_DTYPES)}", "embeddings"
        )
    item = pyarrow.field("item", pyarrow.from_numpy_dtype(np.dtype(dtype)), nullable=False)
    return pyarrow.list_(item, width)


def embedding_array(embeddings: "np.ndarray[Any, Any]") -> Any:
    """Make an Arrow column of vectors.

    Args:
        embeddings: `[n, d]` from `encode`: float64, float32, float16, int8 or uint8.

    Returns:
        A `pyarrow.FixedSizeListArray` of n lists of d numbers of the same dtype, bit by bit.

    Raises:
        MissingPackageError: pyarrow is not installed.
        InputError: The array has another shape.
        InputTypeError: It is not an array, or of another dtype.
    """
    if not isinstance(embeddings, np.ndarray):
        kind = type(embeddings).__name__
        raise InputTypeError(f"embeddings is of type {kind}; pass a NumPy array", "embeddings")
    if embeddings.ndim != 2:
        raise InputError(
            f"embeddings has shape {list(embeddings.shape)}; pass [n, d]", "embeddings"
        )
    count, width = embeddings.shape
    kind = embedding_type(embeddings.dtype, width)
    pyarrow = import_pyarrow("a column of vectors")
    native = embeddings.astype(embeddings.dtype.newbyteorder("="), copy=False)
    flat = pyarrow.array(native.reshape(count * width))
    return pyarrow.FixedSizeListArray.from_arrays(flat, type=kind)


def embeddings_of(column: Any) -> "np.ndarray[Any, Any]":
    """Return the vectors `[n, d]` of an Arrow column, from `embedding_array` or another program.

    Args:
        column: An `Array` or a `ChunkedArray` of lists of numbers, all of one length.

    Raises:
        InputError: It holds something else, a vector is null, or they differ in length.
    """
    import_pyarrow("a column of vectors")
    numbers = from_arrow(column, "column")
    if numbers.ndim != 2:
        raise InputError(f"the column holds {column.type}, not lists of numbers", "column")
    return numbers


def vectors_of(table: Any, column: str, place: str) -> "np.ndarray[Any, Any]":
    """The vectors of a table of the file `place`. Errors as in `embeddings_of`, which name it."""
    try:
        return embeddings_of(table.column(column))
    except InputError as error:
        raise InputError(f"{place}: {error}", "column") from error


def vector_column(schema: Any, place: str) -> str:
    """The name of the column that holds vectors: "embedding" or alike, or the only list of numbers.

    Args:
        schema: The file's schema.
        place: What to call the file in the error.

    Raises:
        InputError: There is none, or more than one.
    """
    types = import_pyarrow("reading Parquet files").types

    def is_list(kind: Any) -> bool:
        kinds = (types.is_fixed_size_list, types.is_list, types.is_large_list)
        numbers = (types.is_floating, types.is_integer)
        return any(is_a(kind) for is_a in kinds) and any(is_a(kind.value_type) for is_a in numbers)

    lists = [each.name for each in schema if is_list(each.type)]
    named = [name for name in VECTOR_FIELDS if name in lists]
    if named or len(lists) == 1:
        return (named or lists)[0]
    seen = ", ".join(map(repr, lists)) if lists else "no list of numbers"
    raise InputError(f"{place}: has {seen}; one column 'embedding' was expected", "column")


def text_column(schema: Any, wanted: str | None, place: str, vectors: str | None = None) -> str:
    """The name of the column that holds texts: the one wanted, else "text", else the only one.

    Args:
        schema: The file's schema.
        wanted: The name that was asked for.
        place: What to call the file in the error.
        vectors: The name of the column of vectors, which is not that of texts.

    Raises:
        InputError: There is none, or more than one, or it holds something else than strings.
    """
    types = import_pyarrow("reading Parquet files").types
    name = column_of([each for each in schema.names if each != vectors], wanted, place, "column")
    if schema.names.count(name) > 1:
        raise InputError(f"{place}: has more than one column {name!r}", "column")
    kind = schema.field(name).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_view = getattr(types, "is_string_view", lambda kind: False)
    if not (types.is_string(kind) or types.is_large_string(kind) or is_view(kind)):
        raise InputError(f"{place}: column {name!r} holds {kind}, not strings", "column")
    return name


def texts_of(table: Any, column: str, place: str, rows: Sequence[int] | None = None) -> list[str]:
    """Return the texts of a table in which every row has a vector.

    With `on_bad_row="empty"` this package writes null, and the vector of "", for a text that can't
    be embedded: such a null is read as "". What a null of another program means is unknown.

    Args:
        table: A `pyarrow.Table` with the column.
        column: A column of strings, see `text_column`.
        place: What to call the file in the error.
        rows: The numbers that the rows have in the file, by default 0, 1, 2, ...

    Raises:
        InputError: A text is null, in a table of another program.
    """
    texts: list[str | None] = table.column(column).to_pylist()
    if None in texts and fingerprint_in(table.schema) is None:
        row = texts.index(None)
        row = row if rows is None else rows[row]
        raise InputError(f"{place}: row {row}: {column} is null, not a string", "column")
    return [text or "" for text in texts]


def with_fingerprint(holder: _Holder, fingerprint: str) -> _Holder:
    """Add the record of the model that made the vectors to a schema or a table.

    Args:
        holder: A `pyarrow.Schema` or a `pyarrow.Table`; its other metadata stays.
        fingerprint: `Fingerprint.to_json()`. It goes under the key `minilm.fingerprint`, where
            `minilm.files.records.read_fingerprint` finds it in a Parquet file.
    """
    either: Any = holder
    schema = getattr(holder, "schema", None)
    change = either.with_metadata if schema is None else either.replace_schema_metadata
    known = (either if schema is None else schema).metadata or {}
    changed: _Holder = change({**known, METADATA_KEY.encode(): fingerprint.encode()})
    return changed


def with_vectors(
    table: Any, name: str, embeddings: "np.ndarray[Any, Any]", fingerprint: str | None
) -> Any:
    """Add vectors as the last column of a table, and the record of their model if there is one.

    Args:
        table: A `pyarrow.Table` of n rows.
        name: What to call the column.
        embeddings: `[n, d]`, see `embedding_array`.
        fingerprint: See `with_fingerprint`.
    """
    column = embedding_array(embeddings)
    field = import_pyarrow("a column of vectors").field(name, column.type, nullable=False)
    longer = table.append_column(field, column)
    return longer if fingerprint is None else with_fingerprint(longer, fingerprint)


def fingerprint_in(schema: Any) -> bytes | None:
    """The record that a schema holds, as JSON; None if there is none."""
    found: bytes | None = (schema.metadata or {}).get(METADATA_KEY.encode())
    return found

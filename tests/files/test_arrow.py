"""Vectors as Arrow columns: the same bits there and back."""

import builtins
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minilm.errors import InputError, InputTypeError, MissingPackageError
from minilm.files.arrow import (
    embedding_array,
    embeddings_of,
    fingerprint_in,
    import_pyarrow,
    vector_column,
    with_fingerprint,
)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8", "uint8", ">f4"])
def test_there_and_back(dtype: str, tmp_path: Any) -> None:
    numbers = np.arange(-6, 6).astype(dtype).reshape(3, 4)
    column = embedding_array(numbers)
    native = np.dtype(dtype).newbyteorder("=")
    assert column.type.list_size == 4
    assert column.type.value_type == pa.from_numpy_dtype(native)
    pq.write_table(pa.table({"embedding": column}), tmp_path / "x.parquet")
    back = embeddings_of(pq.read_table(tmp_path / "x.parquet")["embedding"])
    assert back.dtype == native
    np.testing.assert_array_equal(back, numbers)
    assert embedding_array(numbers[:0]).type == column.type


def test_other_lists_and_parts_of_columns() -> None:
    np.testing.assert_array_equal(
        embeddings_of(pa.array([[1.0, 2.0], [3.0, 4.0]])), [[1, 2], [3, 4]]
    )
    column = pa.chunked_array([embedding_array(np.eye(3, dtype=np.float32))] * 2)
    np.testing.assert_array_equal(embeddings_of(column.slice(2, 3)), np.eye(3)[[2, 0, 1]])
    assert embeddings_of(column.slice(0, 0)).shape[0] == 0


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a"]), "holds string, not lists"),
        (pa.array([[1.0], None]), "nulls"),
        (pa.array([[1.0], [None]]), "nulls"),
        (pa.array([[1.0], [2.0, 3.0]]), "vectors of 1 and of 2 numbers"),
        (pa.array([["a"]]), "not lists of numbers"),
        (pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)), "nulls"),
    ],
)
def test_other_columns_are_refused(column: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        embeddings_of(column)


def test_other_arrays_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \[3\]"):
        embedding_array(np.zeros(3, dtype=np.float32))
    with pytest.raises(InputTypeError, match="int64"):
        embedding_array(np.zeros((3, 1), dtype=np.int64))
    with pytest.raises(InputTypeError, match="list"):
        embedding_array([[1.0]])  # type: ignore[arg-type]


def test_fingerprint_of_schemas_and_tables() -> None:
    schema = pa.schema([("a", pa.int8())], metadata={"mine": "kept"})
    assert fingerprint_in(schema) is None
    for holder in (schema, schema.empty_table()):
        changed = with_fingerprint(holder, '{"ü": 1}')
        metadata = changed if holder is schema else changed.schema
        assert fingerprint_in(metadata) == '{"ü": 1}'.encode()
        assert metadata.metadata[b"mine"] == b"kept"


def test_vector_column() -> None:
    numbers = pa.list_(pa.float32(), 2)
    fields = [("a", pa.string()), ("x", numbers), ("tags", pa.list_(pa.string()))]
    assert vector_column(pa.schema(fields), "f") == "x"
    assert vector_column(pa.schema([*fields, ("embedding", numbers)]), "f") == "embedding"
    with pytest.raises(InputError, match="f: has 'x', 'y'"):
        vector_column(pa.schema([*fields, ("y", numbers)]), "f")
    with pytest.raises(InputError, match="f: has no list of numbers"):
        vector_column(pa.schema(fields[:1]), "f")


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "pyarrow":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r'pyarrow: pip install "minilm\[parquet\]"'):
        import_pyarrow("this")

"""Read back what `minilm encode` wrote, in any form, as float32.

In: a file, or a folder of parts. Out: its rows and its vectors, for a library that has no loader
for that form. `tables.py` and `streaming.py` write them; `parity/foreign.py` reads what other
programs wrote.
"""

import errno
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from minilm.disk import parse_json, with_home
from minilm.errors import InputError, errors_of_libraries
from minilm.files.arrays import map_npy, open_npz
from minilm.files.arrow import import_pyarrow, vector_column, vectors_of
from minilm.files.records import read_fingerprint
from minilm.files.rows import DEFAULT_COLUMN, Reader, as_floats, as_json, check_numbers
from minilm.files.shards import lacking, part_paths
from minilm.files.sources import readable
from minilm.files.tables import SUFFIXES, VECTOR_FIELDS
from minilm.inference.truncation import caller_level
from minilm.pretrained.fingerprint import Fingerprint, compare
from minilm.quantize import dequantize, has_model_ranges, model_ranges, stored_width

__all__ = ["read_blocks", "read_vectors", "record_of"]

_Array = np.ndarray[Any, Any]
_Rows = Sequence[Any]


def read_vectors(
    path: str | os.PathLike[str],
    *,
    fingerprint: Fingerprint | None = None,
    embedding_column: str | None = None,
) -> tuple[_Rows, _Array]:
    """Read rows and vectors that `minilm encode` wrote.

    Args:
        path: A `.npy`, `.npz`, `.safetensors`, `.jsonl`, `.csv` or `.parquet` file, or a folder of
            parts.
        fingerprint: The record of the model that the vectors should be of: that of the queries,
            `encoder.fingerprint()`. By default any will do.
        embedding_column: The name of the vectors in `.jsonl` and Parquet; by default "embedding" or
            alike, or in Parquet the only list of numbers.

    Returns:
        n rows, a dict of all columns but the vectors each; for `.npy`, which has none, the numbers
        0 to n - 1. And the vectors, float32 `[n, 384]`: those of `.npy` and `.safetensors` are
        read from the disk when they are used, and read-only. Codes are decoded, see
        `minilm.dequantize`; of bits, the vectors have length 1. A folder that lacks a part of its
        run, or has more, is read with a warning.

    Raises:
        InputError: It is of another form, or broken; it was made by another model than
            `fingerprint`, or there is no record to tell; it holds codes, and no record tells of
            which precision; or NaN or infinity, where it is not mapped.
        MissingPackageError: For Parquet pyarrow is needed.
        OSError: It can't be read.

    Example:
        >>> rows, vectors = read_vectors("vectors/", fingerprint=encoder.fingerprint())
    """
    blocks = list(read_blocks(path, fingerprint=fingerprint, embedding_column=embedding_column))
    if len(blocks) == 1:
        return blocks[0]
    rows = [row for found, _ in blocks for row in found]
    return rows, np.concatenate([vectors for _, vectors in blocks])


def read_blocks(
    path: str | os.PathLike[str],
    *,
    fingerprint: Fingerprint | None = None,
    embedding_column: str | None = None,
) -> Iterator[tuple[_Rows, _Array]]:
    """Read as `read_vectors` does, but a folder part by part, so that memory holds one of them."""
    path = with_home(path)
    record = record_of(path)
    if fingerprint is not None:
        _check_same(path, record, fingerprint)
    lacks = lacking(path) if path.is_dir() else None
    if lacks:
        warnings.warn(
            f"{path}: {lacks}; what is there is read, see `minilm check`",
            stacklevel=caller_level(),
        )
    for part in part_paths(path) if path.is_dir() else [path]:
        read = _READERS[part.suffix.lower()]
        with errors_of_libraries(partial(_refusal, part)):
            rows, vectors = read(part, embedding_column)
            if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
                raise ValueError(f"holds {vectors.dtype} {list(vectors.shape)}, not vectors")
            if rows is not None and len(rows) != len(vectors):
                raise ValueError(f"holds {len(vectors):,} vectors and {len(rows):,} rows")
            expected = vectors.shape[1]
            if record is not None:
                expected = stored_width(record.dimension, record.precision)
            if len(vectors) and vectors.shape[1] != expected:
                what = f"its vectors have {vectors.shape[1]} numbers"
                raise ValueError(f"{what}, its fingerprint says {expected}")
        yield range(len(vectors)) if rows is None else rows, _decoded(vectors, record, part)


def record_of(path: Path) -> Fingerprint | None:
    """The record of the model that made a file or a folder of vectors; None if there is none.

    Raises:
        InputError: The path is of another form, or parts of the folder have different records.
        ConfigError: A record is broken.
        OSError: There is no such file.
    """
    if not path.is_dir():
        if path.suffix.lower() not in _READERS:
            if not path.exists():
                raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(path))
            forms = ", ".join((*SUFFIXES, ".parquet"))
            raise InputError(f"{path}: has no suffix of {forms}; name it after its form", "path")
        return read_fingerprint(path)
    parts = part_paths(path)
    if not parts:
        raise InputError(f"{path}: has no Parquet file in it", "path")
    records = [read_fingerprint(part) for part in parts]
    for part, record in zip(parts, records, strict=True):
        if record != records[0]:
            raise InputError(
                f"{part}: has another fingerprint than {parts[0].name}; these vectors can't be "
                "searched together, read them one by one",
                "path",
            )
    return records[0]


def _check_same(path: Path, record: Fingerprint | None, wanted: Fingerprint) -> None:
    if record is None:
        raise InputError(f"{path}: has no fingerprint that tells which model made it", "path")
    # Queries may have a prompt of their own, and are not rounded.
    same = {name: getattr(wanted, name) for name in ("precision", "prompt", "truncation")}
    comparison = compare(replace(record, **same), wanted)
    if not comparison.is_compatible:
        raise InputError(
            f"{path}: can't be searched with vectors of {wanted}: {comparison}; use the model that "
            "made it, or embed the texts again",
            "fingerprint",
        )


def _decoded(vectors: _Array, record: Fingerprint | None, path: Path) -> _Array:
    """Vectors or codes as float32, in the memory that was given if it is that already."""
    is_code = record is not None and record.precision != "float32"
    if vectors.dtype.kind == "f" and not is_code:
        with np.errstate(over="ignore"):  # to infinity
            floats = vectors.astype(np.float32, copy=False)
        if not (floats is vectors and isinstance(vectors, np.memmap)):
            bad = ~np.isfinite(floats).all(axis=1)
            if bad.any():
                what = f"NaN or infinity in the vector of row {int(bad.argmax())}"
                raise InputError(f"{path}: has {what}; embed its text again", "path")
        return floats
    if not is_code:
        raise InputError(
            f"{path}: holds {vectors.dtype}, and no fingerprint tells of which precision these "
            "codes are; read them yourself, and call minilm.util.dequantize",
            "path",
        )
    assert record is not None
    precision, ranges = record.precision, None
    kind = np.uint8 if precision in ("uint8", "ubinary") else np.int8
    if not precision.endswith("binary"):
        if not has_model_ranges(record.weights_sha256):
            raise InputError(
                f"{path}: has {precision} codes of ranges of their own, which are not known; write "
                "the float32 vectors",
                "path",
            )
        unit = record.normalize and record.dimension < 384
        ranges = model_ranges(record.dimension, unit_after_truncation=unit)
    return dequantize(vectors.astype(kind), precision, ranges, width=record.dimension)


# --- one form each: rows, or None for .npy, and numbers as they are stored


def _refusal(path: Path, why: str) -> InputError:
    return InputError(f"{path}: is not a file of vectors: {why}", "path")


def _npy(path: Path, column: str | None) -> tuple[_Rows | None, _Array]:
    return None, map_npy(path)


def _npz(path: Path, column: str | None) -> tuple[_Rows | None, _Array]:
    with open_npz(path) as archive:
        texts = parse_json(archive["texts_json"]().tobytes())
        rows = parse_json(archive["rows_json"]().tobytes()) if "rows_json" in archive else texts
        return _checked(rows, texts), archive["embeddings"]()


def _safetensors(path: Path, column: str | None) -> tuple[_Rows | None, _Array]:
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    texts = parse_json(metadata["texts_json"])
    rows = parse_json(metadata.get("rows_json", "null")) or texts
    if "text_column" in metadata:
        column = metadata["text_column"]
        rows = _objects(rows)
        if any(column in row for row in rows):
            raise ValueError(f"its rows have {column!r} beside the texts of that name")
        rows = [row | {column: text} for row, text in zip(rows, texts, strict=True)]
    rows = _checked(rows, texts)
    with path.open("rb") as opened:  # `get_tensor` would copy
        size = int.from_bytes(opened.read(8), "little")
        tensor = parse_json(opened.read(size))["embeddings"]
    kind = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I8": "i1", "U8": "u1"}[tensor["dtype"]]
    start, shape = 8 + size + tensor["data_offsets"][0], tuple(tensor["shape"])
    if not all(shape):
        return rows, np.zeros(shape, kind)
    return rows, np.memmap(path, kind, "r", start, shape)


def _checked(rows: Any, texts: Any) -> list[dict[str, Any]]:
    """Rows as objects; texts are kept a second time, and each must be in its row."""
    checked = _objects(rows)
    if not isinstance(texts, list) or len(texts) != len(checked):
        raise ValueError("its texts_json is not a list with a text for each row")
    for number, (row, text) in enumerate(zip(checked, texts, strict=True)):
        # An index gives a row without a text as JSON.
        if not isinstance(text, str) or (text not in row.values() and text != as_json(row)):
            raise ValueError(f"row {number} does not have the text that texts_json has for it")
    return checked


def _objects(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, str | dict) for row in rows):
        raise ValueError("its rows are not a list of objects and strings")
    return [{DEFAULT_COLUMN: row} if isinstance(row, str) else row for row in rows]


def _jsonl(path: Path, column: str | None) -> tuple[_Rows | None, _Array]:
    rows, vectors = [], []
    for line, row in _rows(path, lambda names: [DEFAULT_COLUMN]):
        names = VECTOR_FIELDS if column is None else (column,)
        name = next((each for each in names if isinstance(row.get(each), list)), None)
        if name is None:
            raise ValueError(f"line {line} has no list of numbers {names[0]!r}")
        vectors.append(row.pop(name))
        check_numbers(vectors[-1], line)
        counts = len(vectors[-1]), len(vectors[0])
        if counts[0] != counts[1]:
            raise ValueError(f"line {line} has {counts[0]} numbers, the first {counts[1]}")
        rows.append(row)
    return rows, np.array(vectors or np.zeros((0, 0)))


def _csv(path: Path, column: str | None) -> tuple[_Rows | None, _Array]:
    rows, vectors = [], []
    for line, row in _rows(path, lambda names: names[:1]):
        width = next(number for number in range(len(row) + 1) if str(number) not in row)
        numbers = [row.pop(str(number)) for number in range(width)]
        try:
            vectors.append(as_floats(numbers))
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error
        rows.append(row)
    return rows, np.array(vectors or np.zeros((0, 0)))


def _rows(
    path: Path, candidates: Callable[[Sequence[str]], Sequence[str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, values, _, problem in Reader(candidates=candidates).rows(str(path)):
        if not values:
            raise ValueError(f"line {line}: {problem}")
        yield line, dict(values)


def _parquet(path: Path, column: str | None) -> tuple[_Rows | None, _Array]:
    import_pyarrow("reading Parquet files")
    import pyarrow.parquet

    def read() -> Any:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()

    table = readable(path, read)
    names = table.column_names
    doubled = next((each for each in names if names.count(each) > 1), None)
    if doubled is not None:  # of which a row could hold one only
        raise ValueError(f"has the column {doubled!r} more than once")
    name = column or vector_column(table.schema, str(path))
    if name not in table.column_names:
        raise InputError(f"{path}: has no column {name!r}", "embedding_column")
    vectors = vectors_of(table, name, str(path))
    return table.drop_columns([name]).to_pylist(), vectors


_READERS: dict[str, Callable[[Path, str | None], tuple[_Rows | None, _Array]]] = {
    ".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".jsonl": _jsonl, ".csv": _csv,
    ".parquet": _parquet,
}  # fmt: skip

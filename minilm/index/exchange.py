"""An index as files of vectors, and an index from such files: what other tools read and write.

In: an `Index`, or what `minilm encode` wrote. Out: a file or a folder as `minilm encode` writes it,
or an `Index`. No text is embedded.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilm.disk import with_home
from minilm.errors import InputError
from minilm.files.arrow import import_pyarrow, with_vectors
from minilm.files.rows import column_of
from minilm.files.shards import ShardFolder, part_name, run_of
from minilm.files.sources import read_shards, survey
from minilm.files.stored import read_blocks, record_of
from minilm.files.streaming import FORMAT_VERSION
from minilm.files.tables import SUFFIXES, Table, check_rows, sidecars_of, write_table
from minilm.index import Index
from minilm.index.texts import text_of
from minilm.inputs import check_unicode
from minilm.outputs import check_output, check_room
from minilm.pretrained.fingerprint import Fingerprint
from minilm.version import __version__

__all__ = ["export_index", "index_of_vectors"]

_PART_ROWS = 4096


def export_index(
    index: Index, output: str | os.PathLike[str], *, embedding_column: str = "embedding"
) -> None:
    """Write the rows and vectors of an index, and its fingerprint.

    Args:
        index: The index.
        output: A file whose suffix says the form, as `minilm encode` has them: all rows are in
            memory then. Any other name is a folder of Parquet parts, and memory holds one of them;
            a row that has no text is null there under `index.column`. Called again after it was
            interrupted, it goes on.
        embedding_column: The name of the vectors in `.jsonl` and Parquet.

    Raises:
        InputError: The index is empty; the form can't hold its rows; the folder has something else
            in it; or a row's text has half a character, which Parquet can't hold.
        MissingPackageError: For a folder pyarrow is needed.
        OSError: It can't be written.
    """
    path = with_home(output)
    check_unicode([embedding_column], "embedding_column")
    if not len(index):
        raise InputError(f"{index.folder}: is empty; there is nothing to export", "index")
    if path.suffix in SUFFIXES and not path.is_dir():
        _export_file(index, path, embedding_column)
    else:
        _export_folder(index, path, embedding_column)


def _export_file(index: Index, path: Path, embedding_column: str) -> None:
    check_output(path, "output", sidecars_of(path))
    rows = [index.row(i) for i in range(len(index))]
    table = Table([text_of(row, index.column) for row in rows], rows)
    check_rows(table, path.suffix, embedding_column, index.dimension or 0)
    check_room(path, len(rows) * 4 * (index.dimension or 0))
    record = None if index.fingerprint is None else index.fingerprint.to_json()
    write_table(path, table, np.concatenate(index.vectors), record, embedding_column)


def _export_folder(index: Index, folder: Path, embedding_column: str) -> None:
    pyarrow = import_pyarrow("writing Parquet files")
    files, inputs = index.row_files
    try:
        layout = survey(files, index.column, "empty")
    except InputError as error:
        raise InputError(f"{error}; or write .jsonl, which holds any rows", "output") from error
    if embedding_column in layout.columns:
        raise InputError(
            f"the rows have {embedding_column!r} already; choose another name with "
            "--embedding-column",
            "embedding_column",
        )
    halves = [example for example in layout.examples if "lone surrogate" in example]
    if halves:
        raise InputError(f"{halves[0]}, which Parquet can't hold; write .jsonl", "output")
    record = None if index.fingerprint is None else index.fingerprint.to_dict()
    header = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "made_with": {"pyarrow": pyarrow.__version__},
        "fingerprint": record,
        "settings": {
            "column": index.column,
            "embedding_column": embedding_column,
            "precision": "float32",
            "shard_rows": _PART_ROWS,
        },
        "inputs": inputs,
        "form": layout.form,
        "column": layout.column,
        "columns": layout.columns,
        "characters": layout.characters,
        "rows": {"read": len(index), "bad": layout.bad, "written": len(index)},
        "bad_rows": layout.examples,
    }
    told = json.dumps(record, ensure_ascii=False) if record else None
    with ShardFolder(folder) as parts:
        known = run_of(header) | {"fingerprint": record} if parts.is_lost else header
        if parts.header is not None and parts.header != known:
            raise InputError(f"{folder}: holds another run; choose a new folder", "output")
        parts.begin(header)
        if parts.is_complete:
            return
        missing = len(index) - sum(part.rows for part in parts.done.values())
        check_room(folder, missing * 4 * (index.dimension or 0))
        for shard in read_shards(files, layout, _PART_ROWS, "empty"):
            if shard.number in parts.done:
                continue
            first = shard.number * _PART_ROWS
            vectors = np.stack([index.vector(first + row) for row in range(len(shard.texts))])
            parts.add(
                shard.number,
                part_name(shard.number, header),
                with_vectors(shard.table, embedding_column, vectors, told),
                unique=len(set(shard.texts)),
                tokens=0,  # none was read
            )
        parts.finish()


def index_of_vectors(
    folder: str | os.PathLike[str],
    vectors: str | os.PathLike[str],
    fingerprint: Fingerprint,
    *,
    table: Table | None = None,
    column: str | None = None,
    embedding_column: str | None = None,
    codes: Sequence[str] = (),
) -> Index:
    """Make an index of vectors that `minilm encode` wrote.

    Args:
        folder: The index's folder, new or empty.
        vectors: The file, or the folder of parts.
        fingerprint: The record of the model that will search, `encoder.fingerprint()`: that of the
            vectors must fit it, but for the prompt.
        table: Their rows, if the file has none (`.npy`), see `minilm.files.tables.read_table`.
        column: The name of the text in the rows; by default "text", or the only one.
        embedding_column: The name of the vectors, see `minilm.files.stored.read_vectors`.
        codes: As in `Index.create`.

    Raises:
        InputError: The vectors are of another model, codes, or have no rows; or as in
            `read_vectors` and `Index.create`. At most an empty folder is left.
        OSError: Something can't be read or written.
    """
    path = with_home(vectors)
    record = record_of(path)
    if record is not None and record.precision != "float32":
        raise InputError(
            f"{path}: holds {record.precision} codes; an index keeps float32 vectors, and makes "
            "its codes of them",
            "vectors",
        )
    blocks = read_blocks(path, fingerprint=fingerprint, embedding_column=embedding_column)
    found = _with_rows(path, blocks, table)
    first = next(found, None)
    if first is None:
        raise InputError(f"{path}: has no vectors", "vectors")
    known = list(first[1][0]) if first[1] else ["text"]
    name = column_of(known, column, str(path), "column")
    together = (each for group in ([first], found) for each in group)
    return Index.create(folder, record, together, column=name, codes=codes)


def _with_rows(
    path: Path, blocks: Iterator[tuple[Any, Any]], table: Table | None
) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Yield vectors and rows, those of the table where there is one."""
    start = 0
    for rows, vectors in blocks:
        if table is not None:
            rows = table.rows[start : start + len(vectors)]
        elif isinstance(rows, range):
            raise InputError(f"{path}: has no rows; name a file that has them", "vectors")
        start += len(vectors)
        if len(rows) == len(vectors):
            yield vectors, rows
    if table is not None and len(table.rows) != start:
        raise InputError(
            f"{path}: holds {start:,} vectors, the files {len(table.rows):,} rows", "table"
        )

"""Files of any size as rows, read one after the other: what `streaming.py` embeds.

In: .jsonl, .csv, .parquet files or plain text, folders, glob patterns. Out: a `Layout`, which says
what columns there are and what was wrong with which rows; then `Shard`s of a fixed number of rows,
each with its texts, and all columns as an Arrow table. Next: `streaming.py`.

The files are read twice: once before anything is computed, so that a broken line, or a key that is
a number in one line and a word in another, is known in seconds and not after a night; and once for
the vectors. Memory holds some rows at a time, never a file.
"""

import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from minilm.disk import with_home
from minilm.errors import BadRowError, InputError, errors_of_libraries
from minilm.files.arrow import import_pyarrow, text_column
from minilm.files.rows import DEFAULT_COLUMN, FORMS, Reader, Row, input_form
from minilm.files.shards import manifest_path

__all__ = [
    "ON_BAD_ROW", "Layout", "Shard", "find_files", "read_shards", "readable", "survey",
]  # fmt: skip

# What to do about a row whose text can't be embedded.
ON_BAD_ROW = ("error", "skip", "empty")

_AT_ONCE = 1024  # rows made into columns at a time
_MOST_COLUMNS = 1000
_REPORTED = 5  # bad rows that are listed
_NOT_TWICE = "is not a file that can be read twice; write it to one, or leave -o FOLDER out"
_EXACT = 2**53  # whole numbers up to here are exact as float64


@dataclass
class Layout:
    """What a first reading found.

    Attributes:
        form: "jsonl", "csv", "parquet" or "text": the form of all files.
        column: The column that has the texts.
        columns: The type of each column, by name, as Arrow writes it; "json" is a string that holds
            JSON.
        rows: How many rows each file has.
        characters: How many characters all texts have.
        bad: How many rows have no text that can be embedded.
        examples: What is wrong with the first few of those.
    """

    form: str
    column: str
    columns: dict[str, str]
    rows: list[int] = field(default_factory=list)
    characters: int = 0
    bad: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Shard:
    """The rows of one output file.

    Attributes:
        number: The number of the file, from 0.
        texts: n texts; "" where there is none that can be embedded.
        table: All columns, as a `pyarrow.Table` of n rows.
        places: The number of each row's input file, and of its line or row in it.
    """

    number: int
    texts: list[str]
    table: Any
    places: list[tuple[int, int]]


def find_files(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], output: Path | None = None
) -> list[Path]:
    """Find the files that are meant, in a fixed order.

    Args:
        inputs: Files, folders and glob patterns (`**` reaches into folders). A folder is searched
            for .jsonl, .csv, .parquet and .txt files, in the folders within too; names that begin
            with . or _ are ignored. What a folder or a pattern gives is sorted by name.
        output: A folder in which patterns match nothing, nor its manifest beside it.

    Raises:
        InputError: Nothing is there, the files are not of one form, or one is named twice.
        FileNotFoundError: There is no such file.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if not given:
        raise InputError("inputs is empty; name a file, a folder or a pattern", "inputs")
    found: list[Path] = []
    for each in given:
        name = os.fspath(each)
        if name == "-":
            raise InputError(f"standard input: {_NOT_TWICE}", "inputs")
        path = with_home(name)
        if path.is_dir():
            files = _in_folder(path)
            if not files:
                raise InputError(f"{name}: has no file of {', '.join(FORMS)} in it", "inputs")
        elif not path.exists() and glob.has_magic(name):
            # Path.glob takes no absolute patterns.
            files = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
            files = [match for match in files if match.is_file()]
            if output is not None:
                there = output.resolve()
                files = [
                    match
                    for match in files
                    if not match.resolve().is_relative_to(there)
                    and match.resolve() != manifest_path(output)
                ]
            if not files:
                raise InputError(f"{name}: no file matches", "inputs")
        else:
            path.stat()  # raises an error if it isn't there
            if not path.is_file():
                raise InputError(f"{name}: {_NOT_TWICE}", "inputs")
            files = [path]
        found += files
    times = Counter(path.resolve() for path in found)
    for path in found:
        if times[path.resolve()] > 1:
            raise InputError(f"{path}: is named twice; its rows would be in twice", "inputs")
    forms = {input_form(str(path)): path for path in reversed(found)}
    if len(forms) > 1:
        some = " and ".join(str(path) for path in list(forms.values())[:2])
        raise InputError(f"{some} are not of one form; encode each into a folder", "inputs")
    return found


def _in_folder(folder: Path) -> list[Path]:
    found = []

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if name[0] not in "._"]
        paths = [Path(place, name) for name in names if name[0] not in "._"]
        found += [path for path in paths if path.suffix.lower() in FORMS]
    return sorted(found)


# --- the first reading


def survey(
    files: Sequence[Path],
    column: str | None = None,
    on_bad_row: str = "error",
    progress: Callable[[int], object] = lambda rows: None,
) -> Layout:
    """Read all files once, and say what is in them.

    Args:
        files: From `find_files`.
        column: The name of the texts; by default "text", or the only one.
        on_bad_row: "error" stops at the first bad row.
        progress: Called with 1 for each row.

    Raises:
        BadRowError: A row is bad, with `on_bad_row="error"`.
        InputError: A file is broken, lacks the column, or has other columns than the first.
        OSError: A file can't be read.
    """
    form = input_form(str(files[0]))
    if form == "parquet":
        return _survey_parquet(files, column, on_bad_row, progress)
    layout = Layout(form, "", {})
    reader = Reader(column, is_unicode=True)  # Parquet holds no other strings
    kinds: dict[str, set[str]] = {}
    found = form != "jsonl"
    for file in files:
        layout.rows.append(0)
        for line, row, text, problem in reader.rows(str(file)):
            layout.rows[-1] += 1
            progress(1)
            found |= (reader.column or DEFAULT_COLUMN) in row
            _note(layout, file, f"line {line}", text, problem, on_bad_row)
            for name, value in row.items():
                if name not in kinds:
                    kinds[name] = set()
                    if len(kinds) > _MOST_COLUMNS:
                        raise InputError(
                            f"{file}: line {line}: makes more than {_MOST_COLUMNS:,} different "
                            "keys; each would be a column",
                            "inputs",
                        )
                if form == "jsonl":
                    kinds[name].add(_kind(value))
    layout.column = reader.column or DEFAULT_COLUMN
    if not column and layout.column != DEFAULT_COLUMN and DEFAULT_COLUMN in kinds:
        raise InputError(
            f"{files[0]}: has plain strings, and objects that have only {layout.column!r}; choose "
            "with --column",
            "column",
        )
    if any(layout.rows) and not found:
        if not kinds:
            raise InputError(f"{files[0]}: no line is a JSON object or a string", "inputs")
        known = ", ".join(map(repr, list(kinds)[:20]))
        raise InputError(
            f"{files[0]}: no row has {layout.column!r}; choose with --column, of {known}", "column"
        )
    if form == "csv":
        layout.columns = dict.fromkeys(reader.heading or (), "string")
    else:
        layout.columns = {name: _column_type(seen) for name, seen in kinds.items()}
        layout.columns[layout.column] = "string"
    return layout


def _note(
    layout: Layout, file: Path, place: str, text: str | None, problem: str | None, on_bad_row: str
) -> None:
    """Count a row, good or bad, or raise an error for a bad one."""
    layout.characters += len(text or "")
    if problem is None:
        return
    message = f"{file}: {place}: {problem}"
    if on_bad_row == "error":
        raise BadRowError(f"{message}; choose what to do with --on-bad-row skip or empty", file)
    layout.bad += 1
    if len(layout.examples) < _REPORTED:
        layout.examples.append(message)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if abs(value) <= _EXACT:
            return "int"
        return "long" if -(2**63) <= value < 2**63 else "json"
    return {float: "double", str: "string"}.get(type(value), "json")


def _column_type(kinds: set[str]) -> str:
    """The Arrow type that holds all values of these kinds; "json" if none does."""
    kinds = kinds - {"null"}
    if kinds <= {"string"}:
        return "string"
    if kinds == {"bool"}:
        return "bool"
    if kinds <= {"int", "long"}:
        return "int64"
    return "double" if kinds <= {"int", "double"} else "json"


def _survey_parquet(
    files: Sequence[Path],
    column: str | None,
    on_bad_row: str,
    progress: Callable[[int], object],
) -> Layout:
    first = _schema(files[0])
    name = text_column(first, column, str(files[0]))
    layout = Layout("parquet", name, {each.name: str(each.type) for each in first})
    for file in files:
        schema = _schema(file)
        doubled = [each for each, times in Counter(schema.names).items() if times > 1]
        if doubled:
            raise InputError(f"{file}: has more than one column {doubled[0]!r}", "inputs")
        columns = {each.name: str(each.type) for each in schema}
        if columns != layout.columns:
            differing = min(each for each, _ in columns.items() ^ layout.columns.items())
            raise InputError(
                f"{file}: its columns differ from those of {files[0]}, first in {differing!r}: "
                f"{columns.get(differing, 'none')}, {layout.columns.get(differing, 'none')}",
                "inputs",
            )
        layout.rows.append(0)
        for batch in _batches(file, [name]):
            for text in _strings(file, batch.column(0)):
                problem = f"{name} is null" if text is None else None
                _note(layout, file, f"row {layout.rows[-1]}", text, problem, on_bad_row)
                layout.rows[-1] += 1
                progress(1)
    return layout


# --- the second reading


def read_shards(
    files: Sequence[Path],
    layout: Layout,
    shard_rows: int,
    on_bad_row: str = "error",
) -> Iterator[Shard]:
    """Read all files, in shards of `shard_rows` rows; the last has the rest, or no row at all.

    Args:
        files: From `find_files`.
        layout: From `survey`.
        shard_rows: Rows of a shard.
        on_bad_row: "skip" leaves bad rows out, "empty" keeps them with the text "".

    Raises:
        InputError, OSError: As in `survey`, if a file has changed since.
    """
    pyarrow = import_pyarrow("writing Parquet files")
    schema = _kept_schema(files, layout)
    tables: list[Any] = []
    texts: list[str] = []
    places: list[tuple[int, int]] = []
    number = 0
    for source, file in enumerate(files):
        for table, found, lines in _pieces(file, layout, schema):
            bad = [i for i, text in enumerate(found) if text is None]
            if bad and on_bad_row == "error":
                raise BadRowError(f"{file}: changed while it was read", file)
            kept = list(range(len(found)))
            if bad and on_bad_row == "skip":
                kept = [i for i in kept if found[i] is not None]
                table = table.filter(pyarrow.array([text is not None for text in found]))
            tables.append(table)
            texts += [found[i] or "" for i in kept]
            places += [(source, lines[i]) for i in kept]
            while len(texts) >= shard_rows:
                whole = pyarrow.concat_tables(tables)
                yield Shard(
                    number, texts[:shard_rows], whole.slice(0, shard_rows), places[:shard_rows]
                )
                number += 1
                tables = [whole.slice(shard_rows)]
                texts, places = texts[shard_rows:], places[shard_rows:]
    if texts or not number:
        tables = tables or [schema.empty_table()]
        yield Shard(number, texts, pyarrow.concat_tables(tables), places)


def _pieces(
    file: Path, layout: Layout, schema: Any
) -> Iterator[tuple[Any, list[str | None], list[int]]]:
    """Yield the columns, the texts and the line numbers of some rows at a time."""
    pyarrow = import_pyarrow("reading Parquet files")
    if layout.form == "parquet":
        row = 0
        for batch in _batches(file, None):
            found = _strings(file, batch.column(layout.column))
            # By name: another file may have them in another order.
            arrays = [batch.column(each) for each in schema.names]
            table = pyarrow.Table.from_arrays(arrays, schema=schema)
            yield table, found, list(range(row, row + len(found)))
            row += len(found)
        return
    rows = Reader(layout.column, is_unicode=True).rows(str(file))
    while records := list(islice(rows, _AT_ONCE)):
        yield _piece(records, layout, schema)


def _piece(
    records: list[Row], layout: Layout, schema: Any
) -> tuple[Any, list[str | None], list[int]]:
    pyarrow = import_pyarrow("writing Parquet files")
    texts = [text for _, _, text, _ in records]
    arrays = []
    for name, kind in layout.columns.items():
        values = [row.get(name) for _, row, _, _ in records]
        if name == layout.column:
            values = texts  # null where there is no text
        elif kind == "json":
            values = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
        try:
            arrays.append(pyarrow.array(values, type=schema.field(name).type))
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(
                f"line {records[0][0]} and on: {name!r} is not what it was at the first reading; "
                f"was a file changed? ({error})",
                "inputs",
            ) from error
    table = pyarrow.Table.from_arrays(arrays, schema=schema)
    return table, texts, [line for line, _, _, _ in records]


def _kept_schema(files: Sequence[Path], layout: Layout) -> Any:
    pyarrow = import_pyarrow("writing Parquet files")
    if layout.form == "parquet":
        # Without the file's other metadata, which describe its own index and rows.
        return pyarrow.schema([each.with_nullable(True) for each in _schema(files[0])])
    types = {
        "string": pyarrow.string(),
        "json": pyarrow.string(),
        "bool": pyarrow.bool_(),
        "int64": pyarrow.int64(),
        "double": pyarrow.float64(),
    }
    return pyarrow.schema([(name, types[kind]) for name, kind in layout.columns.items()])


# --- one Parquet file


def _schema(file: Path) -> Any:
    import_pyarrow("reading Parquet files")
    import pyarrow.parquet

    return readable(file, lambda: pyarrow.parquet.read_schema(file))


def _batches(file: Path, columns: list[str] | None) -> Iterable[Any]:
    import pyarrow.parquet

    with readable(file, lambda: pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20)) as opened:
        batches = opened.iter_batches(_AT_ONCE, columns=columns)
        while (batch := readable(file, lambda: next(batches, None))) is not None:
            yield batch


def _strings(file: Path, column: Any) -> list[str | None]:
    found: list[str | None] = readable(file, column.to_pylist)
    return found


def readable(file: Path, read: Callable[[], Any]) -> Any:
    """Call `read`, and name the file in errors of Arrow, which don't."""
    with errors_of_libraries(
        lambda why: InputError(f"{file}: can't be read as Parquet: {why}", "inputs")
    ):
        return read()

"""Files of texts, and of texts with their vectors: what the command line reads and writes.

In: .txt, .jsonl or .csv files, or standard input. Out: `Table`, the texts and all that stood beside
them, and files that hold those and the vectors. Next: `cli.py`.

torch is not imported, and NumPy only when vectors are written, so that `--help` answers at once.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minilm.errors import InputError
from minilm.outputs import is_stream, write_output

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "DEFAULT_COLUMN",
    "METADATA_KEY",
    "NPZ_KEY",
    "ROW_SUFFIXES",
    "SUFFIXES",
    "VECTOR_FIELDS",
    "Table",
    "check_rows",
    "column_of",
    "csv_rows",
    "form_of",
    "is_utf8",
    "read_lines",
    "read_table",
    "sidecar_path",
    "sidecars_of",
    "write_jsonl",
    "write_rows",
    "write_table",
]

# The forms that vectors are written in.
SUFFIXES = (".npy", ".npz", ".safetensors", ".jsonl", ".csv")

# The forms that rows without vectors are written in.
ROW_SUFFIXES = (".jsonl", ".csv", ".txt")

# Where the fingerprint of the model stands in a file that has a place for it.
NPZ_KEY = "fingerprint_json"  # an array of uint8: the bytes of the JSON
METADATA_KEY = "minilm.fingerprint"  # in the header of safetensors files

DEFAULT_COLUMN = "text"
_LONGEST_FIELD = 2**27  # characters of a field of a .csv file

# What a column of vectors may be called.
VECTOR_FIELDS = ("embedding", "embeddings", "vector", "vectors")


@dataclass
class Table:
    """Rows with a text in each.

    Attributes:
        texts: n texts.
        rows: All that each row holds, the text too, by name.
    """

    texts: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, text: str, row: dict[str, Any]) -> None:
        self.texts.append(text)
        self.rows.append(row)

    @property
    def has_more(self) -> bool:
        """Whether the rows hold more than a text under its usual name."""
        return any(row.keys() != {DEFAULT_COLUMN} for row in self.rows)


def read_lines(name: str) -> Iterator[str]:
    """The lines of a file, blank ones too, so that row n of the result is line n.

    Args:
        name: A file of UTF-8 text, or - for standard input.

    Raises:
        InputError: A line is not UTF-8; the message names the file and the line.
        OSError: The file can't be read.
    """
    for line in _whole_lines(name):
        yield line.removesuffix("\n").removesuffix("\r")


def _whole_lines(name: str) -> Iterator[str]:
    """The same with their ends."""
    if name == "-":
        yield from _decoded(sys.stdin.buffer, "standard input")
    else:
        with Path(name).open("rb") as file:
            yield from _decoded(file, name)


def _decoded(file: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}: line {number} is not UTF-8 ({error.reason}); convert the file", name
            ) from error
        yield text


def read_table(names: Sequence[str], column: str | None = None) -> Table:
    """Read texts from files, with all that stands beside them.

    Args:
        names: Paths, or - for standard input. The suffix says what a file is: .jsonl, an object or
            a string a line; .csv, a heading and rows; anything else, a text a line.
        column: The name of the text in .jsonl and .csv; by default "text", or the only one.

    Raises:
        InputError: A file is broken or has no such column; the message names the file and the line.
        OSError: A file can't be read.
    """
    table = Table()
    for name in names:
        kind = Path(name).suffix.lower()
        if kind == ".parquet":
            raise InputError(
                f"{name}: Parquet is read into a folder of Parquet files only: -o FOLDER", name
            )
        read = {".jsonl": _read_jsonl, ".csv": _read_csv}.get(kind, _read_plain)
        read(name, column, table)
    return table


def _read_plain(name: str, column: str | None, table: Table) -> None:
    for line in read_lines(name):
        table.add(line, {DEFAULT_COLUMN: line})


def _read_jsonl(name: str, column: str | None, table: Table) -> None:
    first: tuple[str, int] | None = None
    for number, line in enumerate(read_lines(name), 1):
        if not line.strip():
            continue
        place = f"{name}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place} is not JSON: {error}", name) from error
        if isinstance(row, str):
            table.add(row, {column or DEFAULT_COLUMN: row})
            continue
        if not isinstance(row, dict):
            raise InputError(f"{place} is no object and no string", name)
        key = column_of(list(row), column, place, name)
        first = first or (key, number)
        if key != first[0]:
            raise InputError(
                f"{place}: the text would be {key!r}, that of line {first[1]} {first[0]!r}; choose "
                "with --column",
                name,
            )
        if not isinstance(row[key], str):
            raise InputError(f"{place}: {key} is {json.dumps(row[key])[:40]}, not a string", name)
        table.add(row[key], row)


def _read_csv(name: str, column: str | None, table: Table) -> None:
    rows = csv_rows(name, column)
    _, heading = next(rows)
    key = column_of(heading, column, name, name)
    for line, row in rows:
        if len(row) != len(heading):
            raise InputError(
                f"{name}: line {line} has {len(row)} fields, the first line {len(heading)}", name
            )
        of_row = dict(zip(heading, row, strict=True))
        table.add(of_row[key], of_row)


def csv_rows(name: str, column: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """The rows of a .csv file, each with the line that it ends in; the first is the heading.

    Args:
        name: The file, or -.
        column: The name of the text, if one was given.

    Raises:
        InputError: The file has no heading, two columns of a name, no commas, or is broken.
    """
    # A text can be longer than the 131,072 characters that the module allows at first.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    reader = csv.reader(_whole_lines(name), strict=True)
    before = 0
    try:
        heading = next(reader, None)
        if heading is None:
            raise InputError(f"{name}: is empty; the first line names the columns", name)
        doubled = sorted({each for each in heading if heading.count(each) > 1})
        if doubled:
            raise InputError(f"{name}: has more than one column {doubled[0]!r}", name)
        if len(heading) == 1 and heading[0] != column:
            for mark in (";", "\t", "|"):
                if mark in heading[0]:
                    raise InputError(
                        f"{name}: has one column, {heading[0][:40]!r}; separate columns by commas, "
                        f"not by {mark!r}, or name that column with --column",
                        name,
                    )
        before = reader.line_num
        yield before, heading
        for row in reader:
            before = reader.line_num
            if row:
                yield before, row
    except csv.Error as error:
        raise InputError(
            f"{name}: the row that begins in line {before + 1}: {error}", name
        ) from error


def column_of(columns: list[str], wanted: str | None, place: str, name: str) -> str:
    """The column that holds the texts: the one wanted, else "text", else the only one.

    Raises:
        InputError: There is none; `place` is what to call the columns' home, `name` the file.
    """
    if wanted is None and DEFAULT_COLUMN not in columns and len(columns) == 1:
        return columns[0]
    key = wanted or DEFAULT_COLUMN
    if key not in columns:
        known = ", ".join(map(repr, columns)) or "none"
        raise InputError(f"{place}: has no {key!r}; choose with --column, of {known}", name)
    return key


def write_table(
    output: Path,
    table: Table,
    embeddings: "np.ndarray[Any, Any]",
    fingerprint: str | None = None,
    column: str = "embedding",
) -> None:
    """Write rows and their vectors, in the form that the suffix says, all or nothing.

    `.npy`: the vectors alone. `.npz`: `embeddings`, `texts_json`, and `rows_json` if the rows hold
    more than texts. `.safetensors`: the tensor `embeddings`, and the same as metadata. `.jsonl`:
    the rows as they were, with the vector under `column`. `.csv`: the rows' columns, then the
    numbers.

    Args:
        output: The file; or a stream, see `minilm.outputs.is_stream`, beside which nothing is
            written.
        table: n rows.
        embeddings: `[n, d]`.
        fingerprint: Which model made them, as JSON: in `.npz` under `fingerprint_json`, in
            `.safetensors` under `minilm.fingerprint`, beside other files in
            `NAME.fingerprint.json`.
        column: The name of the vector.

    Raises:
        InputError: The rows have something else of that name.
        OSError: The file can't be written; what was there before still is.
    """
    suffix = form_of(output)
    if suffix in (".jsonl", ".csv"):
        _check_free(table, column, embeddings.shape[1] if suffix == ".csv" else 0)

    def write(file: IO[bytes]) -> None:
        import numpy as np

        if suffix == ".npy":
            np.save(file, embeddings)
        elif suffix == ".npz":
            # As JSON in bytes: NumPy's strings would all take the room of the longest.
            more: dict[str, Any] = {"texts_json": _json_bytes(table.texts)}
            if table.has_more:
                more["rows_json"] = _json_bytes(table.rows)
            if fingerprint is not None:
                more[NPZ_KEY] = np.frombuffer(fingerprint.encode(), dtype=np.uint8)
            np.savez(file, embeddings=embeddings, **more)
        elif suffix == ".safetensors":
            import safetensors.numpy

            metadata = {"texts_json": json.dumps(table.texts)}
            if table.has_more:
                metadata["rows_json"] = json.dumps(table.rows)
            if fingerprint is not None:
                metadata[METADATA_KEY] = fingerprint
            file.write(safetensors.numpy.save({"embeddings": embeddings}, metadata))
        else:
            text_file = io.TextIOWrapper(file, encoding="utf-8", newline="")
            write_text = write_jsonl if suffix == ".jsonl" else _write_csv
            write_text(text_file, table, embeddings, column)
            text_file.detach()  # flushed, and left open

    beside = {}
    if fingerprint is not None:
        beside = dict.fromkeys(sidecars_of(output), fingerprint.encode() + b"\n")
    write_output(output, write, beside)


def form_of(output: Path) -> str:
    """The form that a file is written in: its suffix. A stream without one gets .jsonl."""
    return ".jsonl" if not output.suffix and is_stream(output) else output.suffix


def sidecars_of(output: Path) -> list[Path]:
    """What `write_table` writes beside a file that has no place for a fingerprint."""
    return [] if output.suffix in (".npz", ".safetensors") else [sidecar_path(output)]


def sidecar_path(path: str | Path) -> Path:
    """The file that holds the record of one that has no place for it: `x.npy.fingerprint.json`."""
    path = Path(path)
    return path.with_name(f"{path.name}.fingerprint.json")


def _check_free(table: Table, column: str, width: int) -> None:
    taken = set(map(str, range(width))) if width else {column}
    for row in table.rows:
        found = taken & row.keys()
        if found:
            name = sorted(found)[0]
            raise InputError(
                f"the rows have {name!r} already; choose another name with --embedding-column, or "
                "write .npz",
                "--embedding-column",
            )


def _json_bytes(value: Any) -> Any:
    import numpy as np

    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def write_jsonl(
    file: IO[str], table: Table, embeddings: "np.ndarray[Any, Any]", column: str = "embedding"
) -> None:
    """The rows as they were, each with its vector, an object a line."""
    for row, embedding in zip(table.rows, embeddings, strict=True):
        line = row | {column: _numbers(embedding)}
        file.write(json.dumps(line, ensure_ascii=not is_utf8(file)) + "\n")


def write_rows(output: Path, table: Table) -> None:
    """Write rows as they were, without vectors, in the form that the suffix says, all or nothing.

    `.jsonl`: an object a line. `.csv`: the rows' columns. `.txt`: the texts, one a line.

    Args:
        output: The file.
        table: n rows.

    Raises:
        InputError: There is no such form; or a text has a line break, which `.txt` can't hold.
        OSError: The file can't be written; what was there before still is.
    """
    check_rows(output, table)
    suffix = form_of(output)

    def write(file: IO[bytes]) -> None:
        text_file = io.TextIOWrapper(file, encoding="utf-8", newline="")
        if suffix == ".jsonl":
            text_file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.rows)
        elif suffix == ".csv":
            names = _columns(table)
            writer = csv.writer(text_file)
            writer.writerow(names)
            writer.writerows([_field(row.get(name, "")) for name in names] for row in table.rows)
        else:
            text_file.writelines(text + "\n" for text in table.texts)
        text_file.detach()  # flushed, and left open

    write_output(output, write)


def check_rows(output: Path, table: Table) -> None:
    """Find out whether `write_rows` has a form for these rows. Errors as there."""
    suffix = form_of(output)
    if suffix not in ROW_SUFFIXES:
        raise InputError(f"{output}: has no suffix of {', '.join(ROW_SUFFIXES)}", str(output))
    if suffix == ".txt":
        for row, text in enumerate(table.texts):
            if "\n" in text or text.endswith("\r"):
                raise InputError(
                    f"{output}: the text of row {row} has a line break; write .jsonl", str(output)
                )


def _columns(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows for name in row)) or [DEFAULT_COLUMN]


def _write_csv(
    file: IO[str], table: Table, embeddings: "np.ndarray[Any, Any]", column: str
) -> None:
    names = _columns(table)
    writer = csv.writer(file)
    writer.writerow([*names, *range(embeddings.shape[1])])
    for row, embedding in zip(table.rows, embeddings, strict=True):
        writer.writerow([*(_field(row.get(name, "")) for name in names), *_numbers(embedding)])


def _field(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def is_utf8(file: IO[str]) -> bool:
    """Whether a text file can hold any character."""
    return (getattr(file, "encoding", None) or "").lower().replace("-", "") == "utf8"


def _numbers(embedding: "np.ndarray[Any, Any]") -> list[float] | list[int]:
    """The shortest decimals that read back as the same numbers of the array's dtype."""
    if embedding.dtype.kind in "iu":
        whole: list[int] = embedding.tolist()
        return whole
    return [float(str(number)) for number in embedding]

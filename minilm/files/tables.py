"""Files of texts, and of texts with their vectors: what the command line reads and writes.

In: the rows of files, see `rows.py`. Out: `Table`, all texts and the rows that they are in, and
files that hold those and the vectors. Next: `cli/parser.py`.

torch is not imported, and NumPy only when vectors are written, so that `--help` answers at once.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minilm.disk import with_metadata
from minilm.errors import InputError
from minilm.files.rows import DEFAULT_COLUMN, Reader, as_json, lone_surrogate
from minilm.outputs import is_stream, write_output

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "METADATA_KEY", "NPZ_KEY", "ROW_SUFFIXES", "SUFFIXES", "VECTOR_FIELDS", "Table", "check_rows",
    "form_of", "is_utf8", "read_table", "reading_line", "sidecar_path", "sidecars_of",
    "write_jsonl", "write_rows", "write_table",
]  # fmt: skip

# The forms of files with vectors, and of files with rows only.
SUFFIXES = (".npy", ".npz", ".safetensors", ".jsonl", ".csv")
ROW_SUFFIXES = (".jsonl", ".csv", ".txt")

# Where the fingerprint of the model is in a file that has a place for it.
NPZ_KEY = "fingerprint_json"  # an array of uint8: the bytes of the JSON
METADATA_KEY = "minilm.fingerprint"  # in the header of safetensors files

# The most that readers of safetensors take, less some room for what isn't metadata.
_LARGEST_HEADER = 100_000_000 - 1_000

# Names that a column of vectors may have.
VECTOR_FIELDS = ("embedding", "embeddings", "vector", "vectors")


@dataclass
class Table:
    """Rows with a text in each.

    Attributes:
        texts: n texts.
        rows: n rows: all their values by name, the text among them.
    """

    texts: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, text: str, row: dict[str, Any]) -> None:
        self.texts.append(text)
        self.rows.append(row)

    @property
    def has_more(self) -> bool:
        """Whether the rows hold more than texts under their usual name."""
        return any(row.keys() != {DEFAULT_COLUMN} for row in self.rows)


def read_table(names: Sequence[str], column: str | None = None) -> Table:
    """Read texts from files, with all that their rows hold.

    Args:
        names: Paths, or - for standard input. The suffix says what a file is, see `rows.py`:
            .jsonl or .ndjson, an object or a string a line; .csv, a heading and rows; .txt or none,
            a text a line.
        column: The name of the text; by default "text", or in .jsonl and .csv the only one.

    Raises:
        InputError: A file is broken or of another form, or a row has no text of that name; the
            message names the file and the line.
        OSError: A file can't be read.
    """
    if list(names).count("-") > 1:
        raise InputError("standard input can be read only once; name - once", "-")
    table = Table()
    for name in names:
        for _, text, row in Reader(column).good_rows(name):
            table.add(text, row)
    return table


def check_rows(table: Table, suffix: str, column: str | None = None, width: int = 0) -> None:
    """Check that a form can hold rows, and what is added to them, before anything is computed.

    Args:
        table: n rows.
        suffix: Of the form.
        column: The name under which .jsonl adds a vector.
        width: How many columns .csv adds, which are called 0, 1, 2, ...

    Raises:
        InputError: The rows have something of such a name already; or there is a text or a value
            that the form can't hold. The message names the row, from 0.
    """
    check = {".safetensors": _header_problem, ".csv": _csv_problem, ".txt": _txt_problem}.get(
        suffix
    )
    problem = check(table, width) if check else None
    if suffix == ".jsonl" and any(column in row for row in table.rows):
        problem = (
            f"the rows have {column!r} already; choose another name with --embedding-column, or "
            "write .npz"
        )
    if problem is not None:
        raise InputError(problem, "table")


def _header_problem(table: Table, width: int) -> str | None:
    size = len(json.dumps(_metadata(table), ensure_ascii=False).encode())
    if size <= _LARGEST_HEADER:
        return None
    room = f"{_LARGEST_HEADER:,} bytes of texts"
    return f".safetensors has room for {room}, and these take {size:,}; write .npz"


def _csv_problem(table: Table, width: int) -> str | None:
    for number, row in enumerate(table.rows):
        taken = next((name for name in map(str, range(width)) if name in row), None)
        if taken is not None:
            return (
                f"the rows have {taken!r} already, which is what .csv calls a number of the "
                "vector; write .jsonl or .npz"
            )
        for name, value in row.items():
            half = lone_surrogate([name, value])
            if half:
                found = f"row {number} has a lone surrogate, {half!r}, in {name!r}"
                return f"{found}, which .csv can't hold; write .jsonl"
    return None


def _txt_problem(table: Table, width: int) -> str | None:
    for number, text in enumerate(table.texts):
        bad = "line break" if "\n" in text or text.endswith("\r") else "NUL"
        if bad == "line break" or "\0" in text:
            return f"the text of row {number} has a {bad}, which .txt can't hold; write .jsonl"
    return None


def write_table(
    output: Path,
    table: Table,
    embeddings: "np.ndarray[Any, Any]",
    fingerprint: str | None = None,
    column: str = "embedding",
) -> None:
    """Write rows and their vectors, in the form of the suffix, all or nothing.

    `.npy`: the vectors alone. `.npz`: `embeddings`, `texts_json`, and `rows_json` if the rows hold
    more than texts. `.safetensors`: the tensor `embeddings`, and as metadata `texts_json` and
    `rows_json`, the rows without their texts, whose name is `text_column`. `.jsonl`: the rows as
    they were, with the vector under `column`. `.csv`: the rows' columns, then the numbers.

    Args:
        output: The file; or a stream (see `minilm.outputs.is_stream`), without a second file.
        table: n rows.
        embeddings: `[n, d]`.
        fingerprint: Which model made them, as JSON: in `.npz` under `fingerprint_json`, in
            `.safetensors` under `minilm.fingerprint`, beside other files in
            `NAME.fingerprint.json`.
        column: The name of the vector.

    Raises:
        InputError: As in `check_rows`.
        OSError: The file can't be written; what was there before still is.
    """
    suffix = form_of(output)
    check_rows(table, suffix, column, embeddings.shape[1])

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

            metadata = _metadata(table)
            if fingerprint is not None:
                metadata[METADATA_KEY] = fingerprint
            data = safetensors.numpy.save({"embeddings": embeddings})
            file.write(with_metadata(data, metadata))
        elif suffix == ".jsonl":
            _write_text(file, lambda text: write_jsonl(text, table, embeddings, column))
        else:
            _write_text(file, lambda text: _write_csv(text, table, embeddings))

    record = None if fingerprint is None else f"{fingerprint}\n".encode()
    write_output(output, write, dict.fromkeys(sidecars_of(output), record))


def _write_text(file: IO[bytes], write: Callable[[IO[str]], object]) -> None:
    text_file = io.TextIOWrapper(file, encoding="utf-8", newline="")
    write(text_file)
    text_file.detach()  # flushed, and left open


def form_of(output: Path) -> str:
    """The form that a file is written in: its suffix; .jsonl for a stream without one."""
    return ".jsonl" if not output.suffix and is_stream(output) else output.suffix


def reading_line(output: Path) -> str:
    """The line of Python that reads what `write_table` or `encode_files` wrote."""
    name = str(output)
    lines = {
        ".npy": f"numpy.load({name!r})",
        ".npz": f"numpy.load({name!r})['embeddings']",
        ".safetensors": f"safetensors.numpy.load_file({name!r})['embeddings']",
        ".jsonl": f"polars.read_ndjson({name!r})",
        ".csv": f"polars.read_csv({name!r})",
    }
    folder = f"polars.read_parquet({name + '/'!r})"
    return folder if output.is_dir() else lines[output.suffix]


def sidecars_of(output: Path) -> list[Path]:
    """The files that `write_table` writes beside one that has no place for a fingerprint."""
    return [] if output.suffix in (".npz", ".safetensors") else [sidecar_path(output)]


def sidecar_path(path: str | Path) -> Path:
    """The file beside another that holds its fingerprint: `x.npy.fingerprint.json`."""
    path = Path(path)
    return path.with_name(f"{path.name}.fingerprint.json")


def _metadata(table: Table) -> dict[str, str]:
    """Texts and rows as metadata of a .safetensors file, where there is little room: each text is
    in it once, if all rows have theirs under one name.
    """
    metadata = {"texts_json": as_json(table.texts)}
    if table.has_more:
        pairs = list(zip(table.rows, table.texts, strict=True))
        names = list(table.rows[0])
        column = next((n for n in names if all(row.get(n) == text for row, text in pairs)), None)
        rows = [{name: row[name] for name in row if name != column} for row in table.rows]
        metadata["rows_json"] = as_json(rows)
        if column is not None:
            metadata["text_column"] = column
    return metadata


def _json_bytes(value: Any) -> Any:
    import numpy as np

    return np.frombuffer(as_json(value).encode(), dtype=np.uint8)


def write_jsonl(
    file: IO[str], table: Table, embeddings: "np.ndarray[Any, Any]", column: str = "embedding"
) -> None:
    """Write the rows as they were, each with its vector, an object a line."""
    for row, embedding in zip(table.rows, embeddings, strict=True):
        line = row | {column: _numbers(embedding)}
        file.write(as_json(line, is_ascii=not is_utf8(file)) + "\n")


def write_rows(output: Path, table: Table) -> None:
    """Write rows without vectors, in the form of the suffix, all or nothing.

    `.jsonl`: an object a line. `.csv`: the rows' columns. `.txt`: the texts, one a line.

    Args:
        output: The file.
        table: n rows.

    Raises:
        InputError: There is no such form, or as in `check_rows`.
        OSError: The file can't be written; what was there before still is.
    """
    suffix = form_of(output)
    if suffix not in ROW_SUFFIXES:
        raise InputError(f"{output}: has no suffix of {', '.join(ROW_SUFFIXES)}", str(output))
    check_rows(table, suffix)

    def write(file: IO[str]) -> None:
        if suffix == ".csv":
            _write_csv(file, table)
        elif suffix == ".jsonl":
            file.writelines(as_json(row) + "\n" for row in table.rows)
        else:
            file.writelines(text + "\n" for text in table.texts)

    write_output(output, lambda file: _write_text(file, write))


def _write_csv(
    file: IO[str], table: Table, embeddings: "np.ndarray[Any, Any] | None" = None
) -> None:
    """Write the rows' columns, and the numbers of the vectors, if there are any."""
    names = list(dict.fromkeys(name for row in table.rows for name in row)) or [DEFAULT_COLUMN]
    writer = csv.writer(file)
    writer.writerow([*names, *range(0 if embeddings is None else embeddings.shape[1])])
    vectors = [()] * len(table.rows) if embeddings is None else map(_numbers, embeddings)
    for row, numbers in zip(table.rows, vectors, strict=True):
        values = [row.get(name, "") for name in names]
        fields = [each if isinstance(each, str) else as_json(each) for each in values]
        writer.writerow([*fields, *numbers])


def is_utf8(file: IO[str]) -> bool:
    """Whether a text file can hold any character."""
    return (getattr(file, "encoding", None) or "").lower().replace("-", "") == "utf8"


def _numbers(embedding: "np.ndarray[Any, Any]") -> list[float] | list[int]:
    """A vector in the shortest decimals that read back as the same numbers of its dtype."""
    if embedding.dtype.kind in "iu":
        whole: list[int] = embedding.tolist()
        return whole
    return [float(str(number)) for number in embedding]

"""The files of an index: index.json, and the segments that it lists.

In: blocks of vectors and rows. Out: segments, written so that they are complete or not there, and
opened again. `index.py`, which comes next, says what is in the folder.
"""

import io
import json
import mmap
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from minilm.disk import (
    errors_about,
    file_sha256,
    inside,
    parse_json,
    sync,
    sync_folder,
    temporary_name,
    write_atomically,
)  # fmt: skip
from minilm.errors import ConfigError, InputError, InputTypeError, errors_of_libraries
from minilm.files.arrays import map_npy
from minilm.pretrained.fingerprint import Fingerprint
from minilm.quantize import model_ranges, quantize_embeddings, stored_width
from minilm.similarity import Embeddings
from minilm.tasks.search import LONGEST, not_finite, too_long_error
from minilm.vectors import as_matrix

__all__ = [
    "LOCK", "MANIFEST", "Block", "Manifest", "Row", "Segment", "commit", "damages", "extended",
    "float_vectors", "is_ours", "lost_segments", "read_manifest", "remove_leftovers",
    "size_problem",
]  # fmt: skip

_Array = np.ndarray[Any, Any]
Row = str | Mapping[str, Any]
Block = tuple[Embeddings, Sequence[Row]]

FORMAT = "minilm index"
FORMAT_VERSION = 1
MANIFEST = "index.json"
LOCK = "index.lock"
_SEGMENT = re.compile(r"segment-\d{5,}")
_LEFTOVER = re.compile(r"segment-\d{5,}|\.(segment-\d{5,}|index\.json|trial)\.[0-9a-f]{32}\.part")
_SMALL = 2**16  # rows up to which a segment is merged into the next: 100 MB of vectors
_COPIED = 4096  # rows that are copied at a time
_HEADER = 128  # bytes of an .npy file before its numbers


# --- index.json


@dataclass(frozen=True)
class _Entry:
    """A segment in index.json: for each file its size and its SHA-256."""

    name: str
    rows: int
    files: dict[str, "_File"]


class _File(TypedDict):
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of index.json."""

    fingerprint: Fingerprint | None
    dimension: int | None
    column: str
    codes: tuple[str, ...]
    next_segment: int
    segments: tuple[_Entry, ...]

    def to_json(self) -> str:
        values = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(self)
        values["fingerprint"] = None if self.fingerprint is None else self.fingerprint.to_dict()
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read index.json.

    Raises:
        ConfigError: It is broken, or of a later version.
    """
    path = folder / MANIFEST
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ConfigError(path, [f'is not of an index: its "format" is not "{FORMAT}"'])
        if values.get("format_version") != FORMAT_VERSION:
            found = values.get("format_version")
            what = f"is of format {found!r}, this package reads {FORMAT_VERSION}; update minilm"
            raise ConfigError(path, [what])
        record = values["fingerprint"]
        codes = tuple(_typed(code, str) for code in values["codes"])
        segments = tuple(
            _Entry(
                inside(entry["name"]),
                _typed(entry["rows"], int),
                {
                    inside(name): _File(
                        bytes=_typed(file["bytes"], int), sha256=_typed(file["sha256"], str)
                    )
                    for name, file in entry["files"].items()
                },
            )
            for entry in values["segments"]
        )
        dimension = values["dimension"]
        return Manifest(
            None if record is None else Fingerprint.from_dict(record),
            None if dimension is None else _typed(dimension, int),
            _typed(values["column"], str),
            codes,
            _typed(values["next_segment"], int),
            _checked_entries(segments, codes, values["next_segment"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(path, [f"is broken: {what}; build the index again"]) from error


def _checked_entries(
    entries: tuple[_Entry, ...], codes: Sequence[str], next_segment: int
) -> tuple[_Entry, ...]:
    """Check that segments have the files that they should, and names that the next one has not."""
    expected = {"rows.jsonl", *(f"{kind}.npy" for kind in ("vectors", "lengths", "offsets"))}
    expected |= {f"{code}.npy" for code in codes}
    numbers = []
    for entry in entries:
        if expected != entry.files.keys():
            differing = ", ".join(sorted(expected ^ entry.files.keys()))
            raise ValueError(f"{entry.name} lists other files than it should have: {differing}")
        if not _SEGMENT.fullmatch(entry.name):
            raise ValueError(f"{entry.name!r} is not the name of a segment")
        numbers.append(int(entry.name.removeprefix("segment-")))
    if numbers != sorted({*numbers}) or (numbers[-1] if numbers else -1) != next_segment - 1:
        raise ValueError("its segments are not numbered one after the other, up to next_segment")
    return entries


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def commit(folder: Path, manifest: Manifest) -> None:
    """Replace index.json: from now on the index is the new one."""
    write_atomically(folder / MANIFEST, lambda file: file.write(manifest.to_json().encode()))


# --- one segment


class Segment:
    """The files of one segment, opened."""

    def __init__(self, folder: Path, entry: _Entry, first: int, width: int) -> None:
        """Open the files.

        Raises:
            ConfigError: One holds something else than it should.
        """
        self.path, self.entry = folder / entry.name, entry
        self.first, self.count = first, entry.rows
        self.vectors = self._array("vectors.npy", np.float32, (entry.rows, width))
        self._lengths = self._array("lengths.npy", np.float32, (entry.rows,))
        self._offsets = self._array("offsets.npy", np.int64, (entry.rows + 1,))
        forms = {"int8": (np.int8, width), "binary": (np.int8, stored_width(width, "binary"))}
        self.codes = {
            name: self._array(f"{name}.npy", dtype, (entry.rows, columns))
            for name, (dtype, columns) in forms.items()
            if f"{name}.npy" in entry.files
        }
        path = self.path / "rows.jsonl"
        try:
            with path.open("rb") as file:
                self._rows = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError) as error:  # ValueError: it is empty
            raise ConfigError(path, ["is missing or empty; build the index again"]) from error

    def _array(self, name: str, dtype: type, shape: tuple[int, ...]) -> _Array:
        path = self.path / name
        try:
            with errors_of_libraries(
                lambda why: ConfigError(path, [f"is not a .npy file, or broken: {why}"])
            ):
                array = map_npy(path).view(np.ndarray)  # slices of a memmap take longer
        except FileNotFoundError as error:
            raise ConfigError(path, ["is missing; build the index again"]) from error
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}"
            what = f"holds {found}, not {np.dtype(dtype)} {list(shape)}; build the index again"
            raise ConfigError(path, [what])
        return array

    @cached_property
    def tensor(self) -> Tensor:
        return as_matrix(self.vectors, str(self.path))

    @cached_property
    def lengths(self) -> Tensor:
        return torch.from_numpy(np.array(self._lengths))

    def lines(self, start: int, stop: int) -> list[bytes]:
        """The rows as they are in the file."""
        ends = self._offsets[start : stop + 1].tolist()
        return [self._rows[a:b] for a, b in pairwise(ends)]

    def row(self, i: int) -> dict[str, Any]:
        [line] = self.lines(i, i + 1)
        try:
            row = parse_json(line)
            return dict(_typed(row, dict))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                self.path / "rows.jsonl", [f"line {i + 1} is broken: {error}"]
            ) from error


def extended(
    folder: Path, manifest: Manifest, segments: Sequence[Segment], blocks: Iterable[Block]
) -> Manifest:
    """Write blocks as a new segment, and return the manifest with it; unchanged without rows."""
    checked = _checked(blocks, manifest.dimension, manifest.column)
    head = next(checked, None)
    if head is None:
        return manifest
    # The last segments are merged into the new one while they are no longer than it. So there are
    # few, even after many small calls, and a row is copied log2(_SMALL) times at most.
    absorbed: list[Segment] = []
    count = len(head[0])
    for segment in reversed(segments):
        if segment.count > min(count, _SMALL):
            break
        absorbed.insert(0, segment)
        count += segment.count
    damaged = [each for segment in absorbed for each in damages(folder, segment.entry)]
    if damaged:  # which would get a hash that says it is whole
        raise ConfigError(folder / MANIFEST, damaged)
    old = chain.from_iterable(map(_blocks_of, absorbed))
    name = f"segment-{manifest.next_segment:05}"
    entry = _write_segment(folder, name, chain(old, [head], checked), manifest)
    return replace(
        manifest,
        dimension=head[0].shape[1],
        next_segment=manifest.next_segment + 1,
        segments=(*manifest.segments[: len(segments) - len(absorbed)], entry),
    )


def _blocks_of(segment: Segment) -> Iterator[tuple[_Array, list[bytes]]]:
    for start in range(0, segment.count, _COPIED):
        stop = min(start + _COPIED, segment.count)
        yield segment.vectors[start:stop], segment.lines(start, stop)


def _checked(
    blocks: Iterable[Block], width: int | None, column: str
) -> Iterator[tuple[_Array, list[bytes]]]:
    """Yield blocks as float32 `[n, d]` and n lines, n at least 1. Errors as in `Index.add`."""
    for embeddings, rows in blocks:
        if isinstance(rows, str | bytes | Mapping):
            raise InputTypeError(
                f"rows is of type {type(rows).__name__}; pass a list of rows", "rows"
            )
        lines = [_line(row, i, column) for i, row in enumerate(rows)]
        vectors = float_vectors(embeddings, width, "embeddings")
        count = len(vectors) if vectors.numel() else 0
        if count != len(lines):
            raise InputError(
                f"rows has {len(lines)}, embeddings {count}; pass a row for each vector", "rows"
            )
        if not lines:
            continue
        width = vectors.shape[1]
        array: _Array = vectors.to("cpu", torch.float32).numpy()
        finite = np.isfinite(array).all(axis=1)
        if not finite.all():
            raise not_finite("embeddings", int(finite.argmin()))
        lengths = np.linalg.norm(array.astype(np.float64), axis=1)
        if (lengths > LONGEST[torch.float32]).any():
            row = int((lengths > LONGEST[torch.float32]).argmax())
            raise too_long_error("embeddings", row, float(lengths[row]))
        yield array, lines


def float_vectors(embeddings: Embeddings, width: int | None, argument: str) -> Tensor:
    vectors = as_matrix(embeddings, argument, codes=False).detach()
    if not vectors.numel() and width is not None:
        return vectors.new_zeros(0, width)
    if width not in (None, vectors.shape[1]):
        raise InputError(
            f"{argument} has vectors of width {vectors.shape[1]}, the index of width {width}; "
            "pass embeddings of its model",
            argument,
        )
    return vectors


def _line(row: Row, i: int, column: str) -> bytes:
    if isinstance(row, str):
        row = {column: row}
    if not isinstance(row, Mapping):
        raise InputTypeError(
            f"rows[{i}] is of type {type(row).__name__}; pass a string or a mapping", f"rows[{i}]"
        )
    wrong = [key for key in row if not isinstance(key, str)]
    if wrong:
        raise InputTypeError(f"rows[{i}] has the key {wrong[0]!r}; pass strings", f"rows[{i}]")
    try:
        text = json.dumps(dict(row), ensure_ascii=False)
        with suppress(UnicodeEncodeError):  # half a character must be escaped
            return text.encode() + b"\n"
        return json.dumps(dict(row)).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputTypeError(f"rows[{i}] can't be kept as JSON: {error}", f"rows[{i}]") from error


def _write_segment(
    folder: Path, name: str, blocks: Iterable[tuple[_Array, list[bytes]]], manifest: Manifest
) -> _Entry:
    """Write all files of a segment into a hidden folder, then give it its name.

    Raises:
        OSError: It can't be written; nothing of it is left.
    """
    temporary = folder / temporary_name(name)
    try:
        with errors_about(folder, temporary):
            temporary.mkdir()
            count = _write_files(temporary, blocks, manifest)
            files = {
                path.name: _File(bytes=path.stat().st_size, sha256=file_sha256(path))
                for path in sorted(temporary.iterdir())
            }
            sync_folder(temporary)
            temporary.rename(folder / name)
            sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _Entry(name, count, files)


def _write_files(
    folder: Path, blocks: Iterable[tuple[_Array, list[bytes]]], manifest: Manifest
) -> int:
    """Write the files of a segment, and return how many rows they have."""
    count, size = 0, 0
    with ExitStack() as stack:
        arrays: dict[str, _Rows] = {}

        def write(kind: str, values: _Array) -> None:
            if kind not in arrays:
                arrays[kind] = stack.enter_context(_Rows(folder / f"{kind}.npy", values))
            arrays[kind].write(values)

        lines_file = stack.enter_context((folder / "rows.jsonl").open("xb"))
        write("offsets", np.zeros(1, np.int64))
        for vectors, lines in blocks:
            write("vectors", vectors)
            lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
            write("lengths", lengths.astype(np.float32))
            for code in manifest.codes:
                ranges = model_ranges(vectors.shape[1]) if code == "int8" else None
                write(code, quantize_embeddings(vectors, code, ranges))
            lines_file.writelines(lines)
            ends = size + np.cumsum([len(line) for line in lines], dtype=np.int64)
            write("offsets", ends)
            count, size = count + len(lines), int(ends[-1])
        sync(lines_file)
    return count


class _Rows:
    """An .npy file to which rows are written before their number is known."""

    def __init__(self, path: Path, like: _Array) -> None:
        self.file = path.open("xb")
        self.dtype, self.shape, self.count = like.dtype, like.shape[1:], 0
        self.file.write(bytes(_HEADER))

    def write(self, rows: _Array) -> None:
        self.file.write(np.ascontiguousarray(rows).data)
        self.count += len(rows)

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                header = io.BytesIO()
                shape = (self.count, *self.shape)
                descr = np.lib.format.dtype_to_descr(self.dtype)
                fields = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(header, fields)
                assert len(header.getvalue()) == _HEADER  # room for any number of rows
                self.file.seek(0)
                self.file.write(header.getvalue())
                sync(self.file)
        finally:
            self.file.close()


# --- files


def is_ours(name: str) -> bool:
    """Whether a name is one that an interrupted call may have left in a folder."""
    return name.startswith(LOCK) or _LEFTOVER.fullmatch(name) is not None


def lost_segments(folder: Path) -> list[str]:
    """The segments in a folder that has no index.json: the corpus of an index that lost it."""
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return []
    return sorted(path.name for path in folder.iterdir() if _SEGMENT.fullmatch(path.name))


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove what an interrupted call left, and segments that were merged into others."""
    kept = {entry.name for entry in manifest.segments}
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.name not in kept:
            # Windows keeps what another process has open; the next call tries again.
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def damages(folder: Path, entry: _Entry) -> list[str]:
    """Read all files of a segment, and say which have other hashes than index.json has."""
    problems = []
    for name, file in entry.files.items():
        try:
            actual = file_sha256(folder / entry.name / name)
        except FileNotFoundError:
            problems.append(
                f"{entry.name}/{name} is gone, perhaps into a larger segment; open the index again"
            )
            continue
        if actual != file["sha256"]:
            problems.append(
                f"{entry.name}/{name} has SHA-256 {actual}, expected {file['sha256']}: it was "
                "changed or damaged; build the index again"
            )
    return problems


def size_problem(path: Path, expected: int) -> str | None:
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    return None if size == expected else f"has {size:,} bytes, not {expected:,}"

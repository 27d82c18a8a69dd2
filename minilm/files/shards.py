"""A folder of Parquet files that is written part by part, and can be continued and verified.

In: a header, which says what a run is about, and tables one after the other. Out:
`part-00000.parquet` and so on, and `_manifest.json`, which says what they hold. Next:
`streaming.py` writes them, `parity/check_folder.py` verifies them.

Until the last part is written there is `_progress.jsonl` in place of the manifest: the header, then
a line for each finished part. Each part is written under a hidden name and renamed once it is on
the disk; only then its line is added. So at any moment each part is either complete and listed, or
will be made again. Readers of such folders ignore names that begin with . or _.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from minilm.disk import (
    absolute,
    file_sha256,
    inside,
    lock_folder,
    make_folder,
    sync,
    sync_folder,
    write_atomically,
)  # fmt: skip
from minilm.errors import ConfigError, InputError
from minilm.files.arrow import fingerprint_in, import_pyarrow
from minilm.outputs import check_folder

__all__ = ["MANIFEST", "PROGRESS", "Part", "ShardFolder", "part_paths", "verify_parts"]

MANIFEST = "_manifest.json"
PROGRESS = "_progress.jsonl"
_LOCK = ".lock"
_PART = re.compile(r"part-\d{5,}\.parquet")
# As `write_atomically` names them.
_TEMPORARY = re.compile(
    r"\.(part-\d{5,}\.parquet|_manifest\.json|_progress\.jsonl)\.[0-9a-f]{32}\.part"
)


@dataclass(frozen=True)
class Part:
    """One file of a folder.

    Attributes:
        name: The file's name.
        rows: How many rows it has.
        sha256: The file's hash.
        unique: How many different texts it has.
        tokens: How many tokens were read of those texts.
        cut_rows: How many rows have a text that was cut.
        cut_tokens: How many tokens those texts have.
        cut_read: How many of these tokens were read.
        cut_first: The first row whose text was cut; -1 if there is none.
    """

    name: str
    rows: int
    sha256: str
    unique: int
    tokens: int
    cut_rows: int = 0
    cut_tokens: int = 0
    cut_read: int = 0
    cut_first: int = -1

    @classmethod
    def from_dict(cls, values: Any) -> "Part":
        """Read what `dataclasses.asdict` gave.

        Raises:
            ValueError: It is something else.
        """
        kinds = {each.name: each.type for each in fields(cls)}
        if not isinstance(values, Mapping) or any(
            type(values.get(name)) is not kind for name, kind in kinds.items()
        ):
            raise ValueError("is not the record of a part")
        if not _PART.fullmatch(inside(values["name"])):
            raise ValueError(f"{values['name']!r} is not the name of a part")
        return cls(**{name: values[name] for name in kinds})


def part_paths(folder: Path) -> list[Path]:
    """The Parquet files of a folder, in order."""
    return sorted(path for path in folder.glob("*.parquet") if path.name[0] not in "._")


class ShardFolder:
    """A folder of parts, a context manager that lets one writer in at a time.

    Another thread of the process waits, another process gets an error.

    Attributes:
        folder: Where it is.
        header: What the run in it is about; None if there is no run.
        done: The parts that this run finished, by number.
        is_complete: Whether it finished all.
    """

    def __init__(self, folder: Path) -> None:
        """Name a folder that is there, or should be made; nothing is done before it is entered."""
        self.folder = absolute(folder)
        self.header: dict[str, Any] | None = None
        self.done: dict[int, Part] = {}
        self.is_complete = False
        self._hold: Any = None

    def __enter__(self) -> "ShardFolder":
        """Lock the folder, and read what was done before.

        Raises:
            InputError: Another process writes there; it can't be written to; or it has files that
                this package didn't write.
            OSError: It can't be made, or read.
        """
        check_folder(self.folder, "output")
        make_folder(self.folder)
        self._hold = lock_folder(self.folder, _LOCK, "output")
        self._hold.__enter__()
        try:
            found = _read(self.folder)
            if found is not None:
                self.header, parts, self.is_complete = found
                self.done = {_number(part.name): part for part in parts}
            else:
                others = sorted(path.name for path in self.folder.iterdir() if path.name[0] != ".")
                others = [name for name in others if name != PROGRESS]
                if others:
                    raise InputError(
                        f"{self.folder}: has files in it that no such run has made, such as "
                        f"{others[0]}; choose a new folder",
                        "output",
                    )
            for path in self.folder.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink()  # of a process that was killed
        except BaseException:
            self._hold.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._hold.__exit__(None, None, None)

    def clear(self) -> None:
        """Remove the files of the run that is in the folder."""
        for path in part_paths(self.folder):
            if _PART.fullmatch(path.name):
                path.unlink()
        # Last: while they are there, the folder is known to be ours.
        for name in (PROGRESS, MANIFEST):
            (self.folder / name).unlink(missing_ok=True)
        self.header, self.done, self.is_complete = None, {}, False

    def begin(self, header: dict[str, Any]) -> None:
        """Start a run, or continue that of this header without its broken parts.

        Raises:
            OSError: The folder can't be written to.
        """
        self.header = header
        broken = [number for number, part in self.done.items() if not self._is_intact(part)]
        for number in broken:
            del self.done[number]
        self.is_complete &= not broken
        if self.is_complete:
            (self.folder / PROGRESS).unlink(missing_ok=True)  # killed just before that
        else:
            lines = [header, *(asdict(self.done[number]) for number in sorted(self.done))]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            with self._errors_about(PROGRESS):
                write_atomically(self.folder / PROGRESS, lambda file: file.write(text.encode()))

    def _is_intact(self, part: Part) -> bool:
        path = self.folder / part.name
        return path.is_file() and file_sha256(path) == part.sha256

    def add(self, number: int, name: str, table: Any, **more: int) -> Part:
        """Write a part, and then a line that says so.

        Args:
            number: The part's number.
            name: The file's name.
            table: A `pyarrow.Table`, whose last column is the vectors.
            more: The other fields of `Part`.

        Raises:
            OSError: The disk is full, or the like; the error names the file. What was there before
                still is.
        """
        path = self.folder / name
        with self._errors_about(name):
            write_atomically(path, lambda file: _write_parquet(file, table))
            part = Part(name, table.num_rows, file_sha256(path), **more)
        with self._errors_about(PROGRESS), (self.folder / PROGRESS).open("ab") as progress:
            progress.write(f"{json.dumps(asdict(part))}\n".encode())
            sync(progress)
        self.done[number] = part
        return part

    def finish(self) -> None:
        """Write the manifest, once all parts are there."""
        if self.is_complete:
            return
        parts = [asdict(self.done[number]) for number in sorted(self.done)]
        text = json.dumps({**(self.header or {}), "parts": parts}, indent=1)
        with self._errors_about(MANIFEST):
            write_atomically(self.folder / MANIFEST, lambda file: file.write(f"{text}\n".encode()))
            (self.folder / PROGRESS).unlink(missing_ok=True)
            sync_folder(self.folder)
        self.is_complete = True

    @contextmanager
    def _errors_about(self, name: str) -> Iterator[None]:
        """Name the file in an error of writing, and say what to do."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}; {len(self.done):,} parts are written and stay: once "
                "that is mended, the same command goes on",
                str(self.folder / name),
            ) from error


def _number(name: str) -> int:
    return int(name.removeprefix("part-").removesuffix(".parquet"))


def _read(folder: Path) -> tuple[dict[str, Any], list[Part], bool] | None:
    """Read the header, the parts, and whether these are all; None if no run has begun.

    Raises:
        ConfigError: The manifest is broken.
    """
    path = folder / MANIFEST
    if path.exists():
        try:
            header = json.loads(path.read_bytes())
            parts = [Part.from_dict(each) for each in header.pop("parts")]
            int(header["rows"]["written"])
            return header, parts, True
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            what = f"is not a manifest, or broken: {error}; remove it, or choose another folder"
            raise ConfigError(path, [what]) from error
    path = folder / PROGRESS
    if not path.exists():
        return None
    lines = path.read_bytes().split(b"\n")
    try:
        header = json.loads(lines[0])
    except ValueError:
        return None  # killed at the very first line
    if not isinstance(header, dict):
        return None
    parts = []
    for line in lines[1:]:
        with suppress(ValueError):  # the last line may be cut short
            parts.append(Part.from_dict(json.loads(line)))
    return header, parts, False


def _write_parquet(file: IO[bytes], table: Any) -> None:
    """Write a table with fixed settings, so that the same rows give the same bytes."""
    import pyarrow.parquet

    plain = table.column_names[:-1]  # vectors neither repeat nor have an order
    pyarrow.parquet.write_table(
        table, file, compression="snappy", use_dictionary=plain, write_statistics=plain
    )


def verify_parts(folder: Path) -> tuple[dict[str, Any] | None, list[str], set[str]]:
    """Check that a folder holds what its manifest says: all parts, with their hashes and rows.

    Returns:
        The manifest without its parts, None if there is none; all problems; and the names of parts
        that are not what was written.

    Raises:
        MissingPackageError: pyarrow is not installed.
        ConfigError: The manifest is broken.
    """
    import_pyarrow("reading Parquet files")
    import pyarrow.parquet

    found = _read(folder)
    if found is None:
        return None, [], set()
    header, parts, is_complete = found
    problems, damaged = [], set()
    if not is_complete:
        problems.append(
            f"is not complete: {len(parts):,} parts are written; run the same command again"
        )
    fingerprint = header.get("fingerprint")
    for part in parts:
        path = folder / part.name
        if not path.is_file():
            problems.append(f"{part.name} is missing")
            continue
        if file_sha256(path) != part.sha256:
            damaged.add(part.name)
            problems.append(f"{part.name} is not the file that was written: its SHA-256 differs")
        try:
            with pyarrow.parquet.ParquetFile(path) as opened:
                rows, record = opened.metadata.num_rows, fingerprint_in(opened.schema_arrow)
            made_by = None if record is None else json.loads(record)
        except (ValueError, OSError) as error:
            problems.append(f"{part.name} can't be read: {error}")
            continue
        if rows != part.rows:
            problems.append(f"{part.name} has {rows:,} rows, expected {part.rows:,}")
        if made_by != fingerprint:
            problems.append(f"{part.name} has another fingerprint than the manifest")
    if is_complete:
        names = {part.name for part in parts}
        problems += [
            f"{path.name} is not in the manifest"
            for path in part_paths(folder)
            if path.name not in names
        ]
        total = sum(part.rows for part in parts)
        if total != header["rows"]["written"]:
            problems.append(f"has {total:,} rows, the manifest says {header['rows']['written']:,}")
    return header, problems, damaged

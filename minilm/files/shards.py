"""A folder of Parquet files that is written part by part, and can be continued and verified.

In: a header, which says what a run is about, and tables one after the other. Out:
`part-00000.parquet` and so on, and beside the folder a manifest, which says what they hold: see
`manifest_path`. Next: `streaming.py` writes them, `parity/check_folder.py` verifies them.

The finished folder has the parts in it and nothing else, since Polars, datasets, Daft and others
read every file of a folder, also those whose names begin with . or _ (November 2026). Each part
knows by itself what the manifest says, but for hashes and names of files: so a folder that was
moved without its manifest can be verified, and the same run gives it a new one.

Until the last part is written there is `_progress.jsonl` in the folder, in place of the manifest:
the header, then a line for each finished part. Each part is written under a hidden name and renamed
once it is on the disk; only then its line is added. So at any moment each part is either complete
and listed, or will be made again. Each line has a checksum of itself: one that was damaged counts
as not there, and without the header the run is known from its parts, as without a manifest.
"""

import errno
import hashlib
import io
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from minilm.disk import (
    absolute,
    file_sha256,
    inside,
    lock_folder,
    make_folder,
    parse_json,
    remove_files,
    sync,
    sync_folder,
    with_home,
    write_atomically,
)  # fmt: skip
from minilm.errors import ConfigError, InputError
from minilm.files.arrow import fingerprint_in, import_pyarrow
from minilm.inference.truncation import caller_level
from minilm.outputs import check_folder

__all__ = [
    "PROGRESS", "Part", "ShardFolder", "Verified", "lacking", "manifest_path", "part_name",
    "part_paths", "run_of", "verify_parts",
]  # fmt: skip

PROGRESS = "_progress.jsonl"
PART_KEY = "minilm.part"  # in the metadata of a part: what it knows of its run and of itself
# In the folder: until it is moved beside it, and for ever in those that 0.1.0 wrote.
_INSIDE = "_manifest.json"
# A folder that can be written to, in one that can't be, or on another disk.
_NOT_BESIDE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV, errno.EBUSY}
_LOCK = ".lock"
_PART = re.compile(r"part-[0-9]{5,}\.parquet")
# As `write_atomically` names them.
_TEMPORARY = re.compile(
    r"\.(part-[0-9]{5,}\.parquet|_manifest\.json|_progress\.jsonl)\.[0-9a-f]{32}\.part"
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


def part_name(number: int, header: Mapping[str, Any]) -> str:
    """The name of a part of a run, with as many digits as the last part needs."""
    last = (header["rows"]["written"] - 1) // header["settings"]["shard_rows"]
    return f"part-{number:0{max(5, len(str(last)))}}.parquet"


def part_paths(folder: Path) -> list[Path]:
    """The Parquet files of a folder, in order."""
    return sorted(path for path in folder.glob("*.parquet") if path.name[0] not in "._")


def manifest_path(folder: Path) -> Path:
    """Where the manifest of a folder is: `vectors.manifest.json` beside `vectors/`.

    A folder such as `out/lang=de` is one partition of `out`, which people read as a whole: its
    manifest is `out.lang=de.manifest.json`, beside `out`. Links are followed.
    """
    real = Path(os.path.realpath(with_home(folder)))
    names = [real.name]
    while "=" in real.name:
        real = real.parent
        names.insert(0, real.name)
    return real.with_name(".".join([*names, "manifest.json"]))


def run_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What all parts of a run know of it: its header, with one hash for all input files.

    The record of the model is not in it: it has a place of its own in a part.
    """
    inputs = header.get("inputs", [])
    hashes = " ".join(each["sha256"] for each in inputs)
    digest = hashlib.sha256(hashes.encode()).hexdigest()
    left_out = ("fingerprint", "inputs", "bad_rows", "parts")
    kept = {name: value for name, value in header.items() if name not in left_out}
    return {**kept, "inputs": {"files": len(inputs), "sha256": digest}}


class ShardFolder:
    """A folder of parts, a context manager that lets one writer in at a time.

    Another thread of the process waits, another process gets an error.

    Attributes:
        folder: Where it is.
        manifest: Where its manifest is, or will be.
        header: What the run in it is about, or what its parts know of that, see `run_of`, if the
            manifest is lost; None if there is no run.
        done: The parts that this run finished, by number.
        is_complete: Whether it finished all.
        is_lost: Whether the manifest is lost.
        source: The file that says so; the folder, if only the parts do.
    """

    def __init__(self, folder: Path) -> None:
        """Name a folder that is there, or should be made; nothing is done before it is entered."""
        self.folder = absolute(folder)
        self.manifest = manifest_path(self.folder)
        self._forget()
        self._hold: Any = None

    def _forget(self) -> None:
        self.header: dict[str, Any] | None = None
        self.done: dict[int, Part] = {}
        self.is_complete = self.is_lost = False
        self.source = self.folder
        self._whole: set[str] | None = None

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
            if found.source in (None, self.manifest) and not any(
                (self.folder / part.name).exists() for part in found.parts
            ):
                found = _Found()  # of a folder that was here before
            self.header, self.is_complete = found.header, found.is_complete
            self.is_lost = found.header is not None and found.source is None
            self.source = found.source or self.folder
            self.done = {_number(part.name): part for part in found.parts}
            if found.source is None:
                known = {PROGRESS, *(part.name for part in found.parts)}
                names = sorted(path.name for path in self.folder.iterdir())
                others = [name for name in names if name[0] != "." and name not in known]
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
        remove_files(path for path in part_paths(self.folder) if _PART.fullmatch(path.name))
        # Last: while they are there, the folder is known to be ours.
        remove_files([self.folder / PROGRESS, self.folder / _INSIDE, self.manifest])
        self._forget()

    def begin(self, header: dict[str, Any]) -> None:
        """Start a run, or continue that of this header without its broken parts.

        Raises:
            OSError: The folder can't be written to.
        """
        if self.is_lost:
            known = self.header or {}
            of_run = run_of(header) == {k: v for k, v in known.items() if k != "fingerprint"}
            self.done = {
                number: replace(part, sha256=file_sha256(self.folder / part.name))
                for number, part in self.done.items()
                if of_run and not _problems_of(self.folder / part.name, part, known, pages=True)
            }
            self._whole = {part.name for part in self.done.values()}
        self.header, self.is_lost = header, False
        broken = [n for n, part in self.done.items() if part.name not in self._intact()]
        for number in broken:
            del self.done[number]
        self.is_complete &= not broken
        if self.is_complete:
            self._move_out()  # of a folder of 0.1.0
        else:
            lines = [header, *(asdict(self.done[number]) for number in sorted(self.done))]
            text = b"".join(map(_line, lines))
            with self._errors_about(PROGRESS):
                write_atomically(self.folder / PROGRESS, lambda file: file.write(text))
            # From now on it is not what the folder has.
            remove_files([self.folder / _INSIDE, self.manifest])

    def _intact(self) -> set[str]:
        """The names of the finished parts that are as they were written; read once."""
        if self._whole is None:
            paths = {self.folder / part.name: part.sha256 for part in self.done.values()}
            self._whole = {
                p.name for p, sha in paths.items() if p.is_file() and file_sha256(p) == sha
            }
        return self._whole

    def check_parts(self) -> None:
        """Compare the run with what its whole parts say of it and of themselves.

        Raises:
            ValueError: A part says something else; those of 0.1.0 say nothing.
        """
        for part in self.done.values():
            known = {name: value for name, value in asdict(part).items() if name != "sha256"}
            told = _told(self.folder / part.name) if part.name in self._intact() else None
            header = self.header or {}
            of_run = {"run": run_of(header), "fingerprint": header.get("fingerprint")}
            if told and told != {"part": known, **of_run}:
                raise ValueError(f"{part.name} says something else")

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
        told = asdict(Part(name, table.num_rows, "", **more))
        del told["sha256"]
        known = json.dumps({"run": run_of(self.header or {}), "part": told}, ensure_ascii=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), PART_KEY: known})
        with self._errors_about(name):
            write_atomically(path, lambda file: _write_parquet(file, table))
            part = Part(name, table.num_rows, file_sha256(path), **more)
        with self._errors_about(PROGRESS), (self.folder / PROGRESS).open("ab") as progress:
            progress.write(_line(asdict(part)))
            sync(progress)
        self.done[number] = part
        return part

    def finish(self) -> None:
        """Write the manifest, once all parts are there."""
        if self.is_complete:
            return
        parts = [asdict(self.done[number]) for number in sorted(self.done)]
        text = json.dumps({**(self.header or {}), "parts": parts}, indent=1)
        with self._errors_about(_INSIDE):
            # First into the folder, which is locked: what a process that is killed leaves of a file
            # there is known to be nobody else's.
            path = self.folder / _INSIDE
            write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
            self._move_out()
            remove_files([self.folder / PROGRESS])
        self.is_complete = True

    def _move_out(self) -> None:
        """Move the manifest from the folder to its place beside it."""
        inside = self.folder / _INSIDE
        if not inside.exists():
            return
        try:
            inside.replace(self.manifest)
            sync_folder(self.manifest.parent)
        except OSError as error:
            if error.errno not in _NOT_BESIDE:
                raise
            inside.unlink()
            warnings.warn(
                f"{self.manifest}: can't be written ({error.strerror}), and has no place in the "
                "folder, which tools read as a whole; the parts themselves say what they hold",
                stacklevel=caller_level(),
            )

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


def lacking(folder: Path) -> str | None:
    """What a folder of parts lacks of its run, or has beside it, by the names alone.

    Returns:
        Words on it; None if it is whole, or of no run that is known.

    Raises:
        ConfigError: Its manifest is broken.
    """
    found = _read(folder)
    if found.header is None:
        return None
    if found.source is not None and not found.is_complete:
        return "is not complete; run the command that writes it again"
    there, known = ({path.name for path in part_paths(folder)}, {part.name for part in found.parts})
    wanted = known if found.source else known | _expected(found.header)
    for names, what in ((wanted - there, "has lost"), (there - known, "has more than its run:")):
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            return f"{what} {min(names)}{more}"
    return None


def _number(name: str) -> int:
    return int(name.removeprefix("part-").removesuffix(".parquet"))


class _Found(NamedTuple):
    """What a folder holds: the header and the parts of a run, whether these are all, and the file
    that says so; no file if only the parts say it, no header if there is no run.
    """

    header: dict[str, Any] | None = None
    parts: list[Part] = []  # noqa: RUF012  # never changed
    is_complete: bool = False
    source: Path | None = None


def _read(folder: Path) -> _Found:
    """Find out which run is in a folder.

    Raises:
        ConfigError: The manifest is broken.
    """
    found = _from_progress(folder / PROGRESS)
    if found is not None:
        return found
    for path in (folder / _INSIDE, manifest_path(folder)):
        if path.exists():
            found = _from_manifest(path)
            if path.parent == folder or _is_of(found, folder):
                return found
    told = {path.name: known for path in part_paths(folder) if (known := _told(path))}
    first = next(iter(told.values()), None)
    if first is None:
        return _Found()
    parts = [
        Part.from_dict({**known["part"], "sha256": ""})
        for name, known in told.items()
        if known["run"] == first["run"] and known["part"]["name"] == name
    ]
    return _Found({**first["run"], "fingerprint": first["fingerprint"]}, parts)


def _from_manifest(path: Path) -> _Found:
    try:
        header = parse_json(path.read_bytes())
        parts = [Part.from_dict(each) for each in header.pop("parts")]
        int(header["rows"]["written"])
        run_of(header)
        return _Found(header, parts, True, path)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = f"is not a manifest, or broken: {error}; remove it, or choose another folder"
        raise ConfigError(path, [what]) from error


def _line(values: Mapping[str, Any]) -> bytes:
    """A line of the progress, with a checksum of what else is in it."""
    return json.dumps({**values, "crc32": _crc(values)}).encode() + b"\n"


def _crc(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values).encode())


def _from_line(line: bytes) -> dict[str, Any]:
    """Read a line of the progress; those of before November 2026 have no checksum.

    Raises:
        ValueError: It is broken.
    """
    values = parse_json(line)
    if not isinstance(values, dict) or values.pop("crc32", None) not in (None, _crc(values)):
        raise ValueError("is not what was written")
    return values


def _from_progress(path: Path) -> _Found | None:
    if not path.exists():
        return None
    lines = path.read_bytes().split(b"\n")
    try:
        header = _from_line(lines[0])
    except ValueError:
        return None  # killed at the very first line, or damaged
    parts = []
    for line in lines[1:]:
        with suppress(ValueError):  # the last line may be cut short
            parts.append(Part.from_dict(_from_line(line)))
    return _Found(header, parts, False, path)


def _is_of(found: _Found, folder: Path) -> bool:
    """Whether a manifest beside a folder is of its parts, and not of those that were there before.

    Any part that is of its run, or knows of none, speaks for it.
    """
    header = found.header or {}
    run = run_of(header)
    paths = part_paths(folder)
    return not paths or any(
        each is None or (each["run"] == run and each["fingerprint"] == header.get("fingerprint"))
        for each in map(_told, paths)
    )


def _told(path: Path) -> dict[str, Any] | None:
    """What a part knows: its "run", its "part" and its "fingerprint"; None if nothing."""
    import_pyarrow("reading Parquet files")
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        known = parse_json((schema.metadata or {}).get(PART_KEY.encode(), b"null"))
        if known is None:
            return None
        Part.from_dict({**known["part"], "sha256": ""})
        int(known["run"]["rows"]["written"])
        fingerprint = parse_json(fingerprint_in(schema) or b"null")
        return {"run": known["run"], "part": known["part"], "fingerprint": fingerprint}
    except (ValueError, KeyError, TypeError, OSError):
        return None


def parquet_settings(table: Any) -> dict[str, Any]:
    """How parts are written: fixed, so that the same rows give the same bytes.

    The numbers of vectors neither repeat nor have an order, so they get no dictionary and no
    statistics; nor compression, which saves little there and takes readers time. What snappy would
    save of them, 0.3 %, zstd saves of ordinary texts. Groups of 1,024 rows are the fastest to scan.
    `scripts/bench/parquet.py` measures that. Checksums of pages are for `verify_parts`: tools don't
    look at them unless they are told to.

    Args:
        table: A `pyarrow.Table`, whose last column is the vectors.
    """
    import pyarrow.parquet

    empty = io.BytesIO()
    pyarrow.parquet.write_table(table.schema.empty_table(), empty)
    schema = pyarrow.parquet.ParquetFile(empty).schema
    *others, vectors = (schema.column(number).path for number in range(len(schema)))
    plain = table.column_names[:-1]
    return {
        "compression": dict.fromkeys(others, "zstd") | {vectors: "none"},
        "use_dictionary": plain,
        "write_statistics": plain,
        "write_page_checksum": True,
        "row_group_size": 1024,
    }


def _write_parquet(file: IO[bytes], table: Any) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, file, **parquet_settings(table))


class Verified(NamedTuple):
    """What `verify_parts` found.

    Attributes:
        header: The manifest without its parts, or what the parts know of it; None if neither is.
        problems: All problems, a sentence each.
        damaged: The names of parts that are not what was written.
        source: The file that the parts were compared with; None if there is none.
    """

    header: dict[str, Any] | None
    problems: list[str]
    damaged: set[str]
    source: Path | None


def verify_parts(folder: Path) -> Verified:
    """Check that a folder holds what its manifest says: all parts, with their hashes and rows.

    Without a manifest, all is checked by what the parts know themselves, and by the checksums of
    their pages.

    Raises:
        MissingPackageError: pyarrow is not installed.
        ConfigError: The manifest is broken.
    """
    import_pyarrow("reading Parquet files")
    found = _read(folder)
    header, source = found.header, found.source
    if header is None:
        return Verified(None, [], set(), None)
    problems, damaged = [], set()
    if source is not None and not found.is_complete:
        problems.append(
            f"is not complete: {len(found.parts):,} parts are written; run the same command again"
        )
    for part in found.parts:
        path = folder / part.name
        if not path.is_file():
            problems.append(f"{part.name} is missing")
            continue
        if source is not None and file_sha256(path) != part.sha256:
            damaged.add(part.name)
            problems.append(f"{part.name} is not the file that was written: its SHA-256 differs")
        about_it = _problems_of(path, part, header, pages=source is None)
        problems += about_it
        if source is None and about_it:
            damaged.add(part.name)
    if found.is_complete or source is None:
        what = "of this run" if source is None else "in the manifest"
        names = {part.name for part in found.parts}
        if source is None:
            problems += [f"{name} is missing" for name in _expected(header) - names]
        problems += [
            f"{path.name} is not {what}" for path in part_paths(folder) if path.name not in names
        ]
        total, written = sum(part.rows for part in found.parts), header["rows"]["written"]
        if total != written:
            who = "they say" if source is None else "the manifest says"
            problems.append(f"has {total:,} rows, {who} {written:,}")
    return Verified(header, problems, damaged, source)


def _problems_of(path: Path, part: Part, header: dict[str, Any], *, pages: bool) -> list[str]:
    """What is wrong with a part; with `pages`, all of these are read, and their checksums count."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=pages) as opened:
            rows, record = opened.metadata.num_rows, fingerprint_in(opened.schema_arrow)
            for _ in opened.iter_batches() if pages else ():
                pass
        made_by = None if record is None else parse_json(record)
    except (ValueError, OSError) as error:
        return [f"{path.name} can't be read: {error}"]
    problems = []
    if rows != part.rows:
        problems.append(f"{path.name} has {rows:,} rows, expected {part.rows:,}")
    if made_by != header.get("fingerprint"):
        problems.append(f"{path.name} has another fingerprint than the manifest")
    return problems


def _expected(header: dict[str, Any]) -> set[str]:
    """The names of all parts of a run."""
    rows = header.get("settings", {}).get("shard_rows")
    if not rows:
        return set()
    count = max(1, -(-header["rows"]["written"] // rows))
    return {part_name(number, header) for number in range(count)}

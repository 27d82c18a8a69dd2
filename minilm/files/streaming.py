"""Files of any size in, a folder of Parquet files with their vectors out, in bounded memory.

In: an encoder, and .jsonl, .csv, .parquet or .txt files. Out: `OUTPUT/part-00000.parquet` and so
on, each of a fixed number of rows, with all columns and the vectors; and beside it a manifest.
Next: `minilm check OUTPUT`, or any program that reads Parquet.

It can be killed at any moment. The same call goes on where it was, and the result is, byte for
byte, that of an uninterrupted run (with the same versions of torch and pyarrow, on a processor of
the same kind; if the model is `reproducible`, with the same pyarrow on any). For that, each part is
computed from its own rows only, and a text's vector depends neither on what is computed beside it,
nor on the number of threads or processes.
"""

import copy
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minilm.disk import file_sha256, with_home
from minilm.encoder import SentenceEncoder
from minilm.errors import (
    BadRowWarning,
    ConfigError,
    InputError,
    NotFiniteError,
    TruncationError,
)  # fmt: skip
from minilm.files.arrow import import_pyarrow, with_vectors
from minilm.files.rows import DEFAULT_COLUMN
from minilm.files.shards import Part, ShardFolder, part_name, run_of
from minilm.files.sources import ON_BAD_ROW, Layout, Shard, find_files, read_shards, survey
from minilm.inference.encode import required_ranges
from minilm.inference.kernels import give_back_freed_memory
from minilm.inference.process_pool import Job, ProcessPool
from minilm.inference.truncation import (
    TRUNCATION,
    TruncationSummary,
    caller_level,
    warn_of,
    without_warning,
)
from minilm.inputs import check_choice, check_positive_int, check_unicode, progress_bar
from minilm.outputs import check_room
from minilm.quantize import PRECISIONS, as_stored, stored_bytes
from minilm.version import __version__

__all__ = ["FilesReport", "encode_files"]

FORMAT_VERSION = 2  # of the manifest; in 1 it is in the folder, and the parts know less

_ATTEMPTS = 3  # processes that may die of one part: a run takes a night, and memory may run out


@dataclass(frozen=True)
class FilesReport:
    """What `encode_files` did.

    Attributes:
        output: The folder.
        parts: How many files it has.
        rows: How many rows they have together.
        bad_rows: How many rows of the inputs had no text that can be embedded.
        computed: How many parts this call computed; the others were there.
        tokens: How many tokens were read for all parts.
    """

    output: Path
    parts: int
    rows: int
    bad_rows: int
    computed: int
    tokens: int

    def __str__(self) -> str:
        before = self.parts - self.computed
        parts = f"{self.parts:,} part{'' if self.parts == 1 else 's'}"
        return (
            f"{self.output}: {self.rows:,} rows in {parts}"
            f"{f', of which {before:,} were there' if before else ''}"
        )


class Answer(NamedTuple):
    """The vectors `[n, d]` of n texts, how many tokens each has, and how many were read."""

    vectors: "np.ndarray[Any, Any]"
    token_counts: tuple[int, ...]
    kept: tuple[int, ...]


def embed(encoder: SentenceEncoder, texts: list[str], options: dict[str, Any]) -> Answer:
    """Embed the texts of a part, in this process or another."""
    vectors, report = encoder.encode(texts, return_report=True, **options)
    give_back_freed_memory()
    return Answer(vectors, report.token_counts, report.kept_token_counts)


def encode_files(
    encoder: SentenceEncoder,
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    column: str | None = None,
    shard_rows: int = 4096,
    embedding_column: str = "embedding",
    row_number: str | None = None,
    precision: str = "float32",
    prompt: str | None = None,
    truncation: str = "warn",
    truncate_dim: int | None = None,
    normalize_embeddings: bool = False,
    on_bad_row: str = "error",
    workers: int = 1,
    batch_size: int | None = None,
    overwrite: bool = False,
    show_progress_bar: bool | None = None,
) -> FilesReport:
    """Embed all texts of files, into a folder of Parquet files.

    The columns of .parquet stay as they are. Those of .csv are strings. Those of .jsonl get the
    type that holds all values of a key: bool, int64, double or string; a key that a line lacks is
    null there. Lists, objects, and keys whose values are of different kinds become strings that
    hold their JSON, as the manifest says (`columns`: "json"). Numbers with a point are doubles, and
    no whole number is rounded.

    Each file is read once before anything is computed, and once to compute. Called again with the
    same arguments after it was interrupted, it goes on; with a `reproducible` model also on another
    kind of machine or with another version of torch, to the same bytes. The finished folder has
    parts in it and nothing else. Each has the fingerprint of the model, and knows which part of
    which run it is; `OUTPUT.manifest.json`, beside the folder, says what was made from which files,
    with SHA-256.

    Args:
        encoder: The model.
        inputs: Files, folders and glob patterns, see `minilm.files.sources.find_files`.
        output: The folder: a new or an empty one, or the one to go on with.
        column: The name of the texts; by default "text", or the only one.
        shard_rows: Rows of each part. Memory grows with it.
        embedding_column: The name of the vectors: a list of fixed size.
        row_number: The name of another column, of int64: 0, 1, 2, ... through all parts.
            ClickHouse, Spark, Ray and DataFusion read rows in any order; by it they can be sorted.
        precision: Of their numbers: "float32", "float16", or codes, see `encode`. "binary" gives
            int8, as sentence-transformers does, with a warning: most tools take "ubinary" only.
        prompt, truncation, truncate_dim, normalize_embeddings, batch_size: As in `encode`. A
            warning of truncation comes once, for all parts together.
        on_bad_row: What to do about a row whose text is missing, null or not a string, or about a
            line that is broken or has a key twice. "error" stops at the first, before anything is
            computed. "skip" leaves the row out. "empty" keeps it, so that there are as many rows as
            before: its text is null, its vector that of "", and if the line can't be read, its
            other columns are null too. The last two warn once, with the first few. A file that is
            not UTF-8, or a .csv file whose quotes are broken, stops the run in any case.
        workers: Processes, which share the threads. One that dies is replaced. With several, a
            script needs `if __name__ == "__main__":`, as always with processes.
        overwrite: Remove the files of another run from `output`, and only those.
        show_progress_bar: By default only if this package's logger is at INFO or below.

    Returns:
        What was done.

    Raises:
        MissingPackageError: pyarrow is not installed.
        InputError: An argument can't be used; a file is broken; `output` holds something else, such
            as a run with other settings or inputs.
        BadRowError: With `on_bad_row="error"`.
        TruncationError: With `truncation="error"`, a text is too long.
        WorkerError: Several processes died of one part.
        OSError: A file can't be read or written, or the disk is full, or has no room for all
            vectors. Finished parts stay.
    """
    pyarrow = import_pyarrow("writing Parquet files")
    check_positive_int(shard_rows, "shard_rows")
    check_positive_int(workers, "workers")
    check_unicode([column or ""], "column")
    check_unicode([embedding_column], "embedding_column")
    check_unicode([row_number or ""], "row_number")
    check_choice(on_bad_row, ON_BAD_ROW, "on_bad_row")
    check_choice(truncation, TRUNCATION, "truncation")
    check_choice(precision, (*PRECISIONS, "float16"), "precision")
    coded = "float32" if precision == "float16" else precision
    required_ranges(
        encoder, coded, truncate_dim, normalize_embeddings,
        f"precision is {precision!r}: this model has no fixed ranges, and those of one part would "
        "not be those of the next; write float32 and use quantize_embeddings",
    )  # fmt: skip
    folder = with_home(output)
    files = find_files(inputs, folder)
    _check_apart(files, inputs, folder)
    call: dict[str, Any] = {
        "prompt": prompt,
        "truncation": truncation,
        "truncate_dim": truncate_dim,
        "normalize_embeddings": normalize_embeddings,
        "precision": coded,
    }
    record = encoder.fingerprint(**call)
    # All parts use the model's settings of now, whatever other threads set meanwhile.
    call |= {"prompt": record.prompt, "truncate_dim": record.dimension}
    encoder = copy.copy(encoder)  # shares all but the settings
    made_with = {"torch": str(torch.__version__), "device": encoder.device.type}
    wanted = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "made_with": {
            "pyarrow": pyarrow.__version__,
            # What makes no difference to reproducible vectors is left out: any machine may go on,
            # and the manifest is the same too.
            **({} if encoder.reproducible else made_with),
        },
        "fingerprint": record.to_dict(),
        "settings": {
            "column": column,
            "embedding_column": embedding_column,
            "precision": precision,
            "shard_rows": shard_rows,
            "on_bad_row": on_bad_row,
            "row_number": row_number,
        },
    }
    options = call | {
        "truncation": without_warning(truncation),
        "batch_size": batch_size,
        "show_progress_bar": False,
    }
    with ShardFolder(folder) as shards:
        stats = [path.stat() for path in files]
        described = [
            {"name": str(path), "bytes": stat.st_size, "sha256": file_sha256(path)}
            for path, stat in zip(files, stats, strict=True)
        ]
        if shards.header is not None:
            try:
                differing = _differing(shards.header, wanted, described)
                if not (differing or shards.is_lost):
                    _layout(shards.header)
                    shards.check_parts()
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                differing = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                if not overwrite:
                    what = f"is not the record of this run, or broken: {differing}"
                    raise ConfigError(
                        shards.source, [f"{what}; pass --overwrite, or choose another folder"]
                    ) from error
            if differing and not overwrite:
                raise InputError(
                    f"{folder}: holds a run with another {differing}; repeat that one, choose "
                    "another folder, or pass --overwrite",
                    "output",
                )
            if differing:
                shards.clear()
        header, known = shards.header, shards.header or {}
        if header is None or shards.is_lost:
            with progress_bar(show_progress_bar, desc="Reading", unit=" rows") as bar:
                layout = survey(files, column, on_bad_row, bar.update)
            told = {name: known.get(name, value) for name, value in wanted.items()}
            header = _header(told, described, layout, on_bad_row)
        else:
            layout = _layout(header)
        _check_names(layout, embedding_column, row_number)
        _warn_of_tools(folder, [*layout.columns, embedding_column, row_number], precision)
        shards.begin(header)
        there = len(shards.done)
        missing = header["rows"]["written"] - sum(part.rows for part in shards.done.values())
        # Vectors are not compressed.
        check_room(folder, missing * stored_bytes(record.dimension, precision))
        if not shards.is_complete:
            run = _Parts(encoder, shards, files, layout, header, options)
            run.compute(workers, show_progress_bar)
            _check_unchanged(shards, files, stats, described)
            shards.finish()
        parts = [shards.done[number] for number in sorted(shards.done)]
    _warn(layout, parts, truncation, on_bad_row, encoder.max_seq_length)
    return FilesReport(
        output=folder,
        parts=len(parts),
        rows=sum(part.rows for part in parts),
        bad_rows=layout.bad,
        computed=len(parts) - there,
        tokens=sum(part.tokens for part in parts),
    )


@dataclass
class _Parts:
    """The parts of one run, computed from the rows of files and written."""

    encoder: SentenceEncoder
    shards: ShardFolder
    files: list[Path]
    layout: Layout
    header: dict[str, Any]
    options: dict[str, Any]
    characters: int = 0  # in the parts that are written
    flight: dict[int, tuple[Shard, list[int]]] = field(default_factory=dict)  # being computed

    def compute(self, workers: int, show: bool | None) -> None:
        """Compute and write all parts that are not there."""
        done = sum(part.tokens for part in self.shards.done.values())
        with ExitStack() as stack:
            bar = stack.enter_context(
                progress_bar(show, desc="Encoding", unit=" tokens", unit_scale=True, initial=done)
            )
            jobs = self._jobs()
            answers: Iterable[tuple[Job, Answer | Exception]]
            if workers == 1:
                answers = self._answers(jobs)
            else:
                pool = ProcessPool(self.encoder, [self.encoder.device] * workers)
                answers = stack.enter_context(pool).answers(embed, jobs, _ATTEMPTS)
            for job, answer in answers:
                shard, rows = self.flight.pop(job.key)
                if isinstance(answer, Exception):
                    raise self._explained(answer, shard, rows)
                part = self._write(shard, rows, answer)
                done += part.tokens
                if self.characters:
                    # The rest is assumed to have as many tokens a character as what was read.
                    bar.total = round(done / self.characters * self.layout.characters)
                bar.update(part.tokens)

    def _jobs(self) -> Iterator[Job]:
        settings = self.header["settings"]
        shards = read_shards(
            self.files, self.layout, settings["shard_rows"], settings["on_bad_row"]
        )
        for shard in shards:
            if shard.number in self.shards.done:
                self.characters += sum(map(len, shard.texts))
                continue
            # Each text is embedded once; `rows` has its number for every row.
            places = {text: place for place, text in enumerate(dict.fromkeys(shard.texts))}
            rows = [places[text] for text in shard.texts]
            self.flight[shard.number] = shard, rows
            yield Job(shard.number, (list(places), self.options), self._called(shard))

    def _called(self, shard: Shard) -> str:
        name = part_name(shard.number, self.header)
        if not shard.places:
            return name
        first, last = self._place(shard.places[0]), self._place(shard.places[-1])
        return f"{name} ({first} to {last})"

    def _place(self, place: tuple[int, int]) -> str:
        kind = "row" if self.layout.form == "parquet" else "line"
        return f"{self.files[place[0]]}: {kind} {place[1]}"

    def _answers(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Answer | Exception]]:
        """Answer as `ProcessPool.answers` does, in this process."""
        for job in jobs:
            try:
                answer: Answer | Exception = embed(self.encoder, *job.arguments)
            except (TruncationError, NotFiniteError) as error:
                answer = error
            yield job, answer

    def _explained(self, error: Exception, shard: Shard, rows: list[int]) -> Exception:
        """Return the error with the place of the first text that it is about."""
        if not isinstance(error, TruncationError | NotFiniteError):
            return error
        of_texts = set(error.rows)
        found = [row for row, place in enumerate(rows) if place in of_texts]
        where = self._place(shard.places[found[0]])
        if isinstance(error, TruncationError):
            limit = self.encoder.max_seq_length
            return TruncationError(f"{where}: would be cut at {limit} tokens", found)
        return NotFiniteError(found, f"that is {where}; {error.reason}")

    def _write(self, shard: Shard, rows: list[int], answer: Answer) -> Part:
        called, settings = f"{self._called(shard)}: ", self.header["settings"]
        vectors = as_stored(answer.vectors, settings["precision"], called)
        import pyarrow

        table, number = shard.table, settings.get("row_number")
        if number is not None:
            first = shard.number * settings["shard_rows"]
            numbers = pyarrow.array(range(first, first + len(rows)), pyarrow.int64())
            column = pyarrow.field(number, pyarrow.int64(), nullable=False)
            table = table.append_column(column, numbers)
        told = json.dumps(self.header["fingerprint"], ensure_ascii=False)
        table = with_vectors(table, settings["embedding_column"], vectors[rows], told)
        self.characters += sum(map(len, shard.texts))
        cut = [
            row for row, place in enumerate(rows) if answer.token_counts[place] > answer.kept[place]
        ]
        return self.shards.add(
            shard.number,
            part_name(shard.number, self.header),
            table,
            unique=len(answer.kept),
            tokens=sum(answer.kept),
            cut_rows=len(cut),
            cut_tokens=sum(answer.token_counts[rows[row]] for row in cut),
            cut_read=sum(answer.kept[rows[row]] for row in cut),
            cut_first=cut[0] if cut else -1,
        )


def _check_names(layout: Layout, embedding_column: str, row_number: str | None) -> None:
    """Refuse a new column of a name that the rows have."""
    names = {"embedding_column": embedding_column, "row_number": row_number}
    for argument, name in names.items():
        others = [*layout.columns, *(each for key, each in names.items() if key != argument)]
        if name is not None and name in others:
            option = f"--{argument.replace('_', '-')}"
            raise InputError(
                f"the rows have {name!r} already; choose another name with {option}", argument
            )


def _warn_of_tools(folder: Path, columns: Iterable[str | None], precision: str) -> None:
    """Warn of what tools, in November 2026, read otherwise than it is written."""
    keys = [each.partition("=")[0].lower() for each in folder.absolute().parts if "=" in each]
    for name in columns:
        if name is not None and name.lower() in keys:  # case doesn't count in DuckDB and Spark
            warnings.warn(
                f"{folder}: has {name!r} in its path, and the rows have a column {name!r}: DuckDB, "
                "ClickHouse and Spark put the value of the path in place of the column without a "
                "word, pyarrow raises an error; choose another path, or rename the column",
                stacklevel=caller_level(),
            )
    if precision == "binary":
        warnings.warn(
            "precision is 'binary': bits as int8, 128 less, as sentence-transformers has them; "
            "most tools can't read them, or find wrong neighbours; choose 'ubinary'",
            stacklevel=caller_level(),
        )


def _check_unchanged(
    shards: ShardFolder,
    files: list[Path],
    stats: list[os.stat_result],
    described: list[dict[str, Any]],
) -> None:
    """Remove all parts, and raise an error, if a file was changed while it was read."""
    problem = None
    for path, before, told in zip(files, stats, described, strict=True):
        now = path.stat()
        touched = (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)
        if touched and file_sha256(path) != told["sha256"]:
            problem = f"{path}: was changed while it was read"
    rows = sum(part.rows for part in shards.done.values())
    expected = (shards.header or {})["rows"]["written"]
    if problem is None and rows != expected:
        problem = (
            f"{shards.folder}: got {rows:,} rows, where the first reading of the files found "
            f"{expected:,}; were they changed?"
        )
    if problem is not None:
        shards.clear()
        raise InputError(f"{problem}; the parts were removed: run the same command again", "inputs")


def _check_apart(
    files: list[Path], inputs: str | os.PathLike[str] | Sequence[Any], folder: Path
) -> None:
    """Refuse an output that would be read as an input, now or when the run goes on."""
    whole = folder.resolve()
    given = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    for name in map(os.fspath, given):
        path = with_home(name)
        if path.is_dir() and whole.is_relative_to(path.resolve()):
            raise InputError(
                f"{folder}: is within {name}, which is read; write elsewhere", "output"
            )
    inside = [path for path in files if path.resolve().is_relative_to(whole)]
    if inside:
        raise InputError(f"{folder}: has {inside[0].name} in it, which is read", "output")


def _header(
    wanted: dict[str, Any], described: list[dict[str, Any]], layout: Layout, on_bad_row: str
) -> dict[str, Any]:
    """The manifest without its parts."""
    read = sum(layout.rows)
    return wanted | {
        "inputs": [
            each | {"rows": rows} for each, rows in zip(described, layout.rows, strict=True)
        ],
        "form": layout.form,
        "column": layout.column,
        "columns": layout.columns,
        "characters": layout.characters,
        "rows": {
            "read": read,
            "bad": layout.bad,
            "written": read - (layout.bad if on_bad_row == "skip" else 0),
        },
        "bad_rows": layout.examples,
    }


def _layout(header: dict[str, Any]) -> Layout:
    """Rebuild a `Layout` from a manifest.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: Something in it is missing, or is
            something else.
    """
    layout = Layout(
        form=header["form"],
        column=header["column"],
        columns=header["columns"],
        rows=[each["rows"] for each in header["inputs"]],
        characters=header["characters"],
        bad=header["rows"]["bad"],
        examples=header["bad_rows"],
    )
    texts = [layout.form, layout.column, *layout.examples, *layout.columns.values()]
    counts = [*layout.rows, layout.characters, *(header["rows"][n] for n in ("read", "written"))]
    counts.append(layout.bad)
    if {*map(type, texts)} - {str} or {*map(type, counts)} - {int} or min(counts) < 0:
        raise TypeError("a text or a count is something else")
    if sum(layout.rows) != header["rows"]["read"] or layout.column not in layout.columns:
        raise ValueError("its counts of rows, or its columns, contradict each other")
    return layout


def _differing(
    header: dict[str, Any], wanted: dict[str, Any], described: list[dict[str, Any]]
) -> str:
    """Say how a run that was begun differs from the one that is wanted; "" if it doesn't.

    Files may have been moved or renamed: only their contents count.
    """
    differing = []
    for name in ("settings", "fingerprint", "made_with"):
        before, now = header.get(name, {}), wanted[name]
        differing += [
            f"{key} ({before.get(key)!r} there, {value!r} now)"
            for key, value in now.items()
            if before.get(key) != value and not _is_the_same(name, key, header, value)
        ]
    if header.get("format_version") not in (1, wanted["format_version"]):
        differing.append(f"format_version ({header.get('format_version')!r} there)")
    inputs = header.get("inputs", [])
    if isinstance(inputs, dict):  # what the parts know, see `run_of`
        same = inputs == run_of({"inputs": described})["inputs"]
        return "; ".join(differing if same else [*differing, "content of the input files"])
    before = [(each["sha256"], each["name"]) for each in inputs]
    now = [(each["sha256"], each["name"]) for each in described]
    if len(before) != len(now):
        differing.append(f"number of input files ({len(before)} there, {len(now)} now)")
    else:
        changed = [b[1] for a, b in zip(before, now, strict=True) if a[0] != b[0]]
        if changed:
            differing.append(f"content of {changed[0]}")
    return "; ".join(differing)


def _is_the_same(name: str, key: str, header: dict[str, Any], value: Any) -> bool:
    """Whether a different value means the same: a model's name, or a column by default."""
    if (name, key) == ("fingerprint", "model"):
        return True
    return (name, key) == ("settings", "column") and (value or DEFAULT_COLUMN) == header["column"]


def _warn(layout: Layout, parts: list[Part], truncation: str, on_bad_row: str, limit: int) -> None:
    """Warn once about all bad rows, and once, or raise an error, about all texts that were cut."""
    if layout.bad:
        how = "left out" if on_bad_row == "skip" else "read as empty texts"
        more = layout.bad - len(layout.examples)
        which = "; ".join(layout.examples) + (f"; and {more:,} more" if more else "")
        warnings.warn(
            f"{layout.bad:,} of {sum(layout.rows):,} rows are bad and were {how}: {which}",
            BadRowWarning,
            stacklevel=caller_level(),
        )
    before, whole = 0, TruncationSummary()
    for part in parts:
        first = before + part.cut_first
        whole += TruncationSummary(
            part.rows, part.cut_rows, part.cut_tokens, part.cut_read, first, limit
        )
        before += part.rows
    if truncation == "warn":
        warn_of(whole)
    elif truncation == "error" and whole.rows:  # in parts that were there
        raise TruncationError(whole.message(), [whole.first])

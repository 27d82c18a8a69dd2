"""Is a folder of Parquet files whole, and are its vectors this encoder's? `minilm check OUTPUT`.

In: an encoder, and a folder that `files/streaming.py` or another program wrote. Out: a
`FolderCheck`: what differs from the manifest, and what `check.py` finds in a sample of the rows.
Memory holds one file at a time.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from minilm.encoder import SentenceEncoder
from minilm.errors import InputError
from minilm.files.arrow import text_column, texts_of, vector_column, vectors_of
from minilm.files.records import read_fingerprint
from minilm.files.shards import manifest_path, part_paths, verify_parts
from minilm.files.sources import readable
from minilm.inputs import check_positive_int
from minilm.parity.check import LONGEST, CheckResult, check_vectors
from minilm.report import jsonable

__all__ = ["FolderCheck", "check_folder"]


@dataclass(frozen=True)
class FolderCheck:
    """What `check_folder` found.

    Attributes:
        folder: The folder.
        parts: How many Parquet files it has.
        rows: How many rows those have together.
        has_manifest: Whether there was one to compare with.
        has_record: Whether the parts could be compared at least with what they know themselves.
        problems: The differences from the manifest, or from that, one sentence each.
        result: The verdict on the vectors of the parts that are whole; None if these have no row.
    """

    folder: Path
    parts: int
    rows: int
    has_manifest: bool
    has_record: bool
    problems: tuple[str, ...]
    result: CheckResult | None

    @property
    def is_compatible(self) -> bool:
        """Whether the folder is complete, and can be searched with this encoder."""
        return not self.problems and (self.result is None or self.result.is_compatible)

    @property
    def summary(self) -> str:
        """The finding on the files in one line."""
        if self.problems:
            count = len(self.problems)
            finding = f"{count:,} problem{'' if count == 1 else 's'}"
        elif self.has_manifest:
            finding = "all as the manifest says, by hash and number of rows"
        elif self.has_record:
            finding = (
                "all there and whole as the parts themselves say; the manifest, which has their "
                f"hashes, is not at {manifest_path(self.folder)}"
            )
        else:
            finding = "no manifest to compare with"
        parts = f"{self.parts:,} part{'' if self.parts == 1 else 's'}"
        return f"{self.folder}: {self.rows:,} rows in {parts}: {finding}"

    def table(self) -> str:
        """The finding as text."""
        lines = [self.summary, *(f"  - {problem}" for problem in self.problems)]
        return "\n".join([*lines, self.result.table() if self.result else "there are no vectors"])

    def to_dict(self) -> dict[str, Any]:
        """The finding as an object for JSON."""
        found = {name: value for name, value in vars(self).items() if name != "folder"}
        return {"summary": self.summary, **jsonable(found)}


def check_folder(
    encoder: SentenceEncoder,
    folder: Path,
    *,
    column: str | None = None,
    sample: int = 256,
) -> FolderCheck:
    """Verify a folder against its manifest, and embed some of its texts again.

    If the manifest is lost, the folder is verified by what its parts know, and the summary says so.

    Args:
        encoder: The model that its vectors should be searched with.
        folder: A folder that `encode_files` wrote; or one of other Parquet files, of which only
            the vectors are checked.
        column: The name of the texts; by default what the manifest says, "text", or the only one.
        sample: How many rows to check, evenly spread, and with them the longest texts.

    Raises:
        MissingPackageError: pyarrow is not installed.
        InputError: There is no Parquet file, or none of its columns are texts and vectors.
        ConfigError: The manifest is broken.
    """
    check_positive_int(sample, "sample")
    header, problems, damaged, source = verify_parts(folder)
    import pyarrow.parquet

    counts: dict[Path, int] = {}
    for path in part_paths(folder):
        try:
            counts[path] = pyarrow.parquet.read_metadata(path).num_rows
        except (ValueError, OSError) as error:
            if header is None:
                raise InputError(f"{path}: can't be read as Parquet: {error}", "folder") from error
    if not counts and not problems:
        raise InputError(f"{folder}: has no Parquet file in it", "folder")
    result = None
    whole = [count for path, count in counts.items() if path.name not in damaged]
    if sum(whole):
        result = _sampled(encoder, counts, damaged, header or {}, column, sample)
    return FolderCheck(
        folder=folder,
        parts=len(counts),
        rows=sum(counts.values()),
        has_manifest=source is not None,
        has_record=header is not None,
        problems=tuple(problems),
        result=result,
    )


def _sampled(
    encoder: SentenceEncoder,
    counts: dict[Path, int],
    damaged: set[str],
    header: dict[str, Any],
    column: str | None,
    sample: int,
) -> CheckResult:
    import pyarrow.parquet

    paths = list(counts)
    whole = [path for path in paths if path.name not in damaged and counts[path]]
    first = readable(whole[0], lambda: pyarrow.parquet.read_schema(whole[0]))
    place = str(whole[0])
    vectors = header.get("settings", {}).get("embedding_column") or vector_column(first, place)
    name = text_column(first, column or header.get("column"), place, vectors)
    starts = [0, *accumulate(counts.values())]
    total = starts[-1]
    first_row = dict(zip(paths, starts, strict=False))
    rows = set(range(total))
    if total > sample:
        rows = {number * total // sample for number in range(sample)}
        rows |= _longest(whole, name, first_row)
    texts: list[str] = []
    found: list[np.ndarray[Any, Any]] = []
    of_part: dict[int, list[int]] = {}
    for row in sorted(rows | {first_row[whole[0]]}):
        number = bisect_right(starts, row) - 1
        if paths[number] in whole:
            of_part.setdefault(number, []).append(row)
    for number, chosen in of_part.items():
        path = paths[number]
        read = partial(pyarrow.parquet.read_table, path, columns=[name, vectors])
        in_part = [row - starts[number] for row in chosen]
        table = readable(path, read).take(in_part)
        texts += texts_of(table, name, str(path), in_part)
        found.append(vectors_of(table, vectors, str(path)))
    stored = np.concatenate(found)
    recorded = read_fingerprint(whole[0])
    result = check_vectors(encoder, texts, stored, recorded, sample=len(texts))
    order = [row for chosen in of_part.values() for row in chosen]
    return replace(
        result,
        rows=total,
        worst=tuple((order[row], difference) for row, difference in result.worst),
    )


def _longest(paths: list[Path], name: str, first_row: dict[Path, int]) -> set[int]:
    """The rows of the longest texts, which alone show another limit."""
    lengths = (
        (len((text or "").encode("utf-8", "replace")), -row)
        for path in paths
        for row, text in enumerate(_texts(path, name), first_row[path])
    )
    return {-row for _, row in heapq.nlargest(LONGEST, lengths)}


def _texts(path: Path, name: str) -> Iterator[str | None]:
    import pyarrow.parquet

    with readable(path, lambda: pyarrow.parquet.ParquetFile(path)) as file:
        batches = file.iter_batches(columns=[name])
        while (batch := readable(path, lambda: next(batches, None))) is not None:
            yield from readable(path, batch.column(0).to_pylist)

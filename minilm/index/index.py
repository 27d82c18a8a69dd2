"""A corpus in a folder: its vectors, the texts beside them, and the model that made them.

In: embeddings and rows, added as often as one likes. Out: for each query the rows that are nearest,
exactly as `search.py` finds them. The folder::

    index.json                     which model, and the segments with size and SHA-256 of each file
    segment-00000/vectors.npy      float32 [rows, d], memory-mapped
    segment-00000/lengths.npy      float32 [rows], so that a search reads the vectors once
    segment-00000/rows.jsonl       a row a line, an object
    segment-00000/offsets.npy      int64 [rows + 1], where in rows.jsonl each begins
    segment-00000/binary.npy       and int8.npy: codes, if wanted
    segment-00001/...

A segment is written completely, under another name, before index.json is replaced by one that
lists it. So whatever happens, the index is the old one or the new one; what an interrupted call
left is ignored, and removed by the next call that writes. Readers keep what they have opened. Small
segments are merged when more is added, so that there are never many.

Exact search takes time in proportion to the rows. README.md shows how another library, here faiss,
makes an approximate index of many millions.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from minilm.disk import absolute, lock_folder, sync_folder
from minilm.errors import ConfigError, InputError, InputTypeError
from minilm.index.segments import (
    LOCK,
    MANIFEST,
    Block,
    Manifest,
    Row,
    Segment,
    commit,
    damages,
    extended,
    float_vectors,
    is_ours,
    lost_segments,
    read_manifest,
    remove_leftovers,
    size_problem,
)  # fmt: skip
from minilm.inputs import check_choice, check_positive_int
from minilm.outputs import check_folder
from minilm.pretrained.fingerprint import Fingerprint, compare
from minilm.quantize import has_model_ranges
from minilm.similarity import Embeddings, cos_sim
from minilm.tasks.rescoring import ROWS, by_codes, rescore
from minilm.tasks.search import Best, Scores

__all__ = ["Hit", "Index"]

_Array = np.ndarray[Any, Any]
_CODES = ("int8", "binary")


class Hit(TypedDict):
    """One result of a search: which row of the index, its score, and the row."""

    corpus_id: int
    score: float
    row: dict[str, Any]


class Index:
    """Vectors and their rows in a folder. Opening one reads no vector.

    Attributes:
        folder: Where it is.
        fingerprint: The record of the model that made the vectors; None if it was not given.
        dimension: Numbers in a vector; None before there is one.
        column: The name of the text in the rows.
        codes: Which codes are kept beside the vectors: "int8", "binary", both or none.

    Example:
        index = Index.create("index", encoder.fingerprint())
        index.add(encoder.encode(texts), texts, fingerprint=encoder.fingerprint())
        [hits] = index.search(encoder.encode("a query"), fingerprint=encoder.fingerprint())
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self._use(manifest)

    def _use(self, manifest: Manifest) -> None:
        problems = [
            f"{entry.name}/{name} {problem}; build the index again"
            for entry in manifest.segments
            for name, file in entry.files.items()
            if (problem := size_problem(self.folder / entry.name / name, file["bytes"]))
        ]
        if problems:
            raise ConfigError(self.folder / MANIFEST, problems)
        segments, first = [], 0
        for entry in manifest.segments:
            segments.append(Segment(self.folder, entry, first, manifest.dimension or 0))
            first += segments[-1].count
        # Only now, so that after an error the index is as it was.
        self._manifest, self._segments, self._count = manifest, segments, first
        self.fingerprint, self.dimension = manifest.fingerprint, manifest.dimension
        self.column, self.codes = manifest.column, manifest.codes

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        fingerprint: Fingerprint | None,
        blocks: Iterable[Block] = (),
        *,
        column: str = "text",
        codes: Sequence[str] = (),
    ) -> "Index":
        """Make an index in a new or empty folder, with these blocks in it, all or nothing.

        Args:
            folder: Where to; its parent must exist.
            fingerprint: Which model makes its vectors, see `Fingerprint.for_call`. None stands for
                an unknown model, and fits None only.
            blocks: Embeddings `[n, d]` and n rows each, as for `add`, written one after the other,
                so that memory holds one at a time.
            column: The name of the text in the rows.
            codes: "int8" and "binary": keep these codes too, for `search` with `precision`.

        Raises:
            InputError: Something is in the folder, also segments of an index that lost its
                index.json; it can't be written to, another process is
                writing there, or the model has no `model_ranges` for int8 codes; or as in `add`.
            OSError: The folder can't be written to, or the disk is full.
        """
        path = absolute(folder)
        for each in codes:
            check_choice(each, _CODES, "codes")
        _check_int8(fingerprint, codes)
        dimension = None if fingerprint is None else fingerprint.dimension
        manifest = Manifest(fingerprint, dimension, column, tuple(dict.fromkeys(codes)), 0, ())
        if path.parent.exists():  # else mkdir says that it is missing
            check_folder(path, "folder")
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
        with lock_folder(path, LOCK, "folder"):
            foreign = [each.name for each in path.iterdir() if not is_ours(each.name)]
            if foreign:
                what = "an index" if MANIFEST in foreign else f"{sorted(foreign)[0]!r}"
                raise InputError(
                    f"{path} has {what} in it already; add to it, or choose a new folder", "folder"
                )
            _check_not_lost(path)
            remove_leftovers(path, manifest)
            manifest = extended(path, manifest, [], blocks)
            commit(path, manifest)
        return cls(path, manifest)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Index":
        """Open an index as it is now, whatever others add to it meanwhile.

        Raises:
            InputError: There is none.
            ConfigError: Its index.json is broken, or a file is missing or has another size; every
                problem is listed. `verify` also reads the files.
        """
        path = absolute(folder)
        _check_is_index(path)
        while True:
            manifest = read_manifest(path)
            try:
                return cls(path, manifest)
            except ConfigError:
                # Another process may just have merged a segment into a larger one.
                if read_manifest(path) == manifest:
                    raise

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        model = "an unknown model" if self.fingerprint is None else str(self.fingerprint)
        return f"Index({str(self.folder)!r}: {len(self):,} rows of {model})"

    @property
    def vectors(self) -> list[_Array]:
        """The vectors in order, float32 `[rows, d]` each, memory-mapped and read-only."""
        return [segment.vectors for segment in self._segments]

    @property
    def row_files(self) -> tuple[list[Path], list[dict[str, Any]]]:
        """The files of the rows in order, an object a line; and a record of each, and of each file
        of vectors: its name, bytes, SHA-256 and rows.
        """
        files = [segment.path / "rows.jsonl" for segment in self._segments]
        records = [
            {"name": f"{entry.name}/{name}", **entry.files[name], "rows": entry.rows}
            for entry in self._manifest.segments
            for name in ("rows.jsonl", "vectors.npy")
        ]
        return files, records

    def row(self, i: int) -> dict[str, Any]:
        """Return the row that was added as number i, counted from 0.

        Raises:
            InputError: There is none.
        """
        segment = self._segment_of(i)
        return segment.row(i - segment.first)

    def vector(self, i: int) -> _Array:
        """Return the vector of row i, float32 `[d]`. Errors as in `row`."""
        segment = self._segment_of(i)
        vector: _Array = segment.vectors[i - segment.first].copy()
        return vector

    def _segment_of(self, i: int) -> Segment:
        if not 0 <= i < len(self):
            raise InputError(f"i is {i}; the index has {len(self):,} rows, from 0", "i")
        return self._segments[bisect_right(self._segments, i, key=lambda each: each.first) - 1]

    def add(
        self, embeddings: Embeddings, rows: Sequence[Row], *, fingerprint: Fingerprint | None
    ) -> None:
        """Append vectors with their rows, all or nothing.

        Threads that add to one folder wait for each other, even if each has an `Index`.

        Args:
            embeddings: `[n, d]`, floating point; kept as float32.
            rows: n texts, or mappings that JSON can hold. Nothing in them need be unique.
            fingerprint: Which model made the vectors. It must be that of the index, except for
                fields that only change the rounding.

        Raises:
            InputError: The fingerprint is that of another model, the width is another, the
                numbers of vectors and of rows differ, a vector has a number that is not finite, or
                another process is writing.
            InputTypeError: The embeddings are codes or not numbers, or a row is neither a string
                nor a mapping that JSON can hold.
            OSError: It can't be written, for example because the disk is full.
        """
        self.extend([(embeddings, rows)], fingerprint=fingerprint)

    def extend(self, blocks: Iterable[Block], *, fingerprint: Fingerprint | None) -> None:
        """Add blocks of vectors and rows, all or nothing; memory holds one at a time.

        Args:
            blocks: Embeddings and rows as for `add`, for example from a generator that encodes.
            fingerprint: As for `add`.

        Raises:
            InputError, InputTypeError, OSError: As in `add`.
        """
        _check_same(self.folder, self.fingerprint, fingerprint, "add vectors")
        _check_is_index(self.folder)
        with lock_folder(self.folder, LOCK, "folder"):
            manifest = read_manifest(self.folder)  # another process may have added
            if manifest != self._manifest:
                self._use(manifest)
                # Or it has made the index anew.
                _check_same(self.folder, self.fingerprint, fingerprint, "add vectors")
            remove_leftovers(self.folder, manifest)
            longer = extended(self.folder, manifest, self._segments, blocks)
            if longer != manifest:
                commit(self.folder, longer)
                self._use(longer)
                remove_leftovers(self.folder, longer)

    def search(
        self,
        query_embeddings: Embeddings,
        top_k: int = 10,
        *,
        fingerprint: Fingerprint | None,
        precision: str = "float32",
        rescore_multiplier: int = 4,
    ) -> list[list[Hit]]:
        """Find the rows whose vectors have the largest cosines with each query.

        Args:
            query_embeddings: `[n, d]`, or one vector `[d]`, floating point.
            top_k: Results for each query, fewer if the index has fewer.
            fingerprint: Which model made the queries. It must be that of the index, except for
                fields that only change the rounding, the prompt and the truncation: queries may
                have a prompt of their own.
            precision: "float32" reads all vectors and is exact. "int8" or "binary" reads those
                codes, and the vectors of `top_k * rescore_multiplier` candidates only, see
                `quantized_search`; the index must have been created with them.
            rescore_multiplier: Candidates for each result.

        Returns:
            For each query a list of `{"corpus_id": int, "score": float, "row": dict}`, the best
            first; of equal scores, the smaller `corpus_id` first. The score is the exact cosine.

        Raises:
            InputError: The fingerprint is that of another model, the width is another, a query has
                a number that is not finite, the index has no such codes, or a size is not positive.
            InputTypeError: The queries are not numbers, or a size is not an integer.
        """
        top_k = check_positive_int(top_k, "top_k")
        multiplier = check_positive_int(rescore_multiplier, "rescore_multiplier")
        check_choice(precision, ("float32", *_CODES), "precision")
        if precision != "float32" and precision not in self.codes:
            raise InputError(
                f"precision is {precision!r}, and {self.folder} has codes of "
                f"{' and '.join(self.codes) or 'no kind'}; create it with codes=[{precision!r}]",
                "precision",
            )
        query = fingerprint
        if isinstance(query, Fingerprint) and self.fingerprint is not None:
            ours = self.fingerprint  # queries may have a prompt and a truncation of their own
            query = replace(query, prompt=ours.prompt, truncation=ours.truncation)
        _check_same(self.folder, self.fingerprint, query, "search with queries")
        queries = float_vectors(query_embeddings, self.dimension, "query_embeddings").cpu()
        names = ("query_embeddings", str(self.folder))
        segments, count = self._segments, len(self)  # another thread may be adding
        exact = [
            Scores(queries, segment.tensor, cos_sim, names, segment.lengths) for segment in segments
        ]
        by_code = [
            by_codes(queries, segment.codes[precision], precision)
            for segment in (segments if precision != "float32" else ())
        ]
        results: list[list[Hit]] = []
        for rows in Scores(queries, queries[:0], cos_sim, names).chunks():
            best = Best(rows.stop - rows.start, top_k * (multiplier if by_code else 1))
            for scores, segment in zip(by_code or exact, segments, strict=True):
                scores.improve(best, rows, ROWS if by_code else count, segment.first)
            if by_code:
                candidates, best = best, Best(best.queries, top_k)
                for scores, segment in zip(exact, segments, strict=True):
                    rescore(scores, candidates, best, rows, segment.first, names[1])
            results += [
                [{"corpus_id": i, "score": score, "row": self.row(i)} for i, score in found]
                for found in best.results()
            ]
        return results

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with that in index.json.

        Raises:
            ConfigError: Files have other contents, or are missing; all are listed.
        """
        entries = self._manifest.segments
        problems = [problem for entry in entries for problem in damages(self.folder, entry)]
        if problems:
            raise ConfigError(self.folder / MANIFEST, problems)


# --- who may add and search


def _check_not_lost(folder: Path) -> None:
    lost = lost_segments(folder)
    if lost:
        raise InputError(
            f"{folder} has {lost[0]} and no {MANIFEST}: an index that lost it, or one that was "
            f"interrupted in its last step; restore {MANIFEST} from a copy, or remove the folder "
            "and build the index again",
            "folder",
        )


def _check_is_index(folder: Path) -> None:
    _check_not_lost(folder)
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder} is not an index, it has no {MANIFEST}; make one with Index.create or "
            "`minilm index build`",
            "folder",
        )


def _check_same(
    folder: Path, ours: Fingerprint | None, theirs: Fingerprint | None, what: str
) -> None:
    if ours is None or theirs is None:
        if ours is not theirs:
            raise InputError(
                f"fingerprint is {theirs}, that of the index {folder} is {ours}; can't {what}: "
                "pass that of the model that made them, and the same for all vectors of an index",
                "fingerprint",
            )
        return
    if not isinstance(theirs, Fingerprint):
        raise InputTypeError(
            f"fingerprint is of type {type(theirs).__name__}; pass encoder.fingerprint()",
            "fingerprint",
        )
    comparison = compare(ours, theirs)
    if not comparison.is_compatible:
        differing = "; ".join(
            f"{name}: {a!r}, not {b!r}" for name, (a, b) in comparison.differing.items()
        )
        raise InputError(
            f"can't {what} of {theirs}: the index {folder} was made by {ours} ({differing}); use "
            "that model, or build another index with this one",
            "fingerprint",
        )


def _check_int8(fingerprint: Fingerprint | None, codes: Sequence[str]) -> None:
    is_known = (
        fingerprint is not None
        and has_model_ranges(fingerprint.weights_sha256)
        and fingerprint.normalize
        and fingerprint.dimension == 384
    )
    if "int8" in codes and not is_known:
        raise InputError(
            "codes has 'int8', whose fixed ranges are those of the published model's whole "
            "vectors; take 'binary', or none",
            "codes",
        )

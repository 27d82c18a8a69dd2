"""Texts in an index, and found again: what `minilm index` does, as four functions.

In: an encoder, and rows of files or queries. Out: a `minilm.index.Index`, and the rows nearest to a
query. `Index` knows vectors only; here are the texts, with the prompts that a model has for
documents and queries, embedded some thousand at a time.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilm.encoder import SentenceEncoder
from minilm.errors import InputError
from minilm.files.rows import as_json, column_of
from minilm.files.tables import Table
from minilm.index import Hit, Index
from minilm.inference.compute import Plan
from minilm.inference.encode import plan_of, prompt_for, run_plan
from minilm.inference.truncation import TruncationSummary, warn_of, without_warning
from minilm.inputs import as_many, as_rows, check_positive_int, check_unicode, with_progress
from minilm.outputs import check_room
from minilm.parity.check import CheckResult, check_vectors
from minilm.pretrained.fingerprint import fingerprint_of

__all__ = ["add_to_index", "build_index", "check_index", "search_index", "text_of"]

_BLOCK = 4096  # texts that are embedded and added at a time


def build_index(
    encoder: SentenceEncoder,
    folder: str | os.PathLike[str],
    table: Table,
    *,
    column: str | None = None,
    prompt: str | None = None,
    truncation: str = "warn",
    codes: Sequence[str] = (),
    show_progress_bar: bool | None = None,
) -> Index:
    """Embed the texts of a table into a new index.

    Args:
        encoder: The model.
        folder: The index's folder, new or empty.
        table: The rows, see `minilm.files.tables.read_table`.
        column: The name of the text in them.
        prompt: What to put in front of every text; by default the model's prompt for documents.
        truncation: As in `encode`, with one warning for all texts.
        codes: "int8" and "binary", see `Index.create`.
        show_progress_bar: By default only if this package's logger is at INFO or below.

    Raises:
        InputError, OSError: As in `Index.create` and `encode`; at most an empty folder is left.
    """
    name = column or "text"
    if table.rows:
        name = column_of(list(table.rows[0]), column, "table.rows[0]", "column")
    check_unicode([name], "column")
    plan = _plan(encoder, "document", prompt, truncation)
    _check_room(Path(folder), encoder, table)
    return Index.create(
        folder,
        fingerprint_of(encoder, plan),
        _blocks(encoder, table, name, plan, show_progress_bar),
        column=name,
        codes=codes,
    )


def add_to_index(
    encoder: SentenceEncoder,
    index: Index,
    table: Table,
    *,
    prompt: str | None = None,
    truncation: str = "warn",
    show_progress_bar: bool | None = None,
) -> None:
    """Embed the texts of a table, and append them to an index, all or nothing.

    Args:
        encoder: The model that made the index.
        index: The index. A row whose text has another name also gets it under `index.column`.
        table, prompt, truncation, show_progress_bar: As in `build_index`.

    Raises:
        InputError: It was made by another model; a row has something else under that name; or as
            in `Index.add` and `encode`.
    """
    plan = _plan(encoder, "document", prompt, truncation)
    _check_room(index.folder, encoder, table)
    index.extend(
        _blocks(encoder, table, index.column, plan, show_progress_bar),
        fingerprint=fingerprint_of(encoder, plan),
    )


def search_index(
    encoder: SentenceEncoder,
    index: Index,
    queries: Sequence[str],
    top_k: int = 10,
    *,
    prompt: str | None = None,
    precision: str = "float32",
    rescore_multiplier: int = 4,
) -> list[list[Hit]]:
    """Find the rows of an index that are nearest to each query.

    Args:
        encoder: The model that made the index.
        index: The index.
        queries: n texts.
        prompt: What to put in front of each; by default the model's prompt for queries.
        top_k, precision, rescore_multiplier: As in `Index.search`.

    Raises:
        InputError, InputTypeError: As in `Index.search` and `encode`.
    """
    texts = as_many(queries, "queries")
    plan = _plan(encoder, "query", prompt)
    return index.search(
        run_plan(encoder, [*texts], plan)[0],
        top_k,
        fingerprint=fingerprint_of(encoder, plan),
        precision=precision,
        rescore_multiplier=rescore_multiplier,
    )


def check_index(encoder: SentenceEncoder, index: Index, sample: int = 256) -> CheckResult | None:
    """Check that an index is as it was written, and can be searched with this model.

    Args:
        encoder: The model.
        index: The index. Every file is compared with its SHA-256.
        sample: How many rows are embedded again, evenly spread.

    Returns:
        The result of `check_vectors` for those rows; None for an empty index.

    Raises:
        ConfigError: A file has other contents than were written.
    """
    index.verify()
    if not len(index):
        return None
    count, sample = len(index), check_positive_int(sample, "sample")
    rows = sorted({number * count // sample for number in range(sample)})
    texts = [text_of(index.row(i), index.column) for i in rows]
    vectors = [index.vector(i) for i in rows]
    return check_vectors(encoder, texts, vectors, index.fingerprint, sample=len(rows))


def text_of(row: dict[str, Any], column: str) -> str:
    """The text of a row, or the whole row as JSON if it has none."""
    text = row.get(column)
    return text if isinstance(text, str) else as_json(row)


def _plan(
    encoder: SentenceEncoder, task: str, prompt: str | None, truncation: str = "warn"
) -> Plan:
    """The plan for all blocks, with the prompt of `encode_query` or `encode_document`."""
    name = None if prompt is not None else prompt_for(task, encoder.prompts)
    return plan_of(encoder, "sentences", prompt=prompt, prompt_name=name, truncation=truncation)


def _check_room(folder: Path, encoder: SentenceEncoder, table: Table) -> None:
    width = encoder.get_sentence_embedding_dimension()
    if folder.parent.is_dir():
        check_room(folder, len(table.texts) * width * 4)


def _blocks(
    encoder: SentenceEncoder,
    table: Table,
    column: str,
    plan: Plan,
    show_progress_bar: bool | None,
) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Yield vectors and rows, some thousand at a time; warn of what was cut at the end."""
    for text, row in zip(table.texts, table.rows, strict=True):
        _with_text(text, row, column)  # raises its error before anything is computed
    cut = TruncationSummary()
    truncation = without_warning(plan.truncation)
    quiet = replace(plan, truncation=truncation, show_progress_bar=False)
    starts = range(0, len(table.texts), _BLOCK)
    for start in with_progress(starts, show_progress_bar):
        texts = table.texts[start : start + _BLOCK]
        embeddings, report = run_plan(encoder, as_rows(texts)[0], quiet)
        cut += TruncationSummary.from_counts(report.token_counts, report.kept_token_counts, start)
        rows = table.rows[start : start + _BLOCK]
        yield embeddings, [_with_text(*each, column) for each in zip(texts, rows, strict=True)]
    if plan.truncation == "warn":
        warn_of(cut)


def _with_text(text: str, row: dict[str, Any], column: str) -> dict[str, Any]:
    """A copy of the row with its text under the name that the index has for it."""
    row = {**row}
    if row.setdefault(column, text) != text:
        raise InputError(
            f"the index has its texts under {column!r}, where a row has "
            f"{as_json(row[column])[:40]} and {as_json(text)[:40]} is its text; rename that "
            "column, or build another index",
            "column",
        )
    return row

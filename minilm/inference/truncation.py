"""What is done about text beyond the limit: told, counted, or read after all, in windows.

In: texts and the tokenizer. Out: a `TruncationWarning` or a `TruncationError` that adds up what was
cut; an `EncodeReport` that tells it of each text; or the spans of overlapping windows that cover
the text. Next: `encode.py`.

The model reads 256 tokens, some 180 English words. Most programs drop the rest without a word. A
window ends where a sentence does, if one ends in its second half, else between two words. The next
one begins some 32 tokens before that end, so that what stands there is read in its context too.
"""

import re
import sys
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from minilm.errors import TruncationError, TruncationWarning
from minilm.inputs import Row
from minilm.tokenizer import WordPieceTokenizer

__all__ = [
    "TRUNCATION",
    "EncodeReport",
    "TextWindow",
    "TruncationSummary",
    "caller_level",
    "kept_span",
    "raise_if_cut",
    "split",
    "warn_if_cut",
    "warn_of",
    "without_warning",
]

# What `encode(truncation=...)` may be.
TRUNCATION = ("warn", "error", "silent", "chunk")

_OVERLAP = 32  # tokens; for a small limit an eighth of it

# Where a sentence begins: behind a full stop and blanks, a line's end, or a full stop of Chinese.
_SENTENCE = re.compile(r"[.!?…]['\")\]»”’]*\s+|\s*\n\s*|[。！？]['\")\]»”’]*")

Span = tuple[int, int]


@dataclass(frozen=True)
class EncodeReport:
    """How much of each text was read.

    Attributes:
        token_counts: How many tokens each text has, the prompt's, [CLS] and [SEP] included.
        kept_token_counts: How many of them were read.
        kept_spans: From which character to which each was read, the end exclusive, without the
            prompt; of a pair, two spans.
        windows: In how many windows each was read: 1, unless `truncation="chunk"`.
    """

    token_counts: tuple[int, ...]
    kept_token_counts: tuple[int, ...]
    kept_spans: tuple[Span | tuple[Span, Span], ...]
    windows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token_counts)

    @property
    def cut_rows(self) -> list[int]:
        """The rows of which something was not read."""
        kept = self.kept_token_counts
        return [row for row, count in enumerate(self.token_counts) if count > kept[row]]


@dataclass(frozen=True)
class TextWindow:
    """A part of a text that was read at once, with its vector.

    Attributes:
        start, end: Which characters of the text it is, `end` exclusive.
        text: These characters.
        token_count: How many tokens it has, the prompt's, [CLS] and [SEP] included.
        embedding: float32 `[384]`: what `encode(text)` gives.
    """

    start: int
    end: int
    text: str
    token_count: int
    embedding: "np.ndarray[Any, Any]"


def caller_level() -> int:
    """Return the `stacklevel` of the first caller outside this package, seen from the caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    return level


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "minilm"


@dataclass(frozen=True)
class TruncationSummary:
    """How much of some texts was not read, added up; more texts can be added with +.

    Attributes:
        texts: How many texts there are.
        rows: How many of them are too long.
        tokens, read: How many tokens those have, and how many of them are read.
        first: The row of the first.
        limit: At how many tokens it is cut.
    """

    texts: int = 0
    rows: int = 0
    tokens: int = 0
    read: int = 0
    first: int = -1
    limit: int = 0

    @classmethod
    def from_counts(
        cls, counts: Sequence[int], kept: Sequence[int], first_row: int = 0
    ) -> "TruncationSummary":
        """Add up what was cut of texts; see `warn_if_cut` for the arguments."""
        cut = [row for row, count in enumerate(counts) if count > kept[row]]
        if not cut:
            return cls(len(counts))
        return cls(
            texts=len(counts),
            rows=len(cut),
            tokens=sum(counts[row] for row in cut),
            read=sum(kept[row] for row in cut),
            first=first_row + cut[0],
            limit=kept[cut[0]],
        )

    def __add__(self, later: "TruncationSummary") -> "TruncationSummary":
        first = self if self.rows else later
        return TruncationSummary(
            self.texts + later.texts,
            self.rows + later.rows,
            self.tokens + later.tokens,
            self.read + later.read,
            first.first,
            first.limit,
        )

    def message(self, verb: str = "were") -> str:
        """Return the summary as one sentence, for a warning or an error."""
        return (
            f"{self.rows:,} of {self.texts:,} texts {verb} cut at {self.limit} tokens; "
            f"{100 * (1 - self.read / self.tokens):.0f} % of their tokens were not read; "
            f"first: row {self.first}"
        )


def warn_if_cut(counts: Sequence[int], kept: Sequence[int], first_row: int = 0) -> None:
    """Issue one `TruncationWarning` that adds up all that was cut; none if nothing was.

    Args:
        counts: How many tokens each text has.
        kept: How many of them are read.
        first_row: The number of the first text in what the user passed.
    """
    warn_of(TruncationSummary.from_counts(counts, kept, first_row))


def warn_of(cut: TruncationSummary) -> None:
    """Issue the `TruncationWarning` for a summary; none if nothing was cut."""
    if cut.rows:
        warnings.warn(cut.message(), TruncationWarning, stacklevel=caller_level())


def without_warning(truncation: str) -> str:
    """The same option for a part of many texts, where the caller warns once, of all of them."""
    return "silent" if truncation == "warn" else truncation


def raise_if_cut(counts: Sequence[int], kept: Sequence[int], first_row: int = 0) -> None:
    """Raise an error where `warn_if_cut` would warn.

    Raises:
        TruncationError: A text would be cut; it has the rows.
    """
    cut = TruncationSummary.from_counts(counts, kept, first_row)
    if cut.rows:
        rows = [first_row + row for row, count in enumerate(counts) if count > kept[row]]
        raise TruncationError(cut.message("would be"), rows)


def kept_span(
    row: Row, offsets: Sequence[Span], token_type_ids: Sequence[int], prompt: int, cut: bool
) -> Span | tuple[Span, Span]:
    """Return which characters of a text were read.

    Args:
        row: The text, or the pair, with the prompt in front.
        offsets: Of the tokens that were read.
        token_type_ids: Of a pair.
        prompt: How many characters the prompt has.
        cut: Whether something was not read.
    """
    if isinstance(row, str):
        end = len(row) if not cut else max((end for _, end in offsets), default=0)
        return 0, max(end - prompt, 0)
    first, second = row
    ends = [0, 0]
    for (_, end), kind in zip(offsets, token_type_ids, strict=True):
        ends[kind] = max(ends[kind], end)
    if not cut:
        ends = [len(first), len(second)]
    return (0, max(ends[0] - prompt, 0)), (0, ends[1])


def split(tokenizer: WordPieceTokenizer, text: str, prompt: str, max_length: int) -> list[Span]:
    """Cover a text by overlapping windows that the model can read.

    Args:
        tokenizer: The model's.
        text: The text.
        prompt: What is put in front of every window.
        max_length: Tokens that a window may have, the prompt's, [CLS] and [SEP] included.

    Returns:
        The span of each window in `text`, in characters, in order. Together they hold every token.
    """

    def count(start: int, end: int) -> int:
        return tokenizer(prompt + text[start:end]).token_counts[0]

    room = max_length - tokenizer(prompt).token_counts[0]
    units = _units(tokenizer, text, max(room, 1))
    starts = [start for start, _, _ in units]
    cumulated = [0, *accumulate(tokens for _, _, tokens in units)]
    begins = {bisect_left(starts, match.end()) for match in _SENTENCE.finditer(text)}
    sentences = sorted(begins - {0, len(units)})  # the units that begin a sentence
    overlap = min(_OVERLAP, max_length // 8)
    spans: list[Span] = []
    first = 0
    while units:
        last = max(bisect_right(cumulated, cumulated[first] + room) - 1, first + 1)
        if last < len(units):
            half = bisect_left(cumulated, cumulated[first] + room / 2)
            within = sentences[bisect_left(sentences, half) : bisect_right(sentences, last)]
            last = within[-1] if within else last
        # Read alone a part may have more tokens than within its text: rarely, of a cut word.
        while last > first + 1 and count(starts[first], units[last - 1][1]) > max_length:
            last -= 1
        spans.append((starts[first], units[last - 1][1]))
        if last == len(units):
            break
        lowest = bisect_left(cumulated, cumulated[last] - overlap)
        within = sentences[bisect_left(sentences, lowest) : bisect_left(sentences, last)]
        first = max(within[0] if within else lowest, first + 1)
    if len(spans) < 2:
        return [(0, len(text))]
    return [(0, spans[0][1]), *spans[1:-1], (spans[-1][0], len(text))]


def _units(tokenizer: WordPieceTokenizer, text: str, room: int) -> list[tuple[int, int, int]]:
    """Divide a text into words, each as (start, end, number of tokens).

    A word of more than `room` tokens is divided between its pieces.
    """
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    offsets, words = encoding.offsets, encoding.word_ids
    bounds = [
        0,
        *(i for i, (a, b) in enumerate(pairwise(words), 1) if a is None or a != b),
        len(words),
    ]
    units = []
    for first, last in pairwise(bounds):
        if first == last:
            continue
        if last - first <= room:
            units.append((offsets[first][0], offsets[last - 1][1], last - first))
        else:
            units += [(*offsets[piece], 1) for piece in range(first, last)]
    return units

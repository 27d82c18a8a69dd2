"""Which ways of reading a text make another program's token ids, or its vectors.

In: for each text whether it is right with certain mistakes of reading, or the ids themselves. Out:
the fewest mistakes that make the most texts right. `causes.py` asks for vectors, `compare_ids` for
ids alone.
"""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilm.encoder import SentenceEncoder
from minilm.errors import InputError
from minilm.parity.mistakes import Cause, Variant, VariantRunner, causes_for, settings_of
from minilm.report import aligned, jsonable, shortened

__all__ = ["IdsReport", "choose_readings", "compare_ids", "read_ids"]

Ids = list[list[int]]


def choose_readings(
    causes: Sequence[Cause],
    ids_with: Callable[[Sequence[Cause]], Ids],
    right_with: Callable[[Sequence[Cause]], list[bool]],
) -> tuple[list[Cause], list[Cause]]:
    """Choose mistakes of reading, one after the other, each of which makes more texts right.

    Where no mistake does, two at once are tried: a text can show both.

    Args:
        causes: The mistakes.
        ids_with: The ids of each text with some of them.
        right_with: Whether each text is right with them.

    Returns:
        The mistakes, and others in place of the last of them that do the same.
    """
    taken: list[Cause] = []
    rivals: list[Cause] = []
    right = right_with(taken)
    while not all(right):
        now = ids_with(taken)
        wrong = [place for place, is_right in enumerate(right) if not is_right]
        useful = []
        for cause in causes:
            ids = ids_with([*_without(taken, [cause]), cause])
            if any(ids[place] != now[place] for place in wrong):
                useful.append(cause)
        for count in (1, 2):
            found = _best(taken, itertools.combinations(useful, count), right_with, sum(right))
            if found:
                break
        else:
            break
        taken, right = found[0]
        rivals = [others[-1] for others, _ in found[1:] if others[:-1] == taken[:-1]]
    for cause in taken[:-1]:  # one that a later one has made needless
        rest = [each for each in taken if each is not cause]
        if sum(right_with(rest)) == sum(right):
            taken = rest
    return taken, rivals


def _without(taken: Sequence[Cause], more: Sequence[Cause]) -> list[Cause]:
    """The mistakes that can be made beside others."""
    settings = settings_of(more)
    return [cause for cause in taken if not cause.settings & settings]


def _best(
    taken: Sequence[Cause],
    steps: Any,
    right_with: Callable[[Sequence[Cause]], list[bool]],
    before: int,
) -> list[tuple[list[Cause], list[bool]]]:
    """The steps that make the most texts right, which are the same ones."""
    found: list[tuple[list[Cause], list[bool]]] = []
    most = before
    for step in steps:
        if len(_without(step[:1], step[1:])) < len(step[:1]):
            continue  # they exclude each other
        causes = [*_without(taken, step), *step]
        right = right_with(causes)
        if sum(right) > most:
            found, most = [(causes, right)], sum(right)
        elif found and right == found[0][1]:
            found.append((causes, right))
    return found


@dataclass(frozen=True)
class IdsReport:
    """Another program's token ids beside ours.

    Attributes:
        texts: How many texts were compared.
        rows: The numbers of those whose ids differ.
        causes: What was read otherwise.
        alternatives: Other mistakes that do the same as the last of them.
        unexplained: The rows whose difference is not explained.
        lines: For each row that differs, the first token that does, in words.
    """

    texts: int
    rows: tuple[int, ...]
    causes: tuple[Cause, ...]
    alternatives: tuple[Cause, ...]
    unexplained: tuple[int, ...]
    lines: tuple[tuple[str, ...], ...]

    @property
    def is_equal(self) -> bool:
        """Whether all ids are ours."""
        return not self.rows

    @property
    def summary(self) -> str:
        """The finding in one line."""
        if self.is_equal:
            return "the same ids"
        names = [cause.name for cause in self.causes]
        if self.alternatives:
            names[-1] = " or ".join([names[-1], *(cause.name for cause in self.alternatives)])
        found = "; ".join(names) or "in no way that is known"
        return f"{len(self.rows)} of {self.texts} texts are read otherwise: {found}"

    def table(self, worst: int = 20) -> str:
        """The finding as text."""
        if self.is_equal:
            return f"{self.texts} texts: {self.summary}"
        heading = ("row", "place", "theirs", "ours", "text")
        lines = aligned([heading, *self.lines[:worst]], right=range(2))
        lines += ["", self.summary]
        remedies = dict.fromkeys(cause.remedy for cause in self.causes)
        lines += [f"  what to do: {remedy}" for remedy in remedies]
        if self.unexplained and self.causes:
            shown = ", ".join(map(str, self.unexplained[:20]))
            lines.append(f"rows that this doesn't explain: {shown}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The finding as an object for JSON."""
        return {"equal": self.is_equal, "summary": self.summary, **jsonable(vars(self))}


def compare_ids(encoder: SentenceEncoder, texts: Sequence[str], ids: Ids) -> IdsReport:
    """Compare another program's token ids with ours, and find out what it reads otherwise.

    Args:
        encoder: Our model, of which the tokenizer and the limit are used.
        texts: n texts.
        ids: Its token ids for each of them; padding at the end does no harm.

    Raises:
        InputError: The numbers of texts and ids differ.
    """
    if len(ids) != len(texts):
        raise InputError(f"ids has {len(ids)} rows, texts {len(texts)}; pass as many", "ids")
    tokenizer = encoder.get_tokenizer()
    theirs = [_without_padding(row, tokenizer.pad_token_id) for row in ids]
    counts = tokenizer(texts).token_counts
    runner = VariantRunner(encoder, list(texts), counts, list(range(len(texts))))
    first = tokenizer([""]).input_ids[0][0]
    known = _with_no_cut(causes_for(encoder), encoder.max_seq_length, max(counts, default=0))
    own, start = Variant(encoder.max_seq_length), list[Cause]()
    if sum(row[:1] == [first] for row in theirs) < len(theirs) / 2:
        start = [cause for cause in known if "specials" in cause.changes]

    def ids_with(causes: Sequence[Cause]) -> Ids:
        return runner.ids(own.with_(*start, *causes))

    def right_with(causes: Sequence[Cause]) -> list[bool]:
        return [a == b for a, b in zip(ids_with(causes), theirs, strict=True)]

    readings = [cause for cause in known if cause.is_of_reading]
    causes, alternatives = choose_readings(readings, ids_with, right_with)
    ours = runner.ids(own)
    rows = [row for row, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    right = right_with(causes)

    def token(row: list[int], place: int) -> str:
        return str(tokenizer.backend.id_to_token(row[place])) if place < len(row) else "(the end)"

    lines = []
    for row in rows:
        pairs = itertools.zip_longest(ours[row], theirs[row])
        place = next(place for place, (a, b) in enumerate(pairs) if a != b)
        lines.append(
            (str(row), str(place), token(theirs[row], place), token(ours[row], place),
             repr(shortened(texts[row], 40)))
        )  # fmt: skip
    return IdsReport(
        len(texts),
        tuple(rows),
        (*start, *causes),
        tuple(alternatives),
        tuple(row for row in rows if not right[row]),
        tuple(lines),
    )


def _with_no_cut(causes: list[Cause], own: int, longest: int) -> list[Cause]:
    """The mistakes, and that of a tokenizer which doesn't cut: a model can't take its ids.

    Args:
        causes: The mistakes.
        own: The limit of the model.
        longest: How many tokens the longest text has. Unless that is beyond every limit, the
            largest limit and none are the same.
    """
    cuts = [cause for cause in causes if cause.changes.keys() == {"limit"}]
    last = max(cuts, key=lambda cause: int(cause.changes["limit"]), default=None)
    if last is None:
        return causes
    most = last.changes["limit"]
    if own < most and longest <= most:
        name = f"{last.name}, or not cut"
        return [replace(cause, name=name) if cause is last else cause for cause in causes]
    needs = f"texts longer than {most} tokens"
    return [*causes, Cause("not cut", last.remedy, needs, {"limit": sys.maxsize})]


def _without_padding(row: list[int], pad: int) -> list[int]:
    end = len(row)
    while end and row[end - 1] == pad:
        end -= 1
    return row[:end]


def read_ids(path: Path) -> tuple[list[str] | None, Ids]:
    """Read token ids: a JSON list of lists, or a .jsonl file with `input_ids` and maybe `text`.

    Returns:
        The texts, None if the file has none, and the ids.

    Raises:
        InputError: The file is of another form.
        OSError: The file can't be read.
    """
    try:
        data = path.read_text(encoding="utf-8")
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in data.splitlines() if line.strip()]
        else:
            rows = json.loads(data)
        texts = None
        if rows and all(isinstance(row, dict) for row in rows):
            if all(isinstance(row.get("text"), str) for row in rows):
                texts = [row["text"] for row in rows]
            rows = [row.get("input_ids", row.get("ids")) for row in rows]
        for number, row in enumerate(rows):
            good = isinstance(row, list) and all(type(each) is int and each >= 0 for each in row)
            if not good:
                raise ValueError(f"row {number} is no list of ids")
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path}: is not a file of ids, a JSON list of lists or .jsonl with input_ids: {error}",
            "--against-ids",
        ) from error
    return texts, rows

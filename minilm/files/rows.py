"""Files of text as rows: the one reader of .txt, .jsonl and .csv files, for every command.

In: the name of a file, or - for standard input. Out: its rows, each with its line number, its
values by name, and its text or what is wrong with it. Next: `tables.py` has all rows at once,
`sources.py` some at a time, `parity/foreign.py` takes vectors out of them.

The suffix, in upper case too, says what a file is; an unknown one is refused, since the lines of
another form are not texts. Files are UTF-8, with or without a byte order mark, with either kind of
line end. In a file of texts every line is one, a blank line too; in .jsonl and .csv blank lines are
skipped. A text is a string: null, a number, or nothing makes a bad row.
"""

import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from minilm.disk import DoubledKeyError, parse_json, with_home
from minilm.errors import InputError
from minilm.report import shortened
from minilm.streams import standard_input

__all__ = [
    "DEFAULT_COLUMN", "FORMS", "Reader", "Row", "as_float", "as_floats", "as_json", "check_numbers",
    "column_of", "input_form", "lone_surrogate",
]  # fmt: skip

DEFAULT_COLUMN = "text"

# The forms of files, by suffix.
FORMS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
_ALSO_TEXT = ("", ".text", ".md", ".log")

_LONGEST_FIELD = 2**31 - 1  # characters: the most that the parser accepts on every system
_DEEPEST = 200  # nested lists and objects; Python can write fewer than 1,000
_HUGE = re.compile(r"[0-9][eE]\+?[0-9]{3}|[0-9]{309}")  # what a number beyond float64 looks like
_HALF = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        line: The line that it ends in, from 1.
        values: Its values by name; empty if it can't be read.
        text: The text; None if there is none that can be embedded.
        problem: Why there is none.
    """

    line: int
    values: dict[str, Any]
    text: str | None
    problem: str | None


def input_form(name: str) -> str:
    """The form of a file: "jsonl", "csv", "parquet" or "text".

    Args:
        name: The file, or - for standard input, which is text.

    Raises:
        InputError: Its suffix is unknown.
    """
    suffix = "" if name == "-" else Path(name).suffix.lower()
    if suffix in _ALSO_TEXT:
        return "text"
    if suffix not in FORMS:
        raise InputError(
            f"{name}: {suffix} can't be read; convert it to one of {', '.join(FORMS)}, or name it "
            ".txt if every line is a text",
            name,
        )
    return FORMS[suffix]


class Reader:
    """Reads files that have their texts under one name.

    Attributes:
        column: That name: the one asked for; else "text", if the first row with names has it, or
            its only name. None until then.
        heading: The columns of a .csv file, once a row of it, or its end, was read.
    """

    def __init__(
        self,
        column: str | None = None,
        *,
        candidates: Callable[[Sequence[str]], Sequence[str]] = list,
        is_unicode: bool = False,
    ) -> None:
        """Say how to read; nothing is read yet.

        Args:
            column: The name of the texts.
            candidates: Chooses the names that the text may have from those of a row.
            is_unicode: Whether half a character, which JSON can escape and UTF-8 can't hold, makes
                a bad row wherever it is, and not only in its text.
        """
        self.column = column
        self.heading: list[str] | None = None
        self._wanted, self._candidates, self._is_unicode = column, candidates, is_unicode

    def rows(self, name: str) -> Iterator[Row]:
        """Yield the rows of a file, bad ones too.

        Args:
            name: A path, or - for standard input.

        Raises:
            InputError: The file is not UTF-8, its quotes are broken, it lacks the column, or is of
                another form. The message names the file, and the line.
            OSError: It can't be read.
        """
        form = input_form(name)
        if form == "parquet":
            raise InputError(
                f"{name}: Parquet is read into a folder of Parquet files only, by minilm encode "
                "-o FOLDER; convert it to .jsonl or .csv",
                name,
            )
        read = {"jsonl": self._objects, "csv": self._fields, "text": self._lines}[form]
        return read(name)

    def good_rows(self, name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield the line, the text and all values of each row.

        Raises:
            InputError, OSError: As in `rows`; or a row is bad.
        """
        for line, values, text, problem in self.rows(name):
            if text is None:
                raise InputError(f"{name}: line {line}: {problem}", name)
            yield line, text, values

    def _lines(self, name: str) -> Iterator[Row]:
        self.column = self.column or DEFAULT_COLUMN
        for number, line in enumerate(_lines(name), 1):
            text = line.removesuffix("\n").removesuffix("\r")
            if "\0" in text:
                raise InputError(
                    f"{name}: line {number} has a NUL, as files have that are not text, or UTF-16; "
                    "convert the file",
                    name,
                )
            yield Row(number, {self.column: text}, text, None)

    def _objects(self, name: str) -> Iterator[Row]:
        for number, line in enumerate(_lines(name), 1):
            if line.strip():
                yield self._object(line, number, name)

    def _object(self, line: str, number: int, name: str) -> Row:
        try:
            row = parse_json(line, as_float if _HUGE.search(line) else None)
        except (DoubledKeyError, _RowError) as error:
            return Row(number, {}, None, str(error))
        except ValueError as error:
            return Row(number, {}, None, f"is not valid JSON: {error}")
        if line.count("{") + line.count("[") > _DEEPEST and _depth(row) > _DEEPEST:
            return Row(number, {}, None, f"is nested more than {_DEEPEST} deep")
        if isinstance(row, str):
            row = {self.column or DEFAULT_COLUMN: row}
        elif isinstance(row, dict):
            self._settle(row, f"{name}: line {number}", name)
        else:
            return Row(number, {}, None, "is neither an object nor a string")
        column = self.column or DEFAULT_COLUMN
        if "\\u" in line:  # UTF-8 can hold half a character only as an escape
            for key, value in row.items() if self._is_unicode else [(column, row.get(column))]:
                half = lone_surrogate([key, value])
                if half:
                    problem = f"has a lone surrogate, {half!r}, in {key!r}"
                    return Row(number, {}, None, f"{problem}: it is not Unicode text")
        if column not in row:
            return Row(number, row, None, _lacks(column, list(row)))
        text = row[column]
        if not isinstance(text, str):
            return Row(number, row, None, f"{column} is {as_json(text)[:40]}, not a string")
        return Row(number, row, text, None)

    def _settle(self, row: dict[str, Any], place: str, name: str) -> None:
        if self.column is None:
            names = self._candidates(list(row))
            is_only = DEFAULT_COLUMN not in names and len(names) == 1
            self.column = names[0] if is_only else DEFAULT_COLUMN
        elif self._wanted is None and DEFAULT_COLUMN in row and self.column != DEFAULT_COLUMN:
            raise InputError(
                f"{place}: has {DEFAULT_COLUMN!r}, lines before it only {self.column!r}; choose "
                "with --column",
                name,
            )

    def _fields(self, name: str) -> Iterator[Row]:
        parser = _csv()
        reader = parser.reader(_lines(name), strict=True)
        before = 0
        try:
            heading: list[str] = next(filter(None, reader), [])
            column = self._headed(heading, name)
            width = len(heading)
            before = reader.line_num
            for fields in reader:
                before = reader.line_num
                if len(fields) == width:
                    values = dict(zip(heading, fields, strict=True))
                    yield Row(before, values, values[column], None)
                elif fields:
                    problem = f"has {len(fields)} fields, the first line {width}"
                    yield Row(before, {}, None, problem)
        except parser.Error as error:
            raise InputError(
                f"{name}: the row that begins in line {before + 1}: {error}", name
            ) from error

    def _headed(self, heading: list[str], name: str) -> str:
        """Check a heading, and return the name of the text in it."""
        if not heading:
            raise InputError(f"{name}: is empty; the first line names the columns", name)
        doubled = sorted({each for each in heading if heading.count(each) > 1})
        if doubled:
            raise InputError(f"{name}: has more than one column {doubled[0]!r}", name)
        if len(heading) == 1 and heading[0] != self.column:
            for mark in (";", "\t", "|"):
                if mark in heading[0]:
                    raise InputError(
                        f"{name}: has one column, {heading[0][:40]!r}; separate columns by commas, "
                        f"not by {mark!r}, or name that column with --column",
                        name,
                    )
        if self.heading is not None and set(heading) != set(self.heading):
            raise InputError(
                f"{name}: has the columns {', '.join(heading)}, the first file "
                f"{', '.join(self.heading)}",
                name,
            )
        names = heading if self.column is not None else self._candidates(heading)
        self.column = column_of(names, self.column, name, name)
        self.heading = self.heading or heading
        return self.column


def column_of(columns: Sequence[str], wanted: str | None, place: str, name: str) -> str:
    """The column that holds the texts: the one wanted, else "text", else the only one.

    Raises:
        InputError: There is none. `place` is what has the columns, `name` the argument or file.
    """
    if wanted is None and DEFAULT_COLUMN not in columns and len(columns) == 1:
        return columns[0]
    column = wanted or DEFAULT_COLUMN
    if column not in columns:
        raise InputError(f"{place}: {_lacks(column, columns)}", name)
    return column


def _lacks(column: str, columns: Sequence[str]) -> str:
    known = ", ".join(map(repr, columns[:20])) or "none"
    return f"has no {column!r}; choose with --column, of {known}"


def _lines(name: str) -> Iterator[str]:
    """The lines of a file with their ends, blank ones too."""
    with nullcontext(standard_input()) if name == "-" else with_home(name).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = "standard input" if name == "-" else name
                why = f"line {number} is not UTF-8 ({error.reason}); convert the file"
                raise InputError(f"{place}: {why}", place) from error
            yield text


class _RowError(ValueError):
    """What is wrong with a row that is well-formed."""


def as_float(text: str) -> float:
    """A number in a file; one that float64 can't hold is a `ValueError`, and not infinity."""
    value = float(text)
    if "_" in text or not text.isascii():  # only Python takes that for a number
        raise _RowError(f"has {shortened(text, 40)!r}, which is not a number")
    if math.isinf(value) and any(character.isdigit() for character in text):
        raise _RowError(f"has the number {shortened(text, 40)}, which is beyond what float64 holds")
    return value


def as_floats(texts: Sequence[str]) -> list[float]:
    """The numbers of a row of .csv. Errors as in `as_float`."""
    numbers = [float(text) for text in texts]
    whole = "".join(texts)
    if any(map(math.isinf, numbers)) or "_" in whole or not whole.isascii():
        numbers = [as_float(text) for text in texts]
    return numbers


def check_numbers(vector: Sequence[Any], line: int) -> None:
    """Check that a list of JSON has numbers only: true would be read as 1."""
    if {*map(type, vector)} - {int, float}:
        other = next(each for each in vector if type(each) not in (int, float))
        raise ValueError(f"line {line} has {as_json(other)[:40]} among its numbers")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        level = [one for each in level for one in (each.values() if type(each) is dict else each)]
        depth += 1
    return depth


@cache
def _csv() -> Any:
    """The parser of the module csv, with a limit of its own on the length of a field.

    `csv.field_size_limit` is one limit for the whole process, 131,072 characters by default. A text
    can be longer, and the limit is not ours to change. So this is a second instance of the module
    in C, loaded as the standard library's own tests do it.
    """
    spec = importlib.util.find_spec("_csv")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.field_size_limit(_LONGEST_FIELD)
    return module


def lone_surrogate(value: Any) -> str | None:
    """Find half a character in a value, which JSON can hold and UTF-8 can't; None without one."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    found = _HALF.search(text)
    return found and found[0]


def as_json(value: Any, is_ascii: bool = False) -> str:
    """Write a value as JSON that UTF-8 can hold: half a character is escaped."""
    text = json.dumps(value, ensure_ascii=is_ascii)
    return text if text.isascii() else _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)

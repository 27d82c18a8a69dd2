"""Tables, shortened texts and objects for JSON."""

import json
import math
from dataclasses import dataclass
from typing import Any

from minilm.report import aligned, jsonable, shortened


def test_columns_are_aligned_and_what_cannot_be_printed_is_escaped() -> None:
    rows = [("name", "size", "note"), ("a\n", "7", ""), ("bb", "1,024", "é")]
    assert aligned(rows, right=(1,)) == ["name   size  note", r"a\n       7", "bb    1,024  é"]


def test_a_long_text_is_shortened_to_the_width() -> None:
    assert shortened("0123456789", 10) == "0123456789"
    assert shortened("0123456789x", 10) == "0123456..."


@dataclass(frozen=True)
class Row:
    name: str
    sizes: tuple[float, ...]


@dataclass(frozen=True)
class Finding:
    rows: list[Row]

    def to_dict(self) -> Any:
        return jsonable(vars(self)) | {"passed": False}


def test_a_finding_becomes_an_object_without_numbers_that_json_lacks() -> None:
    found = jsonable({"of": Finding([Row("a", (1.5, math.inf)), Row("b", (math.nan,))])})
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "of": {
            "rows": [{"name": "a", "sizes": [1.5, None]}, {"name": "b", "sizes": [None]}],
            "passed": False,
        }
    }

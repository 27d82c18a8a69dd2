"""How a finding is shown: columns of a table, a long text cut short, an object for JSON.

In: what a check, a comparison or an explanation found. Out: lines of text, or what `json.dumps`
takes.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

__all__ = ["aligned", "jsonable", "shortened"]


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of a table, two blanks between its columns; what can't be printed is escaped.

    Args:
        rows: The cells of each row, as many in every row.
        right: The columns that are aligned at their right end.
    """
    shown = [[x if x.isprintable() else ascii(x)[1:-1] for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in shown
    ]


def shortened(text: str, width: int) -> str:
    """A text of at most `width` characters; "..." stands for what is left out at its end."""
    return text if len(text) <= width else text[: width - 3] + "..."


def jsonable(value: Any) -> Any:
    """A finding as `json.dumps` takes it.

    Dataclasses become objects, by their own `to_dict` if they have one, and arrays lists. A number
    that is not finite becomes None, which JSON can say.
    """
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: jsonable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What the figures of the tour's page show, and how the page writes numbers and texts.

In: a trace, explanations. Out: what the templates loop over, with all that is computed; and the
filters that they write it with.
"""

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minilm.interpret import explain
from minilm.interpret.trace import Trace

_Array = np.ndarray[Any, Any]

SHOWN_UNITS = 12  # of the feed-forward network


# --- Filters --------------------------------------------------------------------------------------


def literal(text: str) -> str:
    """Write the characters of a text that HTML can't hold as in Python."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def number(x: float, digits: int = 4, sign: bool = False) -> str:
    """Format a number, with a true minus, and none before 0, as `number` in script.js does."""
    return f"{float(x):{'+' if sign else ''}z.{digits}f}".replace("-", "−")


def spelled(count: int) -> str:
    """Write a small number as a word."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words += ["eleven", "twelve"]
    return words[count] if count < len(words) else str(count)


def first_numbers(vector: Any) -> str:
    values = np.asarray(vector)
    first = " ".join(number(x, 3, sign=True) for x in values[:4])
    length = math.sqrt(float(np.square(values.astype(np.float64)).sum()))
    return f"{first} … ‖·‖ {number(length, 3)}"


def range_in_words(vector: Any) -> str:
    values = np.asarray(vector)
    lowest, highest = (number(x, 3, sign=True) for x in (values.min(), values.max()))
    return f"{len(values)} numbers from {lowest} to {highest}"


def strength(x: float, largest: float) -> str:
    """Return how strong the colour of a number is, or how long its bar, from 0 to 1."""
    return f"{abs(float(x)) / (float(largest) or 1):.3f}"


def column_width(labels: Iterable[str], narrowest: float) -> str:
    """Return a width, in rem, in which most labels can be read."""
    longest = max(map(len, labels), default=0)
    return f"{max(narrowest, min(6.5, 0.7 + 0.55 * longest)):.2f}"


def most_of_all(habits: dict[str, float]) -> str:
    """Say the two largest of what `habits` found."""
    most = sorted(habits.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{share:.0%} at {name}" for name, share in most)


FILTERS = {
    "literal": literal,
    "number": number,
    "spelled": spelled,
    "thousands": "{:,}".format,
    "percent": "{:.0%}".format,
    "power_of_ten": "{:.0e}".format,
    "in_python": repr,
    "in_shell": lambda text: literal(shlex.quote(text)),
    "first_numbers": first_numbers,
    "range_in_words": range_in_words,
    "strength": strength,
    "column_width": column_width,
    "most_of_all": most_of_all,
}


# --- Figures --------------------------------------------------------------------------------------


def marked(a: Trace) -> list[tuple[str, int | None]]:
    """Divide the text into parts, each with the token that it is, or None between tokens."""
    parts: list[tuple[str, int | None]] = []
    position = 0
    for token, (start, end) in enumerate(a.offsets):
        if end > start:
            parts += [(a.text[position:start], None), (a.text[start:end], token)]
            position = end
    return [*parts, (a.text[position:], None)]


def habits(probabilities: _Array) -> dict[str, float]:
    """Return where one head looks, on the mean over the tokens: shares of 1."""
    n = len(probabilities)
    place = np.arange(n)
    kinds = np.full((n, n), 5)
    kinds[place[:-1], place[1:]] = 4
    kinds[place[1:], place[:-1]] = 3
    kinds[place, place] = 2
    kinds[:, -1] = 1
    kinds[:, 0] = 0
    names = ("[CLS]", "[SEP]", "itself", "the token before", "the token after", "others")
    return {
        name: float(probabilities[kinds == kind].astype(np.float64).sum() / n)
        for kind, name in enumerate(names)
    }


def most_active(activation: _Array) -> list[tuple[int, float, float]]:
    """Find the most active units of a token: the number of each, its value, value / first."""
    units = np.argsort(-activation, kind="stable")[:SHOWN_UNITS]
    values = activation[units]
    return [
        (unit, value, max(0, value / values[0])) for unit, value in zip(units, values, strict=True)
    ]


def path(found: Trace, names: Sequence[str], token: int) -> dict[str, Any]:
    """Map all token vectors at all states, and compare the states of one token."""
    vectors = np.stack([found[name].double().numpy() for name in names])
    flat = vectors.reshape(-1, vectors.shape[-1])  # [states, tokens, 384] -> [all of them, 384]
    centred = flat - flat.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    points = (centred @ axes[:2].T).reshape(*vectors.shape[:2], 2)
    low, high = points.min(axis=(0, 1)), points.max(axis=(0, 1))
    width, height = 640, 380  # of the drawing
    places = (points - low) / np.maximum(high - low, 1e-9) * [width - 80, height - 60] + [40, 30]
    places[..., 1] = height - places[..., 1]
    paths = []
    for number, piece in enumerate(found["tokens"]):
        dots = [_point(*place) for place in places[:, number]]
        x, y = places[-1, number]
        anchor = "end" if x > width - 120 else "start"
        label = _point(x + (-7 if anchor == "end" else 7), y - 6)
        paths.append({"piece": piece, "points": _points(places[:, number]), "dots": dots,
                      "x": label[0], "y": label[1], "anchor": anchor})  # fmt: skip
    pooled = found["pooled"].double().numpy()
    states = []
    for number, name in enumerate(names):
        vector = vectors[number, token]
        others = [vectors[number - 1, token] if number else None, vectors[0, token], pooled]
        states.append(
            {
                "label": "embedding" if not number else f"after layer {name.split('.')[1]}",
                "vector": vector,
                "cosines": [None if other is None else _cosine(vector, other) for other in others],
            }
        )
    spread = float((sizes[:2] ** 2).sum() / max((sizes**2).sum(), 1e-30))
    return {"paths": paths, "spread_shown": spread, "states_of_token": states}


def _cosine(x: _Array, y: _Array) -> float:
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def plane(similarity: float, lengths: Sequence[float]) -> dict[str, Any]:
    """Draw the two pooled vectors, and the unit circle, in the plane that they span."""
    angle = math.acos(max(-1.0, min(1.0, similarity)))
    unit = 300 / max(*lengths, 1.0)
    x0, y0 = (90, 300) if angle < 1.7 else (330, 300)

    def at(direction: float, distance: float) -> tuple[float, float]:
        return x0 + distance * math.cos(direction), y0 - distance * math.sin(direction)

    turn = 0.1 if angle < 1.4 else 0.0
    arrows = []
    for name, side, length, direction in zip(
        "uv", "ab", lengths, (turn, turn + angle), strict=True
    ):
        tip = at(direction, unit * length)
        back = [at(direction + d, unit * length - 13) for d in (0.02, -0.02)]
        arrows.append(
            {
                "name": name,
                "side": side,
                "length": length,
                "tip": _point(*tip),
                "unit": _point(*at(direction, unit)),
                "head": _points([tip, *back]),
                "label": _point(*at(direction, unit * length + 12)),
                "anchor": "start" if math.cos(direction) > -0.3 else "end",
            }
        )
    return {
        "x": x0,
        "y": y0,
        "radius": f"{unit:.1f}",
        "degrees": f"{math.degrees(angle):.1f}",
        "arc": _points(at(d, unit + 14) for d in np.linspace(turn, turn + angle, 24)),
        "label": _point(*at(turn + angle / 2, unit + 24)),
        "arrows": arrows,
    }


def _point(x: float, y: float) -> tuple[str, str]:
    return f"{x:.1f}", f"{y:.1f}"


def _points(points: Iterable[Any]) -> str:
    """Write points as SVG does."""
    return " ".join(",".join(_point(*point)) for point in points)


def shares(pair: explain.Explanation, digits: int) -> dict[str, Any]:
    """Return what the pair table shows before anything is clicked: shares of pairs of words."""
    return {
        "labels": pair.labels,
        "cells": pair.matrix,
        "largest": float(np.abs(pair.matrix).max(initial=0.0)),
        "digits": digits,
        "share_a": pair.share_a,
        "share_b": pair.share_b,
        "so_far": np.cumsum(pair.share_a),
    }


def percents(pair: explain.Explanation) -> dict[str, float]:
    """Return the parts of words, punctuation and special tokens in the similarity, of sum 100."""
    if abs(pair.similarity) < 1e-9:
        return {}
    kinds = [
        [
            2 if special else 0 if any(c.isalnum() or c == "_" for c in label) else 1
            for label, special in zip(pair.labels[side], pair.is_special[side], strict=True)
        ]
        for side in (0, 1)
    ]
    kind = np.maximum.outer(np.array(kinds[0]), np.array(kinds[1]))
    values = [float(pair.matrix[kind == k].sum()) for k in range(3)]
    percents = _rounded([100 * value / pair.similarity for value in values])
    return dict(zip(("words", "punctuation", "special tokens"), percents, strict=True))


def _rounded(percents: Sequence[float]) -> list[float]:
    """Round to one decimal so that the sum stays 100: the largest remainders are rounded up."""
    tenths = [math.floor(10 * percent) for percent in percents]
    order = sorted(range(len(percents)), key=lambda k: tenths[k] - 10 * percents[k])
    for k in order[: 1000 - sum(tenths)]:
        tenths[k] += 1
    return [each / 10 for each in tenths]


def limits(pair: explain.Explanation, deletions: explain.Deletions) -> dict[str, Any]:
    """Set share, pull and deletion side by side, and find where they disagree most."""
    parts: list[dict[str, Any]] = [
        {"number": number, "share": float(share), "pull": float(pull)}
        for number, (share, pull) in enumerate(zip(pair.share_a, pair.pull_a, strict=True))
    ]
    ordinary = [part for part in parts if not pair.is_special[0][part["number"]]]
    words = [
        {**word, "label": label, "without": float(without), "change": -float(change)}
        for word, label, without, change in zip(
            ordinary, deletions.labels, deletions.without, deletions.change, strict=True
        )
    ]
    special = {
        kind: sum(part[kind] for part in parts if part not in ordinary)
        for kind in ("share", "pull")
    }
    most = max(words, key=lambda word: word["share"] * word["change"], default=None)
    return {
        "words": words,
        "largest": {
            kind: max((abs(word[kind]) for word in words), default=0.0)
            for kind in ("share", "pull", "change")
        },
        "special": special,
        "sum_of_pulls": special["pull"] + sum(word["pull"] for word in words),
        "disagreeing": most if most and most["share"] * most["change"] > 0 else None,
    }

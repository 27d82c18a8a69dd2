"""What a notebook shows: all of it, small, safe, and readable on a light page and on a dark one."""

import re

import pytest

from minilm import SentenceEncoder
from minilm.interpret import notebook
from minilm.interpret.explain import Explanation

# Grounds and letters of Jupyter's and VS Code's pages, in 0 to 1.
PAGES = {"light": (1.0, 0.13), "dark": (0.07, 0.88)}
LONGEST = 200_000


def words(fragment: str) -> list[str]:
    """What stands in the rows and columns, without the marks."""
    return [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", fragment)]


def check_safe(fragment: str) -> None:
    assert len(fragment.encode()) < LONGEST
    assert not re.search(r"<script|<img|<link|\son\w+=|url\(|@import", fragment, re.IGNORECASE)


def test_explanation_shows_its_matrix(tiny_encoder: SentenceEncoder) -> None:
    found = tiny_encoder.explain("the <dog> $x$", "walking & cat")
    shown = found._repr_html_()
    check_safe(shown)
    rows = re.findall(r"<tr>(.*?)</tr>", shown)
    assert words(rows[0])[1:-1] == [x.replace("&", "&amp;") for x in found.labels[1]]
    for row, cells, share in zip(rows[1:-1], found.matrix, found.share_a, strict=True):
        assert words(row)[1:] == [f"{x:+.4f}" for x in (*cells, share)]
    assert words(rows[-1])[-1] == f"{found.similarity:+.4f}"
    assert "<bdi>the &lt;dog&gt; $x$</bdi> / <bdi>walking &amp; cat</bdi>" in shown
    assert 'class="minilm-finding tex2jax_ignore mathjax_ignore"' in shown  # "$" is no formula


@pytest.mark.parametrize("page", PAGES)
def test_heat_leaves_numbers_readable(tiny_encoder: SentenceEncoder, page: str) -> None:
    """The contrast that WCAG 2.2 asks for (1.4.3) is 4.5, whatever the cell's colour."""
    shown = tiny_encoder.explain("the dog walks", "a man sees the sun")._repr_html_()
    ground, letters = PAGES[page]
    shades = re.findall(r"rgba\((\d+),(\d+),(\d+),([\d.]+)\)", shown)
    assert len(shades) == 5 * 7
    for *colour, strength in shades:
        alpha = float(strength)
        mixed = [alpha * int(x) / 255 + (1 - alpha) * ground for x in colour]
        dark, light = sorted((luminance(mixed), luminance([letters] * 3)))
        assert (light + 0.05) / (dark + 0.05) > 4.5
    assert not re.search(r"[;{ ](color|background):", shown.split("</style>")[0])


def luminance(colour: list[float]) -> float:
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour]
    return sum(x * y for x, y in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("sides", [(38, 41), (38, 510), (510, 41), (510, 510)])
def test_long_texts_stay_small(tiny_encoder: SentenceEncoder, sides: tuple[int, int]) -> None:
    """Up to 1,600 cells are all shown, else what the table shows; words of any length are cut."""
    small = tiny_encoder.explain("dog", "cat")
    fields = vars(small) | {
        "texts": tuple("𝄞" * 40 * count for count in sides),
        "labels": tuple(("𝄞" * 40,) * count for count in sides),
        "is_special": tuple((False,) * count for count in sides),
        "matrix": small.matrix.mean().repeat(sides[0] * sides[1]).reshape(sides),
        "share_a": small.matrix.mean().repeat(sides[0]),
        "share_b": small.matrix.mean().repeat(sides[1]),
    }
    shown = Explanation(**fields)._repr_html_()
    check_safe(shown)
    is_whole = sides == (38, 41)
    assert shown.count("rgba(") - 1 == (38 * 41 if is_whole else 0)
    assert ("to_html()" in shown) is not is_whole
    assert ("of all" in shown) is not is_whole
    assert "𝄞" * 21 + "..." in shown
    assert "𝄞" * 22 + "..." not in shown.replace(notebook.clipped(fields["texts"][0], "text"), "")


def test_a_cut_text_says_so(tiny_encoder: SentenceEncoder) -> None:
    with pytest.warns(UserWarning, match="was cut"):
        found = tiny_encoder.explain("the dog " * 20, "cat")
    assert "30 tokens of the first text were not read" in found._repr_html_()


def test_trace_shows_names_with_shapes(tiny_encoder: SentenceEncoder) -> None:
    found = tiny_encoder.trace("The <dog> walks")
    shown = found._repr_html_()
    check_safe(shown)
    rows = [words(row) for row in re.findall(r"<tr>(.*?)</tr>", shown)[1:]]
    assert [row[0] for row in rows] == list(found)
    by_name = {row[0]: row for row in rows}
    assert by_name["layers.0.attention.probabilities"][1:3] == [
        "4 x 8 x 8",
        "head, query token, key token",
    ]
    assert by_name["tokens"][1] == "8"
    for name, entry in found.entries.items():
        assert by_name[name][4] == str(entry.source)
    assert "<bdi>The &lt;dog&gt; walks</bdi>" in shown

"""Explanations: parts that add up to the similarity, and measurements that are what they say."""

import html.parser
import inspect
import io
import json
import linecache
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import ROOT, TINY, minilm, seeded_bert
from minilm import (
    BertConfig,
    ClsPooling,
    MeanPooling,
    Normalize,
    SentenceEncoder,
    TruncationWarning,
    cli,
)
from minilm.errors import InputError, InputTypeError, MissingPackageError
from minilm.interpret import explain as module
from minilm.interpret.explain import (
    Explanation,
    contrast,
    explain_components,
    explain_deletions,
    token_components,
)

WEATHER = "The weather is lovely today."
SUNNY = "It's so sunny outside!"

TEXTS = [
    "",
    "dog",
    "The dog sees a walking cat.",  # "walking" is "walk", "##ing"
    "zebra 😀 dog",  # two are [UNK]
    "A Café, walking!",
    "? ! ,",
    "a [MASK] [SEP] the",
    "the dog " * 3 + "walks runs",  # 12 tokens: as many as there is room for
]
# Each text as either one, beside its second neighbour and beside the one after that.
PAIRS = [(a, TEXTS[(n + step) % len(TEXTS)]) for n, a in enumerate(TEXTS) for step in (2, 3)]
LONG = "the dog " * 20
NOTHING: Any = None


@pytest.fixture
def double(tiny_encoder: SentenceEncoder) -> SentenceEncoder:
    """The tiny model in float64."""
    return tiny_encoder.to(torch.float64)


def composed(encoder: SentenceEncoder, *stages: nn.Module, layers: int = 2) -> SentenceEncoder:
    config = BertConfig(**{**vars(TINY), "num_hidden_layers": layers})
    return SentenceEncoder(
        modules=[seeded_bert(config), *stages], tokenizer=encoder.tokenizer, max_seq_length=12
    ).to(torch.float64)


def cosine(encoder: SentenceEncoder, a: str, b: str) -> float:
    """By the fast path of `encode`, of the encoder in float64."""
    u, v = encoder.encode([a, b])
    return float(u @ v / np.sqrt((u @ u) * (v @ v)))


def check_sums(found: Explanation, bar: float = 1e-12) -> None:
    """What is an identity holds."""
    s = found.similarity
    n, m = found.matrix.shape
    assert (len(found.labels[0]), len(found.labels[1])) == (n, m)
    assert (len(found.spans[0]), len(found.spans[1])) == (n, m)
    assert abs(found.matrix.sum() - s) <= bar
    assert abs(found.residual) <= bar
    np.testing.assert_allclose(found.matrix.sum(axis=1), found.share_a, rtol=0, atol=bar)
    np.testing.assert_allclose(found.matrix.sum(axis=0), found.share_b, rtol=0, atol=bar)
    assert abs(found.pull_a.sum()) <= bar
    assert abs(found.pull_b.sum()) <= bar
    rows = np.array(found.is_special[0])
    columns = np.array(found.is_special[1])
    assert abs(s - found.matrix[np.ix_(~rows, ~columns)].sum() - found.special) <= bar


# --- explain --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["token", "word", "group"])
def test_parts_add_up(double: SentenceEncoder, by: str) -> None:
    for a, b in PAIRS:
        found = double.explain(a, b, by=by)
        check_sums(found)
        assert found.similarity == pytest.approx(cosine(double, a, b), abs=1e-12)
        assert found.texts == (a, b)


def test_float32_model_is_explained_in_float64(tiny_encoder: SentenceEncoder) -> None:
    check_sums(tiny_encoder.explain(TEXTS[2], TEXTS[4]))
    assert tiny_encoder.dtype == torch.float32


def test_in_the_models_own_dtype_the_residual_is_its_rounding(
    tiny_encoder: SentenceEncoder,
) -> None:
    found = tiny_encoder.explain(TEXTS[2], TEXTS[4], dtype=None)
    assert 1e-12 < abs(found.residual) < 1e-5
    check_sums(found, 1e-5)


def test_bfloat16_model(tiny_folder: Path) -> None:
    loaded = SentenceEncoder.from_pretrained(tiny_folder, dtype="bfloat16", device="cpu")
    check_sums(loaded.explain(TEXTS[2], TEXTS[4]))
    check_sums(loaded.explain(TEXTS[2], TEXTS[4], dtype=None), 1e-5)


def test_cells_by_hand(double: SentenceEncoder) -> None:
    a, b = "dog", "a cat"
    h, g = (double.trace(t)["layers.1.feed_forward_layer_norm.output"].numpy() for t in (a, b))
    u, v = h.mean(axis=0), g.mean(axis=0)
    found = double.explain(a, b, by="token")
    for i in range(3):
        for j in range(4):
            cell = h[i] @ g[j] / (3 * 4 * np.linalg.norm(u) * np.linalg.norm(v))
            assert found.matrix[i, j] == pytest.approx(cell, abs=1e-15)


@pytest.mark.parametrize("by", ["token", "word", "group"])
def test_a_text_with_itself(double: SentenceEncoder, by: str) -> None:
    for text in TEXTS:
        found = double.explain(text, text, by=by)
        assert found.similarity == pytest.approx(1, abs=1e-14)
        assert found.matrix.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(found.matrix, found.matrix.T, rtol=0, atol=1e-15)
        np.testing.assert_allclose(found.pull_a, 0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("by", ["token", "word", "group"])
def test_swapped_texts_give_the_transpose(double: SentenceEncoder, by: str) -> None:
    for a, b in PAIRS:
        found, swapped = double.explain(a, b, by=by), double.explain(b, a, by=by)
        np.testing.assert_allclose(found.matrix, swapped.matrix.T, rtol=0, atol=1e-14)
        np.testing.assert_allclose(found.pull_a, swapped.pull_b, rtol=0, atol=1e-14)
        assert (found.labels, found.spans) == (swapped.labels[::-1], swapped.spans[::-1])
        assert found.special == pytest.approx(swapped.special, abs=1e-14)


def test_words_are_sums_of_their_pieces(double: SentenceEncoder) -> None:
    a, b = "The dog sees a walking cat.", "zebra walks"
    words, tokens = double.explain(a, b), double.explain(a, b, by="token")
    assert words.labels[0] == (
        "[CLS]", "The", "dog", "sees", "a", "walking", "cat", ".", "[SEP]",
    )  # fmt: skip
    assert tokens.labels[0][5:7] == ("walk", "ing")
    assert words.labels[1] == ("[CLS]", "zebra", "walks", "[SEP]")
    rows = [[0], [1], [2], [3], [4], [5, 6], [7], [8], [9]]
    columns = [[0], [1], [2, 3], [4]]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            block = tokens.matrix[np.ix_(row, column)]
            assert words.matrix[i, j] == pytest.approx(block.sum(), abs=1e-15)
        assert words.share_a[i] == pytest.approx(tokens.share_a[row].sum(), abs=1e-15)
        assert words.pull_a[i] == pytest.approx(tokens.pull_a[row].sum(), abs=1e-15)
    for j, column in enumerate(columns):
        assert words.share_b[j] == pytest.approx(tokens.share_b[column].sum(), abs=1e-15)
        assert words.pull_b[j] == pytest.approx(tokens.pull_b[column].sum(), abs=1e-15)


def test_groups_are_sums_of_words(double: SentenceEncoder) -> None:
    a, b = "A Café, walking!", "the dog"
    groups, words = double.explain(a, b, by="group"), double.explain(a, b)
    assert groups.labels == (("words", "punctuation", "special"),) * 2
    rows = [[1, 2, 4], [3, 5], [0, 6]]
    columns: list[list[int]] = [[1, 2], [], [0, 3]]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            block = words.matrix[np.ix_(row, column)] if column else np.zeros(1)
            assert groups.matrix[i, j] == pytest.approx(block.sum(), abs=1e-15)
    # Punctuation of `b` is none; that of `a` reaches from the comma to the exclamation mark.
    assert groups.spans == (((0, 15), (6, 16), (0, 0)), ((0, 7), (0, 0), (0, 0)))


def test_special_is_all_but_words_and_punctuation(double: SentenceEncoder) -> None:
    for a, b in PAIRS:
        groups = double.explain(a, b, by="group")
        inner = groups.matrix[:2, :2].sum()
        assert groups.special == pytest.approx(groups.similarity - inner, abs=1e-12)
        for by in ("token", "word"):
            assert double.explain(a, b, by=by).special == pytest.approx(groups.special, abs=1e-14)
    nothing = double.explain("", "")
    assert nothing.special == pytest.approx(1, abs=1e-12)


def test_an_underscore_is_punctuation(encoder: SentenceEncoder) -> None:
    groups = encoder.explain("snake_case", "_ _", by="group")
    words = encoder.explain("snake_case", "_ _")
    assert words.labels[0] == ("[CLS]", "snake", "_", "case", "[SEP]")
    assert groups.spans[0][:2] == ((0, 10), (5, 6))
    assert groups.share_b[0] == 0


def test_a_group_is_made_of_whole_words(encoder: SentenceEncoder) -> None:
    """A word that begins with a sign, in a piece of its own, is a word."""
    assert encoder.tokenizer is not None
    pieces = encoder.tokenizer.tokens(encoder.tokenizer("€x").input_ids[0])
    assert pieces == ["[CLS]", "€", "##x", "[SEP]"]
    assert encoder.explain("€x", "x").labels[0] == ("[CLS]", "€x", "[SEP]")
    groups = encoder.explain("€x", "x", by="group")
    assert groups.spans[0] == ((0, 2), (0, 0), (0, 0))


@pytest.mark.parametrize("by", ["token", "word"])
def test_pull_is_the_derivative_by_the_weight(double: SentenceEncoder, by: str) -> None:
    """Finite differences, on token vectors from the trace and nothing else of `explain`."""
    a, b = "The dog sees a walking cat.", "A Café, walking!"
    found = double.explain(a, b, by=by)
    name = "layers.1.feed_forward_layer_norm.output"
    h, g = (double.trace(text)[name].numpy() for text in (a, b))
    blocks = [[i] for i in range(10)]
    if by == "word":
        blocks[5:7] = [[5, 6]]

    def similarity(block: list[int], factor: float) -> float:
        weights = np.ones(len(h))
        weights[block] = factor
        u, v = weights @ h, g.sum(axis=0)
        return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))

    step = 1e-5
    for block, pull in zip(blocks, found.pull_a, strict=True):
        slope = (similarity(block, 1 + step) - similarity(block, 1 - step)) / (2 * step)
        assert pull == pytest.approx(slope, abs=1e-9)  # of some 0.01
    assert np.abs(found.pull_a).max() > 1e-3


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_other_models(tiny_encoder: SentenceEncoder, normalize: bool, layers: int) -> None:
    stages: list[nn.Module] = [Normalize()] if normalize else []
    for pooling in (MeanPooling(), ClsPooling()):
        encoder = composed(tiny_encoder, pooling, *stages, layers=layers)
        for a, b in PAIRS[:8]:
            found = encoder.explain(a, b, by="token")
            check_sums(found)
            assert found.similarity == pytest.approx(cosine(encoder, a, b), abs=1e-12)
            if isinstance(pooling, ClsPooling):
                assert found.matrix[0, 0] == pytest.approx(found.similarity, abs=1e-12)
                assert np.abs(found.matrix.ravel()[1:]).max() == 0


def test_spans_are_of_the_original_characters(double: SentenceEncoder) -> None:
    a = "A  CAFÉ,\twalkING 😀!"
    found = double.explain(a, "cafe\u0301 dog")
    assert found.labels[0] == ("[CLS]", "A", "CAFÉ", ",", "walkING", "😀", "!", "[SEP]")
    assert found.spans[0][0] == found.spans[0][-1] == (0, 0)
    for label, (start, end) in zip(found.labels[0][1:-1], found.spans[0][1:-1], strict=True):
        assert a[start:end] == label
    assert found.labels[1][1].startswith("cafe")
    assert found.spans[1][1][0] == 0


def test_special_tokens_that_a_text_spells_out_are_words(double: SentenceEncoder) -> None:
    found = double.explain("a [SEP] dog", "dog")
    assert found.labels[0] == ("[CLS]", "a", "[SEP]", "dog", "[SEP]")
    assert found.is_special[0] == (True, False, False, False, True)


def test_cut_text_has_no_share(double: SentenceEncoder) -> None:
    with pytest.warns(TruncationWarning, match="b was cut at 12 tokens; 71%") as caught:
        found = double.explain("a dog", LONG)
    assert len(caught) == 1
    assert found.unread == (0, 30)
    assert found.matrix.shape == (4, 12)
    check_sums(found)
    last = found.table().splitlines()[-1]
    assert last == "30 tokens of the second text were not read, and have no share"


def test_more_than_256_tokens(encoder: SentenceEncoder) -> None:
    with pytest.warns(TruncationWarning) as caught:
        found = encoder.explain("weather " * 300, "sun " * 400)
    assert [str(each.message)[:24] for each in caught] == [
        "a was cut at 256 tokens;",
        "b was cut at 256 tokens;",
    ]
    assert found.matrix.shape == (256, 256)
    assert found.unread == (46, 146)
    check_sums(found)


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda e: e.explain(LONG, "dog"), 1),
        (lambda e: e.explain(LONG, LONG), 2),
        (lambda e: module.explain(e, LONG, "dog"), 1),
        (lambda e: e.explain_components("dog", LONG), 1),
        (lambda e: contrast(e, LONG, "dog", "cat"), 1),
        (lambda e: explain_deletions(e, LONG, "dog"), 1),
        (lambda e: explain_components(e, LONG, "dog"), 1),
        (lambda e: token_components(e, LONG), 1),
    ],
)
def test_one_truncation_warning_at_the_callers_line(
    double: SentenceEncoder, call: Callable[[SentenceEncoder], object], count: int
) -> None:
    with pytest.warns(TruncationWarning) as caught:
        call(double)
    assert len(caught) == count
    for warning in caught:
        line = linecache.getline(warning.filename, warning.lineno)
        assert "(lambda e: " in line, f"{warning.filename}:{warning.lineno}"


def test_model_is_left_as_it_is(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.train()
    tiny_encoder.explain("dog", "cat")
    explain_deletions(tiny_encoder, "dog", "cat")
    assert tiny_encoder.training
    assert tiny_encoder.dtype == torch.float32
    assert not any(part._forward_hooks for part in tiny_encoder.modules())


# --- Published weights: the numbers that the issue and the lecture speak of -----------------------


def test_measured_cells(encoder: SentenceEncoder) -> None:
    found = encoder.explain(WEATHER, SUNNY)
    check_sums(found)
    assert found.similarity == pytest.approx(0.6660, abs=5e-5)
    cells = {
        (x, y): found.matrix[i, j]
        for i, x in enumerate(found.labels[0])
        for j, y in enumerate(found.labels[1])
    }
    largest = sorted(cells, key=lambda pair: -cells[pair])[:2]
    assert largest == [("weather", "sunny"), ("weather", "outside")]
    assert cells["weather", "sunny"] == pytest.approx(0.042, abs=5e-4)
    assert cells["weather", "outside"] == pytest.approx(0.035, abs=5e-4)
    assert found.special / found.similarity == pytest.approx(0.29, abs=5e-3)


def test_measured_share_is_not_cause(encoder: SentenceEncoder) -> None:
    found = encoder.explain(WEATHER, SUNNY)
    share = dict(zip(found.labels[0], found.share_a, strict=True))
    deletions = explain_deletions(encoder, WEATHER, SUNNY)
    change = dict(zip(deletions.labels, deletions.change, strict=True))
    assert share["today"] == pytest.approx(0.081, abs=5e-4)
    assert change["today"] == pytest.approx(-0.039, abs=5e-4)


def test_measured_not_good(encoder: SentenceEncoder) -> None:
    found = encoder.explain("good", "not good")
    assert found.share_b[found.labels[1].index("not")] > 0.01


def test_residual_of_the_published_model(encoder64: SentenceEncoder) -> None:
    for a, b in [(WEATHER, SUNNY), ("", WEATHER), ("Ünïcode 日本語 \u200b", "naïve")]:
        found = encoder64.explain(a, b)
        check_sums(found, 1e-14)
        assert found.similarity == pytest.approx(cosine(encoder64, a, b), abs=1e-14)


# --- Parts of the network -------------------------------------------------------------------------


def labels_of(layers: int, heads: int) -> list[str]:
    labels = [f"embeddings.{x}" for x in ("word", "position", "token_type", "layer_norm.bias")]
    for n in range(layers):
        labels += [f"layers.{n}.attention.head.{head}" for head in range(heads)]
        labels += [
            f"layers.{n}.{x}"
            for x in (
                "attention.bias",
                "attention_layer_norm.bias",
                "feed_forward",
                "feed_forward.bias",
                "feed_forward_layer_norm.bias",
            )
        ]
    return labels


def test_components_add_up(double: SentenceEncoder) -> None:
    for text in TEXTS:
        found = token_components(double, text)
        assert list(found.labels) == labels_of(2, 4)
        expected = double.trace(text)["layers.1.feed_forward_layer_norm.output"].numpy()
        np.testing.assert_array_equal(found.hidden_states, expected)
        np.testing.assert_allclose(found.parts.sum(axis=0), expected, rtol=0, atol=1e-12)
        assert found.residual <= 1e-12
        assert found.text == text


def test_106_components(encoder64: SentenceEncoder) -> None:
    found = token_components(encoder64, WEATHER)
    assert list(found.labels) == labels_of(6, 12)
    assert found.parts.shape == (106, 8, 384)
    expected = encoder64.trace(WEATHER)["layers.5.feed_forward_layer_norm.output"].numpy()
    assert np.abs(found.parts.sum(axis=0) - expected).max() <= 1e-12


def test_components_by_hand(double: SentenceEncoder) -> None:
    """What layer 1 writes, by the formula."""

    def through(norm: Any, scale: Tensor, x: Tensor) -> Tensor:
        scaled: Tensor = norm.weight * (x - x.mean(dim=1, keepdim=True)) / scale[:, None]
        return scaled.detach()

    text = TEXTS[2]
    trace = double.trace(text)
    layer: Any = double.bert.layers[1]
    part = dict(zip(*[token_components(double, text).__dict__[x] for x in ("labels", "parts")],
                    strict=True))  # fmt: skip

    def first(x: Tensor) -> Tensor:
        scale = trace["layers.1.attention_layer_norm.scale"]
        return through(layer.attention_layer_norm, scale, x)

    def second(x: Tensor) -> Tensor:
        scale = trace["layers.1.feed_forward_layer_norm.scale"]
        return through(layer.feed_forward_layer_norm, scale, x)

    def same(label: str, expected: Tensor) -> None:
        expected = expected.detach().expand(len(trace["tokens"]), -1)
        np.testing.assert_allclose(part[label], expected.numpy(), rtol=0, atol=1e-12)

    for head in range(4):
        columns = layer.attention.output.weight[:, 8 * head : 8 * head + 8]
        written = trace["layers.1.attention.context"][:, head] @ columns.T
        same(f"layers.1.attention.head.{head}", second(first(written)))
    written = trace["layers.1.feed_forward.activation"] @ layer.feed_forward.output.weight.T
    same("layers.1.feed_forward", second(written))
    same("layers.1.feed_forward.bias", second(layer.feed_forward.output.bias[None]))
    same("layers.1.attention.bias", second(first(layer.attention.output.bias[None])))
    same("layers.1.attention_layer_norm.bias", second(layer.attention_layer_norm.bias[None]))
    same("layers.1.feed_forward_layer_norm.bias", layer.feed_forward_layer_norm.bias[None])


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_similarity_by_components(tiny_encoder: SentenceEncoder, cls: bool, layers: int) -> None:
    pooling = ClsPooling() if cls else MeanPooling()
    encoder = composed(tiny_encoder, pooling, Normalize(), layers=layers)
    groups = {
        "layer": ["embeddings", *(f"layers.{n}" for n in range(layers))],
        "head": [
            "embeddings",
            *(
                f"layers.{n}.{x}"
                for n in range(layers)
                for x in (*(f"attention.head.{head}" for head in range(4)), "rest")
            ),
        ],
        "all": labels_of(layers, 4),
    }
    whole = explain_components(encoder, TEXTS[2], TEXTS[4], by="all")
    for by, labels in groups.items():
        found = explain_components(encoder, TEXTS[2], TEXTS[4], by=by)
        assert sorted(found.labels) == sorted(labels)
        assert found.similarity == pytest.approx(cosine(encoder, TEXTS[2], TEXTS[4]), abs=1e-12)
        assert abs(found.residual) <= 1e-12
        assert found.matrix.sum() == pytest.approx(found.similarity, abs=1e-12)
        np.testing.assert_allclose(found.matrix.sum(axis=1), found.share_a, rtol=0, atol=1e-14)
        np.testing.assert_allclose(found.matrix.sum(axis=0), found.share_b, rtol=0, atol=1e-14)
        # A group is the sum of what is in it.
        rows = [n for n, label in enumerate(whole.labels) if label.startswith("embeddings")]
        place = found.labels.index("embeddings") if by != "all" else rows[0]
        expected = whole.share_a[rows].sum() if by != "all" else whole.share_a[rows[0]]
        assert found.share_a[place] == pytest.approx(expected, abs=1e-12)
        assert json.loads(json.dumps(found.to_dict()))["labels"] == list(found.labels)
        lines = str(found).splitlines()
        assert [line.split()[0] for line in lines[1:-2]] == list(found.labels)


# --- Deletions and contrasts ----------------------------------------------------------------------


def test_deletions_are_texts_encoded_again(double: SentenceEncoder) -> None:
    a, b = "A Café, walking dog!", "the cat"
    found = explain_deletions(double, a, b)
    without = {
        "A": " Café, walking dog!",
        "Café": "A , walking dog!",
        ",": "A Café walking dog!",
        "walking": "A Café,  dog!",
        "dog": "A Café, walking !",
        "!": "A Café, walking dog",
    }
    assert list(found.labels) == list(without)
    assert found.similarity == pytest.approx(cosine(double, a, b), abs=1e-12)
    for n, (label, text) in enumerate(without.items()):
        assert a[slice(*found.spans[n])] == label
        assert found.without[n] == pytest.approx(cosine(double, text, b), abs=1e-12)
        assert found.change[n] == pytest.approx(found.similarity - found.without[n], abs=1e-15)
    assert np.abs(found.change).max() > 1e-4
    rows = str(found).splitlines()
    assert [row.split()[0] for row in rows] == ["without", *without, "(nothing)"]
    assert float(rows[1].split()[2]) == pytest.approx(-found.change[0], abs=5.1e-5)
    assert json.loads(json.dumps(found.to_dict()))["change"] == found.change.tolist()


def test_nothing_to_delete(double: SentenceEncoder) -> None:
    found = explain_deletions(double, "", "dog")
    assert (found.labels, found.without.shape, found.change.shape) == ((), (0,), (0,))
    assert found.similarity == pytest.approx(cosine(double, "", "dog"), abs=1e-12)


@pytest.mark.parametrize("by", ["token", "word", "group"])
def test_contrast_adds_up(double: SentenceEncoder, by: str) -> None:
    for query in TEXTS:
        a, b = TEXTS[2], TEXTS[4]
        found = contrast(double, query, a, b, by=by)
        assert found.similarity_a == pytest.approx(cosine(double, query, a), abs=1e-12)
        assert found.similarity_b == pytest.approx(cosine(double, query, b), abs=1e-12)
        assert found.difference == pytest.approx(found.similarity_a - found.similarity_b, abs=1e-15)
        assert found.share.sum() == pytest.approx(found.difference, abs=1e-12)
        assert abs(found.residual) <= 1e-12
        first, second = (double.explain(query, text, by=by) for text in (a, b))
        np.testing.assert_allclose(
            found.share, first.share_a - second.share_a, rtol=0, atol=1e-14
        )  # fmt: skip
        assert (found.labels, found.spans) == (first.labels[0], first.spans[0])
    assert json.loads(json.dumps(found.to_dict()))["share"] == found.share.tolist()
    assert f"{found.difference:+.4f}" in str(found).splitlines()[-2]


# --- What it looks like ---------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["token", "word", "group"])
def test_table(double: SentenceEncoder, by: str) -> None:
    a, b = "The dog sees a walking cat.", "A Café, walking!"
    found = double.explain(a, b, by=by)
    lines = str(found).splitlines()
    assert lines[0].split() == ["best", "match", "value", "share", "of", "all"]
    inner = [i for i, special in enumerate(found.is_special[0]) if not special]
    columns = [j for j, special in enumerate(found.is_special[1]) if not special]
    total = 0.0
    for i, line in zip(inner, lines[1 : 1 + len(inner)], strict=True):
        label, match, value, share, percent = line.split()
        best = max(columns, key=lambda j: found.matrix[i, j])
        assert (label, match) == (found.labels[0][i], found.labels[1][best])
        assert value == f"{found.matrix[i, best]:+.4f}"
        assert percent == f"{found.matrix[i, columns].sum() / found.similarity:.0%}"
        total += float(share)
    special, rule, similarity, residual = lines[1 + len(inner) :]
    assert special.startswith("[CLS], [SEP]  of either text")
    assert special.split()[-2] == f"{found.special:+.4f}"
    assert set(rule) == {"-"}
    assert similarity.split() == ["similarity", f"{found.similarity:+.4f}", "100%"]
    assert total + found.special == pytest.approx(found.similarity, abs=5e-5 * (len(inner) + 1))
    assert residual == f"residual {found.residual:.1e}"


def test_table_escapes_what_can_not_be_printed(double: SentenceEncoder) -> None:
    lines = double.explain("dog\x1b[31m", "do\x07g").table().splitlines()
    assert all(line.isprintable() for line in lines)
    assert r"do\x07g" in lines[1]


def test_to_dict_is_json(double: SentenceEncoder) -> None:
    with pytest.warns(TruncationWarning):
        found = double.explain(LONG, "Café")
    read = json.loads(json.dumps(found.to_dict()))
    assert read["similarity"] == found.similarity
    assert read["matrix"] == found.matrix.tolist()
    assert read["special"] == found.special
    assert read["residual"] == found.residual
    for side, text in (("a", LONG), ("b", "Café")):
        n = "ab".index(side)
        assert read[side]["text"] == text
        assert tuple(read[side]["labels"]) == found.labels[n]
        assert tuple(map(tuple, read[side]["spans"])) == found.spans[n]
        assert tuple(read[side]["is_special"]) == found.is_special[n]
        assert read[side]["unread_tokens"] == found.unread[n]
    assert read["a"]["share"] == found.share_a.tolist()
    assert read["b"]["share"] == found.share_b.tolist()
    assert read["a"]["pull"] == found.pull_a.tolist()
    assert read["b"]["pull"] == found.pull_b.tolist()


class Table(html.parser.HTMLParser):
    """The text of each cell, by row, and the tags met."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.caption = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "meta":
            return
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self._open and self._open[-1] == "caption":
            self.caption += data


def test_html_holds_the_matrix_and_escapes_the_text(double: SentenceEncoder) -> None:
    double.max_seq_length = 24
    a, b = 'a <b>dog</b> & "cat" \'', "</table><script> café"
    found = double.explain(a, b)
    page = found.to_html()
    for scope in ("row", "col"):
        assert f'<th scope="{scope}">&lt;</th>' in page
    table = Table(page)
    assert table.tags == {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"}
    assert table.caption.startswith(f"{a} / {b}: similarity {found.similarity:.4f}")
    assert table.rows[0] == ["", *found.labels[1], "sum"]
    assert [row[0] for row in table.rows[1:-1]] == list(found.labels[0])
    for row, cells, share in zip(table.rows[1:-1], found.matrix, found.share_a, strict=True):
        assert row[1:] == [f"{x:+.4f}" for x in (*cells, share)]
    assert table.rows[-1] == [
        "sum", *(f"{x:+.4f}" for x in found.share_b), f"{found.similarity:+.4f}",
    ]  # fmt: skip


def test_html_shades_by_sign_and_size(double: SentenceEncoder) -> None:
    found = double.explain("dog", "walking cat", by="token")
    page = found.to_html()
    assert page.count("rgba(0,114,178,") == (found.matrix >= 0).sum()
    assert page.count("rgba(230,159,0,") == (found.matrix < 0).sum()
    assert ",0.600)" in page  # the largest


def is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG\r\n\x1a\n") and data.rstrip().endswith(b"IEND\xaeB`\x82")


def png_size(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.slow
def test_png(double: SentenceEncoder, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'minilm[plot]'")
    path = tmp_path / "pairs.png"
    found = double.explain("A Café $ walking $!", "the dog")
    found.to_png(path)
    data = path.read_bytes()
    assert is_png(data)
    width, height = png_size(data)
    assert 300 < width < 3000
    assert 200 < height < 3000
    with (tmp_path / "again.png").open("wb") as file:
        found.to_png(file)
    assert is_png((tmp_path / "again.png").read_bytes())
    from matplotlib.image import imread

    pixels = imread(path).reshape(-1, 4)
    assert len(np.unique(pixels, axis=0)) > 50  # not a blank page
    blue = (pixels[:, 2] > pixels[:, 0] + 0.5).any()  # the ends of the scale are in the bar
    orange = (pixels[:, 0] > pixels[:, 2] + 0.5).any()
    assert blue
    assert orange


def test_png_of_long_texts_stays_small(encoder: SentenceEncoder, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'minilm[plot]'")
    path = tmp_path / "pairs.png"
    encoder.explain("weather " * 100, "sun " * 100).to_png(path)
    assert max(png_size(path.read_bytes())) <= 6001


def test_png_without_matplotlib(
    double: SentenceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "pairs.png"
    with pytest.raises(MissingPackageError, match=r'matplotlib: pip install "minilm\[plot\]"') as c:
        double.explain("dog", "cat").to_png(path)
    assert isinstance(c.value, ImportError)
    assert (c.value.package, c.value.extra) == ("matplotlib", "plot")
    assert not path.exists()


# --- Errors and words -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda e: e.explain("a", None), "b"),
        (lambda e: e.explain(3, "b"), "a"),
        (lambda e: e.contrast(["a"], "b", "c"), "query"),
        (lambda e: e.explain_deletions("a", b"b"), "b"),
        (lambda e: e.explain_components(None, "b"), "a"),
        (lambda e: token_components(e, NOTHING), "text"),
    ],
)
def test_what_is_no_text(
    double: SentenceEncoder, call: Callable[[Any], object], argument: str
) -> None:
    with pytest.raises(InputTypeError, match=f"{argument} is .*; pass a string") as caught:
        call(double)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.explain("a", "b", by="layer"), "by is 'layer'; pass one of word, token"),
        (lambda e: contrast(e, "a", "b", "c", by="head"), "by is 'head'; pass one of word"),
        (lambda e: explain_components(e, "a", "b", by="word"), "by is 'word'; pass one of layer"),
        (lambda e: e.explain("a", "b", dtype="int8"), "dtype is 'int8'"),
        (lambda e: e.explain("a", "\udc00"), "b.* has a lone surrogate"),
    ],
)
def test_bad_values(
    double: SentenceEncoder, call: Callable[[SentenceEncoder], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(double)


def test_a_vector_of_zeros_has_no_cosine(double: SentenceEncoder) -> None:
    norm: Any = double.bert.layers[1]
    with torch.no_grad():
        norm.feed_forward_layer_norm.weight.zero_()
        norm.feed_forward_layer_norm.bias.zero_()
    with pytest.raises(InputError, match="the vector of a is 0") as caught:
        double.explain("dog", "cat")
    assert caught.value.argument == "a"


def test_docstrings_say_what_kind_it_is() -> None:
    kinds = {
        "explain": "Identity.",
        "token_components": "Identity.",
        "explain_components": "Identity, given the measured divisors.",
        "contrast": "Identity.",
        "explain_deletions": "Measurement.",
    }
    functions = {
        name for name in module.__all__ if inspect.isfunction(getattr(module, name))
    }  # fmt: skip
    assert functions == set(kinds)
    for name, kind in kinds.items():
        text = inspect.getdoc(getattr(module, name)) or ""
        assert text.startswith(kind)
        assert "may not be claimed" in text


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--device", "cpu"]


@pytest.fixture
def loaded(tiny_folder: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(tiny_folder, device="cpu")


@pytest.mark.parametrize("by", ["word", "token", "group"])
def test_command_prints_the_table(
    model: list[str], loaded: SentenceEncoder, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = "The dog\nsees a walking cat.", "A Café, walking!"
    options = [] if by == "word" else ["--by", by]
    assert cli.main(["explain", a, b, *options, *model]) == 0
    header, *table = capsys.readouterr().out.splitlines()
    assert header == "The dog sees a walking cat. / A Café, walking!"
    assert "\n".join(table) == loaded.explain(a, b, by=by).table()


@pytest.mark.process
def test_command_in_a_process_of_its_own(model: list[str], loaded: SentenceEncoder) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minilm", "explain", "dog", "", *model],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    expected = 'dog / ""\n' + loaded.explain("dog", "").table() + "\n"
    assert done.stdout.decode() == expected


def test_command_computes_in_the_dtype_asked_for(
    model: list[str], loaded: SentenceEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", "dog", "cat", "--json", "--dtype", "float32", *model]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read == loaded.explain("dog", "cat", dtype="float32").to_dict()


def test_command_json(
    model: list[str], loaded: SentenceEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", "A Café", "dog", "--by", "token", "--json", *model]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == loaded.explain("A Café", "dog", by="token").to_dict()


def test_command_writes_files(
    model: list[str], loaded: SentenceEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'minilm[plot]'")
    png, page = tmp_path / "a b.png", tmp_path / "ü.html"
    a, b = "<i>Café</i>", "dog"
    arguments = ["explain", a, b, "--png", str(png), "--html", str(page), *model]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{a} / {b}\n")
    assert is_png(png.read_bytes())
    text = page.read_text(encoding="utf-8")
    assert text.startswith('<!doctype html>\n<meta charset="utf-8">\n<title>&lt;i&gt;Café')
    assert loaded.explain(a, b).to_html() in text
    assert Table(text).rows
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".png", ".html"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(*arguments: str, **environment: str) -> str:
    """What the command prints where somebody looks on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NO_COLOR", raising=False)
        for name, value in ({"TERM": "xterm"} | environment).items():
            patch.setenv(name, value)
        shown, errors = Terminal(), io.StringIO()
        patch.setattr(sys, "stdout", shown)
        patch.setattr(sys, "stderr", errors)
        assert cli.main(["explain", *arguments]) == 0
    assert errors.getvalue() == ""
    return shown.getvalue()


def test_colour_on_a_terminal_only(model: list[str], loaded: SentenceEncoder) -> None:
    plain = minilm("explain", "dog", "a cat", *model).stdout.decode()
    coloured = on_terminal("dog", "a cat", *model)
    assert "\x1b" not in plain
    assert coloured.startswith("\x1b[1mdog / a cat\x1b[0m\n")
    assert f"\x1b[34m{loaded.explain('dog', 'a cat').similarity:+.4f}\x1b[0m" in coloured
    for code in ("1", "34", "33", "0"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == plain
    assert on_terminal("dog", "a cat", *model, NO_COLOR="1") == plain
    assert on_terminal("dog", "a cat", *model, TERM="dumb") == plain
    assert "\x1b" not in on_terminal("dog", "a cat", "--json", *model)


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="there is no pty there")
def test_colour_on_a_terminal_of_the_system(model: list[str]) -> None:
    import pty

    ours, theirs = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-m", "minilm", "explain", "dog", "a cat", *model],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=clean | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )
    os.close(theirs)
    data = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # Linux says so that the other side is closed
            break
        if not block:
            break
        data += block
    os.close(ours)
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, b"")
    assert data.decode().replace("\r\n", "\n") == on_terminal("dog", "a cat", *model)


def test_truncation_is_a_line_on_standard_error(model: list[str]) -> None:
    done = minilm("explain", LONG, "dog", *model)
    assert done.returncode == 0
    assert done.stderr.decode() == (
        "minilm: warning: a was cut at 12 tokens; 71% of its tokens were not read\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["only one"], 2, "required: B"),
        (["a", "b", "--by", "layer"], 2, "argument --by: invalid choice: 'layer'"),
        (["a", "b", "--png", "no/such/folder/x.png"], 1, "minilm: no/such/folder/x.png: no/such"),
        (["a", "b", "--html", "no/such/folder/x"], 1, "minilm: no/such/folder/x: no/such/folder "),
        (["a", "b", "--dtype", "int4"], 1, "minilm: dtype is 'int4'; pass one of float64"),
        (["a", "b", "--model", "./no/folder"], 1, "no/folder: no such folder"),
    ],
)
def test_command_fails_in_one_line(
    model: list[str], arguments: list[str], code: int, message: str
) -> None:
    done = minilm("explain", *model, *arguments)
    assert done.returncode == code
    errors = done.stderr.decode()
    assert message.replace("/", os.sep) in errors or message in errors
    assert "Traceback" not in errors
    if code == 1:
        assert errors.count("\n") == 1
    assert done.stdout == b""


def test_command_without_matplotlib(
    model: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "x.png"
    assert cli.main(["explain", "dog", "cat", "--png", str(path), *model]) == 1
    errors = capsys.readouterr().err
    assert errors == 'minilm: to_png needs matplotlib: pip install "minilm[plot]"\n'
    assert list(tmp_path.glob("*.p*")) == []

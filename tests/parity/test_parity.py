"""The parity check itself: it passes on the right model, and on no other.

Here without the reference library; with it in tests/reference/test_stages.py.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import DATA
from minilm import SentenceEncoder
from minilm.parity.stages import (
    Golden,
    Report,
    Row,
    compare_gradients,
    compare_ids,
    compare_stages,
    compare_with_golden,
    record_stages,
    stage_names,
    within_own_error,
)
from mutations import MUTATIONS, planted


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.load(DATA / "golden.json")


@pytest.fixture(scope="module")
def short(golden: Golden) -> Golden:
    """The twelve shortest of the texts, which take a twentieth of the work."""
    order = sorted(range(len(golden.texts)), key=lambda row: len(golden.input_ids[row]))[:12]
    return Golden(
        [golden.texts[row] for row in order],
        [golden.input_ids[row] for row in order],
        golden.embeddings[order],
    )


def test_golden_file_is_complete(golden: Golden) -> None:
    assert len(golden.texts) == len(golden.input_ids) == 32
    assert golden.embeddings.shape == (32, 384)
    lengths = [len(ids) for ids in golden.input_ids]
    assert min(lengths) == 2
    assert max(lengths) == 256
    norms = torch.linalg.vector_norm(golden.embeddings, dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_published_model_equals_golden_values(published: Path, golden: Golden, dtype: str) -> None:
    encoder = SentenceEncoder.from_pretrained(published, device="cpu", dtype=dtype)
    report = Report(golden.texts)
    report.add(dtype, compare_with_golden(encoder, golden))
    assert report.passed, report.to_text()


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_fault_fails(
    encoder64: SentenceEncoder, golden: Golden, short: Golden, name: str
) -> None:
    """On the short texts already, or else on all."""
    with planted(name, encoder64) as broken:
        report = Report(short.texts)
        report.add(name, compare_with_golden(broken, short))
        if report.passed:
            report = Report(golden.texts)
            report.add(name, compare_with_golden(broken, golden))
        assert not report.passed


def test_model_is_whole_again_after_the_faults(
    encoder64: SentenceEncoder, golden: Golden, short: Golden
) -> None:
    for texts in (short, golden):
        assert all(row.passed for row in compare_with_golden(encoder64, texts))


def test_at_least_twenty_faults_are_planted() -> None:
    assert len(MUTATIONS) >= 20


def test_stage_names_are_in_order_of_execution() -> None:
    assert stage_names(2) == [
        "embeddings.layer_norm.output",
        "layers.0.attention.probabilities",
        "layers.0.feed_forward_layer_norm.output",
        "layers.1.attention.probabilities",
        "layers.1.feed_forward_layer_norm.output",
        "pooled",
        "embedding",
    ]


def test_recorded_stages_are_those_of_the_model(tiny_encoder: SentenceEncoder) -> None:
    features = tiny_encoder.tokenize(["the dog sees the man", "a cat"])
    stages = record_stages(tiny_encoder, features)
    assert list(stages) == stage_names(2)
    with torch.no_grad():
        result = tiny_encoder(features)
        embeddings = tiny_encoder.bert.embeddings(features["input_ids"])
    assert torch.equal(stages["embeddings.layer_norm.output"], embeddings)
    assert torch.equal(stages[LAST], result["token_embeddings"])
    assert torch.equal(stages["embedding"], result["sentence_embedding"])
    probabilities = stages["layers.0.attention.probabilities"]  # [batch, heads, query, key]
    assert probabilities.shape == (2, 4, 7, 7)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 7))
    assert probabilities[1, :, :, 4:].abs().max() == 0  # the second text has four tokens


def test_recording_leaves_no_hook_behind(tiny_encoder: SentenceEncoder) -> None:
    def break_layer(*_: Any) -> None:
        raise RuntimeError("planted")

    handle = tiny_encoder.bert.layers[1].register_forward_hook(break_layer)
    with pytest.raises(RuntimeError, match="planted"):
        record_stages(tiny_encoder, tiny_encoder.tokenize("a cat"))
    handle.remove()
    for module in tiny_encoder.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def as_source(encoder: SentenceEncoder) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda features: record_stages(encoder, features)


LAST = "layers.1.feed_forward_layer_norm.output"
TEXTS = ["the dog bites the man", "the man sees a dog", "sun", "", "a cat is out walking ."]


def test_a_model_equals_itself(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.double()
    rows = compare_stages(tiny_encoder, as_source(tiny_encoder), TEXTS, tokens_per_batch=15)
    assert all(row.passed for row in rows)
    assert [row.stage for row in rows[:7]] == stage_names(2)
    assert all(row.measures["max abs"] == 0 for row in rows[:7])


def test_first_diverging_stage_and_worst_text_are_named(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.double()
    right = as_source(tiny_encoder)

    def wrong_in_layer_2(features: dict[str, Tensor]) -> dict[str, Tensor]:
        stages = right(features)
        is_sun = (features["input_ids"] == 12).any(dim=1)  # "sun" stands in TEXTS[2] alone
        stages[LAST] = stages[LAST] + is_sun[:, None, None] * 1e-9
        return stages

    report = Report(TEXTS)
    report.add("planted", compare_stages(tiny_encoder, wrong_in_layer_2, TEXTS))
    assert not report.passed
    first = report.first_divergence
    assert first is not None
    assert first[1].stage == LAST
    assert first[1].worst_text == 2
    text = report.to_text()
    assert f"first stage that diverges: {LAST} (planted)" in text
    assert "[2] 'sun'" in text
    assert json.loads(json.dumps(report.to_dict()))["first_divergence"] == LAST


def test_padding_positions_are_not_compared(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.double()
    right = as_source(tiny_encoder)

    def other_at_padding(features: dict[str, Tensor]) -> dict[str, Tensor]:
        padding = (features["attention_mask"] == 0).unsqueeze(-1)
        stages = right(features)
        return stages | {
            name: stages[name].masked_fill(padding, 7.0)
            for name in ("embeddings.layer_norm.output", LAST)
        }

    assert all(row.passed for row in compare_stages(tiny_encoder, other_at_padding, TEXTS))


def test_more_rounding_than_the_references_fails(tiny_encoder: SentenceEncoder) -> None:
    """Far below what may differ at most, in every number: twice its error passes nowhere."""
    exact = as_source(copy.deepcopy(tiny_encoder).double())
    features = tiny_encoder.tokenize(TEXTS)
    right = record_stages(tiny_encoder, features)

    def rows(share: float) -> dict[str, Row]:
        def its(features: dict[str, Tensor]) -> dict[str, Tensor]:
            ours, true = record_stages(tiny_encoder, features), exact(features)
            return {name: true[name] + (ours[name] - true[name]) * share for name in ours}

        found = compare_stages(tiny_encoder, its, TEXTS, truth=exact)
        return {row.stage: row for row in found}

    assert all(rows(1.0)[name].passed for name in right)
    assert not any(rows(0.5)[name].passed for name in right)


def test_nan_fails(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.double()
    right = as_source(tiny_encoder)

    def with_nan(features: dict[str, Tensor]) -> dict[str, Tensor]:
        stages = right(features)
        return stages | {"pooled": stages["pooled"] * torch.nan}

    rows = {row.stage: row for row in compare_stages(tiny_encoder, with_nan, TEXTS)}
    assert not rows["pooled"].passed
    assert rows[LAST].passed


def test_a_different_id_fails(tiny_encoder: SentenceEncoder) -> None:
    assert tiny_encoder.tokenizer is not None
    ids = tiny_encoder.tokenizer(TEXTS, 12).input_ids
    assert compare_ids(tiny_encoder.tokenizer, 12, TEXTS, ids)[0].passed
    ids[3] = [2, 3, 3]
    row = compare_ids(tiny_encoder.tokenizer, 12, TEXTS, ids)[0]
    assert not row.passed
    assert row.worst_text == 3


def test_report_without_bars_does_not_pass() -> None:
    report = Report([])
    assert not report.passed
    report.add("shown only", [Row("stage", {"max abs": 0.0})])
    assert not report.passed


def test_row_compares_every_measure_with_its_bar() -> None:
    bars = {"max abs": 1e-6, "rms": 1e-7}
    assert Row("stage", {"max abs": 1e-6, "rms": 1e-7}, bars).passed
    assert not Row("stage", {"max abs": 1e-6, "rms": 2e-7}, bars).passed
    assert not Row("stage", {"max abs": float("nan"), "rms": 0.0}, bars).passed


def test_gradients_must_be_of_the_same_tensors() -> None:
    ones = {"query.weight": torch.ones(2), "key.bias": torch.zeros(2)}
    assert all(row.passed for row in compare_gradients(ones, ones))
    wrong = {
        "query.weight": torch.full((2,), 1 + 1e-9, dtype=torch.float64),
        "key.bias": torch.full((2,), 1e-7),
    }
    assert not any(row.passed for row in compare_gradients(wrong, ones))
    for others in ({}, {"query.weight": torch.ones(2)}):
        with pytest.raises(ValueError, match="gradients don't match"):
            compare_gradients(ones, others)
    with pytest.raises(ValueError, match="no gradient at all"):
        compare_gradients({}, {})


def test_a_relaxed_bar_is_shown_and_has_an_end() -> None:
    row = Row(
        "layers.0.attention.probabilities",
        {"max abs": 5e-6},
        {"max abs": 6e-6},
        stated={"max abs": 3e-6},
    )
    report = Report([], [("float32", [row])])
    assert "3.0e-06 > 6.0e-06  PASS" in report.to_text()
    assert within_own_error({"max abs": 3e-6}, {"max abs": 1e-6}) == {"max abs": 3e-6}
    assert within_own_error({"max abs": 3e-6}, {"max abs": 4e-6}) == pytest.approx(
        {"max abs": 6e-6}
    )
    assert within_own_error({"max abs": 3e-6}, {"max abs": 1.0}) == {"max abs": 1.2e-5}

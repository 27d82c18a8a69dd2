"""A layer's products in 8 bits: near the float32 ones, exact sums, a row's bits its own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import seeded_bert
from minilm import BertConfig, BertModel
from minilm.bert import BertLayer
from minilm.inference import int8
from minilm.inference.int8 import Int8Layer, calibrate, exact_products
from minilm.inference.packed import PackedBatch

SMALL = BertConfig(
    vocab_size=50,
    hidden_size=384,
    num_hidden_layers=2,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=64,
)
SHAPES = [(1152, 384), (384, 384), (1536, 384), (384, 1536)]


@pytest.fixture(autouse=True)
def needs_exact_products(request: pytest.FixtureRequest) -> None:
    if "any_processor" not in request.node.name and not exact_products():
        pytest.skip("this processor's sums of 8-bit products are not exact")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_product(outputs: int, inputs: int) -> tuple[int8._Product, Tensor, Tensor]:
    weight, bias = 0.1 * randn(outputs, inputs), randn(outputs, seed=1)
    weight[0, 5] = 1
    reach = 1 + 4 * torch.rand(inputs, generator=torch.Generator().manual_seed(2))
    if inputs == 1536:
        return int8._Product(weight, bias), weight, bias
    return int8._Product(weight, bias, -reach, reach), weight, bias


def calibrated(bert: BertModel, batches: list[PackedBatch]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        states = [bert.embeddings(b.input_ids, None, b.position_ids) for b in batches]
    return calibrate(bert, states, [b.attend for b in batches])


def token_ids(lengths: list[int], seed: int = 0) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(50, (length,), generator=random).tolist() for length in lengths]


@pytest.fixture(scope="module")
def small() -> tuple[BertModel, list[Int8Layer]]:
    bert = seeded_bert(SMALL)
    batch = PackedBatch(token_ids([*range(2, 41)] * 2))
    calibrations = calibrated(bert, [batch])
    layers = [
        Int8Layer(layer, calibration)
        for layer, calibration in zip(bert.layers, calibrations, strict=True)
        if isinstance(layer, BertLayer)
    ]
    return bert, layers


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_sums_are_those_of_whole_numbers(outputs: int, inputs: int, largest: bool) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=random)
    codes = torch.randint(0, 256, (80, inputs), generator=random)
    if largest:  # the first row: 255 wherever the first output's weight is positive
        weight = torch.where(weight > 0, 127, -127)
        codes = torch.where(codes > 127, 255, 0)
        codes[0] = torch.where(weight[0] > 0, 255, 0)
    for zero_point in (0, 128):
        sums = int8._multiply(
            codes.to(torch.uint8),
            1.0,
            zero_point,
            int8._pack(weight.to(torch.int8)),
            torch.ones(outputs),
            None,
            ("none", [], ""),
        )
        exact = (codes - zero_point) @ weight.T
        # float32 rounds whole numbers above 2**24, to the nearest one that it has.
        assert torch.equal(sums, exact.float())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_product_is_near_that_in_float32(outputs: int, inputs: int) -> None:
    product, weight, bias = make_product(outputs, inputs)
    add = randn(64, outputs, seed=4)
    if inputs == 1536:
        rows = F.gelu(2 * randn(64, inputs, seed=3))
        rows[:, 5] *= 5  # one column larger than all others
        exact = F.linear(rows, weight, bias) + add
        near = product.by_rows(rows.clone(), add=add)
    else:
        rows = randn(64, inputs, seed=3).clamp(-1, 1)
        exact = F.linear(rows, weight, bias) + add
        near = product(rows, add=add)
    error = (near - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.02  # above 0: it was computed in 8 bits


def test_a_column_of_large_weights_stays_in_float32() -> None:
    weight, bias = 0.01 * randn(384, 1536), torch.zeros(384)
    weight[:, 7] = 8 * randn(384, seed=1)
    rows = F.gelu(randn(16, 1536, seed=2))
    rows[:, 7] = 25
    exact = F.linear(rows, weight)
    near = int8._Product(weight, bias).by_rows(rows, add=torch.zeros(16, 384))
    assert (near - exact).abs().max() < 0.05  # the column's scale alone, 8 / 127, times 25 is 1.6


@pytest.mark.parametrize("variant", ["plain", "gelu", "add"])
def test_a_row_out_of_range_has_a_range_of_its_own(variant: str) -> None:
    product, weight, bias = make_product(384, 384)
    rows, add = randn(40, 384, seed=3).clamp(-1, 1), randn(40, 384, seed=4)
    rows[[3, 17]] *= 30
    then = int8._GELU if variant == "gelu" else int8._NOTHING
    given = add if variant == "add" else None
    near = product(rows, then=then, add=given)
    exact = F.linear(rows, weight, bias)
    exact = F.gelu(exact) if variant == "gelu" else exact + add if variant == "add" else exact
    error = (near - exact).square().mean(1).sqrt() / exact.std(1)
    assert error.min() > 1e-4
    assert error.max() < 0.02  # cut off, those two would be wrong by 0.9
    usual = product(rows[:3], then=then, add=None if given is None else given[:3])
    assert torch.equal(near[:3], usual)  # the others are as they were without it


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_row_has_its_bits_in_any_company(outputs: int, inputs: int) -> None:
    product, _, _ = make_product(outputs, inputs)
    rows, add = randn(2048, inputs), randn(2048, outputs, seed=1)
    rows[::7] *= 9  # out of range

    def compute(part: slice, variant: str) -> Tensor:
        taken, added = rows[part].clone(), add[part]
        if inputs == 1536:
            return product.by_rows(taken, add=added)
        if variant == "gelu":
            return product(taken, then=("gelu", [], "none"))
        return product(taken, add=added if variant == "add" else None)

    for variant in ("plain", "gelu", "add"):
        together = compute(slice(None), variant)
        for count in (*range(1, 65), 80, 144, 512, 1024):
            for start in (0, 3):
                part = slice(start, start + count)
                assert torch.equal(compute(part, variant), together[part]), (count, start)


def test_a_layer_is_near_its_forward(small: tuple[BertModel, list[Int8Layer]]) -> None:
    bert, layers = small
    batch = PackedBatch(token_ids([5, 9, 9, 30], seed=1))
    with torch.no_grad():
        plain = bert.embeddings(batch.input_ids, None, batch.position_ids)
        coded = plain
        for layer, coded_layer in zip(bert.layers, layers, strict=True):
            plain = layer(plain, batch.attend)
            coded = coded_layer(coded, batch.attend)
    cosines = F.cosine_similarity(plain, coded)
    assert 0.998 < cosines.min() < 0.9999999


def test_a_layer_passes_on_what_is_not_finite(small: tuple[BertModel, list[Int8Layer]]) -> None:
    hidden_states = randn(16, 384)
    hidden_states[3, 5] = torch.nan
    context = randn(16, 384)
    _, (layer, _) = small
    summed = layer.attention_output(context, hidden_states)
    assert not summed[3, 5].isfinite()
    activation = layer.intermediate(hidden_states)
    assert not layer.output(activation, hidden_states)[3, 5].isfinite()


def test_calibration_takes_the_mean_error_off() -> None:
    bert = seeded_bert(SMALL)
    batch = PackedBatch(token_ids([30] * 10))
    first = bert.layers[0]
    assert isinstance(first, BertLayer)
    calibration = calibrated(bert, [batch])[0]
    rough = {name: value for name, value in calibration.items() if "error" not in name}
    with torch.no_grad():
        states = bert.embeddings(batch.input_ids, None, batch.position_ids)
        exact = torch.cat([t.flatten(1) for t in _query_key_value(first, states)], 1).mean(0)
    mean = [
        torch.cat([t.flatten(1) for t in Int8Layer(first, given).query_key_value(states)], 1).mean(
            0
        )
        for given in (rough, calibration)
    ]
    assert (mean[1] - exact).abs().max() < 1e-5 < (mean[0] - exact).abs().max()
    low, high = (calibration[f"query_key_value.{end}"] for end in ("low", "high"))
    assert ((states < low).sum(0) <= 1).all()  # a thousandth of 300 tokens, rounded
    assert ((states > high).sum(0) <= 1).all()


def _query_key_value(layer: BertLayer, states: Tensor) -> list[Tensor]:
    attention = layer.attention
    return [linear(states) for linear in (attention.query, attention.key, attention.value)]


def test_sums_that_are_cut_off_are_found_on_any_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def saturated(*arguments: Any) -> Tensor:
        return torch.full((len(arguments[0]), 32), 32767.0)

    monkeypatch.setattr(int8, "_multiply", saturated)
    assert not exact_products.__wrapped__()

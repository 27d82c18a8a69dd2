"""Whatever is done to a model, `encode` computes what the model is now, and nothing else."""

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from flat import (
    INTERMEDIATE,
    LAYER,
    MODES,
    NORM,
    PUBLISHED_TEXTS,
    ROUNDING,
    TEXTS,
    as_in_encode,
    close,
    flat_layers,
    fresh,
    linear_layers,
    make_encoder,
    part,
    plain_vectors,
    randn,
    replace_layers,
    untyped,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from conftest import TINY, seeded_bert
from minilm import SentenceEncoder
from minilm.inference import kernels
from minilm.inference.kernels import (
    FastLayer,
    accelerate,
)

l1_unstructured: Any = prune.l1_unstructured
remove_pruning: Any = prune.remove


# a weight that changes


def step(optimizer: Any, **options: Any) -> Callable[[Any], None]:
    def run(encoder: SentenceEncoder) -> None:
        try:
            chosen = optimizer(encoder.parameters(), lr=0.01, **options)
        except RuntimeError as error:  # older versions have no fused step on a CPU
            pytest.skip(str(error))
        encoder(encoder.tokenize(TEXTS))["sentence_embedding"][:, 0].sum().backward()
        chosen.step()

    return run


def load(assign: bool) -> Callable[[Any], None]:
    def run(encoder: SentenceEncoder) -> None:
        encoder.bert.load_state_dict(seeded_bert(seed=1).state_dict(), assign=assign)

    return run


def edit(mode: Any, change: Callable[[Any], Any], name: str = LAYER) -> Callable[[Any], None]:
    def run(encoder: SentenceEncoder) -> None:
        with mode():
            change(part(encoder, name))

    return run


def to_float64_and_back(encoder: SentenceEncoder) -> None:
    """Without a call in between; the change in float64 is what is to be seen."""
    encoder.to(torch.float64)
    with torch.no_grad():
        part(encoder, LAYER).weight.mul_(1.5)
    encoder.to(torch.float32)


def to_bfloat16_and_back(encoder: SentenceEncoder) -> None:
    encoder.to(torch.bfloat16).to(torch.float32)  # which rounds


def new_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


def parameters_from_a_vector(encoder: SentenceEncoder) -> None:
    vector = nn.utils.parameters_to_vector(encoder.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 1.1, encoder.parameters())


def moving_average(encoder: SentenceEncoder) -> None:
    for parameter, other in zip(
        encoder.bert.parameters(), seeded_bert(seed=1).parameters(), strict=True
    ):
        parameter.data.lerp_(other.data, 0.01)


def prune_by_data(encoder: SentenceEncoder) -> None:
    """The usual loop over all matrices."""
    for layer in linear_layers(encoder).values():
        weights = layer.weight.data
        weights[weights.abs() < 0.01] = 0


def write_through_numpy(layer: Any) -> None:
    layer.weight.detach().numpy()[3] = 0


PLAIN = torch.enable_grad
CHANGES: dict[str, Callable[[Any], None]] = {
    "SGD": step(torch.optim.SGD),
    "SGD, foreach": step(torch.optim.SGD, foreach=True),
    "AdamW": step(torch.optim.AdamW),
    "AdamW, foreach": step(torch.optim.AdamW, foreach=True),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "load_state_dict": load(assign=False),
    "load_state_dict, assign": load(assign=True),
    "to float64 and back": to_float64_and_back,
    "to bfloat16 and back": to_bfloat16_and_back,
    "no_grad": edit(torch.no_grad, lambda layer: layer.weight.mul_(1.5)),
    "no_grad, one row": edit(torch.no_grad, lambda layer: layer.weight[3].zero_()),
    "no_grad, one element": edit(torch.no_grad, lambda layer: layer.weight[3, 5].add_(1)),
    "no_grad, detached": edit(torch.no_grad, lambda layer: layer.weight.detach()[3].zero_()),
    "inference_mode": edit(torch.inference_mode, lambda layer: layer.weight.mul_(1.5)),
    "inference_mode, one row": edit(torch.inference_mode, lambda layer: layer.weight[3].zero_()),
    "inference_mode, copy_": edit(
        torch.inference_mode, lambda layer: layer.weight.copy_(layer.weight.flip(0))
    ),
    ".data.mul_": edit(PLAIN, lambda layer: layer.weight.data.mul_(1.5)),
    ".data.add_": edit(PLAIN, lambda layer: layer.weight.data.add_(randn(32, 32) * 1e-3)),
    ".data, half": edit(PLAIN, lambda layer: layer.weight.data[16:].mul_(1.5)),
    ".data.copy_": edit(PLAIN, lambda layer: layer.weight.data.copy_(randn(32, 32))),
    ".data =": edit(PLAIN, lambda layer: setattr(layer.weight, "data", randn(32, 32))),
    "vector_to_parameters": parameters_from_a_vector,
    "moving average": moving_average,
    "another Parameter": edit(PLAIN, new_parameter),
    "bias, no_grad": edit(torch.no_grad, lambda layer: layer.bias.add_(1), INTERMEDIATE),
    "bias, .data, one": edit(PLAIN, lambda layer: layer.bias.data[3].add_(5), INTERMEDIATE),
    "bias, .data =": edit(
        PLAIN, lambda layer: setattr(layer.bias, "data", randn(64)), INTERMEDIATE
    ),
    "bias =": edit(
        PLAIN, lambda layer: setattr(layer, "bias", nn.Parameter(randn(64))), INTERMEDIATE
    ),
    ".data, row": edit(PLAIN, lambda layer: layer.weight.data[3].zero_()),
    ".data, head": edit(PLAIN, lambda layer: layer.weight.data[:, 8:16].zero_()),
    ".data, column": edit(PLAIN, lambda layer: layer.weight.data[:, 8].zero_()),
    ".data[5] += 1": edit(
        PLAIN, lambda layer: layer.weight.data[5].add_(1), "bert.layers.0.feed_forward.output"
    ),
    ".data, pruning": prune_by_data,
    "numpy": edit(PLAIN, write_through_numpy),
    "norm, .data": edit(PLAIN, lambda norm: norm.weight.data[3].add_(1), NORM),
}


def assert_same(encoder: SentenceEncoder, vectors: Any, texts: list[str]) -> None:
    """As from a new encoder, of weights as in a file."""
    np.testing.assert_array_equal(vectors, fresh(encoder).encode(texts))


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_seen_by_the_next_call(tiny_encoder: SentenceEncoder, name: str) -> None:
    """Of any length."""
    before = tiny_encoder.encode(TEXTS)
    CHANGES[name](tiny_encoder)
    alone = tiny_encoder.encode(TEXTS[:1])
    after = tiny_encoder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-6  # else this test would prove nothing
    np.testing.assert_array_equal(alone, after[:1])
    assert_same(tiny_encoder, after, TEXTS)
    plain = seeded_bert()
    plain.load_state_dict(tiny_encoder.bert.state_dict())
    expected = plain_vectors(plain, tiny_encoder).numpy()
    np.testing.assert_allclose(after, expected, rtol=0, atol=ROUNDING)


# By `.data`, beside the sample that every call looks at; the last two leave the sum of a weight's
# words what it was.
SMALL: dict[str, Callable[[Any], Any]] = {
    "element": lambda weight: weight.data[3, 5].add_(0.05),
    "swapped": lambda weight: weight.data[3, 5:8].copy_(weight.data[3, [7, 6, 5]]),
    "signs": lambda weight: weight.data[3, 5:8:2].neg_(),
}
MANY = ["the dog"] * 1024  # 4 tokens each: enough for every number to be compared


@pytest.mark.parametrize("name", SMALL)
def test_small_change_is_seen_by_a_call_of_4096_tokens(
    tiny_encoder: SentenceEncoder, name: str
) -> None:
    before = tiny_encoder.encode(TEXTS)
    SMALL[name](part(tiny_encoder, LAYER).weight)
    after = tiny_encoder.encode(MANY + TEXTS)[-len(TEXTS) :]
    assert np.abs(after - before).max() > 1e-6
    assert_same(tiny_encoder, after, TEXTS)
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), after)


@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (384, 1536), (7, 3), (3, 8), (1, 5)])
def test_sample_crosses_every_row_and_column(shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    places = kernels._crossing(weight)

    def is_seen() -> bool:
        seen = any(map(np.any, places))
        weight.zero_()
        return seen

    for row in range(shape[0]):
        weight[row] = 1
        assert is_seen()
    for column in range(shape[1]):
        weight[:, column] = 1
        assert is_seen()


@pytest.mark.parametrize("name", ["AdamW", "load_state_dict", "no_grad", ".data, row", "numpy 16"])
def test_change_is_seen_in_bfloat16(name: str) -> None:
    encoder = make_encoder(seeded_bert(), dtype="bfloat16")
    before = encoder.encode(TEXTS)
    if name == "numpy 16":
        part(encoder, LAYER).weight.detach().view(torch.int16).numpy()[3] = 0
    else:
        CHANGES[name](encoder)
    after = encoder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_array_equal(after, copy.deepcopy(encoder).encode(TEXTS))


def head_to_zero(encoder: SentenceEncoder) -> None:
    part(encoder, "bert.layers.2.attention.output").weight.data[:, 32:64] = 0


def one_number(encoder: SentenceEncoder) -> None:
    part(encoder, "bert.layers.5.feed_forward.intermediate").weight.data[700, 123] += 1


def two_rows(encoder: SentenceEncoder) -> None:
    for name in ("bert.layers.2.attention.value", "bert.layers.5.feed_forward.intermediate"):
        part(encoder, name).weight.data[3] = 0


def one_row(encoder: SentenceEncoder) -> None:
    part(encoder, "bert.layers.1.feed_forward.output").weight.data[5] += 1


@pytest.mark.parametrize("change", [head_to_zero, one_number, two_rows, one_row, prune_by_data])
def test_change_of_the_published_model_is_seen(
    encoder: SentenceEncoder, change: Callable[[Any], None]
) -> None:
    changed = copy.deepcopy(encoder)
    before = changed.encode(PUBLISHED_TEXTS)
    np.testing.assert_array_equal(before, encoder.encode(PUBLISHED_TEXTS))
    change(changed)
    if change is one_number:
        changed.encode(["word " * 200] * 21)  # 4,096 tokens and more
    after = changed.encode(PUBLISHED_TEXTS)
    assert np.abs(after - before).max() > 1e-5
    np.testing.assert_array_equal(after, copy.deepcopy(changed).encode(PUBLISHED_TEXTS))
    with torch.no_grad():
        expected = changed(changed.tokenize(PUBLISHED_TEXTS))["sentence_embedding"]
    np.testing.assert_allclose(after, expected.numpy(), rtol=0, atol=ROUNDING)


def test_changes_one_after_the_other(tiny_encoder: SentenceEncoder) -> None:
    train = step(torch.optim.SGD)
    seen = [tiny_encoder.encode(TEXTS)]
    for _ in range(3):
        train(tiny_encoder)
        seen.append(tiny_encoder.encode(TEXTS))
        np.testing.assert_array_equal(seen[-1], fresh(tiny_encoder).encode(TEXTS))
        assert all(np.abs(seen[-1] - other).max() > 1e-5 for other in seen[:-1])


def test_training_of_the_published_model_is_seen(encoder: SentenceEncoder) -> None:
    trained = copy.deepcopy(encoder)
    before = trained.encode(PUBLISHED_TEXTS)
    for parameter in trained.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in trained.bert.layers.parameters() if parameter.requires_grad],
        lr=1e-6,
    )
    features = trained.tokenize(PUBLISHED_TEXTS)
    trained(features)["sentence_embedding"][:, 0].sum().backward()
    optimizer.step()
    after = trained.encode(PUBLISHED_TEXTS)
    assert np.abs(after - before).max() > 1e-6
    np.testing.assert_array_equal(after, copy.deepcopy(trained).encode(PUBLISHED_TEXTS))


def test_conversions_between_calls(tiny_encoder: SentenceEncoder) -> None:
    exact = fresh(tiny_encoder).to(torch.float64).encode(TEXTS)
    single = tiny_encoder.encode(TEXTS)
    np.testing.assert_array_equal(tiny_encoder.to(torch.float64).encode(TEXTS), exact)
    np.testing.assert_array_equal(tiny_encoder.to(torch.float32).encode(TEXTS), single)
    half = tiny_encoder.to(torch.bfloat16).encode(TEXTS)
    np.testing.assert_allclose(half, single, atol=2e-2)
    assert np.abs(half - single).max() > 1e-4


@pytest.mark.parametrize("name", [LAYER, INTERMEDIATE])
def test_bias_taken_away_and_given_back(tiny_encoder: SentenceEncoder, name: str) -> None:
    plain: Any = seeded_bert()
    layer = part(tiny_encoder, name)
    before, bias = tiny_encoder.encode(TEXTS), layer.bias
    layer.bias = plain.get_submodule(name.removeprefix("bert.")).bias = None
    after = tiny_encoder.encode(TEXTS)
    np.testing.assert_allclose(after, plain_vectors(plain, tiny_encoder), rtol=0, atol=ROUNDING)
    assert np.abs(after - before).max() > 1e-4
    layer.bias = bias
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), before)


def test_bias_of_another_dtype_is_seen(tiny_encoder: SentenceEncoder) -> None:
    before = tiny_encoder.encode(TEXTS)
    layer = part(tiny_encoder, INTERMEDIATE)
    layer.bias.data = layer.bias.data.double()
    assert flat_layers(tiny_encoder) == ["bert.layers.1"]
    with pytest.raises(RuntimeError, match="dtype"):  # as from any nn.Linear
        tiny_encoder.encode(TEXTS)
    layer.bias.data = layer.bias.data.float()
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), before)
    assert len(flat_layers(tiny_encoder)) == 2


def test_weight_transposed_where_it_is_is_seen(tiny_encoder: SentenceEncoder) -> None:
    before = tiny_encoder.encode(TEXTS)
    weight = part(tiny_encoder, LAYER).weight
    address, version = weight.data_ptr(), weight._version
    weight.data = weight.data.t()
    assert (weight.data_ptr(), weight._version) == (address, version)
    after = tiny_encoder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_allclose(after, fresh(tiny_encoder).encode(TEXTS), rtol=0, atol=ROUNDING)
    weight.data = weight.data.t()
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), before)


class Adapter(nn.Module):
    """As LoRA does it: the old layer, and a product of two small matrices beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        with torch.no_grad():
            self.down.weight.copy_(randn(2, base.in_features, seed=1))
            self.up.weight.copy_(randn(base.out_features, 2, seed=2))

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.base(rows) + self.up(self.down(rows.to(self.down.weight.dtype)))
        return output


@pytest.mark.parametrize(
    "last", ["attention.query", "attention.output", "feed_forward.intermediate",
             "feed_forward.output"]
)  # fmt: skip
def test_layer_replaced_by_another_module(tiny_encoder: SentenceEncoder, last: str) -> None:
    before = tiny_encoder.encode(TEXTS)
    plain = seeded_bert()
    for model in (tiny_encoder.bert, plain):
        replace_layers(model, [f"layers.{number}.{last}" for number in range(2)], Adapter)
    after = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(after, plain_vectors(plain, tiny_encoder), rtol=0, atol=ROUNDING)
    assert np.abs(after.numpy() - before).max() > 1e-2


class NoLinear(nn.Module):
    """A layer of another family, such as quantized ones are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("matrix", base.weight.detach().clone())
        self.register_buffer("offset", base.bias.detach().clone())

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.matrix, self.offset)  # type: ignore[arg-type]


def test_every_layer_replaced(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    replace_layers(tiny_encoder, list(linear_layers(tiny_encoder)), NoLinear)
    np.testing.assert_allclose(tiny_encoder.encode(TEXTS), expected, rtol=0, atol=ROUNDING)
    assert tiny_encoder.dtype == torch.float32


def test_feed_forward_replaced(tiny_encoder: SentenceEncoder) -> None:
    plain = seeded_bert()
    for model in (tiny_encoder.bert, plain):
        replace_layers(model, ["layers.0.feed_forward"], lambda _: nn.Identity())
    after = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(after, plain_vectors(plain, tiny_encoder), rtol=0, atol=ROUNDING)


# hooks

PARTS = [
    "layers.0.attention.query",
    "layers.0.attention.value",
    "layers.1.attention.output",
    "layers.0.feed_forward.intermediate",
    "layers.1.feed_forward.intermediate",
    "layers.0.feed_forward.output",
    "layers.0.feed_forward",
    "layers.0.attention",
    "layers.1.attention_layer_norm",
    "layers.1",
    "embeddings",
]


@pytest.mark.parametrize("name", PARTS)
def test_forward_hook_sees_and_replaces_the_output(
    tiny_encoder: SentenceEncoder, name: str
) -> None:
    plain, seen = seeded_bert(), []

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(module)
        return output * 1.5 + 0.25

    before = tiny_encoder.encode(TEXTS)
    hooked = tiny_encoder.bert.get_submodule(name)
    handle = hooked.register_forward_hook(change)
    plain.get_submodule(name).register_forward_hook(change)
    after = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    assert seen == [hooked]  # one pass, one call
    torch.testing.assert_close(after, plain_vectors(plain, tiny_encoder), rtol=0, atol=ROUNDING)
    assert np.abs(after.numpy() - before).max() > 1e-4
    handle.remove()
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), before)


@pytest.mark.parametrize("name", [name for name in PARTS if name != "embeddings"])
def test_forward_pre_hook_sees_and_replaces_the_input(
    tiny_encoder: SentenceEncoder, name: str
) -> None:
    plain, seen = seeded_bert(), []

    def change(module: nn.Module, args: Any) -> Any:
        seen.append(module)
        return (args[0].sin(), *args[1:])  # nothing linear, which a norm would take away

    before = tiny_encoder.encode(TEXTS)
    hooked = tiny_encoder.bert.get_submodule(name)
    hooked.register_forward_pre_hook(change)
    plain.get_submodule(name).register_forward_pre_hook(change)
    after = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    assert seen == [hooked]
    torch.testing.assert_close(after, plain_vectors(plain, tiny_encoder), rtol=0, atol=ROUNDING)
    assert np.abs(after.numpy() - before).max() > 1e-4


def test_hook_on_the_first_product_sees_it_before_the_gelu(tiny_encoder: SentenceEncoder) -> None:
    seen: list[Tensor] = []
    layer = part(tiny_encoder, INTERMEDIATE)
    layer.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    tiny_encoder.encode(TEXTS)
    rows, output = seen
    assert output.min() < -0.2  # GELU goes down to -0.17
    with torch.no_grad():
        expected = F.linear(rows, layer.weight, layer.bias)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "pooling", "normalize", ""])
def test_hooks_on_the_stages(tiny_encoder: SentenceEncoder, name: str) -> None:
    before = tiny_encoder.encode(TEXTS)
    calls = []
    stage = tiny_encoder.get_submodule(name)
    stage.register_forward_pre_hook(lambda *_: calls.append("before"))
    stage.register_forward_hook(lambda *_: calls.append("after"))
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), before)
    # Pooling is called for each run of equal lengths, everything else once.
    times = len({len(ids) for ids in input_ids_of(tiny_encoder)}) if name == "pooling" else 1
    assert calls == ["before", "after"] * times


def input_ids_of(encoder: SentenceEncoder) -> list[list[int]]:
    assert encoder.tokenizer is not None
    return encoder.tokenizer(TEXTS).input_ids


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_global_hooks_see_every_layer(tiny_encoder: SentenceEncoder, kind: str) -> None:
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    seen = []
    handle = register(lambda module, *_: seen.append(module))
    try:
        tiny_encoder.encode("the dog")
    finally:
        handle.remove()
    missed = {name for name, part in tiny_encoder.named_modules() if part not in seen}
    assert missed == {"bert.layers"}  # a list, which is never called


def test_forward_set_on_a_layer_is_called(tiny_encoder: SentenceEncoder) -> None:
    """Some libraries wrap a layer so: `layer.forward = wrapped(layer.forward)`."""
    for name in (LAYER, INTERMEDIATE, "bert.layers.1.feed_forward.output", "bert.layers.1"):
        layer = part(tiny_encoder, name)
        calls: list[int] = []

        def wrapped(*args: Any, old: Any = layer.forward, calls: list[int] = calls) -> Any:
            calls.append(1)
            return old(*args)

        layer.forward = wrapped
        tiny_encoder.encode("the dog")
        assert calls == [1], name


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("name", ["layers.0.attention.value", "layers.0.feed_forward.intermediate"])
def test_parametrized_layer(tiny_encoder: SentenceEncoder, name: str, tensor: str) -> None:
    plain, layer = seeded_bert(), part(tiny_encoder, f"bert.{name}")
    before = tiny_encoder.encode(TEXTS)
    for model in (tiny_encoder.bert, plain):
        parametrize.register_parametrization(model.get_submodule(name), tensor, Doubled())
    assert flat_layers(tiny_encoder) == ["bert.layers.1"]
    expected = plain_vectors(plain, tiny_encoder)
    after = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(after, expected, rtol=0, atol=ROUNDING)
    assert np.abs(after.numpy() - before).max() > 1e-4
    with torch.no_grad():  # the parameter behind it
        for model in (tiny_encoder.bert, plain):
            parts: Any = model.get_submodule(name)
            parts.parametrizations[tensor].original.mul_(0.5)
    again = tiny_encoder.encode(TEXTS)
    np.testing.assert_allclose(again, plain_vectors(plain, tiny_encoder), rtol=0, atol=ROUNDING)
    parametrize.remove_parametrizations(layer, tensor)
    assert len(flat_layers(tiny_encoder)) == 2
    np.testing.assert_allclose(tiny_encoder.encode(TEXTS), again, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("name", ["layers.0.attention.value", "layers.0.feed_forward.intermediate"])
def test_pruned_layer(tiny_encoder: SentenceEncoder, name: str, tensor: str) -> None:
    plain, layer = seeded_bert(), part(tiny_encoder, f"bert.{name}")
    before = tiny_encoder.encode(TEXTS)
    if not getattr(layer, tensor).is_contiguous():
        with pytest.raises(RuntimeError, match="view"):  # torch's own function can't do it
            l1_unstructured(layer, tensor, amount=0.5)
        layer.weight.data = layer.weight.data.contiguous()
    for model in (tiny_encoder.bert, plain):
        l1_unstructured(model.get_submodule(name), tensor, amount=0.5)
    assert flat_layers(tiny_encoder) == ["bert.layers.1"]
    expected = plain_vectors(plain, tiny_encoder)
    after = tiny_encoder.encode(TEXTS)
    np.testing.assert_allclose(after, expected, rtol=0, atol=ROUNDING)
    assert np.abs(after - before).max() > 1e-4
    remove_pruning(layer, tensor)
    assert len(flat_layers(tiny_encoder)) == 2
    np.testing.assert_allclose(tiny_encoder.encode(TEXTS), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_parametrized_layer_can_be_copied(tiny_encoder: SentenceEncoder, tensor: str) -> None:
    tiny_encoder.encode(TEXTS)
    parametrize.register_parametrization(part(tiny_encoder, LAYER), tensor, Doubled())
    expected = tiny_encoder.encode(TEXTS)
    np.testing.assert_array_equal(copy.deepcopy(tiny_encoder).encode(TEXTS), expected)


# where the flat layers are used


@pytest.fixture
def corrupted(tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> SentenceEncoder:
    """The tiny encoder after a call, with flat layers that show where they are used."""
    before = tiny_encoder.encode(TEXTS)
    monkeypatch.setattr(
        kernels._FlatLayer, "__call__", lambda self, hidden_states, attend: -hidden_states
    )
    assert np.abs(tiny_encoder.encode(TEXTS) - before).max() > 0.01
    return tiny_encoder


def ids_and_mask(encoder: SentenceEncoder) -> tuple[Tensor, Tensor]:
    features = encoder.tokenize(TEXTS)
    return features["input_ids"], features["attention_mask"]


@pytest.mark.parametrize("mode", MODES)
def test_outside_encode_the_layers_are_the_plain_ones(
    corrupted: SentenceEncoder, mode: Any
) -> None:
    ids, mask = ids_and_mask(corrupted)
    with mode():
        for name, layer in linear_layers(corrupted).items():
            inputs = randn(40, layer.in_features)
            assert torch.equal(layer(inputs), F.linear(inputs, layer.weight, layer.bias)), name
        close(corrupted.bert(ids, mask), seeded_bert()(ids, mask))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_flat_layer_is_used_where_gradients_are_recorded(
    corrupted: SentenceEncoder, frozen: bool
) -> None:
    corrupted.requires_grad_(not frozen)
    ids, mask = ids_and_mask(corrupted)
    expected = seeded_bert()(ids, mask)
    with as_in_encode(corrupted, mode=torch.enable_grad):
        close(corrupted.bert(ids, mask), expected)
        with torch.no_grad():
            assert (corrupted.bert(ids, mask) - expected).abs().max() > 0.01
        close(corrupted.bert(ids, mask), expected)


def outside(model: nn.Module, mode: Any) -> Any:
    return mode()


anywhere = pytest.mark.parametrize("place", [outside, as_in_encode])
both_modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])


@anywhere
@pytest.mark.parametrize("what", ["rows", "weight", "bias"])
def test_gradients_are_those_of_the_plain_layer(
    corrupted: SentenceEncoder, what: str, place: Any
) -> None:
    gradients = []
    for bert in (seeded_bert(), corrupted.bert):
        layer: Any = bert.layers[0].requires_grad_(False)
        rows = randn(2, 20, 32)
        wanted = rows if what == "rows" else getattr(layer.feed_forward.intermediate, what)
        wanted.requires_grad_(True)
        with place(layer, mode=torch.enable_grad):
            output = layer(rows)
            gradients.append(torch.autograd.grad(output[..., 0].square().sum(), wanted)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert gradients[0].abs().max() > 1e-3


@anywhere
def test_forward_derivative_by_the_input_of_a_frozen_model(
    corrupted: SentenceEncoder, place: Any
) -> None:
    layer = corrupted.bert.layers[0].requires_grad_(False)
    rows, tangent = randn(2, 20, 32), randn(2, 20, 32, seed=1)
    _, expected = untyped.autograd.functional.jvp(seeded_bert().layers[0], rows, tangent)
    assert expected.abs().max() > 0.1
    with place(layer, mode=torch.enable_grad), untyped.autograd.forward_ad.dual_level():
        output = layer(untyped.autograd.forward_ad.make_dual(rows, tangent))
        derivative = untyped.autograd.forward_ad.unpack_dual(output).tangent
    assert derivative is not None  # silently none, if an operator has no rule
    torch.testing.assert_close(derivative, expected, rtol=0, atol=2e-5)
    with place(layer, mode=torch.enable_grad):
        _, derivative = untyped.func.jvp(layer, (rows,), (tangent,))
    torch.testing.assert_close(derivative, expected, rtol=0, atol=2e-5)


@anywhere
def test_functional_gradient_of_a_frozen_model(corrupted: SentenceEncoder, place: Any) -> None:
    layer: Any = corrupted.bert.layers[0].requires_grad_(False)
    plain: Any = seeded_bert().layers[0]
    rows = randn(2, 20, 32)
    with place(layer, mode=torch.enable_grad):
        gradient = torch.func.grad(lambda rows: layer(rows)[..., 0].square().sum())(rows)
    rows.requires_grad_(True)
    expected = torch.autograd.grad(plain(rows)[..., 0].square().sum(), rows)[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 1e-3


def look_into(encoder: SentenceEncoder, look: Callable[[], None]) -> list[int]:
    """Call `look` in the middle of the next pass of the encoder; 1 in the list once it was."""
    looked: list[int] = []

    def hook(*_: object) -> None:
        if not looked:
            looked.append(1)
            look()

    part(encoder, "bert.embeddings").register_forward_hook(hook)
    return looked


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
@pytest.mark.parametrize("which", ["another", "itself"])
def test_encoder_used_by_a_hook_in_another(
    tiny_encoder: SentenceEncoder, which: str, fails: bool, flat_calls: list[Any]
) -> None:
    inner = make_encoder(seeded_bert(seed=1)) if which == "another" else tiny_encoder
    expected, expected_inside = tiny_encoder.encode(TEXTS), inner.encode(TEXTS[::-1])
    seen: list[Any] = []

    def look() -> None:
        flat_calls.clear()
        with torch.no_grad():
            inner.bert(*ids_and_mask(inner))
        # The other's layers, which `encode` does not compute now, are the plain ones.
        assert len(flat_calls) == (0 if which == "another" else 2)
        seen.append(inner.encode(TEXTS[::-1]))
        if fails:
            inner.pooling.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                inner.encode("a")
            inner.pooling._forward_hooks.clear()
        flat_calls.clear()

    looked = look_into(tiny_encoder, look)
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), expected)
    assert looked == [1]
    assert len(flat_calls) == 2  # after the look, as before it
    np.testing.assert_array_equal(seen[0], expected_inside)


def test_after_an_error_in_encode_the_layers_are_the_plain_ones(
    corrupted: SentenceEncoder,
) -> None:
    looked = look_into(corrupted, lambda: 1 / 0)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        corrupted.encode(TEXTS)
    assert looked == [1]
    with torch.no_grad():
        ids, mask = ids_and_mask(corrupted)
        close(corrupted.bert(ids, mask), seeded_bert()(ids, mask))


def test_another_thread_has_flat_layers_of_its_own(corrupted: SentenceEncoder) -> None:
    layer, rows = corrupted.bert.layers[1], randn(1, 5, 32)
    with torch.no_grad():
        plain = layer(rows)
    expected, texts = corrupted.encode(TEXTS), TEXTS[::-1]
    seen: list[Any] = []

    @torch.no_grad()
    def elsewhere() -> None:
        seen.append(layer(rows))
        seen.append(corrupted.encode(texts))
        seen.append(layer(rows))

    def look() -> None:
        seen.append(layer(rows))
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        seen.append(layer(rows))

    looked = look_into(corrupted, look)
    np.testing.assert_array_equal(corrupted.encode(TEXTS), expected)
    assert looked == [1]
    for output, wanted in zip(seen, (-rows, plain, None, plain, -rows), strict=True):
        assert wanted is None or torch.equal(output, wanted)
    np.testing.assert_array_equal(seen[2], corrupted.encode(texts))


# copies of a model


def clone_by_pickle(encoder: SentenceEncoder) -> Any:
    return pickle.loads(pickle.dumps(encoder))


def clone_by_torch_save(encoder: SentenceEncoder) -> Any:
    buffer = io.BytesIO()
    torch.save(encoder, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


CLONES: list[Callable[[Any], Any]] = [copy.deepcopy, clone_by_pickle, clone_by_torch_save]


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_clone_is_an_encoder_of_its_own(
    clone: Callable[[Any], Any], dtype: str | None, flat_calls: list[Any]
) -> None:
    encoder = make_encoder(seeded_bert(), dtype=dtype)
    size = len(pickle.dumps(encoder))
    expected = encoder.encode(TEXTS)
    assert len(pickle.dumps(encoder)) == size  # nothing that was made for the call
    other = clone(encoder)
    memory = {value.untyped_storage().data_ptr() for value in encoder.parameters()}
    assert memory.isdisjoint(value.untyped_storage().data_ptr() for value in other.parameters())
    flat_calls.clear()
    np.testing.assert_array_equal(other.encode(TEXTS), expected)
    assert len(flat_calls) == 2
    assert all(layer.attends in other.modules() for layer in flat_calls)
    with torch.no_grad():
        part(other, LAYER).weight.mul_(1.5)
    assert np.abs(other.encode(TEXTS) - expected).max() > 1e-5
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)


def test_clone_of_the_published_model_gives_the_same_bits(encoder: SentenceEncoder) -> None:
    expected = encoder.encode(PUBLISHED_TEXTS)
    for clone in CLONES:
        np.testing.assert_array_equal(clone(encoder).encode(PUBLISHED_TEXTS), expected)


def test_shallow_copy_of_a_layer_that_is_gone_says_so() -> None:
    model = seeded_bert()
    accelerate(model)
    layer = copy.copy(model.layers[0])
    assert isinstance(layer.__dict__["forward"], FastLayer)
    del model
    with pytest.raises(ReferenceError, match="shallow copy"):
        layer(torch.ones(1, 2, 32))


def test_state_of_a_used_model(tmp_path: Path) -> None:
    """Saved and loaded by whatever way, it gives the same vectors."""
    encoder = make_encoder(seeded_bert())
    expected, state = encoder.encode(TEXTS), encoder.bert.state_dict()
    torch.save(state, tmp_path / "state.pt")
    for given in (state, torch.load(tmp_path / "state.pt")):
        for assign in (False, True):
            other = make_encoder(seeded_bert(seed=1))
            other.bert.load_state_dict(given, assign=assign)
            np.testing.assert_array_equal(other.encode(TEXTS), expected)
    encoder.bert.load_state_dict(seeded_bert(seed=1).state_dict())
    assert np.abs(encoder.encode(TEXTS) - expected).max() > 1e-3
    assert_same(encoder, encoder.encode(TEXTS), TEXTS)


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path: Path, encoder: SentenceEncoder) -> None:
    expected = encoder.encode(PUBLISHED_TEXTS)
    encoder.save_pretrained(tmp_path / "saved")
    other = SentenceEncoder.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(other.encode(PUBLISHED_TEXTS), expected)


def test_safetensors_takes_the_state(tmp_path: Path, encoder: SentenceEncoder) -> None:
    """Of a model that has computed: its weights are as torch's own functions want them."""
    expected = encoder.encode(PUBLISHED_TEXTS)
    assert all(parameter.is_contiguous() for parameter in encoder.parameters())
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(encoder.bert.state_dict(), path)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in other.bert.parameters():
            parameter.zero_()
    safetensors.torch.load_model(other.bert, path)
    np.testing.assert_array_equal(other.encode(PUBLISHED_TEXTS), expected)


@pytest.mark.process
def test_encode_in_another_process(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(tiny_encoder.encode, TEXTS).result(timeout=600)
    np.testing.assert_array_equal(result, expected)


def test_weights_in_shared_memory(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    tiny_encoder.share_memory()
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), expected)
    with torch.no_grad():
        part(tiny_encoder, LAYER).weight.mul_(1.5)
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), fresh(tiny_encoder).encode(TEXTS))


def test_made_in_inference_mode_it_can_be_trained() -> None:
    for dtype in ("float32", "bfloat16"):
        with torch.inference_mode():
            encoder = make_encoder(seeded_bert(), dtype=dtype)
            # seeded_bert's parameters are inference tensors here, which encode serves too.
            inside = encoder.encode(TEXTS)
        np.testing.assert_array_equal(encoder.encode(TEXTS), inside)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_conversion_in_inference_mode_leaves_ordinary_parameters(dtype: str) -> None:
    bert = seeded_bert()
    with torch.inference_mode():
        encoder = make_encoder(bert, dtype=dtype)
    assert not any(parameter.is_inference() for parameter in encoder.parameters())
    encoder(encoder.tokenize(TEXTS))["sentence_embedding"].sum().backward()
    assert part(encoder, LAYER).weight.grad is not None


# what torch makes of a model: never a flat layer inside


def halve_the_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in linear_layers(model).values():
            layer.weight.mul_(0.5)


@pytest.mark.slow
@anywhere
@both_modes
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model(corrupted: SentenceEncoder, backend: str, mode: Any, place: Any) -> None:
    plain = seeded_bert()
    ids, mask = ids_and_mask(corrupted)
    try:
        compiled = torch.compile(corrupted.bert, backend=backend, fullgraph=True)
        for _ in range(2):
            with place(corrupted, mode=mode):
                close(compiled(ids, mask), plain(ids, mask))
            halve_the_weights(corrupted)
            halve_the_weights(plain)
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@anywhere
@both_modes
def test_exported_model(corrupted: SentenceEncoder, mode: Any, place: Any) -> None:
    ids, mask = ids_and_mask(corrupted)
    with place(corrupted, mode=mode):
        program = torch.export.export(corrupted.bert, (ids, mask))
        close(program.module()(ids, mask), seeded_bert()(ids, mask))
    assert "mkldnn" not in str(program.graph)
    assert "linear" in str(program.graph)
    assert set(program.state_dict) == set(corrupted.bert.state_dict())
    assert not program.constants


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_model(corrupted: SentenceEncoder) -> None:
    plain = seeded_bert()
    ids, mask = ids_and_mask(corrupted)
    with torch.no_grad():
        traced = untyped.jit.trace(corrupted.bert, (ids, mask))
        close(traced(ids, mask), plain(ids, mask))
        for model in (corrupted, plain):
            halve_the_weights(model)  # it has the parameters, not a copy
        close(traced(ids, mask), plain(ids, mask))
    assert "mkldnn" not in str(traced.inlined_graph)


@pytest.mark.parametrize("kind", [Tensor, nn.Parameter])
@both_modes
def test_functional_call(corrupted: SentenceEncoder, mode: Any, kind: type) -> None:
    ids, mask = ids_and_mask(corrupted)
    other = seeded_bert(seed=1)
    parameters = {name: value.detach().clone() for name, value in other.named_parameters()}
    if kind is nn.Parameter:
        parameters = {name: nn.Parameter(value) for name, value in parameters.items()}
    bert = corrupted.bert
    with mode():
        for _ in range(2):
            output = torch.func.functional_call(bert, parameters, (ids, mask))
            close(output, other(ids, mask))
        close(bert(ids, mask), seeded_bert()(ids, mask))


@both_modes
def test_vmap_over_models(corrupted: SentenceEncoder, mode: Any) -> None:
    ids, mask = ids_and_mask(corrupted)
    models = [seeded_bert(seed=seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(corrupted.bert, (parameters, buffers), (ids, mask))

    with mode():
        together = torch.func.vmap(call)(parameters, buffers)
        for model, output in zip(models, together, strict=True):
            close(output, model(ids, mask))


@both_modes
def test_vmap_over_inputs(
    corrupted: SentenceEncoder, mode: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = seeded_bert()
    ids = torch.randint(TINY.vocab_size, (4, 3, 5), generator=torch.Generator().manual_seed(0))
    with mode():
        together = torch.func.vmap(corrupted.bert)(ids)
        close(together, torch.stack([plain(batch) for batch in ids]))
    assert "performance drop" not in capfd.readouterr().err


def test_autocast_is_respected(tiny_encoder: SentenceEncoder) -> None:
    single = tiny_encoder.encode(TEXTS)
    dtypes = []
    hook = part(tiny_encoder, LAYER).register_forward_hook(
        lambda *args: dtypes.append(args[2].dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny_encoder.encode(TEXTS)
        with as_in_encode(tiny_encoder):
            np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), mixed)
    with as_in_encode(tiny_encoder), torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), mixed)
    assert dtypes == [torch.bfloat16] * 3
    hook.remove()
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed, single, rtol=0, atol=2e-2)
    assert np.abs(mixed - single).max() > 1e-4
    np.testing.assert_allclose(tiny_encoder.encode(TEXTS), single, rtol=0, atol=0)


# threads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_make_the_flat_layers_at_once(dtype: str) -> None:
    encoder = make_encoder(seeded_bert(), dtype=dtype)
    results = in_threads(encoder, TEXTS)
    expected = make_encoder(seeded_bert(), dtype=dtype).encode(TEXTS)
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_threads_of_the_published_model(encoder: SentenceEncoder) -> None:
    for result in in_threads(copy.deepcopy(encoder), PUBLISHED_TEXTS):
        np.testing.assert_array_equal(result, encoder.encode(PUBLISHED_TEXTS))


def in_threads(encoder: SentenceEncoder, texts: list[str]) -> list[Any]:
    """What eight threads get that call at the same moment, the first call of this encoder."""
    results: list[Any] = [None] * 8
    barrier = threading.Barrier(8)

    def run(number: int) -> None:
        barrier.wait(600)
        results[number] = encoder.encode(texts)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results)
    return results

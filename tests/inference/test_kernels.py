"""The fast linear layers: the same numbers as `F.linear`, and never those of another weight."""

import copy
import dataclasses
import io
import json
import math
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from conftest import TINY, seeded_bert, tiny_tokenizer_json
from minilm import BertFeedForward, BertModel, MeanPooling, Normalize, SentenceEncoder
from minilm.inference import kernels
from minilm.inference.kernels import (
    ByRows,
    FastLinear,
    Layout,
    Packed,
    Plain,
    Transposed,
    accelerate,
    fast_products,
)
from minilm.tokenizer import WordPieceTokenizer

TEXTS = ["the dog bites the man", "", "a cat", "the sun is out .", "man sees dog", "a"]
MANY = ["the dog"] * 1024  # 4 tokens each: enough for every number to be compared

# The fast products add up in another order than the plain ones: float32 vectors of length 1.
ROUNDING = 1e-6


untyped: Any = torch  # for the functions that it gives no types
l1_unstructured: Any = prune.l1_unstructured
remove_pruning: Any = prune.remove


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_encoder(bert: BertModel, **options: Any) -> SentenceEncoder:
    return SentenceEncoder(
        modules=[bert, MeanPooling(), Normalize()],
        tokenizer=WordPieceTokenizer(json.dumps(tiny_tokenizer_json())),
        max_seq_length=12,
        **options,
    )


def fresh(encoder: SentenceEncoder) -> SentenceEncoder:
    """A tiny encoder with the same weights, which has computed nothing yet."""
    bert = seeded_bert().to(encoder.dtype)
    bert.load_state_dict({name: value.clone() for name, value in encoder.bert.state_dict().items()})
    return make_encoder(bert)


def plain_vectors(bert: nn.Module, encoder: SentenceEncoder) -> Tensor:
    """What a model that was never accelerated gives for `TEXTS`: padded, with no copy."""
    assert not any("forward" in module.__dict__ for module in bert.modules())
    features = encoder.tokenize(TEXTS)
    mask = features["attention_mask"]
    with torch.no_grad():
        vectors: Tensor = Normalize()(MeanPooling()(bert(features["input_ids"], mask), mask))
    return vectors


def part(encoder: SentenceEncoder, name: str) -> Any:
    return encoder.get_submodule(name)


def linear_layers(model: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def fast(layer: nn.Module) -> FastLinear:
    """What `accelerate` gave the layer."""
    forward = layer.__dict__["forward"]
    assert isinstance(forward, FastLinear)
    return forward


def copies(model: nn.Module) -> list[Any]:
    return [fast(layer).copy for layer in linear_layers(model).values()]


def layouts_used(model: nn.Module) -> set[Any]:
    return {copy and copy.product.layout for copy in copies(model)}


@contextmanager
def as_in_encode(model: nn.Module, tokens: int = 0, mode: Any = torch.inference_mode) -> Any:
    """What `encode` puts around a pass, or that with another mode of torch."""
    with mode(), fast_products(list(model.modules()), tokens):
        yield


def corrupt(model: nn.Module) -> None:
    """Copies of zeros that look as if they were of today's weights."""
    for layer in linear_layers(model).values():
        product = fast(layer).product(every_number=True)
        assert product is not None
        packed = product.layout.pack(torch.zeros_like(layer.weight.detach()))
        product = dataclasses.replace(product, packed=packed)
        copy: Any = fast(layer).copy
        fast(layer).copy = dataclasses.replace(copy, product=product)


LAYER = "bert.layers.0.attention.value"
INTERMEDIATE = "bert.layers.0.feed_forward.intermediate"
MODES: list[Any] = [torch.enable_grad, torch.no_grad, torch.inference_mode]


# layouts


def needs_packed(dtype: torch.dtype) -> None:
    """Skip where oneDNN's operators are absent; tried here, not by what is tested."""
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(2, 2, dtype=dtype), 1024)
        rows = torch.ones(2, 2, dtype=dtype)
        torch.ops.mkldnn._linear_pointwise.default(rows, weight, None, "none", [], "")
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"oneDNN's product in {dtype} can't be used here: {error}")


def layout_of(kind: str) -> tuple[Layout, torch.dtype]:
    dtype = torch.float32 if "float32" in kind else torch.bfloat16
    if "Transposed" in kind or "Plain" in kind:
        return Transposed() if "Transposed" in kind else Plain(), dtype
    needs_packed(dtype)
    if "ByRows" in kind:
        return ByRows(), dtype
    return Packed(192 if "slices" in kind else None, "blocks" in kind), dtype


def products_of(call: Callable[[], Tensor]) -> list[tuple[str, int, int]]:
    """The matrix products in a call: operator, rows, columns that are added up."""
    seen = []

    class Recording(untyped.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm", "addmm_", "_linear_pointwise"):
                seen.append((name, *args[1 if "add" in name else 0].shape))
            return func(*args, **(kwargs or {}))

    with Recording():
        call()
    return seen


@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("inner", "outer"), [(384, 384), (384, 1536), (1536, 384), (7, 13), (385, 5), (1, 1)]
)
@pytest.mark.parametrize(
    "kind",
    [
        "Plain float32",
        "Transposed float32",
        "Packed float32",
        "Packed float32, slices",
        "ByRows float32",
        "Packed bfloat16",
        "Packed bfloat16, row blocks",
    ],
)
def test_layout_equals_linear(
    kind: str, inner: int, outer: int, has_bias: bool, gelu: bool
) -> None:
    layout, dtype = layout_of(kind)
    weight = randn(outer, inner, seed=1).mul(0.05).to(dtype)
    bias = randn(outer, seed=2, dtype=dtype) if has_bias else None
    packed = layout.pack(weight)
    rows = randn(600, inner, dtype=dtype)
    exact = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    expected = F.gelu(exact) if gelu else exact
    # Results of about 1, of sums of up to 1536 products; bfloat16 rounds the result to 8 bits, and
    # may round sums in between.
    bound = 4e-6 if dtype == torch.float32 else 0.02
    for count in (1, 2, 3, 16, 17, 32, 33, 100, 511, 512, 600):
        output = layout.linear(rows[:count], packed, bias, gelu)
        assert output.dtype == dtype
        assert output.shape == (count, outer)
        error = (output.double() - expected[:count]).abs()
        assert error.max() <= bound * max(1.0, float(expected.abs().max())), count
        assert error.mean() <= bound / 4 * max(1.0, float(expected.abs().mean())), count


def test_gelu_is_exact_not_approximated() -> None:
    for kind in ("Plain float32", "Transposed float32", "Packed float32", "ByRows float32"):
        layout, dtype = layout_of(kind)
        rows = torch.linspace(-5, 5, 1001, dtype=dtype)[:, None]
        output = layout.linear(rows, layout.pack(torch.ones(1, 1, dtype=dtype)), None, True)
        exact = rows.double() * (1 + torch.erf(rows.double() / math.sqrt(2))) / 2
        assert (output - exact).abs().max() < 1e-6  # the tanh form is off by 5e-4


@pytest.mark.parametrize("count", [31, 32, 33, 64, 65, 511, 512])
def test_row_blocks_are_products_of_32_rows(count: int) -> None:
    needs_packed(torch.bfloat16)
    layout = Packed(row_blocks=True)
    weight, rows = randn(40, 64, seed=1, dtype=torch.bfloat16), randn(count, 64).bfloat16()
    packed = layout.pack(weight)
    output = layout.linear(rows, packed, None, False)
    products = products_of(lambda: layout.linear(rows, packed, None, False))
    parts = [height for _, height, _ in products]
    assert sum(parts) == count
    assert max(parts) == (32 if 32 < count < 512 else count)
    assert torch.equal(output[:20], layout.linear(rows[:32], packed, None, False)[:20])


@pytest.mark.parametrize("bias", [None, torch.ones(4)], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("count", "inner", "columns"),
    [(17, 384, [384]), (17, 385, [384, 1]), (600, 1536, [384] * 4), (16, 385, [385]),
     (1, 1536, [1536])],
)  # fmt: skip
def test_transposed_adds_up_slices_of_384_columns(
    count: int, inner: int, columns: list[int], bias: Tensor | None
) -> None:
    """But few rows at once."""
    layout = Transposed()
    rows, packed = torch.ones(count, inner), layout.pack(torch.ones(4, inner))
    assert packed.shape == (inner, 4)
    assert packed.is_contiguous()
    products = products_of(lambda: layout.linear(rows, packed, bias, False))
    first = "mm" if bias is None or inner > 384 else "addmm"  # long sums: the bias comes last
    names = [first] + ["addmm_"] * (len(columns) - 1)
    assert products == [(name, count, part) for name, part in zip(names, columns, strict=True)]


@pytest.mark.parametrize(("count", "operator"), [(1, "addmm"), (16, "addmm"), (17, ""), (600, "")])
def test_by_rows_takes_17_rows_to_be_many(count: int, operator: str) -> None:
    layout, _ = layout_of("ByRows float32")
    packed = layout.pack(torch.ones(4, 8))
    products = products_of(
        lambda: layout.linear(torch.ones(count, 8), packed, torch.ones(4), False)
    )
    assert products == [(operator or "_linear_pointwise", count, 8)]


# layout_for


@pytest.mark.parametrize(
    ("capability", "columns", "expected"),
    [
        ("AVX2", 384, [Plain, ByRows, Packed, Packed, Transposed]),
        ("AVX2", 1536, [Plain, ByRows, Packed, Packed, Transposed]),
        ("AVX512", 384, [ByRows, Packed, Packed, Plain, Transposed]),
    ],
)
def test_order_of_candidates(
    monkeypatch: pytest.MonkeyPatch, capability: str, columns: int, expected: list[type]
) -> None:
    """Of the fastest first: with AVX2 `F.linear` itself."""
    monkeypatch.setattr(kernels, "_has_packed", lambda _: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = kernels._candidates(torch.float32, columns)
    assert [type(layout) for layout in found] == expected


@pytest.mark.parametrize(("same", "first"), [(True, Transposed), (False, Packed)])
def test_long_sums_are_by_mm_where_that_has_the_bits_of_onednn(
    monkeypatch: pytest.MonkeyPatch, same: bool, first: type
) -> None:
    monkeypatch.setattr(kernels, "_has_packed", lambda _: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    chosen = kernels._by_rows if same else kernels._sliced
    monkeypatch.setattr(kernels, "layout_for", lambda *_: chosen)
    assert type(kernels._candidates(torch.float32, 1536)[0]) is first


def test_without_onednn_there_is_no_packed_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_packed", lambda _: False)
    assert kernels._candidates(torch.float32, 384) == [kernels._plain, kernels._transposed]
    assert kernels._candidates(torch.bfloat16, 384) == [kernels._plain]


@pytest.fixture
def fresh_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tried yet, for this test; what was comes back."""
    monkeypatch.setattr(kernels, "_choices", {})


@pytest.fixture(autouse=True)
def layouts_with_copies(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_layouts: None
) -> None:
    """In all tests, the tiny model multiplies by copies, also where `F.linear` is the fastest."""
    real = kernels._candidates

    def without_plain(dtype: torch.dtype, columns: int) -> list[Layout]:
        if dtype in (torch.float32, torch.bfloat16) and columns < 100:
            return [layout for layout in real(dtype, columns) if layout is not kernels._plain] or [
                kernels._transposed
            ]
        return real(dtype, columns)

    if "order" not in request.node.name and "without_onednn" not in request.node.name:
        monkeypatch.setattr(kernels, "_candidates", without_plain)


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch, fresh_layouts: None) -> Callable[..., list[Layout]]:
    """Sets the layouts that `layout_for` may choose from."""

    def these(*layouts: Layout) -> list[Layout]:
        monkeypatch.setattr(kernels, "_candidates", lambda *_: list(layouts))
        return list(layouts)

    return these


class Wrong(Transposed):
    """Off by a thousandth: everywhere, with GELU only, without bias only, or not a number."""

    def __init__(self, where: str) -> None:
        self.where = where

    def linear(self, rows: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        output = super().linear(rows, packed, bias, gelu)
        if self.where == "nan":
            return output * torch.nan
        if self.where == "bias":
            return output if bias is None else output - bias
        return output if self.where == "gelu" and not gelu else output * 1.001


class Recording(Transposed):
    """Notes each product: whether it has the GELU in it."""

    def __init__(self) -> None:
        self.products: list[bool] = []

    def linear(self, rows: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        self.products.append(gelu)
        return super().linear(rows, packed, bias, gelu)


class Unusable(Transposed):
    def __init__(self, error: Exception, where: str) -> None:
        self.error, self.where = error, where

    def pack(self, weight: Tensor) -> Tensor:
        if self.where == "pack":
            raise self.error
        return super().pack(weight)

    def linear(self, rows: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        raise self.error


class Mixing(Transposed):
    """Right, but the last bits depend on the number of rows."""

    def linear(self, rows: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        output = super().linear(rows, packed, bias, gelu)
        return output * (1 + len(rows) % 5 * torch.finfo(rows.dtype).eps)


@pytest.mark.parametrize("where", ["all", "gelu", "bias", "nan"])
def test_wrong_layout_is_refused(candidates: Callable[..., Any], where: str) -> None:
    _, right = candidates(Wrong(where), Transposed())
    assert kernels.layout_for(torch.float32, 64, 32) is right
    candidates(Wrong(where))
    assert kernels.layout_for(torch.float32, 65, 32) is None


@pytest.mark.parametrize("where", ["pack", "linear"])
@pytest.mark.parametrize("error", [AttributeError("no operator"), RuntimeError("unsupported")])
def test_layout_that_raises_is_passed_over(
    candidates: Callable[..., Any], error: Exception, where: str
) -> None:
    _, right = candidates(Unusable(error, where), Transposed())
    assert kernels.layout_for(torch.float32, 64, 32) is right
    candidates(Unusable(error, where))
    assert kernels.layout_for(torch.float32, 65, 32) is None


def test_programming_error_in_a_layout_is_not_hidden(candidates: Callable[..., Any]) -> None:
    candidates(Unusable(TypeError("mine"), "pack"), Transposed())
    with pytest.raises(TypeError, match="mine"):
        kernels.layout_for(torch.float32, 64, 32)


class Apart(Layout):
    """Row by row, so that none can know of another: on any processor."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def linear(self, rows: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        output = torch.cat([F.linear(row[None], packed, bias) for row in rows])
        return F.gelu(output) if gelu else output


class Rough(Apart):
    """Right, but with more rounding than `F.linear`, by a factor of some 2."""

    def linear(self, rows: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        output = super().linear(rows, packed, bias, gelu)
        step = 2**-23 * output.abs().amax(1, keepdim=True)
        return (output / step).round() * step


def test_layout_that_mixes_rows_is_the_last_resort(candidates: Callable[..., Any]) -> None:
    _, apart = candidates(Mixing(), Apart())
    assert kernels.layout_for(torch.float32, 64, 32) is apart
    _, first, _ = candidates(Wrong("all"), Mixing(), Mixing())
    assert kernels.layout_for(torch.float32, 65, 32) is first


def test_error_is_a_criterion(candidates: Callable[..., Any]) -> None:
    """Beside equal bits, which come before it."""
    _, apart = candidates(Rough(), Apart())
    assert kernels.layout_for(torch.float32, 64, 32) is apart
    _, rough = candidates(Mixing(), Rough())
    assert kernels.layout_for(torch.float32, 65, 32) is rough
    with kernels._ordinary_state():
        trials = [kernels._Trial.of(x, torch.float32, 64, 32) for x in (Plain(), Rough())]
    assert trials[0].error == 1
    assert trials[1].is_right
    assert 1.5 < trials[1].error < 8


def test_encoder_knows_that_its_layout_mixes_rows(candidates: Callable[..., Any]) -> None:
    candidates(Mixing())
    encoder = make_encoder(seeded_bert())
    assert not encoder.deterministic
    vectors = encoder.encode(TEXTS, convert_to_tensor=True)
    expected = plain_vectors(seeded_bert(), encoder)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=ROUNDING)


def test_encoder_multiplies_by_its_copies(candidates: Callable[..., Any]) -> None:
    (layout,) = candidates(Recording())
    encoder = make_encoder(seeded_bert())
    encoder.encode("the dog")
    layout.products.clear()  # those of the trial
    encoder.encode("the dog")
    # Query, key, value, output; and the feed-forward sublayer, the GELU in its first product.
    assert layout.products == [False, False, False, False, True, False] * 2
    layout.products.clear()
    assert encoder.deterministic is not None
    assert len(layout.products) > 12


def test_first_of_several_good_layouts_is_chosen_once(candidates: Callable[..., Any]) -> None:
    first, second = candidates(Transposed(), Transposed())
    assert kernels.layout_for(torch.float32, 64, 32) is first
    candidates(second)
    assert kernels.layout_for(torch.float32, 64, 32) is first


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_have_no_layout(fresh_layouts: None, dtype: torch.dtype) -> None:
    assert kernels.layout_for(dtype, 384, 384) is None


def test_trial_leaves_the_random_numbers_alone(fresh_layouts: None) -> None:
    before = torch.get_rng_state()
    assert kernels.layout_for(torch.float32, 32, 32) is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layouts", [[], [Transposed()]], ids=["none", "Transposed"])
def test_encoder_with_other_layouts_gives_the_same_vectors(
    candidates: Callable[..., Any], layouts: list[Any]
) -> None:
    candidates(*layouts)
    encoder = make_encoder(seeded_bert())
    vectors = encoder.encode(TEXTS, convert_to_tensor=True)
    assert layouts_used(encoder) == set(layouts or [None])
    torch.testing.assert_close(
        vectors, plain_vectors(seeded_bert(), encoder), rtol=0, atol=ROUNDING
    )


PUBLISHED_TEXTS = ["The weather is lovely today.", "", "It's so sunny outside! " * 9]


@pytest.mark.parametrize("layouts", [[], [Transposed()]], ids=["none", "Transposed"])
def test_published_model_without_onednn(
    candidates: Callable[..., Any],
    encoder: SentenceEncoder,
    encoder64: SentenceEncoder,
    layouts: list[Any],
) -> None:
    candidates(*layouts)
    other = copy.deepcopy(encoder)
    vectors = other.encode(PUBLISHED_TEXTS)
    assert layouts_used(other) == set(layouts or [None])
    np.testing.assert_allclose(vectors, encoder64.encode(PUBLISHED_TEXTS), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("layouts", [[], [Transposed()]], ids=["none", "Transposed"])
def test_bfloat16_without_onednn(candidates: Callable[..., Any], layouts: list[Any]) -> None:
    encoder = make_encoder(seeded_bert(), dtype="bfloat16")
    with_layouts = encoder.encode(TEXTS)
    candidates(*layouts)
    without = make_encoder(seeded_bert(), dtype="bfloat16")
    # Elements of about 0.2 with 8 bits, through two layers.
    np.testing.assert_allclose(without.encode(TEXTS), with_layouts, rtol=0, atol=5e-3)


# somebody else's global state


@contextmanager
def set_back(change: Callable[[Any], Any], before: Any, after: Any) -> Any:
    change(after)
    try:
        yield
    finally:
        change(before)


STATES: dict[str, Callable[[], Any]] = {
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: set_back(torch.set_default_dtype, torch.float32, torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic algorithms": lambda: set_back(torch.use_deterministic_algorithms, False, True),
    "inference mode": torch.inference_mode,
    "grad mode": torch.enable_grad,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("shape", [(32, 32), (64, 32)])
def test_layout_is_found_under_any_global_state(
    monkeypatch: pytest.MonkeyPatch, state: str, shape: tuple[int, int]
) -> None:
    expected = kernels.layout_for(torch.float32, *shape)
    assert expected is not None
    monkeypatch.setattr(kernels, "_choices", {})
    with STATES[state]():
        assert kernels.layout_for(torch.float32, *shape) is expected
    assert list(kernels._choices.values()) == [expected]


def test_number_of_threads_is_part_of_the_choice() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kernels.layout_for(torch.float32, 32, 32)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(kernels._choices) == 2


def test_trial_that_broke_is_made_again(candidates: Callable[..., Any]) -> None:
    broken: Any = Unusable(RuntimeError("out of memory"), "linear")
    second = Apart()
    candidates(broken, second)
    assert kernels.layout_for(torch.float32, 64, 32) is second
    assert not kernels._choices
    broken.linear = second.linear  # memory is there again
    broken.pack = second.pack
    assert kernels.layout_for(torch.float32, 64, 32) is broken
    assert kernels._choices


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized.*:UserWarning")
def test_tools_that_ask_for_linear_layers_find_them(tiny_encoder: SentenceEncoder) -> None:
    """In silence nothing was quantized: no layer was of that class."""
    expected = tiny_encoder.encode(TEXTS)
    quantized = untyped.ao.quantization.quantize_dynamic(tiny_encoder, {nn.Linear})
    assert not linear_layers(quantized)
    assert len(linear_layers(tiny_encoder)) == 12
    difference = np.abs(quantized.encode(TEXTS) - expected).max()
    assert 1e-4 < difference < 0.05  # weights of 8 bits
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), expected)


# the layer


@pytest.fixture
def layer() -> nn.Linear:
    linear = nn.Sequential(nn.Linear(20, 12))
    with torch.no_grad():
        for seed, parameter in enumerate(linear.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    accelerate(linear)
    layer = linear[0]
    assert isinstance(layer, nn.Linear)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 20), (1, 20), (40, 20), (20,), (2, 3, 20), (3, 1, 13, 20)])
def test_layer_keeps_leading_dimensions(
    layer: nn.Linear, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows = randn(*shape, seed=5)
    expected = F.linear(rows.double(), layer.weight.double(), layer.bias.double())
    layer.to(dtype)
    with torch.no_grad():
        plain = layer(rows)  # float32 rows, whatever the weight is
        assert torch.equal(plain, F.linear(rows.to(dtype), layer.weight, layer.bias))
    with as_in_encode(layer):
        output = layer(rows)
    assert output.dtype == dtype
    assert output.shape == (*shape[:-1], 12)
    # Numbers up to 15 from weights, rows and results that are each rounded once.
    bound = 60 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("size", [2, 6])
def test_layer_takes_rows_of_any_layout_in_memory(layer: nn.Linear, size: int) -> None:
    """As few rows as `ByRows` takes for few, or more."""
    wide = randn(size, 5, 40)
    for rows in (
        wide[..., ::2],  # every other column
        wide[..., :20].transpose(0, 1),
        randn(20, 5 * size).t(),
        wide[:1, :1, :20].expand(3, size, 20),
        randn(5 * size, 5, 40)[:, 2, 20:],
    ):
        with as_in_encode(layer):
            output = layer(rows)
        exact = F.linear(rows.double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(output.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20)])
def test_layer_without_rows(layer: nn.Linear, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with as_in_encode(layer.to(dtype)):
        assert layer(torch.ones(shape)).shape == (*shape[:-1], 12)


@pytest.mark.parametrize("count", [5, 40])
def test_layer_without_bias(count: int) -> None:
    layer = nn.Linear(20, 12, bias=False)
    model = nn.Sequential(layer)
    accelerate(model)
    rows = randn(count, 20)
    with as_in_encode(model):
        torch.testing.assert_close(model(rows), rows @ layer.weight.T, rtol=0, atol=1e-6)
    assert None not in layouts_used(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_of_the_wrong_width_is_refused_as_ever(layer: nn.Linear, dtype: torch.dtype) -> None:
    layer.to(dtype)
    for shape in ((3, 19), (3, 21), (40, 19), (40, 21), (2, 3, 40), (5, 8, 40)):
        with pytest.raises(RuntimeError), as_in_encode(layer):
            layer(torch.ones(shape))


class OtherParameter(nn.Parameter):
    """Somebody's own kind, as quantized weights are."""


def replace_weight(change: Callable[[Tensor], Any], mode: Any = torch.no_grad) -> Any:
    def run(layer: Any) -> None:
        with mode():
            weight = change(layer.weight.detach().clone())
        del layer.weight
        layer.weight = weight

    return run


NO_COPY: dict[str, Callable[[Any], Any]] = {
    "float64": lambda layer: layer.double(),
    "not contiguous": replace_weight(lambda weight: nn.Parameter(weight.t().contiguous().t())),
    "no Parameter": replace_weight(lambda weight: weight * 2),
    "other Parameter": replace_weight(OtherParameter),
    "inference tensor": replace_weight(nn.Parameter, torch.inference_mode),
}


@pytest.mark.parametrize("name", NO_COPY)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_layer_whose_weight_has_no_copy_is_the_plain_one(
    layer: nn.Linear, name: str, used: bool
) -> None:
    if used:
        assert fast(layer).product(every_number=False) is not None
        corrupt(layer)
    NO_COPY[name](layer)
    assert fast(layer).product(every_number=False) is None
    rows = randn(40, 20)
    with as_in_encode(layer):
        expected = F.linear(rows.to(layer.weight.dtype), layer.weight, layer.bias)
        assert torch.equal(layer(rows), expected)
    assert fast(layer).copy is None  # nor is the old one held


# accelerate


def test_accelerate_keeps_what_can_be_seen() -> None:
    model = seeded_bert()
    hook = model.layers[0].register_forward_hook(lambda *_: None)
    parts, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = model.state_dict()
    accelerate(model)
    for name, module in model.named_modules():
        assert module is parts[name]
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert list(model.state_dict()) == list(state)
    assert repr(model) == repr(seeded_bert())
    assert set(model.layers[0]._forward_hooks) == {hook.id}
    layers = linear_layers(model)
    assert len(layers) == 12
    for module in layers.values():
        assert isinstance(module, nn.Linear)
        assert type(module) is nn.Linear
    assert type(model.get_submodule("layers.0.feed_forward")) is BertFeedForward
    with as_in_encode(model):
        model(torch.tensor([[2, 5, 3]]))
    assert None not in copies(model)
    assert list(model.state_dict()) == list(state)
    seeded_bert(seed=1).load_state_dict(model.state_dict(), strict=True)


def test_accelerate_twice_changes_nothing(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    accelerate(tiny_encoder)
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), expected)


class OtherLinear(nn.Linear):
    """Somebody's own kind."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear calls it
        return super().forward(input) + 1


def test_accelerate_leaves_other_classes_alone() -> None:
    bert = seeded_bert()
    attention: Any = bert.layers[0].attention
    other = OtherLinear(32, 32)
    other.load_state_dict(attention.query.state_dict())
    attention.query = other
    plain = copy.deepcopy(bert)
    encoder = make_encoder(bert)
    assert type(attention.query) is OtherLinear
    vectors = encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(vectors, plain_vectors(plain, encoder), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("last", ["attention.query", "feed_forward.intermediate"])
def test_class_that_a_layer_is_given_later_is_called(
    tiny_encoder: SentenceEncoder, last: str
) -> None:
    plain = seeded_bert()
    for model in (tiny_encoder.bert, plain):
        model.layers[1].get_submodule(last).__class__ = OtherLinear
    vectors = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(vectors, plain_vectors(plain, tiny_encoder), rtol=0, atol=ROUNDING)


def test_accelerate_converts_the_matrices_only() -> None:
    model = seeded_bert()
    accelerate(model, torch.bfloat16)
    for name, module in model.named_modules():
        expected = torch.bfloat16 if isinstance(module, nn.Linear) else torch.float32
        for parameter in module.parameters(recurse=False):
            assert parameter.dtype == expected, name


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
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_seen_by_the_next_call(tiny_encoder: SentenceEncoder, name: str) -> None:
    before = tiny_encoder.encode(TEXTS)
    CHANGES[name](tiny_encoder)
    after = tiny_encoder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-5  # else this test would prove nothing
    np.testing.assert_array_equal(after, fresh(tiny_encoder).encode(TEXTS))


@pytest.mark.parametrize("name", ["AdamW", "load_state_dict", "no_grad", ".data.mul_"])
def test_change_is_seen_in_bfloat16(name: str) -> None:
    encoder = make_encoder(seeded_bert(), dtype="bfloat16")
    before = encoder.encode(TEXTS)
    CHANGES[name](encoder)
    after = encoder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_array_equal(after, copy.deepcopy(encoder).encode(TEXTS))


def test_changes_one_after_the_other(tiny_encoder: SentenceEncoder) -> None:
    train = step(torch.optim.SGD)
    seen = [tiny_encoder.encode(TEXTS)]
    for _ in range(3):
        train(tiny_encoder)
        seen.append(tiny_encoder.encode(TEXTS))
        np.testing.assert_array_equal(seen[-1], fresh(tiny_encoder).encode(TEXTS))
        assert all(np.abs(seen[-1] - other).max() > 1e-5 for other in seen[:-1])


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
    assert fast(layer).product(every_number=False) is None
    with pytest.raises(RuntimeError, match="dtype"):  # as from any nn.Linear
        tiny_encoder.encode(TEXTS)
    layer.bias.data = layer.bias.data.float()
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), before)
    assert fast(layer).copy is not None


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


# By `.data`, between the numbers that every call looks at; the last two leave the sum of a weight's
# words what it was.
SMALL: dict[str, Callable[[Any], Any]] = {
    "row": lambda weight: weight.data[3].zero_(),
    "element": lambda weight: weight.data[3, 5].zero_(),
    "swapped": lambda weight: weight.data[3, 5:8].copy_(weight.data[3, [7, 6, 5]]),
    "signs": lambda weight: weight.data[3, 5:8:2].neg_(),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_change_by_data_is_seen_by_a_call_of_4096_tokens(
    tiny_encoder: SentenceEncoder, name: str
) -> None:
    before = tiny_encoder.encode(TEXTS)
    layer = part(tiny_encoder, LAYER)
    SMALL[name](layer.weight)
    copied: Any = fast(layer).copy
    assert copied.numbers.tobytes() == copied.before
    after = tiny_encoder.encode(MANY + TEXTS)[-len(TEXTS) :]
    assert np.abs(after - before).max() > 1e-6
    np.testing.assert_array_equal(after, fresh(tiny_encoder).encode(TEXTS))
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), after)


def test_small_change_by_data_of_the_published_model(encoder: SentenceEncoder) -> None:
    changed = copy.deepcopy(encoder)
    before = changed.encode(PUBLISHED_TEXTS)
    np.testing.assert_array_equal(before, encoder.encode(PUBLISHED_TEXTS))
    for name in ("bert.layers.2.attention.value", "bert.layers.5.feed_forward.intermediate"):
        part(changed, name).weight.data[3] = 0
    many = ["word " * 200] * 21
    after = changed.encode(many + PUBLISHED_TEXTS)[-3:]
    np.testing.assert_array_equal(after, copy.deepcopy(changed).encode(PUBLISHED_TEXTS))
    assert np.abs(after - before).max() > 1e-5


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


def test_copies_are_kept_while_nothing_changes(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.encode(TEXTS)
    kept = copies(tiny_encoder)
    assert None not in kept
    tiny_encoder.encode(TEXTS)
    tiny_encoder.encode(MANY)
    assert all(now is then for now, then in zip(copies(tiny_encoder), kept, strict=True))


def test_every_number_is_compared_from_4096_tokens_on(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.encode(TEXTS)
    kept = copies(tiny_encoder)
    SMALL["row"](part(tiny_encoder, LAYER).weight)
    with as_in_encode(tiny_encoder, tokens=4095):
        assert all(now is then for now, then in zip(copies(tiny_encoder), kept, strict=True))
    with as_in_encode(tiny_encoder, tokens=4096):
        new = {name: fast(part).copy for name, part in linear_layers(tiny_encoder).items()}
        changed = [name for name, then in zip(new, kept, strict=True) if new[name] is not then]
    assert changed == [LAYER]


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_made_by_encode_only(tiny_encoder: SentenceEncoder, mode: Any) -> None:
    features = tiny_encoder.tokenize(TEXTS)
    with mode():
        tiny_encoder(features)
    assert set(copies(tiny_encoder)) == {None}
    with as_in_encode(tiny_encoder, mode=mode):
        assert None not in copies(tiny_encoder)


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


def replace_layers(model: nn.Module, names: list[str], kind: Callable[[Any], nn.Module]) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, kind(model.get_submodule(name)))


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
    for name in (LAYER, INTERMEDIATE, "bert.layers.0.feed_forward.output"):
        layer = part(tiny_encoder, name)
        calls: list[int] = []

        def wrapped(rows: Tensor, old: Any = layer.forward, calls: list[int] = calls) -> Any:
            calls.append(1)
            return old(rows)

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
    assert fast(layer).product(every_number=False) is None
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
    assert fast(layer).product(every_number=False) is not None
    np.testing.assert_allclose(tiny_encoder.encode(TEXTS), again, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_parametrized_layer_can_be_copied(tiny_encoder: SentenceEncoder, tensor: str) -> None:
    tiny_encoder.encode(TEXTS)
    parametrize.register_parametrization(part(tiny_encoder, LAYER), tensor, Doubled())
    expected = tiny_encoder.encode(TEXTS)
    np.testing.assert_array_equal(copy.deepcopy(tiny_encoder).encode(TEXTS), expected)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("name", ["layers.0.attention.value", "layers.0.feed_forward.intermediate"])
def test_pruned_layer(tiny_encoder: SentenceEncoder, name: str, tensor: str) -> None:
    plain, layer = seeded_bert(), part(tiny_encoder, f"bert.{name}")
    before = tiny_encoder.encode(TEXTS)
    for model in (tiny_encoder.bert, plain):
        l1_unstructured(model.get_submodule(name), tensor, amount=0.5)
    assert fast(layer).product(every_number=False) is None
    expected = plain_vectors(plain, tiny_encoder)
    after = tiny_encoder.encode(TEXTS)
    np.testing.assert_allclose(after, expected, rtol=0, atol=ROUNDING)
    assert np.abs(after - before).max() > 1e-4
    remove_pruning(layer, tensor)
    assert fast(layer).product(every_number=False) is not None
    np.testing.assert_allclose(tiny_encoder.encode(TEXTS), expected, rtol=0, atol=ROUNDING)


# where the copies are used


@pytest.fixture
def corrupted(tiny_encoder: SentenceEncoder) -> SentenceEncoder:
    """The tiny encoder after a call, with copies that show where they are used."""
    before = tiny_encoder.encode(TEXTS)
    corrupt(tiny_encoder)
    assert np.abs(tiny_encoder.encode(TEXTS) - before).max() > 0.01
    return tiny_encoder


def ids_and_mask(encoder: SentenceEncoder) -> tuple[Tensor, Tensor]:
    features = encoder.tokenize(TEXTS)
    return features["input_ids"], features["attention_mask"]


@pytest.mark.parametrize("mode", MODES)
def test_outside_encode_the_layers_are_the_plain_ones(
    corrupted: SentenceEncoder, mode: Any
) -> None:
    plain, rows = seeded_bert(), randn(40, 32)
    ids, mask = ids_and_mask(corrupted)
    with mode():
        for name, layer in linear_layers(corrupted).items():
            inputs = randn(40, layer.in_features)
            assert torch.equal(layer(inputs), F.linear(inputs, layer.weight, layer.bias)), name
        for fast, slow in zip(corrupted.bert.layers, plain.layers, strict=True):
            assert torch.equal(fast.feed_forward(rows), slow.feed_forward(rows))  # type: ignore
        assert torch.equal(corrupted.bert(ids, mask), plain(ids, mask))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_copy_is_used_where_gradients_are_recorded(
    corrupted: SentenceEncoder, frozen: bool
) -> None:
    corrupted.requires_grad_(not frozen)
    ids, mask = ids_and_mask(corrupted)
    expected = seeded_bert()(ids, mask)
    with as_in_encode(corrupted, mode=torch.enable_grad):
        assert torch.equal(corrupted.bert(ids, mask), expected)
        with torch.no_grad():
            assert (corrupted.bert(ids, mask) - expected).abs().max() > 0.01
        assert torch.equal(corrupted.bert(ids, mask), expected)


def outside(model: nn.Module, mode: Any) -> Any:
    return mode()


anywhere = pytest.mark.parametrize("place", [outside, as_in_encode])
both_modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])


@anywhere
@pytest.mark.parametrize("what", ["rows", "weight", "bias"])
@pytest.mark.parametrize("name", ["layers.0.attention.query", "layers.0.feed_forward"])
def test_gradients_are_those_of_the_plain_layer(
    corrupted: SentenceEncoder, name: str, what: str, place: Any
) -> None:
    gradients = []
    for bert in (seeded_bert(), corrupted.bert):
        module = bert.get_submodule(name).requires_grad_(False)
        rows = randn(40, 32)
        wanted = rows
        if what != "rows":
            first: Any = module if isinstance(module, nn.Linear) else module.intermediate
            wanted = getattr(first, what)
        wanted.requires_grad_(True)
        with place(module, mode=torch.enable_grad):
            gradients.append(torch.autograd.grad(module(rows).square().sum(), wanted)[0])
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 1e-3


@anywhere
@pytest.mark.parametrize("part_name", ["attention.query", "feed_forward"])
def test_forward_derivative_by_the_input_of_a_frozen_model(
    corrupted: SentenceEncoder, part_name: str, place: Any
) -> None:
    module = corrupted.bert.layers[0].get_submodule(part_name).requires_grad_(False)
    plain = seeded_bert().layers[0].get_submodule(part_name)
    rows, tangent = randn(40, 32), randn(40, 32, seed=1)
    _, expected = untyped.autograd.functional.jvp(plain, rows, tangent)  # twice backwards
    assert expected.abs().max() > 0.1
    with place(module, mode=torch.enable_grad), untyped.autograd.forward_ad.dual_level():
        output = module(untyped.autograd.forward_ad.make_dual(rows, tangent))
        derivative = untyped.autograd.forward_ad.unpack_dual(output).tangent
    assert derivative is not None  # silently none, if an operator has no rule
    torch.testing.assert_close(derivative, expected, rtol=0, atol=1e-5)
    with place(module, mode=torch.enable_grad):
        _, derivative = untyped.func.jvp(module, (rows,), (tangent,))
    torch.testing.assert_close(derivative, expected, rtol=0, atol=1e-5)


@anywhere
def test_functional_gradient_of_a_frozen_model(corrupted: SentenceEncoder, place: Any) -> None:
    layer: Any = corrupted.bert.layers[0].requires_grad_(False)
    plain: Any = seeded_bert().layers[0]
    rows = randn(40, 32)
    with place(layer, mode=torch.enable_grad):
        gradient = torch.func.grad(lambda rows: layer(rows)[..., 0].square().sum())(rows)
    rows.requires_grad_(True)
    expected = torch.autograd.grad(plain(rows)[..., 0].square().sum(), rows)[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
    assert expected.abs().max() > 1e-3


def look_into(encoder: SentenceEncoder, look: Callable[[], None]) -> list[int]:
    """Call `look` in the middle of the next pass of the encoder; 1 in the list once it was."""
    looked: list[int] = []

    def hook(*_: object) -> None:
        if not looked:
            looked.append(1)
            look()

    part(encoder, "bert.layers.0.attention_layer_norm").register_forward_hook(hook)
    return looked


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
@pytest.mark.parametrize("which", ["another", "itself"])
def test_encoder_used_by_a_hook_in_another(
    corrupted: SentenceEncoder, which: str, fails: bool
) -> None:
    inner = make_encoder(seeded_bert(seed=1)) if which == "another" else corrupted
    corrupt(inner)
    expected, expected_inside = corrupted.encode(TEXTS), inner.encode(TEXTS[::-1])
    seen: list[Any] = []

    def look() -> None:
        # The other's layers, before they have products, are the plain ones.
        layer, rows = part(inner, LAYER), randn(40, 32)
        is_plain = torch.equal(layer(rows), F.linear(rows, layer.weight, layer.bias))
        assert is_plain == (which == "another")
        seen.append(inner.encode(TEXTS[::-1]))
        if fails:
            inner.pooling.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                inner.encode("a")
            inner.pooling._forward_hooks.clear()

    looked = look_into(corrupted, look)
    np.testing.assert_array_equal(corrupted.encode(TEXTS), expected)
    assert looked == [1]
    np.testing.assert_array_equal(seen[0], expected_inside)


def test_after_an_error_in_encode_the_layers_are_the_plain_ones(
    corrupted: SentenceEncoder,
) -> None:
    looked = look_into(corrupted, lambda: 1 / 0)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        corrupted.encode(TEXTS)
    assert looked == [1]
    ids, mask = ids_and_mask(corrupted)
    with torch.no_grad():
        assert torch.equal(corrupted.bert(ids, mask), seeded_bert()(ids, mask))


def test_another_thread_has_products_of_its_own(corrupted: SentenceEncoder) -> None:
    layer, rows = part(corrupted, LAYER), randn(40, 32)
    plain = F.linear(rows, layer.weight, layer.bias)
    fast = layer.bias.expand(40, 32)  # a product with zeros
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
    for output, wanted in zip(seen, (fast, plain, None, plain, fast), strict=True):
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


CLONES = [copy.deepcopy, clone_by_pickle, clone_by_torch_save]


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_no_copy_travels_with_a_clone(clone: Callable[[Any], Any], dtype: str | None) -> None:
    encoder = make_encoder(seeded_bert(), dtype=dtype)
    size = len(pickle.dumps(encoder))
    expected = encoder.encode(TEXTS)
    assert None not in copies(encoder)
    assert len(pickle.dumps(encoder)) == size
    other = clone(encoder)
    assert set(copies(other)) == {None}
    assert None not in copies(encoder)  # nor is it taken away
    np.testing.assert_array_equal(other.encode(TEXTS), expected)
    with torch.no_grad():
        part(other, LAYER).weight.mul_(1.5)
    assert np.abs(other.encode(TEXTS) - expected).max() > 1e-5
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)


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


# what torch makes of a model: never a copy inside


def halve_the_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in linear_layers(model).values():
            layer.weight.mul_(0.5)


def close(actual: Tensor, expected: Tensor) -> None:
    # Token vectors with elements up to 3.
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)


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
            corrupt(corrupted)
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
            assert torch.equal(output, other(ids, mask))
        assert torch.equal(bert(ids, mask), seeded_bert()(ids, mask))


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
def test_threads_make_the_copies_at_once(fresh_layouts: None, dtype: str) -> None:
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

"""A layer as one flat function: the same numbers as `bert.py`, by products that are tried first."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
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
    flat_layers,
    linear_layers,
    make_encoder,
    needs_onednn,
    part,
    plain_vectors,
    randn,
    replace_layers,
    untyped,
)
from torch import Tensor, nn

from conftest import seeded_bert
from minilm import BertFeedForward, BertLayer, SentenceEncoder
from minilm.inference import kernels
from minilm.inference.kernels import (
    Chains,
    Choice,
    Plain,
    Product,
    Slices,
    accelerate,
    product_for,
)
from minilm.inference.packed import PackedBatch

# products


PRODUCTS: dict[str, tuple[Product, torch.dtype]] = {
    "plain": (Plain(), torch.float32),
    "slices": (Slices(), torch.float32),
    "one chain": (Chains(), torch.float32),
    "chains of 768": (Chains(768), torch.float32),
    "chains of 192": (Chains(192), torch.float32),
    "bfloat16": (Chains(), torch.bfloat16),
    "bfloat16, row blocks": (Chains(row_blocks=True), torch.bfloat16),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["as given", "transposed"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("inner", "outer"), [(384, 384), (384, 1536), (1536, 384), (7, 13), (385, 5), (1, 1)]
)
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_equals_linear(
    name: str, inner: int, outer: int, has_bias: bool, transposed: bool
) -> None:
    product, dtype = PRODUCTS[name]
    if isinstance(product, Chains):
        needs_onednn(dtype)
    weight = randn(outer, inner, seed=1).mul(0.05).to(dtype)
    bias = randn(outer, seed=2, dtype=dtype) if has_bias else None
    if transposed:
        weight = weight.t().contiguous().t()
    multiply = product.of(weight, bias)
    rows = randn(600, inner, dtype=dtype)
    # Results of about 1, of sums of up to 1536 products; bfloat16 rounds the result to 8 bits, and
    # may round sums in between.
    bound = 4e-6 if dtype == torch.float32 else 0.02
    for change in (1.0, -0.5):
        weight.data.mul_(change)  # in place: what the product was made of is what it multiplies by
        if bias is not None:
            bias.data.add_(change)
        exact = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
        for count in (1, 2, 3, 16, 17, 32, 33, 100, 511, 512, 600):
            output = multiply(rows[:count])
            assert output.dtype == dtype
            assert output.shape == (count, outer)
            error = (output.double() - exact[:count]).abs()
            assert error.max() <= bound * max(1.0, float(exact.abs().max())), count
            assert error.mean() <= bound / 4 * max(1.0, float(exact.abs().mean())), count


@pytest.mark.parametrize("product", [Slices(), Chains(), Chains(16)], ids=["slices", "1", "16"])
def test_product_with_gaps_between_the_rows(product: Product) -> None:
    """As parts of a wider matrix have them."""
    if isinstance(product, Chains):
        needs_onednn(torch.float32)
    wide, rows = randn(64, 3 * 32), randn(40, 64)
    weight = wide.t()[32:64]
    multiply = product.of(weight, None)
    for _ in range(2):
        torch.testing.assert_close(multiply(rows), rows @ wide[:, 32:64], rtol=0, atol=4e-5)
        wide.mul_(0.5)


def products_of(call: Callable[[], Tensor]) -> list[tuple[str, int, int]]:
    """The matrix products in a call: operator, rows, columns that are added up."""
    seen = []

    class Watching(untyped.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm", "addmm_", "_linear_pointwise"):
                seen.append((name, *args[1 if "add" in name else 0].shape))
            return func(*args, **(kwargs or {}))

    with Watching():
        call()
    return seen


@pytest.mark.parametrize("count", [31, 32, 33, 64, 65, 511, 512])
def test_row_blocks_are_products_of_32_rows(count: int) -> None:
    needs_onednn(torch.bfloat16)
    weight, rows = randn(40, 64, seed=1, dtype=torch.bfloat16), randn(count, 64).bfloat16()
    multiply = Chains(row_blocks=True).of(weight, None)
    parts = [height for _, height, _ in products_of(lambda: multiply(rows))]
    assert sum(parts) == count
    assert max(parts) == (32 if 32 < count < 512 else count)
    assert torch.equal(multiply(rows)[:20], multiply(rows[:32])[:20])


@pytest.mark.parametrize("bias", [None, torch.ones(4)], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("product", "inner", "columns"),
    [
        (Slices(), 384, [384]), (Slices(), 385, [384, 1]), (Slices(), 1536, [384] * 4),
        (Chains(), 1536, [1536]), (Chains(768), 1536, [768] * 2), (Chains(192), 384, [192] * 2),
        (Chains(768), 384, [384]),
    ],
)  # fmt: skip
def test_long_sums_are_of_so_many_columns(
    product: Product, inner: int, columns: list[int], bias: Tensor | None
) -> None:
    if isinstance(product, Chains):
        needs_onednn(torch.float32)
    rows, multiply = torch.ones(17, inner), product.of(torch.ones(4, inner), bias)
    products = products_of(lambda: multiply(rows))
    assert [(height, width) for _, height, width in products] == [(17, part) for part in columns]
    assert set(multiply(rows).flatten().tolist()) == {inner if bias is None else inner + 1}


# product_for


def test_candidates_end_with_linear_or_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {
        (torch.float32, True): [Chains] * 4 + [Slices, Plain],
        (torch.float32, False): [Plain, Slices],
        (torch.bfloat16, True): [Chains, Chains, Plain],
        (torch.bfloat16, False): [Plain],
        (torch.float64, True): [],
        (torch.float16, True): [],
    }
    for (dtype, has), expected in kinds.items():
        monkeypatch.setattr(kernels, "has_onednn", lambda _, has=has: has)
        assert [type(product) for product in kernels._candidates(dtype)] == expected


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Nothing tried yet, for this test; what was comes back. Trials of the published are kept."""
    if "published" not in request.fixturenames:
        monkeypatch.setattr(kernels, "_choices", {})


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Product]]:
    """Sets the products that `product_for` may choose from."""

    def these(*products: Product) -> list[Product]:
        monkeypatch.setattr(kernels, "_choices", {})
        monkeypatch.setattr(kernels, "_candidates", lambda *_: list(products))
        return list(products)

    return these


def chosen(out_features: int = 64, in_features: int = 32, most_error: float = 1.5) -> Any:
    choice = product_for(torch.float32, out_features, in_features, most_error)
    return None if choice is None else choice.product


class Changed(Product):
    """Another product, and what to do to its result, of its number of rows."""

    def __init__(self, change: Callable[[Tensor], Tensor], apart: bool = True) -> None:
        self.change, self.apart = change, apart

    def of(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        def multiply(rows: Tensor) -> Tensor:
            if not self.apart:
                return self.change(F.linear(rows, weight, bias))
            # Row by row, so that none can know of another: on any processor.
            return self.change(torch.cat([F.linear(row[None], weight, bias) for row in rows]))

        return multiply


def apart() -> Product:
    return Changed(lambda output: output)


def mixing(modulus: int = 5) -> Product:
    """Right, but the last bits depend on the number of rows."""
    eps = torch.finfo(torch.float32).eps
    return Changed(lambda output: output * (1 + len(output) % modulus * eps))


def rough() -> Product:
    """Right, but with more rounding than `F.linear`, by a factor of some 2."""

    def rounded(output: Tensor) -> Tensor:
        step = 2**-23 * output.abs().amax(1, keepdim=True)
        return (output / step).round() * step

    return Changed(rounded)


class Unusable(Product):
    def __init__(self, error: Exception, where: str) -> None:
        self.error, self.where = error, where

    def of(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        def multiply(rows: Tensor) -> Tensor:
            raise self.error

        if self.where == "of":
            raise self.error
        return multiply


@pytest.mark.parametrize(
    "change",
    [lambda output: output * 1.001, lambda output: output * torch.nan, lambda output: output - 1],
    ids=["factor", "nan", "offset"],
)
def test_wrong_product_is_refused(candidates: Callable[..., Any], change: Any) -> None:
    _, right = candidates(Changed(change), apart())
    assert chosen() is right
    candidates(Changed(change))
    assert chosen() is None


@pytest.mark.parametrize("where", ["of", "multiply"])
@pytest.mark.parametrize("error", [AttributeError("no operator"), RuntimeError("unsupported")])
def test_product_that_raises_is_passed_over(
    candidates: Callable[..., Any], error: Exception, where: str
) -> None:
    _, right = candidates(Unusable(error, where), apart())
    assert chosen() is right
    candidates(Unusable(error, where))
    assert chosen() is None


def test_programming_error_in_a_product_is_not_hidden(candidates: Callable[..., Any]) -> None:
    candidates(Unusable(TypeError("mine"), "of"), apart())
    with pytest.raises(TypeError, match="mine"):
        chosen()


def test_trial_that_broke_is_made_again(candidates: Callable[..., Any]) -> None:
    broken, second = candidates(Unusable(RuntimeError("out of memory"), "multiply"), apart())
    assert chosen() is second
    assert not kernels._choices
    broken.of = second.of  # memory is there again
    assert chosen() is broken
    assert kernels._choices


def test_product_that_mixes_rows_is_the_last_resort(candidates: Callable[..., Any]) -> None:
    _, second = candidates(mixing(), apart())
    assert chosen() is second
    _, first, _ = candidates(Changed(lambda output: output * 2), mixing(), mixing())
    assert chosen() is first


def test_error_is_a_criterion(candidates: Callable[..., Any]) -> None:
    """Beside equal bits, which come before it."""
    _, exact = candidates(rough(), apart())
    assert chosen() is exact
    _, second = candidates(mixing(), rough())
    assert chosen() is second
    with kernels._ordinary_state():
        trials = [kernels._Trial.of(x, torch.float32, 64, 32) for x in (Plain(), rough())]
    assert trials[0].error == 1
    assert trials[1].is_right
    assert 1.5 < trials[1].error < 8


def test_product_may_err_as_much_as_is_said(
    candidates: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = candidates(apart(), apart())
    real = kernels._Trial.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, product: Any, *shape: Any) -> Any:
        trial = real(cls, product, *shape)
        trial.error = 1.3 if product is first else 1.0
        return trial

    monkeypatch.setattr(kernels._Trial, "of", classmethod(of))
    assert chosen(most_error=1.5) is first
    assert chosen(most_error=1.2) is second


@pytest.mark.parametrize(("modulus", "multiple"), [(4, 4), (16, 16)])
def test_multiple_is_4_where_that_keeps_the_bits(
    candidates: Callable[..., Any], modulus: int, multiple: int
) -> None:
    (product,) = candidates(mixing(modulus))
    assert product_for(torch.float32, 64, 32, 1.5) == Choice(product, multiple)
    encoder = make_encoder(seeded_bert())
    with as_in_encode(encoder) as found:
        assert found == multiple


def test_encoder_knows_that_its_product_mixes_rows(candidates: Callable[..., Any]) -> None:
    candidates(mixing())
    encoder = make_encoder(seeded_bert())
    assert not encoder.deterministic
    vectors = encoder.encode(TEXTS, convert_to_tensor=True)
    expected = plain_vectors(seeded_bert(), encoder)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=ROUNDING)


def test_first_of_several_good_products_is_chosen_once(
    candidates: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = candidates(apart(), apart())
    assert chosen() is first
    monkeypatch.setattr(kernels, "_candidates", lambda *_: [second])
    assert chosen() is first
    assert chosen(65) is second


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_have_no_product(dtype: torch.dtype) -> None:
    assert product_for(dtype, 384, 384, 1.5) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_are_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    found = []
    for _ in range(2):
        monkeypatch.setattr(kernels, "_choices", {})
        shapes = [(384, 384, 1.2), (1536, 384, 1.2), (384, 1536, 1.5)]
        found.append([product_for(dtype, *shape) for shape in shapes])
    assert found[0] == found[1]
    assert None not in found[0]


def test_trial_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert product_for(torch.float32, 32, 32, 1.2) is not None
    assert torch.equal(torch.get_rng_state(), before)


OTHERS = pytest.mark.parametrize("product", [None, Plain(), Slices()], ids=["none", "plain", "mm"])


@OTHERS
def test_encoder_with_other_products_gives_the_same_vectors(
    candidates: Callable[..., Any],
    product: Any,
    tiny_encoder: SentenceEncoder,
    flat_calls: list[Any],
) -> None:
    candidates(*[product] * (product is not None))
    vectors = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    assert len(flat_calls) == (0 if product is None else 2)
    torch.testing.assert_close(
        vectors, plain_vectors(seeded_bert(), tiny_encoder), rtol=0, atol=ROUNDING
    )


@OTHERS
def test_published_model_without_onednn(
    candidates: Callable[..., Any],
    encoder: SentenceEncoder,
    encoder64: SentenceEncoder,
    product: Any,
) -> None:
    candidates(*[product] * (product is not None))
    vectors = copy.deepcopy(encoder).encode(PUBLISHED_TEXTS)
    np.testing.assert_allclose(vectors, encoder64.encode(PUBLISHED_TEXTS), rtol=0, atol=ROUNDING)


@OTHERS
def test_bfloat16_without_onednn(candidates: Callable[..., Any], product: Any) -> None:
    expected = make_encoder(seeded_bert(), dtype="bfloat16").encode(TEXTS)
    candidates(*[product] * (product is not None))
    without = make_encoder(seeded_bert(), dtype="bfloat16")
    # Elements of about 0.2 with 8 bits, through two layers.
    np.testing.assert_allclose(without.encode(TEXTS), expected, rtol=0, atol=5e-3)


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
def test_product_is_found_under_any_global_state(
    monkeypatch: pytest.MonkeyPatch, state: str, shape: tuple[int, int]
) -> None:
    expected = product_for(torch.float32, *shape, 1.2)
    assert expected is not None
    monkeypatch.setattr(kernels, "_choices", {})
    with STATES[state]():
        assert product_for(torch.float32, *shape, 1.2) == expected
    assert list(kernels._choices.values()) == [expected]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_number_of_threads_is_part_of_the_choice(two_threads: None) -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        product_for(torch.float32, 32, 32, 1.2)
        assert torch.get_num_threads() == threads
    assert len(kernels._choices) == 2


# the flat layer


def layer_of(encoder: SentenceEncoder, number: int = 0) -> Any:
    """A layer, once by itself (of the class's own `forward`), and once as in `encode`."""
    layer: Any = encoder.bert.layers[number]

    def flat(rows: Tensor, *attend: Any) -> Tensor:
        with as_in_encode(encoder):
            output: Tensor = layer(rows, *attend)
        return output

    def plain(rows: Tensor, *attend: Any) -> Tensor:
        with torch.no_grad():
            return BertLayer.forward(layer, rows, *attend)

    return plain, flat


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (40,), (1,), (2, 2, 5)], ids=str)
def test_flat_layer_equals_its_definition(
    tiny_encoder: SentenceEncoder, shape: tuple[int, ...], flat_calls: list[Any]
) -> None:
    """Padded `[batch, tokens, 32]` or packed `[tokens, 32]`; float64 has the same bits."""
    rows = randn(*shape, 32)
    attend = [] if len(shape) > 1 else [PackedBatch([[1] * shape[0]]).attend]
    plain, flat = layer_of(tiny_encoder)
    expected, output = plain(rows, *attend), flat(rows, *attend)
    assert len(flat_calls) == 1
    assert output.shape == rows.shape
    torch.testing.assert_close(output, expected, rtol=0, atol=4e-6)  # elements up to 4
    tiny_encoder.double()
    exact = plain(rows.double(), *attend)
    assert torch.equal(flat(rows.double(), *attend), exact)
    assert len(flat_calls) == 1
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=4e-6)


@pytest.mark.parametrize("number", [0, 5])
def test_flat_layer_of_the_published_model(
    encoder: SentenceEncoder, encoder64: SentenceEncoder, number: int, flat_calls: list[Any]
) -> None:
    rows = F.layer_norm(randn(96, 384), (384,)) * 0.05  # of a length of 1
    batch = PackedBatch([[1] * 60, [1] * 20, [1] * 16])
    plain, flat = layer_of(encoder, number)
    exact, _ = layer_of(encoder64, number)
    cases: list[Any] = [((96, 384), [batch.attend]), ((4, 24, 384), [])]
    for shape, attend in cases:
        inputs = rows.view(shape)
        output = flat(inputs, *attend)
        expected = exact(inputs.double(), *attend)
        size = expected.norm(dim=-1).mean()
        for other in (expected, plain(inputs, *attend).double()):
            assert (output - other).abs().max() / size < ROUNDING
    assert len(flat_calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_keep_their_bits_in_multiples(
    encoder: SentenceEncoder, two_threads: None, threads: int
) -> None:
    torch.set_num_threads(threads)
    rows = randn(640, 384)
    layer: Any = encoder.bert.layers[1]

    def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value

    with as_in_encode(encoder) as multiple:
        whole = layer(rows, alone)
        for count in (*range(multiple, 49, multiple), 80, 160, 512):
            for start in (0, 7):
                some = layer(rows[start : start + count], alone)
                assert torch.equal(some, whole[start : start + count]), (count, start)


def test_layer_without_biases(tiny_encoder: SentenceEncoder, flat_calls: list[Any]) -> None:
    plain: Any = seeded_bert()
    for model in (tiny_encoder.bert, plain):
        for layer in linear_layers(model).values():
            layer.bias = None
    vectors = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(vectors, plain_vectors(plain, tiny_encoder), rtol=0, atol=ROUNDING)
    assert len(flat_calls) == 2


def test_number_of_heads_is_that_of_the_attention(tiny_encoder: SentenceEncoder) -> None:
    plain = seeded_bert()
    before = tiny_encoder.encode(TEXTS)
    for model in (tiny_encoder.bert, plain):
        part(model, "layers.0.attention").heads = (2, 16)
    vectors = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(vectors, plain_vectors(plain, tiny_encoder), rtol=0, atol=ROUNDING)
    assert np.abs(vectors.numpy() - before).max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 20), (20,), (2, 3, 20), (0, 20)], ids=str)
def test_linear_computes_in_the_dtype_of_its_weight(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = nn.Linear(20, 12)
    accelerate(layer, dtype)
    rows = randn(*shape, seed=5)
    for mode in MODES:
        with as_in_encode(layer, mode=mode):
            assert torch.equal(layer(rows), F.linear(rows.to(dtype), layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_wrong_width_are_refused(
    tiny_encoder: SentenceEncoder, dtype: torch.dtype
) -> None:
    tiny_encoder.to(dtype)
    for shape in ((4, 31), (4, 33), (2, 3, 64)):
        with pytest.raises(RuntimeError), as_in_encode(tiny_encoder):
            tiny_encoder.bert.layers[0](torch.ones(shape, dtype=dtype))


class OtherParameter(nn.Parameter):
    """Somebody's own kind, as quantized weights are."""


def replace_weight(change: Callable[[Tensor], Any], name: str = LAYER) -> Any:
    def run(encoder: SentenceEncoder) -> None:
        layer = part(encoder, name)
        weight = change(layer.weight.detach().clone())
        del layer.weight
        layer.weight = weight

    return run


NOT_FLAT: dict[str, Callable[[Any], Any]] = {
    "float64": lambda encoder: encoder.double(),
    "one of another dtype": lambda encoder: part(encoder, LAYER).double(),
    "no Parameter": replace_weight(lambda weight: weight * 2),
    "other Parameter": replace_weight(OtherParameter),
    "norm, no Parameter": replace_weight(lambda weight: weight * 2, NORM),
    "autocast": lambda _: None,
}


@pytest.mark.parametrize("name", NOT_FLAT)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_layer_of_another_kind_is_the_plain_one(
    tiny_encoder: SentenceEncoder, name: str, used: bool, flat_calls: list[Any]
) -> None:
    if used:
        tiny_encoder.encode(TEXTS)
        assert len(flat_calls) == 2
    flat_calls.clear()
    plain = seeded_bert()
    host: Any = nn.Module()
    host.bert = plain
    NOT_FLAT[name](tiny_encoder)
    if name == "one of another dtype":  # which casts, as MixedLinear does
        assert flat_layers(tiny_encoder) == ["bert.layers.1"]
        return
    NOT_FLAT[name](plain if name == "float64" else host)
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        vectors = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
        expected = plain_vectors(plain, tiny_encoder)
    bound = 2e-2 if name == "autocast" else ROUNDING
    torch.testing.assert_close(vectors, expected.to(vectors), rtol=0, atol=bound)
    assert len(flat_calls) == (0 if name in ("float64", "autocast") else 1)


def test_layers_that_others_compute_get_as_many_rows_as_ever(tiny_encoder: SentenceEncoder) -> None:
    """`F.linear` keeps a row's bits in a multiple of 16 only."""
    layer: Any = tiny_encoder.bert.layers[0]
    layer.forward = lambda *args, old=layer.forward: old(*args)
    with as_in_encode(tiny_encoder) as multiple:
        assert multiple == 16
    with as_in_encode(tiny_encoder.double()) as multiple:
        assert multiple == 16
    with as_in_encode(nn.Sequential(nn.Linear(2, 2))) as multiple:
        assert multiple == 16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("last", ["embeddings", "layers.1.feed_forward_layer_norm"])
def test_parts_that_are_scripted(tiny_encoder: SentenceEncoder, last: str) -> None:
    expected = tiny_encoder.encode(TEXTS)
    replace_layers(tiny_encoder.bert, [last], untyped.jit.script)
    np.testing.assert_allclose(tiny_encoder.encode(TEXTS), expected, rtol=0, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:Dynamo :UserWarning")  # of what `attend` calls
@pytest.mark.parametrize("in_place", [False, True])
def test_layer_that_is_compiled(tiny_encoder: SentenceEncoder, in_place: bool) -> None:
    expected = tiny_encoder.encode(TEXTS)
    try:
        if in_place:
            tiny_encoder.bert.layers[0].compile(backend="eager")
        else:
            replace_layers(
                tiny_encoder.bert, ["layers.0"], partial(untyped.compile, backend="eager")
            )
        np.testing.assert_allclose(tiny_encoder.encode(TEXTS), expected, rtol=0, atol=ROUNDING)
    finally:
        torch._dynamo.reset()


# kept between calls


def kept(encoder: SentenceEncoder) -> Any:
    encoder.encode(TEXTS)
    return kernels._known.get(encoder)


def new_norm(encoder: SentenceEncoder) -> None:
    """With the same parameters."""
    layer: Any = encoder.bert.layers[0]
    old = layer.attention_layer_norm
    norm = nn.LayerNorm(32, eps=1.0).eval()
    norm.weight, norm.bias = old.weight, old.bias
    layer.attention_layer_norm = norm


def set_parameter(name: str, which: str = "weight") -> Callable[[Any], None]:
    def run(encoder: SentenceEncoder) -> None:
        layer = part(encoder, name)
        setattr(layer, which, nn.Parameter(getattr(layer, which).detach() * 1.5))

    return run


def set_data(name: str, which: str = "weight") -> Callable[[Any], None]:
    def run(encoder: SentenceEncoder) -> None:
        tensor = getattr(part(encoder, name), which)
        tensor.data = tensor.data * 1.5

    return run


NEWLY_MADE: dict[str, Callable[[Any], Any]] = {
    "weight": set_parameter(LAYER),
    "bias": set_parameter(INTERMEDIATE, "bias"),
    "weight.data": set_data(INTERMEDIATE),
    "bias.data": set_data(LAYER, "bias"),
    "norm": set_parameter(NORM),
    "norm.data": set_data(NORM),
    "no bias": lambda encoder: setattr(part(encoder, LAYER), "bias", None),
    "norm of another eps": new_norm,
    "transposed": lambda encoder: setattr(
        part(encoder, LAYER).weight, "data", part(encoder, LAYER).weight.data.t()
    ),
    "layers swapped": lambda encoder: setattr(
        encoder.bert, "layers", nn.ModuleList([*encoder.bert.layers][::-1])
    ),
    "one layer less": lambda encoder: encoder.bert.layers.pop(1),
}


@pytest.mark.parametrize("name", NEWLY_MADE)
def test_flat_layers_are_made_anew_for_what_changed(
    tiny_encoder: SentenceEncoder, name: str
) -> None:
    before, first = tiny_encoder.encode(TEXTS), kept(tiny_encoder)
    assert len(first.layers) == 2
    assert kept(tiny_encoder) is first
    tiny_encoder.encode("one more")
    assert kept(tiny_encoder) is first
    NEWLY_MADE[name](tiny_encoder)
    after = tiny_encoder.encode(TEXTS)
    assert kept(tiny_encoder) is not first
    assert kept(tiny_encoder) is kept(tiny_encoder)
    assert np.abs(after - before).max() > 1e-5
    expected = copy.deepcopy(tiny_encoder).encode(TEXTS)  # which has computed nothing yet
    np.testing.assert_allclose(after, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["threads", "precision", "training", "hook", "dtype"])
def test_flat_layers_are_made_anew_in_another_state(
    tiny_encoder: SentenceEncoder, name: str, two_threads: None
) -> None:
    expected, first = tiny_encoder.encode(TEXTS), kept(tiny_encoder)
    before = torch.get_float32_matmul_precision()
    try:
        if name == "threads":
            torch.set_num_threads(1)
            assert kept(tiny_encoder) is not first
        elif name == "precision":
            torch.set_float32_matmul_precision("high")
            assert kept(tiny_encoder) is not first
        elif name == "training":  # of one part, as `fast_products` alone sees it
            part(tiny_encoder, "bert.layers.0.attention.dropout").train()
            assert flat_layers(tiny_encoder) == ["bert.layers.1"]
            part(tiny_encoder, "bert.layers.0.attention.dropout").eval()
        elif name == "hook":
            handle = part(tiny_encoder, LAYER).register_forward_hook(lambda *_: None)
            assert flat_layers(tiny_encoder) == ["bert.layers.1"]
            handle.remove()
        else:
            tiny_encoder.double()
            assert flat_layers(tiny_encoder) == []
            tiny_encoder.float()
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_allclose(tiny_encoder.encode(TEXTS), expected, rtol=0, atol=ROUNDING)
    assert flat_layers(tiny_encoder) == ["bert.layers.0", "bert.layers.1"]


def test_model_is_freed_with_its_last_reference(tiny_encoder: SentenceEncoder) -> None:
    encoder = copy.deepcopy(tiny_encoder)
    encoder.encode(TEXTS)
    weights: list[Any] = [weakref.ref(parameter) for parameter in encoder.parameters()]
    modules = [weakref.ref(module) for module in encoder.modules()]
    gc.collect()
    gc.disable()
    try:
        del encoder
        assert all(reference() is None for reference in (*modules, *weights))
    finally:
        gc.enable()


# accelerate


def test_accelerate_keeps_what_can_be_seen() -> None:
    model = seeded_bert()
    hook = model.layers[0].register_forward_hook(lambda *_: None)
    parts, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate(model)
    for name, module in model.named_modules():
        assert module is parts[name]
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad
        assert torch.equal(parameter, state[name])
    assert list(model.state_dict()) == list(state)
    assert repr(model) == repr(seeded_bert())
    assert set(model.layers[0]._forward_hooks) == {hook.id}
    layers = linear_layers(model)
    assert len(layers) == 12
    assert all(type(module) is nn.Linear for module in layers.values())
    assert type(model.get_submodule("layers.0.feed_forward")) is BertFeedForward
    with as_in_encode(model):
        model(torch.tensor([[2, 5, 3]]))
    assert list(model.state_dict()) == list(state)
    seeded_bert(seed=1).load_state_dict(model.state_dict(), strict=True)


def test_accelerate_twice_changes_nothing(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    accelerate(tiny_encoder)
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), expected)


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

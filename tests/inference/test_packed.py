"""Batches without padding: each sentence gets what it gets alone, and no more."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import seeded_bert
from minilm import BertConfig, ClsPooling, MeanPooling, Normalize, SentenceEncoder, attention
from minilm.errors import InputError, InputTypeError
from minilm.inference import packed
from minilm.inference.packed import (
    PackedBatch,
    default_budget,
    keeps_bits,
    make_batch,
    plan_batches,
)

properties = settings(deadline=None, derandomize=True, max_examples=200)

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shuffled(values: Sequence[int], seed: int = 0) -> list[int]:
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    return [values[i] for i in order]


def random_rows(lengths: Sequence[int], seed: int = 0, vocab_size: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]


def batch_of(lengths: Sequence[int]) -> PackedBatch:
    return PackedBatch([[1] * length for length in lengths])


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# PackedBatch, by hand


def test_sentences_are_laid_end_to_end() -> None:
    batch = PackedBatch([[101, 7592, 102], [101, 102], [101, 102], [5, 6, 7]])
    assert batch.input_ids.tolist() == [101, 7592, 102, 101, 102, 101, 102, 5, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 2]
    assert batch.lengths == [3, 2, 2, 3]
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64


@pytest.mark.parametrize("multiple_of", [1, 2, 5, 6, 64])
def test_rows_of_no_sentence_fill_up_the_last_multiple(multiple_of: int) -> None:
    rows = random_rows([5, 3, 3, 1, 2])
    plain, filled = PackedBatch(rows), PackedBatch(rows, multiple_of=multiple_of)
    total = len(filled.input_ids)
    assert total % multiple_of == 0
    assert 14 <= total < 14 + multiple_of
    assert torch.equal(filled.input_ids[:14], plain.input_ids)
    assert torch.equal(filled.position_ids[:14], plain.position_ids)
    assert filled.attention_mask.tolist() == [1] * 14 + [0] * (total - 14)
    query, key, value = (randn(total, 2, 4, seed=seed) for seed in range(3))
    query[14:], key[14:], value[14:] = 1e6, -1e6, 1e6  # nobody looks at them
    context = filled.attend(query, key, value)
    assert torch.equal(context[:14], plain.attend(query[:14], key[:14], value[:14]))
    assert torch.equal(context[14:], torch.zeros(total - 14, 2, 4, dtype=context.dtype))
    value = value.flatten(1)
    pooled = filled.pool(MeanPooling(), value)
    close(pooled, plain.pool(MeanPooling(), value[:14]), 0)


def test_attention_of_two_sentences_by_hand() -> None:
    """Queries and keys of 0 give each token the mean of its sentence's values."""
    values = torch.tensor([[1.0], [3.0], [10.0], [20.0], [60.0], [7.0]])[:, None]  # [6, 1, 1]
    zeros = torch.zeros_like(values)
    context = batch_of([2, 3, 1]).attend(zeros, zeros, values)
    assert context.shape == (6, 1, 1)
    close(context.flatten(), torch.tensor([2.0, 2, 30, 30, 30, 7]), atol=4e-6)


def test_pooling_of_sentences_by_hand() -> None:
    tokens = torch.tensor([[1.0], [3.0], [10.0], [20.0], [60.0], [5.0], [9.0]])
    batch = batch_of([2, 3, 2])
    assert batch.pool(MeanPooling(), tokens).tolist() == [[2], [30], [7]]
    assert batch.pool(ClsPooling(), tokens).tolist() == [[1], [10], [5]]


# attend

LENGTHS: dict[str, list[int]] = {
    "2 to 40, mixed": shuffled(list(range(2, 41)) * 2),
    "2 to 40, longest first": sorted(list(range(2, 41)) * 2, reverse=True),
    "2 to 40, shortest first": list(range(2, 41)),
    "one": [17],
    "one of a multiple of 16": [32],
    "one token": [1],
    "one token each": [1] * 5,
    "equal": [23] * 7,
    "window ends with the tensor": [17, 15],
    "window ends behind the tensor": [17, 14],
    "window reaches over several": [17, 2, 3, 1, 4, 5, 6],
    "last run too long for its windows": [3, 30, 30],
    "around 16": [15, 16, 17, 31, 32, 33, 47, 48, 49, 1, 17],
    "long": [256, 255, 241, 129],
}


def expected_context(lengths: Sequence[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition, sentence by sentence."""
    parts = (torch.split(tensor, list(lengths)) for tensor in (query, key, value))
    return torch.cat(
        [attention(q[None], k[None], v[None])[0] for q, k, v in zip(*parts, strict=True)]
    )


@pytest.mark.parametrize(
    ("dtype", "atol"),
    [
        # Means of normal numbers, of up to 256 summands with weights that add up to 1.
        (torch.float64, 1e-14),
        (torch.float32, 2e-6),
        (torch.float16, 4e-3),
        (torch.bfloat16, 3e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LENGTHS)
def test_attend_equals_attention_of_each_sentence(
    name: str, dtype: torch.dtype, atol: float
) -> None:
    lengths = LENGTHS[name]
    query, key, value = (randn(sum(lengths), 4, 8, seed=seed).to(dtype) for seed in range(3))
    context = batch_of(lengths).attend(query, key, value)
    assert context.dtype == dtype
    assert context.shape == query.shape
    exact = expected_context(lengths, query.double(), key.double(), value.double())
    close(context.double(), exact, atol)


def test_attend_takes_tensors_that_are_parts_of_others() -> None:
    """As a product for query, key and value at once would give them."""
    lengths = LENGTHS["2 to 40, mixed"]
    together = randn(sum(lengths) + 3, 3, 4, 8)[3:]  # with an offset into its storage
    query, key, value = together.unbind(1)
    expected = expected_context(lengths, query, key, value)
    close(batch_of(lengths).attend(query, key, value), expected, atol=1e-14)


@pytest.mark.parametrize("name", ["2 to 40, mixed", "equal", "window ends behind the tensor"])
def test_gradients_of_attend(name: str) -> None:
    lengths = LENGTHS[name]
    tensors = [randn(sum(lengths), 4, 8, seed=seed).requires_grad_() for seed in range(3)]
    weight = randn(sum(lengths), 4, 8, seed=3)
    fast, plain = (
        torch.autograd.grad((context * weight).sum(), tensors)
        for context in (
            batch_of(lengths).attend(*tensors),
            expected_context(lengths, *tensors),
        )
    )
    for actual, expected in zip(fast, plain, strict=True):
        assert expected.abs().max() > 0.1
        close(actual, expected, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 20, 31, 33, 40])
def test_neighbours_do_not_change_a_bit(length: int, dtype: torch.dtype) -> None:
    """Alone, in the middle, at the end; whatever the others hold, up to 1e18."""
    own = [randn(length, 4, 8, seed=seed).to(dtype) for seed in range(3)]
    alone = batch_of([length]).attend(*own)
    for before, after in (([], [40]), ([40, 3], [2, 17]), ([length], []), ([], [length] * 3)):
        start = sum(before)
        total = start + length + sum(after)
        for scale in (0.0, 1.0, 1e18):
            tensors = [(randn(total, 4, 8, seed=9) * scale).to(dtype) for _ in range(3)]
            for tensor, mine in zip(tensors, own, strict=True):
                tensor[start : start + length] = mine
            context = batch_of([*before, length, *after]).attend(*tensors)
            assert torch.equal(context[start : start + length], alone), (before, after, scale)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


HEADS = pytest.mark.parametrize("heads", [(12, 32), (4, 8)], ids=["12 of 32", "4 of 8"])


@pytest.mark.slow
@HEADS
def test_bits_of_every_length_alone_and_among_others(heads: tuple[int, int], threads: int) -> None:
    """Short sentences attend by `bmm` and long ones by the fused kernel: the change is in here."""
    for length in range(1, 171):
        own = [randn(length, *heads, seed=seed, dtype=torch.float32) for seed in range(3)]
        alone = batch_of([length]).attend(*own)
        exact = expected_context([length], *(tensor.double() for tensor in own))
        close(alone.double(), exact, atol=1e-6)
        tensors = [randn(3 + 3 * length + 16, *heads, dtype=torch.float32) for _ in range(3)]
        for tensor, mine in zip(tensors, own, strict=True):
            tensor[3 : 3 + length] = tensor[3 + 2 * length : 3 + 3 * length] = mine
        context = batch_of([3, *[length] * 3, 16]).attend(*tensors)
        for start in (3, 3 + 2 * length):
            assert torch.equal(context[start : start + length], alone), length


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the sentences that attend by the fused kernel."""
    seen: list[int] = []
    real = packed._attend

    def noted(run: Any, *tensors: Any) -> Tensor:
        seen.append(run.length)
        return real(run, *tensors)

    monkeypatch.setattr(packed, "_attend", noted)
    return seen


@pytest.mark.parametrize("keeps", [True, False], ids=["keeps bits", "mixes them"])
@HEADS
def test_sentences_attend_by_products_where_these_keep_bits(
    monkeypatch: pytest.MonkeyPatch, fused_calls: list[int], heads: tuple[int, int], keeps: bool
) -> None:
    asked: list[tuple[int, ...]] = []

    def keep_bits(*shape: int) -> bool:
        asked.append(shape)
        return keeps

    monkeypatch.setattr(packed, "_products_keep_bits", keep_bits)
    lengths = [161, 160, 40, 40, 1]
    tensors = [randn(402, *heads, seed=seed, dtype=torch.float32) for seed in range(3)]
    context = batch_of(lengths).attend(*tensors)
    assert fused_calls == ([161] if keeps else [161, 160, 40, 1])
    # Heads of 8 are filled up with zeros to a line of the cache.
    assert set(asked) == {(heads[0], max(16, heads[1]), torch.get_num_threads())}
    exact = expected_context(lengths, *(tensor.double() for tensor in tensors))
    close(context.double(), exact, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_attend_by_the_fused_kernel(
    fused_calls: list[int], dtype: torch.dtype
) -> None:
    batch_of([20, 3]).attend(*(randn(23, 4, 16, seed=seed).to(dtype) for seed in range(3)))
    assert fused_calls == [20, 3]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_products_that_mix_rows_are_found_out(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    packed._products_keep_bits.cache_clear()
    real = packed._attend_by_products

    def mixing(run: Any, *tensors: Any) -> Tensor:
        context: Tensor = real(run, *tensors)
        return context.mul(1 + 1e-6 * (run.count == 1 and run.length == 45))

    try:
        with mode(), torch.autocast("cpu", torch.bfloat16):
            first = packed._products_keep_bits(4, 16, 1)
            packed._products_keep_bits.cache_clear()
            assert packed._products_keep_bits(4, 16, 1) == first
        packed._products_keep_bits.cache_clear()
        monkeypatch.setattr(packed, "_attend_by_products", mixing)
        assert not packed._products_keep_bits(4, 16, 1)
    finally:
        packed._products_keep_bits.cache_clear()


@HEADS
@pytest.mark.parametrize("filled", [1, 16])
def test_gradients_of_attention_by_products(heads: tuple[int, int], filled: int) -> None:
    lengths = [40, 17, 17, 16, 3, 1]
    batch = PackedBatch([[1] * length for length in lengths], multiple_of=filled)
    total = len(batch.input_ids)
    tensors = [
        randn(total, *heads, seed=seed, dtype=torch.float32).requires_grad_() for seed in range(3)
    ]
    weight = randn(total, *heads, seed=3)
    context = batch.attend(*tensors)
    fast = torch.autograd.grad((context * weight.float()).sum(), tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    real = expected_context(lengths, *(tensor[: sum(lengths)] for tensor in exact))
    expected = torch.autograd.grad((real * weight[: sum(lengths)]).sum(), exact)
    for actual, wanted in zip(fast, expected, strict=True):
        assert wanted.abs().max() > 0.1
        close(actual.double(), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [4, 6, 8, 12, 16, 24, 32, 64])
def test_heads_of_any_size_keep_their_bits(head_size: int, threads: int) -> None:
    """Several of one length, from an odd place on.

    Plain heads of 8 did not with two threads: MKL adds up in another order where the memory of
    the second thread begins between two lines of the cache.
    """
    for length in range(2, 33):
        own = [randn(length, 4, head_size, seed=s, dtype=torch.float32) for s in range(3)]
        alone = batch_of([length]).attend(*own)
        tensors = [randn(3 + 3 * length + 16, 4, head_size, dtype=torch.float32) for _ in range(3)]
        for tensor, mine in zip(tensors, own, strict=True):
            tensor[3 : 3 + 3 * length] = mine.repeat(3, 1, 1)
        context = batch_of([3, *[length] * 3, 16]).attend(*tensors)
        for part in torch.split(context[3 : 3 + 3 * length], length):
            assert torch.equal(part, alone), length


def test_default_device_of_the_caller_does_not_matter() -> None:
    """Nor for those who come later: masks are kept."""
    packed._mask.cache_clear()
    tensors = [randn(7, 4, 16, seed=seed, dtype=torch.float32) for seed in range(3)]
    with torch.device("meta"):
        batch = batch_of([7])
        batch.attend(*tensors)
    assert batch.position_ids.device == batch._bounds.device == CPU
    assert batch_of([7]).attend(*tensors).isfinite().all()


def test_attend_leaves_its_arguments_alone() -> None:
    tensors = [randn(40, 4, 8, seed=seed) for seed in range(3)]
    before = [tensor.clone() for tensor in tensors]
    batch_of([17, 17, 6]).attend(*tensors)
    assert all(map(torch.equal, tensors, before))


# pool


class Largest(nn.Module):
    """A pooling with a parameter, which looks at the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.shapes: list[tuple[Any, Any]] = []

    def forward(self, token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        self.shapes.append((tuple(token_embeddings.shape), tuple(attention_mask.shape)))
        hidden = token_embeddings.masked_fill(attention_mask[..., None] == 0, -torch.inf)
        return hidden.amax(1) * self.scale


@pytest.mark.parametrize("kind", [MeanPooling, ClsPooling, Largest])
def test_pooling_equals_that_of_a_padded_batch(kind: Callable[[], nn.Module]) -> None:
    lengths = [5, 5, 2, 9, 9, 9, 1, 5]
    tokens, pooling = randn(sum(lengths), 32), kind()
    padded = nn.utils.rnn.pad_sequence(list(torch.split(tokens, lengths)), batch_first=True)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    expected = pooling(padded, mask)
    pooled = batch_of(lengths).pool(pooling, tokens)
    assert pooled.shape == (8, 32)
    close(pooled, expected, atol=1e-15)


def test_pooling_sees_a_batch_of_each_run() -> None:
    pooling = Largest()
    batch_of([5, 5, 2, 5]).pool(pooling, randn(17, 32))
    assert pooling.shapes == [((2, 5, 32), (2, 5)), ((1, 2, 32), (1, 2)), ((1, 5, 32), (1, 5))]


# the model

ALL_LENGTHS = shuffled(list(range(2, 25)) * 2)  # up to the tiny model's number of positions


def padded_features(encoder: SentenceEncoder, rows: list[list[int]]) -> dict[str, Tensor]:
    assert encoder.tokenizer is not None
    return encoder.tokenizer.pad(rows)


def test_packed_features_give_the_vectors_of_padded_ones(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.double()
    rows = random_rows(ALL_LENGTHS)
    with torch.no_grad():
        packed = tiny_encoder(PackedBatch(rows))
        padded = tiny_encoder(padded_features(tiny_encoder, rows))
    close(packed["sentence_embedding"], padded["sentence_embedding"], atol=1e-14)
    real = padded["attention_mask"].bool()
    # Elements up to 3, two layers.
    close(packed["token_embeddings"], padded["token_embeddings"][real], atol=2e-14)


@pytest.mark.parametrize("kind", [ClsPooling, Largest])
def test_other_poolings_in_the_model(
    tiny_encoder: SentenceEncoder, kind: Callable[[], nn.Module]
) -> None:
    tiny_encoder.pooling = kind()
    tiny_encoder.double()
    rows = random_rows(ALL_LENGTHS)
    with torch.no_grad():
        packed = tiny_encoder(PackedBatch(rows))["sentence_embedding"]
        padded = tiny_encoder(padded_features(tiny_encoder, rows))["sentence_embedding"]
    close(packed, padded, atol=1e-14)


def test_packed_features_of_the_published_model(
    encoder: SentenceEncoder, encoder64: SentenceEncoder
) -> None:
    rows = random_rows([9, 2, 17, 16, 17, 40, 3, 33, 21, 100], vocab_size=30522)
    with torch.no_grad():
        packed, packed64 = (
            model(PackedBatch(rows))["sentence_embedding"] for model in (encoder, encoder64)
        )
        padded64 = encoder64(padded_features(encoder64, rows))["sentence_embedding"]
    close(packed64, padded64, atol=1e-14)
    close(packed.double(), padded64, atol=1e-6)


def gradients(encoder: SentenceEncoder, features: Any) -> dict[str, Tensor]:
    embeddings = encoder(features)["sentence_embedding"]
    loss = (embeddings * randn(*embeddings.shape, seed=5, dtype=embeddings.dtype)).sum()
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_gradients_of_packed_features_equal_those_of_padded_ones(
    tiny_encoder: SentenceEncoder,
) -> None:
    tiny_encoder.double()
    rows = random_rows(ALL_LENGTHS)
    packed = gradients(tiny_encoder, PackedBatch(rows))
    padded = gradients(tiny_encoder, padded_features(tiny_encoder, rows))
    for name, expected in padded.items():
        assert name.endswith("key.bias") or expected.abs().max() > 1e-3, name
        close(packed[name], expected, atol=1e-12)


def test_gradients_of_packed_features_of_the_published_model(encoder: SentenceEncoder) -> None:
    rows = random_rows([5, 9, 9, 17, 3, 30], vocab_size=30522)
    packed = gradients(encoder, PackedBatch(rows))
    padded = gradients(encoder, padded_features(encoder, rows))
    for name, expected in padded.items():
        if not name.endswith("key.bias"):  # 0 but for rounding: softmax ignores it
            error = (packed[name] - expected).norm() / expected.norm()
            assert error < 1e-4, name


def test_ids_go_to_the_device_packed_or_on_mps_padded(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny_encoder.tokenizer is not None
    rows = [[2, 5, 3], [2, 3]]
    packed = make_batch(rows, None, tiny_encoder.device, tiny_encoder.tokenizer)
    assert packed.input_ids.tolist() == [2, 5, 3, 2, 3, *[0] * 11]  # up to 16 rows
    mps = torch.device("mps")
    monkeypatch.setattr(SentenceEncoder, "device", mps)
    padded = tiny_encoder.tokenizer.pad(rows)
    monkeypatch.setattr(
        tiny_encoder.tokenizer, "pad", lambda *given: padded if given == (rows, mps, None) else {}
    )
    batch = make_batch(rows, None, tiny_encoder.device, tiny_encoder.tokenizer)
    assert batch.input_ids is padded["input_ids"]
    assert batch.attention_mask is padded["attention_mask"]
    assert batch.attend is None


# plan_batches


@pytest.mark.parametrize(
    ("lengths", "budget", "size", "expected"),
    [
        ([2, 5, 3, 2], 7, None, [[1], [2, 0, 3]]),
        ([2, 5, 3, 2], 100, None, [[1, 2, 0, 3]]),
        ([2, 5, 3, 2], 100, 3, [[1, 2, 0], [3]]),
        ([2, 5, 3, 2], 8, 1, [[1], [2], [0], [3]]),
        ([2, 5, 3, 2], 4, None, [[1], [2], [0, 3]]),  # one that is too long, alone
        ([4, 4, 4], 8, None, [[0, 1], [2]]),
        ([3], 1, 1, [[0]]),
        ([], 8, None, []),
    ],
)
def test_batches_by_hand(
    lengths: list[int], budget: int, size: int | None, expected: list[list[int]]
) -> None:
    assert plan_batches(lengths, budget, size) == expected


@properties
@given(
    st.lists(st.integers(2, 256), max_size=80),
    st.integers(1, 600),
    st.one_of(st.none(), st.integers(1, 20)),
)
def test_batches_are_within_their_limits(lengths: list[int], budget: int, size: int | None) -> None:
    batches = plan_batches(lengths, budget, size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))  # each once
    in_order = [lengths[row] for row in rows]
    assert in_order == sorted(lengths, reverse=True)  # equal ones adjacent, the longest first
    for batch in batches:
        assert batch
        assert len(batch) == 1 or sum(lengths[row] for row in batch) <= budget
        assert size is None or len(batch) <= size
    for batch, following in pairwise(batches):  # none is closed too early
        total = sum(lengths[row] for row in batch) + lengths[following[0]]
        assert total > budget or len(batch) == size
    for first, second in pairwise(rows):
        assert lengths[first] > lengths[second] or first < second  # equal ones in their order


# token_budget, batch_size


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_default_limits_have_room_for_the_longest_text(device: str, dtype: torch.dtype) -> None:
    assert default_budget(torch.device(device), dtype) >= 512


@pytest.mark.parametrize("argument", ["batch_size", "token_budget"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, InputError), (-1, InputError), (1.0, InputTypeError), ("8", InputTypeError),
     (True, InputTypeError)],
)  # fmt: skip
def test_bad_limit_is_named(
    tiny_encoder: SentenceEncoder, argument: str, value: Any, error: type[InputError]
) -> None:
    with pytest.raises(error, match=f"{argument} is {value!r}; pass a positive") as caught:
        tiny_encoder.encode(["a"], **{argument: value})
    assert type(caught.value) is error
    assert caught.value.argument == argument
    with pytest.raises(error, match=f"{argument} is"):
        tiny_encoder.encode([], **{argument: value})


@pytest.mark.parametrize(
    ("lengths", "total"),
    [
        ([512], 512), ([511, 2], 576), ([256, 256, 64], 576), ([300, 300], 640), ([509], 512),
        ([7, 5], 16), ([2], 16), ([16], 16), ([17], 32), ([9, 8], 32), ([33], 48),
    ],
)  # fmt: skip
def test_batches_have_a_multiple_of_16_or_64_rows(
    tiny_encoder: SentenceEncoder, lengths: list[int], total: int
) -> None:
    batch = make_batch(random_rows(lengths), None, tiny_encoder.device, tiny_encoder.tokenizer)
    assert len(batch.input_ids) == total
    assert int(batch.attention_mask.sum()) == sum(lengths)


@pytest.mark.parametrize(
    ("tokens", "total"), [(2, 4), (5, 8), (61, 64), (64, 64), (65, 80), (512, 512), (513, 576)]
)
def test_short_batches_have_the_multiple_that_is_given(
    tiny_encoder: SentenceEncoder, tokens: int, total: int
) -> None:
    batch = make_batch([[1] * tokens], None, CPU, tiny_encoder.tokenizer, 4)
    assert len(batch.input_ids) == total


# keeps_bits


def vectors(rows: list[list[int]]) -> Tensor:
    """Of the ids alone, exactly."""
    return torch.tensor([[float(sum(row)), float(len(row))] for row in rows], dtype=torch.float64)


def test_rows_that_keep_their_bits() -> None:
    assert keeps_bits(vectors, 100, 256)


def by_number_of_rows(rows: list[list[int]]) -> Tensor:
    return vectors(rows) * (1 + 1e-15 * (len(rows) == 1))


def by_tokens_before(rows: list[list[int]]) -> Tensor:
    before = torch.tensor([sum(map(len, rows[:i])) for i in range(len(rows))])
    return vectors(rows) + 1e-9 * before[:, None]


def by_longest(rows: list[list[int]]) -> Tensor:
    return vectors(rows) * (1 + 1e-15 * (max(map(len, rows)) > 100))


def by_order(rows: list[list[int]]) -> Tensor:
    """Where the longest comes first, and there are many."""
    return vectors(rows) * (1 + 1e-15 * (len(rows) > 5 and len(rows[0]) > len(rows[-1])))


def by_neighbour_from_an_odd_place(rows: list[list[int]]) -> Tensor:
    """As the memory of two threads does it: between two of its own length, after odd tokens."""
    places = [sum(map(len, rows[:i])) for i in range(len(rows))]
    longer = [
        i > 0 and len(rows[i]) == len(rows[i - 1]) == 7 and places[i] % 2 == 0
        for i in range(len(rows))
    ]
    return vectors(rows) * (1 + 1e-15 * torch.tensor(longer, dtype=torch.float64))[:, None]


def by_length_of_23(rows: list[list[int]]) -> Tensor:
    return vectors(rows) * (1 + 1e-15 * (len(rows) == 1 and len(rows[0]) == 23))


def nan(rows: list[list[int]]) -> Tensor:
    return vectors(rows) * torch.nan


@pytest.mark.parametrize(
    "embed",
    [
        by_number_of_rows,
        by_tokens_before,
        by_longest,
        by_order,
        by_neighbour_from_an_odd_place,
        by_length_of_23,
        nan,
    ],
)
def test_rows_that_do_not_keep_their_bits(embed: Callable[[list[list[int]]], Tensor]) -> None:
    assert not keeps_bits(embed, 100, 256)


@pytest.mark.parametrize("limit", [3, 12, 256, 512])
def test_bits_are_tried_within_the_limits_of_the_model(limit: int) -> None:
    seen: list[list[int]] = []

    def embed(rows: list[list[int]]) -> Tensor:
        seen.extend(rows)
        return vectors(rows)

    before = torch.get_rng_state()
    keeps_bits(embed, 7, limit)
    assert torch.equal(torch.get_rng_state(), before)
    assert max(map(len, seen)) == limit
    assert min(map(len, seen)) == 2
    assert {i for row in seen for i in row} <= set(range(7))


# encode: limits change nothing

TEXTS = [
    "the dog bites the man", "", "a cat", "the sun is out .", "man sees dog", "a",
    "dog " * 10, "the the cat sees a man .", "a cat runs",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_limits_do_not_change_a_bit(tiny_encoder: SentenceEncoder, dtype: torch.dtype) -> None:
    tiny_encoder.to(dtype)
    if not tiny_encoder.deterministic:
        pytest.skip("the products of this platform mix rows")
    texts = TEXTS * 7
    expected = torch.stack([tiny_encoder.encode(text, convert_to_tensor=True) for text in texts])
    every: list[dict[str, Any]] = [
        {},
        {"batch_size": 1},
        {"batch_size": 5},
        {"token_budget": 1},
        {"token_budget": 50},
        {"token_budget": 50, "batch_size": 3},
        {"token_budget": 10**6},
    ]
    for limits in every:
        together = tiny_encoder.encode(texts, convert_to_tensor=True, **limits)
        assert torch.equal(together, expected), limits
        backwards = tiny_encoder.encode(texts[::-1], convert_to_tensor=True, **limits)
        assert torch.equal(backwards.flip(0), expected), limits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden_size", "heads"), [(384, 12), (768, 12), (32, 4)], ids=["heads of 32", "of 64", "of 8"]
)
def test_shapes_of_real_models_keep_their_bits(hidden_size: int, heads: int, threads: int) -> None:
    config = BertConfig(
        vocab_size=100,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=24,
    )
    encoder = SentenceEncoder(modules=[seeded_bert(config), MeanPooling(), Normalize()])
    assert encoder.deterministic


def test_limits_are_those_of_the_passes(tiny_encoder: SentenceEncoder) -> None:
    seen: list[int] = []
    tiny_encoder.bert.register_forward_pre_hook(lambda _, args: seen.append(int(args[1].sum())))
    tiny_encoder.encode(TEXTS)
    assert len(seen) == 1
    total = seen.pop()
    tiny_encoder.encode(TEXTS, token_budget=20)
    assert sum(seen) == total
    assert max(seen) <= 20
    assert len(seen) > 2
    seen.clear()
    tiny_encoder.encode(TEXTS, batch_size=1)
    assert len(seen) == len(TEXTS)

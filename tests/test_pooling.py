import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilm import ClsPooling, MeanPooling, Normalize

properties = settings(deadline=None, derandomize=True)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

batches = st.tuples(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31)
)  # batch, tokens, width, seed


def random_batch(batch: int, tokens: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token vectors in float64, and a mask with at least one real token in each row."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    return vectors, (torch.arange(tokens) < lengths).long()


def test_masked_mean_by_hand() -> None:
    vectors = torch.tensor([
        [[1.0, 10.0], [3.0, 20.0], [5.0, 60.0]],
        [[1.0, 10.0], [3.0, 20.0], [500.0, 600.0]],  # the last one is padding
    ])  # fmt: skip
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert MeanPooling()(vectors, mask).tolist() == [[3.0, 30.0], [2.0, 15.0]]


def test_padding_may_stand_anywhere() -> None:
    vectors = torch.tensor([[[1.0], [50.0], [3.0]]])
    assert MeanPooling()(vectors, torch.tensor([[1, 0, 1]])).tolist() == [[2.0]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_mask_of_any_dtype(dtype: torch.dtype) -> None:
    vectors = torch.tensor([[[1.0], [3.0], [50.0]]], dtype=torch.float64)
    pooled = MeanPooling()(vectors, torch.tensor([[1, 1, 0]]).to(dtype))
    assert pooled.tolist() == [[2.0]]
    assert pooled.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_without_a_real_token_is_zero(dtype: torch.dtype) -> None:
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]] * 2, dtype=dtype)
    pooled = MeanPooling()(vectors, torch.tensor([[0, 0], [1, 1]]))
    assert pooled.tolist() == [[0.0, 0.0], [2.0, 3.0]]
    assert pooled.dtype == dtype


def test_cls_is_the_first_token() -> None:
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert ClsPooling()(vectors, mask).tolist() == [[1.0, 2.0], [5.0, 6.0]]


def test_normalize_by_hand() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=torch.float64)
    assert Normalize()(vectors).tolist() == [[3 / 5, 4 / 5], [0.0, -1.0]]
    assert Normalize()(vectors[0]).tolist() == [3 / 5, 4 / 5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized_zero_vector_stays_zero(dtype: torch.dtype) -> None:
    vectors = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=dtype)
    normalized = Normalize()(vectors)
    assert normalized.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert normalized.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_row_without_a_real_token_is_finite(dtype: torch.dtype) -> None:
    vectors = torch.ones(2, 3, 4, dtype=dtype, requires_grad=True)
    Normalize()(MeanPooling()(vectors, torch.tensor([[0, 0, 0], [1, 1, 0]]))).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


def test_none_has_weights() -> None:
    for module in (MeanPooling(), ClsPooling(), Normalize()):
        assert not module.state_dict()


@properties
@given(batches, st.floats(-1e9, 1e9), st.integers(0, 4))
def test_padding_never_matters(
    sizes: tuple[int, int, int, int], garbage: float, extra: int
) -> None:
    vectors, mask = random_batch(*sizes)
    filled = vectors.masked_fill(mask[..., None] == 0, garbage)
    filled = torch.nn.functional.pad(filled, (0, 0, 0, extra), value=garbage)
    wider = torch.nn.functional.pad(mask, (0, extra))
    # At most 6 summands below 10, which torch may add in another order: a few roundings of 4e-16.
    torch.testing.assert_close(
        MeanPooling()(filled, wider), MeanPooling()(vectors, mask), rtol=0, atol=4e-15
    )


@properties
@given(batches)
def test_mean_equals_that_of_the_real_tokens_alone(sizes: tuple[int, int, int, int]) -> None:
    vectors, mask = random_batch(*sizes)
    alone = [rows[kept == 1].mean(dim=0) for rows, kept in zip(vectors, mask, strict=True)]
    torch.testing.assert_close(MeanPooling()(vectors, mask), torch.stack(alone), rtol=0, atol=4e-15)


@properties
@given(batches)
def test_mean_lies_between_smallest_and_largest(sizes: tuple[int, int, int, int]) -> None:
    vectors, mask = random_batch(*sizes)
    pooled = MeanPooling()(vectors, mask)
    padding = mask[..., None] == 0
    slack = 4e-15  # a mean of equal numbers may be one rounding off
    assert (pooled >= vectors.masked_fill(padding, torch.inf).amin(dim=1) - slack).all()
    assert (pooled <= vectors.masked_fill(padding, -torch.inf).amax(dim=1) + slack).all()


@properties
@given(batches)
def test_order_of_tokens_does_not_matter(sizes: tuple[int, int, int, int]) -> None:
    vectors, mask = random_batch(*sizes)
    torch.testing.assert_close(
        MeanPooling()(vectors.flip(1), mask.flip(1)),
        MeanPooling()(vectors, mask),
        rtol=0,
        atol=4e-15,
    )


@properties
@given(batches, st.floats(1e-6, 1e6))
def test_normalize_ignores_scale_and_gives_length_one(
    sizes: tuple[int, int, int, int], scale: float
) -> None:
    vectors, _ = random_batch(*sizes)
    normalized = Normalize()(vectors)
    # Three roundings on numbers of at most 1.
    torch.testing.assert_close(Normalize()(vectors * scale), normalized, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        normalized.norm(dim=-1), torch.ones(vectors.shape[:-1]).double(), rtol=0, atol=1e-15
    )

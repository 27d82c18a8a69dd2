import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import minilm
from minilm import similarity
from minilm.errors import InputError, InputTypeError
from minilm.similarity import (
    SIMILARITY_FUNCTIONS,
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
    pairwise_cos_sim,
    pairwise_dot_score,
    pairwise_euclidean_sim,
    pairwise_manhattan_sim,
)

Function = Callable[[Any, Any], Tensor]

ALL_PAIRS = [cos_sim, dot_score, euclidean_sim, manhattan_sim]
PAIRWISE = [
    pairwise_cos_sim,
    pairwise_dot_score,
    pairwise_euclidean_sim,
    pairwise_manhattan_sim,
]

A = [[3.0, 4.0], [0.0, 2.0]]
B = [[4.0, 3.0], [-5.0, 12.0], [0.0, 2.0]]

BY_HAND: dict[Function, list[list[float]]] = {
    cos_sim: [[24 / 25, 33 / 65, 4 / 5], [3 / 5, 12 / 13, 1.0]],
    dot_score: [[24.0, 33.0, 8.0], [6.0, 24.0, 4.0]],
    euclidean_sim: [
        [-math.sqrt(2), -math.sqrt(128), -math.sqrt(13)],
        [-math.sqrt(17), -math.sqrt(125), 0.0],
    ],
    manhattan_sim: [[-2.0, -16.0, -5.0], [-5.0, -15.0, 0.0]],
}


def float64(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# by hand


@pytest.mark.parametrize("function", ALL_PAIRS)
def test_all_pairs_by_hand(function: Function) -> None:
    # Two roundings on numbers of about 10.
    close(function(float64(A), float64(B)), float64(BY_HAND[function]), atol=4e-15)


@pytest.mark.parametrize(("function", "pairwise"), list(zip(ALL_PAIRS, PAIRWISE, strict=True)))
def test_pairwise_by_hand(function: Function, pairwise: Function) -> None:
    by_hand = float64(BY_HAND[function])
    close(pairwise(float64(A), float64(B[:2])), by_hand.diagonal(), atol=4e-15)


def test_table_of_names() -> None:
    assert list(SIMILARITY_FUNCTIONS) == ["cosine", "dot", "euclidean", "manhattan"]
    assert list(SIMILARITY_FUNCTIONS.values()) == list(zip(ALL_PAIRS, PAIRWISE, strict=True))
    assert minilm.cos_sim is similarity.cos_sim


@pytest.mark.parametrize("function", [euclidean_sim, manhattan_sim])
def test_distances_are_negated_so_that_larger_is_more_alike(function: Function) -> None:
    near, far = function([0.0, 0.0], [[1.0, 1.0], [5.0, 5.0]])[0].tolist()
    assert far < near < 0
    assert function([1.0, 2.0], [1.0, 2.0]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zero_vector_is_like_nothing(dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=dtype)
    assert cos_sim(rows, rows)[0].tolist() == [0.0, 0.0]
    assert pairwise_cos_sim(rows, rows)[0].item() == 0.0


# dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", ALL_PAIRS + PAIRWISE)
def test_floating_dtypes_are_kept(function: Function, dtype: torch.dtype) -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=dtype)
    result = function(rows, rows)
    assert result.dtype == dtype
    in_float64 = function(rows.double(), rows.double())
    # Numbers up to 25, and in half precision 8 bits or more of each.
    close(result.double(), in_float64, atol=25 * torch.finfo(dtype).eps)


def test_float64_is_not_rounded_to_float32() -> None:
    third = np.array([1 / 3, 1e-9])
    assert dot_score(third, [[1.0, 0.0]]).item() == 1 / 3


@pytest.mark.parametrize("function", ALL_PAIRS + PAIRWISE)
def test_wider_of_two_dtypes_is_taken(function: Function) -> None:
    rows = torch.tensor(A)
    assert function(rows, rows.double()).dtype == torch.float64
    assert function(rows.double(), rows).dtype == torch.float64
    assert function(rows.half(), rows).dtype == torch.float32


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.bool_])
def test_integers_become_float32(dtype: type[np.generic]) -> None:
    scores = dot_score(np.array([[1, 0], [1, 1]], dtype=dtype), torch.tensor([[1, 1]]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[1.0], [2.0]]


def test_integers_do_not_overflow() -> None:
    assert dot_score(np.array([100, 100], np.int8), np.array([100, 100], np.int8)).item() == 20000


# containers


def forms(rows: list[list[float]]) -> dict[str, Any]:
    """The same float32 rows in every form that is accepted."""
    array = np.array(rows, dtype=np.float32)
    locked = array.copy()
    locked.setflags(write=False)
    return {
        "tensor": torch.tensor(rows),
        "array": array,
        "list of arrays": list(array),
        "tuple of arrays": tuple(array),
        "list of tensors": list(torch.tensor(rows)),
        "tuple of tensors": tuple(torch.tensor(rows)),
        "read-only array": locked,
        "reversed view": array[::-1].copy()[::-1],
        "column-major array": np.asfortranarray(array),
        "strided view": np.repeat(array, 2, axis=1)[:, ::2],
        "other byte order": array.astype(array.dtype.newbyteorder()),
        "data frame": pd.DataFrame(array),
    }


@pytest.mark.parametrize("form", forms(A))
def test_forms(form: str) -> None:
    given_a, given_b = forms(A)[form], forms(B)[form]
    expected = dot_score(torch.tensor(A), torch.tensor(B))
    assert torch.equal(dot_score(given_a, given_b), expected)
    assert torch.equal(dot_score(given_a, torch.tensor(B)), expected)


def test_lists_of_numbers() -> None:
    assert dot_score(A, B).tolist() == BY_HAND[dot_score]
    assert dot_score(tuple(map(tuple, A)), B).tolist() == BY_HAND[dot_score]
    assert dot_score([[3, 4]], [[4, 3]]).tolist() == [[24.0]]


@pytest.mark.parametrize("vector", [[3.0, 4.0], np.array([3.0, 4.0]), torch.tensor([3.0, 4.0])])
@pytest.mark.parametrize(("function", "pairwise"), list(zip(ALL_PAIRS, PAIRWISE, strict=True)))
def test_one_vector_counts_as_one_row(function: Function, pairwise: Function, vector: Any) -> None:
    row = torch.as_tensor(vector)[None]
    assert torch.equal(function(vector, B), function(row, B))
    assert torch.equal(pairwise(vector, [[4.0, 3.0]]), pairwise(row, [[4.0, 3.0]]))


@pytest.mark.parametrize("function", ALL_PAIRS)
def test_no_rows(function: Function) -> None:
    assert function(np.empty((0, 2)), B).shape == (0, 3)
    assert function(B, torch.empty(0, 2)).shape == (3, 0)


@pytest.mark.parametrize("function", PAIRWISE)
def test_pairwise_of_no_rows(function: Function) -> None:
    assert function(np.empty((0, 2)), np.empty((0, 2))).shape == (0,)


def test_arguments_are_not_changed() -> None:
    a, b = np.array(A), torch.tensor(B)
    for function in ALL_PAIRS:
        function(a, b)
    assert a.tolist() == A
    assert b.tolist() == B


def test_gradient_flows() -> None:
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    for function in ALL_PAIRS:
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, float64(B[:2])), (a,))


# errors


@pytest.mark.parametrize("function", ALL_PAIRS + PAIRWISE)
def test_widths_must_agree(function: Function) -> None:
    with pytest.raises(InputError, match="b has vectors of width 3, a of width 2") as caught:
        function(A, [[1.0, 2.0, 3.0]] * 2)
    assert caught.value.argument == "b"
    assert not isinstance(caught.value, TypeError)


@pytest.mark.parametrize("function", PAIRWISE)
def test_pairwise_row_counts_must_agree(function: Function) -> None:
    with pytest.raises(InputError, match="b has 3 rows, a has 2; pass as many") as caught:
        function(A, B)
    assert caught.value.argument == "b"


@pytest.mark.parametrize("function", ALL_PAIRS + PAIRWISE)
def test_three_dimensions_are_refused(function: Function) -> None:
    for bad in (torch.zeros(2, 1, 2), np.zeros((2, 1, 2)), [A]):
        with pytest.raises(InputError, match=r"a has shape \[\d, \d, 2\]") as caught:
            function(bad, B)
        assert caught.value.argument == "a"
        with pytest.raises(InputError, match="b has shape") as caught:
            function(A, bad)
        assert caught.value.argument == "b"


@pytest.mark.parametrize(
    "bad",
    [
        None,
        3.0,
        "text",
        ["text", "more"],
        [None, None],
        [1.0, None],
        {"a": [1.0]},
        {1.0, 2.0},
        (row for row in A),
        [[1.0, 2.0], [3.0]],
        [torch.zeros(2), torch.zeros(3)],
        [torch.zeros(2), [1.0, 2.0]],
        np.array(["a"]),
        np.array([1 + 2j, 1]),
        torch.tensor([1 + 2j, 1]),
    ],
    ids=lambda bad: f"{type(bad).__name__}-{bad}"[:30],
)
def test_what_is_no_embedding_is_refused(bad: Any) -> None:
    for argument, arguments in (("a", (bad, A)), ("b", (A, bad))):
        with pytest.raises(InputTypeError) as caught:
            cos_sim(*arguments)
        assert caught.value.argument == argument
        assert str(caught.value).startswith(f"{argument} is {type(bad).__name__}; pass a tensor")
        assert isinstance(caught.value, TypeError)
        assert isinstance(caught.value, ValueError)


def test_a_scalar_is_refused() -> None:
    for bad in (np.array(1.0), torch.tensor(1.0)):
        with pytest.raises(InputError, match=r"^b ") as caught:
            cos_sim(A, bad)
        assert caught.value.argument == "b"


# properties

properties = settings(deadline=None, derandomize=True)


def random_rows(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return a, b


# 26 rows and more: there torch.cdist would go over to a matrix product, unless told not to.
@pytest.mark.parametrize(("function", "pairwise"), list(zip(ALL_PAIRS, PAIRWISE, strict=True)))
@properties
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**31))
def test_pairwise_is_the_diagonal(
    function: Function, pairwise: Function, rows: int, width: int, seed: int
) -> None:
    a, b = random_rows(rows, width, seed)
    # Sums of at most 8 terms of at most 25.
    close(pairwise(a, b), function(a, b).diagonal(), atol=1e-13)


@properties
@given(st.integers(1, 5), st.integers(1, 8), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_cosine_ignores_length_and_stays_in_range(
    rows: int, width: int, scale: float, seed: int
) -> None:
    a, b = random_rows(rows, width, seed)
    cosines = cos_sim(a, b)
    close(cos_sim(a * scale, b / scale), cosines, atol=2e-15)  # a few roundings below 1
    assert cosines.abs().max() <= 1 + 1e-15
    close(cos_sim(a, a).diagonal(), torch.ones(rows).double(), atol=1e-15)


@pytest.mark.parametrize("function", ALL_PAIRS)
@properties
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
def test_symmetric(function: Function, rows: int, width: int, seed: int) -> None:
    a, b = random_rows(rows, width, seed)
    close(function(a, b), function(b, a).T, atol=1e-13)


@pytest.mark.parametrize("function", [euclidean_sim, manhattan_sim])
@pytest.mark.parametrize("rows", [2, 40])
def test_distance_of_a_vector_to_itself_is_zero(function: Function, rows: int) -> None:
    a = torch.nn.functional.normalize(random_rows(rows, 384, 0)[0].float(), dim=-1)
    assert (function(a, a).diagonal() == 0).all()


def test_no_rows_against_some() -> None:
    rows = np.ones((3, 4), dtype=np.float32)
    assert cos_sim([], rows).shape == (0, 3)
    assert cos_sim(rows, []).shape == (3, 0)
    assert cos_sim([], []).shape == (0, 0)


def test_an_object_array_of_vectors() -> None:
    column = np.empty(2, dtype=object)
    column[:] = [np.array([1.0, 0.0]), np.array([0.0, 2.0])]
    assert torch.equal(cos_sim(column, column), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("pairwise", [functions[1] for functions in SIMILARITY_FUNCTIONS.values()])
def test_two_single_vectors_have_one_similarity(pairwise: Any) -> None:
    a, b = [1.0, 2.0, 2.0], [2.0, 0.0, 1.0]
    expected = pairwise([a], [b])[0]
    for kind in (list, np.array, torch.tensor):
        result = pairwise(kind(a), kind(b))
        assert result.shape == ()
        assert float(result) == pytest.approx(float(expected))
    assert pairwise([a], b).shape == (1,)
    assert pairwise([a], [b]).shape == (1,)


def test_python_numbers_are_read_as_torch_reads_them() -> None:
    assert cos_sim([[1.0, 2.0]], [[1, 2]]).dtype == torch.float32
    assert cos_sim([np.array([1.0, 2.0])], np.array([[1.0, 2.0]])).dtype == torch.float64


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(InputTypeError, match="a is Tensor; pass a tensor, an array"):
        cos_sim(torch.eye(2).to_sparse(), torch.eye(2))


# Numbers whose squares are beyond the dtype.


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 200.0),
        (torch.float16, 30_000.0),
        (torch.bfloat16, 1e20),
        (torch.float32, 1e19),
        (torch.float32, 1e20),
        (torch.float32, 8e37),
    ],
)
@pytest.mark.parametrize("names", list(SIMILARITY_FUNCTIONS))
def test_long_vectors_have_the_scores_that_float64_gives(
    dtype: torch.dtype, size: float, names: str
) -> None:
    """And infinity only where the score itself is beyond the dtype; NaN nowhere."""
    of_all, by_rows = SIMILARITY_FUNCTIONS[names]
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(4, 8, generator=generator) * 2 - 1).mul(size).to(dtype)
    b = (torch.rand(4, 8, generator=generator) * 2 - 1).mul(size).to(dtype)
    b[1] /= size  # one of a usual length
    for score in (of_all, by_rows):
        expected = score(a.double(), b.double())
        assert expected.isfinite().all()
        found = score(a, b)
        assert found.dtype == dtype
        assert found.isinf().equal(expected.to(dtype).isinf())
        near = found.isfinite()
        scale = expected[near].abs().max() if near.any() else 1.0
        # Half a step of rounding, and for the cosine what eight products lose.
        atol = float(scale) * 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            found[near].double(), expected[near], rtol=torch.finfo(dtype).eps, atol=atol
        )


def test_long_vectors_are_made_of_length_1() -> None:
    from minilm.util import normalize_embeddings

    vectors = torch.tensor([[3e30, 4e30], [3.0, 4.0], [0.0, 0.0], [3e38, 0.0]])
    expected = [[0.6, 0.8], [0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]
    torch.testing.assert_close(normalize_embeddings(vectors), torch.tensor(expected))
    half = torch.full((1, 384), 5000.0, dtype=torch.float16)  # of length 97,980
    assert float(cos_sim(half, half)) == pytest.approx(1, abs=2e-3)

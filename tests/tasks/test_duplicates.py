import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minilm.errors import InputError, InputTypeError
from minilm.similarity import cos_sim
from minilm.tasks import Duplicate, deduplicate, near_duplicates
from minilm.tasks.search import Scores

Array = np.ndarray[Any, Any]


def on_circle(*degrees: float) -> Array:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def brute_force(vectors: Tensor, threshold: float) -> list[Duplicate]:
    """The definition, from the exact scores of all pairs."""
    count = len(vectors)
    i, j = torch.cartesian_prod(torch.arange(count), torch.arange(count)).T
    exact = Scores(vectors, vectors, cos_sim, ("a", "b")).exact(i, j).reshape(count, count)
    near = (exact.float() >= float(np.float32(threshold))).tolist()
    kept: list[int] = []
    found = []
    for row in range(count):
        leader = next((other for other in kept if near[row][other]), None)
        if leader is None:
            kept.append(row)
        else:
            found.append(Duplicate(row, leader, exact[row, leader].item()))
    return found


def test_by_hand() -> None:
    # Within 31 degrees. 60 is near to 40, but that has gone, and 60 is not near to 10.
    vectors = on_circle(10, 40, 60, 200, 0, 230.5, 85)
    found = near_duplicates(vectors, math.cos(math.radians(31)))
    assert [(each.row, each.of) for each in found] == [(1, 0), (4, 0), (5, 3), (6, 2)]
    expected = [math.cos(math.radians(angle)) for angle in (30, 10, 30.5, 25)]
    assert [each.score for each in found] == pytest.approx(expected, abs=1e-15)
    assert deduplicate(vectors, math.cos(math.radians(31))) == [0, 2, 3]
    assert all(type(each.row) is type(each.of) is int for each in found)
    assert all(type(each.score) is float for each in found)


def test_of_several_that_stay_the_first_is_named() -> None:
    # 20 is nearer to 39, which comes second.
    assert near_duplicates(on_circle(0, 39, 20), math.cos(math.radians(30)))[0][:2] == (2, 0)


def test_the_order_decides_who_stays() -> None:
    threshold = math.cos(math.radians(31))
    assert deduplicate(on_circle(0, 30, 60), threshold) == [0, 2]
    assert deduplicate(on_circle(30, 0, 60), threshold) == [0]


@pytest.mark.parametrize("vectors", [[], np.array([]), torch.empty(0, 4)])
def test_of_nothing(vectors: Any) -> None:
    assert near_duplicates(vectors) == []
    assert deduplicate(vectors) == []


def test_one_stays() -> None:
    assert near_duplicates([1.0, 2.0]) == []
    assert deduplicate([1.0, 2.0]) == [0]


@pytest.mark.parametrize("value", [1.0, 0.1, 1e-3, -7.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_rows_are_found_at_threshold_one(value: float, dtype: torch.dtype) -> None:
    vectors = torch.full((200, 16), value, dtype=dtype)
    assert deduplicate(vectors, 1.0) == [0]
    assert deduplicate(vectors, 1.0000001) == list(range(200))


def test_the_same_direction_has_cosine_one() -> None:
    vectors = random(13, 1, 384) * np.arange(1, 41, dtype=np.float32)[:, None]
    assert deduplicate(vectors, 1.0) == [0]


def test_a_score_equal_to_the_threshold_counts() -> None:
    vectors = np.array([[1.0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]])
    first = near_duplicates(vectors, 0.5)[0]
    assert (first.row, first.of) == (1, 0)
    assert first.score == pytest.approx(0.5, abs=1e-15)
    assert deduplicate(vectors, 0.5) == [0]
    assert deduplicate(vectors, 0.5000001) == [0, 1]


def test_a_zero_vector_is_like_nothing_even_itself() -> None:
    assert deduplicate(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])) == [0, 1, 2]


def test_a_threshold_that_all_reach() -> None:
    vectors = random(1, 50, 4)
    assert deduplicate(vectors, -1.0) == [0]
    assert [each.of for each in near_duplicates(vectors, -1.0)] == [0] * 49


def clustered(seed: int, rows: int, width: int) -> Tensor:
    """Some rows equal, some near to each other, in no order."""
    generator = np.random.default_rng(seed)
    vectors = random(seed, rows // 4, width)[generator.integers(0, rows // 4, rows)]
    noise = 0.2 * random(seed + 1, rows, width) * generator.integers(0, 2, (rows, 1))
    return torch.from_numpy(vectors + noise.astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_definition_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch, seed: int, dtype: torch.dtype
) -> None:
    vectors = clustered(seed, 60, 4).to(dtype)
    for threshold in (0.999, 0.9, 0.5, 0.0):
        expected = brute_force(vectors, threshold)
        assert 0 < len(expected) < 59
        for block, batch in [(2**22, 1024), (2**22, 1), (2**22, 13), (100, 1024), (7, 5), (1, 1)]:
            monkeypatch.setattr("minilm.tasks.duplicates._BLOCK", block)
            assert near_duplicates(vectors, threshold, batch) == expected


@given(
    st.lists(st.tuples(*[st.integers(-2, 2)] * 2), max_size=12),
    st.sampled_from([1.0, 0.8, 0.6, 0.5, 0.0, -0.5]),
    st.integers(1, 13),
)
def test_the_definition_where_all_are_ties(
    rows: list[tuple[int, int]], threshold: float, batch: int
) -> None:
    vectors = torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)
    expected = brute_force(vectors, threshold) if rows else []
    assert near_duplicates(vectors, threshold, batch) == expected
    gone = {each.row for each in expected}
    assert deduplicate(vectors, threshold, batch) == [
        row for row in range(len(rows)) if row not in gone
    ]


def test_no_square_is_held(block_sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = random(14, 300, 3)
    whole = near_duplicates(vectors)
    monkeypatch.setattr("minilm.tasks.duplicates._BLOCK", 500)
    block_sizes.clear()
    assert near_duplicates(vectors) == whole
    assert 0 < max(block_sizes) <= 500


def test_arguments_are_not_changed() -> None:
    vectors = random(0, 30, 4)
    before = vectors.copy()
    deduplicate(vectors)
    np.testing.assert_array_equal(vectors, before)


@pytest.mark.parametrize("function", [near_duplicates, deduplicate])
def test_progress_is_shown_if_asked_for(
    function: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    function(random(0, 20, 4))
    assert capsys.readouterr().err == ""
    function(random(0, 20, 4), batch_size=5, show_progress_bar=True)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize("function", [near_duplicates, deduplicate])
@pytest.mark.parametrize(
    ("arguments", "error", "argument"),
    [
        ({"threshold": "0.75"}, InputTypeError, "threshold"),
        ({"threshold": True}, InputTypeError, "threshold"),
        ({"threshold": None}, InputTypeError, "threshold"),
        ({"threshold": math.nan}, InputError, "threshold"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"batch_size": 1.0}, InputTypeError, "batch_size"),
        ({"embeddings": object()}, InputTypeError, "embeddings"),
        ({"embeddings": [[1.0, 2.0], [1.0]]}, InputTypeError, "embeddings"),
        ({"embeddings": [[0.0, 1.0], [math.inf, 1.0]]}, InputError, "embeddings[1]"),
    ],
)
def test_errors_name_the_argument(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    error: type[InputError],
    argument: str,
) -> None:
    with pytest.raises(error, match=re.escape(argument)) as raised:
        function(**({"embeddings": np.ones((3, 2))} | arguments))
    assert raised.value.argument == argument

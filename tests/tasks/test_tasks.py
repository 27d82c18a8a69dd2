import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import ROOT, SHARED
from minilm import SentenceEncoder
from minilm.errors import InputError, InputTypeError
from minilm.similarity import cos_sim, dot_score, euclidean_sim, manhattan_sim
from minilm.tasks import community_detection, paraphrase_mining_embeddings, semantic_search
from minilm.tasks import search as search_module
from minilm.tasks.search import Scores

Score = Callable[[Any, Any], Tensor]

FUNCTIONS: list[Score] = [cos_sim, dot_score, euclidean_sim, manhattan_sim]
# Each may be turned into an argument of `semantic_search`.
FORMS: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "tensor": torch.from_numpy,
    "array": lambda rows: rows,
    "list of tensors": lambda rows: list(torch.from_numpy(rows)),
    "list of arrays": list,
    "list of lists": lambda rows: rows.tolist(),
}


def random(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_duplicates(seed: int, rows: int, width: int = 16) -> np.ndarray[Any, Any]:
    """Every vector about three times, in no order."""
    choice = np.random.default_rng(seed).integers(0, rows // 3, rows)
    return random(seed, rows // 3, width)[choice]


def plain_cosine(a: Any, b: Any) -> Tensor:
    """Ours would be recognized; this is anybody's."""
    return cos_sim(a, b)


def ids(results: list[list[dict[str, int | float]]]) -> list[list[int | float]]:
    return [[hit["corpus_id"] for hit in hits] for hits in results]


def by_float64(scores: Tensor, top_k: int) -> list[list[dict[str, int | float]]]:
    """The definition: sort all by descending score, then by id."""
    return [
        [
            {"corpus_id": i, "score": row[i]}
            for i in sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
        ]
        for row in scores.tolist()
    ]


# semantic_search by hand


def test_search_by_hand() -> None:
    corpus = np.array([[0.0, 1.0], [3.0, 4.0], [-2.0, 0.0], [4.0, 3.0]])
    assert semantic_search(np.array([[1.0, 0.0], [0.0, 5.0]]), corpus, top_k=3) == [
        [
            {"corpus_id": 3, "score": 0.8},
            {"corpus_id": 1, "score": 0.6},
            {"corpus_id": 0, "score": 0.0},
        ],
        [
            {"corpus_id": 0, "score": 1.0},
            {"corpus_id": 1, "score": 0.8},
            {"corpus_id": 3, "score": 0.6},
        ],
    ]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (dot_score, [(2, 10.0), (1, 1.0), (0, 0.0)]),
        (euclidean_sim, [(1, 0.0), (0, -math.sqrt(2)), (2, -9.0)]),
        (manhattan_sim, [(1, 0.0), (0, -2.0), (2, -9.0)]),
    ],
)
def test_search_by_another_function(function: Score, expected: list[tuple[int, float]]) -> None:
    corpus = torch.tensor([[0.0, 1.0], [1.0, 0.0], [10.0, 0.0]], dtype=torch.float64)
    [hits] = semantic_search(torch.tensor([1.0, 0.0]), corpus, score_function=function)
    assert [(hit["corpus_id"], hit["score"]) for hit in hits] == expected


def test_search_returns_plain_numbers() -> None:
    [[hit]] = semantic_search(random(0, 4), random(1, 1, 4))
    assert type(hit["corpus_id"]) is int
    assert type(hit["score"]) is float
    json.dumps(hit)


def test_search_gives_what_there_is() -> None:
    assert ids(semantic_search([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], top_k=10)) == [[0, 1]]


@pytest.mark.parametrize("corpus", [torch.empty(0), np.array([]), [], np.empty((0, 3))])
def test_search_in_nothing(corpus: Any) -> None:
    assert semantic_search(torch.ones(2, 3), corpus) == [[], []]


@pytest.mark.parametrize("queries", [torch.empty(0), [], np.empty((0, 3))])
def test_search_for_nothing(queries: Any) -> None:
    assert semantic_search(queries, torch.ones(2, 3)) == []


def test_a_zero_vector_is_similar_to_nothing() -> None:
    [hits] = semantic_search([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    assert hits == [{"corpus_id": 0, "score": 0.0}, {"corpus_id": 1, "score": 0.0}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("corpus_form", FORMS)
def test_search_takes_what_cos_sim_takes(form: str, corpus_form: str) -> None:
    queries, corpus = random(0, 3, 8), random(1, 5, 8)
    found = semantic_search(FORMS[form](queries), FORMS[corpus_form](corpus), top_k=2)
    expected = semantic_search(torch.from_numpy(queries), torch.from_numpy(corpus), top_k=2)
    assert ids(found) == ids(expected)
    one = semantic_search(FORMS[form](queries)[0], FORMS[corpus_form](corpus), top_k=2)
    assert ids(one) == ids(expected)[:1]


def test_search_changes_no_argument() -> None:
    queries, corpus = random(0, 3, 8), random(1, 5, 8)
    before = queries.copy(), corpus.copy()
    semantic_search(queries, corpus)
    np.testing.assert_array_equal(queries, before[0])
    np.testing.assert_array_equal(corpus, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_makes_no_false_ties(dtype: torch.dtype) -> None:
    corpus = torch.from_numpy(random(0, 500, 64)).to(dtype)
    query = torch.from_numpy(random(1, 64)).to(dtype)
    assert semantic_search(query, corpus) == semantic_search(query.float(), corpus.float())


# semantic_search: exact and the same whatever the blocks


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_is_the_definition(function: Score, dtype: torch.dtype) -> None:
    queries = torch.from_numpy(with_duplicates(0, 30)).to(dtype)
    corpus = torch.from_numpy(with_duplicates(0, 300)).to(dtype)
    scores = Scores(queries, corpus, function, ("a", "b"))
    rows, columns = torch.cartesian_prod(torch.arange(30), torch.arange(300)).T
    exact = scores.exact(rows, columns).reshape(30, 300)
    torch.testing.assert_close(
        exact.double(), function(queries.double(), corpus.double()), rtol=1e-6, atol=1e-7
    )
    found = semantic_search(queries, corpus, top_k=7, score_function=function)
    assert found == by_float64(exact, 7)


@pytest.mark.parametrize("function", [*FUNCTIONS, plain_cosine])
@pytest.mark.parametrize("top_k", [1, 5, 1000])
def test_no_result_depends_on_the_chunks(function: Score, top_k: int) -> None:
    # Whole numbers: another function's own rounding would depend on its blocks.
    queries = with_duplicates(1, 40) if function in FUNCTIONS else np.sign(random(1, 40, 16))
    corpus = with_duplicates(2, 200) if function in FUNCTIONS else np.sign(random(2, 200, 16))
    whole = semantic_search(queries, corpus, top_k=top_k, score_function=function)
    for query_chunk, corpus_chunk in [(1, 1000), (7, 17), (1000, 3), (40, 199)]:
        found = semantic_search(queries, corpus, query_chunk, corpus_chunk, top_k, function)
        assert found == whole


@pytest.mark.parametrize("function", [*FUNCTIONS, plain_cosine])
def test_ties_go_to_the_smaller_row(function: Score) -> None:
    corpus = np.tile(random(3, 2, 16), (50, 1))  # 0, 2, 4, ... are equal, and 1, 3, 5, ...
    for chunk in (500, 33, 8, 1):
        [hits] = semantic_search(corpus[0], corpus, 1, chunk, 5, function)
        assert [hit["corpus_id"] for hit in hits] == [0, 2, 4, 6, 8]


def test_equal_vectors_score_equally_wherever_they_stand() -> None:
    vector = random(4, 384)
    corpus = random(5, 3001, 384)
    places = [0, 7, 1023, 1024, 2999, 3000]
    corpus[places] = vector
    [hits] = semantic_search(random(6, 384) + vector, corpus, top_k=6)
    assert [hit["corpus_id"] for hit in hits] == places
    assert len({hit["score"] for hit in hits}) == 1


def test_candidates_allow_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks as wrong as `error` says they may be must change nothing.
    queries, corpus = torch.from_numpy(random(7, 20, 64)), torch.from_numpy(random(8, 400, 64))
    right = semantic_search(queries, corpus, 5, 50)
    block, generator = Scores.block, torch.Generator().manual_seed(0)

    def noisy(self: Scores, rows: Any, start: int, stop: int) -> Tensor:
        scores = block(self, rows, start, stop)
        noise = 2 * torch.rand(scores.shape, generator=generator) - 1
        return scores + noise * 0.1

    monkeypatch.setattr(Scores, "block", noisy)
    monkeypatch.setattr(Scores, "error", lambda self, rows, near: torch.full_like(near, 0.1))
    assert semantic_search(queries, corpus, 5, 50) == right
    monkeypatch.setattr(Scores, "error", lambda self, rows, near: torch.zeros_like(near))
    assert semantic_search(queries, corpus, 5, 50) != right


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_stated_error_is_one(function: Score, size: float) -> None:
    queries = torch.from_numpy(random(9, 50, 384) * np.float32(size))
    corpus = torch.from_numpy(random(10, 300, 384) + 1)
    scores = Scores(queries, corpus, function, ("a", "b"))
    block = scores.block(slice(0, 50), 0, 300)
    difference = (block.double() - function(queries.double(), corpus.double())).abs()
    allowed = torch.stack([scores.error(slice(0, 50), block[:, i]) for i in range(300)], dim=1)
    assert (difference <= allowed.double()).all()
    assert difference.max() > 0


def test_search_holds_no_large_block(
    block_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_TILE", 1000)
    semantic_search(random(0, 50, 4), random(1, 500, 4), 20, 10**6)
    assert max(block_sizes) <= 1000
    assert sum(block_sizes) == 50 * 500
    block_sizes.clear()
    semantic_search(random(0, 50, 4), random(1, 500, 4), 20, 30)
    assert max(block_sizes) == 20 * 30


def test_another_function_gets_the_chunks_asked_for() -> None:
    shapes: list[tuple[int, int]] = []

    def score(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((len(a), len(b)))
        return cos_sim(a, b)

    semantic_search(random(0, 5, 4), random(1, 7, 4), 3, 4, score_function=score)
    assert sorted(shapes) == [(2, 3), (2, 4), (3, 3), (3, 4)]


# semantic_search: errors


@pytest.mark.parametrize(
    ("arguments", "error", "argument"),
    [
        ({"top_k": 0}, InputError, "top_k"),
        ({"top_k": 2.0}, InputTypeError, "top_k"),
        ({"top_k": True}, InputTypeError, "top_k"),
        ({"query_chunk_size": 0}, InputError, "query_chunk_size"),
        ({"corpus_chunk_size": -1}, InputError, "corpus_chunk_size"),
        ({"corpus_chunk_size": None}, InputTypeError, "corpus_chunk_size"),
        ({"score_function": "cosine"}, InputTypeError, "score_function"),
        ({"score_function": lambda a, b: a}, InputError, "score_function"),
        ({"score_function": lambda a, b: cos_sim(a, b) * math.nan}, InputError, "score_function"),
        ({"query_embeddings": "text"}, InputTypeError, "query_embeddings"),
        ({"query_embeddings": np.ones((1, 2, 3))}, InputError, "query_embeddings"),
        ({"query_embeddings": np.ones((2, 4))}, InputError, "query_embeddings"),
        ({"query_embeddings": [[1.0, math.nan, 0.0]]}, InputError, "query_embeddings[0]"),
        ({"corpus_embeddings": None}, InputTypeError, "corpus_embeddings"),
        ({"corpus_embeddings": [[1.0, 2.0, 3.0], [1.0]]}, InputTypeError, "corpus_embeddings"),
        (
            {"corpus_embeddings": [[1.0, 2.0, 3.0], [0.0, math.inf, 0.0]]},
            InputError,
            "corpus_embeddings[1]",
        ),
    ],
)
def test_search_names_the_argument(
    arguments: dict[str, Any], error: type[InputError], argument: str
) -> None:
    defaults: dict[str, Any] = {
        "query_embeddings": np.ones((1, 3)),
        "corpus_embeddings": np.ones((2, 3)),
    }
    with pytest.raises(error, match=re.escape(argument)) as raised:
        semantic_search(**(defaults | arguments))
    assert raised.value.argument == argument


# paraphrase_mining_embeddings


def test_mining_by_hand() -> None:
    vectors = [[1.0, 0.0], [0.0, 2.0], [0.8, 0.6], [5.0, 0.0]]
    pairs = paraphrase_mining_embeddings(torch.tensor(vectors, dtype=torch.float64))
    assert pairs == [[1.0, 0, 3], [0.8, 0, 2], [0.8, 2, 3], [0.6, 1, 2], [0.0, 0, 1], [0.0, 1, 3]]
    assert all(type(score) is float and type(i) is type(j) is int for score, i, j in pairs)


def test_mining_counts_each_sentences_nearest() -> None:
    # On a line: 0 is nearest to 1, 1 to 0, 2 to 1, 3 to 2.
    vectors = [[0.0], [1.0], [3.0], [7.0]]
    pairs = paraphrase_mining_embeddings(vectors, top_k=1, score_function=euclidean_sim)
    assert pairs == [[-1.0, 0, 1], [-2.0, 1, 2], [-4.0, 2, 3]]


@pytest.mark.parametrize("vectors", [[], np.array([]), torch.empty(0, 5), torch.ones(1, 5), [1.0]])
def test_mining_needs_two(vectors: Any) -> None:
    assert paraphrase_mining_embeddings(vectors) == []


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("top_k", [1, 3, 39])
@pytest.mark.parametrize("max_pairs", [0, 1, 10, 500000])
def test_mining_is_the_definition(function: Score, top_k: int, max_pairs: int) -> None:
    vectors = torch.from_numpy(with_duplicates(11, 40, 8))
    i, j = torch.cartesian_prod(torch.arange(40), torch.arange(40)).T
    exact = Scores(vectors, vectors, function, ("a", "b")).exact(i, j).reshape(40, 40).tolist()
    near = [
        sorted((k for k in range(40) if k != i), key=lambda k: (-exact[i][k], k))[:top_k]
        for i in range(40)
    ]
    pairs = [(i, j) for i, j in combinations(range(40), 2) if j in near[i] or i in near[j]]
    expected = sorted(([exact[i][j], i, j] for i, j in pairs), key=lambda p: (-p[0], p[1], p[2]))
    for query_chunk, corpus_chunk in [(5000, 100000), (1, 40), (7, 3), (40, 1)]:
        found = paraphrase_mining_embeddings(
            vectors, query_chunk, corpus_chunk, max_pairs, top_k, function
        )
        assert found == expected[:max_pairs]


def test_mining_picks_the_best_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = with_duplicates(12, 300)
    whole = paraphrase_mining_embeddings(vectors, max_pairs=50, top_k=20)
    monkeypatch.setattr("minilm.tasks.paraphrase._PENDING", 10)
    assert paraphrase_mining_embeddings(vectors, 9, 50, max_pairs=50, top_k=20) == whole
    assert len(whole) == 50
    assert len({(i, j) for _, i, j in whole}) == 50


def test_of_two_directions_the_better_counts() -> None:
    scores = torch.tensor([[10.0, 9.0, 8.0], [7.0, 10.0, 6.0], [8.5, 4.0, 10.0]])
    before = scores.clone()
    pairs = paraphrase_mining_embeddings(torch.zeros(3, 2), score_function=lambda a, b: scores)
    assert pairs == [[9.0, 0, 1], [8.5, 0, 2], [6.0, 1, 2]]
    assert torch.equal(scores, before)  # the function's own tensor is left alone


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"max_pairs": -1}, "max_pairs"),
        ({"max_pairs": False}, "max_pairs"),
        ({"max_pairs": 1.5}, "max_pairs"),
        ({"top_k": 0}, "top_k"),
        ({"query_chunk_size": 0}, "query_chunk_size"),
        ({"corpus_chunk_size": 0}, "corpus_chunk_size"),
        ({"score_function": None}, "score_function"),
        ({"embeddings": {"a": 1}}, "embeddings"),
        ({"embeddings": [[1.0, 0.0], [math.nan, 0.0]]}, "embeddings[1]"),
    ],
)
def test_mining_names_the_argument(arguments: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError, match=re.escape(argument)) as raised:
        paraphrase_mining_embeddings(**({"embeddings": np.ones((3, 2))} | arguments))
    assert raised.value.argument == argument


# community_detection


def on_circle(*degrees: float) -> np.ndarray[Any, Any]:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_communities_by_hand() -> None:
    # Within 31 degrees: of 90 are 100, 75, 110 and 120, of 10 are 0 and 35, each the nearest first.
    vectors = on_circle(0, 90, 10, 100, 35, 110, 120, 75, 200)
    cosine = math.cos(math.radians(31))
    assert community_detection(vectors, cosine, 2) == [[1, 3, 7, 5, 6], [2, 0, 4]]
    assert community_detection(vectors, cosine, 4) == [[1, 3, 7, 5, 6]]
    assert community_detection(vectors, cosine, 1) == [[1, 3, 7, 5, 6], [2, 0, 4], [8]]
    assert community_detection(vectors, cosine, 6) == []


def test_what_is_taken_is_not_taken_twice() -> None:
    # 20 is in reach of both centres, 0 and 45; 0 comes first.
    vectors = on_circle(-20, -10, 0, 10, 25, 45, 50)
    assert community_detection(vectors, math.cos(math.radians(26)), 2) == [[2, 1, 3, 0, 4], [5, 6]]


@pytest.mark.parametrize("vectors", [[], np.array([]), torch.empty(0, 4), torch.ones(3, 4), [1.0]])
def test_too_few_for_a_community(vectors: Any) -> None:
    assert community_detection(vectors, min_community_size=4) == []


@pytest.mark.parametrize("smallest", [1, 5, 30, 200])
@pytest.mark.parametrize("value", [1.0, 0.1, 1e-3])
def test_a_similarity_equal_to_the_threshold_counts(smallest: int, value: float) -> None:
    vectors = torch.full((200, 16), value)
    assert community_detection(vectors, 1.0, smallest) == [list(range(200))]


def test_the_same_direction_has_cosine_one() -> None:
    vectors = random(13, 1, 384) * np.arange(1, 41, dtype=np.float32)[:, None]
    assert community_detection(vectors, 1.0, 40) == [list(range(40))]


def test_a_threshold_of_exactly_one_half() -> None:
    vectors = np.array([[1.0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])
    assert community_detection(vectors, 0.5, 2) == [[0, 3, 1]]
    assert community_detection(vectors, 0.5000001, 2) == [[0, 3]]


def test_duplicates_change_nothing_but_sizes() -> None:
    vectors = np.concatenate([on_circle(0, 10, 90, 100, 95), on_circle(0, 0, 0)])
    assert community_detection(vectors, 0.9, 2) == [[0, 5, 6, 7, 1], [2, 4, 3]]


def brute_force(vectors: Tensor, threshold: float, smallest: int) -> list[list[int]]:
    """The definition, by the reference's steps, from exact scores."""
    count = len(vectors)
    i, j = torch.cartesian_prod(torch.arange(count), torch.arange(count)).T
    exact = Scores(vectors, vectors, cos_sim, ("a", "b")).exact(i, j).float()
    rows = exact.reshape(count, count).tolist()
    limit = float(np.float32(threshold))
    near = [
        sorted((k for k in range(count) if rows[i][k] >= limit), key=lambda k: (-rows[i][k], k))
        for i in range(count)
    ]
    taken: set[int] = set()
    found = []
    for centre in sorted(range(count), key=lambda i: -len(near[i])):
        free = [k for k in near[centre] if k not in taken]
        if centre in taken or len(near[centre]) < smallest or len(free) < smallest:
            continue
        found.append([centre, *(k for k in free if k != centre)])
        taken.update(found[-1])
    return sorted(found, key=len, reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_communities_are_the_definition_whatever_the_batch(seed: int, dtype: torch.dtype) -> None:
    vectors = torch.from_numpy(with_duplicates(seed, 150, 4)).to(dtype)
    for threshold, smallest in [(0.9, 3), (0.5, 10), (0.999, 1)]:
        expected = brute_force(vectors, threshold, smallest)
        assert expected
        for batch in (1024, 1, 13):
            assert community_detection(vectors, threshold, smallest, batch) == expected


def test_communities_hold_no_square(
    block_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = random(14, 300, 3)
    whole = community_detection(vectors, 0.9, 5)
    monkeypatch.setattr("minilm.tasks.communities._BLOCK", 3000)
    block_sizes.clear()
    assert community_detection(vectors, 0.9, 5) == whole
    assert max(block_sizes) <= 3000


def test_communities_compute_half_of_the_square_once(block_sizes: list[int]) -> None:
    vectors = random(14, 300, 16)
    assert len(community_detection(vectors, 0.99, 1, batch_size=10)) == 300
    assert sum(block_sizes) == 10 * sum(range(10, 301, 10))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_exact_scores_are_of_the_pair_alone(function: Score) -> None:
    vectors = torch.from_numpy(random(15, 500, 384))
    scores = Scores(vectors, vectors, function, ("a", "b"))
    rows, columns = torch.arange(2000) % 500, torch.arange(2000) * 7 % 500
    whole = scores.exact(rows, columns)  # in several parts
    apart = torch.cat([scores.exact(rows[k : k + 1], columns[k : k + 1]) for k in range(2000)])
    assert torch.equal(whole, apart)
    assert torch.equal(whole, scores.exact(columns, rows))
    other = Scores(vectors, vectors.clone(), function, ("a", "b"))
    assert torch.equal(whole, other.exact(rows, columns))


@pytest.mark.parametrize(
    ("function", "step"),
    [(community_detection, "batch_size"), (paraphrase_mining_embeddings, "query_chunk_size")],
)
def test_progress_is_shown_if_asked_for(
    function: Callable[..., Any], step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    function(random(0, 20, 4))
    assert capsys.readouterr().err == ""
    function(random(0, 20, 4), show_progress_bar=True, **{step: 6})
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "argument"),
    [
        ({"threshold": "0.75"}, InputTypeError, "threshold"),
        ({"threshold": True}, InputTypeError, "threshold"),
        ({"threshold": math.nan}, InputError, "threshold"),
        ({"min_community_size": 0}, InputError, "min_community_size"),
        ({"min_community_size": 1.0}, InputTypeError, "min_community_size"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"embeddings": object()}, InputTypeError, "embeddings"),
        ({"embeddings": [[math.inf, 1.0]] * 20}, InputError, "embeddings[0]"),
    ],
)
def test_communities_name_the_argument(
    arguments: dict[str, Any], error: type[InputError], argument: str
) -> None:
    with pytest.raises(error, match=re.escape(argument)) as raised:
        community_detection(**({"embeddings": np.ones((20, 2))} | arguments))
    assert raised.value.argument == argument


# beside the reference


@pytest.fixture(scope="module")
def util() -> Any:
    package = pytest.importorskip(
        "sentence_transformers", reason="needs the reference: pip install 'minilm[reference]'"
    )
    if int(package.__version__.split(".")[0]) < 6:
        pytest.skip("the functions of version 6 are those that ours follow")
    return importlib.import_module("sentence_transformers.util")


@pytest.fixture(scope="module")
def sentences(encoder: SentenceEncoder) -> Tensor:
    """Vectors of 1200 real sentences: STS17, and short ones of abstracts."""
    sts, corpus = SHARED / "sts/STS17.en-en.tsv", SHARED / "retrieval/scifact-small/corpus.jsonl"
    for path in (sts, corpus):
        if not path.is_file():
            pytest.skip(f"{path} is absent")
    rows = [line.split("\t") for line in sts.read_text(encoding="utf-8").splitlines()[1:]]
    texts = [text for row in rows for text in row[1:3]]
    for line in corpus.read_text(encoding="utf-8").splitlines():
        texts += re.split(r"(?<=[.!?])\s+", json.loads(line)["text"])
    texts = [text for text in texts if len(text.split()) < 25][:1200]
    return torch.from_numpy(encoder.encode(texts))


# Two float32 products differ by this: 384 roundings, half of them the other way.
CLOSE = 2e-6


@pytest.mark.reference
@pytest.mark.parametrize("name", ["cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"])
def test_search_as_the_reference(util: Any, sentences: Tensor, name: str) -> None:
    function: Score = next(f for f in FUNCTIONS if getattr(f, "__name__", "") == name)
    ours = semantic_search(sentences[:200], sentences, score_function=function)
    theirs = util.semantic_search(sentences[:200], sentences, score_function=getattr(util, name))
    difference = [
        abs(a["score"] - b["score"])
        for hits, others in zip(ours, theirs, strict=True)
        for a, b in zip(hits, others, strict=True)
    ]
    # A distance of 0 has an error of the root of its square's.
    assert max(difference) < (2e-3 if name == "euclidean_sim" else CLOSE * 10)
    same = sum(a == b for a, b in zip(ids(ours), ids(theirs), strict=True))
    assert same >= 190  # the others have scores nearer to each other than that


@pytest.mark.reference
def test_mining_as_the_reference(util: Any, sentences: Tensor) -> None:
    ours = paraphrase_mining_embeddings(sentences, top_k=20, max_pairs=10000)
    theirs = util.paraphrase_mining_embeddings(sentences, top_k=20, max_pairs=10000)
    assert len(ours) == len(theirs)
    assert len(ours) == 10000
    ours_of = {(i, j): score for score, i, j in ours}
    theirs_of = {(i, j): score for score, i, j in theirs}
    assert len(ours_of.keys() ^ theirs_of.keys()) <= 10  # at the end, where scores are equal
    for pair in ours_of.keys() & theirs_of.keys():
        assert abs(ours_of[pair] - theirs_of[pair]) < CLOSE
    for pair in ours_of.keys() ^ theirs_of.keys():
        score = ours_of.get(pair, theirs_of.get(pair, 0))
        assert abs(score - ours[-1][0]) < CLOSE or pair_is_at_the_top_k(pair, sentences)


def pair_is_at_the_top_k(pair: tuple[int | float, int | float], vectors: Tensor) -> bool:
    """Whether the 20th and the 21st neighbour of one of them are as good as equal."""
    rows = [int(row) for row in pair]
    best = (vectors[rows] @ vectors.T).topk(22).values  # itself, and 21
    return bool(((best[:, 20] - best[:, 21]).abs() < CLOSE).any())


@pytest.mark.reference
@pytest.mark.parametrize(("threshold", "smallest"), [(0.75, 2), (0.6, 5), (0.5, 10), (0.9, 1)])
def test_communities_as_the_reference(
    util: Any, sentences: Tensor, threshold: float, smallest: int
) -> None:
    ours = community_detection(sentences, threshold, smallest)
    theirs = util.community_detection(sentences, threshold, smallest)
    assert ours
    assert [found[0] for found in ours] == [found[0] for found in theirs]
    assert [set(found) for found in ours] == [set(found) for found in theirs]


# what users may have set for other products


def test_autocast_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=generator)
    corpus = base + 0.05 * torch.randn(1500, 64, generator=generator)
    queries = base + 0.05 * torch.randn(60, 64, generator=generator)
    expected = [semantic_search(queries, corpus, score_function=f) for f in (dot_score, cos_sim)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [semantic_search(queries, corpus, score_function=f) for f in (dot_score, cos_sim)]
    assert found == expected


@pytest.mark.process
def test_precision_that_was_set_for_each_backend() -> None:
    code = """
import torch
from minilm.tasks import semantic_search
try:
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
except (AttributeError, RuntimeError):
    print("older")
print(semantic_search([[1.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]], top_k=1))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[[{'corpus_id': 1, 'score': 1.0}]]\n")


# Vectors so long that products of theirs are beyond the dtype.


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("size", [1e17, 1e18, 1e19, 1e20, 1e30, 1e37])
def test_long_vectors_are_found_or_refused(function: Score, size: float) -> None:
    queries, corpus = (random(seed, 5, 16) * np.float32(size) for seed in (1, 2))
    scores = function(queries.astype(np.float64), corpus.astype(np.float64))
    if float(scores.abs().max()) > float(np.finfo(np.float32).max):
        with pytest.raises(InputError, match="is beyond what float32 holds; scale the vectors"):
            semantic_search(queries, corpus, top_k=5, score_function=function)
        return
    found = semantic_search(queries, corpus, top_k=5, score_function=function)
    assert ids(found) == scores.argsort(dim=1, descending=True).tolist()
    for row, hits in enumerate(found):
        for hit in hits:
            expected = float(scores[row, int(hit["corpus_id"])])
            assert hit["score"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("dtype", "size"), [(np.float32, 3e38), (np.float64, 1e155), (np.float64, 1e300)]
)
def test_vectors_that_are_too_long_are_named(
    function: Score, dtype: type[np.floating[Any]], size: float
) -> None:
    usual = np.eye(3, dtype=dtype)
    long = usual.copy()
    long[2] *= dtype(size)
    for queries, corpus, name in (
        (long, usual, "query_embeddings[2]"),
        (usual, long, "corpus_embeddings[2]"),
    ):
        with pytest.raises(InputError, match="too long for its products; scale it down") as info:
            semantic_search(queries, corpus, score_function=function)
        assert info.value.argument == name
    with pytest.raises(InputError, match="too long for its products"):
        paraphrase_mining_embeddings(long, score_function=function)


def test_float16_vectors_whose_scores_float16_does_not_hold() -> None:
    vectors = np.array([[200.0, 100.0], [150.0, 300.0], [-250.0, 1.0]], np.float16)
    found = semantic_search(vectors, vectors, top_k=3, score_function=dot_score)
    assert [hit["score"] for hit in found[0]] == [60_000.0, 50_000.0, -49_900.0]
    assert [hit["score"] for hit in found[1]] == [112_500.0, 60_000.0, -37_200.0]

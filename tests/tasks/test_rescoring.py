import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minilm.errors import InputError, InputTypeError
from minilm.quantize import dequantize, model_ranges, quantize_embeddings
from minilm.tasks import quantized_search, rescoring, semantic_search

Array = np.ndarray[Any, Any]
BYTES = ("int8", "uint8")
BITS = ("binary", "ubinary")


def unit(seed: int, rows: int, width: int = 384) -> Array:
    """Every vector about twice, in no order, of length 1."""
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((rows // 2, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[generator.integers(0, rows // 2, rows)]


def codes_of(vectors: Array, precision: str, ranges: Any = None) -> Array:
    if precision in BYTES and ranges is None:
        ranges = model_ranges(vectors.shape[1])
    return quantize_embeddings(vectors, precision, ranges)


def ids(results: list[list[dict[str, int | float]]]) -> list[list[int | float]]:
    return [[hit["corpus_id"] for hit in hits] for hits in results]


def by_bits(queries: Array, vectors: Array, count: int) -> list[list[int]]:
    """The definition: the most equal bits, of equally many the smaller row."""
    equal = ((queries > 0)[:, None] == (vectors > 0)[None]).sum(axis=2)
    order: list[list[int]] = np.argsort(-equal, axis=1, kind="stable")[:, :count].tolist()
    return order


# by hand


def test_bits_by_hand() -> None:
    vectors = np.array([[1.0, 1, -1, -1], [1, 1, 1, -1], [-1, -1, -1, 1], [0.1, 9, -1, -1]])
    codes = quantize_embeddings(vectors, "ubinary")
    [hits] = quantized_search([1.0, 2.0, -1.0, -1.0], codes, "ubinary", 2)
    # Both share four bits with the query; what the bits stand for is (1, 1, -1, -1) / 2.
    assert hits == [
        {"corpus_id": 0, "score": pytest.approx(5 / np.sqrt(7 * 4))},
        {"corpus_id": 3, "score": hits[0]["score"]},
    ]
    [hits] = quantized_search(
        [1.0, 2.0, -1.0, -1.0], codes, "ubinary", 2, rescore_embeddings=vectors
    )
    assert ids([hits]) == [[0, 3]]
    assert hits[1]["score"] == pytest.approx(20.1 / np.sqrt(7 * (0.01 + 81 + 2)))
    # With one candidate for each result the third is never looked at.
    [hits] = quantized_search(
        [1.0, 2.0, 1.0, -1.0], codes, "ubinary", 1, rescore_embeddings=-vectors,
        rescore_multiplier=1,
    )  # fmt: skip
    assert ids([hits]) == [[1]]
    assert hits[0]["score"] < 0


def test_bytes_by_hand() -> None:
    ranges = np.array([[-128.5, -128.5], [126.5, 126.5]])
    codes = np.array([[3, 4], [4, 3], [0, 0], [-3, -4]], np.int8)
    [hits] = quantized_search([1.0, 0.0], codes, "int8", 4, ranges=ranges)
    assert ids([hits]) == [[1, 0, 2, 3]]
    assert [hit["score"] for hit in hits] == pytest.approx([0.8, 0.6, 0, -0.6])


# the candidates


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("width", [1, 7, 8, 20, 64, 65, 384])
@pytest.mark.parametrize("count", [3, 60])  # fewer and more than are counted one by one
def test_bits_in_common_are_counted(precision: str, width: int, count: int) -> None:
    queries, vectors = unit(0, count, width), unit(1, 300, width)
    scores = rescoring.by_codes(torch.from_numpy(queries), codes_of(vectors, precision), precision)
    expected = ((queries > 0)[:, None] == (vectors > 0)[None]).sum(axis=2)
    np.testing.assert_array_equal(scores.block(slice(0, count), 0, 300), expected)
    np.testing.assert_array_equal(scores.block(slice(1, 3), 20, 90), expected[1:3, 20:90])


@pytest.mark.parametrize("precision", BITS)
def test_candidates_are_those_with_the_most_bits(precision: str) -> None:
    queries, vectors = unit(2, 40), unit(3, 500)
    found = quantized_search(
        queries, codes_of(vectors, precision), precision, 7, rescore_multiplier=1,
        rescore_embeddings=vectors,
    )  # fmt: skip
    expected = by_bits(queries, vectors, 7)
    assert [set(row) for row in ids(found)] == [set(row) for row in expected]


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("own", [False, True])
def test_bytes_are_searched_as_what_they_stand_for(precision: str, own: bool) -> None:
    queries, vectors = unit(4, 20), unit(5, 400)
    ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)]) if own else None
    codes = codes_of(vectors, precision, ranges)
    found = quantized_search(queries, codes, precision, 8, ranges=ranges)
    used = model_ranges() if ranges is None else ranges
    expected = semantic_search(queries, dequantize(codes, precision, used), top_k=8)
    assert ids(found) == ids(expected)
    for hits, others in zip(found, expected, strict=True):
        for hit, other in zip(hits, others, strict=True):
            assert hit["score"] == pytest.approx(other["score"], abs=1e-6)


@pytest.mark.parametrize("precision", BYTES + BITS)
def test_no_result_depends_on_the_batch(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, vectors = unit(6, 50), unit(7, 300)
    codes = codes_of(vectors, precision)
    whole = quantized_search(queries, codes, precision, 5, rescore_embeddings=vectors)
    single = [
        quantized_search(query, codes, precision, 5, rescore_embeddings=vectors)[0]
        for query in queries
    ]
    assert single == whole
    monkeypatch.setattr(rescoring, "ROWS", 17)
    assert quantized_search(queries, codes, precision, 5, rescore_embeddings=vectors) == whole


@pytest.mark.parametrize("precision", BYTES + BITS)
def test_ties_go_to_the_smaller_row(precision: str) -> None:
    vector = unit(8, 2)[0]
    vectors = np.tile(np.stack([vector, -vector]), (30, 1))
    codes = codes_of(vectors, precision)
    for better in (None, vectors):
        [hits] = quantized_search(vector, codes, precision, 4, rescore_embeddings=better)
        assert [hit["corpus_id"] for hit in hits] == [0, 2, 4, 6]


# the second step


@pytest.mark.parametrize("precision", BYTES + BITS)
def test_all_rescored_is_the_exact_search(precision: str) -> None:
    queries, vectors = unit(9, 30), unit(10, 200)
    found = quantized_search(
        queries, codes_of(vectors, precision), precision, 5, rescore_embeddings=vectors,
        rescore_multiplier=40,
    )  # fmt: skip
    assert found == semantic_search(queries, vectors, top_k=5)


def test_more_candidates_find_more() -> None:
    vectors = unit(11, 2000)
    queries = vectors[:50] + np.float32(0.05) * unit(12, 50)
    exact = ids(semantic_search(queries, vectors))
    codes = codes_of(vectors, "binary")
    shares = []
    for multiplier in (1, 4, 16):
        found = ids(
            quantized_search(
                queries, codes, "binary", rescore_embeddings=vectors, rescore_multiplier=multiplier
            )
        )
        pairs = zip(found, exact, strict=True)
        shares.append(np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]))
    assert shares == sorted(shares)
    assert shares[0] < shares[2]


def test_rescored_with_int8() -> None:
    queries, vectors = unit(13, 10), unit(14, 100)
    int8 = codes_of(vectors, "int8")
    found = quantized_search(
        queries, codes_of(vectors, "binary"), "binary", 5, rescore_embeddings=int8,
        rescore_multiplier=20,
    )  # fmt: skip
    assert found == quantized_search(queries, int8, "int8", 5)
    assert found == quantized_search(
        queries, codes_of(vectors, "binary"), "binary", 5, rescore_multiplier=20,
        rescore_embeddings=torch.from_numpy(int8),
    )  # fmt: skip


def test_codes_and_vectors_in_files(tmp_path: Path) -> None:
    queries, vectors = unit(15, 5), unit(16, 100)
    codes = codes_of(vectors, "binary")
    np.save(tmp_path / "codes.npy", codes)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("codes", "vectors")]
    assert quantized_search(
        queries, mapped[0], "binary", rescore_embeddings=mapped[1]
    ) == quantized_search(queries, codes, "binary", rescore_embeddings=vectors)


@pytest.mark.parametrize("precision", BYTES + BITS)
def test_nothing_to_find(precision: str) -> None:
    codes = codes_of(unit(17, 10), precision)
    assert quantized_search(np.ones((2, 384)), codes[:0], precision) == [[], []]
    assert len(quantized_search(np.ones(384), codes, precision, 99)[0]) == 10


# errors


@pytest.mark.parametrize(
    ("arguments", "error", "argument"),
    [
        ({"precision": "float32"}, InputError, "precision"),
        ({"precision": "ubinary"}, InputTypeError, "codes"),
        ({"precision": "int8"}, InputError, "codes"),
        ({"codes": np.zeros((10, 3), np.int8)}, InputError, "codes"),
        ({"codes": np.zeros(2, np.int8)}, InputError, "codes"),
        ({"top_k": 0}, InputError, "top_k"),
        ({"rescore_multiplier": 0}, InputError, "rescore_multiplier"),
        ({"rescore_multiplier": 1.5}, InputTypeError, "rescore_multiplier"),
        ({"rescore_embeddings": np.ones((9, 16))}, InputError, "rescore_embeddings"),
        ({"rescore_embeddings": np.ones((10, 8))}, InputError, "rescore_embeddings"),
        ({"rescore_embeddings": np.full((10, 16), np.nan)}, InputError, "rescore_embeddings[0]"),
        ({"query_embeddings": [[np.inf] * 16]}, InputError, "query_embeddings[0]"),
        ({"query_embeddings": "text"}, InputTypeError, "query_embeddings"),
    ],
)
def test_errors_name_the_argument(
    arguments: dict[str, Any], error: type[InputError], argument: str
) -> None:
    defaults: dict[str, Any] = {
        "query_embeddings": np.ones((1, 16)),
        "codes": np.zeros((10, 2), np.int8),
        "precision": "binary",
    }
    with pytest.raises(error, match=re.escape(argument)) as raised:
        quantized_search(**(defaults | arguments))
    assert raised.value.argument == argument


def test_autocast_and_layouts_change_nothing() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((500, 64)).astype(np.float32)
    bits = quantize_embeddings(vectors, "ubinary")
    ranges = np.stack([vectors.min(0), vectors.max(0)])
    codes = quantize_embeddings(vectors, "uint8", ranges)
    queries = vectors[:40] + 0.1
    expected = quantized_search(
        queries, bits, "ubinary", 5, rescore_embeddings=codes, ranges=ranges
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = quantized_search(
            queries, bits, "ubinary", 5, rescore_embeddings=np.asfortranarray(codes), ranges=ranges
        )
    assert found == expected

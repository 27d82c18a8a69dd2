import importlib
import json
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT, SHARED
from minilm import SentenceEncoder
from minilm.errors import InputError, InputTypeError
from minilm.pretrained.hub import SHA256
from minilm.quantize import (
    PRECISIONS,
    dequantize,
    has_model_ranges,
    model_ranges,
    quantize_embeddings,
)

Array = np.ndarray[Any, Any]
STEP = 1 / 384


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unit(rows: Array) -> Array:
    scaled: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def same(actual: Any, expected: Any, dtype: Any) -> None:
    assert isinstance(actual, np.ndarray)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, expected)


# by hand


def test_bytes_by_hand() -> None:
    ranges = [[0.0, -255.0], [255.0, 255.0]]  # steps of 1 and of 2
    vectors = np.array([[0, -255], [1.99, 0], [254.5, 254.9], [255, 255]], np.float32)
    expected = np.array([[0, 0], [1, 127], [254, 254], [255, 255]])
    same(quantize_embeddings(vectors, "uint8", ranges), expected, np.uint8)
    same(quantize_embeddings(vectors, "int8", ranges), expected - 128, np.int8)


def test_outside_of_the_range_is_its_end() -> None:
    ranges = np.array([[0.0], [255.0]], np.float32)
    vectors = np.array([[-1.0], [-1e9], [256.0], [1e9], [np.inf], [-np.inf]], np.float32)
    expected = np.array([[0], [0], [255], [255], [255], [0]])
    same(quantize_embeddings(vectors, "uint8", ranges), expected, np.uint8)
    same(quantize_embeddings(vectors, "int8", ranges), expected - 128, np.int8)


def test_bits_by_hand() -> None:
    vectors = np.array([[1, -1, 0, 2, -3, 4, 5, 6, 7, -8], [-1] * 10], np.float32)
    # 1001 0111 and 10, filled up with zeros
    expected = np.array([[0b10010111, 0b10000000], [0, 0]])
    same(quantize_embeddings(vectors, "ubinary"), expected, np.uint8)
    same(quantize_embeddings(vectors, "binary"), expected - 128, np.int8)


def test_float32_is_a_copy() -> None:
    vectors = random(0, 3, 4)
    copy = quantize_embeddings(vectors, "float32")
    same(copy, vectors, np.float32)
    assert not np.shares_memory(copy, vectors)
    same(quantize_embeddings(vectors.astype(np.float64), "float32"), vectors, np.float32)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 10, 12, 384])
def test_rows_are_packed_one_by_one(precision: str, width: int) -> None:
    vectors = random(1, 5, width)
    packed = quantize_embeddings(vectors, precision)
    assert packed.shape == (5, math.ceil(width / 8))
    for row, vector in zip(packed, vectors, strict=True):
        np.testing.assert_array_equal(row, quantize_embeddings(vector, precision))


# where the ranges come from


def test_ranges_of_the_embeddings() -> None:
    vectors = np.array([[0.0, 10.0], [255.0, 520.0], [51.0, 113.0]], np.float32)
    same(quantize_embeddings(vectors, "uint8"), [[0, 0], [255, 255], [51, 51]], np.uint8)


def test_ranges_of_calibration_embeddings() -> None:
    calibration = np.array([[1, 20, -3], [4, 5, -60]], np.float32)
    vectors = np.array([[-1, 15, 1]], np.float32)
    codes = quantize_embeddings(vectors, "uint8", calibration_embeddings=calibration)
    same(codes, [[0, 170, 255]], np.uint8)


def test_ranges_come_before_calibration() -> None:
    ranges = [[0.0], [255.0]]
    codes = quantize_embeddings([[7.0]], "uint8", ranges, calibration_embeddings=[[0.0], [1.0]])
    same(codes, [[7]], np.uint8)


def test_a_dimension_of_one_value() -> None:
    same(quantize_embeddings([[5.0, 0.0], [5.0, 255.0]], "uint8"), [[0, 0], [0, 255]], np.uint8)


@pytest.mark.parametrize(("rows", "warned"), [(99, True), (100, False)])
@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_warning_of_ranges_from_few(
    caplog: pytest.LogCaptureFixture, rows: int, warned: bool, precision: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="minilm"):
        quantize_embeddings(random(2, rows, 4), precision)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warned
    if warned:
        message = f"Computing {precision} quantization buckets based on 99 embeddings"
        assert message in caplog.text


@pytest.mark.parametrize("precision", ["binary", "ubinary", "float32"])
def test_no_warning_without_ranges(caplog: pytest.LogCaptureFixture, precision: str) -> None:
    quantize_embeddings(random(2, 3, 4), precision)
    quantize_embeddings(random(2, 3, 4), "int8", model_ranges(4))
    assert not caplog.records


# forms


FORMS: dict[str, Callable[[Array], Any]] = {
    "tensor": torch.from_numpy,
    "list of tensors": lambda rows: list(torch.from_numpy(rows)),
    "list of arrays": list,
    "list of lists": lambda rows: rows.tolist(),
    "tuple": tuple,
    "reversed": lambda rows: rows[::-1].copy()[::-1],
    "requires grad": lambda rows: torch.from_numpy(rows).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_forms(form: str, precision: str) -> None:
    # Quarters: numbers of a list are float64, and rounding would differ.
    rows = np.round(4 * random(3, 120, 10)) / 4
    rows[0], rows[1] = -63.75, 63.75
    ranges = np.stack([rows.min(0), rows.max(0)])
    expected = quantize_embeddings(rows, precision, ranges)
    np.testing.assert_array_equal(quantize_embeddings(FORMS[form](rows), precision), expected)
    np.testing.assert_array_equal(
        quantize_embeddings(rows, precision, calibration_embeddings=FORMS[form](rows)), expected
    )
    np.testing.assert_array_equal(
        quantize_embeddings(rows, precision, FORMS[form](ranges)), expected
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_vector(precision: str) -> None:
    vector, ranges = random(4, 10), model_ranges(10)
    expected = quantize_embeddings(vector[None], precision, ranges)[0]
    np.testing.assert_array_equal(quantize_embeddings(vector, precision, ranges), expected)
    of_list = quantize_embeddings(vector.tolist(), precision, ranges)
    np.testing.assert_array_equal(of_list, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    rows = torch.from_numpy(random(5, 120, 10)).to(dtype)
    np.testing.assert_array_equal(
        quantize_embeddings(rows, "int8"), quantize_embeddings(rows.float(), "int8")
    )


@pytest.mark.parametrize(
    ("precision", "dtype", "width"),
    [("float32", np.float32, 12), ("int8", np.int8, 12), ("uint8", np.uint8, 12),
     ("binary", np.int8, 2), ("ubinary", np.uint8, 2)],
)  # fmt: skip
def test_empty(precision: str, dtype: Any, width: int) -> None:
    assert quantize_embeddings([], precision) == []
    same(quantize_embeddings(np.empty((0, 12)), precision), np.empty((0, width)), dtype)
    same(quantize_embeddings(torch.empty(0, 12), precision), np.empty((0, width)), dtype)
    matrices = [random(6, 100, 12), np.empty((0, 12), np.float32)]
    first, second = quantize_embeddings(matrices, precision)
    same(second, np.empty((0, width)), dtype)
    same(first, quantize_embeddings(matrices[0], precision), dtype)
    [nothing] = quantize_embeddings(matrices[1:], precision)
    same(nothing, np.empty((0, width)), dtype)


def test_matrices_share_their_ranges() -> None:
    matrices = [random(7, 60, 8), random(8, 70, 8)]
    expected = quantize_embeddings(np.concatenate(matrices), "int8")
    codes = quantize_embeddings([torch.from_numpy(matrix) for matrix in matrices], "int8")
    np.testing.assert_array_equal(np.concatenate(codes), expected)


def test_no_argument_is_changed() -> None:
    rows, ranges = random(9, 120, 8), model_ranges(8)
    before = rows.copy(), ranges.copy()
    for precision in PRECISIONS:
        quantize_embeddings(rows, precision, ranges)
    np.testing.assert_array_equal(rows, before[0])
    np.testing.assert_array_equal(ranges, before[1])


# errors


def test_an_unknown_precision_lists_the_known() -> None:
    message = (
        "Precision 'float16' is not supported, must be one of "
        "{'float32', 'int8', 'uint8', 'binary', 'ubinary'}"
    )
    for function in (quantize_embeddings, dequantize):
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            function(random(0, 2, 2), "float16")
        assert isinstance(raised.value, InputError)
        assert raised.value.argument == "precision"


@pytest.mark.parametrize("precision", ["int8", "uint8"])
@pytest.mark.parametrize("one", [random(0, 4), random(0, 1, 4), random(0, 4).tolist()])
def test_one_embedding_has_no_ranges(precision: str, one: Any) -> None:
    message = f"Cannot compute {precision} quantization ranges .* single embedding"
    with pytest.raises(ValueError, match=message) as raised:
        quantize_embeddings(one, precision)
    assert isinstance(raised.value, InputError)
    assert raised.value.argument == "embeddings"
    with pytest.raises(InputError, match=message):
        quantize_embeddings(random(0, 9, 4), precision, calibration_embeddings=one)


VECTORS = random(0, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "argument"),
    [
        ({"embeddings": None}, InputTypeError, "embeddings"),
        ({"embeddings": "text"}, InputTypeError, "embeddings"),
        ({"embeddings": ["text"]}, InputTypeError, "embeddings"),
        ({"embeddings": VECTORS.astype(np.int8)}, InputTypeError, "embeddings"),
        ({"embeddings": torch.ones(2, 4, dtype=torch.uint8)}, InputTypeError, "embeddings"),
        ({"embeddings": VECTORS * 1j}, InputTypeError, "embeddings"),
        ({"embeddings": [[1.0, 2.0], [1.0]]}, InputTypeError, "embeddings"),
        ({"embeddings": [torch.ones(4), torch.ones(3)]}, InputError, "embeddings"),
        ({"embeddings": np.ones((2, 2, 4))}, InputError, "embeddings"),
        (
            {"embeddings": [[1.0, 0.0, 0.0, 0.0], [1.0, math.nan, 0.0, 0.0]]},
            InputError,
            "embeddings",
        ),
        ({"ranges": model_ranges(3)}, InputError, "ranges"),
        ({"ranges": model_ranges(4)[:1]}, InputError, "ranges"),
        ({"ranges": model_ranges(4)[::-1]}, InputError, "ranges"),
        ({"ranges": model_ranges(4) * math.nan}, InputError, "ranges"),
        ({"ranges": "auto"}, InputTypeError, "ranges"),
        ({"ranges": None, "calibration_embeddings": random(0, 9, 3)}, InputError, "ranges"),
        (
            {"ranges": None, "calibration_embeddings": np.full((9, 4), math.nan)},
            InputError,
            "calibration_embeddings",
        ),
        ({"ranges": None, "calibration_embeddings": "x"}, InputTypeError, "calibration_embeddings"),
    ],
)
def test_quantize_names_the_argument(
    arguments: dict[str, Any], error: type[InputError], argument: str
) -> None:
    defaults: dict[str, Any] = {
        "embeddings": VECTORS,
        "precision": "int8",
        "ranges": model_ranges(4),
    }
    with pytest.raises(error, match=argument) as raised:
        quantize_embeddings(**(defaults | arguments))
    assert raised.value.argument == argument


@pytest.mark.parametrize(
    ("arguments", "error", "argument"),
    [
        ({"codes": VECTORS}, InputTypeError, "codes"),
        ({"codes": np.zeros((2, 4), np.uint8)}, InputTypeError, "codes"),
        ({"ranges": None}, InputError, "ranges"),
        ({"ranges": model_ranges(5)}, InputError, "ranges"),
        ({"precision": "binary", "width": 24}, InputError, "width"),
        ({"precision": "binary", "width": 33}, InputError, "width"),
        ({"precision": "binary", "width": 0}, InputError, "width"),
        ({"precision": "binary", "width": 30.0}, InputTypeError, "width"),
    ],
)
def test_dequantize_names_the_argument(
    arguments: dict[str, Any], error: type[InputError], argument: str
) -> None:
    codes = np.zeros((2, 4), np.int8)
    defaults: dict[str, Any] = {"codes": codes, "precision": "int8", "ranges": model_ranges(4)}
    with pytest.raises(error, match=argument) as raised:
        dequantize(**(defaults | arguments))
    assert raised.value.argument == argument


# and back


def test_back_by_hand() -> None:
    ranges = [[0.0], [510.0]]
    codes = np.array([[0], [1], [255]], np.uint8)
    same(dequantize(codes, "uint8", ranges), [[1.0], [3.0], [511.0]], np.float32)
    same(
        dequantize((codes - 128).view(np.int8), "int8", ranges), [[1.0], [3.0], [511.0]], np.float32
    )
    same(dequantize(np.zeros((1, 1), np.uint8), "uint8", [[7.0], [7.0]]), [[7.0]], np.float32)


def test_bits_back_by_hand() -> None:
    codes = np.array([[0b10010111, 0b10000000]], np.uint8)
    signs = np.array([[1, -1, -1, 1, -1, 1, 1, 1, 1, -1]])
    back = dequantize(codes, "ubinary", width=10)
    same(back, (signs / math.sqrt(10)).astype(np.float32), np.float32)
    same(dequantize((codes - 128).view(np.int8), "binary", width=10), back, np.float32)
    assert dequantize(codes, "ubinary").shape == (1, 16)
    assert dequantize(torch.from_numpy(codes), "ubinary", width=9).shape == (1, 9)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_back_is_within_half_a_bucket(precision: str) -> None:
    rows = random(10, 500, 7)
    ranges = np.stack([rows.min(0), rows.max(0)])
    codes = quantize_embeddings(rows, precision, ranges)
    error = np.abs(dequantize(codes, precision, ranges) - rows)
    half = (ranges[1] - ranges[0]) / 510
    assert (error <= half * 1.001).all()
    assert (error.max(0) > half * 0.9).all()
    again = quantize_embeddings(dequantize(codes, precision, ranges), precision, ranges)
    np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_keep_the_signs(precision: str) -> None:
    rows = random(11, 20, 13)
    back = dequantize(quantize_embeddings(rows, precision), precision, width=13)
    np.testing.assert_array_equal(back > 0, rows > 0)
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), 1, rtol=1e-6)


def test_float32_back() -> None:
    rows = random(12, 2, 3)
    same(dequantize(rows, "float32"), rows, np.float32)


# the fixed ranges


def test_fixed_ranges_round_to_the_nearest_384th() -> None:
    ranges = model_ranges()
    assert ranges.shape == (2, 384)
    assert ranges.dtype == np.float32
    assert (ranges[0] == np.float32(-128.5 * STEP)).all()
    assert (ranges[1] == np.float32(126.5 * STEP)).all()
    numbers = np.zeros((2, 384), np.float32)
    numbers[0, :7] = np.array([0, 1, -1, 0.49, 0.51, 127, -128]) * STEP
    numbers[1, :4] = [0.5, -0.5, 127.4 * STEP, -128.4 * STEP]
    codes = quantize_embeddings(numbers, "int8", ranges)
    assert codes[0, :8].tolist() == [0, 1, -1, 0, 1, 127, -128, 0]
    assert codes[1, :5].tolist() == [127, -128, 127, -128, 0]
    back = dequantize(codes, "int8", ranges)
    np.testing.assert_allclose(back, codes * STEP, rtol=0, atol=6e-8)  # a last bit of 0.33


def test_fixed_ranges_make_codes_comparable() -> None:
    vectors = unit(random(13, 200, 384))
    together = quantize_embeddings(vectors, "int8", model_ranges())
    alone = [quantize_embeddings(vector, "int8", model_ranges()) for vector in vectors]
    np.testing.assert_array_equal(together, np.stack(alone))
    # The product of codes is that of the vectors: each number is off by 0.29 of a step in root mean
    # square, and the product of two vectors of length 1 by √2 times that.
    products = together.astype(np.float64) @ together.T.astype(np.float64) * STEP**2
    error = products - vectors.astype(np.float64) @ vectors.T
    assert np.sqrt(np.mean(error**2)) < 1.1 * math.sqrt(2) * 0.29 * STEP
    assert np.abs(error).max() < 6 * math.sqrt(2) * 0.29 * STEP


@pytest.mark.parametrize("width", [1, 16, 96, 383])
def test_fixed_ranges_of_truncated_vectors(width: int) -> None:
    np.testing.assert_array_equal(model_ranges(width), model_ranges()[:, :width])
    longer = model_ranges(width, unit_after_truncation=True)
    assert longer.shape == (2, width)
    np.testing.assert_allclose(longer, model_ranges(width) * math.sqrt(384 / width), rtol=1e-6)
    same(model_ranges(width, False, unit_after_truncation=True), longer, np.float32)
    np.testing.assert_array_equal(model_ranges(unit_after_truncation=True), model_ranges())


def test_fixed_ranges_are_a_fresh_array() -> None:
    model_ranges()[:] = 0
    assert (model_ranges()[1] > 0).all()


@pytest.mark.parametrize(
    ("width", "error"), [(0, InputError), (385, InputError), (3.0, InputTypeError)]
)
def test_fixed_ranges_have_a_width(width: Any, error: type[InputError]) -> None:
    with pytest.raises(error, match="width") as raised:
        model_ranges(width)
    assert raised.value.argument == "width"


def test_the_shipped_file_says_where_it_came_from() -> None:
    data = json.loads((ROOT / "minilm" / "int8_ranges.json").read_text(encoding="utf-8"))
    assert data["model_safetensors_sha256"] == SHA256["model.safetensors"]
    assert (ROOT / data["script"].split()[0]).is_file()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"])
    assert "STS17" in data["corpus"]
    assert data["normalized"]["step"] == STEP
    assert has_model_ranges(SHA256["model.safetensors"])
    assert not has_model_ranges("0" * 64)


TEXTS = [
    "A man is eating food.", "hi", "", "The stock market fell sharply on Monday.", "x" * 300,
    "Quantum chromodynamics describes the strong interaction between quarks and gluons.",
    "你好，世界", "🙂🙂🙂", "1 2 3 4 5 6 7 8 9 10", "SELECT * FROM users WHERE id = 1;",
]  # fmt: skip


def test_real_vectors_fit_the_fixed_ranges(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(TEXTS)
    codes = quantize_embeddings(vectors, "int8", model_ranges())
    error = np.abs(codes * STEP - vectors)
    assert np.mean(error > STEP / 2 + 1e-7) < 2e-3  # one in the text without a word
    cosine = unit(codes.astype(np.float64)) @ unit(codes.astype(np.float64)).T
    assert np.abs(cosine - vectors @ vectors.T).max() < 0.015
    for width in (64, 256):
        cut = unit(vectors[:, :width])
        ranges = model_ranges(width, unit_after_truncation=True)
        back = dequantize(quantize_embeddings(cut, "int8", ranges), "int8", ranges)
        assert np.abs(unit(back) @ unit(back).T - cut @ cut.T).max() < 0.02


def test_pooled_vectors_fit_theirs(encoder: SentenceEncoder) -> None:
    pooling = SentenceEncoder(
        modules=list(encoder)[:2], tokenizer=encoder.tokenizer, max_seq_length=256
    )
    vectors = pooling.encode([TEXTS[0], TEXTS[3], TEXTS[5]])
    ranges = model_ranges(normalized=False)
    back = dequantize(quantize_embeddings(vectors, "int8", ranges), "int8", ranges)
    assert np.abs(back - vectors).max() <= model_ranges(normalized=False)[1, 0] / 253 + 1e-6
    assert np.abs(vectors).max() > model_ranges()[1, 0]


# beside the reference


@pytest.fixture(scope="module")
def theirs() -> Any:
    package = pytest.importorskip(
        "sentence_transformers", reason="needs the reference: pip install 'minilm[reference]'"
    )
    if int(package.__version__.split(".")[0]) < 6:
        pytest.skip("before version 6 the reference's bytes wrap around")
    module = importlib.import_module("sentence_transformers.util")
    return module.quantize_embeddings


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("width", [8, 384])
def test_the_references_codes(theirs: Any, precision: str, dtype: Any, width: int) -> None:
    rows, calibration = random(14, 150, width).astype(dtype), random(15, 120, width)
    ranges = np.stack([calibration.min(0), calibration.max(0)])
    for arguments in ({}, {"ranges": ranges}, {"calibration_embeddings": calibration}):
        ours = quantize_embeddings(rows, precision, **arguments)
        expected = theirs(rows, precision, **arguments)
        same(ours, expected, expected.dtype)


@pytest.mark.reference
@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_the_references_codes_of_real_vectors(
    theirs: Any, encoder: SentenceEncoder, precision: str
) -> None:
    path = SHARED / "sts" / "STS17.en-en.tsv"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    vectors = encoder.encode([line.split("\t")[1] for line in lines])
    expected = theirs(vectors, precision)
    same(quantize_embeddings(vectors, precision), expected, expected.dtype)


def test_numbers_that_float32_does_not_hold() -> None:
    with pytest.raises(InputError, match="embeddings has numbers beyond what float32 holds"):
        quantize_embeddings(np.array([[1.0, 1e200]]), "float32")
    ranges = np.array([[-3e38], [3e38]], np.float32)
    message = "ranges is wider than float32 holds"
    with pytest.raises(InputError, match=message) as info:
        quantize_embeddings(np.ones((1, 1)), "int8", ranges)
    assert info.value.argument == "ranges"
    with pytest.raises(InputError, match=message):
        dequantize(np.ones((1, 1), np.int8), "int8", ranges)

"""Vectors made with other settings than the plain ones are checked as they were made.

Plain ones are checked in test_fingerprint.py.
"""

from typing import Any

import numpy as np
import pytest
import torch

from minilm import SentenceEncoder
from minilm.errors import InputError
from minilm.inference.encode import model_ranges_of
from minilm.parity.check import check_vectors, dead_numbers
from minilm.pretrained.fingerprint import fingerprint
from minilm.quantize import quantize_embeddings

TEXTS = ["the dog bites the man", "a cat", "", "the sun is out . " * 6, "a dog sees a cat"]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompt": {"prompt": "the "},
    "chunk": {"truncation": "chunk"},
    "truncated": {"truncate_dim": 8},
    "truncated, length 1": {"truncate_dim": 8, "normalize_embeddings": True},
    "binary": {"precision": "binary"},
    "ubinary": {"precision": "ubinary"},
    "binary, truncated": {"precision": "binary", "truncate_dim": 12},
}


def encode(encoder: SentenceEncoder, **settings: Any) -> Any:
    return encoder.encode(TEXTS, **{"truncation": "silent"} | settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_vectors_are_checked_as_they_were_made(tiny_encoder: SentenceEncoder, name: str) -> None:
    record = fingerprint(tiny_encoder).for_call(**SETTINGS[name])
    vectors = encode(tiny_encoder, **SETTINGS[name])
    result = check_vectors(tiny_encoder, TEXTS, vectors, record)
    assert result.verdict in ("same", "rounding"), result.table()
    assert result.fingerprints_agree
    # And no other setting passes for it.
    for other, settings in SETTINGS.items():
        foreign = encode(tiny_encoder, **settings)
        if (
            foreign.shape != vectors.shape
            or other == name
            or {name, other} <= {"binary", "ubinary"}
        ):
            continue
        assert check_vectors(tiny_encoder, TEXTS, foreign, record).verdict == "model", other


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("truncated", [False, True])
def test_codes_of_the_published_model(
    encoder: SentenceEncoder, precision: str, truncated: bool
) -> None:
    settings: dict[str, Any] = {"precision": precision}
    if truncated:
        settings |= {"truncate_dim": 64, "normalize_embeddings": True}
    record = fingerprint(encoder).for_call(**settings)
    codes = encode(encoder, **settings)
    assert check_vectors(encoder, TEXTS, codes, record).verdict == "same"
    # As a file of decimals gives them back.
    assert check_vectors(encoder, TEXTS, codes.astype(np.float32), record).verdict == "same"
    flat = codes.copy()
    flat[1, 5] ^= 64
    result = check_vectors(encoder, TEXTS, flat, record)
    assert result.verdict == "model"
    assert result.worst[0][0] == 1
    shorter = SentenceEncoder(
        modules=[encoder.bert, encoder.pooling, encoder.normalize],
        tokenizer=encoder.tokenizer, max_seq_length=16,
    )  # fmt: skip
    if precision in ("binary", "ubinary"):
        found = check_vectors(shorter, TEXTS, codes, record)
        assert (found.verdict, found.limit) == ("limit", 256)
    else:
        with pytest.raises(InputError, match="with ranges of their own"):
            check_vectors(shorter, TEXTS, codes, record)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_of_dead_numbers_do_not_count(encoder: SentenceEncoder, precision: str) -> None:
    dead = dead_numbers(encoder)
    assert dead == [127, 223, 319]
    vectors = encode(encoder)
    assert np.abs(vectors[:, dead]).max() < 2e-7
    assert np.abs(vectors).max(axis=0)[np.setdiff1d(np.arange(384), dead)].min() > 1e-3
    record = fingerprint(encoder).for_call(precision=precision)
    halves = quantize_embeddings(vectors.astype(np.float16), precision)
    assert not np.array_equal(halves, encode(encoder, precision=precision))
    result = check_vectors(encoder, TEXTS, halves, record)
    assert result.summary == (
        f"same: equal, bit by bit after rounding to {precision}, where 127, 223, 319, which are "
        "always 0, don't count (5 of 5 rows checked)"
    )
    halves[0, 0] ^= 1  # of number 7
    assert check_vectors(encoder, TEXTS, halves, record).verdict != "same"


def test_bits_without_a_record(encoder: SentenceEncoder) -> None:
    vectors = encode(encoder)
    halves = quantize_embeddings(vectors.astype(np.float16), "ubinary")
    signed = quantize_embeddings(vectors, "binary")
    for codes, precision in ((halves, "ubinary"), (signed, "binary"), (halves / 1.0, "ubinary")):
        result = check_vectors(encoder, TEXTS, codes)
        assert result.verdict == "same"
        assert result.own.precision == precision
        assert result.recorded is None
    halves[1, 5] ^= 64
    result = check_vectors(encoder, TEXTS, halves)
    assert result.verdict == "model"
    assert result.reason.endswith("check plain float32 vectors to learn why")
    assert result.worst[0][0] == 1


def test_bits_in_another_order(encoder: SentenceEncoder) -> None:
    is_positive = encode(encoder) > 0
    lowest = np.packbits(is_positive, axis=1, bitorder="little")
    signed = np.packbits(is_positive, axis=1).view(np.int8)
    said = {}
    for name, codes in {"lowest": lowest, "signed": signed, "both": lowest.view(np.int8)}.items():
        result = check_vectors(encoder, TEXTS, codes)
        assert result.verdict == "model"
        said[name] = result.reason
    order = "the first number of each eight is in the lowest bit, not in the highest"
    plain = "the bytes are those of ubinary as they are, not 128 less"
    assert said["lowest"] == f"the bits are ours, but {order}"
    assert said["signed"] == f"the bits are ours, but {plain}"
    assert said["both"] == f"the bits are ours, but {plain}, and {order}"
    # Less 128, and from the lowest bit.
    result = check_vectors(encoder, TEXTS, (lowest.astype(np.int16) - 128).astype(np.int8))
    assert result.reason == f"the bits are ours, but {order}"


def test_what_is_not_bits(encoder: SentenceEncoder) -> None:
    count = len(TEXTS)
    for codes in (
        np.full((count, 48), 0.5, np.float32),
        np.full((count, 48), np.nan, np.float32),
        np.full((count, 48), 256.0),
        np.array([[-1, 200] * 24] * count, np.float64),
        np.zeros((count, 47), np.float32),
    ):
        result = check_vectors(encoder, TEXTS, codes)
        assert (result.verdict, result.checked) == ("model", 0)
        assert result.own.precision == "float32"
    for kind in (torch.zeros(count, 48, dtype=torch.bool), np.zeros((count, 384), np.int8)):
        with pytest.raises(InputError, match="pass floating-point vectors"):
            check_vectors(encoder, TEXTS, kind)


def test_a_model_without_dead_numbers(tiny_encoder: SentenceEncoder) -> None:
    assert dead_numbers(tiny_encoder) == []


def test_a_code_at_the_edge_of_its_bucket_is_rounding(encoder: SentenceEncoder) -> None:
    record = fingerprint(encoder).for_call(precision="int8")
    vectors = encode(encoder)
    codes = encode(encoder, precision="int8")
    ranges = model_ranges_of(encoder, None)
    steps = (vectors - ranges[0]) / ((ranges[1] - ranges[0]) / 255)
    row, column = np.unravel_index(np.abs(steps - steps.round()).argmin(), steps.shape)
    upper = steps[row, column] > np.floor(steps[row, column]) + 0.5
    codes[row, column] += 1 if upper else -1
    result = check_vectors(encoder, TEXTS, codes, record)
    assert result.max_abs < 1e-5
    assert result.verdict == ("rounding" if result.max_abs <= 2e-6 else "model")


def test_codes_without_a_record_are_refused(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match=r"vectors has dtype int8; .* the fingerprint"):
        check_vectors(tiny_encoder, TEXTS, (127 * encode(tiny_encoder)).astype(np.int8))


def test_shortest_decimals_are_the_same(tiny_encoder: SentenceEncoder) -> None:
    vectors = encode(tiny_encoder)
    decimals = np.array([[float(str(number)) for number in row] for row in vectors])
    assert not np.array_equal(decimals, vectors.astype(np.float64))
    result = check_vectors(tiny_encoder, TEXTS, decimals)
    assert result.summary.startswith("same: equal, bit by bit in float32 (5 of 5")

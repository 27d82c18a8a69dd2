"""encode and what is around it, on the tiny model: prompts, forms of a result, errors, options."""

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from minilm import SentenceEncoder
from minilm.errors import (
    InputError,
    InputTypeError,
    NotFiniteError,
    TruncationError,
    TruncationWarning,
)
from minilm.inference import compute
from minilm.inference.compute import extras_of, with_prompt
from minilm.inference.encode import _POSITIONAL
from minilm.inference.truncation import split
from minilm.inputs import EncodeOptions
from minilm.pretrained.hub import AccessToken
from minilm.pretrained.options import load_options
from minilm.quantize import model_ranges, quantize_embeddings
from minilm.similarity import SimilarityFunction
from minilm.util import is_singular_input

TEXTS = ["the dog bites the man", "", "a cat", "the sun is out .", "man sees dog", "a"]
PAIRS = [("the dog", "a man"), ("a cat sees the sun", "out"), ("", "a")]
BATCH_ROUNDING = 4e-7  # float32 results differ by this much between batches of other shapes


@pytest.fixture
def prompted(tiny_encoder: SentenceEncoder) -> SentenceEncoder:
    tiny_encoder.prompts = {"query": "the ", "passage": "a ", "corpus": "dog ", "mine": "cat "}
    return tiny_encoder


def same(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a, b)


# --- prompts


def test_prompt_is_put_in_front(prompted: SentenceEncoder) -> None:
    by_hand = prompted.encode([f"cat {text}" for text in TEXTS])
    same(prompted.encode(TEXTS, prompt="cat "), by_hand)
    same(prompted.encode(TEXTS, prompt_name="mine"), by_hand)
    prompted.default_prompt_name = "mine"
    same(prompted.encode(TEXTS), by_hand)
    same(prompted.encode(TEXTS[0]), by_hand[0])
    same(prompted.encode(TEXTS, prompt=""), prompted.encode(TEXTS, prompt_name=None, prompt=""))
    assert not np.array_equal(prompted.encode(TEXTS, prompt=""), by_hand)


def test_prompt_is_put_in_front_of_the_first_of_a_pair(prompted: SentenceEncoder) -> None:
    assert with_prompt(["b", ("c", "d")], "a ") == ["a b", ("a c", "d")]
    same(prompted.encode(PAIRS, prompt_name="mine"), prompted.encode(with_prompt([*PAIRS], "cat ")))


def test_prompt_wins_over_its_name_with_one_warning(
    prompted: SentenceEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        vectors = prompted.encode(TEXTS, prompt="dog ", prompt_name="mine")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].getMessage() == (
        "Provide either a `prompt`, a `prompt_name`, or neither, but not both. "
        "Ignoring the `prompt_name` in favor of `prompt`."
    )
    same(vectors, prompted.encode(TEXTS, prompt="dog "))


def test_unknown_prompt_name(prompted: SentenceEncoder) -> None:
    with pytest.raises(InputError) as caught:
        prompted.encode(TEXTS, prompt_name="x")
    assert str(caught.value) == (
        "Prompt name 'x' not found in the configured prompts dictionary with keys "
        "['query', 'passage', 'corpus', 'mine']."
    )
    assert caught.value.argument == "prompt_name"


@pytest.mark.parametrize("prompt", [5, b"a", ["a"]])
def test_prompt_must_be_text(tiny_encoder: SentenceEncoder, prompt: Any) -> None:
    with pytest.raises(InputTypeError, match=r"^prompt is "):
        tiny_encoder.encode(TEXTS, prompt=prompt)


def test_output_of_everything_tells_the_length_of_the_prompt(prompted: SentenceEncoder) -> None:
    assert extras_of(prompted, "cat ") == {"modality": "text", "prompt_length": 2}  # [CLS] cat
    assert extras_of(prompted, "") == {"modality": "text"}
    for row in prompted.encode(TEXTS, prompt="cat ", output_value=None):
        assert row["prompt_length"] == 2


# --- encode_query, encode_document


def called(encoder: SentenceEncoder, method: str, *given: Any, **options: Any) -> dict[str, Any]:
    """The keywords that `encode` gets, as sentence-transformers' own tests look at them."""
    with patch.object(encoder, "encode", autospec=True) as encode:
        getattr(encoder, method)(*given, **options)
    encode.assert_called_once()
    return dict(encode.call_args.kwargs)


@pytest.mark.parametrize("sentences", ["a", TEXTS, [], [""]])
@pytest.mark.parametrize("prompt", [None, "dog "])
@pytest.mark.parametrize("prompt_name", [None, "mine"])
def test_encode_query_calls_encode(
    prompted: SentenceEncoder, sentences: Any, prompt: str | None, prompt_name: str | None
) -> None:
    options = {"prompt": prompt, "prompt_name": prompt_name, "batch_size": 32}
    keywords = called(prompted, "encode_query", sentences=sentences, **options)
    assert keywords["sentences"] == sentences
    assert keywords["prompt"] == prompt
    assert keywords["prompt_name"] == (
        "query" if (prompt, prompt_name) == (None, None) else prompt_name
    )
    assert keywords["task"] == "query"
    assert keywords["batch_size"] == 32
    assert called(prompted, "encode_query", inputs=sentences)["inputs"] == sentences


def test_prompts_for_documents_have_their_order(prompted: SentenceEncoder) -> None:
    prompts = {"query": "a", "corpus": "b", "passage": "c", "document": "d"}
    for name in ("document", "passage", "corpus", None):
        prompted.prompts = prompts
        keywords = called(prompted, "encode_document", "a cat")
        assert keywords["prompt_name"] == name
        assert keywords["task"] == "document"
        prompts = {key: text for key, text in prompts.items() if key != name}
    prompted.prompts = {}
    assert called(prompted, "encode_query", "a cat")["prompt_name"] is None


def test_query_and_document_vectors(prompted: SentenceEncoder) -> None:
    same(prompted.encode_query(TEXTS), prompted.encode(TEXTS, prompt="the "))
    same(prompted.encode_document(TEXTS), prompted.encode(TEXTS, prompt="a "))
    same(prompted.encode_document(TEXTS, prompt="dog "), prompted.encode(TEXTS, prompt="dog "))
    assert prompted.encode_query("a cat").shape == (32,)


def test_positional_arguments_of_query_and_document(prompted: SentenceEncoder) -> None:
    positional = (TEXTS, None, "dog ", 2, False, "sentence_embedding", "float32", False, True)
    vectors = prompted.encode_query(*positional)
    assert isinstance(vectors, Tensor)
    same(vectors, prompted.encode(*positional))
    same(vectors, prompted.encode_document(*positional))


def test_unknown_keywords_pass_to_encode_which_refuses_them(prompted: SentenceEncoder) -> None:
    assert called(prompted, "encode_query", "a", custom=1)["custom"] == 1
    for method in (prompted.encode, prompted.encode_query, prompted.encode_document):
        with pytest.raises(InputTypeError, match="encode has no argument custom, more") as caught:
            method("a", custom=1, more=2)
        assert caught.value.argument == "custom"


# --- arguments


def test_order_of_the_positional_arguments() -> None:
    # As in sentence-transformers 5.1 and 6.2.
    assert list(inspect.signature(SentenceEncoder.encode).parameters)[2:15] == [
        "prompt_name", "prompt", "batch_size", "show_progress_bar", "output_value", "precision",
        "convert_to_numpy", "convert_to_tensor", "device", "normalize_embeddings", "truncate_dim",
        "pool", "chunk_size",
    ]  # fmt: skip
    assert list(inspect.signature(SentenceEncoder.encode).parameters)[4:15] == [*_POSITIONAL]


def test_options_are_those_of_encode() -> None:
    names = set(inspect.signature(SentenceEncoder.encode).parameters)
    assert set(EncodeOptions.__annotations__) <= names


def test_texts_have_two_names(tiny_encoder: SentenceEncoder) -> None:
    vectors = tiny_encoder.encode(TEXTS)
    same(tiny_encoder.encode(sentences=TEXTS), vectors)
    same(tiny_encoder.encode(inputs=TEXTS), vectors)
    with pytest.raises(InputTypeError, match="pass texts"):
        tiny_encoder.encode()
    with pytest.raises(InputTypeError, match="both name the texts"):
        tiny_encoder.encode(TEXTS, inputs=TEXTS)
    with pytest.raises(InputTypeError, match=r"^inputs\[1\] is None"):
        tiny_encoder.encode(inputs=["a", None])
    with pytest.raises(InputTypeError, match=r"^sentences is None"):
        tiny_encoder.encode(None)


def test_task_has_no_effect(tiny_encoder: SentenceEncoder) -> None:
    same(tiny_encoder.encode(TEXTS, task="query"), tiny_encoder.encode(TEXTS))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"output_value": "cls"}, "output_value"),
        ({"precision": "float16"}, "precision"),
        ({"precision": "int8", "output_value": "token_embeddings"}, "precision"),
        ({"precision": "binary", "output_value": None}, "precision"),
        ({"truncate_dim": 0}, "truncate_dim"),
        ({"truncate_dim": -1}, "truncate_dim"),
        ({"truncate_dim": 2.0}, "truncate_dim"),
        ({"truncate_dim": "16"}, "truncate_dim"),
        ({"truncate_dim": True}, "truncate_dim"),
        ({"batch_size": 0}, "batch_size"),
        ({"token_budget": 0}, "token_budget"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 2.0}, "chunk_size"),
        ({"truncation": "cut"}, "truncation"),
        ({"device": "nonsense"}, "device"),
        ({"device": 5.0}, "device"),
        ({"device": []}, "target_devices"),
        ({"pool": {"input": None, "output": None, "processes": []}}, "pool"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    tiny_encoder: SentenceEncoder, options: dict[str, Any], argument: str
) -> None:
    with pytest.raises(InputError) as caught:
        tiny_encoder.encode(TEXTS, **options)
    assert caught.value.argument == argument
    assert next(iter(options)) in str(caught.value)[:60].lower() or argument in str(caught.value)
    with pytest.raises(InputError):  # no texts hide no mistake
        tiny_encoder.encode([], **options)


# --- forms of the result


def test_token_embeddings(tiny_encoder: SentenceEncoder) -> None:
    rows = tiny_encoder.encode(TEXTS, output_value="token_embeddings")
    assert isinstance(rows, list)
    assert [len(row) for row in rows] == tiny_encoder.token_counts(TEXTS) == [7, 2, 4, 7, 5, 3]
    for row, text in zip(rows, TEXTS, strict=True):
        forward = tiny_encoder(tiny_encoder.tokenize(text))["token_embeddings"][0]
        torch.testing.assert_close(row, forward.detach(), rtol=0, atol=5e-6)
        assert not row.requires_grad
        pooled = torch.nn.functional.normalize(row.mean(0), dim=0)
        np.testing.assert_allclose(pooled, tiny_encoder.encode(text), atol=BATCH_ROUNDING)
    single = tiny_encoder.encode(TEXTS[0], output_value="token_embeddings")
    torch.testing.assert_close(single, rows[0], rtol=0, atol=5e-6)
    rows[0][0] = 0  # its own memory
    assert rows[1].abs().sum() > 0


def test_everything(tiny_encoder: SentenceEncoder) -> None:
    rows = tiny_encoder.encode(TEXTS, output_value=None)
    vectors = tiny_encoder.encode(TEXTS)
    for row, vector, count in zip(rows, vectors, tiny_encoder.token_counts(TEXTS), strict=True):
        assert set(row) == {
            "input_ids", "token_type_ids", "attention_mask", "modality", "token_embeddings",
            "sentence_embedding",
        }  # fmt: skip
        assert row["input_ids"].shape == row["attention_mask"].shape == (7,)  # padded
        assert row["token_embeddings"].shape == (7, 32)
        assert int(row["attention_mask"].sum()) == count
        np.testing.assert_allclose(row["sentence_embedding"], vector, atol=BATCH_ROUNDING)
    assert isinstance(tiny_encoder.encode("a", output_value=None), dict)
    narrow = tiny_encoder.encode(TEXTS, output_value=None, truncate_dim=8)
    assert {len(row["sentence_embedding"]) for row in narrow} == {8}


def test_normalize_comes_after_truncation(tiny_encoder: SentenceEncoder) -> None:
    full = tiny_encoder.encode(TEXTS)
    cut = tiny_encoder.encode(TEXTS, truncate_dim=8)
    same(cut, full[:, :8])
    assert (np.linalg.norm(cut, axis=1) < 0.99).all()
    unit = tiny_encoder.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    expected = full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(unit, expected, atol=1e-7)
    assert unit.flags.c_contiguous
    assert unit.flags.writeable
    assert tiny_encoder.encode(TEXTS, truncate_dim=1000).shape == (6, 32)


FORMS: dict[str, Any] = {
    "numpy": {},
    "list": {"convert_to_numpy": False},
    "tensor": {"convert_to_tensor": True},
}
CODES: dict[str, Any] = {"int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize(("width", "normalize"), [(None, False), (12, False), (12, True)])
def test_codes_are_those_of_the_vectors(
    tiny_encoder: SentenceEncoder, form: str, precision: str, width: int | None, normalize: bool
) -> None:
    common: dict[str, Any] = {"truncate_dim": width, "normalize_embeddings": normalize}
    expected = quantize_embeddings(tiny_encoder.encode(TEXTS, **common), precision)
    codes: Any = tiny_encoder.encode(TEXTS, precision=precision, **common, **FORMS[form])
    assert type(codes).__name__ == {"numpy": "ndarray", "list": "list", "tensor": "Tensor"}[form]
    same(np.stack([np.asarray(row) for row in codes]), expected)
    assert np.asarray(codes[0]).dtype == CODES[precision]


def test_one_text_has_no_ranges_of_its_own(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match="single embedding"):
        tiny_encoder.encode("a cat", precision="int8")
    assert tiny_encoder.encode("a cat", precision="binary").shape == (4,)


def test_int8_of_the_published_model_has_fixed_ranges(encoder: SentenceEncoder) -> None:
    alone = encoder.encode("a cat", precision="int8")
    many = encoder.encode(["a cat", "the dog bites the man"], precision="int8")
    same(alone, many[0])
    same(alone, quantize_embeddings(encoder.encode("a cat"), "int8", model_ranges()))
    narrow = encoder.encode("a cat", precision="uint8", truncate_dim=64, normalize_embeddings=True)
    unit = encoder.encode("a cat", truncate_dim=64, normalize_embeddings=True)
    same(narrow, quantize_embeddings(unit, "uint8", model_ranges(64, unit_after_truncation=True)))


@pytest.mark.parametrize("sentences", [[], (), np.array([], object), iter([])])
def test_no_texts(tiny_encoder: SentenceEncoder, sentences: Any) -> None:
    vectors = tiny_encoder.encode(sentences)
    assert vectors.shape == (0, 32)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize(
    ("form", "precision", "width", "normalize"),
    list(product(FORMS, [None, "float32", *CODES], [None, 8, 12], [False, True])),
)
def test_no_texts_in_every_form(
    tiny_encoder: SentenceEncoder, form: str, precision: Any, width: Any, normalize: bool
) -> None:
    options: Any = {"precision": precision, "truncate_dim": width, **FORMS[form]}
    result: Any = tiny_encoder.encode([], normalize_embeddings=normalize, **options)
    if form == "list":
        assert result == []
        return
    numbers = width or 32
    if precision in ("binary", "ubinary"):
        numbers = math.ceil(numbers / 8)
    assert result.shape == (0, numbers)
    dtype = np.dtype(CODES.get(precision, np.float32)).name
    assert str(result.dtype).removeprefix("torch.") == dtype


def test_no_texts_otherwise(tiny_encoder: SentenceEncoder) -> None:
    assert tiny_encoder.encode([], output_value="token_embeddings") == []
    assert tiny_encoder.encode([], output_value=None) == []
    vectors, report = tiny_encoder.encode([], return_report=True)
    assert vectors.shape == (0, 32)
    assert len(report) == 0
    assert tiny_encoder.preprocess([]) == {}
    assert tiny_encoder.token_counts([]) == []
    with pytest.raises(InputError, match="sentences is empty"):
        tiny_encoder.tokenize([])
    assert tiny_encoder.half().encode([]).dtype == np.float16


# --- truncate_dim


def test_truncate_dim_as_attribute_argument_and_context(tiny_encoder: SentenceEncoder) -> None:
    assert tiny_encoder.truncate_dim is None
    assert tiny_encoder.get_sentence_embedding_dimension() == 32
    tiny_encoder.truncate_dim = 8
    assert tiny_encoder.encode(TEXTS).shape == (6, 8)
    assert tiny_encoder.encode(TEXTS, truncate_dim=4).shape == (6, 4)
    assert tiny_encoder.get_sentence_embedding_dimension() == 8
    assert tiny_encoder.get_embedding_dimension() == 8
    with tiny_encoder.truncate_embeddings(None):
        assert tiny_encoder.encode("a").shape == (32,)
        with tiny_encoder.truncate_sentence_embeddings(100):
            assert tiny_encoder.get_embedding_dimension() == 32
        assert tiny_encoder.truncate_dim is None
    assert tiny_encoder.truncate_dim == 8
    with pytest.raises(KeyError), tiny_encoder.truncate_embeddings(4):
        raise KeyError
    assert tiny_encoder.truncate_dim == 8


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def test_each_thread_and_task_has_a_context_of_its_own(tiny_encoder: SentenceEncoder) -> None:
    def width() -> int:
        return len(tiny_encoder.encode("a"))

    first = tiny_encoder.truncate_embeddings(4)
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        second = tiny_encoder.truncate_embeddings(8)
        other.submit(second.__enter__).result()
        assert (width(), other.submit(width).result(), in_a_thread(width)) == (4, 8, 32)
        first.__exit__(None, None, None)
        tiny_encoder.truncate_dim = 16  # not lost when the other ends
        assert (width(), other.submit(width).result()) == (16, 8)
        other.submit(second.__exit__, None, None, None).result()
        assert (width(), other.submit(width).result()) == (16, 16)

    async def task(truncate_dim: int, until: asyncio.Event, then: asyncio.Event) -> int:
        with tiny_encoder.truncate_embeddings(truncate_dim):
            then.set()
            await until.wait()
            return await asyncio.to_thread(width)

    async def two() -> list[int]:
        a, b = asyncio.Event(), asyncio.Event()
        return list(await asyncio.gather(task(4, a, b), task(8, b, a)))

    assert asyncio.run(two()) == [4, 8]
    assert tiny_encoder.truncate_dim == 16


def test_contexts_of_generators_end_in_any_order(tiny_encoder: SentenceEncoder) -> None:
    def widths(truncate_dim: int) -> Generator[int | None]:
        with tiny_encoder.truncate_embeddings(truncate_dim):
            yield tiny_encoder.truncate_dim

    first, second = widths(4), widths(8)
    assert [next(first), next(second)] == [4, 8]
    assert list(first) == []
    assert tiny_encoder.truncate_dim == 8
    in_a_thread(second.close)  # as the garbage collector may do
    assert tiny_encoder.truncate_dim is None


def test_a_call_reads_its_settings_once(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ["the dog bites a cat " * 10, "sun"]
    expected = tiny_encoder.encode(long, truncation="chunk")

    def changed(*arguments: Any) -> Any:
        tiny_encoder.max_seq_length, tiny_encoder.truncate_dim = 5, 8
        return split(*arguments)

    monkeypatch.setattr("minilm.inference.compute.split", changed)
    same(tiny_encoder.encode(long, truncation="chunk"), expected)
    assert tiny_encoder.truncate_dim == 8

    tiny_encoder.max_seq_length, tiny_encoder.truncate_dim = 12, None
    with tiny_encoder.truncate_embeddings(4):
        stream = tiny_encoder.encode_stream(TEXTS, window=2)
    tiny_encoder.default_prompt_name = "query"
    tiny_encoder.prompts["query"] = "dog "
    expected = tiny_encoder.encode(TEXTS, prompt="", truncate_dim=4)
    first = next(stream)
    tiny_encoder.truncate_dim = 16
    np.testing.assert_allclose([first, *stream], expected, atol=BATCH_ROUNDING)


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True])
def test_bad_truncate_dim_is_refused_and_changes_nothing(
    tiny_encoder: SentenceEncoder, value: Any
) -> None:
    tiny_encoder.truncate_dim = 8
    with pytest.raises(InputError, match=r"^truncate_dim is "):
        tiny_encoder.truncate_dim = value
    with pytest.raises(InputError), tiny_encoder.truncate_embeddings(value):
        pass
    assert tiny_encoder.truncate_dim == 8


# --- pairs


def test_a_pair_is_read_together(tiny_encoder: SentenceEncoder) -> None:
    features = tiny_encoder.tokenize([("the dog", "a man")])
    assert features["input_ids"].tolist() == [[2, 5, 7, 3, 6, 9, 3]]  # [CLS] A [SEP] B [SEP]
    assert features["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    vector = tiny_encoder.encode([("the dog", "a man")])[0]
    expected = tiny_encoder(features)["sentence_embedding"][0].detach()
    np.testing.assert_allclose(vector, expected, atol=BATCH_ROUNDING)
    no_types = {name: features[name] for name in ("input_ids", "attention_mask")}
    without = tiny_encoder(no_types)["sentence_embedding"][0].detach()
    assert np.abs(vector - without.numpy()).max() > 1e-3


def test_pairs_in_any_form_and_among_texts(tiny_encoder: SentenceEncoder) -> None:
    vectors = tiny_encoder.encode(PAIRS)
    for form in ([list(pair) for pair in PAIRS], np.array(PAIRS), iter(PAIRS), tuple(PAIRS)):
        same(tiny_encoder.encode(form), vectors)
    mixed = tiny_encoder.encode([TEXTS[0], PAIRS[0], TEXTS[1], PAIRS[2]])
    for row, text in enumerate([TEXTS[0], PAIRS[0], TEXTS[1], PAIRS[2]]):
        same(mixed[row], tiny_encoder.encode([text])[0])
    tokens = tiny_encoder.encode([TEXTS[0], PAIRS[0]], output_value="token_embeddings")
    assert [len(row) for row in tokens] == [7, 7]
    rows = tiny_encoder.encode([TEXTS[2], PAIRS[0]], output_value=None)
    assert rows[0]["token_type_ids"].tolist() == [0] * 7
    assert rows[1]["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("pair", [("a",), ("a", "b", "c"), ()])
def test_two_texts_make_a_pair(tiny_encoder: SentenceEncoder, pair: Any) -> None:
    with pytest.raises(InputError, match=rf"sentences\[1\] has {len(pair)} parts"):
        tiny_encoder.encode(["a", pair])
    with pytest.raises(InputTypeError, match=r"sentences\[0\]\[1\] is None"):
        tiny_encoder.encode([("a", None)])


def test_pairs_with_chunks_are_refused(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match=r"sentences\[1\] is a pair"):
        tiny_encoder.encode(["a", ("the dog " * 9, "a man")], truncation="chunk")


# --- vectors that are no numbers


def test_nan_weights_are_an_error_with_rows_and_reason(tiny_encoder: SentenceEncoder) -> None:
    with torch.no_grad():
        tiny_encoder.get_parameter("bert.layers.1.feed_forward.output.bias")[0] = torch.nan
    for form in FORMS.values():
        with pytest.raises(NotFiniteError, match="the weights have NaN or infinity") as caught:
            tiny_encoder.encode(TEXTS, **form)
        assert caught.value.rows == list(range(6))
    assert "6 vectors have NaN or infinity; first: sentences[0]" in str(caught.value)


def test_only_the_row_with_a_nan_word_is_bad(tiny_encoder: SentenceEncoder) -> None:
    with torch.no_grad():
        tiny_encoder.bert.embeddings.word_embeddings.weight[8] = torch.nan  # cat
    with pytest.raises(NotFiniteError) as caught:
        tiny_encoder.encode(TEXTS)
    assert caught.value.rows == [2]
    good = [text for text in TEXTS if "cat" not in text]
    assert np.isfinite(tiny_encoder.encode(good)).all()
    with pytest.raises(NotFiniteError) as caught:
        list(tiny_encoder.encode_stream(["a"] * 5 + ["cat"], window=2))
    assert caught.value.rows == [5]  # counted from the start of the stream


def test_overflow_of_float16_is_an_error(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.half()
    with torch.no_grad():
        tiny_encoder.get_parameter("bert.layers.0.feed_forward.output.weight").fill_(60000)
    with pytest.raises(
        NotFiniteError, match=r"beyond what torch.float16 holds; load it in float32"
    ):
        tiny_encoder.encode(TEXTS)


# --- reports


def test_report(tiny_encoder: SentenceEncoder) -> None:
    texts = ["the dog", "the dog " * 9, ("a man", "cat")]
    vectors, report = tiny_encoder.encode(texts, return_report=True, truncation="silent")
    same(vectors, tiny_encoder.encode(texts, truncation="silent"))
    assert report.token_counts == (4, 20, 6)
    assert report.kept_token_counts == (4, 12, 6)
    assert report.kept_spans == ((0, 7), (0, 39), ((0, 5), (0, 3)))
    assert report.windows == (1, 1, 1)
    assert report.cut_rows == [1]
    for value in ("token_embeddings", None):
        options: Any = {"output_value": value, "truncation": "silent"}
        assert tiny_encoder.encode(texts, return_report=True, **options)[1] == report
    vector, report = tiny_encoder.encode("the dog", return_report=True, prompt="a ")
    assert vector.shape == (32,)
    assert report.token_counts == (5,)
    assert report.kept_spans == ((0, 7),)
    with pytest.raises(TruncationError) as caught:
        tiny_encoder.encode(texts, truncation="error")
    assert caught.value.rows == [1]


# --- devices, threads


def test_device_moves_the_model(tiny_encoder: SentenceEncoder) -> None:
    vectors = tiny_encoder.encode(TEXTS, device="cpu")
    same(tiny_encoder.encode(TEXTS, device=torch.device("cpu")), vectors)
    with patch.object(tiny_encoder, "to", wraps=tiny_encoder.to) as to:
        tiny_encoder.encode(TEXTS, device="cpu")
    to.assert_called_once_with(torch.device("cpu"))


def test_a_list_of_devices_starts_a_process_for_each(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    with (
        patch("minilm.inference.encode.ProcessPool") as pool,
        patch("minilm.inference.encode.run_in") as run_in,
    ):
        run_in.side_effect = lambda _pool, encoder, rows, plan, _size: compute.run(
            encoder, rows, plan
        )
        same(tiny_encoder.encode(TEXTS, device=["cpu", "cpu"]), expected)
    pool.assert_called_once_with(tiny_encoder, ["cpu", "cpu"])
    pool.return_value.__exit__.assert_called_once()


def test_threads_give_the_bits_of_one_thread(prompted: SentenceEncoder) -> None:
    calls: list[dict[str, Any]] = []
    for number in range(48):
        texts = [f"{'the sun ' * (number % 5)}{text}" for text in TEXTS[: 1 + number % 6]]
        form: Any = [{}, {"output_value": "token_embeddings"}, {"truncate_dim": 8}][number % 3]
        prompt = [None, "dog ", "cat cat "][number % 4 % 3]
        calls.append({"sentences": texts, "prompt": prompt, "truncation": "silent", **form})
    expected = [prompted.encode(**call) for call in calls]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda call: prompted.encode(**call), calls))
    for ours, alone in zip(found, expected, strict=True):
        assert len(ours) == len(alone)
        for a, b in zip(ours, alone, strict=True):
            same(a, b)


@pytest.mark.parametrize("labels", [["a", "first_row"], ["shape", "ndim"], [7, 7], [1, 0]])
def test_no_label_of_a_column_is_taken_for_ours(
    tiny_encoder: SentenceEncoder, labels: list[Any]
) -> None:
    column = pd.Series(["a cat", "the dog bites the man"], index=labels)
    same(tiny_encoder.encode(column), tiny_encoder.encode(column.tolist()))
    tiny_encoder.max_seq_length = 4
    with pytest.warns(TruncationWarning, match="first: row 1"):
        tiny_encoder.encode(column)
    with pytest.warns(TruncationWarning, match="first: row 1"):
        list(tiny_encoder.encode_stream(column, window=1))


# --- is_singular_input, preprocess


@pytest.mark.parametrize(
    ("inputs", "is_one"),
    [
        *[(one, True) for one in ("a", np.str_("a"), np.array("a"))],
        *[(none, False) for none in (["a"], ("a", "b"), np.array(["a"]), [], None, iter("ab"))],
    ],
)
def test_is_singular_input(tiny_encoder: SentenceEncoder, inputs: Any, is_one: bool) -> None:
    assert tiny_encoder.is_singular_input(inputs) is is_one
    assert is_singular_input(inputs) is is_one


def test_preprocess(prompted: SentenceEncoder) -> None:
    features = prompted.preprocess(["a dog"], prompt="cat ")
    assert features["input_ids"].tolist() == [[2, 8, 6, 7, 3]]
    assert features["modality"] == "text"
    assert features["prompt_length"] == 2
    assert "prompt_length" not in prompted.preprocess("a dog")
    vectors = prompted(features)["sentence_embedding"].detach()
    np.testing.assert_allclose(vectors, prompted.encode(["cat a dog"]), atol=BATCH_ROUNDING)


# --- options of the constructor


def test_options_by_default() -> None:
    loading = load_options({})
    assert (loading.device, loading.dtype, loading.truncate_dim) == (None, None, None)
    assert loading.prompts == {}
    assert loading.where == {
        "revision": None, "cache_dir": None, "token": None, "local_files_only": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"cache_folder": "a"}, {"cache_dir": str(Path("a").absolute())}),
        ({"cache_dir": "a", "cache_folder": None}, {"cache_dir": str(Path("a").absolute())}),
        ({"use_auth_token": "a"}, {"token": AccessToken("a")}),
        ({"token": True}, {"token": True}),
        ({"local_files_only": True}, {"local_files_only": True}),
        ({"revision": "main"}, {"revision": "main"}),
    ],
)
def test_places_have_two_names(options: dict[str, Any], found: dict[str, Any]) -> None:
    assert found.items() <= load_options(options).where.items()


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_has_three_names(name: str) -> None:
    assert load_options({"model_kwargs": {name: "float16"}}).dtype == "float16"
    assert load_options({"model_kwargs": {name: torch.float64}}).dtype == torch.float64
    for default in (None, "auto"):
        assert load_options({"model_kwargs": {name: default}}).dtype is None
    same_dtype = {"dtype": torch.float16, "model_kwargs": {name: "float16"}}
    assert load_options(same_dtype).dtype == torch.float16
    with pytest.raises(InputError, match="dtype and model_kwargs ask for different ones"):
        load_options({"dtype": "float64", "model_kwargs": {name: "float16"}})


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"cache_dir": "a", "cache_folder": "b"}, "cache_folder"),
        ({"token": "a", "use_auth_token": "b"}, "use_auth_token"),
        ({"processor_kwargs": {"a": 1}}, "processor_kwargs"),
        ({"tokenizer_kwargs": {"model_max_length": 5}}, "tokenizer_kwargs"),
        ({"config_kwargs": {"a": 1}}, "config_kwargs"),
        ({"model_card_data": object()}, "model_card_data"),
        ({"model_kwargs": {"use_cache": False}}, "model_kwargs"),
        ({"backend": "onnx"}, "backend"),
    ],
)
def test_options_without_effect_are_refused_by_name(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError) as caught:
        load_options(options)
    assert caught.value.argument == argument
    assert argument in str(caught.value)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"prompts": "a"}, "prompts"),
        ({"prompts": {"a": 5}}, "prompts['a']"),
        ({"prompts": {5: "a"}}, "prompts[5]"),
    ],
)
def test_options_of_a_wrong_type(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputTypeError) as caught:
        load_options(options)
    assert caught.value.argument == argument
    assert argument in str(caught.value)


def test_options_that_choose_between_ways_to_the_same_numbers() -> None:
    settings = dict.fromkeys(("attn_implementation", "low_cpu_mem_usage", "use_safetensors"), "x")
    assert load_options({"model_kwargs": settings, "trust_remote_code": True}).dtype is None
    nothing: dict[str, Any] = {"tokenizer_kwargs": {}, "config_kwargs": {}, "model_kwargs": {}}
    assert load_options(nothing | {"backend": "torch", "processor_kwargs": None}).dtype is None


def test_options_reach_the_model(tiny_folder: Path) -> None:
    model = SentenceEncoder(
        str(tiny_folder),
        device="cpu",
        prompts={"mine": "cat "},
        default_prompt_name="mine",
        similarity_fn_name=SimilarityFunction.DOT_PRODUCT,
        truncate_dim=8,
        model_kwargs={"torch_dtype": "float64"},
    )
    assert model.prompts == {"query": "", "document": "", "mine": "cat "}
    assert model.similarity_fn_name == "dot"
    assert model.encode("a").dtype == np.float64
    same(model.encode("a"), model.encode("cat a", prompt="")[:8])
    with pytest.raises(InputError) as caught:
        SentenceEncoder(tiny_folder, device="cpu", default_prompt_name="x")
    assert str(caught.value) == (
        "Default prompt name 'x' not found in the configured prompts dictionary with keys "
        "['query', 'document']."
    )


# --- streams


def test_stream_takes_pairs_prompts_and_forms(prompted: SentenceEncoder) -> None:
    texts: list[Any] = [*TEXTS, *PAIRS]
    rows: Iterator[Any] = prompted.encode_stream(
        iter(texts), window=4, prompt_name="mine", truncate_dim=8
    )
    same(list(rows), prompted.encode(texts, prompt="cat ", truncate_dim=8))
    with pytest.raises(InputError, match=r"^precision: this model has no fixed ranges"):
        next(iter(prompted.encode_stream(TEXTS, precision="int8")))


def test_arguments_too_many_are_refused(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputTypeError, match="encode_query was given too many arguments"):
        tiny_encoder.encode_query("dog", None, None, *[None] * 12)

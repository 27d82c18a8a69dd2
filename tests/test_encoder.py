"""SentenceEncoder: the contract of the class, on the tiny model unless it must be the real one."""

import copy
import dataclasses
import itertools
import json
import logging
import pickle
import re
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import minilm
from conftest import DATA, SHARED, TINY, seeded_bert
from minilm import BertModel, ClsPooling, MeanPooling, Normalize, SentenceEncoder, TruncationWarning
from minilm.errors import InputError, InputTypeError
from minilm.inference.compute import run
from minilm.parity.stages import bars

TEXTS = ["the dog bites the man", "", "a cat", "the sun is out .", "man sees dog", "a"]

# float32 results of one text differ by this much between batches of other shapes.
BATCH_ROUNDING = 4e-7


def test_published_similarities(encoder: SentenceEncoder) -> None:
    sentences = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    embeddings = encoder.encode(sentences)
    assert embeddings.shape == (3, 384)
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    similarities = encoder.similarity(embeddings, embeddings)
    np.testing.assert_allclose(similarities, expected, atol=5.1e-5)  # the card has four digits


def test_forward_is_the_pipeline(tiny_encoder: SentenceEncoder) -> None:
    features = tiny_encoder.tokenize(TEXTS)
    assert set(features) == {"input_ids", "token_type_ids", "attention_mask"}
    result = tiny_encoder(features)
    assert set(result) == set(features) | {"token_embeddings", "sentence_embedding"}
    tokens = tiny_encoder.bert(features["input_ids"], features["attention_mask"])
    pooled = tiny_encoder.pooling(tokens, features["attention_mask"])
    assert torch.equal(result["token_embeddings"], tokens)
    assert torch.equal(result["sentence_embedding"], tiny_encoder.normalize(pooled))
    for name in features:
        assert result[name] is features[name]


def test_forward_needs_no_token_types_and_uses_those_given(tiny_encoder: SentenceEncoder) -> None:
    features = tiny_encoder.tokenize(TEXTS)
    with_zeros = tiny_encoder(features)["sentence_embedding"]
    types = features.pop("token_type_ids")
    assert torch.equal(tiny_encoder(features)["sentence_embedding"], with_zeros)
    features["token_type_ids"] = torch.ones_like(types)
    assert not torch.equal(tiny_encoder(features)["sentence_embedding"], with_zeros)


def test_it_is_a_sequence_of_its_modules(tiny_encoder: SentenceEncoder) -> None:
    assert len(tiny_encoder) == 3
    assert [type(m) for m in tiny_encoder] == [BertModel, MeanPooling, Normalize]
    assert tiny_encoder[0] is tiny_encoder.bert
    assert tiny_encoder[-1] is tiny_encoder.normalize
    with pytest.raises(IndexError):
        tiny_encoder[3]


def test_print_shows_the_composition(encoder: SentenceEncoder) -> None:
    assert str(encoder) == (
        "SentenceEncoder(\n"
        "  (0): BertModel(layers=6, hidden_size=384, heads=12, max_seq_length=256)\n"
        "  (1): MeanPooling()\n"
        "  (2): Normalize()\n"
        ")"
    )


def test_modules_without_normalize(tiny_encoder: SentenceEncoder) -> None:
    plain = SentenceEncoder(
        modules=[tiny_encoder.bert, MeanPooling()],
        tokenizer=tiny_encoder.tokenizer,
        max_seq_length=12,
    )
    assert len(plain) == 2
    raw = plain.encode(TEXTS)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 1e-3
    np.testing.assert_allclose(raw / lengths, tiny_encoder.encode(TEXTS), atol=1e-6)


def test_a_stage_too_many_is_refused(tiny_encoder: SentenceEncoder) -> None:
    for module in (Normalize(), nn.Linear(32, 32)):
        with pytest.raises(InputError, match="name is '2'; pass one of bert, pooling, normalize"):
            tiny_encoder.add_module("2", module)


def test_normalize_is_added_where_there_is_none(tiny_encoder: SentenceEncoder) -> None:
    bert, pooling, _ = tiny_encoder
    bare = SentenceEncoder(
        modules=[bert, pooling], tokenizer=tiny_encoder.tokenizer, max_seq_length=12
    )
    assert np.linalg.norm(bare.encode("dog")) != pytest.approx(1)
    bare.add_module("Normalize", Normalize())
    assert len(bare) == 3
    np.testing.assert_array_equal(bare.encode("dog"), tiny_encoder.encode("dog"))


def test_modules_with_cls_pooling(tiny_encoder: SentenceEncoder) -> None:
    cls = SentenceEncoder(
        modules=[tiny_encoder.bert, ClsPooling()],
        tokenizer=tiny_encoder.tokenizer,
        max_seq_length=12,
    )
    first = tiny_encoder(tiny_encoder.tokenize("a cat"))["token_embeddings"][0, 0]
    np.testing.assert_allclose(cls.encode("a cat"), first.detach(), atol=1e-6)


@pytest.mark.parametrize("modules", [[], [MeanPooling(), Normalize()], [nn.Linear(2, 2)] * 2])
def test_wrong_modules_are_refused(modules: list[nn.Module]) -> None:
    with pytest.raises(InputTypeError, match=r"modules is \[") as error:
        SentenceEncoder(modules=modules)
    assert error.value.argument == "modules"


def test_name_and_modules_exclude_each_other(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match="pass one of the two"):
        SentenceEncoder()
    with pytest.raises(InputError, match="pass one of the two"):
        SentenceEncoder("a name", modules=list(tiny_encoder))


def test_modules_without_tokenizer_take_ids_but_no_text() -> None:
    encoder = SentenceEncoder(modules=[seeded_bert(), MeanPooling(), Normalize()])
    ids = torch.tensor([[2, 5, 3]])
    result = encoder({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert result["sentence_embedding"].shape == (1, 32)
    with pytest.raises(InputError, match="tokenizer is None"):
        encoder.encode("the dog")


def test_unknown_similarity_is_refused(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match="similarity_fn_name is 'cos'; pass one of cosine, dot"):
        SentenceEncoder(modules=list(tiny_encoder), similarity_fn_name="cos")


def test_constructor_takes_a_folder_as_from_pretrained_does(tiny_folder: Path) -> None:
    one = SentenceEncoder(str(tiny_folder), device="cpu")
    other = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    np.testing.assert_array_equal(one.encode(TEXTS), other.encode(TEXTS))
    assert one.max_seq_length == 12
    assert not one.training


def test_constructor_arguments_win_over_the_folder(tiny_folder: Path) -> None:
    encoder = SentenceEncoder(tiny_folder, device="cpu", max_seq_length=5, similarity_fn_name="dot")
    assert encoder.max_seq_length == 5
    assert encoder.similarity_fn_name == "dot"
    for wrong in ({"max_seq_length": 0}, {"max_seq_length": 25}, {"similarity_fn_name": "cos"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            SentenceEncoder(tiny_folder, device="cpu", **wrong)
    with pytest.raises(InputError, match="tokenizer goes with modules"):
        SentenceEncoder(tiny_folder, device="cpu", tokenizer=encoder.tokenizer)


def test_tokenizer_beyond_the_word_table_is_refused(tiny_encoder: SentenceEncoder) -> None:
    small = seeded_bert(dataclasses.replace(TINY, vocab_size=20))
    with pytest.raises(InputError, match="tokenizer gives ids up to 23, of 20 words"):
        SentenceEncoder(modules=[small, MeanPooling()], tokenizer=tiny_encoder.tokenizer)


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_to_names_a_device_that_cannot_be_used(tiny_encoder: SentenceEncoder, device: str) -> None:
    with pytest.raises(InputError, match=f"device is '{device}'"):
        tiny_encoder.to(device)
    with pytest.raises(InputError, match=f"device is '{device}'"):
        tiny_encoder.to(device=device)


def test_to_leaves_ordinary_parameters(tiny_encoder: SentenceEncoder) -> None:
    with torch.inference_mode():
        tiny_encoder.to(torch.float64)
    tiny_encoder(tiny_encoder.tokenize("a cat"))["sentence_embedding"].sum().backward()
    assert tiny_encoder.bert.embeddings.word_embeddings.weight.grad is not None


# encode: what goes in


def generator() -> Iterator[str]:
    yield from TEXTS


@pytest.mark.parametrize(
    "sentences",
    [
        TEXTS,
        tuple(TEXTS),
        generator(),
        deque(TEXTS),
        map(str, TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        np.array(TEXTS, dtype=np.dtypes.StringDType()),
        np.array([t for text in TEXTS for t in (text, "x")])[::2],
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_iterable_of_str(tiny_encoder: SentenceEncoder, sentences: Any) -> None:
    np.testing.assert_array_equal(tiny_encoder.encode(sentences), tiny_encoder.encode(TEXTS))


def test_columns_in_positional_order(tiny_encoder: SentenceEncoder) -> None:
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    expected = tiny_encoder.encode(TEXTS)
    columns: list[Any] = [
        pd.Series(TEXTS),
        pd.Series(TEXTS, index=[2, 0, 1, 5, 4, 3]),
        pd.Series(TEXTS, index=list("abcdef")).values,
        pd.Index(TEXTS),
        pl.Series(TEXTS),
        pa.array(TEXTS),
        pa.chunked_array([TEXTS[:2], TEXTS[2:]]),
    ]
    for column in columns:
        np.testing.assert_array_equal(tiny_encoder.encode(column), expected)


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (None, "sentences is None"),
        (5, "sentences is of type int"),
        (b"text", "sentences is of type bytes"),
        ({"a": "b"}, "sentences is of type dict"),
        (["a", None], r"sentences\[1\] is None; pass a string"),
        (["a", "b", float("nan")], r"sentences\[2\] is nan, of type float"),
        ([["a", b"b"]], r"sentences\[0\]\[1\] is b'b', of type bytes"),
        ([b"abc"], r"sentences\[0\] is b'abc', of type bytes"),
        ([Path("a")], r"sentences\[0\] is .*Path"),
    ],
)
def test_what_is_no_text_is_named(
    tiny_encoder: SentenceEncoder, sentences: Any, message: str
) -> None:
    with pytest.raises(InputTypeError, match=message):
        tiny_encoder.encode(sentences)
    with pytest.raises(TypeError):
        tiny_encoder.encode(sentences)


@pytest.mark.parametrize("batch_size", [0, -1, 1.0, "8", True])
def test_bad_batch_size_is_refused(tiny_encoder: SentenceEncoder, batch_size: Any) -> None:
    with pytest.raises(InputError, match="batch_size is") as error:
        tiny_encoder.encode(TEXTS, batch_size=batch_size)
    assert error.value.argument == "batch_size"


def test_bad_device_is_named(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match="device is 'nonsense'"):
        tiny_encoder.encode(TEXTS, device="nonsense")


def test_strange_text_is_fine(tiny_encoder: SentenceEncoder) -> None:
    strange = ["", "  \n\t", "\x00\x01\x1f", "\u202e\ufeff", "e" + "\u0301" * 500, "👩‍👩‍👧‍👦"]
    embeddings = tiny_encoder.encode(strange)
    assert np.isfinite(embeddings).all()
    np.testing.assert_array_equal(embeddings[0], embeddings[1])  # [CLS] [SEP] both


@pytest.mark.slow
def test_ten_megabytes_of_text(tiny_encoder: SentenceEncoder) -> None:
    with pytest.warns(TruncationWarning, match="100 % of their tokens were not read"):
        embedding = tiny_encoder.encode("the dog sees a cat . " * 500_000)
    assert np.isfinite(embedding).all()


def test_lone_surrogate_is_named(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match=r"sentences\[2\] has a lone surrogate") as error:
        tiny_encoder.encode(["a", "b", "c\ud800"])
    assert error.value.argument == "sentences[2]"


# encode: what comes out


def test_one_text_gives_one_vector(tiny_encoder: SentenceEncoder) -> None:
    for text in ("a cat", np.str_("a cat"), np.array("a cat")):
        array = tiny_encoder.encode(text)
        assert array.shape == (32,)
    assert tiny_encoder.encode("a cat", convert_to_tensor=True).shape == (32,)
    vector = tiny_encoder.encode("a cat", convert_to_numpy=False)
    assert isinstance(vector, torch.Tensor)
    assert vector.shape == (32,)


def test_kinds_of_result(tiny_encoder: SentenceEncoder) -> None:
    array = tiny_encoder.encode(TEXTS)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert array.flags.writeable
    tensor = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, Tensor)
    rows = tiny_encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(rows, list)
    assert [row.shape for row in rows] == [(32,)] * 6
    np.testing.assert_array_equal(array, tensor)
    np.testing.assert_array_equal(array, torch.stack(rows))


def test_no_texts(tiny_encoder: SentenceEncoder) -> None:
    empties: list[Any] = [[], (), np.array([], dtype=object), iter([])]
    for empty in empties:
        array = tiny_encoder.encode(empty)
        assert array.shape == (0, 32)
        assert array.dtype == np.float32
    assert tiny_encoder.encode([], convert_to_tensor=True).shape == (0, 32)
    assert tiny_encoder.encode([], convert_to_numpy=False) == []
    with pytest.raises(InputError, match="sentences is empty"):
        tiny_encoder.tokenize([])


@pytest.mark.parametrize(
    ("dtype", "in_numpy"),
    [
        (torch.float64, np.float64),
        (torch.float32, np.float32),
        (torch.float16, np.float16),
        (torch.bfloat16, np.float32),
    ],
)
def test_dtype_follows_the_model(
    tiny_encoder: SentenceEncoder, dtype: torch.dtype, in_numpy: type
) -> None:
    exact = tiny_encoder.encode(TEXTS)
    tiny_encoder.to(dtype)
    assert tiny_encoder.dtype == dtype
    array = tiny_encoder.encode(TEXTS)
    assert array.dtype == in_numpy
    tensor = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    assert tensor.dtype == dtype
    # bfloat16 has 8 bits, and unit vectors of 32 elements have elements of about 0.2.
    np.testing.assert_allclose(array, exact, atol=2e-2)


def test_half_and_from_pretrained_dtype(tiny_folder: Path) -> None:
    half = SentenceEncoder.from_pretrained(tiny_folder, device="cpu").half()
    direct = SentenceEncoder.from_pretrained(tiny_folder, device="cpu", dtype="float16")
    np.testing.assert_array_equal(half.encode(TEXTS), direct.encode(TEXTS))


def test_vectors_have_length_1(tiny_encoder: SentenceEncoder) -> None:
    norms = np.linalg.norm(tiny_encoder.double().encode(TEXTS), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-15)


def test_order_and_batch_size_do_not_matter(tiny_encoder: SentenceEncoder) -> None:
    texts = [text for text in TEXTS for _ in range(7)]
    one_by_one = np.stack([tiny_encoder.encode(text) for text in texts])
    for batch_size in (1, 2, 5, None, 100):
        together = tiny_encoder.encode(texts, batch_size=batch_size)
        np.testing.assert_allclose(together, one_by_one, atol=BATCH_ROUNDING)
    backwards = tiny_encoder.encode(texts[::-1], batch_size=4)[::-1]
    np.testing.assert_allclose(backwards, one_by_one, atol=BATCH_ROUNDING)


def test_batches_are_formed_by_length(tiny_encoder: SentenceEncoder) -> None:
    ids: list[Any] = []
    tiny_encoder.bert.register_forward_pre_hook(lambda _, args: ids.append(args[0]))
    tiny_encoder.encode(["a", "the dog sees the man", "sun", "a cat sees the dog"], batch_size=2)
    # The longest first; laid end to end, and only behind the last one filled up to the next
    # multiple of 4 rows, or of 16 where this processor's products keep a row's bits only so.
    assert [rows.nonzero().flatten().tolist() for rows in ids] == [[*range(14)], [*range(6)]]
    assert [len(rows) for rows in ids] in ([16, 8], [16, 16])


def test_tensors_are_usable_in_training(tiny_encoder: SentenceEncoder) -> None:
    with torch.inference_mode():
        tensor = tiny_encoder.encode(TEXTS, convert_to_tensor=True)
    assert not tensor.is_inference()
    assert not tensor.requires_grad
    tensor.add_(0)
    head = nn.Linear(32, 2)
    head(tensor).sum().backward()
    assert head.weight.grad is not None


def test_forward_is_differentiable(tiny_encoder: SentenceEncoder) -> None:
    embeddings = tiny_encoder(tiny_encoder.tokenize(TEXTS))["sentence_embedding"]
    (embeddings @ embeddings.T).mean().backward()
    unused = {n for n, p in tiny_encoder.named_parameters() if p.grad is None}
    assert unused == set()


def test_encode_goes_through_call_so_that_hooks_apply(tiny_encoder: SentenceEncoder) -> None:
    def double(module: nn.Module, args: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
        return output | {"sentence_embedding": output["sentence_embedding"] * 2}

    before = tiny_encoder.encode(TEXTS)
    handle = tiny_encoder.register_forward_hook(double)
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), before * 2)
    handle.remove()


def test_encode_has_no_dropout_and_gives_the_mode_back(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    tiny_encoder.train()
    tiny_encoder.bert.layers[0].eval()  # a frozen layer
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), expected)
    assert tiny_encoder.training
    assert tiny_encoder.bert.layers[1].training
    assert not tiny_encoder.bert.layers[0].training


def test_autocast_and_default_dtype_leave_float32(tiny_encoder: SentenceEncoder) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_encoder.encode(TEXTS).dtype == np.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert tiny_encoder.encode(TEXTS).dtype == np.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_copy_of_inference_mode_can_be_converted(tiny_encoder: SentenceEncoder) -> None:
    with torch.inference_mode():
        assert copy.deepcopy(tiny_encoder).to(torch.float64).encode(TEXTS).dtype == np.float64


def test_default_device_of_the_caller_does_not_matter(tiny_encoder: SentenceEncoder) -> None:
    long = ["the dog a cat " * 30]
    expected = tiny_encoder.encode(long, truncation="chunk")
    features = tiny_encoder.tokenize(TEXTS)
    with torch.device("meta"):
        assert tiny_encoder.deterministic
        assert np.array_equal(tiny_encoder.encode(long, truncation="chunk"), expected)
        for name, tensor in tiny_encoder.tokenize(TEXTS).items():
            assert torch.equal(tensor, features[name])


def test_the_mean_of_windows_is_not_rounded_as_the_caller_computes(
    tiny_encoder: SentenceEncoder,
) -> None:
    """In bfloat16 the shares of windows of 10, 10 and 7 tokens had three digits."""
    long = ["the dog a cat " * 30 + "the"]
    expected = tiny_encoder.encode(long, truncation="chunk")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert np.array_equal(tiny_encoder.encode(long, truncation="chunk"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_get_the_same_results(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(tiny_encoder.encode(TEXTS)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_threads_in_training_mode_get_no_dropout(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    tiny_encoder.train()
    entered, leave = threading.Event(), threading.Event()

    def wait_inside(module: nn.Module, args: Any) -> None:
        entered.set()
        assert leave.wait(300)

    handle = tiny_encoder.bert.layers[0].register_forward_pre_hook(wait_inside)
    results: list[Any] = []
    slow = threading.Thread(target=lambda: results.append(tiny_encoder.encode(TEXTS)))
    slow.start()
    assert entered.wait(300)  # it is in the middle of the model ...
    handle.remove()
    np.testing.assert_array_equal(tiny_encoder.encode(TEXTS), expected)
    leave.set()  # ... and goes on after another call has come and gone
    slow.join()
    np.testing.assert_array_equal(results[0], expected)
    assert all(module.training for module in (tiny_encoder, *tiny_encoder.bert.modules()))


def test_progress_bar_only_if_wanted(
    tiny_encoder: SentenceEncoder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_encoder.encode(TEXTS)
    assert capsys.readouterr().err == ""
    tiny_encoder.encode(TEXTS, show_progress_bar=True)
    assert "Batches" in capsys.readouterr().err
    logger = logging.getLogger("minilm")
    logger.setLevel(logging.INFO)
    try:
        tiny_encoder.encode(TEXTS)
        assert "Batches" in capsys.readouterr().err
        tiny_encoder.encode(TEXTS, show_progress_bar=False)
        assert capsys.readouterr().err == ""
    finally:
        logger.setLevel(logging.NOTSET)


def test_copies_and_pickles_are_equal(tiny_encoder: SentenceEncoder, tiny_folder: Path) -> None:
    loaded = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    for encoder in (tiny_encoder, loaded):
        expected = encoder.encode(TEXTS)
        for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            np.testing.assert_array_equal(other.encode(TEXTS), expected)


# the length limit


def test_cut_texts_are_reported_once(tiny_encoder: SentenceEncoder) -> None:
    long = "dog " * 18  # 20 tokens with [CLS] and [SEP], of which 12 are read
    with pytest.warns(TruncationWarning) as record:
        embeddings = tiny_encoder.encode(["a", long, long], batch_size=1)
    assert len(record) == 1
    assert str(record[0].message) == (
        "2 of 3 texts were cut at 12 tokens; 40 % of their tokens were not read; first: row 1"
    )
    assert record[0].filename == __file__
    np.testing.assert_array_equal(embeddings[1], tiny_encoder.encode("dog " * 10))


def test_text_of_exactly_the_limit_is_not_cut(tiny_encoder: SentenceEncoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_encoder.encode("dog " * 10)


def test_max_seq_length_can_be_set(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.max_seq_length = 5
    with pytest.warns(TruncationWarning, match="cut at 5 tokens"):
        cut = tiny_encoder.encode("dog cat man sun")
    np.testing.assert_array_equal(cut, tiny_encoder.encode("dog cat man"))
    tiny_encoder.max_seq_length = 24
    tiny_encoder.encode("dog " * 22)


@pytest.mark.parametrize("value", [2, 0, -1, 25, 5.0, None, True, "5"])
def test_bad_max_seq_length_is_refused(tiny_encoder: SentenceEncoder, value: Any) -> None:
    with pytest.raises(InputError, match="max_seq_length is"):
        tiny_encoder.max_seq_length = value
    assert tiny_encoder.max_seq_length == 12


def test_limit_of_the_published_model_is_256(encoder: SentenceEncoder) -> None:
    assert encoder.max_seq_length == 256
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        exact, longer, much_longer, shorter = encoder.encode(
            ["word " * n for n in (254, 255, 1000, 253)], batch_size=1
        )
    np.testing.assert_array_equal(exact, longer)
    np.testing.assert_array_equal(exact, much_longer)
    assert np.abs(exact - shorter).max() > 1e-4


def test_dimension(tiny_encoder: SentenceEncoder, encoder: SentenceEncoder) -> None:
    assert tiny_encoder.get_sentence_embedding_dimension() == TINY.hidden_size
    assert encoder.get_sentence_embedding_dimension() == 384


def test_similarity_keeps_float64(tiny_encoder: SentenceEncoder) -> None:
    embeddings = tiny_encoder.double().encode(TEXTS)
    similarities = tiny_encoder.similarity(embeddings, embeddings)
    assert similarities.dtype == torch.float64
    np.testing.assert_allclose(similarities.diagonal(), 1, atol=1e-15)
    pairs = tiny_encoder.similarity_pairwise(embeddings, embeddings[::-1].copy())
    np.testing.assert_allclose(pairs, similarities.flip(1).diagonal(), atol=1e-15)


def test_similarity_follows_the_model(tiny_encoder: SentenceEncoder) -> None:
    dot = SentenceEncoder(
        modules=list(tiny_encoder)[:2],
        tokenizer=tiny_encoder.tokenizer,
        max_seq_length=12,
        similarity_fn_name="dot",
    )
    embeddings = dot.encode(TEXTS)
    np.testing.assert_allclose(
        dot.similarity(embeddings, embeddings), embeddings @ embeddings.T, rtol=1e-5
    )


def test_device_and_dtype(tiny_encoder: SentenceEncoder) -> None:
    assert tiny_encoder.device == torch.device("cpu")
    assert tiny_encoder.dtype == torch.float32
    assert isinstance(tiny_encoder, minilm.SentenceEncoder)
    assert tiny_encoder.to("cpu") is tiny_encoder


# encode_stream


class Source:
    """Texts that come one by one; says how many were taken."""

    def __init__(self, texts: Any) -> None:
        self.texts, self.taken = iter(texts), 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        text = next(self.texts)
        self.taken += 1
        return text


@pytest.mark.parametrize("window", [1, 2, 4, 6, 7, 4096])
def test_stream_gives_what_encode_gives_in_order(
    tiny_encoder: SentenceEncoder, window: int
) -> None:
    vectors = list(tiny_encoder.encode_stream(iter(TEXTS), window=window))
    assert [vector.shape for vector in vectors] == [(32,)] * 6
    assert all(vector.dtype == np.float32 for vector in vectors)
    expected = tiny_encoder.encode(TEXTS)
    np.testing.assert_allclose(np.stack(vectors), expected, rtol=0, atol=BATCH_ROUNDING)


def test_stream_reads_a_window_at_a_time(tiny_encoder: SentenceEncoder) -> None:
    source = Source(itertools.cycle(TEXTS))  # without end
    stream = tiny_encoder.encode_stream(source, window=4)
    assert source.taken == 0
    for given in range(1, 14):
        next(stream)
        assert source.taken == -(-given // 4) * 4  # to the end of the window, and no further


def test_stream_holds_no_more_than_it_has_to(tiny_encoder: SentenceEncoder) -> None:
    class Text(str):  # which, other than str, can be watched
        pass

    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    def texts() -> Iterator[str]:
        nonlocal most
        for number in range(200):
            text = Text(f"the dog {number}")  # each another one: a WeakSet counts equal ones once
            alive.add(text)
            most = max(most, len(alive))
            yield text

    assert sum(1 for _ in tiny_encoder.encode_stream(texts(), window=10)) == 200
    assert 10 <= most <= 21  # a window, and that before it until it is replaced


def test_stream_passes_the_options_on(tiny_encoder: SentenceEncoder) -> None:
    seen: list[int] = []
    tiny_encoder.bert.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    list(tiny_encoder.encode_stream(TEXTS, window=3, batch_size=1))
    assert len(seen) == 6
    for wrong in ({"batch_size": 0}, {"token_budget": 0}, {"device": "nonsense"}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is"):
            list(tiny_encoder.encode_stream(TEXTS, **wrong))


def test_stream_refuses_before_the_first_text(tiny_encoder: SentenceEncoder) -> None:
    source = Source(TEXTS)
    refused: list[dict[str, Any]] = [
        {"return_report": True},
        {"inputs": ["a cat"]},
        {"nonsense": 1},
        {"truncation": "nope"},
        {"output_value": "cls"},
        {"device": ["nonsense"]},
    ]
    for options in refused:
        with pytest.raises(InputError, match=next(iter(options))):
            list(tiny_encoder.encode_stream(source, **options))
        assert source.taken == 0


@pytest.mark.parametrize(
    "options",
    [
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"output_value": "token_embeddings"},
        {"output_value": None},
        {"precision": "ubinary"},
        {"return_report": False},
    ],
)
def test_stream_gives_the_rows_of_encode(
    tiny_encoder: SentenceEncoder, options: dict[str, Any]
) -> None:
    stream = list(tiny_encoder.encode_stream(TEXTS, window=len(TEXTS), **options))
    expected = tiny_encoder.encode(TEXTS, **options)
    assert len(stream) == len(TEXTS)
    for ours, row in zip(stream, expected, strict=True):
        assert type(ours) is type(row)
        for name in row if isinstance(row, dict) else [...]:
            np.testing.assert_array_equal(ours[name], row[name])


def test_stream_starts_its_processes_once(tiny_encoder: SentenceEncoder) -> None:
    expected = tiny_encoder.encode(TEXTS)
    with (
        patch("minilm.inference.encode.ProcessPool") as pool,
        patch("minilm.inference.encode.run_in") as run_in,
    ):
        run_in.side_effect = lambda _pool, encoder, rows, plan, _size: run(encoder, rows, plan)
        options: Any = {"window": 2, "device": ["cpu", "cpu"]}
        stream = tiny_encoder.encode_stream(TEXTS, **options)
        np.testing.assert_array_equal(list(stream), expected)
        pool.assert_called_once_with(tiny_encoder, ["cpu", "cpu"])
        leave = pool.return_value.__exit__
        assert leave.call_count == 1
        stream = tiny_encoder.encode_stream(TEXTS, **options)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert leave.call_count == 2
        leave.return_value = None
        broken: Any = [*TEXTS, None]
        with pytest.raises(InputError):
            list(tiny_encoder.encode_stream(broken, **options))
        assert leave.call_count == 3
        assert pool.call_count == 3


def test_stream_of_nothing(tiny_encoder: SentenceEncoder) -> None:
    assert list(tiny_encoder.encode_stream([])) == []


@pytest.mark.parametrize(
    ("wrong", "message", "argument"),
    [
        (None, r"sentences\[5\] is None; pass a string", "sentences[5]"),
        (7, r"sentences\[5\] is 7, of type int", "sentences[5]"),
        ("c\ud800", r"sentences\[5\] has a lone surrogate", "sentences[5]"),
    ],
)
def test_row_of_a_stream_is_counted_from_its_start(
    tiny_encoder: SentenceEncoder, wrong: Any, message: str, argument: str
) -> None:
    source = Source(["a", "a cat", "", "dog", "man", wrong, "sun"])
    stream = tiny_encoder.encode_stream(source, window=3)
    for _ in range(3):  # the first window is given before the second is looked at
        next(stream)
    with pytest.raises(InputError, match=message) as error:
        next(stream)
    assert error.value.argument == argument
    assert list(stream) == []


@pytest.mark.parametrize("window", [0, -1, 2.0, "3", True, None])
def test_bad_window_is_refused(tiny_encoder: SentenceEncoder, window: Any) -> None:
    source = Source(TEXTS)
    with pytest.raises(InputError, match="window is") as error:
        list(tiny_encoder.encode_stream(source, window=window))
    assert error.value.argument == "window"
    assert source.taken == 0


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        ("a cat", "sentences is a single text; pass an iterable of texts"),
        (np.array("a cat"), "sentences has shape"),
        ({"a", "b"}, "sentences is a set, which has no order"),
        ({"a": "b"}, "sentences is of type dict"),
        (None, "sentences is None"),
        (b"text", "sentences is of type bytes"),
    ],
)
def test_what_is_no_stream_is_named(
    tiny_encoder: SentenceEncoder, sentences: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        list(tiny_encoder.encode_stream(sentences))
    assert error.value.argument == "sentences"


def test_stream_of_a_column(tiny_encoder: SentenceEncoder) -> None:
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    expected = tiny_encoder.encode(TEXTS)
    columns: list[Any] = [
        np.array(TEXTS),
        pd.Series(TEXTS, index=[2, 0, 1, 5, 4, 3]),
        pl.Series(TEXTS),
        pa.array(TEXTS),
        pa.chunked_array([TEXTS[:2], TEXTS[2:]]),
    ]
    for column in columns:
        vectors = np.stack(list(tiny_encoder.encode_stream(column, window=4)))
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=BATCH_ROUNDING)


def test_stream_warns_of_cut_texts(tiny_encoder: SentenceEncoder) -> None:
    texts = ["a", "a cat", "", "a", "dog " * 18, "a"]
    with pytest.warns(TruncationWarning, match="1 of 3 texts were cut at 12 tokens") as record:
        list(tiny_encoder.encode_stream(texts, window=3))
    assert len(record) == 1


def test_stream_warns_with_the_row_and_the_place_of_the_call(
    tiny_encoder: SentenceEncoder,
) -> None:
    texts = ["a", "a cat", "", "a", "dog " * 18, "a"]
    with pytest.warns(TruncationWarning) as record:
        list(tiny_encoder.encode_stream(texts, window=3))
    assert str(record[0].message).endswith("first: row 4")
    assert record[0].filename == __file__


# the same bits in any company


@pytest.fixture(scope="module")
def encoder_bfloat16(published: Path) -> SentenceEncoder:
    """The published model with bfloat16 products. Shared: a test must not change it."""
    return SentenceEncoder.from_pretrained(published, device="cpu", dtype="bfloat16")


# Some processors have no products in bfloat16: a ninth of the speed, and few short texts will do.
BFLOAT16_IS_SLOW = not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.fixture(scope="module")
def texts_of_all_lengths(encoder: SentenceEncoder) -> list[str]:
    """2,000 texts of 2 to 256 tokens, each length among them, most of them short; 48,000 tokens.

    Made of words that are one token each.
    """
    assert encoder.tokenizer is not None
    vocabulary = encoder.tokenizer.backend.get_vocab()
    words = np.array(sorted(word for word in vocabulary if re.fullmatch("[a-z]{2,}", word)))
    random = np.random.default_rng(0)
    lengths = [*range(2, 257), *(3 + random.exponential(6, size=1745).astype(int).clip(0, 253))]
    texts = [" ".join(random.choice(words, length - 2)) for length in lengths]
    read = encoder.tokenizer(texts).input_ids
    assert list(map(len, read)) == lengths
    assert len(texts) == 2000
    return [texts[i] for i in random.permutation(2000)]


PASSES: list[tuple[int, dict[str, int]]] = [  # threads, limits
    (2, {}),
    (1, {"token_budget": 300}),
    (2, {"token_budget": 16384}),
    (1, {"batch_size": 7}),
    (1, {"token_budget": 3000, "batch_size": 50}),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits_alone_in_any_batch_and_order(
    request: pytest.FixtureRequest, texts_of_all_lengths: list[str], dtype: str
) -> None:
    name = "encoder" if dtype == "float32" else "encoder_bfloat16"
    encoder: SentenceEncoder = request.getfixturevalue(name)
    texts, random = texts_of_all_lengths, np.random.default_rng(1)
    if dtype == "bfloat16" and BFLOAT16_IS_SLOW:
        texts = [text for text in texts if len(text.split()) < 30][:60]
    expected = None
    before = torch.get_num_threads()

    def check(different: int, where: str) -> None:
        """Vectors may differ where `deterministic` says so; to try that takes seconds."""
        for threads in (1, 2) if different else ():
            torch.set_num_threads(threads)
            if not encoder.deterministic:
                pytest.skip(f"deterministic is False in {dtype} with {threads} threads here")
        assert different == 0, f"{different} {where}"

    try:
        for threads, limits in PASSES:
            torch.set_num_threads(threads)
            order = random.permutation(len(texts))
            vectors = np.empty((len(texts), 384), dtype=np.float32)
            vectors[order] = encoder.encode([texts[i] for i in order], **limits)
            if expected is None:
                expected = vectors
            different = int((vectors != expected).any(axis=1).sum())
            check(different, f"of {len(texts)} with {threads} threads, {limits}")
        assert expected is not None
        for threads, rows in (
            (1, range(0, len(texts), 13)),
            (2, range(5, len(texts), 40)),
        ):
            torch.set_num_threads(threads)
            for row in rows:
                different = int((encoder.encode(texts[row]) != expected[row]).any())
                check(different, f"text, {row}, alone with {threads} threads")
    finally:
        torch.set_num_threads(before)
    assert np.unique(expected, axis=0).shape[0] > 0.97 * len(texts)  # some words come alone twice


def test_deterministic_leaves_no_trace(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.train()
    tiny_encoder.bert.layers[0].eval()
    before, state = torch.get_rng_state(), copy.deepcopy(tiny_encoder.bert.state_dict())
    assert isinstance(tiny_encoder.deterministic, bool)
    assert torch.equal(torch.get_rng_state(), before)
    assert tiny_encoder.training
    assert not tiny_encoder.bert.layers[0].training
    assert all(map(torch.equal, tiny_encoder.bert.state_dict().values(), state.values()))


def test_deterministic_is_tried_each_time(tiny_encoder: SentenceEncoder) -> None:
    counter = itertools.count()
    before = tiny_encoder.deterministic

    def noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 + 1e-6 * next(counter))

    handle = tiny_encoder.bert.register_forward_hook(noise)
    plain = SentenceEncoder(
        modules=[tiny_encoder.bert, MeanPooling()], tokenizer=tiny_encoder.tokenizer
    )
    assert not plain.deterministic
    handle.remove()
    assert tiny_encoder.deterministic == before


def test_deterministic_needs_no_tokenizer() -> None:
    encoder = SentenceEncoder(modules=[seeded_bert(), MeanPooling(), Normalize()])
    assert isinstance(encoder.deterministic, bool)


# accuracy of the published model


@pytest.fixture(scope="module")
def exact(encoder64: SentenceEncoder) -> tuple[list[str], Any]:
    """Every eighth of the texts in tests/data, and their float64 vectors."""
    lines = (DATA / "parity_texts.jsonl").read_text(encoding="utf-8").splitlines()[::8]
    texts = [json.loads(line)["text"] for line in lines]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return texts, encoder64.encode(texts)


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
def test_float32_is_as_near_to_float64_as_stated(
    encoder: SentenceEncoder, exact: tuple[list[str], Any]
) -> None:
    texts, expected = exact
    error = np.abs(encoder.encode(texts) - expected)
    limits = bars(torch.float32)
    assert error.max() <= limits.sentence_embedding
    assert limits.sentence_embedding_rms is not None
    assert np.sqrt((error**2).mean()) <= limits.sentence_embedding_rms


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
def test_bfloat16_is_near_to_float64(
    encoder_bfloat16: SentenceEncoder, exact: tuple[list[str], Any]
) -> None:
    step = 10 if BFLOAT16_IS_SLOW else 1
    texts, expected = exact[0][::step], exact[1][::step]
    vectors = encoder_bfloat16.encode(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)
    assert (vectors.astype(np.float64) * expected).sum(axis=1).min() >= 0.9999
    # Rounding to 8 bits is there: it is not float32 under another name.
    assert np.abs(vectors - expected).max() > 1e-4
    assert encoder_bfloat16.encode(texts[:2], convert_to_tensor=True).dtype == torch.float32


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
def test_encode_is_as_near_to_the_reference_as_stated(
    encoder: SentenceEncoder, reference: Any, exact: tuple[list[str], Any]
) -> None:
    texts, _ = exact
    limit = bars(torch.float32).between
    assert limit is not None
    difference = np.abs(encoder.encode(texts) - reference.encode(texts))
    assert difference.max() <= limit


def ranks(values: Any) -> Any:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def spearman(left: Any, right: Any) -> float:
    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def test_spearman_by_hand() -> None:
    assert ranks([10.0, 30.0, 20.0, 20.0]).tolist() == [1, 4, 2.5, 2.5]
    assert spearman([1, 2, 3], [10, 200, 3000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks (1, 2, 3, 4) and (2, 1, 4, 3): 1 - 6 * 4 / (4 * 15).
    assert spearman([1, 2, 3, 4], [6, 5, 8, 7]) == pytest.approx(0.6)


def test_bfloat16_judges_similarity_like_float32(
    encoder: SentenceEncoder, encoder_bfloat16: SentenceEncoder
) -> None:
    path = SHARED / "sts" / "STS17.en-en.tsv"
    if not path.is_file():
        pytest.skip(f"{path.name} is absent")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    assert len(rows) == 250
    scores = [float(row[0]) for row in rows]
    points = [
        100 * spearman(scores, (model.encode([row[1] for row in rows])
                                * model.encode([row[2] for row in rows])).sum(axis=1))
        for model in (encoder, encoder_bfloat16)
    ]  # fmt: skip
    assert points[0] == pytest.approx(87.59, abs=0.01)  # published
    assert points[1] == pytest.approx(points[0], abs=0.05)

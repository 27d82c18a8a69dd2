import importlib
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minilm import SentenceEncoder, quantize, similarity, tasks, util
from minilm.errors import InputError, InputTypeError
from minilm.similarity import SimilarityFunction

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
TEXTS = ["the dog", "a cat", "the dog .", "a man sees the sun", "a cat"]


# names


def test_names() -> None:
    for name in util.__all__:
        assert hasattr(util, name)
    for name in ("cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"):
        assert getattr(util, name) is getattr(similarity, name)
        assert getattr(util, f"pairwise_{name}") is getattr(similarity, f"pairwise_{name}")
    of_the_reference = {"community_detection", "paraphrase_mining_embeddings", "semantic_search"}
    assert of_the_reference <= set(tasks.__all__)
    for name in of_the_reference:
        assert getattr(util, name) is getattr(tasks, name)
    assert util.pytorch_cos_sim is similarity.cos_sim
    assert util.quantize_embeddings is quantize.quantize_embeddings
    assert util.dequantize is quantize.dequantize


# SimilarityFunction


def test_similarity_functions_by_name() -> None:
    assert SimilarityFunction.possible_values() == ["cosine", "dot", "euclidean", "manhattan"]
    assert SimilarityFunction["DOT"] is SimilarityFunction["DOT_PRODUCT"]
    assert util.SimilarityFunction is SimilarityFunction
    for name, functions in similarity.SIMILARITY_FUNCTIONS.items():
        for key in (name, SimilarityFunction(name)):
            assert SimilarityFunction.to_similarity_fn(key) is functions[0]
            assert SimilarityFunction.to_similarity_pairwise_fn(key) is functions[1]


@pytest.mark.parametrize("name", ["bad", "COSINE", None, 0])
def test_an_unknown_similarity_function(name: Any) -> None:
    for function in (
        SimilarityFunction,
        SimilarityFunction.to_similarity_fn,
        SimilarityFunction.to_similarity_pairwise_fn,
    ):
        with pytest.raises(ValueError, match="cosine, dot, euclidean, manhattan") as raised:
            function(name)
        assert isinstance(raised.value, InputError)
        assert raised.value.argument == "similarity_function"


# paraphrase_mining


def test_paraphrase_mining(tiny_encoder: SentenceEncoder) -> None:
    pairs = util.paraphrase_mining(tiny_encoder, TEXTS)
    assert pairs[0] == [1.0, 1, 4]
    assert len(pairs) == 10
    assert pairs == util.paraphrase_mining_embeddings(tiny_encoder.encode(TEXTS))
    assert util.paraphrase_mining(tiny_encoder, iter(TEXTS), max_pairs=1) == pairs[:1]
    assert util.paraphrase_mining(tiny_encoder, []) == []


def test_paraphrase_mining_passes_its_arguments_on() -> None:
    class Model:
        def encode(self, sentences: Any, **options: Any) -> Tensor:
            self.seen = sentences, options
            return torch.eye(3)

    model = Model()
    util.paraphrase_mining(model, TEXTS, True, 7)
    options = {"show_progress_bar": True, "batch_size": 7, "convert_to_tensor": True}
    assert model.seen == (TEXTS, options)
    more: dict[str, Any] = {"truncate_dim": 2, "prompt_name": "query", "prompt": "q: "}
    found = util.paraphrase_mining(
        model, TEXTS, True, 7, 1, 1, 2, 1, similarity.euclidean_sim, **more
    )
    assert model.seen == (TEXTS, options | more)
    assert found == [[pytest.approx(-math.sqrt(2)), 0, 1], [pytest.approx(-math.sqrt(2)), 0, 2]]


# normalize_embeddings


def test_normalize_by_hand() -> None:
    unit = util.normalize_embeddings(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert util.normalize_embeddings(torch.tensor([0, 5])).tolist() == [0.0, 1.0]
    assert util.normalize_embeddings(np.array([3.0, 4.0])).dtype == torch.float64


# truncate_embeddings


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy])
def test_truncate(form: Any) -> None:
    rows = form(ROWS)
    kept = util.truncate_embeddings(rows, 2)
    assert type(kept) is type(rows)
    assert kept.tolist() == [[0, 1], [4, 5], [8, 9]]
    assert util.truncate_embeddings(rows[0], 3).tolist() == [0, 1, 2]
    assert util.truncate_embeddings(rows, None) is rows
    assert util.truncate_embeddings(rows, 1000).tolist() == ROWS.tolist()


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, InputError), (-1, InputError), (16.0, InputTypeError), ("16", InputTypeError),
     (True, InputTypeError)],
)  # fmt: skip
def test_truncate_to_nonsense(value: Any, error: type[InputError]) -> None:
    with pytest.raises(error, match="truncate_dim") as raised:
        util.truncate_embeddings(ROWS, value)
    assert raised.value.argument == "truncate_dim"


def test_truncate_what_is_none() -> None:
    with pytest.raises(InputTypeError, match="embeddings is list"):
        util.truncate_embeddings([[1.0, 2.0]], 1)  # type: ignore[type-var]


# is_singular_input


@pytest.mark.parametrize(
    ("inputs", "singular"),
    [("text", True), ("", True), (np.str_("text"), True), (np.array("text"), True),
     (["text"], False), (("a", "b"), False), ([], False), (np.array(["text"]), False),
     (np.array(1.0), False), (iter(["text"]), False), ({"a": 1}, False), (None, False)],
)  # fmt: skip
def test_is_singular_input(inputs: Any, singular: bool) -> None:
    assert util.is_singular_input(inputs) is singular


# batch_to_device


def test_batch_to_device() -> None:
    batch = {"input_ids": torch.ones(1, 2), "text": ["a"], "count": 3}
    before = dict(batch)
    moved = util.batch_to_device(batch, torch.device("cpu"))
    assert moved is batch
    assert all(moved[name] is before[name] for name in before)


def test_batch_to_an_absent_device() -> None:
    with pytest.raises(InputError, match="nonsense") as raised:
        util.batch_to_device({}, "nonsense")
    assert raised.value.argument == "device"


# beside the reference


@pytest.fixture(scope="module")
def theirs() -> Any:
    package = pytest.importorskip(
        "sentence_transformers", reason="needs the reference: pip install 'minilm[reference]'"
    )
    if int(package.__version__.split(".")[0]) < 6:
        pytest.skip("the functions of version 6 are those that ours follow")
    return importlib.import_module("sentence_transformers.util")


@pytest.mark.reference
def test_every_name_is_one_of_the_reference(theirs: Any) -> None:
    ours_only = {"dequantize", "is_singular_input", "model_ranges"}
    assert {name for name in util.__all__ if not hasattr(theirs, name)} == ours_only


@pytest.mark.reference
@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_the_references_scores(theirs: Any, name: str) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 30, 384)).astype(np.float32)
    for convert in ("to_similarity_fn", "to_similarity_pairwise_fn"):
        ours = getattr(SimilarityFunction, convert)(name)(a, b)
        expected = getattr(theirs.SimilarityFunction, convert)(name)(a, b)
        # Sums of 384 numbers in float32; the reference takes distances by a product.
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.reference
def test_the_references_signatures(theirs: Any) -> None:
    from inspect import signature

    for name in ("semantic_search", "paraphrase_mining", "paraphrase_mining_embeddings",
                 "community_detection", "quantize_embeddings", "truncate_embeddings"):  # fmt: skip
        ours = signature(getattr(util, name)).parameters
        expected = signature(getattr(theirs, name)).parameters
        more = {"paraphrase_mining_embeddings": ["show_progress_bar"]}.get(name, [])
        assert list(ours) == [*expected, *more], name
        for key, parameter in expected.items():
            if key != "score_function":
                assert ours[key].default == parameter.default, f"{name}({key})"


@pytest.mark.reference
@pytest.mark.parametrize("rows", [ROWS, ROWS[0], np.zeros((2, 4), np.float32)])
def test_the_references_normalize_and_truncate(theirs: Any, rows: Any) -> None:
    tensor = torch.from_numpy(rows)
    torch.testing.assert_close(
        util.normalize_embeddings(tensor), theirs.normalize_embeddings(tensor)
    )
    for width in (1, 4, 9, None):
        ours = util.truncate_embeddings(tensor, width)
        assert torch.equal(ours, theirs.truncate_embeddings(tensor, width))


def test_an_error_names_its_argument_in_words() -> None:
    with pytest.raises(InputError, match=re.escape("truncate_dim is 0; pass a positive integer")):
        util.truncate_embeddings(ROWS, 0)

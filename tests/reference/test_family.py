"""Other models of the family: made by the reference libraries on the fly, read by both.

All weights are random, those of biases and norms too, so that no mistake hides behind a 0 or a 1.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import TINY_WORDS, edit_json, tiny_tokenizer_json
from minilm import SentenceEncoder

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::minilm.errors.TruncationWarning"),  # two texts are long
]

# Values are around 1 and sums have at most 200 terms: two orders of summation differ by some
# 1e-15 in float64, and three layers carry that to below 1e-14. The smallest mistake that we know,
# layer_norm_eps 1e-12 in place of 1e-5, is 1e-6 and more.
TOLERANCE = 1e-13

LIMIT = 12

SIZES: dict[str, dict[str, Any]] = {
    "one layer, one head, one type": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "two layers, four heads": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 24,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    },
    "three layers, three types": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "type_vocab_size": 3,
        "layer_norm_eps": 1e-5,
    },
    "heads of two": {
        "hidden_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 10,
        "intermediate_size": 200,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "vocab_size": 24,  # exactly the tokenizer's; elsewhere 40
    },
}

TEXTS = [
    "",
    " \t\n ",
    "the dog",
    "The DOG bites the man.",
    "the man bites the dog.",
    "a cat sees the sun, the sun is out!",
    "dogs run",
    "walking dogs",
    "café",
    "CAFE\u0301",
    "unknown words everywhere",
    "the zebra runs",
    "?",
    "?!.,",
    "the " * 10,  # exactly as long as the limit, with [CLS] and [SEP]
    "the " * 11,
    "the dog bites the man and the cat " * 40,
    "a\u0000dog\u200b",
    "模型 dog",
    "[MASK] dog [SEP] cat",
    "🐕 dog",
]


@pytest.fixture(scope="module")
def libraries() -> tuple[Any, Any]:
    reason = "needs the reference: pip install 'minilm[reference]'"
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    return sentence_transformers, pytest.importorskip("transformers", reason=reason)


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def transformer(
    libraries: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """The reference's first stage, with seeded weights; each size is made once."""
    _, transformers = libraries
    modules = _modules()

    @cache
    def transformer(size: str) -> Any:
        folder = tmp_path_factory.mktemp("bert")
        with torch.random.fork_rng():
            torch.manual_seed(sorted(SIZES).index(size))
            bert = transformers.BertModel(
                transformers.BertConfig(**{"vocab_size": 40} | SIZES[size])
            )
            for name, parameter in bert.named_parameters():
                parameter.data.normal_(mean=float(name.endswith("Norm.weight")), std=0.3)
        bert.save_pretrained(folder)
        tokenizer_json = json.dumps(tiny_tokenizer_json())
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
        )
        return modules.Transformer(str(folder), max_seq_length=LIMIT)

    return transformer


def _modules() -> Any:
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:  # version 5
        from sentence_transformers import models as modules
    return modules


@pytest.fixture
def make(libraries: tuple[Any, Any], transformer: Callable[[str], Any], tmp_path: Path) -> Make:
    """Has the reference save a model, in the format of the version installed."""
    modules = _modules()

    def make(size: str, pooling: str, normalize: bool) -> Path:
        stages = [
            transformer(size),
            modules.Pooling(SIZES[size]["hidden_size"], pooling_mode=pooling),
            *([modules.Normalize()] if normalize else []),
        ]
        model = libraries[0].SentenceTransformer(modules=stages, device="cpu")
        model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
        return tmp_path / "model"

    return make


def rewrite_as_version_5(folder: Path, pooling: str) -> None:
    """The same model in the form that most published models have."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    (folder / "modules.json").write_text(json.dumps(modules))
    width = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    flags = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    settings = {"max_seq_length": LIMIT, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    edit_json(folder / "tokenizer_config.json", model_max_length=512)
    edit_json(folder / "config_sentence_transformers.json", model_type=...)
    (folder / "2_Normalize" / "config.json").unlink(missing_ok=True)


def compare(libraries: tuple[Any, Any], folder: Path, stages: int) -> None:
    reference = libraries[0].SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"dtype": torch.float64}
    )
    encoder = SentenceEncoder.from_pretrained(folder, device="cpu", dtype="float64")
    assert len(list(reference)) == stages
    assert type(encoder.normalize).__name__ == ("Normalize" if stages == 3 else "Identity")
    assert encoder.max_seq_length == reference.max_seq_length == LIMIT

    tokenize = getattr(reference, "preprocess", None) or reference.tokenize
    for text in TEXTS:
        expected_ids = tokenize([text])["input_ids"].tolist()
        assert encoder.tokenize([text])["input_ids"].tolist() == expected_ids, text

    expected = reference.encode(TEXTS, batch_size=4)
    actual = encoder.encode(TEXTS, batch_size=7)
    assert actual.dtype == expected.dtype == np.float64
    worst = np.abs(actual - expected).max(axis=1)
    assert worst.max() <= TOLERANCE, dict(zip(TEXTS, worst, strict=True))
    # Else all could be equal because all is constant.
    assert np.abs(expected[2] - expected[5]).max() > 0.1


def test_the_texts_reach_every_word_of_the_vocabulary(make: Make) -> None:
    folder = make("two layers, four heads", "mean", True)
    encoder = SentenceEncoder.from_pretrained(folder, device="cpu")
    seen = {i for text in TEXTS for i in encoder.tokenize([text])["input_ids"].flatten().tolist()}
    assert {TINY_WORDS[i] for i in set(range(24)) - seen} == {"[PAD]"}


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "no normalize"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("size", SIZES)
def test_the_format_of_the_version_installed(
    libraries: tuple[Any, Any], make: Make, size: str, pooling: str, normalize: bool
) -> None:
    compare(libraries, make(size, pooling, normalize), 3 if normalize else 2)


@pytest.mark.parametrize(
    ("pooling", "normalize"), [("mean", True), ("cls", False)], ids=["mean, normalize", "cls"]
)
@pytest.mark.parametrize("size", SIZES)
def test_the_format_of_version_5(
    libraries: tuple[Any, Any], make: Make, size: str, pooling: str, normalize: bool
) -> None:
    folder = make(size, pooling, normalize)
    rewrite_as_version_5(folder, pooling)
    compare(libraries, folder, 3 if normalize else 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", list(SIZES)[1:3])
def test_weights_saved_in_half_precision(
    libraries: tuple[Any, Any], make: Make, size: str, dtype: torch.dtype
) -> None:
    """Widening is exact: the tolerance stays."""
    folder = make(size, "mean", True)
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load(weights.read_bytes())
    halved = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    safetensors.torch.save_file(halved, weights, metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    compare(libraries, folder, 3)

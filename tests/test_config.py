import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from minilm import BertConfig, MinilmError
from minilm.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}

# The published config.json, field by field.
PUBLISHED: dict[str, Any] = SIZES | {
    "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.8.2",
    "type_vocab_size": 2,
    "use_cache": True,
}


def refused(**changes: Any) -> ConfigError:
    """The error for the published file with these fields changed; `...` deletes one."""
    values = {name: value for name, value in (PUBLISHED | changes).items() if value is not ...}
    with pytest.raises(ConfigError) as caught:
        BertConfig.from_dict(values, "models/x/config.json")
    assert caught.value.path == Path("models/x/config.json")
    assert str(caught.value).startswith(str(caught.value.path))
    return caught.value


def test_published_file_gives_the_published_sizes() -> None:
    config = BertConfig.from_dict(PUBLISHED, "config.json")
    assert dataclasses.asdict(config) == SIZES | {
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
    }
    assert config.head_size == 32


def test_defaults_are_those_of_the_published_file() -> None:
    assert BertConfig() == BertConfig.from_dict(PUBLISHED, "config.json")
    assert BertConfig() == BertConfig.from_dict(SIZES, "config.json")


def test_values_of_the_file_win_over_the_defaults() -> None:
    changes = {
        "vocab_size": 7,
        "hidden_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 5,
        "max_position_embeddings": 4,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0,
        "attention_probs_dropout_prob": 0.25,
        "pad_token_id": 6,
    }
    config = BertConfig.from_dict(PUBLISHED | changes, "config.json")
    assert dataclasses.asdict(config) == changes
    assert config.head_size == 2


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("model_type", "roberta", "'bert'"),
        ("model_type", None, "'bert'"),
        ("hidden_act", "relu", "'gelu' or 'gelu_python'"),
        ("hidden_act", "gelu_new", "'gelu' or 'gelu_python'"),
        ("hidden_act", "GELU", "'gelu' or 'gelu_python'"),
        ("position_embedding_type", "relative_key", "'absolute'"),
        ("is_decoder", True, "False"),
        ("add_cross_attention", True, "False"),
        ("is_encoder_decoder", True, "False"),
        ("pruned_heads", {"0": [1]}, "{} or None"),
        ("quantization_config", {"load_in_8bit": True}, "None"),
        ("auto_map", {"AutoModel": "modeling.OwnModel"}, "None or {}"),
        ("configuration_files", ["config.4.0.0.json"], "None or [] or ['config.json']"),
        ("transformers_weights", "other.safetensors", "None or 'model.safetensors'"),
    ],
)
def test_what_is_not_implemented_is_refused(field: str, value: object, supported: str) -> None:
    error = refused(**{field: value})
    assert error.problems == (f"{field} is {value!r}; supported: {supported}",)


@pytest.mark.parametrize(
    ("field", "value"),
    [("pruned_heads", {}), ("pruned_heads", None), ("quantization_config", None)],
)
def test_empty_requests_are_none(field: str, value: object) -> None:
    assert BertConfig.from_dict(PUBLISHED | {field: value}, "config.json") == BertConfig()


@pytest.mark.parametrize("field", SIZES)
def test_missing_size_is_not_guessed(field: str) -> None:
    assert refused(**{field: ...}).problems == (f"{field} is missing; give an integer",)


BOUNDS = {
    "vocab_size": (1, 2_000_000),
    "hidden_size": (1, 16_384),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 256),
    "intermediate_size": (1, 65_536),
    "max_position_embeddings": (3, 131_072),
    "type_vocab_size": (1, 1_024),
}


@pytest.mark.parametrize("value", [10**7, 0, -1, True, 12.0, "12", None, [12], math.nan])
@pytest.mark.parametrize("field", BOUNDS)
def test_size_out_of_bounds_or_of_another_type(field: str, value: object) -> None:
    low, high = BOUNDS[field]
    problem = f"{field} is {value!r}; expected an integer from {low} to {high}"
    assert refused(**{field: value}).problems == (problem,)


@pytest.mark.parametrize("field", BOUNDS)
def test_bounds_belong_to_the_range(field: str) -> None:
    low, high = BOUNDS[field]
    for value in (low, high):
        sizes = {"num_attention_heads": 1, "hidden_size": 256} | {field: value}  # 1, 256 divide 256
        assert getattr(BertConfig.from_dict(PUBLISHED | sizes, "config.json"), field) == value
    refused(**{field: low - 1})
    refused(**{field: high + 1})


def test_a_million_layers() -> None:
    assert refused(num_hidden_layers=10**6).problems == (
        "num_hidden_layers is 1000000; expected an integer from 1 to 256",
    )


def test_heads_must_divide_the_hidden_size() -> None:
    assert refused(hidden_size=385).problems == (
        "num_attention_heads is 12; it must divide hidden_size, 385",
    )


def test_no_padding_id() -> None:
    assert BertConfig.from_dict(PUBLISHED | {"pad_token_id": None}, "x").pad_token_id is None


@pytest.mark.parametrize("value", [-1, True, 0.0])
def test_padding_id_of_another_kind(value: object) -> None:
    problem = f"pad_token_id is {value!r}; expected an integer >= 0"
    assert refused(pad_token_id=value).problems == (problem,)


def test_padding_id_beyond_the_vocabulary() -> None:
    assert refused(pad_token_id=30522).problems == (
        "pad_token_id is 30522; expected less than vocab_size, 30522",
    )


FRACTIONS = ["layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob"]


@pytest.mark.parametrize("value", [True, "0.1", None])
@pytest.mark.parametrize("field", FRACTIONS)
def test_fraction_of_another_type(field: str, value: object) -> None:
    assert refused(**{field: value}).problems == (f"{field} is {value!r}; expected a number",)


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", FRACTIONS)
def test_fraction_out_of_bounds(field: str, value: float) -> None:
    problem = f"{field} is {value!r}; expected a number from 0 to below 1"
    assert refused(**{field: value}).problems == (problem,)


def test_all_sizes_out_of_bounds_are_listed_in_one_error() -> None:
    error = refused(vocab_size=0, num_hidden_layers=10**6, hidden_dropout_prob=2)
    assert [problem.split()[0] for problem in error.problems] == [
        "vocab_size",
        "num_hidden_layers",
        "hidden_dropout_prob",
    ]
    assert str(error) == "models/x/config.json: 3 problems" + "".join(
        f"\n  - {problem}" for problem in error.problems
    )


def test_problems_of_different_kinds_are_listed_in_one_error() -> None:
    error = refused(hidden_act="relu", is_decoder=True, vocab_size=..., num_hidden_layers=10**6)
    named = {problem.split()[0] for problem in error.problems}
    assert named == {"hidden_act", "is_decoder", "vocab_size", "num_hidden_layers"}


def test_indivisible_heads_are_listed_beside_other_problems() -> None:
    error = refused(hidden_size=385, num_hidden_layers=10**6)
    assert {problem.split()[0] for problem in error.problems} == {
        "num_attention_heads",
        "num_hidden_layers",
    }


def test_default_of_a_missing_size_is_not_checked_against_the_others() -> None:
    error = refused(hidden_size=..., num_attention_heads=7)  # 7 does not divide the default, 384
    assert error.problems == ("hidden_size is missing; give an integer",)


def test_constructor_checks_too() -> None:
    with pytest.raises(ConfigError) as caught:
        BertConfig(num_hidden_layers=0)
    assert caught.value.path == Path("BertConfig")
    assert caught.value.problems == ("num_hidden_layers is 0; expected an integer from 1 to 256",)
    with pytest.raises(ConfigError):
        dataclasses.replace(BertConfig(), hidden_size=100)


def test_error_is_a_value_error_and_survives_pickling() -> None:
    error = refused(hidden_size=..., hidden_act="relu")
    assert isinstance(error, MinilmError)
    assert isinstance(error, ValueError)
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), copied.path, copied.problems) == (ConfigError, error.path, error.problems)
    assert str(copied) == str(error)


def test_frozen_and_hashable() -> None:
    config = BertConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]
    assert hash(config) == hash(BertConfig())
    assert config != BertConfig(num_hidden_layers=12)

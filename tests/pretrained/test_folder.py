"""Model folders: what is read from them, and everything that must be refused before use."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import TINY, edit_json, tiny_tokenizer_json, write_model_folder
from minilm import SentenceEncoder
from minilm.errors import (
    ConfigError,
    HashMismatchError,
    MinilmError,
    ModelFolderError,
    ModelNotFoundError,
    NotAFolderError,
    TokenizerError,
    WeightsError,
)
from minilm.pretrained import folder
from minilm.source import ModelFiles

REQUIRED = {
    "modules.json": ConfigError,
    "config.json": ConfigError,
    "1_Pooling/config.json": ConfigError,
    "tokenizer.json": TokenizerError,
    "model.safetensors": WeightsError,
}
OPTIONAL = {
    "sentence_bert_config.json": ConfigError,
    "tokenizer_config.json": ConfigError,
    "config_sentence_transformers.json": ConfigError,
    "2_Normalize/config.json": ConfigError,
}
ALL_FILES = REQUIRED | OPTIONAL

Refuse = Callable[..., MinilmError]


def load(path: str | os.PathLike[str]) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(path, device="cpu")


@pytest.fixture
def refuse(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Loads the folder and checks the error: its type, the path in front, the text of interest.

    Checks too that no network was built before the error.
    """
    built: list[object] = []
    monkeypatch.setattr(folder, "build_bert", lambda *arguments: built.append(arguments))

    def check(file: str, error: type[MinilmError], *texts: str) -> MinilmError:
        with pytest.raises(MinilmError) as info:
            load(tiny_folder)
        assert built == []
        message = str(info.value)
        assert type(info.value) is error, message
        assert message.startswith(f"{tiny_folder / file}: "), message
        for text in texts:
            assert text in message
        return info.value

    return check


def complete(path: Path) -> None:
    """Add the optional files that the tiny folder does without."""
    (path / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "", "document": ""}, "default_prompt_name": None})
    )
    (path / "2_Normalize").mkdir()
    (path / "2_Normalize" / "config.json").write_text(
        json.dumps({"module_input_name": "sentence_embedding"})
    )


def write_stages(path: Path, *stages: tuple[str, str]) -> None:
    entries = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, place) in enumerate(stages)
    ]
    (path / "modules.json").write_text(json.dumps(entries))


def test_the_complete_folder_loads(tiny_folder: Path) -> None:
    """Else every refusal below would prove nothing."""
    complete(tiny_folder)
    encoder = load(tiny_folder)
    assert [type(stage).__name__ for stage in encoder] == ["BertModel", "MeanPooling", "Normalize"]
    assert encoder.max_seq_length == 12
    assert encoder.similarity_fn_name == "cosine"
    assert np.linalg.norm(encoder.encode("the dog")) == pytest.approx(1, abs=1e-6)


# Files that are missing, cut, or something else.


@pytest.mark.parametrize("file", REQUIRED)
def test_a_missing_file(tiny_folder: Path, refuse: Refuse, file: str) -> None:
    (tiny_folder / file).unlink()
    refuse(file, REQUIRED[file], "is missing")


@pytest.mark.parametrize("file", OPTIONAL)
def test_an_optional_file_may_be_missing(tiny_folder: Path, file: str) -> None:
    complete(tiny_folder)
    (tiny_folder / file).unlink()
    assert load(tiny_folder).encode("the dog").shape == (32,)


@pytest.mark.parametrize("file", ALL_FILES)
def test_a_file_cut_to_half(tiny_folder: Path, refuse: Refuse, file: str) -> None:
    complete(tiny_folder)
    path = tiny_folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refuse(file, ALL_FILES[file], "is not ")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:53aa5117\nsize 90868376\n"
FOREIGN = {
    "empty": (b"", "an empty file"),
    "lfs": (LFS, "git lfs pull"),
    "html": (b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>", "a web page"),
    "pickle": (pickle.dumps({"a": 1}), "pickles are never read"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickles are never read"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "a compressed file; unpack it first"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("file", ALL_FILES)
def test_a_file_that_is_something_else(
    tiny_folder: Path, refuse: Refuse, file: str, kind: str
) -> None:
    complete(tiny_folder)
    data, text = FOREIGN[kind]
    (tiny_folder / file).write_bytes(data)
    refuse(file, ALL_FILES[file], "looks like ", text)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xfe\xfd\xfc", id="not UTF-8"),
        pytest.param(b"[" * 100_000, id="nested beyond the parser's stack"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="a string"),
        pytest.param(b"{'single': 1}", id="Python, not JSON"),
    ],
)
@pytest.mark.parametrize("file", [name for name in ALL_FILES if name.endswith(".json")])
def test_a_file_that_is_not_the_json_expected(
    tiny_folder: Path, refuse: Refuse, file: str, data: bytes
) -> None:
    complete(tiny_folder)
    (tiny_folder / file).write_bytes(data)
    refuse(file, ALL_FILES[file])


def test_json_with_a_byte_order_mark_loads(tiny_folder: Path) -> None:
    path = tiny_folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(tiny_folder).bert.config == TINY


def test_several_broken_files_are_one_error_that_lists_all(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    monkeypatch.setattr(folder, "build_bert", lambda *arguments: built.append(arguments))
    edit_json(tiny_folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False)
    edit_json(tiny_folder / "sentence_bert_config.json", max_seq_length=0)
    (tiny_folder / "tokenizer.json").unlink()
    (tiny_folder / "model.safetensors").write_bytes(LFS)
    with pytest.raises(ModelFolderError) as info:
        load(tiny_folder)
    message = str(info.value)
    assert message.startswith(f"{tiny_folder}: 4 problems")
    assert info.value.path == tiny_folder
    assert [type(error) for error in info.value.errors] == [
        ConfigError,
        ConfigError,
        TokenizerError,
        WeightsError,
    ]
    for error in info.value.errors:
        assert str(error) in message
    assert built == []


# modules.json.

STAGES = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([], id="none"),
        pytest.param(STAGES[:1], id="no pooling"),
        pytest.param([STAGES[0], STAGES[2]], id="no pooling, normalize"),
        pytest.param(STAGES[1:], id="no transformer"),
        pytest.param([STAGES[0], STAGES[2], STAGES[1]], id="normalize before pooling"),
        pytest.param([STAGES[1], STAGES[0], STAGES[2]], id="pooling first"),
        pytest.param([STAGES[0], STAGES[1], STAGES[1]], id="pooling twice"),
        pytest.param([*STAGES[:2], ("Dense", "2_Dense"), STAGES[2]], id="dense"),
        pytest.param([*STAGES, ("Dense", "3_Dense")], id="dense last"),
        pytest.param([("CLIPModel", ""), *STAGES[1:]], id="unknown type"),
        pytest.param([("transformer", ""), *STAGES[1:]], id="lower case"),
    ],
)
def test_other_stages_are_refused(
    tiny_folder: Path, refuse: Refuse, stages: list[tuple[str, str]]
) -> None:
    write_stages(tiny_folder, *stages)
    named = ", ".join(kind for kind, _ in stages) or "none"
    refuse(
        "modules.json", ConfigError, f"lists the stages {named}; supported: Transformer, Pooling"
    )


@pytest.mark.parametrize(
    "entries",
    [
        {"0": "Transformer"},
        ["Transformer", "Pooling"],
        [{"type": "sentence_transformers.models.Transformer"}],
        [{"type": None, "path": ""}],
        [None],
        [[]],
    ],
)
def test_a_modules_json_of_another_shape_is_refused(
    tiny_folder: Path, refuse: Refuse, entries: Any
) -> None:
    (tiny_folder / "modules.json").write_text(json.dumps(entries))
    refuse("modules.json", ConfigError, "a list")


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "place",
    ["../x", "..", "/etc", "C:\\x", "C:x", "\\\\host\\share", "a/../../b", "..\\x", "a\\..\\b"],
)
def test_a_path_that_leads_outside_is_refused(
    tiny_folder: Path, refuse: Refuse, place: str, stage: int
) -> None:
    stages = list(STAGES)
    stages[stage] = (stages[stage][0], place)
    write_stages(tiny_folder, *stages)
    refuse("modules.json", ConfigError, f"path {place!r} leads outside the folder")


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("place", "message"),
    [("x" * 300, "of 300 characters is too long for a file"), ("\ud800", "is no Unicode text")],
    ids=["long", "surrogate"],
)
def test_a_path_that_no_file_has_is_named(
    tiny_folder: Path, refuse: Refuse, place: str, message: str, stage: int
) -> None:
    stages = list(STAGES)
    stages[stage] = (stages[stage][0], place)
    write_stages(tiny_folder, *stages)
    refuse("modules.json", ConfigError, message)


def test_a_key_that_is_there_twice_is_refused(tiny_folder: Path, refuse: Refuse) -> None:
    path = tiny_folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"layer_norm_eps": 0.5, ', 1))
    refuse("config.json", ConfigError, "has the key 'layer_norm_eps' more than once")


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("1_Pooling", "1_Pooling"),
        ("1_Pooling/", "1_Pooling"),
        ("./1_Pooling", "1_Pooling"),
        ("sub/1_Pooling", "sub/1_Pooling"),
        ("sub\\1_Pooling", "sub/1_Pooling"),
        ("1..Pooling", "1..Pooling"),
        ("mittelwert größe", "mittelwert größe"),
    ],
)
def test_paths_inside_the_folder_work(tiny_folder: Path, place: str, where: str) -> None:
    (tiny_folder / where).parent.mkdir(exist_ok=True)
    (tiny_folder / "1_Pooling").rename(tiny_folder / where)
    write_stages(tiny_folder, STAGES[0], ("Pooling", place), STAGES[2])
    assert len(load(tiny_folder)) == 3


def test_a_transformer_in_a_folder_of_its_own(tiny_folder: Path) -> None:
    expected = load(tiny_folder).encode("the dog bites")
    (tiny_folder / "0_Transformer").mkdir()
    for name in (
        "config.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ):
        (tiny_folder / name).rename(tiny_folder / "0_Transformer" / name)
    write_stages(tiny_folder, ("Transformer", "0_Transformer"), *STAGES[1:])
    encoder = load(tiny_folder)
    assert encoder.max_seq_length == 12
    assert np.array_equal(encoder.encode("the dog bites"), expected)


def test_a_broken_file_of_a_transformer_folder_is_named_with_it(
    tiny_folder: Path, refuse: Refuse
) -> None:
    write_stages(tiny_folder, ("Transformer", "0_Transformer"), *STAGES[1:])
    shutil.copytree(tiny_folder, tiny_folder / "0_Transformer")
    edit_json(tiny_folder / "0_Transformer" / "config.json", hidden_act="relu")
    refuse("0_Transformer/config.json", ConfigError, "hidden_act is 'relu'")


def test_without_normalize_the_vectors_keep_their_lengths(tiny_folder: Path) -> None:
    normalized = load(tiny_folder).encode(["the dog", "a cat sees the sun"])
    write_stages(tiny_folder, *STAGES[:2])
    encoder = load(tiny_folder)
    assert len(encoder) == 2
    vectors = encoder.encode(["the dog", "a cat sees the sun"])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (abs(lengths - 1) > 0.5).all()
    assert np.allclose(vectors / lengths, normalized, atol=1e-6)


def test_the_type_names_of_version_6(tiny_folder: Path) -> None:
    kinds = (
        "sentence_transformers.base.modules.transformer.Transformer",
        "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "sentence_transformers.base.modules.normalize.Normalize",
    )
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (kind, (_, path)) in enumerate(zip(kinds, STAGES, strict=True))
    ]
    (tiny_folder / "modules.json").write_text(json.dumps(entries))
    assert len(load(tiny_folder)) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("module_input_name", "token_embeddings"), ("module_output_name", "other")],
)
def test_settings_of_normalize_that_are_refused(
    tiny_folder: Path, refuse: Refuse, field: str, value: Any
) -> None:
    complete(tiny_folder)
    edit_json(tiny_folder / "2_Normalize" / "config.json", **{field: value})
    refuse("2_Normalize/config.json", ConfigError, f"{field} is {value!r}; supported:")


def test_two_stages_of_one_name_are_refused(tiny_folder: Path, refuse: Refuse) -> None:
    entries = json.loads((tiny_folder / "modules.json").read_text(encoding="utf-8"))
    entries[2]["name"] = entries[1]["name"]
    (tiny_folder / "modules.json").write_text(json.dumps(entries))
    refuse("modules.json", ConfigError, "gives two stages one name")


# Pooling.

OLD_FLAGS = (
    "pooling_mode_cls_token",
    "pooling_mode_mean_tokens",
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
    "pooling_mode_lasttoken",
)


def write_pooling(path: Path, **fields: Any) -> None:
    (path / "1_Pooling" / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"pooling_mode_mean_tokens": True}, "MeanPooling"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "ClsPooling"),
        (dict.fromkeys(OLD_FLAGS, False) | {"pooling_mode_mean_tokens": True}, "MeanPooling"),
        (dict.fromkeys(OLD_FLAGS, False) | {"pooling_mode_cls_token": True}, "ClsPooling"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}, "MeanPooling"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "MeanPooling"),
        ({"word_embedding_dimension": 32, "pooling_mode_max_tokens": False}, "MeanPooling"),
        ({"pooling_mode": "mean"}, "MeanPooling"),
        ({"pooling_mode": "cls"}, "ClsPooling"),
        ({"pooling_mode": ["cls"]}, "ClsPooling"),
        ({"pooling_mode": "mean", "embedding_dimension": 32}, "MeanPooling"),
    ],
)
def test_pooling_that_loads(tiny_folder: Path, fields: dict[str, Any], kind: str) -> None:
    write_pooling(tiny_folder, **fields)
    assert type(load(tiny_folder).pooling).__name__ == kind


@pytest.mark.parametrize("value", [False, None, "yes"])
def test_pooling_without_the_prompt_is_refused(
    tiny_folder: Path, refuse: Refuse, value: Any
) -> None:
    write_pooling(tiny_folder, pooling_mode="mean", include_prompt=value)
    refuse("1_Pooling/config.json", ConfigError, f"include_prompt is {value!r}; supported: true")


def test_cls_pooling_takes_the_first_token(tiny_folder: Path) -> None:
    write_pooling(tiny_folder, pooling_mode="cls")
    write_stages(tiny_folder, *STAGES[:2])
    encoder = load(tiny_folder)
    features = encoder.tokenize(["the dog bites the man"])
    first = encoder(features)["token_embeddings"][0, 0]
    assert np.allclose(encoder.encode("the dog bites the man"), first.detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode_weightedmean_tokens": True}, "pooling_mode_weightedmean_tokens"),
        ({"pooling_mode_lasttoken": True}, "pooling_mode_lasttoken"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "pooling_mode_mean_sqrt_len_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_of_the_future": True}, "pooling_mode_of_the_future"),
        (dict.fromkeys(OLD_FLAGS, False), "none"),
        ({}, "none"),
        ({"pooling_mode": "max"}, "pooling_mode=max"),
        ({"pooling_mode": "lasttoken"}, "pooling_mode=lasttoken"),
        ({"pooling_mode": ["mean", "cls"]}, "mean, cls"),
        ({"pooling_mode": []}, "none"),
        ({"pooling_mode": None}, ""),
        ({"pooling_mode": 5}, "5"),
        ({"pooling_mode": {"mean": True}}, ""),
    ],
)
def test_pooling_that_is_refused(
    tiny_folder: Path, refuse: Refuse, fields: dict[str, Any], text: str
) -> None:
    write_pooling(tiny_folder, **fields)
    refuse("1_Pooling/config.json", ConfigError, text, "supported: mean or cls")


@pytest.mark.parametrize("size", [31, 384, "32", 0])
@pytest.mark.parametrize("field", ["word_embedding_dimension", "embedding_dimension"])
def test_a_pooling_of_another_width_is_refused(
    tiny_folder: Path, refuse: Refuse, field: str, size: Any
) -> None:
    write_pooling(tiny_folder, **{"pooling_mode_mean_tokens": True, field: size})
    refuse(
        "1_Pooling/config.json",
        ConfigError,
        f"the embedding dimension is {size!r}; hidden_size in config.json is 32",
    )


# config.json.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "roberta"),
        ("hidden_act", "relu"),
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"load_in_8bit": True}),
        # Sizes.
        ("num_hidden_layers", 10**6),
        ("hidden_size", 10**9),
        ("vocab_size", 10**12),
        ("intermediate_size", 10**15),
        ("max_position_embeddings", 10**9),
        ("type_vocab_size", 10**9),
        ("num_hidden_layers", 0),
        ("hidden_size", -32),
        ("hidden_size", 32.0),
        ("hidden_size", "32"),
        ("hidden_size", True),
        ("hidden_size", None),
        ("hidden_size", ...),
        ("vocab_size", ...),
        ("num_hidden_layers", ...),
        ("num_attention_heads", ...),
        ("num_attention_heads", 5),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", -1e-12),
        ("layer_norm_eps", "1e-12"),
        ("hidden_dropout_prob", 2),
        ("pad_token_id", 40),
    ],
)
def test_a_config_that_is_refused(
    tiny_folder: Path, refuse: Refuse, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not even a network without memory: a million layers would take minutes.
    monkeypatch.setattr("minilm.pretrained.checkpoint.BertModel", None)
    edit_json(tiny_folder / "config.json", **{field: value})
    shown = "missing" if value is ... else repr(value)
    refuse("config.json", ConfigError, f"{field} is {shown}")


def test_sizes_that_no_file_can_hold_are_refused(tiny_folder: Path, refuse: Refuse) -> None:
    """Within the bounds of each size, 100 GB in all; nothing of it is allocated."""
    edit_json(
        tiny_folder / "config.json",
        hidden_size=16_384,
        intermediate_size=65_536,
        num_hidden_layers=8,
        num_attention_heads=128,
    )
    edit_json(tiny_folder / "1_Pooling" / "config.json", word_embedding_dimension=16_384)
    refuse("model.safetensors", WeightsError, "config.json asks for [65536, 16384]")


# The weights: never random, never another model's.

TENSORS = [
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    "embeddings.LayerNorm.bias",
    "encoder.layer.0.attention.self.value.bias",
    "encoder.layer.1.output.LayerNorm.weight",
]


@pytest.mark.parametrize("name", TENSORS)
def test_a_folder_that_lacks_one_tensor_is_refused(
    tiny_folder: Path, refuse: Refuse, name: str
) -> None:
    path = tiny_folder / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    del tensors[name]
    safetensors.torch.save_file(tensors, path)
    error = refuse("model.safetensors", WeightsError, f"{name} is missing")
    assert isinstance(error, WeightsError)
    assert error.problems == (f"{name} is missing",)


@pytest.mark.parametrize(
    ("layers", "text"),
    [(1, "encoder.layer.1.output.dense.bias is unexpected"),
     (3, "encoder.layer.2.output.dense.bias is missing")],
)  # fmt: skip
def test_another_number_of_layers_than_the_files_is_refused(
    tiny_folder: Path, refuse: Refuse, layers: int, text: str
) -> None:
    edit_json(tiny_folder / "config.json", num_hidden_layers=layers)
    refuse("model.safetensors", WeightsError, text)


def test_no_pickle_is_ever_opened(
    tiny_folder: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **__: object) -> None:
        pytest.fail("a pickle was opened")

    weights = tiny_folder / "model.safetensors"
    torch.save(safetensors.torch.load(weights.read_bytes()), tiny_folder / "pytorch_model.bin")
    for target in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(target, opened)
    weights.unlink()
    refuse("model.safetensors", WeightsError, "is missing", "never pickles")
    # Nor under the other name.
    (tiny_folder / "pytorch_model.bin").rename(weights)
    refuse("model.safetensors", WeightsError, "pickles are never read")


def split_weights(folder: Path, parts: int = 2) -> dict[str, str]:
    """Split model.safetensors as transformers does; gives the index's weight_map."""
    weights = folder / "model.safetensors"
    tensors = list(safetensors.torch.load(weights.read_bytes()).items())
    weight_map: dict[str, str] = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        safetensors.torch.save_file(dict(tensors[part::parts]), folder / name)
        weight_map |= dict.fromkeys(dict(tensors[part::parts]), name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    weights.unlink()
    return weight_map


INDEX = "model.safetensors.index.json"


def test_weights_in_several_files(tiny_folder: Path) -> None:
    before = load(tiny_folder)
    split_weights(tiny_folder, 3)
    encoder = load(tiny_folder)
    assert np.array_equal(encoder.encode("the dog"), before.encode("the dog"))
    assert len([name for name in encoder.source.sha256 if "-of-00003" in name]) == 3  # type: ignore[union-attr]
    # Where there is one file, it counts, as in the reference.
    (tiny_folder / "model-00001-of-00003.safetensors").unlink()
    write_model_folder(tiny_folder / "other", seed=1)
    (tiny_folder / "other" / "model.safetensors").rename(tiny_folder / "model.safetensors")
    assert not np.array_equal(load(tiny_folder).encode("the dog"), before.encode("the dog"))


def test_all_that_is_wrong_with_weights_in_several_files(tiny_folder: Path, refuse: Refuse) -> None:
    weight_map = split_weights(tiny_folder, 4)
    first, second, third, fourth = sorted(set(weight_map.values()))
    (tiny_folder / third).unlink()
    (tiny_folder / fourth).write_bytes(LFS)
    tensors = safetensors.torch.load((tiny_folder / first).read_bytes())
    moved, gone, twice = list(tensors)[:3]
    other = safetensors.torch.load((tiny_folder / second).read_bytes())
    other |= {name: tensors[name].clone() for name in (moved, twice)}
    other["head.weight"] = torch.zeros(1)
    del tensors[moved], tensors[gone]
    safetensors.torch.save_file(tensors, tiny_folder / first)
    safetensors.torch.save_file(other, tiny_folder / second)
    outside = {"elsewhere": "../other.safetensors", "nowhere": "\ud800"}
    (tiny_folder / INDEX).write_text(json.dumps({"weight_map": weight_map | outside}))
    error = refuse(INDEX, WeightsError)
    assert isinstance(error, WeightsError)
    pointer = next(problem for problem in error.problems if "git lfs pull" in problem)
    assert pointer.startswith(f"{fourth} looks like a Git LFS pointer")
    assert sorted(error.problems) == sorted([
        pointer,
        f"{third} is missing",
        "'../other.safetensors' leads outside the folder",
        "'\\ud800' is no Unicode text, so that no file has that name",
        f"{moved} is not in {first}, where it should be",
        f"{gone} is not in {first}, where it should be",
        f"{twice} is in {second} and in another file too",
        "head.weight is unexpected",
    ])  # fmt: skip


def test_a_damaged_one_of_several_files(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = min(split_weights(tiny_folder).values())

    def verify(self: ModelFiles, name: str, data: bytes | None) -> None:
        if name == first:
            raise HashMismatchError(self.path(name), "0" * 64, "1" * 64)

    monkeypatch.setattr(ModelFiles, "verify", verify)
    with pytest.raises(HashMismatchError, match=first):
        load(tiny_folder)


def test_a_tensor_that_the_index_leaves_out(tiny_folder: Path, refuse: Refuse) -> None:
    weight_map = split_weights(tiny_folder)
    name = "encoder.layer.1.output.dense.bias"
    place = tiny_folder / weight_map.pop(name)
    tensors = safetensors.torch.load(place.read_bytes())
    del tensors[name]
    safetensors.torch.save_file(tensors, place)
    (tiny_folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    error = refuse(INDEX, WeightsError, f"{name} is missing")
    assert isinstance(error, WeightsError)
    assert len(error.problems) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[", "is not valid JSON"),
        (b"[]", "holds list; expected an object"),
        (b"{}", "has no weight_map of tensors and files"),
        (b'{"weight_map": {"a": 1}}', "has no weight_map of tensors and files"),
        (b'{"weight_map": {}}', "embeddings.word_embeddings.weight is missing"),
    ],
)
def test_an_index_that_is_refused(
    tiny_folder: Path, refuse: Refuse, content: bytes, text: str
) -> None:
    split_weights(tiny_folder)
    (tiny_folder / INDEX).write_bytes(content)
    refuse(INDEX, WeightsError, text)


# Files that lie beside.


@pytest.mark.parametrize(
    ("name", "fields", "text"),
    [
        ("adapter_config.json", {}, "is of an adapter, which changes the weights"),
        ("processor_config.json", {"processor_class": "Own"}, "processor_class is 'Own'"),
        ("preprocessor_config.json", {"auto_map": {"a": "b"}}, "auto_map is {'a': 'b'}"),
        ("video_preprocessor_config.json", [], "holds list; expected an object"),
    ],
)
def test_a_file_that_is_not_implemented_is_refused(
    tiny_folder: Path, refuse: Refuse, name: str, fields: Any, text: str
) -> None:
    (tiny_folder / name).write_text(json.dumps(fields))
    refuse(name, ConfigError, text)


# A full snapshot of the published model, and what a training and a fine-tuning leave behind.
HARMLESS = (
    ".gitattributes", "README.md", "data_config.json", "train_script.py", "pytorch_model.bin",
    "tf_model.h5", "rust_model.ot", "flax_model.msgpack", "vocab.txt", "onnx/model.onnx",
    "openvino/openvino_model.xml", "openvino/openvino_model.bin", "model.fp16.safetensors",
    "adapter_model.safetensors", "generation_config.json", "chat_template.jinja", "optimizer.pt",
    "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
    "eval/similarity_evaluation_results.csv", "2_Dense/config.json", "config_setfit.json",
    "model_head.pkl", "checkpoint-500/model.safetensors",
)  # fmt: skip


def test_files_that_nobody_acts_upon_are_passed_over(tiny_folder: Path) -> None:
    before = load(tiny_folder).encode("the dog bites")
    for name in HARMLESS:
        (tiny_folder / name).parent.mkdir(exist_ok=True)
        (tiny_folder / name).write_bytes(b"no such thing")
    special = {"unk_token": "[UNK]", "pad_token": {"content": "[PAD]", "lstrip": False}}
    (tiny_folder / "special_tokens_map.json").write_text(json.dumps(special))
    encoder = load(tiny_folder)
    assert np.array_equal(encoder.encode("the dog bites"), before)
    assert encoder.source is not None
    assert not set(HARMLESS) & set(encoder.source.sha256)


# The tokenizer.


def test_added_tokens(tiny_folder: Path) -> None:
    (tiny_folder / "added_tokens.json").write_text(json.dumps({"zebra": 24, "[NEW]": 25}))
    (tiny_folder / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": ["[NEW]"]})
    )
    tokenizer = load(tiny_folder).tokenizer
    assert tokenizer is not None
    # As in the reference what that file calls special is found in lower case too.
    assert tokenizer("the Zebra [NEW] [new]").input_ids == [[2, 5, 24, 25, 25, 3]]
    edit_json(tiny_folder / "added_tokens.json", zebra=30)
    with pytest.raises(TokenizerError, match="'zebra' has the id 30; the one that is free is 25"):
        load(tiny_folder)
    edit_json(tiny_folder / "added_tokens.json", zebra="24")
    with pytest.raises(ConfigError, match="'zebra' has no number"):
        load(tiny_folder)
    # Settings that list their added tokens themselves leave both files out.
    edit_json(tiny_folder / "tokenizer_config.json", added_tokens_decoder={})
    assert load(tiny_folder).tokenizer.vocab_size == 24  # type: ignore[union-attr]


def test_vocab_txt_in_place_of_tokenizer_json(tiny_folder: Path) -> None:
    words = "".join(f"{word}\n" for word in tiny_tokenizer_json()["model"]["vocab"])
    (tiny_folder / "vocab.txt").write_text(words, encoding="utf-8")
    before = load(tiny_folder).tokenizer
    (tiny_folder / "tokenizer.json").unlink()
    encoder = load(tiny_folder)
    assert encoder.source is not None
    assert "vocab.txt" in encoder.source.sha256
    text = "The dog walks [MASK], caf\u00e9!"
    assert before is not None
    assert encoder.tokenize([text])["input_ids"].tolist() == before([text]).input_ids
    (tiny_folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match="is another vocabulary"):
        load(tiny_folder)
    edit_json(tiny_folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json: is missing; .* does not read vocab"
    ):
        load(tiny_folder)


def test_tokens_beyond_the_word_table_are_refused(tiny_folder: Path, refuse: Refuse) -> None:
    tokens = {f"[NEW{i}]": 24 + i for i in range(17)}
    (tiny_folder / "added_tokens.json").write_text(json.dumps(tokens))
    refuse("tokenizer.json", TokenizerError, "ids up to 40; vocab_size in config.json is 40")


def cut_word_table(path: Path, rows: int) -> None:
    weights = path / "model.safetensors"
    tensors = safetensors.torch.load(weights.read_bytes())
    name = "embeddings.word_embeddings.weight"
    tensors[name] = tensors[name][:rows].clone()
    safetensors.torch.save_file(tensors, weights)
    edit_json(path / "config.json", vocab_size=rows)


def test_a_word_table_as_large_as_the_vocabulary_loads(tiny_folder: Path) -> None:
    cut_word_table(tiny_folder, 24)
    assert load(tiny_folder).encode("?").shape == (32,)  # id 23, the last


def test_a_vocabulary_larger_than_the_word_table_is_refused(
    tiny_folder: Path, refuse: Refuse
) -> None:
    cut_word_table(tiny_folder, 23)
    refuse("tokenizer.json", TokenizerError, "ids up to 23; vocab_size in config.json is 23")


def test_an_added_token_beyond_the_word_table_is_refused(tiny_folder: Path, refuse: Refuse) -> None:
    values = tiny_tokenizer_json()
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 40, "content": "[NEW]"})
    values["model"]["vocab"]["[NEW]"] = 40
    (tiny_folder / "tokenizer.json").write_text(json.dumps(values))
    refuse("tokenizer.json", TokenizerError, "ids up to 40; vocab_size in config.json is 40")


def _drop_unk(values: dict[str, Any]) -> None:
    del values["model"]["vocab"]["[UNK]"]
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] != "[UNK]"]


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_drop_unk, "the unknown token '[UNK]' is not in the vocabulary"),
        (_set("model", "unk_token", value="<unk>"), "the unknown token '<unk>'"),
        (_set("model", "type", value="BPE"), "model.type is 'BPE'"),
        (_set("model", "vocab", value={}), ""),
        (_set("model", value=None), ""),
        (_set("normalizer", value=None), "normalizer.type is None"),
        (_set("normalizer", value={"type": "NFC"}), "normalizer.type is 'NFC'"),
        (_set("pre_tokenizer", value={"type": "Metaspace"}), "pre_tokenizer.type is 'Metaspace'"),
        (_set("post_processor", value=None), "expected [CLS], one token, [SEP]"),
    ],
)
def test_a_tokenizer_that_is_refused(
    tiny_folder: Path, refuse: Refuse, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    values = tiny_tokenizer_json()
    change(values)
    (tiny_folder / "tokenizer.json").write_text(json.dumps(values))
    refuse("tokenizer.json", TokenizerError, text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("padding_side", "left"),
        ("truncation_side", "left"),
        ("do_lower_case", "yes"),
        ("do_lower_case", None),
        ("strip_accents", "no"),
        ("tokenize_chinese_chars", 3.5),
    ],
)
def test_tokenizer_settings_that_are_refused(tiny_folder: Path, field: str, value: Any) -> None:
    edit_json(tiny_folder / "tokenizer_config.json", **{field: value})
    with pytest.raises((ConfigError, TokenizerError), match=f"{field} is {value!r}"):
        load(tiny_folder)


# The length limit.


@pytest.mark.parametrize(
    ("sentence", "tokenizer", "limit"),
    [
        (12, 512, 12),
        (12, ..., 12),
        (24, 512, 24),
        (3, 512, 3),
        (..., 20, 20),
        (None, 20, 20),
        (..., 512, 24),
        (..., 10**30, 24),
        (..., 1e30, 24),
    ],
)
def test_where_max_seq_length_comes_from(
    tiny_folder: Path, sentence: Any, tokenizer: Any, limit: int
) -> None:
    edit_json(tiny_folder / "sentence_bert_config.json", max_seq_length=sentence)
    edit_json(tiny_folder / "tokenizer_config.json", model_max_length=tokenizer)
    assert load(tiny_folder).max_seq_length == limit


def test_max_seq_length_without_sentence_bert_config(tiny_folder: Path) -> None:
    (tiny_folder / "sentence_bert_config.json").unlink()
    edit_json(tiny_folder / "tokenizer_config.json", model_max_length=16)
    assert load(tiny_folder).max_seq_length == 16


@pytest.mark.parametrize("value", [0, 2, -1, 25, 10**9, "12", True, 12.0, [12]])
def test_a_max_seq_length_that_is_refused(tiny_folder: Path, refuse: Refuse, value: Any) -> None:
    edit_json(tiny_folder / "sentence_bert_config.json", max_seq_length=value)
    refuse(
        "sentence_bert_config.json",
        ConfigError,
        f"max_seq_length is {value!r}; expected an integer from 3 to 24",
    )


@pytest.mark.parametrize("value", [0, 2, "12", True, 12.5])
def test_a_model_max_length_that_is_refused(tiny_folder: Path, refuse: Refuse, value: Any) -> None:
    edit_json(tiny_folder / "sentence_bert_config.json", max_seq_length=...)
    edit_json(tiny_folder / "tokenizer_config.json", model_max_length=value)
    refuse(
        "tokenizer_config.json",
        ConfigError,
        f"model_max_length is {value!r}; expected an integer from 3 to 24",
    )


# What version 6 writes, and the similarity.

MODALITY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("sentence_bert_config.json", {"transformer_task": "feature-extraction"}),
        ("sentence_bert_config.json", {"modality_config": MODALITY}),
        ("sentence_bert_config.json", {"module_output_name": "token_embeddings"}),
        ("sentence_bert_config.json", {"processing_kwargs": {}}),
        ("sentence_bert_config.json", {"query_length": None, "query_expansion": False}),
        ("2_Normalize/config.json", {"module_output_name": None}),
        ("config_sentence_transformers.json", {"model_type": "SentenceTransformer"}),
        ("config_sentence_transformers.json", {"model_type": None}),
        ("config_sentence_transformers.json", {"similarity_fn_name": None}),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "", "document": "d: "}, "default_prompt_name": "query"},
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "query: "}, "default_prompt_name": None},
        ),
    ],
)
def test_settings_that_load(tiny_folder: Path, file: str, fields: dict[str, Any]) -> None:
    complete(tiny_folder)
    edit_json(tiny_folder / file, **fields)
    assert load(tiny_folder).similarity_fn_name == "cosine"


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("sentence_bert_config.json", "transformer_task", "fill-mask"),
        ("sentence_bert_config.json", "modality_config", MODALITY | {"image": {}}),
        (
            "sentence_bert_config.json",
            "modality_config",
            {"text": {"method": "forward", "method_output_name": "pooler_output"}},
        ),
        ("sentence_bert_config.json", "module_output_name", "other"),
        ("sentence_bert_config.json", "processing_kwargs", {"padding": "max_length"}),
        ("sentence_bert_config.json", "query_length", 32),
        ("sentence_bert_config.json", "document_length", 180),
        ("sentence_bert_config.json", "query_expansion", True),
        ("config_sentence_transformers.json", "model_type", "SparseEncoder"),
        ("sentence_bert_config.json", "tokenizer_name_or_path", "bert-base-cased"),
        ("sentence_bert_config.json", "tokenizer_args", {"do_lower_case": False}),
        ("sentence_bert_config.json", "config_kwargs", {"num_hidden_layers": 1}),
        ("tokenizer_config.json", "processor_class", "CLIPProcessor"),
        ("tokenizer_config.json", "init_inputs", ["vocab.txt"]),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["own.Own", None]}),
        ("config_sentence_transformers.json", "default_prompt_name", "passage"),
        ("config_sentence_transformers.json", "default_prompt_name", ["query"]),
    ],
)
def test_settings_that_are_refused(
    tiny_folder: Path, refuse: Refuse, file: str, field: str, value: Any
) -> None:
    complete(tiny_folder)
    edit_json(tiny_folder / file, **{field: value})
    refuse(file, ConfigError, f"{field} is {value!r}; supported: ")


@pytest.mark.parametrize(
    ("file", "field", "value", "text"),
    [
        ("sentence_bert_config.json", "max_len", 5, "max_len is unknown"),
        ("1_Pooling/config.json", "layers", [-1], "layers is unknown"),
        ("config_sentence_transformers.json", "truncate_dim", 0, "truncate_dim is 0; expected"),
        (
            "tokenizer_config.json",
            "fast_tokenizer_files",
            ["tokenizer.json", "tokenizer.4.0.0.json"],
            "fast_tokenizer_files names tokenizer.4.0.0.json; only tokenizer.json is read",
        ),
    ],
)
def test_fields_that_are_refused(
    tiny_folder: Path, refuse: Refuse, file: str, field: str, value: Any, text: str
) -> None:
    complete(tiny_folder)
    edit_json(tiny_folder / file, **{field: value})
    refuse(file, ConfigError, text)


@pytest.mark.parametrize("name", ["jaccard", "", ["cosine"]])
def test_an_unknown_similarity_is_the_cosine(tiny_folder: Path, name: Any) -> None:
    complete(tiny_folder)
    edit_json(tiny_folder / "config_sentence_transformers.json", similarity_fn_name=name)
    with pytest.warns(UserWarning, match="similarity_fn_name is .* the cosine is used"):
        assert load(tiny_folder).similarity_fn_name == "cosine"


def test_truncate_dim_is_honoured(tiny_folder: Path) -> None:
    complete(tiny_folder)
    edit_json(tiny_folder / "config_sentence_transformers.json", truncate_dim=8)
    assert load(tiny_folder).encode("the dog").shape == (8,)
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu", truncate_dim=16)
    assert encoder.encode("the dog").shape == (16,)
    encoder.save_pretrained(tiny_folder.parent / "saved")
    assert load(tiny_folder.parent / "saved").truncate_dim == 16


@pytest.mark.parametrize("prompts", [["query"], "query", {"query": 5}])
def test_prompts_that_are_refused(tiny_folder: Path, refuse: Refuse, prompts: Any) -> None:
    complete(tiny_folder)
    file = "config_sentence_transformers.json"
    edit_json(tiny_folder / file, prompts=prompts)
    refuse(file, ConfigError, f"prompts is {prompts!r}; expected an object")


def test_a_prompt_without_text_is_empty(tiny_folder: Path) -> None:
    complete(tiny_folder)
    edit_json(tiny_folder / "config_sentence_transformers.json", prompts={"query": None, "a": "b"})
    with pytest.warns(UserWarning, match="prompts has no text for 'query'; the empty one is used"):
        assert load(tiny_folder).prompts == {"query": "", "document": "", "a": "b"}


@pytest.mark.parametrize("prompts", [None, {}, {"query": "the ", "title": "a "}])
def test_prompts_are_honoured(tiny_folder: Path, prompts: Any) -> None:
    complete(tiny_folder)
    file = tiny_folder / "config_sentence_transformers.json"
    edit_json(file, prompts=prompts, default_prompt_name="query")
    encoder = load(tiny_folder)
    assert encoder.prompts == {"query": "", "document": ""} | (prompts or {})
    assert encoder.default_prompt_name == "query"
    expected = encoder.encode(encoder.prompts["query"] + "dog bites", prompt="")
    assert np.array_equal(encoder.encode("dog bites"), expected)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_fn_name_is_honoured(tiny_folder: Path, name: str) -> None:
    complete(tiny_folder)
    edit_json(tiny_folder / "config_sentence_transformers.json", similarity_fn_name=name)
    encoder = load(tiny_folder)
    assert encoder.similarity_fn_name == name
    expected = {"cosine": 0.0, "dot": 0.0, "euclidean": -5.0, "manhattan": -7.0}[name]
    assert encoder.similarity([[3.0, 0.0]], [[0.0, 4.0]]).item() == pytest.approx(expected)


# Where a folder may be.


@pytest.mark.parametrize("name", ["with blanks", "größe", "模型", "a'b\"c", "x.y", "%41", "-x"])
def test_any_path(tmp_path: Path, name: str) -> None:
    path = write_model_folder(tmp_path / name / "model")
    assert load(path).encode("the dog").shape == (32,)


def test_str_path_and_relative_path_are_equal(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    vectors = [
        load(path).encode("the dog")
        for path in (tiny_folder, str(tiny_folder), f"{tiny_folder}{os.sep}", "tiny", "./tiny")
    ]
    assert all(np.array_equal(vectors[0], vector) for vector in vectors)


def test_a_path_from_the_home_folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    monkeypatch.setenv("USERPROFILE", str(tiny_folder.parent))
    assert len(load("~/tiny")) == 3


def test_symbolic_links_are_followed(tiny_folder: Path, tmp_path: Path) -> None:
    """The Hub cache is made of them."""
    linked = tmp_path / "linked"
    (linked / "1_Pooling").mkdir(parents=True)
    for file in tiny_folder.rglob("*.*"):
        if file.is_file():
            try:
                (linked / file.relative_to(tiny_folder)).symlink_to(file)
            except OSError as error:
                pytest.skip(f"no symbolic links here: {error}")
    (tmp_path / "again").symlink_to(linked, target_is_directory=True)
    expected = load(tiny_folder).encode("the dog")
    assert np.array_equal(load(linked).encode("the dog"), expected)
    assert np.array_equal(load(tmp_path / "again").encode("the dog"), expected)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_instead_of_a_folder(tiny_folder: Path, kind: Callable[[Path], Any]) -> None:
    path = tiny_folder / "model.safetensors"
    with pytest.raises(NotAFolderError, match="is a file, not a directory") as info:
        load(kind(path))
    assert str(info.value).startswith(str(path))
    assert isinstance(info.value, NotADirectoryError)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_missing_folder(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    path = tmp_path / "nowhere"
    with pytest.raises(ModelNotFoundError, match="no such folder; pass a model's folder") as info:
        load(kind(path))
    assert str(info.value).startswith(str(path))
    assert isinstance(info.value, FileNotFoundError)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing") as info:
        load(tmp_path)
    assert info.value.path == tmp_path / "modules.json"


def test_a_folder_in_place_of_a_file(tiny_folder: Path, refuse: Refuse) -> None:
    (tiny_folder / "config.json").unlink()
    (tiny_folder / "config.json").mkdir()
    refuse("config.json", ConfigError, "is missing")


@pytest.mark.parametrize(
    "kind", ["my_package.Transformer", "Transformer", "sentence_transformersX.Transformer"]
)
def test_a_stage_of_another_package_is_refused(tiny_folder: Path, kind: str) -> None:
    path = tiny_folder / "modules.json"
    stages = json.loads(path.read_text(encoding="utf-8"))
    stages[0]["type"] = kind
    path.write_text(json.dumps(stages), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(kind)):
        load(tiny_folder)


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("1_Pooling/config.json", "pooling_mode_mean_tokens"),
        ("sentence_bert_config.json", "do_lower_case"),
    ],
)
def test_a_flag_that_is_no_boolean_is_refused(tiny_folder: Path, file: str, field: str) -> None:
    edit_json(tiny_folder / file, **{field: "false"})
    with pytest.raises(ConfigError, match=f"{field} is 'false'; pass true or false"):
        load(tiny_folder)


@pytest.mark.parametrize("special", [99999, 7])
def test_special_tokens_with_foreign_ids_are_refused(tiny_folder: Path, special: int) -> None:
    path = tiny_folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [special]
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(TokenizerError, match=f"adds ids {special} and 3"):
        load(tiny_folder)


def test_an_unknown_padding_token_is_refused(tiny_folder: Path) -> None:
    edit_json(tiny_folder / "tokenizer_config.json", pad_token="[NOPE]")
    with pytest.raises(TokenizerError, match=r"padding token '\[NOPE\]'"):
        load(tiny_folder)

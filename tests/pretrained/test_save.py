"""Saving: what is written reads back with the same bits, here and in the reference, or not at all.

The tests marked `reference` run with whichever version is installed: once with each.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrize

from conftest import ROOT, compose, load, seeded_bert, tiny_tokenizer_json, write_model_folder
from minilm import ClsPooling, MeanPooling, Normalize
from minilm.errors import ConfigError, InputError, InputTypeError, MinilmError, NotAFolderError
from minilm.parity.golden import TEXTS
from minilm.pretrained import save
from minilm.pretrained.checkpoint import UNUSED, published_name
from minilm.pretrained.save import save_pretrained
from minilm.tokenizer import WordPieceTokenizer

SENTENCES = ["The dog bites the man.", "sun", "", "a cat sees the dog, walks and is running! a a"]
FILES = {
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
}


def embed(encoder: Any, texts: list[str] = SENTENCES) -> "np.ndarray[Any, Any]":
    # Once with this limit nothing is cut, so that no warning has to be expected.
    array: np.ndarray[Any, Any] = encoder.encode(texts)
    return array


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def tiny() -> Any:
    return compose(max_seq_length=24)


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Path:
    save_pretrained(tiny, tmp_path / "saved")
    return tmp_path / "saved"


# --- what is written


def test_writes_these_files_and_no_others(saved: Path) -> None:
    assert set(files_of(saved)) == FILES
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_files_hold_what_the_format_asks_for(tmp_path: Path) -> None:
    encoder = compose(similarity_fn_name="dot")
    encoder.prompts, encoder.default_prompt_name = {"query": "the ", "document": ""}, "query"
    save_pretrained(encoder, tmp_path / "saved")
    saved = tmp_path / "saved"
    assert [(stage["path"], stage["type"]) for stage in read_json(saved / "modules.json")] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Normalize", "sentence_transformers.models.Normalize"),
    ]
    config = read_json(saved / "config.json")
    assert {"model_type": "bert", "dtype": "float32", "hidden_size": 32}.items() <= config.items()
    assert config["architectures"] == ["BertModel"]
    about = read_json(saved / "config_sentence_transformers.json")
    assert about["prompts"] == {"query": "the ", "document": ""}
    assert about["default_prompt_name"] == "query"
    assert about["similarity_fn_name"] == "dot"
    assert about["model_type"] == "SentenceTransformer"
    assert about["__version__"]["pytorch"] == str(torch.__version__)
    sentence = read_json(saved / "sentence_bert_config.json")
    assert sentence == {"max_seq_length": 12, "do_lower_case": False}
    tokenizer = read_json(saved / "tokenizer_config.json")
    assert tokenizer["model_max_length"] == 12
    assert (tokenizer["pad_token"], tokenizer["mask_token"]) == ("[PAD]", "[MASK]")
    written = read_json(saved / "tokenizer.json")
    assert written["truncation"] is written["padding"] is None  # the limit stands elsewhere
    words = (saved / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert words == list(tiny_tokenizer_json()["model"]["vocab"])


def test_tensors_have_published_names_and_own_dtypes(tiny: Any, saved: Path) -> None:
    with safetensors.safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    ours = {published_name(name): tensor for name, tensor in tiny.bert.state_dict().items()}
    assert tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[name], ours[name]) for name in ours)


@pytest.mark.parametrize("pooling", [MeanPooling, ClsPooling])
@pytest.mark.parametrize("normalizes", [True, False])
def test_every_composition_reads_back(
    pooling: type[nn.Module], normalizes: bool, tmp_path: Path
) -> None:
    stages = [seeded_bert(), pooling()] + [Normalize()] * normalizes
    encoder = compose(*stages, max_seq_length=20)
    save_pretrained(encoder, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert np.array_equal(embed(again), embed(encoder))
    assert type(again.pooling) is pooling
    assert again.max_seq_length == 20
    assert (tmp_path / "saved" / "2_Normalize").exists() == normalizes


def test_prompts_read_back(tmp_path: Path) -> None:
    encoder = compose(max_seq_length=24, similarity_fn_name="euclidean")
    encoder.prompts, encoder.default_prompt_name = {"query": "the ", "ask": "a man sees "}, "ask"
    save_pretrained(encoder, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert encoder.prompts.items() <= again.prompts.items()
    assert again.default_prompt_name == "ask"
    assert again.similarity_fn_name == "euclidean"
    assert np.array_equal(embed(again), embed(encoder))
    assert not np.array_equal(embed(again), again.encode(SENTENCES, prompt=""))


@pytest.mark.parametrize("lower_case_first", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
def test_tokenizer_settings_read_back(
    lower_case_first: bool, strip_accents: bool | None, tmp_path: Path
) -> None:
    settings = {"do_lower_case": False, "strip_accents": strip_accents, "pad_token": "[MASK]"}
    tokenizer = WordPieceTokenizer(
        json.dumps(tiny_tokenizer_json()), settings=settings, lower_case_first=lower_case_first
    )
    save_pretrained(compose(tokenizer=tokenizer), tmp_path / "saved")
    again = load(tmp_path / "saved").tokenizer
    assert again.backend.to_str() == tokenizer.backend.to_str()
    assert again.pad_token_id == 4


NORMALIZER, TEMPLATE = (tiny_tokenizer_json()[name] for name in ("normalizer", "post_processor"))
PAIR = [
    *TEMPLATE["single"],
    {"Sequence": {"id": "B", "type_id": 1}},
    {"SpecialToken": {"id": "[SEP]", "type_id": 1}},
]
KINDS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "as written": (
        None,
        {
            "normalizer": NORMALIZER | {"clean_text": False},
            "post_processor": TEMPLATE | {"pair": PAIR},
        },
    ),
    "as written, of a folder": (
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"normalizer": NORMALIZER | {"lowercase": False, "clean_text": False}},
    ),
    "added tokens": ({"extra_special_tokens": ["[NEW]"], "animal_token": "zebra"}, {}),
    "no token types": ({"model_input_names": ["input_ids", "attention_mask"]}, {}),
    "no mask token": ({"mask_token": None}, {"added_tokens": []}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_reads_back(kind: str, tmp_path: Path) -> None:
    settings, changes = KINDS[kind]
    values = json.dumps(tiny_tokenizer_json() | changes)
    tokenizer = WordPieceTokenizer(values, settings=settings)
    (tmp_path / "saved").mkdir()  # with a file of another model in it
    (tmp_path / "saved" / "added_tokens.json").write_text('{"sun!": 24}')
    save_pretrained(compose(tokenizer=tokenizer), tmp_path / "saved")
    again = load(tmp_path / "saved").tokenizer
    assert again.backend.to_str() == tokenizer.backend.to_str()
    assert again.second_type_id == tokenizer.second_type_id


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_read_back(dtype: str, tiny_folder: Path, tmp_path: Path) -> None:
    encoder = load(tiny_folder, dtype=dtype)
    encoder.max_seq_length = 24
    save_pretrained(encoder, tmp_path / "saved")
    again = load(tmp_path / "saved", dtype=dtype)
    assert np.array_equal(embed(again), embed(encoder))
    tensors = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    mixed = dtype == "bfloat16"  # in the linear layers; the rest is float32
    assert kinds == ({"bfloat16", "float32"} if mixed else {dtype})
    written = read_json(tmp_path / "saved" / "config.json")["dtype"]
    assert written == ("float32" if mixed else dtype)
    load(tmp_path / "saved")  # and in float32


def test_trained_weights_are_the_ones_that_are_written(tiny: Any, tmp_path: Path) -> None:
    before = embed(tiny)
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.5)
    tiny.train()
    features = tiny.tokenizer.pad(tiny.tokenizer(SENTENCES).input_ids)
    tiny(features)["sentence_embedding"][:, 0].sum().backward()
    optimizer.step()
    save_pretrained(tiny, tmp_path / "saved")
    assert all(parameter.grad is not None for parameter in tiny.bert.layers.parameters())
    assert tiny.training
    after = embed(load(tmp_path / "saved"))
    assert np.array_equal(after, embed(tiny))
    assert not np.array_equal(after, before)


def test_tied_and_strided_weights_are_written_as_they_count(tiny: Any, tmp_path: Path) -> None:
    first, second = tiny.bert.layers
    second.attention.query.weight = first.attention.query.weight
    wide = nn.Parameter(torch.randn(32, 64, generator=torch.Generator().manual_seed(1))[:, ::2])
    assert not wide.is_contiguous()
    first.attention.key.weight = wide
    save_pretrained(tiny, tmp_path / "saved")
    assert np.array_equal(embed(load(tmp_path / "saved")), embed(tiny))


def test_saving_in_inference_mode_and_twice_gives_the_same_files(
    tiny: Any, saved: Path, tmp_path: Path
) -> None:
    with torch.inference_mode():
        save_pretrained(tiny, str(tmp_path / "again"))
    assert files_of(tmp_path / "again") == files_of(saved)


def test_model_card(tiny: Any, saved: Path, tmp_path: Path) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntags:\n- sentence-transformers\n- sentence-similarity\n")
    assert "\npipeline_tag: sentence-similarity\nlibrary_name: sentence-transformers\n---" in card
    assert 'SentenceTransformer("sentence_transformers_model_id")' in card
    for fact in ("24 tokens", "32 dimensions, of length 1", "cosine", "2 layers", "4 heads"):
        assert fact in card
    count = sum(parameter.numel() for parameter in tiny.parameters())
    assert f"{count:,} in float32" in card
    assert "datasets" not in card
    name = 'my/"model"'
    save_pretrained(tiny, tmp_path / "named", model_name=name, train_datasets=["a/b", "c"])
    card = (tmp_path / "named" / "README.md").read_text(encoding="utf-8")
    assert 'SentenceTransformer("my/\\"model\\"")' in card
    assert '\ndatasets:\n- "a/b"\n- "c"\n' in card
    save_pretrained(tiny, tmp_path / "bare", create_model_card=False)
    assert set(files_of(tmp_path / "bare")) == FILES - {"README.md"}


# --- BERT's pooler


def add_pooler(folder: Path, size: int = 32, prefix: str = "") -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    random = torch.Generator().manual_seed(7)
    pooler = {
        "pooler.dense.weight": torch.randn(size, size, generator=random),
        "pooler.dense.bias": torch.randn(size, generator=random),
    }
    everything = {prefix + name: tensor for name, tensor in (tensors | pooler).items()}
    safetensors.torch.save_file(everything, path)
    return pooler


def poolers_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name in UNUSED}


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_pooler_is_carried_over(prefix: str, tiny_folder: Path, tmp_path: Path) -> None:
    pooler = add_pooler(tiny_folder, prefix=prefix)
    encoder = load(tiny_folder)
    with torch.no_grad():  # also past training
        encoder.bert.layers[0].attention.query.weight.add_(1)
    save_pretrained(encoder, tmp_path / "saved")
    found = poolers_of(tmp_path / "saved")
    assert found.keys() == pooler.keys()
    assert all(torch.equal(found[name], pooler[name]) for name in pooler)
    save_pretrained(load(tiny_folder, dtype="float16"), tmp_path / "half")
    assert {tensor.dtype for tensor in poolers_of(tmp_path / "half").values()} == {torch.float16}


def test_pooler_is_left_out_where_it_is_another_models(tiny_folder: Path, tmp_path: Path) -> None:
    add_pooler(tiny_folder, size=16)
    encoder = load(tiny_folder)
    save_pretrained(encoder, tmp_path / "of another size")
    assert poolers_of(tmp_path / "of another size") == {}
    add_pooler(tiny_folder)  # fits, but is not the file that was loaded
    save_pretrained(encoder, tmp_path / "changed")
    assert poolers_of(tmp_path / "changed") == {}
    (tiny_folder / "model.safetensors").unlink()
    save_pretrained(encoder, tmp_path / "gone")
    assert poolers_of(tmp_path / "gone") == {}
    assert np.array_equal(embed(load(tmp_path / "gone"), ["a"]), embed(encoder, ["a"]))


def test_files_that_would_make_it_another_model_are_named(tiny: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: is of an adapter"):
        save_pretrained(tiny, tmp_path)
    assert list(tmp_path.iterdir()) == [adapter]


def test_pooler_of_a_checkpoint_in_several_files(tiny_folder: Path, tmp_path: Path) -> None:
    pooler = add_pooler(tiny_folder)
    whole = tiny_folder / "model.safetensors"
    tensors = safetensors.torch.load_file(whole)
    whole.unlink()
    weight_map = {}
    for number, name in enumerate(tensors):  # the two of the pooler are in two files
        file = f"model-{1 + number % 2:05}-of-00002.safetensors"
        weight_map[name] = file
    weight_map["pooler.dense.weight"] = "model-00001-of-00002.safetensors"
    weight_map["pooler.dense.bias"] = "model-00002-of-00002.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        safetensors.torch.save_file(part, tiny_folder / file)
    index = tiny_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    encoder = load(tiny_folder)
    save_pretrained(encoder, tmp_path / "saved")
    found = poolers_of(tmp_path / "saved")
    assert found.keys() == pooler.keys()
    assert all(torch.equal(found[name], pooler[name]) for name in pooler)
    (tiny_folder / file).unlink()
    save_pretrained(encoder, tmp_path / "of one that is gone")
    assert poolers_of(tmp_path / "of one that is gone") == {}


def test_saving_over_the_folder_that_was_loaded(tiny_folder: Path) -> None:
    pooler = add_pooler(tiny_folder)
    encoder = load(tiny_folder)
    with torch.no_grad():
        encoder.bert.layers[0].attention.query.weight.add_(1)
    save_pretrained(encoder, tiny_folder)
    assert poolers_of(tiny_folder).keys() == pooler.keys()
    assert np.array_equal(embed(load(tiny_folder), ["a"]), embed(encoder, ["a"]))


# --- what is refused, before anything is written


class MaxPooling(nn.Module):
    def forward(self, token_embeddings: Any, attention_mask: Any) -> Any:
        return token_embeddings.amax(dim=1)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrized() -> Any:
    encoder = compose()
    parametrize.register_parametrization(
        encoder.bert.layers[0].attention.query, "weight", Doubled()
    )
    return encoder


def not_finite() -> Any:
    encoder = compose()
    encoder.bert.embeddings.layer_norm.weight.data[3] = torch.nan
    return encoder


def cut_short() -> Any:
    encoder = compose()
    del encoder.bert.layers[1]
    return encoder


def another_size() -> Any:
    encoder = compose()
    encoder.bert.layers[1].attention.query.weight = nn.Parameter(torch.zeros(3, 32))
    return encoder


def another_forward() -> Any:
    encoder = compose()
    encoder.bert.layers[0].forward = lambda hidden_states, attend: hidden_states
    return encoder


def another_tokenizer() -> Any:
    encoder = compose()
    encoder.tokenizer.backend.enable_truncation(5)
    return encoder


def another_prompt() -> Any:
    encoder = compose()
    encoder.default_prompt_name = "ask"
    return encoder


def no_text() -> Any:
    encoder = compose()
    encoder.prompts = {"ask": None}
    return encoder


REFUSED: dict[str, tuple[Any, str]] = {
    "pooling": (lambda: compose(seeded_bert(), MaxPooling()), "encoder.pooling is a MaxPooling"),
    "normalize": (
        lambda: compose(seeded_bert(), MeanPooling(), nn.Tanh()),
        "encoder.normalize is a Tanh",
    ),
    "part": (parametrized, "encoder.bert.layers.0.attention.query is a ParametrizedLinear"),
    "forward": (another_forward, "encoder.bert.layers.0 is a BertLayer"),
    "NaN": (not_finite, "embeddings.layer_norm.weight contains NaN or infinity"),
    "layers": (cut_short, "layers.1.attention.query.weight is missing"),
    "shape": (another_size, r"query.weight has shape \[3, 32\], the config asks for \[32, 32\]"),
    "tokenizer": (lambda: compose(tokenizer=None), "encoder.tokenizer is None"),
    "prompt": (another_prompt, "default_prompt_name is 'ask'; encoder.prompts has 'query', 'doc"),
    "prompts": (no_text, "encoder.prompts is {'ask': None}"),
    "backend": (another_tokenizer, "encoder.tokenizer can't be saved"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_the_format_has_no_place_for(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as info:
        save_pretrained(make(), tmp_path / "saved")
    assert info.value.argument == "encoder"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("safe_serialization", False, InputError),
        ("path", None, InputTypeError),
        ("path", "", InputTypeError),
        ("path", 3, InputTypeError),
        ("model_name", 3, InputTypeError),
        ("train_datasets", "one", InputTypeError),
        ("train_datasets", [3], InputTypeError),
    ],
)
def test_refuses_arguments(
    argument: str, value: Any, error: type[InputError], tiny: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"path": tmp_path / "saved", argument: value}
    with pytest.raises(error, match=argument) as info:
        save_pretrained(tiny, **options)
    assert info.value.argument == argument
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [None, "", b"folder"])
def test_an_encoder_does_not_save_nowhere_in_silence(path: Any, tiny: Any) -> None:
    for method in (tiny.save_pretrained, tiny.save):
        with pytest.raises(InputTypeError, match="pass the folder to write"):
            method(path)


def test_refuses_a_file_in_place_of_the_folder(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, message in {
        "file": "is a file, not a directory",
        "file/below": "is a file, not a directory",
        "link": "is a broken link, not a directory",
    }.items():
        with pytest.raises(NotAFolderError, match=message) as info:
            save_pretrained(tiny, tmp_path / path)
        assert isinstance(info.value, NotADirectoryError)
        assert str(tmp_path / path.split("/")[0]) in str(info.value)
    assert (tmp_path / "file").read_text() == "mine"


# --- whole or not at all


def test_full_disk_leaves_nothing_of_a_new_folder(
    tiny: Any, tmp_path: Path, small_files: None
) -> None:
    path = tmp_path / "parent" / "saved"
    with pytest.raises(OSError, match="nothing was written") as info:
        save_pretrained(tiny, path)
    assert info.value.errno == errno.EFBIG
    assert info.value.filename == str(path)
    assert str(path) in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_folder(tiny: Any, tiny_folder: Path, small_files: None) -> None:
    before = files_of(tiny_folder)
    with pytest.raises(OSError, match="nothing of it was changed"):
        save_pretrained(tiny, tiny_folder)
    assert files_of(tiny_folder) == before


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("number", range(len(FILES)))
def test_error_at_any_file_leaves_all_as_it_was(
    number: int, exists: bool, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model_folder(tmp_path / "saved") if exists else tmp_path / "saved"
    before = files_of(tmp_path)
    written, write_file = [], save._write_file

    def fail(file: Path, data: bytes) -> None:
        written.append(file)
        write_file(file, data[:10])
        if len(written) == number + 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(save, "_write_file", fail)
    with pytest.raises(OSError, match="No space left") as info:
        save_pretrained(tiny, path)
    assert info.value.filename == str(path)
    assert len(written) == number + 1
    assert files_of(tmp_path) == before
    assert sorted(child.name for child in tmp_path.iterdir()) == ["saved"] * exists


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("number", range(len(FILES)))
def test_error_while_files_change_place_brings_the_old_ones_back(
    number: int, links: bool, tiny: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_folder / "mine.txt").write_text("mine")
    before = files_of(tiny_folder)
    folders = {path for path in tiny_folder.rglob("*") if path.is_dir()}
    count, move = [0], Path.replace

    def fail(source: Path, target: Path) -> Path:
        if source.parent.name != "before" and "before" not in str(source):
            count[0] += 1
            if count[0] == number + 1:
                raise PermissionError(errno.EACCES, "Permission denied", str(target))
        return move(source, target)

    monkeypatch.setattr(Path, "replace", fail)
    if not links:
        monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError("no links")))
    with pytest.raises(PermissionError, match="nothing of it was changed") as info:
        save_pretrained(tiny, tiny_folder)
    assert info.value.filename == str(tiny_folder)
    assert files_of(tiny_folder) == before
    assert {path for path in tiny_folder.rglob("*") if path.is_dir()} == folders


@pytest.mark.parametrize("exists", [True, False])
def test_folders_are_synced_too(
    exists: bool, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def watch(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    path = tmp_path / "parent" / "saved"
    if exists:
        path.mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", watch)
    save_pretrained(tiny, path)
    folders = [each for each in synced if each.is_dir()]
    if exists:
        assert {path, path / "1_Pooling", path / "2_Normalize"} == set(folders)
    else:
        assert folders == [tmp_path, path.parent]  # a parent that was made, and the rename
        assert {each.name for each in synced} > {"1_Pooling", "2_Normalize"}
        assert synced[-1] == path.parent


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_fsync(
    number: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", missing)
    save_pretrained(tiny, tmp_path / "saved")
    assert np.array_equal(embed(load(tmp_path / "saved")), embed(tiny))


def test_modes_are_kept_and_names_may_be_long(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)
    save_pretrained(tiny, path)
    (path / "config.json").chmod(0o664)
    save_pretrained(tiny, path)
    assert (path / "config.json").stat().st_mode & 0o777 == 0o664
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_modules_json_comes_last_and_other_files_stay(
    tiny: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_folder / "mine.txt").write_text("mine")
    (tiny_folder / "README.md").write_text("my own")
    moved, move = [], Path.replace

    def watch(source: Path, target: Path) -> Path:
        moved.append(str(target.relative_to(tiny_folder)))
        return move(source, target)

    monkeypatch.setattr(Path, "replace", watch)
    save_pretrained(tiny, tiny_folder, create_model_card=False)
    assert set(moved) == FILES - {"README.md"}
    assert moved[-1] == "modules.json"
    assert set(files_of(tiny_folder)) == FILES | {"mine.txt"}
    assert (tiny_folder / "README.md").read_text() == "my own"
    assert np.array_equal(embed(load(tiny_folder)), embed(tiny))


def test_folder_that_may_not_be_written_to(
    tiny: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(tiny_folder)
    tiny_folder.chmod(0o555)
    if os.access(tiny_folder, os.W_OK):  # root may
        make = Path.mkdir

        def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
            if self.parent == tiny_folder:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            make(self, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", refuse)
    try:
        with pytest.raises(PermissionError, match="Permission denied") as info:
            save_pretrained(tiny, tiny_folder)
    finally:
        tiny_folder.chmod(0o755)
    assert str(tiny_folder) in str(info.value)
    assert files_of(tiny_folder) == before


def test_directory_in_place_of_a_file(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    (path / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(OSError, match=r"tokenizer\.json is a directory"):
        save_pretrained(tiny, path)
    assert files_of(path) == {}
    assert [child.name for child in path.iterdir()] == ["tokenizer.json"]


def test_links_are_replaced_and_what_they_point_to_stays(tiny: Any, tmp_path: Path) -> None:
    """As in the Hub's cache, where a model's files are links to files that others share."""
    blob = tmp_path / "blob"
    blob.write_bytes(b"of another model")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blob)
    save_pretrained(tiny, folder)
    assert blob.read_bytes() == b"of another model"
    assert np.array_equal(embed(load(folder)), embed(tiny))


def test_folder_that_appears_meanwhile(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "saved", Path.rename

    def late(source: Path, target: Path) -> Path:
        write_model_folder(path)
        (path / "mine.txt").write_text("mine")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", late)
    save_pretrained(tiny, path)
    assert set(files_of(path)) == FILES | {"mine.txt"}
    assert [child.name for child in tmp_path.iterdir()] == ["saved"]
    assert np.array_equal(embed(load(path)), embed(tiny))


@pytest.mark.process
@pytest.mark.parametrize("exists", [True, False])
def test_killed_in_the_middle(exists: bool, tmp_path: Path) -> None:
    path = write_model_folder(tmp_path / "saved") if exists else tmp_path / "saved"
    before = files_of(tmp_path)
    code = f"""
import os, signal
from minilm.pretrained import save
from test_save import compose
write = save._write_file
def die(file, data):
    write(file, data[:100])
    if file.name == "model.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
save._write_file = die
save.save_pretrained(compose(), {str(path)!r})
"""
    folders = (ROOT, ROOT / "tests", ROOT / "scripts", Path(__file__).parent)
    paths = os.pathsep.join(map(str, folders))
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = {name for name in files_of(tmp_path) if ".part/" in name}
    assert left, "it was killed before it wrote anything"
    assert {name: data for name, data in files_of(tmp_path).items() if name not in left} == before
    assert path.exists() == exists
    save_pretrained(compose(), path)  # what was left is in nobody's way
    load(path)


def test_reader_beside_a_writer_sees_whole_files(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    seen: list[Any] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                if path.exists():
                    seen.append(embed(load(path), ["a dog"]))
            except (MinilmError, OSError) as error:
                seen.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(15):
            save_pretrained(tiny, path)
    finally:
        stop.set()
        reader.join()
    expected = embed(tiny, ["a dog"])
    assert seen
    assert not [found for found in seen if isinstance(found, Exception)]
    assert all(np.array_equal(found, expected) for found in seen)


def test_writers_beside_each_other(tiny: Any, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def write() -> None:
        try:
            save_pretrained(tiny, tmp_path / "saved")
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []
    assert set(files_of(tmp_path / "saved")) == FILES
    assert [child.name for child in tmp_path.iterdir()] == ["saved"]


# --- the published weights, and the reference

PUBLISHED = [*(entry.text for entry in TEXTS[::6]), "the cat " * 300]


@pytest.fixture(scope="module")
def copy_of_published(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "saved"
    save_pretrained(load(published), folder, model_name="us/copy")
    return folder


def quietly(encoder: Any) -> "np.ndarray[Any, Any]":
    with pytest.warns(UserWarning, match="cut"):
        return embed(encoder, PUBLISHED)


def test_published_weights_read_back(published: Path, copy_of_published: Path) -> None:
    before, after = (
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in (published, copy_of_published)
    )
    assert before.keys() - after.keys() == {"embeddings.position_ids"}
    assert after.keys() <= before.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    again = load(copy_of_published)
    assert again.max_seq_length == 256
    assert np.array_equal(quietly(again), quietly(load(published)))
    words = (copy_of_published / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert len(words) == 30_522


def test_published_weights_in_bfloat16_read_back(published: Path, tmp_path: Path) -> None:
    encoder = load(published, dtype="bfloat16")
    save_pretrained(encoder, tmp_path / "saved")
    again = load(tmp_path / "saved", dtype="bfloat16")
    assert np.array_equal(quietly(again), quietly(encoder))
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 70e6  # of 91


def load_with_reference(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[Any, list[str]]:
    """The reference's model, whichever version is installed, and what it complained of."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.enable_propagation()  # to where caplog listens
    try:
        caplog.clear()
        model = sentence_transformers.SentenceTransformer(
            str(folder), device="cpu", local_files_only=True
        )
        said = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    finally:
        transformers.utils.logging.disable_propagation()
    return model, said


@pytest.mark.reference
def test_reference_gets_the_same_bits_from_the_copy(
    published: Path, copy_of_published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, said = load_with_reference(copy_of_published, caplog)
    assert said == []
    original, _ = load_with_reference(published, caplog)
    assert np.array_equal(model.encode(PUBLISHED), original.encode(PUBLISHED))
    assert model.max_seq_length == model.tokenizer.model_max_length == 256
    assert model.prompts == original.prompts
    assert model.similarity_fn_name == "cosine"
    assert [type(stage).__name__ for stage in model] == ["Transformer", "Pooling", "Normalize"]
    ours = load(copy_of_published)
    assert np.abs(quietly(ours) - model.encode(PUBLISHED)).max() < 1e-6


@pytest.mark.reference
@pytest.mark.parametrize("pooling", [MeanPooling, ClsPooling])
@pytest.mark.parametrize("normalizes", [True, False])
def test_reference_reads_every_composition(
    pooling: type[nn.Module], normalizes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = [seeded_bert(), pooling()] + [Normalize()] * normalizes
    encoder = compose(*stages, max_seq_length=20, similarity_fn_name="dot")
    encoder.prompts, encoder.default_prompt_name = {"query": "the ", "document": ""}, None
    save_pretrained(encoder, tmp_path / "saved")
    model, said = load_with_reference(tmp_path / "saved", caplog)
    # It draws BERT's pooler, which we have none of and nobody uses.
    assert said, "then this model needs no pooler any more"
    assert all("pooler" in line for line in said), said
    assert np.abs(model.encode(SENTENCES) - embed(encoder)).max() < 1e-5
    assert (model.max_seq_length, model.similarity_fn_name) == (20, "dot")
    assert model.prompts == {"query": "the ", "document": ""}
    assert len(model) == 2 + normalizes


@pytest.mark.reference
@pytest.mark.parametrize("lower_case_first", [True, False])
def test_reference_reads_the_tokenizer(
    lower_case_first: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = WordPieceTokenizer(
        json.dumps(tiny_tokenizer_json()),
        settings={"do_lower_case": False},
        lower_case_first=lower_case_first,
    )
    encoder = compose(tokenizer=tokenizer)
    save_pretrained(encoder, tmp_path / "saved")
    model, _ = load_with_reference(tmp_path / "saved", caplog)
    text = "The dog Bites a CAFE"
    tokenize = getattr(model, "preprocess", model.tokenize)
    assert tokenize([text])["input_ids"][0].tolist() == tokenizer([text]).input_ids[0]


@pytest.mark.reference
def test_reference_reads_bfloat16_as_float32(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pretrained(load(published, dtype="bfloat16"), tmp_path / "saved")
    model, said = load_with_reference(tmp_path / "saved", caplog)
    assert said == []
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ours = load(tmp_path / "saved")  # in float32, with the rounded weights
    assert np.abs(quietly(ours) - model.encode(PUBLISHED)).max() < 1e-6

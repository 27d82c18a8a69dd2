"""Fingerprints: the same for the same model, another for another, and the check by the vectors."""

import copy
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
from torch import nn

import minilm
from conftest import (
    ROOT,
    TINY,
    compose,
    edit_json,
    load,
    seeded_bert,
    tiny_tokenizer_json,
    write_model_folder,
)  # fmt: skip
from minilm import BertConfig, ClsPooling, MeanPooling, Normalize
from minilm.errors import ConfigError, InputError, InputTypeError
from minilm.files.records import read_fingerprint
from minilm.files.streaming import encode_files
from minilm.files.tables import METADATA_KEY, NPZ_KEY, Table, sidecar_path
from minilm.index.texts import build_index
from minilm.parity.check import check_vectors
from minilm.parity.golden import TEXTS
from minilm.parity.mistakes import Cause
from minilm.pretrained.fingerprint import (
    Comparison,
    Fingerprint,
    compare,
    fingerprint,
)
from minilm.pretrained.hub import DEFAULT_MODEL, SHA256
from minilm.pretrained.save import save_pretrained

# Of these, only the last is cut at 12 tokens.
SENTENCES = ["The dog bites.", "sun", "", "a cat sees the dog", "a man is out ! " * 4]

RECORD = Fingerprint(
    model="tiny",
    weights_sha256="ab" * 32,
    tensors_sha256="cd" * 32,
    tokenizer_sha256="ef" * 32,
    architecture="bert, 2 layers of 4 heads, eps 1e-12",
    pooling="mean",
    normalize=True,
    max_seq_length=12,
    dimension=32,
    dtype="float32",
)


def embed(encoder: Any, texts: list[str]) -> "np.ndarray[Any, Any]":
    array: np.ndarray[Any, Any] = encoder.encode(texts)
    return array


@pytest.fixture
def tiny(tiny_folder: Path) -> Any:
    return load(tiny_folder)


# --- the record


def test_says_what_the_model_is(tiny: Any, tiny_folder: Path) -> None:
    found = fingerprint(tiny)
    data = (tiny_folder / "model.safetensors").read_bytes()
    assert found == Fingerprint(
        model="tiny",
        weights_sha256=hashlib.sha256(data).hexdigest(),
        tensors_sha256=found.tensors_sha256,
        tokenizer_sha256=found.tokenizer_sha256,
        architecture="bert, 2 layers of 4 heads, eps 1e-12",
        pooling="mean",
        normalize=True,
        max_seq_length=12,
        dimension=32,
        dtype="float32",
        prompt="",
        package_version=minilm.__version__,
        format_version=1,
    )
    assert len(found.tensors_sha256) == len(found.tokenizer_sha256) == 64


def test_round_trip_in_a_stable_order() -> None:
    assert list(RECORD.to_dict()) == [
        "model", "weights_sha256", "tensors_sha256", "tokenizer_sha256", "architecture", "pooling",
        "normalize", "max_seq_length", "dimension", "dtype", "prompt", "truncation",
        "precision", "package_version", "format_version",
    ]  # fmt: skip
    assert Fingerprint.from_dict(RECORD.to_dict()) == RECORD
    assert Fingerprint.from_json(RECORD.to_json()) == RECORD
    assert "\n" not in RECORD.to_json()
    later = RECORD.to_dict() | {"format_version": 2, "something": "new"}
    assert Fingerprint.from_dict(later) == dataclasses.replace(RECORD, format_version=2)


def test_one_line() -> None:
    assert str(RECORD) == (
        "tiny (weights abababababab of the file, tokenizer efefefefefef, 12 tokens, mean, "
        f"normalized, 32 x float32, minilm {minilm.__version__})"
    )
    edited = dataclasses.replace(RECORD, weights_sha256="tensors:" + "cd" * 32, prompt="query: ")
    assert "weights cdcdcdcdcdcd of the tensors" in str(edited)
    assert "prompt 'query: '" in str(edited)


def test_broken_records_list_every_problem() -> None:
    values = RECORD.to_dict() | {"max_seq_length": True, "normalize": 1}
    del values["dtype"]
    with pytest.raises(InputError) as info:
        Fingerprint.from_dict(values)
    for problem in ("max_seq_length is True", "normalize is 1", "dtype is missing"):
        assert problem in str(info.value)
    with pytest.raises(InputError, match="is a list"):
        Fingerprint.from_json("[]")
    with pytest.raises(InputError, match="is not valid JSON"):
        Fingerprint.from_json("{")


@pytest.mark.process
def test_two_loads_two_folders_and_two_processes_agree(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    found = fingerprint(tiny)
    elsewhere = write_model_folder(tmp_path / "elsewhere" / "tiny")
    assert fingerprint(load(tiny_folder)) == found
    assert fingerprint(load(elsewhere)) == found
    code = f"""
from test_fingerprint import *
print(fingerprint(load(Path({str(elsewhere)!r}))).to_json())
"""
    folders = (ROOT, ROOT / "tests", ROOT / "scripts", Path(__file__).parent)
    paths = os.pathsep.join(map(str, folders))
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "1"},
    ).stdout  # fmt: skip
    assert Fingerprint.from_json(out) == found


def edit_data(encoder: Any) -> None:
    encoder.bert.layers[1].feed_forward.output.bias.data[5] += 1e-7


def edit_sign_of_zero(encoder: Any) -> None:
    encoder.bert.embeddings.layer_norm.bias.data[:] *= -1


def double_and_back(encoder: Any) -> None:
    encoder.half().float()


def drop_a_layer(encoder: Any) -> None:
    del encoder.bert.layers[1]


@pytest.mark.parametrize("edit", [edit_data, edit_sign_of_zero, double_and_back, drop_a_layer])
def test_weights_that_are_not_the_files_are_not_called_so(edit: Any, tiny: Any) -> None:
    before = fingerprint(tiny)
    edit(tiny)
    found = fingerprint(tiny)
    assert found.weights_sha256 == f"tensors:{found.tensors_sha256}"
    assert found.tensors_sha256 != before.tensors_sha256
    assert compare(found, before).verdict == "model"


def test_undone_changes_leave_the_record(tiny: Any) -> None:
    before = fingerprint(tiny)
    bias = tiny.bert.layers[0].attention.query.bias.data
    kept = bias.clone()
    bias += 1
    assert fingerprint(tiny) != before
    bias.copy_(kept)
    assert fingerprint(tiny) == before


@pytest.mark.parametrize("change", ["gone", "another", "broken"])
def test_file_that_is_no_longer_there(change: str, tiny: Any, tiny_folder: Path) -> None:
    before = fingerprint(tiny)
    path = tiny_folder / "model.safetensors"
    path.unlink()
    if change == "another":
        other = write_model_folder(tiny_folder.parent / "other", seed=1)
        path.write_bytes((other / "model.safetensors").read_bytes())
    if change == "broken":
        path.write_bytes(b"nothing")
    found = fingerprint(tiny)
    assert found.weights_sha256 == f"tensors:{before.tensors_sha256}"
    assert compare(found, before).verdict == "same"  # by the tensors


def test_a_saved_copy_is_the_same_model(tiny: Any, tmp_path: Path) -> None:
    save_pretrained(tiny, tmp_path / "copy")
    comparison = compare(fingerprint(tiny), fingerprint(load(tmp_path / "copy")))
    assert comparison.verdict == "same"
    assert comparison.differing.keys() <= {"model", "weights_sha256"}


def test_composed_models_have_a_digest_of_their_tensors(tiny: Any) -> None:
    found = fingerprint(compose())
    assert found.model == "modules"
    assert found.weights_sha256 == f"tensors:{found.tensors_sha256}"
    assert compare(found, fingerprint(tiny)).verdict == "same"
    assert fingerprint(compose(seeded_bert(seed=1), MeanPooling(), Normalize())) != found
    assert fingerprint(compose(tokenizer=None)).tokenizer_sha256 == "none"


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes_share_the_file(dtype: str, tiny: Any, tiny_folder: Path) -> None:
    before, found = fingerprint(tiny), fingerprint(load(tiny_folder, dtype=dtype))
    assert found.dtype == dtype
    assert found.weights_sha256 == before.weights_sha256
    comparison = compare(before, found)
    assert comparison.verdict == "rounding"
    assert comparison.differing.keys() == {"dtype", "tensors_sha256"}
    assert comparison.differing["dtype"] == ("float32", dtype)
    converted = fingerprint(tiny.to(getattr(torch, dtype)))
    assert converted.weights_sha256 == before.weights_sha256
    # Products in bfloat16, or all: two records, although both say bfloat16.
    assert (converted == found) == (dtype != "bfloat16")


def test_limit_prompt_and_stages(tiny: Any) -> None:
    before = fingerprint(tiny)
    tiny.max_seq_length = 20
    assert compare(before, fingerprint(tiny)) == Comparison("limit", {"max_seq_length": (12, 20)})
    tiny.max_seq_length = 12
    tiny.prompts, tiny.default_prompt_name = {"query": "the "}, "query"
    assert compare(before, fingerprint(tiny)) == Comparison("model", {"prompt": ("", "the ")})
    tiny.default_prompt_name, tiny.truncate_dim = None, 16
    differing = {"dimension": (32, 16), "normalize": (True, False)}  # no longer of length 1
    assert compare(before, fingerprint(tiny)) == Comparison("model", differing)
    bert = seeded_bert()
    for stages in ([bert, ClsPooling(), Normalize()], [bert, MeanPooling()]):
        found = fingerprint(compose(*stages))
        assert found.pooling == ("cls" if isinstance(stages[1], ClsPooling) else "mean")
        assert found.normalize == (len(stages) == 3)
        assert compare(before, found).verdict == "model"


CALLS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "wider": {"truncate_dim": 24},
    "whole": {"truncate_dim": 1000},
    "narrower": {"truncate_dim": 8, "normalize_embeddings": True},
    "another prompt": {"prompt_name": "mine"},
    "no prompt": {"prompt": "", "prompt_name": "mine"},
    "windows": {"truncation": "chunk", "truncate_dim": 32},
    "bits": {"precision": "ubinary", "truncate_dim": 32},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("stages", [2, 3])
def test_record_of_a_call_says_what_was_done(call: str, stages: int) -> None:
    encoder = compose(*[seeded_bert(), MeanPooling(), Normalize()][:stages], truncate_dim=16)
    encoder.prompts, encoder.default_prompt_name = {"mine": "the ", "other": "a "}, "other"
    options = CALLS[call]
    vectors = encoder.encode(SENTENCES, **{"truncation": "silent"} | options)
    record = encoder.fingerprint(**options)
    width = vectors.shape[1] * (8 if "precision" in options else 1)
    assert record.dimension == width
    if "precision" not in options:
        assert record.normalize == np.allclose(np.linalg.norm(vectors, axis=1), 1)
    # Made in the same way by an encoder whose settings are others.
    other = compose(*[seeded_bert(), MeanPooling(), Normalize()][:stages])
    result = check_vectors(other, SENTENCES, vectors, record)
    assert (result.verdict, result.fingerprints_agree) == ("same", True)
    if "prompt_name" not in options:
        assert encoder.fingerprint().for_call(**options) == record
    assert Fingerprint.from_json(record.to_json()) == record


def test_files_have_the_record_of_what_was_done(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES[:2]), "utf-8")
    tiny.truncate_dim = 8
    encode_files(tiny, tmp_path / "a.txt", tmp_path / "out", truncate_dim=32)
    record = read_fingerprint(tmp_path / "out" / "part-00000.parquet")
    assert record is not None
    assert (record.dimension, record.normalize) == (32, True)
    table = Table(SENTENCES[:2], [{"text": text} for text in SENTENCES[:2]])
    with tiny.truncate_embeddings(16):
        index = build_index(tiny, tmp_path / "index", table)
    assert index.fingerprint == tiny.fingerprint(truncate_dim=16)
    assert index.dimension == 16


def test_sizes_that_no_tensor_shows(tiny: Any) -> None:
    config = BertConfig(**(dataclasses.asdict(TINY) | {"num_attention_heads": 2}))
    bert = seeded_bert(config)
    found = fingerprint(compose(bert, MeanPooling(), Normalize()))
    assert found.tensors_sha256 == fingerprint(tiny).tensors_sha256
    comparison = compare(found, fingerprint(tiny))
    assert comparison.verdict == "model"
    assert "architecture" in comparison.differing


def test_tokenizers_are_told_apart_by_what_they_do(tiny: Any, tiny_folder: Path) -> None:
    before = fingerprint(tiny)
    edit_json(tiny_folder / "tokenizer_config.json", do_lower_case=False)
    assert compare(before, fingerprint(load(tiny_folder))).differing.keys() == {"tokenizer_sha256"}
    edit_json(tiny_folder / "tokenizer_config.json", do_lower_case=True, name_or_path="anything")
    text = (tiny_folder / "tokenizer.json").read_text(encoding="utf-8")
    (tiny_folder / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=4))
    assert fingerprint(load(tiny_folder)) == before
    tiny.tokenizer.backend.add_tokens(["walks"])
    assert compare(before, fingerprint(tiny)).verdict == "model"


def test_modules_that_are_not_ours_have_no_fingerprint() -> None:
    class Middle(nn.Module):
        def forward(self, token_embeddings: Any, attention_mask: Any) -> Any:
            return token_embeddings[:, 1]

    for stages, what in (
        ([seeded_bert(), Middle()], "encoder.pooling is a Middle"),
        ([seeded_bert(), MeanPooling(), nn.Tanh()], "encoder.normalize is a Tanh"),
    ):
        with pytest.raises(InputError, match=what) as info:
            fingerprint(compose(*stages))
        assert info.value.argument == "encoder"


# --- two records


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "same"),
        ({"model": "another name"}, "same"),
        ({"weights_sha256": "tensors:" + "cd" * 32}, "same"),
        ({"tensors_sha256": "00" * 32}, "rounding"),
        ({"dtype": "bfloat16"}, "rounding"),
        ({"package_version": "9.9"}, "rounding"),
        ({"format_version": 2}, "rounding"),
        ({"max_seq_length": 256}, "limit"),
        ({"max_seq_length": 256, "dtype": "bfloat16"}, "limit"),
        ({"weights_sha256": "00" * 32, "tensors_sha256": "00" * 32}, "model"),
        ({"tokenizer_sha256": "00" * 32}, "model"),
        ({"architecture": "another"}, "model"),
        ({"pooling": "cls"}, "model"),
        ({"normalize": False, "max_seq_length": 256}, "model"),
        ({"dimension": 384}, "model"),
        ({"prompt": "query: "}, "model"),
    ],
)
def test_verdicts(changes: dict[str, Any], verdict: str) -> None:
    comparison = compare(RECORD, dataclasses.replace(RECORD, **changes))
    assert comparison.verdict == verdict
    assert comparison.differing == {
        name: (getattr(RECORD, name), value) for name, value in changes.items()
    }
    assert comparison.is_compatible == (verdict in ("same", "rounding"))
    assert all(name in str(comparison) for name in changes)


# --- where it is kept


def write_npz(path: Path, data: bytes | None) -> None:
    arrays = {"vectors": np.zeros((2, 32), np.float32)}
    if data is not None:
        arrays[NPZ_KEY] = np.frombuffer(data, np.uint8)
    np.savez(path, **arrays)  # type: ignore[arg-type]  # of allow_pickle, which is none of ours


def write_safetensors(path: Path, data: bytes | None) -> None:
    metadata = None if data is None else {METADATA_KEY: data.decode()}
    safetensors.numpy.save_file({"vectors": np.zeros((2, 32), np.float32)}, path, metadata)


def write_sidecar(path: Path, data: bytes | None) -> None:
    path.write_bytes(b"0,0")
    if data is not None:
        sidecar_path(path).write_bytes(data)


WRITERS = {
    "x.npz": write_npz,
    "X.SafeTensors": write_safetensors,
    "x.npy": write_sidecar,
    "x.csv": write_sidecar,
    "x.jsonl": write_sidecar,
    "no suffix": write_sidecar,
}


@pytest.mark.parametrize("name", WRITERS)
def test_kept_with_the_vectors(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match="no such file") as missing:
        read_fingerprint(path)
    assert missing.value.filename == str(path)
    WRITERS[name](path, None)
    assert read_fingerprint(path) is None
    WRITERS[name](path, RECORD.to_json().encode())
    assert read_fingerprint(path) == RECORD
    WRITERS[name](path, b'{"model": "cut')
    with pytest.raises(ConfigError, match="is not valid JSON") as info:
        read_fingerprint(path)
    place = sidecar_path(path) if WRITERS[name] is write_sidecar else path
    assert info.value.path == place
    assert str(place) in str(info.value)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_files_that_could_hold_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="or broken"):
        read_fingerprint(path)
    WRITERS[{"x.safetensors": "X.SafeTensors"}.get(name, name)](path, None)
    sidecar_path(path).write_text(RECORD.to_json())
    assert read_fingerprint(path) == RECORD  # beside it, if not in it


def test_npz_with_something_else_under_the_key(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{NPZ_KEY: np.zeros(3)})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has dtype float64; expected uint8"):
        read_fingerprint(tmp_path / "x.npz")


def test_sidecar_keeps_the_whole_name() -> None:
    assert sidecar_path("a/x.tar.csv") == Path("a/x.tar.csv.fingerprint.json")


# --- stored vectors


@pytest.fixture
def texts() -> list[str]:
    random = np.random.default_rng(0)
    words = tiny_tokenizer_json()["model"]["vocab"]
    plain = [word for word in words if word.isalpha()]
    return [" ".join(random.choice(plain, 1 + i % 7)) for i in range(40)] + ["the man is out " * 4]


FORMS: dict[str, Any] = {
    "float32": lambda vectors: vectors,
    "float64": lambda vectors: vectors.astype(np.float64),
    "big end first": lambda vectors: vectors.astype(">f4"),
    "lists": lambda vectors: vectors.tolist(),
    "list of arrays": list,
    "tensor": torch.from_numpy,
    "list of tensors": lambda vectors: list(torch.from_numpy(vectors)),
    "float16": lambda vectors: vectors.astype(np.float16),
    "float16 in float32": lambda vectors: vectors.astype(np.float16).astype(np.float32),
    "bfloat16": lambda vectors: torch.from_numpy(vectors).bfloat16(),
    "4 decimals": lambda vectors: vectors.round(4),
    "strided": lambda vectors: np.asfortranarray(vectors)[::1],
}
WORDS = {
    "float16": "float16",
    "float16 in float32": "float16",
    "bfloat16": "bfloat16",
    "4 decimals": "4 decimals",
}


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_own_vectors_are_the_same_in_every_form(form: str, tiny: Any, texts: list[str]) -> None:
    result = check_vectors(tiny, texts, FORMS[form](embed(tiny, texts)), fingerprint(tiny))
    assert result.verdict == "same"
    assert WORDS.get(form, "bit by bit") in result.summary
    assert (result.rows, result.checked) == (41, 41)
    assert result.max_abs <= {"bfloat16": 2e-3, "float16": 2e-4}.get(form, 2e-4)
    assert result.fingerprints_agree
    assert result.is_compatible
    assert result.summary.startswith("same: equal, bit by bit")


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes_are_rounding(
    dtype: str, tiny: Any, tiny_folder: Path, texts: list[str]
) -> None:
    other = load(tiny_folder, dtype=dtype)
    result = check_vectors(tiny, texts, embed(other, texts), fingerprint(other))
    assert result.verdict == "rounding"
    assert "within" in result.reason
    assert 0 < result.max_abs < 1e-2
    assert result.fingerprints_agree
    back = check_vectors(other, texts, embed(tiny, texts), fingerprint(tiny))
    assert back.verdict in ("rounding", "same")  # float64 rounds to float32's bits now and then


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
def test_another_limit_is_named(tiny: Any, tiny_folder: Path, texts: list[str]) -> None:
    other = load(tiny_folder)
    other.max_seq_length = 9
    recorded = fingerprint(other)
    vectors = embed(other, texts)
    result = check_vectors(tiny, texts, vectors, recorded, sample=5)  # the long ones come anyway
    assert (result.verdict, result.limit) == ("limit", 9)
    assert "cut at 9 tokens, this encoder's limit is 12" in result.summary
    assert not result.fingerprints_agree
    assert not result.is_compatible
    assert tiny.max_seq_length == 12
    assert 5 < result.checked < 41
    assert f"{result.checked} of 41 rows checked" in result.summary
    assert "max_seq_length: 9, 12" in result.table()
    assert 40 in [row for row, _ in result.worst]
    assert result.worst[0][1] == result.max_abs
    short = [text for text in texts if len(text.split()) < 7]
    result = check_vectors(tiny, short, embed(other, short), recorded)
    assert result.verdict == "same"  # of these; and the record is not kept quiet
    assert "but the fingerprints say: limit" in result.summary


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
def test_a_limit_that_does_not_explain_is_not_named(tiny: Any, tiny_folder: Path) -> None:
    texts = ["a dog", "the sun is out", "the man is out " * 4]
    other = load(tiny_folder)
    other.max_seq_length = 10
    vectors = embed(other, texts)
    wrong = dataclasses.replace(fingerprint(tiny), max_seq_length=9)
    result = check_vectors(tiny, texts, vectors, wrong)
    assert (result.verdict, result.limit) == ("model", None)
    right = dataclasses.replace(wrong, max_seq_length=10)
    assert check_vectors(tiny, texts, vectors, right).limit == 10
    texts.append(texts[2])  # a file with vectors of both
    mixed = np.concatenate([vectors, embed(tiny, texts[2:3])])
    result = check_vectors(tiny, texts, mixed, right)
    assert (result.verdict, result.limit) == ("model", None)
    vectors[1] = vectors[0]  # which no limit changes
    result = check_vectors(tiny, texts[:3], vectors, right)
    assert (result.verdict, result.limit) == ("model", None)


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
def test_another_model_is_another(tiny: Any, texts: list[str]) -> None:
    other = compose(seeded_bert(seed=1), MeanPooling(), Normalize())
    texts = texts[:5]
    result = check_vectors(tiny, texts, embed(other, texts), fingerprint(other))
    assert result.verdict == "model"
    assert result.reason == result.diagnosis.summary
    assert not result.fingerprints_agree
    assert "model: " in result.table()
    assert json.loads(json.dumps(result.to_dict()))["differing"][:2] == [
        "model",
        "weights_sha256",
    ]


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
@pytest.mark.parametrize(
    ("stages", "cause"),
    [([ClsPooling(), Normalize()], "[CLS]"), ([MeanPooling()], "no normalization")],
)
def test_a_cause_is_named(stages: list[nn.Module], cause: str, tiny: Any, texts: list[str]) -> None:
    result = check_vectors(tiny, texts, embed(compose(seeded_bert(), *stages), texts))
    assert result.verdict == "model"
    assert cause in result.summary
    assert result.fingerprints_agree is None
    assert "no fingerprint" in result.table()


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
def test_damaged_vectors_are_not_ours(tiny: Any, texts: list[str]) -> None:
    texts = texts[:10]
    vectors = embed(tiny, texts)
    vectors[7, 3] = np.nan
    result = check_vectors(tiny, texts, vectors)
    assert (result.verdict, result.max_abs) == ("model", np.inf)
    assert result.worst[0][0] == 7
    assert result.to_dict()["max_abs"] is None
    assert "NaN or infinity" in result.summary
    vectors = embed(tiny, texts)
    vectors[[3, 4]] = vectors[[4, 3]]
    result = check_vectors(tiny, texts, vectors)
    assert result.verdict == "model"
    assert {row for row, _ in result.worst[:2]} == {3, 4}
    result = check_vectors(tiny, texts, vectors[:, :16])
    assert result.verdict == "model"
    assert "vectors are 16 numbers wide, this encoder's 32" in result.summary
    assert result.checked == 0
    tiny.truncate_dim = 16
    assert check_vectors(tiny, texts, embed(tiny, texts)).verdict == "same"
    result = check_vectors(tiny, texts, vectors[:, :16])
    assert result.verdict == "model"
    assert "only whole vectors can show why" in result.summary
    tiny.truncate_dim = None
    half = tiny.half()
    result = check_vectors(half, texts, vectors)
    assert result.verdict == "model"
    assert "load the encoder in float32" in result.summary


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
def test_samples_of_a_memory_mapped_file(tiny: Any, texts: list[str], tmp_path: Path) -> None:
    many = texts * 10
    np.save(tmp_path / "x.npy", embed(tiny, many))
    vectors = np.load(tmp_path / "x.npy", mmap_mode="r")
    result = check_vectors(tiny, many, vectors, sample=20)
    assert result.verdict == "same"
    # 10 texts are long, and 6 more come in for their length.
    assert 20 < result.checked <= 36
    assert result.rows == 410


REFUSED: dict[str, tuple[Any, str]] = {
    "int8": (lambda v: (v * 127).astype(np.int8), "vectors has dtype int8"),
    "uint8": (lambda v: (v * 50 + 100).astype(np.uint8), "vectors has dtype uint8"),
    "int8 tensor": (lambda v: torch.from_numpy(v).char(), "vectors has dtype torch.int8"),
    "whole numbers": (lambda v: [[1, 2]] * len(v), "vectors has dtype int64"),
    "fewer": (lambda v: v[:-1], "vectors has 4 rows, texts 5"),
    "one dimension": (lambda v: v[0], r"vectors has shape \[32\]"),
    "ragged": (lambda v: [[1.0] * 32] * 4 + [[1.0]], "vectors can't be read as rows"),
    "words": (lambda v: ["a", "b", "c", "d", "e"], "vectors can't be read as rows"),
    "None": (lambda v: None, "vectors is of type NoneType"),
}


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_are_no_vectors(case: str, tiny: Any) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as info:
        check_vectors(tiny, SENTENCES, make(embed(tiny, SENTENCES)))
    assert info.value.argument == "vectors"


def test_refuses_other_arguments(tiny: Any) -> None:
    vectors = np.zeros((1, 32), np.float32)
    with pytest.raises(InputError, match="texts is empty"):
        check_vectors(tiny, [], vectors[:0])
    with pytest.raises(InputTypeError, match=r"texts\[0\] is None"):
        check_vectors(tiny, [None], vectors)  # type: ignore[list-item]
    with pytest.raises(InputError, match="sample is 0"):
        check_vectors(tiny, ["a"], vectors, sample=0)


# --- the published weights

LONG = "The harbour was quiet that evening, and nobody noticed the small boat. " * 20


@pytest.fixture(scope="module")
def fresh(published: Path) -> Any:
    return load(published)


def test_published_record(fresh: Any) -> None:
    found = fingerprint(fresh)
    assert found.model == DEFAULT_MODEL
    assert found.weights_sha256 == SHA256["model.safetensors"]
    # The same everywhere, and with every version of tokenizers: a change here makes all records
    # that were kept those of another model.
    assert found.tokenizer_sha256 == (
        "d29c4f838989c52742f872c63eab9d0d30b998426707cf6d57dda204e3806331"
    )
    assert found.tensors_sha256 == (
        "10c7966fd4ac821b96b328f3fc57060995ec67652cabd6a3afabc6dd94c88b18"
    )
    assert found.architecture == "bert, 6 layers of 12 heads, eps 1e-12"
    assert (found.max_seq_length, found.dimension) == (256, 384)


@pytest.mark.filterwarnings("ignore::minilm.TruncationWarning")
def test_published_limits(fresh: Any, published: Path) -> None:
    texts = [entry.text for entry in TEXTS[:3]] + [LONG]
    other = load(published)
    for limit in (128, 512):
        other.max_seq_length = limit
        result = check_vectors(fresh, texts, embed(other, texts))
        assert (result.verdict, result.limit) == ("limit", limit)


def test_published_weights_in_bfloat16(fresh: Any, published: Path) -> None:
    texts = [entry.text for entry in TEXTS[:3]]
    other = load(published, dtype="bfloat16")
    vectors = embed(other, texts)
    result = check_vectors(fresh, texts, vectors, fingerprint(other))
    assert result.verdict == "rounding"
    assert 1e-4 < result.max_abs < 4e-3


@pytest.mark.parametrize(
    ("found", "alternatives", "verdict"),
    [
        (["bfloat16 products"], [], "rounding"),
        ([], ["float16", "float16 weights"], "rounding"),
        (["int8 weights, one scale a tensor"], [], "model"),
        (["float16", "[CLS] in place of the mean"], [], "model"),
        (["float16"], ["[CLS] in place of the mean"], "model"),
    ],
)
def test_fewer_bits_that_a_diagnosis_finds_are_rounding(
    found: list[str], alternatives: list[str], verdict: str, tiny: Any, texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def diagnose(encoder: Any, texts: list[str], vectors: Any, **options: Any) -> Any:
        return SimpleNamespace(
            verdict="tie" if alternatives else "cause",
            causes=[Cause(name, "") for name in found],
            alternatives=[Cause(name, "") for name in alternatives],
            is_equal=False,
            summary="probable cause",
        )

    monkeypatch.setattr("minilm.parity.check.diagnose", diagnose)
    texts = texts[:7]
    result = check_vectors(tiny, texts, embed(tiny, texts) + np.float32(0.01))
    assert (result.verdict, result.reason) == (verdict, "probable cause")


# --- a record that is asked for again


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done for it that takes long."""
    done: list[str] = []
    module = sys.modules["minilm.pretrained.fingerprint"]
    for name in ("_digest_tensors", "_file_sha256", "_digest_settings"):
        plain = getattr(module, name)

        def noted(*arguments: Any, name: str = name, plain: Any = plain) -> Any:
            done.append(name)
            return plain(*arguments)

        monkeypatch.setattr(module, name, noted)
    return done


def test_nothing_is_digested_twice(tiny: Any, digests: list[str]) -> None:
    first = fingerprint(tiny)
    assert len(digests) == 3
    assert fingerprint(tiny) == first
    tiny.max_seq_length = 8
    assert fingerprint(tiny).max_seq_length == 8
    assert len(digests) == 3


def weight_of(encoder: Any) -> Any:
    return encoder.bert.layers[1].feed_forward.output.weight


def one_number(encoder: Any) -> None:
    weight_of(encoder).data[3, 5] += 1e-6


def shared_memory(encoder: Any) -> None:
    weight_of(encoder).detach().numpy()[0, 0] *= -1


def signs(encoder: Any) -> None:
    weight_of(encoder).data[:, 1::2].neg_()


def swapped(encoder: Any) -> None:
    data = weight_of(encoder).data
    data[:, [0, 1]] = data[:, [1, 0]].clone()


def other_memory(encoder: Any) -> None:
    weight_of(encoder).data = weight_of(encoder).data.flip(0).contiguous()


def trained(encoder: Any) -> None:
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6)
    encoder(encoder.tokenize(["the dog"]))["sentence_embedding"].sum().backward()
    optimizer.step()


def loaded(encoder: Any) -> None:
    state = {name: value * 1.0001 for name, value in encoder.bert.state_dict().items()}
    encoder.bert.load_state_dict(state)


def other_normalizer(encoder: Any) -> None:
    encoder.tokenizer.backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)


def literal_special_tokens(encoder: Any) -> None:
    encoder.tokenizer.backend.encode_special_tokens = True


CHANGES = [one_number, shared_memory, signs, swapped, other_memory, trained, loaded]


def pairs_of_one_type(encoder: Any) -> None:
    encoder.tokenizer.second_type_id = 0


ALL_CHANGES = [*CHANGES, other_normalizer, literal_special_tokens, pairs_of_one_type]


@pytest.mark.parametrize("change", ALL_CHANGES, ids=lambda change: change.__name__)
def test_no_change_escapes_a_record_that_was_kept(change: Any, tiny: Any) -> None:
    """Not those either that leave no trace in torch's counts of versions, or in addresses."""
    before = fingerprint(tiny)
    copied = copy.deepcopy(tiny)
    change(tiny)
    after = fingerprint(tiny)
    assert compare(before, after).verdict == "model"
    made_anew = copy.deepcopy(tiny)
    assert fingerprint(made_anew) == after
    assert fingerprint(copied) == before


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("layers.1.feed_forward_layer_norm", "eps", 0.1),
        ("layers.0.attention", "heads", (8, 4)),
        ("embeddings.word_embeddings", "max_norm", 0.1),
    ],
)
def test_settings_that_no_file_tells_are_named(
    part: str, name: str, value: Any, tiny: Any, tmp_path: Path
) -> None:
    """Other vectors with the same weights: such a record lied, and a saved folder lost them."""
    fingerprint(tiny)
    setattr(tiny.bert.get_submodule(part), name, value)
    for act in (fingerprint, lambda encoder: save_pretrained(encoder, tmp_path / "saved")):
        with pytest.raises(InputError, match=rf"encoder\.bert\.{part} has the {name}"):
            act(tiny)
    assert not (tmp_path / "saved").exists()


def test_literal_special_tokens_are_not_saved(tiny: Any, tmp_path: Path) -> None:
    tiny.tokenizer.backend.encode_special_tokens = True
    with pytest.raises(InputError, match="encode_special_tokens, which can't be saved"):
        save_pretrained(tiny, tmp_path / "saved")

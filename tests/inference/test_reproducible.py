"""`reproducible=True`: float64 rounded once to float32, the same on every machine."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import LESSER, ROOT, compose, load, minilm, write_model_folder
from minilm.errors import InputError, InputTypeError, NotFiniteError
from minilm.files.streaming import encode_files
from minilm.index import Index
from minilm.parity.check import check_vectors
from minilm.parity.golden import TEXTS as GOLDEN
from minilm.pretrained.fingerprint import compare
from minilm.util import quantize_embeddings

TEXTS = ["the dog bites the man", "a cat", "", "the sun is out", "the " * 40, "a cat"]


@pytest.fixture
def pair(tiny_folder: Path) -> tuple[Any, Any]:
    """The tiny model, reproducible and in float64."""
    return load(tiny_folder, reproducible=True), load(tiny_folder, dtype="float64")


def once(values: Any) -> Any:
    """Rounded to float32."""
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"truncate_dim": 5},
        {"truncate_dim": 5, "normalize_embeddings": True},
        {"prompt": "the dog: "},
        {"truncation": "chunk"},
        {"convert_to_tensor": True},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_is_float64_rounded_once(options: dict[str, Any], pair: tuple[Any, Any]) -> None:
    options = {"truncation": "silent"} | options
    ours, exact = (model.encode(TEXTS, **options) for model in pair)
    assert ours.dtype in (np.float32, torch.float32)
    assert exact.dtype in (np.float64, torch.float64)
    assert np.array_equal(ours, once(exact))


def test_rounds_what_is_not_a_sentence_vector(pair: tuple[Any, Any]) -> None:
    options: dict[str, Any] = {"output_value": "token_embeddings", "truncation": "silent"}
    ours, exact = (model.encode(TEXTS, **options) for model in pair)
    for one, other in zip(ours, exact, strict=True):
        assert torch.equal(one, once(other))
    options["output_value"] = None
    ours, exact = (model.encode(TEXTS, **options) for model in pair)
    for one, other in zip(ours, exact, strict=True):
        for name in ("token_embeddings", "sentence_embedding"):
            assert torch.equal(one[name], once(other[name]))
    ours, exact = (next(model.encode_stream(TEXTS[:1])) for model in pair)
    assert np.array_equal(ours, once(exact))
    ours, exact = (model.encode_windows("the " * 40) for model in pair)
    assert all(
        np.array_equal(a.embedding, once(b.embedding)) for a, b in zip(ours, exact, strict=True)
    )


def test_codes_are_those_of_the_rounded_vectors(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    vectors = model.encode(TEXTS, truncation="silent")
    for precision in ("binary", "ubinary"):
        codes = model.encode(TEXTS, truncation="silent", precision=precision)
        assert np.array_equal(codes, quantize_embeddings(vectors, precision))


def test_forward_is_float64(pair: tuple[Any, Any]) -> None:
    features = pair[0].tokenize(TEXTS[:2])
    ours, exact = (model(features)["sentence_embedding"] for model in pair)
    assert ours.dtype == torch.float64
    assert torch.equal(ours, exact)


@pytest.mark.process
def test_processes_give_the_same(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    expected = model.encode(TEXTS, truncation="silent")
    with model.start_multi_process_pool(["cpu"] * 2) as pool:
        found = model.encode(TEXTS, truncation="silent", pool=pool, chunk_size=1)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


def test_no_text_gives_float32(pair: tuple[Any, Any]) -> None:
    assert pair[0].encode([]).dtype == np.float32


def test_any_batch_gives_the_same(pair: tuple[Any, Any]) -> None:
    assert pair[0].deterministic


@pytest.mark.parametrize("copied", ["copy", "deepcopy", "pickle", "saved"])
def test_copies_are_reproducible_too(copied: str, pair: tuple[Any, Any], tmp_path: Path) -> None:
    model = pair[0]
    if copied == "saved":  # the files say nothing of how they are to be loaded
        model.save_pretrained(tmp_path / "saved")
        assert not load(tmp_path / "saved").reproducible
        other = load(tmp_path / "saved", reproducible=True)
    else:
        make = {"copy": copy.copy, "deepcopy": copy.deepcopy}
        other = make.get(copied, lambda model: pickle.loads(pickle.dumps(model)))(model)
    assert other.reproducible
    assert np.array_equal(
        other.encode(TEXTS, truncation="silent"), model.encode(TEXTS, truncation="silent")
    )


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.float(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.bert.layers[1].float(),
    ],
)
def test_what_was_converted_is_not_reproducible(convert: Any, pair: tuple[Any, Any]) -> None:
    model = pair[0]
    assert model.fingerprint().dtype == "reproducible"
    convert(model)
    assert not model.reproducible
    assert model.fingerprint().dtype != "reproducible"


def test_modules_are_converted() -> None:
    model = compose(reproducible=True)
    assert model.reproducible
    assert model.encode(TEXTS[:2]).dtype == np.float32
    assert not compose(dtype="float64").reproducible


def test_says_so(tiny_folder: Path) -> None:
    own = load(tiny_folder, reproducible=True, dtype="float64").fingerprint()
    assert own.dtype == "reproducible"
    assert compare(own, load(tiny_folder, reproducible=True).fingerprint()).verdict == "same"
    for dtype in ("float64", "float32"):
        assert compare(own, load(tiny_folder, dtype=dtype).fingerprint()).verdict == "rounding"
    shown = minilm("info", "--model", tiny_folder, "--reproducible", "--device", "cpu")
    assert b"computes in: reproducible on cpu" in shown.stdout


@pytest.mark.parametrize("dtype", ["float32", "auto", torch.bfloat16, "float16"])
def test_another_dtype_is_refused(dtype: Any, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="reproducible=True computes in float64") as caught:
        load(tiny_folder, dtype=dtype, reproducible=True)
    assert caught.value.argument == "dtype"
    assert load(tiny_folder, dtype=dtype, reproducible=False).reproducible is False


def test_must_be_a_bool(tiny_folder: Path) -> None:
    with pytest.raises(InputTypeError, match="reproducible is 'yes'; pass a bool"):
        load(tiny_folder, reproducible="yes")


def test_numbers_beyond_float32_are_an_error(tiny_folder: Path) -> None:
    model = load(tiny_folder, reproducible=True)
    model.normalize = nn.Identity()
    with torch.no_grad():
        for norm in (part for part in model.modules() if isinstance(part, nn.LayerNorm)):
            norm.weight.mul_(1e39)
    with pytest.raises(NotFiniteError, match=r"beyond what torch.float32 holds; load it in float6"):
        model.encode(TEXTS[:1])
    assert np.isfinite(model.encode(TEXTS[:1], normalize_embeddings=True)).all()


def test_commands_take_it(tiny_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("".join(f"{text}\n" for text in TEXTS[:2]), encoding="utf-8")
    expected = load(tiny_folder, reproducible=True).encode(TEXTS[:2])
    model = ("--model", tiny_folder, "--reproducible", "--device", "cpu")
    done = minilm("encode", *model, source, "-o", tmp_path / "v.npy")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "v.npy"), expected)
    done = minilm("index", "build", *model, source, "-o", tmp_path / "index")
    assert done.returncode == 0, done.stderr
    record = Index.open(tmp_path / "index").fingerprint
    assert record is not None
    assert record.dtype == "reproducible"
    done = minilm("index", "search", *model, tmp_path / "index", "a cat")
    assert done.returncode == 0, done.stderr
    assert b"a cat" in done.stdout
    assert b"warning" not in done.stderr


def test_check_knows_them(tiny_folder: Path) -> None:
    model, other = load(tiny_folder, reproducible=True), load(tiny_folder)
    vectors = model.encode(TEXTS[:4])
    assert check_vectors(model, TEXTS[:4], vectors, model.fingerprint()).verdict == "same"
    assert check_vectors(other, TEXTS[:4], vectors, model.fingerprint()).verdict == "rounding"


def test_ray_takes_it(tiny_folder: Path) -> None:
    pytest.importorskip("ray.data")
    from minilm.adapters.ray import MiniLMActor

    actor = MiniLMActor(tiny_folder, reproducible=True, device="cpu")
    assert actor.fingerprint.dtype == "reproducible"
    found = actor({"text": np.array(TEXTS[:2])})["embedding"]
    assert np.array_equal(found, load(tiny_folder, reproducible=True).encode(TEXTS[:2]))


# Other machines.


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_a_run_goes_on_with_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, source = write_model_folder(tmp_path / "tiny"), tmp_path / "texts.jsonl"
    write_texts(source, TEXTS)
    for options in ({"reproducible": True}, {}):
        model, output = load(folder, **options), tmp_path / f"out{len(options)}"
        encode_files(model, source, output, truncation="silent")
        manifest = output.with_name(f"{output.name}.manifest.json")
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", "2.99.0")
            if options:
                before = manifest.read_bytes()
                assert encode_files(model, source, output, truncation="silent").computed == 0
                encode_files(model, source, output, truncation="silent", overwrite=True)
                assert manifest.read_bytes() == before
                assert json.loads(before)["fingerprint"]["dtype"] == "reproducible"
            else:
                with pytest.raises(InputError, match=r"another torch \('2"):
                    encode_files(model, source, output, truncation="silent")


# What one machine does: prints the bytes of the golden texts' vectors, and goes on with a run of
# files until it has computed so many parts.
MACHINE = """
import sys, warnings
from pathlib import Path
from minilm import SentenceEncoder
from minilm.files import streaming
from minilm.parity.golden import TEXTS

model, source, output, parts = *map(Path, sys.argv[1:4]), int(sys.argv[4])
warnings.simplefilter("ignore")
encoder = SentenceEncoder.from_pretrained(model, device="cpu", reproducible=sys.argv[5] == "True")
vectors = encoder.encode([each.text for each in TEXTS if len(each.text) < 300])
write, written = streaming.ShardFolder.add, 0

def add(self, *arguments, **options):
    global written
    if written == parts:
        raise KeyboardInterrupt
    written += 1
    return write(self, *arguments, **options)

streaming.ShardFolder.add = add
try:
    streaming.encode_files(encoder, source, output, shard_rows=8)
except KeyboardInterrupt:
    pass
sys.stdout.buffer.write(vectors.tobytes())
"""


def on(limits: dict[str, str], *arguments: Any) -> bytes:
    """Run `MACHINE` with the instructions of a lesser processor."""
    command = [sys.executable, "-c", MACHINE, *map(str, arguments)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | limits
    return subprocess.run(command, check=True, env=variables, stdout=subprocess.PIPE).stdout


@pytest.mark.slow
@pytest.mark.process
def test_three_kinds_of_processor_give_the_same_bytes(published: Path, tmp_path: Path) -> None:
    texts = [each.text for each in GOLDEN if len(each.text) < 100][:40]
    source = write_texts(tmp_path / "texts.jsonl", texts)
    whole, by_turns = tmp_path / "whole", tmp_path / "by-turns"
    expected = on({}, published, source, whole, 99, True)
    vectors = np.frombuffer(expected, np.float32)
    encoder = load(published)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = encoder.encode([each.text for each in GOLDEN if len(each.text) < 300])
    assert vectors.size == usual.size
    assert 0 < np.abs(vectors - usual.flatten()).max() < 1e-6
    for limits, parts in ((LESSER["avx2"], 2), ({}, 1), (LESSER["sse4"], 99)):
        found = on(limits, published, source, by_turns, parts, True)
        assert found == expected
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) == -(-len(texts) // 8)
    assert names == sorted(path.name for path in by_turns.iterdir())
    assert all((whole / name).read_bytes() == (by_turns / name).read_bytes() for name in names)

"""What all adapters share: a model named now and loaded later, and frameworks that may be absent.

The tests of each adapter with its framework are in `adapters/`.
"""

import copy
import importlib
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT
from minilm import MinilmError, SentenceEncoder
from minilm.adapters import lazy
from minilm.adapters.lazy import LazyEncoder
from minilm.errors import (
    InputError,
    InputTypeError,
    MissingPackageError,
    ModelNotFoundError,
    TruncationError,
)

TEXTS = ["the dog bites", "a cat", "the sun is out"]

# The framework that each file imports.
FRAMEWORKS = {
    "bertopic": "bertopic",
    "chroma": "chromadb",
    "keybert": "keybert",
    "langchain": "langchain_core",
    "mteb": "mteb",
    "ray": "ray",
    "sklearn": "sklearn",
}


@pytest.mark.parametrize("adapter", FRAMEWORKS)
def test_missing_framework_says_what_to_install(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = FRAMEWORKS[adapter]
    for name in [name for name in sys.modules if name.split(".")[0] == root]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, root, None)
    monkeypatch.delitem(sys.modules, f"minilm.adapters.{adapter}", raising=False)
    with pytest.raises(MissingPackageError) as caught:
        importlib.import_module(f"minilm.adapters.{adapter}")
    assert f'pip install "minilm[{adapter}]"' in str(caught.value)
    assert caught.value.extra == adapter
    assert isinstance(caught.value, MinilmError)
    assert isinstance(caught.value, ImportError)


def test_every_adapter_has_its_tests() -> None:
    files = {path.stem for path in (ROOT / "minilm" / "adapters").glob("*.py")}
    tests = {path.stem for path in (ROOT / "tests" / "adapters").glob("test_*.py")}
    assert tests == {f"test_{name}" for name in files - {"__init__"}}


@pytest.mark.process
def test_the_command_that_tests_them_lists_them() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "test_adapter"), "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    names = ", ".join(sorted(FRAMEWORKS))
    assert f"'nonsense' is not an adapter; pass one of {names}" in done.stderr


@pytest.mark.process
def test_importing_the_package_loads_no_framework() -> None:
    roots = {*FRAMEWORKS.values(), "torch", "numpy"}
    code = f"import sys, minilm.adapters; print(sorted({roots} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_nothing_is_read_before_it_is_used(tiny_folder: Path) -> None:
    model = LazyEncoder(tiny_folder / "absent")
    with pytest.raises(ModelNotFoundError, match="absent"):
        model.encode(TEXTS)


def test_its_text_shows_no_secret(tiny_folder: Path) -> None:
    model = LazyEncoder(tiny_folder, dtype="float64", token="a secret")
    assert repr(model) == f"LazyEncoder({tiny_folder!r}, dtype='float64')"


def test_vectors_are_those_of_the_encoder(tiny_folder: Path) -> None:
    prompts = {"query": "a cat sees ", "document": "the man "}
    model = LazyEncoder(tiny_folder, device="cpu", prompts=prompts)
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu", prompts=prompts)
    np.testing.assert_array_equal(model.encode(TEXTS), encoder.encode(TEXTS))
    np.testing.assert_array_equal(model.encode_query("a dog"), encoder.encode_query("a dog"))
    np.testing.assert_array_equal(model.encode_document(TEXTS), encoder.encode_document(TEXTS))
    assert not np.array_equal(model.encode_query(TEXTS), model.encode_document(TEXTS))


def test_options_are_those_of_loading_and_of_encode(tiny_folder: Path) -> None:
    model = LazyEncoder(
        tiny_folder, dtype="float64", truncate_dim=8, normalize_embeddings=True, truncation="error"
    )
    vectors = model.encode(TEXTS)
    assert (vectors.dtype, vectors.shape) == (np.float64, (3, 8))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-15)  # some roundings
    assert model.encode(TEXTS, truncate_dim=4).shape == (3, 4)  # a call's own come first
    with pytest.raises(TruncationError):
        model.encode(["the dog " * 20])


def test_an_encoder_is_used_as_it_is(tiny_encoder: SentenceEncoder) -> None:
    model = LazyEncoder(tiny_encoder, truncate_dim=8, device=None)
    assert model.encoder is tiny_encoder
    np.testing.assert_array_equal(model.encode(TEXTS), tiny_encoder.encode(TEXTS, truncate_dim=8))


@pytest.mark.parametrize(
    ("options", "argument", "message"),
    [
        ({"nonsense": 1}, "nonsense", "there is no option nonsense"),
        ({"precision": "int8"}, "precision", "there is no option precision"),
        ({"prompts": ["query"]}, "prompts", "prompts is list; pass a dict"),
        ({"truncation": "cut"}, "truncation", "truncation is 'cut'; pass one of"),
        ({"truncate_dim": 0}, "truncate_dim", "truncate_dim is 0; pass a positive integer"),
        ({"batch_size": "8"}, "batch_size", "batch_size is '8'; pass a positive integer"),
        ({"token_budget": -1}, "token_budget", "token_budget is -1; pass a positive integer"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], argument: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        LazyEncoder("nowhere", **options)
    assert caught.value.argument == argument


@pytest.mark.parametrize("model", [None, 3, b"folder"])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(
        InputTypeError, match="pass a model's folder, its name on the Hub"
    ) as caught:
        LazyEncoder(model)
    assert caught.value.argument == "model"


def test_options_for_loading_need_a_name(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputTypeError, match="dtype is for a model that is loaded by its name"):
        LazyEncoder(tiny_encoder, dtype="float64")


def test_pickles_have_the_name_and_no_weights(tiny_folder: Path) -> None:
    model = LazyEncoder(tiny_folder, dtype="float64", truncate_dim=8)
    before = pickle.dumps(model)
    vectors = model.encode(TEXTS)
    after = pickle.dumps(model)
    assert before == after
    assert len(after) < 1000
    for copied in (pickle.loads(after), copy.deepcopy(model), copy.copy(model)):
        assert copied.encoder is not model.encoder
        np.testing.assert_array_equal(copied.encode(TEXTS), vectors)


def test_pickles_have_an_encoder_that_was_given(tiny_encoder: SentenceEncoder) -> None:
    with torch.no_grad():
        tiny_encoder.bert.embeddings.word_embeddings.weight.mul_(2)  # no file has this
    copied = pickle.loads(pickle.dumps(LazyEncoder(tiny_encoder)))
    np.testing.assert_array_equal(copied.encode(TEXTS), tiny_encoder.encode(TEXTS))


def test_threads_load_it_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[SentenceEncoder] = []
    together = threading.Barrier(8)

    class Slow(SentenceEncoder):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            loaded.append(self)
            threading.Event().wait(0.05)  # long enough for the others to ask too
            super().__init__(*arguments, **options)

    model = LazyEncoder(tiny_folder)
    monkeypatch.setattr(lazy, "SentenceEncoder", Slow)
    found: list[SentenceEncoder] = []

    def ask() -> None:
        together.wait()
        found.append(model.encoder)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1
    assert {id(encoder) for encoder in found} == {id(loaded[0])}

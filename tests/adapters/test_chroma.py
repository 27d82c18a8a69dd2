"""A collection of Chroma: filled, searched, and opened again by a process that knows its name."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT, edit_json, needs, write_model_folder
from minilm import SentenceEncoder
from minilm.errors import InputError, InputTypeError, ModelNotFoundError

needs("chromadb", "chroma")

import chromadb  # noqa: E402
from chromadb.config import Settings  # noqa: E402
from chromadb.utils import embedding_functions  # noqa: E402

from minilm.adapters import chroma as adapter  # noqa: E402
from minilm.adapters.chroma import MiniLMEmbeddingFunction  # noqa: E402

TEXTS = ["the dog bites", "a cat sees the sun", "the man is out"]
PROMPTS = {"query": "a man sees ", "document": "the "}

FACTS = [
    "The parcel was sent on Monday.",
    "Cats see well in the dark.",
    "Two eggs and a cup of flour make a pancake.",
]
QUESTION = "Which animal can look around at night?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def _nothing_built_yet() -> None:
    adapter._build.cache_clear()


def client_of(path: Path) -> Any:
    return chromadb.PersistentClient(str(path), settings=Settings(anonymized_telemetry=False))


def test_vectors_are_those_of_the_encoder(folder: Path) -> None:
    function = MiniLMEmbeddingFunction(folder, prompts=PROMPTS)
    encoder = SentenceEncoder.from_pretrained(folder, prompts=PROMPTS)
    documents, queries = function(TEXTS), function.embed_query(TEXTS)
    np.testing.assert_array_equal(documents, encoder.encode_document(TEXTS))
    np.testing.assert_array_equal(queries, encoder.encode_query(TEXTS))
    assert not np.array_equal(documents, queries)  # each has its prompt
    assert isinstance(documents, list)
    kinds = {(type(row), row.dtype.name) for row in documents + queries}
    assert kinds == {(np.ndarray, "float32")}
    precise = MiniLMEmbeddingFunction(folder, dtype="float64")
    assert precise(TEXTS)[0].dtype == np.float32  # as which Chroma keeps it


def test_it_is_what_chroma_expects(folder: Path) -> None:
    function = MiniLMEmbeddingFunction(folder)
    assert not function.is_legacy()
    assert embedding_functions.known_embedding_functions["minilm"] is MiniLMEmbeddingFunction
    assert (function.default_space(), function.supported_spaces()[0]) == ("cosine", "cosine")


def test_what_is_no_list_of_texts_is_refused(folder: Path) -> None:
    function = MiniLMEmbeddingFunction(folder)
    single: Any = "the dog"
    missing: Any = ["the dog", None]
    for embed in (function, function.embed_query):
        with pytest.raises(InputTypeError, match="input is a single text; pass a list of texts"):
            embed(single)
        with pytest.raises(InputTypeError, match=r"input\[1\] is None; pass a string"):
            embed(missing)


# --- what is kept


def test_config_builds_the_same_function_again(folder: Path) -> None:
    function = MiniLMEmbeddingFunction(
        folder,
        device=torch.device("cpu"),
        dtype=torch.float64,
        cache_dir=folder,
        prompts=PROMPTS,
        truncation="chunk",
        truncate_dim=8,
        normalize_embeddings=True,
        batch_size=2,
        token="a secret",
    )
    config = function.get_config()
    assert config.pop("fingerprint")["dimension"] == 8
    assert config == {
        "model": str(folder),
        "device": "cpu",
        "dtype": "float64",
        "cache_dir": str(folder),
        "prompts": PROMPTS,
        "truncation": "chunk",
        "truncate_dim": 8,
        "normalize_embeddings": True,
        "batch_size": 2,
    }
    again = MiniLMEmbeddingFunction.build_from_config(function.get_config())
    assert again.get_config() == function.get_config()
    np.testing.assert_array_equal(again(TEXTS), function(TEXTS))
    np.testing.assert_array_equal(again.embed_query(TEXTS), function.embed_query(TEXTS))


def test_a_folder_is_kept_from_the_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert MiniLMEmbeddingFunction("tiny").get_config()["model"] == str(folder)


def test_a_name_is_kept_as_it_is(published: Path) -> None:
    function = MiniLMEmbeddingFunction()
    assert function.get_config()["model"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_it_is_built_once_and_loaded_when_used(folder: Path) -> None:
    config = MiniLMEmbeddingFunction(folder).get_config()
    folder.rename(folder.parent / "elsewhere")
    first = MiniLMEmbeddingFunction.build_from_config(config)
    assert MiniLMEmbeddingFunction.build_from_config(dict(reversed(config.items()))) is first
    with pytest.raises(ModelNotFoundError):
        first(TEXTS)
    (folder.parent / "elsewhere").rename(folder)
    assert len(first(TEXTS)) == 3


def test_an_encoder_is_refused(tiny_encoder: SentenceEncoder) -> None:
    model: Any = tiny_encoder
    with pytest.raises(InputTypeError, match="can't be kept with a collection; pass its folder"):
        MiniLMEmbeddingFunction(model)


def test_an_absent_model_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        MiniLMEmbeddingFunction(tmp_path / "absent")


def test_options_that_json_has_not_are_refused(folder: Path) -> None:
    options: Any = {"trust_remote_code": object()}
    with pytest.raises(InputTypeError, match="can't be kept with a collection as JSON"):
        MiniLMEmbeddingFunction(folder, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ...}, "it needs the model and its fingerprint"),
        ({"fingerprint": ...}, "it needs the model and its fingerprint"),
        ({"fingerprint": {"model": "x"}}, "not a fingerprint: weights_sha256 is missing"),
        ({"nonsense": 1}, "there is no option nonsense"),
    ],
)
def test_a_config_is_checked(folder: Path, change: dict[str, Any], message: str) -> None:
    config = MiniLMEmbeddingFunction(folder).get_config()
    MiniLMEmbeddingFunction.validate_config(config)
    broken = {name: value for name, value in (config | change).items() if value is not ...}
    with pytest.raises(InputError, match=message):
        MiniLMEmbeddingFunction.validate_config(broken)


def test_another_model_under_the_same_name_is_refused(folder: Path) -> None:
    config = MiniLMEmbeddingFunction(folder).get_config()
    for file in write_model_folder(folder.parent / "other", seed=1).glob("*.safetensors"):
        file.rename(folder / file.name)
    function = MiniLMEmbeddingFunction.build_from_config(config)
    for embed in (function, function.embed_query):
        with pytest.raises(InputError, match=r"not the model that .* with: model \(weights_sha256"):
            embed(TEXTS)


def test_an_update_may_move_the_model_and_not_change_it(folder: Path) -> None:
    function = MiniLMEmbeddingFunction(folder)
    moved = write_model_folder(folder.parent / "moved")
    other = write_model_folder(folder.parent / "other", seed=1)
    limited = write_model_folder(folder.parent / "limited")
    edit_json(limited / "sentence_bert_config.json", max_seq_length=6)
    for allowed in (
        MiniLMEmbeddingFunction(moved, batch_size=2, device="cpu"),
        MiniLMEmbeddingFunction(folder, prompts={"query": "a "}),
    ):
        function.validate_config_update(function.get_config(), allowed.get_config())
    for refused in (
        MiniLMEmbeddingFunction(other),
        MiniLMEmbeddingFunction(limited),
        MiniLMEmbeddingFunction(folder, truncate_dim=8),
        MiniLMEmbeddingFunction(folder, truncation="chunk"),
        MiniLMEmbeddingFunction(folder, prompts={"document": "a "}),
        MiniLMEmbeddingFunction(folder, prompt="a "),
    ):
        with pytest.raises(InputError, match="not the model that the collection was made with"):
            function.validate_config_update(function.get_config(), refused.get_config())


# --- a collection


def test_a_collection_is_filled_and_queried(published: Path, tmp_path: Path) -> None:
    function = MiniLMEmbeddingFunction(published, device="cpu")
    client = client_of(tmp_path)
    encoder = SentenceEncoder.from_pretrained(published, device="cpu")
    cosine = encoder.similarity(encoder.encode(QUESTION), encoder.encode(FACTS[1])).item()
    for space in ("cosine", "ip"):
        configuration = {} if space == "cosine" else {"hnsw": {"space": space}}
        collection = client.create_collection(
            f"facts-{space}", embedding_function=function, configuration=configuration
        )
        assert collection.configuration["hnsw"]["space"] == space
        collection.add(ids=["0", "1", "2"], documents=FACTS)
        found = collection.query(query_texts=[QUESTION], n_results=1, include=["distances"])
        assert found["ids"] == [["1"]]
        assert found["distances"][0][0] == pytest.approx(1 - cosine, abs=1e-6)  # its own sum
    stored = collection.get(include=["embeddings"])["embeddings"]
    np.testing.assert_array_equal(stored, encoder.encode(FACTS))  # "cosine" scales them again


QUERY = """
import sys, chromadb
from chromadb.config import Settings
{imports}
client = chromadb.PersistentClient(sys.argv[1], settings=Settings(anonymized_telemetry=False))
collection = client.get_collection("facts")
for _ in range(2):
    found = collection.query(query_texts=[sys.argv[2]], n_results=1, include=["documents"])
    print(found["documents"])
collection.add(ids=["3"], documents=["The sun is a star."])
print(collection.count())
"""


def in_a_new_process(imports: str, database: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", QUERY.format(imports=imports), str(database), QUESTION]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.process
def test_a_collection_survives_a_restart(published: Path, tmp_path: Path) -> None:
    function = MiniLMEmbeddingFunction(published, device="cpu")
    collection = client_of(tmp_path).create_collection("facts", embedding_function=function)
    collection.add(ids=["0", "1", "2"], documents=FACTS)
    done = in_a_new_process("import minilm.adapters.chroma", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"[[{FACTS[1]!r}]]"] * 2 + ["4"]


@pytest.mark.process
def test_without_the_import_chroma_refuses(folder: Path, tmp_path: Path) -> None:
    collection = client_of(tmp_path).create_collection(
        "facts", embedding_function=MiniLMEmbeddingFunction(folder)
    )
    collection.add(ids=["0", "1", "2"], documents=TEXTS)
    done = in_a_new_process("", tmp_path)
    assert done.returncode == 1
    assert "Embedding function minilm not found" in done.stderr


def test_a_collection_of_another_model_is_not_searched(folder: Path, tmp_path: Path) -> None:
    client = client_of(tmp_path)
    client.create_collection("facts", embedding_function=MiniLMEmbeddingFunction(folder)).add(
        ids=["0", "1", "2"], documents=TEXTS
    )
    for file in write_model_folder(folder.parent / "other", seed=1).glob("*.safetensors"):
        file.rename(folder / file.name)
    opened = client.get_collection("facts")
    with pytest.raises(InputError, match="not the model that the collection was made with"):
        opened.query(query_texts=["the dog"], n_results=1)

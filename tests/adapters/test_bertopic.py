"""The encoder in the real BERTopic, on real titles; no network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import SHARED, needs
from minilm import SentenceEncoder
from minilm.errors import InputTypeError

needs("bertopic", "bertopic")

from bertopic import BERTopic  # noqa: E402
from bertopic.backend._utils import select_backend  # noqa: E402
from umap import UMAP  # noqa: E402

from minilm.adapters.bertopic import MiniLMTopicEmbedder  # noqa: E402

TEXTS = ["the dog bites", "a cat", "the man sees the sun is out", "walk"]


class Counting(MiniLMTopicEmbedder):
    """Keeps what it was given and what it gave."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls: list[tuple[list[str], Any]] = []

    def embed(self, documents: Any, verbose: bool = False) -> Any:
        vectors = super().embed(documents, verbose)
        self.calls.append((list(documents), vectors))
        return vectors


def small_model(embedder: Any) -> Any:
    """BERTopic for few texts, with seeded reduction."""
    reduce = UMAP(n_neighbors=10, n_components=5, metric="cosine", random_state=0, n_jobs=1)
    return BERTopic(embedding_model=embedder, umap_model=reduce, min_topic_size=8)


@pytest.fixture(scope="module")
def titles() -> list[str]:
    path = SHARED / "retrieval" / "scifact-small" / "corpus.jsonl"
    if not path.is_file():
        pytest.skip(f"needs the data in {SHARED}")
    lines = path.read_text(encoding="utf-8").splitlines()[:300]
    return [json.loads(line)["title"] for line in lines]


def test_vectors_are_those_of_encode(tiny_encoder: SentenceEncoder) -> None:
    embedder = MiniLMTopicEmbedder(tiny_encoder)
    for embed in (embedder.embed, embedder.embed_documents, embedder.embed_words):
        assert np.array_equal(embed(TEXTS), tiny_encoder.encode(TEXTS))


def test_it_is_taken_as_it_is(tiny_encoder: SentenceEncoder) -> None:
    embedder = MiniLMTopicEmbedder(tiny_encoder)
    assert select_backend(embedder) is embedder
    assert select_backend(embedder, language="german") is embedder


def test_what_is_no_list_of_texts_is_refused(tiny_encoder: SentenceEncoder) -> None:
    embedder = MiniLMTopicEmbedder(tiny_encoder)
    with pytest.raises(InputTypeError, match=r"documents\[1\] is None"):
        embedder.embed(["a cat", None])  # type: ignore[list-item]
    with pytest.raises(InputTypeError, match="documents is a single text"):
        embedder.embed("a cat")


def test_bar_is_shown_if_wanted(
    tiny_encoder: SentenceEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder = MiniLMTopicEmbedder(tiny_encoder)
    embedder.embed(TEXTS)
    assert not capsys.readouterr().err
    embedder.embed(TEXTS, verbose=True)
    assert capsys.readouterr().err


def test_topics_of_titles(encoder: SentenceEncoder, titles: list[str], tmp_path: Path) -> None:
    embedder = Counting(encoder)
    model = small_model(embedder)
    topics, _ = model.fit_transform(titles)
    assert model.embedding_model is embedder
    texts, vectors = embedder.calls[0]
    assert texts == titles
    assert np.array_equal(vectors, encoder.encode(titles))
    assert len(set(topics) - {-1}) >= 3

    # The centres of the topics are means of our vectors, and a query is compared with them.
    of_topic = np.array(topics) == 0
    assert np.allclose(
        model.topic_embeddings_[model._outliers], vectors[of_topic].mean(axis=0), atol=1e-6
    )
    calls = len(embedder.calls)
    found, similarity = model.find_topics("gene expression", top_n=2)
    assert embedder.calls[calls][0] == ["gene expression"]
    assert len(found) == 2
    assert similarity[0] >= similarity[1]

    # Saved without the model, which is passed again.
    model.save(str(tmp_path / "topics"), serialization="safetensors", save_embedding_model=False)
    again = BERTopic.load(str(tmp_path / "topics"), embedding_model=embedder)
    assert again.embedding_model is embedder
    assert again.find_topics("gene expression", top_n=2)[0] == found


def test_pickle_keeps_the_models_name(
    published: Path, encoder: SentenceEncoder, titles: list[str], tmp_path: Path
) -> None:
    model = small_model(MiniLMTopicEmbedder(published, device="cpu"))
    model.fit(titles)
    model.save(str(tmp_path / "topics"), serialization="pickle")
    assert (tmp_path / "topics").stat().st_size < 20e6  # the weights are 90 MB
    again = BERTopic.load(str(tmp_path / "topics"))
    assert isinstance(again.embedding_model, MiniLMTopicEmbedder)
    assert np.array_equal(again.embedding_model.embed(TEXTS), encoder.encode(TEXTS))
    assert again.topics_ == model.topics_

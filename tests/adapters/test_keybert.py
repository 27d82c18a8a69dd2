"""The encoder in the real KeyBERT, on real text; no network."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import SHARED, needs
from minilm import SentenceEncoder
from minilm.errors import InputTypeError

needs("keybert", "keybert")

from keybert import KeyBERT  # noqa: E402
from keybert.backend._utils import select_backend  # noqa: E402

from minilm.adapters.keybert import MiniLMKeywordEmbedder  # noqa: E402

TEXTS = ["the dog bites", "a cat", "the man sees the sun is out", "walk"]


class Counting(MiniLMKeywordEmbedder):
    """Keeps what it was given and what it gave."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls: list[tuple[list[str], Any]] = []

    def embed(self, documents: Any, verbose: bool = False) -> Any:
        vectors = super().embed(documents, verbose)
        self.calls.append((list(documents), vectors))
        return vectors


def test_vectors_are_those_of_encode(tiny_encoder: SentenceEncoder) -> None:
    embedder = MiniLMKeywordEmbedder(tiny_encoder)
    assert np.array_equal(embedder.embed(TEXTS), tiny_encoder.encode(TEXTS))
    assert np.array_equal(embedder.embed(np.array(TEXTS)), tiny_encoder.encode(TEXTS))


def test_it_is_taken_as_it_is(tiny_encoder: SentenceEncoder) -> None:
    embedder = MiniLMKeywordEmbedder(tiny_encoder)
    assert select_backend(embedder) is embedder
    assert KeyBERT(embedder).model is embedder


def test_what_is_no_list_of_texts_is_refused(tiny_encoder: SentenceEncoder) -> None:
    embedder = MiniLMKeywordEmbedder(tiny_encoder)
    with pytest.raises(InputTypeError, match=r"documents\[1\] is None"):
        embedder.embed(["a cat", None])  # type: ignore[list-item]
    with pytest.raises(InputTypeError, match="documents is a single text"):
        embedder.embed("a cat")


def test_bar_is_shown_if_wanted(
    tiny_encoder: SentenceEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder = MiniLMKeywordEmbedder(tiny_encoder)
    embedder.embed(TEXTS)
    assert not capsys.readouterr().err
    embedder.embed(TEXTS, verbose=True)
    assert capsys.readouterr().err


def test_pickle_has_the_models_name(tiny_folder: Path) -> None:
    embedder = MiniLMKeywordEmbedder(tiny_folder, device="cpu")
    vectors = embedder.embed(TEXTS)
    data = pickle.dumps(embedder)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).embed(TEXTS), vectors)


def test_keywords_of_an_abstract(encoder: SentenceEncoder) -> None:
    path = SHARED / "retrieval" / "scifact-small" / "corpus.jsonl"
    if not path.is_file():
        pytest.skip(f"needs the data in {SHARED}")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(2)]
    embedder = Counting(encoder, truncation="silent")
    texts = [row["text"] for row in rows]
    keywords = KeyBERT(embedder).extract_keywords(texts, top_n=3)
    (documents, of_texts), (words, of_words) = embedder.calls
    assert documents == texts
    assert np.array_equal(of_texts, encoder.encode(texts, truncation="silent"))
    assert np.array_equal(of_words, encoder.encode(words))
    # What it finds are words near to the text, with their cosine, which it rounds.
    for text, vector, found in zip(texts, of_texts, keywords, strict=True):
        assert len(found) == 3
        for word, score in found:
            assert word in text.lower()
            cosine = encoder.similarity(vector, of_words[words.index(word)]).item()
            assert score == pytest.approx(cosine, rel=0, abs=6e-5)

"""LangChain's stores, filled and searched; and LlamaIndex, which wraps the same object."""

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest

from conftest import needs, write_model_folder
from minilm import SentenceEncoder
from minilm.errors import InputTypeError

needs("langchain_core", "langchain")

from langchain_core.documents import Document  # noqa: E402
from langchain_core.embeddings import Embeddings  # noqa: E402
from langchain_core.vectorstores import InMemoryVectorStore  # noqa: E402

from minilm.adapters.langchain import MiniLMEmbeddings  # noqa: E402

TEXTS = ["the dog bites", "a cat sees the sun", "the man is out"]
PROMPTS = {"query": "a man sees ", "document": "the "}

FACTS = [
    "The parcel was sent on Monday.",
    "Cats see well in the dark.",
    "Two eggs and a cup of flour make a pancake.",
    "The stadium holds forty thousand people.",
]
QUESTION = "Which animal can look around at night?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "tiny")


def test_vectors_are_those_of_the_encoder(folder: Path) -> None:
    embeddings = MiniLMEmbeddings(folder, prompts=PROMPTS)
    encoder = SentenceEncoder.from_pretrained(folder, prompts=PROMPTS)
    assert isinstance(embeddings, Embeddings)
    documents = embeddings.embed_documents(TEXTS)
    assert documents == encoder.encode_document(TEXTS).tolist()
    assert {type(number) for vector in documents for number in vector} == {float}
    query = embeddings.embed_query(TEXTS[0])
    assert query == encoder.encode_query(TEXTS[0]).tolist()
    assert query != documents[0]  # each has its prompt
    assert embeddings.embed_documents([]) == []


def test_asynchronous_calls_give_the_same(folder: Path) -> None:
    embeddings = MiniLMEmbeddings(folder, prompts=PROMPTS)

    async def both() -> tuple[list[list[float]], list[float]]:
        documents, query = await asyncio.gather(
            embeddings.aembed_documents(TEXTS), embeddings.aembed_query(TEXTS[0])
        )
        return documents, query

    documents, query = asyncio.run(both())
    assert documents == embeddings.embed_documents(TEXTS)
    assert query == embeddings.embed_query(TEXTS[0])


def test_what_is_no_text_is_refused(folder: Path) -> None:
    embeddings = MiniLMEmbeddings(folder)
    query: Any = ["the dog", "a cat"]
    with pytest.raises(InputTypeError, match=r"text is .*; pass a string"):
        embeddings.embed_query(query)
    texts: Any = ["the dog", None]
    with pytest.raises(InputTypeError, match=r"texts\[1\] is None"):
        embeddings.embed_documents(texts)
    single: Any = "the dog"
    with pytest.raises(InputTypeError, match="texts is a single text; pass a list"):
        embeddings.embed_documents(single)


def test_pickles_are_small(folder: Path) -> None:
    embeddings = MiniLMEmbeddings(folder, truncate_dim=8)
    vectors = embeddings.embed_documents(TEXTS)
    data = pickle.dumps(embeddings)
    assert len(data) < 1000
    assert pickle.loads(data).embed_documents(TEXTS) == vectors


def test_an_encoder_is_taken(tiny_encoder: SentenceEncoder) -> None:
    vectors = MiniLMEmbeddings(tiny_encoder).embed_documents(TEXTS)
    assert vectors == tiny_encoder.encode(TEXTS).tolist()


def test_a_store_is_filled_and_searched(published: Path) -> None:
    store = InMemoryVectorStore(MiniLMEmbeddings(published, device="cpu"))
    store.add_documents([Document(text, id=str(i)) for i, text in enumerate(FACTS)])
    (best, score), *_ = store.similarity_search_with_score(QUESTION, k=2)
    assert best.page_content == FACTS[1]
    encoder = SentenceEncoder.from_pretrained(published, device="cpu")
    cosine = encoder.similarity(encoder.encode(QUESTION), encoder.encode(FACTS[1])).item()
    assert score == pytest.approx(cosine, abs=1e-6)  # it sums in its own order
    found = asyncio.run(store.asimilarity_search(QUESTION, k=1))
    assert found == [best]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:langchain_community.*")
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")  # SWIG
def test_a_faiss_index_survives_a_restart(published: Path, tmp_path: Path) -> None:
    needs("faiss", "langchain")
    community = needs("langchain_community.vectorstores", "langchain")
    embeddings = MiniLMEmbeddings(published, device="cpu")
    community.FAISS.from_texts(FACTS, embeddings).save_local(str(tmp_path))
    store = community.FAISS.load_local(
        str(tmp_path),
        MiniLMEmbeddings(published, device="cpu"),
        allow_dangerous_deserialization=True,  # our own file
    )
    assert [found.page_content for found in store.similarity_search(QUESTION, k=1)] == [FACTS[1]]
    stored = store.index.reconstruct_n(0, len(FACTS)).tolist()
    assert stored == embeddings.embed_documents(FACTS)


def test_llamaindex_wraps_it(published: Path, tmp_path: Path) -> None:
    core = needs("llama_index.core", "langchain")
    wrapper = needs("llama_index.embeddings.langchain", "langchain")
    embeddings = MiniLMEmbeddings(published, device="cpu")
    wrapped = wrapper.LangchainEmbedding(embeddings)
    assert core.embeddings.resolve_embed_model(wrapped) is wrapped
    assert wrapped.get_text_embedding_batch(FACTS) == embeddings.embed_documents(FACTS)
    assert wrapped.get_query_embedding(QUESTION) == embeddings.embed_query(QUESTION)

    documents = [core.Document(text=text) for text in FACTS]
    index = core.VectorStoreIndex.from_documents(documents, embed_model=wrapped)
    index.storage_context.persist(str(tmp_path))
    storage = core.StorageContext.from_defaults(persist_dir=str(tmp_path))
    again = core.load_index_from_storage(storage, embed_model=wrapped)
    for ready in (index, again):
        (best,) = ready.as_retriever(similarity_top_k=1).retrieve(QUESTION)
        assert best.text == FACTS[1]

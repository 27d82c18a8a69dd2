"""Texts -> lists of floats, as LangChain's `Embeddings`: for its vector stores, and for LlamaIndex.

    from langchain_core.vectorstores import InMemoryVectorStore

    store = InMemoryVectorStore.from_texts(texts, MiniLMEmbeddings())
    store.similarity_search("Where is my parcel?")

LlamaIndex takes it with the package llama-index-embeddings-langchain:
`Settings.embed_model = LangchainEmbedding(MiniLMEmbeddings())`. It also wraps
LangChain's embeddings by itself, but not with every version of LangChain.
"""

import os
from typing import Unpack

from minilm.adapters.lazy import AdapterOptions, LazyEncoder
from minilm.encoder import SentenceEncoder
from minilm.errors import MissingPackageError
from minilm.inputs import as_many, check_text
from minilm.pretrained import hub

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as error:
    raise MissingPackageError("minilm.adapters.langchain", "langchain-core", "langchain") from error

__all__ = ["MiniLMEmbeddings"]


class MiniLMEmbeddings(Embeddings):  # type: ignore[misc]
    """Embeds documents and queries, each with the model's prompt for it, if there is one.

    The model is read when it is first used. The `async` forms, `aembed_documents` and
    `aembed_query`, run these in LangChain's threads.

    Attributes:
        lazy: The model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | SentenceEncoder = hub.DEFAULT_MODEL,
        **options: Unpack[AdapterOptions],
    ) -> None:
        """Name a model: see `LazyEncoder` for the arguments."""
        self.lazy = LazyEncoder(model, **options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed the texts of a store.

        Args:
            texts: n of them.

        Returns:
            n lists of 384 floats: the numbers of `SentenceEncoder.encode_document`, exactly.

        Raises:
            InputTypeError: A single text was passed, or something that is not a text.
            MinilmError: As in `SentenceEncoder.from_pretrained` and `encode`.
        """
        vectors: list[list[float]] = self.lazy.encode_document(as_many(texts, "texts")).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Embed a query.

        Returns:
            384 floats: the numbers of `SentenceEncoder.encode_query`, exactly.

        Raises:
            MinilmError: As in `embed_documents`.
        """
        vector: list[float] = self.lazy.encode_query(check_text(text, "text")).tolist()
        return vector

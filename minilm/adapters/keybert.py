"""The model in KeyBERT: `KeyBERT(MiniLMKeywordEmbedder())`.

In: documents and words. Out: their vectors. KeyBERT silently replaces an object of a class that it
doesn't know, BERTopic's embedder too, with a model of its own; it only keeps those of its own class
`BaseEmbedder`.
"""

from minilm.adapters.lazy import Embedder
from minilm.errors import MissingPackageError

try:
    from keybert.backend import BaseEmbedder
except ModuleNotFoundError as error:
    raise MissingPackageError("minilm.adapters.keybert", "keybert", "keybert") from error

__all__ = ["MiniLMKeywordEmbedder"]


class MiniLMKeywordEmbedder(Embedder, BaseEmbedder):  # type: ignore[misc]
    """KeyBERT's `BaseEmbedder`.

    Attributes:
        embedding_model: The model, a `LazyEncoder`.
    """

"""The model in KeyBERT: `KeyBERT(MiniLMKeywordEmbedder())`.

In: documents and words. Out: their vectors. As BERTopic, KeyBERT puts a model of its own, without a
word, in the place of an object that it doesn't know, also of BERTopic's embedder; what is of its
own class `BaseEmbedder` it takes as it is.
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

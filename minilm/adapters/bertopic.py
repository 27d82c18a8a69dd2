"""The model in BERTopic: `BERTopic(embedding_model=MiniLMTopicEmbedder())`.

In: documents and words. Out: their vectors. BERTopic knows other libraries by the names of their
classes, and puts a model of its own, without a word, in the place of an object that it doesn't
know; what is of its own class `BaseEmbedder` it takes as it is.
"""

from minilm.adapters.lazy import Embedder
from minilm.errors import MissingPackageError

try:
    from bertopic.backend import BaseEmbedder
except ModuleNotFoundError as error:
    raise MissingPackageError("minilm.adapters.bertopic", "bertopic", "bertopic") from error

__all__ = ["MiniLMTopicEmbedder"]


class MiniLMTopicEmbedder(Embedder, BaseEmbedder):  # type: ignore[misc]
    """BERTopic's `BaseEmbedder`.

    `topic_model.save(path, serialization="pickle")` keeps it, by the model's name. Other forms of
    `save` keep no model; pass this again: `BERTopic.load(path, embedding_model=...)`.

    Attributes:
        embedding_model: The model, a `LazyEncoder`.
    """

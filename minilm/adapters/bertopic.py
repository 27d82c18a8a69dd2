"""The model in BERTopic: `BERTopic(embedding_model=MiniLMTopicEmbedder())`.

In: documents and words. Out: their vectors. BERTopic silently replaces an object of a class that it
doesn't know with a model of its own; it only keeps those of its own class `BaseEmbedder`.
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

    `topic_model.save(path, serialization="pickle")` stores the model's name. Other forms of `save`
    store no model; pass this again: `BERTopic.load(path, embedding_model=...)`.

    Attributes:
        embedding_model: The model, a `LazyEncoder`.
    """

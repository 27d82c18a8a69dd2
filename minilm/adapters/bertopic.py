"""The model in BERTopic: `BERTopic(embedding_model=MiniLMTopicEmbedder())`.

In: documents and words. Out: their vectors. BERTopic knows other libraries by the names of their
classes, and puts a model of its own, without a word, in the place of an object that it doesn't
know; what is of its own class `BaseEmbedder` it takes as it is.
"""

import os
from collections.abc import Iterable
from typing import Any, Unpack

import numpy as np

from minilm import hub
from minilm.adapters.lazy import AdapterOptions, LazyEncoder, as_many
from minilm.encoder import SentenceEncoder
from minilm.errors import MissingPackageError

try:
    from bertopic.backend import BaseEmbedder
except ModuleNotFoundError as error:
    raise MissingPackageError("minilm.adapters.bertopic", "bertopic", "bertopic") from error

__all__ = ["MiniLMTopicEmbedder"]


class MiniLMTopicEmbedder(BaseEmbedder):  # type: ignore[misc]
    """BERTopic's `BaseEmbedder`.

    `topic_model.save(path, serialization="pickle")` keeps it, by the model's name. Other forms of
    `save` keep no model; pass this again: `BERTopic.load(path, embedding_model=...)`.

    Attributes:
        embedding_model: The model, a `LazyEncoder`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | SentenceEncoder = hub.DEFAULT_MODEL,
        **options: Unpack[AdapterOptions],
    ) -> None:
        """Name a model: see `LazyEncoder` for the arguments."""
        super().__init__(embedding_model=LazyEncoder(model, **options))

    def embed(self, documents: Iterable[str], verbose: bool = False) -> np.ndarray[Any, Any]:
        """Embed documents or words.

        Args:
            documents: The texts.
            verbose: Show a progress bar.

        Returns:
            `[n, 384]`, the bits that `SentenceEncoder.encode` gives.

        Raises:
            InputTypeError: A single text was passed, or something is no text.
            MinilmError: As in `SentenceEncoder.from_pretrained` and `encode`.
        """
        model: LazyEncoder = self.embedding_model
        options = {"show_progress_bar": True} if verbose else {}
        return model.encode(as_many(documents, "documents"), **options)

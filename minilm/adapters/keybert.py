"""The model in KeyBERT: `KeyBERT(MiniLMKeywordEmbedder())`.

In: documents and words. Out: their vectors. As BERTopic, KeyBERT puts a model of its own, without a
word, in the place of an object that it doesn't know, also of BERTopic's embedder; what is of its
own class `BaseEmbedder` it takes as it is.
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
    from keybert.backend import BaseEmbedder
except ModuleNotFoundError as error:
    raise MissingPackageError("minilm.adapters.keybert", "keybert", "keybert") from error

__all__ = ["MiniLMKeywordEmbedder"]


class MiniLMKeywordEmbedder(BaseEmbedder):  # type: ignore[misc]
    """KeyBERT's `BaseEmbedder`.

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

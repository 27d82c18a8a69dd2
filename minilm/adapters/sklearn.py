"""Texts -> features, as a scikit-learn transformer: text classification and clustering in a line.

    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(MiniLMVectorizer(), LogisticRegression())
    classifier.fit(texts, labels).predict(["Where is my parcel?"])

It learns nothing from the texts that it is fitted with, so vectors made once can serve every
candidate of a search, without a leak from one fold into another.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from minilm.adapters.lazy import LazyEncoder
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError, InputTypeError, MissingPackageError
from minilm.inputs import as_many
from minilm.pretrained import hub
from minilm.pretrained.options import to_keep

try:
    from scipy.sparse import issparse
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
except ModuleNotFoundError as error:
    raise MissingPackageError("minilm.adapters.sklearn", "scikit-learn", "sklearn") from error

__all__ = ["MiniLMVectorizer"]

# The parameters that are arguments of `encode`.
_OF_ENCODE = ("prompt", "truncation", "truncate_dim", "normalize_embeddings", "batch_size")


class MiniLMVectorizer(
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """Embeds texts: a column of n texts -> `[n, 384]`.

    The model is loaded when it is first needed, once for an estimator and its clones in a process.
    Pickles have the parameters only: they are small, and other processes load the model themselves;
    a `SentenceEncoder` that was passed is pickled, and copied by `clone`, as it is.

    A grid search embeds the same texts again for every candidate. To avoid that, embed once,
    `MiniLMVectorizer().transform(texts)`, and search over the other steps alone; or, with a model
    by name or folder, use `Pipeline(..., memory=folder)`, which stores the vectors of each fold's
    training texts, and embeds only those that it is scored on each time. That cache knows the model
    by its name: empty it if the files of a folder change.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | SentenceEncoder = hub.DEFAULT_MODEL,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        prompt: str | None = None,
        truncation: str = "warn",
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        batch_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Store the parameters; `fit` and `transform` check them.

        Args:
            model: A folder, a name on the Hub, or an encoder.
            device, dtype: As in `SentenceEncoder.from_pretrained`.
            prompt, truncation, truncate_dim, normalize_embeddings, batch_size: As in
                `SentenceEncoder.encode`.
            options: Other options of `from_pretrained`, such as `{"revision": "main"}`.
        """
        self.model = model
        self.device = device
        self.dtype = dtype
        self.prompt = prompt
        self.truncation = truncation
        self.truncate_dim = truncate_dim
        self.normalize_embeddings = normalize_embeddings
        self.batch_size = batch_size
        self.options = options

    def fit(self, X: Iterable[str], y: Any = None) -> "MiniLMVectorizer":  # noqa: N803
        """Check the parameters and the texts; there is nothing to learn.

        Args:
            X: As in `transform`.
            y: Has no effect.

        Raises:
            InputError, InputTypeError: As in `transform`.
        """
        _texts(X)
        self._encode([])
        return self

    def transform(self, X: Iterable[str]) -> np.ndarray[Any, Any]:  # noqa: N803
        """Embed texts. It need not be fitted first.

        Args:
            X: n texts: a list, an array, a column of a data frame; or a frame or an array with
                that one column.

        Returns:
            `[n, 384]`, in the order given; the same bits as from `SentenceEncoder.encode`.

        Raises:
            InputTypeError: A row is not a text, such as a missing value, or X has several columns.
            InputError: A parameter can't be used.
            MinilmError: As in `SentenceEncoder.from_pretrained` and `encode`.
        """
        return self._encode(_texts(X))

    def _encode(self, texts: list[str]) -> np.ndarray[Any, Any]:
        return self._lazy().encode(texts, **{name: getattr(self, name) for name in _OF_ENCODE})

    # The model: neither a parameter nor learned.
    _shared: LazyEncoder | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Hide tokens and make paths absolute: parameters are shown, logged and pickled."""
        if name == "model" and isinstance(value, str | os.PathLike):
            value = hub.settled(value)
        elif name == "options" and isinstance(value, Mapping):
            kept = to_keep(value)
            value = value if kept == value else kept  # unchanged, it stays the same object
        super().__setattr__(name, value)

    def _lazy(self) -> LazyEncoder:
        """The model that the parameters name now; a new one only if they have changed."""
        others = dict(self.options or {})
        for name in others.keys() & self.get_params(deep=False).keys():
            raise InputError(f"options has {name}; it is a parameter of its own", "options")
        wanted = {"device": self.device, "dtype": self.dtype, **others}
        shared = self._shared
        if shared is None or shared.model != self.model or shared.options != wanted:
            shared = self._shared = LazyEncoder(self.model, **wanted)
        return shared

    def __sklearn_clone__(self) -> "MiniLMVectorizer":
        """Clone, and share the model: a grid search, which clones for each fit, loads it once."""
        clone: MiniLMVectorizer = super().__sklearn_clone__()
        with suppress(InputError):  # a parameter that can't be used is the error of a later fit
            clone._shared = self._lazy()
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_shared"}

    @property
    def _n_features_out(self) -> int:
        """The width, for the names in `get_feature_names_out`: `minilmvectorizer0` and so on."""
        return int(self._encode([]).shape[1])

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.transformer_tags.preserves_dtype = []
        tags.requires_fit = False
        return tags


def _texts(X: Any) -> list[str]:  # noqa: N803
    """The texts of a column, or of a frame or an array that is one column."""
    if issparse(X):  # scikit-learn's own checks want the word "sparse"
        raise InputTypeError(f"X is a sparse {type(X).__name__} of numbers; pass texts", "X")
    shape = getattr(X, "shape", None)
    if isinstance(shape, tuple) and len(shape) == 2 and shape[1] == 1 and hasattr(X, "__array__"):
        X = np.asarray(X, dtype=object)[:, 0]  # noqa: N806
    return as_many(X, "X")

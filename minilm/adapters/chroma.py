"""Texts -> vectors, as Chroma's `EmbeddingFunction`: stored by name with a collection, and rebuilt.

    client = chromadb.PersistentClient("database")
    function = MiniLMEmbeddingFunction()
    collection = client.create_collection("notes", embedding_function=function)
    collection.add(ids=ids, documents=texts)

A later process imports this module, so that Chroma knows the name, and gets the same function with
`client.get_collection("notes")`. Without the import, Chroma refuses to embed for the collection.
"""

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Unpack

import numpy as np
import torch

from minilm.adapters.lazy import SECRETS, AdapterOptions, LazyEncoder
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError, InputTypeError, MissingPackageError
from minilm.inference.encode import prompt_for
from minilm.inputs import as_many
from minilm.pretrained import hub
from minilm.pretrained.fingerprint import Fingerprint, compare

try:
    from chromadb.api.types import Documents, EmbeddingFunction
    from chromadb.utils.embedding_functions import register_embedding_function
except ModuleNotFoundError as error:
    raise MissingPackageError("minilm.adapters.chroma", "chromadb", "chroma") from error

__all__ = ["MiniLMEmbeddingFunction"]


class MiniLMEmbeddingFunction(EmbeddingFunction[Documents]):  # type: ignore[misc]
    """Embeds the documents and the queries of a collection.

    The model's name or folder, the options, and the model's fingerprint are stored with the
    collection. So a collection that is opened again can't be searched with another model, even one
    of the same name. Open it without passing a function: Chroma would take any function of this
    class, whatever the collection was made with.

    Attributes:
        lazy: The model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = hub.DEFAULT_MODEL,
        *,
        fingerprint: Mapping[str, Any] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        """Load a model.

        It is loaded now, unless it has a fingerprint: when Chroma asks what to store, while it
        makes a collection, it takes an error for "nothing to store".

        Args:
            model: A folder, or a name on the Hub; an encoder can't be stored with a collection.
            fingerprint: What the model has to be, as from `Fingerprint.to_dict`; the model is
                loaded, and compared with it, when first used.
            options: See `LazyEncoder`. An access token is not stored with the collection.

        Raises:
            InputTypeError: `model` is not a name; or as in `LazyEncoder`.
            MinilmError: As in `SentenceEncoder.from_pretrained`.
        """
        if isinstance(model, SentenceEncoder):
            raise InputTypeError(
                "model is a SentenceEncoder, which can't be kept with a collection; pass its "
                "folder (see save_pretrained) or its name",
                "model",
            )
        self.lazy = LazyEncoder(model, **options)
        self._fingerprint = None if fingerprint is None else Fingerprint.from_dict(fingerprint)
        self._is_checked = fingerprint is None
        made = self._fingerprint or self._fingerprint_now()
        kept = {name: value for name, value in self.lazy.options.items() if name not in SECRETS}
        place: Any = self.lazy.model  # a name, or a path from the root
        self._config = _as_json({"model": place, "fingerprint": made.to_dict(), **kept})

    def __call__(self, input: Documents) -> list[np.ndarray[Any, Any]]:  # noqa: A002
        """Embed documents.

        Args:
            input: n texts; Chroma compares the name of this argument.

        Returns:
            n arrays `[384]` of float32: the numbers of `SentenceEncoder.encode_document`.

        Raises:
            InputError: The model doesn't have the fingerprint that it should have.
            InputTypeError: A single text was passed, or something that is not a text.
            MinilmError: As in `SentenceEncoder.from_pretrained` and `encode`.
        """
        vectors = self._checked().encode_document(as_many(input, "input"))
        return list(vectors.astype(np.float32, copy=False))

    def embed_query(self, input: Documents) -> list[np.ndarray[Any, Any]]:  # noqa: A002
        """Embed queries: as `__call__`, with `SentenceEncoder.encode_query`."""
        vectors = self._checked().encode_query(as_many(input, "input"))
        return list(vectors.astype(np.float32, copy=False))

    def _checked(self) -> LazyEncoder:
        if not self._is_checked and self._fingerprint is not None:
            _check_same(self._fingerprint, self._fingerprint_now())
            self._is_checked = True
        return self.lazy

    def _fingerprint_now(self) -> Fingerprint:
        """The record of the vectors of documents, with the options of each call."""
        options = self.lazy.options
        if options.get("prompt") is None and options.get("prompt_name") is None:
            name = prompt_for("document", self.lazy.encoder.prompts)
            return self.lazy.fingerprint(prompt_name=name)
        return self.lazy.fingerprint()

    # --- what Chroma stores, and how it rebuilds the function

    @staticmethod
    def name() -> str:
        """Return the name by which Chroma finds this class."""
        return "minilm"

    def default_space(self) -> str:
        """Return the distance of a collection that names none."""
        return "cosine"

    def supported_spaces(self) -> list[str]:
        """Return the distances that these vectors can be compared by."""
        return ["cosine", "l2", "ip"]

    def get_config(self) -> dict[str, Any]:
        """Return what is stored with a collection: the model, its fingerprint, the options."""
        return dict(self._config)

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> "MiniLMEmbeddingFunction":
        """Rebuild a function from its `get_config`; the model is loaded when first used.

        Raises:
            InputError, InputTypeError: The config is not one from `get_config`.
        """
        return _build(json.dumps(config, sort_keys=True))

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Check a config as `build_from_config` does, with the same errors."""
        MiniLMEmbeddingFunction.build_from_config(config)

    def validate_config_update(
        self, old_config: dict[str, Any], new_config: dict[str, Any]
    ) -> None:
        """Allow another folder, device or batch size, and refuse another model.

        Raises:
            InputError: Vectors of the new model can't be compared with those in the collection.
        """
        old, new = (Fingerprint.from_dict(c["fingerprint"]) for c in (old_config, new_config))
        _check_same(old, new)


register_embedding_function(MiniLMEmbeddingFunction)  # early versions return None as decorators


@lru_cache(maxsize=8)
def _build(config: str) -> MiniLMEmbeddingFunction:
    """Build a function once: Chroma asks for each query again, and the model should stay loaded."""
    values = json.loads(config)
    if not isinstance(values, dict) or not {"model", "fingerprint"} <= values.keys():
        raise InputError(
            f"config is {config}; it needs the model and its fingerprint, as get_config gives them",
            "config",
        )
    return MiniLMEmbeddingFunction(**values)


def _check_same(wanted: Fingerprint, found: Fingerprint) -> None:
    comparison = compare(wanted, found)
    if not comparison.is_compatible:
        raise InputError(
            f"this is not the model that the collection was made with: {comparison}; bring that "
            "one back, or make a new collection and add the documents again",
            "model",
        )


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """The options for JSON: paths, devices and dtypes by their names."""

    def by_name(value: Any) -> str:
        if isinstance(value, os.PathLike):
            return str(os.fspath(value))
        if isinstance(value, torch.dtype | torch.device):
            return str(value).removeprefix("torch.")
        raise InputTypeError(
            f"an option has {value!r} in it, which can't be kept with a collection as JSON",
            "options",
        )

    kept: dict[str, Any] = json.loads(json.dumps(values, default=by_name))
    return kept

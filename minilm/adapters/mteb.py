"""The model in MTEB, the benchmark of embeddings: `mteb.evaluate(MiniLMEncoder(), tasks)`.

In: batches of texts from MTEB's tasks. Out: vectors, and `mteb_model_meta`, MTEB's record of the
model.

MTEB stores every result by the model's name, its revision and its "experiment", and doesn't compute
it again. Models without a record are stored under one name, so that the second gets the scores of
the first. Here the name and revision are those of the weights, which are what a score is about; the
experiment has the fingerprint of what computes with them, so that no result of another
implementation, or of this one with other settings, is taken for ours.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch

from minilm.adapters.lazy import LazyEncoder
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError, MissingPackageError
from minilm.pretrained import hub
from minilm.pretrained.fingerprint import Fingerprint
from minilm.version import __version__

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import get_prompt_name
    from mteb.models.model_implementations import MODEL_REGISTRY
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ModuleNotFoundError as error:
    raise MissingPackageError("minilm.adapters.mteb", "mteb", "mteb") from error

__all__ = ["MiniLMEncoder"]

# The options that change a vector or a score: those for loading, and those of a call.
_LOADING = ("dtype", "prompts", "default_prompt_name", "similarity_fn_name")
_CALL = ("prompt", "truncation", "truncate_dim", "normalize_embeddings")


class MiniLMEncoder:
    """MTEB's `EncoderProtocol`.

    Example:
        >>> results = mteb.evaluate(MiniLMEncoder(), mteb.get_tasks(tasks=["STS17"]))
    """

    def __init__(
        self,
        model_name: str | os.PathLike[str] | SentenceEncoder = hub.DEFAULT_MODEL,
        revision: str | None = None,
        *,
        device: str | None = None,
        fingerprint: str | None = None,
        **options: Any,
    ) -> None:
        """Name a model. It is loaded when it is first used.

        Args:
            model_name: A folder, a name on the Hub, or an encoder.
            revision, device: As in `SentenceEncoder.from_pretrained`.
            fingerprint: What the model must be: from `experiment_kwargs` of `mteb_model_meta`, with
                which MTEB loads the same model again.
            options: The others of `LazyEncoder`, such as `dtype` and `prompts`.

        Raises:
            InputTypeError, InputError: As in `LazyEncoder`; or the fingerprint differs.
        """
        self._model = LazyEncoder(model_name, revision=revision, device=device, **options)
        self._meta: Any = None
        if fingerprint is not None and fingerprint != (ours := self._identify()):
            raise InputError(
                f"fingerprint is {fingerprint!r}, and this model has {ours!r}: the weights, the "
                "options or the version of minilm are others; leave it out to take this model",
                "fingerprint",
            )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray[Any, Any]:
        """Embed the texts of a task.

        Args:
            inputs: Batches, each a dict with a list of str under "text".
            task_metadata: The task, by which MTEB chooses one of the model's `prompts`: that of the
                task, of its kind, of queries or documents. A `prompt` or `prompt_name` passed to
                this adapter is used for every task instead.
            hf_split, hf_subset: Have no effect.
            prompt_type: Whether the texts are queries or documents, or None for neither.
            options: Of `SentenceEncoder.encode`; MTEB passes `batch_size`, `show_progress_bar` and
                `precision`.

        Returns:
            `[n, 384]`, the numbers of `SentenceEncoder.encode`; float16 is made float32, since MTEB
            would compute its scores in it.

        Raises:
            MinilmError: As in `SentenceEncoder.encode`.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        model = self._model
        if not {"prompt", "prompt_name"} & model.options.keys():
            prompts = model.encoder.prompts
            options["prompt_name"] = get_prompt_name(prompts, task_metadata, prompt_type)
        encode = model.encode
        if prompt_type is not None:
            queries = PromptType(prompt_type) == PromptType.query
            encode = model.encode_query if queries else model.encode_document
        vectors = encode(texts, **options)
        return vectors.astype(np.float32) if vectors.dtype == np.float16 else vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """`SentenceEncoder.similarity`: `[n, 384] x [m, 384] -> [n, m]`."""
        return self._model.encoder.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """`SentenceEncoder.similarity_pairwise`: `[n, 384] x [n, 384] -> [n]`."""
        return self._model.encoder.similarity_pairwise(embeddings1, embeddings2)

    @property
    def mteb_model_meta(self) -> Any:
        """MTEB's record of this model as it is now, a `ModelMeta`. MTEB may set it.

        The name and the revision are those of the Hub if the weights are from there; else the name
        is `local/...`, and the revision the SHA-256 of the weights. What MTEB knows of a name, such
        as its licence and training data, is taken from MTEB.
        """
        return self._make_meta() if self._meta is None else self._meta

    @mteb_model_meta.setter
    def mteb_model_meta(self, meta: Any) -> None:
        self._meta = meta

    def _make_meta(self) -> Any:
        encoder, record = self._model.encoder, self._record()
        weights = record.weights_sha256.removeprefix("tensors:")
        revision = None if encoder.source is None else encoder.source.revision
        published = revision is not None and weights == record.weights_sha256  # not changed since
        known = MODEL_REGISTRY.get(record.model) if published else None
        given = {name: self._model.options.get(name) for name in (*_LOADING, *_CALL, "prompt_name")}
        parameters = list(encoder.parameters())
        ours = {
            "loader": type(self) if published else None,
            "loader_kwargs": {name: _plain(value) for name, value in given.items() if value},
            "name": record.model if published else f"local/{record.model.rpartition('/')[2]}",
            "revision": revision if published else weights,
            "adapted_from": None if published or revision is None else record.model,
            "n_parameters": sum(parameter.numel() for parameter in parameters),
            "n_embedding_parameters": encoder.bert.embeddings.word_embeddings.weight.numel(),
            "memory_usage_mb": round(sum(parameter.nbytes for parameter in parameters) / 2**20),
            "max_tokens": encoder.max_seq_length,
            "embed_dim": record.dimension,
            "similarity_fn_name": ScoringFunction(encoder.similarity_fn_name),
            "use_instructions": any(encoder.prompts.values()) or bool(record.prompt),
            "framework": ["PyTorch", "safetensors"],
            "experiment_kwargs": {"fingerprint": self._identify(record)},
        }
        return (known or ModelMeta.create_empty()).model_copy(update=ours, deep=True)

    def _record(self) -> Fingerprint:
        """The record of the adapter's vectors, except for the prompts of tasks."""
        return self._model.fingerprint()

    def _identify(self, record: Fingerprint | None = None) -> str:
        """A hash of all that decides a score, short enough for the name of a folder."""
        encoder = self._model.encoder
        values = [
            (record or self._record()).to_dict(),
            encoder.prompts,
            self._model.options.get("prompt_name"),
            encoder.similarity_fn_name,
        ]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return f"minilm-{__version__}-{digest[:12]}"


def _plain(value: Any) -> Any:
    """An option as JSON can hold it; MTEB writes it beside its results."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Enum):
        return value.value
    return dict(value) if isinstance(value, Mapping) else value

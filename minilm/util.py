"""The names of `sentence_transformers.util` that make sense for this model, under one roof.

For `from minilm.util import ...` in place of `from sentence_transformers.util import ...`. The work
is done elsewhere: `similarity.py` compares, `tasks/` searches and groups, `quantize.py` makes
vectors smaller.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from minilm.errors import InputTypeError
from minilm.inputs import as_device, check_positive_int, is_singular_input
from minilm.quantize import dequantize, model_ranges, quantize_embeddings
from minilm.similarity import (
    SimilarityFunction,
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
    pairwise_cos_sim,
    pairwise_dot_score,
    pairwise_euclidean_sim,
    pairwise_manhattan_sim,
    unit_vectors,
)
from minilm.tasks.communities import community_detection
from minilm.tasks.paraphrase import paraphrase_mining_embeddings
from minilm.tasks.search import ScoreFunction, semantic_search
from minilm.vectors import as_numbers

__all__ = [
    "SimilarityFunction", "batch_to_device", "community_detection", "cos_sim", "dequantize",
    "dot_score", "euclidean_sim", "is_singular_input", "manhattan_sim", "model_ranges",
    "normalize_embeddings", "pairwise_cos_sim", "pairwise_dot_score", "pairwise_euclidean_sim",
    "pairwise_manhattan_sim", "paraphrase_mining", "paraphrase_mining_embeddings",
    "pytorch_cos_sim", "quantize_embeddings", "semantic_search", "truncate_embeddings",
]  # fmt: skip

_Array = np.ndarray[Any, Any]
_Vectors = TypeVar("_Vectors", Tensor, _Array)

pytorch_cos_sim = cos_sim  # an old name for it


def paraphrase_mining(
    model: Any,
    sentences: Iterable[str],
    show_progress_bar: bool = False,
    batch_size: int = 32,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100000,
    max_pairs: int = 500000,
    top_k: int = 100,
    score_function: ScoreFunction = cos_sim,
    truncate_dim: int | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
) -> list[list[float | int]]:
    """Embed texts and find the pairs that are most similar.

    Args:
        model: A `SentenceEncoder`, or anything with such an `encode`.
        sentences: The texts.
        show_progress_bar, batch_size: As in `encode`.
        query_chunk_size, corpus_chunk_size, max_pairs, top_k, score_function: As in
            `paraphrase_mining_embeddings`.
        truncate_dim, prompt_name, prompt: Passed to `encode` if they are given.

    Returns:
        `[score, i, j]` with i < j, the most similar first.

    Raises:
        InputError, InputTypeError: As in `encode` and `paraphrase_mining_embeddings`.
    """
    optional = {"truncate_dim": truncate_dim, "prompt_name": prompt_name, "prompt": prompt}
    embeddings = model.encode(
        sentences,
        show_progress_bar=show_progress_bar,
        batch_size=batch_size,
        convert_to_tensor=True,
        **{name: value for name, value in optional.items() if value is not None},
    )
    return paraphrase_mining_embeddings(
        embeddings,
        query_chunk_size=query_chunk_size,
        corpus_chunk_size=corpus_chunk_size,
        max_pairs=max_pairs,
        top_k=top_k,
        score_function=score_function,
    )


def normalize_embeddings(embeddings: Tensor | _Array) -> Tensor:
    """Scale each vector to length 1, `[..., d] -> [..., d]`; a zero vector stays zero."""
    tensor = as_numbers(embeddings, "embeddings")
    return unit_vectors(tensor if tensor.is_floating_point() else tensor.float())


def truncate_embeddings(embeddings: _Vectors, truncate_dim: int | None) -> _Vectors:
    """Keep the first `truncate_dim` numbers of each vector, `[..., d] -> [..., truncate_dim]`.

    The result is a view, and no longer of length 1.

    Args:
        embeddings: A tensor or an array.
        truncate_dim: How many to keep. None, or more than there are, keeps all.

    Raises:
        InputError: `truncate_dim` is 0 or negative.
        InputTypeError: It is not an integer, or the embeddings are neither a tensor nor an array.
    """
    if not isinstance(embeddings, Tensor | np.ndarray):
        raise InputTypeError(
            f"embeddings is {type(embeddings).__name__}; pass a tensor or an array", "embeddings"
        )
    if truncate_dim is None:
        return embeddings
    return embeddings[..., : check_positive_int(truncate_dim, "truncate_dim")]


def batch_to_device(
    batch: dict[str, Any], target_device: str | torch.device | None
) -> dict[str, Any]:
    """Move the tensors among a dict's values to a device; in place, and the dict is returned.

    A device that is unknown or absent is an `InputError` or an `InputTypeError`.
    """
    device = as_device(target_device)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            batch[name] = value.to(device)
    return batch

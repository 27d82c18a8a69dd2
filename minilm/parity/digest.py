"""One number for the whole model: SHA-256 of what it makes of the golden texts.

In: an encoder. Out: a hash for each stage, and whether it is the published model's, which is pinned
in `digest.json`. Two right programs that compute in float64 differ by some 1e-16, and a step of
float32 is millions of times as wide: so what each rounds once, to float32, has the same bits, and
one hash of them is equal if and only if tokenizer, mask, layers, pooling and all are this model's.

Numbers that lie at a boundary between two float32 numbers would be rounded by chance. `choose`
leaves out the texts that have any, and `scripts/make/digest.py` pins the rest.

The texts are computed in batches of `BATCH`, in their order, padded to the longest: so that also
mistakes about padding change the hash.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm.encoder import SentenceEncoder
from minilm.errors import InputError
from minilm.inference.eval_mode import eval_mode
from minilm.parity.golden_texts import TEXTS
from minilm.report import aligned

__all__ = [
    "BATCH",
    "DISTANCE",
    "STEPS",
    "DigestReport",
    "choose",
    "digest",
    "hashes",
    "margins",
    "pinned",
    "stages_of",
]

BATCH = 8  # texts
# No number lies nearer to a boundary than this, in steps of float32; nor than that, over the size
# that the number has elsewhere: by a twentieth of it two right results in float64 were apart at the
# most, over all numbers of all stages (AVX-512, AVX2 and SSE4, in one thread and two).
STEPS, DISTANCE = 1e-5, 2e-13
SHORT = 16  # tokens: of longer texts none has its layers in the hashes
_VECTORS = ("pooled", "embedding")

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DigestReport:
    """The hashes of a model.

    Attributes:
        sha256: By stage, in the order of the computation. The last, "embedding", is the one number.
        expected: Those of the published model.
    """

    sha256: dict[str, str]
    expected: dict[str, str]

    @property
    def is_equal(self) -> bool:
        """Whether this is the published model."""
        return self.sha256 == self.expected

    @property
    def first(self) -> str | None:
        """The first stage that differs."""
        names = (name for name in self.expected if self.sha256.get(name) != self.expected[name])
        return next(names, None)

    def table(self) -> str:
        """The report as text: the one number, and then the stages."""
        rows = [
            (name, value, "" if value == self.expected.get(name) else "differs")
            for name, value in self.sha256.items()
        ]
        said = "the published model, in every stage"
        if not self.is_equal:
            said = f"not the published model: the first stage that differs is {self.first}"
        return "\n".join([self.sha256["embedding"], "", *aligned(rows), "", said])

    def to_dict(self) -> dict[str, Any]:
        """The report as an object for JSON."""
        return {"sha256": self.sha256["embedding"], "is_equal": self.is_equal,
                "first": self.first, "stages": self.sha256}  # fmt: skip


def pinned() -> dict[str, Any]:
    """What `scripts/make/digest.py` wrote: `sha256` by stage, `texts`, `tokens` by
    text, and `margin`.
    """
    data = resources.files("minilm.parity").joinpath("digest.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(data)
    return found


def digest(encoder: SentenceEncoder) -> DigestReport:
    """Hash what a model makes of the golden texts, stage by stage.

    Args:
        encoder: The model, in float32 or float64. It is computed in float64.

    Raises:
        InputError: The encoder computes in 16 bits.
    """
    chosen = pinned()
    return DigestReport(hashes(stages_of(encoder, chosen["texts"]), chosen), chosen["sha256"])


def hashes(
    computed: Iterable[tuple[int, dict[str, _Array]]], chosen: dict[str, Any]
) -> dict[str, str]:
    """Hash stages as `stages_of` gives them, of the chosen texts and tokens, row by row: ids as
    int32, all else as float32, little-endian.
    """
    found: dict[str, Any] = {}
    for number, of_text in computed:
        for name, values in of_text.items():
            rows = values.astype("<i4" if name == "input_ids" else "<f4")
            if rows.ndim == 2:
                tokens = chosen["tokens"].get(str(number), [])
                rows = rows[[token for token in tokens if token < len(rows)]]
            found.setdefault(name, hashlib.sha256()).update(rows.tobytes())
    return {name: each.hexdigest() for name, each in found.items()}


def stages_of(
    encoder: SentenceEncoder, numbers: Sequence[int]
) -> Iterator[tuple[int, dict[str, _Array]]]:
    """Compute the stages of golden texts in float64, batch by batch.

    Args:
        encoder: As in `digest`.
        numbers: Which of the golden texts.

    Yields:
        For each, its number and by name `input_ids` int64 `[tokens]`, float64 `[tokens, 384]` of
        the embeddings and of each layer, and `pooled` and `embedding` `[384]`.

    Raises:
        InputError: As in `digest`.
    """
    if encoder.dtype not in (torch.float32, torch.float64):
        raise InputError(f"encoder computes in {encoder.dtype}; load it in float32", "encoder")
    if any(part.dtype != torch.float64 for part in encoder.parameters()):
        encoder = copy.deepcopy(encoder).double()
    kept: dict[str, Tensor] = {}
    parts: dict[str, Any] = {"embeddings.layer_norm.output": encoder.bert.embeddings.layer_norm} | {
        f"layers.{number}.feed_forward_layer_norm.output": layer.feed_forward_layer_norm
        for number, layer in enumerate(encoder.bert.layers)
    }
    handles = [
        part.register_forward_hook(lambda _, __, output, name=name: kept.update({name: output}))
        for name, part in parts.items()
    ]
    tokenizer, limit = encoder.get_tokenizer(), encoder.max_seq_length
    try:
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            ids = tokenizer([TEXTS[number].text for number in batch], limit).input_ids
            features = tokenizer.pad(ids, encoder.device)
            with torch.no_grad(), eval_mode(encoder):
                output = encoder(features)
                kept["embedding"] = output["sentence_embedding"]
                kept["pooled"] = encoder.pooling(
                    output["token_embeddings"], features["attention_mask"]
                )
            for place, number in enumerate(batch):
                tokens = len(ids[place])
                of_text = {"input_ids": np.array(ids[place])}
                for name in (*parts, *_VECTORS):
                    values = kept[name][place].cpu().numpy()
                    of_text[name] = values if name in _VECTORS else values[:tokens]
                yield number, of_text
    finally:
        for handle in handles:
            handle.remove()


def margins(values: _Array, scale: _Array) -> tuple[_Array, _Array]:
    """How near the nearest number of each float64 vector `[..., d]` is to a boundary, which is
    halfway between two numbers of float32: in steps between such numbers, 0.5 at most; and as a
    distance over `scale`, the usual size of each of its numbers `[d]`. Both `[...]`.
    """
    rounded = values.astype(np.float32)
    above, below = (np.nextafter(rounded, np.float32(to)) for to in (np.inf, -np.inf))
    exact, above, below = (each.astype(np.float64) for each in (rounded, above, below))
    up, down = (exact + above) / 2 - values, values - (exact + below) / 2
    steps = np.minimum(up / (above - exact), down / (exact - below))
    return steps.min(-1), (np.minimum(up, down) / scale).min(-1)


def choose(encoder: SentenceEncoder) -> dict[str, Any]:
    """Choose the texts and tokens, and hash them: what is pinned, as `pinned` returns it.

    The rule: of the golden texts, in their order, all whose pooled vector and embedding have no
    number nearer to a boundary than `STEPS` and `DISTANCE`. Of these, where they have at most
    `SHORT` tokens, all tokens whose vectors have no such number, neither in the embeddings nor
    behind any layer.
    """
    found = dict(stages_of(encoder, range(len(TEXTS))))
    names = [name for name in found[0] if name != "input_ids"]
    nearest: dict[int, dict[str, tuple[_Array, _Array]]] = {number: {} for number in found}
    for name in names:
        # Two right results differ in proportion to the size that a number has in other texts: few
        # are 0 by chance, and two of an embedding are 1e-32 in all texts.
        every = np.concatenate([np.atleast_2d(of_text[name]) for of_text in found.values()])
        scale = np.abs(every).max(0)
        for number, of_text in found.items():
            nearest[number][name] = margins(of_text[name], scale)
    texts: list[int] = []
    tokens: dict[str, list[int]] = {}
    margin: list[list[float]] = [[], []]
    for number, stages in nearest.items():
        vectors = [stages.pop(name) for name in _VECTORS]
        rows = [np.stack(each).min(0) for each in zip(*stages.values(), strict=True)]
        of_vectors = [np.stack(each).min(0) for each in zip(*vectors, strict=True)]
        if of_vectors[0] < STEPS or of_vectors[1] < DISTANCE:
            continue
        texts.append(number)
        good = (rows[0] >= STEPS) & (rows[1] >= DISTANCE) & (len(rows[0]) <= SHORT)
        if good.any():
            tokens[str(number)] = good.nonzero()[0].tolist()
        for kept, of_row, of_vector in zip(margin, rows, of_vectors, strict=True):
            kept += [*of_row[good].tolist(), float(of_vector)]
    smallest = {"steps": min(margin[0]), "distance": min(margin[1])}
    chosen = {"texts": texts, "tokens": tokens, "margin": smallest}
    return {"sha256": hashes(stages_of(encoder, texts), chosen), **chosen}

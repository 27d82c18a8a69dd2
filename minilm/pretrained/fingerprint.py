"""Which model made these vectors? A record that travels with them, and a check by the vectors.

In: an encoder. Out: a `Fingerprint`, the same wherever and whenever that model is loaded, to be
kept beside its vectors. Later: `compare` tells two records apart, and `parity/check.py` embeds some
of the texts again and says whether the stored vectors can be searched with this encoder.

A record must not lie. So the file's SHA-256 is given only if the weights in memory are those of the
file, bit by bit; after training, or any other change, a digest of the tensors takes its place. That
takes much longer than a query, so the result is cached. A weight can be written to without a trace
(`weight.data`, an array that shares its memory), so the cache is valid while a quick checksum over
all bits of the weights stays the same.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from minilm.disk import parse_json
from minilm.errors import InputError, WeightsError
from minilm.inference.compute import Plan
from minilm.pipeline import Pipeline
from minilm.pooling import ClsPooling
from minilm.pretrained import hub
from minilm.pretrained.checkpoint import read_checkpoint
from minilm.pretrained.save import foreign_parts, read_source
from minilm.source import ModelFiles
from minilm.tokenizer import WordPieceTokenizer
from minilm.version import __version__

__all__ = [
    "FORMAT_VERSION", "Comparison", "Fingerprint", "Verdict", "compare", "computed_in",
    "fingerprint", "fingerprint_of",
]  # fmt: skip

Verdict = Literal["same", "rounding", "limit", "model"]

FORMAT_VERSION = 1

# Fields that make another model, and fields that only move its numbers a little.
_IDENTITY = (
    "tokenizer_sha256", "architecture", "pooling", "normalize", "dimension", "prompt", "truncation",
    "precision",
)  # fmt: skip
_ROUNDING = ("tensors_sha256", "dtype", "package_version", "format_version")


@dataclass(frozen=True)
class Fingerprint:
    """The record of a model.

    Attributes:
        model: Its name on the Hub, or of its folder, or "modules". Has no part in comparisons.
        weights_sha256: SHA-256 of the weights file; "tensors:" and `tensors_sha256` if the weights
            in memory are not, or can't be proven to be, those of a file.
        tensors_sha256: SHA-256 over the tensors in memory: the same for a saved copy.
        tokenizer_sha256: SHA-256 over all that the tokenizer does; "none" without one.
        architecture: The sizes that can't be told from the weights.
        pooling: "mean" or "cls".
        normalize: Whether vectors have length 1.
        max_seq_length: The longest input in tokens.
        dimension: Numbers in a vector, after `truncate_dim`.
        dtype: What the products are computed in; "reproducible" if the model is that, so that
            machines, numbers of threads and versions of torch make no difference.
        prompt: What is put in front of every text.
        truncation: "cut", or "chunk" where long texts are read in windows.
        precision: What the numbers are rounded to: "float32" if they are not.
        package_version: Of minilm.
        format_version: Of this record.
    """

    model: str
    weights_sha256: str
    tensors_sha256: str
    tokenizer_sha256: str
    architecture: str
    pooling: str
    normalize: bool
    max_seq_length: int
    dimension: int
    dtype: str
    prompt: str = ""
    truncation: str = "cut"
    precision: str = "float32"
    package_version: str = __version__
    format_version: int = FORMAT_VERSION
    # In a record that `fingerprint` made: the model's own width, and whether its whole vectors have
    # length 1. `dimension` is then only the default of a call, which may ask for another.
    _whole: tuple[int, bool] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as an object for JSON, its keys always in the same order."""
        return {name: value for name, value in asdict(self).items() if name != "_whole"}

    def to_json(self) -> str:
        """Return the record as JSON, in one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Fingerprint":
        """Read what `to_dict` gave. Keys that a later version may add are ignored.

        Raises:
            InputError: A field is missing or of another type; all are listed.
        """
        known = {each.name: each.type for each in fields(cls) if each.name != "_whole"}
        problems = []
        for name, kind in known.items():
            if not isinstance(values, Mapping):
                problems = [f"is a {type(values).__name__}"]
            elif name not in values:
                problems.append(f"{name} is missing")
            elif type(values[name]) is not kind:
                problems.append(
                    f"{name} is {values[name]!r}, not {getattr(kind, '__name__', kind)}"
                )
        if problems:
            raise InputError(f"not a fingerprint: {'; '.join(problems)}", "values")
        return cls(**{name: values[name] for name in known})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Fingerprint":
        """Read what `to_json` gave.

        Raises:
            InputError: It is not valid JSON, or as in `from_dict`.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise InputError(f"not a fingerprint: is not valid JSON: {error}", "text") from error
        return cls.from_dict(values)

    def for_call(
        self,
        *,
        prompt: str | None = None,
        truncation: str = "warn",
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        precision: str | None = "float32",
    ) -> "Fingerprint":
        """Return the record of vectors that `encode` makes with these arguments.

        Args:
            prompt, truncation, truncate_dim, normalize_embeddings, precision: As in `encode`; by
                default as the model has it. `SentenceEncoder.fingerprint` takes all arguments. A
                record that was read from a file knows no width but its own.
        """
        width, normalizes = self._whole or (self.dimension, self.normalize)
        dimension = self.dimension if truncate_dim is None else min(truncate_dim, width)
        if dimension == self.dimension:
            normalizes = self.normalize
        elif dimension != width:
            normalizes = False  # what is left of a vector of length 1 is shorter
        return replace(
            self,
            prompt=self.prompt if prompt is None else prompt,
            truncation="chunk" if truncation == "chunk" else "cut",
            dimension=dimension,
            normalize=bool(normalize_embeddings) or normalizes,
            precision=precision or "float32",
        )

    def __str__(self) -> str:
        weights = self.weights_sha256.removeprefix("tensors:")
        kind = "file" if weights == self.weights_sha256 else "tensors"
        return (
            f"{self.model} (weights {weights[:12]} of the {kind}, "
            f"tokenizer {self.tokenizer_sha256[:12]}, {self.max_seq_length} tokens, "
            f"{self.pooling}{', normalized' if self.normalize else ''}, {self.dimension} x "
            f"{self.dtype}{f', prompt {self.prompt!r}' if self.prompt else ''}"
            f"{', in windows' if self.truncation == 'chunk' else ''}"
            f"{'' if self.precision == 'float32' else f', as {self.precision}'}, "
            f"minilm {self.package_version})"
        )


def fingerprint(encoder: Pipeline) -> Fingerprint:
    """Record which model an encoder is now.

    The same model gives the same record in every process and on every machine. `fingerprint_of`
    also records what a call of `encode` was given. Hooks are not seen.

    Raises:
        InputError: It has modules that are not ours, about which nothing is known.
    """
    problems = foreign_parts(encoder)
    if problems:
        raise InputError(
            f"{'; '.join(problems)}: what it computes is unknown, so that it has no fingerprint",
            "encoder",
        )
    config = encoder.bert.config
    normalizes = not isinstance(encoder.normalize, nn.Identity)
    weights = encoder.bert.state_dict()
    tensors, from_file = _cached(
        encoder,
        (_checksum(weights), _file_states(encoder.source)),
        lambda: (_digest_tensors(weights), _file_sha256(encoder)),
    )
    default, width = encoder.default_prompt_name, config.hidden_size
    dimension = encoder.get_sentence_embedding_dimension()
    return Fingerprint(
        # A folder's name can have bytes that are not text, which no JSON file can hold.
        model=_model_name(encoder).encode("utf-8", "backslashreplace").decode(),
        weights_sha256=from_file or f"tensors:{tensors}",
        tensors_sha256=tensors,
        tokenizer_sha256=_digest_tokenizer(encoder.tokenizer),
        architecture=(
            f"bert, {config.num_hidden_layers} layers of {config.num_attention_heads} heads, "
            f"eps {config.layer_norm_eps!r}"
        ),
        pooling="cls" if isinstance(encoder.pooling, ClsPooling) else "mean",
        normalize=normalizes and dimension == width,
        max_seq_length=encoder.max_seq_length,
        dimension=dimension,
        dtype=computed_in(encoder),
        prompt="" if default is None else encoder.prompts[default],
        _whole=(width, normalizes),
    )


def fingerprint_of(encoder: Pipeline, plan: Plan) -> Fingerprint:
    """Record the model and the plan of a call of `encode`. Errors as in `fingerprint`."""
    record = fingerprint(encoder).for_call(
        prompt=plan.prompt,
        truncation=plan.truncation,
        truncate_dim=plan.width,
        normalize_embeddings=plan.normalize,
        precision=plan.precision,
    )
    return replace(record, max_seq_length=plan.max_seq_length)


def computed_in(encoder: Pipeline) -> str:
    """What `encode` computes in, as a record has it: a dtype, or "reproducible"."""
    return "reproducible" if encoder.reproducible else str(encoder.dtype).removeprefix("torch.")


def _model_name(encoder: Pipeline) -> str:
    source = encoder.source
    if source is None:
        return "modules"
    if source.pinned:
        return hub.DEFAULT_MODEL
    if source.revision is not None:
        return source.name
    return source.folder.name  # the rest of a path differs from machine to machine


_Result = TypeVar("_Result")

# What was computed for an encoder or a tokenizer, and the state that it was in then.
_computed: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()


def _cached(owner: Any, state: Any, compute: Callable[[], _Result]) -> _Result:
    """The result of `compute`, which is called again only if the owner's `state` has changed."""
    before, result = _computed.get(owner, (None, None))
    if before != state:
        result = compute()
        _computed[owner] = state, result
    found: _Result = result
    return found


def _checksum(state: Mapping[str, Tensor]) -> bytes:
    """A checksum that differs if any bit of a tensor does.

    It surely sees one changed number in a row; several escape it with a probability of 2 ** -31.
    Each row is added up as integers of at most 32 bits times fixed random factors below 2 ** 31:
    no change of one of them is a multiple of 2 ** 64, the modulus, and of several changes only one
    value of one factor can undo the others. That takes a third of the time of SHA-256.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        words = _words(state[name])
        words = words.view(np.int32) if words.itemsize == 8 else words
        digest.update(f"{name} {state[name].dtype} {list(state[name].shape)}\n".encode())
        digest.update(np.einsum("...i,i->...", words, _factors(words.shape[-1])).tobytes())
    return digest.digest()


def _file_states(source: ModelFiles | None) -> dict[Path, Any]:
    """For each file of a model the hash of what was read, and what the system says of it now."""
    found: dict[Path, Any] = {}
    if source is None:
        return found
    for name, digest in source.sha256.items():
        path = source.path(name)
        found[path] = digest, None
        with suppress(OSError):  # gone
            about = path.stat()
            found[path] = digest, (about.st_ino, about.st_size, about.st_mtime_ns)
    return found


@functools.cache
def _factors(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).integers(1, 2**31, size=count)


def _file_sha256(encoder: Pipeline) -> str | None:
    """SHA-256 of the weights file, if its tensors are those in memory; else None."""
    files = read_source(encoder)
    if len(files) != 1:  # several files have no hash in common
        return None
    [data] = files
    try:
        of_file = read_checkpoint(data, encoder.bert.config, encoder.weights_dtype)
    except WeightsError:  # it no longer fits the architecture
        return None
    ours = encoder.bert.state_dict()
    is_same = ours.keys() == of_file.keys() and all(
        tensor.shape == of_file[name].shape
        and np.array_equal(_words(tensor), _words(of_file[name].to(tensor.dtype)))
        for name, tensor in ours.items()
    )
    return hashlib.sha256(data).hexdigest() if is_same else None


def _words(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's bits as integers, little-endian."""
    sizes = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    plain = tensor.detach().cpu().contiguous()
    words: np.ndarray[Any, Any] = plain.view(sizes[plain.element_size()]).numpy()
    return words.byteswap() if sys.byteorder == "big" else words


def _digest_tensors(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_words(tensor).data)
    return digest.hexdigest()


def _digest_tokenizer(tokenizer: WordPieceTokenizer | None) -> str:
    """SHA-256 over what the tokenizer does, whichever of its files says so; "none" without one."""
    if tokenizer is None:
        return "none"
    text = tokenizer.backend.to_str()
    unwritten: dict[str, Any] = {}  # what the library leaves out
    if tokenizer.backend.encode_special_tokens:
        unwritten["encode_special_tokens"] = True
    if tokenizer.second_type_id == 0:  # else it is 1, or pairs are refused
        unwritten["second_type_id"] = 0
    if unwritten:
        text = json.dumps(json.loads(text) | unwritten)
    return _cached(
        tokenizer, hashlib.sha256(text.encode()).digest(), lambda: _digest_settings(text)
    )


def _digest_settings(text: str) -> str:
    values = json.loads(text)
    values.pop("version", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# --- two records


@dataclass(frozen=True)
class Comparison:
    """How two fingerprints differ.

    Attributes:
        verdict: "same"; "rounding" if only the dtype or the version of the package differ; "limit"
            if the vectors of long texts differ; "model" if all vectors do, as they do between int8
            and other dtypes.
        differing: The two values of each field that differs. The model's name is among them, and
            has no part in the verdict.
    """

    verdict: Verdict
    differing: dict[str, tuple[Any, Any]]

    @property
    def is_compatible(self) -> bool:
        """Whether vectors of one model can be searched with vectors of the other."""
        return self.verdict in ("same", "rounding")

    def __str__(self) -> str:
        pairs = [f"{name}: {a!r}, {b!r}" for name, (a, b) in self.differing.items()]
        return f"{self.verdict} ({'; '.join(pairs)})" if pairs else self.verdict


def compare(a: Fingerprint, b: Fingerprint) -> Comparison:
    """Say how two fingerprints differ.

    The weights are the same if the files are, or the tensors are. Two dtypes of one model that were
    not loaded from the same file can't be recognised, and count as two models.
    """
    ours, theirs = a.to_dict(), b.to_dict()
    differing = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    is_model = any(name in differing for name in _IDENTITY)
    is_model |= "int8" in differing.get("dtype", ())  # whose vectors are off by some degrees
    is_model |= {"weights_sha256", "tensors_sha256"} <= differing.keys()
    if is_model:
        return Comparison("model", differing)
    if "max_seq_length" in differing:
        return Comparison("limit", differing)
    is_rounded = any(name in differing for name in _ROUNDING)
    return Comparison("rounding" if is_rounded else "same", differing)

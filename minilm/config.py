"""`config.json` -> `BertConfig`: the sizes of the network.

In: the parsed JSON object that ships with a published model.
Out: a frozen dataclass, checked field by field. Next: `bert.py` builds the network from it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minilm.errors import ConfigError

__all__ = ["BertConfig", "unsupported"]

# Far beyond any BERT that was ever published, small enough that a corrupt or hostile file cannot
# make the loader reserve absurd amounts of memory.
_BOUNDS = {
    "vocab_size": (1, 2_000_000),
    "hidden_size": (1, 16_384),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 256),
    "intermediate_size": (1, 65_536),
    "max_position_embeddings": (3, 131_072),
    "type_vocab_size": (1, 1_024),
}

# Fields that change what the network computes, with the values that `bert.py` implements. A field
# that is absent has the first value. Checkpoints write activation "gelu" for the erf form, and
# "gelu_python" for the same, spelled out. The last three send the reference to other files.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": ("gelu", "gelu_python"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "configuration_files": (None, [], ["config.json"]),
    "transformers_weights": (None, "model.safetensors"),
}


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT encoder, under the names that `config.json` uses.

    The defaults are those of all-MiniLM-L6-v2.

    Attributes:
        vocab_size: Rows of the word embedding table.
        hidden_size: Width of every token vector.
        num_hidden_layers: Number of transformer layers.
        num_attention_heads: Heads per layer; must divide `hidden_size`.
        intermediate_size: Width of the feed-forward layer's inner activation.
        max_position_embeddings: Rows of the position table: the longest input, in tokens.
        type_vocab_size: Rows of the token type table.
        layer_norm_eps: Added to the variance in every LayerNorm.
        hidden_dropout_prob: Dropout on embeddings and sublayer outputs, in training only.
        attention_probs_dropout_prob: Dropout on attention probabilities, in training only.
        pad_token_id: A row of the word table, or None. It is only checked: the tokenizer knows
            with which id to fill short rows.
    """

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        problems = _problems(asdict(self))
        if problems:
            raise ConfigError("BertConfig", list(problems.values()))

    @property
    def head_size(self) -> int:
        """Width of one attention head: 32 in all-MiniLM-L6-v2."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str | Path) -> "BertConfig":
        """Read the object in a `config.json`.

        Args:
            values: The parsed JSON object. Fields that do not change the result are ignored.
            source: What to call the file in an error.

        Raises:
            ConfigError: A size is missing or out of bounds, or the file asks for something that
                is not implemented (another activation, relative positions, a decoder, ...).
        """
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        defaults = {f.name: f.default for f in fields(cls)}
        # The reference falls back to BERT-base for a missing size; we do not guess sizes.
        missing = [name for name in _BOUNDS if name not in values and name != "type_vocab_size"]
        given = {name: value for name, value in (defaults | known).items() if name not in missing}
        problems = unsupported(values, _IMPLEMENTED)
        problems += [f"{name} is missing; give an integer" for name in missing]
        problems += _problems(given).values()
        if problems:
            raise ConfigError(source, problems)
        return cls(**known)


def unsupported(values: Mapping[str, Any], supported: Mapping[str, Sequence[Any]]) -> list[str]:
    """The problems of fields of a JSON object whose value is not among the `supported` ones."""
    return [
        f"{name} is {values[name]!r}; supported: {' or '.join(map(repr, allowed))}"
        for name, allowed in supported.items()
        if name in values and values[name] not in allowed
    ]


def _problems(values: Mapping[str, Any]) -> dict[str, str]:
    """The problem of each field that can't be used, by the field's name."""
    problems = {}
    for name, (low, high) in _BOUNDS.items():
        value = values.get(name, low)
        if type(value) is not int or not low <= value <= high:
            problems[name] = f"{name} is {value!r}; expected an integer from {low} to {high}"
    pad_token_id = values["pad_token_id"]
    if pad_token_id is not None and (type(pad_token_id) is not int or pad_token_id < 0):
        problems["pad_token_id"] = f"pad_token_id is {pad_token_id!r}; expected an integer >= 0"
    for name in ("layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems[name] = f"{name} is {value!r}; expected a number"
        elif not (math.isfinite(value) and 0 <= value < 1):
            problems[name] = f"{name} is {value!r}; expected a number from 0 to below 1"

    # Two fields that must fit each other, where each is right by itself.
    right = values.keys() - problems.keys()
    if {"hidden_size", "num_attention_heads"} <= right:
        size, heads = values["hidden_size"], values["num_attention_heads"]
        if size % heads:
            problems["num_attention_heads"] = (
                f"num_attention_heads is {heads}; it must divide hidden_size, {size}"
            )
    if {"pad_token_id", "vocab_size"} <= right and (pad_token_id or 0) >= values["vocab_size"]:
        problems["pad_token_id"] = (
            f"pad_token_id is {pad_token_id}; expected less than vocab_size, {values['vocab_size']}"
        )
    return problems

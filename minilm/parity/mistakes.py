"""The usual mistakes in running this model, each made on our own modules, changed from outside.

In: an encoder, texts, and a `Variant`: the right computation, but for what one or more mistakes
change. Out: the vectors that come of it. Next: `causes.py` compares them with another program's.

There is no second copy of the architecture here. A mistake is a copy of the encoder with another
number in it, or with hooks that round; or other features, such as an `attention_mask` of ones; or
another way to read the text (`readings.py`), pooling or GELU. `mistakes.json` lists those of any
model. A text is computed once for all variants that give the model the same ids.
"""

import copy
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minilm.encoder import SentenceEncoder
from minilm.inference.packed import PackedBatch
from minilm.parity.readings import Reader, Reading
from minilm.parity.stages import batches
from minilm.pipeline import Batch
from minilm.pooling import ClsPooling, MeanPooling
from minilm.pretrained.save import read_pooler

__all__ = ["Cause", "Variant", "VariantRunner", "causes_for", "settings_of"]

_Change = Callable[[Tensor], Tensor]
_TOKENS = 4096  # computed at a time
_OWN_READING = Reading()
_PLAIN = (None, False, "")  # the key of `VariantRunner._changed` if nothing in the model differs


@dataclass(frozen=True)
class Cause:
    """A mistake.

    Attributes:
        name: What it is, in a few words.
        remedy: What to look at in the other program.
        needs: The texts that show it.
        changes: The fields of a `Variant` that it changes.
    """

    name: str
    remedy: str
    needs: str = "any texts"
    changes: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_of_reading(self) -> bool:
        """Whether it gives the model other ids, and changes nothing in what is done with them."""
        return self.changes.keys() <= {"reading", "limit", "closed"} and bool(self.changes)

    @property
    def settings(self) -> frozenset[str]:
        """The names of what it changes."""
        names = {name for name in self.changes if name != "reading"}
        return frozenset(names | {f"reading.{name}" for name in self.changes.get("reading", ())})

    def to_dict(self) -> dict[str, str]:
        """The mistake as an object for JSON."""
        return {"name": self.name, "remedy": self.remedy, "needs": self.needs}


@dataclass(frozen=True)
class Variant:
    """How to compute vectors: the right way, but for what mistakes change."""

    limit: int
    closed: bool = True  # a cut text ends in [SEP]
    specials: bool = True  # [CLS] and [SEP] are added
    reading: Reading = _OWN_READING
    width: int | str = ""  # padded to so many tokens, or by a rule of `_WIDTHS`
    attended: bool = False  # padding is looked at
    counted: bool = False  # padding is part of the mean
    pooling: str = ""  # another one, by its name in `_POOLINGS`
    gelu: str = ""  # another one, by its name in `_GELUS`
    eps: float | None = None  # of every LayerNorm
    token_type: str = ""  # "none", "1"
    bits: str = ""  # fewer of them, by the name in `_BITS`

    @property
    def computed(self) -> tuple[Any, ...]:
        """What is done with ids, but for the pooling: equal ids have equal vectors by it."""
        return self.gelu, self.eps, self.token_type, self.bits

    def with_(self, *causes: Cause) -> "Variant":
        """The same with more mistakes."""
        made = self
        for cause in causes:
            changes = dict(cause.changes)
            if "reading" in changes:
                changes["reading"] = replace(made.reading, **changes["reading"])
            made = replace(made, **changes)
        return made


_MASK = "give the attention mask to the model"
_POOL_MASK = "multiply by the attention mask before adding up, and divide by its sum"
_TRUNCATION = (
    "set the tokenizer's limit yourself: tokenizer.json says 128, tokenizer_config.json 512, and "
    "sentence_bert_config.json, which is right, 256"
)
_WIDTHS = {
    "all": "padded to the longest of all texts",
    "batches of 32": "padded to the longest of each 32",
    "batches of 32 by length": "padded to the longest of each 32 in order of length",
}


def _padding_causes(name: str, needs: str, **changes: Any) -> list[Cause]:
    """The three ways to forget the mask, for one way to pad."""
    counted, attended = {"counted": True}, {"attended": True}
    return [
        Cause(f"{what}, {name}", remedy, needs, changes | more)
        for what, remedy, more in (
            ("no mask in the mean: padding counted", _POOL_MASK, counted),
            ("padding attended", _MASK, attended),
            ("no mask at all: padding attended and counted", f"{_MASK}; {_POOL_MASK}",
             counted | attended),
        )
    ]  # fmt: skip


def settings_of(causes: Iterable[Cause]) -> frozenset[str]:
    """The names of what some mistakes change; one with none of them can be made beside them."""
    return frozenset[str]().union(*(cause.settings for cause in causes))


def causes_for(encoder: SentenceEncoder) -> list[Cause]:
    """Every mistake that is possible with this model, those that are cheap to try first."""
    config = encoder.bert.config
    own, longest = encoder.max_seq_length, config.max_position_embeddings
    limits = [limit for limit in (128, 256, 512) if limit <= longest]
    causes = [
        Cause(f"cut at {limit} tokens", _TRUNCATION, f"texts longer than {min(limit, own)} tokens",
              {"limit": limit})
        for limit in limits
        if limit != own
    ]  # fmt: skip
    causes += [
        Cause(f"cut at {limit} tokens, [CLS] and [SEP] not counted", _TRUNCATION,
              f"texts longer than {min(limit, own)} tokens", {"limit": limit + 2})
        for limit in limits
        if limit + 2 <= longest
    ]  # fmt: skip
    data = resources.files("minilm.parity").joinpath("mistakes.json").read_text(encoding="utf-8")
    causes += [Cause(**each) for each in json.loads(data)]
    for rule, name in _WIDTHS.items():
        causes += _padding_causes(name, "texts of unequal length", width=rule)
    for limit in limits:
        needs = f"texts shorter than {limit} tokens"
        causes += _padding_causes(f"padded to {limit} tokens", needs, width=limit, limit=limit)
    lowers = getattr(encoder.get_tokenizer().backend.normalizer, "lowercase", True)
    unfit = {"lower"} if lowers else {"kept", "sigma", "folded"}
    is_able = Reader(encoder.get_tokenizer()).is_able
    own_pooling = "cls" if isinstance(encoder.pooling, ClsPooling) else "mean"
    return [
        cause
        for cause in causes
        if ("reading" not in cause.changes or is_able)
        and cause.changes.get("reading", {}).get("case") not in unfit
        and cause.changes.get("pooling") != own_pooling
        and cause.changes.get("eps") != config.layer_norm_eps
        and not (cause.changes.get("token_type") == "1" and config.type_vocab_size < 2)
    ]


class VariantRunner:
    """Computes pooled vectors of chosen texts by any variant, on the encoder's own modules."""

    def __init__(
        self, encoder: SentenceEncoder, texts: list[str], counts: list[int], rows: list[int]
    ) -> None:
        self.encoder = encoder
        self.texts = texts
        self.counts = counts
        self.rows = rows
        # BERT's own, which is in the file of the weights though this model doesn't use it
        self._pooler = functools.cache(lambda: read_pooler(encoder))
        self._reader = Reader(encoder.get_tokenizer())
        self._all_ids: dict[Reading, list[list[int]]] = {}
        self._kept: dict[Any, Tensor] = {}  # pooled vectors, by what was computed of which ids
        self._models: dict[tuple[Any, ...], SentenceEncoder] = {}

    def ids(self, variant: Variant) -> list[list[int]]:
        """The token ids of the chosen texts."""
        reading, limit = variant.reading, variant.limit
        if reading not in self._all_ids:
            chosen = [self.texts[row] for row in self.rows]
            if reading == _OWN_READING:
                self._all_ids[reading] = self.encoder.get_tokenizer()(chosen).input_ids
            else:
                self._all_ids[reading] = [self._reader.ids(text, reading) for text in chosen]
        rows = self._all_ids[reading]
        if not variant.specials:
            return [row[1:-1][:limit] for row in rows]
        if not variant.closed:
            return [row[:limit] for row in rows]
        return [row if len(row) <= limit else row[: limit - 1] + row[-1:] for row in rows]

    def widths(self, variant: Variant) -> list[int]:
        """The number of tokens to which each of the chosen texts is padded."""
        lengths = [len(row) for row in self.ids(variant)]
        if not variant.width:
            return lengths
        if isinstance(variant.width, int):
            return [max(length, variant.width) for length in lengths]
        every = [min(count, variant.limit) for count in self.counts]
        order = list(range(len(every)))
        if variant.width == "batches of 32 by length":  # of the text, in characters
            order.sort(key=lambda row: -len(self.texts[row]))
        size = len(every) if variant.width == "all" else 32
        width_of: dict[int, int] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            width_of |= dict.fromkeys(batch, max(every[row] for row in batch))
        return [max(length, width_of[row]) for length, row in zip(lengths, self.rows, strict=True)]

    def differs(self, variant: Variant, other: Variant) -> bool:
        """Whether the chosen texts show the difference between two variants."""
        if other.pooling == "pooler" and not self._pooler():
            return False
        names = ("limit", "closed", "specials", "reading", "width", "attended", "counted")
        if replace(other, **{name: getattr(variant, name) for name in names}) != variant:
            return True  # it differs in what the model does with the tokens
        widths = self.widths(other)
        if other.width and widths == [len(row) for row in self.ids(other)]:
            return False  # there is no padding
        for rule in _WIDTHS:  # two rules may come to the same
            if rule == other.width or other.width not in _WIDTHS:
                break
            if self.widths(replace(other, width=rule)) == widths:
                return False
        padding = (other.attended, other.counted, other.width)
        return padding != (variant.attended, variant.counted, variant.width) or self.ids(
            variant
        ) != self.ids(other)

    def screening(self, count: int) -> list[int]:
        """The places of some of the chosen texts, spread over the shorter half."""
        order = sorted(range(len(self.rows)), key=lambda place: self.counts[self.rows[place]])
        half = order[: max(count, len(order) // 2)]
        return [half[i * len(half) // count] for i in range(count)] if len(half) > count else half

    @torch.no_grad()
    def pooled(self, variant: Variant, places: Sequence[int] | None = None) -> Tensor:
        """The vectors of the chosen texts before they are normalized, float64 `[n, 384]`.

        With `places`, those of the texts at these places alone, one or more.
        """
        ids = self.ids(variant)
        places = range(len(ids)) if places is None else places
        if variant.width:
            return self._pooled_in_batches(variant, places)
        missing = {
            tuple(ids[place]): place
            for place in places
            if (variant.computed, tuple(ids[place]), variant.pooling) not in self._kept
        }
        if missing:
            self._keep(variant, [list(row) for row in missing])
        found = [self._kept[variant.computed, tuple(ids[i]), variant.pooling] for i in places]
        return torch.stack(found)

    def _keep(self, variant: Variant, rows: list[list[int]]) -> None:
        """Compute some ids and keep their vectors: by all poolings where nothing else differs."""
        names = {variant.pooling}
        if variant.computed == Variant(variant.limit).computed:
            names |= {"", *_POOLINGS} - (set() if self._pooler() else {"pooler"})
        for batch in batches([len(row) for row in rows], _TOKENS):
            of_batch = [rows[i] for i in batch]
            if all(of_batch):
                found = self._packed(variant, of_batch, names)
            else:
                found = self._padded(variant, of_batch, max(map(len, of_batch)), names)
            for name, vectors in found.items():
                for row, vector in zip(of_batch, vectors.cpu().double(), strict=True):
                    self._kept[variant.computed, tuple(row), name] = vector

    def _pooled_in_batches(self, variant: Variant, places: Sequence[int]) -> Tensor:
        """The same with padding, which is to be seen."""
        ids, widths = self.ids(variant), self.widths(variant)
        shape = len(places), self.encoder.bert.config.hidden_size
        out = torch.empty(shape, dtype=torch.float64, device="cpu")
        for batch in batches([widths[i] for i in places], _TOKENS, exact=True):
            rows = [ids[places[i]] for i in batch]
            found = self._padded(variant, rows, widths[places[batch[0]]], [variant.pooling])
            out[batch] = found[variant.pooling].cpu().double()
        return out

    def _packed(
        self, variant: Variant, rows: list[list[int]], poolings: Iterable[str]
    ) -> dict[str, Tensor]:
        """Compute without padding, which is less work, where no mistake is about padding."""
        batch = PackedBatch(rows, self.encoder.device)
        batch.token_type_ids = torch.full_like(batch.input_ids, int(variant.token_type == "1"))
        tokens = self._tokens(variant, batch)
        return {name: batch.pool(partial(self._pool, name), tokens) for name in poolings}

    def _padded(
        self, variant: Variant, rows: list[list[int]], width: int, poolings: Iterable[str]
    ) -> dict[str, Tensor]:
        """Compute with `width` tokens in each row, and the masks of the variant."""
        device, pad = self.encoder.device, self.encoder.get_tokenizer().pad_token_id
        width = max(width, 1)  # even where there is no token at all
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
        real = (torch.arange(width, device=device) < lengths[:, None]).to(torch.int64)
        filled = [row + [pad] * (width - len(row)) for row in rows]
        input_ids = torch.tensor(filled, dtype=torch.int64, device=device)  # [batch, tokens]
        types = torch.full_like(input_ids, int(variant.token_type == "1"))
        batch = Batch(input_ids, torch.ones_like(real) if variant.attended else real, types)
        counted = torch.ones_like(real) if variant.counted else real
        tokens = self._tokens(variant, batch)
        return {name: self._pool(name, tokens, counted) for name in poolings}

    def _tokens(self, variant: Variant, batch: Any) -> Tensor:
        model = self._changed(variant)
        with _Gelu(_GELUS[variant.gelu]):
            tokens: Tensor = model(batch)["token_embeddings"]
        return tokens

    def _pool(self, name: str, tokens: Tensor, mask: Tensor) -> Tensor:
        """`[batch, tokens, 384]` -> `[batch, 384]`, by the model's own pooling or another."""
        if name:
            return _POOLINGS[name](tokens, mask, self._pooler() if name == "pooler" else None)
        pooled: Tensor = self.encoder.pooling(tokens, mask)
        return pooled

    def _changed(self, variant: Variant) -> SentenceEncoder:
        """A copy of the encoder with the variant's changes. The last and the plain are kept."""
        key = (variant.eps, variant.token_type == "none", variant.bits)
        if key not in self._models:
            tokenizer = self.encoder.tokenizer
            model = copy.deepcopy(self.encoder, {id(tokenizer): tokenizer}).eval()
            model.normalize = nn.Identity()
            for part in model.modules():
                if isinstance(part, nn.LayerNorm) and variant.eps is not None:
                    part.eps = variant.eps
            if variant.token_type == "none":
                model.bert.embeddings.token_type_embeddings.weight.zero_()
            if variant.bits:
                _BITS[variant.bits](model)
            plain = {kept: self._models[kept] for kept in self._models if kept == _PLAIN}
            self._models = plain | {key: model}
        return self._models[key]


def _words(token_embeddings: Tensor, mask: Tensor, _: Any) -> Tensor:
    """Take the mean of all tokens but [CLS] and [SEP]."""
    last = mask.sum(dim=1, keepdim=True) - 1
    places = torch.arange(mask.shape[1], device=mask.device)
    inner = mask * ((places > 0) & (places != last))
    pooled: Tensor = MeanPooling()(token_embeddings, inner)
    return pooled


def _largest(token_embeddings: Tensor, mask: Tensor, _: Any) -> Tensor:
    return token_embeddings.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(dim=1)


def _bert_pooler(token_embeddings: Tensor, _: Tensor, pooler: dict[str, Tensor]) -> Tensor:
    weight, bias = (pooler[f"pooler.dense.{x}"].to(token_embeddings) for x in ("weight", "bias"))
    return F.linear(token_embeddings[:, 0], weight, bias).tanh()


_POOLINGS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "cls": lambda tokens, mask, _: ClsPooling()(tokens, mask),
    "mean": lambda tokens, mask, _: MeanPooling()(tokens, mask),
    "max": _largest,
    "words": _words,
    "pooler": _bert_pooler,
}


class _Gelu(TorchFunctionMode):
    """Replaces the exact GELU by another one, on this thread."""

    def __init__(self, gelu: _Change) -> None:
        super().__init__()
        self._other = gelu

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") == "gelu" and not kwargs:
            return self._other(args[0])
        return func(*args, **(kwargs or {}))


def _from_table(tensor: Tensor) -> Tensor:
    """The tanh form, as a table of all float16 numbers gives it between -10 and 10."""
    found = F.gelu(tensor.half().to(tensor.dtype), approximate="tanh").half().to(tensor.dtype)
    return torch.where(tensor.abs() >= 10, tensor.clamp_min(0), found)


_GELUS: dict[str, _Change] = {
    "": F.gelu,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "table": _from_table,
}


# --- fewer bits


def _in(dtype: torch.dtype) -> _Change:
    """Make a function that rounds to a dtype, and back."""
    return lambda tensor: tensor.to(dtype).to(tensor.dtype)


def _rounded(dtype: torch.dtype, *kinds: type[nn.Module], results: bool = True) -> Any:
    """Round the weights of modules and, with `results`, what they give and linear layers take."""
    kinds = kinds or (nn.Linear, nn.LayerNorm, nn.Embedding)

    def change(model: SentenceEncoder) -> None:
        for part in model.modules():
            if isinstance(part, kinds):
                for weight in part.parameters(recurse=False):
                    weight.copy_(_in(dtype)(weight))
                if results:
                    part.register_forward_hook(lambda _, __, output: _in(dtype)(output))
                if results and isinstance(part, nn.Linear):
                    part.register_forward_pre_hook(lambda _, args: (_in(dtype)(args[0]),))

    return change


def _in_codes(linear: _Change, embedding: _Change, entering: _Change | None = None) -> Any:
    """Round the weights of linear layers and embeddings, and what enters a linear layer."""

    def change(model: SentenceEncoder) -> None:
        for part in model.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                round_ = linear if isinstance(part, nn.Linear) else embedding
                part.weight.copy_(round_(part.weight))
            if isinstance(part, nn.Linear) and entering is not None:
                part.register_forward_pre_hook(lambda _, args: (entering(args[0]),))

    return change


def _by_row(tensor: Tensor) -> Tensor:
    """Round to -127 to 127 times a scale for each output of a weight, or each token."""
    scale = (tensor.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-12)
    return (tensor / scale).round() * scale


def _by_tensor(tensor: Tensor) -> Tensor:
    scale = (tensor.abs().max() / 127).clamp_min(1e-12)
    return (tensor / scale).round() * scale


def _in_uint8(tensor: Tensor) -> Tensor:
    """Round to a scale times 0 to 255 about a zero point."""
    low, high = tensor.min().clamp_max(0), tensor.max().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = (-low / scale).round()
    return ((tensor / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


_BITS: dict[str, Callable[[SentenceEncoder], None]] = {
    "float16 weights": _rounded(torch.float16, results=False),
    "float16": _rounded(torch.float16),
    "bfloat16 weights": _rounded(torch.bfloat16, results=False),
    "bfloat16 products": _rounded(torch.bfloat16, nn.Linear),
    "bfloat16": _rounded(torch.bfloat16),
    "int8 tensor": _in_codes(_by_tensor, _by_tensor),
    "int8 channel": _in_codes(_by_row, _by_tensor),
    "int8 both": _in_codes(_by_tensor, _by_tensor, _in_uint8),
    "int8 both channel": _in_codes(_by_row, _by_tensor, _in_uint8),
    "uint8 both": _in_codes(_in_uint8, _in_uint8, _in_uint8),
    "int8 tokens": _in_codes(_by_row, _by_row, _by_row),
}

"""The usual mistakes in running this model, each made on our own modules, changed from outside.

In: an encoder, texts, and a `Recipe`: the right way, but for what one or more mistakes change. Out:
the vectors that come of it. Next: `causes.py` compares them with another program's.

There is no second copy of the architecture here. A mistake is a copy of the encoder with another
number in it, or with hooks that round; or other features, such as an `attention_mask` of ones; or
another normalizer, pooling or GELU in its place.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers.normalizers import BertNormalizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minilm.encoder import SentenceEncoder
from minilm.inference.packed import PackedBatch
from minilm.pipeline import Batch
from minilm.pooling import ClsPooling, MeanPooling
from minilm.pretrained.save import read_pooler

__all__ = ["Cause", "Laboratory", "Recipe", "causes_for"]

_TOKENS = 4096  # computed at a time
_PLAIN = (None, False, "")  # of `Laboratory._changed`: nothing is different in the model


@dataclass(frozen=True)
class Cause:
    """A mistake.

    Attributes:
        name: In a few words.
        remedy: What to look at in the other program.
        needs: The texts that show it.
    """

    name: str
    remedy: str
    needs: str = "any texts"


@dataclass(frozen=True)
class Recipe:
    """How to compute vectors: the right way, but for what a cause changes."""

    limit: int
    closed: bool = True  # a cut text ends in [SEP]
    specials: bool = True  # [CLS] and [SEP] are added
    text: str = ""  # another normalizer, by its name in `_NORMALIZERS`
    width: int | str = ""  # padded to so many tokens, or by a rule of `_WIDTHS`
    attended: bool = False  # padding is looked at
    counted: bool = False  # padding is part of the mean
    pooling: str = ""  # another one, by its name in `_POOLINGS`
    gelu: str = ""  # another one, by its name in `_GELUS`
    eps: float | None = None  # of every LayerNorm
    token_type: str = ""  # "none", "1"
    bits: str = ""  # by its name in `_BITS`

    def with_(self, changes: Mapping[str, Any]) -> "Recipe":
        return replace(self, **changes)


_LONG = "texts longer than {} tokens"
_UNEQUAL = "texts of unequal length"
_CAPITALS, _ACCENTS, _CJK = "capital letters", "accents", "Chinese or Japanese"

_BERT_OUTPUT = (
    "take the mean of the last layer's token vectors (last_hidden_state) over real tokens"
)
_MASK = "give the attention mask to the model"
_POOL_MASK = "multiply by the attention mask before adding up, and divide by its sum"
_TRUNCATION = (
    "set the tokenizer's limit yourself: tokenizer.json says 128, tokenizer_config.json 512, and "
    "sentence_bert_config.json, which is right, 256"
)


def _padding_causes(name: str, width: int | str, limit: int | None) -> dict[Cause, dict[str, Any]]:
    """The three ways to forget the mask, for one way to pad."""
    changes: dict[str, Any] = {"width": width} | ({} if limit is None else {"limit": limit})
    needs = f"texts shorter than {width} tokens" if isinstance(width, int) else _UNEQUAL
    return {
        Cause(f"no mask in the mean: padding counted, {name}", _POOL_MASK, needs): {
            **changes, "counted": True,
        },
        Cause(f"padding attended, {name}", _MASK, needs): {**changes, "attended": True},
        Cause(f"no mask at all: padding attended and counted, {name}", f"{_MASK}; {_POOL_MASK}",
              needs): {**changes, "attended": True, "counted": True},
    }  # fmt: skip


_WIDTHS = {
    "all": "padded to the longest of all texts",
    "batches of 32": "padded to the longest of each 32",
    "batches of 32 by length": "padded to the longest of each 32 in order of length",
}


def _simple_causes() -> dict[Cause, dict[str, Any]]:
    tokens = "the special tokens are part of the text"
    causes: dict[Cause, dict[str, Any]] = {
        Cause("cut without [SEP]", "keep the last token, [SEP], when a text is cut",
              "texts beyond the limit"): {"closed": False},
        Cause("no [CLS] and [SEP]", "let the tokenizer add the special tokens"): {
            "specials": False},
        Cause("[CLS] pooling", _BERT_OUTPUT): {"pooling": "cls"},
        Cause("mean pooling", "take the vector of the first token, [CLS]"): {"pooling": "mean"},
        Cause("max pooling", _BERT_OUTPUT): {"pooling": "max"},
        Cause("[CLS] and [SEP] left out of the mean", f"{tokens}, and of its mean"): {
            "pooling": "words"},
        Cause("BERT's own pooler (pooler_output)", _BERT_OUTPUT): {"pooling": "pooler"},
        Cause("tanh GELU", "take the exact form, with erf, not its tanh approximation"): {
            "gelu": "tanh"},
        Cause("sigmoid GELU (quick GELU)", "take the exact form of GELU, with erf"): {
            "gelu": "sigmoid"},
        **{
            Cause(f"LayerNorm eps {eps:.0e}".replace("e-0", "e-"),
                  "read layer_norm_eps in config.json"): {"eps": eps}
            for eps in (1e-5, 1e-6, 1e-12)
        },
        Cause("no token-type row", "add row 0 of token_type_embeddings to every token"): {
            "token_type": "none"},
        Cause("token type 1", "token_type_ids are all 0"): {"token_type": "1"},
        Cause("cased text (no lowercasing)", "lowercase first, which strips accents too",
              _CAPITALS): {"text": "cased"},
        Cause("cased text, accents stripped", "lowercase before splitting into words",
              _CAPITALS): {"text": "cased, accents stripped"},
        Cause("accents kept", "strip accents (NFD without marks), as lowercasing BERT does",
              _ACCENTS): {"text": "accents kept"},
        Cause("Chinese characters not split", "put blanks around each CJK character", _CJK): {
            "text": "Chinese not split"},
        Cause("lowercased text", "the model is cased: leave capital letters", _CAPITALS): {
            "text": "lowercased"},
    }  # fmt: skip
    return causes


_FEWER = "it computes with fewer bits, which is no mistake; compare in float32 to be sure"

_BIT_CAUSES = {
    Cause("float16 weights", _FEWER): {"bits": "float16 weights"},
    Cause("float16", _FEWER): {"bits": "float16"},
    Cause("bfloat16 weights", _FEWER): {"bits": "bfloat16 weights"},
    Cause("bfloat16 products", _FEWER): {"bits": "bfloat16 products"},
    Cause("bfloat16", _FEWER): {"bits": "bfloat16"},
    Cause("int8 weights, one scale a tensor", _FEWER): {"bits": "int8 tensor"},
    Cause("int8 weights, one scale a channel", _FEWER): {"bits": "int8 channel"},
    Cause("int8 weights and activations, one scale a tensor", _FEWER): {"bits": "int8 both"},
    Cause("int8 weights and activations, one scale a channel", _FEWER): {
        "bits": "int8 both channel"
    },
}


def causes_for(encoder: SentenceEncoder) -> dict[Cause, dict[str, Any]]:
    """Every mistake that is possible with this model, and what it changes in the computation.

    Args:
        encoder: The model.

    Returns:
        Cause -> fields of the recipe. The cheap ones first.
    """
    config = encoder.bert.config
    own, longest = encoder.max_seq_length, config.max_position_embeddings
    limits = [limit for limit in (128, 256, 512) if limit <= longest]
    causes: dict[Cause, dict[str, Any]] = {
        Cause(f"cut at {limit} tokens", _TRUNCATION, _LONG.format(min(limit, own))): {
            "limit": limit
        }
        for limit in limits
        if limit != own
    }
    causes |= _simple_causes()
    causes |= _BIT_CAUSES
    for rule, name in _WIDTHS.items():
        causes |= _padding_causes(name, rule, None)
    for limit in limits:
        causes |= _padding_causes(f"padded to {limit} tokens", limit, limit)
    normalizer = encoder.get_tokenizer().backend.normalizer
    lowers = getattr(normalizer, "lowercase", True)
    unfit = {"lowercased"} if lowers else set(_NORMALIZERS) - {"lowercased"}
    own_pooling = "cls" if isinstance(encoder.pooling, ClsPooling) else "mean"
    return {
        cause: changes
        for cause, changes in causes.items()
        if changes.get("text") not in unfit
        and changes.get("pooling") != own_pooling
        and changes.get("eps") != config.layer_norm_eps
        and not (changes.get("token_type") == "1" and config.type_vocab_size < 2)
    }


class Laboratory:
    """Computes pooled vectors by a recipe, on the encoder's own modules, changed from outside."""

    def __init__(
        self, encoder: SentenceEncoder, texts: list[str], counts: list[int], rows: list[int]
    ) -> None:
        self.encoder = encoder
        self.texts = texts
        self.counts = counts
        self.rows = rows
        self._pooler = functools.cache(lambda: _published_pooler(encoder))
        self._all_ids: dict[str, list[list[int]]] = {}
        self._models: dict[tuple[Any, ...], SentenceEncoder] = {}

    def ids(self, recipe: Recipe) -> list[list[int]]:
        """The ids of the chosen texts."""
        if recipe.text not in self._all_ids:
            tokenizer = self.encoder.get_tokenizer()
            if recipe.text:
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.backend.normalizer = _NORMALIZERS[recipe.text](
                    self.encoder.get_tokenizer().backend.normalizer
                )
            chosen = [self.texts[row] for row in self.rows]
            self._all_ids[recipe.text] = tokenizer(chosen).input_ids
        rows = self._all_ids[recipe.text]
        if not recipe.specials:
            return [row[1:-1][: recipe.limit] for row in rows]
        return [
            row
            if len(row) <= recipe.limit
            else row[: recipe.limit - 1] + row[-1:]
            if recipe.closed
            else row[: recipe.limit]
            for row in rows
        ]

    def widths(self, recipe: Recipe) -> list[int]:
        """To how many tokens each of the chosen texts is padded."""
        lengths = [len(row) for row in self.ids(recipe)]
        if not recipe.width:
            return lengths
        if isinstance(recipe.width, int):
            return [max(length, recipe.width) for length in lengths]
        every = [min(count, recipe.limit) for count in self.counts]
        order = list(range(len(every)))
        if recipe.width == "batches of 32 by length":  # of the text, in characters
            order.sort(key=lambda row: -len(self.texts[row]))
        size = len(every) if recipe.width == "all" else 32
        width_of: dict[int, int] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            width_of |= dict.fromkeys(batch, max(every[row] for row in batch))
        return [max(length, width_of[row]) for length, row in zip(lengths, self.rows, strict=True)]

    def differs(self, recipe: Recipe, other: Recipe) -> bool:
        """Whether the texts chosen show the difference between two recipes."""
        if other.pooling == "pooler" and self._pooler() is None:
            return False
        names = ("limit", "closed", "specials", "text", "width", "attended", "counted")
        if replace(other, **{name: getattr(recipe, name) for name in names}) != recipe:
            return True  # it differs in the model
        widths = self.widths(other)
        if other.width and widths == [len(row) for row in self.ids(other)]:
            return False  # there is no padding
        for rule in _WIDTHS:  # two rules may come to the same
            if rule == other.width or other.width not in _WIDTHS:
                break
            if self.widths(replace(other, width=rule)) == widths:
                return False
        padding = (other.attended, other.counted, other.width)
        return padding != (recipe.attended, recipe.counted, recipe.width) or self.ids(
            recipe
        ) != self.ids(other)

    def screening(self, count: int) -> list[int]:
        """Some of the chosen texts, by their place among them: of the shorter half, spread."""
        order = sorted(range(len(self.rows)), key=lambda place: self.counts[self.rows[place]])
        half = order[: max(count, len(order) // 2)]
        return [half[i * len(half) // count] for i in range(count)] if len(half) > count else half

    @torch.no_grad()
    def pooled(self, recipe: Recipe, places: Sequence[int] | None = None) -> Tensor:
        """The vectors before they are normalized, float64 `[n, 384]`.

        Args:
            recipe: How to compute them.
            places: Which of the chosen texts; by default all.
        """
        ids, widths = self.ids(recipe), self.widths(recipe)
        places = range(len(ids)) if places is None else places
        model = self._changed(recipe)
        shape = len(places), self.encoder.bert.config.hidden_size
        out = torch.empty(shape, dtype=torch.float64, device="cpu")
        with _gelu(recipe.gelu):
            for batch in _batches([widths[place] for place in places], bool(recipe.width)):
                rows = [ids[places[i]] for i in batch]
                width = max(widths[places[i]] for i in batch)
                pooled = self._padded if recipe.width or not all(rows) else self._packed
                out[batch] = pooled(recipe, model, rows, width).cpu().double()
        return out

    def _packed(
        self, recipe: Recipe, model: SentenceEncoder, rows: list[list[int]], _: int
    ) -> Tensor:
        """Without padding, which no mistake is about: less work."""
        batch = PackedBatch(rows, model.device)
        batch.token_type_ids = torch.full_like(batch.input_ids, int(recipe.token_type == "1"))
        tokens = model(batch)["token_embeddings"]
        return batch.pool(partial(self._pool, recipe, model.pooling), tokens)

    def _padded(
        self, recipe: Recipe, model: SentenceEncoder, rows: list[list[int]], width: int
    ) -> Tensor:
        """With so many tokens in each row, and the masks of the recipe."""
        device, pad = model.device, self.encoder.get_tokenizer().pad_token_id
        width = max(width, 1)  # even where there is no token at all
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
        real = (torch.arange(width, device=device) < lengths[:, None]).to(torch.int64)
        filled = [row + [pad] * (width - len(row)) for row in rows]
        input_ids = torch.tensor(filled, dtype=torch.int64, device=device)  # [batch, tokens]
        types = torch.full_like(input_ids, int(recipe.token_type == "1"))
        batch = Batch(input_ids, torch.ones_like(real) if recipe.attended else real, types)
        counted = torch.ones_like(real) if recipe.counted else real
        return self._pool(recipe, model.pooling, model(batch)["token_embeddings"], counted)

    def _pool(self, recipe: Recipe, pooling: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        """`[batch, tokens, 384]` -> `[batch, 384]`, by the model's own way or another."""
        if recipe.pooling:
            weights = self._pooler() if recipe.pooling == "pooler" else None
            return _POOLINGS[recipe.pooling](tokens, mask, weights)
        pooled: Tensor = pooling(tokens, mask)
        return pooled

    def _changed(self, recipe: Recipe) -> SentenceEncoder:
        """A copy of the encoder with what the recipe changes; the last and the plain are kept."""
        key = (recipe.eps, recipe.token_type == "none", recipe.bits)
        if key not in self._models:
            tokenizer = self.encoder.tokenizer
            model = copy.deepcopy(self.encoder, {id(tokenizer): tokenizer}).eval()
            model.normalize = nn.Identity()
            for part in model.modules():
                if isinstance(part, nn.LayerNorm) and recipe.eps is not None:
                    part.eps = recipe.eps
            if recipe.token_type == "none":
                model.bert.embeddings.token_type_embeddings.weight.zero_()
            if recipe.bits:
                _BITS[recipe.bits](model)
            plain = {kept: self._models[kept] for kept in self._models if kept == _PLAIN}
            self._models = plain | {key: model}
        return self._models[key]


def _batches(widths: Sequence[int], exact: bool) -> Iterator[list[int]]:
    """Places in order of width, as many at a time as fit; with `exact`, and of 0, of one width."""
    batch: list[int] = []
    for place in sorted(range(len(widths)), key=lambda place: widths[place]):
        if batch and (
            (len(batch) + 1) * widths[place] > _TOKENS
            or ((exact or not widths[batch[0]]) and widths[place] != widths[batch[0]])
        ):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _normalizer(**changes: Any) -> Callable[[Any], Any]:
    """Another normalizer than the given one, in these points."""

    def make(own: Any) -> Any:
        names = ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")
        settings = {name: getattr(own, name) for name in names if hasattr(own, name)}
        return BertNormalizer(**settings | changes)

    return make


_NORMALIZERS: dict[str, Callable[[Any], Any]] = {
    "cased": _normalizer(lowercase=False, strip_accents=False),
    "cased, accents stripped": _normalizer(lowercase=False, strip_accents=True),
    "accents kept": _normalizer(strip_accents=False),
    "Chinese not split": _normalizer(handle_chinese_chars=False),
    "lowercased": _normalizer(lowercase=True),
}


def _words(token_embeddings: Tensor, mask: Tensor, _: Any) -> Tensor:
    """The mean without [CLS] and [SEP], of what is left."""
    last = mask.sum(dim=1, keepdim=True) - 1
    places = torch.arange(mask.shape[1], device=mask.device)
    inner = mask * ((places > 0) & (places != last))
    pooled: Tensor = MeanPooling()(token_embeddings, inner)
    return pooled


def _largest(token_embeddings: Tensor, mask: Tensor, _: Any) -> Tensor:
    return token_embeddings.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(dim=1)


def _bert_pooler(token_embeddings: Tensor, _: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    weight, bias = (each.to(token_embeddings) for each in weights)
    return F.linear(token_embeddings[:, 0], weight, bias).tanh()


_POOLINGS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "cls": lambda tokens, mask, _: ClsPooling()(tokens, mask),
    "mean": lambda tokens, mask, _: MeanPooling()(tokens, mask),
    "max": _largest,
    "words": _words,
    "pooler": _bert_pooler,
}


def _published_pooler(encoder: SentenceEncoder) -> tuple[Tensor, Tensor] | None:
    """BERT's own pooler, which is in the file of the weights though this model doesn't use it."""
    found = read_pooler(encoder)
    return (found["pooler.dense.weight"], found["pooler.dense.bias"]) if found else None


class _Gelu(TorchFunctionMode):
    """Another GELU in place of the exact one, on this thread."""

    def __init__(self, gelu: Callable[[Tensor], Tensor]) -> None:
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


_GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
}


@contextmanager
def _gelu(name: str) -> Iterator[None]:
    if not name:
        yield
        return
    with _Gelu(_GELUS[name]):
        yield


# --- fewer bits


def _in(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounded to a dtype, and back."""
    return lambda tensor: tensor.to(dtype).to(tensor.dtype)


def _weights_in(dtype: torch.dtype, kind: type[nn.Module] = nn.Module) -> Any:
    def change(model: SentenceEncoder) -> None:
        for part in model.modules():
            if isinstance(part, kind):
                for weight in part.parameters(recurse=False):
                    weight.copy_(_in(dtype)(weight))

    return change


def _all_in(dtype: torch.dtype) -> Any:
    """Weights, and what every module gives."""

    def change(model: SentenceEncoder) -> None:
        _weights_in(dtype)(model)
        for part in model.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm | nn.Embedding):
                part.register_forward_hook(lambda _, __, output: _in(dtype)(output))
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(lambda _, args: (_in(dtype)(args[0]),))

    return change


def _products_in(dtype: torch.dtype) -> Any:
    """The linear layers alone, with what they are given and give."""

    def change(model: SentenceEncoder) -> None:
        _weights_in(dtype, nn.Linear)(model)
        for part in model.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(lambda _, args: (_in(dtype)(args[0]),))
                part.register_forward_hook(lambda _, __, output: _in(dtype)(output))

    return change


def _int8(per_channel: bool, activations: bool) -> Any:
    """Weights as whole numbers from -127 to 127 times a scale; activations from 0 to 255."""

    def change(model: SentenceEncoder) -> None:
        for part in model.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                weight = part.weight
                largest = weight.abs().max()
                if per_channel and isinstance(part, nn.Linear):
                    largest = weight.abs().amax(dim=1, keepdim=True)
                scale = (largest / 127).clamp_min(1e-12)
                weight.copy_((weight / scale).round() * scale)
            if isinstance(part, nn.Linear) and activations:
                part.register_forward_pre_hook(lambda _, args: (_in_uint8(args[0]),))

    return change


def _in_uint8(tensor: Tensor) -> Tensor:
    low, high = tensor.min().clamp_max(0), tensor.max().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = (-low / scale).round()
    return ((tensor / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


_BITS: dict[str, Callable[[SentenceEncoder], None]] = {
    "float16 weights": _weights_in(torch.float16),
    "float16": _all_in(torch.float16),
    "bfloat16 weights": _weights_in(torch.bfloat16),
    "bfloat16 products": _products_in(torch.bfloat16),
    "bfloat16": _all_in(torch.bfloat16),
    "int8 tensor": _int8(per_channel=False, activations=False),
    "int8 channel": _int8(per_channel=True, activations=False),
    "int8 both": _int8(per_channel=False, activations=True),
    "int8 both channel": _int8(per_channel=True, activations=True),
}

"""`Pipeline`: the three stages composed, and the settings that go with them.

This is where the pieces meet: token ids (`tokenizer.py`) -> token vectors (`bert.py`) -> mean over
real tokens -> length 1 (`pooling.py`). `forward` is that, and nothing else.

In: a batch of token ids. Out: `[batch, 384]`. Next: `encoder.py` loads a model, and takes texts.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from minilm import inputs
from minilm.bert import Attend, BertModel
from minilm.errors import InputError, InputTypeError
from minilm.pooling import Normalize
from minilm.similarity import SIMILARITY_FUNCTIONS, SimilarityFunction
from minilm.source import ModelFiles
from minilm.tokenizer import WordPieceTokenizer

__all__ = ["Batch", "Pipeline"]


class Batch:
    """Token ids of some sentences, and how to attend and to pool within each of them.

    This one is padded: rows of equal length, and a mask. `PackedBatch` has no padding.

    Attributes:
        input_ids: int64 `[batch, tokens]`.
        attention_mask: `[batch, tokens]`, 1 at real tokens, 0 at padding.
        token_type_ids, position_ids: int64 `[batch, tokens]`; None for 0, and for 0, 1, 2, ...
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.token_type_ids = token_type_ids
        self.position_ids = position_ids

    @property
    def attend(self) -> Attend | None:
        """What `BertModel` attends with; None for its own `attention`, with the mask."""
        return None

    def pool(self, pooling: Callable[..., Tensor], token_embeddings: Tensor) -> Tensor:
        """Token vectors -> one vector a sentence, `[batch, tokens, 384]` -> `[batch, 384]`.

        Args:
            pooling: Takes token vectors and the mask, as `MeanPooling` does.
            token_embeddings: What `BertModel` makes of this batch.
        """
        return pooling(token_embeddings, self.attention_mask)


class Pipeline(nn.Module):
    """The model: its three stages, its tokenizer, and the settings that its folder has.

    Attributes:
        bert: `BertModel`, token ids -> token vectors.
        pooling: `MeanPooling` or `ClsPooling`, token vectors -> one vector.
        normalize: `Normalize`, or `nn.Identity` in a model without that stage.
        tokenizer: `WordPieceTokenizer`, or None if none was given.
        prompts: Texts to put in front of sentences, by name: `encode(prompt_name=...)`.
        default_prompt_name: The one that `encode` uses if none is asked for; None for none.
        source: Where the files came from, with their SHA-256; None for a model made of `modules`.
        in_int8: Whether `encode` computes the products of float32 weights in 8 bits, on a CPU.
    """

    _rounds = False  # whether it was loaded with `reproducible=True`
    in_int8 = False

    def forward(self, features: Batch | Mapping[str, Any]) -> dict[str, Any]:
        """Token ids -> sentence vectors.

        Args:
            features: A `Batch`; or a dict of what a padded one has, as `tokenize` gives it:
                `input_ids` and `attention_mask`, int64 `[batch, tokens]`, and `token_type_ids`
                and `position_ids` where they are not the default.

        Returns:
            `token_embeddings` `[batch, tokens, 384]` and `sentence_embedding` `[batch, 384]`,
            behind all that a dict of features has.
        """
        batch = _as_batch(features)
        token_embeddings = self.bert(  # [batch, tokens] -> [batch, tokens, 384]
            batch.input_ids,
            batch.attention_mask,
            batch.token_type_ids,
            batch.position_ids,
            batch.attend,
        )
        pooled = batch.pool(self.pooling, token_embeddings)  # -> [batch, 384]
        sentence_embedding = self.normalize(pooled)  # each row of length 1
        given = features if isinstance(features, Mapping) else {}
        return {
            **given,
            "token_embeddings": token_embeddings,
            "sentence_embedding": sentence_embedding,
        }

    def __init__(
        self,
        modules: Sequence[nn.Module],
        tokenizer: WordPieceTokenizer | None = None,
        max_seq_length: int | None = None,
    ) -> None:
        """Compose a model.

        Args:
            modules: `[bert, pooling]` or `[bert, pooling, normalize]`.
            tokenizer: What goes with them to read text.
            max_seq_length: By default as many as there are positions.

        Raises:
            InputTypeError: These are not such modules.
            InputError: The tokenizer gives ids that `bert` has no vector for.
        """
        super().__init__()
        self.bert, self.pooling, self.normalize = _as_stages(modules)
        config = self.bert.config
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            largest, rows = tokenizer.vocab_size - 1, config.vocab_size
            raise InputError(f"tokenizer gives ids up to {largest}, of {rows} words", "tokenizer")
        self.tokenizer = tokenizer
        longest = config.max_position_embeddings
        self.max_seq_length = longest if max_seq_length is None else max_seq_length
        self.training = self.bert.training
        self.prompts: dict[str, str] = {}
        self.default_prompt_name: str | None = None
        self.similarity_fn_name = "cosine"
        self.truncate_dim = None
        self.source: ModelFiles | None = None

    # --- what it is made of

    def get_tokenizer(self) -> WordPieceTokenizer:
        """Return the tokenizer.

        Raises:
            InputError: The model was made of modules without one.
        """
        if self.tokenizer is None:
            raise InputError("tokenizer is None; pass tokenizer= with modules=", "tokenizer")
        return self.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.bert.embeddings.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What `encode` computes the products in: `weights_dtype`, or int8."""
        dtype = self.weights_dtype
        is_usual = dtype == torch.float32 and self.device.type == "cpu"
        return torch.int8 if self.in_int8 and is_usual else dtype

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the weight matrices, in which a plain call computes the products."""
        weights = (part.weight for part in self.bert.modules() if isinstance(part, nn.Linear))
        return next(weights, self.bert.embeddings.word_embeddings.weight).dtype

    @property
    def reproducible(self) -> bool:
        """Whether `encode` gives vectors computed in float64 and rounded once, to float32: the same
        on every machine. So it was loaded, and not converted to another dtype since.
        """
        return self._rounds and all(part.dtype == torch.float64 for part in self.parameters())

    def rounded(self, vectors: Tensor) -> Tensor:
        """Round what was computed to float32 if the model is `reproducible`; any shape."""
        return vectors.float() if self.reproducible else vectors

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the model, as `nn.Module.to`. Asked for a dtype, it is in int8 no more.

        Raises:
            InputError: A device can't be used; the message names it.
        """
        given = (*args, *kwargs.values())
        dtype = next((kind for kind in given if isinstance(kind, torch.dtype)), None)
        for device in given:
            if isinstance(device, str | torch.device):
                inputs.as_device(device, dtype or self.weights_dtype)
        if dtype is not None:
            self.in_int8 = False
        # Parameters stay ordinary tensors wherever we are, unless they were copied in such a place.
        with torch.inference_mode(any(part.is_inference() for part in self.parameters())):
            return super().to(*args, **kwargs)

    def float(self) -> Self:
        """Convert the model, as `nn.Module.float`; it is in int8 no more."""
        self.in_int8 = False
        return super().float()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add the stage that scales to length 1, if there is none.

        Raises:
            InputError: The name is not that of a stage.
        """
        if isinstance(module, Normalize) and isinstance(self.normalize, nn.Identity):
            name = "normalize"
        inputs.check_choice(name, ("bert", "pooling", "normalize"), "name")
        super().add_module(name, module)

    def __iter__(self) -> Iterator[nn.Module]:
        """Iterate over the stages in order, without those that do nothing."""
        stages: list[nn.Module] = [self.bert, self.pooling, self.normalize]
        return (stage for stage in stages if not isinstance(stage, nn.Identity))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: int) -> nn.Module:
        return list(iter(self))[index]

    def __repr__(self) -> str:
        config = self.bert.config
        bert = f"layers={config.num_hidden_layers}, hidden_size={config.hidden_size}, "
        bert += f"heads={config.num_attention_heads}, max_seq_length={self.max_seq_length}"
        lines = [
            f"  ({i}): {type(stage).__name__}({'' if i else bert})\n"
            for i, stage in enumerate(self)
        ]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    # --- settings

    @property
    def max_seq_length(self) -> int:
        """The longest input in tokens, [CLS] and [SEP] included; longer text is cut.

        Settable, from 3 to the number of rows of the position table (512).
        """
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        longest = self.bert.config.max_position_embeddings
        self._max_seq_length = inputs.check_in_range(value, 3, longest, "max_seq_length")

    @property
    def similarity_fn_name(self) -> str:
        """The function of `similarity`: "cosine", "dot", "euclidean" or "manhattan". Settable."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: str | SimilarityFunction) -> None:
        name = value.value if isinstance(value, SimilarityFunction) else value
        self._similarity_fn_name = inputs.check_choice(
            name, SIMILARITY_FUNCTIONS, "similarity_fn_name"
        )

    @property
    def truncate_dim(self) -> int | None:
        """How many numbers of each vector `encode` keeps by default; None for all.

        Settable; inside of `truncate_embeddings` until that ends.
        """
        inside = self._truncation()
        return self._truncate_dim if inside is None else inside.truncate_dim

    @truncate_dim.setter
    def truncate_dim(self, value: int | None) -> None:
        inside = self._truncation()
        if inside is None:
            self._truncate_dim = _as_width(value)
        else:
            inside.truncate_dim = _as_width(value)

    @contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Keep `truncate_dim` numbers of each vector by default, inside a `with`.

        This holds for calls of this thread, or of this `asyncio` task and those that it starts.
        Other threads have a default of their own; pass `truncate_dim` to the calls that they make.
        """
        inside = _Truncation(weakref.ref(self), _as_width(truncate_dim))
        _truncations.set((*_truncations.get(), inside))
        try:
            yield
        finally:
            # Not what was before: others may have ended meanwhile, as in two generators by turns.
            inside.is_open = False
            _truncations.set(tuple(each for each in _truncations.get() if each.is_open))

    def _truncation(self) -> "_Truncation | None":
        """Return the innermost `truncate_embeddings` that is open here."""
        found = (each for each in reversed(_truncations.get()) if each.owner() is self)
        return next((each for each in found if each.is_open), None)

    def get_sentence_embedding_dimension(self) -> int:
        """The width of an embedding: 384, or less with `truncate_dim`."""
        full = self.bert.config.hidden_size
        return min(self.truncate_dim or full, full)


@dataclass(eq=False)
class _Truncation:
    """One `with pipeline.truncate_embeddings(...)`."""

    owner: "weakref.ref[Pipeline]"
    truncate_dim: int | None
    is_open: bool = True


# Those of this thread or task, the innermost last. An attribute of the model would be that of all
# threads: two whose `with` overlap would each put back what the other had set.
_truncations: ContextVar[tuple[_Truncation, ...]] = ContextVar("minilm_truncations", default=())


def _as_batch(features: Batch | Mapping[str, Any]) -> Batch:
    if isinstance(features, Batch):
        return features
    if not isinstance(features, Mapping):
        raise InputTypeError("features is not a dict; encode(...) takes texts", "features")
    return Batch(
        features["input_ids"],
        features["attention_mask"],
        features.get("token_type_ids"),
        features.get("position_ids"),
    )


def _as_stages(modules: Sequence[nn.Module]) -> tuple[BertModel, nn.Module, nn.Module]:
    """Check the stages; a missing Normalize becomes one that does nothing."""
    kinds = (BertModel, nn.Module, nn.Module)
    stages = [*modules, nn.Identity().eval()] if len(modules) == 2 else list(modules)
    if len(stages) != 3 or not all(map(isinstance, stages, kinds)):
        given = ", ".join(type(module).__name__ for module in modules)
        raise InputTypeError(
            f"modules is [{given}]; pass [BertModel, pooling] or [BertModel, pooling, Normalize]",
            "modules",
        )
    return tuple(stages)  # type: ignore[return-value]  # checked just above


def _as_width(value: Any) -> int | None:
    return None if value is None else inputs.check_positive_int(value, "truncate_dim")

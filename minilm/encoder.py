"""`SentenceEncoder`: text in, one unit vector for each text out.

This is where the pieces meet: text -> token ids (`tokenizer.py`) -> token vectors (`bert.py`) ->
mean over real tokens -> length 1 (`pooling.py`). `forward` is that pipeline; `encode` adds what a
caller expects around it: any iterable of texts, batches, order, NumPy.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from minilm import folder, hub
from minilm.bert import BertModel
from minilm.errors import InputError, InputTypeError
from minilm.eval_mode import eval_mode
from minilm.inputs import as_device, as_dtype, as_texts, check_choice, check_positive_int
from minilm.similarity import SIMILARITY_FUNCTIONS, Embeddings
from minilm.tokenizer import WordPieceTokenizer

__all__ = ["SentenceEncoder"]

logger = logging.getLogger(__name__)


class SentenceEncoder(nn.Module):
    """Maps sentences and paragraphs to vectors whose dot product is their similarity.

    Attributes:
        bert: `BertModel`, token ids -> token vectors.
        pooling: `MeanPooling` or `ClsPooling`, token vectors -> one vector.
        normalize: `Normalize`, or `nn.Identity` in a model without that stage.
        tokenizer: `WordPieceTokenizer`, or None if none was given.
        similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan": what `similarity` does.
        source: Where the files came from, with their SHA-256; None for a model made of `modules`.
    """

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Token ids -> sentence vectors.

        Args:
            features: `input_ids` and `attention_mask`, int64 `[batch, tokens]`, as `tokenize`
                gives them; `token_type_ids` likewise, all 0 by default.

        Returns:
            The features, and with them `token_embeddings` `[batch, tokens, 384]` and
            `sentence_embedding` `[batch, 384]`.
        """
        token_embeddings = self.bert(  # [batch, tokens] -> [batch, tokens, 384]
            features["input_ids"], features["attention_mask"], features.get("token_type_ids")
        )
        pooled = self.pooling(token_embeddings, features["attention_mask"])  # [batch, 384]
        sentence_embedding = self.normalize(pooled)  # [batch, 384], each row of length 1
        return features | {
            "token_embeddings": token_embeddings,
            "sentence_embedding": sentence_embedding,
        }

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        modules: Sequence[nn.Module] | None = None,
        tokenizer: WordPieceTokenizer | None = None,
        max_seq_length: int | None = None,
        similarity_fn_name: str | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a model by its name or folder, or compose one from modules.

        Args:
            model_name_or_path: See `from_pretrained`, as for the arguments from `revision` on.
            modules: Instead of a name: `[bert, pooling]` or `[bert, pooling, normalize]`.
            tokenizer: What goes with `modules` to read text.
            max_seq_length: Instead of the loaded model's, or of as many as there are positions.
            similarity_fn_name: Instead of the loaded model's, or of "cosine".

        Raises:
            MinilmError: As in `from_pretrained`; an InputError if not one of the two is given.
        """
        super().__init__()
        if (model_name_or_path is None) == (modules is None):
            raise InputError(
                "model_name_or_path or modules: pass one of the two; "
                "SentenceEncoder.from_pretrained() loads the published model",
                "model_name_or_path",
            )
        if tokenizer and modules is None:
            raise InputError("tokenizer goes with modules; a named model has its own", "tokenizer")
        # Checked before 90 MB are fetched for nothing. Modules stay where and what they are.
        target = None if modules and device is None else as_device(device)
        kind = None if modules and dtype is None else as_dtype(dtype)
        self.source: hub.ModelFiles | None = None
        if model_name_or_path is not None:
            self.source = hub.locate(
                model_name_or_path,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
            parts = folder.read_model(self.source, as_dtype(dtype))
            modules, tokenizer = parts.build(), parts.tokenizer
            max_seq_length = parts.max_seq_length if max_seq_length is None else max_seq_length
            similarity_fn_name = similarity_fn_name or parts.similarity_fn_name
        self.bert, self.pooling, self.normalize = _stages(modules or [])
        self.similarity_fn_name = check_choice(
            similarity_fn_name or "cosine", SIMILARITY_FUNCTIONS, "similarity_fn_name"
        )
        config = self.bert.config
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            largest, rows = tokenizer.vocab_size - 1, config.vocab_size
            raise InputError(f"tokenizer gives ids up to {largest}, of {rows} words", "tokenizer")
        self.tokenizer = tokenizer
        longest = config.max_position_embeddings
        self.max_seq_length = longest if max_seq_length is None else max_seq_length
        self.training = self.bert.training
        self.to(target, kind)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = hub.DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "SentenceEncoder":
        """Load a model, by default the published all-MiniLM-L6-v2.

        Args:
            name_or_path: A folder in the sentence-transformers format, or a name on the Hugging
                Face Hub. What the Hub cache has is used without a network call.
            revision: A commit, branch or tag of the Hub; by default the pinned commit for the
                published model, whose files are verified by SHA-256, and "main" for others.
            device: By default cuda, else mps, else cpu.
            dtype: What to compute in: float64, float32 (default), float16 or bfloat16, as a
                torch.dtype or its name.
            cache_dir: The Hub cache, by default huggingface_hub's.
            token: An access token for the Hub, or True for the stored one.
            local_files_only: Never use the network.

        Raises:
            ModelNotFoundError: The model is in none of the places looked at.
            HashMismatchError: A file of the published model is damaged.
            ConfigError, TokenizerError, WeightsError, ModelFolderError: The files of the model
                are broken, or ask for what is not implemented.
            InputError: The device or dtype can't be used.
        """
        return cls(
            name_or_path,
            revision=revision,
            device=device,
            dtype=dtype,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )

    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        convert_to_numpy: Literal[True] = ...,
        convert_to_tensor: Literal[False] = ...,
        device: str | torch.device | None = ...,
    ) -> np.ndarray[Any, Any]: ...

    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        convert_to_numpy: bool = ...,
        *,
        convert_to_tensor: Literal[True],
        device: str | torch.device | None = ...,
    ) -> Tensor: ...

    @overload
    def encode(  # type: ignore[overload-overlap]  # a str is an iterable of str too
        self,
        sentences: str,
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        *,
        convert_to_numpy: Literal[False],
        convert_to_tensor: bool = ...,
        device: str | torch.device | None = ...,
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        sentences: Iterable[str],
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        *,
        convert_to_numpy: Literal[False],
        convert_to_tensor: Literal[False] = ...,
        device: str | torch.device | None = ...,
    ) -> list[Tensor]: ...

    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        convert_to_numpy: bool = ...,
        convert_to_tensor: bool = ...,
        device: str | torch.device | None = ...,
    ) -> np.ndarray[Any, Any] | Tensor | list[Tensor]: ...

    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
    ) -> np.ndarray[Any, Any] | Tensor | list[Tensor]:
        """Embed texts.

        Args:
            sentences: A str, or any iterable of str: list, generator, NumPy array, pandas or
                polars Series, Arrow array. Text beyond `max_seq_length` tokens is not read, and a
                `TruncationWarning` says how much that was.
            batch_size: Sentences computed at a time; None leaves it to the library (now 32).
            show_progress_bar: By default only if this package's logger is at INFO or below.
            convert_to_numpy: Give NumPy arrays, else tensors on the model's device.
            convert_to_tensor: Give one tensor, whatever `convert_to_numpy` says.
            device: Move the model there first, and leave it there.

        Returns:
            One vector `[384]` for a str, else `[n, 384]` in the order given, with n = 0 too. Its
            dtype is the model's; NumPy has no bfloat16 and gets float32. With `convert_to_numpy`
            and `convert_to_tensor` both false, a list of n tensors `[384]`.

        Raises:
            InputTypeError: Something is no text; the message names the row.
            InputError: A text has a lone surrogate, or an argument's value can't be used.
        """
        texts, is_single = as_texts(sentences)
        batch_size = 32 if batch_size is None else check_positive_int(batch_size, "batch_size")
        if device is not None:
            self.to(as_device(device))
        if show_progress_bar is None:
            show_progress_bar = logger.isEnabledFor(logging.INFO)
        to_numpy = convert_to_numpy and not convert_to_tensor
        output_device = "cpu" if to_numpy else self.device

        tokens = self._tokenizer(texts, self.max_seq_length)
        tokens.warn_if_cut(stacklevel=2)
        # Like lengths together: little padding. The longest first: memory runs out now or never.
        order = sorted(range(len(tokens)), key=lambda row: -len(tokens.input_ids[row]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        if show_progress_bar:
            from tqdm.auto import tqdm  # comes with huggingface_hub

            batches = tqdm(batches, desc="Batches")
        size = (len(tokens), self.get_sentence_embedding_dimension())
        # Ordinary tensors, usable in training, but without a gradient of their own.
        with torch.inference_mode(False), torch.no_grad(), eval_mode(self):
            embeddings = torch.empty(size, dtype=self.dtype, device=output_device)
            for rows in batches:
                features = self._tokenizer.pad([tokens.input_ids[row] for row in rows], self.device)
                embeddings[rows] = self(features)["sentence_embedding"].to(embeddings)

        if to_numpy:
            array = (embeddings.float() if self.dtype == torch.bfloat16 else embeddings).numpy()
            return array[0] if is_single else array
        if is_single:
            return embeddings[0]
        return embeddings if convert_to_tensor else list(embeddings)

    def tokenize(self, sentences: str | Iterable[str]) -> dict[str, Tensor]:
        """Texts -> the features that `forward` takes, as one padded batch on the model's device.

        Returns:
            `input_ids`, `token_type_ids`, `attention_mask`, int64 `[n, tokens]`, cut at
            `max_seq_length`.

        Raises:
            InputTypeError, InputError: As in `encode`; also for no text at all.
        """
        texts, _ = as_texts(sentences)
        if not texts:
            raise InputError("sentences is empty; pass at least one", "sentences")
        tokens = self._tokenizer(texts, self.max_seq_length)
        tokens.warn_if_cut(stacklevel=2)
        return self._tokenizer.pad(tokens.input_ids, self.device)

    def similarity(self, embeddings1: Embeddings, embeddings2: Embeddings) -> Tensor:
        """How alike each vector of one set is to each of another, `[n, 384] x [m, 384] -> [n, m]`.

        The cosine, unless the model names another function. See `minilm.similarity.cos_sim`.
        """
        return SIMILARITY_FUNCTIONS[self.similarity_fn_name][0](embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Embeddings, embeddings2: Embeddings) -> Tensor:
        """The same row by row, `[n, 384] x [n, 384] -> [n]`."""
        return SIMILARITY_FUNCTIONS[self.similarity_fn_name][1](embeddings1, embeddings2)

    @property
    def max_seq_length(self) -> int:
        """The longest input in tokens, [CLS] and [SEP] included; longer text is cut.

        Settable, from 3 to the number of rows of the position table (512).
        """
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        longest = self.bert.config.max_position_embeddings
        if not 3 <= check_positive_int(value, "max_seq_length") <= longest:
            raise InputError(
                f"max_seq_length is {value}; pass an integer from 3 to {longest}", "max_seq_length"
            )
        self._max_seq_length = int(value)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.bert.embeddings.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of the embeddings."""
        return self.bert.embeddings.word_embeddings.weight.dtype

    def get_sentence_embedding_dimension(self) -> int:
        """The width of an embedding: 384."""
        return self.bert.config.hidden_size

    def to(self, *args: Any, **kwargs: Any) -> "SentenceEncoder":
        """Move or convert the model, as `nn.Module.to`; a device that can't be used is named."""
        for device in (*args[:1], kwargs.get("device")):
            if isinstance(device, str | torch.device):
                as_device(device)
        with torch.inference_mode(False):  # parameters stay ordinary tensors wherever we are
            return super().to(*args, **kwargs)

    def __iter__(self) -> Iterator[nn.Module]:
        """The stages in order; those that do nothing left out."""
        stages: list[nn.Module] = [self.bert, self.pooling, self.normalize]
        return (stage for stage in stages if not isinstance(stage, nn.Identity))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: int) -> nn.Module:
        return list(iter(self))[index]

    def __repr__(self) -> str:
        config = self.bert.config
        bert = (
            f"layers={config.num_hidden_layers}, hidden_size={config.hidden_size}, "
            f"heads={config.num_attention_heads}, max_seq_length={self.max_seq_length}"
        )
        lines = [
            f"  ({i}): {type(stage).__name__}({'' if i else bert})\n"
            for i, stage in enumerate(self)
        ]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    @property
    def _tokenizer(self) -> WordPieceTokenizer:
        if self.tokenizer is None:
            raise InputError("tokenizer is None; pass tokenizer= with modules=", "tokenizer")
        return self.tokenizer


def _stages(modules: Sequence[nn.Module]) -> tuple[BertModel, nn.Module, nn.Module]:
    kinds = (BertModel, nn.Module, nn.Module)
    stages = [*modules, nn.Identity().eval()] if len(modules) == 2 else list(modules)
    if len(stages) != 3 or not all(map(isinstance, stages, kinds)):
        given = ", ".join(type(module).__name__ for module in modules)
        raise InputTypeError(
            f"modules is [{given}]; pass [BertModel, pooling] or [BertModel, pooling, Normalize]",
            "modules",
        )
    return tuple(stages)  # type: ignore[return-value]  # checked just above

"""`SentenceEncoder`: text in, one unit vector for each text out.

This is where the pieces meet: text -> token ids (`tokenizer.py`) -> token vectors (`bert.py`) ->
mean over real tokens -> length 1 (`pooling.py`). `forward` is that pipeline; `encode` adds what a
caller expects around it: any iterable of texts, batches, order, NumPy.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from operator import call
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from torch import Tensor, nn

from minilm import folder, hub, inputs
from minilm.errors import InputError
from minilm.eval_mode import eval_mode
from minilm.inside import LookInside
from minilm.kernels import accelerate, fast_products
from minilm.packed import batch_limits, keeps_bits, make_features, plan_batches
from minilm.similarity import SIMILARITY_FUNCTIONS, Embeddings
from minilm.tokenizer import WordPieceTokenizer

__all__ = ["SentenceEncoder"]


class SentenceEncoder(LookInside, nn.Module):
    """Maps sentences and paragraphs to vectors whose dot product is their similarity.

    Attributes:
        bert: `BertModel`, token ids -> token vectors.
        pooling: `MeanPooling` or `ClsPooling`, token vectors -> one vector.
        normalize: `Normalize`, or `nn.Identity` in a model without that stage.
        tokenizer: `WordPieceTokenizer`, or None if none was given.
        similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan": what `similarity` does.
        source: Where the files came from, with their SHA-256; None for a model made of `modules`.
    """

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Token ids -> sentence vectors.

        Args:
            features: `input_ids` and `attention_mask`, int64 `[batch, tokens]`, as `tokenize`
                gives them; `token_type_ids` likewise, all 0 by default. Or a batch without
                padding, `[total_tokens]`: see `PackedBatch.features`.

        Returns:
            The features, and with them `token_embeddings` `[batch, tokens, 384]` and
            `sentence_embedding` `[batch, 384]`.
        """
        token_embeddings = self.bert(  # [batch, tokens] -> [batch, tokens, 384]
            features["input_ids"],
            features["attention_mask"],
            features.get("token_type_ids"),
            features.get("position_ids"),
            features.get("attend"),
        )
        per_sentence = features.get("per_sentence", call)  # call(f, x, y) is f(x, y)
        pooled = per_sentence(self.pooling, token_embeddings, features["attention_mask"])
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
        kind = None if modules and dtype is None else inputs.as_dtype(dtype)
        target = None if modules and device is None else inputs.as_device(device, kind)
        self.source: hub.ModelFiles | None = None
        if model_name_or_path is not None:
            self.source = hub.locate(
                model_name_or_path,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
            parts = folder.read_model(self.source, inputs.as_dtype(dtype))
            modules, tokenizer = parts.build(), parts.tokenizer
            max_seq_length = parts.max_seq_length if max_seq_length is None else max_seq_length
            similarity_fn_name = similarity_fn_name or parts.similarity_fn_name
        self.bert, self.pooling, self.normalize = folder.as_stages(modules or [])
        self.similarity_fn_name = inputs.check_choice(
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
        mixed = kind == torch.bfloat16  # for the products only; sums and norms stay float32
        accelerate(self.bert, kind if mixed else None)
        self.to(target, None if mixed else kind)

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
                torch.dtype or its name. With bfloat16 the matrix products are, which take nearly
                all of the time; what is added up between them stays float32.
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
        *,
        convert_to_numpy: Literal[True] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[inputs.EncodeOptions],
    ) -> np.ndarray[Any, Any]: ...

    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        convert_to_numpy: bool = ...,
        convert_to_tensor: Literal[True],
        **options: Unpack[inputs.EncodeOptions],
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        convert_to_numpy: bool = ...,
        convert_to_tensor: bool = ...,
        **options: Unpack[inputs.EncodeOptions],
    ) -> np.ndarray[Any, Any] | Tensor | list[Tensor]: ...

    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        token_budget: int | None = None,
    ) -> np.ndarray[Any, Any] | Tensor | list[Tensor]:
        """Embed texts.

        Args:
            sentences: A str, or any iterable of str: list, generator, NumPy array, pandas or
                polars Series, Arrow array. Text beyond `max_seq_length` tokens is not read, and a
                `TruncationWarning` says how much that was.
            batch_size: Sentences computed at a time, at most; None sets no limit.
            show_progress_bar: By default only if this package's logger is at INFO or below.
            convert_to_numpy: Give NumPy arrays, else tensors on the model's device.
            convert_to_tensor: Give one tensor, whatever `convert_to_numpy` says.
            device: Move the model there first, and leave it there.
            token_budget: Tokens computed at a time, at most, if no sentence is longer; by default
                as many as were fastest for this dtype. Neither limit changes a vector.

        Returns:
            One vector `[384]` for a str, else `[n, 384]` in the order given, with n = 0 too. Its
            dtype is float32, or that which the whole model was converted to; NumPy has no
            bfloat16 and gets float32. With `convert_to_numpy` and `convert_to_tensor` both false,
            a list of n tensors `[384]`.

        Raises:
            InputTypeError: Something is no text; the message names the row.
            InputError: A text has a lone surrogate, or an argument's value can't be used.
        """
        texts, is_single = inputs.as_texts(sentences)
        limits = batch_limits(self.dtype, batch_size, token_budget)
        if device is not None:
            self.to(inputs.as_device(device))
        to_numpy = convert_to_numpy and not convert_to_tensor

        tokens = self._tokenizer(texts, self.max_seq_length)
        first_row = sentences.first_row if isinstance(sentences, inputs.Window) else None
        tokens.warn_if_cut(2 if first_row is None else 3, first_row or 0)  # 3: by encode_stream
        lengths = list(map(len, tokens.input_ids))
        batches = plan_batches(lengths, *limits)
        with torch.inference_mode(False), torch.no_grad():  # ordinary, usable in training
            dtype, device = self.bert.embeddings.word_embeddings.weight.dtype, self.device
            size = (len(lengths), self.get_sentence_embedding_dimension())
            embeddings = torch.empty(size, dtype=dtype, device="cpu" if to_numpy else device)
        with torch.inference_mode(), eval_mode(self) as parts, fast_products(parts, sum(lengths)):
            for rows in inputs.with_progress(batches, show_progress_bar):
                embeddings[rows] = self._embed([tokens.input_ids[i] for i in rows]).to(embeddings)

        if to_numpy:
            array = (embeddings.float() if dtype == torch.bfloat16 else embeddings).numpy()
            return array[0] if is_single else array
        if is_single:
            return embeddings[0]
        return embeddings if convert_to_tensor else list(embeddings)

    def encode_stream(
        self,
        sentences: Iterable[str],
        *,
        window: int = 4096,
        **options: Unpack[inputs.EncodeOptions],
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Embed texts one after the other, however many come: `encode` in bounded memory.

        An error comes when its text's turn does.

        Args:
            sentences: An iterable of str.
            window: Texts read and held at a time.
            options: As in `encode`.

        Yields:
            One vector `[384]` for each text, in order.
        """
        for texts in inputs.windows(sentences, inputs.check_positive_int(window, "window")):
            yield from self.encode(texts, **options)

    def _embed(self, input_ids: list[list[int]]) -> Tensor:
        """One pass: rows of ids -> `[n, 384]`."""
        features = make_features(input_ids, self.tokenizer, self.device)
        sentence_embedding: Tensor = self(features)["sentence_embedding"]
        return sentence_embedding

    @property
    def deterministic(self) -> bool:
        """Whether a text gets the same bits alone, in any batch and in any order: tried now, with
        this processor, number of threads and dtype.
        """
        with torch.inference_mode(), eval_mode(self) as parts, fast_products(parts, tokens=0):
            return keeps_bits(self._embed, self.bert.config.vocab_size, self.max_seq_length)

    def tokenize(self, sentences: str | Iterable[str]) -> dict[str, Tensor]:
        """Texts -> the features that `forward` takes, as one padded batch on the model's device.

        Returns:
            `input_ids`, `token_type_ids`, `attention_mask`, int64 `[n, tokens]`, cut at
            `max_seq_length`.

        Raises:
            InputTypeError, InputError: As in `encode`; also for no text at all.
        """
        texts, _ = inputs.as_texts(sentences)
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
        self._max_seq_length = inputs.check_in_range(value, 3, longest, "max_seq_length")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.bert.embeddings.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight matrices: what the products are computed in."""
        weights = (part.weight for part in self.bert.modules() if isinstance(part, nn.Linear))
        return next(weights, self.bert.embeddings.word_embeddings.weight).dtype

    def get_sentence_embedding_dimension(self) -> int:
        """The width of an embedding: 384."""
        return self.bert.config.hidden_size

    def to(self, *args: Any, **kwargs: Any) -> "SentenceEncoder":
        """Move or convert the model, as `nn.Module.to`; a device that can't be used is named."""
        given = (*args, *kwargs.values())
        dtype = next((kind for kind in given if isinstance(kind, torch.dtype)), self.dtype)
        for device in given:
            if isinstance(device, str | torch.device):
                inputs.as_device(device, dtype)
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
        bert = f"layers={config.num_hidden_layers}, hidden_size={config.hidden_size}, "
        bert += f"heads={config.num_attention_heads}, max_seq_length={self.max_seq_length}"
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

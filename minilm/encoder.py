"""`SentenceEncoder`: text in, one unit vector for each text out.

This is where the pieces meet: text -> token ids (`tokenizer.py`) -> token vectors (`bert.py`) ->
mean over real tokens -> length 1 (`pooling.py`). `forward` is that pipeline; `encode.py` adds what
a caller expects around it: any iterable of texts, batches, order, NumPy.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from operator import call
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from minilm import folder, hub, inputs
from minilm.encode import PLACES, Encode, prompt_of
from minilm.errors import InputError, InputTypeError
from minilm.eval_mode import eval_mode, set_mode
from minilm.fingerprint import Fingerprint, fingerprint_of
from minilm.inputs import EncodeOptions
from minilm.inside import LookInside
from minilm.kernels import accelerate, fast_products
from minilm.options import DEFAULT_PROMPTS, LoadOptions, load_options
from minilm.packed import keeps_bits, make_features
from minilm.pooling import Normalize
from minilm.save import save_pretrained
from minilm.similarity import SIMILARITY_FUNCTIONS, Embeddings, SimilarityFunction
from minilm.tokenizer import WordPieceTokenizer

__all__ = ["SentenceEncoder"]


class SentenceEncoder(Encode, LookInside, nn.Module):
    """Maps sentences and paragraphs to vectors whose dot product is their similarity.

    Attributes:
        bert: `BertModel`, token ids -> token vectors.
        pooling: `MeanPooling` or `ClsPooling`, token vectors -> one vector.
        normalize: `Normalize`, or `nn.Identity` in a model without that stage.
        tokenizer: `WordPieceTokenizer`, or None if none was given.
        prompts: Texts to put in front of sentences, by name: `encode(prompt_name=...)`.
        default_prompt_name: The one that `encode` uses if none is asked for; None for none.
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
        if not isinstance(features, Mapping):
            raise InputTypeError("features is no dict; encode(...) takes texts", "features")
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
        **options: Unpack[LoadOptions],
    ) -> None:
        """Load a model by its name or folder, or compose one from modules.

        Args:
            model_name_or_path: See `from_pretrained`, as for the options.
            modules: Instead of a name: `[bert, pooling]` or `[bert, pooling, normalize]`.
            tokenizer: What goes with `modules` to read text.
            max_seq_length: Instead of the loaded model's, or of as many as there are positions.

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
        wanted = load_options(options)
        dtype, device = wanted.dtype, wanted.device
        kind = None if modules and dtype is None else inputs.as_dtype(dtype)
        target = None if modules and device is None else inputs.as_device(device, kind)
        self.source: hub.ModelFiles | None = None
        prompts, default_prompt_name = dict(DEFAULT_PROMPTS), wanted.default_prompt_name
        similarity_fn_name, truncate_dim = wanted.similarity_fn_name, wanted.truncate_dim
        if model_name_or_path is not None:
            self.source = hub.locate(model_name_or_path, **wanted.where)
            parts = folder.read_model(self.source, inputs.as_dtype(dtype))
            modules, tokenizer = parts.build(), parts.tokenizer
            max_seq_length = parts.max_seq_length if max_seq_length is None else max_seq_length
            similarity_fn_name = similarity_fn_name or parts.similarity_fn_name
            prompts |= parts.prompts
            default_prompt_name = default_prompt_name or parts.default_prompt_name
            truncate_dim = parts.truncate_dim if truncate_dim is None else truncate_dim
        self.prompts = prompts | wanted.prompts
        if default_prompt_name is not None:
            prompt_of(self.prompts, default_prompt_name, "default_prompt_name")
        self.default_prompt_name = default_prompt_name
        self.bert, self.pooling, self.normalize = folder.as_stages(modules or [])
        self.similarity_fn_name = similarity_fn_name or "cosine"
        self.truncate_dim = truncate_dim
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
        **options: Unpack[LoadOptions],
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
            prompts: Texts that `encode(prompt_name=...)` puts in front of every sentence, by name.
            default_prompt_name: The one to use if none is asked for.
            similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan": what `similarity` does.
            truncate_dim: How many numbers of each vector `encode` keeps by default.
            cache_dir: The Hub cache, by default `SENTENCE_TRANSFORMERS_HOME`, else
                huggingface_hub's. `cache_folder` is the same.
            token: An access token for the Hub, or True for the stored one. It is kept nowhere: a
                pickle that has to read the model anew uses `HF_TOKEN` or the login of where it is.
            local_files_only: Never use the network.
            options: What sentence-transformers takes besides: see `LoadOptions`.

        Raises:
            ModelNotFoundError: The model is in none of the places looked at.
            HashMismatchError: A file of the published model is damaged.
            ConfigError, TokenizerError, WeightsError, ModelFolderError: The files of the model
                are broken, or ask for what is not implemented.
            InputError: The device or dtype can't be used, or an option has no effect here.
        """
        return cls(name_or_path, **options)

    def _embed(
        self, input_ids: list[list[int]], token_type_ids: list[list[int]] | None = None
    ) -> Tensor:
        """One pass: rows of ids -> `[n, 384]`."""
        features = make_features(input_ids, self.tokenizer, self.device, token_type_ids)
        sentence_embedding: Tensor = self(features)["sentence_embedding"]
        return sentence_embedding

    @property
    def deterministic(self) -> bool:
        """Whether a text gets the same bits alone, in any batch and in any order: tried now, with
        this processor, number of threads and dtype.
        """
        with torch.inference_mode(), eval_mode(self) as parts, fast_products(parts, tokens=0):
            return keeps_bits(self._embed, self.bert.config.vocab_size, self.max_seq_length)

    def similarity(self, embeddings1: Embeddings, embeddings2: Embeddings) -> Tensor:
        """How alike each vector of one set is to each of another, `[n, 384] x [m, 384] -> [n, m]`.

        The cosine, unless the model names another function. See `minilm.similarity.cos_sim`.
        """
        return SIMILARITY_FUNCTIONS[self.similarity_fn_name][0](embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Embeddings, embeddings2: Embeddings) -> Tensor:
        """The same row by row, `[n, 384] x [n, 384] -> [n]`."""
        return SIMILARITY_FUNCTIONS[self.similarity_fn_name][1](embeddings1, embeddings2)

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` does: "cosine", "dot", "euclidean" or "manhattan". Settable."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: str | SimilarityFunction) -> None:
        name = value.value if isinstance(value, SimilarityFunction) else value
        self._similarity_fn_name = inputs.check_choice(
            name, SIMILARITY_FUNCTIONS, "similarity_fn_name"
        )

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

    def get_max_seq_length(self) -> int:
        """`max_seq_length`."""
        return self.max_seq_length

    def train(self, mode: bool = True) -> "SentenceEncoder":
        """Switch dropout on or off, as `nn.Module.train`; `encode` never has any.

        While another thread is in `encode` the mode is that, and is switched when it has ended.
        """
        set_mode(self, mode)
        return self

    def to(self, *args: Any, **kwargs: Any) -> "SentenceEncoder":
        """Move or convert the model, as `nn.Module.to`; a device that can't be used is named."""
        given = (*args, *kwargs.values())
        dtype = next((kind for kind in given if isinstance(kind, torch.dtype)), self.dtype)
        for device in given:
            if isinstance(device, str | torch.device):
                inputs.as_device(device, dtype)
        # Parameters stay ordinary tensors wherever we are, unless they were copied in such a place.
        with torch.inference_mode(any(part.is_inference() for part in self.parameters())):
            return super().to(*args, **kwargs)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add the stage that scales to length 1, where there is none; no other has a place here.

        Raises:
            InputError: It is something else.
        """
        if isinstance(module, Normalize) and isinstance(self.normalize, nn.Identity):
            name = "normalize"
        inputs.check_choice(name, ("bert", "pooling", "normalize"), "name")
        super().add_module(name, module)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write a folder that this package and sentence-transformers load: see `minilm.save`."""
        save_pretrained(
            self, path, model_name, create_model_card, train_datasets, safe_serialization
        )

    save = save_pretrained

    def fingerprint(self, **options: Unpack[EncodeOptions]) -> Fingerprint:
        """Which model this is, as a record to keep with the vectors that `encode(texts, **options)`
        gives: see `minilm.fingerprint`.

        Args:
            options: As in `encode`; those that change no vector have no effect.

        Raises:
            InputTypeError, InputError: As in `encode`; or as in `minilm.fingerprint.fingerprint`.
        """
        given: dict[str, Any] = {n: value for n, value in options.items() if n not in PLACES}
        return fingerprint_of(self, self._plan("sentences", **given))

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

"""`SentenceEncoder`: load a model, put text in, get one unit vector for each text.

`pipeline.py` is the model. What is done with it lives in the wings, as functions whose first
argument is a `Pipeline`; here they become methods.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from minilm import inputs
from minilm.errors import InputError
from minilm.inference import encode as calls
from minilm.inference.eval_mode import eval_mode, set_mode
from minilm.inference.int8 import calibration_of
from minilm.inference.kernels import accelerate, fast_products
from minilm.inference.packed import embed, keeps_bits
from minilm.inference.process_pool import ProcessPool
from minilm.inputs import EncodeOptions
from minilm.interpret import explain as explanations
from minilm.interpret import trace as traces
from minilm.pipeline import Pipeline
from minilm.pretrained import folder, hub
from minilm.pretrained.fingerprint import Fingerprint, fingerprint_of
from minilm.pretrained.options import DEFAULT_PROMPTS, LoadOptions, dtype_on, load_options
from minilm.pretrained.save import save_pretrained
from minilm.similarity import SIMILARITY_FUNCTIONS, Embeddings
from minilm.source import ModelFiles
from minilm.tokenizer import WordPieceTokenizer

__all__ = ["SentenceEncoder"]


class SentenceEncoder(Pipeline):
    """Maps sentences and paragraphs to vectors whose dot product is their similarity.

    Its attributes and settings are those of `Pipeline`.
    """

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
        asked = None if str(dtype).removeprefix("torch.") in ("auto", "int8") else dtype
        kind = None if modules and dtype is None else inputs.as_dtype(asked)
        target = None if modules and device is None else inputs.as_device(device, kind)
        source: ModelFiles | None = None
        prompts, default_prompt_name = dict(DEFAULT_PROMPTS), wanted.default_prompt_name
        similarity_fn_name, truncate_dim = wanted.similarity_fn_name, wanted.truncate_dim
        if model_name_or_path is not None:
            source = hub.locate(model_name_or_path, **wanted.where)
            assert target is not None
            kind = dtype_on(target, dtype)
            read = partial(folder.read_model, source, torch.float32 if kind == torch.int8 else kind)
            parts = hub.mended(source, read, **wanted.where)
            modules, tokenizer = parts.build(), parts.tokenizer
            max_seq_length = parts.max_seq_length if max_seq_length is None else max_seq_length
            similarity_fn_name = similarity_fn_name or parts.similarity_fn_name
            prompts |= parts.prompts
            default_prompt_name = default_prompt_name or parts.default_prompt_name
            truncate_dim = parts.truncate_dim if truncate_dim is None else truncate_dim
        super().__init__(modules or [], tokenizer, max_seq_length)
        if source is None and dtype is not None:
            kind = dtype_on(target or self.device, dtype)
        self.source = source
        self.prompts = prompts | wanted.prompts
        if default_prompt_name is not None:
            calls.prompt_of(self.prompts, default_prompt_name, "default_prompt_name")
        self.default_prompt_name = default_prompt_name
        self.similarity_fn_name = similarity_fn_name or "cosine"
        self.truncate_dim = truncate_dim
        in_int8 = kind == torch.int8
        if in_int8:
            kind = torch.float32
        mixed = kind == torch.bfloat16  # for the products only; sums and norms stay float32
        accelerate(self.bert, kind if mixed else None)
        self.to(target, None if mixed else kind)
        self._rounds, self.in_int8 = wanted.reproducible, in_int8
        if in_int8:
            for layer in self.bert.layers:
                calibration_of(layer)  # refuses other weights

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
                all of the time; what is added up between them stays float32. On a processor
                without products in bfloat16 or float16, where these would be slower, it is
                float32, with a `DtypeWarning`; `encoder.dtype` is what it really is. (`.half()`
                and `.to(dtype)` do what they say on any processor, at its speed.)
                "int8" multiplies in 8 bits in `encode`, in float32 elsewhere: a plain call, a trace
                and gradients are as in float32. It is for the published weights, and for a CPU
                that multiplies bytes exactly (VNNI) and has no AMX, with which bfloat16 is faster.
                Cosines to the exact vectors are 0.998 and more for sentences, less for texts of a
                word or none. A fingerprint says int8; an index doesn't mix it with other dtypes.
                "auto" is the fastest whose vectors keep a cosine of 0.9999 with the exact ones:
                bfloat16 where the processor or the GPU multiplies in it, else float32.
            reproducible: Compute in float64 and round each vector once, to float32: the same bits
                on every machine, but for one number in ten million. See the wing's README,
                `minilm/inference/README.md`.
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
            HashMismatchError: A file of the published model, or one that was fetched from the Hub,
                is damaged, and can't be fetched again.
            ConfigError, TokenizerError, WeightsError, ModelFolderError: The files of the model
                are broken, or ask for what is not implemented.
            InputError: The device or dtype can't be used, or doesn't pay, or an option has no
                effect here.
        """
        return cls(name_or_path, **options)

    # --- text -> vectors: inference/encode.py

    encode = calls.encode
    encode_stream = calls.encode_stream
    encode_windows = calls.encode_windows
    token_counts = calls.token_counts
    tokenize = calls.tokenize
    preprocess = calls.preprocess
    start_multi_process_pool = calls.start_multi_process_pool
    is_singular_input = staticmethod(inputs.is_singular_input)

    def encode_query(
        self,
        sentences: Any = calls.MISSING,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *positional: Any,
        **options: Any,
    ) -> Any:
        """Embed queries: `encode`, with the prompt "query" if there is one, or the one given."""
        return self._encode_as("query", sentences, prompt_name, prompt, positional, options)

    def encode_document(
        self,
        sentences: Any = calls.MISSING,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *positional: Any,
        **options: Any,
    ) -> Any:
        """Embed documents: `encode`, with the first prompt of "document", "passage", "corpus"."""
        return self._encode_as("document", sentences, prompt_name, prompt, positional, options)

    def _encode_as(
        self,
        task: str,
        sentences: Any,
        prompt_name: str | None,
        prompt: str | None,
        positional: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        if prompt_name is None and prompt is None:
            prompt_name = calls.prompt_for(task, self.prompts)
        if sentences is not calls.MISSING:
            options["sentences"] = sentences
        options |= calls.positional(task, positional)
        return self.encode(prompt_name=prompt_name, prompt=prompt, task=task, **options)

    def encode_multi_process(self, sentences: Any, pool: ProcessPool, **options: Any) -> Any:
        """Embed texts in processes: an older name of `encode(sentences, pool=pool, ...)`."""
        return self.encode(sentences, pool=pool, **options)

    @staticmethod
    def stop_multi_process_pool(pool: ProcessPool) -> None:
        """End the processes of a pool."""
        pool.stop()

    @property
    def deterministic(self) -> bool:
        """Whether a text gets the same bits alone, in any batch and in any order: tried now, with
        this processor, number of threads and dtype.
        """

        def embed_rows(rows: list[list[int]]) -> Tensor:
            return self.rounded(embed(self, rows, multiple=multiple))

        with torch.inference_mode(), eval_mode(self) as parts, fast_products(parts) as multiple:
            return keeps_bits(embed_rows, self.bert.config.vocab_size, self.max_seq_length)

    def similarity(self, embeddings1: Embeddings, embeddings2: Embeddings) -> Tensor:
        """Compare each vector of one set with each of another, `[n, 384] x [m, 384] -> [n, m]`.

        The cosine, unless the model names another function. See `minilm.similarity.cos_sim`.
        """
        return SIMILARITY_FUNCTIONS[self.similarity_fn_name][0](embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Embeddings, embeddings2: Embeddings) -> Tensor:
        """Compare vectors row by row, `[n, 384] x [n, 384] -> [n]`: see `similarity`."""
        return SIMILARITY_FUNCTIONS[self.similarity_fn_name][1](embeddings1, embeddings2)

    # --- the model looked into: interpret/

    trace = traces.trace
    explain = explanations.explain
    explain_components = explanations.explain_components
    explain_deletions = explanations.explain_deletions
    contrast = explanations.contrast

    # --- files: pretrained/

    save_pretrained = save_pretrained
    save = save_pretrained

    def fingerprint(self, **options: Unpack[EncodeOptions]) -> Fingerprint:
        """Return which model this is, as a record to keep with the vectors that
        `encode(texts, **options)` gives: see `minilm.pretrained.fingerprint`.

        Args:
            options: As in `encode`; those that change no vector have no effect.

        Raises:
            InputTypeError, InputError: As in `encode`, or in `fingerprint_of`.
        """
        given: dict[str, Any] = {n: value for n, value in options.items() if n not in calls.PLACES}
        return fingerprint_of(self, calls.plan_of(self, "sentences", **given))

    # --- what sentence-transformers calls it too

    truncate_sentence_embeddings = Pipeline.truncate_embeddings
    get_embedding_dimension = Pipeline.get_sentence_embedding_dimension

    def get_max_seq_length(self) -> int:
        """Return `max_seq_length`."""
        return self.max_seq_length

    def train(self, mode: bool = True) -> "SentenceEncoder":
        """Switch dropout on or off, as `nn.Module.train`; `encode` never has any.

        While another thread is in `encode` the mode is that, and is switched when it has ended.
        """
        set_mode(self, mode)
        return self

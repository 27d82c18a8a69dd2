"""A model that is named now and loaded when it is first used: the base of every adapter.

In: a name, a folder or a `SentenceEncoder`, and options. Out: vectors, the same bits that
`SentenceEncoder.encode` gives.

Frameworks copy, pickle and send their parts to other processes, long before they embed anything.
Only the name is sent; the weights are read where they are used.
"""

import os
from collections.abc import Iterable
from typing import Any, TypedDict, Unpack

import numpy as np

from minilm.encoder import SentenceEncoder
from minilm.errors import InputTypeError
from minilm.forks import Lock
from minilm.inference.truncation import TRUNCATION
from minilm.inputs import as_many, check_choice, check_positive_int
from minilm.pretrained import hub
from minilm.pretrained.fingerprint import Fingerprint
from minilm.pretrained.options import SECRETS, LoadOptions, load_options, to_keep

__all__ = ["SECRETS", "AdapterOptions", "Embedder", "LazyEncoder"]


class _EncodeOptions(TypedDict, total=False):
    """Arguments of `SentenceEncoder.encode` that an adapter keeps for every call."""

    prompt_name: str | None
    prompt: str | None
    batch_size: int | None
    token_budget: int | None
    show_progress_bar: bool | None
    truncation: str
    normalize_embeddings: bool


class AdapterOptions(LoadOptions, _EncodeOptions, total=False):
    """The options of an adapter: those of `from_pretrained`, and of `encode` the ones above.

    `truncate_dim` is in both and means the same.
    """


class LazyEncoder:
    """A `SentenceEncoder` that is loaded when first used, with the arguments of its calls.

    Threads may share it: it is loaded once. Its pickles and copies have the name or folder and the
    options, and load for themselves; a `SentenceEncoder` that was passed is pickled as it is. No
    pickle has the access token: where it is loaded, `HF_TOKEN` or the login stored there is used.

    Attributes:
        model: What was passed; a folder as an absolute path.
        options: The options that were passed; `cache_dir` as an absolute path, a token hidden.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | SentenceEncoder = hub.DEFAULT_MODEL,
        **options: Unpack[AdapterOptions],
    ) -> None:
        """Name a model. Nothing is read yet.

        Args:
            model: A folder, a name on the Hub, or an encoder.
            options: See `AdapterOptions`.

        Raises:
            InputTypeError: An option is unknown or of a wrong type; or it is for loading, and
                `model` is loaded already.
            InputError: An option has a value that can't be used.
        """
        # `truncate_dim` is passed to each call, so that it also works with a loaded encoder.
        encode_names = {*_EncodeOptions.__annotations__, "truncate_dim"}
        self.model = model
        self.options: dict[str, Any] = to_keep(options)
        given = self.options.items()
        self._encode = {name: value for name, value in given if name in encode_names}
        self._load = {name: value for name, value in given if name not in encode_names}
        load_options(self._load)  # raises its errors now
        if "truncation" in options:
            check_choice(options["truncation"], TRUNCATION, "truncation")
        for name in ("truncate_dim", "batch_size", "token_budget"):
            if self._encode.get(name) is not None:
                check_positive_int(self._encode[name], name)
        self._encoder: SentenceEncoder | None = None
        self._lock = Lock()
        if isinstance(model, SentenceEncoder):
            for name, value in self._load.items():
                if value is not None and value is not False:
                    raise InputTypeError(
                        f"{name} is for a model that is loaded by its name; pass it to "
                        "SentenceEncoder, or the model's name here",
                        name,
                    )
            self._encoder = model
        elif not isinstance(model, str | os.PathLike):
            raise InputTypeError(
                f"model is {type(model).__name__}; pass a model's folder, its name on the Hub, "
                "or a SentenceEncoder",
                "model",
            )
        else:
            self.model = hub.settled(model)

    @property
    def encoder(self) -> SentenceEncoder:
        """The model, which is loaded first if it wasn't yet.

        Raises:
            MinilmError: As in `SentenceEncoder.from_pretrained`.
        """
        with self._lock:
            if self._encoder is None:
                name: Any = self.model
                self._encoder = SentenceEncoder(name, **self._load)
            return self._encoder

    def encode(self, sentences: Any, **options: Any) -> np.ndarray[Any, Any]:
        """Call `SentenceEncoder.encode`, with the options kept here unless they are passed here."""
        return self._call("encode", sentences, options)

    def encode_query(self, sentences: Any, **options: Any) -> np.ndarray[Any, Any]:
        """Call `SentenceEncoder.encode_query`: with the prompt for queries, if there is one."""
        return self._call("encode_query", sentences, options)

    def encode_document(self, sentences: Any, **options: Any) -> np.ndarray[Any, Any]:
        """Call `SentenceEncoder.encode_document`: with the prompt for documents, if any."""
        return self._call("encode_document", sentences, options)

    def _call(self, name: str, sentences: Any, options: Any) -> np.ndarray[Any, Any]:
        method = getattr(self.encoder, name)
        vectors: np.ndarray[Any, Any] = method(sentences, **(self._encode | options))
        return vectors

    def fingerprint(self, **options: Any) -> Fingerprint:
        """Return the record of the vectors that `encode` makes with these options."""
        return self.encoder.fingerprint(**(self._encode | options))

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], **state["options"])  # type: ignore[misc]

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.options.items() if name not in SECRETS}
        options = "".join(f", {name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({self.model!r}{options})"


class Embedder:
    """The common part of the adapters to BERTopic and KeyBERT, before their `BaseEmbedder`.

    Attributes:
        embedding_model: The model, a `LazyEncoder`.
    """

    embedding_model: LazyEncoder

    def __init__(
        self,
        model: str | os.PathLike[str] | SentenceEncoder = hub.DEFAULT_MODEL,
        **options: Unpack[AdapterOptions],
    ) -> None:
        """Name a model: see `LazyEncoder` for the arguments."""
        super().__init__(embedding_model=LazyEncoder(model, **options))  # type: ignore[call-arg]

    def embed(self, documents: Iterable[str], verbose: bool = False) -> np.ndarray[Any, Any]:
        """Embed documents or words.

        Args:
            documents: The texts.
            verbose: Show a progress bar.

        Returns:
            `[n, 384]`, the bits that `SentenceEncoder.encode` gives.

        Raises:
            InputTypeError: A single text was passed, or something that is not a text.
            MinilmError: As in `SentenceEncoder.from_pretrained` and `encode`.
        """
        options = {"show_progress_bar": True} if verbose else {}
        return self.embedding_model.encode(as_many(documents, "documents"), **options)

"""`encode`, and what a caller expects around it: the methods of `SentenceEncoder` that take text.

In: any iterable of texts, and how they are wanted. Out: NumPy, tensors, small integers, token
vectors. `encoder.py` is the pipeline itself; here texts are read, cut, put into batches and back
into order.

One call is read here into a `Plan`, computed by `compute.py`, in this process or in others, and its
vectors get the form that was asked for (`_finish`).
"""

import logging
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

import numpy as np
import torch
from torch import Tensor

from minilm.compute import Outcome, Plan, extras_of, read, run, windows_of, with_prompt
from minilm.errors import InputError, InputTypeError
from minilm.inputs import (
    EncodeOptions,
    Row,
    as_device,
    as_rows,
    check_choice,
    check_positive_int,
    check_text,
    check_unicode,
    is_singular_input,
    windows,
)
from minilm.packed import batch_limits
from minilm.pooling import Normalize
from minilm.quantize import (
    check_precision,
    has_model_ranges,
    model_ranges,
    quantize_embeddings,
)
from minilm.truncation import (
    TRUNCATION,
    EncodeReport,
    TextWindow,
)

if TYPE_CHECKING:
    from minilm.encoder import SentenceEncoder
    from minilm.process_pool import ProcessPool

__all__ = ["PLACES", "Encode", "prompt_for", "prompt_of"]

# What the prompts for the two sides of a search may be called, and which goes before which.
_PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
# The options of a call that say where to compute.
PLACES = ("device", "pool", "chunk_size")
_MISSING = object()

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Truncation:
    """A `with encoder.truncate_embeddings(...)`."""

    owner: "weakref.ref[Encode]"
    truncate_dim: int | None
    is_open: bool = True


# Those of this thread or task, the innermost last. An attribute of the encoder would be that of all
# threads: two whose `with` overlap would each put back what the other had set.
_truncations: ContextVar[tuple[_Truncation, ...]] = ContextVar("minilm_truncations", default=())


class Encode:
    """The methods that turn text into vectors."""

    prompts: dict[str, str]
    default_prompt_name: str | None

    @overload
    def encode(
        self,
        sentences: str | Iterable[Row] = ...,
        *,
        convert_to_numpy: Literal[True] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray[Any, Any]: ...

    @overload
    def encode(
        self,
        sentences: str | Iterable[Row] = ...,
        *,
        convert_to_numpy: bool = ...,
        convert_to_tensor: Literal[True],
        **options: Unpack[EncodeOptions],
    ) -> Tensor: ...

    @overload
    def encode(self, sentences: Any = ..., *args: Any, **options: Any) -> Any: ...

    def encode(
        self,
        sentences: Any = _MISSING,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"]
        | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: "ProcessPool | dict[str, Any] | None" = None,
        chunk_size: int | None = None,
        *,
        inputs: Any = _MISSING,
        truncation: str = "warn",
        return_report: bool = False,
        token_budget: int | None = None,
        task: str | None = None,
        **unknown: Any,
    ) -> Any:
        """Embed texts.

        Args:
            sentences: A str, or any iterable of str: list, generator, NumPy array, pandas or
                polars Series, Arrow array. A row may also be a pair of texts, which are read
                together, as [CLS] A [SEP] B [SEP].
            prompt_name: A key of `prompts`, whose text is put in front of every sentence; by
                default `default_prompt_name`.
            prompt: That text itself.
            batch_size: Sentences computed at a time, at most; None sets no limit.
            show_progress_bar: By default only if this package's logger is at INFO or below.
            output_value: "sentence_embedding"; or "token_embeddings", for each text the vectors of
                its tokens `[tokens, 384]`, before pooling, not normalized; or None, for each text
                a dict of all that the model gives, padded to the longest of its batch.
            precision: "float32"; or "int8", "uint8", with fixed ranges for the published model, or
                "binary", "ubinary", which pack the signs: see `minilm.quantize`.
            convert_to_numpy: Give NumPy arrays, else tensors on the model's device.
            convert_to_tensor: Give one tensor, whatever `convert_to_numpy` says.
            device: Move the model there first, and leave it there. Several: a process for each.
            normalize_embeddings: Scale the vectors to length 1 (again, behind `truncate_dim`).
            truncate_dim: Keep so many numbers of each vector; by default `self.truncate_dim`.
                What is left isn't normalized unless `normalize_embeddings` is set.
            pool: Processes that `start_multi_process_pool` started, to compute in.
            chunk_size: Texts that one of them is given at a time.
            inputs: Another name for `sentences`.
            truncation: What to do about text beyond `max_seq_length` tokens. "warn" cuts it and
                issues one `TruncationWarning` that adds up how much; "silent" only cuts it;
                "error" computes nothing; "chunk" reads all of it, in overlapping windows, and gives
                the mean of their vectors, weighted by their tokens, normalized.
            return_report: Give `(embeddings, EncodeReport)`: how much of each text was read.
            token_budget: Tokens computed at a time, at most, if no sentence is longer; by default
                as many as were fastest for this device and dtype. Neither limit changes a vector.
            task: Has no effect; other models of the reference choose a part of themselves by it.

        Returns:
            One vector `[384]` for a str, else `[n, 384]` in the order given, with n = 0 too. Its
            dtype is float32, or that which the whole model was converted to; NumPy has no
            bfloat16 and gets float32. With `convert_to_numpy` and `convert_to_tensor` both false,
            a list of n tensors `[384]`. For other values of `output_value`, a list.

        Raises:
            InputTypeError: Something is no text, the message names the row; or an argument is
                unknown or of a wrong type.
            InputError: A text has a lone surrogate, or an argument's value can't be used.
            TruncationError: With `truncation="error"`, a text is too long.
            NotFiniteError: Vectors have NaN or infinity in them.
            WorkerError: A process of the pool died.
        """
        given, argument = _one_of(sentences, inputs)
        rows, is_single = as_rows(given, argument)
        plan = self._plan(
            argument,
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            output_value=output_value,
            precision=precision,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            truncation=truncation,
            return_report=return_report,
            token_budget=token_budget,
            **unknown,
        )
        as_numpy = convert_to_numpy and not convert_to_tensor
        plan = replace(plan, on_device=not as_numpy)
        values, report = self._run(rows, plan, device, pool, chunk_size)
        if output_value == "sentence_embedding" and not convert_to_numpy and not convert_to_tensor:
            values = list(values)
        result = values[0] if is_single else values
        return (result, report) if return_report else result

    def encode_query(
        self,
        sentences: Any = _MISSING,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *positional: Any,
        **options: Any,
    ) -> Any:
        """`encode`, with the prompt "query" if there is one and no other is asked for."""
        return self._encode_as("query", sentences, prompt_name, prompt, positional, options)

    def encode_document(
        self,
        sentences: Any = _MISSING,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *positional: Any,
        **options: Any,
    ) -> Any:
        """`encode`, with the prompt "document", "passage" or "corpus": the first that there is."""
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
            prompt_name = prompt_for(task, self.prompts)
        if sentences is not _MISSING:
            options["sentences"] = sentences
        if len(positional) > len(_POSITIONAL):
            raise InputTypeError(f"encode_{task} was given too many arguments", "chunk_size")
        options |= dict(zip(_POSITIONAL, positional, strict=False))
        return self.encode(prompt_name=prompt_name, prompt=prompt, task=task, **options)

    def encode_stream(
        self,
        sentences: Iterable[Row],
        *,
        window: int = 4096,
        **options: Unpack[EncodeOptions],
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Embed texts one after the other, however many come: `encode` in bounded memory.

        An error comes when its text's turn does.

        Args:
            sentences: An iterable of str.
            window: Texts read and held at a time.
            options: As in `encode`. They are looked at before the first text is read. With several
                devices the processes are started once, and stopped at the end.

        Yields:
            For each text, in order, what `encode` gives for it in a list: a vector `[384]`, unless
            the options ask for something else.

        Raises:
            InputTypeError, InputError: As in `encode`. There is no `return_report`: a report is of
                all texts.
        """
        check_positive_int(window, "window")
        given: dict[str, Any] = dict(options)
        places = {name: given.pop(name, None) for name in PLACES}
        as_numpy = given.pop("convert_to_numpy", True) and not given.pop("convert_to_tensor", False)
        plan = replace(self._plan("sentences", **given), on_device=not as_numpy)
        if plan.spans:
            raise InputError("return_report: a stream has no report; call encode", "return_report")
        if plan.precision in ("int8", "uint8") and self._ranges(plan.width) is None:
            raise InputError(
                "precision: this model has no fixed ranges, and those of one window would not be "
                "those of the next; stream float32 and use minilm.util.quantize_embeddings",
                "precision",
            )
        return self._stream(windows(sentences, window), plan, places)

    def _stream(
        self, windows: Iterable[list[Row]], plan: Plan, places: dict[str, Any]
    ) -> Iterator[np.ndarray[Any, Any]]:
        with ExitStack() as stack:
            if places["pool"] is None and isinstance(places["device"], list | tuple):
                pool = self.start_multi_process_pool(places["device"])
                places = places | {"device": None, "pool": stack.enter_context(pool)}
            # What can't be used is refused before a text is read.
            self._run([], replace(plan, show_progress_bar=False), **places)
            for rows in windows:
                yield from self._run(rows, plan, **places)[0]
                plan = replace(plan, first_row=plan.first_row + len(rows))

    def encode_windows(
        self, text: str, *, prompt_name: str | None = None, prompt: str | None = None
    ) -> list[TextWindow]:
        """Embed a long text in overlapping windows, each of which the model reads in full.

        They end where sentences do, as far as possible. `encode(truncation="chunk")` gives the mean
        of these vectors, weighted by their tokens, normalized.

        Args:
            text: The text, of any length.
            prompt_name, prompt: As in `encode`; the prompt is put in front of every window.

        Returns:
            The windows in order, at least one. Together they hold all of the text.

        Raises:
            InputTypeError, InputError: As in `encode`; also if the prompt leaves no room.
        """
        check_unicode([check_text(text, "text")], "text")
        plan = self._plan(
            "text", prompt=prompt, prompt_name=prompt_name, truncate_dim=self._full_width
        )
        spans = windows_of(_encoder(self), text, plan.prompt, plan.max_seq_length, "text")
        parts = [text[start:end] for start, end in spans]
        vectors, report = self._run([*parts], plan)
        counts = report.token_counts
        return [
            TextWindow(start, end, part, count, vector)
            for (start, end), part, count, vector in zip(spans, parts, counts, vectors, strict=True)
        ]

    def token_counts(
        self,
        sentences: str | Iterable[Row],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> Any:
        """How many tokens texts have, [CLS], [SEP] and the prompt included, before any cut.

        Those with more than `max_seq_length` would be cut.

        Args:
            sentences: As in `encode`.
            prompt_name, prompt: As in `encode`.

        Returns:
            One number for a str, else a list of n.
        """
        rows, is_single = as_rows(sentences)
        rows = with_prompt(rows, self._prompt(prompt, prompt_name))
        counts = _encoder(self)._tokenizer(rows).token_counts
        return counts[0] if is_single else counts

    # --- texts -> tensors, for `forward`

    def tokenize(self, sentences: str | Iterable[Row]) -> dict[str, Tensor]:
        """Texts -> the features that `forward` takes, as one padded batch on the model's device.

        Returns:
            `input_ids`, `token_type_ids`, `attention_mask`, int64 `[n, tokens]`, cut at
            `max_seq_length`.

        Raises:
            InputTypeError, InputError: As in `encode`; also for no text at all.
        """
        rows, _ = as_rows(sentences)
        if not rows:
            raise InputError("sentences is empty; pass at least one", "sentences")
        return self._features(rows)

    def preprocess(self, inputs: str | Iterable[Row], prompt: str | None = None) -> dict[str, Any]:
        """The same with a prompt, under the name that sentence-transformers 6 has for it.

        Returns:
            As `tokenize`, and `modality`, which is "text"; with a prompt `prompt_length`, its
            number of tokens with [CLS]. No text at all gives an empty dict.
        """
        rows, _ = as_rows(inputs, "inputs")
        if not rows:
            return {}
        prefix = self._prompt(prompt, None)
        features = self._features(with_prompt(rows, prefix), "inputs")
        return features | extras_of(_encoder(self), prefix)

    def _features(self, rows: list[Row], argument: str = "sentences") -> dict[str, Tensor]:
        encoder = _encoder(self)
        tokens = read(encoder, rows, encoder.max_seq_length, "warn", argument)
        return encoder._tokenizer.pad(tokens.input_ids, encoder.device, tokens.token_type_ids)

    # --- several processes

    def start_multi_process_pool(
        self, target_devices: Sequence[str | torch.device] | None = None
    ) -> "ProcessPool":
        """Start a process for each device, each with this model, for `encode(pool=...)`.

        Args:
            target_devices: Such as `["cuda:0", "cuda:1"]` or `["cpu"] * 2`; by default every GPU,
                else up to four processes on the processor, which share its cores.

        Returns:
            The pool. It is to be stopped, by `stop_multi_process_pool` or as a context manager.
        """
        from minilm.process_pool import ProcessPool

        return ProcessPool(_encoder(self), target_devices)

    @staticmethod
    def stop_multi_process_pool(pool: "ProcessPool") -> None:
        """End the processes of a pool."""
        pool.stop()

    def encode_multi_process(self, sentences: Any, pool: "ProcessPool", **options: Any) -> Any:
        """`encode(sentences, pool=pool, ...)`, under an older name."""
        return self.encode(sentences, pool=pool, **options)

    # --- settings

    @contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Inside a `with`, keep so many numbers of each vector by default.

        That is so for the calls of this thread, or of this `asyncio` task and those that it starts.
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

    truncate_sentence_embeddings = truncate_embeddings

    @property
    def truncate_dim(self) -> int | None:
        """How many numbers of each vector `encode` keeps by default; None for all. Settable, inside
        of `truncate_embeddings` until that ends.
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

    def _truncation(self) -> "_Truncation | None":
        """The innermost `truncate_embeddings` that is open here."""
        found = (each for each in reversed(_truncations.get()) if each.owner() is self)
        return next((each for each in found if each.is_open), None)

    def get_sentence_embedding_dimension(self) -> int:
        """The width of an embedding: 384, or less with `truncate_dim`."""
        full = self._full_width
        return min(self.truncate_dim or full, full)

    def get_embedding_dimension(self) -> int:
        """The same under the name that sentence-transformers 6 has for it."""
        return self.get_sentence_embedding_dimension()

    is_singular_input = staticmethod(is_singular_input)

    @property
    def _full_width(self) -> int:
        return _encoder(self).bert.config.hidden_size

    # --- the parts of a call

    def _plan(
        self,
        argument: str,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: Any = "sentence_embedding",
        precision: str | None = "float32",
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        truncation: str = "warn",
        return_report: bool = False,
        token_budget: int | None = None,
        task: str | None = None,
        **unknown: Any,
    ) -> Plan:
        """Read the arguments of a call, and the settings, once: what it will do.

        Args:
            argument: What the user called the texts.
            prompt_name: As in `encode`; so are the others.

        Raises:
            InputTypeError, InputError: As in `encode`.
        """
        if unknown:
            names = ", ".join(unknown)
            raise InputTypeError(f"encode has no argument {names}", next(iter(unknown)))
        encoder = _encoder(self)
        precision = check_precision("float32" if precision is None else precision)
        if precision != "float32" and output_value != "sentence_embedding":
            raise InputError(
                f"precision is {precision!r}, which is for output_value='sentence_embedding'",
                "precision",
            )
        if truncate_dim is None:
            truncate_dim = self.truncate_dim
        else:
            check_positive_int(truncate_dim, "truncate_dim")
        full = self._full_width
        if output_value is not None:
            check_choice(output_value, ("sentence_embedding", "token_embeddings"), "output_value")
        check_choice(truncation, TRUNCATION, "truncation")
        if truncation == "chunk" and output_value != "sentence_embedding":
            raise InputError(
                "truncation is 'chunk', which is for output_value='sentence_embedding'",
                "truncation",
            )
        batch_limits(encoder.device, encoder.dtype, batch_size, token_budget)  # refuses bad ones
        return Plan(
            prompt=self._prompt(prompt, prompt_name),
            output_value=output_value,
            truncation=truncation,
            max_seq_length=encoder.max_seq_length,
            width=full if truncate_dim is None else min(truncate_dim, full),
            normalize=bool(normalize_embeddings),
            precision=precision,
            batch_size=batch_size,
            token_budget=token_budget,
            spans=return_report,
            on_device=False,
            show_progress_bar=show_progress_bar,
            argument=argument,
            first_row=0,
        )

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        """What to put in front of every text."""
        if prompt is not None:
            if name is not None:
                logger.warning(
                    "Provide either a `prompt`, a `prompt_name`, or neither, but not both. "
                    "Ignoring the `prompt_name` in favor of `prompt`."
                )
            return check_text(prompt, "prompt")
        if name is None:
            name = self.default_prompt_name
        return "" if name is None else prompt_of(self.prompts, name, "prompt_name")

    def _run(
        self,
        rows: list[Row],
        plan: Plan,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        pool: Any = None,
        chunk_size: int | None = None,
    ) -> tuple[Any, EncodeReport]:
        """Do what a plan says: the values of the rows, and what was read of them."""
        outcome = self._compute(rows, plan, device, pool, chunk_size)
        values = outcome.values
        if plan.output_value == "sentence_embedding":
            values = self._finish(values, plan)
        kept, spans = tuple(outcome.kept), tuple(outcome.spans or ())
        counts, windows = tuple(outcome.token_counts), tuple(outcome.windows)
        return values, EncodeReport(counts, kept, spans, windows)

    def _compute(
        self,
        rows: list[Row],
        plan: Plan,
        device: str | torch.device | Sequence[str | torch.device] | None,
        pool: Any,
        chunk_size: int | None,
    ) -> Outcome:
        """Here, or in other processes."""
        if chunk_size is not None:
            check_positive_int(chunk_size, "chunk_size")
        encoder = _encoder(self)
        several = list(device) if isinstance(device, list | tuple) else None
        if pool is None and several is None:
            if device is not None:
                encoder.to(as_device(cast("str | torch.device", device)))
            return run(encoder, rows, plan)
        from minilm.process_pool import ProcessPool, run_in

        if pool is not None:
            return run_in(pool, encoder, rows, plan, chunk_size)
        with ProcessPool(encoder, several) as started:
            return run_in(started, encoder, rows, plan, chunk_size)

    def _ranges(self, truncate_dim: int | None, normalized: bool = False) -> Any:
        """The fixed ranges of int8 for the published weights; None for others."""
        source = _encoder(self).source
        if source is None or not has_model_ranges(source.sha256.get("model.safetensors", "")):
            return None
        width = self._full_width if truncate_dim is None else min(truncate_dim, self._full_width)
        return model_ranges(width, unit_after_truncation=normalized)

    def _finish(self, vectors: Tensor, plan: Plan) -> Any:
        """Normalized, in few bits, as an array: as far as wanted."""
        if plan.normalize:
            vectors = Normalize()(vectors)
        if plan.precision != "float32":
            ranges = None
            if plan.precision in ("int8", "uint8"):
                ranges = self._ranges(plan.width, plan.normalize)
            floats = vectors.float().cpu().numpy()
            codes = quantize_embeddings(floats, plan.precision, ranges=ranges)
            return torch.from_numpy(codes).to(_encoder(self).device) if plan.on_device else codes
        if plan.on_device:
            return vectors
        return (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()


# The arguments of `encode` behind `prompt`, in order: what may be passed by position.
_POSITIONAL = (
    "batch_size", "show_progress_bar", "output_value", "precision", "convert_to_numpy",
    "convert_to_tensor", "device", "normalize_embeddings", "truncate_dim", "pool", "chunk_size",
)  # fmt: skip


def _as_width(value: Any) -> int | None:
    return None if value is None else check_positive_int(value, "truncate_dim")


def _encoder(methods: Encode) -> "SentenceEncoder":
    return cast("SentenceEncoder", methods)


def _one_of(sentences: Any, inputs: Any) -> tuple[Any, str]:
    """The argument that was given, and its name."""
    if (sentences is _MISSING) == (inputs is _MISSING):
        how = "pass texts" if sentences is _MISSING else "both name the texts; pass one of them"
        raise InputTypeError(f"sentences or inputs: {how}", "sentences")
    return (inputs, "inputs") if sentences is _MISSING else (sentences, "sentences")


def prompt_for(task: str, prompts: Collection[str]) -> str | None:
    """The name of the prompt for one side of a search, "query" or "document"; None without one."""
    return next((name for name in _PROMPT_NAMES[task] if name in prompts), None)


def prompt_of(prompts: dict[str, str], name: Any, argument: str) -> str:
    """A prompt by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in prompts:
        subject = "Default prompt name" if argument == "default_prompt_name" else "Prompt name"
        raise InputError(
            f"{subject} {name!r} not found in the configured prompts dictionary with keys "
            f"{list(prompts)}.",
            argument,
        )
    return prompts[name]

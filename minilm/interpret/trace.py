"""Every number between one text and its vector, by name.

In: an encoder and a text. Out: a `Trace`: each tensor that the forward pass makes, with its axes,
its formula, what it was made of and the line of source that made it. `Trace.check` makes each of
them again with NumPy, from the ones before. Next: `explain.py`.

The architecture knows nothing of this. Forward hooks see what goes into a module and comes out of
it; a function in place of `attention` calls it and sees its arguments and its result; and torch's
function mode sees each operation, and by the stack of calls the line that asked for it. The hooks
are put on a copy of the modules that shares their weights, so that the model stays as it is, also
for other threads.

The names are the paths of the modules plus a noun. Post-LayerNorm makes "the residual" ambiguous,
so both sides of a norm have a name: `residual`, the sum that goes in, and `output`, with the
divisor `scale` = √(variance + ε) between them.
"""

import ast
import copy
import difflib
import functools
import inspect
import json
import linecache
import math
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minilm import bert, inputs, pooling
from minilm.disk import with_metadata
from minilm.errors import TraceKeyError, TruncationWarning
from minilm.inference.eval_mode import eval_mode
from minilm.inference.kernels import fast_products
from minilm.inference.packed import embed
from minilm.inference.truncation import caller_level
from minilm.interpret import notebook
from minilm.outputs import write_output
from minilm.pipeline import Batch, Pipeline
from minilm.report import aligned
from minilm.tokenizer import WordPieceTokenizer

__all__ = ["Source", "Trace", "TraceEntry", "in_dtype", "trace"]

_Array = np.ndarray[Any, Any]

_WATCHED = tuple(str(Path(module.__file__ or "")) for module in (bert, pooling))
_Encoder = TypeVar("_Encoder", bound=Pipeline)


@dataclass(frozen=True)
class Source:
    """A statement of this package.

    Attributes:
        file: Its file, from the package on: "minilm/bert.py".
        line: Its first line, counted from 1.
        text: The statement, without the indentation that its lines share.
    """

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def end(self) -> int:
        """The first line after it."""
        return self.line + self.text.count("\n") + 1


@dataclass(frozen=True)
class TraceEntry:
    """One tensor of a trace.

    Attributes:
        name: Its name: see the top of this file.
        tensor: On the CPU, detached, without a batch axis. For `tokens`, a list of str.
        axes: What its axes are: ("head", "query token", "key token").
        parents: The names of what it was made of.
        formula: How it was made of them.
        source: The statement that made it.
    """

    name: str
    tensor: Any
    axes: tuple[str, ...]
    parents: tuple[str, ...]
    formula: str
    source: Source

    @property
    def shape(self) -> str:
        """The shape in words: "12 x 8 x 8"; of one number "1", of a list its length."""
        if isinstance(self.tensor, Tensor):
            return " x ".join(map(str, self.tensor.shape)) or "1"
        return str(len(self.tensor))


@dataclass(eq=False, repr=False)
class Trace(Mapping[str, Any]):
    """What `SentenceEncoder.trace` found: name -> tensor, in the order of execution.

    `trace["layers.0.attention.query"]` is one tensor, `trace["layers.*.attention.query"]` those
    of all layers on a new first axis. `trace.entries` has what else is known of each.

    Attributes:
        text: The text.
        offsets: For each token its (start, end) in the text, in characters; (0, 0) for [CLS] and
            [SEP].
        unread: How many tokens of the text were cut off.
        entries: `TraceEntry` by name.
        difference: By how much the vector differs at most from what `encode` gives, which takes
            the fast path, in the encoder's own dtype.
    """

    text: str
    offsets: list[tuple[int, int]]
    unread: int
    entries: dict[str, TraceEntry]
    difference: float
    _numbers: "_Numbers"
    _rules: "dict[str, _Rule]"

    def __getitem__(self, name: str) -> Any:
        """Return the tensor of that name; with a `*` for the number, those of all layers, stacked.

        Raises:
            KeyError: There is no such name; the message has the nearest three.
        """
        if name in self.entries:
            return self.entries[name].tensor
        return torch.stack([self.entries[each].tensor for each in _matching(name, self.entries)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        """Return a table: name, shape, mean, standard deviation, norm, source."""
        rows: list[tuple[str, ...]] = [("name", "shape", "mean", "std", "norm", "source")]
        for name, entry in self.entries.items():
            shown = [""] * 3
            if isinstance(entry.tensor, Tensor):
                numbers = entry.tensor.double()
                norm = torch.linalg.vector_norm(numbers)
                shown = [f"{x:.4g}" for x in (numbers.mean(), numbers.std(correction=0), norm)]
            rows.append((name, entry.shape, *shown, str(entry.source)))
        end = f"differs from encode by {self.difference:.1e}"
        return "\n".join([repr(self.text), *aligned(rows, right=(2, 3, 4)), end])

    def __repr__(self) -> str:
        return f"<Trace of {self.text!r}: {len(self)} tensors>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the names, with the shape and the making of each."""
        return notebook.fragment(
            "trace.html",
            text=self.text,
            entries=list(self.entries.values()),
            difference=self.difference,
        )

    def check(self) -> dict[str, float]:
        """Make every entry again from its parents, with NumPy in float64.

        Returns:
            The largest difference of each entry whose parents are in the trace, by name, in the
            order of execution. In float64 they are below 1e-13; in float32 they are the rounding
            of one operation.
        """
        errors = {}
        for name, entry in self.entries.items():
            if all(parent in self.entries for parent in entry.parents):
                parents = [_to_numpy(self.entries[parent].tensor) for parent in entry.parents]
                expected = self._rules[name].make(self._numbers, name, *parents)
                if isinstance(entry.tensor, list):  # of tokens
                    errors[name] = float(entry.tensor != expected.tolist())
                else:
                    actual = _to_numpy(entry.tensor)
                    if actual.shape != expected.shape:
                        raise AssertionError(f"{name}: {actual.shape}, not {expected.shape}")
                    errors[name] = float(np.abs(actual - expected).max(initial=0.0))
        return errors

    def to_numpy(self) -> dict[str, _Array]:
        """Return arrays by name; `tokens` is an array of str, and bfloat16 becomes float32."""
        found = {}
        for name, value in self.items():
            if isinstance(value, Tensor):
                value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
            found[name] = np.array(value)
        return found

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the tensors, and as metadata `text`, and in JSON `tokens`,
        `offsets` and, by name, `axes`, `parents`, `formula` and `source`.
        """
        told = ("axes", "parents", "formula", "source")
        about = {
            name: {each: getattr(entry, each) for each in told}
            for name, entry in self.entries.items()
        }
        metadata = {"text": self.text, "offsets": json.dumps(self.offsets)}
        metadata |= {"entries": json.dumps(about, ensure_ascii=False, default=str)}
        if "tokens" in self.entries:
            metadata["tokens"] = json.dumps(self["tokens"], ensure_ascii=False)
        tensors = {name: each for name, each in self.items() if isinstance(each, Tensor)}
        data = with_metadata(safetensors.torch.save(tensors), metadata)
        write_output(Path(path), lambda file: file.write(data))


def trace(
    encoder: Pipeline,
    text: str,
    *,
    names: Iterable[str] | str | None = None,
    dtype: str | torch.dtype | None = None,
) -> Trace:
    """Follow one text through the model, on the plain path: padded batches of one, `attention`.

    In the published model numbers 127, 223 and 319 of the last layer's output are as good as 0 for
    every text, and so they are in every vector: weight and bias of its last LayerNorm are, there.

    Args:
        encoder: Left as it is.
        text: A str. What is beyond `max_seq_length` is cut, with a `TruncationWarning`.
        names: What to keep: names, with `*` for the number of a layer; by default everything.
        dtype: What to compute in, on a copy of the model; by default as the encoder does.

    Returns:
        See `Trace`.

    Raises:
        InputTypeError: The text is not a str.
        InputError: The text has a lone surrogate, or the encoder has no tokenizer, or another
            argument can't be used.
        KeyError: `names` has a name that does not exist; the message has the nearest three.
    """
    return traces(encoder, [text], names=names, dtype=dtype, arguments=["text"])[0]


def traces(
    encoder: Pipeline,
    texts: Sequence[str],
    *,
    names: Iterable[str] | str | None = None,
    dtype: str | torch.dtype | None = None,
    arguments: Sequence[str],
    warn: bool = True,
) -> list[Trace]:
    """Trace several texts; a copy of the model is made once.

    Args:
        encoder, texts, names, dtype: As in `trace`.
        arguments: What to call each of the texts in an error or a warning.
        warn: Whether a `TruncationWarning` says that a text was cut, at the line outside this
            package from where all this was called.

    Returns:
        A `Trace` for each text.

    Raises:
        InputTypeError, InputError, KeyError: As in `trace`.
    """
    for text, argument in zip(texts, arguments, strict=True):
        inputs.check_text(text, argument)
    plan = _plan(encoder)
    kept = _choose(names, list(plan))
    with torch.inference_mode(False), torch.no_grad():
        twin = in_dtype(encoder, dtype)
        weights = {name: value.detach() for name, value in twin.bert.named_parameters()}
        numbers = _Numbers(encoder, weights)
        rules = {name: rule for name, (_, rule) in plan.items()}
        out = []
        for text, argument in zip(texts, arguments, strict=True):
            offsets, unread, found, difference = _watch(encoder, twin, text, argument)
            if unread and warn:
                share = unread / (len(offsets) + unread)
                message = f"{argument} was cut at {len(offsets)} tokens; {share:.0%} of its tokens "
                warnings.warn(f"{message}were not read", TruncationWarning, caller_level())
            entries = {
                name: TraceEntry(name, tensor, rule.axes, parents, rule.formula, source)
                for name, (parents, rule) in plan.items()
                if name in kept
                for tensor, source in [found[name]]
            }
            out.append(Trace(text, offsets, unread, entries, difference, numbers, rules))
        return out


def in_dtype(encoder: _Encoder, dtype: str | torch.dtype | None) -> _Encoder:
    """Copy an encoder: with the same parameters, or with copies of them in another dtype.

    With bfloat16 only the linear layers get that dtype, as when a model is loaded in it.
    """
    kind = None if dtype is None else inputs.as_dtype(dtype)
    known: dict[int, Any] = {id(encoder.get_tokenizer()): encoder.get_tokenizer()}
    known |= {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    if kind is not None and kind != encoder.weights_dtype:
        rest = torch.float32 if kind == torch.bfloat16 else kind
        for module in encoder.modules():
            for value in module.parameters(recurse=False):
                # Not on Apple's devices, which have no float64.
                there = value.detach().cpu() if value.device.type == "mps" else value.detach()
                there = there.to(kind if isinstance(module, nn.Linear) else rest)
                known[id(value)] = nn.Parameter(there, requires_grad=False)
    return copy.deepcopy(encoder, known)


def _watch(
    encoder: Pipeline, twin: Pipeline, text: str, argument: str
) -> tuple[list[tuple[int, int]], int, dict[str, tuple[Any, Source]], float]:
    """Run `twin` on a text.

    Returns:
        The offsets, the number of tokens cut, what was seen, by name, and the difference from
        `encode`.
    """
    tokenizer = encoder.get_tokenizer()
    tokens = tokenizer([text], encoder.max_seq_length, return_offsets=True, argument=argument)
    assert tokens.offsets is not None
    features = tokenizer.pad(tokens.input_ids, twin.device)
    recorder = _Recorder()
    twin.eval()
    with recorder.watching(twin):
        twin(_Watched(recorder, **features))
    with torch.inference_mode(), eval_mode(encoder) as parts, fast_products(parts) as multiple:
        encoded = embed(encoder, tokens.input_ids, multiple=multiple)[0].cpu()
    found: dict[str, tuple[Any, Source]] = {
        "tokens": (tokenizer.tokens(tokens.input_ids[0]), _definition(WordPieceTokenizer.tokens)),
        "input_ids": (features["input_ids"][0].cpu(), _definition(WordPieceTokenizer.__call__)),
        "attention_mask": (features["attention_mask"][0].cpu(), _definition(tokenizer.pad)),
    }
    found |= recorder.found
    return (
        tokens.offsets[0],
        tokens.token_counts[0] - len(tokens.input_ids[0]),
        found,
        float((found["embedding"][0].double() - encoded.double()).abs().max()),
    )


# --- Watching -------------------------------------------------------------------------------------


class _Watched(Batch):
    """A padded batch, whose attention a recorder computes in steps."""

    def __init__(self, recorder: "_Recorder", **features: Tensor) -> None:
        super().__init__(**features)
        self._recorder = recorder

    @property
    def attend(self) -> bert.Attend:
        return self._recorder.attend


class _Recorder(TorchFunctionMode):
    """Records one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[Any, Source]] = {}
        self._layer = -1
        # By id, each tensor that an operation gave, and the statement that asked for it. The
        # tensor is kept, so that no other gets its id.
        self._made: dict[int, tuple[Tensor, Source]] = {}
        self._softmax: tuple[Tensor, Tensor] | None = None  # what went in, what came out

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            source = _statement_of_caller()
            if source is not None:  # what is handed on as it came was made before
                self._made.setdefault(id(result), (result, source))
            if getattr(func, "__name__", "") == "softmax":
                self._softmax = args[0], result
        return result

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attention`, watched: all tensors `[1, tokens, heads, head_size]`."""
        self._layer += 1
        context = bert.attention(query, key, value)
        assert self._softmax is not None
        scores, probabilities = self._softmax
        names = ("query", "key", "value", "scores", "probabilities", "context")
        tensors = (query, key, value, scores, probabilities, context)
        for name, tensor in zip(names, tensors, strict=True):
            self._keep(f"layers.{self._layer}.attention.{name}", tensor)
        return context

    @contextmanager
    def watching(self, encoder: Pipeline) -> Iterator[None]:
        """Put hooks on the modules of `encoder`, inside a `with`."""
        named = [*encoder.bert.named_modules(), ("pooling", encoder.pooling)]
        seen = [each for each in named if type(each[1]) in _SEEN or each[0].endswith(_SEEN_PATHS)]
        with ExitStack() as hooks:
            for path, module in [*seen, ("", encoder.normalize)]:
                hook = functools.partial(self._see, path)
                hooks.enter_context(module.register_forward_hook(hook))
            with self:
                yield

    def _see(self, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Record what a module got and gave: a hook, once it knows the path."""
        given = args[0]
        if isinstance(module, nn.LayerNorm):
            before = "embeddings.sum" if path.startswith("embeddings") else f"{path}.residual"
            self._keep(before, given)
            variance = given.var(dim=-1, correction=0)
            self._keep(f"{path}.scale", (variance + module.eps).sqrt(), output)
            self._keep(f"{path}.output", output)
        elif isinstance(module, nn.Embedding):
            self._keep(path.removesuffix("_embeddings"), output)
        elif path == "pooling":
            self._keep("pooled", output)
        elif path == "":
            if not isinstance(module, nn.Identity):
                self._keep("length", torch.linalg.vector_norm(given, dim=-1), output)
            self._keep("embedding", output)
        else:
            if path.endswith("feed_forward.output"):
                self._keep(path.replace("output", "activation"), given)
            self._keep(path, output)

    def _keep(self, name: str, tensor: Tensor, made_with: Tensor | None = None) -> None:
        """Record a tensor, without the batch axis, and the statement that made it."""
        key = id(tensor if made_with is None else made_with)
        # If it wasn't made, it is handed on as it came.
        source = self._made[key][1] if key in self._made else _statement_of_caller()
        assert source is not None
        one = tensor if name == "embeddings.position" else tensor[0]
        own = one.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self.found[name] = own, source


_SEEN = (nn.Embedding, nn.LayerNorm)
_SEEN_PATHS = ("attention.output", "feed_forward.intermediate", "feed_forward.output", "pooling")


def _statement_of_caller() -> Source | None:
    """Return the innermost statement of `bert.py` or `pooling.py` that is being executed."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename in _WATCHED:
            return _statement(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


@functools.lru_cache(maxsize=1024)
def _statement(filename: str, line: int) -> Source:
    """Return the statement around a line."""
    lines = linecache.getlines(filename)
    around = [
        node
        for node in ast.walk(ast.parse("".join(lines)))
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    node = max(around, key=lambda node: node.lineno)
    text = inspect.cleandoc("\n" + "".join(lines[node.lineno - 1 : node.end_lineno]))
    return Source(place(filename), node.lineno, text)


def place(filename: str | None) -> str:
    """Where a file of this package is, from the package on: "minilm/bert.py"."""
    return Path(os.path.relpath(filename or "", Path(__file__).parents[2])).as_posix()


def _definition(function: Callable[..., Any]) -> Source:
    """Return the first line of a function."""
    lines, start = inspect.getsourcelines(inspect.unwrap(function))
    return Source(place(inspect.getsourcefile(function)), start, lines[0].strip())


# --- What each entry is ---------------------------------------------------------------------------


class _Numbers:
    """The model in NumPy, in float64: what `Trace.check` multiplies by."""

    def __init__(self, encoder: Pipeline, weights: dict[str, Tensor]) -> None:
        config = encoder.bert.config
        self.eps = config.layer_norm_eps
        self.heads = (config.num_attention_heads, config.head_size)
        self.tokenizer = encoder.get_tokenizer()
        self._weights = weights

    def __call__(self, name: str) -> _Array:
        """Return a parameter of `BertModel`."""
        return _to_numpy(self._weights[name].cpu())

    def linear(self, path: str, x: _Array) -> _Array:
        """Apply a linear layer, `[tokens, ...]` -> `[tokens, out]`."""
        product: _Array = x.reshape(len(x), -1) @ self(f"{path}.weight").T + self(f"{path}.bias")
        return product

    def per_head(self, path: str, x: _Array) -> _Array:
        return self.linear(path, x).reshape(len(x), *self.heads)

    def norm(self, path: str, x: _Array, scale: _Array) -> _Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        normed: _Array = self(f"{path}.weight") * centred / scale[:, None] + self(f"{path}.bias")
        return normed


def _softmax(x: _Array) -> _Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: _Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares


_erf = np.vectorize(math.erf, otypes=[np.float64])  # NumPy has none of its own


@dataclass(frozen=True)
class _Rule:
    """How entries of one kind are made: `make(numbers, path of the module, *parents)`."""

    axes: tuple[str, ...]
    formula: str
    make: Callable[..., _Array]


_VECTORS = ("token", "hidden")
_HEADS = ("token", "head", "channel")
_PAIRS = ("head", "query token", "key token")
_RULES = {
    "tokens": _Rule(
        ("token",),
        "the word pieces of the text",
        lambda n, _, ids: np.array(n.tokenizer.tokens([int(i) for i in ids])),
    ),
    "input_ids": _Rule(
        ("token",),
        "each piece's row of the vocabulary",
        lambda n, _, pieces: np.array([n.tokenizer.backend.token_to_id(str(p)) for p in pieces]),
    ),
    "attention_mask": _Rule(
        ("token",), "1: there is no padding", lambda n, _, ids: np.ones(len(ids))
    ),
    "embeddings.word": _Rule(
        _VECTORS,
        "word_embeddings[input_ids]",
        lambda n, path, ids: n(f"{path}_embeddings.weight")[ids.astype(int)],
    ),
    "embeddings.position": _Rule(
        _VECTORS,
        "position_embeddings[0, 1, 2, ...]",
        lambda n, path, ids: n(f"{path}_embeddings.weight")[: len(ids)],
    ),
    "embeddings.token_type": _Rule(
        _VECTORS,
        "token_type_embeddings[0]",
        lambda n, path, ids: n(f"{path}_embeddings.weight")[[0] * len(ids)],
    ),
    "embeddings.sum": _Rule(
        _VECTORS, "word + position + token_type", lambda n, _, a, b, c: a + b + c
    ),
    "norm.scale": _Rule(
        ("token",),
        "√(variance over hidden + ε)",
        lambda n, _, x: np.sqrt(x.var(axis=-1) + n.eps),
    ),
    "norm.output": _Rule(
        _VECTORS,
        "γ (x - mean over hidden) / scale + β",
        lambda n, path, x, scale: n.norm(path.removesuffix(".output"), x, scale),
    ),
    "attention.query": _Rule(_HEADS, "x Wᵀ + b, split into heads", _Numbers.per_head),
    "attention.key": _Rule(_HEADS, "x Wᵀ + b, split into heads", _Numbers.per_head),
    "attention.value": _Rule(_HEADS, "x Wᵀ + b, split into heads", _Numbers.per_head),
    "attention.scores": _Rule(
        _PAIRS,
        "query · key / √channels",
        lambda n, _, q, k: np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1]),
    ),
    "attention.probabilities": _Rule(
        _PAIRS, "softmax over the key tokens", lambda n, _, scores: _softmax(scores)
    ),
    "attention.context": _Rule(
        _HEADS,
        "Σ over key tokens: probability x value",
        lambda n, _, p, v: np.einsum("hqk,khd->qhd", p, v),
    ),
    "attention.output": _Rule(_VECTORS, "x Wᵀ + b", _Numbers.linear),
    "attention_layer_norm.residual": _Rule(
        _VECTORS, "x + attention(x)", lambda n, _, x, change: x + change
    ),
    "feed_forward.intermediate": _Rule(("token", "unit"), "x Wᵀ + b", _Numbers.linear),
    "feed_forward.activation": _Rule(
        ("token", "unit"),
        "GELU: x (1 + erf(x / √2)) / 2",
        lambda n, _, x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    ),
    "feed_forward.output": _Rule(_VECTORS, "x Wᵀ + b", _Numbers.linear),
    "feed_forward_layer_norm.residual": _Rule(
        _VECTORS, "x + feed_forward(x)", lambda n, _, x, change: x + change
    ),
    "pooled": _Rule(("hidden",), "mean over the tokens", lambda n, _, x: x.mean(axis=0)),
    "length": _Rule((), "√(Σ pooled²)", lambda n, _, x: np.sqrt(np.square(x).sum())),
    "embedding": _Rule(("hidden",), "pooled / length", lambda n, _, x, length: x / length),
}
_POOLED_BY_CLS = _Rule(("hidden",), "the vector of [CLS]", lambda n, _, x: x[0])
_NOT_NORMALIZED = _Rule(("hidden",), "pooled", lambda n, _, x: x)


def _plan(encoder: Pipeline) -> dict[str, tuple[tuple[str, ...], _Rule]]:
    """List all entries in the order of execution: name -> (parents, rule)."""
    plan: dict[str, tuple[tuple[str, ...], _Rule]] = {}

    def add(name: str, *parents: str, rule: str = "") -> str:
        plan[name] = parents, _RULES[rule or re.sub(r"^layers\.\d+\.", "", name)]
        return name

    def add_norm(path: str, before: str) -> str:
        scale = add(f"{path}.scale", before, rule="norm.scale")
        return add(f"{path}.output", before, scale, rule="norm.output")

    add("tokens", "input_ids")
    add("input_ids", "tokens")
    add("attention_mask", "input_ids")
    kinds = ("word", "position", "token_type")
    tables = [add(f"embeddings.{kind}", "input_ids") for kind in kinds]
    state = add_norm("embeddings.layer_norm", add("embeddings.sum", *tables))
    for number in range(encoder.bert.config.num_hidden_layers):
        layer = f"layers.{number}"
        path = f"{layer}.attention"
        query, key, value = (add(f"{path}.{kind}", state) for kind in ("query", "key", "value"))
        scores = add(f"{path}.scores", query, key)
        probabilities = add(f"{path}.probabilities", scores)
        output = add(f"{path}.output", add(f"{path}.context", probabilities, value))
        path = f"{layer}.attention_layer_norm"
        state = add_norm(path, add(f"{path}.residual", state, output))
        path = f"{layer}.feed_forward"
        activation = add(f"{path}.activation", add(f"{path}.intermediate", state))
        output = add(f"{path}.output", activation)
        path = f"{layer}.feed_forward_layer_norm"
        state = add_norm(path, add(f"{path}.residual", state, output))
    add("pooled", state)
    if isinstance(encoder.pooling, pooling.ClsPooling):
        plan["pooled"] = (state,), _POOLED_BY_CLS
    if isinstance(encoder.normalize, nn.Identity):
        plan["embedding"] = ("pooled",), _NOT_NORMALIZED
    else:
        add("embedding", "pooled", add("length", "pooled"))
    return plan


def state(layers: int) -> str:
    """The name of the token vectors after so many layers; after none, of the embeddings."""
    if not layers:
        return "embeddings.layer_norm.output"
    return f"layers.{layers - 1}.feed_forward_layer_norm.output"


def _to_numpy(value: Any) -> _Array:
    return value.double().numpy() if isinstance(value, Tensor) else np.array(value)


def _choose(names: Iterable[str] | str | None, known: list[str]) -> set[str]:
    """Return the names that are asked for."""
    if names is None:
        return set(known)
    asked = [names] if isinstance(names, str) else names
    return {each for name in asked for each in _matching(name, known)}


def _matching(name: str, known: Iterable[str]) -> list[str]:
    """Return the names that `name` stands for, with `*` for a number.

    Raises:
        KeyError: There is no such name.
    """
    pattern = re.compile(re.escape(str(name)).replace(r"\*", "[0-9]+"))
    found = [each for each in known if pattern.fullmatch(each)]
    if not found:
        nearest = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.0)
        raise TraceKeyError(str(name), nearest)
    return found

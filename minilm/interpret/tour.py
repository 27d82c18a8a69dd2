"""A page that leads from two texts to their similarity, with every number on the way.

In: an encoder and two texts. Out: one HTML file as a string, which needs nothing else. The numbers
are those of `trace.py` and `explain.py`, the quoted lines those that the trace found. What the page
says and how it looks is in `templates/`: `page.html` is the frame, `steps/` has a file for each of
its steps, `pieces.html` what these share. Here is what is put in.

Everything is readable without JavaScript. With it the page draws and recomputes from the tensors
that it carries, in base64 at its end: a chosen subset, since the whole trace would be ten times as
large.
"""

import base64
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from minilm import inputs, tokenizer
from minilm.bert import BertLayer, BertModel
from minilm.errors import InputError
from minilm.interpret import explain, figures, notebook
from minilm.interpret.trace import Source, Trace, in_dtype, place, state, traces
from minilm.pipeline import Pipeline
from minilm.pooling import MeanPooling
from minilm.pretrained import hub
from minilm.version import __version__

__all__ = ["MOST_TOKENS", "tour"]

_Array = np.ndarray[Any, Any]

MOST_TOKENS = 128  # of one text: larger tables can't be read, and the file would not open quickly
_MOST_FOR_ALL_LAYERS = 40

# The steps in their order, with their names in the table of contents.
_TITLES = {
    "text": "Word pieces",
    "embeddings": "Three tables",
    "qkv": "Query, key, value",
    "cell": "One cell",
    "heads": "All heads",
    "feed-forward": "Feed-forward",
    "path": "A token’s path",
    "pooling": "Mean",
    "length": "Length 1",
    "pair": "Every pair",
    "limits": "What it does not tell",
    "run": "Run it yourself",
}


def tour(encoder: Pipeline, a: str, b: str) -> str:
    """Make a page that leads from two texts to their similarity.

    Args:
        encoder: Left as it is. It must pool by the mean and normalize, as all-MiniLM-L6-v2 does.
        a, b: The texts. What is beyond `max_seq_length` is cut, with a `TruncationWarning`.

    Returns:
        A complete HTML document. Of a text of more than 40 tokens it shows two layers, and says so.

    Raises:
        InputTypeError: `a` or `b` is not a string.
        InputError: A text is longer than 128 tokens or has a lone surrogate, or the model is of
            another kind.
    """
    environment = notebook.environment(keep_trailing_newline=True)
    environment.filters |= figures.FILTERS
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template("page.html").render(_context(_measure(encoder, a, b)))


# --- The numbers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scene:
    """All that the page is made of.

    Attributes:
        a, b: The traces, in float32.
        layers: The layers that are shown.
        states: The names of the token vectors before and after each of them, in order.
        pair: By "word" and "token": the explanation.
        tables: By "word.cosine" and the like: what the pair table can show, float64.
        tensors: What is embedded: text -> name -> array. A name in brackets has a part of a tensor.
    """

    a: Trace
    b: Trace
    config: Any
    layers: list[int]
    states: list[str]
    pair: dict[str, explain.Explanation]
    tables: dict[str, _Array]
    deletions: explain.Deletions
    word_of: dict[str, list[int]]
    tensors: dict[str, dict[str, _Array]]
    weights: str


def _measure(encoder: Pipeline, a: str, b: str) -> _Scene:
    """Run the model on both texts and take what is needed."""
    config = encoder.bert.config
    if not isinstance(encoder.pooling, MeanPooling) or isinstance(encoder.normalize, nn.Identity):
        raise InputError("encoder must take the mean and normalize it; this one doesn't", "encoder")
    for argument, text in (("a", a), ("b", b)):
        inputs.check_text(text, argument)
        tokens = encoder.get_tokenizer()([text], encoder.max_seq_length, argument=argument)
        if len(tokens.input_ids[0]) > MOST_TOKENS:
            raise InputError(
                f"{argument} has {tokens.token_counts[0]:,} tokens; the tour shows at most "
                f"{MOST_TOKENS}: pass a sentence or a short paragraph",
                argument,
            )
    first, second = traces(encoder, [a, b], dtype="float32", arguments=["a", "b"])
    last = config.num_hidden_layers - 1
    long = max(len(first["tokens"]), len(second["tokens"])) > _MOST_FOR_ALL_LAYERS
    layers = sorted({0, last}) if long else list(range(last + 1))
    around = sorted({number for layer in layers for number in (layer, layer + 1)})
    states = [state(number) for number in around]
    double = in_dtype(encoder, "float64")  # once here, and not in each of the calls
    pair = {by: explain.explain(double, a, b, by=by) for by in ("word", "token")}
    word_of = {"a": _words(first), "b": _words(second)}
    return _Scene(
        a=first,
        b=second,
        config=config,
        layers=layers,
        states=states,
        pair=pair,
        tables=_tables(double, pair, word_of, states[-1]),
        deletions=explain.explain_deletions(double, a, b),
        word_of=word_of,
        tensors=_carried(first, second, layers, states),
        weights=_weights(encoder),
    )


def _carried(
    a: Trace, b: Trace, layers: list[int], states: list[str]
) -> dict[str, dict[str, _Array]]:
    """Choose what the page carries of the traces: text -> name -> array."""
    names = ["embeddings.word", "embeddings.position", "embeddings.layer_norm.scale", *states]
    for layer in layers:
        parts = [f"attention.{x}" for x in ("query", "key", "value", "probabilities", "output")]
        parts += ["attention_layer_norm.scale", "attention_layer_norm.output"]
        parts += ["feed_forward.output", "feed_forward_layer_norm.scale"]
        names += [f"layers.{layer}.{part}" for part in parts]
    vectors = ["pooled", "length", "embedding"]
    first = {name: a[name].numpy() for name in names + vectors}
    first["embeddings.token_type[0]"] = a["embeddings.token_type"][0].numpy()
    for layer in layers:
        name = f"layers.{layer}.feed_forward.activation"
        activation = a[name].numpy()
        most = np.argsort(-activation, axis=1, kind="stable")[:, : figures.SHOWN_UNITS].astype(
            np.int32
        )
        first[f"{name}[most active]"] = np.take_along_axis(activation, most, axis=1)
        first[f"{name}[most active: unit]"] = most
    return {"a": first, "b": {name: b[name].numpy() for name in [states[-1], *vectors]}}


def _words(found: Trace) -> list[int]:
    """For each token, which word it is a piece of, counted as `explain(by="word")` does."""
    words = [0]
    last = len(found["tokens"]) - 1
    for i, piece in enumerate(found["tokens"][1:], 1):
        is_piece = piece.startswith("##") and 1 < i < last
        words.append(words[-1] + (not is_piece))
    return words


def _tables(
    encoder: Pipeline,
    pair: dict[str, explain.Explanation],
    word_of: dict[str, list[int]],
    last: str,
) -> dict[str, _Array]:
    """Compute what the pair table can show, by tokens and by words.

    The cell of a pull is shareᵢⱼ - s pᵢ qⱼ, with p and q the parts of the tokens in the length of
    the two means: its rows add up to the pulls of A, its columns to those of B, all of it to 0.
    """
    texts = pair["token"].texts
    found = traces(
        encoder, texts, names=[last, "pooled", "length"], dtype="float64", arguments=["a", "b"]
    )
    vectors = [trace[last].numpy() for trace in found]
    parts = [
        each @ trace["pooled"].numpy() / (len(each) * float(trace["length"]) ** 2)
        for each, trace in zip(vectors, found, strict=True)
    ]
    tables = {}
    for by, explanation in pair.items():
        sums = []  # matrices of 0 and 1 that add up the tokens of each row or column
        for words in (word_of["a"], word_of["b"]):
            blocks = words if by == "word" else list(range(len(words)))
            sums.append(np.eye(blocks[-1] + 1)[:, blocks])
        h, g = (each @ vector for each, vector in zip(sums, vectors, strict=True))
        p, q = (each @ part for each, part in zip(sums, parts, strict=True))
        lengths = np.outer(np.linalg.norm(h, axis=1), np.linalg.norm(g, axis=1))
        tables[f"{by}.share"] = explanation.matrix
        tables[f"{by}.cosine"] = h @ g.T / lengths
        tables[f"{by}.pull"] = explanation.matrix - explanation.similarity * np.outer(p, q)
    return tables


def _digits(pair: explain.Explanation) -> int:
    """Find how many decimals make the cells as shown add up to the similarity as shown."""
    for digits in range(4, 9):
        shown = sum(float(f"{cell:.{digits}f}") for cell in pair.matrix.flat)
        if abs(shown - float(f"{pair.similarity:.4f}")) < 0.9e-4:
            break
    return digits


def _weights(encoder: Pipeline) -> str:
    """Say which weights these are; never by a path of this machine."""
    for name, digest in (encoder.source.sha256 if encoder.source else {}).items():
        if name.endswith("model.safetensors"):
            known = digest == hub.SHA256["model.safetensors"]
            return f"{hub.DEFAULT_MODEL if known else 'a model'}, weights SHA-256 {digest}"
    return "a model made of modules"


# --- The page -------------------------------------------------------------------------------------


def _context(scene: _Scene) -> dict[str, Any]:
    """Return what the templates can name."""
    a, config, chosen = scene.a, scene.config, _choice(scene)
    layer = f"layers.{scene.layers[0]}."
    carried = [*scene.tensors["a"].values(), *scene.tensors["b"].values(), *scene.tables.values()]
    token = chosen["token"]
    by_word, by_token = scene.pair["word"], scene.pair["token"]
    similarity = by_token.similarity
    return {
        "version": __version__,
        "weights": scene.weights,
        "data": _data(scene, chosen),
        "titles": _TITLES,
        "sources": {step: _merged(found) for step, found in _sources(scene).items()},
        "most_for_all_layers": _MOST_FOR_ALL_LAYERS,
        # sizes
        "n": len(a["tokens"]),
        "m": len(scene.b["tokens"]),
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_size": config.head_size,
        "layers": config.num_hidden_layers,
        "units": config.intermediate_size,
        "vocabulary": config.vocab_size,
        # what the steps show
        "a": a,
        "b": scene.b,
        "tokens": a["tokens"],
        "token": token,
        "marked": figures.marked(a),
        "pieces": [
            (piece, number, f"{start}–{end}" if end > start else "added")
            for piece, number, (start, end) in zip(
                a["tokens"], a["input_ids"].tolist(), a.offsets, strict=True
            )
        ],
        "shown_layers": scene.layers,
        "first_layer": scene.layers[0],
        "layer": {name.removeprefix(layer): a[name] for name in a if name.startswith(layer)},
        "layer_input": a[state(scene.layers[0])],
        "of_the_script": np.zeros(config.head_size),  # drawn by the script alone
        "attention": a[f"{layer}attention.probabilities"][0].numpy(),
        "habits": {
            number: [
                figures.habits(head)
                for head in a[f"layers.{number}.attention.probabilities"].numpy()
            ]
            for number in scene.layers
        },
        "most_active": figures.most_active(a[f"{layer}feed_forward.activation"][token].numpy()),
        "units_above_zero": _above_zero(scene, scene.layers[0])[token],
        **figures.path(a, scene.states, token),
        "token_vectors": a[state(config.num_hidden_layers)].numpy(),
        "plane": figures.plane(similarity, [float(x["length"]) for x in (a, scene.b)]),
        "pair": figures.shares(by_word, _digits(by_word)),
        "labels_of_b": [label for each in scene.pair.values() for label in each.labels[1]],
        "percents": figures.percents(by_word),
        "similarity": similarity,
        "special": by_token.special,
        "special_share": by_token.special / similarity if abs(similarity) > 1e-9 else 0.0,
        "limits": figures.limits(by_word, scene.deletions),
        "difference": max(a.difference, scene.b.difference),
        "residual": abs(by_token.residual),
        "megabytes": sum(array.nbytes for array in carried) / 1e6,
    }


def _choice(scene: _Scene) -> dict[str, int]:
    """Choose what is looked at first: the pair of words that adds most, and where one looks."""
    pair = scene.pair["token"]
    inner = pair.matrix.copy()
    inner[list(pair.is_special[0])] = -np.inf
    inner[:, list(pair.is_special[1])] = -np.inf
    i, j = divmod(int(inner.argmax()), inner.shape[1])
    if not np.isfinite(inner[i, j]):  # a text of special tokens alone
        i, j = 0, 0
    seen = scene.a[f"layers.{scene.layers[0]}.attention.probabilities"][0, i]
    return {"token": i, "other": j, "key": int(seen.argmax())}


def _data(scene: _Scene, chosen: dict[str, int]) -> dict[str, Any]:
    """Return what the script reads."""
    pair = scene.pair
    return {
        "hidden": scene.config.hidden_size,
        "heads": scene.config.num_attention_heads,
        "headSize": scene.config.head_size,
        "layers": scene.layers,
        "states": scene.states,
        "start": chosen,
        "similarity": pair["token"].similarity,
        "tokens": {"a": scene.a["tokens"], "b": scene.b["tokens"]},
        "ids": {"a": scene.a["input_ids"].tolist(), "b": scene.b["input_ids"].tolist()},
        "wordOf": scene.word_of,
        "labels": {by: each.labels for by, each in pair.items()},
        "special": {by: each.is_special for by, each in pair.items()},
        "digits": {by: _digits(each) for by, each in pair.items()},
        "aboveZero": [_above_zero(scene, layer) for layer in scene.layers],
        "tensors": {
            **{
                side: {name: _encoded(array) for name, array in arrays.items()}
                for side, arrays in scene.tensors.items()
            },
            "pair": {name: _encoded(array) for name, array in scene.tables.items()},
        },
    }


def _above_zero(scene: _Scene, layer: int) -> list[int]:
    """Count the units of the feed-forward network that are active, for each token."""
    active: list[int] = (scene.a[f"layers.{layer}.feed_forward.activation"] > 0).sum(dim=1).tolist()
    return active


def _encoded(array: _Array) -> dict[str, Any]:
    """Encode an array for the script: little-endian, row by row, in base64."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


# --- The quotes -----------------------------------------------------------------------------------


def _merged(sources: Iterable[Source]) -> list[Source]:
    """Drop repeated quotes, and join those that stand right below one another."""
    merged: list[Source] = []
    for source in dict.fromkeys(sources):
        before = merged[-1] if merged else None
        if before and before.file == source.file and before.end == source.line:
            merged[-1] = Source(before.file, before.line, f"{before.text}\n{source.text}")
        else:
            merged.append(source)
    return merged


def _function(function: Callable[..., Any], start: str, lines: int = 0) -> Source:
    """Quote a live function, from the line that begins with `start` on.

    Raises:
        LookupError: No line begins so: the code has changed, and the page would quote another.
    """
    found, first = inspect.getsourcelines(function)
    at = next((i for i, line in enumerate(found) if line.strip().startswith(start)), None)
    if at is None:
        raise LookupError(f"{function.__qualname__} has no line that begins with {start!r}")
    chosen = found[at : at + lines] if lines else found[at:]
    file = place(inspect.getsourcefile(function))
    return Source(file, first + at, textwrap.dedent("".join(chosen)).rstrip("\n"))


def _sources(scene: _Scene) -> dict[str, list[Source]]:
    """Return, by step, the lines of code that do it. Most of them the trace has found."""
    layer = f"layers.{scene.layers[0]}"

    def of(*names: str) -> list[Source]:
        return [scene.a.entries[name].source for name in names]

    tokenize = tokenizer.WordPieceTokenizer._encode
    return {
        "text": [_function(tokenize, "for encoding in encode_batch(", 2)],
        "embeddings": of("embeddings.sum", "embeddings.layer_norm.output"),
        "qkv": of(*(f"{layer}.attention.{name}" for name in ("query", "key", "value"))),
        "cell": of(*(f"{layer}.attention.{x}" for x in ("scores", "probabilities", "context"))),
        "heads": [_function(BertModel.forward, "for layer in", 2)],
        "feed_forward": of(
            f"{layer}.attention_layer_norm.output",
            f"{layer}.feed_forward.activation",
            f"{layer}.feed_forward.output",
            f"{layer}.feed_forward_layer_norm.output",
        ),
        "path": [_function(BertLayer.forward, "hidden_states = self.attention")],
        "pooling": [_function(MeanPooling.forward, "mask = ")],
        "length": of("embedding"),
        "pair": [_function(explain._cells, "left = ")],
        "limits": [
            _function(explain._Side.projection, "along"),
            _function(explain.explain, "pulls = ", 4),
        ],
        "run": [_function(Pipeline.forward, "token_embeddings = self.bert(")],
    }

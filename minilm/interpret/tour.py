"""A page that leads from two texts to their similarity, with every number on the way.

In: an encoder and two texts. Out: one HTML file as a string, which needs nothing else. The numbers
are those of `trace.py` and `explain.py`, the quoted lines those that the trace found; the page is
`tour_page.html`, `tour_page.css` and `tour_page.js` with both put in.

Everything is readable without JavaScript. With it the page draws and recomputes from the tensors
that it carries, in base64 at its end: a chosen subset, the whole trace would be ten times as large.
"""

import base64
import html
import inspect
import json
import math
import shlex
import string
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from minilm import inputs, tokenizer
from minilm.bert import BertLayer, BertModel
from minilm.errors import InputError
from minilm.interpret import explain
from minilm.interpret.trace import Source, Trace, in_dtype, traces
from minilm.pipeline import Pipeline
from minilm.pooling import MeanPooling
from minilm.pretrained import hub
from minilm.version import __version__

__all__ = ["MOST_TOKENS", "tour"]

_Array = np.ndarray[Any, Any]

MOST_TOKENS = 128  # of one text: larger tables can't be read, and the file would not open quickly
_MOST_FOR_ALL_LAYERS = 40
_SHOWN_UNITS = 12  # of the feed-forward network


def tour(encoder: Pipeline, a: str, b: str) -> str:
    """Make the page.

    Args:
        encoder: Left as it is. It must pool by the mean and normalize, as all-MiniLM-L6-v2 does.
        a, b: The texts. What is beyond `max_seq_length` is cut, with a `TruncationWarning`.

    Returns:
        A complete HTML document. Of a text of more than 40 tokens it shows two layers, and says so.

    Raises:
        InputTypeError: A text is none.
        InputError: A text is longer than 128 tokens or has a lone surrogate, or the model is of
            another kind.
    """
    return _page(_measure(encoder, a, b))


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
    counts: list[list[int]]
    weights: str


def _measure(encoder: Pipeline, a: str, b: str) -> _Scene:
    """Run the model on both texts and take what is needed."""
    config = encoder.bert.config
    if not isinstance(encoder.pooling, MeanPooling) or isinstance(encoder.normalize, nn.Identity):
        raise InputError("encoder must take the mean and normalize it; this one doesn't", "encoder")
    if not config.num_hidden_layers:
        raise InputError("encoder has no layer to show", "encoder")
    for text, argument in ((a, "a"), (b, "b")):
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
    around = sorted({state for layer in layers for state in (layer, layer + 1)})
    states = [_state(number) for number in around]
    double = in_dtype(encoder, "float64")  # once here, and not in each of the calls
    pair = {by: explain.explain(double, a, b, by=by) for by in ("word", "token")}
    word_of = {side: _words(found) for side, found in (("a", first), ("b", second))}
    tensors, counts = _chosen(first, second, layers, states, _state(last + 1))
    return _Scene(
        a=first,
        b=second,
        config=config,
        layers=layers,
        states=states,
        pair=pair,
        tables=_tables(double, pair, word_of, _state(last + 1)),
        deletions=explain.explain_deletions(double, a, b),
        word_of=word_of,
        tensors=tensors,
        counts=counts,
        weights=_weights(encoder),
    )


def _state(number: int) -> str:
    """The token vectors after so many layers."""
    if not number:
        return "embeddings.layer_norm.output"
    return f"layers.{number - 1}.feed_forward_layer_norm.output"


def _chosen(
    a: Trace, b: Trace, layers: list[int], states: list[str], last: str
) -> tuple[dict[str, dict[str, _Array]], list[list[int]]]:
    """What the page carries of the traces; and how many units are above 0, by layer and token."""
    names = ["embeddings.word", "embeddings.position", "embeddings.layer_norm.scale"]
    for layer in layers:
        names += [
            f"layers.{layer}.{name}"
            for name in (
                "attention.query",
                "attention.key",
                "attention.value",
                "attention.probabilities",
                "attention.output",
                "attention_layer_norm.scale",
                "attention_layer_norm.output",
                "feed_forward.output",
                "feed_forward_layer_norm.scale",
            )
        ]
    first = {name: a[name].numpy() for name in [*names, *states, "pooled", "length", "embedding"]}
    first["embeddings.token_type[0]"] = a["embeddings.token_type"][0].numpy()
    counts = []
    for layer in layers:
        name = f"layers.{layer}.feed_forward.activation"
        activation = a[name].numpy()
        most = np.argsort(-activation, axis=1, kind="stable")[:, :_SHOWN_UNITS].astype(np.int32)
        first[f"{name}[most active]"] = np.take_along_axis(activation, most, axis=1)
        first[f"{name}[most active: unit]"] = most
        counts.append((activation > 0).sum(axis=1).tolist())
    second = {name: b[name].numpy() for name in (last, "pooled", "length", "embedding")}
    return {"a": first, "b": second}, counts


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
    """What the pair table can show, by tokens and by words.

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


def _digits(table: _Array, total: float) -> int:
    """How many decimals make the cells as shown add up to the similarity as shown."""
    for digits in range(4, 9):
        shown = sum(float(f"{cell:.{digits}f}") for cell in table.flat)
        if abs(shown - float(f"{total:.4f}")) < 0.9e-4:
            break
    return digits


def _weights(encoder: Pipeline) -> str:
    """What is known of the weights; no path of this machine."""
    for name, digest in (encoder.source.sha256 if encoder.source else {}).items():
        if name.endswith("model.safetensors"):
            known = digest == hub.SHA256["model.safetensors"]
            return f"{hub.DEFAULT_MODEL if known else 'a model'}, weights SHA-256 {digest}"
    return "a model made of modules"


# --- Small pieces of HTML -------------------------------------------------------------------------


def _text(text: str) -> str:
    """Any text, literally: escaped, and what HTML can't hold written as in Python."""
    shown = "".join(
        f"\\x{ord(c):02x}" if (ord(c) < 32 and c not in "\n\t") or ord(c) == 127 else c
        for c in text
    )
    return html.escape(shown)


def _token(text: str) -> str:
    """A token or a word: on its own whatever the direction of its letters."""
    return f"<bdi>{_text(text) or '∅'}</bdi>"


def _number(x: float, digits: int = 4, sign: bool = False) -> str:
    """With a true minus, and no minus before 0. `number` in tour_page.js does the same."""
    return f"{x:{'+' if sign else ''}z.{digits}f}".replace("-", "−")


def _shade(x: float, largest: float) -> str:
    """The strength of a cell's colour, from -1 to 1; which colours these are, the style says."""
    share = max(-1.0, min(1.0, x / largest)) if largest else 0.0
    side = "less" if share < 0 else "more"
    return f'class="{side}" style="--v:{abs(share):.3f}"'


def _strip(key: str, label: str, values: _Array, sign: str = "") -> str:
    """A vector: a label, its first numbers, its length, and a canvas on which it is drawn."""
    name = f'<span class="sign">{sign}</span> {label}' if sign else label
    return (
        f'<div class="strip" data-strip="{key}"><p><span class="name">{name}</span> '
        f'<span class="numbers">{_first_numbers(values)}</span></p>{_canvas(values)}</div>'
    )


def _canvas(values: _Array) -> str:
    """What a vector is drawn on, and what stands for it."""
    return (
        f'<canvas width="{len(values)}" height="1" role="img" aria-label="{_alternative(values)}">'
        "</canvas>"
    )


def _first_numbers(values: _Array) -> str:
    first = " ".join(_number(float(x), 3, sign=True) for x in values[:4])
    length = math.sqrt(float(np.square(values.astype(np.float64)).sum()))
    return f"{first} … ‖·‖ {_number(length, 3)}"


def _alternative(values: _Array) -> str:
    lowest, highest = (_number(float(x), 3, sign=True) for x in (values.min(), values.max()))
    return f"{len(values)} numbers from {lowest} to {highest}"


def _scale(key: str, low: str = "", high: str = "", signed: bool = True) -> str:
    """The legend of a figure's colours, zero marked. The script fills in ends that vary."""
    if not signed:
        low, high = "0", high or "1"
    kind = "signed" if signed else "unsigned"
    return (
        f'<p class="scale {kind}" data-scale="{key}"><span class="low">{low}</span>'
        f'<span class="ramp">{"<i>0</i>" if signed else ""}</span>'
        f'<span class="high">{high}</span></p>'
    )


def _column(labels: Sequence[str], narrowest: float) -> str:
    """A width, in rem, in which most labels can be read."""
    longest = max(map(len, labels), default=0)
    return f"--w:{max(narrowest, min(6.5, 0.7 + 0.55 * longest)):.2f}rem"


def _scroll(label: str, inner: str, kind: str = "") -> str:
    """What may be wider than a phone scrolls by itself, by keyboard too."""
    return (
        f'<div class="scroll {kind}" role="region" aria-label="{label}" tabindex="0">{inner}</div>'
    )


def _table(head: Sequence[str], rows: Iterable[str], kind: str = "", caption: str = "") -> str:
    cells = "".join(f'<th scope="col">{each}</th>' for each in head)
    title = f"<caption>{caption}</caption>" if caption else ""
    body = "".join(rows)
    return (
        f'<table class="{kind}">{title}<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
    )


def _row(label: str, cells: Iterable[str], attributes: str = "") -> str:
    inner = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr {attributes}><th scope="row">{label}</th>{inner}</tr>'


def _quote(sources: Sequence[Source]) -> str:
    """Lines of this package; what stands in one place is quoted as one."""
    merged: list[Source] = []
    for source in dict.fromkeys(sources):
        before = merged[-1] if merged else None
        if before and (before.file, _end(before)) == (source.file, source.line):
            merged[-1] = Source(before.file, before.line, f"{before.text}\n{source.text}")
        else:
            merged.append(source)
    return "".join(
        f'<figure class="source" data-file="{source.file}" data-line="{source.line}">'
        f"<figcaption>{source.file}, line {source.line}</figcaption>"
        f"<pre><code>{html.escape(source.text)}</code></pre></figure>"
        for source in merged
    )


def _end(source: Source) -> int:
    """The first line after it."""
    return source.line + source.text.count("\n") + 1


def _function(function: Callable[..., Any], start: str, lines: int = 0) -> Source:
    """The lines of a live function, from the one that begins with `start` on.

    Raises:
        LookupError: No line of it does: the code has changed, and the page would quote another.
    """
    found, first = inspect.getsourcelines(function)
    at = next((i for i, line in enumerate(found) if line.strip().startswith(start)), None)
    if at is None:
        raise LookupError(f"{function.__qualname__} has no line that begins with {start!r}")
    chosen = found[at : at + lines] if lines else found[at:]
    name = Path(inspect.getsourcefile(function) or "").name
    return Source(f"minilm/{name}", first + at, textwrap.dedent("".join(chosen)).rstrip("\n"))


# --- The page -------------------------------------------------------------------------------------


def _page(scene: _Scene) -> str:
    """Put everything into the template."""
    a, b, config = scene.a, scene.b, scene.config
    folder = resources.files("minilm.interpret")

    def read(suffix: str) -> str:
        return folder.joinpath(f"tour_page.{suffix}").read_text(encoding="utf-8")

    similarity = scene.pair["token"].similarity
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    chosen = _choice(scene)
    values: dict[str, Any] = {
        "version": __version__,
        "css": read("css"),
        "js": read("js"),
        "data": _json(_data(scene, chosen)),
        "text_a": _text(a.text) or "<i>(the empty text)</i>",
        "text_b": _text(b.text) or "<i>(the empty text)</i>",
        "similarity": _number(similarity),
        "notes": _notes(scene),
        "flow": _flow(scene),
        "toc": _toc(),
        "chips": _chips(a),
        "first_layer": scene.layers[0],
        "last_layer_index": len(scene.layers) - 1,
        "last_head": heads - 1,
        "n": len(a["tokens"]),
        "m": len(b["tokens"]),
        "hidden": config.hidden_size,
        "heads": heads,
        "head_size": config.head_size,
        "layers": layers,
        "last_layer": layers - 1,
        "states": layers + 1,
        "units": f"{config.intermediate_size:,}",
        "vocabulary": f"{config.vocab_size:,}",
        "last_id": f"{config.vocab_size - 1:,}",
        "words": len(scene.deletions.labels),
        "heads_times_layers": f"{_count(heads).capitalize()} heads × {_count(layers)} layers",
        "footer": html.escape(f"Made by minilm {__version__} with {scene.weights}."),
    }
    for name, figure in _figures(scene, chosen["token"]).items():
        values[f"figure_{name}"] = figure
    for name, sources in _sources(scene).items():
        values[f"code_{name}"] = _quote(sources)
    return string.Template(read("html")).substitute(values)


_COUNTS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)


def _count(number: int) -> str:
    return _COUNTS[number] if number < len(_COUNTS) else str(number)


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


def _toc() -> str:
    return "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in _TITLES.items())


def _chips(a: Trace) -> str:
    return "".join(
        f'<button type="button" class="chip" data-token="{i}">{_token(piece)}</button>'
        for i, piece in enumerate(a["tokens"])
    )


def _choice(scene: _Scene) -> dict[str, int]:
    """What is looked at first: the pair of words that adds most, and where the first one looks."""
    pair = scene.pair["token"]
    inner = pair.matrix.copy()
    inner[list(pair.is_special[0])] = -np.inf
    inner[:, list(pair.is_special[1])] = -np.inf
    i, j = divmod(int(inner.argmax()), inner.shape[1])
    if not np.isfinite(inner[i, j]):  # a text of special tokens alone
        i, j = 0, 0
    seen = scene.a[f"layers.{scene.layers[0]}.attention.probabilities"][0, i]
    return {"token": i, "other": j, "key": int(seen.argmax())}


def _notes(scene: _Scene) -> str:
    """What the reader has to know of a long text."""
    notes = []
    total = scene.config.num_hidden_layers
    if len(scene.layers) < total:
        shown = " and ".join(map(str, scene.layers))
        notes.append(
            f"A text has more than {_MOST_FOR_ALL_LAYERS} tokens, so that this page keeps two of "
            f"the {total} layers, {shown}, to stay small."
        )
    for side, found in (("A", scene.a), ("B", scene.b)):
        if found.unread:
            notes.append(
                f"{found.unread:,} tokens at the end of {side} are beyond the model’s limit; they "
                "were not read, and have no part in anything below."
            )
    return "".join(f'<p class="warning">{note}</p>' for note in notes)


def _json(value: Any) -> str:
    """JSON that can stand inside a `<script>` whatever the texts are."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(scene: _Scene, chosen: dict[str, int]) -> dict[str, Any]:
    """What the script reads."""
    pair = scene.pair
    similarity = pair["token"].similarity
    return {
        "hidden": scene.config.hidden_size,
        "heads": scene.config.num_attention_heads,
        "headSize": scene.config.head_size,
        "layers": scene.layers,
        "states": scene.states,
        "start": chosen,
        "similarity": similarity,
        "tokens": {"a": scene.a["tokens"], "b": scene.b["tokens"]},
        "ids": {"a": scene.a["input_ids"].tolist(), "b": scene.b["input_ids"].tolist()},
        "wordOf": scene.word_of,
        "labels": {by: each.labels for by, each in pair.items()},
        "special": {by: each.is_special for by, each in pair.items()},
        "digits": {by: _digits(scene.tables[f"{by}.share"], similarity) for by in pair},
        "aboveZero": scene.counts,
        "tensors": {
            **{
                side: {name: _encoded(array) for name, array in arrays.items()}
                for side, arrays in scene.tensors.items()
            },
            "pair": {name: _encoded(array) for name, array in scene.tables.items()},
        },
    }


def _encoded(array: _Array) -> dict[str, Any]:
    """Little-endian, row by row, in base64."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


# --- The steps ------------------------------------------------------------------------------------


def _figures(scene: _Scene, token: int) -> dict[str, str]:
    """By step: what is to be seen."""
    return {
        "text": _figure_text(scene),
        "embeddings": _figure_embeddings(scene, token),
        "qkv": _figure_qkv(scene),
        "cell": _figure_cell(scene),
        "heads": _figure_heads(scene),
        "feed_forward": _figure_feed_forward(scene, token),
        "path": _figure_path(scene, token),
        "pooling": _figure_pooling(scene),
        "length": _figure_length(scene),
        "pair": _figure_pair(scene),
        "limits": _figure_limits(scene),
        "run": _figure_run(scene),
    }


def _sources(scene: _Scene) -> dict[str, list[Source]]:
    """By step: the lines that do it. Most of them the trace has found."""
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


def _of(*names: str) -> str:
    """What is looked at, above a figure."""
    texts = (f'{name} <b data-name="{name}"></b>' for name in names)
    return f'<p class="of needs-js">{", ".join(texts)}</p>'


def _figure_text(scene: _Scene) -> str:
    """The text with its pieces marked, and the pieces with their numbers."""
    a = scene.a
    marked, position = [], 0
    rows = []
    for i, (piece, number, (start, end)) in enumerate(
        zip(a["tokens"], a["input_ids"].tolist(), a.offsets, strict=True)
    ):
        if end > start:
            marked.append(_text(a.text[position:start]))
            marked.append(f'<mark data-token="{i}">{_text(a.text[start:end])}</mark>')
            position = end
        place = f"{start}–{end}" if end > start else "added"
        cells = (f"<code>{_token(piece)}</code>", f"{number:,}", place)
        rows.append(_row(str(i), cells, f'data-token="{i}"'))
    marked.append(_text(a.text[position:]))
    table = _table(("position", "piece", "row of the table", "characters"), rows, "plain left")
    return f'<p class="marked" dir="auto">{"".join(marked)}</p>' + _scroll("Word pieces", table)


def _figure_embeddings(scene: _Scene, t: int) -> str:
    a = scene.a
    rows = {name: a[f"embeddings.{name}"][t].numpy() for name in ("word", "position", "token_type")}
    strips = [
        _strip("word", 'word table, row <span data-name="id"></span>', rows["word"]),
        _strip("position", 'position table, row <span data-name="position"></span>',
               rows["position"], "+"),
        _strip("type", "type table, row 0", rows["token_type"], "+"),
        _strip("sum", "the sum", a["embeddings.sum"][t].numpy(), "="),
        _strip("normed", 'after the norm, divided by <span data-name="scale"></span>',
               a["embeddings.layer_norm.output"][t].numpy(), "→"),
    ]  # fmt: skip
    scales = _scale("embeddings"), _scale("normed")
    return _of("token") + "".join([*strips[:4], scales[0], strips[4], scales[1]])


def _figure_qkv(scene: _Scene) -> str:
    """Three pictures, a row for each token."""
    canvas = _canvas(np.zeros(scene.config.head_size))  # until the script draws
    rows = [
        _row(_token(piece), [canvas] * 3, f'data-token="{i}"')
        for i, piece in enumerate(scene.a["tokens"])
    ]
    table = _table(("token", "query", "key", "value"), rows, "pictures")
    return _of("layer", "head") + table.replace("<table", '<table id="qkv-table"') + _scale("qkv")


def _figure_cell(scene: _Scene) -> str:
    """The table of one head, the arithmetic of one cell, and its row of the softmax."""
    pieces = scene.a["tokens"]
    found = scene.a[f"layers.{scene.layers[0]}.attention.probabilities"][0].numpy()
    largest = float(found.max())
    rows = []
    for i, piece in enumerate(pieces):
        cells = "".join(
            f'<td data-i="{i}" data-j="{j}" {_shade(float(p), largest)}>{_number(float(p), 3)}</td>'
            for j, p in enumerate(found[i])
        )
        rows.append(f'<tr data-token="{i}"><th scope="row">{_token(piece)}</th>{cells}</tr>')
    head = ["looks ↓ at →", *map(_token, pieces)]
    style = f'<table id="attention-table" style="{_column(pieces, 3.3)}"'
    table = _table(head, rows, "cells").replace("<table", style)
    softmax = _table(
        ("looked at", "q · k", "÷ √" + str(scene.config.head_size), "e^(s − max)", "÷ sum", ""),
        (
            _row(_token(piece), ("", "", "", "", '<span class="meter"><i></i></span>'),
                 f'data-key="{j}"')
            for j, piece in enumerate(pieces)
        ),
        "plain softmax",
    ).replace("<table", '<table id="softmax-table"')  # fmt: skip
    nothing = np.zeros(scene.config.head_size)  # until the script knows the cell
    strips = _strip("product", "q × k, channel by channel", nothing)
    strips += _strip("context", "p × v: what the token hears", nothing, "Σ")
    return (
        _of("layer", "head")
        + '<div class="beside"><div>'
        + _scroll("Attention of one head", table)
        + _scale("attention", high=_number(largest, 3), signed=False)
        + "</div>"
        + _panel("cell-panel", strips + _scale("cell"))
        + '</div><h3 class="panel-title needs-js">Scores, and shares that add up to 1: the row of '
        '<b data-name="token"></b></h3>' + _scroll("Softmax", softmax, "needs-js")
    )


def _panel(name: str, more: str = "") -> str:
    """Where the script writes out the arithmetic of a cell."""
    return (
        f'<div class="panel needs-js" id="{name}" aria-live="polite"><h3 class="panel-title"></h3>'
        '<div class="lines" role="region" aria-label="Arithmetic" tabindex="0"></div>'
        f"{more}</div>"
    )


def _figure_heads(scene: _Scene) -> str:
    """A small picture for each head, and where the chosen one looks."""
    heads, n = scene.config.num_attention_heads, len(scene.a["tokens"])
    rows = []
    for layer in scene.layers:
        found = scene.a[f"layers.{layer}.attention.probabilities"].numpy()
        cells = "".join(
            f'<td data-i="{layer}" data-j="{head}"><canvas width="{n}" height="{n}" role="img" '
            f'aria-label="layer {layer}, head {head}: {_habit_text(_habits(found[head]))}">'
            "</canvas></td>"
            for head in range(heads)
        )
        rows.append(f'<tr><th scope="row">{layer}</th>{cells}</tr>')
    titles = ['<span class="hide">layer</span>', *map(str, range(heads))]
    table = _table(titles, rows, "thumbnails", "rows: layers; columns: heads").replace(
        "<table", '<table id="heads-table"'
    )
    names = "".join(f"<span>{_token(piece)}</span>" for piece in scene.a["tokens"])
    first = _habits(scene.a[f"layers.{scene.layers[0]}.attention.probabilities"][0].numpy())
    habits = _table(
        ("looks at", "of all", ""),
        (
            _row(name, (f"{_number(100 * share, 1)} %",
                        f'<span class="meter"><i style="--v:{share:.3f}"></i></span>'))
            for name, share in first.items()
        ),
        "plain habits",
    ).replace("<table", '<table id="habits-table"')  # fmt: skip
    return (
        table
        + _scale("heads", signed=False)
        + '<div class="two"><div>'
        + _of("layer", "head")
        + habits
        + "</div>"
        + f'<div class="map needs-js" style="--n:{n}"><div class="across" aria-hidden="true">'
        f'{names}</div><div class="down" aria-hidden="true">{names}</div>'
        f'<canvas id="big-head" width="{n}" height="{n}" role="img" aria-label=""></canvas></div>'
        "</div>"
    )


def _habits(probabilities: _Array) -> dict[str, float]:
    """Where one head looks, on the mean over the tokens: shares of 1."""
    n = len(probabilities)
    place = np.arange(n)
    kinds = np.full((n, n), 5)
    kinds[place[:-1], place[1:]] = 4
    kinds[place[1:], place[:-1]] = 3
    kinds[place, place] = 2
    kinds[:, -1] = 1
    kinds[:, 0] = 0
    names = ("[CLS]", "[SEP]", "itself", "the token before", "the token after", "others")
    return {
        name: float(probabilities[kinds == kind].astype(np.float64).sum() / n)
        for kind, name in enumerate(names)
    }


def _habit_text(habits: dict[str, float]) -> str:
    most = sorted(habits.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{share:.0%} at {name}" for name, share in most)


def _figure_feed_forward(scene: _Scene, t: int) -> str:
    a, layer = scene.a, scene.layers[0]

    def row(name: str) -> _Array:
        array: _Array = a[f"layers.{layer}.{name}"][t].numpy()
        return array

    before = [
        _strip("x", "x: the token so far", a[_state(layer)][t].numpy()),
        _strip("attention", "attention(x): what it heard", row("attention.output"), "+"),
        _strip("residual", "the sum", row("attention_layer_norm.residual"), "="),
        _strip("y", 'y: after the norm, divided by <span data-name="attention-scale"></span>',
               row("attention_layer_norm.output"), "→"),
    ]  # fmt: skip
    after = [
        _strip("network", "feed-forward(y): what the units write", row("feed_forward.output"), "+"),
        _strip("residual2", "the sum with y", row("feed_forward_layer_norm.residual"), "="),
        _strip("z", 'z: after the norm, divided by <span data-name="network-scale"></span>',
               a[_state(layer + 1)][t].numpy(), "→"),
    ]  # fmt: skip
    name = f"layers.{layer}.feed_forward.activation"
    values = scene.tensors["a"][f"{name}[most active]"][t]
    units = scene.tensors["a"][f"{name}[most active: unit]"][t]
    rows = (
        _row(f"unit {unit}", (_number(float(value), 3),
             f'<span class="meter"><i style="--v:{max(0, value / values[0]):.3f}"></i></span>'))
        for unit, value in zip(units, values, strict=True)
    )  # fmt: skip
    table = _table(("the most active", "after GELU", ""), rows, "plain units").replace(
        "<table", '<table id="units-table"'
    )
    above = scene.counts[0][t]
    return (
        _of("layer", "token")
        + "".join(before)
        + table
        + f'<p class="fine"><b data-name="above-zero">{above}</b> of '
        f"{scene.config.intermediate_size:,} units are above 0</p>"
        + "".join(after)
        + _scale("network")
    )


def _figure_path(scene: _Scene, t: int) -> str:
    """A map of all token vectors at all states, and the states of one token in numbers."""
    a = scene.a
    vectors = np.stack([a[name].double().numpy() for name in scene.states])  # [states, tokens, 384]
    flat = vectors.reshape(-1, vectors.shape[-1])
    centred = flat - flat.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    points = (centred @ axes[:2].T).reshape(*vectors.shape[:2], 2)
    shown = float((sizes[:2] ** 2).sum() / max((sizes**2).sum(), 1e-30))
    low, high = points.min(axis=(0, 1)), points.max(axis=(0, 1))
    width, height = 640, 380
    places = (points - low) / np.maximum(high - low, 1e-9) * [width - 80, height - 60] + [40, 30]
    lines = []
    for i, piece in enumerate(a["tokens"]):
        path = " ".join(f"{x:.1f},{height - y:.1f}" for x, y in places[:, i])
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="{3 if s else 4.5}"/>'
            for s, (x, y) in enumerate(places[:, i])
        )
        x, y = places[-1, i]
        anchor = "end" if x > width - 120 else "start"
        text = f'<text x="{x + (-7 if anchor == "end" else 7):.1f}" y="{height - y - 6:.1f}" '
        text += f'text-anchor="{anchor}">{_text(piece)}</text>'
        on = ' class="on"' if i == t else ""
        lines.append(f'<g data-token="{i}"{on}><polyline points="{path}"/>{dots}{text}</g>')
    svg = (
        f'<svg class="path" viewBox="0 0 {width} {height}" role="img" aria-label="The path of each '
        f'token from the embedding to the last layer, on a plane">{"".join(lines)}</svg>'
    )
    rows = []
    pooled = a["pooled"].double().numpy()
    for s, name in enumerate(scene.states):
        before = _cosine(vectors[s, t], vectors[s - 1, t]) if s else None
        cells = (
            _canvas(vectors[s, t]),
            "" if before is None else _number(before, 3),
            _number(_cosine(vectors[s, t], vectors[0, t]), 3),
            _number(_cosine(vectors[s, t], pooled), 3),
        )
        rows.append(_row(_state_label(name), cells))
    head = ("state", "its numbers", "cosine to the last", "to the first", "to the mean")
    table = _table(head, rows, "plain states").replace("<table", '<table id="states-table"')
    return (
        _of("token")
        + f'<div class="two"><div class="stack">{svg}<p class="fine">The plane of the two '
        f"directions in which these vectors differ most; {shown:.0%} of their spread lies in it. A "
        'path begins at the large dot.</p></div><div class="stack">'
        + _scroll("States", table)
        + _scale("path")
        + "</div></div>"
    )


def _state_label(name: str) -> str:
    return "embedding" if name.startswith("embeddings") else f"after layer {name.split('.')[1]}"


def _cosine(x: _Array, y: _Array) -> float:
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def _figure_pooling(scene: _Scene) -> str:
    """The last layer's vectors one below the other, and their mean."""
    a = scene.a
    vectors = a[_state(scene.config.num_hidden_layers)].numpy()
    width = vectors.shape[1]
    rows = [
        _row(
            _token(piece),
            [_canvas(row), _number(float(row[0]), 3, sign=True)],
            f'data-token="{i}"',
        )
        for i, (piece, row) in enumerate(zip(a["tokens"], vectors, strict=True))
    ]  # fmt: skip
    head = ("token", f"its {width} numbers", "the first")
    table = _table(head, rows, "pictures pool").replace("<table", '<table id="pool-table"')
    terms = " ".join(_number(float(row[0]), 3, sign=True) for row in vectors)
    mean = _number(float(a["pooled"][0]), 3, sign=True)
    return (
        table
        + _strip("mean", "u: the mean", a["pooled"].numpy(), "=")
        + _scroll(
            "The first number of the mean",
            f'<p class="arithmetic">({terms.lstrip("+")}) ÷ {len(vectors)} = {mean}</p>',
        )
        + _scale("pooling")
    )


def _figure_length(scene: _Scene) -> str:
    """The vector before and after, and both texts' vectors in the plane that they span."""
    a = scene.a
    length = float(a["length"])
    first = float(a["pooled"][0])
    arithmetic = (
        f"{_number(first, 5)} ÷ {_number(length, 5)} = {_number(float(a['embedding'][0]), 4)}"
    )
    return (
        '<div class="two"><div class="stack">'
        + _strip("pooled", "u", a["pooled"].numpy())
        + _scale("length")
        + _strip("embedding", "û: of length 1", a["embedding"].numpy(), "→")
        + _scale("unit")
        + f'<p class="fine">The first number: <span class="arithmetic">{arithmetic}</span></p>'
        + '<p class="fine">In the drawing, the plane that the vectors of A and B span, to scale: '
        "u and v, and on the circle of radius 1 û and v̂.</p></div>" + _plane(scene) + "</div>"
    )


def _plane(scene: _Scene) -> str:
    """The two pooled vectors as they are, and on the unit circle."""
    similarity = max(-1.0, min(1.0, scene.pair["token"].similarity))
    angle = math.acos(similarity)
    lengths = [float(found["length"]) for found in (scene.a, scene.b)]
    unit = 300 / max(*lengths, 1.0)
    x0, y0 = (90, 300) if angle < 1.7 else (330, 300)

    def at(direction: float, distance: float) -> tuple[float, float]:
        return x0 + distance * math.cos(direction), y0 - distance * math.sin(direction)

    turn = 0.1 if angle < 1.4 else 0.0
    lines = []
    for name, side, length, direction in zip(
        "uv", "ab", lengths, (turn, turn + angle), strict=True
    ):
        tip, part = at(direction, unit * length), at(direction, unit)
        back = [at(direction + d, unit * length - 13) for d in (0.02, -0.02)]
        head = " ".join(f"{x:.1f},{y:.1f}" for x, y in (tip, *back))
        anchor = "start" if math.cos(direction) > -0.3 else "end"
        label = at(direction, unit * length + 12)
        lines.append(
            f'<g class="{side}"><line x1="{x0}" y1="{y0}" x2="{tip[0]:.1f}" y2="{tip[1]:.1f}"/>'
            f'<line class="thick" x1="{x0}" y1="{y0}" x2="{part[0]:.1f}" y2="{part[1]:.1f}"/>'
            f'<polygon points="{head}"/><text x="{label[0]:.1f}" y="{label[1]:.1f}" '
            f'text-anchor="{anchor}">{name}, ‖{name}‖ = {_number(length, 4)}</text></g>'
        )
    arc = [at(d, unit + 14) for d in np.linspace(turn, turn + angle, 24)]
    bow = " ".join(f"{x:.1f},{y:.1f}" for x, y in arc)
    x, y = at(turn + angle / 2, unit + 24)
    return (
        '<svg class="plane" viewBox="0 0 660 380" role="img" aria-label="The vectors of A and B '
        f'at an angle of {math.degrees(angle):.1f} degrees">'
        f'<circle cx="{x0}" cy="{y0}" r="{unit:.1f}"/><polyline points="{bow}"/>'
        f'<text class="angle" x="{x:.1f}" y="{y:.1f}">'
        f"{math.degrees(angle):.1f}°, cos {_number(similarity)}</text>{''.join(lines)}</svg>"
    )


def _figure_pair(scene: _Scene) -> str:
    """B in short, the pair table with its sums, and the three parts of the similarity."""
    b = scene.b
    token = scene.pair["token"]
    chips = "".join(f"<li>{_token(piece)}</li>" for piece in b["tokens"])
    same = (
        f'<div class="b-side"><ol class="pieces" aria-label="Word pieces of B">{chips}</ol>'
        + _strip("b-mean", f"v: the mean of {len(b['tokens'])} tokens of B", b["pooled"].numpy())
        + _strip("b-embedding", "v̂: of length 1", b["embedding"].numpy(), "→")
        + "</div>"
    )
    controls = (
        '<div class="controls needs-js">'
        + _radios("by", "rows and columns", (("word", "words"), ("token", "tokens")))
        + _radios("show", "cells", (("share", "share"), ("cosine", "cosine"), ("pull", "pull")))
        + '<label class="box"><input type="checkbox" id="hide"> hide special tokens</label>'
        '<button type="button" id="count">Add up the cells</button></div>'
    )
    return (
        same
        + controls
        + '<p class="fine needs-js" id="show-note"></p>'
        + f'<div class="tall" style="--rows:{len(scene.a["tokens"])}">'
        + _scroll("Pairs of words of A and B", _pair_table(scene, "word"))
        + "</div>"
        + _scale("pair", *_ends(scene.tables["word.share"]))
        + '<div class="two uneven">'
        + _panel("pair-panel")
        + '<div class="panel total"><h3 class="panel-title">The sum of all cells</h3>'
        f'<p class="big"><output id="total">{_number(token.similarity)}</output></p>'
        '<p class="fine" id="hidden">'
        f"Cells of [CLS] or [SEP]: {_number(token.special)}</p>" + _parts(scene) + "</div></div>"
    )


def _radios(name: str, legend: str, options: Sequence[tuple[str, str]]) -> str:
    inner = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"'
        f"{' checked' if not i else ''}><span>{label}</span></label>"
        for i, (value, label) in enumerate(options)
    )
    return f'<fieldset class="radios"><legend>{legend}</legend>{inner}</fieldset>'


def _ends(table: _Array) -> tuple[str, str]:
    largest = float(np.abs(table).max(initial=0.0))
    return _number(-largest, 3), _number(largest, 3, sign=True)


def _pair_table(scene: _Scene, by: str) -> str:
    """The shares, as the page shows them before anything is clicked."""
    pair, table = scene.pair[by], scene.tables[f"{by}.share"]
    digits = _digits(table, pair.similarity)
    largest = float(np.abs(table).max(initial=0.0))
    rows, so_far = [], 0.0
    for i, label in enumerate(pair.labels[0]):
        so_far += float(pair.share_a[i])
        cells = "".join(
            f'<td data-i="{i}" data-j="{j}" {_shade(float(cell), largest)}>'
            f"{_number(float(cell), digits)}</td>"
            for j, cell in enumerate(table[i])
        )
        rows.append(
            f'<tr><th scope="row">{_token(label)}</th>{cells}<td class="sum">'
            f'{_number(float(pair.share_a[i]), digits)}</td><td class="sum">'
            f"{_number(so_far, digits)}</td></tr>"
        )
    sums = "".join(
        f'<td class="sum">{_number(float(share), digits)}</td>' for share in pair.share_b
    )
    total = _number(float(table.sum()), digits)
    foot = (
        f'<tfoot><tr><th scope="row">sum</th>{sums}<td class="sum all">{total}</td>'
        '<td class="sum"></td></tr></tfoot>'
    )
    head = ["A ↓ B →", *map(_token, pair.labels[1]), "sum", "so far"]
    width = _column([label for each in scene.pair.values() for label in each.labels[1]], 4.5)
    style = f'<table id="pair-table" style="{width}"'
    return (
        _table(head, rows, "cells")
        .replace("</tbody></table>", f"</tbody>{foot}</table>")
        .replace("<table", style)
    )


def _parts(scene: _Scene) -> str:
    """Words, punctuation, special tokens: percentages that add up to 100."""
    pair = scene.pair["word"]
    kinds = [
        [
            2 if special else 0 if any(c.isalnum() or c == "_" for c in label) else 1
            for label, special in zip(pair.labels[side], pair.is_special[side], strict=True)
        ]
        for side in (0, 1)
    ]
    kind = np.maximum.outer(np.array(kinds[0]), np.array(kinds[1]))
    values = [float(pair.matrix[kind == k].sum()) for k in range(3)]
    if abs(pair.similarity) < 1e-9:
        return ""
    percents = _rounded([100 * value / pair.similarity for value in values])
    names = ("words", "punctuation", "special tokens")
    bars = "".join(
        f'<i class="part{k}" style="--v:{max(0.0, percent) / 100:.4f}"></i>'
        for k, percent in enumerate(percents)
    )
    terms = " + ".join(
        f'<span class="part{k}">{name} <b>{_number(percent, 1)}</b> %</span>'
        for k, (name, percent) in enumerate(zip(names, percents, strict=True))
    )
    return f'<div class="parts">{bars}</div><p id="parts">{terms} = 100 %</p>'


def _rounded(percents: Sequence[float]) -> list[float]:
    """To one decimal, so that the sum stays 100: the largest remainders are rounded up."""
    tenths = [math.floor(10 * percent) for percent in percents]
    order = sorted(range(len(percents)), key=lambda k: tenths[k] - 10 * percents[k])
    for k in order[: 1000 - sum(tenths)]:
        tenths[k] += 1
    return [each / 10 for each in tenths]


def _figure_limits(scene: _Scene) -> str:
    """Share, pull and deletion side by side, and where they disagree."""
    pair, deletions = scene.pair["word"], scene.deletions
    ordinary = [i for i, special in enumerate(pair.is_special[0]) if not special]
    shares = [float(pair.share_a[i]) for i in ordinary]
    pulls = [float(pair.pull_a[i]) for i in ordinary]
    changes = [-float(change) for change in deletions.change]
    rows = [
        _row(
            _token(label),
            (
                _bar(share, shares),
                _bar(pull, pulls),
                _number(float(without), 4),
                _bar(change, changes),
            ),
            f'data-word="{i}"',
        )
        for i, label, share, pull, without, change in zip(
            ordinary, deletions.labels, shares, pulls, deletions.without, changes, strict=True
        )
    ]
    special = [i for i, is_special in enumerate(pair.is_special[0]) if is_special]
    share = sum(float(pair.share_a[i]) for i in special)
    pull = sum(float(pair.pull_a[i]) for i in special)
    rows.append(
        _row(
            "[CLS], [SEP]",
            (_bar(share, [*shares, share]), _bar(pull, [*pulls, pull]), "", ""),
            'class="rest"',
        )
    )
    rows.append(
        _row("all", (_number(pair.similarity, 4, True), _number(pull + sum(pulls), 4, True),
                     _number(deletions.similarity, 4), "not a sum"), 'class="rest"')
    )  # fmt: skip
    head = ("word of A", "share", "pull", "similarity without it", "deleting it changes by")
    of_all = pair.special / pair.similarity if abs(pair.similarity) > 1e-9 else 0.0
    return (
        _scroll("Share, pull and deletion", _table(head, rows, "plain limits"))
        + f'<ul class="points"><li>{_disagreement(deletions, shares)}</li>'
        "<li>Pull is the exact derivative: above 0, more weight in the mean for that word would "
        "make the texts more alike. It is about the mean, not about the meaning.</li>"
        f"<li>Cells that touch [CLS] or [SEP] hold {_number(pair.special)} of "
        f"{_number(pair.similarity)}, {of_all:.0%}. It is theirs: to spread it over the words "
        "would be an invention.</li>"
        "<li>A deletion is a measurement of another sentence, and its changes don’t add up. Cells "
        "shrink as texts grow, so that they can’t be compared between pairs of texts.</li></ul>"
    )


def _bar(x: float, among: Sequence[float]) -> str:
    """A number with a bar to the left or the right of a marked zero."""
    largest = max((abs(each) for each in among), default=0.0) or 1.0
    side = "less" if x < 0 else "more"
    return (
        f'<span class="bar-number">{_number(x, 4, sign=True)}</span>'
        f'<span class="zero-bar"><i class="{side}" style="--v:{abs(x) / largest:.3f}"></i></span>'
    )


def _disagreement(deletions: explain.Deletions, shares: Sequence[float]) -> str:
    """The word whose share and whose deletion say the most different things."""
    found = [
        (share * -float(change), i)
        for i, (share, change) in enumerate(zip(shares, deletions.change, strict=True))
    ]
    most, i = max(found, default=(0.0, 0))
    if most <= 0:
        return (
            "Share is not cause. In this pair each word with a share above 0 also lowers the "
            "similarity when it is deleted; in others it does not."
        )
    change = -float(deletions.change[i])
    verb = "raises" if change > 0 else "lowers"
    return (
        f"Share is not cause: “{_token(deletions.labels[i])}” has a share of "
        f"{_number(shares[i], 3, True)}, yet deleting it <em>{verb}</em> the similarity by "
        f"{_number(abs(change), 3)}."
    )


def _figure_run(scene: _Scene) -> str:
    """The set-up of all the lines above, the command, and what the page carries."""
    a, b = scene.a.text, scene.b.text
    setup = (
        "import torch\n"
        "from minilm import SentenceEncoder\n"
        "from minilm.interpret.explain import explain\n\n"
        "encoder = SentenceEncoder.from_pretrained()\n"
        f"a = {a!r}\nb = {b!r}\n"
        "trace = encoder.trace(a)\n"
        "print(trace)  # every tensor by name\n"
        "print(explain(encoder, a, b))\n"
    )
    command = f"minilm tour {shlex.quote(a)} {shlex.quote(b)} -o tour.html"
    size = sum(array.nbytes for part in scene.tensors.values() for array in part.values())
    size += sum(array.nbytes for array in scene.tables.values())
    rest = max(scene.a.difference, scene.b.difference)
    residual = abs(scene.pair["token"].residual)
    return (
        f'<pre class="setup"><code>{_text(setup)}</code></pre>'
        f'<pre class="command"><code>{_text(command)}</code></pre>'
        '<ul class="points">'
        f"<li>The vectors on this page differ from those of <code>encode</code>, which takes a "
        f"faster path, by {rest:.0e} at most.</li>"
        f"<li>The similarity minus the sum of all cells, in float64: {residual:.0e}.</li>"
        f"<li>The page carries {size / 1e6:.1f} MB of tensors, bit for bit those of "
        "<code>encoder.trace(text)</code> in float32. The scores, the sums before the norms and "
        "what a token hears are computed from them here.</li>"
        "<li>For B in as much detail, swap the two texts.</li></ul>"
    )


def _flow(scene: _Scene) -> str:
    """Text to similarity as one drawing, for both texts."""
    n, m = len(scene.a["tokens"]), len(scene.b["tokens"])
    hidden, layers = scene.config.hidden_size, scene.config.num_hidden_layers
    names = ("text", "pieces", "three tables", f"{layers} layers", "mean", "÷ length")
    vector = f"[{hidden}]"
    parts = []
    width, gap, height = 132, 28, 52
    for row, (side, count) in enumerate((("A", n), ("B", m))):
        y = 10 + row * 84
        matrix = f"[{count}, {hidden}]"
        written = f"{len((scene.a, scene.b)[row].text):,} characters"
        shapes = (written, f"[{count}]", matrix, matrix, vector, vector)
        for k, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            x = 4 + k * (width + gap)
            label = name if k else f"text {side}"
            stack = "".join(
                f'<rect class="back" x="{x + 3 * d}" y="{y - 3 * d}" width="{width}" '
                f'height="{height}" rx="8"/>'
                for d in ((2, 1) if k == 3 else ())
            )
            parts.append(
                f'<g class="{side.lower()}">{stack}<rect x="{x}" y="{y}" width="{width}" '
                f'height="{height}" rx="8"/><text x="{x + width / 2}" y="{y + 22}">{label}</text>'
                f'<text class="shape" x="{x + width / 2}" y="{y + 40}">{shape}</text></g>'
            )
            end = x + width
            if k < len(names) - 1:
                middle = y + height / 2
                parts.append(f'<path d="M{end + 2} {middle}h{gap - 8}m-6 -4l6 4l-6 4"/>')
    end = 4 + 5 * (width + gap) + width
    parts.append(f'<path d="M{end + 2} 36c30 0 30 42 52 42m-6 -4l6 4l-6 4"/>')
    parts.append(f'<path d="M{end + 2} 120c30 0 30 -42 52 -42"/>')
    x = end + 60
    similarity = _number(scene.pair["token"].similarity)
    parts.append(
        f'<g class="goal"><rect x="{x}" y="48" width="130" height="60" rx="30"/>'
        f'<text x="{x + 65}" y="74">û · v̂</text>'
        f'<text class="shape" x="{x + 65}" y="94">{similarity}</text></g>'
    )
    return (
        f'<svg class="flow" viewBox="0 0 {x + 134} 156" role="img" aria-label="Each text becomes '
        "pieces, rows of three tables, goes through the layers, is averaged and divided by its "
        'length; the product of the two vectors is the similarity">'
        f"{''.join(parts)}</svg>"
    )

"""Why are these two texts alike? The similarity as a sum, and what the sum may not claim.

In: an encoder and texts. Out: tables of numbers that add up to the cosine similarity.

Mean pooling is linear, and the normalization divides by one number. So with token vectors hᵢ and
gⱼ, pooling weights wᵢ and vⱼ (1/n and 1/m for the mean) and pooled vectors u = Σ wᵢhᵢ, v = Σ vⱼgⱼ,

    cos(u, v) = Σᵢⱼ wᵢ vⱼ hᵢ·gⱼ / (‖u‖ ‖v‖)

is exact: a table of pairs of tokens whose cells add up to the similarity. A token vector has heard
of the whole sentence, though, and so a cell says where the product comes from, not what the word
means, nor what would happen without it. Every function here says of itself "Identity." (the parts
add up to the whole, to rounding) or "Measurement." (something was changed and computed again).
"""

import html
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm import inputs, pooling
from minilm.errors import InputError, MissingPackageError
from minilm.interpret import notebook
from minilm.interpret.trace import Trace, state, traces
from minilm.outputs import write_output
from minilm.pipeline import Pipeline
from minilm.report import aligned, jsonable

__all__ = [
    "ComponentExplanation",
    "Components",
    "Contrast",
    "Deletions",
    "Explanation",
    "contrast",
    "explain",
    "explain_components",
    "explain_deletions",
    "token_components",
]

_Array = np.ndarray[Any, Any]
_Span = tuple[int, int]

_BY = ("word", "token", "group")
_MOST_CELLS = 1600  # that are shown as numbers: more can't be read


class _Finding:
    """What all findings have: a table as text, and their attributes for JSON."""

    def table(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {name: jsonable(value) for name, value in vars(self).items()}


# --- Token pairs ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Explanation(_Finding):
    """A cosine similarity as a sum over pairs of parts of two texts.

    Attributes:
        texts: The two texts, as given.
        similarity: What the model says: the dot product of its two unit vectors.
        matrix: The part of each pair, float64 `[parts of a, parts of b]`.
        labels: What the parts are called, for each text: the text itself there, or "[CLS]".
        spans: Where in the text they are, in characters, (0, 0) for special tokens; in groups, the
            first to the last character of the group.
        share_a, share_b: The sums of the matrix' rows and columns. Each adds up to the similarity.
        pull_a, pull_b: wᵢ ∂cos/∂wᵢ, the exact derivative of the similarity by the weight that
            pooling gives the part, for a change of it in per cent: above 0 if more of the part
            would make the texts more alike. Each adds up to 0.
        special: The sum of the cells that [CLS] or [SEP] of either text takes part in.
        residual: The similarity minus the sum of the matrix: rounding.
        unread: For each text, how many of its tokens were cut. They have no share.
    """

    texts: tuple[str, str]
    similarity: float
    matrix: _Array
    labels: tuple[tuple[str, ...], tuple[str, ...]]
    spans: tuple[tuple[_Span, ...], tuple[_Span, ...]]
    share_a: _Array
    share_b: _Array
    pull_a: _Array
    pull_b: _Array
    special: float
    residual: float
    unread: tuple[int, int]
    is_special: tuple[tuple[bool, ...], tuple[bool, ...]] = field(repr=False)

    def table(self) -> str:
        """Show for each part of the first text its best match in the second, and its share.

        The share leaves out the cells of special tokens, which have a line of their own, so that
        the column adds up to the similarity; `share_a` has them in it.
        """
        lines = aligned(self._matches(), right=(2, 3, 4))
        lines.insert(-1, "-" * max(map(len, lines)))
        return "\n".join([*lines, *self._notes()])

    def _matches(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("", "best match", "value", "share", "of all")]
        ordinary = [j for j, special in enumerate(self.is_special[1]) if not special]
        for i, label in enumerate(self.labels[0]):
            if self.is_special[0][i] or not ordinary:
                continue
            best = max(ordinary, key=lambda j: self.matrix[i, j])
            value = f"{self.matrix[i, best]:+.4f}"
            inner = self.matrix[i, ordinary].sum()
            rows.append((label, self.labels[1][best], value, *self._shown(inner)))
        rows.append(("[CLS], [SEP]", "of either text", "", *self._shown(self.special)))
        return [*rows, ("similarity", "", "", f"{self.similarity:+.4f}", "100%")]

    def _shown(self, part: float) -> tuple[str, str]:
        """A share of the similarity, as a number and in per cent."""
        return f"{part:+.4f}", f"{part / self.similarity:.0%}" if self.similarity else ""

    def _notes(self) -> list[str]:
        notes = [f"residual {self.residual:.1e}"]
        for which, count in zip(("first", "second"), self.unread, strict=True):
            if count:
                tokens = f"{count:,} tokens of the {which} text"
                notes.append(f"{tokens} were not read, and have no share")
        return notes

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the matrix with its heat if that has at most 1,600 cells,
        else what `table` shows.
        """
        largest = float(np.abs(self.matrix).max(initial=1e-30))
        cells = [[(float(x), _shade(x, largest)) for x in row] for row in self.matrix]
        return notebook.fragment(
            "explanation.html",
            texts=self.texts,
            labels=self.labels,
            cells=cells if self.matrix.size <= _MOST_CELLS else [],
            matches=self._matches(),
            sums=[self.share_a, self.share_b],
            similarity=self.similarity,
            notes=self._notes(),
        )

    def to_dict(self) -> dict[str, Any]:
        flat = super().to_dict()
        found: dict[str, Any] = {"similarity": self.similarity}
        for side, letter in enumerate("ab"):
            found[letter] = {
                "text": self.texts[side],
                **{name: flat[name][side] for name in ("labels", "spans", "is_special")},
                **{kind: flat[f"{kind}_{letter}"] for kind in ("share", "pull")},
                "unread_tokens": self.unread[side],
            }
        return found | {name: flat[name] for name in ("matrix", "special", "residual")}

    def to_html(self) -> str:
        """Return a `<table>` on its own: a row and a column for each part, and the sums."""
        largest = float(np.abs(self.matrix).max(initial=1e-30))
        head = "".join(f'<th scope="col">{html.escape(label)}</th>' for label in self.labels[1])
        caption = " / ".join(map(html.escape, self.texts))
        caption += f": similarity {self.similarity:.4f}, the sum of all cells"
        lines = [
            "<table>",
            f"<caption>{caption}</caption>",
            f'<thead><tr><td></td>{head}<th scope="col">sum</th></tr></thead>',
            "<tbody>",
        ]
        for label, row, share in zip(self.labels[0], self.matrix, self.share_a, strict=True):
            cells = "".join(f"<td{_shade(cell, largest)}>{cell:+.4f}</td>" for cell in row)
            name = html.escape(label)
            lines.append(f'<tr><th scope="row">{name}</th>{cells}<td>{share:+.4f}</td></tr>')
        sums = "".join(f"<td>{share:+.4f}</td>" for share in self.share_b)
        total = f"<td>{self.matrix.sum():+.4f}</td>"
        lines.append(f'</tbody><tfoot><tr><th scope="row">sum</th>{sums}{total}</tr></tfoot>')
        return "\n".join([*lines, "</table>"])

    def to_png(self, path: str | Path | IO[bytes]) -> None:
        """Draw the matrix; with its numbers, if they are not more than 1,600.

        Args:
            path: The file to write, or an open one.

        Raises:
            MissingPackageError: matplotlib is not installed.
            OSError: The file can't be written; what was there before still is.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.colors import LinearSegmentedColormap
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingPackageError("to_png", "matplotlib", "plot") from error
        rows, columns = self.matrix.shape
        size = 2.6 + 0.62 * columns, 1.8 + 0.42 * rows  # inches
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        largest = float(np.abs(self.matrix).max(initial=1e-30))
        colours = LinearSegmentedColormap.from_list("sign", [_MINUS, (1, 1, 1), _PLUS])
        image = axes.imshow(self.matrix, cmap=colours, vmin=-largest, vmax=largest, aspect="auto")
        literal = {"parse_math": False}  # "$" is a token like others
        axes.set_xticks(range(columns), self.labels[1], rotation=45, ha="left", **literal)
        axes.xaxis.tick_top()
        axes.set_yticks(range(rows), self.labels[0], **literal)
        for i in range(rows) if self.matrix.size <= _MOST_CELLS else ():
            for j in range(columns):
                cell = self.matrix[i, j]
                colour = "white" if cell > 0.6 * largest else "black"
                axes.text(j, i, f"{cell:.3f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xlabel(f"cosine similarity {self.similarity:.4f}: the sum of all cells")
        figure.colorbar(image, ax=axes)
        dpi = min(150, 6000 / max(size))
        if isinstance(path, str | os.PathLike):
            write_output(Path(path), lambda file: figure.savefig(file, dpi=dpi, format="png"))
        else:
            figure.savefig(path, dpi=dpi, format="png")


def explain(
    encoder: Pipeline,
    a: str,
    b: str,
    *,
    by: str = "word",
    dtype: str | torch.dtype | None = "float64",
) -> Explanation:
    """Identity. The cosine similarity of two texts as a sum over pairs of their words.

    What may not be claimed: that a cell is the importance or the cause of anything. A word's share
    can be positive and its deletion make the texts more alike (`explain_deletions`): every token
    vector was made of the whole sentence. Cells shrink with n x m, the numbers of tokens, and are
    not comparable between pairs of texts. A large part usually stands at [CLS] and [SEP]; it is
    shown as theirs, not spread over the words. Each cell is a sum over 384 numbers, of which three
    (127, 223, 319) add nothing in the published model, whatever the texts: see `trace`.

    Args:
        encoder: Left as it is.
        a, b: The texts.
        by: "token": each word piece; "word": the pieces of a word together; "group": words,
            punctuation and special tokens. Blocks are sums of token cells, never averages.
        dtype: What to run the model in; None is as `encode` does. The sums are in float64 anyway.

    Returns:
        See `Explanation`; the residual is below 1e-12 in float64.

    Raises:
        InputTypeError, InputError: A text is not a str, or an argument can't be used.
    """
    inputs.check_choice(by, _BY, "by")
    sides = _sides(encoder, (a, b), ("a", "b"), dtype)
    cells = _cells(sides[0], sides[1])
    similarity = float(sides[0].embedding @ sides[1].embedding)
    blocks = [side.blocks(by) for side in sides]
    shares = cells.sum(axis=1), cells.sum(axis=0)
    pulls = [
        share - similarity * side.projection()
        for side, share in zip(sides, shares, strict=True)
    ]  # fmt: skip
    outer = np.ones(cells.shape, dtype=bool)
    outer[np.ix_(~sides[0].is_special, ~sides[1].is_special)] = False
    first, second = (
        _summing(block, len(side.ids)) for block, side in zip(blocks, sides, strict=True)
    )
    return Explanation(
        texts=(a, b),
        similarity=similarity,
        matrix=first @ cells @ second.T,
        labels=(tuple(x.label for x in blocks[0]), tuple(x.label for x in blocks[1])),
        spans=(tuple(x.span for x in blocks[0]), tuple(x.span for x in blocks[1])),
        share_a=first @ shares[0],
        share_b=second @ shares[1],
        pull_a=first @ pulls[0],
        pull_b=second @ pulls[1],
        special=float(cells[outer].sum()),
        residual=similarity - float(cells.sum()),
        unread=(sides[0].unread, sides[1].unread),
        is_special=(tuple(x.special for x in blocks[0]), tuple(x.special for x in blocks[1])),
    )


# --- Parts of the network -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Components:
    """The token vectors of one text as sums of what each part of the network wrote.

    Attributes:
        text: The text.
        labels: The parts, in the order of execution, as paths: "layers.2.attention.head.7".
        parts: float64 `[parts, tokens, 384]`; its sum over parts is `hidden_states`.
        hidden_states: The last layer's token vectors, float64 `[tokens, 384]`.
        residual: The largest difference between the two.
    """

    text: str
    labels: tuple[str, ...]
    parts: _Array
    hidden_states: _Array
    residual: float


@dataclass(frozen=True, eq=False)
class ComponentExplanation(_Finding):
    """A cosine similarity as a sum over pairs of parts of the network.

    Attributes:
        similarity: What the model says.
        labels: What the parts are called.
        matrix: What each part of the first text's vector (rows) and of the second's (columns)
            contribute together, float64 `[parts, parts]`.
        share_a, share_b: The sums of its rows and columns. Each adds up to the similarity.
        residual: The similarity minus the sum of the matrix: rounding.
    """

    similarity: float
    labels: tuple[str, ...]
    matrix: _Array
    share_a: _Array
    share_b: _Array
    residual: float

    def table(self) -> str:
        """Show the parts of the network, with their shares in either text."""
        rows = [("", "share in a", "share in b")]
        for label, a, b in zip(self.labels, self.share_a, self.share_b, strict=True):
            rows.append((label, f"{a:+.4f}", f"{b:+.4f}"))
        rows.append(("similarity", f"{self.similarity:+.4f}", f"{self.similarity:+.4f}"))
        return "\n".join([*aligned(rows, right=(1, 2)), f"residual {self.residual:.1e}"])


def token_components(
    encoder: Pipeline, text: str, *, dtype: str | torch.dtype | None = "float64"
) -> Components:
    """Identity. Each token vector as the sum of what the parts of the network wrote into it.

    Every sublayer adds to what came before, and a LayerNorm, once its mean and its divisor σ are
    measured, acts on the summands one by one:

        LayerNorm(Σ r) = β + Σ γ ⊙ (r - mean r) / σ

    So what was written can be followed to the end: the three tables, and of each norm the β, of
    each layer the twelve heads, the feed-forward network, and the biases of both: 4 + 6 x 17 = 106
    parts.

    What may not be claimed: the σ are those of the whole sum, so that without one part all others
    would be scaled differently; and a part of a late layer was computed from all parts before it.

    Args:
        encoder, text, dtype: As in `explain`, for one text.
    """
    names = _components(encoder)
    (found,) = traces(encoder, [text], names=names, dtype=dtype, arguments=["text"])
    return _split(encoder, found)


def explain_components(
    encoder: Pipeline,
    a: str,
    b: str,
    *,
    by: str = "layer",
    dtype: str | torch.dtype | None = "float64",
) -> ComponentExplanation:
    """Identity, given the measured divisors. The similarity as a sum over parts of the network.

    See `token_components` for the parts and for what may not be claimed.

    Args:
        encoder, a, b, dtype: As in `explain`.
        by: "layer": the embeddings and each layer; "head": the embeddings, and of each layer its
            heads and the rest; "all": every part.
    """
    inputs.check_choice(by, ("layer", "head", "all"), "by")
    names = [*_components(encoder), *_POOLING]
    found = traces(encoder, (a, b), names=names, dtype=dtype, arguments=("a", "b"))
    components = [_split(encoder, trace) for trace in found]
    sides = [_side(encoder, trace, each) for trace, each in zip(found, "ab", strict=True)]
    groups = [_component_group(label, by) for label in components[0].labels]
    labels = tuple(dict.fromkeys(groups))
    belongs = np.array([[group == label for group in groups] for label in labels], dtype=float)
    pooled = [
        belongs @ np.einsum("n,cnd->cd", side.weights, each.parts) / side.length
        for side, each in zip(sides, components, strict=True)
    ]
    matrix = pooled[0] @ pooled[1].T
    similarity = float(sides[0].embedding @ sides[1].embedding)
    return ComponentExplanation(
        similarity=similarity,
        labels=labels,
        matrix=matrix,
        share_a=matrix.sum(axis=1),
        share_b=matrix.sum(axis=0),
        residual=similarity - float(matrix.sum()),
    )


def _component_group(label: str, by: str) -> str:
    if by == "all":
        return label
    if label.startswith("embeddings"):
        return "embeddings"
    layer = ".".join(label.split(".")[:2])
    if by == "head":
        return label if ".head." in label else f"{layer}.rest"
    return layer


def _components(encoder: Pipeline) -> list[str]:
    """Return the names of what `_split` needs of a trace."""
    names = [f"embeddings.{x}" for x in ("word", "position", "token_type", "layer_norm.scale")]
    names += ["layers.*.attention.context", "layers.*.attention_layer_norm.scale"]
    names += ["layers.*.feed_forward.output", "layers.*.feed_forward_layer_norm.scale"]
    return [*names, _last(encoder)]


def _split(encoder: Pipeline, trace: Trace) -> Components:
    """Follow each summand from where it was written to the end."""
    bert = encoder.bert

    def numbers(value: Tensor) -> _Array:
        array: _Array = value.detach().cpu().double().numpy()
        return array

    labels = [f"embeddings.{name}" for name in ("word", "position", "token_type")]
    parts = [numbers(trace[label]) for label in labels]

    def add(label: str, part: _Array) -> None:
        labels.append(label)
        parts.append(np.broadcast_to(part, parts[0].shape))

    def normalize(path: str, norm: Any) -> None:
        scale = numbers(trace[f"{path}.scale"])[:, None]
        weight = numbers(norm.weight)
        parts[:] = [weight * (x - x.mean(axis=1, keepdims=True)) / scale for x in parts]
        add(f"{path}.bias", numbers(norm.bias))

    normalize("embeddings.layer_norm", bert.embeddings.layer_norm)
    for number, layer in enumerate(bert.layers):
        path = f"layers.{number}"
        assert isinstance(layer, nn.Module)
        attention: Any = layer.attention
        context = numbers(trace[f"{path}.attention.context"])  # [tokens, heads, head_size]
        heads, size = context.shape[1:]
        output = numbers(attention.output.weight).reshape(-1, heads, size)
        for head in range(heads):
            add(f"{path}.attention.head.{head}", context[:, head] @ output[:, head].T)
        add(f"{path}.attention.bias", numbers(attention.output.bias))
        normalize(f"{path}.attention_layer_norm", layer.attention_layer_norm)
        feed_forward: Any = layer.feed_forward
        bias = numbers(feed_forward.output.bias)
        add(f"{path}.feed_forward", numbers(trace[f"{path}.feed_forward.output"]) - bias)
        add(f"{path}.feed_forward.bias", bias)
        normalize(f"{path}.feed_forward_layer_norm", layer.feed_forward_layer_norm)
    hidden_states = numbers(trace[_last(encoder)])
    together = np.stack(parts)
    residual = float(np.abs(together.sum(axis=0) - hidden_states).max())
    return Components(trace.text, tuple(labels), together, hidden_states, residual)


# --- Deletions and contrasts ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Deletions(_Finding):
    """What happens to a similarity without a word.

    Attributes:
        similarity: Of the whole texts.
        labels: The words of the first text.
        spans: Where they are, in characters.
        without: The similarity with each of them deleted.
        change: similarity - without: above 0 where the word makes the texts more alike.
    """

    similarity: float
    labels: tuple[str, ...]
    spans: tuple[_Span, ...]
    without: _Array
    change: _Array

    def table(self) -> str:
        """Show the words, the similarity without each, and the change."""
        rows = [("without", "similarity", "change")]
        for label, without, change in zip(self.labels, self.without, self.change, strict=True):
            rows.append((label, f"{without:+.4f}", f"{-change:+.4f}"))
        rows.append(("(nothing)", f"{self.similarity:+.4f}", ""))
        return "\n".join(aligned(rows, right=(1, 2)))


def explain_deletions(
    encoder: Pipeline, a: str, b: str, *, dtype: str | torch.dtype | None = "float64"
) -> Deletions:
    """Measurement. Delete each word of `a` in turn, run the model again, and see what changes.

    What may not be claimed: the changes don't add up to the similarity or to anything else; and a
    sentence without a word is another sentence, often one that nobody would write.

    Args:
        encoder, b, dtype: As in `explain`.
        a: The text whose words are deleted, with the characters that they are written in.
    """
    whole, other = _sides(encoder, (a, b), ("a", "b"), dtype)
    words = [block for block in whole.blocks("word") if not block.special]
    variants = [a[: word.span[0]] + a[word.span[1] :] for word in words]
    rest = _sides(encoder, variants, ["a"] * len(variants), dtype, warn=False)
    similarity = float(whole.embedding @ other.embedding)
    without = np.array([float(each.embedding @ other.embedding) for each in rest])
    return Deletions(
        similarity=similarity,
        labels=tuple(word.label for word in words),
        spans=tuple(word.span for word in words),
        without=without,
        change=similarity - without,
    )


@dataclass(frozen=True, eq=False)
class Contrast(_Finding):
    """Why a query is nearer to one text than to another.

    Attributes:
        similarity_a, similarity_b: Of the query with either text.
        difference: similarity_a - similarity_b.
        labels: The parts of the query.
        spans: Where they are, in characters.
        share: What each part adds to the difference; adds up to it.
        residual: The difference minus that sum: rounding.
    """

    similarity_a: float
    similarity_b: float
    difference: float
    labels: tuple[str, ...]
    spans: tuple[_Span, ...]
    share: _Array
    residual: float

    def table(self) -> str:
        """Show the parts of the query, and what each adds to the difference."""
        rows = [("", "share")]
        rows += [(x, f"{y:+.4f}") for x, y in zip(self.labels, self.share, strict=True)]
        whole = f"{self.similarity_a:.4f} - {self.similarity_b:.4f}"
        rows.append((whole, f"{self.difference:+.4f}"))
        return "\n".join([*aligned(rows, right=(1,)), f"residual {self.residual:.1e}"])


def contrast(
    encoder: Pipeline,
    query: str,
    a: str,
    b: str,
    *,
    by: str = "word",
    dtype: str | torch.dtype | None = "float64",
) -> Contrast:
    """Identity. What each word of the query adds to cos(query, a) - cos(query, b).

    What may not be claimed: as in `explain`. The difference says more than either similarity, as
    what both texts have in common, [CLS] and [SEP] among it, is taken away.

    Args:
        encoder, by, dtype: As in `explain`.
        query, a, b: The texts.
    """
    inputs.check_choice(by, _BY, "by")
    side, *others = _sides(encoder, (query, a, b), ("query", "a", "b"), dtype)
    blocks = side.blocks(by)
    summing = _summing(blocks, len(side.ids))
    first, second = (_cells(side, other).sum(axis=1) for other in others)
    similarities = [float(side.embedding @ other.embedding) for other in others]
    difference = similarities[0] - similarities[1]
    share = summing @ (first - second)
    return Contrast(
        similarity_a=similarities[0],
        similarity_b=similarities[1],
        difference=difference,
        labels=tuple(block.label for block in blocks),
        spans=tuple(block.span for block in blocks),
        share=share,
        residual=difference - float(share.sum()),
    )


# --- What all of them are made of -----------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Neighbouring tokens that are shown as one; or, in groups, those of one kind."""

    label: str
    span: _Span
    tokens: tuple[int, ...]
    special: bool


@dataclass(frozen=True, eq=False)
class _Side:
    """One text: its tokens, their vectors, and what pooling makes of them."""

    text: str
    ids: _Array
    pieces: list[str]
    offsets: list[_Span]
    hidden_states: _Array  # [tokens, 384]
    weights: _Array  # of pooling, [tokens], of sum 1
    embedding: _Array  # of length 1, [384]
    length: float  # of the pooled vector
    unread: int

    @property
    def is_special(self) -> _Array:
        """Whether a token is [CLS] or [SEP] as the tokenizer adds them: the first or the last."""
        special = np.zeros(len(self.ids), dtype=bool)
        special[[0, -1]] = True
        return special

    def projection(self) -> _Array:
        """Return pᵢ = wᵢ hᵢ·u / ‖u‖², of sum 1: each token's part in the pooled vector's length."""
        along: _Array = self.hidden_states @ self.embedding / self.length
        return self.weights * along

    def blocks(self, by: str) -> list[_Block]:
        """Divide the tokens into what is shown as one: by token, word or group."""
        last = len(self.ids) - 1
        blocks = [_Block("[CLS]", (0, 0), (0,), True)]
        for i in range(1, last):
            start, end = self.offsets[i]
            before = blocks[-1]
            if by != "token" and self.pieces[i].startswith("##") and not before.special:
                start, tokens = before.span[0], (*before.tokens, i)
                blocks[-1] = _Block(self.text[start:end], (start, end), tokens, False)
            else:
                blocks.append(_Block(self.text[start:end], (start, end), (i,), False))
        blocks.append(_Block("[SEP]", (0, 0), (last,), True))
        return _grouped(blocks) if by == "group" else blocks


def _grouped(blocks: list[_Block]) -> list[_Block]:
    """Group blocks into words, punctuation and special tokens: always three, some maybe empty."""
    groups = []
    for group in ("words", "punctuation", "special"):
        members = [block for block in blocks if _kind(block) == group]
        starts, ends = zip(*([block.span for block in members] or [(0, 0)]), strict=True)
        tokens = tuple(token for block in members for token in block.tokens)
        groups.append(_Block(group, (min(starts), max(ends)), tokens, group == "special"))
    return groups


def _kind(block: _Block) -> str:
    if block.special:
        return "special"
    return "words" if re.search(r"[^\W_]", block.label) else "punctuation"


_POOLING = ["tokens", "input_ids", "pooled"]  # and `_last`: what `_side` needs of a trace


def _last(encoder: Pipeline) -> str:
    """Return the name of the token vectors that are pooled."""
    return state(len(encoder.bert.layers))


def _sides(
    encoder: Pipeline,
    texts: Sequence[str],
    arguments: Sequence[str],
    dtype: str | torch.dtype | None,
    warn: bool = True,
) -> list[_Side]:
    names = [*_POOLING, _last(encoder)]
    found = traces(encoder, texts, names=names, dtype=dtype, arguments=arguments, warn=warn)
    return [_side(encoder, each, name) for each, name in zip(found, arguments, strict=True)]


def _side(encoder: Pipeline, trace: Trace, argument: str) -> _Side:
    hidden_states = trace[_last(encoder)].double().numpy()
    count = len(hidden_states)
    if isinstance(encoder.pooling, pooling.ClsPooling):
        weights = np.eye(1, count)[0]
    else:
        weights = np.full(count, 1 / count)
    pooled = trace["pooled"].double().numpy()
    length = math.sqrt(np.square(pooled).sum())
    if not 0 < length < math.inf:
        message = f"the vector of {argument} is 0 or not finite; it has no cosine"
        raise InputError(message, argument)
    return _Side(
        text=trace.text,
        ids=trace["input_ids"].numpy(),
        pieces=trace["tokens"],
        offsets=trace.offsets,
        hidden_states=hidden_states,
        weights=weights,
        embedding=pooled / length,
        length=length,
        unread=trace.unread,
    )


def _cells(a: _Side, b: _Side) -> _Array:
    """Return wᵢ vⱼ hᵢ·gⱼ / (‖u‖ ‖v‖), `[tokens of a, tokens of b]`."""
    left = a.weights[:, None] * a.hidden_states / a.length
    right = b.weights[:, None] * b.hidden_states / b.length
    cells: _Array = left @ right.T
    return cells


def _summing(blocks: list[_Block], count: int) -> _Array:
    """Return the matrix of 0 and 1 that adds up the tokens of each block, `[blocks, tokens]`."""
    matrix = np.zeros((len(blocks), count))
    for row, block in enumerate(blocks):
        matrix[row, list(block.tokens)] = 1
    return matrix


# Blue for what adds, orange for what takes away: told apart with any eyes.
_PLUS, _MINUS = (0 / 255, 114 / 255, 178 / 255), (230 / 255, 159 / 255, 0 / 255)


def _shade(cell: float, largest: float) -> str:
    """Return a cell's style: the colour of its sign, as strong as the cell is large."""
    colour = ",".join(f"{255 * part:.0f}" for part in (_PLUS if cell >= 0 else _MINUS))
    return f' style="background:rgba({colour},{0.6 * abs(cell) / largest:.3f})"'

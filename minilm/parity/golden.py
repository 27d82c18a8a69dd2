"""The golden file for ports: fifty texts, and what every stage of the model makes of them.

In: an encoder. Out: a folder with the texts and ids as JSON, and the tensors in float64 and
float32, which any language can read; and for the stages that a port wrote under the same names,
the first of them that is not ours.

The texts are chosen to tell mistakes apart: every usual one changes some of them and leaves others.
The stages of all tokens of all texts would be 100 MB, so that a few texts have them, and all have
ids, the pooled vector and the embedding.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from minilm.disk import make_folder, with_metadata, write_atomically
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError, TruncationWarning
from minilm.files.tables import METADATA_KEY
from minilm.interpret.trace import Trace, traces
from minilm.outputs import check_folder
from minilm.version import __version__

__all__ = [
    "TEXTS",
    "GoldenText",
    "StageDifference",
    "StageReport",
    "compare_stages_file",
    "stage_names",
    "write_golden",
]

INDEX, README = "golden.json", "README.txt"
_FILES = {"float64": "golden.float64.safetensors", "float32": "golden.float32.safetensors"}

# Of a port's stages in float32: how many times as far as ours they may be from float64. Sums taken
# in another order, or an exponential of another library, cost a small factor; a mistake, hundreds.
_SLACK = 16.0
# How many times as large rounding errors are as those of float32.
_COARSER = {
    torch.float64: 2.0**-29,
    torch.float32: 1.0,
    torch.float16: 2.0**13,
    torch.bfloat16: 2.0**16,
}


@dataclass(frozen=True)
class GoldenText:
    """A text, and why it is there.

    Attributes:
        text: The text.
        why: What it shows.
        has_stages: Whether the output of each layer is kept, for each of its tokens.
    """

    text: str
    why: str
    has_stages: bool = False


_PROSE = """\
The old lighthouse stands at the end of a narrow road, and few people ever walk that far.
In winter the waves reach the lower windows, so the keeper moves his books to the upper floor.
He writes down the weather every morning: wind, pressure, clouds, and the color of the sea.
Nobody has asked for these notes in thirty years, but he keeps them in perfect order.
A small bakery in the village opens at five, when most of the streets are still dark.
The bread is made from rye, water, salt, and a sourdough that is older than the baker herself.
Tourists like the cinnamon rolls, while the fishermen buy plain loaves and leave without a word.
On Sundays the shop is closed, and the whole street smells of coffee from the other houses.
Computers store text as numbers, and every letter has a number that was agreed upon long ago.
A program that reads those numbers in the wrong way shows strange symbols instead of words.
Engineers call this a decoding error, and it is among the oldest problems of the trade.
The cure is simple: say which encoding was used, and never guess when you can ask.
The heart pumps about five liters of blood each minute, and far more during hard exercise.
Its rhythm begins in a small group of cells that need no signal from the brain.
When these cells fail, a device of the size of a coin can take over their work.
Doctors check its battery twice a year, with nothing but a magnet and a radio.
Markets fell sharply on Thursday after the central bank raised its main rate once more.
Analysts had expected a pause, since inflation slowed in each of the last four months.
Shares of builders lost most, because mortgages become more expensive with every step.
By the evening some of the losses were gone, and the currency stood almost where it began.
The violin has four strings, tuned in fifths, and no frets to show where the notes are.
A beginner spends the first months learning to draw the bow straight across one string.
After some years the fingers find their places alone, and attention turns to tone and phrasing.
Old instruments are loved for their sound, though blind tests rarely tell them from new ones.
Photosynthesis turns light, water, and carbon dioxide into sugar, and gives off oxygen.
Plants that live in deserts open their pores at night only, in order to lose less water.
Others fold their leaves at noon, or grow hairs that reflect the brightest part of the light.
All of them depend on one enzyme that is slow, and that cannot tell two gases apart.
The trial began with a list of questions that neither side had seen before.
The first witness remembered the car, its color, and a part of the license plate.
The second one was certain of the hour, because the train to the capital had just left.
In the end the judge asked for the map, and the case took another direction.
Bridges must bend a little, or the first strong wind would break them into pieces.
Steel grows longer in summer, so there are gaps in the road that close and open again.
Sensors on the cables report every minute how much force there is in each of them.
When a number looks wrong, someone climbs up with a lamp and looks at the bolts.
The recipe asks for two eggs, a cup of sugar, flour, and the peel of one lemon.
Beat the eggs first, add the sugar slowly, and fold in the flour with a wooden spoon.
Bake it for forty minutes, and let it cool before you take it out of the form.
It keeps for three days in a tin, although in our house it has never lasted that long.
""".splitlines()


def _prose(first: int, sentences: int) -> str:
    """So many sentences, from this one on, and from the front again after the last."""
    return " ".join(_PROSE[(first + number) % len(_PROSE)] for number in range(sentences))


TEXTS: tuple[GoldenText, ...] = (
    GoldenText("The weather is lovely today.", "an ordinary sentence", has_stages=True),
    GoldenText("It's so sunny outside!", "an apostrophe", has_stages=True),
    GoldenText("He drove to the stadium.", "an ordinary sentence"),
    GoldenText("", "no word: [CLS] and [SEP] alone", has_stages=True),
    GoldenText(" \t\n ", "blanks only: the same as no word"),
    GoldenText("a", "one letter"),
    GoldenText("hello", "one word, the shortest beside the longest of a batch", has_stages=True),
    GoldenText("the quick brown fox jumps over the lazy dog", "small letters"),
    GoldenText("THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG", "capitals: the same vector"),
    GoldenText("Paris in August; NASA, IBM and the BBC.", "names and acronyms", has_stages=True),
    GoldenText("Dr. Smith met Ms. O'Neill on Monday.", "capital letters inside a sentence"),
    GoldenText("naïve café résumé coöperate façade", "accents, composed", has_stages=True),
    GoldenText("nai\u0308ve cafe\u0301 re\u0301sume\u0301", "accents, decomposed"),
    GoldenText("naive cafe resume cooperate facade", "the same without accents"),
    GoldenText("Ångström, Dvořák, Škoda, São Paulo", "accents on capital letters"),
    GoldenText("Straße, smørrebrød, Łódź, œuvre", "letters that have no accent to lose"),
    GoldenText("Die Größe des Gebäudes überraschte alle.", "German"),
    GoldenText("İstanbul'da IŞIK", "a capital letter that becomes two characters"),
    GoldenText("日本語の文章です。", "Japanese: kanji are split one by one", has_stages=True),
    GoldenText("你好，世界！今天天气很好。", "Chinese, with its own punctuation"),
    GoldenText("English 和 中文 mixed文字", "Latin and Chinese without blanks between"),
    GoldenText("한국어 문장입니다.", "Korean: Hangul is decomposed"),
    GoldenText("Москва — столица России.", "Cyrillic and a dash"),
    GoldenText("مرحبا بالعالم", "Arabic"),
    GoldenText("नमस्ते दुनिया", "Hindi: marks are stripped"),
    GoldenText("Ελληνικά: ας δούμε", "Greek with accents and a final sigma"),
    GoldenText("I love it 😍🔥", "emoji, which are unknown"),
    GoldenText("👩‍👩‍👧‍👦 🇩🇪 👍🏽", "emoji of several characters"),
    GoldenText("floccinaucinihilipilification", "one word of many pieces"),
    GoldenText("Pneumonoultramicroscopicsilicovolcanoconiosis is a word.", "many pieces"),
    GoldenText("x" * 100, "100 letters: the longest word that is cut into pieces"),
    GoldenText("x" * 101, "101 letters: unknown"),
    GoldenText("zxqv kjhgf wrtpl", "no words at all"),
    GoldenText("!!! ??? ... ---", "punctuation alone"),
    GoldenText("Wait... what?! (Really: 50% off; $9.99, #1 @home)", "much punctuation"),
    GoldenText("https://example.org/a/b?c=d&e=f#g", "an address", has_stages=True),
    GoldenText("for (int i = 0; i < n; ++i) { sum += a[i]; }", "code"),
    GoldenText("3.14159 2026-11-24 12:30 +1 (555) 010-9999", "numbers"),
    GoldenText("[MASK] and [SEP] in a text", "special tokens, which a text can name"),
    GoldenText("no\u00a0break, zero\u200bwidth, soft\u00adhyphen", "blanks and signs unseen"),
    GoldenText("tab\tand\r\nnew line\x00and nul", "control characters"),
    GoldenText("word " * 100, "one word many times"),
    GoldenText(_prose(4, 4), "some sentences"),
    GoldenText(_prose(12, 6), "just below 128 tokens"),
    GoldenText(_prose(0, 9), "more than 128 tokens"),
    GoldenText(_prose(20, 11), "about 200 tokens, in the middle between two limits"),
    GoldenText(_prose(8, 18), "more than 256 tokens: cut", has_stages=True),
    GoldenText(_prose(16, 22), "about 400 tokens: cut"),
    GoldenText(_prose(0, 40), "more than 512 tokens: cut"),
    GoldenText("Überraschung: " + _prose(30, 50), "more than 512 tokens, accents: cut"),
)


def stage_names(num_layers: int) -> list[str]:
    """The names of the stages in the order of the computation, as in the files after `03.`.

    Args:
        num_layers: 6 in all-MiniLM-L6-v2.
    """
    layers = [f"layer.{number}" for number in range(1, num_layers + 1)]
    return ["input_ids", "embeddings", *layers, *_OF_ALL[1:]]


_OF_ALL = ("input_ids", "pooled", "sentence_embedding")  # kept for every text


def _traced(stage: str) -> str:
    """The name of a stage in a trace."""
    if stage.startswith("layer."):
        return f"layers.{int(stage.removeprefix('layer.')) - 1}.feed_forward_layer_norm.output"
    known = {"embeddings": "embeddings.layer_norm.output", "sentence_embedding": "embedding"}
    return known.get(stage, stage)


def write_golden(
    encoder: SentenceEncoder, folder: Path, texts: Sequence[GoldenText] = TEXTS
) -> list[Path]:
    """Write the folder. A file appears under its name when it is complete; the index comes last.

    Args:
        encoder: The model, in float32 or float64; both are computed.
        folder: Made if it is absent. Files of these names in it are replaced.
        texts: What to write about.

    Returns:
        The files written: `golden.float64.safetensors`, `golden.float32.safetensors`,
        `README.txt` and `golden.json`.

    Raises:
        InputError: `folder` is a file or can't be written to, or the encoder computes in 16 bits.
        OSError: The disk is full, or the like.
    """
    if encoder.dtype not in (torch.float32, torch.float64):
        raise InputError(f"encoder computes in {encoder.dtype}; load it in float32", "encoder")
    check_folder(folder, "--golden")
    stages = stage_names(encoder.bert.config.num_hidden_layers)
    files: dict[str, dict[str, Any]] = {}
    found: dict[str, list[Trace]] = {}
    contents: dict[str, bytes] = {}
    record = encoder.fingerprint()
    for dtype, name in _FILES.items():
        found[dtype] = _follow(encoder, texts, stages, dtype)
        tensors = _tensors(found[dtype], texts, stages)
        made_by = {METADATA_KEY: replace(record, dtype=dtype).to_json()}
        contents[name] = with_metadata(safetensors.torch.save(tensors), made_by)
        files[name] = {
            "dtype": dtype,
            "tensors": len(tensors),
            "bytes": len(contents[name]),
            "sha256": hashlib.sha256(contents[name]).hexdigest(),
        }
    index = _index(encoder, texts, stages, found) | {"files": files}
    # A model's folder can have a name that is no text.
    text = json.dumps(index, ensure_ascii=False, indent=1)
    as_json = text.encode("utf-8", "backslashreplace") + b"\n"
    contents[README] = _readme(index).encode("utf-8", "backslashreplace")
    make_folder(folder)
    for name, data in (*contents.items(), (INDEX, as_json)):
        write_atomically(folder / name, lambda file, data=data: file.write(data))  # type: ignore[misc]
    return [folder / name for name in (*contents, INDEX)]


def _follow(
    encoder: SentenceEncoder, texts: Sequence[GoldenText], stages: Sequence[str], dtype: str
) -> list[Trace]:
    names = [_traced(stage) for stage in stages] + ["tokens"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return traces(
            encoder,
            [each.text for each in texts],
            names=names,
            dtype=dtype,
            arguments=[f"texts[{number}]" for number in range(len(texts))],
        )


def _tensors(
    found: Sequence[Trace], texts: Sequence[GoldenText], stages: Sequence[str]
) -> dict[str, Tensor]:
    return {
        f"{number:02}.{stage}": trace[_traced(stage)].clone(memory_format=torch.contiguous_format)
        for number, (text, trace) in enumerate(zip(texts, found, strict=True))
        for stage in stages
        if text.has_stages or stage in _OF_ALL
    }


def _index(
    encoder: SentenceEncoder,
    texts: Sequence[GoldenText],
    stages: Sequence[str],
    found: Mapping[str, list[Trace]],
) -> dict[str, Any]:
    weights = {} if encoder.source is None else encoder.source.sha256
    rounding = {}
    for stage in stages[1:]:
        kept = [n for n, text in enumerate(texts) if text.has_stages or stage in _OF_ALL]
        name = _traced(stage)
        rounding[stage] = max(
            (
                float((found["float32"][n][name].double() - found["float64"][n][name]).abs().max())
                for n in kept
            ),
            default=0.0,
        )
    return {
        "made_by": f"minilm {__version__}",
        "model": None if encoder.source is None else encoder.source.name,
        "weights_sha256": next((v for k, v in weights.items() if k.endswith(".safetensors")), None),
        "max_seq_length": encoder.max_seq_length,
        "stages": list(stages),
        "float32_rounding": rounding,
        "texts": [
            {
                "number": number,
                "text": text.text,
                "why": text.why,
                "has_stages": text.has_stages,
                "token_count": len(trace["tokens"]) + trace.unread,
                "input_ids": trace["input_ids"].tolist(),
                "tokens": trace["tokens"],
                "offsets": trace.offsets,
            }
            for number, (text, trace) in enumerate(zip(texts, found["float64"], strict=True))
        ],
    }


def _readme(index: Mapping[str, Any]) -> str:
    sizes = "\n".join(
        f"  {name:<28} {each['bytes'] / 1e6:5.1f} MB, {each['tensors']} tensors in {each['dtype']}"
        for name, each in index["files"].items()
    )
    stages = "\n".join(
        f"  NN.{stage:<20} {_MEANING[stage.split('.')[0]]}" for stage in index["stages"]
    )
    kept = ", ".join(f"{text['number']:02}" for text in index["texts"] if text["has_stages"])
    return f"""\
Golden values of {index["model"] or "a model"}
weights: SHA-256 {index["weights_sha256"] or "unknown"}
made by {index["made_by"]}: minilm parity --golden DIR

For whoever writes this model anew in another language, and wants to know where it goes wrong.
{len(index["texts"])} texts, which between them show every usual mistake.

Files

{sizes}
  {INDEX:<28} the texts, each with its ids, tokens, offsets, and why it is there

safetensors is a header in JSON and the raw numbers, little-endian: https://github.com/huggingface/safetensors

The index

  max_seq_length    longer texts are cut to so many ids: the first, and [SEP]
  stages            the stages in the order of the computation
  float32_rounding  for each stage, by how much our own float32 differs from float64
  texts             for each: number, text, why, has_stages, and
    token_count     ids before the cut
    input_ids       ids after it, with [CLS] and [SEP]
    tokens          the same as word pieces
    offsets         [start, end) of each in the text, counted in Unicode characters (code points,
                    not bytes or UTF-16 units); [0, 0] for [CLS] and [SEP]

The tensors, without a batch dimension; NN is the number of the text, from 00

{stages}

input_ids, pooled and sentence_embedding are there for every text, the rest for {kept}.

How to use them

1. Compare your ids with input_ids. Nothing else can be right before they are.
2. Let your program write its stages for some of these texts, or all, into one safetensors file,
   under these names; those that you have. float32, float64, float16 and bfloat16 will do.
3. minilm parity --golden DIR --against-stages FILE
   names the first stage that is not the same, with its text and its token.
4. If only your vectors are at hand: minilm parity --against FILE tries the usual mistakes.
   FILE: .npy, one row for each text in this order, or .jsonl with "text" and "embedding", or .onnx.

Compare with float64: in float64 two right programs agree to 1e-13 in every stage, and every mistake
shows. In float32 they differ by about float32_rounding.
"""


_MEANING = {
    "input_ids": "[tokens], int64",
    "embeddings": "[tokens, hidden]: word + position + token type, after LayerNorm",
    "layer": "[tokens, hidden]: the output of this layer, after its second LayerNorm",
    "pooled": "[hidden]: the mean of the last layer over all tokens (or its first, if so pooled)",
    "sentence_embedding": "[hidden]: pooled, divided by its length",
}


@dataclass(frozen=True)
class StageDifference:
    """One stage of a port, over all texts that it gave for it.

    Attributes:
        stage: Its name.
        texts: How many texts were compared.
        max_abs: The largest difference from the golden float64; infinite where shapes differ or
            there is no number.
        bar: The largest that passes in the port's dtype.
        text: The number of the text where it is largest.
        token: The place of the token there; None where the stage has no tokens.
        problem: What is wrong besides numbers: another shape.
    """

    stage: str
    texts: int
    max_abs: float
    bar: float
    text: int
    token: int | None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the bar. A NaN is not."""
        return self.max_abs <= self.bar


@dataclass(frozen=True)
class StageReport:
    """A port's stages beside the golden ones.

    Attributes:
        rows: Each stage, in the order of the computation.
        texts: The golden texts.
        tokens: Their word pieces.
        ignored: Names in the port's file that are no golden ones.
        missing: Stages that it has for no text.
    """

    rows: tuple[StageDifference, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every stage that was given is the same but for rounding."""
        return all(row.passed for row in self.rows)

    @property
    def first(self) -> StageDifference | None:
        """The first stage that diverges."""
        return next((row for row in self.rows if not row.passed), None)

    def table(self) -> str:
        """The report as text."""
        lines = [f"{'stage':<20}  {'texts':>5}  {'max abs':>8}  {'bar':>8}"]
        lines += [
            f"{row.stage:<20}  {row.texts:>5}  {row.max_abs:8.1e}  {row.bar:8.1e}  "
            + ("PASS" if row.passed else "FAIL")
            for row in self.rows
        ]
        lines.append("")
        first = self.first
        if first is None:
            lines.append("equal to rounding, in every stage given")
        else:
            lines.append(f"first stage that diverges: {first.stage}, by {first.max_abs:.1e}")
            text = self.texts[first.text]
            shown = text if len(text) <= 200 else text[:197] + "..."
            lines.append(f"most in text {first.text:02}: {shown!r}")
            if first.token is not None:
                tokens = self.tokens[first.text]
                named = f" {tokens[first.token]!r}" if first.token < len(tokens) else ""
                lines.append(f"at token {first.token}{named}")
            if first.problem is not None:
                lines.append(first.problem)
        if self.missing:
            lines.append(f"not in the file: {', '.join(self.missing)}")
        if self.ignored:
            more = "" if len(self.ignored) <= 5 else f" and {len(self.ignored) - 5} more"
            lines.append(f"names that are not known: {', '.join(self.ignored[:5])}{more}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as an object for JSON."""
        return {
            "passed": self.passed,
            "first": None if self.first is None else _as_dict(self.first),
            "rows": [_as_dict(row) for row in self.rows],
            "ignored": list(self.ignored),
            "missing": list(self.missing),
        }


def _as_dict(row: StageDifference) -> dict[str, Any]:
    largest = None if row.max_abs == float("inf") else row.max_abs
    return asdict(row) | {"max_abs": largest, "passed": row.passed}


def compare_stages_file(folder: Path, file: Path) -> StageReport:
    """Compare what a port computed with the golden values, stage by stage.

    Args:
        folder: What `write_golden` wrote.
        file: A safetensors file with some of the tensors, under the same names. A batch dimension
            of 1 in front does no harm.

    Returns:
        See `StageReport`.

    Raises:
        InputError: One of the files is missing or broken, or `file` has none of the names.
    """
    index, golden = _read_golden(folder)
    try:
        theirs = safetensors.torch.load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{file}: is no safetensors file: {error}", "--against-stages") from error
    ignored = tuple(sorted(name for name in theirs if name not in golden))
    if len(ignored) == len(theirs):
        some = ", ".join(sorted(golden)[:3])
        raise InputError(
            f"{file}: has none of the golden names ({some}, ...): see {folder / README}",
            "--against-stages",
        )
    rows, missing = [], []
    for stage in index["stages"]:
        pairs = [
            (number, theirs[name], golden[name])
            for number in range(len(index["texts"]))
            if (name := f"{number:02}.{stage}") in theirs and name in golden
        ]
        if pairs:
            rows.append(_compare(stage, pairs, index["float32_rounding"].get(stage, 0.0)))
        else:
            missing.append(stage)
    return StageReport(
        tuple(rows),
        tuple(text["text"] for text in index["texts"]),
        tuple(tuple(text["tokens"]) for text in index["texts"]),
        ignored,
        tuple(missing),
    )


def _read_golden(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The index and the float64 tensors."""
    name = _FILES["float64"]
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        data = (folder / name).read_bytes()
        expected = index["files"][name]["sha256"]
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename}: no such file; write it with minilm parity --golden {folder}",
            "--golden",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX}: is no golden index: {error}", "--golden") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise InputError(
            f"{folder / name}: is not the file that {INDEX} speaks of; write both again with "
            f"minilm parity --golden {folder}",
            "--golden",
        )
    return index, safetensors.torch.load(data)


def _compare(
    stage: str, pairs: Sequence[tuple[int, Tensor, Tensor]], rounding: float
) -> StageDifference:
    """All texts of one stage: (number, theirs, golden)."""
    coarser = max(_COARSER.get(theirs.dtype, 0.0) for _, theirs, _ in pairs)
    bar = _SLACK * rounding * coarser  # of whole numbers: 0
    worst = StageDifference(stage, len(pairs), 0.0, bar, pairs[0][0], None)
    for number, theirs, golden in pairs:
        if theirs.shape == (1, *golden.shape):
            theirs = theirs[0]
        if theirs.shape != golden.shape:
            problem = f"its shape is {list(theirs.shape)}, expected {list(golden.shape)}"
            return StageDifference(stage, len(pairs), float("inf"), bar, number, None, problem)
        difference = (theirs.double() - golden.double()).abs().nan_to_num(nan=float("inf"))
        largest = float(difference.max())
        if largest > worst.max_abs or worst.token is None:
            token = None
            if stage not in _OF_ALL[1:]:
                token = int(difference.reshape(len(golden), -1).amax(dim=1).argmax())
            if largest >= worst.max_abs:
                worst = StageDifference(stage, len(pairs), largest, bar, number, token)
    return worst

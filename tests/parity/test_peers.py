"""What other programs gave: each is told why it differs. And how texts can be read otherwise."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from torch import Tensor

from conftest import ROOT
from minilm import SentenceEncoder, cli
from minilm.errors import InputError
from minilm.parity.causes import diagnose, in_common
from minilm.parity.golden import TEXTS as GOLDEN
from minilm.parity.ids import compare_ids, read_ids
from minilm.parity.mistakes import Variant, VariantRunner, causes_for
from minilm.parity.readings import Reader, Reading

pytestmark = pytest.mark.filterwarnings("ignore::minilm.errors.TruncationWarning")

PEERS = ROOT / "tests" / "data" / "peers"
ALL = [each.text for each in GOLDEN]
ROW = tuple[str, list[int] | None, np.ndarray[Any, Any]]

PLAIN = "special tokens as plain text"
NEWER = "Unicode tables newer than the tokenizer's"
NO_LIMIT = "no limit of 100 letters for a word"
# What is wrong with each: names that must be among the causes or, after |, alternatives.
CAUSES: dict[str, tuple[str, list[str]]] = {
    "blingfire": (
        "ids",
        ["accents of composed letters alone stripped", NO_LIMIT, PLAIN,
         "all characters of control and format as blanks"],
    ),
    "budtiktok": (
        "ids",
        ["final sigma", PLAIN, "marks newer than the tokenizer's tables stripped"],
    ),
    "iree-tokenizer": (
        "ids",
        ["punctuation newer than the tokenizer's tables split off", "unassigned characters dropped",
         "vertical tab, form feed and next line as blanks"],
    ),
    "openvino-tokenizers": (
        "ids",
        ["case folded, a written ς too", "limit of a word counted in bytes", NEWER,
         "characters of private use kept", "U+FFFD kept"],
    ),
    "candding": ("equal", []),
    "chromadb": ("equal", []),
    "ctranslate2-float32": ("equal", []),
    "haystack": ("equal", []),
    "langchain-huggingface": ("equal", []),
    "llama-index": ("equal", []),
    "onnxruntime": ("equal", []),
    "embed-anything": ("ids", ["cut at 512 tokens"]),
    "fastembed": ("ids", ["cut at 512 tokens"]),
    "fastretrieval": ("ids", ["cut at 512 tokens"]),
    "mlx-embeddings": ("ids", ["cut at 512 tokens"]),
    "txtai": ("ids", ["cut at 512 tokens", "no normalization"]),
    "kitoken": (
        "ids",
        ["cut at 128 tokens, [CLS] and [SEP] not counted", NEWER, "unassigned characters dropped"],
    ),
    "transformers-js": (
        "ids",
        ["cut at 512 tokens", "cut without [SEP]", "final sigma", NEWER],
    ),
    "keras-hub": ("ids", ["accents kept", "NFKC", PLAIN]),
    "keras-hub-strip-accents": ("ids", ["NFKC", PLAIN, "limit of a word counted in bytes"]),
    "tf-text-bert-tokenizer": ("ids", [PLAIN, "limit of a word counted in bytes", NEWER]),
    "onnxruntime-extensions": (
        "ids",
        ["accents kept", "half an unknown word kept", PLAIN, "text ended by NUL"],
    ),
    "flash-tokenizer": (
        "ids",
        [NO_LIMIT, PLAIN, "accents of composed letters alone stripped"],
    ),
    "flash-tokenizer-bidirectional": (
        "ids",
        [NO_LIMIT, PLAIN, "pieces of words taken from their end"],
    ),
    "llama-cpp-f32": (
        "cause",
        ["GELU from a float16 table", "no normalization", NO_LIMIT, PLAIN, NEWER,
         "Hangul by its first consonants alone", "all marks stripped, spacing ones too",
         "cut without [SEP]"],
    ),
    "onnxruntime-int8-per-channel": ("cause", ["rounded to 8 bits, with scales of the batch"]),
    "onnxruntime-int8-per-channel-alone": (
        "cause",
        ["rounded to 8 bits, with scales of the batch"],
    ),
    "onnxruntime-int8-per-tensor": ("cause", ["int8 weights, one scale a tensor"]),
    "onnxruntime-uint8-per-tensor": (
        "cause",
        ["uint8 weights and activations, one scale and zero point a tensor"],
    ),
}  # fmt: skip
COSTLY = {"llama-cpp-f32", "flash-tokenizer-bidirectional", "onnxruntime-int8-per-channel",
          "onnxruntime-int8-per-channel-alone", "onnxruntime-int8-per-tensor",
          "onnxruntime-uint8-per-tensor"}  # fmt: skip


class Remembering(VariantRunner):
    """Computes what a mistake makes of a text once for all peers: they read the same texts.

    But not in fewer bits, where the vector of a text may depend on its batch.
    """

    kept: ClassVar[dict[Any, Tensor]] = {}
    padded: ClassVar[dict[Any, Tensor]] = {}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._kept = dict(self.kept)

    def _keep(self, variant: Variant, rows: list[list[int]]) -> None:
        super()._keep(variant, rows)
        if not variant.bits:
            found = self._kept.items()
            self.kept.update((key, each) for key, each in found if key[0] == variant.computed)

    def _pooled_in_batches(self, variant: Variant, places: Sequence[int]) -> Tensor:
        if variant.bits:
            return super()._pooled_in_batches(variant, places)
        ids, widths = self.ids(variant), self.widths(variant)
        done = replace(variant, width="", reading=Reading(), limit=0)  # to ids of a width
        keys = [(done, tuple(ids[place]), widths[place]) for place in places]
        missing = dict(zip(keys, places, strict=True))
        for key in missing.keys() & self.padded.keys():
            del missing[key]
        if missing:
            found = super()._pooled_in_batches(variant, list(missing.values()))
            self.padded.update(zip(missing, found, strict=True))
        return torch.stack([self.padded[key] for key in keys])


@pytest.fixture(autouse=True)
def remembered(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """All diagnoses here are of one model, which no test changes."""
    monkeypatch.setattr("minilm.parity.causes.VariantRunner", Remembering)


def rows_of(name: str) -> list[ROW]:
    texts = json.loads((PEERS / "texts.json").read_text(encoding="utf-8"))
    rows = json.loads((PEERS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return [
        (texts[row["text"]], row["ids"], np.frombuffer(base64.b64decode(row["embedding"]), "<f4"))
        for row in rows
    ]


def test_every_peer_is_tested() -> None:
    assert {path.stem for path in PEERS.glob("*.json")} == {*CAUSES, "texts"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in COSTLY else [pytest.mark.published])
        for name in CAUSES
    ],
)
def test_cause_of_a_peer_is_named(encoder: SentenceEncoder, name: str) -> None:
    rows = rows_of(name)
    diagnosis = diagnose(encoder, [row[0] for row in rows], np.stack([row[2] for row in rows]))
    verdict, causes = CAUSES[name]
    assert diagnosis.verdict == verdict, diagnosis.table()
    found = [cause.name for cause in (*diagnosis.causes, *diagnosis.alternatives)]
    assert set(causes) <= set(found), diagnosis.table()
    if verdict == "equal":
        assert not found
    assert ("no normalization" in found) == ("no normalization" in causes)


@pytest.mark.parametrize(
    "name", [name for name in CAUSES if any(row[1] is not None for row in rows_of(name))]
)
def test_ids_of_a_peer_are_explained(encoder: SentenceEncoder, name: str) -> None:
    rows = rows_of(name)
    assert encoder.tokenizer is not None
    own = encoder.tokenizer([row[0] for row in rows], 256).input_ids
    ids = [own[n] if row[1] is None else row[1] for n, row in enumerate(rows)]
    if name == "llama-cpp-f32":  # of more than 512, of which it reads 512
        ids = [row[:512] for row in ids]
    report = compare_ids(encoder, [row[0] for row in rows], ids)
    assert not report.is_equal
    found = {cause.name for cause in (*report.causes, *report.alternatives)}
    of_ids = {cause.name for cause in causes_for(encoder) if cause.is_of_reading}
    assert of_ids & set(CAUSES[name][1]) <= found, report.table()
    assert len(report.unexplained) <= 2, report.table()


# --- one text, several vectors


def test_vectors_that_depend_on_their_company_are_said(encoder: SentenceEncoder) -> None:
    """Errors that are a batch's: those of a random rounding, and other ones in each batch."""
    vectors = encoder.encode(ALL)
    noise = np.random.default_rng(0).normal(0, 3e-3, vectors.shape)
    diagnosis = diagnose(encoder, ALL, vectors + noise, max_texts=8)
    assert diagnosis.verdict == "company", diagnosis.table()
    assert "the vector of a text depends on its company" in diagnosis.table()
    assert "vectors of one text are" in diagnosis.table()


# --- reading otherwise


def test_a_reader_reads_as_the_tokenizer_does(encoder: SentenceEncoder) -> None:
    assert encoder.tokenizer is not None
    lines = (ROOT / "tests" / "data" / "parity_texts.jsonl").read_text(encoding="utf-8")
    texts = [*ALL, *(json.loads(line)["text"] for line in lines.splitlines())]
    reader = Reader(encoder.tokenizer)
    assert reader.is_able
    for text, ids in zip(texts, encoder.tokenizer(texts).input_ids, strict=True):
        assert reader.ids(text, Reading()) == ids, text


def test_golden_texts_show_every_reading(encoder: SentenceEncoder) -> None:
    assert encoder.tokenizer is not None
    reader = Reader(encoder.tokenizer)
    own = [reader.ids(text, Reading()) for text in ALL]
    unseen = []
    for cause in causes_for(encoder):
        if "reading" in cause.changes:
            reading = Reading(**cause.changes["reading"])
            if [reader.ids(text, reading) for text in ALL] == own:
                unseen.append(cause.name)
    # They have no special token in small letters, no U+2028, and none of the rarest characters.
    assert unseen == [
        "special tokens in small letters",
        "unassigned characters dropped",
        "characters of private use kept",
        "U+FFFD kept",
        "line and paragraph separators no blanks",
        "line and paragraph separators dropped",
    ]


def test_text_that_is_not_cleaned_is_told_in_parts(encoder: SentenceEncoder) -> None:
    """What a `BertWordPieceTokenizer` without clean_text and without a limit makes of texts."""
    assert encoder.tokenizer is not None
    texts = json.loads((PEERS / "texts.json").read_text(encoding="utf-8"))
    other = Tokenizer.from_str(encoder.tokenizer.backend.to_str())
    other.no_truncation()
    other.no_padding()
    other.normalizer = BertNormalizer(clean_text=False)
    report = compare_ids(encoder, texts, [each.ids for each in other.encode_batch(texts)])
    assert {cause.name for cause in report.causes} == {
        "not cut",
        "control characters kept, but for those that are blanks",
        "soft hyphens and other characters of format kept",
        "characters of private use kept",
        "U+FFFD kept",
    }
    assert not report.unexplained


def test_a_limit_that_no_text_shows_is_not_claimed(encoder: SentenceEncoder) -> None:
    assert encoder.tokenizer is not None
    texts = ["a word " * 150, "a word " * 300]
    ids = encoder.tokenizer(texts).input_ids
    report = compare_ids(encoder, texts[:1], ids[:1])
    assert "cut at 512 tokens, or not cut" in report.summary
    assert "read otherwise: not cut" in compare_ids(encoder, texts, ids).summary
    cut = [row[:511] + row[-1:] if len(row) > 512 else row for row in ids]
    assert "read otherwise: cut at 512 tokens" in compare_ids(encoder, texts, cut).summary
    assert "not cut" not in compare_ids(encoder, texts, cut).summary


def test_what_texts_have_in_common_is_said() -> None:
    assert in_common(["नमस्ते", "हिन्दी"], ["hello", "Ünder"]) == ["devanagari letters", "marks"]
    assert in_common(["a«b»"], ["(a)"]) == ["punctuation beyond ASCII"]
    assert in_common([], ["a"]) == []


# --- ids alone


def test_command_compares_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                              published: Path, encoder: SentenceEncoder) -> None:  # fmt: skip
    assert encoder.tokenizer is not None
    command = ["parity", "--model", str(published), "--device", "cpu", "--against-ids"]
    ids = encoder.tokenizer(ALL, 256).input_ids
    (tmp_path / "a.json").write_text(json.dumps([[*row, 0, 0] for row in ids]), encoding="utf-8")
    assert cli.main([*command, str(tmp_path / "a.json")]) == 0
    assert "the same ids" in capsys.readouterr().out
    texts = [ALL[56], ALL[0]]
    rows = [{"text": text, "input_ids": ids[ALL.index(text)]} for text in texts]
    rows[0]["input_ids"] = encoder.tokenizer(["οδος αθηνας"]).input_ids[0]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert cli.main([*command, str(tmp_path / "b.jsonl")]) == 1
    assert "1 of 2 texts are read otherwise: final sigma" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "b.jsonl"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["rows"] == [0]
    (tmp_path / "c.json").write_text("[[1, 2], [3, true]]", encoding="utf-8")
    with pytest.raises(InputError, match=r"c.json: is not a file of ids.*row 1 is no list of ids"):
        read_ids(tmp_path / "c.json")
    with pytest.raises(InputError, match="ids has 1 rows, texts 2"):
        compare_ids(encoder, texts, ids[:1])

"""scripts/learn/from_scratch.py is what it says: short, NumPy alone, and the same model."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import from_scratch
import numpy as np
import pytest

from conftest import DATA, ROOT
from minilm import SentenceEncoder, TruncationWarning
from minilm.parity.digest import pinned

FILE = ROOT / "scripts" / "learn" / "from_scratch.py"
TEXTS = [
    json.loads(line)["text"]
    for line in (DATA / "parity_texts.jsonl").read_text(encoding="utf-8").splitlines()
]
OWN = [
    "",
    " \t\n\v\f\r\x1c\x85\u00a0\u3000",
    "Café CAFE\u0301 naïve Ünïcode Ærøskøbing İstanbul ΟΔΟΣ ß",
    "日本語の文 漢字kanji中文, 한국어 豈",
    "don't stop-believing (now)... $5 + 3 = 8 `x` ~ ^ | <tag>",
    "a" * 100 + " " + "a" * 101,
    "\u200bzero\u200bwidth\ufffd\x00\x07 soft\u00adhyphen",
    "snowboarding unaffable hyperparameterization 😀 👩‍👩‍👧",
    "weather " * 300,
]


@pytest.fixture(scope="module")
def tensors(published: Path) -> dict[str, Any]:
    return from_scratch.read_tensors((published / "model.safetensors").read_bytes())


@pytest.fixture(scope="module")
def vocabulary(published: Path) -> dict[str, int]:
    values = json.loads((published / "tokenizer.json").read_bytes())
    words: dict[str, int] = values["model"]["vocab"]
    return words


def test_at_most_150_lines_of_at_most_100_characters() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100


@pytest.mark.process
def test_numpy_alone() -> None:
    standard = {"hashlib", "json", "math", "pathlib", "re", "struct", "sys", "typing"}
    standard.add("unicodedata")
    names = set()
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    assert names == standard | {"numpy"}
    code = f"""
import sys; sys.path.insert(0, {str(FILE.parent)!r}); import from_scratch
heavy = {{"torch", "tokenizers", "safetensors", "minilm"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensors_are_those_of_the_file(tensors: dict[str, Any], published: Path) -> None:
    import safetensors.numpy

    expected = safetensors.numpy.load_file(published / "model.safetensors")
    floats = {name for name, value in expected.items() if value.dtype == np.float32}
    assert set(tensors) == floats
    for name in floats:
        np.testing.assert_array_equal(tensors[name], expected[name])


def test_ids_are_those_of_the_tokenizer(
    encoder: SentenceEncoder, vocabulary: dict[str, int]
) -> None:
    texts = TEXTS + OWN + ["one [MASK] and[SEP]", "[mask] [CLS][CLS]"]
    assert encoder.tokenizer is not None
    expected = encoder.tokenizer(texts, encoder.max_seq_length).input_ids
    for text, ids in zip(texts, expected, strict=True):
        assert from_scratch.tokenize(text, vocabulary) == ids, ascii(text)


def test_vectors_are_those_of_the_model(
    encoder: SentenceEncoder, tensors: dict[str, Any], vocabulary: dict[str, int]
) -> None:
    texts = [*from_scratch.SENTENCES, *OWN, *TEXTS[::100]]
    with pytest.warns(TruncationWarning):
        expected = encoder.encode(texts)
    for text, vector in zip(texts, expected, strict=True):
        actual = from_scratch.encode(from_scratch.tokenize(text, vocabulary), tensors)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, vector, rtol=0, atol=1e-5, err_msg=ascii(text))


@pytest.mark.slow
def test_has_the_digest_of_the_model(tensors: dict[str, Any], vocabulary: dict[str, int]) -> None:
    assert from_scratch.digest(vocabulary, tensors) == pinned()["sha256"]["embedding"]


@pytest.mark.process
def test_prints_the_matrix_of_the_readme(published: Path) -> None:
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.strip("[] ").split() for line in done.stdout.splitlines()]
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("`scripts/demo` ends with")[1]
    lines = block.split("```")[1].splitlines()[2:5]
    expected = [[float(x) for x in line.split()[1:4]] for line in lines]
    assert [[float(x) for x in row] for row in rows] == expected
    said = [line.split("  ")[-1] for line in lines]
    assert said == from_scratch.SENTENCES

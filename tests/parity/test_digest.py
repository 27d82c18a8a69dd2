"""One number for the whole model: pinned, the same everywhere, and changed by every fault."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import LESSER, ROOT, minilm, write_model_folder
from minilm import SentenceEncoder
from minilm.errors import InputError
from minilm.parity.digest import (
    DISTANCE,
    STEPS,
    DigestReport,
    choose,
    digest,
    hashes,
    margins,
    pinned,
    stages_of,
)
from minilm.parity.golden_texts import TEXTS
from minilm.parity.mistakes import Variant, VariantRunner, causes_for
from mutations import MUTATIONS, planted

Expected = dict[int, dict[str, bytes]]
# Of the mistakes, those that the chosen texts don't show.
UNSEEN = {
    "special tokens in small letters",
    "case folded, a written ς too",
    "unassigned characters dropped",
    "characters of private use kept",
    "U+FFFD kept",
    "line and paragraph separators no blanks",
    "line and paragraph separators dropped",
    "text ended by NUL",
}


def rounded(values: Any) -> bytes:
    data: bytes = values.astype("<f4").tobytes()
    return data


@pytest.fixture(scope="module")
def expected(encoder64: SentenceEncoder) -> Expected:
    """The rounded vectors of the chosen texts, whose hash is the one number."""
    found = dict(stages_of(encoder64, pinned()["texts"]))
    assert hashes(found.items(), pinned()) == pinned()["sha256"]
    return {n: {"embedding": rounded(each["embedding"])} for n, each in found.items()}


def test_boundaries() -> None:
    one = np.array([1.0, 2.0])
    step = 2.0**-23  # above 1; half as wide below
    steps, distances = margins(np.array([[1 + step / 4, 1 + step]]), one)
    assert steps == 0.25
    assert distances == step / 4
    steps, distances = margins(np.array([[1 + step / 2, 1 + step]]), one)
    assert steps == distances == 0
    steps, distances = margins(np.array([[1.0, 1.0]]), one)
    assert steps == 0.5
    assert distances == step / 8  # over 2, down


@pytest.mark.slow
def test_what_is_pinned_is_chosen_by_the_rule(encoder64: SentenceEncoder) -> None:
    chosen = choose(encoder64)
    ours = pinned()
    assert {name: chosen[name] for name in ("texts", "tokens", "sha256")} == {
        name: ours[name] for name in ("texts", "tokens", "sha256")
    }, "run scripts/make/digest.py"
    assert ours["margin"]["steps"] >= STEPS
    assert ours["margin"]["distance"] >= DISTANCE
    assert len(ours["texts"]) > len(TEXTS) / 2


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_planted_fault_changes_it(
    encoder64: SentenceEncoder, expected: Expected, name: str
) -> None:
    with planted(name, encoder64) as broken:
        computed = stages_of(broken, pinned()["texts"])
        assert any(rounded(f["embedding"]) != expected[n]["embedding"] for n, f in computed)


@pytest.mark.slow
def test_every_mistake_that_is_tried_changes_it(
    encoder64: SentenceEncoder, expected: Expected
) -> None:
    numbers = pinned()["texts"]
    texts = [TEXTS[number].text for number in numbers]
    counts = encoder64.token_counts(texts)
    runner = VariantRunner(encoder64, texts, counts, list(range(len(texts))))
    right = Variant(limit=encoder64.max_seq_length)
    order = sorted(range(len(texts)), key=lambda place: counts[place])
    unseen = set()
    for cause in causes_for(encoder64):
        variant = right.with_(cause)
        if not runner.differs(right, variant):
            unseen.add(cause.name)
            continue
        # The shortest alone first: most mistakes show there, and padding to 512 tokens is dear.
        for start in range(-7, len(order), 8):
            places = order[max(start, 0) : start + 8]
            pooled = runner.pooled(variant, places).numpy()
            vectors = pooled / np.linalg.norm(pooled, axis=1, keepdims=True).clip(1e-12)
            if any(
                rounded(vector) != expected[numbers[place]]["embedding"]
                for vector, place in zip(vectors, places, strict=True)
            ):
                break
        else:
            unseen.add(cause.name)
    assert unseen == UNSEEN


@pytest.mark.slow
def test_stage_that_differs_first_is_named(encoder64: SentenceEncoder) -> None:
    with planted("one_weight_off_by_a_millionth", encoder64) as broken:
        found = digest(broken)
    assert found.first == "layers.0.feed_forward_layer_norm.output"
    assert not found.is_equal
    assert found.sha256["input_ids"] == found.expected["input_ids"]
    assert "not the published model: the first stage that differs is layers.0" in found.table()
    with planted("cased_text", encoder64) as broken:
        assert digest(broken).first == "input_ids"
    with planted("last_layer_left_out", encoder64) as broken:
        assert digest(broken).first == "layers.5.feed_forward_layer_norm.output"


@pytest.mark.slow
def test_float32_is_computed_in_float64(encoder: SentenceEncoder) -> None:
    assert digest(encoder).is_equal
    assert not encoder.bert.embeddings.layer_norm._forward_hooks


def test_fewer_bits_are_refused(tmp_path: Path) -> None:
    model = SentenceEncoder(write_model_folder(tmp_path / "tiny"), dtype="bfloat16", device="cpu")
    with pytest.raises(InputError, match="load it in float32"):
        digest(model)


@pytest.mark.slow
def test_command_prints_it(published: Path, tmp_path: Path) -> None:
    done = minilm("parity", "--digest", "--model", published, "--device", "cpu")
    assert done.returncode == 0
    assert done.stdout.decode().splitlines()[0] == pinned()["sha256"]["embedding"]
    tiny = write_model_folder(tmp_path / "tiny")
    done = minilm("parity", "--digest", "--model", tiny, "--device", "cpu", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["first"] == "input_ids"
    assert found["is_equal"] is False


def test_missing_stages_differ() -> None:
    assert DigestReport({"embedding": "a"}, {"pooled": "b", "embedding": "a"}).first == "pooled"


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("kind", LESSER)
def test_other_processors_print_the_same(kind: str, published: Path) -> None:
    command = [sys.executable, "-m", "minilm", "parity", "--digest", "--model", str(published)]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | LESSER[kind]
    done = subprocess.run(command, check=False, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

"""A program that is run again is said to do what it did, or what else it does."""

import base64
import json
from typing import Any

import numpy as np
import pytest

import peers
from minilm import SentenceEncoder
from peers_programs import PROGRAMS

pytestmark = pytest.mark.filterwarnings("ignore::minilm.errors.TruncationWarning")


def test_all_of_the_guide_but_one_can_be_run_again() -> None:
    files = {path.stem for path in peers.PEERS.glob("*.json")} - {"texts"}
    assert files - PROGRAMS.keys() == {"llama-cpp-f32"}
    assert PROGRAMS.keys() <= files
    for name, program in PROGRAMS.items():
        if not program.npm:
            compile(program.script, name, "exec")


def test_a_release_that_changes_is_heard(encoder: SentenceEncoder) -> None:
    file = peers.PEERS / "budtiktok.json"
    before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    same, lines = peers.compared(before, before, encoder)
    assert same
    assert lines[-1] == "it does what it did"
    texts = json.loads((peers.PEERS / "texts.json").read_text(encoding="utf-8"))
    right = encoder.encode([texts[row["text"]] for row in before["rows"]])
    rows = [
        row | {"embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()}
        for row, vector in zip(before["rows"], right, strict=True)
    ]
    same, lines = peers.compared(before, before | {"version": "9", "rows": rows}, encoder)
    assert not same
    assert "now: equal to rounding" in lines
    assert any(line.startswith("before: special tokens as plain text") for line in lines)


def test_ids_of_a_tokenizer_become_its_file(encoder: SentenceEncoder) -> None:
    file = peers.PEERS / "budtiktok.json"
    before = json.loads(file.read_text(encoding="utf-8"))
    assert encoder.tokenizer is not None
    texts = json.loads((peers.PEERS / "texts.json").read_text(encoding="utf-8"))
    ids = encoder.tokenizer(texts).input_ids  # uncut
    now = peers.made({}, "new", "1", {"ids": ids}, encoder)
    assert now["min_cosine"] == pytest.approx(1, abs=1e-6)
    assert all(row["ids"] is None for row in now["rows"])
    assert {row["text"] for row in now["rows"]} >= peers.ALWAYS
    assert np.isfinite(peers.vectors_of(now)).all()
    assert json.loads(peers._written(now)) == now
    assert peers._written(before) == file.read_text(encoding="utf-8")

"""scripts/learn/finetune.py on the tiny model: the loss falls, and what was learnt is saved."""

import re
from pathlib import Path

import pytest
import torch

import finetune
from conftest import ROOT, SHARED
from minilm import SentenceEncoder

WORDS = ["the dog", "a cat", "the man", "sun is out", "walks", "running", "cafe", "bites", "sees"]
PAIRS = [(f"{a} {b}", f"{b} {mark}") for a in WORDS for b in WORDS[:4] for mark in ".!"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    return path


def test_it_has_at_most_100_lines() -> None:
    assert len((ROOT / "scripts/learn/finetune.py").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.slow
def test_the_loss_falls_and_the_result_is_saved(
    tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tuned"
    arguments = ["--pairs", pairs, "--model", tiny_folder, "-o", output, "--epochs", 6]
    arguments += ["--batch", 8, "--rate", 3e-3, "--held-out", 8]
    outputs = []
    for _ in range(2):
        finetune.main([str(argument) for argument in arguments])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]  # one seed, one result
    losses = [float(loss) for loss in re.findall(r"mean loss (\d+\.\d+)", outputs[0])]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]
    assert re.findall(r"(\w+): \d+\.\d% find their partner first", outputs[0]) == [
        "before",
        "after",
    ]
    assert "loaded by minilm: vectors differ by 0.0e+00 at most" in outputs[0]

    texts = [text for pair in PAIRS for text in pair]
    tuned = SentenceEncoder.from_pretrained(output, device="cpu").encode(texts)
    first = SentenceEncoder.from_pretrained(tiny_folder, device="cpu").encode(texts)
    assert abs(tuned - first).max() > 1e-2


@pytest.mark.reference
def test_the_reference_loads_it(
    tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sentence_transformers", reason="needs pip install 'minilm[reference]'")
    arguments = ["--pairs", pairs, "--model", tiny_folder, "-o", tmp_path / "tuned"]
    finetune.main([str(argument) for argument in [*arguments, "--epochs", 1, "--held-out", 8]])
    found = re.search(r"sentence-transformers: vectors differ by (\S+)", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) < 1e-6


def test_no_text_is_held_out_and_trained_on() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        train, test = finetune.split(PAIRS, 5)
        assert len(test) == 5
        assert train
        assert not {text for pair in train for text in pair} & {t for pair in test for t in pair}
        assert set(train) | set(test) <= set(PAIRS)


def test_without_texts_in_common_nothing_is_dropped() -> None:
    pairs = [(f"a{i}", f"b{i}") for i in range(10)]
    train, test = finetune.split(pairs, 3)
    assert sorted(train + test) == sorted(pairs)


def test_report_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    class Encoder:
        def encode(self, texts: tuple[str, ...]) -> torch.Tensor:
            angles = torch.tensor([float(text) for text in texts])
            return torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], dim=1)

    # 0 is nearest to 10, its partner; to 40 is 20, then 50: its partner is third after 10.
    pairs = [("0", "10"), ("40", "5"), ("90", "50")]
    finetune.report("now", Encoder(), pairs)  # type: ignore[arg-type]
    ranks = [2, 3, 1]
    expected = f"{sum(1 / rank for rank in ranks) / 3:.4f}"
    assert capsys.readouterr().out == (
        f"now: 33.3% find their partner first, mean reciprocal rank {expected}\n"
    )


def test_lines_that_are_no_pair(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\nc\n")
    with pytest.raises(SystemExit, match="pair 2 is not two texts with a tab between"):
        finetune.read_pairs(path)


def test_abstracts_give_a_thousand_pairs() -> None:
    if not (SHARED / "retrieval").is_dir():
        pytest.skip(f"{SHARED} is absent")
    pairs = finetune.read_pairs(None)
    assert len(pairs) > 990
    assert all(a != b for a, b in pairs)

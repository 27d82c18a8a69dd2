"""The arithmetic of the plan, by hand; and one run on the tiny model."""

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import plan
from minilm import SentenceEncoder


def test_bytes_of_a_vector() -> None:
    assert plan.sizes(384) == {
        "flat, float32": (1536, 0),
        "flat, float16": (768, 0),
        "flat, int8, the best rescored in float32": (384, 1536),
        "flat, binary, the best rescored in int8": (48, 384),
        "HNSW graph, float32, M=32": (384 * 4 + 32 * 2 * 4, 0),
    }
    assert plan.sizes(9)["flat, binary, the best rescored in int8"] == (2, 9)  # whole bytes
    assert plan.sizes(384, links=16)["HNSW graph, float32, M=16"] == (1664, 0)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (1, [(1, 1)]),
        (2, [(1, 1), (1, 2), (2, 1)]),
        (4, [(1, 1), (1, 4), (2, 2), (4, 1)]),
        (6, [(1, 1), (1, 4), (1, 6), (3, 2), (6, 1)]),
    ],
)
def test_ways_to_divide_cores(cores: int, expected: list[tuple[int, int]]) -> None:
    assert plan.ways(cores) == expected


@pytest.mark.parametrize("price", [0.5, None])
def test_markdown(price: float | None) -> None:
    rates = {
        ("float32", 1, 1): [600.0, 500.0, 700.0],
        ("float32", 2, 1): [1000.0, 900.0, 1100.0],
        ("bfloat16", 1, 2): [4000.0, 3900.0, 4100.0],
    }
    options = Namespace(sentences=3.6e6, price_per_hour=price)
    lines = plan.as_markdown(rates, 20.0, 384, 2e9, options).splitlines()
    # 3.6e6 texts are 72e6 tokens: the fastest way takes 72,000 s, 20 hours.
    for line in (
        "| float32 | 2 × 1 | 1,000 (900-1,100) | 500 |",
        "3,600,000 texts of 20.0 tokens, the fastest way of each dtype:",
        "| | float32 | bfloat16 |",
        "| texts/s of one such machine | 50 | 200 |",
        "| core-hours | 40 | 10 |",
        "| days on 1 of them | 0.83 | 0.21 |",
        "| days on 10 of them | 0.08 | 0.02 |",
        "| flat, float16 | 2.76 | 0.00 |",
        "| flat, float32 | 5.53 | 0.00 |",
        "| flat, binary, the best rescored in int8 | 0.17 | 1.38 |",
        "| HNSW graph, float32, M=32 | 6.45 | 0.00 |",
    ):
        assert line in lines
    assert ("| cost at 0.5 a machine-hour | 10 | 2.50 |" in lines) == (price is not None)
    # 3.6e6 x 1536 bytes at 2e9 a second
    assert lines[-1] == (
        "An exact search goes through all: 2.8 s a query in float32, at 2.0 GB/s here."
    )


def test_a_run(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample, results = tmp_path / "sample.txt", tmp_path / "plan.md"
    sample.write_text("the dog bites\na cat sees the man\n", encoding="utf-8")
    threads = torch.get_num_threads()
    command = ["--model", str(tiny_folder), "--sample", str(sample), "--cores", "1"]
    command += ["--rounds", "1", "--seconds", "0.01", "--sentences", "1e9"]
    assert plan.main([*command, "--markdown", str(results)]) == 0
    out = capsys.readouterr().out
    assert "1,000,000,000 texts of 6.0 tokens" in out  # 3 and 5 words, and [CLS] and [SEP]
    assert "| flat, float32 | 128 | 0.00 |" in out  # 32 numbers each
    assert "| float32 | 1 × 1 | " in out
    assert results.read_text(encoding="utf-8").endswith(out)
    assert torch.get_num_threads() == threads


@pytest.mark.process
def test_several_processes(tiny_encoder: SentenceEncoder) -> None:
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        run: Any = plan.encode_in(tiny_encoder, 2, 1, stack)
        assert run(["the dog bites"] * 3).shape == (3, 32)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "arguments",
    [["--sentences", "0"], ["--sentences", "nan"], ["--cores", "0"], ["--seconds", "0"]],
)
def test_what_can_not_be_planned(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(arguments)
    assert f"argument {arguments[0]}: invalid" in capsys.readouterr().err


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--model", "/nowhere/at/all"]) == 1
    assert "/nowhere/at/all" in capsys.readouterr().err


def test_an_empty_sample(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert plan.main(["--model", str(tiny_folder), "--sample", str(empty)]) == 1
    assert f"{empty}: has no texts" in capsys.readouterr().err


def test_a_sample_is_from_all_over_the_file(tmp_path: Path) -> None:
    many = tmp_path / "many.txt"
    many.write_text("".join(f"{number}\n" for number in range(5000)), encoding="utf-8")
    sample = plan.read_sample(str(many), None)
    assert len(sample) == 2000
    assert sample[:3] == ["0", "2", "5"]
    assert sample[-1] == "4997"

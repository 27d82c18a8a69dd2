"""The arithmetic of the plan, by hand; and one run on the tiny model."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import plan
import pytest
import torch
from plan import Index, Rate

from minilm import SentenceEncoder


def test_bytes_per_vector() -> None:
    assert plan.bytes_per_vector(384) == {
        "float32": 1536, "float16": 768, "int8": 384, "binary": 48,
    }  # fmt: skip
    assert plan.bytes_per_vector(9)["binary"] == 2  # whole bytes


def test_gigabytes() -> None:
    assert plan.gigabytes(1e9, 1536) == 1536.0
    assert plan.gigabytes(2_500_000, 48) == pytest.approx(0.12)


def test_indexes() -> None:
    flat, int8, binary, graph = plan.indexes(384)
    assert flat == Index("flat, float32", 1536, 0)
    assert (int8.memory, int8.disk) == (384, 1536)
    assert (binary.memory, binary.disk) == (48, 384)
    assert (graph.memory, graph.disk) == (384 * 4 + 32 * 2 * 4, 0) == (1792, 0)
    assert plan.indexes(384, links=16)[3].memory == 1664


def test_time_and_cost() -> None:
    # 16e9 tokens at 10,000 a second: 1,600,000 s, of two cores 888.9 hours.
    assert plan.core_hours(16e9, 10_000, 2) == pytest.approx(888.888889)
    assert plan.days(16e9, 10_000, 1) == pytest.approx(18.518519)
    assert plan.days(16e9, 10_000, 10) == pytest.approx(1.8518519)
    assert plan.cost(16e9, 10_000, 0.09) == pytest.approx(40.0)


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


def test_so_many() -> None:
    texts, counts = ["a", "b", "c"], [4, 5, 6]
    assert plan.so_many(texts, counts, 0) == (["a"], 4)
    assert plan.so_many(texts, counts, 9) == (["a", "b"], 9)
    assert plan.so_many(texts, counts, 20) == (["a", "b", "c", "a", "b"], 24)


@pytest.fixture
def small_plan() -> dict[str, Any]:
    rates = [
        Rate("float32", 1, 1, 600.0, 500.0, 700.0),
        Rate("float32", 2, 1, 1000.0, 900.0, 1100.0),
        Rate("bfloat16", 1, 2, 4000.0, 3900.0, 4100.0),
    ]
    # Of 10, 20 and 300 tokens 10, 20 and 30 are read: 20 in the mean.
    return plan.make_plan(rates, [10, 20, 300], 30, 384, 3.6e6, [1, 10], 0.5, 2e9)


def test_plan(small_plan: dict[str, Any]) -> None:
    assert small_plan["sample"] == {
        "texts": 3, "tokens_mean": 20.0, "tokens_min": 10, "tokens_max": 30, "cut": 1,
    }  # fmt: skip
    assert small_plan["tokens"] == 72e6
    work = small_plan["work"]
    assert list(work) == ["float32", "bfloat16"]
    assert work["float32"] == {  # the fastest way: 72,000 s are 20 hours
        "tokens_per_second": 1000.0,
        "sentences_per_second": 50.0,
        "cores": 2,
        "core_hours": 40.0,
        "days": {"1": pytest.approx(20 / 24), "10": pytest.approx(2 / 24)},
        "cost": 10.0,
    }
    assert work["bfloat16"]["core_hours"] == 10.0
    assert small_plan["vectors_gb"]["binary"] == pytest.approx(0.1728)
    graph = small_plan["indexes_gb"]["HNSW graph, float32, M=32"]
    assert graph == {"memory": pytest.approx(6.4512), "disk": 0.0}
    # 3.6e6 x 1536 bytes at 2e9 a second
    assert small_plan["scan"]["seconds_per_query"] == pytest.approx(2.7648)


def test_markdown(small_plan: dict[str, Any]) -> None:
    text = plan.as_markdown({"machine": "2 cores of a processor", **small_plan})
    lines = text.splitlines()
    assert lines[0] == (
        "Measured on 2 cores of a processor, 3 texts of 10 to 30 tokens, 20.0 in the mean; "
        "1 are longer than the limit and were cut:"
    )
    for line in (
        "| float32 | 2 × 1 | 1,000 (900-1,100) | 500 |",
        "| core-hours | 40 | 10 |",
        "| days on 1 such machine | 0.83 | 0.21 |",
        "| days on 10 such machines | 0.08 | 0.02 |",
        "| cost at 0.5 a machine-hour | 10 | 2 |",
        "| float16 | 2.8 |",
        "| flat, float32 | 5.5 |  |",
        "| flat, binary, the best rescored in int8 | 0.2 | 1.4 |",
    ):
        assert line in lines
    assert "2.8 s a query" in lines[-1]


def test_no_price(small_plan: dict[str, Any]) -> None:
    free = plan.make_plan([Rate("float32", 1, 1, 1.0, 1.0, 1.0)], [3], 30, 384, 1.0, [1], None, 1.0)
    assert free["work"]["float32"]["cost"] is None
    assert "machine-hour" not in plan.as_markdown({"machine": "", **free})


def test_a_run(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = tmp_path / "sample.txt"
    sample.write_text("the dog bites\na cat sees the man\n", encoding="utf-8")
    threads = torch.get_num_threads()
    command = ["--model", str(tiny_folder), "--sample", str(sample), "--cores", "1", "--json"]
    command += ["--rounds", "1", "--seconds", "0.01", "--dtype", "float32", "--sentences", "1e6"]
    assert plan.main(command) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["sample"]["tokens_mean"] == 6.0  # of 3 and of 5 words, and [CLS] and [SEP]
    assert out["tokens"] == 6e6
    (rate,) = out["rates"]
    assert (rate["dtype"], rate["processes"], rate["threads"]) == ("float32", 1, 1)
    assert 0 < rate["slowest"] <= rate["tokens_per_second"] <= rate["fastest"]
    assert out["vectors_gb"]["float32"] == pytest.approx(0.128)  # 32 numbers each
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
    ("arguments", "message"),
    [
        (["--sentences", "0"], "--sentences is 0.0; pass 1 or more"),
        (["--sentences", "nan"], "--sentences is nan"),
        (["--cores", "0"], "--cores is 0; pass a positive integer"),
        (["--machines", "1", "-3"], "--machines is -3"),
        (["--seconds", "0"], "--seconds is not above 0"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_can_not_be_planned(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_an_empty_sample(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert plan.main(["--model", str(tiny_folder), "--sample", str(empty)]) == 1
    assert f"{empty}: has no texts" in capsys.readouterr().err


def test_a_sample_is_from_all_over_the_file(tmp_path: Path, tiny_encoder: SentenceEncoder) -> None:
    many = tmp_path / "many.txt"
    many.write_text("".join(f"{number}\n" for number in range(5000)), encoding="utf-8")
    sample = plan.read_sample(str(many), None, tiny_encoder)
    assert len(sample) == 2000
    assert sample[:3] == ["0", "2", "5"]
    assert sample[-1] == "4997"

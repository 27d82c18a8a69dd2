"""What is equal to the reference and what differs: every row of scripts/quality/differences.py."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from differences import Comparison, Row, describe, difference, rows, why_not

from conftest import ROOT

ROWS = rows()
QUICK = [row for row in ROWS if row.group != "processes"]
IN_PROCESSES = [row for row in ROWS if row.group == "processes"]


@pytest.fixture(scope="module")
def comparison(published: Path) -> Iterator[Comparison]:
    from reference import is_installed

    if not is_installed():
        pytest.skip("needs the reference: pip install 'minilm[reference]'")
    comparison = Comparison(published)
    yield comparison
    comparison.close()


def check(comparison: Comparison, row: Row) -> None:
    if reason := why_not(row):
        pytest.skip(reason)
    compared = comparison(row)
    assert not compared.problem, f"{compared.reference}; ours: {compared.ours}"


@pytest.mark.reference
@pytest.mark.parametrize("row", QUICK, ids=lambda row: f"{row.policy}: {row.call}")
def test_row_is_as_its_policy_says(comparison: Comparison, row: Row) -> None:
    check(comparison, row)


@pytest.mark.process
@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("row", IN_PROCESSES, ids=lambda row: f"{row.policy}: {row.call}")
def test_row_in_processes_is_as_its_policy_says(comparison: Comparison, row: Row) -> None:
    check(comparison, row)


def test_every_row_but_a_match_has_its_reason() -> None:
    assert {row.policy for row in ROWS} == {"M", "B", "D"}
    assert all(bool(row.reason) == (row.policy != "M") for row in ROWS)
    calls = [(row.call, row.version) for row in ROWS]
    assert len(set(calls)) == len(calls)


def test_difference_can_tell() -> None:
    a = np.array([1.0, 2.0], np.float32)
    assert difference(a, a.copy(), 0) == ""
    assert difference(a, a + np.float32(1e-3), 1e-2) == ""
    assert difference(a, a + np.float32(1e-3), 1e-4) == "values, by 1.0e-03"
    assert difference(a, np.array([1.0, np.nan], np.float32), 1.0) == "values, by nan"
    assert difference(a, a.astype(np.float64), 1) == "dtype"
    assert difference(a, a[None], 1) == "shape"
    assert difference(a, torch.from_numpy(a), 1) == "type"
    assert difference(np.array([1], np.int8), np.array([2], np.int8), 5) == "values"
    assert difference([a, a], [a], 1) == "length"
    assert difference([a], (a,), 1) == "type"
    assert difference({"a": a}, {"b": a}, 1) == "keys"
    assert difference({"a": 1}, {"a": 2}, 1) == "value"
    assert difference(1, True, 1) == "value"
    assert difference(ValueError("a"), UnicodeError("b"), 0) == ""
    assert difference(ValueError("a"), TypeError("a"), 0) == "another error"
    assert difference(a, ValueError("a"), 0) == "an error"
    assert difference(ValueError("a"), a, 0) == "another error"


def test_padding_is_not_compared() -> None:
    mask = torch.tensor([1, 0])
    ours = {"token_embeddings": torch.tensor([[1.0], [7.0]]), "attention_mask": mask}
    assert difference(ours | {"token_embeddings": torch.tensor([[1.0], [9.0]])}, ours, 0) == ""
    assert difference(ours | {"token_embeddings": torch.tensor([[2.0], [7.0]])}, ours, 0)


def test_description() -> None:
    assert describe(np.zeros((2, 3), np.int8)) == "ndarray [2, 3] int8"
    assert describe([torch.zeros(2)]) == "list of 1: Tensor [2] float32"
    assert describe(ValueError("a\nb")) == "ValueError: a"
    assert describe("a") == "'a'"
    assert not re.search("0x", describe(object()))


def test_result_has_every_reason() -> None:
    result = (ROOT / "scripts/results/differences.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([DB]) \| (.*?) \| `", result, flags=re.MULTILINE)
    reasons = dict.fromkeys(
        (row.policy, row.reason) for row in ROWS if row.policy != "M" and row.version != 5
    )
    assert sorted(listed) == sorted(reasons)

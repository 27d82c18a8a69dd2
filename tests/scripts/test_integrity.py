"""What hashing costs, on a tiny model."""

import runpy
from pathlib import Path

import pytest

from conftest import ROOT


def test_each_step_is_timed(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "bench" / "integrity.py"))
    script["measure"](str(tiny_folder), 2)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("| ")][1:]
    assert len(steps) == 5
    for line in steps:
        seconds, worked = line.split("|")[2:4]
        assert float(seconds) >= 0
        assert float(worked) >= 0
    assert lines[-1].startswith("Hashing while tensors are converted makes loading ")

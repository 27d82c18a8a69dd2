"""Queries beside a busy program, on a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT

pytestmark = pytest.mark.process


@pytest.mark.skipif(sys.platform != "linux", reason="keeps a process to one processor")
def test_each_way_is_timed(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "bench" / "busy.py"))
    threads = torch.get_num_threads()
    script["measure"](str(tiny_folder), 5)
    assert torch.get_num_threads() == threads
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[4:]]
    assert {row[0].strip() for row in rows} == {"alone", "beside a busy program"}
    assert {int(row[1]) for row in rows} >= {1}
    for row in rows:
        middle, most, ratio = map(float, row[2:])
        assert 0 < middle <= most
        assert ratio >= 1

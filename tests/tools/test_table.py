"""The table of `minilm/files/README.md`: its lines give the numbers that were written."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from written import Row, Written, rows_of_table, run_line, tool

# What these programs warn of is theirs.
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]

ROWS = rows_of_table()
SESSIONS = {"Spark", "Ray Data"}  # started in their own files
READERS = [row for row in ROWS if " x = " in row.line and row.tool not in SESSIONS]


@pytest.mark.parametrize("row", READERS, ids=lambda row: row.tool)
def test_line_reads_what_was_written(
    row: Row, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if row.tool == "datasets":  # not into the user's own
        monkeypatch.setattr(tool("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    x = run_line(row.tool, written, tmp_path)["x"]
    assert x.dtype == np.float32
    assert x.shape == written.vectors.shape
    assert np.array_equal(x, written.vectors)


def test_versions_are_those_that_are_tested() -> None:
    """A release that is pinned anew is a reason to look at its row."""
    files = ("scripts/constraints.txt", "pyproject.toml", "scripts/test_tools")
    pinned = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    for row in ROWS:
        said = re.findall(r"([a-z][\w-]+) (\d[\w.]+)", row.tried.partition("(")[0])
        assert said, row
        for package, version in said:
            assert re.search(rf"\b{package}(==|@){re.escape(version)}\b", pinned), row.tried


def test_command_names_the_tests() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "test_tools"), "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    names = sorted(path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*"))
    assert f"nonsense: pass names of {', '.join(names)}, or nothing" in done.stderr


def test_every_tool_has_one_row() -> None:
    tools = [row.tool for row in ROWS]
    assert len(tools) == len(set(tools)) > 25

"""A notebook in a real kernel shows a trace and an explanation."""

import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT, write_model_folder
from written import tool

nbclient, nbformat = tool("nbclient"), tool("nbformat")
tool("ipykernel")
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


def test_kernel_shows_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PATH", f"{sys.prefix}/share/jupyter")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    model = write_model_folder(tmp_path / "tiny")
    cells = [
        "from minilm import SentenceEncoder",
        f"encoder = SentenceEncoder.from_pretrained({str(model)!r})",
        'encoder.explain("the <dog>", "a cat")',
        'encoder.trace("the <dog>")',
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [cell.outputs[0].data["text/html"] for cell in notebook.cells[2:]]
    for fragment in shown:
        assert len(fragment.encode()) < 200_000
        assert "<script" not in fragment
        assert "the &lt;dog&gt;" in fragment
    assert re.search(r"rgba\(\d", shown[0])
    assert "layers.1.attention.probabilities" in shown[1]

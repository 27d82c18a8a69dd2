"""What the README says is so: its snippets run, its figures are those of the code."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from conftest import ROOT
from minilm import SentenceEncoder, cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


NAMES = ["model", "modules", "index", "faiss", "classes", "inside", "drop-in", "langchain"]
NAMES += ["long", "ray"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the snippets run: one opens the index that another made."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=NAMES)
def test_snippet_prints_what_it_says(
    snippet: str, encoder: SentenceEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in re.findall(r"^(?:import|from) (\w+)", snippet, flags=re.MULTILINE):
        pytest.importorskip(package)
    # The snippet's own call would ask the Hub on a machine without the weights.
    monkeypatch.setattr(SentenceEncoder, "from_pretrained", lambda *_, **__: encoder)
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), {})
    said = re.findall(r"^# ?(.*)$", snippet, flags=re.MULTILINE)
    assert printed.getvalue().split() == " ".join(said).split()


def test_demo_output_is_that_of_the_command(
    published: object, capsys: pytest.CaptureFixture[str]
) -> None:
    block = README.split("`scripts/demo` ends with\n\n```text\n")[1].split("```")[0]
    sentences = [line.split("  ")[-1] for line in block.splitlines()[1:]]
    assert cli.main(["similarity", *sentences, "--model", str(published), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == block


def test_number_of_texts_and_faults() -> None:
    from conftest import DATA
    from mutations import MUTATIONS

    texts = (DATA / "parity_texts.jsonl").read_text(encoding="utf-8").count("\n")
    assert f"on the {texts} texts in `tests/data`" in README
    assert f"plants {len(MUTATIONS)} faults" in README

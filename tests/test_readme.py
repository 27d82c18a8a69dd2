"""What the pages say is so: their snippets run, their links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from minilm import SentenceEncoder, cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "scripts" / "README.md", *(ROOT / "minilm").rglob("README.md")]
PAGES += (ROOT / "scripts" / "results").glob("*.md")
SNIPPETS = [
    pytest.param(snippet, id=f"{page.parent.relative_to(ROOT)}-{number}")
    for page in sorted(PAGES)
    for number, snippet in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the snippets run: one opens the index that another made."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_prints_what_it_says(
    snippet: str, encoder: SentenceEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in re.findall(r"^(?:import|from) (\w+)", snippet, flags=re.MULTILINE):
        pytest.importorskip(package)
    # The snippet's own call would ask the Hub on a machine without the weights.
    monkeypatch.setattr(SentenceEncoder, "from_pretrained", lambda *_, **__: encoder)
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    names: dict[str, Any] = {"encoder": encoder}  # that of the first snippet
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), names)
    said = re.findall(r"^# ?(.*)$", snippet, flags=re.MULTILINE)
    assert printed.getvalue().split() == " ".join(said).split()


def test_readme_is_short() -> None:
    assert len(README.encode()) <= 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], link


def test_pictures_are_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / ".assets").iterdir()) < 300_000


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
    assert f"on {texts} texts" in README
    said = (ROOT / "minilm" / "parity" / "README.md").read_text(encoding="utf-8")
    assert f"on the {texts} texts\nin `tests/data`" in said
    assert f"plants {len(MUTATIONS)} faults" in said

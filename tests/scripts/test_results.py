"""What a script printed, kept as Markdown with its command, date and machine."""

import sys
import time
from pathlib import Path

import pytest

import results
from conftest import ROOT


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([], ""),
        (["--markdown", "a.md"], ""),
        (["--markdown=a.md", "--rounds", "2"], " --rounds 2"),
        (["--data", "my folder", "--markdown", "a.md"], " --data 'my folder'"),
    ],
)
def test_command_is_what_one_would_type(
    given: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "bench" / "plan.py"), *given])
    assert results.command() == f"python scripts/bench/plan.py{shown}"


@pytest.mark.parametrize("fenced", [True, False])
def test_what_is_printed_is_also_written(
    fenced: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.md"
    with results.recorded(path, "A title", fenced=fenced):
        print("one\n")
        print("two")
    assert capsys.readouterr().out == "one\n\ntwo\n"
    title, heading, body = path.read_text(encoding="utf-8").split("\n\n", 2)
    assert title == "# A title"
    assert heading.startswith("`python ")
    assert f"` printed this on {time.strftime('%Y-%m-%d')}, on " in heading
    assert heading.endswith(".")
    assert results.processor() in heading
    assert body == ("```text\none\n\ntwo\n```\n" if fenced else "one\n\ntwo\n")


def test_no_file_is_left_by_an_error_or_by_silence(tmp_path: Path) -> None:
    def fail() -> None:
        with results.recorded(path, "A title"):
            print("half")
            raise ValueError("no")

    path = tmp_path / "result.md"
    with pytest.raises(ValueError, match="no"):
        fail()
    with results.recorded(path, "A title"):
        pass
    assert not path.exists()
    with results.recorded(None, "A title"):
        print("nowhere else")


def test_date_and_machine_of_an_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "result.md"
    results.write(path, "Speed", "| a |\n", date="2026-01-02", machine="4 threads of a thing")
    assert " printed this on 2026-01-02, on 4 threads of a thing.\n\n| a |\n" in path.read_text()


def test_every_result_says_how_it_came_about() -> None:
    for path in (ROOT / "scripts" / "results").glob("*.md"):
        heading = path.read_text(encoding="utf-8").split("\n\n")[1]
        script = heading.split("`")[1].split()[1]
        assert (ROOT / script).is_file(), path.name
        assert "2026-" in heading, path.name
        assert script.removeprefix("scripts/") in (ROOT / "scripts/README.md").read_text()

"""Standard streams that are not there, closed, or read by nobody: all commands do without."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from minilm import SentenceEncoder, cli
from minilm.errors import InputError
from minilm.inputs import progress_bar, with_progress
from minilm.streams import is_watched, standard_input, standard_output, tell

STREAMS = ["stdin", "stdout", "stderr"]


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--device", "cpu"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def closed() -> io.StringIO:
    stream = Terminal()
    stream.close()
    return stream


def test_who_watches() -> None:
    assert is_watched(Terminal())
    for stream in (io.StringIO(), None, closed(), object()):
        assert not is_watched(stream)


@pytest.mark.parametrize(
    ("missing", "kind"),
    [("all", "none"), ("all", "closed"), ("stdin", "none"), ("stderr", "none")],
)
def test_commands_without_a_stream(
    model: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the dog\na cat\nthe dog\n")
    for name in STREAMS if missing == "all" else [missing]:
        monkeypatch.setattr(sys, name, None if kind == "none" else closed())
    before = [getattr(sys, name) for name in STREAMS]
    for code, words in (
        (0, "encode a.txt -o out.npz"),
        (0, "encode a.txt"),
        (0, "encode a.txt -o folder/"),
        (0, "similarity -f a.txt"),
        (0, "dedup a.txt -o kept.txt"),
        (0, "mine a.txt"),
        (0, "index build a.txt -o index"),
        (0, "index search index dog --json"),
        (0, "check out.npz"),
        (1, "check other.npy --texts a.txt"),
        (1, "encode missing.txt"),
        (0, "encode -t " + "dog" * 9),
    ):
        np.save("other.npy", np.eye(3, 32, dtype=np.float32))
        assert cli.main([*words.split(), *model]) == code, words
    with pytest.raises(SystemExit) as error:
        cli.main(["encode", "--nonsense"])
    assert error.value.code == 2
    assert [getattr(sys, name) for name in STREAMS] == before
    assert Path("kept.txt").read_text() == "the dog\na cat\n"
    if missing in ("stdin", "all"):
        with pytest.raises(InputError, match="standard input is closed; name a file"):
            standard_input()
        assert cli.main(["encode", *model]) == 1


@pytest.mark.parametrize("stream", [None, closed()])
def test_progress_bars_without_standard_error(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    for show in (True, None):
        assert tiny_encoder.encode(["a", "b"], show_progress_bar=show).shape == (2, 32)
        assert list(with_progress([1, 2], show)) == [1, 2]
        with progress_bar(show, desc="Reading") as bar:
            bar.update(1)
    tell("nobody hears it")


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX closes the streams")
@pytest.mark.parametrize(
    ("words", "streams", "code", "out"),
    [
        ("encode a.txt -o out.npy", "<&- >&- 2>&-", 0, ""),
        ("encode", "<&-", 1, "minilm: standard input is closed; name a file\n"),
        ("encode a.txt", "> /dev/full", 1, "minilm: standard output: No space left on device"),
        ("check other.npy --texts a.txt", "| true", 1, ""),
        ("--help", "| true", 0, ""),
        ("encode missing.txt", "2>&1 | true", 1, ""),
    ],
)
def test_processes_without_a_stream(
    model: list[str], tmp_path: Path, words: str, streams: str, code: int, out: str
) -> None:
    if "/dev/full" in streams and not Path("/dev/full").exists():
        pytest.skip("this system has no full device")
    (tmp_path / "a.txt").write_text("the dog\n")
    np.save(tmp_path / "other.npy", np.eye(1, 32, dtype=np.float32))
    of_model = "" if words == "--help" else " ".join(model)
    script = f'"{sys.executable}" -m minilm {words} {of_model} {streams}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done
    assert (done.stdout + done.stderr).startswith(out)
    assert out or not done.stdout + done.stderr
    if "out.npy" in words:
        assert np.load(tmp_path / "out.npy").shape == (1, 32)


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with standard_output() as file:
            print("x" * 100_000, file=file)  # more than is kept back
        with standard_output() as file:
            print("and so on", file=file)
        monkeypatch.undo()

"""Where results go: refused before the work, or written to where the user pointed."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from minilm import SentenceEncoder, cli, outputs
from minilm.cli import commands
from minilm.errors import InputError
from minilm.files.records import read_fingerprint
from minilm.files.tables import SUFFIXES
from minilm.outputs import check_folder, check_output, check_room, is_stream, write_output

TEXTS = ["the dog bites", "a cat"]

# Each command that writes, and what its output is called.
FILES = {
    "encode": (["encode", "-t", TEXTS[0], "-o"], ".npy"),
    "dedup": (["dedup", "in.txt", "-o"], ".txt"),
    "tour": (["tour", *TEXTS, "-o"], ".html"),
    "html": (["explain", *TEXTS, "--html"], ".html"),
    "png": (["explain", *TEXTS, "--png"], ".png"),
}
FOLDERS = {
    "encode": ["encode", "in.txt", "-o"],
    "index": ["index", "build", "in.txt", "-o"],
    "parity": ["parity", "--golden"],
}


@pytest.fixture
def workplace(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "in.txt").write_text("".join(text + "\n" for text in TEXTS))
    return folder


@pytest.fixture
def run(workplace: Path, tiny_folder: Path) -> Callable[..., int]:
    def main(*words: str | Path) -> int:
        try:
            return cli.main([*map(str, words), "--model", str(tiny_folder), "--device", "cpu"])
        except SystemExit as usage:  # of argparse
            return int(usage.code or 0)

    return main


@pytest.fixture
def refused(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command that must fail before any model is loaded; gives what it says."""

    def main(*words: str | Path) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(commands, "_load", lambda options: pytest.fail("it went to work"))
            assert run(*words) in (1, 2)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return main


# refused before the work


@pytest.mark.parametrize("command", FILES)
def test_what_cannot_be_a_file(command: str, refused: Callable[..., str], workplace: Path) -> None:
    words, suffix = FILES[command]
    (workplace / f"folder{suffix}").mkdir()
    (workplace / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (workplace / f"away{suffix}").symlink_to("nowhere/x")
    os.mkfifo(workplace / "pipe")
    before = sorted(path.name for path in workplace.iterdir())
    for name, match in {
        f"folder{suffix}": "is a folder",
        f"missing/x{suffix}": "missing is not a folder that can be written to",
        f"in.txt/x{suffix}": "Not a directory",
        f"loop{suffix}": "leads nowhere|symbolic link",
        f"away{suffix}": "not a folder that can be written to",
        "a" * 252 + suffix: "File name too long",
        "": "",
        "/dev/stdin": "can't be written",
        f"/dev/fd/{2**20}": "can't be written",
    }.items():
        said = refused(*words, name)
        assert re.search(match, said)
        assert name[:40] in said
    if command != "encode":  # there it is a folder of Parquet files
        assert "is not the name of a file" in refused(*words, f"x{suffix}/")
    assert sorted(path.name for path in workplace.iterdir()) == before


@pytest.mark.parametrize("command", FOLDERS)
def test_what_cannot_be_a_folder(
    command: str, refused: Callable[..., str], workplace: Path
) -> None:
    words = FOLDERS[command]
    (workplace / "file").write_text("mine")
    (workplace / "link").symlink_to("nowhere")
    before = sorted(path.name for path in workplace.iterdir())
    for name, match in {
        "file": "is a file; pass a folder",
        "file/below": "is a file; pass a folder",
        "link": "is a link that leads nowhere; pass a folder",
        "x" * 256: "File name too long",
        f"in.txt/{'x' * 256}": "is a file",
    }.items():
        assert match in refused(*words, name)
    if command != "encode":
        assert "is not the name of a folder" in refused(*words, "-")
    if command != "index":  # of which the parent must be there
        assert "File name too long" in refused(*words, f"new/{'x' * 256}")
    assert sorted(path.name for path in workplace.iterdir()) == before
    assert (workplace / "file").read_text() == "mine"


def test_a_folder_or_file_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "file").chmod(0o444)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o555)
    if os.geteuid() == 0:  # root may
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "file")
        real = Path.open

        def opened(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.parent.name == "folder":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(InputError, match="file: may not be written to") as raised:
        check_output(tmp_path / "file", "-o")
    assert raised.value.argument == "-o"
    for check in (check_output, check_folder):
        path = tmp_path / "folder" / "x"
        with pytest.raises(InputError, match=f"{path}: .*Permission denied"):
            check(path, "-o")


def test_names_of_any_length(
    run: Callable[..., int], refused: Callable[..., str], workplace: Path
) -> None:
    for suffix in (".npy", ".npz"):
        for stem in ("a" * 212, "a" * 213, "a" * 234, "ä" * 117, "😀" * 58, "\udcff" * 234):
            name = stem + suffix
            assert run("encode", "-t", "a cat", "-o", name) == 0
            assert (workplace / name).is_file()
            if suffix == ".npy":
                assert read_fingerprint(workplace / name) is not None
    assert run("encode", "-t", "a cat", "-o", "a" * 251 + ".npz") == 0
    for stem in ("a" * 235, "a" * 251, "ä" * 120):
        said = refused("encode", "-t", "a cat", "-o", stem + ".npy")
        assert "File name too long; it would be written beside" in said
        assert not (workplace / f"{stem}.npy").exists()
    assert not [path for path in workplace.iterdir() if path.name.endswith(".part")]


def test_without_a_working_directory(
    run: Callable[..., int], refused: Callable[..., str], workplace: Path
) -> None:
    texts = workplace.with_name("in.txt")
    (workplace / "in.txt").rename(texts)
    workplace.rmdir()
    for name in ("out.npy", "out/", "out.jsonl"):
        said = refused("encode", texts, "-o", name)
        assert said.startswith(f"minilm: {name.strip('/')}: ")
    assert run("encode", texts, "-o", texts.with_name("out.npy")) == 0


def test_odd_names(run: Callable[..., int], refused: Callable[..., str], workplace: Path) -> None:
    for name in ("two\nlines.csv", " .jsonl", "-.npy", "./-.npz"):
        assert run("encode", "-t", "a cat", f"-o{name}") == 0
        assert (workplace / name).is_file()
    assert "has no suffix" in refused("encode", "-t", "a", "-o", ".npy")
    assert "put / at the end" in refused("encode", "-t", "a", "-o", "x.txt")
    (workplace / "x.npy").mkdir()
    assert "is a folder; put / at its end" in refused("encode", "in.txt", "-o", "x.npy")
    assert "is the file of --png too" in refused(
        "explain", *TEXTS, "--png", "x.html", "--html", "x.html"
    )


def test_a_disk_without_room(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=9**9, free=255))
    monkeypatch.setattr(SentenceEncoder, "encode", lambda *_, **__: pytest.fail("it went to work"))
    for words, name in ((["encode"], "x.npy"), (["index", "build"], "index")):
        assert run(*words, "in.txt", "-o", name) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"minilm: {name}: needs 256 bytes, and the disk that is mounted at")
        assert said.endswith("has 255 left\n")
    check_room(Path("x.npy"), 255)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    check_room(Path("x.npy"), 255)  # a file system that tells nothing


# written to where the user pointed


def vectors(tiny_folder: Path) -> "np.ndarray[Any, Any]":
    found: np.ndarray[Any, Any] = SentenceEncoder.from_pretrained(tiny_folder, device="cpu").encode(
        TEXTS
    )
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_link_stays_and_what_it_points_to_is_written(
    run: Callable[..., int], workplace: Path, suffix: str
) -> None:
    (workplace / "there").mkdir()
    target, link = workplace / "there" / "target", workplace / f"link{suffix}"
    for before in (True, False):  # what it points to may be there, or not yet
        target.write_bytes(b"old") if before else target.unlink()
        link.unlink(missing_ok=True)
        link.symlink_to("there/target")
        assert run("encode", "in.txt", "-o", link) == 0
        assert link.is_symlink()
        assert target.read_bytes() != b"old"
        assert read_fingerprint(link) is not None
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_modes_are_kept(run: Callable[..., int], workplace: Path, suffix: str) -> None:
    before = os.umask(0o022)
    try:
        files = [workplace / f"x{suffix}", workplace / f"x{suffix}.fingerprint.json"]
        for path in files:
            path.write_text("old")
            path.chmod(0o664)
        assert run("encode", "in.txt", "-o", files[0]) == 0
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o664}
        assert run("encode", "in.txt", "-o", workplace / f"new{suffix}") == 0
        assert stat.S_IMODE((workplace / f"new{suffix}").stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_other_names_of_a_file_keep_what_it_was(run: Callable[..., int], workplace: Path) -> None:
    (workplace / "x.npy").write_bytes(b"old")
    (workplace / "other").hardlink_to(workplace / "x.npy")
    assert run("encode", "in.txt", "-o", "x.npy") == 0
    assert (workplace / "other").read_bytes() == b"old"
    assert np.load(workplace / "x.npy").shape == (2, 32)


def test_the_input_may_be_the_output(run: Callable[..., int], workplace: Path) -> None:
    (workplace / "x.jsonl").write_text('{"text": "a cat", "id": 7}\n')
    assert run("encode", "x.jsonl", "-o", "x.jsonl") == 0
    row = json.loads((workplace / "x.jsonl").read_text())
    assert (row["text"], row["id"], len(row["embedding"])) == ("a cat", 7, 32)
    (workplace / "in.txt").write_text("a cat\na cat\nthe dog\n")
    assert run("dedup", "in.txt", "-o", "in.txt") == 0
    assert (workplace / "in.txt").read_text() == "a cat\nthe dog\n"


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output(
    run: Callable[..., int],
    workplace: Path,
    tiny_folder: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
    name: str,
) -> None:
    (workplace / "link").symlink_to("/dev/stdout")
    before = sorted(path.name for path in workplace.iterdir())
    assert run("encode", "in.txt", "-o", name) == 0
    rows = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    got = np.array([row["embedding"] for row in rows], np.float32)
    np.testing.assert_array_equal(got, vectors(tiny_folder))
    assert sorted(path.name for path in workplace.iterdir()) == before


def test_standard_output_in_place_of_what_is_printed(
    run: Callable[..., int], workplace: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run("dedup", "in.txt", "-o", "-") == 0  # in place of the pairs
    out = capfdbinary.readouterr().out
    assert out == b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    assert run("explain", *TEXTS, "--html", "-") == 0
    assert capfdbinary.readouterr().out.lower().startswith(b"<!doctype html>")
    assert run("explain", *TEXTS, "--png", "-") == 0
    assert capfdbinary.readouterr().out.startswith(b"\x89PNG")
    assert run("tour", *TEXTS, "-o", "-") == 0
    assert capfdbinary.readouterr().out.lower().startswith(b"<!doctype html>")
    for words in (["dedup", "in.txt", "-o", "-"], ["explain", *TEXTS, "--html", "-"]):
        assert run(*words, "--json") == 2
        assert b"standard output has what --json prints" in capfdbinary.readouterr().err
    assert [path.name for path in workplace.iterdir()] == ["in.txt"]


def test_what_an_open_file_has_stays(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"first\n")
    with (tmp_path / "log").open("ab") as file:  # as `>> log` opens it
        path = Path(f"/dev/fd/{file.fileno()}")
        assert is_stream(path)
        check_output(path, "-o", [path.with_name("beside")])
        write_output(path, lambda file: file.write(b"second\n"), {tmp_path / "beside": b"x"})
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\n"
    assert [each.name for each in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
def test_a_named_pipe(run: Callable[..., int], workplace: Path, suffix: str) -> None:
    pipe, got = workplace / f"pipe{suffix}", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    try:
        assert run("encode", "in.txt", "-o", pipe) == 0
    finally:
        reader.join(300)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert run("encode", "in.txt", "-o", f"file{suffix or '.jsonl'}") == 0
    assert got == [(workplace / f"file{suffix or '.jsonl'}").read_bytes()]
    assert not list(workplace.glob("pipe*.fingerprint.json"))


def test_devices(run: Callable[..., int], workplace: Path) -> None:
    before = Path("/dev/null").stat().st_mode
    assert run("encode", "in.txt", "-o", "/dev/null") == 0
    assert run("tour", *TEXTS, "-o", "/dev/null") == 0
    assert Path("/dev/null").stat().st_mode == before
    assert sorted(path.name for path in workplace.iterdir()) == ["in.txt"]


@pytest.mark.parametrize("command", ["file", "folder", "index", "golden"])
def test_a_model_whose_folder_has_a_name_that_is_no_text(
    workplace: Path, tiny_folder: Path, command: str
) -> None:
    model = tiny_folder.rename(os.fsdecode(b"m\xff"))
    words = {
        "file": ["encode", "in.txt", "-o", "x.safetensors"],
        "folder": ["encode", "in.txt", "-o", "out"],
        "index": ["index", "build", "in.txt", "-o", "out"],
        "golden": ["parity", "--golden", "out"],
    }
    assert cli.main([*words[command], "--model", str(model), "--device", "cpu"]) == 0
    if command == "file":
        record = read_fingerprint(Path("x.safetensors"))
        assert record is not None
        assert record.model == "m\\udcff"


# a full disk


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_does_not_fit_is_named(
    run: Callable[..., int],
    workplace: Path,
    small_files: None,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
) -> None:
    (workplace / "in.txt").write_text("a cat\n" * 1000)
    (workplace / f"x{suffix}").write_text("old")
    assert run("encode", "in.txt", "-o", f"x{suffix}") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"minilm: x{suffix}: File too large; ")
    assert "has no room for the vectors either: File too large" in said
    assert (workplace / f"x{suffix}").read_text() == "old"
    assert sorted(path.name for path in workplace.iterdir()) == ["in.txt", f"x{suffix}"]


def test_vectors_of_a_full_disk_are_kept_elsewhere(
    run: Callable[..., int],
    workplace: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (workplace / "full.npy").symlink_to("/dev/full")
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))
    assert run("encode", "in.txt", "-o", "full.npy") == 1
    said = capsys.readouterr().err
    [kept] = (tmp_path / "other").glob("minilm-*/embeddings.npy")
    assert said == f"minilm: full.npy: No space left on device; the vectors are kept in {kept}\n"
    np.testing.assert_array_equal(np.load(kept), vectors(tiny_folder))
    assert read_fingerprint(kept) is not None


@pytest.mark.process
def test_a_full_standard_output_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "minilm", "encode", "--model", tiny_folder, "--device", "cpu"],
            input=b"a cat\n",
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        )
    [kept] = tmp_path.glob("minilm-*/embeddings.jsonl")
    said = f"minilm: standard output: No space left on device; the vectors are kept in {kept}\n"
    assert (done.stderr.decode(), done.returncode) == (said, 1)
    assert json.loads(kept.read_text())["text"] == "a cat"


# methods


def test_methods_that_write_a_file(
    tiny_encoder: SentenceEncoder, tmp_path: Path, small_files: None
) -> None:
    trace = tiny_encoder.trace("a cat")
    explanation = tiny_encoder.explain(*TEXTS)
    writers: dict[str, Callable[[Path], None]] = {
        "trace.safetensors": trace.save,
        "picture.png": explanation.to_png,
    }
    for name, write in writers.items():
        (tmp_path / name).write_text("old")
        with pytest.raises(OSError, match="File too large") as raised:
            write(tmp_path / name)
        assert raised.value.filename == str(tmp_path / name)
        assert (tmp_path / name).read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    assert outputs.is_standard_output(Path("/dev/stdout"))

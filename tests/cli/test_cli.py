"""The command line on the tiny model.

Most tests run it in this process; what only a process of its own shows (streams of the system,
exit codes, signals) is tested in one.
"""

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from conftest import ROOT, Done, minilm, write_model_folder
from minilm import SentenceEncoder, cli
from minilm.cli import parser
from minilm.errors import InputError
from minilm.files.arrow import embeddings_of
from minilm.files.records import read_fingerprint
from minilm.files.tables import SUFFIXES, Table, read_table, reading_line, write_rows
from minilm.tasks import community_detection, paraphrase_mining_embeddings


def in_a_process(*arguments: str | Path, stdin: str = "", encoding: str = "utf-8") -> Done:
    """As `minilm`, in a process of its own, as a person runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "minilm", *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
    )
    return Done(done.returncode, done.stdout, done.stderr)


# Both ways to run it, for what must be the same in each.
EACH_WAY = pytest.mark.parametrize(
    "run", [minilm, pytest.param(in_a_process, marks=pytest.mark.process)]
)
Run = Callable[..., Done]


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--device", "cpu"]


@pytest.fixture
def loaded(tiny_folder: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(tiny_folder, device="cpu")


@EACH_WAY
def test_encode_standard_input_to_standard_output(
    run: Run, model: list[str], loaded: SentenceEncoder
) -> None:
    done = run("encode", *model, stdin="the dog\n\na cat")
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""  # no progress bar where nobody looks
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [row["text"] for row in rows] == ["the dog", "", "a cat"]  # a blank line is a text
    got = np.array([row["embedding"] for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(got, loaded.encode(["the dog", "", "a cat"]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_output_forms_hold_the_same_numbers(
    model: list[str], loaded: SentenceEncoder, tmp_path: Path, suffix: str
) -> None:
    texts = ['a "quoted", cat', "the café\u2028sun", ""]
    source = tmp_path / "texts ü.txt"
    source.write_bytes("\r\n".join(texts).encode() + b"\n")
    texts = ["-o is a text too", *texts]
    output = tmp_path / f"out{suffix}"
    done = minilm("encode", source, f"--text={texts[0]}", "-o", output, *model)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b""
    told = done.stderr.decode()
    assert told == f"read it by {reading_line(output)}\n"
    if suffix in (".npy", ".npz", ".safetensors"):
        line = told.removeprefix("read it by ")
        read = eval(line, {"numpy": np, "safetensors": safetensors})
        assert read.shape == (4, 32)
    if suffix == ".npy":
        got = np.load(output)
    elif suffix == ".npz":
        archive = np.load(output)
        got = archive["embeddings"]
        assert json.loads(archive["texts_json"].tobytes()) == texts
    elif suffix == ".safetensors":
        with safetensors.safe_open(output, "np") as file:
            got = file.get_tensor("embeddings")
            assert json.loads(file.metadata()["texts_json"]) == texts
    elif suffix == ".jsonl":
        lines = output.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        rows = [json.loads(line) for line in lines]
        assert [row["text"] for row in rows] == texts
        got = np.array([row["embedding"] for row in rows], dtype=np.float32)
    else:
        rows_ = list(csv.reader(io.StringIO(output.read_text(encoding="utf-8"), newline="")))
        assert rows_[0] == ["text", *map(str, range(32))]
        assert [row[0] for row in rows_[1:]] == texts
        got = np.array([row[1:] for row in rows_[1:]], dtype=np.float32)
    np.testing.assert_array_equal(got, loaded.encode(texts))
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_byte_order_mark_is_dropped(model: list[str], tmp_path: Path) -> None:
    source = tmp_path / "bom.txt"
    source.write_bytes(b"\xef\xbb\xbfthe dog\n")
    done = minilm("encode", source, *model)
    assert json.loads(done.stdout)["text"] == "the dog"


def test_dash_is_standard_input_among_files(model: list[str], tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("first\n", encoding="utf-8")
    done = minilm("encode", source, "-", *model, stdin="second\n")
    texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    assert texts == ["first", "second"]


def failed(done: Done, code: int) -> str:
    """One line on standard error, no traceback."""
    assert done.returncode == code, done
    message = done.stderr.decode()
    assert "Traceback" not in message
    return message


@EACH_WAY
def test_missing_file_is_an_error_never_a_text(run: Run, model: list[str]) -> None:
    message = failed(run("encode", "no-such-file.txt", *model), 1)
    assert message == "minilm: no-such-file.txt: No such file or directory\n"


def test_file_that_is_not_utf8_is_named_with_its_line(model: list[str], tmp_path: Path) -> None:
    source = tmp_path / "latin1.txt"
    source.write_bytes(b"fine\ncaf\xe9\n")
    message = failed(minilm("encode", source, *model), 1)
    assert f"{source}: line 2 is not UTF-8" in message


def test_output_into_a_missing_folder(model: list[str], tmp_path: Path) -> None:
    output = tmp_path / "missing" / "x.npy"
    message = failed(minilm("encode", "-t", "a", "-o", output, *model), 1)
    where = f"{output.parent} is not a folder that can be written to"
    assert message == f"minilm: {output}: {where}: No such file or directory\n"


@EACH_WAY
@pytest.mark.parametrize("command", ["encode -t", "similarity a"])
def test_output_in_another_encoding(run: Run, model: list[str], command: str) -> None:
    done = run(*command.split(), "日本", *model, encoding="cp1252")
    assert done.returncode == 0, done.stderr
    assert rb"\u65e5\u672c" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (
            ["encode", "-o", "name.nyp"],
            "name.nyp has no suffix of .npy, .npz, .safetensors, .jsonl, .csv; put / at the end of",
        ),
        (["encode", "-o", "folder"], "a folder is written from files; name them"),
        (["encode", "-o", "folder", "-t", "a"], "a folder is written from files"),
        (["encode", "-o", "folder", "-"], "a folder is written from files"),
        (
            ["encode", "-", "-o", "a.npy", "--on-bad-row", "skip"],
            "--on-bad-row: goes with -o FOLDER",
        ),
        (["encode", "-", "--workers", "2"], "--workers: goes with -o FOLDER"),
        (["encode", "-", "--precision", "float16"], "float16 goes with -o FOLDER"),
        (["encode", "--threads", "0"], "0 is not a positive integer"),
        (["encode", "--batch-size", "x"], "invalid positive integer value: 'x'"),
        (["similarity", "only one"], "pass two or more"),
        (["download", "--source", "hub"], "--source"),
    ],
)
def test_wrong_usage(arguments: list[str], hint: str) -> None:
    assert hint in failed(minilm(*arguments), 2)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--model", "./no/such/folder"], "no/such/folder: no such folder"),
        (["--device", "nonsense"], "device is 'nonsense'"),
        (["--dtype", "int4"], "dtype is 'int4'; pass one of float64"),
    ],
)
def test_bad_model_arguments_fail_in_one_line(
    model: list[str], arguments: list[str], hint: str
) -> None:
    message = failed(minilm("similarity", "a", "b", *model, *arguments), 1)
    assert hint in message


def test_similarity_prints_a_matrix(model: list[str], loaded: SentenceEncoder) -> None:
    texts = ["the dog", "a cat is out", "sun"]
    done = minilm("similarity", *texts, *model)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[0].split() == ["1", "2", "3"]
    embeddings = loaded.encode(texts)
    expected = loaded.similarity(embeddings, embeddings).numpy()
    for row, (line, text) in enumerate(zip(lines[1:], texts, strict=True)):
        number, *values = line.split()[:4]
        assert number == str(row + 1)
        np.testing.assert_allclose([float(v) for v in values], expected[row], atol=5.1e-5)
        assert line.endswith(text)


def test_info_names_sizes_and_origin(tiny_folder: Path, model: list[str]) -> None:
    out = minilm("info", *model).stdout.decode()
    for expected in (str(tiny_folder), "12 tokens", "not a model that we know", "2 of 4 heads"):
        assert expected in out


def test_info_of_the_published_model(published: Path) -> None:
    out = minilm("info", "--model", published, "--dtype", "bfloat16").stdout.decode()
    for expected in (
        "the published all-MiniLM-L6-v2",
        "53aa51172d142c89",
        "22,565,376",
        "bfloat16",
    ):
        assert expected in out


def test_truncation_is_a_line_on_standard_error(model: list[str]) -> None:
    done = minilm("encode", "-t", "dog " * 50, *model)
    assert done.returncode == 0
    assert done.stderr.decode().startswith(
        "minilm: warning: 1 of 1 texts were cut at 12 tokens; 77 % of their tokens were not read"
    )


@pytest.mark.process
def test_threads(model: list[str]) -> None:
    code = (
        "import sys, torch; from minilm import cli;"
        f"cli.main(['encode', '-t', 'a', '--threads', '1', *{model!r}]);"
        "sys.exit(torch.get_num_threads() != 1)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_closed_pipe_is_quiet(model: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "minilm", "encode", *model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"the dog\n" * 2000)  # more than a pipe holds
    process.stdin.close()
    assert process.stdout.readline().startswith(b'{"text": "the dog"')
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(600) == 0
    assert errors == b""


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="SIGINT can't be sent to one process there")
def test_interrupt_exits_with_130(model: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "minilm", "encode", *model],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    # More than a pipe holds, so that it reads standard input once this is written; without an end.
    process.stdin.write(b"the dog\n" * 20_000)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors == b"minilm: interrupted\n"


@EACH_WAY
def test_python_dash_m_and_version(run: Run) -> None:
    done = run("--version")
    assert done.stdout.decode().startswith("minilm ")
    assert done.returncode == 0


EXAMPLES = [
    (command, line.strip().removeprefix("minilm "))
    for command, text in parser._EXAMPLES.items()
    for line in re.sub(r"\s+# .*", "", text).splitlines()
    if "minilm " in line
]


@pytest.fixture
def workplace(tmp_path: Path, model: list[str]) -> Path:
    """A folder with the files that the examples speak of."""
    folder = tmp_path / "work"
    folder.mkdir()
    texts = ["the dog bites", "a cat", "the man sees the sun"]
    (folder / "sentences.txt").write_text("\n".join(texts) + "\n")
    rows = [{"id": i, "body": text, "tags": ["x"]} for i, text in enumerate(texts)]
    (folder / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "articles.csv").write_text(
        "id,body\n" + "".join(f"{r['id']},{r['body']}\n" for r in rows)
    )
    (folder / "logs").mkdir()
    (folder / "logs" / "monday.csv").write_text("id,body\n1,a cat\n2\n")
    vectors = SentenceEncoder.from_pretrained(model[1], device="cpu").encode(texts)
    np.save(folder / "other.npy", vectors)
    np.save(folder / "embeddings.npy", vectors)
    lines = "".join(
        json.dumps({"text": text, "embedding": vector.tolist()}) + "\n"
        for text, vector in zip(texts, vectors, strict=True)
    )
    (folder / "other.jsonl").write_text(lines)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=[pytest.mark.process] if name == "encode" else [])
        for name in parser._EXAMPLES
        if name not in ("download", "verify")  # which take no --model
    ],
)
def test_examples_of_the_help_run(
    command: str, workplace: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    examples = [line for name, line in EXAMPLES if name == command]
    assert examples
    for line in examples:
        text = line
        if "--against-stages" in text:  # what a port would write
            (workplace / "port.safetensors").write_bytes(
                (workplace / "golden" / "golden.float32.safetensors").read_bytes()
            )
        before, _, after = text.partition("| minilm ")
        stdin = (workplace / "sentences.txt").read_bytes() if after else b""
        words = shlex.split((after or before).split(" > ")[0])
        given = [] if words[:2] == ["index", "export"] else model  # which loads none
        done = minilm(*words, *given, stdin=stdin, cwd=workplace)
        expected = 1 if "--digest" in words else 0  # of another model than the published one
        assert done.returncode == expected, (line, done.stdout, done.stderr)


def test_every_command_has_examples_in_its_help() -> None:
    for command in filter(None, parser._EXAMPLES):
        done = minilm(command, "--help")
        assert done.returncode == 0
        assert parser._EXAMPLES[command].strip() in done.stdout.decode()
    assert "minilm encode" in minilm("--help").stdout.decode()


def test_every_path_may_begin_with_the_home(
    workplace: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell expands ~ at the start of a word only: not in --output=~/x, and not in quotes."""
    home = workplace / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(workplace)
    (home / "texts.txt").write_text("the dog\na cat\n")

    def run(*arguments: str) -> None:
        assert cli.main([*arguments, *model]) == 0

    run("encode", "~/texts.txt", "-o", "~/out.npz")
    run("encode", "~/texts.txt", "--output=~/folder")
    run("encode", "~/te*.txt", "-o", "~/pattern/")
    run("check", "~/out.npz")
    run("check", "~/folder")
    run("dedup", "~/texts.txt", "-o", "~/kept.txt")
    run("similarity", "-f", "~/texts.txt")
    run("index", "build", "~/texts.txt", "-o", "~/index")
    run("index", "search", "~/index", "the dog")
    run("explain", "a dog", "a cat", "--html", "~/pairs.html")
    made = {"out.npz", "folder", "pattern", "kept.txt", "index", "pairs.html"}
    made |= {"folder.manifest.json", "pattern.manifest.json"}
    assert {path.name for path in home.iterdir()} == made | {"texts.txt"}
    assert not list(workplace.glob("~*"))


def test_a_name_that_begins_with_a_tilde_is_no_home(
    workplace: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As editors name their backups: there is no such user."""
    monkeypatch.chdir(workplace)
    Path("~$texts.txt").write_text("the dog\na cat\n")
    assert cli.main(["encode", "~$texts.txt", "-o", "~$out.npy", *model]) == 0
    assert cli.main(["encode", "~$texts.txt", "-o", "~$folder/", *model]) == 0
    assert Path("./~$out.npy").is_file()
    assert (workplace / "~$folder" / "part-00000.parquet").is_file()


# encode: files, columns, forms


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_other_keys_stay(workplace: Path, model: list[str], loaded: SentenceEncoder) -> None:
    out = workplace / "out.jsonl"
    done = minilm("encode", workplace / "articles.jsonl", "--column", "body", "-o", out, *model)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(out)
    assert [(row["id"], row["tags"]) for row in rows] == [(0, ["x"]), (1, ["x"]), (2, ["x"])]
    expected = loaded.encode([row["body"] for row in rows])
    np.testing.assert_array_equal(
        np.array([row["embedding"] for row in rows], np.float32), expected
    )

    out = workplace / "out.csv"
    done = minilm("encode", workplace / "articles.csv", "--column", "body", "-o", out, *model)
    assert done.returncode == 0, done.stderr
    heading, *lines = csv.reader(io.StringIO(out.read_text()))
    assert heading == ["id", "body", *map(str, range(32))]
    assert [line[0] for line in lines] == ["0", "1", "2"]
    np.testing.assert_array_equal(np.array([line[2:] for line in lines], np.float32), expected)

    out = workplace / "out.npz"
    done = minilm("encode", workplace / "articles.jsonl", "--column", "body", "-o", out, *model)
    with np.load(out) as archive:
        assert json.loads(archive["rows_json"].tobytes())[1]["tags"] == ["x"]
        assert json.loads(archive["texts_json"].tobytes())[1] == "a cat"


def test_options_of_encode(workplace: Path, model: list[str], loaded: SentenceEncoder) -> None:
    texts = ["the dog " * 9, "a cat"]
    given = ["encode", *(word for text in texts for word in ("-t", text)), "-o"]
    for options, arguments in (
        (["--truncation", "chunk"], {"truncation": "chunk"}),
        (["--prompt", "the "], {"prompt": "the ", "truncation": "silent"}),
        (["--truncate-dim", "8", "--normalize"],
         {"truncate_dim": 8, "normalize_embeddings": True, "truncation": "silent"}),
        (["--precision", "binary"], {"precision": "binary", "truncation": "silent"}),
    ):  # fmt: skip
        done = minilm(*given, workplace / "out.npy", *options, *model)
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(
            np.load(workplace / "out.npy"),
            loaded.encode(texts, **arguments),
        )
    done = minilm(*given, workplace / "out.npy", "--truncation", "error", *model)
    assert done.returncode == 1
    assert b"would be cut at 12 tokens" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', "a.jsonl: line 2: text is 5, not a string"),
        ("a.jsonl", '{"text": "a"\n', "a.jsonl: line 1: is not valid JSON"),
        ("a.jsonl", '{"a": "x", "b": "y"}\n', "has no 'text'; choose with --column, of 'a', 'b'"),
        ("a.jsonl", "5\n", "a.jsonl: line 1: is neither an object nor a string"),
        ("a.csv", "a,b\n1,2\n", "a.csv: has no 'text'; choose with --column, of 'a', 'b'"),
        ("a.csv", "text,b\n1\n", "a.csv: line 2: has 1 fields, the first line 2"),
        ("a.csv", "text,text\n1,2\n", "has more than one column 'text'"),
        ("a.csv", 'text\n"a\n', "a.csv: the row that begins in line 2: "),
        ("a.csv", "", "a.csv: is empty"),
        ("a.parquet", "PAR1", "Parquet is read into a folder of Parquet files only"),
        ("a.jsonl", '{"text": "a", "embedding": 5}\n', "the rows have 'embedding' already"),
    ],
)
def test_broken_input_fails_in_one_line(
    tmp_path: Path, model: list[str], name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    done = minilm("encode", name, "-o", "out.jsonl", *model, cwd=tmp_path)
    assert done.returncode == 1
    error = done.stderr.decode()
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_forms_of_jsonl_and_csv(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"a cat"\n\n{"only": "the dog"}\n')
    (tmp_path / "b.csv").write_text('\ufeffname\n"two\nlines"\n\n', encoding="utf-8")
    table = read_table([str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")])
    assert table.texts == ["a cat", "the dog", "two\nlines"]
    assert table.rows == [{"text": "a cat"}, {"only": "the dog"}, {"name": "two\nlines"}]
    assert table.has_more


# check and the fingerprint


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_file_that_is_written_tells_its_model(
    workplace: Path, model: list[str], loaded: SentenceEncoder, suffix: str
) -> None:
    out = workplace / f"out{suffix}"
    assert minilm("encode", workplace / "sentences.txt", "-o", out, *model).returncode == 0
    assert read_fingerprint(out) == loaded.fingerprint()
    texts: list[str | Path] = ["--texts", workplace / "sentences.txt"] if suffix == ".npy" else []
    done = minilm("check", out, *texts, *model)
    assert done.returncode == 0, done.stderr
    assert re.match(r"same: equal, bit by bit.* \(3 of 3 rows checked\)\n", done.stdout.decode())


def test_check_of_other_vectors(workplace: Path, model: list[str], tmp_path: Path) -> None:
    other = write_model_folder(tmp_path / "other", seed=1)
    out = workplace / "out.npz"
    source = workplace / "sentences.txt"
    assert minilm("encode", source, "-o", out, "--model", other).returncode == 0
    done = minilm("check", out, "--json", *model)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["verdict"] == "model"
    assert found["fingerprints_agree"] is False


def test_a_folder_of_parquet_files(
    workplace: Path, model: list[str], loaded: SentenceEncoder
) -> None:
    command = ["encode", "articles.jsonl", "--column", "body", "-o", "run.2/", *model]
    command += ["--shard-rows", "2", "--precision", "float16", "--embedding-column", "v"]
    for told in ("3 rows in 2 parts", "3 rows in 2 parts, of which 2 were there"):
        done = minilm(*command, cwd=workplace)
        assert (done.returncode, done.stdout) == (0, b"")
        read = "read it by polars.read_parquet('run.2/')"
        assert done.stderr.decode().splitlines() == [f"run.2: {told}", read]
    table = pyarrow.parquet.read_table(workplace / "run.2")
    assert table["id"].to_pylist() == [0, 1, 2]
    expected = loaded.encode(table["body"].to_pylist()).astype(np.float16)
    np.testing.assert_array_equal(embeddings_of(table["v"]), expected)
    done = minilm("check", "run.2", *model, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert re.match(
        r"run\.2: 3 rows in 2 parts: all as the manifest says, by hash and number of rows\n"
        r"same: equal, bit by bit after rounding to float16 \(3 of 3 rows checked\)\n",
        done.stdout.decode(),
    )
    part = workplace / "run.2" / "part-00001.parquet"
    assert minilm("check", part, "--column", "body", *model).returncode == 0
    part.unlink()
    done = minilm("check", "run.2", "--json", *model, cwd=workplace)
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"] == ["part-00001.parquet is missing"]
    assert failed(minilm("check", workplace / "run.2", "--texts", "x", *model), 2)
    message = failed(minilm(*command, "--shard-rows", "3", cwd=workplace), 1)
    assert "run.2: holds a run with another shard_rows (2 there, 3 now)" in message
    assert minilm(*command, "--shard-rows", "3", "--overwrite", cwd=workplace).returncode == 0


def test_similarity_of_a_file(workplace: Path, model: list[str], loaded: SentenceEncoder) -> None:
    done = minilm("similarity", "a cat", "-f", workplace / "sentences.txt", "--json", *model)
    found = json.loads(done.stdout)
    assert found["texts"][:2] == ["a cat", "the dog bites"]
    vectors = loaded.encode(found["texts"])
    np.testing.assert_allclose(found["similarity"], vectors @ vectors.T, rtol=0, atol=1e-6)
    assert minilm("similarity", "a cat", *model).returncode == 2


def test_info_as_json(model: list[str], loaded: SentenceEncoder) -> None:
    found = json.loads(minilm("info", "--json", *model).stdout)
    assert found["limit"] == "12 tokens"
    assert found["fingerprint"] == loaded.fingerprint().to_dict()


def test_main_leaves_warnings_as_they_were(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    before = warnings.showwarning
    assert cli.main(["similarity", "a cat", "the dog", *model]) == 0
    assert warnings.showwarning is before
    assert "a cat" in capsys.readouterr().out


# mine, cluster, dedup


TEXTS = ["the dog bites", "a cat", "the dog bites", "the man sees the sun", "A cat!", "a cat"]


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """Texts of which some are equal, with more beside them."""
    path = tmp_path / "six.jsonl"
    rows = [{"id": i, "text": text, "ü": None} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_mine_prints_the_pairs_of_the_library(
    model: list[str], loaded: SentenceEncoder, six: Path
) -> None:
    expected = paraphrase_mining_embeddings(loaded.encode(TEXTS), max_pairs=3, top_k=4)
    done = minilm("mine", six, "--max-pairs", "3", "--top-k", "4", "--json", *model)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        {"score": score, "rows": [i, j], "texts": [TEXTS[int(i)], TEXTS[int(j)]]}
        for score, i, j in expected
    ]
    assert done.stderr == b""
    done = minilm("mine", six, "--max-pairs", "1", *model)
    assert done.stdout.decode() == " 1.0000  the dog bites\n         the dog bites\n"


def test_cluster_prints_the_groups_of_the_library(
    model: list[str], loaded: SentenceEncoder, six: Path
) -> None:
    expected = community_detection(loaded.encode(TEXTS), 0.999, 2)
    assert expected == [[0, 2], [1, 5]]
    options = ["--threshold", "0.999", "--min-size", "2", *model]
    done = minilm("cluster", six, "--json", *options)
    assert json.loads(done.stdout) == [
        {"rows": rows, "texts": [TEXTS[row] for row in rows]} for rows in expected
    ]
    done = minilm("cluster", *options, stdin="\n".join(TEXTS))
    assert done.stdout.decode() == (
        "2 texts\n  the dog bites\n  the dog bites\n2 texts\n  a cat\n  a cat\n"
    )


def test_dedup_writes_what_stays_and_says_what_goes(
    model: list[str], six: Path, tmp_path: Path
) -> None:
    options = ["--threshold", "0.999", *model]
    out = tmp_path / "kept.jsonl"
    done = minilm("dedup", six, "-o", out, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == (
        " 1.0000  the dog bites\n         the dog bites\n 1.0000  a cat\n         a cat\n"
    )
    expected = f"2 of 6 texts say the same as an earlier one; {out}: the other 4\n"
    assert done.stderr.decode() == expected
    assert read_jsonl(out) == [read_jsonl(six)[row] for row in (0, 1, 3, 4)]

    out = tmp_path / "kept.csv"
    done = minilm("dedup", six, "-o", out, "--json", *options)
    found = json.loads(done.stdout)
    assert [(each["row"], each["of"], each["texts"]) for each in found] == [
        (2, 0, ["the dog bites"] * 2), (5, 1, ["a cat"] * 2)
    ]  # fmt: skip
    rows = list(csv.reader(io.StringIO(out.read_text(encoding="utf-8"), newline="")))
    assert rows[0] == ["id", "text", "ü"]
    assert [row[:2] for row in rows[1:]] == [[str(i), TEXTS[i]] for i in (0, 1, 3, 4)]

    out = tmp_path / "kept.txt"
    minilm("dedup", "-o", out, *options, stdin="\n".join(TEXTS))
    assert out.read_text() == "".join(TEXTS[row] + "\n" for row in (0, 1, 3, 4))
    again = minilm("dedup", out, *options)
    assert again.stderr.decode() == "0 of 4 texts say the same as an earlier one\n"


def test_dedup_refuses_before_the_work(model: list[str], six: Path, tmp_path: Path) -> None:
    message = failed(minilm("dedup", six, "-o", tmp_path / "kept.npy", *model), 2)
    assert "kept.npy has no suffix of .jsonl, .csv, .txt" in message
    failed(minilm("dedup", six, "-o", tmp_path / "missing" / "kept.csv", *model), 1)
    message = failed(minilm("dedup", six, "--threshold", "nan", *model), 1)
    assert message == "minilm: threshold is nan; pass one from -1 to 1\n"


@pytest.mark.parametrize("command", ["mine", "cluster", "dedup"])
def test_tasks_on_no_text(model: list[str], command: str) -> None:
    done = minilm(command, "--json", *model)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_lines_hold_no_line_breaks(tmp_path: Path) -> None:
    table = Table(["fine", "two\nlines"], [{"text": "fine"}, {"text": "two\nlines"}])
    with pytest.raises(InputError, match="the text of row 1 has a line break"):
        write_rows(tmp_path / "out.txt", table)
    assert list(tmp_path.iterdir()) == []
    write_rows(tmp_path / "out.csv", table)
    assert read_table([str(tmp_path / "out.csv")]) == table


def test_lines_whose_text_has_different_names(model: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "r1"}\n{"id": "r2", "text": "a dog"}\n')
    done = minilm("encode", path, *model)
    assert done.returncode == 1
    assert b"line 2: has 'text', lines before it only 'id'; choose with --column" in done.stderr

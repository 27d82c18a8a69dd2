"""Files as rows: one rule for every command, and what the forms of output can hold of them."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from minilm import SentenceEncoder, cli
from minilm.errors import BadRowError, InputError
from minilm.files import tables
from minilm.files.arrow import embedding_array
from minilm.files.rows import FORMS, Reader, input_form
from minilm.files.sources import find_files, read_shards, survey
from minilm.files.tables import Table, check_rows, read_table, write_rows, write_table
from minilm.parity.check_folder import check_folder
from minilm.parity.foreign import read_texts, read_vectors

HALF = '{"text": "a", "id": "\\ud800"}\n'


def read_to_file(path: Path, column: str | None = None) -> list[str]:
    return read_table([str(path)], column).texts


def read_to_folder(path: Path, column: str | None = None) -> list[str]:
    found = find_files(path)
    layout = survey(found, column)
    return [text for shard in read_shards(found, layout, 10) for text in shard.texts]


# The roads by which a file's texts come in; each must be on the one reader.
ROADS: list[Callable[..., list[str]]] = [read_to_file, read_to_folder, read_texts]


def made(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("read", ROADS)
@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        ("a.txt", "\ufeffone\r\n\r\n two \u2028\nlast", None, ["one", "", " two \u2028", "last"]),
        ("A.TXT", "one\n", None, ["one"]),
        ("noname", '{"text": "one"}\n', None, ['{"text": "one"}']),
        ("notes.md", "one\n", "body", ["one"]),
        ("a.jsonl", '\ufeff{"text": "one"}\r\n\n  \r\n{"text": "", "n": 1}', None, ["one", ""]),
        ("a.ndjson", '{"body": "one"}\n{"n": [1], "body": "two\\n"}\n', None, ["one", "two\n"]),
        ("A.JSONL", '"one"\n"two"\n', None, ["one", "two"]),
        ("a.jsonl", '{"text": "one", "body": "two"}\n', "body", ["two"]),
        ("a.jsonl", '{"text": "\\ud83d\\ude00\\u0000"}\n', None, ["😀\0"]),
        ("A.CSV", '\ufeff\r\nid,text\r\n1,"a\r\nb"\r\n\r\n2,\r\n', None, ["a\r\nb", ""]),
        ("a.csv", 'body\n"""quoted"", too"\n', None, ['"quoted", too']),
        ("a.csv", "text\n" + "dog " * 50_000 + "\n", None, ["dog " * 50_000]),
    ],
)
def test_every_road_reads_the_same(
    tmp_path: Path,
    read: Callable[..., list[str]],
    name: str,
    content: str,
    column: str | None,
    expected: list[str],
) -> None:
    limit = csv.field_size_limit()
    assert read(made(tmp_path, name, content), column) == expected
    assert csv.field_size_limit() == limit  # which is the process's


@pytest.mark.parametrize("read", ROADS)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\none\n", r"\.tsv can't be read; convert it to one of \.jsonl, \.ndjson"),
        ("a.json", '["one"]', r"\.json can't be read"),
        ("A.JSON", '["one"]', r"\.json can't be read"),
        ("a.jsonl.gz", "one", r"\.gz can't be read"),
        ("a.jsonl~", '{"text": "one"}', r"\.jsonl~ can't be read; .* name it \.txt if every line"),
        ("a.pq", "PAR1", r"\.pq can't be read"),
        ("a.xlsx", "one", r"\.xlsx can't be read"),
        ("a.txt", b"fine\ncaf\xe9\n", "line 2 is not UTF-8"),
        ("a.txt", "one\ntwo".encode("utf-16"), "line 1 is not UTF-8"),
        ("noname", "one\ntwo".encode("utf-16-le"), "line 1 has a NUL"),
        ("a.jsonl", '{"text": "one"}\n{"text": null}\n', "line 2: text is null, not a string"),
        ("a.jsonl", '{"text": "one"}\n{"text": 5}\n', "line 2: text is 5, not a string"),
        ("a.jsonl", '{"text": "a"}\n{"id": 1}', "line 2: has no 'text'; choose with --column, of"),
        (
            "a.jsonl",
            '{"text": "one", "text": "two"}\n',
            "line 1: has the key 'text' more than once",
        ),
        ("a.jsonl", '{"text": "x", "m": {"a": 1, "a": 2}}', "line 1: has the key 'a' more than on"),
        ("a.jsonl", '{"text": "\\ud800"}\n', r"line 1: has a lone surrogate, '\\ud800', in 'text'"),
        ("a.jsonl", '{"id": "1"}\n{"text": "one"}\n', "line 2: has 'text', lines before it only"),
        ("a.jsonl", '{"text": "a", "x": ' + "[" * 300 + "]" * 300 + "}", "line 1: is nested more"),
        ("a.jsonl", "[" * 99_999, "line 1: is not valid JSON"),
        ("a.jsonl", "[\n]", "line 1: is not valid JSON"),
        ("a.csv", "text,text\n1,2\n", "has more than one column 'text'"),
        ("a.csv", "text,b\n1\n", "line 2: has 1 fields, the first line 2"),
        ("a.csv", 'text\nfine\n"a\n', "the row that begins in line 3: unexpected end of data"),
        ("a.csv", "a;text\n1;2\n", "separate columns by commas"),
        ("a.csv", b"text\n\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_every_road_refuses_the_same(
    tmp_path: Path, read: Callable[..., list[str]], name: str, content: str | bytes, message: str
) -> None:
    path = made(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_parquet_is_refused_but_into_a_folder(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "A.PARQUET")
    for read in (read_to_file, read_texts):
        with pytest.raises(InputError, match=r"read into a folder .* minilm encode -o FOLDER"):
            read(tmp_path / "A.PARQUET")
    assert read_to_folder(tmp_path / "A.PARQUET") == ["one"]


def test_forms_and_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {input_form(f"x{suffix.upper()}") for suffix in FORMS} == {
        "jsonl",
        "csv",
        "parquet",
        "text",
    }
    assert input_form("-") == "text"
    with pytest.raises(InputError, match="can be read only once"):
        read_table(["-", "-"])
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo"))  # another program's, without bytes
    assert read_table(["-"]).texts == ["one", "two"]


def test_plain_strings_bear_the_name_that_was_asked_for(tmp_path: Path) -> None:
    for name, content in (("a.txt", "one\n"), ("a.jsonl", '"one"\n')):
        table = read_table([str(made(tmp_path, name, content))], "body")
        assert table.rows == [{"body": "one"}]


# what a null text is, in a file to check


@pytest.mark.parametrize("name", ["a.jsonl", "a.npz", "a.safetensors", "a.parquet"])
def test_a_text_that_is_none_is_never_called_none(tmp_path: Path, name: str) -> None:
    vectors = np.eye(2, dtype=np.float32)
    path, as_json = tmp_path / name, json.dumps(["None", None])
    if name == "a.jsonl":
        rows = [{"text": "None", "embedding": [1, 0]}, {"text": None, "embedding": [0, 1]}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "a.npz":
        np.savez(path, embeddings=vectors, texts_json=np.frombuffer(as_json.encode(), np.uint8))
    elif name == "a.safetensors":
        safetensors.numpy.save_file({"embeddings": vectors}, path, {"texts_json": as_json})
    else:
        table = pa.table({"text": ["None", None], "embedding": embedding_array(vectors)})
        pq.write_table(table, path)
    with pytest.raises(
        InputError, match=r"(line 2: text is null|\[1\] is None|row 1: text is null)"
    ):
        read_vectors(path)


def test_a_null_in_a_folder_of_another_program(
    tiny_encoder: SentenceEncoder, tmp_path: Path
) -> None:
    vectors = embedding_array(tiny_encoder.encode(["a", "b", ""]))
    pq.write_table(pa.table({"text": ["a", "b", None], "v": vectors}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: row 2: text is null, not a string"):
        check_folder(tiny_encoder, tmp_path)
    pq.write_table(pa.table({"n": [1, 2, 3], "v": vectors}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="column 'n' holds int64, not strings"):
        check_folder(tiny_encoder, tmp_path)


# vectors beside the texts


@pytest.mark.parametrize(
    ("content", "column", "texts"),
    [
        ("id,body,2024,0,1\nr,one,7,.5,.25\n", "body", ["one"]),  # 2024 is no number of a vector
        ("body,1,0\none,.25,.5\n", None, ["one"]),  # by their names, not by their places
        ("sentence,x,y\none,.5,.25\n", None, ["one"]),  # another program's
        ("text,0,1\n" + "dog " * 50_000 + ",.5,.25\n", None, ["dog " * 50_000]),
        ('text,0,1\n"two\n\r lines",.5,.25\n', None, ["two\n\r lines"]),
    ],
)
def test_vectors_of_csv(tmp_path: Path, content: str, column: str | None, texts: list[str]) -> None:
    found = read_vectors(made(tmp_path, "A.CSV", content), column=column)
    assert found.texts == texts
    assert found.vectors.tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,body,0\n1,one,.5\n", "has no 'text'; choose with --column, of 'id', 'body'"),
        ("a.csv", "text,0\none,.5\ntwo,x\n", "line 3: could not convert string to float: 'x'"),
        ("a.csv", 'text,0\none,.5\n"two', "the row that begins in line 3: unexpected end"),
        ("a.jsonl", '"one"\n', "line 1 has no list of numbers under 'embedding'"),
        (
            "a.ndjson",
            '{"text": "a", "embedding": [1, 2]}\n{"text": "b", "embedding": [1]}',
            "line 2",
        ),
        ("a.npz", "", "is not a file of vectors"),
    ],
)
def test_broken_vectors_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_vectors(made(tmp_path, name, content))


def test_texts_that_are_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", texts=np.array([b"one"]), embeddings=np.ones((1, 2)))
    with pytest.raises(InputError, match=r"texts\[0\] is b'one', not a string"):
        read_vectors(tmp_path / "a.npz")


# what can be written


def computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SentenceEncoder.encode

    def encode(self: SentenceEncoder, sentences: Any, **options: Any) -> Any:
        assert not len(sentences), "a text was embedded"
        return whole(self, sentences, **options)

    monkeypatch.setattr(SentenceEncoder, "encode", encode)


@pytest.mark.parametrize(
    ("rows", "output", "options", "message"),
    [
        ('{"text": "a"}\n{"text": "a", "embedding": 1}\n', None, [],
         "the rows have 'embedding' already; choose another name with --embedding-column"),
        ('{"text": "a", "embedding": null}\n', "out.jsonl", [], "have 'embedding' already"),
        ('{"text": "a", "embedding": 1}\n', "out/", [], "have 'embedding' already"),
        ('{"text": "a"}\n', "out.jsonl", ["--embedding-column", "text"], "have 'text' already"),
        ('"a"\n', None, ["--embedding-column", "text"], "the rows have 'text' already"),
        ('{"text": "a", "31": 1}\n', "out.csv", [], "the rows have '31' already, which is what"),
        (HALF, "out.csv", [], r"row 0 has a lone surrogate, '\ud800', in 'id', which .csv"),
        ('{"text": "a", "\\ud800": 1}\n', "out.csv", [], "row 0 has a lone surrogate"),
        (HALF, "out/", [], r"line 1: has a lone surrogate, '\ud800', in 'id'"),
    ],
)  # fmt: skip
def test_what_a_form_can_not_hold_is_said_before_anything_is_computed(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: str,
    output: str | None,
    options: list[str],
    message: str,
) -> None:
    computes_nothing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "rows.jsonl", rows)
    words = ["encode", "rows.jsonl", *options, "--model", str(tiny_folder), "--device", "cpu"]
    assert cli.main([*words, *(["-o", output] if output else [])]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert not (tmp_path / (output or "x")).is_file()


@pytest.mark.parametrize("output", [None, "out.jsonl", "out.npz", "out.safetensors"])
def test_half_a_character_beside_the_text_stays(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "rows.jsonl", HALF + '{"text": "é", "id": "ü"}\n')
    words = ["encode", "rows.jsonl", "--model", str(tiny_folder), "--device", "cpu"]
    assert cli.main([*words, *(["-o", output] if output else [])]) == 0
    text = capsys.readouterr().out
    if output == "out.npz":
        with np.load(output) as archive:
            rows = json.loads(archive["rows_json"].tobytes())
    elif output == "out.safetensors":
        with safetensors.safe_open(output, "np") as file:
            rows = json.loads(file.metadata()["rows_json"])
    else:
        text = text or (tmp_path / "out.jsonl").read_text(encoding="utf-8")
        rows = list(map(json.loads, text.splitlines()))
    assert [row["id"] for row in rows] == ["\ud800", "ü"]
    if output:
        found = read_vectors(tmp_path / output)
        assert found.texts == ["a", "é"]


def test_texts_beyond_what_safetensors_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(['"' * 100], [{"text": '"' * 100}])
    monkeypatch.setattr(tables, "_LARGEST_HEADER", 300)  # quotes are escaped twice
    with pytest.raises(InputError, match=r"room for 300 bytes of texts, and these take \d+; write"):
        write_table(tmp_path / "a.safetensors", table, np.ones((1, 2), np.float32))
    check_rows(table, ".npz")
    monkeypatch.undo()
    write_table(tmp_path / "a.safetensors", table, np.ones((1, 2), np.float32))


def test_safetensors_has_each_text_once_and_as_it_is(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "é\ud800é", "more": "ü"}, {"text": 'a "b"\n', "id": 2}]
    path = tmp_path / "a.safetensors"
    write_table(path, Table(["é\ud800é", 'a "b"\n'], rows), np.ones((2, 2), np.float32))
    assert path.read_bytes().count("é".encode()) == 2
    with safetensors.safe_open(path, "np") as file:
        found = file.metadata()
    texts, others = json.loads(found["texts_json"]), json.loads(found["rows_json"])
    column = found["text_column"]
    assert [{**row, column: text} for row, text in zip(others, texts, strict=True)] == rows
    mixed = Table(["a", "b"], [{"text": "a"}, {"title": "b"}])  # of two files
    write_table(path, mixed, np.ones((2, 2), np.float32))
    with safetensors.safe_open(path, "np") as file:
        assert "text_column" not in file.metadata()
        assert json.loads(file.metadata()["rows_json"]) == mixed.rows


def test_what_is_written_at_last_is_kept_whatever_is_wrong_with_the_form(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("nobody thought of this")

    monkeypatch.setattr(np, "savez", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = ["encode", "-t", "a cat", "--model", str(tiny_folder), "--device", "cpu"]
    assert cli.main([*words, "-o", str(tmp_path / "x.npz")]) == 1
    [kept] = tmp_path.glob("minilm-*/embeddings.npy")
    assert capsys.readouterr().err == (
        f"minilm: {tmp_path}/x.npz: nobody thought of this; the vectors are kept in {kept}\n"
    )
    assert np.load(kept).shape == (1, 32)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_encode_wrote_can_be_checked(tmp_path: Path, suffix: str) -> None:
    texts = ["dog " * 50_000, "two\r\nlines\r", "", '"', "\0", "\ufeff", " a,b "]
    table = Table(texts, [{"id": None, "text": text} for text in texts])
    vectors = np.random.default_rng(0).normal(size=(len(texts), 3)).astype(np.float32)
    write_table(tmp_path / f"out{suffix}", table, vectors)
    limit = csv.field_size_limit()
    found = read_vectors(tmp_path / f"out{suffix}")
    assert found.texts == texts
    np.testing.assert_array_equal(found.vectors.astype(np.float32), vectors)
    assert read_to_file(tmp_path / f"out{suffix}") == texts
    assert csv.field_size_limit() == limit


def test_dedup_says_so_before_anything_is_computed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computes_nothing(monkeypatch)
    made(tmp_path, "rows.jsonl", '{"text": "two\\nlines", "id": "\\ud800"}\n')
    words = ["dedup", str(tmp_path / "rows.jsonl"), "--model", str(tiny_folder)]
    for suffix in (".txt", ".csv"):
        assert cli.main([*words, "-o", str(tmp_path / f"out{suffix}")]) == 1
    table = read_table([str(tmp_path / "rows.jsonl")])
    write_rows(tmp_path / "out.jsonl", table)
    assert read_table([str(tmp_path / "out.jsonl")]) == table
    with pytest.raises(InputError, match="the text of row 0 has a NUL"):
        write_rows(tmp_path / "out.txt", Table(["\0"], [{"text": "\0"}]))


# advice


BROKEN = {
    "none.jsonl": '{"a": "x", "b": "y"}\n',
    "late.jsonl": '{"a": "x"}\n{"a": "y", "text": "z"}\n',
    "marks.csv": "a;b\nx;y\n",
    "other.csv": "a,b\nx,y\n",
}
COMMANDS = [
    ["encode", "FILE"], ["encode", "FILE", "-o", "x.npy"], ["encode", "FILE", "-o", "folder/"],
    ["similarity", "-f", "FILE"], ["mine", "FILE"], ["cluster", "FILE"], ["dedup", "FILE"],
    ["index", "build", "FILE", "-o", "new"], ["index", "add", "index", "FILE"],
    ["index", "search", "index", "-f", "FILE"], ["check", "FILE"],
    ["check", "x.npy", "--texts", "FILE"], ["parity", "--against", "FILE"],
    ["parity", "--against", "x.npy", "--texts", "FILE"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_advice_names_options_that_the_command_has(
    command: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "a.txt", "a\n")
    model = ["--model", str(tiny_folder), "--device", "cpu"]
    if "index" in command[1:]:
        assert cli.main(["index", "build", "a.txt", "-o", "index", *model]) == 0
    np.save("x.npy", np.ones((1, 32), np.float32))
    with pytest.raises(SystemExit):
        cli.main([*command[: 2 if command[0] == "index" else 1], "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    advised = set()
    for name, content in BROKEN.items():
        made(tmp_path, name, content)
        words = [name if word == "FILE" else word for word in command]
        assert cli.main([*words, *model]) == 1
        advised |= set(re.findall(r"--[a-z-]+", capsys.readouterr().err))
    assert "--column" in advised
    assert advised <= known


def test_queries_by_the_column_that_was_asked_for(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "a.txt", "a\n")
    made(tmp_path, "q.jsonl", '{"id": "1", "q": "the dog"}\n')
    model = ["--model", str(tiny_folder), "--device", "cpu"]
    assert cli.main(["index", "build", "a.txt", "-o", "index", *model]) == 0
    search = ["index", "search", "index", "-f", "q.jsonl", "--column", "q", "--json"]
    assert cli.main([*search, *model]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["query"] == "the dog"


def test_an_index_says_before_it_computes_that_a_row_does_not_fit(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "a.txt", "a\n")
    made(tmp_path, "b.jsonl", '{"body": "x"}\n{"body": "y", "text": "z"}\n')
    model = ["--model", str(tiny_folder), "--device", "cpu"]
    assert cli.main(["index", "build", "a.txt", "-o", "index", *model]) == 0
    computes_nothing(monkeypatch)
    assert cli.main(["index", "add", "index", "b.jsonl", "--column", "body", *model]) == 1


def test_bad_rows_can_be_skipped_by_the_same_rule(tmp_path: Path) -> None:
    path = made(tmp_path, "a.jsonl", '{"text": "a", "text": "b"}\n"fine"\n{"text": null}\n')
    with pytest.raises(BadRowError, match="line 1: has the key 'text' more than once"):
        survey([path])
    layout = survey([path], None, "skip")
    assert (layout.bad, layout.rows) == (2, [3])
    reader = Reader()
    assert [row.text for row in reader.rows(str(path))] == [None, "fine", None]


HUGE = ["1e400", "-1E+400", "1" + "0" * 400 + ".0", "-1e999999999"]


@pytest.mark.parametrize("number", HUGE)
def test_a_number_beyond_float64_is_not_read_as_infinity(tmp_path: Path, number: str) -> None:
    """In a value that is only kept, too: written again it would be Infinity, which is no JSON."""
    shown = re.escape(f"has the number {number[:37]}")
    path = made(tmp_path, "a.jsonl", f'{{"text": "a", "id": 1}}\n{{"text": "b", "id": {number}}}\n')
    with pytest.raises(InputError, match=f"line 2: {shown}.*, which is beyond what float64 holds"):
        read_table([str(path)])
    vectors = {
        "v.jsonl": f'{{"text": "a", "embedding": [1.0, {number}]}}\n',
        "v.csv": f"text,0,1\na,1.0,{number}\n",
    }
    for name, content in vectors.items():
        with pytest.raises(InputError, match=f"line [12]: {shown}"):
            read_vectors(made(tmp_path, name, content))


@pytest.mark.parametrize(
    "number", ["1e308", "-1.7976931348623157e308", "1e-400", "1" + "0" * 308 + ".0"]
)
def test_a_number_that_float64_holds_is_read(tmp_path: Path, number: str) -> None:
    path = made(tmp_path, "v.jsonl", f'{{"text": "1e400", "embedding": [1.0, {number}]}}\n')
    assert read_vectors(path).vectors.tolist() == [[1.0, float(number)]]


@pytest.mark.parametrize(("name", "number"), [("v.jsonl", "Infinity"), ("v.csv", "inf")])
def test_an_infinity_that_was_written_as_one_is_read(
    tmp_path: Path, name: str, number: str
) -> None:
    rows = {
        "v.jsonl": f'{{"text": "a", "embedding": [1.0, {number}]}}\n',
        "v.csv": f"text,0,1\na,1.0,{number}\n",
    }
    assert read_vectors(made(tmp_path, name, rows[name])).vectors.tolist() == [[1.0, np.inf]]

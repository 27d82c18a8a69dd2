"""Files as rows: which, in what order, with what columns, and what is wrong with them."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minilm.errors import BadRowError, ConfigError, InputError
from minilm.files.records import read_fingerprint
from minilm.files.sources import Layout, Shard, find_files, read_shards, survey
from minilm.files.tables import read_table


def lines(path: Path, *rows: Any) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(
    files: list[Path], rows: int = 100, on_bad_row: str = "error", column: str | None = None
) -> tuple[Layout, list[Shard]]:
    layout = survey(files, column, on_bad_row)
    return layout, list(read_shards(files, layout, rows, on_bad_row))


def test_order_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.csv", "a.csv", "in/d.csv", "in/c.csv", "_x.csv", ".y.csv", ".in/z.csv", "n.md"):
        lines(tmp_path / name, "text")
    names = [str(path) for path in find_files(".")]
    assert names == ["a.csv", "b.csv", "in/c.csv", "in/d.csv"]
    assert [str(path) for path in find_files("*.csv")] == ["_x.csv", "a.csv", "b.csv"]
    assert [str(path) for path in find_files(["in", "a.csv"])] == [
        "in/c.csv",
        "in/d.csv",
        "a.csv",
    ]
    assert [str(path) for path in find_files("**/c.csv")] == ["in/c.csv"]
    lines(tmp_path / "a[1].csv", "text")  # a name, though it could be a pattern
    assert [str(path) for path in find_files("a[1].csv")] == ["a[1].csv"]


def test_files_that_are_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    lines(tmp_path / "a.csv", "text")
    lines(tmp_path / "a.jsonl", {})
    for inputs, message in (
        ([], "inputs is empty"),
        ("empty", "empty: has no file of .jsonl, .ndjson"),
        ("*.parquet", "no file matches"),
        (["a.csv", "./a.csv"], "named twice"),
        (["a.csv", "*.csv"], "named twice"),
        (".", "are not of one form"),
        ("-", "standard input: is not a file that can be read twice"),
    ):
        with pytest.raises(InputError, match=message):
            find_files(inputs)
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        find_files("none.csv")


def test_keys_of_jsonl_become_columns_of_one_type(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "n": 1, "x": 1, "flag": True, "mixed": 1, "list": [1, "é"], "none": None},
        {"text": "b", "n": 2**62, "x": 0.5, "flag": None, "mixed": "1", "huge": 2**70, "late": "y"},
        "c",
    ]
    layout, shards = read([lines(tmp_path / "a.jsonl", *rows[:2], '"c"')], rows=2)
    assert layout.columns == {
        "text": "string",
        "n": "int64",
        "x": "double",
        "flag": "bool",
        "mixed": "json",
        "list": "json",
        "none": "string",
        "huge": "json",
        "late": "string",
    }
    assert [shard.texts for shard in shards] == [["a", "b"], ["c"]]
    assert shards[0].table.schema == shards[1].table.schema
    got = pa.concat_tables([shard.table for shard in shards]).to_pydict()
    assert got["n"] == [1, 2**62, None]
    assert got["x"] == [1.0, 0.5, None]
    assert got["mixed"] == ["1", '"1"', None]  # told apart
    assert got["list"] == ['[1, "é"]', None, None]
    assert got["huge"] == [None, str(2**70), None]
    assert got["late"] == [None, "y", None]
    assert [shard.places for shard in shards] == [[(0, 1), (0, 2)], [(0, 3)]]


def test_whole_numbers_are_not_rounded(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "a", "x": 2**53 + 1}, {"text": "b", "x": 0.5})
    layout, (shard,) = read([file])
    assert layout.columns["x"] == "json"
    assert shard.table["x"].to_pylist() == [str(2**53 + 1), "0.5"]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"text": None}, "line 2: text is null, not a string"),
        ({"text": 5}, "line 2: text is 5, not a string"),
        ({"id": 1}, "line 2: has no 'text'"),
        ('{"text": "half', "line 2: is not valid JSON"),
        ("[]", "line 2: is neither an object"),
        ('{"text": "\\ud800"}', "line 2: has a lone surrogate"),
        ('{"text": "x", "id": "\\ud800"}', "line 2: has a lone surrogate"),
    ],
)
def test_bad_rows_of_jsonl(tmp_path: Path, bad: Any, problem: str) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "a", "id": 1}, bad, {"text": "é", "id": 3})
    with pytest.raises(BadRowError, match=problem) as caught:
        survey([file])
    assert caught.value.path == file
    layout, (shard,) = read([file], on_bad_row="skip")
    assert (layout.rows, layout.bad) == ([3], 1)
    assert problem in layout.examples[0]
    assert shard.texts == ["a", "é"]
    assert shard.table["text"].to_pylist() == ["a", "é"]
    assert shard.places == [(0, 1), (0, 3)]
    layout, (shard,) = read([file], on_bad_row="empty")
    assert shard.texts == ["a", "", "é"]
    assert shard.table["text"].to_pylist() == ["a", None, "é"]


def test_columns_of_csv_are_strings_in_any_order(tmp_path: Path) -> None:
    a = lines(tmp_path / "a.csv", "id,body", '01,"two', 'lines"', "2")
    b = lines(tmp_path / "b.csv", "body,id", "x,007")
    layout, (shard,) = read([a, b], column="body", on_bad_row="skip")
    assert layout.bad == 1
    assert "a.csv: line 4: has 1 fields" in layout.examples[0]
    assert shard.table.to_pydict() == {"id": ["01", "007"], "body": ["two\nlines", "x"]}
    assert shard.places == [(0, 3), (1, 2)]
    c = lines(tmp_path / "c.csv", "body,other", "x,y")
    with pytest.raises(InputError, match=r"c.csv: has the columns body, other, the first file id"):
        survey([a, c], "body", "skip")


def test_lines_of_text_blank_ones_too(tmp_path: Path) -> None:
    layout, (shard,) = read([lines(tmp_path / "a.txt", "a", "", "b")])
    assert shard.texts == ["a", "", "b"]
    assert (layout.rows, layout.characters, layout.bad) == ([3], 2, 0)


def table(**columns: Any) -> Any:
    return pa.table(columns)


def test_columns_of_parquet_keep_their_types(tmp_path: Path) -> None:
    source = pa.table(
        {
            "when": pa.array([0, 1, 2], pa.timestamp("ms", tz="UTC")),
            "text": pa.array(["a", None, "c"], pa.large_string()),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "tags": pa.array([[1], None, []], pa.list_(pa.int16())),
        }
    )
    pq.write_table(source.replace_schema_metadata({"pandas": "{}"}), tmp_path / "a.parquet")
    with pytest.raises(BadRowError, match=r"a.parquet: row 1: text is null"):
        survey([tmp_path / "a.parquet"])
    _, shards = read([tmp_path / "a.parquet"], rows=1, on_bad_row="empty")
    assert [shard.texts for shard in shards] == [["a"], [""], ["c"]]
    together = pa.concat_tables([shard.table for shard in shards])
    assert together.schema.equals(source.schema)
    assert not together.schema.metadata
    assert together.to_pydict() == source.to_pydict()


def test_parquet_files_that_do_not_fit(tmp_path: Path) -> None:
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(table(text=["a"], n=[1]), a)
    pq.write_table(table(text=["a"], n=["1"]), b)
    with pytest.raises(InputError, match=r"b.parquet: its columns differ .* 'n': string, int64"):
        survey([a, b])
    with pytest.raises(InputError, match="column 'n' holds int64, not strings"):
        survey([a], "n")
    with pytest.raises(InputError, match="has no 'body'; choose with --column, of 'text', 'n'"):
        survey([a], "body")
    b.write_bytes(a.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"b.parquet: can't be read as Parquet"):
        survey([b])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 1000])
def test_shards_have_so_many_rows(tmp_path: Path, rows: int) -> None:
    files = [
        lines(tmp_path / f"{name}.jsonl", *({"text": f"{name}{i}"} for i in range(count)))
        for name, count in (("a", 3), ("b", 0), ("c", 5))
    ]
    _, shards = read(files, rows)
    sizes = [len(shard.texts) for shard in shards]
    assert sizes[:-1] == [rows] * (len(shards) - 1)
    assert sum(sizes) == 8
    assert 1 <= sizes[-1] <= rows
    assert [shard.number for shard in shards] == list(range(len(shards)))
    joined = [text for shard in shards for text in shard.texts]
    assert joined == [f"a{i}" for i in range(3)] + [f"c{i}" for i in range(5)]
    assert all(shard.table["text"].to_pylist() == shard.texts for shard in shards)
    assert all(len(shard.places) == len(shard.texts) for shard in shards)


def test_no_rows_at_all_are_one_empty_shard(tmp_path: Path) -> None:
    layout, (shard,) = read([lines(tmp_path / "a.jsonl")])
    assert (shard.texts, shard.table.num_rows, layout.columns) == ([], 0, {"text": "string"})
    bad = lines(tmp_path / "b.jsonl", {"text": 1})
    _, (shard,) = read([bad], on_bad_row="skip")
    assert shard.table.num_rows == 0
    with pytest.raises(InputError, match="is empty; the first line names the columns"):
        survey([lines(tmp_path / "a.csv")])


def test_which_key_is_the_text(tmp_path: Path) -> None:
    only = lines(tmp_path / "only.jsonl", {"body": "x"}, {"body": "y", "id": 1})
    assert survey([only]).column == "body"
    both = lines(tmp_path / "both.jsonl", {"body": "x", "id": 1})
    with pytest.raises(BadRowError, match="line 1: has no 'text'"):
        survey([both])
    with pytest.raises(
        InputError, match="no row has 'text'; choose with --column, of 'body', 'id'"
    ):
        survey([both], None, "skip")
    assert survey([both], "body").column == "body"


def test_keys_without_end_are_an_error(tmp_path: Path) -> None:
    rows = [{"text": "x", f"key {i}": 1} for i in range(1001)]
    with pytest.raises(InputError, match=r"line 1000: makes more than 1,000 different keys"):
        survey([lines(tmp_path / "a.jsonl", *rows)])


# what a file of another make may hold


def test_columns_of_parquet_in_any_order(tmp_path: Path) -> None:
    first, second = tmp_path / "1.parquet", tmp_path / "2.parquet"
    pq.write_table(pa.table({"title": ["one"], "text": ["a dog"]}), first)
    pq.write_table(pa.table({"text": ["a cat"], "title": ["two"]}), second)
    _, [shard] = read([first, second])
    assert shard.texts == ["a dog", "a cat"]
    assert shard.table.to_pydict() == {"title": ["one", "two"], "text": ["a dog", "a cat"]}
    doubled = pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text", "text"])
    pq.write_table(doubled, second)
    with pytest.raises(InputError, match=r"2\.parquet: has more than one column 'text'"):
        read([first, second])


def test_strings_of_any_kind_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for kind in kinds:
        pq.write_table(pa.table({"text": pa.array(["a", None, "b"]).cast(kind)}), path)
        _, [shard] = read([path], on_bad_row="skip")
        assert shard.texts == ["a", "b"]


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file that can be read twice"):
        find_files(tmp_path / "pipe")


def test_other_forms_are_refused(tmp_path: Path) -> None:
    for name in ("a.json", "a.tsv", "a.jsonl.gz"):
        path = lines(tmp_path / name, "x")
        with pytest.raises(InputError, match=r"can't be read; convert it to one of \.jsonl"):
            find_files(path)
    _, [shard] = read([lines(tmp_path / "a.ndjson", {"text": "a dog"})])
    assert shard.texts == ["a dog"]


def test_a_guess_that_later_lines_contradict(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"id": "r1"}, {"id": "r2", "text": "a dog"})
    for on_bad_row in ("skip", "empty"):
        with pytest.raises(
            InputError, match=r"line 2: has 'text', lines before it only 'id'; choose"
        ):
            survey([path], None, on_bad_row)
    layout = survey([path], "text", "skip")
    assert (layout.column, layout.bad) == ("text", 1)
    assert layout.examples == [f"{path}: line 1: has no 'text'; choose with --column, of 'id'"]


def test_no_line_is_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no line is a JSON object or a string"):
        survey([lines(tmp_path / "a.jsonl", "{", "}")], None, "skip")


def test_csv_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "dog " * 50_000
    path.write_bytes(f'id,text\r\n1,"a dog\r\nruns"\r\n2,{long}\r\n'.encode())
    _, [shard] = read([path])
    assert shard.texts == ["a dog\r\nruns", long]  # what is within quotes stays as it is
    path.write_text("id;text\n1;a dog\n")
    with pytest.raises(InputError, match=r"has one column, 'id;text'; separate columns by commas"):
        read([path])
    assert read([path], column="id;text")[1][0].texts == ["1;a dog"]
    path.write_text('id,text\n1,a\n2,"b\n3,c\n')
    with pytest.raises(InputError, match=r"a\.csv: the row that begins in line 3: "):
        read([path])


def test_what_changed_between_the_readings(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "a", "n": 1})
    layout = survey([path])
    lines(path, {"text": "a", "n": "one"})
    with pytest.raises(InputError, match="'n' is not what it was at the first reading"):
        list(read_shards([path], layout, 10))


def test_the_home_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.txt").write_text("the dog\n")
    for given in ("~", "~/a.txt", "~/*.txt", Path("~/a.txt")):
        assert find_files(given) == [tmp_path / "a.txt"]
    assert read_table(["~/a.txt"]).texts == ["the dog"]
    (tmp_path / "a.npy.fingerprint.json").write_text("{")
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_fingerprint("~/a.npy")

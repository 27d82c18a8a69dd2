"""An index written as encode writes vectors, and made of such files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import load, write_model_folder
from minilm import SentenceEncoder
from minilm.cli import main
from minilm.errors import InputError
from minilm.files.records import read_fingerprint
from minilm.files.shards import manifest_path, verify_parts
from minilm.files.stored import read_vectors
from minilm.files.tables import SUFFIXES
from minilm.index import Index, exchange
from minilm.index.exchange import export_index, index_of_vectors
from minilm.parity.check_folder import check_folder

TEXTS = ["a cat", 'the "dog"', "", "the sun is out", "man"]


@pytest.fixture
def index(tiny_encoder: SentenceEncoder, tmp_path: Path) -> Index:
    """Two segments' worth of rows, with a key that not all have."""
    record = tiny_encoder.fingerprint()
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    rows[1]["more"] = "x"
    index = Index.create(tmp_path / "index", record, [(tiny_encoder.encode(TEXTS), rows)])
    index.add(tiny_encoder.encode(["the dog"]), ["the dog"], fingerprint=record)
    return index


def rows_of(index: Index) -> list[dict[str, Any]]:
    return [index.row(i) for i in range(len(index))]


@pytest.mark.parametrize("form", [*SUFFIXES, ""])
def test_there_and_back(
    tiny_encoder: SentenceEncoder, index: Index, tmp_path: Path, form: str
) -> None:
    path = tmp_path / f"out{form}"
    export_index(index, path)
    record = tiny_encoder.fingerprint()
    rows, vectors = read_vectors(path, fingerprint=record)
    np.testing.assert_array_equal(vectors, np.concatenate(index.vectors))
    if form == ".npy":
        with pytest.raises(InputError, match="has no rows; name a file that has them"):
            index_of_vectors(tmp_path / "back", path, record)
        return
    back = index_of_vectors(tmp_path / "back", path, record)
    assert back.fingerprint == index.fingerprint
    np.testing.assert_array_equal(np.concatenate(back.vectors), vectors)
    assert rows_of(back) == list(rows)
    assert [row["text"] for row in rows] == [*TEXTS, "the dog"]
    if form not in (".csv", ""):  # which have the same columns in all rows
        assert rows_of(back) == rows_of(index)


def test_a_folder_is_one_that_encode_writes(
    tiny_encoder: SentenceEncoder, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_PART_ROWS", 4)
    out = tmp_path / "out"
    export_index(index, out, embedding_column="v")
    assert sorted(path.name for path in out.iterdir()) == [
        "part-00000.parquet", "part-00001.parquet"
    ]  # fmt: skip
    assert check_folder(tiny_encoder, out).summary.endswith("all as the manifest says, by hash and "
                                                            "number of rows")  # fmt: skip
    assert pq.read_table(out)["id"].to_pylist() == [0, 1, 2, 3, 4, None]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "part-00000.parquet").unlink()
    manifest_path(out).unlink()
    export_index(index, out, embedding_column="v")  # goes on
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert verify_parts(out).problems == []
    index.add(tiny_encoder.encode(["sun"]), ["sun"], fingerprint=tiny_encoder.fingerprint())
    with pytest.raises(InputError, match="holds another run"):
        export_index(index, out, embedding_column="v")


def test_what_cannot_be_exported(
    tiny_encoder: SentenceEncoder, index: Index, tmp_path: Path
) -> None:
    empty = Index.create(tmp_path / "empty", None)
    with pytest.raises(InputError, match="is empty"):
        export_index(empty, tmp_path / "x.npz")
    with pytest.raises(InputError, match="the rows have 'more' already; choose"):
        export_index(index, tmp_path / "x", embedding_column="more")
    with pytest.raises(InputError, match="the rows have 'more' already"):
        export_index(index, tmp_path / "x.jsonl", embedding_column="more")
    record = tiny_encoder.fingerprint()
    halves = [{"text": "a", "n": "\ud800"}, {"text": "b"}]
    half = Index.create(tmp_path / "half", record, [(tiny_encoder.encode(["a", "b"]), halves)])
    with pytest.raises(InputError, match=r"surrogate.*, which Parquet can't hold; write \.jsonl"):
        export_index(half, tmp_path / "x")
    bare = Index.create(tmp_path / "bare", record, [(tiny_encoder.encode(["a"]), [{"n": 1}])])
    with pytest.raises(InputError, match=r"no row has 'text'.*write \.jsonl, which holds any rows"):
        export_index(bare, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    unknown = Index.create(tmp_path / "unknown", None, [(np.ones((1, 4)), ["a"])])
    export_index(unknown, tmp_path / "x")
    assert read_fingerprint(tmp_path / "x" / "part-00000.parquet") is None
    assert verify_parts(tmp_path / "x").problems == []


def test_vectors_of_another_model_or_of_codes(
    tiny_encoder: SentenceEncoder, index: Index, tmp_path: Path
) -> None:
    other = load(write_model_folder(tmp_path / "other", seed=1))
    export_index(index, tmp_path / "out.npz")
    with pytest.raises(InputError, match="can't be searched with vectors of"):
        index_of_vectors(tmp_path / "back", tmp_path / "out.npz", other.fingerprint())
    assert not (tmp_path / "back").exists()


def test_on_the_command_line(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_folder), "--device", "cpu"]
    lines = [json.dumps({"t": text}) + "\n" for text in TEXTS]
    Path("a.jsonl").write_text("".join(lines))
    encode = ["encode", "a.jsonl", "--column", "t"]
    assert main([*encode, "-o", "x.npy", *model]) == 0
    build = ["index", "build", "--from-vectors", "x.npy", "-o", "index", *model, "--column", "t"]
    assert main([*build, "a.jsonl"]) == 0
    capsys.readouterr()
    assert main(["index", "search", "index", "a cat", "-k", "1", *model]) == 0
    assert capsys.readouterr().out == " 1.0000  0  a cat\n"
    assert main(["index", "export", "index", "-o", "out/"]) == 0
    assert capsys.readouterr().err == "read it by polars.read_parquet('out/')\n"
    assert read_vectors("out")[0][1] == {"t": TEXTS[1]}
    Path("b.jsonl").write_text("".join(lines[:-1]))
    assert main([*build[:4], "-o", "b", *build[6:], "b.jsonl"]) == 1
    assert "holds 5 vectors, the files 4 rows" in capsys.readouterr().err
    assert main([*encode, "-o", "x.npz", "--precision", "ubinary", *model]) == 0
    assert main(["index", "build", "--from-vectors", "x.npz", "-o", "c", *model]) == 1
    assert "holds ubinary codes; an index keeps float32 vectors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["index", "export", "index", "-o", "x.txt"])

"""Files in, a folder of Parquet files out: the vectors of `encode`, however often it was killed."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from conftest import ROOT, TINY_WORDS, load, write_model_folder
from minilm import SentenceEncoder
from minilm.errors import (
    BadRowWarning,
    ConfigError,
    InputError,
    NotFiniteError,
    TruncationError,
    TruncationWarning,
    WorkerError,
)
from minilm.files import streaming
from minilm.files.arrow import embeddings_of
from minilm.files.records import read_fingerprint
from minilm.files.shards import PROGRESS, ShardFolder, manifest_path
from minilm.files.sources import read_shards
from minilm.files.streaming import FilesReport, embed, encode_files
from minilm.inference.process_pool import ProcessPool
from minilm.pretrained import options as loading


def sentences(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 15 words, some of them more than once."""
    generator = random.Random(seed)
    return [
        " ".join(generator.choices(TINY_WORDS[5:], k=generator.randrange(1, 16)))
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    texts = sentences(50)
    texts[7] = texts[3]
    return write_jsonl(
        tmp_path / "a.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)]
    )


def run(encoder: SentenceEncoder, *arguments: Any, **options: Any) -> FilesReport:
    """Warnings of truncation, which half of the texts give, are not looked at."""
    return encode_files(encoder, *arguments, **{"truncation": "silent"} | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_manifest(folder: Path) -> dict[str, bytes]:
    return contents(folder) | {"manifest": manifest_path(folder).read_bytes()}


def read(folder: Path) -> Any:
    return pyarrow.dataset.dataset(folder, format="parquet").to_table()


def test_rows_and_vectors_are_those_of_the_file(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path
) -> None:
    report = run(tiny_encoder, source, tmp_path / "out", shard_rows=16)
    assert (report.parts, report.rows, report.computed, report.bad_rows) == (4, 50, 4, 0)
    assert str(report) == f"{tmp_path / 'out'}: 50 rows in 4 parts"
    texts = sentences(50)
    texts[7] = texts[3]
    table = read(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(50))
    assert table["text"].to_pylist() == texts
    expected = tiny_encoder.encode(texts, truncation="silent")
    np.testing.assert_array_equal(embeddings_of(table["embedding"]), expected)
    assert table.schema.field("embedding").type.list_size == 32
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    assert [path.name for path in parts] == [f"part-0000{i}.parquet" for i in range(4)]
    assert [pq.read_metadata(path).num_rows for path in parts] == [16, 16, 16, 2]
    for path in parts:
        assert read_fingerprint(path) == tiny_encoder.fingerprint()
    assert len(pd.read_parquet(tmp_path / "out")) == 50
    manifest = json.loads(manifest_path(tmp_path / "out").read_text())
    assert manifest["parts"][0]["unique"] == len(set(texts[:16])) == 15
    assert manifest["rows"] == {"read": 50, "bad": 0, "written": 50}
    assert manifest["columns"] == {"id": "int64", "text": "string"}
    assert sum(part["tokens"] for part in manifest["parts"]) == report.tokens


def test_duplicates_are_computed_once(
    tiny_encoder: SentenceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[list[str]] = []

    def counted(encoder: Any, texts: list[str], options: Any) -> Any:
        computed.append(texts)
        return embed(encoder, texts, options)

    monkeypatch.setattr(streaming, "embed", counted)
    file = write_jsonl(tmp_path / "a.jsonl", ["a cat", "sun", "a cat", "a cat", "sun", "a cat"])
    run(tiny_encoder, file, tmp_path / "out", shard_rows=4)
    assert computed == [["a cat", "sun"], ["sun", "a cat"]]
    vectors = embeddings_of(read(tmp_path / "out")["embedding"])
    expected = tiny_encoder.encode(["a cat", "sun", "a cat", "a cat", "sun", "a cat"])
    np.testing.assert_array_equal(vectors, expected)


def test_auto_goes_on_as_what_it_is_here(
    tiny_folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(load(tiny_folder, dtype="auto"), source, out)  # bfloat16, as in conftest.py
    assert run(load(tiny_folder, dtype="bfloat16"), source, out).computed == 0
    monkeypatch.setattr(loading, "has_products", lambda dtype: False)
    with pytest.raises(InputError, match=r"another .*dtype \('bfloat16' there, 'float32' now\)"):
        run(load(tiny_folder, dtype="auto"), source, out)


@pytest.mark.parametrize(
    ("precision", "dtype", "width"),
    [("float32", "float32", 32), ("float16", "float16", 32), ("binary", "int8", 4),
     ("ubinary", "uint8", 4)],
)  # fmt: skip
def test_precisions(
    tiny_encoder: SentenceEncoder,
    source: Path,
    tmp_path: Path,
    precision: str,
    dtype: str,
    width: int,
) -> None:
    with (
        pytest.warns(UserWarning, match="choose 'ubinary'")
        if precision == "binary"
        else (nullcontext())
    ):
        run(tiny_encoder, source, tmp_path / "out", precision=precision, embedding_column="v")
    table = read(tmp_path / "out")
    vectors = embeddings_of(table["v"])
    assert (vectors.dtype, vectors.shape) == (np.dtype(dtype), (50, width))
    coded = "float32" if precision == "float16" else precision
    expected = tiny_encoder.encode(
        table["text"].to_pylist(), precision=coded, truncation="silent"
    ).astype(dtype)
    np.testing.assert_array_equal(vectors, expected)
    record = read_fingerprint(tmp_path / "out" / "part-00000.parquet")
    assert record == tiny_encoder.fingerprint().for_call(precision=coded)


@pytest.mark.parametrize(("precision", "size"), [("float32", 128), ("float16", 64), ("ubinary", 4)])
def test_a_disk_without_room_is_told_before_anything_is_computed(
    tiny_encoder: SentenceEncoder,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    size: int,
) -> None:
    monkeypatch.setattr(streaming, "embed", None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=9**9, free=99))
    with pytest.raises(OSError, match=f"needs {50 * size:,} bytes, and the disk .* has 99 left"):
        run(tiny_encoder, source, tmp_path / "out", precision=precision)


def test_row_numbers_go_through_all_parts(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(tiny_encoder, source, out, shard_rows=16, row_number="row")
    table = read(out)
    assert table.column_names == ["id", "text", "row", "embedding"]
    assert table.schema.field("row").equals(pa.field("row", pa.int64(), nullable=False))
    assert table["row"].to_pylist() == list(range(50))
    with pytest.raises(InputError, match=r"row_number \('row' there, None now\)"):
        run(tiny_encoder, source, out, shard_rows=16)


def test_a_column_that_the_path_overwrites_is_told(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path
) -> None:
    run(tiny_encoder, source, tmp_path / "out" / "lang=de")
    assert len(pd.read_parquet(tmp_path / "out")) == 50  # nothing of ours is in the way
    with pytest.warns(UserWarning, match="the rows have a column 'id': DuckDB") as caught:
        run(tiny_encoder, source, tmp_path / "id=5" / "b=1")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="the rows have a column 'text': DuckDB"):
        run(tiny_encoder, source, tmp_path / "Text=5")  # case doesn't count for them


def test_int8_of_the_published_model(encoder: SentenceEncoder, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    run(encoder, file, tmp_path / "out", precision="int8", shard_rows=2)
    vectors = embeddings_of(read(tmp_path / "out")["embedding"])
    expected = encoder.encode(["one", "two", "three"], precision="int8")
    np.testing.assert_array_equal(vectors, expected)


def test_options_of_encode(tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {
        "prompt": "the ",
        "truncation": "chunk",
        "truncate_dim": 8,
        "normalize_embeddings": True,
    }
    run(tiny_encoder, source, tmp_path / "out", shard_rows=7, batch_size=3, **chosen)
    table = read(tmp_path / "out")
    expected = tiny_encoder.encode(table["text"].to_pylist(), **chosen)
    np.testing.assert_array_equal(embeddings_of(table["embedding"]), expected)
    record = read_fingerprint(tmp_path / "out" / "part-00000.parquet")
    assert record == tiny_encoder.fingerprint().for_call(**chosen)


def test_one_warning_adds_up_what_was_cut(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    texts = ["a cat"] * 10 + sentences(40)  # none in the first part
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.warns(TruncationWarning) as plain:
        tiny_encoder.encode(texts)
    for _ in range(2):  # it is told of the whole when all is there, too
        with pytest.warns(TruncationWarning) as caught:
            encode_files(tiny_encoder, source, tmp_path / "out", shard_rows=8)
        assert [str(each.message) for each in caught] == [str(plain[0].message)]
        assert caught[0].filename == __file__
    with pytest.raises(
        TruncationError, match=r"a\.jsonl: line \d+: would be cut at 12 tokens"
    ) as e:
        encode_files(tiny_encoder, source, tmp_path / "new", truncation="error")
    counts = tiny_encoder.token_counts(texts)
    assert e.value.rows == [row for row, count in enumerate(counts) if count > 12]
    assert f"line {e.value.rows[0] + 1}:" in str(e.value)
    # Not even where all was done before, by somebody who did not mind.
    with pytest.raises(TruncationError, match="were cut at 12 tokens") as e:
        encode_files(tiny_encoder, source, tmp_path / "out", shard_rows=8, truncation="error")
    assert e.value.rows == [next(row for row, count in enumerate(counts) if count > 12)]


def test_bad_rows(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    rows = [{"text": "a cat", "id": 1}, {"text": None, "id": 2}, {"id": 3}, {"text": "sun"}]
    file = write_jsonl(tmp_path / "a.jsonl", [*rows, *[{"text": 5}] * 6])
    with pytest.warns(BadRowWarning) as caught:
        report = run(tiny_encoder, file, tmp_path / "skip", on_bad_row="skip")
    (warning,) = caught
    assert str(warning.message).startswith(
        f"8 of 10 rows are bad and were left out: {file}: line 2: text is null, not a string; "
    )
    assert str(warning.message).endswith("; and 3 more")
    assert (report.rows, report.bad_rows) == (2, 8)
    table = read(tmp_path / "skip")
    assert table["text"].to_pylist() == ["a cat", "sun"]
    with pytest.warns(BadRowWarning, match="read as empty texts"):
        report = run(tiny_encoder, file, tmp_path / "empty", on_bad_row="empty", shard_rows=3)
    assert (report.rows, report.bad_rows) == (10, 8)
    table = read(tmp_path / "empty")
    assert table["text"].to_pylist() == ["a cat", None, None, "sun", *[None] * 6]
    assert table["id"].to_pylist() == [1, 2, 3, *[None] * 7]
    expected = tiny_encoder.encode(["a cat", "", "", "sun", *[""] * 6])
    np.testing.assert_array_equal(embeddings_of(table["embedding"]), expected)
    manifest = json.loads(manifest_path(tmp_path / "empty").read_text())
    assert manifest["rows"] == {"read": 10, "bad": 8, "written": 10}
    with pytest.raises(InputError, match="line 2: text is null"):
        run(tiny_encoder, file, tmp_path / "error")
    assert list((tmp_path / "error").iterdir()) == []


def test_no_rows_are_an_empty_part(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    report = run(tiny_encoder, tmp_path / "a.jsonl", tmp_path / "out")
    assert (report.rows, report.parts) == (0, 1)
    table = read(tmp_path / "out")
    assert table.num_rows == 0
    assert table.schema.field("embedding").type.list_size == 32


def test_parquet_in_parquet_out(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    columns = {"text": ["a cat", "sun"], "when": pa.array([1, 2], pa.date32()), "n": [[1], [2, 3]]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "x.parquet")
    run(tiny_encoder, [tmp_path / "in"], tmp_path / "out")
    table = read(tmp_path / "out")
    assert table.drop_columns("embedding").equals(pa.table(columns))


# what is in the way


def test_another_run_is_refused(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(tiny_encoder, source, out)
    before = contents(out)
    for options, differing in (
        ({"shard_rows": 7}, r"shard_rows \(4096 there, 7 now\)"),
        ({"precision": "float16"}, r"precision \('float32' there, 'float16' now\)"),
        ({"embedding_column": "v"}, "embedding_column"),
        ({"prompt": "a "}, r"prompt \('' there, 'a ' now\)"),
        ({"on_bad_row": "skip"}, "on_bad_row"),
        ({"column": "id"}, r"column \(None there, 'id' now\)"),
    ):
        with pytest.raises(InputError, match=f"another {differing}.*pass --overwrite"):
            run(tiny_encoder, source, out, **options)
    assert run(tiny_encoder, source, out, column="text").computed == 0  # which it was
    for truncation in ("silent", "warn"):  # which change no vector
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            assert run(tiny_encoder, source, out, truncation=truncation).computed == 0
    source.rename(tmp_path / "moved.jsonl")  # nor does the name
    assert run(tiny_encoder, tmp_path / "moved.jsonl", out).computed == 0
    assert contents(out) == before
    write_jsonl(source, ["a cat"])
    with pytest.raises(InputError, match=r"another content of .*a\.jsonl"):
        run(tiny_encoder, source, out)
    with pytest.raises(InputError, match=r"another number of input files \(1 there, 2 now\)"):
        run(tiny_encoder, [source, tmp_path / "moved.jsonl"], out)
    tiny_encoder.max_seq_length = 11
    with pytest.raises(InputError, match=r"another max_seq_length \(12 there, 11 now\)"):
        run(tiny_encoder, tmp_path / "moved.jsonl", out)
    assert contents(out) == before
    report = run(tiny_encoder, source, out, overwrite=True)
    assert (report.rows, report.computed) == (1, 1)
    assert sorted(contents(out)) == ["part-00000.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir() if path != source) == [
        "moved.jsonl", "out", "out.manifest.json"
    ]  # fmt: skip


def test_a_folder_that_was_moved_without_its_manifest_gets_it_again(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(tiny_encoder, source, out, shard_rows=16)
    before = with_manifest(out)
    manifest_path(out).unlink()
    with pytest.raises(InputError, match=r"another shard_rows \(16 there, 7 now\)"):
        run(tiny_encoder, source, out, shard_rows=7)
    with pytest.raises(InputError, match="another content of the input files"):
        run(tiny_encoder, write_jsonl(tmp_path / "b.jsonl", ["a cat"]), out, shard_rows=16)
    (out / "part-00002.parquet").unlink()
    assert run(tiny_encoder, source, out, shard_rows=16).computed == 1
    assert with_manifest(out) == before


def test_a_run_that_0_1_0_began_goes_on(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "FORMAT_VERSION", 1)
        run(tiny_encoder, source, out, shard_rows=16)
    manifest_path(out).rename(out / "_manifest.json")
    (out / "part-00001.parquet").unlink()
    assert run(tiny_encoder, source, out, shard_rows=16).computed == 1
    assert len(contents(out)) == 4
    assert json.loads(manifest_path(out).read_text())["format_version"] == 1


def test_threads_that_write_one_folder_wait_for_each_other(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path
) -> None:
    def write(number: int) -> FilesReport:
        return run(tiny_encoder, source, tmp_path / "out", shard_rows=4)

    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(write, range(3)))
    assert sorted(report.computed for report in reports) == [0, 0, reports[0].parts]


def test_output_among_the_inputs_is_refused(
    tiny_encoder: SentenceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", ["a cat"])
    for inputs, output in (
        ("in", "in/out"),
        ("in", "in"),
        ("in/a.jsonl", "in"),
    ):
        with pytest.raises(InputError) as caught:
            run(tiny_encoder, inputs, output)
        assert caught.value.argument == "output"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "in"]
    # A pattern passes over it, also when the run goes on.
    for pattern, output in (("**/*.jsonl", "out"), ("*/*.jsonl", "vectors"), ("in/*", "in/x")):
        assert run(tiny_encoder, pattern, output).rows == 1
        assert run(tiny_encoder, pattern, output).computed == 0


def test_arguments_that_cannot_be_used(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path
) -> None:
    for options, message in (
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"on_bad_row": "no"}, "on_bad_row is 'no'; pass one of error, skip, empty"),
        ({"truncation": "no"}, "truncation is 'no'"),
        ({"precision": "float8"}, "precision is 'float8'; pass one of float32"),
        ({"precision": "int8"}, "this model has no fixed ranges"),
        ({"embedding_column": "id"}, "the rows have 'id' already; .* --embedding-column"),
        ({"row_number": "text"}, "the rows have 'text' already; .* --row-number"),
        ({"row_number": "embedding"}, "the rows have 'embedding' already"),
    ):
        with pytest.raises(InputError, match=message):
            run(tiny_encoder, source, tmp_path / "out", **options)


def test_numbers_that_float16_or_nothing_holds(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path
) -> None:
    huge = SentenceEncoder(
        modules=[tiny_encoder.bert, tiny_encoder.pooling],
        tokenizer=tiny_encoder.tokenizer,
        max_seq_length=12,
    )
    norm = tiny_encoder.bert.layers[-1].feed_forward_layer_norm
    norm.weight.data.mul_(1e6)  # type: ignore[operator,union-attr]
    with pytest.raises(InputError, match=r"part-00000.parquet \(.*line 1 to .*line 50\): numbers"):
        run(huge, source, tmp_path / "half", precision="float16")
    norm.weight.data.mul_(float("nan"))  # type: ignore[operator,union-attr]
    with pytest.raises(NotFiniteError, match=r"a\.jsonl: line 1; the weights have NaN"):
        run(huge, source, tmp_path / "nan")


def test_a_file_that_changes_meanwhile(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(folder: ShardFolder, *arguments: Any, **more: Any) -> Any:
        change()
        return real(folder, *arguments, **more)

    def edit() -> None:
        source.write_bytes(before.replace(b"dog", b"cat"))

    real, before = ShardFolder.add, source.read_bytes()
    monkeypatch.setattr(ShardFolder, "add", add)
    change: Any = edit
    with pytest.raises(InputError, match="was changed while it was read; the parts were removed"):
        run(tiny_encoder, source, tmp_path / "out", shard_rows=10)
    assert contents(tmp_path / "out") == {}
    source.write_bytes(before)
    change = partial(os.utime, source, (1, 1))  # touched only
    run(tiny_encoder, source, tmp_path / "out", shard_rows=10)
    assert manifest_path(tmp_path / "out").exists()


def test_rows_that_were_there_at_one_reading_only(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fewer(*arguments: Any, **options: Any) -> Any:
        yield next(real(*arguments, **options))

    real = read_shards
    monkeypatch.setattr(streaming, "read_shards", fewer)
    with pytest.raises(InputError, match=r"got 10 rows, where the first .* found 50"):
        run(tiny_encoder, source, tmp_path / "out", shard_rows=10)
    assert contents(tmp_path / "out") == {}


def test_progress_counts_tokens(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tiny_encoder, source, tmp_path / "out", shard_rows=10, show_progress_bar=True)
    shown = capsys.readouterr().err.split("\r")
    assert "Reading: 50 rows" in "".join(shown)
    assert shown[-1].startswith(f"Encoding: 100%|██████████| {report.tokens}/{report.tokens} [")
    assert "tokens/s" in shown[-1]
    run(tiny_encoder, source, tmp_path / "out", shard_rows=10)
    assert capsys.readouterr().err == ""


# killed, and continued

# In a process of its own, forked for each run, so that torch is imported once.
KILLED = """
import json, os, random, resource, shutil, signal, sys
from pathlib import Path
import pyarrow.parquet
from minilm import SentenceEncoder
from minilm.files.shards import manifest_path
from minilm.files.streaming import encode_files

model, source, place = map(Path, sys.argv[1:])
encoder = SentenceEncoder.from_pretrained(model, device="cpu")
encoder.encode("once, so that the children need not try the kernels")
counter, last = 0, None

def watch(event, arguments):
    # Dies just before the file operation of that number on what is in the output.
    global counter
    if last is None or event not in ("open", "os.rename", "os.remove", "os.mkdir"):
        return
    if not str(arguments[0]).startswith(str(place)):
        return
    if counter == last:
        os.kill(os.getpid(), signal.SIGKILL)
    counter += 1

sys.addaudithook(watch)

def child(output, stop, limit=None):
    # -> exit status, and how many operations there were
    global last
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            last = stop
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            encode_files(encoder, source, output, shard_rows=12, truncation="silent")
            status = 0
        except OSError as error:
            os.write(theirs, json.dumps([error.errno, error.filename]).encode())
            status = 3
        finally:
            os.write(theirs, b"%d" % counter if status == 0 else b"")
            os._exit(status)
    os.close(theirs)
    _, status = os.waitpid(pid, 0)
    told = os.read(ours, 1000)
    os.close(ours)
    return os.waitstatus_to_exitcode(status), told

def contents(output):
    beside = manifest_path(output)
    files = [*output.iterdir(), *([beside] if beside.exists() else [])]
    return {path.name.replace(output.name, "out"): path.read_bytes() for path in files}

status, told = child(place / "whole", 10**9)
assert status == 0
total, whole = int(told), contents(place / "whole")
generator = random.Random(0)
stops = sorted(generator.sample(range(total), min(total, 10)))
for stop in stops:
    output = place / f"killed-{stop}"
    assert child(output, stop)[0] == -9, stop
    kept = {name: data for name, data in (contents(output) if output.exists() else {}).items()
            if name.startswith("part-")}
    assert all(whole[name] == data for name, data in kept.items()), stop  # never half a part
    assert child(output, 10**9)[0] == 0, stop
    assert contents(output) == whole, stop

# Killed again and again.
output, times = place / "often", 0
while child(output, generator.randrange(4, 24))[0] == -9:
    times += 1
assert contents(output) == whole

# A file system that takes no larger file.
sizes = [len(data) for name, data in whole.items() if name.startswith("part-")]
status, told = child(place / "full", 10**9, max(sizes) - 1)
assert status == 3
number, name = json.loads(told)
assert child(place / "full", 10**9)[0] == 0
assert contents(place / "full") == whole
print(json.dumps({"total": total, "stops": stops, "times": times, "errno": number, "name": name}))
"""


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    rows: list[Any] = [{"id": i, "text": text} for i, text in enumerate(sentences(60))]
    rows[40]["more"] = random.Random(1).randbytes(4000).hex()  # a larger part
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tiny_folder, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total"] > 20
    assert found["times"] > 1
    assert (found["errno"], Path(found["name"]).name) == (27, "part-00003.parquet")  # EFBIG


class _Watched(ProcessPool):
    """Keeps what was started, for the test to kill."""

    started: list[ProcessPool] = []  # noqa: RUF012

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.started.append(self)


@pytest.mark.process
def test_workers_that_die_leave_no_trace(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_encoder, source, tmp_path / "one", shard_rows=6)
    killed: list[int] = []
    generator = random.Random(0)

    def add(folder: ShardFolder, *arguments: Any, **more: Any) -> Any:
        if len(killed) < 2:
            killed.append(generator.choice(_Watched.started[-1]["processes"]).pid)
            os.kill(killed[-1], signal.SIGKILL)
        return real(folder, *arguments, **more)

    real = ShardFolder.add
    monkeypatch.setattr(ShardFolder, "add", add)
    monkeypatch.setattr(streaming, "ProcessPool", _Watched)
    run(tiny_encoder, source, tmp_path / "two", shard_rows=6, workers=2)
    assert len(killed) == 2
    assert with_manifest(tmp_path / "two") == with_manifest(tmp_path / "one")
    assert _Watched.started[-1]["processes"] == []


@pytest.mark.process
def test_a_part_that_kills_processes_is_named(
    tiny_encoder: SentenceEncoder, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(workers: ProcessPool, function: Any, jobs: Any, attempts: int) -> Any:
        raise WorkerError(f"{list(jobs)[1].name}: 3 processes died of it")

    monkeypatch.setattr(_Watched, "answers", answers)
    monkeypatch.setattr(streaming, "ProcessPool", _Watched)
    expected = r"part-00001.parquet \(.*a.jsonl: line 21 to .*a.jsonl: line 40\): 3 processes died"
    with pytest.raises(WorkerError, match=expected):
        run(tiny_encoder, source, tmp_path / "out", shard_rows=20, workers=2)


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_interrupted_command_leaves_a_clean_state(tmp_path: Path) -> None:
    model = write_model_folder(tmp_path / "tiny")
    texts = sentences(2000)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out"
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "minilm",
        "encode",
        source,
        "-o",
        out,
        "--shard-rows",
        "10",
    ]
    command += ["--workers", "2", "--model", model, "--device", "cpu", "--truncation", "silent"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    while not list(out.glob("part-*")) and process.poll() is None:
        time.sleep(0.01)
    children = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=600)
    assert (process.returncode, error) == (130, b"minilm: interrupted\n")
    assert len(children) >= 2
    for _ in range(30_000):  # they end with it, but not at the same instant
        if not any(map(is_running, children)):
            break
        time.sleep(0.01)
    assert not any(map(is_running, children))
    assert [name for name in contents(out) if name[0] == "."] == []
    finished = (out / PROGRESS).read_bytes().count(b"\n") - 1
    assert 0 <= finished < 200
    encoder = SentenceEncoder.from_pretrained(model, device="cpu")
    report = run(encoder, source, out, shard_rows=10)
    assert report.computed == 200 - finished
    run(encoder, source, tmp_path / "whole", shard_rows=10)
    assert with_manifest(out) == with_manifest(tmp_path / "whole")


# a run whose record was damaged


def damaged_run(encoder: SentenceEncoder, folder: Path, change: Callable[[Any], object]) -> Path:
    """A run of three parts, of which the last is still to be made, with its progress changed."""
    source = write_jsonl(folder / "a.jsonl", [{"id": i, "text": "a cat"} for i in range(6)])
    out = folder / "out"
    run(encoder, source, out, shard_rows=2)
    manifest = json.loads(manifest_path(out).read_text(encoding="utf-8"))
    manifest_path(out).unlink()
    (out / "part-00002.parquet").unlink()
    lines = [manifest, *manifest.pop("parts")[:2]]
    change(lines)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / PROGRESS).write_text(text, encoding="utf-8")
    return source


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[0].pop("rows"),
        lambda lines: lines[0].update(rows=[]),
        lambda lines: lines[0].update(settings=True),
        lambda lines: lines[0].update(inputs=[[]]),
        lambda lines: lines[0].update(columns="text"),
        lambda lines: lines[0]["columns"].update(id="double"),
        lambda lines: lines[0].update(characters=None),
        lambda lines: lines[0].update(characters=99),
        lambda lines: lines[0].update(column=["text"]),
        lambda lines: lines[0]["rows"].update(written=4),
        lambda lines: lines[1].update(tokens=1),
        lambda lines: lines[2].update(cut_rows=1),
        lambda lines: lines[0]["fingerprint"].update(model="another"),
    ],
    ids=itertools.count(),
)
def test_record_of_a_run_that_was_damaged(
    tiny_encoder: SentenceEncoder, tmp_path: Path, change: Callable[[Any], object]
) -> None:
    source, out = damaged_run(tiny_encoder, tmp_path, change), tmp_path / "out"
    before = contents(out)
    with pytest.raises(ConfigError, match="is not the record of this run, or broken") as raised:
        run(tiny_encoder, source, out, shard_rows=2)
    assert raised.value.path == out / PROGRESS
    assert contents(out) == before
    assert run(tiny_encoder, source, out, shard_rows=2, overwrite=True).computed == 3
    read = pq.read_table(out).column("id").to_pylist()
    assert read == list(range(6))


@pytest.mark.parametrize(
    ("line", "old", "new", "computed"),
    [
        (0, '"rows": {"read": 6', '"rows": {"read": 7', 1),
        (0, '"characters": 30', '"characters": 31', 1),
        (0, '"model": "', '"model": "x', 1),
        (0, '"inputs": [{"name": "', '"inputs": [{"name": "x', 1),
        (0, '"bad_rows": []', '"bad_rows": ["x"]', 1),
        (0, '"crc32": ', '"crc32": 1', 1),
        (1, '"tokens": 4', '"tokens": 5', 2),
        (1, "{", "[", 2),
        (2, '"sha256": "', '"sha256": "x', 2),
    ],
    ids=itertools.count(),
)
def test_a_damaged_line_of_a_run_counts_as_not_there(
    tiny_encoder: SentenceEncoder, tmp_path: Path, line: int, old: str, new: str, computed: int
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"id": i, "text": "a cat"} for i in range(6)])
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(tiny_encoder, source, whole, shard_rows=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardFolder, "finish", lambda self: None)
        run(tiny_encoder, source, out, shard_rows=2)
    (out / "part-00002.parquet").unlink()
    lines = (out / PROGRESS).read_text(encoding="utf-8").splitlines(keepends=True)[:3]
    assert lines[line].count(old) == 1
    lines[line] = lines[line].replace(old, new)
    (out / PROGRESS).write_text("".join(lines), encoding="utf-8")
    assert run(tiny_encoder, source, out, shard_rows=2).computed == computed
    assert with_manifest(out) == with_manifest(whole)


def test_record_of_a_run_that_is_whole(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    source = damaged_run(tiny_encoder, tmp_path, lambda lines: None)
    assert run(tiny_encoder, source, tmp_path / "out", shard_rows=2).computed == 1

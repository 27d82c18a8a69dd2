"""What encode wrote, in every form and precision, read back as float32."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from conftest import load, write_model_folder
from minilm import SentenceEncoder
from minilm.cli import main
from minilm.disk import write_together
from minilm.errors import ConfigError, InputError
from minilm.files.records import read_fingerprint
from minilm.files.rows import as_json
from minilm.files.shards import PROGRESS
from minilm.files.stored import read_vectors
from minilm.files.tables import SUFFIXES, Table, write_table
from minilm.quantize import dequantize, model_ranges

ROWS = [
    {"id": 1, "text": "a cat", "tags": ["x"]},
    {"id": 2, "text": 'the "dog", é', "tags": []},
    {"id": 3, "text": "", "tags": ["y", "z"]},
]
TEXTS = [row["text"] for row in ROWS]
FORMS = [*SUFFIXES, "/"]


def encoded(form: str, folder: Path, model: Path, *options: str) -> Path:
    """Call `minilm encode`, and return what it wrote."""
    source, output = folder / "a.jsonl", folder / f"out{form}"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["encode", str(source), "-o", f"{folder}/out{form}", "--model", str(model), *options]
    assert main([*words, "--device", "cpu"]) == 0
    return output


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_vectors_of_every_form(tiny_folder: Path, tmp_path: Path, form: str) -> None:
    encoder = load(tiny_folder)
    options = ["--shard-rows", "2"] if form == "/" else []
    path = encoded(form, tmp_path, tiny_folder, *options)
    rows, vectors = read_vectors(path, fingerprint=encoder.fingerprint())
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, encoder.encode(TEXTS))
    expected: Any = ROWS
    if form == ".csv":
        expected = [{k: str(v).replace("'", '"') for k, v in r.items()} for r in ROWS]
        expected[1]["text"] = TEXTS[1]
    elif form == "/":
        expected = [row | {"tags": json.dumps(row["tags"])} for row in ROWS]
    assert list(rows) == ([0, 1, 2] if form == ".npy" else expected)
    if form in (".npy", ".safetensors"):
        assert isinstance(vectors, np.memmap)
        assert not vectors.flags.writeable


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["int8", "uint8", "ubinary", "binary"])
@pytest.mark.filterwarnings("ignore:precision is 'binary'")
def test_codes_are_decoded(
    encoder: SentenceEncoder, published: Path, tmp_path: Path, form: str, precision: str
) -> None:
    path = encoded(form, tmp_path, published, "--precision", precision, "--truncate-dim", "20")
    codes = encoder.encode(TEXTS, precision=precision, truncate_dim=20)
    ranges = model_ranges(20) if precision in ("int8", "uint8") else None
    width = None if ranges is not None else 20
    expected = dequantize(codes, precision, ranges, width=width)
    wanted = encoder.fingerprint(truncate_dim=20)
    _, vectors = read_vectors(path, fingerprint=wanted)
    np.testing.assert_array_equal(vectors, expected)
    with pytest.raises(InputError, match=r"can't be searched .* dimension: 20, 384"):
        read_vectors(path, fingerprint=encoder.fingerprint())


def test_float16_of_a_folder(tiny_folder: Path, tmp_path: Path) -> None:
    path = encoded("/", tmp_path, tiny_folder, "--precision", "float16", "--embedding-column", "v")
    _, vectors = read_vectors(path)
    expected = load(tiny_folder).encode(TEXTS).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(vectors, expected)


def test_another_model_or_none(tiny_folder: Path, tmp_path: Path) -> None:
    other = load(write_model_folder(tmp_path / "other", seed=1))
    path = encoded(".npy", tmp_path, tiny_folder)
    with pytest.raises(InputError, match="use the model that made it, or embed the texts again"):
        read_vectors(path, fingerprint=other.fingerprint())
    (tmp_path / "out.npy.fingerprint.json").unlink()
    assert read_vectors(path)[1].shape == (3, 32)
    with pytest.raises(InputError, match="has no fingerprint"):
        read_vectors(path, fingerprint=other.fingerprint())


def test_codes_that_nothing_tells_of(
    encoder: SentenceEncoder, tiny_encoder: SentenceEncoder, tmp_path: Path
) -> None:
    table = Table(["a"], [{"text": "a"}])
    codes = np.zeros((1, 32), np.int8)
    write_table(tmp_path / "x.npz", table, codes)
    with pytest.raises(InputError, match="holds int8, and no fingerprint tells"):
        read_vectors(tmp_path / "x.npz")
    record = tiny_encoder.fingerprint(precision="int8").to_json()
    write_table(tmp_path / "x.npz", table, codes, record)
    with pytest.raises(InputError, match="int8 codes of ranges of their own"):
        read_vectors(tmp_path / "x.npz")


def test_parts_of_two_models_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    path = encoded("/", tmp_path, tiny_folder)
    other = tmp_path / "b"
    other.mkdir()
    foreign = encoded("/", other, write_model_folder(tmp_path / "other", seed=1))
    (foreign / "part-00000.parquet").rename(path / "part-00001.parquet")
    with pytest.raises(InputError, match=r"part-00001\.parquet: has another fingerprint than part"):
        read_vectors(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    for name, data, message in (
        ("a.txt", b"x", "has no suffix of .npy, .npz"),
        ("a.npy", b"x", "is not a file of vectors"),
        ("a.npz", b"x", "is not a .npz file"),
        ("a.npz", b"PK\x03\x04x", "is not a .npz file"),  # and closed, else pytest complains
        ("a.safetensors", b"x", "is not a safetensors file"),
        ("a.jsonl", b'{"text": "a"}\n', "line 1 has no list of numbers 'embedding'"),
        ("a.jsonl", b"{\n", "line 1: is not valid JSON"),
        ("a.csv", b"text,0\na,x\n", "could not convert string to float"),
        ("a.parquet", b"x", "is not a Parquet file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises((InputError, ValueError), match=message):
            read_vectors(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no Parquet file in it"):
        read_vectors(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        read_vectors(tmp_path / "none.npy")


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path) as archive:
        return dict(archive)


def with_name_twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("embeddings.npy", archive.read("embeddings.npy"))


def with_another_text(path: Path) -> None:
    texts = np.frombuffer(json.dumps(["other", *TEXTS[1:]]).encode(), np.uint8)
    np.savez(path, **arrays_of(path) | {"texts_json": texts})


def with_other_metadata(path: Path, **changed: str | None) -> None:
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata() | changed
    kept = {key: value for key, value in metadata.items() if value is not None}
    tensors = safetensors.numpy.load_file(path)
    path.write_bytes(safetensors.numpy.save(tensors, kept))


@pytest.mark.parametrize(
    ("form", "damage", "message"),
    [
        (".npy", lambda path: path.write_bytes(path.read_bytes() + b"x"), "goes on behind its arr"),
        (".npz", with_name_twice, "has 'embeddings' more than once"),
        (".npz", with_another_text, "row 0 does not have the text that texts_json has"),
        (
            ".safetensors",
            lambda path: with_other_metadata(path, text_column=None),
            "row 0 does not have the text that texts_json has",
        ),
        (
            ".safetensors",
            lambda path: with_other_metadata(path, text_column="tags"),
            "its rows have 'tags' beside the texts of that name",
        ),
    ],
)
def test_files_that_contradict_themselves(
    tiny_folder: Path, tmp_path: Path, form: str, damage: Callable[[Path], None], message: str
) -> None:
    path = encoded(form, tmp_path, tiny_folder)
    (tmp_path / f"out{form}.fingerprint.json").unlink(missing_ok=True)  # says the width
    damage(path)
    with pytest.raises((InputError, ConfigError), match=message):
        read_vectors(path)


def test_rows_without_a_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a"}, {"id": 1.5}]
    for name in ("a.npz", "a.safetensors"):  # as an index exports them
        write_table(tmp_path / name, Table(["a", as_json(rows[1])], rows), np.eye(2, dtype="f4"))
        assert read_vectors(tmp_path / name)[0] == rows


def test_a_damaged_page_is_noticed(tiny_folder: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = encoded("/", tmp_path, tiny_folder) / "part-00000.parquet"
    assert read_fingerprint(path) is not None
    chunk = pq.read_metadata(path).row_group(0).column(3)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    assert pq.read_table(path).num_rows == 3  # silently
    with pytest.raises(InputError, match=r"can't be read as Parquet: .*CRC"):
        read_vectors(path)


def test_a_column_that_is_there_twice(tiny_folder: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = encoded("/", tmp_path, tiny_folder) / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("text", table.column("tags")), path)
    with pytest.raises(InputError, match="has the column 'text' more than once") as raised:
        read_vectors(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_record_is_never_that_of_an_earlier_file(tmp_path: Path) -> None:
    path, record = tmp_path / "a.npy", tmp_path / "a.npy.fingerprint.json"
    table, vectors = Table(["a"], [{"text": "a"}]), np.eye(1, dtype=np.float32)
    for given in ("{}", "{}", '{"a": 1}'):
        write_table(path, table, vectors, given)
        assert record.read_text() == f"{given}\n"
    # An error before the file is replaced leaves both.
    with pytest.raises(ZeroDivisionError):
        write_together({path: lambda file: 1 // 0}, {record: b"{}"})
    assert record.read_text() == '{"a": 1}\n'
    write_table(path, table, vectors)
    assert sorted(tmp_path.iterdir()) == [path]


def test_numbers_that_got_lost(tiny_folder: Path, tmp_path: Path) -> None:
    path = encoded(".csv", tmp_path, tiny_folder)
    path.write_text(path.read_text(encoding="utf-8").replace(",1,", ",one,", 1), encoding="utf-8")
    with pytest.raises(InputError, match=r"out\.csv.* have 1 numbers, its fingerprint says 32"):
        read_vectors(path)
    path = encoded(".jsonl", tmp_path, tiny_folder)
    lines = path.read_text(encoding="utf-8").replace('"embedding": [', '"embedding": [true, ', 1)
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(InputError, match=r"out\.jsonl: .*line 1 has true among its numbers"):
        read_vectors(path)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_folder_that_is_not_whole_is_read_with_a_warning(
    tiny_folder: Path, tmp_path: Path, manifest: bool
) -> None:
    whole = encoded("/", tmp_path, tiny_folder, "--shard-rows", "1")
    read_vectors(whole)
    if not manifest:
        (tmp_path / "out.manifest.json").unlink()
        read_vectors(whole)
    first, *_, last = sorted(whole.iterdir())
    again = whole / "part-00007.parquet"
    shutil.copy(last, again)
    with pytest.warns(UserWarning, match="out: has more than its run: part-00007.parquet; what is"):
        assert len(read_vectors(whole)[0]) == 4
    again.unlink()
    first.unlink()
    with pytest.warns(UserWarning, match="out: has lost part-00000.parquet; what is there is read"):
        rows, vectors = read_vectors(whole)
    assert [row["id"] for row in rows] == [2, 3]
    assert len(vectors) == 2
    if manifest:
        (tmp_path / "out.manifest.json").unlink()
    (whole / PROGRESS).write_text(json.dumps({"settings": {}}) + "\n")
    with pytest.warns(UserWarning, match="out: is not complete; run the command that writes it"):
        read_vectors(whole)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.jsonl", '{"text": "a", "embedding": [1, 2]}\n{"text": "b", "embedding": [1e39, 2]}\n'),
        ("a.csv", "text,0,1\na,1,2\nb,inf,2\n"),
    ],
)
def test_numbers_that_are_not_finite(tmp_path: Path, name: str, contents: str) -> None:
    path = tmp_path / name
    path.write_text(contents)
    with pytest.raises(InputError, match=f"{name}: has NaN or infinity in the vector of row 1"):
        read_vectors(path)


def test_what_is_not_there_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*nothing"):
        read_vectors(tmp_path / "nothing")
    path = encoded("/", tmp_path, tiny_folder)
    with pytest.raises(InputError, match=r"part-00000.parquet: has no column 'vector'"):
        read_vectors(path, embedding_column="vector")
    ragged = tmp_path / "a.jsonl"
    ragged.write_text('{"text": "", "embedding": [1, 2]}\n{"text": "", "embedding": [1]}\n')
    with pytest.raises(InputError, match="line 2 has 1 numbers, the first 2"):
        read_vectors(ragged)

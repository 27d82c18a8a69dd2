import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT, another_process
from minilm import SentenceEncoder, cli
from minilm.errors import ConfigError, InputError, InputTypeError
from minilm.files.tables import Table, read_table
from minilm.index import Index, segments
from minilm.index import index as index_module
from minilm.index import texts as index_texts
from minilm.pretrained.fingerprint import Fingerprint
from minilm.pretrained.hub import SHA256
from minilm.tasks import quantized_search, semantic_search
from minilm.tasks.search import LONGEST, Best

Array = np.ndarray[Any, Any]

MODEL = Fingerprint(
    model="a model",
    weights_sha256="1" * 64,
    tensors_sha256="2" * 64,
    tokenizer_sha256="3" * 64,
    architecture="bert, 2 layers of 4 heads, eps 1e-12",
    pooling="mean",
    normalize=True,
    max_seq_length=12,
    dimension=16,
    dtype="float32",
)


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def texts(count: int, start: int = 0) -> list[str]:
    return [f"text {i}" for i in range(start, start + count)]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Five rows of width 16."""
    return Index.create(tmp_path / "index", MODEL, [(random(0, 5, 16), texts(5))])


def found(index: Index, queries: Array, top_k: int = 3, **options: Any) -> list[Any]:
    return index.search(queries, top_k, fingerprint=index.fingerprint, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# building, adding, searching


def test_by_hand(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", None)
    assert len(index) == 0
    assert index.dimension is None
    index.add([[3.0, 4.0], [0.0, 2.0]], ["one", {"text": "two", "n": [1, None]}], fingerprint=None)
    assert len(index) == 2
    assert Index.open(index.folder).dimension == 2
    [hits] = index.search([0.0, 1.0], fingerprint=None)
    assert hits == [
        {"corpus_id": 1, "score": 1.0, "row": {"text": "two", "n": [1, None]}},
        {"corpus_id": 0, "score": pytest.approx(0.8), "row": {"text": "one"}},
    ]
    assert names(index.folder) == ["index.json", "segment-00000"]
    assert names(index.folder / "segment-00000") == [
        "lengths.npy", "offsets.npy", "rows.jsonl", "vectors.npy",
    ]  # fmt: skip
    np.testing.assert_array_equal(
        np.load(index.folder / "segment-00000" / "vectors.npy"), [[3, 4], [0, 2]]
    )
    assert (index.folder / "segment-00000" / "rows.jsonl").read_text() == (
        '{"text": "one"}\n{"text": "two", "n": [1, null]}\n'
    )


def test_what_was_added_in_parts_is_found_as_if_at_once(tmp_path: Path) -> None:
    vectors = random(1, 300, 16)[np.random.default_rng(2).integers(0, 300, 300)]  # many equal
    queries = random(3, 30, 16)
    whole = Index.create(tmp_path / "whole", MODEL, [(vectors, texts(300))])
    parts = Index.create(tmp_path / "parts", MODEL)
    ends = [0, 150, 220, 221, 222, 230, 250, 290, 300]
    for start, end in pairwise(ends):
        parts.add(vectors[start:end], texts(end - start, start), fingerprint=MODEL)
    assert [segment.count for segment in parts._segments] == [150, 140, 10]
    assert [parts.row(i) for i in range(300)] == [{"text": text} for text in texts(300)]
    np.testing.assert_array_equal(np.concatenate(parts.vectors), vectors)
    np.testing.assert_array_equal([parts.vector(i) for i in range(300)], vectors)
    expected = [
        [hit | {"row": whole.row(int(hit["corpus_id"]))} for hit in hits]
        for hits in semantic_search(queries, vectors, top_k=7)
    ]
    assert found(whole, queries, 7) == expected
    assert found(parts, queries, 7) == expected
    assert found(Index.open(tmp_path / "parts"), queries, 7) == expected
    parts.verify()


def test_ties_go_to_the_smaller_row_across_segments(tmp_path: Path) -> None:
    vector = random(4, 1, 16)
    index = Index.create(tmp_path / "index", MODEL, [(np.tile(vector, (9, 1)), texts(9))])
    index.add(np.tile(vector, (5, 1)), texts(5), fingerprint=MODEL)
    assert len(index._segments) == 2
    [hits] = found(index, vector, 11)
    assert [hit["corpus_id"] for hit in hits] == list(range(11))
    assert len({hit["score"] for hit in hits}) == 1


def test_one_by_one_leaves_few_segments(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", MODEL)
    vectors = random(5, 70, 16)
    for i in range(70):
        index.add(vectors[i : i + 1], [f"text {i}"], fingerprint=MODEL)
        assert len(index._segments) <= 7
    assert [segment.count for segment in index._segments] == [64, 4, 2]
    assert len(names(index.folder)) == 1 + 3  # what became part of others is gone
    np.testing.assert_array_equal(np.concatenate(index.vectors), vectors)
    assert [index.row(i)["text"] for i in range(70)] == texts(70)


def test_long_segments_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_SMALL", 4)
    index = Index.create(tmp_path / "index", MODEL)
    for i in range(3):
        index.add(random(i, 5, 16), texts(5), fingerprint=MODEL)
    assert [segment.count for segment in index._segments] == [5, 5, 5]


def test_blocks_are_taken_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def blocks() -> Iterator[tuple[Array, list[str]]]:
        for i in range(5):
            [part] = tmp_path.glob("index/.segment-*.part") if i > 1 else [tmp_path]
            alive.append(sum(path.stat().st_size for path in part.iterdir() if path.is_file()))
            yield random(i, 1000, 16), texts(1000, 1000 * i)

    index = Index.create(tmp_path / "index", MODEL, blocks())
    assert len(index) == 5000
    assert len(index._segments) == 1
    assert alive[2:] == sorted(alive[2:])  # written while they come
    assert alive[3] > 3 * 60_000
    assert index.row(4321) == {"text": "text 4321"}


@pytest.mark.parametrize(
    "text",
    ["", "日本 é\u0301", "two\nlines\r\n", "\u2028\u2029\x85", "😀", '"\\', "\ud800 half", "\0"],
)
def test_rows_come_back_as_they_were(tmp_path: Path, text: str) -> None:
    row = {"id": 7, "id ": text, text: None, "nested": {"a": [1.5, True, text]}, "text": text}
    index = Index.create(tmp_path / "index", None, [(random(0, 3, 4), [text, row, text])])
    assert [index.row(i) for i in range(3)] == [{"text": text}, row, {"text": text}]
    assert Index.open(index.folder).row(1) == row


def test_ids_of_rows_need_not_be_unique(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}]
    index = Index.create(tmp_path / "index", None, [(np.eye(2), rows)])
    [hits] = index.search([0.0, 1.0], fingerprint=None)
    assert [(hit["corpus_id"], hit["row"]) for hit in hits] == [(1, rows[1]), (0, rows[0])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_are_kept_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    vectors = torch.from_numpy(random(0, 4, 16)).to(dtype)
    index = Index.create(tmp_path / "index", None, [(vectors, texts(4))])
    np.testing.assert_array_equal(index.vectors[0], vectors.float().numpy())
    assert index.vectors[0].dtype == np.float32
    assert not index.vectors[0].flags.writeable


def test_another_name_for_the_text(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", None, [(np.eye(2), ["a", "b"])], column="body")
    assert (Index.open(index.folder).column, index.row(0)) == ("body", {"body": "a"})


def test_empty_indexes_and_queries(tmp_path: Path, index: Index) -> None:
    empty = Index.create(tmp_path / "empty", MODEL)
    assert Index.open(empty.folder).search(np.ones((2, 16)), fingerprint=MODEL) == [[], []]
    empty.add(np.empty((0, 16)), [], fingerprint=MODEL)
    empty.extend([], fingerprint=MODEL)
    assert names(empty.folder) == ["index.json"]
    assert found(index, np.empty((0, 16))) == []
    assert len(found(index, np.ones(16), 99)[0]) == 5
    assert repr(empty).startswith(f"Index({str(empty.folder)!r}: 0 rows of a model (")


def test_lengths_that_are_not_one(tmp_path: Path) -> None:
    vectors = random(6, 500, 16) * np.geomspace(1e-26, 1e20, 500, dtype=np.float32)[:, None]
    vectors[100] = 0
    index = Index.create(tmp_path / "index", None, [(vectors, texts(500))])
    queries = random(7, 20, 16)
    wide = semantic_search(queries.astype(np.float64), vectors.astype(np.float64), top_k=20)
    expected = [
        [(hit["corpus_id"], float(np.float32(hit["score"]))) for hit in hits] for hits in wide
    ]
    for results in (
        index.search(queries, 20, fingerprint=None),
        semantic_search(queries, vectors, top_k=20),
    ):
        assert [[(hit["corpus_id"], hit["score"]) for hit in hits] for hits in results] == expected


# codes


def test_search_by_codes(tmp_path: Path) -> None:
    published = replace(
        MODEL, weights_sha256=SHA256["model.safetensors"], dimension=384, max_seq_length=256
    )
    vectors = random(8, 250, 384)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[::50] + random(9, 5, 384) * np.float32(0.05)
    index = Index.create(tmp_path / "index", published, codes=["int8", "binary"])
    for start, end in ((0, 120), (120, 190), (190, 250)):
        index.add(vectors[start:end], texts(end - start, start), fingerprint=published)
    assert len(index._segments) == 3
    index = Index.open(index.folder)
    assert index.codes == ("int8", "binary")
    for precision in index.codes:
        codes = np.concatenate([segment.codes[precision] for segment in index._segments])
        for multiplier in (1, 3, 100):
            results = found(index, queries, 5, precision=precision, rescore_multiplier=multiplier)
            expected = quantized_search(
                queries, codes, precision, 5, rescore_embeddings=vectors,
                rescore_multiplier=multiplier,
            )  # fmt: skip
            assert [
                [{"corpus_id": hit["corpus_id"], "score": hit["score"]} for hit in hits]
                for hits in results
            ] == expected
            assert results[1][0]["row"] == {"text": "text 50"}
    assert results == found(index, queries, 5)


def test_codes_that_are_not_there(tmp_path: Path, index: Index) -> None:
    with pytest.raises(InputError, match=r"has codes of no kind; create it with codes=\['int8'\]"):
        found(index, np.ones(16), precision="int8")
    with pytest.raises(InputError, match="precision"):
        found(index, np.ones(16), precision="uint8")
    for codes in (["int8"], ["nonsense"]):
        with pytest.raises(InputError) as raised:
            Index.create(tmp_path / "new", MODEL, codes=codes)
        assert raised.value.argument == "codes"
    assert not (tmp_path / "new").exists()


# which model


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weights_sha256": "4" * 64, "tensors_sha256": "5" * 64, "model": "other"}, "weights"),
        ({"max_seq_length": 20}, "max_seq_length: 12, not 20"),
        ({"tokenizer_sha256": "6" * 64}, "tokenizer_sha256"),
        ({"precision": "int8"}, "precision: 'float32', not 'int8'"),
        ({"normalize": False}, "normalize"),
    ],
)
def test_another_model_is_refused(index: Index, changes: dict[str, Any], field: str) -> None:
    other = replace(MODEL, **changes)
    for call in (
        lambda: index.add(np.ones((1, 16)), ["a"], fingerprint=other),
        lambda: index.search(np.ones(16), fingerprint=other),
    ):
        with pytest.raises(InputError, match=field) as raised:
            call()
        assert raised.value.argument == "fingerprint"
        assert str(other) in str(raised.value)
        assert str(MODEL) in str(raised.value)
        assert "build another index" in str(raised.value)
    assert len(Index.open(index.folder)) == 5


def test_what_only_rounds_is_the_same_model(index: Index) -> None:
    other = replace(MODEL, dtype="bfloat16", package_version="99", model="renamed")
    index.add(np.ones((1, 16)), ["a"], fingerprint=other)
    assert len(index.search(np.ones(16), fingerprint=other)[0]) == 6


def test_queries_may_have_a_prompt_of_their_own(tmp_path: Path) -> None:
    passage = MODEL.for_call(prompt="passage: ", truncation="chunk")
    index = Index.create(tmp_path / "index", passage, [(random(0, 2, 16), texts(2))])
    assert index.search(np.ones(16), fingerprint=MODEL.for_call(prompt="query: "))
    for other in (MODEL.for_call(prompt="query: ", truncation="chunk"), MODEL):
        with pytest.raises(InputError, match="prompt: 'passage: ', not"):
            index.add(np.ones((1, 16)), ["a"], fingerprint=other)


def test_an_unknown_model_goes_with_an_unknown_model_only(tmp_path: Path, index: Index) -> None:
    unknown = Index.create(tmp_path / "unknown", None, [(np.ones((1, 16)), ["a"])])
    for one, fingerprint in ((unknown, MODEL), (index, None)):
        with pytest.raises(InputError, match="fingerprint is"):
            one.search(np.ones(16), fingerprint=fingerprint)
        with pytest.raises(InputError, match="fingerprint is"):
            one.add(np.ones((1, 16)), ["a"], fingerprint=fingerprint)
    with pytest.raises(InputTypeError, match=r"encoder\.fingerprint\(\)"):
        index.search(np.ones(16), fingerprint={"model": "x"})  # type: ignore[arg-type]


# errors of arguments


@pytest.mark.parametrize(
    ("embeddings", "rows", "error", "argument"),
    [
        (np.ones((1, 15)), ["a"], InputError, "embeddings"),
        (np.ones((2, 16)), ["a"], InputError, "rows"),
        (np.ones((1, 16)), [], InputError, "rows"),
        (np.empty((0, 16)), ["a"], InputError, "rows"),
        (np.ones((1, 16)), "a", InputTypeError, "rows"),
        (np.ones((1, 16)), [5], InputTypeError, "rows[0]"),
        (np.ones((2, 16)), ["a", {"x": object()}], InputTypeError, "rows[1]"),
        (np.ones((1, 16), np.int8), ["a"], InputTypeError, "embeddings"),
        (np.array([[1.0] * 16, [np.nan] * 16]), ["a", "b"], InputError, "embeddings[1]"),
        (np.full((1, 16), 1e300), ["a"], InputError, "embeddings[0]"),  # infinite in float32
        ("text", ["a"], InputTypeError, "embeddings"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_wrong_additions_change_nothing(
    index: Index, embeddings: Any, rows: Any, error: type[InputError], argument: str
) -> None:
    before = (index.folder / "index.json").read_bytes()
    good = (random(1, 3, 16), texts(3))
    for blocks in ([(embeddings, rows)], [good, (embeddings, rows)]):
        with pytest.raises(error, match=re.escape(argument)) as raised:
            index.extend(blocks, fingerprint=MODEL)
        assert raised.value.argument == argument
        assert (index.folder / "index.json").read_bytes() == before
        assert names(index.folder) == ["index.json", "segment-00000"]
    assert len(found(index, np.ones(16), 9)[0]) == 5


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"query_embeddings": np.ones(15)}, InputError, "query_embeddings"),
        ({"query_embeddings": np.ones(16, np.uint8)}, InputTypeError, "query_embeddings"),
        ({"query_embeddings": [[np.nan] * 16]}, InputError, "query_embeddings[0]"),
        ({"top_k": 0}, InputError, "top_k"),
        ({"rescore_multiplier": "4"}, InputTypeError, "rescore_multiplier"),
    ],
)
def test_wrong_searches(
    index: Index, options: dict[str, Any], error: type[InputError], argument: str
) -> None:
    defaults: dict[str, Any] = {"query_embeddings": np.ones(16), "fingerprint": MODEL}
    with pytest.raises(error, match=re.escape(argument)) as raised:
        index.search(**(defaults | options))
    assert raised.value.argument == argument


@pytest.mark.parametrize("i", [-1, 5])
def test_rows_that_are_not_there(index: Index, i: int) -> None:
    with pytest.raises(InputError, match=f"i is {i}; the index has 5 rows"):
        index.row(i)
    with pytest.raises(InputError):
        index.vector(i)


def test_create_takes_no_folder_with_something_in_it(tmp_path: Path, index: Index) -> None:
    with pytest.raises(InputError, match="has an index in it already"):
        Index.create(index.folder, MODEL)
    assert len(Index.open(index.folder)) == 5
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="has 'file' in it already"):
        Index.create(tmp_path / "full", MODEL)
    with pytest.raises(FileNotFoundError):
        Index.create(tmp_path / "missing" / "index", MODEL)
    (tmp_path / "empty").mkdir()
    assert len(Index.create(tmp_path / "empty", MODEL)) == 0


def test_create_is_all_or_nothing(tmp_path: Path) -> None:
    def blocks() -> Iterator[tuple[Array, Sequence[str]]]:
        yield random(0, 3, 16), texts(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Index.create(tmp_path / "index", MODEL, blocks())
    with pytest.raises(InputError, match="is not an index"):
        Index.open(tmp_path / "index")
    index = Index.create(tmp_path / "index", MODEL, [(random(0, 3, 16), texts(3))])
    assert names(index.folder) == ["index.json", "segment-00000"]


# damage


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "index.json").read_text())
        change(values)
        (folder / "index.json").write_text(json.dumps(values))

    return edit


def overwritten(name: str, contents: bytes) -> Callable[[Path], None]:
    def overwrite(folder: Path) -> None:
        (folder / name).write_bytes(contents)

    return overwrite


def truncated(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def with_a_key_twice(folder: Path) -> None:
    path = folder / "index.json"
    text = path.read_text().replace('"column"', '"column": "other", "column"', 1)
    path.write_text(text)


@pytest.mark.parametrize("line", [b'["id", "text"]', b"{" * 14, b'[["a", 1]]    ', b"7", b"[" * 14])
def test_row_that_is_no_object(index: Index, line: bytes) -> None:
    path = index.folder / "segment-00000" / "rows.jsonl"
    before = path.read_bytes()
    path.write_bytes(line.ljust(before.index(b"\n")) + before[before.index(b"\n") :])
    with pytest.raises(ConfigError, match=r"rows\.jsonl: line 1 is broken"):
        Index.open(index.folder).row(0)


def test_damage_is_not_merged_into_a_whole_segment(index: Index) -> None:
    path = index.folder / "segment-00000" / "vectors.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = (index.folder / "index.json").read_bytes()
    damaged = Index.open(index.folder)
    with pytest.raises(ConfigError, match=r"segment-00000/vectors\.npy has SHA-256"):
        damaged.add(random(1, 6, 16), texts(6), fingerprint=MODEL)
    assert (index.folder / "index.json").read_bytes() == before
    assert names(index.folder) == ["index.json", "segment-00000"]


def without_files(folder: Path) -> None:
    edited(lambda values: values["segments"][0]["files"].clear())(folder)
    (folder / "segment-00000/vectors.npy").unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "leads outside the folder")
            for name in ("../outside", "/outside", "..\\outside", "C:outside")
        ),
        ("x" * 300, "is too long for a file"),
        ("\ud800", "is no Unicode text"),
    ],
)
@pytest.mark.parametrize("of", ["segment", "file"])
def test_names_that_no_file_inside_has_are_refused(
    index: Index, tmp_path: Path, of: str, name: str, message: str
) -> None:
    shutil.copytree(index.folder / "segment-00000", tmp_path / "outside")
    with (index.folder / "index.json").open() as file:
        values = json.load(file)
    [segment] = values["segments"]
    if of == "segment":
        segment["name"] = name
    else:
        segment["files"][name] = segment["files"].pop("vectors.npy")
    (index.folder / "index.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as raised:
        Index.open(index.folder)
    assert raised.value.path == index.folder / "index.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overwritten("index.json", b""), "index.json: is broken"),
        (overwritten("index.json", b"[]"), "is not of an index"),
        (overwritten("index.json", b'{"format": "other"}'), "is not of an index"),
        (edited(lambda v: v.update(format_version=2)), "format 2, this package reads 1"),
        (edited(lambda v: v.pop("segments")), "'segments' is missing"),
        (edited(lambda v: v["segments"][0].pop("rows")), "'rows' is missing"),
        (edited(lambda v: v["segments"][0].update(rows="5")), "'5' is not of type int"),
        (edited(lambda v: v["fingerprint"].pop("pooling")), "pooling is missing"),
        (edited(lambda v: v.update(dimension=15)), "vectors.npy: holds float32 [5, 16], not"),
        (edited(lambda v: v["segments"][0].update(rows=4)), "holds float32 [5, 16], not"),
        (without_files, "segment-00000 lists other files than it should have: lengths.npy"),
        (edited(lambda v: v["codes"].append("binary")), "it should have: binary.npy"),
        (edited(lambda v: v["segments"][0].update(name="other")), "not the name of a segment"),
        (edited(lambda v: v["segments"].append(v["segments"][0])), "are not numbered one after"),
        (edited(lambda v: v.update(next_segment=0)), "are not numbered one after"),
        (edited(lambda v: v.update(segments=[])), "are not numbered one after"),
        (with_a_key_twice, "has the key 'column' more than once"),
        (lambda folder: shutil.rmtree(folder / "segment-00000"), "rows.jsonl is missing"),
        (lambda folder: (folder / "segment-00000/rows.jsonl").unlink(), "rows.jsonl is missing"),
        (truncated("segment-00000/vectors.npy"), "vectors.npy has 447 bytes, not 448"),
        (truncated("segment-00000/rows.jsonl"), "rows.jsonl has 94 bytes, not 95"),
        (overwritten("segment-00000/offsets.npy", b"x" * 176), "offsets.npy: is not a .npy file"),
    ],
)
def test_damage_is_named(index: Index, damage: Callable[[Path], None], message: str) -> None:
    damage(index.folder)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        Index.open(index.folder)
    assert str(index.folder) in str(raised.value)


def test_every_missing_file_is_listed(index: Index) -> None:
    (index.folder / "segment-00000/rows.jsonl").unlink()
    (index.folder / "segment-00000/lengths.npy").unlink()
    with pytest.raises(ConfigError) as raised:
        Index.open(index.folder)
    assert len(raised.value.problems) == 2


def test_verify_reads_every_byte(index: Index) -> None:
    index.verify()
    for name in ("vectors.npy", "rows.jsonl", "offsets.npy", "lengths.npy"):
        path = index.folder / "segment-00000" / name
        contents = bytearray(path.read_bytes())
        contents[-3] ^= 1
        path.write_bytes(contents)
        with pytest.raises(ConfigError, match=f"{name} has SHA-256") as raised:
            Index.open(index.folder).verify()
        assert len(raised.value.problems) == 1
        contents[-3] ^= 1
        path.write_bytes(contents)
    index.verify()


def test_a_broken_row_is_named(index: Index) -> None:
    path = index.folder / "segment-00000" / "rows.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"text 3"', b'"text 3\t'))
    with pytest.raises(ConfigError, match="line 4 is broken"):
        Index.open(index.folder).row(3)


def test_no_index(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"is not an index, it has no index\.json") as raised:
            Index.open(folder)
        assert raised.value.argument == "folder"


# several processes, and their ends


class Killed(BaseException):
    """What a process feels of kill -9: nothing more happens."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("added", [2, 9])  # a new segment, and one that the old becomes part of
def test_killed_at_any_step(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch, added: int, after: bool
) -> None:
    queries = random(20, 4, 16)
    more = random(21, added, 16)
    old = found(index, queries, 20)
    with_more = Index.create(
        tmp_path / "whole", MODEL, [(np.concatenate([*index.vectors, more]), texts(5 + added))]
    )
    new = found(with_more, queries, 20)
    steps, dead, last = 0, False, -1

    def step(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal steps, dead
            if dead:
                raise Killed
            steps += 1
            if steps == last and not after:
                dead = True
                raise Killed
            result = function(*arguments, **options)
            if steps == last:
                dead = True
                if hasattr(result, "close"):
                    result.close()
                raise Killed
            return result

        return counted

    outcomes = []
    for last in range(1, 100):
        folder = tmp_path / f"copy {last}"
        shutil.copytree(index.folder, folder)
        copy = Index.open(folder)
        steps, dead = 0, False
        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "fsync"), (os, "open"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"),
                (Path, "unlink"), (Path, "open"), (shutil, "rmtree"), (np, "cumsum"),
            ):  # fmt: skip
                patch.setattr(owner, name, step(getattr(owner, name)))
            try:
                copy.add(more, texts(added, 5), fingerprint=MODEL)
            except Killed:
                pass
            else:
                break
        left = Index.open(folder)
        left.verify()
        outcomes.append(len(left))
        assert found(left, queries, 20) == (new if len(left) > 5 else old)
        if len(left) == 5:
            left.add(more, texts(added, 5), fingerprint=MODEL)
            assert found(left, queries, 20) == new
        else:
            left.add(random(22, 1, 16), ["one more"], fingerprint=MODEL)
        known = {segment.entry.name for segment in left._segments}
        assert set(names(folder)) == {"index.json", *known}
    assert len(outcomes) > 15
    assert outcomes == sorted(outcomes)  # first the old index, then the new one
    assert set(outcomes) == {5, 5 + added}


def test_a_reader_goes_on_with_what_it_opened(index: Index) -> None:
    queries = random(23, 3, 16)
    reader = Index.open(index.folder)
    before = found(reader, queries, 20)
    index.add(random(24, 40, 16), texts(40, 5), fingerprint=MODEL)
    assert names(index.folder) == ["index.json", "segment-00001"]
    assert found(reader, queries, 20) == before
    assert len(reader) == 5
    assert found(Index.open(index.folder), queries, 20) == found(index, queries, 20) != before
    reader.add(random(25, 1, 16), ["late"], fingerprint=MODEL)  # behind what the other added
    assert (len(reader), reader.row(45)) == (46, {"text": "late"})


def test_opening_while_another_adds(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    read, states = segments.read_manifest, list[Any]()

    def reading(folder: Path) -> Any:
        manifest = read(folder)
        if not states:  # the segment is gone before it is opened
            states.append(manifest)
            index.add(random(24, 40, 16), texts(40, 5), fingerprint=MODEL)
        return manifest

    monkeypatch.setattr(index_module, "read_manifest", reading)
    reader = Index.open(index.folder)
    assert len(reader) == 45


def test_another_process_writes(tmp_path: Path, index: Index) -> None:
    (tmp_path / "new").mkdir()
    with another_process(tmp_path / "new", segments.LOCK), pytest.raises(InputError, match="wait"):
        Index.create(tmp_path / "new", MODEL)
    with another_process(index.folder, segments.LOCK):
        with pytest.raises(InputError, match="another process is writing there; wait until"):
            index.add(np.ones((1, 16)), ["a"], fingerprint=MODEL)
        assert len(found(Index.open(index.folder), np.ones(16), 9)[0]) == 5  # reading needs no lock
    index.add(np.ones((1, 16)), ["a"], fingerprint=MODEL)


def test_threads_that_add_wait_for_each_other(index: Index) -> None:
    def add(number: int) -> None:
        for one in (index, Index.open(index.folder)):  # the same object, and one of its own
            one.add(random(number, 3, 16), [f"{number}"] * 3, fingerprint=MODEL)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))  # raises what one raised
    whole = Index.open(index.folder)
    assert len(whole) == 5 + 8 * 6
    texts = [whole.row(i)["text"] for i in range(5, len(whole))]
    assert all(texts.count(f"{number}") == 6 for number in range(8))
    assert texts[::3] == texts[1::3] == texts[2::3]  # what was added at once lies together
    whole.verify()


def test_rows_that_are_added_while_rows_are_added(index: Index) -> None:
    def blocks() -> Iterator[tuple[Array, list[str]]]:
        yield random(1, 1, 16), ["a"]
        index.add(random(2, 1, 16), ["b"], fingerprint=MODEL)

    with pytest.raises(InputError, match="this thread is writing there already"):
        index.extend(blocks(), fingerprint=MODEL)
    assert len(Index.open(index.folder)) == 5


def test_a_full_disk_loses_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    queries = random(26, 2, 16)
    before = found(index, queries)
    with monkeypatch.context() as patch:
        patch.setattr(segments._Rows, "write", full)
        with pytest.raises(OSError, match="No space left"):
            index.add(random(27, 2, 16), texts(2), fingerprint=MODEL)
    assert names(index.folder) == ["index.json", "segment-00000"]
    assert found(index, queries) == found(Index.open(index.folder), queries) == before


def test_a_full_disk_names_the_index(index: Index, small_files: None) -> None:
    with pytest.raises(OSError, match="File too large") as raised:
        index.add(random(27, 1000, 16), texts(1000), fingerprint=MODEL)
    assert raised.value.filename == str(index.folder)
    assert names(index.folder) == ["index.json", "segment-00000"]
    with pytest.raises(OSError, match="of another thing"):
        index.extend(_failing(), fingerprint=MODEL)


def _failing() -> Iterator[Any]:
    yield random(0, 1, 16), ["a"]
    raise TimeoutError("of another thing")


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "index"):
        with pytest.raises(InputError, match="is a file; pass a folder") as raised:
            Index.create(path, MODEL)
        assert raised.value.argument == "folder"
    with pytest.raises(InputError, match="File name too long"):
        Index.create(tmp_path / ("x" * 256), MODEL)


# memory


BOUNDED = """
import pathlib, resource, sys
import numpy as np, torch
from minilm.index import Index
from minilm.tasks import semantic_search
folder, allowed = sys.argv[1], int(sys.argv[2])
corpus = np.load(folder + "/corpus.npy", mmap_mode="r")
queries = np.array(corpus[[5, 30000]], np.float32)
index = Index.open(folder + "/index")
semantic_search(queries, corpus[:100])
index.search(queries[:, :384], fingerprint=None)
status = pathlib.Path("/proc/self/status").read_text()
used = int(status.split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))
try:
    np.ones(100_000_000, np.uint8)
    raise SystemExit("the limit is none")
except MemoryError:
    pass
print([hits[0]["corpus_id"] for hits in semantic_search(queries, corpus, top_k=5)])
print([hits[0]["corpus_id"] for hits in index.search(queries, 5, fingerprint=None)])
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_corpus_in_a_file_is_not_copied_to_memory(tmp_path: Path, dtype: str) -> None:
    blocks = ((random(i, 4096, 384), texts(4096)) for i in range(16))
    [vectors] = Index.create(tmp_path / "index", None, blocks).vectors
    np.save(tmp_path / "corpus.npy", vectors.astype(dtype))
    allowed = 70_000_000  # the corpus has 101 MB in float32, a block of it 25
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BOUNDED, str(tmp_path), str(allowed)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[5, 30000]\n[5, 30000]\n"


# the command line


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--device", "cpu"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("the dog bites\na cat\nthe man sees the sun\n")
    rows = [{"id": 7, "text": "a dog is out"}, {"id": 7, "text": "run, cat!"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_build_add_search_check(
    files: Path, model: list[str], capsys: pytest.CaptureFixture[str], tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(index_texts, "_BLOCK", 2)
    folder = files / "index"
    built = run("index", "build", files / "a.txt", "-o", folder, "--codes", "binary", *model)
    assert built == 0
    assert run("index", "add", folder, files / "b.jsonl", *model) == 0
    assert capsys.readouterr().err == f"{folder}: 3 rows\n{folder}: 5 rows\n"

    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    five = ["the dog bites", "a cat", "the man sees the sun", "a dog is out", "run, cat!"]
    expected = semantic_search(encoder.encode(["a dog", "sun"]), encoder.encode(five), top_k=2)
    assert run("index", "search", folder, "a dog", "sun", "-k", "2", *model) == 0
    lines = []
    for query, hits in zip(["a dog", "sun"], expected, strict=True):
        lines += [query]
        lines += [
            f"{hit['score']:7.4f}  {hit['corpus_id']}  {five[int(hit['corpus_id'])]}"
            for hit in hits
        ]
    assert capsys.readouterr().out.splitlines() == lines

    (files / "q.txt").write_text("a dog is out\n")
    assert run("index", "search", folder, "-f", files / "q.txt", "--json", "-k", "1", *model) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert result["query"] == "a dog is out"
    [hit] = result["hits"]
    assert (hit["corpus_id"], hit["row"]) == (3, {"id": 7, "text": "a dog is out"})
    assert hit["score"] == pytest.approx(1)
    binary = ["--precision", "binary", "--rescore-multiplier", "9"]
    assert run("index", "search", folder, "a dog", "-k", "1", *binary, *model) == 0
    assert capsys.readouterr().out.splitlines() == lines[1:2]

    assert run("index", "check", folder, "--sample", "3", *model) == 0
    out, err = capsys.readouterr()
    assert out.startswith("same")
    assert "5 rows; every file is as it was written" in err
    path = next(folder.glob("segment-*/vectors.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert run("index", "check", folder, *model) == 1
    assert "vectors.npy has SHA-256" in capsys.readouterr().err


def test_a_search_digests_no_weights_and_notices_any_other(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    (tmp_path / "a.txt").write_text("the dog bites\na cat\n")
    table = read_table([str(tmp_path / "a.txt")])
    index = index_texts.build_index(encoder, tmp_path / "index", table)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["minilm.pretrained.fingerprint"], "_digest_tensors", None)
        assert index_texts.search_index(encoder, index, ["a cat"], 1)[0][0]["corpus_id"] == 1
    encoder.bert.embeddings.word_embeddings.weight.data[7, 0] += 0.5
    with pytest.raises(InputError, match="use that model, or build another"):
        index_texts.search_index(encoder, index, ["a cat"])


def test_the_command_line_refuses(
    files: Path, model: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    tiny_folder: Path,
) -> None:  # fmt: skip
    folder = files / "index"
    run("index", "build", files / "a.txt", "-o", folder, *model)
    capsys.readouterr()
    assert run("index", "build", files / "a.txt", "-o", folder, *model) == 1
    assert "has an index in it already" in capsys.readouterr().err
    assert run("index", "search", files, "x", *model) == 1
    assert "is not an index" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("index", "search", folder, *model)
    assert "QUERY" in capsys.readouterr().err
    config = tiny_folder / "sentence_bert_config.json"
    config.write_text(json.dumps({"max_seq_length": 10}))
    for words in (["search", str(folder), "x"], ["add", str(folder), str(files / "a.txt")]):
        assert run("index", *words, *model) == 1
        assert "max_seq_length: 12, not 10" in capsys.readouterr().err
    assert len(Index.open(folder)) == 3


@pytest.mark.filterwarnings("always::minilm.errors.TruncationWarning")  # as outside of tests
def test_columns_prompts_and_cuts(
    files: Path, model: list[str], capsys: pytest.CaptureFixture[str], tiny_folder: Path
) -> None:
    (files / "c.csv").write_text("id,body\n1,the dog\n2," + "a cat " * 9 + "\n")
    folder = files / "index"
    words = ["--column", "body", "-o", str(folder), "--prompt", "the "]
    assert run("index", "build", files / "c.csv", *words, *model) == 0
    err = capsys.readouterr().err
    assert "warning: 1 of 2 texts were cut at 12 tokens" in err
    index = Index.open(folder)
    assert (index.column, index.row(0)) == ("body", {"id": "1", "body": "the dog"})
    assert index.fingerprint is not None
    assert index.fingerprint.prompt == "the "
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    np.testing.assert_array_equal(index.vector(0), encoder.encode("the dog", prompt="the "))
    assert run("index", "search", folder, "dog", "-k", "1", *model) == 0  # without the prompt
    assert run("index", "add", folder, files / "a.txt", *model) == 1
    assert "prompt: 'the ', not ''" in capsys.readouterr().err


def test_texts_under_another_name(
    files: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files / "index"
    assert run("index", "build", files / "a.txt", "-o", folder, *model) == 0
    (files / "c.jsonl").write_text('{"id": 1, "body": "the dog"}\n')
    assert run("index", "add", folder, files / "c.jsonl", "--column", "body", *model) == 0
    assert Index.open(folder).row(3) == {"id": 1, "body": "the dog", "text": "the dog"}
    assert run("index", "check", folder, *model) == 0
    (files / "c.jsonl").write_text('{"text": "a title", "body": "the dog"}\n')
    capsys.readouterr()
    assert run("index", "add", folder, files / "c.jsonl", "--column", "body", *model) == 1
    assert (
        """has its texts under 'text', where a row has "a title" and""" in capsys.readouterr().err
    )
    assert len(Index.open(folder)) == 4


# what another process or thread does meanwhile


def test_a_folder_that_another_model_took(tmp_path: Path) -> None:
    ours = Index.create(tmp_path / "index", MODEL)
    for theirs in (replace(MODEL, weights_sha256="5" * 64, tensors_sha256="6" * 64), None):
        shutil.rmtree(tmp_path / "index")
        Index.create(tmp_path / "index", theirs)
        with pytest.raises(InputError, match=r"fingerprint is|can't add vectors"):
            ours.add(np.ones((1, 16)), ["a"], fingerprint=MODEL)
        assert len(Index.open(tmp_path / "index")) == 0
        shutil.rmtree(tmp_path / "index")
        ours = Index.create(tmp_path / "index", MODEL)
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(InputError, match="is not an index"):
        ours.add(np.ones((1, 16)), ["a"], fingerprint=MODEL)


@pytest.mark.slow
def test_a_search_while_another_thread_adds(index: Index) -> None:
    begun, stop, errors = threading.Event(), threading.Event(), []

    def search() -> None:
        while not stop.is_set():
            try:
                index.search(np.ones((1, 16)), 3, fingerprint=MODEL)
            except Exception as error:
                errors.append(error)
                stop.set()
            begun.set()

    thread = threading.Thread(target=search)
    thread.start()
    assert begun.wait(300)
    for _ in range(60):
        index.add(np.ones((1, 16)), ["a"], fingerprint=MODEL)
    stop.set()
    thread.join()
    assert not errors


def test_a_row_that_comes_amid_a_search_is_not_in_it(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def best_after_adding(*arguments: Any) -> Best:
        monkeypatch.setattr(index_module, "Best", Best)
        index.add(np.ones((1, 16)), ["a"], fingerprint=MODEL)
        return Best(*arguments)

    query, rows = np.ones((1, 16)), len(index)
    before = index.search(query, 300, fingerprint=MODEL)
    monkeypatch.setattr(index_module, "Best", best_after_adding)
    assert index.search(query, 300, fingerprint=MODEL) == before
    assert len(index) == rows + 1
    assert len(index.search(query, 300, fingerprint=MODEL)[0]) == len(before[0]) + 1


def test_segments_that_go_while_they_are_opened(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "rows.jsonl" and not added:
            added.append(True)
            index.add(np.ones((len(index), 16)), ["a"] * len(index), fingerprint=MODEL)
        return real(path, *arguments, **options)

    added: list[bool] = []
    real, count = Path.open, len(index)
    before = Index.open(index.folder)
    monkeypatch.setattr(Path, "open", opened)
    assert len(Index.open(index.folder)) == 2 * count
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="is gone, perhaps into a larger segment; open the index"):
        before.verify()


def test_rows_with_keys_that_are_no_strings(index: Index) -> None:
    with pytest.raises(InputTypeError, match=r"rows\[0\] has the key 1; pass strings"):
        index.add(np.ones((1, 16)), [{1: "a", "1": "b"}], fingerprint=MODEL)  # type: ignore[dict-item]


def test_indexing_takes_a_list(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    rows = [{"body": "a dog"}, {"body": "the sun"}]
    table = Table([row["body"] for row in rows], list(rows))
    made = index_texts.build_index(tiny_encoder, tmp_path / "index", table, column="body")
    [hits] = index_texts.search_index(tiny_encoder, made, ["a dog"], 1)
    assert hits[0]["row"] == {"body": "a dog"}
    with pytest.raises(InputTypeError, match="queries is a single text"):
        index_texts.search_index(tiny_encoder, made, "a dog")
    other = Index.create(tmp_path / "other", tiny_encoder.fingerprint())
    index_texts.add_to_index(tiny_encoder, other, table)
    assert rows == [{"body": "a dog"}, {"body": "the sun"}]  # the caller's
    assert other.row(0) == {"body": "a dog", "text": "a dog"}


def test_a_sample_reaches_the_end(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    texts = ["a dog", "the sun", "a cat"] * 5
    made = Index.create(tmp_path / "index", tiny_encoder.fingerprint())
    vectors = tiny_encoder.encode(texts)
    vectors[8:] *= -1
    made.add(vectors, texts, fingerprint=tiny_encoder.fingerprint())
    found = index_texts.check_index(tiny_encoder, made, 8)
    assert found is not None
    assert found.verdict == "model"


def test_a_lost_index_json_does_not_cost_the_segments(tmp_path: Path, index: Index) -> None:
    before = {path: path.read_bytes() for path in index.folder.rglob("*") if path.is_file()}
    manifest = index.folder / "index.json"
    lost = before.pop(manifest)
    manifest.unlink()
    message = "has segment-00000 and no index.json: an index that lost it"
    for call in (
        lambda: Index.create(index.folder, MODEL),
        lambda: Index.create(index.folder, MODEL, [(random(1, 2, 16), texts(2))]),
        lambda: Index.open(index.folder),
        lambda: index.add(random(1, 2, 16), texts(2), fingerprint=MODEL),
    ):
        with pytest.raises(InputError, match=message) as info:
            call()
        assert info.value.argument == "folder"
    assert {path: path.read_bytes() for path in index.folder.rglob("*") if path.is_file()} == before
    manifest.write_bytes(lost)  # restored from a copy
    assert len(Index.open(index.folder)) == 5


def test_what_an_interrupted_create_left_is_removed(tmp_path: Path) -> None:
    """A segment that was not yet complete, under its hidden name."""
    folder = tmp_path / "index"
    (folder / f".segment-00000.{'0' * 32}.part").mkdir(parents=True)
    (folder / "index.lock").touch()
    assert len(Index.create(folder, MODEL, [(random(0, 5, 16), texts(5))])) == 5
    assert names(folder) == ["index.json", "segment-00000"]


def test_vectors_that_are_too_long_for_an_index(tmp_path: Path, index: Index) -> None:
    vectors = random(1, 3, 16)
    vectors[1] = 1e38  # of length 4e38, beyond float32
    with pytest.raises(InputError, match="too long for its products; scale it down") as info:
        index.add(vectors, texts(3), fingerprint=MODEL)
    assert info.value.argument == "embeddings[1]"
    assert len(Index.open(index.folder)) == 5
    with pytest.MonkeyPatch.context() as patch:  # by a version that didn't look
        patch.setitem(LONGEST, torch.float32, np.inf)
        old = Index.create(tmp_path / "old", MODEL, [(np.full((1, 16), 5e37), ["a"])])
    with pytest.raises(InputError, match=r"old\[0\] has the length 2e\+38, too long"):
        found(old, vectors[0])
    vectors[1] = 1e37  # of length 4e37
    index.add(vectors, texts(3), fingerprint=MODEL)
    [hits] = found(index, vectors[1])
    assert (hits[0]["corpus_id"], hits[0]["score"]) == (6, 1.0)

"""A folder of vectors: whole as its manifest says, and this model's."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import seeded_bert
from minilm import MeanPooling, Normalize, SentenceEncoder
from minilm.errors import InputError
from minilm.files.arrow import embedding_array
from minilm.files.shards import manifest_path
from minilm.files.streaming import encode_files
from minilm.parity.check_folder import check_folder
from minilm.parity.foreign import read_vectors

LONG = "the dog bites the man . " * 3  # beyond the limit of 12 tokens


@pytest.fixture
def folder(tiny_encoder: SentenceEncoder, tmp_path: Path) -> Path:
    texts = [f"{'the ' * (i % 7)}dog" for i in range(40)]
    texts[29] = LONG
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"t": t, "id": "x"}) + "\n" for t in texts)
    )
    encode_files(
        tiny_encoder,
        tmp_path / "a.jsonl",
        tmp_path / "out",
        column="t",
        shard_rows=9,
        embedding_column="v",
        truncation="silent",
    )
    return tmp_path / "out"


def test_what_was_written_is_the_same(tiny_encoder: SentenceEncoder, folder: Path) -> None:
    found = check_folder(tiny_encoder, folder)
    assert found.is_compatible
    assert found.summary == (
        f"{folder}: 40 rows in 5 parts: all as the manifest says, by hash and number of rows"
    )
    assert found.result is not None
    assert (found.result.verdict, found.result.rows, found.result.checked) == ("same", 40, 40)
    assert found.table().splitlines()[1] == "same: equal, bit by bit (40 of 40 rows checked)"
    assert json.loads(json.dumps(found.to_dict()))["result"]["verdict"] == "same"


def test_a_folder_that_was_moved_without_its_manifest(
    tiny_encoder: SentenceEncoder, folder: Path
) -> None:
    (folder.parent / "new").mkdir()
    moved = folder.rename(folder.parent / "new" / "place")
    found = check_folder(tiny_encoder, moved)
    assert found.is_compatible
    assert (found.has_manifest, found.has_record) == (False, True)
    assert found.summary == (
        f"{moved}: 40 rows in 5 parts: all there and whole as the parts themselves say; the "
        f"manifest, which has their hashes, is not at {folder.parent}/new/place.manifest.json"
    )
    assert found.result is not None
    assert found.result.verdict == "same"
    (moved / "part-00003.parquet").unlink()
    found = check_folder(tiny_encoder, moved)
    assert not found.is_compatible
    assert "  - part-00003.parquet is missing" in found.table()


def test_a_sample_has_the_longest_text_in_it(tiny_encoder: SentenceEncoder, folder: Path) -> None:
    found = check_folder(tiny_encoder, folder, sample=4).result
    assert found is not None
    # 4 evenly spread, and 16 long ones, of which one is both.
    assert (found.rows, found.checked) == (40, 19)
    tiny_encoder.max_seq_length = 20
    found = check_folder(tiny_encoder, folder, sample=4).result
    assert found is not None
    assert (found.verdict, found.limit) == ("limit", 12)
    assert found.worst[0][0] == 29  # counted over all parts


def test_other_vectors(folder: Path, tiny_encoder: SentenceEncoder) -> None:
    other = SentenceEncoder(
        modules=[seeded_bert(seed=1), MeanPooling(), Normalize()],
        tokenizer=tiny_encoder.tokenizer,
        max_seq_length=12,
    )
    found = check_folder(other, folder)
    assert not found.problems
    assert not found.is_compatible
    assert found.result is not None
    assert found.result.verdict == "model"


def test_problems_are_listed(tiny_encoder: SentenceEncoder, folder: Path) -> None:
    (folder / "part-00000.parquet").unlink()
    path = folder / "part-00002.parquet"
    path.write_bytes(path.read_bytes()[:100])
    found = check_folder(tiny_encoder, folder)
    assert not found.is_compatible
    assert found.summary.endswith("22 rows in 3 parts: 3 problems")
    assert "  - part-00000.parquet is missing" in found.table()
    assert found.result is not None
    assert found.result.verdict == "same"  # what is left


def test_null_texts_have_the_vector_of_the_empty_text(
    tiny_encoder: SentenceEncoder, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"text": ["a cat", None]}), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="read as empty"):
        encode_files(tiny_encoder, tmp_path / "a.parquet", tmp_path / "out", on_bad_row="empty")
    assert check_folder(tiny_encoder, tmp_path / "out").is_compatible
    foreign = read_vectors(tmp_path / "out" / "part-00000.parquet")
    assert foreign.texts == ["a cat", ""]
    assert foreign.vectors.shape == (2, 32)


def test_a_folder_of_another_program(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    texts = ["a cat", "the dog"]
    vectors = embedding_array(tiny_encoder.encode(texts))
    columns: dict[str, Any] = {"text": texts, "vector": vectors.cast(pa.list_(pa.float32()))}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    found = check_folder(tiny_encoder, tmp_path)
    assert found.is_compatible
    assert not found.has_manifest
    assert found.summary.endswith("2 rows in 1 part: no manifest to compare with")
    (tmp_path / "y.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"y\.parquet: can't be read as Parquet"):
        check_folder(tiny_encoder, tmp_path)


def test_folders_with_nothing_in_them(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no Parquet file in it"):
        check_folder(tiny_encoder, tmp_path)
    (tmp_path / "a.jsonl").touch()
    encode_files(tiny_encoder, tmp_path / "a.jsonl", tmp_path / "out")
    found = check_folder(tiny_encoder, tmp_path / "out")
    assert found.result is None
    assert found.is_compatible
    assert found.table().endswith("there are no vectors")
    (tmp_path / "out" / "part-00000.parquet").unlink()
    found = check_folder(tiny_encoder, tmp_path / "out")
    assert not found.is_compatible
    manifest_path(tmp_path / "out").unlink()


def test_a_byte_that_flipped_is_a_problem_wherever_it_is(
    tiny_encoder: SentenceEncoder, folder: Path
) -> None:
    path = folder / "part-00001.parquet"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found = check_folder(tiny_encoder, folder)
        assert not found.is_compatible
        assert "part-00001.parquet is not the file that was written" in found.table()
        assert found.result is not None
        assert found.result.verdict == "same"  # of the other parts


@pytest.mark.slow
def test_a_damaged_folder_of_another_program(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = ["a cat", "the dog"] * 50
    columns = {"text": texts, "vector": embedding_array(tiny_encoder.encode(texts))}
    pq.write_table(pa.table(columns), path)
    whole, errors = path.read_bytes(), 0
    for place in range(4, len(whole) - 8, max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with suppress(InputError):  # nothing else
            check_folder(tiny_encoder, tmp_path)
            errors -= 1
        errors += 1
    assert errors > 0

"""A folder of parts: written, continued, held, verified."""

import errno
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import DATA, another_process
from minilm.disk import file_sha256, write_atomically
from minilm.errors import ConfigError, InputError
from minilm.files import shards
from minilm.files.arrow import embedding_array, with_vectors
from minilm.files.shards import (
    PROGRESS,
    Part,
    ShardFolder,
    manifest_path,
    parquet_settings,
    part_paths,
    verify_parts,
)  # fmt: skip

HEADER: dict[str, Any] = {
    "fingerprint": None,
    "settings": {"shard_rows": 2},
    "inputs": [{"name": "a.txt", "sha256": "5" * 64}],
    "rows": {"written": 5},
}
INSIDE = "_manifest.json"  # as 0.1.0 had it


def rows(number: int, count: int = 2) -> Any:
    vectors = np.full((count, 3), number, dtype=np.float32)
    table = pa.table({"text": [f"{number}.{i}" for i in range(count)]})
    table = table.append_column("embedding", embedding_array(vectors))
    return table.replace_schema_metadata({"minilm.fingerprint": "null"})


def add(folder: ShardFolder, number: int) -> Part:
    name = f"part-{number:05}.parquet"
    return folder.add(number, name, rows(number, 1 if number == 2 else 2), unique=1, tokens=3)


def written(path: Path) -> Path:
    with ShardFolder(path) as folder:
        folder.begin(HEADER)
        for number in range(3):
            add(folder, number)
        folder.finish()
    return path


def contents(path: Path) -> dict[str, bytes]:
    """The files of a folder, and its manifest under the name that any folder's has."""
    files = {each.name: each.read_bytes() for each in path.iterdir()}
    record = manifest_path(path)
    return files | ({"beside": record.read_bytes()} if record.exists() else {})


def test_what_is_left_is_the_parts_and_the_manifest(tmp_path: Path) -> None:
    folder = written(tmp_path / "a" / "out")
    names = [f"part-0000{i}.parquet" for i in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out", "out.manifest.json"]
    manifest = json.loads((tmp_path / "a" / "out.manifest.json").read_text())
    assert [part["name"] for part in manifest["parts"]] == names
    assert [part["rows"] for part in manifest["parts"]] == [2, 2, 1]
    for part in manifest["parts"]:
        assert part["sha256"] == file_sha256(folder / part["name"])
    assert verify_parts(folder) == (HEADER, [], set(), manifest_path(folder))
    assert contents(written(tmp_path / "again")) == contents(folder)


def test_sentences_take_no_more_bytes_than_with_snappy(tmp_path: Path) -> None:
    """As 0.1.0 wrote them: all in snappy, one group."""
    lines = (DATA / "parity_texts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [
        row["text"]
        for row in map(json.loads, lines)
        if row["kind"].startswith(("everyday", "decl"))
    ]
    vectors = np.random.default_rng(0).standard_normal((len(texts), 384), dtype=np.float32)
    table = with_vectors(pa.table({"text": texts}), "embedding", vectors, None)
    now = parquet_settings(table)
    for name, settings in (
        ("now", now),
        ("before", now | {"compression": "snappy", "row_group_size": 4096}),
    ):
        pq.write_table(table, tmp_path / name, **settings)
    assert (tmp_path / "now").stat().st_size < (tmp_path / "before").stat().st_size


def test_parts_in_any_order_give_the_same_manifest(tmp_path: Path) -> None:
    with ShardFolder(tmp_path / "b") as folder:
        folder.begin(HEADER)
        for number in (2, 0, 1):
            add(folder, number)
        folder.finish()
    assert contents(tmp_path / "b") == contents(written(tmp_path / "a"))


def test_it_goes_on_with_what_is_whole(tmp_path: Path) -> None:
    other, tmp_path = written(tmp_path / "other"), tmp_path / "a"
    with ShardFolder(tmp_path) as folder:
        assert folder.header is None
        folder.begin(HEADER)
        parts = [add(folder, number) for number in range(3)]
    # Half a line, half a file, and a file that nothing tells of.
    with (tmp_path / PROGRESS).open("ab") as file:
        file.write(b'{"name": "part-000')
    path = tmp_path / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "part-00003.parquet").write_bytes(b"")
    (tmp_path / f".part-00003.parquet.{'0' * 32}.part").write_bytes(b"PAR1")
    with ShardFolder(tmp_path) as folder:
        assert folder.header == HEADER
        assert not folder.is_complete
        folder.begin(HEADER)
        assert folder.done == {0: parts[0], 2: parts[2]}
        assert add(folder, 1) == parts[1]
        folder.finish()
        (tmp_path / "part-00003.parquet").unlink()
    assert contents(tmp_path) == contents(other)


def test_a_finished_folder_that_was_damaged_is_mended(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    before = contents(folder)
    (folder / "part-00002.parquet").unlink()
    with ShardFolder(folder) as again:
        assert again.is_complete
        again.begin(HEADER)
        assert not again.is_complete
        assert sorted(again.done) == [0, 1]
        add(again, 2)
        progress = (folder / PROGRESS).read_bytes()
        again.finish()
    assert contents(folder) == before
    (folder / PROGRESS).write_bytes(progress)  # killed between the manifest and its removal
    with ShardFolder(folder) as again:
        again.begin(HEADER)
        assert sorted(again.done) == [0, 1, 2]
        again.finish()
    assert contents(folder) == before


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        another_process(tmp_path, ".lock"),
        pytest.raises(InputError, match="another process is writing there"),
        ShardFolder(tmp_path),
    ):
        pass
    with ShardFolder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../b/part-00000.parquet", "x.parquet", "part-1.parquet", f"part-{'0' * 300}.parquet",
     "part-\u0660\u0661\u0662\u0663\u0664.parquet"],
    ids=itertools.count(),
)  # fmt: skip
def test_names_that_are_no_parts_are_refused(tmp_path: Path, name: str) -> None:
    folder, other = written(tmp_path / "a"), written(tmp_path / "b")
    manifest = json.loads(manifest_path(folder).read_text())
    manifest["parts"][0]["name"] = name
    manifest_path(folder).write_text(json.dumps(manifest))
    for read in (verify_parts, lambda path: ShardFolder(path).__enter__()):
        with pytest.raises(ConfigError, match=re.escape(name[:40])):
            read(folder)
    lines = [manifest, *manifest.pop("parts")]
    manifest_path(folder).unlink()
    (folder / PROGRESS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with ShardFolder(folder) as again:
        assert sorted(again.done) == [1, 2]  # as if that line were not there
    assert len(contents(other)) == 4


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"such as part-00000.parquet"), ShardFolder(tmp_path):
        pass
    assert contents(tmp_path) == {"part-00000.parquet": b"mine"}


def test_only_own_files_are_cleared(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    (folder / "other.parquet").write_text("mine")
    with ShardFolder(folder) as again:
        again.clear()
        assert (again.header, again.done, again.is_complete) == (None, {}, False)
    assert sorted(contents(folder)) == ["notes.txt", "other.parquet"]


@pytest.mark.parametrize("place", ["part", "progress", "manifest"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    other, tmp_path = written(tmp_path / "other"), tmp_path / "a"
    real_part, real = shards._write_parquet, write_atomically
    full = OSError(errno.ENOSPC, "No space left on device")

    def half(file: Any, table: Any) -> None:
        file.write(b"PAR1")
        raise full

    def atomically(path: Path, write: Any) -> None:
        if path.name == INSIDE:
            raise full
        real(path, write)

    def open_full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == PROGRESS and "ab" in arguments:
            raise full
        return real_open(path, *arguments, **options)

    real_open = Path.open
    with ShardFolder(tmp_path) as folder:
        folder.begin(HEADER)
        add(folder, 0)
        add(folder, 1)
        if place == "part":
            monkeypatch.setattr(shards, "_write_parquet", half)
        elif place == "progress":
            monkeypatch.setattr(Path, "open", open_full)
        else:
            add(folder, 2)
            monkeypatch.setattr(shards, "write_atomically", atomically)
        with pytest.raises(OSError, match="parts are written and stay") as caught:
            folder.finish() if place == "manifest" else add(folder, 2)
        assert caught.value.errno == errno.ENOSPC
        name = {"part": "part-00002.parquet", "progress": PROGRESS, "manifest": INSIDE}[place]
        assert caught.value.filename == str(tmp_path / name)
    monkeypatch.undo()
    assert shards._write_parquet is real_part
    assert [name for name in contents(tmp_path) if name.startswith(".")] == []
    with ShardFolder(tmp_path) as folder:
        folder.begin(HEADER)
        assert {0, 1} <= folder.done.keys()
        if 2 not in folder.done:
            add(folder, 2)
        folder.finish()
    assert contents(tmp_path) == contents(other)


def test_what_verifying_finds(tmp_path: Path) -> None:
    assert verify_parts(tmp_path) == (None, [], set(), None)
    folder = written(tmp_path / "a")
    (folder / "part-00000.parquet").unlink()
    path = folder / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    (folder / "part-00002.parquet").write_bytes(b"PAR1")
    (folder / "part-00003.parquet").write_bytes(b"")
    problems = verify_parts(folder).problems
    assert problems[0] == "part-00000.parquet is missing"
    assert "part-00001.parquet is not the file that was written" in problems[1]
    assert "part-00002.parquet is not the file" in problems[2]
    assert "part-00002.parquet can't be read" in problems[3]
    assert problems[4] == "part-00003.parquet is not in the manifest"
    assert len(problems) == 5


def test_a_manifest_that_does_not_fit(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    path = manifest_path(folder)
    manifest = json.loads(path.read_text())
    manifest["parts"][1]["rows"] = 7
    path.write_text(json.dumps(manifest))
    problems = verify_parts(folder).problems
    assert problems == [
        "part-00001.parquet has 2 rows, expected 7", "has 10 rows, the manifest says 5"
    ]  # fmt: skip
    manifest["fingerprint"] = {"model": "other"}
    path.rename(folder / INSIDE).write_text(json.dumps(manifest))  # beside, it would be another's
    problems = verify_parts(folder).problems
    assert "part-00000.parquet has another fingerprint than the manifest" in problems
    path = folder / INSIDE
    path.write_text('{"parts": [{}]}')
    with pytest.raises(ConfigError, match="is not a manifest, or broken"):
        verify_parts(folder)


def test_verifying_a_run_that_is_not_finished(tmp_path: Path) -> None:
    with ShardFolder(tmp_path) as folder:
        folder.begin(HEADER)
        add(folder, 0)
    found = verify_parts(tmp_path)
    assert found.header == HEADER
    assert found.problems == ["is not complete: 1 parts are written; run the same command again"]


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".movie.part").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"y")
    with pytest.raises(InputError, match=r"such as notes\.txt"), ShardFolder(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".movie.part", "notes.txt"]
    (tmp_path / "notes.txt").unlink()
    with ShardFolder(tmp_path) as folder:
        folder.begin(HEADER)
    assert (tmp_path / ".movie.part").exists()


# the manifest beside the folder: lost, of another, in the way


def without_manifest(tmp_path: Path) -> Path:
    folder = written(tmp_path / "moved")
    manifest_path(folder).unlink()
    return folder


def test_without_the_manifest_the_parts_know(tmp_path: Path) -> None:
    whole = contents(written(tmp_path / "a"))
    folder = without_manifest(tmp_path)
    found = verify_parts(folder)
    assert found.header is not None
    assert found.header["rows"] == HEADER["rows"]
    assert found.header["inputs"]["files"] == 1
    assert found[1:] == ([], set(), None)
    with ShardFolder(folder) as again:
        assert again.is_lost
        assert sorted(again.done) == [0, 1, 2]
        again.begin(HEADER)
        again.finish()
    assert contents(folder) == whole


def test_what_is_found_without_the_manifest(tmp_path: Path) -> None:
    folder = without_manifest(tmp_path)
    path = folder / "part-00001.parquet"
    whole = path.read_bytes()
    (folder / "part-00002.parquet").rename(folder / "part-00004.parquet")
    assert verify_parts(folder).problems == [
        "part-00002.parquet is missing",
        "part-00004.parquet is not of this run",
        "has 4 rows, they say 5",
    ]
    vectors = pq.read_metadata(path).row_group(0).column(1)
    place = vectors.data_page_offset + vectors.total_compressed_size - 1
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    found = verify_parts(folder)
    assert found.problems[0].startswith("part-00001.parquet can't be read: ")
    assert found.damaged == {"part-00001.parquet"}
    (folder / "part-00004.parquet").rename(folder / "part-00002.parquet")
    with ShardFolder(folder) as again:
        again.begin(HEADER)
        assert sorted(again.done) == [0, 2]
        add(again, 1)
        again.finish()
    assert path.read_bytes() == whole


def test_a_run_of_other_inputs_takes_no_part_of_a_lost_one(tmp_path: Path) -> None:
    folder = without_manifest(tmp_path)
    with ShardFolder(folder) as again:
        again.begin(HEADER | {"inputs": [{"name": "b.txt", "sha256": "6" * 64}]})
        assert again.done == {}


def test_a_manifest_of_other_parts_does_not_count(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    path = manifest_path(folder)
    path.write_text(path.read_text().replace("5" * 64, "6" * 64))  # another run's
    assert verify_parts(folder)[1:] == ([], set(), None)
    with ShardFolder(folder) as again:
        assert again.is_lost
        again.begin(HEADER)
        assert not path.exists()
        again.finish()
    assert verify_parts(folder).source == path
    for part in part_paths(folder):
        part.unlink()
    assert verify_parts(folder).problems[0] == "part-00000.parquet is missing"
    with ShardFolder(folder) as again:
        assert again.header is None  # a new start


def test_a_folder_of_0_1_0_has_its_manifest_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "PART_KEY", "unknown")  # its parts knew nothing
        folder = written(tmp_path / "a")
    inside = manifest_path(folder).rename(folder / INSIDE)
    assert verify_parts(folder) == (HEADER, [], set(), inside)
    with ShardFolder(folder) as again:  # the same command again
        assert again.is_complete
        again.begin(HEADER)
        again.finish()
    assert not inside.exists()
    assert verify_parts(folder) == (HEADER, [], set(), manifest_path(folder))


@pytest.mark.parametrize(
    ("folder", "manifest"),
    [("out/a", "out/a.manifest.json"), ("out/lang=de", "out.lang=de.manifest.json"),
     ("out/y=1/m=2", "out.y=1.m=2.manifest.json"), ("out/b/../a", "out/a.manifest.json"),
     ("link", "out/a.manifest.json")],
)  # fmt: skip
def test_where_the_manifest_is(tmp_path: Path, folder: str, manifest: str) -> None:
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out/a")
    assert manifest_path(tmp_path / folder) == tmp_path / manifest


def test_a_file_of_somebody_else_in_its_place_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.manifest.json").write_text('{"name": "mine"}')
    with pytest.raises(ConfigError, match="is not a manifest"), ShardFolder(tmp_path / "a"):
        pass
    assert (tmp_path / "a.manifest.json").read_text() == '{"name": "mine"}'


def test_where_nothing_can_be_written_beside_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, target: Path) -> None:
        if target == manifest_path(tmp_path / "a"):
            raise OSError(errno.EROFS, "Read-only file system")
        real(path, target)

    real = Path.replace
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.warns(UserWarning, match=r"a\.manifest\.json: can't be written \(Read-only"):
        folder = written(tmp_path / "a")
    assert sorted(contents(folder)) == [f"part-0000{i}.parquet" for i in range(3)]
    assert verify_parts(folder).problems == []


@pytest.mark.parametrize("change", [{"inputs": [[1]]}, {"rows": {"written": float("inf")}}])
def test_a_broken_manifest_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = written(tmp_path / "a")
    manifest = json.loads(manifest_path(folder).read_text())
    manifest_path(folder).write_text(json.dumps(manifest | change))
    with pytest.raises(ConfigError, match="is not a manifest, or broken"):
        verify_parts(folder)

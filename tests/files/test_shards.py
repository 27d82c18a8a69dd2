"""A folder of parts: written, continued, held, verified."""

import errno
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conftest import another_process
from minilm.disk import file_sha256, write_atomically
from minilm.errors import ConfigError, InputError
from minilm.files import shards
from minilm.files.arrow import embedding_array
from minilm.files.shards import MANIFEST, PROGRESS, Part, ShardFolder, verify_parts

HEADER: dict[str, Any] = {"fingerprint": None, "rows": {"written": 5}}


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
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_what_is_left_is_the_parts_and_the_manifest(tmp_path: Path) -> None:
    folder = written(tmp_path / "a" / "out")
    names = [f"part-0000{i}.parquet" for i in range(3)]
    assert sorted(contents(folder)) == [MANIFEST, *names]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [part["name"] for part in manifest["parts"]] == names
    assert [part["rows"] for part in manifest["parts"]] == [2, 2, 1]
    for part in manifest["parts"]:
        assert part["sha256"] == file_sha256(folder / part["name"])
    assert verify_parts(folder) == (HEADER, [], set())
    assert contents(written(tmp_path / "again")) == contents(folder)


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
        again.finish()
    assert contents(folder) == before
    (folder / PROGRESS).write_bytes(b"{}\n")  # killed between the manifest and its removal
    with ShardFolder(folder) as again:
        again.begin(HEADER)
        assert again.is_complete
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


@pytest.mark.parametrize("name", ["../b/part-00000.parquet", "x.parquet", "part-1.parquet"])
def test_names_that_are_no_parts_are_refused(tmp_path: Path, name: str) -> None:
    folder, other = written(tmp_path / "a"), written(tmp_path / "b")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["parts"][0]["name"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for read in (verify_parts, lambda path: ShardFolder(path).__enter__()):
        with pytest.raises(ConfigError, match=re.escape(name)):
            read(folder)
    lines = [manifest, *manifest.pop("parts")]
    (folder / MANIFEST).unlink()
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
        if path.name == MANIFEST:
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
        name = {"part": "part-00002.parquet", "progress": PROGRESS, "manifest": MANIFEST}[place]
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
    assert verify_parts(tmp_path) == (None, [], set())
    folder = written(tmp_path / "a")
    (folder / "part-00000.parquet").unlink()
    path = folder / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    (folder / "part-00002.parquet").write_bytes(b"PAR1")
    (folder / "part-00003.parquet").write_bytes(b"")
    _, problems, _ = verify_parts(folder)
    assert problems[0] == "part-00000.parquet is missing"
    assert "part-00001.parquet is not the file that was written" in problems[1]
    assert "part-00002.parquet is not the file" in problems[2]
    assert "part-00002.parquet can't be read" in problems[3]
    assert problems[4] == "part-00003.parquet is not in the manifest"
    assert len(problems) == 5


def test_a_manifest_that_does_not_fit(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["parts"][1]["rows"] = 7
    manifest["fingerprint"] = {"model": "other"}
    path.write_text(json.dumps(manifest))
    _, problems, _ = verify_parts(folder)
    assert "part-00001.parquet has 2 rows, expected 7" in problems
    assert "part-00000.parquet has another fingerprint than the manifest" in problems
    assert "has 10 rows, the manifest says 5" in problems
    path.write_text('{"parts": [{}]}')
    with pytest.raises(ConfigError, match="is not a manifest, or broken"):
        verify_parts(folder)


def test_verifying_a_run_that_is_not_finished(tmp_path: Path) -> None:
    with ShardFolder(tmp_path) as folder:
        folder.begin(HEADER)
        add(folder, 0)
    header, problems, _ = verify_parts(tmp_path)
    assert header == HEADER
    assert problems == ["is not complete: 1 parts are written; run the same command again"]


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

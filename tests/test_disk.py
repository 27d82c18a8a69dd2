"""Files that are complete or not there, and folders that one process writes to."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from minilm.disk import file_sha256, held, inside, write_atomically
from minilm.errors import InputError


# names


@pytest.mark.parametrize(
    "name",
    ["..", "../a", "a/../../b", "a/..", "..\\a", "a\\..\\b", "/a", "\\a", "C:a", "c:/a",
     "//host/a/b", "\\\\?\\C:\\a", ".. /a", "...", "a\0b", None, 5, b"a"],
)  # fmt: skip
def test_names_that_lead_outside(name: Any) -> None:
    with pytest.raises(ValueError, match="leads outside the folder"):
        inside(name)


def test_names_that_stay_inside() -> None:
    given = ["1_Pooling", "a\\b", "a//b/", "", ".", "./a", ".hidden", "a..b", "ä/ü", "a b"]
    expected = ["1_Pooling", "a/b", "a/b", "", "", "a", ".hidden", "a..b", "ä/ü", "a b"]
    assert [inside(name) for name in given] == expected


# files


def test_write_atomically_replaces_and_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    expected = hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert file_sha256(tmp_path / "file") == expected


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    with held(tmp_path, "lock", "output"):
        with pytest.raises(InputError, match="another process is writing there") as caught:
            held(tmp_path, "lock", "output").__enter__()
        assert caught.value.argument == "output"
    assert not list(tmp_path.iterdir())
    with held(tmp_path, "lock", "output"):
        pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
from minilm.disk import held
with held(pathlib.Path(sys.argv[1]), "lock", "output"):
    os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=ROOT)
    assert done.returncode == 9
    assert (tmp_path / "lock").exists()
    with held(tmp_path, "lock", "output"):
        pass

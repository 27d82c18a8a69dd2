"""Files that are complete or not there, folders that one writer has, and names that stay inside."""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, another_process
from minilm.disk import (
    file_sha256,
    held,
    inside,
    write_atomically,
)
from minilm.errors import InputError

# What file systems without flock or fsync answer: Lustre, FUSE, NFS without its lock service.
MISSING = [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK]


def failing(number: int) -> Any:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


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


# who has a folder


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught, held(folder, "lock", "output"):
        pass
    assert caught.value.argument == "output"
    assert str(caught.value).startswith(f"{folder}: ")


def test_another_process_is_refused(tmp_path: Path) -> None:
    with another_process(tmp_path):
        refused(tmp_path, "another process is writing there; wait until it is done")
    with held(tmp_path, "lock", "output"):
        assert names(tmp_path) == ["lock"]
        code = """
import pathlib, sys
from minilm.disk import held
with held(pathlib.Path(sys.argv[1]), "lock", "output"):
    pass
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], check=False, cwd=ROOT, capture_output=True
        )
        assert b"InputError" in done.stderr
        assert b"another process is writing there" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_thread_cannot_wait_for_itself(tmp_path: Path) -> None:
    with held(tmp_path, "lock", "output"):
        refused(tmp_path, "this thread is writing there already")
    with held(tmp_path, "lock", "output"):
        pass
    assert not list(tmp_path.iterdir())


def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)  # the same folder under another name
    inside_now, most, done = 0, 0, 0

    def work(folder: Path) -> None:
        nonlocal inside_now, most, done
        for _ in range(5):
            with held(folder, "lock", "output"):
                inside_now += 1
                most = max(most, inside_now)
                time.sleep(0.002)
                inside_now -= 1
                done += 1

    threads = [threading.Thread(target=work, args=(each,)) for each in (tmp_path, link) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, done) == (1, 40)
    assert names(tmp_path) == ["link"]


def test_a_forked_child_has_nothing_and_takes_nothing(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stop = threading.Event()

    def hold() -> None:
        with held(other, "lock", "output"):
            ready.set()
            stop.wait(30)

    ready = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(30)
    with held(tmp_path, "lock", "output"):
        child = os.fork()
        if child == 0:  # nothing of pytest may run in it
            code = 1
            try:
                for folder in (tmp_path, other):
                    refused(folder, "another process is writing there")
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.set()
    thread.join(30)
    child = None
    with held(tmp_path, "lock", "output"):
        child = os.fork()
    if child == 0:  # it has left the block, and the folder is its parent's all the same
        os._exit(0 if (tmp_path / "lock").exists() else 1)
    os.waitpid(child, 0)
    with held(tmp_path, "lock", "output"), held(other, "lock", "output"):
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


@pytest.mark.parametrize("number", MISSING)
def test_without_flock_there_is_another_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with held(tmp_path, "lock", "output"):
        assert names(tmp_path) == ["lock.soft"]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                refused(tmp_path, "another process is writing there; .* remove .*lock.soft")
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not list(tmp_path.iterdir())
    child = os.fork()
    if child == 0:
        with held(tmp_path, "lock", "output"):
            os._exit(9)
    os.waitpid(child, 0)
    assert names(tmp_path) == ["lock.soft"]  # of a process that was killed
    with held(tmp_path, "lock", "output"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_lock_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, held(tmp_path / "none", "lock", "output"):
        pass
    assert caught.value.filename == str(tmp_path / "none")

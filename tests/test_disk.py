"""Files that are complete or not there, folders that one writer has, and names that stay inside."""

import errno
import fcntl
import hashlib
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from conftest import ROOT, another_process
from minilm.disk import (
    DoubledKeyError,
    absolute,
    check_header,
    file_sha256,
    inside,
    lock_folder,
    make_folder,
    parse_json,
    sync_folder,
    with_home,
    with_metadata,
    write_atomically,
    write_together,
)
from minilm.errors import InputError
from minilm.outputs import write_output

# What file systems without flock or fsync answer: Lustre, FUSE, NFS without its lock service.
MISSING = [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK]


def failing(number: int) -> Any:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


# JSON


def test_json_that_is_refused() -> None:
    assert parse_json(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    with pytest.raises(DoubledKeyError, match="has the key 'b' more than once"):
        parse_json('[{"a": {"b": 1, "c": 2, "b": 1}}]')
    for text in ("", "{", "\udc80", "[" * 100_000, '{"a":' * 100_000, b"\xff"):
        with pytest.raises(ValueError):  # noqa: PT011  # the module json has many messages
            parse_json(text)


def test_name_twice_in_a_header() -> None:
    tensor = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    for text, is_refused in ((f"{{{tensor}, {tensor}}}", True), (f"{{{tensor}}}", False)):
        file = io.BytesIO(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
        if is_refused:
            with pytest.raises(DoubledKeyError, match="its header has the key 'a' more than once"):
                check_header(file)
        else:
            check_header(file)
    for data in (b"", b"1234567", b"\xff" * 8 + b"{", bytes(8)):  # left to the library
        check_header(io.BytesIO(data))


# names


@pytest.mark.parametrize(
    "name",
    ["..", "../a", "a/../../b", "a/..", "..\\a", "a\\..\\b", "/a", "\\a", "C:a", "c:/a",
     "//host/a/b", "\\\\?\\C:\\a", ".. /a", "...", "a\0b", None, 5, b"a"],
)  # fmt: skip
def test_names_that_lead_outside(name: Any) -> None:
    with pytest.raises(ValueError, match="leads outside the folder"):
        inside(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/" + "x" * 256, r"'a/x{38}'\.\.\. of 258 characters is too long"),
        ("ä" * 128, "128 characters is too long"),
        ("a/" * 513, "1,026 characters is too long"),
        ("a/\ud800", r"'a/\\ud800' is no Unicode text"),
        ("\udcff", r"'\\udcff' is no Unicode text"),
    ],
)
def test_names_that_no_file_has(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inside(name)


def test_names_that_stay_inside() -> None:
    given = ["1_Pooling", "a\\b", "a//b/", "", ".", "./a", ".hidden", "a..b", "ä/ü", "a b"]
    expected = ["1_Pooling", "a/b", "a/b", "", "", "a", ".hidden", "a..b", "ä/ü", "a b"]
    assert [inside(name) for name in given] == expected
    for name in ("x" * 255, "/".join("x" * 511)):
        assert inside(name) == name


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


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "😀" * 63, "\udcff", "two\nlines", "-"])
def test_every_name_that_a_file_can_have(tmp_path: Path, name: str) -> None:
    for contents in (b"one", b"two"):
        write_atomically(tmp_path / name, lambda file, data=contents: file.write(data))  # type: ignore[misc]
        assert (tmp_path / name).read_bytes() == contents
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("mode", [0o664, 0o600, 0o640, 0o666])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    os.utime(path, (1, 1))
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.stat().st_mode & 0o7777 == mode
    assert path.stat().st_mtime > 1
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "new", lambda file: file.write(b"new"))
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is in any group")
def test_a_file_keeps_its_group(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    os.chown(tmp_path / "file", -1, 4321)
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").stat().st_gid == 4321


def test_together_or_not_at_all(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(OSError, match="No space left") as caught:
        write_together({one: lambda file: file.write(b"1"), two: failing(errno.ENOSPC)})
    assert caught.value.filename == str(two)
    assert "the disk is mounted at /" in str(caught.value)
    assert not list(tmp_path.iterdir())
    write_together({one: lambda file: file.write(b"1"), two: lambda file: file.write(b"2")})
    assert (one.read_bytes(), two.read_bytes()) == (b"1", b"2")


def test_a_full_disk_names_the_file(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(OSError, match="File too large") as caught:  # not "requested and written"
        write_atomically(tmp_path / "x.npy", lambda file: np.save(file, np.zeros(10_000)))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "x.npy"))
    assert not list(tmp_path.iterdir())


def test_errors_of_something_else_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "x", lambda file: (tmp_path / "source").read_bytes())
    assert caught.value.filename == str(tmp_path / "source")

    def late(file: Any) -> None:
        raise TimeoutError("somebody else")

    with pytest.raises(TimeoutError, match=r"^somebody else$"):
        write_atomically(tmp_path / "x", late)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM])
def test_a_file_that_cannot_be_replaced_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "mounted"
    monkeypatch.setattr(Path, "replace", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_atomically(path, lambda file: file.write(b"new"))
    assert caught.value.filename == str(path)
    path.write_bytes(b"old and longer")
    inode = path.stat().st_ino
    write_atomically(path, lambda file: file.write(b"new"))
    assert (path.read_bytes(), path.stat().st_ino) == (b"new", inode)
    assert names(tmp_path) == ["mounted"]


@pytest.mark.parametrize("number", MISSING)
def test_without_fsync_the_work_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_write_error_of_fsync_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        sync_folder(tmp_path)
    assert error.value.filename == str(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_renamed_and_made_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def watch(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    assert make_folder(tmp_path / "a" / "b") == [tmp_path / "a", tmp_path / "a" / "b"]
    assert synced == [tmp_path, tmp_path / "a"]
    write_atomically(tmp_path / "a" / "file", lambda file: file.write(b"new"))
    assert synced[2].name.startswith(".file.")
    assert synced[3:] == [tmp_path / "a"]
    assert make_folder(tmp_path / "a") == []


# who has a folder


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught, lock_folder(folder, "lock", "output"):
        pass
    assert caught.value.argument == "output"
    assert str(caught.value).startswith(f"{folder}: ")


@pytest.mark.process
def test_another_process_is_refused(tmp_path: Path) -> None:
    with another_process(tmp_path):
        refused(tmp_path, "another process is writing there; wait until it is done")
    with lock_folder(tmp_path, "lock", "output"):
        assert names(tmp_path) == ["lock"]
        code = """
import pathlib, sys
from minilm.disk import lock_folder
with lock_folder(pathlib.Path(sys.argv[1]), "lock", "output"):
    pass
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], check=False, cwd=ROOT, capture_output=True
        )
        assert b"InputError" in done.stderr
        assert b"another process is writing there" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_thread_cannot_wait_for_itself(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "lock", "output"):
        refused(tmp_path, "this thread is writing there already")
    with lock_folder(tmp_path, "lock", "output"):
        pass
    assert not list(tmp_path.iterdir())


def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)  # the same folder under another name
    inside_now, most, done = 0, 0, 0

    def work(folder: Path) -> None:
        nonlocal inside_now, most, done
        for _ in range(5):
            with lock_folder(folder, "lock", "output"):
                inside_now += 1
                most = max(most, inside_now)
                time.sleep(0.002)
                inside_now -= 1
                done += 1

    threads = [threading.Thread(target=work, args=(each,)) for each in (tmp_path, link) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert (most, done) == (1, 40)
    assert names(tmp_path) == ["link"]


def test_threads_that_would_wait_for_each_other_forever(tmp_path: Path) -> None:
    """Three, each of which has a folder and wants the next one's: the last to ask is told."""
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    all_have = threading.Barrier(3)
    refusals, done = [], []

    def work(place: int) -> None:
        try:
            with lock_folder(folders[place], "lock", "output"):
                all_have.wait(300)
                with lock_folder(folders[place - 1], "lock", "output"):
                    done.append(place)
        except InputError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(done) == 2
    assert len(refusals) == 1
    assert "the thread that is writing there waits for this one; let one of" in refusals[0]


@pytest.mark.process
def test_a_forked_child_has_nothing_and_takes_nothing(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stop = threading.Event()

    def hold() -> None:
        with lock_folder(other, "lock", "output"):
            ready.set()
            stop.wait(300)

    ready = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(300)
    with lock_folder(tmp_path, "lock", "output"):
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
    thread.join(300)
    with lock_folder(tmp_path, "lock", "output"):
        child = os.fork()
    if child == 0:  # it has left the block, and the folder is its parent's all the same
        os._exit(0 if (tmp_path / "lock").exists() else 1)
    os.waitpid(child, 0)
    with lock_folder(tmp_path, "lock", "output"), lock_folder(other, "lock", "output"):
        pass


@pytest.mark.process
def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
from minilm.disk import lock_folder
with lock_folder(pathlib.Path(sys.argv[1]), "lock", "output"):
    os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=ROOT)
    assert done.returncode == 9
    assert (tmp_path / "lock").exists()
    with lock_folder(tmp_path, "lock", "output"):
        pass


@pytest.mark.process
@pytest.mark.parametrize("number", MISSING)
def test_without_flock_there_is_another_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with lock_folder(tmp_path, "lock", "output"):
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
        with lock_folder(tmp_path, "lock", "output"):
            os._exit(9)
    os.waitpid(child, 0)
    assert names(tmp_path) == ["lock.soft"]  # of a process that was killed
    with lock_folder(tmp_path, "lock", "output"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_lock_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError) as caught,
        lock_folder(tmp_path / "none", "lock", "output"),
    ):
        pass
    assert caught.value.filename == str(tmp_path / "none")


def test_metadata_stay_in_their_order_and_are_read_by_the_library(tmp_path: Path) -> None:
    """The library writes several keys in an order of chance; eight keys have 40,320 of them."""
    tensors = {"b": np.arange(6, dtype="f4").reshape(2, 3), "a": np.arange(3, dtype="i1")}
    metadata = {name: f'é "{name}" \x01\n\U0001f600' for name in "hgfedcba"}
    plain = safetensors.numpy.save(tensors)
    assert with_metadata(plain, {"format": "np"}) == safetensors.numpy.save(
        tensors, {"format": "np"}
    )
    data = with_metadata(plain, metadata)
    assert data == with_metadata(plain, metadata)
    assert [data.index(f'"{name}":"'.encode()) for name in metadata] == sorted(
        data.index(f'"{name}":"'.encode()) for name in metadata
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == metadata
        for name, value in tensors.items():
            assert np.array_equal(file.get_tensor(name), value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "{home}"),
        ("~/a/b", "{home}/a/b"),
        ("a/~/b", "a/~/b"),
        ("~no-such-user-here/x", "~no-such-user-here/x"),
        ("~$notes.txt", "~$notes.txt"),
    ],
)
def test_with_home(
    path: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for given in (path, Path(path)):
        assert with_home(given) == Path(expected.format(home=tmp_path))
        assert absolute(given) == Path(expected.format(home=tmp_path)).absolute()


def test_a_file_is_written_to_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_output(Path("~/x"), lambda file: file.write(b"1"))
    assert (tmp_path / "x").read_bytes() == b"1"

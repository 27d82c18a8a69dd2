"""Files that are complete or not there, folders that one process writes to at a time, and names
that stay within a folder.

In: paths, and what writes. Used wherever something is left on a disk, or is looked up under a name
that a file tells: by `files.py`, the parts of `shards.py`, the segments of `tasks/segments.py`.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from minilm.errors import InputError

__all__ = ["file_sha256", "held", "inside", "sync", "sync_folder", "write_atomically"]


def inside(name: Any) -> str:
    r"""A path that a file tells of, as one below that file's folder.

    Files come from elsewhere, also from other systems. So this is about names only, the same on
    every system; what a link of that name on this disk leads to is up to who made the link.

    Args:
        name: What the file says, such as "1_Pooling" or "a\\b".

    Returns:
        The same with "/" between its parts; "" for the folder itself.

    Raises:
        ValueError: It is not a string, or leads outside: it has "..", a root or a drive.
    """
    path = PureWindowsPath(name) if isinstance(name, str) else None  # knows both separators
    # Windows drops blanks and dots at the end: to it ".. " is "..".
    if path is None or path.anchor or "\0" in name or any(not p.strip(" .") for p in path.parts):
        raise ValueError(f"{name!r} leads outside the folder")
    return "/".join(path.parts)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that it is complete or not there, also beside parallel writers.

    Args:
        path: Where it goes; its folder must exist.
        write: Is given the open file, and leaves it open.

    Raises:
        OSError: The folder is missing or may not be written to, or the disk is full.
    """
    # A name of its own in the same folder: parallel runs don't meet, and the rename is atomic.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            write(file)
            sync(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(file: IO[bytes]) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def held(folder: Path, name: str, argument: str) -> Iterator[None]:
    """Hold a folder against other processes that would write to it.

    It is a lock of the system, which ends with its process, however that ends.

    Args:
        folder: It must exist.
        name: Of the file in it that is locked; it is removed at the end.
        argument: What the folder is called where the user named it.

    Raises:
        InputError: Another process has it.
    """
    path = folder / name
    while True:
        file = path.open("ab")
        try:
            _lock(file)
            with suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    break
            file.close()  # whoever had it has removed it meanwhile
        except BlockingIOError as error:
            file.close()
            raise InputError(
                f"{folder}: another process is writing there; wait until it is done", argument
            ) from error
        except BaseException:
            file.close()
            raise
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # some systems can't remove what is open
                path.unlink()


def _lock(file: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt

        lock: Any = msvcrt
        try:
            lock.locking(file.fileno(), lock.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

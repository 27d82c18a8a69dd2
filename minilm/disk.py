"""Files that are complete or not there, folders that one writer has at a time, and names
that stay within a folder.

In: paths, and what writes. Used wherever something is left on a disk, or is looked up under a name
that a file tells: by `files.py`, the parts of `shards.py`, the segments of `tasks/segments.py`.
"""

import errno
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import IO, Any
from weakref import WeakValueDictionary

from minilm.errors import InputError

__all__ = ["file_sha256", "held", "inside", "sync", "sync_folder", "write_atomically"]


# What a file system answers that has no such call as fsync or flock.
_HAS_NONE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK}


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


class _Turn:
    """Which thread of this process has a folder."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None


_turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()
_turns_lock = threading.Lock()


def _forget_turns() -> None:
    """In a forked child: the threads that had folders are not there."""
    global _turns, _turns_lock
    _turns, _turns_lock = WeakValueDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_turns)


@contextmanager
def held(folder: Path, name: str, argument: str) -> Iterator[None]:
    """Hold a folder against all others that would write to it.

    Threads of this process wait for each other. Another process is told of at once. The lock is one
    of the system, which ends with its process, however that ends. Where a file system has none it
    is a file that tells the process; one that is left by a process of this machine that is gone
    doesn't count.

    Args:
        folder: It must exist.
        name: Of the file in it that is locked; it is removed at the end, and so is `NAME.soft`.
        argument: What the folder is called where the user named it.

    Raises:
        InputError: Another process has it; or this very thread, which can't wait for itself.
        OSError: No file can be made there.
    """
    key = os.path.realpath(folder / name)
    with _turns_lock:
        turn = _turns.setdefault(key, _Turn())
    if turn.owner == threading.get_ident():
        raise InputError(
            f"{folder}: this thread is writing there already; wait until it is done", argument
        )
    with turn.lock:
        turn.owner = threading.get_ident()
        try:
            with _held_by_process(folder, name, argument):
                yield
        finally:
            turn.owner = None


@contextmanager
def _held_by_process(folder: Path, name: str, argument: str) -> Iterator[None]:
    # Not at the top: it takes 0.06 s, and `--help` needs no lock.
    from filelock import FileLock, SoftFileLock, Timeout

    folder.stat()  # the library would make one that is not there
    native, soft = folder / name, folder / f"{name}.soft"
    path = native
    with ExitStack() as stack:
        try:
            try:
                lock = FileLock(native, timeout=0, fallback_to_soft=False, thread_local=False)
                stack.enter_context(lock.acquire())
            except OSError as error:
                if error.errno not in _HAS_NONE:
                    raise
                native.unlink(missing_ok=True)
                path = soft
                stack.enter_context(SoftFileLock(soft, timeout=1, thread_local=False).acquire())
        except Timeout as error:
            left = f"; if there is none, remove {soft}" if path == soft else ""
            raise InputError(
                f"{folder}: another process is writing there; wait until it is done{left}", argument
            ) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(error.errno or errno.EIO, reason, str(folder)) from error
        process = os.getpid()
        try:
            yield
        finally:
            if os.getpid() != process:  # a forked child leaves what is its parent's
                stack.pop_all()
            elif path == native:
                with suppress(OSError):  # some systems can't remove what is open
                    native.unlink()

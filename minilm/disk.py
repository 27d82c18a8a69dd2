"""Files that are complete or not there, folders with one writer at a time, and names that stay
within a folder.

What is complete stays so when the power fails. A disk writes in an order of its own, so the system
is asked to wait: first until the contents of a file are on it, then the new name is given, then
until the folder that has the name is. What refers to other files (an index, a manifest,
modules.json) gets its name after theirs are on the disk; what is referred to is removed after that.

In: paths, and functions that write. Used for all that is left on a disk, or is looked up under a
name that stands in a file: by `outputs.py`, `files/shards.py` and `index/segments.py`.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from operator import methodcaller
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import IO, Any
from weakref import WeakValueDictionary

from minilm.errors import InputError

__all__ = [
    "DoubledKeyError",
    "absolute",
    "check_header",
    "errors_about",
    "file_sha256",
    "inside",
    "lock_folder",
    "make_folder",
    "mount_of",
    "parse_json",
    "remove_files",
    "sync",
    "sync_folder",
    "temporary_name",
    "with_home",
    "with_metadata",
    "write_atomically",
    "write_together",
]

# Bytes of a name, and of a path below a folder: the least that Linux and macOS take.
_LONGEST_NAME, _LONGEST_PATH = 255, 1024
# The errors of a file system that has no fsync or no flock.
_HAS_NONE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK}


# --- names


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path from the root, which means the same in every working directory.

    "~" is the user's home, see `with_home`; links and ".." stay as they are. A relative path is a
    `FileNotFoundError` where the working directory was deleted.
    """
    path = with_home(path)
    try:
        return path.absolute()
    except FileNotFoundError as error:
        reason = "the working directory is gone; pass the path from the root"
        raise FileNotFoundError(errno.ENOENT, reason, str(path)) from error


def with_home(path: str | os.PathLike[str]) -> Path:
    """A path as a user wrote it, with the home of the user in place of a "~" at its start.

    This holds for files and folders, on the command line, where a shell expands only some of them,
    and in Python. A "~name" that is not a user's stays, since files may have such names.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111  # pathlib's raises for an unknown user


def inside(name: Any) -> str:
    r"""Check that a path which stands in a file can be that of a file below that file's folder.

    Files come from elsewhere, also from other systems. So this looks at names only, and is the same
    on every system; where a link of that name on this disk leads is up to who made the link. What
    Linux has no name for (it takes 255 bytes of UTF-8) would be an error of the system's wherever
    it is looked up, which knows nothing of the file that it stands in.

    Args:
        name: The path as the file has it, such as "1_Pooling" or "a\\b".

    Returns:
        The path with "/" between its parts; "" for the folder itself.

    Raises:
        ValueError: It is not a string; it leads outside: it has "..", a root or a drive; or it is
            too long for a file, or no Unicode text.
    """
    path = PureWindowsPath(name) if isinstance(name, str) else None  # knows both separators
    # Windows drops blanks and dots at the end: to it ".. " is "..".
    if path is None or path.anchor or "\0" in name or any(not p.strip(" .") for p in path.parts):
        raise ValueError(f"{name!r} leads outside the folder")
    within = "/".join(path.parts)
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in (*path.parts, within)]
    if max(sizes) > _LONGEST_PATH or max(sizes[:-1], default=0) > _LONGEST_NAME:
        raise ValueError(f"{name[:40]!r}... of {len(name):,} characters is too long for a file")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{name!r} is no Unicode text, so that no file has that name")
    return within


# --- JSON


class DoubledKeyError(ValueError):
    """A JSON object has a key twice, so that what it says depends on who reads it."""


def parse_json(data: bytes | str, parse_float: Callable[[str], float] | None = None) -> Any:
    """Parse JSON that comes from elsewhere.

    Args:
        data: The text.
        parse_float: Reads a number with a point or an exponent, by default as `float` does.

    Raises:
        ValueError: It is broken, or nested too deep for Python.
        DoubledKeyError: An object has a key more than once.
    """
    try:
        return json.loads(data, object_pairs_hook=_object_of, parse_float=parse_float)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise DoubledKeyError(f"has the key {doubled!r} more than once")
    return found


def check_header(file: IO[bytes]) -> None:
    """Check that the header of a safetensors file has no name twice.

    The format forbids it, and the library takes the last of them (seen with safetensors 0.8.0,
    November 2026). All else that can be wrong with a file is left to the library.

    Args:
        file: The file, at its beginning.

    Raises:
        DoubledKeyError: A name is there twice.
    """
    size = int.from_bytes(file.read(8), "little")
    try:
        parse_json(file.read(min(size, 100_000_000)))  # the library takes no longer one
    except DoubledKeyError as error:
        raise DoubledKeyError(f"its header {error}") from error
    except ValueError:
        return


# --- files


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that it is complete or not there, also beside parallel writers.

    An existing file's mode and group are kept. A link of that name is replaced, not followed.

    Args:
        path: The file; its folder must exist.
        write: A function that is given the open file, and leaves it open.

    Raises:
        OSError: The folder is missing or may not be written to, or the disk is full. It names
            `path`, and the disk. An existing file is as it was.
    """
    write_together({path: write})


def write_together(
    files: Mapping[Path, Callable[[IO[bytes]], object]],
    records: Mapping[Path, bytes | None] = MappingProxyType({}),
) -> None:
    """Write several files as `write_atomically` does: none gets its name before all are written.

    Args:
        files: What writes each of them.
        records: Files that say what those are, and their contents; None for no such file. One that
            says something else is removed first, and the new one gets its name last: so whatever
            ends the process, or the power, a file has its own record or none.
    """
    given = {path: data for path, data in records.items() if data is not None}
    files = dict(files) | {path: methodcaller("write", data) for path, data in given.items()}
    temporaries: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            # In the same folder, so that the rename is atomic.
            temporary = temporaries[path] = path.with_name(temporary_name(path.name))
            with errors_about(path, temporary), _Numberless(io.FileIO(temporary, "xb")) as file:
                _keep_attributes(path, temporary)
                write(file)
                sync(file)
        remove_files(p for p, data in records.items() if p.is_file() and p.read_bytes() != data)
        for path, temporary in temporaries.items():
            if path in records:
                sync_folder(path.parent)
            with errors_about(path, temporary):
                _take_place(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        sync_folder(folder)


def with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """Give a serialized safetensors file its metadata, in the order in which they are passed.

    safetensors keeps them in a map without an order, so that two processes write the same contents
    in different bytes as soon as there are two keys (seen with 0.8.0, November 2026).

    Args:
        data: What `safetensors.torch.save` or `safetensors.numpy.save` gives without metadata.
        metadata: Texts by name.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    contents = {"__metadata__": dict(metadata)} | json.loads(data[8:end])
    header = json.dumps(contents, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers begin at a multiple of 8 bytes
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(data)[end:]])


def temporary_name(name: str) -> str:
    """A hidden name for a file that will be called `name`: unique, so that parallel runs don't
    meet, and short, so that there is one for the longest name that a file can have.
    """
    return f".{name[:24]}.{uuid.uuid4().hex}.part"


class _Numberless(io.BufferedWriter):
    """A file without a descriptor.

    NumPy would write to the descriptor itself, and its error for a full disk says only "115200
    requested and 25568 written".
    """

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@contextmanager
def errors_about(path: Path, temporary: Path) -> Iterator[None]:
    """Inside a `with`, let errors name `path`, not its temporary name, and the disk if it is full.

    Args:
        path: The file or folder that is written.
        temporary: What it is called until it is complete.
    """
    try:
        yield
    except OSError as error:
        other = error.filename is not None and not str(error.filename).startswith(str(temporary))
        if other or error.errno is None:
            raise
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f" (the disk is mounted at {mount_of(path)})"
        raise OSError(error.errno, reason, str(path)) from error


def mount_of(path: Path) -> Path:
    """The folder at which the disk of a path is mounted."""
    whole = path.absolute()
    return next(folder for folder in (*whole.parents, whole) if os.path.ismount(folder))


def _keep_attributes(path: Path, temporary: Path) -> None:
    """Give a new file the mode and group of the one whose place it will take."""
    with suppress(FileNotFoundError):
        before = path.lstat()
        if stat.S_ISREG(before.st_mode):
            if hasattr(os, "chown") and before.st_gid != temporary.stat().st_gid:
                with suppress(OSError):  # of a group that the user is not in
                    os.chown(temporary, -1, before.st_gid)
            shutil.copystat(path, temporary)


def _take_place(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except OSError as error:
        # A file that is mounted by itself, as in containers, or another user's in a folder such as
        # /tmp: it can be written to, and not be replaced.
        refused = error.errno in (errno.EBUSY, errno.EPERM, errno.EACCES, errno.EXDEV)
        if not (refused and path.is_file() and os.access(path, os.W_OK)):
            raise
        with temporary.open("rb") as source, path.open("r+b") as target:
            shutil.copyfileobj(source, target)
            target.truncate()
            sync(target)
        temporary.unlink()


def sync(file: IO[bytes]) -> None:
    """Wait until what was written to a file is on the disk, where the system can."""
    file.flush()
    _sync(getattr(file, "raw", file).fileno())


def sync_folder(folder: Path) -> None:
    """Wait until new names in a folder are on the disk, where the system can."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the folder may be written to, but not listed
        return
    try:
        with errors_about(folder, folder):
            _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # This file system has no fsync, and the file is there all the same. Any other error is one
        # of writing.
        if error.errno not in _HAS_NONE:
            raise


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files so that they stay removed, whatever is done after; any may be missing."""
    removed = []
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()
            removed.append(path)
    for folder in {path.parent for path in removed}:
        sync_folder(folder)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents, so that they last, and return those that did not exist."""
    made: list[Path] = []
    for each in (*reversed(folder.parents), folder):
        if not each.exists():
            each.mkdir(exist_ok=True)
            sync_folder(each.parent)
            made.append(each)
    return made


def file_sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- locked folders


class _Turn:
    """Which thread of this process has a folder."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None

    def waits_for(self, thread: int) -> bool:
        """Whether a thread would wait for itself, if it waited for this turn: it has the turn, or
        one that the owner of this turn waits for.
        """
        turn: _Turn | None = self
        while turn is not None and turn.owner is not None:
            if turn.owner == thread:
                return True
            turn = _waiting.get(turn.owner)
        return False


_turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()
_waiting: dict[int, _Turn] = {}  # what each thread waits for
_turns_lock = threading.Lock()


def _forget_turns() -> None:
    """Forget, in a forked child, the threads that had folders: it has no such threads."""
    global _turns, _waiting, _turns_lock
    _turns, _waiting, _turns_lock = WeakValueDictionary(), {}, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_turns)


@contextmanager
def lock_folder(folder: Path, name: str, argument: str) -> Iterator[None]:
    """Inside a `with`, be the only one who writes to a folder.

    Threads of this process wait for each other; another process is an error at once. The lock is
    one of the system, which ends with its process, however that ends. Where a file system has none,
    it is a file that names the process; a file of a process of this machine that has ended doesn't
    count.

    Args:
        folder: It must exist.
        name: The file in it that is locked. It is removed at the end, and so is `NAME.soft`.
        argument: What the user calls the folder.

    Raises:
        InputError: Another process has the folder; or this very thread has it, or a thread that
            waits for this one.
        OSError: No file can be made there.
    """
    key = os.path.realpath(folder / name)
    thread = threading.get_ident()
    with _turns_lock:
        turn = _turns.setdefault(key, _Turn())
        if turn.waits_for(thread):
            why = "this thread is writing there already; wait until it is done"
            if turn.owner != thread:
                why = (
                    "the thread that is writing there waits for this one; let one of them finish "
                    "before the other begins"
                )
            raise InputError(f"{folder}: {why}", argument)
        _waiting[thread] = turn
    try:
        with turn.lock:
            _waiting.pop(thread, None)
            turn.owner = thread
            try:
                with _lock_against_processes(folder, name, argument):
                    yield
            finally:
                turn.owner = None
    finally:
        _waiting.pop(thread, None)  # Ctrl-C while it waited


@contextmanager
def _lock_against_processes(folder: Path, name: str, argument: str) -> Iterator[None]:
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

"""The place that the user wants a result in: checked before it is computed, written to afterwards.

In: a path as the user named it. Out: an error at once if nothing can be written there; then a file
that is complete or not there, or bytes into the stream that the name stands for.

A name can stand for more than a new file. A link is followed: the file that it points to gets the
contents, and the link stays. An existing file keeps its mode. /dev/stdout, /dev/fd/63 (which is
what `>(gzip > x.gz)` stands for), /dev/null and named pipes are written to as they are. Of a file
with other hard links only the given name gets the new contents. A file that was also read is
replaced like any other.
"""

import errno
import io
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from minilm.disk import mount_of, temporary_name, with_home, write_together
from minilm.errors import InputError

__all__ = [
    "check_folder",
    "check_output",
    "check_room",
    "is_standard_output",
    "is_stream",
    "write_output",
]

_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_LINKS = 40  # that a system follows


# --- before


def check_output(path: Path, argument: str, beside: Sequence[Path] = ()) -> None:
    """Find out whether a file can be written, by making and removing one in its folder.

    Args:
        path: The file, or another place that `write_output` can write to.
        argument: What the user calls it.
        beside: Other files that will be written with it.

    Raises:
        InputError: It can't be written; the message says why.
    """
    other = f"; it would be written beside {path.name}, choose another name"
    for each in (path, *(() if is_stream(path) else beside)):
        problem = _problem(each)
        if problem is not None:
            raise InputError(f"{each}: {problem}{'' if each is path else other}", argument)


def check_folder(folder: Path, argument: str) -> None:
    """Find out whether files can be written into a folder, which need not exist yet.

    If they can't be, the message of the `InputError` says why.
    """
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    try:
        if not place.is_dir():
            link = place.is_symlink() and not place.exists()
            found = "is a link that leads nowhere" if link else "is a file"
            raise InputError(f"{place}: {found}; pass a folder", argument)
        names = [place / each.name for each in (*folder.parents, folder)]
        for each in (*names, folder / ("x" * 100)):
            with suppress(FileNotFoundError):
                each.lstat()  # an error, if a name, or the whole of them, is too long
        problem = _trial(place / "trial")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        problem = f"can't be a folder: {_reason(error)}"
    if problem is not None:
        raise InputError(f"{folder}: {problem}", argument)


def check_room(path: Path, size: int) -> None:
    """Find out whether a disk has room for a result.

    Args:
        path: A file, or a folder.
        size: The least that will be written, in bytes.

    Raises:
        OSError: It has too little, by its own account.
    """
    if is_stream(path):
        return
    target = _target(path)
    folder = target if target.is_dir() else target.parent
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < size:  # some have no total, and tell nothing
        raise OSError(
            errno.ENOSPC,
            f"needs {size:,} bytes, and the disk that is mounted at {mount_of(folder)} has "
            f"{usage.free:,} left",
            str(path),
        )


def is_stream(path: Path) -> bool:
    """Whether a path stands for a pipe, a terminal or the like, which is written to as it is."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def is_standard_output(path: Path) -> bool:
    """Whether a path stands for standard output."""
    return _descriptor(path) == 1


def _problem(path: Path) -> str | None:
    """Why a path can't be written to; None if it can."""
    try:
        number = _descriptor(path)
        if number is not None:
            os.write(number, b"")  # an error, if it is closed or only read from
            return None
        target = _target(path)
        try:
            mode = target.lstat().st_mode
        except FileNotFoundError:
            return _trial(target)
        if stat.S_ISLNK(mode):
            return "is a link that leads nowhere"
        if stat.S_ISDIR(mode):
            return "is a folder; pass the name of a file"
        if not os.access(target, os.W_OK):
            return "may not be written to"
        if is_stream(target):
            return None
        return _trial(target) if stat.S_ISREG(mode) else "is neither a file nor a pipe"
    except (OSError, ValueError) as error:
        return f"can't be written: {_reason(error)}"


def _trial(target: Path) -> str | None:
    """Why there can't be new files beside a path."""
    temporary = target.with_name(temporary_name(target.name))
    try:
        with temporary.open("xb"):
            pass
        temporary.unlink(missing_ok=True)
    except OSError as error:
        return f"{target.parent} is not a folder that can be written to: {_reason(error)}"
    return None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# --- afterwards


def write_output(
    path: Path,
    write: Callable[[IO[bytes]], object],
    beside: Mapping[Path, bytes | None] | None = None,
) -> None:
    """Write a result to the place that the user named.

    Args:
        path: A file, which will be complete or as it was; or a stream, see `is_stream`.
        write: A function that is given the open file, and leaves it open.
        beside: Files that say what it is, and their contents, see `write_together`; none beside a
            stream.

    Raises:
        OSError: It can't be written, or the disk is full; the error names `path`.
    """
    path = with_home(path)
    if not is_stream(path):
        records = {_target(other): contents for other, contents in (beside or {}).items()}
        write_together({_target(path): write}, records)
        return
    buffer = io.BytesIO()  # some forms are written by seeking, which a pipe can't do
    write(buffer)
    number = _descriptor(path)
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        if number == 1 and hasattr(sys.stdout, "buffer"):  # also if a caller has put it there
            sys.stdout.buffer.write(buffer.getbuffer())
            sys.stdout.flush()
            return
        with path.open("wb") if number is None else os.fdopen(os.dup(number), "wb") as file:
            file.write(buffer.getbuffer())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno or errno.EIO, _reason(error), str(path)) from error


def _target(path: Path) -> Path:
    """The path itself, or where it leads if it is a link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _descriptor(path: Path) -> int | None:
    """The number of the open file of this process that a path stands for, if any. If it were opened
    by that name, a file that standard output is appended to would lose its contents.
    """
    text = path.as_posix()
    if text not in _STANDARD:
        try:
            text = os.path.abspath(path)  # noqa: PTH100  # Path.absolute keeps ".."
        except FileNotFoundError:  # it is relative, and the working directory is gone
            return None
    for _ in range(_LINKS):
        found = _DESCRIPTOR.fullmatch(text)
        if found or text in _STANDARD:
            return int(found[1]) if found else _STANDARD[text]
        try:
            link = os.readlink(text)  # noqa: PTH115
        except (OSError, ValueError):
            return None
        text = os.path.normpath(os.path.join(os.path.dirname(text), link))  # noqa: PTH118, PTH120
    return None

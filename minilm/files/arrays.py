"""Arrays in .npy and .npz files that come from elsewhere: whole, or refused.

In: a path. Out: arrays. NumPy reads as much as an array's header asks for, and leaves the rest: one
bit turned over in the header, and other numbers come out. (So did 2.4.6, November 2026; in a .npz
file the checksum of an array is looked at only at its last byte.) So whoever has read an array here
has read its file, or its part of the archive, to the end. Next: `stored.py`, `records.py` and
`parity/foreign.py`.
"""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["map_npy", "open_npz", "read_npy"]

_Array = np.ndarray[Any, Any]


def read_npy(path: Path) -> _Array:
    """Read a .npy file.

    Raises:
        ValueError, or others of NumPy: It is broken, or goes on behind the array.
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        return _read(file)


def map_npy(path: Path) -> _Array:
    """Map a .npy file, read-only, so that numbers are read when used. Errors as in `read_npy`."""
    # Not np.load, which opens an archive of that name too, and leaves it open.
    mapped = np.lib.format.open_memmap(path, mode="r")
    if mapped.offset + mapped.nbytes != path.stat().st_size:
        raise ValueError("goes on behind its array")
    array: _Array = mapped
    return array


@contextmanager
def open_npz(path: Path) -> Iterator[dict[str, Callable[[], _Array]]]:
    """Open a .npz file; give for each name a function that reads its array.

    Raises:
        ValueError, or others of zipfile and NumPy: It is broken, or a name is there twice; which of
            the two is read depends on who reads it.
        OSError: It can't be read.
    """
    with zipfile.ZipFile(path) as archive:
        found: dict[str, Callable[[], _Array]] = {}
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            if name in found:
                raise ValueError(f"has {name!r} more than once")
            found[name] = partial(_member, archive, member)
        yield found


def _member(archive: zipfile.ZipFile, name: str) -> _Array:
    with archive.open(name) as file:
        return _read(file)


def _read(file: IO[bytes]) -> _Array:
    array: _Array = np.lib.format.read_array(file, allow_pickle=False)
    if file.read(1):  # in an archive, this also compares the checksum
        raise ValueError("goes on behind its array")
    return array

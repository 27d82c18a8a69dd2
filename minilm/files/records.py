"""Read back the fingerprint that was kept with a file of vectors.

In: a path. Out: a `Fingerprint`, or None. `tables.py`, `arrow.py` and `shards.py` write them.
"""

import errno
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import safetensors

from minilm.disk import check_header, with_home
from minilm.errors import ConfigError, InputError, errors_of_libraries
from minilm.files.arrays import open_npz
from minilm.files.arrow import fingerprint_in, import_pyarrow
from minilm.files.tables import METADATA_KEY, NPZ_KEY, sidecar_path
from minilm.pretrained.fingerprint import Fingerprint

__all__ = ["read_fingerprint"]


def read_fingerprint(path: str | Path) -> Fingerprint | None:
    """Read the record that was kept with a file of vectors.

    Args:
        path: A `.npz`, `.safetensors` or `.parquet` file, which can hold the record, or any other.
            If there is none in it, the file beside it is read, see `sidecar_path`.

    Returns:
        The record; None if there is none.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigError: The record, or the file that should hold it, is broken.
    """
    path = with_home(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    read = _READERS.get(path.suffix.lower())
    place, text = path, read(path) if read else None
    if text is None and sidecar_path(path).is_file():
        place = sidecar_path(path)
        text = place.read_bytes()
    if text is None:
        return None
    try:
        return Fingerprint.from_json(text)
    except InputError as error:
        raise ConfigError(place, [str(error)]) from error


def _errors_about(path: Path, kind: str) -> AbstractContextManager[None]:
    return errors_of_libraries(lambda why: ConfigError(path, [f"is not {kind}, or broken: {why}"]))


def _from_npz(path: Path) -> bytes | None:
    with _errors_about(path, "a .npz file"), open_npz(path) as arrays:
        if NPZ_KEY not in arrays:
            return None
        array = arrays[NPZ_KEY]()
    if array.dtype != np.uint8:
        raise ConfigError(path, [f"{NPZ_KEY} has dtype {array.dtype}; expected uint8"])
    return bytes(array.tobytes())


def _from_safetensors(path: Path) -> bytes | None:
    with _errors_about(path, "a safetensors file"):
        with path.open("rb") as start:
            check_header(start)
        with safetensors.safe_open(path, "np") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
    text = metadata.get(METADATA_KEY)
    return None if text is None else text.encode("utf-8")


def _from_parquet(path: Path) -> bytes | None:
    import_pyarrow("reading Parquet files")
    import pyarrow.parquet

    with _errors_about(path, "a Parquet file"):
        schema = pyarrow.parquet.read_schema(path)
    return fingerprint_in(schema)


# The formats that can hold a record, with what reads its bytes, or None if there is none.
_READERS: dict[str, Callable[[Path], bytes | None]] = {
    ".npz": _from_npz,
    ".safetensors": _from_safetensors,
    ".parquet": _from_parquet,
}

"""Embed Parquet files on a Ray cluster: Parquet in, Parquet with vectors out.

    python scripts/learn/encode_on_ray.py texts vectors --actors 64 --address auto

INPUT is a Parquet file or a folder of them, OUTPUT a new folder: paths that this machine and every
machine of the cluster sees, or URIs. The package and the model must be on all of them, see
`minilm/adapters/ray.py`. The cluster needs one CPU more than the actors take, to read and to write;
without `--address` one is started here. What dies is replaced by Ray, and its work done again. The
file `OUTPUT/_SUCCESS`, written at the end, says that all rows are there, and by which model.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout is enough
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

from minilm.errors import InputError
from minilm.pretrained.hub import DEFAULT_MODEL


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("input", help="a Parquet file, or a folder of them")
    parser.add_argument("output", help="a folder, new or empty")
    parser.add_argument("--address", help="auto, HOST:PORT or ray://HOST:PORT")
    parser.add_argument("--actors", type=int, default=2, help="processes that embed (2)")
    parser.add_argument("--cpus-per-actor", type=int, default=1, help="threads of each (1)")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--on-bad-row", default="error", help="also skip, empty: if text is null")
    parser.add_argument("--precision", default="float32", help="also float16, int8, binary")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name on the Hub, or a folder")
    options = vars(parser.parse_args(arguments))
    source, target = (place(options.pop(name)) for name in ("input", "output"))
    address, may_skip = options.pop("address"), options["on_bad_row"] == "skip"
    from minilm.adapters.ray import encode_dataset  # first: it says what to install

    import ray.data  # isort: skip

    cpus = None if address else options["actors"] * options["cpus_per_actor"] + 1
    ray.init(address=address or "local", num_cpus=cpus, ignore_reinit_error=True)
    if files_in(target):
        raise InputError(f"{target}: is not empty; choose a new folder", "output")
    rows = ray.data.read_parquet(source)
    blocks = rows.repartition(target_num_rows_per_block=65536)  # what is done again if it is lost
    encode_dataset(blocks, **options).write_parquet(target)
    print(f"{target}: {verify(target, rows.count(), may_skip):,} rows")


def place(name: str) -> str:
    """Return a path that does not depend on a machine's current folder, or the URI as it is."""
    return name if "://" in name else os.path.abspath(name)  # noqa: PTH100  # of no file yet


def files_in(target: str) -> list[str]:
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(target)
    return [x.path for x in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))]


def verify(target: str, expected: int, may_skip: bool) -> int:
    """Count the rows and write `_SUCCESS`; an InputError if some are lost, doubled, or foreign."""
    from pyarrow import fs, parquet

    from minilm.files.arrow import fingerprint_in

    filesystem, path = fs.FileSystem.from_uri(target)
    names = [name for name in files_in(target) if name.endswith(".parquet")]
    parts = [parquet.ParquetFile(name, filesystem=filesystem) for name in names]
    rows: int = sum(part.metadata.num_rows for part in parts)
    if rows > expected or (rows < expected and not may_skip):
        raise InputError(f"{target}: has {rows:,} rows where there were {expected:,}", "output")
    records = {fingerprint_in(part.schema_arrow) for part in parts}
    if len(records) > 1 or None in records:
        raise InputError(f"{target}: not all parts are by the same model", "output")
    models = [json.loads(record) for record in records if record]
    done = {"rows": rows, "read_rows": expected, "files": len(parts), "fingerprint": models}
    with filesystem.open_output_stream(f"{path.rstrip('/')}/_SUCCESS") as file:
        file.write(json.dumps(done, indent=1, ensure_ascii=False).encode())
    return rows


if __name__ == "__main__":
    main()

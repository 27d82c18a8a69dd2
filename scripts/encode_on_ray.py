#!/usr/bin/env python3
r"""Embed Parquet files on a cluster of machines: Parquet in, Parquet with vectors out, by Ray Data.

    python scripts/encode_on_ray.py texts vectors --actors 2
    python scripts/encode_on_ray.py s3://bucket/texts s3://bucket/vectors \
        --address auto --actors 64 --cpus-per-actor 4

Without `--address` a cluster is started on this machine, and stopped at the end. INPUT is a Parquet
file or a folder of them, OUTPUT a folder that is new or empty; each a path that every machine of
the cluster sees, or a URI. This package and the model must be on every machine, see
`minilm/adapters/ray.py`.

A process or a machine that dies is replaced by Ray, and what it had not finished is done again. At
the end the rows are counted, and every part must have the same fingerprint; then `OUTPUT/_SUCCESS`
is written, as JSON. A folder without that file is of a run that did not end well. With
`--on-bad-row skip` fewer rows may come out, and the count only shows that none came twice.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout is enough

# Before Ray is imported: it would report to its makers, and show what this script doesn't use.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from minilm.errors import InputError, MinilmError, MissingPackageError  # noqa: E402
from minilm.files.sources import ON_BAD_ROW  # noqa: E402
from minilm.inference.truncation import TRUNCATION  # noqa: E402
from minilm.inputs import check_positive_int  # noqa: E402
from minilm.pretrained.hub import DEFAULT_MODEL  # noqa: E402
from minilm.quantize import PRECISIONS  # noqa: E402

SUCCESS = "_SUCCESS"


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 for an error that is told.
    """
    options = parse(arguments)
    try:
        import ray.exceptions
    except ModuleNotFoundError:
        error = MissingPackageError("scripts/encode_on_ray.py", "ray[data]", "ray")
        return fail(str(error))
    try:
        print(encode(options))
    except ray.exceptions.RayError as error:
        return fail(told(error))
    except (MinilmError, OSError) as error:
        return fail(str(error))
    return 0


def fail(message: str) -> int:
    print(f"encode_on_ray: {message}", file=sys.stderr)
    return 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="a Parquet file, or a folder of them")
    parser.add_argument("output", help="a folder, new or empty")
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument(
        "--address", help="auto, HOST:PORT or ray://HOST:PORT; else one is started"
    )
    cluster.add_argument("--actors", type=int, default=2, help="processes that embed (2)")
    cluster.add_argument("--cpus-per-actor", type=int, default=1, help="and threads of each (1)")
    cluster.add_argument("--gpus-per-actor", type=float, default=0.0)
    cluster.add_argument("--batch-size", type=int, default=1024, help="rows at a time (1024)")
    cluster.add_argument("--object-store-mb", type=int, help="of a cluster that is started")
    files = parser.add_argument_group("the files")
    files.add_argument("--column", default="text", help="the texts (text)")
    files.add_argument("--embedding-column", default="embedding", help="the vectors (embedding)")
    files.add_argument(
        "--rows-per-file", type=int, default=65536, help="rows that are done again if they are lost"
    )
    files.add_argument("--on-bad-row", choices=ON_BAD_ROW, default="error")
    files.add_argument("--keep-order", action="store_true", help="files, by name, in INPUT's order")
    model = parser.add_argument_group("the model")
    model.add_argument("--model", default=DEFAULT_MODEL, help="a name on the Hub, or a folder")
    model.add_argument("--dtype", default="float32", help="what to compute in")
    model.add_argument("--precision", choices=(*PRECISIONS, "float16"), default="float32")
    model.add_argument("--truncation", choices=TRUNCATION, default="warn")
    model.add_argument("--truncate-dim", type=int, help="keep so many numbers of each vector")
    model.add_argument("--prompt", help="put in front of every text")
    return parser.parse_args(arguments)


def encode(options: argparse.Namespace) -> str:
    """Do it, and verify what was written.

    Returns:
        What to print.
    """
    import ray
    import ray.data

    from minilm.adapters.ray import encode_dataset

    for name in ("actors", "cpus_per_actor", "batch_size", "rows_per_file"):
        check_positive_int(getattr(options, name), f"--{name.replace('_', '-')}")
    source, target = (place(name) for name in (options.input, options.output))
    started = time.monotonic()
    start_ray(options)
    try:
        # In tasks: what a machine of the cluster sees is what counts.
        on_cluster = ray.remote(num_cpus=0, max_retries=0)
        columns = (options.column, options.embedding_column)
        rows = ray.get(on_cluster(look).remote(source, target, *columns))
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = options.keep_order
        encode_dataset(
            ray.data.read_parquet(source).repartition(
                target_num_rows_per_block=options.rows_per_file
            ),
            options.model,
            actors=options.actors,
            cpus_per_actor=options.cpus_per_actor,
            gpus_per_actor=options.gpus_per_actor,
            batch_size=min(options.batch_size, options.rows_per_file),
            text_column=options.column,
            embedding_column=options.embedding_column,
            precision=options.precision,
            on_bad_row=options.on_bad_row,
            dtype=options.dtype,
            truncation=options.truncation,
            truncate_dim=options.truncate_dim,
            prompt=options.prompt,
        ).write_parquet(target)
        may_skip = options.on_bad_row == "skip"
        done = ray.get(on_cluster(verify).remote(target, rows, may_skip))
    finally:
        ray.shutdown()
    return (
        f"{options.output}: {done['rows']:,} rows in {done['files']:,} files, "
        f"{time.monotonic() - started:.0f} s"
    )


def start_ray(options: argparse.Namespace) -> None:
    """Go to the cluster, or start one. It needs a CPU beside those of the actors, to read and to
    write: without one they would wait for each other forever.
    """
    import ray

    taken = options.actors * options.cpus_per_actor
    if options.address is not None:
        ray.init(address=options.address)
        there = int(ray.cluster_resources().get("CPU", 0))
        if there <= taken:
            print(
                f"encode_on_ray: the cluster has {there} CPUs and the actors take {taken}; if it "
                "doesn't grow, none is left to read and write, and nothing will ever be done",
                file=sys.stderr,
            )
        return
    store = options.object_store_mb
    ray.init(
        address="local",
        num_cpus=taken + 1,
        include_dashboard=False,
        **({} if store is None else {"object_store_memory": store << 20}),
    )


def place(name: str) -> str:
    """A path as the machines of the cluster find it, whatever their current folder is; a URI."""
    return name if "://" in name else os.path.abspath(name)  # noqa: PTH100  # of no file yet


def look(source: str, target: str, column: str, embedding_column: str) -> int:
    """Whether it can be done.

    Returns:
        The number of rows.

    Raises:
        InputError: OUTPUT is not empty, or INPUT has not the right columns.
        FileNotFoundError: There is no INPUT.
    """
    from pyarrow import dataset, fs

    filesystem, path = fs.FileSystem.from_uri(target)
    selector = fs.FileSelector(path, allow_not_found=True)
    if filesystem.get_file_info(path).is_file or filesystem.get_file_info(selector):
        raise InputError(f"{target}: is not empty; choose a new folder", "output")
    given = dataset.dataset(source, format="parquet")
    if column not in given.schema.names:
        known = ", ".join(map(repr, given.schema.names)) or "none"
        raise InputError(f"{source}: has no {column!r}; choose with --column, of {known}", "input")
    if embedding_column in given.schema.names:
        raise InputError(
            f"{source}: has {embedding_column!r} already; choose another name with "
            "--embedding-column",
            "input",
        )
    return int(given.count_rows())


def verify(target: str, rows: int, may_skip: bool) -> dict[str, Any]:
    """Whether all rows are there, by one and the same model; then `_SUCCESS` says so.

    Raises:
        InputError: They are not.
    """
    import pyarrow.parquet
    from pyarrow import fs

    from minilm.files.arrow import fingerprint_in

    filesystem, path = fs.FileSystem.from_uri(target)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    written = 0
    records: dict[bytes | None, str] = {}
    names = sorted(info.path for info in found if info.extension == "parquet")
    for name in names:
        with pyarrow.parquet.ParquetFile(name, filesystem=filesystem) as part:
            written += part.metadata.num_rows
            records[fingerprint_in(part.schema_arrow)] = name
    if written != rows and not (may_skip and written < rows):
        raise InputError(
            f"{target}: has {written:,} rows where there were {rows:,}; is it one place that all "
            "machines of the cluster see?",
            "output",
        )
    if len(records) > 1 or None in records:
        some = ", ".join(sorted(records.values())[:2])
        raise InputError(
            f"{target}: not all parts are by the same model, see {some}; is it the same on all "
            "machines of the cluster?",
            "output",
        )
    done = {"rows": written, "read_rows": rows, "files": len(names)}
    record = {**done, "fingerprint": [json.loads(text) for text in records if text]}
    with filesystem.open_output_stream(f"{path.rstrip('/')}/{SUCCESS}") as file:
        file.write((json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    return done


def told(error: BaseException) -> str:
    """What an error of Ray is about: the error of this package, or of a file, that is within it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, MinilmError | OSError):
        return str(cause)
    # Of one that was raised in an actor only the text is left.
    found = re.findall(r"^minilm\.errors\.\w+: (.+?)$(?=\n\n|\Z)", str(error), re.M | re.S)
    return str(found[-1] if found else error)


if __name__ == "__main__":
    raise SystemExit(main())

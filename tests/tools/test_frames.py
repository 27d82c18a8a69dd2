"""Data frames: what else becomes of the columns and of the fingerprint."""

import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

from written import Written, run_line, tool

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary", "ubinary"])
def test_polars_and_pandas_keep_the_type(written: Written, precision: str) -> None:
    polars, pandas = tool("polars"), tool("pandas")
    folder = written.file(precision)
    of_polars = polars.read_parquet(folder / "*.parquet")["embedding"].to_numpy()
    of_pandas = np.stack(pandas.read_parquet(folder)["embedding"])
    for x in (of_polars, of_pandas):
        assert x.dtype == written.codes[precision].dtype
        assert np.array_equal(x, written.codes[precision])


def test_fastparquet_gives_the_bytes_of_float16(written: Written) -> None:
    tool("fastparquet")
    rows = tool("pandas").read_parquet(written.file("float16"), engine="fastparquet")
    for given, number in zip(rows["embedding"][0], written.codes["float16"][0], strict=True):
        assert isinstance(given, bytes)
        assert given == number.tobytes().rstrip(b"\0")


def _write_by_polars(source: str, target: Path) -> None:
    tool("polars").read_parquet(source).write_parquet(target)


def _write_by_pandas(source: str, target: Path) -> None:
    tool("pandas").read_parquet(Path(source).parent).to_parquet(target)


def _write_by_duckdb(source: str, target: Path) -> None:
    tool("duckdb").sql(f"COPY (FROM '{source}') TO '{target}' (FORMAT parquet)")


def _write_by_datasets(source: str, target: Path) -> None:
    datasets = tool("datasets")
    rows = datasets.load_dataset(
        "parquet", data_files=source, split="train", cache_dir=str(target.parent)
    )
    rows.to_parquet(target)


def _write_by_pyarrow(source: str, target: Path) -> None:
    parquet = tool("pyarrow.parquet")
    parquet.write_table(parquet.read_table(Path(source).parent), target)


@pytest.mark.parametrize(
    ("write", "keeps"),
    [
        (_write_by_polars, False),
        (_write_by_pandas, False),
        (_write_by_duckdb, False),
        (_write_by_datasets, False),
        (_write_by_pyarrow, True),
    ],
)
def test_who_keeps_the_fingerprint(
    write: Callable[[str, Path], None], keeps: bool, written: Written, tmp_path: Path
) -> None:
    target = tmp_path / "again.parquet"
    write(f"{written.file('vectors')}/*.parquet", target)
    metadata = tool("pyarrow.parquet").read_schema(target).metadata or {}
    assert (b"minilm.fingerprint" in metadata) is keeps


def _by_polars(folder: Path) -> int:
    return int(tool("polars").scan_parquet(f"{folder}/").collect().height)


def _by_datasets(folder: Path) -> int:
    datasets = tool("datasets")
    cache = str(folder.parent / "cache")
    rows = datasets.load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=cache)
    return int(rows.num_rows)


def _by_daft(folder: Path) -> int:
    return int(tool("daft").read_parquet(str(folder)).count_rows())


def _by_duckdb(folder: Path) -> int:
    sql = f"SELECT count(*) FROM read_parquet('{folder}/*')"
    return int(tool("duckdb").connect().sql(sql).fetchall()[0][0])


def _by_clickhouse(folder: Path) -> int:
    chdb = tool("chdb")
    return int(str(chdb.query(f"SELECT count() FROM file('{folder}/*', 'Parquet')", "TSV")))


@pytest.mark.parametrize("read", [_by_polars, _by_datasets, _by_daft, _by_duckdb, _by_clickhouse])
def test_whole_folder(read: Callable[[Path], int], written: Written, tmp_path: Path) -> None:
    """That is why nothing but parts is in it: another file, and they fail."""
    folder = tmp_path / "vectors"
    shutil.copytree(written.file("vectors"), folder)
    assert read(folder) == len(written.texts)
    (folder / "_note.json").write_text("{}")
    with pytest.raises(Exception, match=r"(?i)parquet|file extensions"):
        read(folder)


def test_pyarrow_refuses_a_column_that_the_path_has_too(written: Written, tmp_path: Path) -> None:
    """What DuckDB, ClickHouse and Spark do: in their files."""
    read = tool("pyarrow.parquet").read_table
    shutil.copytree(written.file("vectors"), tmp_path / "kind=x")
    with pytest.raises(tool("pyarrow").ArrowTypeError, match="Field kind has incompatible types"):
        read(tmp_path)


def test_daft_gives_rows_in_any_order(written: Written) -> None:
    daft = tool("daft")
    read = daft.read_parquet(str(written.file("vectors") / "*.parquet")).to_pydict()
    assert sorted(read["id"]) == list(range(len(written.texts)))


def test_ray_reads_and_sorts(written: Written, tmp_path: Path) -> None:
    ray = tool("ray")
    with chdir(tmp_path):  # to what its paths are relative
        # "local": it would join another cluster of this machine.
        ray.init("local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        x = run_line("Ray Data", written, tmp_path)["x"]
        assert np.array_equal(x, written.vectors)
        assert x.dtype == np.float32
    finally:
        ray.shutdown()

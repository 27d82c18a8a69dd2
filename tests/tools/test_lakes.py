"""Delta Lake, Iceberg and Vortex: what they take, and what comes back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from written import Array, Written, run_line, tool

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


def numbers(table: Any) -> Array:
    """The vectors, in the order of `id`."""
    column: Any = np.stack(table.select(["id", "embedding"]).sort_by("id")["embedding"].to_numpy())
    assert isinstance(column, np.ndarray)
    return column


def test_delta_lake(written: Written, tmp_path: Path) -> None:
    run_line("Delta Lake", written, tmp_path)
    table = tool("deltalake").DeltaTable(tmp_path / "table").to_pyarrow_table()
    assert np.array_equal(numbers(table), written.vectors)
    assert not table.schema.metadata


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_delta_lake_takes_int8(written: Written, tmp_path: Path, precision: str) -> None:
    deltalake = tool("deltalake")
    deltalake.write_deltalake(tmp_path / "t", written.table(precision))
    table = deltalake.DeltaTable(tmp_path / "t").to_pyarrow_table()
    assert np.array_equal(numbers(table), written.codes[precision])


@pytest.mark.parametrize("precision", ["float16", "uint8", "ubinary"])
def test_delta_lake_refuses(written: Written, tmp_path: Path, precision: str) -> None:
    deltalake = tool("deltalake")
    with pytest.raises(Exception, match=r"Float16|unmasked nulls"):
        deltalake.write_deltalake(tmp_path / "t", written.table(precision))


def test_delta_lake_loses_large_bytes_where_null_is_allowed(
    written: Written, tmp_path: Path
) -> None:
    """Which our column does not allow; another program's may."""
    pyarrow, deltalake = tool("pyarrow"), tool("deltalake")
    codes = written.codes["uint8"]
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(codes.ravel()), codes.shape[1])
    deltalake.write_deltalake(tmp_path / "t", pyarrow.table({"embedding": column}))
    read = deltalake.DeltaTable(tmp_path / "t").to_pyarrow_table()["embedding"]
    assert read.combine_chunks().flatten().null_count == (codes > 127).sum() > 0


def test_iceberg(written: Written, tmp_path: Path) -> None:
    catalogs, pyarrow = tool("pyiceberg.catalog"), tool("pyarrow")
    uri = {"uri": f"sqlite:///{tmp_path}/catalog.db", "warehouse": f"file://{tmp_path}"}
    catalog = catalogs.load_catalog("c", type="sql", **uri)
    catalog.create_namespace("n")
    found = run_line("Iceberg", written, tmp_path, catalog=catalog)
    table, data = found["table"], found["data"]
    assert np.array_equal(numbers(table.scan().to_arrow()), written.vectors)

    fields = [field.with_nullable(True) for field in data.schema]
    loose = data.cast(pyarrow.schema(fields))
    with pytest.raises(ValueError, match="Mismatch in fields"):
        table.append(loose)


def test_vortex(written: Written, tmp_path: Path) -> None:
    run_line("Vortex", written, tmp_path)
    read = tool("vortex").open(str(tmp_path / "of.vortex")).to_arrow().read_all()
    assert np.array_equal(numbers(read), written.vectors)
    assert not read.schema.metadata

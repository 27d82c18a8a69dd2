"""ClickHouse, as the library chdb: distances, and sums that wrap around."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from written import Written, check_search, tool

chdb = tool("chdb")
pytestmark = pytest.mark.filterwarnings("ignore")

HAMMING = "arraySum(arrayMap((a, b) -> bitCount(bitXor(a, b)), x, y))"
DOT = "dotProduct(x, {})"


def search(written: Written, precision: str, distance: str, order: str = "") -> Any:
    """Search by an expression of `x`, a row, and `y`, the query."""
    folder = written.file("vectors" if precision == "float32" else precision)
    table = f"(SELECT id, embedding AS x FROM file('{folder}/*.parquet'))"

    def nearest(row: int) -> tuple[list[int], list[float]]:
        y = f"(SELECT x FROM {table} WHERE id = {row})"
        found = chdb.query(
            f"WITH {y} AS y SELECT id, {distance} AS d FROM {table} ORDER BY d {order} LIMIT 3",
            "ArrowTable",
        )
        return found["id"].to_pylist(), found["d"].to_pylist()

    return nearest


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_cosine(written: Written, precision: str) -> None:
    nearest = search(written, precision, "cosineDistance(x, y)")
    check_search(nearest, written.distances("cosine", precision))


def test_path_takes_the_place_of_a_column(written: Written, tmp_path: Path) -> None:
    shutil.copytree(written.file("vectors"), tmp_path / "kind=x")
    found = chdb.query(f"SELECT DISTINCT kind FROM file('{tmp_path}/*/*.parquet')", "ArrowTable")
    assert found["kind"].to_pylist() == ["x"]  # "sentence" is in the files


def test_bits(written: Written) -> None:
    check_search(search(written, "ubinary", HAMMING), written.distances("hamming", "ubinary"))


def test_dot_product_of_int8_wraps_around(written: Written) -> None:
    exact = written.distances("dot", "int8")
    assert exact.diagonal().min() > 2**15
    rows, products = search(written, "int8", DOT.format("y"), "DESC")(7)
    assert rows[0] != 7
    assert max(products) < 2**15
    wide = search(written, "int8", DOT.format("y::Array(Int32)"), "DESC")
    found, products = wide(7)
    assert found[0] == 7
    assert np.array_equal(products, exact[7, found])


def test_rows_come_in_any_order(written: Written) -> None:
    folder = written.file("vectors")
    read = chdb.query(f"SELECT id FROM file('{folder}/*.parquet')", "ArrowTable")["id"].to_pylist()
    assert sorted(read) == list(range(len(written.texts)))

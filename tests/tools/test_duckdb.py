"""DuckDB: its distances, on what it reads from files and on what it is handed in memory."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from written import Written, check_search, tool

duckdb = tool("duckdb")
tool("pyarrow")

HAMMING = "list_sum(list_transform(list_zip(a, b), lambda p: bit_count(xor(p[1], p[2]))))"


def search(written: Written, precision: str, distance: str, descending: bool = False) -> Any:
    """Search by an expression of `a`, a row, and `b`, the query."""
    folder = written.file("vectors" if precision == "float32" else precision)

    def nearest(row: int) -> tuple[list[int], list[float]]:
        found = duckdb.sql(
            f"WITH t AS (SELECT id, embedding AS a FROM '{folder}/*.parquet') "
            f"SELECT id, {distance} AS d FROM t, (SELECT a AS b FROM t WHERE id = {row}) "
            f"ORDER BY d {'DESC' if descending else ''}, id LIMIT 3"
        ).fetchall()
        return [row for row, _ in found], [distance for _, distance in found]

    return nearest


@pytest.mark.parametrize(
    "distance",
    [
        "list_cosine_distance(a, b)",
        "a <=> b",
        "array_cosine_distance(a::FLOAT[384], b::FLOAT[384])",
    ],
)
def test_cosine(written: Written, distance: str) -> None:
    check_search(search(written, "float32", distance), written.distances("cosine"))


def test_float16_of_files(written: Written) -> None:
    check_search(
        search(written, "float16", "list_cosine_distance(a, b)"),
        written.distances("cosine", "float16"),
    )


def test_bits(written: Written) -> None:
    check_search(search(written, "ubinary", HAMMING), written.distances("hamming", "ubinary"))


def test_functions_of_arrays_need_a_cast(written: Written) -> None:
    with pytest.raises(duckdb.BinderException, match="explicit type casts"):
        search(written, "float32", "array_cosine_distance(a, b)")(0)


@pytest.mark.parametrize("name", ["kind", "KIND"])
def test_path_takes_the_place_of_a_column(written: Written, tmp_path: Path, name: str) -> None:
    shutil.copytree(written.file("vectors"), tmp_path / f"{name}=x")
    found = duckdb.sql(f"SELECT DISTINCT kind FROM '{tmp_path}/*/*.parquet'").fetchall()
    assert found == [("x",)]  # "sentence" is in the files


def types(source: Any, column: str = "embedding") -> str:
    with duckdb.connect() as connection:  # which an error leaves without use
        ((kind,),) = connection.sql(f"SELECT typeof({column}) FROM source LIMIT 1").fetchall()
    return str(kind)


def _polars(table: Any) -> Any:
    return tool("polars").from_arrow(table)


@pytest.mark.parametrize("hand_over", [lambda table: table, _polars])
def test_float16_in_memory_is_refused(written: Written, hand_over: Callable[[Any], Any]) -> None:
    """Even if another column is asked for."""
    assert types(hand_over(written.table("float32"))) == "FLOAT[384]"
    for column in ("embedding", "id"):
        with pytest.raises(duckdb.NotImplementedException, match="Arrow Type e"):
            types(hand_over(written.table("float16")), column)
